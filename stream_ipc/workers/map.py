"""Many tasks of a pool, read and given to it little by little.

Knows promises and the tasks behind them. Must not know workers.
"""

from __future__ import annotations

from collections import deque

from ..core.loop import Loop, Until
from ..interruptions import pass_on
from ..promise import pending_of
from ..waiting import stray_stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from ..messages import Message
    from ..promise import ResponsePromise

__all__ = ["MapIterator"]


class MapIterator:
    """An iterator over replies and no generator: after an error, ``next()`` goes on.

    Args:
        source: The tasks.
        make: Makes the promise of one.
        give: Queues the task of a promise, and gives what is queued to workers. An interrupted call can be made again.
        loop: What turns until there are replies.
        ordered: Whether replies come in the order of the tasks.
        ahead: How many tasks are submitted and not yielded at most.
    """

    def __init__(
        self,
        source: Iterator[Message],
        make: Callable[[Message], ResponsePromise[Any]],
        give: Callable[[ResponsePromise[Any]], None],
        loop: Loop,
        ordered: bool,
        ahead: int,
    ) -> None:
        self._source = source
        self._make = make
        self._give = give
        self._message: Message | None = None  # what was read and has no promise yet
        self._loop = loop
        self._ahead = ahead
        self._ordered = ordered
        self._under_way: dict[ResponsePromise[Any], None] = {}  # in the order of the tasks
        # In the order of settling. What was yielded last stays until there is another to wait for: if a handler has taken
        # it, the wait around that handler ends nevertheless.
        self._ready: deque[ResponsePromise[Any]] = deque()
        self._any_ready = Until(self._ready.__len__)
        self._end: BaseException | None = None  # what is raised once all is yielded: the input has ended

    def __iter__(self) -> MapIterator:
        return self

    def __next__(self) -> Any:
        under_way, ready = self._under_way, self._ready
        while True:  # again if what was there was taken, by a handler that has called next() meanwhile
            self._submit()
            for promise in under_way:
                break
            else:
                end = self._end
                self._end = StopIteration()
                raise end or StopIteration
            while True:
                # atomic: no calls
                if ready and ready[0] not in under_way:  # it was yielded, or came to nothing
                    del ready[0]
                else:
                    break

            until = pending_of(promise) if self._ordered else self._any_ready
            try:
                if not until.settled:
                    self._loop.run(until)
            except StopIteration as exc:
                raise stray_stop() from exc
            if not self._ordered and ready:
                promise = ready[0]
            if promise.settled:
                outcome = pending_of(promise).outcome
                failed = isinstance(outcome, BaseException)
                # atomic: no calls
                if promise in under_way:
                    del under_way[promise]
                    if not failed:
                        return outcome
                    else:
                        outcome.__traceback__ = None
                        raise outcome

    def _submit(self) -> None:
        """Submit as many tasks as may be under way."""
        under_way = self._under_way
        promise: Any
        for promise in reversed(under_way):  # the last task may have been kept from the queue by an interruption
            if not pending_of(promise).number:
                self._give(promise)
            break
        while self._end is None and len(under_way) < self._ahead:
            promise = None
            try:
                if self._message is None:
                    for self._message in self._source:  # stored before a signal is looked at
                        break
                    else:
                        self._end = StopIteration()
                        break
                message = self._message
                promise = self._make(message)
                task: Any = pending_of(promise)
                task.optional = True
                if not self._ordered:
                    task.watch(self._ready.append)
                # atomic: no calls
                if self._message is message:
                    under_way[promise] = None
                    self._message = None
                else:
                    continue  # the id generator has called next()

                self._give(promise)
            except Exception as exc:
                pass_on(exc)
                under_way.pop(promise, None)
                self._end = stray_stop() if isinstance(exc, StopIteration) else exc  # raised behind all before it
                break
