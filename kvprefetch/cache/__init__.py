"""Block keys, prefix index, page accounting, eviction. Pure: no torch, no clock, no I/O."""
