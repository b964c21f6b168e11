"""Tasks of a pool: requests whose promise is there before they are sent, and which may be sent more than once.

Knows pending requests, conversations and the loop. Must not know what workers are, nor who chooses one: see ``Crew``.
"""

from __future__ import annotations

from collections import deque

from ..errors import IpcError
from .pending import Pending, next_moment
from .waits import Until

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol
    from weakref import ref

    from ..messages import Message
    from .conversation import Conversation
    from .loop import Loop

    class Crew(Protocol):
        """Does the tasks of a desk: gives them to workers, and hears of a reply, or of an error, which may not be final."""

        def give(self) -> Any: ...

        def returned(self, ticket: Ticket, /) -> None: ...

        def failed(self, ticket: Ticket, error: BaseException, /) -> BaseException | None: ...

    class Holder(Protocol):
        """A worker, as far as a ticket knows it: what it is talked to over, what it has, how many it was given in all."""

        conversation: Conversation
        running: dict[Ticket, None]
        given: int

__all__ = ["Desk", "Ticket"]


class Ticket(Pending):
    """A task and, once it has settled, its outcome.

    Attributes:
        requester: The desk that has made it.
        message: The task.
        worker: What has it; None while it is queued and once it has settled.
        tries: How often it was begun and came to nothing.
        optional: It need not be begun if its promise was dropped.
    """

    __slots__ = ("message", "optional", "tries", "worker")

    requester: Desk
    message: Message
    worker: Holder | None
    tries: int
    optional: bool

    @property
    def is_dropped(self) -> bool:
        """Never: the worker that has it is to come back, whoever waits for the outcome."""
        return False

    @property
    def conversation(self) -> Conversation | None:
        worker = self.worker
        return None if worker is None else worker.conversation

    @property
    def is_wanted(self) -> bool:
        """Whether it is still to be begun."""
        return not self.settled and not (self.optional and self() is None)

    def tell(self) -> None:
        """Give it back to its desk, and call the functions that watch it. An interrupted call can be made again."""
        desk = self.requester
        if self.worker is not None:
            desk.crew.returned(self)
        if self.watchers or self.callbacks is not None or desk.watchers:
            Pending.tell(self)
        if desk.queue:
            desk.crew.give()

    def fail(self, error: BaseException) -> None:
        """Take an error in place of a reply, unless it is tried again. An interrupted call can be made again."""
        desk = self.requester
        # An interrupted call has left the error that is to be told.
        final = desk.settling.get(self, error) if self.worker is None else desk.crew.failed(self, error)
        if final is not None:
            Pending.fail(self, final)
            desk.settling.pop(self, None)


class Desk:
    """Makes tickets, and is their ``Requester`` (see ``pending.py``).

    Owns the tickets that have not settled.

    Args:
        loop: What drives it.
        peer: Whose ``id_generator`` it uses.
        crew: Does the tasks.

    Attributes:
        queue: Tickets of tasks that no worker has. What makes one puts it there.
        settling: Final errors that an interruption may have kept from being told.
    """

    conversation: None = None  # each worker has its own

    def __init__(self, loop: Loop, peer: Any, crew: Crew) -> None:
        self.loop = loop
        self.crew = crew
        self.queue: deque[Ticket] = deque()
        self.settling: dict[Ticket, BaseException] = {}
        self.watchers: set[ref[Any]] = set()  # of all its promises
        self._peer = peer
        self._cancels: dict[Ticket, tuple[Ticket, BaseException, int]] = {}  # which have begun

    def request(self, promise: Any, message: Message, timeout: float | None, expect: type) -> Ticket:
        """Make the ticket of a task, whose outcome is for the promise."""
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
        ticket.requester = self
        return ticket

    def silence(self, ticket: Ticket, timeout: float | None) -> str:
        """Return the text of a timeout."""
        return f"no reply to task {ticket.id} within {timeout} s (worker pool)"

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Turn until a condition holds."""
        self.loop.run(Until(condition))

    @property
    def first(self) -> Ticket | None:
        """The first task in the queue that is still to be begun. Those before it are dropped."""
        queue = self.queue
        while queue:
            ticket = queue[0]
            if ticket.is_wanted:
                return ticket
            # atomic: no calls
            if queue and queue[0] is ticket:
                del queue[0]
        return None

    def take_off(self, ticket: Ticket, worker: Holder) -> None:
        """Take note that a worker has a task no longer."""
        # atomic: no calls
        ticket.worker = None
        if ticket in worker.running:
            del worker.running[ticket]

    def withdraw(self, ticket: Ticket, worker: Holder) -> None:
        """Take off what stands in for a task that was cancelled while it was given to a worker, and was not sent."""
        for stand_in in tuple(worker.running):
            if stand_in.id == ticket.id:
                worker.conversation.replies.remove(stand_in)
                # atomic: no calls
                if stand_in in worker.running:
                    del worker.running[stand_in]
                    worker.given -= 1
                    stand_in.worker = None

    def take_back(self, ticket: Ticket, worker: Holder) -> None:
        """Queue a task that a worker has again, before all others."""
        queue = self.queue
        # atomic: no calls
        if ticket in worker.running:
            del worker.running[ticket]
            worker.given -= 1
            ticket.worker = ticket.deadline = None
            queue += (ticket,)

        if queue and queue[-1] is ticket:
            queue.rotate(1)

    def fail_queued(self, error: BaseException) -> None:
        """Fail what is queued. What an interruption leaves, another call or the next turn does."""
        self.loop.repairs[self] = None
        self.settle_rest()
        for ticket in tuple(self.queue):  # but not what done callbacks submit
            if ticket in self.queue:  # nor what was cancelled, or given to a worker since
                self.settling[ticket] = error
                self.queue.remove(ticket)
                ticket.fail(error)
        self.repair()

    def settle_rest(self) -> None:
        """Fail the tasks whose errors an interruption has kept from being told. An interrupted call can be made again."""
        for ticket, error in tuple(self.settling.items()):
            ticket.fail(error)

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
        """Cancel and fail what is to be. An interrupted call is made again, before anything is dispatched."""
        self.settle_rest()
        later = self.loop.later
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
                    worker.running[stand_in] = None
                    ticket.worker = None
                    del worker.running[ticket]

            Pending.tell(ticket)
            cancels.pop(ticket, None)
        self.loop.repairs.pop(self, None)
