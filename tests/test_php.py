"""With real PHP: the examples, sessions in both directions, and what PHP's own functions make of our payloads."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Union

import pytest

from stream_ipc import (
    ErrorMessage,
    IpcPeer,
    JsonMessageSerializer,
    LogMessage,
    Message,
    PhpMessageSerializer,
    RemoteError,
    RequestTimeoutError,
    Session,
    StreamClosedError,
)

from . import php_messages as php
from .helpers import WAIT, tick_until
from .php_messages import VECTORS, AnyMessage, ChildMessage, ComplexMessage, Point, TaskRequest, TypedMessage, same
from .test_serializer_json import ENCODE_OTHERWISE
from .test_serializer_php import random_value

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "tests" / "php"
PHP = shutil.which("php")
SERIALIZERS: Dict[str, Any] = {"php": PhpMessageSerializer, "json": JsonMessageSerializer}


def missing() -> str:
    """Why these tests cannot run here, or nothing."""
    if PHP is None:
        return "php is not installed (Debian's package is php-cli): no test ran against PHP itself"
    code = "echo implode(' ', array_diff(['json_encode', 'proc_open'], get_defined_functions()['internal']));"
    code += "echo ' ', PHP_VERSION;"
    done = subprocess.run([PHP, "-r", code], capture_output=True, text=True, timeout=50)
    functions, _, version = done.stdout.rpartition(" ")
    if done.returncode or functions:
        return f"{PHP} does not run or lacks functions: {functions or done.stderr[:200]}"
    if [int(part) for part in re.findall(r"\d+", version)[:2]] < [8, 1]:
        return f"PHP 8.1 is needed, and {PHP} is {version}"
    return ""


MISSING = missing()
with_php = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", *arguments],
        cwd=str(ROOT),
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=50,
    )


# --- the examples ---------------------------------------------------------------------------------------------

PHP_SLAVE = """\
  PHP wants to know: separator
  1 of 3 words done
  2 of 3 words done
  3 of 3 words done
  Result: STRESSED-NAïVE-DRAWER, done by PHP
  Word lengths: {'stressed': 8, 'naïve': 6, 'drawer': 6}
  An error: Error in dispatch: InvalidArgumentException: there is nothing to do
  Exit status of the slave: 0
"""
PYTHON_SLAVE = """\
  Python wants to know: separator
  1 of 3 words done
  2 of 3 words done
  3 of 3 words done
  Result: STRESSED-NAÏVE-DRAWER, done by Python
  Word lengths: {"stressed":8,"naïve":5,"drawer":6}
  An error: Error in dispatch: ValueError: there is nothing to do
  Exit status of the slave: 0
"""


@pytest.mark.matrix
@with_php
@pytest.mark.parametrize(
    ("name", "printed"), [("php_slave", PHP_SLAVE), ("php_master", PYTHON_SLAVE)], ids=["php_slave", "php_master"]
)
def test_example(name: str, printed: str) -> None:
    done = run(f"examples.{name}", PYTHONIOENCODING="utf-8")
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == f"In PHP's own format:\n{printed}In JSON:\n{printed}"


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["php_slave", "php_master"])
def test_example_without_php(name: str, tmp_path: Path) -> None:
    done = run(f"examples.{name}", PATH=str(tmp_path))
    assert (done.stdout, done.stderr) == ("This example needs PHP, and there is no php on the PATH.\n", "")
    assert done.returncode == 0


@pytest.mark.matrix
@pytest.mark.parametrize("format", ["php", "json"])
def test_python_slave_without_a_master_ends(format: str) -> None:
    done = run("examples.php_master", "slave", format)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@with_php
@pytest.mark.matrix
@pytest.mark.parametrize("format", ["php", "json"])
def test_php_slave_without_a_master_ends(format: str) -> None:
    assert PHP is not None
    done = subprocess.run(
        [PHP, str(ROOT / "examples" / "php" / "slave.php"), format],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=50,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


# --- payloads -------------------------------------------------------------------------------------------------


def again(format: str, payloads: List[bytes]) -> List[Union[bytes, str]]:
    """What PHP writes when it has read each of them, or what it has to say against it."""
    assert PHP is not None
    done = subprocess.run(
        [PHP, str(SCRIPTS / "again.php"), format],
        input="".join(f"{payload.hex()}\n" for payload in payloads),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    lines = done.stdout.splitlines()
    assert len(lines) == len(payloads)
    return [bytes.fromhex(line) if re.fullmatch("[0-9a-f]*", line) else line for line in lines]


def by_python(entry: Any, serializer: Any) -> bytes:
    """A vector's payload as it is when it has gone through Python."""
    data = bytes.fromhex(entry["payload_hex"])
    if entry["name"] == "any_cycle":  # which Python refuses to build
        return data
    if entry["name"] == "lazy":  # a property without a value; the default is for reading
        return bytes(serializer.serialize(php.build(entry["php_class"], entry["message"], lambda key: key)))
    return bytes(serializer.serialize(serializer.deserialize(data)))


@with_php
@pytest.mark.parametrize("kind", ["encode", "legacy_encode"])
def test_php_writes_the_same_as_python(kind: str) -> None:
    entries = [e for e in VECTORS[kind] if e["serializer"] == "native"]
    serializer = PhpMessageSerializer(namespace="StreamIpc" if kind == "encode" else "PhpStreamIpc")
    payloads = [by_python(entry, serializer) for entry in entries]
    assert len(payloads) > (80 if kind == "encode" else 3)
    for entry, sent, got in zip(entries, payloads, again("php", payloads)):  # noqa: B905
        assert got == sent, entry["name"]
        if entry["name"] not in ("any_php_references", "any_reference_then_shared"):  # R: is no matter of Python's
            assert sent == bytes.fromhex(entry["payload_hex"]), entry["name"]


@with_php
@pytest.mark.parametrize("kind", ["encode", "legacy_encode"])
def test_php_reads_the_json_of_python(kind: str) -> None:
    serializer = JsonMessageSerializer(namespace="StreamIpc" if kind == "encode" else "PhpStreamIpc")
    entries = [e for e in VECTORS[kind] if e["serializer"] == "json" and e["name"] not in ENCODE_OTHERWISE]
    assert len(entries) > (50 if kind == "encode" else 3)
    payloads = [serializer.serialize(php.build(e["php_class"], e["message"], str)) for e in entries]
    for entry, sent, got in zip(entries, payloads, again("json", payloads)):  # noqa: B905
        assert not isinstance(got, str), f"{entry['name']}: {got}"
        if not re.search(rb"\d[.e]", sent) and kind == "encode":
            assert got == sent, entry["name"]
        assert same(json.loads(got), json.loads(sent)), entry["name"]


@with_php
def test_random_payloads() -> None:
    seed = int(os.environ.get("STREAM_IPC_SEED", random.randrange(2**32)))
    print("STREAM_IPC_SEED =", seed)
    rng = random.Random(seed)
    serializer = PhpMessageSerializer()
    payloads = [serializer.serialize(AnyMessage(random_value(rng, []))) for _ in range(1000)]
    # PHP's class names have no dots, and its Point holds ints only.
    names = [(b"test.php.Item", b"test_php_Item"), (b"App\\Message\\Point", b"App\\Message\\Plain")]
    for name, other in names:
        payloads = [payload.replace(name, other) for payload in payloads]
    wide = [rng.uniform(-1, 1) * 10.0 ** rng.randrange(-320, 308) for _ in range(1000)]
    payloads.append(serializer.serialize(AnyMessage([*wide, *map(float, range(10**15, 10**17, 10**14))])))
    keys = ["0", "-0", "-1", "01", str(2**63 - 1), str(2**63), str(-(2**63)), str(-(2**63) - 1), "1.5", "", " 1"]
    payloads.append(serializer.serialize(AnyMessage(dict.fromkeys(keys, 1))))
    for sent, got in zip(payloads, again("php", payloads)):  # noqa: B905
        assert got == sent


@with_php
def test_php_refuses_what_is_wrong() -> None:
    # Or the tests above would prove nothing.
    number = again("php", [b'O:24:"App\\Message\\TypedMessage":1:{s:1:"i";s:1:"x";}'])[0]
    assert number == "Cannot assign string to property App\\Message\\TypedMessage::$i of type int"
    assert again("php", [b'O:4:"Gone":0:{}', b'a:1:{i:0;s:2:"x";}', b""])[:2] == [
        "Gone is not declared",
        "unserialize(): Error at offset 16 of 18 bytes",
    ]
    assert again("json", [b'{"a":NaN}']) == ["Syntax error"]


# --- sessions -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["php", "json"])
def format(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def peer(format: str) -> Iterator[IpcPeer]:
    with IpcPeer(SERIALIZERS[format](), timeout=20) as peer:
        yield peer


def start(peer: IpcPeer, format: str, *options: str) -> Session:
    assert PHP is not None
    options = options or ("-d", "display_errors=stderr")
    return peer.create_command_session([PHP, *options, str(SCRIPTS / "slave.php"), format])


VALUES = [
    None, True, False, 0, -1, 2**63 - 1, -(2**63), 1.5, 1.0, -0.0, 1e300, 5e-324, "", "text", "\0\"\\\n/",
    "čeština \u2028 \U0001f600", [], [1, [2, {"a": None}]], {"a": [], "b": {"c": 1.5}}, Point(1, -2), [Point(3, 4)] * 2,
    LogMessage("x"),
]  # fmt: skip


@with_php
def test_values_come_back(peer: IpcPeer, format: str) -> None:
    session = start(peer, format)
    values = VALUES + ([float("inf"), b"\xff\xfe", {5: 1, "x": 2}, php.Suit.Hearts] if format == "php" else [])
    promises = [session.request(AnyMessage(value), expect=AnyMessage) for value in values]
    for value, promise in zip(values, promises):  # noqa: B905
        assert same(promise.wait().value, value)
    big = AnyMessage(["x" * 300_000, "\U0001f600" * 300_000])
    assert session.request(big).wait() == big


@with_php
def test_classes_come_back(peer: IpcPeer, format: str) -> None:
    session = start(peer, format)
    messages: List[Message] = [
        TaskRequest("x"),
        ErrorMessage("as a value"),
        ComplexMessage("s", 1, Point(1, 2), [1, Point(3, 4)], {"a": 1}, None, True, 5, 2.0, "t"),
        TypedMessage(1, 2.0, True, "s", {"a": 1.5}, None),
    ]
    if format == "php":  # in JSON, PHP loses what is private in a parent class
        messages.append(ChildMessage("h", "s", "t", "o", 3))
    for message in messages:
        got = session.request(AnyMessage(message), expect=AnyMessage).wait()
        assert same(got.value, message)


@with_php
def test_both_ask_at_once(peer: IpcPeer, format: str) -> None:
    session = start(peer, format)
    asked: List[str] = []

    @session.on_request
    def answer(request: LogMessage) -> TaskRequest:
        asked.append(request.level)
        return TaskRequest(request.message)

    promises = [session.request(LogMessage(str(number), "ask"), expect=TaskRequest) for number in range(50)]
    assert [promise.wait().job for promise in promises] == [str(number) for number in range(50)]
    assert asked == ["asked"] * 50


@with_php
def test_notifications_in_order(peer: IpcPeer, format: str) -> None:
    session = start(peer, format)
    session.notify(LogMessage("2000", "flood"))
    session.notify(TaskRequest("end"))
    assert [session.receive(20) for _ in range(2001)] == [
        *(LogMessage(str(number), "flood") for number in range(1, 2001)),
        TaskRequest("end"),
    ]


@with_php
def test_what_php_prints_is_junk(peer: IpcPeer, format: str) -> None:
    session = start(peer, format)
    received: List[LogMessage] = []
    session.on_message(received.append)
    assert session.request(AnyMessage("print")).wait() == AnyMessage("print")
    assert received == [LogMessage("printed by PHP", "junk")]


@with_php
def test_nobody_answers(peer: IpcPeer, format: str) -> None:
    session = start(peer, format)
    with pytest.raises(RemoteError, match=r"^Unhandled request: StreamIpc\\Message\\LogMessage$"):
        session.request(LogMessage("x")).wait()


@with_php
def test_a_property_without_a_value() -> None:
    with IpcPeer(PhpMessageSerializer()) as peer:
        session = start(peer, "php")
        message = LogMessage("x", "ask")
        del message.message
        with pytest.raises(RemoteError, match=r"LogMessage::\$message must not be accessed before initialization"):
            session.request(message).wait()


@pytest.mark.slow
@with_php
def test_a_field_of_a_wrong_type() -> None:
    with IpcPeer(PhpMessageSerializer()) as peer:
        session = start(peer, "php")
        received: List[LogMessage] = []
        session.on_message(received.append)
        with pytest.raises(RequestTimeoutError):
            session.request(TypedMessage("x", 2.0, True, "s", [], None), timeout=0.3).wait()  # type: ignore[arg-type]
        tick_until(lambda: "Cannot assign string to property" in "".join(log.message for log in received), peer)


class Unknown(Message, wire_name="App\\Message\\Unknown"):
    pass


@pytest.mark.matrix
@with_php
def test_a_class_that_php_does_not_know(peer: IpcPeer, format: str) -> None:
    session = start(peer, format)
    with pytest.raises(RequestTimeoutError, match="no reply to request"):
        session.request(Unknown(), timeout=WAIT).wait()
    assert session.request(AnyMessage(1)).wait() == AnyMessage(1)  # it lives


@with_php
def test_the_end_of_php_says_why(peer: IpcPeer, format: str) -> None:
    session = start(peer, format)
    session.notify(LogMessage("old age", "die"))
    promise = session.request(AnyMessage(1))
    with pytest.raises(StreamClosedError) as caught:
        promise.wait()
    assert "exited with exit status 255" in str(caught.value)
    assert "Uncaught RuntimeException: died of old age" in str(caught.value)


@with_php
def test_errors_that_php_prints_to_stdout_are_junk(peer: IpcPeer, format: str) -> None:
    session = start(peer, format, "-n", "-d", "display_errors=1")
    received: List[LogMessage] = []
    session.on_message(received.append)
    session.notify(LogMessage("old age", "die"))
    promise = session.request(AnyMessage(1))
    with pytest.raises(StreamClosedError, match="exited with exit status 255"):
        promise.wait()
    assert {message.level for message in received} == {"junk"}
    assert "Uncaught RuntimeException: died of old age" in "".join(message.message for message in received)


@pytest.mark.matrix
@with_php
@pytest.mark.slow
def test_the_other_serializer(format: str) -> None:
    other = {"php": "json", "json": "php"}[format]
    with IpcPeer(SERIALIZERS[other]()) as peer:
        session = start(peer, format)
        received: List[LogMessage] = []
        session.on_message(received.append)
        with pytest.raises(RequestTimeoutError, match="no reply to request"):
            session.request(AnyMessage(1), timeout=0.3).wait()
        tick_until(lambda: received, peer)
        assert "".join(message.message for message in received).startswith("not understood: ")
    # And what comes of a message from there.
    data = SERIALIZERS[format]().serialize(AnyMessage(1))
    with pytest.raises(Exception, match="it looks like (JSON|PHP's format): do both sides use the same serializer"):
        SERIALIZERS[other]().deserialize(data)
