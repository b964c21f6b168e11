"""How a peer gets its sessions: over streams, sockets, child processes, connections and transports.

Checks what users pass, opens it, and hands the session to the loop of the peer. Must not know frames.
"""

from __future__ import annotations

from functools import partial

from . import log
from .arguments import DEFAULT, PIPE, Facade, check_timeout, name_methods
from .core.poller import IN_USE
from .errors import InvalidStreamError
from .handlers import check_handler
from .session import Session, conversation_of
from .transports.stream_channel import StreamChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    import ssl
    import subprocess
    from collections.abc import Callable, Mapping
    from typing import IO, Any

    from typing_extensions import Unpack

    from .core.loop import Loop
    from .listener import Listener
    from .protocols import MessageSerializer, RequestIdGenerator
    from .transports.channel import Channel
    from .transports.message_transport import Transport
    from .transports.sockets import Address
    from .transports.spawn import Command, Path, PopenOptions
    from .transports.streams import ReadStream, WriteStream

__all__ = ["OpeningMethods"]


class OpeningMethods(Facade):
    """The part of ``IpcPeer`` that opens sessions."""

    if TYPE_CHECKING:
        serializer: MessageSerializer
        id_generator: RequestIdGenerator
        timeout: float | None
        max_frame_size: int
        _loop: Loop

    def create_stdio_session(self) -> Session:
        """Talk over this process's stdin and stdout, as a worker does.

        Takes them over until the session is closed: what is printed, also by
        programs that this process starts, goes to stderr, each line at once, or
        nowhere if that is the stream of the session itself (inetd,
        ``stderr=STDOUT``); reading ``sys.stdin`` gives end of file.

        Raises:
            RuntimeError: They are taken over already.
            InvalidStreamError: Descriptor 0 or 1 is closed, or ``sys.stdin``
                has already read ahead.
        """
        from .transports.stdio import StdioChannel

        return _make_session(self, "stdio", StdioChannel)

    def create_process_session(self, process: subprocess.Popen[Any]) -> Session:
        """Attach to a ``subprocess.Popen``; to end and reap it stays its owner's.

        It was started with ``stdin=PIPE, stdout=PIPE`` and optionally
        ``stderr=PIPE``, of which each line arrives as ``LogMessage(text,
        "stderr")``. The session owns the three streams and closes them.

        Raises:
            ValueError: It is no ``subprocess.Popen`` with binary pipes.
        """
        from .transports.process import ProcessChannel

        return _make_session(self, process, partial(ProcessChannel, process))

    def create_command_session(
        self,
        command: Command,
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stderr: int | IO[Any] | None = PIPE,
        **popen: Unpack[PopenOptions],
    ) -> Session:
        """Start a process and talk over its stdin and stdout.

        Closing the session ends and reaps it. A program that does not talk, or
        fails at once, is noticed later: what it prints arrives as
        ``LogMessage``, and its end is a ``StreamClosedError``.

        Leave SIGPIPE as Python sets it (``SIG_IGN``); a ``RuntimeWarning`` says
        so. Its default would end this process when a child has died.

        Args:
            command: The program and its arguments: a list, and no shell.
            cwd: The folder to start it in.
            env: Its environment; by default this process's.
            stderr: ``subprocess.PIPE`` (the default: each line arrives as
                ``LogMessage(text, "stderr")``), None to share this process's
                stderr, or whatever else ``subprocess.Popen`` takes.
            popen: Other keywords of ``subprocess.Popen``, but for what the
                conversation needs as it is (``stdin``, ``shell``, ``text``,
                ...). With ``start_new_session=True`` or ``process_group=0``
                closing signals the whole process group. Without ``pipesize``
                the pipes are made larger once a message needs it, on Linux.

        Raises:
            TypeError: An argument is of a wrong kind, or cannot be passed.
            ValueError: ``command`` is empty, or ``stderr`` has no descriptor.
            OSError: It cannot be started: ``FileNotFoundError``, ...
        """
        self._loop.check_open()
        from .transports.children import kill, process_name
        from .transports.process import ProcessChannel
        from .transports.spawn import spawn

        group = bool(popen.get("start_new_session")) or popen.get("process_group") == 0
        process: Any = None
        try:
            for process in map(spawn, (command,), (cwd,), (env,), (stderr,), (popen,)):
                break  # stored before a signal is looked at
            log.debug("%s started", process_name(process))
            make = partial(ProcessChannel, process, owned=True, group=group, growable="pipesize" not in popen)
            return _make_session(self, process, make)
        except BaseException:
            if process is not None:
                try:
                    _close_orphans(self, lambda session: session.process is process)
                finally:
                    kill(process, group)
            raise

    def create_stream_session(self, write: WriteStream, read: ReadStream, read2: ReadStream | None = None) -> Session:
        """Talk over any streams: file objects, sockets or raw descriptors.

        The session owns and closes them. An object that has no descriptor (its
        ``fileno()`` is missing or refuses), or whose bytes are others than the
        descriptor's (``gzip.GzipFile``), is used by its methods, which must not
        block: ``read(n)`` returns bytes, ``b""`` at the end, None when nothing
        is there; ``write(data)`` returns how many bytes it took, or None for
        none. They are called on every tick, and at least every 10 ms while
        waiting. What they raise is the end of the session. For a stream that
        blocks see ``examples/blocking_stream.py``; in place of a socket's
        ``makefile("rwb")``, which blocks, pass the socket. What a file object
        has read ahead is used, unless it is text.

        ``read`` may be the same as ``write``; ``read2`` is a second input.

        Raises:
            InvalidStreamError: A stream is closed or another session's, or has
                neither a descriptor nor such methods, or has read text ahead.
                The streams stay open.
            OSError: No descriptor is left, and one is needed.
            ValueError: There is an ``ssl.SSLSocket`` among them.
        """
        from .transports.streams import open_channel

        reads = (read,) if read2 is None else (read, read2)
        return _make_session(self, (write, *reads), partial(open_channel, write, reads))

    def create_socket_session(self, sock: socket.socket) -> Session:
        """Talk over a connected stream socket, also an ``ssl.SSLSocket``.

        The session owns and closes it. If the TLS handshake is still to be
        made, ticks make it. A Unix socket's ``SO_SNDBUF`` is raised once a
        message needs it, unless it was set.

        Raises:
            TypeError: It is no socket.
            ValueError: It is no stream socket, or not connected.
        """
        from .transports.sockets import check_connected

        return _add_socket(self, sock, check_connected(sock))

    def create_session(self, transport: Transport) -> Session:
        """Talk over a transport of one's own, which the session owns and closes.

        That is a ``MessageTransport``, or has its four abstract methods.

        Raises:
            TypeError: It lacks a method.
            InvalidStreamError: A session of this peer talks over it, it is
                closed, or one of its descriptors cannot be waited for. It stays
                as it was.
        """
        if any([other.channel.transport is transport for other in [*self._loop.conversations]]):
            raise InvalidStreamError(f"{type(transport).__name__} belongs to another session of this peer; {IN_USE}")
        from .transports.message_transport import channel_of

        return _make_session(self, transport, lambda *_: channel_of(transport))

    def create_session_pair(self) -> tuple[Session, Session]:
        """Return two connected sessions of this peer, for tests.

        ``a.request(message).wait()`` runs the handlers of b.

        Example:
            parent, worker = peer.create_session_pair()
            worker.on_request(work)
            assert parent.request(TaskRequest("a")).wait() == TaskResponse("A")
        """
        import socket

        a, b = _add_own_sockets(self, *socket.socketpair())
        return a, b

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

        Blocks until the connection is there, TLS handshake included. Runs no
        handlers, but keeps the bytes of the other sessions flowing, so a peer
        can also connect to its own listener. A look-up of a host's name
        cannot be interrupted; its time counts. With TLS 1.3, a server refuses
        our certificate after the handshake: then the session ends with a
        ``StreamClosedError`` that says so.

        Args:
            address: A path (Unix socket), or a pair ``(host, port)`` (TCP), of
                which all addresses are tried.
            ssl_context: For TLS; needed for every host but 127.0.0.0/8, ::1.
            server_hostname: The name that the server's certificate must have,
                by default the host.
            timeout: Seconds; by default the peer's, None for no limit.

        Raises:
            TypeError: An argument is of a wrong kind.
            ValueError: It is no address, or not loopback and there is no
                ``ssl_context``.
            TimeoutError: It took too long.
            OSError: It failed: ``ConnectionRefusedError``, ``ssl.SSLError``,
                ``FileNotFoundError``, ``socket.gaierror`` (the host does not
                resolve), ``PermissionError`` (also if the listener of a Unix
                socket runs as another user), ...
        """
        if timeout is DEFAULT:
            timeout = self.timeout
        else:
            check_timeout(timeout)
        loop = self._loop
        loop.check_open()
        from .core.connecting import open_connection

        sock, name = loop.inside(open_connection, loop, address, ssl_context, server_hostname, timeout)
        return _add_own_sockets(self, sock, name=name)[0]

    def listen(
        self,
        address: Address,
        on_session: Callable[[Session], Any],
        *,
        ssl_context: ssl.SSLContext | None = None,
    ) -> Listener:
        """Accept connections at an address, inside ticks.

        Args:
            address: As for ``connect``. Port 0 lets the system choose one,
                which is in the listener's ``address``. A Unix socket's file has
                mode 0600, takes the place of one that a dead listener has left,
                and is removed on close; other users are refused.
            on_session: Called with each new session during a tick, before
                anything that came over it is dispatched: the place to register
                handlers. What it raises comes out of the tick, and closes the
                session.
            ssl_context: As for ``connect``. Without one, whoever can reach the
                port is let in. Its ``verify_mode`` says whether clients need a
                certificate. A handshake may take as long as the peer's timeout
                (30 s if it has none).

        Raises:
            TypeError, ValueError: As ``connect``.
            OSError: It cannot be listened at: somebody does so already, the
                path is too long, the host does not resolve, ...

        Example:
            def on_session(session):
                session.on_request(lambda task: TaskResponse(task.job.upper()))

            with peer.listen(path, on_session):
                while not stopping:
                    peer.tick(None)
        """
        loop = self._loop
        loop.check_open()
        check_handler("on_session", on_session, 1)
        from .core.listening import Acceptor
        from .listener import Listener

        hand_over = partial(_add_socket, self, on_session=on_session)
        acceptor = Acceptor(loop, address, hand_over, lambda: self.timeout, ssl_context)
        listener = Listener(acceptor)
        try:
            loop.inside(acceptor.open)
            return listener
        except BaseException:
            listener.close()
            raise


def _add_socket(
    peer: OpeningMethods, sock: socket.socket, name: str = "", on_session: Callable[[Session], Any] | None = None
) -> Session:
    """Make a session over a connected socket, also one with TLS."""
    from .transports.streams import socket_opener

    return _make_session(peer, sock, socket_opener(sock), on_session, name)


def _add_own_sockets(peer: OpeningMethods, *sockets: socket.socket, name: str = "") -> list[Session]:
    """Make sessions over sockets that nobody else has. If that fails, all of them are closed."""
    try:
        return [_add_socket(peer, sock, name) for sock in sockets]
    except BaseException:
        try:
            _close_orphans(peer, lambda session: session.socket in sockets)
        finally:
            for sock in sockets:
                sock.close()
        raise


def _close_orphans(peer: OpeningMethods, is_one: Callable[[Session], bool]) -> None:
    """Close the sessions that a call has made before it was interrupted: nobody will ever have them."""
    for conversation in [*peer._loop.conversations]:
        if is_one(conversation.session):
            conversation.close(seconds=0)


def _make_session(
    peer: OpeningMethods,
    given: Any,
    make: Callable[[MessageSerializer, int], Channel],
    on_session: Callable[[Session], Any] | None = None,
    name: str = "",
) -> Session:
    """Make a session of a channel, and have the loop take it in. If that fails, the streams stay open, as they were.

    Args:
        peer: Whose session it is, and whose serializer and largest size the channel gets.
        given: What the user has passed, for a text. A transport that is refused is not released.
        on_session: Gets the session before anything that came over it is dispatched.
        name: What its socket is connected to, in a few words.
    """
    loop = peer._loop
    loop.check_open()
    outer = loop.enter()
    channel: Any = None
    conversation = None
    try:
        for channel in map(make, (peer.serializer,), (peer.max_frame_size,)):  # stored before a signal is looked at
            break
        else:
            raise RuntimeError(f"an attribute of {given!r:.100} raised StopIteration")
        if isinstance(channel, StreamChannel):
            channel.prefix_name(name)
            loop.claims.check_free(channel)
        session = Session(loop, channel, peer)
        conversation = conversation_of(session)
        loop.add(conversation)
        loop.claims.add(channel)
        if on_session is not None:
            conversation.dispatcher.begin_with(on_session)
        conversation.port.rearm()
        if conversation.port.invalid is not None:
            raise InvalidStreamError(str(conversation.port.invalid))
        log.debug("session %s opened%s", session.name, channel.details())
        return session
    except BaseException:  # an interruption: nobody will ever have the session
        if conversation is not None:
            # What is queued is a transport's own. Nobody begins anything else meanwhile.
            loop.with_users_wait(True, conversation.close, True, 0)
        elif channel is not None and channel.transport is not given:
            channel.release()
        raise
    finally:
        loop.thread = outer


name_methods(OpeningMethods, "IpcPeer")
