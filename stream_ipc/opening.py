"""Sessions that begin: over a channel that is open, and over connections that a listener accepts.

Knows which loop is behind a peer. Must not know how a channel is opened.
"""

from __future__ import annotations

from . import log
from .core.conversation import Conversation
from .session import Session, conversation_of
from .ticking import loop_of
from .transports.connections import socket_channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from .peer import IpcPeer
    from .transports.base import Channel

__all__ = ["add_session", "add_socket", "taker"]


def add_session(peer: IpcPeer, channel: Channel, on_session: Callable[[Session], Any] | None = None) -> Session:
    """Add a session to a peer, to be handed to ``on_session`` when it is dispatched."""
    loop = loop_of(peer)
    outer = loop.enter()
    try:
        session = Session(lambda session: Conversation(loop, channel, peer, session))
        conversation = conversation_of(session)
        loop.add(conversation)
        if on_session is not None:
            conversation.dispatcher.begin_with(on_session)
        try:
            log.debug("session %s opened%s", session.name, channel.details())
            conversation.port.rearm()
        except BaseException:
            session.close()
            raise
        return session
    finally:
        loop.thread = outer


def add_socket(
    peer: IpcPeer, sock: socket.socket, name: str = "", on_session: Callable[[Session], Any] | None = None
) -> Session:
    """Add a session over a connected socket."""
    channel = socket_channel(sock, peer.serializer, peer.max_frame_size)
    if name:
        channel.connected(name)
    return add_session(peer, channel, on_session)


def taker(peer: IpcPeer, on_session: Callable[[Session], Any]) -> Callable[[socket.socket, str], Any]:
    """Return what a listener calls with each connection."""
    if not callable(on_session):
        raise TypeError(f"on_session must be a function that takes a session, not {on_session!r:.100}")
    return lambda sock, name: add_socket(peer, sock, name, on_session)
