"""What a pickle says: ``pickletools`` reads its opcodes, and nothing that it names is imported or called.

Knows the opcodes, and the form that ``serializers/pickle.py`` gives to a payload. A call becomes a ``Node`` with the name
of what would have been called, so that plain pickles (``unsafe=True``) can be shown as well. Each opcode costs a bounded
number of steps: nothing is ever copied but the first ``SHOWN`` items.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any

from ..serializers.pickle_objects import GLOBAL, SEPARATOR
from .tree import SHOWN, Node, Part, Unreadable, Word, last_part, show

__all__ = ["of_shape", "read_pickle"]

_BUILDER = ".".join(GLOBAL)

_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_LENGTHS = {  # bytes of a length that stands before a text
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False}
_CONTAINERS = {
    **dict.fromkeys(["EMPTY_LIST", "LIST"], "list"),
    **dict.fromkeys(["EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"], "tuple"),
    **dict.fromkeys(["EMPTY_DICT", "DICT"], "dict"),
    **dict.fromkeys(["EMPTY_SET", "FROZENSET"], "set"),
}


def read_pickle(head: bytes, partial: bool) -> Any:
    """Return what a pickle, or the beginning of one, would make, as a tree, or raise Unreadable."""
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
            return machine.unwind(_begun(head[at:]))
        try:
            if opcode.name == "STOP":
                return machine.stack[-1]
            machine.step(opcode, arg)
        except (AttributeError, IndexError, KeyError):
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

    def step(self, opcode: pickletools.OpcodeInfo, arg: Any) -> None:
        """Carry out one opcode."""
        name = opcode.name
        if name == "MARK":
            self._below.append(self.stack)
            self.stack = []
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif name.endswith("PUT"):
            self._memo[arg] = self.stack[-1]
        elif name == "POP" and not self.stack:
            self.stack = self._below.pop()
        else:
            taken = self._take(opcode.stack_before)
            if opcode.stack_after:
                self.stack.append(self._made(name, arg, taken))
            if name == "DUP":
                self.stack.append(taken[0])

    def _take(self, kinds: list[pickletools.StackObject]) -> list[Any]:
        """Pop what an opcode takes, the items above a mark included."""
        group: list[Any] = []
        count = len(kinds)
        if pickletools.markobject in kinds:
            count = kinds.index(pickletools.markobject)
            group = self.stack
            self.stack = self._below.pop()
        if len(self.stack) < count:
            raise IndexError
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken + group if taken else group

    def _made(self, name: str, arg: Any, taken: list[Any]) -> Any:
        """Return what an opcode makes of what it has taken."""
        if name in _CONTAINERS:
            return Node(_CONTAINERS[name], taken)
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name.startswith(("APPEND", "SETITEM", "ADDITEM")):
            taken[0].items += taken[1:]
            return taken[0]
        if name.endswith("GET"):
            return self._memo[arg]
        if name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            return _called(taken[0], taken[1])
        if name == "GLOBAL":
            return Node("object", [], arg.replace(" ", "."))
        if name == "STACK_GLOBAL":
            return Node("object", [], ".".join([part if type(part) is str else "?" for part in taken]))
        if name == "BUILD":
            return _set_state(*taken)
        if name == "INST":
            return _called(Node("object", [], arg.replace(" ", ".")), Node("tuple", taken))
        if name == "OBJ":
            return _called(taken[0], Node("tuple", taken[1:]))
        if name.startswith("EXT") or name in ("PERSID", "BINPERSID", "NEXT_BUFFER"):
            return Word(f"<{name.lower()} {show(taken[0]) if taken else arg}>")
        if taken:  # DUP, READONLY_BUFFER
            return taken[0]
        return bytes(arg) if type(arg) is bytearray else arg

    def unwind(self, begun: list[Part]) -> Any:
        """Put together what is on the stack of a pickle that breaks off, and the text that does."""
        self.stack += begun
        while self._below:
            group = self.stack
            self.stack = self._below.pop()
            _fold(group)
            below = self.stack[-1] if self.stack else None
            if isinstance(below, Node) and below.kind in ("list", "dict", "set") and not below.items:
                below.items += group
                below.cut = True
            elif _is_builder(below) and group and type(group[0]) is str:
                self.stack[-1] = of_shape(group[0], group[1:], True)
            else:
                self.stack.append(Node("tuple", group, cut=True))
        _fold(self.stack)
        if not self.stack:
            raise Unreadable("nothing whole is in what was looked at")
        return self.stack[0]


def _is_builder(value: Any) -> bool:
    return isinstance(value, Node) and value.name == _BUILDER and not value.items


def _fold(group: list[Any]) -> None:
    """Give the last items of a group to what they would have become part of, the innermost first."""
    at = len(group) - 2
    while at >= max(0, len(group) - 4):
        owner, rest = group[at], group[at + 1 :]
        at -= 1
        if not isinstance(owner, Node) or owner.items:
            continue
        is_dict = isinstance(rest[0], Node) and rest[0].kind == "dict"
        # Without a mark there are one item of a list, two of a dict, and up to three of a tuple.
        if (owner.kind, len(rest)) in (("list", 1), ("dict", 2)):
            owner.items, owner.cut = rest, True
        elif _is_builder(owner) and type(rest[0]) is str and (len(rest) > 1 or SEPARATOR in rest[0]):
            owner = of_shape(rest[0], rest[1:], True)
        elif owner.kind == "object" and is_dict and len(rest) == 1:
            owner = _set_state(owner, rest[0])
            owner.cut = True
        else:
            continue
        group[at + 1 :] = [owner]
        at = len(group) - 2


def of_shape(shape: str, values: list[Any], cut: bool) -> Node:
    """Return the object of a shape and its values.

    Args:
        shape: A wire name and the names of the fields; or a wire name alone, and the one value is a dict.
        values: Of the fields.
        cut: Whether there may be more values.
    """
    name, *names = shape.split(SEPARATOR, SHOWN)
    if names:
        cut = cut or len(values) < len(names)
        return Node("object", [part for pair in zip(names, values) for part in pair], name, cut)
    fields = values[0] if values and isinstance(values[0], Node) else Node("dict", [], cut=True)
    return Node("object", fields.items, name, fields.cut or cut)


def _called(called: Any, args: Any) -> Any:
    """Return what stands for the result of a call."""
    items = args.items if isinstance(args, Node) else [args]
    name = called.name if isinstance(called, Node) else show(called)
    ours = items[0].items if len(items) == 1 and isinstance(items[0], Node) else []
    if name == _BUILDER and ours and type(ours[0]) is str:
        name = ours[0]
        if len(ours) != 2 or SEPARATOR in name or (isinstance(ours[1], Node) and ours[1].kind == "dict"):
            return of_shape(name, ours[1 : SHOWN + 1], False)
        if not isinstance(ours[1], Node):  # an enum
            return Word(
                f"{last_part(name)}.{ours[1]}" if type(ours[1]) is str else f"{last_part(name)}({show(ours[1])})"
            )
        items = ours[1].items
    return Node("object", [part for item in items[:SHOWN] for part in (None, item)], name, len(items) > SHOWN)


def _set_state(target: Any, state: Any) -> Any:
    """Return an object with its attributes."""
    if isinstance(target, Node):
        for part in state.items[:2] if isinstance(state, Node) and state.kind == "tuple" else [state]:
            if isinstance(part, Node) and part.kind == "dict":
                # Only what is shown: an object that is its own state would double each time.
                target.cut = target.cut or part.cut or len(part.items) > SHOWN
                if len(target.items) < SHOWN:
                    target.items = target.items + part.items[:SHOWN]
    return target
