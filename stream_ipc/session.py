"""One conversation with one other process: requests and their replies, notifications, handlers.

Knows its channel, its promises and its handlers. Must not know frames, or what kind of stream there is: descriptors are
numbers that the channel names and the peer watches. The peer says when one is ready, and the session says to the peer
that it has work or has ended.

A message's way: the channel puts it into the inbox; ``_dispatch`` takes it out, in order, and gives it to a promise
or to handlers. What is being dispatched stands in ``_current`` until a handler has been entered, so that an exception
out of a signal handler (``KeyboardInterrupt``) can lose nothing; see the note in ``transports/stream.py``.
"""

from __future__ import annotations

import heapq
import math
import sys
from _thread import get_ident
from collections import deque
from contextlib import contextmanager
from weakref import ref

from . import log
from .errors import (
    FrameTooLargeError,
    InvalidStreamError,
    IpcError,
    RequestTimeoutError,
    SerializationError,
    StreamClosedError,
    article,
    describe,
)
from .handlers import Handler, HandlerList, name_of
from .messages import NOTIFICATION, REQUEST, RESPONSE, ErrorMessage, Message, RequestEnvelope, ResponseEnvelope
from .poller import READ, WRITE
from .promise import DEFAULT, ResponsePromise, check_timeout
from .registry import type_info
from .transports.base import Channel, Ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Tuple, Type, TypeVar, Union, overload

    from .peer import IpcPeer

    # What handlers are to a type checker, which cannot be told that the first parameter is some class of messages: a
    # bound must not be generic, and without type variables of their own the decorators return the handler's own type.
    EventHandler = Union[Callable[[Any], Any], Callable[[Any, "Session"], Any]]
    RequestHandler = Union[Callable[[Any], Optional[Message]], Callable[[Any, "Session"], Optional[Message]]]
    CloseHandler = Callable[["Session"], Any]

    M = TypeVar("M", bound=Message)
    EventH = TypeVar("EventH", bound=EventHandler)
    RequestH = TypeVar("RequestH", bound=RequestHandler)
    CloseH = TypeVar("CloseH", bound=CloseHandler)

    PromiseRef = ref[ResponsePromise[Any]]
else:
    PromiseRef = ref

__all__ = ["Session"]

# Above this many queued bytes a send waits until the queue is below it again, and requests of this session wait in the
# inbox, because their replies would only add to the queue.
HIGH_WATER = 1024 * 1024

# A session whose inbox holds more is not read from until it has been worked off...
_INBOX_SMALL = 64  # messages: below this nobody looks, because the next tick dispatches them
INBOX_COUNT = 4096  # messages
INBOX_BYTES = 4 * 1024 * 1024
# ...but while nothing can be worked off, because a send waits for its queue to drain or because handlers are nested too
# deeply, reading must go on, or two sides that flood each other would wait for each other. It is still bounded.
INBOX_BYTES_HARD = 256 * 1024 * 1024
INBOX_COUNT_HARD = 500_000

_AHEAD = range(64)  # replies that a wait settles behind its own at most

FLUSH_BOUND = 1.0  # seconds that close() gives to what is still queued


# What a session is doing. Texts and no enum, whose class takes 0.14 ms to make.
OPEN, CLOSING, CLOSED = "open", "closing", "closed"
FORKED = "forked"  # this is the copy in a forked process

ENVELOPES = frozenset({RequestEnvelope, ResponseEnvelope})


class _Answer:
    """Work that an interrupted dispatch has left: a reply that is still to be sent."""

    __slots__ = ("id", "reply")

    def __init__(self, id: str, reply: Message) -> None:
        self.id = id
        self.reply = reply


class _Delivery:
    """Work that an interrupted dispatch has left: handlers that have not seen a message yet."""

    __slots__ = ("handlers", "message")

    def __init__(self, message: Message, handlers: Tuple[Handler, ...]) -> None:
        self.message = message
        self.handlers = handlers


class _Opening:
    """Work that comes first in a session that was accepted: who asked for it gets it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[Session], Any]) -> None:
        self.function = function


class _Pending(PromiseRef):
    """A weak reference to the promise of a request that is pending.

    Its callback, and no ``__del__`` of the promise: that would be called for each of them (0.06 us), and this only for the
    few that are dropped before they have settled.
    """

    __slots__ = ("id",)

    id: str


class Session:
    """One conversation with one other process. Made by the ``create_*`` methods and ``connect`` of ``IpcPeer``.

    It owns its streams and closes them. A context manager: leaving closes it. Once it is closed, everything that would
    send or receive raises ``StreamClosedError``, whose text says why. Calls from another thread while one is inside the
    peer, or in a forked copy of the process, are a ``RuntimeError``.

    Attributes:
        name: What texts and logs call it: ``pid 4242``, ``stdio``, ``to 127.0.0.1:80 fd 7``, ``fd 5/6``.
    """

    # With more than 30 attributes an object has a dict of its own, in which each method is looked for first (on 3.11).
    # Slots take 4 % off a round trip. The dict is for what users attach.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_batches",
        "_close_handlers",
        "_closers",
        "_current",
        "_deadlines",
        "_dropped",
        "_end",
        "_ending",
        "_exception_handlers",
        "_failing",
        "_finished",
        "_inbox",
        "_linger",
        "_mark",
        "_message_handlers",
        "_paused",
        "_peer",
        "_pending",
        "_process",
        "_reading",
        "_reason",
        "_receive_into",
        "_received",
        "_receiving",
        "_request_handlers",
        "_scanned",
        "_state",
        "_watched",
    )

    def __init__(self, peer: IpcPeer, channel: Channel, process: Optional[subprocess.Popen[Any]] = None) -> None:
        self._peer = peer
        self.channel = channel  # what it reads from and writes to; for the peer, too
        self._process = process
        self._state = OPEN
        self._pending: Dict[str, Any] = {}  # id: weak reference to the promise
        self.due: float = math.inf  # for the peer: no pending request has an earlier deadline
        self._deadlines: List[Tuple[float, str]] = []  # a heap of deadlines and ids, for expire() only
        self._inbox: Deque[Any] = deque()
        self._current: Any = None
        self._scanned = 0  # how much of the inbox settle_replies has seen
        self._end: Optional[StreamClosedError] = None  # the stream has ended, but not all of it is dispatched
        self._reason: Optional[StreamClosedError] = None  # why it is closed
        self._ending: Optional[Ending] = None  # what is left to be done after the end
        self._closers: Optional[List[Handler]] = None  # on_close handlers that have not run yet
        self._finished = False
        self._failing = False  # the channel has raised something, which stands in the inbox; it is left alone until then
        self._linger: Optional[float] = None  # until when an ended stream is kept for what is still to be written
        self._paused = False  # not read from because the inbox is long
        self._reading = False  # a call is reading, so that a message's constructor may be at work
        self._mark = 0  # received_bytes when the inbox was last empty
        self._watched: Dict[int, int] = {}
        self._batches = 0
        self._receiving = 0  # receive() calls that are waiting
        self._received: Deque[Message] = deque()  # what they will return
        self._message_handlers = HandlerList("on_message", of_messages=True)
        self._request_handlers = HandlerList("on_request", of_messages=True)
        self._exception_handlers = HandlerList("on_exception")
        self._close_handlers = HandlerList("on_close", most=1)
        self._receive_into = channel.receive_into
        self._dropped = self._note_dropped
        channel.changed = self._changed
        self.name: str = channel.describe()  # what reprs, logs and error texts call it

    def __repr__(self) -> str:
        try:
            reason = self._reason or self._end
            why = "" if reason is None else f" ({self._short(reason)})"
            return (
                f"<Session {self.name} {self._state}{why} pending={len(self._pending)}"
                f" inbox={len(self._inbox)} queued={self.channel.queued_bytes}>"
            )
        except Exception:  # half made
            return "<Session>"

    def _short(self, reason: BaseException) -> str:
        """A reason in a few words: without what its text repeats of the name, and what a child has written."""
        text = describe(reason).partition(": ")[2]
        if self._process is not None:
            _, found, rest = text.partition(f"(pid {self._process.pid}) ")
            text = rest if found else text
        text = text.partition("\n")[0].partition("; ")[0].replace(f" ({self.name})", "")
        return text if len(text) <= 100 else text[:97] + "..."

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- what it is

    @property
    def peer(self) -> IpcPeer:
        """The peer that it belongs to."""
        return self._peer

    @property
    def transport(self) -> Any:
        """The transport that it talks over: the one given to ``create_session``, otherwise a ``StreamTransport``."""
        return self.channel.transport

    @property
    def process(self) -> Optional[subprocess.Popen[Any]]:
        """The ``Popen`` of the child process at the other end, or None."""
        return self._process

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent. False as soon as ``close`` begins, or once the end of the stream is dispatched."""
        return self._state is OPEN

    @property
    def queued_bytes(self) -> int:
        """How many bytes wait to be written, because the other side has not read what was sent before."""
        return self.channel.queued_bytes

    # -- sending

    if TYPE_CHECKING:

        @overload
        def request(self, message: Message, timeout: Optional[float] = DEFAULT) -> ResponsePromise[Message]: ...

        @overload
        def request(
            self, message: Message, timeout: Optional[float] = DEFAULT, *, expect: Type[M]
        ) -> ResponsePromise[M]: ...

    def request(
        self, message: Message, timeout: Optional[float] = DEFAULT, *, expect: Type[Any] = Message
    ) -> ResponsePromise[Any]:
        """Send a message that wants a reply. It leaves now, or is queued if the stream is full.

        Blocks only while more than a mark (1 MiB) is queued, at most for ``timeout``, and runs no handlers.

        Args:
            message: The request.
            timeout: Seconds until the reply must be there; by default the peer's, None for no limit.
            expect: The class of the reply; another one is an ``UnexpectedReplyError`` at ``wait()``.

        Returns:
            A promise; its ``wait()`` returns the reply.

        Raises:
            TypeError: ``message`` is no Message, or another argument is of a wrong kind.
            ValueError: ``timeout`` is negative, or the id generator has made an id that cannot be used.
            SerializationError: The message cannot travel. Nothing was sent.
            FrameTooLargeError: It is over the peer's ``max_frame_size``. Nothing was sent.
            StreamClosedError: The session is closed.
            RequestTimeoutError: The queue did not drain in time. Nothing was sent.
        """
        if not isinstance(message, Message) or type(message) in ENVELOPES:
            raise no_message("request", message)
        if expect is not Message and not (isinstance(expect, type) and issubclass(expect, Message)):
            raise TypeError(f"expect must be a message class, not {expect!r:.100}")
        peer = self._peer
        if timeout is DEFAULT:
            timeout = peer.timeout
        else:
            check_timeout(timeout)
        # enter() and leave() in place: 0.2 us less.
        me = get_ident()
        outer = peer.thread
        if outer is None:
            peer.thread = me
        elif outer != me:
            raise peer._refusal()
        try:
            if self._state is not OPEN:
                raise self._closed_error()
            id = peer.id_generator.generate()
            pending = self._pending
            if type(id) is not str or len(id) > 128 or id in pending:
                raise peer._bad_id(id)
            deadline = None
            if timeout is not None:
                deadline = peer.clock() + timeout
                if deadline < self.due:
                    self._note_due(deadline)
            channel = self.channel
            if channel.queued_bytes > HIGH_WATER:
                self._make_room(timeout)
            promise = ResponsePromise(self, id, expect, timeout, deadline)
            # Before the send: the reply may be there at once.
            pending[id] = reference = _Pending(promise, self._dropped)
            reference.id = id
            try:
                channel.post(REQUEST, id, message)
            except BaseException as exc:
                pending.pop(id, None)
                promise.settled = True  # nobody will ever see it
                self._send_failed(exc)
                raise
            return promise
        finally:
            if peer.thread == me:  # not in a fork
                peer.thread = outer
            if peer.wake is not None:
                peer._update_wake()

    def notify(self, message: Message) -> None:
        """Send a message that expects nothing. It leaves now, or is queued if the stream is full.

        Blocks only while more than a mark (1 MiB) is queued, at most for the peer's timeout, and runs no handlers.

        Raises:
            TypeError: ``message`` is no Message.
            SerializationError: The message cannot travel. Nothing was sent.
            FrameTooLargeError: It is over the peer's ``max_frame_size``. Nothing was sent.
            StreamClosedError: The session is closed.
            RequestTimeoutError: The queue did not drain in time. Nothing was sent.
        """
        if not isinstance(message, Message) or type(message) in ENVELOPES:
            raise no_message("notify", message)
        peer = self._peer
        me = get_ident()
        outer = peer.thread
        if outer is None:
            peer.thread = me
        elif outer != me:
            raise peer._refusal()
        try:
            if self._state is not OPEN:
                raise self._closed_error()
            channel = self.channel
            if channel.queued_bytes > HIGH_WATER:
                self._make_room(peer.timeout)
            try:
                channel.post(NOTIFICATION, None, message)
            except (StreamClosedError, InvalidStreamError) as exc:
                self._send_failed(exc)
                raise
        finally:
            if peer.thread == me:
                peer.thread = outer
            if peer.wake is not None:
                peer._update_wake()

    def _send_failed(self, exc: BaseException) -> None:
        """Take note if the stream turns out to be gone."""
        if isinstance(exc, StreamClosedError):
            self._write_failed(exc)
        elif isinstance(exc, InvalidStreamError):
            self._stream_failed(exc)

    def _guarded(self, send: Callable[[Any], None], what: Any) -> None:
        try:
            send(what)
        except (StreamClosedError, InvalidStreamError) as exc:
            self._send_failed(exc)
            raise

    def _make_room(self, timeout: Optional[float]) -> None:
        """Wait until the queue is below the mark, reading but not dispatching meanwhile."""
        channel = self.channel
        if channel.writing:  # what comes in the middle of a write cannot wait for its end
            return
        peer = self._peer
        limit = None if timeout is None else peer.clock() + timeout
        peer._pump(Until(lambda: channel.queued_bytes <= HIGH_WATER or not self._is_writable), limit, dispatch=False)
        if not self._is_writable:
            raise self._closed_error()
        if channel.queued_bytes > HIGH_WATER:
            raise self._stuck_error(timeout)

    def _stuck_error(self, timeout: Optional[float]) -> RequestTimeoutError:
        """The error for a message that could not leave."""
        return RequestTimeoutError(
            f"the message was not sent: {self.channel.queued_bytes} bytes are queued ({self.name}), and the other side"
            f" has not read them within {timeout} s; is it ticking?",
            timeout=timeout,
        )

    @property
    def _is_writable(self) -> bool:
        """Whether it is open and its stream has not ended."""
        return self._state is OPEN and self._end is None

    def _send_encoded(self, frame: List[Any]) -> None:
        """Send a frame that was encoded for this session's serializer."""
        try:
            self.channel.enqueue(frame)  # type: ignore[attr-defined]
        except (StreamClosedError, InvalidStreamError) as exc:
            self._send_failed(exc)
            raise

    @contextmanager
    def batch(self) -> Iterator[Session]:
        """Gather what is sent inside into few large writes.

        It is out at the latest when the block ends or a tick begins. Use it for many small messages in a row. It may be
        nested: the outermost block counts.

        Yields:
            The session.

        Raises:
            StreamClosedError: At the end of the block: the other side is gone.
        """
        peer = self._peer
        channel = self.channel
        peer._check_thread()
        # In one breath:
        peer.corked[self] = None
        self._batches += 1
        channel.corked = True
        try:
            yield self
        finally:
            self._batches -= 1
            if not self._batches:
                channel.corked = False
                outer = peer._enter()
                try:
                    if self._state is OPEN:
                        self._guarded(lambda _: channel.flush(), None)
                    peer.corked.pop(self, None)  # last: until then the next tick flushes
                finally:
                    peer._leave(outer)

    def flush(self, timeout: Optional[float] = None) -> None:
        """Write until nothing is queued. Reads meanwhile, but runs no handlers.

        What is written is with the system; whether the other side has read it is not known.

        Args:
            timeout: Seconds; None waits without limit.

        Raises:
            TimeoutError: The other side has not read it in time. It is still queued.
            StreamClosedError: The other side is gone.
        """
        check_timeout(timeout)
        outer = self._peer._enter()
        try:
            if self._state is CLOSED:
                raise self._closed_error()
            self._guarded(lambda _: self.channel.flush(), None)
            channel = self.channel
            if not channel.queued_bytes:
                return
            if channel.writing:
                raise RuntimeError(
                    f"flush() was called in the middle of a write of the same session ({self.name}), by a signal handler or"
                    " a finalizer; nothing more can be written until it returns"
                )
            limit = None if timeout is None else self._peer.clock() + timeout
            self._peer._pump(Until(lambda: not channel.queued_bytes or not self._is_writable), limit, dispatch=False)
            if channel.queued_bytes:
                raise TimeoutError(
                    f"{channel.queued_bytes} bytes are still queued ({self.name}): the other side has not read them within"
                    f" {timeout} s; is it ticking?"
                )
            if not self._is_writable:
                raise self._closed_error()
        finally:
            self._peer._leave(outer)

    # -- receiving

    def receive(self, timeout: Optional[float] = None) -> Message:
        """Tick the whole peer until the next notification arrives, so handlers run. ``on_message`` handlers see it too.

        Only what arrives during a call is returned: what a tick or a ``wait()`` has dispatched before is not kept. Text
        of a child, and errors of decoding, are notifications, too: ``LogMessage`` and ``ErrorMessage``.

        Args:
            timeout: Seconds; 0 takes what is there; None waits without limit.

        Returns:
            The notification.

        Raises:
            TimeoutError: Nothing came in time.
            StreamClosedError: The session is closed.
            Exception: What an ``on_message`` handler has raised. The message is returned by the next call.
        """
        check_timeout(timeout)
        peer = self._peer
        peer._check_thread()
        received = self._received
        if not received:
            if self._state is not OPEN:
                raise self._closed_error()
            self._receiving += 1
            try:
                limit = None if timeout is None else peer.clock() + timeout
                peer._pump(Until(lambda: bool(received) or self._state is not OPEN), limit)
            finally:
                self._receiving -= 1
        if received:
            # In one breath:
            message = received[0]
            del received[0]
            return message
        if self._state is not OPEN:
            raise self._closed_error()
        raise TimeoutError(f"no notification within {timeout} s ({self.name})")

    def tick(self, timeout: Optional[float] = 0.0) -> int:
        """One turn over this session only: write what is queued, read what is there, dispatch it to handlers.

        Args:
            timeout: 0 polls and returns at once; a number waits at most so many seconds for something to happen; None
                waits until something happens.

        Returns:
            How many messages were dispatched.

        Raises:
            StreamClosedError: The session is closed.
            Exception: What an ``on_message`` handler has raised. The next tick goes on behind that message.
        """
        if timeout is not None and timeout != 0:
            check_timeout(timeout)
        if self._state is CLOSED:
            if not self._finished:
                self._catch_up()
            raise self._closed_error()
        return self._peer._turn(timeout, self)

    # -- handlers

    def on_message(self, handler: EventH) -> EventH:
        """Register a handler for notifications; usable as a decorator.

        All of them see each message, in the order of registration. If one raises, the others still run; then the error
        comes out of the call that was ticking.

        Args:
            handler: Takes ``(message)`` or ``(message, session)``. If its first parameter is annotated with a message
                class, it is called for that class only.

        Returns:
            The handler.

        Raises:
            TypeError: It takes other arguments, or its annotation cannot be resolved.
        """
        self._message_handlers.add(handler, sys._getframe(1))
        return handler

    def on_request(self, handler: RequestH) -> RequestH:
        """Register a handler for requests; usable as a decorator.

        They are asked in the order of registration; the first that returns a message answers. None passes on to the
        next. What a handler raises becomes the requester's ``RemoteError``.

        Args:
            handler: Takes ``(message)`` or ``(message, session)``; see ``on_message``.

        Returns:
            The handler.

        Raises:
            TypeError: It takes other arguments, or its annotation cannot be resolved.
        """
        self._request_handlers.add(handler, sys._getframe(1))
        return handler

    def on_exception(self, handler: EventH) -> EventH:
        """Register a handler for failures of the stream; usable as a decorator.

        After them the session closes, unless one returns False. Without any, failures are logged. That the other side is
        gone is no failure: see ``on_close``. What a handler raises is logged.

        Args:
            handler: Takes ``(error)`` or ``(error, session)``. If its first parameter is annotated with a class of
                exceptions, it is called for that class only.

        Returns:
            The handler.

        Raises:
            TypeError: It takes other arguments, or its annotation cannot be resolved.
        """
        self._exception_handlers.add(handler, sys._getframe(1))
        return handler

    def on_close(self, handler: CloseH) -> CloseH:
        """Register a handler for the end of the session, whoever ends it; usable as a decorator.

        It runs once, when pending requests have failed and the streams are released. What it raises is logged. One that
        is registered after the end never runs: look at ``is_open`` then.

        Args:
            handler: Takes ``(session)``.

        Returns:
            The handler.

        Raises:
            TypeError: It takes other arguments.
        """
        self._close_handlers.add(handler, sys._getframe(1))
        return handler

    def off_message(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_message``; takes effect at once, also inside a handler.

        Raises:
            ValueError: It is not registered.
        """
        self._message_handlers.remove(handler)

    def off_request(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_request``; takes effect at once, also inside a handler.

        Raises:
            ValueError: It is not registered.
        """
        self._request_handlers.remove(handler)

    def off_exception(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_exception``; takes effect at once, also inside a handler.

        Raises:
            ValueError: It is not registered.
        """
        self._exception_handlers.remove(handler)

    def off_close(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_close``; takes effect at once, also inside a handler.

        Raises:
            ValueError: It is not registered.
        """
        self._close_handlers.remove(handler)

    # -- closing

    def close(self) -> None:
        """Close the session. A second call does nothing; allowed inside a handler. Runs ``on_close`` handlers, no others.

        What is queued is written first, for at most a second; then what is pending fails with ``StreamClosedError``, and
        the streams are released and closed. A child process that the peer started is ended and reaped: its stdin is
        closed, and if it does not exit, it is terminated and then killed. That takes up to 6 s in the worst case. A TCP
        connection on which the other side is still talking is closed by a later tick, at most a second later.
        """
        peer = self._peer
        if peer._is_forked:
            self._finish_forked()
            return
        if self._finished and self._ending is None:
            return
        outer = peer._enter()
        try:
            self._flush_bounded()
            self._finish(StreamClosedError(self.channel.closed_text()))
            if self._ending is not None:
                if not self._ending.background:
                    peer._finish_endings([self._ending])
                self._ending = None
        finally:
            peer._leave(outer)

    def _begin_close(self) -> None:
        """Stop taking messages; write what is queued as far as it goes."""
        self._state = CLOSING
        self.channel.corked = False
        self._flush()

    def _flush_bounded(self) -> None:
        """Begin to close: write what is queued, within a short bound."""
        channel = self.channel
        try:
            if self._state is OPEN:
                self._begin_close()
            if self._state is CLOSING and channel.queued_bytes and not channel.writing:
                drained = Until(lambda: not channel.queued_bytes)
                self._peer._pump(drained, self._peer.clock() + FLUSH_BOUND, dispatch=False)
        except BaseException:  # an interruption: the next tick goes on with closing
            self._reason = self._reason or StreamClosedError(channel.closed_text())
            self._peer.unfinished[self] = None
            raise

    def _finish(self, reason: StreamClosedError, release: bool = False) -> None:
        """The end: every step is taken, also if the one before failed.

        A call that is interrupted is made again by the next tick, so a step that was taken does nothing the second
        time. What takes time is left to the peer.

        Args:
            reason: What pending requests fail with.
            release: Leave the streams open.
        """
        if self._finished:
            return
        peer = self._peer
        peer.unfinished[self] = None
        self._state = CLOSED
        reason = self._reason = self._reason or reason
        for fd in self._watched:
            peer._unwatch(self, fd)
        self._watched = {}
        peer._discard(self)
        try:
            if release:
                self.channel.release()
            elif self._ending is None:
                self._ending = self.channel.end()
            if self._ending is not None:
                peer._add_ending(self._ending)
        except Exception:
            log.error("closing the streams of %r failed", self, exc_info=True)
        self._inbox.clear()
        self._current = None
        self._fail_pending(reason)
        if self._closers is None:
            log.debug("session %s closed: %s", self.name, self._short(reason))
            self._closers = list(self._close_handlers.of(Session))
        closers = self._closers
        while closers:
            handler = closers[0]
            del closers[0]  # entered once, even if it closes the session again or is interrupted
            try:
                if handler.active:
                    handler.function(self)
            except Exception:
                log.error("on_close handler of %r failed", self, exc_info=True)
        self._finished = True
        peer.unfinished.pop(self, None)

    def _catch_up(self) -> None:
        """Do what an interruption has left undone."""
        if self._reason is not None:
            self._finish(self._reason)
        else:
            self._watched = dict.fromkeys(self._watched, 0)  # whatever is watched now
            self._changed()
            self._peer.unfinished.pop(self, None)

    def _fail_pending(self, reason: StreamClosedError) -> None:
        """No reply will come any more."""
        for pending in tuple(self._pending.values()):
            promise = pending()
            if promise is not None:
                promise._fail(reason)
        self._pending.clear()
        self._deadlines.clear()

    def _note_forked(self) -> None:
        """This is the copy in a forked process."""
        if self._state is not CLOSED:
            self._state = FORKED

    def _finish_forked(self) -> None:
        # A forked copy: the other process has the session. Only our copies of the descriptors go.
        if self._state is not CLOSED:
            self._state = CLOSED
            self._reason = StreamClosedError("this is a forked copy of the session; make a new IpcPeer in this process")
            self.channel.abandon()

    def _closed_error(self) -> StreamClosedError:
        reason = self._reason or self._end
        text = f"is being closed ({self.name})" if reason is None else f"is closed: {reason}"
        error = StreamClosedError(f"the session {text}")
        error.__cause__ = None if reason is None else reason.__cause__
        return error

    # -- for promises

    def _forget(self, id: str) -> None:
        """Nobody waits for that reply any more."""
        self._pending.pop(id, None)

    def _note_dropped(self, reference: Any) -> None:
        """The promise of a pending request is gone, and with this what a late reply would look for."""
        id: str = reference.id
        if self._pending.get(id) is reference:
            self._pending.pop(id, None)  # it may be empty by now

    def _note_due(self, deadline: float) -> None:
        """A request has an earlier deadline than all that are pending."""
        self.due = deadline
        if deadline < self._peer.due:
            self._peer.due = deadline

    def _expire(self, now: float) -> int:
        """Give up the requests whose deadline has passed, and find out when the next one is due.

        Returns:
            How many that were.
        """
        self._note_deadlines()
        count = 0
        due = math.inf
        deadlines = self._deadlines
        while deadlines:
            entry = deadlines[0]
            promise = self._whose(entry)
            if promise is not None:
                if entry[0] > now:
                    due = entry[0]
                    break
                promise._expire()
                count += 1
            if deadlines and deadlines[0] is entry:  # interrupted before this, it is looked at again
                heapq.heappop(deadlines)
        self.due = due
        return count

    def _whose(self, entry: Tuple[float, str]) -> Optional[ResponsePromise[Any]]:
        pending = self._pending.get(entry[1])
        promise: Optional[ResponsePromise[Any]] = None if pending is None else pending()
        # An id may have been used again since.
        return promise if promise is not None and not promise.settled and promise.deadline == entry[0] else None

    def _note_deadlines(self) -> None:
        """Sort in the requests that came since the last time: here, because most are answered before anybody asks."""
        fresh: Optional[List[Any]] = None
        while fresh is None:
            fresh = []
            try:
                for pending in reversed(self._pending.values()):  # those that came last
                    promise = pending()
                    if promise is not None:
                        if promise._noted:
                            break
                        fresh.append(promise)
            except RecursionError:
                raise
            except RuntimeError:  # one was dropped meanwhile, which takes it out of the table
                fresh = None
        for promise in reversed(fresh):
            if promise.deadline is not None:
                heapq.heappush(self._deadlines, (promise.deadline, promise.id))
            promise._noted = True
        if len(self._deadlines) > 2 * len(self._pending) + 64:  # most are answered
            left = [entry for entry in self._deadlines if self._whose(entry) is not None]
            heapq.heapify(left)
            self._deadlines = left

    def _silence_text(self) -> str:
        """What probably happened if no reply came."""
        channel = self.channel
        # What a serializer knows of the usual other side: PHP answers less often than we do.
        hint: str = getattr(getattr(channel.transport, "serializer", None), "silence_hint", "")
        if self._peer._is_starving:
            return (
                "; handlers that wait are nested so deeply that requests which came meanwhile had to wait: the reply may"
                " depend on one of them"
            )
        if channel.received_bytes > channel.text_bytes:
            return hint
        return (
            "; nothing has ever come from the other side (is it ticking, does it use the same serializer, does it know the"
            f" class of the request?){hint}"
        )

    # -- for the peer: input and output

    def _changed(self) -> None:
        """The channel is to be watched differently."""
        if self._state is CLOSED:
            return
        channel = self.channel
        peer = self._peer
        wanted: Dict[int, int] = {}
        try:
            reading = self._end is None and not self._failing
            if reading and not self._paused:
                wanted = dict.fromkeys(channel.read_fds(), READ)
            fd = channel.output_fd()
            by_time = (reading and (channel.volatile or channel.poll_interval is not None)) or self._linger is not None
        except Exception as exc:  # of somebody's own transport
            self._stream_failed(exc)
            return
        if fd is not None:  # also when the other side has stopped writing: it may still read
            wanted[fd] = wanted.get(fd, 0) | WRITE
        watched = self._watched
        if wanted != watched:
            self._watched = dict.fromkeys((*watched, *wanted), 0)  # unknown, until all is done
            for fd in watched:
                if fd not in wanted:
                    peer._unwatch(self, fd)
            for fd, events in wanted.items():
                if watched.get(fd) != events:
                    try:
                        peer._watch(self, fd, events)
                    except OSError as exc:
                        self._stream_failed(InvalidStreamError(f"descriptor {fd} cannot be waited for: {exc}"))
                        return
            self._watched = wanted
        peer._set_interval(self, by_time, channel.rest if self._linger is None else 0.0)

    def _begin_with(self, on_session: Callable[[Session], Any]) -> None:
        """Give the session to a function before anything else is dispatched."""
        self._inbox.append(_Opening(on_session))
        self._peer.work[self] = None

    def _start(self) -> None:
        """Begin to be watched."""
        self._changed()

    def _interval(self) -> float:
        """In how many seconds to look though no descriptor is ready."""
        if self._linger is not None:
            # Once it is over, that is work for dispatch, which a wait without dispatching must not be kept awake by.
            return math.inf if self in self._peer.work else max(0.0, self._linger - self._peer.clock())
        if self._failing or self._reading:
            return math.inf
        if self.channel.volatile:
            self._changed()  # its answers may be others now
        try:
            interval = self.channel.poll_interval
        except Exception:
            return 0  # reported by _changed
        return math.inf if interval is None else interval

    def _look(self) -> float:
        """Look, though no descriptor is ready.

        Returns:
            For how many seconds that need not be done again.
        """
        if self._linger is not None:
            if not self._lingers():
                self._peer.work[self] = None
        elif not self._paused and self._interval() != math.inf:
            self._read(-1)
            return self.channel.rest if self._linger is None else 0.0
        return 0.0

    def _ready(self, fd: int, events: int) -> None:
        """A descriptor is ready in some way."""
        if events != READ and self._state is not CLOSED:
            try:
                self._flush()
            except BaseException:
                self._peer.unfinished[self] = None
                raise
        if events != WRITE:
            self._read(fd)

    def _read(self, fd: int) -> None:
        """A descriptor is readable, or (-1) it is time to look."""
        if self._end is not None or self._state is CLOSED:
            return
        if self._reading:
            # A message's constructor, a finalizer or a signal handler waits for something. What is being read cannot be
            # read once more beneath it, and its descriptor must not keep that wait awake.
            self._set_paused(True)
            return
        try:
            self._reading = True
            self._receive_into(self._inbox, fd)
        except StreamClosedError as exc:
            # In one breath: the channel says it only once.
            self._end = exc
            self._peer.work[self] = None
            self._changed()
        except Exception as exc:
            self._stream_failed(exc)
        except BaseException:  # an interruption: what was read may not be decoded yet, and nothing else would tell
            self._peer.unfinished[self] = None
            self._peer.work[self] = None
            self.channel.note_interrupted()
            raise
        finally:
            self._reading = False
        if self._paused:
            self._update_reading()
        self._peer.work[self] = None

    def _limit_reading(self) -> None:
        """Called before more is read though there is something in the inbox."""
        if len(self._inbox) > _INBOX_SMALL or self._peer.starving or self._paused:
            self._update_reading()

    def _update_reading(self) -> None:
        """Stop reading while the inbox is long, go on when it is not."""
        if self._reading:
            return
        paused = False
        inbox = self._inbox
        if inbox:
            size = self.channel.received_bytes - self._mark
            if self._peer.starving or self.channel.queued_bytes:
                paused = size > INBOX_BYTES_HARD or len(inbox) > INBOX_COUNT_HARD
            else:
                paused = len(inbox) > INBOX_COUNT or size > INBOX_BYTES
        self._set_paused(paused)

    def _set_paused(self, paused: bool) -> None:
        if paused != self._paused:
            self._paused = paused
            self._peer._set_paused(self, paused)
            self._changed()

    def _flush(self) -> None:
        try:
            self.channel.flush()
        except StreamClosedError as exc:
            self._write_failed(exc)
        except Exception as exc:
            self._stream_failed(exc)
        if not self.channel.queued_bytes:
            self._peer.happenings += 1
            if self._inbox:
                self._peer.work[self] = None  # requests may have waited for this
        if self._paused:
            self._update_reading()

    def _flush_corked(self) -> None:
        """What a batch has gathered leaves when a tick begins."""
        if self._state is OPEN:
            self._flush()

    def _write_failed(self, exc: StreamClosedError) -> None:
        """The other side is gone, but what it had written before is still to be read."""
        if self._end is None and self._state is not CLOSED:
            self.channel.give_up()
            if self._reading:  # by a call beneath this one, which goes on to the end
                return
            self.channel.drain(self._inbox)
            self._stream_ended(exc)

    def _stream_ended(self, exc: StreamClosedError) -> None:
        self._peer.work[self] = None
        if self._end is None:
            self._end = exc
            self._changed()

    def _stream_failed(self, exc: Exception) -> None:
        if self._failing:  # it is known, and waits to be reported
            return
        self._failing = True
        if isinstance(exc, InvalidStreamError):
            exc.session = self
        self._inbox.append(exc)
        self._peer.work[self] = None
        self._changed()

    def _find_invalid(self) -> None:
        """Look for what no poller tells: a stream that its owner closed, and what interruptions have left.

        Most of the latter are mended where they happen; this is for the one that comes while another is being mended.
        """
        if self._state is not OPEN or self._failing or self._reading or self._inbox:
            return
        channel = self.channel
        if self._end is None:
            text = channel.find_invalid()
            if text is not None:
                self._stream_failed(InvalidStreamError(text))
                return
            if channel.has_unread:
                channel.note_interrupted()
            channel.trim()
        if channel.queued_bytes and not channel.corked:
            self._flush()
        self._changed()

    # -- for the peer: dispatch

    @property
    def _has_work(self) -> bool:
        """Whether ``_dispatch`` has something to do."""
        if self._state is not OPEN:
            return False
        inbox = self._inbox
        if self._end is not None:
            return bool(inbox) or not self._lingers()
        return bool(inbox) and (self.channel.queued_bytes <= HIGH_WATER or type(inbox[0]) is not RequestEnvelope)

    @property
    def _backlog(self) -> int:
        """How many messages wait to be dispatched, and the end of the stream."""
        return len(self._inbox) + 2

    def _dispatch(self, turns: int, until: Any) -> int:
        """Dispatch messages, and the end of the stream behind them.

        Args:
            turns: How many at most; 0 for those that are there now. What nested ticks dispatch meanwhile counts too:
                otherwise a flood could keep the outer one from ever returning.
            until: Something with an attribute ``settled`` at which to stop, or None.

        Returns:
            How many messages that was.
        """
        channel = self.channel
        inbox = self._inbox
        peer = self._peer
        self._scanned = 0
        count = 0
        by_class = self._message_handlers.by_class
        goal = peer.turns + (turns or len(inbox) + 2)
        try:
            while self._state is OPEN:
                if not inbox:
                    if self._end is not None and not self._lingers():
                        self._finish_ended()
                    break
                if channel.queued_bytes > HIGH_WATER and type(inbox[0]) is RequestEnvelope and self._end is None:
                    return count  # its reply would only add to the queue
                # In one breath:
                self._current = message = inbox[0]
                del inbox[0]
                peer.turns += 1
                cls = type(message)
                if cls is ResponseEnvelope:
                    count += 1
                    self._settle(message)
                    self._current = None
                elif cls is RequestEnvelope:
                    count += 1
                    self._serve(message)
                elif cls in by_class or isinstance(message, Message):
                    count += 1
                    handlers = by_class[cls] if cls in by_class else self._message_handlers.of(cls)
                    if len(handlers) == 1 and not self._receiving:
                        # What _deliver does if nobody comes after the first: a flood is a third faster.
                        handler = handlers[0]
                        if handler.takes_both:
                            self._current = None
                            handler.function(message, self)
                        else:
                            self._current = None
                            handler.function(message)
                    else:
                        self._deliver(message, handlers, True)
                else:
                    count += self._resume(message)
                if peer.turns >= goal:
                    break
                if until is not None and until.settled:
                    # Replies that stand next are settled on the way, which runs no handler: with many requests under way,
                    # whoever waits for one after the other waits once for all of these (75,700 instructions for each
                    # request became 69,500, and in a loop of their own it is 900 less again).
                    for _ in _AHEAD:
                        if not inbox or type(inbox[0]) is not ResponseEnvelope:
                            break
                        # In one breath:
                        self._current = message = inbox[0]
                        del inbox[0]
                        peer.turns += 1
                        count += 1
                        self._settle(message)
                        self._current = None
                    break
        except BaseException:
            # What no handler has been entered with goes back: an interruption loses nothing.
            if self._current is not None:
                inbox.appendleft(self._current)
                self._current = None
            raise
        if self._state is CLOSED:
            # By a handler; what an interruption or a read beneath has put back since is nobody's any more.
            inbox.clear()
            peer.work.pop(self, None)
        elif not inbox:
            self._mark = channel.received_bytes
            if self._paused:
                self._update_reading()
            if self._end is None or self._state is not OPEN or self._linger is not None:
                peer.work.pop(self, None)
        return count

    def _settle_replies(self) -> int:
        """Settle the replies in the inbox before their turn: handlers are nested too deeply to run another."""
        inbox = self._inbox
        # From the right, where a deque is quick, and only what came since the last time: the inbox may be long.
        found = [i for i in range(len(inbox) - 1, self._scanned - 1, -1) if _is_reply(inbox[i])]
        for index in reversed(found):
            message = inbox[index]
            if type(message) is ResponseEnvelope:
                self._settle(message)
            else:
                self._undecodable(message)
        for index in found:  # after the last is settled: settling twice is nothing, losing one is
            del inbox[index]
        self._scanned = len(inbox)
        if self._end is not None:
            self._fail_pending(self._end)  # the rest of the end has to wait for its turn
        return len(found)

    def _settle(self, envelope: ResponseEnvelope) -> None:
        # The entry goes last, so that an interrupted call can be made again.
        pending = self._pending
        id = envelope.id
        try:
            reference = pending.get(id)
        except TypeError:  # unhashable, from a serializer that does not check
            reference = None
        promise = None if reference is None else reference()
        if promise is None:
            log.debug("session %s: late reply to request %.128r dropped: nobody waits for it", self.name, id)
            return
        try:
            promise._settle(envelope.response)
        except Exception as exc:  # of the reply's own methods
            promise._fail(exc)
        pending.pop(id, None)

    def _deliver(self, message: Message, handlers: Tuple[Handler, ...], first: bool) -> None:
        if first and self._receiving > len(self._received):
            delivery = _Delivery(message, handlers)
            # In one breath: an interruption comes back to the handlers only.
            self._received += (message,)
            self._current = delivery
        error: Optional[Exception] = None
        index = 0
        try:
            for index, handler in enumerate(handlers):
                if not handler.active:
                    continue
                try:
                    # In one breath with the call: 3.10 looks at signals at a branch, too.
                    if handler.takes_both:
                        self._current = None
                        handler.function(message, self)
                    else:
                        self._current = None
                        handler.function(message)
                except Exception as exc:
                    if error is None:
                        error = exc
                    else:
                        log.error("%r: another on_message handler failed too", self, exc_info=exc)
        except BaseException:
            rest = handlers[index + 1 :]
            if rest and self._current is None:
                self._inbox.appendleft(_Delivery(message, rest))
                self._scanned = 0
                self._peer.work[self] = None
            raise
        self._current = None
        if error is not None:
            raise error

    def _serve(self, envelope: RequestEnvelope) -> None:
        request = envelope.request
        cls = type(request)
        handlers = self._request_handlers.by_class.get(cls)
        reply: Any = None
        sent = -1
        try:
            for handler in self._request_handlers.of(cls) if handlers is None else handlers:
                if not handler.active:
                    continue
                if handler.takes_both:
                    self._current = None
                    reply = handler.function(request, self)
                else:
                    self._current = None
                    reply = handler.function(request)
                if reply is not None:
                    break
            self._current = None
            if not isinstance(reply, Message) or type(reply) in ENVELOPES:
                if reply is not None:
                    raise TypeError(
                        f"the on_request handler {name_of(handler.function)} returned {article(type(reply))}; it must"
                        " return a Message (no envelope), or None to pass the request on"
                    )
                reply = ErrorMessage(f"Unhandled request: {type_info(cls).wire_name}")
            if self._state is OPEN:
                channel = self.channel
                sent = channel.sent
                channel.post(RESPONSE, envelope.id, reply)
            else:
                log.debug("session %s: reply to request %.128r dropped: it is closed", self.name, envelope.id)
        except Exception as exc:
            # Of a handler, or because the reply cannot be sent as it is.
            self._answer(_Answer(envelope.id, ErrorMessage("Error in dispatch", exc)))
            log.debug("session %s: request %.128r was answered with %s", self.name, envelope.id, article(type(exc)))
        except BaseException as exc:
            # If the program goes on, the requester gets his reply at the next tick, or learns what happened; if it ends,
            # he learns that.
            if self._current is None and (sent < 0 or self.channel.sent == sent):
                if not isinstance(reply, Message):
                    reply = ErrorMessage("Error in dispatch", exc)
                self._inbox.appendleft(_Answer(envelope.id, reply))
                self._scanned = 0
                self._peer.work[self] = None
            raise

    def _answer(self, answer: _Answer) -> None:
        """Send a reply; an interruption comes back to it."""
        self._current = answer
        sent = self.channel.sent
        try:
            self._send_reply(answer.id, answer.reply)
        except Exception:
            log.error("%r: no reply to request %.128r could be sent", self, answer.id, exc_info=True)
        except BaseException:
            if self.channel.sent != sent:
                self._current = None
            raise
        self._current = None

    def _send_reply(self, id: str, reply: Message) -> None:
        if self._state is not OPEN:
            log.debug("session %s: reply to request %.128r dropped: it is closed", self.name, id)
            return
        try:
            self.channel.post(RESPONSE, id, reply)
        except (FrameTooLargeError, SerializationError) as exc:
            text = reply.message if isinstance(reply, ErrorMessage) else f"the reply could not be sent: {exc}"
            self._send_error_reply(id, text)
        except StreamClosedError as exc:
            self._write_failed(exc)
        except Exception as exc:
            self._stream_failed(exc)

    def _send_error_reply(self, id: str, text: str) -> None:
        # Cut to fit: in characters, of which each may take several bytes in the payload.
        limit = getattr(self.channel.transport, "max_frame_size", 4096)
        text = text.encode("utf-8", "backslashreplace").decode()
        for length in (len(text), limit // 8, 64, 8):
            shown = text if len(text) <= length else text[:length] + "..."
            try:
                self.channel.post(RESPONSE, id, ErrorMessage(shown))
                return
            except (FrameTooLargeError, SerializationError) as exc:
                error: Exception = exc
            except StreamClosedError as exc:
                self._write_failed(exc)
                return
        log.error("%r: no reply to request %.128r could be sent: %s", self, id, error)

    def _resume(self, item: Any) -> int:
        """What stands in the inbox in place of a message."""
        if type(item) is _Opening:
            self._current = None  # entered once, whatever comes of it
            try:
                item.function(self)
            except Exception:
                self.close()  # nobody has it
                raise
            return 0
        if type(item) is _Answer:
            self._answer(item)
            return 0
        if type(item) is _Delivery:
            self._deliver(item.message, item.handlers, False)
            return 0
        if isinstance(item, SerializationError):
            self._undecodable(item)
            self._current = None
            return 1
        if not isinstance(item, Exception):
            item = SerializationError(
                f"{type(self.transport).__name__}.receive() returned a list with a {type(item).__name__} in it; all must be"
                " Messages"
            )
            self._undecodable(item)
            self._current = None
            return 1
        self._current = None
        self._failed(item)
        return 0

    def _undecodable(self, error: SerializationError) -> None:
        size = "a message" if error.payload_size is None else f"a message of {error.payload_size} bytes"
        log.debug("session %s: %s was refused: %s", self.name, size, error)
        if error.request_id is not None:
            self._answer(_Answer(error.request_id, ErrorMessage(f"the request could not be decoded: {error}")))
        elif error.response_id is not None:
            try:
                pending = self._pending.get(error.response_id)
            except TypeError:  # unhashable, from a serializer that does not check
                return
            promise = None if pending is None else pending()
            if promise is not None:
                promise._fail(error)
            self._pending.pop(error.response_id, None)
        else:
            self._deliver(ErrorMessage(str(error)), self._message_handlers.of(ErrorMessage), True)

    def _failed(self, error: Exception) -> None:
        keep = False
        try:
            # Not what still cannot be used: it would be reported again at once.
            keep = self._report(error) and not (isinstance(error, InvalidStreamError) and self.channel.find_invalid())
        finally:  # also if a handler was interrupted
            if keep:
                self._failing = False
                self._changed()
            if not keep and self._state is not CLOSED:
                self.channel.give_up()
                if self._end is None:
                    text = str(error) if isinstance(error, IpcError) else describe(error)
                    self._end = StreamClosedError(f"the stream failed ({self.name}): {text}")
                    self._end.__cause__ = error
                    self._changed()
                self._peer.work[self] = None

    def _report(self, error: BaseException) -> bool:
        """Tell the on_exception handlers.

        Returns:
            Whether one of them wants the session to stay open.
        """
        handlers = self._exception_handlers.of(type(error))
        if not handlers:
            trace = None if isinstance(error, IpcError) else error
            log.error("%r has no on_exception handler for %s: %s", self, type(error).__name__, error, exc_info=trace)
            return False
        log.debug("session %s: its on_exception handlers get %s: %s", self.name, type(error).__name__, error)
        keep = False
        for handler in handlers:
            if not handler.active:
                continue
            try:
                result = handler.function(error, self) if handler.takes_both else handler.function(error)
                keep = keep or result is False
            except Exception:
                log.error("on_exception handler of %r failed", self, exc_info=True)
        return keep

    def _finish_ended(self) -> None:
        assert self._end is not None
        self._finish(self._end)

    def _lingers(self) -> bool:
        """Whether an ended stream is to be kept a while: the other side may still read, though it writes no more."""
        if not self.channel.queued_bytes:
            return False
        now = self._peer.clock()
        if self._linger is None:
            self._linger = now + FLUSH_BOUND
            self._changed()
        return now < self._linger


class Until:
    """A condition in the form of a promise: ``_pump`` looks at ``settled``."""

    __slots__ = ("_condition",)

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    @property
    def settled(self) -> bool:
        return self._condition()


def _is_reply(item: Any) -> bool:
    return type(item) is ResponseEnvelope or (isinstance(item, SerializationError) and item.response_id is not None)


def no_message(method: str, message: Any) -> TypeError:
    """The error for what cannot be sent."""
    if isinstance(message, type):
        return TypeError(f"{method}() takes a Message, not a class; pass an instance: {message.__name__}(...)")
    if type(message) in ENVELOPES:
        return TypeError(f"{method}() takes a Message, and makes what envelope it needs; pass the message in it")
    return TypeError(
        f"{method}() takes a Message, not {article(type(message))}; derive a class from Message that has a field for it"
    )
