"""Bearer tokens: whose they are, and what is none."""

import hashlib

import pytest

from kvprefetch.credentials import Credentials, bearer_token
from kvprefetch.settings import Credential


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


ANN = Credential("ann", token_sha256=digest("ann's token"))
WORKER = Credential("w1", role="worker", token_sha256=digest("a worker's token"))
BY_CERTIFICATE = Credential("w2", role="worker", certificate="w2.example")


def test_a_token_finds_its_credential_and_no_other() -> None:
    known = Credentials([ANN, WORKER, BY_CERTIFICATE])
    assert known.by_token("ann's token") is ANN
    assert known.by_token("a worker's token") is WORKER
    for wrong in ("", "ann's toke", "ann's token ", ANN.token_sha256, "w2.example", "\ud800"):
        assert known.by_token(wrong) is None
    assert known
    assert not Credentials([])


@pytest.mark.parametrize("header", ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret "])
def test_the_scheme_is_read_in_any_case(header: str) -> None:
    assert bearer_token(header) == "s3cret"


@pytest.mark.parametrize("header", ["", "Bearer", "Basic czNjcmV0", "s3cret", "Bearers3cret"])
def test_another_scheme_holds_no_token(header: str) -> None:
    assert bearer_token(header) == ""
