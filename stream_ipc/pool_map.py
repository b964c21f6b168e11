"""Many tasks of a pool, read and given to it little by little.

Knows promises and the tasks behind them. Must not know workers.
"""

from __future__ import annotations

from itertools import islice

from .interruptions import pass_on
from .promise import is_settled, pending_of
from .waiting import stray_stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from .promise import ResponsePromise
    from .tasks import Tasks

__all__ = ["Mapped"]


class Mapped:
    """An iterator over replies and no generator: after an error, ``next()`` goes on.

    Args:
        source: The tasks.
        make: Makes the promise of one, whose task goes into the queue then.
        give: Called with the promise after that; gives what is queued to workers.
        tasks: Has the queue.
        ordered: Whether replies come in the order of the tasks.
        ahead: How many tasks are submitted and not yielded at most.
    """

    def __init__(
        self,
        source: Iterator[Any],
        make: Callable[[Any], Any],
        give: Callable[[Any], Any],
        tasks: Tasks,
        ordered: bool,
        ahead: int,
    ) -> None:
        self._source = source
        self._make = make
        self._give = give
        self._message: Any = None  # what was read and is not submitted
        self._tasks = tasks
        self._ahead = ahead
        self._looked_at = 1 if ordered else ahead  # so many of those under way may be yielded next
        self._under_way: dict[ResponsePromise[Any], None] = {}  # in the order of the tasks
        self._end: BaseException | None = None  # what is raised once all is yielded: the input has ended

    def __iter__(self) -> Mapped:
        return self

    def __next__(self) -> Any:
        under_way = self._under_way
        while True:  # again if what was there was taken, by a handler that has called next() meanwhile
            self._submit()
            if not under_way:
                end = self._end
                self._end = StopIteration()
                raise end or StopIteration
            try:
                if not self.settled:
                    self._tasks.loop.run(self)
            except StopIteration as exc:
                raise stray_stop() from exc
            promise = next(filter(is_settled, islice(under_way, self._looked_at)), None)
            if promise is not None:
                break
        error = reply = None
        try:
            reply = promise.wait()
        except Exception as exc:
            pass_on(exc)
            error = exc
        # atomic: no calls
        del under_way[promise]
        if error is not None:
            raise error
        return reply

    @property
    def settled(self) -> bool:
        """Whether a reply can be yielded, or all were taken; what the loop's ``run`` looks at."""
        return any(map(is_settled, islice(self._under_way, self._looked_at))) or not self._under_way

    def _submit(self) -> None:
        """Submit as many tasks as may be under way."""
        under_way = self._under_way
        queue = self._tasks.queue
        while self._end is None and len(under_way) < self._ahead:
            promise: Any = None
            try:
                if self._message is None:
                    for self._message in self._source:  # stored before a signal is looked at
                        break
                    else:
                        self._end = StopIteration()
                        break
                promise = self._make(self._message)
                task: Any = pending_of(promise)
                task.optional = True
                # atomic: no calls
                queue += (task,)
                under_way[promise] = None
                self._message = None

                self._give(promise)
            except Exception as exc:  # raised once everything before it is yielded
                pass_on(exc)
                under_way.pop(promise, None)
                self._end = stray_stop() if isinstance(exc, StopIteration) else exc
                break
