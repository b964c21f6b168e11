"""``StreamChannel``: messages over streams, any number of inputs and one output.

Knows ends of streams, frames and messages. Must not know sessions or processes. Errors of the operating system are
turned into errors of ours here and nowhere else.
"""

from __future__ import annotations

import errno

from ..errors import InvalidStreamError, StreamClosedError
from ..interruptions import interruption_in
from ..messages import NOTIFICATION
from ..wire.codec import MessageDecoder, MessageEncoder
from ..wire.framing import START
from .channel import DRAIN_READS, POLL_INTERVAL, Channel, EndOfStream
from .descriptors import describe_stream, has_hung_up, wait_readable, wait_writable
from .ends import Ends
from .inputs import Input, TextInput, sooner
from .outbox import Outbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Sequence
    from typing import Any

    from ..messages import Message
    from ..protocols import MessageSerializer
    from ..wire.codec import TextDecoder
    from .channel import Ending, Interest, Received

__all__ = ["StreamChannel"]

_TCP = ("AF_INET", "AF_INET6")


class StreamChannel(Channel):
    """One output and any number of inputs, framed or of text.

    Its ends own the streams, its outbox what is queued, its inputs what is not decoded.

    Args:
        output: The end that is written.
        reads: The ends that are read.
        serializer: What turns messages into payloads.
        max_frame_size: The largest payload in bytes, both ways.
        name: What ``describe`` says; by default the descriptors.
    """

    ended: StreamClosedError | None = None

    def __init__(
        self, output: Any, reads: Sequence[Any], serializer: MessageSerializer, max_frame_size: int, name: str = ""
    ) -> None:
        self.serializer = serializer
        self.max_frame_size = max_frame_size
        self.encoder: MessageEncoder = MessageEncoder(serializer, max_frame_size)
        self.share: Any = (id(serializer), max_frame_size)  # it may have no hash
        self.outbox: Outbox = Outbox(output, self._write_failed, self._changed)
        self.inputs: dict[int, Input] = {}
        self._framed = 0  # framed inputs that have not ended
        self.received_bytes: int = 0
        self._last: Input | None = None  # the framed input that ended last
        self._early: list[StreamClosedError] = []  # of writes, made before the other side's last words were read
        self._ends = Ends()
        self._name = name
        self._transport: Any = None  # none until somebody asks for a StreamTransport
        for end in reads:
            self.add_input(end, MessageDecoder(serializer, max_frame_size, self.note_text))
        self._ends.add(output)

    def add_input(self, end: Any, decoder: MessageDecoder | TextDecoder) -> None:
        """Read from one more end."""
        self._ends.add(end)
        self.inputs[end.fd] = TextInput(end, decoder, self) if decoder.is_text else Input(end, decoder, self)  # type: ignore[arg-type]
        if not decoder.is_text:
            self._framed += 1

    @property
    def transport(self) -> Any:
        return self if self._transport is None else self._transport

    def adopt(self, transport: Any) -> None:
        """Take note of the transport that people know it by."""
        self._transport = transport

    @property
    def socket(self) -> Any:
        """The socket that it talks over, or None."""
        end = self.outbox.end
        return end.socket if end.socket is end.stream else None

    @property
    def wants_write(self) -> bool:
        """Whether something is to be written that the stream did not take, be it TLS's own."""
        return self.outbox.blocked or any([source.end.wants_write for source in self.inputs.values()])

    def on_change(self) -> None:
        """Do nothing: replaced by the port."""

    def _changed(self) -> None:
        self.on_change()

    @property
    def state_text(self) -> str:
        """What it is doing, in a word."""
        if self._ends.released:
            return "closed"
        if not self._framed:
            return "ended"  # nothing more will come
        return "broken" if self.outbox.is_broken else "open"  # nothing more can be written

    # -- sending

    def post(self, kind: int, id: Any, message: Message) -> None:
        self.outbox.put(self.encoder.encode(kind, id, message))

    def encode(self, message: Message) -> list[Any]:
        return self.encoder.encode(NOTIFICATION, None, message)

    def post_frame(self, frame: list[Any]) -> None:
        self.outbox.put(frame)

    def flush(self) -> None:
        for source in self.inputs.values():
            if source.end.wants_write:  # TLS could not read because it has to write first
                source.end.wants_write = False
                source.end.retry = True
                self.on_change()
        self.outbox.flush()

    def drop_output(self) -> None:
        self.outbox.drop(StreamClosedError(f"the stream has failed ({self.describe()})"))

    def _write_failed(self, exc: Exception | None) -> None:
        """Raise what a failed write means; returns if a signal handler has raised it."""
        if exc is not None:
            if interruption_in(exc) is exc:
                return
            text = self.find_invalid()
            if text is not None:
                self.outbox.drop(InvalidStreamError(text))
                raise InvalidStreamError(text) from exc
            self.outbox.drop(self.outbox.end.error or exc)
        if isinstance(self.outbox.error, InvalidStreamError):
            raise InvalidStreamError(str(self.outbox.error))
        raise self.broken_error() from self.outbox.error

    def broken_error(self) -> StreamClosedError:
        error = StreamClosedError(self.broken_text())
        if self.ended is None:
            self._early.append(error)
        return error

    def broken_text(self) -> str:
        """Return why nothing can be written any more."""
        end = self.outbox.end
        if end.error is not None:
            return f"{describe_stream(end.stream)} cannot be written: {_text(end.error)}"
        if isinstance(self.outbox.error, StreamClosedError):  # it was not the other side
            return str(self.outbox.error)
        return f"the other side no longer reads ({self.describe()}): {self.outbox.error}"

    # -- receiving

    def interest(self) -> Interest:
        output = self.outbox.end
        write_fd = None
        poll_in = None
        reads = []
        for fd, source in self.inputs.items():
            if source.end.wants_write:
                write_fd = source.end.fd
            if source.end.watched:
                reads.append(fd)
            poll_in = sooner(poll_in, source.poll_in)
        if self.outbox.blocked and not output.wants_read:
            if output.watched:
                write_fd = output.poll_fd
            else:
                poll_in = sooner(poll_in, POLL_INTERVAL)
        return reads, write_fd, poll_in

    def read(self, fd: int, inbox: deque[Received]) -> None:
        try:
            source = self.inputs[fd]
        except KeyError:
            self.poll(fd, inbox)
            return
        try:
            source.read(inbox)
        except BlockingIOError:
            self.on_change()  # TLS may have to wait for something else
            return
        except (OSError, ValueError) as exc:
            self._read_failed(source, inbox, exc)
        if source.ended:
            self._input_ended(source, inbox)

    def poll(self, fd: int, inbox: deque[Received]) -> None:
        """Read what no descriptor tells of, and write to a stream that has none.

        Args:
            fd: A descriptor that is no input's, or -1 if it is time to poll.
            inbox: Where what is read goes.
        """
        for number, source in tuple(self.inputs.items()):
            if source.is_ahead or not source.end.watched:
                self.read(number, inbox)
            source.flush_due(inbox)
        if self.outbox.blocked and not self.outbox.end.watched:
            self.outbox.flush()
        self.on_change()

    def _read_failed(self, source: Input, inbox: deque[Received], exc: Exception) -> None:
        if interruption_in(exc) is exc:
            raise exc
        text = self.find_invalid()
        if text is not None:
            raise InvalidStreamError(text) from exc
        source.finish(inbox, source.end.error or exc)

    def _input_ended(self, source: Input, inbox: deque[Received]) -> None:
        # atomic: no calls
        if source.end.fd in self.inputs:
            inputs = {**self.inputs}  # another dict: a signal handler may turn while somebody goes through this one
            del inputs[source.end.fd]
            self.inputs = inputs
            if not source.decoder.is_text:
                self._framed -= 1
                self._last = source

        if not self._framed:
            self.framed_ended(inbox)
        self.on_change()

    def framed_ended(self, inbox: deque[Received]) -> None:
        """Do what is to be done once the last framed input has ended."""
        self.put_end(inbox)

    def put_end(self, inbox: deque[Received]) -> None:
        """Append the end to the inbox, once."""
        error = self.ended_error()
        end = EndOfStream(error)
        # atomic: no calls
        if self.ended is None:
            self.ended = error
            inbox += (end,)

        self.on_change()

    def ended_error(self) -> StreamClosedError:
        """Return why nothing more will come."""
        where = f" {self._last.where}" if self._last is not None and self._last.where else ""
        family, cause = ("", None) if self._last is None else (self._last.end.family, self._last.error)
        if cause is None or (family == "AF_UNIX" and isinstance(cause, ConnectionResetError)):  # it had not read all
            error = StreamClosedError(f"the other side closed the stream{where} ({self.describe()})")
        else:
            error = StreamClosedError(f"the connection was lost{where} ({self.describe()}): {_text(cause)}")
        error.__cause__ = cause
        return error

    @property
    def where(self) -> str:
        """Where in a frame the last framed input ended; may be empty."""
        return self._last.where if self._last is not None else ""

    def note_text(self, text: str) -> None:
        """Take note of text that is no message. An interrupted read calls it again."""

    def drain(self, inbox: deque[Received]) -> None:
        for fd, source in tuple(self.inputs.items()):
            for _ in range(DRAIN_READS):
                if fd not in self.inputs or not (source.is_ahead or self._is_readable(source)):
                    break
                before = self.received_bytes
                try:
                    self.read(fd, inbox)
                except InvalidStreamError:
                    break
                if self.received_bytes == before:
                    break
        if self._early:
            self.complete_errors(inbox)

    def complete_errors(self, inbox: deque[Received]) -> None:
        """Put the other side's last words, which are read now, into the errors of failed writes."""
        for error in self._early:
            error.args = (self.broken_text(),)
        self._early.clear()

    @property
    def is_unfinished(self) -> bool:  # type: ignore[override]
        return any([not source.decoder.is_text and source.decoder.state is not START for source in self.inputs.values()])

    def wait(self, seconds: float, write: bool = False) -> bool:
        if write:
            output = self.outbox.end
            return bool(output.watched) and wait_writable(output.poll_fd, seconds)
        fds = [fd for fd, source in self.inputs.items() if source.end.watched]
        return bool(fds) and wait_readable(fds, seconds)

    @staticmethod
    def _is_readable(source: Input) -> bool:
        return not source.end.watched or wait_readable((source.end.fd,), 0)

    def resume(self, inbox: deque[Received]) -> None:
        for source in tuple(self.inputs.values()):
            if source.ended:
                self._input_ended(source, inbox)
        if not self._framed and self.ended is None:
            self.framed_ended(inbox)

    def find_invalid(self) -> str | None:
        if self._ends.released:  # through its StreamTransport
            return f"its transport ({self._name}) was closed while a session was using it; close the session instead"
        return self._ends.find_invalid()

    def look_for_hangup(self, inbox: deque[Received]) -> None:
        if any([source.end.watched and has_hung_up(source.end.fd) for source in self.inputs.values()]):
            self.drain(inbox)
        super().look_for_hangup(inbox)

    def look_for_lost_host(self, inbox: deque[Received]) -> None:
        end = self.outbox.end
        if end.family not in _TCP:
            return
        from .sockets import has_vanished

        if has_vanished(end.socket):
            self.drain(inbox)
            lost = TimeoutError(errno.ETIMEDOUT, "the other host does not answer any more")
            self.outbox.drop(lost)
            for source in tuple(self.inputs.values()):
                source.finish(inbox, lost)
                self._input_ended(source, inbox)

    def trim(self) -> None:
        for source in self.inputs.values():
            source.decoder.trim()

    # -- ending

    def close(self) -> Ending | None:
        ending = None if self._ends.released else self.before_close()
        self._drop()
        self._ends.close()
        return ending

    def before_close(self) -> Ending | None:
        """End the conversation with the other side before the streams are closed; returns what is left to do."""
        end = self.outbox.end
        if self.outbox.error is not None or end.family not in _TCP or end.shared or end.find_invalid() is not None:
            return None
        from .lingering import linger

        return linger(end.socket)

    def release(self) -> None:
        self._drop()
        self._ends.release()

    def _drop(self) -> None:
        self._name = self.describe()
        self.inputs = {}
        self.outbox.drop(StreamClosedError(f"this side closed the stream ({self._name})"))

    def abandon(self) -> None:
        self._ends.abandon()

    def describe(self) -> str:
        if not self._name:
            self._name = self._ends.describe()
        return self._name

    def connected(self, how: str) -> None:
        """Say what its socket is connected to, in a few words for ``describe``."""
        self._name = f"{how} {self.describe()}"


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError) else repr(error)
