"""One conversation with one other process, as users see it.

Checks what users pass, and hands it on to the conversation behind it.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager

from .arguments import check_expect, check_message, expectable, sendable
from .core.conversation import CLOSED, FORKED, Conversation
from .messages import Message
from .promise import DEFAULT, ResponsePromise, check_timeout, request
from .transports.transport import transport_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    import subprocess
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar, overload

    from .peer import IpcPeer

    # What handlers are to a type checker, which cannot be told that the first parameter is some class of messages: a
    # bound must not be generic, and without type variables of their own the decorators return the handler's own type.
    EventHandler = Callable[[Any], Any] | Callable[[Any, "Session"], Any]
    RequestHandler = Callable[[Any], Message | None] | Callable[[Any, "Session"], Message | None]
    CloseHandler = Callable[["Session"], Any]

    M = TypeVar("M", bound=Message)
    EventH = TypeVar("EventH", bound=EventHandler)
    RequestH = TypeVar("RequestH", bound=RequestHandler)
    CloseH = TypeVar("CloseH", bound=CloseHandler)

__all__ = ["Session", "conversation_of"]


class Session:
    """One conversation with one other process. Made by the ``create_*`` methods and ``connect`` of ``IpcPeer``.

    It owns its streams and closes them. A context manager: leaving closes it. Once it is closed, everything that would
    send or receive raises ``StreamClosedError``, whose text says why. Calls from another thread while one is inside the
    peer, or in a forked copy of the process, are a ``RuntimeError``.

    Attributes:
        name: What texts and logs call it: ``pid 4242``, ``stdio``, ``to 127.0.0.1:80 fd 7``, ``fd 5/6``.
    """

    def __init__(self, make: Callable[[Session], Conversation]) -> None:
        self._conversation = make(self)

    def __repr__(self) -> str:
        try:
            conversation = self._conversation
            reason = conversation.reason or conversation.channel.ended
            if conversation.state is FORKED:
                reason = None
            why = "" if reason is None else f" ({conversation.short(reason)})"
            return (
                f"<Session {conversation.name} {conversation.state}{why} pending={len(conversation.replies)}"
                f" inbox={len(conversation.dispatcher.inbox)} queued={conversation.channel.queued_bytes}>"
            )
        except Exception:  # half made
            return "<Session>"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """What texts and logs call it."""
        return self._conversation.name

    # -- what it is

    @property
    def peer(self) -> IpcPeer:
        """The peer that it belongs to."""
        peer: IpcPeer = self._conversation.peer
        return peer

    @property
    def transport(self) -> Any:
        """The transport that it talks over: the one given to ``create_session``, otherwise a ``StreamTransport``."""
        return transport_of(self._conversation.channel)

    @property
    def process(self) -> subprocess.Popen[Any] | None:
        """The ``Popen`` of the child process at the other end, or None."""
        return getattr(self._conversation.channel, "process", None)

    @property
    def socket(self) -> socket.socket | None:
        """The connected socket, or None if it talks over something else or is closed.

        For ``getpeername()``, ``getpeercert()`` and options; not for reading or writing.
        """
        return self._conversation.channel.socket  # type: ignore[no-any-return]

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent. False as soon as ``close`` begins, or once the end of the stream is dispatched."""
        return self._conversation.is_open

    @property
    def queued_bytes(self) -> int:
        """How many bytes wait to be written, because the other side has not read what was sent before."""
        return self._conversation.channel.queued_bytes

    # -- sending

    if TYPE_CHECKING:

        @overload
        def request(self, message: Message, timeout: float | None = DEFAULT) -> ResponsePromise[Message]: ...

        @overload
        def request(
            self, message: Message, timeout: float | None = DEFAULT, *, expect: type[M]
        ) -> ResponsePromise[M]: ...

    def request(
        self, message: Message, timeout: float | None = DEFAULT, *, expect: type[Any] = Message
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
        if type(message) not in sendable:
            check_message("request", message)
        if expect is not Message and (type(expect) is not type or expect not in expectable):
            check_expect(expect)
        conversation = self._conversation
        if timeout is DEFAULT:
            timeout = conversation.peer.timeout
        else:
            check_timeout(timeout)
        return request(conversation, message, timeout, expect)

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
        if type(message) not in sendable:
            check_message("notify", message)
        self._conversation.notify(message)

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
        conversation = self._conversation
        conversation.begin_batch()
        port = conversation.port
        outer = port.batches
        try:
            port.batches = outer + 1
            yield self
        finally:
            port.batches = outer
            conversation.end_batch()

    def flush(self, timeout: float | None = None) -> None:
        """Write until nothing is queued. Reads meanwhile, but runs no handlers.

        What is written is with the system; whether the other side has read it is not known.

        Args:
            timeout: Seconds; None waits without limit.

        Raises:
            TimeoutError: The other side has not read it in time. It is still queued.
            StreamClosedError: The other side is gone.
        """
        check_timeout(timeout)
        self._conversation.flush(timeout)

    # -- receiving

    if TYPE_CHECKING:

        @overload
        def receive(self, timeout: float | None = None) -> Message: ...

        @overload
        def receive(self, timeout: float | None = None, *, expect: type[M]) -> M: ...

    def receive(self, timeout: float | None = None, *, expect: type[Any] = Message) -> Any:
        """Return the next notification; ticks the whole peer until there is one, so handlers run.

        ``on_message`` handlers see what it returns, too. What came before, in a tick or a ``wait()``, is returned if no
        handler was there for it: such notifications are kept, the newest 1000 of a session or 4 MiB. Text of a child is
        not kept. That text, and errors of decoding, are notifications, too: ``LogMessage`` and ``ErrorMessage``.

        Args:
            timeout: Seconds; 0 takes what is there; None waits without limit.
            expect: Return the next one of this class, and leave the others.

        Returns:
            The notification.

        Raises:
            TimeoutError: Nothing came in time.
            StreamClosedError: The session is closed, and nothing is kept.
            TypeError: ``expect`` is no message class.
            Exception: What an ``on_message`` handler has raised. The message is returned by the next call.
        """
        check_timeout(timeout)
        if expect is not Message:
            check_expect(expect)
        return self._conversation.receive(timeout, expect)

    def tick(self, timeout: float | None = 0.0) -> int:
        """Do one turn over all sessions of the peer, as ``IpcPeer.tick`` does.

        Args:
            timeout: 0 polls and returns at once; a number waits at most so many seconds for something to happen; None
                waits until something happens.

        Returns:
            How many messages were dispatched.

        Raises:
            StreamClosedError: The session is closed.
            Exception: What an ``on_message`` handler has raised. The next tick goes on behind that message.
        """
        conversation = self._conversation
        if timeout is not None and timeout != 0:
            check_timeout(timeout)
        if conversation.state is CLOSED:
            conversation.close()  # what an interruption has left
            raise conversation.closed_error()
        return conversation.loop.tick(timeout)

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
        self._conversation.dispatcher.on_message.add(handler, sys._getframe(1))
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
        self._conversation.dispatcher.on_request.add(handler, sys._getframe(1))
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
        self._conversation.dispatcher.on_exception.add(handler, sys._getframe(1))
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
        self._conversation.on_close.add(handler, sys._getframe(1))
        return handler

    def off_message(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_message``; takes effect at once, also inside a handler.

        Raises:
            ValueError: It is not registered.
        """
        self._conversation.dispatcher.on_message.remove(handler)

    def off_request(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_request``; takes effect at once, also inside a handler.

        Raises:
            ValueError: It is not registered.
        """
        self._conversation.dispatcher.on_request.remove(handler)

    def off_exception(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_exception``; takes effect at once, also inside a handler.

        Raises:
            ValueError: It is not registered.
        """
        self._conversation.dispatcher.on_exception.remove(handler)

    def off_close(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_close``; takes effect at once, also inside a handler.

        Raises:
            ValueError: It is not registered.
        """
        self._conversation.on_close.remove(handler)

    def close(self) -> None:
        """Close the session. A second call does nothing; allowed inside a handler. Runs ``on_close`` handlers, no others.

        What is queued is written first, for at most a second; then what is pending fails with ``StreamClosedError``, and
        the streams are released and closed. A child process that the peer started is ended and reaped: its stdin is
        closed, and if it does not exit, it is terminated and then killed. That takes up to 6 s in the worst case. A TCP
        connection on which the other side is still talking is closed by a later tick, at most a second later.
        """
        self._conversation.close()


def conversation_of(session: Session) -> Conversation:
    """Return the conversation behind a session."""
    return session._conversation
