"""Tells what a signal handler has raised from what a piece of code has raised itself.

Knows ``signal``, which it asks only when something was raised. Programs have handlers of SIGALRM that raise an ordinary
``Exception``; where users' code is called in the middle of ours, such a one must pass through like a
``KeyboardInterrupt``, and must not be taken for an error of the code that it came out of.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any

__all__ = ["interruption_in"]


def interruption_in(error: BaseException | None) -> BaseException | None:
    """Return the exception of a signal handler that an error is, or was made of; None if there is none."""
    codes: set[CodeType] | None = None
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback = error.__traceback__
        if traceback is not None and codes is None:
            codes = _handler_codes()
        while traceback is not None:
            if traceback.tb_frame.f_code in (codes or ()):
                return error
            traceback = traceback.tb_next
        error = error.__cause__ or error.__context__
    return None


def _handler_codes() -> set[CodeType]:
    import signal

    found = set()
    for number in signal.valid_signals():
        try:
            handler: Any = signal.getsignal(number)
        except (OSError, ValueError):
            continue
        while handler is not None and not hasattr(handler, "__code__"):
            inner = getattr(handler, "func", None) or getattr(handler, "__func__", None)  # a partial, or a method
            if inner is None and callable(handler):
                inner = type(handler).__call__
                inner = getattr(inner, "__func__", inner)
                handler = inner if hasattr(inner, "__code__") else None
                break
            handler = inner
        code = getattr(handler, "__code__", None)
        if code is not None:
            found.add(code)
    return found
