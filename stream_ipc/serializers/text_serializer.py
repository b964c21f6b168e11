"""What JSON and PHP's format have in common but for writing: names of classes, instances of what was read, the serializer.

Knows messages, the registry, and Python's annotations as far as their text goes. Must not know either format, which a
``TextFormat`` writes and reads, and must not evaluate an annotation: what a class body says of a field's type may be any
text.
"""

from __future__ import annotations

import re

from .. import registry
from ..errors import SerializationError, article, printable
from ..ids import MAX_ID_LENGTH
from ..interruptions import interruption_in, pass_on
from ..messages import ENVELOPES, ErrorMessage, LogMessage, Message, add_id, take_out_of_envelope

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, ClassVar, NoReturn

    from ..protocols import Payload
    from ..type_info import TypeInfo
    from .text_writing import TextFormat, Write

    Builder = Callable[[dict[Any, Any]], Any]
    Conversions = dict[str, dict[type, Callable[[Any], Any]]]  # by plain_type() of the field and type of the value

__all__ = [
    "HEAD_SIZE", "TextSerializer", "compile_checked", "dict_builder", "find_class", "other_format", "plain_type",
    "shown", "wire_name",
]  # fmt: skip

# -- names

# The older release of the original has PhpStreamIpc where the present one has StreamIpc.
_OLD_NAMES = {f"Php{registry.type_info(cls).wire_name}": cls for cls in (LogMessage, ErrorMessage, *ENVELOPES)}


def wire_name(info: TypeInfo, old: bool) -> str:
    """Return the name to write for a class, to the present or to the older release of the original."""
    name = f"Php{info.wire_name}"
    return name if old and _OLD_NAMES.get(name) is info.cls else info.wire_name


def find_class(name: Any, advice: str = "") -> TypeInfo:
    """Return the entry of a class name that was read, whichever release wrote it, or raise SerializationError.

    ``advice`` says what to do about an unknown one, unless the name has dots, as only Python's names have.
    """
    try:
        return registry.lookup(name)
    except SerializationError:
        if type(name) is not str or ("\\" not in name and ("." in name or not advice)):
            raise
    if name in _OLD_NAMES:
        return registry.type_info(_OLD_NAMES[name])
    advice = advice or "import a class with this wire_name on this side too"
    raise SerializationError(f"Unknown class: {printable(name[:200])} ({advice})")


def shown(value: Any) -> str:
    """Return a short text for a text, bytes or a number; for anything else, whose repr may have no end, its type's name."""
    cls = type(value)
    has_end = cls in (str, bytes, float, bool, type(None)) or (cls is int and value.bit_length() < 200)
    text = ascii(value) if has_end else f"<{cls.__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."


# -- annotations

# Optional[float], "float | None" and the like; the brackets behind the name are those of Dict[str, int].
_PLAIN = re.compile(
    r"(?:Optional\[|Union\[(?:None(?:Type)?,)?|None\|)?"
    r"(?:(float|str|bytes|bytearray)|(?:[dD]ict|(?:Mutable)?Mapping)(?:\[.*\])?)"
    r"(?:(?:,None(?:Type)?)?\]|\|None)?"
).fullmatch
_NOISE = re.compile(r"[\s'\"]|\b(?:typing|t|builtins|collections\.abc|abc)\.")


def plain_type(annotation: Any) -> str:
    """Return which of the types that matter to a format an annotation names, with or without None.

    ``float``, ``"float"``, ``Optional[float]``, ``"float | None"`` and ``Union[None, float]`` are all ``"float"``.
    Nothing is evaluated: a name that means something else in its module is taken for the usual one.

    Returns:
        ``"float"``, ``"str"``, ``"bytes"``, ``"bytearray"``, ``"dict"`` (for any mapping), or an empty text.
    """
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):  # list[int] is a type on 3.10
        text = annotation.__name__ if annotation.__module__ == "builtins" else ""
    else:
        text = str(annotation)
    match = _PLAIN(_NOISE.sub("", text[:200]))
    return "" if match is None else match[1] or "dict"


# -- instances


def dict_builder(info: TypeInfo, keys: Sequence[str], conversions: Conversions, rename: Builder | None = None) -> Builder:
    """Make the function that builds an instance of a class with fields from the dict that was read.

    Each field should have its key there. ``rename`` returns the same dict with such keys, if some of them are missing.
    """

    def otherwise(data: dict[Any, Any]) -> Any:
        # Not every field was sent: the registry knows the defaults.
        if rename is not None:
            data = rename(data)
            if all([key in data for key in keys]):
                return build(data)  # which checks an envelope
        values = {}
        for f, key in zip(info.fields, keys, strict=True):
            if key in data:
                convert = conversions.get(plain_type(f.annotation), {}).get(type(data[key]))
                values[f.name] = data[key] if convert is None else convert(data[key])
        return info.build(values)

    lines = ["def made(data):", "    try:"]
    lines += [f"        v{i} = data[{key!r}]" for i, key in enumerate(keys)]
    lines += ["    except KeyError:", "        return otherwise(data)"]
    build = compile_checked(lines, info, conversions, {"otherwise": otherwise})
    return build


def compile_checked(
    lines: list[str], info: TypeInfo, conversions: Conversions, names: dict[str, Any]
) -> Callable[..., Any]:
    """Do what ``TypeInfo.compile_builder`` does, with values as they were read."""
    names = {**names, "Message": Message, "bad_id": _bad_id, "refuse": refuse}
    lines = list(lines)
    for i, f in enumerate(info.fields):
        for n, (cls, convert) in enumerate(conversions.get(plain_type(f.annotation), {}).items()):
            lines.append(f"    if type(v{i}) is c{i}_{n}: v{i} = f{i}_{n}(v{i})")
            names |= {f"c{i}_{n}": cls, f"f{i}_{n}": convert}
    if info.cls in ENVELOPES:
        lines += [
            f"    if type(v0) is not str or len(v0) > {MAX_ID_LENGTH}: raise bad_id()",
            "    if not isinstance(v1, Message): refuse('the content of an envelope', v1)",
        ]
    return info.compile_builder(lines, names)


def _bad_id() -> SerializationError:
    return SerializationError(f"the id of an envelope is not a text of at most {MAX_ID_LENGTH} characters")


def refuse(what: str, value: Any) -> NoReturn:
    """Raise the error about what should be a message."""
    if type(value) is dict and isinstance(value.get("__class"), str):
        find_class(value["__class"])  # raises, if the class is what is wrong
    raise SerializationError(f"{what} is not a message but {article(type(value))}")


# -- the serializer

HEAD_SIZE = 1024  # bytes of an envelope in which its id stands, if a known sender has written it

_FORMATS = {
    "JSON": re.compile(rb"\s*[{\[]"),
    "PHP's format": re.compile(rb"[OaC]:[0-9]+:|[NbidsE][:;]"),
    "a pickle": re.compile(rb"\x80[\x02-\x05]"),
}


def other_format(payload: Any, own: str) -> str:
    """Return how an error about an unreadable payload goes on, if the payload looks like another format."""
    try:
        found = next((name for name, start in _FORMATS.items() if start.match(payload) is not None), own)
    except TypeError:  # no buffer, which is what the error is about
        found = own
    return "" if found == own else f"; it looks like {found}: do both sides use the same serializer?"


class TextSerializer:
    """Turns messages into payloads of a format and back."""

    # For the text of a request that got no reply.
    silence_hint = (
        "; if the other side is PHP: it never answers a request whose class it does not know by that wire name, or that"
        " has a value of a wrong type for a property, or an envelope of the other namespace (see the serializer's"
        " namespace=); its own error handlers or its stderr may say more"
    )

    formats: ClassVar[tuple[TextFormat, TextFormat]]  # for the present and for the older release of the original

    def __init__(self, *, namespace: str = "StreamIpc") -> None:
        if namespace not in ("StreamIpc", "PhpStreamIpc"):
            raise ValueError(f"namespace must be 'StreamIpc' or 'PhpStreamIpc', not {namespace!r}")
        self._format = self.formats[namespace == "PhpStreamIpc"]

    def __repr__(self) -> str:
        format = getattr(self, "_format", None)  # None: half made
        argument = "namespace='PhpStreamIpc'" if format is not None and format.old else ""
        return f"{type(self).__name__}({argument})"

    def serialize(self, message: Message) -> bytes:
        """Turn a message into a payload.

        Args:
            message: A message, or an envelope around one.

        Returns:
            The payload.

        Raises:
            SerializationError: Something in it cannot travel in this format;
                the text names the field, as in ``TaskRequest.items[3].name: set
                cannot travel in JSON``.
        """
        kind, id, content = take_out_of_envelope(message)
        return self._format.writers[type(content)](kind, id, content)

    @property
    def writers(self) -> dict[type, Write]:
        """What turns a kind, an id and a message into a payload, by class.

        ``serialize`` without an envelope; the id must be one that an envelope
        may have.
        """
        return self._format.writers

    def deserialize(self, payload: Payload) -> Message:
        """Turn a payload into its message.

        Args:
            payload: The payload; nothing of it is kept.

        Returns:
            The message or envelope, built by its class's constructor.

        Raises:
            SerializationError: It is not in this format, names a class that is
                not registered, or holds what the class's constructor refuses.
                Where the id of an envelope could be read, ``request_id`` or
                ``response_id`` says it.
        """
        try:
            message = self._format.read(payload)
        except Exception as exc:
            if isinstance(exc, MemoryError) and interruption_in(exc) is None:
                exc.__traceback__ = None  # it holds all that was read so far
            error = exc if isinstance(exc, SerializationError) else SerializationError(self._format.reason(exc))
            error.args = (str(error) + other_format(payload, self._format.name),)
            try:
                add_id(error, *self._format.salvage(payload))
            except Exception as other:  # no buffer, or released, or no such format: there is one error to report already
                pass_on(other)
            if error is exc:
                raise
            raise error from exc
        if not isinstance(message, Message):
            refuse("payload", message)
        return message

    @property
    def reader(self) -> Callable[[Payload], Message]:
        """``deserialize``.

        That it exists tells the decoder that nothing of a payload is kept.
        """
        return self.deserialize
