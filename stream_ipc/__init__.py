"""Messages between processes, for plain synchronous programs.

A program starts worker processes, or connects to others, and both sides send each other messages: requests that are
answered, notifications that are not, broadcasts to all. Everything happens in calls that the program makes itself, above
all ``tick()`` and ``wait()``, and handlers run inside these calls. There is no event loop, and no thread.

A module that both sides import, ``messages.py``::

    from dataclasses import dataclass
    from stream_ipc import Message

    @dataclass
    class TaskRequest(Message):
        job: str

    @dataclass
    class TaskResponse(Message):
        result: str

The worker, ``worker.py``, which talks over its stdin and stdout (``print`` goes to stderr meanwhile)::

    from messages import TaskRequest, TaskResponse
    from stream_ipc import IpcPeer, LogMessage

    session = IpcPeer().create_stdio_session()

    @session.on_request
    def work(request: TaskRequest) -> TaskResponse:
        session.notify(LogMessage(f"working on {request.job}"))
        return TaskResponse(request.job.upper())

    while session.is_open:  # until the parent closes the session, or is gone
        session.tick(None)

The parent, ``parent.py``, which starts it and ends it::

    import sys
    from messages import TaskRequest, TaskResponse
    from stream_ipc import IpcPeer, LogMessage, RemoteError, StreamClosedError

    with IpcPeer() as peer:
        worker = peer.create_command_session([sys.executable, "worker.py"])

        @worker.on_message
        def log(message: LogMessage) -> None:  # also what the worker writes to its stderr
            print(message.level, message.message)

        try:
            promise = worker.request(TaskRequest("a task"), timeout=10, expect=TaskResponse)
            print(promise.wait().result)
        except RemoteError as error:
            print("the worker could not do it:", error)
        except StreamClosedError as error:
            print("the worker is gone:", error)

What there is:

* ``IpcPeer`` owns sessions and makes them: ``create_command_session``, ``create_stdio_session``, ``connect``,
  ``listen`` (a ``Listener``), ``create_process_session``, ``create_socket_session``, ``create_stream_session``,
  ``create_session``, ``create_session_pair``.
* ``Session``, a conversation with one other process: ``request``, ``notify``, ``receive``, ``on_message``,
  ``on_request``, ``on_exception``, ``on_close``, ``tick``, ``close``.
* ``ResponsePromise``, what ``request`` returns: ``wait``, ``done``, ``cancel``; ``gather`` and ``as_completed`` for many.
* ``DeferredReply``, what a handler returns that answers later; ``WorkerPool``, which gives tasks to workers.
* ``Message``, the base class of what travels; ``LogMessage`` and ``ErrorMessage``; ``RequestEnvelope`` and
  ``ResponseEnvelope``, which only serializers and transports see; ``register_type`` for other classes inside messages.
* ``PickleMessageSerializer`` (the default, in a safe form), ``JsonMessageSerializer`` and ``PhpMessageSerializer``; any
  ``MessageSerializer`` will do. Both sides of a session must use the same.
* ``PidCounterRequestIdGenerator`` (the default) and ``PidHrtimeRequestIdGenerator``; any ``RequestIdGenerator`` will do.
* ``MessageTransport``, to derive transports from; ``StreamTransport``, the one for streams.
* ``IpcError`` and what derives from it: ``StreamClosedError`` (also a ``ConnectionError``), ``RequestTimeoutError``
  (also a ``TimeoutError``), ``RemoteError``, ``UnexpectedReplyError``, ``SerializationError``, ``FrameTooLargeError``,
  ``InvalidStreamError``. Wrong arguments are ``TypeError`` and ``ValueError``; a call from another thread while one is
  inside, or in a forked copy of the process, is a ``RuntimeError``, and so is making a session of a closed peer.

Times are seconds and sizes bytes, everywhere. A ``timeout`` of None is no limit. The logger ``stream_ipc`` tells at
``DEBUG`` what happens to sessions and children, without what they say.
"""

from __future__ import annotations

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
from .ids import PidCounterRequestIdGenerator, PidHrtimeRequestIdGenerator
from .messages import ErrorMessage, LogMessage, Message, RequestEnvelope, ResponseEnvelope
from .peer import IpcPeer
from .promise import ResponsePromise
from .registry import register_type
from .session import Session

# Here and elsewhere without an import: typing is slow to import, and only type checkers need it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .deferred import DeferredReply
    from .listener import Listener
    from .pool import WorkerPool
    from .protocols import MessageSerializer, RequestIdGenerator
    from .serializers.json import JsonMessageSerializer
    from .serializers.php import PhpMessageSerializer
    from .serializers.pickle import PickleMessageSerializer
    from .transports.message_transport import MessageTransport, StreamTransport
    from .waiting import as_completed, gather

__version__ = "2.0.0"

__all__ = [
    "DeferredReply", "ErrorMessage", "FrameTooLargeError", "InvalidStreamError", "IpcError", "IpcPeer",
    "JsonMessageSerializer", "Listener", "LogMessage", "Message", "MessageSerializer", "MessageTransport",
    "PhpMessageSerializer", "PickleMessageSerializer", "PidCounterRequestIdGenerator", "PidHrtimeRequestIdGenerator",
    "RemoteError", "RequestEnvelope", "RequestIdGenerator", "RequestTimeoutError", "ResponseEnvelope",
    "ResponsePromise", "SerializationError", "Session", "StreamClosedError", "StreamTransport", "UnexpectedReplyError",
    "WorkerPool", "as_completed", "gather", "register_type",
]  # fmt: skip

_LAZY = {
    "DeferredReply": "deferred",
    "JsonMessageSerializer": "serializers.json",
    "Listener": "listener",
    "MessageSerializer": "protocols",
    "MessageTransport": "transports.message_transport",
    "PhpMessageSerializer": "serializers.php",
    "PickleMessageSerializer": "serializers.pickle",
    "RequestIdGenerator": "protocols",
    "StreamTransport": "transports.message_transport",
    "WorkerPool": "pool",
    "as_completed": "waiting",
    "gather": "waiting",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # help() finds only what dir() names


def __getattr__(name: str) -> Any:
    # Imported at first use: most programs need one serializer, and neither a listener nor a pool.
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value
