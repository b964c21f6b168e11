"""Makes a session of a channel, whatever that talks over, and has the loop take it in.

Knows channels, conversations and the loop. Must not know what users may pass.
"""

from __future__ import annotations

from itertools import starmap

from . import log
from .core.conversation import Conversation
from .errors import InvalidStreamError
from .interruptions import pass_on
from .session import Session, conversation_of
from .transports.stream_channel import StreamChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .core.loop import Loop
    from .opening import SessionOpener
    from .protocols import MessageSerializer
    from .transports.channel import Channel

__all__ = ["make_session"]


def make_session(
    loop: Loop,
    peer: SessionOpener,
    given: Any,
    make: Callable[[MessageSerializer, int], Channel],
    on_session: Callable[[Session], Any] | None = None,
    name: str = "",
) -> Session:
    """Make a session, which is the peer's.

    Args:
        loop: The peer's.
        peer: Whose serializer and largest size the channel gets.
        given: What the user has passed, for a text. A transport stays as it was if it is refused.
        make: Makes the channel.
        on_session: Gets the session before anything that came over it is dispatched.
        name: What its socket is connected to, in a few words.
    """
    loop.check_open()
    outer = loop.enter()
    channel: Any = None
    conversation = None
    try:
        for channel in starmap(make, ((peer.serializer, peer.max_frame_size),)):  # stored before a signal is looked at
            break
        else:
            raise RuntimeError(f"an attribute of {given!r:.100} raised StopIteration")
        if isinstance(channel, StreamChannel):
            if name:
                channel.connected(name)
            _check_free(loop, channel)
        session = Session(lambda session: Conversation(loop, channel, peer, session))
        conversation = conversation_of(session)
        loop.add(conversation)
        if on_session is not None:
            conversation.dispatcher.begin_with(on_session)
        conversation.port.rearm()
        if conversation.port.invalid is not None:
            raise InvalidStreamError(str(conversation.port.invalid))
        log.debug("session %s opened%s", session.name, channel.details())
        return session
    except BaseException:  # an interruption: nobody will ever have the session
        if conversation is not None:
            conversation.close(release=True, seconds=0)  # what is queued is a transport's own
        elif channel is not None and channel.transport is not given:
            channel.release()
        raise
    finally:
        loop.thread = outer


def _check_free(loop: Loop, channel: StreamChannel) -> None:
    """Raise ``InvalidStreamError`` for a channel whose streams somebody else uses, before anything of it is taken."""
    reads, output = channel.interest()[0], channel.outbox.end.fd
    for fd in reads:
        try:
            loop.poller.look(fd, None)
        except OSError as exc:
            pass_on(exc)
            raise InvalidStreamError(f"descriptor {fd} cannot be waited for: {exc}") from exc
    # One that is read, too, as most are, was looked at above: this goes through all sessions.
    if output not in reads and any([_writes_to(other.channel, output) for other in tuple(loop.conversations)]):
        advice = "use that one, or call remove_session() with it first"
        raise InvalidStreamError(f"descriptor {output} is written by another session of this peer; {advice}")


def _writes_to(channel: Channel, fd: int) -> bool:
    """Return whether a channel writes to a descriptor, unless its owner has closed that: it may be another file's now."""
    return isinstance(channel, StreamChannel) and channel.outbox.end.fd == fd and channel.find_invalid() is None
