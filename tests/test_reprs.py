"""What ``repr`` shows of the library's objects: class, name, state, counters; no payloads, and it never fails."""

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest

import stream_ipc
from stream_ipc import (
    DeferredReply,
    IpcPeer,
    JsonMessageSerializer,
    Listener,
    MessageTransport,
    PhpMessageSerializer,
    PickleMessageSerializer,
    PidCounterRequestIdGenerator,
    PidHrtimeRequestIdGenerator,
    RemoteError,
    ResponsePromise,
    Session,
    StreamTransport,
    WorkerPool,
)
from tests.helpers import MAGIC, RawPeer, framed, name_of, read_without_dispatching, tick_until
from tests.messages import Note, Ping, Pong

ZEROS = "pending=0 inbox=0 queued=0"


@pytest.mark.parametrize(
    "cls",
    [
        IpcPeer,
        Session,
        ResponsePromise,
        Listener,
        WorkerPool,
        DeferredReply,
        StreamTransport,
        PidCounterRequestIdGenerator,
        PidHrtimeRequestIdGenerator,
        JsonMessageSerializer,
        PhpMessageSerializer,
        PickleMessageSerializer,
    ],
)
def test_half_made(cls: Any) -> None:
    assert cls.__name__ in repr(cls.__new__(cls))


@pytest.mark.parametrize("cls", [IpcPeer, Session, ResponsePromise, Listener, StreamTransport, WorkerPool, DeferredReply])
def test_what_a_signal_handler_raises_comes_out(cls: Any) -> None:
    armed = [True]

    class Interrupted(cls):
        def __getattr__(self, name: str) -> Any:
            if armed:
                armed.clear()
                signal.raise_signal(signal.SIGALRM)
            raise AttributeError(name)

    def give_up(*args: Any) -> None:
        raise TimeoutError("too long")

    before = signal.signal(signal.SIGALRM, give_up)
    try:
        with pytest.raises(TimeoutError, match="too long"):
            repr(Interrupted.__new__(Interrupted))
    finally:
        signal.signal(signal.SIGALRM, before)


# -- peers


def test_peer(tmp_path: Path) -> None:
    peer = IpcPeer()
    assert repr(peer) == "<IpcPeer open sessions=0 listeners=0 serializer=PickleMessageSerializer>"
    peer.create_session_pair()
    peer.listen(("127.0.0.1", 0), lambda session: None)
    assert repr(peer) == "<IpcPeer open sessions=2 listeners=1 serializer=PickleMessageSerializer>"
    seen: List[str] = []
    peer.sessions[0].on_close(lambda session: seen.append(repr(peer)))
    peer.close()
    assert seen == ["<IpcPeer closing sessions=0 listeners=0 serializer=PickleMessageSerializer>"]
    assert repr(peer) == "<IpcPeer closed sessions=0 listeners=0 serializer=PickleMessageSerializer>"


def test_fork() -> None:
    with IpcPeer() as peer:
        session = peer.create_session_pair()[0]
        before = repr(session)
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            text = f"{peer!r}\n{session!r}\n"
            session.close()
            os.write(write, f"{text}{session!r}".encode())
            os._exit(0)
        os.waitpid(pid, 0)
        lines = os.read(read, 4096).decode().splitlines()
        os.close(read)
        os.close(write)
        assert lines == [
            "<IpcPeer forked sessions=2 listeners=0 serializer=PickleMessageSerializer>",
            before.replace(" open ", " forked "),
            before.replace(" open ", " forked "),  # nothing of it can be closed here
        ]


# -- sessions


def test_open_and_its_counters(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        name = f"fd {raw.session.transport.read_fds()[0]}"
        assert repr(raw.session) == f"<Session {name} open {ZEROS}>"
        promises = [raw.session.request(Ping("secret")) for _ in range(2)]
        with raw.session.batch():
            raw.session.notify(Note("secret"))
            queued = raw.session.queued_bytes
            assert queued and repr(raw.session) == f"<Session {name} open pending=2 inbox=0 queued={queued}>"
        raw.write(framed(Note("secret")))
        raw.session.flush()
        read_without_dispatching(peer)
        assert repr(raw.session) == f"<Session {name} open pending=2 inbox=1 queued=0>"
        assert len(promises) == 2


def test_closed_by_this_side(peer: IpcPeer) -> None:
    session = peer.create_session_pair()[0]
    name = name_of(session)
    seen: List[str] = []
    session.on_close(lambda session: seen.append(repr(session)))
    session.close()
    assert seen == [repr(session)] == [f"<Session {name} closed (this side closed the session) {ZEROS}>"]


def test_closing(peer: IpcPeer) -> None:
    seen: List[str] = []

    def look(number: int, frame: Any) -> None:
        if raw.session.is_open:
            signal.setitimer(signal.ITIMER_REAL, 0.05)  # closing has not begun yet, on a busy machine
            return
        seen.append(repr(raw.session))
        raw.sock.close()  # nothing to wait for any more

    with RawPeer(peer, small=True) as raw:
        raw.session.notify(Note("", b"x" * 100_000))
        text = f"closing pending=0 inbox=0 queued={raw.session.queued_bytes}>"
        name = name_of(raw.session)
        old = signal.signal(signal.SIGALRM, look)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            raw.session.close()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        assert seen == [f"<Session {name} {text}"]


def test_ended_but_not_dispatched_yet(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        raw.write(framed(Note()))
    name = name_of(raw.session)
    seen: List[str] = []

    @raw.session.on_message
    def look(note: Note) -> None:
        read_without_dispatching(peer)  # reads the end, too
        seen.append(repr(raw.session))

    tick_until(lambda: not raw.session.is_open, peer)
    assert seen == [f"<Session {name} open (the other side closed the stream) pending=0 inbox=1 queued=0>"]
    assert repr(raw.session) == f"<Session {name} closed (the other side closed the stream) {ZEROS}>"


def test_closed_inside_a_frame(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        raw.write(MAGIC + struct.pack(">I", 100) + b"abc")
    tick_until(lambda: not raw.session.is_open, peer)
    why = "the other side closed the stream in the middle of a frame (3 of 100 bytes had arrived)"
    assert repr(raw.session) == f"<Session {name_of(raw.session)} closed ({why}) {ZEROS}>"


def test_child(peer: IpcPeer) -> None:
    code = "import sys; sys.stdin.read(); print('secret; (pid 1)', file=sys.stderr); sys.exit(3)"
    session = peer.create_command_session([sys.executable, "-c", code])
    assert session.process is not None
    pid = session.process.pid
    assert repr(session) == f"<Session pid {pid} open {ZEROS}>"
    assert repr(session.transport) == f"<StreamTransport pid {pid} open queued=0>"
    session.process.stdin.close()  # type: ignore[union-attr]
    session.process.kill()
    tick_until(lambda: not session.is_open, peer)
    # Whichever was seen first: that it is dead, or that its stream was closed here.
    assert repr(session).startswith(f"<Session pid {pid} closed (")
    assert "secret" not in repr(session)


def test_child_that_exits(peer: IpcPeer) -> None:
    code = "import sys; print('secret', file=sys.stderr); sys.exit(3)"
    session = peer.create_command_session([sys.executable, "-c", code])
    assert session.process is not None
    pid = session.process.pid
    tick_until(lambda: not session.is_open, peer)
    assert repr(session) == f"<Session pid {pid} closed (exited with exit status 3) {ZEROS}>"
    assert repr(session.transport) == f"<StreamTransport pid {pid} closed returncode=3 queued=0>"


def test_addresses(peer: IpcPeer) -> None:
    taken: List[Session] = []
    with peer.listen(("127.0.0.1", 0), taken.append) as listener:
        client = peer.connect(listener.address)
        tick_until(lambda: taken, peer)
        fd = client.transport.read_fds()[0]
        where = f"{listener.address[0]}:{listener.address[1]}"
        assert repr(client) == f"<Session to {where} fd {fd} open {ZEROS}>"
        assert repr(client.transport) == f"<StreamTransport to {where} fd {fd} open queued=0>"
        assert repr(taken[0]).startswith("<Session from 127.0.0.1:")
        client.close()
        assert repr(client) == f"<Session to {where} fd {fd} closed (this side closed the session) {ZEROS}>"
        tick_until(lambda: not taken[0].is_open, peer)


class Queue(MessageTransport):
    """Talks to nobody."""

    def send(self, message: Any) -> None:
        pass

    def receive(self) -> List[Any]:
        raise OSError("first line; advice\nsecond line " + "x" * 500)

    def read_fds(self) -> List[int]:
        return []

    def close(self) -> None:
        pass


def test_a_transport_of_ones_own(peer: IpcPeer) -> None:
    session = peer.create_session(Queue())
    session.on_exception(lambda error: None)
    assert repr(session) == f"<Session Queue open {ZEROS}>"
    tick_until(lambda: not session.is_open, peer)
    assert repr(session) == f"<Session Queue closed (the stream failed: OSError: first line) {ZEROS}>"


# -- promises


def test_promise(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()

    @b.on_request
    def answer(ping: Ping) -> Pong:
        if ping.value == "bad":
            raise ValueError("secret")
        return Pong("secret")

    promise = a.request(Ping())
    assert repr(promise) == f"<ResponsePromise {promise.id} pending>"
    promise.wait()
    assert repr(promise) == f"<ResponsePromise {promise.id} replied Pong>"
    promise = a.request(Ping("bad"))
    with pytest.raises(RemoteError):
        promise.wait()
    assert repr(promise) == f"<ResponsePromise {promise.id} failed RemoteError>"
    promise = a.request(Ping(), timeout=0)
    assert repr(promise) == f"<ResponsePromise {promise.id} overdue>"
    promise.cancel()
    assert repr(promise) == f"<ResponsePromise {promise.id} failed IpcError>"
    promise = a.request(Ping(), timeout=None)
    assert repr(promise) == f"<ResponsePromise {promise.id} pending>"
    a.close()
    assert repr(promise) == f"<ResponsePromise {promise.id} failed StreamClosedError>"


# -- listeners, transports


def test_listener(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(sock: socket.socket) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    listener = peer.listen(("127.0.0.1", 0), lambda session: None)
    assert repr(listener) == f"<Listener {listener.address!r} open handshakes=0>"
    monkeypatch.setattr("socket.socket.accept", refuse)
    with socket.create_connection(listener.address):
        tick_until(lambda: " open " not in repr(listener), peer, seconds=5)
    assert repr(listener) == f"<Listener {listener.address!r} paused handshakes=0>"
    listener.close()
    assert repr(listener) == f"<Listener {listener.address!r} closed handshakes=0>"


def test_stream_transport() -> None:
    ours, other = socket.socketpair()
    transport = StreamTransport(ours, [ours], PickleMessageSerializer())
    name = f"fd {ours.fileno()}"
    assert repr(transport) == f"<StreamTransport {name} open queued=0>"
    transport.send(Note("secret", bytes(900_000)))
    assert transport.queued_bytes
    assert repr(transport) == f"<StreamTransport {name} open queued={transport.queued_bytes}>"
    other.close()
    with pytest.raises(stream_ipc.StreamClosedError):
        transport.flush()
    assert repr(transport) == f"<StreamTransport {name} broken queued=0>"
    with pytest.raises(stream_ipc.StreamClosedError):
        while True:
            transport.receive()
    assert repr(transport) == f"<StreamTransport {name} ended queued=0>"
    transport.close()
    assert repr(transport) == f"<StreamTransport {name} closed queued=0>"
    with pytest.raises(stream_ipc.StreamClosedError, match="the other side no longer reads"):
        transport.send(Note())


def test_a_closed_transport_says_who_closed_it() -> None:
    ours, other = socket.socketpair()
    with other:
        transport = StreamTransport(ours, [ours], PickleMessageSerializer())
        name = repr(transport).split(" ", 1)[1].rpartition(" open ")[0]
        transport.close()
        with pytest.raises(stream_ipc.StreamClosedError) as caught:
            transport.send(Note())
        assert str(caught.value) == f"this side closed the stream ({name})"


def test_stdio_transport() -> None:
    code = (
        "import sys; from stream_ipc import IpcPeer\n"
        "session = IpcPeer().create_stdio_session()\n"
        "print(session, session.transport, sep='\\n', file=sys.stderr)\n"
        "session.close(); print(session.transport, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=b"", stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=50)
    assert done.stderr.decode().splitlines() == [
        f"<Session stdio open {ZEROS}>",
        "<StreamTransport stdio open queued=0>",
        "<StreamTransport stdio closed queued=0>",
    ]


# -- serializers and ids


def test_serializers() -> None:
    assert repr(JsonMessageSerializer()) == "JsonMessageSerializer()"
    assert repr(PhpMessageSerializer()) == "PhpMessageSerializer()"
    old = "PhpStreamIpc"
    assert repr(JsonMessageSerializer(namespace=old)) == "JsonMessageSerializer(namespace='PhpStreamIpc')"
    assert repr(PhpMessageSerializer(namespace=old)) == "PhpMessageSerializer(namespace='PhpStreamIpc')"


def test_id_generators() -> None:
    assert repr(PidCounterRequestIdGenerator()) == f"<PidCounterRequestIdGenerator pid {os.getpid()}>"
    assert repr(PidHrtimeRequestIdGenerator()) == f"<PidHrtimeRequestIdGenerator pid {os.getpid()}>"
