"""Stands between a master and a slave: what ``python3 -m stream_ipc tap`` is.

Knows descriptors, processes and threads. Must not know frames beyond what a ``Skimmer`` says about them.

Each direction has a thread that reads and writes blocking descriptors, so what one side does not take is simply not
taken from the other, as if there were nothing in between. A loop over non-blocking descriptors would need queues, and
the flags of stdin and stdout are shared with whoever has started us. Bytes are passed on first and looked at then, but
in the order in which they came: a reply before what the master says to it.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections import deque
from typing import Any, Callable, Deque, List, Optional, Sequence, TextIO, Tuple, Union

from .report import Report, Skimmer

__all__ = ["decode", "tap"]

TO_SLAVE, TO_MASTER = "->", "<-"

_READ_SIZE = 64 * 1024
# Of a large payload only the beginning is looked at. The rest goes from pipe to pipe inside the kernel, where there is
# splice (Linux, Python 3.10): see the figures in the README.
_SPLICE: Optional[Callable[..., int]] = getattr(os, "splice", None)
_SPLICE_SIZE = 1024 * 1024
_PIPE_SIZE = 1024 * 1024  # of the pipes of the slave: fewer, longer turns
_F_SETPIPE_SZ = 1031  # fcntl.F_SETPIPE_SZ, which Python knows since 3.10

_QUIET = 0.1  # seconds without output after which a dead slave's pipe, which somebody else still holds, is given up

_FORWARDED = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class _Log:
    """What has passed and is still to be looked at, by whichever thread has the time."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._start = time.perf_counter()
        self._passed: Deque[Tuple[float, Skimmer, Union[bytes, int]]] = deque()
        self._lock = threading.Lock()

    def note(self, skimmer: Skimmer, passed: Union[bytes, int]) -> None:
        """Bytes are about to be passed on, or so many have been that need not be seen."""
        self._passed.append((time.perf_counter() - self._start, skimmer, passed))

    def catch_up(self) -> None:
        """Look at all of it."""
        with self._lock:
            while self._passed:
                self._report.now, skimmer, passed = self._passed.popleft()
                if isinstance(passed, int):
                    skimmer.skip(passed)
                else:
                    skimmer.feed(passed)


class _Direction(threading.Thread):
    """Passes bytes on from one descriptor to another until the end."""

    def __init__(self, source: int, target: int, skimmer: Skimmer, log: _Log) -> None:
        super().__init__(daemon=True)
        self._source = source
        self._target = target
        self._log = log
        self._splices = _SPLICE is not None
        self.skimmer = skimmer
        self.busy = False
        self.failure: Optional[BaseException] = None

    def run(self) -> None:
        try:
            while self._turn():
                pass
        except OSError:
            # The other side no longer reads: let this side know in the way in which it would have known.
            os.close(self._source)
        except BaseException as exc:  # a fault of ours must not look like the end of the conversation
            self.failure = exc
            raise
        finally:
            self.busy = False
            os.close(self._target)

    def _turn(self) -> bool:
        skimmer = self.skimmer
        self.busy = False
        if self._splices and skimmer.unseen:
            assert _SPLICE is not None
            try:
                count = _SPLICE(self._source, self._target, min(skimmer.unseen, _SPLICE_SIZE))
            except BrokenPipeError:
                raise
            except OSError:  # neither is a pipe, or the target is a file that is appended to
                self._splices = False
                return True
            self.busy = True
            if count:
                self._log.note(skimmer, count)
                self._log.catch_up()
            return count > 0
        data = os.read(self._source, _READ_SIZE)
        if not data:
            return False
        self.busy = True
        self._log.note(skimmer, data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._target, view) :]
        self._log.catch_up()
        return True


def tap(command: Sequence[str], format: str, log: TextIO, coloured: bool) -> int:
    """Start a slave and pass on what it and the master say to each other, until it ends.

    Args:
        command: The slave's command.
        format: One of ``payloads.FORMATS``, or an empty text.
        log: Where lines are written.
        coloured: Whether with a terminal's colours.

    Returns:
        The slave's exit status; the negative number of the signal that has killed it.

    Raises:
        OSError: It cannot be started.
    """
    write = _writer(log)
    report = Report(write, format, coloured=coloured)
    passed = _Log(report)
    process = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None and process.stdout is not None
    _forward_signals(process)
    # Descriptors of our own, that nobody else closes at some other time.
    slave_in, slave_out = os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno())
    process.stdin.close()
    process.stdout.close()
    for fd in (slave_in, slave_out):
        _enlarge(fd)
    # What is to be written to stdout by accident must not get between the frames.
    master_in, master_out = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    to_slave = _Direction(master_in, slave_in, report.direction(TO_SLAVE, TO_MASTER), passed)
    to_master = _Direction(slave_out, master_out, report.direction(TO_MASTER, TO_SLAVE), passed)
    to_slave.start()
    to_master.start()
    status = process.wait()
    # What it has written is passed on, also if a process that it has started still holds the pipe.
    poller = select.poll()
    poller.register(slave_out, select.POLLIN)
    while to_master.is_alive():
        to_master.join(_QUIET)
        if not to_master.busy and not poller.poll(0):
            break
    passed.catch_up()
    for arrow, direction in ((TO_SLAVE, to_slave), (TO_MASTER, to_master)):
        broken = direction.skimmer.end()
        if broken:
            report.note(arrow, f"the stream ended {broken}")
        if direction.failure is not None:
            report.note(arrow, f"the tap has failed: {direction.failure!r}")
    how = f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}"
    write(f"the slave (pid {process.pid}) {how}\n{report.summary()}")
    return status


def _forward_signals(process: subprocess.Popen[bytes]) -> None:
    def forward(number: int, frame: Any) -> None:
        process.send_signal(number)

    for name in _FORWARDED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C goes to the whole group: the slave decides
    # A write to who is gone is an error, and not the end of us: Python's own default, but who knows who has started us.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _enlarge(fd: int) -> None:
    try:
        import fcntl

        fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE_SIZE)
    except (ImportError, OSError):
        pass  # not Linux, or more than this user may have


def _writer(log: TextIO) -> Callable[[str], None]:
    def write(text: str) -> None:
        try:
            log.write(text)
            log.flush()
        except (OSError, ValueError):
            pass  # nobody reads the log any more, which is no reason to end the conversation

    return write


def decode(read: Callable[[int], bytes], format: str, log: TextIO, coloured: bool) -> bool:
    """Write a line for each frame of a captured stream, and a summary.

    Args:
        read: Returns at most so many bytes, none at the end.
        format: One of ``payloads.FORMATS``, or an empty text.
        log: Where lines are written.
        coloured: Whether with a terminal's colours.

    Returns:
        Whether all of it could be read.
    """
    broken: List[str] = []
    report = Report(log.write, format, False, coloured)
    skimmer = report.direction("--", "--")
    while True:
        data = read(_READ_SIZE)
        if not data:
            break
        skimmer.feed(data)
    text = skimmer.end()
    if text:
        report.note("--", f"the stream ends {text}")
        broken.append(text)
    log.write(report.summary())
    return not broken
