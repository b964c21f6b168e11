"""Pools of workers: tasks that are given out, workers that die, hang and are replaced."""

import collections
import contextlib
import gc
import itertools
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import tracemalloc
import weakref
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Type

import pytest

from stream_ipc import (
    DeferredReply,
    IpcError,
    IpcPeer,
    LogMessage,
    Message,
    PidCounterRequestIdGenerator,
    RemoteError,
    RequestEnvelope,
    RequestTimeoutError,
    ResponsePromise,
    SerializationError,
    Session,
    StreamClosedError,
    UnexpectedReplyError,
    WorkerPool,
    as_completed,
    gather,
)
from stream_ipc.core import chores
from stream_ipc.core.pending import Pending
from stream_ipc.core.requests import Requests
from stream_ipc.core.teardowns import Teardowns
from stream_ipc.transports.channel import Teardown
from stream_ipc.workers import scheduler, supervisor
from stream_ipc.workers.tasks import Task, Tasks
from stream_ipc.workers.worker import Worker
from tests.helpers import (
    PATIENCE,
    ActingSerializer,
    CallAt,
    CpuMeter,
    FakeClock,
    HurryingClock,
    InterruptAt,
    Interruption,
    InterruptionError,
    RawPeer,
    after,
    deadline_of,
    framed,
    is_settled,
    no_pending,
    places_apart,
    promises_queued,
    seeds,
    set_clock,
    set_limit,
    span,
    tick_until,
)
from tests.messages import Note, Ping, Pong
from tests.os_helpers import await_death, program, script
from tests.test_interrupts import BOTH, Run, at_every_place


def worker(*args: str) -> List[str]:
    code = after("import sys\nfrom tests.pool_child import main", "main(*sys.argv[1:])")
    return [sys.executable, "-S", "-c", code, *args]


@pytest.fixture
def pool(peer: IpcPeer) -> Iterator[WorkerPool]:
    with WorkerPool(peer, worker(), 2) as pool:
        yield pool


def pid_of(session: Session) -> int:
    assert session.process is not None
    return session.process.pid


def is_alive(pid: int) -> bool:
    """Whether there is such a process, be it a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def outcome(promise: "ResponsePromise[Any]") -> Any:
    try:
        return promise.wait().value
    except IpcError as exc:
        return type(exc)


# -- tasks


def test_submit_and_wait(pool: WorkerPool) -> None:
    assert pool.workers == () and pool.pending == 0
    promise = pool.submit(Ping(5), expect=Pong)
    assert len(pool.workers) == 1 and pool.pending == 1 and not promise.done
    assert promise.wait().value == 5 and promise.done and pool.pending == 0
    assert promise.wait() is promise.wait()
    assert "open workers=1/2 pending=0" in repr(pool)


def test_more_tasks_than_workers_are_spread(pool: WorkerPool) -> None:
    promises = [pool.submit(Ping(("sleep", 0.05)), expect=Pong) for _ in range(2)]
    pids = [pool.submit(Ping("pid"), expect=Pong) for _ in range(20)]
    assert len(pool.workers) == 2
    found = {reply.value for reply in gather(pids)}
    assert found <= {pid_of(session) for session in pool.workers}
    gather(promises)


def test_as_completed_with_promises_of_sessions(peer: IpcPeer, pool: WorkerPool) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    promises: List[ResponsePromise[Pong]] = [a.request(Ping(1), expect=Pong), pool.submit(Ping(2), expect=Pong)]
    promises.append(a.request(Ping(3), expect=Pong))
    assert sorted(promise.wait().value for promise in as_completed(promises)) == [1, 2, 3]


def test_errors_of_tasks(pool: WorkerPool) -> None:
    with pytest.raises(RemoteError, match="no good"):
        pool.submit(Ping("error")).wait()
    with pytest.raises(UnexpectedReplyError):
        pool.submit(Ping(1), expect=Note).wait()
    with pytest.raises(SerializationError):
        pool.submit(Ping(lambda: None)).wait()
    assert pool.submit(Ping(3), expect=Pong).wait().value == 3 and len(pool.workers) == 1


def test_wrong_arguments(peer: IpcPeer, pool: WorkerPool) -> None:
    wrong: Any
    for wrong in ("text", Ping, None):
        with pytest.raises(TypeError, match=r"submit\(\) takes a Message"):
            pool.submit(wrong)
    for wrong in (int, "Pong", [], None):
        with pytest.raises(TypeError, match="expect must be a message class"):
            pool.submit(Ping(), expect=wrong)
        with pytest.raises(TypeError, match="expect must be a message class"):
            pool.map([Ping()], expect=wrong)
    for wrong in (Ping(), Ping, None):
        with pytest.raises(TypeError, match=r"^map\(\) takes an iterable of messages, not "):
            pool.map(wrong)
    with pytest.raises(ValueError, match="timeout"):
        pool.submit(Ping(), timeout=-1)
    assert pool.pending == 0
    for options in (
        {"size": 0}, {"size": 1.5}, {"retries": -1}, {"in_flight": 0}, {"tasks_per_worker": 0}, {"timeout": -1},
        {"start_timeout": "x"}, {"hello": int}, {"on_session": 5}, {"on_session": lambda: 5},
    ):  # fmt: skip
        wrong = options
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(options))} (must be|takes)"):
            WorkerPool(peer, worker(), **wrong)
    for wrong in ("python3 x.py", ["python3 x.py", []], 5, None, [5], [None]):
        with pytest.raises(TypeError, match="command must be|item of command must be"):
            WorkerPool(peer, wrong)
    for wrong in ([], [[]], [worker(), []]):
        with pytest.raises(ValueError, match="command is empty"):
            WorkerPool(peer, wrong)
    for wrong in (5, None, pool):
        with pytest.raises(TypeError, match="IpcPeer first"):
            WorkerPool(wrong, worker())
    with pytest.raises(ValueError, match="size"):
        WorkerPool(peer, [worker(), worker()], 1)
    for options, text in (
        ({"nonsense": 1}, "nonsense"), ({"shell": True}, "no shell"), ({"cwd": 5}, "cwd must be"),
        ({"env": {"A": 1}}, "env"), ({"stderr": "x"}, "stderr must be"),
    ):  # fmt: skip
        wrong = options
        with pytest.raises(TypeError, match=text):
            WorkerPool(peer, worker(), 1, **wrong)


def test_cancel_takes_a_queued_task_back(peer: IpcPeer, tmp_path: Path) -> None:
    path = str(tmp_path / "done")
    with WorkerPool(peer, worker(), 1) as pool:
        first = pool.submit(Ping(("sleep", 0.05)), expect=Pong)
        second, third = [pool.submit(Ping(("count", path, index))) for index in range(2)]
        assert second.cancel() and not second.cancel() and pool.pending == 2
        with pytest.raises(IpcError, match="cancelled"):
            second.wait()
        assert first.cancel()  # a worker has it, and goes on
        third.wait()
    assert Path(path).read_text() == "1\n"


def test_task_is_done_though_its_promise_is_dropped(peer: IpcPeer, tmp_path: Path) -> None:
    path = str(tmp_path / "done")
    with WorkerPool(peer, worker(), 1) as pool:
        for index in range(5):
            pool.submit(Ping(("count", path, index)))
    assert Path(path).read_text().split() == ["0", "1", "2", "3", "4"]


def test_done_callbacks_that_submit(peer: IpcPeer, pool: WorkerPool) -> None:
    got: List[int] = []

    def again(promise: Any) -> None:
        value = promise.wait().value
        got.append(value)
        if value < 50:
            pool.submit(Ping(value + 1)).add_done_callback(again)

    pool.submit(Ping(0)).add_done_callback(again)
    tick_until(lambda: len(got) == 51, peer)
    assert got == list(range(51))


def test_handlers_that_submit_and_wait_and_pass_on(peer: IpcPeer, pool: WorkerPool) -> None:
    a, b = peer.create_session_pair()

    @b.on_request
    def answer(ping: Ping) -> "Message | ResponsePromise[Message] | DeferredReply":
        if ping.value % 3 == 0:
            return pool.submit(ping)
        if ping.value % 3 == 1:
            return pool.submit(ping).wait()
        reply = DeferredReply()
        pool.submit(ping).add_done_callback(lambda promise: reply.send(promise.wait()))
        return reply

    promises = [a.request(Ping(index), expect=Pong) for index in range(60)]
    assert [reply.value for reply in gather(promises)] == list(range(60))


def test_two_pools_on_one_peer_and_one_after_the_other(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 1) as first, WorkerPool(peer, worker(), 2) as second:
        promises = [pool.submit(Ping(index), expect=Pong) for index in range(100) for pool in (first, second)]
        assert [reply.value for reply in gather(promises)] == [index for index in range(100) for _ in range(2)]
    with WorkerPool(peer, worker(), 1) as third:
        assert third.submit(Ping(1), expect=Pong).wait().value == 1


def test_thousands_of_tasks(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 3) as pool:
        promises = [pool.submit(Ping(index), expect=Pong) for index in range(2000)]
        assert [reply.value for reply in gather(promises, 50)] == list(range(2000))
        assert len(pool.workers) == 3


def test_no_worker_is_started_for_a_task_that_was_taken_back(peer: IpcPeer) -> None:
    started: List[Session] = []
    pool = WorkerPool(peer, ["cat"], 4, on_session=started.append, hello=Note)
    promises = [pool.submit(Ping(index)) for index in range(3)]
    promises[1].cancel()
    promises.append(pool.submit(Ping(3)))  # for which one is coming that nobody else needs
    assert len(started) == 3 == pool.pending
    promises.append(pool.submit(Ping(4)))
    assert len(started) == 4 == pool.pending


@pytest.mark.matrix
@pytest.mark.parametrize("in_flight", [10, 1])
def test_in_flight(peer: IpcPeer, in_flight: int) -> None:
    with WorkerPool(peer, worker(), 2, in_flight=in_flight) as pool:
        assert [reply.value for reply in pool.map([Ping(n) for n in range(500)], expect=Pong)] == list(range(500))


def test_on_session_and_progress(peer: IpcPeer) -> None:
    seen: List[str] = []
    sessions: List[Session] = []

    def on_session(session: Session) -> None:
        sessions.append(session)

        @session.on_message
        def progress(message: LogMessage) -> None:
            seen.append(message.message)

    with WorkerPool(peer, worker(), 2, on_session=on_session) as pool:
        gather([pool.submit(Ping("progress")) for _ in range(4)])
        assert seen == ["half"] * 4 and tuple(sessions) == pool.workers


@pytest.mark.slow
def test_on_session_that_fails(peer: IpcPeer, caplog: pytest.LogCaptureFixture) -> None:
    def on_session(session: Session) -> None:
        raise LookupError("set-up failed")

    with WorkerPool(peer, worker(), 1, on_session=on_session) as pool:
        with pytest.raises(StreamClosedError, match="5 workers in a row .* on_session failed: LookupError: set-up"):
            pool.submit(Ping()).wait(10)


# -- map


def test_map_is_lazy_and_in_order(pool: WorkerPool) -> None:
    read: List[int] = []

    def tasks() -> Iterator[Ping]:
        for index in itertools.count():
            read.append(index)
            yield Ping(index)

    replies = pool.map(tasks(), expect=Pong, ahead=6)
    assert read == []
    for index in range(100):
        assert next(replies).value == index
        assert len(read) <= index + 7
    del replies
    gc.collect()
    tick_until(lambda: pool.pending == 0, pool.workers[0].peer)


@pytest.mark.slow
def test_map_out_of_order(pool: WorkerPool) -> None:
    tasks = [Ping(("sleep", 0.3)), *[Ping(index) for index in range(20)]]
    replies = list(pool.map(tasks, expect=Pong, ordered=False, ahead=50))
    assert sorted(map(str, replies)) == sorted(str(Pong(task.value)) for task in tasks)
    assert replies[-1].value[0] == "sleep"


@pytest.mark.matrix
@pytest.mark.parametrize("ordered", [True, False])
def test_map_goes_on_after_an_error(pool: WorkerPool, ordered: bool) -> None:
    replies = pool.map([Ping(1), Ping("error"), Ping(2)], expect=Pong, ordered=ordered)
    got: List[Any] = []
    while True:
        try:
            got.append(next(replies).value)
        except RemoteError:
            got.append("error")
        except StopIteration:
            break
    assert sorted(got, key=str) == [1, 2, "error"] and list(replies) == []
    if ordered:
        assert got == [1, "error", 2]


def test_map_whose_input_fails(pool: WorkerPool) -> None:
    def tasks() -> Iterator[Ping]:
        yield Ping(1)
        yield Ping(2)
        raise LookupError("no more")

    replies = pool.map(tasks(), expect=Pong)
    assert [next(replies).value, next(replies).value] == [1, 2]
    with pytest.raises(LookupError):
        next(replies)
    with pytest.raises(StopIteration):
        next(replies)


@pytest.mark.matrix
@pytest.mark.parametrize("ordered", [False, True])
def test_handlers_that_take_from_the_map_that_is_waited_for(peer: IpcPeer, pool: WorkerPool, ordered: bool) -> None:
    a, b = peer.create_session_pair()
    replies = pool.map([Ping(index) for index in range(8)], expect=Pong, ordered=ordered, ahead=3)
    taken: List[Any] = []
    b.on_message(lambda note: taken.append(next(replies).value))
    for _ in range(4):
        a.notify(Note())
    assert sorted([*[reply.value for reply in replies], *taken]) == list(range(8)) and len(taken) == 4
    assert next(replies, None) is None


@pytest.mark.parametrize("ordered", [True, False])
def test_id_generator_that_takes_from_the_map_that_is_waited_for(tmp_path: Path, ordered: bool) -> None:
    class Ids(PidCounterRequestIdGenerator):
        def generate(self) -> str:
            nonlocal calls
            calls += 1
            if calls == 3:
                got.append(next(replies).value)
            return super().generate()

    calls = 0
    got: List[Any] = []
    path = str(tmp_path / "done")
    with IpcPeer(id_generator=Ids()) as peer, WorkerPool(peer, worker(), 1) as pool:
        replies = pool.map([Ping(("count", path, number)) for number in range(9)], expect=Pong, ordered=ordered)
        got += [reply.value for reply in replies]
        assert sorted([value[2] for value in got]) == list(range(9))
    assert Path(path).read_text().split() == list("012345678")


def test_dropped_map_takes_back_what_is_queued(peer: IpcPeer, tmp_path: Path) -> None:
    path = str(tmp_path / "done")
    with WorkerPool(peer, worker(), 1) as pool:
        for _ in pool.map((Ping(("count", path, index)) for index in itertools.count()), ahead=50):
            break
    assert len(Path(path).read_text().split()) <= 3


# -- workers that die


def test_worker_that_dies_is_replaced_and_its_task_done_by_another(
    peer: IpcPeer, pool: WorkerPool, tmp_path: Path
) -> None:
    assert pool.submit(Ping(("once", str(tmp_path / "flag"))), expect=Pong).wait().value[0] == "once"
    idle = pool.workers[0]
    os.kill(pid_of(idle), signal.SIGKILL)
    tick_until(lambda: not idle.is_open, peer)
    assert pool.submit(Ping("pid"), expect=Pong).wait().value != pid_of(idle)


def test_worker_that_was_killed_while_nobody_looked(pool: WorkerPool) -> None:
    pool.submit(Ping(1)).wait()
    process = pool.workers[0].process
    assert process is not None
    process.kill()
    await_death(process)
    assert [outcome(pool.submit(Ping(index))) for index in range(5)] == list(range(5))


@pytest.mark.slow
def test_what_a_dead_worker_had_is_done_by_the_next_one_in_order(peer: IpcPeer, tmp_path: Path) -> None:
    flag = str(tmp_path / "flag")
    done: List[Any] = []
    with WorkerPool(peer, worker(), 1, in_flight=4) as pool:
        for value in [("once", flag), 1, 2, 3, 4, 5]:
            pool.submit(Ping(value), expect=Pong).add_done_callback(lambda promise: done.append(promise.wait().value))
    assert done == [("once", flag), 1, 2, 3, 4, 5]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="without a pidfd the clock has to go on")
def test_what_dead_workers_had_is_queued_again_in_the_order_in_which_it_was_submitted() -> None:
    def refuse(session: Session) -> None:
        sessions.append(session)
        if len(sessions) > 3:
            raise OSError("no more")

    for seed in seeds(3):
        rng = random.Random(seed)
        sessions: List[Session] = []
        with IpcPeer() as peer:
            set_clock(peer, FakeClock())  # so that none is started again
            pool = WorkerPool(peer, script("time.sleep(600)"), 3, in_flight=3, timeout=None, on_session=refuse)
            promises = [pool.submit(Ping(number)) for number in range(12)]
            for session in rng.sample(sessions, 3):
                os.kill(pid_of(session), signal.SIGKILL)
                tick_until(lambda session=session: not session.is_open, peer)  # type: ignore[misc]
            peer.tick(0)
            assert promises_queued(pool) == promises


def test_a_worker_that_dies_costs_each_of_its_tasks_the_same_however_many_it_has() -> None:
    def count(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count if frame.f_code.co_filename.endswith("tasks.py") else None

    counts = []
    for tasks in (100, 400):
        lines = 0
        with IpcPeer() as peer:
            set_clock(peer, FakeClock())  # so that none is started again
            pool = WorkerPool(peer, script("time.sleep(600)"), 1, in_flight=tasks, timeout=None)
            promises = [pool.submit(Ping(number)) for number in range(tasks)]
            os.kill(pid_of(pool.workers[0]), signal.SIGKILL)
            try:
                sys.settrace(count)
                tick_until(lambda: not pool.workers, peer)  # noqa: B023
            finally:
                sys.settrace(None)
            assert promises_queued(pool) == promises
        counts.append(lines)
    assert counts[1] < 6 * counts[0]


@pytest.mark.parametrize("retries", [0, 1, 3])
@pytest.mark.slow
def test_task_that_kills_its_workers_fails_with_the_status(peer: IpcPeer, retries: int) -> None:
    started: List[Session] = []
    with WorkerPool(peer, worker(), 2, retries=retries, on_session=started.append) as pool:
        other = pool.submit(Ping(("sleep", 0.1)), expect=Pong)
        with pytest.raises(StreamClosedError, match="(?s)exit status 7.*bye") as caught:
            pool.submit(Ping(("exit", 7))).wait()
        said = f"{retries + 1} workers ended while they had this task; the last one: " in str(caught.value)
        assert said == (retries > 0)
        assert other.wait().value[0] == "sleep"
        assert len(started) in (retries + 1, retries + 2)
        assert pool.submit(Ping(1), expect=Pong).wait().value == 1


@pytest.mark.slow
def test_workers_that_never_come_up_fail_what_is_queued(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker("dies"), 2, hello=Note) as pool, CpuMeter() as meter:
        promises = [pool.submit(Ping(index)) for index in range(10)]
        with pytest.raises(StreamClosedError, match="(?s)6 workers in a row ended before .* exit status 1.*no licence"):
            promises[0].wait(20)
        assert [outcome(promise) for promise in promises] == [StreamClosedError] * 10
    assert meter.cpu < 0.5 * meter.real + 0.5


@pytest.mark.slow
def test_command_that_does_not_exist(peer: IpcPeer) -> None:
    with WorkerPool(peer, ["/no/such/program"], 3) as pool:
        with pytest.raises(StreamClosedError, match="could not be started: FileNotFoundError"):
            pool.submit(Ping()).wait(20)
        assert pool.workers == () and pool.pending == 0


def test_done_callback_that_submits_again_when_no_worker_comes_up(peer: IpcPeer) -> None:
    set_clock(peer, HurryingClock())
    tries: List[Any] = []
    with WorkerPool(peer, ["/does/not/exist"], 1) as pool:

        def again(promise: Any) -> None:
            tries.append(promise)
            if len(tries) < 20:
                pool.submit(Ping()).add_done_callback(again)

        pool.submit(Ping()).add_done_callback(again)
        per_tick = []
        while len(tries) < 20:
            before = len(tries)
            peer.tick(0)
            per_tick.append(len(tries) - before)
    assert max(per_tick) == 1 and {outcome(promise) for promise in tries} == {StreamClosedError}


def test_a_task_that_is_tried_again_has_not_settled(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 1, retries=1) as pool:
        called: List[bool] = []
        promise = pool.submit(Ping(1), expect=Pong)
        promise.add_done_callback(lambda promise: called.append(promise.settled))
        pool.workers[0].close(timeout=0)
        assert not promise.settled and called == []
        assert promise.wait(PATIENCE) == Pong(1)
        tick_until(lambda: called, peer)
        assert called == [True]


def test_a_task_that_could_not_be_sent_was_not_tried(peer: IpcPeer, tmp_path: Path) -> None:
    with WorkerPool(peer, worker("deaf", str(tmp_path / "begun")), 1, retries=0, hello=Note) as pool:
        first = pool.submit(Ping(1), expect=Pong)
        assert first.wait(PATIENCE) == Pong(1)
        pool.close(timeout=0)


def test_flaky_start(peer: IpcPeer) -> None:
    with WorkerPool(peer, [worker("flaky"), worker()], retries=20) as pool:
        promises = [pool.submit(Ping(index), expect=Pong) for index in range(200)]
        assert [reply.value for reply in gather(promises)] == list(range(200))


@pytest.mark.slow
def test_back_off_does_not_spin(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker("dies"), 1, retries=100, hello=Note) as pool:
        promise = pool.submit(Ping())
        with CpuMeter() as meter, pytest.raises(TimeoutError):
            promise.wait(0.7)
        assert meter.cpu < 0.3
        assert not promise.done
        pool.close()
        assert outcome(promise) is StreamClosedError


@pytest.mark.slow
def test_workers_that_are_killed_at_random() -> None:
    for seed in seeds(1):
        chance = random.Random(seed)
        with IpcPeer(timeout=60) as peer, WorkerPool(peer, worker(), 4, retries=1000) as pool:
            end = time.monotonic() + span(8)
            got: List[int] = []
            killed = 0
            next_kill = 0.0
            replies = pool.map((Ping(index) for index in itertools.count()), expect=Pong)
            while time.monotonic() < end:
                got.append(next(replies).value)
                if time.monotonic() > next_kill and pool.workers:
                    try:
                        os.kill(pid_of(chance.choice(pool.workers)), chance.choice([signal.SIGKILL, signal.SIGTERM]))
                    except ProcessLookupError:
                        continue  # it has died of the last one, and was reaped
                    killed += 1
                    next_kill = time.monotonic() + chance.random() * 0.2
            assert got == list(range(len(got))) and killed > 10


@pytest.mark.slow
def test_workers_that_die_at_one_task_in_ten(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 3, retries=0) as pool:
        promises = [pool.submit(Ping("die" if index % 10 == 9 else index)) for index in range(100)]
        found = [outcome(promise) for promise in promises]
    assert found == [StreamClosedError if index % 10 == 9 else index for index in range(100)]


# -- workers that hang


@pytest.mark.slow
def test_task_that_takes_too_long_fails_and_its_worker_is_killed(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 1, timeout=20) as pool:
        pid = pool.submit(Ping("pid"), expect=Pong).wait().value
        slow = pool.submit(Ping("spin"), timeout=0.3)
        queued = pool.submit(Ping("pid"), expect=Pong)
        with pytest.raises(RequestTimeoutError, match="within 0.3 s"):
            slow.wait()
        assert queued.wait().value != pid
        tick_until(lambda: not is_alive(pid), peer)


def test_worker_that_took_too_long_is_dead_before_the_next_tick(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 1, timeout=0.1) as pool:
        slow = pool.submit(Ping("spin"))
        process = pool.workers[0].process
        assert process is not None
        with pytest.raises(RequestTimeoutError):
            slow.wait()
        await_death(process)


@pytest.mark.slow
def test_timeout_counts_from_when_a_worker_gets_the_task(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 1, timeout=1.2) as pool:
        pool.submit(Ping(0), timeout=PATIENCE).wait()
        promises = [pool.submit(Ping(("sleep", 0.15)), expect=Pong) for _ in range(9)]
        assert len(gather(promises)) == 9


def test_timeout_is_noticed_by_ticks_and_wakes_them(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 1, timeout=0.1) as pool:
        promise = pool.submit(Ping("spin"))
        begin = time.monotonic()
        while not is_settled(promise):
            peer.tick(None)
        assert time.monotonic() - begin < 5
        assert outcome(promise) is RequestTimeoutError


@pytest.mark.slow
def test_wait_with_a_timeout_of_its_own(pool: WorkerPool) -> None:
    promise = pool.submit(Ping(("sleep", 0.3)), expect=Pong)
    with pytest.raises(TimeoutError, match="still pending"):
        promise.wait(0.05)
    with pytest.raises(TimeoutError):
        gather([promise], 0.01)
    assert not promise.done and promise.wait().value[0] == "sleep"


@pytest.mark.slow
def test_many_tasks_that_hang(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 2, timeout=0.4) as pool:
        pool.submit(Ping(0), timeout=PATIENCE).wait()
        promises = [pool.submit(Ping("spin")) for _ in range(8)] + [pool.submit(Ping(1), timeout=PATIENCE)]
        assert [outcome(promise) for promise in promises] == [RequestTimeoutError] * 8 + [1]


@pytest.mark.slow
def test_answer_after_the_timeout_is_discarded(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 1) as pool:
        assert outcome(pool.submit(Ping(("late", 0.3)), timeout=0.25)) is RequestTimeoutError
        assert [outcome(pool.submit(Ping(index))) for index in range(3)] == [0, 1, 2]


@pytest.mark.slow
def test_in_flight_tasks_of_a_hung_worker_are_done_by_another(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 1, in_flight=4) as pool:
        promises = [pool.submit(Ping("spin"), timeout=0.3), *[pool.submit(Ping(n), timeout=None) for n in range(3)]]
        assert [outcome(promise) for promise in promises] == [RequestTimeoutError, 0, 1, 2]


@pytest.mark.slow
def test_worker_that_ignores_everything_is_killed_by_start_timeout(peer: IpcPeer) -> None:
    started: List[Session] = []
    with WorkerPool(
        peer, [worker("silent"), worker("hello", "0")], hello=Note, start_timeout=2, on_session=started.append
    ) as pool:
        promises = [pool.submit(Ping(("sleep", 0.05)), timeout=5) for _ in range(20)]
        assert {outcome(promise) for promise in promises} == {("sleep", 0.05)}
        pid = pid_of(started[0])
        tick_until(lambda: not is_alive(pid), peer)


@pytest.mark.parametrize("hello", [Note, None])
def test_a_sign_that_has_come_counts_though_nobody_has_looked(peer: IpcPeer, hello: Any) -> None:
    clock = set_clock(peer, FakeClock())
    started: List[Session] = []

    def slow(session: Session) -> None:
        started.append(session)
        assert session.process is not None and session.process.stdout is not None
        assert select.select([session.process.stdout], [], [], 20)[0]
        clock.now += 5

    with WorkerPool(peer, worker("hello", "0"), 1, hello=hello, start_timeout=1, on_session=slow) as pool:
        assert outcome(pool.submit(Ping(1))) == 1
        assert len(started) == 1


def test_a_sign_that_has_come_counts_though_another_worker_has_ended_meanwhile(peer: IpcPeer) -> None:
    clock = set_clock(peer, FakeClock())
    started: List[Session] = []

    def slow(session: Session) -> None:
        started.append(session)
        if len(started) == 2:
            started[0].close(timeout=0)
            await_output(session)
            clock.now += 5

    with WorkerPool(peer, worker("hello", "0"), 2, hello=Note, start_timeout=1, on_session=slow) as pool:
        promises = [pool.submit(Ping("pid"), expect=Pong) for _ in range(2)]
        peer.tick(0)
        assert pool.workers == (started[1],)
        assert {promise.wait().value for promise in promises} == {pid_of(started[1])}


def test_a_sign_that_waits_for_its_turn_counts(peer: IpcPeer) -> None:
    clock = set_clock(peer, FakeClock())
    started: List[Session] = []

    def slow(note: Note) -> None:
        clock.now += 2

    with contextlib.ExitStack() as stack:
        for _ in range(4):
            raw = stack.enter_context(RawPeer(peer))
            raw.session.on_message(slow)
            raw.write(framed(Note()))
        pool = WorkerPool(peer, worker("hello", "0"), 1, hello=Note, start_timeout=1, on_session=started.append)
        promise = pool.submit(Ping(1), expect=Pong)
        await_output(started[0])
        assert promise.wait().value == 1
        assert len(started) == 1
        pool.close()


class Ring(ValueError):
    """What a signal handler raises, and what our code expects of its own."""


class RingWhereHandlersLeave(InterruptAt):
    def is_place(self, frame: Any, event: str) -> bool:
        outer = frame
        while outer is not None and outer.f_code.co_name != "_await_sign_no_more":
            outer = outer.f_back
        return outer is not None and super().is_place(frame, event)


@pytest.mark.slow
def test_no_error_of_a_signal_handler_is_taken_for_one_of_ours(peer: IpcPeer) -> None:
    for number in itertools.count(1):
        with WorkerPool(peer, worker("hello", "0"), 1, hello=Note) as pool:
            promise = pool.submit(Ping(number), expect=Pong)
            await_output(pool.workers[0])
            raised = False
            signal = RingWhereHandlersLeave(number, Ring())
            try:
                with signal:
                    promise.wait()
            except Ring:
                raised = True
            assert raised == signal.hit, signal.where
            assert promise.wait().value == number
        if not signal.hit:
            break
    assert number > 10


def test_what_interrupts_the_start_of_a_worker_comes_out_and_starts_no_other(peer: IpcPeer) -> None:
    clock = set_clock(peer, FakeClock())
    started: List[Session] = []

    def ring(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def start(session: Session) -> None:
        started.append(session)
        if len(started) == 3:
            signal.raise_signal(signal.SIGUSR1)
        raise ValueError("no")

    old = signal.signal(signal.SIGUSR1, ring)
    try:
        pool = WorkerPool(peer, worker(), 2, on_session=start)
        for number in range(2):
            pool.submit(Ping(number))
        assert len(started) == 2
        clock.now += 1  # now both are due to be started again
        with pytest.raises(KeyboardInterrupt):
            peer.tick(0)
        assert len(started) == 3
        pool.close(timeout=0)
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_a_reply_that_was_there_as_another_task_of_the_worker_timed_out_counts(peer: IpcPeer) -> None:
    code = """
        session = IpcPeer().create_stdio_session()
        held = DeferredReply()
        session.on_request(lambda ping: Pong(ping.value) if ping.value else held)
        while session.is_open:
            session.tick(None)
    """
    with WorkerPool(peer, program(code), 1, in_flight=2, retries=0) as pool:
        assert pool.submit(Ping(1), expect=Pong).wait().value == 1
        clock = set_clock(peer, FakeClock())
        late, quick = pool.submit(Ping(0), timeout=5), pool.submit(Ping(2), expect=Pong)
        process = pool.workers[0].process
        assert process is not None and process.stdout is not None
        assert select.select([process.stdout], [], [], PATIENCE)[0]
        clock.now += 6
        with pytest.raises(RequestTimeoutError):
            late.wait()
        assert quick.wait().value == 2


def test_many_replies_that_were_there_as_another_task_of_the_worker_timed_out_count(peer: IpcPeer) -> None:
    count = 300
    code = f"""
        session = IpcPeer().create_stdio_session()
        held, seen = DeferredReply(), []
        session.on_request(lambda ping: seen.append(ping) or (Pong(ping.value) if ping.value else held))
        while len(seen) <= {count}:
            session.tick(None)
        os.write(2, b"all")
        while session.is_open:
            session.tick(None)
    """
    with WorkerPool(peer, program(code), 1, in_flight=count + 1, retries=0) as pool:
        late, *quick = [pool.submit(Ping(n), timeout=None if n else 5, expect=Pong) for n in range(count + 1)]
        process = pool.workers[0].process
        assert process is not None and process.stderr is not None
        assert select.select([process.stderr], [], [], PATIENCE)[0]
        deadline = deadline_of(late)
        assert deadline is not None
        set_clock(peer, FakeClock()).now = deadline + 1
        with pytest.raises(RequestTimeoutError):
            late.wait()
        assert [reply.value for reply in gather(quick)] == [*range(1, count + 1)]


@pytest.mark.slow
def test_start_timeout_without_hello(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker("silent"), 1, start_timeout=0.1) as pool:
        with pytest.raises(StreamClosedError, match="no sign within 0.1 s"):
            pool.submit(Ping()).wait(20)
    with WorkerPool(peer, worker(), 1, start_timeout=10) as pool:
        assert outcome(pool.submit(Ping(1))) == 1


@pytest.mark.slow
def test_hello_is_waited_for(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("exit grace", 0.1, monkeypatch)
    with WorkerPool(peer, [worker("hello", "0"), worker("hello", "600")], hello=Note) as pool:
        pids = {reply.value for reply in gather([pool.submit(Ping("pid"), expect=Pong) for _ in range(20)])}
        assert len(pids) == 1
        assert len(pool.workers) == 2


@pytest.mark.parametrize("hello", [LogMessage, Message])
def test_text_of_a_worker_is_no_hello(peer: IpcPeer, hello: Type[Message]) -> None:
    code = """
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        print("junk", flush=True)
        print("loading", file=sys.stderr, flush=True)
        signal.sigwait([signal.SIGUSR1])
        session = IpcPeer().create_stdio_session()
        session.on_request(lambda ping: Pong(ping.value))
        session.notify(LogMessage("ready", "stderr"))
        while session.is_open:
            session.tick(None)
    """
    heard: List[Any] = []

    def hear(session: Session) -> None:
        session.on_message(heard.append)

    with WorkerPool(peer, program(code), 1, hello=hello, on_session=hear) as pool:
        promise = pool.submit(Ping(1))
        tick_until(lambda: sorted(message.level for message in heard) == ["junk", "stderr"], peer)
        assert no_pending(*pool.workers), "it was given a task"
        os.kill(pid_of(pool.workers[0]), signal.SIGUSR1)
        assert promise.wait(PATIENCE) == Pong(1)


@pytest.mark.slow
def test_tasks_per_worker(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 2, tasks_per_worker=3) as pool:
        pids = [reply.value for reply in gather([pool.submit(Ping("pid"), expect=Pong) for _ in range(30)])]
    assert max(pids.count(pid) for pid in pids) == 3 and len(set(pids)) >= 10
    tick_until(lambda: not any(map(is_alive, pids)), peer)


# -- the end


def test_leaving_waits_for_what_is_queued(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 2) as pool:
        promises = [pool.submit(Ping(("sleep", 0.02)), expect=Pong) for _ in range(10)]
        pids = [pid_of(session) for session in pool.workers]
    assert [promise.done for promise in promises] == [True] * 10 and promises[9].wait().value
    assert not any(map(is_alive, pids)), "a worker is left"
    assert peer.sessions == () and "closed" in repr(pool)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(Ping())


def test_leaving_does_not_wait_for_what_is_queued_meanwhile(peer: IpcPeer) -> None:
    later: List[Any] = []

    def submit(promise: Any) -> None:
        if len(later) < 1000:  # it would go on for ever
            later.append(pool.submit(Ping(len(later))))
            later[-1].add_done_callback(submit)

    with WorkerPool(peer, worker(), 1, in_flight=2) as pool:
        first = [pool.submit(Ping(index), expect=Pong) for index in range(5)]
        for promise in first:
            promise.add_done_callback(submit)
    assert [promise.wait(0).value for promise in first] == list(range(5))
    assert len(later) < 100 and StreamClosedError in [outcome(promise) for promise in later]


def test_leaving_costs_each_task_the_same_however_many_there_are(peer: IpcPeer) -> None:
    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    counts = []
    for tasks in (100, 400):
        calls = 0
        with WorkerPool(peer, worker(), 1) as pool:
            pool.submit(Ping(0)).wait()
            for index in range(tasks):
                pool.submit(Ping(index))
            sys.setprofile(count)
        sys.setprofile(None)
        counts.append(calls)
    assert counts[1] < 6 * counts[0]


@pytest.mark.slow
def test_leaving_with_an_exception_does_not_wait(peer: IpcPeer) -> None:
    begin = time.monotonic()
    with pytest.raises(LookupError):
        with WorkerPool(peer, worker(), 1) as pool:
            promises = [pool.submit(Ping(("sleep", 1))) for _ in range(20)]
            peer.tick(0.3)
            raise LookupError
    assert time.monotonic() - begin < 8
    assert [outcome(promise) for promise in promises] == [StreamClosedError] * 20


@pytest.mark.parametrize("timeout", [0, 0.2])
@pytest.mark.slow
def test_close_with_a_timeout_kills(peer: IpcPeer, timeout: float) -> None:
    pool = WorkerPool(peer, worker(), 2)
    promises = [pool.submit(Ping("spin")) for _ in range(4)]
    peer.tick_for(0.5)
    pids = [pid_of(session) for session in pool.workers]
    begin = time.monotonic()
    pool.close(timeout)
    assert time.monotonic() - begin < 1.5 + timeout
    assert not any(map(is_alive, pids))
    assert [outcome(promise) for promise in promises] == [StreamClosedError] * 4
    pool.close()


@pytest.mark.slow
def test_leaving_at_every_moment() -> None:
    with IpcPeer() as peer:
        for turns in range(0, 60, 3):
            pool = WorkerPool(peer, worker(), 2)
            promises = [pool.submit(Ping(index)) for index in range(10)]
            for _ in range(turns):
                peer.tick(0.005)
            pool.close(0)
            assert {outcome(promise) for promise in promises} <= {StreamClosedError, *range(10)}
            assert peer.sessions == ()


def test_closing_the_peer_fails_everything() -> None:
    with IpcPeer() as peer:
        pool = WorkerPool(peer, worker("dies"), 1, hello=Note, retries=99)
        promises = [pool.submit(Ping(index)) for index in range(3)]
        peer.tick(0.05)
    assert [outcome(promise) for promise in promises] == [StreamClosedError] * 3
    with pytest.raises(RuntimeError):
        pool.submit(Ping())
    pool.close()


def test_close_ends_workers_that_were_replaced_too(peer: IpcPeer) -> None:
    processes: List[Any] = []
    pool = WorkerPool(
        peer, worker("stays"), 1, tasks_per_worker=1, on_session=lambda session: processes.append(session.process)
    )
    for number in range(3):
        assert pool.submit(Ping(number), expect=Pong).wait().value == number
    pool.close(timeout=0)
    assert len(processes) == 3 and [process.returncode for process in processes] == [-signal.SIGKILL] * 3


def test_close_in_a_done_callback_and_in_a_handler(peer: IpcPeer) -> None:
    pool = WorkerPool(peer, worker(), 1)
    promises = [pool.submit(Ping(index)) for index in range(5)]
    promises[1].add_done_callback(lambda promise: pool.close(0))
    assert [outcome(promise) for promise in promises] == [0, 1] + [StreamClosedError] * 3


@pytest.mark.parametrize("asked", ["wait", "gather", "as_completed", "tick"])
def test_done_callbacks_may_wait_for_other_tasks_while_the_pool_is_closed(peer: IpcPeer, asked: str) -> None:
    pool = WorkerPool(peer, script("sys.stdin.read()"), 1, timeout=None)
    promises = [pool.submit(Ping(index)) for index in range(4)]
    tick_until(lambda: pool.workers, peer)
    peer.tick(0)
    found: List[Any] = []

    def look(promise: Any) -> None:
        if asked == "wait":
            found.append([outcome(other) for other in promises])
        elif asked == "gather":
            found.append([type(result) for result in gather(promises, return_exceptions=True)])
        elif asked == "as_completed":
            found.append([outcome(other) for other in as_completed(promises)])
        else:
            try:
                peer.tick(None)
            except StreamClosedError:  # nothing is open any more
                pass
            found.append([outcome(other) for other in promises])

    for promise in promises:
        promise.add_done_callback(look)
    pool.close(timeout=1)
    assert found == [[StreamClosedError] * 4] * 4
    assert not pool.workers


def test_a_pool_whose_closing_is_interrupted_in_a_done_callback_is_closed_by_its_peer(peer: IpcPeer) -> None:
    pool = WorkerPool(peer, script("sys.stdin.read()"), 2)
    promises = [pool.submit(Ping(index)) for index in range(4)]
    tick_until(lambda: len(pool.workers) == 2, peer)
    pids = [pid_of(session) for session in pool.workers]

    def ring(promise: Any) -> None:
        raise Interruption

    promises[0].add_done_callback(ring)
    with pytest.raises(Interruption):
        pool.close(timeout=1)
    assert [outcome(promise) for promise in promises] == [StreamClosedError] * 4
    peer.close(timeout=1)
    assert not any(map(is_alive, pids))


def test_done_callbacks_that_use_the_pool_at_random() -> None:
    for seed in seeds(int(span(24))):
        chance = random.Random(seed)
        with IpcPeer(timeout=PATIENCE) as peer:
            numbers = chance.randint(1, 3), chance.randint(0, 1), chance.randint(1, 3), chance.choice([None, 3])
            options: Any = dict(zip(("size", "retries", "in_flight", "tasks_per_worker"), numbers))
            busy = Busy(chance, peer, WorkerPool(peer, worker(), **options))
            for _ in range(6):
                busy.act()
            gather(busy.promises, return_exceptions=True)
            busy.pool.close(timeout=0)
            peer.tick_for(0)
            assert busy.unexpected == []
            assert [busy.called[promise] for promise in busy.promises] == [1] * len(busy.promises)
            assert not busy.pool.pending and not busy.pool.workers


class Busy:
    """A pool that is used at random, also by the done callbacks of its tasks."""

    def __init__(self, chance: random.Random, peer: IpcPeer, pool: WorkerPool) -> None:
        self.chance = chance
        self.peer = peer
        self.pool = pool
        self.promises: List[ResponsePromise[Message]] = []
        self.called: collections.Counter[Any] = collections.Counter()
        self.unexpected: List[str] = []
        self.depth = 0

    def done(self, promise: "ResponsePromise[Message]") -> None:
        self.called[promise] += 1
        if not promise.settled:
            self.unexpected.append("a done callback is called before its promise has settled")
        for _ in range(self.chance.randint(0, 2)):
            self.act()

    def act(self) -> None:
        acts = ("submit", "submit", "submit", "wait", "cancel", "tick", "worker", "gather", "completed", "map")
        what = self.chance.choice((*acts, "close") if self.chance.random() < 0.2 else acts)
        some = self.chance.sample(self.promises, min(3, len(self.promises)))
        if self.depth > 6 or not (some or what == "submit"):
            return
        self.depth += 1
        try:
            self.do(what, some)
        except (IpcError, RuntimeError):
            pass
        except Exception:
            self.unexpected.append(traceback.format_exc())
        finally:
            self.depth -= 1

    def do(self, what: str, some: "List[ResponsePromise[Message]]") -> None:
        if what == "submit" and len(self.promises) < 14:
            self.promises.append(self.pool.submit(Ping(self.chance.choice([1, 2, 3, "error", ("exit", 3)]))))
            self.promises[-1].add_done_callback(self.done)
        elif what == "wait":
            some[0].wait()
        elif what == "cancel":
            some[0].cancel()
        elif what == "tick":
            self.peer.tick(0.01)
        elif what == "worker" and self.pool.workers:
            self.chance.choice(self.pool.workers).close(timeout=0)
        elif what == "gather":
            gather(some, return_exceptions=True)
        elif what == "completed":
            next(as_completed(some))
        elif what == "map":
            next(self.pool.map([Ping(1), Ping(2)]))
        elif what == "close":
            self.pool.close(timeout=0)


@pytest.mark.slow
def test_tick_none_with_an_idle_pool_and_with_one_that_backs_off(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker("dies"), 1, hello=Note) as pool:
        with pytest.raises(StreamClosedError, match="wait for ever: .* its worker pool has no task; submit one"):
            peer.tick(None)
        promise = pool.submit(Ping())
        while not is_settled(promise):
            peer.tick(None)
        assert outcome(promise) is StreamClosedError


def test_nothing_is_left_of_a_pool() -> None:
    with IpcPeer() as peer:
        with WorkerPool(peer, worker(), 2) as pool:
            gather([pool.submit(Ping(index)) for index in range(20)])
        gone = weakref.ref(pool)
        del pool
        gc.collect()
        assert gone() is None
        assert peer.next_deadline() is None


@pytest.mark.slow
def test_inside_another_loop(peer: IpcPeer) -> None:
    import select

    with WorkerPool(peer, worker(), 2) as pool:
        fd = peer.fileno()
        promises = [pool.submit(Ping(index)) for index in range(20)]
        promises.append(pool.submit(Ping("spin"), timeout=0.2))
        end = time.monotonic() + 10
        while not all(is_settled(promise) for promise in promises):
            assert time.monotonic() < end
            select.select([fd], [], [], peer.next_deadline())
            peer.tick(0)


# -- interruptions


@pytest.mark.matrix
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interruption_in_a_done_callback(pool: WorkerPool, kind: Type[BaseException]) -> None:
    promises = [pool.submit(Ping(index), expect=Pong) for index in range(10)]

    def interrupt(promise: Any) -> None:
        raise kind

    promises[3].add_done_callback(interrupt)
    with pytest.raises(kind):
        gather(promises)
    assert [reply.value for reply in gather(promises)] == list(range(10))


@pytest.mark.slow
@BOTH
def test_interrupted_pool_loses_no_task(kind: Type[BaseException]) -> None:
    with IpcPeer(timeout=20) as peer, WorkerPool(peer, worker(), 2, retries=5) as pool:
        gather([pool.submit(Ping(("sleep", 0.05))) for _ in range(2)])

        def scenario(run: Run) -> None:
            promises: List[ResponsePromise[Pong]] = []
            while len(promises) < 3:
                run.once(lambda: promises.append(pool.submit(Ping(len(promises)), expect=Pong)))
            done = False
            while not done:
                done, _ = run.once(lambda: gather(promises, 10))
            assert [promise.wait().value for promise in promises] == [0, 1, 2]
            tick_until(lambda: pool.pending == 0, peer)

        at_every_place(scenario, kind)
        tick_until(lambda: pool.pending == 0, peer)


@pytest.mark.slow
@BOTH
def test_interrupted_map_loses_no_reply(kind: Type[BaseException]) -> None:
    with IpcPeer(timeout=20) as peer, WorkerPool(peer, worker(), 2, retries=5) as pool:
        gather([pool.submit(Ping(("sleep", 0.05))) for _ in range(2)])

        def scenario(run: Run) -> None:
            got: List[Any] = []
            replies = pool.map([Ping(index) for index in range(4)], expect=Pong)
            while len(got) < 4:
                run.once(lambda: got.append(next(replies).value))
            assert got == [0, 1, 2, 3]

        at_every_place(scenario, kind)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["turn", "close"])
def test_signal_handler_that_turns_or_closes_while_a_worker_is_started(act: str) -> None:
    for number in itertools.count(1, 3 * places_apart()):
        started: List[Session] = []
        with IpcPeer(timeout=20) as peer:
            pool = WorkerPool(peer, worker(), 1, on_session=started.append)
            act_now = partial(peer.tick, 0) if act == "turn" else partial(pool.close, 0)
            with CallAt(number, lambda *_, act_now=act_now: act_now()) as signal:  # type: ignore[misc]
                with contextlib.suppress(StreamClosedError, RuntimeError):
                    pool.submit(Ping(1))
                peer.tick(0)
            assert len(set(map(id, started))) == len(started), signal.where
            assert len(pool.workers) == (1 if act == "turn" or not signal.hit else 0), signal.where
            assert peer.sessions == pool.workers, signal.where
        if not signal.hit:
            break
    assert number > 20


def test_signal_handler_that_takes_from_the_map_at_every_place(pool: WorkerPool) -> None:
    gather([pool.submit(Ping(("sleep", 0.05))) for _ in range(2)])

    def take(*_: Any) -> None:
        try:
            got.append(next(replies).value)
        except RemoteError:
            got.append("error")
        except StopIteration:
            pass

    for number in itertools.count(1, places_apart()):
        got: List[Any] = []
        replies = pool.map([Ping("error"), Ping(1), Ping("error"), Ping(2)], expect=Pong, ordered=False)
        with CallAt(number, take) as signal:
            take()
        while len(got) < 4:
            take()
        assert sorted(map(str, got)) == ["1", "2", "error", "error"], signal.where
        if not signal.hit:
            break
    assert number > 20


def test_tasks_are_spread_though_a_worker_may_have_several(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 3, in_flight=4) as pool:
        for _ in range(3):  # while they are started, and when they are there
            pids = gather([pool.submit(Ping("pid"), expect=Pong) for _ in range(3)])
            assert len({pong.value for pong in pids}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("act", ["submit", "cancel", "submit and cancel"])
@pytest.mark.parametrize("kind", [None, Interruption, InterruptionError])
def test_signal_handler_that_uses_the_pool_at_every_place(
    tmp_path: Path, kind: Optional[Type[BaseException]], in_flight: int, act: str
) -> None:
    promises: List[ResponsePromise[Pong]] = []
    cancelled: List[ResponsePromise[Pong]] = []
    count = 0

    def submit(*values: int) -> None:
        for value in values:
            promises.append(pool.submit(Ping(value), expect=Pong))

    def use(*args: Any) -> None:
        if act != "cancel":
            submit(3, 4, 5)
        if act != "submit":
            cancelled.extend([promise for promise in promises[::2] if promise.cancel()])

    class Interrupt(InterruptAt):
        def _ring(self, *args: Any) -> None:
            use()
            raise self.error

    def once(call: Callable[[], Any]) -> None:
        with contextlib.suppress(Interruption, InterruptionError), signal:
            call()

    with IpcPeer(timeout=20) as peer, WorkerPool(peer, worker(), 2, in_flight=in_flight) as pool:
        gather([pool.submit(Ping(("sleep", 0.05))) for _ in range(2)])
        for number in itertools.count(1, places_apart()):
            count += len(cancelled)
            promises.clear()
            cancelled.clear()
            signal = CallAt(number, use) if kind is None else Interrupt(number, kind())
            for value in range(3):
                once(partial(submit, value))
            end = time.monotonic() + 5
            while pool.pending:
                assert time.monotonic() < end, signal.where
                once(lambda: peer.tick(0.01))
            for promise in cancelled:
                with pytest.raises(IpcError, match="cancelled"):
                    promise.wait(5)
            got = [promise.wait(5).value for promise in promises if promise not in cancelled]
            assert len({*got}) == len(got) == len(promises) - len(cancelled), signal.where
            if not signal.hit:
                break
            # Both workers come back from whatever was cancelled: none of these is done before both have begun one.
            folder = tmp_path / str(number)
            folder.mkdir()
            meetings = [pool.submit(Ping(("meet", str(folder))), timeout=5) for _ in range(in_flight * 2)]
            assert [outcome(meeting)[0] for meeting in meetings] == ["meet"] * len(meetings), signal.where
            assert len(pool.workers) == 2, signal.where
    assert number > 10 and (count > 0) == (act != "submit"), "nothing was interrupted"


@BOTH
def test_a_task_is_given_once_though_what_encodes_it_sends_something_and_is_interrupted(
    tmp_path: Path, kind: Type[BaseException]
) -> None:
    def ring(number: int, frame: Any) -> None:
        raise kind

    def act() -> None:
        pool.workers[0].notify(Note("settings"))
        signal.raise_signal(signal.SIGUSR1)

    path = tmp_path / "done"
    serializer = ActingSerializer(RequestEnvelope)
    old = signal.signal(signal.SIGUSR1, ring)
    try:
        with IpcPeer(serializer, timeout=5) as peer, WorkerPool(peer, worker(), 1, retries=0) as pool:
            pid = outcome(pool.submit(Ping("pid")))
            serializer.act = act
            with pytest.raises(kind):
                pool.submit(Ping(("count", str(path), 7)))
            assert outcome(pool.submit(Ping("pid"))) == pid
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert path.read_text() == "7\n"


def test_a_task_is_given_once_though_what_encodes_it_closes_the_session_of_its_worker(tmp_path: Path) -> None:
    code = """
        session = IpcPeer().create_stdio_session()
        @session.on_request
        def work(ping: Ping) -> Pong:
            if ping.value:
                with open(ping.value, "a") as file:
                    file.write("done\\n")
                while not os.path.exists(ping.value + " may end"):
                    time.sleep(0.001)
            return Pong(ping.value)
        while session.is_open:
            session.tick(None)
    """

    def act() -> None:
        (session,) = [session for session in pool.workers if not no_pending(session)]
        session.close(timeout=0)
        peer.tick(0)  # another worker gets the task

    path = tmp_path / "path"
    serializer = ActingSerializer(RequestEnvelope)
    with IpcPeer(serializer, timeout=PATIENCE) as peer, WorkerPool(peer, program(code), 3) as pool:
        gather([pool.submit(Ping()) for _ in range(3)])
        serializer.act = act
        promise = pool.submit(Ping(str(path)))
        (idle,) = [session for session in pool.workers if no_pending(session)]
        tick_until(path.exists, peer)
        idle.close(timeout=0)  # so that all workers are looked at
        peer.tick(0)
        (tmp_path / "path may end").touch()
        promise.wait()
    assert path.read_text() == "done\n"


@pytest.mark.slow
@BOTH
def test_interruption_while_a_worker_dies_loses_no_task(tmp_path: Path, kind: Type[BaseException]) -> None:
    flags = itertools.count()
    with IpcPeer(timeout=20) as peer, WorkerPool(peer, worker(), 2, in_flight=2, retries=5) as pool:
        gather([pool.submit(Ping(("sleep", 0.05))) for _ in range(2)])

        def scenario(run: Run) -> None:
            promises = [pool.submit(Ping(("once", str(tmp_path / str(next(flags))))))]
            promises += [pool.submit(Ping(index)) for index in range(3)]
            run.until(lambda: pool.pending == 0, lambda: peer.tick(0.01))
            assert [outcome(promise) for promise in promises][1:] == [0, 1, 2]
            assert outcome(promises[0])[0] == "once"

        at_every_place(scenario, kind, step=5)


def test_closed_pool_keeps_none_of_its_tasks(peer: IpcPeer) -> None:
    pool = WorkerPool(peer, worker(), 1)

    def submit() -> "weakref.ref[Ping]":
        message = Ping(1)
        pool.submit(message)
        return weakref.ref(message)

    messages = [submit() for _ in range(50)]
    pool.close()
    gc.collect()
    assert pool.pending == 0 and [message for message in messages if message() is not None] == []


def test_what_a_worker_says_before_its_hello_is_not_kept(peer: IpcPeer) -> None:
    code = """
from stream_ipc import IpcPeer
from tests.messages import Note, Ping, Pong
session = IpcPeer().create_stdio_session()
session.on_request(lambda ping: Pong(ping.value))
for _ in range(50):
    session.notify(Pong("not yet"))
session.notify(Note("hello"))
while session.is_open:
    session.tick(None)
"""
    said: List[Any] = []

    def hear(session: Session) -> None:
        session.on_message(lambda message: said.append(weakref.ref(message)))

    with WorkerPool(peer, program(code), 1, hello=Note, on_session=hear) as pool:
        assert outcome(pool.submit(Ping(1))) == 1
        gc.collect()
        assert len(said) == 51 and [message for message in said if message() is not None] == []


SPEAKER = """
from stream_ipc import IpcPeer
from tests.messages import Note, Ping, Pong
session = IpcPeer().create_stdio_session()
@session.on_request
def work(ping):
    if ping.value:
        session.notify(Note(ping.value))
    return Pong(ping.value)
with session.batch():
    for text in sys.argv[1:]:
        session.notify(Note(text))
while session.is_open:
    session.tick(None)
"""


@pytest.mark.parametrize("options", [{"hello": Note}, {"start_timeout": 60}])
def test_what_a_worker_says_behind_its_first_sign_is_kept(peer: IpcPeer, options: Any) -> None:
    with WorkerPool(peer, [*program("import sys" + SPEAKER), "sign", "1", "2"], 1, **options) as pool:
        assert outcome(pool.submit(Ping(None))) is None
        (session,) = pool.workers
        assert [session.receive(PATIENCE) for _ in range(2)] == [Note("1"), Note("2")]


def test_what_a_worker_says_behind_its_first_reply_is_kept(peer: IpcPeer) -> None:
    with WorkerPool(peer, program("import sys" + SPEAKER), 1, start_timeout=60) as pool:
        assert outcome(pool.submit(Ping(None))) is None and outcome(pool.submit(Ping("there"))) == "there"
        assert pool.workers[0].receive(PATIENCE) == Note("there")


def test_a_done_callback_may_wait_for_what_the_next_worker_does(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chores, "CHECK_INTERVAL", 3600.0)  # nothing else is to wake it
    with WorkerPool(peer, worker(), 1, retries=0) as pool:
        promises = [pool.submit(Ping("die")), pool.submit(Ping(1))]
        outcomes: List[Any] = []
        promises[0].add_done_callback(lambda promise: outcomes.append(outcome(promises[1])))
        assert outcome(promises[0]) is StreamClosedError
        assert outcomes == [1]


def test_a_step_of_many_teardowns_looks_at_each_once() -> None:
    class Lasting(Teardown):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Lasting.compared += 1
            return self is other

        __hash__ = object.__hash__

        def step(self) -> Optional[float]:
            return 1.0

    teardowns = Teardowns(Lasting() for _ in range(200))
    teardowns.step()
    assert len(teardowns.all) == 200 and Lasting.compared < 200
    teardowns.abandon()
    assert not teardowns.all


def test_what_a_worker_had_is_put_back_without_a_copy_of_the_queue(peer: IpcPeer) -> None:
    with WorkerPool(peer, script("time.sleep(600)"), 1, in_flight=20, timeout=None) as pool:
        set_clock(peer, FakeClock())  # so that none is started again
        promises = [pool.submit(Ping(number)) for number in range(20_000)]
        os.kill(pid_of(pool.workers[0]), signal.SIGKILL)
        tracemalloc.start()
        try:
            tick_until(lambda: not pool.workers, peer)
            assert tracemalloc.get_traced_memory()[1] < 100_000  # a copy takes 160,000
        finally:
            tracemalloc.stop()
        assert promises_queued(pool) == promises
        pool.close()


def await_output(session: Session) -> None:
    """Wait until a worker has written something, which is not read yet."""
    assert session.process is not None and session.process.stdout is not None
    assert select.select([session.process.stdout.fileno()], [], [], PATIENCE)[0]


@pytest.mark.slow
@pytest.mark.parametrize("then", ["close", "close the peer", "tick", "next"])
def test_what_waits_for_a_task_is_told_though_taking_its_reply_was_interrupted(then: str) -> None:
    def scenario(run: Run) -> None:
        called: List[Any] = []
        with IpcPeer(timeout=20) as peer:
            pool = WorkerPool(peer, worker(), 1, tasks_per_worker=1 if then == "tick" else None)
            replies: Any = pool.map([Ping(1)], ordered=False)
            if then == "next":
                replies._submit()
            else:
                pool.submit(Ping(1)).add_done_callback(called.append)
            await_output(pool.workers[0])
            run.once(lambda: peer.tick(0))
            if then == "close the peer":
                peer.close()
            elif then != "tick":
                pool.close()
            if then == "next":
                with contextlib.suppress(StreamClosedError):
                    called.append(next(replies))
                return
            tick_until(lambda: len(called) == 1, peer)

    at_every_place(scenario, Interruption, step=3)


@pytest.mark.slow
@BOTH
def test_interrupted_refusal_of_a_task_leaves_its_worker_free(peer: IpcPeer, kind: Type[BaseException]) -> None:
    with WorkerPool(peer, worker(), 1) as pool:
        gather([pool.submit(Ping())])

        def scenario(run: Run) -> None:
            promises: List[Any] = []
            run.once(lambda: promises.append(pool.submit(Ping(lambda: None))))
            assert outcome(pool.submit(Ping(2))) == 2
            assert pool.pending == 0 and all([outcome(promise) is SerializationError for promise in promises])

        at_every_place(scenario, kind)


@pytest.mark.slow
@BOTH
def test_hello_is_heard_though_an_interruption_comes(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer, WorkerPool(peer, worker("hello", "0"), 1, hello=Note) as pool:
            promise = pool.submit(Ping(1))
            await_output(pool.workers[0])
            run.once(lambda: peer.tick(0))
            assert outcome(promise) == 1
            assert len(pool.workers) == 1

    at_every_place(scenario, kind, step=3)


@pytest.mark.matrix
@BOTH
def test_interrupted_submit_does_no_task_twice(peer: IpcPeer, tmp_path: Path, kind: Type[BaseException]) -> None:
    path, numbers = tmp_path / "done", itertools.count()
    with WorkerPool(peer, worker(), 1, retries=5) as pool:
        pid = outcome(pool.submit(Ping("pid")))

        def scenario(run: Run) -> None:
            run.once(lambda: pool.submit(Ping(("count", str(path), next(numbers)))))
            assert outcome(pool.submit(Ping("pid"))) == pid, "the worker was killed"

        at_every_place(scenario, kind)
        done = path.read_text().split()
    assert len(done) == len(set(done)) > 5


@BOTH
def test_interrupted_submit_leaves_a_pool_that_works(kind: Type[BaseException]) -> None:
    for number in itertools.count(1, 2 * places_apart() ** 2):  # each costs a process
        with IpcPeer(timeout=20) as peer, WorkerPool(peer, worker(), 1, retries=5) as pool:
            with contextlib.suppress(kind), InterruptAt(number, kind()) as signal:
                pool.submit(Ping(1))
            assert pool.submit(Ping(2), expect=Pong).wait(10) == Pong(2), signal.where
        if not signal.hit:
            break
    assert number > 20


def test_what_an_interrupted_close_has_left_is_done_by_a_second_one(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    heard: List[Any] = []
    pool = WorkerPool(peer, script(code), 2, on_session=lambda session: session.on_message(heard.append))
    promises = [pool.submit(Ping()) for _ in range(2)]
    processes: List[Any] = [session.process for session in pool.workers]
    tick_until(lambda: len(heard) == 2, peer)
    once(monkeypatch, Teardowns, "wait")
    with pytest.raises(KeyboardInterrupt):
        pool.close()
    assert [process.poll() for process in processes] == [None, None]
    pool.close(timeout=0)
    assert [process.returncode for process in processes] == [-9, -9]
    assert [outcome(promise) for promise in promises] == [StreamClosedError] * 2


@BOTH
@pytest.mark.parametrize("what", ["pool", "peer"])
def test_interrupted_close_settles_all_tasks_and_calls_their_callbacks_once(
    kind: Type[BaseException], what: str
) -> None:
    for number in itertools.count(1, places_apart() ** 2):  # each costs a process
        called: List[Any] = []
        with IpcPeer(timeout=20) as peer:
            pool = WorkerPool(peer, ["cat"], 1)
            promises = [pool.submit(Ping(index)) for index in range(3)]
            for promise in promises:
                promise.add_done_callback(called.append)
            processes: List[Any] = [session.process for session in pool.workers]
            close = partial(pool.close if what == "pool" else peer.close, timeout=0)
            with contextlib.suppress(kind), InterruptAt(number, kind()) as signal:
                close()
            close()
            assert [process.returncode for process in processes] != [None], signal.where
            with contextlib.suppress(StreamClosedError):
                peer.tick(0)
            assert [outcome(promise) for promise in promises] == [StreamClosedError] * 3, signal.where
            assert sorted(map(id, called)) == sorted(map(id, promises)), signal.where
        if not signal.hit:
            break
    assert number > 20


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Have the next call of a function interrupted where it begins."""
    real = getattr(owner, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("where", [(Tasks, "settle"), (Pending, "settle"), (Task, "go_on"), (Pending, "tell")])
def test_interrupted_cancel_of_a_running_task(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, where: Any) -> None:
    called: List[Any] = []
    with WorkerPool(peer, worker(), 1) as pool:
        promise = pool.submit(Ping(("sleep", 0.02)))
        promise.add_done_callback(called.append)
        peer.tick(0)
        once(monkeypatch, *where)
        with pytest.raises(KeyboardInterrupt):
            promise.cancel()
        if where[1] == "settle":  # nothing had begun
            assert outcome(promise)[0] == "sleep"
        else:
            with pytest.raises(IpcError, match="cancelled"):
                promise.wait(5)
            peer.tick(0)  # which goes on with it
        assert called == [promise] and pool.pending == 0
        assert outcome(pool.submit(Ping(1))) == 1
        assert len(pool.workers) == 1


def test_interrupted_start_leaves_no_session_that_is_nobodys(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerPool(peer, worker(), 1) as pool:
        once(monkeypatch, supervisor, "conversation_of")
        with pytest.raises(KeyboardInterrupt):
            pool.submit(Ping(1))
        promise = pool.submit(Ping(2))
        assert outcome(promise) == 2 and pool.workers == peer.sessions
    assert peer.sessions == ()


def test_closing_ends_the_worker_of_an_interrupted_start(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = WorkerPool(peer, worker(), 1)
    once(monkeypatch, supervisor, "conversation_of")
    with pytest.raises(KeyboardInterrupt):
        pool.submit(Ping(1))
    pool.close()
    assert peer.sessions == ()


def test_interrupted_look_at_workers_is_made_again_by_the_next_turn(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WorkerPool(peer, worker(), 1, tasks_per_worker=1) as pool:
        promise = pool.submit(Ping())
        once(monkeypatch, Worker, "close")
        with pytest.raises(KeyboardInterrupt):
            promise.wait()
        assert len(pool.workers) == 1
        peer.tick(0)
        assert pool.workers == ()


@pytest.mark.matrix
@pytest.mark.parametrize("ordered", [True, False])
def test_interrupted_map_gives_no_task_twice(
    peer: IpcPeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    path = tmp_path / "done"
    with WorkerPool(peer, worker(), 1) as pool:
        pool.submit(Ping(0)).wait()
        replies = pool.map([Ping(("count", str(path), 7))], ordered=ordered)
        real = scheduler.Scheduler.give

        def give(self: Any, *args: Any, **kwargs: Any) -> None:
            monkeypatch.setattr(scheduler.Scheduler, "give", real)
            real(self, *args, **kwargs)
            raise KeyboardInterrupt  # where it returns

        monkeypatch.setattr(scheduler.Scheduler, "give", give)
        with pytest.raises(KeyboardInterrupt):
            next(replies)
        assert len(list(replies)) == 1
    assert path.read_text() == "7\n"


# -- what a reviewer found


@pytest.mark.slow
def test_what_is_no_oserror_in_a_start_does_not_break_the_peer(peer: IpcPeer, tmp_path: Path) -> None:
    flag = str(tmp_path / "flag")

    def preexec() -> None:
        if os.path.exists(flag):
            raise ValueError

    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    with WorkerPool(peer, worker(), 1, tasks_per_worker=1, preexec_fn=preexec) as pool:
        promises = [pool.submit(Ping(index)) for index in range(2)]
        open(flag, "w").close()
        assert outcome(promises[0]) == 0
        assert a.request(Ping(5), expect=Pong).wait(5).value == 5
        tick_until(lambda: pool.workers == (), peer)
        peer.tick_for(0.1)
        os.remove(flag)
        assert outcome(promises[1]) == 1


def test_worker_with_an_invalid_stream_does_not_fail_the_queue(pool: WorkerPool) -> None:
    gather([pool.submit(Ping(("sleep", 0.05))) for _ in range(2)])
    process: Any = pool.workers[0].process
    process.stdin.close()
    assert [outcome(pool.submit(Ping(index))) for index in range(10)] == list(range(10))


@pytest.mark.slow
def test_workers_are_ended_side_by_side(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_limit("exit grace", 0.1, monkeypatch)
    set_limit("terminate grace", PATIENCE, monkeypatch)
    code = """
import os, signal, sys, time
from tests.pool_child import main
def clean_up(*args):
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
    while len(os.listdir(sys.argv[1])) < 4:  # each waits for the others: one after the other, they would be killed
        time.sleep(0.01)
    os._exit(0)
signal.signal(signal.SIGTERM, clean_up)
main("hello", "0")
time.sleep(60)
"""
    pool = WorkerPool(peer, [sys.executable, "-c", code, str(tmp_path)], 4, hello=Note)
    gather([pool.submit(Ping(("sleep", 0.2))) for _ in range(4)])
    processes: List[Any] = [session.process for session in pool.workers]
    pool.close()
    assert [process.returncode for process in processes] == [0] * 4


@pytest.mark.slow
def test_giving_tasks_does_not_wait_for_a_worker_that_does_not_read(peer: IpcPeer) -> None:
    def set_up(session: Session) -> None:
        session.notify(Note("x" * 900_000))
        session.notify(Note("x" * 900_000))

    with WorkerPool(peer, worker("hello", "0.8"), 1, on_session=set_up) as pool:
        begin = time.monotonic()
        promises = [pool.submit(Ping(1)) for _ in range(2)]
        assert time.monotonic() - begin < 0.5
        assert [outcome(promise) for promise in promises] == [1, 1]
        assert time.monotonic() - begin < 5


@pytest.mark.slow
def test_replies_do_not_free_a_worker_that_has_much_to_read(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 1, in_flight=3) as pool:
        pool.submit(Ping(1)).wait()
        promises = [pool.submit(Ping(("sleep", seconds))) for seconds in (0.1, 0.8)]
        promises.append(pool.submit(Ping("x" * 3_000_000)))
        promises.append(pool.submit(Ping(4)))
        begin = time.monotonic()
        tick_until(lambda: is_settled(promises[0]), peer)
        peer.tick(0)
        assert time.monotonic() - begin < 0.6
        assert outcome(promises[3]) == 4


def test_start_timeout_inside_another_loop(peer: IpcPeer) -> None:
    import select

    with WorkerPool(peer, worker("silent"), 2, hello=Note, start_timeout=0.1) as pool:
        pool.submit(Ping())
        pid = pid_of(pool.workers[0])
        end = time.monotonic() + 5
        while any(pid_of(session) == pid for session in pool.workers):
            seconds = peer.next_deadline()
            assert seconds is not None and time.monotonic() < end
            select.select([peer.fileno()], [], [], seconds)
            peer.tick(0)
        pool.close(0)


def test_a_forked_child_leaves_quietly() -> None:
    code = """
import os, sys
from stream_ipc import IpcPeer, WorkerPool
from tests.messages import Ping
with IpcPeer() as peer, WorkerPool(peer, [sys.executable, "-m", "tests.pool_child"], 1) as pool:
    pool.submit(Ping(1)).wait()
    pid = os.fork()
    if pid == 0:
        sys.exit(7)
    print(os.WEXITSTATUS(os.waitpid(pid, 0)[1]), pool.submit(Ping(3)).wait().value)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=50)
    assert done.stdout == b"7 3\n" and done.stderr == b""


@pytest.mark.slow
def test_flush_starts_no_workers(peer: IpcPeer) -> None:
    ours, theirs = socket.socketpair()
    session = peer.create_socket_session(ours)
    started: List[Session] = []
    with theirs, WorkerPool(peer, worker("dies"), 1, hello=Note, retries=9, on_session=started.append) as pool:
        pool.submit(Ping())
        tick_until(lambda: pool.workers == (), peer)
        session.notify(Note("x" * 900_000))
        before = len(started)
        with pytest.raises(TimeoutError):
            session.flush(0.5)
        assert len(started) == before
        tick_until(lambda: len(started) > before, peer)
        pool.close(0)
        session.close(0)


def nested_too_deeply(peer: IpcPeer, act: Callable[[], Any]) -> None:
    """Call a function where handlers are nested so deeply that no other handler runs."""
    a, b = peer.create_session_pair()
    depth = 0

    def ring(*args: Any) -> None:
        raise KeyboardInterrupt("it hangs")

    @b.on_message
    def nest(note: Note) -> None:
        nonlocal depth
        depth += 1
        if depth < 33:
            a.notify(Note("x"))
            peer.tick(0.5)
        else:
            act()

    a.notify(Note("x"))
    old = signal.signal(signal.SIGALRM, ring)
    try:
        signal.alarm(5)
        peer.tick(1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.slow
def test_map_out_of_order_in_deeply_nested_handlers(peer: IpcPeer, pool: WorkerPool) -> None:
    pool.submit(Ping(1)).wait()
    got: List[Any] = []
    nested_too_deeply(peer, lambda: got.extend(pool.map([Ping(5)], expect=Pong, ordered=False)))
    assert [reply.value for reply in got] == [5]


@pytest.mark.parametrize("retries", [0, 1])
def test_worker_that_dies_while_handlers_are_nested_deeply_fails_its_task(peer: IpcPeer, retries: int) -> None:
    got: List[Any] = []
    with WorkerPool(peer, worker(), 1, retries=retries) as pool:
        pool.submit(Ping(1)).wait()
        nested_too_deeply(peer, lambda: got.append(outcome(pool.submit(Ping(("exit", 3)), timeout=None))))
        assert got == [StreamClosedError]
        assert outcome(pool.submit(Ping(2))) == 2


@pytest.mark.slow
def test_leaving_does_not_wait_for_cancelled_tasks(peer: IpcPeer) -> None:
    with WorkerPool(peer, worker(), 1) as pool:
        pool.submit(Ping(1)).wait()
        promise = pool.submit(Ping(("sleep", 9)))
        peer.tick(0.1)
        promise.cancel()
        begin = time.monotonic()
    assert time.monotonic() - begin < 5


def test_task_that_could_not_be_sent_in_time_is_told_at_once(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.submit(Ping(1)).wait()

    def send(*args: Any) -> None:
        error = RequestTimeoutError("the message was not sent")
        errors.append(weakref.ref(error))
        raise error

    errors: List[Any] = []
    monkeypatch.setattr(Requests, "send", send)
    promise: Any = pool.submit(Ping(2))
    monkeypatch.undo()
    assert len(errors) == 1  # no other worker was to do it
    assert is_settled(promise) and outcome(promise) is RequestTimeoutError
    promise = None
    gc.collect()
    assert errors[0]() is None
    assert outcome(pool.submit(Ping(3))) == 3


def test_interrupted_sending_does_not_count_as_a_task(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerPool(peer, worker(), 1, tasks_per_worker=3) as pool:
        first = pool.submit(Ping("pid"), expect=Pong).wait().value
        once(monkeypatch, Requests, "send")
        with pytest.raises(KeyboardInterrupt):
            pool.submit(Ping(1))  # it stays in the queue
        pids = [pool.submit(Ping("pid"), expect=Pong).wait().value for _ in range(2)]
        assert pids[0] == first != pids[1]


def test_an_id_that_cannot_be_used_fails_its_task() -> None:
    class Ids:
        def generate(self) -> Any:
            return next(ids)

    bad: List[Any] = [[], 5, "x" * 200, None]
    ids = iter([*bad, "1"])
    with IpcPeer(id_generator=Ids(), timeout=5) as peer, WorkerPool(peer, worker(), 1) as pool:
        for _ in bad:
            with pytest.raises(ValueError, match="not a str of at most 128 characters"):
                pool.submit(Ping(1))
        assert pool.pending == 0
        assert outcome(pool.submit(Ping(2))) == 2


@pytest.mark.parametrize("how", ["closed", "in on_close", "in a done callback"])
def test_a_peer_that_is_closed_takes_no_pool(how: str) -> None:
    found: List[Any] = []

    def make(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="^this IpcPeer is closed; make a new one$") as caught:
            WorkerPool(peer, worker(), 1)
        found.append(caught.value)

    with IpcPeer(timeout=5) as peer:
        a, b = peer.create_session_pair()
        if how == "in on_close":
            a.on_close(make)
        elif how == "in a done callback":
            a.request(Ping()).add_done_callback(make)
    if how == "closed":
        make()
    assert len(found) == 1


@pytest.mark.parametrize("size", [1, 3, 5, "2"])
def test_size_is_not_for_a_list_of_commands(peer: IpcPeer, size: Any) -> None:
    with pytest.raises(ValueError, match="size must be left out"):
        WorkerPool(peer, [worker(), worker()], size)
    WorkerPool(peer, [worker(), worker()], 2).close()


@pytest.mark.slow
@BOTH
def test_interrupted_cancel_loses_nothing(kind: Type[BaseException]) -> None:
    with IpcPeer(timeout=20) as peer, WorkerPool(peer, worker(), 1, in_flight=2) as pool:
        pool.submit(Ping(1)).wait()

        def scenario(run: Run) -> None:
            called: List[Any] = []
            promise = pool.submit(Ping(("sleep", 0.002)), expect=Pong)
            promise.add_done_callback(called.append)
            run.once(promise.cancel)
            promise.cancel()
            run.until(lambda: called, lambda: peer.tick(0.01))
            assert called == [promise]
            with pytest.raises(IpcError, match="cancelled"):
                promise.wait(5)
            assert pool.submit(Ping(2), expect=Pong).wait(5).value == 2
            tick_until(lambda: pool.pending == 0, peer)

        at_every_place(scenario, kind)
        assert len(pool.workers) == 1


@pytest.mark.matrix
@pytest.mark.parametrize("ordered", [False, True])
def test_what_a_dropped_map_has_queued_is_not_pending(peer: IpcPeer, ordered: bool) -> None:
    with WorkerPool(peer, worker(), 1) as pool:
        replies = pool.map([Ping(index) for index in range(50)], ordered=ordered, ahead=50)
        next(replies)
        assert pool.pending > 40
        del replies
        assert pool.pending <= 1
