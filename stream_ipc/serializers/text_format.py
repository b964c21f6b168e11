"""What the serializers of JSON and of PHP's format have in common.

Knows messages, the registry, and Python's annotations as far as their text goes. Must not know either format, and
must not evaluate an annotation: what a class body says of a field's type may be any text.

Each format is a ``TextFormat``, whose functions write quickly; a ``Walk`` writes or explains what they give up. Users see
a ``TextSerializer``.
"""

from __future__ import annotations

import re

from .. import registry
from ..classes import compile_function
from ..errors import SerializationError, article, describe, printable
from ..interruptions import interruption_in, pass_on
from ..messages import (
    MAX_ID_LENGTH,
    NOTIFICATION,
    REQUEST,
    RESPONSE,
    ErrorMessage,
    LogMessage,
    Message,
    RequestEnvelope,
    ResponseEnvelope,
    add_id,
    take_out_of_envelope,
)
from .text_walk import MAX_DEPTH, Walk, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, ClassVar, NoReturn

    from ..classes import FieldInfo, TypeInfo
    from ..protocols import Payload

    Builder = Callable[[dict[Any, Any]], Any]
    Conversions = dict[str, dict[type, Callable[[Any], Any]]]  # by plain_type() of the field and type of the value
    Encoder = Callable[[Any, int, set[int]], str]  # (value, depth, ids of the objects so far)
    Write = Callable[[int, Any, Message], bytes]

__all__ = [
    "ENVELOPES", "HEAD_SIZE", "INT_MAX", "INT_MIN", "ByName", "TextFormat", "TextSerializer", "builder",
    "compile_builder", "find_class", "member_of", "other_format", "plain_type", "wire_name",
]  # fmt: skip

HEAD_SIZE = 1024  # bytes of an envelope in which its id stands, if a known sender has written it
INT_MIN = -(1 << 63)
INT_MAX = (1 << 63) - 1

ENVELOPES = (RequestEnvelope, ResponseEnvelope)

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


def member_of(info: TypeInfo, name: Any) -> Any:
    """Return the member of an enum whose name was read, or raise SerializationError."""
    cls: Any = info.cls
    member = cls.__members__.get(name) if info.is_enum and type(name) is str else None
    if member is None:
        raise SerializationError(f"{info.wire_name} has no member {shown(name)}; add it to the enum on this side too")
    return member


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


# -- writing

_CONTENT = "scalars[t](v) if (t := type(v)) in scalars else encoders[t](v, depth + 1, seen)"


class TextFormat(dict[type, "Encoder"]):
    """Maps each class to the function that writes its instances, made when the class is first met; reads payloads.

    Such a function may raise anything for what it cannot write; then the walk writes it or explains it. What both of them
    write, a subclass says.

    Args:
        old: Whether it writes to the older release of the original.
        scalars: The functions for the values that hold no others, by exact type: a subclass, which would arrive as
            its base, is not found.
    """

    name = ""  # in errors
    guard: tuple[str, ...] = ()  # what the function of an object does first, as source
    leaves_out = False  # whether a field without a value is left out; otherwise it is an error
    reference: Callable[[int], str] | None = None  # returns what stands for an object again, by its number
    small_int: Callable[..., str] | None = None  # does what scalars[int] does for an int of 64 bits, but quicker

    array: Callable[[list[str]], str]  # makes a list of the texts of its items
    mapping: Callable[[list[str]], str]  # makes a dict of its keys and values
    key: Callable[[Any], str]  # returns what stands before a value of a dict
    start: Callable[[TypeInfo, int], str]  # returns what an object with so many attributes begins with; "}" ends it
    attribute: Callable[[Any], str]  # returns what stands before an attribute of that name
    field: Callable[[FieldInfo, TypeInfo], str]  # returns what stands before a field
    dict_encoder: Callable[[], Encoder]
    enum_encoder: Callable[[TypeInfo], Encoder]
    encode: Callable[[str], bytes]  # makes a payload of a text
    read: Callable[[Payload], Any]  # returns the value of a payload, or raises anything
    salvage: Callable[[Payload], tuple[int, Any]]  # returns the kind and the id of what could not be read, or raises

    def __init__(self, old: bool, scalars: dict[type, Callable[[Any], str]]) -> None:
        super().__init__()
        self.old = old
        self.scalars = scalars
        self.heads: dict[int, tuple[str, str]] = {}  # by kind: what stands before an envelope's id, and before its content
        for kind, cls in zip((REQUEST, RESPONSE), ENVELOPES):
            info = registry.type_info(cls)
            self.heads[kind] = (self.start(info, 2) + self.field(info.fields[0], info), self.field(info.fields[1], info))
        self.writers: _Writers = _Writers(self)
        registry.clear_on_change(self)
        registry.clear_on_change(self.writers)

    def info(self, cls: type) -> TypeInfo:
        """Return the entry of a class that is no plain data, or raise SerializationError."""
        return registry.type_info(cls)

    def reason(self, exc: Exception) -> str:
        """Say what is wrong with a payload, by the exception that came of it."""
        return f"payload cannot be decoded: {describe(exc)}"

    def write_by_walk(self, kind: int, id: Any, message: Message) -> bytes:
        """Return the payload of a message that the functions cannot write, or raise SerializationError."""
        walk = Walk(self, kind != NOTIFICATION)
        text = walk.text(message)
        if kind != NOTIFICATION:
            before, between = self.heads[kind]
            text = f"{before}{walk.made('the id of the envelope', self.scalars[str], id)}{between}{text}}}"
        return self.encode(text)

    def __missing__(self, cls: type) -> Encoder:
        made: Encoder
        if cls is list or cls is tuple:
            made = self._list_encoder()
        elif cls is dict:
            made = self.dict_encoder()
        else:
            info = self.info(cls)
            made = self.enum_encoder(info) if info.is_enum else self._compile(info)
        self[cls] = made
        return made

    def _list_encoder(self) -> Encoder:
        encoders, get, array = self, self.scalars.get, self.array
        text, small_int = self.scalars[str], self.small_int

        def encode(value: list[Any], depth: int, seen: set[int]) -> str:
            if depth > MAX_DEPTH:
                raise ValueError
            if len(value) > 15:
                # Long lists mostly hold one type. For short ones it takes longer to find out.
                types = set(map(type, value))
                if types == {str}:
                    return array(list(map(text, value)))
                if types == {int} and small_int is not None and min(value) >= INT_MIN and max(value) <= INT_MAX:
                    return array(list(map(small_int, value)))
            depth += 1
            return array(
                [f(v) if (f := get(type(v))) is not None else encoders[type(v)](v, depth, seen) for v in value]
            )

        return encode

    def _compile(self, info: TypeInfo) -> Encoder:
        lines = ["def made(value, depth, seen):", f"    if depth > {MAX_DEPTH}: raise ValueError", *self.guard]
        if not info.fields:
            lines += [
                "    values = info.values(value)",
                f"    parts = [attribute(name) + ({_CONTENT}) for name, v in values.items()]",
                "    return start(info, len(values)) + ''.join(parts) + '}'",
            ]
        else:
            text = _braces(self.start(info, len(info.fields)))
            for i, f in enumerate(info.fields):
                lines += [f"    v = value.{f.name}", f"    t{i} = {_CONTENT}"]
                text += f"{_braces(self.field(f, info))}{{t{i}}}"
            lines.append(f"    return f{text + '}}'!r}")
        names = {"info": info, "encoders": self, "scalars": self.scalars, "start": self.start, "attribute": self.attribute}
        return compile_function(lines, names)


def _braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


class _Writers(dict[type, "Write"]):
    """Maps each class to what turns a kind, an id and a message into a payload, made when the class is first met."""

    def __init__(self, format: TextFormat) -> None:
        super().__init__()
        self._format = format

    def __missing__(self, cls: type) -> Write:
        if issubclass(cls, Message):
            try:
                made = self[cls] = self._writer(self._format[cls])
                return made
            except Exception as exc:
                pass_on(exc)
        return self._format.write_by_walk  # which says what is wrong

    def _writer(self, encode: Encoder) -> Write:
        write, heads = self._format.scalars[str], self._format.heads
        finish, write_by_walk = self._format.encode, self._format.write_by_walk

        def made(kind: int, id: Any, message: Message) -> bytes:
            try:
                if kind == NOTIFICATION:
                    text = encode(message, 1, set())
                else:
                    before, between = heads[kind]
                    text = f"{before}{write(id)}{between}{encode(message, 2, set())}}}"
                return text.encode() if text.isascii() else finish(text)
            except MemoryError:
                raise
            except Exception as exc:
                # An object that occurs twice, a field without a value, a lone surrogate; RecursionError: a cycle, or only
                # a deep message on a full stack. Left before the walk, so that its error is not shown as one about this.
                pass_on(exc)
            return write_by_walk(kind, id, message)

        return made


# -- reading


class ByName(dict[str, "Any"]):
    """Maps each name of a class to what is made for it when it is first met, until a class is registered."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self._make = make
        registry.clear_on_change(self)

    def __missing__(self, name: str) -> Any:
        made = self[name] = self._make(name)
        return made


def builder(info: TypeInfo, keys: Sequence[str], conversions: Conversions, rename: Builder | None = None) -> Builder:
    """Make the function that builds an instance of a class with fields from the dict that was read.

    Each field should have its key there. ``rename`` returns the same dict with such keys, if some of them are missing.
    """

    def otherwise(data: dict[Any, Any]) -> Any:
        # Not every field was sent: the registry knows the defaults.
        data = data if rename is None else rename(data)
        values = {}
        for f, key in zip(info.fields, keys, strict=True):
            if key in data:
                convert = conversions.get(plain_type(f.annotation), {}).get(type(data[key]))
                values[f.name] = data[key] if convert is None else convert(data[key])
        return info.build(values)

    lines = ["def made(data):", "    try:", "        pass"]
    lines += [f"        v{i} = data[{key!r}]" for i, key in enumerate(keys)]
    lines += ["    except KeyError:", "        return otherwise(data)"]
    return compile_builder(lines, info, conversions, {"otherwise": otherwise})


def compile_builder(
    lines: list[str], info: TypeInfo, conversions: Conversions, names: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a function that builds an instance of a class with fields.

    ``lines`` is its source, up to where ``v0``, ``v1``, ... are the values of the fields, as they were read, and ``names``
    what that sees.
    """
    names = {**names, "Message": Message, "bad_id": _bad_id, "cls": info.cls, "refuse": _refuse, "refused": info.refused}
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
    lines += [
        "    try:",
        f"        return {info.call([f'v{i}' for i in range(len(info.fields))])}",
        "    except Exception as exc:",
        "        raise refused(exc) from exc",
    ]
    return compile_function(lines, names)


def _bad_id() -> SerializationError:
    return SerializationError(f"the id of an envelope is not a text of at most {MAX_ID_LENGTH} characters")


def _refuse(what: str, value: Any) -> NoReturn:
    """Raise the error about what should be a message."""
    if type(value) is dict and isinstance(value.get("__class"), str):
        find_class(value["__class"])  # raises, if the class is what is wrong
    raise SerializationError(f"{what} is not a message but {article(type(value))}")


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


# -- the serializer


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
        self._read = self._format.read

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
            message = self._read(payload)
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
            _refuse("payload", message)
        return message

    @property
    def reader(self) -> Callable[[Payload], Message]:
        """``deserialize``.

        That it exists tells the decoder that nothing of a payload is kept.
        """
        return self.deserialize
