"""A serializer and a request id generator of one's own."""

import itertools
import sys
import zlib
from typing import Union

from examples.messages import TaskRequest, TaskResponse
from stream_ipc import IpcPeer, JsonMessageSerializer, Message, SerializationError


class CompressedSerializer:
    """Compressed JSON: any object with these two methods is a serializer. Both sides must use the same."""

    LIMIT = 16 * 1024 * 1024  # a few compressed bytes may stand for gigabytes

    def __init__(self) -> None:
        self._json = JsonMessageSerializer()

    def serialize(self, message: Message) -> bytes:
        return zlib.compress(self._json.serialize(message))

    def deserialize(self, payload: Union[bytes, bytearray, memoryview]) -> Message:
        stream = zlib.decompressobj()
        text = stream.decompress(payload, self.LIMIT)
        if not stream.eof:
            raise SerializationError(f"the message is cut off or longer than {self.LIMIT} bytes")
        return self._json.deserialize(text)


class NamedIds:
    """Ids that tell whose request it is: any object with this method is a generator."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers = itertools.count(1)

    def generate(self) -> str:
        return f"{self._name}-{next(self._numbers)}"


def parent() -> None:
    with IpcPeer(CompressedSerializer(), NamedIds("parent")) as peer:
        session = peer.create_command_session([sys.executable, "-m", "examples.customized", "worker"])
        for job in ("first", "second"):
            promise = session.request(TaskRequest(job), expect=TaskResponse)
            print(f"Request {promise.id}: {promise.wait().result}")


def worker() -> None:
    session = IpcPeer(CompressedSerializer()).create_stdio_session()

    @session.on_request
    def work(request: TaskRequest) -> TaskResponse:
        return TaskResponse(f"{request.job} job done")

    while session.is_open:
        session.tick(None)


if __name__ == "__main__":
    worker() if "worker" in sys.argv else parent()
