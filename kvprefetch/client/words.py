"""The wire's words for outcomes and uses, and ours."""

from typing import Any

from kvprefetch.outcomes import Outcome, Use
from kvprefetch.v1 import outcomes_pb2 as pb

_OUTCOMES = {pb.Outcome.Value(f"OUTCOME_{outcome.name}"): outcome for outcome in Outcome}
_USES = {pb.Use.Value(f"USE_{use.name}"): use for use in Use}
_OUTCOME_WORDS = {outcome: word for word, outcome in _OUTCOMES.items()}
_USE_WORDS = {use: word for word, use in _USES.items()}


def outcome_of(word: int) -> Outcome | None:
    """None: unspecified, or a word newer than this code."""
    return _OUTCOMES.get(word)


def use_of(word: int) -> Use | None:
    """None: unspecified, or a word newer than this code."""
    return _USES.get(word)


def outcome_word(outcome: Outcome | None) -> Any:
    """For a message's field."""
    return _OUTCOME_WORDS[outcome] if outcome else pb.OUTCOME_UNSPECIFIED


def use_word(use: Use | None) -> Any:
    """For a message's field."""
    return _USE_WORDS[use] if use else pb.USE_UNSPECIFIED
