"""Waits for descriptors, each of which belongs to somebody.

Knows ``select.epoll``, or ``selectors`` where there is none. Must not know who the owners are or what they do with a
ready descriptor.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Tuple

__all__ = ["READ", "WRITE", "Poller"]

# The numbers of epoll and poll, so that what these report can be used as it is.
READ = 1
WRITE = 4

_EVENTS = {1: READ, 2: WRITE, 3: READ | WRITE}  # of selectors' numbers
_SELECTOR_EVENTS = {ours: theirs for theirs, ours in _EVENTS.items()}


def _mode(fd: int) -> int:
    try:
        return os.fstat(fd).st_mode
    except OSError:
        if hasattr(select, "poll"):
            raise
        return stat.S_IFSOCK  # Windows: a socket's number is no descriptor there


class Poller:
    """A set of descriptors with their owners.

    A regular file, and a device that the system cannot wait for, counts as always ready.

    Attributes:
        owners: Whose each descriptor is.
        poll: Waits at most so many seconds (0: not at all; at most a day) and returns (descriptor, events) of each
            descriptor that is ready. Bits other than READ and WRITE mean that it is hung up or broken, so that both
            reading and writing will tell more.
    """

    poll: Callable[[float], List[Tuple[int, int]]]

    def __init__(self) -> None:
        self.owners: Dict[int, Any] = {}
        self._events: Dict[int, int] = {}  # what each registered descriptor is watched for
        self._lost = False  # a descriptor could not be unregistered
        self._always: Dict[int, int] = {}
        # Not selectors.EpollSelector: building its keys costs 0.9 us a tick, and its methods can be interrupted half-way.
        self._epoll: Any = select.epoll() if hasattr(select, "epoll") else None
        self._selector: Any = None
        if self._epoll is None:
            import selectors

            self._selector = selectors.DefaultSelector()
        self._choose()

    def _choose(self) -> None:
        # The kernel's own answer, untouched, in the usual case: a function of ours in between costs 0.3 us a tick.
        self.poll = self._poll if self._epoll is None or self._always else self._epoll.poll

    def is_always(self, fd: int) -> bool:
        """Whether a descriptor counts as always ready."""
        return fd in self._always

    def watch(self, fd: int, events: int, owner: Any) -> None:
        """Watch a descriptor, or watch it for other events than before. May be called again if it was interrupted."""
        mode = _mode(fd)
        if stat.S_ISREG(mode) or not self._register(fd, events, mode):
            self._always[fd] = events
            self._choose()
        self.owners[fd] = owner

    def _register(self, fd: int, events: int, mode: int) -> bool:
        try:
            if self._epoll is not None:
                try:
                    self._epoll.register(fd, events)
                except FileExistsError:
                    self._epoll.modify(fd, events)
            else:
                try:
                    self._selector.register(fd, _SELECTOR_EVENTS[events])
                except KeyError:
                    self._selector.modify(fd, _SELECTOR_EVENTS[events])
        except PermissionError:
            return False
        except OSError as exc:
            if exc.errno != errno.EINVAL or not stat.S_ISCHR(mode):
                raise
            return False  # what kqueue says of some devices
        self._events[fd] = events
        return True

    def unwatch(self, fd: int) -> None:
        """Watch a descriptor no longer. It may have been closed already."""
        try:
            if fd in self._always:
                del self._always[fd]
                self._choose()
            elif self._epoll is not None:
                self._epoll.unregister(fd)
                if sys.version_info < (3, 9):
                    os.fstat(fd)  # raises what unregister() keeps to itself there: EBADF
            else:
                self._selector.unregister(fd)
        except (KeyError, ValueError):
            pass
        except OSError:
            self._lost = True
        self._events.pop(fd, None)
        self.owners.pop(fd, None)

    def forget_lost(self) -> bool:
        """Forget what could not be unregistered, because its number had been closed.

        If the same open file has another number somewhere (a ``dup``, a forked process), epoll goes on reporting it under
        the number that is gone, and there is no other way to be rid of it than a new set.

        Returns:
            Whether there was such a thing. Then who watches ``fileno`` has to watch it again.
        """
        if not self._lost or self._epoll is None:
            return False
        self._lost = False
        fresh = select.epoll()
        for fd, events in self._events.items():
            try:
                fresh.register(fd, events)
            except OSError:  # it is closed too, which its owner will find out
                pass
        # The same number, so that nobody else has to know.
        os.dup2(fresh.fileno(), self._epoll.fileno(), inheritable=False)
        fresh.close()
        return True

    def _poll(self, timeout: float) -> List[Tuple[int, int]]:
        if self._always:
            timeout = 0
        if self._epoll is not None:
            events = self._epoll.poll(timeout)
        else:
            if not self.owners:
                time.sleep(timeout)  # Windows does not wait for nothing
                return []
            events = [(key.fd, _EVENTS[mask]) for key, mask in self._selector.select(timeout)]
        return [*events, *self._always.items()]

    @property
    def has_always(self) -> bool:
        """Whether some descriptor counts as always ready. That of ``fileno`` does not tell."""
        return bool(self._always)

    def fileno(self) -> int:
        """A descriptor that is readable while a watched one is ready."""
        if self._epoll is not None:
            number: int = self._epoll.fileno()
            return number
        fileno = getattr(self._selector, "fileno", None)
        if fileno is None:
            raise OSError("this platform has no descriptor to wait for a whole IpcPeer; call tick() now and then instead")
        return int(fileno())

    def close(self) -> None:
        """Release everything."""
        if self._epoll is not None:
            self._epoll.close()
        else:
            self._selector.close()
        self.owners.clear()
        self._always.clear()
