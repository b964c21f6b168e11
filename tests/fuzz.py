"""Any bytes into each decoder: ``python -m tests.fuzz [TARGET ...] [--seconds N] [--seed N] [--coverage]``.

Runs in a process of its own, because an audit hook cannot be removed: the pickle target must never import, open, run or
look up anything. Inputs are mutations of a corpus: the vectors, and messages of every kind. What leads to another answer
than all before joins the corpus. With ``--coverage`` atheris chooses the inputs. What fails is made short and printed.
"""

import argparse
import collections
import copyreg
import datetime
import decimal
import enum
import inspect
import os
import pathlib
import random
import re
import resource
import sys
import tempfile
import time
import traceback
import uuid
import zlib
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NoReturn, Optional, Set, Tuple

from stream_ipc import (
    ErrorMessage,
    JsonMessageSerializer,
    LogMessage,
    Message,
    PhpMessageSerializer,
    PickleMessageSerializer,
    RequestEnvelope,
    ResponseEnvelope,
    SerializationError,
    register_type,
)
from stream_ipc.tap.payloads import look
from stream_ipc.tap.report import Report
from stream_ipc.wire.codec import MessageDecoder, TextDecoder
from stream_ipc.wire.framing import FrameDecoder, Junk
from tests.helpers import MAGIC, frame, missing_bytes, set_large_pickle
from tests.messages import Many, Note, Ping, Pong
from tests.model import shrink
from tests.php_messages import VECTORS

MEMORY = 400 << 20  # bytes of address space: a pickle can ask for more, which is a MemoryError then
SLOW = 5.0  # seconds of processor time that no input of a few kilobytes takes
SIZE = 3000  # bytes of an input of the corpus


# -- messages of every kind


@register_type
class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


@register_type
class Mode(enum.Flag):
    READ = 1
    WRITE = 2


@register_type
@dataclass
class Spot:
    x: int
    y: Any = None


@dataclass
class Everything(Message):
    text: str = "text"
    number: int = 5
    ratio: float = 1.5
    flag: bool = True
    data: Optional[bytes] = None
    items: List[Any] = field(default_factory=list)
    by_name: Dict[str, Any] = field(default_factory=dict)
    other: Any = None


class Loose(Message):
    """Is rebuilt from its attributes."""

    def __init__(self) -> None:
        self.first = 1
        self.second = ["a", {"b": None}]


@dataclass
class Checked(Message):
    count: int

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 0:
            raise ValueError("count must be a number from 0 on")


def messages() -> List[Message]:
    spot = Spot(1, Spot(-2, "y"))
    plain: List[Message] = [
        LogMessage("hello", "warning"),
        ErrorMessage("failed", ValueError("why")),
        Ping([1, -1, 2**31, 2**62, 0.5, 1e300, True, None, "", "text", "\u00e9\u20ac\U0001f600\0\n"]),
        Pong({"a": {"b": {"c": [[[[]]]]}}, "0": "zero", "": {}}),
        Note("text" * 100, [{"k": "v" * 10} for _ in range(20)]),
        Many([Colour.RED, Colour.BLUE, Mode.READ, spot, spot, [spot]]),
        Everything("t", -5, 2.0, False, None, [1, "2", [3]], {"a": spot, "b": None}, Checked(3)),
        Checked(0),
        Loose(),
    ]
    requests = [RequestEnvelope("17.4", message) for message in plain]
    return [*plain, *requests, *[ResponseEnvelope("x" * 128, message) for message in plain]]


def messages_for_pickle() -> List[Message]:
    loop: List[Any] = [1]
    loop.append(loop)
    shared = [1, 2]
    zone = datetime.timezone(datetime.timedelta(hours=2), "X")
    values: List[Any] = [
        loop, [shared, shared, (Spot([1]), Spot(shared))],
        (1, (2, (3,))), {1, 2}, frozenset({"a"}), b"bytes" * 20, bytearray(b"abc"), 2**80, 1 + 2j,
        datetime.datetime(2024, 2, 29, 1, 2, 3, 4, zone), datetime.date(2024, 1, 1), datetime.time(1, 2),
        datetime.timedelta(1, 2, 3), decimal.Decimal("1.50"), uuid.UUID(int=7), pathlib.PurePosixPath("/a/b"),
        collections.OrderedDict(a=1), collections.deque([1], 3), collections.Counter("aab"),
        collections.defaultdict(list, {"a": [1]}), collections.ChainMap({"a": 1}), Mode.READ | Mode.WRITE,
        {(1, "a"): {Colour.RED: Spot(1)}}, "line\nc\nline\ni\n",
    ]  # fmt: skip
    found: List[Message] = [Everything(data=b"x" * 5000, other=value) for value in values[:3]]
    return found + [Ping(value) for value in values] + [RequestEnvelope("1", Pong(values[3:]))]


def payloads(serializer: Any, candidates: List[Message]) -> List[bytes]:
    found = []
    for message in candidates:
        try:
            found.append(serializer.serialize(message))
        except SerializationError:
            pass  # this format cannot carry it
    assert len(found) > 5
    return found


JSON, PHP, PICKLE = JsonMessageSerializer(), PhpMessageSerializer(), PickleMessageSerializer()
OLD_JSON, OLD_PHP = JsonMessageSerializer(namespace="PhpStreamIpc"), PhpMessageSerializer(namespace="PhpStreamIpc")


def vectors(format: str) -> List[bytes]:
    found = [bytes.fromhex(v["payload_hex"]) for v in VECTORS["encode"] if v["serializer"] == format]
    for vector in VECTORS["decode"]:
        if vector["serializer"] == format and vector["kind"] != "framing":
            found.append(bytes.fromhex(vector["input_hex"]))
    assert found
    return found


def text_corpus(format: str, *serializers: Any) -> List[bytes]:
    return [*vectors(format), *(data for serializer in serializers for data in payloads(serializer, messages()))]


def pickle_corpus() -> List[bytes]:
    return payloads(PICKLE, messages()) + payloads(PICKLE, messages_for_pickle())


def frame_corpus() -> List[bytes]:
    found = [bytes.fromhex(vector["input_hex"]) for vector in VECTORS["decode"] if vector["kind"] == "framing"]
    json = [frame(data) for data in payloads(JSON, messages())]
    mixed = b"junk\xe2\x82" + json[0] + b"\xac more\xf3\x4a" + json[1]
    return [*found, b"".join(json[:4]), mixed, MAGIC * 3, b"line\r\nline\n"]


# -- targets: each takes any bytes, and raises if anything is wrong


Answer = Tuple[Any, ...]


def answer_of(serializer: Any, payload: Any) -> Answer:
    """Return what a payload comes to, in a form that can be compared."""
    try:
        message = serializer.deserialize(payload)
    except SerializationError as error:
        for id in (error.request_id, error.response_id):
            assert id is None or (type(id) is str and len(id) <= 128), id
        return "error", re.sub(r"0x[0-9a-f]+", "", str(error)), error.request_id, error.response_id
    assert isinstance(message, Message)
    try:
        return "message", type(message).__name__, re.sub(r"0x[0-9a-f]+", "", repr(message))
    except (RecursionError, ValueError):  # too deep for a repr, or an int with too many digits
        return "message", type(message).__name__, ""


def check_forms(serializer: Any, data: bytes) -> Answer:
    first = answer_of(serializer, data)
    for payload in (bytearray(data), memoryview(data)):
        other = answer_of(serializer, payload)
        assert other == first, f"{type(payload).__name__} has another answer: {other} in place of {first}"
    return first


def check_round_trip(serializer: Any, data: bytes) -> None:
    """What was read and can be sent arrives as it is: the second time nothing changes any more."""
    try:
        once = serializer.serialize(serializer.deserialize(data))
    except SerializationError:
        return
    again = serializer.serialize(serializer.deserialize(once))
    assert once == again or sorted(once) == sorted(again), (once, again)  # sets have no order


def json_target(data: bytes) -> Answer:
    answer = check_forms(JSON, data)
    check_round_trip(JSON, data)
    return answer


def php_target(data: bytes) -> Answer:
    answer = check_forms(PHP, data)
    check_round_trip(PHP, data)
    return answer


def pickle_target(data: bytes) -> Answer:
    answer = check_forms(PICKLE, data)
    with set_large_pickle(0):  # as what is large is read
        others = [check_forms(PICKLE, data)]
    copyreg.add_extension("os", "system", 0xF2)  # type: ignore[no-untyped-call]  # so that nothing is read the quick way
    try:
        others.append(answer_of(PICKLE, data))
    finally:
        copyreg.remove_extension("os", "system", 0xF2)  # type: ignore[no-untyped-call]
    for other in others:
        if other[0] == answer[0] == "error":
            continue  # in words of another part of the unpickler
        # The unpickler reads a file frame by frame, and takes a frame of a wrong size in another way than loads() does.
        assert other == answer or not is_framed(data), f"read another way it is {other}, not {answer}"
    return answer


def is_framed(data: bytes) -> bool:
    """Whether a pickle is one whole frame, or has none."""
    if b"\x95" not in data:
        return True
    return data[:3] == b"\x80\5\x95" and int.from_bytes(data[3:11], "little") == len(data) - 11 and data.count(b"\x95") == 1


def tap_target(data: bytes) -> Answer:
    answer: Answer = ()
    for format in ("", "json", "php", "pickle"):
        content = look(data, format)
        assert content.kind in ("request", "response", "notification", "unreadable")
        assert all(text.isprintable() for text in content), content
        assert len(content.view) < 3000 and len(content.name) <= 2000, content
        answer += content[:1]
    return answer


def cuts(data: bytes) -> List[bytes]:
    """Cut an input into pieces, the same ones each time."""
    rng = random.Random(zlib.crc32(data))
    pieces = []
    at = 0
    while at < len(data):
        size = rng.choice((1, 1, 2, 3, 5, 8, 9, 20, 100, 1000))
        pieces.append(data[at : at + size])
        at += size
    return pieces


def framed(pieces: List[bytes], limit: int, direct: bool = False) -> Tuple[List[Any], str]:
    """Return the frames and the junk of some pieces, and where they break off."""
    items: List[Any] = []
    decoder = FrameDecoder(limit)
    for piece in pieces:
        while piece:
            if direct and missing_bytes(decoder.state):
                view = decoder.room(7)
                count = min(len(view), len(piece))
                view[:count] = piece[:count]
                view.release()
                found, decoder.state = decoder.advance(count)
            else:
                count = len(piece)
                found, decoder.state = decoder.decode(piece)
            items += found
            piece = piece[count:]
    found, text = decoder.finish()
    joined: List[Any] = []
    for item in [*items, *found]:
        if isinstance(item, Junk) and joined and isinstance(joined[-1], Junk):
            joined[-1] = Junk(joined[-1] + item)
        else:
            joined.append(item if isinstance(item, (Junk, Exception)) else bytes(item))
    return [str(item) if isinstance(item, Exception) else item for item in joined], text


def frames_target(data: bytes) -> Answer:
    pieces = cuts(data)
    for limit in (1 << 26, 40):
        whole = framed([data], limit)
        assert framed(pieces, limit) == whole, "cut into pieces it is something else"
        assert framed(pieces, limit, direct=True) == whole, "read directly it is something else"
    shown = [decoded([data]), decoded(pieces)]
    assert shown[0] == shown[1], "cut into pieces the messages are others"
    lines = [lines_of([data]), lines_of(pieces)]
    assert lines[0] == lines[1], "cut into pieces the lines are others"
    reports = [reported([data]), reported(pieces)]
    assert reports[0] == reports[1], "cut into pieces the tap says something else"
    return tuple(type(item).__name__ for item in whole[0][:6])


def decoded(pieces: List[bytes]) -> List[str]:
    """Return the messages of a stream, junk joined, because it comes as it is cut."""
    decoder = MessageDecoder(JSON, 1 << 26)
    messages: List[Any] = []
    for piece in pieces:
        found, decoder.state = decoder.decode(piece)
        messages += found
    found, text = decoder.finish()
    shown: List[str] = []
    junk = ""
    for message in [*messages, *found]:
        if isinstance(message, LogMessage) and message.level == LogMessage.LEVEL_JUNK:
            junk += message.message
            continue
        shown += [junk, f"{type(message).__name__}: {message}"]
        junk = ""
    return [*shown, junk, text]


def lines_of(pieces: List[bytes]) -> List[str]:
    decoder = TextDecoder(lambda text: None)
    messages: List[Any] = []
    for piece in pieces:
        found, decoder.state = decoder.decode(piece)
        messages += found
    found, _ = decoder.finish()
    return [message.message for message in [*messages, *found]]


def reported(pieces: List[bytes]) -> List[str]:
    """Return the tap's lines, but for junk, which comes as it is cut, and the summary, which counts it."""
    lines: List[str] = []
    report = Report(lines.append, (">",))
    for piece in pieces:
        report.feed(">", piece)
    report.finish()
    return [line for line in lines[:-1] if " junk " not in line]


TARGETS: Dict[str, Callable[[bytes], Answer]] = {
    "frames": frames_target, "json": json_target, "php": php_target, "pickle": pickle_target, "tap": tap_target,
}  # fmt: skip

CORPORA: Dict[str, Callable[[], List[bytes]]] = {
    "frames": frame_corpus,
    "json": lambda: text_corpus("json", JSON, OLD_JSON),
    "php": lambda: text_corpus("native", PHP, OLD_PHP),
    "pickle": pickle_corpus,
    "tap": lambda: text_corpus("json", JSON)[::3] + text_corpus("native", PHP)[::3] + pickle_corpus(),
}

TOKENS: Dict[str, List[bytes]] = {
    "frames": [MAGIC, MAGIC + b"\0\0\0\5", MAGIC[:2], b"\0\0\0\x29", b"\xff\xff\xff\xff", b"\r\n", b"\n", b"\xe2\x82"],
    "json": [
        b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u00e9", b"\\ud800", b"\\udc00", b"null", b"true", b"NaN",
        b"-0", b"1e400", b"1.0", b'"__class":', b'"id":', b"\xff", b"\xc3", b" ", b"\0", b"[" * 600, b"9" * 5000,
        b"Infinity",
    ],
    "php": [
        b"N;", b"b:1;", b"i:0;", b"i:-9223372036854775808;", b"d:0.5;", b"d:NAN;", b"d:-INF;", b's:1:"a";', b'"',
        b"a:1:{", b"}", b"r:1;", b"R:2;", b"O:8:\"stdClass\":0:{}", b"E:", b"C:", b"S:", b"\0", b"\0*\0", b"\xff",
        b"999999999", b"a:0:{}" * 50, b'O:8:"DateTime":', b"a:1:{i:0;" * 600,
    ],
    "pickle": [
        b"cos\nsystem\n", b"cbuiltins\neval\n", b"(ios\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"R", b"b", b"}b",
        b"\x81", b"\x92", b"\x82\x01", b"\x83\x01\0", b"P1\n", b"Q", b"\x97", b"\x98", b"\x96\1\0\0\0\0\0\0\0x", b"(",
        b"t", b"\x85", b"\x86", b"\x87", b"]", b"e", b"}", b"u", b"\x8f", b"\x90", b"\x91", b"h\0", b"h\5", b"q\0",
        b"\x94", b"2", b"0", b"1", b".", b"\x80\x05", b"\x95\x10\0\0\0\0\0\0\0",
        b"cstream_ipc.serializers.pickle\nbuild\n", b"I5\n", b"L5L\n", b"F1.5\n", b"V\\u0041\n", b"S'a'\n",
        b"\x8a\x09" + b"\xff" * 9, b"G" + b"\x7f" * 8, b"K", b"M", b"J", b"N", b"\x88", b"\x89", b"(" * 500,
        b"]" * 500 + b"a" * 500,
    ],
    "tap": [],
}  # fmt: skip
TOKENS["tap"] = [token for tokens in TOKENS.values() for token in tokens]


def mutated(rng: random.Random, corpus: List[bytes], tokens: List[bytes]) -> bytes:
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        way = rng.randrange(9)
        if way == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif way == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif way == 2:
            data[at : at + rng.choice((0, 1, 4))] = rng.choice(tokens)
        elif way == 3:
            del data[at : at + rng.randrange(1, 9)]
        elif way == 4:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + rng.randrange(1, 40)]
        elif way == 5:
            digits = [i for i, c in enumerate(data) if 48 <= c <= 57]
            if digits:
                i = rng.choice(digits)
                data[i : i + 1] = str(rng.choice((0, 1, 2, 9, 10, 511, 512, 2**31, 2**63, 10**30))).encode()
        elif way == 6:
            other = rng.choice(corpus)
            data[at:] = other[rng.randrange(len(other) + 1) :]
        elif way == 7:
            del data[at:]
        else:
            data[at : at + rng.randrange(1, 9)] = os.urandom(0) + bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
    return bytes(data[: 20 * SIZE])


# -- the audit hook


class Watch:
    """Notes what must not happen while an input is decoded. Its hook stays for the rest of the process."""

    harmless = ("object.__getattr__", "object.__setattr__", "object.__delattr__", "sys._getframe", "builtins.id")

    def __init__(self) -> None:
        self.armed = False
        self.seen: List[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, args: Tuple[Any, ...]) -> None:
        if not self.armed or event in self.harmless:
            return
        if event in ("compile", "exec") and sys._getframe(1).f_code.co_name == "compile_function":
            return  # how to build a registered class, from the names of its own fields
        if event == "sys.excepthook" and "deallocated bytearray" in str(args[2]):
            return  # what CPython prints when there is no memory for a bytearray
        self.seen.append(f"{event}{args!r:.200}")


class Found(Exception):
    """An input that is not dealt with as it must."""


class Runner:
    """Feeds inputs to one target."""

    def __init__(self, name: str, watch: Watch) -> None:
        self.name = name
        self.target = TARGETS[name]
        self.corpus = [data[:SIZE] for data in CORPORA[name]()]
        self.watch = watch
        self.count = 0
        self.slowest = 0.0
        self.answers: Set[Any] = set()

    def warm_up(self) -> None:
        """Have imported and compiled what the first message of a kind needs."""
        for data in [*self.corpus, b"", b"garbage", b"\x80\x05", b'{"__class":"\\u001b"}', b"\x80\x05V\\u0041\n."]:
            self.feed(data)
            self.feed(data[:-1])

    def feed(self, data: bytes) -> Answer:
        """Feed one input.

        Raises:
            Exception: It is not dealt with as it must.
        """
        self.count += 1
        start = time.process_time()
        self.watch.seen.clear()
        try:
            return self.target(data)
        finally:
            taken = time.process_time() - start
            self.slowest = max(self.slowest, taken)
            if self.watch.seen:
                raise Found(f"it has led to {self.watch.seen}")
            if taken > SLOW:
                raise Found(f"it has taken {taken:.1f} s")

    def run(self, seconds: float, seed: int) -> None:
        rng = random.Random(seed)
        self.warm_up()
        # Only pickles name things. Reading a date of PHP's opens the files of time zones.
        self.watch.armed = self.name in ("pickle", "tap")
        end = time.process_time() + seconds  # on a busy machine, too, that is so many inputs
        corpus = list(self.corpus)
        while time.process_time() < end:
            for _ in range(50):
                data = mutated(rng, corpus, TOKENS[self.name])
                try:
                    answer = self.feed(data)
                except MemoryError:
                    continue
                except Exception as exc:
                    self.fail(data, exc)
                key = re.sub(r"[0-9]+", "", str(answer))[:80]
                if key not in self.answers and len(self.answers) < 2000:
                    self.answers.add(key)
                    if len(data) < SIZE:
                        corpus.append(data)
        self.watch.armed = False

    def fail(self, data: bytes, exc: Exception) -> NoReturn:
        kind = type(exc)

        def fails(some: List[int]) -> bool:
            try:
                self.feed(bytes(some))
            except Exception as again:
                return type(again) is kind
            return False

        few = bytes(shrink(list(data), fails, 10))
        self.watch.armed = False
        text = "".join(traceback.format_exception(kind, exc, exc.__traceback__)[-12:])
        sys.exit(f"{self.name}: {text}\n{data!r}\nis enough: {few!r}")


def run_with_coverage(runner: Runner, seconds: float, seed: int) -> None:
    """Let atheris choose the inputs; it ends the process."""
    import atheris  # type: ignore[import-not-found]

    runner.warm_up()
    runner.watch.armed = runner.name == "pickle"
    folder = tempfile.mkdtemp(prefix="stream-ipc-corpus-")
    for index, data in enumerate(runner.corpus):
        pathlib.Path(folder, str(index)).write_bytes(data)

    def one(data: bytes) -> None:
        try:
            runner.feed(data)
        except MemoryError:
            pass

    for name, module in tuple(sys.modules.items()):
        if name.startswith("stream_ipc."):
            for scope in (module, *filter(inspect.isclass, vars(module).values())):
                for function in tuple(vars(scope).values()):
                    if inspect.isfunction(function) and function.__module__ == name:
                        atheris.instrument_func(function)
    options = [f"-max_total_time={int(seconds)}", f"-seed={seed or 1}", f"-max_len={SIZE}", "-rss_limit_mb=0", folder]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--coverage", action="store_true")
    options = parser.parse_args()
    print(f"STREAM_IPC_SEED={options.seed}", flush=True)
    watch = Watch()
    for name in options.targets or TARGETS:
        runner = Runner(name, watch)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        if options.coverage:
            run_with_coverage(runner, options.seconds, options.seed)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        runner.run(options.seconds, options.seed)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        if name != "pickle" and grown > 100:  # what a pickle may ask for is in the README
            sys.exit(f"{name}: {grown} MiB more than before")
        print(f"{name}: {runner.count} inputs, {len(runner.answers)} answers, slowest {runner.slowest:.3f} s", flush=True)


if __name__ == "__main__":
    main()
