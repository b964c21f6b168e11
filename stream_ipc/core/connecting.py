"""Connecting to a listening peer, TLS handshake included, while the bytes of other sessions go on flowing.

Knows sockets, TLS handshakes and the loop. Must not know messages; a session is made by the peer.
"""

from __future__ import annotations

import errno
import math
import os
from functools import partial

from ..interruptions import pass_on
from ..transports import socket_channel  # noqa: F401 - for the session: it may have got the last descriptor
from ..transports.addresses import check_address, describe_address, explained
from ..transports.sockets import connect, other_user

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    import ssl
    from typing import Any

    from ..transports.addresses import Place
    from .loop import Loop

__all__ = ["open_connection", "wait_for"]


def open_connection(
    loop: Loop,
    address: Any,
    context: ssl.SSLContext | None,
    server_hostname: str | None,
    timeout: float | None,
) -> tuple[socket.socket, str]:
    """Connect to an address; see ``IpcPeer.connect``.

    Returns:
        The socket, and what it is connected to in a few words.
    """
    place = check_address(address)
    if context is not None:
        from ..transports.tls import check_context

        check_context(context, False)
    elif server_hostname is not None:
        raise ValueError("server_hostname is for TLS; pass an ssl_context too")
    limit = None if timeout is None else loop.clock() + timeout
    closed = RuntimeError(f"this IpcPeer was closed while it was connecting to {place!r}")
    late = f"cannot connect to {place!r} within {timeout} s"
    try:
        sock = connect(place, context is not None, limit, loop.clock, partial(wait_for, loop))
        try:
            if isinstance(place, str):
                _check_owner(sock, place)
            if context is not None:
                late = f"the TLS handshake with {place!r} was not over within {timeout} s; does the other side speak TLS?"
                sock = _shake_hands(loop, sock, place, context, server_hostname, limit)
            if loop.closing:
                raise closed
            return sock, f"to {describe_address(place)}"
        except BaseException:
            sock.close()
            raise
    except TimeoutError as exc:
        pass_on(exc)
        if exc.errno is not None:  # the system's own
            raise
        if loop.closing:
            raise closed from None
        raise TimeoutError(late) from exc


def _check_owner(sock: socket.socket, place: Place) -> None:
    # The user that it ran as when it began to listen: mostly root, if it has given up these rights since. Root may do as it
    # likes anyway, so it is only another user that must not get what is meant for a listener of ours.
    user = other_user(sock)
    if user:
        raise PermissionError(
            errno.EACCES,
            f"refusing to connect to {place!r}: user {user} listens there, and this process runs as {os.geteuid()}",
        )


def _shake_hands(
    loop: Loop,
    sock: socket.socket,
    place: Place,
    context: ssl.SSLContext,
    server_hostname: str | None,
    limit: float | None,
) -> socket.socket:
    import ssl

    from ..transports.tls import handshake, wrap

    if server_hostname is None and not isinstance(place, str):
        server_hostname = place[0]
    try:
        tls = wrap(context, sock, False, server_hostname)
    except OSError as exc:
        raise explained(exc, f"cannot connect to {place!r}") from exc
    except ValueError as exc:
        raise ValueError(f"cannot connect to {place!r}: {exc}") from exc
    try:
        while True:
            events = handshake(tls)
            if not events:
                return tls
            if not wait_for(loop, tls.fileno(), events, limit):
                raise TimeoutError
            events = 0  # see the end of Loop.run's loop
    except ssl.SSLError as exc:
        tls.close()
        text = f"the TLS handshake with {place!r} failed: {exc.strerror or exc}"
        error = type(exc)(exc.errno, text)
        for name in ("reason", "library", "verify_code", "verify_message"):
            if hasattr(exc, name):
                setattr(error, name, getattr(exc, name))
        raise error from exc
    except OSError as exc:
        tls.close()
        pass_on(exc)
        if isinstance(exc, TimeoutError) and exc.errno is None:
            raise
        raise explained(exc, f"the TLS handshake with {place!r} failed") from exc
    except BaseException:
        tls.close()
        raise


class _Awaited:
    """The owner of a descriptor that one call waits for.

    Attributes:
        settled: Whether it is ready.
    """

    def __init__(self) -> None:
        self.settled = False

    def on_ready(self, fd: int, events: int) -> None:
        """Note that it is ready."""
        self.settled = True

    def check(self) -> None:
        """Note that its number is another file's now."""
        self.settled = True


def wait_for(loop: Loop, fd: int, events: int, limit: float | None) -> bool:
    """Wait for a descriptor that is no conversation's, moving bytes but running no handlers.

    Args:
        loop: What waits.
        fd: The descriptor; -1 just waits.
        events: What to wait for.
        limit: A time of the clock, or None.

    Returns:
        Whether it is ready.
    """
    awaited = _Awaited()
    try:
        if fd >= 0:
            loop.watch(fd, events, awaited)
        loop.run(awaited, math.inf if limit is None else limit, dispatch=False)
    finally:
        loop.unwatch(fd, awaited)
    return awaited.settled
