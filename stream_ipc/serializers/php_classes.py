"""What a property is called in PHP's ``serialize()`` format, and how the objects that come in it are built.

Knows the registry, and PHP's own value classes by their names. Must not know how values are written or read.
"""

from __future__ import annotations

from .. import registry
from ..errors import SerializationError
from .php_form import bare, raw, unraw
from .text_format import builder, find_class, wire_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..registry import FieldInfo, TypeInfo
    from .text_format import Builder

__all__ = ["ADVICE", "CONVERSIONS", "NOTHING", "PhpClass", "classes", "mangled"]


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


class PhpClass:
    """How the objects of one class are built.

    Attributes:
        info: Its entry; None for what is not built.
        build: Builds an object of its properties, by raw name as it came.
        names: The raw names of the properties that it should have.
    """

    __slots__ = ("build", "info", "names")

    def __init__(self, info: TypeInfo | None, build: Builder, names: list[str]) -> None:
        self.info: TypeInfo | None = info
        self.build: Builder = build
        self.names: list[str] = names


NOTHING = PhpClass(None, lambda data: None, [])  # as which any class is read when nothing is to be built


class _Classes(dict[str, PhpClass]):
    """Maps each raw class name to how its objects are built, made when the name is first met."""

    def __missing__(self, name: str) -> PhpClass:
        made = self[name] = self._make(unraw(name))
        return made

    @staticmethod
    def _make(name: str) -> PhpClass:
        try:
            info = find_class(name, ADVICE)
        except SerializationError:
            if name not in _VALUES:
                raise
            from . import php_values  # datetime takes time to import, and most programs never read a date here

            info = php_values.CLASSES[name]
        if info.is_enum:
            raise SerializationError(f"{info.wire_name} is an enum, but came as an object")
        if not info.fields:
            return PhpClass(info, lambda data: info.build({unraw(bare(key)): v for key, v in data.items()}), [])
        keys = [raw(mangled(f, info, old=False)) for f in info.fields]
        names = [raw(f.wire_name) for f in info.fields]

        def rename(data: dict[str, Any]) -> dict[str, Any]:
            # Not each came under its own key: whoever may see a property, its name counts.
            others = {bare(key): v for key, v in data.items() if key not in keys}
            return {**{key: others[name] for key, name in zip(keys, names, strict=True) if name in others}, **data}

        return PhpClass(info, builder(info, keys, CONVERSIONS, rename), keys)


_VALUES = ("stdClass", "DateTime", "DateTimeImmutable")
ADVICE = "define a class with this wire_name on this side, or register one with register_type(cls, wire_name)"

# PHP tells neither text from bytes nor a list from a map; the annotation does.
CONVERSIONS = {
    "float": "if type(v) is int: v = float(v)",
    "str": "if type(v) is bytes: v = v.decode('utf-8', 'surrogateescape')",
    "bytes": "if type(v) is str: v = v.encode()",
    "bytearray": "if type(v) in (str, bytes): v = bytearray(v.encode() if type(v) is str else v)",
    "dict": "if type(v) is list: v = dict(enumerate(v))",
}

classes: dict[str, PhpClass] = _Classes()
registry.clear_on_change(classes)
