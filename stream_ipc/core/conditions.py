"""What ``Loop.run`` may be told to wait for, besides promises.

A condition is anything with an attribute ``settled``. Knows the loop.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

__all__ = ["Until", "wait_for", "within"]


class Until:
    """A condition in the form that ``Loop.run`` waits for."""

    __slots__ = ("_condition",)

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    @property
    def settled(self) -> bool:
        """Whether the condition holds."""
        return self._condition()


class _Awaited:
    """The owner of a descriptor that one call waits for.

    Attributes:
        settled: Whether it is ready.
    """

    def __init__(self) -> None:
        self.settled = False

    def on_ready(self, fd: int, events: int) -> None:
        """Note that it is ready."""
        self.settled = True

    def check(self) -> None:
        """Note that its number is another file's now."""
        self.settled = True


def wait_for(loop: Loop, fd: int, events: int, limit: float | None) -> bool:
    """Wait for a descriptor that is no conversation's, moving bytes but running no handlers.

    Args:
        loop: What waits.
        fd: The descriptor; -1 just waits.
        events: What to wait for.
        limit: A time of the clock, or None.

    Returns:
        Whether it is ready.
    """
    awaited = _Awaited()
    try:
        if fd >= 0:
            loop.watch(fd, events, awaited)
        loop.run(awaited, limit, dispatch=False)
    finally:
        loop.unwatch(fd, awaited)
    return awaited.settled


def within(timeout: float | None) -> str:
    """Return how long something was waited for, for a text."""
    return "" if timeout is None else f" within {timeout} s"
