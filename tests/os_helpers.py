"""What the tests with real processes, streams and descriptors share.

Nothing here sleeps to be in step with another process: a test ticks until a condition holds, or waits for a byte, the
end of a pipe or a death. ``PATIENCE`` bounds all of it, and only a test that fails takes that long.
"""

import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any, Callable, List, Optional

import stream_ipc
from stream_ipc import LogMessage, Session
from tests.helpers import PATIENCE, CpuMeter, after

_IMPORTS = """
import os, signal, sys, time
from tests.messages import *
from tests.child import serve
"""


def program(code: str, *args: Any) -> List[str]:
    """The command that runs a few lines of Python with the library at hand; ``args`` are its ``sys.argv[1:]``."""
    # Some of what can be imported takes longer than all the rest of a short program.
    words = set(re.findall(r"\w+", code))
    names = ", ".join(sorted({"IpcPeer", *words.intersection(stream_ipc.__all__)}))
    imports = f"{_IMPORTS}from stream_ipc import {names}\n" + "import subprocess\n" * ("subprocess" in words)
    return [sys.executable, "-S", "-c", after(imports, textwrap.dedent(code)), *map(str, args)]


def script(code: str, *args: Any) -> List[str]:
    """The same without the library, which starts faster yet."""
    return [sys.executable, "-S", "-c", "import os, signal, sys, time\n" + textwrap.dedent(code), *map(str, args)]


def await_death(process: "subprocess.Popen[Any]") -> None:
    """Wait until a child is dead, and leave it to be reaped by whoever has to."""
    if hasattr(os, "waitid"):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return
    event = select.kevent(process.pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
    queue = select.kqueue()
    try:
        assert queue.control([event], 1, PATIENCE), "it lives on"
    except ProcessLookupError:
        pass  # it is dead already
    finally:
        queue.close()


def read_to_end(fd: int, seconds: float = PATIENCE) -> bytes:
    """Read until the last holder of the other end is gone."""
    limit = time.monotonic() + seconds
    pieces = []
    while True:
        assert wait_readable(fd, limit - time.monotonic()), f"not at its end; so far: {b''.join(pieces)[-500:]!r}"
        piece = os.read(fd, 65536)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def read_exactly(fd: int, size: int, seconds: float = PATIENCE) -> bytes:
    """Read so many bytes, or fewer if the end comes first."""
    limit = time.monotonic() + seconds
    data = b""
    while len(data) < size:
        assert wait_readable(fd, limit - time.monotonic()), f"{len(data)} of {size} bytes: {data[-500:]!r}"
        piece = os.read(fd, size - len(data))
        if not piece:
            break
        data += piece
    return data


def wait_readable(fd: int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(0, seconds) * 1000))


def write_all(fd: int, data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def collect(session: Session, kind: Any) -> List[Any]:
    """A list that fills with the session's messages of a class."""
    found: List[Any] = []

    def keep(message: Any) -> None:
        if isinstance(message, kind):
            found.append(message)

    session.on_message(keep)
    return found


def log_texts(session: Session, level: str) -> Callable[[], str]:
    """A function that says what text of a level has arrived; each message of stderr is a line."""
    found = collect(session, LogMessage)
    end = "\n" if level == "stderr" else ""
    return lambda: "".join(log.message + end for log in found if log.level == level)


class Gate:
    """A FIFO that holds back whoever reads it to the end until the gate is opened."""

    def __init__(self, path: Any) -> None:
        self.path = str(path)
        os.mkfifo(self.path)
        self._fd = os.open(self.path, os.O_RDWR)

    def open(self) -> None:
        if self._fd >= 0:
            os.unlink(self.path)  # who comes later than this finds nothing to wait for
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.open()


def listing() -> List[str]:
    """The descriptors that are open now."""
    found = []
    for name in os.listdir("/dev/fd"):
        try:
            found.append(f"{name} -> {os.readlink(f'/dev/fd/{name}')}")
        except OSError:
            pass
    return sorted(found)


def cpu_seconds(function: Callable[[], Any]) -> float:
    """The processor time of this process that a call takes."""
    start = time.process_time()
    function()
    return time.process_time() - start


def spins(function: Callable[[], Any]) -> bool:
    """Whether a call that is to wait looks around all the time."""
    with CpuMeter() as meter:
        function()
    return meter.spins


def ended(session: Session) -> List[Optional[Session]]:
    """A list that gets the session when it closes."""
    found: List[Any] = []
    session.on_close(found.append)
    return found


def kill(process: "subprocess.Popen[Any]") -> None:
    """End a process that a test started itself, and everything that it holds."""
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            try:
                stream.close()
            except (OSError, ValueError):
                pass
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait(PATIENCE)
