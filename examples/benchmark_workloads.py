"""The workloads of ``examples.benchmark``, each a row or two of its tables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from functools import partial
from typing import Any, Callable, List, Sequence, Tuple, Type

from examples.benchmark_child import MIB, SMALL, an_order
from examples.benchmark_frame import Bench, Entrants, Figures, Row, workload
from examples.benchmark_others import EVERYBODY, Connection, Pool
from examples.benchmark_php import InPhpFormat, Original
from examples.benchmark_ways import (
    IN_FLIGHT,
    Competitor,
    Raw,
    StreamIpc,
    StreamIpcBatch,
    StreamIpcJson,
    StreamIpcMsgspec,
    StreamIpcPhp,
    end,
)


def small_calls(bench: Bench, competitors: Sequence[Type[Competitor]]) -> Entrants:
    return bench.entrants(competitors, lambda c: bench.rate(c, 2000, partial(c.calls, SMALL)))


@workload(Row("small", "small round trips", "/s"), rounds=21, core=True)
def small_round_trips(bench: Bench) -> Entrants:
    return small_calls(bench, EVERYBODY)


@workload(Row("json", "  JSON serializer", "/s"), rounds=15, core=True)
def json_round_trips(bench: Bench) -> Entrants:
    return small_calls(bench, (Raw, StreamIpcJson))


@workload(Row("php", "  PHP serializer", "/s"), rounds=15, core=True)
def php_round_trips(bench: Bench) -> Entrants:
    return small_calls(bench, (Raw, StreamIpcPhp))


@workload(Row("msgspec", "  msgspec example", "/s"), rounds=15)
def msgspec_round_trips(bench: Bench) -> Entrants:
    return {} if StreamIpcMsgspec in bench.absent else small_calls(bench, (Raw, StreamIpcMsgspec))


@workload(Row("pipeline", f"{IN_FLIGHT} requests in flight", "/s"), rounds=15, core=True)
def pipelined(bench: Bench) -> Entrants:
    return bench.entrants(EVERYBODY, lambda c: bench.rate(c, 10_000, c.pipeline))


@workload(Row("pipeline_batch", "  inside batch()", "/s"), rounds=15, core=True)
def pipelined_in_batch(bench: Bench) -> Entrants:
    return bench.entrants((Raw, StreamIpcBatch), lambda c: bench.rate(c, 10_000, c.pipeline))


NOTIFIERS = [competitor for competitor in EVERYBODY if competitor is not Pool]


@workload(Row("flood", "notifications", "/s"))
def flood(bench: Bench) -> Entrants:
    return bench.entrants(NOTIFIERS, lambda c: bench.rate(c, 200_000, c.flood), behaviour="flood")


@workload(Row("flood_batch", "  inside batch()", "/s"))
def flood_in_batch(bench: Bench) -> Entrants:
    return bench.entrants((Raw, StreamIpcBatch), lambda c: bench.rate(c, 200_000, c.flood), behaviour="flood")


@workload(Row("children", "8 children at a time", "/s"), rounds=15, core=True)
def eight_children(bench: Bench) -> Entrants:
    return bench.entrants(EVERYBODY, lambda c: bench.rate(c, 2000, c.each_child), children=bench.children)


@workload(Row("mib", "1 MiB echoed, pipes", "MiB/s"), rounds=15)
def mebibyte_over_pipes(bench: Bench) -> Entrants:
    body = bytes(MIB)
    return bench.entrants(EVERYBODY, lambda c: bench.rate(c, 30, partial(c.calls, body)))


@workload(Row("mib_sockets", "1 MiB echoed, socketpair", "MiB/s"), rounds=15)
def mebibyte_over_sockets(bench: Bench) -> Entrants:
    body = bytes(MIB)
    competitors = (Raw, StreamIpc, Connection)
    return bench.entrants(competitors, lambda c: bench.rate(c, 30, partial(c.calls, body)), sockets=1)


def one_big_message(bench: Bench, sockets: int, cls: Type[Competitor]) -> Figures:
    with bench.fresh(partial(cls, behaviour="sink", sockets=sockets)) as competitor:
        body = bytes(bench.big)
        before, _ = competitor.call(b"")
        begin = time.perf_counter()
        _, peak = competitor.call(body)
        return bench.big / MIB / (time.perf_counter() - begin), max(1, peak - before) / bench.big


@workload(
    Row("big", "64 MiB message, pipes", "MiB/s"),
    Row("big_memory", "  receiver's peak memory", "x size", relative=False),
    rounds=7,
)
def big_over_pipes(bench: Bench) -> Entrants:
    return bench.fresh_entrants(EVERYBODY, partial(one_big_message, bench, 0))


@workload(
    Row("big_sockets", "64 MiB message, socketpair", "MiB/s"),
    Row("big_sockets_memory", "  receiver's peak memory", "x size", relative=False),
    rounds=7,
)
def big_over_sockets(bench: Bench) -> Entrants:
    return bench.fresh_entrants((Raw, StreamIpc, Connection), partial(one_big_message, bench, 1))


class Readers:
    """So many processes that read their stdin and do nothing else: each write wakes one, as it would wake a slave."""

    def __init__(self, count: int) -> None:
        self.silent = os.pipe()  # what the sessions read: nothing ever comes
        self.processes = [
            subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(count)
        ]

    def streams(self) -> List[Tuple[int, int]]:
        """A descriptor to write to and one to read for each, for the caller to close."""
        inputs = [process.stdin.fileno() for process in self.processes if process.stdin is not None]
        return [(os.dup(fd), os.dup(self.silent[0])) for fd in inputs]

    def close(self) -> None:
        for process in self.processes:
            end(process)
        for fd in self.silent:
            os.close(fd)


@workload(Row("broadcast", "broadcast to 100 sessions", "/s"), rounds=21)
def broadcast(bench: Bench) -> Entrants:
    """What it takes the sender: the bare loop encodes once too."""

    def send(competitor: Competitor, count: int) -> None:
        for _ in range(count):
            competitor.broadcast(SMALL)

    readers = bench.start(partial(Readers, 100))
    entrants: Entrants = {}
    classes: Sequence[Type[Competitor]] = (Raw, StreamIpc)
    for cls in classes:
        competitor = bench.start(partial(cls, children=0))
        competitor.add_outputs(readers.streams())
        entrants[cls.name] = partial(bench.rate, competitor, 100, partial(send, competitor))
    return entrants


@workload(
    Row("idle_none", "beside no other session", "/s"),
    Row("idle_1000", "  beside 1000 idle ones", "/s"),
    Row("idle_share", "  second, of the first", "x", relative=False),
    rounds=9,
)
def beside_idle_sessions(bench: Bench) -> Entrants:
    idle = bench.sessions(1000, 3)

    def measure(competitor: Competitor) -> Figures:
        def calls(count: int) -> None:
            for _ in range(count):
                competitor.call_beside(SMALL)

        alone = bench.rate(competitor, 2000, calls)[0]
        pairs = [socket.socketpair() for _ in range(idle)]
        competitor.add_idle([near for near, _ in pairs])
        full = 2000 if competitor.share == 1 else 200
        beside = bench.rate(competitor, full, calls)[0]
        competitor.drop_idle()
        for near, far in pairs:
            near.close()
            far.close()
        return alone, beside, beside / alone

    return bench.entrants((Raw, StreamIpc, Connection), measure)


@workload(Row("start", "start to first reply", "ms"), rounds=15)
def start_to_first_reply(bench: Bench) -> Entrants:
    def measure(cls: Type[Competitor]) -> Figures:
        begin = time.perf_counter()
        with bench.fresh(cls) as competitor:
            competitor.call(SMALL)
            return ((time.perf_counter() - begin) * 1000,)

    entrants = bench.fresh_entrants(EVERYBODY, measure)
    bench.warm_up(entrants)  # for this process to import what it needs
    return entrants


@workload(
    Row("import", "import, by -X importtime", "ms"),
    Row("import_own", "  its own modules' part", "ms", relative=False),
    rounds=7,
)
def imports(bench: Bench) -> Entrants:
    def measure(cls: Type[Competitor]) -> Figures:
        code = f"import {', '.join(cls.imports)}"
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], stderr=subprocess.PIPE, text=True, check=True
        )
        total = own = 0
        tops = {name.split(".")[0] for name in cls.imports}
        for line in done.stderr.splitlines():
            fields = line.split("|")
            if len(fields) != 3 or not fields[1].strip().isdigit():
                continue
            name = fields[2].strip()
            if name.split(".")[0] in tops:
                own += int(fields[0].split(":")[1])
            if not fields[2].startswith("  ") and (name in cls.imports or name.split(".")[0] in tops):
                total += int(fields[1])
        return total / 1000, own / 1000

    entrants = bench.fresh_entrants(EVERYBODY, measure)
    bench.warm_up(entrants)  # for the bytecode to be there
    return entrants


# Other messages: key, title, how many, and what makes the body.
SHAPES: Sequence[Tuple[str, str, int, Callable[[], Any]]] = (
    ("nested", "dataclasses, 3 deep", 1000, lambda: an_order(1)),
    ("list", "list of 100 of them", 50, lambda: [an_order(number) for number in range(100)]),
    ("dicts", "dict of 20 dicts", 1000, lambda: {f"key {n}": {"name": f"{n}", "size": n} for n in range(20)}),
    ("text", "str of 1 MB", 40, lambda: "some text " * 100_000),
)


def shape(count: int, make: Callable[[], Any], bench: Bench) -> Entrants:
    body = make()
    return bench.entrants((Raw, StreamIpc, Connection), lambda c: bench.rate(c, count, partial(c.calls, body)))


for key, title, full, make in SHAPES:
    workload(Row(f"shape_{key}", title, "/s"), rounds=15, core=True)(partial(shape, full, make))


# -- beside the original, PHP to PHP

PHP_WORKLOADS: Sequence[Tuple[str, str, str, str, Callable[[Bench, Any], Figures]]] = (
    ("php_small", "small round trips", "/s", "echo", lambda b, c: b.rate(c, 2000, partial(c.calls, SMALL))),
    (
        "php_pipeline",
        "50 requests in flight",
        "/s",
        "echo",
        lambda b, c: b.rate(c, 10_000, partial(c.pipeline, in_flight=50)),
    ),
    ("php_flood", "notifications", "/s", "flood", lambda b, c: b.rate(c, 100_000, c.flood)),
    ("php_big", "8 MiB echoed", "MiB/s", "echo", lambda b, c: b.rate(c, 5, partial(c.calls, bytes(8 * MIB)), per=8)),
)


def beside_php(measure: Callable[[Bench, Any], Figures], behaviour: str, bench: Bench) -> Entrants:
    if Original in bench.absent:
        return {}
    competitors = (Original, StreamIpc, InPhpFormat)
    return bench.entrants(competitors, partial(measure, bench), behaviour=behaviour)


for key, title, unit, behaviour, work in PHP_WORKLOADS:
    workload(Row(key, title, unit, base=Original.name), rounds=9, core=True)(partial(beside_php, work, behaviour))
