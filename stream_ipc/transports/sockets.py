"""Addresses and sockets: what an address means, connecting to it, listening at it, who is at the other end.

Knows sockets, names of hosts, and the files of Unix sockets. Must not know messages, sessions or peers. Imported at the
first ``connect`` or ``listen``.

An address is a path (a Unix socket) or a pair ``(host, port)`` (TCP).
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Optional, Tuple, Union

from .base import Ending

__all__ = [
    "Address",
    "Shield",
    "SocketFile",
    "check_address",
    "connect",
    "is_unix",
    "linger",
    "listen",
    "named",
    "other_user",
    "set_nodelay",
    "stop_writing",
]

Address = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]", Tuple[str, int]]
Place = Union[str, Tuple[str, int]]  # an address that was checked
WaitFor = Callable[[int, int, Optional[float]], bool]  # (descriptor or -1, events, until when)

_MAX_PATH = 107 if sys.platform.startswith("linux") else 103  # bytes of a Unix socket's path
_LINGER = 1.0  # seconds
_BACKLOG = 4096  # the system cuts it down to its own limit
_RETRY = 0.01  # how often a Unix socket whose queue is full is tried again, in seconds
_LOCK_GRACE = 1.0  # how long the lock of a folder is waited for, in seconds


try:
    # signal.pthread_sigmask makes enums of all numbers, which takes four times as long.
    from _signal import pthread_sigmask as _mask  # type: ignore[import-not-found]
except ImportError:  # a system without
    _mask = lambda how, signals: ()  # noqa: E731

_BLOCK, _SET = int(getattr(signal, "SIG_BLOCK", 0)), int(getattr(signal, "SIG_SETMASK", 0))
# All that programs handle as a rule and that do not come from their own mistakes.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPROF", "SIGVTALRM", "SIGWINCH")
_SIGNALS = [int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)]


class Shield:
    """Holds signals back for the length of a ``with`` block, for calls whose result an interruption would lose.

    The calls of ``ssl`` ask for signals when the bytes have moved already, before they return, so that the way of
    ``descriptors.py`` does not help here. What is in the block must not wait for anything. In a program with several
    threads another one may get the signal, and a small gap remains.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = _mask(_BLOCK, ())  # raises what came before, and has changed nothing then
        try:
            _mask(_BLOCK, _SIGNALS)
        except BaseException:
            _mask(_SET, self._before)
            raise

    def __exit__(self, *exc_info: object) -> None:
        _mask(_SET, self._before)


# -- addresses


def is_unix(place: Place) -> bool:
    """Whether it is a path, and not a host and a port."""
    return isinstance(place, str)


def check_address(address: Any) -> Place:
    """Tell a path from a pair of host and port.

    Returns:
        A str, or a tuple of str and int.

    Raises:
        TypeError: It is neither.
        ValueError: It is one that cannot be.
        OSError: The path is too long for a Unix socket.
    """
    if isinstance(address, (tuple, list)):
        return _check_pair(address)
    if not isinstance(address, (str, bytes, os.PathLike)):
        raise TypeError(f"an address is a path (Unix socket) or a pair (host, port), not {address!r:.100}")
    path = os.fsdecode(address)
    if not path or "\0" in path:
        raise ValueError(f"{address!r:.200} is no path; a Unix socket needs a file")
    _, colon, port = path.rpartition(":")
    if "://" in path or (colon and port.isdigit() and os.sep not in path):
        raise ValueError(
            f"the address {path!r:.200} looks like host and port; pass a pair (host, port) for TCP, or a path with a"
            f" {os.sep!r} in it for a Unix socket"
        )
    size = len(os.fsencode(path))
    if size > _MAX_PATH:
        raise OSError(
            errno.ENAMETOOLONG,
            f"the path of a Unix socket has at most {_MAX_PATH} bytes, and this one has {size}; choose a shorter one",
            path,
        )
    return path


def _check_pair(address: Any) -> Tuple[str, int]:
    if len(address) != 2:
        raise ValueError(f"a TCP address is a pair (host, port), not {tuple(address)!r:.200}")
    host, port = address
    if not isinstance(host, str):
        raise TypeError(f"the host of the address {(host, port)!r:.200} must be a str")
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"the port of the address {(host, port)!r:.200} must be an int")
    if not 0 <= port <= 65535:
        raise ValueError(f"the port of the address {(host, port)!r:.200} must be from 0 to 65535")
    if "\0" in host:
        raise ValueError(f"{host!r:.200} in the address {(host, port)!r:.200} is no name of a host")
    if not host:
        raise ValueError(f'the address {(host, port)!r} names no host; "0.0.0.0" or "::" are all of this machine')
    return host, port


def _resolve(host: str, port: int, secure: bool, verb: str) -> List[Tuple[int, Any]]:
    """The families and socket addresses of a host, without doubles.

    Raises:
        OSError: It does not resolve.
        ValueError: One of them is not loopback, and nothing secures the connection.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise named(exc, f"cannot {verb} {(host, port)!r}: the host {host!r} does not resolve") from exc
    except ValueError as exc:  # UnicodeError: a name that cannot be one
        raise ValueError(f"cannot {verb} {(host, port)!r}: {host!r:.200} is no name of a host: {exc}") from exc
    found = list(dict.fromkeys((int(family), sockaddr) for family, _, _, _, sockaddr in infos))
    if not secure:
        for family, sockaddr in found:
            if not _is_loopback(family, sockaddr):
                raise ValueError(
                    f"refusing to {verb} {(host, port)!r} without an ssl_context: {sockaddr[0]} is not loopback, and"
                    " whoever is on the way could read and write; pass an ssl_context"
                )
    return found


def _is_loopback(family: int, sockaddr: Any) -> bool:
    if family == socket.AF_INET:
        return bool(sockaddr[0].startswith("127."))
    packed = socket.inet_pton(family, sockaddr[0].partition("%")[0])
    return packed == bytes(15) + b"\x01" or packed[:13] == bytes(10) + b"\xff\xff\x7f"


def named(exc: OSError, text: str) -> OSError:
    """An error of the same kind whose text says what could not be done."""
    text = f"{text}: {exc.strerror or exc}"
    if isinstance(exc, socket.gaierror):
        return socket.gaierror(exc.errno, text)
    return OSError(text) if exc.errno is None else OSError(exc.errno, text)


# -- both sides


def set_nodelay(sock: socket.socket) -> None:
    """Let small messages of a TCP socket leave at once."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def other_user(sock: socket.socket) -> Optional[int]:
    """The user at the other end of a Unix socket, if that is not the one that this process runs as.

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


def stop_writing(sock: socket.socket) -> bool:
    """Make what was written reach the other side though the socket, which does not block, is closed next.

    Closing with something unread makes TCP reset the connection, which overtakes what is on its way.

    Returns:
        Whether the other side is still talking, so that more may come.
    """
    heard = False
    try:
        sock.shutdown(socket.SHUT_WR)
        for _ in range(64):
            if not socket.socket.recv(sock, 65536):  # not SSLSocket.recv: what comes is of no interest
                return False
            heard = True
    except BlockingIOError:
        pass
    except (OSError, ValueError):
        return False
    return heard


class LingeringClose(Ending):
    """Keeps a connection until the other side has read to its end and closes it, at most for a second.

    Whoever is still talking would otherwise get a reset for what he says next, and with it lose what he has not read yet.

    Args:
        sock: A TCP socket on which nothing more is written. It stays its owner's, who can close it.
    """

    background = True

    def __init__(self, sock: socket.socket) -> None:
        self._sock: Optional[socket.socket] = socket.socket(fileno=os.dup(sock.fileno()))
        self._sock.setblocking(False)
        self._due = time.monotonic() + _LINGER

    def fds(self) -> List[int]:
        return [] if self._sock is None else [self._sock.fileno()]

    def step(self) -> Optional[float]:
        left = self._due - time.monotonic()
        try:
            while self._sock is not None and left > 0 and self._sock.recv(65536):
                left = self._due - time.monotonic()
        except BlockingIOError:
            return left
        except OSError:
            pass
        self.forget()
        return None

    def forget(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def linger(sock: socket.socket) -> Optional[Ending]:
    """End the writing side of a TCP socket that is closed next.

    Returns:
        What is left to be done after that, if anything is.
    """
    try:
        return LingeringClose(sock) if stop_writing(sock) else None
    except OSError:  # out of descriptors
        return None


# -- connecting


def connect(
    place: Place, secure: bool, limit: Optional[float], clock: Callable[[], float], wait_for: WaitFor
) -> socket.socket:
    """Connect to an address.

    Args:
        place: What ``check_address`` has returned.
        secure: Whether it will be TLS, so that it may be any host.
        limit: The time of the clock until which it may take.
        clock: The time in seconds.
        wait_for: Waits for a descriptor (-1: for none) until some time; returns whether it is ready.

    Returns:
        A connected socket that does not block.

    Raises:
        ValueError: It is not loopback, and not secure.
        TimeoutError: It took too long.
        OSError: Nobody listens there, the host does not resolve, ...; the text names the address.
    """
    if isinstance(place, str):
        found: List[Tuple[int, Any]] = [(socket.AF_UNIX, place)]
    else:
        if not place[1]:
            raise ValueError(f"cannot connect to {place!r}: nobody listens at port 0; pass the listener's port")
        found = _resolve(*place, secure, "connect to")
    first: Optional[OSError] = None
    for index, (family, sockaddr) in enumerate(found):
        part = limit
        if limit is not None:  # one address that does not answer leaves time for the others
            now = clock()
            part = now + (limit - now) / (len(found) - index)
        try:
            return _connect(family, sockaddr, part, clock, wait_for)
        except OSError as exc:
            first = first or exc
    assert first is not None
    if isinstance(first, TimeoutError) and first.errno is None:
        raise first
    raise named(first, f"cannot connect to {place!r}") from first


def _connect(
    family: int, sockaddr: Any, limit: Optional[float], clock: Callable[[], float], wait_for: WaitFor
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        number = sock.connect_ex(sockaddr)
        while number == errno.EAGAIN and family == socket.AF_UNIX:
            # The queue of the listener is full, for which no descriptor can be waited.
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
            number = errno.ECONNREFUSED  # the system chose this very port for our end, and TCP can do that
        if number:
            raise OSError(number, os.strerror(number))
        set_nodelay(sock)
        return sock
    except BaseException:
        sock.close()
        raise


# -- listening


class SocketFile:
    """The file of a Unix socket that was made here."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._identity = self._look()

    def _look(self) -> Optional[Tuple[int, int, int]]:
        try:
            status = os.lstat(self._path)
        except OSError:
            return None
        # The time too: the number of a file that is gone is soon another one's.
        return status.st_dev, status.st_ino, status.st_mtime_ns

    def remove(self) -> None:
        """Remove it, unless it is gone or another one has taken its place. A second call does nothing."""
        identity, self._identity = self._identity, None
        try:
            if identity is not None and self._look() == identity:
                os.unlink(self._path)
        except OSError:
            pass


def listen(place: Place, secure: bool) -> Tuple[socket.socket, Place, Optional[SocketFile]]:
    """Listen at an address.

    Returns:
        The socket, which does not block; the address, with the port that was chosen for port 0; the file, if any.

    Raises:
        ValueError: It is not loopback, and not secure.
        OSError: Somebody listens there already, ...; the text names the address.
    """
    if isinstance(place, str):
        try:
            sock, file = _listen_unix(place)
        except OSError as exc:
            raise named(exc, f"cannot listen at {place!r}") from exc
        return sock, place, file
    error: Optional[OSError] = None
    for family, sockaddr in _resolve(*place, secure, "listen at"):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setblocking(False)
            sock.bind(sockaddr)
            sock.listen(_BACKLOG)
            return sock, (place[0], sock.getsockname()[1]), None
        except OSError as exc:
            sock.close()
            error = error or exc
        except BaseException:
            sock.close()
            raise
    assert error is not None
    raise named(error, f"cannot listen at {place!r}") from error


def _listen_unix(path: str) -> Tuple[socket.socket, SocketFile]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            os.fchmod(sock.fileno(), 0o600)  # on Linux the file gets no more than this
        except OSError:
            pass
        try:
            sock.bind(path)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            _remove_dead(path)
            sock.bind(path)
        file = SocketFile(path)
        try:
            # Elsewhere the file has whatever the umask left of 0777, but until listen() nobody can connect.
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
    """Remove the file of a socket behind which there is nobody any more.

    Raises:
        OSError: There is somebody, or it is no socket.
    """
    with _folder_lock(path):
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is no socket, which is not replaced")
        # A socket of another type, with which nobody can connect: a listener would take that for a client.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            number = probe.connect_ex(path)
        if number == errno.ECONNREFUSED:
            os.unlink(path)
        elif number != errno.ENOENT:
            raise OSError(errno.EADDRINUSE, "somebody listens there already")


@contextmanager
def _folder_lock(path: str) -> Iterator[None]:
    """Let only one process at a time look for a dead file and remove it: a second one might remove the new one."""
    import fcntl  # not on Windows, where nobody gets here

    # The lock of the folder itself, which leaves nothing behind. Who holds it for long, or a file system that has no
    # locks, does not keep us from listening.
    fd = -1
    try:
        try:
            fd = os.open(os.path.dirname(path) or os.curdir, os.O_RDONLY)
            due = time.monotonic() + _LOCK_GRACE
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= due:
                        break
                    time.sleep(_RETRY)
        except OSError:
            pass
        yield
    finally:
        if fd >= 0:
            os.close(fd)
