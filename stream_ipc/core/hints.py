"""What probably keeps a reply from coming, for the texts of timeouts.

Knows conversations. Must not know what a text is for.
"""

from __future__ import annotations

from .loop import MAX_DEPTH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .conversation import Conversation

__all__ = ["silence_hint"]


def silence_hint(conversation: Conversation) -> str:
    """Return a hint for the error of a request that got no reply."""
    channel = conversation.channel
    # What a serializer knows of the usual other side: PHP answers less often than Python does.
    hint: str = getattr(getattr(channel.transport, "serializer", None), "silence_hint", "")
    if conversation.loop.depth >= MAX_DEPTH:
        return (
            "; handlers that wait are nested so deeply that requests which came meanwhile had to wait: the reply may"
            " depend on one of them"
        )
    if channel.received_bytes > channel.text_bytes:
        return hint
    return (
        "; nothing has ever come from the other side (is it ticking, does it use the same serializer, does it know the"
        f" class of the request?){hint}"
    )
