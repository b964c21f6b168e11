"""Many tasks of a pool, read and given to it little by little.

Knows promises. Must not know the pool.
"""

from __future__ import annotations

from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .promise import ResponsePromise

__all__ = ["Mapped"]


class Mapped:
    """An iterator over replies and no generator: after an error, ``next()`` goes on.

    Args:
        submit: Submits the next task; raises what the iterator over the tasks raises.
        run_until: Turns until a function returns true.
        ordered: Whether replies come in the order of the tasks.
        ahead: How many tasks are submitted and not yielded at most.
    """

    def __init__(self, submit: Callable[[], Any], run_until: Callable[..., Any], ordered: bool, ahead: int) -> None:
        self._submit = submit
        self._run_until = run_until
        self._ahead = ahead
        self._ordered = ordered
        self._under_way: dict[ResponsePromise[Any], None] = {}
        self._ready: deque[ResponsePromise[Any]] = deque()
        self._end: BaseException | None = None  # what has ended the input

    def __iter__(self) -> Mapped:
        return self

    def __next__(self) -> Any:
        under_way = self._under_way
        while self._end is None and len(under_way) < self._ahead:
            try:
                promise = self._submit()
            except Exception as exc:  # StopIteration, too: raised once everything before it is yielded
                self._end = exc
                break
            # atomic: no calls
            under_way[promise] = None
            if not self._ordered:
                promise.add_done_callback(self._ready.append)
        if not under_way:
            end = self._end
            self._end = StopIteration()
            raise end or StopIteration
        if self._ordered:
            for promise in under_way:
                break
        else:
            ready = self._ready
            if not ready:
                self._run_until(lambda: bool(ready))
            promise = ready[0]
        try:
            return promise.wait()
        finally:
            if promise.settled:
                under_way.pop(promise, None)
                if self._ready and self._ready[0] is promise:
                    del self._ready[0]
