"""What is left to be done after something was closed.

Knows endings of transports. Must not know what was closed.
"""

from __future__ import annotations

from ..transports.channel import wait_for_endings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..transports.channel import Ending

__all__ = ["ENDING_INTERVAL", "Endings"]

ENDING_INTERVAL = 0.01  # seconds between two steps of what is still ending


class Endings:
    """All endings of one loop. Turns take their steps.

    Attributes:
        all: Those that are not done.
    """

    def __init__(self) -> None:
        self.all: list[Ending] = []

    def add(self, ending: Ending) -> None:
        """Take one in, unless it is there."""
        if ending not in self.all:
            self.all.append(ending)

    def step(self, deliver: bool) -> None:
        """Do what can be done now.

        Args:
            deliver: Whether handlers may run.
        """
        for ending in tuple(self.all):
            left = ending.step()
            if deliver:
                ending.deliver()
            if left is None and not ending.messages and ending in self.all:
                self.all.remove(ending)

    def wait(self, endings: Iterable[Ending] | None = None, background: bool = True) -> None:
        """Block until these are done, side by side; by default all. See ``transports.channel.wait_for_endings``."""
        endings = list(self.all if endings is None else endings)  # a copy: more may come meanwhile
        left = wait_for_endings(endings, background)
        self.all = [ending for ending in self.all if ending in left or ending not in endings]

    def abandon(self) -> None:
        """Abandon all."""
        for ending in self.all:
            ending.abandon()
        self.all = []
