"""Any bytes into each decoder, for as long as one likes: ``STREAM_IPC_FUZZ_SECONDS=600``, for each; ``-s`` shows how many.

``fuzz.py`` has the inputs, and what must be true of them; here is that no input takes long.
"""

import contextlib
import gc
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest

from stream_ipc import (
    IpcError,
    JsonMessageSerializer,
    PhpMessageSerializer,
    PickleMessageSerializer,
    RequestEnvelope,
)
from stream_ipc.tap.payloads import look
from stream_ipc.tap.report import Report
from stream_ipc.wire.codec import MessageDecoder, TextDecoder
from tests.helpers import MAGIC, frame, seeds, set_large_pickle, span
from tests.messages import Ping, Pong

SECONDS = float(os.environ.get("STREAM_IPC_FUZZ_SECONDS", span(0.6)))
TARGETS = ["frames", "json", "php", "pickle", "tap"]


def fuzz(*arguments: str, seconds: float = SECONDS, code: str = "") -> "subprocess.CompletedProcess[str]":
    """Run it in a process of its own; ``code`` is run first."""
    (seed,) = seeds(1)
    start = ["-c", f"import sys; from tests import fuzz\n{code}\nfuzz.main()"] if code else ["-m", "tests.fuzz"]
    return subprocess.run(
        [sys.executable, *start, *arguments, "--seconds", str(seconds), "--seed", str(seed % (1 << 31))],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="backslashreplace",
        timeout=60 + 10 * seconds,
    )  # fmt: skip


@pytest.mark.timeout(10 * SECONDS + 120)
def test_any_bytes_are_dealt_with() -> None:
    done = fuzz()
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    counts = {name: int(count) for name, count in re.findall(r"^(\w+): ([0-9]+) inputs", done.stdout, re.M)}
    assert list(counts) == TARGETS and min(counts.values()) > 50


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install atheris")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.timeout(2 * SECONDS + 120)
def test_any_bytes_that_reach_new_code(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = fuzz(target, "--coverage", seconds=max(3, SECONDS))
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-4000:]
    found = re.search(r"Done ([0-9]+) runs", done.stdout)
    assert found is not None and int(found[1]) > 100


LOADS = """
import pickle
def loads(data):
    try:
        pickle.loads(data)
    except Exception:
        pass
"""


@pytest.mark.parametrize(
    ("target", "code", "text"),
    [
        ("pickle", LOADS + "fuzz.TARGETS['pickle'] = lambda data: loads(data)", r"it has led to \["),
        pytest.param(
            "json",
            "fuzz.TARGETS['json'] = lambda data: {}[data.count(b'[')] if data.count(b'[') == 7 else ()",
            "KeyError",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "frames",
            "fuzz.framed = lambda pieces, limit, direct=0: ([piece[:2] for piece in pieces], '')",
            "something else",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["pickle", "json", "frames"],
)  # fmt: skip
def test_what_is_wrong_is_found_and_made_short(target: str, code: str, text: str) -> None:
    done = fuzz(target, seconds=30, code=code)
    assert done.returncode == 1
    assert re.search(text, done.stdout) is not None, done.stdout
    assert target != "json" or re.search(r"is enough: b'\[{7}'$", done.stdout, re.M) is not None, done.stdout


# -- no input takes long for its size


JSON, PHP, PICKLE = JsonMessageSerializer(), PhpMessageSerializer(), PickleMessageSerializer()


def deserialize(serializer: Any) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        try:
            serializer.deserialize(data)
        except IpcError:
            pass

    return run


def unpickle(data: bytes) -> None:
    with set_large_pickle(0):  # whatever the size, in one way
        deserialize(PICKLE)(data)


def decode(size: int) -> Callable[[bytes], None]:
    """Return what decodes frames that come in pieces of a size."""

    def run(data: bytes) -> None:
        decoder = MessageDecoder(JSON, 1 << 30)
        for at in range(0, len(data), size):
            _, decoder.state = decoder.decode(data[at : at + size])
        decoder.finish()

    return run


def read_lines(size: int) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        decoder = TextDecoder(lambda text: None)
        for at in range(0, len(data), size):
            _, decoder.state = decoder.decode(data[at : at + size])
        decoder.finish()

    return run


def tap(format: str) -> Callable[[bytes], None]:
    return lambda data: (look(data, format), None)[1]


def report(data: bytes) -> None:
    lines = Report(lambda line: None, (">",))
    for at in range(0, len(data), 100):
        lines.feed(">", data[at : at + 100])
    lines.finish()


def json_value(value: str, times: int) -> bytes:
    return f'{{"__class":"tests.messages.Ping","value":[{",".join([value] * times)}]}}'.encode()


def php_value(value: str, times: int) -> bytes:
    items = "".join([f"i:{index};{value}" for index in range(times)])
    return f'O:19:"tests.messages.Ping":1:{{s:5:"value";a:{times}:{{{items}}}}}'.encode()



def looped(number: int) -> Any:
    loop: List[Any] = []
    loop += [(loop, number), Pong([number])]
    return loop


SHORT = 0.0004  # seconds that can be measured

SHAPES: Dict[str, Any] = {
    "json objects": (deserialize(JSON), lambda n: json_value('{"__class":"tests.messages.Pong","value":"x"}', n)),
    "json unknown objects": (deserialize(JSON), lambda n: json_value('{"__class":"None\\\\Such","value":{"a":1}}', n)),
    "json escapes": (deserialize(JSON), lambda n: json_value('"' + "\\u00e9\\ud83d\\ude00" * n + '"', 1)),
    "json backslashes": (deserialize(JSON), lambda n: json_value('"' + "\\\\" * n + '"', 1)),
    "json quotes": (deserialize(JSON), lambda n: json_value('"\\"[{"', n)),
    "json digits": (deserialize(JSON), lambda n: json_value("9" * n, 1)),
    "json long numbers": (deserialize(JSON), lambda n: json_value("1.5e-7", n) + json_value("123456789012345678901", n)),
    "json spaces": (deserialize(JSON), lambda n: b" " * n),
    "json broken": (deserialize(JSON), lambda n: json_value('{"a":[1', n)),
    "json an envelope that is broken": (
        deserialize(JSON),
        lambda n: JSON.serialize(RequestEnvelope("1", Ping(["a" * 10] * n)))[:-1],
    ),
    "json an id without end": (
        deserialize(JSON),
        lambda n: b'{"__class":"StreamIpc\\\\Envelope\\\\RequestEnvelope","id":"' + b"\\\\" * n,
    ),
    "php objects": (deserialize(PHP), lambda n: php_value('O:19:"tests.messages.Pong":1:{s:5:"value";i:5;}', n)),
    "php strings": (deserialize(PHP), lambda n: php_value('s:5:"\u00e9abc";', n)),
    "php a long string": (deserialize(PHP), lambda n: php_value(f's:{n}:"{"x" * n}";', 1)),
    "php references": (deserialize(PHP), lambda n: php_value("R:3;", n).replace(b"R:3", b"i:5", 1)),
    "php copies": (deserialize(PHP), lambda n: php_value("R:3;", n).replace(b"R:3;", b"a:2:{i:0;N;i:1;N;}", 1)),
    "php floats": (deserialize(PHP), lambda n: php_value("d:0.5E-7;", n)),
    "php digits": (deserialize(PHP), lambda n: php_value("d:" + "1" * n, 1)),
    "php digits behind a point": (deserialize(PHP), lambda n: php_value("d:1." + "1" * n + "e" + "1" * n, 1)),
    "php nulls": (deserialize(PHP), lambda n: php_value("N;", n)),
    "php broken": (deserialize(PHP), lambda n: php_value("a:1:{i:0;", n)),
    "php an envelope that is broken": (
        deserialize(PHP),
        lambda n: PHP.serialize(RequestEnvelope("1", Ping(["a" * 10] * n)))[:-1],
    ),
    "pickle objects": (unpickle, lambda n: PICKLE.serialize(Ping([Pong([i]) for i in range(n)]))),
    "pickle lists": (unpickle, lambda n: PICKLE.serialize(Ping([[str(i)] for i in range(n)]))),
    "pickle objects that share": (
        unpickle,
        lambda n: PICKLE.serialize(Ping([[shared, Pong(shared)] for shared in [[1, 2]] for _ in range(n)])),
    ),
    "pickle loops": (unpickle, lambda n: PICKLE.serialize(Ping([looped(i) for i in range(n)]))),
    "pickle keys": (unpickle, lambda n: PICKLE.serialize(Ping({(i, "a"): Pong(i) for i in range(n)}))),
    "pickle broken": (unpickle, lambda n: PICKLE.serialize(Ping([Pong([i]) for i in range(n)]))[:-1] + b"\xff"),
    "pickle text opcodes": (unpickle, lambda n: b"(" + b"I5\nS'a'\nV\\u0041\n" * n + b"l."),
    "pickle globals": (unpickle, lambda n: b"c\n" * n + b"."),
    "pickle marks": (unpickle, lambda n: b"(" * n + b"t" * n + b"."),
    "pickle views": (unpickle, lambda n: b"(" + b"\x96\1\0\0\0\0\0\0\0x\x98" * n + b"t."),
    "frames in one": (decode(1 << 30), lambda n: frame(JSON.serialize(Ping("x"))) * n),
    "frames in small pieces": (decode(3), lambda n: frame(JSON.serialize(Ping("x"))) * n),
    "frames: a large one": (decode(100), lambda n: frame(JSON.serialize(Ping("x" * 30 * n)))),
    "frames: almost magics": (decode(100), lambda n: MAGIC[:3] * n),
    "frames: magics": (decode(100), lambda n: MAGIC * n),
    "frames: junk that is no text": (decode(1), lambda n: b"\xe2\x82\xff" * n),
    "frames: junk between": (decode(10), lambda n: (b"junk" + frame(b"{}")) * n),
    "frames: empty ones": (decode(1000), lambda n: frame(b"") * n),
    "lines": (read_lines(7), lambda n: b"a line\r\n\n" * n),
    "lines: a long one": (read_lines(1000), lambda n: b"x" * 4000 * n),
    "tap frames": (report, lambda n: frame(JSON.serialize(Ping("x"))) * n),
    "tap large frames": (report, lambda n: frame(JSON.serialize(Ping("x" * 100 * n)))),
    "tap json": (tap("json"), lambda n: JSON.serialize(Ping([{"a": ["b"]}] * n))),
    "tap json brackets": (tap("json"), lambda n: b'{"a":' * n),
    "tap json quotes": (tap("json"), lambda n: b'"' * n),
    "tap json backslashes": (tap("json"), lambda n: b'["' + b"\\" * n),
    "tap php": (tap("php"), lambda n: PHP.serialize(Ping([{"a": ["b"]}] * n))),
    "tap php digits": (tap("php"), lambda n: b"d:" + b"1" * n),
    "tap pickle": (tap("pickle"), lambda n: PICKLE.serialize(Ping([{"a": ["b"]}] * n))),
    "tap pickle marks": (tap("pickle"), lambda n: b"\x80\x05" + b"(" * n),
    "tap pickle lists": (tap("pickle"), lambda n: b"\x80\x05" + b"](" * n + b"e" * n),
    "tap pickle copies": (tap("pickle"), lambda n: b"\x80\x05]\x94" + b"(h\0h\0e" * n + b"."),
    "tap pickle states": (tap("pickle"), lambda n: b"\x80\x05cx\ny\n)R\x94" + b"}b" * n + b"."),
}  # fmt: skip


@pytest.fixture
def no_collector() -> Iterator[None]:
    """The collector of garbage looks at everything that is alive again and again, which is not the decoder's fault."""
    gc.disable()
    yield
    gc.enable()


def seconds(function: Callable[[bytes], None], data: bytes) -> float:
    """Return how long it takes at least, of this processor."""
    best = 1e9
    for _ in range(3):
        start = time.process_time()
        function(data)
        best = min(best, time.process_time() - start)
    return best


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
def test_time_is_linear_in_the_size(shape: str, no_collector: None) -> None:
    function, make = SHAPES[shape]
    count = 25
    small = 0.0
    while small < SHORT and count < 5000:
        count *= 2
        small = seconds(function, make(count))
    factors: List[float] = []
    while len(factors) < 3 and min(factors, default=99) >= 24:
        # 8 if linear, 64 if quadratic.
        factors.append(seconds(function, make(8 * count)) / max(small, SHORT))
        small = seconds(function, make(count))
    print(shape, count, [round(factor, 1) for factor in factors])
    assert min(factors) < 24, factors


@pytest.mark.parametrize(("power", "found"), [(1, False), (2, True)])
def test_what_is_not_linear_is_found(power: int, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "seconds", lambda function, data: 1e-7 * len(data) ** power)
    monkeypatch.setitem(SHAPES, "made up", (id, bytes))
    with pytest.raises(AssertionError) if found else contextlib.nullcontext():
        test_time_is_linear_in_the_size("made up", None)
