"""What users may pass as a stream: how it is opened, and the ends of objects that have no descriptor.

Knows descriptors, sockets, stream objects, and channels over their ends. Must not know frames or messages.
"""

from __future__ import annotations

import io
from functools import partial
from itertools import count

from ..errors import InvalidStreamError
from ..interruptions import pass_on
from .descriptors import READ_SIZE, describe_stream, is_socket, is_tls, unusable
from .ends import End, Ends, ReadEnd, WriteEnd
from .stream_channel import StreamChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Protocol

    from ..protocols import MessageSerializer, Payload

    class HasFileno(Protocol):
        """A file object or a socket."""

        def fileno(self) -> int: ...

    class HasRead(Protocol):
        """A stream without a descriptor; ``read`` does not block, and returns None if nothing is there."""

        def read(self, size: int, /) -> Payload | None: ...

    class HasWrite(Protocol):
        """A stream without a descriptor; ``write`` does not block, and returns how many bytes it took, or None."""

        def write(self, data: bytes, /) -> int | None: ...

    ReadStream = int | HasFileno | HasRead
    WriteStream = int | HasFileno | HasWrite

__all__ = ["open_channel", "open_read_end", "open_write_end", "socket_opener"]

_BUFFERS = (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)  # they pass bytes on as they are

_numbers = count(2)  # the negatives of these stand for ends without a descriptor


def _has_descriptor(stream: Any) -> bool:
    """Return whether a stream is used by its descriptor.

    Otherwise it is an object without a usable ``fileno()``, or one whose bytes are not those of its descriptor
    (``gzip.GzipFile``), and is used by its methods.
    """
    if isinstance(stream, int) or is_socket(stream):
        return True
    try:
        fd = stream.fileno()
    except (AttributeError, NotImplementedError, OSError, ValueError) as exc:  # io.UnsupportedOperation, or it is closed
        pass_on(exc)
        return False
    layer = getattr(stream, "buffer", stream) if isinstance(stream, io.TextIOBase) else stream
    while isinstance(layer, _BUFFERS):
        layer = layer.raw
    if isinstance(layer, io.BufferedIOBase):
        return False
    return isinstance(fd, int) and fd >= 0


def _open(kind: Callable[[Any], Any], kind_without: Callable[[Any], Any], stream: Any) -> Any:
    """Return the end of a stream, of one kind if it has a descriptor, of the other if not."""
    if isinstance(stream, bool):
        raise unusable(stream, "it is a bool")
    if is_tls(stream):
        raise InvalidStreamError("an SSLSocket is written and read in one; pass it to create_socket_session()")
    try:
        for end in map(kind if _has_descriptor(stream) else kind_without, (stream,)):  # stored before a signal is looked at
            return end
    except (InvalidStreamError, MemoryError, OSError):
        raise
    except Exception as exc:  # of somebody's own class
        pass_on(exc)
        raise unusable(stream, repr(exc)) from exc
    raise unusable(stream, "a method of it raised StopIteration")


class ObjectEnd(End):
    """The end of a stream that has no descriptor, but a method that does not block: see ``IpcPeer.create_stream_session``.

    Owns what the method has returned until that is taken. After some bytes there may be ``pending`` ones: it is asked again
    at once, until it returns None.
    """

    watched = False
    shared = False

    def __init__(self, method: str, stream: Any) -> None:
        self.stream = stream
        self.fd: int = -next(_numbers)
        self.reads: Iterator[bytes] = iter(self._read, None)  # which it never returns
        target = getattr(stream, "buffer", None) if isinstance(stream, io.TextIOBase) else stream
        self._name = method
        self._method: Any = getattr(target, method, None)
        self._result: Any = None
        if not callable(self._method):
            raise unusable(stream, f"it has neither a descriptor nor a method {method}() for bytes")
        if self.find_invalid() is not None:
            raise unusable(stream, "it is closed")

    def find_invalid(self) -> str | None:
        return self.taken_away_text() if getattr(self.stream, "closed", False) is True else None

    def release(self) -> None:
        """Do nothing: the stream was not changed."""

    abandon = release

    def _call(self, argument: Any) -> None:
        """Call the method once, unless an interrupted call has left a result."""
        if self._result is None:
            try:
                for self._result in map(self._method, (argument,)):  # stored before a signal is looked at
                    break
                else:
                    raise RuntimeError(f"{self._name}() raised StopIteration")
            except BlockingIOError:
                self.pending = False
                raise
            except Exception as exc:
                pass_on(exc)
                raise self._failed(exc) from exc

    def _read(self) -> bytes:
        self._call(READ_SIZE)
        if self._result is None:
            self.pending = False
            raise BlockingIOError
        if not isinstance(self._result, bytes):
            try:
                self._result = bytes(memoryview(self._result))
            except TypeError as exc:
                pass_on(exc)
                text = f"{describe_stream(self.stream)}.read() returned {self._result!r:.50}; it must return bytes, or None"
                raise self._failed(OSError(text)) from exc
        # atomic: no calls
        data: bytes = self._result
        self._result = None
        self.pending: bool = data != b""
        return data

    def writes(self, buffers: Iterator[Any]) -> Iterator[int]:
        return map(self._write, buffers)

    def _write(self, buffer: Any) -> int:
        piece = bytes(memoryview(buffer)[:READ_SIZE])
        self._call(piece)
        taken = self._result
        if taken is None or (taken == 0 and isinstance(taken, int)):
            self._result = None
            raise BlockingIOError
        if not isinstance(taken, int) or not 0 <= taken <= len(piece):
            self._result = None
            text = f"write() returned {taken!r:.50} for {len(piece)} bytes; it must return how many it took, or None"
            raise self._failed(OSError(text))
        # atomic: no calls
        self._result = None
        return taken

    def _failed(self, exc: Exception) -> OSError:
        """Return what the caller knows how to deal with, for a fault of the stream."""
        self.error: BaseException | None = exc
        return exc if isinstance(exc, OSError) else OSError(f"{describe_stream(self.stream)}: {exc!r}")


open_read_end: Callable[[Any], Any] = partial(_open, ReadEnd, partial(ObjectEnd, "read"))
open_write_end: Callable[[Any], Any] = partial(_open, WriteEnd, partial(ObjectEnd, "write"))


def open_channel(
    write: WriteStream, reads: Sequence[ReadStream], serializer: MessageSerializer, max_frame_size: int
) -> StreamChannel:
    """Open what a user has passed as streams, and return a channel over them.

    Raises:
        InvalidStreamError: A stream cannot be used. All stay open, as they were.
    """
    ends = Ends()
    try:
        inputs = [ends.open(open_read_end, read) for read in reads]
        return StreamChannel(ends, ends.open(open_write_end, write), inputs, serializer, max_frame_size)
    except BaseException:
        ends.release()
        raise


def socket_opener(sock: socket.socket) -> Callable[[MessageSerializer, int], StreamChannel]:
    """Return what makes a channel over a connected socket, also over one with TLS.

    It does not make it itself: before 3.11 a signal handler's exception could come as the channel is returned.
    """
    if not is_tls(sock):
        return partial(open_channel, sock, (sock,))
    from .tls import TlsChannel

    return partial(TlsChannel, sock)
