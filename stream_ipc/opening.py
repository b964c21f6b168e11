"""Sessions that begin: over a channel that is open, and over connections that a listener accepts.

Knows which loop is behind a peer. Must not know how a channel is opened.
"""

from __future__ import annotations

from . import log
from .core.conversation import Conversation
from .session import Session, conversation_of
from .ticking import loop_of
from .transports.socket_channel import socket_channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from .peer import IpcPeer
    from .transports.channel import Channel

__all__ = ["add_own_socket", "add_session", "add_socket", "close_untaken", "taker"]


def add_session(
    peer: IpcPeer, make: Callable[[], Channel], on_session: Callable[[Session], Any] | None = None
) -> Session:
    """Add a session to a peer, over the channel that a function makes, to be handed to ``on_session`` first of all."""
    loop = loop_of(peer)
    loop.check_open()
    outer = loop.enter()
    channel = conversation = None
    try:
        channel = made = make()
        session = Session(lambda session: Conversation(loop, made, peer, session))
        conversation = conversation_of(session)
        loop.add(conversation)
        if on_session is not None:
            conversation.dispatcher.begin_with(on_session)
        log.debug("session %s opened%s", session.name, channel.details())
        conversation.port.rearm()
        return session
    except BaseException:  # an interruption: nobody will ever have the session
        if conversation is not None:
            conversation.close(release=True)
        elif channel is not None:
            channel.release()
        raise
    finally:
        loop.thread = outer


def add_socket(
    peer: IpcPeer, sock: socket.socket, name: str = "", on_session: Callable[[Session], Any] | None = None
) -> Session:
    """Add a session over a connected socket."""
    return add_session(peer, lambda: socket_channel(sock, name, peer.serializer, peer.max_frame_size), on_session)


def add_own_socket(peer: IpcPeer, sock: socket.socket, name: str) -> Session:
    """Add a session over a socket that was made for it, which is closed if that fails."""
    try:
        return add_socket(peer, sock, name)
    except BaseException:
        close_untaken(peer, sock)
        raise


def close_untaken(peer: IpcPeer, *sockets: socket.socket) -> None:
    """Close sockets that are no session's."""
    for sock in {*sockets} - {session.socket for session in peer.sessions}:
        sock.close()


def taker(peer: IpcPeer, on_session: Callable[[Session], Any]) -> Callable[[socket.socket, str], Any]:
    """Return what a listener calls with each connection."""
    if not callable(on_session):
        raise TypeError(f"on_session must be a function that takes a session, not {on_session!r:.100}")
    return lambda sock, name: add_socket(peer, sock, name, on_session)
