"""A child process: starting it, its stdio as a channel, what its death means.

Knows processes. Must not know sessions or peers. Ending one is in ``process_end``.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Mapping, Sequence

from ..errors import StreamClosedError
from ..messages import LogMessage
from ..wire.codec import TextDecoder
from .children import DEATH_INTERVAL, exit_text, is_lost, poll, process_name
from .descriptors import ReadEnd, WriteEnd, close_streams
from .process_end import ProcessEnding
from .stream import StreamChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterator
    from typing import IO, Any, Protocol, TypeVar

    from ..protocols import MessageSerializer
    from .base import Ending, Interest, Received

    T_co = TypeVar("T_co", covariant=True)

    class Items(Protocol[T_co]):
        """A sequence that is no str and no bytes, which are sequences too: these do not contain any ``object``."""

        def __len__(self) -> int: ...

        def __getitem__(self, index: int, /) -> T_co: ...

        def __iter__(self) -> Iterator[T_co]: ...

        def __contains__(self, value: object, /) -> bool: ...

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
    Command = Items[Path]

__all__ = ["ProcessChannel", "spawn"]

# Seconds that a child whose stdout has ended has for its exit status to appear. It dies a moment after its pipes do.
STATUS_GRACE = 0.25

# The same for one that no longer reads its stdin: the call that has found this out waits so long.
_DYING_GRACE = 0.05

_TAIL = 2000  # characters of stderr that are kept for error texts
_SPARE_DESCRIPTORS = 12  # what starting a process takes for a moment


def spawn(
    command: Command, cwd: Path | None, env: Mapping[str, str] | None, stderr: int | IO[Any] | None
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


def _require_descriptors() -> None:
    # Popen loses the pipes that it has made when it runs out of descriptors half-way (before Python 3.13).
    spare: list[int] = []
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


def check_popen(process: Any) -> None:
    """Raise ``ValueError`` for what is no ``subprocess.Popen`` with binary pipes; the text says what to pass."""
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


class ProcessChannel(StreamChannel):
    """Messages over the stdin and stdout of a child process, and text from its stderr.

    Owns the pidfd, and what is known of the child's death.

    Args:
        process: A ``Popen`` with ``stdin=PIPE, stdout=PIPE``.
        owned: Whether the process is ended with the channel.
        serializer: As in ``StreamChannel``.
        max_frame_size: As in ``StreamChannel``.

    Raises:
        ValueError: The Popen is unsuitable; the text says what to pass.
    """

    def __init__(
        self, process: subprocess.Popen[Any], owned: bool, serializer: MessageSerializer, max_frame_size: int
    ) -> None:
        check_popen(process)
        self.process = process
        self._owned = owned
        self._tail = ""  # of stderr
        self._junk = ""  # of what was printed to stdout between frames
        self._dead = False
        self._unknown = False  # its exit status is lost
        self._pidfd = -1
        self._look_at = 0.0  # no sooner is the system asked whether it lives
        self._status_due: float | None = None  # set while an ended stdout waits for the exit status
        self._lost: list[StreamClosedError] = []  # errors on their way, whose text lacks its last words
        self._ending: Ending | None = None
        reader = ReadEnd(process.stdout)
        try:
            super().__init__(WriteEnd(process.stdin), [reader], serializer, max_frame_size, f"pid {process.pid}")
            if process.stderr is not None and not process.stderr.closed:
                self.add_input(ReadEnd(process.stderr), TextDecoder(LogMessage.LEVEL_STDERR, self._note_stderr))
        except BaseException:
            reader.release()
            raise
        if hasattr(os, "pidfd_open"):
            try:
                self._pidfd = os.pidfd_open(process.pid)
            except OSError:
                pass  # an old kernel, or it was reaped already: poll() tells

    # -- its death

    def interest(self) -> Interest:
        reads, write_fd, look_in = super().interest()
        if self._dead:
            return reads, write_fd, look_in
        if self._pidfd >= 0:
            reads = [*reads, self._pidfd]
        if look_in is None and (self._status_due is not None or self._pidfd < 0):
            look_in = DEATH_INTERVAL
        return reads, write_fd, look_in

    def look(self, inbox: deque[Received]) -> None:
        super().look(inbox)
        if self.ended is not None or self._dead:
            return
        now = time.monotonic()
        if self._pidfd < 0 and self._status_due is None and now < self._look_at:
            return  # waitid() for each child in every turn is expensive
        self._look_at = now + DEATH_INTERVAL
        if self._poll() is not None:
            self._died(inbox)
        elif self._status_due is not None and now >= self._status_due:
            self.drain(inbox)
            self.put_end(inbox)

    def _poll(self) -> int | None:
        if is_lost(self.process):
            self._unknown = True
        return poll(self.process)

    def _died(self, inbox: deque[Received]) -> None:
        """Read what it had written, whoever may still hold its pipes: then this is the end."""
        self._dead = True
        self.drain(inbox)
        self.put_end(inbox)

    def resume(self, inbox: deque[Received]) -> None:
        super().resume(inbox)
        if self._dead and self.ended is None:
            self._died(inbox)

    def framed_ended(self, inbox: deque[Received]) -> None:
        if self.ended is not None:
            return
        if self._dead or self._poll() is not None:
            self._dead = True
            self.drain(inbox)
            self.put_end(inbox)
        elif self._status_due is None:
            self._status_due = time.monotonic() + STATUS_GRACE

    # -- texts

    def _note_stderr(self, text: str) -> None:
        self.text_bytes += len(text.encode("utf-8", "replace"))
        self._tail = (self._tail + text)[-_TAIL:]

    def note_text(self, text: str) -> None:
        self._junk = (self._junk + text)[-_TAIL:]

    def ended_error(self) -> StreamClosedError:
        error = StreamClosedError(self._death_text())
        error.__cause__ = super().ended_error().__cause__
        return error

    def _death_text(self) -> str:
        state = exit_text(self.process, self._unknown)
        text = f"{process_name(self.process)} {state}"
        if state == "is still running":
            text = f"{process_name(self.process)} closed its stdout but {state}"
        if self.where:
            text += f" {self.where}"
        return text + self._tail_text()

    def _tail_text(self) -> str:
        tail = self._tail.strip()
        if tail:
            return f"; the end of its stderr:\n{tail}"
        # Not every program has the sense to complain on stderr: PHP without a php.ini does not.
        junk = self._junk.strip()
        return f"; the last that it printed to its stdout:\n{junk}" if junk else ""

    def broken_error(self) -> StreamClosedError:
        error = StreamClosedError(self._broken_text())
        self._lost.append(error)
        return error

    def _broken_text(self) -> str:
        # A child that is dying closes its stdin first; its status is there a moment later.
        due = time.monotonic() + _DYING_GRACE
        while self._poll() is None:
            if time.monotonic() >= due:
                text = f"{process_name(self.process)} no longer reads its stdin: {self.outbox.error}"
                return text + self._tail_text()
            time.sleep(0.001)
        return self._death_text()

    def drain(self, inbox: deque[Received]) -> None:
        super().drain(inbox)
        for error in self._lost:
            error.args = (self._broken_text(),)  # its last words are known only now
        self._lost.clear()

    # -- ending

    def end(self) -> Ending | None:
        if not self._owned:
            self._close_pidfd()
            return super().end()
        super().release()
        stdin = self.process.stdin
        if stdin is not None:
            close_streams([(stdin, -1)])
        if self._ending is None:
            outputs = [out for out in (self.process.stdout, self.process.stderr) if out is not None]
            ending = ProcessEnding(self.process, outputs, self._pidfd, self._unknown)
            # atomic: no calls
            self._ending = ending
            self._pidfd = -1
            self._dead = True
        return self._ending

    def release(self) -> None:
        self._close_pidfd()
        super().release()

    def abandon(self) -> None:
        self._close_pidfd()
        super().abandon()

    def _close_pidfd(self) -> None:
        # atomic: no calls
        fd = self._pidfd
        self._pidfd = -1

        if fd >= 0:
            self._dead = True
            os.close(fd)

    def details(self) -> str:
        return f": {'started' if self._owned else 'attached to'} {process_name(self.process)}"

    @property
    def state_text(self) -> str:
        status = self.process.returncode  # asking would reap it
        return super().state_text + ("" if status is None else f" returncode={status}")
