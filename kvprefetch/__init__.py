"""kvprefetch."""
