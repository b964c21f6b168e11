from __future__ import annotations

import enum
import gc
import itertools
import json
import os
import random
import re
import sys
import threading
import typing
from dataclasses import InitVar, dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Union

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
from stream_ipc.serializers import json as module
from stream_ipc.serializers.json import JsonMessageSerializer
from stream_ipc.serializers.text_serializer import plain_type
from stream_ipc.serializers.text_writing import MAX_DEPTH

from . import php_messages as php
from .helpers import span
from .php_messages import (
    VECTORS,
    AnyMessage,
    Point,
    StdClass,
    Suit,
    TaskRequest,
    TaskResponse,
    a_cycle,
    nested,
    same,
    to_python,
)

S = JsonMessageSerializer()
OLD = JsonMessageSerializer(namespace="PhpStreamIpc")


@dataclass
class Item:
    name: Any
    price: float = 0.0


register_type(Item, "test.json.Item")


@dataclass
class Cart(Message, wire_name="test.json.Cart"):
    items: Any
    note: str = "none"


def payload(message_class: str, **fields: Any) -> bytes:
    return json.dumps({"__class": message_class, **fields}).encode()


def any_payload(value: str) -> bytes:
    return b'{"__class":"App\\\\Message\\\\AnyMessage","value":' + value.encode("utf-8", "surrogatepass") + b"}"


# --- the vectors ----------------------------------------------------------------------------------------------

ENCODE = {e["name"]: e for e in VECTORS["encode"] if e["serializer"] == "json"}
ENCODE_OTHERWISE = {
    "child": "the original writes a static property, and a child's own properties before its parent's",
    "any_object_dynamic": "the original loses what a stdClass holds",
    "any_date": "the original loses what a date holds",
    "any_closure": "there is no such class here",
    "any_class_key": "a dict with the key __class is refused: it would be taken for an object",
    "any_class_key_known": "the same",
}
DECODE_OTHERWISE = {
    "child": "other fields are written, see above; nothing is read into required ones",
    "any_date": "nothing is read into required fields",
    "any_closure": "there is no such class here, so it stays a dict",
    "any_class_key_known": "arrives as the object that it says it is, as in the original",
    "any_enum": "an enum is read back",
    "any_object_dynamic": "lost by the sender",
}
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?=[,\]}])")


def floats_in(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        return any(map(floats_in, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float)


@pytest.mark.parametrize("name", sorted(set(ENCODE) - set(ENCODE_OTHERWISE)))
def test_encode_vector(name: str) -> None:
    entry = ENCODE[name]
    message = php.build(entry["php_class"], entry["message"], str)
    expected = bytes.fromhex(entry["payload_hex"])
    if floats_in(entry["message"]):
        # The same text but for the numbers, and these have the same value.
        made = S.serialize(message)
        assert NUMBER.sub(b"#", made) == NUMBER.sub(b"#", expected)
        assert [float(n) for n in NUMBER.findall(made)] == [float(n) for n in NUMBER.findall(expected)]
        assert same(S.deserialize(made), message)
    else:
        assert S.serialize(message) == expected


@pytest.mark.parametrize("name", sorted(set(ENCODE) - set(DECODE_OTHERWISE)))
def test_decode_of_encode_vector(name: str) -> None:
    entry = ENCODE[name]
    described = entry.get("decodes_to", entry["message"])
    expected = php.build(entry["php_class"], described, str)
    if name == "any_float_minus_0":
        expected = AnyMessage(0)
    assert same(S.deserialize(bytes.fromhex(entry["payload_hex"])), expected)


def test_the_vectors_that_differ() -> None:
    for name in ("any_class_key", "any_class_key_known"):
        entry = ENCODE[name]
        with pytest.raises(SerializationError, match="__class"):
            S.serialize(php.build(entry["php_class"], entry["message"], str))
    decoded: Dict[str, Any] = {}
    for name in DECODE_OTHERWISE:
        try:
            decoded[name] = S.deserialize(bytes.fromhex(ENCODE[name]["payload_hex"]))
        except SerializationError as exc:
            decoded[name] = str(exc)
    assert decoded["any_enum"] == AnyMessage(Suit.Hearts)
    assert decoded["any_class_key_known"] == AnyMessage(Point(1, 2))
    assert decoded["any_object_dynamic"] == AnyMessage(StdClass())
    assert "'hidden' was not sent" in decoded["child"]
    assert "'date' was not sent" in decoded["any_date"]
    assert decoded["any_closure"] == AnyMessage({"__class": "Closure"})


def test_what_the_original_loses_is_kept() -> None:
    child = php.ChildMessage("h", "s", "t", "o", 3)
    assert S.deserialize(S.serialize(child)) == child
    thing = StdClass()
    thing.a, thing.b = 1, [1]  # type: ignore[attr-defined]
    assert S.serialize(AnyMessage(thing)).endswith(b'"value":{"__class":"stdClass","a":1,"b":[1]}}')
    assert S.deserialize(S.serialize(AnyMessage(thing))) == AnyMessage(thing)


@pytest.mark.parametrize(
    "entry", [e for e in VECTORS["encode_errors"] if e["serializer"] == "json"], ids=lambda e: e["name"]
)
def test_encode_error_vector(entry: Dict[str, Any]) -> None:
    with pytest.raises(SerializationError, match=entry["php_class"].rpartition("\\")[2]):
        S.serialize(php.build(entry["php_class"], entry["message"], str))


@pytest.mark.parametrize(
    "entry", [e for e in VECTORS["legacy_encode"] if e["serializer"] == "json"], ids=lambda e: e["name"]
)
def test_legacy_vector(entry: Dict[str, Any]) -> None:
    message = php.build(entry["php_class"], entry["message"], str)
    data = bytes.fromhex(entry["payload_hex"])
    assert OLD.serialize(message) == data
    assert S.deserialize(data) == message
    assert OLD.deserialize(data) == message
    assert OLD.deserialize(S.serialize(message)) == message


PAYLOADS = {
    e["name"]: e
    for e in VECTORS["decode"]
    if e["serializer"] == "json" and e["kind"] in ("payload", "php_typing") and len(e["expected"]) == 1
}
FAILURES = (
    "json_decode failed:", "Invalid data to unserialize: ", "Unknown class:", "Decoded object is not a Message: ",
    "Failed to unserialize data:", "Failed to deserialize message payload",
)  # fmt: skip
REFUSED = "refused"
PAYLOADS_OTHERWISE: Dict[str, Any] = {
    # What the original makes of a missing field is a property without a value; here defaults apply.
    "json/field_missing": LogMessage("x", "info"),
    "json/field_none": REFUSED,
    "json/envelope_no_id": REFUSED,
    "json/field_default_applies": REFUSED,
    "json/typed_fraction_for_int": REFUSED,
    "json/typed_object_for_array": REFUSED,
    # A PHP array has no empty dict and no keys of digits; a Python dict has.
    "json/any_empty_object": AnyMessage({}),
    "json/any_digit_keys": AnyMessage([{"0": "a", "1": "b"}, {"5": "a", "05": "b"}]),
    # Enums can be read here.
    "json/any_enum_inside": AnyMessage(Suit.Hearts),
    # Names of classes are exact here.
    "json/class_leading_backslash": REFUSED,
    "json/class_other_case": REFUSED,
    # Types of fields are the constructor's affair here; only int becomes float for a field annotated so.
    "json/field_null_for_string": LogMessage(None),  # type: ignore[arg-type]
    "json/field_array_for_string": LogMessage([]),  # type: ignore[arg-type]
    "json/field_int_for_string": LogMessage(5),  # type: ignore[arg-type]
    "json/field_float_for_string": LogMessage(1.5),  # type: ignore[arg-type]
    "json/field_bool_for_string": LogMessage(True, False),  # type: ignore[arg-type]
    "json/typed_from_strings": php.TypedMessage("5", "1.5", "x", "s", [], None),  # type: ignore[arg-type]
    "json/typed_from_floats": php.TypedMessage(5.0, 2.0, 1, "s", [], 7.0),  # type: ignore[arg-type]
    # ... but an id is what replies are matched by.
    "json/envelope_int_id": REFUSED,
}


def test_the_listed_payloads_exist() -> None:
    assert set(PAYLOADS_OTHERWISE) <= set(PAYLOADS)
    assert set(ENCODE_OTHERWISE) | set(DECODE_OTHERWISE) <= set(ENCODE)
    assert len(PAYLOADS) > 55 and len(ENCODE) > 80


@pytest.mark.parametrize("name", sorted(PAYLOADS))
def test_payload_vector(name: str) -> None:
    entry = PAYLOADS[name]
    data = bytes.fromhex(entry["input_hex"])[8:]
    expected = PAYLOADS_OTHERWISE.get(name)
    if expected is None:
        described = entry["expected"][0]
        text = described["fields"].get("errorMessage", "")
        text = text["$starts_with"] if isinstance(text, dict) else text
        if isinstance(text, dict) or text.startswith(FAILURES):
            expected = REFUSED
        else:
            expected = php.build(described["class"], described, str)
    if expected is REFUSED:
        with pytest.raises(SerializationError) as caught:
            S.deserialize(data)
        if name.startswith("json/envelope") and "no_id" not in name and "int_id" not in name:
            assert caught.value.request_id == "1.1"
    else:
        for form in (bytes, bytearray, memoryview):
            assert same(S.deserialize(form(data)), expected)


# --- round trips ----------------------------------------------------------------------------------------------


def random_text(rng: random.Random) -> str:
    alphabet = 'ab"\\/\b\f\n\r\t\x00\x1f\x7f\x85\u00e9\u2028\u2029\ufeff\ud7ff\ue000\uffff\U0001f600\U0010ffff{}[]:,0'
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(14 if depth < 5 else 7)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice([0, -1, 2**63 - 1, -(2**63), 10**18, rng.getrandbits(62), -rng.getrandbits(40)])
    if kind == 2:
        return rng.choice([0.0, -0.0, 1.0, 1e16, 1e300, 5e-324, 1e22, rng.random(), -rng.random() * 10**9])
    if kind < 7:
        return random_text(rng)
    if kind == 7:
        which = rng.randrange(4)
        return [
            (rng.getrandbits(63), random_text(rng), rng.random(), rng.random() < 0.5)[which]
            for _ in range(rng.randrange(15, 30))
        ]
    if kind < 10:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind < 12:
        return {random_text(rng): random_value(rng, depth + 1) for _ in range(rng.randrange(5))}
    if kind == 12:
        return Item(random_value(rng, depth + 1), rng.random())
    return rng.choice([Suit.Hearts, LogMessage(random_text(rng)), Point(1, 2), Cart([], random_text(rng))])


def test_random_round_trips() -> None:
    seed = int(os.environ.get("STREAM_IPC_SEED", random.randrange(2**32)))
    print("STREAM_IPC_SEED =", seed)
    rng = random.Random(seed)
    for _ in range(int(span(2400))):
        message: Any = AnyMessage(random_value(rng))
        if rng.random() < 0.3:
            message = RequestEnvelope(random_text(rng), message)
        for serializer in (S, OLD):
            data = serializer.serialize(message)
            assert same(vars(serializer.deserialize(data)), vars(message))
            # The slow way writes the same, and any JSON reader reads it.
            assert serializer._format.write_by_walk(*take_out_of_envelope(message)) == data
            json.loads(data)


@pytest.mark.slow
def test_mutated_payloads() -> None:
    seed = int(os.environ.get("STREAM_IPC_SEED", random.randrange(2**32)))
    print("STREAM_IPC_SEED =", seed)
    rng = random.Random(seed)
    seeds = [bytes.fromhex(e["payload_hex"]) for e in ENCODE.values() if len(e["payload_hex"]) < 2000]
    pieces = [b'{"__class":', b"[", b"]", b"}", b'"', b"\\", b"\\ud800", b"1e999", b"9" * 30, b",", b":", b"null", b"\xff"]
    for _ in range(int(os.environ.get("STREAM_IPC_FUZZ", 5000))):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) + 1)
            if rng.random() < 0.4:
                data[at:at] = rng.choice(pieces)
            elif rng.random() < 0.5:
                del data[at : at + rng.randrange(1, 8)]
            else:
                data[at : at + 1] = bytes([rng.randrange(256)])
        try:
            message = S.deserialize(bytes(data))
        except SerializationError:
            continue
        assert isinstance(message, Message)
        try:
            again = S.serialize(message)
        except SerializationError:  # an infinity, or "__class": null
            continue
        assert S.serialize(S.deserialize(again)) == again


def test_plain_json_readers_see_the_documented_form() -> None:
    data = json.loads(S.serialize(Cart([Item("a", 1.0), (1, 2)], "n")))
    assert data == {
        "__class": "test.json.Cart",
        "items": [{"__class": "test.json.Item", "name": "a", "price": 1.0}, [1, 2]],
        "note": "n",
    }
    assert list(data) == ["__class", "items", "note"]


def test_tuples_arrive_as_lists() -> None:
    assert S.deserialize(S.serialize(AnyMessage((1, ("x",))))) == AnyMessage([1, ["x"]])


def test_serialize_returns_bytes_and_takes_every_buffer() -> None:
    message = LogMessage("žž")
    data = S.serialize(message)
    assert type(data) is bytes
    for form in (bytes, bytearray, memoryview, lambda d: memoryview(bytearray(b"x" + d + b"x"))[1:-1]):
        assert S.deserialize(form(data)) == message
    big = S.serialize(AnyMessage([{"k": "é"}] * 1000))
    assert S.deserialize(memoryview(big)) == AnyMessage([{"k": "é"}] * 1000)


# --- what may not be sent -------------------------------------------------------------------------------------


class TextSubclass(str):
    pass


class IntSubclass(int):
    pass


class DictSubclass(Dict[str, Any]):
    pass


class ListSubclass(List[Any]):
    pass


class TupleSubclass(NamedTuple):
    a: int


class Level(enum.IntEnum):
    LOW = 1


class Unregistered:
    pass


class BrokenRepr:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"x", r"\[1\]\.name: bytes cannot travel in JSON"),
        (bytearray(b"x"), r"\[1\]\.name: bytearray cannot travel in JSON"),
        (memoryview(b"x"), r"\[1\]\.name: memoryview cannot travel in JSON"),
        (float("nan"), r"\[1\]\.name: nan cannot travel in JSON"),
        ([0, float("-inf")], r"\[1\]\.name\[1\]: -inf cannot travel in JSON"),
        ([0.5] * 20 + [float("inf")], r"\[1\]\.name\[20\]: inf cannot"),
        (2**63, r"\[1\]\.name: an int beyond 64 bits"),
        (-(2**63) - 1, r"\[1\]\.name: an int beyond 64 bits"),
        ([1] * 20 + [2**63], r"\[1\]\.name\[20\]: an int beyond"),
        ([1] * 20 + [-(2**63) - 1], r"\[1\]\.name\[20\]: an int beyond"),
        (10**5000, r"\[1\]\.name: an int beyond"),
        ({5: 1}, r"\[1\]\.name\[5\]: a dict key in JSON must be a str, not an int"),
        ({"a": {None: 1}}, r"\[1\]\.name\['a'\]\[None\]: a dict key .* not a NoneType"),
        ({10**5000: 1}, r"a dict key"),
        ({BrokenRepr(): 1}, r"\[<BrokenRepr>\]: a dict key"),
        ({TextSubclass("k"): 1}, r"a dict key in JSON must be a str, not a TextSubclass"),
        ({"__class": "x"}, r"\[1\]\.name\['__class'\]: a dict with the key \"__class\""),
        ({"a": [{"__class": None}]}, r"\[1\]\.name\['a'\]\[0\]\['__class'\]: a dict with the key"),
        ({1}, r"\[1\]\.name: set cannot travel"),
        (frozenset(), r"\[1\]\.name: frozenset cannot travel"),
        (1j, r"\[1\]\.name: complex cannot travel"),
        ("\ud800", r"\[1\]\.name: text with a lone surrogate \('\\ud800'\) cannot"),
        ({"x\udfff": 1}, r"text with a lone surrogate \('\\udfff'\)"),
        (TextSubclass("x"), r"\[1\]\.name: TextSubclass is a subclass of str"),
        (IntSubclass(1), r"\[1\]\.name: IntSubclass is a subclass of int"),
        (DictSubclass(), r"\[1\]\.name: DictSubclass is a subclass of dict"),
        (ListSubclass(), r"\[1\]\.name: ListSubclass is a subclass of list"),
        (TupleSubclass(1), r"\[1\]\.name: TupleSubclass is a subclass of tuple"),
        (Level.LOW, r"\[1\]\.name: Level is a subclass of int"),
        ([TextSubclass("x")] * 20, r"\[1\]\.name\[0\]: TextSubclass"),
        (Unregistered(), r"\[1\]\.name: .*Unregistered cannot travel: .*register_type"),
        (Unregistered, r"\[1\]\.name: .*type cannot travel"),
        (len, r"\[1\]\.name: .* cannot travel"),
        (iter(x for x in "ab"), r"\[1\]\.name: .*generator cannot travel"),
        (BrokenRepr(), r"\[1\]\.name: .*BrokenRepr cannot travel"),
        (a_cycle(), r"\[1\]\.name\['x'\]\[0\]: contains itself"),
        (nested(600), r"^Cart\.items\[1\]: nested deeper than 511 levels"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refused_at_the_sender_with_its_path(value: Any, text: str) -> None:
    message = Cart(["fine", Item(value)])
    for serializer in (S, OLD):
        for sent in (message, RequestEnvelope("1", message), ResponseEnvelope("1", message)):
            with pytest.raises(SerializationError, match=text) as caught:
                serializer.serialize(sent)
            assert str(caught.value).startswith("Cart.items[1]")
            assert len(str(caught.value)) < 300
            assert caught.value.__suppress_context__


def test_message_cycle_is_refused() -> None:
    message = AnyMessage(None)
    message.value = {"again": message}
    with pytest.raises(SerializationError, match=r"^AnyMessage\.value\['again'\]: contains itself"):
        S.serialize(message)


def test_the_same_object_twice_is_no_cycle() -> None:
    item = Item("x")
    assert S.deserialize(S.serialize(Cart([item, item, [item]]))) == Cart([item, item, [item]])


@pytest.mark.parametrize(
    "value", [5, None, "x", [LogMessage("x")], Point(1, 2), Suit.Hearts, LogMessage, Unregistered()]
)
def test_only_messages_are_sent(value: Any) -> None:
    with pytest.raises(SerializationError, match="only messages can"):
        S.serialize(value)


@pytest.mark.parametrize("identity", [5, None, b"1", "x" * 129, TextSubclass("1"), ["1"]])
@pytest.mark.parametrize("envelope", [RequestEnvelope, ResponseEnvelope])
def test_bad_ids(identity: Any, envelope: Any) -> None:
    with pytest.raises(SerializationError, match="id must be a str of at most 128 characters"):
        S.serialize(envelope(identity, LogMessage("x")))
    field_name = "request" if envelope is RequestEnvelope else "response"
    if isinstance(identity, bytes):
        return
    data = S.serialize(envelope("ID", LogMessage("x"))).replace(b'"ID"', json.dumps(identity).encode())
    if identity == "1":
        assert getattr(S.deserialize(data), field_name) == LogMessage("x")
        return
    with pytest.raises(SerializationError, match="id of an envelope") as caught:
        S.deserialize(data)
    assert caught.value.request_id is None and caught.value.response_id is None


def test_the_longest_id() -> None:
    envelope = RequestEnvelope("é" * 128, LogMessage("x"))
    assert S.deserialize(S.serialize(envelope)) == envelope


@pytest.mark.parametrize("content", [5, None, "x", [], {}, Point(1, 2), Suit.Hearts])
def test_envelopes_hold_messages(content: Any) -> None:
    with pytest.raises(SerializationError, match="must hold a Message"):
        S.serialize(RequestEnvelope("1", content))
    inside = S.serialize(AnyMessage(content))[len('{"__class":"App\\\\Message\\\\AnyMessage","value":') : -1]
    for key in ("request", "response"):
        name = b"StreamIpc\\\\Envelope\\\\" + key.title().encode() + b"Envelope"
        with pytest.raises(SerializationError, match="content of an envelope") as caught:
            S.deserialize(b'{"__class":"' + name + b'","id":"7","' + key.encode() + b'":' + inside + b"}")
        assert (caught.value.request_id, caught.value.response_id) == (("7", None) if key == "request" else (None, "7"))


@pytest.mark.parametrize("envelope", [RequestEnvelope, ResponseEnvelope])
def test_the_path_into_an_envelope_that_a_message_holds(envelope: Any) -> None:
    message = AnyMessage([envelope("1", AnyMessage({1}))])
    for sent in (message, envelope("2", message)):
        with pytest.raises(SerializationError, match=r"^AnyMessage\.value\[0\]\.re\w+\.value: set cannot travel"):
            S.serialize(sent)


def test_a_field_that_is_called_as_the_class_is() -> None:
    @dataclass
    class Odd(Message, wire_name="test.json.Odd"):
        name: int = field(default=1, metadata={"wire_name": "__class"})

    for message in (Odd(), RequestEnvelope("1", Odd()), AnyMessage([Odd()])):
        with pytest.raises(SerializationError, match="^.*: an attribute cannot be called '__class'"):
            S.serialize(message)


def test_a_field_without_a_value() -> None:
    message = LogMessage("x")
    del message.message
    with pytest.raises(SerializationError, match=r"LogMessage\.message: has no value"):
        S.serialize(message)


def test_an_attribute_that_raises() -> None:
    @dataclass
    class Rude(Message, wire_name="test.json.Rude"):
        a: int = 1

        def __getattribute__(self, name: str) -> Any:
            if name == "a":
                raise RuntimeError("no")
            return object.__getattribute__(self, name)

    with pytest.raises(SerializationError, match=r"RuntimeError: no"):
        S.serialize(Rude())


# --- depth ----------------------------------------------------------------------------------------------------


def test_depth_limit() -> None:
    deepest = AnyMessage(nested(MAX_DEPTH - 1))
    data = S.serialize(deepest)
    assert S.serialize(S.deserialize(data)) == data
    with pytest.raises(SerializationError, match="deeper than 511 levels"):
        S.serialize(AnyMessage(nested(MAX_DEPTH)))
    with pytest.raises(SerializationError, match="deeper than 511 levels"):
        S.serialize(RequestEnvelope("1", deepest))
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        with pytest.raises(SerializationError, match="deeper than 511 levels"):
            S.deserialize(any_payload(opening * MAX_DEPTH + "1" + closing * MAX_DEPTH))


def test_depth_of_other_containers() -> None:
    for wrap in (lambda v: [v], lambda v: {"k": v}, lambda v: Item(v), lambda v: (v,), lambda v: AnyMessage(v)):
        value: Any = 1
        for _ in range(MAX_DEPTH - 1):
            value = wrap(value)
        S.deserialize(S.serialize(AnyMessage(value)))
        for limit in (sys.getrecursionlimit(), 5000):  # also where the quick way has all the stack it wants
            before = sys.getrecursionlimit()
            sys.setrecursionlimit(limit)
            try:
                with pytest.raises(SerializationError, match="deeper than 511"):
                    S.serialize(AnyMessage(wrap(value)))
            finally:
                sys.setrecursionlimit(before)


def test_depth_of_an_enum() -> None:
    class Tone(enum.Enum):
        HIGH = 1

    register_type(Tone, "test.json.Tone")
    deepest: Any = Tone.HIGH
    for _ in range(MAX_DEPTH - 2):
        deepest = [deepest]
    message = AnyMessage(deepest)
    assert S.deserialize(S.serialize(message)) == message
    with pytest.raises(SerializationError, match=r"^AnyMessage\.value\[0\]: nested deeper than 511 levels$"):
        S.serialize(AnyMessage([deepest]))  # an object more, which no side could read


def test_many_brackets_are_not_depth() -> None:
    wide = AnyMessage([[[]], {}] * 5000 + ["]]]]]}}}}\\", '"{[', "\\\\"] * 100)
    assert S.deserialize(S.serialize(wide)) == wide
    text = AnyMessage("[" * 5000)
    assert S.deserialize(S.serialize(text)) == text
    # Closing brackets in texts do not hide the depth.
    hidden = any_payload('["' + "]" * 600 + '",' + "[" * 520 + "]" * 520 + "]")
    with pytest.raises(SerializationError, match="deeper"):
        S.deserialize(hidden)
    escaped = any_payload('["\\"' + "]" * 600 + '\\\\",' + "[" * 520 + "]" * 520 + "]")
    with pytest.raises(SerializationError, match="deeper"):
        S.deserialize(escaped)


def test_depth_without_payload() -> None:
    with pytest.raises(SerializationError):
        S.deserialize(b'"' + b"[" * 2000 + b'"')


def at_depth(frames: int, action: Any) -> Any:
    return action() if frames == 0 else at_depth(frames - 1, action)


def test_a_deep_message_is_written_on_a_full_stack() -> None:
    message = AnyMessage(nested(MAX_DEPTH - 1))
    expected = S.serialize(message)
    depth = 0
    frame: Any = sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    assert at_depth(sys.getrecursionlimit() - depth - 60, lambda: S.serialize(message)) == expected


def test_recursion_while_reading_is_a_decode_error() -> None:
    data = any_payload("[" * 500 + "]" * 500)
    depth = 0
    frame: Any = sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back

    def read() -> Optional[str]:
        try:
            S.deserialize(data)
        except SerializationError as exc:
            return str(exc)
        return None  # 3.12 on: the scanner has a stack of its own

    assert at_depth(sys.getrecursionlimit() - depth - 60, read) in ("payload is nested too deeply", None)


@pytest.mark.parametrize("error", [MemoryError, RecursionError, ZeroDivisionError])
def test_errors_of_constructors_are_decode_errors(error: Any) -> None:
    @dataclass
    class Failing(Message, wire_name="test.json.Failing"):
        a: int = 1

        def __post_init__(self) -> None:
            if self.a:
                raise error("boom")

    with pytest.raises(SerializationError, match="boom") as caught:
        S.deserialize(
            b'{"__class":"StreamIpc\\\\Envelope\\\\RequestEnvelope","id":"5",'
            b'"request":{"__class":"test.json.Failing","a":1}}'
        )
    assert caught.value.request_id == "5"
    assert isinstance(caught.value.__cause__, error)


def test_memory_error_of_the_scanner_is_a_decode_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(text: str, start: int) -> Any:
        raise MemoryError

    monkeypatch.setattr(module, "_scan", exhausted)
    with pytest.raises(SerializationError, match="memory"):
        S.deserialize(b"{}")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(error: Any) -> None:
    @dataclass
    class Interrupted(Message, wire_name="test.json.Interrupted"):
        armed: bool = False

        def __post_init__(self) -> None:
            if self.armed:
                raise error

    with pytest.raises(error):
        S.deserialize(payload("test.json.Interrupted", armed=True))


# --- strict reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"", b" ", b"\xef\xbb\xbf{}", b"{", b'{"a"', b"[1,]", b'{"a":1,}', b"{'a':1}", b"nul", b"01", b"1.", b".5",
        b"+1", b"0x10", b"1_000", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b'"\\x41"', b'"\\u12"', b"//x\n1",
        b"NaN", b"Infinity",
        '{"__class":"x"}'.encode("utf-16"), '{"__class":"x"}'.encode("utf-32"), b"\x00", b"1 2", b"{}\x00", b"\x0c{}",
        "\u00a0{}".encode(),
    ],
)  # fmt: skip
def test_not_json(data: bytes) -> None:
    with pytest.raises(SerializationError, match="^payload is not JSON: "):
        S.deserialize(data)


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "[NaN]", '"\\ud800"', '"\\udc00"', '"\\uDFFF\\uD800"', '{"\\ud800":1}',
     '"\\ud83d \\ude00"', '"\\\\\\ud800"', '"a\tb"', '"a\x00b"', '"a\x1fb"', '"\ud800"', "1}}", "1,", "\u0661"],
)  # fmt: skip
def test_refused_values(value: str) -> None:
    with pytest.raises(SerializationError, match="^payload is not JSON: "):
        S.deserialize(any_payload(value))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ('"\\\\ud800"', "\\ud800"),
        ('"\\u00e9\\/\\b"', "é/\b"),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("9223372036854775808", float(2**63)),
        ("-9223372036854775809", -float(2**63)),
        ("[" + "9" * 5000 + "]", [float("inf")]),
        ("-" + "9" * 5000, float("-inf")),
        ("1e400", float("inf")),
        ("-1e400", float("-inf")),
        ("1" + "0" * 20, 1e20),
        ("[" + ",".join(["18446744073709551616"] * 300) + "]", [2.0**64] * 300),
        ("[" + ",".join(["123456789012345678"] * 300) + "]", [123456789012345678] * 300),
        ("-0", 0),
        ("-0.0", -0.0),
        ("1E2", 100.0),
        ('{"a":1,"a":2}', {"a": 2}),
        ('{"__class":null,"x":1}', {"__class": None, "x": 1}),
        (" [ ] ", []),
    ],
    ids=lambda v: repr(v)[:20],
)
def test_accepted_values(value: str, expected: Any) -> None:
    message = S.deserialize(b" \r\n\t" + any_payload(value) + b"\n")
    assert isinstance(message, AnyMessage)
    assert same(message.value, expected)


@pytest.mark.parametrize("name", ["5", "true", "1.5", "[]", '["test.json.Cart"]', '{"a":1}', '""', '"nope"'])
def test_class_names_that_are_none(name: str) -> None:
    with pytest.raises(SerializationError, match="Unknown class"):
        S.deserialize(b'{"__class":' + name.encode() + b"}")
    nested = any_payload('[{"__class":' + name + "}]")
    if name[0] == '"':
        assert S.deserialize(nested) == AnyMessage([{"__class": json.loads(name)}])
    else:  # no name at all, which the original refuses too
        with pytest.raises(SerializationError, match="Unknown class: the name of a class must be text, not an? "):
            S.deserialize(nested)


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "subprocess.Popen", "dataclasses.dataclass", "stream_ipc.messages.Message",
             "StreamIpc\\Message\\Message", "__main__.X", "test.json.Unregistered"],
)  # fmt: skip
def test_only_registered_classes(name: str) -> None:
    before = set(sys.modules)
    with pytest.raises(SerializationError, match="Unknown class"):
        S.deserialize(payload(name, command="true"))
    with pytest.raises(SerializationError, match="Unknown class"):
        S.deserialize(payload("StreamIpc\\Envelope\\RequestEnvelope", id="1", request={"__class": name}))
    assert S.deserialize(any_payload(json.dumps({"__class": name}))) == AnyMessage({"__class": name})
    assert set(sys.modules) == before


UNKNOWN = {"__class": "No\\Such", "x": 1}
POINT = {"__class": "App\\Message\\Point", "x": 1, "y": 2}


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (UNKNOWN, UNKNOWN),
        ({"__class": "No.Such"}, {"__class": "No.Such"}),
        ([UNKNOWN, POINT], [UNKNOWN, Point(1, 2)]),
        ({"a": {"b": [UNKNOWN]}, "c": POINT}, {"a": {"b": [UNKNOWN]}, "c": Point(1, 2)}),
        # What is in it stays plain data, as in the original.
        ({"__class": "No\\Such", "in": [POINT]}, {"__class": "No\\Such", "in": [POINT]}),
        ({"__class": "App\\Message\\Point", "x": UNKNOWN, "y": []}, Point(UNKNOWN, [])),  # type: ignore[arg-type]
        ({"__class": "App\\Message\\Suit", "name": "Hearts", "in": UNKNOWN}, Suit.Hearts),
        ([UNKNOWN, {"__class": None}], [UNKNOWN, {"__class": None}]),
        ([UNKNOWN, 2**64, 5], [UNKNOWN, float(2**64), 5]),
    ],
    ids=lambda v: repr(v)[:30],
)  # fmt: skip
def test_objects_of_unknown_classes_stay_dicts(sent: Any, expected: Any) -> None:
    data = any_payload(json.dumps(sent))
    assert same(S.deserialize(data), AnyMessage(expected))
    envelope = b'{"__class":"StreamIpc\\\\Envelope\\\\ResponseEnvelope","id":"7","response":' + data + b"}"
    assert same(S.deserialize(envelope), ResponseEnvelope("7", AnyMessage(expected)))
    with pytest.raises(SerializationError, match="Unknown class: No|not a message"):
        S.deserialize(json.dumps(sent).encode())


def test_what_is_beside_an_unknown_class_is_still_checked() -> None:
    for other in ('{"__class":"test.json.Cart"}', '{"__class":5}', '{"__class":[1]}'):
        with pytest.raises(SerializationError, match="required field|must be text"):
            S.deserialize(any_payload('[{"__class":"No"},' + other + "]"))
    deep = "[" * (MAX_DEPTH - 2) + '{"__class":"No"}' + "]" * (MAX_DEPTH - 2)
    assert isinstance(S.deserialize(any_payload(deep)), AnyMessage)
    with pytest.raises(SerializationError, match="nested deeper"):
        S.deserialize(any_payload(f"[{deep}]"))


def test_a_class_that_becomes_known() -> None:
    data = any_payload('{"__class":"test.json.Later","a":1}')
    assert S.deserialize(data) == AnyMessage({"__class": "test.json.Later", "a": 1})

    @register_type(wire_name="test.json.Later")
    @dataclass
    class Later:
        a: int

    assert S.deserialize(data) == AnyMessage(Later(1))


def test_what_is_no_json_says_where() -> None:
    for data, text in (
        (b' \n{} 5', "something follows the value at character 5"),
        (b"\t\t[1, 2}", r"line 1 column 8 \(char 7\)"),
        (b'\n\n {"a": x}', r"line 3 column 8 \(char 9\)"),
        (b'  {"__class": "No"} ]', "something follows the value at character 20"),
    ):
        with pytest.raises(SerializationError, match=text):
            S.deserialize(data)


def test_unknown_class_in_a_request_says_whose() -> None:
    data = payload("StreamIpc\\Envelope\\RequestEnvelope", id="4.2", request={"__class": "Gone", "a": [1]})
    with pytest.raises(SerializationError, match="Unknown class: Gone") as caught:
        S.deserialize(data)
    assert caught.value.request_id == "4.2" and caught.value.response_id is None
    data = payload("PhpStreamIpc\\Envelope\\ResponseEnvelope", response={"__class": "Gone"}, id="4.3")
    with pytest.raises(SerializationError) as caught:
        S.deserialize(data)
    assert caught.value.request_id is None and caught.value.response_id == "4.3"


REQUEST_HEAD = b'{"__class":"StreamIpc\\\\Envelope\\\\RequestEnvelope","id":"4.2","request":'


@pytest.mark.parametrize(
    "rest",
    [b"", b"{", b"NaN}", b'"\xff"}', b'"\\ud800"}', b"[" * 100000, any_payload("NaN") + b"}",
     b'{"__class":"App\\\\Message\\\\AnyMessage","value":' + b"[" * 600 + b"]" * 600 + b"}}",
     payload("App\\Message\\AnyMessage") + b"}", payload("App\\Message\\TaskRequest", job=5) + b"}", b"null}x"],
    ids=lambda b: repr(b[:20]),
)  # fmt: skip
def test_the_id_is_saved_from_broken_requests(rest: bytes) -> None:
    with pytest.raises(SerializationError) as caught:
        S.deserialize(REQUEST_HEAD + rest)
    assert caught.value.request_id == "4.2"
    with pytest.raises(SerializationError) as caught:
        S.deserialize(memoryview(REQUEST_HEAD.replace(b"request", b"response").replace(b"Request", b"Response") + rest))
    assert caught.value.response_id == "4.2" and caught.value.request_id is None


@pytest.mark.parametrize("identity", [b'"' + b"x" * 129 + b'"', b'"\\ud800"', b"5", b"null", b"[]"])
def test_bad_ids_are_not_saved(identity: bytes) -> None:
    with pytest.raises(SerializationError) as caught:
        S.deserialize(REQUEST_HEAD.replace(b'"4.2"', identity) + b"5}")
    assert caught.value.request_id is None and caught.value.response_id is None


def test_error_texts_are_short() -> None:
    for data in (payload("x" * 100000), b"x" * 100000, any_payload("{" + "x" * 100000), b"[" * 100000):
        with pytest.raises(SerializationError) as caught:
            S.deserialize(data)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [None, 5, "text", object()])
def test_what_is_no_buffer(value: Any) -> None:
    with pytest.raises(SerializationError):
        S.deserialize(value)


# --- building -------------------------------------------------------------------------------------------------


def test_defaults_unknown_and_missing_fields() -> None:
    assert S.deserialize(payload("test.json.Cart", items=[])) == Cart([], "none")
    assert S.deserialize(payload("test.json.Cart", other=1, items=[], __init__=5)) == Cart([], "none")
    with pytest.raises(SerializationError, match="required field 'items' was not sent"):
        S.deserialize(payload("test.json.Cart", note="x"))


def test_constructors_are_called_once() -> None:
    calls = []

    @dataclass
    class Counted(Message, wire_name="test.json.Counted"):
        a: int
        b: int = 2

        def __post_init__(self) -> None:
            calls.append(self.a)
            if self.a < 0:
                raise ValueError("negative")

    S.deserialize(payload("test.json.Counted", a=1, b=1))
    S.deserialize(payload("test.json.Counted", a=2))
    for data in (payload("test.json.Counted", a=-1, b=1), payload("test.json.Counted", a=-2)):
        with pytest.raises(SerializationError, match="ValueError: negative"):
            S.deserialize(data)
    assert calls == [1, 2, -1, -2]
    counted = '{"__class":"test.json.Counted","a":%d}'
    S.deserialize(any_payload(f'[{counted % 3},{{"__class":"No","in":{counted % 4}}},{counted % 5}]'))
    assert calls[4:] == [3, 5]


def test_a_constructor_that_raises_key_error() -> None:
    @dataclass
    class Keyed(Message, wire_name="test.json.Keyed"):
        a: int

        def __post_init__(self) -> None:
            raise KeyError("a")

    with pytest.raises(SerializationError, match="KeyError"):
        S.deserialize(payload("test.json.Keyed", a=1))


def test_wire_names_of_fields() -> None:
    @dataclass
    class Renamed(Message, wire_name="test.json.Renamed"):
        python_name: int = field(metadata={"wire_name": "phpName{}"})
        other: int = field(default=5, metadata={"wire_name": 'o"\\ther'})

    data = S.serialize(Renamed(1))
    assert data == b'{"__class":"test.json.Renamed","phpName{}":1,"o\\"\\\\ther":5}'
    assert S.deserialize(data) == Renamed(1)
    assert S.deserialize(payload("test.json.Renamed", **{"phpName{}": 7})) == Renamed(7)
    with pytest.raises(SerializationError, match=r"Renamed\.python_name: bytes"):
        S.serialize(Renamed(b""))  # type: ignore[arg-type]


def test_constructors_of_other_shapes() -> None:
    @dataclass
    class WithInitVar(Message, wire_name="test.json.WithInitVar"):
        first: InitVar[int]
        second: int = 2

        def __post_init__(self, first: int) -> None:
            self.got = first

    with pytest.raises(SerializationError, match="WithInitVar"):
        S.deserialize(payload("test.json.WithInitVar", second=3))

    @dataclass(init=False)
    class OwnInit(Message, wire_name="test.json.OwnInit"):
        a: int
        b: int

        def __init__(self, b: int, a: int = 0) -> None:
            self.a, self.b = a, b

    assert S.deserialize(S.serialize(OwnInit(1, 2))) == OwnInit(1, 2)

    @dataclass
    class OwnNew(Message, wire_name="test.json.OwnNew"):
        a: int

        def __new__(cls, *, a: int) -> Any:
            return object.__new__(cls)

    assert S.deserialize(S.serialize(OwnNew(a=1))) == OwnNew(a=1)

    @dataclass(frozen=True)
    class Frozen(Message, wire_name="test.json.Frozen"):
        a: int
        hidden: int = field(init=False, default=9)

    assert S.serialize(Frozen(1)) == b'{"__class":"test.json.Frozen","a":1}'
    assert S.deserialize(S.serialize(Frozen(1))) == Frozen(1)

    @dataclass
    class Empty(Message, wire_name="test.json.Empty"):
        pass

    assert S.serialize(Empty()) == b'{"__class":"test.json.Empty"}'
    assert S.deserialize(payload("test.json.Empty", a=1)) == Empty()

    class Open(Message, wire_name="test.json.Open"):
        pass

    thing = Open()
    thing.a, thing.b = [1], "x"  # type: ignore[attr-defined]
    assert S.serialize(thing) == b'{"__class":"test.json.Open","a":[1],"b":"x"}'
    assert vars(S.deserialize(S.serialize(thing))) == {"a": [1], "b": "x"}
    thing.a = [b""]  # type: ignore[attr-defined]
    with pytest.raises(SerializationError, match=r"^Open\.a\[0\]: bytes"):
        S.serialize(thing)
    thing.a = []  # type: ignore[attr-defined]
    vars(thing)["__class"] = "test.json.Cart"
    with pytest.raises(SerializationError, match="cannot be called '__class'"):
        S.serialize(thing)


def test_keyword_only_and_slots() -> None:
    @dataclass(kw_only=True, slots=True)
    class Modern(Message, wire_name="test.json.Modern"):
        a: int
        b: str = "b"

    assert S.deserialize(S.serialize(Modern(a=1, b="c"))) == Modern(a=1, b="c")
    assert S.deserialize(payload("test.json.Modern", a=1)) == Modern(a=1)


def test_keyword_only_in_between() -> None:
    @dataclass
    class Between(Message, wire_name="test.json.Between"):
        a: int = field(kw_only=True)
        b: int

    assert S.deserialize(S.serialize(Between(2, a=1))) == Between(2, a=1)


def test_named_tuples_and_enums() -> None:
    @register_type(wire_name="test.json.Pair")
    class Pair(NamedTuple):
        a: int
        b: Any = None

    @register_type(wire_name="test.json.Colour")
    class Colour(enum.Enum):
        RED = enum.auto()
        ALSO_RED = 1
        ODD = ("a", 1)

    @register_type(wire_name="test.json.Kind")
    class Kind(str, enum.Enum):
        A = "a/\u2028"

    @register_type(wire_name="test.json.Rights")
    class Rights(enum.Flag):
        READ = 1
        WRITE = 2

    everything: List[Any] = [Pair(1, [2]), Colour.RED, Colour.ALSO_RED, Colour.ODD, Kind.A]
    everything += [Rights.READ, Rights.READ | Rights.WRITE, Rights(0)]
    got = S.deserialize(S.serialize(AnyMessage(everything)))
    assert got == AnyMessage(everything)
    assert isinstance(got, AnyMessage) and [type(v) for v in got.value] == [type(v) for v in everything]
    assert b'{"__class":"test.json.Colour","name":"RED","value":1}' in S.serialize(AnyMessage(Colour.RED))
    assert b'{"__class":"test.json.Colour","name":"ODD"}' in S.serialize(AnyMessage(Colour.ODD))
    assert S.deserialize(any_payload('{"__class":"test.json.Pair","a":1}')) == AnyMessage(Pair(1))
    for bad in ('"name":"BLUE"', '"name":"__class__"', '"name":["RED"]', '"value":1', '"name":null', '"x":1'):
        with pytest.raises(SerializationError, match="has no member .*add it to the enum"):
            S.deserialize(any_payload('{"__class":"test.json.Colour",' + bad + "}"))
    with pytest.raises(SerializationError, match="has no member 4096; add it to the enum"):
        S.deserialize(any_payload('{"__class":"test.json.Rights","value":4096}'))


def test_classes_may_be_defined_again() -> None:
    def define(default: int) -> Any:
        @dataclass
        class Again(Message, wire_name="test.json.Again"):
            a: int = default

        return Again

    first = define(1)
    assert S.deserialize(payload("test.json.Again")) == first(1)
    assert S.deserialize(S.serialize(first(3))) == first(3)
    second = define(2)
    assert isinstance(S.deserialize(payload("test.json.Again")), second)
    assert S.deserialize(payload("test.json.Again")) == second(2)
    register_type(second, "test.json.AgainUnderAnotherName")
    assert S.serialize(second(1)) == payload("test.json.AgainUnderAnotherName", a=1).replace(b" ", b"")


@dataclass
class Floats(Message, wire_name="test.json.Floats"):
    a: float
    b: Optional[float] = None
    c: Any = 1
    d: int = 1
    e: List[float] = field(default_factory=list)


def test_ints_for_floats() -> None:
    got = S.deserialize(payload("test.json.Floats", a=1, b=2, c=3, d=4, e=[5]))
    assert same(got, Floats(1.0, 2.0, 3, 4, [5]))
    assert same(S.deserialize(payload("test.json.Floats", a=1)), Floats(1.0))
    assert same(S.deserialize(payload("test.json.Floats", a=True, b=None)), Floats(True))
    assert same(S.deserialize(S.serialize(Floats(1, 2))), Floats(1.0, 2.0))


@dataclass
class Maps(Message, wire_name="test.json.Maps"):
    a: Dict[str, Any]
    b: Optional[Dict[str, Any]] = None
    c: Any = None
    d: List[Any] = field(default_factory=list)


def test_the_empty_array_of_the_original_for_dicts() -> None:
    assert S.deserialize(payload("test.json.Maps", a=[], b=[], c=[], d=[])) == Maps({}, {}, [], [])
    assert S.deserialize(payload("test.json.Maps", a=[])) == Maps({})
    assert S.deserialize(payload("test.json.Maps", a=[1])) == Maps([1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (float, "float"), ("float", "float"), ("'float'", "float"), ("Optional[float]", "float"),
        ("typing.Optional[float]", "float"), ("t.Optional[ float ]", "float"), ("float | None", "float"),
        ("None|float", "float"), ("Union[float, None]", "float"), ("Union[None, float]", "float"),
        (Optional[float], "float"), (Union[None, float], "float"), (Optional[bytes], "bytes"), ("str", "str"),
        (List[float], ""), ("List[float]", ""), ("Union[float, str]", ""), ("float | str", ""), ("Any", ""),
        ("Dict[str, float]", "dict"), (None, ""), ("x.float", ""), ("", ""), ("Optional[" * 100, ""),
        (typing.Union[float, str], ""), (dict, "dict"), ("Dict[str, List[int]]", "dict"), (Dict[str, int], "dict"),
        ("Optional[Mapping[str, int]]", "dict"), (typing.Mapping[str, int], "dict"), ("dict[str, int] | None", "dict"),
        (Optional[Dict[str, int]], "dict"), ("collections.abc.Mapping[str, int]", "dict"), (Point, ""),
        ("List[Dict[str, int]]", ""), ("bytearray", "bytearray"), ("dict[str, int] | str", ""),
        ("Tuple[float, None]", ""),
    ],
)  # fmt: skip
def test_plain_type(annotation: Any, name: str) -> None:
    assert plain_type(annotation) == name


def test_plain_type_of_newer_annotations() -> None:
    assert plain_type(list[float]) == ""
    assert plain_type(float | None) == "float"
    assert plain_type(float | str) == ""


def test_annotations_are_not_evaluated() -> None:
    @dataclass
    class Sly(Message, wire_name="test.json.Sly"):
        a: "print('evaluated') or float"  # type: ignore  # noqa
        b: "NoSuchName"  # type: ignore  # noqa

    assert S.deserialize(S.serialize(Sly(1, 2))) == Sly(1, 2)


# --- the rest -------------------------------------------------------------------------------------------------


def test_namespace() -> None:
    with pytest.raises(ValueError, match="namespace must be"):
        JsonMessageSerializer(namespace="App")
    with pytest.raises(TypeError):
        JsonMessageSerializer("StreamIpc")  # type: ignore[call-arg]
    message = ResponseEnvelope("1", ErrorMessage("a/é\U0001f600\x7f"))
    data = OLD.serialize(message)
    assert data == (
        b'{"__class":"PhpStreamIpc\\\\Envelope\\\\ResponseEnvelope","id":"1","response":'
        b'{"__class":"PhpStreamIpc\\\\Message\\\\ErrorMessage","errorMessage":"a\\/\\u00e9\\ud83d\\ude00\x7f"}}'
    )
    assert OLD.deserialize(data) == message == S.deserialize(data)
    assert OLD.serialize(TaskRequest("x")) == S.serialize(TaskRequest("x"))


def test_error_messages_are_not_trimmed_on_reading() -> None:
    got = S.deserialize(payload("StreamIpc\\Message\\ErrorMessage", errorMessage=" x\n"))
    assert isinstance(got, ErrorMessage) and got.message == " x\n"


def test_linear_time() -> None:
    # Counted, not timed: how often our code is called per object does not grow with the message.
    def calls(n: int) -> int:
        counter = itertools.count()

        def trace(frame: Any, event: str, arg: Any) -> None:
            if event == "call":
                next(counter)

        message = Cart([Item("x" * 10, 1.5), {"a": [1, "b"]}] * n)
        threading.current_thread()
        sys.setprofile(trace)
        try:
            S.deserialize(S.serialize(message))
        finally:
            sys.setprofile(None)
        return next(counter)

    calls(1)
    assert calls(1000) < 11 * calls(100)


def test_nothing_is_left_behind() -> None:
    S.deserialize(S.serialize(RequestEnvelope("1", TaskRequest("x"))))
    for i in range(50):
        with pytest.raises(SerializationError):
            S.deserialize(payload(f"unknown{i}"))
    assert not [name for name in module._builders if "unknown" in name]
    gc.collect()


def test_requests_and_responses() -> None:
    assert S.deserialize(S.serialize(RequestEnvelope("1", TaskRequest("x")))) == RequestEnvelope("1", TaskRequest("x"))
    reply = ResponseEnvelope("1", TaskResponse("y"))
    assert S.deserialize(S.serialize(reply)) == reply


def test_to_python_reads_what_the_vectors_use() -> None:
    with pytest.raises(LookupError):
        to_python({"$unknown": 1})


@pytest.mark.parametrize(
    ("payload", "looks"),
    [(b'O:4:"Gone":0:{}', "PHP's format"), (b"N;", "PHP's format"), (b"\x80\x05K\x05.", "a pickle"), (b"junk", ""),
     (b'{"a"', ""), (b"", "")],
)  # fmt: skip
def test_payloads_of_another_serializer(payload: bytes, looks: str) -> None:
    with pytest.raises(SerializationError) as caught:
        S.deserialize(payload)
    end = f"; it looks like {looks}: do both sides use the same serializer?"
    assert str(caught.value).endswith(end) if looks else "looks like" not in str(caught.value)


def test_an_unknown_class_of_php() -> None:
    with pytest.raises(SerializationError, match=r"^Unknown class: App\\Gone \(import a class with this wire_name on this"):
        S.deserialize(b'{"__class":"App\\\\Gone"}')
