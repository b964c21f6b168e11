"""What connect() and listen() are made of: options of TCP sockets, addresses of any family, who is at the other end."""

from __future__ import annotations

import _socket
import contextlib
import fcntl
import importlib.util
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List

import pytest

from stream_ipc import IpcPeer
from stream_ipc.transports import sockets
from stream_ipc.transports.sockets import describe_address, linger, other_user, tune
from tests.helpers import InterruptAt, Interruption, framed, nothing_is_torn_down, places_apart, tick_until
from tests.messages import Note
from tests.os_helpers import listing

ROOT = str(Path(__file__).resolve().parent.parent)


def tcp_pair() -> List[socket.socket]:
    """A connection: the end that has connected, which does not block, and the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        one.setblocking(False)
        return [one, listener.accept()[0]]


# --- options --------------------------------------------------------------------------------------------------


def options(sock: socket.socket) -> List[int]:
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)
    assert idle is not None
    numbers = [socket.TCP_NODELAY, idle, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT]
    alive = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return [bool(alive), *(sock.getsockopt(socket.IPPROTO_TCP, number) for number in numbers)]


def test_keepalive_of_a_tcp_connection() -> None:
    one, other = tcp_pair()
    with one, other:
        assert options(other) != [True, 1, 60, 10, 5]
        tune(other)
        assert options(other) == [True, 1, 60, 10, 5]
    with IpcPeer() as peer, peer.listen(("127.0.0.1", 0), lambda session: None) as listener:
        session = peer.connect(listener.address)
        assert session.socket is not None
        assert options(session.socket) == [True, 1, 60, 10, 5]
    one, other = tcp_pair()
    with other, IpcPeer() as peer:
        peer.create_stream_session(one, one)
        assert options(one) == [True, 1, 60, 10, 5]


def test_on_macos_the_system_is_told_when_a_host_has_vanished(monkeypatch: pytest.MonkeyPatch) -> None:
    options: List[Any] = []
    sock: Any = SimpleNamespace(family=socket.AF_INET, setsockopt=lambda *option: options.append(option))
    monkeypatch.setattr(sys, "platform", "darwin")
    tune(sock)
    assert (socket.IPPROTO_TCP, 0x80, 110) in options  # TCP_RXT_CONNDROPTIME


def test_keepalive_of_a_connection_that_is_a_programs_stdin() -> None:
    code = "import socket, stream_ipc; stream_ipc.IpcPeer().create_socket_session(socket.socket(fileno=0))"
    one, other = tcp_pair()
    with one, other:
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], stdin=one, check=True, timeout=60)
        assert options(one) == [True, 1, 60, 10, 5]  # they are the connection's, whoever has set them


def test_what_the_system_does_not_let_set_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(socket.socket):
        refused: Any = ()
        tried = 0

        def setsockopt(self, level: int, option: int, value: Any) -> None:  # type: ignore[override]
            Strict.tried += 1
            if option in self.refused:
                raise OSError(92, "not available")
            super().setsockopt(level, option, value)

    one, other = tcp_pair()
    with one, other, Strict(fileno=other.detach()) as strict:
        strict.refused = (socket.TCP_KEEPINTVL, socket.TCP_NODELAY)
        tune(strict)
        more = sys.platform == "darwin"
        assert Strict.tried == 5 + more
        assert options(strict)[0] is True
        assert options(strict)[4] == 5
        monkeypatch.setattr(sockets, "_KEEPALIVE", (("TCP_NO_SUCH_OPTION", 1),))
        tune(strict)
        assert Strict.tried == 7 + 2 * more


def test_other_sockets_are_not_tuned() -> None:
    class Untouched(socket.socket):
        def setsockopt(self, *args: Any) -> None:
            pytest.fail("an option was set")

    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with Untouched(socket.AF_UNIX, kind) as sock:
            tune(sock)


# --- addresses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("localhost", 80), "localhost:80"),
        (("::1", 80, 0, 0), "[::1]:80"),
        (("fe80::1%eth0", 80, 0, 2), "[fe80::1%eth0]:80"),
        ("/run/a.sock", "'/run/a.sock'"),
        ("", "''"),
        (b"\0abstract", "'@abstract'"),
        (b"\0\xff\n", "'@\\udcff\\n'"),
        (b"", "''"),
        (b"/run/a.sock", "'/run/a.sock'"),
        ((3, 1024), "3:1024"),  # AF_VSOCK
        ((0xFFFFFFFF, 0), "4294967295:0"),
        ((2, 1, 2, 3, 0), "2:1:2:3:0"),  # AF_TIPC
        (("00:11:22:33:44:55", 3), "[00:11:22:33:44:55]:3"),  # Bluetooth: RFCOMM, L2CAP
        ((0,), "0"),  # HCI
        ((5, 0), "5:0"),  # AF_NETLINK
        (("eth0", 3, 0, 1, b"\x00\xff"), "eth0:3"),  # AF_PACKET
        ((b"\x01\x02", "x"), "0102:x"),
        ((), ""),
        (None, "None"),
        (7, "7"),
    ],
    ids=repr,
)
def test_addresses_of_all_families(address: Any, text: str) -> None:
    assert describe_address(address) == text
    describe_address(address).encode()  # may be logged and sent


def test_real_addresses() -> None:
    one, other = tcp_pair()
    with one, other:
        assert describe_address(one.getpeername()) == f"127.0.0.1:{one.getpeername()[1]}"
    one, other = socket.socketpair()
    with one, other:
        assert describe_address(one.getpeername()) == "''"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has abstract addresses")
def test_an_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(b"\0stream-ipc-%d" % os.getpid())
        listener.listen()
        client.connect(listener.getsockname())
        assert describe_address(client.getpeername()) == f"'@stream-ipc-{os.getpid()}'"
        assert other_user(client) is None
        tune(client)


@pytest.mark.skipif(not hasattr(socket, "AF_VSOCK"), reason="there is no AF_VSOCK here")
def test_an_address_of_vsock() -> None:
    try:
        sock = socket.socket(socket.AF_VSOCK)
    except OSError as exc:
        pytest.skip(f"AF_VSOCK is not available: {exc}")
    with sock:
        tune(sock)
        sock.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        assert describe_address(sock.getsockname()).startswith(f"{socket.VMADDR_CID_ANY}:")


@pytest.mark.filterwarnings("ignore:.*unclosed:ResourceWarning")  # what is lost before anybody had it closes itself
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_connect_keeps_no_descriptor_from_the_next_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    fstat = os.fstat  # there all TCP sockets are the file 0
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*fstat(fd)[:1], 0, 0, *fstat(fd)[3:10])))
    number = 0
    while True:
        number += 1
        with IpcPeer() as peer, socket.create_server(("127.0.0.1", 0)) as server:
            with InterruptAt(number, Interruption()) as interrupt, contextlib.suppress(Interruption):
                peer.connect(server.getsockname())
            interrupt.error.__traceback__ = None  # whose frames keep what was lost
            peer.connect(server.getsockname())
        if not interrupt.hit:
            break
    assert number > 10


# --- the end of a connection ----------------------------------------------------------------------------------


def drain(sock: socket.socket) -> bytes:
    sock.settimeout(10)
    data = b""
    while True:
        part = sock.recv(65536)
        if not part:
            return data
        data += part


def test_what_was_written_arrives_though_input_is_unread() -> None:
    one, other = tcp_pair()
    with other:
        other.sendall(b"x" * 100_000)
        one.sendall(b"last words")
        teardown = linger(one)
        one.close()
        assert teardown is not None
        assert len(teardown.fds()) == 1
        assert teardown.step() is not None
        other.sendall(b"more")
        assert teardown.step() is not None
        assert drain(other) == b"last words"
    assert teardown.step() is None
    assert teardown.fds() == []
    teardown.abandon()


def test_what_was_written_arrives_though_the_other_side_talks_only_after_the_close(peer: IpcPeer) -> None:
    one, other = tcp_pair()
    with other:
        other.settimeout(10)
        session = peer.create_socket_session(one)
        note = Note(data=bytes(50_000))
        sent = got = 0
        while not session.queued_bytes:  # as much as the system takes
            session.notify(note)
            sent += len(framed(note))
        while session.queued_bytes:
            got += len(other.recv(65536))
            peer.tick(0)
        session.close()
        for _ in range(5):
            other.sendall(b"still here")
            peer.tick(0)
            got += len(other.recv(65536))
        assert got + len(drain(other)) == sent
    tick_until(lambda: nothing_is_torn_down(peer), peer)


@pytest.mark.parametrize("system", ["", "darwin"])
def test_a_close_lingers_until_everything_has_arrived(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    if system and sys.platform != system:

        class Socket(_socket.socket):
            def getsockopt(self, level: int, option: int) -> int:  # type: ignore[override]
                assert (level, option) == (socket.SOL_SOCKET, 0x1024)  # SO_NWRITE
                (size,) = struct.unpack("i", fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, bytes(4)))
                return max(0, int(size) - 1)

        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(sockets, "_socket", SimpleNamespace(socket=Socket))
    one, other = tcp_pair()
    with other:
        one.setblocking(False)
        sent = one.send(bytes(4_000_000))
        teardown = linger(one)
        one.close()
        assert teardown is not None
        assert teardown.step() is not None
        other.settimeout(10)
        size = 0
        while size < sent:
            assert teardown.step() is not None or size > 0
            size += len(other.recv(65536))
        while teardown.fds():
            teardown.step()  # the other side says nothing, and has all
        assert other.recv(1) == b""


def test_a_lingering_close_that_an_interruption_loses_is_closed() -> None:
    number = 1 - places_apart()
    while True:
        number += places_apart()
        one, other = tcp_pair()
        with other, IpcPeer() as peer:
            session = peer.create_socket_session(one)
            other.sendall(b"x")
            select.select([one], [], [], 10)
            before = set(listing())
            try:
                with InterruptAt(number, Interruption()) as interrupt:
                    session.close()
            except Interruption:
                session.close()
            interrupt.error.__traceback__ = None  # whose frames keep what was lost
            other.close()
            peer.close()
            left = set(listing()) - before
            assert not left, interrupt.where
        if not interrupt.hit:
            break
    assert number > 10


def test_a_lingering_close_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tcp_pair()
    with one, other:
        other.sendall(b"x")
        select.select([one], [], [], 10)
        teardown = linger(one)
        assert teardown is not None
        assert teardown.step() is not None
        now = time.monotonic()
        monkeypatch.setattr(sockets, "monotonic", lambda: now + 2)
        assert teardown.step() is None
        assert teardown.fds() == []


def test_a_step_of_a_lingering_close_is_short_though_much_is_there() -> None:
    one, other = tcp_pair()
    with one, other:
        other.setblocking(False)
        sent = other.send(b"x")
        select.select([one], [], [], 10)
        teardown = linger(one)
        assert teardown is not None
        with contextlib.suppress(BlockingIOError):
            while sent < 16 * 1024 * 1024:
                sent += other.send(bytes(65536))
        assert sent > 2 * 1024 * 1024
        assert teardown.step() is not None
        assert fcntl.ioctl(one, termios.FIONREAD, bytes(4)) != bytes(4)
        teardown.abandon()


WITHOUT_DESCRIPTORS = """
import os, resource, socket
from stream_ipc import IpcPeer
with IpcPeer() as peer, socket.create_server(("127.0.0.1", 0)) as server:
    session = peer.create_socket_session(socket.create_connection(server.getsockname()))
    other, _ = server.accept()
    peer.tick(0)
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    session.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    other.settimeout(10)
    print(other.recv(1))
    other.close()
"""


def test_a_connection_is_closed_though_no_descriptor_is_left() -> None:
    # Nothing is imported before that a program which only connects would not have.
    done = subprocess.run([sys.executable, "-c", WITHOUT_DESCRIPTORS], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.returncode) == ("b''\n", 0), done.stderr


def test_nothing_lingers_where_the_other_side_is_quiet_or_gone() -> None:
    one, other = tcp_pair()
    with one, other:
        assert linger(one) is None
        assert drain(other) == b""
    one, other = tcp_pair()
    with one:
        other.close()
        assert linger(one) is None
    assert linger(one) is None  # it is closed


def test_no_socket_object_is_needed_to_linger() -> None:
    # Under gevent, or with a class of the user's own, socket.socket is of another class than the socket.
    class Wrapped:
        def __init__(self, sock: socket.socket) -> None:
            self.fileno, self.shutdown = sock.fileno, sock.shutdown

    one, other = tcp_pair()
    with one, other:
        other.sendall(b"x")
        select.select([one], [], [], 10)
        teardown = linger(Wrapped(one))  # type: ignore[arg-type]
        assert teardown is not None
        teardown.abandon()
        assert teardown.fds() == []


# --- users ----------------------------------------------------------------------------------------------------

CHANGED = """
import os, socket, sys, time
from stream_ipc.transports.sockets import listen, other_user

path = sys.argv[1]
listener, file = listen(path, False)
os.chown(path, 12345, 12345)
os.chmod(os.path.dirname(path), 0o777)
os.setgid(12345)
os.setuid(12345)
client = socket.socket(socket.AF_UNIX)
client.connect(path)
listener.setblocking(True)
print(other_user(listener.accept()[0]), other_user(client))
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can change its user")
def test_a_listener_that_was_bound_before_the_user_changed(tmp_path: Path) -> None:
    # The accepting side sees who connects; the connecting side sees who began to listen, where the system tells that.
    path = Path("/tmp") / f"stream-ipc-test-{os.getpid()}"
    path.mkdir()
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHANGED, str(path / "socket")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=50,
        )  # fmt: skip
        accepted, connected = done.stdout.decode().split() or done.stderr.decode()
        assert accepted == "None"
        assert connected == "0"
    finally:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def test_the_user_is_the_one_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.geteuid()
    one, other = socket.socketpair()
    with one, other:
        assert other_user(one) is None
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
        assert other_user(one) == me


# --- gevent ---------------------------------------------------------------------------------------------------

GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
import os, select, socket, tempfile
from stream_ipc.core.connecting import open_connection
from stream_ipc.core.loop import Loop
from stream_ipc.transports.sockets import linger, listen, other_user, tune

assert socket.socket.__module__.startswith("gevent")
def wait_for(fd, events, limit):
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(5000))
loop = Loop()
with tempfile.TemporaryDirectory() as folder:
    for place in (("127.0.0.1", 0), os.path.join(folder, "socket")):
        listener, file = listen(place, False)
        one, name = open_connection(loop, listener.getsockname(), None, None, 5)
        other = listener.accept()[0]
        tune(other)
        if file is not None:
            assert other_user(one) is other_user(other) is None
        other.setblocking(False)
        other.send(b"x")
        one.send(b"last words")
        while not wait_for(one.fileno(), select.POLLIN, None):
            pass
        if file is None:
            teardown = linger(one)
            one.close()
            assert teardown.step() is not None
            assert other.recv(100) == b"last words" and other.recv(100) == b""
            other.close()
            while teardown.step() is not None:
                wait_for(teardown.fds()[0], select.POLLIN, None)
        print(name)
loop.close()
"""


@pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="gevent is not installed")
def test_sockets_of_gevent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GEVENT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=50
    )
    assert done.returncode == 0, done.stdout.decode()
    assert len(done.stdout.split(b"\n")) == 3


# Two network namespaces, and a host in one of them that vanishes. Numbers are seconds; what takes two minutes takes three.
VANISHING = """
import os, signal, socket, subprocess, sys, time
import stream_ipc.transports.sockets as sockets
from stream_ipc import IpcPeer, LogMessage, StreamClosedError
mode = sys.argv[1]
sockets.VANISHED = 3.0
sockets._KEEPALIVE = (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 2))
READER = '''
import socket, sys
sock = socket.socket()
sock.bind(("10.215.0.2", 5000))
sock.listen()
print("listening", flush=True)
other = sock.accept()[0]
sys.stdin.readline()
print(sum(iter(lambda: len(other.recv(1 << 20)), 0)))
'''
reader = subprocess.Popen(
    ["ip", "netns", "exec", sys.argv[3], sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
)
assert reader.stdout.readline() == b"listening\\n"
with IpcPeer(timeout=60) as peer:
    session = peer.create_socket_session(socket.create_connection(("10.215.0.2", 5000), 10))
    session.on_close(lambda session: print("ended", session.reason if hasattr(session, "reason") else ""))
    if mode in ("full", "reads late"):
        session.notify(LogMessage("x" * 900_000))  # more than the window takes
        assert session.queued_bytes
    peer.tick_for(0.5)
    if mode != "reads late":
        subprocess.run(["ip", "-n", sys.argv[3], "link", "set", "vb", "down"], check=True)
    if mode == "busy":
        session.notify(LogMessage("never acknowledged"))
    start = time.monotonic()
    while session.is_open and time.monotonic() - start < (9 if mode == "reads late" else 30):
        peer.tick(0.5)
    if mode == "reads late":
        assert session.is_open
        reader.stdin.write(b"\\n")
        reader.stdin.flush()
        session.flush(10)
    else:
        assert not session.is_open
        print("after", time.monotonic() - start)
        try:
            session.notify(LogMessage("x"))
        except StreamClosedError as exc:
            print(exc)
    reader.kill()
    reader.communicate()
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["idle", "busy", "full", "reads late"])
def test_a_host_that_vanishes(mode: str, tmp_path: Any) -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2: network namespaces")
    one, two = (f"ipc{os.getpid()}{side}" for side in "ab")

    def ip(*args: str, check: bool = True) -> int:
        return subprocess.run(["ip", *args], check=check, stderr=subprocess.DEVNULL).returncode

    if ip("netns", "add", one, check=False):
        pytest.skip("no network namespace can be made here")
    try:
        ip("netns", "add", two)
        if ip("link", "add", "va", "netns", one, "type", "veth", "peer", "name", "vb", "netns", two, check=False):
            pytest.skip("no virtual network can be made here")
        for name, device, address in ((one, "va", "10.215.0.1/24"), (two, "vb", "10.215.0.2/24")):
            ip("-n", name, "addr", "add", address, "dev", device)
            ip("-n", name, "link", "set", device, "up")
        script = tmp_path / "script.py"
        script.write_text(VANISHING)
        done = subprocess.run(
            ["ip", "netns", "exec", one, sys.executable, str(script), mode, one, two],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=55,
        )  # fmt: skip
        text = done.stdout.decode()
        assert done.returncode == 0 and text.endswith("done\n"), text
        if mode != "reads late":
            assert "ended" in text and "connection was lost" in text, text
    finally:
        ip("netns", "del", one, check=False)
        ip("netns", "del", two, check=False)
