"""Starts a child process with pipes for its stdio, and ends it if nobody gets it.

Knows ``subprocess.Popen``. Must not know channels or sessions. The pipes are made here and not by Popen, which loses them
if something fails half-way: descriptors that are used up, a ``user`` that does not exist.
"""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import starmap

from ..interruptions import interruption_in, pass_on
from .children import kill
from .descriptors import close_all, describe_stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from typing import IO, Any, Protocol, TypedDict, TypeVar

    T_co = TypeVar("T_co", covariant=True)

    class Items(Protocol[T_co]):
        """A sequence that is no str and no bytes, which are sequences too: these do not contain any ``object``."""

        def __len__(self) -> int: ...

        def __getitem__(self, index: int, /) -> T_co: ...

        def __iter__(self) -> Iterator[T_co]: ...

        def __contains__(self, value: object, /) -> bool: ...

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
    Command = Items[Path]

    class PopenOptions(TypedDict, total=False):
        """What ``subprocess.Popen`` takes besides, and the conversation does not mind."""

        executable: Path | None
        preexec_fn: Callable[[], object] | None
        close_fds: bool
        restore_signals: bool
        start_new_session: bool
        process_group: int | None
        pass_fds: Collection[int]
        user: str | int | None
        group: str | int | None
        extra_groups: Iterable[str | int] | None
        umask: int
        pipesize: int


__all__ = ["check_command", "check_options", "spawn"]

_TEXT = "messages are bytes, so the pipes have no text layer"
_REFUSED = {
    "args": "the command is the first argument",
    "stdin": "the session talks over it",
    "stdout": "the session talks over it",
    "shell": 'there is no shell; pass a list, or ["sh", "-c", "..."]',
    "text": _TEXT,
    "universal_newlines": _TEXT,
    "encoding": _TEXT,
    "errors": _TEXT,
    "bufsize": "the pipes are used without a buffer",
}


def spawn(
    command: Command,
    cwd: Path | None,
    env: Mapping[str, str] | None,
    stderr: int | IO[Any] | None,
    popen: PopenOptions,
) -> subprocess.Popen[bytes]:
    """Start a process with pipes for its stdio; see ``create_command_session``."""
    check_command(command)
    stderr = check_options(cwd, env, stderr, **popen)
    options: dict[str, Any] = dict(popen)
    size = options.pop("pipesize", -1)
    theirs: list[int] = []
    ours: list[int] = []
    files: list[Any] = []  # which own ours, one after the other
    process: Any = None
    try:
        _open_pipe(theirs, ours, size)
        _open_pipe(ours, theirs, size)
        if stderr == subprocess.PIPE:
            _open_pipe(ours, theirs, size)
        elif stderr == subprocess.DEVNULL:
            theirs += map(os.open, [os.devnull], [os.O_RDWR])  # stored before a signal is looked at
        options.update(zip(("stdin", "stdout", "stderr"), (*theirs, stderr)), cwd=cwd, env=env, bufsize=0)
        process = subprocess.Popen.__new__(subprocess.Popen)  # here before it starts, should an interruption come then
        process.__init__(list(command), **options)
        _open_files(ours, files)
        process.stdin, process.stdout, process.stderr = (*files, None)[:3]
        close_all(theirs)
        return process  # type: ignore[no-any-return]
    except BaseException as exc:
        try:
            _undo(exc, process, files, ours, theirs)
        except BaseException:  # an interruption
            _undo(exc, process, files, ours, theirs)
            raise
        if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE) and interruption_in(exc) is None:
            advice = "starting a process takes some descriptors; close some, or raise the limit (ulimit -n)"
            raise OSError(exc.errno, f"{exc.strerror}: {advice}") from exc
        if isinstance(exc, StopIteration):  # which would end the loop of a caller without a word
            raise RuntimeError("an argument for subprocess.Popen raised StopIteration") from exc
        raise


def _open_pipe(reads: list[int], writes: list[int], size: int) -> None:
    for read, write in starmap(os.pipe, [()]):  # stored before a signal is looked at
        # atomic: no calls
        reads += (read,)
        writes += (write,)

    if size > 0:
        import fcntl

        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, size)


def _open_files(fds: list[int], files: list[Any]) -> None:
    """Put file objects in the place of descriptors: for the process's stdin, its stdout and its stderr."""
    for mode in "wrr"[: len(fds)]:
        for file in map(io.FileIO, fds[:1], mode):  # stored before a signal is looked at
            # atomic: no calls
            files += (file,)
            del fds[0]


def _undo(exc: BaseException, process: Any, files: list[Any], ours: list[int], theirs: list[int]) -> None:
    """Leave nothing of a start that has failed. An interrupted call can be made again."""
    refused = isinstance(exc, OSError) and interruption_in(exc) is None  # by the system, so there is no process
    if not refused and getattr(process, "pid", 0) is None and len(theirs) > 1:
        process.pid = _find_pid(*theirs[:2])  # it was not stored yet, or there is none
    for file in files:
        file.close()
    close_all(ours)
    close_all(theirs)
    if getattr(process, "pid", None):
        kill(process)


def _find_pid(stdin: int, stdout: int) -> Any:
    """Return the child that has these pipes for its stdin and stdout. Only Linux tells, so elsewhere it is None."""
    pid = None
    # Until it becomes another program it has them by their numbers here, and so has another thread's child; 0 and 1 are
    # surer, so they come last and win.
    for number, pipe in ((stdin, stdin), (1, stdout), (0, stdin)):
        for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
            try:
                if name.isdigit() and os.path.samestat(os.stat(f"/proc/{name}/fd/{number}"), os.fstat(pipe)):
                    holder = int(name)
                    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # an error unless it is a child
                    pid = holder
            except OSError:  # somebody else's, or a further interruption, which is as good as the first
                pass
    return pid


# -- arguments


def check_command(command: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what is no command."""
    if isinstance(command, (str, bytes)) or not isinstance(command, Sequence):
        raise TypeError(
            f"command must be a list of arguments, not {command!r:.200}; there is no shell, so pass"
            ' ["python3", "worker.py"] or shlex.split("python3 worker.py")'
        )
    if not command:
        raise ValueError("command is empty; its first item is the program to start")
    for item in command:
        _check_path(item, "each item of command")


def check_options(cwd: Any = None, env: Any = None, stderr: Any = subprocess.PIPE, **popen: Any) -> int | None:
    """Raise for what a process cannot be started with, as far as that can be said before; see ``spawn``.

    Returns:
        What Popen takes for ``stderr``, with a descriptor in place of a file.
    """
    for name in popen:
        _check_keyword(name)
    if cwd is not None:
        _check_path(cwd, "cwd")
    if env is not None:
        if not isinstance(env, Mapping):
            raise TypeError(f"env must be a dict of names and values, not {env!r:.200}")
        for name, value in env.items():
            _check_path(name, "each name in env")
            _check_path(value, f"env[{name!r:.100}]")
    return _check_stderr(stderr)


def _check_path(value: Any, what: str) -> None:
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{what} must be a str, bytes or a path, not {value!r:.200}")
    if "\0" in os.fsdecode(value):
        raise ValueError(f"{what} must not contain a null character: {value!r:.200}")


def _check_keyword(name: str) -> None:
    if name in _REFUSED:
        raise TypeError(f"create_command_session() takes no {name}: {_REFUSED[name]}")
    code = getattr(subprocess.Popen.__init__, "__code__", None)  # None if something has put itself in its place
    if code is not None and name not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        raise TypeError(
            f"create_command_session() got an unexpected keyword argument {name!r}; what it does not know is for"
            f" subprocess.Popen, which has none of that name in Python {sys.version_info.major}.{sys.version_info.minor}"
        )


def _check_stderr(stderr: Any) -> int | None:
    """Return what Popen takes, with a descriptor in place of a file."""
    if stderr is None:
        return None
    if isinstance(stderr, int) and stderr in (subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL):
        return int(stderr)
    wanted = "stderr must be subprocess.PIPE (its text arrives as messages), None, an open file or a descriptor, not"
    try:
        fd = stderr if isinstance(stderr, int) else stderr.fileno()
        if isinstance(fd, bool):
            raise TypeError(f"{fd} is no descriptor")
        os.fstat(fd)
    except (AttributeError, TypeError) as exc:
        raise TypeError(f"{wanted} {stderr!r:.200}") from exc
    except (OSError, ValueError, OverflowError) as exc:  # closed, or one of a notebook or a test runner
        pass_on(exc)
        raise ValueError(f"{wanted} {describe_stream(stderr)}: {exc}") from exc
    return int(fd)
