"""Messages as the JSON of the PHP original.

Knows messages, the registry and JSON. Must not know frames or streams, and must not build anything but what the
registry has.

A message is an object with ``__class``, its wire name, first and its fields after it. Reading lets the standard
library's scanner make dicts of all objects first, because what is in an object of an unknown class stays plain data.
"""

from __future__ import annotations

import enum
import json
import re
from array import array
from functools import partial
from itertools import accumulate
from json.encoder import encode_basestring, encode_basestring_ascii
from json.scanner import make_scanner
from math import isfinite

from .. import registry
from ..errors import SerializationError, article
from ..messages import ENVELOPES, REQUEST, RESPONSE
from .text_serializer import HEAD_SIZE, TextSerializer, dict_builder, find_class, shown, wire_name
from .text_writing import INT_MAX, INT_MIN, MAX_DEPTH, TOO_DEEP, TextFormat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, NoReturn

    from ..protocols import Payload
    from ..type_info import FieldInfo, TypeInfo
    from .text_serializer import Builder, Conversions
    from .text_writing import Encoder

__all__ = ["JsonMessageSerializer"]


# -- writing


def _int(value: int) -> str:
    if INT_MIN <= value <= INT_MAX:
        return repr(value)
    raise SerializationError("an int beyond 64 bits cannot travel in JSON; send it as text")


def _float(value: float) -> str:
    if isfinite(value):
        return repr(value)
    raise SerializationError(f"{value!r} cannot travel in JSON; send it as text")


def _old_text(value: str) -> str:
    value.encode()  # refuses lone surrogates
    parts = [encode_basestring_ascii(part)[1:-1] for part in value.split("\x7f")]  # which it would escape
    return '"' + "\x7f".join(parts).replace("/", "\\/") + '"'


# -- reading


_ATOMS = frozenset({type(None), bool, int, float, str})
_builders: dict[str, Builder] = {}  # by wire name; of known classes only, or there would be no end of them
registry.clear_on_change(_builders)


def _built(value: Any) -> Any:
    """Return what was read, with objects in place of the dicts that stand for them."""
    if type(value) is list:
        return value if _ATOMS.issuperset(map(type, value)) else list(map(_built, value))
    if type(value) is not dict:
        return value
    name = value.get("__class")
    build = None
    if name is not None:  # as in the original, "__class": null is no class
        build = (_builders.get(name) if type(name) is str else None) or _builder_of(name)
        if build is None:
            return value
    for key, v in value.items():
        if type(v) is dict or type(v) is list:
            value[key] = _built(v)
    return value if build is None else build(value)


def _builder_of(name: Any) -> Builder | None:
    """Return what makes an object of its dict, or None if no such class is known."""
    if type(name) is not str:
        raise SerializationError(f"Unknown class: the name of a class must be text, not {article(type(name))}")
    build: Builder
    try:
        info = find_class(name)
    except SerializationError:
        if name != "stdClass":
            return None
        build = _without_class  # PHP's object that is nothing but its properties
    else:
        if info.is_enum:
            build = partial(_member, info)
        elif info.fields:
            build = dict_builder(info, [f.wire_name for f in info.fields], _CONVERSIONS)
        else:
            build = info.build  # for which "__class" is no attribute
    _builders[name] = build
    return build


_CONVERSIONS: Conversions = {
    "float": {int: float},
    "dict": {list: lambda v: v or {}},  # the original has one empty array
}


def _without_class(data: dict[str, Any]) -> dict[str, Any]:
    del data["__class"]
    return data


def _member(info: TypeInfo, data: dict[str, Any]) -> Any:
    name, value = data.get("name"), data.get("value")
    is_known = type(name) is str and name in info.cls.__members__  # type: ignore[attr-defined]
    if not is_known and type(value) is int and issubclass(info.cls, enum.Flag):
        return info.member(value)  # a combination of flags is no member
    if type(name) is not str:
        raise info.no_member(name)
    return info.member(name)


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


_decoder = json.JSONDecoder(parse_int=_parse_int, parse_constant=_no_constant)
_scan = make_scanner(_decoder)  # type: ignore[arg-type]
_scan_short_ints = make_scanner(json.JSONDecoder(parse_constant=_no_constant))  # type: ignore[arg-type]

_SPACE = " \t\n\r"
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]").search
_HEAD = re.compile(
    r'\s*\{\s*"__class"\s*:\s*"(?:Php)?StreamIpc\\\\Envelope\\\\(Request|Response)Envelope"\s*,'
    r'\s*"id"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.){0,768}")'
).match

# What has no 19 digits in a row has no int beyond 64 bits. To look for them so is quicker than a regular expression,
# and spares the scanner a call of _parse_int for each int of a long payload.
_DIGITS = bytes(0x30 if c in b"0123456789" else 0x20 for c in range(256))
_LONG_INT = b"0" * 19

# +1 and -1 as signed chars.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_MARK = bytes(set(range(256)) - set(b'[]{}"'))


def _depth(payload: bytes) -> int:
    """Return how deep a JSON text is nested, much quicker than parsing it."""
    # Escapes go first. What remains of a text without brackets in it is two quotes, which can go too; so can those
    # that end one text and begin the next. Between the others, every second piece is inside a text.
    payload = payload.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = b"".join(payload.translate(None, _NO_MARK).replace(b'""', b"").split(b'"')[::2])
    return max(accumulate(array("b", marks.translate(_STEPS))), default=0)


# -- the format


class _Json(TextFormat):
    name = "JSON"
    small_int = repr

    def __init__(self, old: bool) -> None:
        self._text = _old_text if old else encode_basestring
        # Mostly functions in C, which are called without a frame.
        bools, none = ("false", "true").__getitem__, {None: "null"}.__getitem__
        super().__init__(old, {str: self._text, int: _int, float: _float, bool: bools, type(None): none})

    def encode(self, text: str) -> bytes:
        # Only texts hold characters beyond ASCII, so this may be done to the whole at once.
        return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").encode()

    def array(self, texts: list[str]) -> str:
        return f"[{','.join(texts)}]"

    def mapping(self, parts: list[str]) -> str:
        return f"{{{','.join(parts)}}}"

    def key(self, key: Any) -> str:
        if type(key) is not str:
            raise SerializationError(f"a dict key in JSON must be a str, not {article(type(key))}")
        if key == "__class":
            raise SerializationError('a dict with the key "__class" would be taken for an object; use another key')
        return f"{self._text(key)}:"

    def dict_encoder(self) -> Encoder:
        encoders, get, write = self, self.scalars.get, self._text

        def encode(value: dict[Any, Any], depth: int, seen: set[int]) -> str:
            if depth > MAX_DEPTH or "__class" in value:
                raise ValueError
            depth += 1
            parts = []
            for key, v in value.items():
                if type(key) is not str:
                    raise ValueError
                f = get(type(v))
                parts.append(f"{write(key)}:{f(v) if f is not None else encoders[type(v)](v, depth, seen)}")
            return f"{{{','.join(parts)}}}"

        return encode

    def start(self, info: TypeInfo, count: int) -> str:
        return f'{{"__class":{self._text(wire_name(info, self.old))}'

    def attribute(self, name: Any) -> str:
        if type(name) is not str or name == "__class":
            raise SerializationError(f"an attribute cannot be called {shown(name)}")
        return f",{self._text(name)}:"

    def field(self, field: FieldInfo, info: TypeInfo) -> str:
        return self.attribute(field.wire_name)

    def enum_encoder(self, info: TypeInfo) -> Encoder:
        head = self.start(info, 2)

        def encode(value: Any, depth: int, seen: set[int]) -> str:
            if depth > MAX_DEPTH:
                raise SerializationError(TOO_DEEP)
            # As the original writes one: its name, and its value if that is text or an int (PHP knows no others).
            # The name is what counts on reading; combined flags have none.
            name, content = value._name_, value._value_
            text = f'{head},"name":{self._text(name) if type(name) is str else "null"}'
            if type(content) is str or (type(content) is int and INT_MIN <= content <= INT_MAX):
                text += f',"value":{self.scalars[type(content)](content)}'
            return text + "}"

        return encode

    def read(self, payload: Payload) -> Any:
        text = str(payload, "utf-8")
        start = 0 if text[:1] == "{" else len(text) - len(text.lstrip(_SPACE))
        scan = _scan
        if len(text) > 2 * MAX_DEPTH:  # more levels take at least two characters each
            data = bytes(payload)
            if text.count("[") + text.count("{") > MAX_DEPTH and _depth(data) > MAX_DEPTH:
                raise SerializationError(f"payload is {TOO_DEEP}")
            if _LONG_INT not in data.translate(_DIGITS):
                scan = _scan_short_ints
        try:
            value, end = scan(text, start)
        except StopIteration as exc:
            raise json.JSONDecodeError("Expecting value", text, exc.value) from None
        if end != len(text) and (rest := text[end:].lstrip(_SPACE)):
            at = len(text) - len(rest)
            raise SerializationError(f"payload is not JSON: something follows the value at character {at}")
        if "\\u" in text and _ESCAPED_SURROGATE(text) is not None:
            # The scanner lets lone ones pass. Pairs became one character, so what cannot be encoded again is alone.
            json.dumps(value, ensure_ascii=False).encode()
        return _built(value)

    def salvage(self, payload: Payload) -> tuple[int, Any]:
        # All known senders write the class and the id first. There may not be enough memory to read the rest.
        head = _HEAD(str(bytes(payload[:HEAD_SIZE]), "utf-8", "replace"))
        if head is not None:
            kind, id = REQUEST if head[1] == "Request" else RESPONSE, json.loads(head[2])
        elif _depth(bytes(payload)) > MAX_DEPTH:
            raise ValueError(TOO_DEEP)
        else:
            data, _ = _decoder.raw_decode(str(payload, "utf-8", "replace").strip(_SPACE))
            kind, id = (REQUEST, RESPONSE)[ENVELOPES.index(find_class(data["__class"]).cls)], data["id"]
        id.encode()  # a lone surrogate would fail once more where it is answered
        return kind, id

    def reason(self, exc: Exception) -> str:
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
        return super().reason(exc)


class JsonMessageSerializer(TextSerializer):
    """Turn messages into the JSON of the PHP original.

    It is readable, safe against a hostile sender, and understood by PHP. An
    object travels with its wire name as ``__class``, fields in the order of
    declaration. A field whose name in PHP is another says
    ``field(metadata={"wire_name": "errorMessage"})``.

    What JSON has no form for is refused at the sender, with the path of the
    field: bytes, sets, NaN and infinities, ints beyond 64 bits, dict keys that
    are no ``str``, a dict with the key ``__class``, lone surrogates, classes
    that are not registered, subclasses of ``str``, ``int``, ``list`` and so on,
    what contains itself, and more than 511 levels. Tuples arrive as lists. An
    enum travels by its member's name (its value is written too, as the original
    does), flags that are combined by their value.

    Reading is strict: UTF-8 without a byte order mark, no NaN, nothing after
    the value, no lone surrogates. Repeated keys: the last one counts. Ints
    beyond 64 bits become floats and numbers beyond the floats infinities, as in
    the original. An int in a field annotated ``float`` (or ``Optional[float]``)
    becomes a float, and ``[]``, which is how the original writes every empty
    array, an empty dict in one annotated ``dict`` or ``Mapping``.

    Only registered classes are built. As in the original, an object of another
    class inside a message stays a dict with its ``__class``, and what is in it
    stays plain data; a message, or the message in an envelope, must be of a
    registered class. A ``stdClass`` arrives as a dict without ``__class``.

    Against PHP: it has no empty dict (``{}`` becomes the same as ``[]``), turns
    the keys ``"0"``, ``"1"`` into ints, writes the float ``1.0`` as ``1``, and
    loses what a ``stdClass`` or ``DateTime`` holds.

    Args:
        namespace: ``"StreamIpc"``, or ``"PhpStreamIpc"`` to write to the older
            release of the original, which calls the library's classes so. Both
            are always understood on reading.

    Raises:
        ValueError: The namespace is another one.
    """

    formats: ClassVar[tuple[TextFormat, TextFormat]] = (_Json(old=False), _Json(old=True))
