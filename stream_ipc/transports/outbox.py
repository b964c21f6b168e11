"""Frames that wait to be written to one stream, and the writing of them.

Knows buffers and the end that is written. Must not know messages, or what an error of the stream means.
"""

from __future__ import annotations

from itertools import repeat
from operator import itemgetter, sub

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from .channel import Frame
    from .ends import WriteEnd

__all__ = ["Outbox"]

# While corked, frames are written once this much has been gathered: less costs more system calls, and much more puts the
# two sides into lock step.
_GATHER = 4 * 1024
_JOIN = 64 * 1024  # small buffers are joined up to this size before they are written


class Outbox:
    """The queue of one stream that is written.

    Owns the queue, what the last write has left of its first buffer until that is taken off it, and whether the stream is
    full.

    Args:
        end: The end that is written.
        failed: Called with what a write has raised, or None if nothing can be written any more. Raises what callers see;
            returns if a signal handler has raised it.
        on_change: Called when ``blocked`` has changed.

    Attributes:
        queue: Buffers, in order. Always the same list.
        queued_bytes: How many bytes these are, unless a write is under way.
        held: Whether a frame that is put in is not to be written at once: the queue is blocked, corked, or has failed.
        blocked: Whether the stream did not take everything, so that its descriptor is to be waited for.
        corked: Whether small frames are gathered.
        writing: Whether a write is under way: it also writes what a finalizer or a signal handler puts in meanwhile.
        error: Why nothing can be written any more.
    """

    def __init__(self, end: WriteEnd, failed: Callable[[Exception | None], None], on_change: Callable[[], None]) -> None:
        self.end: WriteEnd = end
        self.queue: list[Any] = []
        self.queued_bytes: int = 0
        self.held: bool = False
        self.blocked: bool = False
        self.corked: bool = False
        self.writing: bool = False
        self.error: BaseException | None = None
        self._failed = failed
        self._on_change = on_change
        self._left: int | None = None
        # Each step writes the first buffer and returns how much of it is left; no bytecode comes in between.
        sizes = map(len, map(itemgetter(0), repeat(self.queue)))
        self._writes: Iterator[int] = map(sub, sizes, end.writes(map(itemgetter(0), repeat(self.queue))))

    def put(self, frame: Frame) -> None:
        """Queue the buffers of a frame, which is empty from then on, and write what the stream takes now.

        If frames are held, one that is empty has what is queued written.

        Raises:
            Exception: What ``failed`` raises.
        """
        if self.writing or (self.held and frame):
            self._put_behind(frame)
            return
        queue = self.queue
        try:
            # atomic: no calls
            self.writing = True
            queue += frame
            del frame[:]

            while True:
                if not queue:
                    if not self.queued_bytes:
                        break
                    self.queued_bytes = 0
                    if self.blocked:
                        self._set_blocked(False)
                    if not queue:  # or a signal handler has sent something meanwhile, which nothing else would write
                        break
                if self._left is None:
                    if self.queued_bytes:
                        self._join()
                    for self._left in self._writes:
                        break
                if self._left:
                    self._take_off(self._left)
                else:
                    # atomic: no calls
                    del queue[0]
                    self._left = None
        except BlockingIOError:
            self._count()
            if not self.blocked:
                self._set_blocked(True)
        except IndexError:  # a signal handler has dropped the queue just before the write
            if queue:
                raise
        except (OSError, ValueError) as exc:
            self._failed(exc)
            self._write_later()
            raise
        except BaseException:
            self._write_later()
            raise
        finally:
            self.writing = False

    def flush(self) -> None:
        """Write what the stream takes now of what is queued; raises as ``put`` does."""
        if not self.writing:
            self.put([])

    def _put_behind(self, frame: Frame) -> None:
        """Queue a frame that is not to be written at once."""
        if self.error is not None:
            self._failed(None)
        size = sum(map(len, frame))
        # atomic: no calls
        self.queue += frame
        self.queued_bytes += size
        del frame[:]

        if self.corked and self.queued_bytes >= _GATHER and not self.blocked:
            self.flush()

    def _take_off(self, left: int) -> None:
        """Take what was written off the first buffer, of which so many bytes are left."""
        if self.end.growable and len(self.queue[0]) > _JOIN:
            self.end.grow()
        rest = [memoryview(self.queue[0])[-left:]]
        if self.error is None:  # a signal handler may have dropped the queue
            # atomic: no calls
            self.queue[:1] = rest
            self._left = None

    def _count(self) -> None:
        self.queued_bytes = sum(map(len, self.queue))

    def _join(self) -> None:
        """Join small buffers at the front: that costs less than a write for each."""
        queue = self.queue
        size = stop = 0
        while stop < len(queue) and size + len(queue[stop]) <= _JOIN:
            size += len(queue[stop])
            stop += 1
        if stop > 1:
            joined = [b"".join(queue[:stop])]
            if self.error is None:
                # atomic: no calls
                queue[:stop] = joined

    def _write_later(self) -> None:
        """Wait for the stream to be writable: an interruption has left something in the queue."""
        self._count()
        if self.queued_bytes:
            self._set_blocked(True)

    def _set_blocked(self, blocked: bool) -> None:
        self.blocked = blocked
        self._update_held()
        self._on_change()

    def cork(self, corked: bool) -> None:
        """Gather small frames from now on, or write each at once."""
        self.corked = corked
        self._update_held()

    @property
    def is_broken(self) -> bool:
        """Whether nothing can be written any more."""
        return self.error is not None

    def _update_held(self) -> None:
        self.held = self.blocked or self.corked or self.error is not None

    def drop(self, error: BaseException) -> None:
        """Drop what is queued: nothing can be written any more."""
        # atomic: no calls
        if self.error is None:
            self.error = error
        self.held = True
        self.queue[:] = ()
        self.queued_bytes = 0
        self._left = None

        if self.blocked:
            self._set_blocked(False)
