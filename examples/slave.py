"""A slave: it is started by ``examples.master`` and talks to it over stdin and stdout."""

import sys

from examples.messages import TaskRequest, TaskResponse
from stream_ipc import IpcPeer, LogMessage

session = IpcPeer().create_stdio_session()


@session.on_request
def work(request: TaskRequest) -> TaskResponse:
    return TaskResponse(request.job.upper())


@session.on_message
def log(message: LogMessage) -> None:
    if message.message == "shutdown":
        sys.exit(0)
    print(message.message)  # to stderr: stdout belongs to the messages


while True:
    session.tick(None)
