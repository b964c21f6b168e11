"""The contract of a tick: what it returns, how long it waits, what it costs, who has a turn."""

import contextlib
import io
import math
import os
import resource
import select
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, List

import pytest

from stream_ipc import IpcPeer, Message, RequestTimeoutError, Session, StreamClosedError, as_completed, gather
from tests.helpers import (
    WAIT,
    CpuMeter,
    FakeClock,
    Interruption,
    RawPeer,
    drop_queued,
    framed,
    received_bytes,
    reply_bytes,
    request_bytes,
    role,
    set_clock,
    set_limit,
    socket_peers,
    tick_until,
    unframe,
    values,
)
from tests.messages import Note, Ping, Pong

# A wait that only sleeps takes microseconds of processor time; one that spins takes all of it.
IDLE = 0.02


# -- what it returns, and when


def test_tick_returns_how_many_messages_were_dispatched(raw: RawPeer) -> None:
    peer = raw.session.peer
    assert peer.tick() == 0 and raw.session.tick() == 0
    raw.write(framed(Note()), framed(Note()), request_bytes("1", Ping()))
    assert peer.tick() == 3
    promise = raw.session.request(Ping())
    raw.write(reply_bytes(promise.id, Pong()))
    assert raw.session.tick() == 1 and promise.done
    assert peer.tick() == 0


def test_tick_zero_returns_at_once(raw: RawPeer) -> None:
    with CpuMeter() as meter:
        for _ in range(100):
            assert raw.session.peer.tick() == 0 and raw.session.tick(0) == 0
    assert meter.real < 5


@pytest.mark.matrix
@pytest.mark.parametrize("of", ["peer", "session"])
def test_waiting_tick_waits_that_long_and_does_not_spin(raw: RawPeer, of: str) -> None:
    ticking: Any = raw.session.peer if of == "peer" else raw.session
    with CpuMeter() as meter:
        assert ticking.tick(WAIT) == 0
    assert WAIT <= meter.real < 5 and not meter.spins


def test_waiting_tick_returns_when_something_comes(raw: RawPeer) -> None:
    raw.write(framed(Note()))
    with CpuMeter() as meter:
        assert raw.session.peer.tick(20) == 1
        raw.write(framed(Note()))
        assert raw.session.tick(None) == 1
    assert meter.real < 10


def test_tick_none_returns_when_a_session_ends(raw: RawPeer) -> None:
    raw.sock.close()
    assert raw.session.peer.tick(None) == 0
    assert not raw.session.is_open


def test_tick_of_a_session_is_one_of_its_peer(peer: IpcPeer) -> None:
    with RawPeer(peer) as one, RawPeer(peer) as two:
        seen: List[Session] = []
        for raw in (one, two):
            raw.session.on_message(lambda note, session: seen.append(session))
            raw.write(framed(Note()), framed(Note()))
        assert one.session.tick(20) == 4
        assert sorted(map(id, seen)) == sorted(map(id, [one.session, one.session, two.session, two.session]))


@pytest.mark.matrix
@pytest.mark.parametrize("of", ["peer", "session", "promise", "receive"])
def test_wait_on_a_dead_stream_does_not_spin(peer: IpcPeer, of: str) -> None:
    # An end of stream stays readable for ever; whoever keeps watching it burns the processor.
    with RawPeer(peer) as dead, RawPeer(peer) as other:
        dead.sock.close()
        tick_until(lambda: not dead.session.is_open, peer)
        promise = other.session.request(Ping())
        calls: Any = {
            "peer": lambda: peer.tick(WAIT),
            "session": lambda: other.session.tick(WAIT),
            "promise": lambda: promise.wait(WAIT),
            "receive": lambda: other.session.receive(WAIT),
        }
        with CpuMeter() as meter:
            try:
                calls[of]()
            except TimeoutError:
                pass
        assert meter.real >= WAIT and not meter.spins


@pytest.mark.slow
def test_wait_while_output_is_queued_does_not_spin(raw: RawPeer) -> None:
    raw.session.notify(Note(data=b"x" * 900000))
    assert raw.session.queued_bytes
    with CpuMeter() as meter:
        raw.session.peer.tick(0.1)
        with pytest.raises(TimeoutError):
            raw.session.flush(0.1)
        with pytest.raises(TimeoutError):
            raw.session.request(Ping()).wait(0.1)
    assert meter.cpu < 2 * IDLE and meter.real >= 0.3


def test_wait_with_half_a_frame_there_does_not_spin(raw: RawPeer) -> None:
    raw.write(framed(Note(data=b"x" * 1000))[:500])
    with CpuMeter() as meter:
        assert raw.session.peer.tick(WAIT) == 0
    assert not meter.spins and meter.real >= WAIT


def test_tiny_timeouts_do_not_become_a_busy_loop(raw: RawPeer) -> None:
    count = 0
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        raw.session.peer.tick(0.0004)
        count += 1
    # A timeout that was rounded down to nothing would make tens of thousands of turns.
    assert count <= 90


def test_write_that_becomes_possible_wakes_a_tick(raw: RawPeer) -> None:
    raw.session.notify(Note(data=b"x" * 400000))
    while raw.session.queued_bytes:
        before = raw.session.queued_bytes
        assert raw.read()
        with CpuMeter() as meter:
            raw.session.peer.tick(5 if before < 100000 else 0)
        assert meter.real < 5, "the tick slept though the queue could be written"


# -- nothing open


def test_with_nothing_open_a_number_sleeps(peer: IpcPeer) -> None:
    with CpuMeter() as meter:
        assert peer.tick(WAIT) == 0
    assert WAIT <= meter.real < 5 and not meter.spins
    with CpuMeter() as meter:
        assert peer.tick() == 0
    assert meter.real < 5


@pytest.mark.parametrize("closed", [False, True])
def test_with_nothing_open_infinity_sleeps_as_any_number_does(peer: IpcPeer, closed: bool) -> None:
    class Woken(Exception):
        pass

    def wake(number: int, frame: Any) -> None:
        raise Woken

    if closed:
        peer.close()
    old = signal.signal(signal.SIGALRM, wake)
    try:
        # More than from one look at streams to the next; a closed peer takes none.
        signal.setitimer(signal.ITIMER_REAL, WAIT if closed else 0.7)
        with pytest.raises(Woken), CpuMeter() as meter:
            peer.tick(math.inf)
        assert not meter.spins
    finally:
        signal.signal(signal.SIGALRM, old)


def test_with_nothing_open_none_raises(peer: IpcPeer) -> None:
    with pytest.raises(StreamClosedError):
        peer.tick(None)
    for session in peer.create_session_pair():
        session.close()
    with pytest.raises(StreamClosedError):
        peer.tick(None)


def test_with_nothing_open_none_returns_once_if_it_was_woken(peer: IpcPeer) -> None:
    peer.wakeup()
    assert peer.tick(None) == 0
    with pytest.raises(StreamClosedError):
        peer.tick(None)


def test_tick_of_a_closed_peer_does_not_spin(peer: IpcPeer) -> None:
    peer.create_session_pair()
    peer.close()
    with pytest.raises(StreamClosedError):
        peer.tick(None)


# -- tick_for


def test_tick_for_ticks_until_the_time_is_over(raw: RawPeer) -> None:
    raw.write(framed(Note()), framed(Note()))
    with CpuMeter() as meter:
        assert raw.session.peer.tick_for(WAIT) == 2
    assert WAIT <= meter.real < 5 and not meter.spins
    with CpuMeter() as meter:
        assert raw.session.peer.tick_for(0) == 0
    assert meter.real < 5
    with pytest.raises(TypeError):
        raw.session.peer.tick_for(None)  # type: ignore[arg-type]


def test_tick_for_with_nothing_open(peer: IpcPeer) -> None:
    with CpuMeter() as meter:
        assert peer.tick_for(WAIT) == 0
    assert WAIT <= meter.real < 5 and not meter.spins


# -- order and fairness


@pytest.mark.parametrize("first", ["flood", "other"])
def test_flood_does_not_starve_another_session(peer: IpcPeer, first: str) -> None:
    raws = [RawPeer(peer), RawPeer(peer)]
    flood, other = raws if first == "flood" else raws[::-1]
    with flood, other:
        seen: List[str] = []
        flood.session.on_message(lambda note: seen.append("flood"))
        other.session.on_message(lambda note: seen.append("other"))
        note = framed(Note("x"))
        sent = 0
        try:
            while sent < 10000:
                sent += flood.sock.send(note * 50) // len(note)
        except BlockingIOError:
            pass
        other.write(framed(Note("y")))
        peer.tick()
        assert sent > 500 and "other" in seen
        assert seen.index("other") <= sent / 3, "the other session came after all of the flood"


def test_endless_flood_does_not_keep_a_tick_or_a_wait_from_returning(raw: RawPeer) -> None:
    # The handler refills the stream, so there is always something.
    note = framed(Note("x"))

    def refill(_: Message) -> None:
        try:
            raw.sock.send(note * 2)  # more than it takes away
        except BlockingIOError:
            pass

    raw.session.on_message(refill)
    raw.write(note * 100)
    with CpuMeter() as meter:
        assert 0 < raw.session.peer.tick() < 50000
        assert 0 < raw.session.tick(20) < 50000
        with pytest.raises(RequestTimeoutError):
            raw.session.request(Ping(), timeout=WAIT).wait()
    assert meter.real < 15


@pytest.mark.slow
def test_flood_with_ticking_handlers_does_not_keep_a_wait_from_timing_out(raw: RawPeer) -> None:
    note = framed(Note("x"))

    def refill(_: Message) -> None:
        try:
            raw.sock.send(note * 2)
        except BlockingIOError:
            pass
        raw.session.peer.tick()

    raw.session.on_message(refill)
    raw.write(note * 100)
    with CpuMeter() as meter, pytest.raises(RequestTimeoutError):
        raw.session.request(Ping(), timeout=0.2).wait()
    assert meter.real < 15


def test_all_ready_sessions_have_a_turn_in_one_tick(peer: IpcPeer) -> None:
    raws = [RawPeer(peer) for _ in range(50)]
    seen: List[Session] = []
    try:
        for raw in raws:
            raw.session.on_message(lambda note, session: seen.append(session))
            raw.write(framed(Note()))
        assert peer.tick() == 50
        assert sorted(map(id, seen)) == sorted(id(raw.session) for raw in raws)
    finally:
        for raw in raws:
            raw.sock.close()


def test_waiting_for_what_is_in_an_inbox_makes_no_turn(peer: IpcPeer) -> None:
    with RawPeer(peer) as one, RawPeer(peer) as two:
        promises = [raw.session.request(Ping(), timeout=None) for raw in (one, two)]
        for raw, promise in zip((one, two), promises):
            raw.write(reply_bytes(promise.id, Pong()))
        promises[0].wait()
        one.write(framed(Note()))
        before = received_bytes(one.session)
        for promise in promises:
            assert promise.wait() == Pong()
        assert received_bytes(one.session) == before
        peer.tick(0)
        assert received_bytes(one.session) > before


SLOW = 0.01  # seconds of a fake clock that each handler takes


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("how", ["tick", "tick_for", "request", "wait", "receive", "gather", "as_completed"])
def test_slow_handlers_of_a_flood_keep_no_call_beyond_its_time(peer: IpcPeer, how: str, others: int) -> None:
    with RawPeer(peer) as flood, RawPeer(peer) as other, contextlib.ExitStack() as more:
        clock = set_clock(peer, FakeClock())
        seen: List[Any] = []

        def handle(note: Any) -> None:
            clock.now += SLOW
            seen.append(note)

        for raw in (flood, *[more.enter_context(RawPeer(peer)) for _ in range(others)]):
            raw.session.on_message(handle)
            raw.write(framed(Note()) * 1000)
        peer.tick(0)
        assert 1 < len(seen) < 40
        promises = [other.session.request(Ping(), timeout=0.3 if how == "request" else None) for _ in range(2)]
        calls: Any = {
            "tick": lambda: peer.tick(0),
            "tick_for": lambda: peer.tick_for(0.3),
            "request": promises[0].wait,
            "wait": lambda: promises[0].wait(0.3),
            "receive": lambda: other.session.receive(0.3),
            "gather": lambda: gather(promises, timeout=0.3),
            "as_completed": lambda: next(as_completed(promises, timeout=0.3)),
        }
        start = clock.now
        if how.startswith("tick"):
            calls[how]()
        else:
            with pytest.raises(TimeoutError):
                calls[how]()
        assert clock.now - start < 0.8
        flood.session.off_message(handle)


@pytest.mark.parametrize("how", ["tick", "wait", "receive", "end"])
def test_slow_handlers_of_a_flood_keep_no_other_session_from_its_turn(peer: IpcPeer, how: str) -> None:
    clock = set_clock(peer, FakeClock())
    ended: List[Any] = []
    with RawPeer(peer) as flood, RawPeer(peer) as other:

        def handle(note: Note) -> None:
            clock.now += 2 * SLOW
            if flood.sock.fileno() >= 0:
                flood.write(framed(note))  # it never ends

        flood.session.on_message(handle)
        other.session.on_close(ended.append)
        flood.write(framed(Note()) * 100)
        peer.tick(0)
        promise = other.session.request(Ping(), timeout=1)
        if how != "end":
            other.write(reply_bytes(promise.id, Pong()), framed(Note("there")))
        else:
            other.sock.close()
        start = clock.now
        if how == "wait":
            assert promise.wait() == Pong()
        elif how == "receive":
            assert other.session.receive(1) == Note("there")
        else:
            tick_until(lambda: ended if how == "end" else promise.settled, peer)
        assert clock.now - start < 1
        flood.session.off_message(handle)


@pytest.mark.parametrize("how", ["wait", "gather", "receive"])
def test_what_is_there_behind_slow_handlers_keeps_no_call_for_long(peer: IpcPeer, how: str) -> None:
    with RawPeer(peer) as raw:
        clock = set_clock(peer, FakeClock())

        def handle(note: Note) -> None:
            clock.now += 0.5

        raw.session.on_message(handle)
        promise = raw.session.request(Ping(), timeout=None)
        calls: Any = {
            "wait": lambda: promise.wait(1),
            "gather": lambda: gather([promise], timeout=1)[0],
            "receive": lambda: raw.session.receive(1, expect=Pong),
        }
        there = framed(Pong()) if how == "receive" else reply_bytes(promise.id, Pong())
        raw.write(framed(Note()) * 8, there)
        assert calls[how]() == Pong()  # so much is waited for
        if how != "receive":
            promise = raw.session.request(Ping(), timeout=None)
            there = reply_bytes(promise.id, Pong())
        raw.write(framed(Note()) * 100, there)
        start = clock.now
        with pytest.raises(TimeoutError):
            calls[how]()
        assert clock.now - start < 8
        tick_until(lambda: "inbox=0" in repr(raw.session), peer)
        assert calls[how]() == Pong()


@dataclass
class Growing(Message):
    """While one is made, the other side sends more."""

    text: str
    send: ClassVar[Callable[[], Any]]

    def __post_init__(self) -> None:
        Growing.send()


@pytest.mark.parametrize("how", ["request", "wait", "receive", "gather"])
def test_a_call_that_gives_up_late_leaves_what_a_long_inbox_has_no_room_for_unread(peer: IpcPeer, how: str) -> None:
    with RawPeer(peer) as raw:
        clock = set_clock(peer, FakeClock())
        count = 0

        def send() -> None:
            nonlocal count
            with contextlib.suppress(BlockingIOError):
                while True:
                    raw.write(frame)
                    count += 1

        Growing.send = lambda: None
        frame = framed(Growing("x" * 2000))
        Growing.send = send

        def handle(message: Growing) -> None:
            clock.now += 0.1

        raw.session.on_message(handle)
        send()
        promise = raw.session.request(Ping(), timeout=None)
        for _ in range(3):
            calls: Any = {
                "request": lambda: raw.session.request(Ping(), timeout=0.05).wait(),
                "wait": lambda: promise.wait(0.05),
                "receive": lambda: raw.session.receive(0.05, expect=Note),
                "gather": lambda: gather([promise], timeout=0.05),
            }
            start = clock.now
            with pytest.raises(TimeoutError):
                calls[how]()
            assert clock.now - start < 1
        assert count < 10_000, "it reads on"
        raw.session.off_message(handle)
        Growing.send = lambda: None


def test_a_reply_behind_a_request_that_has_to_wait_is_taken_though_another_session_floods(peer: IpcPeer) -> None:
    clock = set_clock(peer, FakeClock())
    with RawPeer(peer) as flood, RawPeer(peer) as other:

        def handle(note: Note) -> None:
            clock.now += SLOW
            flood.write(framed(note))  # it never ends

        flood.session.on_message(handle)
        other.session.on_request(lambda ping: Pong("x" * 3_000_000))
        flood.write(framed(Note()) * 100)
        promise = other.session.request(Ping(), timeout=None)
        other.write(request_bytes("a", Ping()), request_bytes("b", Ping()), reply_bytes(promise.id, Pong("there")))
        assert promise.wait(0.3) == Pong("there")
        flood.session.off_message(handle)
        drop_queued(other.session)


def test_receive_finds_what_is_there_though_many_others_have_slow_handlers(peer: IpcPeer) -> None:
    clock = set_clock(peer, FakeClock())
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(RawPeer(peer)) for _ in range(10)]
        for raw in raws[:-1]:
            raw.session.on_message(lambda note: setattr(clock, "now", clock.now + SLOW))
            raw.write(framed(Note()) * 50)
        raws[-1].write(framed(Note("there")))
        assert raws[-1].session.receive(SLOW) == Note("there")


def test_slow_done_callbacks_leave_a_tick_in_time(raw: RawPeer) -> None:
    clock = set_clock(raw.session.peer, FakeClock())
    called: List[Any] = []

    def slow(promise: Any) -> None:
        clock.now += SLOW
        called.append(promise)

    promises = [raw.session.request(Ping(), timeout=None) for _ in range(500)]
    for promise in promises:
        promise.add_done_callback(slow)
    raw.read()
    raw.write(*[reply_bytes(promise.id, Pong()) for promise in promises])
    raw.session.tick(0)
    assert 1 < len(called) < 40
    tick_until(lambda: len(called) == 500, raw.session.peer)


def test_an_idle_wait_looks_at_its_streams_once_in_a_while_and_not_twice(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit("check interval", 0.1, monkeypatch)

    class Stream(io.RawIOBase):
        looked = 0

        def fileno(self) -> int:
            Stream.looked += 1
            return read

        def readinto(self, buffer: Any) -> int:
            return os.readv(read, [buffer])

    read, write = os.pipe()
    session = peer.create_stream_session(write, Stream())
    peer.tick(0)
    Stream.looked = 0
    start = time.monotonic()
    while time.monotonic() < start + 0.24:
        peer.tick(max(0, start + 0.24 - time.monotonic()))
    assert Stream.looked <= 3
    session.close()
    os.close(read)


def test_a_stream_that_is_polled_has_idle_ones_looked_at_no_more_often(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit("check interval", 10, monkeypatch)

    class Stream:  # without a descriptor
        asked = 0

        def read(self, size: int) -> None:
            Stream.asked += 1

        def write(self, data: bytes) -> int:
            return len(data)

    class Descriptor(io.RawIOBase):
        looked = 0

        def fileno(self) -> int:
            Descriptor.looked += 1
            return read

    read, write = os.pipe()
    idle = peer.create_stream_session(write, Descriptor())
    stream: Any = Stream()
    peer.create_stream_session(stream, stream)
    peer.tick(0)
    Stream.asked = Descriptor.looked = 0
    tick_until(lambda: Stream.asked > 10, peer)
    peer.tick(0.1)
    assert Descriptor.looked <= 1
    idle.close()
    os.close(read)


def test_a_thousand_idle_sessions_cost_a_tick_no_more_than_fifty() -> None:
    def cost(count: int) -> float:
        with IpcPeer() as peer:
            for _ in range(count // 2):
                peer.create_session_pair()
            best = 1e9
            for _ in range(10):
                began = time.process_time()
                for _ in range(20):
                    peer.tick()
                best = min(best, time.process_time() - began)
            return best

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1200
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            pytest.skip("not enough descriptors")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        fifty, many = cost(50), cost(1000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert many < fifty * 3 + 0.0005, (fifty, many)


def test_order_is_kept_over_many_ticks_and_sessions(peer: IpcPeer) -> None:
    pairs = [peer.create_session_pair() for _ in range(3)]
    seen: List[List[int]] = [[], [], []]
    for (a, b), into in zip(pairs, seen):
        b.on_message(lambda note, into=into: into.append(note.data[0]))
    for index in range(300):
        for a, _ in pairs:
            a.notify(Note(data=(index, b"x" * (index * 37 % 5000))))
        if index % 7 == 0:
            peer.tick()
    tick_until(lambda: all(len(into) == 300 for into in seen), peer)
    assert seen == [list(range(300))] * 3


# -- nesting


def test_thousand_pipelined_requests_whose_handlers_call_back(peer: IpcPeer) -> None:
    # The child's handlers nest up to its limit. Without one its stack would be exhausted, which a reply would tell.
    asked: List[int] = []

    def answer(ping: Ping) -> Pong:
        asked.append(ping.value)
        return Pong(ping.value)

    with peer.create_command_session(role("many")) as session:
        session.on_request(answer)
        promises = [session.request(Ping(i), expect=Pong) for i in range(1000)]
        assert [promise.wait().value for promise in promises] == list(range(1000))
    assert asked == list(range(1000))


def nest(raw: RawPeer, levels: int, bottom: Callable[[], None]) -> None:
    """Enter that many handlers, one inside the other, and call ``bottom`` in the last."""
    reached = [0]

    @raw.session.on_message
    def deeper(note: Note) -> None:
        if note.text != "deeper":
            return
        reached[0] += 1
        if reached[0] == levels:
            bottom()
        else:
            raw.write(framed(Note("deeper")))
            raw.session.tick(20)

    raw.write(framed(Note("deeper")))
    tick_until(lambda: reached[0] == levels, raw.session)


def test_beyond_the_limit_only_replies_are_settled_and_the_rest_waits() -> None:
    with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
        at_bottom: List[Any] = []
        seen: List[str] = []

        @raw.session.on_message
        def note_it(note: Note) -> None:
            if note.text != "deeper":
                seen.append(note.text)

        def bottom() -> None:
            promise = raw.session.request(Ping(), expect=Pong)
            raw.write(framed(Note("before")), reply_bytes(promise.id, Pong("reply")), framed(Note("behind")))
            at_bottom.append(promise.wait().value)
            raw.session.tick()
            peer.tick(0)
            at_bottom.extend(seen)

        nest(raw, 32, bottom)
        assert at_bottom == ["reply"], "a message was dispatched below the nesting limit"
        tick_until(lambda: len(seen) == 2, peer)
        assert seen == ["before", "behind"]


def test_just_above_the_limit_everything_is_dispatched() -> None:
    with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
        at_bottom: List[str] = []
        seen: List[str] = []

        @raw.session.on_message
        def note_it(note: Note) -> None:
            if note.text != "deeper":
                seen.append(note.text)

        def bottom() -> None:
            raw.write(framed(Note("x")))
            raw.session.tick(20)
            at_bottom.extend(seen)

        nest(raw, 31, bottom)
        assert at_bottom == ["x"]


def test_beyond_the_limit_a_wait_ends_when_the_stream_does() -> None:
    with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
        errors: List[BaseException] = []
        waited: List[float] = []

        def bottom() -> None:
            promise = raw.session.request(Ping(), timeout=3)
            raw.sock.close()
            with CpuMeter() as meter:
                try:
                    promise.wait()
                except Exception as exc:
                    errors.append(exc)
            waited.append(meter.cpu)

        nest(raw, 32, bottom)
        assert [type(error) for error in errors] == [StreamClosedError]
        assert waited[0] < 0.5


@pytest.mark.slow
def test_beyond_the_limit_a_wait_still_times_out_without_spinning() -> None:
    with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
        errors: List[BaseException] = []
        meters: List[CpuMeter] = []

        def bottom() -> None:
            raw.write(framed(Note("waits")))
            promise = raw.session.request(Ping(), timeout=0.2)
            with CpuMeter() as meter:
                try:
                    promise.wait()
                except Exception as exc:
                    errors.append(exc)
            meters.append(meter)
            with CpuMeter() as meter:
                peer.tick(0.2)
            meters.append(meter)

        nest(raw, 32, bottom)
        assert [type(error) for error in errors] == [RequestTimeoutError]
        assert all(meter.cpu < IDLE for meter in meters), [meter.cpu for meter in meters]


def test_nested_deadlines_are_each_their_own(raw: RawPeer) -> None:
    clock = set_clock(raw.session.peer, FakeClock())
    outer = raw.session.request(Ping(), timeout=10)
    errors: List[BaseException] = []

    @raw.session.on_message
    def handler(note: Note) -> None:
        clock.now += 20  # beyond the outer deadline
        inner = raw.session.request(Ping(), timeout=30, expect=Pong)
        raw.write(reply_bytes(inner.id, Pong("inner")))
        assert inner.wait().value == "inner"

    raw.write(framed(Note()))
    with pytest.raises(RequestTimeoutError):
        outer.wait()
    assert errors == []


# -- as a part of another loop


def test_fileno_is_readable_just_when_there_is_something_to_do(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        poller = select.poll()
        poller.register(peer.fileno(), select.POLLIN)
        assert peer.fileno() == peer.fileno()
        assert poller.poll(0) == []
        raw.write(framed(Note()))
        assert poller.poll(20000)
        assert peer.tick() == 1
        assert poller.poll(0) == []


def test_fileno_tells_of_what_is_left_in_an_inbox(peer: IpcPeer) -> None:
    # No descriptor is ready any more, but a message has been read and not dispatched.
    with RawPeer(peer) as raw:
        fd = peer.fileno()
        raw.write(framed(Note("1")), framed(Note("2")), framed(Note("3")))
        assert raw.session.receive(20) == Note("1")
        assert select.select([fd], [], [], 0)[0]
        assert peer.tick() == 2
        assert not select.select([fd], [], [], 0)[0]


def test_fileno_after_a_handler_has_raised(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        fd = peer.fileno()

        @raw.session.on_message
        def fails(note: Note) -> None:
            if note.text == "1":
                raise LookupError

        raw.write(framed(Note("1")), framed(Note("2")))
        with pytest.raises(LookupError):
            peer.tick(20)
        assert select.select([fd], [], [], 0)[0]
        assert peer.tick() == 1
        assert not select.select([fd], [], [], 0)[0]


def test_select_poll_as_the_outer_loop_carries_a_conversation() -> None:
    with IpcPeer(timeout=20) as one, IpcPeer(timeout=20) as two:
        a, b = socket_peers(one, two)
        b.on_request(lambda ping: Pong(ping.value))
        seen: List[Any] = []
        b.on_message(lambda note: seen.append(note.text))
        poller = select.poll()
        peers = {one.fileno(): one, two.fileno(): two}
        for fd in peers:
            poller.register(fd, select.POLLIN)
        # More than the sockets hold, so the output has to be driven by the loop, too.
        promise = a.request(Ping(b"x" * 900000), expect=Pong)
        for index in range(50):
            a.notify(Note(str(index)))
        turns = 0
        end = time.monotonic() + 20
        while not (promise.done and len(seen) == 50):
            assert time.monotonic() < end
            ready = poller.poll(5000)
            assert ready, "nothing is ready though the conversation is not over"
            for fd, _ in ready:
                turns += 1
                peers[fd].tick()
        assert len(promise.wait().value) == 900000 and seen == [str(i) for i in range(50)]
        assert poller.poll(0) == [] and turns < 2000


def test_fileno_of_a_closed_peer(peer: IpcPeer) -> None:
    peer.fileno()
    peer.close()
    with pytest.raises(RuntimeError):
        peer.fileno()


def test_descriptors_are_not_inherited(peer: IpcPeer) -> None:
    before = set(os.listdir("/dev/fd"))
    peer.create_session_pair()
    peer.fileno()
    after = set(os.listdir("/dev/fd"))
    for name in after - before:
        try:
            assert not os.get_inheritable(int(name))
        except OSError:
            pass  # the listing's own


def test_values_of_a_burst_are_all_there_in_one_or_few_ticks(raw: RawPeer) -> None:
    seen: List[Any] = []
    raw.session.on_message(seen.append)
    raw.write(*(framed(Note(str(index))) for index in range(200)))
    assert raw.session.tick(20) + raw.session.tick() == 200
    assert values(seen) == [str(index) for index in range(200)]


# -- waits inside handlers, half-closed streams, closed peers


@pytest.mark.matrix
@pytest.mark.parametrize("call", ["wait", "flush"])
def test_wait_inside_a_handler_does_not_spin_after_fileno(raw: RawPeer, call: str) -> None:
    peer = raw.session.peer
    peer.fileno()
    raw.session.notify(Note(data=bytes(900_000)))
    meters: List[CpuMeter] = []
    seen: List[str] = []

    @raw.session.on_message
    def waits(note: Note) -> None:
        seen.append(note.text)
        if note.text == "first":
            with CpuMeter() as meter, pytest.raises(TimeoutError):
                if call == "wait":
                    raw.session.request(Ping()).wait(WAIT)
                else:
                    raw.session.flush(WAIT)
            meters.append(meter)

    raw.write(framed(Note("first")), framed(Note("second")))
    with pytest.raises(TimeoutError):
        raw.session.flush(0.01)  # both stand in the inbox now, so the descriptor is readable
    assert select.select([peer.fileno()], [], [], 0)[0]
    while len(seen) < 2:
        peer.tick(0)
    (meter,) = meters
    assert meter.real >= WAIT and not meter.spins


def test_half_closed_stream_that_is_not_read_blocks_no_tick(peer: IpcPeer) -> None:
    clock = set_clock(peer, FakeClock())  # it stands still, so the second that the queue has is as long as it takes
    with RawPeer(peer) as raw:
        raw.session.notify(Note("queued", bytes(900_000)))
        raw.sock.shutdown(socket.SHUT_WR)
        with CpuMeter() as meter:
            for _ in range(20):
                assert peer.tick(0) == 0 and raw.session.tick(0) == 0
        assert meter.real < 5
        assert raw.session.queued_bytes
        clock.now += 0.9
        data = b""
        while raw.session.queued_bytes:
            data += raw.read()
            peer.tick(0)
        data += raw.read()
        assert unframe(data) == [Note("queued", bytes(900_000))]
        tick_until(lambda: not raw.session.is_open, peer)


def test_half_closed_stream_that_nobody_reads_ends_after_its_second(peer: IpcPeer) -> None:
    clock = set_clock(peer, FakeClock())
    with RawPeer(peer) as raw:
        raw.session.notify(Note("queued", bytes(900_000)))
        raw.sock.shutdown(socket.SHUT_WR)
        for _ in range(3):
            peer.tick(0)
        assert raw.session.queued_bytes
        clock.now += 1.1
        for _ in range(3):
            peer.tick(0)
        assert not raw.session.is_open


def test_ticks_of_a_closed_peer_sleep_and_return_zero(peer: IpcPeer) -> None:
    peer.create_session_pair()
    peer.close()
    assert peer.tick(0) == 0 and peer.tick() == 0 and peer.tick_for(0) == 0
    for call in (peer.tick, peer.tick_for):
        with CpuMeter() as meter:
            assert call(WAIT) == 0
        assert WAIT <= meter.real < 5 and not meter.spins
    with pytest.raises(StreamClosedError):
        peer.tick(None)


@pytest.mark.parametrize("seconds", [math.inf, 1e12])
def test_tick_of_a_closed_peer_takes_any_number(peer: IpcPeer, seconds: float) -> None:
    peer.close()

    def ring(*_: Any) -> None:
        raise Interruption

    old = signal.signal(signal.SIGALRM, ring)
    try:
        with pytest.raises(Interruption):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            peer.tick(seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.matrix
@pytest.mark.parametrize("fileno", [False, True])
def test_handler_that_closes_the_peer_inside_tick_for(peer: IpcPeer, fileno: bool) -> None:
    with RawPeer(peer) as raw:
        if fileno:
            peer.fileno()
        raw.session.on_message(lambda note: peer.close())
        raw.write(framed(Note()), framed(Note()))
        with CpuMeter() as meter:
            assert peer.tick_for(WAIT) == 1
        assert WAIT <= meter.real < 5 and not meter.spins
        assert "closed" in repr(peer) and not raw.session.is_open


def test_a_timeout_that_nesting_may_have_caused_says_so(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("depth", 1, monkeypatch)
    texts: List[str] = []
    a, b = peer.create_session_pair()

    @b.on_request
    def ask_back(request: Ping) -> Pong:
        try:
            b.request(Ping(), timeout=0.05).wait()
        except TimeoutError as exc:
            texts.append(str(exc))
        return Pong()

    a.request(Ping(), expect=Pong).wait()
    assert len(texts) == 1 and "nested so deeply" in texts[0]
