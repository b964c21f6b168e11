"""TLS: the way to an ``ssl.SSLSocket``, both of its ends, and the channel over them.

Knows ``ssl`` and channels. Must not know sessions or peers. Imported only where TLS is used.

Either direction of TLS may have to wait for the other: a read for room to write an answer of the protocol itself, a
write for something to read. And each call that moves bytes is made with signals held back; see ``Shield``.

OpenSSL cannot answer a message of the protocol itself (an update of keys, a certificate that is asked for after the
handshake) while a write is unfinished because the stream is full: the session ends with "bad length" then. Neither
Python nor PHP sends such messages unless a program asks for it.
"""

from __future__ import annotations

import select
import socket
import ssl

from ..interruptions import Shield, pass_on
from .ends import End, Ends
from .inputs import Input
from .sockets import tune
from .stream_channel import StreamChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterator
    from typing import Any

    from ..protocols import MessageSerializer
    from .channel import Interest, Received, Teardown

__all__ = ["TlsChannel", "check_context", "handshake", "wrap"]

_RECORD = 16 * 1024  # what one call of OpenSSL reads at most
_READ = 4 * _RECORD  # bytes of one read
_WRITE = 64 * 1024  # bytes of one write


def check_context(context: Any, server_side: bool) -> None:
    """Raise ``TypeError`` for what is no context for TLS, and ``ValueError`` for one of the other side."""
    if not isinstance(context, ssl.SSLContext):
        raise TypeError(f"ssl_context must be an ssl.SSLContext, not {context!r:.100}")
    if context.protocol == (ssl.PROTOCOL_TLS_CLIENT if server_side else ssl.PROTOCOL_TLS_SERVER):
        wanted, given = ("SERVER", "CLIENT") if server_side else ("CLIENT", "SERVER")
        raise ValueError(f"ssl_context is a PROTOCOL_TLS_{given} one; this side needs PROTOCOL_TLS_{wanted}")


def wrap(context: ssl.SSLContext, sock: socket.socket, server_side: bool, name: str | None = None) -> ssl.SSLSocket:
    """Put TLS around a connected socket, which it then owns; the handshake is still to be made."""
    if isinstance(name, str):
        name.encode("idna")  # ssl does so, but not before the socket is its own, and then nobody would close it
    tune(sock)  # as a channel does; a handshake comes before that
    options: dict[str, Any] = {"do_handshake_on_connect": False, "suppress_ragged_eofs": False}
    return context.wrap_socket(sock, server_side, server_hostname=name, **options)


def handshake(sock: ssl.SSLSocket) -> int:
    """Go on with the handshake as far as it goes.

    Returns what to wait for before the next step, as ``poll`` counts it; 0 if it is done.
    """
    try:
        with Shield():
            sock.do_handshake()
    except ssl.SSLWantReadError:
        return select.POLLIN
    except ssl.SSLWantWriteError:
        return select.POLLOUT
    return 0


class _End(End):
    """The end of an ``ssl.SSLSocket``, for both ways; its handshake is made by the first read or write."""

    wants_write: bool = False  # reading has to wait until the descriptor is writable
    holds_up_writing: bool = False  # writing has to wait until something was read
    _suppress: bool | None = None  # what it was told before about an end without a word

    def open(self) -> None:
        self.poll_fd: int = self.fd
        self.reads: Iterator[bytes] = iter(self._read, None)  # which it never returns
        # Set once what a read had to wait for has happened; and at first, because a read begins the handshake.
        self.retry: bool = self.stream.version() is None
        self._parts: list[bytes] = []  # what was read
        self._ended = False
        # What is being written, and how much of it was: OpenSSL wants a write that was refused to be tried again with
        # the same bytes, and a result may not have been taken when an interruption came.
        self._piece: Any = None
        self._taken: int | None = None
        self._suppress = self.stream.suppress_ragged_eofs
        self.stream.suppress_ragged_eofs = False

    def _read(self) -> bytes:
        """Read some records, the end included."""
        parts = self._parts
        self.retry = self.holds_up_writing = False
        while not self._ended and sum(map(len, parts)) < _READ:
            try:
                with Shield():
                    data = self.socket.recv(_RECORD)
                    parts.append(data)
                    self._ended = not data
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
                self.wants_write = isinstance(exc, ssl.SSLWantWriteError)
                if not parts:
                    raise BlockingIOError from None
                break
            except OSError as exc:
                pass_on(exc)
                if not parts:
                    raise _read_error(exc, self.socket) from exc
                break  # the next read meets it again
            if len(data) < _RECORD:  # what is more is still with the system, and the poller tells
                break
        whole = b"".join(parts)
        # atomic: no calls
        parts[:] = ()
        return whole

    @property
    def pending(self) -> bool:  # type: ignore[override]
        if self.retry or self._parts:
            return True
        return self.socket is not None and not self._ended and self.socket.pending() > 0

    def writes(self, buffers: Iterator[Any]) -> Iterator[int]:
        return map(self._write, buffers)

    def _write(self, buffer: Any) -> Any:
        if self._taken is None:
            if self._piece is None:
                self._piece = memoryview(buffer)[:_WRITE]
            try:
                with Shield():
                    self._taken = self.socket.send(self._piece) if self._piece else 0
                    self._piece = None
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
                self.holds_up_writing = isinstance(exc, ssl.SSLWantReadError)
                raise BlockingIOError from exc
        # atomic: no calls
        taken = self._taken
        self._taken = None
        return taken

    def say_goodbye(self) -> None:
        """Tell the other side that nothing follows, unless half a record was written. May be called again."""
        if self._piece is None and self.find_invalid() is None:
            try:
                with Shield():
                    self.socket.unwrap()
            except (OSError, ValueError) as exc:  # it was sent; the answer is not waited for
                pass_on(exc)

    def release(self) -> None:
        if self._suppress is not None and self.stream.fileno() >= 0:
            self.stream.suppress_ragged_eofs = self._suppress
        super().release()


def _read_error(exc: OSError, sock: Any) -> OSError:
    """Return the error for what a read has raised."""
    ended = isinstance(exc, ssl.SSLEOFError) or getattr(exc, "reason", None) == "UNEXPECTED_EOF_WHILE_READING"
    if isinstance(exc, BrokenPipeError):
        # OpenSSL 3.6 answers such an end with an alert, and tells that this could not be written.
        try:
            ended = not socket.socket.recv(sock, 1, socket.MSG_PEEK)  # beneath TLS
        except OSError as other:
            pass_on(other)
    if ended:
        return ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the other side ended it without saying so (no TLS close_notify)")
    return exc


class _Input(Input):
    """What is read of an ``ssl.SSLSocket``."""

    def read(self, inbox: deque[Received]) -> None:
        try:
            super().read(inbox)
        finally:
            self.inputs.on_change()  # a direction may have to wait for the other, or no longer


class TlsChannel(StreamChannel):
    """A channel over an ``ssl.SSLSocket``."""

    input_class: type[Input] = _Input

    def __init__(self, sock: Any, serializer: MessageSerializer, max_frame_size: int) -> None:
        ends = Ends()
        try:
            self._end = ends.open(_End, sock)
            super().__init__(ends, self._end, [self._end], serializer, max_frame_size)
            self.prefix_name("TLS")
        except BaseException:
            ends.release()
            raise

    def interest(self) -> Interest:
        reads, write_fd, poll_in, polls_output = super().interest()
        if self._end.wants_write and self.inputs.by_fd:
            write_fd = self._end.fd
        elif self._end.holds_up_writing:
            write_fd = None
        return reads, write_fd, poll_in, polls_output

    def flush(self) -> None:
        if self._end.wants_write:  # it could not read because it has to write first
            self._end.wants_write = False
            self._end.retry = True
        try:
            super().flush()
        finally:
            self.on_change()

    def broken_text(self) -> str:
        cause = None if self.inputs.ended is None else self.inputs.ended.__cause__  # often why it refused
        return super().broken_text() if cause is None else f"{super().broken_text()}; {cause}"

    def before_close(self) -> Teardown | None:
        if self.outbox.error is None:
            self._end.say_goodbye()
        return super().before_close()
