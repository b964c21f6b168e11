"""The scheduler of a pool: which worker has which task.

Knows the workers and the tasks, the conversations over which tasks are sent, and the loop, which calls it when a time has
come. Must not know how a worker is started, nor processes.
"""

from __future__ import annotations

import math
from functools import partial

from ..clock import monotonic
from ..core.until import Until
from ..errors import InvalidStreamError, RequestTimeoutError, StreamClosedError, unraised
from ..interruptions import interruption_in
from ..messages import Message
from ..peer import loop_of
from ..session import conversation_of
from .supervisor import Supervisor
from .tasks import Task, Tasks
from .worker import Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from ..peer import IpcPeer
    from ..session import Session
    from ..transports.spawn import Command

__all__ = ["Scheduler"]


class Scheduler:
    """Gives the tasks of one pool to its workers, and takes them back.

    Owns which worker has which task. A task that is in the queue of ``tasks`` comes to a worker in ``_give_to``, and back
    in ``Tasks.put_back``, so that no interruption finds it in both or in neither.

    ``go_on``, which the loop calls in the turn after this was put into its ``later``, gives tasks to whoever is free. After
    a ``check`` it looks first at all workers for what is to be done with them, be it that a time has come or that an
    interruption has left it.

    Args:
        peer: What drives it.
        commands: The command of each worker.
        options: Further arguments of ``create_command_session``.
        retries: As in ``WorkerPool``, and so are the others.

    Attributes:
        size: How many workers there are at most.
        in_flight: How many tasks a worker has at a time at most.
        tasks: The tasks.
        supervisor: The workers.
    """

    def __init__(
        self,
        peer: IpcPeer,
        commands: list[Command],
        options: Mapping[str, Any],
        *,
        retries: int,
        tasks_per_worker: int | None,
        in_flight: int,
        on_session: Callable[[Session], Any] | None,
        hello: type[Message] | None,
        start_timeout: float | None,
    ) -> None:
        self._loop = loop_of(peer)
        self._loop.check_open()
        self._retries = retries
        self._tasks_per_worker = tasks_per_worker
        self.in_flight: int = in_flight
        self.size: int = len(commands)
        self._untidy = False  # whether the next turn is to look at all workers
        self._sending: dict[Task, None] = {}  # what calls are giving to workers now
        self.tasks: Tasks = Tasks(self._loop, peer, self.take)
        self.supervisor: Supervisor = Supervisor(
            partial(peer.create_command_session, **options),
            commands,
            self.tasks,
            partial(self._loop.later.setdefault, self),
            self.check,
            partial(self._loop.set_timer, self),
            on_session=on_session,
            hello=hello,
            start_timeout=start_timeout,
        )
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
        """Turn until all tasks have settled."""
        until = Until(lambda: self.tasks.first is None and not self._under_way())
        if not until.settled:
            self._loop.run(until)

    # -- giving tasks to workers

    def submit(self, task: Task) -> None:
        """Queue a task, and give what is queued to workers that are free. An interrupted call can be made again."""
        self.tasks.enqueue(task)
        if self.supervisor.free or self.supervisor.vacant:
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
            self.supervisor.hear()
            if self._untidy and not strict:
                self._tidy()
            now = self._loop.clock()
            while True:
                task = self.tasks.first
                if task is None:
                    break
                worker = self._find_free()
                # A busy one gets another task only if no other is free and none can be started.
                if (worker is None or worker.running) and self.supervisor.vacant and self.supervisor.start(now, strict):
                    continue
                if worker is None:
                    break
                self._give_to(worker, task)
        except BaseException:  # a signal handler may have given tasks, too, and have been told that a worker is not free
            self.check()
            raise
        if not self._untidy:
            later.pop(self, None)

    def _find_free(self) -> Worker | None:
        """Return a worker that can take a task, one that has as few as any."""
        free = self.supervisor.free
        while free:
            if self.in_flight > 1:
                worker = min([*free], key=lambda worker: len(worker.running), default=None)
                if worker is None:
                    break
            else:
                for worker in free:  # not next(iter(free)): it raises if a signal handler adds one
                    break
                else:
                    break
            if worker.can_take(self.in_flight, self._tasks_per_worker):
                return worker
            if worker.is_clogged:
                self.supervisor.set_timer(self._loop.clock())
            if not worker.can_take(self.in_flight, self._tasks_per_worker):
                free.pop(worker, None)
        return None

    def _give_to(self, worker: Worker, task: Task) -> None:
        """Give the first task in the queue to a worker."""
        queue, free = self.tasks.queue, self.supervisor.free
        requests = worker.conversation.requests
        try:
            # atomic: no calls
            if queue and queue[0] is task and task.worker is None:
                del queue[0]
                task.worker = worker
                task.unsent = True
                self._sending[task] = None
                worker.running[task] = None
                worker.given += 1
                if self.in_flight == 1 and worker in free:
                    del free[worker]  # not to be asked again, though it would be found out
            else:
                return  # a finalizer has used the pool

            requests.send(task, task.message)
        except BaseException as exc:
            error = exc if isinstance(exc, Exception) and interruption_in(exc) is None else None
            if task.worker is worker and (error or task.unsent):  # otherwise another has it, or a reply will come
                requests.remove(task)
                self._take_unsent(worker, task, error)
            if error is None:
                raise
        finally:  # whatever it has interrupted: from now on _tidy() finds what was not sent
            # atomic: no calls
            if task in self._sending:
                del self._sending[task]

    def _take_unsent(self, worker: Worker, task: Task, error: Exception | None) -> None:
        """Take a task that was not sent to a worker from it, because of an error or an interruption."""
        if isinstance(error, RequestTimeoutError):  # it does not read
            self.take(task, error)
            return
        if isinstance(error, (StreamClosedError, InvalidStreamError)):
            worker.ready = False  # it is dead, or its stream is; its end is on the way
        elif error is not None:  # the task cannot travel
            self.tasks.settle(task, error)
        self.tasks.put_back(worker, task, False)
        self.supervisor.free[worker] = None
        task.go_on()

    def take(self, task: Task, outcome: Any) -> None:
        """Take a task from its worker, which has answered it or was too slow. An interrupted call is made again."""
        worker = task.worker
        if worker is not None:
            late, ended = isinstance(outcome, RequestTimeoutError), isinstance(outcome, StreamClosedError)
            if not task.settled:
                self.tasks.settle(task, outcome)  # first: the end of the worker gives what it has to another
            if late and worker.conversation.is_open:
                worker.came_up = True
                worker.kill(f"the worker was killed, because a task took longer than {task.timeout} s")
            if not late and not ended:
                self.supervisor.note_answer(worker)
            # atomic: no calls
            if task in worker.running:
                del worker.running[task]
                task.worker = None
                self.supervisor.free[worker] = None
                if worker.given == self._tasks_per_worker:  # it is replaced behind this reply
                    self._untidy = True
                    self._loop.later[self] = None

        if self.tasks.queue:
            self._loop.later[self] = None
        task.go_on()

    def _replace(self, worker: Worker) -> None:
        """Give what a worker had, whose session is closed, to others, of which one takes its place."""
        if self.tasks.closed:  # by a done callback; a call of close that was interrupted is to find the worker
            return
        had = tuple(worker.running)
        for task in had:
            if task.tries >= self._retries:
                self.tasks.settle(task, _end_of(worker, task))
            self.tasks.put_back(worker, task, True)
        self.supervisor.replace(worker)
        for task in had:  # last: done callbacks may wait for what another worker does
            task.go_on()

    # -- what the loop calls

    def check(self) -> None:
        """Have all workers looked at in the next turn."""
        # atomic: no calls
        if not self.tasks.closed:
            self._untidy = True
            self._loop.later[self] = None

    def on_time(self, now: float) -> None:
        """Have workers started, or given up: a time has come."""
        self.check()

    def go_on(self) -> None:
        """Do what was left to a turn, and give tasks to workers."""
        while not self._loop.users_wait:  # otherwise this is inside of a call that runs no handlers
            self.give()
            if self.tasks.closed or not self._untidy:
                break

    def _tidy(self) -> None:
        """Look at all workers."""
        # atomic: no calls
        self._untidy = False  # first: users' functions may leave something

        self.supervisor.look_anew()
        now = self._loop.clock()
        for worker in [*self.supervisor.workers]:
            if worker.session is None:
                continue
            if worker.conversation is None:
                self.supervisor.set_up(worker)
            for task in [*worker.running]:
                if task.unsent and task not in self._sending:  # an interruption has kept it from being put back
                    worker.conversation.requests.remove(task)
                    self.tasks.put_back(worker, task, False)
            if worker.conversation.reason is not None:
                self._replace(worker)
            elif worker.due <= now:
                self.supervisor.give_up(worker)
            elif worker.given == self._tasks_per_worker and not worker.running:
                worker.close("this side replaces the worker, which has done its share of tasks")
        self.supervisor.set_timer(now)

    def close(self, text: str = "this side closed the peer of the worker pool") -> None:
        """Fail all tasks; the text says why. An interrupted call is made again."""
        self.tasks.closed = True
        self._loop.set_timer(self, math.inf)
        for worker in [*self.supervisor.workers]:
            if worker.conversation is not None:
                worker.conversation.stop()
        self.tasks.fail([*self._under_way(), *self.tasks.queue], StreamClosedError(text))
        self.tasks.queue.clear()
        self._loop.later.pop(self, None)
        self._loop.pools.pop(self, None)  # last: an interrupted call is made again

    def close_workers(self, seconds: float | None) -> None:
        """Fail all tasks, and end the workers side by side, within so many seconds or the usual bounds."""
        loop = self._loop
        self.tasks.closed = True  # first: now workers keep their places, where a call after an interrupted one finds them
        text = "this side closed the worker pool"
        workers = [worker for worker in [*self.supervisor.workers] if worker.session is not None]
        for worker in workers:
            worker.conversation = conversation_of(worker.session)  # an interruption may have kept it from being set up
        due = None if seconds is None else monotonic() + seconds
        try:
            self.close(text)
        finally:  # a done callback may have been interrupted
            for worker in workers:
                worker.close(text)
        # Side by side; session.close() would do it one by one, and hurry each anew.
        teardowns = loop.chores.teardowns
        mine = [worker.conversation.teardown for worker in workers]
        teardowns.wait([teardown for teardown in mine if teardown in teardowns.all], due, background=False)
        for worker in workers:
            worker.conversation.close()


def _end_of(worker: Worker, task: Task) -> StreamClosedError:
    """Return the error for a task whose worker has ended, and that no other is given."""
    reason: StreamClosedError = worker.conversation.reason
    error = unraised(reason)
    if task.tries:
        error.args = (f"{task.tries + 1} workers ended while they had this task; the last one: {reason}",)
    return error
