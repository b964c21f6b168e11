"""The exceptions of the library, and what every layer uses to word them.

Imports nothing of the package but ``interruptions``, so every other module may import this one. The tree is flat,
because callers catch by remedy::

    IpcError
    +- StreamClosedError     (also ConnectionError)  the stream has ended: connect again or stop
    +- RequestTimeoutError   (also TimeoutError)     no reply in time: try again or stop
    +- RemoteError                                   the other side replied with an error
    +- UnexpectedReplyError  (also TypeError)        the reply is of another class than was expected
    +- SerializationError                            a message cannot be turned into bytes, or bytes into a message
    +- FrameTooLargeError                            a message is over max_frame_size
    +- InvalidStreamError    (also ValueError)       a stream was closed or is unusable on our side

Misuse of the library (wrong arguments, two threads, a forked copy) stays ``TypeError``, ``ValueError`` and
``RuntimeError``.
"""

from __future__ import annotations

from .interruptions import interruption_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .messages import Message
    from .session import Session

__all__ = [
    "FrameTooLargeError", "InvalidStreamError", "IpcError", "RemoteError", "RequestTimeoutError", "SerializationError",
    "StreamClosedError", "UnexpectedReplyError", "article", "check_plugin", "describe", "printable", "unraised", "within",
]  # fmt: skip


class IpcError(Exception):
    """Base class of all errors of this library."""


class StreamClosedError(IpcError, ConnectionError):
    """The session's stream has ended.

    The text says who closed it: this side, the other side, or the operating
    system; for a child process also its exit status or signal and the last
    lines of its stderr. ``__cause__`` keeps the operating system's error, if
    any.
    """


class RequestTimeoutError(IpcError, TimeoutError):
    """No reply came before the deadline, or a message could not be sent in time.

    Attributes:
        timeout: The limit in seconds.
    """

    def __init__(self, message: str, timeout: float | None = None) -> None:
        super().__init__(message)
        self.timeout = timeout


class RemoteError(IpcError):
    """The reply to a request is an ``ErrorMessage``; the text is its text.

    If a handler has raised an exception, its second line is the type and the
    text of that, and the traceback follows.
    """


class UnexpectedReplyError(IpcError, TypeError):
    """A reply is of another class than the request's ``expect``.

    Attributes:
        reply: The reply.
    """

    def __init__(self, message: str, reply: Message | None = None) -> None:
        super().__init__(message)
        self.reply = reply


class SerializationError(IpcError):
    """A message cannot become a payload, or a payload cannot become a message.

    Attributes:
        request_id: The id of the request envelope whose content could not be
            decoded, if it could be read.
        response_id: The same for a response envelope.
        payload_size: The size in bytes of a received payload that could not be
            decoded; None if it is not known.
    """

    payload_size: int | None = None

    def __init__(
        self, message: str, *, request_id: str | None = None, response_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.response_id = response_id


class FrameTooLargeError(IpcError):
    """A payload is larger than ``max_frame_size``.

    Attributes:
        size: The payload's size in bytes.
        limit: The limit in bytes.
    """

    def __init__(self, message: str, size: int | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class InvalidStreamError(IpcError, ValueError):
    """A stream was closed under its session by its owner, or cannot be used.

    Attributes:
        session: The session concerned, or None. It does not travel when the
            error is pickled.
    """

    def __init__(self, message: str, session: Session | None = None) -> None:
        super().__init__(message)
        self.session = session

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (str(self),))


def article(cls: type) -> str:
    """Return the name of a class with its article."""
    return f"{'an' if cls.__name__[0] in 'aeiouAEIOU' else 'a'} {cls.__name__}"


def printable(text: str) -> str:
    """Return a text that any stream can write: what was not UTF-8 is shown with backslashes."""
    try:  # bytes that came in as lone surrogates
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def check_plugin(kind: str, plugin: Any, *names: str, advice: str = "") -> None:
    """Raise ``TypeError`` for an object of a user's class that lacks a method."""
    for name in names:
        if not callable(getattr(plugin, name, None)):
            raise TypeError(f"{kind} has no method {name}(){advice}: {plugin!r:.100}")
    if isinstance(plugin, type):
        raise TypeError(f"{plugin!r} is a class; pass an instance: {plugin.__name__}()")


def unraised(error: StreamClosedError) -> StreamClosedError:
    """Return a copy without a traceback, for what may be kept for long: a raised error keeps its frames alive."""
    copy = StreamClosedError(*error.args)
    copy.__cause__ = error.__cause__
    if isinstance(copy.__cause__, OSError):
        copy.__cause__.__traceback__ = None
    return copy


def describe(exc: BaseException) -> str:
    """Format a foreign exception as ``Type: text``."""
    # str() can fail: of ValueError(10**5000), or of a class with a __str__ of its own.
    try:
        text = str(exc)
    except Exception as error:
        if interruption_in(error) is error:
            raise
        text = "(it has no text)"
    return f"{type(exc).__name__}: {text}"


def within(timeout: float | None) -> str:
    """Return how long something was waited for, for a text."""
    return "" if timeout is None else f" within {timeout} s"
