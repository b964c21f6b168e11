"""How the time per message behaves as something grows, for ``examples.benchmark``: sessions, pending requests, sizes."""

from __future__ import annotations

import os
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Dict, List

from examples.benchmark_child import MIB, SMALL, Plain, RawPipe
from examples.benchmark_frame import TABLES, Bench, Figures, Table
from examples.benchmark_ways import Raw, StreamIpc, command

if TYPE_CHECKING:
    from stream_ipc import Message, ResponsePromise


@TABLES.append
def by_sessions(bench: Bench) -> Table:
    """Round trips over all the sessions in turn; one child has the other ends."""
    points = [bench.sessions(count, 6) for count in (1, 10, 100, 1000) if bench.scale > 0.01 or count < 1000]
    ours = {count: bench.start(partial(StreamIpc, sockets=count)) for count in points}
    bare = {count: bench.start(partial(Raw, sockets=count)) for count in points}

    def measure(point: int) -> Figures:
        full = max(4000, point * 2)
        rates = [bench.rate(c, full, partial(c.call_round_robin, SMALL)) for c in (ours[point], bare[point])]
        return [1e6 / rate for rate, in rates]

    rows = [[count, *figures] for count, figures in zip(points, bench.times(points, measure))]
    return Table("sessions", "round trips over N sessions in turn", ("sessions", "us", "raw, us"), rows)


@TABLES.append
def by_pending_requests(bench: Bench) -> Table:
    """Round trips on a session that has so many requests without a reply."""
    points = (0, 100, 1000, 10_000)
    competitors: Dict[int, StreamIpc] = {}
    held: List[ResponsePromise[Message]] = []
    for count in points:
        competitor = competitors[count] = bench.start(HoldingIpc)
        held += [competitor.sessions[0].request(competitor.message(None)) for _ in range(count)]
        competitor.call(SMALL)

    def measure(point: int) -> Figures:
        c = competitors[point]
        return [1e6 / rate for rate in bench.rate(c, 4000, partial(c.calls, SMALL))]

    rows = [[count, *figures] for count, figures in zip(points, bench.times(points, measure))]
    return Table("pending", "round trips beside N pending requests of the session", ("pending", "us"), rows)


class HoldingIpc(StreamIpc):
    """With a child that leaves some requests without a reply."""

    def __init__(self) -> None:
        super().__init__(children=0)
        self.sessions = [self.peer.create_command_session(command("hold"))]


@TABLES.append
def by_messages_in_one_read(bench: Bench) -> Table:
    """What it takes to receive notifications that stand in the pipe already; both ends are in this process."""
    points = (1, 10, 100, 1000)
    near, far = socket.socketpair()
    ours = bench.start(partial(StreamIpc, children=0))
    theirs = bench.start(partial(StreamIpc, children=0))
    sender = theirs.peer.create_socket_session(far)
    ours.peer.create_socket_session(near).on_message(lambda message: None)
    bare = bench.start(partial(Raw, children=0))
    streams = [os.pipe(), os.pipe()]
    bare.add_outputs([(streams[0][1], streams[1][0]), (streams[1][1], streams[0][0])])

    def measure(point: int) -> Figures:
        seconds = [0.0, 0.0]
        repeat = max(1, bench.count(10_000) // point)
        for _ in range(repeat):
            with sender.batch():
                for _ in range(point):
                    sender.notify(ours.message(SMALL))
            begin = time.perf_counter()
            left = point
            while left:
                left -= ours.peer.tick(None)
            seconds[0] += time.perf_counter() - begin
            bare.pipes[0].send_bytes(RawPipe.encode(Plain(SMALL)) * point)
            begin = time.perf_counter()
            left = point
            while left:
                left -= len(bare.loop.turn())
            seconds[1] += time.perf_counter() - begin
        return [total * 1e6 / (repeat * point) for total in seconds]

    rows = [[count, *figures] for count, figures in zip(points, bench.times(points, measure, rounds=5))]
    return Table("burst", "receiving N messages written at once", ("messages", "us each", "raw, us each"), rows)


@TABLES.append
def by_bytes_in_one_message(bench: Bench) -> Table:
    """A message of so many bytes to the child, and a short reply."""
    points = [size for size in (64, 1024, 16 * 1024, 256 * 1024, 4 * MIB, 64 * MIB) if size <= bench.big]
    ours = bench.start(partial(StreamIpc, behaviour="sink"))
    bare = bench.start(partial(Raw, behaviour="sink"))

    def measure(point: int) -> Figures:
        body = bytes(point)
        full = min(2000, max(2, 16 * MIB // point))
        rates = [bench.rate(c, full, partial(c.calls, body)) for c in (ours, bare)]
        times = [1e6 / rate for rate, in rates]
        return [times[0], times[0] / point * 1024, times[1], times[1] / point * 1024]

    rows = [[count, *figures] for count, figures in zip(points, bench.times(points, measure))]
    columns = ("bytes", "us", "us per KiB", "raw, us", "raw, us per KiB")
    return Table("bytes", "one message of N bytes and a short reply", columns, rows)
