"""What a transport is: to users (``MessageTransport``), and to a session (``Channel``).

Knows messages and errors. Must not know sessions, peers or any particular kind of stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import chain, starmap

from ..messages import Message, put_in_envelope
from .descriptors import wait_readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, Iterable, List, Optional, Protocol, Sequence

    from ..wire.codec import Received

    class Transport(Protocol):
        """What an object must have to be carried by a ``ForeignChannel``, derived from ``MessageTransport`` or not."""

        def send(self, message: Message, /) -> Any: ...

        def receive(self) -> Iterable[Message]: ...

        def read_fds(self) -> Iterable[int]: ...

        def close(self) -> Any: ...


__all__ = ["POLL_INTERVAL", "Channel", "Ending", "ForeignChannel", "MessageTransport", "finish"]

# How often a transport without descriptors is asked while waiting, in seconds.
POLL_INTERVAL = 0.01


class MessageTransport(ABC):
    """Sends and receives messages over something.

    Derive from it to carry messages over anything, and pass an instance to ``IpcPeer.create_session``, whose session
    then owns and closes it. Anything but ``StreamClosedError`` that a method raises is a failure of the stream: see
    ``Session.on_exception``. An object that merely has the four methods works too. None of them may block.

    What ``send`` and ``receive`` see besides users' messages are ``RequestEnvelope`` and ``ResponseEnvelope``.
    """

    @abstractmethod
    def send(self, message: Message) -> None:
        """Send a message, or queue it.

        Raises:
            StreamClosedError: The other side is gone.
        """

    @abstractmethod
    def receive(self) -> List[Message]:
        """Return what is there now, in order; an empty list if nothing is.

        Raises:
            StreamClosedError: The other side is gone, and everything that it had sent was returned before.
        """

    @abstractmethod
    def read_fds(self) -> Sequence[int]:
        """The descriptors that become readable when ``receive`` has something. Asked again on every tick.

        Empty if there are none: then ``receive`` is called on every tick, and at least every 10 ms while waiting.
        """

    @abstractmethod
    def close(self) -> None:
        """Release everything. Called once."""

    @property
    def wants_write(self) -> bool:
        """Whether ``flush`` should be called when ``write_fd`` is writable."""
        return False

    @property
    def write_fd(self) -> Optional[int]:
        """The descriptor to wait for while ``wants_write``; None to be asked on every tick."""
        return None

    def flush(self) -> None:
        """Write some of what is queued.

        Raises:
            StreamClosedError: The other side is gone.
        """


class Ending:
    """What is left to be done after a channel was closed, in steps that do not block.

    Attributes:
        background: It is left to ticks, and waited for at the end of the peer only.
    """

    background = False

    def fds(self) -> List[int]:
        """Descriptors that become readable when ``step`` has something to do."""
        return []

    def step(self) -> Optional[float]:
        """Do what can be done now.

        Returns:
            In how many seconds to call again at the latest, or None if all is done.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Release what is held without finishing: in a forked copy of the process."""


def finish(endings: Sequence[Ending]) -> None:
    """Block until all are done, side by side. Each of them bounds its own steps."""
    while True:
        waiting = []
        wait = 60.0
        for ending in endings:
            left = ending.step()
            if left is not None:
                wait = min(wait, left)
                waiting.append(ending)
        if not waiting:
            return
        endings = waiting
        wait_readable([fd for ending in endings for fd in ending.fds()], wait)


class Channel:
    """What a session needs of its transport, whatever it is.

    Attributes:
        transport: The transport as its user knows it.
        changed: To be called when ``read_fds``, ``output_fd`` or ``poll_interval`` answer differently than before; set
            by the session.
        volatile: ``changed`` is never called, so the answers are to be asked for on every tick.
        takes_frames: Whether it has ``encode`` and ``enqueue``, so that a message can be encoded once for many.
        corked: While true, small frames may be gathered before they are written.
        received_bytes: How many bytes have been received in all.
        text_bytes: How many of these were no frames but text from a stream for it.
        queued_bytes: How many bytes wait to be written.
        sent: How many messages have been queued or written in all, if the channel counts them.
        writing: A write is under way, so that what a finalizer or a signal handler sends meanwhile is only queued.
    """

    transport: Any = None
    changed: Callable[[], None]
    volatile = False
    takes_frames = False
    corked = False
    received_bytes: int = 0
    text_bytes = 0
    queued_bytes: int = 0
    sent: int = 0
    writing: bool = False

    @property
    def poll_interval(self) -> Optional[float]:
        """In how many seconds at the latest ``receive_into`` is to be called though no descriptor is ready."""
        return None

    @property
    def rest(self) -> float:
        """For how many seconds after such a call another one would be of no use, though others may tick meanwhile."""
        return 0.0

    def send(self, message: Message) -> None:
        """Send a message, or queue it whole."""
        raise NotImplementedError

    def post(self, kind: int, id: Any, message: Message) -> None:
        """The same for a message without its envelope, which is made only if somebody wants to see it."""
        self.send(put_in_envelope(kind, id, message))

    def receive_into(self, inbox: Deque[Received], fd: int) -> None:
        """Append what can be read now to the inbox.

        Args:
            inbox: Where messages go, and errors that stand for messages.
            fd: Which of ``read_fds`` is ready; -1 if none is and ``poll_interval`` has passed.

        Raises:
            StreamClosedError: Nothing more will come.
        """
        raise NotImplementedError

    def read_fds(self) -> Sequence[int]:
        """The descriptors to wait for."""
        raise NotImplementedError

    def output_fd(self) -> Optional[int]:
        """The descriptor to wait for until ``flush`` can go on, or None if nothing is queued."""
        return None

    def flush(self) -> None:
        """Write what the stream takes now of what is queued."""

    @property
    def has_unread(self) -> bool:
        """Whether something has been read and is not in the inbox yet."""
        return False

    def note_interrupted(self) -> None:
        """``receive_into`` was interrupted by a signal handler's exception: it is to be called again soon."""

    def give_up(self) -> None:
        """Drop what is queued: it can never be written."""

    def find_invalid(self) -> Optional[str]:
        """What is wrong with a stream that its owner closed or replaced, or None."""
        return None

    def trim(self) -> None:
        """Give memory back that is only kept to be quick. Called now and then while nothing happens."""

    def drain(self, inbox: Deque[Received]) -> None:
        """Read what is there now, after writing has failed."""

    def closed_text(self) -> str:
        """Why this side closed, for the errors of what was pending."""
        return f"this side closed the session ({self.describe()})"

    def end(self) -> Optional[Ending]:
        """Release the streams and close them. Called once.

        Returns:
            What is left to be done if that takes time.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Release the streams but leave them open, as they were found. Called once, instead of ``close``."""

    def abandon(self) -> None:
        """Close this process's copies of the descriptors and touch nothing else: it is a fork of the owner."""

    def describe(self) -> str:
        """A few words for reprs, logs and error texts; the same for as long as it lives."""
        return type(self.transport).__name__

    def details(self) -> str:
        """What the log says once, at the beginning, behind ``describe``; may be empty."""
        return ""


class ForeignChannel(Channel):
    """Makes a channel of a transport that somebody else wrote."""

    volatile = True

    def __init__(self, transport: Any) -> None:
        for name in ("send", "receive", "read_fds", "close"):
            if isinstance(transport, type):
                raise TypeError(f"{transport!r} is a class; pass an instance")
            if not callable(getattr(transport, name, None)):
                text = f"{type(transport).__name__} is no transport: it has no method {name}()"
                raise TypeError(f"{text}; derive it from MessageTransport")
        self.transport = transport
        self.send: Callable[[Message], None] = transport.send  # type: ignore[assignment]
        self._receive = transport.receive
        self.received_bytes: int = 0
        self._given_up = False
        self._ended = False

    @property
    def poll_interval(self) -> Optional[float]:
        if not self.transport.read_fds() or (self._asked("wants_write") and self._asked("write_fd") is None):
            return POLL_INTERVAL
        return None

    def _asked(self, name: str) -> Any:
        # A property in MessageTransport; a method in somebody's own class is as good.
        value = getattr(self.transport, name, None)
        return value() if callable(value) else value

    def receive_into(self, inbox: Deque[Received], fd: int) -> None:
        try:
            asked_to_flush = self._asked("wants_write") and self._asked("write_fd") is None
        except Exception:
            asked_to_flush = False  # the session has learned of it when it asked what to watch
        if asked_to_flush:
            self.flush()
        before = len(inbox)
        # The list goes from receive() into the inbox inside one call: a KeyboardInterrupt cannot come in between.
        inbox.extend(chain.from_iterable(starmap(self._receive, [()])))
        self.received_bytes += len(inbox) - before  # at least so many

    def read_fds(self) -> Sequence[int]:
        return tuple(self.transport.read_fds())

    def output_fd(self) -> Optional[int]:
        return self._asked("write_fd") if self._asked("wants_write") and not self._given_up else None

    def give_up(self) -> None:
        self._given_up = True

    def flush(self) -> None:
        flush = getattr(self.transport, "flush", None)
        if flush is not None:
            flush()

    @property
    def queued_bytes(self) -> int:  # type: ignore[override]
        if self._given_up:
            return 0
        try:
            if not self._asked("wants_write"):
                return 0
            queued = self._asked("queued_bytes")
        except Exception:  # the session learns of it when it asks what to watch
            return 0
        return queued if isinstance(queued, int) else 1  # something, of unknown size

    def end(self) -> Optional[Ending]:
        if not self._ended:
            self._ended = True
            self.transport.close()
        return None

