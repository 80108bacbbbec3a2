"""Where a pool's pages lie; see `kvprefetch_kernels.pages`."""

from kvprefetch_kernels.pages import Pages, describe

__all__ = ["Pages", "describe"]
