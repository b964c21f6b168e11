"""Checking streams now and then for what no poller reports: that their owner has closed them.

Knows what is open in a loop. Must not know what is wrong with a stream.
"""

from __future__ import annotations

import math

from ..errors import InvalidStreamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..transports.channel import Channel
    from .loop import Loop

__all__ = ["Inspection", "refuse_taken"]

CHECK_INTERVAL = 0.5  # seconds between two checks
_CHECKED_AT_ONCE = 16  # conversations in one check, so that it costs the same with one or a thousand


class Inspection:
    """Checks some conversations at a time, in turn, and all listeners and pools.

    Owns whose turn it is.

    Attributes:
        due: When the next check is due.
    """

    def __init__(self, loop: Loop) -> None:
        self.due: float = -math.inf
        self._loop = loop
        self._checked = 0

    def check(self, now: float) -> None:
        """Have tasks check whether their streams are still what they were."""
        self.due = now + CHECK_INTERVAL
        conversations = tuple(self._loop.conversations)
        if len(conversations) > _CHECKED_AT_ONCE:
            at = self._checked % len(conversations)
            self._checked = at + _CHECKED_AT_ONCE
            conversations = conversations[at : at + _CHECKED_AT_ONCE]
        for conversation in conversations:
            conversation.port.check()
        for listener in tuple(self._loop.listeners):
            listener.check()
        for pool in tuple(self._loop.pools):
            pool.check()


def refuse_taken(loop: Loop, channel: Channel) -> None:
    """Raise ``InvalidStreamError`` for a channel whose stream another task reads: each would get a part of what comes."""
    for fd in channel.interest()[0]:
        owner = loop.poller.owners.get(fd)
        if owner is not None:
            owner.check()  # its stream may be closed, and the number a new one's
            if loop.poller.owners.get(fd) is owner:
                text = f"descriptor {fd} belongs to another session of this peer"
                raise InvalidStreamError(f"{text}; use that one, or call remove_session() with it first")
