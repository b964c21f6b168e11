"""A peer in asyncio's loop: coroutines await replies while others run."""

import asyncio
import sys
from typing import Any, Dict, Optional, TypeVar

from examples.messages import TaskRequest, TaskResponse
from stream_ipc import IpcPeer, Message, RequestTimeoutError, ResponsePromise

M = TypeVar("M", bound=Message)


class PeerInLoop:
    """Ticks a peer whenever it has something to do, in the running loop.

    Args:
        peer: The peer, which belongs to the loop's thread.
    """

    def __init__(self, peer: IpcPeer) -> None:
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._timer: Optional[asyncio.TimerHandle] = None
        self._waiting: Dict[ResponsePromise[Any], asyncio.Future[None]] = {}
        self._loop.add_reader(peer.fileno(), self._turn)
        self._set_timer()

    def close(self) -> None:
        """Stop ticking. To be called before the peer is closed."""
        self._loop.remove_reader(self._peer.fileno())
        if self._timer is not None:
            self._timer.cancel()

    async def reply(self, promise: ResponsePromise[M]) -> M:
        """Await what ``promise.wait()`` returns or raises."""
        self._set_timer()  # the request has brought a deadline
        if not promise.done:
            future = self._waiting[promise] = self._loop.create_future()
            try:
                await future
            finally:
                del self._waiting[promise]
        return promise.wait()

    def _turn(self) -> None:
        try:
            self._peer.tick(0)
        finally:  # also if a handler has raised, which the loop reports
            self._set_timer()
            for promise, future in self._waiting.items():
                if promise.done and not future.done():
                    future.set_result(None)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        seconds = self._peer.next_deadline()
        self._timer = None if seconds is None else self._loop.call_later(seconds, self._turn)


async def main() -> None:
    with IpcPeer() as peer:
        slave = peer.create_command_session([sys.executable, "-m", "examples.loop_select", "slave"])
        in_loop = PeerInLoop(peer)

        async def ask(job: str, timeout: float) -> str:
            promise = slave.request(TaskRequest(job), timeout, expect=TaskResponse)
            try:
                return (await in_loop.reply(promise)).result
            except RequestTimeoutError as error:
                return f"{job}: {type(error).__name__} after {error.timeout} s"

        for result in await asyncio.gather(ask("bread", 30), ask("butter", 30), ask("slow", 0.2), ask("jam", 30)):
            print(result)
        in_loop.close()


if __name__ == "__main__":
    asyncio.run(main())
