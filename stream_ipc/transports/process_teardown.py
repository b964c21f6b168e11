"""The end of a child process that was started here: wait, terminate, kill, reap.

Knows processes. Must not know channels or sessions. No wait here is without a limit, unless that is what the caller wants.
"""

from __future__ import annotations

import os
import signal
from collections import deque

from .. import log
from ..clock import monotonic
from ..interruptions import pass_on
from .channel import Teardown
from .children import DEATH_INTERVAL, exit_text, is_lost, poll, process_name
from .descriptors import READ_SIZE, close_streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any

    from .inputs import TextInput

__all__ = ["ProcessTeardown"]

# Seconds that a child has, one after the other: to exit once its stdin is closed, after SIGTERM, after SIGKILL.
EXIT_GRACE = 2.0
TERMINATE_GRACE = 2.0
KILL_GRACE = 2.0

_MESSAGES_MAX = 4096  # lines of stderr that wait to be delivered; more are not read


class ProcessTeardown(Teardown):
    """Ends a process whose stdin was closed, and reads its output all the while.

    Owns its streams and its pidfd, which are closed at the end, and what it writes to stderr until that is delivered.

    Args:
        process: The process.
        text: Its stderr, or None. What comes on its stdout is dropped.
        pidfd: Its pidfd, or -1.
        unknown: Whether its exit status is lost.
        group: Whether it leads a process group. Then signals go to all of that, and what is left of it once the process
            has ended is terminated.
    """

    def __init__(
        self, process: subprocess.Popen[Any], text: TextInput | None, pidfd: int, unknown: bool, group: bool
    ) -> None:
        self.messages: deque[Any] = deque()
        self._process = process
        self._unknown = unknown
        self._group = group
        self._stage = "by itself"  # how far its end has gone, for the log
        self._told = False
        self._pidfd = pidfd
        self._text = text
        self._outputs = {}
        for stream in (process.stdout, process.stderr):
            if stream is not None and not stream.closed:
                fd = stream.fileno()
                try:
                    os.set_blocking(fd, False)
                    self._outputs[fd] = stream
                except OSError as exc:  # it could block, so it is not read
                    pass_on(exc)
                    close_streams([(stream, fd)])
        self._stages: list[tuple[float, int]] = [(TERMINATE_GRACE, signal.SIGTERM), (KILL_GRACE, signal.SIGKILL)]
        self._due = monotonic() + EXIT_GRACE

    def fds(self) -> list[int]:
        return [*self._outputs, *([self._pidfd] if self._pidfd >= 0 else [])]

    def hurry(self, due: float) -> None:
        now = monotonic()
        left = max(0.0, due - now)
        if len(self._stages) == 2 and left:
            self._due = now + left / 2
            self._stages[0] = (left / 2, signal.SIGTERM)
        elif self._stages:
            del self._stages[:-1]
            self._due = now + left

    def step(self) -> float | None:
        self._read()
        if is_lost(self._process):
            self._unknown = True
        if poll(self._process) is None:
            now = monotonic()
            if now < self._due:
                left = self._due - now
                return left if self._pidfd >= 0 else min(left, DEATH_INTERVAL)
            if self._stages:
                stage = self._stages[0]
                grace, number = stage
                self._signal(number)
                # atomic: no calls
                if self._stages and self._stages[0] is stage:  # last: an interrupted step is taken again
                    del self._stages[0]
                self._due = now + grace

                self._stage = f"after {signal.Signals(number).name}"
                return min(grace, DEATH_INTERVAL)
            # Not even SIGKILL: it hangs in the kernel. Popen reaps it some day.
            if not self._told:
                self._told = True
                log.error("%s still runs %s, and is left alone", process_name(self._process), self._stage)
        elif not self._told:
            self._end_group()
            self._told = True
            how = exit_text(self._process, self._unknown)
            if self._stage != "by itself" or (self._process.returncode or 0) >= 0:
                how = f"{how}, {self._stage}"
            log.debug("%s %s", process_name(self._process), how)
        self._read()  # its last words
        self._close()
        return None

    def _signal(self, number: int) -> None:
        try:
            if self._group:
                os.killpg(self._process.pid, number)
            elif number == signal.SIGTERM:
                self._process.terminate()
            else:
                self._process.kill()
        except OSError as exc:  # it runs as somebody else now, or there is none
            pass_on(exc)

    def _end_group(self) -> None:
        """Terminate what is left of the group. Its number is free only once that is gone, too."""
        if self._group:
            self._signal(signal.SIGTERM if self._stages else signal.SIGKILL)

    def _read(self) -> None:
        for fd, stream in tuple(self._outputs.items()):
            if stream.closed or self._has_ended(fd, stream):
                close_streams([(stream, fd)])  # before it is forgotten: an interrupted call is made again
                del self._outputs[fd]

    def _has_ended(self, fd: int, stream: Any) -> bool:
        """Read some of an output, and return whether that was all."""
        text = self._text if stream is self._process.stderr else None
        try:
            for _ in range(16):
                if text is None or text.ended:
                    if not os.read(fd, READ_SIZE):
                        return True
                elif len(self.messages) >= _MESSAGES_MAX:
                    return False
                else:
                    text.read(self.messages)
        except BlockingIOError:
            if text is not None:
                text.flush(self.messages, if_due=True)
        except (OSError, ValueError) as exc:
            pass_on(exc)
            return True
        return False

    def _close(self) -> None:
        if self._text is not None:
            self._text.finish(self.messages)
        for fd, stream in self._outputs.items():
            close_streams([(stream, fd)])
        self._outputs.clear()
        # atomic: no calls
        fd = self._pidfd  # an interrupted call is made again, and the number may be another's by then
        self._pidfd = -1

        if fd >= 0:
            os.close(fd)

    def deliver(self) -> None:
        messages = self.messages
        while messages:
            if self.take is None:
                messages.clear()
            else:
                self.take(messages)

    def abandon(self) -> None:
        self.messages.clear()
        self._text = None
        self._close()
