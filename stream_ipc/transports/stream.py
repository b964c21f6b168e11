"""Messages over streams: any number of framed inputs and one output.

Knows descriptors, and messages in frames. Must not know sessions or processes. Errors of the operating system are turned
into errors of ours here and nowhere else.

Where a comment says "in one breath", the statements contain no call: a signal handler's exception (``KeyboardInterrupt``)
can then not come between them, so that what was read is either still to be decoded or in the inbox, and what was
written is either still queued or gone, never both and never neither.
"""

from __future__ import annotations

import select
from collections import deque
from typing import Any, Deque, Dict, List, NoReturn, Optional, Sequence

from ..errors import InvalidStreamError, StreamClosedError
from ..messages import LogMessage, Message
from ..serializers.base import MessageSerializer
from ..wire.codec import MessageDecoder, MessageEncoder, Received, decode_text
from ..wire.framing import LARGE
from .base import Channel, Ending, MessageTransport
from .descriptors import ReadEnd, WriteEnd, close_stream

__all__ = ["DEFAULT_MAX_FRAME_SIZE", "StreamTransport"]

DEFAULT_MAX_FRAME_SIZE = 64 * 1024 * 1024

# While corked, frames are written when this much has been gathered: 4 KiB doubles a flood of small messages, 64 KiB puts
# the two sides into lock step (0.7).
_GATHER = 4 * 1024
_JOIN = 64 * 1024  # small buffers are joined up to this size before they are written
_IOV = 64  # buffers in one writev; the system's limit is 1024 at most
_LARGE_READ = 256 * 1024
_DRAIN_READS = 64  # reads of one input at the end: 4 MiB, more than a pipe or socket buffer holds


class _Input:
    """One stream that is read: framed messages, or text of one level."""

    def __init__(self, end: ReadEnd, decoder: Optional[MessageDecoder], level: str) -> None:
        self.end = end
        self.decoder = decoder
        self.level = level
        # What a read has returned and is not decoded yet: bytes, or a count of bytes that were read into place.
        self.data: Optional[bytes] = None
        self.count: Optional[int] = None
        self.held = b""  # bytes of an unfinished character of text
        self.error: Optional[OSError] = None
        self.done = False


class StreamTransport(MessageTransport, Channel):
    """Messages in frames over one stream that is written and any number of streams that are read.

    It owns the streams and closes them. A stream is a file object, a socket or a raw descriptor; the same one may be
    both written and read. Bytes on a read stream that belong to no frame arrive as ``LogMessage`` of level ``"junk"``.
    No method blocks: what the stream does not take is queued, without a limit of its own (a session has one).

    Args:
        write: The stream that is written.
        reads: The streams that are read. The transport ends when all of them have ended.
        serializer: What turns messages into payloads.
        max_frame_size: The largest payload in bytes, both ways.

    Raises:
        InvalidStreamError: A stream is closed or has no descriptor.
        TypeError: The serializer lacks a method.
    """

    def __init__(
        self,
        write: Any,
        reads: Sequence[Any],
        serializer: MessageSerializer,
        max_frame_size: int = DEFAULT_MAX_FRAME_SIZE,
    ) -> None:
        self._encoder = MessageEncoder(serializer, max_frame_size)
        self.serializer = serializer
        self.max_frame_size = max_frame_size
        self._inputs: Dict[int, _Input] = {}
        self._framed = 0  # framed inputs that have not ended
        # Three parts, so that the first can be worked off without looking at the others: buffers that are being
        # written, from _at on; buffers that come next; how many bytes that is.
        self._batch: List[Any] = []
        self._at = 0
        self._queue: List[Any] = []
        self._queued = 0
        self._written: Optional[int] = None  # what a write has returned and is not accounted for yet
        self._blocked = False
        self._broken: Optional[BaseException] = None
        self._ends: List[Any] = []
        self._ahead = False  # an input has data though its descriptor may never become ready
        self._where = ""  # where and why the last framed input ended
        self._error: Optional[BaseException] = None
        try:
            for stream in reads:
                end = stream if isinstance(stream, ReadEnd) else ReadEnd(stream)
                self._add_input(end, MessageDecoder(serializer, max_frame_size))
            self._output = write if isinstance(write, WriteEnd) else WriteEnd(write)
            self._ends.append(self._output)
        except BaseException:
            for end in self._ends:
                end.release()  # not ours yet
            raise

    def _add_input(self, end: ReadEnd, decoder: Optional[MessageDecoder], level: str = "") -> None:
        self._ends.append(end)
        source = self._inputs[end.fd] = _Input(end, decoder, level)
        if end.ahead:
            source.data = end.ahead
            self._ahead = True
        if decoder is not None:
            self._framed += 1

    @property
    def transport(self) -> Any:  # type: ignore[override]
        return self

    def changed(self) -> None:
        """Replaced by the session."""

    # -- sending

    @property
    def queued_bytes(self) -> int:
        """How many bytes wait to be written."""
        return self._queued

    @property
    def wants_write(self) -> bool:
        """Whether something is queued that the stream did not take."""
        return self._blocked

    def write_fd(self) -> Optional[int]:  # type: ignore[override]
        """The descriptor to wait for while something is queued, otherwise None."""
        return self._output.poll_fd if self._blocked else None

    def send(self, message: Message) -> None:
        """Queue a message and write what the stream takes now. Never blocks.

        Raises:
            SerializationError: The message cannot travel; nothing was queued.
            FrameTooLargeError: It is over ``max_frame_size``; nothing was queued.
            StreamClosedError: The other side no longer reads.
        """
        self.enqueue(self._encoder.encode(message))

    def encode(self, message: Message) -> List[Any]:
        """The frame of a message for ``enqueue``; may be given to any transport with this serializer."""
        return self._encoder.encode(message)

    def enqueue(self, frame: List[Any]) -> None:
        """Queue an encoded frame and write what the stream takes now."""
        if self._broken is not None:
            self._raise_broken()
        size = sum(map(len, frame))
        # In one breath:
        self._queue += frame
        self._queued += size
        if self._blocked or (self.corked and self._queued < _GATHER):
            return
        self.flush()

    def flush(self) -> None:
        """Write what the stream takes now of what is queued.

        Raises:
            StreamClosedError: The other side no longer reads. What was queued is given up.
        """
        while True:
            batch = self._batch
            at = self._at
            if at >= len(batch):
                if not self._queue:
                    if self._blocked:
                        self._blocked = False
                        self.changed()
                    return
                # In one breath:
                self._batch = self._queue
                self._at = 0
                self._queue = []
                continue
            if self._written is None:
                try:
                    if at + 1 == len(batch):
                        calls: Any = map(self._output.write, (batch[at],))
                    else:
                        calls = map(self._output.writev, (self._gather(batch, at),))
                    for self._written in calls:
                        break
                except BlockingIOError:
                    if not self._blocked:
                        self._blocked = True
                        self.changed()
                    return
                except (OSError, ValueError) as exc:
                    self._raise_invalid(exc)
                    self._break(exc)
                    self._raise_broken()
            self._account()

    def _gather(self, batch: List[Any], at: int) -> List[Any]:
        # Joining small buffers costs less than handing the system a long list of them.
        size = 0
        stop = at
        while stop < len(batch) and size + len(batch[stop]) <= _JOIN:
            size += len(batch[stop])
            stop += 1
        if stop > at + 1:
            batch[at:stop] = [b"".join(batch[at:stop])]
        return batch[at : at + _IOV]

    def _account(self) -> None:
        """Take what was written off the batch."""
        written = left = self._written or 0
        batch = self._batch
        at = self._at
        while at < len(batch) and left >= len(batch[at]):
            left -= len(batch[at])
            at += 1
        rest = memoryview(batch[at])[left:] if left else None
        # In one breath:
        if rest is not None:
            batch[at] = rest
        self._at = at
        self._queued -= written
        self._written = None

    def _break(self, exc: BaseException) -> None:
        self._broken = exc
        # In one breath:
        self._batch = []
        self._queue = []
        self._at = 0
        self._queued = 0
        self._written = None
        if self._blocked:
            self._blocked = False
            self.changed()

    def _raise_broken(self) -> NoReturn:
        raise StreamClosedError(self._broken_text()) from self._broken

    def _broken_text(self) -> str:
        return f"the other side no longer reads: {self._broken}"

    # -- receiving

    def read_fds(self) -> Sequence[int]:
        """The descriptors to wait for."""
        return tuple(self._inputs)

    def receive(self) -> List[Message]:
        """Read each input once and return the messages; never blocks.

        What could not be decoded is in the list too, as an error object in its place.

        Raises:
            StreamClosedError: All inputs have ended.
        """
        inbox: Deque[Received] = deque()
        try:
            for fd in tuple(self._inputs):
                if not self._inputs[fd].end.shared or _readable(fd):
                    self.receive_into(inbox, fd)
        except StreamClosedError:
            if not inbox:
                raise
        return list(inbox)  # type: ignore[arg-type]

    def receive_into(self, inbox: Deque[Received], fd: int) -> None:
        source = self._inputs.get(fd)
        if source is None:
            self._receive_ahead(inbox)
            return
        decoder = source.decoder
        if decoder is None:
            self._receive_text(inbox, source)
            return
        if source.count is not None or (source.data is None and decoder.missing >= LARGE):
            self._receive_large(inbox, source, decoder)
            return
        data = source.data
        if data is None:
            try:
                for source.data in source.end.reads:
                    break
            except BlockingIOError:
                return
            except (OSError, ValueError) as exc:
                self._input_failed(inbox, source, exc)
                return
            data = source.data
        if not data:
            self._input_ended(inbox, source)
            return
        messages, state = decoder.decode(data)
        size = len(data)
        # In one breath:
        inbox += messages
        decoder.state = state
        source.data = None
        self.received_bytes += size

    @property
    def poll_interval(self) -> Optional[float]:
        return 0.0 if self._ahead else None

    def _receive_ahead(self, inbox: Deque[Received]) -> None:
        """No descriptor is ready, but something may have been read before the streams came to us."""
        if self._ahead:
            for fd, source in tuple(self._inputs.items()):
                if source.data:
                    self.receive_into(inbox, fd)
            self._ahead = False
            self.changed()
        if not self._framed:
            self._ended(inbox)

    def _receive_large(self, inbox: Deque[Received], source: _Input, decoder: MessageDecoder) -> None:
        """Read straight into an unfinished payload."""
        if source.count is None:
            view = decoder.room(_LARGE_READ)
            try:
                for source.count in source.end.reads_into(view):
                    break
            except BlockingIOError:
                return
            except (OSError, ValueError) as exc:
                self._input_failed(inbox, source, exc)
                return
            finally:
                view.release()
        count = source.count
        if not count:
            self._input_ended(inbox, source)
            return
        messages, state = decoder.advance(count)
        # In one breath:
        inbox += messages
        decoder.state = state
        source.count = None
        self.received_bytes += count

    def _receive_text(self, inbox: Deque[Received], source: _Input) -> None:
        if source.data is None:
            try:
                for source.data in source.end.reads:
                    break
            except BlockingIOError:
                return
            except (OSError, ValueError) as exc:
                self._input_failed(inbox, source, exc)
                return
        data = source.data or b""
        size = len(data)
        text, held = decode_text(source.held + data, final=not data)
        messages = [LogMessage(text, source.level)] if text else []
        # In one breath:
        inbox += messages
        source.held = held
        source.data = None
        self.received_bytes += size
        if text:
            self.note_text(text)
        if not data:
            self._forget(source)

    def note_text(self, text: str) -> None:
        """Called with text that arrived on an input that is not framed."""

    def _input_failed(self, inbox: Deque[Received], source: _Input, exc: BaseException) -> None:
        self._raise_invalid(exc)
        if isinstance(exc, OSError):
            source.error = exc
        self._input_ended(inbox, source)

    def _input_ended(self, inbox: Deque[Received], source: _Input) -> None:
        if source.decoder is None:
            self._forget(source)
            return
        if not source.done:
            messages, where = source.decoder.decode_end()
            # In one breath:
            inbox += messages
            source.done = True
            self._where = where
            self._error = source.error
            self._framed -= 1
        self._forget(source)
        if not self._framed:
            self._ended(inbox)

    def _forget(self, source: _Input) -> None:
        self._inputs.pop(source.end.fd, None)
        self.changed()

    def _ended(self, inbox: Deque[Received]) -> None:
        """The last framed input has ended."""
        raise StreamClosedError(self._ended_text()) from self._error

    def _ended_text(self) -> str:
        where = f" {self._where}" if self._where else ""
        if self._error is not None:
            return f"the connection was lost{where}: {self._error}"
        return f"the other side closed the stream{where}"

    def drain(self, inbox: Deque[Received]) -> None:
        """Read what is there now on all inputs, as far as a pipe can hold something."""
        for fd in tuple(self._inputs):
            for _ in range(_DRAIN_READS):
                if fd not in self._inputs or not _readable(fd):
                    break
                try:
                    self.receive_into(inbox, fd)
                except StreamClosedError:
                    break

    def _raise_invalid(self, cause: BaseException) -> None:
        """Tell a stream that its owner closed from one whose other side is gone."""
        text = self.find_invalid()
        if text is not None:
            raise InvalidStreamError(text) from cause

    def find_invalid(self) -> Optional[str]:
        for end in self._ends:
            text: Optional[str] = end.find_invalid()
            if text is not None:
                return text
        return None

    # -- ending

    def close(self) -> None:
        """Close the streams. What is still queued is given up. A second call does nothing."""
        self.end()

    def end(self) -> Optional[Ending]:
        self._let_go("close")
        return None

    def release(self) -> None:
        """Leave the streams open, as they were found, to their owner."""
        self._let_go("release")

    def _let_go(self, how: str) -> None:
        ends, self._ends = self._ends, []
        self._inputs.clear()
        self._batch, self._queue, self._at, self._queued = [], [], 0, 0
        self._blocked = False
        if self._broken is None:
            self._broken = StreamClosedError("this side closed the stream")
        valid = [end for end in ends if end.find_invalid() is None]
        streams = {id(end.stream): (end.stream, end.fd) for end in valid}
        for end in reversed(ends):  # the first end of a stream knows how it was found
            end.release()
        if how == "close":
            for stream, fd in streams.values():
                close_stream(stream, fd)

    def describe(self) -> str:
        fds = sorted({end.fd for end in self._ends})
        return "fd " + "/".join(map(str, fds)) if fds else "no stream"


def _readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))

