"""Several workers in parallel: results come as they are ready, and who is ready gets the next job."""

import sys
from typing import Dict, Tuple

from examples.messages import PrimesRequest, PrimesResponse
from stream_ipc import IpcPeer, ResponsePromise, Session, as_completed

COMMAND = [sys.executable, "-m", "examples.workers", "worker"]


def parent() -> None:
    jobs = [10_000, 20_000, 30_000, 40_000, 50_000, 60_000]
    running: Dict[ResponsePromise[PrimesResponse], Tuple[int, Session]] = {}
    with IpcPeer() as peer:
        idle = [peer.create_command_session(COMMAND) for _ in range(3)]
        while jobs or running:
            while jobs and idle:
                below, worker = jobs.pop(), idle.pop()
                running[worker.request(PrimesRequest(below), expect=PrimesResponse)] = below, worker
            promise = next(as_completed(running))  # the first that is ready
            below, worker = running.pop(promise)
            print(f"{promise.wait().count} primes are below {below}")
            idle.append(worker)


def work(request: PrimesRequest) -> PrimesResponse:
    sieve = bytearray([1]) * request.below
    sieve[:2] = b"\0\0"
    for number in range(2, request.below):
        if sieve[number]:
            for multiple in range(2 * number, request.below, number):
                sieve[multiple] = 0
    return PrimesResponse(sum(sieve))


def worker() -> None:
    session = IpcPeer().create_stdio_session()
    session.on_request(work)
    while session.is_open:
        session.tick(None)


if __name__ == "__main__":
    worker() if "worker" in sys.argv else parent()
