"""Waiting for the replies to many requests.

Knows promises, and the conversations of their requests.
"""

from __future__ import annotations

import math
from collections import deque
from weakref import ref

from .arguments import check_timeout
from .clock import monotonic
from .core.pending import next_moment
from .core.waits import take_replies
from .errors import StreamClosedError
from .interruptions import pass_on
from .promise import ResponsePromise, is_settled, pending_of, requester_of
from .transports.descriptors import wait_readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, Literal, TypeVar, overload

    from .core.loop import Loop
    from .messages import Message

    M = TypeVar("M", bound=Message)
    Base = ref[Any]
else:
    Base = ref

__all__ = ["as_completed", "gather", "stray_stop"]

_CHECK = 0.05  # seconds between two turns of several loops, at most: some things are only looked at in turns


class _Reference(Base):
    """A weak reference that a set can drop when what it refers to is gone, also if it was never put there."""

    __slots__ = ()

    if not TYPE_CHECKING:
        __hash__ = object.__hash__
        __eq__ = object.__eq__
        __ne__ = object.__ne__


class _Loops:
    """Turns the loops of many promises, any number of them, at most for a time.

    Attributes:
        given: The promises.
    """

    def __init__(self, promises: Iterable[ResponsePromise[Any]], timeout: float | None) -> None:
        check_timeout(timeout)
        self.given: list[ResponsePromise[Any]] = list(promises)
        self._look()
        self._loops: list[Loop] = []
        self._clock: Callable[[], float] = requester_of(self.given[0]).loop.clock if self.given else monotonic
        self._limit: float = math.inf if timeout is None else self._clock() + timeout

    def _look(self) -> None:
        _check(self.given)

    def concern(self, promises: Iterable[ResponsePromise[Any]]) -> None:
        """Turn the loops of these promises from now on."""
        self._loops = list({requester.loop for requester in map(requester_of, promises)})

    def run(self, until: Any, promises: Iterable[ResponsePromise[Any]]) -> bool:
        """Turn until something has settled.

        Args:
            until: What that is, with an attribute ``settled``.
            promises: Those that are waited for: what is there already counts even if the time is over.

        Returns:
            Whether it has; if not, the time is over.
        """
        while not until.settled:
            if len(self._loops) == 1:
                self._loops[0].run(until, self._limit)
            else:
                self._turn_all(until)
            if until.settled:
                break
            if self._clock() >= self._limit:
                take_replies(map(pending_of, tuple(promises)), self._limit)
                return bool(until.settled)
            if all([loop.closed for loop in self._loops]):
                # Closing settles everything, so this is never so. But then nothing else would end this.
                raise StreamClosedError("every peer of these requests is closed, so nothing can settle them")
        return True

    def _turn_all(self, until: Any) -> None:
        # Each loop has its own clock and poller; their descriptors can be waited for together.
        for loop in self._loops:
            loop.run(until, 0)
        loops = [loop for loop in self._loops if not loop.closed]
        if until.settled or not loops:
            return
        wait = min(_CHECK, max(0.0, self._limit - self._clock()))
        for loop in loops:  # some of their transports may have no descriptor
            due = loop.next_deadline()
            if due is not None:
                wait = min(wait, due)
        try:
            fds = [loop.fileno() for loop in loops]
        except OSError as exc:  # this program's selector has no descriptor
            pass_on(exc)
            loops[0].tick(min(wait, 0.01))
        else:
            wait_readable(fds, wait)


def _check(given: Sequence[object]) -> None:
    if not all([issubclass(cls, ResponsePromise) for cls in {*map(type, given)}]):
        wrong = next(one for one in given if not isinstance(one, ResponsePromise))
        raise TypeError(f"gather() and as_completed() take promises of request(), not {wrong!r:.100}")


def stray_stop() -> RuntimeError:
    """Return the error for a handler's ``StopIteration`` that would end an iterator without a word."""
    return RuntimeError("a handler has raised StopIteration, which would have ended this iterator")


def _too_few(left: int, count: int, timeout: float | None) -> TimeoutError:
    return TimeoutError(f"{left} of {count} requests got no reply within {timeout} s; they are still pending")


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
    loops = _Loops(promises, timeout)
    given = loops.given
    loops.concern(given)
    for pending in map(pending_of, given):
        if not pending.settled and not loops.run(pending, given):
            left = {promise for promise in given if not promise.settled}
            if left:
                raise _too_few(len(left), len({*given}), timeout)
    outcomes = [pending.outcome for pending in map(pending_of, given)]
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            outcome.__traceback__ = None
            if not return_exceptions:
                raise outcome
    return outcomes


def as_completed(
    promises: Iterable[ResponsePromise[M]], timeout: float | None = None
) -> Iterator[ResponsePromise[M]]:
    """Yield each promise as it settles, in the order of settling.

    Ticks every peer concerned meanwhile. An iterator that is dropped, or has
    timed out, leaves nothing behind, so ``next(as_completed(pending))`` in a
    loop is as good as one iterator.

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


class _AsCompleted(_Loops):
    """Yields promises as they settle.

    An iterator and no generator: a handler's error comes out of ``next()``, and the next ``next()`` goes on.

    Nothing is registered before there is something to wait for, and then once for each session and not for each promise:
    ``next(as_completed(pending))`` in a loop is to cost next to nothing for what is only looked at. What is registered are
    weak references, so that an iterator that is dropped leaves nothing behind.

    Attributes:
        settled: Whether one has settled that was not taken yet; what a loop's ``run`` looks at.
    """

    def __init__(self, promises: Iterable[ResponsePromise[Any]], timeout: float | None) -> None:
        super().__init__(promises, timeout)
        self._timeout = timeout
        self._began = next_moment()
        self._taken = 0
        self._rest: dict[ResponsePromise[Any], None] | None = None  # made when it is needed
        # Promises that have settled, in that order; those that had settled before the call are in the order given.
        self._queue: deque[ResponsePromise[Any]] = deque()
        self._watched: list[tuple[set[ref[Any]], ref[Any]]] = []
        self._watching = False  # all of them

    def _look(self) -> None:
        # Maybe nobody asks for another than the first, so what is behind it is not looked at yet.
        try:
            first = next(filter(is_settled, self.given), None)
        except AttributeError:
            _check(self.given)
            raise
        self._first: ResponsePromise[Any] | None = first
        _check(self.given if first is None else (first,))

    def __iter__(self) -> _AsCompleted:
        return self

    def __next__(self) -> ResponsePromise[Any]:
        first = self._first
        if first is not None and not self._taken:
            self._taken = 1
            return first
        if first is not None:
            self._left.pop(first, None)
            self._first = None
        queue = self._queue
        while True:  # again if what was there was taken, by a handler that has called next() meanwhile
            count = len(self._left) + len(queue)
            if not count:
                self._unwatch()
                raise StopIteration
            try:
                found = self._wait()
            except StopIteration as exc:
                raise stray_stop() from exc
            if not found:
                self._unwatch()
                raise _too_few(count, count + self._taken, self._timeout)
            # atomic: no calls
            if queue:
                promise = queue[0]
                del queue[0]
                self._taken += 1
                return promise

    @property
    def settled(self) -> bool:
        if self._queue:
            return True
        return self._rest is not None and not self._rest  # a function of the user's has taken the last of them

    @property
    def _left(self) -> dict[ResponsePromise[Any], None]:
        """The promises that are not in the queue yet, nor were taken."""
        if self._rest is None:
            _check(self.given)
            self._rest = dict.fromkeys(self.given)
        return self._rest

    def note(self, promise: Any) -> None:
        """Take note that a promise has settled. An interrupted call can be made again."""
        left = self._rest
        # atomic: no calls
        if left is not None and promise in left:
            self._queue += (promise,)
            del left[promise]

    def _wait(self) -> bool:
        """Turn until one is in the queue; returns whether one is."""
        if not self.settled and not self._watching:
            self._watch()
        return self.run(self, self._left)

    def _watch(self) -> None:
        """Be told of each promise that settles from now on, and find those that have settled."""
        self._unwatch()
        given = tuple(self._left)  # a signal handler may turn, and so change it
        for requester in set(map(requester_of, given)):
            watchers = requester.watchers
            watcher = _Reference(self, watchers.discard)
            self._watched.append((watchers, watcher))
            watchers.add(watcher)
        for promise in sorted(filter(is_settled, given), key=self._order):
            self.note(promise)
        self.concern(given)
        self._watching = True

    def _order(self, promise: ResponsePromise[Any]) -> int:
        return max(int(is_settled(promise)), self._began)

    def _unwatch(self) -> None:
        """Be told no more, so that nothing stays behind. What comes next begins anew."""
        self._watching = False
        while self._watched:
            watchers, watcher = self._watched[-1]
            watchers.discard(watcher)
            del self._watched[-1]
