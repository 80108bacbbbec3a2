"""Engines behind the gateway: what is known of each, how its prompts are rendered, and how they are warmed."""
