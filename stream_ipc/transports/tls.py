"""TLS: a stream transport over an ``ssl.SSLSocket``, and the way to one.

Knows ``ssl``. Must not know sessions or peers. Imported only where TLS is used.

Either direction of TLS may have to wait for the other: a read for room to write an answer of the protocol itself, a
write for something to read. And each call that moves bytes is made with signals held back; see ``sockets.Shield``.

OpenSSL cannot answer a message of the protocol itself (an update of keys, a certificate that is asked for after the
handshake) while a write is unfinished because the stream is full: the session ends with "bad length" then. Neither
Python nor PHP sends such messages unless a program asks for it.
"""

from __future__ import annotations

import select
import socket
import ssl
import sys
from itertools import starmap
from typing import TYPE_CHECKING, Any, Deque, Iterator, List, NoReturn, Optional, Sequence

from ..errors import StreamClosedError
from .sockets import Shield
from .stream import StreamTransport

if TYPE_CHECKING:
    from ..protocols import MessageSerializer
    from ..wire.codec import Received

__all__ = ["TlsTransport", "handshake", "wrap"]

_RECORD = 16 * 1024  # what one read returns at most
_READ = 4 * _RECORD  # bytes of one turn
_WRITE = 64 * 1024  # bytes of one write

# Before Python 3.10, contexts ask OpenSSL 3 to take every end for a clean one.
_IGNORE_EOF = 0x80 if sys.version_info < (3, 10) and ssl.OPENSSL_VERSION_INFO >= (3,) else 0


def wrap(
    context: ssl.SSLContext, sock: socket.socket, server_side: bool, server_hostname: Optional[str] = None
) -> ssl.SSLSocket:
    """Put TLS around a connected socket, which it then owns. The handshake is still to be made.

    Raises:
        OSError: It is connected no longer.
        ValueError: The context wants to know the name of the server.
    """
    options = context.options
    try:
        if options & _IGNORE_EOF:
            context.options = ssl.Options(options & ~_IGNORE_EOF)
        return context.wrap_socket(
            sock,
            server_side,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
            server_hostname=server_hostname,
        )
    finally:
        if options & _IGNORE_EOF:
            context.options = options


def handshake(sock: ssl.SSLSocket) -> int:
    """Go on with the handshake as far as it goes.

    Returns:
        What to wait for before the next step, as ``poll`` counts it; 0 if it is done.

    Raises:
        OSError: It has failed; mostly an ``ssl.SSLError``.
    """
    try:
        with Shield():
            sock.do_handshake()
    except ssl.SSLWantReadError:
        return select.POLLIN
    except ssl.SSLWantWriteError:
        return select.POLLOUT
    return 0


class TlsTransport(StreamTransport):
    """Messages over an ``ssl.SSLSocket``.

    Args:
        sock: Connected; its handshake is made by the first read or write, if it was not made yet.
        serializer: As in ``StreamTransport``.
        max_frame_size: As in ``StreamTransport``.

    Attributes:
        socket: The socket, to be asked for ``getpeercert()`` and the like.
    """

    def __init__(self, sock: Any, serializer: MessageSerializer, max_frame_size: int) -> None:
        self.socket: ssl.SSLSocket = sock
        self._sock = sock
        self._suppress = sock.suppress_ragged_eofs
        # What is being written, and how much of it was: OpenSSL wants a write that was refused to be tried again with
        # the same bytes, and a result may not have been taken when an interruption came.
        self._piece: Any = None
        self._taken: List[int] = []
        self._read_wants_write = False
        self._write_wants_read = False
        self._broken_error: Optional[StreamClosedError] = None
        super().__init__(sock, (sock,), serializer, max_frame_size)
        self._name = f"TLS {self.describe()}"
        sock.suppress_ragged_eofs = False
        self._writes = self._output.writes = self._output.writes_many = self._write
        if sock.pending():  # its owner has read a part of what had come
            self._ahead = True

    # -- sending

    def _write(self, buffers: Sequence[Any]) -> Iterator[int]:
        taken = self._taken
        if not taken:
            if self._piece is None:
                self._piece = _cut(buffers)
            try:
                with Shield():
                    taken.append(self.socket.send(self._piece) if self._piece else 0)
                    self._piece = None
            except ssl.SSLWantWriteError as exc:
                raise BlockingIOError from exc
            except ssl.SSLWantReadError as exc:
                self._write_wants_read = True
                self.changed()
                raise BlockingIOError from exc
        return starmap(taken.pop, [()])

    @property
    def wants_write(self) -> bool:
        """Whether something is to be written that the stream did not take, be it TLS's own."""
        return self._blocked or self._read_wants_write

    @property
    def write_fd(self) -> Optional[int]:
        """The descriptor to wait for while something is queued or TLS itself has to write, otherwise None."""
        if self._read_wants_write or (self._blocked and not self._write_wants_read):
            return self._output.poll_fd
        return None

    def flush(self) -> None:
        if self._read_wants_write:
            self._read_wants_write = False
            self._look_again()
        super().flush()

    def _raise_broken(self) -> NoReturn:
        self._broken_error = StreamClosedError(self._broken_text())
        raise self._broken_error from self._broken

    def drain(self, inbox: Deque[Received]) -> None:
        super().drain(inbox)
        if self._broken_error is not None and self._error is not None:
            # What the other side has said last, often why it refused, is known only now.
            self._broken_error.args = (f"{self._broken_error}; {self._error}",)
            self._broken_error = None

    # -- receiving

    def receive_into(self, inbox: Deque[Received], fd: int) -> None:
        source = self._inputs.get(fd)
        if source is None:
            self._receive_other(inbox, fd)
            return
        total = 0
        while source.data is not None or self._read(inbox, source):
            size = len(source.data or b"")
            super().receive_into(inbox, fd)
            total += size
            if size < _RECORD or total >= _READ:  # what is more is still in the kernel, and the poller will tell
                break
        if self.socket.pending():
            self._look_again()

    def _read(self, inbox: Deque[Received], source: Any) -> bool:
        """Read once; returns whether there was anything, be it the end."""
        try:
            with Shield():
                source.data = self.socket.recv(_RECORD)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLWantWriteError:
            self._read_wants_write = True
            self.changed()
            return False
        except (OSError, ValueError) as exc:
            if isinstance(exc, ssl.SSLEOFError) or getattr(exc, "reason", None) == "UNEXPECTED_EOF_WHILE_READING":
                text = "the other side ended it without saying so (no TLS close_notify)"
                exc = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, text)
            self._input_failed(inbox, source, exc)
            return False
        finally:
            if self._write_wants_read:
                self._write_wants_read = False
                self.changed()
        return True

    def _receive_other(self, inbox: Deque[Received], fd: int) -> None:
        if self._ahead:
            self._ahead = False
            self.changed()
            for fd in tuple(self._inputs):
                self.receive_into(inbox, fd)
        if not self._framed:
            self._ended(inbox)

    def _look_again(self) -> None:
        """Something can be read though the descriptor may not become ready."""
        self._ahead = True
        self.changed()

    # -- ending

    def _let_go(self, how: str) -> None:
        if how == "close":
            self._say_goodbye()
        elif self.socket.fileno() >= 0:
            self._sock.suppress_ragged_eofs = self._suppress
        super()._let_go(how)

    def _say_goodbye(self) -> None:
        # Not behind half a record. Interrupted, it is done again, which does no harm.
        if self._piece is None and self.find_invalid() is None:
            try:
                self.socket.unwrap()
            except (OSError, ValueError):
                pass  # it has been sent; the answer is not waited for
            self._linger()


def _cut(buffers: Sequence[Any]) -> Any:
    """What to write of some buffers: the beginning of the first, or small ones joined."""
    if len(buffers) == 1 or len(buffers[0]) >= _WRITE:
        return memoryview(buffers[0])[:_WRITE]
    parts = []
    left = _WRITE
    for buffer in buffers:
        parts.append(memoryview(buffer)[:left])
        left -= len(parts[-1])
        if not left:
            break
    return b"".join(parts)
