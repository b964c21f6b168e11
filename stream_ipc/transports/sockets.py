"""Sockets: addresses, those that listen and their files, options, who is at the other end, and how a connection ends.

An address is a path (a Unix socket) or a pair ``(host, port)`` (TCP). Must not know messages, sessions or peers. Imported
with the first session over a socket.
"""

from __future__ import annotations

import _socket  # not gevent's
import errno
import fcntl
import os
import socket
import stat
import struct
import sys
import termios
import time

from ..clock import monotonic
from ..interruptions import Shield, pass_on
from .channel import Teardown
from .descriptors import READ_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Address = str | bytes | os.PathLike[str] | os.PathLike[bytes] | tuple[str, int]
    SocketFile = tuple[str, int, int, int]  # a path, and what tells its file from another
    Place = str | tuple[str, int]  # an address that was checked: the path of a Unix socket, or a host and a port

__all__ = [
    "check_address", "check_connected", "describe_address", "explain", "has_vanished", "linger", "listen", "other_user",
    "remove_file", "resolve", "tune",
]  # fmt: skip

# -- addresses

_MAX_PATH = 107 if sys.platform.startswith("linux") else 103  # bytes of a Unix socket's path


def check_address(address: Any) -> Place:
    """Tell a path from a pair of host and port; raise for what is neither, or cannot be one."""
    if isinstance(address, (tuple, list)):
        return _check_pair(tuple(address))
    if not isinstance(address, (str, bytes, os.PathLike)):
        raise TypeError(f"an address is a path (Unix socket) or a pair (host, port), not {address!r:.100}")
    path = os.fsdecode(address)
    if not path or "\0" in path:
        raise ValueError(f"{address!r:.200} is no path; pass the path of the socket's file")
    _, colon, port = path.rpartition(":")
    if "://" in path or (colon and port.isdigit() and os.sep not in path):
        raise ValueError(
            f"the address {path!r:.200} looks like host and port; pass a pair (host, port) for TCP, or a path with a"
            f" {os.sep!r} in it for a Unix socket"
        )
    size = len(os.fsencode(path))
    if size > _MAX_PATH:
        text = f"the path of a Unix socket has at most {_MAX_PATH} bytes, and this one has {size}; choose a shorter one"
        raise OSError(errno.ENAMETOOLONG, text, path)
    return path


def _check_pair(pair: tuple[Any, ...]) -> tuple[str, int]:
    if len(pair) != 2:
        raise ValueError(f"a TCP address is a pair (host, port), not {pair!r:.200}")
    host, port = pair
    if not isinstance(host, str) or not isinstance(port, int) or isinstance(port, bool):
        raise TypeError(f"the address {pair!r:.200} must be a str, which is the host, and an int, which is the port")
    if not 0 <= port <= 65535:
        raise ValueError(f"the port of the address {pair!r:.200} must be from 0 to 65535")
    if "\0" in host:
        raise ValueError(f"the host of the address {pair!r:.200} must not contain a NUL")
    if not host:
        raise ValueError(f'the address {pair!r:.200} has an empty host; use "0.0.0.0" or "::" for all interfaces')
    return host, port


def describe_address(address: Any) -> str:
    """Return the address of a socket of any family as text.

    ``127.0.0.1:80``, ``[::1]:80``, the path of a Unix socket in quotes (an abstract one begins with ``@``), and numbers
    with colons for other families, as ``3:1024`` for ``AF_VSOCK``.
    """
    if isinstance(address, bytes):
        name = os.fsdecode(address)
        return ascii(f"@{name[1:]}" if name[:1] == "\0" else name)
    if not isinstance(address, tuple):
        return repr(address)
    if len(address) > 1 and isinstance(address[0], str) and isinstance(address[1], int):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return ":".join([part.hex() if isinstance(part, bytes) else str(part) for part in address])


def resolve(place: Place, secure: bool) -> list[tuple[int, Any]]:
    """Return the families and socket addresses of an address, each once; ``ValueError`` if one needs to be secured."""
    if isinstance(place, str):
        return [(socket.AF_UNIX, place)]
    host, port = place
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        explain(exc, f"the host {host!r} does not resolve")
        raise
    except ValueError as exc:  # UnicodeError: a name that cannot be one
        raise ValueError(f"{host!r:.200} in the address {place!r:.200} is no name of a host: {exc}") from exc
    found = list(dict.fromkeys((int(family), sockaddr) for family, _, _, _, sockaddr in infos))
    for family, sockaddr in found:
        if not secure and not _is_loopback(family, sockaddr):
            raise ValueError(
                f"refusing the address {place!r} without an ssl_context: {sockaddr[0]} is not loopback, and whoever is on"
                " the way could read and write; pass an ssl_context"
            )
    return found


def _is_loopback(family: int, sockaddr: Any) -> bool:
    if family == socket.AF_INET:
        return bool(sockaddr[0].startswith("127."))
    packed = socket.inet_pton(family, sockaddr[0].partition("%")[0])
    return packed == bytes(15) + b"\x01" or packed[:13] == bytes(10) + b"\xff\xff\x7f"


def explain(exc: OSError, text: str) -> None:
    """Have an error say first what could not be done; raises what a signal handler has raised."""
    pass_on(exc)
    exc.strerror = f"{text}: {exc.strerror or exc}"
    exc.args = (exc.strerror,) if exc.errno is None else (exc.errno, exc.strerror)


# -- sockets that listen

_BACKLOG = 4096  # the system cuts it down to its own limit

_LOCK_TRIES = 100  # to lock a folder...
_LOCK_PAUSE = 0.01  # ...and seconds between two


def listen(place: Place, secure: bool) -> tuple[socket.socket, SocketFile | None]:
    """Listen at an address; of a host, at the first of its addresses where that can be done.

    Returns the socket, and its file, if it has one.
    """
    first: OSError | None = None
    for family, sockaddr in resolve(place, secure):
        try:
            for found in map(_listen, (family,), (sockaddr,)):  # stored before a signal is looked at
                return found
        except OSError as exc:
            pass_on(exc)
            first = first or exc
    assert first is not None
    raise first


def _listen(family: int, sockaddr: Any) -> tuple[socket.socket, SocketFile | None]:
    sock = socket.socket(family, socket.SOCK_STREAM)
    file: SocketFile | None = None
    try:
        if family == socket.AF_UNIX:
            _bind_to_path(sock, sockaddr)
            file = _identify(sockaddr)
            os.chmod(sockaddr, 0o600)  # it has whatever the umask has left, but until listen() no client can connect
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(sockaddr)
        sock.listen(_BACKLOG)
        return sock, file
    except BaseException:
        if family == socket.AF_UNIX and sock.getsockname():  # it was bound, so the file is its own
            remove_file(file or _identify(sockaddr))
        sock.close()
        raise


def _identify(path: str) -> SocketFile:
    path = os.path.abspath(path)
    status = os.lstat(path)
    return path, status.st_dev, status.st_ino, status.st_mtime_ns  # the inode number of a removed file is soon used again


def remove_file(file: SocketFile) -> None:
    """Remove the file of a socket that listened, unless it is gone or another one has taken its place."""
    try:
        if _identify(file[0]) == file:
            os.unlink(file[0])
    except OSError as exc:
        pass_on(exc)


def _bind_to_path(sock: socket.socket, path: str) -> None:
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
    with Shield(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        number = probe.connect_ex(path)
    if number == errno.ECONNREFUSED:
        os.unlink(path)
    elif number != errno.ENOENT:
        raise OSError(errno.EADDRINUSE, "somebody listens there already")


# -- connections

# Seconds of silence before the first probe, seconds between probes, and probes that may stay unanswered. A host that
# vanished is noticed within two minutes. The first option has another name on macOS.
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 5))

_TCP_RXT_CONNDROPTIME = 0x80  # of macOS: seconds for which it sends what is not acknowledged again; has no name in Python


def tune(sock: socket.socket) -> None:
    """Let small messages of a connected TCP socket leave at once, and notice when its other host has vanished.

    Does nothing for other sockets. What the system does not let set, stays as it is: a connection that is gone already
    shows that when it is used.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    options += [(socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in _KEEPALIVE if hasattr(socket, name)]
    if sys.platform == "darwin":
        options.append((socket.IPPROTO_TCP, _TCP_RXT_CONNDROPTIME, int(VANISHED)))  # as has_vanished() does on Linux
    for option in options:
        try:
            sock.setsockopt(*option)
        except OSError as exc:
            pass_on(exc)


def check_connected(sock: Any) -> str:
    """Look at a socket that a user has connected, and return what it is connected to; may be empty."""
    if not isinstance(sock, socket.socket):
        raise TypeError(f"create_socket_session() takes a socket, not {sock!r:.100}")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"{sock!r} is no stream socket; messages need SOCK_STREAM")
    try:
        address = sock.getpeername()
    except OSError as exc:
        pass_on(exc)
        if exc.errno == errno.EINVAL:  # macOS: the other side has closed it, and what it had written is still to be read
            return ""
        advice = "pass one that is open and connected, or that accept() has returned"
        raise ValueError(f"{sock!r} cannot be used: {exc}; {advice}") from exc
    return f"to {describe_address(address)}" if address else ""


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


# -- the end of a connection

# A host that acknowledges nothing for so many seconds, though it was asked so often, has vanished. Keepalive says nothing
# while something is on its way, and the system itself goes on asking for a quarter of an hour. Its option
# TCP_USER_TIMEOUT is no help: it cuts off a program that does not read for so long, too, though its host answers.
VANISHED = 110.0
_ASKED = 3


def has_vanished(sock: socket.socket) -> bool:
    """Return whether the host at the other end of a TCP socket does not answer any more, as far as the system tells."""
    if not hasattr(socket, "TCP_INFO"):  # it is not Linux
        return False
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
    except OSError as exc:
        pass_on(exc)
        return False
    # struct tcp_info: bytes 2 and 3 are the retransmissions and the probes that were not answered; the milliseconds since
    # the last acknowledgement came are its fifteenth number of four bytes.
    (last,) = struct.unpack_from("I", info, 56)
    return info[2] + info[3] >= _ASKED and last >= VANISHED * 1000


_SO_NWRITE = 0x1024  # of macOS, which has no name in Python


def _has_unsent(fd: int) -> bool:
    """Return whether something that was written is not acknowledged yet, so that a reset would overtake it."""
    try:
        if sys.platform != "darwin":
            (size,) = struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)))
            return bool(size > 1)  # the end of writing counts for one
        with Shield():  # or an interruption could leave the descriptor to the object
            sock = _socket.socket(fileno=fd)
            try:
                return sock.getsockopt(socket.SOL_SOCKET, _SO_NWRITE) > 0
            finally:
                sock.detach()
    except OSError as exc:
        pass_on(exc)
        return False


def linger(sock: socket.socket) -> Teardown | None:
    """End the writing side of a TCP socket that is closed next, so that what was written arrives.

    Closing with unread input makes TCP reset the connection, and that overtakes what is on its way. Returns what is left
    to be done, if the other side is still talking, or not everything has arrived.
    """
    try:
        sock.shutdown(socket.SHUT_WR)
        teardown = _LingeringClose(sock.fileno())
    except OSError as exc:  # it is gone already, or there is no descriptor
        pass_on(exc)
        return None
    try:
        return None if teardown.step() is None else teardown
    except BaseException:
        teardown.abandon()
        raise


_LINGER = 1.0  # seconds
_NEXT_LOOK = 0.02  # seconds until it is asked again whether everything has arrived
_LINGER_READS = 16  # of a step: more would keep other sessions waiting


class _LingeringClose(Teardown):
    """Keeps a TCP connection until the other side has read to its end and closes it, for a limited time.

    If the other side has said nothing, it is not kept longer than until everything has arrived.

    Owns a copy of the descriptor.
    """

    background = True
    _fd = -1

    def __init__(self, fd: int) -> None:
        self._is_talking = False
        # No socket object: under gevent that would be one of gevent's. Stored before a signal is looked at.
        for self._fd in map(os.dup, (fd,)):
            break
        self._due = monotonic() + _LINGER

    def __del__(self) -> None:
        """Close what an interruption has lost before anybody got it."""
        self.abandon()

    def fds(self) -> list[int]:
        return [] if self._fd < 0 else [self._fd]

    def step(self) -> float | None:
        left = self._due - monotonic()
        try:
            os.set_blocking(self._fd, False)  # its owner's flag, which is the same, was restored meanwhile
            for _ in range(_LINGER_READS):
                if left <= 0 or not os.read(self._fd, READ_SIZE):
                    break
                self._is_talking = True
            else:
                return left
        except BlockingIOError:
            if self._is_talking:
                return left
            if _has_unsent(self._fd):
                return min(left, _NEXT_LOOK)
        except (OSError, MemoryError) as exc:
            pass_on(exc)
        self.abandon()
        return None

    def hurry(self, due: float) -> None:
        self._due = min(self._due, due)

    def abandon(self) -> None:
        # atomic: no calls
        fd = self._fd
        self._fd = -1

        if fd >= 0:
            os.close(fd)
