"""Stands between a parent and a worker: what ``python3 -m stream_ipc tap`` is.

Knows descriptors, processes, signals and threads. Must not know frames: a ``Report`` does.

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
from functools import partial
from io import FileIO
from typing import IO, Any, Callable, Sequence

from .files import Log, Trace
from .payloads import escaped
from .report import Report

__all__ = ["GRACE", "Direction", "Tap", "Watcher"]

_TRACKS = {"->": "-> to the worker", "<-": "<- from the worker", "stderr": "stderr"}

_READ_SIZE = 64 * 1024
_QUIET = 0.1  # seconds without output after which a dead worker's pipe, which another process still holds, is left
GRACE = 5.0  # seconds until a worker that was told to end is killed
_TITLE = 160  # characters of the worker's command

_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_FORWARDED = _ENDING | {signal.SIGUSR1, signal.SIGUSR2}

_PR_SET_PDEATHSIG = 1


class Watcher:
    """Looks at what has passed, in whichever thread has the time. Owns what is still to be looked at."""

    def __init__(self, report: Report, log: Log, trace: Trace | None) -> None:
        self._report = report
        self._log = log
        self._trace = trace
        self._passed: deque[tuple[float, Callable[[], Any]]] = deque()
        self._lock = threading.Lock()

    def note(self, look: Callable[[], Any]) -> None:
        """Take note of what is about to be passed on; ``look`` tells the report of it."""
        self._passed.append((time.monotonic(), look))

    def catch_up(self) -> None:
        """Look at all of it."""
        with self._lock, self._log.turn() as self._report.time:
            while self._passed:
                self._report.now, look = self._passed.popleft()
                look()
            if self._trace is not None:
                self._trace.flush()


class Direction(threading.Thread):
    """Passes bytes on from one file to another until the end. Owns both."""

    def __init__(self, source: IO[bytes], target: IO[bytes], look: Callable[[bytes], Any], watcher: Watcher) -> None:
        super().__init__(daemon=True)
        self._source = source
        self._target = target
        self._look = look
        self._watcher = watcher
        self._fd = source.fileno()
        self._busy = False

    def run(self) -> None:
        """Pass on until one side ends."""
        poller = _poller(self._fd)
        with self._source, self._target:
            try:
                while True:
                    self._busy = False
                    poller.poll()
                    self._busy = True  # before the pipe is empty
                    data = self._source.read(_READ_SIZE)
                    if not data:
                        break
                    self._watcher.note(partial(self._look, data))
                    view = memoryview(data)
                    while view:
                        view = view[self._target.write(view) :]
                    self._watcher.catch_up()
            except OSError:
                pass  # the other side no longer reads: this side learns it in the same way

    def drain(self) -> None:
        """Wait until what a dead worker has written is passed on, also if another process still holds the pipe."""
        poller = _poller(self._fd)
        while self.is_alive():
            self.join(_QUIET)
            if not poller.poll(0) and not self._busy:
                break


def _poller(fd: int) -> select.poll:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return poller


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
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals | {signal.SIGCHLD})
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
        with self._process:  # which closes its streams, and waits for it alone
            self._process.kill()

    def run(self, log: Log, trace: Trace | None, format: str, coloured: bool) -> int:
        """Pass on what the worker and the parent say to each other until the worker ends.

        Returns its exit status, or the negative number of the signal that has killed it.
        """
        report = Report(log.write, ("->", "<-"), format, coloured, f"{self.pid} ", trace)
        watcher = Watcher(report, log, trace)
        watcher.note(lambda: report.line("--", "began", f"monotonic clock {log.clock:.6f}: {self._command}"))
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        there = Direction(FileIO(0), process.stdin, partial(report.feed, "->"), watcher)
        back = [Direction(process.stdout, FileIO(1, "w"), partial(report.feed, "<-"), watcher)]
        if process.stderr is not None and trace is not None:
            trace.begin(self.pid, f"worker {self.pid}: {self._command}", _TRACKS)
            look = partial(report.text, "stderr", "stderr")
            back.append(Direction(process.stderr, FileIO(os.dup(2), "w"), look, watcher))
        for direction in (there, *back):
            direction.start()
        # In a thread, because the log may take nothing, and a signal has to be passed on all the same.
        threading.Thread(target=watcher.catch_up, daemon=True).start()
        status = self._wait()
        for direction in back:
            direction.drain()
        how = f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}"
        watcher.note(lambda: report.finish(f"the worker (pid {self.pid}) {how}"))
        watcher.catch_up()
        return status

    def _wait(self) -> int:
        """Wait for the worker's end, pass on signals, and return its status."""
        process = self._process
        watched = self._signals | {signal.SIGCHLD}
        killer = threading.Timer(GRACE, process.kill)
        killer.daemon = True
        while process.poll() is None:
            number, is_shared = _next_signal(watched)
            if number in self._signals and not is_shared:
                process.send_signal(number)
                if number in _ENDING and killer.ident is None:
                    killer.start()
        # The worker is gone: from here on signals are the tap's own, but for those that came before.
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        return process.wait()


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
