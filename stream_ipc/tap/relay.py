"""Stands between a parent and a worker: what ``python3 -m stream_ipc tap`` is.

Knows descriptors, processes, signals and threads. Must not know frames beyond what a ``Skimmer`` says about them.

Each direction has a thread that reads and writes blocking descriptors, so what one side does not take is not taken from
the other, as if there were nothing in between. A loop over non-blocking descriptors would need queues, and the flags of
stdin and stdout are shared with the program that has started the tap. Bytes are passed on first and looked at then, but
in the order in which they came: a reply before what the parent says to it.

A signal for the tap is meant for the worker, which ends within a bound then. If the tap itself is killed, the worker's
streams end, and on Linux the kernel kills it.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from typing import Callable, Sequence

from ..transports.descriptors import grow_pipe
from .files import Log
from .report import READ_SIZE, Report, Skimmer
from .trace import Trace
from .tree import escaped

__all__ = ["GRACE", "Tap"]

TO_WORKER, TO_PARENT, TEXT = "->", "<-", "stderr"
_TRACKS = {TO_WORKER: "-> to the worker", TO_PARENT: "<- from the worker", TEXT: "stderr"}

# Of a large payload only the beginning is looked at. Linux moves the rest from pipe to pipe inside the kernel.
_SPLICE: Callable[..., int] | None = getattr(os, "splice", None)
_SPLICE_SIZE = 1024 * 1024

_QUIET = 0.1  # seconds without output after which a dead worker's pipe, which another process still holds, is left
GRACE = 5.0  # seconds until a worker that was told to end is killed
_TITLE = 160  # characters of the worker's command

_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_FORWARDED = _ENDING | {signal.SIGUSR1, signal.SIGUSR2}

_PR_SET_PDEATHSIG = 1


class _Watcher:
    """Looks at what has passed, in whichever thread has the time. Owns what is still to be looked at.

    Args:
        report: Gets what has passed.
        log: Where the report writes.
        begin: Writes the first lines, with the monotonic time of now, and that from which the report counts.
    """

    def __init__(self, report: Report, log: Log, begin: Callable[[float, float], None]) -> None:
        self._report = report
        self._log = log
        self._begin = begin
        self._clock = time.monotonic()  # when the conversation began
        self._start: float | None = None  # the time from which the report counts; the log knows it
        self._passed: deque[tuple[float, Skimmer, bytes | int]] = deque()
        self._lock = threading.Lock()

    def note(self, skimmer: Skimmer, passed: bytes | int) -> None:
        """Take note of bytes that are about to be passed on, or of how many have been that need not be seen."""
        self._passed.append((time.monotonic(), skimmer, passed))

    def catch_up(self, then: Callable[[], None] | None = None) -> None:
        """Look at all of it, and call a function that adds to the report."""
        report = self._report
        with self._lock, self._log.turn() as floor:
            report.floor = max(report.floor, floor)
            if self._start is None:
                self._start = self._clock - self._log.age(self._clock)
                report.now = self._clock - self._start
                self._begin(self._clock, self._start)
            while self._passed:
                when, skimmer, passed = self._passed.popleft()
                report.now = max(report.now, when - self._start)  # the two threads note without a lock
                if isinstance(passed, int):
                    skimmer.skip(passed)
                else:
                    skimmer.feed(passed)
            if then is not None:
                report.now = time.monotonic() - self._start
                then()
            if report.trace is not None:
                report.trace.flush()


class _Direction(threading.Thread):
    """Passes bytes on from one descriptor to another until the end. Owns both."""

    def __init__(self, source: int, target: int, skimmer: Skimmer, watcher: _Watcher) -> None:
        super().__init__(daemon=True)
        self.source = source
        self._target = target
        self._watcher = watcher
        self._splices = _SPLICE is not None
        self.skimmer = skimmer
        self.busy = False
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Pass on until one side ends."""
        try:
            while self._turn():
                pass
        except OSError:
            pass  # the other side no longer reads: this side learns it in the same way
        except BaseException as exc:  # a fault of ours must not look like the end of the conversation
            self.failure = exc
            raise
        finally:
            self.busy = False
            os.close(self._target)
            os.close(self.source)

    def _turn(self) -> bool:
        skimmer = self.skimmer
        self.busy = False
        if self._splices and skimmer.unseen:
            assert _SPLICE is not None
            try:
                count = _SPLICE(self.source, self._target, min(skimmer.unseen, _SPLICE_SIZE))
            except BrokenPipeError:
                raise
            except OSError:  # neither is a pipe, or the target is a file that is appended to
                self._splices = False
                return True
            self.busy = True
            if count:
                self._watcher.note(skimmer, count)
                self._watcher.catch_up()
            return count > 0
        data = os.read(self.source, READ_SIZE)
        if not data:
            return False
        self.busy = True
        self._watcher.note(skimmer, data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._target, view) :]
        self._watcher.catch_up()
        return True

    def drain(self) -> None:
        """Wait until what a dead worker has written is passed on, also if another process still holds the pipe."""
        poller = select.poll()
        poller.register(self.source, select.POLLIN)
        while self.is_alive():
            self.join(_QUIET)
            if not self.busy and not poller.poll(0):
                break


class Tap:
    """Starts a worker, and stands between it and the parent.

    Attributes:
        pid: The worker's.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, command: Sequence[str], reads_stderr: bool) -> None:
        self._command = escaped(shlex.join(command))[:_TITLE]
        # A handler of our own, because a signal that is ignored by default may be lost while it is blocked.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # What the program that has started us ignores, as nohup does, stays ignored here and in the worker.
        self._signals = {number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals | {signal.SIGCHLD, signal.SIGALRM})
        # There is no other thread yet that could hold a lock in the child.
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if reads_stderr else None,
            bufsize=0,
            preexec_fn=_in_worker(before),
        )
        self.pid: int = self._process.pid

    def kill(self) -> None:
        """Kill the worker and reap it."""
        with self._process:  # which closes its streams, and waits for it alone
            self._process.kill()

    def run(self, log: Log, format: str, coloured: bool, append: Callable[[list[bytes]], None] | None) -> int:
        """Pass on what the worker and the parent say to each other until the worker ends.

        Args:
            log: Where lines are written.
            format: See ``Report``.
            coloured: See ``Report``.
            append: Takes the events of a trace; None without one.

        Returns:
            The worker's exit status; the negative number of the signal that has killed it.
        """
        report = Report(log.write, format, coloured=coloured, prefix=f"{self.pid} ")

        def begin(clock: float, start: float) -> None:
            report.note("--", f"monotonic clock {clock:.6f}: {self._command}", "began")
            if append is not None:
                report.trace = Trace(append, self.pid, f"worker {self.pid}: {self._command}", start, _TRACKS)

        watcher = _Watcher(report, log, begin)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        # Descriptors of our own, which subprocess does not close.
        worker_in, worker_out = os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno())
        process.stdin.close()
        process.stdout.close()
        for fd in (worker_in, worker_out):
            grow_pipe(fd)  # fewer, longer turns
        # What is written to stdout by accident must not get between the frames.
        parent_in, parent_out = os.dup(0), os.dup(1)
        os.dup2(2, 1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        there = _Direction(parent_in, worker_in, report.direction(TO_WORKER, TO_PARENT), watcher)
        back = [_Direction(worker_out, parent_out, report.direction(TO_PARENT, TO_WORKER), watcher)]
        if process.stderr is not None:
            back.append(_Direction(os.dup(process.stderr.fileno()), os.dup(2), report.text(TEXT), watcher))
            process.stderr.close()
        for direction in (there, *back):
            direction.start()
        # In a thread, because the log may take nothing, and a signal has to be passed on all the same.
        threading.Thread(target=watcher.catch_up, daemon=True).start()
        status = self._wait()
        for direction in back:
            direction.drain()

        def finish() -> None:
            for arrow, direction in ((TO_WORKER, there), (TO_PARENT, back[0])):
                broken = direction.skimmer.end()
                if broken:
                    report.note(arrow, f"the stream ended {broken}")
                if direction.failure is not None:
                    report.note(arrow, f"the tap has failed: {direction.failure!r}")
            how = f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}"
            report.end(f"the worker (pid {self.pid}) {how}")

        watcher.catch_up(finish)
        return status

    def _wait(self) -> int:
        """Wait for the worker's end, pass on signals, and return its status."""
        process = self._process
        watched = self._signals | {signal.SIGCHLD, signal.SIGALRM}
        told = False
        while True:
            status = process.poll()
            if status is not None:
                break
            number, is_shared = _next_signal(watched)
            if number == signal.SIGALRM:
                process.kill()
            elif number in self._signals and not is_shared:
                process.send_signal(number)
                if number in _ENDING and not told:
                    told = True
                    signal.setitimer(signal.ITIMER_REAL, GRACE)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # The worker is gone: from here on signals are the tap's own, but for those that came before.
        while watched & set(signal.sigpending()):
            signal.sigwait(watched)
        for number in self._signals:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        return status


def _next_signal(watched: set[signal.Signals]) -> tuple[int, bool]:
    """Wait for a signal, and tell whether the worker has it too: a terminal sends Ctrl-C to the whole group."""
    if hasattr(signal, "sigwaitinfo"):
        info = signal.sigwaitinfo(watched)
        return info.si_signo, info.si_code > 0  # from the kernel, and not from a process
    number = signal.sigwait(watched)  # macOS does not tell
    return number, number == signal.SIGINT


def _in_worker(mask: set[signal.Signals | int]) -> Callable[[], None]:
    """Return what the worker does before it executes its command."""
    parent = os.getpid()
    try:
        import ctypes

        prctl = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        prctl = None  # not Linux

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if prctl is not None:
            # SIGKILL, because the one signal that a tap cannot pass on itself is SIGKILL.
            prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)

    return prepare
