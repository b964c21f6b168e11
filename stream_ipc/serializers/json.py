"""Messages as the JSON of the PHP original.

Knows messages, the registry and JSON. Must not know frames or streams, and must not build anything but what the
registry has.

A message is an object with ``__class``, its wire name, first and its fields after it. The quick way below writes it
with one compiled function per class and stops at whatever it cannot write; then the slow way walks the message once
more, without recursion, and either writes it after all (the interpreter's stack was short) or names the field that is
at fault. Reading lets the standard library's scanner call us for each object, innermost first.
"""

from __future__ import annotations

import enum
import json
import re
from array import array
from itertools import accumulate
from json.encoder import encode_basestring
from math import isfinite
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, NoReturn, Tuple

from .. import registry
from ..errors import SerializationError, article, describe
from ..messages import Message
from ..registry import TypeInfo
from ._compiling import compile_function
from ._shared import (
    ENVELOPES,
    INT_MAX,
    INT_MIN,
    MAX_DEPTH,
    MAX_ID_LENGTH,
    PHP_IS_SILENT,
    Builder,
    Unfit,
    Walk,
    add_id,
    builder,
    check_namespace,
    convert,
    find_class,
    namespace_text,
    other_format,
    plain_type,
    shown,
    wire_name,
)

if TYPE_CHECKING:
    from ..protocols import Payload

__all__ = ["JsonMessageSerializer"]

Encoder = Callable[[Any, int], str]


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


def _int(value: int) -> str:
    if INT_MIN <= value <= INT_MAX:
        return repr(value)
    raise Unfit


def _float(value: float) -> str:
    if isfinite(value):
        return repr(value)
    raise Unfit


# By exact type, so that a subclass, which would arrive as its base, is not found. Most of these are C functions that
# are called without a Python frame: 0.03 us instead of 0.07.
_SCALARS: Dict[type, Callable[[Any], str]] = {
    str: encode_basestring,
    int: _int,
    float: _float,
    bool: ("false", "true").__getitem__,
    type(None): {None: "null"}.__getitem__,
}


class _Encoders(Dict[type, Encoder]):
    """Class -> function that writes its instances; made when a class is first met."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        self.old = old
        registry.clear_on_change(self)

    def __missing__(self, cls: type) -> Encoder:
        made: Encoder
        if cls is list or cls is tuple:
            made = self._list
        elif cls is dict:
            made = self._dict
        else:
            try:
                info = registry.type_info(cls)
            except SerializationError:
                raise Unfit from None
            made = self._compile(info)
        self[cls] = made
        return made

    def _list(self, value: List[Any], depth: int) -> str:
        if depth > MAX_DEPTH:
            raise Unfit
        if len(value) > 15:
            # Long lists mostly hold one type. Mapping a C function over them: 10 000 texts 0.8 ms instead of 1.0,
            # ints 1.3 ms instead of 1.8 (floats gain nothing). For short lists finding out costs more than that.
            types = set(map(type, value))
            if len(types) == 1:
                only = types.pop()
                if only is str:
                    return f"[{','.join(map(encode_basestring, value))}]"
                if only is int and min(value) >= INT_MIN and max(value) <= INT_MAX:
                    return f"[{','.join(map(repr, value))}]"
        depth += 1
        get = _SCALARS.get
        parts = [f(v) if (f := get(type(v))) is not None else self[type(v)](v, depth) for v in value]
        return f"[{','.join(parts)}]"

    def _dict(self, value: Dict[Any, Any], depth: int) -> str:
        if depth > MAX_DEPTH or "__class" in value:
            raise Unfit
        depth += 1
        get = _SCALARS.get
        parts = []
        for key, v in value.items():
            if type(key) is not str:
                raise Unfit
            f = get(type(v))
            text = f(v) if f is not None else self[type(v)](v, depth)
            parts.append(f"{encode_basestring(key)}:{text}")
        return f"{{{','.join(parts)}}}"

    def _compile(self, info: TypeInfo) -> Encoder:
        head = f'{{"__class":{encode_basestring(wire_name(info, self.old))}'
        if info.is_enum:
            return lambda value, depth: _enum_text(head, value, depth)
        if not info.fields:
            return self._open(info, head)
        # One function that names the fields: TaskRequest 0.23 us, the same as a loop over them 0.79 us.
        lines = ["def made(value, depth):", f"    if depth > {MAX_DEPTH}: raise Unfit"]
        if info.cls in ENVELOPES:
            content = info.fields[1].name
            lines += [
                f"    if type(value.id) is not str or len(value.id) > {MAX_ID_LENGTH}"
                f" or not isinstance(value.{content}, Message): raise Unfit",
            ]
        text = _braces(head)
        for i, f in enumerate(info.fields):
            lines += [
                f"    v = value.{f.name}",
                f"    t{i} = scalars[t](v) if (t := type(v)) in scalars else encoders[t](v, depth + 1)",
            ]
            text += f",{_braces(encode_basestring(f.wire_name))}:{{t{i}}}"
        lines.append(f"    return f{text + '}}'!r}")
        names = {"Message": Message, "Unfit": Unfit, "encoders": self, "scalars": _SCALARS}
        return compile_function(lines, names)

    def _open(self, info: TypeInfo, head: str) -> Encoder:
        def encode(value: Any, depth: int) -> str:
            if depth > MAX_DEPTH:
                raise Unfit
            depth += 1
            parts = [head]
            for name, v in info.values(value).items():
                if type(name) is not str or name == "__class":
                    raise Unfit
                f = _SCALARS.get(type(v))
                text = f(v) if f is not None else self[type(v)](v, depth)
                parts.append(f"{encode_basestring(name)}:{text}")
            return ",".join(parts) + "}"

        return encode


def _braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _enum_text(head: str, value: enum.Enum, depth: int) -> str:
    if depth > MAX_DEPTH:
        raise Unfit
    # As the original writes one: its name, and its value if that is text or an int (PHP knows no others). The name
    # is what counts on reading; combined flags have none.
    content = value._value_
    name = encode_basestring(value._name_) if type(value._name_) is str else "null"
    if type(content) is str or (type(content) is int and INT_MIN <= content <= INT_MAX):
        return f'{head},"name":{name},"value":{_SCALARS[type(content)](content)}}}'
    return f'{head},"name":{name}}}'


class _JsonWalk(Walk):
    format = "JSON"

    def value(self, step: str, value: Any) -> None:
        cls = type(value)
        if cls in _SCALARS:
            self._scalar(step, value)
        elif cls is list or cls is tuple:
            self.open(step, value, "[", self._items(value), "]")
        elif cls is dict:
            self.open(step, value, "{", self._entries(value), "}")
        else:
            info = self.info(step, value)
            head = f'{{"__class":{encode_basestring(wire_name(info, self.old))}'
            if not info.is_enum:
                self.open(step, value, head, self._attributes(info, value), "}")
                return
            for part in (value._name_, value._value_):
                if type(part) is str:
                    self.check_text(step, part)
            self.out.append(_enum_text(head, value, 1))

    def _scalar(self, step: str, value: Any) -> None:
        if type(value) is str:
            self.check_text(step, value)
        try:
            self.out.append(_SCALARS[type(value)](value))
        except Unfit:
            what = "an int beyond 64 bits" if type(value) is int else repr(value)
            self.fail(step, f"{what} cannot travel in JSON; send it as text")

    @staticmethod
    def _items(value: Any) -> Iterator[Tuple[str, str, Any]]:
        for i, v in enumerate(value):
            yield ("," if i else "", f"[{i}]", v)

    def _entries(self, value: Dict[Any, Any]) -> Iterator[Tuple[str, str, Any]]:
        before = ""
        for key, v in value.items():
            step = f"[{shown(key)}]"
            if type(key) is not str:
                self.fail(step, f"a dict key in JSON must be a str, not {article(type(key))}")
            if key == "__class":
                self.fail(step, 'a dict with the key "__class" would be taken for an object; use another key')
            self.check_text(step, key)
            yield (f"{before}{encode_basestring(key)}:", step, v)
            before = ","

    def _attributes(self, info: TypeInfo, value: Any) -> Iterator[Tuple[str, str, Any]]:
        for f in info.fields:
            if not hasattr(value, f.name):
                self.fail(f".{f.name}", "has no value")
            v = getattr(value, f.name)
            self.check_text(f".{f.name}", f.wire_name)
            yield (f",{encode_basestring(f.wire_name)}:", self.step_to(value, f.name, v), v)
        if not info.fields:
            for name, v in info.values(value).items():
                if type(name) is not str or name == "__class":
                    self.fail("", f"an attribute cannot be called {shown(name)}")
                self.check_text(f".{shown(name)}", name)
                yield (f",{encode_basestring(name)}:", f".{name}", v)


_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def _escape(match: Any) -> str:
    code = ord(match.group())
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


class _Decoders(Dict[Any, Builder]):
    """Wire name -> function that builds an instance; made when a name is first met."""

    def __init__(self) -> None:
        super().__init__()
        registry.clear_on_change(self)

    def __missing__(self, name: Any) -> Builder:
        made = self[name] = self._compile(find_class(name))
        return made

    def _compile(self, info: TypeInfo) -> Builder:
        if info.is_enum:
            return lambda data: _enum_member(info, data)
        if not info.fields:
            return lambda data: info.build({name: v for name, v in data.items() if name != "__class"})
        codes = {f.name: _CONVERSIONS.get(plain_type(f.annotation), "") for f in info.fields}
        converters = {name: convert(code) for name, code in codes.items()}

        def build(data: Dict[str, Any]) -> Any:  # not all fields were sent: the defaults are TypeInfo's affair
            return info.build(
                {f.name: converters[f.name](data[f.wire_name]) for f in info.fields if f.wire_name in data}
            )

        return builder(info, [f.wire_name for f in info.fields], list(codes.values()), build)


_CONVERSIONS = {
    "float": "if type(v) is int: v = float(v)",
    "dict": "if type(v) is list and not v: v = {}",  # the original has one empty array
}


def _enum_member(info: TypeInfo, data: Dict[str, Any]) -> Any:
    name, value = data.get("name"), data.get("value")
    cls: Any = info.cls
    if type(name) is str and name in cls.__members__:
        return cls.__members__[name]
    if type(value) is int and issubclass(cls, enum.Flag):  # a combination of flags is no member
        try:
            return cls(value)
        except Exception as exc:
            raise SerializationError(f"{info.wire_name} has no value {value}; add it to the enum on this side too") from exc
    raise SerializationError(f"{info.wire_name} has no member {shown(name)}; add it to the enum on this side too")


_decoders = _Decoders()


def _object(data: Dict[str, Any]) -> Any:
    # As in the original, "__class": null is no class. An unknown class is an error at any depth: the original leaves
    # an array behind then, which would surface far from the cause.
    name = data.get("__class")
    if name is None:
        return data
    try:
        decoder = _decoders[name]
    except TypeError:
        if isinstance(name, str):
            raise
        raise SerializationError(f"Unknown class: the name of a class must be text, not {article(type(name))}") from None
    return decoder(data)


def _parse_int(text: str) -> Any:
    if len(text) < 19:
        return int(text)
    # Beyond 64 bits the original makes a float. float() takes any length in linear time, int() does not.
    if len(text) <= 20:
        value = int(text)
        if INT_MIN <= value <= INT_MAX:
            return value
    return float(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


_decoder = json.JSONDecoder(object_hook=_object, parse_int=_parse_int, parse_constant=_no_constant)
_short_int_decoder = json.JSONDecoder(object_hook=_object, parse_constant=_no_constant)
_plain_decoder = json.JSONDecoder(parse_int=_parse_int, parse_constant=_no_constant)

_SPACE = " \t\n\r"
_LONE = re.compile("[\ud800-\udfff]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_HEAD = re.compile(
    r'\s*\{\s*"__class"\s*:\s*"((?:Php)?StreamIpc\\\\Envelope\\\\(?:Request|Response)Envelope)"\s*,'
    r'\s*"id"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.){0,768}")'
)

# What has no 19 digits in a row has no int beyond 64 bits. Looking for them so takes 0.8 ns a byte (a regular
# expression: 10 ns), and spares 0.2 us an int, which is what the scanner needs to call _parse_int.
_DIGITS = bytes(0x30 if c in b"0123456789" else 0x20 for c in range(256))
_LONG_INT = b"0" * 19

# +1 and -1 as signed chars.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_MARK = bytes(set(range(256)) - set(b'[]{}"'))


def _depth(payload: bytes) -> int:
    """How deep a JSON text is nested, in about a quarter of the time that parsing takes."""
    # Escapes go first. What remains of a text without brackets in it is two quotes, which can go too; so can those
    # that end one text and begin the next. Between the others, every second piece is inside a text.
    if b"\\" in payload:
        payload = payload.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = payload.translate(None, _NO_MARK).replace(b'""', b"")
    if b'"' in marks:
        marks = b"".join(marks.split(b'"')[::2])
    return max(accumulate(array("b", marks.translate(_STEPS))), default=0)


def _whole(text: str, decoder: json.JSONDecoder) -> Any:
    """Read a text that holds one value and nothing else but white space around it."""
    start = 0 if text[:1] not in _SPACE else len(text) - len(text.lstrip(_SPACE))
    value, end = decoder.raw_decode(text, start)
    if end != len(text) and text[end:].strip(_SPACE):
        raise SerializationError(f"payload is not JSON: something follows the value at character {end}")
    return value


class JsonMessageSerializer:
    """Messages as the JSON of the PHP original: readable, safe against a hostile sender, and understood by PHP.

    An object travels with its wire name as ``__class``, fields in the order of declaration. A field whose name in
    PHP is another says ``field(metadata={"wire_name": "errorMessage"})``.

    What JSON has no form for is refused at the sender, with the path of the field: bytes, sets, NaN and infinities,
    ints beyond 64 bits, dict keys that are no ``str``, a dict with the key ``__class``, lone surrogates, classes that
    are not registered, subclasses of ``str``, ``int``, ``list`` and so on, what contains itself, and more than 511
    levels. Tuples arrive as lists. An enum travels by its member's name (its value is written too, as the original
    does), flags that are combined by their value.

    Reading is strict: UTF-8 without a byte order mark, no NaN, nothing after the value, no lone surrogates. Repeated
    keys: the last one counts. Ints beyond 64 bits become floats and numbers beyond the floats infinities, as in the
    original. An int in a field annotated ``float`` (or ``Optional[float]``) becomes a float, and ``[]``, which is how
    the original writes every empty array, an empty dict in one annotated ``dict`` or ``Mapping``. Only registered
    classes are built; an unknown class at any depth is an error, where the original would leave an array.

    Against PHP: it has no empty dict (``{}`` becomes the same as ``[]``), turns the keys ``"0"``, ``"1"`` into ints,
    and writes the float ``1.0`` as ``1``.

    Args:
        namespace: ``"StreamIpc"``, or ``"PhpStreamIpc"`` to write to the older release of the original, which calls
            the library's classes so. Both are always understood on reading.

    Raises:
        ValueError: The namespace is another one.
    """

    silence_hint = PHP_IS_SILENT

    # deserialize() keeps nothing of what it is given, so that a large buffer can be used again; see wire/codec.py.
    keeps_payload = False

    def __init__(self, *, namespace: str = "StreamIpc") -> None:
        self._old = check_namespace(namespace)
        self._encoders = _top_encoders[self._old]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({namespace_text(self)})"

    def serialize(self, message: Message) -> bytes:
        """Turn a message into JSON.

        Args:
            message: A message, or an envelope around one.

        Returns:
            The payload.

        Raises:
            SerializationError: Something in it cannot travel in JSON; the text names the field, as in
                ``TaskRequest.items[3].name: bytes cannot travel in JSON``.
        """
        try:
            text = self._encoders[type(message)](message, 1)
            if text.isascii() and not self._old:
                return text.encode()
            return self._finish(text)
        except MemoryError:
            raise
        except Exception:
            # UnicodeEncodeError: a lone surrogate; AttributeError: a field without a value; RecursionError: a cycle,
            # or only a deep message on a full stack. Left first, so that the error is not shown as one about this.
            pass
        return self._finish(_JsonWalk(self._old).text(message))

    def _finish(self, text: str) -> bytes:
        # Only texts hold characters beyond ASCII, so this may be done to the whole at once.
        if self._old:
            text.encode()  # refuses lone surrogates
            return _NOT_ASCII.sub(_escape, text.replace("/", "\\/")).encode("ascii")
        return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").encode()

    def deserialize(self, payload: Payload) -> Message:
        """Turn JSON into its message.

        Args:
            payload: The payload; nothing of it is kept.

        Returns:
            The message or envelope, built by its class's constructor.

        Raises:
            SerializationError: It is not JSON, names a class that is not registered, or holds what the class's
                constructor refuses. Where the id of an envelope could be read, ``request_id`` or ``response_id``
                says it.
        """
        try:
            text = str(payload, "utf-8")
            decoder = _decoder
            if len(text) > 2 * MAX_DEPTH:  # more levels take at least two characters each, and a bracket
                data = bytes(payload)
                if text.count("[") + text.count("{") > MAX_DEPTH and _depth(data) > MAX_DEPTH:
                    raise SerializationError(f"payload is nested deeper than {MAX_DEPTH} levels")
                if _LONG_INT not in data.translate(_DIGITS):
                    decoder = _short_int_decoder
            if "\\u" in text and _SURROGATE.search(text) is not None:
                # The scanner lets lone ones pass. Pairs become one character, so that what cannot be encoded again
                # is alone. Only payloads with such escapes pay for being read twice.
                json.dumps(_whole(text, _plain_decoder), ensure_ascii=False).encode()
            message = _whole(text, decoder)
        except SerializationError as exc:
            add_id(exc, *_salvage(payload))
            raise
        except Exception as exc:
            error = SerializationError(_reason(exc) + other_format(payload, "JSON"))
            add_id(error, *_salvage(payload))
            raise error from exc
        if isinstance(message, Message):
            return message
        raise SerializationError(f"payload is not a message but {article(type(message))}")


def _reason(exc: Exception) -> str:
    if isinstance(exc, RecursionError):
        return "payload is nested too deeply"
    if isinstance(exc, MemoryError):
        return "payload cannot be decoded: there is not enough memory"
    if isinstance(exc, UnicodeDecodeError):
        return f"payload is not JSON: byte {exc.start} is not UTF-8"
    if isinstance(exc, UnicodeEncodeError):
        return "payload is not JSON: it has a lone surrogate in an escape"
    if isinstance(exc, ValueError):
        return f"payload is not JSON: {exc}"
    return f"payload cannot be decoded: {describe(exc)}"


def _salvage(payload: Payload) -> Tuple[Any, Any]:
    """The class and the id of an envelope whose content is bad, if they can be read."""
    try:
        text = str(payload, "utf-8", "replace")
    except Exception:  # no buffer, or released: there is one error to report already
        return None, None
    try:
        data = _whole(text, _plain_decoder)
        name, identity = data["__class"], data["id"]
    except Exception:
        # Broken JSON, or more of it than fits: all known senders write the class and the id first.
        match = _HEAD.match(text)
        if match is None:
            return None, None
        name, identity = match.group(1).replace("\\\\", "\\"), match.group(2)
        try:
            identity = json.loads(identity)
        except ValueError:
            return None, None
    if type(identity) is str and _LONE.search(identity):
        return None, None  # it would fail once more where it is answered
    return name, identity


class _TopEncoders(_Encoders):
    """The same for the outermost value, which must be a message: asked by the look-up, so it costs nothing."""

    def __init__(self, within: _Encoders) -> None:
        super().__init__(within.old)
        self._within = within

    def __missing__(self, cls: type) -> Encoder:
        if not issubclass(cls, Message):
            raise Unfit
        made = self[cls] = self._within[cls]
        return made


_top_encoders = (_TopEncoders(_Encoders(old=False)), _TopEncoders(_Encoders(old=True)))
