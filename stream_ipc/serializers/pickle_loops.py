"""Pickled structures that contain themselves and hold objects.

Knows the resolver of objects, of which this is the thorough one. Must not know messages.
"""

from __future__ import annotations

from .pickle_objects import ATOMS, Handle, Resolver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["LoopResolver"]


class LoopResolver(Resolver):
    """Does what a ``Resolver`` does for what contains itself and holds objects that do not: it finds the loops first.

    Only a payload that a ``Resolver`` has given up on is worth the time.
    """

    __slots__ = ()

    def resolve_all(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        for group in _groups(values):  # and each is complete before anything that holds it
            if len(group) > 1 or any([part is group[0] for part in _parts_of(group[0])]):
                self._resolve_loop(group)
            else:
                self.item(group[0])
        return super().resolve_all(values)

    def _resolve_loop(self, group: list[Any]) -> None:
        if any([type(value) is Handle for value in group]):
            raise self.loop_error()
        changeable = [value for value in group if type(value) in (list, dict, set)]
        for value in changeable:
            self.done[id(value)] = value
        for value in group:  # tuples are made anew, of what is not filled yet
            self.item(value)
        for value in changeable:
            self.fill(value)


def _parts_of(value: Any) -> Any:
    if type(value) is dict:
        return [*value, *value.values()]
    return value if isinstance(value, (list, tuple, set, frozenset)) else ()


def _groups(root: Any) -> list[list[Any]]:
    """Return everything in a structure in groups: what contains each other is one. A group's content comes before it.

    This is Tarjan's algorithm, with a stack of its own.
    """
    groups: list[list[Any]] = []
    order = {id(root): 0}
    low = {id(root): 0}
    path = [root]  # what is in no group yet
    on_path = {id(root)}
    work = [(root, iter(_parts_of(root)))]
    while work:
        value, parts = work[-1]
        key = id(value)
        for part in parts:
            other = id(part)
            if type(part) in ATOMS:
                continue
            if other not in order:
                order[other] = low[other] = len(order)
                path.append(part)
                on_path.add(other)
                work.append((part, iter(_parts_of(part))))
                break
            if other in on_path:
                low[key] = min(low[key], order[other])
        else:
            del work[-1]
            if work:
                above = id(work[-1][0])
                low[above] = min(low[above], low[key])
            if low[key] == order[key]:
                at = next(index for index in range(len(path) - 1, -1, -1) if path[index] is value)
                groups.append(path[at:])
                on_path.difference_update(map(id, path[at:]))
                del path[at:]
    return groups
