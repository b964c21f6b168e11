"""A serializer of one's own, in full: messages as MessagePack, by msgspec.

python3 -m pip install msgspec && python3 -m examples.msgspec_serializer

On the wire a message is [kind, id, object]. An object is an extension, which is MessagePack's word for a value of a type
of one's own, and holds [class, {field: value}], or [class, member] if the class is an enum.
"""

import sys
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Callable, Dict, Iterable, List, Tuple, Union

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

PLAIN = {type(None), bool, int, float, str, bytes}  # exactly these: a subclass would arrive as its base
OBJECT = 1  # the code of our extensions


class MsgspecSerializer:
    """Carries plain data, and the dataclasses and enums that it is given: give both sides the same.

    A class travels under its bare name, so no two may share one. Tuples arrive as lists.
    """

    def __init__(self, classes: Iterable[type]) -> None:
        msgspec: Any = import_module("msgspec")  # no import statement, for type checkers that do not have it
        self._classes: Dict[str, Any] = {}
        self._fields: Dict[type, List[str]] = {}
        for cls in (LogMessage, ErrorMessage, *classes):  # the first two are sent by the library itself
            if self._classes.setdefault(cls.__name__, cls) is not cls:
                raise ValueError(f"there are two classes called {cls.__name__}")
            if is_dataclass(cls):  # what the constructor does not take does not travel
                self._fields[cls] = [field.name for field in fields(cls) if field.init]
            elif not issubclass(cls, Enum):
                raise TypeError(f"{cls.__name__} is neither a dataclass nor an enum")
        self._extension: Callable[[int, bytes], Any] = msgspec.msgpack.Ext
        self._encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
        decoder = msgspec.msgpack.Decoder
        # Raw is not looked into yet, so that the id is known before anything can be wrong with the object.
        self._decode_message = decoder(Tuple[str, str, msgspec.Raw]).decode
        self._decode_value = decoder(ext_hook=self._build).decode
        self._decode_object = decoder(Tuple[str, Union[str, Dict[str, Any]]], ext_hook=self._build).decode

    def serialize(self, message: Message) -> bytes:
        kind, id, content = "notification", "", message
        if isinstance(message, RequestEnvelope):
            kind, id, content = "request", message.id, message.request
        elif isinstance(message, ResponseEnvelope):
            kind, id, content = "response", message.id, message.response
        try:
            if not isinstance(content, Message):
                raise TypeError("it is no message")
            return self._encode((kind, id, self._object(content)))
        except SerializationError:
            raise
        except Exception as exc:
            raise SerializationError(f"{type(content).__name__} cannot be sent: {exc}") from exc

    def deserialize(self, payload: Union[bytes, bytearray, memoryview]) -> Message:
        kind = id = ""
        try:
            kind, id, content = self._decode_message(payload)
            message = self._decode_value(content)
            if not isinstance(message, Message):
                raise TypeError(f"{type(message).__name__} is no message")
            if kind == "notification":
                return message
            return {"request": RequestEnvelope, "response": ResponseEnvelope}[kind](id, message)
        except Exception as exc:  # whatever the bytes have caused
            error = SerializationError(f"payload is not a message: {exc}")
            error.request_id = id if kind == "request" else None
            error.response_id = id if kind == "response" else None
            raise error from exc

    def _object(self, value: Any) -> Any:
        cls = type(value)
        if self._classes.get(cls.__name__) is not cls:
            raise TypeError(f"{cls.__qualname__} is not one of the serializer's classes")
        if cls not in self._fields:  # an enum; looked up, because combined flags have no name that could be read
            return self._extension(OBJECT, self._encode((cls.__name__, cls[value.name].name)))
        content = {}
        name = ""
        try:
            for name in self._fields[cls]:
                content[name] = self._plain(getattr(value, name))
            try:
                return self._extension(OBJECT, self._encode((cls.__name__, content)))
            except (OverflowError, UnicodeError):  # an int beyond 64 bits, half a character: but in which field?
                for name, item in content.items():
                    self._encode(item)
                raise
        except SerializationError:  # it names the field already
            raise
        except Exception as exc:
            raise SerializationError(f"{cls.__name__}.{name} cannot be sent: {exc}") from exc

    def _plain(self, value: Any) -> Any:
        """A value as msgspec shall write it. By itself it would not write of which class an object is."""
        cls = type(value)
        if cls in PLAIN:
            return value
        if cls is list or cls is tuple:
            return value if PLAIN.issuperset(map(type, value)) else [self._plain(item) for item in value]
        if cls is dict:
            return {self._plain(key): self._plain(item) for key, item in value.items()}
        return self._object(value)

    def _build(self, code: int, data: memoryview) -> Any:
        """Build an object, after those that it contains; nothing is called but the constructors of our classes."""
        name, content = self._decode_object(data)
        cls = self._classes.get(name)
        if code != OBJECT or cls is None:
            raise TypeError(f"unknown class {name[:100]!r}")
        try:
            if cls not in self._fields:
                return cls[content]
            # A field that was not sent takes its default, and one that the class does not have is dropped.
            return cls(**{field: content[field] for field in self._fields[cls] if field in content})
        except Exception as exc:
            raise ValueError(f"{name} cannot be built: {exc}") from exc


# -- at work


class Turn(Enum):
    LEFT = "left"
    RIGHT = "right"


@dataclass
class Picture:
    width: int
    pixels: bytes

    def __post_init__(self) -> None:
        if len(self.pixels) % self.width:
            raise ValueError(f"{len(self.pixels)} pixels do not fill lines of {self.width}")


@dataclass
class TurnRequest(Message):
    picture: Picture
    turn: Turn = Turn.RIGHT


@dataclass
class TurnResponse(Message):
    picture: Picture


SERIALIZED = (TurnRequest, TurnResponse, Picture, Turn)


def parent() -> None:
    serializer = MsgspecSerializer(SERIALIZED)
    request = TurnRequest(Picture(3, b"abcdef"), Turn.LEFT)
    print(f"{len(serializer.serialize(request))} bytes: {request}")
    with IpcPeer(serializer) as peer:
        session = peer.create_command_session([sys.executable, "-m", "examples.msgspec_serializer", "worker"])
        print("Reply:", session.request(request, expect=TurnResponse).wait())
        request.picture.width = 4  # which nobody checks on this side
        try:
            session.request(request).wait()
        except RemoteError as error:
            print("Refused:", error)


def worker() -> None:
    session = IpcPeer(MsgspecSerializer(SERIALIZED)).create_stdio_session()

    @session.on_request
    def turn(request: TurnRequest) -> TurnResponse:
        width, pixels = request.picture.width, request.picture.pixels
        columns = [pixels[start::width] for start in range(width)]
        turned = columns[::-1] if request.turn is Turn.LEFT else [column[::-1] for column in columns]
        return TurnResponse(Picture(len(columns[0]), b"".join(turned)))

    while session.is_open:
        session.tick(None)


if __name__ == "__main__":
    if find_spec("msgspec") is None:
        print("This example needs msgspec, which is not installed.")
    else:
        worker() if "worker" in sys.argv else parent()
