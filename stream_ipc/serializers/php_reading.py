"""Reading PHP's ``serialize()`` format.

Knows messages, the registry and that format. Must not build anything but what the registry has, and PHP's own value
classes.

One loop with its own stack reads everything: hostile input cannot make it recurse, look back, or reserve what it only
announces. Objects whose properties are short texts and numbers in the order of declaration, as most are, it does not take
apart: one pattern, compiled for their class, reads them. So it does with lists of ints and of texts; and messages that are
such objects are read without the loop.
"""

from __future__ import annotations

import re

from .. import registry
from ..errors import SerializationError
from ..messages import MAX_ID_LENGTH, NOTIFICATION, REQUEST, RESPONSE, Message, RequestEnvelope
from .text_format import (
    ENVELOPES,
    HEAD_SIZE,
    INT_MAX,
    INT_MIN,
    ByName,
    builder,
    compile_builder,
    find_class,
    member_of,
    wire_name,
)
from .text_walk import MAX_DEPTH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from ..protocols import Payload
    from ..registry import FieldInfo, TypeInfo
    from .text_format import Builder, Conversions

    # (text, where the first property begins, where the object ends) -> the object, or None: read it the other way
    Quick = Callable[[str, int, int], Any]

__all__ = ["TOKEN", "bare", "decoded", "key_of", "mangled", "parse", "raw", "read", "salvage"]


# -- the form

# PHP's strings are bytes and their lengths count bytes, so both directions work on texts of one character per byte
# (Latin-1, called raw here), which cost nothing to make and to turn back, and in which an ASCII text stands as it is.

# What stands at the beginning of a value; the last group that matches tells its kind. Lengths have at most ten digits and
# ints twenty, so that no number is long enough to be slow.
_VALUE = (
    r'(?:s:(?P<text>[0-9]{1,10}):"'  # its length
    r"|i:(?P<int>[+-]?[0-9]{1,20});"
    r"|a:(?P<array>[0-9]{1,10}):\{"  # how many items it has
    r'|O:(?P<size>[0-9]{1,10}):"(?P<name>[^"]{1,500})":(?P<object>[0-9]{1,10}):\{'  # how many properties
    r"|b:(?P<bool>[01]);"
    r"|N(?P<null>;)"
    r"|d:(?P<float>-?INF|NAN|[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?);"
    r"|r:(?P<again>[0-9]{1,10});"  # the same object again
    r"|R:(?P<reference>[0-9]{1,10});"
    r'|E:(?P<case_size>[0-9]{1,10}):"(?P<enum>[^":]{1,500}):(?P<case>[^":]{1,500})";)'
)
TOKEN = re.compile(_VALUE).match
# A usual key with the value behind it. The length of a text is still to be compared with it.
_ITEM = re.compile(r'(?:i:(-?[0-9]{1,18})|s:([0-9]{1,3}):"([^"]{0,200})");' + _VALUE).match

_CANONICAL = re.compile(r"(?:0|-?[1-9][0-9]{0,18})\Z")


def raw(text: str) -> str:
    """Return a text as one character per byte of its UTF-8."""
    # surrogateescape: what was not UTF-8 when it was read goes out as it came. Other surrogates are refused.
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("latin-1")


def unraw(raw: str) -> str:
    """Return the text of a raw one; bytes that are not UTF-8 become lone surrogates."""
    return raw if raw.isascii() else raw.encode("latin-1").decode("utf-8", "surrogateescape")


def decoded(raw: str) -> Any:
    """Return the text of a raw one, or its bytes if they are not UTF-8."""
    data = raw.encode("latin-1")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def key_of(text: str) -> str | int:
    """Return the key of an array for a text: what looks just like an int of 64 bits is one to PHP."""
    if text[:1] <= "9" and _CANONICAL.match(text) and -(1 << 63) <= int(text) < 1 << 63:
        return int(text)
    return text


def bare(key: str) -> str:
    """Return the name of a property without what says who may see it."""
    return key[key.find("\0", 1) + 1 :] if key[:1] == "\0" else key


# -- classes


def mangled(field: FieldInfo, info: TypeInfo, old: bool) -> str:
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


def _class_of(name: str) -> tuple[Builder, int, Quick | None]:
    """Return what reads the objects of a class, by its raw name.

    Returns:
        What builds one of its properties by raw name as it came; how many properties it should have; what reads one that
        has just these if they are simple, or None.
    """
    info = _info_of(unraw(name))
    if not info.fields:
        return lambda data: info.build({unraw(bare(key)): v for key, v in data.items()}), 0, None
    keys = [raw(mangled(f, info, old=False)) for f in info.fields]
    names = [raw(f.wire_name) for f in info.fields]

    def rename(data: dict[str, Any]) -> dict[str, Any]:
        # Not each came under its own key: whoever may see a property, its name counts.
        others = {bare(key): v for key, v in data.items() if key not in keys}
        return {**{key: others[name] for key, name in zip(keys, names, strict=True) if name in others}, **data}

    quick = None
    if len(keys) <= _MOST_FIELDS and info.cls not in ENVELOPES:
        quick = _quick_reader(info, keys)
        if issubclass(info.cls, Message):
            _heads[f'O:{len(name)}:"{name}":{len(keys)}:{{'] = quick
    return builder(info, keys, _CONVERSIONS, rename), len(keys), quick


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


_classes = ByName(_class_of)
_heads: dict[str, Quick] = {}  # what stands before a message's first property -> the quick way to read it, once it is known
registry.clear_on_change(_heads)

# -- quick reading

# What a pattern takes for a value: a text (its length, and itself), an int, a float, a bool. Longer texts are left to the
# loop, which does not look at each character.
_SIMPLE = (
    r'(?:s:([0-9]{1,3}):"([^"]{0,200})"|i:(-?[0-9]{1,18})|d:(-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:E[+-][0-9]{1,3})?)'
    r"|b:([01])|N);"
)
_MOST_FIELDS = 20


def _quick_reader(info: TypeInfo, names: list[str]) -> Quick:
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
    return compile_builder(lines, info, _CONVERSIONS, {"fullmatch": fullmatch, "decoded": decoded})


_is_ints = re.compile(r"(?:i:[0-9]{1,9};i:-?[0-9]{1,18};)*\}").fullmatch
_is_texts = re.compile(r'(?:i:[0-9]{1,9};s:[0-9]{1,9}:"[^"]*";)*\}').fullmatch
_numbers = re.compile(r"-?[0-9]+").findall
_texts = re.compile(r'i:([0-9]+);s:([0-9]+):"([^"]*)";').findall
_FEW = 8  # items of a list for which the loop is as quick


def _quick_list(text: str, start: int, end: int) -> list[Any] | None:
    """Return a list of ints, or of ASCII texts; or None: read it the other way."""
    values: list[Any]
    if _is_ints(text, start, end) is not None:
        numbers = list(map(int, _numbers(text, start, end)))
        keys, values = numbers[::2], numbers[1::2]
    elif _is_texts(text, start, end) is not None and text.isascii():
        found = _texts(text, start, end)
        keys, values = [int(key) for key, _, _ in found], [value for _, _, value in found]
        if [len(value) for value in values] != [int(length) for _, length, _ in found]:
            return None
    else:
        return None
    return values if keys == list(range(len(keys))) else None


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


def read(payload: Payload) -> Any:
    """Return the value of a payload, or raise anything."""
    text = str(payload, "latin-1")
    found = _find_content(text)
    if found is None:
        start = text.find("{", 0, _LONGEST_HEAD) + 1
        quick = _heads.get(text[:start])
        message = None if quick is None else quick(text, start, len(text))
        return parse(text) if message is None else message
    begin, length, id, before, head = found.groups()
    cls, expected = _ENVELOPES[begin]
    quick = _heads.get(head)
    if quick is not None and len(id) == int(length) and id.isascii() and before == expected and text[-1] == "}":
        message = quick(text, found.end(), len(text) - 1)
        if message is not None:
            return cls(id, message)
    return parse(text)


def salvage(payload: Payload) -> tuple[int, Any]:
    """Return the kind and the id of an envelope whose content is bad; a notification's if these cannot be read."""
    # All known senders write the id first. There may not be enough memory to read the rest.
    found = _find_id(str(bytes(payload[:HEAD_SIZE]), "latin-1"))
    if found is None or len(found[3]) != int(found[2]):
        return NOTIFICATION, None
    return REQUEST if _ENVELOPES[found[1]][0] is RequestEnvelope else RESPONSE, unraw(found[3])


# -- reading everything

_OPEN = object()  # stands for a container that is not complete
_PART = object()  # stands for a value in what was read quickly
_NO_OBJECTS = (str, int, float, bool, type(None), list)
# What a field may make a copy of, each time that it is referred to, because of the field's annotation. So how much of it
# may come by reference, in items and characters, is no more than the payload's length, or this for short ones.
_SIZED = (str, bytes, list)
_REPEATED = 256 * 1024
_SHORTEST_ITEM = len("i:0;N;")


def _bad(position: int, what: str) -> NoReturn:
    raise SerializationError(f"payload is not in PHP's format: {what} at byte {position}")


def _read_key(text: str, position: int) -> tuple[str | int, int]:
    """Return a key that ``_ITEM`` does not take, and where it ends."""
    found = TOKEN(text, position)
    if found is not None and found.lastgroup == "text":
        end = found.end() + int(found["text"])
        if text[end : end + 2] == '";':
            return text[found.end() : end], end + 2
    elif found is not None and found.lastgroup == "int" and INT_MIN <= int(found["int"]) <= INT_MAX:
        return int(found["int"]), found.end()
    _bad(position, "no key")


def parse(text: str) -> Any:
    """Read the one value of a payload, one character per byte."""
    has_references = "R:" in text  # which may be to parts of what is read quickly
    repeated = 0  # items and characters that came by reference
    numbered: list[Any] = []  # the values that may be referred to, which is all but references themselves
    stack: list[tuple[Builder | None, dict[Any, Any], int, Any, int]] = []
    # The container that is being read: what builds it, or None for an array; its items so far; how many are still to come;
    # the key of the next; its number.
    build: Builder | None = None
    items: dict[Any, Any] = {}
    left = 0
    key: Any = None
    number = 0
    position = 0
    found = TOKEN(text)
    while True:
        # A value begins here, behind its key.
        if found is None:
            _bad(position, "there is no value that is known")
        kind = found.lastgroup
        content: Any = found[found.lastindex or 0]
        position = end = found.end()
        value: Any = None
        if kind == "text":
            position = end + int(content)
            if text[position : position + 2] != '";':
                _bad(end, "a string of another length than it says")
            value = text[end:position]
            position += 2
            if not value.isascii():
                value = decoded(value)
            numbered.append(value)
        elif kind == "int":
            value = int(content)
            if not INT_MIN <= value <= INT_MAX:
                _bad(end, "an int beyond 64 bits")
            numbered.append(value)
        elif kind in ("array", "object"):
            count = int(content)
            if count * _SHORTEST_ITEM >= len(text) - position:
                _bad(position, "an array or object that says it has more than there is")
            if len(stack) >= MAX_DEPTH:
                _bad(position, f"something nested deeper than {MAX_DEPTH} levels")
            new, quick = None, None
            if kind == "object":
                if len(found["name"]) != int(found["size"]):
                    _bad(position, "a class name of another length than it says")
                new, expected, quick = _classes[found["name"]]
                quick = quick if count == expected else None
            elif count > _FEW:
                quick = _quick_list
            if quick is not None and not has_references:
                end = text.find("}", position) + 1
                value = quick(text, position, end)
                if kind == "array" and value is not None and len(value) != count:
                    _bad(position, "an array of another length than it says")
            if value is not None:
                position = end
                numbered += [value, *[_PART] * count]
            else:
                stack.append((build, items, left, key, number))
                build, items, left, number = new, {}, count, len(numbered)
                value = _OPEN
                numbered.append(value)
        elif kind in ("again", "reference"):
            index = int(content) - 1
            if not 0 <= index < len(numbered):
                _bad(position, "a reference to a value that is not there")
            value = numbered[index]
            if value is _OPEN:
                raise SerializationError(
                    f"the reference before byte {position} is to what it is part of, which cannot be built by its"
                    " constructor"
                )
            if kind == "again":
                if value is _PART or type(value) in _NO_OBJECTS:
                    _bad(position, "an object again that is none")
                numbered.append(value)
            if type(value) in _SIZED:
                repeated += len(value)
                if repeated > max(len(text), _REPEATED):
                    _bad(position, "a reference that makes more of the arrays and texts referred to than there is in all")
        else:
            if kind == "bool":
                value = content == "1"
            elif kind == "float":
                value = float(content)
            elif kind == "case":
                if len(f"{found['enum']}:{content}") != int(found["case_size"]):
                    _bad(end, "an enum case of another length than it says")
                value = member_of(find_class(unraw(found["enum"]), _ADVICE), unraw(content))
            numbered.append(value)

        # A value is complete, or a container has begun.
        while True:
            if value is not _OPEN:
                if not stack:
                    if position != len(text):
                        _bad(position, "something after the value")
                    return value
                items[key] = value
                left -= 1
            if left:
                break
            if text[position : position + 1] != "}":
                _bad(position, "an array or object that goes on after its last item")
            position += 1
            if build is not None:
                value = build(items)
            elif not items or (0 in items and list(items) == list(range(len(items)))):
                value = list(items.values())
            else:
                value = items
            numbered[number] = value
            build, items, left, key, number = stack.pop()

        # A key is next, and the value behind it.
        found = _ITEM(text, position)
        key = None
        if found is not None:
            key = found[1]
            if key is not None:
                key = int(key)
            elif len(found[3]) == int(found[2]):
                key = found[3]
        if key is None:
            key, position = _read_key(text, position)
            found = TOKEN(text, position)
        if type(key) is int:
            key = key if build is None else str(key)
        elif build is None:
            key = key_of(key) if key.isascii() else decoded(key)
