"""Workers that are started, given tasks, and replaced when they die.

Checks what users pass, and hands it on to the scheduler behind it. Must not know how anything is sent.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from .arguments import (
    DEFAULT,
    POOLS,
    USUAL,
    Facade,
    check_expect,
    check_iterable,
    check_message,
    check_timeout,
    close_bound,
    safe_repr,
    sendable,
)
from .handlers import check_handler
from .interruptions import interruption_in
from .messages import Message
from .peer import IpcPeer
from .promise import ResponsePromise, pending_of, send_request
from .workers.scheduler import Scheduler
from .workers.worker import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, TypeVar, overload

    from .session import Session
    from .transports.spawn import Command, Items

    M = TypeVar("M", bound=Message)

__all__ = ["WorkerPool"]


class WorkerPool(Facade):
    """Gives tasks to worker processes, and replaces those that die.

    They are started when they are needed. The peer's ticks and waits drive it;
    there is no thread. A worker is any program that talks over its stdin and
    stdout. A context manager: leaving waits for what is queued by then, and
    closes it; an exception closes it at once.

    A worker that dies is replaced, and its tasks are given to others. If
    workers die again and again before any has answered something, what is
    queued fails with ``StreamClosedError``, unless a worker still runs that did
    not have to replace another.

    Args:
        peer: What drives it.
        command: The command of all workers, or a list of commands, one for each
            worker.
        size: How many workers there are at most, beside those that have been
            replaced and are ending; by default as many as CPUs. Not with a list
            of commands.
        retries: How often a task is given to another worker when its worker
            dies. Then it fails with the ``StreamClosedError`` that says how the
            worker ended.
        timeout: Seconds that a worker has for a task, from when it gets it; by
            default the peer's, None for no limit. A task that takes longer
            fails with ``RequestTimeoutError``, and its worker is killed and
            replaced.
        tasks_per_worker: A worker is replaced after so many tasks.
        in_flight: How many tasks a worker has at a time. If it dies, each of
            them has had one of its tries.
        on_session: Called with each new worker's session, for handlers and
            set-up messages. What it raises is logged, and the worker counts as
            one that died.
        hello: A message class: a worker gets tasks once it has notified the
            pool of one; without ``start_timeout`` that is waited for without
            limit. None: it gets one at once.
        start_timeout: Seconds until a worker must have given its first sign
            (``hello``, or else any message, be it a line on its stderr), or it
            is killed and replaced; None for no limit.
        options: Further arguments of ``IpcPeer.create_command_session``.

    Raises:
        TypeError: An argument is of a wrong kind.
        ValueError: A number is out of range, or there is no command.

    Example:
        command = [sys.executable, "worker.py"]
        with IpcPeer() as peer, WorkerPool(peer, command) as pool:
            for reply in pool.map(tasks, expect=TaskResponse):
                print(reply.result)
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
        if not isinstance(peer, IpcPeer):
            raise TypeError(f"WorkerPool() takes an IpcPeer first, not {peer!r:.100}")
        commands: list[Any] = [command]
        if isinstance(command, Sequence) and command and not isinstance(command[0], (str, bytes, int, os.PathLike)):
            commands = list(command)
            if size not in (None, len(commands)):
                text = f"size must be left out with a list of commands, or say how many there are: {len(commands)}"
                raise ValueError(f"{text}; it is {size!r:.100}")
            size = len(commands)
        _check_number("size", size, 1, None)
        _check_number("retries", retries, 0)
        _check_number("in_flight", in_flight, 1)
        _check_number("tasks_per_worker", tasks_per_worker, 1, None)
        if timeout is not DEFAULT:
            check_timeout(timeout)
        check_timeout(start_timeout, "start_timeout")
        if hello is not None:
            hello = check_expect(hello, "hello")
        if on_session is not None:
            check_handler("on_session", on_session, 1)
        from .transports.spawn import check_command, check_options

        for each in commands:
            check_command(each)
        check_options(**options)
        if size is None:
            size = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        commands = [commands[n % len(commands)] for n in range(size)]
        self._peer = peer
        self._options = Options(
            commands=commands,
            retries=retries,
            timeout=timeout,
            tasks_per_worker=tasks_per_worker,
            in_flight=in_flight,
            on_session=on_session,
            hello=hello,
            start_timeout=start_timeout,
            popen=options,
        )
        self._scheduler = Scheduler(peer, self._options)

    @safe_repr
    def __repr__(self) -> str:
        state = "closed" if self._scheduler.tasks.closed else "open"
        return f"<WorkerPool {state} workers={len(self.workers)}/{len(self._options.commands)} pending={self.pending}>"

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            if kind is None and not self._scheduler.tasks.closed and not self._scheduler.tasks.loop.forked:
                self._scheduler.finish()
        finally:
            self.close()

    @property
    def workers(self) -> tuple[Session, ...]:
        """The sessions of the workers that are running."""
        return tuple(self._scheduler.supervisor.sessions)

    @property
    def pending(self) -> int:
        """How many tasks are queued or with workers."""
        return self._scheduler.pending

    if TYPE_CHECKING:

        @overload
        def submit(self, message: Message, *, timeout: float | None = POOLS) -> ResponsePromise[Message]: ...

        @overload
        def submit(
            self, message: Message, *, expect: type[M], timeout: float | None = POOLS
        ) -> ResponsePromise[M]: ...

    def submit(
        self, message: Message, *, expect: type[Any] = Message, timeout: float | None = POOLS
    ) -> ResponsePromise[Any]:
        """Queue a task, and give it to a worker as soon as one is free.

        The message is encoded when a worker gets it, so it must not be changed
        until there is a reply. Does not block. May start a worker, and so call
        ``on_session``. Runs no other handlers, but the done callbacks of tasks
        that fail meanwhile.

        Args:
            message: The task; a worker gets it as a request.
            expect: The class of the reply.
            timeout: Seconds that a worker has for it; by default the pool's.

        Returns:
            A promise, as of a request. Its ``cancel()`` takes a task back that
            is still queued; a worker that has it goes on, and its reply is
            discarded. The task is done also if the promise is dropped.

        Raises:
            TypeError: An argument is of a wrong kind, be it one for
                ``create_command_session``.
            ValueError: ``timeout`` is negative, or the id generator has made an
                id that cannot be used.
            RuntimeError: The pool is closed, another thread is using the peer,
                or this is a fork.
        """
        promise = self._make("submit", check_expect(expect), timeout, message)
        self._give(promise)
        return promise

    def _make(self, method: str, expect: type[Any], timeout: float | None, message: Message) -> ResponsePromise[Any]:
        """Make the promise of a task that is not queued yet."""
        if type(message) not in sendable:
            check_message(method, message)
        if timeout is POOLS:
            timeout = self._peer.timeout if self._options.timeout is DEFAULT else self._options.timeout
        else:
            check_timeout(timeout)
        tasks = self._scheduler.tasks
        tasks.loop.check_entry()
        return send_request(tasks, message, timeout, expect)

    def _give(self, promise: ResponsePromise[Any]) -> None:
        """Queue the task of a promise, and give what is queued to workers that are free. It can be called again."""
        try:
            self._scheduler.submit(pending_of(promise))
        except Exception as exc:  # it is closed, or no worker can be started with these arguments
            if interruption_in(exc) is None:
                promise.cancel()
            raise

    if TYPE_CHECKING:

        @overload
        def map(
            self,
            messages: Iterable[Message],
            *,
            ordered: bool = True,
            timeout: float | None = POOLS,
            ahead: int | None = None,
        ) -> Iterator[Message]: ...

        @overload
        def map(
            self,
            messages: Iterable[Message],
            *,
            expect: type[M],
            ordered: bool = True,
            timeout: float | None = POOLS,
            ahead: int | None = None,
        ) -> Iterator[M]: ...

    def map(
        self,
        messages: Iterable[Message],
        *,
        expect: type[Any] = Message,
        ordered: bool = True,
        timeout: float | None = POOLS,
        ahead: int | None = None,
    ) -> Iterator[Any]:
        """Yield the reply to each of many tasks.

        Reads its input lazily, also an endless one. ``next()`` ticks the whole
        peer until a reply is there, so handlers run. It raises the error of a
        task in place of its reply, and the next ``next()`` goes on. Dropping
        the iterator takes its tasks back that are still queued.

        Args:
            messages: The tasks.
            expect: The class of the replies.
            ordered: Whether replies come in the order of the tasks, or as they
                are ready.
            timeout: Seconds that a worker has for a task; by default the
                pool's.
            ahead: How many tasks are queued, with workers, or done but not
                yielded, at most; by default twice as many as the workers can
                have.

        Raises:
            TypeError: An argument is of a wrong kind.
            ValueError: A number is out of range.

        Example:
            replies = pool.map(map(TaskRequest, words), expect=TaskResponse)
            for word, reply in zip(words, replies):
                print(word, reply.result)
        """
        expect = check_expect(expect)
        _check_number("ahead", ahead, 1, None)
        if timeout is not POOLS:
            check_timeout(timeout)
        if ahead is None:
            ahead = 2 * len(self._options.commands) * self._options.in_flight
        check_iterable("map() takes an iterable of messages", messages)
        source = iter(messages)
        from .workers.map import MapIterator

        make = partial(self._make, "map", expect, timeout)
        return MapIterator(source, make, self._give, self._scheduler.tasks.loop, ordered, ahead)

    def close(self, timeout: float | None = USUAL) -> None:
        """End the workers, side by side. What is queued or with workers fails.

        What was sent to workers besides tasks, and these have not received, is
        dropped. A second call does nothing.

        Args:
            timeout: Seconds until workers that have not ended are killed; by
                default as in ``Session.close``.
        """
        seconds = close_bound(timeout)
        loop = self._scheduler.tasks.loop
        if not loop.forked:
            loop.inside(self._scheduler.close_workers, seconds)


def _check_number(name: str, value: Any, least: int, *others: Any) -> None:
    if value in others:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r:.100}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value}")
