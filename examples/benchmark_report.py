"""The report of ``examples.benchmark``: tables, a JSON file, and a line of progress."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from typing import Any, Dict, Iterator, List, Sequence, Type

from examples.benchmark_frame import Bench, Row, Table, median
from examples.benchmark_others import EVERYBODY
from examples.benchmark_php import InPhpFormat, Original
from examples.benchmark_ways import Competitor, Raw, StreamIpc

Results = Dict[str, Dict[str, Any]]
SERIALIZERS = ("json", "php", "msgspec")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def report(row: Row, rounds: Dict[str, List[float]]) -> Dict[str, Any]:
    """What is known of one row: of each competitor the figures, their median, and the median ratio to the base's."""
    bases = rounds.get(row.base, [])
    results: Dict[str, Any] = {}
    for name, figures in rounds.items():
        ratios = [figure / base for figure, base in zip(figures, bases) if base]
        results[name] = {
            "median": median(figures),
            "ratio": median(ratios) if row.relative and ratios else None,
            "rounds": figures,
        }
    less = not row.unit.endswith("/s")
    return {"title": row.title, "unit": row.unit, "less_is_better": less, "base": row.base, "results": results}


def show(entries: Sequence[Dict[str, Any]], base: Type[Competitor], others: Sequence[Type[Competitor]]) -> Iterator[str]:
    """The lines of the table that has the figures of one competitor, and what multiple of them the others reach."""
    lines = [["", base.label, *(other.label for other in others)]]
    for entry in entries:
        results = entry["results"]
        figures = any(result["ratio"] is None for result in results.values())
        line = [entry["title"] + " *" * figures, f"{number(results[base.name]['median'])} {entry['unit']}"]
        for other in others:
            result = results.get(other.name)
            if result is None:
                line.append("-")
            else:
                value = result["median"] if result["ratio"] is None else result["ratio"]
                line.append(f"{value:.2f}" if value < 10 else f"{value:.1f}")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        yield f"{line[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:]))


def show_table(table: Table) -> Iterator[str]:
    yield table.title
    cells = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in table.rows]
    lines = [list(table.columns), *cells]
    widths = [max(map(len, column)) for column in zip(*lines)]
    named = any(isinstance(row[0], str) for row in table.rows)
    for first, *rest in lines:
        start = f"{first:<{widths[0]}}" if named else f"{first:>{widths[0]}}"
        yield "  " + "  ".join([start, *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:]))])


class Progress:
    """A line that says what is being done, if somebody looks at it, and the place where Control-C ends it all.

    An exception out of a signal handler may come anywhere: in a ``__del__``, where it is lost, or in an executor, which
    then waits for ever. The second Control-C is one all the same.
    """

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.shown = sys.stderr.isatty()
        self.interrupted = False
        signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self, text: str) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        if self.shown:
            line = f"[{time.monotonic() - self.begin:3.0f} s] {text}"
            sys.stderr.write(f"\r\x1b[K{line[:79]}")
            sys.stderr.flush()

    def clear(self) -> None:
        if self.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def print_all(bench: Bench, workloads: Results, tables: List[Table]) -> None:
    print(f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, {platform.system()}.")
    others = [cls for cls in EVERYBODY if cls not in bench.absent and cls is not Raw]
    for base, compared, text in (
        (Raw, others, "The raw selector loop, and the others as multiples of it; medians of rounds."),
        (Original, [StreamIpc, InPhpFormat], "The original, PHP to PHP, and this library, Python to Python."),
    ):
        entries = [entry for entry in workloads.values() if entry["base"] == base.name]
        if entries:
            print(f"\n{text}")
            if any(entry["unit"] == "ms" for entry in entries):
                print("Of what is in ms, less is better. *: the figures of each, not multiples.")
            print()
            for line in show(entries, base, compared):
                print(line)
    for table in tables:
        print()
        for line in show_table(table):
            print(line)
    print()
    for cls in EVERYBODY:
        if workloads and cls.note and cls not in bench.absent:
            print(f"{cls.label}: {cls.note}")
    for text in dict.fromkeys(bench.left_out):
        print(f"left out: {text}")


def write_json(path: str, bench: Bench, workloads: Results, tables: List[Table], seconds: float) -> None:
    import json

    document = {
        "python": platform.python_version(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "seconds": seconds,
        "left_out": list(dict.fromkeys(bench.left_out)),
        "workloads": workloads,
        "tables": {t.key: {"title": t.title, "columns": t.columns, "rows": t.rows} for t in tables},
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
