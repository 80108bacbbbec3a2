"""What is an address, and when a token may travel."""

from pathlib import Path

import pytest

from kvprefetch.client.channel import default_address, endpoint, open_channel
from kvprefetch.errors import SettingsError


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("unix:///run/k.sock", "unix:/run/k.sock"),
        ("unix:/run/k.sock", "unix:/run/k.sock"),
        ("127.0.0.1:7070", "dns:///127.0.0.1:7070"),
        ("[::1]:7070", "dns:///[::1]:7070"),
        ("cache.example:7070", "dns:///cache.example:7070"),
    ],
)
def test_an_address_says_where_to_go_in_the_clear(address: str, target: str) -> None:
    end = endpoint(address)
    assert (end.target, end.credentials, end.metadata) == (target, None, ())


def test_tls_is_asked_for_by_the_scheme_or_by_an_authority(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("any bytes: they are looked at when it connects")
    assert endpoint("tls://cache.example:7070", "t").credentials is not None
    assert endpoint("cache.example:7070", "t", ca=str(ca)).credentials is not None
    assert endpoint("insecure://cache.example:7070", "t", ca=str(ca)).credentials is None


@pytest.mark.parametrize("address", ["unix:///run/k.sock", "127.0.0.1:1", "localhost:1", "[::1]:1", "127.9.9.9:1"])
def test_a_token_travels_in_the_clear_on_this_machine(address: str) -> None:
    end = endpoint(address, "hush")
    assert end.metadata == (("authorization", "Bearer hush"),)
    assert "hush" not in repr(end)


@pytest.mark.parametrize("address", ["10.0.0.1:1", "cache.example:1", "[2001:db8::1]:1", "localhost.evil.example:1"])
def test_a_token_does_not_travel_in_the_clear_to_another_machine(address: str) -> None:
    with pytest.raises(SettingsError, match=r"sent in the clear; give a ca .* or write tls://") as told:
        open_channel(address, "hush")
    assert "hush" not in str(told.value)
    assert endpoint(f"insecure://{address}", "hush").metadata  # unless somebody insists


@pytest.mark.parametrize(
    "address",
    ["cache", "cache:", ":1", "cache:port", "cache:65536", "http://a:1", "unix:run/k.sock", "a/b:1", "::1:7070"],
)
def test_what_is_no_address_is_said_to_be_none(address: str) -> None:
    with pytest.raises(SettingsError, match="address"):
        endpoint(address)


def test_a_token_that_no_header_can_carry_is_refused() -> None:
    for token in ("line\nbreak", "schlüssel"):
        with pytest.raises(SettingsError, match="printable ASCII"):
            endpoint("unix:///run/k.sock", token)


def test_files_of_tls_are_read_at_once_and_named_if_they_cannot_be(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.pem")
    with pytest.raises(SettingsError, match=r"ca: cannot read .*no\.pem: No such file"):
        open_channel("tls://a:1", ca=missing)
    with pytest.raises(SettingsError, match="go together"):
        open_channel("tls://a:1", certificate=missing)


def test_without_an_address_it_is_the_users_own_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_address() == "unix:///run/user/7/kvprefetch/service.sock"
    assert endpoint().target == "unix:/run/user/7/kvprefetch/service.sock"
