"""What users may bring themselves: a serializer, a generator of ids.

Knows messages. Must not know who needs such objects. Apart from what the package needs itself, because ``typing.Protocol``
takes 4 ms to import.
"""

from __future__ import annotations

from typing import Protocol, Union

from .messages import Message

__all__ = ["MessageSerializer", "Payload", "RequestIdGenerator"]

Payload = Union[bytes, bytearray, memoryview]


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


class RequestIdGenerator(Protocol):
    """What an ``IpcPeer`` needs of its ``id_generator``: any object with this method will do."""

    def generate(self) -> str:
        """Return an id that no pending request of the session has; any text of at most 128 characters.

        Called once for each request. What it raises comes out of ``Session.request``, and nothing is sent.
        """
        ...
