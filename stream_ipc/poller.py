"""Waits for descriptors, each of which belongs to somebody.

Knows ``selectors`` and ``select``. Must not know who the owners are or what they do with a ready descriptor.
"""

from __future__ import annotations

import os
import select
import selectors
import stat
import time
from typing import Any, Dict, List, Optional, Tuple

__all__ = ["READ", "WRITE", "Poller"]

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

# The kernel takes milliseconds as an int: more than 24 days would overflow it.
_LONGEST = 24 * 3600.0
_MOST_EVENTS = 256  # in one go; the rest is ready the next time


class Poller:
    """A set of descriptors with their owners.

    A regular file, and a device that the system cannot wait for, counts as always ready.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._owners: Dict[int, Any] = {}
        self._always: Dict[int, int] = {}
        self._epoll: Any = None
        if hasattr(select, "epoll") and isinstance(self._selector, selectors.EpollSelector):
            # The same epoll by another descriptor: asking it directly saves 0.9 us a tick, which is what selectors
            # needs to build its keys. An EpollSelector keeps its own to itself.
            self._epoll = select.epoll.fromfd(os.dup(self._selector.fileno()))
            os.set_inheritable(self._epoll.fileno(), False)

    def __len__(self) -> int:
        return len(self._owners)

    def owner(self, fd: int) -> Any:
        """Whose a descriptor is, or None."""
        return self._owners.get(fd)

    def is_always(self, fd: int) -> bool:
        """Whether a descriptor counts as always ready."""
        return fd in self._always

    def watch(self, fd: int, events: int, owner: Any) -> None:
        """Watch a descriptor, or watch it for other events than before."""
        if fd in self._owners:
            if fd in self._always:
                self._always[fd] = events
            else:
                self._selector.modify(fd, events)
            self._owners[fd] = owner
            return
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                raise PermissionError  # what epoll says; kqueue never reports a file that is at its end
            self._selector.register(fd, events)
        except PermissionError:
            self._always[fd] = events
        self._owners[fd] = owner

    def unwatch(self, fd: int) -> None:
        """Watch a descriptor no longer. It may have been closed already."""
        if self._owners.pop(fd, None) is None or self._always.pop(fd, None) is not None:
            return
        try:
            self._selector.unregister(fd)
        except (KeyError, OSError, ValueError):
            pass

    def poll(self, timeout: Optional[float]) -> List[Tuple[Any, int, int]]:
        """Wait until a descriptor is ready.

        Args:
            timeout: Seconds; 0 does not wait, None waits without limit (but may return early, with nothing).

        Returns:
            (owner, descriptor, events) of each that is ready. What is hung up is readable.
        """
        if timeout is None or timeout > _LONGEST:
            timeout = _LONGEST
        if self._always:
            timeout = 0
        owners = self._owners
        if self._epoll is not None:
            if not owners:
                time.sleep(timeout)
                return []
            events = [
                (owners.get(fd), fd, (READ if mask & ~select.EPOLLOUT else 0) | (WRITE if mask & ~select.EPOLLIN else 0))
                for fd, mask in self._epoll.poll(timeout, min(len(owners), _MOST_EVENTS))
            ]
        else:
            events = [(owners.get(key.fd), key.fd, mask) for key, mask in self._selector.select(timeout)]
        if self._always:
            events += [(owners[fd], fd, mask) for fd, mask in self._always.items()]
        return events

    def fileno(self) -> int:
        """A descriptor that is readable while a watched one is ready."""
        fileno = getattr(self._selector, "fileno", None)
        if fileno is None:
            raise OSError("this platform's selector has no descriptor")
        number: int = fileno()
        return number

    def close(self) -> None:
        """Release everything."""
        if self._epoll is not None:
            self._epoll.close()
        self._selector.close()
        self._owners.clear()
        self._always.clear()
