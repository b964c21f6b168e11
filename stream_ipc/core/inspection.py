"""Checking streams now and then for what no poller reports: that their owner has closed them.

Knows what is open in a loop. Must not know what is wrong with a stream.
"""

from __future__ import annotations

import math

from ..errors import InvalidStreamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..transports.channel import Channel
    from .loop import Loop

__all__ = ["Inspection", "refuse_streams", "refuse_transport"]

CHECK_INTERVAL = 0.5  # seconds between two checks
_CHECKED_AT_ONCE = 16  # conversations in one check, so that it costs the same with one or a thousand

_TAKEN = "belongs to another session of this peer; use that one, or call remove_session() with it first"


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


def refuse_transport(loop: Loop, transport: Any) -> None:
    """Raise ``InvalidStreamError`` for a transport that another session talks over."""
    if any([conversation.channel.transport is transport for conversation in loop.conversations]):
        raise InvalidStreamError(f"{type(transport).__name__} {_TAKEN}")


def refuse_streams(loop: Loop, channel: Channel) -> None:
    """Raise ``InvalidStreamError`` for a channel whose stream another task reads: each would get a part of what comes."""
    for fd in channel.interest()[0]:
        owner = loop.poller.owners.get(fd)
        # Any other owner is what an interrupted call has left: its descriptor is closed, and the number a new one's.
        if owner is not None and any([conversation.port is owner for conversation in loop.conversations]):
            owner.check()  # its stream may be closed, and the number a new one's
            if loop.poller.owners.get(fd) is owner:
                raise InvalidStreamError(f"descriptor {fd} {_TAKEN}")
