"""The end of loops: when their peer closes, at the end of the interpreter, in a forked process.

Knows loops. Must not know peers.
"""

from __future__ import annotations

import atexit
import os
from collections import deque
from functools import partial
from weakref import ref

from .. import log
from ..clock import monotonic
from ..errors import StreamClosedError
from .closing import FLUSH_BOUND, begin, flush_bound, write_out
from .conversation import Conversation
from .loop import Loop
from .teardowns import Teardowns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from typing import Any

__all__ = ["adopt", "close_loop", "drop_loop"]

_EXIT_TURN = 0.005  # seconds that one loop may write at exit before the next has its turn

_CLOSED_TEXT = "this side closed the peer"

_loops: set[ref[Loop]] = set()  # no WeakSet: a signal handler's exception would be lost in its callbacks


def adopt(loop: Loop) -> None:
    """Have a loop closed at the end of the interpreter, and its copy abandoned in a forked process."""
    _loops.add(ref(loop, _loops.discard))


def close_loop(loop: Loop, seconds: float | None = None) -> None:
    """Close every conversation and listener, and end what was started, side by side; see ``IpcPeer.close``."""
    due = None if seconds is None else monotonic() + seconds
    conversations = _unclosed(loop)
    if due is not None:
        for conversation in conversations:
            conversation.hurry(due)
    to_write = [conversation for conversation in conversations if conversation.reason is None]
    _begin(loop)
    try:
        try:
            for conversation in to_write:  # write_out() would close what an interrupted call has left there
                loop.repairs.pop(conversation, None)
            write_out(loop, loop.conversations, flush_bound(seconds, conversations))
        finally:
            loop.repairs.update(dict.fromkeys(loop.conversations))  # after another interruption turns go on with closing
    finally:
        _close(loop, handlers=False)
        loop.with_users_wait(False, loop.go_on)  # what is left of done callbacks
        # Before the on_close handlers, which run after a child's last words.
        loop.chores.teardowns.wait(due=due, background=False)
        try:
            _close(loop)
        finally:  # an on_close handler may have been interrupted
            _close(loop)
            loop.chores.teardowns.wait(due=due)
            loop.close()


def _unclosed(loop: Loop) -> list[Conversation]:
    """Return the open conversations, and those whose closing has begun and is not done."""
    return [*loop.conversations, *[task for task in [*loop.repairs] if isinstance(task, Conversation)]]


def _begin(loop: Loop) -> None:
    """Take nothing any more, fail what is pending, and write what is queued as far as it goes."""
    try:
        loop.closing = True
        loop.with_users_wait(True, _close_others, loop)  # done callbacks may wait for any of what is pending
        begin(tuple(loop.conversations), StreamClosedError(_CLOSED_TEXT))
    except BaseException:  # an interruption: the next turn goes on with closing
        loop.repairs.update(dict.fromkeys(loop.conversations))
        raise


def _close_others(loop: Loop) -> None:
    for pool in [*loop.pools]:
        pool.close()
    for listener in [*loop.listeners]:
        listener.close()


def _close(loop: Loop, handlers: bool = True) -> None:
    for conversation in _unclosed(loop):
        conversation.close_now(StreamClosedError(_CLOSED_TEXT), handlers=handlers)


def drop_loop(loop: Loop, owner: str) -> None:
    """Close what a peer that was never closed has left open."""
    left = bool(loop.conversations or loop.listeners)
    for listener in [*loop.listeners]:
        listener.close()
    for conversation in _unclosed(loop):
        try:
            conversation.close_streams()
        except Exception:  # of a transport of somebody's own
            log.error("closing the streams of %r failed", conversation.session, exc_info=True)
    loop.chores.teardowns.abandon()
    loop.close()
    if left:  # last, because it may raise
        log.issue_warning(f"unclosed {owner}; close it, or use it in a with statement", ResourceWarning)


def _living() -> list[Loop]:
    # A copy, because the garbage collector may change the set, but not while it is copied.
    return [loop for loop in [weak() for weak in _loops.copy()] if loop is not None]


def _close_all() -> None:
    """Close all loops at exit, side by side, because each may take its time."""
    loops = [loop for loop in _living() if not loop.closed and not loop.forked]
    try:
        _close_side_by_side(loops)
    except BaseException:  # an interruption, and there is no later
        _cut_short(loops)
        raise


def _close_side_by_side(loops: Collection[Loop]) -> None:
    for loop in loops:
        loop.keep_others_out()
    left = [loop for loop in loops if _try(loop, partial(_begin, loop))]
    due = monotonic() + FLUSH_BOUND
    while left and monotonic() < due:
        left = [loop for loop in left if any([c.outbox.queued_bytes for c in [*loop.conversations]])]
        left = [loop for loop in left if _try(loop, partial(write_out, loop, loop.conversations, _EXIT_TURN))]
    for loop in loops:
        _try(loop, partial(_close, loop, handlers=False))
    try:
        _teardowns(loops).wait()
    except Exception:
        log.error("ending children at exit failed", exc_info=True)
    for loop in loops:
        _try(loop, partial(close_loop, loop))


def _teardowns(loops: Iterable[Loop]) -> Teardowns:
    return Teardowns(teardown for loop in loops for teardown in [*loop.chores.teardowns.all])


def _cut_short(loops: Iterable[Loop]) -> None:
    """End at once what is left: kill children and reap them. No function of users' is called."""
    try:
        _kill(loops)  # before anything else: another interruption may come
        for loop in loops:
            _try(loop, partial(loop.with_users_wait, True, _close, loop, False), "after an interruption")
    finally:
        _kill(loops).wait()


def _kill(loops: Iterable[Loop]) -> Teardowns:
    teardowns = _teardowns(loops)
    for teardown in [*teardowns.all]:
        teardown.take = deque.clear  # its last words
        teardown.hurry(monotonic())
    teardowns.step()
    return teardowns


def _try(loop: Loop, step: Callable[[], Any], when: str = "at exit") -> bool:
    try:
        loop.inside(step)
    except Exception:
        log.error("closing an IpcPeer with %d sessions %s failed", len(loop.conversations), when, exc_info=True)
        return False
    return True


def _after_fork() -> None:
    """Close this process's copies of all descriptors and touch nothing else: it is a fork of the owner."""
    for loop in _living():
        loop.forked = True
        for conversation in _unclosed(loop):
            conversation.abandon()
        for listener in [*loop.listeners]:
            listener.abandon()
        loop.chores.teardowns.abandon()
        loop.close()
    _loops.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
