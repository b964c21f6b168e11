"""TLS: handshakes inside ticks, both directions, both kinds of end, sockets that were connected elsewhere."""

import errno
import gc
import os
import select
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest

from stream_ipc import IpcPeer, StreamClosedError
from tests.conftest import ROOT
from tests.helpers import (
    PATIENCE,
    WAIT,
    Alarms,
    CpuMeter,
    InterruptAt,
    Interruption,
    framed,
    frames_of,
    handshakes_of,
    patch_handshake,
    replace_socket,
    set_clock,
    socket_of,
    tick_until,
    values,
    wants_write,
)
from tests.messages import Note, Ping, Pong
from tests.test_listener import Host, raw_client

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")


def make_certificate(folder, name):
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    # A key of RSA takes longer to make than most tests here.
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"]
    paths = [str(folder / f"{name}.crt"), str(folder / f"{name}.key")]
    subprocess.run(
        [*command, "-out", paths[0], "-keyout", paths[1]], check=True, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    return SimpleNamespace(crt=paths[0], key=paths[1])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    return SimpleNamespace(**{name: make_certificate(folder, name) for name in ("server", "client", "other")})


@pytest.fixture
def server_side(certificates):
    """A context for who listens."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server.crt, certificates.server.key)
    return context


@pytest.fixture
def mutual(server_side, certificates):
    """The same, for a listener that wants to know who connects."""
    server_side.verify_mode = ssl.CERT_REQUIRED
    server_side.load_verify_locations(certificates.client.crt)
    return server_side


def client_context(certificates, trusted="server", own=None):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(getattr(certificates, trusted).crt)
    if own:
        context.load_cert_chain(getattr(certificates, own).crt, getattr(certificates, own).key)
    return context


@pytest.fixture
def client_side(certificates):
    """A context for who connects."""
    return client_context(certificates)


class ShiftedClock:
    """A peer's clock that can be put forward, but goes on as time does."""

    def __init__(self):
        self.shift = 0.0

    def __call__(self):
        return time.monotonic() + self.shift


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def listener(peer, host, server_side):
    with peer.listen(("127.0.0.1", 0), host, ssl_context=server_side) as listener:
        yield listener


@pytest.fixture
def pair(peer, host, listener, client_side):
    """Two sessions with TLS between them."""
    client = peer.connect(listener.address, ssl_context=client_side)
    tick_until(lambda: host.sessions, peer)
    return client, host.sessions[0]


def raw_tls(peer, address, context, **options):
    """A TLS client in the hands of the test, its handshake done, blocking."""
    sock = context.wrap_socket(
        raw_client(address), server_hostname="localhost", do_handshake_on_connect=False, **options
    )
    sock.setblocking(False)
    while True:
        try:
            sock.do_handshake()
            break
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            peer.tick(0.01)
    sock.settimeout(20)
    return sock


def end_text(session, peer):
    """Why a session has ended."""
    promise = session.request(Ping("never answered"))
    with pytest.raises(StreamClosedError) as caught:
        promise.wait()
    return str(caught.value)


# -- connections


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_round_trip(peer, host, listener, client_side, version):
    client_side.minimum_version = client_side.maximum_version = ssl.TLSVersion[version]
    client = peer.connect(listener.address, ssl_context=client_side)
    assert client.request(Ping("secret")).wait() == Pong("secret")
    assert client.socket.version() == version.replace("_", ".")
    host.sessions[0].notify(Note("back"))
    assert client.receive(5) == Note("back")


def test_over_a_unix_socket(peer, host, server_side, client_side, tmp_path):
    path = str(tmp_path / "socket")
    with peer.listen(path, host, ssl_context=server_side):
        client = peer.connect(path, ssl_context=client_side, server_hostname="localhost")
        assert client.request(Ping(1)).wait() == Pong(1)
        with pytest.raises(ValueError, match="server_hostname") as caught:
            peer.connect(path, ssl_context=client_side)
        assert path in str(caught.value)


def test_large_messages_both_ways_at_once(peer, pair):
    client, server = pair
    there, back = os.urandom(6 << 20), os.urandom(5 << 20)
    client.on_request(lambda ping: Pong(ping.value[::-1]))
    first, second = client.request(Ping(there)), server.request(Ping(back))
    assert first.wait() == Pong(there)
    assert second.wait() == Pong(back[::-1])


def test_many_small_messages(peer, host, pair):
    client, server = pair
    with client.batch():
        for number in range(3000):
            client.notify(Note(str(number)))
    promises = [client.request(Ping(number)) for number in range(500)]
    assert [promise.wait().value for promise in promises] == list(range(500))
    assert values(host.notes) == [str(number) for number in range(3000)]


@pytest.mark.parametrize("size", [0, 1, 16375, 16376, 16377, 16384, 32760, 65527, 65536, 200_000])
def test_sizes_around_those_of_records(peer, pair, size):
    client, _ = pair
    data = bytes(size)
    assert client.request(Ping(data)).wait() == Pong(data)


@pytest.mark.slow
def test_a_reader_that_is_slow_gets_every_byte(peer, host, listener, client_side):
    # The stream is full most of the time, in the middle of records, while more and more is queued behind.
    sock = raw_tls(peer, listener.address, client_side)
    tick_until(lambda: host.sessions, peer)
    (server,) = host.sessions
    sent = []
    number = 0
    while server.queued_bytes < 700_000:
        note = Note(str(number), bytes(number * 7 % 5000))
        server.notify(note)
        sent.append(note)
        number += 1
    with CpuMeter() as meter:
        peer.tick(0.2)  # waits, and does not try over and over
    assert meter.cpu < 0.1
    sock.setblocking(False)
    expected = b"".join(map(framed, sent))
    got = b""
    while len(got) < len(expected):
        try:
            got += sock.recv(3000)
        except ssl.SSLWantReadError:
            peer.tick(0.01)
        if number % 50 == 0 and number < 2000:
            note = Note(f"late {number}")
            server.notify(note)
            expected += framed(note)
        number += 1
    assert got == expected
    assert not server.queued_bytes
    sock.close()


def test_idle_sessions_cost_nothing(peer, pair):
    peer.tick()
    with CpuMeter() as meter:
        peer.tick_for(WAIT)
    assert not meter.spins


# -- certificates


def test_mutual_authentication(peer, host, mutual, certificates):
    with peer.listen(("127.0.0.1", 0), host, ssl_context=mutual) as listener:
        client = peer.connect(listener.address, ssl_context=client_context(certificates, own="client"))
        assert client.request(Ping(1)).wait() == Pong(1)
        subject = socket_of(host.sessions[0]).getpeercert()["subject"]
        assert subject == ((("commonName", "client"),),)


@pytest.mark.parametrize("own", [None, "other"])
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_client_that_cannot_show_who_it_is(peer, host, mutual, certificates, own, version):
    context = client_context(certificates, own=own)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with peer.listen(("127.0.0.1", 0), host, ssl_context=mutual) as listener:
        if version == "TLSv1_2":
            with pytest.raises(ssl.SSLError, match="alert|ALERT") as caught:
                peer.connect(listener.address, ssl_context=context)
            assert str(listener.address) in str(caught.value)
        else:  # the handshake is over for the client before the server has looked at what it shows
            client = peer.connect(listener.address, ssl_context=context)
            assert "alert" in end_text(client, peer).lower()
        assert host.sessions == []


def test_server_that_is_not_trusted(peer, host, listener, certificates):
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        peer.connect(listener.address, ssl_context=client_context(certificates, "other"))
    assert str(listener.address) in str(caught.value)
    assert "self" in caught.value.verify_message
    peer.tick()
    assert host.sessions == []
    assert "handshakes=0" in repr(listener)


def test_server_with_another_name(peer, host, listener, client_side):
    with pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"):
        peer.connect(listener.address, ssl_context=client_side, server_hostname="elsewhere.example")
    assert peer.connect(listener.address, ssl_context=client_side, server_hostname="localhost").is_open


def test_a_name_that_no_server_can_have(peer, host, listener, client_side):
    with pytest.raises(ValueError, match=r"cannot connect to \('127.0.0.1', \d+\): ") as caught:
        peer.connect(listener.address, ssl_context=client_side, server_hostname=".x")
    assert type(caught.value) is ValueError and peer.sessions == ()


def test_contexts_for_the_wrong_side(peer, host, server_side, client_side, tmp_path):
    path = str(tmp_path / "socket")
    with pytest.raises(ValueError, match="PROTOCOL_TLS_SERVER"):
        peer.listen(path, host, ssl_context=client_side)
    with pytest.raises(ValueError, match="PROTOCOL_TLS_CLIENT"):
        peer.connect(path, ssl_context=server_side)
    with pytest.raises(TypeError, match="ssl_context"):
        peer.listen(path, host, ssl_context=True)
    with pytest.raises(TypeError, match="ssl_context"):
        peer.connect(path, ssl_context="yes")
    assert not os.path.exists(path)


def test_with_a_context_it_may_be_any_address(peer, host, server_side):
    with peer.listen(("0.0.0.0", 0), host, ssl_context=server_side) as listener:
        assert listener.address[0] == "0.0.0.0" and listener.address[1]


@pytest.mark.slow
def test_example(certificates):
    done = subprocess.run(
        [sys.executable, "-m", "examples.sockets", certificates.server.crt, certificates.server.key],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        universal_newlines=True,
        timeout=50,
    )
    assert (done.stdout, done.returncode) == ("CLIENT 0\nCLIENT 1\nCLIENT 2\n", 0)


# -- strangers


def test_plain_text_client(peer, host, listener):
    client = peer.connect(listener.address)
    promise = client.request(Ping(1))
    with pytest.raises(StreamClosedError):
        promise.wait()
    tick_until(lambda: "handshakes=0" in repr(listener), peer)
    assert host.sessions == []


def test_tls_client_of_a_plain_text_listener(peer, host, client_side):
    with peer.listen(("127.0.0.1", 0), host) as listener:
        with pytest.raises(TimeoutError) as caught:  # the listener takes the beginning for junk and goes on listening
            peer.connect(listener.address, ssl_context=client_side, timeout=WAIT)
        assert str(listener.address) in str(caught.value)
        tick_until(lambda: host.sessions and not peer.sessions, peer)


def test_server_that_hangs_up(peer, client_side):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        pid = os.fork()
        if not pid:
            server.accept()[0].close()
            os._exit(0)
        try:
            with pytest.raises(OSError) as caught:
                peer.connect(server.getsockname(), ssl_context=client_side)
            assert str(server.getsockname()) in str(caught.value)
        finally:
            os.waitpid(pid, 0)


def half_a_handshake(address, context):
    """A client that has sent a part of its first message and then says nothing more."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    sock = raw_client(address)
    sock.sendall(hello[: len(hello) // 2])
    return sock


def test_a_handshake_that_stalls_is_dropped_in_time(peer, host, listener, client_side):
    clock = set_clock(peer, ShiftedClock())
    socks = [half_a_handshake(listener.address, client_side), raw_client(listener.address)]
    tick_until(lambda: "handshakes=2" in repr(listener), peer)
    assert 0 < peer.next_deadline() <= 20
    with CpuMeter() as meter:
        for _ in range(20):
            peer.tick(0)
    assert meter.real < 10
    # Others are not kept waiting.
    client = peer.connect(listener.address, ssl_context=client_side)
    assert client.request(Ping(1)).wait() == Pong(1)
    clock.shift += 19
    peer.tick(0)
    assert "handshakes=2" in repr(listener)
    clock.shift += 2
    peer.tick(0)
    assert "handshakes=0" in repr(listener)
    assert peer.next_deadline() is None
    for sock in socks:
        sock.settimeout(20)
        try:
            assert sock.recv(100) == b""
        except ConnectionResetError:
            pass
        sock.close()
    assert len(host.sessions) == 1


@pytest.mark.slow
def test_the_end_of_a_handshake_is_noticed_while_waiting(server_side, host):
    # The tick is not told by any descriptor that the time is over.
    with IpcPeer(timeout=0.1) as peer, peer.listen(("127.0.0.1", 0), host, ssl_context=server_side) as listener:
        with raw_client(listener.address) as sock:
            start = time.monotonic()
            tick_until(lambda: "handshakes=1" in repr(listener), peer)
            with CpuMeter() as meter:
                peer.tick_for(0.2)
            assert "handshakes=0" in repr(listener)
            assert meter.cpu < 0.1
            assert time.monotonic() - start >= 0.1
            assert sock.recv(1) == b""


def test_peer_without_a_timeout_has_one_for_strangers(server_side, host):
    with IpcPeer(timeout=None) as peer, peer.listen(("127.0.0.1", 0), host, ssl_context=server_side) as listener:
        with raw_client(listener.address):
            tick_until(lambda: "handshakes=1" in repr(listener), peer)
            assert 0 < peer.next_deadline() <= 30


def test_each_handshake_has_the_timeout_that_the_peer_had_then(peer, listener):
    clock = set_clock(peer, ShiftedClock())
    with raw_client(listener.address):
        tick_until(lambda: "handshakes=1" in repr(listener), peer)
        peer.timeout = 5
        with raw_client(listener.address) as sock:
            tick_until(lambda: "handshakes=2" in repr(listener), peer)
            assert 0 < peer.next_deadline() <= 5
            clock.shift += 6
            peer.tick(0)
            assert "handshakes=1" in repr(listener)
            assert sock.recv(1) == b""


def test_an_interruption_while_a_handshake_is_dropped_is_not_lost(peer, listener):
    class InAbandon(InterruptAt):
        def can_come(self):
            return True  # in a program with several threads another one may get the signal

        def is_place(self, frame, event):
            return event == "call" and frame.f_code.co_name == "abandon"

    with raw_client(listener.address) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")  # and is still there, so the end lingers
        with InAbandon(1, Interruption()) as interrupt:
            with pytest.raises(Interruption):
                tick_until(lambda: interrupt.hit, peer)
        peer.tick(0)
        tick_until(lambda: "handshakes=0" in repr(listener), peer)


@pytest.mark.slow
def test_a_crowd_that_stalls(peer, host, listener, client_side):
    clock = set_clock(peer, ShiftedClock())
    crowd = [raw_client(listener.address) for _ in range(300)]
    tick_until(lambda: "handshakes=256" in repr(listener), peer)
    for _ in range(5):
        peer.tick(0)
    assert "handshakes=256" in repr(listener)
    with CpuMeter() as meter:
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            peer.tick(0.05)
    assert meter.cpu < 0.15
    # Once the oldest have had some time, they make room for others.
    clock.shift += 2.5
    peer.connect(listener.address, ssl_context=client_side).close()
    tick_until(lambda: host.sessions, peer)
    for sock in crowd:
        sock.close()
    tick_until(lambda: "handshakes=0" in repr(listener), peer)


def test_connection_that_gets_no_session_is_closed(peer, listener, client_side):
    peer.serializer = None  # so that no session can be made
    with socket.create_connection(listener.address) as plain:
        plain.settimeout(0)
        with client_side.wrap_socket(plain, server_hostname="localhost", do_handshake_on_connect=False) as sock:
            with pytest.raises(TypeError, match="serializer") as caught:
                while True:
                    try:
                        sock.do_handshake()
                    except ssl.SSLWantReadError:
                        pass
                    peer.tick(0.01)
            sock.settimeout(10)
            assert sock.recv(1) == b""
        assert caught.value.__traceback__ is not None  # whose frames still know the socket


def test_closing_drops_handshakes(peer, host, listener, client_side):
    sock = half_a_handshake(listener.address, client_side)
    tick_until(lambda: "handshakes=1" in repr(listener), peer)
    listener.close()
    sock.settimeout(20)
    try:
        assert sock.recv(1) == b""
    except ConnectionResetError:
        pass
    sock.close()


def test_handshakes_at_the_same_time(peer, host, listener, certificates):
    count = 60
    socks = []
    for _ in range(count):
        sock = client_context(certificates).wrap_socket(
            raw_client(listener.address), server_hostname="localhost", do_handshake_on_connect=False
        )
        sock.setblocking(False)
        socks.append(sock)
    waiting = list(socks)
    while waiting:
        peer.tick(0)
        for sock in tuple(waiting):
            try:
                sock.do_handshake()
                waiting.remove(sock)
            except ssl.SSLWantReadError:
                pass
    tick_until(lambda: len(host.sessions) == count, peer)
    for sock in socks:
        sock.close()


# -- the end


def test_clean_end(peer, pair):
    client, server = pair
    fd = client.transport.read_fds()[0]
    assert repr(client.transport).startswith("<StreamTransport to ")
    assert repr(client.transport).endswith(f" TLS fd {fd} open queued=0>")
    server.close()
    assert closed_text(client, peer) == "the other side closed the stream"
    assert repr(client.transport).endswith(f" TLS fd {fd} closed queued=0>")


def closed_text(session, peer):
    tick_until(lambda: not session.is_open, peer)
    with pytest.raises(StreamClosedError) as caught:
        session.notify(Note())
    return str(caught.value).replace("the session is closed: ", "").replace(f" ({session.name})", "")


@pytest.mark.parametrize("clean", [True, False])
def test_both_kinds_of_end(peer, host, listener, client_side, clean):
    sock = raw_tls(peer, listener.address, client_side)
    sock.sendall(framed(Note("last words")))
    if clean:
        sock.settimeout(0)
        with pytest.raises(ssl.SSLWantReadError):
            sock.unwrap()
    sock.close()
    tick_until(lambda: host.notes, peer)
    text = closed_text(host.sessions[0], peer)
    if clean:
        assert text == "the other side closed the stream"
    else:
        assert "connection was lost" in text and "close_notify" in text


def test_a_read_that_could_not_answer_the_end(peer, host, listener, client_side, monkeypatch):
    # As OpenSSL 3.6 has it: it answers an end without close_notify, in vain.
    sock = raw_tls(peer, listener.address, client_side)
    sock.sendall(framed(Note("last words")))
    tick_until(lambda: host.notes, peer)
    receive = ssl.SSLSocket.recv

    def recv(self, *args):
        try:
            return receive(self, *args)
        except ssl.SSLWantReadError:
            raise
        except OSError as exc:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe") from exc

    monkeypatch.setattr(ssl.SSLSocket, "recv", recv)
    sock.close()
    text = closed_text(host.sessions[0], peer)
    assert "connection was lost" in text and "close_notify" in text


def test_end_inside_a_message(peer, host, listener, client_side):
    sock = raw_tls(peer, listener.address, client_side)
    sock.sendall(framed(Note("x" * 1000))[:500])
    sock.close()
    tick_until(lambda: host.sessions, peer)
    assert "492 of" in closed_text(host.sessions[0], peer)


def test_reset(peer, host, listener, client_side):
    sock = raw_tls(peer, listener.address, client_side)
    tick_until(lambda: host.sessions, peer)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    assert "connection was lost" in closed_text(host.sessions[0], peer)  # Python 3.11 takes it for an end of file


def test_bytes_that_are_no_tls(peer, host, listener, client_side):
    sock = raw_tls(peer, listener.address, client_side)
    tick_until(lambda: host.sessions, peer)
    os.write(sock.fileno(), framed(Note("in the clear")))
    assert "connection was lost" in closed_text(host.sessions[0], peer)
    assert host.notes == []
    sock.close()


def test_close_says_goodbye_and_what_was_sent_arrives(peer, host, listener, client_side):
    sock = raw_tls(peer, listener.address, client_side, suppress_ragged_eofs=False)
    tick_until(lambda: host.sessions, peer)
    note = Note("x" * 300_000)
    host.sessions[0].notify(note)
    host.sessions[0].close()
    got = b""
    while True:
        piece = sock.recv(100_000)
        if not piece:  # a clean end; the other kind would raise
            break
        got += piece
    assert got == framed(note)
    sock.close()


@pytest.mark.parametrize("number", range(10))
def test_client_that_sends_and_closes_at_once(peer, host, listener, client_side, number):
    # What the server says on its own after the handshake lies unread in the client's socket.
    with peer.connect(listener.address, ssl_context=client_side) as client:
        client.notify(Note(str(number)))
    tick_until(lambda: host.notes, peer)
    assert host.notes == [Note(str(number))]
    assert closed_text(host.sessions[0], peer) == "the other side closed the stream"


def test_socket_that_its_owner_closed(peer, pair):
    client, _ = pair
    errors = []

    @client.on_exception
    def note(error):
        errors.append(error)

    socket_of(client).close()
    tick_until(lambda: not client.is_open, peer)
    assert "was closed while a session was using it" in str(errors[0])


# -- sockets that were connected elsewhere


def test_create_socket_session_with_an_ssl_socket(peer, host, listener, client_side):
    sock = raw_tls(peer, listener.address, client_side)
    sock.settimeout(7)
    session = peer.create_socket_session(sock)
    assert session.request(Ping(1)).wait() == Pong(1)
    peer.remove_session(session)
    assert sock.gettimeout() == 7 and sock.suppress_ragged_eofs
    sock.sendall(framed(Note("by hand")))
    tick_until(lambda: host.notes, peer)
    sock.close()


def test_data_that_the_ssl_layer_holds_is_not_waited_for(peer, host, listener, client_side):
    sock = raw_tls(peer, listener.address, client_side)
    tick_until(lambda: host.sessions, peer)
    (server,) = host.sessions
    with server.batch():
        server.notify(Note("first"))
        server.notify(Note("second"))
    first = framed(Note("first"))
    assert sock.recv(len(first)) == first
    assert sock.pending()
    assert not select.select([sock], [], [], 0)[0] or sock.version() == "TLSv1.3"
    session = peer.create_socket_session(sock)
    assert session.receive(5) == Note("second")


def test_handshake_that_was_not_made_yet(peer, host, listener, client_side):
    sock = client_side.wrap_socket(
        raw_client(listener.address), server_hostname="localhost", do_handshake_on_connect=False
    )
    session = peer.create_socket_session(sock)
    assert session.request(Ping(1)).wait() == Pong(1)


@pytest.mark.parametrize("how", ["receive", "embedded"])
def test_a_client_that_has_nothing_to_say_begins_the_handshake(peer, client_side, server_side, how):
    ours, theirs = socket.socketpair()
    sock = client_side.wrap_socket(ours, server_hostname="localhost", do_handshake_on_connect=False)
    session = peer.create_socket_session(sock)
    if how == "embedded":
        assert peer.next_deadline() == 0.0
        peer.tick(0)
        assert peer.next_deadline() is None
        assert theirs.recv(1, socket.MSG_PEEK) == b"\x16"  # a handshake record
    with IpcPeer() as other:
        server = server_side.wrap_socket(theirs, server_side=True, do_handshake_on_connect=False)
        other.create_socket_session(server).notify(Note("welcome"))
        received = []
        session.on_message(received.append)

        def both():
            other.tick(0)
            return received

        tick_until(both, peer)
        assert received == [Note("welcome")]


def test_other_ways_refuse_an_ssl_socket(peer, listener, client_side):
    sock = raw_tls(peer, listener.address, client_side)
    with pytest.raises(ValueError, match="create_socket_session"):
        peer.create_stream_session(sock, sock)
    sock.close()


def test_a_read_that_has_to_write(peer, server_side, client_side, certificates):
    """The server asks for a certificate while there is no room to send it."""
    server_side.verify_mode = ssl.CERT_REQUIRED
    server_side.load_verify_locations(certificates.client.crt)
    server_side.post_handshake_auth = True
    client_side.load_cert_chain(certificates.client.crt, certificates.client.key)
    client_side.post_handshake_auth = True
    a, b = socket.socketpair()
    client = client_side.wrap_socket(a, server_hostname="localhost", do_handshake_on_connect=False)
    server = server_side.wrap_socket(b, server_side=True, do_handshake_on_connect=False)
    for sock in (client, server):
        sock.setblocking(False)
    waiting = [client, server]
    while waiting:
        for sock in tuple(waiting):
            try:
                sock.do_handshake()
                waiting.remove(sock)
            except ssl.SSLWantReadError:
                pass
    assert not server.getpeercert()
    # Fill the stream, and leave no write unfinished: OpenSSL could not go on then.
    filled = 0
    try:
        while True:
            filled += client.send(b"x")
    except ssl.SSLWantWriteError:
        pass
    got = 0
    while True:
        got += len(server.recv(1))
        try:
            filled += client.send(b"x")
            break
        except ssl.SSLWantWriteError:
            pass
    session = peer.create_socket_session(client)
    server.verify_client_post_handshake()
    server.do_handshake()
    tick_until(lambda: wants_write(session), peer)
    with CpuMeter() as meter:
        peer.tick_for(WAIT)
    assert not meter.spins
    assert not session.queued_bytes
    while got < filled:
        assert set(server.recv(1)) == {ord("x")}
        got += 1
        if got % 50 == 0:
            peer.tick(0)
    session.notify(Note("here"))
    peer.tick(0.01)
    assert server.recv(1000) == framed(Note("here"))
    assert server.getpeercert()["subject"] == ((("commonName", "client"),),)
    assert not wants_write(session)
    server.sendall(framed(Note("thanks")))
    assert session.receive(5) == Note("thanks")
    server.close()


# -- interruptions


def test_interruptions_lose_and_double_nothing(peer, host, pair):
    client, server = pair
    count = 400
    back = []
    client.on_message(back.append)
    data = os.urandom(40_000)

    frames = {client: frames_of(client), server: frames_of(server)}

    def send(session):
        number = frames[session].count([])  # whether an interrupted notify() has sent its message is for this to say
        if number < count:
            session.notify(Note(str(number), data[: 1 + number * 97]))

    end = time.monotonic() + 40
    with Alarms(raises=True) as alarms:
        while len(host.notes) < count or len(back) < count:
            assert time.monotonic() < end, (len(host.notes), len(back))
            alarms.call(lambda: send(client))
            alarms.call(lambda: send(server))
            alarms.call(lambda: peer.tick(0))
    for notes in (host.notes, back):
        assert [int(note.text) for note in notes] == list(range(count))
        assert all(note.data == data[: 1 + int(note.text) * 97] for note in notes)


def test_interrupted_handshakes(peer, host, listener, client_side):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a socket that was dropped before anybody had it closes itself
        done = 0
        with Alarms(raises=True) as alarms:
            for _ in range(100):
                whole, session = alarms.call(lambda: peer.connect(listener.address, ssl_context=client_side))
                if whole:
                    done += 1
                    session.close()
        gc.collect()
        tick_until(lambda: len(host.sessions) >= done and not peer.sessions and "=0" in repr(listener), peer)


# -- what only a busy or a rude other side brings about


def test_a_write_that_has_to_wait_for_a_read(peer, pair):
    client, server = pair

    class Waits:
        """The socket, as it is while it updates its keys."""

        def __init__(self, sock):
            self.sock = sock

        def __getattr__(self, name):
            return getattr(self.sock, name)

        def send(self, data):
            raise ssl.SSLWantReadError

    transport, sock = client.transport, socket_of(client)
    replace_socket(client, Waits(sock))
    client.notify(Note("x"))
    assert client.queued_bytes and transport.wants_write and transport.write_fd is None  # it would be ready for ever
    with CpuMeter() as meter:
        peer.tick(WAIT)
    assert not meter.spins
    replace_socket(client, sock)
    server.notify(Note("whatever"))
    notes = []
    server.on_message(notes.append)
    tick_until(lambda: notes, peer)
    assert notes == [Note("x")] and not client.queued_bytes


def test_closing_over_something_unread_resets_nothing(peer, pair):
    # A reset would overtake what was sent last.
    client, server = pair
    notes = []
    server.on_message(notes.append)
    server.notify(Note("unread"))
    for number in range(100):
        client.notify(Note(number, bytes(10_000)))
    client.flush(10)
    server.notify(Note("unread"))
    client.close()
    server.notify(Note("comes too late"))
    tick_until(lambda: not server.is_open, peer)
    assert [note.text for note in notes] == list(range(100))


def test_handshakes_have_their_turns(peer, host, listener, monkeypatch):
    steps = []

    def handshake(sock):
        steps.append(sock)
        return select.POLLIN  # never enough

    patch_handshake(monkeypatch, handshake)
    clients = [raw_client(listener.address) for _ in range(40)]
    try:
        for client in clients:
            client.sendall(b"hello")
        tick_until(lambda: "handshakes=40" in repr(listener), peer)
        steps.clear()
        for _ in range(4):
            before = len(steps)
            peer.tick()
            assert len(steps) - before <= 16  # a tick is not for handshakes only
        assert len(set(steps)) == 40  # the first ones do not keep the others waiting
    finally:
        for client in clients:
            client.close()


def test_a_server_that_does_not_speak_tls_is_named_so(peer: IpcPeer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(TimeoutError, match="the TLS handshake with .* does the other side speak TLS"):
            peer.connect(server.getsockname(), ssl_context=ssl.create_default_context(), timeout=0.05)


@pytest.mark.slow
def test_handshakes_whose_bytes_were_there_in_time(peer, host, listener, client_side, monkeypatch):
    # More of them than one turn goes on with, and this process was kept from reading what they had sent.
    clock = set_clock(peer, ShiftedClock())
    socks = []
    for _ in range(40):
        raw = raw_client(listener.address)
        socks.append(client_side.wrap_socket(raw, server_hostname="localhost", do_handshake_on_connect=False))
        socks[-1].setblocking(False)
    silent = raw_client(listener.address)

    def go_on(sock):
        try:
            sock.do_handshake()
            return True
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False

    waiting = list(socks)
    for _ in range(3):
        waiting = [sock for sock in waiting if not go_on(sock)]
        if len(waiting) == len(socks):
            tick_until(lambda: "handshakes=41" in repr(listener), peer)
            for _ in range(20):
                peer.tick(0.01)  # the first answer of each
    assert not waiting, "the clients have sent everything"
    before = len(host.sessions)
    under_way = handshakes_of(listener)
    while len(select.select(under_way, [], [], PATIENCE)[0]) < len(socks):
        pass  # a busy system delivers late
    clock.shift += 1000
    tick_until(lambda: "handshakes=0" in repr(listener), peer)
    assert len(host.sessions) == len(socks), before
    for sock in (*socks, silent):
        sock.close()
