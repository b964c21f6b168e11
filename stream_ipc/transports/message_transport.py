"""``MessageTransport``, from which users derive transports of their own, and the channel over one.

Knows messages and channels. Must not know streams. What a transport raises is left to the core.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import chain, compress, starmap

from ..errors import StreamClosedError
from ..interruptions import pass_on
from ..messages import Message, put_in_envelope
from .channel import DRAIN_READS, POLL_INTERVAL, Channel, Inputs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterable, Sequence
    from typing import Any, Protocol

    from .channel import Interest, Received, Teardown

    class Transport(Protocol):
        """What an object must have to be carried by a ``ForeignChannel``, derived from ``MessageTransport`` or not."""

        def send(self, message: Message, /) -> Any: ...

        def receive(self) -> Iterable[Message]: ...

        def read_fds(self) -> Iterable[int]: ...

        def close(self) -> Any: ...

__all__ = ["ForeignChannel", "MessageTransport"]


class MessageTransport(ABC):
    """Sends and receives messages over something.

    Derive from it to carry messages over anything, and pass an instance to
    ``IpcPeer.create_session``, whose session then owns and closes it. Anything
    but ``StreamClosedError`` that a method raises is a failure of the stream:
    see ``Session.on_exception``. An object that merely has the four abstract
    methods works too. None of them may block.

    What ``send`` and ``receive`` see besides users' messages are
    ``RequestEnvelope`` and ``ResponseEnvelope``.
    """

    __slots__ = ("__weakref__",)

    @abstractmethod
    def send(self, message: Message) -> None:
        """Send a message, or queue it whole.

        Raises:
            StreamClosedError: The other side is gone.
        """

    @abstractmethod
    def receive(self) -> list[Message]:
        """Return what is there now, in order; an empty list if nothing is.

        Raises:
            StreamClosedError: The other side is gone, and everything that it
                had sent was returned before.
        """

    @abstractmethod
    def read_fds(self) -> Sequence[int]:
        """Return what becomes readable when ``receive`` has something.

        Descriptors; asked for again on every tick. Empty if there are none:
        then ``receive`` is called on every tick, and at least every 10 ms while
        waiting.
        """

    @abstractmethod
    def close(self) -> None:
        """Release everything. Called once."""

    @property
    def wants_write(self) -> bool:
        """Whether ``flush`` should be called when ``write_fd`` is writable."""
        return False

    @property
    def write_fd(self) -> int | None:
        """The descriptor to wait for while ``wants_write``, or None.

        None to be asked on every tick.
        """
        return None

    def flush(self) -> None:
        """Write some of what is queued.

        Raises:
            StreamClosedError: The other side is gone.
        """


class ForeignInputs(Inputs):
    """Reads a ``MessageTransport``, or what has its methods."""

    def __init__(self, transport: Any) -> None:
        super().__init__()
        self.received_bytes: int = 0  # declared in each class that stores it, as pyright asks for
        self.closed: bool = False  # then nothing is asked of it any more
        self._transport = transport

    def read(self, inbox: deque[Received]) -> None:
        before = len(inbox)
        try:
            # The list goes from receive() into the inbox inside one call, so no interruption can come in between.
            unused = iter((True,))
            inbox.extend(chain.from_iterable(compress(starmap(self._transport.receive, [()]), unused)))
            for _ in unused:
                raise RuntimeError(f"{type(self._transport).__name__}.receive() raised StopIteration")
        except StreamClosedError as exc:
            self.put_end(inbox, exc)
        self.received_bytes += max(0, len(inbox) - before)  # at least so many; fewer if receive() has turned

    def drain(self, inbox: deque[Received]) -> None:
        for _ in range(DRAIN_READS):
            before = len(inbox)
            self.read(inbox)
            if self.ended is not None or self.closed or len(inbox) == before:
                break


class ForeignChannel(Channel):
    """Makes a channel of a ``MessageTransport``, or of any object with its abstract methods.

    Raises:
        TypeError: It is a class, or lacks a method.
    """

    volatile = True
    last: Any = None  # not known
    writing: bool = False
    corked: bool = False

    def __init__(self, transport: Any) -> None:
        if isinstance(transport, type):
            raise TypeError(f"{transport!r} is a class; pass an instance")
        for name in ("send", "receive", "read_fds", "close"):
            if not callable(getattr(transport, name, None)):
                text = f"{type(transport).__name__} is no transport: it has no method {name}()"
                raise TypeError(f"{text}; derive it from MessageTransport")
        self.transport: Any = transport
        self.outbox: Any = self
        self.inputs: ForeignInputs = ForeignInputs(transport)
        self.is_broken: bool = False

    def _asked(self, name: str) -> Any:
        # A property in MessageTransport; a method in somebody's own class is as good.
        value = getattr(self.transport, name, None)
        return value() if callable(value) else value

    def encode(self, kind: int, id: Any, message: Message) -> Message:
        return put_in_envelope(kind, id, message)

    def put(self, frame: Message) -> None:
        if self.inputs.closed:  # by a method of its own that was asked how much is queued
            raise StreamClosedError(self.closed_text())
        self.transport.send(frame)

    def interest(self) -> Interest:
        poll_in: float | None = None
        write_fd = None
        polls_output = False
        reads: tuple[int, ...] = ()
        if self.inputs.ended is None:
            reads = tuple(self.transport.read_fds())
            if not reads:
                poll_in = POLL_INTERVAL
        if not self.is_broken and self._asked("wants_write"):
            write_fd = self._asked("write_fd")
            polls_output = write_fd is None
            if polls_output:
                poll_in = POLL_INTERVAL
        for fd in (*reads, -1 if write_fd is None else write_fd):
            if not isinstance(fd, int):
                name = type(self.transport).__name__
                raise TypeError(f"{name}.read_fds and write_fd are to return descriptors, which are ints, not {fd!r:.100}")
        return reads, write_fd, poll_in, polls_output

    def flush(self) -> None:
        flush = getattr(self.transport, "flush", None)
        if flush is not None:
            flush()

    @property
    def queued_bytes(self) -> int:
        if self.is_broken:
            return 0
        try:
            if not self._asked("wants_write"):
                return 0
            queued = self._asked("queued_bytes")
        except Exception as exc:
            pass_on(exc)
            return 0  # the port learns of it when it asks what to watch
        return queued if isinstance(queued, int) else 1  # something, of unknown size

    def cork(self, corked: bool) -> None:
        """Do nothing: it is for the transport to gather what is sent."""

    def drop_output(self) -> None:
        self.is_broken = True

    def close(self) -> Teardown | None:
        if not self.inputs.closed:
            self.inputs.closed = True
            self.transport.close()
        return None
