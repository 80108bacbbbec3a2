"""A gateway before any OpenAI-compatible server: it passes requests on, and has the engine's own cache warm in time."""
