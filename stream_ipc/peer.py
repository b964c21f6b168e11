"""``IpcPeer``, as users see it: drives the sessions of a program and closes them. ``opening_methods`` opens them.

Checks what users pass, and hands it on to the loop behind it. Must not know how anything is sent.
"""

from __future__ import annotations

import sys

from .arguments import USUAL, check_message, check_timeout, close_bound, safe_repr, sendable
from .core.lifecycle import adopt, close_loop, drop_loop
from .core.loop import Loop
from .core.sending import broadcast
from .errors import check_plugin
from .ids import PidCounterRequestIdGenerator
from .interruptions import pass_on
from .opening_methods import OpeningMethods
from .session import Session, conversation_of
from .wire.codec import DEFAULT_MAX_FRAME_SIZE, check_max_frame_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .messages import Message
    from .protocols import MessageSerializer, RequestIdGenerator

__all__ = ["IpcPeer", "loop_of"]


class IpcPeer(OpeningMethods):
    """Owns any number of sessions and drives them.

    It belongs to the process that made it, and to one thread at a time: any
    other call is a ``RuntimeError``, and so is making a session once it is
    closed. A context manager: leaving closes it. So does the end of the
    interpreter.

    Args:
        serializer: Turns messages into payloads; ``PickleMessageSerializer()``
            by default. May serve several peers.
        id_generator: Makes request ids; ``PidCounterRequestIdGenerator()`` by
            default.
        timeout: The default for requests, in seconds; None for no limit. Also
            how long ``notify`` waits for room, and how long a handshake of
            ``listen`` may take.
        max_frame_size: The largest payload in bytes, both ways.

    Attributes: as the arguments.

    Raises:
        TypeError: An argument is of a wrong kind.
        ValueError: ``timeout`` is negative, or ``max_frame_size`` is no size
            that a frame can have.
    """

    def __init__(
        self,
        serializer: MessageSerializer | None = None,
        id_generator: RequestIdGenerator | None = None,
        *,
        timeout: float | None = 30.0,
        max_frame_size: int = DEFAULT_MAX_FRAME_SIZE,
    ) -> None:
        if sys.platform == "win32":
            raise OSError("stream_ipc needs Linux or macOS: Windows has no descriptors that a selector can wait for")
        check_timeout(timeout)
        check_max_frame_size(max_frame_size)
        if serializer is None:
            from .serializers.pickle import PickleMessageSerializer

            serializer = PickleMessageSerializer()
        if id_generator is None:
            id_generator = PidCounterRequestIdGenerator()
        check_plugin("serializer", serializer, "serialize", "deserialize")
        check_plugin("id_generator", id_generator, "generate")
        self.serializer: MessageSerializer = serializer
        self.id_generator: RequestIdGenerator = id_generator
        self.timeout = timeout
        self.max_frame_size = max_frame_size
        self._loop = Loop()
        adopt(self._loop)

    @safe_repr
    def __repr__(self) -> str:
        loop = self._loop
        state = "forked" if loop.forked else "closed" if loop.closed else "closing" if loop.closing else "open"
        return (
            f"<IpcPeer {state} sessions={len(loop.conversations)} listeners={len(loop.listeners)}"
            f" serializer={type(self.serializer).__name__}>"
        )

    def __enter__(self) -> IpcPeer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        loop = getattr(self, "_loop", None)
        if loop is not None and not loop.closed and not loop.forked:
            drop_loop(loop, repr(self))

    # -- all sessions

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions that are open, in the order in which they were made."""
        return tuple([each.session for each in [*self._loop.conversations] if each.is_open])

    def tick(self, timeout: float | None = 0.0) -> int:
        """Do one turn over all sessions.

        It writes what is queued, reads what is there, and dispatches it to
        handlers. If these take long, it stops between two of them after some
        0.1 s, and the next tick goes on with the rest. May be called inside
        handlers. A tick also gives up the requests whose deadline has passed:
        their ``wait()`` raises ``RequestTimeoutError`` from then on.

        Args:
            timeout: 0 polls and returns at once; a number waits at most so many
                seconds for something to happen (a message, the end of a
                session, a queue that has drained, a request that is overdue),
                also with nothing open; None waits until something happens.

        Returns:
            How many messages were dispatched.

        Raises:
            StreamClosedError: Nothing is open, and None would wait for ever.
            Exception: What an ``on_message`` handler has raised. The next tick
                goes on behind that message.
        """
        if timeout is not None:
            check_timeout(timeout)
        return self._loop.tick(timeout)

    def tick_for(self, seconds: float) -> int:
        """Tick until so many seconds are over; returns and raises as ``tick``.

        Only ``wakeup()`` ends it before.

        Example:
            while not promise.done:
                draw_frame()  # whatever else the program does
                peer.tick_for(0.02)
        """
        check_timeout(seconds, "seconds", optional=False)
        loop = self._loop
        limit = loop.limit_of(seconds)
        wakeups = loop.wakeups
        count = self.tick(0)
        while True:
            left = limit - loop.clock()
            if left <= 0 or loop.wakeups != wakeups:
                return count
            count += self.tick(left)

    def wakeup(self) -> None:
        """Make the tick that is under way, or else the next one, return at once.

        ``tick_for`` returns, too; a ``wait()``, ``receive()``, ``flush()`` or
        ``connect()`` looks around and goes on. Several calls before one tick
        count once. For a program that waits for something else besides, such as
        a signal, or the result of a thread.

        The one method that any thread and any signal handler may call at any
        time. Call nothing else from a signal handler: it may have interrupted a
        write of this peer. Neither blocks nor raises. Does nothing once the
        peer is closed, nor in a forked copy of the process.

        Example:
            def stop(*_):
                stopping.append(True)
                peer.wakeup()

            signal.signal(signal.SIGTERM, stop)
            while not stopping:
                peer.tick(None)
        """
        if not self._loop.closing and not self._loop.forked:
            self._loop.waker.wake()

    def broadcast(self, message: Message) -> int:
        """Notify every open session; returns how many took it.

        It is encoded once per serializer. A dead or stuck session hinders no
        other: the stuck ones together are waited for once, at most for the
        peer's timeout. Only ``on_exception`` handlers run: those of sessions
        that did not get it are told.

        Raises:
            TypeError: It is no Message.
            SerializationError: It cannot travel. Nobody got it.
            FrameTooLargeError: It is too large for all. Nobody got it.
        """
        if type(message) not in sendable:
            check_message("broadcast", message)
        return self._loop.inside(broadcast, self._loop, message, self.timeout)

    # -- inside another loop

    def fileno(self) -> int:
        """Return a descriptor for another loop to wait for.

        It becomes readable when ``tick(0)`` has something to do. Wait for it,
        at most for as long as ``next_deadline()`` says; in either case, then
        call ``tick(0)``.

        Raises:
            OSError: This program's selector has none: call ``tick`` now and
                then. Or none is left: the first call makes one.
            RuntimeError: The peer is closed.

        Example:
            while not promise.done:
                files = [sys.stdin, peer.fileno()]
                ready = select.select(files, [], [], peer.next_deadline())[0]
                peer.tick(0)
                if sys.stdin in ready:
                    session.request(TaskRequest(sys.stdin.readline()))
        """
        loop = self._loop
        loop.check_open()
        try:
            return loop.fileno()
        except (OSError, ValueError) as exc:
            pass_on(exc)
            loop.check_open()  # a signal handler may have closed it
            raise

    def next_deadline(self) -> float | None:
        """Return in how many seconds ``tick(0)`` is due; None if never.

        It is due then though ``fileno()`` is not readable: for an overdue
        request, or what is looked at by time (a transport or a file without a
        descriptor to wait for, a ``DeferredReply`` that a thread may drop, a
        child that is ending, and where there is no pidfd, as on macOS, every
        child). Ask whenever the other loop is about to wait: after each
        ``tick(0)`` and ``request()``. Looks through all pending requests.

        That an owner has closed a stream under its session is told by neither:
        ticks look for that every half second, at some sessions at a time.
        """
        loop = self._loop
        if loop.closing and not loop.forked:
            return None
        return loop.inside(loop.next_deadline)

    # -- closing

    def remove_session(self, session: Session) -> None:
        """Close a session but leave its streams open, to their owner.

        They are left as they were found, but for TCP's options, and a child
        process is left running. What is queued is written first, for at most a
        second. What is left of it, and messages that were read and not
        dispatched, be it the beginning of one, are lost; a warning is logged. A
        ``StreamTransport`` cannot be used again. Does nothing if the session is
        closed.

        Raises:
            TypeError: It is no session.
            ValueError: It is no session of this peer.
        """
        if not isinstance(session, Session):
            raise TypeError(f"remove_session() takes a Session, not {session!r:.200}")
        if session.peer is not self:
            raise ValueError(f"{session!r} belongs to another peer; call remove_session() of that one: session.peer")
        self._loop.check_entry()
        conversation_of(session).close(release=True)

    def close(self, timeout: float | None = USUAL) -> None:
        """Close every session and listener, and end children, side by side.

        A second call does nothing. What is pending fails. What is queued is
        written, for at most a second in all; what is left is dropped, and
        logged. Then done callbacks run. TCP connections on which the other side
        is still talking, or has not received all, are kept a second more.
        Children are waited for, 6 s in the worst case, and ``on_close``
        handlers run behind their last words.
        An interrupted call can be made again; if it is not, the end of the
        interpreter ends what is left, and Ctrl-C there kills it.

        Args:
            timeout: Seconds for all of that, in place of these bounds; as in
                ``Session.close``, also what it raises.
        """
        seconds = close_bound(timeout)
        loop = self._loop
        if not loop.closed:
            loop.inside(close_loop, loop, seconds)


def loop_of(peer: IpcPeer) -> Loop:
    return peer._loop
