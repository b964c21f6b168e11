"""When a message is too large for the memory that is left, whoever waits for something learns it at once."""

import subprocess
import sys

import pytest

from tests.os_helpers import program

# The payload is there, its objects do not fit: the limit is set once all but the end has arrived.
DECODE = """
    import resource, socket
    from tests.helpers import MAGIC, frame

    class Ids:
        def generate(self):
            return "17.4"

    serializers = {"json": JsonMessageSerializer, "php": PhpMessageSerializer, "pickle": PickleMessageSerializer}
    serializer = serializers[sys.argv[1]]()
    is_reply = sys.argv[2] == "reply"
    texts = [f"text {number}" for number in range(600_000)]
    envelope = ResponseEnvelope("17.4", Pong(texts)) if is_reply else RequestEnvelope("17.4", Ping(texts))
    data = frame(serializer.serialize(envelope))
    del envelope, texts
    ours, other = socket.socketpair()
    other.setblocking(False)
    with IpcPeer(serializer, Ids(), timeout=600) as peer, other:
        session = peer.create_socket_session(ours)
        session.on_request(lambda ping: Pong("it fits"))
        promise = session.request(Ping("go"), expect=Pong) if is_reply else None
        other.setblocking(True)
        other.recv(1000) if is_reply else None
        other.setblocking(False)
        at = 0
        while at < len(data) - 1:
            at += other.send(data[at : min(at + 60_000, len(data) - 1)])
            peer.tick()
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]) * len(data) // 4, resource.RLIM_INFINITY))
        other.send(data[-1:])
        peer.tick(20)
        if is_reply:
            try:
                promise.wait(0)
                print("it fits")
            except SerializationError as error:
                print(type(error.__cause__).__name__)
        else:
            answer = other.recv(10_000)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            envelope = serializer.deserialize(answer[8:])
            assert envelope.id == "17.4"
            print(envelope.response)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert session.is_open
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of address space")
@pytest.mark.matrix
@pytest.mark.parametrize("what", ["request", "reply"])
@pytest.mark.parametrize("format", ["json", "php", "pickle"])
@pytest.mark.parametrize("quarters", [2, 5, 9])
def test_whoever_waits_is_told_at_once(format: str, what: str, quarters: int) -> None:
    done = subprocess.run(program(DECODE, format, what, quarters), capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "MemoryError" in done.stdout or "not enough memory" in done.stdout, done.stdout
