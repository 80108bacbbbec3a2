"""What each tenant may count on now: the settings' word, and over it what operators have said since.

Promises
- A change is made as a whole, or refused as a whole: InvalidRequest where it is no share, or more than all of a pool
  would be guaranteed, or somebody less than one block of a pool that is open; LimitExceeded beyond `MOST_NAMED` names.
- What operators said is kept in `tenants.json` in the state folder, and goes before the settings' word until it is
  reset, after restarts, too. Raises SettingsError where the file cannot be read, or does not go with the settings; and
  where it cannot be written, having changed nothing.
- `on_change` hears of every change. Lives on the event loop's thread, and does not block it to write.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvprefetch.cache.shares import Share, Shares, shares_of
from kvprefetch.errors import InvalidRequest, LimitExceeded, SettingsError
from kvprefetch.settings import Settings, state_dir

MOST_NAMED = 250_000
"""More would not fit into one message to a worker."""
_MOST_NAME = 63  # bytes, as in a credential


@dataclass(frozen=True, slots=True)
class Said:
    """An operator's word on one tenant. None: as it is."""

    weight: float | None = None
    guarantee: float | None = None

    def over(self, share: Share) -> Share:
        """The share, with this said of it."""
        weight = share.weight if self.weight is None else self.weight
        return Share(weight, share.guarantee if self.guarantee is None else self.guarantee)

    def after(self, before: "Said") -> "Said":
        """Both, of which this was said last."""
        weight = before.weight if self.weight is None else self.weight
        return Said(weight, before.guarantee if self.guarantee is None else self.guarantee)


class Tenants:
    """See the module's promises. `pools`: how many pages each open pool has."""

    def __init__(self, settings: Settings, pools: Callable[[], Iterable[int]] = tuple) -> None:
        self.path = Path(settings.service.state_dir or state_dir()) / "tenants.json"
        self.pools = pools
        self.on_change: list[Callable[[Shares], None]] = []
        self._settings = self.shares = shares_of(settings)
        self._was_changed = self.path.exists()
        self._said = self._read()
        self._turn = asyncio.Lock()
        self._changing: set[asyncio.Task[None]] = set()
        try:
            self.shares = self._changed(self._said, self._said)
        except InvalidRequest as error:
            raise SettingsError(f"{self.path} and the settings do not go together: {error}") from error

    @property
    def is_ruling(self) -> bool:
        """Whether anybody has, or had, a share of its own: else workers go by their own settings."""
        return bool(self.shares.named) or self._was_changed

    def is_changed(self, name: str) -> bool:
        """Whether an operator's word on it goes before the settings'."""
        return name in self._said

    async def change(self, said: Mapping[str, Said], reset: Iterable[str] = ()) -> None:
        """From now on these tenants have these shares; those in `reset` have the settings' again.

        Once it is being written it is made, whether or not anybody waits for it.
        """
        change = asyncio.get_running_loop().create_task(self._change(said, list(reset)))
        self._changing.add(change)
        change.add_done_callback(self._changing.discard)
        await asyncio.shield(change)

    # -- within ----------------------------------------------------------------------------------------
    async def _change(self, said: Mapping[str, Said], reset: Sequence[str]) -> None:
        names = [*said, *reset]
        for name in names:
            _require_name(name)
        if len(set(names)) < len(names):
            raise InvalidRequest("a change names each tenant once")
        async with self._turn:
            after = self._after(said, reset)
            shares = self._changed(after, names)
            guaranteed = Shares({name: shares.of(name) for name, word in said.items() if word.guarantee})
            for pages in self.pools():
                guaranteed.require_fit(pages)
            await asyncio.to_thread(self._write, after)
            self._said, self.shares, self._was_changed = after, shares, True
            for tell in self.on_change:
                tell(shares)

    def _after(self, said: Mapping[str, Said], reset: Iterable[str]) -> dict[str, Said]:
        after = self._said | {name: word.after(self._said.get(name, Said())) for name, word in said.items()}
        for name in reset:
            after.pop(name, None)
        if len(after) > MOST_NAMED:
            raise LimitExceeded(f"more than {MOST_NAMED} tenants have a share of their own: reset some")
        return after

    def _changed(self, said: Mapping[str, Said], names: Iterable[str]) -> Shares:
        """All shares, where these names have changed to what was said, or to the settings' word."""
        named = dict(self.shares.named)
        for name in names:
            if name in said:
                named[name] = said[name].over(self._settings.of(name))
            elif name in self._settings.named:
                named[name] = self._settings.named[name]
            else:
                named.pop(name, None)
        return Shares(named)

    def _read(self) -> dict[str, Said]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            said = {name: Said(**word) for name, word in found.items()}
            for name, word in said.items():
                _require_name(name)
                word.over(Share())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, InvalidRequest) as error:
            raise SettingsError(f"{self.path}: {error}; mend or delete it") from error
        return said

    def _write(self, said: Mapping[str, Said]) -> None:
        """Whole or not at all."""
        text = json.dumps({name: {"weight": w.weight, "guarantee": w.guarantee} for name, w in said.items()})
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            draft.replace(self.path)
        except OSError as error:
            raise SettingsError(f"{self.path} cannot be written ({error.strerror}): nothing was changed") from error


def _require_name(name: str) -> None:
    if not 0 < len(name.encode()) <= _MOST_NAME or not name.isprintable():
        raise InvalidRequest(f"a tenant's name is 1 to {_MOST_NAME} bytes of what can be printed, not {name[:64]!r}")
