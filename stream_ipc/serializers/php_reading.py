"""Reading PHP's ``serialize()`` format.

Knows messages, the registry and that format. Must not build anything but what the registry has, and PHP's own value
classes.

One loop with its own stack reads everything: hostile input cannot make it recurse, look back, or reserve what it only
announces. For most messages there is a quicker way; see ``php_quick.py``.
"""

from __future__ import annotations

from ..errors import SerializationError
from ..interruptions import pass_on
from ..messages import NOTIFICATION
from .php_classes import ADVICE, NOTHING, PhpClass, classes
from .php_form import (
    ARRAY,
    BOOL,
    ENUM,
    ENUM_CLASS,
    FLOAT,
    INT,
    ITEM,
    ITEM_INT,
    ITEM_LENGTH,
    ITEM_TEXT,
    NULL,
    OBJECT,
    OBJECT_CLASS,
    REF,
    STRING,
    TOKEN,
    decoded,
    key_of,
    unraw,
)
from .php_quick import find_id, read_quickly
from .text_format import HEAD_SIZE, INT_MAX, INT_MIN, MAX_DEPTH, find_class, kind_of, member_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Callable
    from typing import Any, NoReturn

    from ..protocols import Payload

__all__ = ["parse", "read", "salvage"]

_OPEN = object()  # stands for a container that is not complete
_SHORTEST_ITEM = len("i:0;N;")


def _bad(position: int, what: str) -> NoReturn:
    raise SerializationError(f"payload is not in PHP's format: {what} at byte {position}")


def _start(found: re.Match[str]) -> int:
    """Return where a value begins, behind its key."""
    if found[ITEM_INT] is not None:
        return found.end(ITEM_INT) + len(";")
    return found.start() if found[ITEM_TEXT] is None else found.end(ITEM_TEXT) + len('";')


def _read_key(text: str, position: int) -> tuple[str | int, int]:
    """Return a key that ``ITEM`` does not take, and where it ends."""
    found = TOKEN(text, position)
    if found is None:
        _bad(position, "no key")
    end = found.end()
    if found.lastindex == STRING:
        stop = end + int(found[STRING])
        if text[stop : stop + 2] != '";':
            _bad(end, "a string of another length than it says")
        return text[end:stop], stop + 2
    if found.lastindex != INT:
        _bad(position, "a key that is neither a string nor an int")
    key = int(found[INT])
    if not INT_MIN <= key <= INT_MAX:
        _bad(position, "a key beyond 64 bits")
    return key, end


def parse(text: str, find: Callable[[str], PhpClass], root: list[Any]) -> Any:
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
    found = TOKEN(text, 0)
    while True:
        # A value begins here, behind its key.
        if found is None:
            _bad(position, "there is no value that is known")
        kind: Any = found.lastindex
        end = found.end()
        levels = 0
        value: Any
        if kind == STRING:
            position = end + int(found[STRING])
            if text[position : position + 2] != '";':
                _bad(end, "a string of another length than it says")
            value = text[end:position]
            position += 2
            if not value.isascii():
                value = decoded(value)
        elif kind == INT:
            position = end
            value = int(found[INT])
            if not INT_MIN <= value <= INT_MAX:
                _bad(_start(found), "an int beyond 64 bits")
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
                name = found[OBJECT_CLASS]
                if len(name) != int(found[OBJECT_CLASS - 1]):
                    _bad(_start(found), "a class name of another length than it says")
                cls, items, is_list = find(name), {}, False
                if len(stack) == 1:
                    root[:] = name, items
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
                value = found[BOOL] == "1"
            elif kind == FLOAT:
                value = float(found[FLOAT])
            elif kind == ENUM:
                name, case = found[ENUM_CLASS], found[ENUM]
                if len(name) + 1 + len(case) != int(found[ENUM_CLASS - 1]):
                    _bad(_start(found), "an enum case of another length than it says")
                value = member_of(find_class(unraw(name), ADVICE), unraw(case))
            else:
                index = int(found[kind]) - 1
                if not 0 <= index < len(numbered):
                    _bad(_start(found), "a reference to a value that is not there")
                value = numbered[index]
                if value is _OPEN:
                    raise SerializationError(
                        f"the value at byte {_start(found)} refers to what it is part of, which cannot be built by its"
                        " constructor"
                    )
                levels = heights.get(index, 0)
                if len(stack) + levels > MAX_DEPTH:
                    _bad(_start(found), f"something nested deeper than {MAX_DEPTH} levels")
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

        # A key is next, and the value behind it.
        found = ITEM(text, position)
        key = None
        if found is not None:
            digits = found[ITEM_INT]
            if digits is not None:
                key = int(digits)
            elif len(found[ITEM_TEXT]) == int(found[ITEM_LENGTH]):
                key = found[ITEM_TEXT]
        if key is None:
            key, position = _read_key(text, position)
            found = TOKEN(text, position)
        if is_list:
            if key == len(items):
                continue
            items = dict(enumerate(items))
            is_list = False
        if type(key) is int:
            if cls is not None:
                key = str(key)
        elif cls is None:
            key = key_of(key) if key.isascii() else decoded(key)


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
    message = read_quickly(text)
    return parse(text, classes.__getitem__, []) if message is None else message


def salvage(payload: Payload) -> tuple[int, Any]:
    """Return the kind and the id of an envelope whose content is bad; a notification's if these cannot be read."""
    root: list[Any] = []
    try:
        # All known senders write the id first. There may not be enough memory to read the rest.
        found = find_id(str(bytes(payload[:HEAD_SIZE]), "latin-1"))
        if found is not None:
            return found
        parse(str(payload, "latin-1"), lambda name: NOTHING, root)
    except Exception as exc:  # there is one error to report already
        pass_on(exc)
    if not root:
        return NOTIFICATION, None
    identity = root[1].get("id")
    return kind_of(unraw(root[0])), identity.decode("utf-8", "surrogateescape") if type(identity) is bytes else identity
