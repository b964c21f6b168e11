"""Sending what is more than a single write: to many, and waiting for a long queue to drain.

Knows conversations, their ports, and the loop. What is read while a send waits is not dispatched. Must not know how a
message is encoded.
"""

from __future__ import annotations

from ..errors import FrameTooLargeError, RequestTimeoutError, within
from ..interruptions import pass_on
from ..messages import NOTIFICATION
from .last_look import write_queued
from .loop import Loop, Until

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

    from ..messages import Message
    from .conversation import Conversation

__all__ = ["HIGH_WATER", "broadcast", "flush", "make_room"]

# Above this many queued bytes a send waits until the queue is below it again, and requests of this conversation wait in
# the inbox, because their replies would only add to the queue.
HIGH_WATER = 1024 * 1024


def make_room(conversation: Conversation, timeout: float | None) -> None:
    """Wait until the queue is below the mark, reading but not dispatching meanwhile."""
    if conversation.outbox.writing:  # what comes in the middle of a write cannot wait for its end
        return
    conversation.port.check()
    conversation.port.look_for_end()
    _await_room(conversation.loop, [conversation], timeout)
    if conversation.is_stuck:
        raise _stuck_error(conversation, timeout)
    if not conversation.is_writable:
        raise conversation.closed_error()


def _await_room(loop: Loop, stuck: Collection[Conversation], timeout: float | None) -> None:
    """Wait until none of these is stuck any more, or the time is over."""
    limit = loop.limit_of(timeout)
    loop.run(Until(lambda: not any([conversation.is_stuck for conversation in stuck])), limit, dispatch=False)
    for conversation in stuck:
        if conversation.is_stuck:
            write_queued(conversation, limit)


def _stuck_error(conversation: Conversation, timeout: float | None) -> RequestTimeoutError:
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
    limit = loop.limit_of(timeout)
    loop.run(Until(lambda: not outbox.queued_bytes or not _may_still_drain(conversation)), limit, dispatch=False)
    if outbox.queued_bytes and _may_still_drain(conversation):
        conversation.port.look_for_end()
        write_queued(conversation, limit)
    if outbox.is_broken or (outbox.queued_bytes and not _may_still_drain(conversation)):
        raise conversation.closed_error()
    if outbox.queued_bytes:
        raise TimeoutError(
            f"{outbox.queued_bytes} bytes are still queued ({conversation.name}): the other side has not read"
            f" them{within(timeout)}; is it ticking?"
        )


def _may_still_drain(conversation: Conversation) -> bool:
    """Return whether the other side may still read what is queued, though it may write no more."""
    if conversation.is_writable:
        return True
    conversation.start_writing_out()
    return conversation.is_open and conversation.is_writing_out and conversation.port.invalid is None


# -- to many


def broadcast(loop: Loop, message: Message, timeout: float | None) -> int:
    """Notify every open conversation; see ``IpcPeer.broadcast``."""
    targets = [conversation for conversation in [*loop.conversations] if conversation.is_open]
    for target in targets:
        target.port.look_for_end()
    frames = _encode_for(targets, message)
    loop.check_entry()  # a serializer may have forked, and this is the copy
    stuck = []
    taken = 0
    for target in targets:
        if target.is_stuck:
            stuck.append(target)
        elif target.is_open:  # a handler of another may have closed it
            taken += _send_to(target, message, frames[target.channel.frame_key])
    if stuck:
        _await_room(loop, stuck, timeout)
    for target in stuck:
        if target.is_stuck:
            target.dispatcher.report(_stuck_error(target, timeout))
        elif target.is_open:
            taken += _send_to(target, message, frames[target.channel.frame_key])
    return taken


def _encode_for(targets: list[Conversation], message: Message) -> dict[Any, Any]:
    """Encode a message before it is sent to anybody.

    Returns:
        For each ``frame_key`` of the channels a frame, or the error that stands for it; None where a channel encodes
        for itself.

    Raises:
        FrameTooLargeError: It is too large for all of them.
    """
    frames: dict[Any, Any] = {}
    for target in targets:
        key = target.channel.frame_key
        if key not in frames:
            try:
                frames[key] = None if key is None else target.channel.encode(NOTIFICATION, None, message)
            except FrameTooLargeError as exc:
                frames[key] = exc
    if frames and all([isinstance(frame, FrameTooLargeError) for frame in frames.values()]):
        raise next(iter(frames.values()))
    return frames


def _send_to(target: Conversation, message: Message, frame: Any) -> int:
    try:
        if target.port.invalid is not None:
            raise target.closed_error()
        if type(frame) is list:
            target.send_frame(frame)
        elif frame is None:
            target.notify(message)
        else:
            raise frame
        return 1
    except Exception as exc:
        pass_on(exc)
        target.dispatcher.report(exc)
        return 0
