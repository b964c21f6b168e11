"""Writing messages without recursion, and explaining what in them cannot be written.

Knows messages, the registry and a ``TextFormat``. This is for what the functions of a format give up: with a stack of its
own it also writes a message of 511 levels where the interpreter's has less left, and knows the path to what is at fault.
"""

from __future__ import annotations

from ..errors import SerializationError, article, describe
from ..messages import MAX_ID_LENGTH, Message, RequestEnvelope
from .text_format import ENVELOPES, MAX_DEPTH, TOO_DEEP, Unfit, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, NoReturn

    from ..registry import TypeInfo
    from .text_format import TextFormat

    Items = Iterator[tuple[str, str, Any]]  # (what to write before it, the step to it, the value)

__all__ = ["Walk"]


class Walk:
    """Writes one message, or raises the error that names what is wrong in it.

    A step is what leads from a value to one in it, as in ``.items`` or ``[3]``.
    """

    def __init__(self, format: TextFormat) -> None:
        self._format = format
        self.out: list[str] = []
        self._path: list[str] = []  # one step for each open container
        self._stack: list[tuple[Items, str]] = []
        self._within: list[int] = []  # ids of the open containers
        self._start = 0  # where in the path the message itself begins, if it is in an envelope

    def text(self, message: Any) -> str:
        """Write a message.

        Raises:
            SerializationError: Something in it cannot travel.
        """
        if not isinstance(message, Message):
            raise SerializationError(
                f"{article(type(message))} cannot be sent by itself: only messages can; derive a class from Message"
            )
        try:
            self.value(type(message).__name__, message)
            while self._stack:
                items, end = self._stack[-1]
                try:
                    before, step, value = next(items)
                except StopIteration:
                    self.out.append(end)
                    self._stack.pop()
                    self._path.pop()
                    self._within.pop()
                    continue
                self.out.append(before)
                self.value(step, value)
        except SerializationError:
            raise
        except Exception as exc:  # of a property or a __getattr__
            raise self._error("", describe(exc)) from exc
        return "".join(self.out)

    def value(self, step: str, value: Any) -> None:
        """Write a value, or open it if it is a container."""
        cls = type(value)
        if cls in self._format.scalars:
            if cls is str:
                self._check_text(step, value)
            self.out.append(self._made(step, self._format.scalars[cls], value))
        elif cls is list or cls is tuple or cls is dict:
            start, end = self._format.brackets(value)
            self._open(step, value, start, self._entries(value) if cls is dict else self._items(value), end)
        else:
            self.object(step, self._info(step, value), value)

    def object(self, step: str, info: TypeInfo, value: Any) -> None:
        """Write an enum's member, or open an object."""
        if info.is_enum:
            if type(value._name_) is str:
                self._check_text(step, value._name_)
            self.out.append(self._made(step, self._format.enum_encoder(info), value, len(self._stack) + 1, set()))
            return
        items: Items
        try:
            if info.fields:
                fields = [f for f in info.fields if not self._format.leaves_out or hasattr(value, f.name)]
                count, items = len(fields), self._fields(info, value, fields)
            else:
                values = info.values(value)
                count, items = len(values), self._attributes(values)
        except SerializationError as exc:
            self._fail(step, str(exc))
        self._open(step, value, self._format.start(info, count), items, "}")

    def _made(self, step: str, function: Callable[..., str], *args: Any) -> str:
        try:
            return function(*args)
        except Unfit as exc:
            self._fail(step, str(exc))

    def _open(self, step: str, value: Any, start: str, items: Items, end: str) -> None:
        if id(value) in self._within:
            self._fail(step, f"contains itself, which {self._format.name} cannot express")
        if len(self._stack) >= MAX_DEPTH:
            self._fail(step, TOO_DEEP)
        if step[0] not in ".[":  # a class: the outermost message, or the one in an envelope
            self._start = len(self._path)
        self.out.append(start)
        self._stack.append((items, end))
        self._path.append(step)
        self._within.append(id(value))

    def _items(self, value: Any) -> Items:
        for i, v in enumerate(value):
            yield (self._format.comma if i else "") + self._format.index(i), f"[{i}]", v

    def _entries(self, value: dict[Any, Any]) -> Items:
        written: set[str] = set()
        for key, v in value.items():
            step = f"[{shown(key)}]"
            if type(key) is str:
                self._check_text(step, key)
            before = self._made(step, self._format.key, key)
            if before in written:
                self._fail(step, "a dict has a second key that is the same to PHP, which takes digits for an int")
            yield (self._format.comma if written else "") + before, step, v
            written.add(before)

    def _fields(self, info: TypeInfo, value: Any, fields: Iterable[Any]) -> Items:
        for f in fields:
            step = f".{f.name}"
            if not hasattr(value, f.name):
                self._fail(step, "has no value")
            self._check_text(step, f.wire_name)
            content = getattr(value, f.name)
            if info.cls in ENVELOPES and f.name != "id" and len(self._path) == 1:
                step = type(content).__name__  # the path begins anew with the message
            yield self._made("", self._format.field, f, info), step, content

    def _attributes(self, values: dict[Any, Any]) -> Items:
        for name, v in values.items():
            if type(name) is str:
                self._check_text(f".{shown(name)}", name)
            yield self._made("", self._format.attribute, name), f".{name}", v

    def _error(self, step: str, problem: str) -> SerializationError:
        begins_anew = step and step[0] not in ".["  # with a class
        path = [step] if begins_anew else [*self._path[self._start :], step]
        if problem == TOO_DEEP:
            del path[3:]  # all of it would be a page
        return SerializationError(f"{''.join(path)}: {problem}")

    def _fail(self, step: str, problem: str) -> NoReturn:
        raise self._error(step, problem) from None  # what led here is only how it was found

    def _check_text(self, step: str, text: str) -> None:
        try:
            text.encode("utf-8", self._format.surrogates)
        except UnicodeEncodeError as exc:
            self._fail(step, f"text with a lone surrogate (at index {exc.start}) cannot travel in {self._format.name}")

    def _info(self, step: str, value: Any) -> TypeInfo:
        try:
            info = self._format.info(type(value))
        except SerializationError as exc:
            self._fail(step, self._advice(value) or str(exc))
        self._check_text(step, info.wire_name)
        if info.cls in ENVELOPES:
            content = value.request if isinstance(value, RequestEnvelope) else value.response
            if type(value.id) is not str or len(value.id) > MAX_ID_LENGTH:
                self._fail(step, f"an envelope's id must be a str of at most {MAX_ID_LENGTH} characters")
            if not isinstance(content, Message):
                self._fail(step, f"an envelope must hold a Message, not {article(type(content))}")
        return info

    def _advice(self, value: Any) -> str | None:
        cls = type(value)
        for bases, instead in (
            ((bytes, bytearray, memoryview), "base64 text"),
            ((set, frozenset), "a list"),
            (complex, "two floats"),
        ):
            if isinstance(value, bases):
                return f"{cls.__name__} cannot travel in {self._format.name}; send {instead}, or use another serializer"
        for base in (str, int, float, dict, list, tuple):
            if isinstance(value, base):
                from ..advice import advice  # only this error needs it

                return f"{cls.__qualname__} is a subclass of {base.__name__} and would arrive as one; {advice(cls)}"
        return None
