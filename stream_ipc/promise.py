"""The reply to a request, before and after it has come.

Knows the requester that has sent it: a conversation's table of requests, or the tasks of a pool.
"""

from __future__ import annotations

from math import inf
from operator import attrgetter

from .arguments import Facade, check_timeout, safe_repr
from .core.last_look import take_replies
from .core.owed import DEFERRERS
from .messages import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Generic, TypeVar

    from .core.owed import Owed
    from .core.pending import Pending
    from .core.roles import Requester

    M_co = TypeVar("M_co", bound=Message, covariant=True)
else:
    M_co = None

    class Generic:
        """Stands in for ``typing.Generic``: ``ResponsePromise[Reply]`` is the class itself."""

        __slots__ = ()

        def __class_getitem__(cls, item: object) -> type:
            return cls


__all__ = ["ResponsePromise", "is_settled", "pending_of", "requester_of", "send_request"]

_new = object.__new__  # without the call of an __init__


class ResponsePromise(Facade, Generic[M_co]):
    """The reply to a request, as ``Session.request`` returns it.

    Dropping it is fine: nothing stays behind, and a late reply is discarded. It
    outlives its session: what is settled stays so.
    """

    __slots__ = ("__weakref__", "_pending")

    if TYPE_CHECKING:
        _pending: Pending

    @safe_repr
    def __repr__(self) -> str:
        pending = self._pending
        if isinstance(pending.outcome, BaseException):
            state = f"failed {type(pending.outcome).__name__}"
        elif pending.settled:
            state = f"replied {type(pending.outcome).__name__}"
        else:
            state = "overdue" if self.done else "pending"
        return f"<ResponsePromise {pending.id} {state}>"

    @property
    def id(self) -> str:
        """The request's id."""
        return self._pending.id  # type: ignore[return-value]  # it was sent

    @property
    def settled(self) -> bool:
        """Whether the outcome is known. Unlike ``done`` it ignores the clock."""
        return self._pending.settled != 0

    @property
    def deadline(self) -> float | None:
        """When the reply must be there, by ``time.monotonic()``, or None."""
        return self._pending.deadline

    @property
    def done(self) -> bool:
        """Whether ``wait()`` would return or raise at once.

        Never blocks and runs no handlers.
        """
        pending = self._pending
        if pending.settled:
            return True
        # If it is overdue, a reply may still lie in the stream, which wait() finds.
        return pending.deadline is not None and pending.requester.loop.clock() >= pending.deadline

    def wait(self, timeout: float | None = None) -> M_co:
        """Wait for the reply, and tick the whole peer meanwhile, so handlers run.

        What is already there counts even if the time is over, unless handlers
        take 5 s more for what came before it. Further calls return the same
        reply, or raise the same error again, at once. May be called inside a
        handler.

        Args:
            timeout: Wait at most that many seconds; 0 takes what is there; None
                waits until the request's own deadline.

        Returns:
            The reply, of the class that the request expects.

        Raises:
            RequestTimeoutError: The request's deadline has passed. It is given
                up.
            TimeoutError: ``timeout`` has passed. The request is still pending.
            StreamClosedError: The session is gone.
            RemoteError: The other side answered with an ``ErrorMessage``.
            UnexpectedReplyError: The reply is of another class than expected.
            SerializationError: The reply could not be decoded.
            Exception: An ``on_message`` handler that ran meanwhile has raised
                it. The request is still pending.
        """
        pending = self._pending
        if timeout is not None:
            check_timeout(timeout)
        if not pending.settled:
            loop = pending.requester.loop
            limit = inf if timeout is None else loop.clock() + timeout
            loop.run(pending, limit)
            if not pending.settled:
                take_replies([pending], limit)
                if not pending.settled:
                    raise TimeoutError(f"{pending.requester.timeout_text(pending, timeout)}; it is still pending")
        outcome = pending.outcome
        if isinstance(outcome, BaseException):
            raise outcome.with_traceback(None)
        return outcome  # type: ignore[no-any-return]

    def add_done_callback(self, function: Callable[[ResponsePromise[M_co]], Any]) -> None:
        """Have a function called with this promise once it has settled.

        That is in the tick that settles it, or now if it has. The promise stays
        alive until then. What the function raises is logged. Neither blocks
        nor, unless it has settled, runs anything.

        Args:
            function: Takes the promise, of which ``wait()`` returns or raises
                at once. It may send, wait and tick.

        Raises:
            TypeError: It is no function.
            RuntimeError: Another thread is using the peer, or this is a fork.

        Example:
            def show(promise):
                print(promise.wait())  # returns or raises at once

            session.request(task).add_done_callback(show)
        """
        if not callable(function):
            raise TypeError(f"add_done_callback() takes a function, not {function!r:.100}")
        pending = self._pending
        pending.requester.loop.inside(pending.call_back, function, self)

    def cancel(self) -> bool:
        """Give the request up; a late reply is discarded.

        The other side is not told. Does not block; done callbacks run.

        Returns:
            Whether it was still pending. If so, ``wait()`` raises ``IpcError``
            from now on.

        Raises:
            RuntimeError: Another thread is using the peer, or this is a fork.
        """
        pending = self._pending
        return pending.requester.loop.inside(pending.requester.cancel, pending)


def send_request(
    requester: Requester, message: Message, timeout: float | None, expect: type[M_co]
) -> ResponsePromise[M_co]:
    promise: ResponsePromise[M_co] = _new(ResponsePromise)
    promise._pending = pending = requester.pending_class(promise)
    pending.requester = requester
    pending.timeout = timeout
    pending.expect = expect
    pending.settled = 0
    pending.unsent = True
    pending.id = pending.outcome = pending.watchers = pending.callbacks = None
    requester.send(pending, message)
    return promise


def _pass_on(promise: ResponsePromise[Any], owed: Owed) -> None:
    owed.follow(promise._pending)


DEFERRERS[ResponsePromise] = _pass_on


# In C, because calls that wait for many promises ask all of them again and again.
is_settled: Callable[[ResponsePromise[Any]], int] = attrgetter("_pending.settled")
pending_of: Callable[[ResponsePromise[Any]], Any] = attrgetter("_pending")
requester_of: Callable[[ResponsePromise[Any]], Requester] = attrgetter("_pending.requester")
