"""Messages that the tests' programs and their children share."""

from dataclasses import dataclass, field
from typing import Any, List

from stream_ipc import Message


@dataclass
class Ping(Message):
    value: Any = None


@dataclass
class Pong(Message):
    value: Any = None


@dataclass
class Note(Message):
    text: str = ""
    data: Any = None


@dataclass
class Many(Message):
    items: List[Any] = field(default_factory=list)
