"""Checks of what users pass, and a default of it.

Knows messages. Must not know sessions.
"""

from __future__ import annotations

from .errors import article
from .messages import Message, RequestEnvelope, ResponseEnvelope

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["PIPE", "check_expect", "check_message", "check_plugin", "sendable"]


class _Pipe(int):
    """``subprocess.PIPE`` as ``help()`` should show it; importing that takes longer than the rest of the package."""

    def __repr__(self) -> str:
        return "subprocess.PIPE"


PIPE = _Pipe(-1)

# Message classes that have been sent before, which need no closer look.
sendable: set[type] = set()
# The same of classes that have been expected.
expectable: set[Any] = set()


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


def check_expect(expect: Any) -> None:
    """Raise ``TypeError`` for what is no message class."""
    if not isinstance(expect, type) or not issubclass(expect, Message):
        raise TypeError(f"expect must be a message class, not {expect!r:.100}")
    expectable.add(expect)


def check_plugin(kind: str, plugin: Any, *names: str) -> None:
    """Raise ``TypeError`` for an object that lacks a method."""
    for name in names:
        if not callable(getattr(plugin, name, None)):
            raise TypeError(f"{kind} has no method {name}(): {plugin!r:.100}")
    if isinstance(plugin, type):
        raise TypeError(f"{plugin!r} is a class; pass an instance: {plugin.__name__}()")
