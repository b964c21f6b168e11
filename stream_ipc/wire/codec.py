"""Messages in frames: one direction each way of one stream.

Knows framing, serializers and messages. Must not know streams or sessions. What cannot be decoded becomes an error
object in its place among the messages, so that order is kept and nothing that stands before or behind it is lost.
"""

from __future__ import annotations

import codecs

from ..errors import FrameTooLargeError, IpcError, SerializationError, article, describe
from ..messages import LogMessage, Message, put_in_envelope, take_out_of_envelope
from . import framing
from .framing import MAX_FRAME_SIZE, frame_header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, List, Optional, Tuple, Union

    from ..protocols import MessageSerializer, Payload

    # What comes out of a stream: a message, or the error that stands for what should have been one.
    Received = Union[Message, IpcError]

    # What a MessageDecoder remembers: the framing's state, and the bytes of an unfinished character of junk.
    DecoderState = Tuple[framing.State, bytes]

__all__ = [
    "CLEAN",
    "JOIN",
    "MessageDecoder",
    "MessageEncoder",
    "check_max_frame_size",
    "decode_text",
]

# The buffer of a large payload is kept for the next one up to this size, for each stream that is read. A new one costs a
# page fault for each 4 KiB, because what is freed at the end of the heap goes back to the system: an echo of 1 MiB takes
# 4.6 ms instead of 10.6 ms.
_SPARE_MAX = 4 * 1024 * 1024

# Below this a frame is one buffer: joining header and payload costs less than writing two (1.38 us against 1.56).
JOIN = 32 * 1024


def check_max_frame_size(size: int) -> int:
    """Return the size if a frame can be that large.

    Raises:
        TypeError: It is no int.
        ValueError: It is below 1 or over what the length field can say.
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
        self.max_frame_size: int = check_max_frame_size(max_frame_size)
        for name in ("serialize", "deserialize"):
            if not callable(getattr(serializer, name, None)):
                raise TypeError(f"{type(serializer).__name__} is no serializer: it has no method {name}()")
        # Optional: without an envelope that is made for one call only (0.2 us), and the payload may be several buffers, so
        # that large bytes need not be copied.
        self._parted = _takes_parts(serializer)
        self.serialize: Callable[[int, Any, Message], Any]
        self.serialize = serializer.serialize_parts if self._parted else self._serialize_whole  # type: ignore[attr-defined]

    def encode(self, message: Message) -> List[Any]:
        """The frame of a message, as a list of buffers that nobody changes any more.

        Raises:
            SerializationError: The message cannot travel.
            FrameTooLargeError: Its payload is over ``max_frame_size``.
        """
        kind, id, message = take_out_of_envelope(message)
        try:
            payload = self.serialize(kind, id, message)
        except Exception as exc:
            raise self.failure(message, exc) from exc
        return self.frame(message, payload)

    def _serialize_whole(self, kind: int, id: Any, message: Message) -> Any:
        return self.serializer.serialize(put_in_envelope(kind, id, message))

    def failure(self, message: Message, exc: Exception) -> SerializationError:
        """What to raise if ``serialize`` has raised."""
        if isinstance(exc, SerializationError):
            return exc
        return SerializationError(
            f"{type(self.serializer).__name__} could not serialize {type(message).__name__}: {describe(exc)}"
        )

    def frame(self, message: Message, payload: Any) -> List[Any]:
        """The frame around what ``serialize`` has returned."""
        chunks: List[Any]
        if type(payload) is bytes:
            size = len(payload)
            if size < JOIN and size <= self.max_frame_size:
                return [frame_header(size) + payload]
            chunks = [payload]
        elif type(payload) is list and self._parted:
            chunks = payload
        elif isinstance(payload, (bytes, bytearray, memoryview)):
            chunks = [bytes(payload)]
        else:
            raise SerializationError(
                f"{type(self.serializer).__name__}.serialize() returned {article(type(payload))}, not bytes"
            )
        size = sum(map(len, chunks))
        if size > self.max_frame_size:
            raise FrameTooLargeError(
                f"frame of {size} bytes for {type(message).__name__} exceeds max_frame_size, which is"
                f" {self.max_frame_size} bytes; raise it on both sides, or send less at a time",
                size=size,
                limit=self.max_frame_size,
            )
        if len(chunks[0]) < JOIN:
            chunks[0] = frame_header(size) + chunks[0]
        else:
            chunks.insert(0, frame_header(size))
        return chunks


def _takes_parts(serializer: Any) -> bool:
    # Only where it is known that serialize_parts() does what serialize() does: not in a class that overrides the one
    # and inherits the other, nor through a __getattr__ that hands on to another serializer.
    if "serialize" in getattr(serializer, "__dict__", ()):
        return False
    for cls in type(serializer).__mro__:
        if "serialize_parts" in cls.__dict__:
            return True
        if "serialize" in cls.__dict__:
            break
    return False


def _keeps_nothing(serializer: Any) -> bool:
    # Only where it is known of the very deserialize() that is called: not in a class that overrides it, nor through a
    # __getattr__ that hands on to another serializer.
    if "deserialize" in getattr(serializer, "__dict__", ()):
        return False
    for cls in type(serializer).__mro__:
        if "keeps_payload" in cls.__dict__:
            return cls.__dict__["keeps_payload"] is False
        if "deserialize" in cls.__dict__:
            break
    return False


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


CLEAN: DecoderState = (framing.START, b"")  # nothing is unfinished


class MessageDecoder:
    """Turns the bytes of one stream into messages.

    As in ``framing``, nothing changes before the caller assigns the state that a method returns to ``state``, which it
    does in the same breath as it takes the messages.

    Args:
        serializer: What turns a payload into a message.
        max_frame_size: The largest payload in bytes.
        note_junk: Called with text that belongs to no frame, when its message is made.

    Attributes:
        state: Everything that is remembered between calls.
    """

    def __init__(
        self, serializer: MessageSerializer, max_frame_size: int, note_junk: Optional[Callable[[str], Any]] = None
    ) -> None:
        self._note_junk = note_junk
        self._serializer = serializer
        self.deserialize: Callable[[Payload], Message] = serializer.deserialize
        self._max_frame_size = max_frame_size
        self.state: DecoderState = CLEAN
        self._reuses = _keeps_nothing(serializer)
        self._spare: Optional[bytearray] = None  # the last large payload; may be the unfinished one in the state, too
        self._idle = False

    @property
    def wants_room(self) -> bool:
        """Whether what comes next is better read into ``room``."""
        return framing.missing_bytes(self.state[0]) >= framing.LARGE or framing.has_room(self.state[0])

    def room(self, size: int) -> memoryview:
        """Room for the next bytes of an unfinished payload; see ``framing.room_for``."""
        try:
            return framing.room_for(self.state[0], size)
        except BufferError:  # the traceback of an interrupted call holds a view of it
            frames, held = self.state
            self.state = (framing.detached(frames), held)
            return framing.room_for(self.state[0], size)

    def trim(self) -> None:
        """Give the kept buffer back if it was not needed since the call before."""
        if self._idle:
            self._spare = None
        self._idle = True

    def decode(self, data: bytes) -> Tuple[List[Received], DecoderState]:
        """The messages that end in ``data``, and the state behind them."""
        frames, held = self.state
        spare = self._spare if frames[2] is None else None
        items, frames = framing.decode_frames(data, frames, self._max_frame_size, spare)
        messages, held = self._messages(items, held)
        if frames is framing.START and not held:
            return messages, CLEAN
        return messages, (frames, held)

    def advance(self, size: int) -> Tuple[List[Received], DecoderState]:
        """The same for ``size`` bytes that were read into ``room``."""
        frames, held = self.state
        items, frames = framing.advance(frames, size)
        messages, held = self._messages(items, held)
        return messages, ((frames, held) if frames is not framing.START or held else CLEAN)

    def decode_end(self) -> Tuple[List[Received], str]:
        """What is left at the end of the stream, and a text if that is inside a frame."""
        frames, held = self.state
        items, text = framing.decode_end(frames)
        messages, held = self._messages(items, held)
        if held:
            messages.append(self._junk(decode_text(held, final=True)[0]))
        return messages, text

    def _messages(self, items: List[framing.Item], held: bytes) -> Tuple[List[Received], bytes]:
        messages: List[Received] = []
        deserialize = self.deserialize
        for item in items:
            if type(item) is bytes and not held:
                # What _message does, in place: 1,500 of 52,300 instructions less for each message of a flood.
                try:
                    message: Any = deserialize(item)
                except Exception as exc:
                    messages.append(self.failure(item, exc))
                    continue
                messages.append(message if isinstance(message, Message) else self.no_message(message))
                continue
            if isinstance(item, framing.Junk):
                text, held = decode_text(held + item)
                if text:
                    messages.append(self._junk(text))
                continue
            if held:  # a frame follows, so the character will never be finished
                messages.append(self._junk(decode_text(held, final=True)[0]))
                held = b""
            if isinstance(item, FrameTooLargeError):
                messages.append(item)
            else:
                messages.append(self._message(item))
        return messages, held

    def _junk(self, text: str) -> LogMessage:
        if self._note_junk is not None:
            self._note_junk(text)
        return LogMessage(text, LogMessage.LEVEL_JUNK)

    def _message(self, payload: Union[bytes, bytearray]) -> Received:
        large = type(payload) is bytearray and len(payload) >= framing.LARGE
        if large:
            self._spare = None  # the traceback of an error may hold it
        try:
            message: Any = self.deserialize(payload)
        except Exception as exc:
            return self.failure(payload, exc)
        if large and self._reuses and len(payload) <= _SPARE_MAX:
            # Also if the caller is interrupted and decodes it again: until he has taken the state that is behind it, no
            # other payload begins.
            self._spare = payload  # type: ignore[assignment]
            self._idle = False
        return message if isinstance(message, Message) else self.no_message(message)

    def failure(self, payload: Union[bytes, bytearray], exc: Exception) -> SerializationError:
        """What stands for a payload whose ``deserialize`` has raised."""
        if isinstance(exc, SerializationError):
            error = exc
        else:
            name = type(self._serializer).__name__
            error = SerializationError(f"{name} could not deserialize a payload of {len(payload)} bytes: {describe(exc)}")
            error.__cause__ = exc
        error.payload_size = len(payload)
        return error

    def no_message(self, message: Any) -> SerializationError:
        """What stands for a payload whose ``deserialize`` has returned no message."""
        return SerializationError(
            f"{type(self._serializer).__name__}.deserialize() returned {article(type(message))}, not a Message"
        )
