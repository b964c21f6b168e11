"""A child process: its stdio as a channel, what its death means.

Knows processes. Must not know sessions or peers. Starting one is in ``spawn``, ending it in ``children``.
"""

from __future__ import annotations

import io
import math
import time

from ..clock import monotonic
from ..errors import StreamClosedError
from ..interruptions import pass_on
from ..wire.codec import TextDecoder
from .children import DEATH_INTERVAL, Child, ProcessTeardown, process_name
from .descriptors import close_stream, describe_stream
from .ends import Ends, ReadEnd, WriteEnd
from .inputs import TAIL, StreamInputs, TextInput
from .stream_channel import StreamChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections import deque
    from collections.abc import Callable
    from typing import Any

    from ..protocols import MessageSerializer
    from .channel import Frame, Received, Teardown

__all__ = ["ProcessChannel"]

# Seconds that a child whose stdout has ended has for its exit status to appear. It dies a moment after its pipes do.
_STATUS_GRACE = 0.25

# The same for one that no longer reads its stdin: the call that has found this out waits so long.
_DYING_GRACE = 0.05

# A send asks no more often than this whether the child lives, in seconds: each question is a system call.
_ASK_INTERVAL = 0.0001


class ProcessInputs(StreamInputs):
    """What a child process writes, and its death, which is the end of all.

    Owns its last words.
    """

    def __init__(self, channel: ProcessChannel) -> None:
        super().__init__(channel)
        self._child: Child = channel.child
        self._tail = ""  # of stderr
        self._inspect_at = 0.0  # no sooner is the system asked whether it lives
        self._status_due: float = math.inf  # until when an ended stdout waits for the exit status

    # -- its death

    def interest(self) -> tuple[list[int], float]:
        reads, poll_in = super().interest()
        if self.ended is None:
            if self._child.pidfd >= 0:
                reads = [*reads, self._child.pidfd]
            if self._status_due < math.inf or self._child.pidfd < 0:
                poll_in = min(poll_in, DEATH_INTERVAL)
        return reads, poll_in

    def read(self, inbox: deque[Received]) -> None:
        super().read(inbox)
        now = monotonic()
        if self._child.pidfd < 0 and now < self._inspect_at:
            return  # waitid() for each child in every turn is expensive
        self._inspect_at = now + DEATH_INTERVAL
        self.look_for_end(inbox)
        if self.ended is None and now >= self._status_due:
            self.drain(inbox)
            self.put_end(inbox)

    def look_for_end(self, inbox: deque[Received]) -> None:
        if self.ended is None and self._child.may_be_dead() and self._child.status() is not None:
            self._died(inbox)

    def _died(self, inbox: deque[Received]) -> None:
        """Read what it had written, whoever may still hold its pipes: then this is the end."""
        self.drain(inbox)
        self.put_end(inbox)
        if self.ended is not None:
            self.channel.outbox.drop(self.ended)  # nobody will read it, though a grandchild may hold the pipe

    def resume(self, inbox: deque[Received]) -> None:
        super().resume(inbox)
        if self._child.status() is not None and (self.ended is None or not self.channel.outbox.is_broken):
            self._died(inbox)

    def framed_ended(self, inbox: deque[Received]) -> None:
        if self.ended is not None:
            return
        if self._child.status() is not None:
            self._died(inbox)
        elif self._status_due == math.inf:
            self._status_due = monotonic() + _STATUS_GRACE

    # -- texts

    def note_stderr(self, text: str) -> None:
        """Take note of what it has written to stderr. An interrupted read calls it again."""
        self._tail = (self._tail + text)[-TAIL:]

    def ended_text(self) -> str:
        return f"{process_name(self._child.process)} {self._child.end_text()}{self.where}{self.tail_text()}"

    def tail_text(self) -> str:
        """Return its last words; may be empty."""
        tail = self._tail.strip().replace("\r\n", "\n")
        if tail:
            return f"; the end of its stderr:\n{tail}"
        # Not every program has the sense to complain on stderr: PHP without a php.ini does not.
        junk = self.junk.strip()
        return f"; the last that it printed to its stdout:\n{junk}" if junk else ""


class ProcessChannel(StreamChannel):
    """Messages over the stdin and stdout of a child process, and text from its stderr.

    Args:
        process: A ``Popen`` with ``stdin=PIPE, stdout=PIPE``; a ``ValueError`` says what to pass if it has no such pipes.
        owned: Whether the process is ended with the channel.
        group: Whether it leads a process group, all of which is ended then.
        growable: Whether its pipes may be made larger for large messages.
    """

    inputs: ProcessInputs
    inputs_class: type[StreamInputs] = ProcessInputs

    def __init__(
        self,
        process: subprocess.Popen[Any],
        serializer: MessageSerializer,
        max_frame_size: int,
        owned: bool = False,
        group: bool = False,
        growable: bool = False,
    ) -> None:
        _check_popen(process)
        self.process = process
        self.child: Child = Child(process, group)
        self._owned = owned
        self._text: TextInput | None = None  # its stderr
        self._send_asks_at = 0.0  # no sooner does a send ask whether it lives
        ends = Ends()
        try:
            reader = ends.open(ReadEnd, process.stdout)
            writer = ends.open(WriteEnd, process.stdin)
            reader.growable = writer.growable = growable
            super().__init__(ends, writer, [reader], serializer, max_frame_size, f"pid {process.pid}")
            if process.stderr is not None and not process.stderr.closed:
                errors = ends.open(ReadEnd, process.stderr)
                decoder = TextDecoder(self.inputs.note_stderr)
                self.inputs.by_fd[errors.fd] = self._text = TextInput(errors, decoder, self.inputs)
            self.put: Callable[[Frame], None] = self._put
            self.child.watch()
        except BaseException:
            ends.release()
            raise

    def _put(self, frame: Frame) -> None:
        """Send a frame if the child lives."""
        now = monotonic()
        if now >= self._send_asks_at:
            self._send_asks_at = now + _ASK_INTERVAL
            try:
                gone = self.child.may_be_dead() and self.child.status() is not None
            except (OSError, MemoryError) as exc:  # the system has no answer now, and a turn asks again
                pass_on(exc)
                gone = False
            if gone:  # it could still be written to while a grandchild holds its stdin
                self.drop_output()
                raise StreamClosedError(self.broken_text())
        self.outbox.put(frame)

    def broken_text(self) -> str:
        # A child that is dying closes its stdin first; its status is there a moment later.
        due = monotonic() + _DYING_GRACE
        while self.child.status() is None:
            if monotonic() >= due:
                text = f"{process_name(self.process)} no longer reads its stdin: {self.outbox.error}"
                return text + self.inputs.tail_text()
            time.sleep(0.001)
        return self.inputs.ended_text()

    # -- ending

    def close(self) -> Teardown | None:
        if not self._owned:
            self.child.close()
            return super().close()
        super().release()
        close_stream(self.process.stdin)
        return ProcessTeardown(self.child, self._text)

    def release(self) -> None:
        self.child.close()
        super().release()

    def abandon(self) -> None:
        self.child.close()
        super().abandon()

    def details(self) -> str:
        return f": {'started' if self._owned else 'attached to'} {process_name(self.process)}"

    @property
    def state_text(self) -> str:
        status = self.process.returncode  # asking would reap it
        return super().state_text + ("" if status is None else f" returncode={status}")


def _check_popen(process: Any) -> None:
    """Raise ``ValueError`` for what is no ``subprocess.Popen`` with binary pipes; the text says what to pass."""
    advice = "start it with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE)"
    if isinstance(process, type) or not all(
        [hasattr(process, name) for name in ("pid", "poll", "args", "returncode", "stdin", "stdout")]
    ):
        raise ValueError(f"a session is attached to a subprocess.Popen, not to {process!r:.200}; {advice}")
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(process, name, None)
        if isinstance(stream, io.TextIOBase):
            state = "a text stream"
            advice = "messages are bytes, so start it without text=True, encoding, errors and universal_newlines"
        elif stream is None and name != "stderr":
            state = "not a pipe"
        elif stream is not None and not callable(getattr(stream, "fileno", None)):
            state = f"no pipe but {describe_stream(stream)}"
        elif getattr(stream, "closed", False) and name != "stderr":
            state = "closed"
        else:
            continue
        raise ValueError(f"the {name} of {process!r:.200} is {state}; {advice}")
