"""The reply to a request, before and after it has come; waiting for many of them.

Knows errors and messages. Must not know how anything is sent or received: a promise asks its session's peer to turn
until something has settled.
"""

from __future__ import annotations

import heapq
import itertools
import math

from .errors import IpcError, RemoteError, RequestTimeoutError, UnexpectedReplyError, article, printable
from .messages import ErrorMessage, Message
from .transports.descriptors import wait_readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Generic, Iterable, Iterator, List, Optional, Tuple, Type, TypeVar

    from .peer import IpcPeer
    from .session import Session

    M = TypeVar("M", bound=Message)
    M_co = TypeVar("M_co", bound=Message, covariant=True)
else:
    M_co = None

    class Generic:
        """Stands in for ``typing.Generic``: ``ResponsePromise[Reply]`` is the class itself."""

        __slots__ = ()

        def __class_getitem__(cls, item: object) -> type:
            return cls


__all__ = ["DEFAULT", "ResponsePromise", "as_completed", "check_timeout", "gather"]

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

    Attributes:
        id: The request's id.
        settled: Whether the outcome is known. Unlike ``done`` it does not look at the clock.
        deadline: When the reply must be there, in the time of the peer's clock; None for no limit.
    """

    # What most promises never change and hardly anybody asks for stands in the class, so that making one takes less.
    _noted: bool = False  # for the session: its deadline is sorted in
    _reply: Any = None
    _error: Optional[BaseException] = None
    _watchers: Any = None

    def __init__(
        self, session: Session, id: str, expect: Type[M_co], timeout: Optional[float], deadline: Optional[float]
    ) -> None:
        self.settled: bool = False  # not in the class: it is looked at five times in a round trip, and that is slower there
        self.id = id
        self._session = session
        self._expect = expect
        self._timeout = timeout
        self.deadline = deadline

    def __repr__(self) -> str:
        try:
            if self._error is not None:
                state = f"failed {type(self._error).__name__}"
            elif self.settled:
                state = f"replied {type(self._reply).__name__}"
            else:
                state = "overdue" if self.done else "pending"
            return f"<ResponsePromise {self.id} {state}>"
        except Exception:  # half made
            return "<ResponsePromise>"

    def wait(self, timeout: Optional[float] = None) -> M_co:
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
        if not self.settled:
            peer = self._session._peer
            limit = self.deadline
            if timeout is not None:
                check_timeout(timeout)
                own = peer.clock() + timeout
                if limit is None or own < limit:
                    limit = own
            peer._pump(self, limit)
            if not self.settled:
                if self.deadline is None or peer.clock() < self.deadline:
                    if timeout is None:
                        text = f"request {self.id} has no reply yet, and its session is just ending"
                        raise TimeoutError(f"{text} ({self._session.name}); wait again later")
                    raise TimeoutError(f"{self._silence(timeout)}; it is still pending")
                self._expire()
        if self._error is not None:
            raise self._error.with_traceback(None)
        reply: M_co = self._reply
        return reply

    @property
    def done(self) -> bool:
        """Whether ``wait()`` would return or raise at once. Never blocks and runs no handlers."""
        if not self.settled and self.deadline is not None and self._session.peer.clock() >= self.deadline:
            # A reply may lie in the stream: then wait() would still find it.
            return True
        return self.settled

    def cancel(self) -> bool:
        """Give the request up; a late reply is discarded. The other side is not told. Neither blocks nor runs handlers.

        Returns:
            Whether it was still pending. If so, ``wait()`` raises ``IpcError`` from now on.
        """
        if self.settled:
            return False
        self._fail(IpcError(f"request {self.id} was cancelled by this side"))
        return True

    def _expire(self) -> None:
        """Give the request up because its deadline has passed. For whoever waits, or ticks."""
        hint = self._session._silence_text()
        self._fail(RequestTimeoutError(f"{self._silence(self._timeout)}{hint}", timeout=self._timeout))

    def _silence(self, timeout: Optional[float]) -> str:
        return f"no reply to request {self.id} within {timeout} s ({self._session.name})"

    # -- for the session

    def _settle(self, reply: Message) -> None:
        """The reply has come. May be called again if it was interrupted."""
        if isinstance(reply, self._expect) and not isinstance(reply, ErrorMessage):
            self._reply = reply
            if self._watchers is not None:
                self._tell()
            self.settled = True
        elif isinstance(reply, ErrorMessage):
            self._fail(RemoteError(printable(str(reply))))
        else:
            self._fail(
                UnexpectedReplyError(
                    f"the reply to request {self.id} is {article(type(reply))}, and the request expected"
                    f" {article(self._expect)} ({self._session.name})",
                    reply,
                )
            )

    def _fail(self, error: BaseException) -> None:
        """No reply will come, or an error in its place."""
        self._error = error
        if self._watchers is not None:
            self._tell()
        self.settled = True
        self._session._forget(self.id)

    def _tell(self) -> None:
        for queue in self._watchers:
            queue[self] = None

    def _watch(self, queue: Dict[ResponsePromise[Any], None]) -> None:
        """Enter the promise into a queue when it settles."""
        self._watchers = (*(self._watchers or ()), queue)

    def _unwatch(self, queue: Dict[ResponsePromise[Any], None]) -> None:
        """Undo ``_watch``."""
        self._watchers = tuple(q for q in self._watchers or () if q is not queue) or None


class _Waiting:
    """Waits for some of many promises, on any number of peers.

    Attributes:
        settled: Whether enough have settled; what the peer's ``_pump`` looks at.
    """

    def __init__(self, promises: List[ResponsePromise[Any]], timeout: Optional[float]) -> None:
        check_timeout(timeout)
        for promise in promises:
            if not isinstance(promise, ResponsePromise):
                raise TypeError(f"gather() and as_completed() take promises of request(), not {promise!r:.100}")
        # In the order of settling; those that had settled before come first, in the order given. A dict, because a
        # promise whose settling was interrupted enters itself again.
        self.queue: Dict[ResponsePromise[Any], None] = {p: None for p in promises if p.settled}
        self._unsettled = [p for p in promises if not p.settled]
        for promise in self._unsettled:
            promise._watch(self.queue)
        self.peers: List[IpcPeer] = list(dict.fromkeys(p._session.peer for p in self._unsettled))
        self._clock = self.peers[0].clock if self.peers else None
        self._limit = None if timeout is None or self._clock is None else self._clock() + timeout
        count = itertools.count()  # so that the heap never compares promises
        self._deadlines: List[Tuple[float, int, ResponsePromise[Any]]] = [
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
            if len(self.peers) == 1:
                self.peers[0]._pump(self, limit)
            else:
                self._turn_all(limit)  # a peer that is closed has settled its promises
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
            if not peer._is_closed:
                peer.tick(0)
        self.peers = [peer for peer in self.peers if not peer._is_closed]
        if self.settled or not self.peers:
            return
        assert self._clock is not None
        wait = 0.05 if limit is None else min(0.05, max(0.0, limit - self._clock()))
        for peer in self.peers:  # some of their transports may have no descriptor
            due = peer.next_deadline()
            if due is not None:
                wait = min(wait, due)
        try:
            fds = [peer.fileno() for peer in self.peers]
        except OSError:  # this platform's selector has no descriptor
            self.peers[0].tick(min(wait, 0.01))
        else:
            wait_readable(fds, wait)

    def end(self) -> None:
        for promise in self._unsettled:
            promise._unwatch(self.queue)


def _too_few(left: int, count: int, timeout: Optional[float]) -> TimeoutError:
    return TimeoutError(f"{left} of {count} requests got no reply within {timeout} s; they are still pending")


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
            raise _too_few(len(unique) - len(waiting.queue), len(unique), timeout)
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
        Exception: What an ``on_message`` handler has raised; ``next()`` on the same iterator goes on.
    """
    unique: Dict[ResponsePromise[M], None] = dict.fromkeys(promises)
    # The clock starts at the call and not at the first next(), as the reader of the call expects.
    return _AsCompleted(list(unique), timeout)


class _AsCompleted:
    """An iterator and no generator: a handler's error comes out of ``next()``, and the next ``next()`` goes on."""

    def __init__(self, promises: List[ResponsePromise[Any]], timeout: Optional[float]) -> None:
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
        # In one breath:
        del queue[promise]
        self._left -= 1
        return promise
