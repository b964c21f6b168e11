"""Chores: what a turn has to do that no descriptor and no time of the clock tells of; and an inspection, now and then.

Knows batches, ports, teardowns, and what is open, by what a turn asks of them. Must not know messages.
"""

from __future__ import annotations

import math

from .teardowns import TEARDOWN_INTERVAL, Teardowns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..transports.channel import Teardown
    from .loop import Loop
    from .port import Port
    from .roles import Polled
    from .sending import Batches

__all__ = ["Chores", "Inspection"]

CHECK_INTERVAL = 0.5  # seconds between two inspections
_CHECKED_AT_ONCE = 16  # conversations in one, so that it costs the same with one or a thousand


class Chores:
    """The chores of one loop.

    Owns what is polled, and which ports are asked in each turn what they want to be watched for.

    Attributes:
        are_due: Whether a turn has any; otherwise it need not look.
        corked: Batches that gather what is sent until the next turn.
        teardowns: What is left to be done after something was closed.
    """

    def __init__(self) -> None:
        self.are_due: bool = True
        self.corked: dict[Batches, None] = {}
        self.teardowns: Teardowns = Teardowns()
        self._polled: dict[Polled, float] = {}  # and how often
        self._volatile: dict[Port, None] = {}

    def set_polled(self, task: Polled, interval: float) -> None:
        """Have ``task.poll()`` called in every turn, and so often (in seconds) while waiting; infinity for not at all."""
        if interval == math.inf:
            self._polled.pop(task, None)
        else:
            self._polled[task] = interval
            self.are_due = True

    def add(self, port: Port) -> None:
        """Take in a port, which is asked in each turn if its channel does not tell of changes."""
        if port.channel.volatile:
            self._volatile[port] = None
            self.are_due = True

    def remove(self, port: Port) -> None:
        """Ask a port no more."""
        self._volatile.pop(port, None)

    def cork(self, batches: Batches) -> None:
        """Have what is gathered written when a turn begins."""
        self.corked[batches] = None
        self.are_due = True

    def add_teardown(self, teardown: Teardown) -> None:
        """Take in what is left to be done after something was closed: turns do it, step by step."""
        self.teardowns.add(teardown)
        self.are_due = True

    def prepare(self) -> None:
        """Do what comes before a wait: write what was gathered, and find out what is to be waited for."""
        for batches in [*self.corked]:
            batches.flush()
        self.ask_ports()

    def ask_ports(self) -> None:
        """Call ``ask_again`` of the ports whose channels do not report their changes."""
        for port in [*self._volatile]:
            port.ask_again()

    def due_in(self) -> float:
        """Return in how many seconds the next is due; infinity if none is."""
        waits = [*self._polled.values()]
        if self.teardowns.all:
            waits += [TEARDOWN_INTERVAL]
        return min(waits, default=math.inf)

    def do(self, deliver: bool) -> None:
        """Do what comes behind a wait: poll, and take a step of what is left after closing.

        Args:
            deliver: Whether handlers may run.
        """
        for task in [*self._polled]:
            task.poll()
        if self.teardowns.all:
            self.teardowns.step(deliver)
        # atomic: no calls
        self.are_due = True
        if not (self._polled or self._volatile or self.teardowns.all or self.corked):
            self.are_due = False


class Inspection:
    """Checks some conversations at a time, in turn, and all listeners and pools.

    Owns whose turn it is.

    Attributes:
        due: When the next check is due.
    """

    def __init__(self, loop: Loop) -> None:
        self.due: float = -math.inf
        self._loop = loop
        self._checked = 0

    def check(self, now: float) -> None:
        """Have tasks check whether their streams are still what they were."""
        self.due = now + CHECK_INTERVAL
        conversations = tuple(self._loop.conversations)
        if len(conversations) > _CHECKED_AT_ONCE:
            at = self._checked % len(conversations)
            self._checked = at + _CHECKED_AT_ONCE
            conversations = conversations[at : at + _CHECKED_AT_ONCE]
        for conversation in conversations:
            conversation.port.check()
        for listener in [*self._loop.listeners]:
            listener.check()
        for pool in [*self._loop.pools]:
            pool.look_soon()
