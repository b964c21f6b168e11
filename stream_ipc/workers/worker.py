"""One worker of a pool: its process, and what it has been given; and what the pool was made with.

Knows its session, and the requests by which it has tasks. Must not know the other workers, nor when another is started.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import StreamClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from ..core.conversation import Conversation
    from ..core.pending import Pending
    from ..messages import Message
    from ..session import Session
    from ..transports.spawn import Command
    from .tasks import Task

__all__ = ["Options", "Worker"]

_MUCH = 512 * 1024  # bytes; a worker that has more to read gets no further task


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of a ``WorkerPool``, checked.

    Attributes:
        commands: The command of each worker.
        timeout: Seconds that a worker has for a task, or ``DEFAULT``.
        popen: Further arguments of ``create_command_session``.
    """

    commands: Sequence[Command]
    retries: int
    timeout: Any
    tasks_per_worker: int | None
    in_flight: int
    on_session: Callable[[Session], Any] | None
    hello: type[Message] | None
    start_timeout: float | None
    popen: Mapping[str, Any]


class Worker:
    """One process, also before it is started.

    Attributes:
        command: What is started.
        deaths: How many in a row have ended before they answered anything, up to this one.
        start_at: When it may be started; infinity while it is being started.
        session: The session with it, or None.
        is_set_up: Whether setting it up has begun.
        conversation: What is behind its session; there once setting it up has begun.
        running: The tasks that it has, and the request for each; ``Tasks`` changes this.
        given: How many it was given in all; this, too.
        ready: Whether it can be given any.
        came_up: Whether it has answered one, or was busy with one for too long.
        is_late: Whether it is about to be killed for that.
        due: When it must have given a sign of life; infinity for not at all.
        heard: What has come from it until then, and was not looked at yet.
        sign_handlers: The handlers that wait for it.
    """

    conversation: Conversation

    def __init__(self, command: Command, options: Options, deaths: int = 0) -> None:
        self.command = command
        self.deaths = deaths
        self.start_at: float = -math.inf
        self.session: Session | None = None
        self.is_set_up: bool = False
        self.running: dict[Task, Pending] = {}
        self.given: int = 0
        self.ready: bool = False
        self.came_up: bool = False
        self.is_late: bool = False
        self.due: float = math.inf
        self.heard: list[Message] = []
        self.sign_handlers: tuple[Callable[[Message], Any], ...] = ()
        self._share = options.tasks_per_worker

    @property
    def is_coming(self) -> bool:
        """Whether it was started, or is being started, and cannot be given tasks yet."""
        return not self.ready and (self.session is not None or self.start_at == math.inf)

    @property
    def has_done_its_share(self) -> bool:
        """Whether it was given as many tasks as it may be in all."""
        return self.given == self._share

    @property
    def takes_tasks(self) -> bool:
        """Whether it can be given tasks, unless it has as many as it may have at a time."""
        return self.ready and not self.has_done_its_share and self.conversation.is_writable

    @property
    def is_clogged(self) -> bool:
        """Whether it has to read before a task can be sent to it."""
        return self.conversation.outbox.queued_bytes > _MUCH

    def close(self, text: str) -> None:
        """Close its session. Its process is ended and reaped by ticks."""
        self.conversation.close_now(StreamClosedError(f"{text} ({self.conversation.name})"))

    def kill(self, text: str) -> None:
        """Close its session, and kill its process, which may be busy for ever. It is reaped by ticks."""
        self.conversation.hurry(-math.inf)
        self.close(text)
        if self.conversation.teardown is not None:
            self.conversation.teardown.step()  # the next tick may come late, if at all
