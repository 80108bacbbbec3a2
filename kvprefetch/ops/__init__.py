"""Page operations. On a CPU: the reference in torch; on a GPU: Triton kernels where they are faster.

Kernels are imported when a GPU first needs them, so that a CPU worker starts without Triton.
"""

from kvprefetch_kernels.rows import gather_rows, write_rows

__all__ = ["gather_rows", "write_rows"]
