"""Tenants come in by their tokens, and what one computed another does not find."""

import hashlib
from dataclasses import replace

import openai
import pytest
from served import ASKED, MODEL, Open, served

from kvprefetch.errors import SettingsError
from kvprefetch.http.gate import check_host
from kvprefetch.settings import Credential, HttpSettings, Settings


def credential(name: str, role: str = "tenant") -> Credential:
    return Credential(name, role, hashlib.sha256(f"token of {name}".encode()).hexdigest())


KNOWN = (credential("ann"), credential("bob"), credential("w1", "worker"), credential("root", "operator"))


def test_a_tenant_finds_its_own_prompts_and_nobody_elses(open_tiny: Open) -> None:
    with served(open_tiny(), credentials=KNOWN) as site:

        def cached(tenant: str) -> int:
            headers = {"authorization": f"Bearer token of {tenant}"}
            answer = site.http.post("/chat/completions", json=ASKED, headers=headers).json()
            return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert cached("ann") == 0
        assert cached("bob") == 0
        assert cached("ann") > 0
        assert cached("bob") > 0


def test_who_has_no_token_or_a_wrong_one_stays_outside(open_tiny: Open) -> None:
    with served(open_tiny(), credentials=KNOWN) as site:
        del site.http.headers["authorization"]
        for header in (None, "", "Bearer", "Bearer nothing", "Basic token of ann", "Bearer token of ann x"):
            headers = {} if header is None else {"authorization": header}
            for response in (
                site.http.post("/chat/completions", json=ASKED, headers=headers),
                site.http.post("/completions", content=b"not even JSON", headers=headers),
                site.http.get("/models", headers=headers),
                site.http.get(f"/models/{MODEL}", headers=headers),
            ):
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        assert site.kv.stats()["lookups"]["count"] == 0


def test_another_role_may_not_ask_for_answers(open_tiny: Open) -> None:
    with served(open_tiny(), credentials=KNOWN) as site:
        for name in ("w1", "root"):
            with pytest.raises(openai.PermissionDeniedError):
                site.ai.with_options(api_key=f"token of {name}").models.list()


def test_health_and_metrics_ask_for_no_token(open_tiny: Open) -> None:
    with served(open_tiny(), token="wrong", credentials=KNOWN) as site:
        root = site.url.removesuffix("/v1")
        assert site.http.get(f"{root}/health").json() == {"status": "ok"}
        text = site.http.get(f"{root}/metrics").text
    assert "ann" not in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.com", ""])
def test_without_credentials_no_other_machine_may_come_in(host: str) -> None:
    settings = Settings(http=HttpSettings(host=host))
    with pytest.raises(SettingsError, match=r"\[\[credentials\]\]"):
        check_host(settings.http.host, settings, "http.host")
    check_host(settings.http.host, replace(settings, credentials=KNOWN), "http.host")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_credentials(host: str) -> None:
    check_host(host, Settings(), "http.host")


def test_no_endpoint_is_made_that_anybody_could_ask(open_tiny: Open) -> None:
    with (
        pytest.raises(SettingsError, match="listen on"),
        served(open_tiny(), http=HttpSettings(host="0.0.0.0")),
    ):
        pass
