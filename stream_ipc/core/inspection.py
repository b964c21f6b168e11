"""Inspection: a look, now and then, at what no poller reports.

Knows what is open in a loop, and that it can be checked. Must not know how that is done.
"""

from __future__ import annotations

import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .loop import Loop

__all__ = ["Inspection"]

CHECK_INTERVAL = 0.5  # seconds between two checks
_CHECKED_AT_ONCE = 16  # conversations in one check, so that it costs the same with one or a thousand


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
        for listener in [*self._loop.listeners]:
            listener.check()
        for pool in [*self._loop.pools]:
            pool.check()
