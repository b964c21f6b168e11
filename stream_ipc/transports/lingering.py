"""The end of TCP connections on which the other side may still be talking.

Knows sockets. Must not know messages, sessions or peers.
"""

from __future__ import annotations

import os
import socket

from ..clock import monotonic
from ..interruptions import pass_on
from .channel import DRAIN_READS, Teardown
from .descriptors import READ_SIZE

__all__ = ["linger", "stop_writing"]

_LINGER = 1.0  # seconds
_READS = 16  # of a step: more would keep other sessions waiting


def stop_writing(sock: socket.socket) -> bool:
    """End the writing side of a socket that does not block and is closed next, so that what was written arrives.

    Closing with unread input makes TCP reset the connection, and that overtakes what is on its way.

    Returns:
        Whether the other side is still talking, so that more may come.
    """
    heard = False
    try:
        sock.shutdown(socket.SHUT_WR)
        for _ in range(DRAIN_READS):
            if not os.read(sock.fileno(), READ_SIZE):  # whatever class the socket is of: the input is dropped
                return False
            heard = True
    except BlockingIOError:
        pass
    except (OSError, ValueError, MemoryError) as exc:
        pass_on(exc)
        return False
    return heard


class LingeringClose(Teardown):
    """Keeps a connection until the other side has read to its end and closes it, for a limited time.

    Closing with unread input sends RST, which discards data that the other side has not read.

    Args:
        sock: A TCP socket on which nothing more is written. It stays its owner's to close.
    """

    background = True
    _fd = -1

    def __init__(self, sock: socket.socket) -> None:
        # No socket object: under gevent that would be one of gevent's. Stored before a signal is looked at.
        for self._fd in map(os.dup, (sock.fileno(),)):
            break
        self._due = monotonic() + _LINGER

    def __del__(self) -> None:
        """Close what an interruption has lost before anybody got it."""
        self.abandon()

    def fds(self) -> list[int]:
        return [] if self._fd < 0 else [self._fd]

    def step(self) -> float | None:
        try:
            if self._fd >= 0:
                os.set_blocking(self._fd, False)  # its owner's flag, which is the same, was restored meanwhile
            for _ in range(_READS):
                left = self._due - monotonic()
                if self._fd < 0 or left <= 0 or not os.read(self._fd, READ_SIZE):
                    self.abandon()
                    return None
            return left
        except BlockingIOError:
            return left
        except (OSError, MemoryError) as exc:
            pass_on(exc)
        self.abandon()
        return None

    def hurry(self, due: float) -> None:
        self._due = min(self._due, due)

    def abandon(self) -> None:
        # atomic: no calls
        fd = self._fd
        self._fd = -1

        if fd >= 0:
            os.close(fd)


def linger(sock: socket.socket) -> Teardown | None:
    """End the writing side of a TCP socket that is closed next.

    Returns:
        What is left to be done after that, if anything is.
    """
    try:
        return LingeringClose(sock) if stop_writing(sock) else None
    except OSError as exc:  # out of descriptors
        pass_on(exc)
        return None
