"""What makes a loop that waits return, from any thread and any signal handler, and tells other loops that it is busy.

Knows a pipe and pollers. Must not know the loop.
"""

from __future__ import annotations

import os
from _thread import RLock
from itertools import starmap

from ..interruptions import pass_on
from ..transports.descriptors import close_all
from .poller import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .poller import Poller

__all__ = ["Waker"]


class Waker:
    """A pipe that is readable once ``wake`` was called, and while ``show`` has a byte in it.

    Owns the pipe. It is there from the beginning, because a signal handler that makes it might find no descriptor left,
    and the poller of a wait that is under way may not take notice of a new one.

    Args:
        poller: What watches it.

    Attributes:
        fd: The end to be watched for reading.
        called: Whether ``wake`` was called; the loop sets it back.
    """

    _pipe: Any = ()  # of one whose making was interrupted at once

    def __init__(self, poller: Poller) -> None:
        self.called: bool = False
        self._shown = False
        self._pipe = []  # none once it is closed
        for self._pipe[:] in starmap(os.pipe, [()]):  # stored before a signal is looked at
            break
        self.fd: int = self._pipe[0]
        # While one thread writes, no other may close: the number might be another file's then. A signal handler may be
        # called in the middle of the same thread's wake().
        self._lock: Any = RLock()
        try:
            for fd in self._pipe:
                os.set_blocking(fd, False)
            poller.watch(self.fd, READ, self)
        except BaseException:
            self.abandon()
            raise

    def wake(self) -> None:
        """Make the wait that is under way return, or the next one. Neither blocks nor raises."""
        self.called = True  # first: a wait looks at this before it begins
        if len(self._pipe) == 2:
            with self._lock:
                if len(self._pipe) == 2:
                    try:
                        os.write(self._pipe[1], b"\0")
                    except BlockingIOError:
                        pass  # it is full, so it is readable
                    except OSError as exc:
                        pass_on(exc)

    def show(self, busy: bool) -> None:
        """Keep a byte in the pipe just while a turn has something to do, for a program that waits for the poller itself."""
        if busy != self._shown and self._pipe:
            self._shown = busy
            try:
                if busy:
                    os.write(self._pipe[1], b"\0")
                else:
                    os.read(self.fd, 1)
            except BlockingIOError:
                pass  # it is full, or an interrupted call has done it already

    def on_ready(self, fd: int, events: int) -> None:
        """Empty the pipe. ``called`` stays: ``wake`` has set it before it wrote, and the loop may have set it back."""
        self._shown = False
        try:
            while True:
                if len(os.read(self.fd, 4096)) < 4096:
                    break
        except BlockingIOError:
            pass

    def check(self) -> None:
        """Do nothing: a pipe that another part of the program has closed cannot be mended."""

    def close(self) -> None:
        """Close the pipe. An interrupted call can be made again."""
        with self._lock:
            self.abandon()

    def __del__(self) -> None:
        """Close what an interruption of the making of a loop has left."""
        if self._pipe:
            self.abandon()

    def abandon(self) -> None:
        """Close the pipe without the lock: whoever held it does not run in a forked process."""
        close_all(self._pipe)
