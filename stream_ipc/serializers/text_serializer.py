"""What the serializers of JSON and of PHP's format have in common.

Knows messages. Must not know either format: a ``TextFormat`` writes and reads.
"""

from __future__ import annotations

import re

from ..errors import SerializationError
from ..interruptions import interruption_in, pass_on
from ..messages import Message, add_id, take_out_of_envelope
from .text_classes import refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar

    from ..protocols import Payload
    from .text_writing import TextFormat, Write

__all__ = ["HEAD_SIZE", "TextSerializer", "other_format"]

HEAD_SIZE = 1024  # bytes of an envelope in which its id stands, if a known sender has written it

_FORMATS = {
    "JSON": re.compile(rb"\s*[{\[]"),
    "PHP's format": re.compile(rb"[OaC]:[0-9]+:|[NbidsE][:;]"),
    "a pickle": re.compile(rb"\x80[\x02-\x05]"),
}


def other_format(payload: Any, own: str) -> str:
    """Return how an error about an unreadable payload goes on, if the payload looks like another format."""
    try:
        found = next((name for name, start in _FORMATS.items() if start.match(payload) is not None), own)
    except TypeError:  # no buffer, which is what the error is about
        found = own
    return "" if found == own else f"; it looks like {found}: do both sides use the same serializer?"


class TextSerializer:
    """Turns messages into payloads of a format and back."""

    # For the text of a request that got no reply.
    silence_hint = (
        "; if the other side is PHP: it never answers a request whose class it does not know by that wire name, or that"
        " has a value of a wrong type for a property, or an envelope of the other namespace (see the serializer's"
        " namespace=); its own error handlers or its stderr may say more"
    )

    formats: ClassVar[tuple[TextFormat, TextFormat]]  # for the present and for the older release of the original

    def __init__(self, *, namespace: str = "StreamIpc") -> None:
        if namespace not in ("StreamIpc", "PhpStreamIpc"):
            raise ValueError(f"namespace must be 'StreamIpc' or 'PhpStreamIpc', not {namespace!r}")
        self._format = self.formats[namespace == "PhpStreamIpc"]
        self._read = self._format.read

    def __repr__(self) -> str:
        format = getattr(self, "_format", None)  # None: half made
        argument = "namespace='PhpStreamIpc'" if format is not None and format.old else ""
        return f"{type(self).__name__}({argument})"

    def serialize(self, message: Message) -> bytes:
        """Turn a message into a payload.

        Args:
            message: A message, or an envelope around one.

        Returns:
            The payload.

        Raises:
            SerializationError: Something in it cannot travel in this format;
                the text names the field, as in ``TaskRequest.items[3].name: set
                cannot travel in JSON``.
        """
        kind, id, content = take_out_of_envelope(message)
        return self._format.writers[type(content)](kind, id, content)

    @property
    def writers(self) -> dict[type, Write]:
        """What turns a kind, an id and a message into a payload, by class.

        ``serialize`` without an envelope; the id must be one that an envelope
        may have.
        """
        return self._format.writers

    def deserialize(self, payload: Payload) -> Message:
        """Turn a payload into its message.

        Args:
            payload: The payload; nothing of it is kept.

        Returns:
            The message or envelope, built by its class's constructor.

        Raises:
            SerializationError: It is not in this format, names a class that is
                not registered, or holds what the class's constructor refuses.
                Where the id of an envelope could be read, ``request_id`` or
                ``response_id`` says it.
        """
        try:
            message = self._read(payload)
        except Exception as exc:
            if isinstance(exc, MemoryError) and interruption_in(exc) is None:
                exc.__traceback__ = None  # it holds all that was read so far
            error = exc if isinstance(exc, SerializationError) else SerializationError(self._format.reason(exc))
            error.args = (str(error) + other_format(payload, self._format.name),)
            try:
                add_id(error, *self._format.salvage(payload))
            except Exception as other:  # no buffer, or released, or no such format: there is one error to report already
                pass_on(other)
            if error is exc:
                raise
            raise error from exc
        if not isinstance(message, Message):
            refuse("payload", message)
        return message

    @property
    def reader(self) -> Callable[[Payload], Message]:
        """``deserialize``.

        That it exists tells the decoder that nothing of a payload is kept.
        """
        return self.deserialize
