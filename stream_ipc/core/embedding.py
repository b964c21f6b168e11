"""The descriptor by which another loop learns that a turn has something to do.

Knows pollers and pipes. Must not know what there is to do.
"""

from __future__ import annotations

import os
from itertools import starmap

from .poller import READ, Poller

__all__ = ["Embedding"]


class Embedding:
    """A poller around a loop's poller, and a pipe for what no descriptor tells.

    Owns both. The pipe is not for the waits of the loop itself, which would not end then.

    Args:
        poller: The loop's.
    """

    def __init__(self, poller: Poller) -> None:
        self._inner = poller
        poller.on_rebuild = self.watch_poller
        self._outer: Poller | None = None
        self._pipe: tuple[int, int] | None = None
        self._is_open = False
        self._awake = False

    def fileno(self) -> int:
        """Return the descriptor. Makes it at the first call; an interrupted one can be made again.

        Raises:
            OSError: This program's selector has no descriptor.
        """
        if self._outer is not None and self._is_open:
            return self._outer.fileno()
        self._inner.fileno()  # or there is none
        if self._pipe is None:
            for self._pipe in starmap(os.pipe, [()]):  # stored before a signal is looked at
                break
        assert self._pipe is not None
        for fd in self._pipe:
            os.set_blocking(fd, False)
        if self._outer is None:
            self._outer = Poller()
        self.watch_poller()
        self._outer.watch(self._pipe[0], READ, None)
        self._is_open = True
        return self._outer.fileno()

    def watch_poller(self) -> None:
        """Watch the loop's poller, whose descriptor may be new."""
        if self._outer is not None:
            self._outer.unwatch(self._inner.fileno())  # of an old one under the same number
            self._outer.watch(self._inner.fileno(), READ, None)

    def set_awake(self, awake: bool) -> None:
        """Keep a byte in the pipe just while an inbox has work, because then no descriptor may be ready."""
        if self._is_open and awake != self._awake:
            assert self._pipe is not None
            self._awake = awake
            try:
                if awake:
                    os.write(self._pipe[1], b"\0")
                else:
                    os.read(self._pipe[0], 1)
            except BlockingIOError:
                pass  # an interrupted call has done it already

    def close(self) -> None:
        """Release both. An interrupted call can be made again."""
        if self._outer is not None:
            self._outer.close()
        # atomic: no calls
        pipe = self._pipe
        self._pipe = None
        self._is_open = False

        for fd in pipe or ():
            os.close(fd)
