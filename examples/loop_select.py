"""A loop of one's own that waits for descriptors: another program's lines become requests to a worker."""

import select
import subprocess
import sys
import time
from typing import List

from examples.messages import TaskRequest, TaskResponse
from stream_ipc import IpcPeer, RequestTimeoutError, ResponsePromise

LINES = "for word in bread butter slow jam; do echo $word; done"


def program() -> None:
    pending: List[ResponsePromise[TaskResponse]] = []
    with IpcPeer() as peer, subprocess.Popen(["sh", "-c", LINES], stdout=subprocess.PIPE, bufsize=0) as other:
        worker = peer.create_command_session([sys.executable, "-m", "examples.loop_select", "worker"])
        assert other.stdout is not None
        wanted = [peer.fileno(), other.stdout.fileno()]
        rest = b""
        while pending or len(wanted) > 1:
            # Whatever comes first: a descriptor of ours, one of the peer's, or what the peer has to do by time.
            ready = select.select(wanted, [], [], peer.next_deadline())[0]
            if other.stdout.fileno() in ready:
                data = other.stdout.read(1000)
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    timeout = 0.2 if line == b"slow" else 30
                    pending.append(worker.request(TaskRequest(line.decode()), timeout, expect=TaskResponse))
                if not data:
                    wanted.pop()
            peer.tick(0)  # also if nothing is ready: then a deadline is
            for promise in [promise for promise in pending if promise.done]:
                pending.remove(promise)
                try:
                    print(promise.wait().result)
                except RequestTimeoutError as error:
                    print(f"{type(error).__name__} after {error.timeout} s")


def worker() -> None:
    session = IpcPeer().create_stdio_session()

    @session.on_request
    def work(request: TaskRequest) -> TaskResponse:
        if request.job == "slow":
            time.sleep(1)  # stands for the work
        return TaskResponse(request.job.upper())

    while session.is_open:
        session.tick(None)


if __name__ == "__main__":
    worker() if "worker" in sys.argv else program()
