"""What a pool was made with.

Knows nothing of what becomes of it.
"""

from __future__ import annotations

from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from ..messages import Message
    from ..session import Session
    from ..transports.spawn import Command

__all__ = ["Options"]


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
