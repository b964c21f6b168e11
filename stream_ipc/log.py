"""The logger ``stream_ipc``.

At DEBUG: sessions and listeners that begin and end, children that start and end, what is refused or dropped; at INFO
what strangers have tried; at ERROR what went wrong and nobody is told of. Never what messages hold, and never where a
message just comes or goes: that would cost time.

Knows ``logging``, but imports it only when there is something to say that somebody could see: it would be a tenth of
the time that importing the library takes.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["debug", "error", "info"]


def debug(text: str, *args: Any) -> None:
    """What happens in the normal course of things, for a program that has set up logging."""
    _log("debug", text, *args)


def info(text: str, *args: Any) -> None:
    """What others have tried in vain, for a program that has set up logging."""
    _log("info", text, *args)


def error(text: str, *args: Any, exc_info: Any = None) -> None:
    """What went wrong and is told to nobody else."""
    import logging  # noqa: F401 - if it is not there yet

    _log("error", text, *args, exc_info=exc_info)


_logger: Any = None


def _log(level: str, text: str, *args: Any, **options: Any) -> None:
    global _logger
    if _logger is None and "logging" not in sys.modules:
        return
    try:
        # Asked for once: getLogger() takes a lock of logging's, and an interruption (KeyboardInterrupt) between two of its
        # lines leaves that locked for all other threads, for ever.
        if _logger is None:
            _logger = sys.modules["logging"].getLogger("stream_ipc")
        getattr(_logger, level)(text, *args, **options)
    except Exception:
        # A handler may do anything, such as sending the record over the very session that is closing. Whoever has
        # something to tell is often in the middle of what must not stop here.
        pass
