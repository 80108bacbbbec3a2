"""The plainest way of moving bytes between two processes: a TCP socket of 127.0.0.1, as a measure for others.

As a program it sends: it says at which port it listens, and for every eight bytes that come (a number, little-endian)
it sends so many bytes back, out of memory that it has touched. It ends with its standard input.
"""

import socket
import struct
import sys
import threading

PIECE = 16 * 2**20
NUMBER = struct.Struct("<Q")


def receive(connection: socket.socket, into: memoryview) -> None:
    """Ask for as many bytes as `into` has, and wait for them."""
    connection.sendall(NUMBER.pack(into.nbytes))
    at = 0
    while at < into.nbytes:
        got = connection.recv_into(into[at : at + PIECE])
        if not got:
            raise RuntimeError("the sender has gone")
        at += got


def _serve(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    source = memoryview(bytearray(b"\x5a" * PIECE))
    while number := connection.recv(NUMBER.size, socket.MSG_WAITALL):
        (left,) = NUMBER.unpack(number)
        while left:
            piece = source[: min(left, PIECE)]
            connection.sendall(piece)
            left -= piece.nbytes


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"listening at {listener.getsockname()[1]}", flush=True)
    threading.Thread(target=_serve, args=(listener,), daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
