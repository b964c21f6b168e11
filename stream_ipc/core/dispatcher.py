"""Dispatching: what stands in the inbox of a conversation is given, in order, to promises and handlers.

Knows messages, handlers, the port and the pending requests of its conversation. Must not know frames, descriptors or
what kind of stream there is.

An item stands in the inbox until it is dealt with. What may be done twice leaves it after the act; what a handler gets
leaves it in the statement before the handler is called. So an interruption at any point loses nothing and repeats no
handler.
"""

from __future__ import annotations

from collections import deque

from .. import log
from ..errors import (
    FrameTooLargeError,
    InvalidStreamError,
    IpcError,
    SerializationError,
    StreamClosedError,
    article,
    describe,
)
from ..handlers import HandlerList, name_of
from ..messages import RESPONSE, ErrorMessage, Message, RequestEnvelope, ResponseEnvelope, is_text
from ..registry import type_info
from ..transports.base import End
from .items import Answer, Delivery, Failure, Opening
from .kept import Entry, Kept, weigh

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..handlers import Handler
    from .conversation import Conversation

__all__ = ["ENVELOPES", "HIGH_WATER", "Dispatcher"]

# Above this many queued bytes a send waits until the queue is below it again, and requests of this conversation wait in
# the inbox, because their replies would only add to the queue.
HIGH_WATER = 1024 * 1024

_AHEAD = 64  # replies that a wait settles behind its own at most

_UNKNOWN = object()

ENVELOPES = frozenset({RequestEnvelope, ResponseEnvelope})


class Dispatcher:
    """Works off the inbox of one conversation.

    Owns the inbox and the handlers.

    Attributes:
        inbox: Messages, errors that stand for messages, and other items, in order.
        port: Moves the bytes; set by the conversation.
        kept: Notifications for calls of ``receive``.
    """

    def __init__(self, conversation: Conversation, session: Any) -> None:
        self.inbox: deque[Any] = deque()
        self.on_message = HandlerList("on_message", of_messages=True)
        self.on_request = HandlerList("on_request", of_messages=True)
        self.on_exception = HandlerList("on_exception")
        self.kept = Kept(conversation.name)
        self._conversation = conversation
        self._session = session
        self._by_class = self.on_message.by_class
        self._scanned = 0  # how much of the inbox settle_replies has seen

    def bind(self) -> None:
        """Look up what is asked for with each message, once the conversation is complete."""
        conversation = self._conversation
        self._loop = conversation.loop
        self._channel = conversation.channel
        self._replies = conversation.replies
        self.port = conversation.port

    def begin_with(self, function: Callable[[Any], Any]) -> None:
        """Give the session to a function before anything else is dispatched."""
        self.inbox.append(Opening(function))
        self._loop.mark(self)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do."""
        if not self._conversation.is_open or not self.inbox:
            return False
        first = self.inbox[0]
        if type(first) is End:
            return not self._conversation.lingers()
        return type(first) is not RequestEnvelope or not self._is_full()

    def _is_full(self) -> bool:
        """Return whether a reply would only add to a long queue that the other side still reads."""
        return self._channel.outbox.queued_bytes > HIGH_WATER and self._channel.ended is None

    def step(self, goal: int, until: Any) -> int:
        """Dispatch what stands in the inbox.

        Args:
            goal: How many turns the loop may have counted then; 0 for what stands there now. Nested ones count too, or a
                flood could keep this one from ever returning.
            until: Something with an attribute ``settled`` at which to stop, or None.

        Returns:
            How many messages that was.
        """
        loop = self._loop
        inbox = self.inbox
        count = 0
        self._scanned = 0
        if not self._conversation.is_open:
            inbox.clear()  # of what a read that was under way has brought
        while inbox:
            item = inbox[0]
            cls = type(item)
            if cls is ResponseEnvelope:
                self._replies.settle(item.id, item.response)
                if inbox and inbox[0] is item:
                    del inbox[0]
                count += 1
            else:
                if not goal:
                    goal = loop.turns + len(inbox) + 1  # a failure is followed by the end
                if cls in self._by_class:
                    self._deliver(item, item, self._by_class[cls])
                    count += 1
                else:
                    done = _ACTIONS.get(cls, Dispatcher._arrive)(self, item)
                    if done is None:
                        return count
                    count += done
                loop.turns += 1
                if not self._conversation.is_open:
                    if loop.forked:  # a handler has forked, and this is the copy
                        raise loop.refusal()
                    inbox.clear()  # of what a handler or an interruption has left behind the end
                if loop.turns >= goal:
                    break
            if until is not None and until.settled and not self._goes_on(count):
                break
        if not inbox:
            loop.todo.pop(self, None)
            port = self.port
            port.mark = self._channel.received_bytes
            if port.paused:
                port.update_reading()
        return count

    def _goes_on(self, count: int) -> bool:
        """Whether replies that stand next are settled on the way, which runs no handler.

        With many requests under way, whoever waits for one after the other waits once for all of these.
        """
        return count % _AHEAD > 0 and len(self.inbox) > 0 and type(self.inbox[0]) is ResponseEnvelope

    def settle_replies(self) -> int:
        """Settle the replies in the inbox before their turn: handlers are nested too deeply to run another."""
        inbox = self.inbox
        # From the right, where a deque is quick, and only what came since the last time: the inbox may be long.
        found = [i for i in range(len(inbox) - 1, self._scanned - 1, -1) if _is_reply(inbox[i])]
        for index in reversed(found):
            item = inbox[index]
            if type(item) is ResponseEnvelope:
                self._replies.settle(item.id, item.response)
            else:
                self._replies.fail(item.response_id, item)
        for index in found:  # after the last is settled: settling twice is nothing, losing one is
            del inbox[index]
        self._scanned = len(inbox)
        if self._channel.ended is not None:
            self._replies.fail_all(self._channel.ended)  # the rest of the end has to wait for its turn
        return len(found)

    def _arrive(self, item: Any) -> int:
        """Dispatch a notification of a class that is new here, or an error that stands for a message."""
        if isinstance(item, Message):
            self._deliver(item, item, self.on_message.of(type(item)))
        elif isinstance(item, SerializationError):
            self._undecodable(item, item)
        elif isinstance(item, Exception):
            self._failed(item, item)
            return 0
        else:
            error = SerializationError(
                f"{type(self._channel.transport).__name__}.receive() returned a list with a {type(item).__name__} in it;"
                " all must be Messages"
            )
            self._undecodable(item, error)
        return 1

    def _deliver(self, item: Any, message: Message, handlers: tuple[Handler, ...]) -> None:
        """Give a message to its handlers.

        Args:
            item: What stands for it in the inbox.
            message: The message.
            handlers: Those that have not seen it.
        """
        inbox = self.inbox
        error: Exception | None = None
        if (not handlers or self.kept.waiting) and type(item) is not Delivery:
            item = self._keep(item, message, handlers)
        left = len(handlers)
        for handler in handlers:
            left -= 1
            if not handler.active:
                continue
            following = Delivery(message, handlers[-left:]) if left else None
            if not inbox or inbox[0] is not item:
                break  # a turn beneath has gone on with it
            try:
                # What leads to the handler stands in each branch, because 3.10 looks at signals where it jumps.
                if handler.takes_both:
                    # atomic: no calls
                    if following is None:
                        del inbox[0]
                    else:
                        inbox[0] = following
                    item = following

                    handler.function(message, self._session)
                else:
                    # atomic: no calls
                    if following is None:
                        del inbox[0]
                    else:
                        inbox[0] = following
                    item = following

                    handler.function(message)
            except Exception as exc:
                if error is None:
                    error = exc
                else:
                    log.error("%r: another on_message handler failed too", self._session, exc_info=exc)
        if item is not None:  # nobody has taken it
            self._pop(item)
        if error is not None:
            raise error

    def _keep(self, item: Any, message: Message, handlers: tuple[Handler, ...]) -> Any:
        """Keep a message for a call of ``receive``; returns what stands for it in the inbox from now on."""
        wanted = self.kept.wanted_by(message)
        if wanted is None and (handlers or is_text(message)):
            return item
        entry = Entry(message, 0, None) if wanted is not None else Entry(message, weigh(message), True)
        delivery = Delivery(message, handlers)
        kept = self.kept
        if self.inbox and self.inbox[0] is item:
            # atomic: no calls
            kept.entries += (entry,)
            kept.size += entry.size
            self.inbox[0] = delivery
            if wanted is not None:
                wanted.settled = True

            kept.trim()
        return delivery

    def offer(self, entry: Entry) -> None:
        """Give a kept message to the handlers that were not there when it came."""
        message = entry.message
        handlers = self.on_message.of(type(message))
        if not entry.unseen or not handlers or not self._conversation.is_open:
            return
        delivery = Delivery(message, handlers)
        for entry.unseen in map(self.inbox.appendleft, (delivery,)):  # None: an interruption does not come in between
            break
        self._scanned = 0
        self._loop.mark(self)
        self._deliver(delivery, message, handlers)

    def _serve(self, item: RequestEnvelope) -> int | None:
        """Ask the handlers of a request, and send the reply."""
        if self._is_full():
            return None
        request = item.request
        cls = type(request)
        inbox = self.inbox
        by_class = self.on_request.by_class
        handlers = by_class[cls] if cls in by_class else self.on_request.of(cls)
        reply: Any = None
        taken = False
        last: Any = _UNKNOWN
        try:
            for handler in handlers:
                if not handler.active:
                    continue
                function = handler.function
                if not taken and (not inbox or inbox[0] is not item):
                    return 0  # a turn beneath has gone on with it
                try:
                    if handler.takes_both:
                        # atomic: no calls
                        if not taken:
                            taken = True
                            del inbox[0]

                        reply = function(request, self._session)
                    else:
                        # atomic: no calls
                        if not taken:
                            taken = True
                            del inbox[0]

                        reply = function(request)
                except Exception as exc:
                    reply = ErrorMessage("Error in dispatch", exc)
                    self._log_error_reply(item.id, exc)
                if reply is not None:
                    break
            if not isinstance(reply, Message) or type(reply) in ENVELOPES:
                reply = _no_reply(cls) if reply is None else _wrong_reply(function, reply)
            if not taken:
                self._pop(item)
                taken = True
            last = self._channel.outbox.last
            self._send_reply(item.id, reply)
        except BaseException as exc:
            # If the program goes on, the requester gets its reply in the next turn, or learns what happened; if it ends,
            # the requester learns that.
            if taken and (last is _UNKNOWN or self._channel.outbox.last is last):
                if not isinstance(reply, Message):
                    reply = ErrorMessage("Error in dispatch", exc)
                inbox.appendleft(Answer(item.id, reply))
                self._scanned = 0
                self._loop.todo[self] = None
            raise
        return 1

    def _answer(self, item: Answer) -> int:
        """Send a reply that an interruption has left in the inbox."""
        last = self._channel.outbox.last
        self._pop(item)
        try:
            self._send_reply(item.id, item.reply)
        except BaseException:
            if self._channel.outbox.last is last:
                self.inbox.appendleft(item)
            raise
        return 0

    def _pop(self, item: Any) -> None:
        """Take an item out of the inbox that is dealt with."""
        if self.inbox and self.inbox[0] is item:
            del self.inbox[0]

    def _send_reply(self, id: Any, reply: Message) -> None:
        """Send a reply, or an error in its place."""
        if not self._conversation.is_open:
            log.debug("session %s: reply to request %.128r dropped: it is closed", self._conversation.name, id)
            return
        try:
            self._post(RESPONSE, id, reply)
        except (FrameTooLargeError, SerializationError) as exc:
            text = reply.message if isinstance(reply, ErrorMessage) else f"the reply could not be sent: {exc}"
            self._send_error(id, text)
            self._log_error_reply(id, exc)
        except (StreamClosedError, InvalidStreamError):
            pass  # the port has taken note of it
        except Exception as exc:
            self.port.failed(exc)

    def _post(self, kind: int, id: Any, message: Message) -> None:
        try:
            self._channel.post(kind, id, message)
        except BaseException as exc:
            self.port.post_failed(exc)
            raise

    def _log_error_reply(self, id: Any, exc: Exception) -> None:
        log.debug("session %s: request %.128r was answered with %s", self._conversation.name, id, article(type(exc)))

    def _send_error(self, id: Any, text: str) -> None:
        # Cut to fit: in characters, of which each may take several bytes in the payload.
        limit = getattr(self._channel.transport, "max_frame_size", 4096)
        text = text.encode("utf-8", "backslashreplace").decode()
        for length in (len(text), limit // 8, 64, 8):
            shown = text if len(text) <= length else text[:length] + "..."
            try:
                self._post(RESPONSE, id, ErrorMessage(shown))
                return
            except (FrameTooLargeError, SerializationError) as exc:
                error: Exception = exc
            except (StreamClosedError, InvalidStreamError):
                return
        log.error("%r: no reply to request %.128r could be sent: %s", self._session, id, error)

    def _undecodable(self, item: Any, error: SerializationError) -> None:
        """Tell of a payload that is no message: whoever sent it, whoever waits for it, or the handlers."""
        size = "a message" if error.payload_size is None else f"a message of {error.payload_size} bytes"
        log.debug("session %s: %s was refused: %s", self._conversation.name, size, error)
        if error.request_id is not None:
            answer = Answer(error.request_id, ErrorMessage(f"the request could not be decoded: {error}"))
            if self.inbox and self.inbox[0] is item:
                self.inbox[0] = answer
                self._answer(answer)
        elif error.response_id is not None:
            self._replies.fail(error.response_id, error)
            self._pop(item)
        else:
            self._deliver(item, ErrorMessage(str(error)), self.on_message.of(ErrorMessage))

    def _resume(self, item: Delivery) -> int:
        self._deliver(item, item.message, item.handlers)
        return 0

    def _open(self, item: Opening) -> int:
        """Give the session to whoever asked for it."""
        function, session, inbox = item.function, self._session, self.inbox
        if not inbox or inbox[0] is not item:
            return 0  # a turn beneath has gone on with it
        try:
            # atomic: no calls
            del inbox[0]  # entered once, whatever comes of it

            function(session)
        except Exception:
            self._conversation.close()  # nobody has it
            raise
        return 0

    def _stream_failed(self, item: Failure) -> int:
        error = item.error
        if isinstance(error, InvalidStreamError):
            error.session = self._session
        self._failed(item, error)
        return 0

    def _failed(self, item: Any, error: Exception) -> None:
        """Tell the on_exception handlers of a failure of the stream, and end unless one of them objects."""
        text = str(error) if isinstance(error, IpcError) else describe(error)
        reason = StreamClosedError(f"the stream failed ({self._conversation.name}): {text}")
        reason.__cause__ = error
        keep = False
        self._pop(item)
        try:
            # Not what still cannot be used: it would be reported again at once.
            keep = self.report(error) and not (isinstance(error, InvalidStreamError) and self._channel.find_invalid())
        finally:  # also if a handler was interrupted
            self.port.failing = False
            if keep:
                self.port.rearm()
            elif self._conversation.is_open:
                self._channel.drop_output()
                self.port.end(reason)

    def report(self, error: BaseException) -> bool:
        """Tell the on_exception handlers.

        Returns:
            Whether one of them wants the session to stay open.
        """
        handlers = self.on_exception.of(type(error))
        if not handlers:
            trace = None if isinstance(error, IpcError) else error
            kind = type(error).__name__
            log.error("%r has no on_exception handler for %s: %s", self._session, kind, error, exc_info=trace)
            return False
        log.debug("session %s: its on_exception handlers get %s: %s", self._conversation.name, type(error).__name__, error)
        keep = False
        for handler in handlers:
            if not handler.active:
                continue
            try:
                arguments = (error, self._session) if handler.takes_both else (error,)
                keep = handler.function(*arguments) is False or keep
            except Exception:
                log.error("on_exception handler of %r failed", self._session, exc_info=True)
        return keep

    def _end(self, item: End) -> int | None:
        """Close behind the last message."""
        if self._conversation.lingers():
            return None
        self._conversation.end(item.error)
        return 0


def _no_reply(cls: type) -> ErrorMessage:
    return ErrorMessage(f"Unhandled request: {type_info(cls).wire_name}")


def _wrong_reply(function: Any, reply: Any) -> ErrorMessage:
    error = TypeError(
        f"the on_request handler {name_of(function)} returned {article(type(reply))}; it must return a Message (no"
        " envelope), or None to pass the request on"
    )
    return ErrorMessage("Error in dispatch", error)


def _is_reply(item: Any) -> bool:
    return type(item) is ResponseEnvelope or (isinstance(item, SerializationError) and item.response_id is not None)


# What is neither a reply nor a notification, and what to do with it. An action returns how many messages that was; None
# to stop, because it has to wait.
_ACTIONS: dict[type, Callable[[Dispatcher, Any], int | None]] = {
    RequestEnvelope: Dispatcher._serve,
    Answer: Dispatcher._answer,
    Delivery: Dispatcher._resume,
    Opening: Dispatcher._open,
    Failure: Dispatcher._stream_failed,
    End: Dispatcher._end,
}
