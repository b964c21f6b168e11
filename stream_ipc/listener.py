"""Connections: accepted by a ``Listener`` inside ticks, and made by ``IpcPeer.connect``.

Knows sockets, TLS handshakes and the poller. Must not know messages; a session is made by the peer, which hands it to
``on_session`` when it dispatches, before anything that came over it.

What strangers do before they have a session happens in one ``Poller`` of the listener's own, whose descriptor the
peer watches: so a tick takes a bounded number of steps for all of them together, and no handler ever waits for one.
"""

from __future__ import annotations

import errno
import logging  # noqa: F401 - what log.py needs; who has run out of descriptors can import nothing any more
import math
import os
import socket
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Tuple, Union

from . import log
from .poller import READ, Poller
from .transports.descriptors import describe_address
from .transports.sockets import (
    Place,
    Shield,
    SocketFile,
    check_address,
    connect,
    is_unix,
    listen,
    named,
    other_user,
    set_nodelay,
    stop_writing,
)

if TYPE_CHECKING:
    import ssl

    from .peer import IpcPeer
    from .session import Session

__all__ = ["Listener", "open_connection", "open_listener"]

# Per tick and listener:
_ACCEPTS = 16  # connections that are accepted
_STEPS = 16  # steps of handshakes, each of which may cost a millisecond

_HANDSHAKES = 256  # that are under way at a time; who comes then waits in the queue of the system...
_YOUNG = 2.0  # ...until the oldest has lasted so many seconds, and is dropped for him
_HANDSHAKE_LIMIT = 30.0  # seconds for a handshake, if the peer has no timeout
_PAUSE = 0.1  # seconds without accepting when there are no descriptors, or too many handshakes

# What accept() says of one connection that is gone again. Anything else concerns all of them.
_GONE = {errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH}


class _Handshake:
    """A connection that has no session yet."""

    __slots__ = ("due", "name", "since", "sock")

    def __init__(self, sock: Any, name: str, since: float, due: float) -> None:
        self.sock = sock
        self.name = name
        self.since = since
        self.due = due


class Listener:
    """Accepts connections while its peer ticks. Made by ``IpcPeer.listen``, and closed with its peer at the latest.

    A context manager: leaving closes it.
    """

    def __init__(
        self,
        peer: IpcPeer,
        sock: socket.socket,
        place: Place,
        file: Optional[SocketFile],
        on_session: Callable[[Session], Any],
        context: Optional[ssl.SSLContext],
    ) -> None:
        self._peer = peer
        self._sock = sock
        self._place = place
        self._file = file
        self._on_session = on_session
        self._context = context
        if context is not None:
            from .transports import tls

            self._tls = tls
        self._handshakes: Dict[int, _Handshake] = {}  # by descriptor; the oldest comes first
        self._paused_until: Optional[float] = None
        self._complained = False
        self._next = 0  # whose turn it is among those that are ready
        self._closed = False
        self._identity = self._identify()
        self._poller = Poller()
        try:
            self._poller.watch(sock.fileno(), READ, self)
            self._fd = self._poller.fileno()
        except BaseException:
            self._poller.close()
            raise

    def __repr__(self) -> str:
        try:
            state = "closed" if self._closed else "open" if self._paused_until is None else "paused"
            return f"<Listener {self._place!r} {state} handshakes={len(self._handshakes)}>"
        except Exception:  # half made
            return "<Listener>"

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def address(self) -> Union[str, Tuple[str, int]]:
        """Where it listens: the path, or the host as it was given and the port, also one that the system chose.

        Stays the same when it is closed.
        """
        return self._place

    @property
    def is_open(self) -> bool:
        """Whether it accepts connections."""
        return not self._closed

    def close(self) -> None:
        """Accept no more, and remove the file of a Unix socket. A second call does nothing.

        Does not block and runs no handlers. Sessions that were accepted stay open. Connections that were not accepted
        yet, or whose handshake is not over, are closed.

        Raises:
            RuntimeError: Another thread is using the peer.
        """
        if self._closed:
            return
        if self._peer._is_forked:
            self._end()
            return
        outer = self._peer._enter()
        try:
            self._end()
        finally:
            self._peer._leave(outer)

    # -- for the peer

    def _start(self) -> None:
        """Begin to be watched."""
        self._peer.listeners[self] = None
        self._peer._watch(self, self._fd, READ)
        log.debug("listener %r opened", self._place)

    def _end(self) -> None:
        """Release everything. In a forked copy of the process, only what is this process's own."""
        peer = self._peer
        if not self._closed and not peer._is_forked:
            log.debug("listener %r closed", self._place)
        self._closed = True
        peer.listeners.pop(self, None)
        if not peer._is_forked:
            if self._file is not None:
                self._file.remove()
            peer._set_interval(self, False)
            peer._unwatch(self, self._fd)
        self._poller.close()
        self._sock.close()
        for handshake in self._handshakes.values():
            handshake.sock.close()
        self._handshakes.clear()

    def _find_invalid(self) -> None:
        """Somebody else has closed a descriptor of it."""
        log.error("%r: its descriptor was closed by somebody else; it listens no more, so make a new one", self)
        if self._identify() != self._identity:
            self._sock.detach()  # the number may be another file's by now
        self._end()

    def _check(self) -> None:
        """Look for what no poller tells: that somebody else has closed the socket."""
        if not self._closed and self._identify() != self._identity:
            self._find_invalid()

    def _identify(self) -> Optional[Tuple[int, int]]:
        try:
            status = os.fstat(self._sock.fileno())
        except OSError:  # closed; or Windows, where it is no descriptor
            return None
        return status.st_dev, status.st_ino

    def _ready(self, fd: int, events: int) -> None:
        """Something has happened to its descriptors."""
        self._read(fd)

    def _read(self, fd: int) -> None:
        """Accept connections and go on with handshakes, as far as one tick should."""
        if self._closed:
            return
        events = self._poller.poll(0)
        # Those that are ready take turns, or the first ones could keep the others waiting for ever.
        count = len(events)
        start = self._next % count if count else 0
        self._next = start + _STEPS
        for index in range(start, start + min(count, _STEPS)):
            fd = events[index % count][0]
            with Shield():  # an interruption must not lose who was just accepted
                if fd == self._sock.fileno():
                    self._accept()
                elif fd in self._handshakes:
                    self._step(self._handshakes[fd])

    def _interval(self) -> float:
        """In how many seconds to look though no descriptor is ready."""
        due = math.inf
        for handshake in self._handshakes.values():
            due = handshake.due
            break
        if self._paused_until is not None:
            due = min(due, self._paused_until)
        return max(0.0, due - self._peer.clock())

    def _look(self) -> float:
        """Drop handshakes that take too long; accept again after a pause. Returns for how long it need not be called."""
        now = self._peer.clock()
        for handshake in tuple(self._handshakes.values()):
            if handshake.due > now:
                break
            self._drop(handshake, "it took too long")
        if self._paused_until is not None and now >= self._paused_until:
            self._check()
            if self._closed:
                return 0.0
            self._paused_until = None
            self._poller.watch(self._sock.fileno(), READ, self)
            self._update_interval()
        return 0.0

    # -- inside

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            if len(self._handshakes) >= _HANDSHAKES and not self._make_room():
                self._pause()
                return
            try:
                sock = self._sock.accept()[0]
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                if exc.errno in _GONE:
                    continue
                self._check()
                if self._closed:
                    return
                if not self._complained:
                    self._complained = True
                    log.error("%r cannot accept: %s; it goes on trying", self, exc)
                self._pause()
                return
            self._complained = False
            try:
                self._take(sock)
            except (OSError, ValueError) as exc:  # it is gone again
                log.debug("%r: a connection was lost before it had a session: %s", self, exc)
                sock.close()
            except BaseException:
                sock.close()
                raise

    def _take(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if is_unix(self._place):
            user = other_user(sock)
            if user is not None:
                log.error("%r refused a connection from user %d; this process runs as %d", self, user, os.geteuid())
                sock.close()
                return
        set_nodelay(sock)
        name = f"at {self._place!r}" if is_unix(self._place) else f"from {describe_address(sock.getpeername())}"
        if self._context is None:
            self._peer._add_socket(sock, self._on_session, name)
            return
        tls = self._tls.wrap(self._context, sock, True)
        now = self._peer.clock()
        timeout = self._peer.timeout
        handshake = _Handshake(tls, name, now, now + (_HANDSHAKE_LIMIT if timeout is None else timeout))
        self._handshakes[tls.fileno()] = handshake
        self._poller.watch(tls.fileno(), READ, self)
        self._update_interval()

    def _step(self, handshake: _Handshake) -> None:
        sock = handshake.sock
        try:
            events = self._tls.handshake(sock)
        except (OSError, ValueError) as exc:
            self._drop(handshake, str(exc))
            return
        if events:
            self._poller.watch(sock.fileno(), events, self)
            return
        self._forget(handshake)
        try:
            self._peer._add_socket(sock, self._on_session, handshake.name)
        except (OSError, ValueError) as exc:
            log.debug("%r: a connection was lost before it had a session: %s", self, exc)
            sock.close()

    def _drop(self, handshake: _Handshake, why: str) -> None:
        log.info("%r: the TLS handshake of a connection %s failed: %s", self, handshake.name, why)
        self._forget(handshake)
        stop_writing(handshake.sock)  # so that the other side learns why
        handshake.sock.close()

    def _forget(self, handshake: _Handshake) -> None:
        fd = handshake.sock.fileno()
        self._handshakes.pop(fd, None)
        self._poller.unwatch(fd)
        self._update_interval()

    def _make_room(self) -> bool:
        for handshake in self._handshakes.values():
            break
        if self._peer.clock() - handshake.since < _YOUNG:
            return False
        self._drop(handshake, "others are waiting")
        return True

    def _pause(self) -> None:
        self._paused_until = self._peer.clock() + _PAUSE
        self._poller.unwatch(self._sock.fileno())
        self._update_interval()

    def _update_interval(self) -> None:
        self._peer._set_interval(self, bool(self._handshakes) or self._paused_until is not None)


def open_listener(
    peer: IpcPeer, address: Any, on_session: Callable[[Session], Any], context: Optional[ssl.SSLContext]
) -> Listener:
    """What ``IpcPeer.listen`` does."""
    if not callable(on_session):
        raise TypeError(f"on_session must be a function that takes a session, not {on_session!r:.100}")
    place = check_address(address)
    if context is not None:
        _check_context(context, True)
    sock, place, file = listen(place, context is not None)
    try:
        listener = Listener(peer, sock, place, file, on_session, context)
    except BaseException:
        sock.close()
        if file is not None:
            file.remove()
        raise
    try:
        listener._start()
    except BaseException:
        listener._end()
        raise
    return listener


def open_connection(
    peer: IpcPeer,
    address: Any,
    context: Optional[ssl.SSLContext],
    server_hostname: Optional[str],
    timeout: Optional[float],
) -> Session:
    """What ``IpcPeer.connect`` does."""
    place = check_address(address)
    if context is not None:
        _check_context(context, False)
    elif server_hostname is not None:
        raise ValueError("server_hostname is for TLS; pass an ssl_context too")
    limit = None if timeout is None else peer.clock() + timeout
    late = f"cannot connect to {place!r} within {timeout} s"
    try:
        sock = connect(place, context is not None, limit, peer.clock, peer._wait_for)
        try:
            if is_unix(place):
                _check_owner(sock, place)
            if context is not None:
                late = f"the TLS handshake with {place!r} was not over within {timeout} s; does the other side speak TLS?"
                sock = _shake_hands(peer, sock, place, context, server_hostname, limit)
            return peer._add_socket(sock, name=f"to {describe_address(place)}")
        except BaseException:
            sock.close()
            raise
    except TimeoutError as exc:
        if exc.errno is not None:  # the system's own
            raise
        raise TimeoutError(late) from exc


def _check_context(context: Any, server_side: bool) -> None:
    import ssl

    if not isinstance(context, ssl.SSLContext):
        raise TypeError(f"ssl_context must be an ssl.SSLContext, not {context!r:.100}")
    if context.protocol == (ssl.PROTOCOL_TLS_CLIENT if server_side else ssl.PROTOCOL_TLS_SERVER):
        wanted, given = ("SERVER", "CLIENT") if server_side else ("CLIENT", "SERVER")
        raise ValueError(f"ssl_context is a PROTOCOL_TLS_{given} one; this side needs PROTOCOL_TLS_{wanted}")


def _check_owner(sock: socket.socket, place: Place) -> None:
    user = other_user(sock)
    if user is not None:
        raise PermissionError(
            errno.EACCES,
            f"refusing to connect to {place!r}: user {user} listens there, and this process runs as {os.geteuid()}",
        )


def _shake_hands(
    peer: IpcPeer,
    sock: socket.socket,
    place: Place,
    context: ssl.SSLContext,
    server_hostname: Optional[str],
    limit: Optional[float],
) -> socket.socket:
    import ssl

    from .transports.tls import handshake, wrap

    if server_hostname is None and not isinstance(place, str):
        server_hostname = place[0]
    try:
        tls = wrap(context, sock, False, server_hostname)
    except OSError as exc:
        raise named(exc, f"cannot connect to {place!r}") from exc
    except ValueError as exc:
        raise ValueError(f"cannot connect to {place!r}: {exc}") from exc
    try:
        while True:
            events = handshake(tls)
            if not events:
                return tls
            if not peer._wait_for(tls.fileno(), events, limit):
                raise TimeoutError
    except ssl.SSLError as exc:
        tls.close()
        text = f"the TLS handshake with {place!r} failed: {exc.strerror or exc}"
        error = type(exc)(exc.errno, text)
        for name in ("reason", "library", "verify_code", "verify_message"):
            if hasattr(exc, name):
                setattr(error, name, getattr(exc, name))
        raise error from exc
    except OSError as exc:
        tls.close()
        if isinstance(exc, TimeoutError) and exc.errno is None:
            raise
        raise named(exc, f"the TLS handshake with {place!r} failed") from exc
    except BaseException:
        tls.close()
        raise
