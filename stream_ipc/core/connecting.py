"""Connecting to a listening peer, TLS handshake included, while the bytes of other sessions go on flowing.

Knows sockets, TLS handshakes and the loop. Must not know messages; a session is made by the peer.
"""

from __future__ import annotations

import errno
import os
import select
import socket

from ..interruptions import pass_on
from ..transports import streams  # noqa: F401 - for the session: it may have got the last descriptor
from ..transports.sockets import check_address, describe_address, explain, other_user, resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from typing import Any

    from .loop import Loop

__all__ = ["open_connection", "wait_for"]

_RETRY = 0.01  # how often a Unix socket whose queue is full is tried again, in seconds


class _TooLate(OSError):
    """It took too long."""


class _Closed(Exception):
    """The peer was closed meanwhile."""


def open_connection(
    loop: Loop, address: Any, context: ssl.SSLContext | None, server_hostname: str | None, timeout: float | None
) -> tuple[socket.socket, str]:
    """Connect to an address; see ``IpcPeer.connect``. Returns the socket, and what it is connected to in a few words."""
    place = check_address(address)
    if context is not None:
        from ..transports import tls

        tls.check_context(context, False)
        if server_hostname is None and not isinstance(place, str):
            server_hostname = place[0]
        if server_hostname is None and context.check_hostname:
            raise ValueError(f"the ssl_context for {place!r} checks the name of the server; pass server_hostname too")
    elif server_hostname is not None:
        raise ValueError("server_hostname is for TLS; pass an ssl_context too")
    if not isinstance(place, str) and not place[1]:
        raise ValueError(f"cannot connect to {place!r}: nobody listens at port 0; pass the listener's port")
    limit = loop.limit_of(timeout)
    failed, advice = f"cannot connect to {place!r}", ""
    try:
        sock: Any = _connect_to_any(loop, resolve(place, context is not None), limit)
        try:
            # The system tells the user that a Unix socket's listener had when it began to listen, often root. Root could
            # read our data anyway; refuse only others.
            user = other_user(sock) if isinstance(place, str) else None
            if user:
                text = f"user {user} listens there, and this process runs as {os.geteuid()}"
                raise PermissionError(errno.EACCES, text)
            if context is not None:
                try:
                    sock = tls.wrap(context, sock, False, server_hostname)
                except ValueError as exc:  # of the name
                    pass_on(exc)
                    raise ValueError(f"{failed}: {exc}") from exc
                failed, advice = f"cannot finish the TLS handshake with {place!r}", "; does the other side speak TLS?"
                while True:
                    events = tls.handshake(sock)
                    if not events:
                        break
                    _wait_or_fail(loop, sock.fileno(), events, limit)
            return sock, f"to {describe_address(place)}"
        except BaseException:
            sock.close()
            raise
    except _TooLate:
        raise TimeoutError(f"{failed} within {timeout} s{advice}") from None
    except _Closed:
        raise RuntimeError(f"{failed}: this IpcPeer was closed while it was connecting") from None
    except OSError as exc:
        explain(exc, failed)
        raise


def _connect_to_any(loop: Loop, found: list[tuple[int, Any]], limit: float) -> socket.socket:
    """Connect to the first of some addresses at which somebody listens."""
    first: OSError | None = None
    for index, (family, sockaddr) in enumerate(found):
        now = loop.clock()
        try:  # one that does not answer leaves time for the others
            return _connect(loop, family, sockaddr, now + (limit - now) / (len(found) - index))
        except OSError as exc:
            pass_on(exc)
            first = first or exc
    assert first is not None
    raise first


def _connect(loop: Loop, family: int, sockaddr: Any, limit: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            number = sock.connect_ex(sockaddr)
            if number != errno.EAGAIN or family != socket.AF_UNIX:
                break
            # The queue of the listener is full, and no descriptor tells when it has room.
            now = loop.clock()
            if now >= limit:
                raise _TooLate
            _wait_or_fail(loop, -1, 0, min(now + _RETRY, limit))
        if number in (errno.EINPROGRESS, errno.EINTR, errno.EWOULDBLOCK):
            _wait_or_fail(loop, sock.fileno(), select.POLLOUT, limit)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not number and family != socket.AF_UNIX and sock.getsockname() == sock.getpeername():
            number = errno.ECONNREFUSED  # the system chose the same port for our end: TCP then connects it to itself
        if number:
            raise OSError(number, os.strerror(number))
        return sock
    except BaseException:
        sock.close()
        raise


def _wait_or_fail(loop: Loop, fd: int, events: int, limit: float) -> None:
    """Wait as ``wait_for`` does; raise if the peer was closed meanwhile, or the descriptor is not ready in time."""
    ready = wait_for(loop, fd, events, limit)
    if loop.closing:
        raise _Closed
    if fd >= 0 and not ready:
        raise _TooLate


class _Ready:
    """The owner of a descriptor that one call waits for, until it is ready, or its number another file's."""

    settled = False

    def __init__(self, loop: Loop, fd: int) -> None:
        self._loop = loop
        self._fd = fd

    def on_ready(self, fd: int, events: int) -> None:
        self.settled = True

    def check(self) -> None:
        """Let go of the descriptor: another task is to have it, and an interruption has left it here."""
        self.settled = True
        self._loop.poller.unwatch(self._fd, self)


def wait_for(loop: Loop, fd: int, events: int, limit: float) -> bool:
    """Wait for a descriptor that is no conversation's, moving bytes but running no handlers; -1 just waits.

    Returns whether it is ready before the clock has reached ``limit``.
    """
    awaited = _Ready(loop, fd)
    try:
        if fd >= 0:
            loop.poller.watch(fd, events, awaited)
        loop.run(awaited, limit, dispatch=False)
    finally:
        loop.poller.unwatch(fd, awaited)
    return awaited.settled
