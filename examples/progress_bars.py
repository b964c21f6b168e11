"""Several workers at work at once, and a progress bar for each: by rich or tqdm if they are installed, or of our own.

python3 -m examples.progress_bars [rich|tqdm|line|plain]

Where the output is no terminal, and with plain, there are plain lines.
"""

import shutil
import sys
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Callable, Dict, Iterator, List

from examples.messages import PrimesRequest, PrimesResponse, Progress
from stream_ipc import IpcPeer, ResponsePromise, Session, as_completed

JOBS = [50_000, 100_000, 150_000]
NAMES = [f"below {below:7,}" for below in JOBS]

Show = Callable[[int, int], None]  # which bar, and at how many percent it is


@contextmanager
def rich_bars() -> Iterator[Show]:
    with import_module("rich.progress").Progress() as progress:  # draws ten times a second, in a thread of its own
        bars = [progress.add_task(name) for name in NAMES]
        yield lambda number, percent: progress.update(bars[number], completed=percent)


@contextmanager
def tqdm_bars() -> Iterator[Show]:
    tqdm: Any = import_module("tqdm").tqdm
    # Without the rate and the time: those of all would be shown at the end as those of the slowest.
    look = "{desc} {percentage:3.0f} % {bar:40}"
    options = {"total": 100, "bar_format": look, "mininterval": 0, "file": sys.stdout}
    bars = [tqdm(desc=name, **options) for name in NAMES]
    try:
        yield lambda number, percent: bars[number].update(percent - bars[number].n)
    finally:
        for bar in bars:  # from above, and all together: a bar that is closed moves those below it
            bar.close()


@contextmanager
def one_line() -> Iterator[Show]:
    """All in one line, which is written again and again."""
    percents = [0] * len(NAMES)

    def show(number: int, percent: int) -> None:
        percents[number] = percent
        text = "   ".join(f"{name} {percent:3} %" for name, percent in zip(NAMES, percents))
        # A line that the terminal breaks could not be written over.
        print("\r" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    try:
        yield show
    finally:
        print()


@contextmanager
def plain_lines() -> Iterator[Show]:
    def show(number: int, percent: int) -> None:
        if percent % 25 == 0:
            print(f"{NAMES[number]}: {percent} %", flush=True)

    yield show


BARS = {"rich": rich_bars, "tqdm": tqdm_bars, "line": one_line, "plain": plain_lines}


def choose() -> str:
    if not sys.stdout.isatty():
        return "plain"
    return next((name for name in ("rich", "tqdm") if find_spec(name) is not None), "line")


def parent(bars: str) -> None:
    numbers: Dict[Session, int] = {}
    promises: List[ResponsePromise[PrimesResponse]] = []
    with IpcPeer() as peer, BARS[bars]() as show:

        def update(progress: Progress, session: Session) -> None:
            show(numbers[session], 100 * progress.done // progress.total)

        for number, below in enumerate(JOBS):
            worker = peer.create_command_session([sys.executable, "-m", "examples.progress_bars", "worker"])
            worker.on_message(update)
            numbers[worker] = number
            promises.append(worker.request(PrimesRequest(below), expect=PrimesResponse))
        for promise in as_completed(promises):  # update() runs meanwhile
            promise.wait()  # if a worker is lost, that is said at once
    for below, promise in zip(JOBS, promises):
        print(f"{promise.wait().count} primes are below {below}")


def worker() -> None:
    session = IpcPeer().create_stdio_session()

    @session.on_request
    def work(request: PrimesRequest, session: Session) -> PrimesResponse:
        count = 0
        for percent in range(100):
            for number in range(request.below * percent // 100, request.below * (percent + 1) // 100):
                if number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
                    count += 1
            session.notify(Progress(percent + 1, 100))
        return PrimesResponse(count)

    while session.is_open:
        session.tick(None)


if __name__ == "__main__":
    worker() if "worker" in sys.argv else parent(sys.argv[1] if len(sys.argv) > 1 else choose())
