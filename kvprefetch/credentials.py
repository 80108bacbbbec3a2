"""Whose bearer token it is. Pure: reads no file and logs nothing; tokens are known by their SHA-256 alone."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from kvprefetch.settings import Credential

_SCHEME = "bearer "


class Credentials:
    """The credentials of the settings. Without any (`not credentials`), nobody is asked who they are."""

    def __init__(self, known: Iterable[Credential]) -> None:
        self._known = tuple(known)

    def __bool__(self) -> bool:
        return bool(self._known)

    def by_token(self, token: str) -> Credential | None:
        """The credential of that bearer token; None for a wrong one. All are compared, each in constant time."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for credential in self._known:
            if hmac.compare_digest(credential.token_sha256, digest):
                found = credential
        return found


def token_in(headers: Mapping[str, str]) -> str:
    """The token of a client of either API, OpenAI's or Anthropic's; "" if there is none. Names in lower case."""
    return bearer_token(headers.get("authorization", "")) or headers.get("x-api-key", "").strip()


def bearer_token(authorization: str) -> str:
    """The token in the value of an `authorization` header or metadata entry; "" if there is none."""
    if not authorization.lower().startswith(_SCHEME):
        return ""
    return authorization[len(_SCHEME) :].strip()
