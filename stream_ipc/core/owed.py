"""Replies that are still to be sent: who is owed one, and where it will come from.

Knows the responder that sends them, and pending requests whose outcome is passed on. Must not know how promises or
deferred replies look to users.
"""

from __future__ import annotations

from functools import partial

from ..errors import RemoteError, describe
from ..messages import ErrorMessage, Message, failed_in_dispatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any
    from weakref import ref

    from .loop import Loop
    from .pending import Pending
    from .responder import Responder

__all__ = ["DEFERRERS", "Owed", "find_deferrer"]


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
    """A reply that a handler has put off, or that an interruption has kept from being sent.

    The responder has it among its ``owed`` from ``enter`` until it is sent, and the loop among its ``later`` as long as
    something can be done, so the next turn makes an interrupted call again.

    Args:
        responder: Sends it.
        id: The request's id.
        given: The reply, or what a handler has returned in its place.

    Attributes:
        id: As above.
        source: What the handler has returned; None once that has been told to settle this.
        reply: What will be sent, once it is known.
        unsent: Is true until the reply is handed over: the frame that was made last, which is empty from then on.
        was_open: Whether the requester's session was open when the reply was sent.
        loop: The loop of its session.
        call_later: A function of any argument that has ``go_on`` called in that loop's next turn.
        guard: A weak reference to what will settle this, which marks it as work when that is dropped.
    """

    __slots__ = (
        "_pending",
        "_responder",
        "call_later",
        "guard",
        "id",
        "loop",
        "reply",
        "source",
        "unsent",
        "was_open",
    )  # fmt: skip

    def __init__(self, responder: Responder, id: Any, given: Any) -> None:
        is_reply = isinstance(given, Message)
        self.id: Any = id
        self.source: Any = None if is_reply else given
        self.reply: Message | None = given if is_reply else None
        self.guard: ref[Any] | None = None
        self.unsent: Any = True
        self.was_open: bool = True
        self.loop: Loop = responder.loop
        self._pending: Pending | None = None  # the request whose outcome is passed on
        self._responder: Responder | None = responder
        self.call_later: Any = None  # made when it is needed: it is a cycle

    @property
    def is_open(self) -> bool:
        """Whether the requester can still get it."""
        return self._responder is not None and self._responder.conversation.is_writable

    def enter(self) -> None:
        """Have a turn go on with it, unless its reply was handed over: then it is done."""
        responder, later = self._responder, self.loop.later
        if not self.unsent:
            self.drop()
            return
        # atomic: no calls
        if responder is not None:
            responder.owed[self] = None
            later[self] = None

    def go_on(self) -> None:
        """Send the reply if it is known and was not sent. An interrupted call is made again by the next turn."""
        responder = self._responder
        loop = self.loop
        if responder is None or self not in responder.owed:  # it is done, or being sent
            loop.later.pop(self, None)
            return
        if self.source is not None:
            self._begin()
        if self.reply is None:
            self.reply = self._find_reply()
        if self.reply is None:
            loop.later.pop(self, None)
            responder.conversation.port.limit_reading()
            return
        owed = responder.owed
        outer = loop.enter()
        try:
            # atomic: no calls
            if self in owed:
                del owed[self]
            else:
                return  # a turn beneath has gone on with it

            responder.send(self, self.reply)
            self.was_open = responder.conversation.is_writable
            self.drop()
        except BaseException:
            self.enter()
            raise
        finally:
            loop.thread = outer
        if responder.conversation.port.paused:
            responder.conversation.port.update_reading()

    def _begin(self) -> None:
        """Have it settled by what the handler has returned. An interrupted call can be made again."""
        if self.call_later is None:
            self.call_later = partial(self.loop.later.setdefault, self)  # no code of ours, so never interrupted half-way
        source = self.source
        if source is None:  # a turn beneath has begun
            return
        error = find_deferrer(source)(source, self)
        if error is not None:
            self.reply = failed_in_dispatch(error)
        self.source = None

    def follow(self, pending: Pending) -> None:
        """Pass on the outcome of a request. An interrupted call can be made again."""
        self._pending = pending
        if not pending.settled:
            pending.unwatch(self.call_later)
            pending.unwatch(self._settled)
            pending.watch(self.call_later)  # first: a turn does what an interruption of the other has left
            pending.watch(self._settled)

    def _settled(self, promise: Any) -> None:
        self.go_on()

    def _find_reply(self) -> Message | None:
        pending = self._pending
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
        pending, responder = self._pending, self._responder
        if pending is not None:
            pending.unwatch(self.call_later)
            pending.unwatch(self._settled)
        if responder is not None:
            responder.owed.pop(self, None)
        self.call_later = self._pending = self.guard = self.source = self._responder = None
        self.loop.later.pop(self, None)  # last: a turn makes an interrupted call again
