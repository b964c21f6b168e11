"""A master that gives three slaves a task each and tells them to shut down (examples/master.py)."""

import sys

from examples.messages import TaskRequest, TaskResponse
from stream_ipc import IpcPeer, LogMessage

with IpcPeer() as peer:  # leaving it waits for the slaves to end
    slaves = [peer.create_command_session([sys.executable, "-m", "examples.slave"]) for _ in range(3)]
    for n, slave in enumerate(slaves):
        response = slave.request(TaskRequest(f"Task #{n}"), expect=TaskResponse).wait()
        print(f"Slave {n} replied with: {response.result}")
        slave.notify(LogMessage(f"Slave {n} finished"))
    peer.broadcast(LogMessage("shutdown"))

print("Exit statuses:", [slave.process.returncode for slave in slaves if slave.process])
