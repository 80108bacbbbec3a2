"""Who comes in: each request is one tenant's, by its bearer token; and where a worker may listen without tokens."""

import ipaddress
from collections.abc import Mapping

from kvprefetch.credentials import Credentials, bearer_token, token_in
from kvprefetch.errors import PermissionDenied, SettingsError, Unauthenticated
from kvprefetch.settings import Settings


class Gate:
    """Without credentials in the settings, everybody is `settings.tenant`."""

    def __init__(self, settings: Settings) -> None:
        self._credentials, self._default = Credentials(settings.credentials), settings.tenant

    def tenant(self, authorization: str) -> str:
        """Whose request it is, by its authorization header. Raises Unauthenticated, PermissionDenied."""
        return self._by_token(bearer_token(authorization))

    def tenant_of(self, headers: Mapping[str, str]) -> str:
        """The same, for clients of either API: the token may be in x-api-key."""
        return self._by_token(token_in(headers))

    def is_operator(self, headers: Mapping[str, str]) -> bool:
        """Whether an operator asks. Where nobody is asked who they are, everybody is one."""
        if not self._credentials:
            return True
        credential = self._credentials.by_token(token_in(headers))
        return credential is not None and credential.role == "operator"

    def reader_of(self, headers: Mapping[str, str]) -> str | None:
        """Whose figures are asked for: None, all, for an operator, or where nobody is asked who they are."""
        return None if self.is_operator(headers) else self.tenant_of(headers)

    def _by_token(self, token: str) -> str:
        if not self._credentials:
            return self._default
        if not token:
            raise Unauthenticated("send a tenant's token in the header Authorization: Bearer TOKEN")
        credential = self._credentials.by_token(token)
        if credential is None:
            raise Unauthenticated("the bearer token is not known here")
        if credential.role != "tenant":
            raise PermissionDenied(f"the token is of the role {credential.role}; answers are for the role tenant")
        return credential.name


def check_host(host: str, settings: Settings, key: str) -> None:
    """Raises SettingsError, naming `key`, where anybody on the network could ask without a token."""
    if not settings.credentials and not _is_loopback(host):
        raise SettingsError(
            f"{key} {host!r} can be reached from other machines: "
            "add [[credentials]] with tenants' tokens, or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
