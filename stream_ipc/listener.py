"""``Listener``, as users see an acceptor, and the opening of one at the address that they pass.

Knows sockets. Must not know messages; a session is made by the peer.
"""

from __future__ import annotations

from .arguments import Facade, safe_repr
from .core.acceptor import Acceptor
from .interruptions import pass_on
from .transports import socket_channel  # noqa: F401 - for sessions: nothing can be imported once no descriptors are left
from .transports.addresses import check_address, explained
from .transports.sockets import listen

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from typing import Any

    from .core.loop import Loop

__all__ = ["Listener", "open_listener"]


class Listener(Facade):
    """Accepts connections while its peer ticks.

    Made by ``IpcPeer.listen``, and closed with its peer at the latest. A
    context manager: leaving closes it.
    """

    __slots__ = ("__weakref__", "_acceptor")

    def __init__(self, acceptor: Acceptor) -> None:
        self._acceptor = acceptor

    @safe_repr
    def __repr__(self) -> str:
        return repr(self._acceptor)

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
        if not acceptor.closed:
            acceptor.loop.inside(acceptor.close)


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
        from .transports.tls import check_context

        check_context(context, True)
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
            raise explained(exc, f"cannot listen at {place!r}") from exc
        raise
