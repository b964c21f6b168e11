"""Streams without a usable descriptor: the threads that pump them, and when there are any."""

import gc
import io
import os
import queue
import socket
import threading
import time
from typing import Any, List, Optional

import pytest

from stream_ipc import (
    InvalidStreamError,
    IpcPeer,
    PickleMessageSerializer,
    RequestTimeoutError,
    Session,
    StreamClosedError,
    StreamTransport,
)
from stream_ipc.transports import descriptors
from stream_ipc.transports import threads as threads_module
from stream_ipc.transports.base import finish
from tests.helpers import (
    PATIENCE,
    CpuMeter,
    Interruption,
    RawPeer,
    framed,
    no_pending,
    run_python,
    tick_until,
    unframe,
    values,
)
from tests.messages import Note, Ping, Pong

BOUND = 2.5  # what closing may take in the worst case: two seconds to write, of which the session has one, half to read


class Wire:
    """A blocking stream with no more than the methods that are needed; its close wakes what is blocked.

    Bytes that are put into ``incoming`` are read, an exception there is raised.
    """

    def __init__(self) -> None:
        self.incoming: queue.Queue[Any] = queue.Queue()
        self.outgoing: queue.Queue[Any] = queue.Queue()
        self.rest = b""
        self.closed_times = 0

    def read(self, size: int) -> bytes:
        if not self.rest:
            item = self.incoming.get()
            if isinstance(item, BaseException):
                raise item
            self.rest = item
        data, self.rest = self.rest[:size], self.rest[size:]
        return data

    def write(self, data: bytes) -> None:
        self.outgoing.put(data)

    def close(self) -> None:
        self.closed_times += 1
        self.incoming.put(b"")
        self.outgoing.put(b"")

    def written(self) -> bytes:
        data = b""
        while not self.outgoing.empty():
            data += self.outgoing.get()
        return data


def wires() -> List[Wire]:
    """Two wires, of which each reads what the other writes."""
    one, two = Wire(), Wire()
    one.outgoing, two.outgoing = two.incoming, one.incoming
    return [one, two]


class Stubborn(Wire):
    """Its close does not wake a blocked read."""

    def close(self) -> None:
        self.closed_times += 1


def threads() -> List[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stream_ipc")]


def join_all() -> None:
    for thread in threads():
        thread.join(PATIENCE)
    assert threads() == []


def reason_of(session: Session, peer: IpcPeer) -> StreamClosedError:
    """The error of a request that is pending when the session ends."""
    promise = session.request(Ping(), timeout=None)
    with pytest.raises(StreamClosedError) as caught:
        promise.wait()
    return caught.value


# -- conversations


@pytest.mark.parametrize("size", [0, 3 << 20])
def test_conversation_over_objects(peer: IpcPeer, size: int) -> None:
    one, two = wires()
    a, b = peer.create_stream_session(one, one), peer.create_stream_session(two, two)
    b.on_request(lambda ping: Pong(ping.value))
    seen: List[Any] = []
    b.on_message(seen.append)
    for index in range(10):
        a.notify(Note(str(index), b"x" * size))
        assert a.request(Ping(bytes(size)), expect=Pong).wait().value == bytes(size)
    assert values(seen) == [str(index) for index in range(10)]
    assert len(threads()) == 4 and all(thread.daemon for thread in threads())
    a.close()
    tick_until(lambda: two.closed_times and not threads(), peer)
    assert (one.closed_times, two.closed_times) == (1, 1) and no_pending(a, b)


def test_conversation_of_two_floods(peer: IpcPeer) -> None:
    one, two = wires()
    a, b = peer.create_stream_session(one, one), peer.create_stream_session(two, two)
    seen: List[Any] = []
    for session in (a, b):
        session.on_message(seen.append)
    for index in range(40):
        for session in (a, b):
            session.notify(Note(str(index), b"x" * 100_000))
    tick_until(lambda: len(seen) == 80, peer)


class Raw(io.RawIOBase):
    """A raw stream over a pipe that does not tell its descriptor."""

    def __init__(self, read: int, write: int) -> None:
        self.read_fd, self.write_fd = read, write

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = os.read(self.read_fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        return os.write(self.write_fd, bytes(data)[:1000])

    def close(self) -> None:
        if not self.closed:
            os.close(self.write_fd)
        super().close()


@pytest.mark.parametrize("kind", ["raw", "buffered", "text"])
def test_file_objects_without_a_descriptor(monkeypatch: pytest.MonkeyPatch, peer: IpcPeer, kind: str) -> None:
    monkeypatch.setattr(threads_module, "READ_GRACE", 0.1)
    (read_a, write_b), (read_b, write_a) = os.pipe(), os.pipe()
    raw: Any = Raw(read_a, write_a)
    reader = writer = raw
    if kind != "raw":
        reader, writer = io.BufferedReader(raw), io.BufferedWriter(raw)
    if kind == "text":
        reader, writer = io.TextIOWrapper(reader), io.TextIOWrapper(writer)
        writer.write("first\n")
    a, b = peer.create_stream_session(writer, reader), peer.create_stream_session(write_b, read_b)
    assert len(threads()) == 2
    seen: List[Any] = []
    a.on_message(seen.append)
    b.on_message(seen.append)
    b.on_request(lambda ping: Pong(ping.value))
    # Small ones, which a read that waits for as much as it has asked for would hold back.
    for size in (1, 100, 300_000, 1):
        assert len(a.request(Ping(b"x" * size), expect=Pong).wait().value) == size
    a.close()
    tick_until(lambda: not b.is_open, peer)
    join_all()
    assert [message.message for message in seen] == (["first\n"] if kind == "text" else [])
    os.close(read_a)


def test_object_and_socket_in_one_session(peer: IpcPeer) -> None:
    wire = Wire()
    with RawPeer(peer) as raw:
        a, b = socket.socketpair()
        with b:
            session = peer.create_stream_session(a, wire, wire)
            for index in range(3):
                wire.incoming.put(framed(Note(str(index))))
            seen = [session.receive(20).text for _ in range(3)]  # type: ignore[attr-defined]
            assert sorted(seen) == ["0", "1", "2"] and raw.session.is_open
            session.notify(Note("out"))
            assert unframe(b.recv(1000)) == [Note("out")]
            # Both inputs have to end.
            wire.incoming.put(b"")
            wire.incoming.put(b"")
            tick_until(lambda: not session.is_open, peer)


def test_transport_of_its_own(peer: IpcPeer) -> None:
    one, two = wires()
    serializer = peer.serializer
    a, b = StreamTransport(one, [one], serializer), StreamTransport(two, [two], serializer)
    a.send(Note("x"))
    got: List[Any] = []
    while not got:
        descriptors.wait_readable(b.read_fds(), PATIENCE)
        got = b.receive()
    assert got == [Note("x")]
    a.close()
    b.close()
    a.close()
    gc.collect()
    join_all()


# -- the end


def test_end_of_an_object_is_the_end_of_the_session(peer: IpcPeer) -> None:
    data = b"".join(framed(Note(str(index))) for index in range(500))
    output = Wire()
    session = peer.create_stream_session(output, io.BytesIO(b"junk\n" + data + b"tail"))
    seen: List[Any] = []
    session.on_message(seen.append)
    session.on_close(lambda session: session_ended.append(True))
    session_ended: List[bool] = []
    session.notify(Note("out"))
    tick_until(lambda: not session.is_open, peer)
    assert values(seen[1:501]) == [str(index) for index in range(500)] and len(seen) == 502
    tick_until(lambda: output.closed_times and not threads(), peer)
    assert session_ended == [True] and unframe(output.written()) == [Note("out")] and output.closed_times == 1


class Failure(Exception):
    pass


@pytest.mark.parametrize(
    "error", [Failure("out of paper"), OSError(5, "out of paper"), Interruption("out of paper"), SystemExit("out of paper")]
)
def test_error_while_reading_is_the_cause_of_the_end(peer: IpcPeer, error: BaseException) -> None:
    wire = Wire()
    session = peer.create_stream_session(wire, wire)
    seen: List[Any] = []
    session.on_message(seen.append)
    session.on_exception(seen.append)
    for item in (framed(Note("1")), framed(Note("2"))[:5], framed(Note("2"))[5:], framed(Note("3"))[:7], error):
        wire.incoming.put(item)
    reason = reason_of(session, peer)
    assert reason.__cause__ is error and "out of paper" in str(reason)
    assert seen[:2] == [Note("1"), Note("2")] and not any(isinstance(item, Exception) for item in seen)


class BadWriter(Wire):
    error: BaseException = Failure("no ink")

    def write(self, data: bytes) -> None:
        raise self.error


@pytest.mark.parametrize("error", [Failure("no ink"), BrokenPipeError(32, "no ink"), ValueError("no ink")])
def test_error_while_writing_ends_the_session_though_nobody_sends_again(peer: IpcPeer, error: BaseException) -> None:
    wire = BadWriter()
    wire.error = error
    wire.incoming.put(framed(Note("1")))
    session = peer.create_stream_session(wire, wire)
    seen: List[Any] = []
    session.on_message(seen.append)
    reason = reason_of(session, peer)
    assert reason.__cause__ is error and "no ink" in str(reason)
    assert seen == [Note("1")]
    with pytest.raises(StreamClosedError, match="no ink") as caught:
        session.notify(Note())
    assert caught.value.__cause__ is error


def test_error_of_flush(peer: IpcPeer) -> None:
    wire: Any = Wire()
    wire.flush = lambda: os.fsync(12345)
    reason = reason_of(peer.create_stream_session(wire, wire), peer)
    assert isinstance(reason.__cause__, OSError)


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_write_that_returns_nonsense(peer: IpcPeer, count: int) -> None:
    wire: Any = Wire()
    wire.write = lambda data: count
    assert f"returned {count}" in str(reason_of(peer.create_stream_session(wire, wire), peer))


def test_write_that_takes_a_part(peer: IpcPeer) -> None:
    wire: Any = Wire()
    wire.write = lambda data: wire.outgoing.put(data[:3]) or len(data[:3])
    session = peer.create_stream_session(wire, wire)
    session.notify(Note("a rather long one"))
    session.close()
    assert unframe(wire.written()) == [Note("a rather long one")]


@pytest.mark.parametrize("data", ["text", None, 5])
def test_read_that_returns_nonsense(peer: IpcPeer, data: Any) -> None:
    wire: Any = Wire()
    wire.read = lambda size: data
    reason = reason_of(peer.create_stream_session(wire, wire), peer)
    assert isinstance(reason.__cause__, (TypeError, OSError))


def test_stream_that_its_owner_closes(peer: IpcPeer) -> None:
    (read_a, write_b), (read_b, write_a) = os.pipe(), os.pipe()
    raw = Raw(read_a, write_a)
    session = peer.create_stream_session(raw, raw)
    errors: List[Any] = []
    session.on_exception(errors.append)
    raw.close()
    session.notify(Note())
    tick_until(lambda: not session.is_open, peer)
    assert isinstance(errors[0], InvalidStreamError) and errors[0].session is session
    for fd in (write_b, read_b):
        os.close(fd)
    join_all()
    os.close(read_a)


def test_stream_that_closes_itself_at_its_end_is_no_error(peer: IpcPeer) -> None:
    class OneShot(io.BytesIO):
        def read1(self, size: Optional[int] = -1) -> bytes:
            data = super().read1(size)
            if not data:
                self.close()
            return data

    session = peer.create_stream_session(Wire(), OneShot(framed(Note("1"))))
    errors: List[Any] = []
    session.on_exception(errors.append)
    assert session.receive(20) == Note("1")
    tick_until(lambda: not session.is_open, peer)
    assert errors == []


# -- closing


def test_close_writes_what_is_queued(peer: IpcPeer) -> None:
    taken: List[bytes] = []
    gate = threading.Event()

    class Slow(Wire):
        def write(self, data: bytes) -> None:
            gate.wait(PATIENCE)
            taken.append(data)

    wire = Slow()
    session = peer.create_stream_session(wire, wire)
    for index in range(15):
        session.notify(Note(str(index), b"x" * 50_000))
    assert session.queued_bytes and not taken
    gate.set()
    session.close()
    assert values(unframe(b"".join(taken))) == [str(index) for index in range(15)]
    assert threads() == [] and wire.closed_times == 1


def test_close_does_not_hang_on_a_blocked_read(peer: IpcPeer) -> None:
    wire = Stubborn()
    session = peer.create_stream_session(wire, wire)
    session.notify(Note("last"))
    with CpuMeter() as meter:
        session.close()
    assert meter.real < BOUND + 5 and meter.cpu < 0.1
    assert wire.closed_times == 1 and unframe(wire.written()) == [Note("last")]
    (thread,) = threads()
    assert thread.daemon and thread.name.startswith("stream_ipc reads")
    wire.incoming.put(b"too late")
    wire.incoming.put(b"never read")
    join_all()
    assert wire.incoming.get_nowait() == b"never read"


def test_close_does_not_hang_on_a_blocked_write_or_close(peer: IpcPeer) -> None:
    gate = threading.Event()

    class Stuck(Wire):
        def write(self, data: bytes) -> None:
            gate.wait(PATIENCE)

        def close(self) -> None:
            super().close()
            gate.wait(PATIENCE)

    wires = [Stuck() for _ in range(5)]
    for wire in wires:
        peer.create_stream_session(wire, wire).notify(Note())
    start = time.monotonic()
    peer.close()  # all of them side by side
    assert time.monotonic() - start < BOUND + 5
    assert threads()
    gate.set()
    join_all()


def test_hurry_cuts_the_grace_of_a_blocked_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # As for a child that has ended, whose output a grandchild holds open.
    monkeypatch.setattr(threads_module, "READ_GRACE", 0.01)
    wire = Stubborn()
    ending: Any = StreamTransport(wire, [wire], PickleMessageSerializer()).end()
    ending.grace = 15.0
    tick_until(lambda: ending.step() is not None and wire.closed_times)  # what is left is the read
    ending.hurry()
    start = time.monotonic()
    finish([ending])
    assert time.monotonic() - start < 10
    wire.incoming.put(b"")
    join_all()


def test_raw_file_that_takes_nothing_is_an_error_and_no_loss(peer: IpcPeer) -> None:
    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> None:
            return None  # as a raw file that does not block

    read, write = os.pipe()
    session = peer.create_stream_session(Full(), read)
    promise = session.request(Ping())
    with pytest.raises(StreamClosedError, match="took nothing") as caught:
        promise.wait()
    assert isinstance(caught.value.__cause__, BlockingIOError)
    join_all()
    os.close(write)


def test_peer_that_floods_does_not_keep_close_from_returning(peer: IpcPeer) -> None:
    wire: Any = Wire()
    wire.read = lambda size: b"x" * size
    session = peer.create_stream_session(wire, wire)
    tick_until(lambda: peer.tick(0.05), peer)
    start = time.monotonic()
    session.close()
    assert time.monotonic() - start < BOUND + 5
    join_all()


def test_reading_ahead_is_bounded(peer: IpcPeer) -> None:
    read = 0

    class Endless(Wire):
        def read(self, size: int) -> bytes:
            nonlocal read
            read += 1000
            return b"x" * 1000

    peer.create_stream_session(Wire(), Endless())
    before = -1
    while before != read:  # until it is blocked
        before = read
        threading.Event().wait(0.05)
    assert read < 4 << 20


@pytest.mark.parametrize("blocked", [False, True])
def test_removed_session_leaves_its_streams_open(peer: IpcPeer, blocked: bool) -> None:
    wire = Wire()
    session = peer.create_stream_session(wire, wire)
    session.notify(Note("out"))
    if not blocked:
        wire.incoming.put(b"")
        (reading,) = [thread for thread in threads() if thread.name.startswith("stream_ipc reads")]
        reading.join(PATIENCE)
    peer.remove_session(session)
    assert wire.closed_times == 0 and unframe(wire.written()) == [Note("out")]
    if blocked:
        wire.incoming.put(b"this is lost")
        join_all()
        wire.incoming.put(b"this is not")
        assert wire.read(100) == b"this is not"


def test_failed_start_touches_nothing(peer: IpcPeer) -> None:
    wire = Wire()
    wire.incoming.put(b"precious")
    text = io.StringIO()
    for streams in ((object(), wire), (wire, object()), (wire, wire, object()), (wire, text), (text, wire)):
        with pytest.raises(InvalidStreamError):
            peer.create_stream_session(*streams)
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(InvalidStreamError, match="closed"):
        peer.create_stream_session(wire, closed)
    assert threads() == [] and wire.read(100) == b"precious" and peer.sessions == ()


def test_dropped_peer_warns_and_its_threads_end() -> None:
    peer = IpcPeer()
    one, two = wires()
    peer.create_stream_session(one, one)
    with pytest.warns(ResourceWarning):  # noqa: PT031
        del peer
        gc.collect()
    two.write(b"")
    join_all()


def test_deadlines_and_idle_waits(peer: IpcPeer) -> None:
    wire = Wire()
    session = peer.create_stream_session(wire, wire)
    with CpuMeter() as meter, pytest.raises(RequestTimeoutError):
        session.request(Ping(), timeout=0.2).wait()
    assert meter.cpu < 0.05


EXIT = """
import queue
from stream_ipc import IpcPeer
from tests.messages import Note

class Stream:
    def __init__(self):
        self.queue = queue.Queue()
    def read(self, size):
        return self.queue.get()
    def write(self, data):
        print(len(data) > 5, flush=True)

stream = Stream()
peer = IpcPeer()
session = peer.create_stream_session(stream, stream)
session.notify(Note("x"))
"""


def test_interpreter_exits_though_a_read_is_blocked() -> None:
    done = run_python(EXIT)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


FORK = """
import os, threading
from stream_ipc import IpcPeer
from tests.test_threads import wires
from tests.messages import Ping, Pong

peer = IpcPeer(timeout=20)
one, two = wires()
a, b = peer.create_stream_session(one, one), peer.create_stream_session(two, two)
b.on_request(lambda ping: Pong(ping.value))
a.request(Ping(1)).wait()
pid = os.fork()
if pid == 0:
    peer.close()
    assert one.closed_times == 0
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(a.request(Ping(2)).wait())
peer.close()
print(threading.active_count())
"""


def test_fork_leaves_the_parents_session_alone() -> None:
    done = run_python(FORK, strict=False)
    assert (done.stdout, done.returncode) == ("Pong(value=2)\n1\n", 0), done.stderr


# -- the choice


class NoDescriptor:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def read(self, size: int) -> bytes:
        return b""

    def fileno(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("only_sockets", [False, True])
def test_choice(monkeypatch: pytest.MonkeyPatch, only_sockets: bool) -> None:
    monkeypatch.setattr(descriptors, "ONLY_SOCKETS_ARE_POLLED", only_sockets)
    needs = descriptors.needs_thread
    a, b = socket.socketpair()
    closed = open(os.devnull, "rb")  # noqa: SIM115
    closed.close()
    with a, b, open(os.devnull, "rb") as file:
        assert not needs(a)
        assert needs(file) is only_sockets and needs(0) is only_sockets
        assert needs(NoDescriptor(5)) is only_sockets
    for stream in (io.BytesIO(), Wire(), *map(NoDescriptor, (io.UnsupportedOperation(), OSError(), None, -1, "5"))):
        assert needs(stream), stream
    for stream in (None, object(), "text", closed, file, a):
        assert not needs(stream), stream


def test_choice_is_by_platform() -> None:
    code = (
        "import sys, signal, socket, subprocess; sys.platform = {!r}\n"
        "from stream_ipc.transports import descriptors as d\n"
    )
    for platform, chosen in (("win32", True), ("linux", False), ("darwin", False)):
        done = run_python(code.format(platform) + "print(d.needs_thread(0))")
        assert (done.stdout, done.returncode) == (f"{chosen}\n", 0), done.stderr


@pytest.mark.parametrize("kind", ["pipe", "pipe objects"])
def test_pipes_that_cannot_be_polled(monkeypatch: pytest.MonkeyPatch, peer: IpcPeer, kind: str) -> None:
    monkeypatch.setattr(descriptors, "ONLY_SOCKETS_ARE_POLLED", True)
    monkeypatch.setattr(threads_module, "READ_GRACE", 0.1)
    (read_b, write_a), (read_a, write_b) = os.pipe(), os.pipe()
    streams: List[Any] = [write_a, read_a, write_b, read_b]
    if kind == "pipe objects":
        streams = [os.fdopen(fd, "wb" if fd in (write_a, write_b) else "rb") for fd in streams]
    a, b = peer.create_stream_session(*streams[:2]), peer.create_stream_session(*streams[2:])
    assert len(threads()) == 4
    b.on_request(lambda ping: Pong(ping.value))
    assert len(a.request(Ping(b"x" * 300_000), expect=Pong).wait().value) == 300_000
    a.close()
    tick_until(lambda: not b.is_open, peer)
    peer.close()
    join_all()  # the first reader was blocked until the other side had closed, too
    for fd in (write_a, read_a, write_b, read_b):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_threads_are_imported_only_when_they_are_needed() -> None:
    code = (
        "import sys, stream_ipc\nwith stream_ipc.IpcPeer() as p: p.create_session_pair()\n"
        "print('stream_ipc.transports.threads' in sys.modules)"
    )
    assert run_python(code).stdout == "False\n"


@pytest.mark.parametrize("result", ["x", 1.5, True, b""])
def test_a_write_that_returns_nonsense_ends_the_session(peer: IpcPeer, result: Any) -> None:
    class Odd:
        closed_by_owner = threading.Event()

        def read(self, size: int) -> bytes:
            self.closed_by_owner.wait(20)
            return b""

        def write(self, data: bytes) -> Any:
            return result

        def close(self) -> None:
            self.closed_by_owner.set()

    session = peer.create_stream_session(Odd(), Odd())
    session.notify(Note("x"))
    tick_until(lambda: not session.is_open, peer)
    with pytest.raises(StreamClosedError, match=r"write\(\) returned"):
        session.notify(Note("y"))
