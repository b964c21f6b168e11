"""What a payload says, in any of the three formats.

Knows the three formats. Must not know the registry: an ``_Object`` stands for each object, so the tap needs none of the
program's modules, and imports and calls nothing that a payload names. It takes the time and the memory that decoding a
payload takes its receiver, or more of it. A hostile pickle can exhaust both, as ``PickleMessageSerializer`` says; a
broken one cannot.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from itertools import chain
from typing import Any, Callable, ClassVar, Iterable, NamedTuple

from ..errors import SerializationError
from ..messages import NOTIFICATION, REQUEST, RESPONSE
from ..serializers.php_parser import bare, parse, unraw
from ..serializers.pickle_objects import GLOBAL, SEPARATOR, Handle, build

__all__ = ["Content", "escaped", "look", "show"]

_VIEW = 160  # characters of the fields
_NAME = 200  # characters of a class name or an id
_TEXT = 60  # characters of one text
_BYTES = 24  # bytes of one
_LEVEL = 6  # characters less for what is inside another value

# By the last part of its name: the kind of an envelope, which is also the field with its message.
_ENVELOPES = {"RequestEnvelope": "request", "ResponseEnvelope": "response"}
_KINDS = {NOTIFICATION: "notification", REQUEST: "request", RESPONSE: "response"}  # in a safe pickle


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


def look(payload: bytes | bytearray, format: str = "") -> Content:
    """Find out what a payload says.

    Args:
        payload: The payload.
        format: ``"json"``, ``"php"`` or ``"pickle"``; by default whichever the first byte looks like.
    """
    if not format:
        format = "pickle" if payload[:1] == b"\x80" else "json" if payload[:99].lstrip()[:1] in (b"{", b"[") else "php"
    try:
        # Names and ids are the sender's.
        return Content(*map(escaped, _content(_FORMATS[format](payload))))
    except SerializationError as exc:
        text = str(exc)
    except Exception as exc:  # of what is broken or hostile there are more kinds than one can list
        text = f"{type(exc).__name__}: {exc}"
    text = f"not a message in {format}: {escaped(text[:_VIEW])}; begins with {bytes(payload[:32])!r}"
    return Content("unreadable", "", "", text)


def _content(value: Any) -> Content:
    kind, id = "notification", None
    if type(value) is tuple and len(value) == 4 and type(value[0]) is int and value[0] in _KINDS:  # a safe pickle
        kind, id, shape, content = value
        kind, value = _KINDS[kind], _built(shape, *(content if SEPARATOR in shape else [content]))
    elif isinstance(value, _Object) and _last_part(value.name) in _ENVELOPES:
        kind = _ENVELOPES[_last_part(value.name)]
        id, value = value.fields.get("id"), value.fields.get(kind)
    if not isinstance(value, _Object):
        raise SerializationError(f"{show(value)} is no object")
    id = "" if id is None else id[:_NAME] if isinstance(id, str) else show(id)
    name = value.name[:_NAME]
    return Content(kind, id, name, show(value, _VIEW + len(name), is_inside=False))


# -- a value as text


class _Object:
    """What stands for an object of whatever class.

    Attributes:
        name: The class, or what is called to make the object.
        args: What that is called with.
        fields: The attributes.
    """

    name: str = ""
    args: list[Any]
    fields: dict[Any, Any]

    # In place of __init__, because an unpickler may call only this.
    def __new__(cls, /, *args: Any, **fields: Any) -> _Object:
        self = object.__new__(cls)
        self.args = list(args)
        self.fields = fields
        return self

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.fields.update(part)

    # For objects that are lists or dicts.

    def append(self, item: Any) -> None:
        self.args.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.fields[key] = value


def _object(name: str, fields: dict[Any, Any], args: Iterable[Any] = ()) -> _Object:
    made = _Object(*args)
    made.name, made.fields = name, fields
    return made


class _Word(str):
    """A text that is shown as it is: the name of an enum's member, a number."""

    __slots__ = ()


def escaped(text: str) -> str:
    """Return a text with control characters escaped: they could clear a screen or begin a line."""
    return "".join([c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text])


def _last_part(name: str) -> str:
    """Return the last part of a class's name, in Python or in PHP."""
    return re.split(r"[\\.]", name[:_NAME])[-1]


def show(value: Any, room: int = _VIEW, is_inside: bool = True) -> str:
    """Return a value as text of about so many characters.

    Each value writes something and leaves less room to those inside it: that bounds the depth, and the time if one value
    is in many others.
    """
    if isinstance(value, Handle):
        value = _built(*value)
    parts: Iterable[tuple[str, Any]]
    begin, more, end = "(", "...", ")"
    if isinstance(value, _Object):
        begin = f"{(_last_part(value.name) if is_inside else value.name)[:_NAME]}("
        fields = ((f"{str(key)[:_TEXT]}=", item) for key, item in value.fields.items())
        parts = chain((("", item) for item in value.args), fields)
    elif isinstance(value, dict):
        begin, end = "{", "}"
        parts = ((f"{show(key, room - _LEVEL)}: ", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        if not isinstance(value, tuple):
            begin, end = "[]" if isinstance(value, list) else "{}"
        elif len(value) == 1:
            end = ",)"
        parts = (("", item) for item in value)
        more = f"... {len(value)} items"
    else:
        return _leaf(value)
    room -= len(begin)
    texts: list[str] = []
    for key, item in parts:
        if room <= 0:
            texts.append(more)
            break
        texts.append(key + show(item, room - _LEVEL))
        room -= len(texts[-1]) + 2
    return f"{begin}{', '.join(texts)}{end}"


def _leaf(value: Any) -> str:
    if isinstance(value, _Word):
        return value if len(value) <= _NAME else value[:_NAME] + "..."
    if isinstance(value, str) and len(value) > _TEXT:
        return f"{repr(value[:_TEXT])[:-1]}...' ({len(value)} characters)"
    if isinstance(value, (bytes, bytearray)) and len(value) > _BYTES:
        return f"{repr(bytes(value[:_BYTES]))[:-1]}...' ({len(value)} bytes)"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"<int of {value.bit_length()} bits>"  # its digits may take long to compute
    if isinstance(value, type):  # a class or a function that a plain pickle names
        return str(value.name)  # type: ignore[attr-defined]
    return repr(value)


# -- pickles

_InPython: Any = pickle._Unpickler  # which reserves nothing that a broken pickle only announces, but for a bytearray


class _Unpickler(_InPython):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Any]] = dict(_InPython.dispatch)

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == GLOBAL:
            return build
        return type("_Object", (_Object,), {"name": f"{module}.{name}"})


def _read_pickle(payload: bytes | bytearray) -> Any:
    return _Unpickler(io.BytesIO(payload)).load()


def _built(shape: str, *values: Any) -> Any:
    """Return what stands for an object of a safe pickle."""
    name, *names = shape.split(SEPARATOR)
    content = values[0] if values else None
    if names:
        return _object(name, dict(zip(names, values, strict=True)))
    if isinstance(content, dict):
        return _object(name, content)
    if isinstance(content, str):
        return _Word(f"{_last_part(name)}.{content}")
    # A value of the standard library, or a combination of flags.
    return _object(name, {}, content if type(content) is tuple else values)


# -- JSON


def _read_json(payload: bytes | bytearray) -> Any:
    return json.loads(payload.decode(), object_pairs_hook=_json_object, parse_int=_Word)


def _json_object(pairs: list[tuple[str, Any]]) -> Any:
    fields = dict(pairs)
    return _object(fields.pop("__class"), fields) if type(fields.get("__class")) is str else fields


# -- PHP's format


def _read_php(payload: bytes | bytearray) -> Any:
    return parse(payload.decode("latin-1"), _PhpClasses(), lambda enum, case: _Word(f"{_last_part(enum)}::{case}"))


class _PhpClasses(dict[str, Any]):
    """What the parser asks for about a class: here each is one that can have any properties."""

    def __missing__(self, name: str) -> Any:
        return lambda data: _object(unraw(name), {unraw(bare(key)): value for key, value in data.items()}), 0, None


_FORMATS: dict[str, Callable[[bytes | bytearray], Any]] = {
    "json": _read_json, "php": _read_php, "pickle": _read_pickle,
}  # fmt: skip
