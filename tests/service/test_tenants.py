"""What tenants may count on, as operators change it: in whole, kept, and told to whom it concerns."""

from pathlib import Path

import pytest

from kvprefetch.cache.shares import NOTHING, Share, Shares
from kvprefetch.errors import InvalidRequest, SettingsError
from kvprefetch.service.tenants import Tenants
from kvprefetch.settings import Settings, settings_from


def settings(folder: Path, **more: object) -> Settings:
    ann = {"name": "ann", "weight": 2.0, "guarantee": 0.25}
    return settings_from({"tenants": [ann], "service": {"state_dir": str(folder)}, **more})


def test_a_change_is_told_and_holds_after_a_restart(tmp_path: Path) -> None:
    tenants, told = Tenants(settings(tmp_path)), list[Shares]()
    tenants.on_change.append(told.append)
    tenants.change({"bob": Share(1.0, 0.5)})
    assert told == [tenants.shares]
    assert Tenants(settings(tmp_path)).shares.named == {"ann": Share(2.0, 0.25), "bob": Share(1.0, 0.5)}


def test_what_is_reset_is_what_the_settings_say(tmp_path: Path) -> None:
    tenants = Tenants(settings(tmp_path))
    tenants.change({"ann": Share(1.0, 0.5), "bob": Share(3.0)})
    tenants.change({}, ["ann", "bob", "nobody"])
    assert tenants.shares.of("ann") == Share(2.0, 0.25)
    assert tenants.shares.of("bob") == NOTHING


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"bob": Share(1.0, 0.8)}, "add up to 115"),
        ({"bob": Share(1.0, 0.001)}, "less than one of 100 pages"),
        ({"": Share()}, "a tenant's name"),
        ({"b" * 64: Share()}, "a tenant's name"),
        ({"b\nb": Share()}, "a tenant's name"),
    ],
)
def test_what_is_refused_changes_nothing(tmp_path: Path, said: dict[str, Share], why: str) -> None:
    tenants, told = Tenants(settings(tmp_path), lambda: [100]), list[Shares]()
    tenants.on_change.append(told.append)
    before = tenants.shares
    with pytest.raises(InvalidRequest, match=why):
        tenants.change({"eve": Share(1.0, 0.1), **said})
    assert (tenants.shares, told) == (before, [])
    assert not tenants.path.exists()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_above_nothing(weight: float) -> None:
    with pytest.raises(InvalidRequest, match="weight"):
        Share(weight)


def test_odd_names_are_names(tmp_path: Path) -> None:
    tenants = Tenants(settings(tmp_path))
    tenants.change({"größe/ü 🐙": Share(1.0, 0.1)})
    assert Tenants(settings(tmp_path)).shares.of("größe/ü 🐙") == Share(1.0, 0.1)


def test_of_a_hundred_thousand_tenants_each_has_its_share(tmp_path: Path) -> None:
    tenants = Tenants(settings(tmp_path))
    tenants.change({f"t{n}": Share(1.0 + n) for n in range(100_000)})
    again = Tenants(settings(tmp_path)).shares
    assert again.of("t99999").weight == 100_000
    assert again.part("t0", 10) > 0


def test_a_file_that_says_nothing_is_not_taken_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "tenants.json").write_text('{"ann": {"weight": 0, "guarantee": 0}}')
    with pytest.raises(SettingsError, match=r"tenants\.json"):
        Tenants(settings(tmp_path))


def test_whoever_has_a_credential_has_a_guarantee(tmp_path: Path) -> None:
    credentials = [{"name": name, "token_sha256": letter * 64} for name, letter in (("bob", "b"), ("eve", "e"))]
    shares = Tenants(settings(tmp_path, credentials=credentials, fairness={"guarantee": 0.5})).shares
    assert shares.of("bob") == shares.of("eve") == Share(1.0, 0.5 * 0.75 / 2)
    assert shares.of("ann").guarantee == 0.25
