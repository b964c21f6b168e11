"""Tells what a signal handler has raised from what a piece of code has raised itself.

Knows ``signal``, which it asks only when something was raised. Programs have handlers of SIGALRM that raise an ordinary
``Exception``; where users' code is called in the middle of ours, such a one must pass through like a
``KeyboardInterrupt``, and must not be taken for an error of the code that it came out of.

Such an exception comes as soon as a call has returned, before its result is stored: ``x = f(y)`` can lose what f has made.
A ``for`` statement stores what an iterator gives before a signal is looked at. So where nothing may be lost this package
says ``for x in map(f, (y,)): break``, and where that is no help, at some calls of ``socket`` and ``ssl``, a ``Shield``.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's own functions make enums
import sys
from functools import partial

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import CodeType, FrameType
    from typing import Any

__all__ = ["Shield", "function_of", "interruption_in", "is_ours", "pass_on", "pass_on_lack_of_stack", "pass_on_own"]

_VALID = tuple(_signal.valid_signals())
# All that programs handle as a rule and that do not come from their own mistakes.
_NAMES = ["INT", "TERM", "HUP", "ALRM", "USR1", "USR2", "CHLD", "PIPE", "PROF", "VTALRM", "WINCH"]
# Windows lacks most of them, and there an IpcPeer tells that this package cannot be used.
_HELD_BACK = [getattr(_signal, f"SIG{name}") for name in _NAMES if hasattr(_signal, f"SIG{name}")]

_PACKAGE = __name__.rpartition(".")[0]


def interruption_in(error: BaseException | None) -> BaseException | None:
    """Return the exception of a signal handler that an error is, or was raised from; None if there is none.

    One that users' code has caught, and is dealing with while it calls us, counts no more.
    """
    codes = _handler_codes()
    for made_of in _made_of(error):
        traceback = made_of.__traceback__
        if made_of is not error and traceback is not None and _is_dealt_with(traceback.tb_frame):
            break
        while traceback is not None:
            if traceback.tb_frame.f_code in codes:
                return made_of
            traceback = traceback.tb_next
    return None


def _made_of(error: BaseException | None) -> Iterable[BaseException]:
    """Return an error, what it was raised from (its cause or context), and so on."""
    found: dict[int, BaseException] = {}
    while error is not None and id(error) not in found:
        found[id(error)] = error
        error = error.__cause__ or error.__context__
    return found.values()


def pass_on(error: BaseException) -> None:
    """Raise the exception of a signal handler that an error is, or was raised from; return if there is none.

    For each ``except OSError`` in which something can be interrupted: many a signal handler raises a ``TimeoutError``,
    which is one.
    """
    interruption = interruption_in(error)
    if interruption is not None:
        raise interruption


def pass_on_own(error: BaseException) -> None:
    """Raise a signal handler's exception, unless it came out of the user's function that was called.

    That function may have set the alarm itself. For each ``except Exception`` around the call of an ``on_*`` handler. The
    interpreter looks at signals when a call has returned, too: that of a function in C, and before 3.11 of any.
    """
    here = below = error.__traceback__
    while here is not None and below is not None and below.tb_frame is here.tb_frame:
        below = below.tb_next
    if below is None:
        return
    if is_ours(below.tb_frame):  # the on_* handler is a function of this package
        pass_on(error)
    elif below.tb_frame.f_code in _handler_codes():
        raise error


def pass_on_lack_of_stack(error: BaseException | None) -> None:
    """Raise the ``RecursionError`` that an error was made of, if that is due to how deep the stack is here.

    What recurses without end where there is room is at fault itself.
    """
    for made_of in _made_of(error):
        if isinstance(made_of, RecursionError):
            frame: FrameType | None = sys._getframe()
            for _ in range(sys.getrecursionlimit() // 2):
                frame = None if frame is None else frame.f_back
            if frame is not None:
                raise made_of
            break


def is_ours(frame: FrameType) -> bool:
    """Return whether a frame is one of this package's code."""
    name = frame.f_globals.get("__name__")
    return isinstance(name, str) and (name == _PACKAGE or name.startswith(f"{_PACKAGE}."))


def _is_dealt_with(catcher: FrameType) -> bool:
    """Return whether users' code that has called us, directly or not, has caught what came out of this frame."""
    if is_ours(catcher):
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame is not catcher:
        frame = frame.f_back
    return frame is not None


def _handler_codes() -> set[CodeType]:
    found = set()
    for number in _VALID:  # no comprehension: the error may be that there is no memory
        code = getattr(function_of(_signal.getsignal(number)), "__code__", None)
        if code is not None:
            found.add(code)
    return found


def function_of(function: Any) -> Any:
    """Return the function in Python, if there is one, that runs when something is called: of a class, its constructor."""
    while isinstance(function, partial):
        function = function.func
    if hasattr(function, "__code__"):
        return function
    return function.__init__ if isinstance(function, type) else type(function).__call__  # type: ignore[misc]


class Shield:
    """Hold signals back for the length of a ``with`` block.

    The calls of ``ssl`` run signal handlers after the bytes have moved and before they return, so their result cannot be
    stored first; nor can that of methods of ``socket`` which are written in Python, such as ``accept``. A SIGPIPE of a
    write that fails is dropped. The block must not wait for anything. In a program with several threads another thread may
    get the signal, and a small gap remains.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = _signal.pthread_sigmask(_signal.SIG_BLOCK, ())  # runs handlers of what came, and changes nothing yet
        try:
            _signal.pthread_sigmask(_signal.SIG_BLOCK, _HELD_BACK)
        except BaseException:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, self._before)
            raise

    def __exit__(self, kind: type | None, *exc_info: object) -> None:
        if kind is not None and not kind.__name__.startswith("SSLWant") and _signal.SIGPIPE in _signal.sigpending():
            # A write has failed: OpenSSL writes without MSG_NOSIGNAL, and SIGPIPE may be at its default.
            _signal.sigwait([_signal.SIGPIPE])  # macOS has no sigtimedwait()
        _signal.pthread_sigmask(_signal.SIG_SETMASK, self._before)
