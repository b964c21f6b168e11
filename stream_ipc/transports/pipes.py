"""Pipes that hold more than usual, for large messages.

Knows fcntl. Must not know ends of streams. Imported with the first large message.
"""

from __future__ import annotations

from ..interruptions import pass_on

__all__ = ["LARGE_PIPE", "MOST_PIPES", "count_off", "grow"]

LARGE_PIPE = 1024 * 1024  # bytes: as much as Linux lets anybody have

# Linux counts the pages of all pipes of a user. Once there are too many, each new pipe gets one or two, whichever program
# makes it: this process takes a quarter of the usual limit at most.
MOST_PIPES = 16

_grown: set[int] = set()  # descriptors


def grow(fd: int) -> None:
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
