"""One conversation with one other process: requests and their replies, notifications, handlers.

Knows its channel, its promises and its handlers. Must not know descriptors, frames or the poller: the peer says when
the channel has something, and the session says to the peer that it has work or has ended.

A message's way: the channel puts it into the inbox; ``dispatch_next`` takes it out, in order, and gives it to a promise
or to handlers. What is being dispatched stands in ``_current`` until a handler has been entered, so that an exception
out of a signal handler (``KeyboardInterrupt``) can lose nothing; see the note in ``transports/stream.py``.
"""

from __future__ import annotations

import enum
import logging
import sys
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, Iterator, List, Optional, Tuple, Type, TypeVar
from weakref import ref

from .errors import (
    FrameTooLargeError,
    InvalidStreamError,
    IpcError,
    RequestTimeoutError,
    SerializationError,
    StreamClosedError,
)
from .handlers import Handler, HandlerList
from .messages import ErrorMessage, Message, RequestEnvelope, ResponseEnvelope
from .poller import READ, WRITE
from .promise import DEFAULT, ResponsePromise, check_timeout
from .registry import type_info
from .transports.base import Channel, Ending, finish

if TYPE_CHECKING:
    import subprocess

    from .peer import IpcPeer

__all__ = ["Session"]

logger = logging.getLogger("stream_ipc")

M = TypeVar("M", bound=Message)
H = TypeVar("H", bound=Callable[..., Any])

# Above this many queued bytes a send waits until the queue is below it again, and requests of this session wait in the
# inbox, because their replies would only add to the queue.
HIGH_WATER = 1024 * 1024

# A session whose inbox holds more is not read from until it has been worked off...
INBOX_COUNT = 4096  # messages
INBOX_BYTES = 4 * 1024 * 1024
# ...but while nothing can be worked off, because a send waits for its queue to drain or because handlers are nested too
# deeply, reading must go on, or two sides that flood each other would wait for each other. It is still bounded.
INBOX_BYTES_HARD = 256 * 1024 * 1024

FLUSH_BOUND = 1.0  # seconds that close() gives to what is still queued


class State(enum.Enum):
    """What a session is doing."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


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


class Session:
    """One conversation with one other process. Made by the ``create_*`` methods of ``IpcPeer``.

    A context manager: leaving closes it.
    """

    def __init__(self, peer: IpcPeer, channel: Channel, process: Optional[subprocess.Popen[Any]] = None) -> None:
        self._peer = peer
        self._channel = channel
        self._process = process
        self._state = State.OPEN
        self._pending: Dict[str, Any] = {}  # id: weak reference to the promise
        self._inbox: Deque[Any] = deque()
        self._current: Any = None
        self._end: Optional[StreamClosedError] = None  # the stream has ended, but not all of it is dispatched
        self._reason: Optional[StreamClosedError] = None  # why it is closed
        self._paused = False  # not read from because the inbox is long
        self._mark = 0  # received_bytes when the inbox was last empty
        self._heard = False  # whether anything ever came
        self._watched: Dict[int, int] = {}
        self._batches = 0
        self._receivers: List[List[Message]] = []
        self._unreceived: Deque[Message] = deque()
        self._message_handlers = HandlerList("on_message")
        self._request_handlers = HandlerList("on_request")
        self._exception_handlers = HandlerList("on_exception")
        self._close_handlers = HandlerList("on_close")
        channel.changed = self._changed

    def __repr__(self) -> str:
        try:
            return (
                f"<Session {self._channel.describe()} {self._state.value} pending={len(self._pending)}"
                f" inbox={len(self._inbox)} queued={self._channel.queued_bytes}>"
            )
        except Exception:  # half made
            return "<Session>"

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
        """The transport that it talks over."""
        return self._channel.transport

    @property
    def process(self) -> Optional[subprocess.Popen[Any]]:
        """The child process at the other end, or None."""
        return self._process

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return self._state is State.OPEN

    @property
    def queued_bytes(self) -> int:
        """How many bytes wait to be written."""
        return self._channel.queued_bytes

    # -- sending

    def request(
        self, message: Message, timeout: Optional[float] = DEFAULT, *, expect: Type[M] = Message  # type: ignore[assignment]
    ) -> ResponsePromise[M]:
        """Send a message that wants a reply. It leaves now, or is queued if the stream is full.

        Blocks only while more than a mark (1 MiB) is queued, at most for ``timeout``, and runs no handlers.

        Args:
            message: The request.
            timeout: Seconds until the reply must be there; by default the peer's, None for no limit.
            expect: The class of the reply.

        Returns:
            A promise; its ``wait()`` returns the reply.

        Raises:
            TypeError: ``message`` is no Message.
            SerializationError: The message cannot travel. Nothing was sent.
            FrameTooLargeError: It is over the peer's ``max_frame_size``. Nothing was sent.
            StreamClosedError: The session is closed.
            RequestTimeoutError: The queue did not drain in time. Nothing was sent.
        """
        if not isinstance(message, Message):
            raise _no_message("request", message)
        peer = self._peer
        if timeout is DEFAULT:
            timeout = peer.timeout
        else:
            check_timeout(timeout)
        outer = peer.enter()
        try:
            if self._state is not State.OPEN:
                raise self._closed_error()
            id = peer.generate_id()
            if id in self._pending:
                raise ValueError(
                    f"{type(peer.id_generator).__name__}.generate() returned {id!r}, which a pending request has already"
                )
            promise = ResponsePromise(
                self, id, expect, timeout, None if timeout is None else peer.clock() + timeout
            )
            self._pending[id] = ref(promise)  # before the send: the reply may be there at once
            try:
                self._send(RequestEnvelope(id, message), timeout)
            except BaseException:
                self._pending.pop(id, None)
                promise.settled = True  # nobody will ever see it
                raise
            return promise
        finally:
            peer.leave(outer)

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
        if not isinstance(message, Message):
            raise _no_message("notify", message)
        peer = self._peer
        outer = peer.enter()
        try:
            if self._state is not State.OPEN:
                raise self._closed_error()
            self._send(message, peer.timeout)
        finally:
            peer.leave(outer)

    def _send(self, message: Message, timeout: Optional[float]) -> None:
        channel = self._channel
        if channel.queued_bytes > HIGH_WATER:
            self.make_room(timeout)
        self._guarded(channel.send, message)

    def _guarded(self, send: Callable[[Any], None], what: Any) -> None:
        """Send, and take note if the stream turns out to be gone."""
        try:
            send(what)
        except StreamClosedError as exc:
            self._write_failed(exc)
            raise
        except InvalidStreamError as exc:
            self._stream_failed(exc)
            raise

    def make_room(self, timeout: Optional[float]) -> None:
        """Wait until the queue is below the mark, reading but not dispatching meanwhile."""
        channel = self._channel
        peer = self._peer
        limit = None if timeout is None else peer.clock() + timeout
        peer.pump(_Until(lambda: channel.queued_bytes <= HIGH_WATER or not self.is_writable), limit, dispatch=False)
        if not self.is_writable:
            raise self._closed_error()
        if channel.queued_bytes > HIGH_WATER:
            raise RequestTimeoutError(
                f"not sent: {channel.queued_bytes} bytes are queued, and the other side has not read them within"
                f" {timeout} s",
                timeout=timeout,
            )

    @property
    def is_writable(self) -> bool:
        """Whether it is open and its stream has not ended."""
        return self._state is State.OPEN and self._end is None

    def send_encoded(self, frame: List[Any]) -> None:
        """Send a frame that was encoded for this session's serializer."""
        self._guarded(self._channel.enqueue, frame)  # type: ignore[attr-defined]

    @contextmanager
    def batch(self) -> Iterator[Session]:
        """Gather what is sent inside into few large writes.

        It is out at the latest when the block ends or a tick begins. Use it for many small messages in a row.

        Raises:
            StreamClosedError: At the end of the block: the other side is gone.
        """
        self._batches += 1
        self._channel.corked = True
        try:
            yield self
        finally:
            self._batches -= 1
            if not self._batches:
                self._channel.corked = False
                outer = self._peer.enter()
                try:
                    if self._state is State.OPEN:
                        self._guarded(lambda _: self._channel.flush(), None)
                finally:
                    self._peer.leave(outer)

    def flush(self, timeout: Optional[float] = None) -> None:
        """Write until nothing is queued. Reads meanwhile, but runs no handlers.

        Args:
            timeout: Seconds; None waits without limit.

        Raises:
            TimeoutError: The other side has not read it in time. It is still queued.
            StreamClosedError: The other side is gone.
        """
        check_timeout(timeout)
        outer = self._peer.enter()
        try:
            if self._state is State.CLOSED:
                raise self._closed_error()
            self._guarded(lambda _: self._channel.flush(), None)
            channel = self._channel
            if not channel.queued_bytes:
                return
            limit = None if timeout is None else self._peer.clock() + timeout
            self._peer.pump(_Until(lambda: not channel.queued_bytes or not self.is_writable), limit, dispatch=False)
            if channel.queued_bytes:
                raise TimeoutError(f"{channel.queued_bytes} bytes are still queued after {timeout} s")
            if not self.is_writable:
                raise self._closed_error()
        finally:
            self._peer.leave(outer)

    # -- receiving

    def receive(self, timeout: Optional[float] = None) -> Message:
        """Tick until the next notification arrives. ``on_message`` handlers see it too.

        Args:
            timeout: Seconds; None waits without limit.

        Raises:
            TimeoutError: Nothing came in time.
            StreamClosedError: The session is closed.
            Exception: What an ``on_message`` handler has raised. The message is returned by the next call.
        """
        check_timeout(timeout)
        if self._unreceived:
            return self._unreceived.popleft()
        peer = self._peer
        if self._state is not State.OPEN:
            raise self._closed_error()
        slot: List[Message] = []
        self._receivers.append(slot)
        try:
            limit = None if timeout is None else peer.clock() + timeout
            peer.pump(_Until(lambda: bool(slot) or self._state is not State.OPEN), limit)
            if slot:
                return slot.pop()
        finally:
            self._receivers = [other for other in self._receivers if other is not slot]
            self._unreceived.extend(slot)
        if self._state is not State.OPEN:
            raise self._closed_error()
        raise TimeoutError(f"no message within {timeout} s")

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
        check_timeout(timeout)
        if self._state is State.CLOSED:
            raise self._closed_error()
        return self._peer.turn(timeout, self)

    # -- handlers

    def on_message(self, handler: H) -> H:
        """Register a handler for notifications; usable as a decorator.

        All of them see each message, in the order of registration.

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

    def on_request(self, handler: H) -> H:
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

    def on_exception(self, handler: H) -> H:
        """Register a handler for failures of the stream; usable as a decorator.

        After them the session closes, unless one returns False. Without any, failures are logged.

        Args:
            handler: Takes ``(error)`` or ``(error, session)``.

        Returns:
            The handler.

        Raises:
            TypeError: It takes other arguments, or its annotation cannot be resolved.
        """
        self._exception_handlers.add(handler, sys._getframe(1))
        return handler

    def on_close(self, handler: H) -> H:
        """Register a handler for the end of the session, whoever ends it; usable as a decorator.

        It runs once, when pending requests have failed and the streams are released. What it raises is logged.

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
        """Unregister; ``ValueError`` if it is not registered."""
        self._message_handlers.remove(handler)

    def off_request(self, handler: Callable[..., Any]) -> None:
        """Unregister; ``ValueError`` if it is not registered."""
        self._request_handlers.remove(handler)

    def off_exception(self, handler: Callable[..., Any]) -> None:
        """Unregister; ``ValueError`` if it is not registered."""
        self._exception_handlers.remove(handler)

    def off_close(self, handler: Callable[..., Any]) -> None:
        """Unregister; ``ValueError`` if it is not registered."""
        self._close_handlers.remove(handler)

    # -- closing

    def close(self) -> None:
        """Close the session. A second call does nothing; allowed inside a handler.

        What is queued is written first, for at most a second; then what is pending fails with ``StreamClosedError``, and
        the streams are released and closed. A child process that the peer started is ended and reaped: its stdin is
        closed, and if it does not exit, it is terminated and then killed. That takes up to 6 s in the worst case.
        """
        peer = self._peer
        if peer.is_forked:
            self._finish_forked()
            return
        if self._state is not State.OPEN:
            return
        outer = peer.enter()
        try:
            self.begin_close()
            self._flush_bounded()
            ending = self.finish(StreamClosedError(self._channel.closed_text()))
            if ending is not None:
                finish([ending])
        finally:
            peer.leave(outer)

    def begin_close(self) -> None:
        """Stop taking messages; write what is queued as far as it goes."""
        self._state = State.CLOSING
        self._channel.corked = False
        self._flush()

    def _flush_bounded(self) -> None:
        channel = self._channel
        if channel.queued_bytes:
            drained = _Until(lambda: not channel.queued_bytes)
            self._peer.pump(drained, self._peer.clock() + FLUSH_BOUND, dispatch=False)

    def finish(self, reason: StreamClosedError, release: bool = False) -> Optional[Ending]:
        """The end: every step is taken, also if the one before failed.

        Args:
            reason: What pending requests fail with.
            release: Leave the streams open.

        Returns:
            What is left to be done, if that takes time.
        """
        if self._state is State.CLOSED:
            return None
        self._state = State.CLOSED
        self._reason = reason
        ending: Optional[Ending] = None
        try:
            for fd in self._watched:
                self._peer.poller.unwatch(fd)
            self._watched = {}
            self._peer.discard(self)
            if release:
                self._channel.release()
            else:
                ending = self._channel.end()
        except Exception:
            logger.exception("closing the streams of %r failed", self)
        self._inbox.clear()
        self._current = None
        logger.debug("%r: %s", self, reason)
        for pending in tuple(self._pending.values()):
            promise = pending()
            if promise is not None:
                promise.fail(reason)
        self._pending.clear()
        for handler in self._close_handlers.of(Session):
            try:
                handler.function(self)
            except Exception:
                logger.exception("on_close handler of %r failed", self)
        return ending

    def _finish_forked(self) -> None:
        # A forked copy: the other process has the session. Only our copies of the descriptors go.
        if self._state is not State.CLOSED:
            self._state = State.CLOSED
            self._reason = StreamClosedError("this is a forked copy of the session")

    def _closed_error(self) -> StreamClosedError:
        reason = self._reason or self._end
        text = "it is being closed" if reason is None else str(reason)
        error = StreamClosedError(f"the session is closed: {text}")
        error.__cause__ = None if reason is None else reason.__cause__
        return error

    # -- for promises

    def forget(self, id: str) -> None:
        """Nobody waits for that reply any more."""
        self._pending.pop(id, None)

    def silence_text(self) -> str:
        """What probably happened if no reply came."""
        if self._heard:
            return ""
        return (
            "; nothing has ever come from the other side: is it ticking, does it use the same serializer, and does it"
            " know the class of the request?"
        )

    # -- for the peer: input and output

    def _changed(self) -> None:
        """The channel is to be watched differently."""
        if self._state is State.CLOSED:
            return
        channel = self._channel
        wanted: Dict[int, int] = {}
        if self._end is None and not self._paused:
            wanted = dict.fromkeys(channel.read_fds(), READ)
        fd = channel.write_fd()
        if fd is not None:  # also when the other side has stopped writing: it may still read
            wanted[fd] = wanted.get(fd, 0) | WRITE
        if wanted != self._watched:
            self._peer.rewatch(self, self._watched, wanted)
            self._watched = wanted
        self._peer.set_interval(self, self._end is None and (channel.volatile or channel.poll_interval is not None))

    @property
    def channel(self) -> Channel:
        """What it reads from and writes to."""
        return self._channel

    @property
    def watched(self) -> Dict[int, int]:
        """The descriptors that are watched for it, and for what."""
        return self._watched

    def start(self) -> None:
        """Begin to be watched."""
        self._changed()

    def ready(self, fd: int, events: int) -> None:
        """A descriptor is ready, or (-1) it is time to look."""
        if self._state is State.CLOSED:
            return
        if events & WRITE:
            self._flush()
        if events & READ and self._end is None:
            self._read(fd)

    def _read(self, fd: int) -> None:
        inbox = self._inbox
        channel = self._channel
        if not inbox:
            self._mark = channel.received_bytes
        try:
            channel.receive_into(inbox, fd)
        except StreamClosedError as exc:
            self._stream_ended(exc)
        except Exception as exc:
            self._stream_failed(exc)
        if inbox:
            self._heard = True
            self._peer.add_work(self)
            if len(inbox) > INBOX_COUNT or channel.received_bytes - self._mark > INBOX_BYTES:
                self.update_reading()

    def update_reading(self) -> None:
        """Stop reading while the inbox is long, go on when it is not."""
        paused = False
        inbox = self._inbox
        if inbox:
            size = self._channel.received_bytes - self._mark
            if self._peer.is_starving or self._channel.queued_bytes:
                paused = size > INBOX_BYTES_HARD
            else:
                paused = len(inbox) > INBOX_COUNT or size > INBOX_BYTES
        if paused != self._paused:
            self._paused = paused
            self._peer.set_paused(self, paused)
            self._changed()

    def _flush(self) -> None:
        try:
            self._channel.flush()
        except StreamClosedError as exc:
            self._write_failed(exc)
        except Exception as exc:
            self._stream_failed(exc)
        if not self._channel.queued_bytes:
            self._peer.note_drained()
            if self._inbox:
                self._peer.add_work(self)  # requests may have waited for this
        if self._paused:
            self.update_reading()

    def flush_corked(self) -> None:
        """What a batch has gathered leaves when a tick begins."""
        if self._state is State.OPEN:
            self._flush()

    def _write_failed(self, exc: StreamClosedError) -> None:
        """The other side is gone, but what it had written before is still to be read."""
        if self._end is None and self._state is not State.CLOSED:
            self._channel.drain(self._inbox)
            self._stream_ended(exc)

    def _stream_ended(self, exc: StreamClosedError) -> None:
        if self._end is None:
            self._end = exc
            self._changed()
        self._peer.add_work(self)

    def _stream_failed(self, exc: BaseException) -> None:
        if isinstance(exc, InvalidStreamError):
            exc.session = self
        self._inbox.append(exc)
        self._peer.add_work(self)

    def find_invalid(self) -> None:
        """Look whether a stream was closed by its owner; nothing else would ever tell."""
        if self._state is State.OPEN and self._end is None and not self._inbox:
            text = self._channel.find_invalid()
            if text is not None:
                self._stream_failed(InvalidStreamError(text))

    # -- for the peer: dispatch

    @property
    def has_work(self) -> bool:
        """Whether ``dispatch_next`` has something to do."""
        if self._state is State.CLOSED:
            return False
        if self._end is not None:
            return True
        if self._state is State.CLOSING:
            return False
        if self._current is not None:
            return True
        return bool(self._inbox) and self._channel.queued_bytes <= HIGH_WATER

    @property
    def has_undispatched(self) -> bool:
        """Whether there is something that waits, even if it cannot be dispatched now."""
        return self._state is not State.CLOSED and bool(self._inbox or self._end or self._current)

    @property
    def backlog(self) -> int:
        """How many times ``dispatch_next`` may be called now."""
        return len(self._inbox) + 2

    def dispatch_next(self) -> int:
        """Dispatch one message, or the end of the stream.

        Returns:
            How many messages that were.
        """
        inbox = self._inbox
        message = self._current
        if message is None:
            if not inbox:
                if self._end is not None:
                    self._finish_ended()
                return 0
            # In one breath:
            self._current = message = inbox[0]
            del inbox[0]
            if self._paused and not inbox:
                self.update_reading()
        cls = type(message)
        if cls is ResponseEnvelope:
            self._settle(message)
        elif cls is RequestEnvelope:
            self._serve(message)
        elif isinstance(message, Message):
            self._deliver(message, self._message_handlers.of(cls), True)
        else:
            return self._resume(message)
        return 1

    def settle_replies(self) -> int:
        """Settle the replies in the inbox before their turn: handlers are nested too deeply to run another."""
        found = [m for m in self._inbox if type(m) is ResponseEnvelope]
        if found:
            self._inbox = deque(m for m in self._inbox if type(m) is not ResponseEnvelope)
            for message in found:
                self._settle(message)
        return len(found)

    def _settle(self, message: ResponseEnvelope) -> None:
        try:
            pending = self._pending.pop(message.id, None)
        except TypeError:  # unhashable, from a serializer that does not check
            pending = None
        promise = None if pending is None else pending()
        if promise is None:
            logger.debug("%r: reply to %.128r discarded: nobody waits for it", self, message.id)
        else:
            promise.settle(message.response)
        self._current = None

    def _deliver(self, message: Message, handlers: Tuple[Handler, ...], first: bool) -> None:
        if first and self._receivers:
            self._hand_over(message)
        error: Optional[Exception] = None
        index = 0
        try:
            for index, handler in enumerate(handlers):
                if not handler.active:
                    continue
                self._current = None
                try:
                    if handler.takes_both:
                        handler.function(message, self)
                    else:
                        handler.function(message)
                except Exception as exc:
                    if error is None:
                        error = exc
                    else:
                        logger.error("another on_message handler failed too", exc_info=exc)
        except BaseException:
            rest = handlers[index + 1 :]
            if rest and self._current is None:
                self._current = _Delivery(message, rest)
                self._peer.add_work(self)
            raise
        self._current = None
        if error is not None:
            raise error

    def _hand_over(self, message: Message) -> None:
        for slot in self._receivers:
            if not slot:
                slot.append(message)

    def _serve(self, envelope: RequestEnvelope) -> None:
        request = envelope.request
        id = envelope.id
        reply: Any = None
        try:
            for handler in self._request_handlers.of(type(request)):
                if not handler.active:
                    continue
                self._current = None
                reply = handler.function(request, self) if handler.takes_both else handler.function(request)
                if reply is not None:
                    if not isinstance(reply, Message):
                        raise TypeError(
                            f"on_request handler {_name(handler)} returned a {type(reply).__name__}; it must return a"
                            " Message, or None to pass the request on"
                        )
                    break
            if reply is None:
                reply = ErrorMessage(f"Unhandled request: {type_info(type(request)).wire_name}")
            # From here on an interruption comes back to the reply and not to the handlers.
            self._current = answer = _Answer(id, reply)
        except Exception as exc:
            self._current = answer = _Answer(id, ErrorMessage("Error in dispatch", exc))
        except BaseException as exc:
            if self._current is None:
                # If the program goes on, the requester learns at the next tick what happened; if it ends, he learns that.
                self._current = _Answer(id, ErrorMessage("Error in dispatch", exc))
                self._peer.add_work(self)
            raise
        self._answer(answer)

    def _answer(self, answer: _Answer) -> None:
        try:
            if self._state is State.OPEN:
                self._send_reply(answer)
            else:
                logger.debug("%r: reply to %.128r dropped: the session is closed", self, answer.id)
        finally:
            exc = sys.exc_info()[1]
            if exc is None or isinstance(exc, Exception):
                self._current = None

    def _send_reply(self, answer: _Answer) -> None:
        envelope = ResponseEnvelope(answer.id, answer.reply)
        try:
            self._channel.send(envelope)
        except FrameTooLargeError as exc:
            self._send_error_reply(answer, f"the reply could not be sent: {exc}")
        except SerializationError as exc:
            self._send_error_reply(answer, f"the reply could not be sent: {exc}")
        except StreamClosedError as exc:
            self._write_failed(exc)
        except Exception as exc:
            self._stream_failed(exc)

    def _send_error_reply(self, answer: _Answer, text: str) -> None:
        if isinstance(answer.reply, ErrorMessage):
            text = answer.reply.message
        limit = getattr(self._channel.transport, "max_frame_size", None)
        for length in (len(text), (limit or 4096) // 8, 64):
            shown = text if len(text) <= length else text[:length] + "..."
            try:
                self._channel.send(ResponseEnvelope(answer.id, ErrorMessage(shown.encode("utf-8", "backslashreplace").decode())))
                return
            except (FrameTooLargeError, SerializationError) as exc:
                error: Exception = exc
            except StreamClosedError as exc:
                self._write_failed(exc)
                return
        logger.error("%r: no reply could be sent to %.128r: %s", self, answer.id, error)

    def _resume(self, item: Any) -> int:
        """What stands in the inbox in place of a message."""
        if type(item) is _Answer:
            self._answer(item)
            return 0
        if type(item) is _Delivery:
            self._deliver(item.message, item.handlers, False)
            return 0
        self._current = None
        if isinstance(item, SerializationError):
            self._undecodable(item)
            return 1
        self._failed(item)
        return 0

    def _undecodable(self, error: SerializationError) -> None:
        if error.request_id is not None:
            answer = self._current = _Answer(error.request_id, ErrorMessage(f"the request could not be decoded: {error}"))
            self._answer(answer)
        elif error.response_id is not None:
            pending = self._pending.pop(error.response_id, None)
            promise = None if pending is None else pending()
            if promise is not None:
                promise.fail(error)
        else:
            self._deliver(ErrorMessage(str(error)), self._message_handlers.of(ErrorMessage), True)

    def _failed(self, error: Exception) -> None:
        keep = self.report(error)
        if keep or self._state is State.CLOSED:
            return
        if self._end is None:
            self._end = StreamClosedError(f"the stream failed: {error}")
            self._end.__cause__ = error
            self._changed()
            self._peer.add_work(self)

    def report(self, error: BaseException) -> bool:
        """Tell the on_exception handlers.

        Returns:
            Whether one of them wants the session to stay open.
        """
        handlers = self._exception_handlers.of(type(error))
        if not handlers:
            logger.error("%r: %s", self, error, exc_info=error if not isinstance(error, IpcError) else None)
            return False
        keep = False
        for handler in handlers:
            try:
                result = handler.function(error, self) if handler.takes_both else handler.function(error)
                keep = keep or result is False
            except Exception:
                logger.exception("on_exception handler of %r failed", self)
        return keep

    def _finish_ended(self) -> None:
        assert self._end is not None
        if self._channel.queued_bytes:  # the other side may still read, though it writes no more
            self._flush_bounded()
            if self._state is State.CLOSED:
                return
        ending = self.finish(self._end)
        if ending is not None:
            self._peer.add_ending(ending)


class _Until:
    """A condition in the form of a promise: ``pump`` looks at ``settled``."""

    __slots__ = ("_condition",)

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    @property
    def settled(self) -> bool:
        return self._condition()


def _no_message(method: str, message: Any) -> TypeError:
    return TypeError(
        f"{method}() takes a Message, not a {type(message).__name__}; derive its class from Message:"
        f" @dataclass class {type(message).__name__.title()}(Message): ..."
    )


def _name(handler: Handler) -> str:
    return getattr(handler.function, "__qualname__", None) or f"{handler.function!r:.100}"
