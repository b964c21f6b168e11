"""A program with a loop of its own: it works at a steady rate, and messages are seen to in the rest of the time."""

import sys
import time

from examples.messages import Progress, TaskRequest, TaskResponse
from stream_ipc import IpcPeer, Session

PERIOD = 0.01  # seconds


def program() -> None:
    with IpcPeer() as peer:
        session = peer.create_command_session([sys.executable, "-m", "examples.own_loop", "worker"])

        @session.on_message
        def show(progress: Progress) -> None:
            print(f"The worker has done {progress.done} of {progress.total}")

        promise = session.request(TaskRequest("something long"), expect=TaskResponse)
        frames = 0
        next_frame = time.monotonic()
        while not promise.done:
            frames += 1  # the program's own work is here
            next_frame += PERIOD
            peer.tick_for(max(0.0, next_frame - time.monotonic()))
        print("The worker's result:", promise.wait().result)
        print(f"The program's own work was done {frames} times meanwhile")


def worker() -> None:
    session = IpcPeer().create_stdio_session()

    @session.on_request
    def work(request: TaskRequest, session: Session) -> TaskResponse:
        for step in range(1, 6):
            time.sleep(0.05)  # stands for the work
            session.notify(Progress(step, 5))
        return TaskResponse(f"{request.job} is done")

    while session.is_open:
        session.tick(None)


if __name__ == "__main__":
    worker() if "worker" in sys.argv else program()
