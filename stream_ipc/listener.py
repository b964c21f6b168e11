"""What listens, as users see it.

Knows the acceptor behind it, which does all of it. Must not know sockets or handshakes.
"""

from __future__ import annotations

from .arguments import Facade, safe_repr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .core.listening import Acceptor

__all__ = ["Listener"]


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
        loop = acceptor.loop
        if acceptor in loop.listeners and not loop.forked:
            loop.inside(acceptor.close)
