"""How messages become payload bytes: the built-in serializers, a module each, and what all of them share.

That is functions that are compiled for a class, because code that names the fields one by one is faster than a loop over
them; ``dataclass`` makes ``__init__`` the same way, for the same reason.

Knows registered classes. Must not know any format.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from ..registry import TypeInfo

__all__ = ["call_of_class", "compile_function"]


def compile_function(lines: Sequence[str], names: dict[str, Any]) -> Callable[..., Any]:
    """Compile the source of one function called ``made``, which sees just ``names``.

    Only identifiers and ``repr`` of texts go into the source.
    """
    scope = dict(names)
    exec("\n".join(lines), scope)  # noqa: S102
    made: Callable[..., Any] = scope["made"]
    return made


def _takes_positional(info: TypeInfo) -> bool:
    # cls(a, b) needs no dict for the arguments, which cls(x=a, y=b) does. Only where the constructor is a plain function
    # with just the fields first: a dataclass may have keyword-only fields, InitVar parameters in between, or a
    # constructor of its own.
    names = tuple(f.parameter for f in info.fields)
    cls: Any = info.cls
    code = getattr(cls.__init__, "__code__", None)
    return (
        type(cls).__call__ is type.__call__
        and cls.__new__ is object.__new__
        and code is not None
        and code.co_argcount > len(names)
        and code.co_varnames[1 : 1 + len(names)] == names
    )


def call_of_class(info: TypeInfo, values: Sequence[str]) -> str:
    """Return the source of the call that builds an instance of ``cls`` from the source of each field's value."""
    if _takes_positional(info):
        return f"cls({', '.join(values)})"
    return f"cls({', '.join(f'{field.parameter}={value}' for field, value in zip(info.fields, values))})"
