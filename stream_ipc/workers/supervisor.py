"""The supervisor of a pool: which workers are running, which are to be started, which came to nothing.

Knows sessions as users do and the conversations behind them, and of tasks whether there are enough. Must not know who is
given which task, nor processes.
"""

from __future__ import annotations

import math
from functools import partial

from .. import log
from ..errors import StreamClosedError, describe
from ..interruptions import interruption_in, pass_on
from ..messages import is_text
from ..session import conversation_of
from .worker import Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..core.roles import Pool
    from ..peer import IpcPeer
    from ..session import Session
    from .tasks import Tasks
    from .worker import Options

__all__ = ["Supervisor"]

_LOOK_INTERVAL = 0.05  # seconds until the next look at a worker that has much to read, or a sign that is not dispatched yet
_BACK_OFF, _BACK_OFF_MOST = 0.1, 10.0  # seconds before a worker is started again whose predecessor died
# After so many deaths in a row at least, without an answer in between, what is queued fails; not while a worker still runs
# that has not replaced another.
_DEATHS = 5


class Supervisor:
    """The workers of one pool, from their start to their end.

    Owns them, and how many have died in a row.

    Args:
        peer: What starts their processes.
        options: What the pool was made with.
        tasks: What there is to do: no worker is started without need, and if all die it fails.
        pool: What the loop knows of the pool: has all workers looked at.

    Attributes:
        workers: All, also those that are still to be started.
        ending: Those that were replaced, while their processes end.
    """

    def __init__(self, peer: IpcPeer, options: Options, tasks: Tasks, pool: Pool) -> None:
        self.workers: dict[Worker, None] = {Worker(command, options): None for command in options.commands}
        self.ending: dict[Worker, None] = {}
        self._loop = tasks.loop
        self._create = partial(peer.create_command_session, **options.popen)
        self._options = options
        self._tasks = tasks
        self._pool = pool
        self._deaths = 0  # since the last answer of any worker
        self._awaited: dict[Worker, None] = {}  # whose first sign is waited for

    @property
    def sessions(self) -> list[Session]:
        """Those of the workers that are running."""
        sessions = [worker.session for worker in [*self.workers]]
        return [session for session in sessions if session is not None and session.is_open]

    def set_timer(self, now: float) -> None:
        """Set the pool's timer to what is due next; what was due by ``now`` is not waited for."""
        if self._tasks.closed:
            return
        times = [worker.due for worker in [*self.workers]]
        if self._tasks.queue:
            times += [worker.start_at for worker in [*self.workers] if worker.start_at > now]
            times += [now + _LOOK_INTERVAL for worker in [*self.workers] if worker.takes_tasks and worker.is_clogged]
        self._loop.set_timer(self._pool, min(times))

    # -- they come

    def start(self, now: float, strict: bool) -> bool:
        """Start a worker if one is needed and can be started now; returns whether to look for one again.

        Args:
            now: The time.
            strict: Raise what is wrong with the arguments for it, which otherwise counts as a death.
        """
        vacant = [worker for worker in [*self.workers] if worker.session is None]
        for worker in vacant:
            if worker.start_at <= now:
                break
        else:
            if vacant:
                self.set_timer(now)
            return False
        coming = [other for other in [*self.workers] if other.is_coming]
        if not self._tasks.has_more_than(len(coming)):
            return False
        start_at = worker.start_at
        try:
            # atomic: no calls
            if worker.session is None and worker.start_at <= now:
                worker.start_at = math.inf  # a turn beneath starts another
            else:
                return True

            try:
                for worker.session in map(self._create, (worker.command,)):  # stored before a signal is looked at
                    break
            finally:
                worker.start_at = start_at
        except Exception as exc:
            if interruption_in(exc) is not None or (strict and isinstance(exc, (TypeError, ValueError))):
                raise
            error = StreamClosedError(f"a worker could not be started: {describe(exc)}")
            error.__cause__ = exc
            self._note_death(worker, error)
        else:
            self.set_up(worker)
        return True

    def set_up(self, worker: Worker) -> None:
        """Begin with a worker whose session was made."""
        session = worker.session
        assert session is not None
        try:
            conversation = conversation_of(session)
            # atomic: no calls
            if not worker.is_set_up:
                worker.is_set_up = True
                worker.conversation = conversation
            else:
                return  # a signal handler has turned

            if self._tasks.closed:  # by a signal handler
                worker.kill("this side closed the worker pool")
                return
            session.on_close(lambda session: self._pool.look_soon())
            options = self._options
            if options.start_timeout is not None:
                now = self._loop.clock()
                worker.due = now + options.start_timeout
                self.set_timer(now)  # which comes behind what can be read now
            if options.hello is not None or worker.due < math.inf:
                self._await_sign(worker, session)
            if options.on_session is not None:
                options.on_session(session)
            if options.hello is None:
                worker.ready = True
        except BaseException as exc:
            if not isinstance(exc, Exception) or interruption_in(exc) is not None:
                if worker.is_set_up:
                    self._loop.with_users_wait(True, worker.kill, "its start was interrupted")  # and nobody else starts
                raise
            log.error("on_session of a worker pool failed", exc_info=True)
            worker.kill(f"on_session failed: {describe(exc)}")

    def _await_sign(self, worker: Worker, session: Session) -> None:
        self._awaited[worker] = None
        # The first two are in C, so that no signal handler's exception comes into them. If one comes into the third, the
        # next turn finds what that has missed.
        notice = partial(self._loop.later.setdefault, self._pool)
        worker.sign_handlers = (worker.heard.append, notice, lambda message: self._look_for_sign(worker))
        for handler in worker.sign_handlers:
            session.on_message(handler)

    def look_for_signs(self) -> None:
        """Look for the first signs of workers. An interrupted call is made again."""
        for worker in [*self._awaited]:
            self._look_for_sign(worker)

    def _look_for_sign(self, worker: Worker) -> None:
        """Look for the first sign of a worker in what has come from it. An interrupted call is made again."""
        heard = tuple(worker.heard)
        if any(map(self._is_sign, heard)):
            later = self._loop.later
            # atomic: no calls
            worker.due = math.inf
            if self._options.hello is not None:
                worker.ready = True
                later[self._pool] = None

            self._await_sign_no_more(worker)
        elif worker.conversation.reason is not None:
            self._awaited.pop(worker, None)
        del worker.heard[: len(heard)]

    def _await_sign_no_more(self, worker: Worker) -> None:
        """Leave what comes from a worker to others, from the next message on. An interrupted call is made again."""
        for handler in worker.sign_handlers:
            try:
                worker.conversation.session.off_message(handler)
            except ValueError as exc:  # done before an interruption
                pass_on(exc)
        worker.sign_handlers = ()
        self._awaited.pop(worker, None)

    def _is_sign(self, message: Any) -> bool:
        hello = self._options.hello
        return hello is None or (isinstance(message, hello) and not is_text(message))

    def note_answer(self, worker: Worker) -> None:
        """Take note that a worker has answered. An interrupted call can be made again."""
        worker.came_up = True
        worker.due = math.inf
        self._deaths = worker.deaths = 0
        if worker in self._awaited:
            self._await_sign_no_more(worker)

    # -- they go

    def note_late(self, worker: Worker, seconds: float | None) -> None:
        """Kill a worker that is still busy with a task, which it had so many seconds for."""
        if worker.conversation.is_open and not worker.is_late:
            worker.came_up = True
            try:  # replies to other tasks may be there; each that is settled leads here again
                worker.is_late = True
                self._loop.with_users_wait(True, worker.conversation.dispatcher.settle_replies)
            finally:
                worker.is_late = False
            worker.kill(f"the worker was killed, because a task took longer than {seconds} s")

    def end_if_due(self, worker: Worker, read_until: float) -> None:
        """Kill a worker that has given no sign in time, and close one that has done its share.

        Args:
            worker: The worker.
            read_until: A time. What had come by then was read.
        """
        if worker.due <= read_until:
            if any(map(self._is_sign, [*worker.conversation.dispatcher.inbox])):  # which only waits for its turn
                worker.due = self._loop.clock() + _LOOK_INTERVAL
                return
            options = self._options
            hello = "" if options.hello is None else f" (no {options.hello.__name__} has come)"
            worker.kill(f"the worker gave no sign within {options.start_timeout} s{hello}, so it was killed")
        elif worker.has_done_its_share and not worker.running:
            worker.close("this side replaces the worker, which has done its share of tasks")

    def replace(self, worker: Worker) -> None:
        """Put another, which is still to be started, in the place of one whose session is closed."""
        successor = Worker(worker.command, self._options, worker.deaths)
        for other in [*self.ending]:
            conversation = other.conversation  # an interruption may have kept closing it from coming so far
            if conversation not in self._loop.repairs and conversation.teardown not in self._loop.chores.teardowns.all:
                self.ending.pop(other, None)
        # atomic: no calls
        is_first = worker in self.workers
        if is_first:
            del self.workers[worker]
            self.workers[successor] = None
            self.ending[worker] = None

        if is_first and not worker.came_up:
            self._note_death(successor, worker.conversation.reason)

    def _note_death(self, successor: Worker, reason: StreamClosedError | None) -> None:
        """Take note that a worker came to nothing, and when another may be started in its place."""
        successor.deaths += 1
        wait = min(_BACK_OFF_MOST, _BACK_OFF * 2 ** min(successor.deaths - 1, 10))
        successor.start_at = self._loop.clock() + wait
        self._deaths += 1
        if any([worker.session is not None and not worker.deaths for worker in [*self.workers]]):
            return  # that one has not failed yet: it is slow to come up, or busy
        if self._deaths >= max(_DEATHS, 3 * len(self.workers)):
            text = f"{self._deaths} workers in a row ended before they had answered anything; the last one: {reason}"
            self._tasks.fail(self._tasks.queue, StreamClosedError(text))
