"""What to do about a class whose instances cannot travel, for the texts of errors.

Knows classes of the standard library and of well-known packages by their names, and never imports one. Must not know
which classes are registered. Imported when there is such an error.
"""

from __future__ import annotations

import enum
import sys

from .type_info import fields_of, is_named_tuple, is_pydantic, obstacle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["advice", "converter_line"]


def _by_class(texts: dict[str, str]) -> dict[str, str]:
    """Turn ``{text: names of classes}`` around. A builtin goes by its name, every other class by its full one."""
    return {name: text for text, names in texts.items() for name in names.split()}


# What to pass to register_type() for a class that is, or derives from, one of these: {0} is the class.
_CONVERTERS = _by_class({
    "encode=str, decode={0}": (
        "str decimal.Decimal fractions.Fraction ipaddress._IPAddressBase pathlib.PurePath uuid.UUID zoneinfo.ZoneInfo"
    ),
    "encode=int, decode={0}": "int",
    "encode=float, decode={0}": "float",
    "encode=list, decode={0}": "list tuple set frozenset collections.deque",
    "encode=dict, decode={0}": "dict",
    "encode=dict, decode=lambda data: {0}(None, data)": "collections.defaultdict",
    "encode={0}.hex, decode={0}.fromhex": "bytes bytearray",
    "encode={0}.isoformat, decode={0}.fromisoformat": "datetime.date datetime.time",
    "encode={0}.item, decode={0}": "numpy.generic",
    "encode=vars, decode=lambda data: {0}(**data)": "types.SimpleNamespace",
    "encode=lambda a: [a.typecode, a.tolist()], decode=lambda data: {0}(*data)": "array.array",
    "encode=lambda d: [d.days, d.seconds, d.microseconds], decode=lambda data: {0}(*data)": "datetime.timedelta",
    "encode=lambda e: list(e.args), decode=lambda data: {0}(*data)": "BaseException",
    "encode=lambda r: [r.start, r.stop, r.step], decode=lambda data: {0}(*data)": "range slice",
    "encode=lambda z: [z.real, z.imag], decode=lambda data: {0}(*data)": "complex",
    "encode=lambda z: z.utcoffset(None).total_seconds(), decode=lambda data: {0}(timedelta(seconds=data))": (
        "datetime.timezone"
    ),
    "encode=lambda p: [p.pattern, p.flags], decode=lambda data: re.compile(*data)": "re.Pattern",
    "encode=lambda a: [a.dtype.str, a.tolist()], decode=lambda data: numpy.array(data[1], data[0])": "numpy.ndarray",
    "encode=msgspec.to_builtins, decode=lambda data: msgspec.convert(data, {0})": "msgspec.Struct",
})  # fmt: skip

# What turns a value into plain data.
_CONVERSIONS = _by_class({
    "bool(x)": "bool numpy.bool_ numpy.bool",
    "bytes(x)": "bytes bytearray memoryview numpy.bytes_",
    "complex(x)": "complex numpy.complexfloating",
    "dict(x)": "dict mappingproxy",
    "float(x)": "float numpy.floating",
    "int(x)": "int numpy.integer",
    "list(x)": (
        "list tuple set frozenset range dict_keys dict_values dict_items generator map filter zip collections.deque"
    ),
    "str(x)": "str numpy.str_",
    "x.item()": "numpy.generic",
})  # fmt: skip

# What stays in its process, whatever is done to it.
_STAYS = _by_class({
    "each process has its own": "stream_ipc.peer.IpcPeer stream_ipc.pool.WorkerPool "
    "_thread.lock _thread.RLock threading.Thread threading.Event threading.Condition",
    "send its address": "stream_ipc.listener.Listener socket.socket _socket.socket",
    "send its arguments": "functools.partial",
    "send its items": "async_generator",
    "send its name": "function method builtin_function_or_method module type stream_ipc.session.Session",
    "send its path or its content": "_io._IOBase _io.TextIOWrapper",
    "send its pid": "subprocess.Popen",
    "send its reply": "stream_ipc.deferred.DeferredReply stream_ipc.promise.ResponsePromise",
    "send its result": "coroutine",
    "send its text": "frame traceback code",
})  # fmt: skip


def converter_line(cls: type) -> str:
    """Return the call of ``register_type`` that lets instances of a class travel as plain data."""
    name = f"numpy.{cls.__name__}" if cls.__module__ == "numpy" else _short_name(cls)
    converters = _converters(cls)
    if converters:
        return f"register_type({name}, {converters.replace('{0}', name)})"
    return f"register_type({name}, encode=f, decode=g), where f(obj) returns plain data and g(data) an object like it"


def _converters(cls: Any) -> str:
    if is_pydantic(cls):
        if hasattr(cls, "model_validate"):
            return "encode=lambda model: model.model_dump(mode='json'), decode={0}.model_validate"
        return "encode=lambda model: json.loads(model.json()), decode={0}.parse_obj"
    found = "" if is_named_tuple(cls) else _find(cls, _CONVERTERS)
    names = "" if found else ", ".join([f"{name!r}: obj.{attribute}" for name, attribute in _parameters(cls).items()])
    return "encode=lambda obj: {" + names + "}, decode=lambda data: {0}(**data)" if names else found


def _parameters(cls: Any) -> dict[str, str]:
    """Return the attribute for each parameter of a constructor; nothing if that is not known."""
    code = getattr(cls.__init__, "__code__", None)
    # *args and **kwargs do not tell what they hold
    if code is None or code.co_flags & 0x0C or code.co_posonlyargcount > 1 or cls.__new__ is not object.__new__:
        return {}
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    attributes = {f.parameter: f.name for f in fields_of(cls) or ()}
    if not attributes:  # those that the constructor assigns, or may
        attributes = {name: name for name in names if name in code.co_names}
    return {name: attributes[name] for name in names} if attributes.keys() >= set(names) else {}


def _find(cls: type, texts: dict[str, str]) -> str:
    for base in cls.__mro__:
        module = "pathlib" if base.__module__.startswith("pathlib.") else base.__module__
        name = base.__name__ if module == "builtins" else f"{module}.{base.__name__}"
        if name in texts:
            return texts[name]
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
    if f"{cls.__module__}.{cls.__name__}" == "stream_ipc.messages.Message":
        return "derive a class from it, with a field for whatever is to be said"
    if cls.__module__.partition(".")[0] in sys.stdlib_module_names or obstacle(cls):
        return f"on both sides call {converter_line(cls)}"
    return "derive it from Message or register it with register_type()"


def _short_name(cls: type) -> str:
    """Return the name of a class as it stands where the class is defined."""
    return cls.__qualname__.rpartition("<locals>.")[2]
