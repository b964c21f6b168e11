"""A worker that reports its progress while it works on a request."""

import sys

from examples.messages import Progress, TaskRequest, TaskResponse
from stream_ipc import IpcPeer, Session


def parent() -> None:
    with IpcPeer() as peer:
        session = peer.create_command_session([sys.executable, "-m", "examples.progress", "worker"])

        @session.on_message
        def show(progress: Progress) -> None:
            print(f"{progress.done} of {progress.total} words done")

        promise = session.request(TaskRequest("make all these words longer"), expect=TaskResponse)
        print("Result:", promise.wait().result)  # show() runs meanwhile, always before the result is there


def worker() -> None:
    session = IpcPeer().create_stdio_session()

    @session.on_request
    def work(request: TaskRequest, session: Session) -> TaskResponse:
        words = request.job.split()
        for index, word in enumerate(words):
            words[index] = word + word[-1] * 2
            session.notify(Progress(index + 1, len(words)))  # leaves at once
        return TaskResponse(" ".join(words))

    while session.is_open:
        session.tick(None)


if __name__ == "__main__":
    worker() if "worker" in sys.argv else parent()
