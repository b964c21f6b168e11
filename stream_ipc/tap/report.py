"""A conversation as lines of text: one for each frame, and a summary at the end.

Knows frames and ``payloads``. Must not know where the bytes come from or go to. Only the beginning of a payload is kept,
so that watching costs the same for a long one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Callable, NamedTuple, TextIO

from ..errors import FrameTooLargeError
from ..wire.framing import HEADER_SIZE, START, FrameDecoder, Junk
from .payloads import look
from .trace import Trace

__all__ = ["HEAD_SIZE", "READ_SIZE", "Report", "Skimmer", "decode"]

HEAD_SIZE = 4096  # bytes of a payload that are looked at

READ_SIZE = 64 * 1024
_SHORT = 60  # characters of junk in a line
_LONG = 500  # characters of it in a trace
_UNANSWERED = 100_000  # requests that are remembered until they are answered
_SLOWEST = 5

_COLOURS = {"request": "36", "response": "32", "notification": "0", "junk": "33", "unreadable": "31", "error": "31"}


class Skimmer:
    """Follows the frames of one stream. Owns where it is in them.

    A payload over ``HEAD_SIZE`` is too large for the decoder, so that only its beginning is kept.

    Attributes:
        unseen: How many of the bytes that come next need not be fed, because they are the rest of a payload of which
            enough was seen. They are counted with ``skip``.
    """

    def __init__(self, junk: Callable[[bytes], None], frame: Callable[[int, bytes], None]) -> None:
        self._on_junk = junk
        self._on_frame = frame
        self._decoder = FrameDecoder(HEAD_SIZE)
        self._held = 0  # bytes that the decoder holds back
        self._size = 0  # of a large payload that is under way
        self._head = b""
        self._left = 0  # bytes of it that are still to come
        self.unseen: int = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes, however cut."""
        if self._left:
            self._head += data[: min(self._left, HEAD_SIZE - len(self._head))]
            count = min(self._left, len(data))
            self._take(count)
            data = data[count:]
        if data:
            self._decode(data)
        self.unseen = self._left if len(self._head) == HEAD_SIZE else 0

    def _decode(self, data: bytes) -> None:
        items, self._decoder.state = self._decoder.decode(data)
        at = -self._held  # where an item begins in data
        for item in items:
            if isinstance(item, Junk):
                at += len(item)
                self._on_junk(bytes(item))
            elif isinstance(item, FrameTooLargeError):
                at += HEADER_SIZE
                self._size = self._left = item.size or 0
                self._head = data[at : at + HEAD_SIZE]
                at += self._size
                self._take(min(self._size, len(data) - at + self._size))
            else:
                at += HEADER_SIZE + len(item)
                self._on_frame(len(item), bytes(item))
        self._held = max(0, len(data) - at)
        if self._left:
            self._decoder.state = START  # the rest of it is counted here

    def _take(self, count: int) -> None:
        """Count bytes of a large payload."""
        self._left -= count
        if not self._left:
            head, self._head = self._head, b""
            self._on_frame(self._size, head)

    def skip(self, count: int) -> None:
        """Take note of bytes that were not fed."""
        self.unseen -= count
        self._take(count)

    def end(self) -> str:
        """Take note of the end of the stream, and return what broke off, or an empty text."""
        if self._left:
            return f"in the middle of a frame ({self._size - self._left} of {self._size} bytes had arrived)"
        items, text = self._decoder.finish()
        for item in items:
            if isinstance(item, Junk):
                self._on_junk(bytes(item))
        return text


class _TextSkimmer(Skimmer):
    """Follows a stream of text, which has no frames."""

    def feed(self, data: bytes) -> None:
        self._on_junk(data)


class _Asked(NamedTuple):
    """A request without an answer."""

    when: float
    name: str
    span: dict[str, Any]


class Report:
    """Writes a line for each frame of a conversation, and a summary. Owns the counts and the requests without an answer.

    Args:
        write: Takes a piece of text.
        format: One of ``payloads.FORMATS``, or an empty text to find out from each payload.
        timed: Whether times are known. Otherwise lines begin with where the frame ends in the stream, in bytes.
        coloured: Whether to use a terminal's colours.
        prefix: What each line begins with.

    Attributes:
        now: When what is fed next has passed, in seconds since the start.
        floor: No line shows an earlier time.
        trace: What makes events of the same; None without one.
    """

    def __init__(
        self,
        write: Callable[[str], Any],
        format: str = "",
        timed: bool = True,
        coloured: bool = False,
        prefix: str = "",
    ) -> None:
        self.now: float = 0.0
        self.floor: float = 0.0
        self.trace: Trace | None = None
        self._write = write
        self._format = format
        self._timed = timed
        self._coloured = coloured
        self._prefix = prefix
        self._directions: list[str] = []
        self._counts: dict[tuple[str, str], int] = {}
        self._bytes: dict[str, int] = {}
        # By the direction of the answer, and id.
        self._waiting: OrderedDict[tuple[str, str], _Asked] = OrderedDict()
        self._slowest: list[tuple[float, str, str]] = []

    def direction(self, arrow: str, answers: str) -> Skimmer:
        """Return what follows the frames of one direction.

        Args:
            arrow: What stands for it in a line.
            answers: What stands for the direction in which its requests are answered.
        """
        self._directions.append(arrow)
        self._bytes[arrow] = 0
        return Skimmer(
            lambda data: self._on_junk(arrow, data), lambda size, head: self._on_frame(arrow, answers, size, head)
        )

    def text(self, arrow: str) -> Skimmer:
        """Return what follows a stream of text, which only the trace shows."""
        return _TextSkimmer(lambda data: self._trace_text(arrow, arrow, data), lambda size, head: None)

    def note(self, arrow: str, text: str, kind: str = "error") -> None:
        """Write a line that is about no frame."""
        self._line(arrow, kind, "", "", "", text)
        if self.trace is not None and kind == "error":
            self.trace.instant(self.now, arrow, kind, {"text": text})

    def _on_junk(self, arrow: str, data: bytes) -> None:
        text = data[: 4 * _SHORT].decode("utf-8", "backslashreplace")
        shown = repr(text[:_SHORT])
        self._count(arrow, "junk", len(data))
        self._line(arrow, "junk", "", "", f"{len(data)} B", shown if len(text) <= _SHORT else shown + "...")
        self._trace_text(arrow, "junk", data)

    def _trace_text(self, arrow: str, name: str, data: bytes) -> None:
        if self.trace is not None:
            text = data[:_LONG].decode("utf-8", "backslashreplace")
            self.trace.instant(self.now, arrow, name, {"text": text, "size": len(data)})

    def _on_frame(self, arrow: str, answers: str, size: int, head: bytes) -> None:
        kind, id, name, view = look(head, size, self._format)
        latency = ""
        self._count(arrow, kind, HEADER_SIZE + size)
        args = {"class": name, "id": id, "size": size, "message": view}
        if kind == "request":
            self._on_request(arrow, (answers, id), name, args)
        else:
            asked = self._waiting.pop((arrow, id), None) if kind == "response" else None
            if asked is not None:
                latency = self._on_answer(asked, id, args)
            elif self.trace is not None:
                self.trace.instant(self.now, arrow, name or kind, args)
        failed = kind == "response" and name.endswith("ErrorMessage")
        self._line(arrow, kind, id, latency, f"{size} B", view, "error" if failed else kind)

    def _on_request(self, arrow: str, key: tuple[str, str], name: str, args: dict[str, Any]) -> None:
        self._give_up(self._waiting.pop(key, None))  # of the same id, which only a faulty program uses twice
        span = {} if self.trace is None else self.trace.begin(self.now, arrow, name, args)
        self._waiting[key] = _Asked(self.now, name, span)
        if len(self._waiting) > _UNANSWERED:
            self._give_up(self._waiting.popitem(last=False)[1])

    def _on_answer(self, asked: _Asked, id: str, args: dict[str, Any]) -> str:  # how long it has taken
        if self.trace is not None:
            self.trace.end(self.now, asked.span, args)
        if not self._timed:
            return ""
        seconds = self.now - asked.when
        self._slowest.append((seconds, id, asked.name))
        if len(self._slowest) > 20 * _SLOWEST:
            self._slowest = sorted(self._slowest, reverse=True)[:_SLOWEST]
        return _duration(seconds)

    def _give_up(self, asked: _Asked | None) -> None:
        if asked is not None and self.trace is not None:
            self.trace.end(self.now, asked.span, {"error": "no answer"})

    def _count(self, arrow: str, kind: str, size: int) -> None:
        self._counts[arrow, kind] = self._counts.get((arrow, kind), 0) + 1
        self._bytes[arrow] += size

    def _line(self, arrow: str, kind: str, id: str, latency: str, size: str, text: str, colour: str = "") -> None:
        self.floor = max(self.floor, self.now)
        when = f"{self.floor:10.6f}" if self._timed else f"{self._bytes[arrow]:10}"
        shown = f"{kind:12}"
        if self._coloured:
            shown = f"\033[{_COLOURS.get(colour or kind, '0')}m{shown}\033[0m"
        self._write(f"{self._prefix}{when} {arrow} {shown} {id:>11} {latency:>8} {size:>10}  {text}\n")

    def end(self, text: str = "") -> None:
        """Write the summary: a text, counts, bytes, the slowest requests, and those without an answer."""
        lines = [text] if text else []
        for arrow in self._directions:
            counts = [_counted(n, kind) for (a, kind), n in self._counts.items() if a == arrow]
            lines.append(f"{arrow} {self._bytes[arrow]} bytes: {', '.join(counts) or 'nothing'}")
        slowest = sorted(self._slowest, reverse=True)[:_SLOWEST]
        if slowest:
            lines.append("slowest requests:")
            lines += [f"  {_duration(seconds):>8}  {id}  {name}" for seconds, id, name in slowest]
        if self._waiting and self._timed:
            lines.append(f"requests without an answer: {len(self._waiting)}")
            for (_, id), asked in list(self._waiting.items())[:_SLOWEST]:
                lines.append(f"  since {asked.when:.6f}  {id}  {asked.name}")
        for asked in self._waiting.values():
            self._give_up(asked)
        self._write("".join([f"{self._prefix}{line}\n" for line in lines]))


def _counted(count: int, kind: str) -> str:
    return f"{count} {kind}{'' if count == 1 or kind in ('junk', 'unreadable') else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def decode(read: Callable[[int], bytes], format: str, log: TextIO, coloured: bool) -> bool:
    """Write what a ``Report`` says of a captured stream to a log; return whether the stream ends with a whole frame."""
    report = Report(log.write, format, False, coloured)
    skimmer = report.direction("--", "--")
    while True:
        data = read(READ_SIZE)
        if not data:
            break
        skimmer.feed(data)
    text = skimmer.end()
    if text:
        report.note("--", f"the stream ends {text}")
    report.end()
    return not text
