"""The logger ``stream_ipc``, and warnings.

At DEBUG: sessions and listeners that open and close, children that start and end, what is refused or dropped. At INFO:
handshakes that failed. At WARNING: messages that are dropped, and a terminal in place of a parent. At ERROR: failures
that no caller is told of. Never the content of messages, and nothing for a message that is sent or received as it
should be: that would cost time.

Imports ``logging``, which takes long, only when there is something to say that can be seen.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial

from .interruptions import is_ours, pass_on

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["debug", "error", "info", "issue_warning", "warning"]


def issue_warning(text: str, category: type[Warning]) -> None:
    """Issue a warning that names the line of the program which led here, also as the interpreter ends."""
    level = 2
    frame: Any = sys._getframe(1)
    while frame is not None and is_ours(frame):
        level += 1
        frame = frame.f_back
    warnings.warn(text, category, stacklevel=level)


_logger: Any = None


def _log(level: str, text: str, *args: Any, **options: Any) -> None:
    global _logger
    if _logger is None and level in ("debug", "info") and "logging" not in sys.modules:
        return
    try:
        # Called once: getLogger() takes a lock of logging, and an interruption (KeyboardInterrupt) between two of its lines
        # leaves that locked for all other threads, for ever.
        if _logger is None:
            import logging

            _logger = logging.getLogger("stream_ipc")
        getattr(_logger, level)(text, *args, stacklevel=2, **options)  # the record names the line that calls this
    except Exception as exc:
        # A log handler may do anything, such as sending the record over the very session that is closing, and callers are
        # often in the middle of what must not stop here.
        pass_on(exc)


debug: Callable[..., None] = partial(_log, "debug")  # what is normal; nothing unless the program has imported logging
info: Callable[..., None] = partial(_log, "info")  # what others have tried in vain; the same
warning: Callable[..., None] = partial(_log, "warning")  # what the user of the library should change
error: Callable[..., None] = partial(_log, "error")  # a failure that no caller is told of
