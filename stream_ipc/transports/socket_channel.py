"""Channels over sockets, TLS or not.

Knows sockets and channels. Must not know sessions or peers.
"""

from __future__ import annotations

import sys

from ..interruptions import pass_on
from .inputs import Input
from .objects import open_channel
from .stream_channel import StreamChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections import deque
    from collections.abc import Iterable
    from typing import Any

    from ..protocols import MessageSerializer
    from .channel import Interest, Received, Teardown

__all__ = ["prepare_socket", "refuse_tls", "socket_channel"]


def refuse_tls(streams: Iterable[Any]) -> None:
    """Raise ``ValueError`` if there is an ``ssl.SSLSocket`` among streams."""
    if any(map(_is_tls, streams)):
        raise ValueError("an SSLSocket is written and read in one; pass it to create_socket_session()")


def _is_tls(stream: Any) -> bool:
    ssl = sys.modules.get("ssl")  # importing it takes long, and whoever has an SSLSocket has imported it
    return ssl is not None and isinstance(stream, ssl.SSLSocket)


def prepare_socket(sock: Any) -> str:
    """Prepare a socket that a user has connected, and return what it is connected to; may be empty.

    Raises:
        TypeError: It is no socket.
        ValueError: It is no stream socket, or not connected.
    """
    import socket

    from .addresses import describe_address
    from .sockets import tune

    if not isinstance(sock, socket.socket):
        raise TypeError(f"create_socket_session() takes a socket, not {sock!r:.100}")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"{sock!r} is no stream socket; messages need SOCK_STREAM")
    try:
        address = sock.getpeername()
    except OSError as exc:
        pass_on(exc)
        raise ValueError(f"{sock!r} cannot be used: {exc}; connect it first") from exc
    tune(sock)
    return f"to {describe_address(address)}" if address else ""


def socket_channel(sock: socket.socket, name: str, serializer: MessageSerializer, max_frame_size: int) -> StreamChannel:
    """Return a channel over a connected socket, and say in a few words, if any, what it is connected to."""
    if _is_tls(sock):
        channel: StreamChannel = TlsChannel(sock, serializer, max_frame_size)
    else:
        channel = open_channel(sock, (sock,), serializer, max_frame_size)
    if name:
        channel.connected(name)
    return channel


class TlsInput(Input):
    """What is read of an ``ssl.SSLSocket``."""

    __slots__ = ()

    def read(self, inbox: deque[Received]) -> None:
        try:
            super().read(inbox)
        finally:
            self.inputs.on_change()  # a direction may have to wait for the other, or no longer


class TlsChannel(StreamChannel):
    """A channel over an ``ssl.SSLSocket``."""

    input_class: type[Input] = TlsInput

    def __init__(self, sock: Any, serializer: MessageSerializer, max_frame_size: int) -> None:
        from .tls import TlsReadEnd, TlsWriteEnd

        reader = self._reader = TlsReadEnd(sock)
        try:
            reader.output = self._writer = TlsWriteEnd(sock)
            super().__init__(self._writer, [reader], serializer, max_frame_size)
            self.connected("TLS")
        except BaseException:
            reader.release()
            raise

    def interest(self) -> Interest:
        reads, write_fd, poll_in, polls_output = super().interest()
        if self._reader.wants_write and self.inputs.by_fd:
            write_fd = self._reader.fd
        elif self._writer.wants_read:
            write_fd = None
        return reads, write_fd, poll_in, polls_output

    def flush(self) -> None:
        if self._reader.wants_write:  # it could not read because it has to write first
            self._reader.wants_write = False
            self._reader.retry = True
        try:
            super().flush()
        finally:
            self.on_change()

    def broken_text(self) -> str:
        cause = None if self.inputs.ended is None else self.inputs.ended.__cause__  # often why it refused
        return super().broken_text() if cause is None else f"{super().broken_text()}; {cause}"

    def before_close(self) -> Teardown | None:
        if self.outbox.error is None:
            self._writer.say_goodbye()
        return super().before_close()
