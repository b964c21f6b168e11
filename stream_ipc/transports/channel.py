"""``Channel`` and ``Inputs``: what the core needs of a transport, whatever it is; and what is left once one is closed.

Knows messages and errors. Must not know sessions, peers or any particular kind of stream.
"""

from __future__ import annotations

from ..errors import StreamClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol, Union

    from ..messages import Message
    from ..wire.codec import Decoded

    # What stands in an inbox: what was decoded, and the end behind it.
    Received = Union[Decoded, "EndOfStream"]

    # Descriptors to read from, one to write to, seconds until the next poll without an event (infinity for none), and
    # whether what is queued can be written only by trying.
    Interest = tuple[Sequence[int], int | None, float, bool]

    # Buffers or, of a transport of somebody's own, a message. It is emptied as it is handed over, not sooner nor later.
    Frame = list[Any]

    class Queue(Protocol):
        """What is queued to be written: an ``Outbox``, or a ``CustomChannel`` itself."""

        @property
        def queued_bytes(self) -> int: ...

        @property
        def writing(self) -> bool: ...

        @property
        def corked(self) -> bool: ...

        @property
        def is_broken(self) -> bool: ...

        def cork(self, corked: bool) -> None: ...


__all__ = ["DRAIN_READS", "POLL_INTERVAL", "Channel", "EndOfStream", "Inputs", "Teardown"]

DRAIN_READS = 64  # reads of one input at the end: 4 MiB, more than a pipe or socket buffer holds

# How often a transport without descriptors is asked while waiting, in seconds.
POLL_INTERVAL = 0.01


class EndOfStream:
    """Stands in an inbox behind the last message: nothing more will come."""

    def __init__(self, error: StreamClosedError) -> None:
        self.error: StreamClosedError = error


class Teardown:
    """What is left to be done after a channel was closed, in steps that do not block.

    Attributes:
        background: It is left to ticks, and waited for at the end of the peer only.
        messages: The last words of the other side, for ``take``.
        take: Set by the core, which gives messages to handlers. Called with these until none is left; takes out the first.
    """

    background = False
    messages: Sequence[Message] = ()
    take: Callable[[Any], Any]

    def fds(self) -> list[int]:
        """Return descriptors that become readable when ``step`` has something to do."""
        return []

    def step(self) -> float | None:
        """Do what can be done now.

        Returns:
            In how many seconds to call again at the latest, or None if all is done.
        """
        raise NotImplementedError

    def hurry(self, due: float) -> None:
        """Have all done at a time of ``monotonic()``, whatever has to be cut short for it."""

    def abandon(self) -> None:
        """Close what is held and leave the rest undone: in a fork, or where nobody closes the peer."""


class Inputs:
    """What a channel is read by.

    Owns how much was read, and why nothing more will come.

    Attributes:
        by_fd: What reads each descriptor that has something of its own to read: ``read(inbox)``, as here.
        received_bytes: How many bytes have been received in all.
        text_bytes: How many of these came from a stream for text.
        junk: The last of the text that came between frames.
        ended: Why nothing more will come, once an ``EndOfStream`` was put into the inbox.
        is_unfinished: Whether a message has begun to arrive.
    """

    is_unfinished: bool = False

    def __init__(self) -> None:
        self.by_fd: dict[int, Any] = {}
        self.received_bytes: int = 0
        self.text_bytes: int = 0
        self.junk: str = ""
        self.ended: StreamClosedError | None = None

    def read(self, inbox: deque[Received]) -> None:
        """Append what can be read now to the inbox: messages, errors that stand for messages, an ``EndOfStream``.

        Called when a descriptor is ready that is not in ``by_fd``, and when it is time to poll.
        """
        raise NotImplementedError

    def drain(self, inbox: deque[Received]) -> None:
        """Read what is there now, as much as a pipe or socket can hold."""

    def resume(self, inbox: deque[Received]) -> None:
        """Do what an interrupted call has left undone."""

    def put_end(self, inbox: deque[Received], error: StreamClosedError) -> None:
        """Append the end to the inbox, once."""
        end = EndOfStream(error)
        # atomic: no calls
        if self.ended is None:
            self.ended = error
            inbox += (end,)

    def correct_end(self, inbox: deque[Received], error: StreamClosedError) -> None:
        """Have the end that was just put say something else."""
        last = inbox[-1] if inbox else None
        if type(last) is EndOfStream:
            # atomic: no calls
            last.error = error
            self.ended = error

    def look_for_hangup(self, inbox: deque[Received]) -> None:
        """Ask whether the other side is gone, as ``look_for_end`` does, of a stream that is not read now."""
        self.look_for_end(inbox)

    def look_for_end(self, inbox: deque[Received]) -> None:
        """Ask whether the other side is gone, where only asking tells at once, and put that into the inbox."""

    def check(self, inbox: deque[Received]) -> None:
        """Look for an end that the system has not told of yet, and give memory back. Called now and then."""

    def wait(self, seconds: float) -> bool:
        """Block until something can be read; returns whether it can."""
        return False


class Channel:
    """What the core needs of a transport, whatever it is.

    Attributes:
        encode: Takes a kind, an id and a message; returns the frame for ``put``, of any with this ``frame_key``.
        put: Sends a frame, or queues it whole. An interrupted call can be made again if the frame is not empty.
        on_change: To be called when ``interest`` answers differently than before; set by the port.
        volatile: ``on_change`` is never called, so ``interest`` is to be asked on every turn.
        frame_key: Channels with the same one take each other's frames, so that a message is encoded once; None: with none.
        transport: The transport as its user knows it.
        inputs: What it is read by.
        outbox: What is queued to be written.
        process: The ``Popen`` of the child at the other end, or None.
    """

    encode: Callable[[int, Any, Message], Frame]
    put: Callable[[Frame], None]
    on_change: Callable[[], None]
    volatile = False
    frame_key: Any = None
    transport: Any
    inputs: Inputs
    outbox: Queue
    process: Any = None

    @property
    def socket(self) -> Any:
        """The socket that it talks over, or None."""
        return None

    def interest(self) -> Interest:
        """Return what to wait for.

        Returns:
            Descriptors to read from; one to write to, or None; in how many seconds to poll, or infinity; whether what is
            queued can be written only by trying, so that polling writes it, too.
        """
        raise NotImplementedError

    def flush(self) -> None:
        """Write what the stream takes now of what is queued."""

    def wait_writable(self, seconds: float) -> bool:
        """Block until something can be written; returns whether it can."""
        return False

    def drop_output(self) -> None:
        """Drop what is queued: it can never be written."""

    def broken_text(self) -> str:
        """Return why nothing can be written any more."""
        return f"the other side no longer reads ({self.describe()})"

    def add_last_words(self, error: StreamClosedError, inbox: deque[Received]) -> None:
        """Put the other side's last words, which were read since, into the error of a failed write."""

    def find_invalid(self) -> str | None:
        """Return what is wrong with a stream that its owner closed or replaced, or None."""
        return None

    def close(self) -> Teardown | None:
        """Release the streams and close them. An interrupted call can be made again.

        Returns:
            What is left to be done if that takes time.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Release the streams but leave them open, as they were found. Called instead of ``close``."""

    def abandon(self) -> None:
        """Close this process's copies of the descriptors and touch nothing else: it is a fork of the owner."""

    def describe(self) -> str:
        """Return a few words for reprs, logs and error texts; the same for as long as it lives."""
        return type(self.transport).__name__

    def details(self) -> str:
        """Return what the log says once, at the beginning, behind ``describe``; may be empty."""
        return ""
