"""Which classes may travel, under which name, and how their instances are taken apart and built again.

Knows classes, their wire names and their fields. Must not know any serialization format, messages in particular,
or I/O. Everything that comes off a wire is built here, by ``TypeInfo.build``: a class that was never registered
cannot be built, whatever the bytes say.
"""

from __future__ import annotations

import dataclasses
import enum
import sys

from .errors import SerializationError, describe, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Tuple, Type, TypeVar, Union, overload

    T = TypeVar("T")

__all__ = [
    "FieldInfo",
    "TypeInfo",
    "by_class",
    "clear_on_change",
    "default_wire_name",
    "lookup",
    "not_registered",
    "register",
    "register_type",
    "type_info",
]

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: set for classes made by a class statement

_by_class: Dict[type, TypeInfo] = {}
by_class = _by_class  # for serializers, which only read it
_by_name: Dict[str, TypeInfo] = {}
_caches: List[Dict[Any, Any]] = []  # what serializers have worked out of the entries


class FieldInfo:
    """One field of a registered class.

    Attributes:
        name: The attribute's name in Python.
        wire_name: Its name in formats that are shared with other languages: ``field(metadata={"wire_name": ...})``,
            otherwise the same.
        annotation: What the class body says of its type, as it stands there: a class, a typing construct or text.
        visibility: ``"public"``, or what ``field(metadata={"visibility": ...})`` says for the PHP format.
    """

    __slots__ = ("annotation", "name", "visibility", "wire_name")

    def __init__(self, name: str, wire_name: str, annotation: Any, visibility: str) -> None:
        self.name: str = name
        self.wire_name: str = wire_name
        self.annotation: Any = annotation
        self.visibility: str = visibility


class TypeInfo:
    """A registered class: its wire name, and how to take its instances apart and build them.

    The class is looked into at first use and not at registration, because ``@dataclass`` runs after
    ``__init_subclass__``.

    Attributes:
        cls: The class.
        wire_name: The name it travels under.
        names: The declared fields; None until the class has been looked into, and something that no instance's fields
            equal if it is rebuilt from its attributes.
        values: Takes an instance apart: ``{field name: value}`` in the order of declaration. The dict may be the
            instance's own: do not change it.
    """

    def __init__(self, cls: type, wire_name: str) -> None:
        self.cls = cls
        self.wire_name = wire_name
        self.is_enum: bool = issubclass(cls, enum.Enum)
        self.names: Optional[Tuple[str, ...]] = None  # None: not looked into yet
        self._open = False  # rebuilt from whatever attributes came
        self._fields: Tuple[FieldInfo, ...] = ()

    def __repr__(self) -> str:
        return f"<TypeInfo {self.wire_name}>"

    @property
    def fields(self) -> Tuple[FieldInfo, ...]:
        """The declared fields; empty for a class that is rebuilt from its attributes."""
        if self.names is None:
            self._inspect()
        return self._fields

    def values(self, obj: Any) -> Dict[str, Any]:
        """Take an instance apart. Replaced by a function made for the class at the first call."""
        self._inspect()
        return self.values(obj)

    def build(self, values: Dict[str, Any]) -> Any:
        """Build an instance with the class's constructor.

        Args:
            values: ``{field name: value}``. Unknown names are dropped, missing ones take their defaults.

        Raises:
            SerializationError: A required field is missing, or the constructor refused the values.
        """
        try:
            if tuple(values) == self.names:  # exactly the fields in their order, and looked into before
                return self.cls(**values)
        except Exception as exc:
            raise self._refused(exc) from exc
        return self._build_slowly(values)

    def refused(self, exc: Exception) -> SerializationError:
        """Return the error for a constructor that raised."""
        return SerializationError(f"{self.wire_name} cannot be built from the values received: {describe(exc)}")

    _refused = refused

    def _build_slowly(self, values: Dict[str, Any]) -> Any:
        if self.names is None:
            self._inspect()
        if self._open:
            return self._build_open(values)
        known: Dict[str, Any] = {}
        try:
            known = {name: values[name] for name in self.names or () if name in values}
            return self.cls(**known)
        except Exception as exc:
            missing = [f.name for f in self._fields if f.name not in known and f.name in self._required()]
            if missing:
                raise SerializationError(
                    f"{self.wire_name} cannot be built: required field {missing[0]!r} was not sent; give it a default"
                    " or update the sender"
                ) from exc
            raise self._refused(exc) from exc

    def _build_open(self, values: Dict[str, Any]) -> Any:
        try:
            obj: Any = object.__new__(self.cls)
            for name, value in values.items():
                # object.__setattr__ so that a frozen class can be rebuilt; dunder names are nobody's fields.
                if isinstance(name, str) and not name.startswith("__"):
                    try:
                        object.__setattr__(obj, name, value)
                    except AttributeError:
                        if hasattr(self.cls, name):  # a property that cannot be set
                            raise
                        # No slot for it: this side does not know it.
            return obj
        except Exception as exc:
            raise self._refused(exc) from exc

    def _required(self) -> List[str]:
        if not dataclasses.is_dataclass(self.cls):
            defaults = getattr(self.cls, "_field_defaults", {})
            return [f.name for f in self._fields if f.name not in defaults]
        missing = dataclasses.MISSING
        return [
            f.name for f in dataclasses.fields(self.cls) if f.default is missing and f.default_factory is missing
        ]

    def _inspect(self) -> None:
        cls = self.cls
        if _has_constructor_of_dataclass(cls):
            self._fields = tuple(
                FieldInfo(
                    f.name,
                    str(f.metadata.get("wire_name", f.name)),
                    f.type,
                    str(f.metadata.get("visibility", "public")),
                )
                for f in dataclasses.fields(cls)
                if f.init
            )
        elif issubclass(cls, tuple):  # a NamedTuple
            annotations = cls.__dict__.get("__annotations__", {})
            self._fields = tuple(
                FieldInfo(name, name, annotations.get(name, object), "public")
                for name in cls._fields  # type: ignore[attr-defined]
            )
        else:
            self._open = True
        names = tuple(f.name for f in self._fields)
        self.values = self._open_values if self._open else _values_of(names)  # type: ignore[assignment,method-assign]
        # An impossible name keeps build() off its quick way for classes that are rebuilt from attributes.
        self.names = ("",) if self._open else names

    @staticmethod
    def _open_values(obj: Any) -> Dict[str, Any]:
        values: Dict[str, Any] = {}
        for base in reversed(type(obj).__mro__):
            slots = base.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name.startswith("__") and not name.endswith("__"):
                    name = f"_{base.__name__.lstrip('_')}{name}"
                if name not in ("__dict__", "__weakref__") and hasattr(obj, name):
                    values[name] = getattr(obj, name)
        values.update(getattr(obj, "__dict__", {}))
        return values


def _values_of(names: Tuple[str, ...]) -> Callable[[Any], Dict[str, Any]]:
    def values(obj: Any) -> Dict[str, Any]:
        # The instance's own dict when it holds just the fields: 0.1 us against 0.4 us for a new one.
        try:
            own: Dict[str, Any] = obj.__dict__
            if tuple(own) == names:
                return own
        except AttributeError:  # __slots__
            pass
        try:
            return {name: getattr(obj, name) for name in names}
        except AttributeError as exc:
            raise SerializationError(f"{type(obj).__name__} cannot be sent: it has no value for a field: {exc}") from exc

    return values


def _has_constructor_of_dataclass(cls: type) -> bool:
    # A class that derives from a dataclass and is not decorated itself has its base's fields, constructor and checks;
    # one with a constructor of its own has not.
    for base in cls.__mro__:
        if "__dataclass_fields__" in base.__dict__:
            return True
        if "__init__" in base.__dict__ or "__new__" in base.__dict__:
            break
    return False


def default_wire_name(cls: type) -> str:
    """The wire name of a class that was given none: ``module.QualName``.

    In a module that runs as ``python -m pkg.mod`` the name is ``pkg.mod`` and not ``__main__``, so that both ends
    of a conversation agree on it. The same script in a child of ``multiprocessing`` is ``__mp_main__``.
    """
    module = cls.__module__
    if module in ("__main__", "__mp_main__"):
        spec = getattr(sys.modules.get(module), "__spec__", None)
        module = "__main__" if spec is None else spec.name
    return f"{module}.{cls.__qualname__}"


def register(cls: type, wire_name: Optional[str] = None) -> None:
    """Enter a class under its wire name.

    Raises:
        TypeError: Instances of the class cannot be rebuilt from their fields.
        ValueError: The wire name is taken by another class.
    """
    _check_rebuildable(cls)
    if wire_name is None:
        # @dataclass(slots=True) makes the class a second time, without the class statement's keywords and, until it
        # is done, without the names of what it stands in: the wire name is found in the copied namespace.
        wire_name = cls.__dict__.get("_stream_ipc_wire_name") or default_wire_name(cls)
    elif not isinstance(wire_name, str) or not wire_name:
        raise TypeError(f"wire_name of {cls.__qualname__} must be a non-empty str, not {wire_name!r}")
    elif wire_name.startswith("\\"):
        raise ValueError(
            f"wire_name of {cls.__qualname__} begins with a backslash, as no class name on the wire does: {wire_name!r}"
        )
    elif "\0" in wire_name:
        raise ValueError(f"wire_name of {cls.__qualname__} holds a NUL, as no class name does: {wire_name!r}")
    taken = _by_name.get(wire_name)
    if taken is not None and taken.cls is not cls:
        old = taken.cls
        fields = cls.__dict__.get("__dataclass_fields__")
        copied = fields is not None and fields is old.__dict__.get("__dataclass_fields__")
        if not copied and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"wire name {wire_name!r} of {cls.__module__}.{cls.__qualname__} is taken by"
                f" {old.__module__}.{old.__qualname__}; give one of them another wire_name"
            )
    cls._stream_ipc_wire_name = wire_name  # type: ignore[attr-defined]
    previous = _by_class.get(cls)
    if previous is not None and _by_name.get(previous.wire_name) is previous:
        del _by_name[previous.wire_name]  # registered again under another name: that one counts
    _by_class[cls] = _by_name[wire_name] = TypeInfo(cls, wire_name)
    for cache in _caches:  # last: what is put in from now on is of the new entry
        cache.clear()


def _check_rebuildable(cls: type) -> None:
    if not isinstance(cls, type):
        raise TypeError(f"register_type() takes a class, not {cls!r}")
    if issubclass(cls, enum.Enum) or (issubclass(cls, tuple) and hasattr(cls, "_fields")):
        return
    for base in cls.__mro__[:-1]:
        if not base.__flags__ & _HEAP_TYPE:
            raise TypeError(
                f"{cls.__qualname__} cannot be registered: it derives from {base.__name__}, whose content is not in"
                " its attributes; make it a dataclass that has a field for it"
            )


if TYPE_CHECKING:

    @overload
    def register_type(cls: Type[T], wire_name: Optional[str] = None) -> Type[T]: ...

    @overload
    def register_type(cls: None = None, wire_name: Optional[str] = None) -> Callable[[Type[T]], Type[T]]: ...


def register_type(
    cls: Optional[Type[T]] = None, wire_name: Optional[str] = None
) -> Union[Type[T], Callable[[Type[T]], Type[T]]]:
    """Let a class that is no ``Message`` travel inside messages: a nested dataclass, an enum, a NamedTuple.

    Usable as a decorator, with and without arguments::

        @register_type
        @dataclass
        class Point:
            x: int
            y: int

        @register_type(wire_name="App\\\\Message\\\\Suit")
        class Suit(enum.Enum): ...

    Args:
        cls: The class. A dataclass or NamedTuple is rebuilt by its constructor, an enum by its member's name, any
            other class from its attributes.
        wire_name: The name it travels under; by default ``module.QualName``. Both sides must use the same.

    Returns:
        The class itself.

    Raises:
        TypeError: Instances of the class cannot be rebuilt (it derives from ``list``, an exception, ...).
        ValueError: The wire name is taken by another class.
    """
    if cls is None:
        return lambda decorated: register_type(decorated, wire_name)
    register(cls, wire_name)
    return cls


def clear_on_change(cache: Dict[Any, Any]) -> None:
    """Have a dict emptied whenever a class is registered.

    For what a serializer works out per class and keeps: with this it need not ask, for every message, whether its
    entry is still the current one. Never forgotten again, so for dicts at module level.
    """
    _caches.append(cache)


def type_info(cls: type) -> TypeInfo:
    """The entry of a class.

    Raises:
        SerializationError: The class is not registered.
    """
    try:
        return _by_class[cls]
    except KeyError:
        raise not_registered(cls) from None


def not_registered(cls: type) -> SerializationError:
    """Return the error about a class that cannot travel."""
    return SerializationError(
        f"{cls.__module__}.{cls.__qualname__} cannot travel: it is neither plain data nor registered; derive it"
        " from Message or register it with register_type()"
    )


def lookup(wire_name: Any) -> TypeInfo:
    """The entry of a wire name that was received.

    Raises:
        SerializationError: Nothing is registered under that name.
    """
    if isinstance(wire_name, str):  # nothing else is hashed: of a deeply nested tuple that ends the process
        try:
            return _by_name[wire_name]
        except KeyError:
            pass
    shown = printable(wire_name[:200]) if isinstance(wire_name, str) else type(wire_name).__name__
    advice = "import the module that defines it on this side too"
    if isinstance(wire_name, str) and wire_name.startswith("__main__."):
        advice = (
            "the sender defined it in the script it was started with, which no other program can import;"
            " move it to a module that both sides import, or give it a wire_name"
        )
    raise SerializationError(f"Unknown class: {shown} ({advice})")
