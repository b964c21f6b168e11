"""The loop that drives everything: waits for descriptors and times, and lets conversations dispatch in turn.

Knows tasks by their roles (see ``roles.py``), and of dispatchers and their ports when reading has to stop and which
replies go first. Must not know messages or streams.

Interruptions. An exception that a signal handler raises can come after any call and at the top of any function. A task
therefore marks that it has work (in ``todo``, ``repairs`` or ``later``) before it acts, takes an item out of its queue
only after the act, and computes everything else anew in ``repair``. Statements that must not be separated stand in a
block that is marked ``atomic: no calls``, where none can come. ``tests/README.rst`` has more of that, and what users'
functions may do.
"""

from __future__ import annotations

import math
import sys
import time

from ..clock import monotonic
from ..errors import StreamClosedError
from ..interruptions import pass_on
from .chores import Chores, Inspection
from .claims import Claims
from .guard import Guard
from .poller import OuterPoller, Poller
from .timers import Share, Timers
from .waker import Waker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .conversation import Conversation
    from .dispatcher import Dispatcher
    from .roles import Awaited, Pool, Postponed, Repairable, Timed

__all__ = ["MAX_DEPTH", "Loop", "Until"]

MAX_DEPTH = 32  # nested dispatches; a tick beyond this only settles replies

_SLICE = 64  # messages of one conversation before the next has its turn


class Until:
    """A condition that a call waits for: in the role of what is ``Awaited``."""

    __slots__ = ("_condition",)

    def __init__(self, condition: Callable[[], object]) -> None:
        self._condition = condition

    @property
    def settled(self) -> object:
        """Whether the condition holds."""
        return self._condition()


class Loop(Guard):
    """Turns descriptors, times and inboxes into calls of tasks.

    Owns the poller, the tasks and what is due for them. One way of waiting, ``run``, is behind every call that waits.

    Attributes:
        clock: Returns the time in seconds.
        poller: Knows which descriptor is watched for which task.
        claims: Knows which descriptor is written by which channel.
        closed: Whether everything is closed.
        conversations: Those that are not closed, in the order in which they were made.
        listeners: Those that are not closed.
        todo: Dispatchers with something to dispatch, in turn.
        repairs: Tasks that are ``Repairable``: an interruption may have left them with work.
        later: Tasks whose ``go_on`` the next turn calls.
        pools: Schedulers of worker pools: they have no descriptor, are checked now and then, and are closed with the loop.
        dispatched: How many items have been dispatched in all, without replies.
        depth: How many dispatches are under way, one inside the other.
        users_wait: Whether users' functions must wait: while only bytes move, beyond MAX_DEPTH, while closing settles.
            Inboxes may grow longer then.
        chores: What a turn must do besides.
        waker: Makes the tick that is under way, or the next one, return at once.
        wakeups: Counts ticks that have returned for this.
        progress: Counts what a tick returns for besides messages: queues drained, requests given up, sessions come or gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock: Callable[[], float] = monotonic
        self.closed: bool = False
        self.poller: Poller = Poller()
        self.claims: Claims = Claims(self.poller)
        self._owners = self.poller.owners
        self.conversations: dict[Conversation, None] = {}
        self.listeners: dict[Any, None] = {}
        self.todo: dict[Dispatcher, None] = {}
        self.repairs: dict[Repairable, None] = {}
        self.later: dict[Postponed, Any] = {}
        self.pools: dict[Pool, None] = {}
        self.dispatched: int = 0
        self.depth: int = 0
        self.users_wait: bool = False
        self.chores: Chores = Chores()
        self.progress: int = 0
        self._timers = Timers()
        self._inspection = Inspection(self)
        self._outer: OuterPoller | None = None  # once fileno() was asked for
        self.wakeups: int = 0
        try:
            self.waker: Waker = Waker(self.poller)
        except BaseException:  # out of descriptors: a selector is a cycle, and would stay until it is collected
            self.poller.close()
            raise

    # -- tasks

    def add(self, conversation: Conversation) -> None:
        self.conversations[conversation] = None
        self.chores.add(conversation.port)
        self.progress += 1

    def remove(self, conversation: Conversation) -> None:
        """Remove a conversation and what belongs to it, but not its repairs."""
        self.progress += 1
        self.conversations.pop(conversation, None)
        self.chores.corked.pop(conversation.batches, None)
        self.chores.remove(conversation.port)
        self.chores.are_due = True
        self.todo.pop(conversation.dispatcher, None)
        self._timers.set(conversation, math.inf)

    def set_timer(self, task: Timed, when: float) -> None:
        """Have ``task.on_time(now)`` called when the clock has come so far; infinity for not at all.

        It may be called earlier, also with a time that has not come, and sets its timer anew if it still needs one.
        """
        self._timers.set(task, when)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is open, so that nothing can happen."""
        for conversation in [*self.conversations]:
            if conversation.is_open:  # mostly the first is; what is being closed beneath this call brings nothing more
                return False
        if self.chores.teardowns.all or self.repairs or self.listeners or (self.later and not self.users_wait):
            return False
        return not any([pool.waits for pool in [*self.pools]])

    # -- turns

    def tick(self, timeout: float | None) -> int:
        """Turn until something has happened, at most so long; see ``IpcPeer.tick``."""
        if timeout is None:
            for conversation in self.conversations:
                if conversation.is_open:
                    return self.run()
                break
            if self.closed or (self.is_empty and not self.waker.called):
                self.check_entry()
                state = "is closed" if self.closed else "has no session and no listener; open one, or pass seconds"
                if self.pools and not self.closed:
                    state = "has no session and no listener, and its worker pool has no task; submit one, or pass seconds"
                raise StreamClosedError(f"nothing is open, so tick(None) would wait for ever: this IpcPeer {state}")
            is_left = self.repairs or (self.later and not self.users_wait)  # something to do at once
            return self.run(None, 0 if is_left else math.inf)
        if self.closed:
            self.check_entry()
            time.sleep(min(timeout, 1e9))  # which takes no infinity
            return 0
        # To run(), infinity says that the call was tick(None), which returns once nothing can happen any more.
        return self.run(None, self.clock() + min(timeout, 1e9) if timeout else 0)

    def limit_of(self, timeout: float | None) -> float:
        """Return when so many seconds are over, by the clock; infinity for None."""
        return math.inf if timeout is None else self.clock() + timeout

    def run(self, until: Awaited | None = None, limit: float = math.inf, dispatch: bool = True) -> int:
        """Turn until something has happened, or the clock has reached ``limit``.

        One turn waits for descriptors, writes and reads what is ready, then dispatches what stands in the inboxes. When
        the limit is reached, one more turn runs, so what came in time counts. If handlers have used up the time, there is
        none: the caller takes a last look instead, for what it waits for alone (see ``last_look.py``).

        Args:
            until: The condition to wait for, not met yet; None: return after the first event.
            limit: A time of the clock, 0 for one turn without waiting, or infinity.
            dispatch: False only moves bytes and leaves messages in the inboxes.

        Returns:
            How many messages were dispatched.
        """
        outer = self.enter()
        depth, waited = self.depth, self.users_wait
        users_wait = depth >= MAX_DEPTH or not dispatch
        todo = self.todo
        chores = self.chores
        count = 0
        progress = self.progress
        try:
            self.depth = depth + 1
            # Before any wait: what interruptions have left, what was put off, and what may settle ``until`` already.
            if todo or self.repairs or self.later or users_wait:
                count = self._begin(until, users_wait, dispatch)
                if until is not None and until.settled:
                    return count
            now = self.clock()
            while True:
                # How long to wait: until the limit or the next timer, and not at all if there is work.
                due = self._timers.soonest
                wait = (limit if limit < due else due) - now
                if wait < 0:
                    wait = 0
                if todo or chores.are_due:
                    if until is not None and until.settled:  # a signal handler may have closed its session
                        return count
                    wait = self._prepare(wait, users_wait)
                if until is None and self.waker.called:
                    wait = 0
                # Wait, then let the owner of each ready descriptor read or write.
                try:
                    events = self.poller.poll(wait)
                except (OSError, ValueError) as exc:
                    pass_on(exc)
                    if self.closing:  # by a signal handler, or in a fork that a handler has made; maybe not to the end
                        self.check_entry()
                        return count
                    raise
                for fd, mask in events:
                    self._owners.get(fd, self).on_ready(fd, mask)
                if chores.are_due:
                    chores.do(deliver=not self.users_wait)
                    if not self.conversations:
                        chores.are_due = True  # so that it looks at ``until`` before each wait
                # The clock is asked only if the wait may have lasted until the timer.
                if not events and wait:
                    now = self.clock()
                if now >= due:
                    self._on_time(now)
                # Dispatch: a single conversation needs no turns.
                if todo:
                    if users_wait:
                        count += self._settle_replies() if dispatch else 0
                    elif len(todo) > 1:
                        count += self._take_turns(until)
                    else:
                        for dispatcher in todo:
                            count += dispatcher.step(until)
                            break
                if self.later and dispatch:
                    self.go_on()
                # Is it over? A wait ends with what it waits for, a tick with anything that has happened.
                if until is not None:
                    if until.settled:
                        return count
                    if count:  # handlers have run, maybe for long; the caller takes a last look
                        now = self.clock()
                elif self.waker.called:
                    self.waker.called = False
                    self.wakeups += 1
                    return count
                elif count or self.progress != progress or (limit == math.inf and self.is_empty):
                    return count
                if limit <= now:
                    return count
                now = self.clock()  # last: a jump back that follows an if is outside of the try from 3.12 on
        finally:
            self.thread = outer
            self.depth = depth
            if users_wait:
                self.users_wait = waited
                self._update_paused()
            if self._outer is not None:
                self.waker.show(self._is_busy())

    def on_ready(self, fd: int, events: int) -> None:
        """Handle an event of a descriptor that has no owner: drop it."""
        if not self.closing:  # by another thread, at exit
            self.poller.drop_ownerless(fd)

    def _take_turns(self, until: Awaited | None) -> int:
        """Let dispatchers work off their inboxes in turn until ``until`` has settled, but not what nested turns read."""
        todo = self.todo
        goal = sys.maxsize
        count = 0
        share = Share(self.clock)
        while todo:
            before = self.dispatched + count
            if until is None or count:  # a wait seldom needs a second round
                goal = min(goal, self.dispatched + sum([len(dispatcher.inbox) for dispatcher in [*todo]]) + 1)
            for dispatcher in [*todo]:
                count += dispatcher.step(until, min(goal, self.dispatched + _SLICE))
                # atomic: no calls
                if dispatcher in todo:  # the next turn begins with another
                    del todo[dispatcher]
                    todo[dispatcher] = None

                if self.dispatched >= goal or (until is not None and until.settled) or share.is_over():
                    return count
            if self.dispatched + count == before:  # what is there cannot be dispatched now
                break
        return count

    def _prepare(self, wait: float, users_wait: bool) -> float:
        """Get ready, with all that is not so in every turn; returns how long to wait, in seconds."""
        self.chores.prepare()
        for dispatcher in [*self.todo]:
            dispatcher.port.limit_reading()
            if not users_wait and wait and dispatcher.has_work:
                wait = 0
        return min(wait, self.chores.due_in())

    def _update_paused(self) -> None:
        for conversation in [*self.conversations]:
            if conversation.port.paused:
                conversation.port.update_reading()

    def with_users_wait(self, wait: bool, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function while users' functions must wait; or (False) may run, though a call around it has them wait."""
        before = self.users_wait
        try:
            self.users_wait = wait
            function(*arguments)
        finally:
            self.users_wait = before

    def _begin(self, until: Awaited | None, users_wait: bool, dispatch: bool) -> int:
        """Do what interruptions have left and what was put off, before anything is waited for; returns as ``run`` does."""
        count = 0
        for task in [*self.repairs]:
            task.repair()
        if users_wait:
            self.users_wait = True
            self._update_paused()
        if dispatch:
            self.go_on()
            if until is not None and self.todo:  # a tick reads first, or a busy inbox would keep it from reading
                count = self._settle_replies() if users_wait else self._take_turns(until)
                self.go_on()
        return count

    def _settle_replies(self) -> int:
        """Settle the replies in all inboxes, and nothing else; returns how many."""
        return sum([dispatcher.settle_replies() for dispatcher in [*self.todo]])

    def go_on(self) -> None:
        """Call what was put off until now."""
        for _ in range(_SLICE):  # what these bring has its turn, too, before anything is waited for
            tasks = [*self.later]
            for task in tasks:
                task.go_on()
            if not self.later or [*self.later] == tasks:
                break

    def _on_time(self, now: float) -> None:
        """Do what is due by the clock, and check streams now and then."""
        if now >= self._inspection.due:
            self._inspection.check(now)
        self._timers.call(now, self._inspection.due)

    # -- inside another loop

    def fileno(self) -> int:
        """Return a descriptor that is readable while a turn has something to do."""
        if self._outer is None:
            self._outer = OuterPoller(self.poller)
        self.waker.show(self._is_busy())
        return self._outer.fileno()

    def next_deadline(self) -> float | None:
        """Return seconds until a turn is due though ``fileno`` is not readable; None if none is."""
        chores = self.chores
        chores.ask_ports()
        if self._is_busy() or self.poller.has_always or any([batches.queued_bytes for batches in [*chores.corked]]):
            return 0.0
        for conversation in [*self.conversations]:
            conversation.update_timer()
        wait = min(self._timers.due_at() - self.clock(), chores.due_in())
        return None if wait == math.inf else max(0.0, wait)

    def _is_busy(self) -> bool:
        """Return whether a turn has something to do, whatever the descriptors and the clock say."""
        return bool(self.repairs or self.later) or any([dispatcher.has_work for dispatcher in [*self.todo]])

    def mark(self, dispatcher: Dispatcher) -> None:
        """Note, maybe outside of ``run``, that a dispatcher has something to do."""
        self.todo[dispatcher] = None
        if self._outer is not None:
            self.waker.show(self._is_busy())

    # -- closing

    def close(self) -> None:
        """Close the loop's own descriptors. Called once everything in it is closed."""
        self.closing = True
        if self._outer is not None:
            self._outer.close()
        self.poller.close()
        (self.waker.abandon if self.forked else self.waker.close)()
        self.closed = True
