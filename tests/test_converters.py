"""Classes that need converters, and what the registry says of those that cannot travel as they are."""

from __future__ import annotations

import array
import asyncio
import collections
import ctypes
import datetime
import decimal
import enum
import fractions
import functools
import io
import ipaddress
import json
import pathlib
import re
import socket
import threading
import types
import uuid
import zoneinfo
from dataclasses import InitVar, dataclass, field
from datetime import timedelta
from typing import Any, Dict, Generic, Iterator, List, NamedTuple, TypeVar

import pytest

from stream_ipc import IpcPeer, ResponsePromise, Session, UnexpectedReplyError, registry
from stream_ipc.advice import advice, converter_line
from stream_ipc.errors import SerializationError
from stream_ipc.messages import Message
from stream_ipc.registry import lookup, register_type, source, type_info
from stream_ipc.serializers.json import JsonMessageSerializer
from stream_ipc.serializers.php import PhpMessageSerializer
from stream_ipc.serializers.pickle import PickleMessageSerializer

SERIALIZERS = [PickleMessageSerializer(), JsonMessageSerializer(), PhpMessageSerializer()]


@dataclass
class Holder(Message, wire_name="test.converters.Holder"):
    x: Any


def raises(error: Any) -> Any:
    raise error


@pytest.fixture
def own_registry() -> Iterator[None]:
    """Undo what a test registers: converters of the standard library's classes concern the whole process."""
    before = registry.by_class.copy(), registry._by_name.copy()
    yield
    for table, old in zip((registry.by_class, registry._by_name), before):
        table.clear()
        table.update(old)  # type: ignore[arg-type]
    for cache in registry._caches:
        cache.clear()


# --- converters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", SERIALIZERS, ids=lambda s: type(s).__name__)
@pytest.mark.usefixtures("own_registry")
def test_a_value_with_converters_travels(serializer: Any) -> None:
    register_type(datetime.datetime, encode=datetime.datetime.isoformat, decode=datetime.datetime.fromisoformat)
    when = datetime.datetime(2024, 2, 29, 12, 30, 1, 5, tzinfo=datetime.timezone.utc)
    assert type_info(datetime.datetime).wire_name == "datetime.datetime"
    for content in (when, [when, when], {"a": [when]}, Holder(when)):
        back = serializer.deserialize(serializer.serialize(Holder(content)))
        assert back == Holder(content)


@pytest.mark.usefixtures("own_registry")
def test_what_encode_returns_may_hold_whatever_travels() -> None:
    class Outer:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

    register_type(decimal.Decimal, encode=str, decode=decimal.Decimal)
    register_type(Outer, encode=lambda o: [o.inner, Holder(o.inner)], decode=lambda data: Outer(data[0]))
    for serializer in SERIALIZERS:
        back: Any = serializer.deserialize(serializer.serialize(Holder(Outer(decimal.Decimal("1.50")))))
        assert type(back.x) is Outer
        assert str(back.x.inner) == "1.50"


# One of each kind of class that registration accepts with converters: those that a format has a form of its own for, those
# that travel otherwise, and those that do not.
CONVERTED: List[Any] = [
    b"\0\xff", bytearray(b"12"), {1, 2}, frozenset({3}), 1 + 2j, datetime.datetime(2020, 1, 1), datetime.time(1),
    datetime.timezone.utc, decimal.Decimal(1), uuid.UUID(int=1), pathlib.PurePath("a"), collections.deque([1]),
    collections.Counter("a"), collections.defaultdict(int), memoryview(b"ab"), slice(1), range(3), ..., NotImplemented, len,
    raises, int, types, io.BytesIO(), re.compile("a"), functools.partial(int), ValueError("x"), iter(()), object(),
]  # fmt: skip


@pytest.mark.parametrize("serializer", SERIALIZERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("value", CONVERTED, ids=lambda value: type(value).__name__)
@pytest.mark.usefixtures("own_registry")
def test_converters_are_asked_by_every_serializer(serializer: Any, value: Any) -> None:
    cls = type(value)
    serializer.serialize(Holder("x"))  # what serializers know of a class is of before
    if cls in (bytes, bytearray) and type(serializer) is not JsonMessageSerializer:
        serializer.serialize(Holder([value]))
    asked: List[Any] = []
    back: Any
    register_type(cls, encode=lambda v: asked.append(v) or "12", decode=lambda data: asked.append(data) or value)
    as_it_is = type(serializer) is PickleMessageSerializer and cls in (bytes, bytearray, set, frozenset)
    twice = [value, value]  # the walk has to write the message in PHP's format
    for content, found in (
        (value, lambda x: x), ([value], lambda x: x[0]), ({"a": (value,)}, lambda x: x["a"][0]), (twice, lambda x: x[1]),
    ):  # fmt: skip
        asked.clear()
        back = serializer.deserialize(serializer.serialize(Holder(content)))
        assert found(back.x) == value if as_it_is else found(back.x) is value
        assert asked[:1] == ([] if as_it_is else [value])
        assert "12" in asked or as_it_is


class Zone(datetime.tzinfo):
    def __init__(self, hours: int = 0) -> None:
        self.hours = hours

    def utcoffset(self, when: Any) -> timedelta:
        return timedelta(hours=self.hours)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Zone) and self.hours == other.hours

    def __hash__(self) -> int:
        return self.hours


@pytest.mark.parametrize("zone", [zoneinfo.ZoneInfo("UTC"), Zone(2)], ids=["ZoneInfo", "own"])
@pytest.mark.usefixtures("own_registry")
def test_a_value_of_the_standard_library_may_hold_a_registered_time_zone(zone: Any) -> None:
    serializer = PickleMessageSerializer()
    values = [datetime.datetime(2020, 1, 1, tzinfo=zone), datetime.time(1, tzinfo=zone, fold=1)]
    for value in values:
        with pytest.raises(SerializationError, match=r"Holder\.x: .*(Zone|ZoneInfo) cannot travel: it is neither"):
            serializer.serialize(Holder(value))
    if type(zone) is Zone:
        register_type(Zone, encode=lambda zone: zone.hours, decode=Zone)
    else:
        exec(converter_line(type(zone)), {"register_type": register_type, "ZoneInfo": zoneinfo.ZoneInfo})
    for value in values:
        for content in (value, [value, zone], {value: value}, collections.deque([value])):
            back: Any = serializer.deserialize(serializer.serialize(Holder(content)))
            assert back.x == content
        back = serializer.deserialize(serializer.serialize(Holder([value, zone])))
        assert back.x[0].tzinfo is back.x[1]
        assert (type(back.x[1]), back.x[0].fold) == (type(zone), value.fold)


@pytest.mark.usefixtures("own_registry")
def test_a_time_zone_may_have_a_registered_offset_and_name() -> None:
    for cls in (Span, Text):
        exec(converter_line(cls), dict(globals(), timedelta=timedelta))
    zone = datetime.timezone(Span(hours=2), Text("name"))
    back: Any = PickleMessageSerializer().deserialize(PickleMessageSerializer().serialize(Holder(zone)))
    assert back.x == zone
    assert (type(back.x.utcoffset(None)), type(back.x.tzname(None)), back.x.tzname(None)) == (Span, Text, "name")


@pytest.mark.parametrize("serializer", SERIALIZERS[1:], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("value", [b"x", bytearray(b"x"), {1}, collections.OrderedDict()], ids=lambda v: type(v).__name__)
@pytest.mark.usefixtures("own_registry")
def test_what_encode_raises_is_told_of_what_has_another_form_too(serializer: Any, value: Any) -> None:
    register_type(type(value), encode=lambda v: raises(ValueError("why")), decode=lambda data: data)
    with pytest.raises(SerializationError, match=r"^Holder\.x\[0\]: .* cannot be sent: the encode .* failed: ValueError"):
        serializer.serialize(Holder([value]))


@pytest.mark.parametrize("cls", [bytes, bytearray])
@pytest.mark.usefixtures("own_registry")
def test_bytes_travel_in_the_php_format_as_before_once_they_have_no_converters(cls: Any) -> None:
    serializer, message = PhpMessageSerializer(), Holder([cls(b"\xff"), 1])
    before = serializer.serialize(message)
    register_type(cls, encode=lambda data: data.hex(), decode=cls.fromhex)
    assert serializer.deserialize(serializer.serialize(message)) == message
    assert serializer.serialize(message) != before
    del registry.by_class[cls]
    registry.register_type(Holder, "test.converters.Holder")
    assert serializer.serialize(message) == before


@pytest.mark.usefixtures("own_registry")
def test_converters_go_before_what_a_class_would_be_rebuilt_by() -> None:
    @dataclass
    class Point:
        x: int = 0

    class Color(enum.Enum):
        RED = 1

    class Pair(NamedTuple):
        a: int

    register_type(Point, encode=lambda p: p.x, decode=Point)
    register_type(Color, encode=lambda c: c.value, decode=Color)
    register_type(Pair, encode=list, decode=lambda data: Pair(*data))
    for value, data in ((Point(5), 5), (Color.RED, 1), (Pair(2), [2])):
        info = type_info(type(value))
        assert info.fields == ()
        assert not info.is_enum
        assert info.values(value) == {"value": data}
        assert info.build({"value": data}) == value
        for serializer in SERIALIZERS:
            assert serializer.deserialize(serializer.serialize(Holder(value))) == Holder(value)


@pytest.mark.usefixtures("own_registry")
def test_converters_are_for_exactly_the_class() -> None:
    class Mine(decimal.Decimal):
        pass

    register_type(decimal.Decimal, encode=str, decode=decimal.Decimal)
    with pytest.raises(SerializationError, match="Mine cannot travel"):
        type_info(Mine)
    with pytest.raises(SerializationError, match=r"Holder\.x: .*Mine cannot travel"):
        JsonMessageSerializer().serialize(Holder(Mine(1)))


@pytest.mark.usefixtures("own_registry")
def test_what_decode_raises_or_returns_is_a_decoding_error() -> None:
    class Thing:
        pass

    def decode(data: Any) -> Any:
        if data == "raise":
            raise ValueError("why")
        return Thing() if data == "ok" else data

    register_type(Thing, "test.converters.Thing", encode=lambda t: t.data, decode=decode)
    info = type_info(Thing)
    assert type(info.build({"value": "ok"})) is Thing
    with pytest.raises(SerializationError, match=r"test.converters.Thing cannot be built from the values.*ValueError: why"):
        info.build({"value": "raise"})
    for other in (None, 5, Holder(1)):
        with pytest.raises(SerializationError, match=rf"decode of its .* returned an? {type(other).__name__}"):
            info.build({"value": other})
    with pytest.raises(SerializationError, match="its 'value' was not sent; call register_type"):
        info.build({"other": 1})
    with pytest.raises(SerializationError, match="the encode of its register_type.. failed: AttributeError"):
        info.values(Thing())
    with pytest.raises(SerializationError) as caught:
        info.build({"value": "raise"})
    assert isinstance(caught.value.__cause__, ValueError)
    for serializer in SERIALIZERS:
        with pytest.raises(SerializationError, match="the encode of its register_type.. failed: AttributeError"):
            serializer.serialize(Holder(Thing()))
        thing: Any = Thing()
        thing.data = "raise"
        with pytest.raises(SerializationError, match="cannot be built from the values received: ValueError: why"):
            serializer.deserialize(serializer.serialize(Holder(thing)))
    for interrupt in (KeyboardInterrupt, SystemExit):
        register_type(Thing, encode=lambda t, e=interrupt: raises(e), decode=lambda data, e=interrupt: raises(e))
        with pytest.raises(interrupt):
            type_info(Thing).values(Thing())
        with pytest.raises(interrupt):
            type_info(Thing).build({"value": 1})


def test_both_converters_or_neither() -> None:
    for arguments in ({"encode": str}, {"decode": decimal.Decimal}):
        given, missing = ("encode", "decode") if "encode" in arguments else ("decode", "encode")
        with pytest.raises(TypeError, match=rf"register_type\(Decimal\) got {given} without {missing}; give both or nei"):
            register_type(decimal.Decimal, **arguments)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="got"):
            register_type(**arguments)(decimal.Decimal)  # type: ignore[call-overload]
    for bad in (5, "str", []):
        with pytest.raises(TypeError, match="decode of Decimal must be a function, not"):
            register_type(decimal.Decimal, encode=str, decode=bad)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="takes a class"):
        register_type("Decimal", encode=str, decode=str)  # type: ignore[call-overload]


@pytest.mark.parametrize("cls", [type(None), bool, int, float, str, list, tuple, dict])
def test_plain_data_needs_no_converters(cls: Any) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__} cannot be registered: it is plain data and travels as it is"):
        register_type(cls, encode=lambda x: x, decode=cls)
    with pytest.raises(TypeError, match=f"{cls.__name__} cannot be registered: it is plain data and travels as it is"):
        register_type(cls)


@pytest.mark.usefixtures("own_registry")
def test_as_a_decorator_and_again() -> None:
    @register_type(wire_name="test.converters.Money", encode=lambda m: m.cents, decode=lambda data: Money(data))
    class Money:
        __slots__ = ("cents",)

        def __init__(self, cents: int) -> None:
            self.cents = cents

    assert lookup("test.converters.Money").cls is Money
    assert "_stream_ipc_wire_name" not in vars(Money)
    register_type(Money, encode=lambda m: [m.cents], decode=lambda data: Money(*data))
    assert type_info(Money).wire_name == "test.converters.Money"
    assert type_info(Money).values(Money(3)) == {"value": [3]}
    register_type(Money)  # without converters again
    assert type_info(Money).encode is None
    assert type_info(Money).values(Money(3)) == {"cents": 3}


@pytest.mark.usefixtures("own_registry")
def test_names_of_the_standard_library_are_the_public_ones() -> None:
    # From CPython 3.13 on a path is of pathlib._local, and later of pathlib again.
    for cls, name in ((pathlib.PosixPath, "pathlib.PosixPath"), (decimal.Decimal, "decimal.Decimal")):
        assert f"{source(cls)[0]}.{cls.__qualname__}" == name


def test_an_unknown_class_of_the_standard_library_needs_the_converters_here_too() -> None:
    with pytest.raises(SerializationError, match=r"Unknown class: datetime.nothing \(the sender registered it; call regi"):
        lookup("datetime.nothing")


# --- what cannot be registered --------------------------------------------------------------------------------


class Text(str): ...


class Number(int): ...


class Ratio(float): ...


class Flags(bytes): ...


class Buffer(bytearray): ...


class Items(List[int]): ...


class Table(Dict[str, int]): ...


class Triple(tuple): ...  # type: ignore[type-arg]


class Unique(set): ...  # type: ignore[type-arg]


class Frozen(frozenset): ...  # type: ignore[type-arg]


class Moment(datetime.datetime): ...


class Day(datetime.date): ...


class Span(timedelta): ...


class Price(decimal.Decimal): ...


class Queue(collections.deque): ...  # type: ignore[type-arg]


class Failure(ValueError): ...


class Numbers(array.array): ...  # type: ignore[type-arg]


class Phase(complex): ...


class WithReduce:
    def __init__(self, x: int) -> None:
        self.x = x

    def __reduce__(self) -> Any:
        return WithReduce, (self.x,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithReduce) and self.x == other.x


class WithState:
    def __init__(self, x: int, *, y: int) -> None:
        self.x, self.y = x, y

    def __getstate__(self) -> Any:
        return self.x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithState) and (self.x, self.y) == (other.x, other.y)


class ChildWithState(WithState):
    pass


VALUES: List[Any] = [
    Text("x"), Number(5), Ratio(0.5), Flags(b"\0\xff"), Buffer(b"\0\xff"), Items([1, 2]), Table(a=1), Triple((1, 2)),
    Unique({1}), Frozen({1}), Moment(2024, 1, 2, 3), Day(2024, 1, 2), Span(1, 2, 3), Price("1.50"), Queue([1]),
    Failure("a", 5), Numbers("i", [1, 2]), Phase(1, 2), WithReduce(1), WithState(1, y=2), ChildWithState(1, y=2),
    datetime.datetime(2024, 1, 2, 3, 4, 5, 6, datetime.timezone.utc), datetime.date(2024, 1, 2), datetime.time(1, 2, 3, 4),
    timedelta(-1, 2, 3), datetime.timezone(timedelta(hours=2)), decimal.Decimal("1.50"), fractions.Fraction(1, 3),
    uuid.UUID(int=5), pathlib.PosixPath("/a/b"), pathlib.PureWindowsPath("c:/x"), ipaddress.ip_address("::1"),
    ipaddress.ip_network("10.0.0.0/8"), re.compile("a+", re.I), array.array("d", [1.5]), types.SimpleNamespace(a=1),
    collections.defaultdict(None, {"a": 1}), collections.Counter("aab"), collections.OrderedDict(a=1),
    zoneinfo.ZoneInfo("UTC"), 1 + 2j, b"\0\xff", bytearray(b"x"), {1, 2}, frozenset({1}), slice(1, 2, 3), range(1, 9, 2),
]  # fmt: skip


def same(one: Any, other: Any) -> bool:
    if isinstance(one, BaseException):
        return type(one) is type(other) and one.args == other.args
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
@pytest.mark.usefixtures("own_registry")
def test_the_line_of_the_advice_works(value: Any) -> None:
    cls = type(value)
    if cls not in (collections.Counter, collections.OrderedDict):
        text = r"cannot be registered: it.*; pass converters: (register_type\(.*\))$"
        if cls.__module__ == __name__ or cls not in (fractions.Fraction, types.SimpleNamespace):
            with pytest.raises(TypeError) as caught:
                register_type(cls)
            found = re.search(text, str(caught.value))
            assert found is not None, caught.value
            assert found[1] == converter_line(cls)
    names = dict(vars(datetime), **globals())
    for module in (collections, decimal, fractions, ipaddress, pathlib, types, uuid, zoneinfo):
        names.update(vars(module))
    names.update(array=array.array if cls is array.array else array, datetime=datetime.datetime, Pattern=re.Pattern)
    names.update(time=datetime.time)  # some of these modules have a module of that name
    exec(converter_line(cls), names)
    data = type_info(cls).values(value)
    assert data == json.loads(json.dumps(data))  # it is plain in every format
    assert same(type_info(cls).build(data), value)
    back: Any = JsonMessageSerializer().deserialize(JsonMessageSerializer().serialize(Holder([value])))
    assert same(back.x[0], value)


@pytest.mark.parametrize(
    "cls",
    [Text, Number, Items, Moment, WithReduce, WithState, functools.partial, re.Pattern, threading.local, ctypes.Structure,
     object, type, types.FunctionType, types.GeneratorType, io.BytesIO, memoryview, Exception, property],
    ids=lambda cls: cls.__name__,
)  # fmt: skip
def test_a_refused_class_is_not_registered(cls: Any) -> None:
    with pytest.raises(TypeError, match="cannot be registered: it"):
        register_type(cls)
    with pytest.raises(SerializationError, match="cannot travel"):
        type_info(cls)


class Base(NamedTuple):
    a: int
    b: int = 0


@dataclass
class Doubled:
    a: int
    b: int

    def __init__(self, a: int) -> None:
        self.a, self.b = a, 2 * a


@dataclass
class Other:
    a: int

    def __init__(self, q: int) -> None:
        self.a = q


@dataclass
class Unnamed:
    a: int

    def __init__(self, a: int, /) -> None:
        self.a = a


@dataclass
class Variable:
    a: int

    def __init__(self, *args: int) -> None:
        (self.a,) = args


@dataclass
class Scaled:
    a: int
    factor: InitVar[int]


@dataclass(init=False)
class Left:
    a: int


@dataclass
class Made:
    a: int

    def __new__(cls, b: int) -> Any:
        return object.__new__(cls)


class Twice(Base):
    def __new__(cls, x: int) -> Any:
        return super().__new__(cls, x, x)


REQUIRES, TAKES = "its constructor requires 'NAME', which is not", "its constructor does not take 'NAME', which is a"


@pytest.mark.parametrize(
    ("cls", "problem", "name"),
    [(Doubled, TAKES, "b"), (Other, REQUIRES, "q"), (Unnamed, TAKES, "a"), (Variable, TAKES, "a"), (Left, TAKES, "a"),
     (Scaled, REQUIRES, "factor"), (Made, REQUIRES, "b"), (Twice, REQUIRES, "x")],
    ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
@pytest.mark.usefixtures("own_registry")
def test_a_class_whose_constructor_does_not_take_its_fields_is_refused(cls: Any, problem: str, name: str) -> None:
    problem = problem.replace("NAME", name)
    text = rf"^{cls.__name__} cannot be registered: {problem}.*; pass converters: (register_type\(.*)$"
    with pytest.raises(TypeError, match=text) as caught:
        register_type(cls)
    if cls is not Doubled:
        assert "encode=f, decode=g" in str(caught.value)
        return
    exec(str(caught.value).partition("pass converters: ")[2], {"register_type": register_type, "Doubled": Doubled})
    for serializer in SERIALIZERS:
        assert serializer.deserialize(serializer.serialize(Holder(Doubled(3)))) == Holder(Doubled(3))


@pytest.mark.usefixtures("own_registry")
def test_a_constructor_that_takes_the_fields_and_more_is_not_refused() -> None:
    @dataclass
    class Keywords:
        a: int

        def __init__(self, **kwargs: int) -> None:
            self.a = kwargs["a"]

    @dataclass
    class Optional_:
        a: int = field(kw_only=True)
        b: int = field(init=False, default=5)
        scale: InitVar[int] = 1

    @dataclass
    class Wrapped:
        a: int

        @functools.wraps(object.__init__)
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.a = kwargs.pop("a")

    @dataclass
    class WithNew:
        a: int

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return object.__new__(cls)

    class Known(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(kwargs["a"])

    @dataclass
    class WithMeta(metaclass=Known):
        a: int

        def __init__(self, q: int) -> None:
            self.a = q

    class Child(Base):
        def __new__(cls, a: int, b: int = 1) -> Any:
            return super().__new__(cls, a, b)

    @dataclass(init=False)
    class Empty:
        pass

    classes: List[Any] = [Keywords, Optional_, Wrapped, WithNew, WithMeta, Child, Empty]
    for cls in classes:
        register_type(cls)
        value = cls(**({} if cls is Empty else {"a": 3}))
        for serializer in SERIALIZERS:
            for content in (value, [value]):
                back: Any = serializer.deserialize(serializer.serialize(Holder(content)))
                assert back == Holder(content)


@pytest.mark.usefixtures("own_registry")
def test_an_attrs_class_with_a_constructor_of_its_own() -> None:
    attr = pytest.importorskip("attr", reason="attrs is not installed")

    @attr.s(init=False, auto_attribs=True)
    class Own:
        a: int
        _b: int = attr.ib(default=1)

        def __init__(self, a: int) -> None:
            self.a, self._b = a, 2 * a

    with pytest.raises(TypeError, match=r"its constructor does not take 'b', .*encode=lambda obj: {'a': obj.a}, decode="):
        register_type(Own)


def test_slots_that_attributes_do_not_show() -> None:
    class Hidden:
        __slots__ = ("__dict__", "__state__")

    with pytest.raises(TypeError, match="Hidden cannot be registered: it has the slot __state__, so it has state that"):
        register_type(Hidden)
    with pytest.raises(TypeError, match="Both cannot be registered: it has the slot __state__.*make it a dataclass"):

        class Both(Message, Hidden):
            pass


T = TypeVar("T")


def test_what_is_not_refused() -> None:
    class Slots:
        __slots__ = ("__private", "a")

    class Single:
        __slots__ = "a"

    class OfAnything(Generic[T]):
        pass

    class OwnNew:
        def __new__(cls) -> Any:
            return object.__new__(cls)

    @dataclass(frozen=True)
    class WithMethods:
        a: int = 1

        def __reduce__(self) -> Any:
            return WithMethods, ()

        def __getstate__(self) -> Any:
            return None

    for cls in (Slots, Single, OfAnything, OwnNew, WithMethods):
        register_type(cls)
        info = type_info(cls)
        assert type(info.build(info.values(cls()))) is cls


def test_a_message_may_say_how_it_is_pickled() -> None:
    # It is known only later whether it becomes a dataclass, and it travels by its fields or attributes anyway.
    @dataclass(frozen=True)
    class Fields(Message, wire_name="test.converters.Fields"):
        a: int

        def __getstate__(self) -> Any:
            return None

    class Attributes(Message, wire_name="test.converters.Attributes"):
        def __reduce__(self) -> Any:
            return Attributes, ()

    for serializer in SERIALIZERS:
        assert serializer.deserialize(serializer.serialize(Fields(1))) == Fields(1)
        message: Any = Attributes()
        message.a = 1
        assert vars(serializer.deserialize(serializer.serialize(message))) == {"a": 1}
    register_type(Attributes, "test.converters.Renamed")  # it was accepted


# --- advice ---------------------------------------------------------------------------------------------------


class Plain: ...


class Color(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    a: int


def generate() -> Iterator[int]:
    yield 1


async def coroutine() -> None: ...


ADVICE: List[Any] = [
    (Plain, "derive it from Message or register it with register_type()"),
    (Color, "register it with register_type(Color)"),
    (Pair, "register it with register_type(Pair)"),
    (Text, "convert it with str(x), or call register_type(Text, encode=str, decode=Text)"),
    (Items, "convert it with list(x), or call register_type(Items, encode=list, decode=Items)"),
    (set, "convert it with list(x)"),
    (type({}.keys()), "convert it with list(x)"),
    (type(generate()), "convert it with list(x)"),
    (memoryview, "convert it with bytes(x)"),
    (collections.deque, "convert it with list(x)"),
    (types.FunctionType, "it belongs to this process: send its name instead"),
    (type, "it belongs to this process: send its name instead"),
    (type(Color), "it belongs to this process: send its name instead"),
    (types.ModuleType, "it belongs to this process: send its name instead"),
    (io.TextIOWrapper, "it belongs to this process: send its path or its content instead"),
    (io.BytesIO, "it belongs to this process: send its path or its content instead"),
    (socket.socket, "it belongs to this process: send its address instead"),
    (type(threading.Lock()), "it belongs to this process: each process has its own"),
    (threading.Thread, "it belongs to this process: each process has its own"),
    (functools.partial, "it belongs to this process: send its arguments instead"),
    (Session, "it belongs to this process: send its name instead"),
    (IpcPeer, "it belongs to this process: each process has its own"),
    (ResponsePromise, "it belongs to this process: send its reply instead"),
    (Message, "derive a class from it"),
    (types.CoroutineType, "it belongs to this process: send its result instead"),
    (Failure, "send an ErrorMessage with its text, or call register_type(Failure, encode=lambda e: list(e.args), "),
    (WithReduce, "on both sides call register_type(WithReduce, encode=lambda obj: {'x': obj.x}, decode=lambda"),
    (
        datetime.datetime,
        "on both sides call register_type(datetime, encode=datetime.isoformat, decode=datetime.fromisoformat)",
    ),
    (decimal.Decimal, "on both sides call register_type(Decimal, encode=str, decode=Decimal)"),
    (collections.UserList, "on both sides call register_type(UserList, encode=f, decode=g), where f(obj) returns plain"),
    (asyncio.Future, "on both sides call register_type(Future, encode=f, decode=g), where f(obj) returns plain data"),
]


@pytest.mark.parametrize(("cls", "text"), ADVICE, ids=[cls.__name__ for cls, _ in ADVICE])
def test_advice(cls: Any, text: str) -> None:
    assert advice(cls).startswith(text)
    with pytest.raises(SerializationError) as caught:
        type_info(cls)
    assert f"cannot travel: it is neither plain data nor registered; {text}" in str(caught.value)


@pytest.mark.parametrize("cls", [cls for cls, _ in ADVICE], ids=lambda cls: cls.__name__)
@pytest.mark.usefixtures("own_registry")
def test_no_advice_that_cannot_be_followed(cls: Any) -> None:
    if "register it with" in advice(cls):
        register_type(cls)
    else:
        try:
            register_type(cls)
        except TypeError:
            return
        assert cls.__module__ != __name__, "it could be registered, which is not said"


# --- what other packages make ---------------------------------------------------------------------------------


def test_values_of_numpy() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    for value, text in (
        (numpy.float64(1), "convert it with float(x)"),
        (numpy.float32(1), "convert it with float(x)"),
        (numpy.int64(1), "convert it with int(x)"),
        (numpy.uint8(1), "convert it with int(x)"),
        (numpy.bool_(True), "convert it with bool(x)"),
        (numpy.complex64(1), "convert it with complex(x)"),
        (numpy.str_("x"), "convert it with str(x)"),
        (numpy.bytes_(b"x"), "convert it with bytes(x)"),
        (numpy.datetime64("2024-01-01"), "convert it with x.item()"),
        (numpy.array([1]), "on both sides call register_type(numpy.ndarray, encode=lambda a: [a.dtype.str, a.tolist()], "),
    ):
        assert advice(type(value)).startswith(text)
        with pytest.raises(TypeError, match="cannot be registered: it"):
            register_type(type(value))
        with pytest.raises(SerializationError, match=r"Holder\.x"):
            PickleMessageSerializer().serialize(Holder(value))


@pytest.mark.usefixtures("own_registry")
def test_the_line_for_arrays_works() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    exec(converter_line(numpy.ndarray), {"register_type": register_type, "numpy": numpy})
    for serializer in SERIALIZERS:
        for array_ in (numpy.arange(6.0).reshape(2, 3), numpy.array([1, 2], "uint8"), numpy.array(5)):
            back: Any = serializer.deserialize(serializer.serialize(Holder(array_)))
            assert back.x.dtype == array_.dtype
            assert back.x.shape == array_.shape
            assert (back.x == array_).all()


@pytest.mark.usefixtures("own_registry")
def test_models_of_pydantic() -> None:
    pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")

    class Model(pydantic.BaseModel):  # type: ignore[misc, name-defined]
        when: datetime.datetime
        a: int = 1

    with pytest.raises(TypeError, match="Model cannot be registered: it is a pydantic model.*Model.model_validate"):
        register_type(Model)
    with pytest.raises(TypeError, match="cannot be registered: it is a pydantic model"):

        class Both(Message, pydantic.BaseModel):  # type: ignore[misc, name-defined]
            a: int = 1

    exec(converter_line(Model), {"register_type": register_type, "Model": Model})
    value = Model(when=datetime.datetime(2024, 1, 2), a=5)
    for serializer in SERIALIZERS:
        assert serializer.deserialize(serializer.serialize(Holder(value))) == Holder(value)
    with pytest.raises(SerializationError, match="cannot be built.*ValidationError"):
        type_info(Model).build({"value": {"when": "never"}})


@pytest.mark.usefixtures("own_registry")
def test_structs_of_msgspec() -> None:
    msgspec = pytest.importorskip("msgspec", reason="msgspec is not installed")

    class Struct(msgspec.Struct):  # type: ignore[misc, name-defined]
        a: int

    with pytest.raises(TypeError, match=r"Struct cannot be registered.*msgspec.convert\(data, Struct\)"):
        register_type(Struct)
    exec(converter_line(Struct), {"register_type": register_type, "Struct": Struct, "msgspec": msgspec})
    for serializer in SERIALIZERS:
        assert serializer.deserialize(serializer.serialize(Holder(Struct(5)))) == Holder(Struct(5))


def attrs_classes(attr: Any) -> Any:
    positive = attr.validators.instance_of(int)

    @attr.s(auto_attribs=True)
    class Old:
        a: int = attr.ib(validator=positive)
        b: str = "b"

    @attr.define
    class New:
        a: int = attr.field(validator=positive)
        b: str = "b"

    @attr.frozen
    class Frozen:
        a: int = attr.field(validator=positive)
        b: str = attr.field(default="b", metadata={"wire_name": "bee", "visibility": "protected"})

    @attr.define(kw_only=True)
    class KeywordOnly:
        a: int = attr.field(validator=positive)
        b: str = "b"

    @attr.define
    class Child(New):
        c: int = attr.field(default=3, init=False)

    class Undecorated(New):
        pass

    return [Old, New, Frozen, KeywordOnly, Child, Undecorated]


@pytest.mark.parametrize("index", range(6))
@pytest.mark.usefixtures("own_registry")
def test_an_attrs_class_is_built_by_its_constructor(index: int) -> None:
    attr = pytest.importorskip("attr", reason="attrs is not installed")
    cls = attrs_classes(attr)[index]
    register_type(cls)
    info = type_info(cls)
    assert [f.name for f in info.fields] == ["a", "b"]
    assert info.values(cls(a=1)) == {"a": 1, "b": "b"}
    assert info.build({"a": 1, "b": "x"}) == cls(a=1, b="x")
    assert info.build({"b": "x", "a": 1, "unknown": 2}) == cls(a=1, b="x")
    assert info.build({"a": 1}) == cls(a=1)
    with pytest.raises(SerializationError, match="required field 'a' was not sent"):
        info.build({"b": "x"})
    for values in ({"a": "text", "b": "x"}, {"a": "text"}):
        with pytest.raises(SerializationError, match="cannot be built from the values received: TypeError"):
            info.build(values)
    for serializer in SERIALIZERS:
        assert serializer.deserialize(serializer.serialize(Holder([cls(a=1)]))) == Holder([cls(a=1)])
        wrong = cls(a=1)
        object.__setattr__(wrong, "a", "text")
        with pytest.raises(SerializationError, match="TypeError"):
            serializer.deserialize(serializer.serialize(Holder(wrong)))


@pytest.mark.usefixtures("own_registry")
def test_an_attrs_message_and_private_fields() -> None:
    attr = pytest.importorskip("attr", reason="attrs is not installed")

    @attr.define
    class Task(Message):
        job: str = attr.field(validator=attr.validators.instance_of(str))
        size: float = 1.0

    @attr.define
    class Private:
        _a: int
        b: int = attr.field(default=2, alias="bee")

    for serializer in SERIALIZERS:
        assert serializer.deserialize(serializer.serialize(Task("x"))) == Task("x")
    register_type(Private)
    info = type_info(Private)
    assert [(f.name, f.parameter) for f in info.fields] == [("_a", "a"), ("b", "bee")]
    assert info.build(info.values(Private(1, 3))) == Private(1, 3)
    with pytest.raises(SerializationError, match="required field '_a' was not sent"):
        info.build({"b": 3})


# --- generic classes ------------------------------------------------------------------------------------------


class Box(Message, Generic[T], wire_name="test.converters.Box"):
    def __init__(self, x: T) -> None:
        self.x = x


class SlotBox(Message, Generic[T], wire_name="test.converters.SlotBox"):
    __slots__ = ("__dict__", "x")

    def __init__(self, x: T) -> None:
        self.x = x


@dataclass
class Plate(Message, Generic[T], wire_name="test.converters.Plate"):
    x: T


@dataclass(frozen=True)
class Tray(Message, Generic[T], wire_name="test.converters.Tray"):
    x: T
    more: List[int] = field(default_factory=list)


@register_type(wire_name="test.converters.Bag")
class Bag(Generic[T]):
    def __init__(self, x: T) -> None:
        self.x = x


@pytest.mark.parametrize("serializer", SERIALIZERS, ids=lambda s: type(s).__name__)
def test_generic_messages_travel(serializer: Any) -> None:
    for cls in (Box, SlotBox, Plate, Tray):
        for maker in (cls, cls[int]):  # type: ignore[index]
            back = serializer.deserialize(serializer.serialize(maker(5)))
            assert (type(back), back.x) == (cls, 5)
            for inner in (Box, SlotBox, Plate, Tray, Bag):
                back = serializer.deserialize(serializer.serialize(maker(inner[int](5))))
                assert (type(back), type(back.x), back.x.x) == (cls, inner, 5)
                back = serializer.deserialize(serializer.serialize(maker([inner[int](5)])))
                assert (type(back.x[0]), back.x[0].x) == (inner, 5)
            assert not hasattr(back, "__orig_class__")


def test_a_generic_class_may_be_expected_with_its_parameters() -> None:
    with IpcPeer() as peer:
        a, b = peer.create_session_pair()
        b.on_request(lambda tray: tray)
        assert a.request(Tray(5), expect=Tray[int]).wait().x == 5
        with pytest.raises(UnexpectedReplyError):
            a.request(Tray(5), expect=Plate[int]).wait()
        a.notify(Plate(1))
        a.notify(Tray(2))
        assert b.receive(20, expect=Tray[int]).x == 2
        with pytest.raises(TypeError, match=r"a message class, not .*Bag\[int\]"):
            a.request(Tray(5), expect=Bag[int])  # type: ignore[type-var]


# --- enums as messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [enum.Enum, enum.IntEnum, enum.Flag, enum.IntFlag])
def test_an_enum_is_no_message(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"Command cannot be a message and an enum at once.*register_type.*field"):
        types.new_class("Command", (Message, kind), {}, lambda names: None)
