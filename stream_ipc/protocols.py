"""Protocols of what users may bring themselves: a serializer, a generator of ids.

Knows messages. Must not know who needs such objects. A module of its own that is imported at run time only if a program
asks for one of these, because ``typing`` is slow to import.
"""

from __future__ import annotations

from typing import Protocol

from .messages import Message

__all__ = ["MessageSerializer", "Payload", "RequestIdGenerator"]

Payload = bytes | bytearray | memoryview


class MessageSerializer(Protocol):
    """The ``serializer`` of an ``IpcPeer``: any object with these two methods.

    The message may be a ``RequestEnvelope`` or ``ResponseEnvelope`` around the
    user's message. Both methods raise ``SerializationError``; any other
    exception is treated the same. Neither may block.
    """

    def serialize(self, message: Message, /) -> bytes:
        """Turn a message into its payload.

        Raises:
            SerializationError: Something in the message cannot travel; the text
                names the field.
        """
        ...

    def deserialize(self, payload: Payload, /) -> Message:
        """Turn a payload into its message.

        Args:
            payload: If it is a ``memoryview``, valid only during the call: copy
                what is to be kept.

        Raises:
            SerializationError: The payload is no message. Where the id of an
                envelope could still be read, the error carries it as
                ``request_id`` or ``response_id``.
        """
        ...


class RequestIdGenerator(Protocol):
    """The ``id_generator`` of an ``IpcPeer``: any object with this method will do."""

    def generate(self) -> str:
        """Return an id that no pending request of the session has.

        Any text of at most 128 characters.

        Called once for each request. An exception comes out of
        ``Session.request``, and nothing is sent.
        """
        ...
