"""``python3 -m stream_ipc tap`` and ``decode``: what they show, and that nobody notices them."""

import collections
import contextlib
import datetime
import decimal
import enum
import fcntl
import hashlib
import json
import os
import pickle
import pty
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from stream_ipc import (
    ErrorMessage,
    IpcPeer,
    JsonMessageSerializer,
    LogMessage,
    Message,
    PhpMessageSerializer,
    PickleMessageSerializer,
    RemoteError,
    RequestEnvelope,
    ResponseEnvelope,
    StreamClosedError,
    register_type,
)
from stream_ipc.tap.files import Log
from stream_ipc.tap.payloads import look
from stream_ipc.tap.relay import Direction, Watcher
from stream_ipc.tap.report import Report

from .helpers import PATIENCE, frame, seeds

ROOT = Path(__file__).resolve().parent.parent
CHILD = str(Path(__file__).resolve().parent / "tap_child.py")

@register_type
class Colour(enum.Enum):
    RED = "red"


@register_type
@dataclass
class Point:
    x: int
    y: Any


@dataclass
class Job(Message, wire_name="App\\Job"):
    name: str
    size: int = 5
    point: Any = None
    more: Any = None


class List(list):
    pass


FORMATS = {
    "pickle": PickleMessageSerializer(),
    "plain pickle": PickleMessageSerializer(unsafe=True),
    "json": JsonMessageSerializer(),
    "php": PhpMessageSerializer(),
}
NAMES = {name: f"{__name__}.Job" if name == "plain pickle" else "App\\Job" for name in FORMATS}


# -- what a payload says


@pytest.mark.parametrize("name", FORMATS)
def test_fields(name):
    serializer = FORMATS[name]
    payload = serializer.serialize(Job("a\n", point=[1, 2.5, None], more={"k": True}))
    content = look(payload)
    assert content == (
        "notification",
        "",
        NAMES[name],
        NAMES[name] + "(name='a\\n', size=5, point=[1, 2.5, None], more={'k': True})",
    )


@pytest.mark.parametrize("name", FORMATS)
def test_envelopes(name):
    serializer = FORMATS[name]
    for kind, message in (
        ("request", RequestEnvelope("1.2", Job("x"))),
        ("response", ResponseEnvelope("1.2", Job("x"))),
    ):
        payload = serializer.serialize(message)
        content = look(payload)
        assert content[:3] == (kind, "1.2", NAMES[name])
        assert content.view == NAMES[name] + "(name='x', size=5, point=None, more=None)"


def test_a_pickle_of_the_standard_library():
    payload = pickle.dumps((1, "1.2", "App\\Job\0name\0more", ("x", {"k": [1, (2, "x")], "x": b"y"})), 5)
    assert pickle.FRAME in payload and pickle.MEMOIZE in payload
    view = "App\\Job(name='x', more={'k': [1, (2, 'x')], 'x': b'y'})"
    assert look(payload) == ("request", "1.2", "App\\Job", view)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_plain_pickle_of_any_protocol(protocol):
    payload = pickle.dumps(RequestEnvelope("1.2", Job("x", point=[1, 2])), protocol)
    view = f"{__name__}.Job(name='x', size=5, point=[1, 2], more=None)"
    assert look(payload) == ("request", "1.2", f"{__name__}.Job", view)


def test_nested_objects_and_enums():
    job = Job("x", point=Point(1, Colour.RED), more=Point(2, [Point(3, None)]))
    for name, member in (("pickle", ".RED"), ("php", "::RED"), ("json", "(name='RED', value='red')")):
        payload = FORMATS[name].serialize(job)
        view = look(payload).view
        assert f"point=Point(x=1, y=Colour{member})" in view
        assert "more=Point(x=2, y=[Point(x=3, y=None)])" in view


def test_values_of_the_standard_library():
    job = Job("x", point=[datetime.date(2020, 1, 2), collections.deque([1], 5)], more=decimal.Decimal("1.50"))
    view = look(FORMATS["pickle"].serialize(job)).view
    assert "point=[date(2020, 1, 2), deque([1], 5)], more=Decimal('1.50'))" in view
    view = look(FORMATS["plain pickle"].serialize(Job("x", point=[collections.OrderedDict(a=1), List([2]), len]))).view
    assert "point=[OrderedDict(a=1), List(2), builtins.len]" in view


@pytest.mark.parametrize("name", FORMATS)
def test_long_values_are_shortened(name):
    job = Job("x" * 5000, point=list(range(5000)), more=Point(1, "y" * 10**6))
    payload = FORMATS[name].serialize(job)
    view = look(payload).view
    assert "(5000 characters)" in view
    assert len(view) < 500
    name = "Long" * 45
    payload = pickle.dumps((0, None, f"{name}\0field", (list(range(100)),)), 5)
    assert look(payload).view.startswith(f"{name}(field=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, ")


def test_names_and_ids_cannot_write_on_the_screen():
    payload = pickle.dumps((1, "7\x1b[2J\n8", "a\x1b]0;b\x07\r\nc\0d\x1b", ("e\x1b",)), 5)
    content = look(payload)
    assert content == ("request", "7\\x1b[2J\\n8", "a\\x1b]0;b\\x07\\r\\nc", "a\\x1b]0;b\\x07\\r\\nc(d\\x1b='e\\x1b')")
    for text in (b'{"__class":"A\\u001b\\n","b\\u001b":1}', b'O:3:"A\x1b\n":1:{s:2:"b\x1b";i:1;}', b"\x1b\n"):
        assert "".join(look(text)).isprintable()


def test_bytes_are_shortened():
    view = look(PickleMessageSerializer().serialize(Job("x", point=b"\xff" * 10**6))).view
    assert re.search(r"point=b'(\\xff)+\.\.\.' \(1000000 bytes\)", view)


@pytest.mark.parametrize("name", FORMATS)
def test_no_beginning_is_taken_for_the_whole(name):
    job = Job("é" * 20, point=Point(1, [Point(2, {"k": "v"})]), more={"a": (1, 2), "b": None, "c": Colour.RED})
    payload = FORMATS[name].serialize(RequestEnvelope("12.34", job))
    for end in range(len(payload)):
        assert look(payload[:end]).kind == "unreadable"
    assert look(payload)[:3] == ("request", "12.34", NAMES[name])


@pytest.mark.matrix
@pytest.mark.parametrize("name", FORMATS)
def test_mutations(name):
    format = name.split()[-1]
    job = Job("text", point=Point(1, [Point(2, {"k": "v"})] * 3), more={"a": [1, 2], "b": 1e300, "c": Colour.RED})
    payload = FORMATS[name].serialize(RequestEnvelope("12.34", job))
    for seed in seeds(1):
        rng = random.Random(seed)
        for _ in range(3000):
            data = bytearray(payload)
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            cut = rng.randrange(len(data) + 1)
            content = look(bytes(data[:cut]), rng.choice(["", format]))
            assert content.kind in ("request", "response", "notification", "unreadable")
            assert len(content.view) < 2000


def test_garbage():
    for seed in seeds(1):
        rng = random.Random(seed)
        for _ in range(3000):
            data = bytes([rng.choice(b'\x80\x05\x95(}]){sutK\x8c.e0N\x88{}[]",:0Oaisd;x\xff')]) + os.urandom(
                rng.randrange(200)
            )
            assert look(data, rng.choice(["", "pickle", "json", "php"])).view != ""


BROKEN_OFF = "EOFError" if sys.version_info >= (3, 15) else "UnpicklingError: pickle exhausted before end of frame"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "php: payload is not in PHP's format: an unknown kind of value at byte 0; begins with b''"),
        (b"a:1:{", "php: payload is not in PHP's format: an array or object that announces more items than fit at byte"),
        (b'a:1:{i:0;s:2:"abc";}', "php: payload is not in PHP's format: a string whose length is not what it says at"),
        (b"a:1:{i:0;N;i:1;N;}", "php: payload is not in PHP's format: an array or object that goes on after its last item"),
        (b"a:0:{}N;", "php: payload is not in PHP's format: something after the value at byte 6"),
        (b'{"a":1 "b":2}', "json: JSONDecodeError: Expecting ',' delimiter: line 1 column 8 (char 7)"),
        (b'{"a":1} {}', "json: JSONDecodeError: Extra data"),
        (b"{}", "json: {} is no object"),
        (b"\x80\x05\xff", "pickle: KeyError: 255"),
        (pickle.dumps("x" * 50, 5)[:30], "pickle: " + BROKEN_OFF),
        (b"\x80\x05Nrrest.", "pickle: None is no object"),  # nothing is reserved for as many objects as this speaks of
        (b"\x80\x05\x96" + bytes([255] * 7) + b"\0abc.", "pickle: EOFError"),
        (pickle.dumps("x", 5), "pickle: 'x' is no object"),
        (pickle.dumps((0, None, "A\0b\0c", (1,)), 5), "pickle: ValueError: zip() argument 2 is shorter"),
    ],
)
def test_what_is_unreadable_says_why(payload, reason):
    content = look(payload)
    assert content[:3] == ("unreadable", "", "")
    assert content.view.startswith(f"not a message in {reason}")


def test_nothing_that_a_pickle_names_is_called(tmp_path):
    mark = tmp_path / "called"

    class Bad:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    payload = pickle.dumps(Bad(), 5)
    assert "posix.system('touch" in look(payload).view
    assert not mark.exists()


def test_what_is_shared_again_and_again_stays_short():
    value: Any = ["x"]
    for _ in range(60):
        value = [value, value]
    loop: Any = []
    loop.append(loop)
    for content in (value, loop):
        payload = pickle.dumps((0, None, "Name", {"field": content}), 5)
        begin = time.process_time()
        assert len(look(payload).view) < 500
        assert time.process_time() - begin < 1


def test_references_of_php():
    assert look(b'O:1:"A":2:{s:1:"a";O:1:"B":1:{s:1:"b";i:1;}s:1:"c";r:2;}').view == "A(a=B(b=1), c=B(b=1))"
    assert "is to what it is part of" in look(b'O:1:"A":1:{s:1:"a";r:1;}').view


def test_huge_numbers_and_deep_json():
    payload = pickle.dumps((0, None, "Name", {"field": 1 << 100000}), 5)
    assert "field=<int of 100001 bits>" in look(payload).view
    text = b'{"__class":"A","n":' + b"9" * 4000 + b"}"
    assert look(text).view == "A(n=" + "9" * 200 + "...)"
    deep = b"[" * 4000
    assert look(deep).kind == "unreadable"


def hostile_pickles():
    """Beginnings of pickles which are as long as what is looked at, and cheap to send."""
    opening = b"\x80\x05"
    pair = b"}\x8c\x01aK\x01s"
    build = b"\x8c\x20stream_ipc.serializers.pickle\x00\x00\x00\x8c\x05build\x93"
    many = b"K\x01" * 1000
    fields = b"X" + (1500).to_bytes(4, "little") + b"a\0" * 750
    yield opening + pair + b"2b" * 3000  # a state that is its own object
    yield opening + b"c__main__\nA\n\x94" + pair + b"\x94" + b"h\x00h\x01b" * 3000
    yield opening + b"c__main__\nA\n\x94(" + many + b"t\x94" + b"h\x00h\x01R" * 3000  # a call of many, many times
    yield opening + build + b"\x94(" + fields + many + b"t\x85\x94" + b"h\x00h\x01R" * 3000
    yield opening + b"(" * 5000
    yield opening + many + b"(" * 5000
    yield opening + b"]" * 5000
    yield opening + b")" + b"\x85" * 5000
    yield opening + b"(" + b"]\x94" + b"h\x00h\x00\x86\x94" * 3000
    yield opening + b"}" * 2500 + b"N" * 2500
    yield opening + b"L" + b"9" * 5000
    yield opening + b"\x8b" + (4000).to_bytes(4, "little") + b"\xff" * 5000
    yield opening + b"\x8d" + b"\xff" * 5000
    yield opening + b"\x96" + (1 << 62).to_bytes(8, "little") + b"x" * 5000
    yield b"c" + b"a" * 5000


def hostile_texts():
    yield from (
        b"{" * 5000,
        b'{"a":' * 1000,
        b'"' + b'\\"' * 2500,
        b'["' + b'\\"' * 2500,
        b"[" + b"a" * 5000 + b"!",
        b'["' + b"\\u12" * 1000,
        b'{"a":"' + b"\\" * 5000,
        b"[" + b"9" * 5000,
        b'[",' * 1700,
        b"[" + b" ," * 2500,
        b"a:9:{i:0;" * 600,
        b'O:1:"a":1000000000:{' * 250,
        b"a:9999999999:{" + b"i:0;N;" * 1000,
        b's:9999999999:"' + b"x" * 5000,
        b'O:1:"' + b"a" * 5000,
        b"d:" + b"9" * 5000,
        b"i:" + b"9" * 5000,
    )


@pytest.mark.parametrize("data", [*hostile_pickles(), *hostile_texts()], ids=lambda data: ascii(data[:30]))
def test_odd_payloads_take_little_time(data):
    for payload in (data, data + b"."):
        begin = time.process_time()
        content = look(payload)
        assert time.process_time() - begin < 0.5
        assert len("".join(content)) < 2000


# -- frames


def reported(pieces):
    """Return the lines about a captured stream, and whether it ends with a whole frame."""
    lines = []
    report = Report(lines.append, ("--",))
    for piece in pieces:
        report.feed("--", piece)
    return lines, report.finish()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 100000])
def test_frames_are_the_same_however_they_are_cut(size):
    payloads = [b"abc", b"", b"\xf3\x4a\x9d\xe2" * 3, b"y" * 5000]
    stream = b"".join(map(frame, payloads))
    lines, is_whole = reported([stream[at : at + size] for at in range(0, len(stream), size)])
    assert is_whole
    assert [line.split()[2:5] for line in lines[:-1]] == [["unreadable", str(len(data)), "B"] for data in payloads]
    assert lines[-1] == f"-- {len(stream)} bytes: 4 unreadable\n"


def test_junk_is_shown_between_frames():
    lines, is_whole = reported([b"text\xf3" + frame(b"abc") + b"\xf3\x4a" + frame(b"") + b"end\xf3\x4a\x9d"])
    assert is_whole
    junk = [line.split("  ")[-1] for line in lines if " junk " in line and "B" in line]
    assert junk == ["'text\\\\xf3'\n", "'\\\\xf3J'\n", "'end'\n", "'\\\\xf3J\\\\x9d'\n"]
    assert lines[-1] == "-- 32 bytes: 4 junk, 2 unreadable\n"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (frame(b"abcdef")[:-2], "in the middle of a frame (4 of 6 bytes had arrived)"),
        (frame(b"abcdef")[:6], "in the middle of a frame's header (6 of 8 bytes had arrived)"),
    ],
)
def test_what_broke_off_is_told(data, text):
    lines, is_whole = reported([data])
    assert not is_whole
    assert f"the stream ended {text}\n" in lines[0]


# -- lines


def conversation(coloured=False):
    """The lines of a short conversation."""
    serializer = PickleMessageSerializer()
    lines = []
    report = Report(lines.append, ("->", "<-"), coloured=coloured)
    there, back = partial(report.feed, "->"), partial(report.feed, "<-")
    there(frame(serializer.serialize(RequestEnvelope("1", Job("a")))))
    there(frame(serializer.serialize(RequestEnvelope("2", Job("b")))))
    back(frame(serializer.serialize(RequestEnvelope("1", Job("c")))))  # its own, of the same id
    report.now = report.time = 0.25
    back(b"hello" + frame(serializer.serialize(ResponseEnvelope("1", Job("d")))))
    back(frame(serializer.serialize(LogMessage("note"))))
    back(frame(b"rubbish") + frame(serializer.serialize(ResponseEnvelope("9", ErrorMessage("no")))))
    return lines, report


def test_lines():
    lines, report = conversation()
    job = "(name='{}', size=5, point=None, more=None)"
    size = len(PickleMessageSerializer().serialize(RequestEnvelope("1", Job("a"))))
    assert [line.split(None, 3) for line in lines[:3]] == [
        ["0.000000", "->", "request", f"1                {size} B  App\\Job" + job.format("a") + "\n"],
        ["0.000000", "->", "request", f"2                {size} B  App\\Job" + job.format("b") + "\n"],
        ["0.000000", "<-", "request", f"1                {size} B  App\\Job" + job.format("c") + "\n"],
    ]
    assert lines[3].split() == ["0.250000", "<-", "junk", "5", "B", "'hello'"]
    assert lines[4].split()[:8] == ["0.250000", "<-", "response", "1", "250.0", "ms", str(size), "B"]
    assert lines[5].split()[:3] == ["0.250000", "<-", "notification"]
    assert "unreadable" in lines[6] and "rubbish" in lines[6]
    assert lines[7].split()[2:4] == ["response", "9"]  # nobody had asked: no latency
    assert lines[7].split()[4:6] == [
        str(len(PickleMessageSerializer().serialize(ResponseEnvelope("9", ErrorMessage("no"))))),
        "B",
    ]
    assert len({line.index("App\\Job") for line in (*lines[:3], lines[4])}) == 1  # columns


def test_summary():
    lines, report = conversation()
    size = sum(int(line.split(" B ")[0].split()[-1]) + (0 if "junk" in line else 8) for line in lines if "<-" in line)
    lines.clear()
    assert report.finish()
    assert "".join(lines).splitlines() == [
        "-> 142 bytes: 2 requests",
        f"<- {size} bytes: 1 request, 1 junk, 2 responses, 1 notification, 1 unreadable",
        "slowest requests:",
        "  250.0 ms  1  App\\Job",
        "requests without an answer: 2",
        "  since 0.000000  2  App\\Job",
        "  since 0.000000  1  App\\Job",
    ]


def test_colours():
    plain, _ = conversation()
    coloured, _ = conversation(coloured=True)
    assert not any("\033" in line for line in plain)
    assert all("\033[" in line for line in coloured)
    assert [re.sub("\033\\[[0-9]+m", "", line) for line in coloured] == plain
    assert "\033[31m" in coloured[7]  # a response that is an error


# -- between a parent and a worker


def tap_command(*arguments, options=(), code=None):
    start = ["-m", "stream_ipc"] if code is None else ["-c", code]
    return [sys.executable, "-S", *start, "tap", *options, "--", sys.executable, "-S", CHILD, *map(str, arguments)]


def tapped(*arguments, stderr=subprocess.PIPE, **options):
    return subprocess.Popen(
        tap_command(*arguments, **options), cwd=str(ROOT), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
    )


@pytest.mark.matrix
def test_every_byte_passes_unchanged(tmp_path):
    for seed in seeds(1):
        rng = random.Random(seed)
        data = b""
        while len(data) < 2_500_000:
            size = rng.choice([0, 5, 100, 5000, 70_000, 2_000_000])
            data += rng.choice([frame(os.urandom(size)), os.urandom(size % 1000), b"\xf3\x4a\x9d\xe2", b"\xf3\x4a"])
        with tapped("echo", options=["--log", tmp_path / "log"]) as process:
            back = process.communicate(data, timeout=50)[0]
        assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
        assert process.returncode == 0


def test_bytes_pass_at_once(tmp_path):
    with tapped("echo", options=["--log", tmp_path / "log"]) as process:
        for size in (1, 3, 20, 5000, 100_000):
            for data in (os.urandom(size), frame(b"z" * size)[: size + 4]):  # the frame is not even complete
                process.stdin.write(data)
                process.stdin.flush()
                back = b""
                while len(back) < len(data):
                    back += os.read(process.stdout.fileno(), len(data) - len(back))
                assert back == data
        process.stdin.close()
        assert process.wait(20) == 0


def test_a_parent_and_a_worker_that_it_knows_nothing_of(tmp_path):
    log = tmp_path / "log"
    # The tap runs where the modules of the two cannot be imported.
    tap = [
        sys.executable,
        "-c",
        "import os, sys; os.chdir('/'); from stream_ipc.__main__ import main; sys.exit(main())",
    ]
    worker = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from examples.messages import *; from stream_ipc import *\n"
        "os.write(1, b'before\\n')\n"
        "session = IpcPeer().create_stdio_session()\n"
        "@session.on_request\n"
        "def work(request: TaskRequest):\n"
        "    if not request.job: raise ValueError('empty')\n"
        "    session.notify(LogMessage('working'))\n"
        "    return TaskResponse(request.job.upper())\n"
        "while session.is_open: session.tick(None)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    sys.path.insert(0, str(ROOT))
    try:
        from examples.messages import TaskRequest, TaskResponse
    finally:
        sys.path.remove(str(ROOT))
    with IpcPeer() as peer:
        command = [*tap, "tap", "--log", str(log), "--", sys.executable, "-c", worker, str(ROOT)]
        session = peer.create_command_session(command, env=env)
        assert session.request(TaskRequest("a"), expect=TaskResponse).wait().result == "A"
        large = session.request(TaskRequest("b" * 300_000), expect=TaskResponse).wait()
        assert large.result == "B" * 300_000
        with pytest.raises(RemoteError, match="empty"):
            session.request(TaskRequest("")).wait()
    assert session.process.returncode == 0
    text = log.read_text(encoding="utf-8")
    assert re.search(r"<- junk +7 B  'before\\n'\n", text)
    assert re.search(r"-> request +\S+ +\d+ B  examples\.messages\.TaskRequest\(job='a'\)\n", text)
    assert re.search(
        r"<- notification +\d+ B  StreamIpc\\Message\\LogMessage\(message='working', level='info'\)\n", text
    )
    assert re.search(
        r"<- response +\S+ +[0-9.]+ (us|ms|s) +\d+ B  examples\.messages\.TaskResponse\(result='A'\)\n", text
    )
    assert re.search(r"TaskRequest\(job='bbbb+\.\.\.' \(300000 characters\)\)\n", text)
    assert "ErrorMessage(message='Error in dispatch" in text
    assert "slowest requests:\n" in text
    assert "exited with status 0\n" in text
    assert "\033" not in text


def test_lines_stand_in_the_order_of_cause_and_effect(tmp_path):
    log = tmp_path / "log"
    data = frame(b"x" * 50)
    with tapped("echo", options=["--log", log]) as process:
        for _ in range(300):
            process.stdin.write(data)
            process.stdin.flush()
            assert process.stdout.read(len(data)) == data
        process.stdin.close()
        assert process.wait(20) == 0
    lines = log.read_text(encoding="utf-8").splitlines()[1:]
    assert [line.split()[2] for line in lines[:600]] == ["->", "<-"] * 300
    times = [float(line.split()[1]) for line in lines[:600]]
    assert times == sorted(times)


def test_lines_go_to_stderr_by_default():
    with tapped("echo") as process:
        out, err = process.communicate(frame(b"x"), timeout=20)
    assert out == frame(b"x")
    assert err.count(b"unreadable") == 4  # two lines, and twice in the summary


def test_the_exit_status_is_passed_on():
    with tapped("status") as process:
        process.communicate(b"", timeout=20)
    assert process.returncode == 7


@pytest.mark.matrix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGINT])
def test_the_signal_that_has_killed_the_worker_is_passed_on(number):
    with tapped("die", int(number)) as process:
        out, err = process.communicate(timeout=20)  # stdin stays open until then
    assert out == b"last words"
    assert process.returncode == -number
    assert f"was killed by signal {int(number)}".encode() in err


def test_a_worker_that_dies_while_the_parent_says_nothing(tmp_path):
    with IpcPeer() as peer:
        session = peer.create_command_session(
            tap_command("die", 9, options=["--log", str(tmp_path / "log")]), cwd=str(ROOT)
        )
        with pytest.raises(StreamClosedError, match="SIGKILL"):
            session.request(Job("x"), timeout=PATIENCE).wait()


def test_a_signal_for_the_tap_is_the_workers():
    with tapped("wait") as process:
        assert process.stdout.read(5) == b"ready"
        process.terminate()
        assert process.wait(20) == 9


SHORT_GRACE = (
    "import sys; from stream_ipc.tap import relay; relay.GRACE = 0.2\n"
    "from stream_ipc.__main__ import main; sys.exit(main())"
)


@pytest.fixture
def no_ignored_hangup():
    """Children inherit what is ignored, and nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.slow
def test_a_worker_that_ignores_the_signal_is_killed(number, no_ignored_hangup):
    with tapped("hang", code=SHORT_GRACE) as process:
        assert len(process.stdout.read()) == 10  # its pid
        process.send_signal(number)
        assert process.wait(20) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is dead")
def test_a_worker_that_hangs_does_not_outlive_the_tap():
    with tapped("hang") as process:
        worker = int(process.stdout.read())
        process.kill()
        assert process.wait(20) == -signal.SIGKILL
    end = time.monotonic() + PATIENCE
    while not os.waitid(os.P_PID, worker, os.WEXITED | os.WNOHANG | os.WNOWAIT):  # adopted
        assert time.monotonic() < end, "the worker lives on"
        time.sleep(0.01)
    assert os.waitpid(worker, 0)[1] == signal.SIGKILL


@pytest.mark.slow
def test_signals_that_are_ignored_stay_ignored():
    start = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", start, *tap_command("echo", options=["--log", os.devnull], code=SHORT_GRACE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    os.write(process.stdin.fileno(), b"1")
    assert os.read(process.stdout.fileno(), 10) == b"1"  # both are up
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)  # far longer than the grace
    assert process.communicate(b"2345", timeout=20) == (b"2345", None)
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not tell where a signal comes from")
@pytest.mark.slow
def test_ctrl_c_reaches_the_worker_once_and_kills_nothing():
    pid, terminal = pty.fork()
    if not pid:
        tap = tap_command("interrupted", options=["--log", os.devnull], code=SHORT_GRACE)
        os.execv(tap[0], tap)
    data = b""
    while not data.endswith(b"ready"):
        data += os.read(terminal, 100)
    os.write(terminal, b"\x03")
    while b"interrupted" not in data:
        data += os.read(terminal, 100)
    time.sleep(0.6)  # far longer than the grace
    os.write(terminal, b"abc\n")
    while data.count(b"abc") < 2:  # once by the terminal
        data += os.read(terminal, 100)
    assert data.count(b"interrupted") == 1
    os.write(terminal, b"\x04")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_the_end_of_the_parents_stream_is_passed_on():
    with tapped("swallow") as process:
        out = process.communicate(b"12345", timeout=20)[0]
    assert (out, process.returncode) == (b"5", 0)


def test_a_worker_that_closes_its_stdout_lives_on():
    with tapped("close-stdout") as process:
        assert process.stdout.read() == b"bye"  # to the end
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(20) == 4


def test_a_worker_that_closes_its_stdin():
    with tapped("close-stdin") as process:
        assert process.stdout.read(6) == b"closed"
        with pytest.raises(BrokenPipeError):
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                os.write(process.stdin.fileno(), b"x")
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
        process.stdin.close()


def test_a_parent_that_no_longer_reads():
    with tapped("echo", stderr=subprocess.DEVNULL) as process:
        process.stdout.close()
        with pytest.raises(BrokenPipeError):  # the worker has met the end of its stdout, and has died of it
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                os.write(process.stdin.fileno(), b"x" * 1000)
        process.stdin.close()
        assert process.wait(20) == 1


def test_a_grandchild_that_holds_the_pipes():
    read, write = os.pipe()
    os.set_inheritable(read, True)
    command = tap_command("grandchild", read, options=["--log", os.devnull])
    process = subprocess.Popen(command, cwd=str(ROOT), stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
    try:
        assert process.wait(20) == 3
    finally:
        os.write(write, b"x")
        os.close(read)
        os.close(write)
    out = process.stdout.read()
    process.stdout.close()
    process.stdin.close()
    assert re.fullmatch(rb"before \d+", out)


class Late(FileIO):
    """A file whose reader gets what it has read when a gate opens."""

    gate = threading.Event()

    def read(self, size=-1):
        data = super().read(size)
        self.gate.wait(PATIENCE)
        return data


def test_what_was_read_is_passed_on_before_a_tap_ends():
    (read, write), (back, target) = os.pipe(), os.pipe()
    os.write(write, b"last words")
    watcher = Watcher(Report(lambda text: None, ("->", "<-")), Log(None), None)
    direction = Direction(Late(read), FileIO(target, "w"), lambda data: None, watcher)
    direction.start()
    poller = select.poll()
    poller.register(read, select.POLLIN)
    while poller.poll(0):
        pass  # until it has read
    drained = threading.Thread(target=direction.drain)
    drained.start()
    drained.join(0.25)  # longer than a worker's pipe is quiet before it is left
    assert drained.is_alive()
    Late.gate.set()
    assert os.read(back, 100) == b"last words"
    drained.join(PATIENCE)
    assert not drained.is_alive()
    os.close(write)
    direction.join(PATIENCE)
    os.close(back)


# -- files that several taps write to


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--log", "--trace"])
def test_a_pipe_without_a_reader_is_refused_at_once(option, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with tapped("echo", options=[option, tmp_path / "fifo"]) as process:
        try:
            err = process.communicate(timeout=20)[1]
        finally:
            process.kill()
    assert process.returncode == 2
    assert f"the {option[2:]} cannot be written: ".encode() in err


def test_a_log_may_be_a_pipe(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    with tapped("echo", options=["--log", fifo]) as process, open(reader, "rb") as log:
        assert poller.poll(PATIENCE * 1000)  # there is a writer
        first = log.readline()  # before anything is said
        assert process.communicate(b"no frame", timeout=20)[0] == b"no frame"
        rest = log.read()
    assert b"monotonic clock" in first
    assert rest.count(b"no frame") == 2
    assert b"exited with status 0" in rest


def test_a_signal_ends_a_tap_whose_log_is_full(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    try:
        while True:
            if not os.write(writer, b"x" * 1024):
                break
    except BlockingIOError:
        pass
    with tapped("wait", options=["--log", fifo]) as process:
        assert process.stdout.read(5) == b"ready"  # the log hinders nobody from saying something
        process.terminate()
        # How the worker has ended cannot be written either, but by then a signal is the tap's own.
        try:
            end = time.monotonic() + PATIENCE
            while process.poll() is None:
                assert time.monotonic() < end, "the tap lives on"
                process.terminate()
                time.sleep(0.05)
        finally:
            process.kill()
    os.close(reader)
    os.close(writer)


def test_several_taps_share_a_log(tmp_path):
    log = tmp_path / "log"
    data = frame(PickleMessageSerializer().serialize(Job("x")))
    pids = set()
    for count in (2, 1):  # a later run appends
        with contextlib.ExitStack() as stack:
            processes = [stack.enter_context(tapped("echo", options=["--log", log])) for _ in range(count)]
            for _ in range(100):
                for process in processes:
                    process.stdin.write(data)
                    process.stdin.flush()
                for process in processes:
                    assert process.stdout.read(len(data)) == data
            for process in processes:
                process.stdin.close()
                assert process.wait(20) == 0
    lines = log.read_text(encoding="utf-8").splitlines()
    pids = {line.split()[0] for line in lines}
    assert len(pids) == 3 and all(map(str.isdigit, pids))
    for pid in pids:
        own = [line for line in lines if line.startswith(f"{pid} ")]
        assert " -- began " in own[0] and "tap_child.py echo" in own[0]
        assert sum("notification" in line for line in own) == 200 + 2
        assert f"{pid} the worker (pid {pid}) exited with status 0" in own
    times = [float(found[1]) for found in re.finditer(r"^\d+ +(\d+\.\d{6}) ", "\n".join(lines), re.M)]
    assert len(times) == 3 * 201
    assert times == sorted(times)
    assert times[0] == 0 and 0 < times[-1] < 60


def test_a_log_that_is_older_than_the_machine_runs(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        f"1   0.000000 -- began   monotonic clock {time.monotonic() + 1e6:.6f}: x\n1 500.000000 -> x\n1 ->\n"
    )
    with tapped("echo", options=["--log", log]) as process:
        process.communicate(frame(b"x"), timeout=20)
    times = [float(line.split()[1]) for line in log.read_text().splitlines()[3:6]]
    assert 500 <= times[0] <= times[1] <= times[2] < 520


def test_the_workers_pid_in_a_files_name(tmp_path):
    with tapped("echo", options=["--log", tmp_path / "log.%p", "--trace", tmp_path / "trace.%p"]) as process:
        process.communicate(frame(b"x"), timeout=20)
    names = sorted(path.name for path in tmp_path.iterdir())
    pid = (tmp_path / names[0]).read_text().split()[0]
    assert names == [f"log.{pid}", f"trace.{pid}"]


def events_now(path):
    """The events of a trace that may be written to meanwhile: from the first ones on it is complete at any time."""
    with open(path, encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return json.loads(file.read() or "[]")


def events_of(path):
    """The events of a trace, which is checked against the format; without those that name things."""
    events = json.loads(path.read_text(encoding="ascii"))
    assert isinstance(events, list)
    names, tracks, open_, shown = {}, set(), {}, []
    for event in events:
        assert type(event["pid"]) is int and type(event["tid"]) is int and isinstance(event["args"], dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert type(event["args"]["name"]) is str
            if event["name"] == "process_name":
                names[event["pid"]] = event["args"]["name"]
            else:
                tracks.add((event["pid"], event["tid"]))
            continue
        assert (event["pid"], event["tid"]) in tracks and event["pid"] in names
        assert type(event["ts"]) is float and type(event["name"]) is str and type(event["cat"]) is str
        shown.append(event)
        if event["ph"] == "i":
            assert event["s"] == "t"
            continue
        key = (event["pid"], event["cat"], event["id"], event["name"])
        if event["ph"] == "b":
            assert key not in open_
            open_[key] = event["ts"]
        else:
            assert event["ph"] == "e" and event["ts"] >= open_.pop(key)
    assert not open_, "a span has no end"
    return shown


def traced(process, count=3):
    """Let requests and other things pass; the worker echoes, so each comes back as the worker's own request."""
    serializer = FORMATS["pickle"]
    data = b"junk" + frame(serializer.serialize(LogMessage("note"))) + frame(b"?")
    for number in range(count):
        data += frame(serializer.serialize(RequestEnvelope(f"1.{number}", Job("x"))))
    for number in range(count - 1):
        data += frame(serializer.serialize(ResponseEnvelope(f"1.{number}", Job("y"))))
    process.stdin.write(data)
    process.stdin.flush()
    assert process.stdout.read(len(data)) == data
    return data


def check_trace(events, count=3):
    by_kind = {}
    for event in events:
        by_kind.setdefault((event["ph"], event["name"]), []).append(event["args"])
    begun = by_kind["b", "App\\Job"]
    assert [args["id"] for args in begun if args["class"] == "App\\Job"] == [args["id"] for args in begun]
    assert len(begun) == 2 * count and all(args["size"] > 20 for args in begun)
    ended = by_kind["e", "App\\Job"]
    # The answers reach the worker before its own requests, which it has echoed, reach the parent.
    assert [args.get("error") for args in ended] == [None] * (count - 1) + ["no answer"] * (count + 1)
    assert all("name='y'" in args["message"] for args in ended[: count - 1])
    assert len(by_kind["i", "App\\Job"]) == count - 1
    assert [args["text"] for args in by_kind["i", "junk"]] == ["junk"] * 2
    assert [args["message"] for args in by_kind["i", "StreamIpc\\Message\\LogMessage"]] == [
        "StreamIpc\\Message\\LogMessage(message='note', level='info')"
    ] * 2
    assert len(by_kind["i", "unreadable"]) == 2


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["end", "SIGTERM", "SIGKILL of the worker"])
def test_trace(how, tmp_path):
    trace = tmp_path / "trace"
    with tapped("stderr", options=["--log", tmp_path / "log", "--trace", trace]) as process:
        traced(process)
        events = events_now(trace)
        if how == "SIGTERM":
            process.terminate()
        elif how != "end":
            os.kill(events[0]["pid"], signal.SIGKILL)
        if how != "end":
            process.wait(timeout=20)  # before communicate() closes its stdin, which would end the worker, too
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == {"end": 0, "SIGTERM": -15}.get(how, -9)
    events = events_of(trace)
    check_trace(events)
    texts = [event["args"]["text"] for event in events if event["name"] == "stderr"]
    assert "".join(texts) == ("a warning\nbye\n" if how == "end" else "a warning\n")
    assert stderr == "".join(texts).encode()


def test_two_taps_share_a_trace(tmp_path):
    trace = tmp_path / "trace"
    options = ["--log", tmp_path / "log", "--trace", trace]
    with tapped("echo", options=options) as one, tapped("echo", options=options) as two:
        for count, process in enumerate((one, two), 1):
            traced(process)
            while [event["ph"] for event in events_now(trace)].count("b") < 6 * count:  # bytes pass first
                time.sleep(0.01)
        one.kill()
        one.communicate(timeout=20)
        events_now(trace)
        two.communicate(timeout=20)
    events = json.loads(trace.read_text())
    pids = list(dict.fromkeys(event["pid"] for event in events))
    assert len(pids) == 2
    for pid in pids:
        own = [event for event in events if event["pid"] == pid]
        assert [event["ph"] for event in own].count("b") == 6
        assert own[0]["args"]["name"].startswith(f"worker {pid}: ")
    times = [event["ts"] for event in events if "ts" in event]
    assert max(times) - min(times) < 60e6  # of one clock


@pytest.mark.slow
def test_what_is_no_whole_trace_stays_as_it_is(tmp_path):
    trace = tmp_path / "trace"
    for content in (b'[\n{"name":"a","ph":"i"},\n{"name', b'[\n{"name":"a","ph":"i"}\n', b"[\n1\n]\n", b"[\n{"):
        trace.write_bytes(content)
        with tapped("echo", options=["--log", os.devnull, "--trace", trace]) as process:
            err = process.communicate(timeout=20)[1]
        assert process.returncode == 2
        assert b"the trace cannot be written: it is not empty, and not a trace that a tap has written" in err
        assert trace.read_bytes() == content


def test_a_full_disk_does_not_hurt_the_trace(tmp_path):
    trace = tmp_path / "trace"
    limit = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "sys.dont_write_bytecode = True  # it would be cut off, and stay so for the next program\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "from stream_ipc.__main__ import main; sys.exit(main())"
    )
    data = frame(FORMATS["pickle"].serialize(Job("x")))
    with tapped("echo", options=["--log", os.devnull, "--trace", trace], code=limit) as process:
        for _ in range(50):
            process.stdin.write(data)
            process.stdin.flush()
            assert process.stdout.read(len(data)) == data
        process.stdin.close()
        assert process.wait(20) == 0
    assert len(json.loads(trace.read_text())) > 4
    assert trace.stat().st_size <= 5000


def test_requests_that_overlap_and_repeat_an_id(tmp_path):
    trace = tmp_path / "trace"
    serializer = FORMATS["pickle"]
    data = frame(serializer.serialize(RequestEnvelope("1", Job("x")))) * 3
    with tapped("swallow", options=["--log", os.devnull, "--trace", trace]) as process:
        process.communicate(data, timeout=20)
    events = events_of(trace)
    assert [event["ph"] for event in events if event["ph"] in "be"] == list("bebebe")


@pytest.mark.slow
def test_no_command_and_one_that_does_not_exist():
    for arguments, status, text in (
        (["tap"], 2, "put it behind a --"),
        (["tap", "--"], 2, "put it behind a --"),
        (["tap", "--json", "--php", "--", "x"], 2, "not allowed with"),
        (["tap", "--log", "/nowhere/x", "--", "true"], 2, "the log cannot be written"),
        (["tap", "--trace", "/nowhere/x", "--", "true"], 2, "the trace cannot be written"),
        (["tap", "--trace", "README.rst", "--", "true"], 2, "not a trace that a tap has written"),
        (["tap", "--trace", "/dev/null", "--", "true"], 2, "not a regular file"),
        (["tap", "--", "/nowhere/x"], 127, "cannot start '/nowhere/x'"),
        (["tap", "--", "/"], 126, "cannot start '/'"),
        ([], 2, "tap | decode"),
        (["decode", "/nowhere/x"], 2, "/nowhere/x cannot be read"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "stream_ipc", *arguments], cwd=str(ROOT), capture_output=True, text=True, timeout=20
        )
        assert (done.returncode, done.stdout) == (status, "")
        assert text in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_terminal_gets_colours():
    master, slave = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    for variables, coloured in (
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ):
        process = subprocess.Popen(
            tap_command("echo"),
            cwd=str(ROOT),
            env={**env, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=slave,
        )
        process.communicate(frame(b"x"), timeout=20)
        assert (b"\033[31m" in os.read(master, 65536)) == coloured
    os.close(master)
    os.close(slave)


# -- a captured stream


def decoded(data, *options, file="-"):
    return subprocess.run(
        [sys.executable, "-m", "stream_ipc", "decode", *options, str(file)],
        cwd=str(ROOT),
        input=data,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=20,
    )


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["pickle", "json", "php"])
@pytest.mark.slow
def test_decode(name, tmp_path):
    serializer = FORMATS[name]
    data = frame(serializer.serialize(Job("a"))) + b"junk" + frame(serializer.serialize(RequestEnvelope("7", Job("b"))))
    (tmp_path / "stream").write_bytes(data)
    for options in ([], [f"--{name}"]):
        done = decoded(b"", *options, file=tmp_path / "stream")
        assert (done.returncode, done.stderr) == (0, b"")
        lines = done.stdout.decode().splitlines()
        assert len(lines) == 4
        assert lines[0].split()[1:3] == ["--", "notification"] and "App\\Job(name='a'" in lines[0]
        assert lines[1].endswith("'junk'")
        assert lines[2].split()[:4] == [str(len(data)), "--", "request", "7"]
        assert lines[3] == f"-- {len(data)} bytes: 1 notification, 1 junk, 1 request"
        assert decoded(data, *options).stdout == done.stdout  # from stdin
    other = "json" if name == "pickle" else "pickle"
    assert b"unreadable" in decoded(data, f"--{other}").stdout


def test_decode_of_half_a_frame():
    done = decoded(frame(b"abcdef")[:-1])
    assert done.returncode == 1
    assert b"the stream ended in the middle of a frame (5 of 6 bytes had arrived)" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="nothing is always full here")
def test_decode_onto_a_full_disk():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stream_ipc", "decode", "-"],
            cwd=str(ROOT), input=frame(b"x"), stdout=full, stderr=subprocess.PIPE, timeout=20,
        )  # fmt: skip
    assert done.returncode
    assert b"or its lines cannot be written: [Errno 28]" in done.stderr and b"Traceback" not in done.stderr


def test_decode_into_a_pipe_that_nobody_reads():
    process = subprocess.Popen(
        [sys.executable, "-m", "stream_ipc", "decode", "-"],
        cwd=str(ROOT),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.write(frame(b"x") * 10000)
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(20) == 1
