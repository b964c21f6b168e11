"""What a payload says, in any of the three formats, also if only its beginning is at hand.

Knows the formats of the serializers. Must not know the registry: nothing is built, imported or called, so it needs none
of the program's modules, and a payload may say whatever it wants. What is read becomes a tree of plain values and
``Node``, and that becomes a line of text; both are bounded by what is looked at, not by what the payload announces.
"""

from __future__ import annotations

import json
import pickletools
import re
import struct
from typing import Any, Callable, Dict, List, NamedTuple, NoReturn

from ..serializers import php_reading as php

__all__ = ["FORMATS", "Content", "look"]

_VIEW = 160  # characters of the fields
_TEXT = 60  # characters of one text in them
_NAME = 200  # characters of a class name
_BYTES = 24  # bytes of one
_DEPTH = 6  # levels of them

# By the last part of its name: the kind of an envelope, and the field with its message.
_ENVELOPES = {"RequestEnvelope": "request", "ResponseEnvelope": "response"}


class Content(NamedTuple):
    """What a payload says.

    Attributes:
        kind: ``"request"``, ``"response"``, ``"notification"`` or ``"unreadable"``.
        id: That of the envelope, or an empty text.
        name: The message's class, as it is called on the wire.
        view: The class and the fields, shortened; of what is unreadable, why it is.
    """

    kind: str
    id: str
    name: str
    view: str


class Node:
    """A list, tuple, set, dict or object.

    Attributes:
        kind: ``"list"``, ``"tuple"``, ``"set"``, ``"dict"`` or ``"object"``.
        items: What is in it; of a dict or object, keys and values in turn. An object's key may be None.
        name: An object's class.
        cut: Whether there is more of it than was looked at.
    """

    __slots__ = ("cut", "items", "kind", "name")

    def __init__(self, kind: str, items: List[Any], name: str = "", cut: bool = False) -> None:
        self.kind: str = kind
        self.items: List[Any] = items
        self.name: str = name
        self.cut: bool = cut

    def get(self, key: str) -> Any:
        """The value of a field, or None."""
        for index in range(0, len(self.items) - 1, 2):
            if type(self.items[index]) is str and self.items[index] == key:
                return self.items[index + 1]
        return None


class _Part:
    """A text, or bytes, of which only the beginning was looked at."""

    def __init__(self, start: Any, size: int) -> None:
        self.start = start
        self.size = size


class _Word(str):
    """A text that is shown as it is: the name of an enum's member, a reference."""


class _Unreadable(Exception):
    """It is not in this format, or no message."""


class _Cut(Exception):
    """The payload goes on, but what was looked at has ended."""


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
        content = _content(FORMATS[format](head, len(head) < size))
        # Names and ids are the sender's, and could clear a screen or begin a line of their own.
        return Content(*map(_printable, content))
    except _Unreadable as exc:
        text = str(exc)
    except Exception as exc:  # of hostile bytes there are more kinds than one can list
        text = f"{type(exc).__name__}: {exc}"
    text = f"not a message in {format}: {_printable(text[:_VIEW])}; begins with {head[:32]!r}"
    return Content("unreadable", "", "", text)


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text])


def _content(root: Any) -> Content:
    if not isinstance(root, Node):
        raise _Unreadable("a plain value")
    kind, id = "notification", ""
    if root.kind == "tuple" and len(root.items) >= 3:
        # The safe pickle: (kind, id, shape, value, ...).
        number, found, name, *rest = root.items
        kinds = {0: "notification", 1: "request", 2: "response"}
        if type(number) is not int or number not in kinds or type(name) is not str:
            raise _Unreadable("a tuple of something else")
        root = _of_shape(name, rest, root.cut)
        kind = kinds[number]
        id = found if type(found) is str else ""
    elif root.kind != "object":
        raise _Unreadable(f"a {root.kind}")
    else:
        key = _ENVELOPES.get(_last(root.name))
        if key is not None:
            kind = key
            found = root.get("id")
            id = found if type(found) is str else _text(found, [_TEXT])
            root = root.get(key)
            if not isinstance(root, Node) or root.kind != "object":
                return Content(kind, id, "?", "..." if root is None else _text(root, [_VIEW]))
    return Content(kind, id, root.name[:_NAME], _text(root, [_VIEW + len(root.name[:_NAME])]))


# -- a tree as text

_BRACKETS = {"list": ("[", "]"), "tuple": ("(", ")"), "set": ("{", "}"), "dict": ("{", "}"), "object": ("(", ")")}


def _text(value: Any, left: List[int], depth: int = 0) -> str:
    """A value as text.

    Args:
        value: The value.
        left: How many characters it may have, counted down. What occurs in a tree again and again is written again and
            again, so this is what bounds the time.
        depth: How many levels it is in.
    """
    if type(value) is list:  # of JSON
        value = Node("list", value)
    if not isinstance(value, Node):
        text = _leaf(value)
        left[0] -= len(text)
        return text
    first, last = _BRACKETS[value.kind]
    # Of the message's class one wants to know the exact name; of what is in it, it would fill the line.
    name = (_last(value.name) if depth else value.name)[:_NAME]
    left[0] -= len(name) + 2
    if depth >= _DEPTH:
        return f"{name}{first}...{last}"
    keyed = value.kind in ("dict", "object")
    parts: List[str] = []
    cut = value.cut
    step = 2 if keyed else 1
    for index in range(0, len(value.items) - step + 1, step):
        if left[0] <= 0:
            cut = True
            break
        left[0] -= 2
        item = value.items[index]
        if not keyed:
            parts.append(_text(item, left, depth + 1))
            continue
        key = ""
        if value.kind == "dict":
            key = f"{_text(item, left, depth + 1)}: "
        elif item is not None:
            key = f"{item[:_TEXT] if isinstance(item, str) else _leaf(item)}="
            left[0] -= len(key)
        parts.append(key + _text(value.items[index + 1], left, depth + 1))
    if cut:
        count = len(value.items)
        parts.append("..." if keyed or value.cut else f"... {count} items")
    end = "," if value.kind == "tuple" and len(parts) == 1 and not cut else ""
    return f"{name}{first}{', '.join(parts)}{end}{last}"


def _last(name: str) -> str:
    """The last part of a class's name, in Python or in PHP."""
    return re.split(r"[\\.]", name)[-1]


def _leaf(value: Any) -> str:
    if isinstance(value, _Word):
        return value[:_NAME]
    if isinstance(value, _Part):
        return _shortened(value.start, value.size)
    if isinstance(value, str) and value.endswith(_BROKEN):
        return f"{repr(value[:-1][:_TEXT])[:-1]}...'"
    if isinstance(value, (str, bytes)) and len(value) > (_TEXT if isinstance(value, str) else _BYTES):
        return _shortened(value, len(value))
    if type(value) is int and value.bit_length() > 200:
        return f"<int of {value.bit_length()} bits>"  # finding out its digits may take long
    return repr(value)


def _shortened(start: Any, size: int) -> str:
    binary = isinstance(start, bytes)
    text = repr(start[: _BYTES if binary else _TEXT])
    return f"{text[:-1]}...{text[-1]} ({size} {'bytes' if binary else 'characters'})"


# -- JSON

# Ends a text that breaks off, so that nobody takes what is there for all of it. For private use, says Unicode.
_BROKEN = "\ue000"


def _json(head: bytes, partial: bool) -> Any:
    text = head.decode("utf-8", "replace" if partial else "strict")
    if partial:
        text = _completed(text)
    root = json.loads(text, object_pairs_hook=_json_object, parse_int=_json_int)
    if partial and isinstance(root, Node):
        root.cut = True
    return root


def _json_object(pairs: Any) -> Node:
    items: List[Any] = []
    name = None
    for key, value in pairs:
        if key == "__class" and type(value) is str:
            name = value.replace(_BROKEN, "...")
        else:
            items += (key, value)
    return Node("dict", items) if name is None else Node("object", items, name)


def _json_int(text: str) -> Any:
    return int(text) if len(text) < 40 else _Word(f"<int of {len(text)} digits>")


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.S)


def _completed(text: str) -> str:
    """JSON that breaks off, with an end put to what is open."""
    open_: List[str] = []
    at = 0
    for found in _JSON_TOKEN.finditer(text):
        at = found.end()
        token = found[0]
        if token in "[{":
            open_.append("]" if token == "[" else "}")
        elif token in "]}" and open_:
            open_.pop()
    # Behind the last whole token there is no bracket and no whole text, but perhaps the beginning of one.
    tail = text[at:]
    quote = tail.find('"')
    if quote >= 0:
        before = text[: at + quote].rstrip()
        if before.endswith((":", "[")) or (before.endswith(",") and open_[-1:] == ["]"]):
            part = re.sub(r"\\(?:u[0-9a-fA-F]{0,3})?\Z", "", tail[quote:])
            text = f'{before}{part}{_BROKEN}"'
        else:
            text = before  # a key
    else:
        text = re.sub(r"[-+.\w]+\Z", "", text)  # a number, or a word, that may not be whole
    text = text.rstrip()
    if text.endswith(":"):
        text += "null"
    elif open_[-1:] == ["}"] and re.search(r'[{,]\s*"(?:[^"\\]|\\.)*"\Z', text):
        text += ":null"
    return text.rstrip(",") + "".join(reversed(open_))


# -- PHP


def _php(head: bytes, partial: bool) -> Any:
    text = head.decode("latin-1")
    open_: List[List[Any]] = []  # [container, how many keys and values are still to come]
    at = 0
    root: Any = None
    try:
        while True:
            value, at = _php_value(text, at, partial)
            count = 0
            if isinstance(value, tuple):  # a container and how many keys and values it has
                value, count = value
            if not open_:
                root = value
            else:
                open_[-1][0].items.append(value)
                open_[-1][1] -= 1
            if isinstance(value, Node):
                open_.append([value, count])
            while open_ and not open_[-1][1]:
                if text[at : at + 1] != "}":
                    _php_end(text, at, partial)
                _php_close(open_.pop()[0])
                at += 1
            if not open_:
                return root
    except _Cut as exc:
        for container, left in open_:
            container.cut = True
            if len(container.items) % 2 and exc.args:  # a value that has begun
                container.items.append(exc.args[0])
            elif len(container.items) % 2 and container is open_[-1][0]:
                container.items.pop()
            del left
        if root is None:
            raise _Unreadable("nothing whole is in what was looked at") from None
        for container, _ in reversed(open_):
            _php_close(container)
        return root


def _php_end(text: str, at: int, partial: bool) -> NoReturn:
    if partial and at >= len(text) - 600:  # as long as what stands before a value may be
        raise _Cut
    raise _Unreadable(f"at byte {at}, something that is not PHP's format")


def _php_value(text: str, at: int, partial: bool) -> Any:
    found = php.TOKEN(text, at)
    if found is None:
        _php_end(text, at, partial)
    kind: Any = found.lastindex
    end = found.end()
    if kind == php.STRING:
        size = int(found[1])
        value = _php_text(text[end : end + size])
        if end + size + 2 > len(text):
            if partial:
                raise _Cut(_Part(value, size))
            _php_end(text, at, False)
        return value, end + size + 2
    if kind == php.ARRAY:
        return (Node("dict", []), 2 * int(found[3])), end
    if kind == php.OBJECT:
        return (Node("object", [], str(_php_text(found[5]))), 2 * int(found[6])), end
    if kind == php.INT:
        return int(found[2]), end
    if kind == php.BOOL:
        return found[7] == "1", end
    if kind == php.FLOAT:
        return float(found[9]), end
    if kind == php.ENUM:
        return _Word(f"{_last(found[15])}::{found[16]}"), end
    return None if kind == php.NULL else _Word(f"<value {found[kind]} again>"), end


def _php_text(raw: str) -> Any:
    data = raw.encode("latin-1")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _php_close(container: Node) -> None:
    items = container.items
    if container.kind == "object":
        items[::2] = [key[key.find("\0", 1) + 1 :] if str(key)[:1] == "\0" else key for key in items[::2]]
    elif items[::2] == list(range(len(items[::2]))):
        container.kind = "list"
        container.items = items[1::2]


# -- pickle

_MARK = object()  # on the stack: where a group of items begins
_LENGTHS = {-2: struct.Struct("<B"), -3: struct.Struct("<i"), -4: struct.Struct("<I"), -5: struct.Struct("<Q")}
_FIXED = {1: struct.Struct("<B"), 2: struct.Struct("<H"), 4: struct.Struct("<i"), 8: struct.Struct("<Q")}
_DOUBLE = struct.Struct(">d")
_OPCODES = {ord(op.code): op for op in pickletools.opcodes}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": "list", "EMPTY_TUPLE": "tuple", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_GROUPS = {"LIST": "list", "TUPLE": "tuple", "DICT": "dict", "FROZENSET": "set"}
_BUILDER = "stream_ipc.serializers.pickle.build"
_SEPARATOR = "\0"  # of the names in a shape; see serializers/pickle.py


class _Pickle:
    """A machine that runs a pickle's opcodes as far as they put data together, and calls nothing.

    What a call would have made becomes a ``Node`` with the name of what would have been called, so that plain pickles
    (``unsafe=True``) can be shown too.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: List[Any] = []
        self._memo: Dict[int, Any] = {}

    def run(self, partial: bool) -> Any:
        try:
            while True:
                if self._at >= len(self._data):
                    raise _Cut
                op = _OPCODES.get(self._data[self._at])
                if op is None:
                    raise _Unreadable(f"no opcode at byte {self._at}")
                self._at += 1
                if op.name == "STOP":
                    return self._stack[-1]
                self._step(op.name, self._argument(op))
        except _Cut:
            if not partial:
                raise _Unreadable("a pickle that breaks off") from None
            return self._unwind()

    def _take(self, count: int) -> bytes:
        start = self._at
        self._at = start + count
        if self._at > len(self._data):
            raise _Cut
        return self._data[start : self._at]

    def _argument(self, op: Any) -> Any:
        """What stands behind an opcode."""
        if op.arg is None:
            return None
        n = op.arg.n
        if n == pickletools.UP_TO_NEWLINE:
            lines = []
            for _ in range(2 if op.name in ("GLOBAL", "INST") else 1):
                end = self._data.find(b"\n", self._at)
                lines.append(self._take((end if end >= 0 else len(self._data)) + 1 - self._at)[:-1])
            return b".".join(lines).decode("latin-1")
        if n >= 0:
            data = self._take(n)
            return _DOUBLE.unpack(data)[0] if op.name == "BINFLOAT" else _FIXED[n].unpack(data)[0]
        size = _LENGTHS[n].unpack(self._take(_LENGTHS[n].size))[0]
        if size < 0:
            raise _Unreadable(f"a negative length at byte {self._at}")
        start = self._data[self._at : self._at + size]
        self._at += size
        if op.name in ("LONG1", "LONG4"):
            if len(start) < size:
                raise _Cut
            return int.from_bytes(start, "little", signed=True)
        value: Any = start
        if "UNICODE" in op.name or "STRING" in op.name:
            value = start.decode("utf-8", "backslashreplace")
        if len(start) < size:
            self._stack.append(_Part(value, size))
            raise _Cut
        return value

    def _step(self, name: str, arg: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(Node(_EMPTY[name], []))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(Node("tuple", self._pop(int(name[-1]))))
        elif name in _GROUPS:
            stack.append(Node(_GROUPS[name], self._pop_group()))
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            self._extend(self._pop_group())
        elif name in ("APPEND", "SETITEM"):
            self._extend(self._pop(1 if name == "APPEND" else 2))
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name.endswith("PUT"):
            self._memo[int(arg)] = self._top()
        elif name.endswith("GET"):
            stack.append(self._memo[int(arg)])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._pop_group()
        elif name == "DUP":
            stack.append(self._top())
        elif name == "GLOBAL":
            stack.append(Node("object", [], arg))
        elif name == "STACK_GLOBAL":
            stack.append(Node("object", [], ".".join(map(str, self._pop(2)))))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_called(*self._pop(2)))
        elif name == "NEWOBJ_EX":
            stack.append(_called(*self._pop(3)[:2]))
        elif name in ("OBJ", "INST"):
            group = self._pop_group()
            called = Node("object", [], arg) if name == "INST" else group.pop(0)
            stack.append(_called(called, Node("tuple", group)))
        elif name == "BUILD":
            target, state = self._pop(2)
            _set_state(target, state)
            stack.append(target)
        elif name.startswith("EXT"):
            stack.append(Node("object", [], f"extension {arg}"))
        elif name.endswith("PERSID"):
            id = self._pop(1)[0] if name == "BINPERSID" else arg
            stack.append(Node("object", [None, id], "persistent id"))
        elif name == "NEXT_BUFFER":
            stack.append(Node("object", [], "buffer"))
        elif name not in ("PROTO", "FRAME", "READONLY_BUFFER"):
            stack.append(arg)

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            self._fail()
        return self._stack[-1]

    def _fail(self) -> NoReturn:
        raise _Unreadable(f"at byte {self._at}, a pickle takes more than there is")

    def _pop(self, count: int) -> List[Any]:
        items = self._stack[-count:]
        if len(items) < count or any([item is _MARK for item in items]):
            self._fail()
        del self._stack[-count:]
        return items

    def _pop_group(self) -> List[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                group = self._stack[index + 1 :]
                del self._stack[index:]
                return group
        self._fail()

    def _extend(self, items: List[Any]) -> None:
        if not isinstance(self._top(), Node):
            self._fail()
        self._stack[-1].items.extend(items)

    def _unwind(self) -> Any:
        """Put together what is on the stack, though not all of it is there."""
        stack = self._stack
        while _MARK in stack:
            group = self._pop_group()
            _fold(group)
            below = stack[-1] if stack else None
            if isinstance(below, Node) and below.kind in ("list", "dict", "set") and not below.items:
                below.items.extend(group)
                below.cut = True
            elif _is_builder(below) and group and type(group[0]) is str:
                stack[-1] = _of_shape(group[0], group[1:], True)
            else:
                stack.append(Node("tuple", group, cut=True))
        _fold(stack)
        if not stack:
            raise _Unreadable("nothing whole is in what was looked at")
        return stack[0]


def _is_builder(value: Any) -> bool:
    return isinstance(value, Node) and value.name == _BUILDER and not value.items


def _fold(group: List[Any]) -> None:
    """Give the last items of a group to what they would have become part of."""
    size = 0
    while size != len(group):  # the innermost first
        size = len(group)
        # One item is put into a dict or list without a mark before it.
        for count, kind in ((2, "dict"), (1, "list")):
            below = group[-count - 1] if len(group) > count else None
            if isinstance(below, Node) and below.kind == kind and not below.items:
                below.items = group[-count:]
                below.cut = True
                del group[-count:]
                break
        # And up to three items become a tuple without a mark.
        for at in range(len(group) - 2, max(-1, len(group) - 5), -1):
            shape = group[at + 1]
            if _is_builder(group[at]) and type(shape) is str and _SEPARATOR in shape:
                group[at:] = [_of_shape(shape, group[at + 2 :], True)]
                break
    if len(group) > 1 and isinstance(group[-1], Node) and group[-1].kind == "dict":
        before = group[-2]
        if isinstance(before, Node) and before.kind == "object" and not before.items:
            _set_state(before, group.pop())
            before.cut = True
        elif len(group) > 2 and type(before) is str and getattr(group[-3], "name", "") == _BUILDER:
            group[-3:] = [Node("object", group[-1].items, before, cut=True)]


def _of_shape(shape: str, values: List[Any], cut: bool) -> Node:
    """The object of a wire name, the names of its fields, and their values; or of a wire name and a dict."""
    name, *names = shape.split(_SEPARATOR)
    if names:
        cut = cut or len(values) < len(names)
        return Node("object", [part for pair in zip(names, values) for part in pair], name, cut)
    fields = values[0] if values and isinstance(values[0], Node) else Node("dict", [], cut=True)
    return Node("object", fields.items, name, fields.cut)


def _called(called: Any, args: Any) -> Any:
    """What a call would have made."""
    items = args.items if isinstance(args, Node) else [args]
    name = called.name if isinstance(called, Node) else _leaf(called)
    ours = items[0].items if len(items) == 1 and isinstance(items[0], Node) else []
    if name == _BUILDER and ours and type(ours[0]) is str and (len(ours) != 2 or _SEPARATOR in ours[0]):
        return _of_shape(ours[0], ours[1:], False)
    if name == _BUILDER and len(ours) == 2 and type(ours[0]) is str:  # (wire name, content)
        name, content = ours
        if not isinstance(content, Node):
            return _Word(f"{_last(name)}.{content}" if type(content) is str else f"{_last(name)}({_leaf(content)})")
        if content.kind == "dict":
            return Node("object", content.items, name)
        items = content.items
    return Node("object", [part for item in items for part in (None, item)], name)


def _set_state(target: Any, state: Any) -> None:
    if not isinstance(target, Node):
        return
    for part in state.items if isinstance(state, Node) and state.kind == "tuple" else [state]:
        if isinstance(part, Node) and part.kind == "dict":
            target.items = target.items + part.items


FORMATS: Dict[str, Callable[[bytes, bool], Any]] = {
    "json": _json,
    "php": _php,
    "pickle": lambda head, partial: _Pickle(head).run(partial),
}
