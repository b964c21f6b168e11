"""Which streams the sessions of a peer have, so that no other session gets them.

Knows channels over streams, and the poller. Must not know sessions.
"""

from __future__ import annotations

from weakref import ref

from ..errors import InvalidStreamError
from ..interruptions import pass_on
from ..transports.stream_channel import StreamChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .loop import Loop

__all__ = ["ADVICE", "check_free", "claim"]

ADVICE = "use that one, or call remove_session() with it first"


def check_free(loop: Loop, channel: StreamChannel) -> None:
    """Raise ``InvalidStreamError`` for a channel whose streams somebody else uses, before anything of it is taken."""
    for fd in channel.interest()[0]:
        try:
            loop.poller.check_free(fd, None)
        except OSError as exc:
            pass_on(exc)
            raise InvalidStreamError(f"descriptor {fd} cannot be waited for: {exc}") from exc
    output = channel.outbox.end.fd
    get_other = loop.poller.writers.get(output)
    other = None if get_other is None else get_other()
    # One that is closed or released has let go of it. And its owner may have closed it: it may be another file's now.
    if other is None or other is channel or other.outbox.end.fd != output or other.find_invalid() is not None:
        return
    raise InvalidStreamError(f"descriptor {output} is written by another session of this peer; {ADVICE}")


def claim(loop: Loop, channel: Any) -> None:
    """Take note that a channel writes to its output, if that is a descriptor."""
    if isinstance(channel, StreamChannel) and channel.outbox.end.fd >= 0:
        loop.poller.writers[channel.outbox.end.fd] = ref(channel)
