"""One conversation with one other process: its state, and what can be done with it.

Knows its port, its dispatcher and its pending requests, which own the rest. Must not know frames or descriptors.
"""

from __future__ import annotations

import math
from functools import partial

from ..errors import InvalidStreamError, RequestTimeoutError, StreamClosedError, describe
from ..handlers import HandlerList
from ..messages import NOTIFICATION, REQUEST, Message, ResponseEnvelope
from .closing import Closing
from .conditions import Until
from .dispatcher import HIGH_WATER, Dispatcher
from .hints import silence_hint
from .kept import Wanted
from .port import Port
from .replies import Replies

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from ..transports.base import Channel
    from .loop import Loop
    from .replies import Pending

__all__ = ["CLOSED", "CLOSING", "FLUSH_BOUND", "FORKED", "OPEN", "Conversation"]

FLUSH_BOUND = 1.0  # seconds that closing gives to what is still queued

# What a conversation is doing. Texts and no enum, whose class takes long to make.
OPEN, CLOSING, CLOSED = "open", "closing", "closed"
FORKED = "forked"  # this is the copy in a forked process


class Conversation:
    """One conversation.

    Owns its state and the reason why it is closed.

    Args:
        loop: What drives it.
        channel: What it talks over.
        peer: Whose ``timeout`` and ``id_generator`` it uses.
        session: What handlers get.

    Attributes:
        state: ``OPEN``, ``CLOSING``, ``CLOSED`` or ``FORKED``.
        is_open: Whether the state is ``OPEN``.
        reason: Why it is closed, or None.
        dispatcher: Works off its inbox.
        port: Moves its bytes.
        replies: Its pending requests.
        on_close: Handlers of its end.
        name: What texts call it.
    """

    def __init__(self, loop: Loop, channel: Channel, peer: Any, session: Any) -> None:
        self.loop = loop
        self.channel = channel
        self.peer = peer
        self.session = session
        self.state = OPEN
        self.is_open = True
        self.reason: StreamClosedError | None = None
        self.name: str = channel.describe()
        self._generate: Callable[[], Any] = peer.id_generator.generate
        self.replies = Replies(self.name, peer.id_generator, partial(silence_hint, self))
        self.on_close = HandlerList("on_close", most=1)
        self.dispatcher = Dispatcher(self, session)
        self.port = Port(loop, channel, self.dispatcher)
        self.dispatcher.bind()
        self._closing: Closing | None = None
        self._lingers_until: float | None = None  # how long an ended stream is kept for what is still to be written

    @property
    def is_writable(self) -> bool:
        """Whether it is open and its stream has neither ended nor been closed by its owner."""
        return self.is_open and self.channel.ended is None and self.port.invalid is None

    def closed_error(self) -> StreamClosedError | InvalidStreamError | RuntimeError:
        """Return the error for a call that comes too late, or in a forked process."""
        if self.loop.forked:
            return self.loop.refusal()
        if self.is_open and self.port.invalid is not None:
            return InvalidStreamError(str(self.port.invalid))
        reason = self.reason or self.channel.ended
        text = f"is being closed ({self.name})" if reason is None else f"is closed: {reason}"
        error = StreamClosedError(f"the session {text}")
        error.__cause__ = None if reason is None else reason.__cause__
        return error

    # -- sending

    def request(self, promise: Any, message: Message, timeout: float | None, expect: type) -> Pending:
        """Send a request; its outcome is for the promise."""
        loop = self.loop
        if loop.thread is not None:
            loop.check_entry()
        if not self.is_open:
            raise self.closed_error()
        replies = self.replies
        deadline = None
        if timeout is not None:
            deadline = loop.clock() + timeout
            if deadline < replies.due:
                loop.set_timer(self, deadline)
                replies.due = deadline
        if self.channel.outbox.queued_bytes > HIGH_WATER:
            self._make_room(timeout)
        # Before the send: the reply may be there at once.
        pending = replies.add(promise, self._generate(), expect, timeout, deadline)
        try:
            self.channel.post(REQUEST, pending.id, message)
        except BaseException as exc:
            pending.settled = 1  # nobody will ever see it
            replies.forget(pending)
            self.port.post_failed(exc)
            raise
        return pending

    def notify(self, message: Message) -> None:
        """Send a notification."""
        if self.loop.thread is not None:
            self.loop.check_entry()
        if not self.is_open:
            raise self.closed_error()
        if self.channel.outbox.queued_bytes > HIGH_WATER:
            self._make_room(self.peer.timeout)
        try:
            self.channel.post(NOTIFICATION, None, message)
        except BaseException as exc:
            self.port.post_failed(exc)
            raise

    def send_frame(self, frame: Any) -> None:
        """Send a notification that was encoded before."""
        try:
            self.channel.post_frame(frame)
        except BaseException as exc:
            self.port.post_failed(exc)
            raise

    def _make_room(self, timeout: float | None) -> None:
        """Wait until the queue is below the mark, reading but not dispatching meanwhile."""
        channel = self.channel
        if channel.writing:  # what comes in the middle of a write cannot wait for its end
            return
        loop = self.loop
        limit = None if timeout is None else loop.clock() + timeout
        self.port.check()
        loop.run(Until(lambda: channel.queued_bytes <= HIGH_WATER or not self.is_writable), limit, dispatch=False)
        if channel.queued_bytes > HIGH_WATER and self.is_writable:
            self.look_for_room(limit)
        if not self.is_writable:
            raise self.closed_error()
        if channel.queued_bytes > HIGH_WATER:
            raise self.stuck_error(timeout)

    def look_for_room(self, limit: float | None) -> None:
        """Write what the other side takes, in case that this process was kept from looking: this is the last look."""
        try:
            self.port.write_on(self._late(limit))
        except (StreamClosedError, InvalidStreamError):
            pass  # the port has taken note of it

    def stuck_error(self, timeout: float | None) -> RequestTimeoutError:
        """Return the error for a message that could not leave."""
        return RequestTimeoutError(
            f"the message was not sent: {self.channel.queued_bytes} bytes are queued ({self.name}), and the other side"
            f" has not read them within {timeout} s; is it ticking?",
            timeout=timeout,
        )

    def begin_batch(self) -> None:
        """Begin to gather what is sent; see ``Port.cork``."""
        self.loop.check_entry()
        self.port.cork()

    def end_batch(self) -> None:
        """Write what was gathered, if no batch is under way any more."""
        outer = self.loop.enter()
        try:
            self.port.uncork()
        finally:
            self.loop.thread = outer

    def flush(self, timeout: float | None) -> None:
        """Write until nothing is queued."""
        loop = self.loop
        outer = loop.enter()
        try:
            if self.state is CLOSED:
                raise self.closed_error()
            self.port.write()
            channel = self.channel
            if self.port.invalid is not None:
                raise self.closed_error()
            if not channel.queued_bytes:
                return
            if channel.writing:
                raise RuntimeError(
                    f"flush() was called in the middle of a write of the same session ({self.name}), by a signal handler or"
                    " a finalizer; nothing more can be written until it returns"
                )
            limit = None if timeout is None else loop.clock() + timeout
            loop.run(Until(lambda: not channel.queued_bytes or not self.is_writable), limit, dispatch=False)
            if channel.queued_bytes and self.is_writable:
                self.look_for_room(limit)
            if not self.is_writable:
                raise self.closed_error()
            if channel.queued_bytes:
                raise TimeoutError(
                    f"{channel.queued_bytes} bytes are still queued ({self.name}): the other side has not read them within"
                    f" {timeout} s; is it ticking?"
                )
        finally:
            loop.thread = outer

    # -- waiting

    def wait(self, pending: Pending, timeout: float | None) -> None:
        """Turn until a request has settled.

        Raises:
            TimeoutError: ``timeout`` has passed, and the request is still pending.
        """
        loop = self.loop
        limit = pending.deadline
        if timeout is not None:
            own = loop.clock() + timeout
            if limit is None or own < limit:
                limit = own
        loop.run(pending, limit)
        if not pending.settled:
            self.look_again((pending,), limit)
        if not pending.settled:
            if pending.deadline is not None and loop.clock() >= pending.deadline:
                self.replies.give_up(pending)
                return
            if timeout is None:
                text = f"request {pending.id} has no reply yet, and its session is just ending"
                raise TimeoutError(f"{text} ({self.name}); wait again later")
            raise TimeoutError(f"{self.replies.silence(pending, timeout)}; it is still pending")

    def _late(self, limit: float | None) -> float:
        """Return how many seconds ago the time was over."""
        return 0.0 if limit is None else self.loop.clock() - limit

    def look_again(self, requests: Iterable[Pending], limit: float | None) -> None:
        """Take the replies that had come in time though this process could not read them: this is the last look.

        Args:
            requests: What is waited for.
            limit: Until when.
        """
        loop = self.loop
        if self.state is not OPEN:
            return
        outer = loop.enter()
        try:
            self.port.catch_up(self._late(limit))
        finally:
            loop.thread = outer
        arrived = self._arrived()
        for pending in requests:
            while not pending.settled and pending.id in arrived:
                turns = loop.turns
                loop.run(pending, loop.clock())  # what stands before it is dispatched first
                if loop.turns == turns and not pending.settled:
                    self.dispatcher.settle_replies()  # what stands before it has to wait
                    break

    def _arrived(self) -> set[Any]:
        """Return the ids of the replies in the inbox."""
        found = set()
        for item in self.dispatcher.inbox:
            id = item.id if type(item) is ResponseEnvelope else getattr(item, "response_id", None)
            if isinstance(id, str):
                found.add(id)
        return found

    def on_time(self, now: float) -> None:
        """Give up the requests whose deadline has passed, and stop lingering."""
        loop = self.loop
        due = math.inf
        if self._lingers_until is not None:
            if now >= self._lingers_until:
                loop.mark(self.dispatcher)
            else:
                due = self._lingers_until
        replies = self.replies
        if now >= replies.due and self.state is OPEN:
            self.port.catch_up(now - replies.due)
            arrived = self._arrived()
            if replies.expire(now, arrived):
                loop.progress += 1
            elif arrived and self.dispatcher.has_work:
                loop.mark(self.dispatcher)
            elif arrived:  # what stands before these has to wait
                loop.progress += self.dispatcher.settle_replies()
        else:
            replies.expire(-math.inf, set())
        loop.set_timer(self, min(due, replies.due))

    def receive(self, timeout: float | None, expect: type) -> Message:
        """Turn until a notification arrives, and return it."""
        loop = self.loop
        kept = self.dispatcher.kept
        outer = loop.enter()
        try:
            limit = None if timeout is None else loop.clock() + timeout
            while True:
                entry = kept.find(expect)
                if entry is not None:
                    self.dispatcher.offer(entry)
                    return kept.take(entry)
                if self.state is not OPEN:
                    raise self.closed_error()
                if not self._await(Wanted(expect), limit):
                    within = "" if timeout is None else f" within {timeout} s"
                    raise TimeoutError(f"no notification{_of(expect)}{within} ({self.name})")
        finally:
            loop.thread = outer

    def _await(self, wanted: Wanted, limit: float | None) -> bool:
        """Turn until a notification is there, or the session is closed; returns whether that is so."""
        loop = self.loop
        waiting = self.dispatcher.kept.waiting
        try:
            waiting.append(wanted)
            loop.run(wanted, limit)
            if not wanted.settled and self.state is OPEN:
                self.port.catch_up(self._late(limit))
                goal = loop.turns + len(self.dispatcher.inbox)
                turns = -1
                while not wanted.settled and turns < loop.turns < goal:
                    turns = loop.turns
                    loop.run(wanted, loop.clock())
        finally:
            if wanted in waiting:
                waiting.remove(wanted)
        return wanted.settled or self.state is not OPEN

    # -- closing

    def lingers(self) -> bool:
        """Return whether an ended stream is kept a while: the other side may still read, though it writes no more."""
        if not self.channel.queued_bytes:
            return False
        now = self.loop.clock()
        if self._lingers_until is None:
            self._lingers_until = now + FLUSH_BOUND
            self.loop.set_timer(self, min(self._lingers_until, self.replies.due))
        return now < self._lingers_until

    def close(self, release: bool = False) -> None:
        """Close, or release the streams to their owner; see ``Session.close`` and ``IpcPeer.remove_session``."""
        loop = self.loop
        closing = self._closing
        if loop.forked:
            self.state = CLOSED
            return
        if closing is not None and closing.is_done and closing.ending is None:
            return
        outer = loop.enter()
        try:
            self._flush_bounded()
            if release:
                self.end(StreamClosedError(f"this side removed the session from its peer ({self.name})"), release)
            else:
                self.end(StreamClosedError(self.channel.closed_text()))
            closing = self._closing
            if closing is not None and closing.ending is not None:
                if not closing.ending.background:
                    loop.finish_endings([closing.ending])
                closing.ending = None
        finally:
            loop.thread = outer

    def begin_close(self) -> None:
        """Stop taking messages; write what is queued as far as it goes."""
        if self.state is OPEN:
            self.channel.corked = False
            # atomic: no calls
            self.state = CLOSING
            self.is_open = False

            self.port.flush()

    def _flush_bounded(self) -> None:
        """Begin to close: write what is queued, within a short bound."""
        channel = self.channel
        loop = self.loop
        if self._closing is not None:
            return
        try:
            self.begin_close()
            if channel.queued_bytes and not channel.writing:
                loop.run(Until(lambda: not channel.queued_bytes), loop.clock() + FLUSH_BOUND, dispatch=False)
        except BaseException:  # an interruption: the next turn goes on with closing
            loop.repairs[self] = None
            raise

    def end(self, reason: StreamClosedError, release: bool = False) -> None:
        """Close at once: what is queued is dropped, what is pending fails, the streams are closed.

        Slow work (reaping a child) is left to the loop.
        """
        if self._closing is None:
            closing = Closing(self, release)
            self.loop.repairs[self] = None
            # atomic: no calls
            self.state = CLOSED
            self.is_open = False
            self.reason = reason
            self._closing = closing
        self._closing.go_on()

    def repair(self) -> None:
        """Do what an interruption has left undone."""
        if self._closing is None:
            self.end(StreamClosedError(self.channel.closed_text()))
        else:
            self._closing.go_on()

    def abandon(self) -> None:
        """Close the copies of the descriptors in a forked process."""
        reason = StreamClosedError("this is a forked copy of the session; make a new IpcPeer in this process")
        if self.state is not CLOSED:
            # atomic: no calls
            self.state = FORKED
            self.is_open = False
            self.reason = reason

            self.channel.abandon()

    def short(self, reason: BaseException) -> str:
        """Return a reason in a few words: without what its text repeats of the name, and what a child has written."""
        text = describe(reason).partition(": ")[2]
        process = getattr(self.channel, "process", None)
        if process is not None:
            _, found, rest = text.partition(f"(pid {process.pid}) ")
            text = rest if found else text
        text = text.partition("\n")[0].partition("; ")[0].replace(f" ({self.name})", "")
        return text if len(text) <= 100 else text[:97] + "..."


def _of(expect: type) -> str:
    return "" if expect is Message else f" of class {expect.__name__}"
