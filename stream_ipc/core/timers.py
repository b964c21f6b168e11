"""Timers: what is due by the clock, and how long dispatching may go on before that has its turn.

Knows times, and tasks by their ``on_time`` (see ``roles.py``). Must not know what a task does.
"""

from __future__ import annotations

import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .roles import Timed

__all__ = ["Share", "Timers"]

_SHARE = 0.1  # seconds
_SHORT = 0.01  # seconds; if more has passed since the last look at the clock, the next comes after one message
_MOST = 100  # messages between two looks at the clock at most


class Share:
    """The time that dispatching may take before descriptors and times, and other sessions, have their turn.

    Args:
        clock: The loop's.

    Attributes:
        step: After how many messages ``is_over`` is to be asked next.
    """

    __slots__ = ("_clock", "_end", "_looked", "step")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.step: int = 1
        self._clock = clock
        self._looked = now = clock()
        self._end = now + _SHARE

    def is_over(self) -> bool:
        """Return whether to stop."""
        now = self._clock()
        self.step = min(2 * self.step, _MOST) if now - self._looked < _SHORT else 1
        self._looked = now
        return now >= self._end


class Timers:
    """Tasks, and when each is due.

    Attributes:
        soonest: Nothing is due earlier.
    """

    def __init__(self) -> None:
        self.soonest: float = -math.inf
        self._due: dict[Timed, float] = {}

    def set(self, task: Timed, when: float) -> None:
        """Have a task called at a time; infinity for not at all."""
        if when == math.inf:
            self._due.pop(task, None)
        else:
            self._due[task] = when
            if when < self.soonest:
                self.soonest = when

    def call(self, now: float, bound: float) -> None:
        """Call what is due, and find out anew what ``soonest`` is, at most ``bound``."""
        for task, when in self._due.copy().items():
            if when <= now and self._due.get(task) == when:
                self._due[task] = -math.inf  # it may set the same time again; still due if it is interrupted
                task.on_time(now)
                if self._due.get(task) == -math.inf:
                    del self._due[task]
        self.soonest = min(bound, *self._due.values(), math.inf)

    def due_at(self) -> float:
        """Return when the next task is due; infinity if none is."""
        return min(self._due.values(), default=math.inf)
