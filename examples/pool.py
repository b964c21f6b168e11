"""A folder tree is hashed by several workers; one of them is killed in between and replaced, and nothing is lost.

python3 -m examples.pool [FOLDER]
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List

from examples.messages import Progress
from stream_ipc import IpcPeer, Message, Session, WorkerPool

COMMAND = [sys.executable, "-m", "examples.pool", "worker"]


@dataclass
class HashRequest(Message):
    path: str


@dataclass
class HashResponse(Message):
    path: str
    digest: str


def files(folder: str) -> Iterator[HashRequest]:
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            yield HashRequest(str(path))


def parent(folder: str) -> None:
    started: List[Session] = []
    chunks = 0

    def on_session(session: Session) -> None:
        started.append(session)

        @session.on_message
        def show(progress: Progress) -> None:
            nonlocal chunks
            chunks += 1

    count = 0
    with IpcPeer() as peer, WorkerPool(peer, COMMAND, 3, on_session=on_session) as pool:
        for reply in pool.map(files(folder), expect=HashResponse):
            print(reply.digest, os.path.relpath(reply.path, folder))
            count += 1
            if count == 10:
                kill(pool.workers[0])
    print(f"{count} files were hashed by {len(started)} workers, one of which was killed; {chunks} reports of progress")


def kill(session: Session) -> None:
    assert session.process is not None
    session.process.kill()


def worker() -> None:
    session = IpcPeer().create_stdio_session()

    @session.on_request
    def work(request: HashRequest, session: Session) -> HashResponse:
        digest = hashlib.sha256()
        total = os.path.getsize(request.path)
        done = 0
        with open(request.path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                done += len(chunk)
                session.notify(Progress(done, total))
        return HashResponse(request.path, digest.hexdigest())

    while session.is_open:
        session.tick(None)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    worker() if arguments == ["worker"] else parent(arguments[0] if arguments else "examples")
