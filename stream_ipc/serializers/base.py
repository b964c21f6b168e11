"""What a serializer is.

Knows messages. Must not know frames or streams: a serializer turns one message into one payload and back.
"""

from __future__ import annotations

from ..messages import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol, Union

    Payload = Union[bytes, bytearray, memoryview]
else:
    Protocol = object

__all__ = ["MessageSerializer"]


class MessageSerializer(Protocol):
    """What an ``IpcPeer`` needs of its ``serializer``: any object with these two methods will do.

    The message may be a ``RequestEnvelope`` or ``ResponseEnvelope`` around the user's message. Both methods raise
    ``SerializationError``; any other exception is treated the same. Neither may block.
    """

    def serialize(self, message: Message, /) -> bytes:
        """Turn a message into its payload.

        Raises:
            SerializationError: Something in the message cannot travel; the text names the field.
        """
        ...

    def deserialize(self, payload: Payload, /) -> Message:
        """Turn a payload into its message.

        Args:
            payload: Valid only during the call if it is a ``memoryview``: copy what is to be kept.

        Raises:
            SerializationError: The payload is no message. Where the id of an envelope could still be read, the
                error carries it as ``request_id`` or ``response_id``.
        """
        ...
