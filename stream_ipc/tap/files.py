"""Where the tap writes: lines to stderr or a log, events to a trace. Several taps may append to one file.

Knows descriptors, locks and the Trace Event Format. Must not know what lines and events mean, beyond the time that a
line begins with.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import time
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Iterator

__all__ = ["Log", "Trace"]

_TAIL = 64 * 1024  # bytes at the end of a log in which there is a line with a time

_CLOCK = re.compile(rb"[0-9]+ +([0-9]+\.[0-9]+) .*? monotonic clock ([0-9]+\.[0-9]+)")
_TIME = re.compile(rb"^[0-9]+ +([0-9]+\.[0-9]{6}) ", re.M)


@contextmanager
def _locked(fd: int) -> Iterator[None]:
    with suppress(OSError):  # of a file system without locks: then one tap is enough
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)


class Log:
    """Lines for stderr or a file. Owns those that are not written yet.

    The times of all taps that append to one file count from its first line, and never run backwards: they are those of
    writing, while the file is locked.

    Args:
        name: Of the file; None is stderr.

    Attributes:
        clock: The monotonic time of the last turn.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, name: str | None) -> None:
        self._lines: list[str] = []
        self._start: float | None = None  # the monotonic time from which lines count
        self.clock: float = 0.0
        # Never stderr, which another program may have locked.
        self._is_locked = name is not None and (os.path.isfile(name) or not os.path.exists(name))
        if name is None:
            self._fd = 2
        elif self._is_locked:
            self._fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        else:
            # Opening a pipe without a reader, or a line that nobody has answered, would wait for one.
            self._fd = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK)
            os.set_blocking(self._fd, True)

    def write(self, text: str) -> None:
        """Take a piece of text; it is written at the end of ``turn``."""
        self._lines.append(text)

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Write what is taken inside the block; enter it with the time that its lines have."""
        with _locked(self._fd) if self._is_locked else nullcontext():
            self.clock = now = time.monotonic()
            if self._start is None:
                self._start = now - (self._age(now) if self._is_locked else 0.0)
            yield now - self._start
            text = "".join(self._lines)
            self._lines.clear()
            with suppress(OSError):  # a log without a reader is no reason to end the conversation
                os.write(self._fd, text.encode("utf-8", "backslashreplace"))

    def _age(self, now: float) -> float:
        """Return how long ago the first line of the file was written, in seconds."""
        begun = _CLOCK.match(os.pread(self._fd, 4096, 0))
        if begun is None:
            return 0.0
        tail = os.pread(self._fd, _TAIL, max(0, os.fstat(self._fd).st_size - _TAIL))
        # The clock is lower than in the file if the machine was started since.
        return max(now - float(begun[2]) + float(begun[1]), *map(float, _TIME.findall(tail)), 0.0)


_CLOSE = b"\n]\n"


class Trace:
    """The conversation of one worker in the Trace Event Format, which Perfetto and chrome://tracing show.

    A JSON array with one event on each line. Each write replaces the closing bracket by more events and a closing bracket,
    so the array is complete whenever a tap ends. Owns the descriptor, and the events that are not written yet.

    Raises:
        OSError: The file cannot be opened, or is no such array.
    """

    def __init__(self, name: str) -> None:
        self._events: list[str] = []
        self._pid = 0
        self._tracks: list[str] = []
        # Without waiting, should it be a device.
        self._fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise OSError(f"{name!r} is not a regular file")
        with _locked(self._fd):
            self._find_end()

    def begin(self, pid: int, title: str, tracks: dict[str, str]) -> None:
        """Add a process.

        Args:
            pid: The worker's.
            title: What it is called.
            tracks: What stands for a direction in the calls, and what its track is called.
        """
        self._pid = pid
        self._tracks = ["process", *tracks]
        for track, name in {"process": title, **tracks}.items():
            self._add(track, "M", f"{'thread' if track in tracks else 'process'}_name", {"name": name})

    def add(self, when: float, track: str, phase: str, name: str, args: dict[str, Any], span: int = 0) -> None:
        """Add an event.

        Args:
            when: A monotonic time.
            track: One of those that ``begin`` was called with.
            phase: ``"i"`` for what has no duration, ``"b"`` and ``"e"`` for the beginning and the end of a span.
            name: What it is called.
            args: What else there is to say.
            span: The number of the span.
        """
        more = {"id": f"{self._pid}.{span}"} if span else {"s": "t"}
        self._add(track, phase, name, args, ts=round(when * 1e6, 3), cat="ipc", **more)

    def _add(self, track: str, phase: str, name: str, args: dict[str, Any], **more: Any) -> None:
        event = {"name": name, "ph": phase, "pid": self._pid, "tid": self._tracks.index(track), "args": args, **more}
        self._events.append(json.dumps(event, separators=(",", ":")))

    def flush(self) -> None:
        """Write the events so far; without effect on a full disk."""
        text = ",\n".join(self._events)
        self._events.clear()
        if not text:
            return
        with _locked(self._fd), suppress(OSError):
            end = self._find_end()
            data = (b",\n" if end else b"[\n") + text.encode("ascii") + _CLOSE
            if os.pwrite(self._fd, data, end) < len(data):
                os.ftruncate(self._fd, end)
                os.pwrite(self._fd, _CLOSE if end else b"", end)

    def _find_end(self) -> int:
        """Return where the last event ends."""
        size = os.fstat(self._fd).st_size
        end = max(0, size - len(_CLOSE))
        if size and (os.pread(self._fd, 3, 0) != b"[\n{" or os.pread(self._fd, len(_CLOSE), end) != _CLOSE):
            raise OSError("it is not empty, and not a trace that a tap has written")
        return end
