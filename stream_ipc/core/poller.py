"""The descriptors that a loop waits for, and the task that owns each.

Knows ``selectors``. Must not know what the owners are or what they do with a ready descriptor.
"""

from __future__ import annotations

import errno
import os
import select
import selectors
import stat

from ..interruptions import pass_on

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .roles import Owner

__all__ = ["IN_USE", "READ", "WRITE", "OuterPoller", "Poller"]

IN_USE = "use that session, or pass it to remove_session() first"  # what to do about a stream that another session has

# The numbers of poll and epoll, so that what epoll reports can be used as it is.
READ = 1
WRITE = 4

_TO_SELECTOR = {READ: selectors.EVENT_READ, WRITE: selectors.EVENT_WRITE, READ | WRITE: 3}
_FROM_SELECTOR = {theirs: ours for ours, theirs in _TO_SELECTOR.items()}


class Poller:
    """A ``selectors.DefaultSelector`` whose descriptors have owners.

    What the selector refuses (a regular file, some devices) counts as always ready. Owns which descriptor is watched for
    what, and for which task.

    Attributes:
        owners: The ``Owner`` of each watched descriptor.
        on_rebuild: Called when ``fileno`` has to be watched again, though it is the same number.
        poll: Waits at most so many seconds (0: not at all) and returns (descriptor, events) of each that is ready. Bits
            other than READ and WRITE mean that it is hung up or broken: reading and writing will both tell more.
    """

    poll: Callable[[float], list[tuple[int, int]]]

    def __init__(self) -> None:
        self.on_rebuild: Callable[[], None] | None = None
        self.owners: dict[int, Any] = {}
        self._files: dict[int, tuple[int, int]] = {}  # which file a watched descriptor was
        self._always: dict[int, int] = {}
        self._selector: Any = selectors.DefaultSelector()
        self._epoll: Any = None
        # EpollSelector.select() builds keys that nobody needs, and hides the events of a number that was closed while a
        # copy keeps its file open, so that a wait would spin. So a copy of its descriptor is polled.
        if type(self._selector) is getattr(selectors, "EpollSelector", None) and hasattr(select, "epoll"):
            try:
                number = self._selector.fileno()
                for self._epoll in map(select.epoll.fromfd, map(os.dup, (number,))):  # stored before a signal is looked at
                    break
            except BaseException:  # out of descriptors: a selector is a cycle, and would stay until it is collected
                self._selector.close()
                raise
        self._is_apart = False  # an interruption has left the two with different sets
        self._reported: set[int] = set()  # without an owner
        self._choose()

    def _choose(self) -> None:
        self.poll = self._poll if self._epoll is None or self._always else self._epoll.poll

    def check_free(self, fd: int, owner: Owner | None) -> os.stat_result:
        """Return the status of a descriptor that a task is going to watch.

        Raises:
            OSError: It is closed, or another task watches it.
        """
        other = self.owners.get(fd)
        if other is not None and other is not owner:
            other.check()  # it may not be told yet that its stream was closed, and the number given to a new file
            other = self.owners.get(fd)
        status = os.fstat(fd)
        if other is not None and other is not owner:
            if self._files.get(fd) == (status.st_dev, status.st_ino):
                raise OSError(f"it belongs to another session of this peer, or to a listener; {IN_USE}")
            self._forget(fd)
        return status

    def is_same(self, fd: int) -> bool:
        """Return whether a watched descriptor is still that of the same file; False where the system does not tell."""
        try:
            status = os.fstat(fd)
        except OSError as exc:
            pass_on(exc)
            return False
        # On macOS all TCP sockets are the file 0, and its kqueue forgets one that is closed.
        return status.st_ino != 0 and self._files.get(fd) == (status.st_dev, status.st_ino)

    def watch(self, fd: int, events: int, owner: Owner | None) -> None:
        """Watch a descriptor for a task, or watch it for other events than before.

        Raises:
            OSError: It is closed, another task watches it, or there is no room for another.
        """
        status = self.check_free(fd, owner)
        if self._is_apart:
            self.rebuild()
        if not self._register(fd, events, status.st_mode):
            self._always[fd] = events
            self._choose()
        self._files[fd] = (status.st_dev, status.st_ino)
        self.owners[fd] = owner

    def _register(self, fd: int, events: int, mode: int) -> bool:
        if stat.S_ISREG(mode):
            return False
        wanted = _TO_SELECTOR[events]
        try:
            if fd in self.owners and fd not in self._always:
                self._selector.modify(fd, wanted)
            else:
                self._selector.register(fd, wanted)
        except (FileExistsError, KeyError, FileNotFoundError):
            # An interrupted call has left the selector's two tables apart.
            self._forget(fd)
            self.rebuild()
            self._selector.register(fd, wanted)
        except PermissionError:  # epoll refuses it
            return False
        except OSError as exc:
            pass_on(exc)
            if exc.errno != errno.EINVAL or not stat.S_ISCHR(mode):  # kqueue refuses some devices
                raise
            return False
        return True

    def unwatch(self, fd: int, owner: Owner | None) -> None:
        """Stop watching a descriptor, if it is still the task's. It may be closed already, or not be watched at all."""
        if self.owners.get(fd) is owner:
            self._forget(fd)

    def _forget(self, fd: int) -> None:
        if self._always.pop(fd, None) is not None:
            self._choose()
        try:
            try:
                self._selector.unregister(fd)
            except KeyError as exc:
                pass_on(exc)
                # An interrupted call may have left it in kqueue's table.
                self._selector.register(fd, _TO_SELECTOR[READ | WRITE])
                self._selector.unregister(fd)
        except (KeyError, ValueError, OSError) as exc:
            pass_on(exc)
        self._files.pop(fd, None)
        self.owners.pop(fd, None)

    def drop_ownerless(self, fd: int) -> None:
        """Drop a descriptor that was reported though it has no owner, once it is reported a second time.

        The first report may be left over from this turn: the owner stopped watching after the poll.
        """
        if fd not in self._reported:
            self._reported.add(fd)
            return
        try:
            self.rebuild()
            self._reported.clear()
        except OSError as exc:  # out of descriptors: it is reported again
            pass_on(exc)

    def rebuild(self) -> None:
        """Make a new set, without a descriptor that is reported though it has no owner: the only way to drop it.

        Its number was closed while another number (a ``dup``, a forked process) keeps the open file, and epoll goes on
        reporting it.
        """
        if self._epoll is None:
            return
        fresh = select.epoll()
        try:
            for fd, key in self._selector.get_map().items():
                try:
                    fresh.register(fd, _FROM_SELECTOR[key.events])
                except OSError as exc:  # closed too, which its owner will find out
                    pass_on(exc)
            # The numbers stay, so that whoever waits for one of them need not know.
            self._is_apart = True
            os.dup2(fresh.fileno(), self._epoll.fileno(), inheritable=False)
            os.dup2(fresh.fileno(), self._selector.fileno(), inheritable=False)
            self._is_apart = False
        finally:
            fresh.close()
            if self.on_rebuild is not None:
                self.on_rebuild()

    def _poll(self, timeout: float) -> list[tuple[int, int]]:
        if self._always:
            timeout = 0
        if self._epoll is not None:
            events = self._epoll.poll(timeout)
        else:
            events = [(key.fd, _FROM_SELECTOR[mask]) for key, mask in self._selector.select(timeout)]
        return [*events, *self._always.items()]

    @property
    def has_always(self) -> bool:
        """Whether some descriptor counts as always ready, of which ``fileno`` does not tell."""
        return bool(self._always)

    def fileno(self) -> int:
        """Return a descriptor that is readable while a watched one is ready.

        Raises:
            OSError: The selector of this platform has none.
        """
        if not hasattr(self._selector, "fileno"):
            raise OSError("the selector of this program has no descriptor to wait for; call tick() now and then instead")
        return int(self._selector.fileno())

    def close(self) -> None:
        """Close its own descriptors. Does nothing to the watched descriptors, nor to the copy in another process."""
        if self._epoll is not None:
            self._epoll.close()
        self._selector.close()
        self.on_rebuild = None  # or an outer one whose making was interrupted would keep its descriptors
        self.owners.clear()
        self._files.clear()
        self._always.clear()


class OuterPoller(Poller):
    """A poller around another one, for programs that wait for its descriptor: this one is not lost when that is rebuilt.

    Raises:
        OSError: The selector of this platform has no descriptor.
    """

    def __init__(self, inner: Poller) -> None:
        inner.fileno()
        super().__init__()
        self._inner = inner
        inner.on_rebuild = self.watch_inner
        self.watch_inner()

    def watch_inner(self) -> None:
        """Watch the other, whose descriptor may be a new one under the same number."""
        fd = self._inner.fileno()
        self.unwatch(fd, None)
        self.watch(fd, READ, None)
