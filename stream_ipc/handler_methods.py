"""How a session gets its handlers: they are registered and unregistered, and that is all.

Knows the conversation whose dispatcher calls them. What a handler may look like is checked in ``handlers``.
"""

from __future__ import annotations

import sys
from functools import wraps

from .arguments import Facade, name_methods

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from .core.conversation import Conversation
    from .deferred import DeferredReply
    from .messages import Message
    from .promise import ResponsePromise
    from .session import Session

    # Handlers for type checkers. "Some message class" cannot be expressed, because a bound must not be generic, so it is
    # Any. With a type variable for each kind the decorators return the handler's own type.
    EventHandler = Callable[[Any], Any] | Callable[[Any, "Session"], Any]
    RequestHandler = (
        Callable[[Any], Message | ResponsePromise[Any] | DeferredReply | None]
        | Callable[[Any, "Session"], Message | ResponsePromise[Any] | DeferredReply | None]
    )
    CloseHandler = Callable[["Session"], Any]

    F = TypeVar("F", bound=Callable[..., Any])
    EventH = TypeVar("EventH", bound=EventHandler)
    RequestH = TypeVar("RequestH", bound=RequestHandler)
    CloseH = TypeVar("CloseH", bound=CloseHandler)

__all__ = ["HandlerMethods"]


def _registration(method: F) -> F:
    """Make a method say what it takes if it is called with more."""

    @wraps(method)
    def register(self: Any, handler: Any, *others: Any) -> Any:
        if others:
            raise TypeError(
                f"{method.__name__}() takes a handler and nothing else; the class that it is for is the annotation of its"
                " first parameter"
            )
        return method(self, handler)

    return register  # type: ignore[return-value]


class HandlerMethods(Facade):
    """The part of ``Session`` that registers handlers."""

    if TYPE_CHECKING:
        _conversation: Conversation

    def _checked(self) -> Conversation:
        """Return the conversation, unless another thread is using the peer or this is a fork: ``RuntimeError``."""
        self._conversation.loop.check_entry()
        return self._conversation

    @_registration
    def on_message(self, handler: EventH) -> EventH:
        """Register a handler for notifications; usable as a decorator.

        All of them see each message, in the order of registration. If one
        raises, the others still run; then the error comes out of the call that
        was ticking.

        Args:
            handler: Takes ``(message)`` or ``(message, session)``. If its first
                parameter is annotated with a message class, it is called for
                that class only.

        Raises:
            TypeError: It takes other arguments, or its annotation cannot be
                resolved.

        Example:
            @session.on_message
            def show(progress: Progress) -> None:
                print(f"{progress.done} of {progress.total}")
        """
        self._checked().dispatcher.on_message.add(handler, sys._getframe(2))
        return handler

    @_registration
    def on_request(self, handler: RequestH) -> RequestH:
        """Register a handler for requests, as ``on_message`` does.

        They are asked in the order of registration; the first that returns a
        message answers. None passes on to the next. What a handler raises
        becomes the requester's ``RemoteError``.

        One that cannot answer yet returns a ``ResponsePromise`` of any session,
        whose reply or error is passed on when it settles (if it is another
        peer's, that one is to be ticked, too), or a ``DeferredReply``. The
        session goes on with what comes next meanwhile, but is not read from
        while it owes some 4096 replies.

        Example:
            @session.on_request
            def work(request: TaskRequest) -> TaskResponse:
                return TaskResponse(request.job.upper())
        """
        self._checked().dispatcher.responder.on_request.add(handler, sys._getframe(2))
        return handler

    @_registration
    def on_exception(self, handler: EventH) -> EventH:
        """Register a handler for failures of the stream, as ``on_message`` does.

        It takes ``(error)`` or ``(error, session)``, and may be annotated with
        a class of exceptions. After them the session closes, unless one returns
        False; a failure that lasts is then reported every 10 ms at most. A
        ``broadcast()`` that the other side did not take in time is told, too,
        and closes nothing. Without any, failures are logged. That the other
        side is gone is no failure: see ``on_close``. What a handler raises is
        logged.
        """
        self._checked().dispatcher.on_exception.add(handler, sys._getframe(2))
        return handler

    def on_close(self, handler: CloseH) -> CloseH:
        """Register a handler for the end of the session, whoever ends it.

        Usable as a decorator. It takes ``(session)``, or is a ``TypeError``, as
        is one that is annotated with another class. It runs once, when pending
        requests have failed and the streams are released. What it raises is
        logged. One that is registered after the end never runs: look at
        ``is_open`` then.
        """
        self._checked().on_close.add(handler, sys._getframe(1))
        return handler

    def off_message(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_message``; ``ValueError`` if it is none.

        Takes effect at once, also inside a handler.
        """
        self._checked().dispatcher.on_message.remove(handler)

    def off_request(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_request``, as ``off_message`` does."""
        self._checked().dispatcher.responder.on_request.remove(handler)

    def off_exception(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_exception``, as ``off_message`` does."""
        self._checked().dispatcher.on_exception.remove(handler)

    def off_close(self, handler: Callable[..., Any]) -> None:
        """Unregister a handler of ``on_close``, as ``off_message`` does."""
        self._checked().on_close.remove(handler)


name_methods(HandlerMethods, "Session")
