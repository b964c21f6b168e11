"""``MessageTransport`` and ``StreamTransport``, as users see them.

Knows messages, and the channels behind them. Must not know sessions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from ..errors import InvalidStreamError, StreamClosedError
from ..interruptions import pass_on
from ..messages import Message, take_out_of_envelope
from ..wire.codec import DEFAULT_MAX_FRAME_SIZE, MessageEncoder
from .channel import EndOfStream
from .custom_channel import CustomChannel
from .descriptors import wait_readable
from .stream_channel import StreamChannel
from .streams import open_channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, Protocol

    from ..protocols import MessageSerializer
    from .channel import Channel
    from .streams import ReadStream, WriteStream

    class Transport(Protocol):
        """What has the abstract methods of ``MessageTransport``, derived from it or not."""

        def send(self, message: Message, /) -> Any: ...

        def receive(self) -> Iterable[Message]: ...

        def read_fds(self) -> Iterable[int]: ...

        def close(self) -> Any: ...

__all__ = ["MessageTransport", "StreamTransport", "channel_of", "transport_of"]


class MessageTransport(ABC):
    """Sends and receives messages over something.

    Derive from it to carry messages over anything, and pass an instance to
    ``IpcPeer.create_session``, whose session then owns and closes it. An object
    that merely has the four abstract methods works too. None of them may block.
    Anything but ``StreamClosedError`` that one raises is a failure of the
    stream: see ``Session.on_exception``. What ``send`` raises comes out of the
    call that sends.

    What ``send`` and ``receive`` see besides users' messages are
    ``RequestEnvelope`` and ``ResponseEnvelope``.
    """

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
        """Return the descriptors that tell when ``receive`` has something.

        Asked for again on every tick. Empty if there are none: then ``receive``
        is called on every tick, and at least every 10 ms while waiting. One
        that another session or a listener of the peer waits for fails this
        transport with ``InvalidStreamError``, and does the other no harm.
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
        """What to wait for while ``wants_write``; None: flush on every tick."""
        return None

    def flush(self) -> None:
        """Write some of what is queued.

        Raises:
            StreamClosedError: The other side is gone.
        """


class StreamTransport(MessageTransport):
    """Messages in frames over streams, which it owns and closes.

    For what may be a stream see ``IpcPeer.create_stream_session``; the same one
    may be both written and read. Bytes that belong to no frame arrive as
    ``LogMessage`` of level ``"junk"``. No method blocks: what the stream does
    not take is queued, without a limit (a session has one).

    Args:
        write: The stream that is written.
        reads: Those that are read; it ends when all of them have ended.
        serializer: Turns messages into payloads.
        max_frame_size: The largest payload in bytes, both ways.

    Raises:
        InvalidStreamError: A stream cannot be used. All of them stay open.
        TypeError: Another argument is of a wrong kind.
        ValueError: ``max_frame_size`` is no size that a frame can have.
    """

    def __init__(
        self,
        write: WriteStream,
        reads: Sequence[ReadStream],
        serializer: MessageSerializer,
        max_frame_size: int = DEFAULT_MAX_FRAME_SIZE,
    ) -> None:
        MessageEncoder(serializer, max_frame_size)  # checks them before anything is opened
        if not hasattr(reads, "__iter__") or hasattr(reads, "read"):  # to go through a file would read it, and block
            raise TypeError(f"StreamTransport() takes a list of the streams that it reads, not {reads!r:.100}")
        self._received: list[Any] = []  # what an interrupted receive() has left
        self._channel = open_channel(write, reads, serializer, max_frame_size)
        self._channel.transport = self

    def __repr__(self) -> str:
        try:
            channel = self._channel
            return f"<{type(self).__name__} {channel.describe()} {channel.state_text} queued={channel.outbox.queued_bytes}>"
        except Exception as exc:  # half made
            pass_on(exc)
            return f"<{type(self).__name__}>"

    @property
    def serializer(self) -> MessageSerializer:
        """What turns messages into payloads."""
        return self._channel.serializer

    @property
    def max_frame_size(self) -> int:
        """The largest payload in bytes, both ways."""
        return self._channel.max_frame_size

    @property
    def queued_bytes(self) -> int:
        """How many bytes wait to be written."""
        return self._channel.outbox.queued_bytes

    @property
    def received_bytes(self) -> int:
        """How many bytes have been received in all."""
        return self._channel.inputs.received_bytes

    @property
    def wants_write(self) -> bool:
        return self._channel.outbox.blocked or self.write_fd is not None

    @property
    def write_fd(self) -> int | None:
        return self._channel.interest()[1]

    def send(self, message: Message) -> None:
        """Queue a message and write what the stream takes now.

        Raises:
            SerializationError: The message cannot travel; nothing was queued.
            FrameTooLargeError: It is over ``max_frame_size``; nothing was
                queued.
            StreamClosedError: The other side no longer reads.
        """
        self._channel.put(self._channel.encode(*take_out_of_envelope(message)))

    def flush(self) -> None:
        self._channel.flush()

    def read_fds(self) -> Sequence[int]:
        reads, _, poll_in, _ = self._channel.interest()
        # None if something can be received that these do not show.
        return () if self._received or poll_in < math.inf else tuple(reads)

    def receive(self) -> list[Message]:
        """Read each input once and return the messages.

        What could not be decoded is in the list, too: an error object.

        Raises:
            StreamClosedError: All inputs have ended, or this side closed it.
        """
        inputs = self._channel.inputs
        inbox: Any = self._received
        inputs.resume(inbox)
        for fd, source in inputs.by_fd.copy().items():
            try:
                if not source.end.shared or wait_readable((fd,), 0):
                    source.read(inbox)
            except InvalidStreamError as exc:
                pass_on(exc)
                if not inbox:
                    raise
        if inbox and isinstance(inbox[-1], EndOfStream):
            inbox.pop()
        # atomic: no calls
        messages: list[Message] = inbox[:]
        inbox[:] = ()

        if not messages and inputs.ended is not None:
            raise inputs.ended.with_traceback(None)  # or each call would make it longer
        if not messages and self._channel.is_released:  # not one that only writes
            raise StreamClosedError(self._channel.broken_text())
        return messages

    def close(self) -> None:
        """Close the streams. What is queued is dropped. May be called again."""
        self._channel.close()


def channel_of(transport: Any) -> Channel:
    """Return the channel behind a ``StreamTransport``, or a new one over any other transport.

    Raises:
        InvalidStreamError: A ``StreamTransport`` is closed, or one of its streams is.
    """
    channel: StreamChannel | None = getattr(transport, "_channel", None) if isinstance(transport, StreamTransport) else None
    if channel is not None:
        if channel.find_invalid() is not None:
            raise InvalidStreamError(f"{transport!r:.100} cannot be used: it is closed, or one of its streams is")
        # What it has given out, or is to give out itself, a session over its channel would never get.
        if type(transport) is StreamTransport and channel.inputs.ended is None and not transport._received:
            return channel
    return CustomChannel(transport)


def transport_of(channel: Channel) -> Any:
    """Return the transport of a channel as people know it."""
    if isinstance(channel, StreamChannel) and channel.transport is channel:
        transport = StreamTransport.__new__(StreamTransport)
        transport._channel = channel
        transport._received = []
        channel.transport = transport
    return channel.transport
