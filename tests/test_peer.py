"""IpcPeer: making sessions over all kinds of streams, broadcast, removing, closing."""

import copy
import dataclasses
import gc
import os
import pickle
import resource
import select
import socket
import subprocess
import sys
import types
import warnings
from typing import Any, Callable, List

import pytest

from stream_ipc import (
    DeferredReply,
    FrameTooLargeError,
    InvalidStreamError,
    IpcPeer,
    JsonMessageSerializer,
    Message,
    PickleMessageSerializer,
    PidHrtimeRequestIdGenerator,
    RequestTimeoutError,
    SerializationError,
    Session,
    StreamClosedError,
    StreamTransport,
    WorkerPool,
)
from tests.helpers import (
    CpuMeter,
    RawPeer,
    drop_queued,
    framed,
    no_pending,
    read_without_dispatching,
    run_python,
    set_limit,
    tick_until,
    unframe,
    values,
)
from tests.messages import Note, Ping, Pong

# -- arguments


@pytest.mark.parametrize("size", [0, -1, 1 << 32, 1 << 40])
def test_frame_size_that_no_frame_can_have(size: int) -> None:
    with pytest.raises(ValueError):
        IpcPeer(max_frame_size=size)


@pytest.mark.parametrize("size", ["1", 1.5, None, True])
def test_frame_size_that_is_no_number(size: Any) -> None:
    with pytest.raises(TypeError):
        IpcPeer(max_frame_size=size)


def test_what_is_no_serializer_and_no_generator() -> None:
    for bad in (object(), PidHrtimeRequestIdGenerator()):
        with pytest.raises(TypeError):
            IpcPeer(bad)  # type: ignore[arg-type]
    for bad in (object(), PickleMessageSerializer()):
        with pytest.raises(TypeError):
            IpcPeer(id_generator=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [PickleMessageSerializer, JsonMessageSerializer])
def test_conversation_with_each_serializer_and_generator(make: Callable[[], Any]) -> None:
    with IpcPeer(make(), PidHrtimeRequestIdGenerator(), timeout=None) as peer:
        a, b = peer.create_session_pair()
        b.on_request(lambda ping: Pong(ping.value))
        promises = [a.request(Ping(index), expect=Pong) for index in range(100)]
        assert len({promise.id for promise in promises}) == 100
        assert [promise.wait().value for promise in promises] == list(range(100))


# -- streams of all kinds


def converse(peer: IpcPeer, a: Session, b: Session) -> None:
    b.on_request(lambda ping: Pong(ping.value))
    big = b"x" * 300000
    assert a.request(Ping(big), expect=Pong).wait().value == big
    a.on_request(lambda ping: Pong(ping.value))
    assert b.request(Ping(1), expect=Pong).wait().value == 1
    a.close()
    tick_until(lambda: not b.is_open, peer)


def test_files_of_sockets_and_a_descriptor_beside_a_file(peer: IpcPeer) -> None:
    # A session owns what it was given: conftest looks whether the descriptors are closed.
    left, right = socket.socketpair()
    with left, right:
        one, two = left.makefile("rwb", 0), right.makefile("rwb", 0)
    converse(peer, peer.create_stream_session(one, one), peer.create_stream_session(two, two))
    (read_a, write_b), (read_b, write_a) = os.pipe(), os.pipe()
    a = peer.create_stream_session(os.fdopen(write_a, "wb"), read_a)
    b = peer.create_stream_session(os.fdopen(write_b, "wb"), read_b)
    converse(peer, a, b)


def test_what_a_buffered_writer_holds_goes_first(peer: IpcPeer) -> None:
    left, right = socket.socketpair()
    read, write = os.pipe()
    writer = os.fdopen(write, "wb")
    writer.write(b"before ")
    session = peer.create_stream_session(writer, left)
    session.notify(Note("x"))
    data = os.read(read, 1000)
    assert data.startswith(b"before ") and unframe(data[7:]) == [Note("x")]
    os.close(read)
    right.close()


def test_flags_of_what_was_inherited_stay(peer: IpcPeer) -> None:
    # A child of ours whose stdin and stdout are pipes that we hold, too.
    code = "from tests.child import ROLES\nROLES['echo']()"
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=in_read, stdout=out_write)
    session = peer.create_stream_session(in_write, out_read)
    assert session.request(Ping(5), expect=Pong).wait().value == 5
    assert os.get_blocking(in_read) and os.get_blocking(out_write)
    session.close()
    os.close(in_read)
    os.close(out_write)
    assert process.wait(20) == 0


def test_transport_made_by_hand(peer: IpcPeer) -> None:
    left, right = socket.socketpair()
    one = StreamTransport(left, [left], PickleMessageSerializer(), max_frame_size=1000)
    a, b = peer.create_session(one), peer.create_socket_session(right)
    assert a.transport is one
    with pytest.raises(FrameTooLargeError):
        a.notify(Note(data=b"x" * 2000))
    b.on_request(lambda ping: Pong(ping.value))
    assert a.request(Ping(1), expect=Pong).wait().value == 1


# -- broadcast


class Counting:
    def __init__(self) -> None:
        self.real = PickleMessageSerializer()
        self.count = 0

    def serialize(self, message: Message) -> bytes:
        self.count += 1
        return self.real.serialize(message)

    def deserialize(self, payload: Any) -> Message:
        return self.real.deserialize(payload)


def test_broadcast_reaches_all_and_encodes_once() -> None:
    serializer = Counting()
    with IpcPeer(serializer) as peer:
        raws = [RawPeer(peer) for _ in range(5)]
        try:
            assert peer.broadcast(Note("all")) == 5
            assert serializer.count == 1
            assert [raw.messages() for raw in raws] == [[Note("all")]] * 5
            raws[2].session.close()
            assert peer.broadcast(Note("again")) == 4
        finally:
            for raw in raws:
                raw.sock.close()
    with IpcPeer() as empty:
        assert empty.broadcast(Note()) == 0


@dataclasses.dataclass
class Unhashable(Counting):
    count: int = 0
    real: PickleMessageSerializer = dataclasses.field(default_factory=PickleMessageSerializer)


def test_broadcast_with_a_serializer_that_has_no_hash() -> None:
    with IpcPeer(Unhashable()) as peer, RawPeer(peer) as one, RawPeer(peer) as two:
        assert peer.broadcast(Note("all")) == 2
        assert one.messages() == two.messages() == [Note("all")]


def test_broadcast_refuses_what_cannot_travel(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        with pytest.raises(TypeError):
            peer.broadcast("text")  # type: ignore[arg-type]
        with pytest.raises(SerializationError):
            peer.broadcast(Note(data=lambda: None))
        assert raw.read() == b""
    with IpcPeer(max_frame_size=1000) as small:
        with RawPeer(small) as raw, pytest.raises(FrameTooLargeError):
            small.broadcast(Note(data=b"x" * 2000))


def test_broadcast_with_a_dead_session(peer: IpcPeer) -> None:
    with RawPeer(peer) as one, RawPeer(peer) as dead, RawPeer(peer) as two:
        dead.sock.close()
        errors: List[Any] = []
        dead.session.on_exception(lambda error, session: errors.append((type(error), session)))
        dead.session.on_close(lambda session: two.session.close())
        assert peer.broadcast(Note("x")) == 2
        assert one.messages() == [Note("x")] and two.messages() == [Note("x")]
        assert errors == [(StreamClosedError, dead.session)]
        tick_until(lambda: not dead.session.is_open, peer)
        assert peer.sessions == (one.session,)


@pytest.mark.parametrize("kind", ["dead", "stuck"])
def test_broadcast_tells_no_session_that_a_handler_of_another_has_closed(peer: IpcPeer, kind: str) -> None:
    told: List[Any] = []
    with RawPeer(peer) as first, RawPeer(peer) as second, RawPeer(peer) as third:
        first.session.on_exception(lambda error: second.session.close(0))
        for raw in (first, second, third):
            raw.session.on_exception(lambda error, session: told.append(session))
            if raw is not third and kind == "dead":
                raw.sock.close()
            elif raw is not third:
                raw.session.notify(Note(data=bytes(3_000_000)))
        peer.timeout = 0
        assert peer.broadcast(Note("news")) == 1
        assert told == [first.session] and third.messages() == [Note("news")]
        drop_queued(first.session)


@pytest.mark.slow
def test_broadcast_to_stuck_sessions_waits_once_and_tells_them() -> None:
    with IpcPeer(timeout=0.4) as peer:
        stuck = [RawPeer(peer) for _ in range(10)]
        good = RawPeer(peer)
        errors: List[Any] = []

        def keep(error: Exception, session: Session) -> bool:
            errors.append((error, session))
            return False

        try:
            for raw in stuck:
                raw.session.on_exception(keep)
                with pytest.raises(RequestTimeoutError):
                    while True:
                        raw.session.request(Ping(b"x" * 300000), timeout=0.01)
            queued = [raw.session.queued_bytes for raw in stuck]
            errors.clear()
            with CpuMeter() as meter:
                assert peer.broadcast(Note("news")) == 1
            assert 0.4 <= meter.real < 3, "the stuck ones are waited for once, not one after the other"
            assert good.messages() == [Note("news")]
            assert [session for _, session in errors] == [raw.session for raw in stuck]
            assert all(isinstance(error, RequestTimeoutError) for error, _ in errors)
            assert [raw.session.queued_bytes for raw in stuck] == queued and all(raw.session.is_open for raw in stuck)
        finally:
            for raw in [*stuck, good]:
                raw.sock.close()


def test_broadcast_with_peers_of_different_limits(peer: IpcPeer) -> None:
    left, right = socket.socketpair()
    with right, RawPeer(peer) as raw:
        small = peer.create_session(StreamTransport(left, [left], PickleMessageSerializer(), max_frame_size=1000))
        errors: List[Any] = []
        small.on_exception(lambda error: errors.append(type(error)) or False)  # type: ignore[func-returns-value]
        assert peer.broadcast(Note(data=b"x" * 2000)) == 1
        assert errors == [FrameTooLargeError] and len(raw.messages()) == 1 and small.is_open


# -- removing and closing


def test_removed_session_leaves_its_streams_open_and_as_they_were(peer: IpcPeer) -> None:
    left, right = socket.socketpair()
    left.settimeout(7)
    session = peer.create_socket_session(left)
    closed: List[Any] = []
    session.on_close(closed.append)
    promise = session.request(Ping())
    peer.remove_session(session)
    assert closed == [session] and not session.is_open and peer.sessions == ()
    with pytest.raises(StreamClosedError):
        promise.wait()
    assert left.fileno() != -1 and left.gettimeout() == 7
    right.recv(1000)
    left.sendall(b"still open")
    assert right.recv(100) == b"still open"
    peer.remove_session(session)  # a second time does no harm
    left.close()
    right.close()


def test_what_a_removed_session_has_read_and_not_written_is_told(
    peer: IpcPeer, raw: RawPeer, caplog: pytest.LogCaptureFixture
) -> None:
    @raw.session.on_message
    def leave(message: Note) -> None:
        peer.remove_session(raw.session)

    stream = raw.session.socket
    raw.write(*[framed(Note(str(number))) for number in range(3)])
    tick_until(lambda: not raw.session.is_open, peer)
    assert "with 2 messages that were read and not dispatched, and 0 bytes that were not written" in caplog.text
    assert stream is not None
    stream.close()
    caplog.clear()
    left, right = socket.socketpair()
    partly = peer.create_socket_session(left)
    right.sendall(framed(Note("half"))[:-1])
    tick_until(lambda: not select.select([left], [], [], 0)[0], peer)
    peer.remove_session(partly)
    assert "with 0 messages and the beginning of another that were read and not dispatched" in caplog.text
    caplog.clear()
    peer.remove_session(peer.create_socket_session(left))
    assert caplog.text == ""
    ended = peer.create_socket_session(left)
    right.close()
    with pytest.raises(StreamClosedError):
        ended.notify(Note())
    peer.remove_session(ended)
    assert caplog.text == ""  # that nothing more comes is no message
    left.close()


def test_session_of_another_peer_is_not_removed(peer: IpcPeer) -> None:
    with IpcPeer() as other:
        session = other.create_session_pair()[0]
        with pytest.raises(ValueError):
            peer.remove_session(session)
        assert session.is_open


def test_close_closes_every_session_and_may_be_repeated() -> None:
    peer = IpcPeer()
    pairs = [peer.create_session_pair() for _ in range(3)]
    promises = [a.request(Ping()) for a, _ in pairs]
    closed: List[Session] = []
    for pair in pairs:
        for session in pair:
            session.on_close(closed.append)
    assert len(peer.sessions) == 6
    peer.close()
    peer.close()
    assert not peer.sessions and len(closed) == 6
    for promise in promises:
        with pytest.raises(StreamClosedError):
            promise.wait()
    for make in (peer.create_session_pair, peer.create_stdio_session, lambda: peer.create_stream_session(0, 0)):
        with pytest.raises(RuntimeError, match="closed"):
            make()
    assert peer.broadcast(Note()) == 0
    repr(peer)


def test_close_flushes_all_sessions(peer: IpcPeer) -> None:
    with IpcPeer() as other:
        sent, received = [], []
        for index in range(3):
            left, right = socket.socketpair()
            a, b = other.create_socket_session(left), peer.create_socket_session(right)
            b.on_message(lambda note: received.append(len(note.data)))
            a.notify(Note(str(index), b"x" * 150000))
            sent.append(a)
        # The other side reads in a process of its own, usually; here its socket buffers are large enough together with
        # what is read before.
        for _ in range(3):
            peer.tick()
            other.tick()
    tick_until(lambda: not peer.sessions, peer)
    assert received == [150000] * 3


def test_close_inside_a_handler(peer: IpcPeer) -> None:
    with RawPeer(peer) as one, RawPeer(peer) as two:
        seen: List[str] = []

        @one.session.on_message
        def close(note: Note) -> None:
            seen.append(note.text)
            peer.close()

        two.session.on_message(close)
        for raw in (one, two):
            raw.write(framed(Note("1")), framed(Note("2")))
        peer.tick(20)
        assert seen == ["1"] and peer.sessions == ()


def test_leaving_the_context_closes_also_after_an_error() -> None:
    with pytest.raises(LookupError):
        with IpcPeer() as peer:
            pair = peer.create_session_pair()
            raise LookupError
    assert not any(session.is_open for session in pair)


def test_sessions_made_in_handlers(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        made: List[Any] = []
        raw.session.on_message(lambda note: made.extend(peer.create_session_pair()))
        raw.write(framed(Note()))
        tick_until(lambda: made, peer)
        a, b = made
        b.on_request(lambda ping: Pong(1))
        assert a.request(Ping(), expect=Pong).wait().value == 1
        assert peer.sessions == (raw.session, a, b)


def test_dropped_peer_warns_and_releases_everything() -> None:
    peer = IpcPeer()
    a, b = peer.create_session_pair()
    peer.fileno()
    del peer, a, b
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_dropped_peer_releases_everything_though_the_warning_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    def close_badly() -> None:
        raise LookupError("it does not close")

    ours, theirs = socket.socketpair()
    with warnings.catch_warnings(), theirs:
        warnings.simplefilter("error")
        peer = IpcPeer()
        stream = types.SimpleNamespace(read=lambda size: None, write=len, close=close_badly)
        peer.create_stream_session(stream, stream)  # type: ignore[arg-type]
        peer.create_socket_session(ours)
        del peer, ours
        gc.collect()
        assert theirs.recv(1) == b""
    assert "it does not close" in caplog.text


def test_dropped_peer_names_the_line_that_drops_it() -> None:
    peer = IpcPeer()
    peer.create_session_pair()
    del peer
    with pytest.warns(ResourceWarning, match="unclosed") as caught:
        gc.collect()
    assert [warning.filename for warning in caught] == [__file__]


def test_dropped_peer_that_was_closed_does_not_warn() -> None:
    peer = IpcPeer()
    peer.create_session_pair()
    peer.close()
    del peer
    gc.collect()


def test_hundreds_of_sessions(peer: IpcPeer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2200:
        pytest.skip("not enough descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2200), hard))
    try:
        pairs = [peer.create_session_pair() for _ in range(200)]
        for _, b in pairs:
            b.on_request(lambda ping: Pong(ping.value))
        promises = [a.request(Ping(index), expect=Pong) for index, (a, _) in enumerate(pairs)]
        assert values([promise.wait() for promise in promises]) == list(range(200))
        assert no_pending(*(session for pair in pairs for session in pair))
        assert peer.broadcast(Note()) == 400
    finally:
        peer.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_peer_that_finds_too_few_descriptors_keeps_none() -> None:
    # The collector does not run, as it may not for a while.
    code = """
import gc, os, resource
from stream_ipc import IpcPeer
IpcPeer().close()
gc.collect()
gc.disable()
before = len(os.listdir("/dev/fd"))
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
failed = 0
for more in range(8):
    resource.setrlimit(resource.RLIMIT_NOFILE, (before - 1 + more, hard))
    try:
        IpcPeer().close()
    except OSError:
        failed += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("/dev/fd")) == before, more
assert 2 < failed < 8, failed
"""
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_classes_in_place_of_plug_ins_are_refused() -> None:
    bad: Any
    for bad in (PickleMessageSerializer, JsonMessageSerializer):
        with pytest.raises(TypeError, match="instance"):
            IpcPeer(bad)
    bad = PidHrtimeRequestIdGenerator
    with pytest.raises(TypeError, match="instance"):
        IpcPeer(id_generator=bad)


def test_requests_of_all_sessions_have_failed_when_on_close_handlers_run() -> None:
    peer = IpcPeer(timeout=20)
    raws = [RawPeer(peer) for _ in range(3)]
    promises = [raw.session.request(Ping(), timeout=None) for raw in raws]
    failed: List[BaseException] = []

    def wait_for_all(session: Session) -> None:
        for promise in promises:
            assert promise.done
            try:
                promise.wait(5)
            except Exception as exc:
                failed.append(exc)

    for raw in raws:
        raw.session.on_close(wait_for_all)
    with CpuMeter() as meter:
        peer.close()
    assert meter.real < 4
    assert [type(error) for error in failed] == [StreamClosedError] * 9
    for raw in raws:
        raw.sock.close()


@pytest.mark.parametrize("what", [None, 1, "x"])
def test_removing_what_is_no_session(peer: IpcPeer, what: Any) -> None:
    with pytest.raises(TypeError, match=r"remove_session\(\) takes a Session"):
        peer.remove_session(what)


def test_streams_of_the_wrong_direction(peer: IpcPeer) -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(InvalidStreamError, match=f"descriptor {write} can only be written, and here it is to be read"):
            peer.create_stream_session(write, write)
        with pytest.raises(InvalidStreamError, match=f"descriptor {read} can only be read, and here it is to be written"):
            peer.create_stream_session(read, read)
        with open(os.devnull, "rb") as file, pytest.raises(InvalidStreamError, match="can only be read"):
            peer.create_stream_session(file, read)
        with pytest.raises(InvalidStreamError, match="True cannot be used as a stream"):
            peer.create_stream_session(True, True)
        assert os.get_blocking(read) and os.get_blocking(write)
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(
    ("options", "text"), [({"env": 5}, "env must be a dict"), ({"stderr": "x"}, "stderr must be subprocess.PIPE")]
)
def test_options_of_a_command_that_are_of_a_wrong_kind(peer: IpcPeer, options: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        peer.create_command_session([sys.executable, "-c", ""], **options)


# -- streams that their owners close


def test_streams_are_looked_at_a_few_at_a_time_but_all_in_turn(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("check interval", 0.001, monkeypatch)
    looked: List[int] = []
    fstat = os.fstat

    def look(fd: int) -> os.stat_result:
        looked.append(fd)
        return fstat(fd)

    pairs = [os.pipe() + os.pipe() for _ in range(40)]
    sessions = [peer.create_stream_session(write2, read) for read, _, _, write2 in pairs]
    monkeypatch.setattr(os, "fstat", look)
    while len(set(looked)) < 80:
        before = len(looked)
        peer.tick()
        assert len(looked) - before <= 2 * 16  # a thousand cost no more
        assert len(looked) < 8000
    errors: List[Any] = []
    sessions[17].on_exception(errors.append)
    os.close(pairs[17][0])
    tick_until(lambda: errors, peer)
    assert isinstance(errors[0], InvalidStreamError) and errors[0].session is sessions[17]
    for index, (_, write, read2, _) in enumerate(pairs):
        os.close(write)
        os.close(read2)


def test_number_that_a_new_session_got_tells_the_old_one_at_once(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit("check interval", 1000.0, monkeypatch)
    (read, write), (read2, write2), (other, far) = os.pipe(), os.pipe(), os.pipe()
    old = peer.create_stream_session(write2, read)
    errors: List[Any] = []
    old.on_exception(errors.append)
    peer.tick()  # looks at them, and not again in this test
    os.close(read)
    os.dup2(other, read)
    new = peer.create_stream_session(os.dup(write2), read)
    peer.tick()
    assert [error.session for error in errors] == [old] and not old.is_open and new.is_open
    for fd in (write, read2, other, far):
        os.close(fd)


def test_tick_does_not_go_on_with_what_comes_meanwhile(peer: IpcPeer) -> None:
    # As two sides would keep each other's tick from ever returning.
    with RawPeer(peer) as one, RawPeer(peer) as two:
        count = 0

        def more(note: Note) -> None:
            nonlocal count
            count += 1
            if count < 1000:
                one.write(framed(note))
                two.write(framed(note))
                read_without_dispatching(peer)

        for raw in (one, two):
            raw.session.on_message(more)
            raw.write(framed(Note()))
        assert 2 <= peer.tick() <= 2 * 64
        assert count < 200


def test_nothing_that_is_open_is_copied(peer: IpcPeer, tmp_path: Any) -> None:
    session, other = peer.create_session_pair()
    with peer.listen(str(tmp_path / "s"), print) as listener, WorkerPool(peer, ["cat"]) as pool:
        for thing in (peer, session, session.request(Ping()), DeferredReply(), listener, pool):
            for function in (copy.copy, copy.deepcopy, pickle.dumps, lambda thing: pickle.dumps(thing, 0)):
                with pytest.raises(TypeError, match=f"a[n]? {type(thing).__name__} cannot be copied or pickled"):
                    function(thing)
        gc.collect()  # a copy that was dropped has closed the original
        assert listener.is_open
        session.notify(Note("works"))
        assert other.receive(20, expect=Note) == Note("works")


def test_a_stream_belongs_to_one_session(peer: IpcPeer) -> None:
    ours, theirs = socket.socketpair()
    session, other = peer.create_socket_session(ours), peer.create_socket_session(theirs)
    (read, far_write), (far_read, write) = os.pipe(), os.pipe()
    session2 = peer.create_stream_session(write, read)
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    session3 = peer.create_process_session(process)
    for again in (
        lambda: peer.create_socket_session(ours),
        lambda: peer.create_stream_session(write, read),
        lambda: peer.create_stream_session(write, ours),
        lambda: peer.create_process_session(process),
    ):
        with pytest.raises(InvalidStreamError, match="belongs to another session"):
            again()
    assert peer.sessions == (session, other, session2, session3)
    other.notify(Note("works"))
    assert session.receive(20, expect=Note) == Note("works")
    peer.remove_session(session)
    assert peer.create_socket_session(ours).is_open
    for fd in (far_read, far_write):
        os.close(fd)
    session3.close()
    process.wait(20)


ON_WINDOWS = """
import _signal, sys, types
lean = types.ModuleType("_signal")
for name, value in vars(_signal).items():
    has = not name.startswith("SIG") or name in ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL")
    if has and name not in ("pthread_sigmask", "sigtimedwait", "setitimer"):
        setattr(lean, name, value)
sys.modules["_signal"] = lean
for name in ("fcntl", "termios", "pwd", "grp", "resource"):
    sys.modules[name] = None
sys.platform = "win32"
import stream_ipc
try:
    stream_ipc.IpcPeer()
except OSError as exc:
    print(exc)
"""


def test_on_windows_it_can_be_imported_and_a_peer_says_what_is_needed() -> None:
    done = run_python(ON_WINDOWS)
    assert done.stdout.startswith("stream_ipc needs Linux or macOS"), done.stderr
