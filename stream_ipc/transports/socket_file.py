"""The file of a Unix socket that listens: how it takes the place of one that a dead listener has left, and goes away.

Knows paths and sockets. Must not know who listens, or for what.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time

from ..interruptions import pass_on

__all__ = ["SocketFile", "bind_to_path"]

_LOCK_TRIES = 100  # to lock a folder...
_LOCK_PAUSE = 0.01  # ...and seconds between two


class SocketFile:
    """The file of a Unix socket that was made here."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._identity = self._identify()

    def _identify(self) -> tuple[int, int, int]:
        status = os.lstat(self._path)
        # The time too: the inode number of a removed file is soon used again.
        return status.st_dev, status.st_ino, status.st_mtime_ns

    def remove(self) -> None:
        """Remove the file, unless it is gone or another one has taken its place."""
        try:
            if self._identify() == self._identity:
                os.unlink(self._path)
        except OSError as exc:
            pass_on(exc)


def bind_to_path(sock: socket.socket, path: str) -> None:
    """Bind to a path, also if a dead listener has left its file there."""
    try:
        sock.bind(path)
        return
    except OSError as exc:
        pass_on(exc)
        if exc.errno != errno.EADDRINUSE:
            raise
    folder = -1
    try:
        # Only one process at a time looks and removes, or a second one might remove the new file of the first. The lock of
        # the folder leaves no file behind; if it is held for long, or the file system has none, go on without it.
        try:
            for folder in map(os.open, (os.path.dirname(path) or os.curdir,), (os.O_RDONLY,)):
                break  # stored before a signal is looked at
            for _ in range(_LOCK_TRIES):
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_LOCK_PAUSE)
        except OSError as exc:
            pass_on(exc)
        _remove_dead(path)
        sock.bind(path)
    finally:
        if folder >= 0:
            os.close(folder)


def _remove_dead(path: str) -> None:
    """Remove the file of a socket whose listener is gone, if there is one; ``OSError`` for any other file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "there is a file that is no socket, which is not replaced")
    # A socket of another type: one of the same type would be a client to the listener.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        number = probe.connect_ex(path)
    if number == errno.ECONNREFUSED:
        os.unlink(path)
    elif number != errno.ENOENT:
        raise OSError(errno.EADDRINUSE, "somebody listens there already")
