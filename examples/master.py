"""A master that starts three slaves, gives each a task and tells them to shut down."""

import sys

from examples.messages import TaskRequest, TaskResponse
from stream_ipc import IpcPeer, LogMessage


def main() -> None:
    with IpcPeer() as peer:
        sessions = [peer.create_command_session([sys.executable, "-m", "examples.slave"]) for _ in range(3)]

        for index, session in enumerate(sessions):
            response = session.request(TaskRequest(f"Task #{index}"), expect=TaskResponse).wait()
            print(f"Slave {index} replied with: {response.result}")
            session.notify(LogMessage(f"Slave {index} finished"))

        peer.broadcast(LogMessage("shutdown"))
        for index, session in enumerate(sessions):
            assert session.process is not None
            print(f"Slave {index} exited with status {session.process.wait(10)}")


if __name__ == "__main__":
    main()
