"""The ways to talk that ``examples.benchmark`` compares: what all have in common, the bare loop and this library."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Deque, Dict, Iterator, List, Optional, Sequence, Tuple, Type

from examples.benchmark_child import SMALL, Plain, RawLoop, RawPipe, make_peer

if TYPE_CHECKING:
    from examples.benchmark_message import Payload
    from stream_ipc import Message, ResponsePromise, Session

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IN_FLIGHT = 1000
# Those who block in a send hang with 1000 in flight: each side waits for the other to read.
IN_FLIGHT_BLOCKING = 100


# -- processes


def command(*arguments: str) -> List[str]:
    """The command of a child."""
    return [sys.executable, "-c", "from examples.benchmark_child import main; main()", *arguments]


def spawn(*arguments: str, fds: Sequence[int] = (), **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(*arguments), pass_fds=fds, **{"stdin": subprocess.PIPE, **streams})


def end(process: subprocess.Popen[bytes]) -> None:
    """Our children end when their stdin does."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def no_interrupt() -> Iterator[None]:
    """Hold Control-C back, also for good from the processes that are started meanwhile: they end with this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def descriptors() -> int:
    """Allow as many descriptors as may be allowed, and return how many."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16384 if hard == resource.RLIM_INFINITY else min(hard, 16384)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return soft
    return wanted


# -- competitors


class Competitor:
    """A way to talk to children. Each has the same few methods, done as its documentation says.

    Attributes:
        name: What it is called in the JSON file.
        label: What it is called in the tables.
        package: What must be installed for it.
        imports: The modules that a program imports to use it.
        share: The part of the messages that it is given, so that the slow ones do not take up all of the time.
        note: What is not the same as with the others.
    """

    name = ""
    label = ""
    package = ""
    imports: Sequence[str] = ()
    share = 1.0
    note = ""

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        """Start children, which talk over their stdin and stdout, or one child that talks over some socketpairs."""

    def call(self, body: Any) -> Any:
        """Send a message, wait for the reply and return its body."""
        raise NotImplementedError

    def calls(self, body: Any, count: int) -> None:
        """One after the other."""
        for _ in range(count):
            self.call(body)

    def call_beside(self, body: Any) -> Any:
        """A call while other streams are watched as well."""
        return self.call(body)

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT) -> None:
        """So many requests, of which some are under way all the time."""
        raise NotImplementedError

    def flood(self, count: int) -> None:
        """Have the child send so many messages, and receive them."""
        raise NotImplementedError

    def each_child(self, count: int) -> None:
        """Keep one request under way in each child."""
        raise NotImplementedError

    def add_idle(self, sockets: Sequence[socket.socket]) -> None:
        """Watch these streams as well."""
        raise NotImplementedError

    def drop_idle(self) -> None:
        """Undo ``add_idle``."""
        raise NotImplementedError

    def broadcast(self, body: Any) -> None:
        """Send to all."""
        raise NotImplementedError

    def close(self) -> None:
        """End everything."""

    @classmethod
    def missing(cls) -> str:
        """Why it cannot take part, or nothing."""
        return f"{cls.name}: not installed" if cls.package and find_spec(cls.package) is None else ""


class Raw(Competitor):
    """The bare loop."""

    name = "raw selector"
    label = "raw loop"
    imports = ("dataclasses", "os", "pickle", "selectors", "struct", "subprocess")

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        self.loop = RawLoop()
        self.processes: List[subprocess.Popen[bytes]] = []
        self.sockets: List[socket.socket] = []
        self.pipes: List[RawPipe] = []
        self.idle: List[RawPipe] = []
        self.fds: List[int] = []
        if sockets:
            self._start_with_sockets(behaviour, sockets)
            return
        for _ in range(children):
            process = spawn("raw", behaviour, stdout=subprocess.PIPE, bufsize=0)
            assert process.stdin is not None and process.stdout is not None
            self.processes.append(process)
            self.pipes.append(self.loop.add(process.stdout.fileno(), process.stdin.fileno()))

    def _start_with_sockets(self, behaviour: str, count: int) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        fds = [far.fileno() for _, far in pairs]
        self.processes.append(spawn("raw", behaviour, *map(str, fds), fds=fds))
        for near, far in pairs:
            far.close()
            self.sockets.append(near)
            self.pipes.append(self.loop.add(near.fileno(), near.fileno()))

    def call(self, body: Any) -> Any:
        return self.call_on(self.pipes[0], body)

    def call_on(self, pipe: RawPipe, body: Any) -> Any:
        pipe.send(Plain(body))
        while True:
            for _, reply in self.loop.turn():
                return reply.body

    def call_round_robin(self, body: Any, count: int) -> None:
        for number in range(count):
            self.call_on(self.pipes[number % len(self.pipes)], body)

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT) -> None:
        pipe = self.pipes[0]
        sent = received = 0
        while received < count:
            while sent < count and sent - received < in_flight:
                pipe.send(Plain(SMALL))
                sent += 1
            received += len(self.loop.turn())

    def flood(self, count: int) -> None:
        self.pipes[0].send(Plain(count))
        while count > 0:
            count -= len(self.loop.turn())

    def each_child(self, count: int) -> None:
        for pipe in self.pipes:
            pipe.send(Plain(SMALL))
        sent, received = len(self.pipes), 0
        while received < sent:
            for pipe, _ in self.loop.turn():
                received += 1
                if sent < count:
                    sent += 1
                    pipe.send(Plain(SMALL))

    def add_idle(self, sockets: Sequence[socket.socket]) -> None:
        self.idle = [self.loop.add(one.fileno(), one.fileno()) for one in sockets]

    def drop_idle(self) -> None:
        for pipe in self.idle:
            self.loop.selector.unregister(pipe.read_fd)
        self.idle = []

    def add_outputs(self, streams: Sequence[Tuple[int, int]]) -> None:
        """More streams to broadcast to, as (write, read)."""
        self.pipes = [self.loop.add(read, write) for write, read in streams]
        self.fds = [fd for stream in streams for fd in stream]

    def broadcast(self, body: Any) -> None:
        data = RawPipe.encode(Plain(body))
        for pipe in self.pipes:
            pipe.send_bytes(data)

    def close(self) -> None:
        self.loop.selector.close()
        for near in self.sockets:
            near.close()
        for fd in self.fds:
            os.close(fd)
        for process in self.processes:
            end(process)


class StreamIpc(Competitor):
    """This library, with the default serializer."""

    name = "stream_ipc"
    label = "ours"
    imports = ("stream_ipc",)
    serializer = "pickle"
    batch = False

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        from examples.benchmark_message import Payload

        self.message: Type[Payload] = Payload
        self.peer = make_peer(self.serializer)
        self.sessions: List[Session] = []
        self.idle: List[Session] = []
        self.process: Optional[subprocess.Popen[bytes]] = None
        if self.batch:
            behaviour += "-batch"
        if sockets:
            self._start_with_sockets(behaviour, sockets)
        else:
            for _ in range(children):
                self.sessions.append(self.peer.create_command_session(command("ipc", self.serializer, behaviour)))

    def _start_with_sockets(self, behaviour: str, count: int) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        fds = [far.fileno() for _, far in pairs]
        self.process = spawn("ipc", self.serializer, behaviour, *map(str, fds), fds=fds)
        for near, far in pairs:
            far.close()
            self.sessions.append(self.peer.create_socket_session(near))

    def call(self, body: Any) -> Any:
        return self.sessions[0].request(self.message(body), expect=self.message).wait().body

    def call_round_robin(self, body: Any, count: int) -> None:
        for number in range(count):
            self.sessions[number % len(self.sessions)].request(self.message(body), expect=self.message).wait()

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT) -> None:
        session = self.sessions[0]
        promises: Deque[ResponsePromise[Message]] = deque()
        with ExitStack() as stack:
            if self.batch:
                stack.enter_context(session.batch())
            for _ in range(count):
                if len(promises) == in_flight:
                    promises.popleft().wait()
                promises.append(session.request(self.message(SMALL)))
            while promises:
                promises.popleft().wait()

    def flood(self, count: int) -> None:
        left = count
        session = self.sessions[0]

        def take(message: Payload) -> None:
            nonlocal left
            left -= 1

        take.__annotations__["message"] = self.message  # for this name is imported for type checkers only
        session.on_message(take)
        session.notify(self.message(count))
        while left:
            self.peer.tick(None)
        session.off_message(take)

    def each_child(self, count: int) -> None:
        running: Dict[Session, ResponsePromise[Message]] = {s: s.request(self.message(SMALL)) for s in self.sessions}
        sent = len(running)
        while running:
            self.peer.tick(None)
            for session, promise in tuple(running.items()):
                if promise.done:
                    promise.wait()
                    if sent < count:
                        sent += 1
                        running[session] = session.request(self.message(SMALL))
                    else:
                        del running[session]

    def add_idle(self, sockets: Sequence[socket.socket]) -> None:
        self.idle = [self.peer.create_socket_session(one) for one in sockets]

    def drop_idle(self) -> None:
        for session in self.idle:
            session.close()
        self.idle = []

    def add_outputs(self, streams: Sequence[Tuple[int, int]]) -> None:
        """More streams to broadcast to, as (write, read)."""
        self.sessions = [self.peer.create_stream_session(write, read) for write, read in streams]

    def broadcast(self, body: Any) -> None:
        self.peer.broadcast(self.message(body))

    def close(self) -> None:
        self.peer.close()
        if self.process is not None:
            end(self.process)


class StreamIpcJson(StreamIpc):
    serializer = "json"


class StreamIpcPhp(StreamIpc):
    serializer = "php"


class StreamIpcMsgspec(StreamIpc):
    """With the serializer of ``examples/msgspec_serializer.py``."""

    serializer = package = "msgspec"

    @classmethod
    def missing(cls) -> str:
        return "msgspec: not installed" if find_spec(cls.package) is None else ""


class StreamIpcBatch(StreamIpc):
    batch = True
