"""The reply to a request, before and after it has come; waiting for many of them.

Knows the conversation of a request, which sends it and waits for its reply.
"""

from __future__ import annotations

import heapq
import itertools
import math
from functools import partial

from . import log
from .messages import Message
from .transports.descriptors import wait_readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, Generic, TypeVar

    from .core.conversation import Conversation
    from .core.loop import Loop
    from .core.replies import Pending

    M = TypeVar("M", bound=Message)
    M_co = TypeVar("M_co", bound=Message, covariant=True)
else:
    M_co = None

    class Generic:
        """Stands in for ``typing.Generic``: ``ResponsePromise[Reply]`` is the class itself."""

        __slots__ = ()

        def __class_getitem__(cls, item: object) -> type:
            return cls


__all__ = ["DEFAULT", "ResponsePromise", "as_completed", "check_timeout", "gather", "request"]

_new = object.__new__  # without the call of an __init__

# Sentinel: timeout not given (None means no limit).
DEFAULT: Any = ...


def check_timeout(timeout: Any) -> None:
    """Raise for what is no number of seconds.

    Raises:
        TypeError: It is neither a number nor None.
        ValueError: It is negative or no number at all.
    """
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r:.100}")
    try:
        seconds = float(timeout)
    except OverflowError:
        raise ValueError("timeout is a number of seconds beyond all floats; None is for no limit") from None
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"timeout must be 0 seconds or more, not {timeout!r}")


class ResponsePromise(Generic[M_co]):
    """The reply to a request, as ``Session.request`` returns it.

    Dropping it is fine: nothing stays behind, and a late reply is discarded. It outlives its session: what is settled
    stays so.
    """

    __slots__ = ("__weakref__", "_conversation", "_pending")

    _conversation: Conversation
    _pending: Pending

    def __repr__(self) -> str:
        try:
            pending = self._pending
            if isinstance(pending.outcome, BaseException):
                state = f"failed {type(pending.outcome).__name__}"
            elif pending.settled:
                state = f"replied {type(pending.outcome).__name__}"
            else:
                state = "overdue" if self.done else "pending"
            return f"<ResponsePromise {pending.id} {state}>"
        except Exception:  # half made
            return "<ResponsePromise>"

    @property
    def id(self) -> str:
        """The request's id."""
        return self._pending.id

    @property
    def settled(self) -> bool:
        """Whether the outcome is known. Unlike ``done`` it does not look at the clock."""
        return self._pending.settled

    @property
    def deadline(self) -> float | None:
        """When the reply must be there, in the time of ``time.monotonic()``; None for no limit."""
        return self._pending.deadline

    @property
    def done(self) -> bool:
        """Whether ``wait()`` would return or raise at once. Never blocks and runs no handlers."""
        pending = self._pending
        if not pending.settled and pending.deadline is not None and self._conversation.loop.clock() >= pending.deadline:
            # A reply may lie in the stream: then wait() would still find it.
            return True
        return pending.settled

    def wait(self, timeout: float | None = None) -> M_co:
        """Wait for the reply, and tick the whole peer meanwhile, so handlers run.

        What is already there counts even if the time is over. Further calls return the same reply, or raise the same
        error again, at once. May be called inside a handler.

        Args:
            timeout: Wait at most that many seconds; 0 takes what is there; None waits until the request's own deadline.

        Returns:
            The reply, of the class that the request expects.

        Raises:
            RequestTimeoutError: The request's deadline has passed. It is given up.
            TimeoutError: ``timeout`` has passed. The request is still pending.
            StreamClosedError: The session is gone.
            RemoteError: The other side answered with an ``ErrorMessage``.
            UnexpectedReplyError: The reply is of another class than expected.
            SerializationError: The reply could not be decoded.
            Exception: An ``on_message`` handler that ran meanwhile has raised it. The request is still pending.
        """
        pending = self._pending
        if not pending.settled:
            if timeout is not None:
                check_timeout(timeout)
            self._conversation.wait(pending, timeout)
        outcome = pending.outcome
        if isinstance(outcome, BaseException):
            raise outcome.with_traceback(None)
        return outcome  # type: ignore[no-any-return]

    def add_done_callback(self, function: Callable[[ResponsePromise[M_co]], Any]) -> None:
        """Have a function called with this promise once it has settled: in the tick that settles it, or now if it has.

        The promise stays alive until then. What the function raises is logged. Neither blocks nor, unless it has settled,
        runs anything.

        Args:
            function: Takes the promise, of which ``wait()`` returns or raises at once. It may send, wait and tick.

        Raises:
            TypeError: It is no function.
            RuntimeError: Another thread is using the peer, or this is a fork.
        """
        if not callable(function):
            raise TypeError(f"add_done_callback() takes a function, not {function!r:.100}")
        self._conversation.loop.check_entry()
        call = partial(_call, function, self)
        if self._pending.settled:
            call(self)
        else:
            self._pending.watch(call)

    def cancel(self) -> bool:
        """Give the request up; a late reply is discarded. The other side is not told. Neither blocks nor runs handlers.

        Returns:
            Whether it was still pending. If so, ``wait()`` raises ``IpcError`` from now on.
        """
        return self._conversation.replies.cancel(self._pending)


def request(
    conversation: Conversation, message: Message, timeout: float | None, expect: type[M_co]
) -> ResponsePromise[M_co]:
    """Send a request; returns its promise."""
    promise: ResponsePromise[M_co] = _new(ResponsePromise)
    promise._conversation = conversation
    promise._pending = conversation.request(promise, message, timeout, expect)
    return promise


def _call(function: Callable[[Any], Any], kept: ResponsePromise[Any], promise: Any) -> None:
    """Call a done callback. ``kept`` has kept the promise alive."""
    try:
        function(kept)
    except Exception:
        log.error("a done callback of %r failed", kept, exc_info=True)


class _Waiting:
    """Waits for some of many promises, on any number of peers.

    Attributes:
        settled: Whether enough have settled; what a loop's ``run`` looks at.
    """

    waits_alone = False

    def __init__(self, promises: list[ResponsePromise[Any]], timeout: float | None) -> None:
        check_timeout(timeout)
        for promise in promises:
            if not isinstance(promise, ResponsePromise):
                raise TypeError(f"gather() and as_completed() take promises of request(), not {promise!r:.100}")
        # In the order of settling; those that had settled before come first, in the order given. A dict, because a
        # promise whose settling was interrupted enters itself again.
        self.queue: dict[ResponsePromise[Any], None] = {p: None for p in promises if p.settled}
        self._unsettled = [p for p in promises if not p.settled]
        for promise in self._unsettled:
            promise._pending.watch(self.queue.setdefault)
        self._loops: list[Loop] = list(dict.fromkeys([p._conversation.loop for p in self._unsettled]))
        self._clock = self._loops[0].clock if self._loops else None
        self._limit = None if timeout is None or self._clock is None else self._clock() + timeout
        count = itertools.count()  # so that the heap never compares promises
        self._deadlines: list[tuple[float, int, ResponsePromise[Any]]] = [
            (p.deadline, next(count), p) for p in self._unsettled if p.deadline is not None
        ]
        heapq.heapify(self._deadlines)
        self._wanted = 0

    @property
    def settled(self) -> bool:
        return len(self.queue) >= self._wanted

    def until(self, wanted: int) -> bool:
        """Turn until that many are in the queue.

        Returns:
            Whether they are; if not, the time is over.
        """
        self._wanted = wanted
        while not self.settled:
            while self._deadlines and self._deadlines[0][2].settled:
                heapq.heappop(self._deadlines)
            limit = self._limit
            if self._deadlines and (limit is None or self._deadlines[0][0] < limit):
                limit = self._deadlines[0][0]
            if len(self._loops) == 1:
                self._loops[0].run(self, limit)
            else:
                self._turn_all(limit)  # a peer that is closed has settled its promises
            if self.settled:
                break
            assert self._clock is not None
            now = self._clock()
            if limit is not None and now >= limit:
                self._look_again(now)
            while self._deadlines and self._deadlines[0][0] <= now:
                promise = heapq.heappop(self._deadlines)[2]
                if not promise.settled:
                    promise._conversation.replies.give_up(promise._pending)
            if not self.settled and self._limit is not None and now >= self._limit:
                return False
        return True

    def _look_again(self, now: float) -> None:
        """Take what was there in time and could not be read."""
        over = self._limit is not None and now >= self._limit
        for promise in self._unsettled:
            if promise.settled or not (over or (promise.deadline is not None and promise.deadline <= now)):
                continue
            if promise._conversation.has_reply(promise._pending):
                loop = promise._conversation.loop
                loop.run(promise._pending, loop.clock())

    def _turn_all(self, limit: float | None) -> None:
        # Each loop has its own clock and poller; their descriptors can be waited for together.
        for loop in self._loops:
            if not loop.closed:
                loop.tick(0)
        self._loops = [loop for loop in self._loops if not loop.closed]
        if self.settled or not self._loops:
            return
        assert self._clock is not None
        wait = 0.05 if limit is None else min(0.05, max(0.0, limit - self._clock()))
        for loop in self._loops:  # some of their transports may have no descriptor
            due = loop.next_deadline()
            if due is not None:
                wait = min(wait, due)
        try:
            fds = [loop.fileno() for loop in self._loops]
        except OSError:  # this program's selector has no descriptor
            self._loops[0].tick(min(wait, 0.01))
        else:
            wait_readable(fds, wait)

    def end(self) -> None:
        for promise in self._unsettled:
            promise._pending.unwatch(self.queue.setdefault)


def _too_few(left: int, count: int, timeout: float | None) -> TimeoutError:
    return TimeoutError(f"{left} of {count} requests got no reply within {timeout} s; they are still pending")


def gather(promises: Iterable[ResponsePromise[M]], timeout: float | None = None) -> list[M]:
    """Wait until all have settled, and tick every peer concerned meanwhile.

    Args:
        promises: What ``request()`` returned, of any sessions.
        timeout: Seconds in all; None waits until each request's own deadline.

    Returns:
        The replies, in the order of the promises.

    Raises:
        TimeoutError: ``timeout`` has passed; the text says how many are unfinished. They are still pending.
        Exception: The first error in the order of the promises, once all have settled; see ``ResponsePromise.wait``.
    """
    given = list(promises)
    unique = list(dict.fromkeys(given))
    waiting = _Waiting(unique, timeout)
    try:
        if not waiting.until(len(unique)):
            raise _too_few(len(unique) - len(waiting.queue), len(unique), timeout)
    finally:
        waiting.end()
    return [promise.wait() for promise in given]


def as_completed(
    promises: Iterable[ResponsePromise[M]], timeout: float | None = None
) -> Iterator[ResponsePromise[M]]:
    """Yield each promise as it settles, in the order of settling, and tick every peer concerned meanwhile.

    Args:
        promises: What ``request()`` returned, of any sessions.
        timeout: Seconds in all; None waits until each request's own deadline.

    Yields:
        Promises of which ``wait()`` returns or raises at once.

    Raises:
        TimeoutError: ``timeout`` has passed; the text says how many are unfinished. They are still pending.
        Exception: What an ``on_message`` handler has raised; ``next()`` on the same iterator goes on.
    """
    unique: dict[ResponsePromise[M], None] = dict.fromkeys(promises)
    # The clock starts at the call and not at the first next(), as the reader of the call expects.
    return _AsCompleted(list(unique), timeout)


class _AsCompleted:
    """An iterator and no generator: a handler's error comes out of ``next()``, and the next ``next()`` goes on."""

    def __init__(self, promises: list[ResponsePromise[Any]], timeout: float | None) -> None:
        self._left = self._count = len(promises)
        self._timeout = timeout
        self._waiting = _Waiting(promises, timeout)

    def __iter__(self) -> _AsCompleted:
        return self

    def __next__(self) -> ResponsePromise[Any]:
        if not self._left:
            self._waiting.end()
            raise StopIteration
        if not self._waiting.until(1):
            raise _too_few(self._left, self._count, self._timeout)
        queue = self._waiting.queue
        for promise in queue:
            break
        # atomic: no calls
        del queue[promise]
        self._left -= 1
        return promise
