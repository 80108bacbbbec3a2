"""The other end of the proxy's connections: a server that does on the wire what a test tells it, byte by byte."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

PATIENCE_S = 30.0


@dataclass(frozen=True)
class Request:
    """As it came: `line` and `headers` without line ends, `body` without the framing of chunks."""

    line: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def all(self, name: bytes) -> list[bytes]:
        """The values under that name, in their order."""
        return [value for found, value in self.headers if found.lower() == name]


class Peer:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.sent = sock, 0
        self._rest = bytearray()

    def request(self, *, body: bool = True) -> Request | None:
        """The next request; None where the connection was closed instead."""
        head = self.until(b"\r\n\r\n")
        if head is None:
            return None
        line, *fields = head[:-4].split(b"\r\n")
        request = Request(line, [(n, v) for n, _, v in (field.partition(b": ") for field in fields)], b"")
        return Request(line, request.headers, self.body_of(request)) if body else request

    def body_of(self, request: Request) -> bytes:
        if request.all(b"transfer-encoding") == [b"chunked"]:
            return b"".join(self.chunks())
        return self.exactly(int((request.all(b"content-length") or [b"0"])[0]))

    def chunks(self) -> Iterator[bytes]:
        """Each chunk of a chunked body as soon as it is there; raises EOFError where it breaks off."""
        while True:
            size = self.until(b"\r\n")
            if size is None:
                raise EOFError
            data = self.exactly(int(size, 16) + 2)[:-2]
            if not data:
                return
            yield data

    def send(self, *data: bytes) -> None:
        for piece in data:
            self.sock.sendall(piece)
            self.sent += len(piece)

    def reset(self) -> None:
        """Break the connection without a word."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def is_left(self) -> bool:
        """Wait until the other end closes; False if it does not."""
        try:
            while self.sock.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    def until(self, end: bytes) -> bytes | None:
        while end not in self._rest:
            if not self._read():
                return None
        return self._take(self._rest.index(end) + len(end))

    def exactly(self, size: int) -> bytes:
        while len(self._rest) < size:
            if not self._read():
                raise EOFError
        return self._take(size)

    def _take(self, size: int) -> bytes:
        found = bytes(self._rest[:size])
        del self._rest[:size]
        return found

    def _read(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            data = b""
        self._rest += data
        return bool(data)


Script = Callable[[Peer], None]


@dataclass
class Upstream:
    """Where it listens, and how many connections it has taken."""

    url: str
    connections: int = 0


@contextmanager
def upstream(script: Script) -> Iterator[Upstream]:
    """A server that runs `script` on each connection, in a thread of its own, and closes it where the script ends."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    running = Upstream(f"http://127.0.0.1:{listener.getsockname()[1]}")
    peers: list[Peer] = []

    def serve(peer: Peer) -> None:
        try:
            script(peer)
        except (OSError, EOFError):
            pass  # the other end has gone
        finally:
            peer.sock.close()

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.settimeout(PATIENCE_S)
            running.connections += 1
            peers.append(Peer(sock))
            threading.Thread(target=serve, args=(peers[-1],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield running
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for peer in peers:
            with suppress(OSError):  # its script may have closed it
                peer.sock.shutdown(socket.SHUT_RDWR)


def answering(*answer: bytes, seen: list[Request] | None = None) -> Script:
    """Give each request the same answer, over connections that stay open."""

    def script(peer: Peer) -> None:
        while (request := peer.request()) is not None:
            if seen is not None:
                seen.append(request)
            peer.send(*answer)

    return script


def chunked(*pieces: bytes) -> bytes:
    """A whole chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"
