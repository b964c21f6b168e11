"""Batches: what is sent in a block leaves together.

Knows the loop and the port of one conversation. Must not know how a message is encoded.
"""

from __future__ import annotations

from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from .loop import Loop
    from .port import Port

    S = TypeVar("S")

__all__ = ["Batches"]


class Batches:
    """The batches of one conversation, which may be one inside the other.

    Owns which are under way, and whether the outbox is corked: it is while there are any.
    """

    def __init__(self, loop: Loop, port: Port) -> None:
        self._loop = loop
        self._port = port
        self._outbox = port.channel.outbox
        self._under_way: dict[object, None] = {}

    @property
    def queued_bytes(self) -> int:
        """How many bytes were gathered, or wait for another reason."""
        return self._outbox.queued_bytes

    @contextmanager
    def batch(self, session: S) -> Iterator[S]:
        """Gather what is sent inside, and give the session to the block; see ``Session.batch``."""
        loop = self._loop
        loop.check_entry()
        batch = object()
        loop.chores.cork(self)  # first: a turn uncorks it if an interruption comes next
        self._outbox.cork(True)
        write = self._port.write_or_report  # what the block raises is not to be hidden by what a write does
        try:
            self._under_way[batch] = None
            yield session
            write = self._port.write
        finally:
            self._under_way.pop(batch, None)
            if not loop.forked:
                loop.inside(self._uncork, write)

    def _uncork(self, write: Callable[[], None]) -> None:
        """Write what was gathered, if no batch is under way any more."""
        if not self._under_way:
            self._outbox.cork(False)
            write()
            if not self._under_way:
                self._loop.chores.corked.pop(self, None)  # last: until then the next turn does it again

    def flush(self) -> None:
        """Write what was gathered so far; what goes wrong is reported in turn."""
        if self.queued_bytes:
            self._port.write_or_report()
        if not self._under_way:  # an interruption has come before the end of the last one
            self._outbox.cork(False)
            self._loop.chores.corked.pop(self, None)
