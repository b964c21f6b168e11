"""listen() and connect(): addresses, accepting inside ticks, files of Unix sockets, what strangers can do."""

import errno
import fcntl
import gc
import os
import re
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest

import stream_ipc.core.connecting
import stream_ipc.core.listening
from stream_ipc import IpcPeer, LogMessage, Session, StreamClosedError
from tests.helpers import (
    WAIT,
    Alarms,
    CpuMeter,
    is_settled,
    listening_fd,
    nothing_is_torn_down,
    now,
    patch_wait_for,
    run_python,
    set_limit,
    tick_until,
    values,
)
from tests.messages import Note, Ping, Pong
from tests.os_helpers import Gate


def has_ipv6():
    if not socket.has_ipv6:
        return False
    with socket.socket(socket.AF_INET6) as sock:
        return sock.connect_ex(("::1", 1)) == errno.ECONNREFUSED


ADDRESSES = [
    "unix",
    ("127.0.0.1", 0),
    ("localhost", 0),
    pytest.param(("::1", 0), marks=pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 here")),
]


def real(address, tmp_path):
    return str(tmp_path / "socket") if address == "unix" else address


class Host:
    """Keeps the sessions that a listener hands over; they answer a Ping with a Pong and keep Notes."""

    def __init__(self):
        self.sessions = []
        self.notes = []

    def __call__(self, session):
        self.sessions.append(session)
        session.on_request(self.answer)
        session.on_message(self.notes.append)

    def answer(self, ping: Ping) -> Pong:
        return Pong(ping.value)


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "socket")


def dead_socket(path):
    """What a listener leaves behind that was killed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen(1)


def raw_client(address):
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.connect(address)
    return sock


# -- connections


@pytest.mark.parametrize("address", ADDRESSES)
def test_round_trip(peer, host, tmp_path, address):
    with peer.listen(real(address, tmp_path), host) as listener:
        client = peer.connect(listener.address)
        assert isinstance(client, Session)
        assert client.request(Ping([1, 2])).wait() == Pong([1, 2])
        (server,) = host.sessions
        server.notify(Note("back"))
        assert client.receive(5) == Note("back")
        assert set(peer.sessions) == {client, server}


@pytest.mark.parametrize("address", ADDRESSES)
def test_two_peers(host, tmp_path, address):
    with IpcPeer() as here, IpcPeer() as there:
        listener = here.listen(real(address, tmp_path), host)
        client = there.connect(listener.address)
        promise = client.request(Ping("x"))
        tick_until(lambda: promise.done, here, there)
        assert promise.wait() == Pong("x")
        client.close()
        tick_until(lambda: not here.sessions, here)


@pytest.mark.parametrize("address", ADDRESSES[1:])
def test_closing_while_the_other_side_talks_loses_nothing(host, tmp_path, address, monkeypatch):
    set_limit("linger", 20.0, monkeypatch)
    # TCP resets a connection that is closed over something unread, or when something comes for it later; and whoever
    # gets a reset loses what he has not read yet.
    with IpcPeer() as here, IpcPeer() as there, here.listen(real(address, tmp_path), host) as listener:
        client = there.connect(listener.address)
        client.notify(Note("first"))
        tick_until(lambda: host.notes, here)
        (server,) = host.sessions
        server.notify(Note("unread"))
        for number in range(100):
            client.notify(Note(number, bytes(10_000)))
        client.flush(10)
        server.notify(Note("unread"))
        began = time.monotonic()
        client.close()
        assert time.monotonic() - began < 10  # it does not wait for the other side, as long as that may take
        for _ in range(3):
            server.notify(Note("comes too late"))
        tick_until(lambda: not server.is_open, here, there)
        assert [note.text for note in host.notes] == ["first", *range(100)]
        tick_until(lambda: nothing_is_torn_down(there), there)


@pytest.mark.slow
def test_the_end_of_a_peer_does_not_wait_long_for_who_talks_and_never_closes(host):
    with IpcPeer() as here, here.listen(("127.0.0.1", 0), host) as listener:
        there = IpcPeer()
        client = there.connect(listener.address)
        tick_until(lambda: host.sessions, here)
        host.sessions[0].notify(Note("unread"))
        assert select.select(client.transport.read_fds(), [], [], 10)[0]
        with CpuMeter() as meter:
            there.close()
        assert meter.real < 5 and meter.cpu < 0.2


def test_address(peer, host, path):
    with peer.listen(path, host) as listener:
        assert listener.address == path
    with peer.listen(os.fsencode(path), host) as listener:
        assert listener.address == path
    with peer.listen(Path(path), host) as listener:
        assert listener.address == path
        peer.connect(Path(path)).close()
        peer.connect(os.fsencode(path)).close()
    with peer.listen(("127.0.0.1", 0), host) as listener:
        name, port = listener.address
        assert name == "127.0.0.1" and port > 0
        peer.connect([name, port]).close()


def test_handlers_see_what_came_before_the_session_existed(peer, host, path):
    with peer.listen(path, host), IpcPeer() as other:
        client = other.connect(path)
        promise = client.request(Ping(1))
        client.notify(Note("early"))
        tick_until(lambda: host.notes, peer)
        assert host.notes == [Note("early")]
        other.tick(1)
        assert promise.wait() == Pong(1)


def test_a_client_that_has_gone_is_still_handed_over(peer, host, path):
    with peer.listen(path, host), IpcPeer() as other:
        client = other.connect(path)
        client.notify(Note("only this"))
        client.close()
        tick_until(lambda: host.notes, peer)
        tick_until(lambda: not host.sessions[0].is_open, peer)
        assert peer.sessions == ()


def test_nagle_is_off(peer, host):
    with peer.listen(("127.0.0.1", 0), host) as listener:
        client = peer.connect(listener.address)
        tick_until(lambda: host.sessions, peer)
        for session in (client, host.sessions[0]):
            (fd,) = session.transport.read_fds()
            with socket.socket(fileno=os.dup(fd)) as sock:
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_can_be_listened_at_again_at_once(peer, host):
    listener = peer.listen(("127.0.0.1", 0), host)
    client = peer.connect(listener.address)
    client.request(Ping(1)).wait()
    host.sessions[0].close()  # this side closes first, which leaves the port in TIME_WAIT
    listener.close()
    with peer.listen(listener.address, host) as again:
        assert again.address == listener.address
        assert peer.connect(again.address).request(Ping(2)).wait() == Pong(2)


# -- on_session


def test_on_session_runs_when_messages_are_dispatched(peer, host, path):
    with peer.listen(path, host):
        first = peer.connect(path)
        second = peer.connect(path)
        first.flush(1)
        assert host.sessions == []  # none of these calls runs handlers
        peer.tick()
        assert len(host.sessions) == 2
        second.close()


def test_on_session_that_raises(peer, host, path):
    fail = [ValueError("not today")]

    def on_session(session):
        host(session)
        if fail:
            session.notify(Note("sorry"))
            raise fail.pop()

    with peer.listen(path, on_session):
        refused = peer.connect(path)
        ended = []
        refused.on_close(ended.append)
        promise = refused.request(Ping(1))
        with pytest.raises(ValueError, match="not today"):
            peer.tick(1)
        assert not host.sessions[0].is_open
        with pytest.raises(StreamClosedError):
            promise.wait()
        assert ended == [refused]
        # The listener goes on.
        assert peer.connect(path).request(Ping(2)).wait() == Pong(2)


def test_on_session_that_is_interrupted_keeps_the_session(peer, host, path):
    class Stop(BaseException):
        pass

    def on_session(session):
        host(session)
        if len(host.sessions) == 1:
            raise Stop

    with peer.listen(path, on_session):
        client = peer.connect(path)
        promise = client.request(Ping(1))
        with pytest.raises(Stop):
            peer.tick(1)
        assert promise.wait() == Pong(1)
        assert len(host.sessions) == 1


def test_on_session_may_talk(peer, path):
    heard = []

    def on_session(session):
        heard.append(session.request(Ping("who")).wait())

    with peer.listen(path, on_session):
        client = peer.connect(path)
        client.on_request(lambda ping: Pong("me"))
        tick_until(lambda: heard, peer)
    assert heard == [Pong("me")]


def test_on_session_may_close_anything(peer, path):
    def on_session(session):
        session.close()
        listener.close()

    listener = peer.listen(path, on_session)
    client = peer.connect(path)
    late = peer.connect(path)
    tick_until(lambda: not client.is_open and not late.is_open, peer)
    assert not listener.is_open
    assert not os.path.exists(path)


async def later(session):
    pass


@pytest.mark.parametrize("wrong", [None, lambda: None, lambda session, other: None, later])
def test_on_session_must_take_a_session(peer, path, wrong):
    with pytest.raises(TypeError, match="^on_session takes a (callable|handler of one argument|plain function),"):
        peer.listen(path, wrong)
    for fine in (print, [].append, lambda *arguments: None, lambda session, other=None: None):
        peer.listen(path, fine).close()


# -- ticking


def test_tick_waits_for_a_connection(peer, host, path):
    with peer.listen(path, host):
        assert peer.tick(0.01) == 0
        with raw_client(path):
            peer.tick(None)
            assert len(host.sessions) == 1
        peer.tick(None)
        assert peer.sessions == ()
    with pytest.raises(StreamClosedError):
        peer.tick(None)


def test_a_waiting_listener_costs_nothing(peer, host, path):
    with peer.listen(path, host), peer.listen(("127.0.0.1", 0), host):
        with CpuMeter() as meter:
            peer.tick(WAIT)
        assert meter.real >= WAIT and not meter.spins


def test_accepting_is_fair(peer, host, path):
    with peer.listen(path, host), IpcPeer() as other:
        client = other.connect(path)
        tick_until(lambda: host.sessions, peer)
        crowd = [raw_client(path) for _ in range(100)]
        promise = client.request(Ping("in between"))
        peer.tick()
        assert len(host.sessions) <= 1 + 16
        other.tick()
        assert is_settled(promise)  # served in the same tick in which others were accepted
        tick_until(lambda: len(host.sessions) == 101, peer)
        for sock in crowd:
            sock.close()
        tick_until(lambda: len(peer.sessions) == 1, peer)


def test_fileno_tells_of_a_connection(peer, host, path):
    with peer.listen(path, host):
        fd = peer.fileno()
        peer.tick()
        assert not select.select([fd], [], [], 0)[0]
        with raw_client(path):
            assert select.select([fd], [], [], 5)[0]
            peer.tick(0)
            assert len(host.sessions) == 1
            peer.tick(0)
            assert not select.select([fd], [], [], 0)[0]


ON_MACOS = """
import os, socket, sys
sys.platform = "darwin"
accept = socket.socket.accept
def accept_or_lose(sock):
    try:
        os.close(os.dup(0))
    except OSError:
        socket.socket.accept = None  # there the connection would be lost
        raise
    return accept(sock)
socket.socket.accept = accept_or_lose
"""


@pytest.mark.slow
@pytest.mark.parametrize("system", ["", ON_MACOS])
def test_out_of_descriptors(system):
    code = """
import os, resource, socket, sys, tempfile
from stream_ipc import IpcPeer
from tests.helpers import CpuMeter, is_settled, tick_until
from tests.messages import Ping, Pong
folder = tempfile.mkdtemp()
path = folder + "/s"
served = []
def on_session(session):
    served.append(session)
    session.on_request(lambda ping: Pong(ping.value))
with IpcPeer() as peer, IpcPeer() as other:
    listener = peer.listen(path, on_session)
    client = other.connect(path)
    tick_until(lambda: served, peer)
    late = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    full = max(map(int, os.listdir("/dev/fd"))) + 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (full, hard))
    spare = []
    try:
        while True:
            spare.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for sock in late:
        sock.connect(path)
    with CpuMeter() as meter:
        peer.tick_for(0.3)
    assert meter.cpu < 0.15, meter.cpu
    assert len(served) == 1
    promise = client.request(Ping(1))
    tick_until(lambda: is_settled(promise), peer, other)
    for fd in spare:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    tick_until(lambda: len(served) == 4, peer)
    for sock in late:
        sock.close()
os.rmdir(folder)
"""
    done = run_python(system + code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot accept") == 1
    assert "Too many open files" in done.stderr


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["accepted", "connected"])
def test_a_connection_may_get_the_last_descriptor(tmp_path, how):
    # Nothing else can be opened then, not even to import what its session needs.
    code = """
import os, resource, socket, sys
from stream_ipc import IpcPeer, LogMessage
how, path = sys.argv[1:]
served = []
listening = socket.socket(socket.AF_UNIX)
client = socket.socket(socket.AF_UNIX)
with IpcPeer() as peer:
    if how == "accepted":
        listening.close()
        peer.listen(path, served.append)
        client.connect(path)
    else:
        listening.bind(path)
        listening.listen()
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if how == "connected":
        served.append(peer.connect(path))
    while not served:
        peer.tick(10)
    try:
        os.close(os.dup(0))
    except OSError as exc:
        print(exc.errno == 24, served[0].is_open)
listening.close()
client.close()
"""
    done = run_python(code, how, str(tmp_path / "s"))
    assert (done.stdout, done.returncode) == ("True True\n", 0), done.stderr


def test_listening_without_descriptors_names_the_address():
    code = """
import os, resource, socket, sys, tempfile
from stream_ipc import IpcPeer
import stream_ipc.core.listening, stream_ipc.listener
folder = tempfile.mkdtemp()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
worked = []
with IpcPeer() as peer:
    socket.getaddrinfo("127.0.0.1", 1)
    for address in (folder + "/s", ("127.0.0.1", 0)):
        for free in range(6):
            taken = []
            try:
                while True:
                    taken.append(os.dup(2))
            except OSError:
                pass
            for _ in range(free):
                os.close(taken.pop())
            before = len(os.listdir("/proc/self/fd")) if free and os.path.isdir("/proc/self/fd") else 0
            try:
                peer.listen(address, print).close()
                worked.append(free)
            except OSError as exc:
                assert exc.errno == 24 and repr(address) in str(exc), exc
            after = len(os.listdir("/proc/self/fd")) if free and os.path.isdir("/proc/self/fd") else 0
            assert before == after
            for fd in taken:
                os.close(fd)
assert worked == 2 * [1, 2, 3, 4, 5], worked
os.rmdir(folder)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_descriptors_above_1024():
    code = """
import os, resource, tempfile
from stream_ipc import IpcPeer
from tests.messages import Ping, Pong
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
many = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
with tempfile.TemporaryDirectory() as folder, IpcPeer() as peer:
    peer.listen(folder + "/s", lambda session: session.on_request(lambda ping: Pong(ping.value)))
    client = peer.connect(folder + "/s")
    assert client.transport.read_fds()[0] > 1024
    assert client.request(Ping(1)).wait() == Pong(1)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_interruptions_lose_no_connection(peer, path):
    count = 150
    handed = []
    # A method in C, which no interruption can come into: a handler of Python's own may be left at its first line.
    with peer.listen(path, handed.append), Alarms(raises=True) as alarms:
        socks = []
        end = time.monotonic() + 20
        while len(handed) < count:
            assert time.monotonic() < end
            if len(socks) < count:
                socks.append(raw_client(path))
            alarms.call(lambda: peer.tick(0))
        assert len(set(handed)) == count
        alarms.raises = False
        for sock in socks:
            sock.close()
        tick_until(lambda: not peer.sessions, peer)
        assert len(handed) == count


# -- the file of a Unix socket


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_mode(peer, host, path, umask):
    before = os.umask(umask)
    try:
        with peer.listen(path, host):
            status = os.stat(path)
            assert stat.S_ISSOCK(status.st_mode)
            assert stat.S_IMODE(status.st_mode) == 0o600
            assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_file_goes_away_on_close(peer, host, path):
    listener = peer.listen(path, host)
    listener.close()
    assert not os.path.exists(path)
    with IpcPeer() as other:
        other.listen(path, host)
    assert not os.path.exists(path)


def test_file_goes_away_though_the_folder_was_changed(peer, host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with peer.listen("socket", host) as listener:
        assert listener.address == "socket"
        monkeypatch.chdir("/")
    assert list(tmp_path.iterdir()) == []


def test_file_goes_away_at_exit(path):
    code = "import sys; from stream_ipc import IpcPeer; peer = IpcPeer(); peer.listen(sys.argv[1], print)"
    done = run_python(code, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not os.path.exists(path)


def test_file_of_a_dead_listener_is_replaced(peer, host, path):
    dead_socket(path)
    with peer.listen(path, host):
        assert peer.connect(path).request(Ping(1)).wait() == Pong(1)
    assert not os.path.exists(path)


def test_file_of_a_killed_listener_is_replaced(peer, host, path):
    code = (
        "import os, signal, sys; from stream_ipc import IpcPeer; peer = IpcPeer(); peer.listen(sys.argv[1], print);"
        " os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run_python(code, path).returncode < 0
    assert os.path.exists(path)
    with peer.listen(path, host):
        assert peer.connect(path).request(Ping(1)).wait() == Pong(1)


def test_living_listener_is_refused_and_not_disturbed(peer, host, path):
    with peer.listen(path, host):
        with IpcPeer() as other, pytest.raises(OSError) as caught:
            other.listen(path, host)
        assert caught.value.errno == errno.EADDRINUSE
        assert repr(path) in str(caught.value)
        for _ in range(3):
            peer.tick()
        assert host.sessions == []  # looking whether it lives is no connection
        assert peer.connect(path).request(Ping(1)).wait() == Pong(1)


def test_living_listener_with_a_full_queue_is_refused(peer, host, path):
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(path)
        busy.listen(0)
        waiting.connect(path)
        with pytest.raises(OSError, match="somebody listens"):
            peer.listen(path, host)


def test_socket_that_does_not_listen_yet_is_refused(peer, host, path):
    with socket.socket(socket.AF_UNIX) as early:
        early.bind(path)
        with pytest.raises(OSError, match="somebody listens"):
            peer.listen(path, host)
        assert os.path.exists(path)


@pytest.mark.parametrize("what", ["file", "folder", "link", "dangling"])
def test_what_is_no_socket_is_not_replaced(peer, host, tmp_path, path, what):
    if what == "file":
        Path(path).write_text("precious")
    elif what == "folder":
        os.mkdir(path)
    elif what == "link":
        dead_socket(str(tmp_path / "dead"))
        os.symlink(str(tmp_path / "dead"), path)
    else:
        os.symlink(str(tmp_path / "nowhere"), path)
    with pytest.raises(FileExistsError, match="no socket") as caught:
        peer.listen(path, host)
    assert repr(path) in str(caught.value)
    assert os.path.lexists(path)


def test_another_ones_file_is_not_removed(peer, host, path):
    listener = peer.listen(path, host)
    os.unlink(path)
    with IpcPeer() as other, other.listen(path, host):
        listener.close()
        assert os.path.exists(path)
        assert other.connect(path).request(Ping(1)).wait() == Pong(1)
    assert not os.path.exists(path)


@pytest.mark.slow
def test_only_one_of_many_replaces_a_dead_file(tmp_path):
    code = """
import sys
from stream_ipc import IpcPeer
path, gate = sys.argv[1], open(sys.argv[2])
with IpcPeer() as peer:
    sys.stdout.write("ready\\n"); sys.stdout.flush()
    gate.read()
    try:
        peer.listen(path, print)
        print("listening", flush=True)
    except OSError as exc:
        print("refused" if "somebody listens" in str(exc) or "in use" in str(exc) else exc, flush=True)
    sys.stdin.read()
"""
    for attempt in range(3):
        path = str(tmp_path / f"socket{attempt}")
        dead_socket(path)
        with Gate(tmp_path / f"gate{attempt}") as gate:
            racers = [
                subprocess.Popen(
                    [sys.executable, "-c", code, path, gate.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    universal_newlines=True,
                )
                for _ in range(6)
            ]
            for racer in racers:
                assert racer.stdout.readline() == "ready\n"
            gate.open()
            results = [racer.stdout.readline() for racer in racers]
            assert sorted(results) == ["listening\n"] + ["refused\n"] * 5
            with raw_client(path):  # and it can be reached
                pass
            for racer in racers:
                racer.communicate()
        assert not os.path.exists(path)


def test_folder_that_somebody_else_has_locked(peer, host, path, monkeypatch):
    import fcntl

    set_limit("lock tries", 5, monkeypatch)
    dead_socket(path)
    fd = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with peer.listen(path, host):
            assert peer.connect(path).request(Ping(1)).wait() == Pong(1)
    finally:
        os.close(fd)


def test_only_where_there_is_a_file_does_the_lock_of_its_folder_matter(peer, host, path, monkeypatch):
    # Programs lock a folder for as long as they run, as flock(1) does.
    fd = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for the lock"))
            peer.listen(path, host)
    finally:
        os.close(fd)


def test_dead_file_is_removed_under_a_lock(peer, host, path, monkeypatch):
    # Without it a second one could remove the new file of the first.
    unlink, locked = os.unlink, []

    def remove(name, *args, **kwargs):
        fd = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked.append(name)
        finally:
            os.close(fd)
        unlink(name, *args, **kwargs)

    dead_socket(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", remove)
        peer.listen(path, host)
    assert locked == [path]


def test_other_users_are_refused(peer, host, monkeypatch, caplog):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = folder + "/socket"
        with peer.listen(path, host):
            if os.geteuid() == 0:
                os.chmod(path, 0o666)  # otherwise the kernel refuses them before we see them
                code = "import os, socket, sys; os.setuid(65534); s = socket.socket(1); s.connect(sys.argv[1]); s.recv(1)"
                client = subprocess.Popen([sys.executable, "-c", code, path])
                tick_until(lambda: caplog.records, peer)
                assert client.wait(20) == 0
                assert "user 65534" in caplog.text
            else:
                me = os.geteuid()
                sock = raw_client(path)
                monkeypatch.setattr(os, "geteuid", lambda: me + 1)
                tick_until(lambda: caplog.records, peer)
                assert sock.recv(1) == b""
                sock.close()
        assert "refused" in caplog.text
        assert host.sessions == []


def test_listener_of_another_user_is_not_talked_to(peer, host, path, monkeypatch):
    monkeypatch.setattr(stream_ipc.core.connecting, "other_user", lambda sock: 4711)
    with peer.listen(path, host):
        with pytest.raises(PermissionError) as caught:
            peer.connect(path)
        assert repr(path) in str(caught.value) and "user 4711" in str(caught.value)


USERS = """
import os, signal, sys
import logging, encodings.idna, stream_ipc.serializers.pickle  # another user may not see the files
import stream_ipc.listener, stream_ipc.core.listening, stream_ipc.core.connecting
from stream_ipc import IpcPeer, LogMessage
IpcPeer().close()
path, listens_as, serves_as, connects_as = sys.argv[1], *map(int, sys.argv[2:])
os.setgroups([])
ready, go = os.pipe()
server = os.fork()
signal.alarm(20)
if not server:
    peer = IpcPeer(timeout=20)
    os.setresuid(listens_as, listens_as, 0)
    def serve(session):
        session.on_request(lambda message: message)
        session.on_close(lambda session: os._exit(0))
    listener = peer.listen(path, serve)
    os.setresuid(0, 0, 0)
    os.chown(path, connects_as, -1)
    os.setresuid(serves_as, serves_as, serves_as)
    os.write(go, b"x")
    while True:
        peer.tick(None)
os.close(go)
os.read(ready, 1)
os.setresuid(connects_as, connects_as, 0)
peer = IpcPeer(timeout=20)
try:
    print(peer.connect(path).request(LogMessage("served")).wait().message)
except Exception as exc:
    print(type(exc).__name__, exc)
finally:
    peer.close()
    os.setresuid(0, 0, 0)
    os.kill(server, 9)
    os.waitpid(server, 0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
@pytest.mark.parametrize(
    ("listens", "serves", "connects", "shown"),
    [
        (0, 65534, 65534, "served"),  # it was bound before the process gave up the rights of root
        pytest.param(65533, 65534, 65534, "PermissionError .* user 65533 listens there", marks=pytest.mark.slow),
        pytest.param(65534, 65534, 65534, "served", marks=pytest.mark.slow),
        (0, 65533, 65534, "StreamClosedError "),  # that one runs as another user
    ],
)
def test_who_may_talk_to_whom(listens, serves, connects, shown):
    folder = tempfile.mkdtemp(dir="/tmp")
    os.chmod(folder, 0o777)
    try:
        done = run_python(USERS, folder + "/s", str(listens), str(serves), str(connects), strict=False)
        assert re.search(shown, done.stdout), done.stdout + done.stderr
    finally:
        shutil.rmtree(folder)


# -- wrong addresses


@pytest.mark.parametrize(
    ("address", "error", "text"),
    [
        (None, TypeError, "None"),
        (8080, TypeError, "8080"),
        (object(), TypeError, "object"),
        ("", ValueError, "''"),
        (b"", ValueError, "''"),
        ("a\0b", ValueError, "a"),
        ("\0abstract", ValueError, "abstract"),
        ("localhost:80", ValueError, "localhost:80"),
        ("tcp://localhost:80", ValueError, "tcp://localhost:80"),
        ((), ValueError, "()"),
        (("localhost",), ValueError, "localhost"),
        (("::1", 80, 0, 0), ValueError, "::1"),
        ((None, 80), TypeError, "80"),
        ((b"localhost", 80), TypeError, "localhost"),
        (("", 80), ValueError, "80"),
        (("localhost", "80"), TypeError, "'80'"),
        (("localhost", True), TypeError, "True"),
        (("localhost", 80.0), TypeError, "80.0"),
        (("localhost", -1), ValueError, "-1"),
        (("localhost", 65536), ValueError, "65536"),
        (("a..b", 80), ValueError, "a..b"),
        (("a\0b", 80), ValueError, "a"),
        (("x" * 300, 80), ValueError, "xxx"),
        (("192.0.2.1", 80), ValueError, "192.0.2.1"),
        (("::", 80), ValueError, "::"),
        (("0.0.0.0", 80), ValueError, "0.0.0.0"),
        (("8.8.8.8", 80), ValueError, "ssl_context"),
        ("/" + "x" * 200, OSError, "xxx"),
    ],
)
def test_wrong_addresses(peer, address, error, text):
    for call in (lambda: peer.connect(address), lambda: peer.listen(address, print)):
        with pytest.raises(error) as caught:
            call()
        assert text in str(caught.value)
    assert peer.sessions == ()


def test_path_of_just_the_length_that_fits(peer, host, tmp_path):
    limit = 107 if sys.platform.startswith("linux") else 103
    room = limit - len(str(tmp_path)) - 1
    if room < 1:
        pytest.skip("the temporary folder's own path is too long")
    with peer.listen(str(tmp_path / ("x" * room)), host) as listener:
        assert peer.connect(listener.address).request(Ping(1)).wait() == Pong(1)
    with pytest.raises(OSError) as caught:
        peer.listen(str(tmp_path / ("x" * (room + 1))), host)
    assert caught.value.errno == errno.ENAMETOOLONG
    assert str(limit) in str(caught.value)


def test_host_that_does_not_resolve(peer):
    for call in (lambda a: peer.connect(a), lambda a: peer.listen(a, print)):
        with pytest.raises(socket.gaierror) as caught:
            call(("no-such-host.invalid", 80))
        assert "no-such-host.invalid" in str(caught.value) and "80" in str(caught.value)


def test_port_in_use(peer, host):
    with peer.listen(("127.0.0.1", 0), host) as listener:
        with pytest.raises(OSError) as caught:
            peer.listen(listener.address, host)
        assert caught.value.errno == errno.EADDRINUSE
        assert str(listener.address) in str(caught.value)


def test_folder_that_does_not_exist(peer, tmp_path):
    path = str(tmp_path / "nowhere" / "socket")
    for call in (lambda: peer.connect(path), lambda: peer.listen(path, print)):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert path in str(caught.value)


def test_connect_to_nobody(peer, path):
    with pytest.raises(FileNotFoundError) as missing:
        peer.connect(path)
    assert path in str(missing.value)
    dead_socket(path)
    with pytest.raises(ConnectionRefusedError) as dead:
        peer.connect(path)
    assert path in str(dead.value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    with pytest.raises(ConnectionRefusedError) as refused:
        peer.connect(address)
    assert str(address) in str(refused.value)
    with pytest.raises(ValueError, match="port 0"):
        peer.connect(("127.0.0.1", 0))


def test_server_hostname_needs_tls(peer, path):
    with pytest.raises(ValueError, match="ssl_context"):
        peer.connect(path, server_hostname="x")


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1"])
def test_wrong_timeouts(peer, path, timeout):
    with pytest.raises((TypeError, ValueError), match="timeout"):
        peer.connect(path, timeout=timeout)


# -- connect and time


def full_unix(path):
    busy = socket.socket(socket.AF_UNIX)
    busy.bind(path)
    busy.listen(0)
    return busy


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a full queue refuses at once")
def test_connect_obeys_its_timeout_on_a_unix_socket(peer, path):
    with full_unix(path) as busy, raw_client(path):
        start = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            peer.connect(path, timeout=WAIT)
        assert WAIT <= time.monotonic() - start < 5
        assert path in str(caught.value) and str(WAIT) in str(caught.value)
        with pytest.raises(TimeoutError):
            peer.connect(path, timeout=0)

        # Once there is room it goes on.
        timer = threading.Timer(0.03, lambda: busy.accept()[0].close())
        timer.start()
        peer.connect(path, timeout=20).close()
        timer.join()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a full queue refuses at once")
def test_connect_obeys_its_timeout_over_tcp(peer):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen(0)
        address = busy.getsockname()
        crowd = []
        try:
            for _ in range(8):  # until the queue is full: then the kernel says nothing more
                sock = socket.socket()
                crowd.append(sock)
                sock.setblocking(False)
                sock.connect_ex(address)
            start = time.monotonic()
            with pytest.raises(TimeoutError) as caught:
                peer.connect(address, timeout=WAIT)
            assert WAIT <= time.monotonic() - start < 5
            assert str(address) in str(caught.value)
        finally:
            for sock in crowd:
                sock.close()


def test_connection_to_itself_is_refused(peer, monkeypatch):
    connect_ex = socket.socket.connect_ex

    def connect(sock, address):
        sock.bind(address)  # as the system does now and then, for a port out of its own range
        return connect_ex(sock, address)

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = sock.getsockname()
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    with pytest.raises(ConnectionRefusedError):
        peer.connect(address)


def test_address_that_does_not_answer_leaves_time_for_the_next(peer, host, monkeypatch):
    limits = []
    listener = peer.listen(("127.0.0.1", 0), host)
    connect_ex = socket.socket.connect_ex

    def connect(sock, address):
        return connect_ex(sock, address) if address == listener.address else errno.EINPROGRESS

    def wait(wait_for, fd, events, limit):
        limits.append(limit - now(peer))
        return len(limits) > 2 and wait_for(fd, events, limit)

    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    patch_wait_for(monkeypatch, peer, wait)
    info = socket.getaddrinfo(*listener.address, type=socket.SOCK_STREAM)[0]
    others = [(*info[:4], (f"127.0.0.{number}", info[4][1])) for number in (2, 3)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [*others, info])
    assert peer.connect(listener.address, timeout=9.0).is_open
    # Each gets its part of what is left, and here the first two took none of it.
    assert 2.5 < limits[0] <= 3.0 and 4.0 < limits[1] <= 4.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a full queue refuses at once")
def test_connect_moves_bytes_but_runs_no_handlers(peer, path):
    seen = []
    a, b = peer.create_session_pair()
    b.on_message(seen.append)
    big = LogMessage("x" * 900_000)
    a.notify(big)
    assert a.queued_bytes
    with full_unix(path), raw_client(path):
        while a.queued_bytes:
            with pytest.raises(TimeoutError):
                peer.connect(path, timeout=WAIT)
    assert seen == []
    peer.tick()
    assert seen == [big]


def test_connect_of_an_interrupted_program_leaves_nothing(peer, host, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a socket that was dropped before anybody had it closes itself
        with peer.listen(path, host), Alarms(raises=True) as alarms:
            for _ in range(300):
                whole, session = alarms.call(lambda: peer.connect(path))
                if whole:
                    session.close()
        gc.collect()
    # conftest.py looks for descriptors that were left.


def test_peer_that_is_closed_when_the_connection_is_there(peer, monkeypatch):
    def close_then(real, fd, events, limit):
        ready = real(fd, events, limit)
        peer.close()  # as a signal handler may
        return ready

    patch_wait_for(monkeypatch, peer, close_then)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(RuntimeError, match=r"cannot connect to \(.*: this IpcPeer was closed while it was connecting"):
            peer.connect(server.getsockname())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a full queue refuses at once")
def test_peer_that_is_closed_while_it_tries_again(peer, path, monkeypatch):
    def close_then(real, fd, events, limit):
        ready = real(fd, events, limit)
        peer.close()
        return ready

    patch_wait_for(monkeypatch, peer, close_then)
    with full_unix(path), raw_client(path):
        with pytest.raises(RuntimeError, match=r"cannot connect to .*: this IpcPeer was closed while it was connecting"):
            peer.connect(path, timeout=None)


# -- closing


def test_close(peer, host, path):
    listener = peer.listen(path, host)
    assert listener.is_open
    assert repr(listener) == f"<Listener {path!r} open handshakes=0>"
    client = peer.connect(path)
    client.request(Ping(1)).wait()
    listener.close()
    listener.close()
    assert not listener.is_open
    assert repr(listener) == f"<Listener {path!r} closed handshakes=0>"
    assert listener.address == path
    assert client.request(Ping(2)).wait() == Pong(2)  # what was accepted stays
    with pytest.raises(FileNotFoundError):
        peer.connect(path)


def failing(*numbers):
    """An accept() that fails before it works; for ever if there is one way only."""
    accept, left = socket.socket.accept, list(numbers)

    def fail(sock):
        if not left:
            return accept(sock)
        number = left[0] if len(numbers) == 1 else left.pop(0)
        raise OSError(number, os.strerror(number))

    return fail


def test_connection_that_is_gone_before_it_is_accepted(peer, host, path, monkeypatch, caplog):
    peer.listen(path, host)
    client = peer.connect(path)
    monkeypatch.setattr("socket.socket.accept", failing(errno.ECONNABORTED, errno.EPROTO))
    peer.tick()
    assert len(host.sessions) == 1 and not caplog.records  # it went on with the next one at once
    client.close()


@pytest.mark.matrix
@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("paused", [False, True])
def test_socket_that_somebody_else_closes(peer, host, path, caplog, monkeypatch, reused, paused):
    set_limit("listener pause", 0.01, monkeypatch)
    set_limit("check interval", 10.0 if paused else 0.01, monkeypatch)
    listener = peer.listen(path, host)
    if paused:
        monkeypatch.setattr("socket.socket.accept", failing(errno.EMFILE))
        client = raw_client(path)
        peer.tick()
        assert "paused" in repr(listener)
        client.close()
    number = listening_fd(listener)
    os.close(number)
    with open(os.devnull, "rb") as other:
        assert other.fileno() == number
        if not reused:
            other.close()
        with CpuMeter() as meter:
            tick_until(lambda: not listener.is_open, peer)
        assert meter.cpu < 0.5 and peer.tick(0.01) == 0
        assert reused is not other.closed and (other.closed or other.read() == b"")
    assert "closed by somebody else" in caplog.text and not os.path.exists(path)


def test_connections_that_were_not_accepted_are_closed(peer, host, path):
    listener = peer.listen(path, host)
    client = peer.connect(path)
    listener.close()
    tick_until(lambda: not client.is_open, peer)
    assert host.sessions == []


def test_peer_closes_its_listeners(host, path):
    with IpcPeer() as peer:
        listeners = [peer.listen(path, host), peer.listen(("127.0.0.1", 0), host)]
    assert not any(listener.is_open for listener in listeners)
    with pytest.raises(RuntimeError, match="closed"):
        peer.listen(path, host)
    with pytest.raises(RuntimeError, match="closed"):
        peer.connect(path)
    listeners[0].close()


def test_unclosed_peer_is_warned_about(host, path):
    peer = IpcPeer()
    peer.listen(path, host)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del peer
        gc.collect()
    assert any("unclosed <IpcPeer" in str(warning.message) for warning in caught)
    assert not os.path.exists(path)


def test_other_thread_is_refused(peer, host, path):
    errors = []

    def on_session(session):
        def misuse():
            for call in (listener.close, lambda: peer.connect(path), lambda: peer.listen(path + "2", host)):
                try:
                    call()
                except RuntimeError as exc:
                    errors.append(exc)

        thread = threading.Thread(target=misuse)
        thread.start()
        thread.join()

    with peer.listen(path, on_session) as listener:
        peer.connect(path)
        tick_until(lambda: len(errors) == 3, peer)


def test_fork_leaves_the_listener_to_its_process(path):
    code = """
import os, sys
from stream_ipc import IpcPeer
from tests.messages import Ping, Pong
path = sys.argv[1]
with IpcPeer() as peer:
    listener = peer.listen(path, lambda session: session.on_request(lambda ping: Pong(ping.value)))
    pid = os.fork()
    if not pid:
        for call in (lambda: peer.connect(path), lambda: peer.listen(path + "2", print)):
            try:
                call()
            except RuntimeError as exc:
                assert "fork" in str(exc), exc
            else:
                os._exit(1)
        listener.close()
        peer.close()
        os._exit(0 if os.path.exists(path) else 2)
    assert os.waitpid(pid, 0)[1] == 0
    assert peer.connect(path).request(Ping(1)).wait() == Pong(1)
assert not os.path.exists(path)
"""
    done = run_python(code, path)
    assert done.returncode == 0, done.stderr


def test_messages_from_many_clients(peer, host, path):
    with peer.listen(path, host):
        clients = [peer.connect(path) for _ in range(30)]
        for number, client in enumerate(clients):
            client.notify(Note(str(number)))
        tick_until(lambda: len(host.notes) == 30, peer)
        assert sorted(map(int, values(host.notes))) == list(range(30))
        assert peer.broadcast(Note("all")) == 60


def test_nothing_is_imported_before_it_is_used():
    code = (
        "import sys, stream_ipc; names = ('ssl', 'socket', 'stream_ipc.listener', 'stream_ipc.transports.tls');"
        " names += ('stream_ipc.core.connecting',);"
        " print([n for n in names if n in sys.modules]);"
        " peer = stream_ipc.IpcPeer(); peer.listen(('127.0.0.1', 0), print).close(); peer.close();"
        " print([n for n in names if n in sys.modules]); print(stream_ipc.Listener.__name__)"
    )
    done = run_python(code)
    assert done.stdout.splitlines() == ["[]", "['socket', 'stream_ipc.listener']", "Listener"], done.stderr
