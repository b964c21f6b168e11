"""How objects travel inside a pickle that names no class: as handles, which the registry turns into objects again.

Knows the registry. Must not know messages, envelopes or payloads: see ``pickle.py``.

An object is written as a call of ``build`` with a tuple ``(shape, value, ...)``. A shape is a wire name and, behind a NUL
each, the names of the fields whose values follow; a class that is rebuilt from its attributes has them all in one dict,
and no names. During the load ``build`` answers with inert handles, because an opcode such as ``BUILD`` that follows a call
could otherwise change an object behind its constructor's back. The ``Resolver`` makes objects of them afterwards.
"""

from __future__ import annotations

from _pickle import Pickler, Unpickler

from .. import registry
from ..errors import SerializationError, article
from ..registry import by_class, not_registered
from ..type_info import compile_function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Any

    from ..type_info import TypeInfo

    TakeApart = Callable[[Any], tuple[Any, ...]]
    Build = Callable[["Handle", "Resolver"], Any]

__all__ = [
    "ADVICE", "ATOMS", "GLOBAL", "SEPARATOR", "Builder", "Handle", "ObjectPickler", "ObjectUnpickler", "Resolver", "build",
    "class_and_fields", "shape_of", "take_apart",
]  # fmt: skip

GLOBAL = ("stream_ipc.serializers.pickle", "build")  # the one global that a payload may name

# The end of the error about a payload that this serializer never writes: a wrong setting is likelier than an attack.
ADVICE = "; if the other side uses PickleMessageSerializer(unsafe=True), both have to"

ATOMS = frozenset({type(None), bool, int, float, str, bytes, bytearray})
SEPARATOR = "\0"  # of the names in a shape; no wire name holds one


class _Inert:
    """Refuses the one opcode that could still change an object on the unpickler's stack."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise SerializationError("a payload may not set the state of an object" + ADVICE)


class Handle(_Inert, tuple):  # type: ignore[type-arg]
    """What stands for an object during a load: its shape and its values, and nothing else.

    A tuple, because the unpickler makes one without running Python.
    """

    __slots__ = ()

    # By identity: as a key it must not be equal to another, and its content has no hash.
    if not TYPE_CHECKING:
        __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class Builder(_Inert):
    """The callable behind ``build``: an instance, so that neither a class nor a function is on the stack."""

    __slots__ = ()
    __module__ = GLOBAL[0]  # where the pickler looks for it
    # A class binds to no instance, so this takes what Handle takes: (shape, value, ...) in one.
    __call__: Callable[..., Any] = Handle


build: Builder = Builder()


# -- shapes


def shape_of(info: TypeInfo) -> str:
    """Return the shape of a class that has fields."""
    return SEPARATOR.join([info.wire_name, *(field.name for field in info.fields)])


def class_and_fields(shape: Any, content: Any) -> tuple[TypeInfo, dict[str, Any]]:
    """Return the class of a shape that was received, and its fields by name."""
    if type(content) is dict:
        info = registry.lookup(shape)
        fields = content
    elif type(content) is tuple and type(shape) is str and SEPARATOR in shape:
        name, *names = shape.split(SEPARATOR)
        info = registry.lookup(name)
        if len(names) != len(content):
            text = f"{info.wire_name} comes with {len(names)} fields and {len(content)} values"
            raise SerializationError(f"payload is not a message: {text}")
        fields = dict(zip(names, content))
    else:
        raise SerializationError("payload is not a message: it has no fields")
    if info.is_enum:  # its members are not made, but found
        raise SerializationError(f"payload is not a message: {info.wire_name} is an enum, and has no fields")
    return info, fields


# -- writing


def _take_apart_of(cls: type) -> TakeApart:
    info = by_class.get(cls)
    if info is None:
        from .pickle_values import reducer_of

        reducer = reducer_of(cls)
        if reducer is None:
            raise not_registered(cls)
        return reducer
    name = info.wire_name
    if info.is_enum:
        return lambda member: (name, _enum_key(member))
    if info.fields:
        values = ", ".join([f"obj.{field.name}" for field in info.fields])
        return compile_function(["def made(obj):", f"    return shape, {values}"], {"shape": shape_of(info)})
    return lambda obj: (name, info.values(obj))


# By class, what takes an object apart: (shape, value, ...).
take_apart: dict[type, TakeApart] = registry.Cache(_take_apart_of)


def _enum_key(member: Any) -> str | int:
    """Return what a member of an enum travels as: its name, or the value of a combination of flags."""
    # A combination has no name, or one made up. With underscores, because a class may have a property ``name`` of its own.
    key: str | int = member._name_
    if key not in type(member).__members__:
        key = member._value_
        if type(key) is not int:
            raise SerializationError(f"a member of {type(member).__qualname__} that has no name cannot travel")
    return key


class _Chunks(list):  # type: ignore[type-arg]
    """A file for the pickler: what is written is a list of buffers, large bytes by reference."""

    __slots__ = ()
    write = list.append


class ObjectPickler(Pickler):
    """Writes registered objects as calls of ``build`` and refuses all others.

    Attributes:
        chunks: What was written: a list of buffers.
        met: The objects that were written, each as often as it was taken apart.
    """

    __slots__ = ("chunks", "met")

    def __init__(self) -> None:
        self.chunks: list[Any] = _Chunks()
        self.met: list[Any] = []
        super().__init__(self.chunks, 5)

    def reducer_override(self, obj: Any) -> Any:
        if obj is build:
            return "build"  # the pickler adds the module
        self.met.append(obj)
        return build, (take_apart[type(obj)](obj),)


# -- reading


class ObjectUnpickler(Unpickler):
    """Answers one global.

    Attributes:
        built: Whether it was asked for.
    """

    __slots__ = ("built",)
    built: bool

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return ``build`` and refuse every other global."""
        # Nothing is looked up by these names, so fix_imports has nothing to change either.
        if (module_name, global_name) != GLOBAL:
            raise SerializationError(f"a payload may not name {module_name}.{global_name}"[:300] + ADVICE)
        self.built = True
        return build


class Resolver:
    """Replaces the handles in a loaded structure by objects, each once, and lets nothing else through.

    Lists, dicts and sets are changed in place, so that what was shared stays shared.

    Args:
        may_loop: Whether a value may contain itself: not beside objects, whose constructors would see it unfinished.
    """

    __slots__ = ("_done", "_may_loop")

    def __init__(self, may_loop: bool) -> None:
        # What values have become, by the id that each had before. All were loaded before the first was resolved, so no two
        # have one id. What was made since may have the id of one that is gone: it must never be looked up.
        self._done: dict[int, Any] = {}
        self._may_loop = may_loop

    def values(self, shape: Any, values: Sequence[Any]) -> list[Any]:
        """Return the values of a shape with objects in place of handles.

        A field that the class does not have here is dropped later: it may hold what cannot be built, so it becomes None.
        """
        # Counted first: while the values are built, which nest, a list of names stays that may be far longer than they are.
        if type(shape) is not str or not values or shape.count(SEPARATOR) != len(values):
            return [self.item(value) for value in values]
        wire_name, *names = shape.split(SEPARATOR)
        info = registry.lookup(wire_name)
        known = {field.name for field in info.fields} if info.is_declared else names
        return [self.item(value) if name in known else None for name, value in zip(names, values)]

    def item(self, value: Any) -> Any:
        """Return a value with objects in place of handles."""
        cls = type(value)
        if cls in ATOMS:
            return value
        done = self._done
        key = id(value)
        if key in done:
            if done[key] is not _IN_PROGRESS:
                return done[key]
            if self._may_loop:
                return value
            raise SerializationError(f"payload contains {article(cls)} that contains itself; only plain data may")
        done[key] = _IN_PROGRESS
        result: Any = value
        if cls is Handle:
            shape = value[0] if value else None
            make = _nested.get(shape, _unusual) if type(shape) is str else _unusual  # the hash of a deep tuple has no end
            result = make(value, self)
        elif cls is list:
            if not ATOMS.issuperset(map(type, value)):
                value[:] = [self.item(item) for item in value]
        elif cls is tuple or cls is frozenset:
            if not ATOMS.issuperset(map(type, value)):
                result = cls([self.item(item) for item in value])
        elif cls is set:
            if (items := self._items(value)) is not value:
                value.clear()
                value.update(items)
        elif cls is dict:
            names, items = self._items(value), self._items(content := value.values())
            if names is not value or items is not content:
                pairs = list(zip(names, items))
                value.clear()
                value.update(pairs)
        else:
            raise SerializationError(f"payload is not a message: it may not hold {article(cls)}")
        done[key] = result
        return result

    def _items(self, values: Collection[Any]) -> Collection[Any]:
        return values if ATOMS.issuperset(map(type, values)) else [self.item(value) for value in values]


_IN_PROGRESS = object()


def _unusual(handle: Handle, resolver: Resolver) -> Any:
    """Build what is not to be built by a function for its class: the first of its shape, and others."""
    shape, *parts = handle or (None,)
    values = resolver.values(shape, parts)
    content = values[0] if len(values) == 1 else None
    is_shape = type(shape) is str and SEPARATOR in shape
    if is_shape or type(content) is dict:
        info, fields = class_and_fields(shape, tuple(values) if is_shape else content)
        if info.fields and shape == shape_of(info):  # before the constructor, which may register a class
            _nested[shape] = _nested_of(info)
        return info.build(fields)
    if type(content) is str or type(content) is int:
        return registry.lookup(shape).member(content)
    if type(content) is tuple and type(shape) is str:
        from .pickle_values import build_value

        return build_value(shape, content)
    raise SerializationError("payload is not a message: it holds an object of an unknown form")


# By shape, what builds an object inside a message.
_nested: dict[str, Build] = {}
registry.clear_on_change(_nested)


def _nested_of(info: TypeInfo) -> Build:
    values = [f"v{index}" for index in range(len(info.fields))]
    lines = [
        "def made(handle, resolver):",
        "    try:",
        f"        _, {', '.join(values)} = handle",
        "    except ValueError:",
        "        return unusual(handle, resolver)",
        *(f"    if type({value}) not in atoms: {value} = resolver.item({value})" for value in values),
    ]
    return info.compile_builder(lines, {"atoms": ATOMS, "unusual": _unusual})
