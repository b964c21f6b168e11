"""A child process's stdio as a transport: attach, spawn, notice its death, say how it died, end it.

Knows processes. Must not know sessions or peers. No wait here is without a limit.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from typing import IO, Any, Deque, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

from ..errors import StreamClosedError
from ..messages import LogMessage
from ..serializers.base import MessageSerializer
from ..wire.codec import Received
from .base import Ending
from .descriptors import READ_SIZE, ReadEnd, close_stream
from .stream import StreamTransport

__all__ = ["Command", "ProcessEnding", "ProcessTransport", "spawn"]

Command = Sequence[Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]]

# Seconds that a child has, one after the other: to exit once its stdin is closed, after SIGTERM, after SIGKILL.
EXIT_GRACE = 2.0
TERMINATE_GRACE = 2.0
KILL_GRACE = 2.0

# Seconds that a child whose stdout has ended has for its exit status to appear. It dies a moment after its pipes do.
STATUS_GRACE = 0.25

# Without a pidfd (macOS, Python 3.8, old kernels) a child's death is looked for this often, in seconds.
_DEATH_INTERVAL = 0.05

_TAIL = 2000  # characters of stderr that are kept for error texts
_SPARE_DESCRIPTORS = 12  # what starting a process takes for a moment


def spawn(
    command: Command,
    cwd: Optional[Union[str, "os.PathLike[str]"]],
    env: Optional[Mapping[str, str]],
    stderr: Union[None, int, IO[Any]],
) -> subprocess.Popen[bytes]:
    """Start a process with pipes for its stdio.

    Raises:
        TypeError: ``command`` is no list of arguments.
        OSError: It cannot be started; no descriptor is lost.
    """
    if isinstance(command, (str, bytes)) or not isinstance(command, Sequence):
        raise TypeError(
            f"command must be a list of arguments, not {command!r:.200}; there is no shell, so pass"
            ' ["python3", "slave.py"] or shlex.split("python3 slave.py")'
        )
    if not command:
        raise ValueError("command is empty; its first item is the program to start")
    _require_descriptors()
    return subprocess.Popen(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=cwd, env=env, bufsize=0
    )


def _require_descriptors() -> None:
    # Popen loses the pipes that it has made when it runs out of descriptors half-way (before Python 3.13).
    spare: List[int] = []
    try:
        for _ in range(_SPARE_DESCRIPTORS):
            spare.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for fd in spare:
            os.close(fd)


def exit_text(process: subprocess.Popen[Any]) -> str:
    """How a process ended, or that it did not."""
    status = process.poll()
    if status is None:
        return "is still running"
    if status == 0 and signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        return "ended (exit status unknown: SIGCHLD is ignored in this process)"
    if status >= 0:
        return f"exited with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "signal"
    return f"was killed by {name} (signal {-status})"


def process_name(process: subprocess.Popen[Any]) -> str:
    """The process as it is named in texts."""
    args: Any = process.args
    if not isinstance(args, (str, bytes)) and isinstance(args, Iterable):
        args = " ".join(shlex.quote(os.fsdecode(arg)) for arg in args)
    return f"child process {os.fsdecode(args)!r:.100} (pid {process.pid})"


class ProcessTransport(StreamTransport):
    """Messages over the stdin and stdout of a child process, and text from its stderr.

    Args:
        process: A ``Popen`` with ``stdin=PIPE, stdout=PIPE``.
        owned: Whether the process is ended with the transport.
        serializer: As in ``StreamTransport``.
        max_frame_size: As in ``StreamTransport``.

    Raises:
        ValueError: The Popen is unsuitable; the text says what to pass.
    """

    def __init__(
        self, process: subprocess.Popen[Any], owned: bool, serializer: MessageSerializer, max_frame_size: int
    ) -> None:
        for name in ("stdin", "stdout"):
            stream = getattr(process, name, None)
            if stream is None or stream.closed:
                state = "closed" if stream is not None else "not a pipe"
                raise ValueError(
                    f"the {name} of {process!r:.200} is {state}; start it with subprocess.Popen(..., stdin=PIPE,"
                    " stdout=PIPE)"
                )
        self.process = process
        self._owned = owned
        self._tail = ""
        self._dead = False
        self._pidfd = -1
        self._status_due: Optional[float] = None  # set while an ended stdout waits for the exit status
        super().__init__(process.stdin, (process.stdout,), serializer, max_frame_size)
        if process.stderr is not None and not process.stderr.closed:
            self._add_input(ReadEnd(process.stderr), None, LogMessage.LEVEL_STDERR)
        if hasattr(os, "pidfd_open"):
            try:
                self._pidfd = os.pidfd_open(process.pid)
            except OSError:
                pass  # an old kernel, or it was reaped already: poll() will tell

    def read_fds(self) -> Sequence[int]:
        fds = super().read_fds()
        return (*fds, self._pidfd) if self._pidfd >= 0 and not self._dead else fds

    @property
    def poll_interval(self) -> Optional[float]:
        if self._status_due is not None or (self._pidfd < 0 and not self._dead):
            return _DEATH_INTERVAL
        return super().poll_interval

    def receive_into(self, inbox: Deque[Received], fd: int) -> None:
        if fd == self._pidfd and fd >= 0:
            self._died(inbox)
        elif fd >= 0:
            super().receive_into(inbox, fd)
        else:
            super().receive_into(inbox, fd)
            if self.process.poll() is not None:
                self._died(inbox)
            elif self._status_due is not None and time.monotonic() >= self._status_due:
                self.drain(inbox)
                raise StreamClosedError(self._ended_text()) from self._error

    def _died(self, inbox: Deque[Received]) -> None:
        """The process is dead, whoever may still hold its pipes: what it had written is read, then this is the end."""
        self.process.poll()
        self._dead = True
        self.changed()
        self.drain(inbox)
        raise StreamClosedError(self._ended_text()) from self._error

    def _ended(self, inbox: Deque[Received]) -> None:
        if self._dead or self.process.poll() is not None:
            self._dead = True
            self.drain(inbox)
            raise StreamClosedError(self._ended_text()) from self._error
        if self._status_due is None:
            self._status_due = time.monotonic() + STATUS_GRACE
            self.changed()

    def note_text(self, text: str) -> None:
        self._tail = (self._tail + text)[-_TAIL:]

    def _ended_text(self) -> str:
        state = exit_text(self.process)
        text = f"{process_name(self.process)} {state}"
        if state == "is still running":
            text = f"{process_name(self.process)} closed its stdout but {state}"
        if self._where:
            text += f" {self._where}"
        return text + self._tail_text()

    def _tail_text(self) -> str:
        tail = self._tail.strip()
        return f"; the end of its stderr:\n{tail}" if tail else ""

    def _broken_text(self) -> str:
        # A child that is dying closes its stdin first; its status is there a moment later.
        try:
            self.process.wait(0.05)
        except subprocess.TimeoutExpired:
            return f"{process_name(self.process)} no longer reads its stdin: {self._broken}" + self._tail_text()
        return self._ended_text()

    def end(self) -> Optional[Ending]:
        if not self._owned:
            self._close_pidfd()
            return super().end()
        stdin, outputs = self.process.stdin, (self.process.stdout, self.process.stderr)
        pidfd, self._pidfd = self._pidfd, -1
        super().release()
        if stdin is not None:
            close_stream(stdin, -1)
        return ProcessEnding(self.process, [out for out in outputs if out is not None], pidfd)

    def release(self) -> None:
        self._close_pidfd()
        super().release()

    def _close_pidfd(self) -> None:
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            self._dead = True
            os.close(fd)

    def describe(self) -> str:
        return f"pid {self.process.pid}"


class ProcessEnding(Ending):
    """Ends a process whose stdin was closed: waits, terminates, kills, reaps, and reads its output all the while."""

    def __init__(self, process: subprocess.Popen[Any], outputs: List[Any], pidfd: int) -> None:
        self._process = process
        self._pidfd = pidfd
        self._outputs = {}
        for stream in outputs:
            if not stream.closed:
                os.set_blocking(stream.fileno(), False)
                self._outputs[stream.fileno()] = stream
        self._stages: List[Tuple[float, Any]] = [
            (TERMINATE_GRACE, process.terminate),
            (KILL_GRACE, process.kill),
        ]
        self._due = time.monotonic() + EXIT_GRACE

    def fds(self) -> List[int]:
        return [*self._outputs, *([self._pidfd] if self._pidfd >= 0 else [])]

    def step(self) -> Optional[float]:
        self._read()
        if self._process.poll() is None:
            now = time.monotonic()
            if now < self._due:
                left = self._due - now
                return left if self._pidfd >= 0 else min(left, _DEATH_INTERVAL)
            if self._stages:
                grace, act = self._stages.pop(0)
                self._due = now + grace
                act()
                return min(grace, _DEATH_INTERVAL)
            # Not even SIGKILL: it hangs in the kernel. Popen reaps it some day.
        self._close()
        return None

    def _read(self) -> None:
        for fd, stream in tuple(self._outputs.items()):
            for _ in range(16):
                try:
                    if os.read(fd, READ_SIZE):
                        continue
                except BlockingIOError:
                    break
                except OSError:
                    pass
                del self._outputs[fd]
                close_stream(stream, fd)
                break

    def _close(self) -> None:
        for fd, stream in self._outputs.items():
            close_stream(stream, fd)
        self._outputs.clear()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def forget(self) -> None:
        self._close()

