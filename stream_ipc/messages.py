"""Messages, and the envelopes that make requests and responses of them.

Knows the registry, where every message class is entered. Must not know how messages become bytes or who sends them.
"""

from __future__ import annotations

import enum
from dataclasses import InitVar, dataclass, field

from . import registry
from .errors import SerializationError, article
from .ids import MAX_ID_LENGTH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "ENVELOPES", "NOTIFICATION", "REQUEST", "RESPONSE", "ErrorMessage", "LogMessage", "Message",
    "RequestEnvelope", "ResponseEnvelope", "add_id", "failed_in_dispatch", "is_text", "no_message",
    "put_in_envelope", "take_out_of_envelope", "text_message",
]  # fmt: skip

NOTIFICATION, REQUEST, RESPONSE = 0, 1, 2  # the kinds of what travels


class Message:
    """Base class of everything that is sent.

    Derive from it, usually as a dataclass::

        @dataclass
        class TaskRequest(Message):
            job: str

    Deriving registers the class under its wire name: ``module.QualName``, or
    the one that is given with ``class TaskRequest(Message,
    wire_name="App\\\\Message\\\\TaskRequest")``. Both sides must know the class
    under the same name, so define it in a module that both import. A dataclass
    is rebuilt by its constructor on the other side, so ``__post_init__`` can
    check what came; any other class is rebuilt from its attributes, also one
    that derives from a dataclass and has a constructor of its own.

    Raises:
        TypeError: At the definition: instances of the class cannot be rebuilt
            (it derives from ``list``, an enum, ...).
        ValueError: At the definition: the wire name is taken by another class.
    """

    __slots__ = ()

    def __init_subclass__(cls, wire_name: str | None = None, **kwargs: Any) -> None:
        try:
            super().__init_subclass__(**kwargs)
        except TypeError as exc:
            if not kwargs:
                raise
            text = f"{cls.__qualname__}(Message, {next(iter(kwargs))}=...): {exc}: the wire name is given as wire_name="
            raise TypeError(text) from exc
        if issubclass(cls, enum.Enum):
            raise TypeError(
                f"{cls.__qualname__} cannot be a message and an enum at once; make it an enum, register it with"
                f" register_type(), and send it in a field of a message"
            )
        registry.register(cls, wire_name)


@dataclass
class LogMessage(Message, wire_name="StreamIpc\\Message\\LogMessage"):
    """Text with a level.

    The library itself makes them of text that is no message: bytes between
    frames (``LEVEL_JUNK``) and what a child process writes to its stderr
    (``LEVEL_STDERR``).

    Attributes:
        message: The text.
        level: Any word; ``"info"`` by default.
        LEVEL_JUNK: ``"junk"``.
        LEVEL_STDERR: ``"stderr"``.
    """

    # No ClassVar: dataclasses recognizes it only if typing has been imported.
    LEVEL_JUNK = "junk"
    LEVEL_STDERR = "stderr"

    message: str
    level: str = "info"


_MARK = object()  # a pickle carries another


def text_message(text: str, level: str) -> LogMessage:
    """Return the message for text of a stream that is no message."""
    message = LogMessage(text, level)
    message.__dict__["_is_text"] = _MARK
    return message


def is_text(message: Message) -> bool:
    """Return whether a message was made by ``text_message``, here and not by the other side."""
    return type(message) is LogMessage and message.__dict__.get("_is_text") is _MARK


@dataclass
class ErrorMessage(Message, wire_name="StreamIpc\\Message\\ErrorMessage"):
    """An error as text.

    As the reply to a request it makes the requester's ``wait()`` raise
    ``RemoteError``.

    Attributes:
        message: The text. If an exception was given, its type, message and
            traceback follow on the next lines.
    """

    # The original keeps the text in a private property of this name.
    message: str = field(metadata={"wire_name": "errorMessage", "visibility": "private"})
    exception: InitVar[BaseException | None] = None

    def __post_init__(self, exception: BaseException | None) -> None:
        if not isinstance(self.message, str):  # it may come off the wire, and str() of the whole must not fail
            raise TypeError(f"message of an ErrorMessage must be a str, not {type(self.message).__name__}")
        if exception is not None:
            if not isinstance(exception, BaseException):
                raise TypeError(f"exception of an ErrorMessage must be an exception, not {type(exception).__name__}")
            import traceback  # slow to import, and most programs never need it

            lines = traceback.format_exception(type(exception), exception, exception.__traceback__)
            summary = traceback.format_exception_only(type(exception), exception)
            texts = {self.message: None, "".join(summary).strip(): None, "".join(lines).strip(): None}
            self.message = "\n".join(texts)  # without a traceback the last two are one

    def __str__(self) -> str:
        return self.message


def failed_in_dispatch(error: BaseException) -> ErrorMessage:
    """Return the reply to a request whose handler has failed, or that cannot be passed on."""
    return ErrorMessage("Error in dispatch", error)


@dataclass
class RequestEnvelope(Message, wire_name="StreamIpc\\Envelope\\RequestEnvelope"):
    """A message that expects a reply.

    Attributes:
        id: Chosen by the requester; only compared for equality.
        request: The message.
    """

    id: str
    request: Message


@dataclass
class ResponseEnvelope(Message, wire_name="StreamIpc\\Envelope\\ResponseEnvelope"):
    """The answer to a request.

    Attributes:
        id: The id of the request.
        response: The message.
    """

    id: str
    response: Message


def no_message(cls: type) -> SerializationError:
    """Return the error about a value that is to be sent by itself."""
    return SerializationError(f"{article(cls)} cannot be sent by itself: only messages can; derive a class from Message")


ENVELOPES = (RequestEnvelope, ResponseEnvelope)


def put_in_envelope(kind: int, id: Any, message: Message) -> Message:
    """Return the envelope for a kind and its message; a notification has none and stands for itself."""
    if kind == REQUEST:
        return RequestEnvelope(id, message)
    if kind == RESPONSE:
        return ResponseEnvelope(id, message)
    return message


def take_out_of_envelope(message: Any) -> tuple[int, Any, Message]:
    """Return the kind, the id (None for a notification) and the message; SerializationError if an envelope is not whole."""
    cls = type(message)
    if cls is not RequestEnvelope and cls is not ResponseEnvelope:
        return NOTIFICATION, None, message
    try:
        kind, content = (REQUEST, message.request) if cls is RequestEnvelope else (RESPONSE, message.response)
        id = message.id
    except AttributeError as exc:
        raise SerializationError(f"an envelope cannot be sent: {exc}") from exc
    if type(id) is not str or len(id) > MAX_ID_LENGTH:
        raise SerializationError(f"{cls.__name__}: an envelope's id must be a str of at most {MAX_ID_LENGTH} characters")
    return kind, id, content


def add_id(error: SerializationError, kind: Any, id: Any) -> SerializationError:
    """Say in an error whose request or response it is about, if that is an envelope with a valid id; returns the error."""
    if type(id) is str and len(id) <= MAX_ID_LENGTH:
        if kind == REQUEST:
            error.request_id = id
        elif kind == RESPONSE:
            error.response_id = id
    return error
