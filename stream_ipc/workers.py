"""The workers of a pool, and the slots in which they run.

Knows sessions. Must not know tasks.
"""

from __future__ import annotations

from .session import conversation_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .core.conversation import Conversation
    from .core.tickets import Ticket
    from .session import Session
    from .transports.spawn import Command

__all__ = ["Slot", "Worker", "least_busy"]

_MUCH = 512 * 1024  # bytes; a worker that has more to read gets no further task


class Slot:
    """Where one worker at a time runs.

    Attributes:
        command: What is started.
        session: The session with what runs there, or None; an interruption may have come before a worker was made of it.
        deaths: How many in a row have ended before they answered anything.
        start_at: When the next may be started.
    """

    def __init__(self, command: Command) -> None:
        self.command = command
        self.session: Session | None = None
        self.deaths = 0
        self.start_at: float = 0.0


class Worker:
    """One process.

    Attributes:
        slot: Where it runs.
        session: The session with it.
        conversation: What is behind that.
        running: The tasks that it has.
        given: How many tasks it was given in all.
        ready: Whether it can be given any.
        answered: Whether it has answered one.
        retired: Whether it is ended for no fault of its own.
        due: When it must have given a sign of life; None for not at all.
    """

    def __init__(self, slot: Slot, session: Session) -> None:
        self.slot = slot
        self.session = session
        self.conversation: Conversation = conversation_of(session)
        self.running: dict[Ticket, None] = {}
        self.given = 0
        self.ready = False
        self.answered = False
        self.retired = False
        self.due: float | None = None

    @property
    def is_clogged(self) -> bool:
        """Whether it has to read first: giving it a task might have to wait for that."""
        return self.conversation.outbox.queued_bytes > _MUCH and self.conversation.is_writable

    def can_take(self, in_flight: int, most: int | None) -> bool:
        """Return whether it can be given a task.

        Args:
            in_flight: How many it has at a time at most.
            most: How many it is given in all at most; None for no limit.
        """
        return (
            self.ready
            and len(self.running) < in_flight
            and self.given != most
            and self.conversation.outbox.queued_bytes <= _MUCH
            and self.conversation.is_writable
        )


def least_busy(workers: dict[Worker, None], in_flight: int) -> Worker | None:
    """Return the one that has the fewest tasks, if there is any: where each has one at a time, the first."""
    if in_flight > 1:
        return min(tuple(workers), key=_load, default=None)
    for worker in workers:  # next(iter(...)) would bear no signal handler that adds one
        return worker
    return None


def _load(worker: Worker) -> int:
    return len(worker.running)
