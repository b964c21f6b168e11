"""Connections: accepted by a ``Listener`` inside ticks, and made by ``IpcPeer.connect``.

Knows sockets and TLS handshakes. Must not know messages; a session is made by the peer.
"""

from __future__ import annotations

import errno
import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

from .core.acceptor import Acceptor
from .core.conditions import wait_for
from .interruptions import pass_on
from .transports.addresses import Place, check_address, describe_address, is_unix, named
from .transports.sockets import connect, listen, other_user

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from .core.loop import Loop

__all__ = ["Listener", "open_connection", "open_listener"]


class Listener:
    """Accepts connections while its peer ticks.

    Made by ``IpcPeer.listen``, and closed with its peer at the latest. A
    context manager: leaving closes it.
    """

    __slots__ = ("__weakref__", "_acceptor")

    def __init__(self, acceptor: Acceptor) -> None:
        self._acceptor = acceptor

    def __repr__(self) -> str:
        try:
            return repr(self._acceptor)
        except Exception:  # half made
            return "<Listener>"

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def address(self) -> str | tuple[str, int]:
        """Where it listens: the path, or the host and the port.

        The host is as it was given; the port may be one that the system chose.
        Stays the same when it is closed.
        """
        return self._acceptor.place

    @property
    def is_open(self) -> bool:
        """Whether it accepts connections."""
        return not self._acceptor.closed

    def close(self) -> None:
        """Accept no more, and remove the file of a Unix socket.

        A second call does nothing. Does not block and runs no handlers.
        Sessions that were accepted stay open. Connections that were not
        accepted yet, or whose handshake is not over, are closed.

        Raises:
            RuntimeError: Another thread is using the peer.
        """
        acceptor = self._acceptor
        if acceptor.closed:
            return
        outer = acceptor.loop.enter()
        try:
            acceptor.close()
        finally:
            acceptor.loop.thread = outer


def open_listener(
    loop: Loop,
    address: Any,
    take: Callable[[Any, str], Any],
    timeout: Callable[[], float | None],
    context: ssl.SSLContext | None,
) -> Listener:
    """Listen at an address; see ``IpcPeer.listen``.

    Args:
        loop: What drives it.
        address: As it was given.
        take: Called with each connection, and its name.
        timeout: Returns how many seconds a handshake may take.
        context: For TLS, or None.
    """
    place = check_address(address)
    if context is not None:
        _check_context(context, True)
    sock, found, file = listen(place, context is not None)
    acceptor: Acceptor | None = None
    try:
        acceptor = Acceptor(loop, sock, found, file, take, timeout, context)
        acceptor.start()
        return Listener(acceptor)
    except BaseException as exc:
        if acceptor is not None:
            acceptor.close()
        else:
            sock.close()
            if file is not None:
                file.remove()
        if isinstance(exc, OSError):
            pass_on(exc)
            raise named(exc, f"cannot listen at {place!r}") from exc
        raise


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
        _check_context(context, False)
    elif server_hostname is not None:
        raise ValueError("server_hostname is for TLS; pass an ssl_context too")
    limit = None if timeout is None else loop.clock() + timeout
    late = f"cannot connect to {place!r} within {timeout} s"
    try:
        sock = connect(place, context is not None, limit, loop.clock, partial(wait_for, loop))
        try:
            if is_unix(place):
                _check_owner(sock, place)
            if context is not None:
                late = f"the TLS handshake with {place!r} was not over within {timeout} s; does the other side speak TLS?"
                sock = _shake_hands(loop, sock, place, context, server_hostname, limit)
            if loop.closing:
                raise _closed_meanwhile(place)
            return sock, f"to {describe_address(place)}"
        except BaseException:
            sock.close()
            raise
    except TimeoutError as exc:
        pass_on(exc)
        if exc.errno is not None:  # the system's own
            raise
        if loop.closing:
            raise _closed_meanwhile(place) from None
        raise TimeoutError(late) from exc


def _closed_meanwhile(place: Place) -> RuntimeError:
    return RuntimeError(f"this IpcPeer was closed while it was connecting to {place!r}")


def _check_context(context: Any, server_side: bool) -> None:
    import ssl

    if not isinstance(context, ssl.SSLContext):
        raise TypeError(f"ssl_context must be an ssl.SSLContext, not {context!r:.100}")
    if context.protocol == (ssl.PROTOCOL_TLS_CLIENT if server_side else ssl.PROTOCOL_TLS_SERVER):
        wanted, given = ("SERVER", "CLIENT") if server_side else ("CLIENT", "SERVER")
        raise ValueError(f"ssl_context is a PROTOCOL_TLS_{given} one; this side needs PROTOCOL_TLS_{wanted}")


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

    from .transports.tls import handshake, wrap

    if server_hostname is None and not isinstance(place, str):
        server_hostname = place[0]
    try:
        tls = wrap(context, sock, False, server_hostname)
    except OSError as exc:
        raise named(exc, f"cannot connect to {place!r}") from exc
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
        raise named(exc, f"the TLS handshake with {place!r} failed") from exc
    except BaseException:
        tls.close()
        raise
