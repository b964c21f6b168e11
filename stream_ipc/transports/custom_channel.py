"""``CustomChannel``: messages over a transport of somebody's own.

Knows messages, and what ``MessageTransport`` promises. Must not know sessions; what the transport raises is the core's.
"""

from __future__ import annotations

import math
from itertools import starmap

from ..errors import StreamClosedError, check_plugin
from ..interruptions import pass_on
from ..messages import put_in_envelope
from .channel import DRAIN_READS, POLL_INTERVAL, Channel, Inputs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from typing import Any

    from ..messages import Message
    from .channel import Interest, Queue, Received, Teardown

__all__ = ["CustomChannel"]


class CustomInputs(Inputs):
    """Reads a ``MessageTransport``, or what has its methods."""

    def __init__(self, transport: Any) -> None:
        super().__init__()
        self.received_bytes: int = 0  # declared in each class that stores it, as pyright asks for
        self.closed: bool = False  # then nothing is asked of it any more
        self._transport = transport

    def read(self, inbox: deque[Received]) -> None:
        before = len(inbox)
        try:
            for messages in starmap(self._transport.receive, [()]):  # stored before a signal is looked at
                inbox += messages
                break
            else:
                raise RuntimeError(f"{type(self._transport).__name__}.receive() raised StopIteration")
        except StreamClosedError as exc:
            pass_on(exc)
            self.put_end(inbox, exc)
        except TypeError as exc:
            pass_on(exc)
            if not str(exc).endswith("is not iterable") or exc.__traceback__.tb_next is not None:  # type: ignore[union-attr]
                raise  # it is receive()'s own
            raise TypeError(f"{type(self._transport).__name__}.receive() must return a list of Messages: {exc}") from exc
        self.received_bytes += max(0, len(inbox) - before)  # a message counts as a byte; receive() may turn

    def drain(self, inbox: deque[Received]) -> None:
        for _ in range(DRAIN_READS):
            before = len(inbox)
            self.read(inbox)
            if self.ended is not None or self.closed or len(inbox) == before:
                break


class CustomChannel(Channel):
    """A channel over a ``MessageTransport``, or over any object with its abstract methods; ``TypeError`` for another."""

    volatile = True
    writing: bool = False
    corked: bool = False

    def __init__(self, transport: Any) -> None:
        methods = ("send", "receive", "read_fds", "close")
        check_plugin("transport", transport, *methods, advice=", as a class derived from MessageTransport has")
        self.transport: Any = transport
        self.outbox: Queue = self
        self.inputs: CustomInputs = CustomInputs(transport)
        self.is_broken: bool = False

    def _asked(self, name: str) -> Any:
        # A property in MessageTransport; a method in somebody's own class is as good.
        value = getattr(self.transport, name, None)
        return value() if callable(value) else value

    def encode(self, kind: int, id: Any, message: Message) -> list[Message]:
        return [put_in_envelope(kind, id, message)]

    def put(self, frame: list[Message]) -> None:
        if self.inputs.closed:  # by a method of its own that was asked how much is queued
            raise StreamClosedError(f"this side closed the session ({self.describe()})")
        try:
            # What a send() that was interrupted has done is not known, so its reply may be sent twice.
            for _ in map(self.transport.send, frame):  # emptied before a signal is looked at
                del frame[:]
                break
            else:
                raise RuntimeError(f"{type(self.transport).__name__}.send() raised StopIteration")
        except StreamClosedError as exc:
            pass_on(exc)
            raise

    def interest(self) -> Interest:
        has_ended = self.inputs.ended is not None
        reads = () if has_ended else self.transport.read_fds()
        if not hasattr(reads, "__iter__") and not hasattr(reads, "__getitem__"):
            name = type(self.transport).__name__
            raise TypeError(f"{name}.read_fds() must return a list of descriptors, not {reads!r:.100}")
        reads = tuple(reads)
        wants_write = bool(not self.is_broken and self._asked("wants_write"))
        write_fd = self._asked("write_fd") if wants_write else None
        for fd in (*reads, -1 if write_fd is None else write_fd):
            if not isinstance(fd, int):
                name = type(self.transport).__name__
                raise TypeError(f"{name}.read_fds and write_fd are to return descriptors, which are ints, not {fd!r:.100}")
        polls_output = wants_write and write_fd is None
        polls = polls_output or not (reads or has_ended)
        return reads, write_fd, POLL_INTERVAL if polls else math.inf, polls_output

    def flush(self) -> None:
        flush = getattr(self.transport, "flush", None)
        if flush is not None:
            try:
                flush()
            except StreamClosedError as exc:
                pass_on(exc)
                raise

    @property
    def queued_bytes(self) -> int:
        if self.is_broken:
            return 0
        try:
            queued = self._asked("queued_bytes") if self._asked("wants_write") else 0
        except Exception as exc:
            pass_on(exc)
            return 0  # the port learns of it when it asks what to watch
        return queued if isinstance(queued, int) else 1  # something, of unknown size

    def cork(self, corked: bool) -> None:
        """Do nothing: it is for the transport to gather what is sent."""

    def drop_output(self) -> None:
        self.is_broken = True

    def close(self) -> Teardown | None:
        if not self.inputs.closed:
            self.inputs.closed = True
            self.transport.close()
        return None
