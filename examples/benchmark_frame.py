"""What is the same for all workloads of ``examples.benchmark``: rows and rounds, starting and ending competitors."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Sequence, Set, Type, Union

from examples.benchmark_child import MIB
from examples.benchmark_others import EVERYBODY
from examples.benchmark_php import Original
from examples.benchmark_ways import Competitor, Raw, StreamIpcMsgspec, descriptors, no_interrupt

Figures = Sequence[float]
Entrants = Dict[str, Callable[[], Figures]]
Enter = Callable[["Bench"], Entrants]


@dataclass
class Row:
    """One line of a table: what a workload measures.

    Attributes:
        unit: Of the figures. Of times, less is better.
        relative: Whether a ratio to the base says something.
        base: The name of the competitor whose figure the others' are a multiple of; each has a table of its own.
    """

    key: str
    title: str
    unit: str
    relative: bool = True
    base: str = Raw.name


@dataclass
class Workload:
    """Some rows, and the function that starts the competitors and returns for each what measures it once.

    Attributes:
        core: Whether all processes have to do with one core.
    """

    rows: Sequence[Row]
    enter: Enter
    rounds: int
    core: bool = False


@dataclass
class Table:
    """How something grows; or, without a clock, what it costs."""

    key: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


WORKLOADS: List[Workload] = []
TABLES: List[Callable[[Bench], Table]] = []


def workload(*rows: Row, rounds: int = 5, core: bool = False) -> Callable[[Enter], Enter]:
    """Register a workload; with ``core`` another time, with all processes on one core.

    A core that sleeps between two messages is slow to wake, which is no fault of the program and hides what it costs.
    """

    def register(function: Enter) -> Enter:
        WORKLOADS.append(Workload(rows, function, rounds))
        if core and hasattr(os, "sched_setaffinity"):
            WORKLOADS.append(Workload([_on_one_core(row) for row in rows], function, rounds, core))
        return function

    return register


def _on_one_core(row: Row) -> Row:
    indent = len(row.title) - len(row.title.lstrip())
    return Row(f"{row.key}_core", " " * indent + "  on one core", row.unit, row.relative, row.base)


@contextmanager
def one_core() -> Iterator[None]:
    """Have this thread, and all that it starts, run on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


class Bench:
    """What is the same for all workloads.

    Rounds are many and short rather than few and long: what else the machine does then falls on all competitors alike.

    Attributes:
        scale: The part of the full number of messages.
        most_rounds: Of each workload.
        big: The size of the one big message.
        children: How many there are at most.
        limit: How many descriptors may be open.
    """

    def __init__(self, scale: float, most_rounds: int, big: int = 64 * MIB, children: int = 8) -> None:
        self.scale = scale
        self.most_rounds = most_rounds
        self.big = big
        self.children = children
        self.limit = descriptors()
        self.left_out: List[str] = []
        self.absent: Set[Type[Competitor]] = set()
        optional: Sequence[Type[Competitor]] = (*EVERYBODY, StreamIpcMsgspec, Original)
        for competitor in optional:
            if competitor.missing():
                self.absent.add(competitor)
                self.left_out.append(competitor.missing())
        self._stack = ExitStack()

    def sessions(self, wanted: int, descriptors_each: int) -> int:
        """As many as the descriptors suffice for."""
        possible = min(wanted, (self.limit - 200) // descriptors_each)
        if possible < wanted:
            self.left_out.append(f"{wanted} sessions: the limit of {self.limit} descriptors is enough for {possible}")
        return possible

    def count(self, full: int, competitor: Union[Competitor, Type[Competitor]] = Competitor) -> int:
        return max(1, int(full * self.scale * competitor.share))

    def rate(self, competitor: Competitor, full: int, work: Callable[[int], object], per: float = 1.0) -> Figures:
        """Messages (of so much each) in a second."""
        count = self.count(full, competitor)
        begin = time.perf_counter()
        work(count)
        return (count * per / (time.perf_counter() - begin),)

    def start(self, make: Callable[[], Any]) -> Any:
        """A competitor that is ready, until the workload ends."""
        with no_interrupt():
            competitor = make()
            self._stack.callback(competitor.close)
        return competitor

    def entrants(
        self, competitors: Sequence[Type[Competitor]], measure: Callable[[Any], Figures], **options: Any
    ) -> Entrants:
        """Start competitors, and measure each when its turn comes."""
        present = [cls for cls in competitors if cls not in self.absent]
        entrants: Entrants = {cls.name: partial(measure, self.start(partial(cls, **options))) for cls in present}
        self.warm_up(entrants)
        return entrants

    def warm_up(self, entrants: Entrants) -> None:
        """Wait until all children are there, and have everything run once."""
        scale, self.scale = self.scale, 0.0
        for measure in entrants.values():
            measure()
        self.scale = scale

    @contextmanager
    def fresh(self, make: Callable[[], Any]) -> Iterator[Any]:
        """A competitor for one measurement."""
        with no_interrupt():
            competitor = make()
        try:
            yield competitor
        finally:
            with no_interrupt():
                competitor.close()

    def fresh_entrants(
        self, competitors: Sequence[Type[Competitor]], measure: Callable[[Type[Competitor]], Figures]
    ) -> Entrants:
        """Have each started anew in each round."""
        return {cls.name: partial(measure, cls) for cls in competitors if cls not in self.absent}

    @contextmanager
    def cleaned_up(self) -> Iterator[ExitStack]:
        """End, afterwards, what was started with ``start``."""
        try:
            yield self._stack
        finally:
            with no_interrupt():
                self._stack.close()

    def run(self, work: Workload, progress: Callable[[str], None]) -> List[Dict[str, List[float]]]:
        """The figures of each round, by row and competitor."""
        results: List[Dict[str, List[float]]] = [{} for _ in work.rows]
        rounds = min(work.rounds, self.most_rounds)
        with self.cleaned_up() as stack:
            if work.core:
                stack.enter_context(one_core())
            entrants = list(work.enter(self).items())
            if not entrants:  # what it is about is not installed
                return []
            for number in range(rounds):
                first = number % len(entrants)  # nobody always comes after the same
                for name, measure in entrants[first:] + entrants[:first]:
                    progress(f"{work.rows[0].key}: round {number + 1} of {rounds}, {name}")
                    for result, figure in zip(results, measure()):
                        result.setdefault(name, []).append(figure)
        return results

    def times(self, points: Sequence[Any], measure: Callable[[Any], Figures], rounds: int = 3) -> List[List[float]]:
        """For a table: measure at each point in turn, and return the medians."""
        found: List[List[Figures]] = [[] for _ in points]
        for _ in range(min(rounds, self.most_rounds)):
            for index, point in enumerate(points):
                found[index].append(measure(point))
        return [[median(column) for column in zip(*figures)] for figures in found]
