"""``StreamChannel``: messages over streams, any number of inputs and one output.

Knows ends of streams, frames and messages. Must not know sessions or processes. Errors of the operating system are
turned into errors of ours here and in ``inputs``, and nowhere else.
"""

from __future__ import annotations

from ..errors import InvalidStreamError, StreamClosedError
from ..interruptions import interruption_in
from ..wire.codec import MessageDecoder, MessageEncoder
from .channel import POLL_INTERVAL, Channel
from .descriptors import describe_stream, wait_writable
from .inputs import Input, StreamInputs, error_text
from .outbox import Outbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from ..messages import Message
    from ..protocols import MessageSerializer
    from .channel import Frame, Interest, Teardown
    from .ends import Ends

__all__ = ["StreamChannel"]


class StreamChannel(Channel):
    """One output and any number of inputs, framed or of text.

    Its ends own the streams, its outbox what is queued, its inputs all that is read.

    Args:
        ends: The ends of all its streams.
        output: The end that is written.
        reads: The ends that are read.
        serializer: What turns messages into payloads.
        max_frame_size: The largest payload in bytes, both ways.
        name: What ``describe`` says; by default the descriptors.
    """

    inputs: StreamInputs
    inputs_class: type[StreamInputs] = StreamInputs
    input_class: type[Input] = Input

    def __init__(
        self,
        ends: Ends,
        output: Any,
        reads: Iterable[Any],
        serializer: MessageSerializer,
        max_frame_size: int,
        name: str = "",
    ) -> None:
        self.serializer = serializer
        self.max_frame_size = max_frame_size
        self.encode: Callable[[int, Any, Message], Frame] = MessageEncoder(serializer, max_frame_size).encode
        self.frame_key: Any = (id(serializer), max_frame_size)  # it may have no hash
        self.inputs = self.inputs_class(self)
        self.outbox: Outbox = Outbox(output, self._write_failed, self.inputs.on_change)
        self.put: Callable[[Frame], None] = self.outbox.put
        self._ends = ends
        self._name = name
        self.transport: Any = self  # until somebody asks for a StreamTransport
        if output.is_tcp:
            from .sockets import tune

            tune(output.socket)
        for end in reads:
            decoder = MessageDecoder(serializer, max_frame_size, self.inputs.note_text)
            self.inputs.by_fd[end.fd] = self.input_class(end, decoder, self.inputs)

    @property
    def socket(self) -> Any:
        end = self.outbox.end
        return end.socket if end.socket is end.stream else None

    def on_change(self) -> None:
        """Do nothing: replaced by the port."""

    @property
    def is_released(self) -> bool:
        """Whether its streams were closed or released."""
        return self._ends.released

    @property
    def state_text(self) -> str:
        """What it is doing, in a word."""
        if self.is_released:
            return "closed"
        if self.inputs.ended is not None:
            return "ended"  # nothing more will come
        return "broken" if self.outbox.is_broken else "open"  # nothing more can be written

    # -- sending

    def flush(self) -> None:
        self.outbox.flush()

    def drop_output(self) -> None:
        self.outbox.drop(StreamClosedError(f"the stream has failed ({self.describe()})"))

    def _write_failed(self, exc: Exception | None) -> None:
        """Raise what a failed write means; returns if a signal handler has raised it."""
        if exc is not None:
            if interruption_in(exc) is exc:
                return
            text = self.find_invalid()
            self.outbox.drop(self.outbox.end.error or exc if text is None else InvalidStreamError(text))
        if isinstance(self.outbox.error, InvalidStreamError):
            raise InvalidStreamError(str(self.outbox.error)) from exc
        raise StreamClosedError(self.broken_text()) from self.outbox.error

    def broken_text(self) -> str:
        end = self.outbox.end
        if end.error is not None:
            return f"{describe_stream(end.stream)} cannot be written: {error_text(end.error)}"
        if isinstance(self.outbox.error, StreamClosedError):  # it was not the other side
            return str(self.outbox.error)
        gone = isinstance(self.outbox.error, (ConnectionError, TimeoutError))
        what = "the other side no longer reads" if gone else "nothing can be written any more"
        return f"{what} ({self.describe()}): {self.outbox.error}"

    def add_last_words(self, error: StreamClosedError, inbox: Any) -> None:
        self.inputs.give_out(inbox)
        error.args = (self.broken_text(),)

    def interest(self) -> Interest:
        reads, poll_in = self.inputs.interest()
        output = self.outbox.end
        if not self.outbox.blocked:
            return reads, None, poll_in, False
        if output.watched:
            return reads, output.poll_fd, poll_in, False
        return reads, None, min(poll_in, POLL_INTERVAL), True

    def wait_writable(self, seconds: float) -> bool:
        output = self.outbox.end
        return bool(output.watched) and wait_writable(output.poll_fd, seconds)

    def find_invalid(self) -> str | None:
        if self.is_released:  # through its StreamTransport
            return f"its transport ({self._name}) was closed while a session was using it; close the session instead"
        return self._ends.find_invalid()

    # -- ending

    def close(self) -> Teardown | None:
        try:
            return None if self.is_released else self.before_close()
        finally:  # whatever kept the other side from being told
            self._drop()
            self._ends.close()

    def before_close(self) -> Teardown | None:
        """End the conversation with the other side before the streams are closed; returns what is left to do."""
        end = self.outbox.end
        if self.outbox.error is not None or not end.is_tcp or end.shared or end.find_invalid() is not None:
            return None
        from .sockets import linger

        return linger(end.socket)

    def release(self) -> None:
        self._drop()
        self._ends.release()

    def _drop(self) -> None:
        self._name = self.describe()
        self.inputs.drop()
        self.outbox.drop(StreamClosedError(f"this side closed the stream ({self._name})"))

    def abandon(self) -> None:
        self._ends.abandon()

    def describe(self) -> str:
        if not self._name:
            self._name = self._ends.describe()
        return self._name

    def prefix_name(self, how: str) -> None:
        """Say what its socket is connected to, in a few words for ``describe``, or none."""
        self._name = f"{how} {self.describe()}".lstrip()
