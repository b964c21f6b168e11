"""wakeup(): the one method that other threads and signal handlers may call."""

import os
import signal
import sys
import threading
import time
from typing import Any, Callable, List

import pytest

from stream_ipc import IpcPeer, Listener, Session
from tests.helpers import WAIT, CpuMeter, RawPeer, framed, reply_bytes
from tests.messages import Note, Ping, Pong


class Caller:
    """Calls a function in another thread a moment later."""

    def __init__(self, function: Callable[[], Any], seconds: float = WAIT) -> None:
        self._thread = threading.Timer(seconds, function)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._thread.join()


@pytest.mark.parametrize(
    ("of", "timeout"),
    [
        ("peer", None),
        ("session", 20),
        pytest.param("peer", 20, marks=pytest.mark.slow),
        pytest.param("session", None, marks=pytest.mark.slow),
    ],
)
def test_tick_returns_when_another_thread_says_so(peer: IpcPeer, raw: RawPeer, of: str, timeout: Any) -> None:
    tick = peer.tick if of == "peer" else raw.session.tick
    with CpuMeter() as meter, Caller(peer.wakeup):
        assert tick(timeout) == 0
    assert WAIT / 2 < meter.real < 5 and not meter.spins
    with CpuMeter() as meter:
        assert tick(WAIT) == 0  # it counts once
    assert meter.real >= WAIT


def test_wakeup_before_the_tick_counts_once(peer: IpcPeer, raw: RawPeer) -> None:
    for _ in range(70_000 if sys.platform == "linux" else 1000):  # more than a pipe holds
        peer.wakeup()
    with CpuMeter() as meter:
        assert peer.tick(20) == 0
    assert meter.real < 5
    with CpuMeter() as meter:
        assert peer.tick(WAIT) == 0
    assert meter.real >= WAIT


def test_a_tick_that_is_woken_dispatches_what_is_there(peer: IpcPeer, raw: RawPeer) -> None:
    seen: List[Any] = []
    raw.session.on_message(seen.append)
    raw.write(framed(Note("a")), framed(Note("b")))
    peer.wakeup()
    assert peer.tick(None) == 2 and len(seen) == 2


def test_tick_of_a_peer_with_nothing_open(peer: IpcPeer) -> None:
    with CpuMeter() as meter, Caller(peer.wakeup):
        assert peer.tick(20) == 0
    assert meter.real < 5


def test_tick_for_ends(peer: IpcPeer, raw: RawPeer) -> None:
    raw.write(framed(Note()))
    with CpuMeter() as meter, Caller(peer.wakeup):
        assert peer.tick_for(20) == 1
    assert WAIT / 2 < meter.real < 5


@pytest.mark.slow
def test_waits_go_on_and_the_next_tick_returns(peer: IpcPeer, raw: RawPeer) -> None:
    promise = raw.session.request(Ping(), expect=Pong)
    with Caller(peer.wakeup, 0.05), Caller(lambda: raw.write(reply_bytes(promise.id, Pong(1))), 0.15):
        assert promise.wait() == Pong(1)
    with CpuMeter() as meter:
        peer.tick(20)
    assert meter.real < 5
    with Caller(peer.wakeup, 0.05), Caller(lambda: raw.write(framed(Note("x"))), 0.15):
        assert raw.session.receive(20) == Note("x")
    assert peer.tick(0) == 0
    with CpuMeter() as meter, Caller(peer.wakeup, 0.05), pytest.raises(TimeoutError):
        raw.session.receive(0.2)
    assert 0.2 <= meter.real < 5 and meter.cpu < 0.05


def test_flush_goes_on(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        raw.session.notify(Note("x" * 600_000))
        assert raw.session.queued_bytes
        with CpuMeter() as meter, Caller(peer.wakeup, WAIT / 3), pytest.raises(TimeoutError):
            raw.session.flush(WAIT)
        assert meter.real >= WAIT

        def read() -> None:
            while raw.read() or raw.session.queued_bytes:
                time.sleep(0.001)

        with Caller(peer.wakeup, 0.01), Caller(read, WAIT):
            raw.session.flush(20)
        assert not raw.session.queued_bytes


def test_connect_goes_on(peer: IpcPeer, tmp_path: Any) -> None:
    sessions: List[Session] = []
    with peer.listen(("127.0.0.1", 0), sessions.append) as listener:
        assert isinstance(listener, Listener)
        peer.wakeup()
        session = peer.connect(listener.address)
        peer.tick(20)  # woken, or the connection: no hang in either case
        session.close()


def test_several_peers_in_one_wait(raw: RawPeer) -> None:
    from stream_ipc import gather

    with IpcPeer(timeout=20) as other, RawPeer(other) as second:
        promises = [raw.session.request(Ping()), second.session.request(Ping())]
        raw.write(reply_bytes(promises[0].id, Pong()))
        with Caller(other.wakeup, 0.01), Caller(lambda: second.write(reply_bytes(promises[1].id, Pong())), WAIT):
            gather(promises)
        with CpuMeter() as meter:
            other.tick(20)
        assert meter.real < 5


def test_fileno_becomes_readable(peer: IpcPeer, raw: RawPeer) -> None:
    import select

    fd = peer.fileno()
    peer.tick(0)
    assert not select.select([fd], [], [], 0)[0]
    peer.wakeup()
    assert select.select([fd], [], [], 5)[0]
    assert peer.tick(0) == 0
    assert not select.select([fd], [], [], 0)[0]


def test_signal_handler_ends_a_loop(peer: IpcPeer, raw: RawPeer) -> None:
    stop: List[int] = []

    def handler(number: int, frame: Any) -> None:
        stop.append(number)
        peer.wakeup()

    old = signal.signal(signal.SIGTERM, handler)
    try:
        with CpuMeter() as meter, Caller(lambda: os.kill(os.getpid(), signal.SIGTERM)):
            while not stop:
                peer.tick(None)
        assert meter.real < 5
    finally:
        signal.signal(signal.SIGTERM, old)


def test_signals_at_any_time(peer: IpcPeer, raw: RawPeer) -> None:
    # Also between the look at the flag and the poll: each tick must return.
    def handler(number: int, frame: Any) -> None:
        peer.wakeup()

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0007)
    try:
        with CpuMeter() as meter:
            for _ in range(80):
                peer.tick(None)
        assert meter.real < 20
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    peer.tick(0)


def test_closed_and_forked_peers_ignore_it(raw: RawPeer) -> None:
    peer = raw.session.peer
    pid = os.fork()
    if pid == 0:
        try:
            peer.wakeup()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    with CpuMeter() as meter:
        peer.tick(WAIT)
    assert meter.real >= WAIT, "the fork has woken its parent"
    peer.close()
    peer.wakeup()


@pytest.mark.slow
def test_threads_that_call_it_while_the_peer_closes() -> None:
    # No byte may go into a file that got the number of the pipe.
    for _ in range(20):
        peer = IpcPeer()
        stop: List[bool] = []

        def call(peer: IpcPeer = peer, stop: List[bool] = stop) -> None:
            while not stop:
                peer.wakeup()

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        peer.tick(0.001)
        peer.close()
        pairs = [os.pipe() for _ in range(4)]
        time.sleep(0.001)
        stop.append(True)
        for thread in threads:
            thread.join()
        for read_fd, write_fd in pairs:
            os.close(write_fd)
            assert os.read(read_fd, 1) == b""
            os.close(read_fd)
