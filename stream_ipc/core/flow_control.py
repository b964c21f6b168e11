"""Sending against a long queue: a send waits for room, and ``flush`` for the end of the queue.

Knows conversations. What is read meanwhile is not dispatched.
"""

from __future__ import annotations

from ..errors import RequestTimeoutError
from .conditions import Until, within
from .last_look import write_queued

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from .conversation import Conversation
    from .loop import Loop

__all__ = ["FLUSH_BOUND", "HIGH_WATER", "await_room", "flush", "flush_bound", "make_room", "stuck_error"]

# Above this many queued bytes a send waits until the queue is below it again, and requests of this conversation wait in
# the inbox, because their replies would only add to the queue.
HIGH_WATER = 1024 * 1024

FLUSH_BOUND = 1.0  # seconds that closing gives to what is still queued


def make_room(conversation: Conversation, timeout: float | None) -> None:
    """Wait until the queue is below the mark, reading but not dispatching meanwhile."""
    if conversation.outbox.writing:  # what comes in the middle of a write cannot wait for its end
        return
    conversation.port.check()
    conversation.port.look_for_end()
    await_room(conversation.loop, [conversation], timeout)
    if conversation.is_stuck:
        raise stuck_error(conversation, timeout)
    if not conversation.is_writable:
        raise conversation.closed_error()


def await_room(loop: Loop, stuck: Collection[Conversation], timeout: float | None) -> None:
    """Wait until none of these is stuck any more, or the time is over."""
    limit = None if timeout is None else loop.clock() + timeout
    loop.run(Until(lambda: not any([conversation.is_stuck for conversation in stuck])), limit, dispatch=False)
    for conversation in stuck:
        if conversation.is_stuck:
            write_queued(conversation, limit)


def stuck_error(conversation: Conversation, timeout: float | None) -> RequestTimeoutError:
    """Return the error for a message that could not leave."""
    return RequestTimeoutError(
        f"the message was not sent: {conversation.outbox.queued_bytes} bytes are queued ({conversation.name}), and the"
        f" other side has not read them{within(timeout)}; is it ticking?",
        timeout=timeout,
    )


def flush(conversation: Conversation, timeout: float | None) -> None:
    """Write until nothing is queued."""
    loop = conversation.loop
    if conversation.reason is not None:
        raise conversation.closed_error()
    outbox = conversation.outbox
    conversation.port.look_for_end()
    if conversation.port.invalid is not None:
        raise conversation.closed_error()
    conversation.port.write()
    if outbox.is_broken:
        raise conversation.closed_error()
    if not outbox.queued_bytes:
        return
    if outbox.writing:
        raise RuntimeError(
            f"flush() was called in the middle of a write of the same session ({conversation.name}), by a signal"
            " handler or a finalizer; nothing more can be written until it returns"
        )
    limit = None if timeout is None else loop.clock() + timeout
    loop.run(Until(lambda: not outbox.queued_bytes or not conversation.is_writable), limit, dispatch=False)
    if outbox.queued_bytes and conversation.is_writable:
        conversation.port.look_for_end()
        write_queued(conversation, limit)
    if outbox.is_broken or (outbox.queued_bytes and not conversation.is_writable):
        raise conversation.closed_error()
    if outbox.queued_bytes:
        raise TimeoutError(
            f"{outbox.queued_bytes} bytes are still queued ({conversation.name}): the other side has not read"
            f" them{within(timeout)}; is it ticking?"
        )


def flush_bound(seconds: float | None, conversations: Iterable[Conversation]) -> float:
    """Return how long closing may write what is queued.

    Args:
        seconds: How long all of closing may take; None for the usual bounds.
        conversations: What is closed. If one has a child, that is left some of the time.
    """
    if seconds is None:
        return FLUSH_BOUND
    if any([conversation.channel.process is not None for conversation in conversations]):
        return min(seconds, max(FLUSH_BOUND, seconds / 2))
    return seconds
