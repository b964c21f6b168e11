"""The requests of one conversation: they are sent here, and stand here until their reply or an error in its place.

Knows its conversation, promises only as objects that may be dropped, and messages. Must not know frames or descriptors.
"""

from __future__ import annotations

import math
from functools import partial
from weakref import ref

from .. import log
from ..errors import (
    IpcError,
    RemoteError,
    RequestTimeoutError,
    StreamClosedError,
    UnexpectedReplyError,
    article,
    printable,
    unraised,
)
from ..ids import check_id, needs_check
from ..interruptions import pass_on
from ..messages import REQUEST, ErrorMessage
from .loop import MAX_DEPTH, Loop
from .pending import Pending, next_moment
from .sending import HIGH_WATER, make_room
from .timers import Share

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import Any

    from ..messages import Message
    from .conversation import Conversation

__all__ = ["Requests"]

_NEXT_LOOK = 0.01  # seconds until an overdue request is looked at again whose reply waits for its turn
_SWEPT = 50  # requests: a table of fewer is not looked through for dropped promises


class Requests:
    """Sends requests, and holds those that have no reply yet.

    Owns the table and the time until which none is due. A scan of the table finds the next such time, so a request
    costs nothing for its deadline as long as it is answered. It is the ``Requester`` of each (see ``roles.py``),
    but for the tasks of a pool.

    Args:
        conversation: What the requests are sent over.

    Attributes:
        conversation: As above.
        loop: What drives it.
        due: No request is due earlier.
        observers: Weak references to what has a method ``note``, which gets each promise that settles.
    """

    pending_class = Pending

    def __init__(self, conversation: Conversation) -> None:
        self.due: float = math.inf
        self.observers: set[ref[Any]] = set()
        self.conversation: Conversation = conversation
        self.loop: Loop = conversation.loop
        self._encode = conversation.channel.encode
        self._put = conversation.channel.put
        self._outbox = conversation.outbox
        self._name = conversation.name
        self._ids = ids = conversation.peer.id_generator
        generate: Callable[[], Any] = ids.generate
        self._new_id: Callable[[], str] = partial(self._checked, generate) if needs_check(ids) else generate
        self._table: dict[str, Pending] = {}
        self._sweep_at = _SWEPT

    def count(self) -> int:
        """Return how many there are whose promises are kept. Changes nothing: a repr asks, maybe in another thread."""
        return sum([not pending.is_dropped for pending in [*self._table.values()]])

    def send(self, pending: Pending, message: Message) -> None:
        """Send a request, with a new id if it has none, and let it stand in the table.

        If this raises, it is withdrawn, unless its frame was handed over already: then a reply will come.

        Raises:
            ValueError: The id cannot be used.
        """
        conversation = self.conversation
        loop = self.loop
        outer = loop.enter()
        try:
            if not conversation.is_open:
                raise conversation.closed_error()
            timeout = pending.timeout
            deadline = None if timeout is None else loop.clock() + timeout
            if self._outbox.queued_bytes > HIGH_WATER:
                make_room(conversation, timeout)
            table = self._table
            if len(table) > self._sweep_at:
                self._sweep()
            try:
                id = pending.id  # the task of a pool has one, for all its workers
                if id is None:
                    id = pending.id = self._new_id()
                else:
                    self._check(id)
                # Before it is put: the reply may be there at once.
                pending.deadline = deadline
                table[id] = pending
                # Behind the id generator, which may turn or close: a turn finds out anew what is due.
                if deadline is not None and deadline < self.due and conversation.is_open:
                    loop.set_timer(conversation, deadline)
                    self.due = deadline
                if conversation.port.paused:
                    conversation.port.update_reading()  # or its reply might never be read
                pending.unsent = frame = self._encode(REQUEST, id, message)
                self._put(frame)
                pending.unsent = None  # an empty list takes room, too
            except BaseException as exc:
                loop.repairs[conversation.port] = None
                if pending.unsent:
                    pending.settled = 1  # nothing will become of it
                    self.remove(pending)
                conversation.port.note_write_error(exc)
                raise
        finally:
            loop.thread = outer

    def _checked(self, generate: Callable[[], Any]) -> str:
        id = generate()
        self._check(id)
        return id  # type: ignore[no-any-return]

    def _check(self, id: Any) -> None:
        check_id(self._ids, id)
        if id in self._table:
            name = type(self._ids).__name__
            raise ValueError(f"{name}.generate() returned {id!r}, which a pending request has already")

    def remove(self, pending: Pending) -> None:
        id = pending.id
        if type(id) is str and self._table.get(id) is pending:
            self._table.pop(id, None)

    def _sweep(self) -> None:
        """Take out the requests whose promises are gone. A late reply finds none, and is dropped.

        The weak references call no function of ours for this: the exception of a signal handler would be ignored in it.
        """
        for pending in [*self._table.values()]:
            if pending.is_dropped:
                self.remove(pending)
        self._sweep_at = 4 * len(self._table) + _SWEPT  # so that it costs each request the same, however many there are

    def settle(self, id: Any, reply: Message) -> bool:
        """Take a reply that came. An interrupted call can be made again.

        Returns:
            Whether functions of users may have been called.
        """
        table = self._table
        try:
            pending = table[id]
        except (KeyError, TypeError) as exc:  # the latter of what a serializer that does not check takes for an id
            pass_on(exc)
            log.debug("session %s: late reply to request %.128r dropped: nobody waits for it", self._name, id)
            return False
        outcome: Message | Exception = reply
        try:
            if not isinstance(reply, pending.expect) or isinstance(reply, ErrorMessage):
                outcome = self._error_of(pending, reply)
        except Exception as exc:  # of the reply's own methods
            pass_on(exc)
            outcome = exc
        if not pending.settled:  # a signal handler may have cancelled it
            pending.outcome = outcome
            pending.settled = next_moment()
        told = pending.watchers is not None  # after next_moment(): as that returns, a signal handler may begin to watch
        if told or self.observers:
            pending.tell()
            self.remove(pending)  # there may be another with its id, sent by a done callback
        else:
            table.pop(id, None)
        return told

    def _error_of(self, pending: Pending, reply: Message) -> IpcError:
        """Return the error that an unwelcome reply is."""
        if isinstance(reply, ErrorMessage):
            return RemoteError(printable(str(reply)))
        got, expected = article(type(reply)), article(pending.expect)
        if got == expected:
            got, expected = repr(type(reply)), f"{pending.expect!r}, which is another class"
        text = f"the reply to request {pending.id} is {got}, and the request expected {expected}"
        return UnexpectedReplyError(f"{text} ({self._name})", reply)

    def fail(self, id: Any, error: BaseException) -> None:
        """Take an error in place of a reply."""
        pending = self._table.get(id) if isinstance(id, str) else None  # or it may have no hash
        if pending is not None:
            pending.fail(error)
            self.remove(pending)

    def fail_all(self, error: StreamClosedError) -> None:
        """Fail what is pending: no reply will come any more. An interrupted call can be made again.

        All settle first. The loop's ``go_on``, in the next turn at the latest, then calls their done callbacks, any of
        which may wait for another of these requests.
        """
        self.loop.with_users_wait(True, self._fail_each, error)

    def _fail_each(self, error: StreamClosedError) -> None:
        table = tuple(self._table.values())
        for pending in table:
            pending.settle(unraised(error))  # the session keeps the other as its reason
        for pending in table:
            pending.fail(error)
            self.remove(pending)

    def skip_dropped(self) -> None:
        """Make sure that the promise of the request that is due next is kept, or find out which is due instead."""
        for pending in self._table.values():  # mostly the first is
            if pending.deadline == self.due and not pending.is_dropped:
                return
            break
        self._sweep()
        self.update_due()

    def update_due(self, now: float = -math.inf, arrived: Collection[Any] = ()) -> None:
        """Find out when the next request is due. An interrupted call leaves ``due`` as it was: no request is due earlier.

        Args:
            now: The time.
            arrived: See ``expire``. Such a request is looked at again soon: what stands before its reply may have to wait.
        """
        before = self.due
        deadlines = [
            now + _NEXT_LOOK if pending.deadline <= now and pending.id in arrived else pending.deadline
            for pending in [*self._table.values()]
            if pending.deadline is not None
        ]
        if self.due == before:  # or a signal handler has sent one that is due earlier
            self.due = min(deadlines, default=math.inf)

    def expire(self, now: float, arrived: set[Any]) -> int:
        """Fail the requests whose deadline has passed, and find out when the next is due.

        Done callbacks may be slow: those that are left when the share of the time is over are due in the next turn.

        Args:
            now: The time.
            arrived: Ids of replies that are there and have not been dispatched yet: they came in time.

        Returns:
            How many have failed.
        """
        count = 0
        share = Share(self.loop.clock)
        for pending in [*self._table.values()]:
            if pending.deadline is None or pending.deadline > now or pending.id in arrived:
                continue
            if pending.is_dropped:
                self.remove(pending)
            else:
                self._time_out(pending)
                count += 1
                if share.is_over():
                    break
        self.update_due(now, arrived)
        return count

    def cancel(self, pending: Pending) -> bool:
        """Give a request up because nobody wants its reply; returns whether it was still pending."""
        self.loop.later[pending] = None  # first: a turn goes on after an interruption
        cancelled = pending.settle(IpcError(f"request {pending.id} was cancelled by this side"))
        self.remove(pending)
        pending.go_on()
        return cancelled

    def timeout_text(self, pending: Pending, timeout: float | None) -> str:
        """Return the text of a timeout."""
        return f"no reply to request {pending.id} within {timeout} s ({self._name})"

    def _time_out(self, pending: Pending) -> None:
        """Fail a request because no reply came in time."""
        text = f"{self.timeout_text(pending, pending.timeout)}{self._hint()}"
        pending.fail(RequestTimeoutError(text, timeout=pending.timeout))
        self.remove(pending)

    def _hint(self) -> str:
        """Return what probably keeps a reply from coming, for the error of a request that got none."""
        channel = self.conversation.channel
        # What a serializer knows of the usual other side: PHP answers less often than Python does.
        hint: str = getattr(getattr(channel.transport, "serializer", None), "silence_hint", "")
        if self.loop.depth >= MAX_DEPTH:
            return (
                "; handlers that wait are nested so deeply that requests which came meanwhile had to wait: the reply may"
                " depend on one of them"
            )
        junk = channel.inputs.junk.strip()
        if junk:
            return f"; what has come between messages, or in place of them, ends with {junk[-100:]!r}{hint}"
        if channel.inputs.received_bytes > channel.inputs.text_bytes:
            return hint
        return (
            "; nothing has ever come from the other side (is it ticking, does it use the same serializer, does it know the"
            f" class of the request?){hint}"
        )
