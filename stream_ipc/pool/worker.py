"""One worker of a pool: its process, and what it has been given.

Knows its session, and the requests by which it has tasks. Must not know the other workers, nor when another is started.
"""

from __future__ import annotations

import math

from ..errors import StreamClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..messages import Message
    from ..transports.spawn import Command
    from .tasks import Task

__all__ = ["Worker"]

_MUCH = 512 * 1024  # bytes; a worker that has more to read gets no further task


class Worker:
    """One process, also before it is started.

    Attributes:
        command: What is started.
        deaths: How many in a row have ended before they answered anything, up to this one.
        start_at: When it may be started; infinity while it is.
        session: The session with it, or None.
        conversation: What is behind that; None until the supervisor has begun with it.
        running: What it has.
        given: How many tasks it was given in all.
        ready: Whether it can be given any.
        came_up: Whether it has answered one, or was busy with one for too long.
        due: When it must have given a sign of life; infinity for not at all.
        heard: What has come from it until then, and was not looked at yet.
        hearing: The handlers that wait for it.
    """

    def __init__(self, command: Command, deaths: int = 0) -> None:
        self.command = command
        self.deaths = deaths
        self.start_at: float = -math.inf
        self.session: Any = None
        self.conversation: Any = None
        self.running: dict[Task, None] = {}
        self.given = 0
        self.ready = False
        self.came_up = False
        self.due: float = math.inf
        self.heard: list[Message] = []
        self.hearing: tuple[Callable[[Message], Any], ...] = ()

    @property
    def is_coming(self) -> bool:
        """Whether it was started, or is, and cannot be given tasks yet."""
        return not self.ready and (self.session is not None or self.start_at == math.inf)

    @property
    def is_clogged(self) -> bool:
        """Whether it has to read before a task can be sent to it."""
        return self.ready and self.conversation.outbox.queued_bytes > _MUCH and self.conversation.is_writable

    def can_take(self, in_flight: int, most: int | None) -> bool:
        """Return whether it can be given a task, if it may have so many at a time, and so many in all, or any number."""
        return (
            self.ready
            and len(self.running) < in_flight
            and self.given != most
            and self.conversation.outbox.queued_bytes <= _MUCH
            and self.conversation.is_writable
        )

    def close(self, text: str) -> None:
        """Close its session. Its process is ended and reaped by ticks."""
        self.conversation.close_now(StreamClosedError(f"{text} ({self.conversation.name})"))

    def kill(self, text: str) -> None:
        """Close its session, and have its process killed, which may be busy for ever."""
        self.conversation.hurry(-math.inf)
        self.close(text)
