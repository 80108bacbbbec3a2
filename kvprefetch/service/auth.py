"""Who is calling, and who may call what.

Promises
- A method that is not in `WHO` is refused to everybody. `Health` is open; everything else wants a credential, where any
  are configured. Where none are, whoever can reach the service (its own user's sockets, or loopback) is everybody.
- A token is compared as its SHA-256, in constant time, with every credential; where one is shown, it alone decides.
  Tokens are in no log and no message.
- A tenant's name comes from its credential. Workers and operators speak for the settings' tenant where a call does
  not name one.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from kvprefetch.credentials import Credentials, bearer_token
from kvprefetch.errors import PermissionDenied, SettingsError, Unauthenticated
from kvprefetch.settings import Credential


class Role(StrEnum):
    """What a credential is for."""

    TENANT = "tenant"
    WORKER = "worker"
    OPERATOR = "operator"


ALL = frozenset(Role)
_WORKER = frozenset({Role.WORKER})
_OPERATOR = frozenset({Role.OPERATOR})
OPEN: frozenset[Role] = frozenset()
"""In `WHO`: for everybody, known or not."""

WHO: Mapping[str, frozenset[Role]] = {
    "/kvprefetch.v1.Hints/Signal": ALL,
    "/kvprefetch.v1.Hints/Prefetch": ALL,
    "/kvprefetch.v1.Hints/Cancel": ALL,
    "/kvprefetch.v1.Cache/Lookup": _WORKER,
    "/kvprefetch.v1.Cache/Reserve": _WORKER,
    "/kvprefetch.v1.Cache/Commit": _WORKER,
    "/kvprefetch.v1.Cache/Release": _WORKER,
    "/kvprefetch.v1.Cache/Read": _WORKER,
    "/kvprefetch.v1.Cache/Pin": _WORKER | _OPERATOR,
    "/kvprefetch.v1.Workers/Work": _WORKER,
    "/kvprefetch.v1.Admin/Stats": ALL,
    "/kvprefetch.v1.Admin/Tenants": _OPERATOR,
    "/kvprefetch.v1.Admin/SetTenants": _OPERATOR,
    "/kvprefetch.v1.Admin/Drain": _OPERATOR,
    "/grpc.health.v1.Health/Check": OPEN,
    "/grpc.health.v1.Health/Watch": OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": ALL,
}
"""Method → the roles that may call it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller. `tenant`: whom it speaks for in hints and signals."""

    name: str
    roles: frozenset[Role]
    tenant: str

    @property
    def sees_all(self) -> bool:
        """Whether figures of all tenants are for it."""
        return bool(self.roles & {Role.WORKER, Role.OPERATOR})


NOBODY = Identity("", frozenset(), "")
_caller: ContextVar[Identity] = ContextVar("caller", default=NOBODY)


def caller() -> Identity:
    """Who made the call that is being answered; NOBODY where an open method was called without a credential."""
    return _caller.get()


def set_caller(identity: Identity) -> None:
    """For the code around a call alone: `identity` makes it. Seen in that call's task only."""
    _caller.set(identity)


class Gate:
    """Tells callers apart. Never changes; raises SettingsError where two credentials cannot be told apart."""

    def __init__(self, credentials: Sequence[Credential], tenant: str) -> None:
        self._credentials, self._tenant = Credentials(credentials), tenant
        self._by_name = {each.certificate: _identity(each, tenant) for each in credentials if each.certificate}
        self._anybody = None if credentials else Identity("local", ALL, tenant)
        _refuse_doubles("token_sha256", [each for each in credentials if each.token_sha256])
        _refuse_doubles("certificate", [each for each in credentials if each.certificate])

    def admit(self, method: str, authorization: str | None, certificate: Iterable[str]) -> Identity:
        """Who may now make this call. Raises Unauthenticated, PermissionDenied.

        `authorization` is the header of that name; `certificate`: the names in the client's verified certificate.
        """
        allowed = WHO.get(method)
        if allowed is None:
            raise PermissionDenied(f"{method} is for nobody")
        if allowed is OPEN:
            return NOBODY
        identity = self._anybody or self._identify(authorization, certificate)
        if not identity.roles & allowed:
            roles, wanted = "/".join(sorted(identity.roles)), " or ".join(sorted(allowed))
            raise PermissionDenied(f"{identity.name!r} is a {roles}; {method[1:]} is for a {wanted}")
        return identity

    def _identify(self, authorization: str | None, certificate: Iterable[str]) -> Identity:
        if authorization is not None:
            return self._bearer(authorization)
        names = list(certificate)
        for name in names:
            if name in self._by_name:
                return self._by_name[name]
        if names:
            raise Unauthenticated(f"the certificate of {names[0]!r} is in no credential of the service's settings")
        raise Unauthenticated("no credential: give a token (KVPREFETCH_TOKEN) or a client certificate")

    def _bearer(self, authorization: str) -> Identity:
        token = bearer_token(authorization)
        if not token:
            raise Unauthenticated("the authorization is not 'Bearer' and a token")
        credential = self._credentials.by_token(token)
        if credential is None:
            raise Unauthenticated("the token is in no credential of the service's settings")
        return _identity(credential, self._tenant)


def certificate_names(auth_context: Mapping[str, Iterable[bytes]]) -> list[str]:
    """Names in a verified client certificate: its alternative names, then its common name."""
    keys = ("x509_subject_alternative_name", "x509_common_name")
    return [name.decode("utf-8", "replace") for key in keys for name in auth_context.get(key, ())]


def _identity(credential: Credential, tenant: str) -> Identity:
    role = Role(credential.role)
    return Identity(credential.name, frozenset({role}), credential.name if role is Role.TENANT else tenant)


def _refuse_doubles(what: str, credentials: Sequence[Credential]) -> None:
    seen: dict[str, str] = {}
    for each in credentials:
        value = getattr(each, what)
        if value in seen:
            raise SettingsError(f"credentials: {seen[value]!r} and {each.name!r} have the same {what}")
        seen[value] = each.name
