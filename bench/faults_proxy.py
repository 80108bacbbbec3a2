"""A TCP proxy that makes a network bad: it delays, throttles, holds back and cuts.

Threads of its own; nothing here blocks the caller. What is changed applies to connections that are open as well.
"""

import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

_CHUNK = 16 * 1024
_STEP_S = 0.01


@dataclass
class Weather:
    """What happens to each chunk of bytes, in each direction."""

    delay_s: float = 0.0
    bytes_per_s: float = 0.0  # 0: as fast as it comes
    is_held: bool = False  # nothing passes, and nobody is told
    cut_after: int = 0  # bytes to the client after which a connection is reset; 0: never


@dataclass
class Proxy:
    """Listens on `port` of this machine and passes everything on to `target`, a port of it too. Close it."""

    target: int
    weather: Weather = field(default_factory=Weather)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def clear(self) -> None:
        """Fine weather again."""
        self.weather = Weather()

    def cut(self) -> None:
        """Reset every connection that is open."""
        with self._lock:
            ends = list(self._open)
        for end in ends:
            _reset(end)

    def close(self) -> None:
        """No more connections; those that are open are reset."""
        self._is_closed = True
        _shut(self._listener)
        self.cut()

    # -- threads of its own ----------------------------------------------------------------------------
    def _accept(self) -> None:
        while not self._is_closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            with self._lock:
                self._open |= {client, server}
            for source, sink, is_answer in ((client, server, False), (server, client, True)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(source, sink, is_answer), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                self._hold(len(data))
                limit = self.weather.cut_after
                if is_answer and limit and passed + len(data) > limit:
                    sink.sendall(data[: max(limit - passed, 0)])
                    break
                sink.sendall(data)
                passed += len(data)
        for end in (source, sink):
            _reset(end)
        with self._lock:
            self._open -= {source, sink}

    def _hold(self, count: int) -> None:
        weather = self.weather
        wait_s = weather.delay_s + (count / weather.bytes_per_s if weather.bytes_per_s else 0.0)
        if wait_s:
            time.sleep(wait_s)
        while self.weather.is_held and not self._is_closed:
            time.sleep(_STEP_S)


def _reset(end: socket.socket) -> None:
    """Close it at once, as a broken line would: the peer sees a reset."""
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    _shut(end, socket.SHUT_RD)  # wakes who reads it; the peer hears nothing yet


def _shut(end: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with suppress(OSError):
        end.shutdown(how)
    with suppress(OSError):
        end.close()
