"""The children of ``examples.benchmark``, and what they share with it: messages and the bare loop.

A child is started as ``python -c "from examples.benchmark_child import main; main()" ROLE ARGUMENTS``. How it behaves:
``echo`` sends back what it gets, ``sink`` answers with how much memory it has used, ``flood`` is told a number and
sends so many messages.

Each role imports what it needs itself, so that the start of one is not slowed down by what only the others need.
"""

from __future__ import annotations

import os
import pickle
import selectors
import struct
import sys
from collections import deque
from dataclasses import dataclass
from importlib import import_module

TYPE_CHECKING = False  # type checkers take it for true, and the bare loop's child does without importing typing
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, List, Optional, Tuple

    from stream_ipc import IpcPeer, MessageSerializer, Session

SMALL = "task #1234"
MIB = 1024 * 1024
CHUNK = 64 * 1024


@dataclass
class Plain:
    """The message of those who pickle dataclasses; the library's own is ``examples.benchmark_message.Payload``."""

    body: Any


@dataclass
class Address:
    street: str
    city: str
    code: int


@dataclass
class Person:
    name: str
    born: int
    address: Address


@dataclass
class Order:
    number: int
    price: float
    buyer: Person
    paid: bool = False


def an_order(number: int) -> Order:
    return Order(number, number * 1.5, Person(f"buyer {number}", 1980, Address("High Street 5", "Springfield", 12345)))


# -- the bare loop


class RawPipe:
    """Two non-blocking descriptors (or one of a socket); an object travels as an 8-byte header and its pickle."""

    HEADER = struct.Struct("!Q")

    def __init__(self, selector: selectors.BaseSelector, read_fd: int, write_fd: int) -> None:
        self.selector, self.read_fd, self.write_fd = selector, read_fd, write_fd
        self.buffer = bytearray()
        self.queue: Deque[memoryview] = deque()  # what could not be written yet
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)
        selector.register(read_fd, selectors.EVENT_READ, self)

    @classmethod
    def encode(cls, message: Any) -> bytes:
        data = pickle.dumps(message, 5)
        return cls.HEADER.pack(len(data)) + data

    def send(self, message: Any) -> None:
        self.send_bytes(self.encode(message))

    def send_bytes(self, data: bytes) -> None:
        if self.queue:
            self.queue.append(memoryview(data))
            return
        try:
            written = os.write(self.write_fd, data)
        except BlockingIOError:
            written = 0
        if written < len(data):
            self.queue.append(memoryview(data)[written:])
            self.watch_writing()

    def watch_writing(self) -> None:
        if self.read_fd == self.write_fd:
            events = selectors.EVENT_READ | selectors.EVENT_WRITE if self.queue else selectors.EVENT_READ
            self.selector.modify(self.read_fd, events, self)
        elif self.queue:
            self.selector.register(self.write_fd, selectors.EVENT_WRITE, self)
        else:
            self.selector.unregister(self.write_fd)

    def flush(self) -> None:
        while self.queue:
            try:
                written = os.write(self.write_fd, self.queue[0])
            except BlockingIOError:
                return
            if written < len(self.queue[0]):
                self.queue[0] = self.queue[0][written:]
            else:
                self.queue.popleft()
        self.watch_writing()

    def receive(self) -> List[Any]:
        chunk = os.read(self.read_fd, CHUNK)
        if not chunk:
            raise EOFError
        self.buffer += chunk
        messages = []
        at = 0
        header = self.HEADER.size
        with memoryview(self.buffer) as view:
            while len(view) - at >= header:
                end = at + header + self.HEADER.unpack_from(view, at)[0]
                if end > len(view):
                    break
                messages.append(pickle.loads(view[at + header : end]))
                at = end
        del self.buffer[:at]
        return messages


class RawLoop:
    """A persistent selector over any number of pipes, and no more: no ids, no sessions, no handlers."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()

    def add(self, read_fd: int, write_fd: int) -> RawPipe:
        return RawPipe(self.selector, read_fd, write_fd)

    def turn(self) -> List[Tuple[RawPipe, Any]]:
        arrived = []
        for key, events in self.selector.select():
            pipe = key.data
            if events & selectors.EVENT_WRITE:
                pipe.flush()
            if events & selectors.EVENT_READ:
                for message in pipe.receive():
                    arrived.append((pipe, message))
        return arrived


# -- what children do


def memory() -> Tuple[int, int]:
    """How many bytes of memory this process has resident now, and at most so far."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    except OSError:  # no Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak


def answer(behaviour: str, body: Any) -> Any:
    return memory() if behaviour == "sink" else body


def raw_child(behaviour: str, *fds: str) -> None:
    """The bare loop, over stdin and stdout or the sockets that were inherited."""
    loop = RawLoop()
    for read_fd, write_fd in [(int(fd), int(fd)) for fd in fds] or [(0, 1)]:
        loop.add(read_fd, write_fd)
    try:
        while True:
            for pipe, message in loop.turn():
                if behaviour == "flood":
                    for _ in range(message.body):
                        pipe.send(Plain(SMALL))
                        while pipe.queue:
                            loop.turn()
                else:
                    pipe.send(Plain(answer(behaviour, message.body)))
    except EOFError:
        pass


def make_peer(serializer: str) -> IpcPeer:
    """A peer as both sides of the benchmark have it."""
    from stream_ipc import IpcPeer, register_type

    for cls in (Address, Person, Order):
        register_type(cls)
    chosen: Optional[MessageSerializer] = None
    if serializer == "json":
        from stream_ipc import JsonMessageSerializer

        chosen = JsonMessageSerializer()
    elif serializer == "php":
        from stream_ipc import PhpMessageSerializer

        chosen = PhpMessageSerializer()
    elif serializer == "msgspec":
        from examples.benchmark_message import Payload
        from examples.msgspec_serializer import MsgspecSerializer

        chosen = MsgspecSerializer([Payload, Address, Person, Order])
    return IpcPeer(chosen, max_frame_size=128 * MIB)


def ipc_child(serializer: str, behaviour: str, *fds: str) -> None:
    """The library, over stdin and stdout or the sockets that were inherited."""
    from examples.benchmark_message import Payload

    peer = make_peer(serializer)
    if fds:
        import socket

        sessions = [peer.create_socket_session(socket.socket(fileno=int(fd))) for fd in fds]
    else:
        sessions = [peer.create_stdio_session()]

    def echo(message: Payload) -> Payload:
        return Payload(message.body)

    def sink(message: Payload) -> Payload:
        return Payload(memory())

    def flood(message: Payload, session: Session) -> None:
        for _ in range(int(str(message.body))):
            session.notify(Payload(SMALL))

    def flood_in_batch(message: Payload, session: Session) -> None:
        with session.batch():
            flood(message, session)

    requests = {"echo": echo, "echo-batch": echo, "sink": sink}
    notifications = {"flood": flood, "flood-batch": flood_in_batch}
    for session in sessions:
        if behaviour in requests:
            session.on_request(requests[behaviour])
        else:
            session.on_message(notifications[behaviour])
    if behaviour == "echo-batch":
        with sessions[0].batch():
            while peer.sessions:
                peer.tick(None)
    while peer.sessions:
        peer.tick(None)


def hold_child() -> None:
    """Answers requests, but for those without a body, which stay pending for ever."""
    from select import select

    from examples.benchmark_message import Payload
    from stream_ipc import (
        PickleMessageSerializer,
        RequestEnvelope,
        ResponseEnvelope,
        StreamClosedError,
        StreamTransport,
    )

    transport = StreamTransport(1, [0], PickleMessageSerializer())
    try:
        while True:
            select([0], [], [])
            for envelope in transport.receive():
                assert isinstance(envelope, RequestEnvelope) and isinstance(envelope.request, Payload)
                if envelope.request.body is not None:
                    transport.send(ResponseEnvelope(envelope.id, envelope.request))
    except StreamClosedError:
        pass


def ignore_interrupt() -> None:
    """Control-C is the parent's to deal with."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def connection_child(connection: Any, behaviour: str) -> None:
    """The target of a ``multiprocessing.Process``."""
    ignore_interrupt()
    try:
        while True:
            message = connection.recv()
            if behaviour == "flood":
                for _ in range(message.body):
                    connection.send(Plain(SMALL))
            else:
                connection.send(Plain(answer(behaviour, message.body)))
    except (EOFError, OSError):  # ConnectionResetError if it went while we were writing
        pass


def pool_task(message: Plain, behaviour: str) -> Plain:
    """What the processes of a ProcessPoolExecutor are given to do."""
    return Plain(answer(behaviour, message.body))


# The source that an execnet gateway executes.
EXECNET_CHILD = """
from examples.benchmark_child import SMALL, answer

behaviour = channel.receive()
for body in channel:
    if behaviour == "flood":
        for _ in range(body):
            channel.send(SMALL)
    else:
        channel.send(answer(behaviour, body))
"""


def rpyc_child(behaviour: str) -> None:
    rpyc: Any = import_module("rpyc")

    class Service(rpyc.Service):  # type: ignore[misc]
        def exposed_call(self, body: Any) -> Any:
            return answer(behaviour, body)

        def exposed_flood(self, count: int, callback: Callable[[str], None]) -> None:
            notify = rpyc.async_(callback)
            for number in range(1, count + 1):
                result = notify(SMALL)
                if number % 100 == 0:
                    result.wait()  # it deadlocks when too many replies are on their way

    import_module("rpyc.utils.factory").connect_stdpipes(Service).serve_all()
    os._exit(0)  # it has replaced sys.stdout by a number, of which the interpreter would complain


def zmq_child(behaviour: str, address: str, identity: str) -> None:
    import threading

    def end_with_parent() -> None:
        os.read(0, 1)
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    zmq = import_module("zmq")
    socket = zmq.Context().socket(zmq.DEALER)
    socket.identity = identity.encode()
    socket.set_hwm(0)
    socket.connect(address)
    socket.send_pyobj(Plain("ready"))
    while True:
        message = socket.recv_pyobj()
        if behaviour == "flood":
            for _ in range(message.body):
                socket.send_pyobj(Plain(SMALL))
        else:
            socket.send_pyobj(Plain(answer(behaviour, message.body)))


def main() -> None:
    roles: dict[str, Callable[..., None]] = {
        "raw": raw_child,
        "ipc": ipc_child,
        "hold": hold_child,
        "rpyc": rpyc_child,
        "zmq": zmq_child,
    }
    roles[sys.argv[1]](*sys.argv[2:])
