"""The loop that drives everything: waits for descriptors and times, and lets conversations dispatch in turn.

Knows tasks by what they answer to (``on_ready``, ``on_time``, ``look``, ``step``, ``check``, ``repair``). Must not know
messages, streams or what a task does.

Interruptions. An exception that a signal handler raises can come after any call and at the top of any function. A task
therefore marks that it has work (in ``todo`` or ``repairs``) before it acts, takes an item out of its queue only after
the act, and computes everything else anew in ``repair``. Statements that must not be separated stand in a block that is
marked ``atomic: no calls``, where no such exception can come.
"""

from __future__ import annotations

import math
import os
import time
from _thread import get_ident
from itertools import starmap

from ..clock import real_clock
from ..errors import StreamClosedError
from ..transports.base import finish
from .poller import READ, Poller
from .waker import Waker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from ..transports.base import Ending
    from .conversation import Conversation
    from .dispatcher import Dispatcher

__all__ = ["MAX_DEPTH", "Awaited", "Loop", "Until"]

MAX_DEPTH = 32  # nested dispatches; a tick beyond this only settles replies

# Seconds between two looks at streams for having been closed by their owner, which no poller reports, and how many
# conversations are looked at in one, so that it costs the same with one or a thousand.
CHECK_INTERVAL = 0.5
_CHECKED_AT_ONCE = 16

_SLICE = 64  # messages of one conversation before the next has its turn
ENDING_INTERVAL = 0.01  # seconds between two looks at what is still ending


class Loop:
    """Turns descriptors, times and inboxes into calls of tasks.

    Owns: which thread is inside, the poller, the tasks and what is due for them. One private way of waiting, ``run``,
    is behind every call that waits.

    Attributes:
        clock: Returns the time in seconds.
        thread: The thread that is inside a call, or None.
        forked: Whether this is the copy in a forked process.
        closed: Whether nothing can be added any more.
        released: Whether everything is closed.
        conversations: The open ones, in the order in which they were made.
        listeners: The open ones.
        todo: Dispatchers with something to dispatch, in turn.
        repairs: Tasks that an interruption may have left with work.
        corked: Ports whose output is gathered until the next turn.
        paused: Ports that are not read from because their inbox is long.
        turns: How many messages have been dispatched in all.
        depth: How many dispatches are under way, one inside the other.
        starving: How many waits are under way that do not dispatch.
        waker: Makes the tick that is under way, or the next one, return at once.
        wakeups: Counts ticks that have returned for this.
        progress: Counts drained queues, and conversations that opened or closed.
    """

    def __init__(self) -> None:
        self.clock: Callable[[], float] = real_clock()
        self.thread: int | None = None
        self.forked = False
        self.closed = False
        self.released = False
        self.poller = Poller()
        self._owners = self.poller.owners
        self.conversations: dict[Conversation, None] = {}
        self.listeners: dict[Any, None] = {}
        self.todo: dict[Dispatcher, None] = {}
        self.repairs: dict[Any, None] = {}
        self.corked: dict[Any, None] = {}
        self.paused: dict[Any, None] = {}
        self.turns: int = 0
        self.depth: int = 0
        self.starving: int = 0
        self.progress: int = 0
        self.wakeups = 0
        self._timers: dict[Any, float] = {}
        self._soonest: float = -math.inf  # no timer is due earlier, nor the next look at streams
        self._polled: dict[Any, float] = {}  # tasks that are looked at without a descriptor, and how often
        self._endings: list[Ending] = []
        self._check_at = -math.inf
        self._checked = 0
        self.waker = Waker()
        try:
            self.poller.watch(self.waker.fd, READ, self.waker)
        except BaseException:
            self.waker.close()
            raise
        self._outer: Poller | None = None  # for fileno(): the poller and the pipe
        self._pipe: tuple[int, int] | None = None
        self._embedded = False  # whether fileno() is complete
        self._awake = False

    # -- one thread, one process

    def enter(self) -> int | None:
        """Begin a call. Its end is to set ``thread`` to what this returns.

        Raises:
            RuntimeError: Another thread is inside, or this is a fork.
        """
        me = get_ident()
        # atomic: no calls
        outer = self.thread
        if outer is None or outer == me:
            self.thread = me
            if not self.forked:
                return outer
        raise self.refusal()

    def check_entry(self) -> None:
        """Raise what ``enter`` would raise, for a call that need not be entered."""
        if self.forked or (self.thread is not None and self.thread != get_ident()):
            raise self.refusal()

    def refusal(self) -> RuntimeError:
        """Return the error for a call from where the peer does not belong."""
        if self.forked:
            return RuntimeError(
                "this IpcPeer belongs to the process that made it, and this is a fork of it; make a new IpcPeer here"
            )
        return RuntimeError(
            "another thread is using this IpcPeer; it belongs to one thread at a time, so make one per thread"
        )

    # -- tasks

    def add(self, conversation: Conversation) -> None:
        """Take in a conversation."""
        self.conversations[conversation] = None
        self.progress += 1

    def discard(self, conversation: Conversation) -> None:
        """Forget a conversation and what belongs to it, but not its repairs."""
        self.progress += 1
        self.conversations.pop(conversation, None)
        self.todo.pop(conversation.dispatcher, None)
        self._timers.pop(conversation, None)

    def discard_port(self, port: Any) -> None:
        """Forget a port, whose descriptors are no longer watched."""
        self.corked.pop(port, None)
        self.paused.pop(port, None)
        self._polled.pop(port, None)

    def watch(self, fd: int, events: int, owner: Any) -> None:
        """Watch a descriptor for a task, or watch it for other events than before.

        Raises:
            OSError: It cannot be watched.
        """
        other = self.poller.owners.get(fd)
        if other is not None and other is not owner:
            # The number was given to a new file, so the other's stream was closed and nobody has told it.
            self.poller.unwatch(fd)
            other.check()
        self.poller.watch(fd, events, owner)

    def unwatch(self, fd: int, owner: Any) -> None:
        """Stop watching a descriptor, if it is still the task's."""
        if self.poller.owners.get(fd) is owner:
            self.poller.unwatch(fd)

    def set_timer(self, task: Any, when: float | None) -> None:
        """Have ``task.on_time(now)`` called when the clock has come so far; None for not at all.

        It may be called earlier, also with a time that has not come, and sets its timer anew if it still needs one.
        """
        if when is None or when == math.inf:
            self._timers.pop(task, None)
        else:
            self._timers[task] = when
            if when < self._soonest:
                self._soonest = when

    def set_polled(self, task: Any, interval: float | None) -> None:
        """Have ``task.look()`` called in every turn, and so often (in seconds) while waiting; None for not at all."""
        if interval is None:
            self._polled.pop(task, None)
        else:
            self._polled[task] = interval

    def add_ending(self, ending: Ending) -> None:
        """Take in what is left to be done after something was closed: turns do it, step by step."""
        if ending not in self._endings:
            self._endings.append(ending)

    def finish_endings(self, endings: Iterable[Ending] | None = None) -> None:
        """Block until these are done, side by side; by default all."""
        endings = self._endings if endings is None else list(endings)
        finish(endings)
        self._endings = [ending for ending in self._endings if ending not in endings]

    @property
    def endings(self) -> tuple[Ending, ...]:
        """What is still ending."""
        return tuple(self._endings)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is open, so that nothing can happen."""
        return not (self.conversations or self._endings or self.repairs or self.listeners)

    # -- turns

    def tick(self, timeout: float | None) -> int:
        """Turn until something has happened, at most so long; see ``IpcPeer.tick``."""
        if timeout is None and self.is_empty:
            raise StreamClosedError(
                "nothing is open, so tick(None) would wait for ever: this IpcPeer has no open session and no listener"
            )
        if self.released:
            self.check_entry()
            if timeout:
                time.sleep(timeout)
            return 0
        return self.run(None, self.clock() + timeout if timeout else timeout)

    def run(self, until: Any = None, limit: float | None = None, dispatch: bool = True) -> int:
        """Turn until something has happened, or the clock has reached ``limit``.

        One turn waits for descriptors, writes and reads what is ready, then dispatches what stands in the inboxes.

        Args:
            until: What should happen: anything with an attribute ``settled``. What is there already counts even if the
                time is over. None for whatever happens first, be it nothing new: a tick.
            limit: A time of the clock, 0 for one turn without waiting, or None.
            dispatch: False only moves bytes and leaves messages in the inboxes.

        Returns:
            How many messages were dispatched.
        """
        outer = self.enter()
        depth, starved = self.depth, self.starving
        starving = not dispatch or depth >= MAX_DEPTH
        if limit is None:
            limit = math.inf
        todo = self.todo
        count = 0
        looked = until is not None  # a tick looks at its streams before it dispatches, or a busy inbox would keep it from it
        try:
            self.depth = depth + 1
            if self.repairs:
                self._repair()
            if starving:
                self.starving = starved + 1
                self._update_paused()
                if until is not None and until.settled:
                    return 0
            progress = self.progress
            last_look = False
            while True:
                if todo and looked and dispatch:
                    count += self._settle_replies() if starving else self._dispatch(until)
                if until is not None:
                    if until.settled or not (self.conversations or until.waits_alone):
                        return count
                elif looked and self.waker.called:
                    self.waker.called = False
                    self.wakeups += 1
                    return count
                elif looked and (count or not limit or self.progress != progress or (limit == math.inf and self.is_empty)):
                    return count
                now = self.clock()
                wait = (limit if limit < self._soonest else self._soonest) - now
                if wait <= 0:
                    if limit <= now and last_look:
                        return count
                    last_look = limit <= now
                    wait = 0
                looked = True
                if (todo or self.corked) and self._prepare(starving):
                    wait = 0
                if until is None and self.waker.called:
                    wait = 0
                if self._polled or self._endings:
                    wait = self._shorten(wait)
                try:
                    events = self.poller.poll(wait)
                except (OSError, ValueError):
                    if self.released:  # by a signal handler, or in a fork that a handler has made
                        self.check_entry()
                        return count
                    raise
                for fd, mask in events:
                    owner = self._owners.get(fd)
                    if owner is None:
                        self._forget_lost()
                    else:
                        owner.on_ready(fd, mask)
                if self._polled or self._endings:
                    self._look()
                if not events or now >= self._soonest:
                    self._on_time(now, not events and wait > 0)
        finally:
            self.thread = outer
            self.depth = depth
            self.starving = starved
            if starving:
                self._update_paused()
            if self._pipe is not None:
                self._update_pipe()

    def wait_for(self, fd: int, events: int, limit: float | None) -> bool:
        """Wait for a descriptor that is no conversation's, moving bytes but running no handlers.

        Args:
            fd: The descriptor; -1 just waits.
            events: What to wait for.
            limit: A time of the clock, or None.

        Returns:
            Whether it is ready.
        """
        awaited = Awaited()
        try:
            if fd >= 0:
                self.watch(fd, events, awaited)
            self.run(awaited, limit, dispatch=False)
        finally:
            self.unwatch(fd, awaited)
        return awaited.settled

    def _dispatch(self, until: Any) -> int:
        """Let dispatchers work off their inboxes, until ``until`` has settled.

        Not more than is there now: what nested turns read meanwhile has its turn later.
        """
        todo = self.todo
        if len(todo) == 1:
            for dispatcher in todo:
                break
            return dispatcher.step(self.turns + len(dispatcher.inbox) + 1, until)
        goal = self.turns + sum([len(dispatcher.inbox) for dispatcher in todo]) + 1
        count = 0
        while todo:
            before = self.turns
            for dispatcher in tuple(todo):
                count += dispatcher.step(min(goal, self.turns + _SLICE), until)
                if self.turns >= goal or (until is not None and until.settled):
                    return count
            if self.turns == before:  # what is there cannot be dispatched now
                break
        return count

    def _settle_replies(self) -> int:
        return sum([dispatcher.settle_replies() for dispatcher in tuple(self.todo)])

    def _prepare(self, starving: bool) -> bool:
        """Get ready for a turn though something is gathered or stands in an inbox.

        Returns:
            Whether there is work, so that it makes no sense to wait.
        """
        for port in tuple(self.corked):
            port.flush_gathered()
        works = False
        for dispatcher in tuple(self.todo):
            dispatcher.port.limit_reading()
            works = works or (not starving and dispatcher.has_work)
        return works

    def _shorten(self, wait: float) -> float:
        """Return how long to wait at most, because something is looked at by time."""
        if self._endings:
            wait = min(wait, ENDING_INTERVAL)
        return min(wait, *self._polled.values(), wait)

    def _update_paused(self) -> None:
        for port in tuple(self.paused):
            port.update_reading()

    def _repair(self) -> None:
        for task in tuple(self.repairs):
            task.repair()

    def _look(self) -> None:
        for task in tuple(self._polled):
            task.look()
        if self._endings:
            self._endings = [ending for ending in self._endings if ending.step() is not None]

    def _on_time(self, now: float, idle: bool) -> None:
        """Do what is due by the clock, and look at streams now and then, also if the clock stands still."""
        if now >= self._check_at or idle:
            self._check_at = now + CHECK_INTERVAL
            self._check_streams()
        for task, when in tuple(self._timers.items()):
            if when <= now and self._timers.get(task) == when:
                task.on_time(now)
                if self._timers.get(task) == when:
                    del self._timers[task]
        self._set_soonest()

    def _set_soonest(self) -> None:
        self._soonest = min(self._check_at, *self._timers.values(), math.inf)

    def _check_streams(self) -> None:
        """Look at some conversations whether their streams are still what they were."""
        conversations = tuple(self.conversations)
        if len(conversations) > _CHECKED_AT_ONCE:
            at = self._checked % len(conversations)
            self._checked = at + _CHECKED_AT_ONCE
            conversations = conversations[at : at + _CHECKED_AT_ONCE]
        for conversation in conversations:
            conversation.port.check()
        for listener in tuple(self.listeners):
            listener.check()

    def _forget_lost(self) -> None:
        if self.poller.forget_lost() and self._outer is not None:
            self._outer.watch(self.poller.fileno(), READ, None)

    # -- inside another loop

    def fileno(self) -> int:
        """Return a descriptor that is readable while a turn has something to do."""
        if not self._embedded:
            self.poller.fileno()  # or there is none
            if self._pipe is None:
                for self._pipe in starmap(os.pipe, [()]):  # as descriptors.py has it
                    break
            assert self._pipe is not None
            for fd in self._pipe:
                os.set_blocking(fd, False)
            # A poller around the poller, because the pipe is not for the waits in run().
            if self._outer is None:
                self._outer = Poller()
            self._outer.watch(self.poller.fileno(), READ, None)
            self._outer.watch(self._pipe[0], READ, None)
            self._embedded = True
            self._update_pipe()
        assert self._outer is not None
        return self._outer.fileno()

    def next_deadline(self) -> float | None:
        """Return seconds until a turn is due though ``fileno`` is not readable; None if none is."""
        if self.repairs or self.poller.has_always or self._has_work():
            return 0.0
        if any([port.channel.queued_bytes for port in self.corked]):
            return 0.0  # a turn lets out what was gathered
        wait = min(self._polled.values(), default=math.inf)
        if self._endings:
            wait = min(wait, ENDING_INTERVAL)
        for task in tuple(self._timers):
            task.on_time(-math.inf)  # nothing is due yet; the task sets its timer anew
        wait = min(wait, min(self._timers.values(), default=math.inf) - self.clock())
        return None if wait == math.inf else max(0.0, wait)

    def _has_work(self) -> bool:
        for dispatcher in self.todo:
            if dispatcher.has_work:
                return True
        return False

    def mark(self, dispatcher: Dispatcher) -> None:
        """Note, maybe outside of ``run``, that a dispatcher has something to do."""
        self.todo[dispatcher] = None
        if self._pipe is not None:
            self._update_pipe()

    def _update_pipe(self) -> None:
        """Keep a byte in the pipe just while an inbox has work, because then no descriptor may be ready."""
        if self._pipe is None or not self._embedded or self.forked:
            return
        awake = bool(self.repairs) or self._has_work()
        if awake != self._awake:
            self._awake = awake
            try:
                if awake:
                    os.write(self._pipe[1], b"\0")
                else:
                    os.read(self._pipe[0], 1)
            except BlockingIOError:
                pass  # an interrupted call has done it already

    # -- closing

    def release(self) -> None:
        """Release the loop's own descriptors. Called once everything in it is closed."""
        self.closed = True
        if self._outer is not None:
            self._outer.close()
        self.poller.close()
        if self.forked:
            self.waker.abandon()
        else:
            self.waker.close()
        # atomic: no calls
        pipe = self._pipe
        self._pipe = None
        self.released = True
        for fd in pipe or ():
            os.close(fd)

    def abandon(self) -> None:
        """Close this process's copies of all descriptors and touch nothing else: it is a fork of the owner."""
        self.forked = True
        for conversation in tuple(self.conversations):
            conversation.abandon()
        for listener in tuple(self.listeners):
            listener.abandon()
        for ending in self._endings:
            ending.forget()
        self._endings = []
        self.release()


class Until:
    """A condition in the form that ``Loop.run`` waits for."""

    __slots__ = ("_condition",)

    waits_alone = False

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    @property
    def settled(self) -> bool:
        """Whether the condition holds."""
        return self._condition()


class Awaited:
    """The owner of a descriptor that one call waits for.

    Attributes:
        settled: Whether it is ready.
        waits_alone: The wait makes sense though there is no conversation.
    """

    waits_alone = True

    def __init__(self) -> None:
        self.settled = False

    def on_ready(self, fd: int, events: int) -> None:
        """Note that it is ready."""
        self.settled = True

    def check(self) -> None:
        """Note that its number belongs to somebody else now."""
        self.settled = True
