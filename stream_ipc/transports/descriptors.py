"""One end of a stream as a descriptor: what a user may pass as a stream, and how to read and write it without blocking.

Knows descriptors, sockets and file objects. Must not know frames or messages.

Descriptors that other processes share (this process's own stdin and stdout, a terminal) keep their flags, because
``O_NONBLOCK`` belongs to the open file and not to the descriptor: they are read only when they are ready, and written
in pieces that cannot block. All others are switched to non-blocking while they are in use here.

A note on ``for x in calls: break``, here and in ``stream.py``: an exception that a signal handler raises (usually
``KeyboardInterrupt``) is raised as soon as a call returns, before its result is stored, so ``x = os.read(...)`` can
lose bytes. A ``for`` statement over an iterator that makes the call stores the result before any signal is looked at
(CPython 3.10 and later; with 3.8 and 3.9 a gap of one instruction remains).
"""

from __future__ import annotations

import io
import math
import os
import select
import stat
import sys
import time
from functools import partial
from itertools import repeat
from types import SimpleNamespace

from ..errors import InvalidStreamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

__all__ = [
    "READ_SIZE",
    "ReadEnd",
    "WriteEnd",
    "close_streams",
    "describe_address",
    "describe_stream",
    "needs_thread",
    "wait_readable",
]

# More makes small round trips slower (256 KiB: 0.39), because the buffer is then mapped and unmapped every time.
READ_SIZE = 64 * 1024
PIPE_BUF: int = getattr(select, "PIPE_BUF", 512)
ONLY_SOCKETS_ARE_POLLED = sys.platform == "win32"
_BUFFERS = (io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.BufferedRWPair)  # they pass bytes on as they are
_PTY_MASTER = os.makedev(5, 2) if sys.platform.startswith("linux") else -1


def _dont_wait(shared: bool) -> int:
    # For a socket whose flags are not ours to change.
    flag: int = sys.modules["socket"].MSG_DONTWAIT if shared else 0
    return flag


def needs_thread(stream: Any) -> bool:
    """Whether a stream is one that cannot be waited for, so that a thread has to; see ``threads.py``.

    That is an object without a usable ``fileno()`` that has ``read`` or ``write``, also one whose bytes are not those of
    its descriptor (``gzip.GzipFile``), and on a platform that can wait for sockets only, whatever is no socket.
    """
    sockets: Any = sys.modules.get("socket")
    if sockets is not None and isinstance(stream, sockets.socket):
        return False
    if isinstance(stream, int):
        return ONLY_SOCKETS_ARE_POLLED
    if not any(callable(getattr(stream, name, None)) for name in ("read1", "read", "write")):
        return False
    try:
        fd = stream.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return True
    except (OSError, ValueError):  # a closed file object has none any more
        return getattr(stream, "closed", False) is not True
    buffered = getattr(stream, "buffer", stream) if isinstance(stream, io.TextIOBase) else stream
    if isinstance(buffered, io.BufferedIOBase) and not isinstance(buffered, _BUFFERS):
        return True
    return ONLY_SOCKETS_ARE_POLLED or not isinstance(fd, int) or fd < 0


def wait_readable(fds: Sequence[int], seconds: float) -> bool:
    """Block until one of some descriptors is readable, hung up or broken, or the time is over."""
    if hasattr(select, "poll"):
        poller = select.poll()
        for fd in fds:
            poller.register(fd, select.POLLIN)
        return bool(poller.poll(math.ceil(seconds * 1000)))
    if fds:
        return bool(select.select(fds, [], [], seconds)[0])
    time.sleep(seconds)  # Windows does not wait for nothing
    return False


def describe_stream(stream: Any) -> str:
    """A few words for an error text."""
    return f"descriptor {stream}" if isinstance(stream, int) else f"{stream!r:.100}"


def describe_address(address: Any) -> str:
    """The same for the address of a socket: ``127.0.0.1:80``, ``[::1]:80``, or the path of a Unix socket in quotes."""
    if not isinstance(address, tuple):
        return repr(address)
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def close_streams(streams: List[Tuple[Any, int]]) -> None:
    """Close streams that were released, and take each out of the list. Interrupted, it can be called again."""
    while streams:
        stream, fd = streams[-1]
        raw = isinstance(stream, int)
        try:
            if raw:
                # In one breath: a number that was closed may be another file's the next moment.
                del streams[-1]
                os.close(fd)
            else:
                stream.close()
        except Exception:
            pass  # it cannot flush what its owner left in it, somebody has closed it, or it has no close()
        if not raw:
            del streams[-1]


class _End:
    """A descriptor and whoever owns it.

    Attributes:
        pump: The thread that stands between the stream and the descriptor, if there is one.
        alarm_fd: A descriptor that is readable when writing has failed though nobody has tried; -1 if there is none.
        lag: For how many seconds what was written to the stream may not be readable here yet.
    """

    useless: int = -1  # how a descriptor is opened that is of no use here
    pump: Any = None
    alarm_fd: int = -1
    lag: float = 0.0

    @property
    def error(self) -> Optional[BaseException]:
        """Why the stream ended, if the descriptor does not tell."""
        return None

    def start(self) -> None:
        """Begin: all ends could be opened."""

    def __init__(self, stream: Any, shared: bool) -> None:
        self.stream = stream
        self.socket: Any = None
        self._timeout: Any = None
        try:
            self.fd: int = stream if isinstance(stream, int) else stream.fileno()
            status = _status(stream, self.fd)
        except (AttributeError, OSError, TypeError, ValueError) as exc:
            raise InvalidStreamError(
                f"{describe_stream(stream)} cannot be used as a stream: {exc}; pass an open file object, socket or"
                " descriptor"
            ) from exc
        if _access(self.fd) == self.useless:
            what, needed = ("written", "read") if self.useless == os.O_WRONLY else ("read", "written")
            raise InvalidStreamError(f"{describe_stream(stream)} can only be {what}, and here it is to be {needed}")
        self._identity = (status.st_dev, status.st_ino)
        self.mode: int = status.st_mode
        self.is_terminal: bool = stat.S_ISCHR(self.mode) and os.isatty(self.fd)
        # Our own descriptors 0 to 2 and terminals are shared with whoever started us; not so the other end of a
        # pseudo-terminal, which whoever made it has for himself.
        self.is_pty_master: bool = self.is_terminal and status.st_rdev == _PTY_MASTER
        self.shared: bool = shared or self.fd <= 2 or (self.is_terminal and not self.is_pty_master)
        self._restore: Optional[bool] = None
        # Importing it takes 3 ms, and whoever has a socket object has imported it.
        sockets: Any = sys.modules.get("socket")
        if sockets is not None and isinstance(stream, sockets.socket):
            self.socket = stream
            self._timeout = stream.gettimeout()
            stream.setblocking(False)
        elif stat.S_ISSOCK(self.mode):
            # Through a socket object, for the flags of send() and recv(). It is detached again when it is let go.
            import socket

            blocking = os.get_blocking(self.fd)
            self.socket = socket.socket(fileno=self.fd)
            if self.shared:
                if self.socket.gettimeout() is not None:  # socket.setdefaulttimeout() was used, and has set the flag
                    self.socket.settimeout(None)
                if os.get_blocking(self.fd) != blocking:
                    os.set_blocking(self.fd, blocking)
            else:
                self._set_nonblocking()
                self.socket.settimeout(0)
        elif not self.shared and not stat.S_ISREG(self.mode):
            self._set_nonblocking()

    def _set_nonblocking(self) -> None:
        self._restore = os.get_blocking(self.fd)
        os.set_blocking(self.fd, False)

    def find_invalid(self) -> Optional[str]:
        """What is wrong if the owner closed the stream meanwhile, or None."""
        stream = self.stream
        try:
            # File objects and sockets remember that they were closed; their number may belong to another file now.
            if not isinstance(stream, int) and (getattr(stream, "closed", False) or stream.fileno() != self.fd):
                return f"{describe_stream(stream)} was closed while a session was using it; close the session instead"
            status = _status(stream, self.fd)
        except (OSError, ValueError) as exc:
            return f"{describe_stream(stream)} was closed while a session was using it ({exc}); close the session instead"
        if (status.st_dev, status.st_ino) != self._identity:
            text = f"{describe_stream(stream)} was closed while a session was using it"
            return f"{text}, and its number is another file's now; close the session instead"
        return None

    def release(self) -> None:
        """Leave the stream as it was found."""
        if self.find_invalid() is not None:
            self._detach()
            return
        if self._restore is not None:
            try:
                os.set_blocking(self.fd, self._restore)
            except OSError:
                pass
        if self.socket is not None and self.socket is self.stream:
            try:
                self.socket.settimeout(self._timeout)
            except OSError:
                pass
        self._detach()

    def _detach(self) -> None:
        if self.socket is not None and self.socket is not self.stream:
            self.socket.detach()
        self.socket = None
        self.fd = -1


def _access(fd: int) -> int:
    try:
        import fcntl

        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except (ImportError, OSError):  # Windows
        return os.O_RDWR


def _status(stream: Any, fd: int) -> Any:
    try:
        return os.fstat(fd)
    except OSError:
        if not ONLY_SOCKETS_ARE_POLLED or isinstance(stream, int) or fd < 0:
            raise
        # A socket's number is no descriptor there.
        return SimpleNamespace(st_dev=0, st_ino=fd, st_mode=stat.S_IFSOCK, st_rdev=0)


class ReadEnd(_End):
    """The end that is read.

    Attributes:
        reads: Iterating it once reads once: at most ``READ_SIZE`` bytes, empty at the end of the stream. Raises
            ``BlockingIOError`` if nothing is there.
        ahead: What a buffered file object has read before it came to us.
    """

    useless: int = os.O_WRONLY

    def __init__(self, stream: Any, shared: bool = False) -> None:
        super().__init__(stream, shared)
        sock = self.socket
        self.reads: Iterator[bytes]
        if sock is None:
            self.reads = map(os.read, repeat(self.fd), repeat(READ_SIZE))
        else:
            self.reads = map(sock.recv, repeat(READ_SIZE), repeat(_dont_wait(self.shared)))
        try:
            self.ahead: bytes = self._read_ahead()
        except Exception as exc:  # of somebody's own class
            self.release()
            raise InvalidStreamError(f"{describe_stream(stream)} cannot be used as a stream: {exc!r}") from exc

    def reads_into(self, view: memoryview) -> Iterator[int]:
        """As ``reads``, but into a buffer; the items are byte counts."""
        sock = self.socket
        if sock is None:
            return map(os.readv, (self.fd,), ([view],))
        return map(sock.recv_into, (view,), (0,), (_dont_wait(self.shared),))

    def _read_ahead(self) -> bytes:
        buffered = getattr(self.stream, "buffer", self.stream)  # under a text layer
        peek = getattr(buffered, "peek", None)
        if peek is None or self.shared:  # a blocking descriptor: peek() would wait
            return b""
        try:
            return bytes(buffered.read1(len(peek())) or b"")
        except (OSError, ValueError):
            return b""


class WriteEnd(_End):
    """The end that is written.

    Attributes:
        writes: Takes a sequence of one buffer; iterating the result once writes some of it, and the item is how much.
            Raises ``BlockingIOError`` if it would block.
        writes_many: The same for a list of buffers, of which one call writes some.
    """

    useless: int = os.O_RDONLY

    writes: Callable[[Sequence[Any]], Iterator[int]]
    writes_many: Callable[[List[Any]], Iterator[int]]

    def __init__(self, stream: Any, shared: bool = False) -> None:
        flush = getattr(stream, "flush", None)
        if flush is not None:
            try:
                flush()  # what its owner wrote before comes first
            except (OSError, ValueError) as exc:
                raise InvalidStreamError(f"{describe_stream(stream)} cannot be used as a stream: {exc}") from exc
        super().__init__(stream, shared)
        self._own_fd = -1
        sock = self.socket
        if sock is not None:
            flags = _dont_wait(self.shared) | getattr(sys.modules["socket"], "MSG_NOSIGNAL", 0)
            self.writes = lambda buffers: map(sock.send, buffers, (flags,))
            if hasattr(sock, "sendmsg"):
                self.writes_many = lambda buffers: map(sock.sendmsg, (buffers,), ((),), (flags,))
            else:
                self.writes_many = lambda buffers: map(sock.send, buffers[:1], (flags,))
            return
        fd = self.fd
        if self.shared and not stat.S_ISREG(self.mode):
            fd = self._reopen()
            if fd < 0:
                self.writes = self.writes_many = self._writes_piece
                return
            self._own_fd = fd
        self.writes = partial(map, os.write, (fd,))
        self.writes_many = lambda buffers: map(os.writev, (fd,), (buffers,))

    @property
    def poll_fd(self) -> int:
        """The descriptor to wait for."""
        return self._own_fd if self._own_fd >= 0 else self.fd

    def _reopen(self) -> int:
        # The same pipe or terminal as an open file of our own, whose O_NONBLOCK is nobody else's. Not everywhere.
        if not stat.S_ISFIFO(self.mode) and (not self.is_terminal or self.is_pty_master):
            return -1
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            return os.open(f"/proc/self/fd/{self.fd}", flags)
        except OSError:
            pass
        try:
            return os.open(os.ttyname(self.fd), flags)  # not for a pipe
        except OSError:
            return -1

    def _writes_piece(self, buffers: Sequence[Any]) -> Iterator[int]:
        # A pipe that is writable takes PIPE_BUF bytes without blocking, a terminal just one.
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        if not poller.poll(0):
            raise BlockingIOError
        return map(os.write, (self.fd,), (memoryview(buffers[0])[: 1 if self.is_terminal else PIPE_BUF],))

    def close_own(self) -> None:
        """Close the descriptor that was made here, if any."""
        if self._own_fd >= 0:
            fd, self._own_fd = self._own_fd, -1
            os.close(fd)

    def release(self) -> None:
        self.close_own()
        super().release()
