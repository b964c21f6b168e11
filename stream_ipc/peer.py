"""The sessions of one program, and the turns that drive them.

Knows sessions, transports and the poller. One private loop, ``_pump``, serves every call that waits: ``tick``,
``wait``, ``receive``, ``flush`` and a send that waits for room.
"""

from __future__ import annotations

import atexit
import math
import os
import select
import sys
import time
import warnings
from _thread import get_ident
from functools import partial
from itertools import starmap
from weakref import WeakSet

from . import log
from .errors import FrameTooLargeError, StreamClosedError
from .ids import PidCounterRequestIdGenerator
from .messages import Message
from .poller import READ, Poller
from .promise import DEFAULT, check_timeout
from .session import ENVELOPES, FLUSH_BOUND, HIGH_WATER, OPEN, Session, Until, no_message
from .transports.base import POLL_INTERVAL, Channel, Ending, ForeignChannel, finish
from .transports.descriptors import close_streams, describe_address
from .transports.stream import DEFAULT_MAX_FRAME_SIZE, StreamTransport
from .wire.codec import check_max_frame_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    import ssl
    import subprocess
    from typing import IO, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

    from .listener import Listener
    from .protocols import MessageSerializer, RequestIdGenerator
    from .transports.base import Transport
    from .transports.process import Command, Path
    from .transports.sockets import Address
    from .transports.stream import ReadStream, WriteStream

__all__ = ["IpcPeer"]

MAX_ID = 128  # characters
MAX_DEPTH = 32  # nested ticks beyond this only settle replies

# While nothing happens, streams are looked at for having been closed by their owner, which no poller reports: so often
# (seconds), and so many sessions at a time, to cost the same with one or a thousand.
_CHECK_INTERVAL = 0.5
_CHECK_SESSIONS = 16

_SLICE = 64  # messages of one session before the next has its turn

_EXIT_TURN = 0.005  # seconds that one peer may write at exit before the next has its turn

_FORKED = -1  # in place of a thread's number: no thread has it

_peers: WeakSet[IpcPeer] = WeakSet()


class _Pipe(int):
    """``subprocess.PIPE`` as ``help()`` should show it; importing that takes longer than the rest of the package."""

    def __repr__(self) -> str:
        return "subprocess.PIPE"


_PIPE = _Pipe(-1)


class IpcPeer:
    """Owns any number of sessions and drives them.

    It belongs to the process that made it, and to one thread at a time: any call while another thread is inside, or in a
    forked copy of the process, is a ``RuntimeError``, and so is making a session once it is closed. A context manager:
    leaving closes it. So does the end of the interpreter.

    Args:
        serializer: Turns messages into payloads; ``PickleMessageSerializer()`` by default. May serve several peers.
        id_generator: Makes request ids; ``PidCounterRequestIdGenerator()`` by default.
        timeout: The default for requests, in seconds; None for no limit. Also how long ``notify`` waits for room, and how
            long a handshake of ``listen`` may take.
        max_frame_size: The largest payload in bytes, both ways.

    Attributes:
        serializer: As it was given, and so are the next three.
        id_generator: See above.
        timeout: See above.
        max_frame_size: See above.

    Raises:
        TypeError: An argument is of a wrong kind.
        ValueError: ``timeout`` is negative, or ``max_frame_size`` is no size that a frame can have.
    """

    _released = True  # until everything is made

    # As in Session: slots for what is looked at in each tick, and a dict for what users attach.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_awaited",
        "_awake",
        "_check_at",
        "_check_due",
        "_closed",
        "_depth",
        "_endings",
        "_intervals",
        "_outer",
        "_paused",
        "_pipe",
        "_sessions",
        "_snapshot",
    )

    def __init__(
        self,
        serializer: Optional[MessageSerializer] = None,
        id_generator: Optional[RequestIdGenerator] = None,
        *,
        timeout: Optional[float] = 30.0,
        max_frame_size: int = DEFAULT_MAX_FRAME_SIZE,
    ) -> None:
        self.thread: Optional[int] = None  # the thread that is inside, if any
        self._closed = self._released = True  # until everything is made
        check_timeout(timeout)
        check_max_frame_size(max_frame_size)
        if serializer is None:
            from .serializers.pickle import PickleMessageSerializer

            serializer = PickleMessageSerializer()
        if id_generator is None:
            id_generator = PidCounterRequestIdGenerator()
        for plugin, names in ((serializer, ("serialize", "deserialize")), (id_generator, ("generate",))):
            for name in names:
                if not callable(getattr(plugin, name, None)):
                    kind = "serializer" if plugin is serializer else "id_generator"
                    raise TypeError(f"{kind} has no method {name}(): {plugin!r:.100}")
            if isinstance(plugin, type):
                raise TypeError(f"{plugin!r} is a class; pass an instance: {plugin.__name__}()")
        self.serializer = serializer
        self.id_generator = id_generator
        self.timeout = timeout
        self.max_frame_size = max_frame_size
        self.clock: Callable[[], float] = time.monotonic
        self.poller: Poller = Poller()
        self._sessions: Dict[Session, None] = {}
        self._snapshot: Optional[Tuple[Session, ...]] = ()
        self.work: Dict[Session, None] = {}  # for sessions: those with something to dispatch, in turn
        # Sessions that are looked at by time, not by descriptor, and when at the earliest, in the system's time.
        self._intervals: Dict[Any, float] = {}
        self._paused: Dict[Session, None] = {}
        self.corked: Dict[Session, None] = {}  # for sessions: those inside batch()
        self.unfinished: Dict[Session, None] = {}  # for sessions: those that an interruption has left with work
        self._endings: List[Ending] = []
        self.turns: int = 0  # for sessions: how many messages have been dispatched in all
        self._depth = 0  # dispatches that are under way, one inside the other
        self.starving: int = 0  # for sessions: waits that are under way without dispatching
        self.due: float = math.inf  # for sessions: no pending request has an earlier deadline
        self.happenings: int = 0  # for sessions: queues that drained, and sessions that began or ended
        self.listeners: Dict[Listener, None] = {}  # for listeners: those that are open
        self._awaited: Dict[_Awaited, None] = {}  # descriptors that are no session's and that a call waits for
        self._check_at = 0
        self._check_due = 0.0
        self._outer: Optional[Poller] = None
        self._pipe: Optional[Tuple[int, int]] = None
        self.wake: Optional[Tuple[int, int]] = None  # for sessions: set once the pipe is watched
        self._awake = False
        self._closed = self._released = False
        _peers.add(self)

    def __repr__(self) -> str:
        try:
            state = "open" if not self._closed else "closed" if self._released else "closing"
            state = "forked" if self.thread == _FORKED else state
            return (
                f"<IpcPeer {state} sessions={len(self._sessions)} listeners={len(self.listeners)}"
                f" serializer={type(self.serializer).__name__}>"
            )
        except Exception:  # half made
            return "<IpcPeer>"

    def __enter__(self) -> IpcPeer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._released or self.thread == _FORKED:
            return
        if self._sessions or self.listeners:
            warnings.warn(f"unclosed {self!r}; close it, or use it in a with statement", ResourceWarning, source=self)
        for listener in tuple(self.listeners):
            listener._end()
        for session in tuple(self._sessions):
            ending = session.channel.end()
            if ending is not None:
                ending.forget()
        for ending in self._endings:
            ending.forget()
        self._release()

    # -- one thread, one process

    def _enter(self) -> Optional[int]:
        """Begin a call; returns what ``_leave`` takes. ``RuntimeError`` if another thread is inside."""
        me = get_ident()  # first: no other thread gets its turn between the next lines
        outer = self.thread
        if outer is not None and outer != me:
            raise self._refusal()
        self.thread = me
        return outer

    def _leave(self, outer: Optional[int]) -> None:
        """End a call."""
        if self.thread != _FORKED:  # a handler has forked, and this is the copy
            self.thread = outer
        if self.wake is not None:
            self._update_wake()

    def _refusal(self) -> RuntimeError:
        """The error for a call from where the peer does not belong."""
        if self.thread == _FORKED:
            return RuntimeError(
                "this IpcPeer belongs to the process that made it, and this is a fork of it; make a new IpcPeer here"
            )
        return RuntimeError(
            "another thread is using this IpcPeer; it belongs to one thread at a time, so make one per thread"
        )

    @property
    def _is_closed(self) -> bool:
        """Whether ``close`` was called; then no session can be made."""
        return self._closed

    @property
    def _is_starving(self) -> bool:
        """Whether handlers are nested so deeply that requests have to wait."""
        return self._depth >= MAX_DEPTH

    @property
    def _is_forked(self) -> bool:
        """Whether this is the copy in a forked process."""
        return self.thread == _FORKED

    # -- making sessions

    def create_stdio_session(self) -> Session:
        """Talk over this process's own stdin and stdout, as a slave does with its master.

        Takes them over: what is printed from now on, also by programs that this process starts, goes to stderr; reading
        ``sys.stdin`` gives end of file. Closing the session restores both. Does not block.

        Returns:
            The session. There can be one at a time.

        Raises:
            RuntimeError: They are taken over already.
            InvalidStreamError: Descriptor 0 or 1 is closed, or ``sys.stdin`` has already read ahead.
        """
        self._check_usable()
        from .transports.stdio import StdioTransport

        return self._add(StdioTransport(self.serializer, self.max_frame_size))

    def create_process_session(self, process: subprocess.Popen[Any]) -> Session:
        """Attach to a process that was started with ``stdin=PIPE, stdout=PIPE`` and optionally ``stderr=PIPE``.

        Text on its stderr arrives as ``LogMessage(text, "stderr")``. The session owns the three streams and closes them;
        ending the process, and reaping it, stays with its owner. Does not block.

        Returns:
            The session; its ``process`` is the Popen.

        Raises:
            ValueError: The Popen is unsuitable; the text says what to pass.
        """
        self._check_usable()
        from .transports.process import ProcessTransport

        return self._add(ProcessTransport(process, False, self.serializer, self.max_frame_size), process)

    def create_command_session(
        self,
        command: Command,
        *,
        cwd: Optional[Path] = None,
        env: Optional[Mapping[str, str]] = None,
        stderr: Union[None, int, IO[Any]] = _PIPE,
    ) -> Session:
        """Start a process and talk over its stdin and stdout. Closing the session ends and reaps it.

        Blocks only until the system has started it. A program that is no slave, or fails at once, is noticed later: what
        it prints arrives as ``LogMessage``, and its end is a ``StreamClosedError``.

        Args:
            command: The program and its arguments, as a list; there is no shell.
            cwd: The folder to start it in.
            env: Its environment; by default this process's.
            stderr: ``subprocess.PIPE`` (the default: text arrives as ``LogMessage(text, "stderr")``), None to share
                this process's stderr, or whatever else ``subprocess.Popen`` takes.

        Returns:
            The session; its ``process`` is the Popen.

        Raises:
            TypeError: ``command`` is no list, or another argument is of a wrong kind.
            ValueError: ``command`` is empty.
            OSError: It cannot be started: ``FileNotFoundError``, ``PermissionError``, ...
        """
        self._check_usable()
        from .transports.process import ProcessTransport, kill, process_name, spawn

        process = spawn(command, cwd, env, stderr)
        try:
            log.debug("%s started", process_name(process))
            transport = ProcessTransport(process, True, self.serializer, self.max_frame_size)
            return self._add(transport, process)
        except BaseException:
            if not any([session.process is process for session in self._sessions]):  # nobody has it yet
                kill(process)
            raise

    def create_stream_session(
        self, write: WriteStream, read: ReadStream, read2: Optional[ReadStream] = None
    ) -> Session:
        """Talk over any streams: file objects, sockets or raw descriptors. The session owns and closes them.

        A stream with a descriptor is used by its descriptor. One that has none (its ``fileno()`` is missing or refuses), or
        whose bytes are others than the descriptor's (``gzip.GzipFile``), needs blocking methods instead, and gets a thread
        of its own that calls them: ``read(n)``, or better ``read1(n)``, returns bytes as soon as some are there, and none
        at the end; ``write(data)`` returns how many it took, or None for all of them. ``flush()`` and ``close()`` are
        called if there are any. What such a method raises is the end of the session and the cause of its
        ``StreamClosedError``. Closing the session writes what is queued, for at most two seconds, and waits half a second
        for a ``read`` that is under way; a thread that is still blocked then is left behind as a daemon, and what its call
        returns is dropped.

        Args:
            write: What is written.
            read: What is read; may be the same as ``write``.
            read2: A second input with frames.

        Returns:
            The session. Making it does not block.

        Raises:
            InvalidStreamError: A stream is closed, or has neither a descriptor nor such methods. The streams stay open.
            ValueError: One of them is an ``ssl.SSLSocket``; see ``create_socket_session``.
        """
        self._check_usable()
        reads = [read] if read2 is None else [read, read2]
        if any([_is_tls(stream) for stream in (write, *reads)]):
            raise ValueError("an SSLSocket is written and read in one; pass it to create_socket_session()")
        return self._add(StreamTransport(write, reads, self.serializer, self.max_frame_size))

    def create_socket_session(self, sock: socket.socket) -> Session:
        """Talk over a connected stream socket, also an ``ssl.SSLSocket``. The session owns and closes it.

        Does not block, also if the TLS handshake is still to be made: ticks make it.

        Raises:
            TypeError: It is no socket.
            ValueError: It is no stream socket, or not connected.
        """
        self._check_usable()
        import socket

        if not isinstance(sock, socket.socket):
            raise TypeError(f"create_socket_session() takes a socket, not {sock!r:.100}")
        if sock.type != socket.SOCK_STREAM:
            raise ValueError(f"{sock!r} is no stream socket; messages need SOCK_STREAM")
        try:
            address = sock.getpeername()
        except OSError as exc:
            raise ValueError(f"{sock!r} cannot be used: {exc}; connect it first") from exc
        return self._add_socket(sock, name=f"to {describe_address(address)}" if address else "")

    def create_session(self, transport: Transport) -> Session:
        """Talk over a transport of one's own. The session owns and closes it.

        Args:
            transport: A ``MessageTransport``, or any object with its four abstract methods.

        Raises:
            TypeError: It lacks a method.
        """
        self._check_usable()
        if not isinstance(transport, Channel):
            return self._add(ForeignChannel(transport))
        if getattr(transport.send, "__func__", None) is not StreamTransport.send:  # somebody wants to see what is sent
            transport.post = partial(Channel.post, transport)  # type: ignore[method-assign]
            transport.takes_frames = False
        return self._add(transport)

    def create_session_pair(self) -> Tuple[Session, Session]:
        """Two connected sessions of this peer, for tests and demonstrations.

        What one sends the other gets, so ``a.request(message).wait()`` runs the handlers of b.
        """
        self._check_usable()
        import socket

        a, b = socket.socketpair()
        return self.create_socket_session(a), self.create_socket_session(b)

    # -- connections

    def connect(
        self,
        address: Address,
        *,
        ssl_context: Optional[ssl.SSLContext] = None,
        server_hostname: Optional[str] = None,
        timeout: Optional[float] = DEFAULT,
    ) -> Session:
        """Connect to a listening peer.

        Blocks until the connection is there, TLS handshake included. Runs no handlers, but keeps the bytes of the other
        sessions flowing, so a peer can also connect to its own listener. Looking up the name of a host cannot be
        interrupted; it takes as long as the system's resolver lets it, which counts against the timeout.

        With TLS 1.3, a server that refuses our certificate does so after the handshake: then the session ends with a
        ``StreamClosedError`` that says so.

        Args:
            address: A path (Unix socket), or a pair ``(host, port)`` (TCP). If a host has several addresses, they are
                tried one after the other.
            ssl_context: For TLS; needed for every host but this one (127.0.0.0/8, ::1).
            server_hostname: The name that the server's certificate must have, by default the host.
            timeout: Seconds; by default the peer's, None for no limit.

        Returns:
            The session.

        Raises:
            TypeError: An argument is of a wrong kind.
            ValueError: It is no address, or not loopback and there is no ``ssl_context``.
            TimeoutError: It took too long.
            OSError: It failed, and the text names the address: ``ConnectionRefusedError``, ``FileNotFoundError``,
                ``socket.gaierror`` (the host does not resolve), ``ssl.SSLError``, ``PermissionError`` (also if the
                listener of a Unix socket runs as another user), ...
        """
        if timeout is DEFAULT:
            timeout = self.timeout
        else:
            check_timeout(timeout)
        self._check_usable()
        from .listener import open_connection

        outer = self._enter()
        try:
            return open_connection(self, address, ssl_context, server_hostname, timeout)
        finally:
            self._leave(outer)

    def listen(
        self,
        address: Address,
        on_session: Callable[[Session], Any],
        *,
        ssl_context: Optional[ssl.SSLContext] = None,
    ) -> Listener:
        """Accept connections at an address, inside ticks.

        Does not block, but for the system's resolver if the host is a name.

        Args:
            address: A path (Unix socket), or a pair ``(host, port)`` (TCP); port 0 lets the system choose one, which is
                in the listener's ``address``. A Unix socket's file has mode 0600, takes the place of one that a dead
                listener has left, and is removed on close; connections from other users are refused.
            on_session: Called with each new session during a tick, before anything that came over it is dispatched, and
                so the place to register its handlers. What it raises comes out of the call that was ticking; the
                session, which nobody has taken, is closed then.
            ssl_context: For TLS; needed for every address but loopback (127.0.0.0/8, ::1). Without one, whoever can
                reach the port is let in. A connection whose handshake is not over within the peer's timeout (30 s if it
                has none) is dropped. Whether clients need a certificate is for the context to say (``verify_mode``).

        Returns:
            What listens; it closes with the peer at the latest.

        Raises:
            TypeError: An argument is of a wrong kind.
            ValueError: It is no address, or not loopback and there is no ``ssl_context``.
            OSError: It cannot be listened at, and the text names the address: somebody does so already, the path is too
                long, the host does not resolve, ...
        """
        self._check_usable()
        from .listener import open_listener

        outer = self._enter()
        try:
            return open_listener(self, address, on_session, ssl_context)
        finally:
            self._leave(outer)

    def _add_socket(
        self, sock: socket.socket, on_session: Optional[Callable[[Session], Any]] = None, name: str = ""
    ) -> Session:
        """A session over a connected socket, to be handed to ``on_session`` when it is dispatched.

        The name says what it is connected to.
        """
        if _is_tls(sock):
            from .transports.tls import TlsTransport

            channel: StreamTransport = TlsTransport(sock, self.serializer, self.max_frame_size)
        else:
            channel = StreamTransport(sock, [sock], self.serializer, self.max_frame_size)
        if name:
            channel.connected(name)
        return self._add(channel, on_session=on_session)

    def _wait_for(self, fd: int, events: int, limit: Optional[float]) -> bool:
        """Wait for a descriptor that is no session's, moving the sessions' bytes but running no handlers.

        Args:
            fd: The descriptor; -1 just waits.
            events: What to wait for.
            limit: A time of this peer's clock, or None.

        Returns:
            Whether it is ready.
        """
        awaited = _Awaited()
        self._awaited[awaited] = None
        try:
            if fd >= 0:
                self._watch(awaited, fd, events)
            self._pump(awaited, limit, dispatch=False)
        finally:
            self._unwatch(awaited, fd)
            self._awaited.pop(awaited, None)
        return awaited.settled

    def _check_thread(self) -> None:
        """Refuse a call from another thread or from a fork, where ``_enter`` is not needed."""
        if self.thread is not None and self.thread != get_ident():
            raise self._refusal()

    def _check_usable(self) -> None:
        self._check_thread()
        if self._closed:
            raise RuntimeError("this IpcPeer is closed; make a new one")

    def _add(
        self,
        channel: Channel,
        process: Optional[subprocess.Popen[Any]] = None,
        on_session: Optional[Callable[[Session], Any]] = None,
    ) -> Session:
        outer = self._enter()
        try:
            session = Session(self, channel, process)
            self._sessions[session] = None
            if on_session is not None:
                session._begin_with(on_session)
            self._snapshot = None
            self.happenings += 1
            try:
                log.debug("session %s opened%s", session.name, channel.details())
                session._start()
            except BaseException:
                session.close()
                raise
            return session
        finally:
            self._leave(outer)

    @property
    def sessions(self) -> Tuple[Session, ...]:
        """The sessions that are open, in the order in which they were made."""
        if self._snapshot is None:
            self._snapshot = tuple(self._sessions)
        return self._snapshot

    def remove_session(self, session: Session) -> None:
        """Close a session but leave its streams open, to their owner, as they were found. Pending requests fail.

        What is queued is written first, for at most a second; what is left then is lost, be it half a message. A child
        process is left running. ``on_close`` handlers run. Does nothing if the session is closed.

        Raises:
            TypeError: It is no session.
            ValueError: It is no session of this peer.
        """
        if not isinstance(session, Session):
            raise TypeError(f"remove_session() takes a Session, not {session!r:.200}")
        if session.peer is not self:
            raise ValueError(f"{session!r} belongs to another peer")
        outer = self._enter()
        try:
            session._flush_bounded()
            reason = StreamClosedError(f"this side removed the session from its peer ({session.name})")
            session._finish(reason, release=True)
        finally:
            self._leave(outer)

    # -- sending to all

    def broadcast(self, message: Message) -> int:
        """Notify every open session. The message is encoded once per serializer. Only ``on_exception`` handlers run.

        A dead or stuck session hinders no other: the stuck ones together are waited for once, at most for the peer's
        timeout. The ``on_exception`` handlers of a session that did not get it are told.

        Returns:
            How many sessions took it.

        Raises:
            TypeError: ``message`` is no Message.
            SerializationError: It cannot travel. Nobody got it.
            FrameTooLargeError: It is too large for every session. Nobody got it.
        """
        if not isinstance(message, Message) or type(message) in ENVELOPES:
            raise no_message("broadcast", message)
        outer = self._enter()
        try:
            # All frames before the first is sent: by serializer and largest size, a frame or the error that stands for it.
            frames: Dict[Any, Any] = {}
            sessions = [session for session in self.sessions if session._state is OPEN]
            serializer: Any = None
            size = -1
            frame: Any = None
            for session in sessions:
                channel: Any = session.channel
                if not channel.takes_frames:
                    frames[None] = None  # it encodes for itself
                elif channel.serializer is not serializer or channel.max_frame_size != size:  # not as the one before
                    serializer, size = channel.serializer, channel.max_frame_size
                    if (id(serializer), size) not in frames:
                        try:
                            frame = channel.encode(message)
                        except FrameTooLargeError as exc:
                            frame = exc
                        frames[id(serializer), size] = frame
            if frames and all([isinstance(frame, FrameTooLargeError) for frame in frames.values()]):
                raise next(iter(frames.values()))
            taken = 0
            stuck = []
            serializer, size = None, -1
            for session in sessions:
                channel = session.channel
                if not channel.takes_frames:
                    serializer, frame = None, None
                elif channel.serializer is not serializer or channel.max_frame_size != size:
                    serializer, size = channel.serializer, channel.max_frame_size
                    frame = frames[id(serializer), size]
                if channel.queued_bytes > HIGH_WATER:
                    stuck.append((session, frame))
                elif type(frame) is list:
                    # What _send_to does, in place: 2,800 of 10,900 instructions less for each session.
                    try:
                        channel.enqueue(frame)
                        taken += 1
                    except Exception as exc:
                        self._send_to(session, message, exc)
                else:
                    taken += self._send_to(session, message, frame)
            if stuck:
                limit = None if self.timeout is None else self.clock() + self.timeout
                room = Until(lambda: all(s.channel.queued_bytes <= HIGH_WATER or not s._is_writable for s, _ in stuck))
                self._pump(room, limit, dispatch=False)
                for session, frame in stuck:
                    if session._is_writable and session.channel.queued_bytes > HIGH_WATER:
                        session._report(session._stuck_error(self.timeout))
                    else:
                        taken += self._send_to(session, message, frame)
            return taken
        finally:
            self._leave(outer)

    def _send_to(self, session: Session, message: Message, frame: Any) -> int:
        try:
            if type(frame) is list:
                session._send_encoded(frame)
            elif frame is None:
                session.notify(message)
            else:
                session._send_failed(frame)
                raise frame
            return 1
        except Exception as exc:
            session._report(exc)
            return 0

    # -- ticking

    def tick(self, timeout: Optional[float] = 0.0) -> int:
        """One turn over all sessions: write what is queued, read what is there, dispatch it to handlers.

        May be called inside handlers. A request whose deadline has passed is given up by a tick that finds nothing to
        dispatch: its ``wait()`` raises ``RequestTimeoutError`` from then on.

        Args:
            timeout: 0 polls and returns at once; a number waits at most so many seconds for something to happen (a
                message, the end of a session, a queue that has drained, a request that is overdue); None waits until
                something happens. With nothing open, a number sleeps that long.

        Returns:
            How many messages were dispatched.

        Raises:
            StreamClosedError: ``timeout`` is None and nothing is open: it would wait for ever.
            Exception: What an ``on_message`` handler has raised. The next tick goes on behind that message.
        """
        if timeout is not None and timeout != 0:
            check_timeout(timeout)
        return self._turn(timeout, None)

    def tick_for(self, seconds: float) -> int:
        """Tick until so many seconds are over, whatever happens; handlers run.

        Returns:
            How many messages were dispatched.

        Raises:
            TypeError: ``seconds`` is no number.
            ValueError: ``seconds`` is negative.
            Exception: As ``tick``, before the time is over.
        """
        if seconds is None:
            raise TypeError("tick_for() takes a number of seconds, not None")
        check_timeout(seconds)
        limit = self.clock() + seconds
        count = self.tick(0)
        while True:
            left = limit - self.clock()
            if left <= 0:
                return count
            count += self.tick(left)

    def _turn(self, timeout: Optional[float], only: Optional[Session]) -> int:
        """One turn over all sessions, or over one of them."""
        if timeout is None and not (self._sessions or self._endings or self.unfinished or self.listeners):
            raise StreamClosedError(
                "nothing is open, so tick(None) would wait for ever: this IpcPeer has no open session and no listener"
            )
        if self._released:
            if timeout:
                time.sleep(timeout)
            return 0
        limit = self.clock() + timeout if timeout else timeout
        if self.due == math.inf:
            return self._pump(None, limit, only=only)
        while True:
            due = self.due if only is None else only.due
            happenings = self.happenings
            count = self._pump(None, due if due < (math.inf if limit is None else limit) else limit, only=only)
            if count or self.happenings != happenings:
                return count
            # What had come has been dispatched, so the replies that are missing are missing.
            now = self.clock()
            if now < due or self._expire(now, only) or (limit is not None and now >= limit):
                return 0

    def _expire(self, now: float, only: Optional[Session]) -> int:
        """Give up the requests whose deadline has passed; returns how many."""
        count = 0
        for session in self.sessions if only is None else (only,):
            if session.due <= now:
                count += session._expire(now)
        self.due = min([session.due for session in self.sessions], default=math.inf)
        return count

    def _pump(self, until: Any, limit: Optional[float], dispatch: bool = True, only: Optional[Session] = None) -> int:
        """Turn until something has happened, or the clock has reached ``limit``.

        This is the loop behind every call that waits. One round waits for descriptors, writes and reads what is ready,
        then dispatches what is in the inboxes.

        Args:
            until: What should happen: anything with an attribute ``settled``. What is there already counts even if the
                time is over. None for whatever happens first, be it nothing new: a tick.
            limit: A time of this peer's clock, 0 for one round without waiting, or None.
            dispatch: False only moves bytes and leaves messages in the inboxes.
            only: The session to look at, None for all.

        Returns:
            How many messages were dispatched.
        """
        me = get_ident()
        outer = self.thread
        if outer is None:
            self.thread = me
        elif outer != me:
            raise self._refusal()
        work = self.work
        starving = not dispatch or self._depth >= MAX_DEPTH
        count = 0
        try:
            if only is not None and len(self._sessions) == 1 and not self.listeners:
                only = None
            if self.unfinished:
                self._catch_up()
            if starving:
                self._starve(1)
                if until is not None and until.settled:
                    return 0
            happenings = self.happenings
            polled = False
            while True:
                # A tick reads before it dispatches, so that one busy inbox does not keep others from being read. A wait
                # looks first at what is there.
                if polled or until is not None:
                    if work and dispatch:
                        if starving:
                            count += self._settle_all()
                        elif len(work) == 1 and only is None:  # nobody to take turns with
                            self._depth += 1
                            try:
                                for session in work:
                                    break
                                count += session._dispatch(0, until)
                            finally:
                                self._depth -= 1
                        else:
                            count += self._dispatch(until, only)
                        if self.thread == _FORKED:  # a handler has forked, and this is the copy
                            raise self._refusal()
                    if until is None:
                        if count or limit == 0 or self.happenings != happenings:
                            return count
                        if limit is None and not (self._sessions or self._endings or self.listeners):
                            return count
                    elif until.settled or not (self._sessions or self._awaited):
                        return count
                wait = _CHECK_INTERVAL
                now = self.clock()
                if limit is not None:
                    left = limit - now if limit else 0
                    if left < wait:
                        if left <= 0:
                            if polled:
                                return count
                            left = 0
                        wait = left
                if work:
                    for session in tuple(work):
                        session._limit_reading()
                    if not starving and self._has_work(only):
                        wait = 0
                polled = True
                if self.corked:
                    for session in tuple(self.corked):
                        session._flush_corked()
                by_time = self._intervals or self._endings
                if by_time:
                    wait = self._shorten(wait)
                poller = self.poller
                try:
                    events = poller.poll(wait) if only is None else self._poll_one(wait, only)
                except (OSError, ValueError):
                    if self._released:  # by a signal handler, meanwhile
                        return count
                    raise
                owners = poller.owners
                for fd, mask in events:
                    owner = owners.get(fd)
                    if owner is None:  # closed by one that was ready before; or its descriptor was closed by its owner
                        self._forget_lost()
                    else:
                        if mask == READ:
                            owner._read(fd)
                        else:
                            owner._ready(fd, mask)
                if by_time:
                    self._look()
                # Also if others are busy all the time.
                if (now >= self._check_due or (wait and not events)) and (self._sessions or self.listeners):
                    self._check_streams()
        finally:
            if starving:
                self._starve(-1)
            if self.thread == me:  # not in a copy that a handler forked
                self.thread = outer
            if self.wake is not None:
                self._update_wake()

    def _forget_lost(self) -> None:
        if self.poller.forget_lost() and self._outer is not None:
            self._outer.watch(self.poller.fileno(), READ, None)

    def _catch_up(self) -> None:
        """Do what interruptions have left undone."""
        for session in tuple(self.unfinished):
            session._catch_up()

    def _starve(self, change: int) -> None:
        self.starving += change
        for session in tuple(self._paused):
            session._update_reading()

    def _poll_one(self, wait: float, session: Session) -> List[Tuple[int, int]]:
        always = [(fd, mask) for fd, mask in session._watched.items() if self.poller.is_always(fd)]
        if always:
            wait = 0
        if not hasattr(select, "poll"):
            single = Poller()
            for fd, mask in session._watched.items():
                single.watch(fd, mask, session)
            try:
                return single.poll(wait)
            finally:
                single.close()
        poller = select.poll()
        for fd, mask in session._watched.items():
            if not self.poller.is_always(fd):
                poller.register(fd, mask)
        return [*poller.poll(math.ceil(wait * 1000)), *always]

    def _shorten(self, wait: float) -> float:
        now = time.monotonic()
        for session, due in tuple(self._intervals.items()):
            wait = min(wait, due - now if due > now else session._interval())
        if self._endings:
            wait = min(wait, POLL_INTERVAL)
        return wait

    def _look(self) -> None:
        now = time.monotonic()
        for session, due in tuple(self._intervals.items()):
            if due <= now:
                rest = session._look()
                if rest and session in self._intervals:
                    self._intervals[session] = now + rest
        if self._endings:
            self._endings = [ending for ending in self._endings if ending.step() is not None]

    def _check_streams(self) -> None:
        """Look at some sessions whether their streams are still what they were."""
        self._check_due = self.clock() + _CHECK_INTERVAL / 10
        sessions = self.sessions
        if len(sessions) > _CHECK_SESSIONS:
            at = self._check_at % len(sessions)
            self._check_at = at + _CHECK_SESSIONS
            sessions = sessions[at : at + _CHECK_SESSIONS]
        for session in sessions:
            session._find_invalid()
        for listener in tuple(self.listeners):
            listener._check()

    def _has_work(self, only: Optional[Session]) -> bool:
        if only is not None:
            return only in self.work and only._has_work
        for session in self.work:
            if session._has_work:
                return True
        return False

    def _dispatch(self, until: Any, only: Optional[Session]) -> int:
        """Dispatch what is in the inboxes, session by session in turn, until ``until`` has settled."""
        work = self.work
        self._depth += 1
        try:
            if only is not None:
                return only._dispatch(0, until)
            count = 0
            # Not more than is there now: what nested ticks read meanwhile has its turn in the next tick.
            goal = self.turns + sum([session._backlog for session in work])
            while work:
                before = self.turns
                for session in tuple(work):
                    count += session._dispatch(_SLICE, until)
                    if self.turns >= goal or (until is not None and until.settled):
                        return count
                if self.turns == before:  # what is there cannot be dispatched now
                    break
            return count
        finally:
            self._depth -= 1

    def _settle_all(self) -> int:
        return sum(session._settle_replies() for session in tuple(self.work))

    # -- for sessions

    def _bad_id(self, id: Any) -> ValueError:
        """The error for what the id generator made."""
        name = type(self.id_generator).__name__
        if isinstance(id, str) and type(id) is not str:
            return ValueError(f"{name}.generate() returned {id!r:.100} of a class derived from str; it must be a plain str")
        if type(id) is str and len(id) <= MAX_ID:
            return ValueError(f"{name}.generate() returned {id!r}, which a pending request has already")
        return ValueError(f"{name}.generate() returned {id!r:.100}, not a str of at most {MAX_ID} characters")

    def _add_ending(self, ending: Ending) -> None:
        """Something is left to be done after a session's end; ticks do it step by step."""
        if ending not in self._endings:
            self._endings.append(ending)

    def _finish_endings(self, endings: Sequence[Ending]) -> None:
        """Block until these are done, side by side."""
        finish(endings)
        self._endings = [e for e in self._endings if e not in endings]

    def _set_interval(self, session: Any, on: bool, rest: float = 0.0) -> None:
        """A session, or a listener, is to be looked at by time: now, unless it has been and has a rest."""
        if not on:
            self._intervals.pop(session, None)
        elif not rest or session not in self._intervals:
            self._intervals[session] = 0.0

    def _set_paused(self, session: Session, paused: bool) -> None:
        """A session is not read from because its inbox is long."""
        if paused:
            self._paused[session] = None
        else:
            self._paused.pop(session, None)

    def _watch(self, session: Any, fd: int, events: int) -> None:
        """Watch a descriptor of a session, or watch it for other events than before.

        It may be another owner than a session, too: what has ``_read(fd)``, ``_ready(fd, events)`` and ``_find_invalid()``.
        """
        owner = self.poller.owners.get(fd)
        if owner is not None and owner is not session:
            # The number was given to a new file, so the old owner's stream was closed without his knowing.
            self.poller.unwatch(fd)
            owner._find_invalid()
        self.poller.watch(fd, events, session)

    def _unwatch(self, session: Any, fd: int) -> None:
        """Watch a descriptor no longer, if it is still the session's."""
        if self.poller.owners.get(fd) is session:
            self.poller.unwatch(fd)

    def _discard(self, session: Session) -> None:
        """A session has ended."""
        self.happenings += 1
        self._sessions.pop(session, None)
        self._snapshot = None
        for group in (self.work, self._intervals, self._paused, self.corked):
            group.pop(session, None)

    # -- embedding

    def fileno(self) -> int:
        """A descriptor that becomes readable when ``tick(0)`` has something to do, for any other loop.

        Wait for it, at most for as long as ``next_deadline()`` says, then call ``tick(0)``, in either case. What is due
        by time cannot wake it: the deadlines of requests, transports and files without a descriptor that can be waited
        for, children that are ending.

        Raises:
            OSError: This platform has none (Windows): call ``tick`` now and then.
            RuntimeError: The peer is closed.
        """
        self._check_usable()
        if self.wake is None:
            self.poller.fileno()  # or there is none
            if self._pipe is None:
                for self._pipe in starmap(os.pipe, [()]):  # see the note in transports/descriptors.py
                    break
            assert self._pipe is not None
            for fd in self._pipe:
                os.set_blocking(fd, False)
            # A poller around the poller, because the pipe is not for the loop in _pump().
            if self._outer is None:
                self._outer = Poller()
            self._outer.watch(self.poller.fileno(), READ, None)
            self._outer.watch(self._pipe[0], READ, None)
            self.wake = self._pipe
            self._update_wake()
        assert self._outer is not None
        return self._outer.fileno()

    def next_deadline(self) -> Optional[float]:
        """In how many seconds at the latest ``tick(0)`` is to be called though ``fileno()`` is not readable.

        For any other loop: ask whenever it is about to wait, so after each ``tick(0)`` and also after each ``request()``,
        which may have brought an earlier deadline. Does not block and runs no handlers. It looks through all pending
        requests.

        Returns:
            Seconds until the first pending request is overdue, or until something is to be looked at by time: a transport
            or a file that has no descriptor to wait for, a child that is ending, and where there is no pidfd (macOS,
            Python 3.8) every child. 0.0 if something is due now or waits in an inbox. None if nothing is: then only
            ``fileno()`` can tell of something new.
        """
        if self._closed and not self._is_forked:
            return None
        outer = self._enter()
        try:
            if self.unfinished or self.poller.has_always or self._has_work(None):
                return 0.0
            if any([session.queued_bytes for session in self.corked]):
                return 0.0  # a tick lets out what a batch has gathered
            wait = self._shorten(math.inf)
            for session in self.sessions:
                if session.due != math.inf:
                    session._expire(-math.inf)  # none; it finds out which is the next
            self.due = min([session.due for session in self.sessions], default=math.inf)
            wait = min(wait, self.due - self.clock())
            return None if wait == math.inf else max(0.0, wait)
        finally:
            self._leave(outer)

    def _update_wake(self) -> None:
        """Make the descriptor of ``fileno`` tell what stands in the inboxes."""
        # The pipe holds a byte just while an inbox has work, because then no other descriptor may be ready.
        assert self.wake is not None
        awake = bool(self.work) and self._has_work(None)
        if awake != self._awake:
            self._awake = awake
            try:
                if awake:
                    os.write(self.wake[1], b"\0")
                else:
                    os.read(self.wake[0], 1)
            except BlockingIOError:
                pass  # an interrupted call has done it already

    # -- closing

    def close(self) -> None:
        """Close every session, and end the children that were started, side by side. A second call does nothing.

        What is queued is written first, for at most a second in all. TCP connections on which the other side is still
        talking are kept until it closes them, for a second more at most. Then ``on_close`` handlers run, and children are
        waited for, 6 s in the worst case: see ``Session.close``. Listeners close, too.
        """
        if self._released:
            return
        if self._is_forked:
            self._closed = self._released = True
            for listener in tuple(self.listeners):
                listener._end()
            for session in tuple(self._sessions):
                session.close()
            return
        outer = self._enter()
        try:
            self._shut_down()
        finally:
            self._leave(outer)

    def _shut_down(self) -> None:
        sessions = tuple(self._sessions)
        self._begin_close()
        try:
            self._write_queued(FLUSH_BOUND)
            self._finish_sessions(sessions)
        finally:  # an on_close handler may have been interrupted
            self._finish_sessions((*self._sessions, *self.unfinished))
            self._finish_endings(self._endings)
            self._release()

    def _begin_close(self) -> None:
        self._closed = True
        for listener in tuple(self.listeners):
            listener._end()
        for session in tuple(self._sessions):
            if session.is_open:
                session._begin_close()

    def _write_queued(self, seconds: float) -> None:
        done = Until(lambda: not any(session.queued_bytes for session in self._sessions))
        self._pump(done, self.clock() + seconds, dispatch=False)

    def _finish_sessions(self, sessions: Sequence[Session]) -> None:
        # Before the first on_close handler runs: it might wait for one of these.
        for session in sessions:
            session._fail_pending(StreamClosedError("this side closed the peer"))
        for session in sessions:
            session._finish(StreamClosedError("this side closed the peer"))

    def _release(self) -> None:
        self._closed = True
        if self._outer is not None:
            self._outer.close()
        self.poller.close()
        if self._pipe is not None:
            ends = [(fd, fd) for fd in self._pipe]
            self.wake = None
            self._pipe = None
            close_streams(ends)
        self._released = True

    def _forget_fork(self) -> None:
        """This is the copy in a forked process."""
        self.thread = _FORKED
        for session in tuple(self._sessions):
            session._note_forked()
        self.wake = None  # the pipe is the other process's too


class _Awaited:
    """Whose a descriptor is while ``_wait_for`` waits for it."""

    def __init__(self) -> None:
        self.settled = False

    def _read(self, fd: int) -> None:
        self.settled = True

    def _ready(self, fd: int, events: int) -> None:
        self.settled = True

    def _find_invalid(self) -> None:
        self.settled = True


def _is_tls(stream: Any) -> bool:
    ssl = sys.modules.get("ssl")  # importing it takes 20 ms, and whoever has an SSLSocket has imported it
    return ssl is not None and isinstance(stream, ssl.SSLSocket)


def _close_all() -> None:
    """At exit: what is queued leaves, children are ended; of all peers side by side, because each may take its time."""
    peers = [peer for peer in tuple(_peers) if not peer._released and peer.thread != _FORKED]
    for peer in peers:
        peer.thread = None  # its thread has ended, or will never run again
    left = [peer for peer in peers if _try_at_exit(peer, peer._begin_close)]
    due = time.monotonic() + FLUSH_BOUND
    while left and time.monotonic() < due:
        left = [peer for peer in left if any([session.queued_bytes for session in peer._sessions])]
        left = [peer for peer in left if _try_at_exit(peer, partial(peer._write_queued, _EXIT_TURN))]
    for peer in peers:
        _try_at_exit(peer, partial(peer._finish_sessions, tuple(peer._sessions)))
    try:
        finish([ending for peer in peers for ending in peer._endings])
    except Exception:
        log.error("ending children at exit failed", exc_info=True)
    for peer in peers:
        _try_at_exit(peer, peer._shut_down)


def _try_at_exit(peer: IpcPeer, step: Callable[[], None]) -> bool:
    try:
        outer = peer._enter()
        try:
            step()
        finally:
            peer._leave(outer)
    except Exception:
        log.error("closing %r at exit failed", peer, exc_info=True)
        return False
    return True


def _after_fork() -> None:
    for peer in tuple(_peers):
        peer._forget_fork()
    _peers.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
