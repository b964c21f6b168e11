"""One conversation with one other process, as users see it.

Checks what users pass, and hands it on to the conversation behind it. Must not know how anything is sent.
"""

from __future__ import annotations

from .arguments import (
    DEFAULT,
    USUAL,
    check_expect,
    check_message,
    check_timeout,
    close_bound,
    expectable,
    safe_repr,
    sendable,
)
from .core.conversation import Conversation
from .core.receiving import receive
from .core.sending import flush
from .handler_methods import HandlerMethods
from .messages import Message
from .promise import ResponsePromise, send_request

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    import subprocess
    from contextlib import AbstractContextManager
    from typing import Any, TypeVar, overload

    from .core.loop import Loop
    from .core.roles import Settings
    from .errors import StreamClosedError
    from .peer import IpcPeer
    from .transports.channel import Channel

    M = TypeVar("M", bound=Message)

__all__ = ["Session", "conversation_of"]


class Session(HandlerMethods):
    """One conversation with one other process.

    Made by the ``create_*`` methods and ``connect`` of ``IpcPeer``. It owns its
    streams and closes them. A context manager: leaving closes it. Once it is
    closed, everything that would send or receive raises ``StreamClosedError``,
    whose text says why. Calls from another thread while one is inside the peer,
    or in a forked copy of the process, are a ``RuntimeError``.
    """

    def __init__(self, loop: Loop, channel: Channel, peer: Settings) -> None:
        self._conversation = Conversation(loop, channel, peer, self)

    @safe_repr
    def __repr__(self) -> str:
        conversation = self._conversation
        reason = conversation.reason or conversation.channel.inputs.ended
        state = conversation.state
        why = "" if reason is None or state == "forked" else f" ({conversation.short(reason)})"
        return (
            f"<Session {conversation.name} {state}{why} pending={conversation.requests.count()}"
            f" inbox={len(conversation.dispatcher.inbox)} queued={conversation.outbox.queued_bytes}>"
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """What texts and logs call it.

        ``pid 4242``, ``stdio``, ``to 127.0.0.1:80 fd 7``, ``fd 5/6``.
        """
        return self._conversation.name

    # -- what it is

    @property
    def peer(self) -> IpcPeer:
        """The peer that it belongs to."""
        return self._conversation.peer  # type: ignore[return-value]  # the core does not know the class

    @property
    def transport(self) -> Any:
        """The transport that it talks over.

        The one given to ``create_session``, otherwise a ``StreamTransport``.

        Raises:
            OSError: No descriptor is left to import the class with.
        """
        from .transports.message_transport import transport_of

        return transport_of(self._conversation.channel)

    @property
    def process(self) -> subprocess.Popen[Any] | None:
        """The ``Popen`` of the child process at the other end, or None."""
        return self._conversation.channel.process  # type: ignore[no-any-return]

    @property
    def socket(self) -> socket.socket | None:
        """The connected socket, or None if there is none or it is closed.

        For ``getpeername()``, ``getpeercert()`` and options; not for reading or
        writing.
        """
        return self._conversation.channel.socket  # type: ignore[no-any-return]

    @property
    def is_open(self) -> bool:
        """Whether the session is open.

        False as soon as ``close`` begins, or once a tick has dispatched the end
        of the stream. A send that fails does not change it by itself.
        """
        return self._conversation.is_open

    @property
    def reason(self) -> StreamClosedError | None:
        """Why it ended or was closed; None while it is open.

        Known from the moment that ``on_close`` handlers run.
        """
        return self._conversation.reason

    @property
    def queued_bytes(self) -> int:
        """How many bytes wait to be written.

        Because the other side has not read what was sent before.
        """
        return self._conversation.outbox.queued_bytes

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
        """Send a message that wants a reply.

        It leaves now, or is queued if the stream is full. Blocks only while
        more than a mark (1 MiB) is queued, at most for ``timeout``, and runs no
        handlers.

        Args:
            message: The request.
            timeout: Seconds until the reply must be there; by default the
                peer's, None for no limit.
            expect: The class of the reply; another one is an
                ``UnexpectedReplyError`` at ``wait()``.

        Returns:
            A promise; its ``wait()`` returns the reply.

        Raises:
            TypeError: ``message`` is no Message, or another argument is of a
                wrong kind.
            ValueError: ``timeout`` is negative, or the id generator has made an
                id that cannot be used.
            SerializationError: The message cannot travel. Nothing was sent.
            FrameTooLargeError: It is over the peer's ``max_frame_size``.
                Nothing was sent.
            StreamClosedError: The session is closed.
            InvalidStreamError: A stream was closed by its owner.
            RequestTimeoutError: The queue did not drain in time. Nothing was
                sent.

        Example:
            promise = session.request(task, expect=TaskResponse)
            print(promise.wait().result)
        """
        if type(message) not in sendable:
            check_message("request", message)
        if id(expect) not in expectable:
            expect = check_expect(expect)
        conversation = self._conversation
        if timeout is not DEFAULT:
            check_timeout(timeout)
        else:
            timeout = conversation.peer.timeout
        return send_request(conversation.requests, message, timeout, expect)

    def notify(self, message: Message) -> None:
        """Send a message that expects nothing.

        It leaves now, or is queued if the stream is full. Blocks only while
        more than a mark (1 MiB) is queued, at most for the peer's timeout, and
        runs no handlers.

        Raises:
            TypeError: ``message`` is no Message.
            SerializationError: The message cannot travel. Nothing was sent.
            FrameTooLargeError: It is over the peer's ``max_frame_size``.
                Nothing was sent.
            StreamClosedError: The session is closed.
            InvalidStreamError: A stream was closed by its owner.
            RequestTimeoutError: The queue did not drain in time. Nothing was
                sent.
        """
        if type(message) not in sendable:
            check_message("notify", message)
        self._conversation.notify(message)

    def batch(self) -> AbstractContextManager[Session]:
        """Gather what is sent inside into few large writes.

        It is out at the latest when the block ends or a tick begins. Use it for
        many small messages in a row. It may be nested: the outermost block
        counts.

        Returns:
            A context manager that gives the session to the block.

        Raises:
            StreamClosedError: At the end of the block: the other side is gone.
            InvalidStreamError: A stream was closed by its owner.

        Example:
            with session.batch():
                for done in range(1000):
                    session.notify(Progress(done, 1000))
        """
        return self._conversation.batches.batch(self)

    def flush(self, timeout: float | None = None) -> None:
        """Write until nothing is queued. Reads meanwhile, but runs no handlers.

        What is written is with the system; whether the other side has read it
        is not known.

        Args:
            timeout: Seconds; None waits without limit.

        Raises:
            TimeoutError: The other side has not read it in time. It is still
                queued.
            StreamClosedError: The other side is gone.
            InvalidStreamError: A stream was closed by its owner.
        """
        check_timeout(timeout)
        self._conversation.loop.inside(flush, self._conversation, timeout)

    # -- receiving

    if TYPE_CHECKING:

        @overload
        def receive(self, timeout: float | None = None) -> Message: ...

        @overload
        def receive(self, timeout: float | None = None, *, expect: type[M]) -> M: ...

    def receive(self, timeout: float | None = None, *, expect: type[Any] = Message) -> Any:
        """Return the next notification, and wait for it.

        Ticks the whole peer meanwhile, so handlers run. ``on_message`` handlers
        see what it returns, too. What came before, in a tick or a ``wait()``,
        is returned if no handler was there for it: such notifications are kept,
        the newest 1000 of a session or 4 MiB. A handler that is registered
        later sees a kept one when it is returned, maybe behind newer ones. Text
        of a child is not kept. That text, and errors of decoding, are
        notifications, too: ``LogMessage`` and ``ErrorMessage``.

        Args:
            timeout: Seconds; 0 takes what is there; None waits without limit.
            expect: Return the next one of this class, and leave the others.

        Returns:
            The notification.

        Raises:
            TimeoutError: Nothing came in time.
            StreamClosedError: The session is closed, and nothing is kept.
            TypeError: ``expect`` is no message class.
            Exception: What an ``on_message`` handler has raised. The message is
                returned by the next call.

        Example:
            try:
                progress = session.receive(timeout=5, expect=Progress)
            except TimeoutError:
                print("no progress for 5 s")
        """
        check_timeout(timeout)
        expect = check_expect(expect)
        conversation = self._conversation
        kept = conversation.dispatcher.kept
        while True:  # again if a signal handler has turned and taken it
            entry = conversation.loop.inside(receive, conversation, timeout, expect)
            for message in map(kept.take, (entry,)):  # stored before a signal is looked at
                if message is not None:
                    return message

    def tick(self, timeout: float | None = 0.0) -> int:
        """Do one turn over all sessions of the peer, as ``IpcPeer.tick`` does.

        Args:
            timeout: 0 polls and returns at once; a number waits at most so many
                seconds for something to happen; None waits until something
                happens.

        Returns:
            How many messages were dispatched.

        Raises:
            StreamClosedError: The session is closed.
            Exception: What an ``on_message`` handler has raised. The next tick
                goes on behind that message.
        """
        conversation = self._conversation
        if timeout is not None:
            check_timeout(timeout)
        if conversation.reason is not None:
            conversation.close()  # what an interruption has left
            raise conversation.closed_error()
        return conversation.loop.tick(timeout)

    # -- closing

    def close(self, timeout: float | None = USUAL) -> None:
        """Close the session. A second call does nothing; allowed inside a handler.

        What is pending fails with ``StreamClosedError``. Notifications that
        were read and not dispatched are dropped, also for the other handlers of
        a message of which one closes the session; so are replies of a handler
        that does. What is queued is written, for at most a second; what is left
        is dropped, and logged.
        Then done callbacks run, and the streams are released and closed. A
        child process that the peer started is ended and reaped: its stdin is
        closed, and if it does not exit, it is terminated after 2 s and killed
        after 2 s more. What it writes to stderr until then still goes to the
        ``on_message`` handlers. At the end the ``on_close`` handlers run. A TCP
        connection on which the other side is still talking, or has not received
        all, is closed by a later tick, at most a second later.

        Args:
            timeout: Seconds for all of that, in place of these bounds; what is
                not done by then is cut short. If there is a child, what is
                queued has the first second, or all but the last one. 0 drops
                what is queued, without a word, and kills a child that the peer
                started at once. None sets no limit.

        Raises:
            TypeError: ``timeout`` is no number.
            ValueError: ``timeout`` is negative.

        Example:
            try:
                reply = session.request(task, timeout=5).wait()
            except RequestTimeoutError:
                session.close(timeout=0)  # a child that hangs is killed
        """
        self._conversation.close(seconds=close_bound(timeout))


def conversation_of(session: Session) -> Conversation:
    return session._conversation
