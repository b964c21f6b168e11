"""Notifications that wait for a call of ``receive``, and such a call, which waits for one.

Knows messages, and that one which is kept stands in the inbox until its handlers have seen it. Must not know handlers.
"""

from __future__ import annotations

import sys

from .. import log
from ..errors import SerializationError, within
from ..interruptions import pass_on
from ..messages import Message, is_text
from .items import Delivery
from .last_look import take_notification

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from typing import Any

    from ..handlers import Chain
    from .conversation import Conversation

__all__ = ["Kept", "receive"]

# So much is kept for each conversation; the oldest go first.
KEPT_COUNT = 1000
KEPT_BYTES = 4 * 1024 * 1024

_PLAIN = frozenset({str, bytes, bytearray, int, float, bool, type(None)})
_PARTS = 1000  # so many objects of a message are looked at to estimate its size


class Wanted:
    """What one call of ``receive`` waits for.

    Attributes:
        expect: The class of the message.
        settled: Whether there is one, or there will never be.
    """

    def __init__(self, expect: type) -> None:
        self.expect = expect
        self.settled = False

    def is_met_by(self, item: Any) -> bool:
        """Return whether an item of an inbox is, or becomes, such a message."""
        return isinstance(item, (self.expect, SerializationError))


class Entry:
    """A notification that is kept.

    Attributes:
        message: The message.
        size: About how many bytes it takes.
        unseen: True while no handler has seen it, so that one that is registered later still may; then None.
        wanted: The call that it came for. While that waits no other takes it, such as one of a handler that is getting it.
    """

    __slots__ = ("message", "size", "unseen", "wanted")

    def __init__(self, message: Message, size: int, unseen: bool | None, wanted: Wanted | None = None) -> None:
        self.message: Message = message
        self.size: int = size
        self.unseen: bool | None = unseen
        self.wanted: Wanted | None = wanted


class Kept:
    """The notifications of one conversation that ``receive`` has not returned yet.

    Owns these, and the calls that wait for more.

    Args:
        name: What texts call the conversation.
        inbox: Where messages come from.

    Attributes:
        waiting: The calls that wait, the innermost last.
        entries: What is kept, the oldest first.
        size: About how many bytes these take.
    """

    def __init__(self, name: str, inbox: deque[Any]) -> None:
        self.waiting: list[Wanted] = []
        self.entries: dict[Entry, None] = {}
        self.size: int = 0
        self._name = name
        self._inbox = inbox
        self._told = False

    def find(self, expect: type) -> Entry | None:
        """Return the oldest message of a class that no other call is about to return."""
        for entry in [*self.entries]:  # a signal handler may turn
            if isinstance(entry.message, expect) and entry.wanted not in self.waiting:
                return entry
        return None

    def take(self, entry: Entry) -> Message | None:
        """Take a message out; returns None if it is not there any more.

        For a ``for`` statement over ``map``, which stores it before a signal is looked at: it is nowhere else.
        """
        # atomic: no calls
        if entry in self.entries:
            del self.entries[entry]
            self.size -= entry.size
            return entry.message
        return None

    def keep(self, item: Any, message: Message, chain: Chain) -> Any:
        """Keep a message if a call waits for it, or no handler is there for it.

        Args:
            item: What stands for it in the inbox, first of all.
            message: The message.
            chain: The handlers that are still to see it.

        Returns:
            What stands for it in the inbox from now on.
        """
        wanted = self._find_wanted(message)
        if wanted is None and (chain or is_text(message)):
            return item
        entry = Entry(message, _weigh(message), True) if wanted is None else Entry(message, 0, None, wanted)
        delivery = Delivery(message, chain)
        inbox = self._inbox
        if inbox and inbox[0] is item:
            # atomic: no calls
            self.entries[entry] = None
            self.size += entry.size
            inbox[0] = delivery
            if wanted is not None:
                wanted.settled = True

            self._trim()
        return delivery

    def _find_wanted(self, message: Message) -> Wanted | None:
        """Return the innermost call that waits for such a message and has none yet."""
        for wanted in reversed(self.waiting):
            if not wanted.settled and wanted.is_met_by(message):
                return wanted
        return None

    def _trim(self) -> None:
        """Drop the oldest if there is too much."""
        entries = self.entries
        while len(entries) > KEPT_COUNT or (self.size > KEPT_BYTES and len(entries) > 1):
            for entry in entries:
                break
            if entry.wanted in self.waiting:  # a call is about to return it
                others = [entry for entry in [*entries] if entry.wanted not in self.waiting]
                if not others:
                    break
                entry = others[0]
            self.take(entry)
            if not self._told:
                self._told = True
                log.warning(
                    "session %s: notifications that no on_message handler was there for, and that no receive() has taken,"
                    " are dropped: only the newest are kept, %d or %d bytes of them",
                    self._name, KEPT_COUNT, KEPT_BYTES,
                )  # fmt: skip

    def end(self) -> None:
        """Let all calls return: nothing more will come."""
        for wanted in self.waiting:
            wanted.settled = True


def _weigh(message: Message) -> int:
    """Return about how many bytes a message takes."""
    size = 0
    parts: list[Any] = [message]
    try:
        for _ in range(_PARTS):
            if not parts:
                break
            part = parts.pop()
            size += sys.getsizeof(part, 64)
            kind = type(part)
            if kind in _PLAIN:
                continue
            if isinstance(part, dict):
                parts += part.values()
            elif isinstance(part, (list, tuple, set, frozenset)):
                parts += part
            else:
                parts += getattr(part, "__dict__", {}).values()
                for cls in kind.__mro__:
                    names = cls.__dict__.get("__slots__", ())
                    parts += [getattr(part, name, None) for name in ((names,) if isinstance(names, str) else names)]
    except Exception as exc:  # of a method of the message's own
        pass_on(exc)
    return size


def receive(conversation: Conversation, timeout: float | None, expect: type) -> Entry:
    """Turn until a notification arrives, and return it; it stays kept."""
    kept = conversation.dispatcher.kept
    limit = conversation.loop.limit_of(timeout)
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


def _await(conversation: Conversation, wanted: Wanted, limit: float) -> bool:
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
