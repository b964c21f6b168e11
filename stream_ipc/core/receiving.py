"""Receiving: waiting for a notification.

Knows conversations, and what they keep for such calls.
"""

from __future__ import annotations

from ..messages import Message
from .conditions import within
from .kept import Wanted
from .last_look import take_notification

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .conversation import Conversation
    from .kept import Entry

__all__ = ["receive"]


def receive(conversation: Conversation, timeout: float | None, expect: type) -> Entry:
    """Turn until a notification arrives, and return it; it stays kept."""
    kept = conversation.dispatcher.kept
    limit = None if timeout is None else conversation.loop.clock() + timeout
    while True:
        entry = kept.find(expect)
        if entry is not None:
            conversation.dispatcher.offer(entry)
            if entry in kept.entries:  # no handler has taken it by a receive() of its own
                return entry
        elif not conversation.is_open:
            raise conversation.closed_error()
        elif not _await(conversation, Wanted(expect), limit):
            raise TimeoutError(f"no notification{_of(expect)}{within(timeout)} ({conversation.name})")


def _await(conversation: Conversation, wanted: Wanted, limit: float | None) -> bool:
    """Turn until a notification is there, or the session is closed; returns whether that is so."""
    waiting = conversation.dispatcher.kept.waiting
    try:
        waiting.append(wanted)
        if conversation.dispatcher.kept.find(wanted.expect) is not None or not conversation.is_open:
            return True  # a signal handler has turned, or closed the session, meanwhile
        conversation.loop.run(wanted, limit)
        if not wanted.settled and conversation.is_open:
            take_notification(conversation, wanted, limit)
    finally:
        if wanted in waiting:
            waiting.remove(wanted)
    return wanted.settled or not conversation.is_open


def _of(expect: type) -> str:
    return "" if expect is Message else f" of class {expect.__name__}"
