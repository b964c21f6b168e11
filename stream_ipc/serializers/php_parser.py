"""PHP's ``serialize()`` format, taken apart.

Knows that format. Must not know messages or the registry: whoever calls says what becomes of objects and enums.

One loop with its own stack reads everything: hostile input cannot make it recurse, look back, or reserve what it only
announces. What holds only short texts and numbers, as most objects and many lists do, it does not take apart: one pattern
reads that.
"""

from __future__ import annotations

import re

from ..errors import SerializationError
from .text_writing import INT_MAX, INT_MIN, MAX_DEPTH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, NoReturn

    Build = Callable[[dict[Any, Any]], Any]
    # (text, where the first property begins, where the object ends) -> the object, or None: read it the other way
    Simple = Callable[[str, int, int], Any]
    # By the raw name of a class: what builds an object of its properties by raw name; how many it should have; what reads
    # one that is simple, or None.
    Classes = Mapping[str, tuple[Build, int, Simple | None]]

__all__ = ["bare", "decoded", "key_of", "parse", "raw", "unraw"]

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
_TOKEN = re.compile(_VALUE).match
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
    if text[:1] <= "9" and _CANONICAL.match(text) and INT_MIN <= int(text) <= INT_MAX:
        return int(text)
    return text


def bare(key: str) -> str:
    """Return the name of a property without what says who may see it."""
    return key[key.find("\0", 1) + 1 :] if key[:1] == "\0" else key


# -- lists of ints, or of ASCII texts

_is_ints = re.compile(r"(?:i:[0-9]{1,9};i:-?[0-9]{1,18};)*\}").fullmatch
_is_texts = re.compile(r'(?:i:[0-9]{1,9};s:[0-9]{1,9}:"[^"]*";)*\}').fullmatch
_numbers = re.compile(r"-?[0-9]+").findall
_texts = re.compile(r'i:([0-9]+);s:([0-9]+):"([^"]*)";').findall
_FEW = 8  # items of a list for which the loop is as quick


def _simple_list(text: str, start: int, end: int) -> list[Any] | None:
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


# -- everything

_OPEN = object()  # stands for a container that is not complete
_PART = object()  # stands for a value in what was read by a pattern
_NO_OBJECTS = (str, int, float, bool, type(None), list)
# What a field may make a copy of, each time that it is referred to, because of the field's annotation. So how much of it
# may come by reference, in items and characters, is no more than the payload's length, or this for short ones.
_SIZED = (str, bytes, list)
_REPEATED = 256 * 1024
_SHORTEST_ITEM = len("i:0;N;")


def parse(text: str, classes: Classes, member: Callable[[str, str], Any]) -> Any:
    """Read the one value of a payload, one character per byte.

    ``member`` returns the member of an enum; both by raw names. It and ``classes`` may raise SerializationError.
    """
    has_references = "R:" in text  # which may be to parts of what a pattern reads
    repeated = 0  # items and characters that came by reference
    numbered: list[Any] = []  # the values that may be referred to, which is all but references themselves
    # The container that is being read: what builds it, or None for an array; its items so far; how many are still to come;
    # its number; the key of the next. The outermost is the payload, which has one value without a key.
    build: Build | None = None
    items: dict[Any, Any] = {}
    left = 1
    number = 0
    key: Any = None
    stack: list[tuple[Build | None, dict[Any, Any], int, int, Any]] = []  # the containers around it
    position = 0
    found = _TOKEN(text)
    while True:
        # A value begins here, behind its key.
        if found is None:
            _bad(position, "an unknown kind of value")
        kind = found.lastgroup
        position = found.end()
        value: Any
        if kind == "text":
            end = position + int(found["text"])
            if text[end : end + 2] != '";':
                _bad(position, "a string whose length is not what it says")
            value = text[position:end]
            if not value.isascii():
                value = decoded(value)
            position = end + 2
            numbered.append(value)
        elif kind == "int":
            value = int(found["int"])
            if not INT_MIN <= value <= INT_MAX:
                _bad(position, "an int beyond 64 bits")
            numbered.append(value)
        elif kind == "array" or kind == "object":
            builder, count, simple = _container(text, found, len(stack), classes)
            value, end = None, position
            if simple is not None and not has_references:
                end = text.find("}", position) + 1
                value = simple(text, position, end)
            if value is None or (builder is None and len(value) != count):
                stack.append((build, items, left, number, key))
                build, items, left, number = builder, {}, count, len(numbered)
                value = _OPEN
                numbered.append(value)
            else:
                position = end
                numbered += [value, *[_PART] * count]
        elif kind == "again" or kind == "reference":
            value = _referred(found, numbered)
            if type(value) in _SIZED:
                repeated += len(value)
            if repeated > max(len(text), _REPEATED):
                _bad(position, "references that repeat more than the payload holds")
            if kind == "again":
                numbered.append(value)
        else:
            value = _scalar(found, member)
            numbered.append(value)

        # The value is complete, or a container has begun.
        if value is not _OPEN:
            items[key] = value
            left -= 1
        while not left:
            if not stack:
                if position != len(text):
                    _bad(position, "something after the value")
                return value
            if text[position : position + 1] != "}":
                _bad(position, "an array or object that goes on after its last item")
            position += 1
            value = _array(items) if build is None else build(items)
            numbered[number] = value
            build, items, left, number, key = stack.pop()
            items[key] = value
            left -= 1

        # A key is next, and the value behind it.
        found = _ITEM(text, position)
        if found is None or (found[1] is None and len(found[3]) != int(found[2])):
            key, position = _unusual_key(text, position)
            found = _TOKEN(text, position)
        else:
            key = found[3] if found[1] is None else int(found[1])
        if type(key) is int:
            key = key if build is None else str(key)
        elif build is None:
            key = key_of(key) if key.isascii() else decoded(key)


def _bad(position: int, what: str) -> NoReturn:
    raise SerializationError(f"payload is not in PHP's format: {what} at byte {position}")


def _container(
    text: str, found: re.Match[str], depth: int, classes: Classes
) -> tuple[Build | None, int, Simple | None]:
    """Return what builds a container, None for an array; how many items it has; what reads it if it is simple."""
    array, name, position = found["array"], found["name"], found.end()
    count = int(found["object"] if array is None else array)
    if count * _SHORTEST_ITEM >= len(text) - position:
        _bad(position, "an array or object that announces more items than fit")
    if depth >= MAX_DEPTH:
        _bad(position, f"something nested deeper than {MAX_DEPTH} levels")
    if array is not None:
        return None, count, _simple_list if count > _FEW else None
    if len(name) != int(found["size"]):
        _bad(position, "a class name of another length than it says")
    build, expected, simple = classes[name]
    return build, count, simple if count == expected else None


def _array(items: dict[Any, Any]) -> Any:
    return list(items.values()) if not items or (0 in items and list(items) == list(range(len(items)))) else items


def _referred(found: re.Match[str], numbered: list[Any]) -> Any:
    """Return the value that is referred to."""
    index, position = int(found[found.lastgroup or ""]) - 1, found.end()
    if not 0 <= index < len(numbered):
        _bad(position, "a reference to a value that is not there")
    value = numbered[index]
    if value is _OPEN:
        raise SerializationError(
            f"the reference before byte {position} is to what it is part of, which cannot be built by its constructor"
        )
    if found.lastgroup == "again" and (value is _PART or type(value) in _NO_OBJECTS):
        _bad(position, "a reference (r:) to something that is no object")
    return value


def _scalar(found: re.Match[str], member: Callable[[str, str], Any]) -> Any:
    """Return a bool, a float, null, or the member of an enum."""
    if found.lastgroup == "bool":
        return found["bool"] == "1"
    if found.lastgroup == "float":
        return float(found["float"])
    if found.lastgroup == "null":
        return None
    if len(f"{found['enum']}:{found['case']}") != int(found["case_size"]):
        _bad(found.end(), "an enum case of another length than it says")
    return member(found["enum"], found["case"])


def _unusual_key(text: str, position: int) -> tuple[str | int, int]:
    """Return a key that ``_ITEM`` does not take, and where it ends."""
    found = _TOKEN(text, position)
    if found is not None and found.lastgroup == "text":
        end = found.end() + int(found["text"])
        if text[end : end + 2] == '";':
            return text[found.end() : end], end + 2
    elif found is not None and found.lastgroup == "int" and INT_MIN <= int(found["int"]) <= INT_MAX:
        return int(found["int"]), found.end()
    _bad(position, "an invalid key")
