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
    """A reply that a handler has put off.

    Attributes:
        id: The request's id.
        source: What the handler has returned, until it has been told to settle this.
        reply: What will be sent, once it is known.
        was_open: Whether the requester's session was open when the reply was sent.
        loop: The loop of its session.
        call_later: A function of any argument that has ``go_on`` called in that loop's next turn.
        guard: A weak reference to what will settle this, which marks it as work when that is dropped.
    """

    __slots__ = (
        "_pending",
        "_promise",
        "_responder",
        "_sending",
        "call_later",
        "guard",
        "id",
        "loop",
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
        self.loop: Loop = responder.loop
        self._pending: Pending | None = None  # the request whose outcome is passed on
        self._promise: Any = None
        self._responder: Responder | None = responder
        self.call_later: Any = None  # made by ``begin``: it is a cycle
        self._sending = False

    @property
    def is_open(self) -> bool:
        """Whether the requester can still get it."""
        return self._responder is not None and self._responder.is_writable

    def begin(self) -> Exception | None:
        """Have it settled by what the handler has returned. An interrupted call can be made again.

        Returns:
            Why that is of no use: it is for another request.
        """
        source, responder = self.source, self._responder
        if source is None or responder is None:
            return None
        if self.call_later is None:
            self.call_later = partial(self.loop.later.setdefault, self)  # no code of ours, so never interrupted half-way
        responder.owed[self] = None
        error: Exception | None = find_deferrer(source)(source, self)
        if error is None:
            self.source = None
            responder.port.limit_reading()
        else:
            self._remove(responder)
        return error

    def follow(self, pending: Pending, promise: Any) -> None:
        """Pass on the outcome of a request. An interrupted call can be made again."""
        self._pending = pending
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
        if self.reply is None:
            self.reply = self._find_reply()
        if self.reply is None or responder is None or self not in responder.owed:
            loop.later.pop(self, None)
            return
        outbox = responder.port.channel.outbox
        outer = loop.enter()
        last = outbox.last
        try:
            # atomic: no calls
            self._sending = True
            loop.later[self] = None

            responder.send_reply(self.id, self.reply)
            self.was_open = responder.is_writable
            self._remove(responder)
        except BaseException:
            if outbox.last is last:
                self._sending = False
            else:
                self._remove(responder)
            raise
        finally:
            loop.thread = outer

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

    def _remove(self, responder: Responder) -> None:
        self.drop()
        if responder.port.paused:
            responder.port.update_reading()

    def drop(self) -> None:
        """Drop what it refers to: it is sent, or the session is closed. An interrupted call can be made again."""
        if self._pending is not None:
            self._pending.unwatch(self.call_later)
            self._pending.unwatch(self._settled)
        self.loop.later.pop(self, None)
        if self._responder is not None:
            self._responder.owed.pop(self, None)
        self.call_later = self._pending = self._promise = self.guard = self.source = self._responder = None
