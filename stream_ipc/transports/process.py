"""A child process's stdio as a transport: attach, spawn, notice its death, say how it died, end it.

Knows processes. Must not know sessions or peers. No wait here is without a limit.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence

from .. import log
from ..errors import StreamClosedError
from ..messages import LogMessage
from .base import Ending
from .descriptors import READ_SIZE, ReadEnd, close_streams
from .stream import StreamTransport, open_end

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any, Deque, Iterator, List, NoReturn, Optional, Protocol, Tuple, TypeVar, Union

    from ..protocols import MessageSerializer
    from ..wire.codec import Received

    T_co = TypeVar("T_co", covariant=True)

    class Items(Protocol[T_co]):
        """A sequence that is no str and no bytes, which are sequences too: these do not contain any ``object``."""

        def __len__(self) -> int: ...

        def __getitem__(self, index: int, /) -> T_co: ...

        def __iter__(self) -> Iterator[T_co]: ...

        def __contains__(self, value: object, /) -> bool: ...

    Path = Union[str, bytes, os.PathLike[str], os.PathLike[bytes]]
    Command = Items[Path]

__all__ = ["ProcessEnding", "ProcessTransport", "spawn"]

# Seconds that a child has, one after the other: to exit once its stdin is closed, after SIGTERM, after SIGKILL.
EXIT_GRACE = 2.0
TERMINATE_GRACE = 2.0
KILL_GRACE = 2.0

# Seconds that a child whose stdout has ended has for its exit status to appear. It dies a moment after its pipes do.
STATUS_GRACE = 0.25

# The same for one that no longer reads its stdin: the call that has found this out waits so long.
_DYING_GRACE = 0.05

# Without a pidfd (macOS, Python 3.8, old kernels) a child's death is looked for this often, in seconds.
_DEATH_INTERVAL = 0.05

_TAIL = 2000  # characters of stderr that are kept for error texts
_SPARE_DESCRIPTORS = 12  # what starting a process takes for a moment


def spawn(
    command: Command,
    cwd: Optional[Path],
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
    if env is not None and not isinstance(env, Mapping):
        raise TypeError(f"env must be a dict of names and values, not {env!r:.200}")
    if not (stderr is None or isinstance(stderr, int) or hasattr(stderr, "fileno")):
        raise TypeError(f"stderr must be subprocess.PIPE, None, a descriptor or a file, not {stderr!r:.200}")
    _require_descriptors()
    return subprocess.Popen(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=cwd, env=env, bufsize=0
    )


def kill(process: subprocess.Popen[Any]) -> None:
    """End a process at once, reap it and close its streams."""
    process.kill()
    close_streams([(stream, -1) for stream in (process.stdin, process.stdout, process.stderr) if stream is not None])
    process.wait()


def _require_descriptors() -> None:
    # Popen loses the pipes that it has made when it runs out of descriptors half-way (before Python 3.13).
    spare: List[int] = []
    try:
        for _ in range(_SPARE_DESCRIPTORS):
            spare.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as exc:
        if exc.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        text = f"{exc.strerror}: starting a process takes {_SPARE_DESCRIPTORS} descriptors for a moment"
        raise OSError(exc.errno, f"{text}; close some, or raise the limit (ulimit -n)") from exc
    finally:
        for fd in spare:
            os.close(fd)


def exit_text(process: subprocess.Popen[Any], unknown: bool) -> str:
    """How a process ended, or that it did not."""
    status = process.poll()
    if status is None:
        return "is still running"
    if unknown:
        return "ended (exit status unknown: something else in this process reaps its children)"
    if status >= 0:
        return f"exited with exit status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name} (signal {-status})"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-status}"


def process_name(process: subprocess.Popen[Any]) -> str:
    """The process as it is named in texts."""
    args: Any = process.args
    if not isinstance(args, (str, bytes)) and isinstance(args, Iterable):
        args = " ".join(shlex.quote(os.fsdecode(arg)) for arg in args)
    text = os.fsdecode(args)
    if len(text) > 100:
        text = f"{text[:97]}..."
    return f"child process {text!r} (pid {process.pid})"


def poll(process: subprocess.Popen[Any]) -> Optional[int]:
    """The exit status of a process, or None while it runs."""
    status = process.poll()
    if status is None and hasattr(os, "WNOHANG"):
        # An exception that a signal handler raises inside Popen.poll() can leave its lock held, and then it says None for
        # ever. Asking the system is right in any case.
        try:
            _reap(process)
        except OSError:
            return process.poll()
        status = process.returncode
    return status


def _reap(process: subprocess.Popen[Any]) -> None:
    pid, code = os.waitpid(process.pid, os.WNOHANG)
    if pid:
        process.returncode = -os.WTERMSIG(code) if os.WIFSIGNALED(code) else os.WEXITSTATUS(code)


def is_lost(process: subprocess.Popen[Any]) -> bool:
    """Whether nobody can say any more how a process ended; to be asked before ``poll``, which says 0 then.

    So it is if SIGCHLD is ignored, or if something else in this program waits for any child.
    """
    if process.returncode is None:
        try:
            if hasattr(os, "waitid"):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            elif hasattr(os, "WNOHANG"):  # macOS before Python 3.13
                _reap(process)
        except ChildProcessError:
            return True
        except OSError:
            pass
    return False


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
        if not all([hasattr(process, name) for name in ("pid", "stdin", "stdout")]):
            raise ValueError(f"a session is attached to a subprocess.Popen, not to {process!r:.200}")
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
        self._tail = ""  # of stderr
        self._junk = ""  # of what was printed to stdout between frames
        self._dead = False
        self._pidfd = -1
        self._unknown = False  # its exit status is lost
        self._broken_error: Optional[StreamClosedError] = None
        self._ending: Optional[ProcessEnding] = None
        self._status_due: Optional[float] = None  # set while an ended stdout waits for the exit status
        assert process.stdin is not None and process.stdout is not None
        super().__init__(process.stdin, (process.stdout,), serializer, max_frame_size)
        if process.stderr is not None and not process.stderr.closed:
            errors = open_end(ReadEnd, process.stderr)
            self._add_input(errors, None, LogMessage.LEVEL_STDERR)
            errors.start()
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

    @property
    def rest(self) -> float:
        return 0.0 if self._ahead else _DEATH_INTERVAL  # asking the system is dear if there are many children

    def _receive_other(self, inbox: Deque[Received], fd: int) -> None:
        if fd >= 0 and fd == self._pidfd:
            self._died(inbox)
        super()._receive_other(inbox, fd)
        if self._poll() is not None:
            self._died(inbox)
        elif self._status_due is not None and time.monotonic() >= self._status_due:
            self.drain(inbox)
            raise StreamClosedError(self._ended_text()) from self._error

    def _poll(self) -> Optional[int]:
        """The exit status, or None while it runs."""
        if is_lost(self.process):
            self._unknown = True
        return poll(self.process)

    def _died(self, inbox: Deque[Received]) -> None:
        """The process is dead, whoever may still hold its pipes: what it had written is read, then this is the end."""
        self._poll()
        self._dead = True
        self.changed()
        self.drain(inbox)
        raise StreamClosedError(self._ended_text()) from self._error

    def _ended(self, inbox: Deque[Received]) -> None:
        if self._dead or self._poll() is not None:
            self._dead = True
            self.drain(inbox)
            raise StreamClosedError(self._ended_text()) from self._error
        if self._status_due is None:
            self._status_due = time.monotonic() + STATUS_GRACE
            self.changed()

    def note_text(self, text: str) -> None:
        self._tail = (self._tail + text)[-_TAIL:]

    def _ended_text(self) -> str:
        state = exit_text(self.process, self._unknown)
        text = f"{process_name(self.process)} {state}"
        if state == "is still running":
            text = f"{process_name(self.process)} closed its stdout but {state}"
        if self._where:
            text += f" {self._where}"
        return text + self._tail_text()

    def _tail_text(self) -> str:
        tail = self._tail.strip()
        if tail:
            return f"; the end of its stderr:\n{tail}"
        # Not every program has the sense to complain on stderr: PHP without a php.ini does not.
        junk = self._junk.strip()
        return f"; the last that it printed to its stdout:\n{junk}" if junk else ""

    def note_junk(self, text: str) -> None:
        self._junk = (self._junk + text)[-_TAIL:]

    def _raise_broken(self) -> NoReturn:
        self._broken_error = StreamClosedError(self._broken_text())
        raise self._broken_error from self._broken

    def drain(self, inbox: Deque[Received]) -> None:
        super().drain(inbox)
        if self._broken_error is not None:
            # Its last words are known only now, and the error is on its way already.
            self._broken_error.args = (self._broken_text(),)
            self._broken_error = None

    def _broken_text(self) -> str:
        # A child that is dying closes its stdin first; its status is there a moment later.
        due = time.monotonic() + _DYING_GRACE
        while self._poll() is None:
            if time.monotonic() >= due:
                text = f"{process_name(self.process)} no longer reads its stdin: {self._broken}"
                return text + self._tail_text()
            time.sleep(0.001)
        return self._ended_text()

    def end(self) -> Optional[Ending]:
        if not self._owned:
            self._close_pidfd()
            return super().end()
        outputs = [out for out in (self.process.stdout, self.process.stderr) if out is not None]
        if self._output.pump is not None or self._threads is not None:
            super().end()
            outputs = []  # its threads read and close them
        else:
            super().release()
            stdin = self.process.stdin
            if stdin is not None:
                close_streams([(stdin, -1)])
        if self._ending is None:
            ending = ProcessEnding(self.process, outputs, self._pidfd, self._threads, self._unknown)
            # In one breath:
            self._ending = ending
            self._pidfd = -1
        return self._ending

    def release(self) -> None:
        self._close_pidfd()
        super().release()

    def abandon(self) -> None:
        self._close_pidfd()
        super().abandon()

    def _close_pidfd(self) -> None:
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            self._dead = True
            os.close(fd)

    def describe(self) -> str:
        return f"pid {self.process.pid}"

    def details(self) -> str:
        return f": {'started' if self._owned else 'attached to'} {process_name(self.process)}"

    def _state_text(self) -> str:
        status = self.process.returncode  # asking would reap it
        return super()._state_text() + ("" if status is None else f" returncode={status}")


class ProcessEnding(Ending):
    """Ends a process whose stdin was closed: waits, terminates, kills, reaps, and reads its output all the while.

    Args:
        process: The process.
        outputs: Its streams that are still to be read, which are closed at the end.
        pidfd: Its pidfd, which is closed at the end, or -1.
        threads: If threads read its output and close its stdin, what ends them.
        unknown: Whether its exit status is lost.
    """

    def __init__(
        self,
        process: subprocess.Popen[Any],
        outputs: List[Any],
        pidfd: int,
        threads: Optional[Any] = None,
        unknown: bool = False,
    ) -> None:
        self._process = process
        self._unknown = unknown
        self._stage = "by itself"  # how far its end has gone, for the log
        self._told = False
        self._threads: Any = threads
        if threads is not None:
            threads.grace = EXIT_GRACE + TERMINATE_GRACE + KILL_GRACE
        self._pidfd = pidfd
        self._outputs = {}
        for stream in outputs:
            if not stream.closed:
                os.set_blocking(stream.fileno(), False)
                self._outputs[stream.fileno()] = stream
        self._stages: List[Tuple[float, Any, str]] = [
            (TERMINATE_GRACE, process.terminate, "after SIGTERM"),
            (KILL_GRACE, process.kill, "after SIGKILL"),
        ]
        self._due = time.monotonic() + EXIT_GRACE

    def fds(self) -> List[int]:
        threads = [] if self._threads is None else self._threads.fds()
        return [*self._outputs, *threads, *([self._pidfd] if self._pidfd >= 0 else [])]

    def step(self) -> Optional[float]:
        self._read()
        reading: Optional[float] = None if self._threads is None else self._threads.step()
        if is_lost(self._process):
            self._unknown = True
        if poll(self._process) is None:
            now = time.monotonic()
            if now < self._due:
                left = self._due - now
                return left if self._pidfd >= 0 else min(left, _DEATH_INTERVAL)
            if self._stages:
                grace, act, self._stage = self._stages.pop(0)
                self._due = now + grace
                try:
                    act()
                except OSError:
                    pass  # it runs as somebody else now: what can be done is to wait
                return min(grace, _DEATH_INTERVAL)
            # Not even SIGKILL: it hangs in the kernel. Popen reaps it some day.
            if not self._told:
                self._told = True
                log.error("%s still runs %s, and is left alone", process_name(self._process), self._stage)
        elif not self._told:
            self._told = True
            how = exit_text(self._process, self._unknown)
            log.debug("%s %s, %s", process_name(self._process), how, self._stage)
        if reading is not None:
            self._threads.hurry()
            return min(reading, _DEATH_INTERVAL)
        self._close()
        return None

    def _read(self) -> None:
        for fd, stream in tuple(self._outputs.items()):
            if stream.closed or self._has_ended(fd):
                close_streams([(stream, fd)])  # before it is forgotten: an interrupted call is made again
                del self._outputs[fd]

    @staticmethod
    def _has_ended(fd: int) -> bool:
        """Read some of an output, and find out whether that was all."""
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
        fd, self._pidfd = self._pidfd, -1  # before: an interrupted call is made again, and the number may be another's
        if fd >= 0:
            os.close(fd)

    def forget(self) -> None:
        if self._threads is not None:
            self._threads.forget()
        self._close()

