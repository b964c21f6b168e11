"""What is left to be done after something was closed.

Knows endings of transports. Must not know what was closed.
"""

from __future__ import annotations

import time

from ..interruptions import pass_on
from ..transports.descriptors import wait_readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..transports.channel import Ending

__all__ = ["ENDING_INTERVAL", "Endings", "wait_for_endings"]

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
        """Block until these are done, side by side; by default all. See ``wait_for_endings``."""
        endings = list(self.all if endings is None else endings)  # a copy: more may come meanwhile
        left = wait_for_endings(endings, background)
        self.all = [ending for ending in self.all if ending in left or ending not in endings]

    def abandon(self) -> None:
        """Abandon all."""
        for ending in self.all:
            ending.abandon()
        self.all = []


def wait_for_endings(endings: Iterable[Ending], background: bool = True, deliver: bool = True) -> list[Ending]:
    """Block until these are done, side by side. Each of them bounds its own steps.

    Args:
        endings: What is to be done.
        background: Also wait for what is in the background. Otherwise it goes on only while others are waited for.
        deliver: Whether handlers may run.

    Returns:
        What is not done.
    """
    while True:
        waiting = []
        wait = 60.0
        for ending in endings:
            left = ending.step()
            if deliver and ending.messages:
                ending.deliver()
                wait = 0.0  # a handler may have done anything, also closed this
            if left is not None:
                wait = min(wait, left)
                waiting.append(ending)
        if not waiting or not (background or any([not ending.background for ending in waiting])):
            return waiting
        endings = waiting
        try:
            wait_readable([fd for ending in endings for fd in ending.fds()], wait)
        except OSError as exc:  # the system has no memory for it
            pass_on(exc)
            time.sleep(min(wait, ENDING_INTERVAL))
