"""Why a message could not be pickled: finds the field that cannot travel.

Knows the registry and how the pickle serializer takes objects apart. Imported when there is such an error.
"""

from __future__ import annotations

from itertools import chain

from .. import registry
from ..errors import SerializationError, article, describe
from ..interruptions import pass_on
from ..messages import Message
from .pickle_objects import ATOMS, enum_key
from .values import reducer_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["explain"]


def explain(message: Any, exc: Exception) -> SerializationError:
    """Return the error about a message that cannot be pickled because of ``exc``; raise ``exc`` itself if it says all."""
    if not isinstance(message, Message):
        return SerializationError(
            f"{article(type(message))} cannot be sent by itself: only messages can; derive a class from Message"
        )
    if isinstance(exc, RecursionError):
        return SerializationError(f"{type(message).__name__} cannot be sent: it contains itself or is nested too deeply")
    try:
        found = _find(message, type(message).__name__, {})
    except Exception as error:  # a message whose own attributes fail: the first error tells more
        pass_on(error)
        found = None
    if found is not None:
        return SerializationError(f"{found[0]}: {found[1]}")
    if isinstance(exc, SerializationError):
        raise exc  # with its own cause
    return SerializationError(f"{type(message).__name__} cannot be sent: {describe(exc)}")


def _find(value: Any, path: str, seen: dict[int, Any]) -> tuple[str, str] | None:
    """Return the path to the first value that cannot travel, and why."""
    cls = type(value)
    if cls in ATOMS or id(value) in seen:
        return None
    seen[id(value)] = value  # alive, so that no other has its id
    parts: Any
    if cls in (list, tuple, set, frozenset):
        parts = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif cls is dict:
        parts = chain(
            ((f"key of {path}", key) for key in value), ((f"{path}[{key!r:.40}]", item) for key, item in value.items())
        )
    else:
        try:
            parts = _parts(cls, value, path)
        except Exception as exc:
            pass_on(exc)
            return path, str(exc) if isinstance(exc, SerializationError) else describe(exc)
    for inner_path, item in parts:
        found = _find(item, inner_path, seen)
        if found is not None:
            return found
    return None


def _parts(cls: type, value: Any, path: str) -> list[tuple[str, Any]]:
    """Return what an object is made of, with the path to each; raises if it cannot be taken apart."""
    info = registry.by_class.get(cls)
    if info is None:
        reducer = reducer_of(cls)
        if reducer is None:
            raise registry.not_registered(cls)
        try:
            return [(path, item) for item in reducer(value)[1]]
        except ValueError as exc:  # of values.py, whose text says all
            raise SerializationError(str(exc)) from exc
    if info.is_enum:
        enum_key(value)
        return []
    return [(f"{path}.{name}", item) for name, item in info.values(value).items()]
