"""Forked copies: their descriptors are closed at once, and what the parent has goes on unharmed."""

import gzip
import io
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest

from stream_ipc import IpcPeer, Message
from tests import test_tls
from tests.helpers import PATIENCE, ActingSerializer, role, tick_until
from tests.messages import Ping, Pong
from tests.os_helpers import Gate, listing, program, script
from tests.test_fork_and_threads import in_fork, outcomes_of_a_fork

certificates, client_side, server_side = test_tls.certificates, test_tls.client_side, test_tls.server_side  # fixtures

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def left_in_fork(before: List[str]) -> List[str]:
    """The descriptors that a fork has, but for what was open before and the pipe through which it tells."""
    left = in_fork(lambda: "\n".join(sorted(set(listing()) - set(before)))).splitlines()
    ends = [line.split(" -> ")[1] for line in left]
    return [line for line, end in zip(left, ends) if not (end.startswith("pipe:") and ends.count(end) == 2)]


def echo(session: Any) -> None:
    session.on_request(lambda ping: Pong(ping.value))


def test_a_command_and_its_pidfd(peer: IpcPeer) -> None:
    before = listing()
    session = peer.create_command_session(role("echo"))
    assert session.request(Ping(1), expect=Pong).wait().value == 1
    assert len(listing()) >= len(before) + 4
    assert left_in_fork(before) == []
    assert session.request(Ping(2), expect=Pong).wait().value == 2
    session.close()
    assert session.process is not None and session.process.returncode == 0


def test_a_popen_of_its_owner(peer: IpcPeer) -> None:
    before = listing()
    pipe = subprocess.PIPE
    process = subprocess.Popen(role("echo"), stdin=pipe, stdout=pipe, stderr=pipe)
    session = peer.create_process_session(process)
    assert left_in_fork(before) == []
    assert session.request(Ping(2), expect=Pong).wait().value == 2
    session.close()
    assert process.wait(PATIENCE) == 0


@pytest.mark.slow
def test_a_child_that_is_ending(peer: IpcPeer) -> None:
    before = listing()
    session = peer.create_command_session(script("os.close(1); sys.stdin.read(); time.sleep(0.3); os._exit(5)"))
    tick_until(lambda: not session.is_open, peer)
    process = session.process
    assert process is not None and process.returncode is None
    assert left_in_fork(before) == []
    peer.close()
    assert process.returncode == 5


def test_listeners_and_their_sessions(peer: IpcPeer, tmp_path: Path) -> None:
    before = listing()
    sessions: List[Any] = []
    path = tmp_path / "socket"
    unix = peer.listen(path, lambda session: (echo(session), sessions.append(session)))
    tcp = peer.listen(("127.0.0.1", 0), lambda session: (echo(session), sessions.append(session)))
    clients = [peer.connect(path), peer.connect(tcp.address)]
    tick_until(lambda: len(sessions) == 2, peer)
    assert left_in_fork(before) == []
    assert path.exists()
    for client in (*clients, peer.connect(path)):
        assert client.request(Ping(3), expect=Pong).wait().value == 3
    unix.close()
    assert not path.exists()


def test_a_handshake_that_is_under_way(peer: IpcPeer, server_side: Any, client_side: Any) -> None:
    before = listing()
    sessions: List[Any] = []
    listener = peer.listen(("127.0.0.1", 0), lambda s: (echo(s), sessions.append(s)), ssl_context=server_side)
    stranger = socket.create_connection(listener.address)
    for _ in range(5):
        peer.tick(0.01)
    mine = [line for line in listing() if line.split(" -> ")[1] == os.readlink(f"/proc/self/fd/{stranger.fileno()}")]
    assert left_in_fork([*before, *mine]) == []
    session = peer.connect(listener.address, ssl_context=client_side, server_hostname="localhost")
    assert session.request(Ping(4), expect=Pong).wait().value == 4
    assert left_in_fork([*before, *mine]) == []
    assert session.request(Ping(5), expect=Pong).wait().value == 5  # neither side was told of an end
    stranger.close()


@pytest.mark.parametrize("call", ["notify", "request"])
def test_a_copy_that_is_forked_in_the_middle_of_a_send_over_tls(server_side: Any, client_side: Any, call: str) -> None:
    serializer = ActingSerializer(Message)
    with IpcPeer(serializer) as peer:
        accepted: List[Any] = []
        listener = peer.listen(("127.0.0.1", 0), accepted.append, ssl_context=server_side)
        session = peer.connect(listener.address, ssl_context=client_side, server_hostname="localhost")
        serializer.act = os.fork
        here, in_copy = outcomes_of_a_fork(lambda: getattr(session, call)(Ping()))
        assert here == "done" and in_copy.startswith("RuntimeError: this IpcPeer belongs to the process that made it")


def test_what_another_loop_waits_for(peer: IpcPeer) -> None:
    before = listing()
    a, b = peer.create_session_pair()
    echo(b)
    peer.fileno()
    peer.tick(0)
    assert left_in_fork(before) == []
    assert a.request(Ping(6), expect=Pong).wait().value == 6


def test_a_connection_that_lingers(peer: IpcPeer) -> None:
    before = listing()
    server = socket.create_server(("127.0.0.1", 0))
    other = socket.create_connection(server.getsockname())
    mine, _ = server.accept()
    server.close()
    session = peer.create_socket_session(mine)
    other.sendall(b"more")
    session.close()
    keep = [line for line in listing() if line.startswith(f"{other.fileno()} ")]
    assert left_in_fork([*before, *keep]) == []
    other.close()


def test_files_with_a_buffer_are_not_flushed_twice(peer: IpcPeer) -> None:
    before = listing()
    (read, write), (read2, write2) = os.pipe(), os.pipe()
    output, source = os.fdopen(write, "wb"), os.fdopen(read2, "rb")
    peer.create_stream_session(output, source)
    output.write(b"of its owner")  # though a session has it
    rest = [line for line in listing() if line.split(" ")[0] in (str(read), str(write2))]
    assert left_in_fork([*before, *rest]) == []
    output.flush()
    assert os.read(read, 100) == b"of its owner"
    os.close(read)
    os.close(write2)


def test_a_socket_with_files_made_of_it(peer: IpcPeer) -> None:
    before = listing()
    here, there = socket.socketpair()
    file = here.makefile("rb")
    peer.create_socket_session(here)
    keep = [line for line in listing() if line.startswith(f"{there.fileno()} ")]
    assert left_in_fork([*before, *keep]) == []
    file.close()
    there.close()


def test_an_object_without_a_descriptor_is_left_alone(peer: IpcPeer) -> None:
    target = io.BytesIO()
    (read, write) = os.pipe()
    file = os.fdopen(write, "wb", 0)
    packed = gzip.GzipFile(fileobj=file, mode="wb")
    (read2, write2) = os.pipe()
    session = peer.create_stream_session(packed, read2)
    assert in_fork(lambda: "fine") == "fine"
    peer.remove_session(session)
    os.set_blocking(read, False)
    before = os.read(read, 1000)  # the header
    assert len(before) == 10
    with pytest.raises(BlockingIOError):  # and no trailer from the fork
        os.read(read, 1000)
    packed.close()
    file.close()
    target.close()
    for fd in (read, read2, write2):
        os.close(fd)


@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_a_slave_that_forks(peer: IpcPeer, stderr: int, tmp_path: Path) -> None:
    code = """
        session = IpcPeer().create_stdio_session()
        @session.on_request
        def fork(ping: Ping) -> Pong:
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.write(write, "\\n".join(sorted(os.listdir("/proc/self/fd"), key=int)).encode())
                try:
                    if ping.value:
                        os.closerange(1, 100)
                        open(ping.value).read()
                finally:
                    os._exit(0)
            if not ping.value:
                os.wait()
            listing = os.read(read, 1000).decode().split()
            os.close(read)
            os.close(write)
            return Pong([read, write, [int(fd) for fd in listing]])
        serve(session)
    """
    session = peer.create_command_session(program(code), stderr=stderr)
    read, write, found = session.request(Ping(""), expect=Pong).wait().value
    assert len(set(found) - {0, 1, 2, read, write}) == 1  # that of the listing
    with Gate(tmp_path / "gate") as gate:
        assert session.request(Ping(gate.path), expect=Pong).wait()  # this copy lives on
        process = session.process
        session.close()
        assert process is not None and process.returncode == 0


def test_preexec_fn_runs_in_such_a_copy(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    echo(b)
    first = peer.create_command_session(role("echo"))
    second = peer.create_command_session(role("echo"), preexec_fn=lambda: None)
    for session in (a, first, second):
        assert session.request(Ping(7), expect=Pong).wait().value == 7
