"""The clock of all limits.

What is waited for are other processes, so limits are in real time also while a library for tests (freezegun) has stopped
the clock of the rest of the program: a bound that never comes would be a hang. Such libraries look for the functions of
``time`` in all modules and replace them, but do not look into a ``partial``.
"""

from __future__ import annotations

import time
from functools import partial

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["monotonic"]

monotonic: Callable[[], float] = partial(time.monotonic)  # in seconds
