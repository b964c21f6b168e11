"""A slave, which talks to its master over stdin and stdout (examples/slave.py)."""

from examples.messages import TaskRequest, TaskResponse
from stream_ipc import IpcPeer, LogMessage

session = IpcPeer().create_stdio_session()


@session.on_request
def work(request: TaskRequest) -> TaskResponse:
    return TaskResponse(request.job.upper())


@session.on_message
def log(message: LogMessage) -> None:
    if message.message == "shutdown":
        session.close()


while session.is_open:  # also ends when the master is gone
    session.tick(None)
