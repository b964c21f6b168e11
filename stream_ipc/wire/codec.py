"""Messages in frames, and lines of text in none: one direction of one stream.

Knows framing, serializers and messages. Must not know streams or sessions. What cannot be decoded becomes an error
object in its place among the messages, so that order is kept and nothing that stands before or behind it is lost.
"""

from __future__ import annotations

import codecs
from collections import defaultdict

from ..errors import FrameTooLargeError, IpcError, SerializationError, article, check_plugin, describe
from ..interruptions import pass_on, pass_on_lack_of_stack
from ..messages import LogMessage, Message, put_in_envelope, text_message
from .framing import LARGE, MAX_FRAME_SIZE, FrameDecoder, frame_header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..protocols import MessageSerializer

    # What comes out of a stream: a message, or the error that stands for what should have been one.
    Decoded = Message | IpcError

    # What a TextDecoder remembers: the bytes of an unfinished line, and whether a piece of it was returned already.
    TextState = tuple[bytes, bool]

__all__ = [
    "DEFAULT_MAX_FRAME_SIZE", "MessageDecoder", "MessageEncoder", "TextDecoder", "check_max_frame_size", "decode_text",
]  # fmt: skip

DEFAULT_MAX_FRAME_SIZE = 64 * 1024 * 1024

# The buffer of a large payload is kept for the next one up to this size: a new one costs a page fault for each 4 KiB.
_SPARE_MAX = 4 * 1024 * 1024

# Up to this a frame is one buffer: joining header and payload costs less than writing two.
_JOIN = 64 * 1024

LINE_MAX = 64 * 1024  # bytes of a line of text in one message


def check_max_frame_size(size: int) -> int:
    """Return the size if a frame can be that large.

    Raises:
        TypeError: It is no int.
        ValueError: It is below 1 or over what the length field can say.
    """
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"max_frame_size must be a number of bytes, not {size!r:.100}")
    if not 0 < size <= MAX_FRAME_SIZE:
        raise ValueError(f"max_frame_size must be from 1 to {MAX_FRAME_SIZE} bytes, not {size}")
    return size


def _offers(serializer: Any, feature: str, method: str) -> bool:
    """Return whether an optional attribute of a serializer may be used in place of a method.

    It may not if a subclass or the object itself has replaced the method, and not the attribute.
    """
    if method not in getattr(serializer, "__dict__", ()):
        for cls in type(serializer).__mro__:
            if feature in vars(cls):
                return True
            if method in vars(cls):
                break
    return False


class MessageEncoder:
    """Turns messages into frames."""

    def __init__(self, serializer: MessageSerializer, max_frame_size: int) -> None:
        self.serializer = serializer
        self.max_frame_size: int = check_max_frame_size(max_frame_size)
        self._joined = min(_JOIN, self.max_frame_size)  # bytes of a payload that is put behind its header
        check_plugin("serializer", serializer, "serialize", "deserialize")
        # The writers of our serializers take no envelope, and may return several buffers, so that none is copied.
        offers = _offers(serializer, "writers", "serialize")
        self._writers: dict[type, Callable[[int, Any, Message], Any]]
        self._writers = serializer.writers if offers else defaultdict(lambda: self._serialize)  # type: ignore[attr-defined]

    def encode(self, kind: int, id: Any, message: Message) -> list[Any]:
        """Return the frame of a message, as a list of buffers that nobody changes any more.

        Raises:
            SerializationError: The message cannot travel.
            FrameTooLargeError: Its payload is over ``max_frame_size``.
        """
        try:
            payload = self._writers[type(message)](kind, id, message)
        except Exception as exc:
            pass_on(exc)
            if isinstance(exc, SerializationError):
                raise
            text = f"{type(self.serializer).__name__} could not serialize {type(message).__name__}: {describe(exc)}"
            raise SerializationError(text) from exc
        if type(payload) is bytes:
            size = len(payload)
            if size <= self._joined:
                return [frame_header(size) + payload]
        return self._frame(message, payload)

    def _serialize(self, kind: int, id: Any, message: Message) -> bytes:
        payload = self.serializer.serialize(put_in_envelope(kind, id, message))
        if not isinstance(payload, (bytes, bytearray, memoryview)):
            raise SerializationError(
                f"{type(self.serializer).__name__}.serialize() returned {article(type(payload))}, not bytes"
            )
        return bytes(payload)

    def _frame(self, message: Message, payload: bytes | list[Any]) -> list[Any]:
        chunks: list[Any] = payload if type(payload) is list else [payload]
        size = sum(map(len, chunks))
        if size > self.max_frame_size:
            raise FrameTooLargeError(
                f"frame of {size} bytes for {type(message).__name__} exceeds max_frame_size, which is"
                f" {self.max_frame_size} bytes; raise it on both sides, or send less at a time",
                size=size,
                limit=self.max_frame_size,
            )
        if len(chunks[0]) <= _JOIN:
            chunks[0] = frame_header(size) + chunks[0]
        else:
            if len(chunks) == 1 and hasattr(self._writers, "expect_large"):
                self._writers.expect_large(type(message))
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


class MessageDecoder(FrameDecoder):
    """Turns the bytes of one stream into messages.

    ``note`` is called with text that belongs to no frame, when its message is made.
    """

    def __init__(
        self, serializer: MessageSerializer, max_frame_size: int, note: Callable[[str], Any] | None = None
    ) -> None:
        # Our serializers return only messages and keep nothing of a payload, so its buffer can be used again.
        self._reuses = _offers(serializer, "reader", "deserialize")
        super().__init__(max_frame_size, serializer.reader if self._reuses else self._make_checked)  # type: ignore[attr-defined]
        self._serializer = serializer
        self._note = note
        self._idle = False

    def trim(self) -> None:
        """Give the kept buffer back if it was not needed since the call before."""
        if self._idle:
            self.spare = None
        self._idle = True

    def _make_checked(self, payload: bytes | bytearray) -> Decoded:
        message = self._serializer.deserialize(payload)
        if isinstance(message, Message):
            return message
        return SerializationError(
            f"{type(self._serializer).__name__}.deserialize() returned {article(type(message))}, not a Message"
        )

    def failed(self, payload: bytes | bytearray, exc: Exception) -> SerializationError:
        pass_on(exc)
        pass_on_lack_of_stack(exc)  # nothing is wrong with the payload: a turn that has more room decodes it
        if isinstance(exc, SerializationError):
            error = exc
        else:
            name = type(self._serializer).__name__
            error = SerializationError(f"{name} could not deserialize a payload of {len(payload)} bytes: {describe(exc)}")
            error.__cause__ = exc
        error.payload_size = len(payload)
        return error

    def done_with(self, payload: bytearray, item: Any) -> None:
        """Keep the buffer of a large payload for the next one."""
        if len(payload) >= LARGE:
            # The traceback of an error may hold it.
            keeps = self._reuses and not isinstance(item, Exception) and len(payload) <= _SPARE_MAX
            self.spare = payload if keeps else None
            self._idle = False

    def add_junk(self, data: bytes, items: list[Any], final: bool = False) -> bytes:
        text, held = decode_text(data, final)
        if text:
            if self._note is not None:
                self._note(text)
            items.append(text_message(text, LogMessage.LEVEL_JUNK))
        return held


class TextDecoder:
    """Turns what a child writes to stderr, which has no frames, into ``LogMessage``, one for each line.

    A message has no line end (``\\n`` or ``\\r\\n``). A line of more than ``LINE_MAX`` bytes comes in pieces. ``note`` is
    called with the text as it was, line ends included.

    Attributes:
        state: The bytes of an unfinished line, and whether a piece of it was returned already.
    """

    def __init__(self, note: Callable[[str], Any]) -> None:
        self._note = note
        self.state: TextState = (b"", False)

    @property
    def is_unfinished(self) -> bool:
        """Whether ``give_out`` would return something."""
        return decode_text(self.state[0])[0] != ""

    def decode(self, data: bytes) -> tuple[list[Any], TextState]:
        """Return the messages of ``data``, and the state behind them."""
        held, begun = self.state
        data = held + data
        *lines, rest = data.split(b"\n")
        texts: list[str] = []
        for line in lines:
            line, begun = self._cut(texts, line, begun)
            line = line.removesuffix(b"\r")
            if line or not begun:
                texts.append(decode_text(line, final=True)[0])
            begun = False
        rest, begun = self._cut(texts, rest, begun)
        said, _ = decode_text(data[: len(data) - len(rest)], final=True)
        return self._messages(texts, said), (rest, begun)

    def give_out(self, final: bool = False) -> tuple[list[Any], TextState]:
        """Return an unfinished line as it is, and the state behind it."""
        held, begun = self.state
        text, held = decode_text(held, final)
        return self._messages([text] if text else [], text), (held, begun or bool(text))

    def finish(self) -> tuple[list[Any], str]:
        """Return what is left at the end of the stream."""
        return self.give_out(final=True)[0], ""

    def _cut(self, texts: list[str], line: bytes, begun: bool) -> tuple[bytes, bool]:
        """Cut pieces off a line that is too long; returns the rest, and whether some of the line was returned."""
        while len(line) > LINE_MAX:
            text, held = decode_text(line[:LINE_MAX])
            texts.append(text)
            line = held + line[LINE_MAX:]
            begun = True
        return line, begun

    def _messages(self, texts: list[str], said: str) -> list[Any]:
        if said:
            self._note(said)
        return [text_message(text, LogMessage.LEVEL_STDERR) for text in texts]
