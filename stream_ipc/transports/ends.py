"""The ends of the streams of one channel, and closing the streams.

Knows ends of streams. Must not know frames or what an error of a stream means.
"""

from __future__ import annotations

from .descriptors import close_copies, close_streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Ends"]


class Ends:
    """The ends of the streams of one channel.

    Owns the streams.

    Attributes:
        released: Whether the ends were released, so that nothing can be read or written any more.
    """

    def __init__(self) -> None:
        self.released: bool = False
        self._ends: list[Any] = []
        self._streams: list[tuple[Any, int]] = []  # once released: what is still to be closed

    def add(self, end: Any) -> None:
        """Take in an end."""
        self._ends.append(end)

    def find_invalid(self) -> str | None:
        """Return what is wrong with a stream that its owner closed or replaced, or None."""
        for end in self._ends:
            text: str | None = end.find_invalid()
            if text is not None:
                return text
        return None

    def release(self) -> None:
        """Leave the streams as they were found. An interrupted call can be made again."""
        if not self.released:
            streams = self._find_streams()  # for close(), should their owner call it
            # atomic: no calls
            self._streams = streams
            self.released = True

        for end in reversed(self._ends):  # the first end of a stream knows how it was found
            end.release()
        self._ends = []

    def close(self) -> None:
        """Release the streams and close them. An interrupted call can be made again."""
        self.release()
        close_streams(self._streams)

    def abandon(self) -> None:
        """Close this process's copies: it is a fork of the owner, whose flags a release would restore."""
        streams = [*self._find_streams(), *self._streams]
        for end in self._ends:
            end.abandon()
        close_copies(streams)

    def _find_streams(self) -> list[tuple[Any, int]]:
        valid = [end for end in self._ends if end.find_invalid() is None]
        # The same stream may be written and read, as an object, as a number, or as both.
        objects = {id(end.stream): (end.stream, end.fd) for end in valid if not isinstance(end.stream, int)}
        taken = {fd for _, fd in objects.values()}
        numbers = {end.fd: (end.fd, end.fd) for end in valid if isinstance(end.stream, int) and end.fd not in taken}
        return [*objects.values(), *numbers.values()]

    def describe(self) -> str:
        """Return the descriptors, as texts name them."""
        fds = sorted({end.fd for end in self._ends if end.watched})
        if fds:
            return "fd " + "/".join(map(str, fds))
        return "stream objects" if self._ends else "no stream"
