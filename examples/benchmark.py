"""How fast the library is, beside a bare selector loop and other ways for Python processes to talk.

    python3 -m examples.benchmark [--quick] [--only KEY] [--json FILE]

Each workload is done by all competitors in turn, several rounds of it. What is shown are medians over the rounds; a
ratio is taken within each round, because the speed of a machine changes from one minute to the next. The bare loop
(``RawLoop`` in ``examples/benchmark_child.py``) is what pickle over pipes costs with a selector before there is any
feature. execnet, rpyc, pyzmq and, as a serializer, msgspec take part if they are installed.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Deque,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    Union,
)

from examples.benchmark_child import (
    EXECNET_CHILD,
    MIB,
    SMALL,
    Plain,
    RawLoop,
    RawPipe,
    an_order,
    connection_child,
    ignore_interrupt,
    make_peer,
    pool_task,
)

if TYPE_CHECKING:  # the children of multiprocessing import this module again, and need none of it
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
        name: What it is called in the tables.
        package: What must be installed for it.
        imports: The modules that a program imports to use it.
        share: The part of the messages that it is given, so that the slow ones do not take up all of the time.
        note: What is not the same as with the others.
    """

    name = ""
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


class StreamIpcMsgspec(StreamIpc):
    """With the serializer of ``examples/msgspec_serializer.py``."""

    serializer = package = "msgspec"

    @classmethod
    def missing(cls) -> str:
        return "msgspec: not installed" if find_spec(cls.package) is None else ""


class StreamIpcBatch(StreamIpc):
    batch = True


class Connection(Competitor):
    """``multiprocessing.Pipe()``, which is a socketpair, and a ``Process`` that is started afresh as all others are."""

    name = "mp.Connection"
    imports = ("multiprocessing.connection",)
    share = 0.6
    note = f"its sends block, so that it hangs with {IN_FLIGHT} in flight; it has {IN_FLIGHT_BLOCKING}"

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        import multiprocessing
        import multiprocessing.connection

        self.select: Callable[..., Any] = multiprocessing.connection.wait
        context = multiprocessing.get_context("spawn")
        self.connections = []
        self.idle: List[Any] = []
        self.processes = []
        for _ in range(children):
            near, far = context.Pipe()
            process = context.Process(target=connection_child, args=(far, behaviour))
            process.start()
            far.close()
            self.processes.append(process)
            self.connections.append(near)

    def call(self, body: Any) -> Any:
        connection = self.connections[0]
        connection.send(Plain(body))
        return connection.recv().body

    def call_beside(self, body: Any) -> Any:
        connection = self.connections[0]
        connection.send(Plain(body))
        for ready in self.select([connection, *self.idle]):
            return ready.recv().body

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT_BLOCKING) -> None:
        connection = self.connections[0]
        for number in range(count):
            if number >= in_flight:
                connection.recv()
            connection.send(Plain(SMALL))
        for _ in range(min(count, in_flight)):
            connection.recv()

    def flood(self, count: int) -> None:
        connection = self.connections[0]
        connection.send(Plain(count))
        for _ in range(count):
            connection.recv()

    def each_child(self, count: int) -> None:
        for connection in self.connections:
            connection.send(Plain(SMALL))
        sent, received = len(self.connections), 0
        while received < sent:
            for ready in self.select(self.connections):
                ready.recv()
                received += 1
                if sent < count:
                    sent += 1
                    ready.send(Plain(SMALL))

    def add_idle(self, sockets: Sequence[socket.socket]) -> None:
        connection = import_module("multiprocessing.connection").Connection
        self.idle = [connection(os.dup(one.fileno())) for one in sockets]

    def drop_idle(self) -> None:
        for connection in self.idle:
            connection.close()
        self.idle = []

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


class Pool(Competitor):
    """``concurrent.futures.ProcessPoolExecutor``, which has no notifications."""

    name = "ProcessPool"
    imports = ("concurrent.futures.process",)
    share = 0.2
    note = "no notifications"

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        import multiprocessing
        from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

        self.wait = partial(wait, return_when=FIRST_COMPLETED)
        self.behaviour = behaviour
        self.children = children
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(children, context, ignore_interrupt)
        for future in [self._submit(0) for _ in range(children)]:  # it starts them as they are needed
            future.result()

    def _submit(self, body: Any) -> Any:
        return self.pool.submit(pool_task, Plain(body), self.behaviour)

    def call(self, body: Any) -> Any:
        return self._submit(body).result().body

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT) -> None:
        futures: Deque[Any] = deque()
        for _ in range(count):
            if len(futures) == in_flight:
                futures.popleft().result()
            futures.append(self._submit(SMALL))
        while futures:
            futures.popleft().result()

    def each_child(self, count: int) -> None:
        running = {self._submit(SMALL) for _ in range(self.children)}
        sent = len(running)
        while running:
            done, running = self.wait(running)
            again = min(len(done), count - sent)
            sent += again
            running |= {self._submit(SMALL) for _ in range(again)}

    def close(self) -> None:
        self.pool.shutdown()


class Execnet(Competitor):
    """execnet: gateways, channels."""

    name = package = "execnet"
    imports = ("execnet",)
    share = 0.5
    note = "only builtin types, so it sends the body alone"

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        self.execnet = import_module("execnet")
        self.group = self.execnet.Group()
        self.channels = []
        for _ in range(children):
            gateway = self.group.makegateway(f"popen//python={sys.executable}//chdir={ROOT}")
            channel = gateway.remote_exec(EXECNET_CHILD)
            channel.send(behaviour)
            self.channels.append(channel)
        self.queue = self.execnet.MultiChannel(self.channels).make_receive_queue() if children > 1 else None

    def call(self, body: Any) -> Any:
        self.channels[0].send(body)
        return self.channels[0].receive()

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT) -> None:
        channel = self.channels[0]
        for number in range(count):
            if number >= in_flight:
                channel.receive()
            channel.send(SMALL)
        for _ in range(min(count, in_flight)):
            channel.receive()

    def flood(self, count: int) -> None:
        self.channels[0].send(count)
        for _ in range(count):
            self.channels[0].receive()

    def each_child(self, count: int) -> None:
        for channel in self.channels:
            channel.send(SMALL)
        sent, received = len(self.channels), 0
        while received < sent:
            assert self.queue is not None
            channel, _ = self.queue.get()
            received += 1
            if sent < count:
                sent += 1
                channel.send(SMALL)

    def close(self) -> None:
        self.group.terminate(timeout=5)


class Rpyc(Competitor):
    """rpyc: a service at the other end of a child's stdin and stdout."""

    name = package = "rpyc"
    imports = ("rpyc",)
    share = 0.2
    note = f"calls of functions with the body; {IN_FLIGHT_BLOCKING} in flight, because its sends block too"

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        self.rpyc = import_module("rpyc")
        connect = import_module("rpyc.utils.factory").connect_subproc
        self.connections = [connect(command("rpyc", behaviour)) for _ in range(children)]
        self.functions = [connection.root.call for connection in self.connections]

    def call(self, body: Any) -> Any:
        return self.functions[0](body)

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT_BLOCKING) -> None:
        function = self.rpyc.async_(self.functions[0])
        results: Deque[Any] = deque()
        for _ in range(count):
            if len(results) == in_flight:
                results.popleft().wait()
            results.append(function(SMALL))
        while results:
            results.popleft().wait()

    def flood(self, count: int) -> None:
        left = count

        def take(text: str) -> None:
            nonlocal left
            left -= 1

        result = self.rpyc.async_(self.connections[0].root.flood)(count, take)
        result.set_expiry(None)
        result.wait()
        while left:
            self.connections[0].serve()

    def each_child(self, count: int) -> None:
        functions = [self.rpyc.async_(function) for function in self.functions]
        running = deque((function, function(SMALL)) for function in functions)
        sent = len(running)
        while running:
            function, result = running.popleft()
            result.wait()
            if sent < count:
                sent += 1
                running.append((function, function(SMALL)))

    def close(self) -> None:
        for connection in self.connections:
            process = connection.proc
            connection.close()
            end(process)


class Zmq(Competitor):
    """pyzmq: a ROUTER and the children's DEALERs, over a Unix socket."""

    name, package = "pyzmq", "zmq"
    imports = ("zmq",)
    share = 0.5

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        zmq = import_module("zmq")
        self.folder = tempfile.TemporaryDirectory()
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.set_hwm(0)  # beyond it, a ROUTER drops messages
        address = f"ipc://{self.folder.name}/socket"
        self.socket.bind(address)
        self.processes = [spawn("zmq", behaviour, address, f"child{number}") for number in range(children)]
        self.identities = [self.receive()[0] for _ in range(children)]

    def send(self, identity: bytes, body: Any) -> None:
        self.socket.send_multipart([identity, pickle.dumps(Plain(body), 5)])

    def receive(self) -> Tuple[bytes, Any]:
        identity, data = self.socket.recv_multipart()
        return identity, pickle.loads(data)

    def call(self, body: Any) -> Any:
        self.send(self.identities[0], body)
        return self.receive()[1].body

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT) -> None:
        identity = self.identities[0]
        for number in range(count):
            if number >= in_flight:
                self.receive()
            self.send(identity, SMALL)
        for _ in range(min(count, in_flight)):
            self.receive()

    def flood(self, count: int) -> None:
        self.send(self.identities[0], count)
        for _ in range(count):
            self.receive()

    def each_child(self, count: int) -> None:
        for identity in self.identities:
            self.send(identity, SMALL)
        sent, received = len(self.identities), 0
        while received < sent:
            identity, _ = self.receive()
            received += 1
            if sent < count:
                sent += 1
                self.send(identity, SMALL)

    def close(self) -> None:
        for process in self.processes:
            end(process)
        self.socket.close(0)
        self.context.term()
        self.folder.cleanup()


EVERYBODY: Sequence[Type[Competitor]] = (Raw, StreamIpc, Connection, Pool, Execnet, Rpyc, Zmq)


# -- the frame of all workloads

Figures = Sequence[float]
Entrants = Dict[str, Callable[[], Figures]]


@dataclass
class Row:
    """One line of the table: what a workload measures.

    Attributes:
        unit: Of the figures. Of times, less is better.
        relative: Whether a ratio to the bare loop says something.
    """

    key: str
    title: str
    unit: str
    relative: bool = True


@dataclass
class Workload:
    rows: Sequence[Row]
    enter: Callable[[Bench], Entrants]
    rounds: int


@dataclass
class Table:
    """How the time per message behaves as something grows."""

    key: str
    title: str
    columns: Sequence[str]
    rows: List[List[float]]


WORKLOADS: List[Workload] = []
TABLES: List[Callable[[Bench], Table]] = []


def workload(*rows: Row, rounds: int = 5) -> Callable[[Callable[[Bench], Entrants]], Callable[[Bench], Entrants]]:
    """Register a function that starts the competitors and returns for each what measures it once."""

    def register(function: Callable[[Bench], Entrants]) -> Callable[[Bench], Entrants]:
        WORKLOADS.append(Workload(rows, function, rounds))
        return function

    return register


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


class Bench:
    """What is the same for all workloads.

    Rounds are many and short rather than few and long: what else the machine does then falls on all competitors alike.

    Attributes:
        scale: The part of the full number of messages.
        most_rounds: Of each workload.
        big: The size of the one big message.
        children: How many there are at most.
        limit: How many descriptors may be open.
    """

    def __init__(self, scale: float, most_rounds: int, big: int = 64 * MIB, children: int = 8) -> None:
        self.scale = scale
        self.most_rounds = most_rounds
        self.big = big
        self.children = children
        self.limit = descriptors()
        self.left_out: List[str] = []
        self.absent: Set[Type[Competitor]] = set()
        optional: Sequence[Type[Competitor]] = (*EVERYBODY, StreamIpcMsgspec)
        for competitor in optional:
            if competitor.missing():
                self.absent.add(competitor)
                self.left_out.append(competitor.missing())
        self._stack = ExitStack()

    def sessions(self, wanted: int, descriptors_each: int) -> int:
        """As many as the descriptors suffice for."""
        possible = min(wanted, (self.limit - 200) // descriptors_each)
        if possible < wanted:
            self.left_out.append(f"{wanted} sessions: the limit of {self.limit} descriptors is enough for {possible}")
        return possible

    def count(self, full: int, competitor: Union[Competitor, Type[Competitor]] = Competitor) -> int:
        return max(1, int(full * self.scale * competitor.share))

    def rate(self, competitor: Competitor, full: int, work: Callable[[int], object], per: float = 1.0) -> Figures:
        """Messages (of so much each) in a second."""
        count = self.count(full, competitor)
        begin = time.perf_counter()
        work(count)
        return (count * per / (time.perf_counter() - begin),)

    def start(self, make: Callable[[], Any]) -> Any:
        """A competitor that is ready, until the workload ends."""
        with no_interrupt():
            competitor = make()
            self._stack.callback(competitor.close)
        return competitor

    def entrants(
        self, competitors: Sequence[Type[Competitor]], measure: Callable[[Any], Figures], **options: Any
    ) -> Entrants:
        """Start competitors, and measure each when its turn comes."""
        present = [cls for cls in competitors if cls not in self.absent]
        entrants: Entrants = {cls.name: partial(measure, self.start(partial(cls, **options))) for cls in present}
        self.warm_up(entrants)
        return entrants

    def warm_up(self, entrants: Entrants) -> None:
        """Wait until all children are there, and have everything run once."""
        scale, self.scale = self.scale, 0.0
        for measure in entrants.values():
            measure()
        self.scale = scale

    @contextmanager
    def fresh(self, make: Callable[[], Any]) -> Iterator[Any]:
        """A competitor for one measurement."""
        with no_interrupt():
            competitor = make()
        try:
            yield competitor
        finally:
            with no_interrupt():
                competitor.close()

    def fresh_entrants(
        self, competitors: Sequence[Type[Competitor]], measure: Callable[[Type[Competitor]], Figures]
    ) -> Entrants:
        """Have each started anew in each round."""
        return {cls.name: partial(measure, cls) for cls in competitors if cls not in self.absent}

    @contextmanager
    def cleaned_up(self) -> Iterator[None]:
        """End, afterwards, what was started with ``start``."""
        try:
            yield
        finally:
            with no_interrupt():
                self._stack.close()

    def run(self, work: Workload, progress: Callable[[str], None]) -> List[Dict[str, List[float]]]:
        """The figures of each round, by row and competitor."""
        results: List[Dict[str, List[float]]] = [{} for _ in work.rows]
        rounds = min(work.rounds, self.most_rounds)
        with self.cleaned_up():
            entrants = list(work.enter(self).items())
            if not entrants:  # what it is about is not installed
                return []
            for number in range(rounds):
                first = number % len(entrants)  # nobody always comes after the same
                for name, measure in entrants[first:] + entrants[:first]:
                    progress(f"{work.rows[0].title}: round {number + 1} of {rounds}, {name}")
                    for result, figure in zip(results, measure()):
                        result.setdefault(name, []).append(figure)
        return results

    def times(self, points: Sequence[Any], measure: Callable[[Any], Figures], rounds: int = 3) -> List[List[float]]:
        """For a table: measure at each point in turn, and return the medians."""
        found: List[List[Figures]] = [[] for _ in points]
        for _ in range(min(rounds, self.most_rounds)):
            for index, point in enumerate(points):
                found[index].append(measure(point))
        return [[median(column) for column in zip(*figures)] for figures in found]


# -- the workloads


@workload(Row("small", "small round trips", "/s"), rounds=21)
def small_round_trips(bench: Bench) -> Entrants:
    return bench.entrants(EVERYBODY, lambda c: bench.rate(c, 2000, partial(c.calls, SMALL)))


@workload(Row("json", "  with JSON", "/s"), rounds=15)
def json_round_trips(bench: Bench) -> Entrants:
    return bench.entrants((Raw, StreamIpcJson), lambda c: bench.rate(c, 2000, partial(c.calls, SMALL)))


@workload(Row("msgspec", "  with msgspec", "/s"), rounds=15)
def msgspec_round_trips(bench: Bench) -> Entrants:
    if StreamIpcMsgspec in bench.absent:
        return {}
    return bench.entrants((Raw, StreamIpcMsgspec), lambda c: bench.rate(c, 2000, partial(c.calls, SMALL)))


@workload(Row("pipeline", f"pipelined, {IN_FLIGHT} in flight", "/s"), rounds=15)
def pipelined(bench: Bench) -> Entrants:
    return bench.entrants(EVERYBODY, lambda c: bench.rate(c, 10_000, c.pipeline))


@workload(Row("pipeline_batch", "  inside batch()", "/s"), rounds=15)
def pipelined_in_batch(bench: Bench) -> Entrants:
    return bench.entrants((Raw, StreamIpcBatch), lambda c: bench.rate(c, 10_000, c.pipeline))


NOTIFIERS = [competitor for competitor in EVERYBODY if competitor is not Pool]


@workload(Row("flood", "flood of notifications", "/s"))
def flood(bench: Bench) -> Entrants:
    return bench.entrants(NOTIFIERS, lambda c: bench.rate(c, 200_000, c.flood), behaviour="flood")


@workload(Row("flood_batch", "  inside batch()", "/s"))
def flood_in_batch(bench: Bench) -> Entrants:
    return bench.entrants((Raw, StreamIpcBatch), lambda c: bench.rate(c, 200_000, c.flood), behaviour="flood")


@workload(Row("children", "one in each of 8 children", "/s"), rounds=15)
def eight_children(bench: Bench) -> Entrants:
    return bench.entrants(EVERYBODY, lambda c: bench.rate(c, 2000, c.each_child), children=bench.children)


@workload(Row("mib", "1 MiB echoed, pipes", "MiB/s"), rounds=15)
def mebibyte_over_pipes(bench: Bench) -> Entrants:
    body = bytes(MIB)
    return bench.entrants(EVERYBODY, lambda c: bench.rate(c, 30, partial(c.calls, body)))


@workload(Row("mib_sockets", "1 MiB echoed, socketpair", "MiB/s"), rounds=15)
def mebibyte_over_sockets(bench: Bench) -> Entrants:
    body = bytes(MIB)
    competitors = (Raw, StreamIpc, Connection)
    return bench.entrants(competitors, lambda c: bench.rate(c, 30, partial(c.calls, body)), sockets=1)


def one_big_message(bench: Bench, sockets: int, cls: Type[Competitor]) -> Figures:
    with bench.fresh(partial(cls, behaviour="sink", sockets=sockets)) as competitor:
        body = bytes(bench.big)
        before, _ = competitor.call(b"")
        begin = time.perf_counter()
        _, peak = competitor.call(body)
        return bench.big / MIB / (time.perf_counter() - begin), max(1, peak - before) / bench.big


@workload(
    Row("big", "64 MiB sent, pipes", "MiB/s"),
    Row("big_memory", "  receiver's peak memory", "x", relative=False),
    rounds=7,
)
def big_over_pipes(bench: Bench) -> Entrants:
    return bench.fresh_entrants(EVERYBODY, partial(one_big_message, bench, 0))


@workload(
    Row("big_sockets", "64 MiB sent, socketpair", "MiB/s"),
    Row("big_sockets_memory", "  receiver's peak memory", "x", relative=False),
    rounds=7,
)
def big_over_sockets(bench: Bench) -> Entrants:
    return bench.fresh_entrants((Raw, StreamIpc, Connection), partial(one_big_message, bench, 1))


class Readers:
    """So many processes that read their stdin and do nothing else: each write wakes one, as it would wake a worker."""

    def __init__(self, count: int) -> None:
        self.silent = os.pipe()  # what the sessions read: nothing ever comes
        self.processes = [
            subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(count)
        ]

    def streams(self) -> List[Tuple[int, int]]:
        """A descriptor to write to and one to read for each, for the caller to close."""
        inputs = [process.stdin.fileno() for process in self.processes if process.stdin is not None]
        return [(os.dup(fd), os.dup(self.silent[0])) for fd in inputs]

    def close(self) -> None:
        for process in self.processes:
            end(process)
        for fd in self.silent:
            os.close(fd)


@workload(Row("broadcast", "broadcast to 100 sessions", "/s"), rounds=21)
def broadcast(bench: Bench) -> Entrants:
    """What it takes the sender: the bare loop encodes once too."""

    def send(competitor: Competitor, count: int) -> None:
        for _ in range(count):
            competitor.broadcast(SMALL)

    readers = bench.start(partial(Readers, 100))
    entrants: Entrants = {}
    classes: Sequence[Type[Competitor]] = (Raw, StreamIpc)
    for cls in classes:
        competitor = bench.start(partial(cls, children=0))
        competitor.add_outputs(readers.streams())
        entrants[cls.name] = partial(bench.rate, competitor, 100, partial(send, competitor))
    return entrants


@workload(
    Row("idle_none", "round trips, one session", "/s"),
    Row("idle_1000", "  beside 1000 idle ones", "/s"),
    Row("idle_share", "  this, of the one before", "x", relative=False),
    rounds=9,
)
def beside_idle_sessions(bench: Bench) -> Entrants:
    idle = bench.sessions(1000, 3)

    def measure(competitor: Competitor) -> Figures:
        def calls(count: int) -> None:
            for _ in range(count):
                competitor.call_beside(SMALL)

        alone = bench.rate(competitor, 2000, calls)[0]
        pairs = [socket.socketpair() for _ in range(idle)]
        competitor.add_idle([near for near, _ in pairs])
        full = 2000 if competitor.share == 1 else 200
        beside = bench.rate(competitor, full, calls)[0]
        competitor.drop_idle()
        for near, far in pairs:
            near.close()
            far.close()
        return alone, beside, beside / alone

    return bench.entrants((Raw, StreamIpc, Connection), measure)


@workload(Row("start", "start to the first reply", "ms"), rounds=15)
def start_to_first_reply(bench: Bench) -> Entrants:
    def measure(cls: Type[Competitor]) -> Figures:
        begin = time.perf_counter()
        with bench.fresh(cls) as competitor:
            competitor.call(SMALL)
            return ((time.perf_counter() - begin) * 1000,)

    entrants = bench.fresh_entrants(EVERYBODY, measure)
    bench.warm_up(entrants)  # for this process to import what it needs
    return entrants


@workload(
    Row("import", "import (-X importtime)", "ms"),
    Row("import_own", "  its own modules' part", "ms", relative=False),
    rounds=7,
)
def imports(bench: Bench) -> Entrants:
    def measure(cls: Type[Competitor]) -> Figures:
        code = f"import {', '.join(cls.imports)}"
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], stderr=subprocess.PIPE, text=True, check=True
        )
        total = own = 0
        tops = {name.split(".")[0] for name in cls.imports}
        for line in done.stderr.splitlines():
            fields = line.split("|")
            if len(fields) != 3 or not fields[1].strip().isdigit():
                continue
            name = fields[2].strip()
            if name.split(".")[0] in tops:
                own += int(fields[0].split(":")[1])
            if not fields[2].startswith("  ") and (name in cls.imports or name.split(".")[0] in tops):
                total += int(fields[1])
        return total / 1000, own / 1000

    entrants = bench.fresh_entrants(EVERYBODY, measure)
    bench.warm_up(entrants)  # for the bytecode to be there
    return entrants


# Other messages: key, title, how many, and what makes the body.
SHAPES: Sequence[Tuple[str, str, int, Callable[[], Any]]] = (
    ("nested", "echo: nested dataclasses", 1000, lambda: an_order(1)),
    ("list", "  a list of 100 of them", 50, lambda: [an_order(number) for number in range(100)]),
    ("text", "  a str of 1 MB", 40, lambda: "some text " * 100_000),
    ("dicts", "  a dict of 20 dicts", 1000, lambda: {f"key {n}": {"name": f"{n}", "size": n} for n in range(20)}),
)


@workload(*(Row(f"shape_{key}", title, "/s") for key, title, _, _ in SHAPES), rounds=15)
def other_shapes(bench: Bench) -> Entrants:
    bodies = [(count, make()) for _, _, count, make in SHAPES]

    def measure(competitor: Competitor) -> Figures:
        return [bench.rate(competitor, count, partial(competitor.calls, body))[0] for count, body in bodies]

    return bench.entrants((Raw, StreamIpc, Connection), measure)


# -- what costs must not grow with


@TABLES.append
def by_sessions(bench: Bench) -> Table:
    """Round trips over all the sessions in turn; one child has the other ends."""
    points = [bench.sessions(count, 6) for count in (1, 10, 100, 1000) if bench.scale > 0.01 or count < 1000]
    ours = {count: bench.start(partial(StreamIpc, sockets=count)) for count in points}
    bare = {count: bench.start(partial(Raw, sockets=count)) for count in points}

    def measure(point: int) -> Figures:
        full = max(4000, point * 2)
        rates = [bench.rate(c, full, partial(c.call_round_robin, SMALL)) for c in (ours[point], bare[point])]
        return [1e6 / rate for rate, in rates]

    rows = [[count, *figures] for count, figures in zip(points, bench.times(points, measure))]
    return Table("sessions", "round trips over N sessions in turn", ("sessions", "us", "raw, us"), rows)


@TABLES.append
def by_pending_requests(bench: Bench) -> Table:
    """Round trips on a session that has so many requests without a reply."""
    points = (0, 100, 1000, 10_000)
    competitors: Dict[int, StreamIpc] = {}
    held: List[ResponsePromise[Message]] = []
    for count in points:
        competitor = competitors[count] = bench.start(HoldingIpc)
        held += [competitor.sessions[0].request(competitor.message(None)) for _ in range(count)]
        competitor.call(SMALL)

    def measure(point: int) -> Figures:
        c = competitors[point]
        return [1e6 / rate for rate in bench.rate(c, 4000, partial(c.calls, SMALL))]

    rows = [[count, *figures] for count, figures in zip(points, bench.times(points, measure))]
    return Table("pending", "round trips beside N pending requests of the session", ("pending", "us"), rows)


class HoldingIpc(StreamIpc):
    """With a child that leaves some requests without a reply."""

    def __init__(self) -> None:
        super().__init__(children=0)
        self.sessions = [self.peer.create_command_session(command("hold"))]


@TABLES.append
def by_messages_in_one_read(bench: Bench) -> Table:
    """What it takes to receive notifications that stand in the pipe already; both ends are in this process."""
    points = (1, 10, 100, 1000)
    near, far = socket.socketpair()
    ours = bench.start(partial(StreamIpc, children=0))
    theirs = bench.start(partial(StreamIpc, children=0))
    sender = theirs.peer.create_socket_session(far)
    ours.peer.create_socket_session(near).on_message(lambda message: None)
    bare = bench.start(partial(Raw, children=0))
    streams = [os.pipe(), os.pipe()]
    bare.add_outputs([(streams[0][1], streams[1][0]), (streams[1][1], streams[0][0])])

    def measure(point: int) -> Figures:
        seconds = [0.0, 0.0]
        repeat = max(1, bench.count(10_000) // point)
        for _ in range(repeat):
            with sender.batch():
                for _ in range(point):
                    sender.notify(ours.message(SMALL))
            begin = time.perf_counter()
            left = point
            while left:
                left -= ours.peer.tick(None)
            seconds[0] += time.perf_counter() - begin
            bare.pipes[0].send_bytes(RawPipe.encode(Plain(SMALL)) * point)
            begin = time.perf_counter()
            left = point
            while left:
                left -= len(bare.loop.turn())
            seconds[1] += time.perf_counter() - begin
        return [total * 1e6 / (repeat * point) for total in seconds]

    rows = [[count, *figures] for count, figures in zip(points, bench.times(points, measure, rounds=5))]
    return Table("burst", "receiving N messages written at once", ("messages", "us each", "raw, us each"), rows)


@TABLES.append
def by_bytes_in_one_message(bench: Bench) -> Table:
    """A message of so many bytes to the child, and a short reply."""
    points = [size for size in (64, 1024, 16 * 1024, 256 * 1024, 4 * MIB, 64 * MIB) if size <= bench.big]
    ours = bench.start(partial(StreamIpc, behaviour="sink"))
    bare = bench.start(partial(Raw, behaviour="sink"))

    def measure(point: int) -> Figures:
        body = bytes(point)
        full = min(2000, max(2, 16 * MIB // point))
        rates = [bench.rate(c, full, partial(c.calls, body)) for c in (ours, bare)]
        times = [1e6 / rate for rate, in rates]
        return [times[0], times[0] / point * 1024, times[1], times[1] / point * 1024]

    rows = [[count, *figures] for count, figures in zip(points, bench.times(points, measure))]
    columns = ("bytes", "us", "us per KiB", "raw, us", "raw, us per KiB")
    return Table("bytes", "one message of N bytes and a short reply", columns, rows)


# -- the report


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if 0 < value < 1 else f"{value:.3g}"


Results = Dict[str, Dict[str, Any]]


def report(row: Row, rounds: Dict[str, List[float]]) -> Dict[str, Any]:
    """What is known of one row: of each competitor the figures, their median, and the median ratio to the bare loop."""
    bare = rounds.get(Raw.name, [])
    results = {}
    for name, figures in rounds.items():
        ratios = [figure / base for figure, base in zip(figures, bare) if base]
        results[name] = {
            "median": median(figures),
            "ratio": median(ratios) if row.relative and ratios else None,
            "rounds": figures,
        }
    return {"title": row.title, "unit": row.unit, "less_is_better": not row.unit.endswith("/s"), "results": results}


# The names as they stand above the columns, in two lines: the table is for a terminal of 80 columns.
HEADINGS = {
    Raw.name: ("raw", "selector"),
    StreamIpc.name: ("stream", "_ipc"),
    Connection.name: ("mp.", "Conn."),
    Pool.name: ("Proc.", "Pool"),
}


def show(bench: Bench, workloads: Results) -> Iterator[str]:
    """The lines of the one table."""
    names = [competitor.name for competitor in EVERYBODY if competitor not in bench.absent]
    lines = [["", "", *(HEADINGS.get(name, ("", name))[line] for name in names)] for line in (0, 1)]
    for entry in workloads.values():
        line = [entry["title"], entry["unit"]]
        for name in names:
            result = entry["results"].get(name)
            if result is None:
                line.append("-")
            elif result["ratio"] is None or name == Raw.name:
                line.append(number(result["median"]))
            else:
                line.append(f"{result['ratio']:.2f}")
        lines.append(line)
    widths = [max(5, *(len(cell) for cell in column)) for column in zip(*lines)]
    for line in lines:
        left = f"{line[0]:<{widths[0]}} {line[1]:<{widths[1]}}"
        yield (left + "".join(f" {cell:>{width}}" for cell, width in zip(line[2:], widths[2:]))).rstrip()


def show_table(table: Table) -> Iterator[str]:
    yield table.title
    lines = [list(table.columns)] + [[number(value) for value in row] for row in table.rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    for line in lines:
        yield "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths))


class Progress:
    """A line that says what is being done, if somebody looks at it, and the place where Control-C ends it all.

    An exception out of a signal handler may come anywhere: in a ``__del__``, where it is lost, or in an executor, which
    then waits for ever. The second Control-C is one all the same.
    """

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.shown = sys.stderr.isatty()
        self.interrupted = False
        signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self, text: str) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        if self.shown:
            line = f"[{time.monotonic() - self.begin:3.0f} s] {text}"
            sys.stderr.write(f"\r\x1b[K{line[:79]}")
            sys.stderr.flush()

    def clear(self) -> None:
        if self.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def measure_all(bench: Bench, only: Optional[str], progress: Progress) -> Tuple[Results, List[Table]]:
    workloads: Results = {}
    tables: List[Table] = []
    for work in WORKLOADS:
        if only is None or any(only in row.key for row in work.rows):
            for row, rounds in zip(work.rows, bench.run(work, progress)):
                workloads[row.key] = report(row, rounds)
    for function in TABLES:
        if only is None or only in function.__name__:
            progress(f"time per message {function.__name__.replace('_', ' ')}")
            with bench.cleaned_up():
                tables.append(function(bench))
    return workloads, tables


def print_all(bench: Bench, workloads: Results, tables: List[Table]) -> None:
    import platform
    import textwrap

    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"{python}, {os.cpu_count()} cores, {platform.system()}.")
    print("Medians: of the raw selector loop the figures, of everybody else the ratios to")
    print("it in the same round. What has no ratio is a figure. Of ms, less is better.\n")
    for line in show(bench, workloads):
        print(line)
    for table in tables:
        print()
        for line in show_table(table):
            print(line)
    print()
    for competitor in EVERYBODY:
        if competitor.note and competitor not in bench.absent:
            print(textwrap.fill(f"{competitor.name}: {competitor.note}", 79, subsequent_indent="  "))
    for text in dict.fromkeys(bench.left_out):
        print(textwrap.fill(f"left out: {text}", 79, subsequent_indent="  "))


def write_json(path: str, bench: Bench, workloads: Results, tables: List[Table], seconds: float) -> None:
    import json
    import platform

    document = {
        "python": platform.python_version(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "seconds": seconds,
        "left_out": list(dict.fromkeys(bench.left_out)),
        "workloads": workloads,
        "tables": {t.key: {"title": t.title, "columns": t.columns, "rows": t.rows} for t in tables},
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")


def main() -> int:
    import argparse
    import multiprocessing.resource_tracker

    parser = argparse.ArgumentParser(prog="python3 -m examples.benchmark", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less exact, in less than 30 seconds")
    parser.add_argument("--only", metavar="KEY", help="only the workloads and tables with this in their key")
    parser.add_argument("--json", metavar="FILE", help="also write all the figures to a file")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests: figures mean nothing
    arguments = parser.parse_args()
    path = arguments.json and os.path.abspath(arguments.json)
    # Without bytecode each child would compile anew what it imports. The children of multiprocessing inherit it not only
    # by the environment: they are started with the flags of this process.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None) and sys.flags.dont_write_bytecode:
        os.execv(sys.executable, [sys.executable, "-m", "examples.benchmark", *sys.argv[1:]])
    os.chdir(ROOT)  # where children find the package
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if arguments.tiny:
        bench = Bench(0.002, 1, big=8 * MIB, children=2)
    elif arguments.quick:
        bench = Bench(0.1, 2)
    else:
        bench = Bench(1.0, 99)
    # Started now, because its start lets Control-C through again to what is started after it.
    multiprocessing.resource_tracker.ensure_running()
    progress = Progress()
    begin = time.monotonic()
    try:
        workloads, tables = measure_all(bench, arguments.only, progress)
    except KeyboardInterrupt:
        progress.clear()
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    progress.clear()
    seconds = time.monotonic() - begin
    print_all(bench, workloads, tables)
    print(f"\n{seconds:.0f} seconds")
    if path:
        write_json(path, bench, workloads, tables, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
