"""What a channel over streams reads: each stream, bytes into what a decoder makes of them, and the end of all.

Knows ends that are read, decoders, and the channel that they belong to. (Custom transports have ``Inputs`` of another
kind; their base is in ``channel.py``.) Must not know how anything is written.
"""

from __future__ import annotations

import errno
import math

from .. import log
from ..clock import monotonic
from ..errors import InvalidStreamError, StreamClosedError, unraised
from ..interruptions import interruption_in
from ..wire.framing import START
from .channel import DRAIN_READS, POLL_INTERVAL, Inputs
from .descriptors import has_hung_up, wait_readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from typing import Any

    from ..wire.codec import MessageDecoder, TextDecoder
    from .channel import Received
    from .ends import ReadEnd
    from .stream_channel import StreamChannel

__all__ = ["TAIL", "Input", "StreamInputs", "TextInput", "error_text"]

_LARGE_READ = 256 * 1024

TAIL = 2000  # characters of text that are kept for error texts

_LINE_DELAY = 0.2  # seconds that an unfinished line of text may take to be finished


class Input:
    """One stream that is read.

    Owns what was read and is not in the inbox yet. An interrupted ``read`` can be made again: nothing is lost and
    nothing comes twice.

    Args:
        end: The end that is read.
        decoder: What makes messages of the bytes; its state is the decoder's.
        inputs: Which counts what is read, and is told of an error and of the end.

    Attributes:
        framed: Whether it has frames; otherwise it is of text.
        ended: Whether the stream has ended, so that what the decoder held back is in the inbox.
        where: Where in a frame it ended; may be empty.
        error: The error with which it ended.
    """

    framed = True

    def __init__(self, end: ReadEnd, decoder: MessageDecoder | TextDecoder, inputs: StreamInputs) -> None:
        self.end: ReadEnd = end
        self.decoder: Any = decoder
        self.inputs: StreamInputs = inputs
        self.ended: bool = False
        self.where: str = ""
        self.error: BaseException | None = None
        self._reads = end.reads
        self._data: bytes | None = end.ahead or None
        self._count: int | None = None  # bytes that were read into the decoder's room

    @property
    def is_ahead(self) -> bool:
        """Whether there is something to decode though the descriptor may not become readable."""
        return self._data is not None or self._count is not None or self.end.pending

    @property
    def poll_in(self) -> float:
        """Seconds until the next poll without an event; infinity if the descriptor tells."""
        if self.is_ahead:
            return 0.0
        return math.inf if self.end.watched else POLL_INTERVAL

    def give_out(self, inbox: deque[Received], if_due: bool = False) -> None:
        """Append what is not finished as it is, or only if it has waited long enough: of frames, nothing."""

    def read(self, inbox: deque[Received]) -> None:
        """Read once, and append what is complete to the inbox."""
        decoder = self.decoder
        if self._data is None:
            try:
                if decoder.state is not START and self._is_large():
                    if self._read_large(inbox):
                        return
                else:
                    for self._data in self._reads:
                        break
            except (OSError, ValueError) as exc:
                self.inputs.read_failed(self, inbox, exc)
                return
        data = self._data
        if not data:
            self.inputs.end_input(self, inbox)
            return
        items, state = decoder.decode(data)
        size = len(data)
        # atomic: no calls
        inbox += items
        decoder.state = state
        self._data = None
        self.inputs.received_bytes += size

    def _is_large(self) -> bool:
        """Return whether what comes next is read straight into an unfinished payload."""
        if self._count is not None:
            return True
        return self.framed and self.decoder.wants_room and self.end.reads_into is not None

    def _read_large(self, inbox: deque[Received]) -> bool:
        """Read straight into an unfinished payload; returns False at the end of the stream."""
        decoder = self.decoder
        if self._count is None:
            view = decoder.room(_LARGE_READ)
            try:
                for self._count in self.end.reads_into(view):
                    break
            finally:
                view.release()
        count = self._count
        if not count:
            return False
        items, state = decoder.advance(count)
        # atomic: no calls
        inbox += items
        decoder.state = state
        self._count = None
        self.inputs.received_bytes += count
        return True

    def finish(self, inbox: deque[Received], error: BaseException | None = None) -> None:
        """Append what the decoder has held back: the stream has ended."""
        if self.ended:
            return
        items, where = self.decoder.finish()
        # atomic: no calls
        inbox += items
        self.ended = True
        self.where = where
        self.error = error


class TextInput(Input):
    """One stream of text that is read. A line that is not finished in time comes as it is.

    Attributes:
        due: When that is, of the line that has begun; infinity if there is none.
    """

    framed = False

    def __init__(self, end: ReadEnd, decoder: TextDecoder, inputs: StreamInputs) -> None:
        super().__init__(end, decoder, inputs)
        self.due: float = math.inf

    def read(self, inbox: deque[Received]) -> None:
        inputs = self.inputs
        before, count = inputs.received_bytes, len(inbox)
        super().read(inbox)
        inputs.text_bytes += inputs.received_bytes - before
        if len(inbox) != count:
            self.due = math.inf  # another line has begun
        inputs.on_change()

    @property
    def poll_in(self) -> float:
        if self.ended or not self.decoder.is_unfinished:
            self.due = math.inf
            return super().poll_in
        now = monotonic()
        if self.due == math.inf:  # not set by read(), which an interruption could end before it has done so
            self.due = now + _LINE_DELAY
        return min(super().poll_in, max(0.0, self.due - now))

    def give_out(self, inbox: deque[Received], if_due: bool = False) -> None:
        if self.ended or (if_due and monotonic() < self.due):
            return
        items, state = self.decoder.give_out()
        # atomic: no calls
        inbox += items
        self.decoder.state = state
        self.due = math.inf


class StreamInputs(Inputs):
    """The streams that a channel reads, framed or of text.

    Owns which of them have not ended, and how the framed ones did.

    Args:
        channel: Whose streams these are.

    Attributes:
        by_fd: Those that have not ended. The channel ends with the last one that is framed.
        last: The framed one that ended last, or None.
    """

    def __init__(self, channel: StreamChannel) -> None:
        super().__init__()
        self.by_fd: dict[int, Input] = {}
        self.channel: StreamChannel = channel
        self.last: Input | None = None

    def on_change(self) -> None:
        """Have the channel look again what is to be waited for."""
        self.channel.on_change()

    @property
    def is_unfinished(self) -> bool:  # type: ignore[override]
        return any([source.framed and source.decoder.state is not START for source in self.by_fd.values()])

    def interest(self) -> tuple[list[int], float]:
        """Return what to wait for: descriptors to read from, and seconds until the next poll, or infinity."""
        return self._fds(), min([source.poll_in for source in self.by_fd.values()], default=math.inf)

    def _fds(self) -> list[int]:
        return [fd for fd, source in self.by_fd.items() if source.end.watched]

    # -- reading

    def read(self, inbox: deque[Received]) -> None:
        for source in [*self.by_fd.values()]:
            if source.is_ahead or not source.end.watched:
                source.read(inbox)
            source.give_out(inbox, if_due=True)
        self.on_change()

    def drain(self, inbox: deque[Received]) -> None:
        for fd, source in self.by_fd.copy().items():
            for _ in range(DRAIN_READS):
                if fd not in self.by_fd or not (source.is_ahead or not source.end.watched or wait_readable((fd,), 0)):
                    break
                before = self.received_bytes
                try:
                    source.read(inbox)
                except InvalidStreamError:
                    break
                if self.received_bytes == before:
                    break

    def give_out(self, inbox: deque[Received]) -> None:
        """Append lines of text that are not finished as they are."""
        for source in [*self.by_fd.values()]:
            source.give_out(inbox)

    def wait(self, seconds: float) -> bool:
        fds = self._fds()
        return bool(fds) and wait_readable(fds, seconds)

    def note_text(self, text: str) -> None:
        """Take note of text between frames. An interrupted read calls it again."""
        self.junk: str = (self.junk + text)[-TAIL:]

    # -- the end of one, and of all

    def read_failed(self, source: Input, inbox: deque[Received], exc: Exception) -> None:
        """End an input with what reading it has raised, unless that says something else."""
        if source.end.fd not in self.by_fd:  # the channel was closed, and somebody reads on
            raise exc
        if isinstance(exc, BlockingIOError):
            self.on_change()  # TLS may have to wait for something else
            return
        if interruption_in(exc) is exc:
            raise exc
        text = self.channel.find_invalid()
        if text is not None:
            raise InvalidStreamError(text) from exc
        self.end_input(source, inbox, source.end.error or exc)

    def end_input(self, source: Input, inbox: deque[Received], error: BaseException | None = None) -> None:
        """Read an input no more: its stream has ended."""
        source.finish(inbox, error)
        # atomic: no calls
        if source.end.fd in self.by_fd:
            by_fd = {**self.by_fd}  # another dict: a signal handler may turn while somebody goes through this one
            del by_fd[source.end.fd]
            self.by_fd = by_fd
            if source.framed:
                self.last = source
        else:
            return

        if self._have_ended():
            self.framed_ended(inbox)
        elif source.framed and (source.where or source.error is not None) and not self.channel.outbox.is_broken:
            log.warning("%s; other inputs of that session go on", self.ended_text())
        self.on_change()

    def _have_ended(self) -> bool:
        """Return whether the last framed one has ended; where there never was one, no end will come."""
        return self.last is not None and not any([source.framed for source in self.by_fd.values()])

    def framed_ended(self, inbox: deque[Received]) -> None:
        """Do what is to be done once the last framed input has ended."""
        self.put_end(inbox)

    def put_end(self, inbox: deque[Received], error: StreamClosedError | None = None) -> None:
        if self.ended is None:
            self.give_out(inbox)  # before it is asked for its last words
        if error is None:
            error = StreamClosedError(self.ended_text())
            error.__cause__ = None if self.last is None else self.last.error
            error = unraised(error)
        super().put_end(inbox, error)
        self.on_change()

    @property
    def where(self) -> str:
        """Where in a frame the last of them ended, behind a space; may be empty."""
        return f" {self.last.where}" if self.last is not None and self.last.where else ""

    def ended_text(self) -> str:
        """Return why nothing more will come."""
        last: Any = self.last
        cause = None if last is None else last.error
        # A Unix socket whose other side had not read all says that it was reset.
        if cause is None or (last.end.family == "AF_UNIX" and isinstance(cause, ConnectionResetError)):
            return f"the other side closed the stream{self.where} ({self.channel.describe()})"
        return f"the connection was lost{self.where} ({self.channel.describe()}): {error_text(cause)}"

    def resume(self, inbox: deque[Received]) -> None:
        for source in [*self.by_fd.values()]:
            if source.ended:
                self.end_input(source, inbox)
        if self.ended is None and self._have_ended():
            self.framed_ended(inbox)

    def check(self, inbox: deque[Received]) -> None:
        for source in [*self.by_fd.values()]:
            if source.framed:
                source.decoder.trim()
        outbox = self.channel.outbox
        if outbox.end.is_tcp:
            from .sockets import has_vanished

            if has_vanished(outbox.end.socket):
                self.drain(inbox)
                lost = TimeoutError(errno.ETIMEDOUT, "the other host does not answer any more")
                outbox.drop(lost)
                for source in [*self.by_fd.values()]:
                    self.end_input(source, inbox, lost)

    def look_for_hangup(self, inbox: deque[Received]) -> None:
        if has_hung_up(self._fds()):
            self.drain(inbox)
        self.look_for_end(inbox)

    def drop(self) -> None:
        """Read none of them any more."""
        # atomic: no calls
        self.last = None  # this is no end
        self.by_fd = {}


def error_text(error: BaseException) -> str:
    """Return what an error of a stream says."""
    return str(error) if isinstance(error, OSError) else repr(error)
