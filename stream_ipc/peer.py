"""The sessions of one program, and the turns that drive them.

Knows sessions, transports and the poller. One private loop, ``pump``, serves every call that waits: ``tick``,
``wait``, ``receive``, ``flush`` and a send that waits for room.
"""

from __future__ import annotations

import atexit
import os
import select
import socket
import time
import warnings
from _thread import get_ident
from typing import IO, TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Tuple, Union
from weakref import WeakSet

from .errors import FrameTooLargeError, IpcError, RequestTimeoutError, StreamClosedError
from .ids import PidCounterRequestIdGenerator, RequestIdGenerator
from .messages import Message
from .poller import READ, Poller
from .promise import check_timeout
from .serializers.base import MessageSerializer
from .session import FLUSH_BOUND, HIGH_WATER, Session, _Until
from .transports.base import POLL_INTERVAL, Channel, Ending, ForeignChannel, finish
from .transports.stream import DEFAULT_MAX_FRAME_SIZE, StreamTransport
from .wire.codec import check_max_frame_size

if TYPE_CHECKING:
    import subprocess

    from .transports.process import Command

__all__ = ["IpcPeer"]

MAX_DEPTH = 32  # nested ticks beyond this only settle replies

# While nothing happens, streams are looked at for having been closed by their owner, which no poller reports: so often
# (seconds), and so many sessions at a time, to cost the same with one or a thousand.
_CHECK_INTERVAL = 0.5
_CHECK_SESSIONS = 16

_SLICE = 64  # messages of one session before the next has its turn

_FORKED = -1  # in place of a thread's number: no thread has it

_peers: WeakSet[IpcPeer] = WeakSet()


class IpcPeer:
    """Owns any number of sessions and drives them.

    It belongs to one thread at a time, and to the process that made it. A context manager: leaving closes it.

    Args:
        serializer: Turns messages into payloads; ``PickleMessageSerializer()`` by default.
        id_generator: Makes request ids; ``PidCounterRequestIdGenerator()`` by default.
        timeout: The default for requests, in seconds; None for no limit.
        max_frame_size: The largest payload in bytes, both ways.

    Raises:
        TypeError: An argument is of a wrong kind.
        ValueError: ``timeout`` is negative, or ``max_frame_size`` is no size that a frame can have.
    """

    def __init__(
        self,
        serializer: Optional[MessageSerializer] = None,
        id_generator: Optional[RequestIdGenerator] = None,
        *,
        timeout: Optional[float] = 30.0,
        max_frame_size: int = DEFAULT_MAX_FRAME_SIZE,
    ) -> None:
        self._thread: Optional[int] = None  # the thread that is inside, if any
        self._closed = True  # until everything is made
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
                    raise TypeError(f"{plugin!r:.100} has no method {name}()")
        self.serializer = serializer
        self.id_generator = id_generator
        self.timeout = timeout
        self.max_frame_size = max_frame_size
        self.clock: Callable[[], float] = time.monotonic
        self.poller = Poller()
        self._sessions: Dict[Session, None] = {}
        self._snapshot: Optional[Tuple[Session, ...]] = ()
        self._work: Dict[Session, None] = {}  # sessions with something to dispatch, in turn
        self._intervals: Dict[Session, None] = {}  # sessions that are looked at by time, not by descriptor
        self._paused: Dict[Session, None] = {}
        self._endings: List[Ending] = []
        self._depth = 0  # dispatches that are under way, one inside the other
        self._starving = 0  # waits that are under way without dispatching
        self._drained = False
        self._check_at = 0
        self._checked = 0.0
        self._wake: Optional[Tuple[int, int]] = None
        self._awake = False
        self._closed = False
        _peers.add(self)

    def __repr__(self) -> str:
        try:
            state = "closed" if self._closed else f"sessions={len(self._sessions)}"
            return f"<IpcPeer {state} serializer={type(self.serializer).__name__}>"
        except AttributeError:  # half made
            return "<IpcPeer>"

    def __enter__(self) -> IpcPeer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._closed or self._thread == _FORKED:
            return
        if self._sessions:
            warnings.warn(f"unclosed {self!r}; close it, or use it in a with statement", ResourceWarning, source=self)
        for session in tuple(self._sessions):
            session.channel.end()
        self._release()

    # -- one thread, one process

    def enter(self) -> Optional[int]:
        """Begin a call; returns what ``leave`` takes. ``RuntimeError`` if another thread is inside."""
        outer = self._thread
        me = get_ident()
        if outer is not None and outer != me:
            raise self._refusal()
        self._thread = me
        return outer

    def leave(self, outer: Optional[int]) -> None:
        """End a call."""
        if self._thread != _FORKED:
            self._thread = outer
        if self._wake is not None:
            self._update_wake()

    def _refusal(self) -> RuntimeError:
        if self._thread == _FORKED:
            return RuntimeError(
                "this IpcPeer belongs to the process that made it, and this is a fork of it; make a new IpcPeer here"
            )
        return RuntimeError(
            "another thread is using this IpcPeer; it belongs to one thread at a time, so make one per thread"
        )

    @property
    def is_forked(self) -> bool:
        """Whether this is the copy in a forked process."""
        return self._thread == _FORKED

    # -- making sessions

    def create_stdio_session(self) -> Session:
        """Talk over this process's own stdin and stdout, as a slave does with its master.

        Takes them over: what is printed from now on, also by programs that this process starts, goes to stderr; reading
        ``sys.stdin`` gives end of file. Closing the session restores both.

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
        ending the process stays with its owner.

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
        cwd: Optional[Union[str, os.PathLike[str]]] = None,
        env: Optional[Mapping[str, str]] = None,
        stderr: Union[None, int, IO[Any]] = -1,
    ) -> Session:
        """Start a process and talk over its stdin and stdout. Closing the session ends and reaps it.

        Args:
            command: The program and its arguments, as a list; there is no shell.
            cwd: The folder to start it in.
            env: Its environment; by default this process's.
            stderr: ``subprocess.PIPE`` (the default: text arrives as ``LogMessage(text, "stderr")``), None to share
                this process's stderr, or whatever else ``subprocess.Popen`` takes.

        Raises:
            TypeError: ``command`` is no list.
            OSError: It cannot be started: ``FileNotFoundError``, ``PermissionError``, ...
        """
        self._check_usable()
        from .transports.process import ProcessTransport, spawn

        process = spawn(command, cwd, env, stderr)
        try:
            transport = ProcessTransport(process, True, self.serializer, self.max_frame_size)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return self._add(transport, process)

    def create_stream_session(self, write: Any, read: Any, read2: Any = None) -> Session:
        """Talk over any streams: file objects, sockets or raw descriptors. The session owns and closes them.

        Args:
            write: What is written.
            read: What is read; may be the same as ``write``.
            read2: A second input with frames.

        Raises:
            InvalidStreamError: A stream is closed or has no descriptor.
        """
        self._check_usable()
        reads = [read] if read2 is None else [read, read2]
        return self._add(StreamTransport(write, reads, self.serializer, self.max_frame_size))

    def create_socket_session(self, sock: socket.socket) -> Session:
        """Talk over a connected stream socket. The session owns and closes it.

        Raises:
            TypeError: It is no socket.
            ValueError: It is no stream socket, or not connected.
        """
        self._check_usable()
        if not isinstance(sock, socket.socket):
            raise TypeError(f"create_socket_session() takes a socket, not {sock!r:.100}")
        if sock.type != socket.SOCK_STREAM:
            raise ValueError(f"{sock!r} is no stream socket; messages need SOCK_STREAM")
        try:
            sock.getpeername()
        except OSError as exc:
            raise ValueError(f"{sock!r} cannot be used: {exc}; connect it first") from exc
        return self.create_stream_session(sock, sock)

    def create_session(self, transport: Any) -> Session:
        """Talk over a transport of one's own. The session owns and closes it.

        Args:
            transport: A ``MessageTransport``, or any object with its methods.

        Raises:
            TypeError: It lacks a method.
        """
        self._check_usable()
        return self._add(transport if isinstance(transport, Channel) else ForeignChannel(transport))

    def create_session_pair(self) -> Tuple[Session, Session]:
        """Two connected sessions of this peer, for tests and demonstrations."""
        self._check_usable()
        a, b = socket.socketpair()
        return self.create_socket_session(a), self.create_socket_session(b)

    def _check_usable(self) -> None:
        if self._thread is not None and self._thread != get_ident():
            raise self._refusal()
        if self._closed:
            raise RuntimeError("this IpcPeer is closed; make a new one")

    def _add(self, channel: Channel, process: Optional[subprocess.Popen[Any]] = None) -> Session:
        outer = self.enter()
        try:
            session = Session(self, channel, process)
            self._sessions[session] = None
            self._snapshot = None
            try:
                session.start()
            except BaseException:
                session.finish(StreamClosedError("the session could not be started"))
                raise
            return session
        finally:
            self.leave(outer)

    @property
    def sessions(self) -> Tuple[Session, ...]:
        """The open ones, in the order in which they were made."""
        if self._snapshot is None:
            self._snapshot = tuple(self._sessions)
        return self._snapshot

    def remove_session(self, session: Session) -> None:
        """Close a session but leave its streams open, to their owner, as they were found. Pending requests fail.

        Raises:
            ValueError: It is no session of this peer.
        """
        if session.peer is not self:
            raise ValueError(f"{session!r} belongs to another peer")
        outer = self.enter()
        try:
            session.finish(StreamClosedError("the session was removed from its peer"), release=True)
        finally:
            self.leave(outer)

    # -- sending to all

    def broadcast(self, message: Message) -> int:
        """Notify every open session. The message is encoded once per serializer.

        A dead or stuck session hinders no other: the stuck ones together are waited for once, at most for the peer's
        timeout. The ``on_exception`` handlers of a session that did not get it are told.

        Returns:
            How many sessions took it.

        Raises:
            TypeError: ``message`` is no Message.
            SerializationError: It cannot travel. Nobody got it.
            FrameTooLargeError: It is too large for every session. Nobody got it.
        """
        if not isinstance(message, Message):
            raise TypeError(f"broadcast() takes a Message, not a {type(message).__name__}")
        outer = self.enter()
        try:
            sessions = [session for session in self.sessions if session.is_open]
            frames: Dict[Any, Any] = {}
            for session in sessions:  # all of them before the first is sent
                channel = session.channel
                if isinstance(channel, StreamTransport):
                    key = (id(channel.serializer), channel.max_frame_size)
                    if key not in frames:
                        try:
                            frames[key] = channel.encode(message)
                        except FrameTooLargeError as exc:
                            frames[key] = exc
            if frames and len(sessions) and all(isinstance(frame, FrameTooLargeError) for frame in frames.values()):
                raise next(iter(frames.values()))
            taken = 0
            stuck = []
            for session in sessions:
                if session.channel.queued_bytes > HIGH_WATER:
                    stuck.append(session)
                else:
                    taken += self._send_to(session, message, frames)
            if stuck:
                limit = None if self.timeout is None else self.clock() + self.timeout
                room = _Until(lambda: all(s.channel.queued_bytes <= HIGH_WATER or not s.is_writable for s in stuck))
                self.pump(room, limit, dispatch=False)
                for session in stuck:
                    if session.is_writable and session.channel.queued_bytes > HIGH_WATER:
                        session.report(
                            RequestTimeoutError(
                                f"a broadcast was not sent: {session.channel.queued_bytes} bytes are queued, and the"
                                f" other side has not read them within {self.timeout} s",
                                timeout=self.timeout,
                            )
                        )
                    else:
                        taken += self._send_to(session, message, frames)
            return taken
        finally:
            self.leave(outer)

    def _send_to(self, session: Session, message: Message, frames: Dict[Any, Any]) -> int:
        channel = session.channel
        try:
            if isinstance(channel, StreamTransport):
                frame = frames[id(channel.serializer), channel.max_frame_size]
                if isinstance(frame, FrameTooLargeError):
                    raise frame
                session.send_encoded(frame)
            else:
                session.notify(message)
            return 1
        except (IpcError, OSError) as exc:
            session.report(exc)
            return 0

    # -- ticking

    def tick(self, timeout: Optional[float] = 0.0) -> int:
        """One turn over all sessions: write what is queued, read what is there, dispatch it to handlers.

        Args:
            timeout: 0 polls and returns at once; a number waits at most so many seconds for something to happen (a
                message, the end of a session, a queue that has drained); None waits until something happens. With nothing
                open, a number sleeps that long.

        Returns:
            How many messages were dispatched.

        Raises:
            StreamClosedError: ``timeout`` is None and nothing is open: it would wait for ever.
            Exception: What an ``on_message`` handler has raised. The next tick goes on behind that message.
        """
        check_timeout(timeout)
        return self.turn(timeout, None)

    def tick_for(self, seconds: float) -> int:
        """Tick until that much time is over, whatever happens.

        Returns:
            How many messages were dispatched.
        """
        if seconds is None:
            raise TypeError("tick_for() takes a number of seconds")
        check_timeout(seconds)
        limit = self.clock() + seconds
        count = self.tick(0)
        while True:
            left = limit - self.clock()
            if left <= 0:
                return count
            count += self.tick(left)

    def turn(self, timeout: Optional[float], only: Optional[Session]) -> int:
        """One turn over all sessions, or over one of them."""
        outer = self.enter()
        try:
            if not self._sessions and timeout is None and not self._endings:
                raise StreamClosedError("nothing is open, so nothing can ever happen; the last session has been closed")
            if only is not None and len(self._sessions) == 1:
                only = None
            for session in tuple(self._sessions) if self._any_corked() else ():
                session.flush_corked()
            count = 0
            deep = self._depth >= MAX_DEPTH
            limit = None if not timeout else self.clock() + timeout
            wait = timeout
            open_before = len(self._sessions)
            self._drained = False
            while True:
                if self._work and self._has_work(only):
                    wait = 0
                self._poll(wait, only)
                if self._work:
                    count += self._settle_all() if deep else self._dispatch(None, only)
                if count or self._drained or timeout == 0 or len(self._sessions) != open_before:
                    return count
                if limit is not None:
                    wait = limit - self.clock()
                    if wait <= 0:
                        return count
                elif not self._sessions and not self._endings:
                    return count
                else:
                    wait = None
        finally:
            self.leave(outer)

    def _any_corked(self) -> bool:
        return any(session.channel.corked for session in self._sessions) if self._sessions else False

    def pump(self, until: Any, limit: Optional[float], dispatch: bool = True) -> None:
        """Turn until ``until.settled`` or the clock has reached ``limit``.

        What is there already counts even if the time is over.

        Args:
            until: Anything with an attribute ``settled``.
            limit: A time of this peer's clock, or None.
            dispatch: False only moves bytes and leaves messages in the inboxes.
        """
        outer = self.enter()
        starving = not dispatch or self._depth >= MAX_DEPTH
        if starving:
            self._starve(1)
        wait: Optional[float] = 0.0
        try:
            if not dispatch:
                if until.settled:
                    return
            else:
                for session in tuple(self._sessions) if self._any_corked() else ():
                    session.flush_corked()
            first = True
            while True:
                if dispatch and self._work:
                    if starving:
                        self._settle_all()
                    else:
                        self._dispatch(until, None)
                    if until.settled:
                        return
                if dispatch and self._work and not starving and self._has_work(None):
                    wait = 0
                elif limit is not None:
                    wait = limit - self.clock()
                    if wait <= 0:
                        if not first:
                            return
                        wait = 0
                else:
                    wait = None
                if not self._sessions:
                    return
                first = False
                self._poll(wait, None)
                if until.settled:
                    return
        finally:
            if starving:
                self._starve(-1)
            self.leave(outer)

    def _starve(self, change: int) -> None:
        self._starving += change
        for session in tuple(self._paused):
            session.update_reading()

    @property
    def is_starving(self) -> bool:
        """Whether a wait is under way that dispatches nothing."""
        return self._starving > 0

    def _poll(self, wait: Optional[float], only: Optional[Session]) -> None:
        """Write and read what can be written and read, after waiting for it."""
        if wait is None or wait > _CHECK_INTERVAL:
            wait = _CHECK_INTERVAL
        if self._intervals or self._endings:
            wait = self._shorten(wait)
        if only is None:
            events = self.poller.poll(wait)
        else:
            events = self._poll_one(wait, only)
        for owner, fd, mask in events:
            if owner is not None:
                owner.ready(fd, mask)
            elif self._wake is not None and fd == self._wake[0]:
                continue
        if self._intervals or self._endings:
            self._look()
        if not events and self._sessions:
            self._check_streams()

    def _poll_one(self, wait: Optional[float], session: Session) -> List[Tuple[Session, int, int]]:
        poller = select.poll()
        always = []
        for fd, mask in session.watched.items():
            if self.poller.is_always(fd):
                always.append((session, fd, mask))
            poller.register(fd, (select.POLLIN if mask & READ else 0) | (select.POLLOUT if mask & ~READ else 0))
        if always:
            return always
        milliseconds = None if wait is None else -(-wait * 1000 // 1)
        out = select.POLLOUT
        return [
            (session, fd, (READ if mask & ~out else 0) | (2 if mask & ~select.POLLIN else 0))
            for fd, mask in poller.poll(milliseconds)
        ]

    def _shorten(self, wait: float) -> float:
        for session in tuple(self._intervals):
            if session.channel.volatile:
                session.start()  # its answers may have changed
            interval = session.channel.poll_interval
            if interval is not None and interval < wait:
                wait = interval
        if self._endings:
            wait = min(wait, POLL_INTERVAL)
        return wait

    def _look(self) -> None:
        for session in tuple(self._intervals):
            if session.channel.poll_interval is not None:
                session.ready(-1, READ)
        if self._endings:
            self._endings = [ending for ending in self._endings if ending.step() is not None]

    def _check_streams(self) -> None:
        """Look at some sessions whether their streams are still what they were."""
        sessions = self.sessions
        if len(sessions) > _CHECK_SESSIONS:
            at = self._check_at % len(sessions)
            self._check_at = at + _CHECK_SESSIONS
            sessions = sessions[at : at + _CHECK_SESSIONS]
        for session in sessions:
            session.find_invalid()

    def _has_work(self, only: Optional[Session]) -> bool:
        if only is not None:
            return only in self._work and only.has_work
        return any(session.has_work for session in self._work)

    def _dispatch(self, until: Any, only: Optional[Session]) -> int:
        """Dispatch what is in the inboxes, session by session in turn, until ``until`` has settled."""
        work = self._work
        count = 0
        self._depth += 1
        try:
            # Not more than is there now: what nested ticks read meanwhile has its turn in the next tick.
            left = sum([session.backlog for session in work])
            while work and left > 0:
                before = left
                for session in tuple(work) if only is None else (only,):
                    turns = _SLICE
                    while turns and left > 0 and session.has_work:
                        turns -= 1
                        left -= 1
                        count += session.dispatch_next()
                        if until is not None and until.settled:
                            return count
                    if not session.has_undispatched:
                        work.pop(session, None)
                if left == before:  # what is there cannot be dispatched now
                    break
            return count
        finally:
            self._depth -= 1

    def _settle_all(self) -> int:
        return sum(session.settle_replies() for session in tuple(self._work))

    # -- for sessions

    def generate_id(self) -> str:
        """The next request id."""
        id = self.id_generator.generate()
        if type(id) is not str or len(id) > 128:
            raise ValueError(
                f"{type(self.id_generator).__name__}.generate() returned {id!r:.100}, not a str of at most 128 characters"
            )
        return id

    def add_work(self, session: Session) -> None:
        """A session has something to dispatch."""
        self._work[session] = None

    def add_ending(self, ending: Ending) -> None:
        """Something is left to be done after a session's end."""
        if ending.step() is not None:
            self._endings.append(ending)

    def note_drained(self) -> None:
        """A session's queue has drained."""
        self._drained = True

    def set_interval(self, session: Session, on: bool) -> None:
        """A session is to be looked at by time."""
        if on:
            self._intervals[session] = None
        else:
            self._intervals.pop(session, None)

    def set_paused(self, session: Session, paused: bool) -> None:
        """A session is not read from because its inbox is long."""
        if paused:
            self._paused[session] = None
        else:
            self._paused.pop(session, None)

    def rewatch(self, session: Session, old: Dict[int, int], new: Dict[int, int]) -> None:
        """Watch other descriptors of a session than before."""
        for fd in old:
            if fd not in new:
                self.poller.unwatch(fd)
        for fd, events in new.items():
            if old.get(fd) != events:
                owner = self.poller.owner(fd)
                if owner is not None and owner is not session:
                    # The number was given to a new file, so the old owner's stream was closed without his knowing.
                    self.poller.unwatch(fd)
                    owner.find_invalid()
                self.poller.watch(fd, events, session)

    def discard(self, session: Session) -> None:
        """A session has ended."""
        self._sessions.pop(session, None)
        self._snapshot = None
        for group in (self._work, self._intervals, self._paused):
            group.pop(session, None)

    # -- embedding

    def fileno(self) -> int:
        """A descriptor that becomes readable when ``tick(0)`` has something to do, for any other loop.

        Wait for it, then call ``tick(0)``. Sessions over a transport without descriptors, and the deadlines of
        requests, cannot wake it.
        """
        self._check_usable()
        if self._wake is None:
            read, write = os.pipe()
            os.set_blocking(read, False)
            os.set_blocking(write, False)
            self._wake = (read, write)
            self.poller.watch(read, READ, None)
            self._update_wake()
        return self.poller.fileno()

    def _update_wake(self) -> None:
        # The pipe holds a byte just while an inbox has work, because then no other descriptor may be ready.
        assert self._wake is not None
        awake = bool(self._work) and self._has_work(None)
        if awake != self._awake:
            self._awake = awake
            if awake:
                os.write(self._wake[1], b"\0")
            else:
                os.read(self._wake[0], 1)

    # -- closing

    def close(self) -> None:
        """Close every session, and end the children that were started, side by side. A second call does nothing.

        What is queued is written first, for at most a second in all. See ``Session.close``.
        """
        if self._closed:
            return
        if self.is_forked:
            self._closed = True
            for session in tuple(self._sessions):
                session.close()
            return
        outer = self.enter()
        try:
            self._shut_down()
        finally:
            self.leave(outer)

    def _shut_down(self) -> None:
        self._closed = True
        sessions = tuple(self._sessions)
        for session in sessions:
            if session.is_open:
                session.begin_close()
        done = _Until(lambda: not any(session.queued_bytes for session in self._sessions))
        self.pump(done, self.clock() + FLUSH_BOUND, dispatch=False)
        endings = self._endings
        self._endings = []
        for session in sessions:
            ending = session.finish(StreamClosedError("this side closed the peer"))
            if ending is not None:
                endings.append(ending)
        finish(endings)
        self._release()

    def _release(self) -> None:
        self._closed = True
        self.poller.close()
        if self._wake is not None:
            for fd in self._wake:
                os.close(fd)
            self._wake = None

    def forget_fork(self) -> None:
        """This is the copy in a forked process."""
        self._thread = _FORKED


def _close_all() -> None:
    """At exit: what is queued leaves, children are ended."""
    for peer in tuple(_peers):
        if not peer._closed and peer._thread != _FORKED:
            peer._thread = None  # its thread has ended, or will never run again
            peer.close()


def _after_fork() -> None:
    for peer in tuple(_peers):
        peer.forget_fork()
    _peers.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
