"""What to do about a class whose instances cannot travel, for the texts of errors.

Knows classes of the standard library and of well-known packages by their names, and never imports one. Must not know
which classes are registered. Imported when there is such an error.
"""

from __future__ import annotations

import enum
import sys

from .classes import is_named_tuple, is_pydantic, obstacle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["advice", "converter_line"]

# What to pass to register_type() for a class, by the full name of the class or of one of its bases: {0} is the class.
_AS_TEXT = "encode=str, decode={0}"
_AS_ISO = "encode={0}.isoformat, decode={0}.fromisoformat"
_AS_LIST = "encode=list, decode={0}"
_AS_DICT = "encode=dict, decode={0}"
_AS_HEX = "encode={0}.hex, decode={0}.fromhex"
_CONVERTERS = {
    "array.array": "encode=lambda a: [a.typecode, a.tolist()], decode=lambda data: {0}(*data)",
    "builtins.BaseException": "encode=lambda e: list(e.args), decode=lambda data: {0}(*data)",
    "builtins.bytearray": _AS_HEX,
    "builtins.bytes": _AS_HEX,
    "builtins.complex": "encode=lambda z: [z.real, z.imag], decode=lambda data: {0}(*data)",
    "builtins.dict": _AS_DICT,
    "builtins.float": "encode=float, decode={0}",
    "builtins.frozenset": _AS_LIST,
    "builtins.int": "encode=int, decode={0}",
    "builtins.list": _AS_LIST,
    "builtins.set": _AS_LIST,
    "builtins.slice": "encode=lambda s: [s.start, s.stop, s.step], decode=lambda data: {0}(*data)",
    "builtins.range": "encode=lambda r: [r.start, r.stop, r.step], decode=lambda data: {0}(*data)",
    "builtins.str": _AS_TEXT,
    "builtins.tuple": _AS_LIST,
    "collections.defaultdict": "encode=dict, decode=lambda data: {0}(None, data)",
    "collections.deque": _AS_LIST,
    "datetime.date": _AS_ISO,
    "datetime.time": _AS_ISO,
    "datetime.timedelta": "encode=lambda d: [d.days, d.seconds, d.microseconds], decode=lambda data: {0}(*data)",
    "datetime.timezone": (
        "encode=lambda z: z.utcoffset(None).total_seconds(), decode=lambda data: {0}(timedelta(seconds=data))"
    ),
    "decimal.Decimal": _AS_TEXT,
    "fractions.Fraction": _AS_TEXT,
    "ipaddress._IPAddressBase": _AS_TEXT,
    "msgspec.Struct": "encode=msgspec.to_builtins, decode=lambda data: msgspec.convert(data, {0})",
    "numpy.generic": "encode={0}.item, decode={0}",
    "numpy.ndarray": "encode=lambda a: [a.dtype.str, a.tolist()], decode=lambda data: numpy.array(data[1], data[0])",
    "pathlib.PurePath": _AS_TEXT,
    "re.Pattern": "encode=lambda p: [p.pattern, p.flags], decode=lambda data: re.compile(*data)",
    "types.SimpleNamespace": "encode=vars, decode=lambda data: {0}(**data)",
    "uuid.UUID": _AS_TEXT,
    "zoneinfo.ZoneInfo": _AS_TEXT,
}

# What turns a value into plain data, by the full name of its class or of one of its bases. In the order of the look-up.
_CONVERSIONS = {
    "numpy.floating": "float(x)",
    "numpy.integer": "int(x)",
    "numpy.bool_": "bool(x)",
    "numpy.bool": "bool(x)",
    "numpy.complexfloating": "complex(x)",
    "numpy.str_": "str(x)",
    "numpy.bytes_": "bytes(x)",
    "numpy.generic": "x.item()",
    "builtins.bytes": "bytes(x)",
    "builtins.bytearray": "bytes(x)",
    "builtins.memoryview": "bytes(x)",
    "builtins.bool": "bool(x)",
    "builtins.int": "int(x)",
    "builtins.float": "float(x)",
    "builtins.complex": "complex(x)",
    "builtins.str": "str(x)",
    "builtins.list": "list(x)",
    "builtins.tuple": "list(x)",
    "builtins.set": "list(x)",
    "builtins.frozenset": "list(x)",
    "builtins.range": "list(x)",
    "builtins.dict": "dict(x)",
    "builtins.dict_keys": "list(x)",
    "builtins.dict_values": "list(x)",
    "builtins.dict_items": "list(x)",
    "builtins.mappingproxy": "dict(x)",
    "builtins.generator": "list(x)",
    "builtins.map": "list(x)",
    "builtins.filter": "list(x)",
    "builtins.zip": "list(x)",
    "collections.deque": "list(x)",
}

# What stays in its process, whatever is done to it.
_STAYS = {
    "builtins.function": "send its name",
    "builtins.method": "send its name",
    "builtins.builtin_function_or_method": "send its name",
    "builtins.module": "send its name",
    "builtins.type": "send its name",
    "functools.partial": "send its arguments",
    "builtins.coroutine": "send its result",
    "builtins.async_generator": "send its items",
    "builtins.frame": "send its text",
    "builtins.traceback": "send its text",
    "builtins.code": "send its text",
    "_io._IOBase": "send its path or its content",
    "_io.TextIOWrapper": "send its path or its content",
    "socket.socket": "send its address",
    "_socket.socket": "send its address",
    "_thread.lock": "each process has its own",
    "_thread.RLock": "each process has its own",
    "threading.Thread": "each process has its own",
    "threading.Event": "each process has its own",
    "threading.Condition": "each process has its own",
    "subprocess.Popen": "send its pid",
}


def converter_line(cls: type) -> str:
    """Return the call of ``register_type`` that lets instances of a class travel as plain data."""
    name = f"numpy.{cls.__name__}" if cls.__module__ == "numpy" else _short_name(cls)
    converters = _converters(cls)
    if converters:
        return f"register_type({name}, {converters.format(name)})"
    return f"register_type({name}, encode=f, decode=g), where f(obj) returns plain data and g(data) an object like it"


def _converters(cls: Any) -> str:
    if is_pydantic(cls):
        if hasattr(cls, "model_validate"):
            return "encode=lambda model: model.model_dump(mode='json'), decode={0}.model_validate"
        return "encode=lambda model: json.loads(model.json()), decode={0}.parse_obj"
    found = _find(cls, _CONVERTERS)
    names = "" if found else ", ".join([f"{name!r}: obj.{name}" for name in _parameters(cls)])
    return f"encode=lambda obj: {{{{{names}}}}}, decode=lambda data: {{0}}(**data)" if names else found


def _parameters(cls: Any) -> list[str]:
    code = getattr(cls.__init__, "__code__", None)
    if code is None or code.co_flags & 0x0C:  # *args and **kwargs do not tell what they hold
        return []
    return list(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])


def _find(cls: type, texts: dict[str, str]) -> str:
    for base in cls.__mro__:
        module = "pathlib" if base.__module__.startswith("pathlib.") else base.__module__
        text = texts.get(f"{module}.{base.__name__}")
        if text:
            return text
    return ""


def advice(cls: type) -> str:
    """Say what to do with a value of a class that is neither plain data nor registered."""
    if issubclass(cls, enum.Enum) or is_named_tuple(cls):
        return f"register it with register_type({_short_name(cls)})"
    stays = _find(cls, _STAYS)
    if stays:
        return f"it belongs to this process: {stays} instead"
    conversion = _find(cls, _CONVERSIONS)
    if conversion:
        own = not cls.__module__.startswith(("numpy", "builtins", "collections"))
        return f"convert it with {conversion}" + (f", or call {converter_line(cls)}" if own else "")
    if issubclass(cls, BaseException):
        return f"send an ErrorMessage with its text, or call {converter_line(cls)}"
    if cls.__module__.partition(".")[0] in sys.stdlib_module_names or obstacle(cls):
        return f"on both sides call {converter_line(cls)}"
    return "derive it from Message or register it with register_type()"


def _short_name(cls: type) -> str:
    """Return the name of a class as it stands where the class is defined."""
    return cls.__qualname__.rpartition("<locals>.")[2]
