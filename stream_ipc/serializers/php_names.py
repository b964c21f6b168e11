"""Translate names and texts to PHP's format and back.

PHP's strings are bytes and their lengths count bytes, so both directions work on texts of one character per byte
(Latin-1, called raw here), which cost nothing to make and to turn back, and in which an ASCII text stands as it is.

Knows the registry and the format's names. Must not know its values.
"""

from __future__ import annotations

from .. import registry
from ..errors import SerializationError
from .text_format import shown, wire_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..registry import FieldInfo, TypeInfo

__all__ = ["bare", "class_name", "mangled", "raw", "text_of"]


def raw(text: str) -> str:
    """Return a text as one character per byte of its UTF-8."""
    # surrogateescape: what was not UTF-8 when it was read goes out as it came. Other surrogates are refused.
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("latin-1")


def text_of(raw: str) -> str:
    """Return the text of a raw one; bytes that are not UTF-8 become lone surrogates."""
    return raw if raw.isascii() else raw.encode("latin-1").decode("utf-8", "surrogateescape")


def class_name(info: TypeInfo, old: bool) -> str:
    """Return the raw name to write for a class."""
    name = raw(wire_name(info, old))
    if '"' in name or len(name) > 500:
        raise SerializationError(f"{shown(info.wire_name)} cannot be a class name in PHP's format")
    return name


def bare(key: str) -> str:
    """Return the name of a property without what says who may see it."""
    return key[key.find("\0", 1) + 1 :] if key[:1] == "\0" else key


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
