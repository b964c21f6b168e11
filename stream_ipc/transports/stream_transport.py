"""``StreamTransport``: a channel over streams as users see it.

Knows channels over streams. Must not know sessions or processes.
"""

from __future__ import annotations

from collections import deque

from ..interruptions import pass_on
from ..messages import take_out_of_envelope
from ..wire.codec import DEFAULT_MAX_FRAME_SIZE, MessageEncoder
from .channel import EndOfStream
from .descriptors import wait_readable
from .message_transport import ForeignChannel, MessageTransport
from .objects import open_channel
from .stream_channel import StreamChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..messages import Message
    from ..protocols import MessageSerializer
    from .channel import Channel
    from .objects import ReadStream, WriteStream

__all__ = ["StreamTransport", "channel_of", "transport_of"]


class StreamTransport(MessageTransport):
    """Messages in frames over streams.

    One is written, and any number are read. It owns the streams and closes
    them. A stream is a file object, a socket, a raw descriptor, or an object
    whose ``read`` or ``write`` does not block (see
    ``IpcPeer.create_stream_session``); the same one may be both written and
    read. Bytes on a read stream that belong to no frame arrive as
    ``LogMessage`` of level ``"junk"``. No method blocks: what the stream does
    not take is queued, without a limit of its own (a session has one).

    Args:
        write: The stream that is written.
        reads: The streams that are read. The transport ends when all of them
            have ended.
        serializer: What turns messages into payloads.
        max_frame_size: The largest payload in bytes, both ways.

    Raises:
        InvalidStreamError: A stream is closed, or has neither a descriptor nor
            such methods. All streams stay open.
        TypeError: The serializer lacks a method, or ``max_frame_size`` is no
            int.
        ValueError: ``max_frame_size`` is no size that a frame can have.
    """

    __slots__ = ("__dict__", "_channel")

    def __init__(
        self,
        write: WriteStream,
        reads: Sequence[ReadStream],
        serializer: MessageSerializer,
        max_frame_size: int = DEFAULT_MAX_FRAME_SIZE,
    ) -> None:
        MessageEncoder(serializer, max_frame_size)  # checks them before anything is opened
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
        """Whether something is queued that the stream did not take."""
        return self._channel.outbox.blocked or self.write_fd is not None

    @property
    def write_fd(self) -> int | None:
        """The descriptor to wait for while something is queued, otherwise None."""
        return self._channel.interest()[1]

    def send(self, message: Message) -> None:
        """Queue a message and write what the stream takes now. Never blocks.

        Raises:
            SerializationError: The message cannot travel; nothing was queued.
            FrameTooLargeError: It is over ``max_frame_size``; nothing was
                queued.
            StreamClosedError: The other side no longer reads.
        """
        self._channel.put(self._channel.encode(*take_out_of_envelope(message)))

    def flush(self) -> None:
        """Write what the stream takes now of what is queued. Never blocks.

        Raises:
            StreamClosedError: The other side no longer reads. What was queued
                is dropped.
        """
        self._channel.flush()

    def read_fds(self) -> Sequence[int]:
        """Return the descriptors to wait for.

        Empty if something can be read that these do not show.
        """
        reads, _, poll_in, _ = self._channel.interest()
        return tuple(reads) if poll_in is None else ()

    def receive(self) -> list[Message]:
        """Read each input once and return the messages. Never blocks.

        What could not be decoded is in the list too, as an error object in its
        place.

        Raises:
            StreamClosedError: All inputs have ended.
        """
        inputs = self._channel.inputs
        inbox: deque[Any] = deque()
        for fd, source in tuple(inputs.by_fd.items()):
            if not source.end.shared or wait_readable((fd,), 0):
                source.read(inbox)
        if inbox and isinstance(inbox[-1], EndOfStream):
            inbox.pop()
        if not inbox and inputs.ended is not None:
            raise inputs.ended.with_traceback(None)  # or each call would make it longer
        return list(inbox)

    def close(self) -> None:
        """Close the streams. What is still queued is dropped.

        A second call does nothing.
        """
        self._channel.close()


def channel_of(transport: Any) -> Channel:
    """Return the channel behind a ``StreamTransport``, or a new one over any other transport.

    Raises:
        TypeError: It is no transport.
    """
    return transport._channel if type(transport) is StreamTransport else ForeignChannel(transport)


def transport_of(channel: Channel) -> Any:
    """Return the transport of a channel as people know it."""
    if isinstance(channel, StreamChannel) and channel.transport is channel:
        transport = StreamTransport.__new__(StreamTransport)
        transport._channel = channel
        channel.transport = transport
    return channel.transport
