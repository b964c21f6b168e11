"""Takes away from this interpreter what CPython on Windows does not have, as far as the library could use it.

It is no Windows: what Windows itself does (how its pipes and processes behave) is not simulated.
"""

import errno
import os
import select
import selectors
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
from typing import Any, Optional, Tuple

# Imported here so that they are the real platform's.
IMPORTED = (ssl, subprocess, tempfile, threading)

MODULES = ["fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty", "_posixshmem"]
OS_NAMES = """
    O_CLOEXEC O_NOCTTY O_NONBLOCK P_PID P_PIDFD WEXITED WNOHANG WNOWAIT fork get_blocking getuid makedev mkfifo openpty
    pidfd_open readv register_at_fork set_blocking ttyname waitid writev
"""
ATTRIBUTES = [
    (select, ["PIPE_BUF", "devpoll", "epoll", "kevent", "kqueue", "poll"]),
    (selectors, ["DevpollSelector", "EpollSelector", "KqueueSelector", "PollSelector"]),
    (socket, ["AF_UNIX", "MSG_DONTWAIT", "MSG_NOSIGNAL", "SO_PEERCRED"]),
    (os, OS_NAMES.split()),
]

_fstat = os.fstat
_select = select.select


def _is_socket(fd: Any) -> bool:
    return stat.S_ISSOCK(_fstat(fd if isinstance(fd, int) else fd.fileno()).st_mode)


def fstat(fd: int) -> os.stat_result:
    if _is_socket(fd):
        raise OSError(errno.EBADF, "a socket's number is no descriptor")
    return _fstat(fd)


def select_sockets(read: Any, write: Any, other: Any, timeout: Optional[float] = None) -> Tuple[Any, Any, Any]:
    fds = [*read, *write, *other]
    if not fds:
        raise OSError(10022, "An invalid argument was supplied")
    if not all(map(_is_socket, fds)):
        raise OSError(10038, "An operation was attempted on something that is not a socket")
    return _select(read, write, other, timeout)


def socketpair() -> Tuple[socket.socket, socket.socket]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        a = socket.create_connection(server.getsockname())
        return a, server.accept()[0]


def selector_select(self: Any, read: Any, write: Any, other: Any, timeout: Optional[float] = None) -> Any:
    read, write, broken = select.select(read, write, write, timeout)
    return read, write + broken, []


def missing(self: Any) -> Any:
    raise AttributeError("not on Windows")


def pretend() -> None:
    """Take it away, for good."""
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in ATTRIBUTES:
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    for name in ("sendmsg", "recvmsg"):
        setattr(socket.socket, name, property(missing))
    selectors.SelectSelector._select = selector_select  # type: ignore[attr-defined]
    selectors.DefaultSelector = selectors.SelectSelector  # type: ignore[misc, assignment]
    select.select = select_sockets  # type: ignore[assignment]
    socket.socketpair = socketpair  # type: ignore[assignment]
    os.fstat = fstat  # type: ignore[assignment]
    sys.platform = "win32"
