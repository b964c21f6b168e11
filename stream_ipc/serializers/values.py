"""The standard library's value types that the pickle form carries: taken apart into plain data, checked, built again.

Knows only the standard library. Imported when the first such value is met, so that programs without one do not pay
for ``decimal``, ``uuid`` and ``pathlib``. Every builder checks the types of its arguments: they come off the wire.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import pathlib
import uuid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["build_value", "reducer_of"]

# A defaultdict's factory travels by name, and only if it makes plain data.
_FACTORIES: dict[str, type] = {
    factory.__name__: factory for factory in (bool, int, float, complex, str, bytes, list, tuple, dict, set)
}


def _check(args: tuple[Any, ...], *types: tuple[type, ...]) -> None:
    # Exact types: a bool is an int to isinstance(), and no wire form here has a bool where it has an int.
    if len(args) != len(types) or not all(type(arg) in allowed for arg, allowed in zip(args, types)):
        raise ValueError(f"arguments of the wrong types: {', '.join(type(arg).__name__ for arg in args)}")


_INT, _STR, _NONE = (int,), (str,), type(None)
_ZONE = (datetime.timezone, _NONE)


def _build_complex(*args: Any) -> complex:
    _check(args, (float,), (float,))
    return complex(*args)


def _build_datetime(*args: Any) -> datetime.datetime:
    _check(args, *(_INT,) * 7, _ZONE, _INT)
    return datetime.datetime(*args[:8], fold=args[8])


def _build_date(*args: Any) -> datetime.date:
    _check(args, *(_INT,) * 3)
    return datetime.date(*args)


def _build_time(*args: Any) -> datetime.time:
    _check(args, *(_INT,) * 4, _ZONE, _INT)
    return datetime.time(*args[:5], fold=args[5])


def _build_timedelta(*args: Any) -> datetime.timedelta:
    _check(args, *(_INT,) * 3)
    return datetime.timedelta(*args)


def _build_timezone(*args: Any) -> datetime.timezone:
    _check(args, (datetime.timedelta,), (str, _NONE))
    return datetime.timezone(args[0]) if args[1] is None else datetime.timezone(*args)


def _build_decimal(*args: Any) -> decimal.Decimal:
    _check(args, _STR)
    return decimal.Decimal(args[0])


def _build_uuid(*args: Any) -> uuid.UUID:
    _check(args, (bytes,))
    return uuid.UUID(bytes=args[0])


def _build_ordered_dict(*args: Any) -> Any:
    _check(args, (list,))
    return collections.OrderedDict(args[0])


def _build_deque(*args: Any) -> Any:
    _check(args, (list,), (int, _NONE))
    return collections.deque(*args)


def _build_counter(*args: Any) -> Any:
    _check(args, (dict,))
    return collections.Counter(args[0])


def _build_defaultdict(*args: Any) -> Any:
    _check(args, (str, _NONE), (dict,))
    return collections.defaultdict(None if args[0] is None else _FACTORIES[args[0]], args[1])


def _build_chain_map(*args: Any) -> Any:
    if not all(type(arg) is dict for arg in args):
        raise ValueError("a ChainMap takes dicts")
    return collections.ChainMap(*args)


def _path_builder(cls: type) -> Callable[..., Any]:
    def build(*args: Any) -> Any:
        _check(args, _STR)
        return cls(args[0])

    return build


def _reduce_timezone(value: Any) -> tuple[Any, ...]:
    name = value.tzname(None)
    offset = value.utcoffset(None)
    return (offset, None if name == datetime.timezone(offset).tzname(None) else name)


def _reduce_defaultdict(value: Any) -> tuple[Any, ...]:
    factory = value.default_factory
    if factory is not None and _FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
        raise ValueError(f"the factory of a defaultdict must be one of {', '.join(_FACTORIES)}, not {factory!r}")
    return (None if factory is None else factory.__name__, dict(value))


# By type: (name on the wire, take apart, build)
_TYPES: dict[type, tuple[str, Callable[[Any], tuple[Any, ...]], Callable[..., Any]]] = {
    complex: ("complex", lambda v: (v.real, v.imag), _build_complex),
    datetime.datetime: (
        "datetime",
        lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.tzinfo, v.fold),
        _build_datetime,
    ),
    datetime.date: ("date", lambda v: (v.year, v.month, v.day), _build_date),
    datetime.time: (
        "time",
        lambda v: (v.hour, v.minute, v.second, v.microsecond, v.tzinfo, v.fold),
        _build_time,
    ),
    datetime.timedelta: ("timedelta", lambda v: (v.days, v.seconds, v.microseconds), _build_timedelta),
    datetime.timezone: ("timezone", _reduce_timezone, _build_timezone),
    decimal.Decimal: ("Decimal", lambda v: (str(v),), _build_decimal),
    uuid.UUID: ("UUID", lambda v: (v.bytes,), _build_uuid),
    collections.OrderedDict: ("OrderedDict", lambda v: (list(v.items()),), _build_ordered_dict),
    collections.deque: ("deque", lambda v: (list(v), v.maxlen), _build_deque),
    collections.Counter: ("Counter", lambda v: (dict(v),), _build_counter),
    collections.defaultdict: ("defaultdict", _reduce_defaultdict, _build_defaultdict),
    collections.ChainMap: ("ChainMap", lambda v: tuple(map(dict, v.maps)), _build_chain_map),
}
for _cls in (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath):
    # A concrete path of the other family cannot be made here: building one is a decoding error, as it should be.
    _TYPES[_cls] = (_cls.__name__, lambda v: (str(v),), _path_builder(_cls))

_BUILDERS = {name: build for name, _, build in _TYPES.values()}


def reducer_of(cls: type) -> Callable[[Any], tuple[str, tuple[Any, ...]]] | None:
    """Return what takes a value of a class apart into (name, arguments), or None if the class is not known here."""
    if cls not in _TYPES:
        return None
    name, take_apart, _ = _TYPES[cls]
    return lambda value: (name, take_apart(value))


def build_value(name: str, args: tuple[Any, ...]) -> Any:
    """Build a value from what was received.

    Raises:
        Exception: Of many kinds: the name is unknown, or the arguments are wrong.
    """
    return _BUILDERS[name](*args)
