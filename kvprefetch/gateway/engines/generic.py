"""Any server that speaks OpenAI's API: nothing is known of it but what its answers say."""

from kvprefetch.gateway.contract import Draft, Link, Rendered, Traits
from kvprefetch.gateway.engines.text import TextRenderer
from kvprefetch.settings import UpstreamSettings


class Generic:
    """An engine that is warmed through each request's own endpoint. What it does and keeps, it does not say."""

    def __init__(self, link: Link, settings: UpstreamSettings) -> None:
        self.traits = Traits("openai", capacity_tokens=settings.capacity_tokens or None)
        self._text = TextRenderer()

    async def render(self, draft: Draft) -> Rendered:
        """By its text."""
        return self._text.render(draft)

    async def load(self) -> int | None:
        """It does not say."""
        return None

    def cached(self, rendered: Rendered, salt: str) -> int | None:
        """It does not say."""
        return None

    def learn(self, rendered: Rendered, end: int, prompt_tokens: int) -> None:
        """Estimates become better by it."""
        self._text.learn(rendered, end, prompt_tokens)

    async def close(self) -> None:
        """Nothing is held."""
