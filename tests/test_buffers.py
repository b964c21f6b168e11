"""Pipes to children and Unix sockets hold more once a large message has come, as far as the system allows."""

import os
import socket
import subprocess
import sys
from typing import Iterator, List, Tuple

import pytest

from stream_ipc import IpcPeer, LogMessage, Session
from stream_ipc.transports import ends
from stream_ipc.transports.streams import open_write_end

from .helpers import PATIENCE, InterruptAt, Interruption, tick_until
from .os_helpers import program

fcntl = pytest.importorskip("fcntl")
pipes_can_grow = pytest.mark.skipif(not hasattr(fcntl, "F_GETPIPE_SZ"), reason="the size of a pipe is fixed here")

LARGE = "x" * 300_000
SEND_BUFFER = (socket.SOL_SOCKET, socket.SO_SNDBUF)


@pytest.fixture
def peer() -> Iterator[IpcPeer]:
    with IpcPeer() as peer:
        yield peer


def sizes(session: Session) -> List[int]:
    assert session.process is not None and session.process.stdin is not None and session.process.stdout is not None
    return [fcntl.fcntl(stream, fcntl.F_GETPIPE_SZ) for stream in (session.process.stdin, session.process.stdout)]


def echo(session: Session, text: str) -> None:
    """Send a text to a child that is ``cat``, and wait for it to come back."""
    got: List[str] = []

    def take(message: LogMessage) -> None:
        got.append(str(message.message))

    session.on_message(take)
    session.notify(LogMessage(text))
    tick_until(lambda: got, session.peer)
    session.off_message(take)
    assert got == [text]


@pytest.fixture(scope="module")
def usual() -> int:
    """How much a pipe holds that nobody has changed."""
    read, write = os.pipe()
    try:
        return int(fcntl.fcntl(read, fcntl.F_GETPIPE_SZ))
    finally:
        os.close(read)
        os.close(write)


@pipes_can_grow
def test_a_large_message_makes_both_pipes_larger(peer: IpcPeer, usual: int) -> None:
    session = peer.create_command_session(["cat"])
    assert sizes(session) == [usual, usual]
    for _ in range(10):
        echo(session, "small")
    assert sizes(session) == [usual, usual]
    echo(session, LARGE)
    assert sizes(session) == [ends.LARGE_PIPE] * 2
    echo(session, LARGE)
    assert sizes(session) == [ends.LARGE_PIPE] * 2


@pipes_can_grow
def test_small_messages_that_are_many_do_not(peer: IpcPeer, usual: int) -> None:
    session = peer.create_command_session(["cat"])
    got: List[object] = []
    session.on_message(got.append)
    for _ in range(3000):
        session.notify(LogMessage("x" * 100))
    tick_until(lambda: len(got) == 3000, peer)
    assert sizes(session) == [usual, usual]


@pipes_can_grow
def test_a_size_that_was_asked_for_stays(peer: IpcPeer) -> None:
    session = peer.create_command_session(["cat"], pipesize=1 << 17)
    echo(session, LARGE)
    assert sizes(session) == [1 << 17] * 2


@pipes_can_grow
def test_pipes_that_were_made_elsewhere_stay_as_they_are(peer: IpcPeer, usual: int) -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    session = peer.create_process_session(process)
    echo(session, LARGE)
    assert sizes(session) == [usual, usual]
    session.close()
    process.wait(PATIENCE)


@pipes_can_grow
def test_only_some_pipes_of_a_process_are_larger_at_a_time(
    peer: IpcPeer, usual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "MOST_PIPES", 3)
    for _ in range(2):  # what was taken is given back
        sessions = [peer.create_command_session(["cat"]) for _ in range(3)]
        for session in sessions:
            echo(session, LARGE)
        found = [size for session in sessions for size in sizes(session)]
        assert sorted(found) == [usual] * 3 + [ends.LARGE_PIPE] * 3
        for session in sessions:
            session.close()


@pipes_can_grow
def test_a_size_that_the_system_refuses_is_done_without(
    peer: IpcPeer, usual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "LARGE_PIPE", 0x7FFFFFFF)  # no pipe can hold as much
    session = peer.create_command_session(["cat"])
    echo(session, LARGE)
    assert sizes(session) == [usual, usual]
    monkeypatch.undo()
    another = peer.create_command_session(["cat"])
    echo(another, LARGE)
    assert sizes(another) == [ends.LARGE_PIPE] * 2


USER_HAS_NO_MORE = """
import fcntl, os, sys
from stream_ipc import IpcPeer, LogMessage
from stream_ipc.transports import ends
from tests.test_buffers import echo, sizes

with IpcPeer() as warm:  # what is imported late is out of reach for another user
    echo(warm.create_command_session(["cat"]), "x" * 300_000)
os.setgroups([])
os.setresgid(54321, 54321, 54321)
os.setresuid(54321, 54321, 54321)
held = []
try:
    while len(held) < 2000:
        held.append(os.pipe())
        fcntl.fcntl(held[-1][0], fcntl.F_SETPIPE_SZ, ends.LARGE_PIPE)
    sys.exit(print("no limit"))
except OSError:
    pass
with IpcPeer() as peer:
    session = peer.create_command_session(["cat"])
    before = sizes(session)
    echo(session, "x" * 300_000)
    print(sizes(session) == before and before[0] < ends.LARGE_PIPE)
"""


@pipes_can_grow
@pytest.mark.skipif(os.geteuid() != 0, reason="takes a user of whom nothing else runs")
@pytest.mark.slow
def test_a_user_who_has_too_many_large_pipes_has_small_ones() -> None:
    command = [sys.executable, "-W", "error", "-c", USER_HAS_NO_MORE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stderr, done.returncode) == ("", 0)
    if done.stdout == "no limit\n":
        pytest.skip("the limit is switched off")
    assert done.stdout == "True\n"


def pair(peer: IpcPeer, size: int = 0) -> Tuple[Session, Session, socket.socket]:
    """Two sessions of one peer over a pair of sockets, and the socket of the first."""
    ours, theirs = socket.socketpair()
    if size:
        ours.setsockopt(*SEND_BUFFER, size)
    return peer.create_socket_session(ours), peer.create_socket_session(theirs), ours


def send(sender: Session, receiver: Session, size: int) -> None:
    """Send a text of so many characters from one session of a peer to another, and wait for it."""
    sender.notify(LogMessage("x" * size))
    message = receiver.receive(PATIENCE, expect=LogMessage)
    assert message is not None and len(str(message.message)) == size


def test_a_message_that_does_not_fit_makes_a_unix_socket_larger(peer: IpcPeer) -> None:
    first, second, sock = pair(peer)
    usual = sock.getsockopt(*SEND_BUFFER)
    for _ in range(10):
        send(first, second, 100)
    assert sock.getsockopt(*SEND_BUFFER) == usual
    send(first, second, 4 * usual)
    larger = sock.getsockopt(*SEND_BUFFER)
    assert larger > usual
    send(first, second, 4 * larger)
    assert sock.getsockopt(*SEND_BUFFER) == larger
    peer.remove_session(first)
    assert sock.getsockopt(*SEND_BUFFER) == usual
    sock.close()


def test_small_messages_that_do_not_fit_leave_a_unix_socket_as_it_is(peer: IpcPeer) -> None:
    first, second, sock = pair(peer)
    usual = sock.getsockopt(*SEND_BUFFER)
    count = 0
    while not first.queued_bytes:
        first.notify(LogMessage("x" * 100))
        count += 1
    for _ in range(count):
        assert second.receive(PATIENCE, expect=LogMessage) is not None
    assert sock.getsockopt(*SEND_BUFFER) == usual


def test_a_send_buffer_that_was_asked_for_stays(peer: IpcPeer) -> None:
    first, second, sock = pair(peer, 32 * 1024)
    chosen = sock.getsockopt(*SEND_BUFFER)
    send(first, second, 4 * chosen)
    assert sock.getsockopt(*SEND_BUFFER) == chosen


def test_an_interrupted_release_of_a_larger_buffer_can_be_repeated() -> None:
    number = 0
    while True:
        number += 1
        ours, theirs = socket.socketpair()
        with ours, theirs:
            usual = ours.getsockopt(*SEND_BUFFER)
            end = open_write_end(ours)
            end.grow()
            interrupt = InterruptAt(number, Interruption())
            try:
                with interrupt:
                    end.release()
            except Interruption:
                end.release()
            assert ours.getsockopt(*SEND_BUFFER) == usual, interrupt.where
        if not interrupt.hit:
            break
    assert number > 5


def test_a_tcp_socket_stays_as_it_is(peer: IpcPeer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    with socket.socket(socket.AF_UNIX) as fresh:
        usual = fresh.getsockopt(*SEND_BUFFER)
    # As if nobody had chosen it; the system itself changes that of a TCP socket no more.
    ours.setsockopt(*SEND_BUFFER, usual // 2 if sys.platform == "linux" else usual)
    assert ours.getsockopt(*SEND_BUFFER) == usual
    first, second = peer.create_socket_session(ours), peer.create_socket_session(theirs)
    first.notify(LogMessage("x" * 1_000_000))
    assert first.queued_bytes  # it does not fit
    assert second.receive(PATIENCE) == LogMessage("x" * 1_000_000)
    assert ours.getsockopt(*SEND_BUFFER) == usual


def test_a_buffer_that_the_system_does_not_give_is_done_without(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "LARGE_SOCKET", 0x7FFFFFFF)
    first, second, sock = pair(peer)
    send(first, second, 4 * sock.getsockopt(*SEND_BUFFER))


WITHOUT_DESCRIPTORS = """
import os, resource, socket, sys
from stream_ipc import IpcPeer, LogMessage
with IpcPeer() as peer:
    if sys.argv[1] == "pipes":
        first = second = peer.create_command_session(["cat"])
    else:
        first, second = map(peer.create_socket_session, socket.socketpair())
    first.notify(LogMessage("first"))
    assert second.receive(10).message == "first"
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    first.notify(LogMessage("x" * 1_000_000))
    print(len(second.receive(10).message), first.is_open, second.is_open)
"""


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["pipes", "sockets"])
def test_the_first_large_message_needs_no_descriptor(kind: str) -> None:
    # Nothing is imported before that a program with small messages would not have.
    command = [sys.executable, "-W", "error", "-c", WITHOUT_DESCRIPTORS, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.stderr, done.returncode) == ("1000000 True True\n", "", 0)


def test_a_socket_that_the_parent_has_too_stays_as_it_is(peer: IpcPeer) -> None:
    code = """
        session = IpcPeer().create_stdio_session()
        session.notify(LogMessage("x" * 2_000_000))
        session.flush(10)
        session.receive(10)  # at its end it leaves the socket as it was found
    """
    ours, theirs = socket.socketpair()
    usual = theirs.getsockopt(*SEND_BUFFER)
    process = subprocess.Popen(program(code), stdin=theirs, stdout=theirs)
    session = peer.create_socket_session(ours)
    message = session.receive(PATIENCE, expect=LogMessage)
    assert len(str(message.message)) == 2_000_000
    assert theirs.getsockopt(*SEND_BUFFER) == usual
    session.notify(LogMessage("that is all"))
    theirs.close()
    session.flush(PATIENCE)
    assert process.wait(PATIENCE) == 0
    session.close()
