"""Connections to a cache service: synchronous, thread-safe, no torch."""
