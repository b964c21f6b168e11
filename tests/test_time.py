"""What came in time counts, whatever kept this process from reading it: whoever gives up looks once more first."""

import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, List

import pytest

from stream_ipc import IpcPeer, ResponsePromise, as_completed, gather
from tests.helpers import (
    WAIT,
    FakeClock,
    RawPeer,
    framed,
    is_settled,
    read_without_dispatching,
    received_bytes,
    reply_bytes,
    request_bytes,
    run_python,
    set_clock,
    set_limit,
    tick_until,
)
from tests.messages import Note, Ping, Pong


def by_ticks(promise: "ResponsePromise[Any]") -> Any:
    while not is_settled(promise):
        promise_peer.tick(0.05)
    return promise.wait()


promise_peer: IpcPeer

WAYS: List[Callable[["ResponsePromise[Any]"], Any]] = [
    lambda promise: promise.wait(),
    lambda promise: gather([promise])[0],
    lambda promise: next(as_completed([promise])).wait(),
    by_ticks,
]
each_way = pytest.mark.parametrize("way", WAYS, ids=["wait", "gather", "as_completed", "tick"])


@each_way
def test_a_handler_that_takes_long(raw: RawPeer, way: Callable[..., Any]) -> None:
    global promise_peer
    promise_peer = raw.session.peer
    clock = set_clock(promise_peer, FakeClock())
    promise = raw.session.request(Ping(), timeout=1, expect=Pong)

    @raw.session.on_message
    def slow(note: Note) -> None:
        clock.now += 100
        raw.write(reply_bytes(promise.id, Pong(1)))

    raw.write(framed(Note()))
    assert way(promise) == Pong(1)


@each_way
def test_behind_much_else(raw: RawPeer, way: Callable[..., Any]) -> None:
    global promise_peer
    promise_peer = raw.session.peer
    clock = set_clock(promise_peer, FakeClock())
    promise = raw.session.request(Ping(), timeout=1, expect=Pong)
    for _ in range(15):
        raw.write(framed(Note("x" * 10_000)))
    raw.write(reply_bytes(promise.id, Pong(1)))
    clock.now += 100
    assert way(promise) == Pong(1)


@each_way
def test_a_reply_that_is_larger_than_the_stream(
    raw: RawPeer, way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other side could only write as much as this process read.
    global promise_peer
    set_limit("last look pause", 5, monkeypatch)  # on a busy machine its thread gets the processor late
    promise_peer = raw.session.peer
    clock = set_clock(promise_peer, FakeClock())
    promise = raw.session.request(Ping(), timeout=1, expect=Pong)
    data = reply_bytes(promise.id, Pong("x" * 2_000_000))
    raw.sock.setblocking(True)
    thread = threading.Thread(target=raw.sock.sendall, args=(data,))
    thread.start()
    while select.select([], [raw.sock], [], 0)[1]:
        time.sleep(0.001)  # until no more fits
    clock.now += 100
    try:
        assert len(way(promise).value) == 2_000_000
    finally:
        thread.join()


@each_way
def test_the_rest_of_a_reply_that_comes_once_a_turn_has_read_the_beginning(
    raw: RawPeer, way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    global promise_peer
    set_limit("last look pause", 5, monkeypatch)
    promise_peer = raw.session.peer
    clock = set_clock(promise_peer, FakeClock())
    promise = raw.session.request(Ping(), timeout=1, expect=Pong)
    data = reply_bytes(promise.id, Pong("x" * 20_000))
    raw.write(data[:10_000])

    def write_rest() -> None:
        while received_bytes(raw.session) < 10_000:
            time.sleep(0.001)
        time.sleep(0.05)  # now the last look finds nothing at first
        raw.write(data[10_000:])

    thread = threading.Thread(target=write_rest)
    thread.start()
    clock.now += 100
    try:
        assert len(way(promise).value) == 20_000
    finally:
        thread.join()


def test_a_reply_behind_a_request_that_has_to_wait(peer: IpcPeer) -> None:
    # The queue is full, so the request waits for it to drain; the reply behind it came in time all the same.
    with RawPeer(peer) as raw:
        clock = set_clock(peer, FakeClock())
        promise = raw.session.request(Ping(), timeout=1, expect=Pong)
        other = raw.session.request(Ping(), timeout=1, expect=Pong)
        raw.session.notify(Note("x" * 2_000_000))
        raw.write(request_bytes("1", Ping()), reply_bytes(promise.id, Pong(1)), reply_bytes(other.id, Pong(2)))
        clock.now += 100
        assert promise.wait() == Pong(1)
        assert gather([other]) == [Pong(2)]
        while raw.read():
            pass


def test_deep_inside_of_handlers(peer: IpcPeer) -> None:
    from tests.helpers import limit

    with RawPeer(peer) as raw:
        clock = set_clock(peer, FakeClock())
        got: List[Any] = []

        @raw.session.on_message
        def nested(note: Note) -> None:
            depth = int(note.text)
            if depth <= limit("depth"):
                raw.write(framed(Note(str(depth + 1))))
                raw.session.peer.tick(1) if depth < limit("depth") - 1 else ask()

        def ask() -> None:
            promise = raw.session.request(Ping(), timeout=1, expect=Pong)
            raw.write(reply_bytes(promise.id, Pong(1)))
            clock.now += 100
            got.append(promise.wait())

        raw.write(framed(Note("0")))
        peer.tick(1)
        tick_until(lambda: got, peer)
        assert got[0] == Pong(1)


def test_receive(raw: RawPeer) -> None:
    clock = set_clock(raw.session.peer, FakeClock())

    def slow(note: Note) -> None:
        raw.session.off_message(slow)
        clock.now += 100
        for _ in range(15):
            raw.write(framed(Note("x" * 10_000)))
        raw.write(framed(Ping(1)))

    raw.session.on_message(slow)
    raw.write(framed(Note()))
    assert raw.session.receive(1, expect=Ping) == Ping(1)


def test_receive_does_not_go_on_for_ever(raw: RawPeer) -> None:
    session = raw.session
    raw.write(framed(Note("again")))
    session.on_message(lambda note: raw.write(framed(Note("again"))))
    with pytest.raises(TimeoutError):
        session.receive(WAIT, expect=Ping)


@pytest.mark.parametrize("call", ["flush", "notify", "broadcast"])
def test_what_the_other_side_has_read(peer: IpcPeer, call: str) -> None:
    with RawPeer(peer) as raw:
        clock = set_clock(peer, FakeClock())
        raw.session.notify(Note("x" * 2_000_000))
        raw.sock.setblocking(True)

        def read() -> None:
            # The time is over before this process has written all that the other side would read.
            clock.now += 100
            while raw.sock.recv(1 << 20):
                pass

        thread = threading.Thread(target=read)
        thread.start()
        try:
            if call == "flush":
                raw.session.flush(1)
                assert raw.session.queued_bytes == 0
            elif call == "notify":
                raw.session.notify(Note("more"))
            else:
                assert peer.broadcast(Note("more")) == 1
        finally:
            raw.session.close()
            thread.join()


def test_connecting_that_was_over_in_time(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers import patch_wait_for

    with IpcPeer(timeout=20) as other, other.listen(("127.0.0.1", 0), lambda session: None) as listener:
        clock = set_clock(peer, FakeClock())

        def stopped(real: Any, fd: int, events: int, limit: Any) -> bool:
            clock.now += 100
            return bool(real(fd, events, limit))

        patch_wait_for(monkeypatch, peer, stopped)
        assert peer.connect(listener.address, timeout=1).is_open


SLAVE_REPLY = 600_000


@pytest.mark.parametrize("size", [1, SLAVE_REPLY])
@pytest.mark.slow
def test_a_process_that_was_stopped(size: int) -> None:
    code = f"""
import sys, time
from stream_ipc import IpcPeer, LogMessage
SLAVE = '''
import time
from stream_ipc import IpcPeer, LogMessage
session = IpcPeer().create_stdio_session()
@session.on_request
def work(message):
    time.sleep(0.2)
    return LogMessage("x" * {size})
while session.is_open:
    session.tick(None)
'''
with IpcPeer(timeout=20) as peer:
    slave = peer.create_command_session([sys.executable, "-c", SLAVE])
    slave.request(LogMessage("warm")).wait()
    promise = slave.request(LogMessage("x"), timeout=0.6)
    print("asked", flush=True)
    print(len(promise.wait().message), flush=True)
"""
    master = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert master.stdout is not None and master.stdout.readline() == b"asked\n"
    os.kill(master.pid, signal.SIGSTOP)
    time.sleep(1.0)
    os.kill(master.pid, signal.SIGCONT)
    said = master.stdout.read()
    master.stdout.close()
    master.wait()
    assert said.split() == [str(size).encode()]


def test_a_signal_handler_that_takes_long(raw: RawPeer) -> None:
    clock = set_clock(raw.session.peer, FakeClock())
    promise = raw.session.request(Ping(), timeout=1, expect=Pong)

    def handler(number: int, frame: Any) -> None:
        raw.write(reply_bytes(promise.id, Pong(1)))
        clock.now += 100

    old = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert promise.wait() == Pong(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


FROZEN = """
import os, sys
if sys.argv[1] == "imported before":
    import stream_ipc
from freezegun import freeze_time
with freeze_time("2030-01-01", ignore=["stream_ipc"] if sys.argv[1] == "ignored" else []):
    from stream_ipc import *
    with IpcPeer(timeout=0.2) as peer:
        a, b = peer.create_session_pair()
        b.on_request(lambda message: message if message.message != "no" else None)
        a.request(LogMessage("x")).wait()
        gather([a.request(LogMessage("x"))])
        next(as_completed([a.request(LogMessage("x"))]))
        b.notify(LogMessage("n"))
        a.receive(1)
        a.flush(1)
        with peer.listen(("127.0.0.1", 0), lambda session: None) as listener:
            peer.connect(listener.address).close()
        child = peer.create_command_session([sys.executable, "-c", "import sys; print('x', flush=True); sys.stdin.read()"])
        peer.tick(None)
        child.close()
        if sys.argv[1] != "frozen":  # what waits for a time that never comes
            peer.tick(0.1)
            peer.tick_for(0.1)
            try:
                a.receive(0.1)
            except TimeoutError:
                pass
            a.notify(LogMessage("x" * 3_000_000))
            stubborn = peer.create_command_session([sys.executable, "-c", "import os, time; os.close(1); time.sleep(60)"])
            try:
                stubborn.request(LogMessage("x"), timeout=5).wait()
            except StreamClosedError:
                pass
print("done")
"""


@pytest.mark.skipif(importlib.util.find_spec("freezegun") is None, reason="freezegun is not installed")
@pytest.mark.parametrize("how", ["frozen", "imported before", "ignored"])
def test_nothing_hangs_while_freezegun_has_stopped_the_clock(how: str) -> None:
    done = run_python(FROZEN, how, strict=False, timeout=50)
    assert done.stdout == "done\n", done.stdout + done.stderr


def test_asking_when_to_tick_does_not_begin_the_while_that_an_ended_stream_is_kept_for_what_is_queued(raw: RawPeer) -> None:
    peer = raw.session.peer
    clock = set_clock(peer, FakeClock())
    raw.session.notify(Note(data=b"x" * 2_000_000))
    raw.sock.shutdown(socket.SHUT_WR)
    read_without_dispatching(peer)  # the end
    assert peer.next_deadline() == 0.0
    clock.now += 100
    peer.tick()
    assert raw.session.is_open
    raw.read()
    peer.tick()
    assert raw.session.queued_bytes and raw.session.is_open
    clock.now += 100
    peer.tick()
    assert not raw.session.is_open
