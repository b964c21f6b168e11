from __future__ import annotations

import random
import re
import tracemalloc
import zlib
from dataclasses import dataclass
from typing import Any, Callable, Iterable, List, Tuple, Union

import pytest

from stream_ipc.errors import FrameTooLargeError, IpcError, SerializationError, article
from stream_ipc.messages import (
    NOTIFICATION,
    REQUEST,
    ErrorMessage,
    LogMessage,
    Message,
    RequestEnvelope,
    ResponseEnvelope,
    take_out_of_envelope,
)
from stream_ipc.serializers.json import JsonMessageSerializer
from stream_ipc.serializers.php import PhpMessageSerializer
from stream_ipc.serializers.pickle import PickleMessageSerializer
from stream_ipc.wire.codec import MessageDecoder, MessageEncoder, check_max_frame_size, decode_text
from stream_ipc.wire.framing import HEADER_SIZE, MAGIC, MAX_FRAME_SIZE, Filling, frame_header
from tests.helpers import InterruptAt, InterruptionError, frame, missing_bytes, places_apart

LIMIT = 1024 * 1024
PICKLE = PickleMessageSerializer()
JSON = JsonMessageSerializer()
PHP = PhpMessageSerializer()


class Text:
    """The simplest serializer of all: a LogMessage is its text."""

    def serialize(self, message: Message) -> bytes:
        assert isinstance(message, LogMessage)
        return message.message.encode()

    def deserialize(self, payload: Union[bytes, bytearray, memoryview]) -> Message:
        return LogMessage(bytes(payload).decode())


@dataclass
class Large(Message, wire_name="test.codec.Large"):
    value: Any


def junk(text: str) -> LogMessage:
    return LogMessage(text, "junk")


def decode(chunks: Iterable[bytes], serializer: Any = None, limit: int = LIMIT) -> Tuple[List[Any], str]:
    decoder = MessageDecoder(serializer or Text(), limit)
    messages: List[Any] = []
    for chunk in chunks:
        found, decoder.state = decoder.decode(chunk)
        messages += found
    found, text = decoder.finish()
    return messages + found, text


def is_junk(message: Any) -> bool:
    return isinstance(message, LogMessage) and message.level == "junk"


def merged(messages: List[Any]) -> List[Any]:
    result: List[Any] = []
    for message in messages:
        last: Any = result[-1] if result else None
        if is_junk(message) and is_junk(last):
            result[-1] = junk(last.message + message.message)
        else:
            result.append(message)
    return result


# --- junk -----------------------------------------------------------------------------------------------------

TEXTS = [
    (b"plain\n", "plain\n"),
    ("aü€\U0001f600z".encode(), "aü€\U0001f600z"),
    (b"\xff\xfe", "\\xff\\xfe"),
    (b"a\xc3", "a\\xc3"),
    (b"a\xe2\x82", "a\\xe2\\x82"),
    (b"\xf0\x9f\x98!", "\\xf0\\x9f\\x98!"),
    (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),
    (b"\xc0\x80", "\\xc0\\x80"),
    (b"nul\x00 esc\x1b[31m", "nul\x00 esc\x1b[31m"),
    (b"\xc3\xc3\xa9", "\\xc3é"),
    (b"\xf3", "\\xf3"),
    (b"x\xf3\x4a\x9d", "x\\xf3J\\x9d"),
    (b"\xf3\xb1\x80\x80", "\U000f1000"),
    (b"\\x41", "\\x41"),
]


@pytest.mark.parametrize(("data", "text"), TEXTS, ids=[repr(d) for d, _ in TEXTS])
def test_junk_is_text_however_it_is_cut(data: bytes, text: str) -> None:
    for behind, more in ((b"", []), (frame(b"next"), [LogMessage("next")])):
        whole = data + behind
        expected = [junk(text), *more]
        assert merged(decode([whole])[0]) == expected
        assert merged(decode([whole[i : i + 1] for i in range(len(whole))])[0]) == expected
        for cut in range(len(whole) + 1):
            assert merged(decode([whole[:cut], whole[cut:]])[0]) == expected, f"cut at {cut}"


def test_junk_that_is_not_finished_stays_before_the_frame_that_follows() -> None:
    messages, _ = decode(["ü".encode()[:1], frame(b"one"), "ü".encode()[1:], frame(b"two")])
    assert messages == [junk("\\xc3"), LogMessage("one"), junk("\\xbc"), LogMessage("two")]


def test_junk_comes_out_at_once_but_for_an_unfinished_character() -> None:
    decoder = MessageDecoder(Text(), LIMIT)
    messages, decoder.state = decoder.decode("aü".encode()[:-1])
    assert messages == [junk("a")]
    messages, decoder.state = decoder.decode("ü".encode()[-1:])
    assert messages == [junk("ü")]
    messages, decoder.state = decoder.decode("€".encode()[:1])
    assert messages == []
    messages, decoder.state = decoder.decode("€".encode()[1:] + b"b")
    assert messages == [junk("€b")]
    assert decoder.finish() == ([], "")


def test_junk_between_an_error_and_a_message_is_in_its_place() -> None:
    messages, end = decode([b"a" + frame(b"x" * 11) + b"b" + frame(b"\xff") + b"c" + frame(b"m") + b"d"], limit=10)
    assert [type(m).__name__ for m in messages] == [
        "LogMessage",
        "FrameTooLargeError",
        "LogMessage",
        "SerializationError",
        "LogMessage",
        "LogMessage",
        "LogMessage",
    ]
    assert [m.message for m in messages if isinstance(m, LogMessage)] == ["a", "b", "c", "m", "d"]
    assert end == ""


def test_random_junk_and_frames_in_random_pieces() -> None:
    first = random.Random(20240229).randrange(1 << 30)
    for seed in range(first, first + 400):
        rng = random.Random(seed)
        data = b""
        expected: List[Any] = []
        for _ in range(rng.randrange(8)):
            text = "".join(rng.choice("aü€\U0001f600") for _ in range(rng.randrange(1, 6)))
            if rng.random() < 0.5:
                data += frame(text.encode())
                expected.append(LogMessage(text))
            else:
                data += text.encode()
                expected.append(junk(text))
        chunks = []
        while data:
            size = rng.choice([1, 2, 3, 9, 30])
            chunks.append(data[:size])
            data = data[size:]
        assert merged(decode(chunks)[0]) == merged(expected), f"seed {seed}"


def test_decode_text() -> None:
    assert decode_text(b"") == ("", b"")
    assert decode_text(b"a\xe2\x82") == ("a", b"\xe2\x82")
    assert decode_text(b"a\xe2\x82", final=True) == ("a\\xe2\\x82", b"")
    assert decode_text(b"\xff\xe2") == ("\\xff", b"\xe2")
    for size in range(5):  # at most three bytes of a character are ever held back
        assert len(decode_text(("\U0001f600" * 2).encode()[: 4 + size])[1]) == size % 4


# --- decoding -------------------------------------------------------------------------------------------------


class Raising:
    def __init__(self, make: Callable[[], BaseException]) -> None:
        self._make = make
        self.calls = 0

    def serialize(self, message: Message) -> bytes:
        self.calls += 1
        raise self._make()

    def deserialize(self, payload: Any) -> Message:
        self.calls += 1
        if bytes(payload) == b"good":
            return LogMessage("good")
        raise self._make()


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("even this fails")


ERRORS: List[Tuple[Callable[[], Exception], str]] = [
    (lambda: ValueError("why"), "ValueError: why"),
    (lambda: KeyError("k"), "KeyError: 'k'"),
    (lambda: RecursionError("deep"), "RecursionError: deep"),
    (lambda: MemoryError(), "MemoryError: "),
    (lambda: AssertionError(), "AssertionError: "),
    (lambda: StopIteration(), "StopIteration: "),
    (lambda: OSError(5, "gone"), r"OSError: \[Errno 5\] gone"),
    (lambda: FrameTooLargeError("mine"), "FrameTooLargeError: mine"),
    (lambda: NoText(), "NoText: "),
    (lambda: ValueError(10**5000), "ValueError: "),
]


@pytest.mark.parametrize(("make", "text"), ERRORS, ids=[text for _, text in ERRORS])
def test_whatever_a_serializer_raises_is_an_error_in_its_place(make: Callable[[], Exception], text: str) -> None:
    good, bad = frame(b"good"), frame(b"bad")
    for chunks in ([bad], [good + bad + good], [bad[:-1], b"d" + good]):
        serializer = Raising(make)
        messages, end = decode(chunks, serializer)
        errors = [m for m in messages if not isinstance(m, Message)]
        (error,) = errors
        assert isinstance(error, SerializationError)
        assert re.match(f"Raising could not deserialize a payload of 3 bytes: {text}", str(error))
        assert type(error.__cause__) is type(make())
        assert [m for m in messages if m is not error] == [LogMessage("good")] * (len(messages) - 1)
        assert serializer.calls == len(messages)
        assert end == ""
    with pytest.raises(SerializationError, match=f"Raising could not serialize LogMessage: {text}") as caught:
        MessageEncoder(Raising(make), LIMIT).encode(NOTIFICATION, None, LogMessage("x"))
    assert type(caught.value.__cause__) is type(make())


def test_a_serialization_error_stays_itself() -> None:
    error = SerializationError("why", request_id="7")
    error.__cause__ = cause = KeyError("because")
    for chunks in ([frame(b"bad")], [frame(b"bad") * 1 + b"junk"]):
        messages, _ = decode(chunks, Raising(lambda: error))
        assert messages[0] is error
    with pytest.raises(SerializationError) as caught:
        MessageEncoder(Raising(lambda: error), LIMIT).encode(NOTIFICATION, None, LogMessage("x"))
    assert caught.value is error
    assert error.__cause__ is cause


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_and_loses_nothing(kind: Any) -> None:
    interrupts = [kind(), kind()]

    class Interrupted(Text):
        def deserialize(self, payload: Any) -> Message:
            if bytes(payload) == b"two" and interrupts:
                raise interrupts.pop()
            return super().deserialize(payload)

    for head in (b"", frame(b"one")[:-1]):
        interrupts[:] = [kind(), kind()]
        decoder = MessageDecoder(Interrupted(), LIMIT)
        messages, decoder.state = decoder.decode(head)
        data = frame(b"one")[len(head) :] + b"text" + frame(b"two") + frame(b"three")[:-1]
        for _ in range(2):
            with pytest.raises(kind):
                decoder.decode(data)
        messages, decoder.state = decoder.decode(data)
        assert messages == [LogMessage("one"), junk("text"), LogMessage("two")]
        messages, decoder.state = decoder.decode(b"e")
        assert messages == [LogMessage("three")]


@pytest.mark.parametrize("result", [None, 5, "text", b"bytes", object(), LogMessage, [LogMessage("x")]], ids=repr)
def test_what_is_no_message_is_an_error(result: Any) -> None:
    class Wrong(Text):
        def deserialize(self, payload: Any) -> Any:
            return result

    for chunks in ([frame(b"a")], [frame(b"a") + b"junk"], [frame(b"a")[:-1], b"a"]):
        messages, _ = decode(chunks, Wrong())
        assert isinstance(messages[0], SerializationError)
        assert str(messages[0]) == f"Wrong.deserialize() returned {article(type(result))}, not a Message"


def test_a_thousand_empty_frames_are_a_thousand_errors() -> None:
    messages, _ = decode([frame(b"") * 1000 + frame(PICKLE.serialize(LogMessage("x")))], PICKLE)
    assert len(messages) == 1001
    assert all(isinstance(m, SerializationError) for m in messages[:-1])
    assert messages[-1] == LogMessage("x")


def test_errors_and_messages_keep_their_order() -> None:
    data = frame(b"1") + frame(b"\xff") + b"j" + frame(b"x" * 50) + frame(b"2")
    for size in (1, 5, 100):
        messages, _ = decode([data[i : i + size] for i in range(0, len(data), size)], limit=20)
        assert [m.message if isinstance(m, LogMessage) else type(m) for m in messages] == [
            "1",
            SerializationError,
            "j",
            FrameTooLargeError,
            "2",
        ]
        assert all(isinstance(m, (Message, IpcError)) for m in messages)


def test_the_oversized_frame_carries_size_and_limit() -> None:
    messages, _ = decode([frame_header(21), b"x" * 21, frame(b"next")], limit=20)
    assert (messages[0].size, messages[0].limit) == (21, 20)
    assert messages[1:] == [LogMessage("next")]
    for whole in (frame(b"x" * 21), frame(b"x" * 21) + frame(b"next")):
        assert isinstance(decode([whole], limit=20)[0][0], FrameTooLargeError)
    assert decode([frame(b"x" * 20)], limit=20)[0] == [LogMessage("x" * 20)]


def test_the_end() -> None:
    assert decode([]) == ([], "")
    assert decode([frame(b"abc")[:-1]]) == ([], "in the middle of a frame (2 of 3 bytes had arrived)")
    assert decode([frame(b"abc")[:5]]) == ([], "in the middle of a frame's header (5 of 8 bytes had arrived)")
    assert decode([b"\xc3"]) == ([junk("\\xc3")], "")
    assert decode([b"\xc3\xf3\x4a"]) == ([junk("\\xc3\\xf3J")], "")


def test_a_payload_read_directly() -> None:
    payload = b"x" * 1000
    decoder = MessageDecoder(Text(), LIMIT)
    assert missing_bytes(decoder.state) == 0
    messages, decoder.state = decoder.decode(b"junk" + frame(payload)[:-900])
    assert messages == [junk("junk")]
    for left in (900, 500, 100):
        assert missing_bytes(decoder.state) == left
        view = decoder.room(400)
        count = min(400, left)
        assert len(view) >= count
        view[:count] = b"x" * count
        view.release()
        messages, decoder.state = decoder.advance(count)
    assert messages == [LogMessage("x" * 1000)]
    assert missing_bytes(decoder.state) == 0
    messages, decoder.state = decoder.decode(frame(b"next"))
    assert messages == [LogMessage("next")]


# --- buffers that are used again ------------------------------------------------------------------------------


class Noting(Text):
    """Notes the buffers that it is given, without keeping one, and says so."""

    @property
    def reader(self) -> Any:
        return self.deserialize

    def __init__(self) -> None:
        self.ids: List[int] = []
        self.error: Any = None

    def deserialize(self, payload: Any) -> Message:
        self.ids.append(id(payload))
        if self.error is not None:
            raise self.error
        return super().deserialize(payload)


class Keeping(PickleMessageSerializer):
    """Overrides deserialize() of one that keeps nothing, and keeps everything."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: List[Any] = []

    def deserialize(self, payload: Any) -> Message:
        self.kept.append(payload)
        return super().deserialize(payload)


def receive(decoder: MessageDecoder, payload: bytes) -> List[Any]:
    """Receive a large payload as a transport does."""
    messages, decoder.state = decoder.decode(frame(payload)[:60_000])
    while missing_bytes(decoder.state):
        assert messages == []
        view = decoder.room(50_000)
        at = len(payload) - missing_bytes(decoder.state)
        count = min(50_000, len(view))
        view[:count] = payload[at : at + count]
        view.release()
        messages, decoder.state = decoder.advance(count)
    return messages


def test_the_buffer_of_a_large_payload_is_used_again() -> None:
    serializer = Noting()
    decoder = MessageDecoder(serializer, 10 * LIMIT)
    for size in (200_000, 200_000, 100_000, 300_000, 70_000):
        text = f"{size} " + "x" * size
        assert receive(decoder, text.encode()) == [LogMessage(text)]
        # Small ones in between, in one piece and in two.
        messages, decoder.state = decoder.decode(frame(b"small") + frame(b"cut")[:-1])
        messages, decoder.state = decoder.decode(b"t")
    assert len(set(serializer.ids[::3])) == 1


def test_a_buffer_that_is_too_large_is_not_kept() -> None:
    decoder = MessageDecoder(Noting(), 10 * LIMIT)
    tracemalloc.start()
    try:
        for size in (200_000, 5 * LIMIT):
            assert len(receive(decoder, b"x" * size)) == 1
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def test_a_kept_buffer_is_given_back_when_nothing_happens() -> None:
    decoder = MessageDecoder(Noting(), LIMIT)
    tracemalloc.start()
    try:
        assert len(receive(decoder, b"x" * 500_000)) == 1
        decoder.trim()
        assert tracemalloc.get_traced_memory()[0] > 400_000
        assert len(receive(decoder, b"x" * 500_000)) == 1
        decoder.trim()
        assert tracemalloc.get_traced_memory()[0] > 400_000
        decoder.trim()
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    assert receive(decoder, b"y" * 100_000) == [LogMessage("y" * 100_000)]


def test_a_buffer_is_kept_while_the_payload_in_it_is_unfinished() -> None:
    decoder = MessageDecoder(Noting(), LIMIT)
    receive(decoder, b"x" * 100_000)
    data = frame(b"y" * 100_000)
    _, decoder.state = decoder.decode(data[:60_000])
    decoder.trim()
    decoder.trim()
    messages, decoder.state = decoder.decode(data[60_000:])
    assert messages == [LogMessage("y" * 100_000)]


class Wrapping:
    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.kept: List[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def deserialize(self, payload: Any) -> Any:
        self.kept.append(payload)
        return self.inner.deserialize(payload)


def on_the_instance() -> Any:
    serializer: Any = PickleMessageSerializer()
    original = serializer.deserialize
    serializer.kept = []

    def deserialize(payload: Any) -> Any:
        serializer.kept.append(payload)
        return original(payload)

    serializer.deserialize = deserialize
    return serializer


@pytest.mark.parametrize("make", [Keeping, lambda: Wrapping(PICKLE), on_the_instance])
def test_a_serializer_that_may_keep_its_payloads_sees_them_unchanged(make: Callable[[], Any]) -> None:
    serializer = make()
    decoder = MessageDecoder(serializer, LIMIT)
    payloads = [PICKLE.serialize(Large(bytes([n]) * 200_000)) for n in range(4)]
    for payload in payloads:
        assert len(receive(decoder, payload)) == 1
    assert serializer.kept == payloads and all(type(kept) is bytearray for kept in serializer.kept)


def test_the_serializers_of_ours_let_their_buffers_be_used_again() -> None:
    for serializer in (PICKLE, PickleMessageSerializer(unsafe=True), JSON, PHP):
        decoder = MessageDecoder(serializer, LIMIT)
        buffers = set()
        messages = [LogMessage(str(n) * (200_000 + n % 2)) for n in range(4)]
        for message in messages:
            payload = serializer.serialize(message)
            _, decoder.state = decoder.decode(frame(payload)[:60_000])
            assert isinstance(decoder.state, Filling)
            buffers.add(id(decoder.state.frame))
            (got,), decoder.state = decoder.decode(frame(payload)[60_000:])
            assert got == message
        assert len(buffers) == 1
        # What came before has not changed.
        assert got == LogMessage("3" * 200_001)


def test_a_buffer_whose_payload_could_not_be_decoded_is_not_used_again() -> None:
    for error in (ValueError("no"), SerializationError("no")):
        serializer = Noting()
        decoder = MessageDecoder(serializer, LIMIT)
        receive(decoder, b"a" * 100_000)
        held = decoder.decode(frame(b"b" * 100_000)[:60_000])[1].frame
        serializer.error = error
        (got,) = receive(decoder, b"b" * 100_000)
        assert isinstance(got, SerializationError) and held == b"b" * 100_000
        serializer.error = None
        assert receive(decoder, b"c" * 100_000) == [LogMessage("c" * 100_000)]
        assert held == b"b" * 100_000


def test_an_interrupt_while_a_buffer_is_used_again() -> None:
    serializer = Noting()
    decoder = MessageDecoder(serializer, LIMIT)
    receive(decoder, b"a" * 100_000)
    for letter, size in ((b"b", 100_000), (b"c", 120_000), (b"d", 80_000)):
        serializer.error = KeyboardInterrupt()
        data = frame(letter * size)
        decoder.decode(data[:60_000])  # a result that is discarded
        _, decoder.state = decoder.decode(data[:60_000])
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                decoder.decode(data[60_000:] + frame(b"next")[:-1])
        serializer.error = None
        decoder.decode(data[60_000:] + frame(b"next")[:-1])  # also one in which it was decoded
        messages, decoder.state = decoder.decode(data[60_000:] + frame(b"next")[:-1])
        assert messages == [LogMessage((letter * size).decode())]
        messages, decoder.state = decoder.decode(b"t")
        assert messages == [LogMessage("next")]


def test_a_payload_that_begins_in_the_chunk_in_which_the_last_one_ends() -> None:
    decoder = MessageDecoder(Noting(), LIMIT)
    stream = b"".join(frame(letter * 100_000) for letter in (b"a", b"b", b"c", b"d"))
    got: List[Any] = []
    for at in range(0, len(stream), 60_000):
        messages, decoder.state = decoder.decode(stream[at : at + 60_000])
        got += messages
    assert got == [LogMessage(letter * 100_000) for letter in "abcd"]


def test_nothing_changes_before_the_state_is_assigned() -> None:
    decoder = MessageDecoder(Text(), LIMIT)
    for chunk in (b"a\xc3", frame(b"abc")[:-1], b"c" + frame(b"d") + b"\xf3"):
        before = decoder.state
        first = decoder.decode(chunk)[0]
        assert decoder.state is before
        second, decoder.state = decoder.decode(chunk)
        assert first == second


# --- encoding -------------------------------------------------------------------------------------------------


def encoded(serializer: Any, message: Message, limit: int = LIMIT) -> List[Any]:
    return MessageEncoder(serializer, limit).encode(*take_out_of_envelope(message))


@pytest.mark.parametrize("result", [bytearray(b"abc"), memoryview(b"abc"), memoryview(b"aXbXcX")[::2], b"abc"], ids=repr)
def test_a_serializer_may_return_any_kind_of_bytes(result: Any) -> None:
    class Other(Text):
        def serialize(self, message: Message) -> Any:
            return result

    assert b"".join(encoded(Other(), LogMessage("x"))) == frame(b"abc")


@pytest.mark.parametrize("result", [None, 5, "text", [], [b"abc"], [5], (b"a",), object(), {}], ids=repr)
def test_a_serializer_that_returns_something_else(result: Any) -> None:
    class Other(Text):
        def serialize(self, message: Message) -> Any:
            return result

    with pytest.raises(SerializationError, match=rf"Other.serialize\(\) returned {article(type(result))}, not bytes"):
        encoded(Other(), LogMessage("x"))


def test_a_bytearray_is_copied() -> None:
    buffer = bytearray(b"x" * 100_000)

    class Reusing(Text):
        def serialize(self, message: Message) -> Any:
            return buffer

    for size in (10, 100_000):
        buffer[:] = b"x" * size
        buffers = encoded(Reusing(), LogMessage("x"))
        buffer[:] = b"y" * size
        assert b"".join(buffers) == frame(b"x" * size)


def test_large_bytes_go_by_reference_and_a_large_bytearray_does_not() -> None:
    large, changing = b"x" * 200_000, bytearray(b"y" * 200_000)
    message = Large([large, changing, "end"])
    buffers = encoded(PICKLE, message)
    assert any(buffer is large for buffer in buffers)
    changing[:] = bytes(200_000)
    messages, _ = decode([b"".join(buffers)], PICKLE)
    assert messages == [Large([large, bytearray(b"y" * 200_000), "end"])]
    assert b"".join(buffers)[:HEADER_SIZE] == frame_header(sum(map(len, buffers)) - HEADER_SIZE)


def test_large_texts_are_no_longer_copied_into_a_payload_once_one_has_come() -> None:
    @dataclass
    class Told(Message):
        text: str

    counts = []
    for size in (10, 200_000, 200_000, 10):
        buffers = encoded(PICKLE, Told("x" * size))
        counts.append(len(buffers))
        assert b"".join(buffers)[HEADER_SIZE:] == PICKLE.serialize(Told("x" * size))
        assert decode([b"".join(buffers)], PICKLE)[0] == [Told("x" * size)]
    assert counts[:2] == [1, 2]  # the header, and the payload in one piece
    assert counts[2] > 2 and counts[3] == 1


def test_a_small_frame_is_one_buffer() -> None:
    for size in (0, 1, 100, 30_000):
        buffers = encoded(Text(), LogMessage("x" * size))
        assert buffers == [frame(b"x" * size)]
        assert type(buffers[0]) is bytes
    for size in (32 * 1024, 40_000, 70_000):
        assert b"".join(encoded(Text(), LogMessage("x" * size))) == frame(b"x" * size)


def test_the_limit() -> None:
    for limit in (10, 40_000, 100_000):
        assert b"".join(encoded(Text(), LogMessage("x" * limit), limit)) == frame(b"x" * limit)
        with pytest.raises(FrameTooLargeError) as caught:
            encoded(Text(), LogMessage("x" * (limit + 1)), limit)
        assert (caught.value.size, caught.value.limit) == (limit + 1, limit)
        text = f"frame of {limit + 1} bytes for LogMessage exceeds max_frame_size, which is {limit} bytes;"
        assert str(caught.value).startswith(text)
    with pytest.raises(FrameTooLargeError):
        encoded(PICKLE, Large([b"x" * 70_000, b"y" * 70_000]), 140_000)
    assert encoded(PICKLE, Large([b"x" * 70_000, b"y" * 70_000]), 150_000)


@pytest.mark.parametrize("serializer", [JSON, PHP, PICKLE], ids=repr)
def test_a_frame_holds_what_serialize_returns(serializer: Any) -> None:
    message = LogMessage("é")
    for sent in (message, RequestEnvelope("é", message), ResponseEnvelope("1", message)):
        assert b"".join(encoded(serializer, sent)) == frame(serializer.serialize(sent))
    for sent in (Large(Large), RequestEnvelope("1", Large(Large))):  # a class cannot travel
        with pytest.raises(SerializationError, match=r"Large\.\w+: ") as framed:
            encoded(serializer, sent)
        with pytest.raises(SerializationError) as plain:
            serializer.serialize(sent)
        assert str(framed.value) == str(plain.value)


@pytest.mark.parametrize("base", [JsonMessageSerializer, PhpMessageSerializer, PickleMessageSerializer])
def test_an_override_of_serialize_counts_although_the_base_has_writers(base: Any) -> None:
    class Compressed(base):  # type: ignore[misc]
        def serialize(self, message: Message) -> bytes:
            return zlib.compress(super().serialize(message))

        def deserialize(self, payload: Any) -> Any:
            return super().deserialize(zlib.decompress(payload))

    data = b"".join(encoded(Compressed(), LogMessage("x" * 1000)))
    assert len(data) < 200
    assert decode([data], Compressed())[0] == [LogMessage("x" * 1000)]


def test_a_wrapper_that_hands_on_what_it_does_not_know() -> None:
    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def serialize(self, message: Message) -> bytes:
            payload: bytes = self._inner.serialize(message)
            return b"<" + payload

        def deserialize(self, payload: Any) -> Any:
            return self._inner.deserialize(payload[1:])

    data = b"".join(encoded(Wrapper(PICKLE), LogMessage("x")))
    assert data[HEADER_SIZE : HEADER_SIZE + 1] == b"<"
    assert decode([data], Wrapper(PICKLE))[0] == [LogMessage("x")]


def test_a_serialize_that_is_set_on_the_instance() -> None:
    serializer = PickleMessageSerializer()
    serializer.serialize = lambda message: b"mine"  # type: ignore[method-assign]
    assert encoded(serializer, LogMessage("x")) == [frame(b"mine")]


def test_an_override_of_both() -> None:
    class Both(Text):
        @property
        def writers(self) -> Any:
            return {LogMessage: lambda kind, id, message: [b"a", b"b" * 50_000]}

    assert b"".join(encoded(Both(), LogMessage("x"))) == frame(b"a" + b"b" * 50_000)


def test_what_is_no_serializer() -> None:
    class Half:
        def serialize(self, message: Message) -> bytes:
            return b""

    for wrong, name in ((object(), "serialize"), (None, "serialize"), (Half(), "deserialize"), ("pickle", "serialize")):
        with pytest.raises(TypeError, match=rf"serializer has no method {name}\(\): {re.escape(repr(wrong))}"):
            MessageEncoder(wrong, LIMIT)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"is a class; pass an instance: PickleMessageSerializer\(\)"):
        MessageEncoder(PickleMessageSerializer, LIMIT)  # type: ignore[arg-type]


def test_max_frame_size() -> None:
    for good in (1, 100, MAX_FRAME_SIZE):
        assert check_max_frame_size(good) == good
    for bad in (0, -1, MAX_FRAME_SIZE + 1):
        with pytest.raises(ValueError, match="max_frame_size must be from 1 to"):
            check_max_frame_size(bad)
        with pytest.raises(ValueError, match="max_frame_size"):
            MessageEncoder(PICKLE, bad)
    for wrong in (1.5, "1", None, True):
        with pytest.raises(TypeError, match="max_frame_size must be a number of bytes"):
            check_max_frame_size(wrong)  # type: ignore[arg-type]


def test_a_round_trip_of_many_messages_in_any_pieces() -> None:
    messages: List[Message] = [LogMessage("x" * n) for n in (0, 1, 100, 70_000)]
    messages += [ErrorMessage("why"), Large([b"z" * 100_000, {"k": MAGIC}]), LogMessage("last")]
    encoder = MessageEncoder(PICKLE, LIMIT)
    data = b"".join(b"".join(encoder.encode(*take_out_of_envelope(m))) for m in messages)
    for size in (1, 7, 4096, 65536, len(data)):
        step = size if size > 1 else 997
        assert decode([data[i : i + step] for i in range(0, len(data), step)], PICKLE) == (messages, "")


@pytest.mark.parametrize("serializer", [JSON, PHP, PICKLE], ids=repr)
def test_an_interruption_of_what_finds_out_an_error_is_not_taken_for_one(serializer: Any) -> None:
    encoder, decoder = MessageEncoder(serializer, LIMIT), MessageDecoder(serializer, LIMIT)
    unsent = Large([LogMessage("x"), {"key": (Large,)}])
    broken = frame(serializer.serialize(RequestEnvelope("7", LogMessage("x" * 300)))[:-1])

    def encode() -> None:
        with pytest.raises(SerializationError):
            encoder.encode(REQUEST, "7", unsent)

    def decode() -> None:
        (error,), _ = decoder.decode(broken)
        assert error.request_id == "7"

    for fail in (encode, decode):
        fail()
        number = 1 - places_apart()
        while True:
            number += places_apart()
            error = InterruptionError()
            with InterruptAt(number, error) as interrupt:
                try:
                    fail()
                except InterruptionError as exc:
                    assert exc is error, interrupt.where
                else:
                    assert not interrupt.hit, interrupt.where
                    break
        assert number > 20, (fail, number)
