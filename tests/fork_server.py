"""Children that start no interpreter: they are forked from one that has imported what a tap and the roles of tests need.

To start and to import is most of what such a child does, and not what its test is about. It is forked twice, so that it
becomes the child of the tests' process: Linux gives an orphan to the nearest process that asks for it. It has what it would
have from ``python -c``: its descriptors, folder, environment and end. What cannot be had in this way is started as ever:
limits, ignored signals, another program. So is every child where everything runs, and in CI.
"""

import array
import gc
import marshal
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from typing import Any, Dict, FrozenSet, List, Optional, Tuple

# What the program of a child that may be forked begins with; see ``helpers.after``.
BEGINNING = "import gc\ngc.disable()\n"

_START = "from tests.fork_server import _next_program; exec(_next_program())"
_MODULE = "import runpy; runpy.run_module('stream_ipc', run_name='__main__', alter_sys=True)"
_LIMITS = [value for name, value in vars(resource).items() if name.startswith("RLIMIT_")]
_MOST = 100_000  # bytes of a request
# What Popen is told of a child that differs in nothing but its descriptors, and its environment.
_USUAL = {
    "executable": None,
    "preexec_fn": None,
    "close_fds": True,
    "shell": False,
    "gid": None,
    "gids": None,
    "uid": None,
    "umask": -1,
    "process_group": -1,
}


class ForkServer:
    """Owns the process that children are forked from, and the socket to it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.getpid()
        self._handed_down = _handed_down(os.environ)
        with theirs:
            # Pipes, as children have: the files of sys are made for what they find.
            command = [sys.executable, "-S", "-c", _START, str(theirs.fileno())]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], **pipes)  # type: ignore[call-overload]
        self.process.stdin.close()
        self.process.stdout.close()

    def close(self) -> None:
        self._socket.close()
        self.process.wait()

    def start(self, process: Any, options: Dict[str, Any]) -> bool:
        """Start a child in the place of ``Popen._execute_child``, if it can be forked."""
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        ends = [options[name] for name in names]
        request = self._request(options)
        if request is None:
            return False
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # or an alarm would lose the child
        try:
            files = [fd if fd >= 0 else number for number, fd in enumerate((ends[0], ends[3], ends[5]))]
            fds = array.array("i", [*files, *options["pass_fds"]])
            try:
                self._socket.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            except OSError:  # there is no such descriptor
                return False
            process.pid = int(self._socket.recv(20))
            process._child_created = True
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        process._close_pipe_fds(*ends)
        return True

    def _request(self, options: Dict[str, Any]) -> Optional[bytes]:
        """Return what the server is to be told, or None if only a real start can do what is asked for."""
        if os.getpid() != self._pid or threading.active_count() > 1:  # whose child it is to be, and who gets the answer
            return None
        args, folder = options["args"], options["cwd"]
        if not isinstance(args, list) or args[:2] != [sys.executable, "-S"]:
            return None
        if args[2] == "-c" and args[3].startswith(BEGINNING):
            program = args[3]
        elif args[2:4] == ["-m", "stream_ipc"]:
            program = _MODULE
        else:
            return None
        if folder is not None and not (isinstance(folder, str) and os.path.isdir(folder)):
            return None
        if any(options.get(name, value) != value for name, value in _USUAL.items()):
            return None
        environ = os.environ if options["env"] is None else options["env"]
        if not all(isinstance(text, str) for item in environ.items() for text in item):
            return None
        if _handed_down(environ) != self._handed_down or not all(map(_is_pipe, (options["p2cread"], options["c2pwrite"]))):
            return None
        passed, leads = list(options["pass_fds"]), options["start_new_session"]
        child = [program, *map(os.fsdecode, args[4:])], dict(environ), folder or os.getcwd(), passed, leads
        request = marshal.dumps(child)
        return request if len(request) < _MOST else None


def _is_pipe(fd: int) -> bool:
    mode = os.fstat(fd).st_mode if fd >= 0 else 0
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _handed_down(environ: Any) -> Tuple[Dict[str, str], FrozenSet[int], List[Tuple[int, int]]]:
    """Return what an interpreter looks at when it starts, and what a process hands down to it."""
    names = ("PYTHON", "LC_", "LANG", "STREAM_IPC")
    variables = {name: value for name, value in environ.items() if name.startswith(names)}
    ignored = {number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return variables, frozenset(map(int, ignored | blocked)), list(map(resource.getrlimit, _LIMITS))


# -- in the process that children are forked from


def _next_program() -> str:
    """Fork children as they are asked for; return in each, with the program that it is to run."""
    import argparse  # noqa: F401 - what is imported here is there
    import runpy  # noqa: F401

    from stream_ipc.tap import relay  # noqa: F401
    from tests import child, pool_child  # noqa: F401

    server = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    while True:
        request, fds, _, _ = socket.recv_fds(server, _MOST, 100)
        if not request:
            os._exit(0)
        pid_read, pid_write = os.pipe()
        gate_read, gate_write = os.pipe()
        middle = os.fork()
        if middle == 0:
            pid = os.fork()
            if pid:
                os.write(pid_write, b"%d" % pid)
                os._exit(0)
            for fd in (pid_read, pid_write, gate_write, server.detach()):
                os.close(fd)
            os.read(gate_read, 1)  # until it has its parent
            os.close(gate_read)
            return _become(fds, *marshal.loads(request))
        os.waitpid(middle, 0)
        server.send(os.read(pid_read, 20))
        for fd in (pid_read, pid_write, gate_read, gate_write, *fds):
            os.close(fd)


def _become(
    fds: List[int], command: List[str], environ: Dict[str, str], folder: str, passed: List[int], leads: bool
) -> str:
    """Take over what belongs to the child, and return its program."""
    import fcntl

    signal.signal(signal.SIGINT, signal.default_int_handler)
    above = max(2, *passed, *fds) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(moved, [0, 1, 2, *passed]):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(folder)
    if leads:
        os.setsid()
    os.environ.clear()
    os.environ.update(environ)
    sys.argv[:] = ["-c", *command[1:]]
    return command[0]
