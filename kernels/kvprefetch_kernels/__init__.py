"""Page operations, one a file. Knows nothing of kvprefetch; reached through `kvprefetch.ops` alone."""
