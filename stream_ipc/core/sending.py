"""Sending what is more than a single write: in batches, to many, and waiting for a long queue to drain.

Knows conversations, their ports, and the loop. What is read while a send waits is not dispatched. Must not know how a
message is encoded.
"""

from __future__ import annotations

from contextlib import contextmanager

from ..errors import FrameTooLargeError, RequestTimeoutError, within
from ..interruptions import pass_on
from ..messages import NOTIFICATION
from .last_look import write_queued
from .loop import Loop, Until

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from typing import Any, TypeVar

    from ..messages import Message
    from .conversation import Conversation
    from .port import Port

    S = TypeVar("S")

__all__ = ["HIGH_WATER", "Batches", "broadcast", "flush", "make_room"]

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
    """See ``Session.flush``."""
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


# -- batches


class Batches:
    """The batches of one conversation, which may be one inside the other.

    Owns which are under way, and whether the outbox is corked: it is while there are any.
    """

    def __init__(self, loop: Loop, port: Port) -> None:
        self._loop = loop
        self._port = port
        self._outbox = port.channel.outbox
        self._under_way: dict[object, None] = {}

    @property
    def queued_bytes(self) -> int:
        """How many bytes were gathered, or wait for another reason."""
        return self._outbox.queued_bytes

    @contextmanager
    def batch(self, session: S) -> Iterator[S]:
        """Gather what is sent inside, and give the session to the block; see ``Session.batch``."""
        loop = self._loop
        loop.check_entry()
        batch = object()
        loop.chores.cork(self)  # first: a turn uncorks it if an interruption comes next
        self._outbox.cork(True)
        write = self._port.write_or_report  # what the block raises is not to be hidden by what a write does
        try:
            self._under_way[batch] = None
            yield session
            write = self._port.write
        finally:
            self._under_way.pop(batch, None)
            if not loop.forked:
                loop.inside(self._uncork, write)

    def _uncork(self, write: Callable[[], None]) -> None:
        """Write what was gathered, if no batch is under way any more."""
        if not self._under_way:
            self._outbox.cork(False)
            write()
            if not self._under_way:
                self._loop.chores.corked.pop(self, None)  # last: until then the next turn does it again

    def flush(self) -> None:
        """Write what was gathered so far; what goes wrong is reported in turn."""
        if self.queued_bytes:
            self._port.write_or_report()
        if not self._under_way:  # an interruption has come before the end of the last one
            self._outbox.cork(False)
            self._loop.chores.corked.pop(self, None)


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
