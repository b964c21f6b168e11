"""The reply to a request, before and after it has come; waiting for many of them.

Knows errors and messages. Must not know how anything is sent or received: a promise asks its session's peer to turn
until something has settled.
"""

from __future__ import annotations

import heapq
import itertools
import math
import select
from collections import deque
from typing import TYPE_CHECKING, Any, Deque, Dict, Generic, Iterable, Iterator, List, Optional, Tuple, Type, TypeVar

from .errors import IpcError, RemoteError, RequestTimeoutError, UnexpectedReplyError
from .messages import ErrorMessage, Message

if TYPE_CHECKING:
    from .peer import IpcPeer
    from .session import Session

__all__ = ["DEFAULT", "ResponsePromise", "as_completed", "check_timeout", "gather"]

M = TypeVar("M", bound=Message)

# The default of a timeout that has None as a value of its own: no limit.
DEFAULT: Any = ...


def check_timeout(timeout: Any) -> None:
    """Refuse what is no number of seconds.

    Raises:
        TypeError: It is neither a number nor None.
        ValueError: It is negative or no number at all.
    """
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r:.100}")
    if math.isnan(timeout) or timeout < 0:
        raise ValueError(f"timeout must not be negative or NaN, but is {timeout!r}")


class ResponsePromise(Generic[M]):
    """The reply to a request, as ``Session.request`` returns it.

    Dropping it is fine: nothing stays behind, and a late reply is discarded.

    Attributes:
        id: The request's id.
        settled: Whether the outcome is known. Unlike ``done`` it does not look at the clock.
    """

    __slots__ = ("__weakref__", "_deadline", "_error", "_expect", "_reply", "_session", "_timeout", "_watchers", "id", "settled")

    def __init__(
        self, session: Session, id: str, expect: Type[M], timeout: Optional[float], deadline: Optional[float]
    ) -> None:
        self.id = id
        self.settled = False
        self._session = session
        self._expect = expect
        self._timeout = timeout
        self._deadline = deadline
        self._reply: Any = None
        self._error: Optional[BaseException] = None
        self._watchers: Any = None

    def __repr__(self) -> str:
        if not self.settled:
            state = "pending"
        elif self._error is not None:
            state = type(self._error).__name__
        else:
            state = type(self._reply).__name__
        return f"<ResponsePromise {self.id} {state}>"

    def __del__(self) -> None:
        # No I/O here: only the entry that a late reply would look for.
        try:
            if not self.settled:
                self._session.forget(self.id)
        except AttributeError:
            pass  # not fully made

    def wait(self, timeout: Optional[float] = None) -> M:
        """Wait for the reply, and tick the whole peer meanwhile, so handlers run.

        What is already there counts even if the time is over. Further calls return the same reply, or raise the same
        error again, at once.

        Args:
            timeout: Wait at most that many seconds; None waits until the request's own deadline.

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
        if not self.settled:
            check_timeout(timeout)
            peer = self._session.peer
            limit = self._deadline
            if timeout is not None:
                own = peer.clock() + timeout
                if limit is None or own < limit:
                    limit = own
            peer.pump(self, limit)
            if not self.settled:
                if self._deadline is None or peer.clock() < self._deadline:
                    raise TimeoutError(f"no reply to request {self.id} within {timeout} s; it is still pending")
                self._expire()
        if self._error is not None:
            raise self._error.with_traceback(None)
        reply: M = self._reply
        return reply

    @property
    def done(self) -> bool:
        """Whether ``wait()`` would return or raise at once. Never blocks and runs no handlers."""
        if not self.settled and self._deadline is not None and self._session.peer.clock() >= self._deadline:
            # A reply may lie in the stream: then wait() would still find it.
            return True
        return self.settled

    def cancel(self) -> bool:
        """Give the request up; a late reply is discarded. The other side is not told.

        Returns:
            Whether it was still pending. If so, ``wait()`` raises ``IpcError`` from now on.
        """
        if self.settled:
            return False
        self.fail(IpcError(f"request {self.id} was cancelled by this side"))
        return True

    def _expire(self) -> None:
        hint = self._session.silence_text()
        self.fail(
            RequestTimeoutError(f"no reply to request {self.id} within {self._timeout} s{hint}", timeout=self._timeout)
        )

    # -- for the session

    def settle(self, reply: Message) -> None:
        """The reply has come."""
        if isinstance(reply, ErrorMessage):
            self.fail(RemoteError(str(reply)))
        elif not isinstance(reply, self._expect):
            self.fail(
                UnexpectedReplyError(
                    f"the reply to request {self.id} is a {type(reply).__name__}, expected was"
                    f" {self._expect.__name__}",
                    reply,
                )
            )
        else:
            self._reply = reply
            self.settled = True
            if self._watchers is not None:
                self._tell()

    def fail(self, error: BaseException) -> None:
        """No reply will come, or an error in its place."""
        self._error = error
        self.settled = True
        self._session.forget(self.id)
        if self._watchers is not None:
            self._tell()

    def _tell(self) -> None:
        for queue in self._watchers:
            queue.append(self)

    def watch(self, queue: Deque[Any]) -> None:
        """Append the promise to a queue when it settles."""
        self._watchers = (*(self._watchers or ()), queue)

    def unwatch(self, queue: Deque[Any]) -> None:
        """Undo ``watch``."""
        self._watchers = tuple(q for q in self._watchers or () if q is not queue) or None


class _Waiting:
    """Waits for some of many promises, on any number of peers.

    Attributes:
        settled: Whether enough have settled; what the peer's ``pump`` looks at.
    """

    def __init__(self, promises: List[ResponsePromise[Any]], timeout: Optional[float]) -> None:
        check_timeout(timeout)
        for promise in promises:
            if not isinstance(promise, ResponsePromise):
                raise TypeError(f"expected promises as request() returns them, not {promise!r:.100}")
        # The order of settling: those that had settled before come first, in the order given.
        self.queue: Deque[ResponsePromise[Any]] = deque(p for p in promises if p.settled)
        self._unsettled = [p for p in promises if not p.settled]
        for promise in self._unsettled:
            promise.watch(self.queue)
        self.peers: List[IpcPeer] = list(dict.fromkeys(p._session.peer for p in self._unsettled))
        self._clock = self.peers[0].clock if self.peers else None
        self._limit = None if timeout is None or self._clock is None else self._clock() + timeout
        count = itertools.count()  # so that the heap never compares promises
        self._deadlines: List[Tuple[float, int, ResponsePromise[Any]]] = [
            (p._deadline, next(count), p) for p in self._unsettled if p._deadline is not None
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
            if len(self.peers) == 1:
                self.peers[0].pump(self, limit)
            else:
                self._turn_all(limit)
            if self.settled:
                break
            assert self._clock is not None
            now = self._clock()
            while self._deadlines and self._deadlines[0][0] <= now:
                promise = heapq.heappop(self._deadlines)[2]
                if not promise.settled:
                    promise._expire()
            if not self.settled and self._limit is not None and now >= self._limit:
                return False
        return True

    def _turn_all(self, limit: Optional[float]) -> None:
        # Each peer has its own clock and poller; their descriptors can be waited for together.
        for peer in self.peers:
            peer.tick(0)
        if self.settled:
            return
        assert self._clock is not None
        wait = 0.05 if limit is None else min(0.05, max(0.0, limit - self._clock()))
        poller = select.poll()
        for peer in self.peers:
            poller.register(peer.fileno(), select.POLLIN)
        poller.poll(math.ceil(wait * 1000))

    def end(self) -> None:
        for promise in self._unsettled:
            promise.unwatch(self.queue)


def gather(promises: Iterable[ResponsePromise[M]], timeout: Optional[float] = None) -> List[M]:
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
            raise TimeoutError(f"{len(unique) - len(waiting.queue)} of {len(unique)} requests got no reply in {timeout} s")
    finally:
        waiting.end()
    return [promise.wait() for promise in given]


def as_completed(
    promises: Iterable[ResponsePromise[M]], timeout: Optional[float] = None
) -> Iterator[ResponsePromise[M]]:
    """Yield each promise as it settles, in the order of settling, and tick every peer concerned meanwhile.

    Args:
        promises: What ``request()`` returned, of any sessions.
        timeout: Seconds in all; None waits until each request's own deadline.

    Yields:
        Promises of which ``wait()`` returns or raises at once.

    Raises:
        TimeoutError: ``timeout`` has passed; the text says how many are unfinished. They are still pending.
    """
    unique: Dict[ResponsePromise[M], None] = dict.fromkeys(promises)
    # The clock starts at the call and not at the first next(), as the reader of the call expects.
    waiting = _Waiting(list(unique), timeout)
    return _yield_settled(waiting, len(unique), timeout)


def _yield_settled(waiting: _Waiting, count: int, timeout: Optional[float]) -> Iterator[ResponsePromise[Any]]:
    try:
        for left in range(count, 0, -1):
            if not waiting.until(1):
                raise TimeoutError(f"{left} of {count} requests got no reply in {timeout} s")
            yield waiting.queue.popleft()
    finally:
        waiting.end()
