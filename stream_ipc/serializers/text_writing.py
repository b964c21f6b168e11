"""Writing JSON and PHP's format: what both have in common.

Knows messages and the registry. Must not know either format.

What a format says of itself is a ``TextFormat``, which makes functions that write quickly. What these cannot write
is left to a ``_Walk``: without recursion it also writes a message of 511 levels where the interpreter's stack has less
left, it counts the values, so that it can refer to one, and it knows the path to what is at fault.
"""

from __future__ import annotations

from operator import add

from .. import registry
from ..errors import SerializationError, article, describe
from ..interruptions import pass_on
from ..messages import ENVELOPES, NOTIFICATION, REQUEST, RESPONSE, Message, no_message
from ..type_info import compile_function
from .text_serializer import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, NoReturn

    from ..protocols import Payload
    from ..type_info import FieldInfo, TypeInfo

    Encoder = Callable[[Any, int, set[int]], str]  # (value, depth, ids of the objects so far)
    Write = Callable[[int, Any, Message], bytes]
    # An open container: the step to it, its id, the steps and values in it that are still to come, the texts of the others,
    # and what makes its own text of all these.
    Open = tuple[str, int, Iterator[tuple[str, Any]], list[str], Callable[[list[str]], str]]

__all__ = ["INT_MAX", "INT_MIN", "MAX_DEPTH", "TOO_DEEP", "TextFormat"]

INT_MIN = -(1 << 63)
INT_MAX = (1 << 63) - 1
MAX_DEPTH = 511  # the original's JSON writes 512 levels but reads 511; what it could not read is not written here
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"

# -- by functions that are made for each class

_CONTENT = "scalars[t](v) if (t := type(v)) in scalars else encoders[t](v, depth + 1, seen)"


class TextFormat(registry.Cache):
    """Maps each class to the function that writes its instances, made when the class is first met; reads payloads.

    Such a function may raise anything for what it cannot write; then the walk writes it or explains it. What both of them
    write, a subclass says.

    Args:
        old: Whether it writes to the older release of the original.
        scalars: The functions for the values that hold no others, by exact type: a subclass, which would arrive as
            its base, is not found.
    """

    name = ""  # in errors
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
        super().__init__(self.encoder_of)
        self.old = old
        self.scalars = scalars
        self.heads: dict[int, tuple[str, str]] = {}  # by kind: what stands before an envelope's id, and before its content
        for kind, cls in zip((REQUEST, RESPONSE), ENVELOPES):
            info = registry.type_info(cls)
            self.heads[kind] = (self.start(info, 2) + self.field(info.fields[0], info), self.field(info.fields[1], info))
        self.writers: dict[type, Write] = registry.Cache(self._writer_of)

    def info(self, cls: type) -> TypeInfo:
        """Return the entry of a class that is no plain data, or raise SerializationError."""
        return registry.type_info(cls)

    def reason(self, exc: Exception) -> str:
        """Say what is wrong with a payload, by the exception that came of it."""
        return f"payload cannot be decoded: {describe(exc)}"

    def write_by_walk(self, kind: int, id: Any, message: Message) -> bytes:
        """Return the payload of a message that the functions cannot write, or raise SerializationError."""
        walk = _Walk(self, kind != NOTIFICATION)
        text = walk.text(message)
        if kind != NOTIFICATION:
            before, between = self.heads[kind]
            text = f"{before}{walk.written('the id of the envelope', self.scalars[str], id)}{between}{text}}}"
        return self.encode(text)

    def encoder_of(self, cls: type) -> Encoder:
        """Make the function that writes the instances of a class."""
        if cls is list or cls is tuple:
            return self._list_encoder()
        if cls is dict:
            return self.dict_encoder()
        info = self.info(cls)
        return self.enum_encoder(info) if info.is_enum else self._compile(info)

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
        lines = ["def made(value, depth, seen):", f"    if depth > {MAX_DEPTH}: raise ValueError"]
        if self.reference is not None:  # it would stand for the object, and only the walk counts
            lines += ["    if id(value) in seen: raise ValueError", "    seen.add(id(value))"]
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

    def _writer_of(self, cls: type) -> Write:
        write_by_walk = self.write_by_walk  # which says what is wrong
        if not issubclass(cls, Message):
            return write_by_walk
        try:
            encode = self[cls]
        except Exception as exc:
            pass_on(exc)
            return write_by_walk
        write, heads, finish = self.scalars[str], self.heads, self.encode

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
                # a deep message on a full stack. The walk is behind this block, so that its error has no context.
                pass_on(exc)
            return write_by_walk(kind, id, message)

        return made


def _braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


# -- by a walk

# What to send instead of a value that no format here has a form for.
_INSTEAD: dict[type, str] = dict.fromkeys((bytes, bytearray, memoryview), "base64 text")
_INSTEAD |= {set: "a list", frozenset: "a list", complex: "two floats"}
_PLAIN = (str, int, float, dict, list, tuple)


class _Walk:
    """Writes one message, or raises the error that names what is wrong in it.

    A step is what leads from a value to one in it, as in ``.items`` or ``[3]``. An envelope around the message is one level
    more, and it and its id are two values.
    """

    def __init__(self, format: TextFormat, in_envelope: bool) -> None:
        self._format = format
        self._in_envelope = in_envelope
        self._stack: list[Open] = []
        self._count = 2 * in_envelope  # of the values so far
        self._numbers: dict[int, tuple[int, Any]] = {}  # id of an object -> its number, and itself, to keep it alive

    def text(self, message: Any) -> str:
        """Write a message, or raise SerializationError."""
        if not isinstance(message, Message):
            if self._in_envelope:
                raise SerializationError(f"an envelope must hold a Message, not {article(type(message))}")
            raise no_message(type(message))
        try:
            text = self._value(type(message).__name__, message)
            while self._stack:
                _, _, items, texts, finish = self._stack[-1]
                if text is not None:
                    texts.append(text)
                item = next(items, None)
                if item is None:
                    self._stack.pop()
                    text = finish(texts)
                else:
                    text = self._value(*item)
        except SerializationError:
            raise
        except Exception as exc:  # of a property or a __getattr__
            raise self._error("", describe(exc)) from exc
        assert text is not None
        return text

    def written(self, step: str, function: Callable[..., str], *args: Any) -> str:
        """Return the text that a function of the format makes; its error is one about the value of this step."""
        try:
            text = function(*args)
            self._format.encode(text)
        except SerializationError as exc:
            self._fail(step, str(exc))
        except UnicodeEncodeError as exc:
            lone = ascii(exc.object[exc.start])
            self._fail(step, f"text with a lone surrogate ({lone}) cannot travel in {self._format.name}")
        return text

    def _value(self, step: str, value: Any) -> str | None:
        """Return the text of a value, or None if it is a container, which is open now."""
        self._count += 1
        format, cls = self._format, type(value)
        if cls in format.scalars:
            return self.written(step, format.scalars[cls], value)
        if cls is list or cls is tuple:
            self._open(step, value, ((f"[{i}]", v) for i, v in enumerate(value)), format.array)
        elif cls is dict:
            self._dict(step, value)
        elif format.reference is not None and id(value) in self._numbers:
            return format.reference(self._numbers[id(value)][0])
        else:
            self._numbers[id(value)] = (self._count, value)
            return self._object(step, value)
        return None

    def _dict(self, step: str, value: dict[Any, Any]) -> None:
        keys: dict[str, str] = {}  # as they are written -> the steps to their values
        for key in value:
            inner = f"[{shown(key)}]"
            text = self.written(step + inner, self._format.key, key)
            if text in keys:
                self._fail(step + inner, "two keys of the dict are one in PHP, where '5' is 5")
            keys[text] = inner
        items = zip(keys.values(), value.values())
        self._open(step, value, items, lambda texts: self._format.mapping(list(map(add, keys, texts))))

    def _object(self, step: str, value: Any) -> str | None:
        format, cls = self._format, type(value)
        try:
            info = format.info(cls)
            values = {} if info.is_enum or info.fields else info.values(value)
        except SerializationError as exc:
            self._fail(step, (cls not in registry.by_class and self._advice(cls)) or str(exc))
        if info.is_enum:
            return self.written(step, format.enum_encoder(info), value, self._depth + 1, set())
        names = [self.written(f"{step}.{name}", format.attribute, name) for name in values]
        for f in info.fields:
            if hasattr(value, f.name):
                values[f.name] = getattr(value, f.name)
                names.append(self.written(f"{step}.{f.name}", format.field, f, info))
            elif not format.leaves_out:
                self._fail(f"{step}.{f.name}", "has no value")
        start = self.written(step, format.start, info, len(names))
        items = ((f".{name}", v) for name, v in values.items())
        self._open(step, value, items, lambda texts: start + "".join(map(add, names, texts)) + "}")
        return None

    @property
    def _depth(self) -> int:
        return len(self._stack) + self._in_envelope

    def _open(
        self, step: str, value: Any, items: Iterable[tuple[str, Any]], finish: Callable[[list[str]], str]
    ) -> None:
        if any([id(value) == other for _, other, _, _, _ in self._stack]):
            self._fail(step, f"contains itself, which {self._format.name} cannot express")
        if self._depth >= MAX_DEPTH:
            self._fail(step, TOO_DEEP)
        self._stack.append((step, id(value), iter(items), [], finish))

    def _advice(self, cls: type) -> str | None:
        for base in cls.__mro__:
            if base in _INSTEAD:
                instead = f"send {_INSTEAD[base]}, or use another serializer"
                return f"{cls.__name__} cannot travel in {self._format.name}; {instead}"
            if base in _PLAIN:
                from ..advice import advice  # only this error needs it

                return f"{cls.__qualname__} is a subclass of {base.__name__} and would arrive as one; {advice(cls)}"
        return None

    def _error(self, step: str, problem: str) -> SerializationError:
        path = [*[step for step, _, _, _, _ in self._stack], step]
        if problem == TOO_DEEP:
            del path[3:]  # all of it would be a page
        return SerializationError(f"{''.join(path)}: {problem}")

    def _fail(self, step: str, problem: str) -> NoReturn:
        raise self._error(step, problem) from None  # what led here is only how it was found
