"""Child processes as such: whether one lives, how it ended, what it is called in texts.

Knows processes. Must not know channels or sessions.
"""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterable

from ..interruptions import pass_on
from .descriptors import close_streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any

__all__ = ["DEATH_INTERVAL", "exit_text", "is_lost", "kill", "poll", "process_name"]

# Without a pidfd (macOS, old kernels) a child's death is looked for this often, in seconds.
DEATH_INTERVAL = 0.05


def kill(process: subprocess.Popen[Any]) -> None:
    """End a process at once, reap it and close its streams."""
    process.kill()
    close_streams([(stream, -1) for stream in (process.stdin, process.stdout, process.stderr) if stream is not None])
    process.wait()


def exit_text(process: subprocess.Popen[Any], unknown: bool) -> str:
    """Return how a process ended, or that it did not."""
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
    """Return the process as it is named in texts."""
    args: Any = process.args
    if not isinstance(args, (str, bytes)) and isinstance(args, Iterable):
        args = " ".join(shlex.quote(os.fsdecode(arg)) for arg in args)
    text = os.fsdecode(args)
    if len(text) > 100:
        text = f"{text[:97]}..."
    return f"child process {text!r} (pid {process.pid})"


def poll(process: subprocess.Popen[Any]) -> int | None:
    """Return the exit status of a process, or None while it runs."""
    status = process.poll()
    if status is None:
        # An exception that a signal handler raises inside Popen.poll() can leave its lock held, and then it says None for
        # ever. Asking the system is right in any case.
        try:
            _reap(process)
        except OSError as exc:
            pass_on(exc)
            return process.poll()
        status = process.returncode
    return status


def _reap(process: subprocess.Popen[Any]) -> None:
    pid, code = os.waitpid(process.pid, os.WNOHANG)
    if pid:
        process.returncode = -os.WTERMSIG(code) if os.WIFSIGNALED(code) else os.WEXITSTATUS(code)


def is_lost(process: subprocess.Popen[Any]) -> bool:
    """Return whether it cannot be found out any more how a process ended. Ask before ``poll``, which says 0 then.

    So it is if SIGCHLD is ignored, or if something else in this program waits for any child.
    """
    if process.returncode is None:
        try:
            if hasattr(os, "waitid"):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            else:  # macOS before Python 3.13
                _reap(process)
        except ChildProcessError:
            return True
        except OSError as exc:
            pass_on(exc)
    return False
