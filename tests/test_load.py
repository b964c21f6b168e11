"""Many clients at once, some of which die; many connections one after the other.

Short here. ``STREAM_IPC_LOAD=1`` makes it 1000 clients and 5000 connections, which takes a minute or two; ``-s`` shows
the figures.
"""

import gc
import json
import os
import random
import shutil
import signal
import ssl
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from stream_ipc import IpcPeer
from tests.conftest import open_descriptors
from tests.helpers import nothing_is_torn_down, seeds, tick_until
from tests.messages import Note, Ping, Pong

LONG = bool(os.environ.get("STREAM_IPC_LOAD"))
PATIENCE = 500.0 if LONG else 50.0

pytestmark = pytest.mark.timeout(600 if LONG else 60)


def show(**figures):
    print(", ".join(f"{name} {value}" for name, value in figures.items()))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    paths = SimpleNamespace(crt=str(folder / "crt"), key=str(folder / "key"))
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-newkey", "rsa:2048", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-out", paths.crt, "-keyout", paths.key]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    return paths


def server_context(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.crt, certificate.key)
    return context


@pytest.fixture
def kind(request, tmp_path):
    """An address and a context for listening, and what clients trust."""
    if request.param == "unix":
        return SimpleNamespace(address=str(tmp_path / "socket"), context=None, trusted="")
    if request.param == "tcp":
        return SimpleNamespace(address=("127.0.0.1", 0), context=None, trusted="")
    certificate = request.getfixturevalue("certificate")
    return SimpleNamespace(address=("127.0.0.1", 0), context=server_context(certificate), trusted=certificate.crt)


def enough_descriptors(count):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            pytest.skip(f"it takes {count} descriptors, and the limit is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


class Server:
    """Serves whoever connects, and remembers what each client has had."""

    def __init__(self):
        self.served = {}  # name of a client: how many requests
        self.names = {}
        self.total = 0

    def __call__(self, session):
        @session.on_message
        def meet(note: Note):
            self.names[session] = note.text
            self.served[note.text] = 0

        @session.on_request
        def serve(ping: Ping):
            number, data = ping.value
            name = self.names[session]
            assert number == self.served[name], "one was lost, or came twice, or too early"
            self.served[name] += 1
            self.total += 1
            return Pong((number, data))


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "clients", "requests"),
    [("unix", 1000, 40), ("tcp", 1000, 40), ("tls", 1000, 20)] if LONG else [("unix", 100, 20), ("tls", 40, 10)],
    indirect=["kind"],
)
@pytest.mark.slow
def test_many_clients_of_which_some_die(kind, clients, requests):
    processes = 20 if LONG else 10
    each = clients // processes
    enough_descriptors(clients + 200)
    gc.collect()
    before = open_descriptors()
    (seed,) = seeds(1)
    chance = random.Random(seed)
    server = Server()
    with IpcPeer(timeout=120) as peer, peer.listen(kind.address, server, ssl_context=kind.context) as listener:
        begin = time.perf_counter()
        victims = set(range(processes // 10))  # a tenth of the processes, and so of the clients
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.load_child", json.dumps(listener.address), kind.trusted, str(each)]
                + [str(10**9 if number in victims else requests), str(number)],
                stdout=subprocess.PIPE,
            )
            for number in range(processes)
        ]
        try:
            tick_until(lambda: len(server.served) == clients, peer, seconds=PATIENCE)
            connected = time.perf_counter() - begin
            assert len(peer.sessions) == clients
            assert peer.broadcast(Note("go")) == clients
            begin = time.perf_counter()
            expected = (clients - len(victims) * each) * requests
            for number in victims:  # in the middle of it, at any moment
                goal = chance.randrange(expected // 10, expected // 2)
                tick_until(lambda: server.total >= goal, peer, seconds=PATIENCE)  # noqa: B023 - called at once
                os.kill(children[number].pid, signal.SIGKILL)
            tick_until(lambda: not peer.sessions, peer, seconds=PATIENCE)
            serving = time.perf_counter() - begin
            outputs = [child.communicate(timeout=PATIENCE)[0] for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
                child.stdout.close()
    times = []
    for number, (child, output) in enumerate(zip(children, outputs)):
        if number in victims:
            assert child.returncode == -signal.SIGKILL
            continue
        assert child.returncode == 0
        times += json.loads(output)["times"]
        for client in range(each):
            assert server.served[f"{number}/{client}"] == requests
    times.sort()
    show(
        clients=clients,
        killed=len(victims) * each,
        requests=server.total,
        per_second=int(server.total / serving),
        connected_after=f"{connected:.1f} s",
        median=f"{times[len(times) // 2] * 1000:.1f} ms",
        slowest=f"{times[-1] * 1000:.0f} ms",
    )
    gc.collect()
    assert open_descriptors() == before


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["unix", "tcp", "tls"], indirect=True)
def test_connections_one_after_the_other(kind):
    count = 5000 if LONG else 200
    client_context = None
    if kind.trusted:
        client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client_context.load_verify_locations(kind.trusted)
    handed = []

    def on_session(session):
        handed.append(None)
        session.on_request(lambda ping: Pong(ping.value))

    def once(peer, listener, number):
        name = "localhost" if client_context else None
        with peer.connect(listener.address, ssl_context=client_context, server_hostname=name) as client:
            if number % 3 == 0:  # some say nothing before they go
                assert client.request(Ping(number)).wait() == Pong(number)

    with IpcPeer(timeout=60) as peer, peer.listen(kind.address, on_session, ssl_context=kind.context) as listener:
        for number in range(20):
            once(peer, listener, number)
        tick_until(lambda: not peer.sessions and nothing_is_torn_down(peer), peer)
        gc.collect()
        descriptors, objects = open_descriptors(), len(gc.get_objects())
        begin = time.perf_counter()
        for number in range(count):
            once(peer, listener, number)
        tick_until(lambda: len(handed) == count + 20 and not peer.sessions and nothing_is_torn_down(peer), peer)
        took = time.perf_counter() - begin
        gc.collect()
        assert open_descriptors() == descriptors
        growth = len(gc.get_objects()) - objects
        assert growth < 50
        show(connections=count, microseconds_each=int(took / count * 1e6), growth_in_objects=growth)
