from __future__ import annotations

import enum
import json
import os
import random
import sys
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import pytest

from stream_ipc.errors import SerializationError
from stream_ipc.messages import (
    ErrorMessage,
    LogMessage,
    Message,
    RequestEnvelope,
    ResponseEnvelope,
    take_out_of_envelope,
)
from stream_ipc.registry import register_type
from stream_ipc.serializers import php as reading
from stream_ipc.serializers import php_parser as parser
from stream_ipc.serializers.php import PhpMessageSerializer
from stream_ipc.serializers.text_writing import MAX_DEPTH

from . import php_messages as php
from .helpers import span
from .php_messages import VECTORS, AnyMessage, Point, StdClass, Suit, TaskRequest, a_cycle, nested, same

S = PhpMessageSerializer()
OLD = PhpMessageSerializer(namespace="PhpStreamIpc")


@dataclass
class Item:
    name: Any
    price: float = 0.0


register_type(Item, "test.php.Item")


@dataclass
class Cart(Message, wire_name="test.php.Cart"):
    items: Any
    note: str = "none"


@dataclass
class Typed(Message, wire_name="test.php.Typed"):
    text: str = ""
    data: bytes = b""
    maybe: Optional[bytes] = None
    buffer: bytearray | None = None
    map: Dict[Any, Any] = field(default_factory=dict)
    view: Optional[Mapping[int, Any]] = None
    number: float = 0.0
    any: Any = None


def any_payload(value: bytes) -> bytes:
    return b'O:22:"App\\Message\\AnyMessage":1:{s:5:"value";' + value + b"}"


def value_of(value: bytes) -> Any:
    message = S.deserialize(any_payload(value))
    assert isinstance(message, AnyMessage)
    return message.value


def written(value: Any) -> bytes:
    data = S.serialize(AnyMessage(value))
    start = b'O:22:"App\\Message\\AnyMessage":1:{s:5:"value";'
    assert data.startswith(start) and data.endswith(b"}")
    return data[len(start) : -1]


# --- the vectors ----------------------------------------------------------------------------------------------

ENCODE = {e["name"]: e for e in VECTORS["encode"] if e["serializer"] == "native"}
REFERENCES = {
    "any_php_references": "a value cannot be a reference in Python; the same values are written without R:",
    "any_reference_then_shared": "the same",
}
SHARED = ("any_same_point_twice", "any_two_shared")


@pytest.mark.parametrize("name", sorted(set(ENCODE) - set(REFERENCES) - set(SHARED)))
def test_encode_vector(name: str) -> None:
    entry = ENCODE[name]
    message = php.build(entry["php_class"], entry["message"], lambda k: k)
    assert S.serialize(message) == bytes.fromhex(entry["payload_hex"])
    assert S._format.write_by_walk(*take_out_of_envelope(message)) == bytes.fromhex(entry["payload_hex"])


def test_encode_shared_objects() -> None:
    p, q = Point(1, 2), Point(3, 4)
    assert S.serialize(AnyMessage([p, "x", p])) == bytes.fromhex(ENCODE["any_same_point_twice"]["payload_hex"])
    assert S.serialize(AnyMessage([p, p, q, q])) == bytes.fromhex(ENCODE["any_two_shared"]["payload_hex"])


@pytest.mark.parametrize("name", sorted(set(ENCODE) - {"any_cycle"}))
def test_decode_of_encode_vector(name: str) -> None:
    entry = ENCODE[name]
    data = bytes.fromhex(entry["payload_hex"])
    message = S.deserialize(data)
    expected = php.build(entry["php_class"], entry.get("decodes_to", entry["message"]), lambda k: k)
    if name == "lazy":
        assert message == php.LazyMessage("x")  # a default applies, where PHP has a property without a value
        return
    if name in ("log_magic_in_text", "log_all_bytes"):  # a field annotated str gets text
        assert isinstance(message, LogMessage) and message.message.encode("utf-8", "surrogateescape") == expected.message
    else:
        assert same(message, expected)
    if name not in REFERENCES:
        assert S.serialize(message) == data


def test_a_cycle_is_written_but_not_built() -> None:
    message = AnyMessage(None)
    message.value = [message, message]
    data = S.serialize(message)
    assert data == any_payload(b"a:2:{i:0;r:1;i:1;r:1;}")
    for bad in (data, bytes.fromhex(ENCODE["any_cycle"]["payload_hex"])):
        with pytest.raises(SerializationError, match="cannot be built by its constructor"):
            S.deserialize(bad)


@pytest.mark.parametrize("entry", [e for e in VECTORS["encode_errors"] if e["serializer"] == "native"])
def test_encode_error_vector(entry: Dict[str, Any]) -> None:
    assert entry["name"] == "any_closure"
    with pytest.raises(SerializationError, match=r"AnyMessage\.value: .*function cannot travel"):
        S.serialize(AnyMessage(lambda: 0))


@pytest.mark.parametrize(
    "entry", [e for e in VECTORS["legacy_encode"] if e["serializer"] == "native"], ids=lambda e: e["name"]
)
def test_legacy_vector(entry: Dict[str, Any]) -> None:
    message = php.build(entry["php_class"], entry["message"], lambda k: k)
    data = bytes.fromhex(entry["payload_hex"])
    assert OLD.serialize(message) == data
    assert S.deserialize(data) == OLD.deserialize(data) == message
    assert OLD.deserialize(S.serialize(message)) == message


PAYLOADS = {
    e["name"]: e
    for e in VECTORS["decode"]
    if e["serializer"] == "native" and e["kind"] in ("payload", "php_typing") and len(e["expected"]) == 1
}
REFUSED = "refused"
PAYLOADS_OTHERWISE: Dict[str, Any] = {
    # Defaults apply; what is required must be there.
    "native/field_missing": LogMessage("x", "info"),
    "native/field_none": REFUSED,
    "native/envelope_no_id": REFUSED,
    # Names of classes are exact.
    "native/class_other_case": REFUSED,
    # An unknown field is dropped, in any class.
    "native/field_extra_readonly": LogMessage("x", "info"),
    "native/field_extra": AnyMessage(1),
    # Types of fields are the constructor's affair.
    "native/field_int_for_string": LogMessage(5),  # type: ignore[arg-type]
    "native/field_null_for_string": LogMessage(None),  # type: ignore[arg-type]
    "native/typed_float_for_int": REFUSED,
    # A property is recognized by its name, whoever may see it.
    "native/private_other_class": ErrorMessage("other"),
    # What PHP lets pass and nobody writes.
    "native/trailing": REFUSED,
    "native/int_beyond_64_bits": REFUSED,
    "native/string_S": REFUSED,
    # Only registered classes are built.
    "native/unknown_inside": REFUSED,
}


def test_the_listed_payloads_exist() -> None:
    assert set(PAYLOADS_OTHERWISE) <= set(PAYLOADS)
    assert set(REFERENCES) | set(SHARED) <= set(ENCODE)
    assert len(PAYLOADS) >= 40 and len(ENCODE) > 80


@pytest.mark.parametrize("name", sorted(PAYLOADS))
def test_payload_vector(name: str) -> None:
    entry = PAYLOADS[name]
    data = bytes.fromhex(entry["input_hex"])[8:]
    expected = PAYLOADS_OTHERWISE.get(name)
    if expected is None:
        described = entry["expected"][0]
        if described["class"] == "StreamIpc\\Message\\LogMessage" and described["fields"]["level"] == "error":
            expected = REFUSED
        else:
            expected = php.build(described["class"], described, lambda k: k)
    if expected is REFUSED:
        with pytest.raises(SerializationError) as caught:
            S.deserialize(data)
        if name == "native/envelope_unknown_inside":
            assert caught.value.request_id == "1.1"
            assert "Unknown class: No\\Such" in str(caught.value)
    else:
        for form in (bytes, bytearray, memoryview):
            assert same(S.deserialize(form(data)), expected)


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, b"d:0.1;"), (1.0, b"d:1;"), (-0.0, b"d:-0;"), (1e15, b"d:1000000000000000;"), (100.5, b"d:100.5;"),
        (1e16, b"d:10000000000000000;"), (-1e16, b"d:-10000000000000000;"),
        (1.2345678901234568e16, b"d:12345678901234568;"),
        (9.007199254740993e15, b"d:9007199254740992;"), (1e17, b"d:1.0E+17;"), (1.5e17, b"d:1.5E+17;"),
        (1e25, b"d:1.0E+25;"), (1e100, b"d:1.0E+100;"), (1e-4, b"d:0.0001;"), (1e-5, b"d:1.0E-5;"),
        (-1.25e-7, b"d:-1.25E-7;"), (5e-324, b"d:5.0E-324;"), (1.7976931348623157e308, b"d:1.7976931348623157E+308;"),
        (float("inf"), b"d:INF;"), (float("-inf"), b"d:-INF;"), (float("nan"), b"d:NAN;"), (-2.5, b"d:-2.5;"),
        (0, b"i:0;"), (-(2**63), b"i:-9223372036854775808;"), (2**63 - 1, b"i:9223372036854775807;"),
        (True, b"b:1;"), (False, b"b:0;"), (None, b"N;"), ("", b's:0:"";'), ("é", b's:2:"\xc3\xa9";'), ('";',
        b's:2:"";";'),
        ("\U0001f600", b's:4:"\xf0\x9f\x98\x80";'), (b"\xff\x00", b's:2:"\xff\x00";'), ([], b"a:0:{}"),
        ([[]], b"a:1:{i:0;a:0:{}}"),
        ({"a": 1}, b'a:1:{s:1:"a";i:1;}'), ({5: 1, -3: 2}, b"a:2:{i:5;i:1;i:-3;i:2;}"),
        ({"": None}, b'a:1:{s:0:"";N;}'),
        ({"-0": 1, "007": 2, "1.5": 3}, b'a:3:{s:2:"-0";i:1;s:3:"007";i:2;s:3:"1.5";i:3;}'),
        ({b"\xff": 1}, b'a:1:{s:1:"\xff";i:1;}'),
        ({"9223372036854775808": 1}, b'a:1:{s:19:"9223372036854775808";i:1;}'),
        ({1: 1, 0: 2}, b"a:2:{i:1;i:1;i:0;i:2;}"),
        ({"\u0661": 1, " 1": 2, "+1": 3, "1\n": 4}, b'a:4:{s:2:"\xd9\xa1";i:1;s:2:" 1";i:2;s:2:"+1";i:3;s:2:"1\n";i:4;}'),
        (Suit.Hearts, b'E:23:"App\\Message\\Suit:Hearts";'),
        (Point(1, 2), b'O:17:"App\\Message\\Point":2:{s:1:"x";i:1;s:1:"y";i:2;}'),
    ],
    ids=lambda v: "" if isinstance(v, bytes) else ascii(v)[:30],
)  # fmt: skip
def test_values_both_ways(value: Any, text: bytes) -> None:
    assert written(value) == text
    assert same(value_of(text), value)


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        ((1, (2,)), [1, [2]]),
        ({}, []),
        ({0: "a", 1: "b"}, ["a", "b"]),
        ({"0": "a", "1": "b"}, ["a", "b"]),
        ({"10": 1, "-5": 2}, {10: 1, -5: 2}),
        ({"-9223372036854775808": 1}, {-(2**63): 1}),
        ({b"k": 1, b"7": 2}, {"k": 1, 7: 2}),
        (b"text", "text"),
        ("caf\u00e9".encode(), "café"),
        (bytearray(b"\xff"), b"\xff"),
        ("\udcff", b"\xff"),
    ],
)
def test_what_php_does_not_tell_apart(value: Any, arrives: Any) -> None:
    assert same(value_of(written(value)), arrives)


def test_annotations_decide() -> None:
    sent = Typed("café", b"caf\xc3\xa9", b"x", bytearray(b"\xff"), {0: "a"}, {}, 3, b"y")
    got = S.deserialize(S.serialize(sent))
    assert same(got, Typed("café", b"caf\xc3\xa9", b"x", bytearray(b"\xff"), {0: "a"}, {}, 3.0, "y"))
    assert same(S.deserialize(S.serialize(Typed(map={}))), Typed())
    assert same(S.deserialize(S.serialize(Typed(buffer=bytearray(b"\xc3\xa9")))), Typed(buffer=bytearray(b"\xc3\xa9")))
    # The same when not all fields were sent.
    partly = b'O:14:"test.php.Typed":4:{s:4:"data";s:1:"a";s:3:"map";a:0:{}s:6:"number";i:1;s:4:"text";s:1:"\xff";}'
    assert same(S.deserialize(partly), Typed("\udcff", b"a", map={}, number=1.0))


def test_text_that_is_not_utf8_goes_out_as_it_came() -> None:
    data = S.serialize(LogMessage(b"\xffok\xc3"))  # type: ignore[arg-type]
    got = S.deserialize(data)
    assert isinstance(got, LogMessage) and got.message == "\udcffok\udcc3"
    assert S.serialize(got) == data
    for bad in ("\ud800", "x\udbff", "\udc7f"):
        with pytest.raises(SerializationError, match=r"LogMessage\.message: text with a lone surrogate"):
            S.serialize(LogMessage(bad))


def test_float_forms() -> None:
    for text, value in [(b"1.", 1.0), (b".5", 0.5), (b"+1", 1.0), (b"1e3", 1e3), (b"1E-3", 1e-3), (b"1e999", float("inf"))]:
        assert same(value_of(b"d:" + text + b";"), value)
    for text in (b"", b".", b"e1", b"1e", b"inf", b"nan", b"0x1", b"1_0", b" 1", b"1 ", b"+INF", b"--1", b"1.1.1"):
        with pytest.raises(SerializationError):
            value_of(b"d:" + text + b";")


def test_random_floats_are_read_back_unchanged() -> None:
    rng = random.Random(7)
    for _ in range(3000):
        wide = rng.uniform(-1, 1) * 10.0 ** rng.randrange(-320, 308)
        number = rng.choice([rng.random(), wide, float(rng.getrandbits(60))])
        text = written(number)
        assert same(value_of(text), number)
        assert b"e" not in text and not text.endswith(b".0;")


# --- the quick way of reading ---------------------------------------------------------------------------------


def read_without_quick_ways(payload: bytes) -> Any:
    return parser.parse(payload.decode("latin-1"), reading._classes, reading._member)


def check_message(value: Any) -> None:
    if not isinstance(value, Message):
        raise SerializationError("not a message")


QUICK_VALUES = ["", "text", "č\n", b"\xff", "x" * 200, 0, -5, 10**17, 1.5, -0.0, 1e300, 1e-7, True, False, None]


def test_simple_messages_are_read_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: List[Message] = [AnyMessage(value) for value in QUICK_VALUES]
    messages += [LogMessage("x"), ErrorMessage("y"), Child(1, 2, 3, 4), Typed("ž", number=2.0, map=None)]  # type: ignore[arg-type]
    for message in messages:
        for known in (S, OLD):
            S.deserialize(known.serialize(message))  # after which its class is known

    def unexpected(*args: Any) -> Any:
        raise AssertionError("read the other way")

    monkeypatch.setattr(reading, "parse", unexpected)
    for message in messages:
        for sent in (message, RequestEnvelope("1.5", message), ResponseEnvelope("", message)):
            assert same(S.deserialize(S.serialize(sent)), sent)
    assert S.deserialize(OLD.serialize(RequestEnvelope("1", LogMessage("x")))) == RequestEnvelope("1", LogMessage("x"))


def test_what_the_quick_way_leaves_to_the_other() -> None:
    texts = [b's:2:"a";', b's:3:"ab";', b's:1:"\xc3\xa9";', b's:5:"a";x:";', b"i:+1;", b"i:1", b"d:INF;"]
    texts += [b"d:NAN;", b"d:1.;"]
    texts += [b"d:.5;", b"d:1e5;", b"b:2;", b"r:1;", b"R:1;", b"a:0:{}", b's:03:"abc";', b's:201:"' + b"x" * 201 + b'";']
    for text in texts:
        for data in (any_payload(text), REQUEST + any_payload(text) + b"}", REQUEST + any_payload(text)):
            try:
                expected = read_without_quick_ways(data)
            except SerializationError:
                with pytest.raises(SerializationError):
                    S.deserialize(data)
            else:
                assert same(S.deserialize(data), expected)


@pytest.mark.parametrize(
    ("good", "bad"),
    [(b"O:34", b"O:35"), (b'":2:{s:2', b'":3:{s:2'), (b"s:7:", b"s:8:"), (b's:3:"4.2"', b's:4:"4.2"'), (b"O:22", b"O:21"),
     (b'":1:{', b'":2:{'), (b"s:5:", b"s:6:"), (b"}}", b"}"), (b"}}", b"}}}"), (b"}}", b"};}"), (b"}}", b"}};")],
)  # fmt: skip
def test_the_quick_way_is_as_strict(good: bytes, bad: bytes) -> None:
    data = REQUEST + any_payload(b"i:1;") + b"}"
    assert S.deserialize(data) == RequestEnvelope("4.2", AnyMessage(1))
    assert data.count(good) == 1
    with pytest.raises(SerializationError):
        S.deserialize(data.replace(good, bad))


def test_quick_ways_follow_the_registry() -> None:
    def define(default: int) -> Any:
        @dataclass
        class Renewed(Message, wire_name="test.php.Renewed"):
            value: int
            added: int = default

        return Renewed

    payload = b'O:16:"test.php.Renewed":2:{s:5:"value";i:1;s:5:"added";i:2;}'
    for default in (5, 6):
        cls = define(default)
        assert type(S.deserialize(payload)) is cls
        assert S.deserialize(payload.replace(b":2:{", b":1:{").replace(b's:5:"added";i:2;', b"")).added == default  # type: ignore[attr-defined]


def test_heads_that_are_not_kept() -> None:
    before = len(reading._heads)
    for count in range(3, 200):
        for data in (b'O:22:"App\\Message\\AnyMessage":%d:{' % count, b'O:4:"G%03d":1:{' % count):
            for payload in (data, REQUEST + data):
                with pytest.raises(SerializationError):
                    S.deserialize(payload)
    assert len(reading._heads) <= before + 1


# --- visibility, names ----------------------------------------------------------------------------------------


@dataclass
class Base(Message, wire_name="App\\Base"):
    hidden: int = field(default=1, metadata={"visibility": "private"})
    shared: int = field(default=2, metadata={"visibility": "protected"})


@dataclass
class Child(Base, wire_name="App\\Child"):
    own: int = field(default=3, metadata={"visibility": "private", "wire_name": "ownName"})
    other: int = field(default=4, metadata={"visibility": "private:App\\Trait"})


def test_visibility() -> None:
    data = S.serialize(Child(5, 6, 7, 8))
    assert data == (
        b'O:9:"App\\Child":4:{s:16:"\0App\\Base\0hidden";i:5;s:9:"\0*\0shared";i:6;'
        b's:18:"\0App\\Child\0ownName";i:7;s:16:"\0App\\Trait\0other";i:8;}'
    )
    assert S.deserialize(data) == Child(5, 6, 7, 8)
    plain = b'O:9:"App\\Child":4:{s:5:"other";i:8;s:7:"ownName";i:7;s:6:"shared";i:6;s:6:"hidden";i:5;}'
    assert S.deserialize(plain) == Child(5, 6, 7, 8)
    swapped = b'O:9:"App\\Child":2:{s:10:"\0*\0ownName";i:7;s:15:"\0Some\\No\0shared";i:6;}'
    assert S.deserialize(swapped) == Child(1, 6, 7, 4)
    odd = b'O:9:"App\\Child":3:{s:1:"\0";i:1;s:2:"\0x";i:1;i:5;i:1;}'
    assert S.deserialize(odd) == Child()


def test_two_private_properties_of_one_name() -> None:
    @dataclass
    class Both(Message, wire_name="App\\Both"):
        a: int = field(metadata={"visibility": "private:App\\A", "wire_name": "x"})
        b: int = field(default=9, metadata={"visibility": "private:App\\B", "wire_name": "x"})

    assert S.deserialize(S.serialize(Both(1, 2))) == Both(1, 2)
    assert S.deserialize(b'O:8:"App\\Both":2:{s:8:"\0App\\B\0x";i:2;s:8:"\0App\\A\0x";i:1;}') == Both(1, 2)


    assert S.deserialize(b'O:8:"App\\Both":1:{s:8:"\0App\\A\0x";i:1;}') == Both(1, 9)


def test_private_of_a_class_that_is_not_registered() -> None:
    @dataclass
    class Mixin:
        a: int = field(default=1, metadata={"visibility": "private"})

    @dataclass
    class Mixed(Mixin, Message, wire_name="App\\Mixed"):
        b: int = 2

    assert S.serialize(Mixed()) == b'O:9:"App\\Mixed":2:{s:12:"\0App\\Mixed\0a";i:1;s:1:"b";i:2;}'


def test_private_of_a_class_that_is_derived_from_without_a_decorator() -> None:
    class Plain(Base, wire_name="App\\Plain"):
        pass

    assert S.serialize(Plain(1, 2)).startswith(b'O:9:"App\\Plain":2:{s:16:"\0App\\Base\0hidden";i:1;')
    assert S.deserialize(S.serialize(Plain(1, 2))) == Plain(1, 2)


def test_private_of_an_attrs_class() -> None:
    attr = pytest.importorskip("attr", reason="attrs is not installed")

    @attr.s(auto_attribs=True)
    class Made(Message, wire_name="App\\Made"):
        a: int = attr.ib(default=1, metadata={"visibility": "private"})

    assert S.serialize(Made(5)) == b'O:8:"App\\Made":1:{s:11:"\0App\\Made\0a";i:5;}'
    assert S.deserialize(S.serialize(Made(5))) == Made(5)


def test_bad_visibility() -> None:
    @dataclass
    class Wrong(Message, wire_name="App\\Wrong"):
        a: int = field(default=1, metadata={"visibility": "internal"})

    with pytest.raises(SerializationError, match="visibility must be"):
        S.serialize(Wrong())


def test_error_message_forms() -> None:
    for data in (S.serialize(ErrorMessage("é")), OLD.serialize(ErrorMessage("é"))):
        assert S.deserialize(data) == ErrorMessage("é")
        assert OLD.deserialize(data) == ErrorMessage("é")
    assert OLD.serialize(ErrorMessage("x")) == (
        b'O:33:"PhpStreamIpc\\Message\\ErrorMessage":1:{s:47:"\0PhpStreamIpc\\Message\\ErrorMessage\0errorMessage";s:1:"x";}'
    )


def test_names_that_are_not_ascii() -> None:
    @dataclass
    class Unicode(Message, wire_name="App\\Žluť"):
        číslo: int
        text: str = field(default="x", metadata={"wire_name": "ř{}", "visibility": "private"})

    def item(text: str) -> bytes:
        return b's:%d:"%s";' % (len(text.encode()), text.encode())

    data = S.serialize(Unicode(1))
    name = "App\\Žluť".encode()
    head = b'O:%d:"%s":2:{' % (len(name), name)
    assert data == head + item("číslo") + b"i:1;" + item("\0App\\Žluť\0ř{}") + item("x") + b"}"
    assert S.deserialize(data) == Unicode(1)
    assert S.deserialize(head + item("ř{}") + item("é") + item("číslo") + b"i:1;}") == Unicode(1, "é")


@pytest.mark.parametrize("name", ['App\\"Quoted', "x" * 501])
def test_class_names_that_cannot_be_written(name: str) -> None:
    thing = type("Thing", (Message,), {"__qualname__": name[:8]}, wire_name=name)
    with pytest.raises(SerializationError, match="cannot be a class name"):
        S.serialize(thing())


# --- objects --------------------------------------------------------------------------------------------------


def test_shared_objects_stay_shared() -> None:
    item = Item("x")
    message = Cart([item, {"again": item}, Suit.Hearts, Suit.Hearts, LogMessage("a"), [item, item]])
    data = S.serialize(message)
    got = S.deserialize(data)
    assert got == message and isinstance(got, Cart)
    assert got.items[0] is got.items[1]["again"] is got.items[5][1]
    assert b'E:23:"App\\Message\\Suit:Hearts";i:3;r:' in data
    assert S.serialize(got) == data


def test_references() -> None:
    point = b'O:17:"App\\Message\\Point":2:{s:1:"x";i:1;s:1:"y";i:2;}'
    assert value_of(b'a:3:{i:0;s:1:"v";i:1;R:3;i:2;R:3;}') == ["v", "v", "v"]
    # R: takes no number of its own, r: does.
    assert value_of(b'a:5:{i:0;s:1:"v";i:1;R:3;i:2;' + point + b"i:3;r:4;i:4;r:4;}") == ["v", "v"] + [Point(1, 2)] * 3
    assert value_of(b"a:4:{i:0;" + point + b"i:1;r:3;i:2;" + point + b"i:3;r:7;}") == [Point(1, 2)] * 4
    assert value_of(b"a:2:{i:0;a:1:{i:0;i:5;}i:1;R:3;}") == [[5], [5]]
    assert value_of(b"a:2:{i:0;a:1:{i:0;i:5;}i:1;R:4;}") == [[5], 5]
    for bad in (
        b"a:2:{i:0;i:5;i:1;r:0;}", b"a:2:{i:0;i:5;i:1;R:0;}", b"r:0;", b"r:1;", b"r:2;", b"R:1;", b"r:3;",
        b"r:9999999999;", b"r:-1;", b"R:;", b"a:1:{i:0;r:2;}",
        # To PHP these are no objects either.
        b"a:2:{i:0;i:5;i:1;r:3;}", b'a:2:{i:0;s:1:"v";i:1;r:3;}', b"a:2:{i:0;N;i:1;r:3;}", b"a:2:{i:0;a:0:{}i:1;r:3;}",
    ):  # fmt: skip
        with pytest.raises(SerializationError):
            value_of(bad)


def test_a_reference_to_an_array_is_the_same_one() -> None:
    got = value_of(b'a:3:{i:0;a:2:{s:1:"k";a:1:{i:0;i:5;}s:1:"l";N;}i:1;R:3;i:2;i:7;}')
    assert got == [{"k": [5], "l": None}, {"k": [5], "l": None}, 7]
    assert got[0] is got[1]


@pytest.mark.parametrize(
    ("name", "value"), [("map", list(range(20_000))), ("data", "x" * 40_000), ("buffer", "x" * 40_000)]
)
def test_references_cannot_make_many_copies(name: str, value: Any) -> None:
    start = b'O:14:"test.php.Typed":1:{' + written(name)

    def again(count: int) -> bytes:
        items = [b"i:%d;%sR:4;}" % (i, start) for i in range(1, count)]
        return b"a:%d:{i:0;%s%s}%s}" % (count, start, written(value), b"".join(items))

    expected = getattr(value_of(again(1))[0], name)
    assert [getattr(typed, name) for typed in value_of(again(5))] == [expected] * 5
    with pytest.raises(SerializationError, match="references that repeat more"):
        value_of(again(1000))


def test_references_to_what_is_in_an_object() -> None:
    point = b'O:17:"App\\Message\\Point":2:{s:1:"x";i:1;s:1:"y";s:1:"b";}'
    assert value_of(b"a:3:{i:0;" + point + b"i:1;R:5;i:2;r:3;}") == [Point(1, "b"), "b", Point(1, "b")]  # type: ignore[arg-type]
    assert value_of(b"a:3:{i:0;" + point + b"i:1;i:9;i:2;R:6;}") == [Point(1, "b"), 9, 9]  # type: ignore[arg-type]
    with pytest.raises(SerializationError, match="something that is no object"):
        value_of(b"a:2:{i:0;" + point + b"i:1;r:5;}")


def test_lists_of_one_type() -> None:
    for value in (list(range(-5, 40)), ["x" * i for i in range(12)], ["\u010d"] * 9, ['"'] * 9, ["}"] * 9, [1.5] * 9):
        text = written(value)
        assert same(value_of(text), value)
        assert same(value_of(text.replace(b"i:0;", b"i:00;", 1)), value)
    for text in (written([5] * 9), written(["5"] * 9)):
        assert value_of(text.replace(b"i:3;", b"i:30;", 1)) == {i if i != 3 else 30: value_of(text)[0] for i in range(9)}
        shorter = text.replace(b's:1:"5"', b's:2:"5"', 1).replace(b";i:5;", b";i:5", 1)
        for bad in (text.replace(b"a:9", b"a:10"), text[:-1], shorter):
            with pytest.raises(SerializationError):
                value_of(bad)


def test_enums() -> None:
    @register_type(wire_name="test.php.Rights")
    class Rights(enum.Flag):
        READ = 1
        WRITE = 2

    @register_type(wire_name="test.php.Kind")
    class Kind(str, enum.Enum):
        Č = "č"

    @register_type(wire_name="test.php.Pair")
    class Pair(NamedTuple):
        a: Any
        b: Any = 5

    everything = [Rights.READ, Kind.Č, Pair(1), Pair([Kind.Č], b"\xff")]
    got = value_of(written(everything))
    assert got == everything and [type(v) for v in got] == [type(v) for v in everything]
    with pytest.raises(SerializationError, match=r"AnyMessage\.value: a combination of flags"):
        written(Rights.READ | Rights.WRITE)
    for bad in (
        b'E:23:"App\\Message\\Suit:Nobody";', b'E:22:"App\\Message\\Suit:Hearts";', b'E:16:"App\\Message\\Suit";',
        b'E:16:"__class__:Hearts";', b'E:24:"App\\Message\\Point:Hearts";', b'E:26:"App\\Message\\Suit:__class__";',
        b'O:16:"App\\Message\\Suit":2:{s:4:"name";s:6:"Hearts";s:5:"value";s:1:"H";}',
        b'E:24:"App\\Message\\Point:__init__";',
    ):  # fmt: skip
        with pytest.raises(SerializationError):
            value_of(bad)


@pytest.mark.parametrize(
    ("wire_name", "case"), [("urn:test:Color", "RED"), ("test.php.Case", "x:y"), ("test.php.Case", 'x"y')]
)
def test_an_enum_whose_name_the_format_cannot_hold_is_refused(wire_name: str, case: str) -> None:
    cls = register_type(enum.Enum("Case", {case: 1}), wire_name)
    with pytest.raises(SerializationError, match="cannot be an enum's case in PHP's format"):
        PhpMessageSerializer().serialize(LogMessage(cls(1)))  # type: ignore[arg-type]


def test_an_enum_is_no_object() -> None:
    with pytest.raises(SerializationError, match="is an enum, but came as an object"):
        value_of(b'O:16:"App\\Message\\Suit":2:{s:4:"name";s:6:"Hearts";s:5:"value";s:1:"H";}')


def test_open_classes() -> None:
    thing = StdClass()
    thing.a, thing.é = [1], Point(1, 2)  # type: ignore[attr-defined]
    assert value_of(written(thing)) == thing
    got = value_of(b'O:8:"stdClass":3:{s:4:"\0*\0p";i:1;i:7;i:2;s:9:"__class__";i:3;}')
    assert vars(got) == {"p": 1, "7": 2}
    thing.a = {1, 2}  # type: ignore[attr-defined]
    with pytest.raises(SerializationError, match=r"AnyMessage\.value\.a: set cannot travel"):
        written(thing)


def test_constructors_check_what_comes() -> None:
    with pytest.raises(SerializationError, match="job must be a str") as caught:
        S.deserialize(S.serialize(RequestEnvelope("9", TaskRequest("x"))).replace(b's:1:"x"', b"i:5"))
    assert caught.value.request_id == "9"
    with pytest.raises(SerializationError, match="required field 'items' was not sent"):
        S.deserialize(b'O:13:"test.php.Cart":1:{s:4:"note";s:0:"";}')
    assert S.deserialize(b'O:13:"test.php.Cart":2:{s:5:"extra";i:1;s:5:"items";N;}') == Cart(None)


@pytest.mark.parametrize(
    "name", [b"os.system", b"Message", b"StreamIpc\\Message\\Message", b"builtins.eval", b"__main__.X"]
)
def test_only_registered_classes(name: bytes) -> None:
    before = set(sys.modules)
    obj = b'O:%d:"%s":1:{s:1:"a";i:1;}' % (len(name), name)
    for data in (obj, any_payload(obj), any_payload(b"a:1:{i:0;" + obj + b"}")):
        with pytest.raises(SerializationError, match="Unknown class"):
            S.deserialize(data)
    assert set(sys.modules) == before


@pytest.mark.parametrize("value", [5, None, "x", [LogMessage("x")], Point(1, 2), Suit.Hearts, LogMessage, object()])
def test_only_messages_are_sent(value: Any) -> None:
    with pytest.raises(SerializationError, match="only messages can"):
        S.serialize(value)


@pytest.mark.parametrize("data", [b"N;", b"i:5;", b"a:0:{}", b's:1:"x";', written(Point(1, 2)), written(Suit.Hearts)])
def test_only_messages_are_received(data: bytes) -> None:
    with pytest.raises(SerializationError, match="^payload is not a message but "):
        S.deserialize(data)


# --- envelopes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", [5, None, b"1", "x" * 129, ["1"]])
def test_bad_ids(identity: Any) -> None:
    with pytest.raises(SerializationError, match="id must be a str of at most 128"):
        S.serialize(RequestEnvelope(identity, LogMessage("x")))
    if identity == b"1":
        return
    data = S.serialize(RequestEnvelope("ID", LogMessage("x"))).replace(b's:2:"ID";', written(identity))
    with pytest.raises(SerializationError, match="id of an envelope") as caught:
        S.deserialize(data)
    assert caught.value.request_id is None


@pytest.mark.parametrize("key", ["\0*\0id", "\0StreamIpc\\Envelope\\RequestEnvelope\0id"])
def test_an_envelope_is_checked_whoever_may_see_its_properties(key: str) -> None:
    message = LogMessage("x")
    for identity, content, text in ((["1"], message, "id of an"), ("x" * 129, message, "id of an"), ("1", 5, "content of")):
        data = S.serialize(RequestEnvelope("ID", message)).replace(b's:2:"id";s:2:"ID";', written(key) + written(identity))
        data = data.replace(S.serialize(message), written(content))
        with pytest.raises(SerializationError, match=text):
            S.deserialize(data)
    assert S.deserialize(S.serialize(RequestEnvelope("ID", message)).replace(written("id"), written(key))).id == "ID"


@pytest.mark.parametrize("content", [5, None, "x", [], Point(1, 2), Suit.Hearts])
def test_envelopes_hold_messages(content: Any) -> None:
    with pytest.raises(SerializationError, match="must hold a Message"):
        S.serialize(ResponseEnvelope("1", content))
    data = S.serialize(ResponseEnvelope("7", LogMessage("x")))
    start = data.index(b"O:28")
    with pytest.raises(SerializationError, match="content of an envelope") as caught:
        S.deserialize(data[:start] + written(content) + b"}")
    assert caught.value.response_id == "7" and caught.value.request_id is None


REQUEST = b'O:34:"StreamIpc\\Envelope\\RequestEnvelope":2:{s:2:"id";s:3:"4.2";s:7:"request";'


@pytest.mark.parametrize(
    "rest",
    [b"", b"N;", b"N;}", b'O:4:"Gone":0:{}}', b'O:4:"Gone":1:{s:1:"a";a:1:{i:0;O:4:"More":0:{}}}}', b"garbage", b"a:99:{}",
     any_payload(b'O:4:"Gone":0:{}') + b"}", any_payload(b"i:1;") + b"}trailing", any_payload(b"r:1;") + b"}",
     b"a:1:{i:0;" * 600 + b"N;" + b"}" * 600 + b"}", any_payload(b'E:9:"Gone:Case";') + b"}"],
    ids=lambda b: repr(b[:20]),
)  # fmt: skip
def test_the_id_is_saved_from_broken_requests(rest: bytes) -> None:
    with pytest.raises(SerializationError) as caught:
        S.deserialize(REQUEST + rest)
    assert caught.value.request_id == "4.2" and caught.value.response_id is None
    response = REQUEST.replace(b"O:34", b"O:38").replace(b"StreamIpc", b"PhpStreamIpc").replace(b"Request", b"Response")
    with pytest.raises(SerializationError) as caught:
        S.deserialize(memoryview(response.replace(b's:7:"request"', b's:8:"response"') + rest))
    assert caught.value.response_id == "4.2" and caught.value.request_id is None
    with pytest.raises(SerializationError) as caught:
        S.deserialize(REQUEST.replace(b"s:3:", b"s:4:") + rest)
    assert caught.value.request_id is None


@pytest.mark.parametrize(
    ("payload", "looks"),
    [(b'{"__class":"App"}', "JSON"), (b" [1]", "JSON"), (b"\x80\x05K\x05.", "a pickle"), (b"junk", ""), (b"", ""),
     (b"N;", ""), (b'O:4:"Gone":0:{}', "")],
)  # fmt: skip
def test_payloads_of_another_serializer(payload: bytes, looks: str) -> None:
    for form in (bytes, memoryview):
        with pytest.raises(SerializationError) as caught:
            S.deserialize(form(payload))
        end = f"; it looks like {looks}: do both sides use the same serializer?"
        assert str(caught.value).endswith(end) if looks else "looks like" not in str(caught.value)


def test_ids_that_are_not_utf8() -> None:
    data = REQUEST.replace(b"4.2", b"4\xff2") + b'O:28:"StreamIpc\\Message\\LogMessage":1:{s:7:"message";s:1:"x";}}'
    got = S.deserialize(data)
    assert isinstance(got, RequestEnvelope) and S.serialize(ResponseEnvelope(got.id, got)).count(b"4\xff2") == 2
    with pytest.raises(SerializationError) as caught:
        S.deserialize(data.replace(b"LogMessage", b"NoSuchName"))
    assert caught.value.request_id == "4\udcff2"


# --- what may not be sent -------------------------------------------------------------------------------------


class TextSubclass(str):
    pass


class DictSubclass(Dict[str, Any]):
    pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2**63, r"\[1\]\.name: an int beyond 64 bits"),
        ([1, -(2**63) - 1], r"\[1\]\.name\[1\]: an int beyond 64 bits"),
        (10**5000, r"an int beyond"),
        ({1.5: 1}, r"\[1\]\.name\[1\.5\]: a dict key .* must be a str, bytes or an int, not a float"),
        ({True: 1}, r"\[True\]: a dict key .* not a bool"),
        ({None: 1}, r"not a NoneType"),
        ({(1,): 1}, r"not a tuple"),
        ({2**63: 1}, r"a dict key beyond 64 bits"),
        ({TextSubclass("x"): 1}, r"not a TextSubclass"),
        ({5: 1, "5": 2}, r"\[1\]\.name\['5'\]: two keys of the dict are one in PHP"),
        ({"a": 1, b"a": 2}, r"\[1\]\.name\[b'a'\]: two keys of the dict are one"),
        ({"x\ud800": 1}, r"lone surrogate"),
        ("\ud800", r"\[1\]\.name: text with a lone surrogate"),
        ({1}, r"\[1\]\.name: set cannot travel in PHP's format"),
        (1j, r"complex cannot travel"),
        (memoryview(b"x"), r"memoryview cannot travel"),
        (TextSubclass("x"), r"TextSubclass is a subclass of str and would arrive as one"),
        (DictSubclass(), r"DictSubclass is a subclass of dict"),
        (object(), r"builtins\.object cannot travel"),
        (a_cycle(), r"\[1\]\.name\['x'\]\[0\]: contains itself"),
        (nested(600), r"nested deeper than 511 levels"),
    ],
    ids=lambda v: v if isinstance(v, str) and v.isascii() else "",
)
def test_refused_at_the_sender_with_its_path(value: Any, text: str) -> None:
    message = Cart(["fine", Item(value)])
    for serializer in (S, OLD):
        for sent in (message, RequestEnvelope("1", message)):
            with pytest.raises(SerializationError, match=text) as caught:
                serializer.serialize(sent)
            assert str(caught.value).startswith("Cart.items[1]")
            assert len(str(caught.value)) < 300


def test_a_field_without_a_value_is_left_out() -> None:
    message = LogMessage("x")
    del message.message
    assert S.serialize(message) == b'O:28:"StreamIpc\\Message\\LogMessage":1:{s:5:"level";s:4:"info";}'
    envelope = RequestEnvelope("1", message)
    del envelope.id
    with pytest.raises(SerializationError):
        S.serialize(envelope)


# --- hostile input --------------------------------------------------------------------------------------------


def test_depth_limit() -> None:
    deepest = AnyMessage(nested(MAX_DEPTH - 1))
    data = S.serialize(deepest)
    assert S.serialize(S.deserialize(data)) == data
    with pytest.raises(SerializationError, match="deeper than 511 levels"):
        S.serialize(AnyMessage(nested(MAX_DEPTH)))
    with pytest.raises(SerializationError, match="deeper than 511 levels"):
        value_of(b"a:1:{i:0;" * MAX_DEPTH + b"N;" + b"}" * MAX_DEPTH)
    with pytest.raises(SerializationError, match="deeper than 511 levels"):
        S.deserialize(any_payload(b"").join([b""] * 2)[:-1] * 100000)


def at_depth(frames: int, action: Any) -> Any:
    return action() if frames == 0 else at_depth(frames - 1, action)


def test_a_full_stack_is_no_obstacle() -> None:
    message = AnyMessage(nested(MAX_DEPTH - 1))
    expected = S.serialize(message)
    depth = 0
    frame: Any = sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    free = sys.getrecursionlimit() - depth - 60
    assert at_depth(free, lambda: S.serialize(message)) == expected
    assert at_depth(free, lambda: S.serialize(S.deserialize(expected))) == expected


@pytest.mark.parametrize(
    "value",
    [
        b"", b";", b"n;", b"N", b"N;N;", b"i:;", b"i:1", b"i:1_0;", b"i: 1;", b"i:0x1;", b"i:1.5;", b"i:\xb2;",
        b"i:--1;",
        b"i:99999999999999999999;", b"i:" + b"9" * 100000 + b";", b"b:2;", b"b:;", b"b:true;", b'b:"1";',
        b's:1:"";', b's:0:"x";', b's:-1:"";', b's:+1:"x";', b's:1:x;', b's:1:"x"', b"s:1:'x';", b's:9999999999:"x";',
        b's:99999999999:"x";', b's: 1:"x";', b's:1 :"x";', b's:01', b's:\xb2:"xx";', b"s:1", b's:1:"', b's:5:"x";i:1;',
        b"a:1:{}", b"a:0:{N;}", b"a:0:{", b"a:1:{i:0;N;", b"a:1:{i:0;}", b"a:1:{N;N;}", b"a:1:{d:1;N;}",
        b"a:1:{b:1;N;}",
        b"a:2:{i:0;N;}", b"a:-1:{}", b"a:9999999999:{i:0;N;}", b"a:1:[i:0;N;]", b"a:1:{i:0;N;]", b'O:8:"stdClass":0:{;',
        b"a:1:{a:0:{}N;}",
        b"a:1:{i:9223372036854775808;N;}",
        b"a:1:{r:1;N;}", b"a:1:{i:0;N;}}", b"O:8:stdClass:0:{}", b'O:7:"stdClass":0:{}', b'O:9:"stdClass":0:{}',
        b'O:0:"":0:{}',
        b'O:8:"stdClass":1:{}', b'O:8:"stdClass":1:{N;N;}', b'O:8:"stdClass":1:{s:1:"a";}', b'O:8:"stdClass":-1:{}',
        b'O:8:"stdClass":9999999999:{s:1:"a";N;}', b'O:8:"stdClass":0:{};', b'C:8:"stdClass":0:{}', b'S:1:"x";',
        b"o:0:{}",
        b"d:0,5;", b"\x00", b"\xff" * 10, b"x" * 10000,
    ],
    ids=lambda v: repr(v[:20]),
)  # fmt: skip
def test_malformed(value: bytes) -> None:
    with pytest.raises(SerializationError) as caught:
        value_of(value)
    assert len(str(caught.value)) < 300
    with pytest.raises(SerializationError):
        S.deserialize(value)


@pytest.mark.parametrize("payload", [None, 5, "text", object()])
def test_what_is_no_buffer(payload: Any) -> None:
    with pytest.raises(SerializationError):
        S.deserialize(payload)


def test_announced_lengths_reserve_nothing() -> None:
    tracemalloc = pytest.importorskip("tracemalloc")
    data = any_payload(b'a:1:{i:0;a:2:{i:0;s:2000000000:"x";')
    for value in (b"a:1999999999:{i:0;N;}", b's:1999999999:"x";', b'O:8:"stdClass":1999999999:{s:1:"a";N;}'):
        tracemalloc.start()
        try:
            with pytest.raises(SerializationError, match="more items than fit|length is not what"):
                value_of(value)
            with pytest.raises(SerializationError, match="length is not what"):
                S.deserialize(data)
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


def test_work_is_linear() -> None:
    # Counted, not timed: the tokens looked at are as many as the values and keys.
    item, token = parser._ITEM, parser._TOKEN
    for value in (
        b"a:%d:{" % 1000 + b"".join(b"i:%d;a:1:{i:5;N;}" % i for i in range(1000)) + b"}",
        b"a:%d:{" % 1000 + b"".join(b'i:%d;s:3:"xxx";' % (i * 2) for i in range(1000)) + b"}",
        b"a:1:{i:0;" * 400 + b"N;" + b"}" * 400,
    ):
        looked: List[int] = []

        def counted(function: Any, looked: List[int] = looked) -> Any:
            return lambda text, position=0: (looked.append(position), function(text, position))[1]

        parser._ITEM, parser._TOKEN = counted(item), counted(token)
        try:
            value_of(value)
        finally:
            parser._ITEM, parser._TOKEN = item, token
        assert looked == sorted(set(looked)) and len(looked) < 4100


def test_memory_error_is_a_decode_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(reading, "parse", exhausted)
    with pytest.raises(SerializationError, match="MemoryError"):
        S.deserialize(b"N;")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(error: Any) -> None:
    @dataclass
    class Interrupted(Message, wire_name="test.php.Interrupted"):
        armed: bool = False

        def __post_init__(self) -> None:
            if self.armed:
                raise error

    with pytest.raises(error):
        S.deserialize(b'O:20:"test.php.Interrupted":1:{s:5:"armed";b:1;}')


# --- random ---------------------------------------------------------------------------------------------------


def random_bytes(rng: random.Random) -> bytes:
    return bytes(rng.choice(b'ab";:{}0\x00\xff\xc3\xa9\n') for _ in range(rng.randrange(10)))


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice('ab";:{}\\\x00\n\u00e9\u2028\U0001f600\uffff') for _ in range(rng.randrange(10)))


def random_value(rng: random.Random, shared: List[Any], depth: int = 0) -> Any:
    kind = rng.randrange(14 if depth < 5 else 8)
    if kind == 0:
        return rng.choice([None, True, False, Suit.Hearts, Suit.Spades])
    if kind < 3:
        real = rng.random() * 10 ** rng.randrange(20)
        return rng.choice([0, -1, 2**63 - 1, -(2**63), rng.getrandbits(62), 1.0, -0.0, real])
    if kind < 6:
        return random_text(rng)
    if kind == 6:
        return random_bytes(rng) + b"\xff"  # never UTF-8, so that it arrives as bytes
    if kind == 7 and shared:
        return rng.choice(shared)
    if kind < 10:
        return [random_value(rng, shared, depth + 1) for _ in range(rng.randrange(5))]
    if kind < 12:
        keys = [rng.choice([f"k{random_text(rng)}", rng.randrange(5, 10**9)]) for _ in range(rng.randrange(1, 5))]
        return {key: random_value(rng, shared, depth + 1) for key in keys}
    made: Any = rng.choice([Point, Item, LogMessage])(random_value(rng, shared, depth + 1), rng.random())
    if isinstance(made, LogMessage):
        made = LogMessage(random_text(rng))
    shared.append(made)
    return made


def test_random_round_trips() -> None:
    seed = int(os.environ.get("STREAM_IPC_SEED", random.randrange(2**32)))
    print("STREAM_IPC_SEED =", seed)
    rng = random.Random(seed)
    for _ in range(int(span(2400))):
        message: Any = AnyMessage(random_value(rng, []))
        if rng.random() < 0.3:
            message = ResponseEnvelope(random_text(rng), message)
        for serializer in (S, OLD):
            data = serializer.serialize(message)
            got = serializer.deserialize(data)
            assert same(got, message)
            assert serializer.serialize(got) == data
            assert serializer._format.write_by_walk(*take_out_of_envelope(message)) == data


def test_mutated_payloads() -> None:
    seed = int(os.environ.get("STREAM_IPC_SEED", random.randrange(2**32)))
    print("STREAM_IPC_SEED =", seed)
    rng = random.Random(seed)
    seeds = [bytes.fromhex(e["payload_hex"]) for e in ENCODE.values()]
    seeds += [bytes.fromhex(e["input_hex"])[8:] for e in PAYLOADS.values()]
    seeds += [REQUEST + any_payload(b"a:2:{i:0;" + written([Point(1, 2), 1.5, {"a": None}]) + b"i:1;r:4;}") + b"}"]
    pieces = [b'O:8:"stdClass":', b"a:1:{", b"}", b"r:1;", b"R:2;", b"N;", b"i:0;", b's:1:"', b'";', b"9" * 25]
    pieces += [b"-", b"\0", b"\xff"]
    accepted = longest = 0
    for _ in range(int(os.environ.get("STREAM_IPC_FUZZ", span(6400)))):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data) + 1)
            action = rng.randrange(6)
            if action == 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            elif action == 1:
                data[at:at] = rng.choice(pieces)
            elif action == 2:
                del data[at : at + rng.randrange(1, 8)]
            elif action == 3:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                data[at:at] = other[start : start + rng.randrange(40)]
            elif action == 4:
                digits = [i for i, c in enumerate(data) if 48 <= c <= 57] or [0]
                data[rng.choice(digits) : rng.choice(digits)] = str(rng.choice([0, 1, 2, 5, 511, 10**9, 2**64])).encode()
            else:
                data[at:at] = data[: rng.randrange(60)]
        payload = bytes(data)
        try:
            message = S.deserialize(payload)
        except SerializationError as exc:
            longest = max(longest, len(str(exc)))
            with pytest.raises(SerializationError):
                check_message(read_without_quick_ways(payload))
            continue
        assert same(message, read_without_quick_ways(payload))
        # What is accepted is a message that can be sent on, and arrives as the same.
        accepted += 1
        assert isinstance(message, Message)
        again = S.serialize(message)
        assert S.serialize(S.deserialize(again)) == again
    print("accepted:", accepted)
    assert accepted > 0 and longest < 1000


# --- the rest -------------------------------------------------------------------------------------------------


def test_namespace() -> None:
    with pytest.raises(ValueError, match="namespace must be"):
        PhpMessageSerializer(namespace="App")
    assert OLD.serialize(TaskRequest("x")) == S.serialize(TaskRequest("x"))


def test_payload_types() -> None:
    message = LogMessage("žž")
    data = S.serialize(message)
    assert type(data) is bytes
    for form in (bytes, bytearray, memoryview, lambda d: memoryview(bytearray(b"x" + d + b"x"))[1:-1]):
        assert S.deserialize(form(data)) == message


def test_classes_may_be_defined_again() -> None:
    def define(default: int) -> Any:
        @dataclass
        class Again(Message, wire_name="test.php.Again"):
            a: int = default

        return Again

    payload = b'O:14:"test.php.Again":0:{}'
    first = define(1)
    assert S.deserialize(payload) == first(1)
    second = define(2)
    assert isinstance(S.deserialize(payload), second)
    assert S.deserialize(S.serialize(second(5))) == second(5)


def test_nothing_is_kept_of_unknown_names() -> None:
    for i in range(50):
        with pytest.raises(SerializationError):
            S.deserialize(b'O:6:"gone%02d":0:{}' % i)
    assert not [name for name in reading._classes if "gone" in name]


def test_json_is_not_php() -> None:
    with pytest.raises(SerializationError):
        S.deserialize(json.dumps({"__class": "StreamIpc\\Message\\LogMessage"}).encode())


# -- keys and texts that are not UTF-8


@pytest.mark.parametrize("value", [{b"10": 1, 10: 2}, {b"10": 1, "10": 2}, {b"a": 1, "a": 2}, {b"-5": 1, -5: 2}])
def test_bytes_that_are_the_same_key_to_php(value: Any) -> None:
    with pytest.raises(SerializationError, match="two keys of the dict are one in PHP"):
        PhpMessageSerializer().serialize(AnyMessage(value))


def test_bytes_that_look_like_an_int_are_one_as_a_key() -> None:
    payload = PhpMessageSerializer().serialize(AnyMessage({b"5": 1, b"05": 2, b"\xff": 3}))
    assert b'a:3:{i:5;i:1;s:2:"05";i:2;s:1:"\xff";i:3;}' in payload


def test_an_unknown_class_whose_name_is_not_utf8() -> None:
    payload = b'O:3:"A\xffB":0:{}'
    with pytest.raises(SerializationError, match=r"Unknown class: A\\xffB") as caught:
        PhpMessageSerializer().deserialize(payload)
    str(caught.value).encode()


def test_an_attribute_that_would_be_read_as_another_is_refused() -> None:
    class Anything(Message, wire_name="test.php.Anything"):
        pass

    message = Anything()
    setattr(message, "\0\0t", 1)  # a private property t, to whoever reads it
    with pytest.raises(SerializationError, match=r"an attribute cannot be called '\\x00\\x00t'"):
        S.serialize(message)
    message = Anything()
    setattr(message, "t\0", 1)
    assert vars(S.deserialize(S.serialize(message))) == {"t\0": 1}
