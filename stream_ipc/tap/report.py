"""A conversation as lines of text, one for each frame, with a summary at the end; and as events of a trace.

Knows frames and ``payloads``. Must not know where the bytes come from or go to.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Any, Callable, NamedTuple

from ..wire.framing import HEADER_SIZE, MAX_FRAME_SIZE, FrameDecoder, Junk
from .files import Trace
from .payloads import look, show

__all__ = ["Report"]

_LONG = 500  # characters of text in a trace
_LISTED = 5  # of the slowest requests, and of those without an answer

_COLOURS = {"request": "36", "response": "32", "junk": "33", "unreadable": "31", "error": "31"}

_UNCOUNTABLE = ("junk", "unreadable")


class _Asked(NamedTuple):
    """A request without an answer."""

    when: float
    time: float
    name: str
    span: int


class Report:
    """Writes a line for each frame of a conversation, and a summary. Owns the counts and the requests without an answer.

    Args:
        write: Takes a piece of text.
        arrows: What stands for the directions: two of a conversation, or one of a stream that was captured. There no times
            are known, so lines begin with where the frame ends, in bytes.
        format: As for ``look``.
        coloured: Whether to use a terminal's colours.
        prefix: What each line begins with.
        trace: What gets the same as events.

    Attributes:
        now: When what is fed next has passed, on the monotonic clock.
        time: What the next lines begin with, in seconds.
    """

    def __init__(
        self,
        write: Callable[[str], Any],
        arrows: tuple[str, ...],
        format: str = "",
        coloured: bool = False,
        prefix: str = "",
        trace: Trace | None = None,
    ) -> None:
        self._write = write
        self._other = dict(zip(arrows, reversed(arrows)))
        self._is_timed = len(arrows) > 1
        self._format = format
        self._coloured = coloured
        self._prefix = prefix
        self._trace = trace
        self.now: float = 0.0
        self.time: float = 0.0
        self._decoders = {arrow: FrameDecoder(MAX_FRAME_SIZE) for arrow in arrows}
        self._counts: dict[str, Counter[str]] = {arrow: Counter() for arrow in arrows}
        self._bytes = dict.fromkeys(arrows, 0)
        self._waiting: dict[tuple[str, str], _Asked] = {}  # by the direction of the request, and its id
        self._slowest: list[tuple[float, str, str]] = []
        self._spans = 0

    def feed(self, arrow: str, data: bytes) -> None:
        """Take the next bytes of a direction, however cut."""
        decoder = self._decoders[arrow]
        items, decoder.state = decoder.decode(data)
        self._take(arrow, items)

    def _take(self, arrow: str, items: list[Any]) -> None:
        for item in items:
            if isinstance(item, Junk):
                self._count(arrow, "junk", len(item))
                self.line(arrow, "junk", show(_text(item)), size=f"{len(item)} B")
                self.text(arrow, "junk", item)
            else:
                self._on_frame(arrow, item)

    def text(self, arrow: str, name: str, data: bytes) -> None:
        """Take text that belongs to no frame. Only the trace shows it."""
        self._event(arrow, "i", name, {"text": _text(data[:_LONG]), "size": len(data)})

    def _on_frame(self, arrow: str, payload: bytes | bytearray) -> None:
        size = len(payload)
        kind, id, name, view = look(payload, self._format)
        self._count(arrow, kind, HEADER_SIZE + size)
        args = {"class": name, "id": id, "size": size, "message": view}
        colour, latency = kind, ""
        asker = self._other[arrow]
        if kind == "request":
            self._give_up(arrow, id)  # which only a faulty program uses twice
            self._spans += 1
            self._waiting[arrow, id] = _Asked(self.now, self.time, name, self._spans)
            self._event(arrow, "b", name, args, self._spans)
        elif kind == "response" and (asker, id) in self._waiting:
            asked = self._waiting.pop((asker, id))
            self._event(asker, "e", asked.name, args, asked.span)
            if self._is_timed:
                latency = _duration(self.now - asked.when)
                self._slowest = heapq.nlargest(_LISTED, [*self._slowest, (self.now - asked.when, id, asked.name)])
        else:
            self._event(arrow, "i", name or kind, args)
        if kind == "response" and name.endswith("ErrorMessage"):
            colour = "error"
        self.line(arrow, kind, view, id, latency, f"{size} B", colour)

    def _give_up(self, arrow: str, id: str) -> None:
        asked = self._waiting.pop((arrow, id), None)
        if asked is not None:
            self._event(arrow, "e", asked.name, {"error": "no answer"}, asked.span)

    def _event(self, arrow: str, phase: str, name: str, args: dict[str, Any], span: int = 0) -> None:
        if self._trace is not None:
            self._trace.add(self.now, arrow, phase, name, args, span)

    def _count(self, arrow: str, kind: str, size: int) -> None:
        self._counts[arrow][kind] += 1
        self._bytes[arrow] += size

    def line(
        self, arrow: str, kind: str, text: str, id: str = "", latency: str = "", size: str = "", colour: str = ""
    ) -> None:
        begin = f"{self.time:10.6f}" if self._is_timed else f"{self._bytes[arrow]:10}"
        shown = f"{kind:12}"
        if self._coloured:
            shown = f"\033[{_COLOURS.get(colour or kind, '0')}m{shown}\033[0m"
        self._write(f"{self._prefix}{begin} {arrow} {shown} {id:>11} {latency:>8} {size:>10}  {text}\n")

    def finish(self, text: str = "") -> bool:
        """Write what has broken off, and a summary that begins with a text; return whether nothing has."""
        is_whole = True
        for arrow, decoder in self._decoders.items():
            items, broken = decoder.finish()
            self._take(arrow, items)
            if broken:
                is_whole = False
                self.line(arrow, "error", f"the stream ended {broken}")
                self._event(arrow, "i", "error", {"text": f"the stream ended {broken}"})
        lines = [text] if text else []
        for arrow, counts in self._counts.items():
            counted = [f"{n} {kind}{'s' if n > 1 and kind not in _UNCOUNTABLE else ''}" for kind, n in counts.items()]
            lines.append(f"{arrow} {self._bytes[arrow]} bytes: {', '.join(counted) or 'nothing'}")
        if self._slowest:
            lines.append("slowest requests:")
            lines += [f"  {_duration(seconds):>8}  {id}  {name}" for seconds, id, name in self._slowest]
        if self._waiting and self._is_timed:
            lines.append(f"requests without an answer: {len(self._waiting)}")
            for (_, id), asked in list(self._waiting.items())[:_LISTED]:
                lines.append(f"  since {asked.time:.6f}  {id}  {asked.name}")
        for arrow, id in list(self._waiting):
            self._give_up(arrow, id)
        self._write("".join([f"{self._prefix}{line}\n" for line in lines]))
        return is_whole


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _duration(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
