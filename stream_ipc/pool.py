"""Workers that are started, given tasks, and replaced when they die.

Knows sessions as users do. Of the core it knows the desk, which makes promises of tasks that are not sent yet and calls the
pool when a time has come, and of conversations how to send such a task and how to end without waiting for the child.
"""

from __future__ import annotations

import os
import signal
from collections import deque

from . import log
from .core.tickets import Desk
from .errors import RequestTimeoutError, StreamClosedError, describe
from .messages import Message
from .peer import loop_of
from .promise import DEFAULT, ResponsePromise, check_timeout
from .session import check_expect, check_message, conversation_of, sendable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, TypeVar, overload

    from .core.tickets import Ticket
    from .peer import IpcPeer
    from .session import Session
    from .transports.process import Command, Items

    M = TypeVar("M", bound=Message)

__all__ = ["WorkerPool"]

_BACK_OFF, _BACK_OFF_MOST = 0.1, 10.0  # seconds before a worker is started again whose predecessor died
_DEATHS = 5  # so many in a row at least, without an answer of any worker, fail what is queued


class _Place:
    """Where one worker at a time runs: its command, and how often that came to nothing."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.worker: _Worker | None = None
        self.deaths = 0
        self.start_at = 0.0


class _Worker:
    """One process."""

    def __init__(self, place: _Place, session: Session) -> None:
        self.place = place
        self.session = session
        self.conversation = conversation_of(session)
        self.running: dict[Ticket, None] = {}
        self.given = 0
        self.ready = False  # for tasks
        self.answered = False
        self.retired = False
        self.due: float | None = None  # when it must have given a sign


class WorkerPool:
    """Gives tasks to worker processes, which are started when they are needed and replaced when they die.

    The peer's ticks and waits drive it; there is no thread. A worker is any slave that talks over its stdin and stdout. A
    context manager: leaving waits for what is queued, then closes it; an exception closes it at once::

        with IpcPeer() as peer, WorkerPool(peer, [sys.executable, "slave.py"]) as pool:
            for reply in pool.map(tasks, expect=TaskResponse):
                print(reply.result)

    A worker that dies is replaced, and its tasks are given to others. If workers die again and again before any has
    answered something, what is queued fails with ``StreamClosedError``.

    Args:
        peer: What drives it.
        command: The command of all workers, or a list of commands, one for each worker.
        size: How many workers there are at most; by default as many as CPUs. Not with a list of commands.
        retries: How often a task is given to another worker when its worker dies. Then it fails with the
            ``StreamClosedError`` that says how the worker ended.
        timeout: Seconds that a worker has for a task, from when it gets it; by default the peer's, None for no limit. A
            task that takes longer fails with ``RequestTimeoutError``, and its worker is killed and replaced.
        tasks_per_worker: A worker is replaced after so many tasks.
        in_flight: How many tasks a worker has at a time.
        on_session: Called with each new worker's session, for handlers and set-up messages. What it raises is logged, and
            the worker counts as one that died.
        hello: A message class: a worker gets tasks once it has notified the pool of one. None: it gets one at once.
        start_timeout: Seconds until a worker must have given its first sign (``hello``, or else any message), or it is
            killed and replaced; None for no limit.
        options: Further arguments of ``IpcPeer.create_command_session``.

    Raises:
        TypeError: An argument is of a wrong kind.
        ValueError: A number is out of range, or there is no command.
    """

    def __init__(
        self,
        peer: IpcPeer,
        command: Command | Items[Command],
        size: int | None = None,
        *,
        retries: int = 1,
        timeout: float | None = DEFAULT,
        tasks_per_worker: int | None = None,
        in_flight: int = 1,
        on_session: Callable[[Session], Any] | None = None,
        hello: type[Message] | None = None,
        start_timeout: float | None = None,
        **options: Any,
    ) -> None:
        commands: list[Any] = [command]
        if not isinstance(command, (str, bytes)) and command and not isinstance(command[0], (str, bytes, os.PathLike)):
            commands = list(command)
            _check_number("size", size, len(commands), None)
            size = len(commands)
        _check_number("size", size, 1, None)
        _check_number("retries", retries, 0)
        _check_number("in_flight", in_flight, 1)
        _check_number("tasks_per_worker", tasks_per_worker, 1, None)
        if timeout is not DEFAULT:
            check_timeout(timeout)
        check_timeout(start_timeout)
        if hello is not None:
            check_expect(hello, "hello")
        if on_session is not None and not callable(on_session):
            raise TypeError(f"on_session must be a function that takes a session, not {on_session!r:.100}")
        for command in commands:
            if isinstance(command, (str, bytes)) or not len(command):
                raise TypeError(f"command must be a list of arguments, or a list of such lists, not {command!r:.200}")
        if size is None:
            size = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._peer = peer
        self._timeout = timeout
        self._retries = retries
        self._tasks_per_worker = tasks_per_worker
        self._in_flight = in_flight
        self._on_session = on_session
        self._hello = hello
        self._start_timeout = start_timeout
        self._options = options
        self._places = [_Place(commands[n % len(commands)]) for n in range(size)]
        self._workers: dict[_Worker, None] = {}
        self._free: dict[_Worker, None] = {}  # those that can be given a task
        self._queue: deque[Ticket] = deque()
        self._busy: dict[Ticket, None] = {}  # those that workers have
        self._settling: dict[Ticket, BaseException] = {}  # errors that an interruption may have kept from being told
        self._deaths = 0  # since the last answer of any worker
        self._closed = False
        self._driver = _Driver(self)
        self._desk = Desk(loop_of(peer), peer, "worker pool", self._queue, self._driver)

    def __repr__(self) -> str:
        try:
            state = "closed" if self._closed else "open"
            return f"<WorkerPool {state} workers={len(self.workers)}/{len(self._places)} pending={self.pending}>"
        except Exception:  # half made
            return "<WorkerPool>"

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            if kind is None and not self._closed:
                self._desk.run_until(lambda: not (self._queue or self._busy))
        finally:
            self.close()

    @property
    def workers(self) -> tuple[Session, ...]:
        """The sessions of the workers that are running."""
        return tuple([worker.session for worker in self._workers if worker.session.is_open])

    @property
    def pending(self) -> int:
        """How many tasks are queued or with workers."""
        return len([ticket for ticket in (*self._queue, *self._busy) if not ticket.settled])

    if TYPE_CHECKING:

        @overload
        def submit(self, message: Message, *, timeout: float | None = DEFAULT) -> ResponsePromise[Message]: ...

        @overload
        def submit(
            self, message: Message, *, expect: type[M], timeout: float | None = DEFAULT
        ) -> ResponsePromise[M]: ...

    def submit(
        self, message: Message, *, expect: type[Any] = Message, timeout: float | None = DEFAULT
    ) -> ResponsePromise[Any]:
        """Queue a task, and give it to a worker as soon as one is free. Neither blocks nor runs handlers.

        May start a worker, and so call ``on_session``.

        Args:
            message: The task; a worker gets it as a request.
            expect: The class of the reply.
            timeout: Seconds that a worker has for it; by default the pool's.

        Returns:
            A promise, as of a request. Its ``cancel()`` takes a task back that is still queued; a worker that has it goes
            on, and its reply is discarded. The task is done also if the promise is dropped.

        Raises:
            TypeError: An argument is of a wrong kind.
            ValueError: ``timeout`` is negative.
            RuntimeError: The pool is closed, another thread is using the peer, or this is a fork.
        """
        return self._submit("submit", message, expect, timeout, False)

    def _submit(
        self, method: str, message: Message, expect: type[Any], timeout: float | None, optional: bool
    ) -> ResponsePromise[Any]:
        if type(message) not in sendable:
            check_message(method, message)
        if expect is not Message:
            check_expect(expect)
        if timeout is DEFAULT:
            timeout = self._peer.timeout if self._timeout is DEFAULT else self._timeout
        else:
            check_timeout(timeout)
        if self._closed:
            raise RuntimeError("this WorkerPool is closed; make a new one")
        desk = self._desk
        loop = desk.loop
        outer = loop.enter()
        try:
            promise: ResponsePromise[Any] = ResponsePromise(desk, message, timeout, expect)  # type: ignore[arg-type]
            if optional:
                self._queue[-1].optional = True
            if self._free or len(self._workers) < len(self._places):
                self._give()
        finally:
            loop.thread = outer
        return promise

    if TYPE_CHECKING:

        @overload
        def map(
            self,
            messages: Iterable[Message],
            *,
            ordered: bool = True,
            timeout: float | None = DEFAULT,
            ahead: int | None = None,
        ) -> Iterator[Message]: ...

        @overload
        def map(
            self,
            messages: Iterable[Message],
            *,
            expect: type[M],
            ordered: bool = True,
            timeout: float | None = DEFAULT,
            ahead: int | None = None,
        ) -> Iterator[M]: ...

    def map(
        self,
        messages: Iterable[Message],
        *,
        expect: type[Any] = Message,
        ordered: bool = True,
        timeout: float | None = DEFAULT,
        ahead: int | None = None,
    ) -> Iterator[Any]:
        """Yield the reply to each of many tasks. Reads its input lazily, also an endless one.

        ``next()`` ticks the whole peer until a reply is there, so handlers run. It raises the error of a task in place of
        its reply, and the next ``next()`` goes on. Dropping the iterator takes its tasks back that are still queued.

        Args:
            messages: The tasks.
            expect: The class of the replies.
            ordered: Whether replies come in the order of the tasks, or as they are ready.
            timeout: Seconds that a worker has for a task; by default the pool's.
            ahead: How many tasks are queued, with workers, or done but not yielded, at most; by default twice as many as
                the workers can have.

        Raises:
            TypeError: An argument is of a wrong kind.
            ValueError: A number is out of range.
        """
        check_expect(expect)
        _check_number("ahead", ahead, 1, None)
        if timeout is not DEFAULT:
            check_timeout(timeout)
        if ahead is None:
            ahead = 2 * len(self._places) * self._in_flight
        source = iter(messages)
        from .pool_map import Mapped

        return Mapped(
            lambda: self._submit("map", next(source), expect, timeout, True), self._desk.run_until, ordered, ahead
        )

    def close(self, timeout: float | None = DEFAULT) -> None:
        """End the workers, side by side. What is queued or with workers fails. A second call does nothing.

        Args:
            timeout: Seconds until workers that have not ended are killed; by default as in ``Session.close``.
        """
        if timeout is not DEFAULT:
            check_timeout(timeout)
        desk = self._desk
        outer = desk.loop.enter()
        try:
            self._closed = True
            sessions = [worker.session for worker in self._workers]
            self._end("this side closed the worker pool")
            for session in sessions:
                conversation_of(session).end(StreamClosedError(f"this side closed the worker pool ({session.name})"))
            if timeout is not DEFAULT and timeout is not None:
                processes: list[Any] = [session.process for session in sessions]
                if timeout:
                    over = desk.loop.clock() + timeout
                    while desk.loop.clock() < over and any([process.returncode is None for process in processes]):
                        desk.loop.wait_for(-1, 0, min(over, desk.loop.clock() + 0.01))
                for process in processes:
                    _kill(process)
            for session in sessions:
                session.close()  # waits for what is left of it
        finally:
            desk.loop.thread = outer

    # -- giving tasks to workers

    def _give(self) -> None:
        """Give queued tasks to workers that are free, and start workers for the rest. An interrupted call is made again."""
        queue = self._queue
        free = self._free
        later = self._desk.loop.later
        later[self._driver] = None
        while queue and not self._closed:
            ticket = queue[0]
            if ticket.settled or (ticket.optional and ticket() is None):
                del queue[0]
                continue
            for worker in free:
                self._give_to(worker, ticket)
                break
            else:
                if not self._start():
                    break
        later.pop(self._driver, None)
        if queue or self._start_timeout is not None:
            self._set_timer()

    def _give_to(self, worker: _Worker, ticket: Ticket) -> None:
        running = worker.running
        # atomic: no calls
        del self._queue[0]
        ticket.worker = worker
        running[ticket] = None
        self._busy[ticket] = None
        worker.given += 1
        if len(running) >= self._in_flight or worker.given == self._tasks_per_worker:
            del self._free[worker]
        try:
            worker.conversation.request(None, ticket.message, ticket.timeout, ticket.expect, ticket)
        except StreamClosedError:
            self._free.pop(worker, None)  # it is dead; its end is on the way
            self._take_back(ticket, worker)
        except Exception as exc:  # the task cannot travel
            worker.given -= 1
            self._settling[ticket] = exc
            self._let_go(ticket, worker)
            self._find_free(worker)
            self._tell(ticket, exc)
        except BaseException:
            if ticket not in worker.conversation.replies:  # it may have been sent, so the worker must not go on with it
                self._kill(worker, "its task was interrupted while it was sent")
            raise

    def _let_go(self, ticket: Ticket, worker: _Worker) -> None:
        # atomic: no calls
        ticket.worker = None
        worker.running.pop(ticket, None)
        self._busy.pop(ticket, None)

    def _take_back(self, ticket: Ticket, worker: _Worker) -> None:
        """Queue a task again, before all others."""
        # atomic: no calls
        if ticket in worker.running:
            del worker.running[ticket]
            del self._busy[ticket]
            self._queue.appendleft(ticket)
            ticket.worker = None

    def _find_free(self, worker: _Worker) -> None:
        """Note that a worker can be given a task, if it can."""
        if not worker.ready or not worker.session.is_open or len(worker.running) >= self._in_flight:
            return
        if self._tasks_per_worker is None or worker.given < self._tasks_per_worker:
            self._free[worker] = None
        elif not worker.running:
            worker.retired = True
            self._drop(worker, "this side replaces the worker, which has done its share of tasks")

    def _returned(self, ticket: Ticket) -> None:
        """Take note that a worker has answered. What an interruption leaves is done by ``_look``."""
        worker: _Worker = ticket.worker
        # atomic: no calls
        ticket.worker = None
        del worker.running[ticket]
        del self._busy[ticket]
        self._deaths = 0
        if not worker.answered:
            worker.answered = True
            worker.place.deaths = 0
            worker.due = None
        if self._tasks_per_worker is not None or not worker.session.is_open:
            self._find_free(worker)
        else:
            self._free[worker] = None
        if self._queue:
            self._give()  # first, so that it is not idle while done callbacks run

    def _failed(self, ticket: Ticket, error: BaseException) -> bool:
        """Take note that a worker has not answered, or answered with an error.

        Returns:
            Whether the task fails with that.
        """
        worker: _Worker = ticket.worker
        worker.conversation.replies.forget(ticket)
        if isinstance(error, StreamClosedError):
            self._free.pop(worker, None)
            if not self._closed and ticket.tries < self._retries and not ticket.settled:
                ticket.tries += 1
                self._take_back(ticket, worker)
                return False
            self._settling[ticket] = error
            self._let_go(ticket, worker)
        elif isinstance(error, RequestTimeoutError):
            self._desk.mark()
            self._settling[ticket] = error
            self._let_go(ticket, worker)
            self._kill(worker, f"the worker was killed, because a task took longer than {ticket.timeout} s")
        else:
            self._settling[ticket] = error
            self._returned(ticket)
        return True

    def _tell(self, ticket: Ticket, error: BaseException) -> None:
        ticket.fail(error)
        self._settling.pop(ticket, None)

    # -- workers come and go

    def _start(self) -> bool:
        """Start a worker if one is needed and can be started now; returns whether to look for one again."""
        coming = [worker for worker in self._workers if not worker.ready]
        if len(coming) >= len(self._queue):
            return False
        now = self._desk.loop.clock()
        for place in self._places:
            if place.worker is None and place.start_at <= now:
                break
        else:
            return False
        try:
            session = self._peer.create_command_session(place.command, **self._options)
        except OSError as exc:
            error = StreamClosedError(f"a worker could not be started: {describe(exc)}")
            error.__cause__ = exc
            self._note_death(place, error)
            return bool(self._queue)
        worker = _Worker(place, session)
        self._workers[worker] = None
        place.worker = worker
        try:
            session.on_close(lambda session: self._gone(worker))
            if self._start_timeout is not None:
                worker.due = now + self._start_timeout
            if self._hello is not None or worker.due is not None:
                self._await_sign(worker)
            if self._on_session is not None:
                self._on_session(session)
        except Exception as exc:
            log.error("on_session of a worker pool failed", exc_info=True)
            self._kill(worker, f"on_session failed: {describe(exc)}")
            return bool(self._queue)
        except BaseException:
            self._kill(worker, "its start was interrupted")
            raise
        if self._hello is None and session.is_open:
            worker.ready = True
            self._free[worker] = None
        return True

    def _await_sign(self, worker: _Worker) -> None:
        sign: Any = Message if self._hello is None else self._hello

        @worker.session.on_message
        def hear(message: Message) -> None:
            if isinstance(message, sign):
                worker.session.off_message(hear)
                worker.due = None
                if not worker.ready:
                    worker.ready = True
                    self._free[worker] = None
                    self._give()

    def _kill(self, worker: _Worker, text: str) -> None:
        """Kill a worker that cannot be asked to end: it may be busy for ever."""
        self._free.pop(worker, None)
        _kill(worker.session.process)
        self._drop(worker, text)

    def _drop(self, worker: _Worker, text: str) -> None:
        """Close a worker's session. Its process is ended and reaped by ticks."""
        self._free.pop(worker, None)
        worker.conversation.end(StreamClosedError(f"{text} ({worker.session.name})"))

    def _gone(self, worker: _Worker) -> None:
        """Take note that a worker's session is closed. An interrupted call is made again."""
        self._desk.mark()
        for ticket in tuple(worker.running):  # which an interruption has left
            ticket.fail(worker.conversation.closed_error())
        self._free.pop(worker, None)
        place = worker.place
        if place.worker is worker:
            place.worker = None
            if not worker.answered and not worker.retired and not self._closed:
                self._note_death(place, worker.conversation.reason)
        self._workers.pop(worker, None)
        self._give()

    def _note_death(self, place: _Place, reason: StreamClosedError | None) -> None:
        """Take note that a worker came to nothing."""
        place.deaths += 1
        place.start_at = self._desk.loop.clock() + min(_BACK_OFF_MOST, _BACK_OFF * 2 ** min(place.deaths - 1, 10))
        self._deaths += 1
        if self._deaths >= max(_DEATHS, 3 * len(self._places)):
            text = f"{self._deaths} workers in a row ended before they had answered anything; the last one: {reason}"
            self._fail_queued(StreamClosedError(text))

    def _fail_queued(self, error: StreamClosedError) -> None:
        while self._queue:
            ticket = self._queue[0]
            self._settling[ticket] = error
            if self._queue and self._queue[0] is ticket:
                del self._queue[0]
            self._tell(ticket, error)

    # -- what the loop calls

    def _set_timer(self) -> None:
        times = [worker.due for worker in self._workers if worker.due is not None]
        if self._queue:
            times += [place.start_at for place in self._places if place.worker is None]
        self._desk.set_timer(min(times, default=None))

    def _look(self) -> None:
        """Do what is due, and what an interruption has left."""
        now = self._desk.loop.clock()
        for ticket, error in tuple(self._settling.items()):
            self._tell(ticket, error)
        for worker in tuple(self._workers):
            if not worker.session.is_open:
                self._gone(worker)
            elif worker.due is not None and worker.due <= now:
                self._kill(worker, f"the worker gave no sign within {self._start_timeout} s, so it was killed")
            elif worker not in self._free:
                self._find_free(worker)
        self._give()

    def _end(self, text: str) -> None:
        self._closed = True
        self._desk.leave()
        self._fail_queued(StreamClosedError(text))


class _Driver:
    """What the loop calls of a pool."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool

    @property
    def waits(self) -> bool:
        """Whether something will happen though nothing is open."""
        return bool(self._pool._queue)

    def returned(self, ticket: Ticket) -> None:
        """Take a ticket back: its reply is there."""
        self._pool._returned(ticket)

    def failed(self, ticket: Ticket, error: BaseException) -> bool:
        """Take a ticket back; returns whether it has failed for good."""
        return self._pool._failed(ticket, error)

    def on_time(self, now: float) -> None:
        """Start or give up workers: a time has come."""
        if now > 0:
            self._pool._look()

    def check(self) -> None:
        """Do what an interruption has left."""
        self._pool._look()

    def go_on(self) -> None:
        """Do what an interruption has left."""
        self._pool._look()

    def end(self) -> None:
        """Fail everything: the peer closes."""
        self._pool._end("this side closed the peer")


def _check_number(name: str, value: Any, least: int, *others: Any) -> None:
    if value in others:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r:.100}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value}")


def _kill(process: Any) -> None:
    """Send SIGKILL to a process that was not reaped, and to its group if it leads one."""
    if process is None or process.returncode is not None:
        return
    try:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):
        pass
