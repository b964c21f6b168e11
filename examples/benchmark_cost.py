"""What a message costs without a clock, for ``examples.benchmark --cost``: the same on a busy machine as on an idle one.

Bytecodes and calls of Python functions are those of the process that asks, beside what the bare loop takes for the same;
the benchmark's own loops are left out. Instructions are those of both processes together, if ``perf stat`` counts them
here or there is valgrind.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Type

from examples.benchmark_child import SMALL, an_order
from examples.benchmark_frame import Bench, Table
from examples.benchmark_ways import Competitor, Raw, StreamIpc, StreamIpcBatch, StreamIpcJson, StreamIpcPhp

if TYPE_CHECKING:
    from types import FrameType

Work = Callable[[Any, int], object]


def calls(body: Any, competitor: Competitor, count: int) -> None:
    competitor.calls(body, count)


def pipeline(competitor: Competitor, count: int) -> None:
    competitor.pipeline(count, 100)


def flood(competitor: Competitor, count: int) -> None:
    competitor.flood(count)


# By key: title, how the child behaves, who, what to do, and how many times of it are counted. The first hundred are not
# like the others: the interpreter adapts its bytecode to what it meets.
COSTS: Dict[str, Tuple[str, str, Type[StreamIpc], Work, int]] = {
    "small": ("small round trips", "echo", StreamIpc, partial(calls, SMALL), 100),
    "json": ("  JSON serializer", "echo", StreamIpcJson, partial(calls, SMALL), 100),
    "php": ("  PHP serializer", "echo", StreamIpcPhp, partial(calls, SMALL), 100),
    "pipeline": ("100 requests in flight", "echo", StreamIpc, pipeline, 500),
    "pipeline_batch": ("  inside batch()", "echo", StreamIpcBatch, pipeline, 500),
    "flood": ("notifications", "flood", StreamIpc, flood, 1000),
    "shape_nested": ("dataclasses, 3 deep", "echo", StreamIpc, partial(calls, an_order(1)), 100),
    "shape_list": ("list of 100 of them", "echo", StreamIpc, partial(calls, [an_order(n) for n in range(100)]), 20),
}
OWN = (os.path.abspath(__file__), os.path.join(os.path.dirname(os.path.abspath(__file__)), "benchmark_ways.py"))


def bytecodes(work: Work, competitor: Competitor, count: int) -> Tuple[float, float]:
    """How many bytecodes and calls of Python functions each message takes."""
    counts = [0, 0]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if os.path.abspath(frame.f_code.co_filename) in OWN:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        counts[0] += event == "opcode"
        counts[1] += event == "call"
        return trace

    work(competitor, count)
    sys.settrace(trace)
    try:
        work(competitor, count)
    finally:
        sys.settrace(None)
    return counts[0] / count, counts[1] / count


def perf(command: Sequence[str]) -> Optional[int]:
    """How many instructions a command takes with its children, as the processor counts them."""
    done = subprocess.run(["perf", "stat", "-x,", "-e", "instructions:u", *command], capture_output=True, text=True)
    found = re.search(r"^(\d+),", done.stderr, re.MULTILINE)
    return int(found[1]) if found is not None and done.returncode == 0 else None


def callgrind(command: Sequence[str]) -> Optional[int]:
    """The same as valgrind counts them, which takes long."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--log-file={folder}/%p.log", f"--callgrind-out-file={folder}/%p.out", "--trace-children=yes"]
        done = subprocess.run(["valgrind", "--tool=callgrind", *options, *command], capture_output=True)
        total = 0
        for name in os.listdir(folder):
            if name.endswith(".log"):
                with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as log:
                    total += sum(map(int, re.findall(r"Collected : (\d+)", log.read())))
    return total if total and done.returncode == 0 else None


def find_counter() -> Optional[Callable[[Sequence[str]], Optional[int]]]:
    for name, counter in (("perf", perf), ("valgrind", callgrind)):
        if shutil.which(name) is not None and counter([sys.executable, "-c", "pass"]) is not None:
            return counter
    return None


def instructions(counter: Callable[[Sequence[str]], Optional[int]], key: str, bare: bool, count: int) -> float:
    """How many each message takes: what more messages take more."""
    totals = []
    for times in (count, 3 * count):
        arguments = [key, str(int(bare)), str(times)]
        totals.append(counter([sys.executable, "-m", "examples.benchmark_cost", *arguments]) or 0)
    return (totals[1] - totals[0]) / (2 * count)


def tables_of_costs(bench: Bench, only: Optional[str], progress: Callable[[str], None]) -> Iterator[Table]:
    keys = [key for key in COSTS if only is None or only in key]
    rows: List[Sequence[Any]] = []
    for key in keys:
        title, behaviour, cls, work, count = COSTS[key]
        progress(f"bytecodes: {key}")
        ours = bytecodes(work, bench.start(partial(cls, behaviour=behaviour)), count)
        bare = bytecodes(work, bench.start(partial(Raw, behaviour=behaviour)), count)
        rows.append([title, *ours, *bare, ours[0] / bare[0]])
    columns = ("", "bytecodes", "calls", "raw", "calls", "ratio")
    yield Table("bytecodes", "bytecodes a message, in the process that asks", columns, rows)
    counter = find_counter()
    if counter is None:
        return
    rows = []
    for key in keys:
        title, _, _, _, count = COSTS[key]
        progress(f"instructions: {key}")
        both = [instructions(counter, key, bare, count) for bare in (False, True)]
        rows.append([title, *both, both[0] / both[1]])
    yield Table("instructions", "instructions a message, both processes", ("", "ours", "raw", "ratio"), rows)


def main() -> None:
    """Do what is counted from outside."""
    _, behaviour, cls, work, _ = COSTS[sys.argv[1]]
    competitor = Raw(behaviour) if int(sys.argv[2]) else cls(behaviour)
    work(competitor, int(sys.argv[3]))
    competitor.close()


if __name__ == "__main__":
    main()
