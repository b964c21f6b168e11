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

import os
import select
import socket
import stat
from functools import partial
from itertools import repeat
from typing import Any, Callable, Iterator, List, Optional

from ..errors import InvalidStreamError

__all__ = ["READ_SIZE", "ReadEnd", "WriteEnd", "close_stream", "describe_stream"]

# More makes small round trips slower (256 KiB: 0.39), because the buffer is then mapped and unmapped every time.
READ_SIZE = 64 * 1024
PIPE_BUF = select.PIPE_BUF
_SEND_FLAGS = getattr(socket, "MSG_NOSIGNAL", 0)


def describe_stream(stream: Any) -> str:
    """A few words for an error text."""
    return f"descriptor {stream}" if isinstance(stream, int) else f"{stream!r:.100}"


def close_stream(stream: Any, fd: int) -> None:
    """Close a stream that was released."""
    try:
        if isinstance(stream, int):
            os.close(fd)
        else:
            stream.close()
    except (OSError, ValueError):
        pass  # a file object that cannot flush what its owner left in it, or a descriptor that somebody closed


class _End:
    """A descriptor and whoever owns it."""

    def __init__(self, stream: Any, shared: bool) -> None:
        self.stream = stream
        self.socket: Optional[socket.socket] = None
        self._timeout: Any = None
        try:
            self.fd: int = stream if isinstance(stream, int) else stream.fileno()
            status = os.fstat(self.fd)
        except (AttributeError, OSError, ValueError) as exc:
            raise InvalidStreamError(
                f"{describe_stream(stream)} cannot be used as a stream: {exc}; pass an open file object, socket or"
                " descriptor"
            ) from exc
        self._identity = (status.st_dev, status.st_ino)
        self.mode = status.st_mode
        # Our own descriptors 0 to 2 and terminals are shared with whoever started us.
        self.shared = shared or self.fd <= 2 or (stat.S_ISCHR(self.mode) and os.isatty(self.fd))
        self._restore: Optional[bool] = None
        if isinstance(stream, socket.socket):
            self.socket = stream
            self._timeout = stream.gettimeout()
            stream.setblocking(False)
        elif stat.S_ISSOCK(self.mode):
            # Through a socket object, for the flags of send() and recv(). It is detached again when it is let go.
            self.socket = socket.socket(fileno=self.fd)
            if self.shared:
                self.socket.settimeout(None)
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
            if not isinstance(stream, int):
                # File objects and sockets remember that they were closed; their number may belong to another file now.
                if getattr(stream, "closed", False) or stream.fileno() != self.fd:
                    return f"{describe_stream(stream)} was closed while a session was using it"
                return None
            status = os.fstat(self.fd)
        except (OSError, ValueError) as exc:
            return f"{describe_stream(stream)} was closed while a session was using it: {exc}"
        if (status.st_dev, status.st_ino) != self._identity:
            return f"{describe_stream(stream)} was closed while a session was using it, and its number is another file's now"
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
            self.socket.settimeout(self._timeout)
        self._detach()

    def _detach(self) -> None:
        if self.socket is not None and self.socket is not self.stream:
            self.socket.detach()
        self.socket = None
        self.fd = -1


class ReadEnd(_End):
    """The end that is read.

    Attributes:
        reads: Iterating it once reads once: at most ``READ_SIZE`` bytes, empty at the end of the stream. Raises
            ``BlockingIOError`` if nothing is there.
        ahead: What a buffered file object had read before it came to us.
        ahead: What a buffered file object has read before it came to us.
    """

    def __init__(self, stream: Any, shared: bool = False) -> None:
        super().__init__(stream, shared)
        sock = self.socket
        self.reads: Iterator[bytes]
        if sock is None:
            self.reads = map(os.read, repeat(self.fd), repeat(READ_SIZE))
        else:
            self.reads = map(sock.recv, repeat(READ_SIZE), repeat(socket.MSG_DONTWAIT if self.shared else 0))
        self.ahead = self._read_ahead()

    def reads_into(self, view: memoryview) -> Iterator[int]:
        """As ``reads``, but into a buffer; the items are byte counts."""
        sock = self.socket
        if sock is None:
            return map(os.readv, (self.fd,), ([view],))
        return map(sock.recv_into, (view,), (0,), (socket.MSG_DONTWAIT if self.shared else 0,))

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
        write: Writes some of one buffer and returns how much. Raises ``BlockingIOError`` if it would block.
        writev: The same for a list of buffers.
    """

    write: Callable[[Any], int]
    writev: Callable[[List[Any]], int]

    def __init__(self, stream: Any, shared: bool = False) -> None:
        flush = getattr(stream, "flush", None)
        if flush is not None:
            flush()  # what its owner wrote before comes first
        super().__init__(stream, shared)
        self._own_fd = -1
        sock = self.socket
        if sock is not None:
            flags = _SEND_FLAGS | (socket.MSG_DONTWAIT if self.shared else 0)
            self.write = lambda data: sock.send(data, flags)
            self.writev = lambda buffers: sock.sendmsg(buffers, (), flags)
            return
        fd = self.fd
        if self.shared and not stat.S_ISREG(self.mode):
            fd = self._reopen()
            if fd < 0:
                self.write = self._write_piece
                self.writev = lambda buffers: self._write_piece(buffers[0])
                return
            self._own_fd = fd
        self.write = partial(os.write, fd)
        self.writev = partial(os.writev, fd)

    @property
    def poll_fd(self) -> int:
        """The descriptor to wait for."""
        return self._own_fd if self._own_fd >= 0 else self.fd

    def _reopen(self) -> int:
        # The same pipe as an open file of our own, whose O_NONBLOCK is nobody else's. Linux only, and not everywhere.
        if not stat.S_ISFIFO(self.mode):
            return -1
        try:
            return os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return -1

    def _write_piece(self, data: Any) -> int:
        # A pipe or terminal that is writable takes PIPE_BUF bytes without blocking.
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        if not poller.poll(0):
            raise BlockingIOError
        return os.write(self.fd, memoryview(data)[:PIPE_BUF])

    def release(self) -> None:
        if self._own_fd >= 0:
            fd, self._own_fd = self._own_fd, -1
            os.close(fd)
        super().release()
