"""A reply that is made after the handler of its request has returned.

Knows the request it belongs to only as an ``Owed``, which sends it.
"""

from __future__ import annotations

from weakref import ref

from .arguments import Facade, check_message, safe_repr, sendable
from .core.owed import DEFERRERS
from .messages import ErrorMessage, failed_in_dispatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .core.owed import Owed
    from .messages import Message

__all__ = ["DeferredReply"]


class DeferredReply(Facade):
    """Stands for a reply that is made later.

    Return one from an ``on_request`` handler, and keep it to settle it. The
    session goes on with what comes next meanwhile. It is settled once, before
    or after it is returned, and belongs to the thread of its session. If it is
    dropped unsettled, the requester gets an error that says so.

    Example:
        jobs = []

        @session.on_request
        def work(request: TaskRequest) -> DeferredReply:
            jobs.append((request, DeferredReply()))
            return jobs[-1][1]

        while session.is_open:
            session.tick(None)
            for request, reply in jobs:
                reply.send(TaskResponse(request.job.upper()))
            jobs.clear()
    """

    __slots__ = ("__weakref__", "_outcome", "_owed")

    def __init__(self) -> None:
        self._outcome: Message | None = None
        self._owed: Owed | None = None

    @safe_repr
    def __repr__(self) -> str:
        state = "pending" if self._outcome is None else f"settled {type(self._outcome).__name__}"
        return f"<DeferredReply {state}{'' if self._owed is None else f' for request {self._owed.id:.128}'}>"

    @property
    def done(self) -> bool:
        """Whether it is settled."""
        return self._outcome is not None

    def send(self, message: Message) -> bool:
        """Reply. It leaves now, or is queued if the stream is full.

        Neither blocks nor runs handlers. A reply that cannot travel reaches the
        requester as an error, as it does if a handler returns it.

        Args:
            message: The reply.

        Returns:
            Whether the requester's session was still open; True as long as it
            was not returned to a session.

        Raises:
            TypeError: ``message`` is no Message.
            RuntimeError: It is settled already, another thread is using the
                peer, or this is a fork.
        """
        if type(message) not in sendable:
            check_message("send", message)
        return self._settle(message)

    def fail(self, error: str | BaseException) -> bool:
        """Reply with an error: a ``RemoteError`` at the requester.

        Neither blocks nor runs handlers.

        Args:
            error: Its text, or an exception, whose type, text and traceback are
                passed on.

        Returns:
            As ``send``.

        Raises:
            TypeError: ``error`` is neither.
            RuntimeError: As ``send``.
        """
        if isinstance(error, str):
            return self._settle(ErrorMessage(error))
        if not isinstance(error, BaseException):
            raise TypeError(f"fail() takes a text or an exception, not {error!r:.100}")
        return self._settle(failed_in_dispatch(error))

    def _settle(self, outcome: Message) -> bool:
        owed = self._owed
        if owed is not None:
            owed.loop.check_entry()
        if self._outcome is not None:
            raise RuntimeError(f"{self!r} is settled already; a request gets one reply")
        if owed is None or not owed.is_open:
            self._outcome = outcome
            return owed is None
        later = owed.loop.later
        # atomic: no calls
        later[owed] = None
        owed.reply = outcome
        self._outcome = outcome

        owed.go_on()
        return owed.was_open


def _defer(reply: DeferredReply, owed: Owed) -> Exception | None:
    if reply._owed is not None and reply._owed is not owed:
        text = "a handler returned a DeferredReply that was returned before; each request needs one of its own"
        return RuntimeError(text)
    guard = ref(reply, owed.call_later)
    # atomic: no calls
    owed.guard = guard
    owed.reply = reply._outcome
    reply._owed = owed
    return None


DEFERRERS[DeferredReply] = _defer
