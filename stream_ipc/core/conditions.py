"""What ``Loop.run`` may be told to wait for, besides promises.

Knows nothing: a condition is anything with the attributes ``settled`` and ``waits_alone``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Awaited", "Until"]


class Until:
    """A condition in the form that ``Loop.run`` waits for."""

    __slots__ = ("_condition",)

    waits_alone = False

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    @property
    def settled(self) -> bool:
        """Whether the condition holds."""
        return self._condition()


class Awaited:
    """The owner of a descriptor that one call waits for.

    Attributes:
        settled: Whether it is ready.
        waits_alone: The wait makes sense though there is no conversation.
    """

    waits_alone = True

    def __init__(self) -> None:
        self.settled = False

    def on_ready(self, fd: int, events: int) -> None:
        """Note that it is ready."""
        self.settled = True

    def check(self) -> None:
        """Note that its number belongs to somebody else now."""
        self.settled = True
