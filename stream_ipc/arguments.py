"""Checks and defaults of arguments, and the base of the classes that users hold.

Knows messages. Must not know sessions.
"""

from __future__ import annotations

import math
from functools import wraps
from types import FunctionType

from .errors import article
from .interruptions import pass_on
from .messages import Message, RequestEnvelope, ResponseEnvelope

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

__all__ = [
    "DEFAULT", "PIPE", "POOLS", "USUAL", "Facade", "check_expect", "check_iterable", "check_message", "check_timeout",
    "close_bound", "expectable", "name_methods", "safe_repr", "sendable",
]  # fmt: skip


class _Pipe(int):
    """``subprocess.PIPE`` as ``help()`` should show it, without the import, which takes long."""

    def __repr__(self) -> str:
        return "subprocess.PIPE"


PIPE = _Pipe(-1)


class _Default:
    """Stands for "not given" where None has a meaning of its own; its repr is for ``help()``."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return f"<{self._text}>"


DEFAULT: Any = _Default("the peer's")
POOLS: Any = _Default("the pool's")
USUAL: Any = _Default("a few seconds")


class Facade:
    """What users hold in their hands: neither copied nor pickled, because a copy would close what the original is using."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        what = article(type(self))
        raise TypeError(f"{what} cannot be copied or pickled: it belongs to this process; make another where one is needed")


def name_methods(part: type, whole: str) -> None:
    """Have the errors that Python makes name the methods of a part of a class as those of the whole."""
    for name, function in vars(part).items():
        if isinstance(function, FunctionType):
            function.__qualname__ = f"{whole}.{name}"


def safe_repr(describe: Callable[[Any], str]) -> Callable[[Any], str]:
    """Make a ``__repr__`` return just the name of the class while ``__init__`` has not finished."""

    @wraps(describe)
    def __repr__(self: Any) -> str:
        try:
            return describe(self)
        except Exception as exc:
            pass_on(exc)
            return f"<{type(self).__name__}>"

    return __repr__


# Message classes that have been sent before, which need no closer look.
sendable: set[type] = set()
# The same of classes that have been expected, by identity: what is passed may have no hash.
expectable: dict[int, type] = {id(Message): Message}


def check_message(method: str, message: Any) -> None:
    """Raise ``TypeError`` for what cannot be sent."""
    cls = type(message)
    if isinstance(message, type):
        raise TypeError(f"{method}() takes a Message, not a class; pass an instance: {message.__name__}(...)")
    if cls in (RequestEnvelope, ResponseEnvelope):
        raise TypeError(f"{method}() takes a Message, and makes what envelope it needs; pass the message in it")
    if not isinstance(message, Message):
        raise TypeError(
            f"{method}() takes a Message, not {article(cls)}; derive a class from Message that has a field for it"
        )
    sendable.add(cls)


def check_expect(expect: Any, name: str = "expect") -> Any:
    """Return a message class, also of ``Box[int]``; raise ``TypeError`` for anything else."""
    origin = getattr(expect, "__origin__", None)
    cls = origin if isinstance(origin, type) else expect
    if not isinstance(cls, type) or not issubclass(cls, Message):
        raise TypeError(f"{name} must be a message class, not {expect!r:.100}")
    expectable[id(cls)] = cls
    return cls


def check_iterable(takes: str, given: Any) -> None:
    """Raise ``TypeError`` for what cannot be iterated."""
    if not hasattr(given, "__iter__"):
        raise TypeError(f"{takes}, not {given!r:.100}")


def check_timeout(timeout: Any, name: str = "timeout", optional: bool = True) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what is no number of seconds, nor None if it is ``optional``."""
    if timeout is None and optional:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        advice = f"; a class that is expected goes into expect={timeout.__name__}" if isinstance(timeout, type) else ""
        raise TypeError(f"{name} must be a number of seconds{' or None' if optional else ''}, not {timeout!r:.100}{advice}")
    try:
        seconds = float(timeout)
    except OverflowError:
        advice = "; None is for no limit" if optional else ""
        raise ValueError(f"{name} is a number of seconds beyond all floats{advice}") from None
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"{name} must be 0 seconds or more, not {timeout!r}")


def close_bound(timeout: float | None) -> float | None:
    """Return the seconds that closing may take: None for the usual bounds, minus infinity to drop what is queued."""
    if timeout is USUAL:
        return None
    check_timeout(timeout)
    return math.inf if timeout is None else timeout or -math.inf
