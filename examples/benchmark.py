"""How fast the library is, beside a bare selector loop and other ways for Python processes to talk.

    python3 -m examples.benchmark [--quick] [--only KEY] [--cost] [--json FILE]

Each workload is done by all competitors in turn, several rounds of it. What is shown are medians over the rounds; a
ratio is taken within each round, because the speed of a machine changes from one minute to the next. The bare loop
(``RawLoop`` in ``examples/benchmark_child.py``) is what pickle over pipes costs with a selector before there is any
feature. execnet, rpyc, pyzmq and, as a serializer, msgspec take part if they are installed; the original library, PHP to
PHP, if there is php and PHP_STREAM_IPC names a checkout of it.

The workloads are in ``benchmark_workloads.py`` and ``benchmark_growth.py``, those who take part in ``benchmark_ways.py``,
``benchmark_others.py`` and ``benchmark_php.py``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, List, Optional, Tuple

if TYPE_CHECKING:  # the children of multiprocessing import this module again, and need none of it
    from examples.benchmark_frame import Bench, Table
    from examples.benchmark_report import Progress, Results


def measure(bench: Bench, cost: bool, only: Optional[str], progress: Progress) -> Tuple[Results, List[Table]]:
    import examples.benchmark_growth
    import examples.benchmark_workloads  # noqa: F401  # they register what they have
    from examples.benchmark_frame import TABLES, WORKLOADS
    from examples.benchmark_report import report

    workloads: Results = {}
    if cost:
        from examples.benchmark_cost import tables_of_costs

        with bench.cleaned_up():
            return workloads, list(tables_of_costs(bench, only, progress))
    for work in WORKLOADS:
        if only is None or any(only in row.key for row in work.rows):
            for row, rounds in zip(work.rows, bench.run(work, progress)):
                workloads[row.key] = report(row, rounds)
    tables: List[Table] = []
    for function in TABLES:
        if only is None or only in function.__name__:
            progress(f"time per message {function.__name__.replace('_', ' ')}")
            with bench.cleaned_up():
                tables.append(function(bench))
    return workloads, tables


def main() -> int:
    import argparse
    import multiprocessing.resource_tracker

    from examples.benchmark_child import MIB
    from examples.benchmark_frame import Bench
    from examples.benchmark_report import Progress, print_all, write_json
    from examples.benchmark_ways import ROOT

    parser = argparse.ArgumentParser(prog="python3 -m examples.benchmark", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less exact, in half a minute")
    parser.add_argument("--only", metavar="KEY", help="only the workloads and tables with this in their key")
    parser.add_argument("--cost", action="store_true", help="without a clock: count bytecodes and instructions instead")
    parser.add_argument("--json", metavar="FILE", help="also write all the figures to a file")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests: figures mean nothing
    arguments = parser.parse_args()
    path = arguments.json and os.path.abspath(arguments.json)
    # Without bytecode each child would compile anew what it imports. The children of multiprocessing inherit it not only
    # by the environment: they are started with the flags of this process.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None) and sys.flags.dont_write_bytecode:
        os.execv(sys.executable, [sys.executable, "-m", "examples.benchmark", *sys.argv[1:]])
    if os.environ.get("PHP_STREAM_IPC"):
        os.environ["PHP_STREAM_IPC"] = os.path.abspath(os.environ["PHP_STREAM_IPC"])
    os.chdir(ROOT)  # where children find the package
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if arguments.tiny:
        bench = Bench(0.002, 1, big=8 * MIB, children=2)
    elif arguments.quick:
        bench = Bench(0.1, 2)
    else:
        bench = Bench(1.0, 99)
    # Started now, because its start lets Control-C through again to what is started after it.
    multiprocessing.resource_tracker.ensure_running()
    progress = Progress()
    begin = time.monotonic()
    try:
        workloads, tables = measure(bench, arguments.cost, arguments.only, progress)
    except KeyboardInterrupt:
        progress.clear()
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    progress.clear()
    seconds = time.monotonic() - begin
    print_all(bench, workloads, tables)
    print(f"\n{seconds:.0f} seconds")
    if path:
        write_json(path, bench, workloads, tables, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
