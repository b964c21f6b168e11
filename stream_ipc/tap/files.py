"""Where the tap writes: lines to stderr or a log, events to a trace. Several taps may append to one file.

Knows descriptors and locks. Must not know what the lines and events mean, beyond the time that a line begins with.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from contextlib import contextmanager
from typing import Iterator, TextIO

__all__ = ["Log", "TraceFile", "open_log"]

_TAIL = 64 * 1024  # bytes at the end of a file in which its last line, or event, stands

_CLOCK = re.compile(rb"[0-9]+ +([0-9]+\.[0-9]+) .*? monotonic clock ([0-9]+\.[0-9]+)")
_TIME = re.compile(rb"^[0-9]+ +([0-9]+\.[0-9]{6}) ", re.M)


@contextmanager
def _locked(fd: int) -> Iterator[None]:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks: then one tap is enough
    try:
        yield
    finally:
        try:
            fcntl.flock(fd, fcntl.LOCK_UN)
        except OSError:
            pass


class Log:
    """Lines for a stream. Owns those that are not written yet."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: list[str] = []

    def write(self, text: str) -> None:
        """Take a piece of text; it is written at the end of ``turn``."""
        self._lines.append(text)

    def age(self, now: float) -> float:
        """Return the time in seconds that ``now`` has in this log."""
        return 0.0

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Write what is taken inside the block; enter it with a time that no line may be before."""
        try:
            yield 0.0
        finally:
            self._flush()

    def _flush(self) -> None:
        text = "".join(self._lines)
        self._lines.clear()
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass  # a log without a reader is no reason to end the conversation


class LogFile(Log):
    """Lines for a regular file. Owns its descriptor.

    The times of all taps that append to it count from its first line, and never run backwards.
    """

    def __init__(self, name: str) -> None:
        super().__init__(open(name, "a+", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
        self._fd = self._stream.fileno()
        self._end = -1  # its size when this tap last wrote
        self._last = 0.0  # the last time that another tap has written

    def age(self, now: float) -> float:
        """Return the time in seconds that ``now`` has in this log."""
        begun = _CLOCK.match(os.pread(self._fd, 4096, 0))
        # The clock is lower than in the file if the machine was started since.
        return max(self._last, now - float(begun[2]) + float(begun[1]) if begun else 0.0)

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Write what is taken inside the block; enter it with a time that no line may be before."""
        with _locked(self._fd):
            size = os.fstat(self._fd).st_size
            if size != self._end:
                times = _TIME.findall(os.pread(self._fd, _TAIL, max(0, size - _TAIL)))
                self._last = float(times[-1]) if times else 0.0
            with super().turn():
                yield self._last
            self._end = os.fstat(self._fd).st_size


def open_log(name: str) -> Log:
    """Open a log to append to it.

    Raises:
        OSError: It cannot be opened.
    """
    if not os.path.exists(name) or os.path.isfile(name):
        return LogFile(name)
    # Opening a pipe without a reader, or a line that nobody has answered, would wait for one.
    fd = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK)
    os.set_blocking(fd, True)
    return Log(open(fd, "a", encoding="utf-8", errors="backslashreplace"))


_BEGIN, _NEXT, _CLOSE = b"[\n", b",\n", b"\n]\n"  # the first two of one length


class TraceFile:
    """A JSON array with one event on each line. Owns its descriptor.

    Each write replaces the closing bracket by one more event and a closing bracket, so the array is complete whenever a tap
    ends. If a tap is killed inside a write that crosses a page, the next one cuts off the line that is not whole.

    Raises:
        OSError: The file cannot be opened, or is no such array.
    """

    def __init__(self, name: str) -> None:
        # Without waiting, should it be a device; and signals wait as long as this does, so no lock either.
        self._fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise OSError(f"{name!r} is not a regular file")
        if not b"[\n{".startswith(os.pread(self._fd, 3, 0)):
            os.close(self._fd)
            raise OSError(f"{name!r} is not empty, and not a trace that a tap has written")

    def append(self, events: list[bytes]) -> None:
        """Append events, each an object in JSON; without effect on a full disk."""
        with _locked(self._fd):
            try:
                end = self._find_end()
                for event in events:
                    if not self._write((_NEXT if end else _BEGIN) + event + _CLOSE, end):
                        os.ftruncate(self._fd, end)
                        self._write(_CLOSE if end else b"", end)
                        break
                    end += len(_NEXT) + len(event)
            except OSError:
                pass

    def _write(self, data: bytes, at: int) -> bool:
        """Write, and tell whether there was room."""
        try:
            return os.pwrite(self._fd, data, at) == len(data)
        except OSError:
            return False

    def _find_end(self) -> int:
        """Return where the last whole event ends."""
        size = os.fstat(self._fd).st_size
        if os.pread(self._fd, len(_CLOSE), max(0, size - len(_CLOSE))) == _CLOSE:
            return size - len(_CLOSE)
        start = max(0, size - _TAIL)
        tail = os.pread(self._fd, _TAIL, start)
        cut = tail.rfind(b"}\n") if tail.endswith(b"}\n") else tail.rfind(b"},\n")
        if cut < 0 < start:
            raise OSError("another program has written to the trace")
        end = start + cut + 1 if cut >= 0 else 0
        os.ftruncate(self._fd, end)
        return end
