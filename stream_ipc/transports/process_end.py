"""The end of a child process that was started here: wait, terminate, kill, reap.

Knows processes. Must not know channels or sessions. No wait here is without a limit.
"""

from __future__ import annotations

import os
import time

from .. import log
from .base import Ending
from .children import DEATH_INTERVAL, exit_text, is_lost, poll, process_name
from .descriptors import READ_SIZE, close_streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any

__all__ = ["ProcessEnding"]

# Seconds that a child has, one after the other: to exit once its stdin is closed, after SIGTERM, after SIGKILL.
EXIT_GRACE = 2.0
TERMINATE_GRACE = 2.0
KILL_GRACE = 2.0


class ProcessEnding(Ending):
    """Ends a process whose stdin was closed, and reads its output all the while.

    Args:
        process: The process.
        outputs: Its streams that are still to be read, which are closed at the end.
        pidfd: Its pidfd, which is closed at the end, or -1.
        unknown: Whether its exit status is lost.
    """

    def __init__(self, process: subprocess.Popen[Any], outputs: list[Any], pidfd: int, unknown: bool) -> None:
        self._process = process
        self._unknown = unknown
        self._stage = "by itself"  # how far its end has gone, for the log
        self._told = False
        self._pidfd = pidfd
        self._outputs = {}
        for stream in outputs:
            if not stream.closed:
                os.set_blocking(stream.fileno(), False)
                self._outputs[stream.fileno()] = stream
        self._stages: list[tuple[float, Any, str]] = [
            (TERMINATE_GRACE, process.terminate, "after SIGTERM"),
            (KILL_GRACE, process.kill, "after SIGKILL"),
        ]
        self._due = time.monotonic() + EXIT_GRACE

    def fds(self) -> list[int]:
        return [*self._outputs, *([self._pidfd] if self._pidfd >= 0 else [])]

    def step(self) -> float | None:
        self._read()
        if is_lost(self._process):
            self._unknown = True
        if poll(self._process) is None:
            now = time.monotonic()
            if now < self._due:
                left = self._due - now
                return left if self._pidfd >= 0 else min(left, DEATH_INTERVAL)
            if self._stages:
                grace, act, self._stage = self._stages.pop(0)
                self._due = now + grace
                try:
                    act()
                except OSError:
                    pass  # it runs as somebody else now: what can be done is to wait
                return min(grace, DEATH_INTERVAL)
            # Not even SIGKILL: it hangs in the kernel. Popen reaps it some day.
            if not self._told:
                self._told = True
                log.error("%s still runs %s, and is left alone", process_name(self._process), self._stage)
        elif not self._told:
            self._told = True
            how = exit_text(self._process, self._unknown)
            log.debug("%s %s, %s", process_name(self._process), how, self._stage)
        self._close()
        return None

    def _read(self) -> None:
        for fd, stream in tuple(self._outputs.items()):
            if stream.closed or self._has_ended(fd):
                close_streams([(stream, fd)])  # before it is forgotten: an interrupted call is made again
                del self._outputs[fd]

    @staticmethod
    def _has_ended(fd: int) -> bool:
        """Read some of an output, and return whether that was all."""
        for _ in range(16):
            try:
                if not os.read(fd, READ_SIZE):
                    return True
            except BlockingIOError:
                return False
            except OSError:
                return True
        return False

    def _close(self) -> None:
        for fd, stream in self._outputs.items():
            close_streams([(stream, fd)])
        self._outputs.clear()
        # atomic: no calls
        fd = self._pidfd  # an interrupted call is made again, and the number may be another's by then
        self._pidfd = -1

        if fd >= 0:
            os.close(fd)

    def forget(self) -> None:
        self._close()
