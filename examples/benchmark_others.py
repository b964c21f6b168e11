"""The other ways for Python processes to talk that ``examples.benchmark`` compares."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
from collections import deque
from functools import partial
from importlib import import_module
from typing import Any, Callable, Deque, List, Sequence, Tuple, Type

from examples.benchmark_child import EXECNET_CHILD, SMALL, Plain, connection_child, ignore_interrupt, pool_task
from examples.benchmark_ways import (
    IN_FLIGHT,
    IN_FLIGHT_BLOCKING,
    ROOT,
    Competitor,
    Raw,
    StreamIpc,
    command,
    end,
    spawn,
)


class Connection(Competitor):
    """``multiprocessing.Pipe()``, which is a socketpair, and a ``Process`` that is started afresh as all others are."""

    name = "mp.Connection"
    label = "mp"
    imports = ("multiprocessing.connection",)
    share = 0.6
    note = f"its sends block, so that it hangs with {IN_FLIGHT} in flight; it has {IN_FLIGHT_BLOCKING}"

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        import multiprocessing
        import multiprocessing.connection

        self.select: Callable[..., Any] = multiprocessing.connection.wait
        context = multiprocessing.get_context("spawn")
        self.connections = []
        self.idle: List[Any] = []
        self.processes = []
        for _ in range(children):
            near, far = context.Pipe()
            process = context.Process(target=connection_child, args=(far, behaviour))
            process.start()
            far.close()
            self.processes.append(process)
            self.connections.append(near)

    def call(self, body: Any) -> Any:
        connection = self.connections[0]
        connection.send(Plain(body))
        return connection.recv().body

    def call_beside(self, body: Any) -> Any:
        connection = self.connections[0]
        connection.send(Plain(body))
        for ready in self.select([connection, *self.idle]):
            return ready.recv().body

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT_BLOCKING) -> None:
        connection = self.connections[0]
        for number in range(count):
            if number >= in_flight:
                connection.recv()
            connection.send(Plain(SMALL))
        for _ in range(min(count, in_flight)):
            connection.recv()

    def flood(self, count: int) -> None:
        connection = self.connections[0]
        connection.send(Plain(count))
        for _ in range(count):
            connection.recv()

    def each_child(self, count: int) -> None:
        for connection in self.connections:
            connection.send(Plain(SMALL))
        sent, received = len(self.connections), 0
        while received < sent:
            for ready in self.select(self.connections):
                ready.recv()
                received += 1
                if sent < count:
                    sent += 1
                    ready.send(Plain(SMALL))

    def add_idle(self, sockets: Sequence[socket.socket]) -> None:
        connection = import_module("multiprocessing.connection").Connection
        self.idle = [connection(os.dup(one.fileno())) for one in sockets]

    def drop_idle(self) -> None:
        for connection in self.idle:
            connection.close()
        self.idle = []

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


class Pool(Competitor):
    """``concurrent.futures.ProcessPoolExecutor``, which has no notifications."""

    name = "ProcessPool"
    label = "pool"
    imports = ("concurrent.futures.process",)
    share = 0.2
    note = "no notifications"

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        import multiprocessing
        from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

        self.wait = partial(wait, return_when=FIRST_COMPLETED)
        self.behaviour = behaviour
        self.children = children
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(children, context, ignore_interrupt)
        for future in [self._submit(0) for _ in range(children)]:  # it starts them as they are needed
            future.result()

    def _submit(self, body: Any) -> Any:
        return self.pool.submit(pool_task, Plain(body), self.behaviour)

    def call(self, body: Any) -> Any:
        return self._submit(body).result().body

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT) -> None:
        futures: Deque[Any] = deque()
        for _ in range(count):
            if len(futures) == in_flight:
                futures.popleft().result()
            futures.append(self._submit(SMALL))
        while futures:
            futures.popleft().result()

    def each_child(self, count: int) -> None:
        running = {self._submit(SMALL) for _ in range(self.children)}
        sent = len(running)
        while running:
            done, running = self.wait(running)
            again = min(len(done), count - sent)
            sent += again
            running |= {self._submit(SMALL) for _ in range(again)}

    def close(self) -> None:
        self.pool.shutdown()


class Execnet(Competitor):
    """execnet: gateways, channels."""

    name = label = package = "execnet"
    imports = ("execnet",)
    share = 0.5
    note = "only builtin types, so it sends the body alone"

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        self.execnet = import_module("execnet")
        self.group = self.execnet.Group()
        self.channels = []
        for _ in range(children):
            gateway = self.group.makegateway(f"popen//python={sys.executable}//chdir={ROOT}")
            channel = gateway.remote_exec(EXECNET_CHILD)
            channel.send(behaviour)
            self.channels.append(channel)
        self.queue = self.execnet.MultiChannel(self.channels).make_receive_queue() if children > 1 else None

    def call(self, body: Any) -> Any:
        self.channels[0].send(body)
        return self.channels[0].receive()

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT) -> None:
        channel = self.channels[0]
        for number in range(count):
            if number >= in_flight:
                channel.receive()
            channel.send(SMALL)
        for _ in range(min(count, in_flight)):
            channel.receive()

    def flood(self, count: int) -> None:
        self.channels[0].send(count)
        for _ in range(count):
            self.channels[0].receive()

    def each_child(self, count: int) -> None:
        for channel in self.channels:
            channel.send(SMALL)
        sent, received = len(self.channels), 0
        while received < sent:
            assert self.queue is not None
            channel, _ = self.queue.get()
            received += 1
            if sent < count:
                sent += 1
                channel.send(SMALL)

    def close(self) -> None:
        self.group.terminate(timeout=5)


class Rpyc(Competitor):
    """rpyc: a service at the other end of a child's stdin and stdout."""

    name = label = package = "rpyc"
    imports = ("rpyc",)
    share = 0.2
    note = f"calls of functions with the body; {IN_FLIGHT_BLOCKING} in flight: its sends block too"

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        self.rpyc = import_module("rpyc")
        connect = import_module("rpyc.utils.factory").connect_subproc
        self.connections = [connect(command("rpyc", behaviour)) for _ in range(children)]
        self.functions = [connection.root.call for connection in self.connections]

    def call(self, body: Any) -> Any:
        return self.functions[0](body)

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT_BLOCKING) -> None:
        function = self.rpyc.async_(self.functions[0])
        results: Deque[Any] = deque()
        for _ in range(count):
            if len(results) == in_flight:
                results.popleft().wait()
            results.append(function(SMALL))
        while results:
            results.popleft().wait()

    def flood(self, count: int) -> None:
        left = count

        def take(text: str) -> None:
            nonlocal left
            left -= 1

        result = self.rpyc.async_(self.connections[0].root.flood)(count, take)
        result.set_expiry(None)
        result.wait()
        while left:
            self.connections[0].serve()

    def each_child(self, count: int) -> None:
        functions = [self.rpyc.async_(function) for function in self.functions]
        running = deque((function, function(SMALL)) for function in functions)
        sent = len(running)
        while running:
            function, result = running.popleft()
            result.wait()
            if sent < count:
                sent += 1
                running.append((function, function(SMALL)))

    def close(self) -> None:
        for connection in self.connections:
            process = connection.proc
            connection.close()
            end(process)


class Zmq(Competitor):
    """pyzmq: a ROUTER and the children's DEALERs, over a Unix socket."""

    name = label = "pyzmq"
    package = "zmq"
    imports = ("zmq",)
    share = 0.5

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        zmq = import_module("zmq")
        self.folder = tempfile.TemporaryDirectory()
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.set_hwm(0)  # beyond it, a ROUTER drops messages
        address = f"ipc://{self.folder.name}/socket"
        self.socket.bind(address)
        self.processes = [spawn("zmq", behaviour, address, f"child{number}") for number in range(children)]
        self.identities = [self.receive()[0] for _ in range(children)]

    def send(self, identity: bytes, body: Any) -> None:
        self.socket.send_multipart([identity, pickle.dumps(Plain(body), 5)])

    def receive(self) -> Tuple[bytes, Any]:
        identity, data = self.socket.recv_multipart()
        return identity, pickle.loads(data)

    def call(self, body: Any) -> Any:
        self.send(self.identities[0], body)
        return self.receive()[1].body

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT) -> None:
        identity = self.identities[0]
        for number in range(count):
            if number >= in_flight:
                self.receive()
            self.send(identity, SMALL)
        for _ in range(min(count, in_flight)):
            self.receive()

    def flood(self, count: int) -> None:
        self.send(self.identities[0], count)
        for _ in range(count):
            self.receive()

    def each_child(self, count: int) -> None:
        for identity in self.identities:
            self.send(identity, SMALL)
        sent, received = len(self.identities), 0
        while received < sent:
            identity, _ = self.receive()
            received += 1
            if sent < count:
                sent += 1
                self.send(identity, SMALL)

    def close(self) -> None:
        for process in self.processes:
            end(process)
        self.socket.close(0)
        self.context.term()
        self.folder.cleanup()


EVERYBODY: Sequence[Type[Competitor]] = (Raw, StreamIpc, Connection, Pool, Execnet, Rpyc, Zmq)
