"""Tasks of a pool: requests whose promise is there before they are sent, and which may be sent more than once.

Knows pending requests, conversations and the loop. Must not know what workers are.
"""

from __future__ import annotations

from ..errors import IpcError
from .conditions import Until
from .last_look import take_replies
from .pending import Pending, next_moment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any
    from weakref import ref

    from ..messages import Message
    from .conversation import Conversation
    from .loop import Loop

__all__ = ["Desk", "Ticket"]


class Ticket(Pending):
    """A task and, once it has settled, its outcome.

    Attributes:
        owner: The desk that has made it.
        message: The task.
        worker: Who has it, an object with a ``conversation`` and the dict ``running``, where it is; None while it is queued
            and once it has settled.
        tries: How often it was begun and came to nothing.
        optional: It need not be begun if its promise was dropped.
    """

    __slots__ = ("message", "optional", "tries", "worker")

    needs_no_session = True  # it settles though nothing is open: a worker is still to be started

    owner: Desk
    message: Message
    worker: Any
    tries: int
    optional: bool

    @property
    def is_dropped(self) -> bool:
        """Never: the worker that has it is to come back, whoever waits for the outcome."""
        return False

    @property
    def is_wanted(self) -> bool:
        """Whether it is still to be begun."""
        return not self.settled and not (self.optional and self() is None)

    def tell(self) -> None:
        """Give it back to its owner, and call the functions that watch it. An interrupted call can be made again."""
        crew = self.owner.crew
        if self.worker is not None:
            crew.returned(self)
        if self.watchers or self.callbacks is not None or self.owner.watchers:
            Pending.tell(self)
        if crew.queue:
            crew.give()

    def fail(self, error: BaseException) -> None:
        """Take an error in place of a reply, unless it is tried again. An interrupted call can be made again."""
        crew = self.owner.crew
        if self.worker is None or crew.failed(self, error):
            Pending.fail(self, error)
            crew.settling.pop(self, None)


class Desk:
    """Makes tickets, and is their promises' ``Requester`` (see ``pending.py``), as a conversation is for its own requests.

    Args:
        loop: What drives it.
        peer: Whose ``id_generator`` it uses.
        name: What texts call it.
        crew: Has the deque ``queue``, where tickets go, the dict ``busy`` of those that workers have, and ``give()``, which
            gives tickets out. Gets them back: ``returned(ticket)`` when a reply is there, ``failed(ticket, error)``, which
            says whether that is final; its dict ``settling`` has the final errors that are still to be told. Is called by
            the loop: ``on_time``, ``poll``, ``close``, ``go_on`` (in the turn after it was put into ``later``),
            and asked whether it ``waits`` for something though nothing is open.
    """

    needs_no_session: bool = True

    def __init__(self, loop: Loop, peer: Any, name: str, crew: Any) -> None:
        self.loop = loop
        self.name = name
        self.crew = crew
        self.replies = self
        self.watchers: set[ref[Any]] = set()  # of all its promises
        self._peer = peer
        self._cancels: dict[Ticket, tuple[Ticket, BaseException, int]] = {}  # which have begun
        loop.pools[crew] = None

    def request(self, promise: Any, message: Message, timeout: float | None, expect: type) -> Ticket:
        """Make the ticket of a task, whose outcome is for the promise. Whoever calls puts it into the queue."""
        ticket = self._make(promise, message, timeout, expect)
        ticket.id = self._peer.id_generator.generate()
        return ticket

    def _make(self, promise: Any, message: Message, timeout: float | None, expect: type) -> Ticket:
        ticket = Ticket(promise)
        ticket.message = message
        ticket.expect = expect
        ticket.timeout = timeout
        ticket.deadline = ticket.outcome = ticket.callbacks = ticket.worker = None
        ticket.watchers = []  # so that it is told in any case
        ticket.optional = False
        ticket.settled = ticket.tries = 0
        ticket.owner = self
        return ticket

    def wait(self, ticket: Ticket, timeout: float | None) -> None:
        """Turn until a task has settled.

        Raises:
            TimeoutError: ``timeout`` has passed, and it is still pending.
        """
        loop = self.loop
        limit = None if timeout is None else loop.clock() + timeout
        loop.run(ticket, limit)
        if not ticket.settled:
            take_replies([(self, ticket)], limit)
        if not ticket.settled:
            raise TimeoutError(f"no reply to task {ticket.id} within {timeout} s ({self.name}); it is still pending")

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Turn until a condition holds."""
        self.loop.run(Until(condition, needs_no_session=True))

    def conversation_of(self, ticket: Ticket) -> Conversation | None:
        """Return what a task was sent over, if a worker has it."""
        worker = ticket.worker
        return None if worker is None else worker.conversation

    def cancel(self, ticket: Ticket) -> bool:
        """Give a task up; returns whether it was still pending. A worker that has it goes on, and comes back as usual."""
        if ticket.settled:
            return False
        error = IpcError(f"task {ticket.id} was cancelled by this side")
        # What a worker that has it answers settles this one, which says that the worker is free.
        stand_in = self._make(self, ticket.message, ticket.timeout, ticket.expect)
        stand_in.id = ticket.id
        stand_in.settled = moment = next_moment()
        if ticket not in self._cancels:
            self.loop.repairs[self] = None
            self._cancels[ticket] = (stand_in, error, moment)
        self.repair()
        return True

    def repair(self) -> None:
        """Cancel what is to be cancelled. An interrupted call is made again, before anything is dispatched."""
        later = self.loop.later
        busy = self.crew.busy
        cancels = self._cancels
        for ticket, (stand_in, error, moment) in tuple(cancels.items()):
            worker = ticket.worker
            if worker is not None and not ticket.settled:
                replies = worker.conversation.replies
                replies.remove(ticket)
                if stand_in not in replies:
                    replies.enter(stand_in, ticket.deadline)
            # atomic: no calls
            if not ticket.settled:
                ticket.outcome = error
                ticket.settled = moment
                if ticket.callbacks is not None:
                    later[ticket] = None
                if worker is not None and ticket.worker is worker:
                    stand_in.worker = worker
                    worker.running[stand_in] = busy[stand_in] = None
                    ticket.worker = None
                    del worker.running[ticket]
                    del busy[ticket]

            Pending.tell(ticket)
            cancels.pop(ticket, None)
        self.loop.repairs.pop(self, None)

    def set_timer(self, when: float | None) -> None:
        """Have the crew's ``on_time`` called when the clock has come so far."""
        self.loop.set_timer(self.crew, when)

    def set_polled(self, interval: float | None) -> None:
        """Have the crew's ``poll`` called in every turn, and so often while waiting; None for not at all."""
        self.loop.set_polled(self.crew, interval)

    def close(self) -> None:
        """Have the loop call the crew no more."""
        self.loop.pools.pop(self.crew, None)
        self.loop.set_timer(self.crew, None)
        self.loop.set_polled(self.crew, None)
        self.loop.later.pop(self.crew, None)
