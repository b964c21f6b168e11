"""Sockets: connecting to an address, listening at it, the options of a connection, which user is at its other end.

Knows addresses, and the files of Unix sockets. Must not know messages, sessions or peers. Imported at the first ``connect``
or ``listen``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
import struct
import sys
import time
from contextlib import contextmanager

from ..clock import monotonic
from ..interruptions import pass_on
from .addresses import explained, resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from .addresses import Place

    WaitFor = Callable[[int, int, float | None], bool]  # (descriptor or -1, events, until when) -> is it ready?

__all__ = ["SocketFile", "connect", "has_vanished", "listen", "other_user", "tune"]

_BACKLOG = 4096  # the system cuts it down to its own limit
_RETRY = 0.01  # how often a Unix socket whose queue is full is tried again, in seconds
_LOCK_GRACE = 1.0  # how long the lock of a folder is waited for, in seconds


# Seconds of silence before the first probe, seconds between probes, and probes that may stay unanswered. A host that
# vanished is noticed within two minutes. The first option has another name on macOS.
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 5))


def tune(sock: socket.socket) -> None:
    """Let small messages of a connected TCP socket leave at once, and notice when its other host has vanished.

    Does nothing for other sockets. What the system does not let set, stays as it is: a connection that is gone already
    shows that when it is used.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    for level, option, value in options:
        try:
            sock.setsockopt(level, option, value)
        except OSError as exc:
            pass_on(exc)


# A host that acknowledges nothing for so many seconds, though it was asked so often, has vanished. Keepalive says nothing
# while something is on its way, and the system itself goes on asking for a quarter of an hour. Its option
# TCP_USER_TIMEOUT is no help: it cuts off a program that does not read for so long, too, though its host answers.
VANISHED = 110.0
_ASKED = 3


def has_vanished(sock: socket.socket) -> bool:
    """Return whether the host at the other end of a TCP socket does not answer any more, as far as the system tells."""
    if not sys.platform.startswith("linux") or not hasattr(socket, "TCP_INFO"):
        return False
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
    except OSError as exc:
        pass_on(exc)
        return False
    if len(info) < 60:
        return False
    # struct tcp_info: bytes 2 and 3 are the retransmissions and the probes that were not answered; the milliseconds since
    # the last acknowledgement came are its fifteenth number of four bytes.
    (last,) = struct.unpack_from("I", info, 56)
    return info[2] + info[3] >= _ASKED and last >= VANISHED * 1000


def other_user(sock: socket.socket) -> int | None:
    """Return the user at the other end of a Unix socket, if this process runs as another one now; otherwise None.

    At the end that has connected, Linux tells the user that the listener ran as when it began to listen: a program that
    has given up the rights of root since then still shows as root.

    Where the system does not tell (it does on Linux and macOS), the mode of the file has to do.
    """
    if hasattr(socket, "SO_PEERCRED"):
        _, user, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    elif hasattr(socket, "LOCAL_PEERCRED"):
        # struct xucred: version, user, number of groups, 16 groups. The level is SOL_LOCAL.
        _, user = struct.unpack_from("II", sock.getsockopt(0, socket.LOCAL_PEERCRED, 76))
    else:
        return None
    return None if user == os.geteuid() else int(user)


# -- connecting


def connect(
    place: Place, secure: bool, limit: float | None, clock: Callable[[], float], wait_for: WaitFor
) -> socket.socket:
    """Connect to an address.

    Args:
        place: The result of ``check_address``.
        secure: Whether it will be TLS, so that it may be any host.
        limit: The time of the clock until which it may take.
        clock: The time in seconds.
        wait_for: Waits for a descriptor (-1: for none) until some time; returns whether it is ready.

    Returns:
        A connected socket that does not block.

    Raises:
        ValueError: It is not loopback, and not secure.
        TimeoutError: It took too long.
        OSError: There is no listener, the host does not resolve, ...; the text names the address.
    """
    if isinstance(place, str):
        found: list[tuple[int, Any]] = [(socket.AF_UNIX, place)]
    else:
        if not place[1]:
            raise ValueError(f"cannot connect to {place!r}: nobody listens at port 0; pass the listener's port")
        found = resolve(*place, secure, "connect to")
    first: OSError | None = None
    for index, (family, sockaddr) in enumerate(found):
        part = limit
        if limit is not None:  # one address that does not answer leaves time for the others
            now = clock()
            part = now + (limit - now) / (len(found) - index)
        try:
            return _connect(family, sockaddr, part, clock, wait_for)
        except OSError as exc:
            pass_on(exc)
            first = first or exc
    assert first is not None
    if isinstance(first, TimeoutError) and first.errno is None:
        raise first
    raise explained(first, f"cannot connect to {place!r}") from first


def _connect(
    family: int, sockaddr: Any, limit: float | None, clock: Callable[[], float], wait_for: WaitFor
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        number = sock.connect_ex(sockaddr)
        while True:
            if number != errno.EAGAIN or family != socket.AF_UNIX:
                break
            # The queue of the listener is full, and no descriptor tells when it has room.
            now = clock()
            if limit is not None and now >= limit:
                raise TimeoutError
            wait_for(-1, 0, now + _RETRY if limit is None else min(now + _RETRY, limit))
            number = sock.connect_ex(sockaddr)
        if number in (errno.EINPROGRESS, errno.EINTR, errno.EWOULDBLOCK):
            if not wait_for(sock.fileno(), select.POLLOUT, limit):
                raise TimeoutError
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not number and family != socket.AF_UNIX and sock.getsockname() == sock.getpeername():
            number = errno.ECONNREFUSED  # the system chose the same port for our end: TCP then connects it to itself
        if number:
            raise OSError(number, os.strerror(number))
        tune(sock)
        return sock
    except BaseException:
        sock.close()
        raise


# -- listening


class SocketFile:
    """The file of a Unix socket that was made here."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._identity = self._identify()

    def _identify(self) -> tuple[int, int, int] | None:
        try:
            status = os.lstat(self._path)
        except OSError as exc:
            pass_on(exc)
            return None
        # The time too: the inode number of a removed file is soon used again.
        return status.st_dev, status.st_ino, status.st_mtime_ns

    def remove(self) -> None:
        """Remove the file, unless another one has taken its place. An interrupted call can be made again."""
        try:
            if self._identity is not None and self._identify() == self._identity:
                os.unlink(self._path)
        except OSError as exc:
            pass_on(exc)
        self._identity = None


def listen(place: Place, secure: bool) -> tuple[socket.socket, Place, SocketFile | None]:
    """Listen at an address.

    Returns:
        The socket, which does not block; the address, with the port that was chosen for port 0; the file, if any.

    Raises:
        ValueError: It is not loopback, and not secure.
        OSError: There is a listener already, ...; the text names the address.
    """
    if isinstance(place, str):
        try:
            sock, file = _listen_unix(place)
        except OSError as exc:
            raise explained(exc, f"cannot listen at {place!r}") from exc
        return sock, place, file
    error: OSError | None = None
    for family, sockaddr in resolve(*place, secure, "listen at"):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as exc:  # out of descriptors, or the system has no such family
            pass_on(exc)
            error = error or exc
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setblocking(False)
            sock.bind(sockaddr)
            sock.listen(_BACKLOG)
            return sock, (place[0], sock.getsockname()[1]), None
        except OSError as exc:
            sock.close()
            pass_on(exc)
            error = error or exc
        except BaseException:
            sock.close()
            raise
    assert error is not None
    raise explained(error, f"cannot listen at {place!r}") from error


def _listen_unix(path: str) -> tuple[socket.socket, SocketFile]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            os.fchmod(sock.fileno(), 0o600)  # on Linux the file gets no more than this
        except OSError as exc:
            pass_on(exc)
        try:
            sock.bind(path)
        except OSError as exc:
            pass_on(exc)
            if exc.errno != errno.EADDRINUSE:
                raise
            _remove_dead(path)
            sock.bind(path)
        file = SocketFile(path)
        try:
            # Elsewhere the file has whatever the umask left of 0777, but until listen() no client can connect.
            if stat.S_IMODE(os.lstat(path).st_mode) != 0o600:
                os.chmod(path, 0o600)
            sock.listen(_BACKLOG)
        except BaseException:
            file.remove()
            raise
        return sock, file
    except BaseException:
        sock.close()
        raise


def _remove_dead(path: str) -> None:
    """Remove the file of a socket whose listener is gone.

    Raises:
        OSError: The listener is there, or the file is no socket.
    """
    with _folder_lock(path):
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


@contextmanager
def _folder_lock(path: str) -> Iterator[None]:
    """Let only one process at a time look for a dead file and remove it: a second one might remove the new file."""
    # The lock of the folder itself, which leaves no file behind. If it is held for long, or the file system has no locks,
    # go on without it.
    fd = -1
    try:
        try:
            fd = os.open(os.path.dirname(path) or os.curdir, os.O_RDONLY)
            due = monotonic() + _LOCK_GRACE
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if monotonic() >= due:
                        break
                    time.sleep(_RETRY)
        except OSError as exc:
            pass_on(exc)
        yield
    finally:
        if fd >= 0:
            os.close(fd)
