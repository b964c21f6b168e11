"""What is left to be done after something was closed: the teardowns of one loop.

Knows the steps of each. Must not know what was closed.
"""

from __future__ import annotations

import time

from ..interruptions import pass_on
from ..transports.descriptors import wait_readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..transports.channel import Teardown

__all__ = ["TEARDOWN_INTERVAL", "Teardowns", "wait_for_teardowns"]

TEARDOWN_INTERVAL = 0.01  # seconds between two steps of what is not done


class Teardowns:
    """All teardowns of one loop. Turns take their steps.

    Attributes:
        all: Those that are not done.
    """

    def __init__(self) -> None:
        self.all: list[Teardown] = []

    def add(self, teardown: Teardown) -> None:
        """Take one in, unless it is there."""
        if teardown not in self.all:
            self.all.append(teardown)

    def step(self, deliver: bool) -> None:
        """Do what can be done now.

        Args:
            deliver: Whether handlers may run.
        """
        for teardown in tuple(self.all):
            left = teardown.step()
            if deliver:
                teardown.deliver()
            if left is None and not teardown.messages and teardown in self.all:
                self.all.remove(teardown)

    def wait(self, teardowns: Iterable[Teardown] | None = None, background: bool = True) -> None:
        """Block until these are done, side by side; by default all. See ``wait_for_teardowns``."""
        teardowns = list(self.all if teardowns is None else teardowns)  # a copy: more may come meanwhile
        left = wait_for_teardowns(teardowns, background)
        self.all = [teardown for teardown in self.all if teardown in left or teardown not in teardowns]

    def abandon(self) -> None:
        """Abandon all."""
        for teardown in self.all:
            teardown.abandon()
        self.all = []


def wait_for_teardowns(teardowns: Iterable[Teardown], background: bool = True, deliver: bool = True) -> list[Teardown]:
    """Block until these are done, side by side. Each of them bounds its own steps.

    Args:
        teardowns: What is to be done.
        background: Also wait for what is in the background. Otherwise it goes on only while others are waited for.
        deliver: Whether handlers may run.

    Returns:
        What is not done.
    """
    while True:
        waiting = []
        wait = 60.0
        for teardown in teardowns:
            left = teardown.step()
            if deliver and teardown.messages:
                teardown.deliver()
                wait = 0.0  # a handler may have done anything, also closed this
            if left is not None:
                wait = min(wait, left)
                waiting.append(teardown)
        if not waiting or not (background or any([not teardown.background for teardown in waiting])):
            return waiting
        teardowns = waiting
        try:
            wait_readable([fd for teardown in teardowns for fd in teardown.fds()], wait)
        except OSError as exc:  # the system has no memory for it
            pass_on(exc)
            time.sleep(min(wait, TEARDOWN_INTERVAL))
