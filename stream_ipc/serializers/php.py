"""Messages in the format of PHP's ``serialize()``.

Knows messages, the registry and that format. Must not know frames or streams, and must not build anything but what
the registry has.

PHP's strings are bytes and their lengths count bytes, so everything here is done on texts of one character per byte
(Latin-1), which costs nothing to make and to turn back, and in which an ASCII text stands as it is. Writing has a
quick way, one compiled function per class, and a slow one that numbers the values for back-references and finds out
what is wrong. Reading has a quick way for the messages that are mostly sent, whose fields are short texts and numbers,
with one compiled pattern per class, and one loop with its own stack for everything: hostile input cannot make it
recurse, look back, or reserve what it only announces.
"""

from __future__ import annotations

import re
from math import isfinite
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, NoReturn, Optional, Set, Tuple

from .. import registry
from ..errors import SerializationError, article, describe
from ..messages import Message
from ..registry import FieldInfo, TypeInfo
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

__all__ = ["PhpMessageSerializer"]

# (value, depth, ids of the objects so far)
Encoder = Callable[[Any, int, Set[int]], str]
# (text, where the first property begins, where the object ends) -> the object, or None: read it the other way
Quick = Callable[[str, int, int], Any]


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


def _raw(text: str) -> str:
    """A text as one character per byte of its UTF-8."""
    # surrogateescape: what was not UTF-8 when it was read goes out as it came. Other surrogates are refused.
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("latin-1")


def _text(value: str) -> str:
    if value.isascii():
        return f's:{len(value)}:"{value}";'
    raw = _raw(value)
    return f's:{len(raw)}:"{raw}";'


def _bytes(value: bytes) -> str:
    return f's:{len(value)}:"{value.decode("latin-1")}";'


def _int(value: int) -> str:
    if INT_MIN <= value <= INT_MAX:
        return f"i:{value};"
    raise Unfit


def _float(value: float) -> str:
    if not isfinite(value):
        return "d:NAN;" if value != value else "d:INF;" if value > 0 else "d:-INF;"
    # The same shortest digits as repr(), in another dress.
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    if not e:
        return f"d:{text[:-2] if text.endswith('.0') else text};"
    if exponent == "+16":  # PHP goes over to exponents one power of ten later
        sign = "-" if value < 0 else ""
        return f"d:{sign}{mantissa.lstrip('-').replace('.', '').ljust(17, '0')};"
    return f"d:{mantissa if '.' in mantissa else mantissa + '.0'}E{int(exponent):+d};"


_SCALARS: Dict[type, Callable[[Any], str]] = {
    str: _text,
    int: _int,
    float: _float,
    bool: ("b:0;", "b:1;").__getitem__,
    type(None): {None: "N;"}.__getitem__,
    bytes: _bytes,
    bytearray: _bytes,
}

_CANONICAL = re.compile(r"(?:0|-?[1-9][0-9]{0,18})\Z")


def _array_key(key: str) -> Any:
    """A text as PHP takes it for a key: an int, if it looks just like one."""
    if key[:1] <= "9" and _CANONICAL.match(key) and INT_MIN <= int(key) <= INT_MAX:
        return int(key)
    return key


def _key(key: Any) -> str:
    if type(key) is str:
        if key[:1] <= "9" and _CANONICAL.match(key):
            return f"i:{key};" if INT_MIN <= int(key) <= INT_MAX else _text(key)
        return _text(key)
    if type(key) is int:
        return _int(key)
    if type(key) is bytes:
        text = key.decode("latin-1")
        return _key(text) if _CANONICAL.match(text) else _bytes(key)
    raise Unfit


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

    def _list(self, value: List[Any], depth: int, seen: Set[int]) -> str:
        if depth > MAX_DEPTH:
            raise Unfit
        depth += 1
        get = _SCALARS.get
        parts = [
            f"i:{i};{f(v) if (f := get(type(v))) is not None else self[type(v)](v, depth, seen)}"
            for i, v in enumerate(value)
        ]
        return f"a:{len(value)}:{{{''.join(parts)}}}"

    def _dict(self, value: Dict[Any, Any], depth: int, seen: Set[int]) -> str:
        if depth > MAX_DEPTH:
            raise Unfit
        depth += 1
        get = _SCALARS.get
        parts = {}
        for key, v in value.items():
            f = get(type(v))
            parts[_key(key)] = f(v) if f is not None else self[type(v)](v, depth, seen)
        if len(parts) != len(value):
            raise Unfit  # 5 and "5" are the same key
        return f"a:{len(value)}:{{{''.join([key + v for key, v in parts.items()])}}}"

    def _compile(self, info: TypeInfo) -> Encoder:
        name = _class_name(info, self.old)
        if info.is_enum:
            return _enum_encoder(name)
        if not info.fields:
            return self._open(name, info)
        # As in the JSON serializer: one function that names the fields.
        lines = [
            "def made(value, depth, seen):",
            # The second time it is r:<number>, and only the slow way counts.
            f"    if depth > {MAX_DEPTH} or id(value) in seen: raise Unfit",
            "    seen.add(id(value))",
        ]
        if info.cls in ENVELOPES:
            lines += [
                f"    if type(value.id) is not str or len(value.id) > {MAX_ID_LENGTH}"
                f" or not isinstance(value.{info.fields[1].name}, Message): raise Unfit",
            ]
        text = _braces(f'O:{len(name)}:"{name}":{len(info.fields)}:{{')
        for i, f in enumerate(info.fields):
            lines += [
                f"    v = value.{f.name}",
                f"    t{i} = scalars[t](v) if (t := type(v)) in scalars else encoders[t](v, depth + 1, seen)",
            ]
            text += f"{_braces(_text(_mangled(f, info, self.old)))}{{t{i}}}"
        lines.append(f"    return f{text + '}}'!r}")
        names = {"Message": Message, "Unfit": Unfit, "encoders": self, "scalars": _SCALARS}
        return compile_function(lines, names)

    def _open(self, name: str, info: TypeInfo) -> Encoder:
        def encode(value: Any, depth: int, seen: Set[int]) -> str:
            if depth > MAX_DEPTH or id(value) in seen:
                raise Unfit
            seen.add(id(value))
            depth += 1
            values = info.values(value)
            parts = []
            for key, v in values.items():
                if type(key) is not str:
                    raise Unfit
                f = _SCALARS.get(type(v))
                parts.append(_text(key) + (f(v) if f is not None else self[type(v)](v, depth, seen)))
            return f'O:{len(name)}:"{name}":{len(values)}:{{{"".join(parts)}}}'

        return encode


def _braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _enum_encoder(name: str) -> Encoder:
    def encode(value: Any, depth: int, seen: Set[int]) -> str:
        if id(value) in seen or type(value._name_) is not str or value._name_ not in type(value).__members__:
            raise Unfit
        seen.add(id(value))
        return _enum_text(name, value)

    return encode


def _enum_text(name: str, value: Any) -> str:
    text = f"{name}:{_raw(value._name_)}"
    return f'E:{len(text)}:"{text}";'


def _class_name(info: TypeInfo, old: bool) -> str:
    name = _raw(wire_name(info, old))
    if '"' in name or len(name) > 500:
        raise SerializationError(f"{shown(info.wire_name)} cannot be a class name in PHP's format")
    return name


def _mangled(field: FieldInfo, info: TypeInfo, old: bool) -> str:
    """The name of a property in the format, which says who may see it."""
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
    return f"\0{declaring or wire_name(_declaring(field, info), old)}\0{field.wire_name}"


def _declaring(field: FieldInfo, info: TypeInfo) -> TypeInfo:
    # PHP's private is private of the class that declares it, also in a child's instance.
    for cls in info.cls.__mro__:
        if field.name in cls.__dict__.get("__annotations__", ()):
            try:
                return registry.type_info(cls)
            except SerializationError:
                break
    return info


class _PhpWalk(Walk):
    format = "PHP's format"

    def __init__(self, old: bool) -> None:
        super().__init__(old)
        self._count = 0  # of the values so far
        self._numbers: Dict[int, Tuple[int, Any]] = {}  # id of an object -> its number, and itself, to keep it alive

    def value(self, step: str, value: Any) -> None:
        cls = type(value)
        self._count += 1
        if cls in _SCALARS:
            if cls is str:
                self.check_text(step, value)
            try:
                self.out.append(_SCALARS[cls](value))
            except Unfit:
                self.fail(step, "an int beyond 64 bits cannot travel in PHP's format; send it as text")
        elif cls is list or cls is tuple:
            self.open(step, value, f"a:{len(value)}:{{", self._items(value), "}")
        elif cls is dict:
            self.open(step, value, f"a:{len(value)}:{{", self._entries(value), "}")
        else:
            info = self.info(step, value)
            if id(value) in self._numbers:
                self.out.append(f"r:{self._numbers[id(value)][0]};")
                return
            self._numbers[id(value)] = (self._count, value)
            name = _class_name(info, self.old)
            if not info.is_enum:
                attributes = self._attributes(step, info, value)
                start = f'O:{len(name)}:"{name}":{len(attributes)}:{{'
                self.open(step, value, start, iter(attributes), "}")
            elif type(value._name_) is str and value._name_ in cls.__members__:
                self.out.append(_enum_text(name, value))
            else:
                self.fail(step, "a combination of flags cannot travel in PHP's format, whose enums have names only")

    def check_text(self, step: str, text: str) -> bytes:
        try:
            return text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return super().check_text(step, text)

    @staticmethod
    def _items(value: Any) -> Iterator[Tuple[str, str, Any]]:
        for i, v in enumerate(value):
            yield (f"i:{i};", f"[{i}]", v)

    def _entries(self, value: Dict[Any, Any]) -> Iterator[Tuple[str, str, Any]]:
        written = set()
        for key, v in value.items():
            step = f"[{shown(key)}]"
            if type(key) is str:
                self.check_text(step, key)
            try:
                before = _key(key)
            except Unfit:
                if type(key) is int:
                    self.fail(step, "a dict key beyond 64 bits cannot travel in PHP's format")
                self.fail(step, f"a dict key in PHP's format must be a str, bytes or an int, not {article(type(key))}")
            if before in written:
                self.fail(step, "a dict has a second key that is the same to PHP, which takes digits for an int")
            written.add(before)
            yield (before, step, v)

    def _attributes(self, step: str, info: TypeInfo, value: Any) -> List[Tuple[str, str, Any]]:
        # As the original leaves out a property that has no value, and PHP makes of a missing one a property without
        # a value, a field without a value is left out. (Not in an envelope: its content was checked already.)
        found = []
        for f in info.fields:
            if hasattr(value, f.name):
                name = _mangled(f, info, self.old)
                self.check_text(f"{step}.{f.name}", name)
                v = getattr(value, f.name)
                found.append((_text(name), self.step_to(value, f.name, v), v))
        if not info.fields:
            for name, v in info.values(value).items():
                if type(name) is not str:
                    self.fail(step, f"an attribute cannot be called {shown(name)}")
                self.check_text(f"{step}.{shown(name)}", name)
                found.append((_text(name), f".{name}", v))
        return found


class _TopEncoders(Dict[type, Encoder]):
    """The same for the outermost value, which must be a message: asked by the look-up, so it costs nothing."""

    def __init__(self, within: _Encoders) -> None:
        super().__init__()
        self._within = within
        registry.clear_on_change(self)

    def __missing__(self, cls: type) -> Encoder:
        if not issubclass(cls, Message):
            raise Unfit
        made = self[cls] = self._within[cls]
        return made


_top_encoders = (_TopEncoders(_Encoders(old=False)), _TopEncoders(_Encoders(old=True)))


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------

# What stands at the beginning of a value. Lengths have at most ten digits and ints twenty, so that no number is long
# enough to be slow.
_TOKEN = re.compile(
    r's:([0-9]{1,10}):"'  # 1
    r"|i:([+-]?[0-9]{1,20});"  # 2
    r"|a:([0-9]{1,10}):\{"  # 3
    r'|O:([0-9]{1,10}):"([^"]{1,500})":([0-9]{1,10}):\{'  # 4 to 6
    r"|b:([01]);"  # 7
    r"|N(;)"  # 8
    r"|d:(-?INF|NAN|[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?);"  # 9
    r"|(r):([0-9]{1,10});"  # 10, 11
    r"|(R):([0-9]{1,10});"  # 12, 13
    r'|E:([0-9]{1,10}):"([^":]{1,500}):([^":]{1,500})";'  # 14 to 16
).match
_STRING, _INT, _ARRAY, _OBJECT, _BOOL, _NULL, _FLOAT, _SAME, _REFERENCE, _ENUM = 1, 2, 3, 6, 7, 8, 9, 11, 13, 16

_OPEN = object()  # stands for a container that is not complete
_SHORTEST_ITEM = len("i:0;N;")


class _Class:
    """How the objects of one class are built."""

    __slots__ = ("build", "keys", "names")

    def __init__(self, build: Builder, names: List[str]) -> None:
        self.build = build
        self.names = names
        self.keys = [f's:{len(name)}:"{name}";' for name in names]  # as they are expected, one after the other


class _Classes(Dict[str, _Class]):
    """Class name (as bytes) -> how its objects are built; made when a name is first met."""

    def __init__(self) -> None:
        super().__init__()
        registry.clear_on_change(self)

    def __missing__(self, name: str) -> _Class:
        made = self[name] = self._make(find_class(_shown_text(name)))
        return made

    @staticmethod
    def _make(info: TypeInfo) -> _Class:
        if info.is_enum:
            raise SerializationError(f"{info.wire_name} is an enum, but came as an object")
        if not info.fields:
            return _Class(lambda data: info.build({_shown_text(_bare(key)): v for key, v in data.items()}), [])
        names = [_raw(_mangled(f, info, old=False)) for f in info.fields]
        codes = [_CONVERSIONS.get(plain_type(f.annotation), "") for f in info.fields]
        converters = [convert(code) for code in codes]

        def build(data: Dict[str, Any]) -> Any:
            # Not each under its own name: whoever may see a property, what it is called counts.
            others = {_bare(key): v for key, v in data.items() if key not in names}
            values = {}
            for f, name, converter in zip(info.fields, names, converters):  # noqa: B905 (3.8)
                value = data[name] if name in data else others.get(_raw(f.wire_name), _OPEN)
                if value is not _OPEN:
                    values[f.name] = converter(value)
            return info.build(values)

        return _Class(builder(info, names, codes, build), names)


# PHP tells neither text from bytes nor a list from a map; the annotation does.
_CONVERSIONS = {
    "float": "if type(v) is int: v = float(v)",
    "str": "if type(v) is bytes: v = v.decode('utf-8', 'surrogateescape')",
    "bytes": "if type(v) is str: v = v.encode()",
    "bytearray": "if type(v) in (str, bytes): v = bytearray(v.encode() if type(v) is str else v)",
    "dict": "if type(v) is list: v = dict(enumerate(v))",
}

_classes = _Classes()


# What the quick way takes for a value: a text (its length, and itself), an int, a float, a bool. Longer texts are left
# to the other way, which does not look at each character.
_QUICK_VALUE = (
    r'(?:s:([0-9]{1,3}):"([^"]{0,200})"|i:(-?[0-9]{1,18})|d:(-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:E[+-][0-9]{1,3})?)'
    r"|b:([01])|N);"
)
_QUICK_FIELDS = 20
_HEAD = re.compile(r'O:([0-9]{1,3}):"([^"]{1,500})":[0-9]{1,3}:\{')
_LONGEST_HEAD = 520
_ENVELOPE_FIELDS = re.compile(
    r's:2:"id";s:([0-9]{1,3}):"([^"]{0,128})";(s:7:"request";|s:8:"response";)(' + _HEAD.pattern + ")"
).match


class _QuickWays(Dict[str, Optional[Quick]]):
    """What stands before an object's first property -> the quick way to read it, or None if there is none.

    Against the loop below: a request with one text 3.1 us instead of 8.0.
    """

    def __init__(self, content: Optional[_QuickWays] = None) -> None:
        super().__init__()
        self.content = content  # of envelopes; they are not read quickly inside each other
        registry.clear_on_change(self)

    def __missing__(self, head: str) -> Optional[Quick]:
        found = _HEAD.fullmatch(head)
        if found is None:
            return None
        name = found[2]
        try:
            info = find_class(_shown_text(name))
            cls = _classes[name]
        except SerializationError:
            return None
        if head != f'O:{len(name)}:"{name}":{len(cls.names)}:{{':
            return None  # and not kept: there is no end of such heads
        made = None
        if info.cls in ENVELOPES:
            if self.content is not None:
                made = _quick_envelope(info.cls, cls.keys[1], self.content)
        elif issubclass(info.cls, Message) and 0 < len(cls.names) <= _QUICK_FIELDS:
            made = _quick_message(cls)
        self[head] = made
        return made


def _quick_message(cls: _Class) -> Quick:
    pattern = "".join([re.escape(key) + _QUICK_VALUE for key in cls.keys])
    count = len(cls.names)
    groups = ", ".join(f"n{i}, t{i}, i{i}, d{i}, b{i}" for i in range(count))
    lines = [
        "def made(text, start, end):",
        "    found = fullmatch(text, start, end)",
        "    if found is None: return None",
        f"    {groups} = found.groups()",
    ]
    for i in range(count):
        lines += [
            f"    if t{i} is not None:",
            f"        if len(t{i}) != int(n{i}): return None",
            f"        v{i} = t{i} if t{i}.isascii() else not_ascii(t{i})",
            f"    elif i{i} is not None: v{i} = int(i{i})",
            f"    elif b{i} is not None: v{i} = b{i} == '1'",
            f"    else: v{i} = None if d{i} is None else float(d{i})",
        ]
    lines.append(f"    return build({{{', '.join(f'{name!r}: v{i}' for i, name in enumerate(cls.names))}}})")
    fullmatch = re.compile(pattern + r"\}").fullmatch
    return compile_function(lines, {"build": cls.build, "fullmatch": fullmatch, "not_ascii": _not_ascii})


def _quick_envelope(cls: Any, expected: str, content: _QuickWays) -> Quick:
    def quick(text: str, start: int, end: int) -> Any:
        found = _ENVELOPE_FIELDS(text, start, end)
        if found is None or text[end - 1] != "}":
            return None
        length, identity, key, head = found.group(1, 2, 3, 4)
        way = content[head]
        if way is None or key != expected or len(identity) != int(length) or not identity.isascii():
            return None
        message = way(text, found.end(), end - 1)
        return None if message is None else cls(identity, message)

    return quick


_quick_ways = _QuickWays(_QuickWays())


def _bare(key: str) -> str:
    """The name of a property without what says who may see it."""
    return key[key.find("\0", 1) + 1 :] if key[:1] == "\0" else key


def _shown_text(raw: str) -> str:
    return raw if raw.isascii() else raw.encode("latin-1").decode("utf-8", "surrogateescape")


def _not_ascii(raw: str) -> Any:
    data = raw.encode("latin-1")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _enum_case(name: str, case: str) -> Any:
    info = find_class(_shown_text(name))
    cls: Any = info.cls
    member = cls.__members__.get(_shown_text(case)) if info.is_enum else None
    if member is None:
        text = f"{info.wire_name} has no member {shown(_shown_text(case))}; add it to the enum on this side too"
        raise SerializationError(text)
    return member


def _bad(position: int, what: str) -> NoReturn:
    raise SerializationError(f"payload is not in PHP's format: {what} at byte {position}")


def _parse(text: str, classes: Any, root: List[Any]) -> Any:
    """Read the one value of a payload.

    Args:
        text: The payload, one character per byte.
        classes: Class name -> :class:`_Class`.
        root: Gets the class name and the properties (so far) of the outermost object, for when this fails.
    """
    numbered: List[Any] = []  # the values that may be referred to, which is all but references themselves
    heights: Dict[int, int] = {}  # number of a container that is complete -> how many levels it has
    copies = [len(text)]  # how many items of arrays may still be copied: as many as the payload has bytes
    stack: List[Tuple[Any, Any, bool, int, Any, int, int]] = []
    # The container that is being read: its class or None; its items so far; whether they are a list; how many are
    # still to come; the key of the next; its number; how many levels its items have.
    cls: Any = None
    items: Any = None
    is_list = False
    left = 0
    key: Any = None
    number = 0
    height = 0
    size = len(text)
    position = 0
    while True:
        # A value begins here.
        found = _TOKEN(text, position)
        if found is None:
            _bad(position, "there is no value that is known")
        kind: Any = found.lastindex
        end = found.end()
        levels = 0
        value: Any
        if kind == _STRING:
            position = end + int(found[1])
            if text[position : position + 2] != '";':
                _bad(end, "a string of another length than it says")
            value = text[end:position]
            position += 2
            if not value.isascii():
                value = _not_ascii(value)
        elif kind in (_ARRAY, _OBJECT):
            count = int(found[kind])
            if count * _SHORTEST_ITEM >= size - end:
                _bad(end, "an array or object that says it has more than there is")
            if len(stack) >= MAX_DEPTH:
                _bad(end, f"something nested deeper than {MAX_DEPTH} levels")
            stack.append((cls, items, is_list, left, key, number, height))
            if kind == _ARRAY:
                cls, items, is_list = None, [], True
            else:
                if len(found[5]) != int(found[4]):
                    _bad(position, "a class name of another length than it says")
                cls, items, is_list = classes[found[5]], {}, False
                if len(stack) == 1:
                    root[:] = found[5], items
            left = count
            height = 0
            number = len(numbered)
            value = _OPEN
            position = end
        else:
            position = end
            if kind == _INT:
                value = int(found[2])
                if not INT_MIN <= value <= INT_MAX:
                    _bad(found.start(), "an int beyond 64 bits")
            elif kind == _NULL:
                value = None
            elif kind == _BOOL:
                value = found[7] == "1"
            elif kind == _FLOAT:
                value = float(found[9])
            elif kind == _ENUM:
                if len(found[15]) + 1 + len(found[16]) != int(found[14]):
                    _bad(found.start(), "an enum case of another length than it says")
                value = _enum_case(found[15], found[16])
            else:
                index = int(found[kind]) - 1
                if not 0 <= index < len(numbered):
                    _bad(found.start(), "a reference to a value that is not there")
                value = numbered[index]
                if value is _OPEN:
                    raise SerializationError(
                        f"the value at byte {found.start()} refers to what it is part of, which cannot be built by its"
                        " constructor"
                    )
                levels = heights.get(index, 0)
                if len(stack) + levels > MAX_DEPTH:
                    _bad(found.start(), f"something nested deeper than {MAX_DEPTH} levels")
                if type(value) in (list, dict):
                    value = _copy(value, copies)
        if kind != _REFERENCE:
            numbered.append(value)

        # A value is complete, or a container has begun.
        while True:
            if value is not _OPEN:
                if not stack:
                    if position != size:
                        _bad(position, "something after the value")
                    return value
                if is_list:
                    items.append(value)
                else:
                    items[key] = value
                if levels > height:
                    height = levels
                left -= 1
            if left:
                break
            if text[position : position + 1] != "}":
                _bad(position, "an array or object that goes on after its last item")
            position += 1
            if cls is not None:
                value = cls.build(items)
            elif not is_list and 0 in items and list(items) == list(range(len(items))):
                value = list(items.values())  # some key came twice
            else:
                value = items
            numbered[number] = value
            levels = heights[number] = height + 1
            cls, items, is_list, left, key, number, height = stack.pop()

        # A key begins here.
        if is_list:
            expected = f"i:{len(items)};"
            if text.startswith(expected, position):
                position += len(expected)
                continue
            items = dict(enumerate(items))
            is_list = False
        elif cls is not None:
            # Properties mostly come in the order of declaration: 0.2 us instead of 0.9 for finding out which.
            index = len(items)
            if index < len(cls.keys) and text.startswith(cls.keys[index], position):
                key = cls.names[index]
                position += len(cls.keys[index])
                continue
        found = _TOKEN(text, position)
        if found is None:
            _bad(position, "no key")
        end = found.end()
        if found.lastindex == _STRING:
            position = end + int(found[1])
            if text[position : position + 2] != '";':
                _bad(end, "a string of another length than it says")
            key = text[end:position]
            position += 2
            if cls is None:
                key = _array_key(key) if key.isascii() else _not_ascii(key)
        elif found.lastindex == _INT:
            position = end
            key = int(found[2])
            if not INT_MIN <= key <= INT_MAX:
                _bad(found.start(), "a key beyond 64 bits")
            if cls is not None:
                key = str(key)
        else:
            _bad(position, "a key that is neither a string nor an int")


def _copy(value: Any, left: List[int]) -> Any:
    # Arrays are values in PHP: one that is referred to twice is two lists here. With neither this nor a limit, forty
    # references to references would be a list that takes for ever to print or to send on.
    made = value.copy()
    todo = [made]
    while todo:
        items = todo.pop()
        left[0] -= len(items)
        if left[0] < 0:
            raise SerializationError("payload refers to the same arrays so often that they would outgrow it")
        for k, v in enumerate(items) if type(items) is list else items.items():
            if type(v) in (list, dict):
                items[k] = v.copy()
                todo.append(items[k])
    return made


class _AnyClass:
    """Lets the parser run over a payload without building anything."""

    def __getitem__(self, name: str) -> _Class:
        return _Class(lambda data: None, [])


class PhpMessageSerializer:
    """Messages in the format of PHP's ``serialize()``, the original's default.

    With it a Python process can be either end of a conversation with an unchanged PHP program: a message class has
    the PHP class's name as its wire name, ``class TaskRequest(Message, wire_name="App\\\\Message\\\\TaskRequest")``. A
    property that is not public says so, ``field(metadata={"visibility": "private"})`` (or ``"protected"``, or
    ``"private:App\\\\Declaring\\\\Class"``), and one of another name ``field(metadata={"wire_name": "phpName"})``. On
    reading, a property is recognized by its name whoever may see it.

    What PHP does not tell apart:

    * Text and bytes are one type. A string arrives as ``str`` if it is valid UTF-8 and otherwise as ``bytes``, but in
      a field annotated ``bytes`` (or ``bytearray``, ``Optional[bytes]``) always as such, and in one annotated ``str``
      always as text: bytes that are not UTF-8 then become lone surrogates (Python's ``surrogateescape``, as in file
      names), which this serializer writes as the same bytes again. Other lone surrogates cannot be sent.
    * Lists and dicts are one type. An array whose keys are 0, 1, 2, ... in order arrives as a list, every other as a
      dict, the empty one as a list; in a field annotated ``dict``, ``Dict[...]`` or ``Mapping[...]`` always as a
      dict. Keys are ``int`` or ``str``; text that looks just like an int (``"10"``, not ``"010"``) is an int
      to PHP, is written as one and arrives as one. Tuples arrive as lists.
    * An int in a field annotated ``float`` becomes a float. Everything else keeps its type.

    An object that occurs twice in a message is one object again on the other side. A list that does is written twice.
    Enums travel by their member's name. What refers to itself can be written, as PHP can read it, but is refused on
    reading: nothing comes off the wire that its constructor has not built. A field without a value is left out.

    Refused at the sender, with the path of the field: ints beyond 64 bits, other keys, sets, complex numbers, classes
    that are not registered, subclasses of ``str``, ``int``, ``list`` and so on, more than 511 levels. Refused at the
    receiver, though PHP takes them: anything after the value, ints beyond 64 bits, the formats ``S:`` and ``C:``.
    Only registered classes are built. Against a peer that is hostile, still prefer JSON: forty objects that each hold
    the next one twice are a small payload, but take for ever to print or to compare.

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
        """Turn a message into PHP's format.

        Args:
            message: A message, or an envelope around one.

        Returns:
            The payload.

        Raises:
            SerializationError: Something in it cannot travel; the text names the field, as in
                ``TaskRequest.items[3].name: set cannot travel in PHP's format``.
        """
        try:
            return self._encoders[type(message)](message, 1, set()).encode("latin-1")
        except MemoryError:
            raise
        except Exception:
            # Mostly an object that occurs twice. RecursionError: a list that holds itself, or only a deep message on
            # a full stack. Left first, so that the error is not shown as one about this.
            pass
        return _PhpWalk(self._old).text(message).encode("latin-1")

    def deserialize(self, payload: Payload) -> Message:
        """Turn PHP's format into its message.

        Args:
            payload: The payload; nothing of it is kept.

        Returns:
            The message or envelope, built by its class's constructor.

        Raises:
            SerializationError: It is not in that format, names a class that is not registered, or holds what the
                class's constructor refuses. Where the id of an envelope could be read, ``request_id`` or
                ``response_id`` says it.
        """
        try:
            text = str(payload, "latin-1")
            start = text.find("{", 0, _LONGEST_HEAD) + 1
            quick = _quick_ways[text[:start]]
            message = None if quick is None else quick(text, start, len(text))
            if message is None:
                message = _parse(text, _classes, [])
        except SerializationError as exc:
            exc.args = (str(exc) + other_format(payload, "PHP's format"),)
            add_id(exc, *_salvage(payload))
            raise
        except Exception as exc:
            error = SerializationError(f"payload cannot be decoded: {describe(exc)}")
            add_id(error, *_salvage(payload))
            raise error from exc
        if isinstance(message, Message):
            return message
        raise SerializationError(f"payload is not a message but {article(type(message))}")


def _salvage(payload: Payload) -> Tuple[Any, Any]:
    """The class and the id of an envelope whose content is bad, if they can be read."""
    root: List[Any] = []
    try:
        _parse(str(payload, "latin-1"), _AnyClass(), root)
    except Exception:  # there is one error to report already
        pass
    if not root:
        return None, None
    identity = root[1].get("id")
    return _shown_text(root[0]), identity.decode("utf-8", "surrogateescape") if type(identity) is bytes else identity
