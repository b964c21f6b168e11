"""What is left to be done after channels were closed: children that are still to end, connections that linger.

Knows teardowns by their steps (``Teardown`` is in ``transports/channel.py``). Must not know what one ends, nor loops.
"""

from __future__ import annotations

import time

from ..interruptions import pass_on
from ..transports.descriptors import wait_readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ..transports.channel import Teardown

__all__ = ["TEARDOWN_INTERVAL", "Teardowns"]

TEARDOWN_INTERVAL = 0.01  # seconds between two steps of what is not done


class Teardowns:
    """The teardowns of one loop, of which turns take the steps, or of several.

    Attributes:
        all: Those that are not done, as a dict, because there may be thousands.
    """

    def __init__(self, teardowns: Iterable[Teardown] = ()) -> None:
        self.all: dict[Teardown, None] = dict.fromkeys(teardowns)

    def add(self, teardown: Teardown) -> None:
        self.all[teardown] = None

    def step(self, deliver: bool = True, only: Collection[Teardown] | None = None) -> float:
        """Do what can be done now, of all or of some; returns in how many seconds to call again at the latest.

        Args:
            deliver: Whether handlers may run.
            only: Which to do, by default all.
        """
        wait = 60.0
        for teardown in tuple(self.all if only is None else only):
            if teardown not in self.all:  # a handler has forked, and this is the copy
                continue
            left = teardown.step()
            if deliver and teardown.messages:
                wait = 0.0  # a handler may do anything, also close this
                while teardown.messages:
                    teardown.take(teardown.messages)
            if left is not None:
                wait = min(wait, left)
            elif not teardown.messages:
                self.all.pop(teardown, None)
        return wait

    def wait(
        self, only: Collection[Teardown] | None = None, due: float | None = None, background: bool = True
    ) -> None:
        """Block until all are done, side by side. Each of them bounds its own steps.

        Args:
            only: Which to wait for, by default all that are there now.
            due: When they have to be done, in the time of ``monotonic()``; None for their own bounds.
            background: Also wait for what is in the background. Otherwise it goes on only while others are waited for.
        """
        left = tuple(self.all if only is None else only)
        if due is not None:
            for teardown in left:
                teardown.hurry(due)
        while True:
            wait = self.step(only=left)
            left = tuple([teardown for teardown in left if teardown in self.all])
            if not any([background or not teardown.background for teardown in left]):
                return
            try:
                wait_readable([fd for teardown in left for fd in teardown.fds()], wait)
            except OSError as exc:  # the system has no memory for it
                pass_on(exc)
                time.sleep(min(wait, TEARDOWN_INTERVAL))

    def abandon(self) -> None:
        for teardown in [*self.all]:
            teardown.abandon()
        self.all = {}
