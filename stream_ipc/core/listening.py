"""Listening: accepting the connections of a socket inside turns, with the handshakes that come before a session.

Knows sockets, TLS handshakes and the loop. Must not know messages; a session is made by the peer.
"""

from __future__ import annotations

import errno
import logging  # noqa: F401 - for log.py: nothing can be imported once there are no descriptors left
import math
import os
import socket
import sys
from dataclasses import dataclass

from .. import log
from ..interruptions import Shield, pass_on
from ..transports import streams  # noqa: F401 - for sessions, for the same reason
from ..transports.ends import End
from ..transports.sockets import check_address, describe_address, explain, linger, listen, other_user, remove_file
from .poller import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from typing import Any

    from ..transports.sockets import Place
    from .loop import Loop

__all__ = ["Acceptor"]

# Per turn and listener; each may cost a millisecond:
_ACCEPTS = 16  # connections that are accepted, whose handshakes begin
_STEPS = 16  # handshakes that go on

_HANDSHAKES = 256  # under way at a time; further connections wait in the queue of the system...
_YOUNG = 2.0  # ...until the oldest handshake has lasted so many seconds, and is dropped
_HANDSHAKE_LIMIT = 30.0  # seconds for a handshake, if the peer has no timeout
PAUSE = 0.1  # seconds without accepting when there are no descriptors, or too many handshakes

# What accept() says of one connection that is gone again. Anything else concerns all of them.
_GONE = {errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH}


@dataclass
class _Handshake:
    """A connection that has no session yet."""

    sock: Any
    name: str
    since: float
    due: float


class Acceptor:
    """Accepts connections at one address.

    Owns the socket, its file, and the connections that have no session yet. What strangers do before they have one is
    noted as the loop tells of it, and done a few steps in each turn, so that it keeps nobody waiting.

    Args:
        loop: What drives it.
        address: As it was given; see ``IpcPeer.listen``.
        hand_over: Called with each connection, and its name.
        timeout: Returns how many seconds a handshake may take, or None for a limit of its own.
        context: For TLS, or None.

    Attributes:
        loop: As above.
        place: Where it listens; its port is known once it is open.
        closed: Whether it listens no more.
    """

    def __init__(
        self,
        loop: Loop,
        address: Any,
        hand_over: Callable[[Any, str], Any],
        timeout: Callable[[], float | None],
        context: ssl.SSLContext | None,
    ) -> None:
        self.loop = loop
        self.place: Place = check_address(address)
        self.closed: bool = False
        self._hand_over = hand_over
        self._timeout = timeout
        self._context = context
        if context is not None:
            from ..transports import tls

            tls.check_context(context, True)
            self._tls = tls
        self._ready: dict[int, None] = {}  # descriptors at which something can be done; the first has its turn next
        self._handshakes: dict[int, _Handshake] = {}  # by descriptor; the oldest comes first
        self._paused_until = math.inf  # while it accepts nothing
        self._complained = False

    def open(self) -> None:
        """Begin to listen. A call that raises is to be followed by ``close`` if it is one of the loop's listeners then."""
        try:
            for self._sock, self._file in map(listen, (self.place,), (self._context is not None,)):
                break  # stored before a signal is looked at
            self.loop.listeners[self] = None
            self._end = End(self._sock)
            if not isinstance(self.place, str):
                self.place = (self.place[0], self._sock.getsockname()[1])
            self.loop.poller.watch(self._sock.fileno(), READ, self)
        except OSError as exc:
            explain(exc, f"cannot listen at {self.place!r}")
            raise
        log.debug("listener %r opened", self.place)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open" if self._paused_until == math.inf else "paused"
        return f"<Listener {self.place!r} {state} handshakes={len(self._handshakes)}>"

    def close(self) -> None:
        """Close everything. An interrupted call can be made again."""
        if not self.closed:
            log.debug("listener %r closed", self.place)
        # atomic: no calls
        self.closed = True
        self.loop.repairs[self] = None

        if self._file is not None:
            remove_file(self._file)
        self.loop.chores.set_polled(self, math.inf)
        self.loop.set_timer(self, math.inf)
        for fd in (self._sock.fileno(), *self._handshakes):
            self.loop.poller.unwatch(fd, self)
        self.abandon()
        self.loop.listeners.pop(self, None)
        self.loop.repairs.pop(self, None)  # last: until then the next turn does it again

    repair = close  # what an interruption has left

    def abandon(self) -> None:
        """Close the copies of the descriptors in a forked process. The file stays its owner's."""
        self.closed = True
        self._sock.close()
        for handshake in self._handshakes.values():
            handshake.sock.close()
        self._handshakes.clear()

    def check(self) -> None:
        """Check whether the socket was closed by somebody else, which no poller tells."""
        if not self.closed and self._end.find_invalid() is not None:
            log.error("%r: its descriptor was closed by somebody else; it listens no more, so make a new one", self)
            self.loop.poller.unwatch(self._sock.detach(), self)  # the number may be another file's by now
            self.close()

    # -- turns

    def on_ready(self, fd: int, events: int) -> None:
        """Note that a connection can be accepted, or a handshake can go on."""
        self._ready[fd] = None
        self.loop.chores.set_polled(self, 0)

    def poll(self) -> None:
        """Accept connections and go on with handshakes, as far as one turn should."""
        for fd in [*self._ready][:_STEPS]:
            self._ready.pop(fd, None)
            if self.closed:
                return
            with Shield():  # an interruption must not lose a connection that was just accepted
                if fd == self._sock.fileno():
                    self._accept()
                elif fd in self._handshakes:
                    self._step(self._handshakes[fd])
        if not self._ready:
            self.loop.chores.set_polled(self, math.inf)

    def on_time(self, now: float) -> None:
        """Drop handshakes that take too long; accept again after a pause."""
        for handshake in [*self._handshakes.values()]:
            if handshake.due <= now:
                self._drop_unless_ready(handshake, "it took too long")
        if now >= self._paused_until:
            self.check()
            if self.closed:
                return
            try:
                self.loop.poller.watch(self._sock.fileno(), READ, self)
                self._paused_until = math.inf
            except OSError as exc:  # there is no memory for it yet
                pass_on(exc)
                self._paused_until = now + PAUSE
        self._set_timer()

    def _set_timer(self) -> None:
        self.loop.set_timer(self, min([self._paused_until, *[handshake.due for handshake in self._handshakes.values()]]))

    def _pause(self) -> None:
        self.loop.poller.unwatch(self._sock.fileno(), self)
        self._paused_until = self.loop.clock() + PAUSE
        self._set_timer()

    # -- connections

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            if len(self._handshakes) >= _HANDSHAKES:
                oldest = next(iter(self._handshakes.values()))
                if self.loop.clock() - oldest.since < _YOUNG:
                    self._pause()
                    return
                self._drop_unless_ready(oldest, "others are waiting")
            try:
                if sys.platform == "darwin":  # where accept() closes a connection for which no descriptor is left
                    os.close(os.dup(self._sock.fileno()))
                sock = self._sock.accept()[0]
            except BlockingIOError:
                return
            except OSError as exc:
                pass_on(exc)
                if exc.errno in _GONE:
                    continue
                self.check()
                if not self.closed:
                    if not self._complained:
                        self._complained = True
                        log.error("%r cannot accept: %s; it goes on trying", self, exc)
                    self._pause()
                return
            self._complained = False
            self._try(sock, self._take)

    def _try(self, sock: Any, step: Callable[..., None], *arguments: Any) -> None:
        """Take a step with a connection; if it fails, the connection is closed."""
        try:
            step(sock, *arguments)
        except (OSError, ValueError) as exc:  # it is gone again
            sock.close()
            pass_on(exc)
            log.debug("%r: a connection was lost before it had a session: %s", self, exc)
        except BaseException:
            sock.close()
            raise

    def _take(self, sock: socket.socket) -> None:
        """Hand a connection over, or begin its handshake."""
        sock.setblocking(False)
        if isinstance(self.place, str):
            name = f"at {self.place!r}"
            user = other_user(sock)
            if user is not None:
                log.error("%r refused a connection from user %d; this process runs as %d", self, user, os.geteuid())
                sock.close()
                return
        else:
            name = f"from {describe_address(sock.getpeername())}"
        if self._context is None:
            self._hand_over(sock, name)
            return
        now, timeout = self.loop.clock(), self._timeout()
        tls = self._tls.wrap(self._context, sock, True)
        handshake = _Handshake(tls, name, now, now + (_HANDSHAKE_LIMIT if timeout is None else timeout))
        self._handshakes[tls.fileno()] = handshake
        self._set_timer()
        self._step(handshake)

    def _step(self, handshake: _Handshake) -> None:
        try:
            events = self._tls.handshake(handshake.sock)
            if events:
                self.loop.poller.watch(handshake.sock.fileno(), events, self)
                return
        except (OSError, ValueError) as exc:
            pass_on(exc)
            self._drop(handshake, str(exc))
            return
        self._remove(handshake)
        self._try(handshake.sock, self._hand_over, handshake.name)

    def _drop_unless_ready(self, handshake: _Handshake, why: str) -> None:
        """Drop a handshake, unless what it waits for is there and could only not be read."""
        with Shield():
            self._step(handshake)
        if handshake.sock.fileno() in self._handshakes:
            self._drop(handshake, why)

    def _drop(self, handshake: _Handshake, why: str) -> None:
        log.info("%r: the TLS handshake of a connection %s failed: %s", self, handshake.name, why)
        self._remove(handshake)
        try:
            teardown = linger(handshake.sock)  # as long as this call lasts: so that the other side learns why
            if teardown is not None:
                teardown.abandon()  # no finalizer: it would swallow an interruption
        finally:
            handshake.sock.close()

    def _remove(self, handshake: _Handshake) -> None:
        fd = handshake.sock.fileno()
        self._handshakes.pop(fd, None)
        self._ready.pop(fd, None)
        self.loop.poller.unwatch(fd, self)
        self._set_timer()
