"""What tenants may count on, as operators change it: in whole, kept, and told to whom it concerns."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from kvprefetch.cache.shares import NOTHING, Share, Shares
from kvprefetch.errors import InvalidRequest, LimitExceeded, SettingsError
from kvprefetch.service import tenants as module
from kvprefetch.service.tenants import Said, Tenants
from kvprefetch.settings import Settings, settings_from


def settings(folder: Path, **more: object) -> Settings:
    ann = {"name": "ann", "weight": 2.0, "guarantee": 0.25}
    return settings_from({"tenants": [ann], "service": {"state_dir": str(folder)}, **more})


def change(tenants: Tenants, said: Mapping[str, Said], reset: Iterable[str] = ()) -> None:
    asyncio.run(tenants.change(said, reset))


def test_a_change_is_told_and_holds_after_a_restart(tmp_path: Path) -> None:
    tenants, told = Tenants(settings(tmp_path)), list[Shares]()
    tenants.on_change.append(told.append)
    change(tenants, {"bob": Said(1.0, 0.5)})
    assert told == [tenants.shares]
    assert Tenants(settings(tmp_path)).shares.named == {"ann": Share(2.0, 0.25), "bob": Share(1.0, 0.5)}


def test_what_is_reset_is_what_the_settings_say(tmp_path: Path) -> None:
    tenants = Tenants(settings(tmp_path))
    change(tenants, {"ann": Said(1.0, 0.5), "bob": Said(3.0)})
    assert (tenants.is_changed("ann"), tenants.is_changed("bob")) == (True, True)
    change(tenants, {}, ["ann", "bob", "nobody"])
    assert tenants.shares.of("ann") == Share(2.0, 0.25)
    assert tenants.shares.of("bob") == NOTHING
    assert not tenants.is_changed("ann")
    assert tenants.is_ruling


def test_what_is_not_said_stays_as_it_is_and_follows_the_settings(tmp_path: Path) -> None:
    tenants = Tenants(settings(tmp_path))
    change(tenants, {"ann": Said(weight=5.0)})
    change(tenants, {"bob": Said(guarantee=0.5)})
    assert tenants.shares.of("ann") == Share(5.0, 0.25)
    change(tenants, {"bob": Said(weight=7.0)})
    assert tenants.shares.of("bob") == Share(7.0, 0.5)
    later = settings(tmp_path, tenants=[{"name": "ann", "weight": 9.0, "guarantee": 0.4}])
    assert Tenants(later).shares.of("ann") == Share(5.0, 0.4)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"bob": Said(1.0, 0.8)}, "add up to 115"),
        ({"bob": Said(1.0, 0.001)}, "less than one of 100 pages"),
        ({"bob": Said(0.0)}, "a weight is"),
        ({"bob": Said(-1.0)}, "a weight is"),
        ({"bob": Said(float("nan"))}, "a weight is"),
        ({"bob": Said(float("inf"))}, "a weight is"),
        ({"bob": Said(guarantee=-0.1)}, "a guarantee is"),
        ({"bob": Said(guarantee=1.1)}, "a guarantee is"),
        ({"bob": Said(guarantee=float("nan"))}, "a guarantee is"),
        ({"": Said()}, "a tenant's name"),
        ({"b" * 64: Said()}, "a tenant's name"),
        ({"ü" * 32: Said()}, "a tenant's name"),
        ({"b\nb": Said()}, "a tenant's name"),
        ({"b\x1b[2Jb": Said()}, "a tenant's name"),
    ],
)
def test_what_is_refused_changes_nothing(tmp_path: Path, said: dict[str, Said], why: str) -> None:
    tenants, told = Tenants(settings(tmp_path), lambda: [1_000_000, 100]), list[Shares]()
    tenants.on_change.append(told.append)
    before = tenants.shares
    with pytest.raises(InvalidRequest, match=why):
        change(tenants, {"eve": Said(1.0, 0.1), **said})
    with pytest.raises(InvalidRequest, match="once"):
        change(tenants, {"eve": Said(1.0, 0.1)}, ["eve"])
    assert (tenants.shares, told) == (before, [])
    assert not tenants.path.exists()


def test_a_small_arena_forbids_small_guarantees_but_no_weights(tmp_path: Path) -> None:
    tenants = Tenants(settings(tmp_path), lambda: [3])  # ann's 25 % are no block of it
    change(tenants, {"ann": Said(weight=3.0), "bob": Said(guarantee=0.0)})
    with pytest.raises(InvalidRequest, match=r"'ann' .* less than one of 3 pages"):
        change(tenants, {"ann": Said(guarantee=0.25)})
    change(tenants, {"ann": Said(guarantee=0.34)})


@pytest.mark.parametrize("name", ["größe/ü 🐙", "a", "b" * 63, "'; DROP TABLE", '{"a": "b"}', "__proto__", "ü" * 31])
def test_odd_names_are_names(tmp_path: Path, name: str) -> None:
    change(Tenants(settings(tmp_path)), {name: Said(1.0, 0.1)})
    assert Tenants(settings(tmp_path)).shares.of(name) == Share(1.0, 0.1)


def test_of_a_hundred_thousand_tenants_each_has_its_share(tmp_path: Path) -> None:
    tenants = Tenants(settings(tmp_path))
    change(tenants, {f"t{n}": Said(1.0 + n) for n in range(100_000)})
    again = Tenants(settings(tmp_path)).shares
    assert again.of("t99999").weight == 100_000
    assert again.part("t0", 10) > 0


def test_there_is_an_end_to_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_NAMED", 3)
    tenants = Tenants(settings(tmp_path))
    change(tenants, {"a": Said(1.0), "b": Said(1.0), "c": Said(1.0)})
    with pytest.raises(LimitExceeded, match="more than 3"):
        change(tenants, {"d": Said(1.0)})
    change(tenants, {"d": Said(1.0)}, ["a"])
    assert [name for name in "abcd" if tenants.is_changed(name)] == ["b", "c", "d"]


def test_changes_at_the_same_time_all_happen(tmp_path: Path) -> None:
    async def story() -> None:
        tenants = Tenants(settings(tmp_path))
        await asyncio.gather(*(tenants.change({f"t{n}": Said(guarantee=0.01)}) for n in range(20)))
        assert sum(tenants.is_changed(f"t{n}") for n in range(20)) == 20

    asyncio.run(story())
    assert len(Tenants(settings(tmp_path)).shares.named) == 21


def held_up(tenants: Tenants, gate: threading.Event) -> Callable[[Mapping[str, Said]], None]:
    write = tenants._write

    def later(said: Mapping[str, Said]) -> None:
        gate.wait(20)
        write(said)

    return later


def test_who_hangs_up_in_the_midst_leaves_no_half_of_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        tenants, gate = Tenants(settings(tmp_path)), threading.Event()
        monkeypatch.setattr(tenants, "_write", held_up(tenants, gate))
        asked = asyncio.create_task(tenants.change({"bob": Said(3.0)}))
        await asyncio.sleep(0.05)
        asked.cancel()
        gate.set()
        await tenants.change({"eve": Said(4.0)})
        assert asked.cancelled()
        assert (tenants.shares.weight("bob"), tenants.shares.weight("eve")) == (3.0, 4.0)
        assert Tenants(settings(tmp_path)).shares == tenants.shares

    asyncio.run(story())


@pytest.mark.parametrize(
    "text",
    [
        '{"ann": {"weight": 0, "guarantee": 0}}',
        '{"ann": {"weight": "x"}}',
        '{"ann": {"size": 1}}',
        '{"": {"weight": 1}}',
        '{"ann": 1}',
        "[]",
        "{",
        "",
    ],
)
def test_a_file_that_says_nothing_is_not_taken_for_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "tenants.json").write_text(text)
    with pytest.raises(SettingsError, match=r"tenants\.json"):
        Tenants(settings(tmp_path))


def test_settings_that_guarantee_too_much_beside_what_operators_said_are_refused(tmp_path: Path) -> None:
    change(Tenants(settings(tmp_path)), {"bob": Said(guarantee=0.75)})
    with pytest.raises(SettingsError, match=r"tenants\.json and the settings .* 125"):
        Tenants(settings(tmp_path, tenants=[{"name": "ann", "guarantee": 0.5}]))


def test_where_it_cannot_be_kept_nothing_is_changed(tmp_path: Path) -> None:
    tenants = Tenants(settings(tmp_path / "state"))
    before = tenants.shares
    (tmp_path / "state").write_text("no folder")
    with pytest.raises(SettingsError, match=r"cannot be written .* nothing was changed"):
        change(tenants, {"bob": Said(3.0)})
    assert tenants.shares == before


def test_the_file_is_its_users_alone_and_of_one_piece(tmp_path: Path) -> None:
    tenants = Tenants(settings(tmp_path))
    change(tenants, {"bob": Said(3.0)})
    assert tenants.path.stat().st_mode & 0o777 == 0o600
    assert json.loads(tenants.path.read_text()) == {"bob": {"weight": 3.0, "guarantee": None}}
    assert [path.name for path in tmp_path.iterdir()] == ["tenants.json"]


def test_whoever_has_a_credential_has_a_guarantee(tmp_path: Path) -> None:
    credentials = [{"name": name, "token_sha256": letter * 64} for name, letter in (("bob", "b"), ("eve", "e"))]
    shares = Tenants(settings(tmp_path, credentials=credentials, fairness={"guarantee": 0.5})).shares
    assert shares.of("bob") == shares.of("eve") == Share(1.0, 0.5 * 0.75 / 2)
    assert shares.of("ann").guarantee == 0.25
