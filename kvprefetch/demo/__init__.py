"""The demo: the same questions answered cold, from a reactive cache, and preloaded."""
