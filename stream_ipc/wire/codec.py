"""Messages in frames: one direction each way of one stream.

Knows framing, serializers and messages. Must not know streams or sessions. What cannot be decoded becomes an error
object in its place among the messages, so that order is kept and nothing that stands before or behind it is lost.
"""

from __future__ import annotations

import codecs
from typing import Any, Callable, List, Tuple, Union

from ..errors import FrameTooLargeError, IpcError, SerializationError
from ..messages import LogMessage, Message
from ..serializers.base import MessageSerializer
from . import framing
from .framing import MAX_FRAME_SIZE, frame_header

__all__ = ["DecoderState", "MessageDecoder", "MessageEncoder", "Received", "check_max_frame_size", "decode_text"]

# What comes out of a stream: a message, or the error that stands for what should have been one.
Received = Union[Message, IpcError]

# Below this a frame is one buffer: joining header and payload costs less than writing two (1.38 us against 1.56).
_JOIN = 32 * 1024


def check_max_frame_size(size: int) -> int:
    """Return the size if a frame can be that large.

    Raises:
        TypeError: It is no int.
        ValueError: It is negative or over what the length field can say.
    """
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"max_frame_size must be a number of bytes, not {size!r}")
    if not 0 < size <= MAX_FRAME_SIZE:
        raise ValueError(f"max_frame_size must be from 1 to {MAX_FRAME_SIZE} bytes, not {size}")
    return size


class MessageEncoder:
    """Turns messages into frames.

    Args:
        serializer: What turns a message into a payload.
        max_frame_size: The largest payload in bytes.
    """

    def __init__(self, serializer: MessageSerializer, max_frame_size: int) -> None:
        self.serializer = serializer
        self.max_frame_size = check_max_frame_size(max_frame_size)
        for name in ("serialize", "deserialize"):
            if not callable(getattr(serializer, name, None)):
                raise TypeError(f"{type(serializer).__name__} is no serializer: it has no method {name}()")
        # Optional: a payload in several buffers, so that large bytes need not be copied.
        self._serialize: Callable[[Message], Any] = getattr(serializer, "serialize_chunks", serializer.serialize)

    def encode(self, message: Message) -> List[Any]:
        """The frame of a message, as a list of buffers that nobody changes any more.

        Raises:
            SerializationError: The message cannot travel.
            FrameTooLargeError: Its payload is over ``max_frame_size``.
        """
        try:
            payload = self._serialize(message)
        except SerializationError:
            raise
        except Exception as exc:
            raise SerializationError(
                f"{type(self.serializer).__name__} could not serialize {type(message).__name__}:"
                f" {type(exc).__name__}: {exc}"
            ) from exc
        if type(payload) is list:
            if len(payload) == 1:
                size = len(payload[0])
                if size <= self.max_frame_size and size < _JOIN:
                    return [frame_header(size) + payload[0]]
            chunks = payload
        else:
            if type(payload) is not bytes:
                if not isinstance(payload, (bytes, bytearray, memoryview)):
                    raise SerializationError(
                        f"{type(self.serializer).__name__}.serialize() returned a {type(payload).__name__}, not bytes"
                    )
                payload = bytes(payload)
            chunks = [payload]
        size = sum(map(len, chunks))
        if size > self.max_frame_size:
            raise FrameTooLargeError(
                f"frame of {size} bytes for {type(message).__name__} exceeds max_frame_size {self.max_frame_size};"
                " raise it on both sides, or send less at a time",
                size=size,
                limit=self.max_frame_size,
            )
        if size < _JOIN:
            return [b"".join([frame_header(size), *chunks])]
        if len(chunks[0]) < _JOIN:
            chunks[0] = frame_header(size) + chunks[0]
        else:
            chunks.insert(0, frame_header(size))
        return chunks


def decode_text(data: bytes, final: bool = False) -> Tuple[str, bytes]:
    """Decode bytes that are no frames, for people to read.

    Args:
        data: What was held back by the call before, and the new bytes.
        final: Nothing follows, so nothing is held back.

    Returns:
        The text, in which what is not UTF-8 is shown with backslashes, and an unfinished character's bytes.
    """
    text, used = codecs.utf_8_decode(data, "backslashreplace", final)
    return text, data[used:]


# What a MessageDecoder remembers: the framing's state, and the bytes of an unfinished character of junk.
DecoderState = Tuple[framing.State, bytes]


class MessageDecoder:
    """Turns the bytes of one stream into messages.

    As in ``framing``, nothing changes before the caller assigns the state that a method returns to ``state``, which it
    does in the same breath as it takes the messages.

    Attributes:
        state: Everything that is remembered between calls.
    """

    def __init__(self, serializer: MessageSerializer, max_frame_size: int) -> None:
        self._serializer = serializer
        self._deserialize = serializer.deserialize
        self._max_frame_size = max_frame_size
        self.state: DecoderState = (framing.START, b"")

    @property
    def missing(self) -> int:
        """How many bytes of an unfinished payload are still to come."""
        return framing.missing_bytes(self.state[0])

    def room(self, size: int) -> memoryview:
        """Room for the next bytes of an unfinished payload; see ``framing.room_for``."""
        return framing.room_for(self.state[0], size)

    def decode(self, data: bytes) -> Tuple[List[Received], DecoderState]:
        """The messages that end in ``data``, and the state behind them."""
        frames, held = self.state
        items, frames = framing.decode_frames(data, frames, self._max_frame_size)
        messages, held = self._messages(items, held)
        return messages, (frames, held)

    def advance(self, size: int) -> Tuple[List[Received], DecoderState]:
        """The same for ``size`` bytes that were read into ``room``."""
        frames, held = self.state
        items, frames = framing.advance(frames, size)
        messages, held = self._messages(items, held)
        return messages, (frames, held)

    def decode_end(self) -> Tuple[List[Received], str]:
        """What is left at the end of the stream, and a text if that is inside a frame."""
        frames, held = self.state
        items, text = framing.decode_end(frames)
        messages, held = self._messages(items, held)
        if held:
            messages.append(LogMessage(decode_text(held, final=True)[0], LogMessage.LEVEL_JUNK))
        return messages, text

    def _messages(self, items: List[framing.Item], held: bytes) -> Tuple[List[Received], bytes]:
        messages: List[Received] = []
        for item in items:
            if isinstance(item, framing.Junk):
                text, held = decode_text(held + item)
                if text:
                    messages.append(LogMessage(text, LogMessage.LEVEL_JUNK))
                continue
            if held:  # a frame follows, so the character will never be finished
                messages.append(LogMessage(decode_text(held, final=True)[0], LogMessage.LEVEL_JUNK))
                held = b""
            if isinstance(item, FrameTooLargeError):
                messages.append(item)
            else:
                messages.append(self._message(item))
        return messages, held

    def _message(self, payload: Union[bytes, bytearray]) -> Received:
        try:
            message: Any = self._deserialize(payload)
        except SerializationError as exc:
            return exc
        except Exception as exc:
            error = SerializationError(
                f"{type(self._serializer).__name__} could not deserialize a payload of {len(payload)} bytes:"
                f" {type(exc).__name__}: {exc}"
            )
            error.__cause__ = exc
            return error
        if isinstance(message, Message):
            return message
        return SerializationError(
            f"{type(self._serializer).__name__}.deserialize() returned a {type(message).__name__}, not a Message"
        )
