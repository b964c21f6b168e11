"""This process's own stdin and stdout as a channel: the take-over, and its undoing.

Knows descriptors 0, 1 and 2 and ``sys``. Must not know sessions.

The wire moves to private descriptors. Descriptor 0 becomes the null device, so that nobody else reads what is meant for
the session, and descriptor 1 becomes another stderr, so that a ``print``, or the output of a program that this process
starts, stays visible and cannot get between the frames. Where descriptor 2 is the wire, too, both 1 and 2 become the null
device.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import sys

from .. import log
from ..errors import InvalidStreamError
from ..interruptions import pass_on
from .descriptors import refuse_text, take_read_ahead
from .ends import Ends, ReadEnd, WriteEnd
from .stream_channel import StreamChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..protocols import MessageSerializer
    from .channel import Teardown

__all__ = ["StdioChannel"]

_active: StdioChannel | None = None


class StdioChannel(StreamChannel):
    """Messages over this process's stdin and stdout. There can be one at a time.

    Owns the private descriptors, and restores the standard ones. Raises what ``create_stdio_session`` does.
    """

    def __init__(self, serializer: MessageSerializer, max_frame_size: int) -> None:
        global _active
        if _active is not None:
            raise RuntimeError("this process's stdin and stdout are in use by another session; close it first")
        _flush()
        self._copies: dict[int, int] = {}  # of the standard descriptors that are taken over
        self._buffered: list[Any] = []  # what is to be block-buffered again
        ends = Ends()
        try:
            self._copy(0, "stdin")
            self._copy(1, "stdout")
            if _is_stderr(*self._copies.values()):
                self._copy(2, "stderr")
            _take_over(2 in self._copies)
            self._buffer_lines()
            ahead = _read_ahead()
            # Shared: both are other processes' open files too, so their flags stay as they are.
            reader = ends.open(ReadEnd, self._copies[0], True)
            reader.ahead = ahead
            writer = ends.open(WriteEnd, self._copies[1], True)
            super().__init__(ends, writer, [reader], serializer, max_frame_size, "stdio")
            if _is_typed(reader.fd):
                log.warning(
                    "stdin is a terminal, where a session expects messages: this program is to be started by another one,"
                    " with create_command_session(); Ctrl-D ends it"
                )
        except BaseException:
            ends.release()
            self._restore()
            raise
        _active = self

    def close(self) -> Teardown | None:
        self.release()
        return None

    def release(self) -> None:
        global _active
        if _active is self:
            _flush()  # what was printed meanwhile goes where it was meant to go
            super().release()
            self._restore()
            _active = None

    def abandon(self) -> None:
        global _active
        _active = None
        super().abandon()
        copy = self._copies.pop(2, -1)  # the others are the wire, and are closed with it
        if copy >= 0:
            os.close(copy)

    def _copy(self, fd: int, name: str) -> None:
        try:
            if getattr(sys, f"__{name}__") is None:
                # The interpreter found none when it started. The number may be another file's by now.
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            # Above the standard ones, and not inherited by programs that this process starts. Stored before a signal is
            # looked at.
            for self._copies[fd] in map(fcntl.fcntl, (fd,), (fcntl.F_DUPFD_CLOEXEC,), (3,)):
                break
        except OSError as exc:
            pass_on(exc)
            if exc.errno != errno.EBADF:  # out of descriptors, and not without this one
                exc.strerror = f"cannot take over {name} (descriptor {fd}): {exc.strerror}"
                raise
            raise InvalidStreamError(
                f"this process has no {name} (descriptor {fd}: {exc}); it is to be started with {name} connected to its"
                " parent"
            ) from exc

    def _buffer_lines(self) -> None:
        """Let each line that is printed leave at once, though descriptor 1 is no terminal."""
        for stream in (sys.stdout, sys.__stdout__):
            try:
                if isinstance(stream, io.TextIOWrapper) and stream.fileno() == 1 and not stream.line_buffering:
                    self._buffered.append(stream)
                    stream.reconfigure(line_buffering=True)
            except (OSError, ValueError) as exc:  # closed, or an object that is no file
                pass_on(exc)

    def _restore(self) -> None:
        for stream in self._buffered:
            try:
                stream.reconfigure(line_buffering=False)
            except (OSError, ValueError) as exc:
                pass_on(exc)
        for number, copy in self._copies.copy().items():
            os.dup2(copy, number)
            # atomic: no calls
            del self._copies[number]

            os.close(copy)


def _is_typed(fd: int) -> bool:
    """Return whether somebody types there: a terminal that others send messages through is in raw mode."""
    if not os.isatty(fd):
        return False
    import termios

    try:
        return bool(termios.tcgetattr(fd)[3] & termios.ICANON)
    except termios.error as exc:  # it was hung up
        pass_on(exc)
        return False


def _is_stderr(*wire: int) -> bool:
    """Return whether stderr is the same stream as the wire, but for a terminal, at which somebody wants to see it."""
    try:
        if sys.__stderr__ is None or os.isatty(2):
            return False
        mine = os.fstat(2)
        return any([os.path.samestat(mine, os.fstat(other)) for other in wire])
    except OSError as exc:  # it was closed
        pass_on(exc)
        return False


def _take_over(drop_stderr: bool) -> None:
    null = -1
    try:
        for null in map(os.open, (os.devnull,), (os.O_RDWR,)):  # stored before a signal is looked at
            break
        os.dup2(null, 0)
        os.dup2(null, 1)
        if drop_stderr:
            os.dup2(null, 2)
        elif sys.__stderr__ is not None:  # or descriptor 2 may be anything that was opened since this process was started
            try:
                os.dup2(2, 1)
            except OSError as exc:  # it was closed since
                pass_on(exc)
    except OSError as exc:
        pass_on(exc)
        exc.strerror = f"cannot take over stdin and stdout and put the null device in their place: {exc.strerror}"
        raise
    finally:
        if null >= 0:
            os.close(null)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError) as exc:  # there is none, it is closed, or nobody reads it
            pass_on(exc)


def _read_ahead() -> bytes:
    """Return what ``sys.stdin`` has read before; descriptor 0 is the null device by now, so this cannot block."""
    try:
        if sys.stdin.fileno() != 0:
            return b""
    except (AttributeError, OSError, ValueError) as exc:
        pass_on(exc)
        return b""  # there is none, it is closed, or an object that is no file
    ahead = take_read_ahead(sys.stdin)
    refuse_text(sys.stdin)
    return ahead
