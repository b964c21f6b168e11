"""What classes are made of: their fields, and how their instances are taken apart and built again.

Must not know which classes are registered, messages or formats.
"""

from __future__ import annotations

import dataclasses
import enum
import sys

from .errors import SerializationError, article, describe
from .interruptions import pass_on

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

__all__ = [
    "BOTH_SIDES", "FieldInfo", "TypeInfo", "compile_function", "fields_of", "is_named_tuple", "is_pydantic", "obstacle",
]  # fmt: skip

# Flags of CPython's type objects.
_HEAP_TYPE = 1 << 9  # made by a class statement, or by an extension module that says so
_CAN_BE_DERIVED_FROM = 1 << 10
_TAKES_KEYWORDS = 1 << 3  # of its code objects: there is a **kwargs

_BUILTIN_METHOD = type(object.__new__)
_STATE_METHODS = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")


class FieldInfo:
    """One field of a registered class.

    Attributes:
        name: The attribute's name in Python.
        wire_name: Its name in formats that are shared with other languages: ``field(metadata={"wire_name": ...})``,
            otherwise the same.
        annotation: What the class body says of its type, as it stands there: a class, a typing construct or text.
        visibility: ``"public"``, or what ``field(metadata={"visibility": ...})`` says for the PHP format.
        parameter: The constructor's name for it; only attrs has another one than ``name``.
        is_required: Whether it has no default.
    """

    def __init__(
        self, name: str, annotation: Any, metadata: Mapping[Any, Any], parameter: str, is_required: bool
    ) -> None:
        self.name: str = name
        self.wire_name: str = str(metadata.get("wire_name", name))
        self.annotation: Any = annotation
        self.visibility: str = str(metadata.get("visibility", "public"))
        self.parameter: str = parameter
        self.is_required: bool = is_required


class TypeInfo:
    """A registered class: its wire name, and how to take its instances apart and build them.

    The class is looked into at first use and not at registration, because ``@dataclass`` runs after
    ``__init_subclass__``.

    Attributes:
        cls: The class.
        wire_name: The name it travels under.
        origin: The module that defines it, and its file.
        encode: Turns an instance into other data, or None; see ``register_type``.
        decode: The reverse, or None.
        is_enum: Whether it travels as the name of a member.
    """

    def __init__(
        self,
        cls: type,
        wire_name: str,
        origin: tuple[str, Any] = ("", None),
        encode: Callable[[Any], Any] | None = None,
        decode: Callable[[Any], Any] | None = None,
    ) -> None:
        self.cls: type = cls
        self.wire_name: str = wire_name
        self.origin: tuple[str, Any] = origin
        self.encode: Callable[[Any], Any] | None = encode
        self.decode: Callable[[Any], Any] | None = decode
        self.is_enum: bool = encode is None and issubclass(cls, enum.Enum)
        self._fields: tuple[FieldInfo, ...] | None = None  # not looked into yet
        self._open = False  # rebuilt from whatever attributes came

    def __repr__(self) -> str:
        return f"<TypeInfo {self.wire_name}>"

    @property
    def fields(self) -> tuple[FieldInfo, ...]:
        """The declared fields; empty for a class that is rebuilt from its attributes or has converters."""
        if self._fields is None:
            fields = None if self.encode is not None else fields_of(self.cls)
            problem = "" if fields is None else _mismatch(self.cls, fields)
            if problem:
                raise SerializationError(f"{self.wire_name} cannot travel: {problem}")
            self._open = self.encode is None and fields is None
            self._fields = fields or ()
        return self._fields

    @property
    def is_declared(self) -> bool:
        """Whether it has the declared fields and no others, be it none at all."""
        return bool(self.fields) or (self.encode is None and not self._open)

    def values(self, obj: Any) -> dict[str, Any]:
        """Take an instance apart: ``{field name: value}`` in the order of declaration."""
        if self.encode is not None:
            try:
                return {"value": self.encode(obj)}
            except Exception as exc:
                text = f"the encode of its register_type() failed: {describe(exc)}"
                raise SerializationError(f"{article(self.cls)} cannot be sent: {text}") from exc
        fields = self.fields
        if self._open:
            return _attributes(obj)
        try:
            return {f.name: getattr(obj, f.name) for f in fields}
        except AttributeError as exc:
            raise SerializationError(f"{type(obj).__name__} cannot be sent: it has no value for a field: {exc}") from exc

    def build(self, values: dict[str, Any]) -> Any:
        """Build an instance with the class's constructor, or its ``decode``.

        Unknown names among the values are dropped, fields without a value take their defaults.
        """
        fields = self.fields
        known: dict[str, Any] = {}
        try:
            if self.decode is not None:
                known["value"] = values["value"]
                obj = self.decode(known["value"])
            elif self._open:
                obj = _rebuilt(self.cls, values)
            else:
                known = {f.parameter: values[f.name] for f in fields if f.name in values}
                obj = self.cls(**known)
        except Exception as exc:
            if self.decode is not None and not known:
                raise SerializationError(f"{self.wire_name} cannot be built: its 'value' was not sent{BOTH_SIDES}") from exc
            missing = [f.name for f in fields if f.is_required and f.parameter not in known]
            if missing:
                raise SerializationError(
                    f"{self.wire_name} cannot be built: required field {missing[0]!r} was not sent; give it a default"
                    " or update the sender"
                ) from exc
            raise self.refused(exc) from exc
        if self.decode is not None and type(obj) is not self.cls:
            raise SerializationError(
                f"{self.wire_name} cannot be built: the decode of its register_type() returned {article(type(obj))};"
                f" it must return {article(self.cls)}"
            )
        return obj

    @property
    def make(self) -> Callable[..., Any]:
        """What builds an instance of a class with fields from the values of all, in order. It raises anything."""
        # The class itself, where the constructor is a plain function with just the fields first: a dataclass may have
        # keyword-only fields, InitVar parameters in between, or a constructor of its own.
        names = tuple([f.parameter for f in self.fields])
        cls: Any = self.cls
        code = getattr(cls.__init__, "__code__", None)
        if (
            type(cls).__call__ is type.__call__
            and cls.__new__ is object.__new__
            and code is not None
            and code.co_argcount > len(names)
            and code.co_varnames[1 : 1 + len(names)] == names
        ):
            return self.cls
        values = ", ".join([f"v{i}" for i in range(len(names))])
        arguments = ", ".join([f"{name}=v{i}" for i, name in enumerate(names)])
        return compile_function([f"def made({values}):", f"    return cls({arguments})"], {"cls": cls})

    def compile_builder(self, lines: list[str], names: dict[str, Any]) -> Callable[..., Any]:
        """Compile a function that builds an instance of a class with fields, or raises SerializationError.

        ``lines`` is its source, up to where ``v0``, ``v1``, ... are the fields' values, and ``names`` what that sees.
        """
        values = ", ".join([f"v{i}" for i in range(len(self.fields))])
        end = f"    try:\n        return make({values})\n    except Exception as exc:\n        raise refused(exc) from exc"
        return compile_function([*lines, end], {**names, "make": self.make, "refused": self.refused})

    def member(self, key: str | int) -> Any:
        """Return the member of an enum by its name, or flags by their value, or raise SerializationError."""
        cls: Any = self.cls
        try:
            if not self.is_enum:
                raise KeyError(key)
            return cls.__members__[key] if isinstance(key, str) else cls(key)
        except Exception as exc:
            raise self.no_member(key) from exc

    def no_member(self, key: Any) -> SerializationError:
        """Return the error about a member that this side does not know."""
        return SerializationError(f"{self.wire_name} has no member {key!r:.100}; add it to the enum on this side too")

    def refused(self, exc: Exception) -> SerializationError:
        """Return the error about a constructor that has raised another one."""
        return SerializationError(f"{self.wire_name} cannot be built from the values received: {describe(exc)}")


BOTH_SIDES = "; call register_type() with the same encode and decode on both sides"


def is_named_tuple(cls: type) -> bool:
    """Tell whether a class is a NamedTuple or derives from one."""
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def obstacle(cls: type, strict: bool = True) -> str:
    """Say why instances of a class cannot be rebuilt; an empty text if they can.

    If ``strict``, a constructor that does not take the fields is an obstacle too, and so are methods that say how it is
    pickled or copied. A class that is still to be decorated gets another constructor, and may become a dataclass, for which
    such methods do not matter.
    """
    if issubclass(cls, enum.Enum):
        return ""
    for base in () if is_named_tuple(cls) else cls.__mro__[:-1] or cls.__mro__:
        flags = base.__flags__
        made_in_c = type(base.__dict__.get("__new__")) is _BUILTIN_METHOD or not flags & _CAN_BE_DERIVED_FROM
        if not flags & _HEAP_TYPE or (made_in_c and base.__module__ != "typing"):
            if base is cls:
                return "its content is not in its attributes"
            return f"it derives from {base.__name__}, whose content is not in its attributes"
    fields = fields_of(cls)
    if fields is not None:
        return _mismatch(cls, fields) if strict else ""
    for base in cls.__mro__[:-1]:
        for name in _slots(base):
            if _is_dunder(name) and name not in ("__dict__", "__weakref__"):
                what = "it is a pydantic model" if is_pydantic(cls) else f"it has the slot {name}"
                return f"{what}, so it has state that its attributes do not show"
        if strict:
            for name in _STATE_METHODS:
                if name in base.__dict__:
                    return f"it has a method {name}(), so its attributes alone do not rebuild it"
    return ""


def _slots(cls: type) -> Iterable[str]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots


def _is_dunder(name: Any) -> bool:
    return isinstance(name, str) and name[:2] == "__" == name[-2:]


def is_pydantic(cls: type) -> bool:
    """Tell whether a class is a model of pydantic, without importing that."""
    return any([base.__name__ == "BaseModel" and base.__module__.startswith("pydantic.") for base in cls.__mro__])


def fields_of(cls: Any) -> tuple[FieldInfo, ...] | None:
    """Return what the constructor of a class takes, or None if instances are rebuilt from their attributes."""
    # A class that derives from a dataclass and is not decorated itself has its base's fields, constructor and checks;
    # one with a constructor of its own has not.
    for base in cls.__mro__:
        if "__dataclass_fields__" in base.__dict__:
            missing = dataclasses.MISSING
            declared = [f for f in dataclasses.fields(cls) if f.init]
            return tuple([_field(f, f.name, f.default is missing and f.default_factory is missing) for f in declared])
        if "__attrs_attrs__" in base.__dict__:  # calls the parameter of a private field _x just x
            nothing = getattr(sys.modules.get("attr"), "NOTHING", None)
            named = [(a, getattr(a, "alias", None) or a.name.lstrip("_")) for a in cls.__attrs_attrs__ if a.init]
            return tuple([_field(a, name, a.default is nothing) for a, name in named])
        if _has_own_constructor(base, cls):
            break
    if is_named_tuple(cls):
        annotations, defaults = _annotations(cls), getattr(cls, "_field_defaults", {})
        return tuple([FieldInfo(f, annotations.get(f, object), {}, f, f not in defaults) for f in cls._fields])
    return None


def _has_own_constructor(base: Any, cls: type) -> bool:
    """Return whether a class, of the bases of another, has a constructor that takes the place of those behind it."""
    init = base.__dict__.get("__init__")
    if base.__dict__.get("_is_protocol") and getattr(init, "__module__", "typing") == "typing":
        return False  # typing has given it one, which calls the next
    behind = cls.__mro__[cls.__mro__.index(base) + 1 :]
    # At the first call typing puts the constructor behind a protocol into the class that derives from that.
    is_borrowed = any([other.__dict__.get("__init__") is init for other in behind])
    return (init is not None and not is_borrowed) or "__new__" in base.__dict__


def _field(f: Any, parameter: str, is_required: bool) -> FieldInfo:
    return FieldInfo(f.name, f.type, f.metadata, parameter, is_required)


def _annotations(cls: Any) -> dict[str, Any]:
    for base in cls.__mro__:
        if "_fields" in base.__dict__:
            try:
                return dict(base.__annotations__)
            except Exception as exc:  # from CPython 3.14 on they are evaluated now, and a name may be missing
                pass_on(exc)
                break
    return {}


def _mismatch(cls: Any, fields: tuple[FieldInfo, ...]) -> str:
    """Say why a constructor cannot be called with just the fields, by their names; an empty text if it can."""
    constructors = [c for c in (cls.__init__, cls.__new__) if c not in (object.__init__, object.__new__)]
    for function in constructors or [_takes_nothing]:
        code = getattr(function, "__code__", None)
        if code is None or type(cls).__call__ is not type.__call__:  # a metaclass may know more
            continue
        positional, end = code.co_argcount, code.co_argcount + code.co_kwonlyargcount
        required = {*code.co_varnames[1 : positional - len(function.__defaults__ or ())], *code.co_varnames[positional:end]}
        required.difference_update(function.__kwdefaults__ or (), [f.parameter for f in fields])
        if required:
            name = min(required)
            return f"its constructor requires {name!r}, which is not a field (an InitVar does not count); give it a default"
        taken = code.co_varnames[code.co_posonlyargcount or 1 : end]
        for f in fields:
            if f.parameter not in taken and not code.co_flags & _TAKES_KEYWORDS:
                return f"its constructor does not take {f.parameter!r}, which is a field; declare the field with init=False"
    return ""


def _takes_nothing(self: Any) -> None:
    pass


def _attributes(obj: Any) -> dict[str, Any]:
    """Return the attributes of an instance that are its state, those in slots first."""
    values: dict[str, Any] = {}
    for base in reversed(type(obj).__mro__):
        for name in _slots(base):
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{base.__name__.lstrip('_')}{name}"
            if not _is_dunder(name) and hasattr(obj, name):
                values[name] = getattr(obj, name)
    values.update(getattr(obj, "__dict__", {}))
    values.pop("__orig_class__", None)  # which Box[int](5) leaves behind
    return values


def _rebuilt(cls: type, values: dict[str, Any]) -> Any:
    """Return an instance with these attributes; its constructor is not called."""
    obj: Any = object.__new__(cls)
    for name, value in values.items():
        # object.__setattr__ so that a frozen class can be rebuilt; dunder names are no fields.
        if isinstance(name, str) and not name.startswith("__"):
            try:
                object.__setattr__(obj, name, value)
            except AttributeError:
                if hasattr(cls, name):  # a property that cannot be set
                    raise
                # No slot for it: this side does not know it.
    return obj


def compile_function(lines: Sequence[str], names: dict[str, Any]) -> Callable[..., Any]:
    """Compile the source of one function called ``made``, which sees just ``names``.

    Code that names the fields of a class one by one is faster than a loop over them; ``dataclass`` makes ``__init__`` the
    same way, for the same reason. Only identifiers and ``repr`` of texts go into the source.
    """
    scope = dict(names)
    exec("\n".join(lines), scope)  # noqa: S102
    made: Callable[..., Any] = scope["made"]
    return made
