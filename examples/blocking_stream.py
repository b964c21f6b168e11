"""A stream that blocks, carried over pipes by two threads of one's own: here a connection whose bytes are compressed."""

from __future__ import annotations

import os
import socket
import zlib
from threading import Thread

from examples.messages import TaskRequest, TaskResponse
from stream_ipc import IpcPeer, Session


class Compressed:
    """A connection; its methods block, and its descriptor is of no use, because other bytes pass there."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._packer = zlib.compressobj()
        self._unpacker = zlib.decompressobj()

    def read(self, size: int) -> bytes:
        data = b""
        while not data:
            packed = self._connection.recv(size)
            if not packed:
                return b""
            data = self._unpacker.decompress(packed)
        return data

    def write(self, data: bytes) -> None:
        self._connection.sendall(self._packer.compress(data) + self._packer.flush(zlib.Z_SYNC_FLUSH))

    def close(self) -> None:
        self._connection.shutdown(socket.SHUT_RDWR)  # wakes a read()
        self._connection.close()


def reader(stream: Compressed) -> int:
    """Return a descriptor that is read in place of the stream."""
    outlet, inlet = os.pipe()

    def carry() -> None:
        try:
            while data := stream.read(65536):
                while data:
                    data = data[os.write(inlet, data) :]
        except OSError:
            pass  # the connection is lost, or the session is closed
        finally:
            os.close(inlet)  # the end, for the session

    Thread(target=carry, daemon=True).start()
    return outlet


def writer(stream: Compressed) -> int:
    """Return a descriptor that is written in place of the stream."""
    outlet, inlet = os.pipe()

    def carry() -> None:
        try:
            while data := os.read(outlet, 65536):
                stream.write(data)
        except OSError:
            pass  # the connection is lost
        finally:
            os.close(outlet)
            stream.close()

    Thread(target=carry).start()  # no daemon: what the session has written before it closes still leaves
    return inlet


def open_session(peer: IpcPeer, connection: socket.socket) -> Session:
    stream = Compressed(connection)
    return peer.create_stream_session(writer(stream), reader(stream))


def main() -> None:
    with IpcPeer() as peer:
        one, other = [open_session(peer, connection) for connection in socket.socketpair()]

        @other.on_request
        def work(request: TaskRequest) -> TaskResponse:
            return TaskResponse(request.job.upper())

        reply = one.request(TaskRequest("squeezed"), expect=TaskResponse).wait()
        print("Through the compressed connection:", reply.result)


if __name__ == "__main__":
    main()
