"""The workers of a pool: which of them has which task, which are to be started, which have died.

Knows the peer and sessions as users do. Of the core it knows the loop, which calls it when a time has come, and the
conversations of workers, over which tasks are sent. Must not know processes.
"""

from __future__ import annotations

import math
from functools import partial

from . import log
from .clock import monotonic
from .core.until import Until
from .errors import InvalidStreamError, RequestTimeoutError, StreamClosedError, describe
from .interruptions import interruption_in
from .messages import Message, is_text
from .peer import loop_of
from .session import conversation_of
from .tasks import Attempt, Task, Tasks, Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .peer import IpcPeer
    from .session import Session
    from .transports.spawn import Command

__all__ = ["Crew"]

_BACK_OFF, _BACK_OFF_MOST = 0.1, 10.0  # seconds before a worker is started again whose predecessor died
_CLOGGED_INTERVAL = 0.05  # seconds until the next look at a worker that has much to read
# So many deaths in a row at least, with no answer in between, fail what is queued, unless a worker still runs that did not
# have to replace another.
_DEATHS = 5


class Crew:
    """The workers of one pool, which of them has which task, and when another is started.

    Owns the workers and the tasks. Is called by the loop: ``on_time``, ``check``, ``close``, and ``go_on`` in the
    turn after it was put into ``later``. What an interruption has left is done by ``check``.

    Args:
        peer: What drives it.
        commands: The command of each worker.
        options: Further arguments of ``create_command_session``.
        retries: As in ``WorkerPool``, and so are the others.

    Attributes:
        size: How many workers there are at most.
        in_flight: How many tasks a worker has at a time at most.
        closed: Whether nothing can be added any more.
        tasks: The tasks.
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
        self._create = partial(peer.create_command_session, **options)
        self._retries = retries
        self._tasks_per_worker = tasks_per_worker
        self.in_flight: int = in_flight
        self._on_session = on_session
        self._hello = hello
        self._start_timeout = start_timeout
        self.size: int = len(commands)
        self._workers: dict[Worker, None] = {}
        self._vacant: dict[Worker, None] = dict.fromkeys(map(Worker, commands))  # those that are to be started
        # All those that can be given a task, and maybe others: only ``give`` looks, and drops those that cannot.
        self._idle: dict[Worker, None] = {}
        self._searched = 0.0  # when one to be started was last searched for
        self._deaths = 0  # since the last answer of any worker
        self._untidy = False  # whether ``check`` was asked for
        self.closed: bool = False
        self._others: tuple[Any, ...] = ()  # what was to be torn down before this was closed
        self._loop = loop_of(peer)
        self.tasks: Tasks = Tasks(self._loop, peer)
        self._queue = self.tasks.queue
        self._loop.pools[self] = None

    @property
    def sessions(self) -> list[Session]:
        """Those of the workers that are running."""
        sessions: list[Any] = [worker.session for worker in tuple(self._workers)]
        return [session for session in sessions if session.is_open]

    @property
    def pending(self) -> int:
        """How many tasks are queued or with workers."""
        return sum([task.is_wanted for task in tuple(self._queue)]) + len(self._under_way())

    def _under_way(self) -> list[Task]:
        """Return the tasks that workers have and that have not settled."""
        tasks = [attempt.task for worker in tuple(self._workers) for attempt in tuple(worker.running)]
        return [task for task in tasks if not task.settled]

    @property
    def waits(self) -> bool:
        """Whether something will happen though nothing is open."""
        return self.tasks.first is not None

    @property
    def can_give(self) -> bool:
        """Whether a worker may be free, or can be started sooner or later."""
        return bool(self._idle or self._vacant)

    def finish(self) -> None:
        """Turn until all tasks have settled."""
        until = Until(lambda: self.tasks.first is None and not self._under_way())
        if not until.settled:
            self._loop.run(until)

    # -- giving tasks to workers

    def give(self, strict: bool = False) -> None:
        """Give queued tasks to workers that are free, and start workers for the rest. An interrupted call is made again.

        Args:
            strict: Raise what is wrong with the arguments for new workers. Otherwise that counts as a death.
        """
        idle = self._idle
        later = self._loop.later
        later[self] = None
        while self.can_give and not self.closed:
            task = self.tasks.first
            if task is None:
                break
            worker: Worker | None = None
            if self.in_flight > 1:
                worker = min(tuple(idle), key=_load, default=None)
            else:
                for worker in idle:  # next(iter(...)) would bear no signal handler that adds one
                    break
            # One that may have several gets a second only where no other can have it.
            if (worker is None or (worker.running and self.in_flight > 1)) and self._start(strict):
                continue
            if worker is None:
                break
            given = worker.given
            if worker.can_take(self.in_flight, self._tasks_per_worker):
                self._give_to(worker, task, given)
            else:
                self._pass_over(worker)
        if not self._untidy:
            later.pop(self, None)
        if self._queue and self._vacant:
            self._set_timer()

    def _give_to(self, worker: Worker, task: Task, given: int) -> None:
        """Give a task to a worker that could take one when it had been given so many."""
        queue = self._queue
        attempt = Attempt.make(task, worker, self.take)
        conversation = worker.conversation
        last = conversation.outbox.last
        try:
            # atomic: no calls
            if not queue or queue[0] is not task or task.settled or worker.given != given:
                return  # a signal handler has used the pool meanwhile
            del queue[0]
            task.attempt = attempt
            worker.running[attempt] = None
            worker.given += 1
            if self.in_flight == 1 and worker in self._idle:
                del self._idle[worker]  # as ``_pass_over`` would, which this spares

            conversation.replies.request(None, task.message, task.timeout, task.expect, attempt)
            task.deadline = attempt.deadline
        except BaseException as exc:
            if not isinstance(exc, Exception) or interruption_in(exc) is not None:
                self._undo(attempt, conversation.outbox.last is not last)
                raise
            self._not_given(attempt, exc)

    def _undo(self, attempt: Attempt, sent: bool) -> None:
        """Take a task back of which sending was interrupted."""
        self._leave_to_check()
        replies = attempt.worker.conversation.replies
        if sent and attempt in replies:
            return  # a reply will come
        replies.remove(attempt)
        if sent:  # the worker must not go on with it
            self._kill(attempt.worker, "this side was interrupted while it sent a task")
        self.tasks.put_back(attempt, False)

    def _not_given(self, attempt: Attempt, error: Exception) -> None:
        """Take note that a task could not be sent to a worker."""
        worker, task = attempt.worker, attempt.task
        if isinstance(error, RequestTimeoutError):  # it does not read
            attempt.outcome = error
            self.take(attempt)
            return
        if isinstance(error, (StreamClosedError, InvalidStreamError)):
            self._idle.pop(worker, None)  # it is dead, or its stream is; its end is on the way
        else:  # the task cannot travel
            self.tasks.settle(task, error)
            self._idle[worker] = None
        self.tasks.put_back(attempt, False)
        self.tasks.tell(task)

    def _pass_over(self, worker: Worker) -> None:
        """Drop a worker that can be given nothing from those that may be free."""
        self._idle.pop(worker, None)
        if worker.can_take(self.in_flight, self._tasks_per_worker):
            self._idle[worker] = None  # a signal handler has turned meanwhile
        elif worker.is_clogged:
            self._set_timer()

    def take(self, attempt: Attempt) -> None:
        """Take what has become of a task that a worker had. An interrupted call can be made again."""
        task, worker, outcome = attempt.task, attempt.worker, attempt.outcome
        if attempt in worker.running:
            answered = not isinstance(outcome, (StreamClosedError, RequestTimeoutError))
            if not answered:
                outcome = self._error_of(attempt)
                if outcome is None:
                    return
            self.tasks.settle(task, outcome)
            # atomic: no calls
            if attempt in worker.running:  # a signal handler may have turned
                del worker.running[attempt]
                task.attempt = None
                if answered:
                    self._idle[worker] = None
                    self._deaths = worker.deaths = 0
                    worker.answered = True
                    worker.due = None

        if worker.given == self._tasks_per_worker:
            self._leave_to_check()  # it is replaced behind this reply
        if self._queue:
            self._loop.later[self] = None  # for turns inside done callbacks
        self.tasks.tell(task)
        if self._queue:
            self.give()

    def _error_of(self, attempt: Attempt) -> Any:
        """Return what a task fails with to which a worker has not answered, or None if it is tried again."""
        task, worker, error = attempt.task, attempt.worker, attempt.outcome
        if isinstance(error, RequestTimeoutError):
            worker.retired = True  # it came up, and is busy
            self.tasks.settle(task, error)  # first: the end of the worker gives what it has to another
            if worker.conversation.is_open:
                self._kill(worker, f"the worker was killed, because a task took longer than {task.timeout} s")
        elif not self.closed and task.tries < self._retries and not task.settled:
            self.tasks.put_back(attempt, True)
            return None
        elif not self.closed and task.tries:
            text = f"{task.tries + 1} workers ended while they had this task; the last one: {error}"
            last = StreamClosedError(text)
            last.__cause__ = error.__cause__
            return last
        return error

    # -- workers come and go

    def _start(self, strict: bool) -> bool:
        """Start a worker if one is needed and can be started now; returns whether to look for one again."""
        now = self._searched = self._loop.clock()
        coming = [worker for worker in tuple(self._workers) if not worker.ready]
        if len(coming) >= len(self._queue):
            return False
        for worker in tuple(self._vacant):
            if worker.session is not None or worker.start_at <= now:
                break
        else:
            return False
        try:
            if worker.session is None:
                for worker.session in map(self._create, (worker.command,)):  # stored before a signal is looked at
                    break
        except Exception as exc:
            if interruption_in(exc) is not None or (strict and isinstance(exc, (TypeError, ValueError))):
                raise
            error = StreamClosedError(f"a worker could not be started: {describe(exc)}")
            error.__cause__ = exc
            self._note_death(worker, error)
            return bool(self._queue)
        return self._set_up(worker)

    def _set_up(self, worker: Worker) -> bool:
        """Begin with a worker whose session was made; returns whether to look for one to be started again."""
        session: Any = worker.session
        worker.conversation = conversation_of(session)
        # atomic: no calls
        is_new = worker in self._vacant and not self.closed
        if is_new:
            del self._vacant[worker]
            self._workers[worker] = None

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

    def _await_sign(self, worker: Worker) -> None:
        session: Any = worker.session
        sign: Any = Message if self._hello is None else self._hello

        def hear(message: Message) -> None:
            if isinstance(message, sign) and (self._hello is None or not is_text(message)):
                session.off_message(hear)
                worker.due = None
                if not worker.ready:
                    # atomic: no calls
                    worker.ready = True
                    self._idle[worker] = None

                    self.give()

        session.on_message(hear)

    def _kill(self, worker: Worker, text: str) -> None:
        """Kill a worker that cannot be asked to end: it may be busy for ever."""
        worker.conversation.hurry(self._loop.clock())
        _close(worker, text)
        self._loop.teardowns.step(deliver=False)

    def _worker_closed(self, worker: Worker) -> None:
        """Take note that a worker's session is closed. An interrupted call is made again."""
        for attempt in tuple(worker.running):  # which an interruption has left
            self.tasks.put_back(attempt, False)
        successor = Worker(worker.command, worker.deaths)
        # atomic: no calls
        self._loop.later[self] = None
        is_first = worker in self._workers
        if is_first:
            del self._workers[worker]
            self._vacant[successor] = None

        self._idle.pop(worker, None)
        if is_first and not worker.answered and not worker.retired and not self.closed:
            self._note_death(successor, worker.conversation.reason)
        self.give()

    def _note_death(self, successor: Worker, reason: StreamClosedError | None) -> None:
        """Take note that a worker came to nothing, and when another may be started in its place."""
        successor.deaths += 1
        wait = min(_BACK_OFF_MOST, _BACK_OFF * 2 ** min(successor.deaths - 1, 10))
        successor.start_at = self._loop.clock() + wait
        self._deaths += 1
        if any([not worker.deaths for worker in tuple(self._workers)]):
            return  # that one has not failed yet: it is slow to come up, or busy
        if self._deaths >= max(_DEATHS, 3 * self.size):
            text = f"{self._deaths} workers in a row ended before they had answered anything; the last one: {reason}"
            self.tasks.fail_queued(StreamClosedError(text))

    # -- what the loop calls

    def _leave_to_check(self) -> None:
        """Have ``check`` called in the next turn."""
        # atomic: no calls
        self._untidy = True
        self._loop.later[self] = None

    def _set_timer(self) -> None:
        times = [worker.due for worker in tuple(self._workers) if worker.due is not None]
        if self._queue:
            # The others were seen: they wait for something else.
            searched = self._searched
            times += [worker.start_at for worker in tuple(self._vacant) if worker.start_at > searched]
            times += [self._loop.clock() + _CLOGGED_INTERVAL for worker in tuple(self._workers) if worker.is_clogged]
        self._loop.set_timer(self, min(times, default=None))

    def check(self) -> None:
        """Do what is due, and what an interruption has left."""
        if self._loop.starving:  # inside of a call that runs no handlers
            self._leave_to_check()
            return
        # atomic: no calls
        self._untidy = False  # first: users' functions may leave something
        self._loop.later[self] = None

        now = self._loop.clock()
        for worker in tuple(self._vacant):
            if worker.session is not None:
                self._set_up(worker)
        self.tasks.repair()
        for worker in tuple(self._workers):
            for attempt in tuple(worker.running):
                if attempt.outcome is not None:  # an interruption has kept it from being taken
                    self.take(attempt)
            if not worker.conversation.is_open:
                self._worker_closed(worker)
            elif worker.due is not None and worker.due <= now:
                self._kill(worker, f"the worker gave no sign within {self._start_timeout} s, so it was killed")
            elif worker.given == self._tasks_per_worker and not worker.running:
                _close(worker, "this side replaces the worker, which has done its share of tasks")
            else:
                self._idle[worker] = None
        self.give()
        self._set_timer()

    go_on = check  # what an interruption has left

    def on_time(self, now: float) -> None:
        """Start workers, or give them up: a time has come."""
        if now > -math.inf:  # or the loop only asks when that is
            self.check()

    def close(self, text: str = "this side closed the peer of the worker pool") -> None:
        """Fail all tasks; the text says why. An interrupted call is made again."""
        self.closed = True
        self._loop.set_timer(self, None)
        for worker in tuple(self._workers):
            worker.conversation.stop()
            error = StreamClosedError(f"{text} ({worker.conversation.name})")
            for attempt in tuple(worker.running):
                self.tasks.settle(attempt.task, error)
        self.tasks.fail_queued(StreamClosedError(text))
        self._loop.later.pop(self, None)
        self._loop.pools.pop(self, None)  # last: an interrupted call is made again

    def close_workers(self, seconds: float | None) -> None:
        """Fail all tasks, and end the workers side by side.

        Args:
            seconds: How long that may take; None for the usual bounds.
        """
        loop = self._loop
        others = tuple(loop.teardowns.all)
        # atomic: no calls
        if not self.closed:  # otherwise what an interrupted call has left is no other's
            self._others = others
            self.closed = True

        text = "this side closed the worker pool"
        for worker in tuple(self._vacant):
            if worker.session is not None:
                worker.conversation = conversation_of(worker.session)
                self._workers[worker] = None
        workers = tuple(self._workers)
        due = None if seconds is None else monotonic() + seconds
        try:
            self.close(text)
        finally:  # a done callback may have been interrupted
            for worker in workers:
                _close(worker, text)
        # Side by side; session.close() would do it one by one, and hurry each anew.
        mine = [teardown for teardown in loop.teardowns.all if teardown not in self._others]
        loop.teardowns.wait(mine, due, background=False)
        for worker in workers:
            worker.conversation.close()


def _load(worker: Worker) -> int:
    return len(worker.running)


def _close(worker: Worker, text: str) -> None:
    """Close a worker's session. Its process is ended and reaped by ticks."""
    worker.conversation.close_now(StreamClosedError(f"{text} ({worker.conversation.name})"))
