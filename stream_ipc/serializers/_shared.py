"""What the JSON and the PHP serializer have in common.

Knows messages, the registry, and Python's annotations as far as their text goes. Must not know either format, and
never evaluates an annotation: what a class body says of a field's type may be any text.
"""

from __future__ import annotations

import enum
import re
from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional, Sequence, Tuple

from .. import registry
from ..errors import SerializationError, article, describe, printable
from ..messages import ErrorMessage, LogMessage, Message, RequestEnvelope, ResponseEnvelope
from ..registry import TypeInfo
from ._compiling import call_of_class, compile_function

__all__ = [
    "ENVELOPES",
    "INT_MAX",
    "INT_MIN",
    "MAX_DEPTH",
    "MAX_ID_LENGTH",
    "Builder",
    "Unfit",
    "Walk",
    "add_id",
    "bad_id",
    "builder",
    "call_of_class",
    "check_namespace",
    "compile_function",
    "convert",
    "find_class",
    "namespace_text",
    "old_name",
    "other_format",
    "plain_type",
    "shown",
    "wire_name",
]

MAX_DEPTH = 511  # the original's JSON writes 512 levels but reads 511; what it could not read is not written here
MAX_ID_LENGTH = 128
INT_MIN = -(1 << 63)
INT_MAX = (1 << 63) - 1

ENVELOPES = (RequestEnvelope, ResponseEnvelope)
_BUILT_IN = (LogMessage, ErrorMessage, *ENVELOPES)
_NAMESPACE = "StreamIpc\\"
_OLD_NAMESPACE = "PhpStreamIpc\\"

Builder = Callable[[Dict[Any, Any]], Any]

# For the text of a request that got no reply.
PHP_IS_SILENT = (
    "; if the other side is PHP: it never answers a request whose class it does not know by that wire name, or that has a"
    " value of a wrong type for a property, or an envelope of the other namespace (see the serializer's namespace=); its"
    " own error handlers or its stderr may say more"
)


class Unfit(Exception):
    """The quick way of writing met something that only the slow way can write or explain."""


# --- names ----------------------------------------------------------------------------------------------------


def check_namespace(namespace: str) -> bool:
    """Whether it is that of the original's older release.

    Raises:
        ValueError: It is neither that nor the present one.
    """
    if namespace not in ("StreamIpc", "PhpStreamIpc"):
        raise ValueError(f"namespace must be 'StreamIpc' or 'PhpStreamIpc', not {namespace!r}")
    return namespace == "PhpStreamIpc"


def namespace_text(serializer: Any) -> str:
    """The argument of a serializer for its repr, also if it is half made."""
    return "namespace='PhpStreamIpc'" if getattr(serializer, "_old", False) else ""


def old_name(name: str) -> str:
    """What the older release called one of the library's classes."""
    return _OLD_NAMESPACE + name[len(_NAMESPACE) :]


_OLD_NAMES = {old_name(registry.type_info(cls).wire_name): cls for cls in _BUILT_IN}


def wire_name(info: TypeInfo, old: bool) -> str:
    """The name to write for a class, to the present or to the older release."""
    if old and info.cls in _BUILT_IN and info.wire_name.startswith(_NAMESPACE):
        return old_name(info.wire_name)
    return info.wire_name


def find_class(name: Any) -> TypeInfo:
    """The entry of a class name that was read, whichever release wrote it.

    Raises:
        SerializationError: No class is registered under it.
    """
    try:
        return registry.lookup(name)
    except SerializationError:
        if type(name) is not str or "\\" not in name:
            raise
    if name not in _OLD_NAMES:
        text = printable(name[:200])
        raise SerializationError(f"Unknown class: {text} (import a class with this wire_name on this side too)")
    return registry.type_info(_OLD_NAMES[name])


def shown(value: Any) -> str:
    """A short repr of anything."""
    # Whatever repr() does (a huge int, a broken __repr__), the error about the value is the one to report.
    try:
        text = ascii(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."


# --- annotations ----------------------------------------------------------------------------------------------

_INNER = r"(?P<{0}>\w+)(?:\[.*\])?"
_OPTIONAL = re.compile(
    r"(?:Optional\[" + _INNER.format("a") + r"\]"
    r"|Union\[" + _INNER.format("b") + r",None(?:Type)?\]"
    r"|Union\[None(?:Type)?," + _INNER.format("c") + r"\]"
    r"|" + _INNER.format("d") + r"\|None"
    r"|None\|" + _INNER.format("e") + r""
    r"|" + _INNER.format("f") + r")\Z"
)
_NOISE = re.compile(r"[\s'\"]|\b(?:typing|t|builtins|collections\.abc|abc)\.")
_KINDS = {
    "float": "float", "str": "str", "bytes": "bytes", "bytearray": "bytearray",
    "dict": "dict", "Dict": "dict", "Mapping": "dict", "MutableMapping": "dict",
}  # fmt: skip


def plain_type(annotation: Any) -> str:
    """Which of the types that matter to a format an annotation names, with or without None.

    ``float``, ``"float"``, ``Optional[float]``, ``"float | None"`` and ``Union[None, float]`` are all ``"float"``.
    Nothing is evaluated, so a name that means something else in its module is taken at its word.

    Returns:
        ``"float"``, ``"str"``, ``"bytes"``, ``"bytearray"``, ``"dict"`` (for any mapping), or an empty text.
    """
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):  # list[int] is a type on 3.9 and 3.10
        return _KINDS.get(annotation.__name__, "") if annotation.__module__ == "builtins" else ""
    text = annotation if isinstance(annotation, str) else str(annotation)
    match = _OPTIONAL.match(_NOISE.sub("", text[:200]))
    if match is None or match.lastgroup is None:
        return ""
    # "Union[float, str]" is one name with brackets, too; so is "List[float]".
    return _KINDS.get(match.group(match.lastgroup), "")


# --- reading --------------------------------------------------------------------------------------------------


def convert(code: str) -> Callable[[Any], Any]:
    """The function of a conversion: the source of a statement that changes the value ``v``, or an empty text."""
    return compile_function(["def made(v):", f"    {code or 'pass'}", "    return v"], {})


def builder(info: TypeInfo, keys: Sequence[str], conversions: Sequence[str], otherwise: Builder) -> Builder:
    """Make the function that builds an instance of a class with fields from what was read.

    Args:
        info: The class.
        keys: For each field, the key that it has in the dict that was read.
        conversions: For each field, as for :func:`convert`.
        otherwise: Does the same slowly, if one of the keys is missing.

    Returns:
        A function that takes the dict.
    """
    # Against TypeInfo.build() this spares a dict of the right names and a call with keywords: 0.31 us an object
    # instead of 0.64.
    lines = ["def made(data):", "    try:", "        pass"]
    lines += [f"        v{i} = data[{key!r}]" for i, key in enumerate(keys)]
    lines += ["    except KeyError:", "        pass", "    else:"]
    for i, conversion in enumerate(conversions):
        if conversion:
            lines.append("        " + re.sub(r"\bv\b", f"v{i}", conversion))
    if info.cls in ENVELOPES:
        lines.append(f"        if type(v0) is not str or len(v0) > {MAX_ID_LENGTH}: raise bad_id()")
        lines.append("        if not isinstance(v1, Message): raise bad_content(v1)")
    lines += [
        "        try:",
        f"            return {call_of_class(info, [f'v{i}' for i in range(len(keys))])}",
        "        except Exception as exc:",
        "            raise refused(exc) from exc",
        "    return otherwise(data)",
    ]
    names = {
        "Message": Message,
        "bad_content": _bad_content,
        "bad_id": bad_id,
        "cls": info.cls,
        "otherwise": otherwise,
        "refused": info._refused,
    }
    return compile_function(lines, names)


def bad_id() -> SerializationError:
    """The error about an envelope whose id is no id."""
    return SerializationError(f"the id of an envelope is not a text of at most {MAX_ID_LENGTH} characters")


def _bad_content(value: Any) -> SerializationError:
    return SerializationError(f"the content of an envelope is not a message but {article(type(value))}")


_FORMATS = {
    "JSON": re.compile(rb"\s*[{\[]"),
    "PHP's format": re.compile(rb"[OaC]:[0-9]+:|[NbidsE][:;]"),
    "a pickle": re.compile(rb"\x80[\x02-\x05]"),
}


def other_format(payload: Any, own: str) -> str:
    """What an error about a payload in none of its own format goes on with, if it looks like another."""
    for name, start in _FORMATS.items():
        try:
            if start.match(payload) is not None:
                return "" if name == own else f"; it looks like {name}: do both sides use the same serializer?"
        except TypeError:  # no buffer, which is what the error is about
            break
    return ""


def add_id(error: SerializationError, name: Any, identity: Any) -> None:
    """Say in an error whose request or response it is about, if the class and the id are those of an envelope."""
    try:
        cls = find_class(name).cls
    except SerializationError:
        return
    if cls in ENVELOPES and type(identity) is str and len(identity) <= MAX_ID_LENGTH:
        if cls is RequestEnvelope:
            error.request_id = identity
        else:
            error.response_id = identity


# --- writing --------------------------------------------------------------------------------------------------


class Walk:
    """The slow way of writing: writes a message, or raises the error that names what is wrong in it.

    An own stack instead of recursion, so that a message of 511 levels is also written where the interpreter's stack
    has less left. A subclass says how things are written.
    """

    format = ""

    def __init__(self, old: bool) -> None:
        self.old = old
        self.out: List[str] = []
        self._path: List[str] = []  # one step for each open container
        self._stack: List[Tuple[Iterator[Tuple[str, str, Any]], str]] = []
        self._within: List[int] = []  # ids of the open containers
        self._start = 0  # where in the path the message itself begins, if it is in an envelope

    def value(self, step: str, value: Any) -> None:
        """Write a value, or open it if it is a container. ``step`` is what leads to it, as in ``.items``."""
        raise NotImplementedError

    def text(self, message: Any) -> str:
        """Write a message.

        Raises:
            SerializationError: Something in it cannot travel.
        """
        try:
            return self._text(message)
        except SerializationError:
            raise
        except Exception as exc:  # of a property or a __getattr__
            raise self._error("", describe(exc)) from exc

    def _text(self, message: Any) -> str:
        if not isinstance(message, Message):
            raise SerializationError(
                f"{article(type(message))} cannot be sent by itself: only messages can; derive a class from Message"
            )
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
        return "".join(self.out)

    def open(self, step: str, value: Any, start: str, items: Iterator[Tuple[str, str, Any]], end: str) -> None:
        """Begin a container whose items are (what to write before it, step, value)."""
        if id(value) in self._within:
            self.fail(step, f"contains itself, which {self.format} cannot express")
        if len(self._stack) >= MAX_DEPTH:
            del self._path[self._start + 3 :]  # all of it would be a page
            self.fail("", f"nested deeper than {MAX_DEPTH} levels")
        if step[0] not in ".[":  # a class: the outermost message, or the one in an envelope
            self._start = len(self._path)
        self.out.append(start)
        self._stack.append((items, end))
        self._path.append(step)
        self._within.append(id(value))

    def _error(self, step: str, problem: str) -> SerializationError:
        return SerializationError(f"{''.join(self._path[self._start :])}{step}: {problem}")

    def fail(self, step: str, problem: str) -> NoReturn:
        """Raise the error about what is reached by a step from here."""
        raise self._error(step, problem) from None  # what led here is only how it was found

    def check_text(self, step: str, text: str) -> bytes:
        """The bytes of a text."""
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError as exc:
            self.fail(step, f"text with a lone surrogate (at index {exc.start}) cannot travel in {self.format}")

    def info(self, step: str, value: Any) -> TypeInfo:
        """The entry of the class of a value that is no plain data."""
        cls = type(value)
        try:
            info = registry.type_info(cls)
        except SerializationError as exc:
            self.fail(step, self._advice(value) or str(exc))
        self.check_text(step, info.wire_name)
        if isinstance(value, ENVELOPES):
            content = value.request if isinstance(value, RequestEnvelope) else value.response
            if type(value.id) is not str or len(value.id) > MAX_ID_LENGTH:
                self.fail(step, f"an envelope's id must be a str of at most {MAX_ID_LENGTH} characters")
            if not isinstance(content, Message):
                self.fail(step, f"an envelope must hold a Message, not {article(type(content))}")
        return info

    def _advice(self, value: Any) -> Optional[str]:
        cls = type(value)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return f"{cls.__name__} cannot travel in {self.format}; send base64 text, or use another serializer"
        if isinstance(value, (set, frozenset)):
            return f"{cls.__name__} cannot travel in {self.format}; send a list, or use another serializer"
        if isinstance(value, complex):
            return f"complex cannot travel in {self.format}; send two floats, or use another serializer"
        for base in (str, int, float, dict, list, tuple):
            if isinstance(value, base):
                named = isinstance(value, enum.Enum) or hasattr(cls, "_fields")
                advice = "register it with register_type()" if named else f"convert it with {base.__name__}()"
                return f"{cls.__qualname__} is a subclass of {base.__name__} and would arrive as one; {advice}"
        return None

    def step_to(self, value: Any, name: str, content: Any) -> str:
        """The step to an attribute: for the message in an envelope, its class, where the path begins anew."""
        return type(content).__name__ if isinstance(value, ENVELOPES) and name != "id" else f".{name}"
