"""The transformers engine: a loaded model, its device pool and the attention backend, proved to agree.

Promises
- Owns the model and the pool's memory; does not decide which page is whose.
- Not thread-safe: one thread calls `forward`. It blocks until the logits are there.
- `forward` writes only into pages of its rows, at positions from `row.written` on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvprefetch.cache.keys import Fingerprint
from kvprefetch.engines.attention import Backend
from kvprefetch.engines.backends import Varlen, pick_backend
from kvprefetch.engines.batch import Row, never
from kvprefetch.engines.fingerprint import fingerprint
from kvprefetch.engines.forward import run_rows
from kvprefetch.engines.load import LoadedModel, load_model
from kvprefetch.engines.recorded import RecordedStep, record_steps
from kvprefetch.engines.selftest import page_shape, self_test
from kvprefetch.errors import InvalidRequest
from kvprefetch.settings import Settings
from kvprefetch.tiers.device import DevicePool, PageShape, pool_bytes

_LONGEST_STEP = 131_072 + 160  # tokens with their past that a short row may have and still be replayed


@dataclass(frozen=True)
class TransformersEngine:
    """See the module's promises. Create with `open_engine`."""

    loaded: LoadedModel
    shape: PageShape
    pool: DevicePool
    fingerprint: Fingerprint
    backend_name: str
    backend: Backend
    chunk_tokens: int
    max_rows: int
    steps: tuple[RecordedStep, ...] = ()  # of short rows; on a GPU

    @property
    def block_tokens(self) -> int:
        return self.shape.block_tokens

    @property
    def max_tokens(self) -> int | None:
        """The model's context length, prompt and answer together; None if its config states none."""
        limit: int | None = getattr(self.loaded.model.config, "max_position_embeddings", None)
        return limit

    @property
    def vocab_size(self) -> int:
        return int(self.loaded.model.config.vocab_size)

    @property
    def eos_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        eos = self.loaded.model.generation_config.eos_token_id
        if eos is None:
            return frozenset()
        return frozenset([eos] if isinstance(eos, int) else eos)

    def validate(self, tokens: list[int]) -> None:
        """Raise InvalidRequest for a prompt that cannot be run."""
        if not tokens:
            raise InvalidRequest("the prompt is empty")
        if self.max_tokens is not None and len(tokens) >= self.max_tokens:
            raise InvalidRequest(f"the prompt has {len(tokens)} tokens; {self.loaded.name} takes {self.max_tokens}")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise InvalidRequest(f"token ids must be from 0 to {self.vocab_size - 1}")

    def forward(self, rows: list[Row], abandon: Callable[[], bool] = never) -> torch.Tensor:
        """Logits `[rows that want them, vocabulary]`; see `run_rows`. A short row alone is not abandoned."""
        if len(rows) == 1:
            for step in self.steps:
                if step.fits(rows[0]):
                    return step.run(rows[0])
        return run_rows(self.loaded, self.pool, self.backend, rows, abandon)

    def synchronize(self) -> None:
        """Return once no queued device work can still write into a page."""
        if self.pool.device.type == "cuda":
            torch.cuda.synchronize(self.pool.device)


def open_engine(model: str | LoadedModel, settings: Settings) -> TransformersEngine:
    """Load (where `model` is a name), prove and equip a model. Raises ModelError, SettingsError, PoolTooSmall."""
    loaded = load_model(model, settings.engine) if isinstance(model, str) else model
    shape = page_shape(loaded, settings.pool.block_tokens)
    backend_name, backend = pick_backend(settings.engine.attention, shape, loaded)
    self_test(loaded, shape, backend)
    pages = pool_bytes(settings.pool.size, loaded.device) // shape.bytes
    records = settings.engine.record_steps and loaded.device.type == "cuda"
    pool = DevicePool(shape, pages, loaded.device, has_spare=records)
    steps: tuple[RecordedStep, ...] = ()
    if records:
        limit = getattr(loaded.model.config, "max_position_embeddings", None) or _LONGEST_STEP
        longest = min(limit, pages * shape.block_tokens, _LONGEST_STEP)
        is_paged = isinstance(backend, Varlen) and backend.takes_pages(shape.block_tokens)
        steps = record_steps(loaded, pool, backend, longest, is_paged)
    return TransformersEngine(
        loaded=loaded,
        shape=shape,
        pool=pool,
        fingerprint=fingerprint(
            loaded.model, shape, numerics=f"{loaded.device.type} {backend_name} {settings.engine.chunk_tokens}"
        ),
        backend_name=backend_name,
        backend=backend,
        chunk_tokens=settings.engine.chunk_tokens,
        max_rows=settings.engine.max_rows,
        steps=steps,
    )
