"""One request, until its outcome is known and everybody who waits for it was told.

Knows promises only as objects that may be dropped. Must not know what settles it.
"""

from __future__ import annotations

from itertools import count
from weakref import ref

from .. import log
from ..interruptions import pass_on_own

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .conversation import Conversation
    from .roles import Requester

    Base = ref[Any]
else:
    Base = ref

__all__ = ["Pending", "Reference", "next_moment"]

next_moment: Callable[[], int] = count(1).__next__  # numbers what happens: of two, the later one is greater


class Reference(Base):
    """A weak reference that is equal to itself alone, so that tables need not ask what it refers to, which may be gone."""

    __slots__ = ()

    if not TYPE_CHECKING:
        __hash__ = object.__hash__
        __eq__ = object.__eq__
        __ne__ = object.__ne__


class Pending(Reference):
    """A request and, once it has settled, its outcome.

    A weak reference to the promise, so that a promise that is dropped leaves nothing behind.

    Attributes:
        id: The request's id; None until it is sent.
        expect: The class of the reply.
        timeout: The request's limit in seconds; None for no limit.
        deadline: When the reply must be there, in the time of the loop's clock; None for no limit.
        settled: 0 until the outcome is known; then the moment at which it became known, by ``next_moment``.
        outcome: The reply, or the error in its place; None until it has settled.
        requester: What sends it.
        unsent: Is true until it is handed over: the frame once that was made, which is empty from then on; then None.
        watchers: Functions that are called with the promise when it settles, or None.
        callbacks: Users' functions and the promise that each gets, which these keep alive, or None; ``watchers`` is a list
            then.
    """

    __slots__ = (
        "callbacks",
        "deadline",
        "expect",
        "id",
        "outcome",
        "requester",
        "settled",
        "timeout",
        "unsent",
        "watchers",
    )  # fmt: skip

    id: str | None
    expect: type
    timeout: float | None
    deadline: float | None
    settled: int
    outcome: Any
    watchers: list[Callable[[Any], Any]] | None
    callbacks: list[tuple[Callable[[Any], Any], Any]] | None
    requester: Requester
    unsent: Any

    @property
    def conversation(self) -> Conversation | None:
        """What it was sent over, if it was."""
        return self.requester.conversation

    @property
    def is_dropped(self) -> bool:
        """Whether nobody can ever learn the outcome."""
        return not self.watchers and self() is None

    def settle(self, outcome: Any) -> bool:
        """Take the outcome, unless there is one; returns whether there was none. Telling of it comes next."""
        moment = next_moment()
        # atomic: no calls
        if not self.settled:
            self.outcome = outcome
            self.settled = moment
            return True

        return False

    def fail(self, error: BaseException) -> None:
        """Take an error in place of a reply, unless it has settled. An interrupted call can be made again."""
        self.settle(error)
        if self.watchers is not None or self.requester.observers:
            self.tell()

    def tell(self) -> None:
        """Tell those that watch all requests, and call the functions that watch this one, each once.

        What an interruption leaves of that, and users' functions that may not run now, a later turn does.
        """
        loop = self.requester.loop
        loop.later[self] = None
        promise = self()
        # A copy, because the garbage collector may change the set, but not while it is copied.
        for reference in self.requester.observers.copy():
            waiting = reference()
            if waiting is not None:
                waiting.note(promise)
        while True:
            # atomic: no calls
            if self.watchers:
                watcher = self.watchers[0]
                del self.watchers[0]  # entered once, also if it is interrupted

                watcher(promise)
            else:
                break
        while self.callbacks:
            if loop.users_wait:
                return
            try:
                # atomic: no calls
                if self.callbacks:
                    function, promise = self.callbacks[0]
                    del self.callbacks[0]

                    function(promise)
            except Exception as exc:
                pass_on_own(exc)
                log.error("a done callback of %r failed", promise, exc_info=True)
        loop.later.pop(self, None)

    def go_on(self) -> None:
        """Tell what is left to be told: a turn calls this."""
        if self.settled:
            self.tell()
        else:  # cancelling it was interrupted before it began
            self.requester.loop.later.pop(self, None)

    def watch(self, watcher: Callable[[Any], Any]) -> None:
        """Have a function called with the promise when it settles, by the requester's loop at the latest."""
        if self.watchers is None:
            self.watchers = []
        self.watchers.append(watcher)

    def call_back(self, function: Callable[[Any], Any], promise: Any) -> None:
        """Have a user's function called with the promise, which stays alive until then: when it settles, or now."""
        if self.watchers is None:
            self.watchers = []
        if self.callbacks is None:
            self.callbacks = []
        self.callbacks.append((function, promise))
        if self.settled:
            self.go_on()

    def unwatch(self, watcher: Callable[[Any], Any]) -> None:
        """Undo ``watch``, if the function was not called yet."""
        if self.watchers is not None and watcher in self.watchers:
            self.watchers.remove(watcher)
