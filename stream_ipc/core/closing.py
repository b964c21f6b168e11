"""Closing: the end of a conversation, or of many side by side.

They take nothing any more, what is queued is written for a while, and then each is closed in steps that may be
interrupted. What the steps leave to be done is in ``teardowns.py``. Must not know why a conversation ends.
"""

from __future__ import annotations

import math
from collections import deque

from .. import log
from ..errors import InvalidStreamError
from ..interruptions import pass_on, pass_on_own
from ..messages import is_text
from ..transports.channel import EndOfStream, Teardown
from .items import Delivery, Failure
from .loop import Loop, Until

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from typing import Any

    from ..errors import StreamClosedError
    from .conversation import Conversation

__all__ = ["FLUSH_BOUND", "Closing", "begin", "flush_bound", "write_out"]


FLUSH_BOUND = 1.0  # seconds that closing gives to what is still queued; if it has more than two, a child gets the last


def begin(conversations: Sequence[Conversation], reason: StreamClosedError) -> None:
    """Take no more messages, fail what is pending, and write what is queued as far as it goes."""
    for conversation in conversations:
        conversation.stop()  # all of them first: what fails in one may be a reply that another waits for
        conversation.logs_loss = True
    for conversation in conversations:
        conversation.requests.fail_all(reason)
    for conversation in conversations:
        conversation.port.look_for_end()
        conversation.port.write_or_report()


def flush_bound(seconds: float | None, conversations: Iterable[Conversation]) -> float:
    """Return how long closing may write what is queued.

    Args:
        seconds: How long all of closing may take; None for the usual bounds.
        conversations: What is closed. If one has a child, the end of the time is left to that.
    """
    if seconds is None:
        return FLUSH_BOUND
    if any([conversation.channel.process is not None for conversation in conversations]):
        return max(min(seconds, FLUSH_BOUND), seconds - FLUSH_BOUND)
    return seconds


def write_out(loop: Loop, conversations: Collection[Conversation], seconds: float) -> None:
    """Write what is queued, for at most so long."""
    outboxes = [conversation.outbox for conversation in [*conversations]]
    # A write that this call has interrupted cannot be waited for.
    written = Until(lambda: not any([outbox.queued_bytes and not outbox.writing for outbox in outboxes]))
    if seconds > 0 and not written.settled:
        loop.run(written, loop.clock() + seconds, dispatch=False)


class Closing:
    """What is left to be done to close one conversation.

    Owns the ``on_close`` handlers that are still to be called: each leaves the list before it is. All else may be done
    twice, as what it closes takes care of that. A call that is interrupted is made again by the next turn.

    Args:
        conversation: What is closed.
        release: Leave the streams open, to their owner.

    Attributes:
        teardown: What is left to be done after the streams were closed, or None.
        is_done: Whether nothing else is left to be done.
    """

    def __init__(self, conversation: Conversation, release: bool) -> None:
        self.teardown: Teardown | None = None
        self.is_done: bool = False
        self._conversation = conversation
        channel = conversation.channel
        self._release = release
        self._close_or_release: Any = channel.release if release else channel.close
        self._handlers = [*conversation.on_close.of(type(conversation.session))]
        # What a child has written was read with a reply, maybe, and did not have its turn.
        read = [*conversation.dispatcher.inbox]
        words = [item for item in read if is_text(item.message if type(item) is Delivery else item)]
        self._words = deque(words if channel.process is not None and not release else ())
        # Of a stream that its owner closed, each call tells.
        failures = [item.error for item in read if type(item) is Failure]
        self._failures = [error for error in failures if not isinstance(error, InvalidStreamError)]
        self._loss = _loss_of(conversation, release)
        self._ended = False  # whether only handlers are left to be called

    def go_on(self, handlers: bool = True) -> None:
        """Do what is left, without the ``on_close`` handlers unless ``handlers``."""
        conversation = self._conversation
        session = conversation.session
        if not self._ended:
            conversation.port.close()
            conversation.loop.remove(conversation)
            self._close_channel()
            self._fail_pending()
            self._ended = True
            self._log()  # only now: a log handler may close it again
        conversation.loop.go_on()
        while self._handlers and handlers:
            try:
                # atomic: no calls
                if self._handlers:
                    handler = self._handlers[0]
                    del self._handlers[0]  # entered once, even if it closes the session again or is interrupted

                    handler.function(session)
            except Exception as exc:
                pass_on_own(exc)
                log.error("on_close handler of %r failed", session, exc_info=True)
        if not self._handlers:
            self.is_done = True
            conversation.loop.repairs.pop(conversation, None)

    def _close_channel(self) -> None:
        try:
            if self.teardown is None:
                self.teardown = self._close_or_release()
            if self.teardown is None and self._words:
                self.teardown = _LastWords()
            if self.teardown is not None:
                self.teardown.messages = self._words
                self.teardown.take = self._conversation.dispatcher.deliver_late
                self._conversation.loop.chores.add_teardown(self.teardown)
                self.hurry()
        except Exception as exc:
            pass_on(exc)
            log.error("closing or releasing the streams of %r failed", self._conversation.session, exc_info=True)

    def _fail_pending(self) -> None:
        conversation = self._conversation
        assert conversation.reason is not None
        conversation.dispatcher.inbox.clear()
        conversation.dispatcher.kept.end()
        conversation.dispatcher.responder.drop_owed()
        conversation.requests.fail_all(conversation.reason)

    def _log(self) -> None:
        conversation = self._conversation
        assert conversation.reason is not None
        for error in self._failures:
            log.warning("session %s was closed before its on_exception handlers were told: %s", conversation.name, error)
        if self._loss:
            log.warning("session %s %s", conversation.name, self._loss)
        log.debug("session %s closed: %s", conversation.name, conversation.short(conversation.reason))

    def wait(self) -> None:
        """Block until a child has ended. What is done in the background is left to turns."""
        if self.teardown is not None and not self.teardown.background:
            self._conversation.loop.chores.teardowns.wait([self.teardown])
        self.teardown = None

    def hurry(self) -> None:
        """Have what is left done by the time that the conversation knows."""
        due = self._conversation.due
        if self.teardown is not None and due is not None:
            self.teardown.hurry(due)


class _LastWords(Teardown):
    """Has delivered what a child has written that lives on."""

    messages: deque[Any]

    def step(self) -> float | None:
        return None

    def abandon(self) -> None:
        self.messages.clear()


def _loss_of(conversation: Conversation, release: bool) -> str:
    """Return what closing will drop, for the log; empty if nothing, or if it was told to."""
    unwritten = conversation.outbox.queued_bytes
    if release:
        unread = len([item for item in [*conversation.dispatcher.inbox] if type(item) is not EndOfStream])
        unfinished = conversation.channel.inputs.is_unfinished
        if not (unread or unwritten or unfinished):
            return ""
        more = " and the beginning of another" if unfinished else ""
        return (
            f"was removed from its peer with {unread} messages{more} that were read and not dispatched, and {unwritten}"
            " bytes that were not written; both are lost: flush() and tick before"
        )
    if not unwritten or not conversation.logs_loss or conversation.due == -math.inf:
        return ""
    return (
        f"was closed before the other side has taken {unwritten} bytes, which are dropped: flush() first, or give close()"
        " more time"
    )
