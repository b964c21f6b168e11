"""Timers: what is due by the clock, and how long dispatching may go on before that has its turn.

Knows times, and tasks by their ``on_time``. Must not know what a task does.
"""

from __future__ import annotations

import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Timers", "end_of_share"]

SHARE = 0.1  # seconds


def end_of_share(clock: Callable[[], float], end: float = 0) -> float:
    """Return when dispatching has to stop so that descriptors and times have their turn; 0 if that is now.

    Args:
        clock: The loop's.
        end: What an earlier call has returned; 0 to begin.
    """
    now = clock()
    if not end:
        return now + SHARE
    return end if now < end else 0


class Timers:
    """Tasks, and when each is due.

    Attributes:
        soonest: Nothing is due earlier.
    """

    def __init__(self) -> None:
        self.soonest: float = -math.inf
        self._due: dict[Any, float] = {}

    def set(self, task: Any, when: float | None) -> None:
        """Have a task called at a time; None or infinity for not at all."""
        if when is None or when == math.inf:
            self._due.pop(task, None)
        else:
            self._due[task] = when
            if when < self.soonest:
                self.soonest = when

    def call(self, now: float, bound: float) -> None:
        """Call what is due, and find out anew what ``soonest`` is, at most ``bound``."""
        for task, when in tuple(self._due.items()):
            if when <= now and self._due.get(task) == when:
                self._due[task] = -math.inf  # it may set the same time again; still due if it is interrupted
                task.on_time(now)
                if self._due.get(task) == -math.inf:
                    del self._due[task]
        self.soonest = min(bound, *self._due.values(), math.inf)

    def next(self) -> float:
        """Return when the next task is due; infinity if none is."""
        for task in tuple(self._due):
            task.on_time(-math.inf)  # nothing is due yet; the task sets its timer anew
        return min(self._due.values(), default=math.inf)
