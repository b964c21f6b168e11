"""The standard library's value types that the pickle form carries: taken apart into plain data and built again.

Knows the standard library. Must not know registered classes. Imported when the first such value is met, so that programs
without one do not pay for ``decimal``, ``uuid`` and ``pathlib``. The types of all arguments are checked, because they come
off the wire.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import pathlib
import uuid

from ..errors import SerializationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    TakeApart = Callable[[Any], tuple[Any, ...]]

__all__ = ["build_value", "reducer_of"]

# A defaultdict's factory travels by name, and only if it makes plain data.
_FACTORIES: dict[str | None, type | None] = {
    factory.__name__: factory for factory in (bool, int, float, complex, str, bytes, list, tuple, dict, set)
}
_FACTORIES[None] = None


def _factory_name(factory: Any) -> str | None:
    name: str | None = getattr(factory, "__name__", None)
    if _FACTORIES.get(name) is not factory:
        names = ", ".join(filter(None, _FACTORIES))
        raise SerializationError(f"the factory of a defaultdict must be one of {names}, not {factory!r}")
    return name


def _factory(name: str | None) -> type | None:
    if name not in _FACTORIES:
        raise _unknown(f"defaultdict of {name}")
    return _FACTORIES[name]


def _unknown(what: str) -> SerializationError:
    return SerializationError(
        f"the other side sent a {what[:40]!a}, which this version of stream_ipc does not know; update it"
    )


def _reduce_timezone(value: datetime.timezone) -> tuple[Any, ...]:
    name = value.tzname(None)
    offset = value.utcoffset(None)
    return (offset, None if name == datetime.timezone(offset).tzname(None) else name)


# What an argument may be, or a registered class may derive from. No wire form here has a bool for an int.
_INT, _FLOAT, _STR, _LIST, _DICT = (int,), (float,), (str,), (list,), (dict,)
_ZONE = (datetime.tzinfo, type(None))
_INT_OR_NONE = (int, type(None))
_STR_OR_NONE = (str, type(None))

# By type: what takes a value apart into arguments; what each of them may be; what builds a value of them.
_TYPES: dict[type, tuple[TakeApart, tuple[Any, ...], Callable[..., Any]]] = {
    complex: (lambda v: (v.real, v.imag), (_FLOAT, _FLOAT), complex),
    datetime.datetime: (
        lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.tzinfo, v.fold),
        (*(_INT,) * 7, _ZONE, _INT),
        lambda *args: datetime.datetime(*args[:8], fold=args[8]),
    ),
    datetime.date: (lambda v: (v.year, v.month, v.day), (_INT,) * 3, datetime.date),
    datetime.time: (
        lambda v: (v.hour, v.minute, v.second, v.microsecond, v.tzinfo, v.fold),
        (*(_INT,) * 4, _ZONE, _INT),
        lambda *args: datetime.time(*args[:5], fold=args[5]),
    ),
    datetime.timedelta: (lambda v: (v.days, v.seconds, v.microseconds), (_INT,) * 3, datetime.timedelta),
    datetime.timezone: (
        _reduce_timezone,
        ((datetime.timedelta,), _STR_OR_NONE),
        lambda offset, name: datetime.timezone(offset) if name is None else datetime.timezone(offset, name),
    ),
    decimal.Decimal: (lambda v: (str(v),), (_STR,), decimal.Decimal),
    uuid.UUID: (lambda v: (v.bytes,), ((bytes,),), lambda data: uuid.UUID(bytes=data)),
    collections.OrderedDict: (lambda v: (list(v.items()),), (_LIST,), collections.OrderedDict),
    collections.deque: (lambda v: (list(v), v.maxlen), (_LIST, _INT_OR_NONE), collections.deque),
    collections.Counter: (lambda v: (dict(v),), (_DICT,), collections.Counter),
    collections.defaultdict: (
        lambda v: (_factory_name(v.default_factory), dict(v)),
        (_STR_OR_NONE, _DICT),
        lambda name, items: collections.defaultdict(_factory(name), items),
    ),
    collections.ChainMap: (lambda v: tuple(map(dict, v.maps)), (_DICT, ...), collections.ChainMap),
}
for _cls in (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath):
    # A concrete path of the other family cannot be made here: building one is a decoding error, as it should be.
    _TYPES[_cls] = (lambda v: (str(v),), (_STR,), _cls)

_BY_NAME = {cls.__name__: entry for cls, entry in _TYPES.items()}


def reducer_of(cls: type) -> Callable[[Any], tuple[str, tuple[Any, ...]]] | None:
    """Return what takes a value of a class apart into (name, arguments), or None if the class is not known here."""
    if cls not in _TYPES:
        return None
    name, take_apart = cls.__name__, _TYPES[cls][0]
    return lambda value: (name, take_apart(value))


def _fits(arg: Any, allowed: tuple[type, ...]) -> bool:
    return isinstance(arg, allowed) and type(arg) is not bool


def build_value(name: str, args: tuple[Any, ...]) -> Any:
    """Build a value from what was received.

    Raises:
        SerializationError: The name is unknown.
        Exception: Of many kinds: the arguments are wrong.
    """
    if name not in _BY_NAME:
        raise _unknown(name)
    _, types, build = _BY_NAME[name]
    if types[-1] is ...:
        types = types[:1] * len(args)
    if len(args) != len(types) or not all(map(_fits, args, types)):
        raise ValueError(f"arguments of the wrong types: {', '.join(type(arg).__name__ for arg in args)}")
    return build(*args)
