"""The clock of all limits.

What is waited for are other processes, so limits are in real time also while a library for tests (freezegun) has stopped
the clock of the rest of the program: a bound that never comes would be a hang. Such libraries replace the functions that
modules hold, so this one is held by a class.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["monotonic", "real_clock"]


class _Clock:
    now = staticmethod(time.monotonic)


def real_clock() -> Callable[[], float]:
    """Return the function that returns the time in seconds."""
    return _Clock.now


def monotonic() -> float:
    """Return the time in seconds."""
    return _Clock.now()
