"""Calls that come in the middle of another: from signal handlers, finalizers and the constructors of messages."""

import logging
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any, Callable, Iterator, List, Type

import pytest

from stream_ipc import (
    DeferredReply,
    InvalidStreamError,
    IpcError,
    IpcPeer,
    Message,
    RequestTimeoutError,
    ResponseEnvelope,
    Session,
    StreamClosedError,
    as_completed,
    gather,
)
from tests.helpers import (
    WAIT,
    CallAt,
    CallAtJump,
    CpuMeter,
    FakeClock,
    RawPeer,
    drop_queued,
    framed,
    nothing_in_a_batch,
    nothing_to_dispatch,
    places_apart,
    reply_bytes,
    request_bytes,
    run_python,
    set_clock,
    socket_of,
    tick_until,
    unframe,
    values,
)
from tests.messages import Note, Ping, Pong
from tests.os_helpers import spins

ENOUGH = 4


def at_every_place(scenario: Callable[[int], CallAt], few: bool = False) -> None:
    """Run a scenario with a call at its first place, at its second, and so on until there is no further.

    Where not everything runs, six of seven places are left out, unless there are few.
    """
    failures: List[str] = []
    apart = 1 if few else places_apart()
    number = 1 - apart
    while len(failures) < ENOUGH:
        number += apart
        where: List[CallAt] = []
        try:
            call = scenario(number)
            where.append(call)
            if not call.hit:
                break
        except Exception:
            failures.append(f"place {number}: {traceback.format_exc()[-2000:]}")
    assert not failures, "\n".join(failures)
    assert number > (3 if few else 10)


# -- sending


@pytest.mark.parametrize("small", [False, True])
def test_a_send_in_the_middle_of_another(small: bool) -> None:
    def scenario(number: int) -> CallAt:
        with IpcPeer(timeout=20) as peer, RawPeer(peer, small=small) as raw:
            session = raw.session
            between = CallAt(number, lambda *args: session.notify(Note("between")))
            texts = ["first" * (5000 if small else 1), "second"]
            with between:
                for text in texts:
                    session.notify(Note(text))
            data = raw.read()
            while session.queued_bytes:
                peer.tick()
                data += raw.read()
            found = values(unframe(data))
            assert [text for text in found if text != "between"] == texts
            assert found.count("between") == int(between.hit)
            return between

    at_every_place(scenario)


def test_a_send_in_the_middle_of_a_flush() -> None:
    def scenario(number: int) -> CallAt:
        with IpcPeer(timeout=20) as peer, RawPeer(peer, small=True) as raw:
            session = raw.session
            texts = ["x" * 20_000, "y" * 20_000, "z"]
            for text in texts:
                session.notify(Note(text))
            between = CallAt(number, lambda *args: session.notify(Note("between")))
            set_clock(peer, FakeClock())  # the check that finds what was left behind never comes
            data = b""
            for _ in range(100):
                data += raw.read()
                with between:
                    peer.tick()
            assert not session.queued_bytes, f"after a send at {between.where}"
            data += raw.read()
            found = values(unframe(data))
            assert [text for text in found if text != "between"] == texts
            assert found.count("between") == int(between.hit)
            return between

    at_every_place(scenario)


def test_closing_in_the_middle_of_a_send() -> None:
    def scenario(number: int) -> CallAt:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            session = raw.session
            between = CallAt(number, lambda *args: session.close())
            try:
                with between:
                    session.notify(Note("first"))
                    session.request(Ping())
            except StreamClosedError:
                pass
            assert session.is_open != between.hit
            if between.hit:
                assert session not in peer.sessions and nothing_to_dispatch(peer)
            return between

    at_every_place(scenario)


def test_a_flush_in_the_middle_of_a_write_is_refused(peer: IpcPeer) -> None:
    refused: List[str] = []
    with RawPeer(peer, small=True) as raw:
        session = raw.session

        def flush(*args: Any) -> None:
            try:
                session.flush(0)
            except (RuntimeError, TimeoutError) as exc:
                refused.append(type(exc).__name__)

        session.notify(Note("x" * 50_000))
        for number in range(1, 60, places_apart()):
            raw.read()
            with CallAt(number, flush):
                peer.tick()
            session.notify(Note("x" * 20_000))
        assert "RuntimeError" in refused
        data = b""
        while session.queued_bytes:
            data += raw.read()
            peer.tick()


# -- receiving


@dataclass
class Busy(Message):
    """Its constructor does something else, while it is being decoded."""

    number: int

    def __post_init__(self) -> None:
        if Busy.action is not None:
            Busy.action()


Busy.action = None  # type: ignore[attr-defined]


@pytest.fixture
def action() -> Iterator[Callable[[Any], None]]:
    def set_action(function: Any) -> None:
        Busy.action = function  # type: ignore[attr-defined]

    yield set_action
    Busy.action = None  # type: ignore[attr-defined]


def busy_frames(count: int) -> List[bytes]:
    return [framed(Busy(number)) for number in range(count)]


def test_a_constructor_that_ticks_or_waits(peer: IpcPeer, action: Any) -> None:
    frames = busy_frames(3)
    seen: List[int] = []
    built: List[int] = []
    with RawPeer(peer) as raw, RawPeer(peer) as other:
        raw.session.on_message(lambda busy: seen.append(busy.number))

        def work() -> None:
            built.append(1)
            peer.tick(0)
            raw.session.tick(0)
            with pytest.raises(TimeoutError):
                other.session.request(Ping()).wait(0)

        action(work)
        raw.write(*frames)
        tick_until(lambda: len(seen) == 3, peer)
        assert seen == [0, 1, 2]
        assert len(built) == 3
        action(None)
        raw.write(*busy_frames(1))
        assert peer.tick(20) == 1  # it is read from again


def test_a_constructor_that_waits_burns_no_time(peer: IpcPeer, action: Any) -> None:
    frames = busy_frames(1)
    seen: List[int] = []
    spinning: List[bool] = []
    with RawPeer(peer) as raw:
        raw.session.on_message(lambda message: seen.append(1))

        def wait() -> None:
            # What comes meanwhile makes the descriptor ready, though nothing may be read now.
            raw.write(framed(Note("more")))
            spinning.append(spins(lambda: peer.tick_for(WAIT)))

        action(wait)
        raw.write(*frames, framed(Note("behind")))
        tick_until(lambda: len(seen) == 3, peer)
    assert spinning == [False]


def test_a_constructor_that_sends_to_a_full_session(peer: IpcPeer, action: Any) -> None:
    frames = busy_frames(3)
    seen: List[int] = []
    peer.timeout = 0.02
    with RawPeer(peer) as raw, RawPeer(peer, small=True) as full:
        raw.session.on_message(lambda busy: seen.append(busy.number))
        full.session.notify(Note("x" * 2_000_000))

        def send() -> None:
            try:
                full.session.notify(Note("y"))
            except TimeoutError:
                pass

        action(send)
        raw.write(*frames)
        tick_until(lambda: len(seen) == 3, peer)
        action(None)
        assert seen == [0, 1, 2]
        drop_queued(full.session)


@pytest.mark.parametrize("what", ["close", "remove", "peer"])
def test_a_constructor_that_closes(peer: IpcPeer, action: Any, what: str) -> None:
    frames = busy_frames(2)
    seen: List[int] = []
    with RawPeer(peer) as raw:
        raw.session.on_message(seen.append)
        actions = {
            "close": raw.session.close,
            "remove": lambda: peer.remove_session(raw.session),
            "peer": peer.close,
        }
        action(actions[what])
        raw.write(*frames)
        peer.tick(0)
        action(None)
        peer.tick(0)
        assert not raw.session.is_open and seen == [] and nothing_to_dispatch(peer)
        raw.session.transport.close()  # removing leaves it open


def test_a_constructor_that_sends_to_a_side_that_is_gone(peer: IpcPeer, action: Any) -> None:
    frames = busy_frames(2)
    seen: List[Any] = []
    with RawPeer(peer) as raw:
        raw.session.on_message(lambda message: seen.append(getattr(message, "number", message)))

        def send() -> None:
            try:
                raw.session.notify(Note("x"))
            except StreamClosedError:
                pass

        action(send)
        raw.write(*frames, framed(Note("last")))
        raw.sock.close()
        tick_until(lambda: not raw.session.is_open, peer)
        assert seen == [0, 1, Note("last")]


# -- settling


def test_cancelling_while_the_reply_is_settled() -> None:
    def scenario(number: int) -> CallAt:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            promise = raw.session.request(Ping(), expect=Pong)
            other = raw.session.request(Ping(), expect=Pong)
            called: List[str] = []
            cancelled: List[bool] = []
            promise.add_done_callback(lambda promise: called.append("before"))

            def cancel(*args: Any) -> None:
                cancelled.append(promise.cancel())
                promise.add_done_callback(lambda promise: called.append("during"))

            raw.write(reply_bytes(promise.id, Pong(1)), reply_bytes(other.id, Pong(2)))
            between = CallAt(number, cancel)
            with between:
                peer.tick(0)
                peer.tick(0)
            try:
                assert promise.wait() == Pong(1) and cancelled in ([], [False])
            except IpcError:
                assert cancelled == [True]
            peer.tick(0)
            assert other.wait() == Pong(2)
            assert sorted(called) == (["before", "during"] if between.hit else ["before"])
            return between

    at_every_place(scenario)


def test_settling_while_it_is_cancelled() -> None:
    def scenario(number: int) -> CallAt:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            promise = raw.session.request(Ping(), expect=Pong)
            raw.write(reply_bytes(promise.id, Pong(1)))
            called: List[Any] = []
            promise.add_done_callback(called.append)
            between = CallAt(number, lambda *args: peer.tick(0))
            with between:
                cancelled = [promise.cancel() for _ in range(3)]
            if cancelled[0]:
                with pytest.raises(IpcError):
                    promise.wait()
            else:
                assert promise.wait() == Pong(1)
            assert not any(cancelled[1:]) and called == [promise]
            return between

    at_every_place(scenario)


def test_unregistering_a_handler_while_a_message_is_dispatched() -> None:
    def scenario(number: int) -> CallAt:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            seen: List[List[Any]] = [[], [], []]

            def first(note: Note) -> None:
                seen[0].append(note)

            def second(note: Note) -> None:
                seen[1].append(note)

            raw.session.on_message(first)
            raw.session.on_message(second)
            raw.session.on_message(seen[2].append)
            raw.write(framed(Note("a")))
            between = CallAt(number, lambda *args: raw.session.off_message(first))
            with between:
                peer.tick(0)
            raw.write(framed(Note("b")))
            peer.tick(0)
            assert seen[1] == seen[2] == [Note("a"), Note("b")]
            assert seen[0] in ([[], [Note("a")]] if between.hit else [[Note("a"), Note("b")]])
            return between

    at_every_place(scenario)


BESIDE = "receive beside another session"


@pytest.mark.parametrize(
    ("call", "act"),
    [
        pytest.param(call, act, marks=[pytest.mark.slow] if call not in ("gather", BESIDE) and act != "tick" else [])
        for call in ("gather", "as_completed", "receive", BESIDE, "overdue")
        for act in ("tick", "close", "remove", "close the peer")
    ],
)
@pytest.mark.usefixtures("closed_streams_are_noticed_soon")
def test_a_signal_handler_that_turns_or_closes_while_something_is_waited_for(call: str, act: str) -> None:
    def scenario(number: int) -> CallAt:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            session, transport = raw.session, raw.session.transport
            if call == BESIDE:
                peer.create_session_pair()
            promises = [session.request(Ping(index), expect=Pong) for index in range(3)]
            called: List[Any] = []
            for promise in promises:
                promise.add_done_callback(called.append)
            raw.write(framed(Note("a")), *[reply_bytes(promise.id, Pong()) for promise in promises], framed(Note("b")))
            acts = {
                "tick": lambda: peer.tick(0),
                "close": lambda: session.close(0),
                "remove": lambda: peer.remove_session(session),
                "close the peer": lambda: peer.close(0),
            }
            between = CallAt(number, lambda *args: acts[act]())
            try:
                with between:
                    if call == "gather":
                        assert gather(promises) == [Pong()] * 3
                    elif call == "as_completed":
                        assert len(list(as_completed(promises))) == 3
                    elif call == "overdue":
                        with pytest.raises(RequestTimeoutError):
                            session.request(Ping(), timeout=0).wait()
                    else:
                        assert [session.receive(), session.receive()] == [Note("a"), Note("b")]
            except StreamClosedError:
                assert act != "tick"
            peer.tick(0)
            assert all([promise.settled for promise in promises])
            assert sorted(map(promises.index, called)) == [0, 1, 2]
            if not peer.sessions:
                with pytest.raises(StreamClosedError):
                    peer.tick(None)  # or a loop around it would never end
            transport.close()  # removing leaves it open
            return between

    at_every_place(scenario)


# -- closing


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("peer.tick(None)", "0"),
        ("peer.tick(20)", "0"),
        ("session.receive()", "StreamClosedError"),
        ("promise.wait()", "StreamClosedError"),
        ("peer.tick_for(0.3)", "0"),
        ("gather([promise])", "StreamClosedError"),
        ("next(as_completed([promise])).wait()", "StreamClosedError"),
    ],
)
def test_closing_the_peer_in_a_signal_handler(call: str, result: str) -> None:
    code = f"""
import signal, socket
from stream_ipc import *
from tests.messages import Ping
peer = IpcPeer()
a, b = socket.socketpair()
session = peer.create_socket_session(a)
promise = session.request(Ping())
signal.signal(signal.SIGALRM, lambda *_: peer.close())
signal.setitimer(signal.ITIMER_REAL, 0.05)
try:
    print({call})
except Exception as exc:
    print(type(exc).__name__)
b.close()
"""
    done = run_python(code)
    assert (done.stdout, done.stderr) == (f"{result}\n", "")


def test_an_interruption_while_closing_writes(peer: IpcPeer) -> None:
    closed: List[Session] = []
    with RawPeer(peer, small=True) as raw:
        session = raw.session
        session.on_close(closed.append)
        promise = session.request(Note("x" * 2_000_000), timeout=None)

        def interrupt(*_: Any) -> None:
            if not session.is_open:
                raise KeyboardInterrupt
            signal.setitimer(signal.ITIMER_REAL, 0.05)  # closing has not begun yet, on a busy machine

        old = signal.signal(signal.SIGALRM, interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                session.close()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        assert not session.is_open
        with pytest.raises(StreamClosedError, match="this side closed"):
            promise.wait()
        peer.tick(0)
        assert closed == [session] and session not in peer.sessions


class WaitingStream:
    """Takes nothing, and in a write while its session is being closed waits for what is pending, and for what happens."""

    def __init__(self, write: int) -> None:
        self.writes_left = write
        self.session: Any = None
        self.promises: List[Any] = []
        self.got: List[Any] = []

    def read(self, size: int) -> None:
        return None

    def write(self, data: Any) -> None:
        if not self.promises or self.session.is_open:
            return
        self.writes_left -= 1
        if self.writes_left:
            return
        calls = [self.promises[0].wait, lambda: gather(self.promises), lambda: next(as_completed(self.promises)).wait()]
        for call in (*calls, self.tick, self.session.receive):
            try:
                self.got.append(call())
            except StreamClosedError as exc:
                self.got.append(type(exc))

    def tick(self) -> None:
        while True:
            self.session.peer.tick(None)

    def close(self) -> None:
        pass


@pytest.mark.matrix
@pytest.mark.parametrize("write", [1, 2])
@pytest.mark.parametrize("how", ["session", "peer", "removed"])
def test_what_waits_while_closing_writes_is_told_at_once(how: str, write: int) -> None:
    stream = WaitingStream(write)
    told: List[Any] = []
    with IpcPeer(timeout=None) as peer:
        stream.session = session = peer.create_stream_session(stream, stream)
        stream.promises = [session.request(Ping()) for _ in range(3)]
        for promise in stream.promises:
            promise.add_done_callback(told.append)
        if how == "session":
            session.close(timeout=0.01)
        elif how == "peer":
            peer.close(timeout=0.01)
        else:
            peer.remove_session(session)
        assert stream.got == [StreamClosedError] * 5
        assert told == stream.promises
        text = "this side removed the session" if how == "removed" else "this side closed the"
        for promise in stream.promises:
            with pytest.raises(StreamClosedError, match=text):
                promise.wait()


def test_a_handler_that_closes_and_is_interrupted(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()

    @b.on_request
    def close(request: Ping) -> Pong:
        b.close()
        raise KeyboardInterrupt

    a.request(Ping())
    with pytest.raises(KeyboardInterrupt):
        tick_until(lambda: False, peer)
    peer.tick(0)
    assert nothing_to_dispatch(peer) and b not in peer.sessions


def test_removing_a_session_writes_what_is_queued(peer: IpcPeer) -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.setblocking(False)
    with ours, theirs:
        session = peer.create_socket_session(ours)
        session.notify(Note("x" * 30_000))
        assert session.queued_bytes
        data: List[bytes] = []

        def take(*_: Any) -> None:  # the other side reads while the session is being removed
            try:
                data.append(theirs.recv(1 << 20))
            except BlockingIOError:
                pass

        old = signal.signal(signal.SIGALRM, take)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            peer.remove_session(session)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        take()
        assert unframe(b"".join(data)) == [Note("x" * 30_000)]


# -- forks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_copy_of_a_handler_that_forks_comes_out_of_the_call(peer: IpcPeer) -> None:
    seen: List[str] = []
    forked: List[int] = []
    errors: List[str] = []
    read, write = os.pipe()
    with RawPeer(peer) as raw:

        @raw.session.on_message
        def fork(note: Note) -> None:
            seen.append(note.text)
            if note.text == "fork":
                forked.append(os.fork())

        raw.write(framed(Note("fork")), framed(Note("behind")))
        try:
            peer.tick(20)
        except RuntimeError as exc:
            errors.append(str(exc))
        finally:
            if forked == [0]:
                os.write(write, f"{seen} {errors}".encode())
                os._exit(0)
        os.waitpid(forked[0], 0)
        text = os.read(read, 4096).decode()
        os.close(read)
        os.close(write)
        assert text.startswith("['fork'] ['this IpcPeer belongs to the process that made it")
        tick_until(lambda: seen == ["fork", "behind"], peer)
        assert errors == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_copy_of_a_handler_that_forks_answers_nothing(peer: IpcPeer) -> None:
    forked: List[int] = []
    a, b = peer.create_session_pair()

    @b.on_request
    def fork(request: Ping) -> Pong:
        forked.append(os.fork())
        if forked[0]:
            os.waitpid(forked[0], 0)
        return Pong(forked[0])

    try:
        reply = a.request(Ping(), expect=Pong).wait()
    except RuntimeError:
        pass
    finally:
        if forked == [0]:
            os._exit(0)
    assert reply == Pong(forked[0])
    assert peer.tick(0) == 0  # there is no second one


# -- streams that their owner closes


def test_a_closed_stream_is_found_though_another_session_is_busy(peer: IpcPeer) -> None:
    errors: List[Any] = []
    read, write = os.pipe()
    back, forth = os.pipe()
    closed = peer.create_stream_session(forth, read)
    closed.on_exception(lambda error: errors.append(error))
    a, b = peer.create_session_pair()

    @b.on_message
    def again(note: Note) -> None:
        b.notify(note)

    @a.on_message
    def and_again(note: Note) -> None:
        a.notify(note)

    a.notify(Note("to and fro"))
    os.close(read)
    end = time.monotonic() + 10
    while not errors and time.monotonic() < end:
        peer.tick(1)
    assert [type(error) for error in errors] == [InvalidStreamError]
    for fd in (write, back):
        os.close(fd)


@pytest.mark.parametrize("waiting", [0, 1, 2])
def test_a_stream_that_its_owner_closes_while_its_queue_is_long(peer: IpcPeer, waiting: int) -> None:
    errors: List[Any] = []
    clock = set_clock(peer, FakeClock())
    with RawPeer(peer) as raw:
        session = raw.session
        session.on_request(lambda ping: Pong("x" * 3_000_000))
        session.on_exception(errors.append)
        raw.write(*[request_bytes(str(index), Ping()) for index in range(1 + waiting)])
        session.tick(0)
        assert session.queued_bytes > 1_000_000
        socket_of(session).close()
        for _ in range(5):
            clock.now += 1
            peer.tick(0)
        assert [type(error) for error in errors] == [InvalidStreamError] and not session.is_open
        assert "was closed while a session was using it" in str(errors[0])


def test_keeping_a_session_whose_stream_is_gone_changes_nothing(peer: IpcPeer) -> None:
    calls: List[Any] = []
    read, write = os.pipe()
    back, forth = os.pipe()
    session = peer.create_stream_session(forth, read)

    @session.on_exception
    def keep(error: Any) -> bool:
        calls.append(error)
        return False

    os.close(read)
    tick_until(lambda: not session.is_open, peer)
    with CpuMeter() as meter:
        peer.tick_for(WAIT)
    assert len(calls) == 1 and not meter.spins
    for fd in (write, back):
        os.close(fd)


@pytest.mark.matrix
@pytest.mark.parametrize("embedded", [False, True])
def test_a_closed_descriptor_whose_file_lives_on_elsewhere(peer: IpcPeer, embedded: bool) -> None:
    errors: List[Any] = []
    ours, theirs = socket.socketpair()
    number = ours.detach()
    copy = os.dup(number)  # as a forked process has one
    session = peer.create_stream_session(number, number)
    session.on_exception(errors.append)
    with RawPeer(peer) as raw:
        if embedded:
            peer.fileno()
        os.close(number)
        theirs.send(b"x")  # which epoll reports under the number that is gone
        with CpuMeter() as meter:
            end = time.monotonic() + 10
            while not errors and time.monotonic() < end:
                peer.tick(1)
            peer.tick_for(WAIT)
        assert [type(error) for error in errors] == [InvalidStreamError]
        assert not meter.spins
        raw.write(framed(Note("the others are still watched")))
        if embedded:
            import select

            assert select.select([peer.fileno()], [], [], 20)[0]
        assert peer.tick(20) == 1
    os.close(copy)
    theirs.close()


# -- logging


def test_a_logging_handler_that_fails_stops_nothing(peer: IpcPeer) -> None:
    closed: List[Session] = []

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            session.notify(Note(record.getMessage()))

    logger = logging.getLogger("stream_ipc")
    handler = Forward()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with RawPeer(peer) as raw:
            session = raw.session
            session.on_close(closed.append)
            session.close()
            assert closed == [session]
            peer.tick(0)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


# -- threads


def test_a_batch_of_another_thread_is_refused(peer: IpcPeer) -> None:
    import threading

    errors: List[str] = []
    a, b = peer.create_session_pair()

    def other() -> None:
        try:
            with a.batch():
                errors.append("it was let in")
        except RuntimeError as exc:
            errors.append(str(exc))

    @b.on_request
    def ask(request: Ping) -> Pong:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return Pong()

    assert a.request(Ping(), expect=Pong).wait() == Pong()
    assert len(errors) == 1 and errors[0].startswith("another thread")
    assert nothing_in_a_batch(peer)


# -- what is looked at now and then


def test_a_turn_beneath_an_inspection_leaves_no_session_unread() -> None:
    def scenario(number: int) -> CallAt:
        def arrive(*_: Any) -> None:
            raw.write(framed(Note("1")))
            peer.tick(0)

        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            got: List[Any] = []
            raw.session.on_message(got.append)
            clock = set_clock(peer, FakeClock())
            peer.tick(0)
            clock.now += 1  # an inspection is due
            with CallAt(number, arrive) as beneath:
                peer.tick(0)
            if not beneath.hit:
                arrive()
            raw.write(framed(Note("2")))
            for _ in range(3):
                peer.tick(0)
            assert values(got) == ["1", "2"]
            return beneath

    at_every_place(scenario)


# -- where code jumps


TRACES_OPCODES = pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="3.12 traces no opcodes of frames that are entered later"
)


@TRACES_OPCODES
def test_a_turn_where_code_jumps_takes_nothing_twice_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def scenario(number: int) -> CallAt:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            got: List[Any] = []
            done: List[Any] = []
            closed: List[Any] = []
            for name in "ab":
                raw.session.on_message(lambda note, name=name: got.append(name + note.text))
                raw.session.on_close(closed.append)
            raw.session.on_request(lambda ping: Pong())
            promise = raw.session.request(Ping())
            for _ in range(2):
                promise.add_done_callback(done.append)
            raw.write(
                framed(Note("1")), request_bytes("x", Ping()), framed(Note("2")), reply_bytes(promise.id, Pong()),
                framed(Note("3")),
            )  # fmt: skip
            with CallAtJump(number, lambda *_: peer.tick(0)) as jump:
                peer.tick(0)
                raw.session.close()
            assert sorted(got) == ["a1", "a2", "a3", "b1", "b2", "b3"]
            assert done == [promise, promise] and closed == [raw.session] * 2
            assert len(unframe(raw.read())) == 2  # the request and the reply
            assert not caplog.records
            return jump

    at_every_place(scenario, few=True)


@pytest.mark.parametrize("calls", [CallAt, pytest.param(CallAtJump, marks=TRACES_OPCODES)])
@pytest.mark.parametrize("of", ["a promise", "a DeferredReply"])
def test_a_turn_while_a_reply_is_deferred(calls: Type[CallAt], of: str) -> None:
    def scenario(number: int) -> CallAt:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw, RawPeer(peer) as other:
            later: List[Any] = []

            @raw.session.on_request
            def defer(ping: Ping) -> Any:
                later.append(other.session.request(ping) if of == "a promise" else DeferredReply())
                return later[-1]

            raw.write(request_bytes("x", Ping(1)))
            with calls(number, lambda *_: peer.tick(0)) as turn:
                peer.tick(0)
                if of == "a promise":
                    other.write(reply_bytes(later[0].id, Pong(2)))
                else:
                    later[0].send(Pong(2))
                peer.tick(0)
            for _ in range(2):
                peer.tick(0)
            assert unframe(raw.read()) == [ResponseEnvelope("x", Pong(2))]
            return turn

    at_every_place(scenario, few=calls is CallAtJump)
