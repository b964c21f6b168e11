"""A conversation as lines of text: one for each frame, and a summary at the end.

Knows frames, as far as their headers go, and ``payloads``. Must not know where the bytes come from or go to. Of a
payload only the beginning is kept, so that watching costs the same for a long one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Callable, Dict, List, Tuple

from ..wire.framing import HEADER_SIZE, MAGIC, magic_suffix
from .payloads import look

__all__ = ["HEAD_SIZE", "Report", "Skimmer"]

HEAD_SIZE = 4096  # bytes of a payload that are looked at

_JUNK = 60  # characters of junk in a line
_UNANSWERED = 100_000  # requests that are remembered until they are answered
_SLOWEST = 5

_COLOURS = {"request": "36", "response": "32", "notification": "0", "junk": "33", "unreadable": "31", "error": "31"}


class Skimmer:
    """Follows the frames of one stream without keeping them.

    Attributes:
        unseen: How many of the bytes that come next need not be fed, because they are the rest of a payload of which
            enough was seen. They are to be counted with ``skip``.
    """

    def __init__(self, junk: Callable[[bytes], None], frame: Callable[[int, bytes], None]) -> None:
        self._on_junk = junk
        self._on_frame = frame
        self._held = b""  # the beginning of a header, or of what may be one
        self._size = -1  # of the payload that is under way; -1 between frames
        self._head = b""
        self._left = 0  # bytes of it that are still to come
        self.unseen: int = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes, however cut."""
        data = self._held + data
        self._held = b""
        at = 0
        while True:
            if self._size >= 0:
                part = data[at : at + min(self._left, HEAD_SIZE - len(self._head))]
                self._head += part
                taken = min(self._left, len(data) - at)
                at += taken
                self._left -= taken
                if not self._left:
                    self._end()
                else:
                    break
            start = data.find(MAGIC, at)
            if start < 0:
                end = len(data) - magic_suffix(data, at)
                self._junk(data[at:end])
                self._held = data[end:]
                break
            self._junk(data[at:start])
            at = start
            if len(data) - at < HEADER_SIZE:
                self._held = data[at:]
                break
            self._left = self._size = int.from_bytes(data[at + len(MAGIC) : at + HEADER_SIZE], "big")
            at += HEADER_SIZE
        self.unseen = self._left if len(self._head) == HEAD_SIZE else 0

    def skip(self, count: int) -> None:
        """Take note of bytes that were not fed."""
        self._left -= count
        self.unseen -= count
        if not self._left:
            self._end()

    def end(self) -> str:
        """The stream has ended.

        Returns:
            What broke off, or an empty text.
        """
        if self._size >= 0:
            return f"in the middle of a frame: {self._size - self._left} of {self._size} bytes had come"
        if len(self._held) >= len(MAGIC):
            return f"in the middle of a frame's header: {len(self._held)} of {HEADER_SIZE} bytes had come"
        self._junk(self._held)
        return ""

    def _junk(self, data: bytes) -> None:
        if data:
            self._on_junk(data)

    def _end(self) -> None:
        size, head = self._size, self._head
        self._size, self._head, self.unseen = -1, b"", 0
        self._on_frame(size, head)


class Report:
    """Writes a line for each frame of a conversation, and a summary.

    Args:
        write: Takes a piece of text.
        format: One of ``payloads.FORMATS``, or an empty text to find out from each payload.
        timed: Whether there are times to be told. Otherwise lines begin with where the frame ends in the stream, in bytes.
        coloured: Whether to use a terminal's colours.

    Attributes:
        now: When what is fed next has passed, in seconds since the start.
    """

    def __init__(
        self, write: Callable[[str], Any], format: str = "", timed: bool = True, coloured: bool = False
    ) -> None:
        self.now: float = 0.0
        self._write = write
        self._format = format
        self._timed = timed
        self._coloured = coloured
        self._directions: List[str] = []
        self._counts: Dict[Tuple[str, str], int] = {}
        self._bytes: Dict[str, int] = {}
        # Requests without an answer: (the direction of the answer, id) -> (when, class).
        self._waiting: OrderedDict[Tuple[str, str], Tuple[float, str]] = OrderedDict()
        self._slowest: List[Tuple[float, str, str]] = []

    def direction(self, arrow: str, answers: str) -> Skimmer:
        """What follows the frames of one direction.

        Args:
            arrow: What stands for it in a line.
            answers: What stands for the direction in which its requests are answered.
        """
        self._directions.append(arrow)
        self._bytes[arrow] = 0
        return Skimmer(
            lambda data: self._on_junk(arrow, data), lambda size, head: self._on_frame(arrow, answers, size, head)
        )

    def note(self, arrow: str, text: str) -> None:
        """Write a line that is about no frame."""
        self._line(arrow, "error", "", "", "", text)

    def _on_junk(self, arrow: str, data: bytes) -> None:
        text = data.decode("utf-8", "backslashreplace")
        shown = repr(text[:_JUNK])
        self._count(arrow, "junk", len(data))
        self._line(arrow, "junk", "", "", f"{len(data)} B", shown if len(text) <= _JUNK else shown + "...")

    def _on_frame(self, arrow: str, answers: str, size: int, head: bytes) -> None:
        kind, id, name, view = look(head, size, self._format)
        latency = ""
        self._count(arrow, kind, HEADER_SIZE + size)
        if kind == "request":
            self._waiting[answers, id] = self.now, name
            if len(self._waiting) > _UNANSWERED:
                self._waiting.popitem(last=False)
        elif kind == "response":
            asked = self._waiting.pop((arrow, id), None)
            if asked is not None and self._timed:
                seconds = self.now - asked[0]
                latency = _duration(seconds)
                self._slowest.append((seconds, id, asked[1]))
                if len(self._slowest) > 20 * _SLOWEST:
                    self._slowest = sorted(self._slowest, reverse=True)[:_SLOWEST]
        failed = kind == "response" and name.endswith("ErrorMessage")
        self._line(arrow, kind, id, latency, f"{size} B", view, "error" if failed else kind)

    def _count(self, arrow: str, kind: str, size: int) -> None:
        self._counts[arrow, kind] = self._counts.get((arrow, kind), 0) + 1
        self._bytes[arrow] += size

    def _line(self, arrow: str, kind: str, id: str, latency: str, size: str, text: str, colour: str = "") -> None:
        when = f"{self.now:10.6f}" if self._timed else f"{self._bytes[arrow]:10}"
        shown = f"{kind:12}"
        if self._coloured:
            shown = f"\033[{_COLOURS[colour or kind]}m{shown}\033[0m"
        self._write(f"{when} {arrow} {shown} {id:>11} {latency:>8} {size:>10}  {text}\n")

    def summary(self) -> str:
        """Counts, bytes, the slowest requests, and those without an answer."""
        lines = []
        for arrow in self._directions:
            counts = [_counted(n, kind) for (a, kind), n in self._counts.items() if a == arrow]
            lines.append(f"{arrow} {self._bytes[arrow]} bytes: {', '.join(counts) or 'nothing'}")
        slowest = sorted(self._slowest, reverse=True)[:_SLOWEST]
        if slowest:
            lines.append("slowest requests:")
            lines += [f"  {_duration(seconds):>8}  {id}  {name}" for seconds, id, name in slowest]
        if self._waiting and self._timed:
            lines.append(f"requests without an answer: {len(self._waiting)}")
            for (_, id), (when, name) in list(self._waiting.items())[:_SLOWEST]:
                lines.append(f"  since {when:.6f}  {id}  {name}")
        return "".join([f"{line}\n" for line in lines])


def _counted(count: int, kind: str) -> str:
    return f"{count} {kind}{'' if count == 1 or kind in ('junk', 'unreadable') else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
