"""A server and three clients, over a Unix socket; over TLS with a certificate for localhost and its key as arguments.

python3 -m examples.sockets [CERTIFICATE KEY]
"""

import json
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

from examples.messages import TaskRequest, TaskResponse
from stream_ipc import IpcPeer, Session


def on_session(session: Session) -> None:
    """A client has connected: called before anything that he has sent is looked at."""

    @session.on_request
    def work(request: TaskRequest) -> TaskResponse:
        return TaskResponse(request.job.upper())


def serve(address: Any, certificate: str, key: str) -> None:
    context: Optional[ssl.SSLContext] = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
    with IpcPeer() as peer, peer.listen(address, on_session, ssl_context=context) as listener:
        run_clients(peer, listener.address, certificate)


def run_clients(peer: IpcPeer, address: Any, certificate: str) -> None:
    command = [sys.executable, "-m", "examples.sockets", "client", json.dumps(address), certificate]
    clients = [subprocess.Popen([*command, f"client {n}"], stdout=subprocess.PIPE, text=True) for n in range(3)]
    for client in clients:
        while client.poll() is None:
            peer.tick(0.05)
        print(client.communicate()[0], end="")


def ask(address: Any, certificate: str, job: str) -> None:
    context = ssl.create_default_context(cafile=certificate) if certificate else None
    with IpcPeer() as peer:
        session = peer.connect(address, ssl_context=context, timeout=10)
        print(session.request(TaskRequest(job), expect=TaskResponse).wait().result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        ask(json.loads(sys.argv[2]), *sys.argv[3:])
    elif len(sys.argv) == 3:
        serve(("localhost", 0), *sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:  # where only this user gets in
            serve(str(Path(folder) / "socket"), "", "")
