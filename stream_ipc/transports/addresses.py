"""Addresses: what may be one, what it is called in texts, and which addresses of the system it stands for.

Knows names of hosts, and the limits of paths. Must not know connections.

An address is a path (a Unix socket) or a pair ``(host, port)`` (TCP).
"""

from __future__ import annotations

import errno
import os
import socket
import sys

from ..interruptions import pass_on

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Address = str | bytes | os.PathLike[str] | os.PathLike[bytes] | tuple[str, int]
    Place = str | tuple[str, int]  # an address that was checked: the path of a Unix socket, or a host and a port

__all__ = ["check_address", "describe_address", "explain", "resolve"]

_MAX_PATH = 107 if sys.platform.startswith("linux") else 103  # bytes of a Unix socket's path


def check_address(address: Any) -> Place:
    """Tell a path from a pair of host and port.

    Raises:
        TypeError: It is neither.
        ValueError: It is one that cannot be.
        OSError: The path is too long for a Unix socket.
    """
    if isinstance(address, (tuple, list)):
        return _check_pair(tuple(address))
    if not isinstance(address, (str, bytes, os.PathLike)):
        raise TypeError(f"an address is a path (Unix socket) or a pair (host, port), not {address!r:.100}")
    path = os.fsdecode(address)
    if not path or "\0" in path:
        raise ValueError(f"{address!r:.200} is no path; a Unix socket needs one to a file")
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
    if not isinstance(host, str):
        raise TypeError(f"the host of the address {pair!r:.200} must be a str")
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"the port of the address {pair!r:.200} must be an int")
    if not 0 <= port <= 65535:
        raise ValueError(f"the port of the address {pair!r:.200} must be from 0 to 65535")
    if not host or "\0" in host:
        raise ValueError(f'the address {pair!r:.200} names no host; "0.0.0.0" or "::" are all of this machine')
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
    """Return the families and socket addresses of an address, each once.

    Raises:
        OSError: The host does not resolve.
        ValueError: One of them is not loopback, and nothing secures the connection.
    """
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
