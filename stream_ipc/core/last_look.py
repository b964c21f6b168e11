"""The last look at a stream before a call gives up that waits for a reply, a notification or room.

Knows conversations, their ports, and the loop that turns. Must not know what gives up.

If this process was stopped, or busy with something else, what the other side sent in time still counts. Part of it may
not be sent yet, because nobody read: so a last look that comes late reads on while more arrives, unless the inbox is long.
What stands before a reply has its turn first, but not for ever.
"""

from __future__ import annotations

from ..errors import InvalidStreamError, StreamClosedError
from .items import reply_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .conversation import Conversation
    from .pending import Pending
    from .port import Port
    from .receiving import Wanted

__all__ = ["read_replies", "take_notification", "take_replies", "write_queued"]

_LATE = 0.02  # seconds; less is nothing unusual
_TIMES = 128  # so that a last look takes at most so many pauses
_PAUSE = 0.01  # seconds that the other side may take from one time to the next
_TURNS = 5.0  # seconds that handlers may take for what stands before a reply, and that a call is late then


def take_replies(requests: Iterable[Pending], limit: float) -> None:
    """Take the replies that had come in time though this process could not read them.

    Args:
        requests: What is waited for.
        limit: Until when, by the loops' clock; infinity if there was no limit.
    """
    due: float | None = None
    waiting: dict[Conversation, list[Pending]] = {}
    for pending in requests:
        if pending.conversation is not None:
            waiting.setdefault(pending.conversation, []).append(pending)
    for conversation, sent in waiting.items():
        if conversation.is_open:
            due = due or conversation.loop.clock() + _TURNS
            _take_replies(conversation, sent, limit, due)


def _take_replies(conversation: Conversation, sent: list[Pending], limit: float, due: float) -> None:
    loop = conversation.loop
    dispatcher = conversation.dispatcher
    arrived = read_replies(conversation, limit)
    for pending in sent:
        while not pending.settled and pending.id in arrived and loop.clock() < due:
            before = loop.dispatched
            loop.run(pending, loop.clock())  # what stands before it is dispatched first
            if not pending.settled and (loop.dispatched == before or not dispatcher.has_work):
                dispatcher.settle_replies()  # what stands before it has to wait
                break


def read_replies(conversation: Conversation, limit: float) -> set[Any]:
    """Read what is there; returns the ids of the replies that stand in the inbox then."""
    _read(conversation, limit)
    ids = map(reply_id, tuple(conversation.dispatcher.inbox))
    return {id for id in ids if isinstance(id, str)}


def take_notification(conversation: Conversation, wanted: Wanted, limit: float) -> None:
    """Dispatch what had come in time, while something that a call of ``receive`` waits for is among it."""
    loop = conversation.loop
    inbox = conversation.dispatcher.inbox
    _read(conversation, limit)
    goal = loop.dispatched + sum([len(dispatcher.inbox) for dispatcher in (conversation.dispatcher, *loop.todo)])
    before = -1
    due = loop.clock() + _TURNS
    while not wanted.settled and before < loop.dispatched < goal and any(map(wanted.is_met_by, [*inbox])):
        before = loop.dispatched
        loop.run(wanted, loop.clock())
        if loop.clock() >= due:
            break


def write_queued(conversation: Conversation, limit: float) -> None:
    """Write what the stream takes, and if the look comes late, what it takes while the other side reads."""
    try:
        _write_on(conversation.port, _times(conversation, limit))
    except (StreamClosedError, InvalidStreamError):
        pass  # the port has taken note of it


def _write_on(port: Port, times: int) -> None:
    port.write()
    channel = port.channel
    for _ in range(times):
        queued = channel.outbox.queued_bytes
        if not queued or not channel.wait_writable(_PAUSE):
            break
        port.write()
        if channel.outbox.queued_bytes >= queued:
            break


def _read(conversation: Conversation, limit: float) -> None:
    """Read what is there, and if the look comes late, the rest of a message that has begun to arrive."""
    conversation.loop.inside(_read_on, conversation.port, _times(conversation, limit))


def _read_on(port: Port, times: int) -> None:
    inputs = port.channel.inputs
    port.update_reading()
    if not port.paused:
        port.drain()
    for _ in range(times):
        port.update_reading()
        if port.paused or port.failing or not inputs.is_unfinished or not inputs.wait(_PAUSE):
            break
        before = inputs.received_bytes
        port.drain()
        if inputs.received_bytes == before:
            break


def _times(conversation: Conversation, limit: float) -> int:
    """Return how often a look goes on: not at all unless its time was over long ago."""
    return _TIMES if conversation.loop.clock() - limit > _LATE else 0
