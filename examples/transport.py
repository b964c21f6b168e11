"""A transport of one's own: two threads talk through a pair of queues, with a peer each."""

from __future__ import annotations

from queue import Empty, SimpleQueue
from threading import Thread
from typing import List, Optional, Sequence

from examples.messages import TaskRequest, TaskResponse
from stream_ipc import IpcPeer, Message, MessageTransport, StreamClosedError


class QueueTransport(MessageTransport):
    """Hands messages over as they are: nothing is copied, so do not change what was sent."""

    def __init__(self, outgoing: SimpleQueue[Optional[Message]], incoming: SimpleQueue[Optional[Message]]) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._ended = False

    def send(self, message: Message) -> None:
        self._outgoing.put(message)

    def receive(self) -> List[Message]:
        messages: List[Message] = []
        try:
            while not self._ended:
                message = self._incoming.get_nowait()
                if message is None:  # stands for the end
                    self._ended = True
                else:
                    messages.append(message)
        except Empty:
            pass
        if self._ended and not messages:  # only when everything before it was returned
            raise StreamClosedError("the other thread closed its session")
        return messages

    def read_fds(self) -> Sequence[int]:
        return ()  # a queue has none, so receive() is called every 10 ms while waiting

    def close(self) -> None:
        self._outgoing.put(None)


def worker(outgoing: SimpleQueue[Optional[Message]], incoming: SimpleQueue[Optional[Message]]) -> None:
    with IpcPeer() as peer:
        session = peer.create_session(QueueTransport(outgoing, incoming))

        @session.on_request
        def work(request: TaskRequest) -> TaskResponse:
            return TaskResponse(request.job[::-1])

        while session.is_open:
            session.tick(None)
    print("The worker has ended")


def main() -> None:
    to_worker: SimpleQueue[Optional[Message]] = SimpleQueue()
    to_main: SimpleQueue[Optional[Message]] = SimpleQueue()
    thread = Thread(target=worker, args=(to_main, to_worker))
    thread.start()
    with IpcPeer() as peer:
        session = peer.create_session(QueueTransport(to_worker, to_main))
        for job in ("stressed", "drawer"):
            print(f"{job} backwards is", session.request(TaskRequest(job), expect=TaskResponse).wait().result)
    thread.join()


if __name__ == "__main__":
    main()
