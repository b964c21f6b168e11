"""A condition that a call waits for.

Knows that ``Loop.run`` waits for anything with an attribute ``settled``. Must not know what is waited for.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Until"]


class Until:
    """A condition in the form that ``Loop.run`` waits for."""

    __slots__ = ("_condition",)

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    @property
    def settled(self) -> bool:
        """Whether the condition holds."""
        return self._condition()
