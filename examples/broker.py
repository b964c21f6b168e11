"""Clients over a Unix socket, workers as children, and a broker between them that only passes requests on.

SIGTERM ends the broker cleanly.

python3 -m examples.broker
"""

import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

from examples.messages import PrimesRequest, PrimesResponse
from stream_ipc import IpcPeer, Message, ResponsePromise, Session, WorkerPool, gather

WORKER = [sys.executable, "-m", "examples.workers", "worker"]


class Broker:
    """Passes each request of a client on to a worker. Thousands may be under way; none is waited for."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.peer = IpcPeer()
        self.stopped = False

    def stop(self, number: int, frame: Any) -> None:
        self.stopped = True
        self.peer.wakeup()

    def run(self) -> None:
        with self.peer as peer, WorkerPool(peer, WORKER, 2) as pool:

            def on_session(client: Session) -> None:
                @client.on_request
                def forward(request: PrimesRequest) -> ResponsePromise[Message]:
                    return pool.submit(request)

            with peer.listen(self.address, on_session):
                print("The broker listens", flush=True)
                while not self.stopped:
                    peer.tick(None)
        print("The broker has ended", flush=True)


def client(address: str, first: int) -> None:
    with IpcPeer() as peer:
        broker = peer.connect(address)
        numbers = range(first, first + 50)
        replies = gather([broker.request(PrimesRequest(100 * n), expect=PrimesResponse) for n in numbers])
        print(f"Client {first}: {len(replies)} replies, {replies[-1].count} primes are below {100 * numbers[-1]}")


def demonstration() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "examples.broker"]
        address = os.path.join(folder, "broker")
        broker = subprocess.Popen([*command, "broker", address], stdout=subprocess.PIPE, text=True)
        assert broker.stdout is not None
        with broker:
            print(broker.stdout.readline(), end="")
            clients = [
                subprocess.Popen([*command, "client", address, str(n)], stdout=subprocess.PIPE, text=True) for n in (1, 51)
            ]
            for process in clients:
                print(process.communicate()[0], end="")
            broker.send_signal(signal.SIGTERM)
            print(broker.communicate()[0], end="")
    print("Exit status of the broker:", broker.returncode)


def main() -> None:
    if len(sys.argv) == 1:
        demonstration()
    elif sys.argv[1] == "client":
        client(sys.argv[2], int(sys.argv[3]))
    else:
        broker = Broker(sys.argv[2])
        signal.signal(signal.SIGTERM, broker.stop)
        broker.run()


if __name__ == "__main__":
    main()
