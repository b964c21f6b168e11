"""A condition that a call waits for.

Knows nothing of what is waited for.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Until"]


class Until:
    """A condition in the role of what is ``Awaited`` (see ``roles.py``)."""

    __slots__ = ("_condition",)

    def __init__(self, condition: Callable[[], object]) -> None:
        self._condition = condition

    @property
    def settled(self) -> object:
        """Whether the condition holds."""
        return self._condition()
