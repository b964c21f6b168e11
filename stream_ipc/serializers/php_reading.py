"""Reading PHP's ``serialize()`` format, and what a property is called in it.

Knows messages, the registry and that format. Must not build anything but what the registry has, and PHP's own value
classes.

There is a quick way for the messages that are mostly sent, whose fields are short texts and numbers, with one compiled
pattern per class, and one loop with its own stack for everything: hostile input cannot make it recurse, look back, or
reserve what it only announces.
"""

from __future__ import annotations

import re

from .. import registry
from ..errors import SerializationError
from ..interruptions import pass_on
from ..messages import NOTIFICATION, REQUEST, RESPONSE, Message, RequestEnvelope
from .php_form import ARRAY, BOOL, ENUM, FLOAT, INT, NULL, OBJECT, REF, STRING, TOKEN, bare, decoded, key_of, raw, unraw
from .text_format import (
    ENVELOPES,
    HEAD_SIZE,
    INT_MAX,
    INT_MIN,
    MAX_DEPTH,
    builder,
    compile_builder,
    find_class,
    kind_of,
    member_of,
    wire_name,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from ..protocols import Payload
    from ..registry import FieldInfo, TypeInfo
    from .text_format import Builder

    # (text, where the first property begins, where the object ends) -> the object, or None: read it the other way
    Quick = Callable[[str, int, int], Any]

__all__ = ["mangled", "read", "salvage"]


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
    return f"\0{declaring or wire_name(_declaring(field, info), old)}\0{field.wire_name}"


def _declaring(field: FieldInfo, info: TypeInfo) -> TypeInfo:
    # PHP's private is private of the class that declares it, also in a child's instance. A dataclass that inherits a
    # field has the very same object for it.
    own = info.cls.__dataclass_fields__[field.name]  # type: ignore[attr-defined]
    for cls in reversed(info.cls.__mro__):
        if cls.__dict__.get("__dataclass_fields__", {}).get(field.name) is own:
            try:
                return registry.type_info(cls)
            except SerializationError:
                break
    return info


_OPEN = object()  # stands for a container that is not complete
_SHORTEST_ITEM = len("i:0;N;")


class _Class:
    """How the objects of one class are built."""

    __slots__ = ("build", "info", "keys", "names")

    def __init__(self, info: TypeInfo | None, build: Builder, names: list[str]) -> None:
        self.info = info
        self.build = build
        self.names = names
        self.keys = [f's:{len(name)}:"{name}";' for name in names]  # as they are expected, one after the other


_NOTHING = _Class(None, lambda data: None, [])  # as which any class is read when nothing is to be built


class _Classes(dict[str, _Class]):
    """Maps each raw class name to how its objects are built, made when the name is first met."""

    def __missing__(self, name: str) -> _Class:
        made = self[name] = self._make(unraw(name))
        return made

    @staticmethod
    def _make(name: str) -> _Class:
        try:
            info = find_class(name, _ADVICE)
        except SerializationError:
            if name not in _VALUES:
                raise
            from . import php_values  # datetime takes time to import, and most programs never read a date here

            info = php_values.CLASSES[name]
        if info.is_enum:
            raise SerializationError(f"{info.wire_name} is an enum, but came as an object")
        if not info.fields:
            return _Class(info, lambda data: info.build({unraw(bare(key)): v for key, v in data.items()}), [])
        keys = [raw(mangled(f, info, old=False)) for f in info.fields]
        names = [raw(f.wire_name) for f in info.fields]

        def rename(data: dict[str, Any]) -> dict[str, Any]:
            # Not each came under its own key: whoever may see a property, its name counts.
            others = {bare(key): v for key, v in data.items() if key not in keys}
            return {**{key: others[name] for key, name in zip(keys, names, strict=True) if name in others}, **data}

        return _Class(info, builder(info, keys, _CONVERSIONS, rename), keys)


_VALUES = ("stdClass", "DateTime", "DateTimeImmutable")
_ADVICE = "define a class with this wire_name on this side, or register one with register_type(cls, wire_name)"

# PHP tells neither text from bytes nor a list from a map; the annotation does.
_CONVERSIONS = {
    "float": "if type(v) is int: v = float(v)",
    "str": "if type(v) is bytes: v = v.decode('utf-8', 'surrogateescape')",
    "bytes": "if type(v) is str: v = v.encode()",
    "bytearray": "if type(v) in (str, bytes): v = bytearray(v.encode() if type(v) is str else v)",
    "dict": "if type(v) is list: v = dict(enumerate(v))",
}

_classes = _Classes()
registry.clear_on_change(_classes)


# What the quick way takes for a value: a text (its length, and itself), an int, a float, a bool. Longer texts are left
# to the other way, which does not look at each character.
_QUICK_VALUE = (
    r'(?:s:([0-9]{1,3}):"([^"]{0,200})"|i:(-?[0-9]{1,18})|d:(-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:E[+-][0-9]{1,3})?)'
    r"|b:([01])|N);"
)
_QUICK_FIELDS = 20
_HEAD = re.compile(r'O:([0-9]{1,3}):"([^"]{1,500})":[0-9]{1,3}:\{')
_LONGEST_HEAD = 520
# What stands before an envelope's id -> its class, and what stands before its content.
_ENVELOPES = {
    f'O:{len(name)}:"{name}":2:{{s:2:"id";s:': (cls, f's:{len(content)}:"{content}";')
    for cls, content in zip(ENVELOPES, ("request", "response"), strict=True)
    for name in (wire_name(registry.type_info(cls), old) for old in (False, True))
}
_ENVELOPE = re.compile(
    f"({'|'.join(map(re.escape, _ENVELOPES))})"
    r'([0-9]{1,3}):"([^"]{0,128})";(s:7:"request";|s:8:"response";)(' + _HEAD.pattern + ")"
).match

_ENVELOPES_ID = re.compile(f"({'|'.join(map(re.escape, _ENVELOPES))})" + r'([0-9]{1,3}):"').match


class _QuickWays(dict[str, "Quick | None"]):
    """Maps what stands before a message's first property to the quick way to read it, or to None."""

    def __missing__(self, head: str) -> Quick | None:
        found = _HEAD.fullmatch(head)
        if found is None:
            return None
        name = found[2]
        try:
            cls = _classes[name]
        except SerializationError:
            return None
        if head != f'O:{len(name)}:"{name}":{len(cls.names)}:{{':
            return None  # and not kept: there is no end of such heads
        info: Any = cls.info
        is_message = issubclass(info.cls, Message) and info.cls not in ENVELOPES
        made = self[head] = _quick_message(info, cls.keys) if is_message and 0 < len(cls.names) <= _QUICK_FIELDS else None
        return made


_quick_ways = _QuickWays()
registry.clear_on_change(_quick_ways)


def _quick_message(info: TypeInfo, keys: list[str]) -> Quick:
    pattern = "".join([re.escape(key) + _QUICK_VALUE for key in keys])
    groups = ", ".join(f"n{i}, t{i}, i{i}, d{i}, b{i}" for i in range(len(keys)))
    lines = [
        "def made(text, start, end):",
        "    found = fullmatch(text, start, end)",
        "    if found is None: return None",
        f"    {groups} = found.groups()",
    ]
    for i in range(len(keys)):
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


def _bad(position: int, what: str) -> NoReturn:
    raise SerializationError(f"payload is not in PHP's format: {what} at byte {position}")


def _parse(text: str, find: Callable[[str], _Class], root: list[Any]) -> Any:
    """Read the one value of a payload.

    Args:
        text: The payload, one character per byte.
        find: Says how the objects of a class are built.
        root: Gets the class name and the properties (so far) of the outermost object, for when this fails.
    """
    numbered: list[Any] = []  # the values that may be referred to, which is all but references themselves
    heights: dict[int, int] = {}  # number of a container that is complete -> how many levels it has
    copies = [len(text)]  # how many items of arrays may still be copied: as many as the payload has bytes
    objects: set[int] = set()  # ids of the dicts that are objects in PHP
    stack: list[tuple[Any, Any, bool, int, Any, int, int]] = []
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
    is_key = False
    while True:
        # A value or a key begins here.
        found = TOKEN(text, position)
        if found is None:
            _bad(position, "no key" if is_key else "there is no value that is known")
        kind: Any = found.lastindex
        end = found.end()
        levels = 0
        value: Any
        if kind == STRING:
            position = end + int(found[1])
            if text[position : position + 2] != '";':
                _bad(end, "a string of another length than it says")
            value = text[end:position]
            position += 2
            if is_key:
                is_key = False
                key = value if cls is not None else key_of(value) if value.isascii() else decoded(value)
                continue
            if not value.isascii():
                value = decoded(value)
        elif kind == INT:
            position = end
            value = int(found[2])
            if not INT_MIN <= value <= INT_MAX:
                _bad(found.start(), f"{'a key' if is_key else 'an int'} beyond 64 bits")
            if is_key:
                is_key = False
                key = value if cls is None else str(value)
                continue
        elif is_key:
            _bad(position, "a key that is neither a string nor an int")
        elif kind in (ARRAY, OBJECT):
            count = int(found[kind])
            if count * _SHORTEST_ITEM >= size - end:
                _bad(end, "an array or object that says it has more than there is")
            if len(stack) >= MAX_DEPTH:
                _bad(end, f"something nested deeper than {MAX_DEPTH} levels")
            stack.append((cls, items, is_list, left, key, number, height))
            if kind == ARRAY:
                cls, items, is_list = None, [], True
            else:
                if len(found[5]) != int(found[4]):
                    _bad(position, "a class name of another length than it says")
                cls, items, is_list = find(found[5]), {}, False
                if len(stack) == 1:
                    root[:] = found[5], items
            left = count
            height = 0
            number = len(numbered)
            value = _OPEN
            position = end
        else:
            position = end
            if kind == NULL:
                value = None
            elif kind == BOOL:
                value = found[7] == "1"
            elif kind == FLOAT:
                value = float(found[9])
            elif kind == ENUM:
                if len(found[15]) + 1 + len(found[16]) != int(found[14]):
                    _bad(found.start(), "an enum case of another length than it says")
                value = member_of(find_class(unraw(found[15]), _ADVICE), unraw(found[16]))
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
                if type(value) in (list, dict) and id(value) not in objects:
                    value = _copy(value, copies, objects)
        if kind != REF:
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
                if type(value) is dict:
                    objects.add(id(value))
            elif not is_list and 0 in items and list(items) == list(range(len(items))):
                value = list(items.values())  # some key came twice
            else:
                value = items
            numbered[number] = value
            levels = heights[number] = height + 1
            cls, items, is_list, left, key, number, height = stack.pop()

        # A key is next. An expected one is passed over at once.
        if is_list:
            expected = f"i:{len(items)};"
            if text.startswith(expected, position):
                position += len(expected)
                continue
            items = dict(enumerate(items))
            is_list = False
        elif cls is not None:
            # Properties mostly come in the order of declaration.
            index = len(items)
            if index < len(cls.keys) and text.startswith(cls.keys[index], position):
                key = cls.names[index]
                position += len(cls.keys[index])
                continue
        is_key = True


def _copy(value: Any, left: list[int], objects: set[int]) -> Any:
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
            if type(v) in (list, dict) and id(v) not in objects:
                items[k] = v.copy()
                todo.append(items[k])
    return made


def read(payload: Payload) -> Any:
    """Return the value of a payload, or raise anything."""
    text = str(payload, "latin-1")
    message = None
    found = _ENVELOPE(text)
    if found is None:
        start = text.find("{", 0, _LONGEST_HEAD) + 1
        quick = _quick_ways[text[:start]]
        if quick is not None:
            message = quick(text, start, len(text))
    else:
        begin, length, identity, before, head = found.group(1, 2, 3, 4, 5)
        cls, expected = _ENVELOPES[begin]
        quick = _quick_ways[head]
        fits = len(identity) == int(length) and identity.isascii() and before == expected and text[-1] == "}"
        if quick is not None and fits:
            message = quick(text, found.end(), len(text) - 1)
            if message is not None:
                return cls(identity, message)
    return _parse(text, _classes.__getitem__, []) if message is None else message


def salvage(payload: Payload) -> tuple[int, Any]:
    """Return the kind and the id of an envelope whose content is bad; a notification's if these cannot be read."""
    root: list[Any] = []
    try:
        # All known senders write the id first. There may not be enough memory to read the rest.
        head = str(bytes(payload[:HEAD_SIZE]), "latin-1")
        found = _ENVELOPES_ID(head)
        if found is not None:
            end = found.end() + int(found[2])
            if head[end : end + 2] == '";':
                kind = REQUEST if _ENVELOPES[found[1]][0] is RequestEnvelope else RESPONSE
                return kind, unraw(head[found.end() : end])
        _parse(str(payload, "latin-1"), lambda name: _NOTHING, root)
    except Exception as exc:  # there is one error to report already
        pass_on(exc)
    if not root:
        return NOTIFICATION, None
    identity = root[1].get("id")
    return kind_of(unraw(root[0])), identity.decode("utf-8", "surrogateescape") if type(identity) is bytes else identity
