"""The sessions of one program, and the calls that drive them, as users see them.

Checks what users pass, opens streams, and hands everything else on to the loop behind it.
"""

from __future__ import annotations

import sys

from . import log
from .core.conditions import Until
from .core.conversation import Conversation
from .core.dispatcher import HIGH_WATER
from .core.lifecycle import adopt, close_loop, drop_loop
from .core.loop import Loop
from .errors import FrameTooLargeError
from .ids import PidCounterRequestIdGenerator
from .messages import Message
from .promise import DEFAULT, check_timeout
from .session import Session, check_message, conversation_of, sendable
from .transports.connections import is_tls, socket_channel
from .transports.foreign import ForeignChannel
from .transports.stream import DEFAULT_MAX_FRAME_SIZE, StreamChannel, channel_of, open_streams
from .wire.codec import check_max_frame_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    import ssl
    import subprocess
    from collections.abc import Callable, Mapping
    from typing import IO, Any

    from .listener import Listener
    from .protocols import MessageSerializer, RequestIdGenerator
    from .transports.base import Channel, Transport
    from .transports.process import Command, Path
    from .transports.sockets import Address
    from .transports.stream import ReadStream, WriteStream

__all__ = ["IpcPeer"]


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
        _check_plugin("serializer", serializer, "serialize", "deserialize")
        _check_plugin("id_generator", id_generator, "generate")
        self.serializer = serializer
        self.id_generator = id_generator
        self.timeout = timeout
        self.max_frame_size = max_frame_size
        self._loop = Loop()
        adopt(self._loop)

    def __repr__(self) -> str:
        try:
            loop = self._loop
            state = "open" if not loop.closed else "closed" if loop.released else "closing"
            state = "forked" if loop.forked else state
            return (
                f"<IpcPeer {state} sessions={len(loop.conversations)} listeners={len(loop.listeners)}"
                f" serializer={type(self.serializer).__name__}>"
            )
        except Exception:  # half made
            return "<IpcPeer>"

    def __enter__(self) -> IpcPeer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        loop = getattr(self, "_loop", None)
        if loop is not None and not loop.released and not loop.forked:
            drop_loop(loop, repr(self))

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
        from .transports.stdio import StdioChannel

        return self._add(StdioChannel(self.serializer, self.max_frame_size))

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
        from .transports.process import ProcessChannel

        return self._add(ProcessChannel(process, False, self.serializer, self.max_frame_size))

    def create_command_session(
        self,
        command: Command,
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stderr: int | IO[Any] | None = _PIPE,
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
        from .transports.children import kill, process_name
        from .transports.process import ProcessChannel, spawn

        process = spawn(command, cwd, env, stderr)
        try:
            log.debug("%s started", process_name(process))
            return self._add(ProcessChannel(process, True, self.serializer, self.max_frame_size))
        except BaseException:
            if not any([session.process is process for session in self.sessions]):  # nobody has it yet
                kill(process)
            raise

    def create_stream_session(
        self, write: WriteStream, read: ReadStream, read2: ReadStream | None = None
    ) -> Session:
        """Talk over any streams: file objects, sockets or raw descriptors. The session owns and closes them.

        A stream with a descriptor is used by its descriptor. An object that has none (its ``fileno()`` is missing or
        refuses), or whose bytes are others than the descriptor's (``gzip.GzipFile``), is used by its methods, which must
        not block: ``read(n)`` returns bytes, ``b""`` at the end, None when nothing is there; ``write(data)`` returns how
        many bytes it took, or None for none. It is asked on every tick, and at least every 10 ms while waiting. What such
        a method raises is the end of the session and the cause of its ``StreamClosedError``. A stream that blocks is
        bridged by ``os.pipe`` and a thread of one's own: see ``examples/blocking_stream.py``.

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
        if any([is_tls(stream) for stream in (write, *reads)]):
            raise ValueError("an SSLSocket is written and read in one; pass it to create_socket_session()")
        return self._add(StreamChannel(*open_streams(write, reads), self.serializer, self.max_frame_size))

    def create_socket_session(self, sock: socket.socket) -> Session:
        """Talk over a connected stream socket, also an ``ssl.SSLSocket``. The session owns and closes it.

        Does not block, also if the TLS handshake is still to be made: ticks make it.

        Raises:
            TypeError: It is no socket.
            ValueError: It is no stream socket, or not connected.
        """
        self._check_usable()
        import socket

        from .transports.sockets import describe_address, tune

        if not isinstance(sock, socket.socket):
            raise TypeError(f"create_socket_session() takes a socket, not {sock!r:.100}")
        if sock.type != socket.SOCK_STREAM:
            raise ValueError(f"{sock!r} is no stream socket; messages need SOCK_STREAM")
        try:
            address = sock.getpeername()
        except OSError as exc:
            raise ValueError(f"{sock!r} cannot be used: {exc}; connect it first") from exc
        tune(sock)
        return self._add_socket(sock, f"to {describe_address(address)}" if address else "")

    def create_session(self, transport: Transport) -> Session:
        """Talk over a transport of one's own. The session owns and closes it.

        Args:
            transport: A ``MessageTransport``, or any object with its four abstract methods.

        Raises:
            TypeError: It lacks a method.
        """
        self._check_usable()
        return self._add(channel_of(transport) or ForeignChannel(transport))

    def create_session_pair(self) -> tuple[Session, Session]:
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
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
        timeout: float | None = DEFAULT,
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

        loop = self._loop
        outer = loop.enter()
        try:
            return self._add_socket(*open_connection(loop, address, ssl_context, server_hostname, timeout))
        finally:
            loop.thread = outer

    def listen(
        self,
        address: Address,
        on_session: Callable[[Session], Any],
        *,
        ssl_context: ssl.SSLContext | None = None,
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

        loop = self._loop
        outer = loop.enter()
        try:
            return open_listener(loop, address, self._accept(on_session), lambda: self.timeout, ssl_context)
        finally:
            loop.thread = outer

    def _accept(self, on_session: Callable[[Session], Any]) -> Callable[[socket.socket, str], Any]:
        """Return what a listener calls with each connection."""
        if not callable(on_session):
            raise TypeError(f"on_session must be a function that takes a session, not {on_session!r:.100}")
        return lambda sock, name: self._add_socket(sock, name, on_session)

    def _add_socket(
        self, sock: socket.socket, name: str = "", on_session: Callable[[Session], Any] | None = None
    ) -> Session:
        """Add a session over a connected socket, to be handed to ``on_session`` when it is dispatched."""
        channel = socket_channel(sock, self.serializer, self.max_frame_size)
        if name:
            channel.connected(name)
        return self._add(channel, on_session)

    def _check_usable(self) -> None:
        self._loop.check_entry()
        if self._loop.closed:
            raise RuntimeError("this IpcPeer is closed; make a new one")

    def _add(self, channel: Channel, on_session: Callable[[Session], Any] | None = None) -> Session:
        loop = self._loop
        outer = loop.enter()
        try:
            session = Session(lambda session: Conversation(loop, channel, self, session))
            conversation = conversation_of(session)
            loop.add(conversation)
            if on_session is not None:
                conversation.dispatcher.begin_with(on_session)
            try:
                log.debug("session %s opened%s", session.name, channel.details())
                conversation.port.rearm()
            except BaseException:
                session.close()
                raise
            return session
        finally:
            loop.thread = outer

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions that are open, in the order in which they were made."""
        return tuple([conversation.session for conversation in self._loop.conversations])

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
        self._loop.check_entry()
        conversation_of(session).close(release=True)

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
        if type(message) not in sendable:
            check_message("broadcast", message)
        loop = self._loop
        outer = loop.enter()
        try:
            targets = [conversation for conversation in loop.conversations if conversation.is_open]
            frames = _encode_for(targets, message)
            stuck = []
            taken = 0
            for target in targets:
                if target.channel.queued_bytes > HIGH_WATER:
                    stuck.append(target)
                else:
                    taken += _send_to(target, message, frames[target.channel.share])
            if stuck:
                limit = None if self.timeout is None else loop.clock() + self.timeout
                room = Until(lambda: all([c.channel.queued_bytes <= HIGH_WATER or not c.is_writable for c in stuck]))
                loop.run(room, limit, dispatch=False)
                for target in stuck:
                    if target.is_writable and target.channel.queued_bytes > HIGH_WATER:
                        target.look_for_room(limit)
            for target in stuck:
                if target.is_writable and target.channel.queued_bytes > HIGH_WATER:
                    target.dispatcher.report(target.stuck_error(self.timeout))
                else:
                    taken += _send_to(target, message, frames[target.channel.share])
            return taken
        finally:
            loop.thread = outer

    # -- ticking

    def tick(self, timeout: float | None = 0.0) -> int:
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
        return self._loop.tick(timeout)

    def tick_for(self, seconds: float) -> int:
        """Tick until so many seconds are over, whatever happens but ``wakeup()``; handlers run.

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
        clock = self._loop.clock
        limit = clock() + seconds
        wakeups = self._loop.wakeups
        count = self.tick(0)
        while True:
            left = limit - clock()
            if left <= 0 or self._loop.wakeups != wakeups:
                return count
            count += self.tick(left)

    def wakeup(self) -> None:
        """Make the tick that is under way, or else the next one, return at once, be it with 0; ``tick_for``, too.

        A ``wait()``, ``receive()``, ``flush()`` or ``connect()`` looks around and goes on. For a program that waits for
        something else, too: the handler of SIGTERM sets a flag and calls this, a thread puts its result into a queue and
        calls this, and the loop around ``tick(None)`` looks.

        The one method that any thread and any signal handler may call at any time. Neither blocks nor raises. Does nothing
        once the peer is closed, nor in a forked copy of the process. Several calls before one tick count once.
        """
        if not self._loop.closed and not self._loop.forked:
            self._loop.waker.wake()

    # -- inside another loop

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
        return self._loop.fileno()

    def next_deadline(self) -> float | None:
        """In how many seconds at the latest ``tick(0)`` is to be called though ``fileno()`` is not readable.

        For any other loop: ask whenever it is about to wait, so after each ``tick(0)`` and also after each ``request()``,
        which may have brought an earlier deadline. Does not block and runs no handlers. It looks through all pending
        requests.

        Returns:
            Seconds until the first pending request is overdue, or until something is to be looked at by time: a transport
            or a file that has no descriptor to wait for, a child that is ending, and where there is no pidfd (macOS)
            every child. 0.0 if something is due now or waits in an inbox. None if nothing is: then only
            ``fileno()`` can tell of something new.
        """
        loop = self._loop
        if loop.closed and not loop.forked:
            return None
        outer = loop.enter()
        try:
            return loop.next_deadline()
        finally:
            loop.thread = outer

    # -- closing

    def close(self) -> None:
        """Close every session, and end the children that were started, side by side. A second call does nothing.

        What is queued is written first, for at most a second in all. TCP connections on which the other side is still
        talking are kept until it closes them, for a second more at most. Then ``on_close`` handlers run, and children are
        waited for, 6 s in the worst case: see ``Session.close``. Listeners close, too.
        """
        loop = self._loop
        if loop.released:
            return
        outer = loop.enter()
        try:
            close_loop(loop)
        finally:
            loop.thread = outer


def _check_plugin(kind: str, plugin: Any, *names: str) -> None:
    for name in names:
        if not callable(getattr(plugin, name, None)):
            raise TypeError(f"{kind} has no method {name}(): {plugin!r:.100}")
    if isinstance(plugin, type):
        raise TypeError(f"{plugin!r} is a class; pass an instance: {plugin.__name__}()")


def _encode_for(targets: list[Conversation], message: Message) -> dict[Any, Any]:
    """Encode a message before it is sent to anybody.

    Returns:
        For each ``share`` of the targets' channels a frame, or the error that stands for it; None where a channel encodes
        for itself.

    Raises:
        FrameTooLargeError: It is too large for all of them.
    """
    frames: dict[Any, Any] = {}
    for target in targets:
        share = target.channel.share
        if share not in frames:
            try:
                frames[share] = None if share is None else target.channel.encode(message)
            except FrameTooLargeError as exc:
                frames[share] = exc
    if frames and all([isinstance(frame, FrameTooLargeError) for frame in frames.values()]):
        raise next(iter(frames.values()))
    return frames


def _send_to(target: Conversation, message: Message, frame: Any) -> int:
    try:
        if target.port.invalid is not None:
            raise target.closed_error()
        if frame is None:
            target.notify(message)
        elif isinstance(frame, Exception):
            raise frame
        else:
            target.send_frame(frame)
        return 1
    except Exception as exc:
        target.dispatcher.report(exc)
        return 0
