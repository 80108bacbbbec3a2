"""The last word on a model, at load time: paged attention must agree with the library's eager attention.

It catches every silent kind of wrongness seen in transformers' models: arguments dropped on the way, keys
that depend on the forward's length, state that is no paged KV, layers that share an index.
"""

from itertools import pairwise

import torch

from kvprefetch.engines.attention import IMPLEMENTATION, Backend, Probe
from kvprefetch.engines.batch import Row
from kvprefetch.engines.forward import run_rows
from kvprefetch.engines.load import LoadedModel
from kvprefetch.engines.support import sliding_window
from kvprefetch.errors import UnsupportedModel
from kvprefetch.tiers.device import DevicePool, PageShape

# ours, and what a model raises that wants other inputs than token ids and positions
_REFUSALS = (UnsupportedModel, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError)
_LONGEST = 4_160  # tokens; a window beyond this is not crossed by the self-test
# Root mean square, of the logits' spread. Two right ways of computing 30 layers in bf16 differ by 0.03 to 0.05.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}


def page_shape(loaded: LoadedModel, block_tokens: int) -> PageShape:
    """Learn layers, heads and dims from one forward; refuse what block-major pages cannot hold."""
    probe = Probe()
    ids = torch.zeros((1, 1), dtype=torch.long, device=loaded.device)
    try:
        with torch.inference_mode():
            loaded.model(input_ids=ids, position_ids=ids, use_cache=False, kv_batch=probe)
    except _REFUSALS as error:
        raise UnsupportedModel(f"{loaded.name} ({loaded.model.config.model_type}): {error}") from error
    layers = sorted(seen[0] for seen in probe.seen)
    if not layers or layers != list(range(len(layers))):
        raise UnsupportedModel(f"{loaded.name}: paged attention was called for layers {layers}, each must come once")
    geometries = {seen[1:] for seen in probe.seen}
    if len(geometries) > 1:
        raise UnsupportedModel(f"{loaded.name}: layers differ in heads or dims: {sorted(geometries)}")
    kv_heads, q_heads, key_dim, value_dim = geometries.pop()
    if key_dim != value_dim or q_heads % kv_heads:
        raise UnsupportedModel(f"{loaded.name}: keys of {key_dim} and values of {value_dim} dims are not supported")
    return PageShape(len(layers), kv_heads, key_dim, block_tokens, loaded.dtype)


def self_test(loaded: LoadedModel, shape: PageShape, backend: Backend) -> None:
    """Compare eager, cold and split runs on random tokens, beyond the sliding window. Raises UnsupportedModel."""
    config = loaded.model.config
    window = sliding_window(config) or 0
    wanted = max(2 * shape.block_tokens + 9, min(window + 24, _LONGEST))
    length = min(wanted, getattr(config, "max_position_embeddings", None) or wanted)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
    eager = _eager(loaded, tokens)
    spread = float(eager.std()) or 1.0
    inner = {cut for cut in (1, shape.block_tokens, length - 3) if 0 < cut < length}  # a context may be very short
    cuts = [0, *sorted(inner), length]
    for name, edges in (("cold", [0, length]), ("split", cuts)):
        difference = _paged(loaded, shape, backend, tokens, edges) - eager
        error = float(difference.square().mean().sqrt()) / spread
        if not error <= TOLERANCE[shape.dtype]:
            raise UnsupportedModel(
                f"{loaded.name} ({config.model_type}): {name} paged logits differ from eager attention by "
                f"{error:.2g} of their spread at {length} tokens; it would be served wrongly"
            )


def _eager(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens], device=loaded.device)
    loaded.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            logits = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    finally:
        loaded.model.set_attn_implementation(IMPLEMENTATION)
    last: torch.Tensor = logits[0, -1].float()
    return last


def _paged(
    loaded: LoadedModel, shape: PageShape, backend: Backend, tokens: list[int], edges: list[int]
) -> torch.Tensor:
    pages = -(-len(tokens) // shape.block_tokens)
    pool = DevicePool(shape, pages, loaded.device)
    pool.tensor.fill_(float("nan"))  # reading past what was written must show
    logits = torch.empty(0)
    for start, end in pairwise(edges):
        row = Row(tokens[start:end], start, list(range(pages)))
        logits = run_rows(loaded, pool, backend, [row])
    return logits[0].float()
