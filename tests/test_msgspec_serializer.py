"""The serializer of examples/msgspec_serializer.py, which is there to be copied."""

from __future__ import annotations

import enum
import random
import re
import socket
from dataclasses import InitVar, dataclass, field
from typing import Any, Dict, List, Optional

import pytest

from stream_ipc import (
    ErrorMessage,
    IpcPeer,
    LogMessage,
    Message,
    RemoteError,
    RequestEnvelope,
    ResponseEnvelope,
    SerializationError,
)

from .helpers import tick_until

msgspec: Any = pytest.importorskip("msgspec", reason="msgspec is not installed")


class Colour(enum.Enum):
    RED = 1
    GREEN = "green"
    ROSE = 1  # another name of RED


class Flags(enum.IntFlag):
    ONE = 1
    TWO = 2


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


@dataclass
class Drawing(Message):
    points: Any
    colour: Any = Colour.GREEN
    notes: Dict[str, Any] = field(default_factory=dict)
    data: bytes = b""


@dataclass
class Checked(Message):
    number: int
    factor: InitVar[int] = 2
    product: int = field(init=False)
    calls = 0

    def __post_init__(self, factor: int) -> None:
        if not isinstance(self.number, int):
            raise TypeError("number must be an int")
        Checked.calls += 1
        self.product = self.number * factor


@dataclass
class Box(Message):
    content: Any


@dataclass
class Stranger(Message):
    secret: str = ""


CLASSES = (Colour, Flags, Point, Drawing, Checked, Box)


def make() -> Any:
    from examples.msgspec_serializer import MsgspecSerializer

    return MsgspecSerializer(CLASSES)


def thing(name: Any, content: Any, code: int = 1) -> Any:
    """An object as it stands on the wire."""
    return msgspec.msgpack.Ext(code, msgspec.msgpack.encode([name, content]))


def payload(content: Any, kind: str = "notification", id: Any = "") -> bytes:
    return bytes(msgspec.msgpack.encode([kind, id, content]))


def refused(data: Any, text: str) -> SerializationError:
    with pytest.raises(SerializationError, match=text) as info:
        make().deserialize(data)
    return info.value


MESSAGES: List[Message] = [
    Drawing([]),
    Drawing([Point(1), Point(-2, 3)], Colour.RED, {"nested": {"deep": [Point(0)]}, "ü": None}, bytes(range(256))),
    Drawing({1: Point(1), "two": Colour.RED, b"3": 1.5, None: True}, Flags.TWO),
    Box(None),
    Box(Box(Box(Drawing(Box([[Box(1)], 2]))))),
    Box([1 << 64 - 1, -(1 << 63), 0.1, -0.0, float("inf"), True, False, None, "text \U0001f600", b"\xff" * 100_000]),
    Box([Colour.RED, Colour.GREEN, Colour.ROSE, Flags.ONE]),
    Box("StreamIpc\\Message\\LogMessage"),
    LogMessage("text", LogMessage.LEVEL_STDERR),
    ErrorMessage("it failed"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: Message) -> None:
    serializer = make()
    for whole in (message, RequestEnvelope("7-ü", message), ResponseEnvelope("", message)):
        data = serializer.serialize(whole)
        assert type(data) is bytes
        for given in (data, bytearray(data), memoryview(data)):
            assert serializer.deserialize(given) == whole


def test_nothing_refers_to_the_payload() -> None:
    data = bytearray(make().serialize(Drawing([b"abc"], data=b"def")))
    message = make().deserialize(memoryview(data))
    data[:] = bytes(len(data))
    assert message == Drawing([b"abc"], data=b"def")


def test_tuples_arrive_as_lists() -> None:
    assert make().deserialize(make().serialize(Box((1, (Point(2),))))) == Box([1, [Point(2)]])


def test_objects_are_built_by_their_constructor() -> None:
    data = make().serialize(Checked(3))
    before = Checked.calls
    message = make().deserialize(data)
    assert Checked.calls == before + 1 and message == Checked(3) and message.product == 6
    # What the constructor does not take cannot be sent to it.
    message = make().deserialize(payload(thing("Checked", {"number": 3, "product": 1, "calls": 9, "__class__": "x"})))
    assert message.product == 6 and vars(message) == {"number": 3, "product": 6}
    refused(payload(thing("Checked", {"number": "3"})), "Checked cannot be built: number must be an int")


def test_missing_and_unknown_fields() -> None:
    assert make().deserialize(payload(thing("Drawing", {"points": 1, "added_later": [2]}))) == Drawing(1)
    refused(payload(thing("Drawing", {"data": b""})), "Drawing cannot be built: .*'points'")
    nested = payload(thing("Box", {"content": [thing("Point", {})]}))
    refused(nested, "Point cannot be built: .*'x'")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({1}, r"Box\.content cannot be sent: set is not one of the serializer's classes"),
        ([[object()]], r"Box\.content cannot be sent: object is not"),
        (bytearray(b"x"), r"Box\.content cannot be sent: bytearray is not"),
        (Stranger(), r"Box\.content cannot be sent: Stranger is not"),
        (RequestEnvelope("1", Box(1)), r"Box\.content cannot be sent: RequestEnvelope is not"),
        (Point, r"Box\.content cannot be sent: type is not"),
        (1 << 64, r"Box\.content cannot be sent: can't serialize ints"),
        ([-1 << 64], r"Box\.content cannot be sent: can't serialize ints"),
        ("\ud800", r"Box\.content cannot be sent: 'utf-8' codec can't encode"),
        (Flags.ONE | Flags.TWO, r"Box\.content cannot be sent: "),
        ({Colour.RED: 1}, r"Box\.content cannot be sent: unhashable type"),
        (Point(1, 1 << 64), r"Point\.y cannot be sent: can't serialize ints"),
        (Drawing(1, {2}), r"Drawing\.colour cannot be sent: set is not"),
        (type("int", (int,), {})(3), r"Box\.content cannot be sent: int is not"),
    ],
    ids=repr,
)
def test_what_cannot_be_sent_names_the_field(value: Any, text: str) -> None:
    for message in (Box(value), RequestEnvelope("1", Box(value))):
        with pytest.raises(SerializationError, match=f"^{text}"):
            make().serialize(message)


def test_what_is_no_message_cannot_be_sent() -> None:
    inner: Any = RequestEnvelope("1", Box(1))
    point: Any = Point(1)
    for message in (point, Stranger(), *(RequestEnvelope("1", content) for content in (point, Stranger(), inner))):
        with pytest.raises(SerializationError, match="cannot be sent"):
            make().serialize(message)
    with pytest.raises(SerializationError, match="cannot be sent"):
        make().serialize(RequestEnvelope("\ud800", Box(1)))


def test_what_contains_itself_cannot_be_sent() -> None:
    loop: List[Any] = []
    loop.append(loop)
    box = Box(None)
    box.content = box
    for message in (Box(loop), box):
        with pytest.raises(SerializationError, match=r"Box\.content cannot be sent: maximum recursion depth"):
            make().serialize(message)


NO_OBJECTS = {
    "unknown class": (thing("Stranger", {}), "unknown class 'Stranger'"),
    "a builtin": (thing("eval", {"source": "1"}), "unknown class 'eval'"),
    "an envelope": (thing("RequestEnvelope", {"id": "1", "request": thing("Box", {"content": 1})}), "unknown class"),
    "a long name": (thing("x" * 100_000, {}), "unknown class 'x{100}'$"),
    "another extension": (thing("Box", {"content": 1}, code=2), "unknown class"),
    "plain data": ({"content": 1}, "dict is no message"),
    "nothing": (None, "NoneType is no message"),
    "no message": (thing("Point", {"x": 1}), "Point is no message"),
    "an enum": (thing("Colour", "RED"), "Colour is no message"),
    "an unknown member": (thing("Box", {"content": thing("Colour", "BLUE")}), "Colour cannot be built: 'BLUE'"),
    "no member": (thing("Colour", "__init__"), "Colour cannot be built"),
    "an enum with fields": (thing("Colour", {"value": 1}), "Colour cannot be built"),
    "a dataclass with a member": (thing("Box", "content"), "Box cannot be built"),
    "fields as a list": (thing("Box", [1]), "Expected `str | object`, got `array`"),
    "a name that is none": (thing([1], {}), "Expected `str`, got `array`"),
    "keys that are no names": (thing("Box", {1: 2}), "Expected `str`"),
    "garbage in an object": (msgspec.msgpack.Ext(1, b"\xc1"), "invalid opcode"),
    "nothing in an object": (msgspec.msgpack.Ext(1, b""), "truncated"),
}


@pytest.mark.parametrize("name", sorted(NO_OBJECTS))
def test_what_is_no_object(name: str) -> None:
    content, text = NO_OBJECTS[name]
    error = refused(payload(content), text)
    assert (error.request_id, error.response_id) == (None, None)
    error = refused(payload(content, "request", "r-1"), text)
    assert (error.request_id, error.response_id) == ("r-1", None)
    error = refused(payload(content, "response", "r-2"), text)
    assert (error.request_id, error.response_id) == (None, "r-2")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x93",
        b'{"__class": "x"}',
        payload(thing("Box", {"content": 1}))[:-1],
        payload(thing("Box", {"content": 1})) + b"\0",
        payload(thing("Box", {"content": 1}), "request", 7),
        payload(thing("Box", {"content": 1}), "request", None),
        payload(thing("Box", {"content": 1}), "order", "1"),
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\x7f\xff\xff\xff" * 100,
        b"\x91" * 100_000,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_message(data: bytes) -> None:
    error = refused(data, "payload is not a message")
    assert (error.request_id, error.response_id) == (None, None)


def test_objects_within_objects_without_end() -> None:
    data = b""
    for _ in range(2000):
        data = b"\xc9" + len(data).to_bytes(4, "big") + b"\x01" + data
        data = b"\x92\xa3Box\x81\xa7content" + data
    whole = b"\x93\xa7request\xa1i" + b"\xc9" + len(data).to_bytes(4, "big") + b"\x01" + data
    assert refused(whole, "recursion").request_id == "i"


def values(value: Any) -> Any:
    """A value and all that it contains."""
    yield value
    if isinstance(value, dict):
        inner: Any = [*value, *value.values()]
    elif isinstance(value, (list, tuple)):
        inner = value
    else:
        inner = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, enum.Enum) else ()
    for item in inner:
        yield from values(item)


def test_garbage() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rand = random.Random(seed)
    serializer = make()
    whole = [serializer.serialize(RequestEnvelope("id-1", message)) for message in MESSAGES]
    whole = [data for data in whole if len(data) < 1000]
    # With what msgspec itself makes of some extensions.
    allowed = {*CLASSES, *map(type, (None, True, 1, 1.0, "", b"", [], {}, ())), LogMessage, ErrorMessage, RequestEnvelope}
    allowed |= {ResponseEnvelope, msgspec.msgpack.decode(b"\xd6\xff\0\0\0\0").__class__}
    built = 0
    for _ in range(20_000):
        data = bytearray(rand.choice(whole))
        for _ in range(rand.choice((1, 1, 1, 2, 5, 30))):
            at = rand.randrange(len(data))
            action = rand.randrange(4)
            if action == 0:
                data[at] = rand.randrange(256)
            elif action == 1:
                data[at] ^= 1 << rand.randrange(8)
            elif action == 2:
                other = rand.choice(whole)
                start = rand.randrange(len(other))
                data[at : at + rand.randrange(9)] = other[start : start + rand.randrange(20)]
            else:
                del data[at : at + rand.randrange(1, 4)]
            data = data or bytearray(b"\0")
        try:
            message = serializer.deserialize(bytes(data))
        except SerializationError as error:
            assert error.request_id is None or error.response_id is None
            assert len(str(error)) < 2000
        else:
            built += 1
            assert isinstance(message, Message)
            assert {type(value) for value in values(message)} <= allowed
    assert built > 100  # or the test would not test much


def test_classes_that_it_does_not_take() -> None:
    from examples.msgspec_serializer import MsgspecSerializer

    with pytest.raises(ValueError, match="two classes called Box"):
        MsgspecSerializer([Box, dataclass(type("Box", (), {}))])
    with pytest.raises(TypeError, match="dict is neither a dataclass nor an enum"):
        MsgspecSerializer([dict])
    assert MsgspecSerializer([Box, Box, LogMessage]).serialize(Box(1))  # twice the same does no harm


def test_in_sessions() -> None:
    with IpcPeer(make(), timeout=10) as peer:
        session, slave = peer.create_session_pair()
        notified: List[Optional[Message]] = []
        slave.on_message(notified.append)

        @slave.on_request
        def answer(request: Box) -> Message:
            if request.content == "set":
                return Box({1})
            if request.content == "raise":
                raise ValueError("no")
            return Box([request.content, Colour.RED])

        assert session.request(Box(Point(1)), expect=Box).wait() == Box([Point(1), Colour.RED])
        session.notify(Drawing([Point(2)]))
        session.notify(LogMessage("text"))
        peer.tick_for(0.1)
        assert notified == [Drawing([Point(2)]), LogMessage("text")]
        with pytest.raises(SerializationError, match=re.escape("Box.content cannot be sent: set")):
            session.request(Box({1}))
        with pytest.raises(RemoteError, match=re.escape("Box.content cannot be sent: set")):
            session.request(Box("set")).wait()
        with pytest.raises(RemoteError, match="ValueError: no"):
            session.request(Box("raise")).wait()
        assert session.request(Box(1), expect=Box).wait() == Box([1, Colour.RED])


def test_sides_with_other_classes() -> None:
    from examples.msgspec_serializer import MsgspecSerializer

    left, right = socket.socketpair()
    with IpcPeer(make(), timeout=10) as peer, IpcPeer(MsgspecSerializer([Drawing, Colour]), timeout=10) as other:
        session, far = peer.create_socket_session(left), other.create_socket_session(right)
        session.on_request(lambda request: Box(1))
        # Who has asked learns at once that the request was not understood.
        promise = session.request(Box(1))
        tick_until(lambda: promise.done, peer, other)
        with pytest.raises(RemoteError, match="could not be decoded: .* unknown class 'Box'"):
            promise.wait()
        # Or that the reply was not.
        promise = far.request(Drawing(1))
        tick_until(lambda: promise.done, peer, other)
        with pytest.raises(SerializationError, match="unknown class 'Box'"):
            promise.wait()
        assert session.is_open and far.is_open
