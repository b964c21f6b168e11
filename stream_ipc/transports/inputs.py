"""One stream that is read: bytes into what a decoder makes of them.

Knows the end that is read and the decoder. Must not know what an error of the stream means.
"""

from __future__ import annotations

from ..clock import monotonic
from ..wire.codec import NO_TEXT
from ..wire.framing import START
from .channel import POLL_INTERVAL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from typing import Any

    from ..wire.codec import MessageDecoder, TextDecoder
    from .channel import Channel, Received
    from .descriptors import ReadEnd

__all__ = ["Input", "TextInput", "sooner"]

_LARGE_READ = 256 * 1024

LINE_DELAY = 0.2  # seconds that an unfinished line of text may take to be finished


class Input:
    """One stream that is read.

    Owns what was read and is not in the inbox yet. An interrupted ``read`` can be made again: nothing is lost and
    nothing comes twice.

    Args:
        end: The end that is read.
        decoder: What makes messages of the bytes; its state is the decoder's.
        channel: Whose ``received_bytes`` counts what is read.

    Attributes:
        ended: Whether the stream has ended, so that what the decoder held back is in the inbox.
        where: Where in a frame it ended; may be empty.
        error: The error with which it ended.
    """

    __slots__ = (
        "_channel", "_count", "_data", "_reads", "decoder", "end", "ended", "error", "where",
    )  # fmt: skip

    def __init__(self, end: ReadEnd, decoder: MessageDecoder | TextDecoder, channel: Channel) -> None:
        self.end: ReadEnd = end
        self.decoder: Any = decoder
        self._channel = channel
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
    def poll_in(self) -> float | None:
        """Seconds until the next poll without an event; None if the descriptor tells."""
        if self.is_ahead:
            return 0.0
        return None if self.end.watched else POLL_INTERVAL

    def flush_due(self, inbox: deque[Received]) -> None:
        """Append what the decoder has held back for long enough: of frames, nothing."""

    def read(self, inbox: deque[Received]) -> None:
        """Read once, and append what is complete to the inbox.

        Raises:
            BlockingIOError: Nothing is there.
            OSError: The stream has failed.
            ValueError: It was closed.
        """
        decoder = self.decoder
        if self._data is None:
            if decoder.state is not START and self._is_large():
                self._read_large(inbox)
                return
            for self._data in self._reads:
                break
        data = self._data
        if not data:
            self.finish(inbox)
            return
        items, state = decoder.decode(data)
        size = len(data)
        # atomic: no calls
        inbox += items
        decoder.state = state
        self._data = None
        self._channel.received_bytes += size

    def _is_large(self) -> bool:
        """Return whether what comes next is read straight into an unfinished payload."""
        if self._count is not None:
            return True
        return not self.decoder.is_text and self.decoder.wants_room and self.end.reads_into is not None

    def _read_large(self, inbox: deque[Received]) -> None:
        """Read straight into an unfinished payload."""
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
            self.finish(inbox)
            return
        items, state = decoder.advance(count)
        # atomic: no calls
        inbox += items
        decoder.state = state
        self._count = None
        self._channel.received_bytes += count

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
        due: When that is, of the line that has begun.
    """

    __slots__ = ("due",)

    def __init__(self, end: ReadEnd, decoder: TextDecoder, channel: Channel) -> None:
        super().__init__(end, decoder, channel)
        self.due: float | None = None

    def read(self, inbox: deque[Received]) -> None:
        channel = self._channel
        before, count = channel.received_bytes, len(inbox)
        super().read(inbox)
        channel.text_bytes += channel.received_bytes - before
        if len(inbox) != count:
            self.due = None  # another line has begun
        channel.on_change()

    @property
    def poll_in(self) -> float | None:
        if self.ended or not self.decoder.is_unfinished:
            self.due = None
            return super().poll_in
        now = monotonic()
        if self.due is None:
            self.due = now + LINE_DELAY
        return sooner(super().poll_in, max(0.0, self.due - now))

    def flush_due(self, inbox: deque[Received]) -> None:
        if self.due is not None and monotonic() >= self.due:
            self.flush(inbox)

    def flush(self, inbox: deque[Received]) -> None:
        """Append an unfinished line as it is."""
        if self.ended:
            return
        items, state = self.decoder.flush()
        # atomic: no calls
        inbox += items
        self.decoder.state = state
        self.due = None

    def finish(self, inbox: deque[Received], error: BaseException | None = None) -> None:
        if self.ended:
            return
        items, _ = self.decoder.finish()
        # atomic: no calls
        inbox += items
        self.decoder.state = NO_TEXT
        self.ended = True
        self.error = error


def sooner(seconds: float | None, others: float | None) -> float | None:
    """Return the smaller of two times that may be None."""
    return others if seconds is None else seconds if others is None else min(seconds, others)
