"""Messages between processes, for plain synchronous programs.

A master starts slave processes, or connects to them, and both sides send each other messages: requests that are
answered, notifications that are not, broadcasts to all. Everything happens in calls that the program makes itself, above
all ``tick()`` and ``wait()``: there is no thread and no event loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    FrameTooLargeError,
    InvalidStreamError,
    IpcError,
    RemoteError,
    RequestTimeoutError,
    SerializationError,
    StreamClosedError,
    UnexpectedReplyError,
)
from .ids import PidCounterRequestIdGenerator, PidHrtimeRequestIdGenerator, RequestIdGenerator
from .messages import ErrorMessage, LogMessage, Message, RequestEnvelope, ResponseEnvelope
from .peer import IpcPeer
from .promise import ResponsePromise, as_completed, gather
from .registry import register_type
from .serializers.base import MessageSerializer
from .session import Session
from .transports.base import MessageTransport
from .transports.stream import StreamTransport

if TYPE_CHECKING:
    from .listener import Listener
    from .serializers.json import JsonMessageSerializer
    from .serializers.php import PhpMessageSerializer
    from .serializers.pickle import PickleMessageSerializer

__version__ = "1.0.0"

__all__ = [
    "ErrorMessage",
    "FrameTooLargeError",
    "InvalidStreamError",
    "IpcError",
    "IpcPeer",
    "JsonMessageSerializer",
    "Listener",
    "LogMessage",
    "Message",
    "MessageSerializer",
    "MessageTransport",
    "PhpMessageSerializer",
    "PickleMessageSerializer",
    "PidCounterRequestIdGenerator",
    "PidHrtimeRequestIdGenerator",
    "RemoteError",
    "RequestEnvelope",
    "RequestIdGenerator",
    "RequestTimeoutError",
    "ResponseEnvelope",
    "ResponsePromise",
    "SerializationError",
    "Session",
    "StreamClosedError",
    "StreamTransport",
    "UnexpectedReplyError",
    "as_completed",
    "gather",
    "register_type",
]

_LAZY = {
    "JsonMessageSerializer": "serializers.json",
    "Listener": "listener",
    "PhpMessageSerializer": "serializers.php",
    "PickleMessageSerializer": "serializers.pickle",
}


def __getattr__(name: str) -> Any:
    # Imported at first use: most programs need one serializer, and no listener.
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value
