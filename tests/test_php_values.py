"""PHP's own value classes: ``stdClass`` in both formats, ``DateTime`` and ``DateTimeImmutable`` in PHP's."""

from __future__ import annotations

import json
import subprocess
import sys
import zoneinfo
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any, Iterator, List, Tuple

import pytest

from stream_ipc import registry
from stream_ipc.errors import SerializationError
from stream_ipc.messages import Message, RequestEnvelope
from stream_ipc.serializers.json import JsonMessageSerializer
from stream_ipc.serializers.php import PhpMessageSerializer

from .test_php import PHP, ROOT, with_php

JSON = JsonMessageSerializer()
S = PhpMessageSerializer()
NAMES = ("stdClass", "DateTime", "DateTimeImmutable")


@dataclass
class Note(Message, wire_name="test.values.Note"):
    value: Any = None
    other: Any = None


def forget() -> None:
    """Let the serializers look up each class again."""

    class Changed(Message, wire_name="test.values.Changed"):
        pass


@pytest.fixture(autouse=True)
def not_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Other tests register classes of these names.
    lookup = registry.lookup
    monkeypatch.setattr(registry, "lookup", lambda name: lookup("none" if name in NAMES else name))
    forget()
    yield
    monkeypatch.undo()
    forget()


def php(value: bytes) -> Any:
    note: Any = S.deserialize(b'O:16:"test.values.Note":2:{s:5:"value";' + value + b's:5:"other";N;}')
    return note.value


def text(value: str) -> bytes:
    return b's:%d:"%s";' % (len(value.encode()), value.encode())


def date(when: str, kind: int, zone: str, cls: str = "DateTimeImmutable") -> bytes:
    fields = text("date") + text(when) + text("timezone_type") + b"i:%d;" % kind + text("timezone") + text(zone)
    return b'O:%d:"%s":3:{%s}' % (len(cls), cls.encode(), fields)


def same(a: Any, b: Any) -> bool:
    """Whether they are equal, offsets and types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, datetime):
        return (a.replace(tzinfo=None), a.utcoffset()) == (b.replace(tzinfo=None), b.utcoffset())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
    return bool(a == b)


# --- stdClass -------------------------------------------------------------------------------------------------

EMPTY = b'O:8:"stdClass":0:{}'
FULL = b'O:8:"stdClass":2:{s:1:"a";i:1;s:1:"b";a:1:{i:0;i:1;}}'


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (EMPTY, {}),
        (FULL, {"a": 1, "b": [1]}),
        (b"a:2:{i:0;" + EMPTY + b"i:1;" + FULL + b"}", [{}, {"a": 1, "b": [1]}]),
        (b'a:1:{s:1:"k";' + FULL + b"}", {"k": {"a": 1, "b": [1]}}),
        (b'O:8:"stdClass":1:{s:2:"in";' + EMPTY + b"}", {"in": {}}),
        (b'O:8:"stdClass":1:{s:2:"10";i:1;}', {"10": 1}),  # properties have names, no numbers
        (b'O:8:"stdClass":1:{i:10;i:1;}', {"10": 1}),
        ('O:8:"stdClass":1:{s:2:"é";i:1;}'.encode(), {"é": 1}),
        (b'O:8:"stdClass":1:{s:1:"\xff";i:1;}', {"\udcff": 1}),
        (b'O:8:"stdClass":1:{s:7:"__class";s:1:"x";}', {"__class": "x"}),
    ],
)
def test_std_class(sent: bytes, expected: Any) -> None:
    assert same(php(sent), expected)


def test_std_class_that_occurs_twice_is_one_dict() -> None:
    first, second = php(b"a:2:{i:0;" + FULL + b"i:1;r:3;}")
    assert first == {"a": 1, "b": [1]} and first is second
    # As often as one likes: nothing is copied.
    rows = php(b"a:501:{i:0;" + FULL + b"".join(b"i:%d;r:3;" % i for i in range(1, 501)) + b"}")
    assert all(row is rows[0] for row in rows)
    (first,), (second,) = php(b"a:2:{i:0;a:1:{i:0;" + FULL + b"}i:1;R:3;}")
    assert first is second


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"__class": "stdClass"}, {}),
        ({"__class": "stdClass", "a": 1, "b": [1]}, {"a": 1, "b": [1]}),
        ([{"__class": "stdClass"}], [{}]),
        ({"k": {"__class": "stdClass", "in": {"__class": "stdClass"}}}, {"k": {"in": {}}}),
        ({"__class": "DateTime"}, {"__class": "DateTime"}),  # what the original makes of a date
        ([{"__class": "stdClass", "in": {"__class": "DateTime"}}], [{"in": {"__class": "DateTime"}}]),
    ],
)
def test_std_class_in_json(sent: Any, expected: Any) -> None:
    payload = json.dumps({"__class": "test.values.Note", "value": sent}).encode()
    assert JSON.deserialize(payload) == Note(expected)


def test_std_class_in_json_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: List[Any] = []
    lookup = registry.lookup

    def count(name: Any) -> Any:
        looked_up.append(name)
        return lookup(name)

    monkeypatch.setattr(registry, "lookup", count)
    forget()
    payload = json.dumps({"__class": "test.values.Note", "value": [{"__class": "stdClass", "a": 1}] * 3}).encode()
    assert JSON.deserialize(payload) == Note([{"a": 1}] * 3)
    assert looked_up.count("stdClass") == 1


def test_a_std_class_is_no_message() -> None:
    for serializer, payload in ((S, FULL), (JSON, b'{"__class":"stdClass","a":1}')):
        with pytest.raises(SerializationError, match="^payload is not a message but a dict$"):
            serializer.deserialize(payload)
    request = S.serialize(RequestEnvelope("7", Note())).partition(b"O:16:")[0]
    with pytest.raises(SerializationError, match="^the content of an envelope is not a message but a dict$") as caught:
        S.deserialize(request + EMPTY + b"}")
    assert caught.value.request_id == "7"


def test_registered_classes_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    @registry.register_type(wire_name="test.values.Own")
    @dataclass
    class Own:
        a: int

    lookup = registry.lookup
    monkeypatch.setattr(registry, "lookup", lambda name: lookup("test.values.Own" if name == "stdClass" else name))
    forget()
    assert php(b'O:8:"stdClass":1:{s:1:"a";i:1;}') == Own(1)
    assert JSON.deserialize(b'{"__class":"test.values.Note","value":{"__class":"stdClass","a":1}}') == Note(Own(1))


# --- dates ----------------------------------------------------------------------------------------------------


def offset(**options: float) -> tzinfo:
    return timezone(timedelta(**options))


WHEN = datetime(2026, 11, 28, 12, 34, 56, 789000, offset(hours=2))
TEXT = "2026-11-28 12:34:56.789000"
SOFIA = zoneinfo.ZoneInfo("Europe/Sofia")


@pytest.mark.parametrize("cls", ["DateTime", "DateTimeImmutable"])
@pytest.mark.parametrize(
    ("kind", "zone", "expected"),
    [
        (1, "+02:00", WHEN),
        (1, "-00:30", WHEN.replace(tzinfo=offset(minutes=-30))),
        (1, "+00:00", WHEN.replace(tzinfo=timezone.utc)),
        (1, "+01:02:03", WHEN.replace(tzinfo=offset(hours=1, minutes=2, seconds=3))),
        (1, "-14:00", WHEN.replace(tzinfo=offset(hours=-14))),
        (2, "EET", WHEN),
        (2, "CEST", WHEN),
        (2, "EDT", WHEN.replace(tzinfo=offset(hours=-4))),
        (2, "Z", WHEN.replace(tzinfo=timezone.utc)),
        (2, "GMT", WHEN.replace(tzinfo=timezone.utc)),
        (3, "UTC", WHEN.replace(tzinfo=timezone.utc)),
        (3, "Europe/Sofia", WHEN),
        (3, "America/Argentina/Buenos_Aires", WHEN.replace(tzinfo=offset(hours=-3))),
    ],
)
def test_dates(kind: int, zone: str, expected: datetime, cls: str) -> None:
    sent = date(TEXT, kind, zone, cls)
    assert same(php(sent), expected)
    assert same(php(b"a:1:{i:5;a:1:{i:0;" + sent + b"}}"), {5: [expected]})
    assert same(php(b'O:8:"stdClass":1:{s:1:"d";' + sent + b"}"), {"d": expected})
    first, second = php(b"a:2:{i:0;" + sent + b"i:1;r:3;}")
    assert first is second


def test_a_named_zone_keeps_its_name() -> None:
    assert php(date(TEXT, 3, "Europe/Sofia")).tzinfo is SOFIA
    assert php(date("2026-07-01 00:00:00.000000", 3, "Europe/Sofia")).utcoffset() == timedelta(hours=3)


def test_a_named_zone_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise zoneinfo.ZoneInfoNotFoundError(name)

    monkeypatch.setattr(zoneinfo, "ZoneInfo", missing)
    with pytest.raises(SerializationError, match="time zone 'Europe/Sofia' of a date of PHP is not known here: .* tzdata"):
        php(date(TEXT, 3, "Europe/Sofia"))
    assert same(php(date(TEXT, 3, "UTC")), WHEN.replace(tzinfo=timezone.utc))


@pytest.mark.parametrize(
    ("kind", "zone"),
    [
        (1, "+2"), (1, "02:00"), (1, "+99:00"), (1, "Europe/Sofia"), (1, ""), (2, "XYZ"), (2, "+02:00"), (2, ""),
        (3, "No/Such"), (3, "Europe"), (3, "../../etc/passwd"), (3, "/etc/passwd"), (3, "a" * 1000), (3, "Europe//Sofia"),
        (3, "zone.tab"), (3, "\0"), (3, ""), (4, "UTC"), (0, "+02:00"), (-1, "UTC"),
    ],
)  # fmt: skip
def test_zones_that_are_none(kind: int, zone: str) -> None:
    with pytest.raises(SerializationError, match="date of PHP"):
        php(date(TEXT, kind, zone))


@pytest.mark.parametrize(
    "when",
    ["", "now", "2026-11-28", "2026-11-28 12:34:56", "2026-13-28 12:34:56.000000", "2026-02-30 12:34:56.000000",
     "-0001-11-30 00:00:00.000000", "+12345-01-01 00:00:00.000000", "0000-01-01 00:00:00.000000",
     "2026-11-28 12:34:56.000000 ", "\uff12026-11-28 12:34:56.000000"],
)  # fmt: skip
def test_dates_that_are_none(when: str) -> None:
    with pytest.raises(SerializationError, match="^a date of PHP cannot be read: "):
        php(date(when, 1, "+02:00"))


@pytest.mark.parametrize(
    "fields",
    [b"0:{}", b"1:{" + text("date") + text(TEXT) + b"}", b"1:{" + text("date") + b"i:5;}",
     b"3:{" + text("date") + text(TEXT) + text("timezone_type") + b"i:1;" + text("timezone") + b"N;}",
     b"3:{" + text("date") + text(TEXT) + text("timezone_type") + text("1") + text("timezone") + text("+02:00") + b"}",
     b"3:{" + text("date") + b"a:0:{}" + text("timezone_type") + b"a:0:{}" + text("timezone") + b"a:0:{}}"],
)  # fmt: skip
def test_dates_that_lack_something(fields: bytes) -> None:
    with pytest.raises(SerializationError, match="date of PHP"):
        php(b'O:8:"DateTime":' + fields)


def test_dates_of_arrays_that_are_in_each_other_twice() -> None:
    value = b"a:1:{i:0;i:1;}"
    for number in range(40, 2, -1):  # the outermost is the third value behind the message and the date
        value = b"a:2:{i:0;%si:1;R:%d;}" % (value, number + 1)
    with pytest.raises(SerializationError, match="date of PHP cannot be read: <list>"):
        php(b'O:8:"DateTime":3:{' + text("date") + value + text("timezone_type") + b"i:3;" + text("timezone") + b"N;}")


def test_errors_of_dates_say_whose_request_it_is() -> None:
    payload = S.serialize(RequestEnvelope("7", Note(WHEN))).replace(b"+02:00", b"+2:000")
    with pytest.raises(SerializationError, match="date of PHP") as caught:
        S.deserialize(payload)
    assert caught.value.request_id == "7"


@pytest.mark.parametrize(
    ("when", "zone"),
    [
        (WHEN, "+02:00"),
        (WHEN.replace(tzinfo=timezone.utc), "+00:00"),
        (WHEN.replace(tzinfo=offset(minutes=-30)), "-00:30"),
        (WHEN.replace(tzinfo=offset(hours=-9, minutes=-30)), "-09:30"),
        (WHEN.replace(tzinfo=offset(seconds=-30)), "-00:00:30"),
        (WHEN.replace(tzinfo=SOFIA), "+02:00"),
        (datetime(2026, 7, 1, tzinfo=SOFIA), "+03:00"),
        (datetime(2026, 10, 25, 3, 30, tzinfo=SOFIA, fold=1), "+02:00"),
        (datetime(1, 1, 1, tzinfo=timezone.utc), "+00:00"),
        (datetime(9999, 12, 31, 23, 59, 59, 999999, timezone.utc), "+00:00"),
    ],
)
def test_a_datetime_is_sent_as_datetimeimmutable(when: datetime, zone: str) -> None:
    expected = date(f"{when.replace(tzinfo=None).isoformat(' ', 'microseconds')}", 1, zone)
    for value, wrapped in (
        (when, expected),
        ([when], b"a:1:{i:0;" + expected + b"}"),
        ({"k": (when,)}, b'a:1:{s:1:"k";a:1:{i:0;' + expected + b"}}"),
    ):
        payload = S.serialize(Note(value))
        assert wrapped in payload
        got: Any = S.deserialize(payload)
        assert same(got.value, json_like(value))
        assert S.serialize(got) == payload


def json_like(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [json_like(v) for v in value]
    return {k: json_like(v) for k, v in value.items()} if isinstance(value, dict) else value


def test_a_datetime_that_occurs_twice() -> None:
    payload = S.serialize(Note([WHEN, 1, WHEN], WHEN))
    assert payload.endswith(b"i:1;i:1;i:2;r:3;}" + text("other") + b"r:3;}")
    got: Any = S.deserialize(payload)
    assert same(got.value, [WHEN, 1, WHEN]) and got.other is got.value[0]
    # Its own parts are counted too.
    shared = Note(1)
    payload = S.serialize(Note([WHEN, shared, shared]))
    assert payload.endswith(b"i:2;r:7;}" + text("other") + b"N;}")
    assert S.deserialize(payload) == Note([WHEN, shared, shared])


@pytest.mark.parametrize("zone", [None, type("Nowhere", (tzinfo,), {"utcoffset": lambda self, when: None})()])
def test_a_naive_datetime_is_refused(zone: Any) -> None:
    with pytest.raises(SerializationError, match=r"^Note.value\[0\]\['k'\]: a naive datetime .* give it a tzinfo"):
        S.serialize(Note([{"k": WHEN.replace(tzinfo=zone)}]))
    with pytest.raises(SerializationError, match=r"^Note.other: a naive datetime .* give it a tzinfo"):
        S.serialize(RequestEnvelope("1", Note(5, WHEN.replace(tzinfo=zone))))


def test_an_offset_with_fractions_of_a_second_is_refused() -> None:
    with pytest.raises(SerializationError, match=r"^Note.value: .* fractions of a second"):
        S.serialize(Note(WHEN.replace(tzinfo=offset(microseconds=5))))


def test_what_is_no_datetime_is_refused() -> None:
    class Later(datetime):
        pass

    for value in (WHEN.date(), WHEN.time(), timedelta(1), Later.fromisoformat(WHEN.isoformat())):
        with pytest.raises(SerializationError, match=r"^Note.value: .*cannot travel"):
            S.serialize(Note(value))
    with pytest.raises(SerializationError, match=r"^Note.value: datetime.datetime cannot travel"):
        JSON.serialize(Note(WHEN))
    with pytest.raises(SerializationError, match="only messages can"):
        S.serialize(WHEN)  # type: ignore[arg-type]


def test_depth() -> None:
    value: Any = WHEN
    for _ in range(509):
        value = [value]
    assert S.deserialize(S.serialize(Note(value))) == Note(value)
    with pytest.raises(SerializationError, match="nested deeper than 511"):
        S.serialize(Note([value]))


# --- unknown classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["No\\Such", "Closure", "App\\Money", "DateInterval"])
def test_unknown_classes_in_php_s_format(name: str) -> None:
    obj = b'O:%d:"%s":0:{}' % (len(name), name.encode())
    case = b'E:%d:"%s:X";' % (len(name) + 2, name.encode())
    for read in (lambda: php(obj), lambda: php(b"a:1:{i:0;" + obj + b"}"), lambda: S.deserialize(obj), lambda: php(case)):
        with pytest.raises(SerializationError) as caught:
            read()
        error = str(caught.value)
        assert error.startswith(f"Unknown class: {name} (") and "wire_name" in error and "import" not in error


# --- the imports, and PHP itself ------------------------------------------------------------------------------


def test_datetime_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys; from stream_ipc.serializers.php import *; from stream_ipc.serializers.json import *;"
        " from stream_ipc.messages import *; S = PhpMessageSerializer(); S.deserialize(S.serialize(LogMessage('x')));"
        " print({'datetime', 'zoneinfo', 'typing'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def by_php(code: str) -> bytes:
    assert PHP is not None
    done = subprocess.run([PHP, "-r", code], capture_output=True, timeout=50)
    assert (done.stderr, done.returncode) == (b"", 0)
    return done.stdout


WRITTEN_BY_PHP: List[Tuple[str, Any]] = [
    ("new stdClass", {}),
    ("(object)['a' => 1, 'b' => [1], '5' => (object)[]]", {"a": 1, "b": [1], "5": {}}),
    ("[new stdClass, ['k' => new stdClass]]", [{}, {"k": {}}]),
    ("json_decode('{\"a\":{\"b\":[{}]}}')", {"a": {"b": [{}]}}),
    ("new DateTimeImmutable('2026-11-28 12:34:56.789+02:00')", WHEN),
    ("new DateTime('2026-11-28 12:34:56.789 EET')", WHEN),
    ("new DateTime('2026-11-28 12:34:56.789 Europe/Sofia')", WHEN),
    ("[new DateTime('2026-11-28 12:34:56.789', new DateTimeZone('UTC'))]", [WHEN.replace(tzinfo=timezone.utc)]),
    ("new DateTimeImmutable('@5')", datetime(1970, 1, 1, 0, 0, 5, tzinfo=timezone.utc)),
]


@with_php
def test_what_php_writes() -> None:
    written = by_php("".join(f"echo serialize({code}), chr(10);" for code, _ in WRITTEN_BY_PHP)).splitlines()
    for (code, expected), line in zip(WRITTEN_BY_PHP, written, strict=True):
        assert same(php(line), expected), code


@with_php
def test_abbreviations_are_read_as_php_reads_them() -> None:
    code = """foreach (array_keys(DateTimeZone::listAbbreviations()) as $name) {
        $when = new DateTimeImmutable('2020-06-01', new DateTimeZone($name));
        echo $when->getOffset(), ' ', serialize($when), "\\n";
    }"""
    lines = by_php(code).splitlines()
    known = 0
    for line in lines:
        seconds, _, sent = line.partition(b" ")
        try:
            when = php(sent)
        except SerializationError:
            continue
        assert when.utcoffset() == timedelta(seconds=int(seconds)), line
        known += 1
    assert known > 80 and len(lines) > 100


@with_php
def test_php_reads_what_is_sent() -> None:
    whens = [WHEN, WHEN.replace(tzinfo=SOFIA), datetime(1, 1, 1, tzinfo=timezone.utc)]
    whens.append(WHEN.replace(tzinfo=offset(minutes=-30)))
    payload = S.serialize(Note(whens)).partition(text("value"))[2].partition(text("other"))[0]
    code = f"foreach (unserialize(hex2bin('{payload.hex()}')) as $when)"
    code += " echo get_class($when), ' ', $when->format('Y-m-d H:i:s.u P'), \"\\n\";"
    assert by_php(code).decode().splitlines() == [
        "DateTimeImmutable 2026-11-28 12:34:56.789000 +02:00",
        "DateTimeImmutable 2026-11-28 12:34:56.789000 +02:00",
        "DateTimeImmutable 0001-01-01 00:00:00.000000 +00:00",
        "DateTimeImmutable 2026-11-28 12:34:56.789000 -00:30",
    ]
