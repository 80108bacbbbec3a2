"""What to do next, and what became of it. Pure: no torch, no clock, no I/O."""
