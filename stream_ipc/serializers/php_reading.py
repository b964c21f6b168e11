"""Reading messages in the format of PHP's ``serialize()``.

Knows messages, the registry and the names of that format. Must not build anything but what the registry has, and PHP's own
value classes.

Objects whose properties are short texts and numbers in the order of declaration, as most are, are not taken apart: one
pattern, compiled for their class, reads them. Messages that are such objects are read without the parser.
"""

from __future__ import annotations

import re

from .. import registry
from ..errors import SerializationError
from ..messages import ENVELOPES, MAX_ID_LENGTH, NOTIFICATION, REQUEST, RESPONSE, Message, RequestEnvelope
from .php_parser import bare, decoded, parse, raw, unraw
from .text_classes import builder, compile_builder, find_class, member_of, wire_name
from .text_serializer import HEAD_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..protocols import Payload
    from ..type_info import FieldInfo, TypeInfo
    from .php_parser import Build, Simple
    from .text_classes import Conversions

__all__ = ["mangled", "read", "salvage"]


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


def _class_of(name: str) -> tuple[Build, int, Simple | None]:
    """Return what the parser asks for about a class, by its raw name."""
    info = _info_of(unraw(name))
    if not info.fields:
        return lambda data: info.build({unraw(bare(key)): v for key, v in data.items()}), 0, None
    keys = [raw(mangled(f, info, old=False)) for f in info.fields]
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
    return builder(info, keys, _CONVERSIONS, rename), len(keys), simple


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
    return member_of(find_class(unraw(enum), _ADVICE), unraw(case))


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
    return compile_builder(lines, info, _CONVERSIONS, {"fullmatch": fullmatch, "decoded": decoded})


# -- payloads

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


def salvage(payload: Payload) -> tuple[int, Any]:
    """Return the kind and the id of an envelope whose content is bad; a notification's if these cannot be read."""
    # All known senders write the id first. There may not be enough memory to read the rest.
    found = _find_id(str(bytes(payload[:HEAD_SIZE]), "latin-1"))
    if found is None or len(found[3]) != int(found[2]):
        return NOTIFICATION, None
    return REQUEST if _ENVELOPES[found[1]][0] is RequestEnvelope else RESPONSE, unraw(found[3])
