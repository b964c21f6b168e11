"""The scheduler of a pool: which worker has which task.

Knows the workers and the tasks, the conversations over which tasks are sent, and the loop, which calls it when a time has
come. Must not know how a worker is started, nor processes.
"""

from __future__ import annotations

import math
from functools import partial

from ..clock import monotonic
from ..core.loop import MAX_DEPTH, Until
from ..core.pending import Pending
from ..errors import InvalidStreamError, RequestTimeoutError, StreamClosedError, unraised
from ..interruptions import interruption_in
from ..peer import loop_of
from ..session import conversation_of
from .supervisor import Supervisor
from .tasks import Task, Tasks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..peer import IpcPeer
    from .worker import Options, Worker

__all__ = ["Scheduler"]


class Scheduler:
    """Gives the tasks of one pool to its workers, and takes them back; in the role of a ``Pool`` (see ``core/roles.py``).

    Owns whether all workers are to be looked at. ``look_soon`` asks for that, because a time has come or an interruption
    may have left something, and the next turn does it before it gives tasks to whoever is free.

    Args:
        peer: What drives it.
        options: What the pool was made with.

    Attributes:
        tasks: The tasks.
        supervisor: The workers.
    """

    def __init__(self, peer: IpcPeer, options: Options) -> None:
        self._loop = loop_of(peer)
        self._loop.check_open()
        self._options = options
        self._capacity = options.in_flight * len(options.commands)  # how many tasks all workers can have
        self._untidy = False  # whether the next turn is to look at all workers
        self._read_until = -math.inf  # what had come by then was read
        self._notice = partial(self._loop.later.setdefault, self)  # has the next turn look at it
        self._answered: dict[Task, Any] = {}  # whose requests have settled, until they are taken from their workers
        self.tasks: Tasks = Tasks(self._loop, peer)
        self.supervisor: Supervisor = Supervisor(peer, options, self.tasks, self)
        self._loop.pools[self] = None

    @property
    def pending(self) -> int:
        """How many tasks are queued or with workers."""
        return sum([task.is_wanted for task in [*self.tasks.queue]]) + len(self._under_way())

    def _under_way(self) -> list[Task]:
        """Return the tasks that workers have and that have not settled."""
        return [task for worker in [*self.supervisor.workers] for task in [*worker.running] if not task.settled]

    @property
    def waits(self) -> bool:
        """Whether something will happen though nothing is open."""
        return self.tasks.first is not None

    def finish(self) -> None:
        """Turn until all tasks have settled that were queued by now. Handlers may queue more for ever."""
        last = self.tasks.count
        until = Until(lambda: not self._has_any_up_to(last))
        if not until.settled:
            self._loop.run(until)

    def _has_any_up_to(self, last: int) -> bool:
        first = self.tasks.first
        return (first is not None and first.number <= last) or any([task.number <= last for task in self._under_way()])

    # -- giving tasks to workers

    def submit(self, task: Task) -> None:
        """Queue a task, and give what is queued to workers that are free. An interrupted call can be made again."""
        self.tasks.enqueue(task)
        if self.tasks.handed_out < self._capacity:
            self._loop.inside(self.give, True)

    def give(self, strict: bool = False) -> None:
        """Give queued tasks to workers that are free, and start workers for the rest. An interrupted call is made again.

        Args:
            strict: Raise what is wrong with the arguments for new workers, which otherwise counts as a death, and leave it
                to a turn to look at workers.
        """
        later = self._loop.later
        if self.tasks.closed:
            later.pop(self, None)
            return
        later[self] = None
        try:
            self._collect()
            self.supervisor.look_for_signs()
            if self._untidy and not strict:
                self._tidy()
            now = self._loop.clock()
            while True:
                task = self.tasks.first
                if task is None or self.tasks.handed_out >= self._capacity:
                    break
                worker = self._find_free(now)
                # A busy one gets another task only if no other is free and none can be started.
                if (worker is None or worker.running) and self.supervisor.start(now, strict):
                    continue
                if worker is None:
                    break
                self._give_to(worker, task)
        except BaseException:  # a signal handler may have given tasks, too, and have been told that a worker is not free
            self.look_soon()
            raise
        if not self._untidy:
            later.pop(self, None)

    def _find_free(self, now: float) -> Worker | None:
        """Return the worker that has the fewest tasks of those that can be sent one."""
        most = self._options.in_flight
        have_room = [worker for worker in [*self.supervisor.workers] if len(worker.running) < most and worker.takes_tasks]
        free = [worker for worker in have_room if not worker.is_clogged]
        if len(free) < len(have_room):
            self.supervisor.set_timer(now)
        return min(free, key=lambda worker: len(worker.running), default=None)

    def _give_to(self, worker: Worker, task: Task) -> None:
        """Give the first task in the queue to a worker."""
        requests = worker.conversation.requests
        sent = Pending(worker)
        sent.requester, sent.timeout, sent.expect, sent.id = requests, task.timeout, task.expect, task.id
        sent.settled, sent.unsent, sent.outcome, sent.callbacks = 0, True, None, None
        # The first two are in C, so that no signal handler's exception comes into them. If one comes into the third, the
        # next turn does what that has left.
        sent.watchers = [partial(self._answered.setdefault, task), self._notice, self._collect]
        try:
            if self.tasks.hand_over(task, worker, sent):
                requests.send(sent, task.message)
                task.deadline = sent.deadline
        except BaseException as exc:
            error = exc if isinstance(exc, Exception) and interruption_in(exc) is None else None
            if (error is not None or sent.unsent) and worker.running.get(task) is sent:  # otherwise a reply will come
                requests.remove(sent)
                self._take_unsent(worker, task, error)
            if error is None:
                raise
        finally:  # whatever has interrupted this: from now on _tidy() finds what was not sent
            # atomic: no calls
            if sent.unsent:
                sent.settled = 1

    def _take_unsent(self, worker: Worker, task: Task, error: Exception | None) -> None:
        """Take a task that was not sent to a worker from it, because of an error or an interruption."""
        if isinstance(error, RequestTimeoutError):  # it does not read
            self._come_back(task, error)
            return
        if isinstance(error, (StreamClosedError, InvalidStreamError)):
            worker.ready = False  # it is dead, or its stream is; its end is on the way
        elif error is not None:  # the task cannot travel
            self.tasks.settle(task, error)
        self.tasks.put_back(task, worker, False)
        task.go_on()

    def _collect(self, promise: Any = None) -> None:
        """Take tasks whose requests have settled from their workers. An interrupted call is made again."""
        for task in [*self._answered]:
            sent = None if task.worker is None else task.worker.running.get(task)
            # What the end of its worker means is decided where that is replaced: never, if handlers are nested too deeply.
            if sent is not None and sent.settled and (
                task.settled or not isinstance(sent.outcome, StreamClosedError) or self._loop.depth > MAX_DEPTH
            ):
                self._come_back(task, sent.outcome)
            self._answered.pop(task, None)

    def _come_back(self, task: Task, outcome: Any) -> None:
        """Take a task from its worker, which has answered it or was too slow. An interrupted call is made again."""
        worker = task.worker
        if worker is not None:
            if not task.settled:
                self.tasks.settle(task, outcome)  # first: the end of the worker gives what it has to another
            if isinstance(outcome, RequestTimeoutError):
                self.supervisor.note_late(worker, task.timeout)
            elif not isinstance(outcome, StreamClosedError):
                self.supervisor.note_answer(worker)
            if worker.has_done_its_share:
                self.look_soon()  # it is replaced behind this reply
            self.tasks.release(task, worker)
        if self.tasks.queue:
            self._loop.later[self] = None
        task.go_on()

    def _replace(self, worker: Worker) -> None:
        """Give what a worker had, whose session is closed, to others, of which one takes its place."""
        if self.tasks.closed:  # by a done callback; a call of close that was interrupted is to find the worker
            return
        had = tuple(worker.running)
        for task in had:
            if task.tries >= self._options.retries:
                self.tasks.settle(task, _end_of(worker, task))
            self.tasks.put_back(task, worker, True)
        self.supervisor.replace(worker)
        for task in had:  # last: done callbacks may wait for what another worker does
            task.go_on()

    # -- what the loop calls

    def look_soon(self) -> None:
        """Have all workers looked at in the next turn."""
        # atomic: no calls
        if not self.tasks.closed:
            self._untidy = True
            self._loop.later[self] = None

    def on_time(self, now: float) -> None:
        """Have workers started, or given up: a time has come."""
        self._read_until = now
        self.look_soon()

    def go_on(self) -> None:
        """Do what was left to a turn, and give tasks to workers."""
        self._collect()
        while not self._loop.users_wait:  # otherwise this is inside of a call that runs no handlers
            self.give()
            if self.tasks.closed or not self._untidy:
                break

    def _tidy(self) -> None:
        """Look at all workers."""
        self._untidy = False  # first: users' functions may leave something
        for worker in [*self.supervisor.workers]:
            if worker.session is None:
                continue
            if not worker.is_set_up:
                self.supervisor.set_up(worker)
            for task, sent in worker.running.copy().items():
                if sent.unsent and sent.settled:  # an interruption has kept it from being put back
                    worker.conversation.requests.remove(sent)
                    self.tasks.put_back(task, worker, False)
            if worker.conversation.reason is not None:
                self._replace(worker)
            else:
                self.supervisor.end_if_due(worker, self._read_until)
        self.supervisor.set_timer(self._loop.clock())

    def close(self, text: str = "this side closed the peer of the worker pool") -> None:
        """Fail all tasks; the text says why. An interrupted call is made again."""
        self.tasks.closed = True
        self._loop.set_timer(self, math.inf)
        for worker in [*self.supervisor.workers]:
            if worker.is_set_up:
                worker.conversation.stop()
        self.tasks.fail([*self._under_way(), *self.tasks.queue], StreamClosedError(text))
        self.tasks.queue.clear()
        self._answered.clear()
        self._loop.later.pop(self, None)
        self._loop.pools.pop(self, None)  # last: an interrupted call is made again

    def close_workers(self, seconds: float | None) -> None:
        """Fail all tasks, and end the workers side by side, within so many seconds or the usual bounds."""
        self.tasks.closed = True  # first: now workers keep their places, where a call after an interrupted one finds them
        text = "this side closed the worker pool"
        workers = []
        for worker in [*self.supervisor.workers]:
            if worker.session is not None:
                worker.conversation = conversation_of(worker.session)  # setting it up may have been interrupted
                workers.append(worker)
        due = None if seconds is None else monotonic() + seconds
        try:
            self.close(text)
        finally:  # a done callback may have been interrupted
            for worker in workers:
                worker.close(text)
        # Side by side; session.close() would do it one by one, and hurry each anew.
        teardowns = self._loop.chores.teardowns
        mine = {worker.conversation.teardown for worker in [*workers, *self.supervisor.ending]}
        teardowns.wait([teardown for teardown in [*teardowns.all] if teardown in mine], due, background=False)


def _end_of(worker: Worker, task: Task) -> StreamClosedError:
    """Return the error for a task whose worker has ended, and that no other is given."""
    reason = worker.conversation.reason
    assert reason is not None
    error = unraised(reason)
    if task.tries:
        error.args = (f"{task.tries + 1} workers ended while they had this task; the last one: {reason}",)
    return error
