"""Sending one message to every conversation of a loop.

Knows conversations. Must not know how a message is encoded.
"""

from __future__ import annotations

from ..errors import FrameTooLargeError
from ..interruptions import pass_on
from .flow_control import await_room, stuck_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..messages import Message
    from .conversation import Conversation
    from .loop import Loop

__all__ = ["broadcast"]


def broadcast(loop: Loop, message: Message, timeout: float | None) -> int:
    """Notify every open conversation; see ``IpcPeer.broadcast``."""
    targets = [conversation for conversation in loop.conversations if conversation.is_open]
    for target in targets:
        target.port.look_for_end()
    frames = _encode_for(targets, message)
    stuck = []
    taken = 0
    for target in targets:
        if target.is_stuck:
            stuck.append(target)
        elif target.is_open:  # a handler of another may have closed it
            taken += _send_to(target, message, frames[target.channel.share])
    if stuck:
        await_room(loop, stuck, timeout)
    for target in stuck:
        if target.is_stuck:
            target.dispatcher.report(stuck_error(target, timeout))
        elif target.is_open:
            taken += _send_to(target, message, frames[target.channel.share])
    return taken


def _encode_for(targets: list[Conversation], message: Message) -> dict[Any, Any]:
    """Encode a message before it is sent to anybody.

    Returns:
        For each ``share`` of the targets' channels a frame, or the error that stands for it; None where a channel encodes
        for itself.

    Raises:
        FrameTooLargeError: It is too large for all of them.
    """
    frames: dict[Any, Any] = {}
    for target in targets:
        share = target.channel.share
        if share not in frames:
            try:
                frames[share] = None if share is None else target.channel.encode(message)
            except FrameTooLargeError as exc:
                frames[share] = exc
    if frames and all([isinstance(frame, FrameTooLargeError) for frame in frames.values()]):
        raise next(iter(frames.values()))
    return frames


def _send_to(target: Conversation, message: Message, frame: Any) -> int:
    try:
        if target.port.invalid is not None:
            raise target.closed_error()
        if frame is None:
            target.notify(message)
        elif isinstance(frame, Exception):
            raise frame
        else:
            target.send_frame(frame)
        return 1
    except Exception as exc:
        pass_on(exc)
        target.dispatcher.report(exc)
        return 0
