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
from ..errors import InvalidStreamError, IpcError, SerializationError, StreamClosedError, article, describe
from ..handlers import HandlerList, first_failure
from ..interruptions import pass_on, pass_on_own
from ..messages import ErrorMessage, Message, RequestEnvelope, ResponseEnvelope
from ..transports.channel import EndOfStream
from .items import Delivery, Failure, OnSession, reply_id, take_out
from .receiving import Kept
from .responder import Responder
from .timers import Share

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..handlers import Chain
    from .conversation import Conversation
    from .port import Port
    from .receiving import Entry
    from .roles import Awaited

__all__ = ["Dispatcher"]

_AHEAD = 64  # replies in a row that are settled at once, also behind the one that is waited for: it spares turns


class Dispatcher:
    """Works off the inbox of one conversation.

    Owns the inbox, and the handlers of notifications and failures.

    Args:
        conversation: Half made: loop, channel, session and requests are there, and the port is not.

    Attributes:
        inbox: Messages, errors that stand for messages, and other items, in order.
        on_message: Handlers of notifications.
        on_exception: Handlers of failures of the stream.
        dispatched_bytes: ``received_bytes`` of the inputs when the inbox was last empty.
        kept: Notifications for calls of ``receive``.
        responder: Answers requests.
    """

    def __init__(self, conversation: Conversation) -> None:
        self.inbox: deque[Any] = deque()
        self.dispatched_bytes: int = 0
        self.on_message: HandlerList = HandlerList("on_message", of_messages=True)
        self.on_exception: HandlerList = HandlerList("on_exception")
        self.kept: Kept = Kept(conversation.name, self.inbox)
        self._conversation = conversation
        self._session = conversation.session
        self._loop = conversation.loop
        self._todo = conversation.loop.todo
        self._channel = conversation.channel
        self._inputs = conversation.channel.inputs
        self._requests = conversation.requests
        self.responder: Responder = Responder(conversation, self.inbox)
        self._by_class = self.on_message.by_class
        self._scanned = 0  # the first so many items hold no reply; valid only while the last of these is _last_scanned
        self._last_scanned: Any = None
        self._waiting = self.kept.waiting
        # What is neither a reply nor a notification, and what to do with it. An action returns how many messages that was;
        # None to stop, because it has to wait.
        self._actions: dict[type, Callable[[Any], int | None]] = {
            RequestEnvelope: self.responder.serve,
            Delivery: self._resume,
            OnSession: self._open,
            Failure: self._stream_failed,
            EndOfStream: self._end,
        }

    @property
    def port(self) -> Port:
        """What moves the bytes."""
        return self._conversation.port

    @property
    def awaits_replies(self) -> bool:
        """Whether requests of this side wait for replies, so that reading must go on."""
        return self._requests.count() > 0

    def begin_with(self, function: Callable[[Any], Any]) -> None:
        """Give the session to a function before anything else is dispatched."""
        self.inbox.append(OnSession(function))
        self._loop.mark(self)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do."""
        conversation = self._conversation
        if conversation.is_open:
            for first in self.inbox:  # a signal handler may take it once it was asked for
                if type(first) is EndOfStream:
                    return not conversation.is_writing_out
                return type(first) is not RequestEnvelope or not conversation.is_stuck
        return False

    def step(self, until: Awaited | None, goal: int = 0) -> int:
        """Dispatch what stands in the inbox; returns how many messages that was.

        Args:
            until: What to stop at, or None.
            goal: Stop when the loop's ``dispatched`` reaches this; 0: behind what stands in the inbox now. What nested
                turns dispatch counts, or a flood could keep this one from ever returning. It also stops when its share of
                the time is over, because handlers may be slow.
        """
        # A reply runs no function of users, unless somebody watches it: so ``until``, the session and the clock are only
        # looked at after one that was watched, and now and then. All other items may run one, and are looked at after each.
        inbox = self.inbox
        conversation = self._conversation
        count = 0
        share: Share | None = None
        look = 0  # when dispatched has come to this, and there is more, it looks at goal and clock
        if not conversation.is_open:
            if conversation.reason is None:  # closing has begun, and its steps see to what is left
                self._todo.pop(self, None)
                return 0
            inbox.clear()  # of what a read that was under way has brought
        while True:
            if inbox:  # here, and no condition of the loop: behind that a signal handler may take the last
                item = inbox[0]
            else:
                self._todo.pop(self, None)
                self.dispatched_bytes = self._inputs.received_bytes
                if conversation.port.paused:
                    conversation.port.update_reading()
                break
            cls = type(item)
            if cls is ResponseEnvelope:
                told = self._requests.settle(item.id, item.response)
                if inbox and inbox[0] is item:
                    del inbox[0]
                count += 1
                if told or not count % _AHEAD:
                    if not conversation.is_open or (until is not None and until.settled):
                        break
                    if share is None:
                        share = Share(self._loop.clock)
                    elif share.is_over():
                        break
            elif until is not None and until.settled:
                break
            else:
                if not look:
                    loop = self._loop
                    by_class = self._by_class
                    waiting = self._waiting
                    goal = goal or loop.dispatched + len(inbox) + 1  # a failure is followed by the end
                if cls not in by_class or waiting:
                    done = (self._actions.get(cls) or self._arrive)(item)
                    if done is None:
                        return count
                    count += done
                else:
                    count += self._deliver(inbox, item, item, by_class[cls])
                loop.dispatched += 1
                if not conversation.is_open:
                    if loop.forked:  # a handler has forked, and this is the copy
                        raise loop.refusal()
                    if conversation.reason is None:
                        break
                    inbox.clear()  # of what a handler or an interruption has left behind the end
                if loop.dispatched >= look and inbox:
                    if loop.dispatched >= goal or (share is not None and share.is_over()):
                        break
                    share = share or Share(loop.clock)  # only now: mostly there is no second one
                    look = min(goal, loop.dispatched + share.step)
        return count

    def settle_replies(self) -> int:
        """Settle the replies in the inbox before their turn: handlers are nested too deeply to run another."""
        inbox = self.inbox
        items = list(inbox)  # it may be long, and a deque is slow in the middle
        start = self._scanned
        if start > len(items) or (start and items[start - 1] is not self._last_scanned):
            start = 0
        # From the right, where taking out is quick, and only what came since the last time.
        found = [(i, items[i]) for i in range(len(items) - 1, start - 1, -1) if reply_id(items[i]) is not None]
        rest = len(items) - len(found)
        for _, item in reversed(found):
            if type(item) is ResponseEnvelope:
                self._requests.settle(item.id, item.response)
            else:
                self._requests.fail(item.response_id, item)
        for index, item in found:  # after the last is settled: settling twice is nothing, losing one is
            if index < len(inbox) and inbox[index] is item:  # a done callback may have ticked, or closed the session
                del inbox[index]
            else:
                rest = -1
        self._scanned = rest if len(inbox) == rest else 0
        self._last_scanned = inbox[-1] if self._scanned else None
        if self._inputs.ended is not None:
            self._requests.fail_all(self._inputs.ended)  # the rest of the end has to wait for its turn
        return len(found)

    def _arrive(self, item: Any) -> int:
        """Dispatch a notification of a class that is new here, or an error that stands for a message."""
        if isinstance(item, Message):
            self._deliver_or_keep(item, item)
        elif isinstance(item, SerializationError):
            self._undecodable(item, item)
        elif isinstance(item, Exception):
            self._failed(item, item)
            return 0
        else:
            error = SerializationError(
                f"{type(self._channel.transport).__name__}.receive() returned a list with {article(type(item))} in it;"
                " all must be Messages"
            )
            self._undecodable(item, error)
        return 1

    def _deliver_or_keep(self, item: Any, message: Message) -> None:
        try:
            chain = self.on_message.chain_of(type(message))
        except Exception as exc:  # of a handler's class, which compares as it likes
            pass_on(exc)
            take_out(self.inbox, item)  # or it would raise this again and again
            raise
        if not chain or self._waiting:
            item = self.kept.keep(item, message, chain)
        if chain:
            self._deliver(self.inbox, item, message, chain)
        else:
            take_out(self.inbox, item)

    def _deliver(self, inbox: deque[Any], item: Any, message: Message, chain: Chain) -> int:
        """Give a message to its handlers; returns how many messages that was: 1.

        Args:
            inbox: The inbox.
            item: What stands for it in the inbox.
            message: The message.
            chain: The handlers that have not seen it, at least one.
        """
        error: Exception | None = None
        while True:
            handler, chain = chain  # type: ignore[misc]
            arguments = (message, self._session) if handler.takes_both else (message,)
            following = Delivery(message, chain) if chain else None
            try:
                # A nested turn may have taken the item. Look, change and call follow each other without a jump, because
                # 3.10 handles signals at jumps; so the two branches look alike.
                if following is not None:
                    # atomic: no calls
                    if inbox and inbox[0] is item:
                        inbox[0] = following

                        handler.function(*arguments)
                    else:
                        break
                else:
                    # atomic: no calls
                    if inbox and inbox[0] is item:
                        del inbox[0]

                        handler.function(*arguments)
                    break
            except BaseException as exc:
                error = first_failure(exc, error, self._session)
            if following is None:
                break
            item = following
        if error is not None:
            raise error
        return 1

    def deliver_late(self, messages: deque[Any]) -> None:
        """Give the first of a child's last words to its handlers, though the session is closed. Errors are logged."""
        for item in messages:
            break
        else:
            return
        rest = Delivery(item, ())
        try:
            rest = item if type(item) is Delivery else Delivery(item, self.on_message.chain_of(type(item)))
            if rest.chain:
                self._deliver(messages, item, rest.message, rest.chain)
        except Exception as exc:
            pass_on_own(exc)
            log.error("on_message handler of %r failed", self._session, exc_info=True)
        if not rest.chain:  # there is no handler, or the class of one has failed as it was compared
            take_out(messages, item)

    def offer(self, entry: Entry) -> None:
        """Give a kept message to the handlers that were not there when it came."""
        message = entry.message
        chain = self.on_message.chain_of(type(message))
        if not entry.unseen or not chain or not self._conversation.is_open:
            return
        delivery = Delivery(message, chain)
        for entry.unseen in map(self.inbox.appendleft, (delivery,)):  # returns None, stored before a signal is looked at
            break
        self._loop.mark(self)
        self._deliver(self.inbox, delivery, message, chain)

    def _undecodable(self, item: Any, error: SerializationError) -> None:
        """Tell of a payload that is no message: the requester, the promise that waits for it, or the handlers."""
        size = "a message" if error.payload_size is None else f"a message of {error.payload_size} bytes"
        log.debug("session %s: %s was refused: %s", self._conversation.name, size, error)
        if error.request_id is not None:
            self.responder.refuse(item, error.request_id, error)
        elif error.response_id is not None:
            self._requests.fail(error.response_id, error)
            take_out(self.inbox, item)
        else:
            self._deliver_or_keep(item, ErrorMessage(str(error)))

    def _resume(self, item: Delivery) -> int:
        if item.chain:
            self._deliver(self.inbox, item, item.message, item.chain)
        else:
            take_out(self.inbox, item)
        return 0

    def _open(self, item: OnSession) -> int:
        """Give the session to its ``on_session`` function."""
        function, session, inbox = item.function, self._session, self.inbox
        try:  # a turn beneath may have gone on with it
            # atomic: no calls
            if inbox and inbox[0] is item:
                del inbox[0]  # entered once, whatever comes of it

                function(session)
        except Exception:
            self._conversation.close()  # nobody has it
            raise
        return 0

    def _stream_failed(self, item: Failure) -> int:
        error = item.error
        if isinstance(error, InvalidStreamError):
            error.session = self._session  # it may have come through another
        self._failed(item, error)
        return 0

    def _failed(self, item: Any, error: Exception) -> None:
        """Tell the on_exception handlers of a failure of the stream, and end unless one of them objects."""
        text = str(error) if isinstance(error, IpcError) else describe(error)
        reason = StreamClosedError(f"the stream failed ({self._conversation.name}): {text}")
        reason.__cause__ = error
        keep = False
        try:
            take_out(self.inbox, item)
            # Not what still cannot be used: it would be reported again at once.
            keep = self.report(error) and not (isinstance(error, InvalidStreamError) and self._channel.find_invalid())
        finally:  # also if a handler was interrupted
            self._loop.repairs[self.port] = None  # first: after a further interruption the next turn finds out what is left
            if not keep and self._conversation.is_open:
                self._channel.drop_output()
                self.port.end(reason)
            if type(item) is Failure:
                self.port.failure_reported(keep)

    def report(self, error: BaseException) -> bool:
        """Tell the on_exception handlers; returns whether one of them wants the session to stay open."""
        handlers = self.on_exception.of(type(error))
        if not handlers:
            trace = None if isinstance(error, IpcError) else error
            kind = type(error).__name__
            log.error("%r has no on_exception handler for %s: %s", self._session, kind, error, exc_info=trace)
            return False
        log.debug("session %s: its on_exception handlers get %s: %s", self._conversation.name, type(error).__name__, error)
        keep = False
        for handler in handlers:
            arguments = (error, self._session) if handler.takes_both else (error,)
            try:
                keep = handler.function(*arguments) is False or keep
            except Exception as exc:
                pass_on_own(exc)
                log.error("on_exception handler of %r failed", self._session, exc_info=True)
        return keep

    def _end(self, item: EndOfStream) -> int | None:
        """Close behind the last message."""
        self._conversation.start_writing_out()
        if self._conversation.is_writing_out:
            return None
        self._conversation.close_now(item.error)
        return 0
