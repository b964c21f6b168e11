"""The workers of a pool: which of them has which task, which are to be started, which have died.

Knows the peer and sessions as users do. Of the core it knows the desk, which has the tasks; the loop, which calls it when a
time has come; and the conversations of workers, over which tasks are sent. Must not know processes.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import chain, filterfalse
from operator import attrgetter

from . import log
from .core.pending import hold_back
from .core.tickets import Desk
from .errors import InvalidStreamError, RequestTimeoutError, StreamClosedError, describe
from .interruptions import interruption_in
from .messages import Message
from .peer import loop_of
from .workers import Slot, Worker, least_busy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any

    from .core.tickets import Ticket
    from .peer import IpcPeer
    from .session import Session
    from .transports.spawn import Command

__all__ = ["Crew"]

_BACK_OFF, _BACK_OFF_MOST = 0.1, 10.0  # seconds before a worker is started again whose predecessor died
_CLOGGED_INTERVAL = 0.05  # seconds between two polls of whether a clogged worker has read
# So many deaths in a row at least, with no answer in between, fail what is queued, unless a worker still runs that did not
# have to replace another.
_DEATHS = 5

_is_settled = attrgetter("settled")


class Crew:
    """The workers of one pool, which of them has which task, and when another is started.

    Owns the workers, the slots in which they run, and the desk. Is called by the loop: ``on_time``, ``poll``, ``check``,
    ``close``, and ``go_on`` in the turn after it was put into ``later``.

    Args:
        peer: What drives it.
        commands: The command of each worker.
        options: Further arguments of ``create_command_session``.
        retries: As in ``WorkerPool``, and so are the others.

    Attributes:
        in_flight: How many tasks a worker has at a time at most.
        closed: Whether nothing can be added any more.
        desk: Has the tasks.
    """

    def __init__(
        self,
        peer: IpcPeer,
        commands: list[Command],
        options: Mapping[str, Any],
        retries: int,
        tasks_per_worker: int | None,
        in_flight: int,
        on_session: Callable[[Session], Any] | None,
        hello: type[Message] | None,
        start_timeout: float | None,
    ) -> None:
        self._peer = peer
        self._options = options
        self._retries = retries
        self._tasks_per_worker = tasks_per_worker
        self.in_flight: int = in_flight
        self._on_session = on_session
        self._hello = hello
        self._start_timeout = start_timeout
        self._slots = [Slot(command) for command in commands]
        self._workers: dict[Slot, Worker] = {}  # at most one in each
        # All those that can be given a task, and maybe others: only ``give`` looks, and drops those that cannot.
        self._idle: dict[Worker, None] = {}
        self._searched = 0.0  # when a free slot was last searched for
        self._deaths = 0  # since the last answer of any worker
        self._untidy = 0  # how often check() was asked for since the last one
        self.closed: bool = False
        self._loop = loop_of(peer)
        self.desk: Desk = Desk(self._loop, peer, self)
        self._queue = self.desk.queue
        self._loop.pools[self] = None

    @property
    def size(self) -> int:
        """How many workers there are at most."""
        return len(self._slots)

    @property
    def sessions(self) -> list[Session]:
        """Those of the workers that are running."""
        return [worker.session for worker in tuple(self._workers.values()) if worker.session.is_open]

    @property
    def pending(self) -> int:
        """How many tasks are queued or with workers."""
        return sum([ticket.is_wanted for ticket in tuple(self._queue)]) + len(list(self._under_way()))

    def _under_way(self) -> Iterator[Ticket]:
        """The tasks that workers have and somebody waits for."""
        running = [tuple(worker.running) for worker in tuple(self._workers.values())]
        return filterfalse(_is_settled, chain.from_iterable(running))

    def finish(self) -> None:
        """Turn until all tasks have settled. Asked after each of them, so it is not to count the others."""
        self.desk.run_until(lambda: self.desk.first is None and not any(self._under_way()))

    @property
    def waits(self) -> bool:
        """Whether something will happen though nothing is open."""
        return bool(self._queue)

    @property
    def can_give(self) -> bool:
        """Whether a worker may be free, or can be started sooner or later."""
        return bool(self._idle) or len(self._workers) < len(self._slots)

    # -- giving tasks to workers

    def give(self, strict: bool = False) -> None:
        """Give queued tasks to workers that are free, and start workers for the rest. An interrupted call is made again.

        Args:
            strict: Raise what is wrong with the arguments for new workers. Otherwise their slot counts a death.
        """
        idle = self._idle
        later = self._loop.later
        later[self] = None
        while self.can_give and not self.closed:
            ticket = self.desk.first
            if ticket is None:
                break
            worker = least_busy(idle, self.in_flight)
            # One that may have several gets a second only where no other can have it.
            if (worker is None or (worker.running and self.in_flight > 1)) and self._start(strict):
                continue
            if worker is None:
                break
            given = worker.given
            if worker.can_take(self.in_flight, self._tasks_per_worker):
                self._give_to(worker, ticket, given)
            else:
                self._pass_over(worker)
        if not self._untidy:
            later.pop(self, None)
        if self._queue and len(self._workers) < len(self._slots):
            self._set_timer()

    def _give_to(self, worker: Worker, ticket: Ticket, given: int) -> None:
        """Give a task to a worker that could take one when it had been given so many."""
        queue = self._queue
        conversation = worker.conversation
        last = conversation.outbox.last
        try:
            # atomic: no calls
            if not queue or queue[0] is not ticket or ticket.settled or worker.given != given:
                return  # a signal handler has used the pool meanwhile
            del queue[0]
            ticket.worker = worker
            worker.running[ticket] = None
            worker.given += 1
            if self.in_flight == 1 and worker in self._idle:
                del self._idle[worker]  # as ``_pass_over`` would, which this spares

            conversation.replies.request(None, ticket.message, ticket.timeout, ticket.expect, ticket)
        except BaseException as exc:
            if not isinstance(exc, Exception) or interruption_in(exc) is not None:
                self._undo(worker, ticket, last)
                raise
            self._not_given(worker, ticket, exc)

    def _not_given(self, worker: Worker, ticket: Ticket, error: Exception) -> None:
        """Take note that a task could not be sent to a worker."""
        if ticket.worker is not worker:  # a signal handler has cancelled it meanwhile
            self.desk.withdraw(ticket, worker)
            self._idle[worker] = None
        elif isinstance(error, (StreamClosedError, InvalidStreamError)):
            self._idle.pop(worker, None)  # it is dead, or its stream is; its end is on the way
            self.desk.take_back(ticket, worker)
        elif isinstance(error, RequestTimeoutError):  # it does not read
            ticket.fail(error)
        else:  # the task cannot travel
            # atomic: no calls
            self.desk.settling[ticket] = error
            worker.given -= 1
            self._idle[worker] = None

            self.desk.take_off(ticket, worker)
            ticket.fail(error)

    def _pass_over(self, worker: Worker) -> None:
        """Drop a worker that can be given nothing from those that may be free."""
        self._idle.pop(worker, None)
        if worker.can_take(self.in_flight, self._tasks_per_worker):
            self._idle[worker] = None  # a signal handler has turned meanwhile
        elif worker.is_clogged:
            self._loop.set_polled(self, _CLOGGED_INTERVAL)

    def _undo(self, worker: Worker, ticket: Ticket, last: Any) -> None:
        """Take back a task that was being given to a worker when a signal handler raised something."""
        self._leave_to_check()
        replies = worker.conversation.replies
        is_sent = worker.conversation.outbox.last is not last
        if ticket.worker is not worker:
            if not is_sent:
                self.desk.withdraw(ticket, worker)
        elif not is_sent:
            replies.remove(ticket)
            self.desk.take_back(ticket, worker)
        elif ticket not in replies:  # it may have it, and must not go on with it
            self._kill(worker, "this side was interrupted while it sent a task")
            self.desk.take_back(ticket, worker)

    def _leave_to_check(self) -> None:
        """Have ``check`` called in the next turn."""
        # atomic: no calls
        self._untidy += 1
        self._loop.later[self] = None

    def poll(self) -> None:
        """Look again at clogged workers that have read. The loop calls this while there are any."""
        workers = tuple(self._workers.values())
        for worker in workers:
            if worker not in self._idle and worker.can_take(self.in_flight, self._tasks_per_worker):
                self._leave_to_check()
        if not any([worker.is_clogged for worker in workers]):
            self._loop.set_polled(self, None)

    def returned(self, ticket: Ticket) -> None:
        """Take note that a worker has answered. What an interruption leaves is done by ``check``."""
        # atomic: no calls
        worker: Any = ticket.worker
        if worker is None:
            return  # a signal handler has cancelled it
        ticket.worker = None
        del worker.running[ticket]
        self._idle[worker] = None
        self._deaths = 0
        if not worker.answered:
            worker.answered = True
            worker.slot.deaths = 0
            worker.due = None
        if self._queue:
            self._loop.later[self] = None  # for turns inside done callbacks

        if worker.given == self._tasks_per_worker:
            self._leave_to_check()  # it is replaced behind this reply

    def failed(self, ticket: Ticket, error: BaseException) -> BaseException | None:
        """Take note that a worker has not answered, or answered with an error.

        Returns:
            What the task fails with; None: it is tried again.
        """
        worker: Any = ticket.worker
        if worker is None:
            return error  # a signal handler has cancelled it
        if isinstance(error, StreamClosedError):
            if not self.closed and ticket.tries < self._retries and not ticket.settled:
                worker.conversation.replies.remove(ticket)  # first: from now on this is called no more
                ticket.tries += 1
                self.desk.take_back(ticket, worker)
                return None
            if ticket.tries and not self.closed:
                last = error
                count = ticket.tries + 1
                error = StreamClosedError(f"{count} workers ended while they had this task; the last one: {last}")
                error.__cause__ = last.__cause__
            self.desk.settling[ticket] = error
            self.desk.take_off(ticket, worker)
        elif isinstance(error, RequestTimeoutError):
            self._leave_to_check()
            self.desk.settling[ticket] = error
            self.desk.take_off(ticket, worker)
            worker.conversation.replies.remove(ticket)
            worker.retired = True  # it came up, and is busy
            self._kill(worker, f"the worker was killed, because a task took longer than {ticket.timeout} s")
        else:
            self.returned(ticket)
        return error

    # -- workers come and go

    def _start(self, strict: bool) -> bool:
        """Start a worker if one is needed and can be started now; returns whether to look for one again."""
        if len(self._workers) >= len(self._slots):
            return False
        now = self._searched = self._loop.clock()
        coming = [worker for worker in tuple(self._workers.values()) if not worker.ready]
        if len(coming) >= len(self._queue):
            return False
        for slot in self._vacant:
            if slot.session is not None or slot.start_at <= now:
                break
        else:
            return False
        create = partial(self._peer.create_command_session, **self._options)
        try:
            if slot.session is None:
                for slot.session in map(create, (slot.command,)):  # stored before a signal is looked at
                    break
        except Exception as exc:
            if interruption_in(exc) is not None or (strict and isinstance(exc, (TypeError, ValueError))):
                raise
            error = StreamClosedError(f"a worker could not be started: {describe(exc)}")
            error.__cause__ = exc
            self._note_death(slot, error)
            return bool(self._queue)
        return self._set_up(slot)

    def _set_up(self, slot: Slot) -> bool:
        """Make a worker of the session that was made for a slot; returns whether to look for one again."""
        session: Any = slot.session
        worker = Worker(slot, session)
        # atomic: no calls
        is_new = slot.session is session and slot not in self._workers and not self.closed
        if is_new:
            self._workers[slot] = worker

        if not is_new:  # a signal handler has turned, or has closed the pool, meanwhile
            if self.closed:
                self._kill(worker, "this side closed the worker pool")
            return not self.closed
        try:
            session.on_close(lambda session: self._worker_closed(worker))
            if self._start_timeout is not None:
                worker.due = self._loop.clock() + self._start_timeout
                self._set_timer()
            if self._hello is not None or worker.due is not None:
                self._await_sign(worker)
            if self._on_session is not None:
                self._on_session(session)
            if self._hello is None and session.is_open and not self.closed:
                # atomic: no calls
                worker.ready = True
                self._idle[worker] = None
        except BaseException as exc:
            if not isinstance(exc, Exception) or interruption_in(exc) is not None:
                self._kill(worker, "its start was interrupted")
                raise
            log.error("on_session of a worker pool failed", exc_info=True)
            self._kill(worker, f"on_session failed: {describe(exc)}")
            return bool(self._queue)
        return True

    @property
    def _vacant(self) -> list[Slot]:
        """The slots without a worker. An interruption may have left a session there, of which one is still to be made."""
        return [slot for slot in self._slots if slot not in self._workers]

    def _await_sign(self, worker: Worker) -> None:
        sign: Any = Message if self._hello is None else self._hello

        @worker.session.on_message
        def hear(message: Message) -> None:
            if isinstance(message, sign):
                worker.session.off_message(hear)
                worker.due = None
                if not worker.ready:
                    # atomic: no calls
                    worker.ready = True
                    self._idle[worker] = None

                    self.give()

    def _kill(self, worker: Worker, text: str) -> None:
        """Kill a worker that cannot be asked to end: it may be busy for ever."""
        worker.conversation.hurry(self._loop.clock())
        self._close_worker(worker, text)
        self._loop.teardowns.step(deliver=False)

    def _close_worker(self, worker: Worker, text: str) -> None:
        """Close a worker's session. Its process is ended and reaped by ticks."""
        worker.conversation.close_now(StreamClosedError(f"{text} ({worker.session.name})"))

    def _worker_closed(self, worker: Worker) -> None:
        """Take note that a worker's session is closed. An interrupted call is made again."""
        for ticket in tuple(worker.running):  # which an interruption has left
            ticket.fail(worker.conversation.closed_error())
        slot = worker.slot
        self._idle.pop(worker, None)
        # atomic: no calls
        self._loop.later[self] = None
        is_first = slot in self._workers and self._workers[slot] is worker
        if is_first:
            del self._workers[slot]
            slot.session = None

        if is_first and not worker.answered and not worker.retired and not self.closed:
            self._note_death(slot, worker.conversation.reason)
        self.give()

    def _note_death(self, slot: Slot, reason: StreamClosedError | None) -> None:
        """Take note that a worker came to nothing."""
        slot.deaths += 1
        slot.start_at = self._loop.clock() + min(_BACK_OFF_MOST, _BACK_OFF * 2 ** min(slot.deaths - 1, 10))
        self._deaths += 1
        if any([not worker.slot.deaths for worker in tuple(self._workers.values())]):
            return  # that one has not failed yet: it is slow to come up, or busy
        if self._deaths >= max(_DEATHS, 3 * len(self._slots)):
            text = f"{self._deaths} workers in a row ended before they had answered anything; the last one: {reason}"
            self.desk.fail_queued(StreamClosedError(text))

    # -- what the loop calls

    def _set_timer(self) -> None:
        times = [worker.due for worker in tuple(self._workers.values()) if worker.due is not None]
        if self._queue:
            # The others were seen: they wait for something else.
            searched = self._searched
            times += [slot.start_at for slot in self._vacant if slot.start_at > searched]
        self._loop.set_timer(self, min(times, default=None))

    def check(self) -> None:
        """Do what is due, and what an interruption has left."""
        if self._loop.starving:  # inside of a call that runs no handlers
            self._leave_to_check()
            return
        asked = self._untidy
        now = self._loop.clock()
        for slot in self._vacant:
            if slot.session is not None:
                self._set_up(slot)
        self.desk.settle_rest()
        for worker in tuple(self._workers.values()):
            if not worker.session.is_open:
                self._worker_closed(worker)
            elif worker.due is not None and worker.due <= now:
                self._kill(worker, f"the worker gave no sign within {self._start_timeout} s, so it was killed")
            elif worker.given == self._tasks_per_worker and not worker.running:
                worker.retired = True
                self._close_worker(worker, "this side replaces the worker, which has done its share of tasks")
            else:
                self._idle[worker] = None
        if self._untidy == asked:  # otherwise users' functions have left something
            self._untidy = 0
        self.give()
        self._set_timer()

    def on_time(self, now: float) -> None:
        """Start workers, or give them up: a time has come."""
        if now > -math.inf:  # or the loop only asks when that is
            self.check()

    go_on = check  # what an interruption has left

    def close(self, text: str = "this side closed the peer of the worker pool", workers: Iterable[Worker] = ()) -> None:
        """Fail what is queued, and what some workers have; the text says why."""
        self.closed = True
        self._loop.call_no_more(self)
        self._loop.later.pop(self, None)
        self.desk.fail_queued(StreamClosedError(text))
        for worker in workers:
            worker.conversation.stop()
        for worker in workers:
            worker.conversation.replies.fail_all(StreamClosedError(f"{text} ({worker.session.name})"))
        self._loop.pools.pop(self, None)  # last: an interrupted call is made again

    def close_workers(self, seconds: float | None) -> None:
        """Fail everything, and end the workers side by side.

        Args:
            seconds: How long that may take; None for the usual bounds.
        """
        loop = self._loop
        others = tuple(loop.teardowns.all)
        for slot in self._vacant:
            if slot.session is not None:
                self._workers[slot] = Worker(slot, slot.session)
        workers = tuple(self._workers.values())
        due = None if seconds is None else loop.clock() + seconds
        try:
            # Done callbacks may wait for any of the tasks.
            hold_back(loop, True, self.close, "this side closed the worker pool", workers)
            loop.go_on()
        except BaseException:  # an interruption: the next turn goes on with closing
            loop.repairs |= dict.fromkeys([worker.conversation for worker in workers])
            raise
        for worker in workers:
            if due is not None:
                worker.conversation.hurry(due)
            self._close_worker(worker, "this side closed the worker pool")
        # Side by side; session.close() would do it one by one, and hurry each anew.
        loop.teardowns.wait([teardown for teardown in loop.teardowns.all if teardown not in others], background=False)
        for worker in workers:
            worker.session.close()
