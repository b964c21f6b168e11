"""Messages over streams: any number of framed inputs and one output.

Knows descriptors, and messages in frames. Must not know sessions or processes. Errors of the operating system are turned
into errors of ours here and nowhere else.

Where a comment says "in one breath", the statements contain no call: a signal handler's exception (``KeyboardInterrupt``)
can then not come between them, so that what was read is either still to be decoded or in the inbox, and what was
written is either still queued or gone, never both and never neither.
"""

from __future__ import annotations

from collections import deque

from ..errors import InvalidStreamError, StreamClosedError
from ..messages import LogMessage, Message, take_out_of_envelope
from ..wire.codec import CLEAN, JOIN, MessageDecoder, MessageEncoder, decode_text
from ..wire.framing import HEADER_SIZE, frame_header
from .base import Channel, Ending, MessageTransport, finish
from .descriptors import ReadEnd, WriteEnd, close_streams, describe_stream, needs_thread, wait_readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Deque, Dict, List, NoReturn, Optional, Protocol, Sequence, Tuple, Union

    from ..protocols import MessageSerializer, Payload
    from ..wire.codec import Received

    class HasFileno(Protocol):
        """A file object or a socket."""

        def fileno(self) -> int: ...

    class HasRead(Protocol):
        """A stream without a descriptor."""

        def read(self, size: int, /) -> Optional[Payload]: ...

    class HasRead1(Protocol):
        """The same with the method that is preferred."""

        def read1(self, size: int, /) -> Optional[Payload]: ...

    class HasWrite(Protocol):
        """A stream without a descriptor."""

        def write(self, data: bytes, /) -> Any: ...

    ReadStream = Union[int, HasFileno, HasRead, HasRead1, ReadEnd]
    WriteStream = Union[int, HasFileno, HasWrite, WriteEnd]

__all__ = ["DEFAULT_MAX_FRAME_SIZE", "StreamTransport", "open_end"]

DEFAULT_MAX_FRAME_SIZE = 64 * 1024 * 1024

# While corked, frames are written when this much has been gathered: 4 KiB doubles a flood of small messages, 64 KiB puts
# the two sides into lock step (0.7).
_GATHER = 4 * 1024
_JOIN = 64 * 1024  # small buffers are joined up to this size before they are written
_IOV = 64  # buffers in one writev; the system's limit is 1024 at most
_LARGE_READ = 256 * 1024
_DRAIN_READS = 64  # reads of one input at the end: 4 MiB, more than a pipe or socket buffer holds


def open_end(kind: Any, stream: Any, shared: bool = False) -> Any:
    """A ``ReadEnd`` or ``WriteEnd``, whichever ``kind`` is, with a thread if the stream needs one.

    Raises:
        InvalidStreamError: The stream cannot be used.
    """
    if isinstance(stream, kind):
        return stream
    if isinstance(stream, bool):
        raise InvalidStreamError(f"{stream} is no stream; pass a file object, a socket or the number of a descriptor")
    if not needs_thread(stream):
        return kind(stream, shared)
    from .threads import ThreadReadEnd, ThreadWriteEnd

    return ThreadReadEnd(stream) if kind is ReadEnd else ThreadWriteEnd(stream)


class _Input:
    """One stream that is read: framed messages, or (without a decoder) text of one level."""

    decoder: Any

    def __init__(self, end: ReadEnd, decoder: Optional[MessageDecoder], level: str) -> None:
        self.end = end
        self.reads = end.reads
        self.decoder = decoder
        self.deserialize: Any = None if decoder is None else decoder.deserialize
        self.level = level
        self.quick = decoder is not None  # nothing is unfinished, so that what is read next may be just one frame
        # What a read has returned and is not decoded yet: bytes, or a count of bytes that were read into place.
        self.data: Optional[bytes] = None
        self.count: Optional[int] = None
        self.held = b""  # bytes of an unfinished character of text
        self.error: Optional[BaseException] = None
        self.done = False


class StreamTransport(MessageTransport, Channel):
    """Messages in frames over one stream that is written and any number of streams that are read.

    It owns the streams and closes them. A stream is a file object, a socket or a raw descriptor, or any object with
    blocking ``read`` or ``write``, which a thread then calls (see ``IpcPeer.create_stream_session``); the same one may be
    both written and read. Bytes on a read stream that belong to no frame arrive as ``LogMessage`` of level ``"junk"``.
    No method blocks: what the stream does not take is queued, without a limit of its own (a session has one). A session
    calls the ``send`` of a class that is derived from this one, but has its own ways to read and to close.

    Args:
        write: The stream that is written.
        reads: The streams that are read. The transport ends when all of them have ended.
        serializer: What turns messages into payloads.
        max_frame_size: The largest payload in bytes, both ways.

    Attributes:
        serializer: As it was given.
        max_frame_size: As it was given.
        queued_bytes: How many bytes wait to be written.
        received_bytes: How many bytes have been received in all.

    Raises:
        InvalidStreamError: A stream is closed, or has neither a descriptor nor such methods. All streams stay open.
        TypeError: The serializer lacks a method, or ``max_frame_size`` is no int.
        ValueError: ``max_frame_size`` is no size that a frame can have.
    """

    # As in Session; the dict, for what users and the classes derived from this one attach, comes from the bases.
    __slots__ = (
        "_ahead",
        "_at",
        "_batch",
        "_blocked",
        "_broken",
        "_encoder",
        "_ends",
        "_error",
        "_framed",
        "_inputs",
        "_lingering",
        "_name",
        "_output",
        "_queue",
        "_serialize",
        "_streams",
        "_threads",
        "_where",
        "_writes",
        "_written",
    )

    def __init__(
        self,
        write: WriteStream,
        reads: Sequence[ReadStream],
        serializer: MessageSerializer,
        max_frame_size: int = DEFAULT_MAX_FRAME_SIZE,
    ) -> None:
        self._name = ""  # what describe() says, once that can no longer be found out
        self._encoder = MessageEncoder(serializer, max_frame_size)
        self._serialize = self._encoder.serialize
        self.serializer = serializer
        self.max_frame_size = max_frame_size
        # What is asked for with each message is the instance's own: the interpreter finds it there at once.
        self.takes_frames = True
        self.corked = False
        self.sent: int = 0
        self.received_bytes: int = 0
        self._inputs: Dict[int, _Input] = {}
        self._framed = 0  # framed inputs that have not ended
        # Three parts, so that the first can be worked off without looking at the others: buffers that are being
        # written, from _at on; buffers that come next; how many bytes that is.
        self._batch: List[Any] = []
        self._at = 0
        self._queue: List[Any] = []
        self.queued_bytes: int = 0
        self._written: Optional[int] = None  # what a write has returned and is not accounted for yet
        self._blocked = False
        self.writing: bool = False
        self._broken: Optional[BaseException] = None
        self._ends: List[Any] = []
        self._streams: Optional[List[Tuple[Any, int]]] = None  # what is still to be closed
        self._threads: Optional[Ending] = None  # ends the threads of those ends that have some
        self._lingering: Optional[Ending] = None  # closes the connection later
        self._ahead = False  # an input has data though its descriptor may never become ready
        self._where = ""  # where and why the last framed input ended
        self._error: Optional[BaseException] = None
        try:
            for stream in reads:
                self._add_input(open_end(ReadEnd, stream), MessageDecoder(serializer, max_frame_size, self.note_junk))
            self._output: WriteEnd = open_end(WriteEnd, write)
            self._ends.append(self._output)
            self._writes = self._output.writes
        except BaseException:
            for end in self._ends:
                end.release()  # not ours yet
            raise
        for end in self._ends:
            end.start()

    def _add_input(self, end: ReadEnd, decoder: Optional[MessageDecoder], level: str = "") -> None:
        self._ends.append(end)
        source = self._inputs[end.fd] = _Input(end, decoder, level)
        if end.ahead:
            source.data = end.ahead
            self._ahead = True
        if decoder is not None:
            self._framed += 1

    def __repr__(self) -> str:
        try:
            return f"<{type(self).__name__} {self.describe()} {self._state_text()} queued={self.queued_bytes}>"
        except Exception:  # half made
            return f"<{type(self).__name__}>"

    def _state_text(self) -> str:
        if self._streams is not None:
            return "closed"
        if not self._framed:
            return "ended"  # nothing more will come
        return "open" if self._broken is None else "broken"  # nothing more can be written

    @property
    def transport(self) -> Any:
        return self

    def changed(self) -> None:
        """Replaced by the session."""

    # -- sending

    @property
    def wants_write(self) -> bool:
        """Whether something is queued that the stream did not take."""
        return self._blocked

    @property
    def write_fd(self) -> Optional[int]:
        """The descriptor to wait for while something is queued, otherwise None."""
        return self._output.poll_fd if self._blocked else None

    def output_fd(self) -> Optional[int]:
        return self.write_fd

    def send(self, message: Message) -> None:
        """Queue a message and write what the stream takes now. Never blocks.

        Raises:
            SerializationError: The message cannot travel; nothing was queued.
            FrameTooLargeError: It is over ``max_frame_size``; nothing was queued.
            StreamClosedError: The other side no longer reads.
        """
        StreamTransport.post(self, *take_out_of_envelope(message))

    def post(self, kind: int, id: Any, message: Message) -> None:
        """What ``send`` does, for a message without its envelope. For sessions."""
        try:
            payload = self._serialize(kind, id, message)
        except Exception as exc:
            raise self._encoder.failure(message, exc) from exc
        size = JOIN if type(payload) is not bytes or self._broken is not None else len(payload)
        if size >= JOIN or size > self.max_frame_size:
            self.enqueue(self._encoder.frame(message, payload))
            return
        frame = frame_header(size) + payload
        if not (self.queued_bytes or self.corked):
            self._write_now([frame], size + HEADER_SIZE)
            return
        # What enqueue does, for one buffer: 2.8 us a message in a batch instead of 3.1.
        # In one breath:
        self._queue += (frame,)
        self.queued_bytes += size + HEADER_SIZE
        self.sent += 1
        if not (self._blocked or self.writing or (self.corked and self.queued_bytes < _GATHER)):
            self._flush_now()

    def _write_now(self, frame: List[Any], size: int) -> None:
        """What ``flush`` does, for one buffer when nothing is queued: 2 us less."""
        # In one breath:
        self._batch = frame
        self._at = 0
        self.queued_bytes = size
        self.sent += 1
        try:
            self.writing = True
            for self._written in self._writes(frame):
                break
        except (OSError, ValueError):
            pass  # flush meets the same error, and deals with it
        except BaseException:
            self._flush_later()
            raise
        finally:
            self.writing = False
        if self._written == size == self.queued_bytes:
            # In one breath:
            self._at = 1
            self.queued_bytes = 0
            self._written = None
        else:
            self.flush()

    def encode(self, message: Message) -> List[Any]:
        """The frame of a message for ``enqueue``; may be given to any transport with this serializer."""
        return self._encoder.encode(message)

    def enqueue(self, frame: List[Any]) -> None:
        """Queue an encoded frame and write what the stream takes now."""
        if self._broken is not None:
            self._raise_broken()
        if len(frame) == 1 and not self.queued_bytes and not self.corked:
            self._write_now(frame[:], len(frame[0]))  # a copy: a broadcast gives the same frame to all
            return
        size = sum(map(len, frame))
        # In one breath:
        self._queue += frame
        self.queued_bytes += size
        self.sent += 1
        if not (self._blocked or self.writing or (self.corked and self.queued_bytes < _GATHER)):
            self._flush_now()

    def _flush_now(self) -> None:
        try:
            self.flush()
        except (StreamClosedError, InvalidStreamError):
            raise
        except BaseException:
            self._flush_later()
            raise

    def _flush_later(self) -> None:
        """An interruption has left something unwritten that the stream may take: the poller will tell at once."""
        if self.queued_bytes:
            self._blocked = True
            self.changed()

    def flush(self) -> None:
        """Write what the stream takes now of what is queued.

        Raises:
            StreamClosedError: The other side no longer reads. What was queued is given up.
        """
        if self.writing:
            # A finalizer or a signal handler has come here, in the middle of a write. Whoever is beneath writes this too.
            return
        try:
            self.writing = True
            self._write_queued()
        finally:
            self.writing = False

    def _write_queued(self) -> None:
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
                        calls = self._writes((batch[at],))
                    else:
                        calls = self._output.writes_many(self._gather(batch, at))
                    for self._written in calls:
                        break
                except BlockingIOError:
                    if not self._blocked:
                        self._blocked = True
                        self.changed()
                    return
                except (OSError, ValueError) as exc:
                    self._raise_invalid(exc)
                    self._break(self._output.error or exc)
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
        if self._broken is not None:  # a signal handler has closed the session meanwhile: nothing is queued any more
            self._written = None
            return
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
        self.queued_bytes -= written
        self._written = None

    def _break(self, exc: BaseException) -> None:
        self._broken = exc
        # In one breath:
        self._batch = []
        self._queue = []
        self._at = 0
        self.queued_bytes = 0
        self._written = None
        if self._blocked:
            self._blocked = False
            self.changed()

    def give_up(self) -> None:
        if self._broken is None:
            self._break(StreamClosedError(f"the stream has failed ({self.describe()})"))

    def _raise_broken(self) -> NoReturn:
        raise StreamClosedError(self._broken_text()) from self._broken

    def _broken_text(self) -> str:
        if self._output.error is not None:
            return f"{describe_stream(self._output.stream)} cannot be written: {_text(self._output.error)}"
        if isinstance(self._broken, StreamClosedError):  # it was not the other side
            return str(self._broken)
        return f"the other side no longer reads ({self.describe()}): {self._broken}"

    # -- receiving

    def read_fds(self) -> Sequence[int]:
        """The descriptors to wait for."""
        alarm_fd = self._output.alarm_fd
        return tuple(self._inputs) if alarm_fd < 0 else (*self._inputs, alarm_fd)

    def receive(self) -> List[Message]:
        """Read each input once and return the messages; never blocks.

        What could not be decoded is in the list too, as an error object in its place.

        Raises:
            StreamClosedError: All inputs have ended.
        """
        inbox: Deque[Received] = deque()
        try:
            for fd in tuple(self._inputs):
                if not self._inputs[fd].end.shared or wait_readable((fd,), 0):
                    self.receive_into(inbox, fd)
        except StreamClosedError:
            if not inbox:
                raise
        return list(inbox)  # type: ignore[arg-type]

    def receive_into(self, inbox: Deque[Received], fd: int) -> None:
        source = self._inputs.get(fd)
        if source is None or not source.quick or source.data is not None:
            self._receive_slowly(inbox, source, fd)
            return
        try:
            for source.data in source.reads:
                break
        except BlockingIOError:
            return
        except (OSError, ValueError) as exc:
            self._input_failed(inbox, source, exc)
            return
        data: Any = source.data
        size = len(data) - HEADER_SIZE
        if 0 <= size <= self.max_frame_size and data.startswith(frame_header(size)):
            # Just one whole frame, as in most round trips: 2 us less than by the general way.
            payload = data[HEADER_SIZE:]
            try:
                message: Any = source.deserialize(payload)
                if not isinstance(message, Message):
                    message = source.decoder.no_message(message)
            except Exception as exc:
                message = source.decoder.failure(payload, exc)
            # In one breath:
            inbox += (message,)
            source.data = None
            self.received_bytes += size
        else:
            self._decode(inbox, source)

    def _receive_slowly(self, inbox: Deque[Received], source: Optional[_Input], fd: int) -> None:
        """Where something is unfinished, or there are no frames."""
        if source is None:
            self._receive_other(inbox, fd)
            return
        decoder = source.decoder
        if decoder is None:
            self._receive_text(inbox, source)
            return
        if source.count is not None or (source.data is None and decoder.wants_room):
            self._receive_large(inbox, source, decoder)
            return
        if source.data is None:
            try:
                for source.data in source.reads:
                    break
            except BlockingIOError:
                return
            except (OSError, ValueError) as exc:
                self._input_failed(inbox, source, exc)
                return
        self._decode(inbox, source)

    def _decode(self, inbox: Deque[Received], source: _Input) -> None:
        data = source.data
        if not data:
            self._input_ended(inbox, source)
            return
        decoder = source.decoder
        size = len(data)
        messages, state = decoder.decode(data)
        # In one breath:
        inbox += messages
        decoder.state = state
        source.quick = state is CLEAN
        source.data = None
        self.received_bytes += size

    @property
    def poll_interval(self) -> Optional[float]:
        return 0.0 if self._ahead else None

    def _receive_other(self, inbox: Deque[Received], fd: int) -> None:
        """No input is ready, but something may have been read before the streams came to us."""
        if 0 <= fd == self._output.alarm_fd:
            self._output_failed(inbox)
        if self._ahead:
            for fd, source in tuple(self._inputs.items()):
                if source.data is not None or source.count is not None:
                    self.receive_into(inbox, fd)
            self._ahead = False
            self.changed()
        if not self._framed:
            self._ended(inbox)

    def _output_failed(self, inbox: Deque[Received]) -> None:
        """The thread that writes has ended."""
        error = self._output.error
        if error is not None:
            self._raise_invalid(error)
        text = f"the thread that writes {describe_stream(self._output.stream)} has ended"
        self._break(error or self._broken or StreamClosedError(text))
        self.drain(inbox)
        self._raise_broken()

    @property
    def has_unread(self) -> bool:
        return any([source.data is not None or source.count is not None for source in self._inputs.values()])

    def note_interrupted(self) -> None:
        self._ahead = True
        self.changed()

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
        source.quick = state is CLEAN
        source.count = None
        self.received_bytes += count

    def _receive_text(self, inbox: Deque[Received], source: _Input) -> None:
        if source.data is None:
            try:
                for source.data in source.reads:
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
        self.text_bytes += size
        if text:
            self.note_text(text)
        if not data:
            self._forget(source)

    def note_text(self, text: str) -> None:
        """Called with text that arrived on an input that is not framed."""

    def note_junk(self, text: str) -> None:
        """Called with text that arrived between frames; twice if an interruption has come in between."""

    def _input_failed(self, inbox: Deque[Received], source: _Input, exc: BaseException) -> None:
        self._raise_invalid(exc)
        if isinstance(exc, OSError):
            source.error = exc
        self._input_ended(inbox, source)

    def _input_ended(self, inbox: Deque[Received], source: _Input) -> None:
        error = source.end.error
        if error is not None and source.error is None:
            self._raise_invalid(error)
            source.error = error
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
            return f"the connection was lost{where} ({self.describe()}): {_text(self._error)}"
        return f"the other side closed the stream{where} ({self.describe()})"

    def drain(self, inbox: Deque[Received]) -> None:
        """Read what is there now on all inputs, as far as a pipe can hold something."""
        for fd in tuple(self._inputs):
            for _ in range(_DRAIN_READS):
                if fd not in self._inputs or not wait_readable((fd,), self._inputs[fd].end.lag):
                    break
                try:
                    self.receive_into(inbox, fd)
                except (StreamClosedError, InvalidStreamError):
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

    def trim(self) -> None:
        for source in self._inputs.values():
            if source.decoder is not None:
                source.decoder.trim()

    # -- ending

    def close(self) -> None:
        """Close the streams. What is still queued is given up. A second call does nothing."""
        self.end()
        if self._threads is not None:
            finish([self._threads])

    def end(self) -> Optional[Ending]:
        self._let_go("close")
        return self._threads or self._lingering

    def release(self) -> None:
        """Leave the streams open, as they were found, to their owner."""
        self._let_go("release")
        if self._threads is not None:
            finish([self._threads])

    def _let_go(self, how: str) -> None:
        # Interrupted at any point, it can be called again.
        self._name = self.describe()
        self._inputs.clear()
        self._blocked = False
        if how == "close" and self._broken is None:
            self._linger()
        self._break(self._broken or StreamClosedError(f"this side closed the stream ({self._name})"))
        if self._streams is None:
            self._streams = self._find_streams()
        if self._threads is None and any([end.pump is not None for end in self._ends]):
            from .threads import ThreadEnding

            self._threads = ThreadEnding(self._ends, how == "close")
        for end in reversed(self._ends):  # the first end of a stream knows how it was found
            end.release()
        if how == "close":
            close_streams(self._streams)
        self._ends = []

    def _linger(self) -> None:
        end = self._output
        if self._lingering is None and end.socket is not None and not end.shared and end.find_invalid() is None:
            import socket  # there is one, so it is loaded

            if end.socket.family in (socket.AF_INET, socket.AF_INET6):
                from .sockets import linger

                self._lingering = linger(end.socket)

    def abandon(self) -> None:
        # Not _let_go: the flags that it would restore are the owner's too.
        close_streams(self._find_streams())
        self._output.close_own()
        for end in self._ends:
            if end.pump is not None:
                end.pump.forget()

    def _find_streams(self) -> List[Tuple[Any, int]]:
        valid = [end for end in self._ends if end.pump is None and end.find_invalid() is None]
        # The same stream may be written and read, as an object, as a number, or as both.
        objects = {id(end.stream): (end.stream, end.fd) for end in valid if not isinstance(end.stream, int)}
        taken = {fd for _, fd in objects.values()}
        numbers = {end.fd: (end.fd, end.fd) for end in valid if isinstance(end.stream, int) and end.fd not in taken}
        return [*objects.values(), *numbers.values()]

    def describe(self) -> str:
        if not self._name:
            fds = sorted({end.fd for end in self._ends})
            if not fds:
                return "no stream"
            self._name = "fd " + "/".join(map(str, fds))
        return self._name

    def connected(self, how: str) -> None:
        """Say what its socket is connected to, in a few words for ``describe``."""
        self._name = f"{how} {self.describe()}"


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError) else repr(error)

