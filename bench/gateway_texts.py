"""Texts for the gateway's bench: stretches of the standard library's source, each told apart by its first words.

Nothing is found in an engine's cache by accident: every text begins with a number that no other has.
"""

import random
import sysconfig
from pathlib import Path
from typing import Any

from gateway_engine import BLOCK
from tokenizers import Tokenizer

_OPENING, _CLOSING = "<|im_start|>", "<|im_end|>\n"
_WORDS = ("what", "does", "the", "second", "function", "return", "when", "its", "argument", "is", "an", "empty", "list")


class Texts:
    """Draws texts in the tokens of the model in `folder`, whose chat template is ChatML."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
        text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        self._corpus: list[int] = self.tokenizer.encode(text[:1_500_000], add_special_tokens=False).ids

    def ids(self, tokens: int) -> list[int]:
        """So many tokens, others at each call."""
        number = self.encode(f"{self.random.getrandbits(60)}\n")[:tokens]
        return number + self._stretch(tokens - len(number))

    def document(self, tokens: int) -> dict[str, Any]:
        """A system message that takes exactly so many tokens of the prompt: whole blocks."""
        if tokens % BLOCK:
            raise ValueError(f"{tokens} tokens are not whole blocks of {BLOCK}")
        while True:
            length = tokens - 24
            for _ in range(8):
                number = f"{self.random.getrandbits(60)}\n"
                message = {"role": "system", "content": number + self.tokenizer.decode(self._stretch(length))}
                missing = tokens - self.tokens_of([message])
                if not missing:
                    return message
                length += missing

    def question(self) -> dict[str, Any]:
        """A user's message that, with what begins the answer, takes less than a block."""
        words = [self.random.choice(_WORDS) for _ in range(12)]
        return {"role": "user", "content": f"{self.random.randrange(100, 999)} {' '.join(words)}?"}

    def tokens_of(self, messages: list[dict[str, Any]]) -> int:
        """Of the prompt that they make, without what begins the answer."""
        return len(self.encode("".join(f"{_OPENING}{m['role']}\n{m['content']}{_CLOSING}" for m in messages)))

    def encode(self, text: str) -> list[int]:
        """Its tokens."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def _stretch(self, tokens: int) -> list[int]:
        start = self.random.randrange(len(self._corpus) - tokens)
        return self._corpus[start : start + tokens]
