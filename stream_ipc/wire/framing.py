"""Frames on a byte stream: magic ``F3 4A 9D E2``, the payload's length as 32-bit big-endian, the payload.

Knows bytes only. Must not know messages, serializers or I/O.
"""

from __future__ import annotations

import struct
from functools import partial

from ..errors import FrameTooLargeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Union

    State = Union["Between", "Filling", "Skipping"]

__all__ = ["HEADER_SIZE", "LARGE", "MAGIC", "MAX_FRAME_SIZE", "START", "FrameDecoder", "Junk", "frame_header"]

MAGIC = b"\xf3\x4a\x9d\xe2"
HEADER_SIZE = 8
MAX_FRAME_SIZE = 0xFFFFFFFF  # the most that the length field can hold

# A frame of which more bytes than this are missing is read directly into its own buffer.
LARGE = 64 * 1024

_ZEROS = bytes(64 * 1024)

_MAGIC_NUMBER = 0xF34A9DE2
_HEADER = struct.Struct(">II")
_unpack_from = _HEADER.unpack_from


# Returns the eight bytes before a payload of a size. A partial and no function: calling it creates no Python stack frame.
frame_header: Callable[[int], bytes] = partial(_HEADER.pack, _MAGIC_NUMBER)


class Junk(bytes):
    """Bytes that belong to no frame."""

    __slots__ = ()


# What a decoder remembers from one piece of a stream to the next is one of these. They are not changed, but for the buffer
# of Filling, which grows in place.


class Between:
    """The stream stands before a frame, or in junk."""

    def __init__(self, head: bytes, held: bytes) -> None:
        self.head: bytes = head  # which may begin a frame
        self.held: bytes = held  # what add_junk has held back


class Filling:
    """The stream stands in a payload."""

    def __init__(self, frame: bytearray, filled: int, size: int) -> None:
        self.frame: bytearray = frame  # may be longer than what has arrived
        self.filled: int = filled
        self.size: int = size

    @property
    def missing(self) -> int:
        """How many bytes are still to come."""
        return self.size - self.filled


class Skipping:
    """The stream stands in a payload that is too large."""

    def __init__(self, missing: int) -> None:
        self.missing: int = missing


START = Between(b"", b"")


def _same(payload: Any) -> Any:
    return payload


class FrameDecoder:
    """Cuts the bytes of one stream into frames and junk.

    Nothing changes before the caller assigns the state that a method returns to ``state``: whoever is interrupted
    (``KeyboardInterrupt``) before that still has the bytes and the state that belongs to them, and decodes them again.
    Only an unfinished payload grows in place, and the state says how much of it is filled.

    At most 7 bytes that may be the beginning of a frame are held back, also if junk begins with a part of the magic.
    Memory grows with the bytes that have arrived, never with the length that a header announces.

    Args:
        max_frame_size: The largest payload in bytes. A larger one becomes a ``FrameTooLargeError`` in its place, once, and
            exactly its bytes are skipped.
        make: Called with each payload (``bytes``; ``bytearray`` for one that came in several pieces); what it returns
            stands in its place.

    Attributes:
        state: Everything that is remembered between calls.
        spare: A buffer that is no longer needed: a large payload that is unfinished is put into it.
    """

    def __init__(self, max_frame_size: int, make: Callable[[Any], Any] = _same) -> None:
        self.max_frame_size = max_frame_size
        self.state: State = START
        self.spare: bytearray | None = None
        self.make: Callable[[Any], Any] = make

    # -- what derived classes do differently

    def failed(self, payload: bytes | bytearray, exc: Exception) -> Any:
        """Return what stands in the place of a payload for which ``make`` has raised."""
        raise exc

    def add_junk(self, data: bytes, items: list[Any], final: bool = False) -> bytes:
        """Add bytes that belong to no frame; returns what is held back until more follows, unless ``final``."""
        items.append(Junk(data))
        return b""

    def done_with(self, payload: bytearray, item: Any) -> None:
        """Take note of a payload that came in several pieces and is no longer needed here."""

    # -- decoding

    def decode(self, data: bytes) -> tuple[list[Any], State]:
        """Return what ends in the next bytes of the stream, in order, and the state behind them."""
        items: list[Any] = []
        state = self.state
        at = 0
        end = len(data)
        make = self.make
        limit = self.max_frame_size
        while True:
            if state is START:
                stop = at
                try:
                    while True:
                        number, size = _unpack_from(data, at)
                        start = at + HEADER_SIZE
                        stop = start + size
                        if number != _MAGIC_NUMBER or stop > end or size > limit:
                            break
                        items.append(make(data[start:stop]))
                        if stop == end:
                            return items, state
                        at = stop
                except Exception as exc:
                    if stop > at:  # make has raised it
                        items.append(self.failed(data[start:stop], exc))
                        at = stop
                        continue
                    if not isinstance(exc, struct.error):
                        raise
                    if at == end:
                        return items, state
            elif at == end:
                return items, state
            elif isinstance(state, Between) and state.head:  # the beginning of this data's first header
                data = state.head + data
                end = len(data)
                state = _behind_junk(state.held)
                continue
            state, at = self._pass(data, at, state, items)

    def _pass(self, data: bytes, at: int, state: State, items: list[Any]) -> tuple[State, int]:
        """Pass over what is no whole frame; returns the state behind it, and where that is."""
        end = len(data)
        if isinstance(state, Filling):
            stop = min(end, at + state.missing)
            return self._fill(state, data[at:stop], items), stop
        if isinstance(state, Skipping):
            return _skipping(state.missing - (end - at)), min(end, at + state.missing)
        held = state.held
        if data.startswith(MAGIC[: end - at], at):
            if end - at < HEADER_SIZE:
                return Between(data[at:], held), end
            if held:
                self.add_junk(held, items, final=True)
                return START, at
            size = _unpack_from(data, at)[1]
            at += HEADER_SIZE
            if size <= self.max_frame_size:
                return Filling(self._begin(data[at:], size), end - at, size), end
            items.append(_too_large(size, self.max_frame_size))
            return _skipping(size - (end - at)), min(end, at + size)
        stop = data.find(MAGIC, at)
        if stop < 0:
            stop = end - next(count for count in (3, 2, 1, 0) if data.endswith(MAGIC[:count], at))  # which may begin one
        return _behind_junk(self.add_junk(held + data[at:stop], items)), stop

    def _fill(self, state: Filling, more: bytes, items: list[Any]) -> State:
        """Add bytes to an unfinished payload."""
        frame, filled = state.frame, state.filled
        try:
            del frame[filled:]  # an interrupted call may have left more there
            frame += more
        except BufferError:  # its traceback still holds a view of the payload
            frame = frame[:filled] + more
        return self._filled(frame, filled + len(more), state.size, items)

    def _filled(self, frame: bytearray, filled: int, size: int, items: list[Any]) -> State:
        if filled < size:
            return Filling(frame, filled, size)
        try:
            item = self.make(frame)
        except Exception as exc:
            item = self.failed(frame, exc)
        items.append(item)
        self.done_with(frame, item)
        return START

    def _begin(self, data: bytes, size: int) -> bytearray:
        """Return a buffer that begins with the first bytes of a payload."""
        spare = self.spare
        if spare is None or size < LARGE or isinstance(self.state, Filling):  # which may be the spare one
            return bytearray(data)
        try:
            del spare[size:]
            spare[: len(data)] = data
        except BufferError:  # there is a view of it
            return bytearray(data)
        return spare

    # -- reading an unfinished payload directly

    @property
    def wants_room(self) -> bool:
        """Whether what comes next is better read into ``room``."""
        state = self.state
        return isinstance(state, Filling) and (state.missing >= LARGE or len(state.frame) > state.filled)

    def room(self, size: int) -> memoryview:
        """Return room for the next bytes of an unfinished payload, to be read into directly.

        Args:
            size: For how many bytes there should be room, if so many are missing.
        """
        state = self.state
        assert isinstance(state, Filling)
        try:
            return _room(state, size)
        except BufferError:  # the traceback of an interrupted call holds a view of it
            self.state = state = Filling(state.frame[: state.filled], state.filled, state.size)
            return _room(state, size)

    def advance(self, size: int) -> tuple[list[Any], State]:
        """Return what ``decode`` would have returned for ``size`` bytes that were read into ``room``.

        The view must have been released.
        """
        items: list[Any] = []
        state = self.state
        assert isinstance(state, Filling)
        return items, self._filled(state.frame, state.filled + size, state.size, items)

    # -- the end

    def finish(self) -> tuple[list[Any], str]:
        """Return what is left at the end of the stream, and a text if that is inside a frame."""
        state = self.state
        items: list[Any] = []
        if isinstance(state, Filling):
            return items, f"in the middle of a frame ({state.filled} of {state.size} bytes had arrived)"
        if isinstance(state, Skipping):
            return items, f"in the middle of a frame that was too large ({state.missing} bytes were still to come)"
        head, held = state.head, state.held
        text = ""
        if len(head) >= len(MAGIC):
            text = f"in the middle of a frame's header ({len(head)} of {HEADER_SIZE} bytes had arrived)"
            head = b""
        if held or head:
            self.add_junk(held + head, items, final=True)
        return items, text


def _behind_junk(held: bytes) -> State:
    return Between(b"", held) if held else START


def _skipping(count: int) -> State:
    return Skipping(count) if count > 0 else START


def _room(state: Filling, size: int) -> memoryview:
    frame, filled, whole = state.frame, state.filled, state.size
    if len(frame) < min(filled + size, whole):
        # The filled part is doubled: the header alone never allocates the whole payload, and it is moved only a few times.
        more = min(max(size, filled), whole - len(frame))
        while more > len(_ZEROS):  # in steps: a temporary object of that size would cost a page fault for each page
            frame += _ZEROS
            more -= len(_ZEROS)
        frame += _ZEROS[:more]
    return memoryview(frame)[filled:]


def _too_large(size: int, limit: int) -> FrameTooLargeError:
    return FrameTooLargeError(
        f"the other side announced a frame of {size} bytes, and max_frame_size is {limit} bytes; raise it on both sides, or"
        " send less at a time",
        size=size,
        limit=limit,
    )
