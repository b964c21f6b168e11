"""Many tasks of a pool, read and given to it little by little.

Knows promises and the tickets behind them. Must not know the pool.
"""

from __future__ import annotations

from collections import deque

from .interruptions import pass_on
from .promise import pending_of
from .waiting import stray_stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from .core.tickets import Desk
    from .promise import ResponsePromise

__all__ = ["Mapped"]


class Mapped:
    """An iterator over replies and no generator: after an error, ``next()`` goes on.

    Args:
        source: The tasks.
        make: Makes the promise of one, whose ticket goes into the queue then.
        give: Called with the promise after that; gives what is queued to workers.
        desk: Has the queue.
        ordered: Whether replies come in the order of the tasks.
        ahead: How many tasks are submitted and not yielded at most.
    """

    def __init__(
        self,
        source: Iterator[Any],
        make: Callable[[Any], Any],
        give: Callable[[Any], Any],
        desk: Desk,
        ordered: bool,
        ahead: int,
    ) -> None:
        self._source = source
        self._make = make
        self._give = give
        self._task: Any = None  # what was read and is not submitted
        self._desk = desk
        self._ahead = ahead
        self._ordered = ordered
        self._under_way: dict[ResponsePromise[Any], None] = {}
        self._ready: deque[ResponsePromise[Any]] = deque()
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
                promise = self._await_first() if self._ordered else self._await_any()
            except StopIteration as exc:
                raise stray_stop() from exc
            if promise in under_way:
                break
        error = reply = None
        try:
            reply = promise.wait()
        except Exception as exc:
            pass_on(exc)
            error = exc
        # atomic: no calls
        del under_way[promise]
        if not self._ordered:
            del self._ready[0]
        if error is not None:
            raise error
        return reply

    def _await_first(self) -> Any:
        """Turn until the first has settled, and return it."""
        for promise in self._under_way:
            break
        pending = pending_of(promise)
        if not pending.settled:
            self._desk.run_until(lambda: pending.settled)
        return promise

    def _await_any(self) -> Any:
        """Turn until any has settled, and return it; None if there is none."""
        under_way = self._under_way
        ready = self._ready
        while ready and ready[0] not in under_way:  # it came to nothing
            del ready[0]
        if not ready:
            self._desk.run_until(lambda: bool(ready) or not under_way)
        return ready[0] if ready else None

    def _submit(self) -> None:
        """Submit as many tasks as may be under way."""
        under_way = self._under_way
        queue = self._desk.queue
        while self._end is None and len(under_way) < self._ahead:
            promise: Any = None
            try:
                if self._task is None:
                    for self._task in self._source:  # stored before a signal is looked at
                        break
                    else:
                        self._end = StopIteration()
                        break
                promise = self._make(self._task)
                ticket: Any = pending_of(promise)
                ticket.optional = True
                if not self._ordered:
                    ticket.watch(self._ready.append)
                # atomic: no calls
                queue += (ticket,)
                under_way[promise] = None
                self._task = None

                self._give(promise)
            except Exception as exc:  # raised once everything before it is yielded
                pass_on(exc)
                under_way.pop(promise, None)
                self._end = stray_stop() if isinstance(exc, StopIteration) else exc
                break
