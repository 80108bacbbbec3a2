"""Where a service listens: sockets that only their user can open, and ports that ask who is there.

Promises
- Without credentials no port is opened, but a loopback one under `insecure_local`. What may not be raises SettingsError
  with a line that says what to do; nothing has been opened then.
- A socket's file is 0600, and a folder made for it 0700. A dead service's socket is replaced; a living one's raises
  ServiceError, and so does a port in use. Of two services that start at once, one gets the socket.
"""

import fcntl
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvprefetch.client.channel import default_address, host_and_port, is_loopback, socket_path
from kvprefetch.errors import ServiceError, SettingsError
from kvprefetch.settings import Settings, runtime_dir


@dataclass(frozen=True)
class UnixSocket:
    """A socket in the file system."""

    path: Path

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True)
class Port:
    """A TCP port; 0: any that is free."""

    host: str
    number: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.number}" if ":" in self.host else f"{self.host}:{self.number}"


def places(settings: Settings) -> list[UnixSocket | Port]:
    """Where these settings say to listen. Raises SettingsError for what cannot or may not be."""
    texts = settings.service.listen or (default_address(),)
    found = [UnixSocket(socket_path(text)) if text.startswith("unix:") else _port(text) for text in texts]
    twice = {str(place) for place in found if found.count(place) > 1}
    if twice:
        raise SettingsError(f"service.listen: {', '.join(sorted(twice))} is there twice")
    if not settings.credentials:
        _refuse_strangers(found, settings.service.insecure_local)
    return found


def _port(text: str) -> Port:
    try:
        return Port(*host_and_port(text, text))
    except SettingsError as error:
        raise SettingsError(f"service.listen: {error}") from error


def _refuse_strangers(found: Iterable[UnixSocket | Port], insecure_local: bool) -> None:
    for port in found:
        if not isinstance(port, Port):
            continue
        local = is_loopback(port.host)
        if not (local and insecure_local):
            instead = ", or allow this loopback port with --insecure-local" if local else ""
            raise SettingsError(
                f"service.listen: {port} without credentials would let anybody in; add [[credentials]] to the "
                f"settings, or listen on unix:///path{instead}"
            )


def check_free(port: Port) -> None:
    """Raises ServiceError if the port cannot be had; gRPC would say so in many words."""
    family = socket.AF_INET6 if ":" in port.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host, port.number))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ServiceError(
                f"cannot listen on {port}: {reason}; stop what listens there, or take another"
            ) from error


class Claim:
    """The sole right to one socket's path, for as long as this process lives or until `release`."""

    def __init__(self, place: UnixSocket) -> None:
        self.place = place
        _make_folder(place.path.parent)
        self._lock = self._take_lock()
        try:
            self._clear()
        except ServiceError:
            os.close(self._lock)
            raise

    def release(self) -> None:
        """The service has ended: its socket goes."""
        self.place.path.unlink(missing_ok=True)
        os.close(self._lock)

    def _take_lock(self) -> int:
        path = self.place.path.with_name(self.place.path.name + ".lock")  # stays, for a lock cannot be unlinked safely
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ServiceError(f"cannot listen on {self.place}: {path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise ServiceError(f"another service listens on {self.place}; stop it, or give --listen another") from error
        return lock

    def _clear(self) -> None:
        """Remove a socket that nobody answers."""
        path = self.place.path
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ServiceError(f"cannot listen on {self.place}: there is a file, and it is no socket")
            if _answers(path):
                raise ServiceError(f"another server listens on {self.place}; stop it, or give --listen another")
            path.unlink()


@contextmanager
def private_files() -> Iterator[None]:
    """Files made inside are their user's alone. For the whole process, so be quick."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def claim_all(found: Sequence[UnixSocket | Port]) -> list[Claim]:
    """Claim the sockets and see that the ports are free: all or nothing. Raises ServiceError."""
    claims: list[Claim] = []
    try:
        for place in found:
            if isinstance(place, UnixSocket):
                claims.append(Claim(place))
            elif place.number:
                check_free(place)
    except ServiceError:
        for claim in claims:
            claim.release()
        raise
    return claims


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # full, or slow: somebody is there
        return True


def _make_folder(folder: Path) -> None:
    """Make it for this user alone; the default one must be this user's. Raises ServiceError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_foreign = folder == runtime_dir() and folder.lstat().st_uid != os.getuid()
    except OSError as error:
        raise ServiceError(f"cannot make the folder {folder}: {error.strerror}") from error
    if is_foreign:
        raise ServiceError(f"{folder} belongs to another user; set XDG_RUNTIME_DIR, or give --listen another place")
