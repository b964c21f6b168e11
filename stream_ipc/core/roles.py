"""What things must have for what the core does with them: types only.

Knows other classes for their types alone. A thing may have several of these roles.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol
    from weakref import ref

    from ..messages import Message
    from ..protocols import RequestIdGenerator
    from .conversation import Conversation
    from .loop import Loop
    from .pending import Pending

    class Settings(Protocol):
        """A peer, as its conversations see it."""

        @property
        def timeout(self) -> float | None:
            """How long a request may take, in seconds, and a send that has to wait for room."""

        @property
        def id_generator(self) -> RequestIdGenerator:
            """What makes the ids of requests."""

    class Awaited(Protocol):
        """What a call can wait for: a pending request, a condition."""

        @property
        def settled(self) -> object:
            """Is true once it has come."""

    class Requester(Protocol):
        """What sends requests: a conversation's table of them, or the tasks of a pool.

        Attributes:
            pending_class: The class of its requests.
            loop: What turns until there is an outcome.
            observers: Weak references to what has a method ``note``, which gets the promise of each that settles.
            conversation: What they are sent over, if that is the same for all.
        """

        loop: Loop
        observers: set[ref[Any]]

        @property
        def conversation(self) -> Conversation | None: ...

        @property
        def pending_class(self) -> type[Pending]: ...

        def send(self, pending: Any, message: Message, /) -> None: ...

        def cancel(self, pending: Any, /) -> bool: ...

        def timeout_text(self, pending: Any, timeout: float | None, /) -> str: ...

    class Owner(Protocol):
        """What a descriptor is watched for."""

        def on_ready(self, fd: int, events: int, /) -> object:
            """The descriptor is ready."""

        def check(self) -> object:
            """Find out whether it is still the same file."""

    class Timed(Protocol):
        """What is due at a time."""

        def on_time(self, now: float, /) -> object:
            """The time has come, or may have."""

    class Polled(Protocol):
        """What no descriptor tells of."""

        def poll(self) -> object:
            """Look whether something has happened."""

    class Postponed(Protocol):
        """What has left something to the next turn."""

        def go_on(self) -> object:
            """Do what was left. An interrupted call is made again."""

    class Repairable(Protocol):
        """What an interruption may have left with work."""

        def repair(self) -> object:
            """Find out what is left, and do it. An interrupted call is made again."""

    class Pool(Postponed, Timed, Protocol):
        """What gives out tasks, and has processes started for them."""

        @property
        def waits(self) -> bool:
            """Whether something will happen though nothing is open."""

        def look_soon(self) -> object:
            """Look at all workers in the next turn."""

        def close(self) -> object:
            """Fail what was to be done: the loop is closed."""


__all__: list[str] = []
