"""The ends of streams with a descriptor: how to read and write one without blocking, and who closes them.

Knows descriptors and sockets. Must not know frames or messages. Ends of objects that have none are in ``streams.py``.

Descriptors that other processes share (this process's own stdin and stdout, a terminal) keep their flags, because
``O_NONBLOCK`` belongs to the open file and not to the descriptor: they are read only when they are ready, and written
in pieces that cannot block. All others are switched to non-blocking while they are in use here.

An end reads and writes by an iterator, and whoever uses it says ``for x in end.reads: break``, so that no interruption
loses bytes; see ``interruptions``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import stat
import sys
from itertools import repeat, starmap

from .. import log
from ..errors import InvalidStreamError
from ..interruptions import Shield, pass_on
from .descriptors import (
    READ_SIZE,
    close_all,
    close_stream,
    describe_stream,
    is_socket,
    refuse_text,
    take_read_ahead,
    unusable,
    wait_writable,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

__all__ = ["End", "Ends", "ReadEnd", "WriteEnd"]

LARGE_PIPE = 1024 * 1024  # bytes: as much as Linux lets anybody have
LARGE_SOCKET = 256 * 1024  # bytes, of which Linux makes twice as many; more is no faster
# Linux counts the pages of all pipes of a user. Once there are too many, each new pipe gets one or two, whichever program
# makes it: this process takes a quarter of the usual limit at most.
MOST_PIPES = 16

_grown: set[int] = set()  # descriptors of pipes
_PTY_MASTER = os.makedev(5, 2) if sys.platform.startswith("linux") else -1


class End:
    """A stream and its descriptor.

    Attributes:
        stream: The stream as it was given.
        fd: Its descriptor; a negative number that stands for it if it has none.
        watched: Whether the descriptor can be waited for.
        shared: Whether other processes use the same open file.
        socket: The socket object through which it is used, if it is a socket.
        error: Why the stream ended, if the descriptor does not tell.
        growable: Whether this is a pipe or a Unix socket that may be made larger, and was not yet.
        reads: Iterating it once reads once: at most ``READ_SIZE`` bytes, empty at the end of the stream. Raises
            ``BlockingIOError`` if nothing is there.
        reads_into: Called with a buffer, returns what reads once into it when it is iterated once, and gives the number of
            bytes. None if only ``reads`` can be used.
        ahead: What a buffered file object had read before it came here.
        pending: Whether something can be read, or may be, that no descriptor shows.
        identity: Which file the descriptor was.
        poll_fd: The descriptor that is written and waited for: ``fd``, or one of this process's own for the same file.
    """

    identity: tuple[int, int] | None = None
    forbidden_mode: int = -1  # the access mode that this end cannot use
    growable: bool = False
    socket: Any = None
    watched: bool = True
    error: BaseException | None = None
    reads: Iterator[bytes]
    reads_into: Any = None
    ahead: bytes = b""
    pending: bool = False
    poll_fd: int = -1
    _usual_size: int = 0  # of the buffer of a Unix socket that was made larger
    _timeout: Any = None  # of a socket object as it was given
    _blocking: bool | None = None  # whether anything else was, if it is not now

    def __init__(self, stream: Any, shared: bool = False) -> None:
        self.prepare(stream)  # before anything is stored, so that an interruption here loses nothing
        self.stream = stream
        try:
            self.fd: int = stream if isinstance(stream, int) else stream.fileno()
            status = os.fstat(self.fd)
            access = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE
        except (AttributeError, OSError, TypeError, ValueError, OverflowError) as exc:
            pass_on(exc)
            raise unusable(stream, str(exc)) from exc
        if access == self.forbidden_mode:
            what, needed = ("written", "read") if access == os.O_WRONLY else ("read", "written")
            raise InvalidStreamError(f"{describe_stream(stream)} can only be {what}, and here it is to be {needed}")
        self.identity = (status.st_dev, status.st_ino)
        self._mode: int = status.st_mode
        # Descriptors 0 to 2 and terminals are shared with the process that started this one. The master of a
        # pseudo-terminal is not: only the process that made it has it.
        self._is_terminal: bool = stat.S_ISCHR(self._mode) and status.st_rdev != _PTY_MASTER and os.isatty(self.fd)
        self.shared: bool = shared or self.fd <= 2 or self._is_terminal
        try:
            if is_socket(stream):
                self._timeout = stream.gettimeout()
                self.socket = stream
                stream.setblocking(False)
            elif stat.S_ISSOCK(self._mode):
                self._make_socket()
            elif not self.shared and not stat.S_ISREG(self._mode):
                self._blocking = os.get_blocking(self.fd)
                os.set_blocking(self.fd, False)
            self.open()
        except BaseException:
            self.release()
            raise

    def prepare(self, stream: Any) -> None:
        """Do what is to be done before the stream is looked at."""

    def open(self) -> None:
        """Get ready to be used, once the stream does not block."""

    def _make_socket(self) -> None:
        # A socket object, for the flags of send() and recv(). It is detached again when the end is released.
        import socket

        blocking = os.get_blocking(self.fd)
        with Shield():  # if it was lost before it is stored, it would close the descriptor
            self.socket = socket.socket(fileno=self.fd)
        if not self.shared:
            self._blocking = blocking
            self.socket.settimeout(0)
        elif self.socket.gettimeout() is not None:  # socket.setdefaulttimeout() was used, and has set the flag
            self.socket.settimeout(None)
            os.set_blocking(self.fd, blocking)

    @property
    def family(self) -> str:
        """The name of its socket's family; empty if it is no socket."""
        return getattr(getattr(self.socket, "family", None), "name", "")

    @property
    def is_tcp(self) -> bool:
        return self.family in ("AF_INET", "AF_INET6")

    def _socket_flags(self) -> int:
        # For a socket whose flags are not this process's to change, or that somebody makes blocking again.
        flag: int = sys.modules["socket"].MSG_DONTWAIT
        return flag

    def find_invalid(self) -> str | None:
        """Return what is wrong if the owner closed the stream meanwhile, or None."""
        stream = self.stream
        how = ""
        try:
            # File objects and sockets remember that they were closed; their number may belong to another file now.
            if isinstance(stream, int) or not (getattr(stream, "closed", False) or stream.fileno() != self.fd):
                status = os.fstat(self.fd)
                if (status.st_dev, status.st_ino) == self.identity:
                    return None
                how = ", and its number is another file's now"
        except (OSError, ValueError) as exc:
            pass_on(exc)
            if getattr(exc, "errno", errno.EBADF) != errno.EBADF:
                return None  # it cannot be told now
            how = f" ({exc})"
        return self.taken_away_text(how)

    def taken_away_text(self, how: str = "") -> str:
        """Return that the owner closed the stream, and how that can be told."""
        return f"{describe_stream(self.stream)} was closed while a session was using it{how}; close the session instead"

    def grow(self) -> None:
        """Have what is growable hold more, as far as the system allows it: a large message is on its way."""
        self.growable = False
        sockets: Any = sys.modules.get("socket")
        try:
            if self.socket is None:
                if len(_grown) < MOST_PIPES and hasattr(fcntl, "F_SETPIPE_SZ"):
                    _grown.add(self.fd)
                    fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, LARGE_PIPE)
                return
            # The memory is the sender's, is there only while it holds something, and Linux bounds it without an error.
            size = self.socket.getsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF)
            with Shield(), sockets.socket(sockets.AF_UNIX) as fresh:  # or an interruption could leave it unclosed
                usual = fresh.getsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF)
            if size == usual < LARGE_SOCKET:  # its owner has not chosen another
                self._usual_size = usual
                self.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, LARGE_SOCKET)
        except OSError as exc:  # out of descriptors, the user has too many pipes, or the system has a limit that is lower
            _grown.discard(self.fd)
            pass_on(exc)

    def release(self) -> None:
        """Leave the stream as it was found. An interrupted call can be made again."""
        if self.fd >= 0 and self.find_invalid() is None:
            try:
                if self._blocking is not None:
                    os.set_blocking(self.fd, self._blocking)
                if self.socket is not None and self.socket is self.stream:
                    self.socket.settimeout(self._timeout)
                if self._usual_size:
                    sockets: Any = sys.modules["socket"]
                    size = self._usual_size // (2 if sys.platform == "linux" else 1)  # Linux doubles it, and tells that
                    self.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, size)
            except OSError as exc:
                pass_on(exc)
        self.abandon()

    def abandon(self) -> None:
        """Leave the stream without touching it."""
        if self.socket is not None and self.socket is not self.stream:
            self.socket.detach()
        _grown.discard(self.fd)
        # atomic: no calls
        self.socket = None
        self.fd = -1


def _warn_of_sigpipe() -> None:
    # A pipe has no MSG_NOSIGNAL, and blocking the signal would take calls for each write.
    import _signal  # type: ignore[import-not-found]  # of which signal makes enums

    if _signal.getsignal(_signal.SIGPIPE) == _signal.SIG_DFL:
        log.issue_warning(
            "SIGPIPE is at its default, so this process will be killed without a word when the other side of a pipe is"
            " gone; use signal.signal(signal.SIGPIPE, signal.SIG_IGN), which is what Python starts with",
            RuntimeWarning,
        )


class ReadEnd(End):
    """The end that is read."""

    forbidden_mode: int = os.O_WRONLY

    def open(self) -> None:
        stream, sock = self.stream, self.socket
        if sock is None:
            self.reads: Iterator[bytes] = map(os.read, repeat(self.fd), repeat(READ_SIZE))
        else:
            self.reads = map(sock.recv, repeat(READ_SIZE), repeat(self._socket_flags()))
        try:
            is_text = hasattr(stream, "buffer")
            may_block = (self.shared or is_text) and not stat.S_ISREG(self._mode)  # a file's buffer may have to seek in it
            self.ahead: bytes = b"" if may_block else take_read_ahead(stream)
            if is_text or (may_block and hasattr(stream, "peek")):
                self.ahead += self._take_from_object()
        except (InvalidStreamError, OSError):
            raise
        except Exception as exc:  # of somebody's own class
            pass_on(exc)
            raise unusable(stream, repr(exc)) from exc

    def _take_from_object(self) -> bytes:
        """Return what the file object has read ahead, while something that has ended stands in for its descriptor."""
        inheritable = os.get_inheritable(self.fd)
        with Shield():
            if self.socket is None:
                ended, other = os.pipe()
            else:  # a file object around a socket calls recv()
                ended, other = [sock.detach() for sock in sys.modules["_socket"].socketpair()]
            os.close(other)
            try:
                mine = os.dup(self.fd)
                try:
                    os.dup2(ended, self.fd, inheritable)
                    ahead = take_read_ahead(self.stream)
                    refuse_text(self.stream)
                    return ahead
                finally:
                    os.dup2(mine, self.fd, inheritable)
                    os.close(mine)
            finally:
                os.close(ended)

    def reads_into(self, view: memoryview) -> Iterator[int]:
        if self.growable:
            self.grow()
        if self.socket is None:
            return map(os.readv, (self.fd,), ([view],))
        return map(self.socket.recv_into, (view,), (0,), (self._socket_flags(),))


class WriteEnd(End):
    """The end that is written."""

    forbidden_mode: int = os.O_RDONLY

    def prepare(self, stream: Any) -> None:
        flush = getattr(stream, "flush", None)
        if flush is not None:
            try:
                flush()  # what its owner wrote before comes first
            except (OSError, ValueError) as exc:
                pass_on(exc)
                raise unusable(stream, str(exc)) from exc

    def open(self) -> None:
        self.poll_fd: int = self.fd
        self.growable: bool = self.family == "AF_UNIX" and not self.shared  # not a socket of the parent's, too
        if self.socket is None and self.shared and (stat.S_ISFIFO(self._mode) or self._is_terminal):
            self._reopen()
        if not self.shared and stat.S_ISFIFO(self._mode):
            _warn_of_sigpipe()

    def writes(self, buffers: Iterator[Any]) -> Iterator[int]:
        """Return what writes once when it is iterated: some of the next buffer; the item is how much.

        Raises ``BlockingIOError`` if it would block.
        """
        sock = self.socket
        if sock is not None:
            flags = self._socket_flags() | getattr(sys.modules["socket"], "MSG_NOSIGNAL", 0)
            if self.shared and sys.platform == "darwin":  # where MSG_DONTWAIT does not keep send() from waiting for room
                buffers = map(self._cut, buffers)
            return map(sock.send, buffers, repeat(flags))
        if self.shared and self.poll_fd == self.fd and not stat.S_ISREG(self._mode):
            buffers = map(self._cut, buffers)
        return map(os.write, repeat(self.poll_fd), buffers)

    def _reopen(self) -> None:
        # The same pipe or terminal as an open file of this process's own, whose O_NONBLOCK nobody else sees.
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:  # stored before a signal is looked at
            for self.poll_fd in map(os.open, (f"/proc/self/fd/{self.fd}",), (flags,)):
                break
        except OSError as exc:  # it is not Linux
            pass_on(exc)

    def _cut(self, buffer: Any) -> memoryview:
        # A pipe or a socket that is writable takes PIPE_BUF bytes without blocking, a terminal just one.
        if not wait_writable(self.fd, 0):
            raise BlockingIOError
        return memoryview(buffer)[: 1 if self._is_terminal else select.PIPE_BUF]

    def abandon(self) -> None:
        # atomic: no calls
        fd = self.poll_fd
        self.poll_fd = -1

        if fd >= 0 and fd != self.fd:
            os.close(fd)
        super().abandon()


class Ends:
    """The ends of the streams of one channel.

    Owns the streams.

    Attributes:
        released: Whether they were released, so that nothing can be read or written any more.
    """

    def __init__(self) -> None:
        self.released: bool = False
        self._ends: list[Any] = []
        # Once released: what is still to be closed, with its descriptor...
        self._objects: list[tuple[Any, int]] = []
        self._numbers: list[int] = []  # ...and what of it is a mere descriptor

    def open(self, kind: Callable[..., Any], *arguments: Any) -> Any:
        """Return a new end, which ``kind`` makes of the arguments."""
        self._ends += starmap(kind, (arguments,))  # stored before a signal is looked at
        return self._ends[-1]

    def find_invalid(self) -> str | None:
        """Return what is wrong with a stream that its owner closed or replaced, or None."""
        for end in self._ends:
            text: str | None = end.find_invalid()
            if text is not None:
                return text
        return None

    def release(self) -> None:
        """Leave the streams as they were found. An interrupted call can be made again."""
        if not self.released:
            valid = [end for end in self._ends if end.find_invalid() is None]
            # For close(). The same stream may be written and read, as an object, as a number, or as both.
            objects = [*{id(end.stream): (end.stream, end.fd) for end in valid if not isinstance(end.stream, int)}.values()]
            numbers = [*{end.fd for end in valid}.difference([fd for _, fd in objects])]
            # atomic: no calls
            self._objects = objects
            self._numbers = numbers
            self.released = True

        for end in reversed(self._ends):  # the first end of a stream knows how it was found
            end.release()
        self._ends = []

    def close(self) -> None:
        """Release the streams and close them. An interrupted call can be made again."""
        self.release()
        close_all(self._numbers)
        objects = self._objects
        while objects:
            # atomic: no calls
            closing = objects[-1:]
            del objects[-1:]  # before: it may fork, or call this again

            try:
                close_stream(closing[0][0])
            except BaseException:  # an interruption
                objects += closing
                raise

    def abandon(self) -> None:
        """Close this process's copies: it is a fork of the owner, whose flags a release would restore."""
        for end in self._ends:
            # To close an object without a descriptor could write to a file that it shares (``gzip.GzipFile``).
            if end.fd >= 0 and end.find_invalid() is None:
                _close_copy(end.stream)
            end.abandon()
        close_all(self._numbers)
        while self._objects:
            stream, fd = self._objects.pop()
            if fd >= 0:
                _close_copy(stream)

    def describe(self) -> str:
        """Return the descriptors, as texts name them."""
        fds = sorted({end.fd for end in self._ends if end.watched})
        return "fd " + "/".join(map(str, fds)) if fds else "stream objects"


def _close_copy(stream: Any) -> None:
    """Close the descriptor of a stream in a forked process: nothing is flushed, or said to the other side."""
    with contextlib.suppress(OSError, ValueError):  # it is closed
        if isinstance(stream, int):
            os.close(stream)
        elif is_socket(stream):
            os.close(stream.detach())  # close() would wait for the files that were made of it
        else:
            _raw(stream).close()


def _raw(stream: Any) -> Any:
    """Return what is below the text layer and the buffer of a file object."""
    inner = getattr(stream, "buffer", None) or getattr(stream, "raw", None)
    return stream if inner is None else _raw(inner)
