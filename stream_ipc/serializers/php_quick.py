"""The quick way to read PHP's ``serialize()`` format, for the messages that are mostly sent.

Their fields are short texts and numbers in the order of declaration, so one compiled pattern for each class reads them.
Whatever else a payload is, it is left to ``php_reading.py``, also if it is wrong.
"""

from __future__ import annotations

import re

from .. import registry
from ..errors import SerializationError
from ..messages import REQUEST, RESPONSE, Message, RequestEnvelope
from .php_classes import CONVERSIONS, classes
from .php_form import decoded, unraw
from .text_format import ENVELOPES, compile_builder, wire_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..registry import TypeInfo

    # (text, where the first property begins, where the object ends) -> the object, or None: read it the other way
    Quick = Callable[[str, int, int], Any]

__all__ = ["find_id", "read_quickly"]

# What the quick way takes for a value: a text (its length, and itself), an int, a float, a bool. Longer texts are left
# to the other way, which does not look at each character.
_VALUE = (
    r'(?:s:([0-9]{1,3}):"([^"]{0,200})"|i:(-?[0-9]{1,18})|d:(-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:E[+-][0-9]{1,3})?)'
    r"|b:([01])|N);"
)
_MOST_FIELDS = 20
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

_ENVELOPE_ID = re.compile(f"({'|'.join(map(re.escape, _ENVELOPES))})" + r'([0-9]{1,3}):"').match


class _Ways(dict[str, "Quick | None"]):
    """Maps what stands before a message's first property to the quick way to read it, or to None."""

    def __missing__(self, head: str) -> Quick | None:
        found = _HEAD.fullmatch(head)
        if found is None:
            return None
        name = found[2]
        try:
            cls = classes[name]
        except SerializationError:
            return None
        if head != f'O:{len(name)}:"{name}":{len(cls.names)}:{{':
            return None  # and not kept: there is no end of such heads
        info: Any = cls.info
        is_message = issubclass(info.cls, Message) and info.cls not in ENVELOPES
        made = self[head] = _way_of(info, cls.names) if is_message and 0 < len(cls.names) <= _MOST_FIELDS else None
        return made


_ways = _Ways()
registry.clear_on_change(_ways)


def _way_of(info: TypeInfo, names: list[str]) -> Quick:
    pattern = "".join([re.escape(f's:{len(name)}:"{name}";') + _VALUE for name in names])
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
    return compile_builder(lines, info, CONVERSIONS, {"fullmatch": fullmatch, "decoded": decoded})


def read_quickly(text: str) -> Any:
    """Return the message or envelope of a payload, one character per byte, or None: it is to be read the other way."""
    found = _ENVELOPE(text)
    if found is None:
        start = text.find("{", 0, _LONGEST_HEAD) + 1
        quick = _ways[text[:start]]
        return None if quick is None else quick(text, start, len(text))
    begin, length, identity, before, head = found.group(1, 2, 3, 4, 5)
    cls, expected = _ENVELOPES[begin]
    quick = _ways[head]
    if quick is None or len(identity) != int(length) or not identity.isascii() or before != expected or text[-1] != "}":
        return None
    message = quick(text, found.end(), len(text) - 1)
    return None if message is None else cls(identity, message)


def find_id(head: str) -> tuple[int, str] | None:
    """Return the kind and the id of an envelope of which the beginning is at hand, if a known sender has written it."""
    found = _ENVELOPE_ID(head)
    if found is not None:
        end = found.end() + int(found[2])
        if head[end : end + 2] == '";':
            kind = REQUEST if _ENVELOPES[found[1]][0] is RequestEnvelope else RESPONSE
            return kind, unraw(head[found.end() : end])
    return None
