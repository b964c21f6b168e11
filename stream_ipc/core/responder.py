"""Answering requests: handlers are asked, and what they return is sent.

Knows messages, handlers and the port of its conversation. Must not know frames, descriptors or what kind of stream there
is. What is said in ``dispatcher`` about items in the inbox holds here, too.
"""

from __future__ import annotations

import math

from .. import log
from ..errors import FrameTooLargeError, InvalidStreamError, SerializationError, StreamClosedError, article
from ..handlers import HandlerList, name_of
from ..interruptions import interruption_in, pass_on_own
from ..messages import RESPONSE, ErrorMessage, Message, RequestEnvelope, ResponseEnvelope, failed_in_dispatch
from ..registry import wire_name_of
from .items import take_out
from .owed import Owed, find_deferrer
from .sending import HIGH_WATER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from typing import Any

    from .conversation import Conversation
    from .loop import Loop

__all__ = ["Responder"]

_ENVELOPES = frozenset({RequestEnvelope, ResponseEnvelope})

_LOOK_INTERVAL = 0.5  # seconds from one turn to the next, while replies are owed, for a loop that would wait longer


class Responder:
    """Answers the requests of one conversation.

    Owns the handlers of requests, and which replies are owed: each ``Owed`` enters itself there.

    Args:
        conversation: Whose requests.
        inbox: Where requests stand.

    Attributes:
        conversation: As above.
        loop: The conversation's.
        on_request: Handlers of requests.
        owed: Replies that are still to be sent.
    """

    def __init__(self, conversation: Conversation, inbox: deque[Any]) -> None:
        self.on_request: HandlerList = HandlerList("on_request", of_messages=True)
        self.conversation: Conversation = conversation
        self.owed: dict[Owed, None] = {}
        self._inbox = inbox
        self._session = conversation.session
        self.loop: Loop = conversation.loop
        self._channel = conversation.channel
        self._encode = conversation.channel.encode
        self._put = conversation.channel.put
        self._outbox = conversation.channel.outbox

    def serve(self, item: RequestEnvelope) -> int | None:
        """Ask the handlers of a request, and send the reply."""
        if self._outbox.queued_bytes > HIGH_WATER and self.conversation.is_stuck:
            return None
        # The item leaves the inbox just before the first handler is entered. From then on the requester must get
        # something, whatever cuts this short: ``taken`` and ``unsent`` say how far it has come, and the last block owes
        # what is missing.
        request = item.request
        cls = type(request)
        inbox = self._inbox
        by_class = self.on_request.by_class
        reply: Any = None
        taken = False
        unsent: Any = True  # then the frame of the reply, which is empty once it is handed over
        try:
            if cls in by_class:
                chain = by_class[cls]
            elif isinstance(request, Message) and cls not in _ENVELOPES:
                chain = self.on_request.chain_of(cls)
            else:  # of a transport or a serializer that does not check
                self.refuse(item, item.id, SerializationError(f"an envelope must hold a Message, not {article(cls)}"))
                return 1
            while True:
                if not chain:
                    break
                handler, chain = chain
                function = handler.function
                arguments = (request, self._session) if handler.takes_both else (request,)
                try:
                    if taken:
                        reply = function(*arguments)
                    else:
                        # atomic: no calls
                        if inbox and inbox[0] is item:  # in this form for 3.10: see Dispatcher._deliver
                            taken = True
                            del inbox[0]

                            reply = function(*arguments)
                        else:
                            return 0  # a turn beneath has gone on with it
                except Exception as exc:
                    pass_on_own(exc)
                    reply = failed_in_dispatch(exc)
                    self._log_error_reply(item.id, exc)
                if reply is not None:
                    break
                taken = True  # it is already: a loop in a try must not end with an if (tests/README.rst)
            if not isinstance(reply, Message) or type(reply) in _ENVELOPES:
                if reply is None:
                    reply = self._unhandled(cls)
                elif find_deferrer(reply) is not None:
                    reply = Owed(self, item.id, reply)
                else:
                    reply = _wrong_reply(function, reply)
            if not taken:
                take_out(inbox, item)
                taken = True
            if isinstance(reply, Owed):
                self._put_off(reply)
            elif not self.conversation.is_open:
                self._log_dropped(item.id)
            else:
                try:
                    unsent = self._encode(RESPONSE, item.id, reply)
                    self._put(unsent)
                except BaseException as exc:
                    if self._takes_another(exc):
                        reply = Owed(self, item.id, reply)
                        self._send_in_place(reply, exc)
        except BaseException as exc:
            if not taken and isinstance(exc, Exception) and interruption_in(exc) is None:
                take_out(inbox, item)  # or it would raise this again and again
                taken = True
            if taken and unsent:
                self._owe(item.id, reply, exc)
            raise
        return 1

    def _put_off(self, owed: Owed) -> None:
        """Owe a reply that a handler has put off, or send it if it is known."""
        self.loop.set_timer(self, self.loop.clock() + _LOOK_INTERVAL)
        owed.enter()
        owed.go_on()
        if not self.conversation.is_open:
            self.drop_owed()

    def _owe(self, id: Any, reply: Any, exc: BaseException) -> None:
        """Owe the reply to a request whose handling was cut short.

        If the program goes on, the requester gets it in the next turn, or learns what happened; if it ends, the requester
        learns that.
        """
        if not isinstance(reply, Owed):
            is_known = isinstance(reply, Message) or find_deferrer(reply) is not None
            reply = Owed(self, id, reply if is_known else failed_in_dispatch(exc))
        reply.enter()

    def on_time(self, now: float) -> None:
        """Have another turn come: a thread may drop what a reply was put off to, which wakes nobody."""
        self.loop.set_timer(self, self.loop.clock() + _LOOK_INTERVAL if self.owed else math.inf)

    def update_timer(self) -> None:
        """Have no turn come for what is owed no more."""
        if not self.owed:
            self.loop.set_timer(self, math.inf)

    def refuse(self, item: Any, id: Any, error: SerializationError) -> None:
        """Answer a request that is none, for which an item stands in the inbox, with an error. No handler sees it."""
        owed = Owed(self, id, ErrorMessage(f"the request could not be decoded: {error}"))
        # atomic: no calls
        if self._inbox and self._inbox[0] is item:
            self.owed[owed] = None
            self.loop.later[owed] = None
            del self._inbox[0]

        owed.go_on()

    def send(self, owed: Owed, reply: Message) -> None:
        """Send an owed reply, or an error in its place."""
        if not self.conversation.is_open:
            self._log_dropped(owed.id)
            return
        try:
            self._hand_over(owed, reply)
        except BaseException as exc:
            if self._takes_another(exc):
                self._send_in_place(owed, exc)

    def _hand_over(self, owed: Owed, reply: Message) -> None:
        owed.unsent = self._encode(RESPONSE, owed.id, reply)
        self._put(owed.unsent)

    def _takes_another(self, exc: BaseException) -> bool:
        """Take note of what sending a reply has raised; returns whether another can be sent in its place."""
        self.loop.repairs[self.conversation.port] = None
        self.conversation.port.note_write_error(exc)
        if isinstance(exc, (FrameTooLargeError, SerializationError)):
            return True
        if not isinstance(exc, (StreamClosedError, InvalidStreamError)):  # of which the port has taken note
            self.conversation.port.report_failure(exc)
        return False

    def _log_error_reply(self, id: Any, exc: BaseException) -> None:
        log.debug("session %s: request %.128r was answered with %s", self.conversation.name, id, article(type(exc)))

    def _unhandled(self, cls: type) -> ErrorMessage:
        text = f"Unhandled request: {wire_name_of(cls)}"
        twin = self.on_request.twin_of(cls)
        if twin is not None:
            text = f"{text} (it is a class of {cls.__module__}, and a handler takes that of {twin.__module__}"
            twice = ", a module that is there twice: run as a program, and imported"
            text += f"{twice if '__main__' in (cls.__module__, twin.__module__) else ''})"
        return ErrorMessage(text)

    def _log_dropped(self, id: Any) -> None:
        log.debug("session %s: the reply to request %.128r is dropped: the session is closed", self.conversation.name, id)

    def drop_owed(self) -> None:
        """Drop the replies that are owed: nobody can get them any more. An interrupted call can be made again."""
        for owed in [*self.owed]:
            owed.drop()
        self.loop.set_timer(self, math.inf)

    def _send_in_place(self, owed: Owed, exc: BaseException) -> None:
        """Send an error in place of an owed reply, which cannot be sent because of another."""
        reply = owed.reply
        text = reply.message if isinstance(reply, ErrorMessage) else f"the reply could not be sent: {exc}"
        text = text.encode("utf-8", "backslashreplace").decode()
        # Cut to fit: in characters, of which each may take several bytes in the payload.
        limit = getattr(self._channel.transport, "max_frame_size", 4096)
        error = exc
        for length in (len(text), limit // 8, 64, 8):
            shown = text if len(text) <= length else text[:length] + "..."
            try:
                self._hand_over(owed, ErrorMessage(shown))
                self._log_error_reply(owed.id, exc)
                return
            except BaseException as another:
                if not self._takes_another(another):
                    return
                error = another
        log.error("%r: no reply to request %.128r could be sent: %s", self._session, owed.id, error)


def _wrong_reply(function: Any, reply: Any) -> ErrorMessage:
    remedy = "it must return a Message (no envelope), a ResponsePromise, a DeferredReply, or None to pass the request on"
    returned = article(type(reply))
    if isinstance(reply, type):
        returned = f"the class {reply.__name__}"
        remedy = f"it must return an instance: {reply.__name__}(...)" if issubclass(reply, Message) else remedy
    error = TypeError(f"the on_request handler {name_of(function)} returned {returned}; {remedy}")
    return failed_in_dispatch(error)
