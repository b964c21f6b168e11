"""What users write, in as many forms as there are: a type checker must not complain about any of it.

A program, too: run, it plays both parent and worker, so that all of this is right at run time as well. See
tests/test_typing.py.
"""

# pyright: strict, reportUnknownLambdaType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false
# Nobody says of what type the parameter of a lambda is when that is a handler, whose own type is what counts.

import datetime
import decimal
import enum
import functools
import io
import itertools
import json
import os
import pathlib
import queue
import socket
import ssl
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import stream_ipc
from stream_ipc import (
    DeferredReply,
    ErrorMessage,
    FrameTooLargeError,
    InvalidStreamError,
    IpcError,
    IpcPeer,
    JsonMessageSerializer,
    Listener,
    LogMessage,
    Message,
    MessageSerializer,
    MessageTransport,
    PhpMessageSerializer,
    PickleMessageSerializer,
    PidCounterRequestIdGenerator,
    PidHrtimeRequestIdGenerator,
    RemoteError,
    RequestEnvelope,
    RequestIdGenerator,
    RequestTimeoutError,
    ResponseEnvelope,
    ResponsePromise,
    SerializationError,
    Session,
    StreamClosedError,
    StreamTransport,
    UnexpectedReplyError,
    WorkerPool,
    as_completed,
    gather,
    register_type,
)

HERE = os.path.abspath(__file__)

# -- messages, and what travels inside them


@dataclass
class Ask(Message):
    text: str = ""


@dataclass
class Answer(Message):
    result: str


@dataclass(frozen=True)
class LongAnswer(Message, wire_name="App\\Message\\LongAnswer"):
    results: Sequence[str] = ()


@dataclass
class BestAnswer(Answer):
    rank: int = field(default=1, metadata={"wire_name": "place"})


class Plain(Message):
    def __init__(self, number: int) -> None:
        self.number = number


@register_type
@dataclass
class Point:
    x: int
    y: int = 0


@register_type()
class Colour(enum.Enum):
    RED = "red"


@register_type(wire_name="App\\Size")
class Size(enum.IntEnum):
    SMALL = 1


class Pair(NamedTuple):
    left: int
    right: int


@dataclass
class Other:
    value: int


pair_class = register_type(Pair)
other_class = register_type(Other, "App\\Other")
again = register_type(Other, wire_name="App\\Other")
decimal_class = register_type(decimal.Decimal, encode=str, decode=decimal.Decimal)
register_type(datetime.datetime, encode=datetime.datetime.isoformat, decode=datetime.datetime.fromisoformat)


@dataclass
class Drawing(Message):
    points: List[Point]
    colour: Colour
    size: Optional[Size] = None


drawing = Drawing([Point(1)], Colour.RED, Size.SMALL)
x: int = drawing.points[0].x
left: int = pair_class(1, 2).left
value: int = other_class(1).value + again(2).value
red: Colour = Colour("red")

log = LogMessage("text", LogMessage.LEVEL_STDERR)
level: str = LogMessage("text", level=LogMessage.LEVEL_JUNK).level
text: str = ErrorMessage("text", ValueError("why")).message + str(ErrorMessage("text"))
request: Message = RequestEnvelope("1", Ask("text")).request
response: Message = ResponseEnvelope("1", Answer("text")).response
version: str = stream_ipc.__version__


# -- parts of one's own


class LineSerializer:
    """Derives from nothing, and calls its parameters as it likes."""

    def __init__(self, inner: Optional[MessageSerializer] = None) -> None:
        self.inner = inner or JsonMessageSerializer()

    def serialize(self, what: Message) -> bytes:
        return self.inner.serialize(what) + b"\n"

    def deserialize(self, data: Union[bytes, bytearray, memoryview]) -> Message:
        if not bytes(data).endswith(b"\n"):
            raise SerializationError("no line", request_id=None, response_id="1")
        return self.inner.deserialize(bytes(data)[:-1])


class AskSerializer(MessageSerializer):
    """Derives from the protocol, and returns a class of its own."""

    def serialize(self, message: Message) -> bytes:
        return json.dumps(getattr(message, "text", "")).encode()

    def deserialize(self, payload: Union[bytes, bytearray, memoryview]) -> Ask:
        return Ask(json.loads(bytes(payload)))


class Numbers:
    def __init__(self) -> None:
        self.count = itertools.count(1)

    def generate(self) -> str:
        return str(next(self.count))


class MoreNumbers(RequestIdGenerator):
    count = 0

    def generate(self) -> str:
        self.count += 1
        return f"more-{self.count}"


class StillMoreNumbers(PidCounterRequestIdGenerator):
    def generate(self) -> str:
        return "still." + super().generate()


class QueueTransport(MessageTransport):
    """Derives from the abstract base class, and has everything that is optional."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.other: Optional[QueueTransport] = None
        self.queued: List[Message] = []

    def send(self, message: Message) -> None:
        self.queued.append(message)

    def receive(self) -> List[Message]:
        return [self.queue.get() for _ in range(self.queue.qsize())]

    def read_fds(self) -> Sequence[int]:
        return ()

    def close(self) -> None:
        self.queued.clear()

    @property
    def wants_write(self) -> bool:
        return bool(self.queued)

    @property
    def write_fd(self) -> Optional[int]:
        return None

    def flush(self) -> None:
        assert self.other is not None
        for message in self.queued:
            self.other.queue.put(message)
        self.queued.clear()


class DuckTransport:
    """Derives from nothing."""

    def __init__(self) -> None:
        self.there: List[Message] = [Ask("from a duck")]

    def send(self, what: object) -> int:
        return 0

    def receive(self) -> Iterator[Message]:
        there, self.there = self.there, []
        yield from there

    def read_fds(self) -> Tuple[int, ...]:
        return ()

    def close(self) -> bool:
        return True

    def wants_write(self) -> bool:
        return False


class Backwards:
    """A stream without a descriptor."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream

    def read(self, size: int) -> bytes:
        return self.stream.recv(size)[::-1]

    def write(self, data: bytes) -> None:
        for byte in data:
            self.stream.sendall(bytes([byte]))

    def close(self) -> None:
        self.stream.close()


class OnlyRead:
    def read(self, n: int = -1) -> bytearray:
        return bytearray()


class Sink(io.RawIOBase):
    def writable(self) -> bool:
        return True


# -- peers


def peers() -> Iterable[IpcPeer]:
    yield IpcPeer()
    yield IpcPeer(None, None)
    yield IpcPeer(PickleMessageSerializer(), PidHrtimeRequestIdGenerator(), timeout=5, max_frame_size=1 << 20)
    yield IpcPeer(PickleMessageSerializer(unsafe=True), timeout=None)
    yield IpcPeer(JsonMessageSerializer(namespace="PhpStreamIpc"), Numbers(), timeout=0.5)
    yield IpcPeer(serializer=PhpMessageSerializer(), id_generator=MoreNumbers())
    yield IpcPeer(LineSerializer(), StillMoreNumbers())
    yield IpcPeer(LineSerializer(PhpMessageSerializer()))
    yield IpcPeer(AskSerializer())
    serializers: List[MessageSerializer] = [LineSerializer(), AskSerializer(), JsonMessageSerializer()]
    generators: Dict[str, RequestIdGenerator] = {"a": Numbers(), "b": MoreNumbers(), "c": StillMoreNumbers()}
    for serializer, generator in zip(serializers, generators.values()):
        yield IpcPeer(serializer, generator)


# -- handlers


def seen(message: Message) -> None:
    pass


def seen_by_both(message: Message, session: Session) -> None:
    assert session.is_open


def ask_seen(ask: Ask) -> int:
    return len(ask.text)


def ask_or_answer_seen(message: Union[Ask, Answer], session: Session) -> None:
    pass


def anything_seen(*args: object) -> None:
    pass


def seen_with_prefix(prefix: str, message: Ask) -> None:
    pass


def seen_with_own_default(ask: Ask, found: Optional[List[str]] = None) -> None:
    pass


def answer(ask: Ask) -> Answer:
    return BestAnswer(ask.text.upper())


def answer_sometimes(ask: Ask, session: Session) -> Optional[Answer]:
    return Answer("long") if len(ask.text) > 3 else None


def never_answer(message: Message) -> None:
    pass


def answer_with_prefix(prefix: str, ask: Ask, session: Session) -> Answer:
    return Answer(prefix + ask.text)


def untyped(message, session):  # type: ignore[no-untyped-def]
    return message


def failed(error: Exception) -> bool:
    return False


def failed_in(error: IpcError, session: Session) -> Optional[bool]:
    return None


def stream_failed(error: InvalidStreamError) -> None:
    broken: Optional[Session] = error.session
    assert broken is None or not broken.is_open


def closed(session: Session) -> None:
    assert not session.is_open


class Counter:
    """Handlers that are methods, and an object that is one itself."""

    def __init__(self, session: Session) -> None:
        self.count = 0
        self.session = session
        session.on_message(self.seen)
        session.on_message(self.ask_seen)
        session.on_message(self.static)
        session.on_message(Counter.of_class)
        session.on_message(self)
        session.on_request(self.answer)
        session.on_exception(self.failed)
        session.on_close(self.closed)

    def seen(self, message: Message) -> None:
        self.count += 1

    def ask_seen(self, ask: Ask, session: Session) -> None:
        assert session is self.session

    @staticmethod
    def static(ask: Ask) -> None:
        pass

    @classmethod
    def of_class(cls, ask: Ask) -> None:
        pass

    def __call__(self, message: Message, session: Session) -> None:
        self.count += 1

    def answer(self, ask: Ask) -> Optional[Message]:
        return None

    def failed(self, error: Exception, session: Session) -> None:
        pass

    def closed(self, session: Session) -> None:
        pass

    def stop(self) -> None:
        self.session.off_message(self.seen)
        self.session.off_message(self)
        self.session.off_request(self.answer)
        self.session.off_exception(self.failed)
        self.session.off_close(self.closed)


def decorators(session: Session) -> None:
    @session.on_message
    def one(note: LogMessage) -> int:
        return len(note.message)

    @session.on_message
    def two(note: LogMessage, session: Session) -> None:
        session.notify(Ask(note.message))

    @session.on_request
    def reply(ask: Ask) -> Answer:
        return Answer(ask.text)

    @session.on_request
    def reply_or_not(ask: Ask, session: Session) -> Optional[Answer]:
        return None

    @session.on_request
    def reply_one_or_other(ask: Ask) -> Union[Answer, LongAnswer, None]:
        return LongAnswer([ask.text])

    @session.on_exception
    def fail(error: Exception) -> bool:
        return isinstance(error, FrameTooLargeError)

    @session.on_exception
    def fail_in(error: Exception, session: Session) -> None:
        session.close()

    @session.on_close
    def end(session: Session) -> None:
        pass

    # They are still what they were.
    length: int = one(LogMessage("text"))
    result: str = reply(Ask("text")).result
    maybe: Optional[Answer] = reply_or_not(Ask("text"), session)
    kept: bool = fail(ValueError())
    assert (length, result, maybe, kept) == (4, "text", None, False)
    fail_is: Callable[[Exception, Session], None] = fail_in
    end_is: Callable[[Session], None] = end

    session.off_message(one)
    session.off_message(two)
    session.off_request(reply)
    session.off_request(reply_or_not)
    session.off_request(reply_one_or_other)
    session.off_exception(fail)
    session.off_exception(fail_is)
    session.off_close(end_is)


def calls(session: Session) -> None:
    found: List[Message] = []
    others: queue.Queue[Message] = queue.Queue()
    for handler in (seen, ask_seen, anything_seen, print, found.append, others.put):
        session.on_message(handler)
        session.off_message(handler)
    session.on_message(seen_by_both)
    session.on_message(ask_or_answer_seen)
    session.on_message(seen_with_own_default)
    session.on_message(functools.partial(seen_with_prefix, "a"))
    session.on_message(lambda message: None)
    session.on_message(lambda message: found.append(message))
    session.on_message(lambda message, session: session.tick())
    session.on_message(untyped)
    length: int = session.on_message(ask_seen)(Ask("text"))

    session.on_request(answer_sometimes)
    session.on_request(answer)
    session.on_request(never_answer)
    session.on_request(print)
    session.on_request(functools.partial(answer_with_prefix, "a"))
    session.on_request(lambda ask: Answer(ask.text))
    session.on_request(lambda message: message)
    session.on_request(lambda message: None)
    session.on_request(lambda message, session: Answer("text"))
    session.on_request(untyped)
    session.on_request(Plain.__call__ if hasattr(Plain, "__call__") else answer)  # noqa: B004
    result: Answer = session.on_request(answer)(Ask("text"))
    assert (length, result.result) == (4, "TEXT")

    session.on_exception(failed)
    session.on_exception(failed_in)
    session.on_exception(stream_failed)
    session.on_exception(print)
    session.on_exception(lambda error: False)
    session.on_exception(lambda error, session: session.close())

    session.on_close(closed)
    session.on_close(print)
    session.on_close(lambda session: None)
    session.on_close(lambda session: print(session))
    session.on_close(functools.partial(print, "closed", flush=True))

    for off in (answer_sometimes, answer, never_answer, print, untyped):
        session.off_request(off)
    session.off_exception(failed)
    session.off_close(closed)


def reply_to_all(session: Session) -> None:
    # Whatever it is given to: a dict of handlers, a function that makes them.
    def make(text: str) -> Callable[[Ask], Answer]:
        return lambda ask: Answer(text + ask.text)

    table: Mapping[str, Callable[[Any], Optional[Message]]] = {"echo": lambda ask: Answer(ask.text), "make": make("a")}
    session.on_request(table["echo"])
    for handler in table.values():
        session.on_request(handler)


# -- requests


def requests(peer: IpcPeer, session: Session) -> None:
    promise = session.request(Ask("text"), expect=Answer)
    as_promise: ResponsePromise[Answer] = promise
    as_base: ResponsePromise[Message] = promise
    reply: Answer = promise.wait()
    result: str = promise.wait(0.5).result + as_promise.wait(timeout=None).result
    anything: Message = session.request(Ask("text")).wait()
    if isinstance(anything, Answer):
        result += anything.result
    id: str = promise.id
    done: bool = promise.done or as_base.done
    cancelled: bool = session.request(Ask("text"), 5).cancel()
    session.request(Ask("text"), None, expect=Message).wait(5)
    session.request(Ask("text"), timeout=0.5, expect=Answer).cancel()
    rank: str = session.request(Ask("text"), timeout=5, expect=BestAnswer).wait().result
    assert (reply.result, rank, done, cancelled, id != "") == ("TEXT", "TEXT", True, True, True)

    same: List[Answer] = gather([session.request(Ask("a"), expect=Answer), session.request(Ask("b"), expect=BestAnswer)])
    results: List[str] = [answer.result for answer in gather(tuple(ask_all(session, "ab")), timeout=5)]
    results += [answer.result for answer in gather(session.request(Ask(c), expect=Answer) for c in "ab")]
    mixed: Sequence[Message] = gather([session.request(Ask("a"), expect=Answer), session.request(Ask("b"))])
    assert [len(same), len(results), len(mixed)] == [2, 4, 2]

    running: Dict[ResponsePromise[Answer], Tuple[int, Session]] = {}
    for number, ask in enumerate(ask_all(session, "abc")):
        running[ask] = number, session
    while running:
        first = next(as_completed(running, timeout=5))
        number, of = running.pop(first)
        print(number, of.is_open, first.wait().result)
    for settled in as_completed(ask_all(session, "ab"), 5):
        result += settled.wait().result
    for either in as_completed([session.request(Ask("a"), expect=Answer), session.request(Ask("b"))]):
        print(either.wait())

    taken: int = peer.broadcast(Ask("text")) + peer.broadcast(LogMessage("text"))
    with session.batch() as batched:
        session.notify(Ask("text"))
        batched.notify(drawing)
    with session.batch():
        session.notify(Plain(1))
    session.flush()
    session.flush(timeout=5)
    dispatched: int = peer.tick() + peer.tick(0.01) + peer.tick_for(0.01) + session.tick() + session.tick(timeout=0.01)
    queued: int = session.queued_bytes
    assert (taken > 2, dispatched > 0, queued) == (True, True, 0)


def ask_all(session: Session, words: Iterable[str]) -> List[ResponsePromise[Answer]]:
    return [session.request(Ask(word), expect=Answer) for word in words]


def replies_of_several_classes(session: Session) -> List[Message]:
    same: List[Answer] = gather([session.request(Ask(), expect=Answer), session.request(drawing, expect=Answer)])
    base: ResponsePromise[Message] = session.request(Ask(), expect=LongAnswer)
    short_or_long = [session.request(Ask(), expect=Answer), session.request(Ask(), expect=LongAnswer)]
    for promise in as_completed([session.request(Ask(), expect=Answer), base, *short_or_long]):
        promise.wait()
    mixed = gather([session.request(Ask(), expect=Answer), session.request(Ask(), expect=LongAnswer)])
    return [*mixed, *same, *gather(short_or_long), *gather((short_or_long[0], base))]


def receive(session: Session) -> str:
    try:
        message: Message = session.receive(timeout=5)
        session.receive(0)
    except TimeoutError:
        return "late"
    if isinstance(message, LogMessage):
        return message.message
    return session.receive().__class__.__name__


def errors(session: Session) -> Optional[object]:
    try:
        session.request(Ask("text")).wait()
    except RequestTimeoutError as error:
        seconds: Optional[float] = error.timeout
        as_timeout: TimeoutError = error
        return seconds or as_timeout
    except StreamClosedError as error:
        as_connection: ConnectionError = error
        return as_connection.errno
    except RemoteError as error:
        return str(error)
    except UnexpectedReplyError as error:
        reply: Optional[Message] = error.reply
        as_type: TypeError = error
        return reply or as_type
    except SerializationError as error:
        ids: Tuple[Optional[str], Optional[str]] = error.request_id, error.response_id
        return ids
    except FrameTooLargeError as error:
        sizes: Tuple[Optional[int], Optional[int]] = error.size, error.limit
        return sizes
    except InvalidStreamError as error:
        broken: Optional[Session] = error.session
        as_value: ValueError = error
        return broken or as_value
    except IpcError as error:
        return error.args
    return None


# -- sessions


def sessions(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    with a as one, b:
        seconds: Optional[float] = peer.next_deadline()
        number: int = peer.fileno()
        count: int = len(peer.sessions)
        first: Session = peer.sessions[0]
        of: IpcPeer = one.peer
        process: Optional[subprocess.Popen[Any]] = one.process
        transport: object = one.transport
        assert (first.is_open, of, process, (seconds or 0.0) >= 0, count > 1) == (True, peer, None, True, True)
        assert number >= 0 and transport
    first_end, second_end = socket.socketpair()
    with peer.create_socket_session(first_end), peer.create_socket_session(sock=second_end):
        pass


def streams(peer: IpcPeer) -> None:
    near, far = socket.socketpair()
    with peer.create_stream_session(near, near), peer.create_stream_session(write=Backwards(far), read=Backwards(far)):
        pass
    read, write = os.pipe()
    peer.create_stream_session(write, read).close()
    read, write = os.pipe()
    with open(write, "wb") as writer, open(read, "rb", buffering=0) as reader:
        session = peer.create_stream_session(writer, reader, OnlyRead())
        peer.remove_session(session)
    ends = socket.socketpair()
    transport = StreamTransport(ends[0], [ends[0], OnlyRead()], JsonMessageSerializer(), max_frame_size=1 << 20)
    transport.send(Ask("text"))
    queued: int = transport.queued_bytes
    there: List[Message] = transport.receive()
    with peer.create_session(transport) as session:
        assert session.transport is transport and queued == 0 and not there
    StreamTransport(ends[1], (ends[1],), LineSerializer()).close()


def text_streams(peer: IpcPeer) -> Sequence[Session]:
    return (
        peer.create_stream_session(sys.stdout.buffer, sys.stdin.buffer),
        peer.create_stream_session(sys.stdout, sys.stdin),
        peer.create_stream_session(Sink(), io.BytesIO(), read2=None),
    )


def transports(peer: IpcPeer) -> None:
    one, other = QueueTransport(), QueueTransport()
    one.other, other.other = other, one
    with peer.create_session(one) as a, peer.create_session(transport=other) as b:
        b.on_request(answer)
        assert a.request(Ask("text"), expect=Answer).wait(5).result == "TEXT"
    with peer.create_session(DuckTransport()) as duck:
        assert duck.receive(5) == Ask("from a duck")


def children(peer: IpcPeer) -> None:
    with peer.create_command_session([sys.executable, HERE, "worker"]) as worker:
        reply = worker.request(Ask("text"), expect=Answer).wait().result
        assert reply == "TEXT" and worker.process is not None
    status: int = worker.process.returncode
    reason: StreamClosedError | None = worker.reason
    assert reason is not None
    peer.create_command_session(["cat"], start_new_session=True, umask=0o77, pass_fds=(2,)).close(timeout=0)
    peer.create_command_session(["cat"], preexec_fn=lambda: None, executable=pathlib.Path("/bin/cat")).close(None)
    IpcPeer().close(timeout=0.5)
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    command: Sequence[str] = (sys.executable, HERE, "worker")
    worker = peer.create_command_session(command, cwd=pathlib.Path(HERE).parent, env=environment, stderr=None)
    worker.close()
    with tempfile.TemporaryFile() as errors:
        for output in (subprocess.PIPE, subprocess.DEVNULL, errors):
            words = [sys.executable, HERE]
            peer.create_command_session([*words, "worker"], cwd=".", env=os.environ, stderr=output).close()
        peer.create_command_session([pathlib.Path(sys.executable), HERE, b"worker"], cwd=None, env=None).close()
    process = subprocess.Popen([sys.executable, HERE, "worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process, peer.create_process_session(process) as attached:
        attached.notify(Ask("text"))
    assert status == 0


# -- connections


def take(session: Session) -> int:
    session.on_request(answer)
    return 1


class Server:
    def __init__(self, peer: IpcPeer) -> None:
        self.clients: List[Session] = []
        self.listener = peer.listen(("127.0.0.1", 0), self.accept)

    def accept(self, session: Session) -> Session:
        self.clients.append(session)
        session.on_message(seen_by_both)
        return session


def connections(peer: IpcPeer, folder: pathlib.Path) -> None:
    clients: List[Session] = []
    with peer.listen(folder / "a", take) as listener:
        address: Union[str, Tuple[str, int]] = listener.address
        assert listener.is_open
        with peer.connect(address) as client, peer.connect(address=str(folder / "a"), timeout=None):
            assert client.request(Ask("text"), expect=Answer).wait().result == "TEXT"
    on_path: Listener = peer.listen(os.fsencode(folder / "b"), on_session=clients.append)
    peer.connect(on_path.address, timeout=5, server_hostname=None, ssl_context=None).close()
    on_path.close()
    peer.listen(("127.0.0.1", 0), lambda session: session.on_request(answer)).close()
    peer.listen(("localhost", 0), lambda session: clients.append(session), ssl_context=None).close()
    peer.listen(("127.0.0.1", 0), print).close()
    server = Server(peer)
    peer.connect(server.listener.address).close()


def tls(peer: IpcPeer, server: ssl.SSLContext) -> Session:
    listener = peer.listen(("0.0.0.0", 1234), take, ssl_context=server)
    assert not isinstance(listener.address, str)
    host, port = listener.address
    context = ssl.create_default_context()
    session = peer.connect((host, port), ssl_context=context, server_hostname="example.org")
    session.transport.socket.getpeercert()
    return peer.create_socket_session(context.wrap_socket(socket.socket())) or session


# -- answering later, and workers


def later(session: Session, other: Session, kept: List[DeferredReply]) -> None:
    @session.on_request
    def forward(ask: Ask) -> ResponsePromise[Answer]:
        return other.request(ask, expect=Answer)

    @session.on_request
    def put_off(ask: Ask, session: Session) -> DeferredReply:
        kept.append(DeferredReply())
        return kept[-1]

    @session.on_request
    def either(ask: Ask) -> Union[Answer, ResponsePromise[Message], DeferredReply, None]:
        return None

    session.on_request(lambda ask: other.request(ask))
    session.on_request(lambda ask: DeferredReply())
    sent: bool = kept[0].send(Answer("text")) or kept[0].fail("text") or kept[0].fail(ValueError())
    print(sent, kept[0].done, forward, put_off, either)

    def settled(promise: ResponsePromise[Answer]) -> None:
        print(promise.wait().result)

    promise = session.request(Ask("text"), expect=Answer)
    promise.add_done_callback(settled)
    promise.add_done_callback(lambda promise: promise.wait().result)
    promise.add_done_callback(print)


def workers(peer: IpcPeer, folder: pathlib.Path) -> None:
    with WorkerPool(peer, [sys.executable, "worker.py"], 2, cwd=folder, on_session=lambda s: s.on_request(answer)) as pool:
        reply: Answer = pool.submit(Ask("text"), expect=Answer).wait()
        anything: Message = pool.submit(Ask("text"), timeout=5).wait()
        results: List[str] = [reply.result for reply in pool.map([Ask("a"), Ask("b")], expect=Answer, ahead=5)]
        messages: List[Message] = list(pool.map((Ask(text) for text in "abc"), ordered=False, timeout=None))
        both = gather([pool.submit(Ask("a"), expect=Answer), peer.sessions[0].request(Ask("b"), expect=Answer)])
        print(reply, anything, results, messages, both[0].result, len(pool.workers), pool.pending + 1)
    hosts = [["ssh", host, "python3", "worker.py"] for host in ("a", "b")]
    WorkerPool(peer, hosts, retries=0, timeout=None, tasks_per_worker=5, in_flight=2, hello=Ask, start_timeout=5).close(1)


# -- the program


def worker() -> None:
    session = IpcPeer().create_stdio_session()
    session.on_request(answer)
    while session.is_open:
        session.tick(None)


def main() -> None:
    for peer in peers():
        peer.close()
    with IpcPeer(timeout=20) as peer, tempfile.TemporaryDirectory() as folder:
        one, other = peer.create_session_pair()
        one.notify(log)
        assert receive(other) == "late"
        decorators(one)
        calls(one)
        reply_to_all(one)
        Counter(other).stop()
        other.on_request(answer)
        requests(peer, one)
        assert errors(one) is None
        one.close()
        sessions(peer)
        streams(peer)
        transports(peer)
        children(peer)
        connections(peer, pathlib.Path(folder))


if __name__ == "__main__":
    worker() if "worker" in sys.argv else main()
