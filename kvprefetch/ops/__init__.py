"""Page operations. On a CPU: the reference in torch."""

from kvprefetch_kernels.rows import gather_rows, write_rows

__all__ = ["gather_rows", "write_rows"]
