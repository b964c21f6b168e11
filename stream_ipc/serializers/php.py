"""Messages in the format of PHP's ``serialize()``. How its syntax is read stands in ``php_parser.py``.

Knows messages, the registry and that format. Must not know frames or streams, and must not build anything but what the
registry has, and PHP's own value classes.

Objects whose properties are short texts and numbers in the order of declaration, as most are, are not taken apart on
reading: one pattern, compiled for their class, reads them. Messages that are such objects are read without the parser.
"""

from __future__ import annotations

import re
from math import isfinite
from operator import add

from .. import registry
from ..errors import SerializationError, article
from ..ids import MAX_ID_LENGTH
from ..messages import ENVELOPES, NOTIFICATION, REQUEST, RESPONSE, Message, RequestEnvelope
from .php_parser import bare, decoded, key_of, parse, raw, unraw
from .text_serializer import (
    HEAD_SIZE,
    TextSerializer,
    compile_checked,
    dict_builder,
    find_class,
    shown,
    wire_name,
)
from .text_writing import INT_MAX, INT_MIN, MAX_DEPTH, TextFormat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar

    from ..protocols import Payload
    from ..type_info import FieldInfo, TypeInfo
    from .php_parser import Build, Simple
    from .text_serializer import Conversions
    from .text_writing import Encoder

__all__ = ["PhpMessageSerializer"]

# -- writing


def _text(value: str) -> str:
    if value.isascii():
        return f's:{len(value)}:"{value}";'
    text = raw(value)
    return f's:{len(text)}:"{text}";'


def _bytes(value: bytes) -> str:
    return f's:{len(value)}:"{value.decode("latin-1")}";'


def _int(value: int) -> str:
    if INT_MIN <= value <= INT_MAX:
        return f"i:{value};"
    raise SerializationError("an int beyond 64 bits cannot travel in PHP's format; send it as text")


def _float(value: float) -> str:
    if not isfinite(value):
        return "d:NAN;" if value != value else "d:INF;" if value > 0 else "d:-INF;"
    # PHP writes the same shortest digits as repr(), in another form.
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    if not e:
        return f"d:{text[:-2] if text.endswith('.0') else text};"
    if exponent == "+16":  # PHP goes over to exponents one power of ten later
        sign = "-" if value < 0 else ""
        return f"d:{sign}{mantissa.lstrip('-').replace('.', '').ljust(17, '0')};"
    return f"d:{mantissa if '.' in mantissa else mantissa + '.0'}E{int(exponent):+d};"


_SCALARS: dict[type, Callable[[Any], str]] = {
    str: _text,
    int: _int,
    float: _float,
    bool: ("b:0;", "b:1;").__getitem__,
    type(None): {None: "N;"}.__getitem__,
}


_INDEXES = [f"i:{i};" for i in range(200)]  # the keys of a list


def _class_name(info: TypeInfo, old: bool) -> str:
    name = raw(wire_name(info, old))
    if '"' in name or len(name) > 500:
        raise SerializationError(f"{shown(info.wire_name)} cannot be a class name in PHP's format")
    return name


def _mangled(field: FieldInfo, info: TypeInfo, old: bool) -> str:
    """Return the name of a property in the format, which says who may see it."""
    kind, _, declaring = field.visibility.partition(":")
    if field.visibility == "public":
        return field.wire_name
    if field.visibility == "protected":
        return f"\0*\0{field.wire_name}"
    if kind != "private":
        raise SerializationError(
            f"{info.wire_name}.{field.name}: visibility must be 'public', 'protected', 'private' or"
            f" 'private:Declaring\\Class', not {field.visibility!r}"
        )
    if not declaring:
        # PHP's private is private of the class that declares it, also in a child's instance. A dataclass that inherits a
        # field has the very same object for it.
        own = getattr(info.cls, "__dataclass_fields__", {}).get(field.name, field)
        owners = [cls for cls in info.cls.__mro__ if vars(cls).get("__dataclass_fields__", {}).get(field.name) is own]
        declaring = wire_name(registry.by_class.get(owners[-1], info) if owners else info, old)
    return f"\0{declaring}\0{field.wire_name}"


# -- reading: classes

# PHP tells neither text from bytes nor a list from a map; the annotation does.
_CONVERSIONS: Conversions = {
    "float": {int: float},
    "str": {bytes: lambda v: v.decode("utf-8", "surrogateescape")},
    "bytes": {str: str.encode},
    "bytearray": {bytes: bytearray, str: lambda v: bytearray(v.encode())},
    "dict": {list: lambda v: dict(enumerate(v))},
}
_ADVICE = "define a class with this wire_name on this side, or register one with register_type(cls, wire_name)"
_VALUES = ("stdClass", "DateTime", "DateTimeImmutable")


def _class_of(name: str) -> tuple[Build, int, Simple | None]:
    """Return what the parser asks for about a class, by its raw name."""
    info = _info_of(unraw(name))
    if not info.fields:
        return lambda data: info.build({unraw(bare(key)): v for key, v in data.items()}), 0, None
    keys = [raw(_mangled(f, info, old=False)) for f in info.fields]
    names = [raw(f.wire_name) for f in info.fields]

    def rename(data: dict[str, Any]) -> dict[str, Any]:
        # Not each came under its own key: whoever may see a property, its name counts.
        others = {bare(key): v for key, v in data.items() if key not in keys}
        return {**{key: others[name] for key, name in zip(keys, names, strict=True) if name in others}, **data}

    simple = None
    if len(keys) <= _MOST_FIELDS and info.cls not in ENVELOPES:
        simple = _simple_reader(info, keys)
        if issubclass(info.cls, Message):
            _heads[f'O:{len(name)}:"{name}":{len(keys)}:{{'] = simple
    return dict_builder(info, keys, _CONVERSIONS, rename), len(keys), simple


def _info_of(name: str) -> TypeInfo:
    try:
        info = find_class(name, _ADVICE)
    except SerializationError:
        if name not in _VALUES:
            raise
        from . import php_values  # datetime takes time to import, and most programs never read a date here

        return php_values.CLASSES[name]
    if info.is_enum:
        raise SerializationError(f"{info.wire_name} is an enum, but came as an object")
    return info


def _member(enum: str, case: str) -> Any:
    return find_class(unraw(enum), _ADVICE).member(unraw(case))


_classes = registry.Cache(_class_of)
_heads: dict[str, Simple] = {}  # what stands before a message's first property -> what reads it if it is simple
registry.clear_on_change(_heads)

# What a pattern takes for a value: a text (its length, and itself), an int, a float, a bool. Longer texts are left to the
# parser, which does not look at each character.
_SIMPLE = (
    r'(?:s:([0-9]{1,3}):"([^"]{0,200})"|i:(-?[0-9]{1,18})|d:(-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:E[+-][0-9]{1,3})?)'
    r"|b:([01])|N);"
)
_MOST_FIELDS = 20


def _simple_reader(info: TypeInfo, names: list[str]) -> Simple:
    pattern = "".join([re.escape(f's:{len(name)}:"{name}";') + _SIMPLE for name in names])
    groups = ", ".join(f"n{i}, t{i}, i{i}, d{i}, b{i}" for i in range(len(names)))
    lines = [
        "def made(text, start, end):",
        "    found = fullmatch(text, start, end)",
        "    if found is None: return None",
        f"    {groups} = found.groups()",
    ]
    for i in range(len(names)):
        lines += [
            f"    if t{i} is not None:",
            f"        if len(t{i}) != int(n{i}): return None",
            f"        v{i} = t{i} if t{i}.isascii() else decoded(t{i})",
            f"    elif i{i} is not None: v{i} = int(i{i})",
            f"    elif b{i} is not None: v{i} = b{i} == '1'",
            f"    else: v{i} = None if d{i} is None else float(d{i})",
        ]
    fullmatch = re.compile(pattern + r"\}").fullmatch
    return compile_checked(lines, info, _CONVERSIONS, {"fullmatch": fullmatch, "decoded": decoded})


# -- reading: payloads

_LONGEST_HEAD = 530
# What stands before an envelope's id -> its class, and what stands before its content.
_ENVELOPES = {
    f'O:{len(name)}:"{name}":2:{{s:2:"id";s:': (cls, f's:{len(content)}:"{content}";')
    for cls, content in zip(ENVELOPES, ("request", "response"), strict=True)
    for name in (wire_name(registry.type_info(cls), old) for old in (False, True))
}
_ID = f"({'|'.join(map(re.escape, _ENVELOPES))})" + rf'([0-9]{{1,3}}):"([^"]{{0,{MAX_ID_LENGTH}}})";'
_find_id = re.compile(_ID).match
_find_content = re.compile(_ID + r'(s:[78]:"re[a-z]+";)(O:[0-9]{1,3}:"[^"]{1,500}":[0-9]{1,3}:\{)').match


def _read(payload: Payload) -> Any:
    """Return the value of a payload, or raise anything."""
    text = str(payload, "latin-1")
    message = None
    found = _find_content(text)
    if found is None:
        start = text.find("{", 0, _LONGEST_HEAD) + 1
        simple = _heads.get(text[:start])
        if simple is not None:
            message = simple(text, start, len(text))
    else:
        begin, length, id, before, head = found.groups()
        cls, expected = _ENVELOPES[begin]
        simple = _heads.get(head)
        if simple is not None and len(id) == int(length) and id.isascii() and before == expected and text[-1] == "}":
            message = simple(text, found.end(), len(text) - 1)
            if message is not None:
                return cls(id, message)
    return parse(text, _classes, _member) if message is None else message


def _salvage(payload: Payload) -> tuple[int, Any]:
    """Return the kind and the id of an envelope whose content is bad; a notification's if these cannot be read."""
    # All known senders write the id first. There may not be enough memory to read the rest.
    found = _find_id(str(bytes(payload[:HEAD_SIZE]), "latin-1"))
    if found is None or len(found[3]) != int(found[2]):
        return NOTIFICATION, None
    return REQUEST if _ENVELOPES[found[1]][0] is RequestEnvelope else RESPONSE, unraw(found[3])


# -- the format


class _Php(TextFormat):
    name = "PHP's format"
    reference = "r:{};".format
    leaves_out = True  # as the original does, and it makes a property without a value of a missing one
    read = staticmethod(_read)
    salvage = staticmethod(_salvage)

    def encoder_of(self, cls: type) -> Encoder:
        # A registration empties this, so that whatever is written after it comes here first.
        for plain in (bytes, bytearray):
            if plain in registry.by_class:
                self.scalars.pop(plain, None)
            else:
                self.scalars[plain] = _bytes
        return super().encoder_of(cls)

    def info(self, cls: type) -> TypeInfo:
        try:
            return registry.type_info(cls)
        except SerializationError:
            if (cls.__module__, cls.__name__) != ("datetime", "datetime"):
                raise
        from . import php_values

        return php_values.CLASSES["DateTimeImmutable"]

    def encode(self, text: str) -> bytes:
        return text.encode("latin-1")

    def array(self, texts: list[str]) -> str:
        if len(texts) <= len(_INDEXES):
            return f"a:{len(texts)}:{{{''.join(map(add, _INDEXES, texts))}}}"
        return f"a:{len(texts)}:{{{''.join([f'i:{i};{text}' for i, text in enumerate(texts)])}}}"

    def mapping(self, parts: list[str]) -> str:
        return f"a:{len(parts)}:{{{''.join(parts)}}}"

    def key(self, key: Any) -> str:
        if type(key) is str:
            return _text(key) if key_of(key) is key else f"i:{key};"
        if type(key) is bytes:
            text = key.decode("latin-1")
            return _bytes(key) if key_of(text) is text else f"i:{text};"
        if type(key) is not int:
            raise SerializationError(f"a dict key in PHP's format must be a str, bytes or an int, not {article(type(key))}")
        if not INT_MIN <= key <= INT_MAX:
            raise SerializationError("a dict key beyond 64 bits cannot travel in PHP's format")
        return f"i:{key};"

    def dict_encoder(self) -> Encoder:
        encoders, get, key_before = self, self.scalars.get, self.key

        def encode(value: dict[Any, Any], depth: int, seen: set[int]) -> str:
            if depth > MAX_DEPTH or len(set(map(type, value))) > 1:  # 5 and "5" may be the same key
                raise ValueError
            depth += 1
            parts = []
            for key, v in value.items():
                f = get(type(v))
                parts.append(key_before(key) + (f(v) if f is not None else encoders[type(v)](v, depth, seen)))
            return f"a:{len(parts)}:{{{''.join(parts)}}}"

        return encode

    def start(self, info: TypeInfo, count: int) -> str:
        name = _class_name(info, self.old)
        return f'O:{len(name)}:"{name}":{count}:{{'

    def attribute(self, name: Any) -> str:
        if type(name) is not str or name[:1] == "\0":  # so begins what says who may see a property
            raise SerializationError(f"an attribute cannot be called {shown(name)}")
        return _text(name)

    def field(self, field: FieldInfo, info: TypeInfo) -> str:
        return _text(_mangled(field, info, self.old))

    def enum_encoder(self, info: TypeInfo) -> Encoder:
        name = _class_name(info, self.old)
        cls: Any = info.cls

        def encode(value: Any, depth: int, seen: set[int]) -> str:
            if type(value._name_) is not str or value._name_ not in cls.__members__:
                raise SerializationError("a combination of flags cannot travel in PHP's format: its enums have names only")
            if id(value) in seen:
                raise ValueError
            seen.add(id(value))
            text = f"{name}:{raw(value._name_)}"
            if text.count(":") != 1 or '"' in text:
                raise SerializationError(f"{shown(info.wire_name)}.{value._name_} cannot be an enum's case in PHP's format")
            return f'E:{len(text)}:"{text}";'

        return encode


class PhpMessageSerializer(TextSerializer):
    """Turn messages into PHP's ``serialize()`` format, the original's default.

    With it a Python process can be either end of a conversation with an
    unchanged PHP program: a message class has the PHP class's name as its wire
    name, ``class TaskRequest(Message,
    wire_name="App\\\\Message\\\\TaskRequest")``. A property that is not public
    says so, ``field(metadata={"visibility": "private"})`` (or ``"protected"``,
    or ``"private:App\\\\Declaring\\\\Class"``), and one of another name
    ``field(metadata={"wire_name": "phpName"})``. On reading, a property is
    recognized by its name whoever may see it.

    What PHP does not tell apart:

    * Text and bytes are one type. A string arrives as ``str`` if it is valid
      UTF-8 and otherwise as ``bytes``, but in a field annotated ``bytes`` (or
      ``bytearray``, ``Optional[bytes]``) always as such, and in one annotated
      ``str`` always as text: bytes that are not UTF-8 then become lone
      surrogates (Python's ``surrogateescape``, as in file names), which this
      serializer writes as the same bytes again. Other lone surrogates cannot be
      sent.
    * Lists and dicts are one type. An array whose keys are 0, 1, 2, ... in
      order arrives as a list, every other as a dict, the empty one as a list;
      in a field annotated ``dict``, ``Dict[...]`` or ``Mapping[...]`` always as
      a dict. Keys are ``int`` or ``str``; text that looks just like an int
      (``"10"``, not ``"010"``) is an int to PHP, is written as one and arrives
      as one. Tuples arrive as lists.
    * An int in a field annotated ``float`` becomes a float. Everything else
      keeps its type.

    PHP's own value classes, unless a class here has that wire name: a
    ``stdClass`` arrives as a dict, a ``DateTime`` or ``DateTimeImmutable`` as
    an aware ``datetime`` (with a ``zoneinfo.ZoneInfo`` if its zone has a name).
    A ``datetime`` is sent as ``DateTimeImmutable`` with its offset; a naive one
    is refused.

    An object that occurs twice in a message is one object again on the other
    side, and so is an array that PHP refers to twice (with ``&``); a list that
    does is written twice. Enums travel by their member's name. What refers to
    itself can be written, as PHP can read it, but is refused on reading:
    nothing comes off the wire that its constructor has not built. A field
    without a value is left out.

    Refused at the sender, with the path of the field: ints beyond 64 bits,
    other keys, sets, complex numbers, classes that are not registered,
    subclasses of ``str``, ``int``, ``list`` and so on, more than 511 levels.
    Refused at the receiver, though PHP takes them: anything after the value,
    ints beyond 64 bits, the formats ``S:`` and ``C:``, references that repeat
    more of arrays and texts than the payload is long. Only registered classes
    are built, and an unknown one is refused at any depth. Against a peer that
    is hostile, still prefer JSON: forty objects or arrays that each hold the
    next one twice are a small payload, but take for ever to print or compare.

    Args:
        namespace: ``"StreamIpc"``, or ``"PhpStreamIpc"`` to write to the older
            release of the original, which calls the library's classes so. Both
            are always understood on reading.

    Raises:
        ValueError: The namespace is another one.
    """

    formats: ClassVar[tuple[TextFormat, TextFormat]] = (_Php(False, _SCALARS), _Php(True, _SCALARS))
