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

    Item = Union[bytes, bytearray, "Junk", FrameTooLargeError]

    # All that is remembered between two pieces of a stream: (bytes of an unfinished magic or header, number of bytes of an
    # oversized payload still to be skipped, unfinished payload, number of its bytes that have arrived, its whole size). The
    # buffer of the unfinished payload may be longer than what has arrived.
    State = tuple[bytes, int, bytearray | None, int, int]

__all__ = [
    "HEADER_SIZE",
    "LARGE",
    "MAGIC",
    "MAX_FRAME_SIZE",
    "START",
    "Junk",
    "advance",
    "decode_end",
    "decode_frames",
    "detached",
    "frame_header",
    "has_room",
    "magic_suffix",
    "missing_bytes",
    "room_for",
]

MAGIC = b"\xf3\x4a\x9d\xe2"
HEADER_SIZE = 8
MAX_FRAME_SIZE = 0xFFFFFFFF  # the most that the length field can hold

# A frame of which more bytes than this are missing is read directly into its own buffer.
LARGE = 64 * 1024

_ZEROS = bytes(64 * 1024)

_MAGIC_NUMBER = 0xF34A9DE2
_HEADER = struct.Struct(">II")
_unpack_from = _HEADER.unpack_from


# Returns the eight bytes before a payload of a size. A partial and no function, because that is twice as fast.
frame_header: Callable[[int], bytes] = partial(_HEADER.pack, _MAGIC_NUMBER)


class Junk(bytes):
    """Bytes that belong to no frame."""

    __slots__ = ()


START: State = (b"", 0, None, 0, 0)


def _same(payload: Any) -> Any:
    return payload


def decode_frames(
    data: bytes,
    state: State,
    max_frame_size: int,
    make: Callable[[Any], Any] = _same,
    failed: Callable[[Any, Exception], Any] | None = None,
    spare: bytearray | None = None,
    junk: Callable[[bytes], Any] = Junk,
) -> tuple[list[Any], State]:
    """Cut the next bytes of a stream into payloads and junk.

    A function from state to state and no object with ``feed()``: a caller that is interrupted (``KeyboardInterrupt``)
    before it has stored the result still has the bytes and the state that belongs to them, and decodes them again.
    Only an unfinished payload grows in place, and the state says how much of it is filled.

    At most 3 bytes that may be the beginning of a magic are held back, also if junk begins with one. Memory grows with
    the bytes that have arrived, never with the length that a header announces.

    Args:
        data: The bytes, however cut.
        state: ``START``, or the one that the call before returned.
        max_frame_size: The largest payload in bytes. A larger one becomes a ``FrameTooLargeError`` in its place, once,
            and exactly its bytes are skipped.
        make: Called with each payload; what it returns stands in its place.
        failed: Called with a payload and the exception of ``make``; what it returns stands in its place.
        junk: Called with bytes that belong to no frame; what it returns stands in their place.
        spare: A buffer that is no longer needed: a large payload that is unfinished at the end of ``data`` is put into
            it, unless ``state`` is an unfinished one, which may hold it.

    Returns:
        Payloads (``bytes``; ``bytearray`` for one that came in several pieces), ``Junk`` and ``FrameTooLargeError`` in
        their order, and the state behind them.
    """
    items: list[Any] = []
    if state is not START:
        spare = None
        head, skip, frame, filled, size = state
        if frame is not None:
            missing = size - filled
            try:
                del frame[filled:]  # an interrupted call may have left more there
                frame += data[:missing]
            except BufferError:  # its traceback still holds a view of the payload
                frame = frame[:filled] + data[:missing]
            if len(data) < missing:
                return items, (b"", 0, frame, filled + len(data), size)
            items.append(_made(frame, make, failed))
            data = data[missing:]
        elif len(data) < skip:
            return items, (b"", skip - len(data), None, 0, 0)
        else:
            data = head + data[skip:]
    at = 0
    end = len(data)
    while end - at >= HEADER_SIZE:
        number, size = _unpack_from(data, at)
        if number == _MAGIC_NUMBER:
            start = at + HEADER_SIZE
            at = start + size
            if at <= end and size <= max_frame_size:
                try:
                    items.append(make(data[start:at]))
                except Exception as exc:
                    if failed is None:
                        raise
                    items.append(failed(data[start:at], exc))
                continue
            if size <= max_frame_size:
                return items, (b"", 0, _begin(data[start:], size, spare), end - start, size)
            items.append(_too_large(size, max_frame_size))
            if at > end:
                return items, (b"", at - end, None, 0, 0)
        else:
            at = _skip_junk(data, at, items, junk)
    if at < end and not data.startswith(MAGIC[: end - at], at):
        at = _skip_junk(data, at, items, junk)
    return items, START if at == end else (data[at:], 0, None, 0, 0)


def _made(payload: Any, make: Callable[[Any], Any], failed: Callable[[Any, Exception], Any] | None) -> Any:
    try:
        return make(payload)
    except Exception as exc:
        if failed is None:
            raise
        return failed(payload, exc)


def _skip_junk(data: bytes, start: int, items: list[Any], junk: Callable[[bytes], Any]) -> int:
    """Add the junk that begins at ``start`` to the items, and return where it ends."""
    at = data.find(MAGIC, start)
    if at < 0:
        at = len(data) - magic_suffix(data, start)
    if at > start:
        items.append(junk(data[start:at]))
    return at


def _begin(data: bytes, size: int, spare: bytearray | None) -> bytearray:
    """Return a buffer that begins with the first bytes of a payload."""
    if spare is None or size < LARGE:
        return bytearray(data)
    try:
        del spare[size:]
        spare[: len(data)] = data
    except BufferError:  # there is a view of it
        return bytearray(data)
    return spare


def missing_bytes(state: State) -> int:
    """Return how many bytes of an unfinished payload are missing."""
    _, _, frame, filled, size = state
    return 0 if frame is None else size - filled


def room_for(state: State, size: int) -> memoryview:
    """Return room for the next bytes of an unfinished payload, to be read into directly.

    Args:
        state: One with ``missing_bytes``.
        size: For how many bytes there should be room, if so many are missing.
    """
    _, _, frame, filled, whole = state
    assert frame is not None
    if len(frame) < min(filled + size, whole):
        # The filled part is doubled: the header alone never allocates the whole payload, and it is moved only a few times.
        more = min(max(size, filled), whole - len(frame))
        while more > len(_ZEROS):  # in steps: a temporary object of that size would cost a page fault for each page
            frame += _ZEROS
            more -= len(_ZEROS)
        frame += _ZEROS[:more]
    return memoryview(frame)[filled:]


def detached(state: State) -> State:
    """Return the same state with a copy of the unfinished payload, whose size can be changed again."""
    head, skip, frame, filled, size = state
    assert frame is not None
    return head, skip, frame[:filled], filled, size


def has_room(state: State) -> bool:
    """Tell whether an unfinished payload has room left, from an earlier ``room_for`` or a spare buffer."""
    _, _, frame, filled, _ = state
    return frame is not None and len(frame) > filled


def advance(
    state: State,
    size: int,
    make: Callable[[Any], Any] = _same,
    failed: Callable[[Any, Exception], Any] | None = None,
) -> tuple[list[Any], State]:
    """Return what ``decode_frames`` would have returned for ``size`` bytes that were read into ``room_for``.

    The view must have been released.
    """
    _, _, frame, filled, whole = state
    assert frame is not None
    filled += size
    if filled < whole:
        return [], (b"", 0, frame, filled, whole)
    return [_made(frame, make, failed)], START


def decode_end(state: State) -> tuple[list[Item], str]:
    """Return what is left at the end of a stream: junk that was held back, and a text if a frame is unfinished."""
    head, skip, frame, filled, size = state
    if frame is not None:
        return [], f"in the middle of a frame ({filled} of {size} bytes had arrived)"
    if skip:
        return [], f"in the middle of a frame that was too large ({skip} bytes were still to come)"
    if len(head) >= len(MAGIC):
        return [], f"in the middle of a frame's header ({len(head)} of {HEADER_SIZE} bytes had arrived)"
    return ([Junk(head)] if head else []), ""


def _too_large(size: int, limit: int) -> FrameTooLargeError:
    return FrameTooLargeError(
        f"the other side announced a frame of {size} bytes, and max_frame_size is {limit} bytes; raise it on both sides, or"
        " send less at a time",
        size=size,
        limit=limit,
    )


def magic_suffix(data: bytes, start: int) -> int:
    """Return how many bytes at the end of ``data[start:]`` may be the beginning of a magic."""
    for length in (3, 2, 1):
        if data.endswith(MAGIC[:length], start):
            return length
    return 0
