"""The tasks of a pool: those in its queue, and those that workers have.

Knows pending requests. Must not know who chooses a worker for a task, nor what becomes of workers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from itertools import islice
from operator import attrgetter

from ..core.pending import Pending
from ..errors import IpcError
from ..ids import check_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any
    from weakref import ref

    from ..core.conversation import Conversation
    from ..core.loop import Loop
    from ..core.roles import Settings
    from ..messages import Message
    from .worker import Worker

__all__ = ["Task", "Tasks"]

_number = attrgetter("number")


class Task(Pending):
    """What the promise of ``submit`` refers to. Each worker that gets it gets a request of its own.

    It may have settled before that, by ``cancel()``: the worker is busy with it all the same.

    Attributes:
        requester: The tasks of its pool.
        number: Its place in the order of submission, from 1; 0 until it is queued.
        message: What workers get.
        worker: What has it, or None.
        tries: How many workers have ended while they had it.
        optional: It need not be begun if its promise was dropped.
    """

    __slots__ = ("message", "number", "optional", "tries", "worker")

    requester: Tasks
    number: int
    message: Message
    worker: Worker | None
    tries: int
    optional: bool

    @property
    def conversation(self) -> Conversation | None:
        worker = self.worker
        return None if worker is None else worker.conversation

    @property
    def is_wanted(self) -> bool:
        """Whether it is still to be begun."""
        return not self.settled and self.worker is None and not (self.optional and self() is None)


class Tasks:
    """The tasks of a pool, and the ``Requester`` of all of them (see ``core/roles.py``).

    Owns where each is: in the queue, or with a worker, whose ``running`` and ``given`` say so. It changes its place in one
    step, so that no interruption finds it in both or in neither.

    Args:
        loop: What drives it.
        peer: Whose ``id_generator`` it uses.

    Attributes:
        loop: As above.
        observers: Weak references to what has a method ``note``, which gets each promise that settles.
        closed: Whether none can be queued any more.
        count: How many were queued in all.
        handed_out: How many tasks workers have.
    """

    conversation: None = None  # each worker has its own
    pending_class = Task

    def __init__(self, loop: Loop, peer: Settings) -> None:
        self.loop = loop
        self.observers: set[ref[Any]] = set()
        self.closed: bool = False
        self.count: int = 0
        self.handed_out: int = 0
        self._peer = peer
        self._queue: deque[Task] = deque()
        self._back: list[Task] = []  # those that are still to get their places in the queue

    def send(self, task: Task, message: Message) -> None:
        """Give a new task its message. It is still to be queued.

        Raises:
            ValueError: The id cannot be used.
        """
        task.message = message
        task.worker = task.deadline = None
        task.tries = task.number = 0
        task.optional = False
        ids = self._peer.id_generator
        task.id = ids.generate()
        check_id(ids, task.id)

    def enqueue(self, task: Task) -> None:
        """Queue a task, unless that was done before. An interrupted call can be made again.

        Raises:
            RuntimeError: The pool is closed.
        """
        # atomic: no calls
        if not task.number and not self.closed:
            self.count = task.number = self.count + 1
            self._queue += (task,)

        if not task.number:
            raise RuntimeError("this WorkerPool is closed; make a new one")

    def hand_over(self, task: Task, worker: Worker, sent: Pending) -> bool:
        """Give the first task in the queue to a worker; returns whether it is. The request for it is still to be sent."""
        queue = self.queue
        # atomic: no calls
        if queue and queue[0] is task and task.worker is None:
            del queue[0]
            task.worker = worker
            worker.running[task] = sent
            worker.given += 1
            self.handed_out += 1
            return True

        return False  # a finalizer has used the pool

    def put_back(self, task: Task, worker: Worker, tried: bool) -> None:
        """Queue a task that a worker has again, before those submitted later. An interrupted call can be made again.

        Args:
            task: The task.
            worker: The worker.
            tried: Whether the worker has ended over it, or only was not sent it.
        """
        # atomic: no calls
        if task in worker.running:
            del worker.running[task]
            worker.given -= 1
            self.handed_out -= 1
            task.tries += tried
            task.worker = task.deadline = None
            self._back += (task,)

    def release(self, task: Task, worker: Worker) -> None:
        """Take a task that has settled from its worker. An interrupted call can be made again."""
        # atomic: no calls
        if task in worker.running:
            del worker.running[task]
            self.handed_out -= 1
            task.worker = None

    def timeout_text(self, task: Task, timeout: float | None) -> str:
        return f"no reply to task {task.id} within {timeout} s (worker pool)"

    @property
    def queue(self) -> deque[Task]:
        """Tasks that no worker has, in the order in which they were submitted, and some that are not wanted."""
        while True:
            for task in reversed(self._back):
                break
            else:
                return self._queue
            place = bisect_left(self._queue, task.number, key=_number)
            if [*islice(self._queue, place, place + 1)] != [task]:  # where an interruption may have left it
                self._queue.insert(place, task)
            # atomic: no calls
            if self._back and self._back[-1] is task:
                del self._back[-1]

    @property
    def first(self) -> Task | None:
        """The first in the queue that is still to be begun. Those before it are dropped."""
        queue = self.queue
        while True:
            for task in queue:  # not queue[0] behind a look whether there is one: a signal handler may take that
                break
            else:
                return None
            if task.is_wanted:
                return task
            # atomic: no calls
            if queue and queue[0] is task:
                del queue[0]

    def has_more_than(self, count: int) -> bool:
        """Return whether more than so many are still to be begun."""
        wanted = (task for task in [*self.queue] if task.is_wanted)
        return len([*islice(wanted, count + 1)]) > count

    def cancel(self, task: Task) -> bool:
        """Give a task up; returns whether it was still pending. A worker that has it goes on, and comes back as usual."""
        cancelled = self.settle(task, IpcError(f"task {task.id} was cancelled by this side"))
        task.go_on()
        return cancelled

    def settle(self, task: Task, outcome: Any) -> bool:
        """Take note of the outcome of a task, unless it has one; returns whether it had none. Its ``go_on`` tells of it."""
        self.loop.later[task] = None  # first: a turn goes on after an interruption
        return task.settle(outcome)

    def fail(self, tasks: Iterable[Task], error: BaseException) -> None:
        """Fail many. All settle first: a done callback may wait for any of them."""
        tasks = tuple(tasks)
        for task in tasks:
            self.settle(task, error)
        for task in tasks:
            task.go_on()
