"""Who comes in: each request is one tenant's, by its bearer token; and where a worker may listen without tokens."""

import ipaddress

from kvprefetch.credentials import Credentials, bearer_token
from kvprefetch.errors import PermissionDenied, SettingsError, Unauthenticated
from kvprefetch.settings import Settings


class Gate:
    """Without credentials in the settings, everybody is `settings.tenant`."""

    def __init__(self, settings: Settings) -> None:
        self._credentials, self._default = Credentials(settings.credentials), settings.tenant

    def tenant(self, authorization: str) -> str:
        """Whose request it is, by its authorization header. Raises Unauthenticated, PermissionDenied."""
        if not self._credentials:
            return self._default
        token = bearer_token(authorization)
        if not token:
            raise Unauthenticated("send a tenant's token in the header Authorization: Bearer TOKEN")
        credential = self._credentials.by_token(token)
        if credential is None:
            raise Unauthenticated("the bearer token is not known here")
        if credential.role != "tenant":
            raise PermissionDenied(f"the token is of the role {credential.role}; answers are for the role tenant")
        return credential.name


def check_host(settings: Settings) -> None:
    """Raises SettingsError where anybody on the network could ask without a token."""
    host = settings.http.host
    if not settings.credentials and not _is_loopback(host):
        raise SettingsError(
            f"http.host {host!r} can be reached from other machines: "
            "add [[credentials]] with tenants' tokens, or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
