"""One conversation with one other process: its state, and what can be done with it.

Knows its port, its dispatcher and its pending requests, which own the rest. Must not know frames or descriptors.
"""

from __future__ import annotations

import math

from ..clock import monotonic
from ..errors import InvalidStreamError, StreamClosedError, describe
from ..handlers import HandlerList
from ..messages import NOTIFICATION, Message
from .closing import FLUSH_BOUND, Closing, begin, flush_bound, write_out
from .dispatcher import Dispatcher
from .last_look import read_replies
from .port import Port
from .requests import Requests
from .sending import HIGH_WATER, Batches, make_room

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..transports.channel import Channel, Frame, Queue, Teardown
    from .loop import Loop
    from .roles import Settings

__all__ = ["Conversation"]


class Conversation:
    """One conversation.

    Owns whether it is open, and the reason why it is closed.

    Args:
        loop: What drives it.
        channel: What it talks over.
        peer: Whose ``timeout`` and ``id_generator`` it uses.
        session: What handlers get.

    Attributes:
        is_open: Whether closing has not begun yet.
        reason: Why it is closed, or None; in a forked process, that it is a fork.
        due: When closing has to be done, in the time of ``monotonic()``; None for the usual bounds.
        logs_loss: Whether what is queued has time to be written, so that it is worth a word if it is dropped.
        outbox: What is queued to be written.
        dispatcher: Works off its inbox.
        port: Moves its bytes.
        batches: Gather what is sent.
        requests: Its pending requests.
        on_close: Handlers of its end.
        name: What texts call it.
    """

    def __init__(self, loop: Loop, channel: Channel, peer: Settings, session: Any) -> None:
        self.loop = loop
        self.channel = channel
        self.outbox: Queue = channel.outbox
        self.peer = peer
        self.session = session
        self.is_open: bool = True
        self.reason: StreamClosedError | None = None
        self.due: float | None = None
        self.logs_loss: bool = False
        self.name: str = channel.describe()
        self.requests: Requests = Requests(self)
        self.on_close: HandlerList = HandlerList("on_close", most=1, always=type(session))
        self.dispatcher: Dispatcher = Dispatcher(self)
        self.port: Port = Port(loop, channel, self.dispatcher, session)
        self.batches: Batches = Batches(loop, self.port)
        self._closing: Closing | None = None
        self._release = False  # whether closing leaves the streams to their owner
        self._writes_until: float | None = None  # how long an ended stream is kept for what is still to be written

    @property
    def state(self) -> str:
        """What it is doing, in a word."""
        if self.is_open:
            return "open"
        if self.reason is None:
            return "closing"
        return "closed" if self._closing is not None else "forked"

    @property
    def is_writable(self) -> bool:
        """Whether it is open and its stream has neither ended nor been closed by its owner."""
        return self.is_open and self.channel.inputs.ended is None and self.port.invalid is None

    @property
    def is_stuck(self) -> bool:
        """Whether a send has to wait for room in the queue."""
        return self.outbox.queued_bytes > HIGH_WATER and self.is_writable

    def closed_error(self) -> StreamClosedError | InvalidStreamError | RuntimeError:
        """Return the error for a call that comes too late, or in a forked process."""
        if self.loop.forked:
            return self.loop.refusal()
        if self.is_open and self.port.invalid is not None:
            return InvalidStreamError(str(self.port.invalid), self.session)
        reason = self.reason or self.channel.inputs.ended
        text = f"is being closed ({self.name})" if reason is None else f"is closed: {reason}"
        error = StreamClosedError(f"the session {text}")
        error.__cause__ = None if reason is None else reason.__cause__
        return error

    # -- sending

    def notify(self, message: Message) -> None:
        loop = self.loop
        outer = loop.enter()
        try:
            if not self.is_open:
                raise self.closed_error()
            if self.outbox.queued_bytes > HIGH_WATER:
                make_room(self, self.peer.timeout)
            try:
                channel = self.channel
                channel.put(channel.encode(NOTIFICATION, None, message))
            except BaseException as exc:
                loop.repairs[self.port] = None
                self.port.note_write_error(exc)
                raise
        finally:
            loop.thread = outer

    def send_frame(self, frame: Frame) -> None:
        """Send a notification that was encoded before, also to others."""
        try:
            self.channel.put([*frame])
        except BaseException as exc:
            self.loop.repairs[self.port] = None
            self.port.note_write_error(exc)
            raise

    # -- what is due

    def on_time(self, now: float) -> None:
        """Fail the requests whose deadline has passed, and close if an ended stream was written to long enough."""
        loop = self.loop
        if self._writes_until is not None and now >= self._writes_until:
            loop.mark(self.dispatcher)
        requests = self.requests
        if now >= requests.due and self.is_open:
            arrived = read_replies(self, requests.due)
            if requests.expire(now, arrived):
                loop.progress += 1
            elif arrived and self.dispatcher.has_work:
                loop.mark(self.dispatcher)
            elif arrived:  # what stands before these has to wait
                loop.progress += self.dispatcher.settle_replies()
        else:
            requests.update_due()
        self._set_timer(now)

    def update_timer(self) -> None:
        """Find out anew when something is due: what a timer was set for may have been answered."""
        self.dispatcher.responder.update_timer()
        if self.requests.due < math.inf:
            self.requests.skip_dropped()
            self._set_timer(-math.inf)

    def _set_timer(self, done: float) -> None:
        """Set the timer to what is due next; what was due at ``done`` or before is done."""
        if self.is_open:  # a done callback may have closed it, or read its end
            writes_until = self._writes_until
            due = math.inf if writes_until is None or writes_until <= done else writes_until
            self.loop.set_timer(self, min(due, self.requests.due))

    # -- closing

    @property
    def is_writing_out(self) -> bool:
        """Whether an ended stream is kept for what is queued: the other side may still read, though it writes no more."""
        until = self._writes_until
        return until is not None and self.outbox.queued_bytes > 0 and self.loop.clock() < until

    def start_writing_out(self) -> None:
        """Start the time for which an ended stream is kept, unless it has started or nothing is queued."""
        if self._writes_until is None and self.outbox.queued_bytes:
            self.logs_loss = True
            until = self.loop.clock() + FLUSH_BOUND
            self.loop.set_timer(self, min(until, self.requests.due))
            self._writes_until = until  # last, so that an interrupted call is made again

    def close(self, release: bool = False, seconds: float | None = None) -> None:
        """Close, or release the streams to their owner; see ``Session.close`` and ``IpcPeer.remove_session``.

        Args:
            release: Release the streams.
            seconds: How long all of it may take; None for the usual bounds.
        """
        loop = self.loop
        closing = self._closing
        if loop.forked or (closing is not None and closing.is_done and closing.teardown is None):
            return
        outer = loop.enter()
        try:
            if seconds is not None:
                self.hurry(monotonic() + seconds)
            self._release = release
            reason = self._own_reason()
            if self._closing is None:
                try:
                    if self.is_open:
                        begin([self], reason)
                    loop.repairs.pop(self, None)  # of an interrupted call, or write_out() would close it at once
                    seconds = None if self.due is None else self.due - monotonic()
                    write_out(loop, [self], flush_bound(seconds, [self]))
                finally:  # after an interruption the next turn goes on with closing
                    loop.repairs[self] = None  # only now: earlier, a turn inside write_out() would close it at once
            self.close_now(reason, handlers=False)
            if self._closing is not None:
                self._closing.wait()  # before the on_close handlers, which run after a child's last words
            self.close_now(reason)
        finally:
            loop.thread = outer

    def _own_reason(self) -> StreamClosedError:
        what = "removed the session from its peer" if self._release else "closed the session"
        return StreamClosedError(f"this side {what} ({self.name})")

    def hurry(self, due: float) -> None:
        """Have closing, which may have begun, done by a time of ``monotonic()``."""
        self.due = due
        if self._closing is not None:
            self._closing.hurry()

    def stop(self) -> None:
        """Take no more messages. The caller fails what is pending next; see ``begin`` in ``closing.py``."""
        self.is_open = False

    def close_now(self, reason: StreamClosedError, handlers: bool = True) -> None:
        """Close at once: what is queued is dropped, what is pending fails, the streams are closed or released.

        Args:
            reason: Why, if it is not being closed already.
            handlers: Run ``on_close`` handlers. Otherwise another call does that.
        """
        if self._closing is None:
            closing = Closing(self, self._release)
            self.loop.repairs[self] = None
            # atomic: no calls
            if self._closing is None:  # a turn beneath may have closed it
                self.is_open = False
                self.reason = reason
                self._closing = closing

        self._closing.go_on(handlers)

    def repair(self) -> None:
        """Do what an interruption has left undone."""
        if self._closing is None:
            self.logs_loss = True
            self.close_now(self._own_reason())
        else:
            self._closing.go_on()

    @property
    def teardown(self) -> Teardown | None:
        """What is left to be done after ``close_now``, or None. ``close`` waits for it, or leaves it to turns."""
        return None if self._closing is None else self._closing.teardown

    def close_streams(self) -> None:
        """Close or release the streams, and leave all else undone: nobody has the peer any more."""
        if self._release:
            self.channel.release()
            return
        teardown = self.channel.close()
        if teardown is not None:
            teardown.abandon()

    def abandon(self) -> None:
        """Close the copies of the descriptors in a forked process."""
        reason = StreamClosedError("this is a forked copy of the session; make a new IpcPeer in this process")
        if self._closing is None:
            # atomic: no calls
            self.is_open = False
            self.reason = reason

        self.channel.abandon()

    def short(self, reason: BaseException) -> str:
        """Return a reason in a few words: without what its text repeats of the name, and what a child has written."""
        text = describe(reason).partition(": ")[2]  # whose str() may fail
        process = self.channel.process
        if process is not None:
            _, found, rest = text.partition(f"(pid {process.pid}) ")
            text = rest if found else text
        text = text.partition("\n")[0].partition("; ")[0].replace(f" ({self.name})", "")
        return text if len(text) <= 100 else text[:97] + "..."
