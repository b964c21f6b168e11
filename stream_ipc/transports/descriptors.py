"""Descriptors, and the objects around them: waiting until one is ready, closing, and what texts call one.

Knows sockets and file objects. Must not know who reads or writes them; that is in ``ends.py``.
"""

from __future__ import annotations

import math
import os
import select
import sys

from .. import log
from ..errors import InvalidStreamError
from ..interruptions import pass_on

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = [
    "READ_SIZE", "close_all", "close_stream", "describe_stream", "has_hung_up", "is_socket", "is_tls", "refuse_text",
    "take_read_ahead", "unusable", "wait_readable", "wait_writable",
]  # fmt: skip

# With more, a buffer is mapped and unmapped for every read, which makes small round trips slower.
READ_SIZE = 64 * 1024


def wait_readable(fds: Sequence[int], seconds: float) -> bool:
    """Block until one of some descriptors is readable, hung up or broken, or the time is over."""
    return _poll(fds, select.POLLIN, seconds)


def wait_writable(fd: int, seconds: float) -> bool:
    """Block until a descriptor is writable, hung up or broken, or the time is over."""
    return _poll([fd], select.POLLOUT, seconds)


def has_hung_up(fds: Sequence[int]) -> bool:
    """Return whether the other side of a descriptor has closed it altogether, whatever is still to be read."""
    return _poll(fds, select.POLLHUP, 0)  # Linux tells it always, macOS if it is asked for, gevent's poll never


def _poll(fds: Sequence[int], events: int, seconds: float) -> bool:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, events)
    return bool(poller.poll(math.ceil(seconds * 1000)))


def describe_stream(stream: Any) -> str:
    """Return a few words for an error text."""
    return f"descriptor {stream}" if isinstance(stream, int) else f"{stream!r:.100}"


def unusable(stream: Any, why: str) -> InvalidStreamError:
    """Return the error for what was passed as a stream and is none."""
    advice = "pass an open file object, socket or descriptor"
    return InvalidStreamError(f"{describe_stream(stream)} cannot be used as a stream: {why}; {advice}")


def close_all(fds: list[int]) -> None:
    """Close descriptors, and take each out of the list. An interrupted call can be made again."""
    while True:
        try:
            # atomic: no calls
            if fds:
                fd = fds[-1]
                del fds[-1]  # before: a number that was closed may be another file's the next moment

                os.close(fd)
            else:
                return
        except OSError as exc:  # somebody else has closed it
            pass_on(exc)


def close_stream(stream: Any) -> None:
    """Close an object, if it is one that can be closed."""
    try:
        if hasattr(stream, "close"):
            stream.close()
    except (OSError, ValueError) as exc:  # it cannot flush what its owner left in it, or somebody has closed it
        pass_on(exc)
    except Exception as exc:  # of somebody's own class
        pass_on(exc)
        log.error("closing %s failed", describe_stream(stream), exc_info=True)


def take_read_ahead(stream: Any) -> bytes:
    """Return what a file object has read and not given out. A read of its descriptor must not block now."""
    buffered = getattr(stream, "buffer", stream)  # under a text layer
    try:
        return bytes(buffered.read1(len(buffered.peek())) or b"") if hasattr(buffered, "peek") else b""
    except (OSError, ValueError) as exc:  # it is closed
        pass_on(exc)
        return b""


def refuse_text(stream: Any) -> None:
    """Check that a text layer has not read ahead. Its descriptor must be at its end now.

    Raises:
        InvalidStreamError: It has, and of text the bytes are not known.
    """
    text = ""
    try:
        if hasattr(stream, "buffer") and hasattr(stream, "encoding"):
            text = stream.read(1)
    except UnicodeDecodeError:
        text = "?"
    except (OSError, ValueError) as exc:  # it is closed
        pass_on(exc)
    if text:
        raise InvalidStreamError(
            f"{describe_stream(stream)} has read text ahead that may belong to messages; create the session before"
            " anything reads from it, or read from its .buffer"
        )


def is_socket(stream: Any) -> bool:
    # Importing it takes long, and whoever has a socket object has imported it.
    sockets: Any = sys.modules.get("socket")
    return sockets is not None and isinstance(stream, sockets.socket)


def is_tls(stream: Any) -> bool:
    """Return whether a stream is an ``ssl.SSLSocket``."""
    ssl: Any = sys.modules.get("ssl")  # as for sockets
    return ssl is not None and isinstance(stream, ssl.SSLSocket)
