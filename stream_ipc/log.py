"""The logger ``stream_ipc``, and warnings.

At DEBUG: sessions and listeners that open and close, children that start and end, what is refused or dropped. At INFO:
failed attempts to connect. At WARNING: messages that are dropped. At ERROR: failures that no caller is told of. Never the
content of messages, and nothing for a message that is sent or received as it should be: that would cost time.

Imports ``logging`` only when there is something to say that can be seen: it would be a tenth of the time that importing
the library takes.
"""

from __future__ import annotations

import sys

from .interruptions import is_ours, pass_on

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["debug", "error", "info", "warn", "warning"]


def debug(text: str, *args: Any) -> None:
    """Log what is normal. Without effect in a program that has not imported logging."""
    _log("debug", text, *args)


def info(text: str, *args: Any) -> None:
    """Log what others have tried in vain. Without effect in a program that has not imported logging."""
    _log("info", text, *args)


def warning(text: str, *args: Any) -> None:
    """Log what the user of the library should change."""
    _log("warning", text, *args)


def error(text: str, *args: Any, exc_info: Any = None) -> None:
    """Log a failure that no caller is told of."""
    _log("error", text, *args, exc_info=exc_info)


def warn(text: str, category: type[Warning]) -> None:
    """Issue a warning that names the line of the program which led here."""
    import warnings

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
        getattr(_logger, level)(text, *args, **options)
    except Exception as exc:
        # A log handler may do anything, such as sending the record over the very session that is closing, and callers are
        # often in the middle of what must not stop here.
        pass_on(exc)
