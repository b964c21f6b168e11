"""What PHP's ``serialize()`` format looks like: what stands before its values, its texts and its keys.

PHP's strings are bytes and their lengths count bytes, so both directions work on texts of one character per byte
(Latin-1, called raw here), which cost nothing to make and to turn back, and in which an ASCII text stands as it is.

Must not know messages or the registry.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "ARRAY", "BOOL", "ENUM", "ENUM_CLASS", "FLOAT", "INT", "ITEM", "ITEM_INT", "ITEM_LENGTH", "ITEM_TEXT", "NULL",
    "OBJECT", "OBJECT_CLASS", "REF", "STRING", "TOKEN", "bare", "decoded", "key_of", "raw", "unraw",
]  # fmt: skip

# What stands at the beginning of a value. Lengths have at most ten digits and ints twenty, so that no number is long
# enough to be slow.
_VALUE = (
    r'(?:s:([0-9]{1,10}):"'  # 4
    r"|i:([+-]?[0-9]{1,20});"  # 5
    r"|a:([0-9]{1,10}):\{"  # 6
    r'|O:([0-9]{1,10}):"([^"]{1,500})":([0-9]{1,10}):\{'  # 7 to 9
    r"|b:([01]);"  # 10
    r"|N(;)"  # 11
    r"|d:(-?INF|NAN|[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?);"  # 12
    r"|(r):([0-9]{1,10});"  # 13, 14: the same object again
    r"|(R):([0-9]{1,10});"  # 15, 16
    r'|E:([0-9]{1,10}):"([^":]{1,500}):([^":]{1,500})";)'  # 17 to 19
)
STRING, INT, ARRAY, OBJECT, BOOL, NULL, FLOAT, REF, ENUM = 4, 5, 6, 9, 10, 11, 12, 16, 19  # the last of their groups
OBJECT_CLASS, ENUM_CLASS = 8, 18  # names; before each stands how long it is

# A usual key with the value behind it, and a value alone, in groups of the same numbers. The length of a key is still to
# be compared with its text.
_KEY = r'(?:i:(-?[0-9]{1,18})|s:([0-9]{1,3}):"([^"]{0,200})");'
ITEM = re.compile(_KEY + _VALUE).match
TOKEN = re.compile("(?:(?!)()()())?" + _VALUE).match
ITEM_INT, ITEM_LENGTH, ITEM_TEXT = 1, 2, 3

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
