"""The classes of the original's test messages, as Python dataclasses, and the reader of the vectors' descriptions."""

from __future__ import annotations

import enum
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from stream_ipc import registry
from stream_ipc.messages import Message
from stream_ipc.registry import register_type

VECTORS: Dict[str, Any] = json.loads((Path(__file__).parent / "vectors.json").read_text("utf-8"))


@dataclass
class TaskRequest(Message, wire_name="App\\Message\\TaskRequest"):
    job: str

    def __post_init__(self) -> None:
        if not isinstance(self.job, str):  # the original's property is typed
            raise TypeError("job must be a str")


@dataclass
class TaskResponse(Message, wire_name="App\\Message\\TaskResponse"):
    result: str


@register_type(wire_name="App\\Message\\Point")
@dataclass
class Point:
    x: int
    y: int


@dataclass
class ComplexMessage(Message, wire_name="App\\Message\\ComplexMessage"):
    secret: str = field(metadata={"visibility": "private"})
    guarded: int = field(metadata={"visibility": "protected"})
    point: Point
    list: List[Any]
    map: Any
    nothing: Any
    flag: bool
    count: int
    ratio: float
    text: str


@dataclass
class AnyMessage(Message, wire_name="App\\Message\\AnyMessage"):
    value: Any


@dataclass
class TypedMessage(Message, wire_name="App\\Message\\TypedMessage"):
    i: int
    f: float
    b: bool
    s: str
    a: Any
    n: Optional[int]


@dataclass
class ChildMessage(Message, wire_name="App\\Message\\ChildMessage"):
    hidden: str = field(metadata={"visibility": "private:App\\Message\\BaseMessage"})
    shared: str = field(metadata={"visibility": "protected"})
    title: str
    own: str = field(metadata={"visibility": "private"})
    extra: int


@dataclass
class LazyMessage(Message, wire_name="App\\Message\\LazyMessage"):
    set: str
    unset: str = field(default_factory=lambda: "default")  # no class attribute, so that it can be without a value


@register_type(wire_name="App\\Message\\NotAMessage")
@dataclass
class NotAMessage:
    text: str


@register_type(wire_name="App\\Message\\Suit")
class Suit(enum.Enum):
    Hearts = "H"
    Spades = "S"


@register_type(wire_name="stdClass")
class StdClass:
    """Rebuilt from whatever attributes came, as the original's."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StdClass) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]


@register_type(wire_name="DateTimeImmutable")
@dataclass
class DateTimeImmutable:
    date: str
    timezone_type: int
    timezone: str


def build(php_class: str, description: Dict[str, Any], key: Callable[[Any], Any]) -> Any:
    """The object that a vector describes; attributes are set one by one, so that some may have no value."""
    info = registry.lookup(php_class.replace("PhpStreamIpc\\", "StreamIpc\\"))
    cls: Any = info.cls
    obj = cls.__new__(cls)
    names = {f.wire_name: f.name for f in info.fields}
    for name, value in description["fields"].items():
        setattr(obj, names.get(name, name), obj if value == SELF else to_python(value, key))
    return obj


SELF = {"$same_object_as": "(the message itself)"}


def to_python(value: Any, key: Callable[[Any], Any] = lambda k: k) -> Any:
    """The Python value that a vector describes. ``key`` turns the key of a PHP array into one of a dict."""
    if isinstance(value, list):
        return [to_python(v, key) for v in value]
    if not isinstance(value, dict):
        return value
    if "$array" in value:
        return {key(k): to_python(v, key) for k, v in value["$array"]}
    if "$object" in value:
        return build(value["$object"]["class"], value["$object"], key)
    if "$enum" in value:
        return Suit[value["$enum"].rpartition(":")[2]]
    if "$bytes_hex" in value:
        return bytes.fromhex(value["$bytes_hex"])
    if "$float" in value:
        return float(value["$float"])
    if "$nested_lists" in value:
        nested: Any = 1
        for _ in range(value["$nested_lists"]):
            nested = [nested]
        return nested
    raise LookupError(value)


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types throughout: 1, 1.0 and True differ, -0.0 and 0.0 too, NaN equals itself."""
    stack = [(a, b)]  # no recursion: some values are deep
    while stack:
        a, b = stack.pop()
        if type(a) is not type(b):
            return False
        if isinstance(a, (list, tuple)):
            if len(a) != len(b):
                return False
            stack += zip(a, b)  # noqa: B905
        elif isinstance(a, dict):
            if len(a) != len(b) or not all(k in b for k in a):
                return False
            stack += [(v, b[k]) for k, v in a.items()]
        elif isinstance(a, float):
            if not (math.isnan(a) and math.isnan(b)) and (a != b or math.copysign(1, a) != math.copysign(1, b)):
                return False
        elif hasattr(a, "__dict__") and not isinstance(a, enum.Enum):
            stack.append((vars(a), vars(b)))
        elif a != b:
            return False
    return True


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def a_cycle() -> Any:
    value: Dict[str, Any] = {"x": []}
    value["x"].append(value)
    return value
