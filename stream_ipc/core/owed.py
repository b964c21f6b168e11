"""Replies that handlers have put off: who is owed one, and from where it will come.

Knows the responder that sends them, and pending requests whose outcome is passed on. Must not know how promises or
deferred replies look to users.
"""

from __future__ import annotations

from functools import partial

from ..errors import RemoteError, describe
from ..messages import ErrorMessage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any
    from weakref import ref

    from ..messages import Message
    from .loop import Loop
    from .pending import Pending
    from .responder import Responder

__all__ = ["DEFERRERS", "Owed", "OwedReplies", "find_deferrer"]


# What a handler of requests may return in place of a reply: by class, a function that is called with it and an Owed, which
# it has to settle sooner or later. An interrupted call is made again. It returns the error that is sent if it is of no use.
DEFERRERS: dict[type, Callable[[Any, Owed], Exception | None]] = {}


def find_deferrer(value: Any) -> Any:
    """Return what stands in ``DEFERRERS`` for a value, by its class or one that this is derived from, or None."""
    for cls in type(value).__mro__:
        if cls in DEFERRERS:
            return DEFERRERS[cls]
    return None


class Owed:
    """A reply that a handler has put off.

    Attributes:
        id: The request's id.
        source: What the handler has returned, until it has been told to settle this.
        reply: What will be sent, once it is known.
        was_open: Whether the requester's session was open when the reply was sent.
        loop: The loop of its session.
        call_later: A function of any argument that has ``go_on`` called in that loop's next turn.
        guard: A weak reference to what will settle this, which marks it as work when that is dropped.
        pending: The request whose outcome is passed on, or None.
    """

    __slots__ = (
        "_promise",
        "_responder",
        "_sending",
        "call_later",
        "guard",
        "id",
        "loop",
        "pending",
        "reply",
        "source",
        "was_open",
    )  # fmt: skip

    def __init__(self, responder: Responder, id: Any, source: Any) -> None:
        self.id: Any = id
        self.source: Any = source
        self.reply: Message | None = None
        self.guard: ref[Any] | None = None
        self.was_open: bool = True
        self.pending: Pending | None = None
        self.loop: Loop = responder.loop
        self._promise: Any = None
        self._responder: Responder | None = responder
        self.call_later: Any = None  # made by OwedReplies.begin: it is a cycle
        self._sending = False

    @property
    def is_open(self) -> bool:
        """Whether the requester can still get it."""
        return self._responder is not None and self._responder.is_writable

    def follow(self, pending: Pending, promise: Any) -> None:
        """Pass on the outcome of a request. An interrupted call can be made again."""
        self.pending = pending
        if pending.settled:
            self.go_on()
            return
        self._promise = promise  # which stays alive until then
        pending.unwatch(self.call_later)
        pending.unwatch(self._settled)
        pending.watch(self.call_later)  # first: a turn does what an interruption of the other has left
        pending.watch(self._settled)

    def _settled(self, promise: Any) -> None:
        self.go_on()

    def go_on(self) -> None:
        """Send the reply if it is known and was not sent. An interrupted call is made again by the next turn."""
        responder = self._responder
        loop = self.loop
        if self._sending:
            return
        if responder is None or self not in responder.owed.table:
            loop.later.pop(self, None)
            return
        reply = self.reply
        if reply is None:
            reply = self.reply = self._find_reply()
            if reply is None:
                loop.later.pop(self, None)
                return
        outbox = responder.port.channel.outbox
        outer = loop.enter()
        last = outbox.last
        try:
            # atomic: no calls
            self._sending = True
            loop.later[self] = None

            responder.send_reply(self.id, reply)
            self.was_open = responder.is_writable
            responder.owed.remove(self)
        except BaseException:
            if outbox.last is last:
                self._sending = False
            else:
                responder.owed.remove(self)
            raise
        finally:
            loop.thread = outer

    def _find_reply(self) -> Message | None:
        pending = self.pending
        if pending is not None:
            if not pending.settled:
                return None
            outcome: Message | BaseException = pending.outcome
            if not isinstance(outcome, BaseException):
                return outcome
            return ErrorMessage(str(outcome) if isinstance(outcome, RemoteError) else describe(outcome))
        if self.guard is None or self.guard() is not None:
            return None
        return ErrorMessage("the DeferredReply that a handler returned for this request was dropped before it was settled")

    def drop(self) -> None:
        """Drop what it refers to: it is sent, or the session is closed. An interrupted call can be made again."""
        if self.pending is not None:
            self.pending.unwatch(self.call_later)
            self.pending.unwatch(self._settled)
        self.call_later = self.pending = self._promise = self.guard = self.source = self._responder = None
        self.loop.later.pop(self, None)


class OwedReplies:
    """The replies that one conversation owes.

    Attributes:
        table: Those that are not sent.
    """

    def __init__(self, responder: Responder) -> None:
        self.table: dict[Owed, None] = {}
        self._responder = responder

    def __len__(self) -> int:
        return len(self.table)

    def begin(self, owed: Owed) -> Exception | None:
        """Enter one. An interrupted call can be made again.

        Returns:
            Why what was returned is of no use: it is for another request.
        """
        source = owed.source
        if source is None:
            return None
        if owed.call_later is None:
            owed.call_later = partial(owed.loop.later.setdefault, owed)  # no code of ours, so never interrupted half-way
        self.table[owed] = None
        error: Exception | None = find_deferrer(source)(source, owed)
        if error is not None:
            self.remove(owed)
            return error
        owed.source = None
        self._responder.port.limit_reading()
        return None

    def remove(self, owed: Owed) -> None:
        """Remove one that was sent."""
        self.table.pop(owed, None)
        owed.drop()
        if self._responder.port.paused:
            self._responder.port.update_reading()

    def drop(self) -> None:
        """Drop all: nobody can get them any more. An interrupted call can be made again."""
        for owed in tuple(self.table):
            owed.drop()
        self.table.clear()
