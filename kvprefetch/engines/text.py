"""From sampled tokens to streamed text: incremental decoding and stop strings."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """Turns tokens into text pieces that can be shown at once.

    Text that may be the beginning of a stop string is held back until it is decided; a stop string and all
    after it are never shown. Without a tokenizer every piece is empty.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer if tokenizer is not None else None
        self._decode = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` lets through; sets `stopped` when it completes a stop string."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._held += self._decode.step(self._tokenizer, token) or ""
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((self._overlap(text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, once it is sure that no stop string comes."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)
