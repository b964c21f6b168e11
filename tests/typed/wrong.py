"""What users write by mistake: a type checker must complain about each line that ends in ``# error``, and no other.

Where only one of the checkers can know, the comment names it. Never run; see tests/test_typing.py.
"""

import enum
import pathlib
import socket
import subprocess
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from stream_ipc import (
    DeferredReply,
    ErrorMessage,
    FrameTooLargeError,
    InvalidStreamError,
    IpcPeer,
    JsonMessageSerializer,
    Listener,
    LogMessage,
    Message,
    MessageTransport,
    PhpMessageSerializer,
    PickleMessageSerializer,
    PidCounterRequestIdGenerator,
    PidHrtimeRequestIdGenerator,
    RequestEnvelope,
    RequestTimeoutError,
    ResponseEnvelope,
    ResponsePromise,
    SerializationError,
    Session,
    StreamTransport,
    UnexpectedReplyError,
    WorkerPool,
    as_completed,
    gather,
    register_type,
)

# -- messages


@dataclass
class Ask(Message):
    text: str


@dataclass
class Answer(Message):
    result: str


class Numbered(Message, wire_name=5):  # error
    pass


@register_type
@dataclass
class Point:
    x: int


@register_type(wire_name="App\\Colour")
class Colour(enum.Enum):
    RED = "red"


@register_type("App\\Size")  # error
class Size(enum.Enum):
    SMALL = 1


def values() -> None:
    LogMessage(5)  # error
    LogMessage("text", 5)  # error
    LogMessage("text").text  # error
    ErrorMessage("text", "why")  # error
    ErrorMessage(ValueError("why"))  # error
    RequestEnvelope(5, Ask("text"))  # error
    ResponseEnvelope("5", "text")  # error
    register_type(5)  # error
    register_type(Point(1))  # error
    register_type(Point, 5)  # error
    register_type(Point, encode=5, decode=Point)  # error
    register_type(Point, encode=repr, decode=repr)  # error: mypy
    Point("1")  # error
    Colour.BLUE  # error


# -- parts of one's own


class NoDeserialize:
    def serialize(self, message: Message) -> bytes:
        return b""


class TextSerializer:
    def serialize(self, message: Message) -> str:
        return ""

    def deserialize(self, payload: Union[bytes, bytearray, memoryview]) -> Message:
        return Ask("")


class BytesOnlySerializer:
    def serialize(self, message: Message) -> bytes:
        return b""

    def deserialize(self, payload: bytes) -> Message:  # what was large comes as a bytearray
        return Ask("")


class OneMessageSerializer:
    def serialize(self, message: Ask) -> bytes:
        return b""

    def deserialize(self, payload: Union[bytes, bytearray, memoryview]) -> Message:
        return Ask("")


class DictSerializer:
    def serialize(self, message: Message) -> bytes:
        return b""

    def deserialize(self, payload: Union[bytes, bytearray, memoryview]) -> Dict[str, Any]:
        return {}


class IntIds:
    def generate(self) -> int:
        return 1


class NamedIds:
    def generate(self, name: str) -> str:
        return name


class NextIds:
    def __next__(self) -> str:
        return ""


class NoClose:
    def send(self, message: Message) -> None:
        pass

    def receive(self) -> List[Message]:
        return []

    def read_fds(self) -> List[int]:
        return []


class OneMessage(NoClose):
    def receive(self) -> Message:  # error
        return Ask("")

    def close(self) -> None:
        pass


class SocketFds:
    def send(self, message: Message) -> None:
        pass

    def receive(self) -> List[Message]:
        return []

    def read_fds(self) -> List[socket.socket]:
        return []

    def close(self) -> None:
        pass


class AbstractTransport(MessageTransport):
    def send(self, message: Message) -> None:
        pass


class WritesAsMethod(MessageTransport):
    def wants_write(self) -> bool:  # error
        return False

    def send(self, message: Message, priority: int) -> None:  # error
        pass

    def receive(self) -> Optional[Message]:  # error
        return None

    def read_fds(self) -> Sequence[int]:
        return ()

    def close(self) -> None:
        pass


class TextStream:
    def read(self, size: int) -> str:
        return ""

    def write(self, data: str) -> None:
        pass


# -- peers and sessions


def peers() -> None:
    IpcPeer(JsonMessageSerializer)  # error
    IpcPeer("json")  # error
    IpcPeer(NoDeserialize())  # error
    IpcPeer(TextSerializer())  # error
    IpcPeer(BytesOnlySerializer())  # error
    IpcPeer(OneMessageSerializer())  # error
    IpcPeer(DictSerializer())  # error
    IpcPeer(PidCounterRequestIdGenerator())  # error
    IpcPeer(None, PidHrtimeRequestIdGenerator)  # error
    IpcPeer(None, IntIds())  # error
    IpcPeer(None, NamedIds())  # error
    IpcPeer(id_generator=NextIds())  # error
    IpcPeer(id_generator=lambda: "1")  # error
    IpcPeer(JsonMessageSerializer(), IntIds())  # error
    IpcPeer(None, None, 5)  # error
    IpcPeer(timeout="5")  # error
    IpcPeer(max_frame_size=1.5)  # error
    IpcPeer(max_frame_size=None)  # error
    IpcPeer(frame_size=5)  # error
    JsonMessageSerializer("StreamIpc")  # error
    PhpMessageSerializer(namespace=None)  # error
    PickleMessageSerializer(True)  # error
    PickleMessageSerializer(unsafe="yes")  # error


def sessions(peer: IpcPeer, process: "subprocess.Popen[bytes]", sock: socket.socket) -> None:
    peer.create_stdio_session(process)  # error
    peer.create_process_session(["ls"])  # error
    peer.create_process_session(process.pid)  # error
    peer.create_command_session("ls -l")  # error
    peer.create_command_session(b"ls")  # error
    peer.create_command_session("ls", "-l")  # error
    peer.create_command_session(["ls", 5])  # error
    peer.create_command_session(pathlib.Path("ls"))  # error
    peer.create_command_session({"ls", "-l"})  # error
    peer.create_command_session(["ls"], cwd=5)  # error
    peer.create_command_session(["ls"], env=["A=b"])  # error
    peer.create_command_session(["ls"], env={"A": 5})  # error
    peer.create_command_session(["ls"], stderr="file")  # error
    peer.create_command_session(["ls"], shell=True)  # error
    peer.create_command_session(["ls"], text=True)  # error
    peer.create_command_session(["ls"], start_new_sesion=True)  # error
    peer.create_command_session(["ls"], umask="077")  # error
    peer.create_stream_session(sock)  # error
    peer.create_stream_session("out", "in")  # error
    peer.create_stream_session(sock, pathlib.Path("in"))  # error
    peer.create_stream_session(sock, TextStream())  # error
    peer.create_stream_session(TextStream(), sock)  # error
    peer.create_stream_session(process.stdin, sock)  # error
    peer.create_stream_session(sock, sock, "in")  # error
    peer.create_socket_session(5)  # error
    peer.create_socket_session(("127.0.0.1", 80))  # error
    peer.create_session(sock)  # error
    peer.create_session(NoClose())  # error
    peer.create_session(OneMessage())  # error
    peer.create_session(SocketFds())  # error
    peer.create_session(WritesAsMethod)  # error
    peer.create_session(AbstractTransport())  # error
    peer.create_session_pair().close()  # error
    peer.remove_session(5)  # error
    StreamTransport(sock, sock, JsonMessageSerializer())  # error
    StreamTransport(sock, [sock])  # error
    StreamTransport(sock, ["in"], JsonMessageSerializer())  # error
    StreamTransport(sock, [sock], JsonMessageSerializer)  # error
    Session()  # error


def take(session: Session) -> None:
    pass


def take_nothing() -> None:
    pass


def take_two(session: Session, listener: Listener) -> None:
    pass


def connections(peer: IpcPeer) -> None:
    peer.listen(("127.0.0.1", 0))  # error
    peer.listen(take, "path")  # error
    peer.listen("path", take_nothing)  # error
    peer.listen("path", take_two)  # error
    peer.listen("path", take(peer.sessions[0]))  # error
    peer.listen(("127.0.0.1", "80"), take)  # error
    peer.listen("127.0.0.1", 80, take)  # error
    peer.listen(80, take)  # error
    peer.listen("path", take, ssl_context=True)  # error
    peer.listen("path", take, timeout=5)  # error
    peer.connect()  # error
    peer.connect("127.0.0.1", 80)  # error
    peer.connect(("127.0.0.1",))  # error
    peer.connect("path", timeout="5")  # error
    peer.connect("path", ssl_context="cert.pem")  # error
    peer.connect("path").on_session(take)  # error
    with peer.listen("path", take) as listener:
        listener.address = "other"  # error
        listener.is_open = False  # error
        listener.request(Ask("text"))  # error


# -- requests


def requests(peer: IpcPeer, session: Session) -> None:
    session.request()  # error
    session.request("text")  # error
    session.request(Ask)  # error
    session.request(Point(1))  # error
    session.request({"text": "text"})  # error
    session.request(Ask("text"), timeout="5")  # error
    session.request(Ask("text"), "5", expect=Answer)  # error
    session.request(Ask("text"), Answer)  # error
    session.request(Ask("text"), 5, Answer)  # error
    session.request(Ask("text"), expect=str)  # error
    session.request(Ask("text"), expect=Point)  # error
    session.request(Ask("text"), expect=Answer("text"))  # error
    session.request(Ask("text"), expect="Answer")  # error
    session.request(Ask("text"), expect=(Ask, Answer))  # error
    session.request(Ask("text"), expect=None)  # error
    session.request(Ask("text"), expected=Answer)  # error
    session.request(Ask("text")).wait().result  # error
    session.request(Ask("text"), expect=Answer).wait().text  # error
    session.request(Ask("text"), expect=Answer).result  # error
    other: Ask = session.request(Ask("text"), expect=Answer).wait()  # error
    narrower: ResponsePromise[Answer] = session.request(Ask("text"))  # error
    wrong_class: ResponsePromise[Ask] = session.request(Ask("text"), expect=Answer)  # error
    no_message: ResponsePromise[str]  # error
    promise = session.request(Ask("text"), expect=Answer)
    promise.wait("5")  # error
    promise.wait(1, 2)  # error
    promise.done = True  # error
    promise.done()  # error
    promise.cancel(5)  # error
    number: int = promise.id  # error
    gather(promise)  # error
    gather(promise, promise)  # error
    gather([Ask("text")])  # error
    gather([promise.wait()])  # error
    gather([promise], "5")  # error
    asks: List[Ask] = gather([promise])  # error
    gather([promise])[0].text  # error
    gather([promise, session.request(Ask("text"))])[1].result  # error
    gather([promise]).result  # error
    as_completed(promise)  # error
    as_completed([promise], timeout="5")  # error
    as_completed([promise]).wait()  # error
    next(as_completed([promise])).wait().text  # error
    running: Dict[ResponsePromise[Answer], int] = {promise: 1}
    text: str = running.pop(next(as_completed(running)))  # error
    for ask in as_completed([promise]):
        ask.text  # error


def notifications(peer: IpcPeer, session: Session) -> None:
    session.notify("text")  # error
    session.notify(Ask)  # error
    session.notify(Ask("text"), 5)  # error
    peer.broadcast("text")  # error
    peer.broadcast([Ask("text")])  # error
    peer.broadcast(Ask("text")).wait()  # error
    session.receive("5")  # error
    session.receive().text  # error
    ask: Ask = session.receive()  # error
    session.tick("5")  # error
    session.tick(1, 2)  # error
    peer.tick("5")  # error
    peer.tick_for()  # error
    peer.tick_for(None)  # error
    session.flush("5")  # error
    session.batch(5)  # error
    session.batch().notify(Ask("text"))  # error
    with session.batch() as batched:
        batched.text  # error
    with peer as same, session as one:
        same.request(Ask("text"))  # error
        one.broadcast(Ask("text"))  # error
    for sent in peer.broadcast(Ask("text")):  # error
        pass


def properties(peer: IpcPeer, session: Session) -> None:
    session.is_open = False  # error
    session.is_open()  # error
    session.peer = peer  # error
    session.process = None  # error
    session.transport = None  # error
    session.queued_bytes = 0  # error
    session.process.pid  # error
    peer.sessions = ()  # error
    peer.sessions()  # error
    peer.sessions.append(session)  # error
    peer.next_deadline() + 1  # error
    text: str = peer.fileno()  # error
    peer.nonsense  # error
    session.nonsense()  # error
    session.on_nonsense(print)  # error


# -- handlers


def no_parameter() -> None:
    pass


def three(message: Ask, session: Session, more: int) -> None:
    pass


def peer_second(message: Ask, peer: IpcPeer) -> None:
    pass


def needs_keyword(message: Ask, *, more: int) -> None:
    pass


def returns_text(ask: Ask) -> str:
    return ask.text


def returns_text_sometimes(ask: Ask, session: Session) -> Union[Answer, str, None]:
    return None


def returns_point(ask: Ask) -> Point:
    return Point(1)


def yields_answers(ask: Ask) -> Iterator[Answer]:
    yield Answer(ask.text)


async def answers_later(ask: Ask) -> Answer:
    return Answer(ask.text)


def right(ask: Ask) -> Answer:
    return Answer(ask.text)


def closed_by(session: Session, error: Exception) -> None:
    pass


def message_closed(message: Ask) -> None:
    pass


class Handlers:
    def two(self, message: Ask, session: Session, more: int) -> None:
        pass

    def text(self, ask: Ask) -> str:
        return ask.text


def handlers(session: Session) -> None:
    session.on_message(no_parameter)  # error
    session.on_message(three)  # error
    session.on_message(peer_second)  # error
    session.on_message(needs_keyword)  # error
    session.on_message(Handlers().two)  # error
    session.on_message(lambda: None)  # error
    session.on_message(lambda message, session, more: None)  # error
    session.on_message("seen")  # error
    session.on_message(Ask("text"))  # error
    session.on_message(None)  # error
    session.on_message()  # error
    session.on_message(Ask, right)  # error
    session.on_message(message_closed(Ask("text")))  # error
    session.off_message("seen")  # error
    session.off_message()  # error

    session.on_request(no_parameter)  # error
    session.on_request(three)  # error
    session.on_request(returns_text)  # error
    session.on_request(returns_text_sometimes)  # error
    session.on_request(returns_point)  # error
    session.on_request(yields_answers)  # error
    session.on_request(answers_later)  # error
    session.on_request(Handlers().text)  # error
    session.on_request(lambda ask: "text")  # error
    session.on_request(lambda ask, session: 5)  # error
    session.on_request(lambda: Answer("text"))  # error
    session.on_request(Answer("text"))  # error
    session.on_request(right)("text")  # error
    session.on_request(right)(Ask("text")).text  # error
    session.off_request(Answer("text"))  # error

    session.on_exception(no_parameter)  # error
    session.on_exception(three)  # error
    session.on_exception(False)  # error
    session.off_exception(None)  # error

    session.on_close(no_parameter)  # error
    session.on_close(closed_by)  # error
    session.on_close(message_closed)  # error
    session.on_close(lambda session, error: None)  # error
    session.on_close(lambda: None)  # error
    session.on_close(session.close)  # error
    session.off_close(5)  # error


def decorators(session: Session) -> None:
    @session.on_message  # error
    def nothing() -> None:
        pass

    @session.on_message()  # error
    def called(ask: Ask) -> None:
        pass

    @session.on_message
    def seen(ask: Ask) -> int:
        return 1

    @session.on_request  # error
    def answer(ask: Ask) -> int:
        return 1

    @session.on_close  # error
    def end(session: Session, error: Exception) -> None:
        pass

    seen("text")  # error
    text: str = seen(Ask("text"))  # error


# -- errors


def errors() -> None:
    size: int = FrameTooLargeError("text").size  # error
    seconds: float = RequestTimeoutError("text").timeout  # error
    id: str = SerializationError("text").request_id  # error
    reply: Answer = UnexpectedReplyError("text").reply  # error
    session: Session = InvalidStreamError("text").session  # error
    SerializationError("text", "1")  # error
    RequestTimeoutError("text", "5")  # error
    UnexpectedReplyError("text", "reply")  # error
    InvalidStreamError("text").request_id  # error
    pair: Tuple[int, int] = FrameTooLargeError("text", 1, 2)  # error


# -- answering later, and workers


def later(session: Session, reply: DeferredReply) -> None:
    @session.on_request  # error
    def answers(ask: Ask) -> List[DeferredReply]:
        return []

    reply.send("text")  # error
    reply.send(Answer)  # error
    reply.fail(5)  # error
    reply.fail(ValueError)  # error
    reply.wait()  # error
    number: int = reply.send(Answer("text")) and reply.done and "text"  # error
    promise = session.request(Ask("text"), expect=Answer)
    promise.add_done_callback("text")  # error
    promise.add_done_callback(lambda: None)  # error
    promise.add_done_callback(lambda promise: promise.wait().nonsense)  # error


def workers(peer: IpcPeer, session: Session) -> None:
    WorkerPool(session, ["worker"])  # error
    WorkerPool(peer, "worker")  # error
    WorkerPool(peer, ["worker"], "2")  # error
    WorkerPool(peer, ["worker"], on_session=lambda: None)  # error
    WorkerPool(peer, ["worker"], hello=int)  # error
    pool = WorkerPool(peer, ["worker"], 2)
    pool.submit("text")  # error
    pool.submit(Ask("text"), Answer)  # error
    pool.submit(Ask("text"), expect=int)  # error
    pool.submit(Ask("text"), expect=Answer).wait().nonsense  # error
    text: str = pool.submit(Ask("text")).wait().result  # error
    pool.map(Ask("text"))  # error
    pool.map(["text"], expect=Answer)  # error
    replies: List[Ask] = list(pool.map([Ask("text")], expect=Answer))  # error
    pool.workers[0] = session  # error
