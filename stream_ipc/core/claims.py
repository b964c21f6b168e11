"""Which streams the sessions of a peer have, so that no other session gets them.

Knows channels over streams, and the poller. Must not know sessions.
"""

from __future__ import annotations

from weakref import ref

from ..errors import InvalidStreamError
from ..interruptions import pass_on
from ..transports.stream_channel import StreamChannel
from .poller import IN_USE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .poller import Poller

__all__ = ["Claims"]


class Claims:
    """Which channel writes to which descriptor. The poller does not know: it watches an output only while that is full.

    Owns that, by weak references.
    """

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._writers: dict[int, ref[StreamChannel]] = {}

    def check_free(self, channel: StreamChannel) -> None:
        """Raise ``InvalidStreamError`` for a channel whose streams somebody else uses, before anything of it is taken."""
        reads, output = channel.interest()[0], channel.outbox.end
        for fd in reads:
            self._check_unwatched(fd)
        for fd in {*reads, output.fd}:
            get_other = self._writers.get(fd)
            other = None if get_other is None else get_other()
            # One that is closed or released has let go of it. Or its owner has closed it, and it may be another file's now.
            if other is None or other is channel or other.outbox.end.fd != fd or other.find_invalid() is not None:
                continue
            raise InvalidStreamError(f"descriptor {fd} is written by another session of this peer; {IN_USE}")
        if output.watched:
            self._check_unwatched(output.fd)

    def _check_unwatched(self, fd: int) -> None:
        try:
            self._poller.check_free(fd, None)
        except OSError as exc:
            pass_on(exc)
            raise InvalidStreamError(f"descriptor {fd} cannot be waited for: {exc}") from exc

    def add(self, channel: Any) -> None:
        """Take note that a channel writes to its output, if that is a descriptor."""
        if isinstance(channel, StreamChannel) and channel.outbox.end.fd >= 0:
            self._writers[channel.outbox.end.fd] = ref(channel)
