"""Promises of what is not sent yet, for whoever gives tasks to sessions: they settle when that party says so.

Knows pending requests and the loop. Must not know sessions, nor what becomes of a task.
"""

from __future__ import annotations

from .loop import Until
from .replies import Pending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..messages import Message
    from .loop import Loop

__all__ = ["Desk", "Ticket"]


class Ticket(Pending):
    """A task and, once it has settled, its outcome.

    Attributes:
        message: The task.
        tries: How often it was begun and came to nothing.
        optional: It need not be begun if its promise was dropped.
    """

    __slots__ = ("message", "optional", "tries")

    waits_alone = True  # it settles though nothing is open: a worker is still to be started

    message: Message
    tries: int
    optional: bool


class _WaitingAlone(Until):
    __slots__ = ()

    waits_alone = True


class Desk:
    """Makes tickets, and is to promises what a conversation is to those of requests. Has one timer.

    Args:
        loop: What drives it.
        name: What texts call it.
        owner: Has ``on_time``, ``check`` (called now and then), ``end`` (called when the loop closes), ``waits``,
            ``go_on`` (called in the next turn after it was put into the loop's ``later``).
    """

    def __init__(self, loop: Loop, name: str, owner: Any) -> None:
        self.loop = loop
        self.name = name
        self.replies = self
        self._owner = owner
        self._count = 0
        loop.guests[owner] = None

    def request(self, promise: Any, message: Message, timeout: float | None, expect: type) -> Ticket:
        """Make a ticket for a promise."""
        ticket = Ticket(promise)
        self._count = count = self._count + 1
        ticket.id = f"task {count}"
        ticket.message = message
        ticket.expect = expect
        ticket.timeout = timeout
        ticket.deadline = ticket.outcome = ticket.watchers = None
        ticket.settled = ticket.optional = False
        ticket.tries = 0
        ticket.owner = self
        return ticket

    def wait(self, pending: Pending, timeout: float | None) -> None:
        """Turn until a task has settled.

        Raises:
            TimeoutError: ``timeout`` has passed, and it is still pending.
        """
        self.run_until(pending, timeout)
        if not pending.settled:
            raise TimeoutError(f"no reply to {pending.id} within {timeout} s ({self.name}); it is still pending")

    def run_until(self, until: Any, timeout: float | None = None) -> None:
        """Turn until something has settled, or so many seconds are over."""
        if callable(until) and not isinstance(until, Pending):
            until = _WaitingAlone(until)
        self.loop.run(until, None if timeout is None else self.loop.clock() + timeout)

    def has_reply(self, pending: Pending) -> bool:
        """Return whether a reply is there and only has to be dispatched."""
        return False

    def forget(self, pending: Pending) -> None:
        """Take note that a task was cancelled; its owner sees that it has settled."""

    def set_timer(self, when: float | None) -> None:
        """Have the owner's ``on_time`` called when the clock has come so far."""
        self.loop.set_timer(self._owner, when)

    def mark(self) -> None:
        """Have the owner's ``go_on`` called in the next turn, unless ``unmark`` comes before."""
        self.loop.later[self._owner] = None

    def unmark(self) -> None:
        """Undo ``mark``."""
        self.loop.later.pop(self._owner, None)

    def note_progress(self) -> None:
        """Let a tick that waits return: something has happened."""
        self.loop.progress += 1

    def leave(self) -> None:
        """Forget the owner."""
        self.loop.guests.pop(self._owner, None)
        self.loop.set_timer(self._owner, None)
        self.unmark()
