"""What a payload says, in any of the three formats, also if only its beginning is at hand.

Knows what a message looks like as a tree. Must not know the registry: nothing is built, imported or called, so it needs
none of the program's modules, and a payload may say whatever it wants.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

from ..messages import NOTIFICATION, REQUEST, RESPONSE
from .pickles import of_shape, read_pickle
from .texts import read_json, read_php
from .tree import NAME, VIEW, Node, Unreadable, escaped, last_part, show

__all__ = ["FORMATS", "Content", "look"]

# By the last part of its name: the kind of an envelope, which is also the field with its message.
_ENVELOPES = {"RequestEnvelope": "request", "ResponseEnvelope": "response"}
_KINDS = {NOTIFICATION: "notification", REQUEST: "request", RESPONSE: "response"}  # in a safe pickle

FORMATS: dict[str, Callable[[bytes, bool], Any]] = {"json": read_json, "php": read_php, "pickle": read_pickle}


class Content(NamedTuple):
    """What a payload says.

    Attributes:
        kind: ``"request"``, ``"response"``, ``"notification"`` or ``"unreadable"``.
        id: The id of the envelope, or an empty text.
        name: The message's class, as it is called on the wire.
        view: The class and the fields, shortened; for what is unreadable, the reason.
    """

    kind: str
    id: str
    name: str
    view: str


def look(head: bytes, size: int, format: str = "") -> Content:
    """Find out what a payload says.

    Args:
        head: The payload, or the beginning of it.
        size: How many bytes the whole payload has.
        format: One of ``FORMATS``; by default whichever the first byte looks like.
    """
    if not format:
        format = "pickle" if head[:1] == b"\x80" else "json" if head.lstrip()[:1] in (b"{", b"[") else "php"
    try:
        # Names and ids are the sender's.
        return Content(*map(escaped, _content(FORMATS[format](head, len(head) < size))))
    except Unreadable as exc:
        text = str(exc)
    except Exception as exc:  # of hostile bytes there are more kinds than one can list
        text = f"{type(exc).__name__}: {exc}"
    text = f"not a message in {format}: {escaped(text[:VIEW])}; begins with {head[:32]!r}"
    return Content("unreadable", "", "", text)


def _content(root: Any) -> Content:
    if not isinstance(root, Node):
        raise Unreadable("a plain value")
    kind, id = "notification", ""
    if root.kind == "tuple" and len(root.items) >= 3:
        # The safe pickle: (kind, id, shape, value, ...).
        number, found, name, *rest = root.items
        if type(number) is not int or number not in _KINDS or type(name) is not str:
            raise Unreadable("a tuple of something else")
        root = of_shape(name, rest, root.cut)
        kind = _KINDS[number]
        id = found[:NAME] if type(found) is str else ""
    elif root.kind != "object":
        raise Unreadable(f"a {root.kind}")
    else:
        key = _ENVELOPES.get(last_part(root.name))
        if key is not None:
            kind = key
            found = root.get("id")
            id = found[:NAME] if type(found) is str else show(found)
            root = root.get(key)
            if not isinstance(root, Node) or root.kind != "object":
                return Content(kind, id, "?", "..." if root is None else show(root))
    name = root.name[:NAME]
    return Content(kind, id, name, show(root, VIEW + len(name)))
