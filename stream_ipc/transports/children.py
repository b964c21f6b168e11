"""Child processes: whether one lives, how it ended, and the end of one that was started here.

Knows processes, and what is read of one while it ends. Must not know channels or sessions. No wait here is without a
limit.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import time
from collections import deque
from collections.abc import Iterable
from functools import partial

from .. import log
from ..clock import monotonic
from ..interruptions import pass_on
from .channel import Teardown
from .descriptors import READ_SIZE, close_stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from typing import Any

    from .inputs import TextInput

__all__ = ["DEATH_INTERVAL", "Child", "ProcessTeardown", "kill", "process_name"]

# Without a pidfd (macOS, old kernels) a child's death is looked for this often, in seconds.
DEATH_INTERVAL = 0.05

# Seconds that a child has, one after the other: to exit once its stdin is closed, after SIGTERM, after SIGKILL.
EXIT_GRACE = 2.0
TERMINATE_GRACE = 2.0
KILL_GRACE = 2.0

_MESSAGES_MAX = 4096  # lines of stderr that wait to be delivered; more are not read while it lives


def process_name(process: subprocess.Popen[Any]) -> str:
    """Return the process as it is named in texts."""
    args: Any = process.args
    if not isinstance(args, (str, bytes)) and isinstance(args, Iterable):
        args = shlex.join([os.fsdecode(arg) for arg in args])
    text = os.fsdecode(args)
    if len(text) > 100:
        text = f"{text[:97]}..."
    return f"child process {text!r} (pid {process.pid})"


class Child:
    """A child process, whoever has started it.

    Owns its pidfd, and what is known of its death.

    Args:
        process: The process.
        group: Whether it leads a process group. Then signals go to all of that.

    Attributes:
        process: See above.
        pidfd: Becomes readable when it dies; -1 if there is none, or it is closed.
        may_be_dead: Returns whether it is worth while to ask for its status; takes how long to wait, in milliseconds: 0.
    """

    pidfd: int = -1

    def __init__(self, process: subprocess.Popen[Any], group: bool) -> None:
        self.process: subprocess.Popen[Any] = process
        self.may_be_dead: Callable[[], Any] = _always
        self._group = group
        self._reaped: tuple[int, int] = (0, 0)  # its pid once it is, and what the system said
        self._status: int | None = None  # as the system has told it
        self._lost = False  # whether that is lost

    def __del__(self) -> None:
        """Close what an interruption has lost before anybody got it."""
        self.close()

    def watch(self) -> None:
        """Have the system tell when it dies."""
        if hasattr(os, "pidfd_open"):
            try:
                for self.pidfd in map(os.pidfd_open, (self.process.pid,)):  # stored before a signal is looked at
                    break
            except OSError as exc:  # an old kernel, or it was reaped already: the system is asked
                pass_on(exc)
            else:
                poller = select.poll()
                poller.register(self.pidfd, select.POLLIN)
                self.may_be_dead = partial(poller.poll, 0)

    def close(self) -> None:
        """Close the pidfd. An interrupted call can be made again."""
        # atomic: no calls
        fd = self.pidfd
        self.pidfd = -1
        self.may_be_dead = _always  # the number may be another file's

        if fd >= 0:
            os.close(fd)

    def status(self) -> int | None:
        """Ask the system for its exit status; return it, or None while it runs.

        The system tells without reaping it, which is left to ``Popen``: another thread may be inside ``Popen.wait``, and
        would make a status up. ``Popen.poll`` alone says None for ever once an exception of a signal handler has left its
        lock held, and 0 where SIGCHLD is ignored or something else in this program waits for any child.
        """
        process = self.process
        if process.returncode is None and self._status is None:
            try:
                if not hasattr(os, "waitid"):  # macOS before Python 3.13
                    self.reap()
                    return process.returncode
                info = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if info is not None:
                    self._status = info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
            except ChildProcessError:
                self._lost = process.poll() == 0  # made up; None if another thread has just got it, and stores it next
            except OSError as exc:
                pass_on(exc)
        if self._status is None:
            return process.returncode
        if process.returncode != self._status:
            process.poll()
            if process.returncode is not None:
                process.returncode = self._status  # an interrupted poll() has lost it, and made one up now
        return self._status

    def reap(self) -> None:
        """Reap it, if it is dead and ``Popen`` has not done so. An interrupted call can be made again."""
        process = self.process
        if process.returncode is None:
            if not self._reaped[0]:
                for self._reaped in map(os.waitpid, (process.pid,), (os.WNOHANG,)):  # stored before a signal is looked at
                    break
            if self._reaped[0]:
                process.returncode = os.waitstatus_to_exitcode(self._reaped[1])

    def end_text(self) -> str:
        """Return how it ended, or that only its stdout did."""
        status = self.status()
        if status is None:
            return "closed its stdout but is still running"
        if self._lost:
            return "ended (exit status unknown: something else in this process reaps its children)"
        if status >= 0:
            return f"exited with exit status {status}"
        try:
            return f"was killed by {signal.Signals(-status).name} (signal {-status})"
        except ValueError:  # a real-time signal has no name
            return f"was killed by signal {-status}"

    def send_signal(self, number: int) -> None:
        """Send it a signal, or all of its group."""
        try:
            if self._group:
                os.killpg(self.process.pid, number)  # whose number is free only once the last of the group is gone, too
            else:
                self.process.send_signal(number)  # nothing if it has ended
        except OSError as exc:  # it runs as somebody else now, or there is none
            pass_on(exc)


def _always() -> bool:
    return True


class ProcessTeardown(Teardown):
    """Ends a child whose stdin was closed, and reads its output all the while. What is left of its group is terminated.

    Owns its streams, which are closed at the end as its pidfd is, and what it writes to stderr until that is delivered.

    Args:
        child: The child.
        text: Its stderr, or None. What comes on its stdout is dropped.
    """

    def __init__(self, child: Child, text: TextInput | None) -> None:
        self.messages: deque[Any] = deque()
        self._child = child
        self._text = text
        self._stage = "by itself"  # how far its end has gone, for the log
        self._told = False
        self._outputs: dict[int, Any] = {}
        for stream in (child.process.stdout, child.process.stderr):
            if stream is not None and not stream.closed:
                try:
                    os.set_blocking(stream.fileno(), False)
                    self._outputs[stream.fileno()] = stream
                except OSError as exc:  # it could block, so it is not read
                    pass_on(exc)
                    close_stream(stream)
        self._stages: list[tuple[float, int]] = [(TERMINATE_GRACE, signal.SIGTERM), (KILL_GRACE, signal.SIGKILL)]
        self._due = monotonic() + EXIT_GRACE

    def fds(self) -> list[int]:
        return [fd for fd in (*self._outputs, self._child.pidfd) if fd >= 0]

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
        child = self._child
        if child.status() is None:
            now = monotonic()
            if now < self._due:
                return min(self._due - now, DEATH_INTERVAL)
            if self._stages:
                stage = self._stages[0]
                grace, number = stage
                child.send_signal(number)
                # atomic: no calls
                if self._stages and self._stages[0] is stage:  # last: an interrupted step is taken again
                    del self._stages[0]
                self._due = now + grace

                self._stage = f"after {signal.Signals(number).name}"
                return min(grace, DEATH_INTERVAL)
            # Not even SIGKILL: it hangs in the kernel. Popen reaps it some day.
            if not self._told:
                self._told = True
                log.error("%s still runs %s, and is left alone", process_name(child.process), self._stage)
        elif not self._told:
            try:
                child.reap()
            except OSError as exc:  # another thread has just done so
                pass_on(exc)
            child.send_signal(signal.SIGTERM if self._stages else signal.SIGKILL)  # to what is left of its group
            self._told = True
            how = child.end_text()
            if self._stage != "by itself" or (child.status() or 0) >= 0:
                how = f"{how}, {self._stage}"
            log.debug("%s %s", process_name(child.process), how)
        self._read(len(self.messages) + READ_SIZE)  # its last words: no more lines than a pipe has bytes
        self._close()
        return None

    def _read(self, most: int = _MESSAGES_MAX) -> None:
        for fd, stream in self._outputs.copy().items():
            if stream.closed or self._has_ended(fd, stream, most):
                close_stream(stream)  # before it is forgotten: an interrupted call is made again
                del self._outputs[fd]

    def _has_ended(self, fd: int, stream: Any, most: int) -> bool:
        """Read some of an output, while no more than so many messages wait; return whether that was all."""
        text = self._text if stream is self._child.process.stderr else None
        try:
            for _ in range(16):
                if text is None or text.ended:
                    if not os.read(fd, READ_SIZE):
                        return True
                elif len(self.messages) >= most:
                    return False
                else:
                    text.read(self.messages)
        except BlockingIOError:
            if text is not None:
                text.give_out(self.messages, if_due=True)
        except (OSError, ValueError) as exc:
            pass_on(exc)
            return True
        return False

    def _close(self) -> None:
        if self._text is not None:
            self._text.finish(self.messages)
        for stream in self._outputs.values():
            close_stream(stream)
        self._outputs.clear()
        self._child.close()

    def abandon(self) -> None:
        self.messages.clear()
        self._text = None
        self._close()


def kill(process: subprocess.Popen[Any], group: bool = False) -> None:
    """End a process, or all of its group, at once, close its streams and reap it, though one interruption comes."""
    try:
        _kill(process, group)
    except BaseException:
        _kill(process, group)
        raise


def _kill(process: subprocess.Popen[Any], group: bool) -> None:
    for stream in (process.stdin, process.stdout, process.stderr):  # first: these end also what may not be killed
        close_stream(stream)
    teardown = ProcessTeardown(Child(process, group), None)
    teardown.hurry(0)
    while teardown.step() is not None:
        time.sleep(0.001)
