"""One suite for every kind of stream, and what each of them does when it breaks."""

import errno
import fcntl
import gc
import gzip
import hashlib
import io
import os
import pathlib
import pty
import random
import resource
import select
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import tty
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, List, Optional, Tuple

import pytest

from stream_ipc import (
    InvalidStreamError,
    IpcPeer,
    LogMessage,
    Message,
    PickleMessageSerializer,
    RequestEnvelope,
    RequestTimeoutError,
    ResponseEnvelope,
    Session,
    StreamClosedError,
    StreamTransport,
)
from stream_ipc.wire.framing import frame_header
from tests.helpers import (
    PATIENCE,
    WAIT,
    CpuMeter,
    InterruptAt,
    Interruption,
    InterruptionError,
    framed,
    role,
    tick_until,
)

from .helpers import drop_queued, share
from .messages import Note, Ping, Pong
from .os_helpers import (
    await_death,
    collect,
    cpu_seconds,
    ended,
    kill,
    listing,
    program,
    read_exactly,
    read_to_end,
    script,
    spins,
    wait_readable,
    write_all,
)

PIPE = subprocess.PIPE

# Both ways; the regular file, which only gives, has its own tests below and takes part where one way is enough.
KINDS = ["pipe", "pipe objects", "socketpair", "socket fds", "fifo", "tty", "tcp"]


class Link:
    """Two connected ends, each a pair (write, read) of what a session may be given."""

    def __init__(self, kind: str, folder: pathlib.Path) -> None:
        self.kind = kind
        self.a: Tuple[Any, Any]
        self.b: Tuple[Any, Any]
        if kind.startswith("pipe"):
            (read_b, write_a), (read_a, write_b) = os.pipe(), os.pipe()
            self.a, self.b = (write_a, read_a), (write_b, read_b)
            if kind == "pipe objects":
                self.a = (os.fdopen(write_a, "wb"), os.fdopen(read_a, "rb"))
                self.b = (os.fdopen(write_b, "wb", 0), os.fdopen(read_b, "rb", 0))
        elif kind == "fifo":
            fds = []
            for name in "xy":
                os.mkfifo(folder / name)
                read = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK)
                fds += [read, os.open(folder / name, os.O_WRONLY)]
                os.set_blocking(read, True)
            self.a, self.b = (fds[1], fds[2]), (fds[3], fds[0])
        elif kind == "tty":
            master, slave = pty.openpty()
            tty.setraw(slave)
            self.a, self.b = (master, master), (slave, slave)
        else:
            if kind == "tcp":
                with socket.create_server(("127.0.0.1", 0)) as server:
                    a = socket.create_connection(server.getsockname())
                    b = server.accept()[0]
            else:
                a, b = socket.socketpair()
            if kind == "socket fds":
                self.a, self.b = (a.detach(),) * 2, (b.detach(),) * 2
            else:
                self.a, self.b = (a, a), (b, b)

    @property
    def raw(self) -> Tuple[int, int]:
        """The second end as descriptors."""
        return tuple(s if isinstance(s, int) else s.fileno() for s in self.b)  # type: ignore[return-value]

    def close_b(self) -> None:
        close_all(self.b)


def close_all(streams: Any) -> None:
    for stream in {id(s): s for s in streams}.values():
        if isinstance(stream, int):
            os.close(stream)
        else:
            stream.close()


@pytest.fixture(params=KINDS)
def link(request: Any, tmp_path: pathlib.Path) -> Link:
    return Link(request.param, tmp_path)


def is_open(stream: Any) -> bool:
    try:
        os.fstat(stream if isinstance(stream, int) else stream.fileno())
        return True
    except (OSError, ValueError):
        return False


# -- one suite for all kinds


def test_a_conversation(peer: IpcPeer, link: Link) -> None:
    a, b = peer.create_stream_session(*link.a), peer.create_stream_session(*link.b)
    for session in (a, b):
        session.on_request(lambda ping: Pong(ping.value))
    got = collect(a, Note), collect(b, Note)
    randomness = random.Random(5)
    sizes = [0, 1, 4000, 4096, 65_535, 65_536, 300_000] + [randomness.randrange(20_000) for _ in range(40)]
    sent = [Note(str(index), randomness.getrandbits(8 * size + 1)) for index, size in enumerate(sizes)]
    for note in sent:
        a.notify(note)
        b.notify(note)
    assert a.request(Ping(b"\xf3\x4a\x9d\xe2" * 3000), expect=Pong).wait().value == b"\xf3\x4a\x9d\xe2" * 3000
    assert b.request(Ping("x"), expect=Pong).wait().value == "x"
    assert got[0] == sent and got[1] == sent
    a.close()
    assert not any(map(is_open, link.a))
    tick_until(lambda: not b.is_open, peer)
    assert not any(map(is_open, link.b))


def test_both_sides_send_before_anybody_ticks(peer: IpcPeer, link: Link) -> None:
    a, b = peer.create_stream_session(*link.a), peer.create_stream_session(*link.b)
    got = collect(a, Note), collect(b, Note)
    count = 40 if link.kind == "tty" else 100
    for index in range(count):
        a.notify(Note(str(index), bytes(50_000)))
        b.notify(Note(str(index), bytes(50_000)))
    assert got == ([], [])  # sending runs no handlers
    tick_until(lambda: len(got[0]) == len(got[1]) == count, peer)
    for notes in got:
        assert [note.text for note in notes] == [str(index) for index in range(count)]


@pytest.mark.matrix
def test_short_writes_and_slow_reads(peer: IpcPeer, link: Link) -> None:
    make_tiny(*link.a, *link.b)
    session = peer.create_stream_session(*link.a)
    _, read = link.raw
    notes = [Note("large", b"\xf3" * 1_000_000), Note("small"), Note("last", b"\x9d" * 70_000)]
    for note in notes:
        session.notify(note)
    expected = b"".join(map(framed, notes))
    assert session.queued_bytes > 700_000
    received = bytearray()
    limit = time.monotonic() + PATIENCE
    while len(received) < len(expected):
        assert time.monotonic() < limit
        peer.tick(0)
        if wait_readable(read, 0):
            received += os.read(read, 997 if len(received) < 200_000 else 20_000)
    assert received == expected
    assert session.queued_bytes == 0
    link.close_b()


def make_tiny(*streams: Any) -> None:
    """As small a buffer as the system allows, so that writes are cut anywhere."""
    for stream in streams:
        if isinstance(stream, socket.socket):
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
            if stream.family == socket.AF_UNIX:  # TCP with a tiny window moves a segment every 200 ms
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        elif isinstance(stream, int) and stat.S_ISSOCK(os.fstat(stream).st_mode):
            with socket.socket(fileno=os.dup(stream)) as sock:
                make_tiny(sock)
        else:
            try:
                fcntl.fcntl(stream, 1031, 4096)  # F_SETPIPE_SZ
            except OSError:
                pass


def test_a_trickle_of_single_bytes(peer: IpcPeer, link: Link) -> None:
    session = peer.create_stream_session(*link.a)
    notes = collect(session, Note)
    write, _ = link.raw
    for byte in framed(Note("one")) + framed(Note("two")):
        os.write(write, bytes([byte]))
        peer.tick(0)
    tick_until(lambda: len(notes) == 2, peer)
    assert notes == [Note("one"), Note("two")]
    link.close_b()


@pytest.mark.matrix
@pytest.mark.parametrize("kind", [*KINDS, "file"])
def test_the_end_at_each_byte_of_a_frame(peer: IpcPeer, tmp_path: pathlib.Path, kind: str) -> None:
    whole = framed(Note("n"))
    data = whole + whole
    for cut in range(len(data) + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        if kind == "file":
            (folder / "file").write_bytes(data[:cut])
            nothing, file = os.open(os.devnull, os.O_WRONLY), os.open(folder / "file", os.O_RDONLY)
            session = peer.create_stream_session(nothing, file)
        else:
            link = Link(kind, folder)
            session = peer.create_stream_session(*link.a)
            write_all(link.raw[0], data[:cut])
            link.close_b()
        notes, closed = collect(session, Note), ended(session)
        errors: List[Any] = []
        session.on_exception(errors.append)
        tick_until(lambda closed=closed: closed, peer)
        assert notes == [Note("n")] * (cut // len(whole)), f"cut at {cut}"
        assert errors == []
        with pytest.raises(StreamClosedError) as caught:
            session.notify(Note())
        inside = cut % len(whole)
        if inside >= 8:
            assert f"{inside - 8} of {len(whole) - 8} bytes" in str(caught.value), f"cut at {cut}"
        elif inside >= 4:
            assert "header" in str(caught.value)
        else:
            assert "middle" not in str(caught.value)


def test_what_had_arrived_before_the_end_is_dispatched_first(peer: IpcPeer, link: Link) -> None:
    session = peer.create_stream_session(*link.a)
    promises = [session.request(Ping(index), timeout=None) for index in range(2)]
    order: List[Any] = []
    session.on_message(lambda note: order.append(note.text))
    session.on_close(lambda session: order.append("closed"))
    reply = ResponseEnvelope(promises[0].id, Pong("reply"))
    write_all(link.raw[0], b"".join(map(framed, [Note("1"), Note("2"), reply, Note("3")])))
    read_exactly(link.raw[1], 50)  # or a socket would be reset, and forget them
    drain(link.raw[1])
    link.close_b()
    with pytest.raises(StreamClosedError):
        promises[1].wait(PATIENCE)
    assert order == ["1", "2", "3", "closed"]
    assert promises[0].wait(0) == Pong("reply")
    assert peer.sessions == ()


def drain(fd: int) -> None:
    os.set_blocking(fd, False)
    try:
        while os.read(fd, 65536):
            pass
    except BlockingIOError:
        pass


@pytest.mark.matrix
def test_sending_to_a_closed_end(peer: IpcPeer, link: Link) -> None:
    session = peer.create_stream_session(*link.a)
    order: List[Any] = []
    session.on_message(lambda note: order.append(note.text))
    session.on_close(lambda session: order.append("closed"))
    session.on_exception(lambda error: order.append(error))
    write_all(link.raw[0], framed(Note("last words")))
    link.close_b()
    with pytest.raises(StreamClosedError):
        for _ in range(50):  # the first may still find room in the connection
            session.request(Ping(bytes(100_000)), timeout=5).wait()
    tick_until(lambda: order[-1:] == ["closed"], peer)
    assert order == ["last words", "closed"]
    for _ in range(2):
        with pytest.raises(StreamClosedError):
            session.notify(Note())


@pytest.mark.matrix
def test_nobody_spins_after_the_end(peer: IpcPeer, link: Link) -> None:
    session = peer.create_stream_session(*link.a)
    other = peer.create_session_pair()
    link.close_b()
    tick_until(lambda: not session.is_open, peer)
    assert not spins(lambda: peer.tick(WAIT))
    assert other[0].is_open


@pytest.mark.matrix
@pytest.mark.slow
def test_nobody_spins_while_idle_or_while_the_other_side_does_not_read(peer: IpcPeer, link: Link) -> None:
    session = peer.create_stream_session(*link.a)
    assert cpu_seconds(lambda: peer.tick(0.2)) < 0.05
    session.notify(Note("more than it holds", bytes(800_000)))
    if link.kind == "tcp":
        while session.queued_bytes and peer.tick(0.05):
            pass
    assert cpu_of_timeout(session.request(Ping(), timeout=0.2).wait) < 0.05
    drop_queued(session)  # or removing would wait a second for it to be read
    peer.remove_session(session)
    close_all(link.a)
    link.close_b()


def cpu_of_timeout(function: Callable[..., Any], *args: Any) -> float:
    def call() -> None:
        with pytest.raises(RequestTimeoutError):
            function(*args)

    return cpu_seconds(call)


def test_a_removed_session_leaves_its_streams_as_they_were(peer: IpcPeer, link: Link) -> None:
    ends = [end for end in (*link.a, *link.b)]
    if link.kind in ("socketpair", "tcp"):
        link.a[0].settimeout(7.5)
    before = [(flags(end), timeout_of(end)) for end in ends]
    a, b = peer.create_stream_session(*link.a), peer.create_stream_session(*link.b)
    b.on_request(lambda ping: Pong(ping.value))
    assert a.request(Ping(1), expect=Pong).wait().value == 1
    pending = a.request(Ping(2))
    peer.remove_session(a)
    with pytest.raises(StreamClosedError, match="removed"):
        pending.wait()
    peer.tick(0)
    peer.remove_session(b)
    assert peer.sessions == ()
    assert [(flags(end), timeout_of(end)) for end in ends] == before
    drain(link.raw[1])
    for end, blocking in zip(ends, before):
        if not isinstance(end, int) or blocking:
            os.set_blocking(end if isinstance(end, int) else end.fileno(), not blocking[0] & os.O_NONBLOCK)
    # And they can be used again.
    drain_end(link.a[1])
    again, other = peer.create_stream_session(*link.a), peer.create_stream_session(*link.b)
    other.on_request(lambda ping: Pong(ping.value))
    assert again.request(Ping(3), expect=Pong).wait().value == 3


def drain_end(stream: Any) -> None:
    fd = stream if isinstance(stream, int) else stream.fileno()
    blocking = os.get_blocking(fd)
    drain(fd)
    os.set_blocking(fd, blocking)


def flags(stream: Any) -> int:
    return fcntl.fcntl(stream, fcntl.F_GETFL)


def timeout_of(stream: Any) -> Any:
    return stream.gettimeout() if isinstance(stream, socket.socket) else None


def test_the_default_timeout_of_sockets_leaves_a_number_as_it_was(peer: IpcPeer) -> None:
    ours, theirs = socket.socketpair()
    number = ours.detach()
    socket.setdefaulttimeout(5.0)  # and each socket object that is made of a number sets its flag
    try:
        peer.remove_session(peer.create_stream_session(number, number))
    finally:
        socket.setdefaulttimeout(None)
    assert os.get_blocking(number)
    os.close(number)
    theirs.close()


@pytest.mark.matrix
@pytest.mark.usefixtures("closed_streams_are_noticed_soon")
def test_a_stream_that_its_owner_closed_is_an_error_and_no_hang(peer: IpcPeer, link: Link) -> None:
    session = peer.create_stream_session(*link.a)
    good, other = peer.create_session_pair()
    other.on_request(lambda ping: Pong(ping.value))
    errors: List[Any] = []
    session.on_exception(lambda error, session: errors.append((error, session)))
    closed, promise = ended(session), session.request(Ping(), timeout=None)
    close_all(link.a[1:])  # what it reads; the same or another than what it writes
    with pytest.raises(StreamClosedError):
        promise.wait(10)
    assert closed == [session]
    [(error, told)] = errors
    assert isinstance(error, InvalidStreamError) and isinstance(error, ValueError)
    assert error.session is session and told is session
    assert good.request(Ping(4), expect=Pong).wait().value == 4
    link.close_b()


@pytest.mark.parametrize("how", ["notify", "request", "flush"])
def test_a_call_on_a_stream_that_its_owner_closed_says_of_which_session(peer: IpcPeer, how: str) -> None:
    a, b = socket.socketpair()
    session = peer.create_socket_session(a)
    a.close()
    calls: Any = {
        "notify": lambda: session.notify(Note()),
        "request": lambda: session.request(Ping()),
        "flush": session.flush,
    }
    if how == "flush":
        with pytest.raises(InvalidStreamError):
            session.notify(Note())
    for _ in range(2):
        with pytest.raises(InvalidStreamError) as caught:
            calls[how]()
        assert caught.value.session is session
    b.close()


def test_a_number_that_was_reused_is_left_alone(peer: IpcPeer, link: Link) -> None:
    session = peer.create_stream_session(*link.a)
    numbers = sorted({end if isinstance(end, int) else end.fileno() for end in link.a})
    errors: List[Any] = []
    session.on_exception(errors.append)
    close_all(link.a)
    # Other files get the numbers before anybody has noticed.
    pipes = [os.pipe() for _ in numbers]
    for (read, _), number in zip(pipes, numbers):
        if read != number and number not in sum(pipes, ()):
            os.dup2(read, number)
    before = [os.fstat(number) for number in numbers]
    tick_until(lambda: not session.is_open, peer)
    assert [type(error) for error in errors] == [InvalidStreamError]
    assert [os.fstat(number).st_ino for number in numbers] == [status.st_ino for status in before]
    for fd in {fd for pair in pipes for fd in pair} | set(numbers):
        os.close(fd)
    link.close_b()


def test_a_number_that_another_session_got_is_his(peer: IpcPeer) -> None:
    for _ in range(3):
        a, b = socket.socketpair()
        number = a.fileno()
        first = peer.create_stream_session(number, number)
        errors: List[Any] = []
        first.on_exception(errors.append)
        a.close()
        b.close()
        c, d = socket.socketpair()
        assert number in (c.fileno(), d.fileno())
        second, third = peer.create_socket_session(c), peer.create_socket_session(d)
        third.on_request(lambda ping: Pong(ping.value))
        second.on_request(lambda ping: Pong(ping.value))
        assert second.request(Ping(1), expect=Pong).wait().value == 1
        tick_until(lambda first=first: not first.is_open, peer)
        assert third.request(Ping(2), expect=Pong).wait().value == 2
        assert [type(error) for error in errors] == [InvalidStreamError]
        second.close()
        third.close()


def test_descriptors_above_1024(peer: IpcPeer, link: Link) -> None:
    with many_descriptors(2200):
        a = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 2000) for end in link.a]
        b = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 2000) for end in link.b]
        assert min(a + b) >= 2000
        first, second = peer.create_stream_session(*a), peer.create_stream_session(*b)
        second.on_request(lambda ping: Pong(ping.value))
        for tick in (peer.tick, first.tick, second.tick):
            promise = first.request(Ping(bytes(200_000)), expect=Pong)
            tick(0)
            assert promise.wait().value == bytes(200_000)
        first.close()
        second.close()
    close_all(link.a)
    link.close_b()


class many_descriptors:
    """Allows that many, or skips the test."""

    def __init__(self, count: int) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft, hard = self.limits
        if hard != resource.RLIM_INFINITY and hard < count:
            pytest.skip(f"only {hard} descriptors are allowed here")
        if soft < count:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)


# -- promises that only certain streams put to the test


def fill(write: int, room: int, read: int) -> int:
    """Leave so much room in a pipe; returns how much is in it."""
    os.set_blocking(write, False)
    filled = 0
    try:
        while True:
            filled += os.write(write, bytes(65536))
    except BlockingIOError:
        pass
    os.set_blocking(write, True)
    return filled - len(os.read(read, room))


def receive(read: int, size: int, peer: IpcPeer) -> bytes:
    """Read so much, and let the other side write it."""
    pieces: List[bytes] = []

    def is_there() -> bool:
        if wait_readable(read, 0):
            pieces.append(os.read(read, 1 << 20))
        return sum(map(len, pieces)) >= size

    tick_until(is_there, peer)
    return b"".join(pieces)


def test_a_broadcast_that_one_stream_takes_in_part_reaches_the_others_whole(peer: IpcPeer) -> None:
    pipes = [os.pipe() for _ in range(3)]
    filled = fill(pipes[0][1], 8192, pipes[0][0])
    nothing = [os.pipe() for _ in pipes]
    sessions = [peer.create_stream_session(write, other) for (_, write), (other, _) in zip(pipes, nothing)]
    note = Note("", bytes(20_000))
    assert peer.broadcast(note) == 3
    assert sessions[0].queued_bytes
    assert read_exactly(pipes[0][0], filled) == bytes(filled)
    tick_until(lambda: not sessions[0].queued_bytes, peer)
    peer.close()
    for read, _ in pipes:
        assert read_to_end(read) == framed(note)
        os.close(read)
    for _, write in nothing:
        os.close(write)


def test_a_queue_of_more_buffers_than_the_system_takes_at_once(peer: IpcPeer) -> None:
    (read, write), (read2, write2) = os.pipe(), os.pipe()
    filled = fill(write, 4096, read)
    session = peer.create_stream_session(write, read2)
    notes = [Note(str(index), bytes(100)) for index in range(2500)]  # 64 KiB of these are joined
    for note in notes:
        session.notify(note)
    assert session.queued_bytes > 200_000
    expected = bytes(filled) + b"".join(map(framed, notes))
    assert receive(read, len(expected), peer) == expected and session.is_open
    os.close(read)
    os.close(write2)


def test_a_shared_pipe_that_cannot_be_opened_again_is_written_in_pieces(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, written = os.open, os.write
    pieces = []

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith("/proc/self/fd/"):
            raise FileNotFoundError(path)  # as on macOS
        return opened(path, *args, **kwargs)

    def write(fd: int, data: Any) -> int:
        assert len(data) <= select.PIPE_BUF, "more than a pipe that is ready takes without blocking"
        pieces.append(data)
        return written(fd, data)

    (read, out), (read2, write2) = os.pipe(), os.pipe()
    share(monkeypatch, out)
    monkeypatch.setattr(os, "write", write)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        session = peer.create_stream_session(out, read2)
    note = Note("", bytes(200_000))
    session.notify(note)
    assert receive(read, len(framed(note)), peer) == framed(note)
    assert os.get_blocking(out) and len(pieces) > 10
    os.close(read)
    os.close(write2)


def test_a_shared_socket_is_written_in_pieces_on_macos(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    # There a send() on a blocking socket waits until it has taken everything, whatever flags it gets.
    class Blocking(socket.socket):
        def send(self, data: Any, flags: int = 0) -> int:
            assert len(data) <= select.PIPE_BUF and select.select([], [self], [], 0)[1], "this would have blocked"
            pieces.append(data)
            return super().send(data, flags)

    pieces: List[Any] = []
    ours, other = socket.socketpair()
    read2, write2 = os.pipe()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(socket, "socket", Blocking)
    number = ours.detach()
    share(monkeypatch, number)
    session = peer.create_stream_session(number, read2)
    note = Note("", bytes(500_000))
    session.notify(note)
    assert session.queued_bytes and receive(other.fileno(), len(framed(note)), peer) == framed(note) and len(pieces) > 10
    other.close()
    os.close(write2)


def test_a_shared_descriptor_is_not_read_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    class Buffered:
        def fileno(self) -> int:
            return read

        def peek(self) -> bytes:
            return os.read(read, 100)

        def read1(self, size: int) -> bytes:
            assert size == 0
            return b""

    def block(fd: int, size: int) -> bytes:
        assert wait_readable(fd, 0), "this would have blocked"
        return data(fd, size)

    (read, write), (read2, write2), data = os.pipe(), os.pipe(), os.read
    monkeypatch.setattr(os, "read", block)
    shared = Buffered()
    share(monkeypatch, shared)
    transport = StreamTransport(write2, [shared], PickleMessageSerializer())
    assert os.get_blocking(read)
    assert transport.receive() == []
    write_all(write, framed(Note("x")))
    assert transport.receive() == [Note("x")]
    transport.close()
    for fd in (read, write, read2):
        os.close(fd)


def test_descriptors_0_and_1_keep_their_flags_without_being_taken_over() -> None:
    code = """
        session = IpcPeer().create_stream_session(1, 0)
        session.on_request(lambda ping: Pong([os.get_blocking(0), os.get_blocking(1)]))
        serve(session)
    """
    (read, theirs), (others, write) = os.pipe(), os.pipe()
    process = subprocess.Popen(program(code), stdin=others, stdout=theirs)
    try:
        with IpcPeer() as peer:
            session = peer.create_stream_session(write, read)
            assert session.request(Ping(), expect=Pong).wait().value == [True, True]
            assert os.get_blocking(others) and os.get_blocking(theirs)
    finally:
        os.close(theirs)
        os.close(others)
        kill(process)


def test_receive_tells_a_closed_descriptor_from_the_end_of_the_stream() -> None:
    (read, write), (read2, write2) = os.pipe(), os.pipe()
    transport = StreamTransport(write2, [read], PickleMessageSerializer())
    os.close(read)
    with pytest.raises(InvalidStreamError, match=f"descriptor {read} was closed"):
        transport.receive()
    transport.close()
    os.close(write)
    os.close(read2)


def test_one_stream_in_place_of_the_list_that_a_transport_reads() -> None:
    read, write = os.pipe()
    with open(read, "rb") as file, socket.socket() as sock:  # to iterate over the file would wait for ever
        for one in (read, file, sock, None):
            reads: Any = one
            with pytest.raises(TypeError, match=r"^StreamTransport\(\) takes a list of the streams that it reads, not "):
                StreamTransport(write, reads, PickleMessageSerializer())
        assert os.get_blocking(write)
    os.close(write)


def test_receive_of_a_transport_that_only_writes_returns_nothing_until_it_is_closed() -> None:
    read, write = os.pipe()
    transport = StreamTransport(write, [], PickleMessageSerializer())
    assert transport.receive() == []
    transport.close()
    with pytest.raises(StreamClosedError, match="this side closed the stream"):
        transport.receive()
    os.close(read)


class Closing:
    """A stream whose ``close`` closes its descriptor, and may be interrupted before it does."""

    def __init__(self, fd: int, interrupted: bool = False) -> None:
        self.fd = fd
        self.interrupted = interrupted
        self.calls = 0

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        self.calls += 1
        if self.interrupted and self.calls == 1:
            raise Interruption
        os.close(self.fd)


@pytest.mark.parametrize("first", ["write", "read"])
def test_an_interrupted_close_that_is_repeated_closes_only_what_is_left(peer: IpcPeer, first: str) -> None:
    (read, write), (read2, write2) = os.pipe(), os.pipe()
    output, source = Closing(write, first == "read"), Closing(read2, first == "write")
    session = peer.create_stream_session(output, source)
    with pytest.raises(Interruption):
        session.close()
    others = [os.dup(read) for _ in range(3)]  # with the number of what is closed
    peer.tick(0)
    session.close()
    assert sorted([output.calls, source.calls]) == [1, 2]
    for fd in (*others, read, write2):
        os.close(fd)  # it is open


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("interrupted", ["write", "read"])
def test_a_fork_after_an_interrupted_close_has_no_copy_of_what_is_left(peer: IpcPeer, interrupted: str) -> None:
    (read, write), (read2, write2) = os.pipe(), os.pipe()
    output, source = Closing(write, interrupted == "write"), Closing(read2, interrupted == "read")
    session = peer.create_stream_session(output, source)
    with pytest.raises(Interruption):
        session.close()
    pid = os.fork()
    if pid == 0:
        left = 0
        for fd in (write, read2):
            try:
                os.fstat(fd)
                left += 1
            except OSError:
                pass
        os._exit(left)
    assert os.waitpid(pid, 0)[1] == 0
    session.close()
    for fd in (read, write2):
        os.close(fd)


@pytest.mark.parametrize("given", [False, True])
def test_closing_the_transport_of_a_session_is_noticed(peer: IpcPeer, given: bool) -> None:
    a, b = socket.socketpair()
    with b:
        transport = StreamTransport(a, [a], PickleMessageSerializer())
        session = peer.create_session(transport) if given else peer.create_stream_session(a, a)
        errors: List[Any] = []
        session.on_exception(errors.append)
        promise = session.request(Ping())
        session.transport.close()
        with pytest.raises(StreamClosedError, match="was closed while a session was using it"):
            promise.wait(20)
        assert [type(error) for error in errors] == [InvalidStreamError] and not session.is_open


def test_receive_after_the_end_does_not_make_its_error_longer() -> None:
    (read, write), (read2, write2) = os.pipe(), os.pipe()
    transport = StreamTransport(write2, [read], PickleMessageSerializer())
    os.close(write)
    lengths = []
    for _ in range(3):
        with pytest.raises(StreamClosedError) as caught:
            transport.receive()
        lengths.append(len(list(traceback.walk_tb(caught.value.__traceback__))))
    assert lengths[0] == lengths[2]
    transport.close()
    os.close(read2)


@dataclass
class Alarmed(Message):
    """While one is made, an alarm comes, if there is one left."""

    text: str = ""
    alarms: ClassVar[List[None]] = []

    def __post_init__(self) -> None:
        if self.alarms:
            self.alarms.pop()
            ring()


class Two:
    """A transport with two inputs, one message waiting on each, and then their end."""

    def __init__(self, made_of: Any = StreamTransport) -> None:
        reads = []
        for message in (Note("one"), Alarmed("two")):
            read, write = os.pipe()
            os.write(write, framed(message))
            os.close(write)
            reads.append(read)
        self.unread, sink = os.pipe()
        self.transport = made_of(sink, reads, PickleMessageSerializer())

    def close(self) -> None:
        self.transport.close()
        os.close(self.unread)


@pytest.mark.parametrize("kind", [Interruption, InterruptionError])
def test_receive_loses_neither_message_nor_end_wherever_it_is_interrupted(kind: Any) -> None:
    number = 0
    while True:
        number += 1
        two = Two()
        got: List[Message] = []
        with InterruptAt(number, kind()) as interrupted:
            while True:
                try:
                    got += two.transport.receive()
                except kind:
                    pass
                except StreamClosedError:
                    break
                assert interrupted.count < 10_000, interrupted.where
        assert got == [Note("one"), Alarmed("two")], interrupted.where
        two.close()
        if not interrupted.hit:
            break
    assert number > 30


@pytest.mark.parametrize("over", ["the transport", "a subclass", "one that was interrupted before"])
def test_a_session_loses_nothing_when_the_second_of_two_inputs_is_interrupted(peer: IpcPeer, over: str) -> None:
    class Sub(StreamTransport):
        pass

    def alarm(*_: Any) -> None:
        raise InterruptionError

    two = Two(Sub if over == "a subclass" else StreamTransport)
    before = signal.signal(signal.SIGUSR1, alarm)
    got: List[Any] = []
    try:
        Alarmed.alarms.append(None)
        if over == "one that was interrupted before":
            with pytest.raises(InterruptionError):
                two.transport.receive()
        session = peer.create_session(two.transport)
        session.on_message(got.append)
        while session.is_open:
            try:
                peer.tick(PATIENCE)
            except InterruptionError:
                pass
    finally:
        Alarmed.alarms.clear()
        signal.signal(signal.SIGUSR1, before)
    assert got == [Note("one"), Alarmed("two")] and not Alarmed.alarms
    os.close(two.unread)


def test_receive_returns_what_the_first_input_gave_though_the_second_was_closed_by_its_owner() -> None:
    two = Two()
    assert len(two.transport.read_fds()) == 2
    os.close(two.transport.read_fds()[1])
    assert two.transport.receive() == [Note("one")]
    with pytest.raises(InvalidStreamError):
        two.transport.receive()
    two.close()


# -- regular files and the null device


def test_a_regular_file_is_read_to_its_end_and_closed(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    notes = [Note(str(index), bytes(index * 1000)) for index in range(100)]
    (tmp_path / "in").write_bytes(b"junk" + b"".join(map(framed, notes)))
    session = peer.create_stream_session(open(tmp_path / "out", "wb"), open(tmp_path / "in", "rb", 0))  # noqa: SIM115
    got, closed = collect(session, Message), ended(session)
    session.notify(Note("written"))
    tick_until(lambda: closed, peer)
    assert got == [LogMessage("junk", "junk"), *notes]
    assert (tmp_path / "out").read_bytes() == framed(Note("written"))


def test_the_null_device_is_at_its_end(peer: IpcPeer) -> None:
    session = peer.create_stream_session(os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_RDONLY))
    closed = ended(session)
    session.notify(Note("lost"))
    tick_until(lambda: closed, peer)


# -- two inputs


def two_inputs(peer: IpcPeer) -> Tuple[Session, int, int, int]:
    out, write = os.pipe()
    (read, first), (read2, second) = os.pipe(), os.pipe()
    return peer.create_stream_session(write, read, read2), first, second, out


@pytest.mark.parametrize("refused", [stat.S_IFCHR, stat.S_IFIFO])
def test_a_device_that_kqueue_refuses_is_always_ready(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    refuses: List[bool] = []

    class Kqueue(selectors.PollSelector):  # type: ignore[name-defined, misc, unused-ignore]
        def register(self, fd: Any, events: int, data: Any = None) -> Any:
            if refuses and stat.S_IFMT(os.fstat(fd).st_mode) == refused:
                raise OSError(errno.EINVAL, "Invalid argument")
            return super().register(fd, events, data)

    monkeypatch.delattr(select, "epoll", raising=False)
    monkeypatch.setattr(selectors, "DefaultSelector", Kqueue)
    with IpcPeer() as other:
        refuses.append(True)
        read, write = os.pipe()
        os.close(write)
        device = other.create_stream_session(os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_RDONLY))
        errors: List[BaseException] = []
        device.on_exception(errors.append)
        null = os.open(os.devnull, os.O_WRONLY)
        if refused == stat.S_IFIFO:
            with pytest.raises(InvalidStreamError, match=f"descriptor {read} cannot be waited for: .*Invalid argument"):
                other.create_stream_session(null, read)
            os.close(null)
            os.close(read)
        else:
            assert other.create_stream_session(null, read).is_open
        tick_until(lambda: not other.sessions, other)
        assert errors == []  # it was found to be at its end


def test_a_closed_descriptor_ends_its_session_alone_without_epoll_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll", raising=False)
    monkeypatch.setattr(selectors, "DefaultSelector", selectors.PollSelector)
    with IpcPeer(timeout=20) as peer:
        session, first, second, out = two_inputs(peer)
        a, b = peer.create_session_pair()
        b.on_request(lambda message: message)
        errors: List[BaseException] = []
        session.on_exception(errors.append)
        peer.tick()
        os.close(session.transport.read_fds()[0])
        assert a.request(Note()).wait() == Note()
        tick_until(lambda: not session.is_open, peer)
        assert [type(error) for error in errors] == [InvalidStreamError]
        for fd in (first, second, out):
            os.close(fd)


@pytest.mark.skipif(sys.platform == "darwin", reason="there it does: MSG_DONTWAIT is for recv() only")
def test_a_socket_that_is_made_blocking_again_blocks_no_call() -> None:
    with IpcPeer(timeout=WAIT) as peer:
        ours, theirs = socket.socketpair()
        session = peer.create_socket_session(ours)
        peer.tick()
        ours.setblocking(True)
        with pytest.raises(RequestTimeoutError):
            while True:
                session.notify(Note("x", b"x" * 100_000))
        theirs.sendall(framed(Note("in")))
        assert session.receive(20) == Note("in")
        with pytest.raises(TimeoutError):
            session.receive(0)
        theirs.close()
        session.close(timeout=0)


def test_a_second_input_is_framed_too_and_both_have_to_end(peer: IpcPeer) -> None:
    session, first, second, out = two_inputs(peer)
    notes, closed = collect(session, Note), ended(session)
    os.write(first, framed(Note("first"))[:20])
    os.write(second, framed(Note("second")))
    os.write(first, framed(Note("first"))[20:])
    tick_until(lambda: len(notes) == 2, peer)
    assert {note.text for note in notes} == {"first", "second"}
    os.close(first)
    peer.tick(0)
    assert not spins(lambda: peer.tick(WAIT))  # the one that has ended makes nobody spin
    assert session.is_open
    os.write(second, framed(Note("third")) + framed(Note("half"))[:30])
    os.close(second)
    tick_until(lambda: closed, peer)
    assert notes[2:] == [Note("third")]
    with pytest.raises(StreamClosedError, match="22 of"):
        session.notify(Note())
    os.close(out)


def test_a_reply_may_come_on_either_input(peer: IpcPeer) -> None:
    session, first, second, out = two_inputs(peer)
    for end in (first, second):
        promise = session.request(Ping(), expect=Pong)
        write_all(end, framed(ResponseEnvelope(promise.id, Pong(end))))
        assert promise.wait().value == end
    session.close()
    for fd in (first, second, out):
        os.close(fd)


# -- half-open and reset connections


def test_a_reset_connection_is_a_closed_stream(peer: IpcPeer) -> None:
    for sending in (False, True):
        link = Link("tcp", pathlib.Path())
        session = peer.create_socket_session(link.a[0])
        closed, promise = ended(session), session.request(Ping(), timeout=None)
        link.b[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.b[0].close()
        if sending:
            try:
                for _ in range(10):
                    session.notify(Note("x", bytes(100_000)))
            except StreamClosedError:
                pass
        with pytest.raises(StreamClosedError) as caught:
            promise.wait(PATIENCE)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno in (errno.ECONNRESET, errno.EPIPE)
        assert closed == [session]


@pytest.mark.parametrize("kind", ["socket", "socket fds"])
def test_a_unix_socket_that_is_closed_with_something_unread_was_closed_and_not_lost(peer: IpcPeer, kind: str) -> None:
    for unread in (False, True):
        link = Link(kind, pathlib.Path())
        session = peer.create_stream_session(*link.a)
        closed = ended(session)
        if unread:
            session.notify(Note("never read"))
        other = link.b[0]
        if isinstance(other, int):
            os.close(other)
        else:
            other.close()
        tick_until(closed.__len__, peer)
        assert str(session.reason).startswith("the other side closed the stream (")
        cause = session.reason.__cause__ if session.reason is not None else None
        assert isinstance(cause, ConnectionResetError) == unread


def test_after_a_half_close_what_is_queued_still_leaves(peer: IpcPeer) -> None:
    # The other side says that it writes no more, and then reads slowly.
    code = """
        import hashlib, socket
        sock = socket.socket(fileno=int(sys.argv[1]))
        sock.shutdown(socket.SHUT_WR)
        digest = hashlib.sha256()
        while True:
            data = sock.recv(5000)
            if not data:
                break
            digest.update(data)
        print(digest.hexdigest())
    """
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(script(code, theirs.fileno()), pass_fds=[theirs.fileno()], stdout=PIPE)
    theirs.close()
    try:
        session = peer.create_socket_session(ours)
        notes = [Note(str(index), bytes(100_000)) for index in range(9)]
        with session.batch():
            for note in notes:
                session.notify(note)
            pending = session.request(Ping(), timeout=None)
        with pytest.raises(StreamClosedError):
            pending.wait(PATIENCE)
        expected = b"".join(map(framed, notes))
        assert process.stdout is not None
        # The request is behind them: its frame, too, is whole.
        expected += framed(RequestEnvelope(pending.id, Ping()))
        assert process.stdout.read().decode().strip() == hashlib.sha256(expected).hexdigest()
    finally:
        kill(process)


def test_sigpipe_at_its_default_kills_nobody_on_a_socket() -> None:
    code = """
        import socket
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        for fds in (False, True):
            a, b = socket.socketpair()
            with IpcPeer() as peer:
                session = peer.create_stream_session(a.fileno(), a.fileno()) if fds else peer.create_socket_session(a)
                b.close()
                try:
                    session.notify(Note())
                except StreamClosedError:
                    print("alive")
            a.detach()
    """
    done = subprocess.run(program(code), stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"alive\nalive\n", b"")


def test_the_error_path_sends_nothing(peer: IpcPeer) -> None:
    link = Link("socketpair", pathlib.Path())
    session = peer.create_socket_session(link.a[0])
    calls: List[str] = []

    def complain(name: str) -> Callable[..., None]:
        def handler(*args: Any) -> None:
            calls.append(name)
            with pytest.raises(StreamClosedError):
                session.notify(Note("it has failed"))

        return handler

    close = complain("close")
    session.on_close(lambda session: close())
    link.b[0].close()
    with pytest.raises(StreamClosedError):
        session.notify(Note())
    tick_until(lambda: calls, peer)
    assert calls == ["close"]


# -- a reader that never reads


# -- what was read or written before


def test_a_reader_that_had_read_ahead(peer: IpcPeer) -> None:
    (read, write), (out, sink) = os.pipe(), os.pipe()
    reader = os.fdopen(read, "rb")
    write_all(write, b"a line\n" + framed(Note("1")) + framed(Note("2"))[:40])
    assert reader.readline() == b"a line\n"
    session = peer.create_stream_session(sink, reader)
    notes = collect(session, Note)
    tick_until(lambda: notes, peer)
    write_all(write, framed(Note("2"))[40:])
    tick_until(lambda: len(notes) == 2, peer)
    assert notes == [Note("1"), Note("2")]
    assert not spins(lambda: peer.tick(WAIT))
    os.close(write)
    os.close(out)


def test_a_text_file_that_has_read_ahead_is_refused(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes").write_bytes(b"a line\n" + framed(Note("1")))
    file = open(tmp_path / "notes", encoding="latin-1")  # noqa: SIM115 - it is the session's, in the end
    inheritable = os.get_inheritable(file.fileno())
    out = os.open(os.devnull, os.O_WRONLY)
    assert file.readline() == "a line\n"
    with pytest.raises(InvalidStreamError, match="has read text ahead"):
        peer.create_stream_session(out, file)
    assert os.get_inheritable(file.fileno()) == inheritable
    file.seek(7)
    session = peer.create_stream_session(out, file)
    notes, closed = collect(session, Note), ended(session)
    tick_until(lambda: closed, peer)
    assert notes == [Note("1")]


@pytest.mark.parametrize("more", [b"more", b"\xc3", b"x" * 20_000])
def test_a_text_file_around_a_socket_that_has_read_ahead_is_refused(peer: IpcPeer, more: bytes) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(b"a line\n" + more)
    with ours, theirs, ours.makefile("r", encoding="utf-8") as file:
        assert file.readline() == "a line\n"
        with pytest.raises(InvalidStreamError, match="has read text ahead"):
            peer.create_stream_session(ours, file)
        ours.setblocking(False)
        theirs.sendall(b"the end")
        assert ours.recv(100_000).endswith(b"the end")


def test_a_text_file_that_is_written_too_and_has_read_ahead(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    out = os.open(os.devnull, os.O_WRONLY)
    with tempfile.NamedTemporaryFile("w+", dir=tmp_path) as file:
        file.write("a line\nmore")
        file.seek(0)
        file.readline()
        with pytest.raises(InvalidStreamError, match="has read text ahead"):
            peer.create_stream_session(out, file)
    (tmp_path / "notes").write_bytes(b"+" + framed(Note("1")))
    reader = open(tmp_path / "notes", "r+")  # noqa: SIM115 - it is the session's
    assert reader.buffer.read(1) == b"+"
    assert peer.create_stream_session(out, reader).receive(PATIENCE) == Note("1")


class Holder:
    """A stream by its descriptor alone, with an attribute that text layers have."""

    def __init__(self, fd: int) -> None:
        self.buffer = os.fdopen(fd, "rb")

    def fileno(self) -> int:
        return self.buffer.fileno()

    def close(self) -> None:
        self.buffer.close()


@pytest.mark.parametrize("wrap", [Holder, os.fdopen])
def test_what_was_read_ahead_is_taken_without_a_null_device(
    peer: IpcPeer, wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "devnull", "/no/such/device")  # as in a chroot
    (read, write), (out, sink) = os.pipe(), os.pipe()
    reader = wrap(read)
    write_all(write, b"+" + framed(Note("1")))
    assert reader.buffer.read(1) == b"+"
    session = peer.create_stream_session(sink, reader)
    assert session.receive(PATIENCE) == Note("1")
    os.close(write)
    os.close(out)


@pytest.mark.parametrize("layer", [None, io.TextIOWrapper, io.BufferedReader])
def test_a_compressed_file_is_used_by_its_methods(peer: IpcPeer, tmp_path: pathlib.Path, layer: Any) -> None:
    def opened(mode: str) -> Any:
        zipped: Any = gzip.open(tmp_path / "notes.gz", mode)  # noqa: SIM115
        if layer is io.BufferedReader and mode == "wb":
            return io.BufferedWriter(zipped)
        return layer(zipped) if layer else zipped

    notes = [Note(str(index), bytes(1000)) for index in range(100)]
    with peer.create_stream_session(opened("wb"), os.open(os.devnull, os.O_RDONLY)) as session:
        for note in notes:
            session.notify(note)
    with gzip.open(tmp_path / "notes.gz") as file:
        assert file.read() == b"".join(map(framed, notes))
    session = peer.create_stream_session(os.open(os.devnull, os.O_WRONLY), opened("rb"))
    got, closed = collect(session, Note), ended(session)
    tick_until(lambda: closed, peer)
    assert got == notes


def test_a_reader_whose_peek_fails_is_refused_as_it_was(peer: IpcPeer) -> None:
    class Strange:
        def fileno(self) -> int:
            return read

        def peek(self, size: int) -> bytes:
            raise AssertionError

        read1 = peek

    read, write = os.pipe()
    with pytest.raises(InvalidStreamError, match="cannot be used as a stream: TypeError"):
        peer.create_stream_session(write, Strange())  # type: ignore[arg-type, unused-ignore]
    assert os.get_blocking(read) and os.get_blocking(write)
    os.close(read)
    os.close(write)


def test_all_that_was_read_ahead_and_then_the_end(peer: IpcPeer) -> None:
    (read, write), (out, sink) = os.pipe(), os.pipe()
    reader = os.fdopen(read, "rb")
    write_all(write, b"a line\n" + framed(Note("1")))
    os.close(write)
    assert reader.readline() == b"a line\n"
    session = peer.create_stream_session(sink, reader)
    notes, closed = collect(session, Note), ended(session)
    tick_until(lambda: closed, peer)
    assert notes == [Note("1")]
    os.close(out)


def test_a_writer_with_text_of_its_own(peer: IpcPeer) -> None:
    (read, write), (nothing, hold) = os.pipe(), os.pipe()
    writer = os.fdopen(write, "wb")
    writer.write(b"not flushed, ")
    session = peer.create_stream_session(writer, nothing)
    session.notify(Note("frame"))
    expected = b"not flushed, " + framed(Note("frame"))
    assert read_exactly(read, len(expected)) == expected
    os.close(read)
    os.close(hold)


def test_socket_files_with_read_ahead(peer: IpcPeer) -> None:
    a, b = socket.socketpair()
    with a, b:
        b.sendall(b"HELLO\n" + framed(Note("1")))
        reader = a.makefile("rb")
        assert reader.readline() == b"HELLO\n"
        session = peer.create_stream_session(a, reader)
        assert session.receive(PATIENCE) == Note("1")
        session.notify(Note("2"))
        assert read_exactly(b.fileno(), 10) == framed(Note("2"))[:10]
        session.close()


# -- what is no stream


@pytest.mark.parametrize("bad", [io.StringIO(), None, "text", 5.0, -1, 99999, object()], ids=repr)
def test_what_has_no_descriptor_is_refused_and_nothing_changes(peer: IpcPeer, bad: Any) -> None:
    a, b = socket.socketpair()
    with a, b:
        for streams in ((a, bad), (bad, a), (a, a, bad)):
            if streams[-1] is None and len(streams) == 3:
                continue
            with pytest.raises(InvalidStreamError):
                peer.create_stream_session(*streams)
            assert a.gettimeout() is None and os.get_blocking(a.fileno())
        assert peer.sessions == ()


@pytest.mark.parametrize("refusal", [NotImplementedError, AttributeError, io.UnsupportedOperation, OSError, ValueError])
def test_an_object_whose_fileno_refuses_is_used_by_its_methods(peer: IpcPeer, refusal: Any) -> None:
    class Refusing(Scripted):
        def fileno(self) -> int:
            raise refusal

    stream = Refusing("", lambda: None)
    session = peer.create_stream_session(stream, stream)  # type: ignore[arg-type]
    assert session.receive(PATIENCE) == Note("there")
    session.notify(Note("a"))
    assert stream.written == framed(Note("a"))


@pytest.mark.parametrize("error", [RuntimeError, LookupError, TypeError, MemoryError])
@pytest.mark.parametrize("name", ["fileno", "flush", "closed", "write"])
def test_a_stream_that_raises_anything_while_it_is_opened_is_refused(peer: IpcPeer, name: str, error: Any) -> None:
    class Raising(io.FileIO if name in ("fileno", "flush") else Scripted):  # type: ignore[misc, unused-ignore]
        raises = True

        def __getattribute__(self, asked: str) -> Any:
            if asked == name and type(self).raises:
                raise error("not today")
            return super().__getattribute__(asked)

    read, write = os.pipe()
    stream = Raising(write, "w") if name in ("fileno", "flush") else Raising("", lambda: None)
    expected = MemoryError if error is MemoryError else InvalidStreamError
    with pytest.raises(expected, match="not today"):
        peer.create_stream_session(stream, read)
    assert not peer.sessions and os.get_blocking(read) and os.get_blocking(write)
    Raising.raises = False
    if name not in ("fileno", "flush"):
        os.close(write)
    stream.close()
    os.close(read)


@pytest.mark.parametrize("as_number", [False, True])
def test_what_another_session_writes_to_is_refused_as_output(peer: IpcPeer, as_number: bool) -> None:
    (ours, far), (read, write) = socket.socketpair(), os.pipe()
    with far:
        first = peer.create_socket_session(ours)
        with pytest.raises(InvalidStreamError, match="is written by another session of this peer; use that session"):
            peer.create_stream_session(ours.fileno() if as_number else ours, read)
        first.notify(Note("still works"))
        assert framed(Note("still works")) == far.recv(1000) and peer.sessions == (first,)
        peer.remove_session(first)
        peer.create_stream_session(ours, read).close()
        os.close(write)


def test_what_another_session_writes_to_is_refused_as_both_ways(peer: IpcPeer) -> None:
    (ours, far), (read, write) = socket.socketpair(), os.pipe()
    with far:
        first = peer.create_stream_session(ours, read)
        with pytest.raises(InvalidStreamError, match="is written by another session of this peer; use that session"):
            peer.create_socket_session(ours)
        first.notify(Note("still works"))
        assert framed(Note("still works")) == far.recv(1000) and peer.sessions == (first,)
        peer.remove_session(first)
        peer.create_socket_session(ours).close()
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("writer_first", [False, True])
def test_what_one_session_writes_is_not_read_by_another(peer: IpcPeer, writer_first: bool) -> None:
    (ours, far), (read, write), (read2, write2) = socket.socketpair(), os.pipe(), os.pipe()

    def write_it() -> Session:
        return peer.create_stream_session(ours, read)

    def read_it() -> Session:
        return peer.create_stream_session(write2, ours)

    first, second = (write_it, read_it) if writer_first else (read_it, write_it)
    with far, ours:
        session = first()
        with pytest.raises(InvalidStreamError, match="another session of this peer"):
            second()
        peer.remove_session(session)
        second()
        peer.close()
    for fd in (read2, write):
        os.close(fd)
    os.close(write2 if second is write_it else read)


def test_output_of_another_session_is_taken_once_its_number_is_another_files(peer: IpcPeer) -> None:
    (read, write), (read2, write2), (read3, write3) = os.pipe(), os.pipe(), os.pipe()
    peer.create_stream_session(write, read)
    with pytest.raises(InvalidStreamError, match="is written by another session"):
        peer.create_stream_session(write, read2)
    os.dup2(write3, write)
    assert peer.create_stream_session(write, read2).is_open
    for fd in (write2, read3, write3):
        os.close(fd)


def test_errors_of_a_transport_alone_do_not_stay_in_memory() -> None:
    read, write = os.pipe()
    with open(write, "wb", buffering=0) as output, open(read, "rb", buffering=0) as source:
        transport = StreamTransport(output, [source], PickleMessageSerializer())
        other = os.pipe()
        os.close(other[0])
        broken = StreamTransport(other[1], [source], PickleMessageSerializer())
        tracemalloc.start()
        try:
            for _ in range(20):
                with pytest.raises(StreamClosedError):
                    broken.send(Note(data=bytes(100_000)))
            assert tracemalloc.get_traced_memory()[0] < 500_000
        finally:
            tracemalloc.stop()
        broken.close()
        transport.close()


def test_transport_that_was_closed_receives_no_more() -> None:
    read, write = os.pipe()
    transport = StreamTransport(write, [read], PickleMessageSerializer())
    transport.send(Note("1"))
    assert transport.receive() == [Note("1")]
    transport.close()
    for _ in range(2):
        with pytest.raises(StreamClosedError, match="this side closed"):
            transport.receive()


def test_closed_streams_are_refused(peer: IpcPeer) -> None:
    read, write = os.pipe()
    closed = os.fdopen(os.dup(read), "rb")
    closed.close()
    number = os.dup(read)
    os.close(number)
    sock = socket.socket()
    sock.close()
    for bad in (closed, number, sock):
        with pytest.raises(InvalidStreamError):
            peer.create_stream_session(write, bad)
    os.close(read)
    os.close(write)


def test_only_connected_stream_sockets_are_taken(peer: IpcPeer) -> None:
    with socket.socket() as fresh, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        for bad, match in ((fresh, "connect"), (datagram, "stream")):
            with pytest.raises(ValueError, match=match):
                peer.create_socket_session(bad)
    closed = socket.socket()
    closed.close()
    with pytest.raises(ValueError):
        peer.create_socket_session(closed)
    with pytest.raises(TypeError):
        peer.create_socket_session(5)  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ValueError):
        peer.create_socket_session(server)
    assert peer.sessions == ()


def test_what_was_written_before_the_other_side_closed_is_read_on_macos(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sock: socket.socket) -> Any:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # as there, once the other side is gone

    ours, other = socket.socketpair()
    other.sendall(framed(Note("last words")))
    other.close()
    monkeypatch.setattr(socket.socket, "getpeername", refuse)
    session = peer.create_socket_session(ours)
    assert session.receive(5) == Note("last words")
    tick_until(lambda: not session.is_open, peer)


# -- much


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["stdio", "socket"])
def test_8_mib_echoed_twice_at_once(peer: IpcPeer, kind: str) -> None:
    if kind == "stdio":
        session = peer.create_command_session(role("echo"))
        process = None
    else:
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(role("echo socket", theirs.fileno()), pass_fds=[theirs.fileno()])
        theirs.close()
        session = peer.create_socket_session(ours)
    try:
        values = [bytes([index]) * (8 * 1024 * 1024) for index in (1, 2)]
        promises = [session.request(Ping(value), expect=Pong) for value in values]
        for promise, value in zip(promises, values):
            assert promise.wait().value == value
        session.close()
    finally:
        if process is not None:
            assert process.wait(PATIENCE) == 0


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["stdio", "small pipes", "socket"])
def test_both_processes_flood_before_either_ticks(peer: IpcPeer, kind: str) -> None:
    count, size = (300, 3000) if kind == "small pipes" else (700, 50_000)  # 35 MB each way, as fast as both can
    process = None
    if kind != "socket":
        pipes = 4096 if kind == "small pipes" else -1
        session = peer.create_command_session(role("flood first", count, size), pipesize=pipes)
    else:
        ours, theirs = socket.socketpair()
        command = role("flood first", count, size, theirs.fileno())
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        session = peer.create_socket_session(ours)
    try:
        notes: List[str] = []
        session.on_message(lambda note: notes.append(note.text) if isinstance(note, Note) else None)
        for index in range(count):
            session.notify(Note(str(index), bytes(size)))
        assert notes == []
        promise = session.request(Ping("what came?"), expect=Pong)
        assert promise.wait().value == [str(index) for index in range(count)]
        # The reply was sent behind all of them.
        assert notes == [str(index) for index in range(count)]
        session.close()
    finally:
        if process is not None:
            assert process.wait(PATIENCE) == 0


def test_a_huge_message_keeps_no_other_session_waiting(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    c, d = peer.create_session_pair()
    d.on_request(lambda ping: Pong(ping.value))
    got = collect(b, Note)
    a.notify(Note("huge", bytes(40_000_000)))
    for index in range(3):
        assert c.request(Ping(index), expect=Pong).wait().value == index
    assert got == []  # it is still under way
    tick_until(lambda: got, peer)


@pytest.mark.slow
def test_more_than_a_thousand_idle_sessions_cost_nothing(peer: IpcPeer) -> None:
    def busy(a: Session) -> float:
        def work() -> None:
            for _ in range(200):
                a.request(Ping(), expect=Pong).wait()

        return min(cpu_seconds(work) for _ in range(5))

    with many_descriptors(3300):
        a, b = peer.create_session_pair()
        b.on_request(lambda ping: Pong(ping.value))
        alone = busy(a)
        idle = [peer.create_session_pair() for _ in range(750)]
        assert len(peer.sessions) == 1502
        crowded = busy(a)
        assert crowded < 3 * alone + 0.01, f"{alone:.4f} s alone, {crowded:.4f} s among 1500"
        assert cpu_seconds(lambda: peer.tick(0.3)) < 0.05
        # Each of them is awake when something comes.
        got: List[Any] = []
        for left, right in idle[::50]:
            right.on_message(lambda note, session: got.append((note.text, session)))
            left.notify(Note(str(len(got))))
        tick_until(lambda: len(got) == 15, peer)
        start = time.monotonic()
        peer.close()
        assert time.monotonic() - start < 10


def test_a_large_message_takes_its_own_size_and_little_more(peer: IpcPeer) -> None:
    size = 32 * 1024 * 1024
    link = Link("socketpair", pathlib.Path())
    session = peer.create_socket_session(link.a[0])
    frame = framed(Note("large", bytes(size)))
    sender = threading.Thread(target=link.b[0].sendall, args=(frame,))
    tracemalloc.start()
    try:
        sender.start()
        got: List[int] = []
        session.on_message(lambda note: got.append(len(note.data)))
        tick_until(lambda: got, peer)
        sender.join(PATIENCE)
        _, peak = tracemalloc.get_traced_memory()
        assert got == [size]
        # The payload, which may grow by an eighth ahead of what arrives, and the object made of it.
        assert peak < 2.3 * size, f"{peak / size:.2f} times its size"
        peer.tick(0)
        held, _ = tracemalloc.get_traced_memory()
        assert held < size / 4
    finally:
        tracemalloc.stop()
    link.close_b()


def test_a_large_message_is_sent_without_copies(peer: IpcPeer) -> None:
    size = 16 * 1024 * 1024
    a, b = peer.create_session_pair()
    note = Note("large", bytes(size))
    tracemalloc.start()
    try:
        a.notify(note)
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 1.3 * size, f"{peak / size:.2f} times its size"
    finally:
        tracemalloc.stop()
    got: List[int] = []
    b.on_message(lambda note: got.append(len(note.data)))
    tick_until(lambda: got, peer)


def test_memory_grows_with_what_arrives_and_not_with_what_is_announced(peer: IpcPeer) -> None:
    links = [Link("pipe", pathlib.Path()) for _ in range(20)]
    sessions = [peer.create_stream_session(*link.a) for link in links]
    tracemalloc.start()
    try:
        for link in links:
            os.write(link.raw[0], frame_header(60 * 1024 * 1024) + b"x" * 100)
        for _ in range(5):
            peer.tick(0)
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 10 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert all(session.is_open for session in sessions)
    for link in links:
        link.close_b()


def test_sockets_leave_nothing_behind(peer: IpcPeer) -> None:
    peer.create_session_pair()[0].close()
    peer.tick(0)
    before = None
    for _ in range(3):
        for kind in KINDS:
            if kind == "fifo":
                continue
            link = Link(kind, pathlib.Path())
            a, b = peer.create_stream_session(*link.a), peer.create_stream_session(*link.b)
            a.notify(Note("unread"))
            a.close()
            tick_until(lambda b=b: not b.is_open, peer)
        if before is None:
            before = listing()
        assert listing() == before


def test_a_killed_process_at_the_other_end_of_a_socket(peer: IpcPeer) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(role("echo socket", theirs.fileno()), pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        session = peer.create_socket_session(ours)
        assert session.request(Ping(1), expect=Pong).wait().value == 1
        pending = session.request(Ping(bytes(2_000_000)), timeout=None)
        process.kill()
        await_death(process)
        with pytest.raises(StreamClosedError):
            pending.wait(PATIENCE)
            session.request(Ping(1)).wait()
    finally:
        kill(process)


# -- one stream twice, and streams that are closed already


@pytest.mark.parametrize("how", ["numbers", "object and number", "number and object"])
def test_a_stream_that_is_written_and_read_is_closed_once(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    ours, other = socket.socketpair()
    with other:
        fd = fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD_CLOEXEC, 300)
        ours.close()
        whole = socket.socket(fileno=fd) if how != "numbers" else None
        write: Any = whole if how == "object and number" else int(str(fd))  # above 256, equal ones are two objects
        read: Any = whole if how == "number and object" else int(str(fd))
        session = peer.create_stream_session(write, read)
        other.sendall(framed(Note("there")))
        assert session.receive(PATIENCE) == Note("there")
        closed: List[int] = []
        close = os.close

        def counting(number: int) -> None:
            closed.append(number)
            close(number)

        monkeypatch.setattr(os, "close", counting)
        session.close()
        monkeypatch.undo()
        assert closed.count(fd) == (1 if whole is None else 0)  # the socket closes itself
        with pytest.raises(OSError):
            os.fstat(fd)
        assert other.recv(100) == b""


@pytest.mark.parametrize("kind", ["raw", "buffered", "text", "socket file"])
@pytest.mark.parametrize("side", ["write", "read"])
def test_a_closed_file_object_is_refused(peer: IpcPeer, kind: str, side: str) -> None:
    a, b = socket.socketpair()
    with a, b:
        mode = "w" if side == "write" else "r"
        closed: Any
        if kind == "socket file":
            closed = b.makefile("wb" if side == "write" else "rb")
        elif kind == "text":
            closed = os.fdopen(os.open(os.devnull, os.O_RDWR), mode)
        else:
            closed = os.fdopen(os.open(os.devnull, os.O_RDWR), mode + "b", 0 if kind == "raw" else -1)
        closed.close()
        with pytest.raises(InvalidStreamError):
            peer.create_stream_session(*((closed, a) if side == "write" else (a, closed)))
        assert a.gettimeout() is None and os.get_blocking(a.fileno())
        assert peer.sessions == ()


# -- a stream that is closed under a session which nobody ticks

KINDS = ["idle", "blocked", "full", "batch"]


@pytest.mark.parametrize("state", KINDS)
@pytest.mark.parametrize("how", ["object", "number", "replaced"])
def test_a_send_that_raises_has_queued_nothing(peer: IpcPeer, state: str, how: str) -> None:
    a, b = socket.socketpair()
    c, d = socket.socketpair()
    fd = a.fileno() if how == "object" else a.detach()
    session = peer.create_stream_session(a if how == "object" else fd, c)
    if state in ("blocked", "full"):
        session.notify(Note("x" * (600_000 if state == "blocked" else 2_000_000)))
        assert session.queued_bytes
    if how == "object":
        a.close()
    elif how == "number":
        os.close(fd)
    else:
        other = os.open(os.devnull, os.O_RDONLY)
        os.dup2(other, fd)
        os.close(other)
    raised = 0
    with CpuMeter() as meter:
        for _ in range(8):
            before = session.queued_bytes
            try:
                if state == "batch":
                    with session.batch():
                        session.notify(Note("y" * 300_000))
                else:
                    session.notify(Note("y" * 300_000))
            except (InvalidStreamError, StreamClosedError):
                raised += 1
                assert session.queued_bytes <= before
        with pytest.raises((InvalidStreamError, StreamClosedError)):
            session.flush(5)
        peer.broadcast(Note("z" * 300_000))
    assert raised >= (8 if state in ("idle", "full", "batch") else 3) and meter.real < 3
    session.on_exception(lambda error: None)
    tick_until(lambda: not session.is_open, peer)
    if how == "replaced":
        os.close(fd)
    for sock in (b, d):
        sock.close()


def test_one_of_two_inputs_that_ends_inside_a_message_is_logged(peer: IpcPeer, caplog: pytest.LogCaptureFixture) -> None:
    (first, write1), (second, write2), (read, out) = os.pipe(), os.pipe(), os.pipe()
    session = peer.create_stream_session(out, first, second)
    write_all(write1, framed(Note("half"))[:-5])
    os.close(write1)
    tick_until(lambda: caplog.records, peer)
    assert "in the middle of a frame" in caplog.records[0].getMessage() and session.is_open
    write_all(write2, framed(Note("other")))
    assert session.receive(PATIENCE) == Note("other")
    session.close()
    os.close(write2)
    os.close(read)
    assert ["other inputs of that session go on" in record.getMessage() for record in caplog.records] == [True]


class TakesNothing:
    """A stream object that takes nothing for a while, and says so by 0 or by None."""

    def __init__(self, says: Optional[int]) -> None:
        self.says = says
        self.full = True
        self.asked = 0
        self.written = b""

    def write(self, data: bytes) -> Optional[int]:
        self.asked += 1
        if self.full:
            return self.says
        self.written += data
        return len(data)

    def read(self, size: int) -> Optional[bytes]:
        return None

    def close(self) -> None:
        pass


@pytest.mark.parametrize("says", [0, None])
def test_object_that_takes_nothing_now_is_asked_again_later(peer: IpcPeer, says: Optional[int]) -> None:
    stream = TakesNothing(says)
    session = peer.create_stream_session(stream, stream)  # type: ignore[arg-type]
    session.notify(Note("a"))
    assert stream.asked == 1 and session.queued_bytes
    peer.tick(0)
    assert stream.asked < 10 and not stream.written
    stream.full = False
    tick_until(lambda: not session.queued_bytes, peer)
    assert stream.written == framed(Note("a"))


class GivesLittle(TakesNothing):
    """A stream object that returns one byte for each call, and then nothing."""

    def __init__(self, data: bytes) -> None:
        super().__init__(None)
        self.data = data

    def read(self, size: int) -> Optional[bytes]:
        piece, self.data = self.data[:1], self.data[1:]
        return piece or None


def test_object_that_gives_little_at_a_time_is_asked_on_until_nothing_is_there(peer: IpcPeer) -> None:
    stream = GivesLittle(framed(Note("", b"x" * 5000)))  # with a pause behind each byte that would take 50 s
    peer.create_stream_session(stream, stream)  # type: ignore[arg-type]
    assert peer.tick(PATIENCE) == 1
    assert peer.next_deadline() == 0.0
    peer.tick(0)
    due = peer.next_deadline()
    assert due is not None and 0 < due <= 0.01


def test_object_that_says_by_an_exception_that_nothing_is_there_is_not_asked_at_once(peer: IpcPeer) -> None:
    class Raises(GivesLittle):
        def read(self, size: int) -> Optional[bytes]:
            data, self.data = self.data, b""
            if not data:
                raise BlockingIOError
            return data

    stream = Raises(framed(Note("a")))
    peer.create_stream_session(stream, stream)  # type: ignore[arg-type]
    assert peer.tick() == 1
    peer.tick()
    due = peer.next_deadline()
    assert due is not None and 0 < due <= 0.01


def test_object_that_takes_nothing_now_is_asked_as_often_once_the_other_has_ended(peer: IpcPeer) -> None:
    stream = TakesNothing(None)
    session = peer.create_stream_session(stream, io.BytesIO())  # type: ignore[arg-type]
    session.notify(Note("a"))
    for _ in range(3):
        peer.tick(0)
    assert session.is_open and session.queued_bytes
    due = peer.next_deadline()
    assert due is not None and due <= 0.01
    session.close(0)  # or the peer would wait for the stream


class FailsToClose(TakesNothing):
    """A stream object whose close() raises what no file raises."""

    def close(self) -> None:
        raise LookupError("not today")


def test_a_stream_whose_close_fails_keeps_no_other_open(peer: IpcPeer, caplog: pytest.LogCaptureFixture) -> None:
    reads = io.BytesIO()
    session = peer.create_stream_session(FailsToClose(0), reads)  # type: ignore[arg-type]
    session.close()
    assert reads.closed
    assert [(record.levelname, record.exc_info and str(record.exc_info[1])) for record in caplog.records] == [
        ("ERROR", "not today")
    ]


def test_an_interruption_while_a_socket_object_is_made_closes_no_descriptor(peer: IpcPeer) -> None:
    ours, theirs = socket.socketpair()

    def ring(number: int, frame: Any) -> None:
        raise Interruption

    def at_the_end_of_init(frame: Any, event: str, arg: Any) -> None:
        if event == "return" and frame.f_code is socket.socket.__init__.__code__:
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, ring)
    try:
        sys.setprofile(at_the_end_of_init)
        with pytest.raises(Interruption):
            peer.create_stream_session(ours.fileno(), ours.fileno())
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGUSR1, before)
    gc.collect()
    ours.send(b"x")
    assert theirs.recv(1) == b"x"
    ours.close()
    theirs.close()


class Stopping(io.FileIO):
    """A stream of which one method, or attribute, raises StopIteration."""

    stops = ""

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "stops"):
            raise StopIteration(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(("name", "place"), [("flush", 0), ("fileno", 0), ("fileno", 1), ("fileno", 2)])
def test_a_stream_that_raises_stop_iteration_while_it_is_opened_is_named(peer: IpcPeer, name: str, place: int) -> None:
    # The loops that store what was opened would take it for their own end, and the streams behind it for not given.
    (read, write), (read2, write2) = os.pipe(), os.pipe()
    streams = [Stopping(write, "w"), Stopping(read), Stopping(read2)]
    try:
        streams[place].stops = name
        with pytest.raises(InvalidStreamError, match=f"name={streams[place].name} .*StopIteration"):
            peer.create_stream_session(*streams)
        streams[place].stops = ""
        assert not peer.sessions and not any(stream.closed for stream in streams)
        assert all(os.get_blocking(stream.fileno()) for stream in streams)
    finally:
        for stream in streams:
            stream.stops = ""
            stream.close()
        os.close(write2)


@pytest.mark.parametrize("method", ["read", "write"])
def test_an_object_that_raises_stop_iteration_has_failed(peer: IpcPeer, method: str) -> None:
    def stop(data: Any) -> Any:
        raise StopIteration

    stream = TakesNothing(None)
    setattr(stream, method, stop)
    session = peer.create_stream_session(stream, stream)  # type: ignore[arg-type]
    if method == "write":
        with pytest.raises(StreamClosedError, match="StopIteration"):
            session.notify(Note("a"))
    tick_until(lambda: not session.is_open, peer)
    assert "StopIteration" in str(session.reason)


class Scripted(TakesNothing):
    """A stream object that has something to read, of which one call does something else first."""

    def __init__(self, method: str, first: Callable[[], Any]) -> None:
        super().__init__(None)
        self.full = False
        self.data: Optional[bytes] = framed(Note("there"))
        self.method = method
        self.first: Optional[Callable[[], Any]] = first

    def called(self, method: str) -> Any:
        first = self.first
        if method == self.method and first is not None:
            self.first = None
            return first()
        return None

    def read(self, size: int) -> Any:
        instead = self.called("read")
        if instead is not None:
            return instead
        data, self.data = self.data, None
        return data

    def write(self, data: bytes) -> Optional[int]:
        self.called("write")
        return super().write(data)


class Ringing:
    """What a read returns; an alarm comes when its bytes are asked for, once."""

    rung = False

    def __buffer__(self, flags: int) -> memoryview:
        if not self.rung:
            self.rung = True
            ring()
        return memoryview(framed(Note("there")))


def ring() -> None:
    signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize("kind", [InterruptionError, ValueError, TypeError, TimeoutError, Interruption])
@pytest.mark.parametrize("where", ["read", "write", "buffer"])
def test_what_a_signal_handler_raises_in_a_method_of_an_object_is_no_fault_of_the_stream(
    peer: IpcPeer, where: str, kind: Any
) -> None:
    if where == "buffer" and sys.version_info < (3, 12):
        pytest.skip("only what is written in C has a buffer")

    def handler(*_: Any) -> None:
        raise kind("alarm")

    stream = Scripted("write", ring) if where == "write" else Scripted("read", Ringing if where == "buffer" else ring)
    session = peer.create_stream_session(stream, stream)  # type: ignore[arg-type]
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(kind, match="alarm"):
            if where == "write":
                session.notify(Note("a"))
            else:
                peer.tick(0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert session.receive(PATIENCE) == Note("there")
    session.notify(Note("b"))
    session.flush()
    assert stream.written == (framed(Note("a")) if where == "write" else b"") + framed(Note("b"))


@pytest.mark.parametrize("method", ["read", "write"])
def test_what_a_method_of_an_object_raises_itself_ends_the_session(peer: IpcPeer, method: str) -> None:
    def fail() -> None:
        raise LookupError("out of order")

    stream = Scripted(method, fail)
    session = peer.create_stream_session(stream, stream)  # type: ignore[arg-type]
    if method == "write":
        with pytest.raises(StreamClosedError, match="out of order"):
            session.notify(Note("a"))
    tick_until(lambda: not session.is_open, peer)
    assert "out of order" in str(session.reason)


@pytest.mark.parametrize("says", [-1, 10_000, "three", b"abc"])
def test_object_that_does_not_say_how_much_it_took_is_to_blame(peer: IpcPeer, says: Any) -> None:
    stream = TakesNothing(says)
    session = peer.create_stream_session(stream, stream)  # type: ignore[arg-type]
    with pytest.raises(StreamClosedError, match=r"TakesNothing.* cannot be written: write\(\) returned .*; it must return"):
        session.notify(Note("a"))
