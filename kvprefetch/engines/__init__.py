"""Engines run a model over paged KV."""
