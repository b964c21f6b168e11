"""The last look at a stream before something is given up: what had come in time counts though nobody could look.

Knows ports. A process that was stopped, or busy with something else, is late itself, and the other side could only write
or read as much as this side did: so a last look that comes late goes on while the other side does.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .port import Port

__all__ = ["catch_up", "write_on"]

_LATE = 0.02  # seconds; less is nothing unusual
_TIMES = 128  # so that a last look takes at most so many pauses
_PAUSE = 0.01  # seconds that the other side may take from one time to the next


def catch_up(port: Port, late: float) -> None:
    """Read what is there, and if the look comes late, the rest of a message that has begun to arrive.

    Args:
        port: What is read.
        late: How many seconds ago the look should have been.
    """
    port.drain()
    channel = port.channel
    for _ in range(_TIMES if late > _LATE else 0):
        if port.failing or not channel.is_unfinished or not channel.wait(_PAUSE):
            break
        before = channel.received_bytes
        port.drain()
        if channel.received_bytes == before:
            break


def write_on(port: Port, late: float) -> None:
    """Write what the stream takes, and if the look comes late, what it takes while the other side reads.

    Args:
        port: What is written.
        late: As for ``catch_up``.

    Raises:
        StreamClosedError: The other side is gone.
        InvalidStreamError: The stream was closed by its owner.
    """
    port.write()
    channel = port.channel
    for _ in range(_TIMES if late > _LATE else 0):
        queued = channel.queued_bytes
        if not queued or not channel.wait(_PAUSE, True):
            break
        port.write()
        if channel.queued_bytes >= queued:
            break
