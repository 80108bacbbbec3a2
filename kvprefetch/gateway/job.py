"""A preload into an engine's own cache."""

from dataclasses import dataclass, field

from kvprefetch.gateway.contract import Draft, Rendered
from kvprefetch.plan.preload import Preload


@dataclass(eq=False)
class WarmJob(Preload):
    """What is to be warm. `size` and `keys` are of canonical bytes, `warm` and `rendered` of the engine's tokens."""

    context: Draft
    rendered: Rendered | None = field(default=None, kw_only=True)  # None until it is worked on
    prompt_tokens: int = field(default=0, kw_only=True)  # of the whole, as the engine has counted them
    warm: int = field(default=0, kw_only=True)  # leading tokens that pieces have left warm, as the engine said
    blocks: int = field(default=0, kw_only=True)  # of its keys that were believed to be there after its latest piece
    computed: int = field(default=0, kw_only=True)  # tokens that it cost
    refusals: int = field(default=0, kw_only=True)  # in a row
    lost: int = field(default=0, kw_only=True)  # times that the engine had less than was believed
    is_raised: bool = field(default=False, kw_only=True)  # LMCache was asked to bring it up
    is_sure: bool = field(default=False, kw_only=True)  # a piece was answered: what is believed has been seen
