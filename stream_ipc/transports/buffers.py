"""Pipes and Unix sockets that hold more than usual, for large messages.

Knows fcntl and socket objects. Must not know ends of streams. Imported with the first large message.
"""

from __future__ import annotations

import sys

from ..interruptions import pass_on

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

__all__ = ["LARGE_PIPE", "LARGE_SOCKET", "MOST_PIPES", "count_off", "grow_pipe", "grow_socket", "shrink_socket"]

LARGE_PIPE = 1024 * 1024  # bytes: as much as Linux lets anybody have
LARGE_SOCKET = 256 * 1024  # bytes, of which Linux makes twice as many; more is no faster

# Linux counts the pages of all pipes of a user. Once there are too many, each new pipe gets one or two, whichever program
# makes it: this process takes a quarter of the usual limit at most.
MOST_PIPES = 16

_grown: set[int] = set()  # descriptors of pipes


def grow_pipe(fd: int) -> None:
    """Have a pipe hold more, if the system allows it and this process has not too many of the kind."""
    import fcntl

    if len(_grown) < MOST_PIPES and hasattr(fcntl, "F_SETPIPE_SZ"):
        _grown.add(fd)
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, LARGE_PIPE)
        except OSError as exc:  # the user has too many, or the limit of one is lower
            _grown.discard(fd)
            pass_on(exc)


def count_off(fd: int) -> None:
    """Take note that a pipe is about to be closed."""
    _grown.discard(fd)


def grow_socket(sock: socket.socket) -> int:
    """Have a Unix socket take more before it is full, unless its owner has chosen a size.

    Returns:
        For ``shrink_socket``, what it took before; 0 if nothing was changed.
    """
    import socket

    # The memory is the sender's, is there only while it holds something, and Linux bounds it without an error.
    buffer = (socket.SOL_SOCKET, socket.SO_SNDBUF)
    try:
        with socket.socket(socket.AF_UNIX) as fresh:
            usual = fresh.getsockopt(*buffer)
        if sock.getsockopt(*buffer) == usual < LARGE_SOCKET:
            sock.setsockopt(*buffer, LARGE_SOCKET)
            return usual
    except OSError as exc:  # out of descriptors, or the system has a limit that is lower
        pass_on(exc)
    return 0


def shrink_socket(sock: socket.socket, size: int) -> None:
    """Have a Unix socket take as much as before."""
    import socket

    # Linux makes twice as much of what is asked for, and tells that.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size // 2 if sys.platform == "linux" else size)
