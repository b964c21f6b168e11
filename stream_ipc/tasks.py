"""The tasks of a pool, and the attempts of workers at them.

Knows pending requests. Must not know who chooses a worker for a task, nor what becomes of workers: see ``Crew``.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from itertools import islice

from .core.pending import Pending, next_moment
from .errors import IpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any
    from weakref import ref

    from .core.conversation import Conversation
    from .core.loop import Loop
    from .messages import Message
    from .worker import Worker

__all__ = ["Attempt", "Task", "Tasks"]


class Task(Pending):
    """A task and, once it has settled, its outcome: what the promise of ``submit`` refers to.

    Attributes:
        requester: The tasks of its pool.
        number: How many were queued before it, and itself; 0 until it is queued.
        message: What workers get.
        attempt: The request by which a worker has it, or None.
        tries: How many workers have ended while they had it.
        optional: It need not be begun if its promise was dropped.
    """

    __slots__ = ("attempt", "message", "number", "optional", "tries")

    requester: Tasks
    number: int
    message: Message
    attempt: Attempt | None
    tries: int
    optional: bool

    @property
    def conversation(self) -> Conversation | None:
        return None if self.attempt is None else self.attempt.requester.conversation

    @property
    def is_wanted(self) -> bool:
        """Whether it is still to be begun."""
        return not self.settled and not (self.optional and self() is None)


class Tasks:
    """The tasks of a pool that no worker has, and the ``Requester`` of all of them (see ``core/pending.py``).

    Owns the queue, out of which a crew takes the first as it gives that to a worker.

    Args:
        loop: What drives it.
        peer: Whose ``id_generator`` it uses.

    Attributes:
        loop: As above.
        queue: Tasks that no worker has, and some that have settled.
        watchers: Weak references to what has a method ``note``, which gets each promise that settles.
        closed: Whether none can be queued any more.
    """

    conversation: None = None  # each worker has its own

    def __init__(self, loop: Loop, peer: Any) -> None:
        self.loop = loop
        self.queue: deque[Task] = deque()
        self.watchers: set[ref[Any]] = set()
        self.closed: bool = False
        self._peer = peer
        self._count = 0  # how many were queued in all
        self._untold: dict[Task, None] = {}  # those that have settled, until everybody who waits was told

    def request(self, promise: Any, message: Message, timeout: float | None, expect: type) -> Task:
        """Make a task, whose outcome is for the promise. It is still to be queued."""
        task = Task(promise)
        task.requester = self
        task.message = message
        task.timeout = timeout
        task.expect = expect
        task.attempt = task.deadline = task.outcome = task.watchers = task.callbacks = None
        task.settled = task.tries = task.number = 0
        task.optional = False
        task.id = self._peer.id_generator.generate()
        return task

    def enqueue(self, task: Task) -> None:
        """Queue a task, unless that was done before. An interrupted call can be made again.

        Raises:
            RuntimeError: The pool is closed.
        """
        # atomic: no calls
        if task.number:
            return
        if not self.closed:
            self._count = task.number = self._count + 1
            self.queue += (task,)
            return

        raise RuntimeError("this WorkerPool is closed; make a new one")

    def close(self) -> None:
        """Queue no more. The caller fails what is queued next."""
        self.closed = True

    def silence(self, task: Task, timeout: float | None) -> str:
        """Return the text of a timeout."""
        return f"no reply to task {task.id} within {timeout} s (worker pool)"

    @property
    def first(self) -> Task | None:
        """The first in the queue that is still to be begun. Those before it are dropped."""
        queue = self.queue
        while queue:
            task = queue[0]
            if task.is_wanted:
                return task
            # atomic: no calls
            if queue and queue[0] is task:
                del queue[0]
        return None

    def has_more_than(self, count: int) -> bool:
        """Return whether more than so many are still to be begun. Those before these that are not are dropped."""
        queue = self.queue
        while len(queue) > count:
            unwanted = [task for task in tuple(islice(queue, count + 1)) if not task.is_wanted]
            if not unwanted:
                return True
            for task in unwanted:
                with suppress(ValueError):  # a signal handler has looked, too
                    queue.remove(task)
        return False

    def cancel(self, task: Task) -> bool:
        """Give a task up; returns whether it was still pending. A worker that has it goes on, and comes back as usual."""
        if task.settled:
            return False
        error = IpcError(f"task {task.id} was cancelled by this side")
        self.loop.repairs[self] = None  # first: an interrupted call is gone on with by the next turn
        cancelled = self.settle(task, error)
        self.repair()
        return cancelled

    def settle(self, task: Task, outcome: Any) -> bool:
        """Take note of the outcome of a task, unless it has one; returns whether that is so. Telling of it comes next."""
        moment = next_moment()
        # atomic: no calls
        if task.settled:
            return False
        task.outcome = outcome
        task.settled = moment
        self._untold[task] = None
        return True

    def tell(self, task: Task) -> None:
        """Tell those that wait for a task that has settled. An interrupted call can be made again."""
        if task in self._untold:
            if task.watchers is not None or self.watchers:
                task.tell()
            self._untold.pop(task, None)

    def repair(self) -> None:
        """Do the same for all. An interrupted call can be made again."""
        for task in tuple(self._untold):
            self.tell(task)
        self.loop.repairs.pop(self, None)

    def fail_queued(self, error: BaseException) -> None:
        """Fail what is queued. All settle first: a done callback may wait for any of them."""
        queue = self.queue
        self.loop.repairs[self] = None
        for task in tuple(queue):
            self.settle(task, error)
            if queue and queue[0] is task:
                del queue[0]
        self.repair()

    def put_back(self, attempt: Attempt, tried: bool) -> None:
        """Queue a task that a worker has again, in its place: before all others but those that were submitted earlier.

        An interrupted call can be made again, and may leave it at another place.
        """
        task, worker, queue = attempt.task, attempt.worker, self.queue
        # atomic: no calls
        if attempt in worker.running:
            del worker.running[attempt]
            worker.given -= 1
            task.tries += tried
            task.attempt = task.deadline = None
            queue += (task,)

        if queue and queue[-1] is task:
            queue.rotate(1)
        place = 0
        try:
            while True:
                # atomic: no calls
                earlier = queue[place + 1]
                if queue[place] is not task or task.number < earlier.number:
                    break
                queue[place], queue[place + 1] = earlier, task
                place += 1
        except IndexError:  # it is the last, or a signal handler has given some
            pass


class Attempt(Pending):
    """The request by which a worker has a task.

    It is apart from the task, which may settle before it, by ``cancel()``, or after another attempt.

    Attributes:
        task: The task.
        worker: What has it.
        take: Called with this once it has settled.
        unsent: Is true until it is handed over: the task, then the frame, which is empty from then on.
    """

    __slots__ = ("take", "task", "unsent", "worker")

    task: Task
    worker: Worker
    take: Callable[[Attempt], None]
    unsent: Any

    @classmethod
    def make(cls, task: Task, worker: Worker, take: Callable[[Attempt], None]) -> Attempt:
        """Make one that is still to be sent."""
        attempt = cls(worker)
        attempt.task = attempt.unsent = task
        attempt.worker = worker
        attempt.take = take
        attempt.id = task.id
        attempt.expect = task.expect
        attempt.timeout = task.timeout
        attempt.requester = worker.conversation.requests
        attempt.deadline = attempt.outcome = attempt.callbacks = None
        attempt.watchers = []  # not None, so that ``tell`` is called
        attempt.settled = 0
        return attempt

    def tell(self) -> None:
        self.take(self)
