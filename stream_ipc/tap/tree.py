"""A value that came off the wire, as a tree of plain values and ``Node``, and that tree as one short line.

Knows nothing of the formats. The time and the length of a line are bounded by what is shown, not by what is in the tree.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["BROKEN", "NAME", "SHOWN", "VIEW", "Node", "Part", "Unreadable", "Word", "escaped", "last_part", "show"]

VIEW = 160  # characters of the fields
SHOWN = 200  # items of a container; a view of that length never shows more
_TEXT = 60  # characters of one text in them
NAME = 200  # characters of a class name or an id
_BYTES = 24  # bytes of one
_DEPTH = 6  # levels of them

# Ends a text that breaks off, so that it is not taken for a whole one. A character for private use.
BROKEN = "\ue000"

_BRACKETS = {"list": ("[", "]"), "tuple": ("(", ")"), "set": ("{", "}"), "dict": ("{", "}"), "object": ("(", ")")}


class Node:
    """A list, tuple, set, dict or object.

    Attributes:
        kind: ``"list"``, ``"tuple"``, ``"set"``, ``"dict"`` or ``"object"``.
        items: The content; of a dict or object, keys and values in turn. An object's key may be None.
        name: The class of an object.
        cut: Whether there is more than ``items`` has.
    """

    __slots__ = ("cut", "items", "kind", "name")

    def __init__(self, kind: str, items: list[Any], name: str = "", cut: bool = False) -> None:
        self.kind: str = kind
        self.items: list[Any] = items
        self.name: str = name
        self.cut: bool = cut

    def get(self, key: str) -> Any:
        """Return the value of a field, or None."""
        for index in range(0, len(self.items) - 1, 2):
            if type(self.items[index]) is str and self.items[index] == key:
                return self.items[index + 1]
        return None


class Part:
    """A text, or bytes, of which only the beginning is at hand.

    Attributes:
        start: The beginning.
        size: The size of the whole.
    """

    __slots__ = ("size", "start")

    def __init__(self, start: Any, size: int) -> None:
        self.start: Any = start
        self.size: int = size


class Word(str):
    """A text that is shown without quotes: the name of an enum's member, a reference."""

    __slots__ = ()


class Unreadable(Exception):
    """The payload is not in this format, or is no message."""


def escaped(text: str) -> str:
    """Return a text with control characters escaped: they could clear a screen or begin a line."""
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text])


def last_part(name: str) -> str:
    """Return the last part of a class's name, in Python or in PHP."""
    return re.split(r"[\\.]", name)[-1]


def show(value: Any, limit: int = VIEW) -> str:
    """Return a value as text of about so many characters."""
    return _text(value, [limit], 0)


def _text(value: Any, left: list[int], depth: int) -> str:
    # left: the characters that may still be written. A shared part is written again and again, so this bounds the time.
    if type(value) is list:
        value = Node("list", value)
    if not isinstance(value, Node):
        text = _leaf(value)
        left[0] -= len(text)
        return text
    first, last = _BRACKETS[value.kind]
    # The message's class in full; a class inside it would fill the line.
    name = (last_part(value.name) if depth else value.name)[:NAME]
    left[0] -= len(name) + 2
    if depth >= _DEPTH:
        return f"{name}{first}...{last}"
    keyed = value.kind in ("dict", "object")
    step = 2 if keyed else 1
    parts: list[str] = []
    cut = value.cut
    for index in range(0, len(value.items) - step + 1, step):
        if left[0] <= 0:
            cut = True
            break
        left[0] -= 2
        key = _key(value, value.items[index], left, depth) if keyed else ""
        parts.append(key + _text(value.items[index + step - 1], left, depth + 1))
    if cut:
        parts.append("..." if keyed or value.cut else f"... {len(value.items)} items")
    end = "," if value.kind == "tuple" and len(parts) == 1 and not cut else ""
    return f"{name}{first}{', '.join(parts)}{end}{last}"


def _key(node: Node, key: Any, left: list[int], depth: int) -> str:
    if node.kind == "dict":
        return f"{_text(key, left, depth + 1)}: "
    if key is None:
        return ""
    if isinstance(key, str):
        left[0] -= len(key[:_TEXT])
        return f"{key[:_TEXT]}="
    return f"{_text(key, left, depth + 1)}="


def _leaf(value: Any) -> str:
    if isinstance(value, Word):
        return value[:NAME]
    if isinstance(value, Part):
        return _shortened(value.start, value.size)
    if isinstance(value, str) and value.endswith(BROKEN):
        return f"{repr(value[:-1][:_TEXT])[:-1]}...'"
    if isinstance(value, (str, bytes)) and len(value) > (_TEXT if isinstance(value, str) else _BYTES):
        return _shortened(value, len(value))
    if type(value) is int and value.bit_length() > 200:
        return f"<int of {value.bit_length()} bits>"  # its digits may take long to compute
    return repr(value)


def _shortened(start: Any, size: int) -> str:
    binary = isinstance(start, bytes)
    text = repr(start[: _BYTES if binary else _TEXT])
    return f"{text[:-1]}...{text[-1]} ({size} {'bytes' if binary else 'characters'})"
