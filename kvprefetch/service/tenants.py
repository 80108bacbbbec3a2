"""What each tenant may count on now: the settings' word, and over it what operators have said since.

Promises
- A change is made as a whole, or refused as a whole (InvalidRequest) where it is no share, or more than all of a pool
  would be guaranteed, or somebody less than one block of a pool that is open.
- What operators said is kept in `tenants.json` in the state folder, and holds after a restart, until it is reset: then
  the settings' word holds again. Raises SettingsError where the file cannot be read; ServiceError where it cannot be
  written, having changed nothing.
- `on_change` hears of every change, on the event loop's thread.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from kvprefetch.cache.shares import Share, Shares, shares_of
from kvprefetch.errors import InvalidRequest, ServiceError, SettingsError
from kvprefetch.settings import Settings, state_dir

_MOST_NAME = 63  # bytes, as in a credential


class Tenants:
    """See the module's promises. `pools`: how many pages each open pool has."""

    def __init__(self, settings: Settings, pools: Callable[[], Iterable[int]] = tuple) -> None:
        self.path = Path(settings.service.state_dir or state_dir()) / "tenants.json"
        self.pools = pools
        self.on_change: list[Callable[[Shares], None]] = []
        self._settings = shares_of(settings)
        self._said = self._read()
        self.shares = self._with(self._said)

    @property
    def is_ruling(self) -> bool:
        """Whether anybody has, or had, a share of its own."""
        return bool(self.shares.named) or self.path.exists()

    def change(self, said: Mapping[str, Share], reset: Iterable[str] = ()) -> None:
        """From now on these tenants have these shares; those in `reset` have the settings' again."""
        for name in (*said, *reset):
            _require_name(name)
        after = {**self._said, **said}
        for name in reset:
            after.pop(name, None)
        shares = self._with(after)
        for pages in self.pools():
            Shares({name: share for name, share in shares.named.items() if name in said}).require_fit(pages)
        self._write(after)
        self._said, self.shares = after, shares
        for tell in self.on_change:
            tell(shares)

    def _with(self, said: Mapping[str, Share]) -> Shares:
        return Shares({**self._settings.named, **said})

    def _read(self) -> dict[str, Share]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {name: Share(**share) for name, share in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, InvalidRequest) as error:
            raise SettingsError(f"{self.path}: {error}; mend or delete it") from error

    def _write(self, said: Mapping[str, Share]) -> None:
        """Whole or not at all."""
        text = json.dumps({name: {"weight": s.weight, "guarantee": s.guarantee} for name, s in said.items()})
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
            raise ServiceError(f"{self.path} cannot be written ({error.strerror}): nothing was changed") from error


def _require_name(name: str) -> None:
    if not 0 < len(name.encode()) <= _MOST_NAME or not name.isprintable():
        raise InvalidRequest(f"a tenant's name is 1 to {_MOST_NAME} bytes of what can be printed, not {name[:64]!r}")
