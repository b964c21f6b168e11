"""What is due by the clock: tasks at their times, and now and then a look at what no poller reports.

Knows times, tasks by their ``on_time``, and what is open in a loop. Must not know what a task does.
"""

from __future__ import annotations

import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .loop import Loop

__all__ = ["Inspection", "Timers"]

CHECK_INTERVAL = 0.5  # seconds between two checks
_CHECKED_AT_ONCE = 16  # conversations in one check, so that it costs the same with one or a thousand


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


class Inspection:
    """Checks some conversations at a time, in turn, and all listeners and pools.

    Owns whose turn it is.

    Attributes:
        due: When the next check is due.
    """

    def __init__(self, loop: Loop) -> None:
        self.due: float = -math.inf
        self._loop = loop
        self._checked = 0

    def check(self, now: float) -> None:
        """Have tasks check whether their streams are still what they were."""
        self.due = now + CHECK_INTERVAL
        conversations = tuple(self._loop.conversations)
        if len(conversations) > _CHECKED_AT_ONCE:
            at = self._checked % len(conversations)
            self._checked = at + _CHECKED_AT_ONCE
            conversations = conversations[at : at + _CHECKED_AT_ONCE]
        for conversation in conversations:
            conversation.port.check()
        for listener in tuple(self._loop.listeners):
            listener.check()
        for pool in tuple(self._loop.pools):
            pool.check()
