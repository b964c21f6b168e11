"""What stands in an inbox beside messages: work that has its turn behind what arrived before it.

Knows messages. Must not know what becomes of an item. ``EndOfStream``, which channels put there themselves, is in
``transports/channel.py``.
"""

from __future__ import annotations

from ..errors import SerializationError
from ..messages import ResponseEnvelope

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable
    from typing import Any

    from ..handlers import Chain
    from ..messages import Message

__all__ = ["Delivery", "Failure", "OnSession", "reply_id", "take_out"]


class Delivery:
    """A message that some of its handlers have not seen yet."""

    __slots__ = ("chain", "message")

    def __init__(self, message: Message, chain: Chain) -> None:
        self.message: Message = message
        self.chain: Chain = chain


class Failure:
    """A failure of the stream."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error: Exception = error


class OnSession:
    """The function that gets the session before anything else of it is dispatched."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function: Callable[[Any], Any] = function


def reply_id(item: Any) -> Any:
    """Return the id of the request that an item is the reply to, also if it could not be decoded; None if it is none."""
    if type(item) is ResponseEnvelope:
        return item.id
    return item.response_id if isinstance(item, SerializationError) else None


def take_out(inbox: deque[Any], item: Any) -> None:
    """Remove an item from an inbox if it is still the first."""
    if inbox and inbox[0] is item:
        del inbox[0]
