"""Messages in frames: one direction each way of one stream.

Knows framing, serializers and messages. Must not know streams or sessions. What cannot be decoded becomes an error
object in its place among the messages, so that order is kept and nothing that stands before or behind it is lost.
"""

from __future__ import annotations

import codecs

from ..errors import FrameTooLargeError, IpcError, SerializationError, article, describe
from ..interruptions import interruption_in
from ..messages import LogMessage, Message, put_in_envelope, text_message
from . import framing
from .framing import MAX_FRAME_SIZE, START, Junk, decode_frames, frame_header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..protocols import MessageSerializer

    # What comes out of a stream: a message, or the error that stands for what should have been one.
    Decoded = Message | IpcError

    # What a MessageDecoder remembers: the framing's state, and the bytes of an unfinished character of junk.
    DecoderState = tuple[framing.State, bytes]

__all__ = ["CLEAN", "MessageDecoder", "MessageEncoder", "TextDecoder", "check_max_frame_size", "decode_text"]

# The buffer of a large payload is kept for the next one up to this size: a new one costs a page fault for each 4 KiB.
_SPARE_MAX = 4 * 1024 * 1024

# Below this a frame is one buffer: joining header and payload costs less than writing two.
_JOIN = 32 * 1024


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


def _is_own(serializer: Any, method: str, feature: str) -> Any:
    """Return an optional feature of a serializer, unless the method that it belongs to was overridden since.

    That is so in a class that overrides the method and inherits the feature, and for an object whose own method somebody
    has replaced.
    """
    if method not in getattr(serializer, "__dict__", ()):
        for cls in type(serializer).__mro__:
            if feature in vars(cls):
                return vars(cls)[feature]
            if method in vars(cls):
                break
    return None


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
        # Without an envelope that is made for one call only, and the payload may be several buffers, so that large bytes
        # need not be copied.
        self._parted = _is_own(serializer, "serialize", "serialize_parts") is not None
        self._serialize: Callable[[int, Any, Message], Any]
        self._serialize = serializer.serialize_parts if self._parted else self._serialize_whole  # type: ignore[attr-defined]

    def encode(self, kind: int, id: Any, message: Message) -> list[Any]:
        """Return the frame of a message, as a list of buffers that nobody changes any more.

        Raises:
            SerializationError: The message cannot travel.
            FrameTooLargeError: Its payload is over ``max_frame_size``.
        """
        try:
            payload = self._serialize(kind, id, message)
        except Exception as exc:
            raise self._failure(message, exc) from exc
        if type(payload) is bytes:
            size = len(payload)
            if size < _JOIN and size <= self.max_frame_size:
                return [frame_header(size) + payload]
        return self._frame(message, payload)

    def _serialize_whole(self, kind: int, id: Any, message: Message) -> Any:
        return self.serializer.serialize(put_in_envelope(kind, id, message))

    def _failure(self, message: Message, exc: Exception) -> SerializationError:
        interruption = interruption_in(exc)
        if interruption is not None:
            raise interruption
        if isinstance(exc, SerializationError):
            return exc
        return SerializationError(
            f"{type(self.serializer).__name__} could not serialize {type(message).__name__}: {describe(exc)}"
        )

    def _frame(self, message: Message, payload: Any) -> list[Any]:
        chunks: list[Any]
        if type(payload) is list and self._parted:
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
        if len(chunks[0]) < _JOIN:
            chunks[0] = frame_header(size) + chunks[0]
        else:
            chunks.insert(0, frame_header(size))
        return chunks


def decode_text(data: bytes, final: bool = False) -> tuple[str, bytes]:
    """Decode bytes that are no frames, for people to read.

    Args:
        data: What was held back by the call before, and the new bytes.
        final: Nothing follows, so nothing is held back.

    Returns:
        The text, in which what is not UTF-8 is shown with backslashes, and an unfinished character's bytes.
    """
    text, used = codecs.utf_8_decode(data, "backslashreplace", final)
    return text, data[used:]


CLEAN: DecoderState = (START, b"")  # nothing is unfinished


class MessageDecoder:
    """Turns the bytes of one stream into messages.

    As in ``framing``, nothing changes before the caller assigns the state that a method returns to ``state``, in one
    block with taking the messages.

    Args:
        serializer: What turns a payload into a message.
        max_frame_size: The largest payload in bytes.
        note: Called with text that belongs to no frame, when its message is made.

    Attributes:
        state: Everything that is remembered between calls.
    """

    is_text = False

    def __init__(
        self, serializer: MessageSerializer, max_frame_size: int, note: Callable[[str], Any] | None = None
    ) -> None:
        self._note = note
        self._serializer = serializer
        self._max_frame_size = max_frame_size
        self.state: DecoderState = CLEAN
        self._reuses = _is_own(serializer, "deserialize", "keeps_payload") is False
        # One of ours returns messages and nothing else.
        self._make: Callable[[Any], Decoded] = serializer.deserialize if self._reuses else self._make_checked
        self._spare: bytearray | None = None  # the last large payload, while no other has begun
        self._idle = False
        self._met_junk = False  # since the call before; an interrupted call may leave it True

    @property
    def wants_room(self) -> bool:
        """Whether what comes next is better read into ``room``."""
        frames = self.state[0]
        return framing.missing_bytes(frames) >= framing.LARGE or framing.has_room(frames)

    def room(self, size: int) -> memoryview:
        """Return room for the next bytes of an unfinished payload; see ``framing.room_for``."""
        frames, held = self.state
        try:
            return framing.room_for(frames, size)
        except BufferError:  # the traceback of an interrupted call holds a view of it
            frames = framing.detached(frames)
            self.state = (frames, held)
            return framing.room_for(frames, size)

    def trim(self) -> None:
        """Give the kept buffer back if it was not needed since the call before."""
        if self._idle:
            self._spare = None
        self._idle = True

    def decode(self, data: bytes) -> tuple[list[Any], DecoderState]:
        """Return the messages that end in ``data``, and the state behind them."""
        state = self.state
        items, frames = decode_frames(
            data, state[0], self._max_frame_size, self._make, self._failure, self._spare, self._meet_junk
        )
        if frames is START and state is CLEAN and not self._met_junk:
            return items, CLEAN
        return self._go_on(state, frames, items)

    def _meet_junk(self, data: bytes) -> Junk:
        self._met_junk = True
        return Junk(data)

    def _go_on(
        self, state: DecoderState, frames: framing.State, items: list[Any]
    ) -> tuple[list[Any], DecoderState]:
        """Return the messages and the state where something was or is unfinished, or junk has come."""
        before, held = state
        if before is not START and items:
            self._keep(before, frames, items[0])
        if items and (held or self._met_junk):
            self._met_junk = False
            items, held = self._texts(items, held)
        return items, CLEAN if frames is START and not held else (frames, held)

    def advance(self, size: int) -> tuple[list[Any], DecoderState]:
        """Return the same for ``size`` bytes that were read into ``room``."""
        state = self.state
        items, frames = framing.advance(state[0], size, self._make, self._failure)
        return self._go_on(state, frames, items)

    def finish(self) -> tuple[list[Any], str]:
        """Return what is left at the end of the stream, and a text if that is inside a frame."""
        frames, held = self.state
        items, text = framing.decode_end(frames)
        messages, held = self._texts(items, held)
        if held:
            messages.append(self._junk(decode_text(held, final=True)[0]))
        return messages, text

    def _make_checked(self, payload: bytes | bytearray) -> Decoded:
        message = self._serializer.deserialize(payload)
        if isinstance(message, Message):
            return message
        return SerializationError(
            f"{type(self._serializer).__name__}.deserialize() returned {article(type(message))}, not a Message"
        )

    def _failure(self, payload: bytes | bytearray, exc: Exception) -> SerializationError:
        interruption = interruption_in(exc)
        if interruption is not None:
            raise interruption
        if isinstance(exc, SerializationError):
            error = exc
        else:
            name = type(self._serializer).__name__
            error = SerializationError(f"{name} could not deserialize a payload of {len(payload)} bytes: {describe(exc)}")
            error.__cause__ = exc
        error.payload_size = len(payload)
        return error

    def _keep(self, before: framing.State, after: framing.State, first: Any) -> None:
        """Keep the buffer of a payload that is complete, for the next large one."""
        payload = before[2]
        if payload is None or payload is after[2] or len(payload) < framing.LARGE:
            return
        # The traceback of an error may hold it.
        keeps = self._reuses and not isinstance(first, Exception) and len(payload) <= _SPARE_MAX
        self._spare = payload if keeps else None
        self._idle = False

    def _texts(self, items: list[Any], held: bytes) -> tuple[list[Any], bytes]:
        """Make messages of the junk among these."""
        messages: list[Any] = []
        for item in items:
            if type(item) is Junk:
                text, held = decode_text(held + item)
                if text:
                    messages.append(self._junk(text))
                continue
            if held:  # a frame follows, so the character will never be finished
                messages.append(self._junk(decode_text(held, final=True)[0]))
                held = b""
            messages.append(item)
        return messages, held

    def _junk(self, text: str) -> LogMessage:
        if self._note is not None:
            self._note(text)
        return text_message(text, LogMessage.LEVEL_JUNK)


class TextDecoder:
    """Turns the bytes of a stream that has no frames into ``LogMessage``.

    Args:
        level: The level of the messages.
        note: Called with each piece of text.

    Attributes:
        state: The bytes of an unfinished character.
    """

    is_text = True

    def __init__(self, level: str, note: Callable[[str], Any]) -> None:
        self._level = level
        self._note = note
        self.state = b""

    def decode(self, data: bytes) -> tuple[list[Any], bytes]:
        """Return the messages of ``data``, and the state behind them."""
        text, held = decode_text(self.state + data)
        return self._messages(text), held

    def finish(self) -> tuple[list[Any], str]:
        """Return what is left at the end of the stream."""
        return self._messages(decode_text(self.state, final=True)[0]), ""

    def trim(self) -> None:
        """Do nothing: nothing is kept."""

    def _messages(self, text: str) -> list[Any]:
        if not text:
            return []
        self._note(text)
        return [text_message(text, self._level)]
