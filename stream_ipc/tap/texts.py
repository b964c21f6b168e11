"""What a payload in JSON or in PHP's ``serialize()`` format says, also if only its beginning is at hand.

Knows the two formats. A text that breaks off is completed, or read as far as it goes.
"""

from __future__ import annotations

import json
import re
import string
from typing import Any, NoReturn

from ..serializers.php_reading import TOKEN, bare, decoded
from .tree import BROKEN, Node, Part, Unreadable, Word, last_part

__all__ = ["read_json", "read_php"]


def read_json(head: bytes, partial: bool) -> Any:
    """Return what a payload in JSON says, as a tree.

    Args:
        head: The payload, or the beginning of it.
        partial: Whether it is only the beginning.

    Raises:
        ValueError: It is no JSON.
    """
    text = head.decode("utf-8", "replace" if partial else "strict")
    if partial:
        text = _completed(text)
    root = json.loads(text, object_pairs_hook=_json_object, parse_int=_json_int)
    if partial and isinstance(root, Node):
        root.cut = True
    return root


def _json_object(pairs: list[tuple[str, Any]]) -> Node:
    items: list[Any] = []
    name = None
    for key, value in pairs:
        if key == "__class" and type(value) is str:
            name = value.replace(BROKEN, "...")
        else:
            items += (key, value)
    return Node("dict", items) if name is None else Node("object", items, name)


def _json_int(text: str) -> Any:
    return int(text) if len(text) < 40 else Word(f"<int of {len(text)} digits>")


# A text matches without its end too, and without an escape that breaks off. So the rest is not searched again and again.
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*("?)|[\[\]{}]', re.S)
_WORD = string.ascii_letters + string.digits + "+-."


def _completed(text: str) -> str:
    """Return JSON that breaks off with an end put to what is open."""
    brackets: list[str] = []
    start = end = 0  # the last text that is whole
    for found in _JSON_TOKEN.finditer(text):
        token = found[0]
        if token in "[{":
            brackets.append("]" if token == "[" else "}")
        elif token in "]}":
            if brackets:
                brackets.pop()
        elif found[1]:
            start, end = found.span()
        else:
            before = text[: found.start()].rstrip()
            is_value = before.endswith((":", "[")) or (before.endswith(",") and brackets[-1:] == ["]"])
            text = f'{before}{token}{BROKEN}"' if is_value else before
            break
    else:
        text = text.rstrip(_WORD)  # a number, or a word, that may not be whole
    text = text.rstrip()
    if text.endswith(":"):
        text += "null"
    elif brackets[-1:] == ["}"] and end == len(text) and text[:start].rstrip().endswith(("{", ",")):
        text += ":null"
    return text.rstrip(",") + "".join(reversed(brackets))


class _Cut(Exception):
    """The payload goes on, but what was looked at has ended; the value that has begun, if there is one."""


def read_php(head: bytes, partial: bool) -> Any:
    """Return what a payload in PHP's format, or the beginning of one, says, as a tree, or raise Unreadable."""
    text = head.decode("latin-1")
    open_: list[list[Any]] = []  # [container, how many keys and values are still to come]
    at = 0
    root: Any = None
    try:
        while True:
            value, at, count = _php_value(text, at, partial)
            if not open_:
                root = value
            else:
                open_[-1][0].items.append(value)
                open_[-1][1] -= 1
            if isinstance(value, Node):
                open_.append([value, count])
            while open_ and not open_[-1][1]:
                if text[at : at + 1] != "}":
                    _php_end(text, at, partial)
                _php_close(open_.pop()[0])
                at += 1
            if not open_:
                return root
    except _Cut as exc:
        if root is None:
            raise Unreadable("nothing whole is in what was looked at") from None
        for container, _ in open_:
            container.cut = True
        last = open_[-1][0].items
        if len(last) % 2:
            last[len(last) - (not exc.args) :] = exc.args  # a value that has begun, or else no key either
        for container, _ in reversed(open_):
            _php_close(container)
        return root


def _php_end(text: str, at: int, partial: bool) -> NoReturn:
    if partial and at >= len(text) - 600:  # as long as what stands before a value may be
        raise _Cut
    raise Unreadable(f"at byte {at}, something that is not PHP's format")


def _php_value(text: str, at: int, partial: bool) -> tuple[Any, int, int]:
    """Return a value, where it ends, and how many keys and values are to come in it."""
    found = TOKEN(text, at)
    if found is None:
        _php_end(text, at, partial)
    end = found.end()
    kind = found.lastgroup or ""
    content = found[kind]
    if kind == "text":
        stop = end + int(content)
        value = decoded(text[end:stop])
        if stop + 2 > len(text):
            if partial:
                raise _Cut(Part(value, int(content)))
            _php_end(text, at, False)
        return value, stop + 2, 0
    if kind == "array":
        return Node("dict", []), end, 2 * int(content)
    if kind == "object":
        return Node("object", [], str(decoded(found["name"]))), end, 2 * int(content)
    if kind == "int":
        return int(content), end, 0
    if kind == "bool":
        return content == "1", end, 0
    if kind == "float":
        return float(content), end, 0
    if kind == "case":
        return Word(f"{last_part(found['enum'])}::{content}"), end, 0
    return None if kind == "null" else Word(f"<value {content} again>"), end, 0


def _php_close(container: Node) -> None:
    items = container.items
    if container.kind == "object":
        items[::2] = [bare(key) if type(key) is str else key for key in items[::2]]
    elif items[::2] == list(range(len(items[::2]))):
        container.kind = "list"
        container.items = items[1::2]
