"""Writing a message without recursion, and explaining what in it cannot be written.

Knows messages and what a ``TextFormat`` says of its format. This is for what the functions of a format give up: with a
stack of its own it also writes a message of 511 levels where the interpreter's has less left, it counts the values, so
that it can refer to one, and it knows the path to what is at fault.
"""

from __future__ import annotations

from operator import add

from ..errors import SerializationError, article, describe
from ..messages import Message
from ..registry import by_class

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, NoReturn

    from .text_format import TextFormat

    # An open container: the step to it, its id, the steps and values in it that are still to come, the texts of the others,
    # and what makes its own text of all these.
    Open = tuple[str, int, Iterator[tuple[str, Any]], list[str], Callable[[list[str]], str]]

__all__ = ["MAX_DEPTH", "TOO_DEEP", "Walk", "shown"]

MAX_DEPTH = 511  # the original's JSON writes 512 levels but reads 511; what it could not read is not written here
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"

# What to send instead of a value that no format here has a form for.
_INSTEAD: dict[type, str] = dict.fromkeys((bytes, bytearray, memoryview), "base64 text")
_INSTEAD |= {set: "a list", frozenset: "a list", complex: "two floats"}
_PLAIN = (str, int, float, dict, list, tuple)


def shown(value: Any) -> str:
    """Return a short text for a text, bytes or a number; for anything else, whose repr may have no end, its type's name."""
    cls = type(value)
    has_end = cls in (str, bytes, float, bool, type(None)) or (cls is int and value.bit_length() < 200)
    text = ascii(value) if has_end else f"<{cls.__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."


class Walk:
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
            name = article(type(message))
            if self._in_envelope:
                raise SerializationError(f"an envelope must hold a Message, not {name}")
            raise SerializationError(f"{name} cannot be sent by itself: only messages can; derive a class from Message")
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

    def made(self, step: str, function: Callable[..., str], *args: Any) -> str:
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
            return self.made(step, format.scalars[cls], value)
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
            text = self.made(step + inner, self._format.key, key)
            if text in keys:
                self._fail(step + inner, "a dict has a second key that is the same to PHP, which takes digits for an int")
            keys[text] = inner
        items = zip(keys.values(), value.values())
        self._open(step, value, items, lambda texts: self._format.mapping(list(map(add, keys, texts))))

    def _object(self, step: str, value: Any) -> str | None:
        format, cls = self._format, type(value)
        try:
            info = format.info(cls)
            values = {} if info.is_enum or info.fields else info.values(value)
        except SerializationError as exc:
            self._fail(step, (cls not in by_class and self._advice(cls)) or str(exc))
        if info.is_enum:
            return self.made(step, format.enum_encoder(info), value, self._depth + 1, set())
        names = [self.made(f"{step}.{name}", format.attribute, name) for name in values]
        for f in info.fields:
            if hasattr(value, f.name):
                values[f.name] = getattr(value, f.name)
                names.append(self.made(f"{step}.{f.name}", format.field, f, info))
            elif not format.leaves_out:
                self._fail(f"{step}.{f.name}", "has no value")
        start = self.made(step, format.start, info, len(names))
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
