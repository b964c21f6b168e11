"""As a part of other loops: what is due by time, and the examples with loops of several kinds."""

import gc
import os
import random
import select
import sys
import threading
import time
import tracemalloc
from typing import Any, Iterator, List

import pytest

from stream_ipc import DeferredReply, IpcPeer, RequestTimeoutError, StreamClosedError
from tests.helpers import (
    PATIENCE,
    CpuMeter,
    FakeClock,
    InterruptAt,
    Interruption,
    RawPeer,
    deadline_of,
    framed,
    is_settled,
    no_pending,
    reply_bytes,
    request_bytes,
    role,
    seeds,
    set_clock,
    tick_until,
)
from tests.messages import Note, Ping, Pong
from tests.os_helpers import listing
from tests.test_custom_transport import Memory


@pytest.fixture
def peer() -> Iterator[IpcPeer]:
    with IpcPeer(timeout=30) as made:
        yield made


@pytest.fixture
def clock(peer: IpcPeer) -> FakeClock:
    return set_clock(peer, FakeClock())


# -- next_deadline


def test_deferred_reply_that_a_thread_drops_is_noticed_inside_another_loop(peer: IpcPeer) -> None:
    kept: List[DeferredReply] = []
    with RawPeer(peer) as raw:

        @raw.session.on_request
        def later(ping: Ping) -> DeferredReply:
            kept.append(DeferredReply())
            return kept[-1]

        raw.write(request_bytes("1", Ping()))
        tick_until(lambda: kept, peer)
        for _ in range(2):
            due = peer.next_deadline()
            assert due is not None and 0 < due <= 0.5  # nothing is readable when it is dropped
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()
        peer.tick(0)
        (reply,) = raw.messages()
        assert "was dropped before it was settled" in str(reply.response)  # type: ignore[attr-defined]
        assert peer.next_deadline() is None


def test_nothing_is_due(peer: IpcPeer) -> None:
    assert peer.next_deadline() is None
    with RawPeer(peer) as raw:
        assert peer.next_deadline() is None
        promise = raw.session.request(Ping(), timeout=None)
        assert peer.next_deadline() is None and not promise.done
    peer.close()
    assert peer.next_deadline() is None


def test_the_earliest_deadline_counts(peer: IpcPeer, clock: FakeClock) -> None:
    with RawPeer(peer) as one, RawPeer(peer) as two:
        late = one.session.request(Ping())
        assert peer.next_deadline() == 30
        early = two.session.request(Ping(), timeout=5)
        assert peer.next_deadline() == 5
        clock.now += 4
        assert peer.next_deadline() == 1
        two.write(reply_bytes(early.id, Pong()))
        assert peer.next_deadline() == 1  # it has not been read yet
        peer.tick()
        assert peer.next_deadline() == 26
        assert late.cancel()
        assert peer.next_deadline() is None
        one.session.request(Ping(), timeout=2)  # nobody keeps it
        gc.collect()
        assert peer.next_deadline() is None


def test_zero_once_it_has_passed_until_a_tick(peer: IpcPeer, clock: FakeClock) -> None:
    with RawPeer(peer) as raw:
        promise = raw.session.request(Ping(), timeout=5)
        clock.now += 5
        assert peer.next_deadline() == 0.0 and promise.done and not is_settled(promise)
        assert peer.tick() == 0
        assert peer.next_deadline() is None and is_settled(promise) and no_pending(raw.session)
        for _ in range(2):
            with pytest.raises(RequestTimeoutError, match="within 5 s"):
                promise.wait()
        raw.write(reply_bytes(promise.id, Pong()))
        assert peer.tick() == 1
        with pytest.raises(RequestTimeoutError):
            promise.wait()


@pytest.mark.parametrize("of", ["peer", "session"])
def test_a_reply_that_has_come_beats_the_deadline(peer: IpcPeer, clock: FakeClock, of: str) -> None:
    with RawPeer(peer) as raw, RawPeer(peer) as other:
        promise = raw.session.request(Ping(), timeout=5)
        behind = other.session.request(Ping(), timeout=5)
        raw.write(reply_bytes(promise.id, Pong(1)))
        clock.now += 100
        ticking: Any = peer if of == "peer" else raw.session
        assert ticking.tick() == 1
        assert promise.wait() == Pong(1)
        # Nothing lies in the other stream, so this one is overdue.
        assert is_settled(behind)


@pytest.mark.matrix
@pytest.mark.parametrize("of", ["peer", "session"])
@pytest.mark.parametrize("timeout", [None, 10.0])
@pytest.mark.slow
def test_a_waiting_tick_ends_with_a_request_that_is_overdue(peer: IpcPeer, of: str, timeout: Any) -> None:
    with RawPeer(peer) as raw, RawPeer(peer):
        ticking: Any = peer if of == "peer" else raw.session
        with CpuMeter() as meter:
            settled = raw.session.request(Ping(), timeout=0.05)
            settled.cancel()
            promise = raw.session.request(Ping(), timeout=0.2)
            while not promise.done:
                assert ticking.tick(timeout) == 0
        assert is_settled(promise) and 0.19 < meter.real < 5 and meter.cpu < 0.05
        with CpuMeter() as meter:
            assert ticking.tick(0.1) == 0
        assert 0.1 <= meter.real < 5 and meter.cpu < 0.05


def test_many_requests_that_are_answered_leave_nothing_due(peer: IpcPeer, clock: FakeClock) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    for index in range(100):
        promise = a.request(Ping(index), timeout=1)
        assert promise.wait() == Pong(index)
        clock.now += 0.5
    assert peer.next_deadline() is None


def test_deadlines_in_any_order(peer: IpcPeer, clock: FakeClock) -> None:
    for seed in seeds(3):
        rand = random.Random(seed)
        with RawPeer(peer) as raw:
            pending: List[Any] = []
            for _ in range(1000):
                promise = None  # keeps nothing
                what = rand.random()
                if what < 0.5:
                    timeout = rand.choice([None, 1, 5, 5, 5, rand.random() * 10])
                    pending.append(raw.session.request(Ping(), timeout=timeout))
                    raw.read()
                elif what < 0.6 and pending:
                    assert pending.pop(rand.randrange(len(pending))).cancel()
                elif what < 0.7 and pending:
                    promise = pending.pop(rand.randrange(len(pending)))
                    raw.write(reply_bytes(promise.id, Pong()))
                    assert peer.tick() == 1 and promise.wait() == Pong()
                elif what < 0.8 and pending:
                    del pending[rand.randrange(len(pending))]  # nobody keeps it
                elif what < 0.9:
                    clock.now += rand.random()
                    assert peer.tick() == 0
                    for promise in pending:
                        due_at = deadline_of(promise)
                        assert is_settled(promise) is (due_at is not None and due_at <= clock.now)
                    pending = [promise for promise in pending if not is_settled(promise)]
                else:
                    due = [deadline_of(promise) - clock.now for promise in pending if deadline_of(promise) is not None]
                    assert peer.next_deadline() == (min(due) if due else None)
            assert f"pending={len(pending)} " in repr(raw.session)
            raw.session.close()


@pytest.mark.slow
def test_many_deadlines_cost_no_more_each_than_a_few(peer: IpcPeer, clock: FakeClock) -> None:
    with RawPeer(peer) as raw, CpuMeter() as meter:
        pending = []
        for _ in range(4000):
            clock.now += 0.001
            pending.append(raw.session.request(Ping()))
            raw.read()
            assert peer.next_deadline() == deadline_of(pending[0]) - clock.now
        for promise in pending:
            clock.now = deadline_of(promise)
            assert not is_settled(promise) and peer.tick() == 0 and is_settled(promise)
    assert meter.cpu < 2.5  # going through all of them each time takes 5 s and more


def test_what_was_answered_leaves_no_deadline_behind(peer: IpcPeer, clock: FakeClock) -> None:
    with RawPeer(peer) as raw:
        first = raw.session.request(Ping(), timeout=1)  # stays
        tracemalloc.start()
        try:
            for index in range(600):
                raw.read()
                raw.write(reply_bytes(raw.session.request(Ping(), timeout=5).id, Pong()))
                promise = raw.session.request(Ping(), timeout=5)
                assert peer.next_deadline() == 1 and promise.cancel()
                assert peer.tick() == 1
                if index == 100:
                    before = tracemalloc.get_traced_memory()[0]
            assert tracemalloc.get_traced_memory()[0] - before < 20_000
        finally:
            tracemalloc.stop()
        assert not is_settled(first)


def test_zero_while_an_inbox_holds_something(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        raw.write(framed(Note("1")), framed(Note("2")))
        assert raw.session.receive(20) == Note("1")
        assert peer.next_deadline() == 0.0
        peer.tick()
        assert peer.next_deadline() is None


def test_zero_while_a_batch_holds_something(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw, raw.session.batch():
        raw.session.notify(Note())
        assert peer.next_deadline() == 0.0
        peer.tick()
        assert peer.next_deadline() is None


def test_zero_while_a_regular_file_is_read(peer: IpcPeer, tmp_path: Any) -> None:
    # epoll refuses it, so the descriptor of the peer does not tell.
    path = tmp_path / "frames"
    path.write_bytes(framed(Note("1")))
    session = peer.create_stream_session(os.open(os.devnull, os.O_WRONLY), os.open(path, os.O_RDONLY))
    assert peer.next_deadline() == 0.0
    assert session.receive(20) == Note("1")
    tick_until(lambda: not session.is_open, peer)
    assert peer.next_deadline() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_descriptor_whose_making_is_interrupted_leaves_none_open() -> None:
    before = listing()
    number = 0
    while True:
        number += 1
        peer = IpcPeer()
        with InterruptAt(number, Interruption()) as interrupted:
            try:
                peer.fileno()
            except Interruption as exc:
                exc.__traceback__ = exc.__context__ = None  # or it would keep what was being made
        peer.close()
        gc.collect()  # the standard library's selectors refer to themselves
        assert listing() == before, interrupted.where
        if not interrupted.hit:
            break
    assert number > 20


def test_soon_while_there_is_a_transport_without_descriptors(peer: IpcPeer) -> None:
    memory = Memory()
    session = peer.create_session(memory)
    due = peer.next_deadline()
    assert due is not None and 0 < due <= 0.01
    promise = session.request(Ping(), timeout=0)
    assert peer.next_deadline() == 0.0 and promise.done
    session.close()
    assert peer.next_deadline() is None


@pytest.mark.slow
def test_soon_while_a_child_is_ending(peer: IpcPeer) -> None:
    # Its stdout has ended, so the session has, but the process lives until its stdin does, too.
    code = "import os, sys; os.close(1); sys.stdin.read()"
    session = peer.create_command_session([sys.executable, "-c", code])
    reason: List[Any] = []
    session.on_close(reason.append)
    turns = 0
    limit = time.monotonic() + PATIENCE
    while session.process is not None and session.process.returncode is None or peer.next_deadline() is not None:
        assert time.monotonic() < limit
        turns += 1
        due = peer.next_deadline()
        select.select([peer.fileno()], [], [], due)
        peer.tick(0)
    assert reason and turns < 2000


def test_from_another_thread_or_after_a_fork() -> None:
    peer = IpcPeer()
    session, _ = peer.create_session_pair()
    promise = session.request(Ping())
    pid = os.fork()
    if not pid:
        status = 2
        try:
            for _ in "ab":
                try:
                    peer.next_deadline()
                except RuntimeError:
                    status -= 1
                peer.close()  # so it is once the copy is closed, too
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert not promise.done
    peer.close()


# -- a loop that only ever asks


def test_select_loop_carries_a_conversation_and_its_deadlines(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("echo"))
    with RawPeer(peer) as deaf:
        replies = [session.request(Ping(index), expect=Pong) for index in range(20)]
        overdue = [deaf.session.request(Ping(), timeout=0.01 * index) for index in range(10)]
        waiting: List[Any] = [*replies, *overdue]
        turns = 0
        while waiting:
            due = peer.next_deadline()
            assert due is not None  # there is a request
            select.select([peer.fileno()], [], [], due)
            peer.tick(0)
            turns += 1
            waiting = [promise for promise in waiting if not is_settled(promise)]
        assert [promise.wait().value for promise in replies] == list(range(20))
        for promise in overdue:
            with pytest.raises(RequestTimeoutError):
                promise.wait()
        assert turns < 500


@pytest.mark.parametrize("run", range(3))
@pytest.mark.slow
def test_fileno_tells_of_children_that_come_after_one_that_has_died(peer: IpcPeer, run: int) -> None:
    peer.fileno()
    for _ in range(3):
        dying = peer.create_command_session(role("work"))
        with pytest.raises(StreamClosedError):
            dying.request(Ping(("exit", 3))).wait()
        session = peer.create_command_session(role("echo"))
        promise = session.request(Ping("here"), expect=Pong)
        while not promise.done:
            assert select.select([peer.fileno()], [], [], 20)[0]
            peer.tick(0)
        assert promise.wait().value == "here"
