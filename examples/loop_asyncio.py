"""A peer in asyncio's loop: coroutines await replies, and coroutines answer requests, while others run."""

import asyncio
import sys
from typing import Any, Callable, Coroutine, Optional, Set, TypeVar

from examples.messages import TaskRequest, TaskResponse
from stream_ipc import DeferredReply, IpcPeer, Message, RequestTimeoutError, ResponsePromise, Session

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
        self._tasks: Set[asyncio.Task[None]] = set()
        self._loop.add_reader(peer.fileno(), self._turn)
        self._set_timer()

    def close(self) -> None:
        """Stop ticking, and cancel what still works on replies. To be called before the peer is closed."""
        self._loop.remove_reader(self._peer.fileno())
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    async def reply(self, promise: ResponsePromise[M]) -> M:
        """Await what ``promise.wait()`` returns or raises."""
        future: asyncio.Future[None] = self._loop.create_future()

        def settled(promise: ResponsePromise[M]) -> None:
            if not future.done():  # but cancelled
                future.set_result(None)

        promise.add_done_callback(settled)
        self._set_timer()  # the request has brought a deadline
        await future
        return promise.wait()

    def answer(self, session: Session, work: Callable[[Any], Coroutine[Any, Any, Message]]) -> None:
        """Have the requests of a session answered by a coroutine function, any number of them at a time."""

        @session.on_request
        def start(request: Message) -> DeferredReply:
            reply = DeferredReply()
            task = self._loop.create_task(self._answer(reply, work(request)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return reply

    async def _answer(self, reply: DeferredReply, work: Coroutine[Any, Any, Message]) -> None:
        try:
            reply.send(await work)
        except Exception as error:
            reply.fail(error)
        self._set_timer()

    def _turn(self) -> None:
        try:
            self._peer.tick(0)
        finally:  # also if a handler has raised, which the loop reports
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        seconds = self._peer.next_deadline()
        self._timer = None if seconds is None else self._loop.call_later(seconds, self._turn)


async def main() -> None:
    with IpcPeer() as peer:
        worker = peer.create_command_session([sys.executable, "-m", "examples.loop_select", "worker"])
        client, server = peer.create_session_pair()
        in_loop = PeerInLoop(peer)

        async def ask(session: Session, job: str, timeout: float) -> str:
            promise = session.request(TaskRequest(job), timeout, expect=TaskResponse)
            try:
                return (await in_loop.reply(promise)).result
            except RequestTimeoutError as error:
                return f"{job}: {type(error).__name__} after {error.timeout} s"

        async def toast(request: TaskRequest) -> TaskResponse:
            await asyncio.sleep(0.1)  # stands for the work, which others do not wait for
            return TaskResponse(f"toasted {request.job}")

        in_loop.answer(server, toast)
        jobs = [ask(worker, "bread", 30), ask(worker, "butter", 30), ask(worker, "slow", 0.2), ask(worker, "jam", 30)]
        for result in await asyncio.gather(*jobs, ask(client, "bread", 30), ask(client, "rolls", 30)):
            print(result)
        in_loop.close()
        worker.close(timeout=1)  # the loop waits meanwhile


if __name__ == "__main__":
    asyncio.run(main())
