"""The guard of a loop: one thread at a time, and only the process that made it.

Knows threads by their number. Must not know what is guarded.
"""

from __future__ import annotations

import sys
from _thread import get_ident
from functools import partial

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")

__all__ = ["Guard"]


class Guard:
    """Refuses calls from where they do not belong.

    Owns which thread is inside.

    Attributes:
        thread: The thread that is inside a call, or None.
        forked: Whether this is the copy in a forked process.
        closing: Whether nothing can be added any more.
    """

    def __init__(self) -> None:
        self.thread: int | None = None
        self.forked: bool = False
        self.closing: bool = False

    def enter(self) -> int | None:
        """Begin a call. Its end is to set ``thread`` to what this returns.

        Raises:
            RuntimeError: Another thread is inside, or this is a fork.
        """
        me = get_ident()
        # atomic: no calls
        outer = self.thread
        if outer is None or outer == me:
            self.thread = me
            if not self.forked:
                return outer

        raise self.refusal()

    def keep_others_out(self) -> None:
        """End daemon threads that call from now on: the interpreter ends, and nobody waits for them."""
        self.thread = None
        self.enter = partial(self._enter_alone, get_ident())  # type: ignore[method-assign]

    def _enter_alone(self, me: int) -> int | None:
        if get_ident() != me:
            threading = sys.modules.get("threading")
            if threading is None or threading.current_thread().daemon:
                raise SystemExit  # which ends a thread without a word, and lets go of what it holds
            raise self.refusal()
        outer = self.thread
        self.thread = me
        if self.forked:
            raise self.refusal()
        return me if outer == me else None

    def inside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function inside. No context manager, which a signal handler could keep from leaving."""
        outer = self.enter()
        try:
            return function(*arguments)
        finally:
            self.thread = outer

    def check_entry(self) -> None:
        """Raise what ``enter`` would raise, for a call that need not be entered."""
        if self.forked or (self.thread is not None and self.thread != get_ident()):
            raise self.refusal()

    def check_open(self) -> None:
        """Raise ``RuntimeError`` if nothing can be added, or the call does not belong here."""
        self.check_entry()
        if self.closing:
            raise RuntimeError("this IpcPeer is closed; make a new one")

    def refusal(self) -> RuntimeError:
        """Return the error for a call from where the peer does not belong."""
        if self.forked:
            return RuntimeError(
                "this IpcPeer belongs to the process that made it, and this is a fork of it; make a new IpcPeer here"
            )
        return RuntimeError(
            "another thread is using this IpcPeer; it belongs to one thread at a time, so make one per thread"
        )
