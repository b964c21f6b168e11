"""Waiting for the replies to many requests.

Knows promises, and the conversations of their requests.
"""

from __future__ import annotations

import math
from collections import deque

from .arguments import check_iterable, check_timeout
from .clock import monotonic
from .core.last_look import take_replies
from .core.pending import Reference
from .interruptions import pass_on
from .promise import ResponsePromise, is_settled, pending_of, requester_of
from .transports.descriptors import wait_readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, Literal, TypeVar, overload

    from .core.loop import Loop
    from .core.roles import Requester
    from .messages import Message

    M = TypeVar("M", bound=Message)

__all__ = ["as_completed", "gather", "stray_stop"]

_FEW = 64  # promises: of more, not all are asked which has settled first

_CHECK = 0.05  # seconds between two turns of several loops, at most: some things are only looked at in turns


class _Waiting:
    """Turns the loops of many promises, any number of them, at most for a time.

    Args:
        call: What texts call the function that was called.
        promises: As that got them. Only the first was checked to be one.
        timeout: As that got it.

    Attributes:
        given: The promises, as a list.
    """

    def __init__(self, call: str, promises: Iterable[ResponsePromise[Any]], timeout: float | None) -> None:
        check_iterable(f"{call} takes a list of promises", promises)
        check_timeout(timeout)
        self._call = call
        self.given: list[ResponsePromise[Any]] = list(promises)
        self.check(self.given[:1])
        self._loops: list[Loop] = []  # made when it is needed
        self._timeout = timeout
        self._clock: Callable[[], float] = requester_of(self.given[0]).loop.clock if self.given else monotonic
        self._limit: float = math.inf if timeout is None else self._clock() + timeout

    def check(self, given: Sequence[object]) -> None:
        if not all([issubclass(cls, ResponsePromise) for cls in {*map(type, given)}]):
            wrong = next(one for one in given if not issubclass(type(one), ResponsePromise))  # a mock of one says it is
            raise TypeError(f"{self._call} takes promises, as request() returns them, not {wrong!r:.100}")

    def run(self, until: Any) -> bool:
        """Turn until something has settled: anything with an attribute ``settled``.

        Returns:
            Whether it has; if not, the time is over. What is there already counts nevertheless.
        """
        if not self._loops:
            self._loops = list({requester.loop for requester in {*map(requester_of, self.given)}})
        turn = self._loops[0].run if len(self._loops) == 1 else self._turn_all
        while not until.settled:
            turn(until, self._limit)
            if self._clock() >= self._limit and not until.settled:
                take_replies([pending for pending in map(pending_of, self.given) if not pending.settled], self._limit)
                break
        return bool(until.settled)

    def too_late(self) -> TimeoutError:
        """Return the error that says how many are unfinished."""
        left = [promise for promise in {*self.given} if not promise.settled]
        text = f"{len(left)} of {len({*self.given})} requests got no reply within {self._timeout} s"
        return TimeoutError(f"{text}; they are still pending")

    def _turn_all(self, until: Any, limit: float) -> None:
        # Each loop has its own clock and poller; their descriptors can be waited for together.
        for loop in self._loops:
            loop.run(until, 0)
        loops = [loop for loop in self._loops if not loop.closed]
        if until.settled or not loops:
            return
        dues = [loop.next_deadline() for loop in loops]  # some of their transports may have no descriptor
        wait = max(0.0, min(_CHECK, limit - self._clock(), *[due for due in dues if due is not None]))
        try:
            fds = [loop.fileno() for loop in loops]
        except OSError as exc:  # this program's selector has no descriptor
            pass_on(exc)
            loops[0].tick(min(wait, 0.01))
        else:
            wait_readable(fds, wait)


def stray_stop() -> RuntimeError:
    """Return the error for a handler's ``StopIteration`` that would end an iterator without a word."""
    return RuntimeError("a handler has raised StopIteration, which would have ended this iterator")


if TYPE_CHECKING:

    @overload
    def gather(promises: Iterable[ResponsePromise[M]], timeout: float | None = None) -> list[M]: ...

    @overload
    def gather(
        promises: Iterable[ResponsePromise[M]], timeout: float | None = None, *, return_exceptions: Literal[False]
    ) -> list[M]: ...

    @overload
    def gather(
        promises: Iterable[ResponsePromise[M]], timeout: float | None = None, *, return_exceptions: bool
    ) -> list[M | Exception]: ...


def gather(
    promises: Iterable[ResponsePromise[Any]], timeout: float | None = None, *, return_exceptions: bool = False
) -> list[Any]:
    """Wait until all have settled, and tick every peer concerned meanwhile.

    Args:
        promises: What ``request()`` returned, of any sessions.
        timeout: Seconds in all; None waits until each request's own deadline.
        return_exceptions: Let the errors of requests stand in the list, in
            place of replies.

    Returns:
        The replies, in the order of the promises.

    Raises:
        TimeoutError: ``timeout`` has passed; the text says how many are
            unfinished. They are still pending.
        Exception: The first error in the order of the promises, once all have
            settled; see ``ResponsePromise.wait``. Or what an ``on_message``
            handler has raised.

    Example:
        promises = [session.request(task) for session in sessions]
        for session, reply in zip(sessions, gather(promises)):
            print(session.name, reply)
    """
    waiting = _Waiting("gather()", promises, timeout)
    waiting.check(waiting.given)
    for pending in map(pending_of, waiting.given):
        if not pending.settled and not waiting.run(pending):
            raise waiting.too_late()
    outcomes = [pending.outcome for pending in map(pending_of, waiting.given)]
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            outcome.__traceback__ = None
            if not return_exceptions:
                raise outcome
    return outcomes


def as_completed(promises: Iterable[ResponsePromise[M]], timeout: float | None = None) -> Iterator[ResponsePromise[M]]:
    """Yield each promise as it settles, in the order of settling.

    Ticks every peer concerned meanwhile. An iterator that is dropped, or has
    timed out, leaves nothing behind, so ``next(as_completed(pending))`` in a
    loop is as good as one iterator. Of more than 64, the first that it yields
    is one that had settled before the call, if there is one, but maybe not the
    one that had settled first.

    Args:
        promises: What ``request()`` returned, of any sessions.
        timeout: Seconds in all; None waits until each request's own deadline.

    Yields:
        Promises of which ``wait()`` returns or raises at once.

    Raises:
        TimeoutError: ``timeout`` has passed; the text says how many are
            unfinished. They are still pending.
        Exception: What an ``on_message`` handler has raised; ``next()`` on the
            same iterator goes on.

    Example:
        asked = {session.request(task): session for session in sessions}
        for promise in as_completed(asked):
            try:
                print(asked[promise].name, promise.wait())
            except (StreamClosedError, RemoteError) as error:
                print(asked[promise].name, error)
    """
    # The clock starts at the call and not at the first next(), as the reader of the call expects.
    return _AsCompleted(promises, timeout)


class _AsCompleted(_Waiting):
    """Yields promises as they settle.

    An iterator and no generator: a handler's error comes out of ``next()``, and the next ``next()`` goes on.

    Nothing is registered before there is something to wait for, and then once for each session and not for each promise:
    ``next(as_completed(pending))`` in a loop is to cost next to nothing for what is only looked at. What is registered are
    weak references, so that an iterator that is dropped leaves nothing behind.
    """

    def __init__(self, promises: Iterable[ResponsePromise[Any]], timeout: float | None) -> None:
        super().__init__("as_completed()", promises, timeout)
        # Maybe nobody asks for another than the first, so of many not all are looked at yet.
        try:
            settled = filter(is_settled, self.given)
            first = next(settled, None) if len(self.given) > _FEW else min(settled, key=is_settled, default=None)
        except AttributeError:
            self.check(self.given)
            raise
        self._first: list[ResponsePromise[Any]] = [] if first is None else [first]
        self.check(self._first or self.given)
        self._queue = deque(self._first)  # those that have settled, in that order
        self._rest: Any = None  # a dict of what was never in the queue; made when it is needed
        self._references: dict[Requester, Reference] = {}
        self._watching = False  # all of them

    def __iter__(self) -> _AsCompleted:
        return self

    def __next__(self) -> ResponsePromise[Any]:
        queue = self._queue
        while True:  # again if what was there was taken, by a handler that has called next() meanwhile
            # atomic: no calls
            if queue:
                promise = queue[0]
                del queue[0]
                return promise

            if self._rest is None:
                self.check(self.given)
                rest = dict.fromkeys(self.given)
                for promise in self._first:
                    del rest[promise]
                self._rest = rest
            if not self._rest:
                self._unwatch()
                raise StopIteration
            if not self._watching:
                self._watch()
            try:
                found = self.run(self)
            except BaseException as exc:
                self._watching = False  # an interruption may have kept one from being noted
                if isinstance(exc, StopIteration):
                    raise stray_stop() from exc
                raise
            if not found:
                self._unwatch()
                raise self.too_late()

    @property
    def settled(self) -> bool:
        """Whether there is something to yield, or nothing any more; what a loop's ``run`` looks at."""
        return len(self._queue) > 0 or not self._rest

    def note(self, promise: Any) -> None:
        """Take note that a promise has settled. An interrupted call can be made again."""
        rest = self._rest
        # atomic: no calls
        if rest is not None and promise in rest:
            self._queue += (promise,)
            del rest[promise]

    def _watch(self) -> None:
        """Be told of each promise that settles from now on, and find those that have settled."""
        given = tuple(self._rest)  # a signal handler may turn, and so change it
        for requester in set(map(requester_of, given)):
            observers = requester.observers
            observers.add(self._references.setdefault(requester, Reference(self, observers.discard)))
        for promise in sorted(filter(is_settled, given), key=is_settled):
            self.note(promise)
        self._watching = True

    def _unwatch(self) -> None:
        """Be told no more, so that nothing stays behind. What comes next begins anew."""
        self._watching = False
        for requester, reference in self._references.copy().items():
            requester.observers.discard(reference)
