"""What keeps a failure that lasts from being reported without end.

Knows the loop and a port. Must not know what has failed.
"""

from __future__ import annotations

import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .loop import Loop
    from .port import Port

__all__ = ["HOLD", "Hold"]

HOLD = 0.01  # seconds from one failure of a stream to the next, if handlers keep it open


class Hold:
    """Lets a port read on after a failure, but not at once if the one before was just now.

    Owns when the last one was.

    Args:
        loop: Has the timers.
        port: What is kept from reading.
    """

    def __init__(self, loop: Loop, port: Port) -> None:
        self._loop = loop
        self._port = port
        self._due = -math.inf  # from here on it may read

    def go_on(self) -> None:
        """Read on. An interrupted call leaves the port reading."""
        now = self._loop.clock()
        due, self._due = self._due, max(now, self._due) + HOLD
        if now < due:
            self._loop.set_timer(self, due)
            self._port.failing = True
        self._port.rearm()

    def on_time(self, now: float) -> None:
        """Read on, if it is time."""
        due = self._due - HOLD
        if now < due:
            self._loop.set_timer(self, due)
        else:
            self._port.failing = False
            self._port.rearm()
