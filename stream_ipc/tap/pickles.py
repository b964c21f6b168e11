"""What a pickle says: ``pickletools`` reads its opcodes, and nothing that it names is imported or called.

Knows the opcodes, and the form that ``serializers/pickle.py`` gives to a payload. A call becomes a ``Node`` with the name
of what would have been called, so that plain pickles (``unsafe=True``) can be shown as well. Each opcode costs a bounded
number of steps: nothing is ever copied but the first ``SHOWN`` items.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any

from .tree import SHOWN, Node, Part, Unreadable, Word, last_part, show

__all__ = ["of_shape", "read_pickle"]

_BUILDER = "stream_ipc.serializers.pickle.build"
_SEPARATOR = "\0"  # of the names in a shape

_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": "list", "EMPTY_TUPLE": "tuple", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_GROUPS = {"LIST": "list", "TUPLE": "tuple", "DICT": "dict", "FROZENSET": "set"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = frozenset({"PROTO", "FRAME", "READONLY_BUFFER"})  # opcodes that change nothing that is shown
_LENGTHS = {  # bytes of a length that stands before a text
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def read_pickle(head: bytes, partial: bool) -> Any:
    """Return what a pickle would make, as a tree.

    Args:
        head: The pickle, or the beginning of it.
        partial: Whether it is only the beginning.

    Raises:
        Unreadable: It is no pickle.
    """
    machine = _Machine()
    file = io.BytesIO(head)
    opcodes = pickletools.genops(file)
    at = 0
    while True:
        try:
            opcode, arg, _ = next(opcodes)
        except ValueError as exc:
            if at < len(head) and head[at : at + 1] not in _OPCODES:
                raise Unreadable(f"no opcode at byte {at}") from None
            if file.tell() < len(head):
                raise Unreadable(f"at byte {at}: {exc}") from None
            if not partial:
                raise Unreadable("a pickle that breaks off") from None
            machine.stack += _begun(head[at:])
            return machine.unwind()
        try:
            if opcode.name == "STOP":
                return machine.stack[-1]
            machine.step(opcode.name, arg)
        except (IndexError, KeyError):
            raise Unreadable(f"at byte {at}, a pickle takes what is not there") from None
        at = file.tell()


def _begun(rest: bytes) -> list[Part]:
    """Return the text, or bytes, that breaks off, if there is one."""
    opcode = _OPCODES.get(rest[:1])
    width = _LENGTHS.get(opcode.arg.n, 0) if opcode is not None and opcode.arg is not None else 0
    if opcode is None or not width or len(rest) <= width:
        return []
    size = int.from_bytes(rest[1 : 1 + width], "little")
    start = rest[1 + width :]
    if "UNICODE" in opcode.name:
        return [Part(start.decode("utf-8", "ignore"), size)]
    return [Part(start, size)] if "BYTE" in opcode.name else []


class _Machine:
    """Puts data together as an unpickler does, and calls nothing.

    Attributes:
        stack: What stands above the last mark.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # one stack for each mark
        self._memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        """Carry out one opcode."""
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(Node(_EMPTY[name], []))
        elif name == "MARK":
            self._below.append(stack)
            self.stack = []
        elif name in _TUPLES:
            self._push(Node("tuple", self._pop(_TUPLES[name])))
        elif name in _GROUPS:
            self._push(Node(_GROUPS[name], self._pop_group()))
        elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
            self._extend(self._pop_group())
        elif name in ("APPEND", "SETITEM"):
            self._extend(self._pop(1 if name == "APPEND" else 2))
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name.endswith("PUT"):
            self._memo[arg] = stack[-1]
        elif name.endswith("GET"):
            stack.append(self._memo[arg])
        elif name == "POP":
            self._pop(1) if stack else self._pop_group()
        elif name == "POP_MARK":
            self._pop_group()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            stack.append(Node("object", [], arg.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            self._push(Node("object", [], ".".join([part if type(part) is str else "?" for part in self._pop(2)])))
        elif name in ("REDUCE", "NEWOBJ"):
            self._push(_called(*self._pop(2)))
        elif name == "NEWOBJ_EX":
            self._push(_called(*self._pop(3)[:2]))
        elif name == "INST":
            self._push(_called(Node("object", [], arg.replace(" ", ".")), Node("tuple", self._pop_group())))
        elif name == "OBJ":
            called, *args = self._pop_group() or [None]
            self._push(_called(called, Node("tuple", args)))
        elif name == "BUILD":
            target, state = self._pop(2)
            _set_state(target, state)
            self._push(target)
        elif name == "BINPERSID":
            self._push(Node("object", [None, *self._pop(1)], "persistent id"))
        elif name == "PERSID":
            stack.append(Node("object", [None, arg], "persistent id"))
        elif name.startswith("EXT"):
            stack.append(Node("object", [], f"extension {arg}"))
        elif name == "NEXT_BUFFER":
            stack.append(Node("object", [], "buffer"))
        elif name not in _NOTHING:
            stack.append(bytes(arg) if type(arg) is bytearray else arg)

    def unwind(self) -> Any:
        """Put together what is on the stack of a pickle that breaks off."""
        while self._below:
            group = self._pop_group()
            _fold(group)
            below = self.stack[-1] if self.stack else None
            if isinstance(below, Node) and below.kind in ("list", "dict", "set") and not below.items:
                below.items += group
                below.cut = True
            elif _is_builder(below) and group and type(group[0]) is str:
                self.stack[-1] = of_shape(group[0], group[1:], True)
            else:
                self._push(Node("tuple", group, cut=True))
        _fold(self.stack)
        if not self.stack:
            raise Unreadable("nothing whole is in what was looked at")
        return self.stack[0]

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _pop_group(self) -> list[Any]:
        group = self.stack
        self.stack = self._below.pop()
        return group

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Node):
            raise IndexError
        target.items += items


def _is_builder(value: Any) -> bool:
    return isinstance(value, Node) and value.name == _BUILDER and not value.items


def _fold(group: list[Any]) -> None:
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
        # Up to three items become a tuple without a mark.
        for at in range(len(group) - 2, max(-1, len(group) - 5), -1):
            shape = group[at + 1]
            if _is_builder(group[at]) and type(shape) is str and _SEPARATOR in shape:
                group[at:] = [of_shape(shape, group[at + 2 :], True)]
                break
    if len(group) > 1 and isinstance(group[-1], Node) and group[-1].kind == "dict":
        before = group[-2]
        if isinstance(before, Node) and before.kind == "object" and not before.items:
            _set_state(before, group.pop())
            before.cut = True
        elif len(group) > 2 and type(before) is str and _is_builder(group[-3]):
            group[-3:] = [Node("object", group[-1].items, before, cut=True)]


def of_shape(shape: str, values: list[Any], cut: bool) -> Node:
    """Return the object of a shape and its values.

    Args:
        shape: A wire name and the names of the fields; or a wire name alone, and the one value is a dict.
        values: The values.
        cut: Whether there may be more values.
    """
    name, *names = shape.split(_SEPARATOR, SHOWN)
    if names:
        cut = cut or len(values) < len(names)
        return Node("object", [part for pair in zip(names, values) for part in pair], name, cut)
    fields = values[0] if values and isinstance(values[0], Node) else Node("dict", [], cut=True)
    return Node("object", fields.items, name, fields.cut)


def _called(called: Any, args: Any) -> Any:
    """Return what stands for the result of a call."""
    items = args.items if isinstance(args, Node) else [args]
    name = called.name if isinstance(called, Node) else show(called)
    ours = items[0].items if len(items) == 1 and isinstance(items[0], Node) else []
    if name == _BUILDER and ours and type(ours[0]) is str:
        if len(ours) != 2 or _SEPARATOR in ours[0]:
            return of_shape(ours[0], ours[1 : SHOWN + 1], False)
        name, content = ours
        if not isinstance(content, Node):  # an enum
            return Word(f"{last_part(name)}.{content}" if type(content) is str else f"{last_part(name)}({show(content)})")
        if content.kind == "dict":
            return Node("object", content.items, name)
        items = content.items
    return Node("object", [part for item in items[:SHOWN] for part in (None, item)], name, len(items) > SHOWN)


def _set_state(target: Any, state: Any) -> None:
    if not isinstance(target, Node):
        return
    for part in state.items[:2] if isinstance(state, Node) and state.kind == "tuple" else [state]:
        if isinstance(part, Node) and part.kind == "dict":
            # Only what is shown: an object whose state is itself would double each time.
            target.cut = target.cut or part.cut or len(part.items) > SHOWN
            if len(target.items) < SHOWN:
                target.items = target.items + part.items[:SHOWN]
