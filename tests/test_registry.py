from __future__ import annotations

import abc
import collections
import enum
import functools
import re
import signal
import sys
import types
from dataclasses import InitVar, dataclass, field
from typing import Any, Dict, Generic, List, NamedTuple, Protocol, TypeVar

import pytest

from stream_ipc import registry
from stream_ipc.errors import SerializationError
from stream_ipc.messages import ErrorMessage, LogMessage, Message, RequestEnvelope, ResponseEnvelope
from stream_ipc.registry import Cache, lookup, register, register_type, type_info
from stream_ipc.serializers.json import JsonMessageSerializer
from stream_ipc.serializers.php import PhpMessageSerializer
from stream_ipc.serializers.pickle import PickleMessageSerializer


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# --- names ----------------------------------------------------------------------------------------------------


def test_the_default_name_is_module_and_qualified_name() -> None:
    class Local(Message):
        class Inner(Message):
            pass

    prefix = f"{__name__}.test_the_default_name_is_module_and_qualified_name.<locals>.Local"
    assert full_name(Local) == prefix
    assert lookup(prefix).cls is Local
    assert lookup(f"{prefix}.Inner").cls is Local.Inner


def test_a_given_name() -> None:
    class Given(Message, wire_name="App\\Given"):
        pass

    assert lookup("App\\Given").cls is Given
    assert type_info(Given).wire_name == "App\\Given"
    assert repr(type_info(Given)) == "<TypeInfo App\\Given>"
    with pytest.raises(SerializationError):
        lookup(full_name(Given))


def test_a_name_is_not_inherited() -> None:
    class Base(Message, wire_name="test.registry.Base"):
        pass

    class Child(Base):
        pass

    assert type_info(Child).wire_name == full_name(Child)
    assert lookup("test.registry.Base").cls is Base


@pytest.mark.parametrize("name", ["", 5, b"name", ["x"]], ids=repr)
def test_a_name_must_be_text(name: Any) -> None:
    with pytest.raises(TypeError, match="wire_name of .*Named must be a non-empty str"):

        class Named(Message, wire_name=name):
            pass


def test_the_built_in_names_are_those_of_the_original() -> None:
    for cls, name in (
        (LogMessage, "StreamIpc\\Message\\LogMessage"),
        (ErrorMessage, "StreamIpc\\Message\\ErrorMessage"),
        (RequestEnvelope, "StreamIpc\\Envelope\\RequestEnvelope"),
        (ResponseEnvelope, "StreamIpc\\Envelope\\ResponseEnvelope"),
    ):
        assert type_info(cls).wire_name == name
        assert lookup(name).cls is cls


# --- the same name twice --------------------------------------------------------------------------------------


def test_a_redefinition_replaces_and_both_can_be_sent() -> None:
    def define(x: int) -> Any:
        @dataclass
        class Again(Message):
            value: int = x

        return Again

    one, two = define(1), define(2)
    assert one is not two
    assert lookup(full_name(one)).cls is two
    assert type_info(one).wire_name == type_info(two).wire_name
    assert lookup(full_name(one)).build({}).value == 2


def test_another_class_of_a_taken_name_is_refused() -> None:
    class Owner(Message, wire_name="test.registry.taken"):
        pass

    with pytest.raises(ValueError, match=r"wire name 'test.registry.taken' of .*Other is taken by .*Owner; give one"):

        class Other(Message, wire_name="test.registry.taken"):
            pass

    with pytest.raises(ValueError, match="is taken by"):
        register_type(type("Unrelated", (), {}), "test.registry.taken")
    assert lookup("test.registry.taken").cls is Owner
    assert type_info(Owner).build({}).__class__ is Owner


def test_a_refused_class_is_not_registered() -> None:
    class Owner(Message, wire_name="test.registry.taken2"):
        pass

    refused = type("Refused", (), {})
    with pytest.raises(ValueError, match="is taken by"):
        register_type(refused, "test.registry.taken2")
    with pytest.raises(SerializationError, match="cannot travel"):
        type_info(refused)
    register_type(refused)  # the name that was refused is not remembered
    assert type_info(refused).wire_name == full_name(refused)


def test_the_built_in_names_are_taken() -> None:
    with pytest.raises(ValueError, match="is taken by stream_ipc.messages.LogMessage"):

        class MyLog(Message, wire_name="StreamIpc\\Message\\LogMessage"):
            pass


def test_a_dataclass_with_slots_keeps_its_name() -> None:
    names: Dict[str, Any] = {"dataclass": dataclass, "Message": Message, "__name__": __name__}
    exec(
        "@dataclass(slots=True)\n"
        "class Given(Message, wire_name='test.registry.Slots'):\n    a: int\n"
        "@dataclass(slots=True)\n"
        "class Default(Message):\n    a: int\n"
        "@dataclass(slots=True)\n"
        "class Child(Given):\n    b: int = 2\n",
        names,
    )
    assert lookup("test.registry.Slots").cls is names["Given"]
    assert type_info(names["Given"]).wire_name == "test.registry.Slots"
    assert lookup(f"{__name__}.Default").cls is names["Default"]
    assert lookup(f"{__name__}.Child").cls is names["Child"]
    assert type_info(names["Child"]).build({"a": 1}) == names["Child"](1, 2)


def test_registering_again_under_another_name() -> None:
    class Moved(Message, wire_name="test.registry.old"):
        pass

    register_type(Moved, "test.registry.new")
    assert lookup("test.registry.new").cls is Moved
    assert type_info(Moved).wire_name == "test.registry.new"
    with pytest.raises(SerializationError, match="Unknown class: test.registry.old"):
        lookup("test.registry.old")
    register_type(Moved)  # no name given: the one it has
    assert type_info(Moved).wire_name == "test.registry.new"


def test_a_reloaded_module() -> None:
    source = "from stream_ipc.messages import Message\nclass Reloaded(Message):\n    pass\n"
    module = types.ModuleType("reloaded_module")
    exec(source, module.__dict__)
    first = module.__dict__["Reloaded"]
    exec(source, module.__dict__)
    assert lookup("reloaded_module.Reloaded").cls is module.__dict__["Reloaded"] is not first


# --- register_type --------------------------------------------------------------------------------------------


def test_the_forms_of_the_decorator() -> None:
    @register_type
    class Bare:
        pass

    @register_type()
    class Called:
        pass

    @register_type(wire_name="test.registry.Named")
    class Named:
        pass

    @register_type(None, "test.registry.Second")
    class Second:
        pass

    class Direct:
        pass

    assert register_type(Direct, "test.registry.Direct") is Direct
    assert [type_info(cls).wire_name for cls in (Bare, Called, Named, Second, Direct)] == [
        full_name(Bare),
        full_name(Called),
        "test.registry.Named",
        "test.registry.Second",
        "test.registry.Direct",
    ]


@pytest.mark.parametrize("thing", [5, "test.name", Message(), [], lambda: None], ids=repr)
def test_only_classes_can_be_registered(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"register_type\(\) takes a class, not"):
        register_type(thing)


T = TypeVar("T")


class Text(str): ...


class Items(List[int]): ...


class Table(Dict[str, int]): ...


class Failure(ValueError): ...


class Pairs(collections.OrderedDict): ...  # type: ignore[type-arg]


class Triple(tuple): ...  # type: ignore[type-arg]


class Raw(bytes): ...


@pytest.mark.parametrize(
    "cls", [Text, Items, Table, Failure, Pairs, Triple, Raw, int, list, object, Exception, type], ids=lambda c: c.__name__
)
def test_classes_that_derive_from_a_built_in_one_are_refused(cls: Any) -> None:
    with pytest.raises(TypeError):
        register_type(cls)
    with pytest.raises(SerializationError):
        type_info(cls)


def test_why_a_built_in_class_is_refused() -> None:
    text = r"Failure cannot be registered: it derives from ValueError, whose .*; pass converters: register_type\(Fail"
    with pytest.raises(TypeError, match=text):
        register_type(Failure)
    with pytest.raises(TypeError, match="Both cannot be registered: it derives from list, .*; make it a dataclass that"):

        class Both(Message, List[int]):
            pass


def test_classes_that_can_be_registered() -> None:
    class Abstract(Message, abc.ABC):
        pass

    class OfAnything(Message, Generic[T]):
        pass

    class Slots(Message):
        __slots__ = ("a",)

    class Color(enum.Enum):
        RED = 1

    class Number(enum.IntEnum):
        ONE = 1

    class Word(str, enum.Enum):
        A = "a"

    class Pair(NamedTuple):
        a: int

    for kind in (Color, Number, Word, Pair):
        register_type(kind)
    classes: List[Any] = [Abstract, OfAnything, Slots, Color, Number, Word, Pair]
    for cls in classes:
        assert lookup(full_name(cls)).cls is cls
    assert [type_info(cls).is_enum for cls in (Slots, Color, Number, Word, Pair)] == [False, True, True, True, False]


def test_other_arguments_of_a_class_statement_are_passed_on() -> None:
    seen: List[Any] = []

    class Mixin:
        def __init_subclass__(cls, flavour: str = "", **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            seen.append(flavour)

    class Mixed(Message, Mixin, wire_name="test.registry.Mixed", flavour="sweet"):
        pass

    assert seen == ["sweet"]
    assert lookup("test.registry.Mixed").cls is Mixed


def test_a_misspelt_argument_of_a_class_statement() -> None:
    for name in ("wirename", "name", "wireName"):
        text = rf"^Misspelt\(Message, {name}=\.\.\.\): .*: the wire name is given as wire_name="
        with pytest.raises(TypeError, match=text) as caught:
            types.new_class("Misspelt", (Message,), {name: "x"})
        assert isinstance(caught.value.__cause__, TypeError)

    class Refuses:
        def __init_subclass__(cls) -> None:
            raise TypeError("of its own")

    with pytest.raises(TypeError, match="^of its own$"):
        types.new_class("Refused", (Message, Refuses))


# --- looking up -----------------------------------------------------------------------------------------------


def test_an_unknown_name() -> None:
    with pytest.raises(SerializationError, match=r"^Unknown class: no.such.Class \(import the module that defines it on"):
        lookup("no.such.Class")
    with pytest.raises(SerializationError, match=r"Unknown class: __main__.X .*script.*move it to a module.*wire_name"):
        lookup("__main__.X")
    with pytest.raises(SerializationError) as caught:
        lookup("x" * 1_000_000)
    assert len(str(caught.value)) < 400


def test_a_name_that_is_no_text_is_not_even_hashed() -> None:
    class Hashed:
        def __hash__(self) -> int:
            pytest.fail("was hashed")

    things: List[Any] = [None, 5, b"x", [], {}, ("x",), Hashed(), LogMessage]
    for thing in things:
        with pytest.raises(SerializationError, match=f"Unknown class: {type(thing).__name__} "):
            lookup(thing)


def test_an_unregistered_class() -> None:
    class Stranger:
        pass

    with pytest.raises(SerializationError, match="Stranger cannot travel: it is neither plain data nor registered"):
        type_info(Stranger)


def test_caches_are_cleared_by_a_registration() -> None:
    cache = Cache(str)
    assert cache["a"] == "a" and cache == {"a": "a"}
    try:

        class Clearing(Message):
            pass

        assert cache == {}
        cache["b"] = 1
        register_type(Clearing)
        assert cache == {}
        cache["b"] = 1
        with pytest.raises(TypeError):
            register(int)
        assert cache == {"b": 1}
    finally:
        registry._caches.pop()


# --- fields, values, build ------------------------------------------------------------------------------------


@dataclass
class Sample(Message, wire_name="test.registry.Sample"):
    a: int
    b: str = field(default="b", metadata={"wire_name": "bee", "visibility": "protected"})
    c: List[int] = field(default_factory=list)
    d: int = field(init=False, default=4)


class SampleChild(Sample, wire_name="test.registry.SampleChild"):
    """Neither decorated nor with a constructor."""


class SampleOwn(Sample, wire_name="test.registry.SampleOwn"):
    def __init__(self) -> None:
        super().__init__(1)


class Bag(Message, wire_name="test.registry.Bag"):
    pass


@register_type(wire_name="test.registry.Pair")
class Pair(NamedTuple):
    a: int
    b: str = "b"


def test_fields() -> None:
    for cls in (Sample, SampleChild):
        assert [(f.name, f.wire_name, f.annotation, f.visibility) for f in type_info(cls).fields] == [
            ("a", "a", "int", "public"),
            ("b", "bee", "str", "protected"),
            ("c", "c", "List[int]", "public"),
        ]
    assert [(f.name, f.wire_name, f.visibility) for f in type_info(Pair).fields] == [
        ("a", "a", "public"),
        ("b", "b", "public"),
    ]
    assert type_info(Bag).fields == type_info(SampleOwn).fields == ()
    assert [f.wire_name for f in type_info(ErrorMessage).fields] == ["errorMessage"]


def test_what_a_signal_handler_raises_while_annotations_are_evaluated_comes_out() -> None:
    class Meta(type):
        @property
        def __annotations__(cls) -> Dict[str, Any]:  # as those of 3.14, which are evaluated when they are asked for
            signal.raise_signal(signal.SIGALRM)
            return {"a": int}

    class Point(tuple, metaclass=Meta):  # type: ignore[type-arg]
        _fields = ("a",)

    def give_up(*args: Any) -> None:
        raise TimeoutError("too long")

    info = registry.TypeInfo(Point, "test.registry.Point")
    before = signal.signal(signal.SIGALRM, give_up)
    try:
        with pytest.raises(TimeoutError, match="too long"):
            list(info.fields)
        signal.signal(signal.SIGALRM, lambda *args: None)
        assert [f.annotation for f in info.fields] == [int]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_values() -> None:
    sample = Sample(1)
    assert list(type_info(Sample).values(sample).items()) == [("a", 1), ("b", "b"), ("c", [])]
    assert type_info(Sample).values(sample)["c"] is sample.c
    sample.more = 5  # type: ignore[attr-defined]
    assert list(type_info(Sample).values(sample)) == ["a", "b", "c"]
    assert type_info(Pair).values(Pair(1)) == {"a": 1, "b": "b"}
    bag = Bag()
    bag.x = 1  # type: ignore[attr-defined]
    assert type_info(Bag).values(bag) == {"x": 1}
    assert type_info(SampleOwn).values(SampleOwn()) == {"a": 1, "b": "b", "c": []}
    del sample.a
    with pytest.raises(SerializationError, match=r"Sample cannot be sent: it has no value for a field.*'a'"):
        type_info(Sample).values(sample)


def test_build() -> None:
    for info in (type_info(Sample), registry.TypeInfo(Sample, "fresh")):
        assert info.build({"a": 1, "b": "x", "c": [2]}) == Sample(1, "x", [2])
        assert info.build({"c": [2], "a": 1, "unknown": 5}) == Sample(1, "b", [2])
        assert info.build({"a": 1, "d": 99}).d == 4
        with pytest.raises(SerializationError, match=r"required field 'a' was not sent; give it a default or update"):
            info.build({"b": "x"})
    assert type_info(Pair).build({"a": 1}) == Pair(1)
    with pytest.raises(SerializationError, match="required field 'a' was not sent"):
        type_info(Pair).build({})
    own = type_info(SampleOwn).build({"a": 7, "z": 1})
    assert (type(own), vars(own)) == (SampleOwn, {"a": 7, "z": 1})


def test_build_of_a_constructor_that_refuses() -> None:
    class NoText(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    @dataclass
    class Refusing(Message, wire_name="test.registry.Refusing"):
        a: Any

        def __post_init__(self) -> None:
            raise self.a

    for error, text in ((ValueError("why"), "ValueError: why"), (NoText(), "NoText: "), (KeyError("k"), "KeyError: 'k'")):
        for values in ({"a": error}, {"a": error, "more": 1}):
            with pytest.raises(SerializationError, match=f"Refusing cannot be built from the values received: {text}") as e:
                type_info(Refusing).build(values)
            assert e.value.__cause__ is error
    for interrupt in (KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(interrupt)):
            type_info(Refusing).build({"a": interrupt})


def test_build_of_a_class_that_cannot_be_made_without_its_constructor() -> None:
    class Special(functools.partial):  # type: ignore[type-arg]
        pass

    class Abstract(Message, abc.ABC):
        @abc.abstractmethod
        def needed(self) -> None: ...

    with pytest.raises(SerializationError, match=f"{re.escape(full_name(Abstract))} cannot be built"):
        type_info(Abstract).build({"a": 1})
    with pytest.raises(TypeError, match="Special cannot be registered: it derives from partial"):
        register_type(Special)


@dataclass
class Scaled(Message, wire_name="test.Scaled"):
    value: int
    factor: InitVar[int]

    def __post_init__(self, factor: int) -> None:
        self.value *= factor


@dataclass(init=False)
class Positioned(Message, wire_name="test.Positioned"):
    x: int

    def __init__(self, x: int = 0, *, origin: int, **more: Any) -> None:
        self.x = x - origin


@dataclass(init=False)
class Doubled(Message, wire_name="test.Doubled"):
    a: int
    b: int

    def __init__(self, a: int) -> None:
        self.a, self.b = a, 2 * a


@dataclass(init=False)
class Left(Message, wire_name="test.Left"):
    a: int = 1


@dataclass
class Nothing(Message, wire_name="test.registry.Nothing"):
    unused: InitVar[int]


@dataclass
class Holding(Message, wire_name="test.Holding"):
    value: Any


class HasNumber(Protocol):
    number: int


@dataclass
class Checked(Message, wire_name="test.registry.Checked"):
    number: int

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError("negative")


@pytest.mark.parametrize("used", [False, True])
def test_a_protocol_does_not_keep_a_dataclass_from_being_checked(used: bool) -> None:
    class OfProtocol(HasNumber, Checked, wire_name=f"test.OfProtocol{used}"):
        if used:  # from then on it has a constructor of its own, which is its base's
            __init__ = Checked.__init__

    serializer = JsonMessageSerializer()
    payload = serializer.serialize(OfProtocol(number=7))
    assert serializer.deserialize(payload) == OfProtocol(number=7)
    with pytest.raises(SerializationError, match="ValueError: negative"):
        serializer.deserialize(payload.replace(b"7", b"-7"))


class Scaling(Protocol):
    def __init__(self, number: int) -> None:
        self.number = number * 2


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing puts its own in the place of a protocol's constructor")
def test_a_protocol_with_a_constructor_of_its_own_is_no_dataclass() -> None:
    class OfScaling(Scaling, Checked, wire_name="test.OfScaling"): ...

    serializer = JsonMessageSerializer()
    message: Any = serializer.deserialize(serializer.serialize(OfScaling(3)))
    assert message.number == 6


@pytest.mark.parametrize("serializer", [PickleMessageSerializer(), JsonMessageSerializer(), PhpMessageSerializer()])
def test_a_constructor_that_requires_what_no_field_has_is_refused_at_the_sender(serializer: Any) -> None:
    for message, text in (
        (Holding([Scaled(2, factor=3)]), r"^Holding\.value\[0\]: test\.Scaled cannot travel: .*'factor'.* a default$"),
        (Holding(Nothing(1)), r"^Holding\.value: test\.registry\.Nothing cannot travel: .* 'unused'"),
        (Positioned(1, origin=1), r"test\.Positioned cannot travel: its constructor requires 'origin'"),
        (RequestEnvelope("1", Holding(Positioned(1, origin=1))), r"^Holding\.value: test\.Positioned cannot travel"),
        (Doubled(1), r"test\.Doubled cannot travel: its constructor does not take 'b', which is a field; .* init=False"),
        (Left(), r"test\.Left cannot travel: its constructor does not take 'a'"),
    ):
        for _ in range(2):
            with pytest.raises(SerializationError, match=text):
                serializer.serialize(message)


def test_attributes_that_are_set_by_nobody() -> None:
    class Computed(Message, wire_name="test.registry.Computed"):
        @property
        def fixed(self) -> int:
            return 1

    with pytest.raises(SerializationError, match="test.registry.Computed cannot be built.*AttributeError"):
        type_info(Computed).build({"fixed": 2})
    values: Dict[Any, Any] = {"__class__": Bag, "__dict__": {}, 5: 6, "": 7, "_ok": 8}
    built = type_info(Computed).build(values)
    assert (type(built), vars(built)) == (Computed, {"": 7, "_ok": 8})


def test_a_wire_name_with_a_leading_backslash() -> None:
    with pytest.raises(ValueError, match="must not begin with a backslash"):

        @register_type(wire_name="\\App\\Thing")
        class Thing:
            pass
