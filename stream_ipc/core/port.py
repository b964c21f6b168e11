"""Between a channel and the loop: what is watched, when it is read and written.

Knows the loop, channels and the inbox that it fills. Must not know messages, nor what becomes of them.
"""

from __future__ import annotations

import math

from ..errors import InvalidStreamError, StreamClosedError, unraised
from ..interruptions import interruption_in, pass_on, pass_on_lack_of_stack
from ..transports.channel import POLL_INTERVAL
from .items import Failure
from .poller import READ, WRITE
from .sending import HIGH_WATER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable
    from typing import Any

    from ..transports.channel import Channel
    from .dispatcher import Dispatcher
    from .loop import Loop

__all__ = ["Port"]

# A conversation whose inbox holds more is not read from until it has been worked off...
_INBOX_SMALL = 64  # messages: below this nothing is counted, because the next turn dispatches them
INBOX_COUNT = 4096  # messages
INBOX_BYTES = 4 * 1024 * 1024
# ...but while nothing can be worked off, because requests wait for the queue to drain or because handlers are nested too
# deeply, reading must go on, or two sides that flood each other would wait for each other. It is still bounded.
INBOX_BYTES_HARD = 256 * 1024 * 1024
INBOX_COUNT_HARD = 500_000

FAILURE_INTERVAL = 0.01  # seconds from one failure of a stream to the next, if handlers keep it open


class Port:
    """Watches a channel for one conversation, and moves its bytes.

    Owns which descriptors are watched, whether reading is paused, and whether a failure waits to be reported. What is
    watched is derived from the channel by ``rearm``, which may be called at any time.

    Attributes:
        channel: The channel.
        paused: Whether it is not read from because the inbox is long.
        watched: What each watched descriptor is watched for; 0 if that is not known.
        failing: Whether a failure stands in the inbox, or was just reported. The channel is left alone meanwhile.
    """

    def __init__(self, loop: Loop, channel: Channel, dispatcher: Dispatcher, session: Any) -> None:
        self.channel = channel
        self.failing: bool = False
        self._loop = loop
        self._todo = loop.todo
        self._dispatcher = dispatcher
        self._session = session  # of errors
        self._inputs = channel.inputs
        self._owed = dispatcher.responder.owed
        self._inbox: deque[Any] = dispatcher.inbox
        self.watched: dict[int, int] = {}
        self._poll_due = math.inf
        self._resume_due = math.inf  # when reading goes on after a failure
        self._pace_due = -math.inf  # a failure that is reported sooner holds up reading until then
        self.paused: bool = False
        self._reading = False  # a call is reading, so that a message's constructor may be at work
        self._closed = False
        self._polls_output = False  # what is queued can be written only by trying, as the channel has said last
        channel.on_change = self.rearm

    @property
    def invalid(self) -> InvalidStreamError | None:
        """The error of a stream that its owner closed, which is still to be reported; or None."""
        if self.failing:
            for item in self._inbox.copy():  # a signal handler may turn
                if type(item) is Failure and isinstance(item.error, InvalidStreamError):
                    return item.error
        return None

    # -- watching

    def rearm(self) -> None:
        """Watch what the channel wants to be watched for."""
        if self._closed:
            return
        try:
            reads, write_fd, poll_in, self._polls_output = self.channel.interest()
            wanted = dict.fromkeys(reads, READ)
        except StreamClosedError as exc:  # as receive() says it
            pass_on(exc)
            self._inputs.put_end(self._inbox, exc)
            self._loop.mark(self._dispatcher)
            return
        except Exception as exc:  # of a user's transport
            self._loop.repairs[self] = None
            self.report_failure(exc)
            return
        if self._closed:  # a user's transport has closed its session
            return
        if self.paused or self.failing or self._inputs.ended is not None:
            poll_in = POLL_INTERVAL if self._polls_output and not self.failing else math.inf
            wanted = {}
        if write_fd is not None:  # also when the other side has stopped writing: it may still read
            wanted[write_fd] = wanted.get(write_fd, 0) | WRITE
        if wanted != self.watched:
            self._watch(wanted)
        self._poll_again(poll_in)

    def ask_again(self) -> None:
        """Watch what the channel wants now, of which it does not tell; a descriptor may be another file's now."""
        watched = self.watched
        for fd in [*watched]:
            if not self._loop.poller.is_same(fd):
                watched[fd] = 0
        self.rearm()

    def _poll_again(self, seconds: float) -> None:
        """Poll in so many seconds at the latest: in every turn if that is short, otherwise when they are over."""
        is_short = seconds <= POLL_INTERVAL
        self._loop.chores.set_polled(self, seconds if is_short else math.inf)
        self._poll_due = math.inf if is_short else self._loop.clock() + seconds
        self._set_timer()

    def _set_timer(self) -> None:
        self._loop.set_timer(self, min(self._poll_due, self._resume_due))

    def on_time(self, now: float) -> None:
        """Poll, or read on after a failure, if it is time."""
        if now >= self._resume_due:
            self.failing = False
            self._resume_due = math.inf
            self.rearm()
        elif now >= self._poll_due:
            self.poll()
        else:
            self._set_timer()

    def _watch(self, wanted: dict[int, int]) -> None:
        loop = self._loop
        watched = self.watched
        has_more = self in loop.repairs  # something else was left undone before
        loop.repairs[self] = None
        self.watched = dict.fromkeys((*watched, *wanted), 0)  # unknown, until all is done
        for fd in watched:
            if fd not in wanted:
                loop.poller.unwatch(fd, self)
        for fd, events in wanted.items():
            if watched.get(fd) == events:
                continue
            if watched.get(fd) == 0:
                loop.poller.unwatch(fd, self)
            try:
                loop.poller.watch(fd, events, self)
            except (OSError, TypeError, ValueError, OverflowError) as exc:  # the last three of what is no descriptor
                pass_on(exc)
                self.report_failure(InvalidStreamError(f"descriptor {fd!r} cannot be waited for: {exc}"))
                return
        self.watched = wanted
        if not has_more:
            loop.repairs.pop(self, None)
        if self._closed:  # by a signal handler
            self.close()

    def repair(self) -> None:
        """Do what an interruption has left undone, in any number of calls."""
        self.watched = dict.fromkeys(self.watched, 0)
        if not self._closed:
            if self._resume_due == math.inf and not any([type(item) is Failure for item in self._inbox.copy()]):
                self.failing = False
            self._inputs.resume(self._inbox)
            self.rearm()
            if not self.failing:
                self.write_or_report()
                if self.channel.outbox.is_broken and self._inputs.ended is None and self.channel.find_invalid() is None:
                    self.note_write_error(StreamClosedError(self.channel.broken_text()))
            self._loop.mark(self._dispatcher)
        self._loop.repairs.pop(self, None)

    def close(self) -> None:
        """Stop watching. An interrupted call can be made again."""
        self._closed = True
        for fd in [*self.watched]:
            self._loop.poller.unwatch(fd, self)
        self.watched = {}
        self._loop.chores.set_polled(self, math.inf)
        self._loop.set_timer(self, math.inf)
        self._loop.repairs.pop(self, None)

    def check(self) -> None:
        """Look for what no poller tells: a stream that its owner closed, and what interruptions have left."""
        if self._closed or self.failing or self._reading:
            return
        outbox = self.channel.outbox
        if self._inputs.ended is None:
            text = self.channel.find_invalid()
            if text is not None:
                self.report_failure(InvalidStreamError(text))
                return
            self._read_by(self._inputs.check)
            if self.paused:  # then nothing else tells of its end
                self._read_by(self._inputs.look_for_hangup)
        if outbox.queued_bytes and not outbox.corked:
            self.write_or_report()
        if self._poll_due < math.inf:
            self.poll()
        self.rearm()

    # -- reading

    def on_ready(self, fd: int, events: int) -> None:
        """Write and read: a descriptor is ready in some way, or (-1) it is time to poll."""
        if events != READ:
            self.write_or_report()
            if events == WRITE or self._closed:
                return
        if self._reading:
            # A message's constructor, a finalizer or a signal handler waits for something. What is being read cannot be
            # read once more beneath it, and its descriptor must not keep that wait awake.
            self._set_paused(True)
            return
        try:
            self._reading = True
            self._inputs.by_fd.get(fd, self._inputs).read(self._inbox)
        except BaseException as exc:
            # atomic: no calls
            self._reading = False
            self._loop.repairs[self] = None  # what was read may not be decoded yet, and nothing else would tell

            self.report_failure(exc)
        finally:
            self._reading = False
        self._todo[self._dispatcher] = None

    def poll(self) -> None:
        """Read though no descriptor is ready, and write to a stream that has none."""
        if self._closed:
            return
        if self._polls_output and not self.failing:
            self.write_or_report()
        if self._closed or self.paused or self.failing or self._inputs.ended is not None:
            return
        self.on_ready(-1, READ)

    def drain(self) -> None:
        """Read what is there now, as much as a pipe or socket can hold: this is the last look."""
        self._read_by(self._inputs.drain)

    def look_for_end(self) -> None:
        """Ask whether the other side is gone, where only asking tells at once."""
        self._read_by(self._inputs.look_for_end)

    def _read_by(self, method: Callable[[deque[Any]], None]) -> None:
        if self._reading or self._closed or self.failing or self._inputs.ended is not None:
            return
        try:
            self._reading = True
            method(self._inbox)
        except BaseException as exc:
            # atomic: no calls
            self._reading = False
            self._loop.repairs[self] = None

            self.report_failure(exc)
        finally:
            self._reading = False
        if self._inbox or self.paused:  # by a turn beneath, as in on_ready
            self._loop.mark(self._dispatcher)

    def limit_reading(self) -> None:
        """Stop reading if the inbox is long; called before each turn while something is in it."""
        if len(self._inbox) + len(self._owed) > _INBOX_SMALL or self._loop.users_wait or self.paused:
            self.update_reading()

    def update_reading(self) -> None:
        """Stop reading while the inbox is long, go on when it is not."""
        if self._reading:
            return
        paused = False
        inbox = self._inbox
        dispatcher = self._dispatcher
        if inbox:
            size = self._inputs.received_bytes - dispatcher.dispatched_bytes
            if self._loop.users_wait or self.channel.outbox.queued_bytes > HIGH_WATER:
                paused = size > INBOX_BYTES_HARD or len(inbox) > INBOX_COUNT_HARD
            else:
                paused = len(inbox) > INBOX_COUNT or size > INBOX_BYTES
        owed = len(self._owed)
        if owed and owed + len(inbox) > INBOX_COUNT and not paused:
            # The other side asks less once it has replies. But these may wait for something that it is still to send.
            paused = owed + len(inbox) > INBOX_COUNT_HARD or not (self._loop.users_wait or dispatcher.awaits_replies)
        self._set_paused(paused)

    def _set_paused(self, paused: bool) -> None:
        if paused != self.paused:
            self.paused = paused
            self.rearm()

    def report_failure(self, exc: BaseException) -> None:
        """Report that the stream has failed, once what had arrived is dispatched; raises what a signal handler has raised.

        The caller has entered the port into ``repairs`` before, because another interruption may come at once.
        """
        if not isinstance(exc, Exception):
            raise exc
        pass_on(exc)
        pass_on_lack_of_stack(exc)  # of the caller: a turn that has more room goes on
        if isinstance(exc, InvalidStreamError) and exc.session is None:
            exc.session = self._session
        if self.failing or self._closed:
            return
        failure = Failure(exc)
        # atomic: no calls
        self.failing = True
        self._inbox += (failure,)

        self._loop.mark(self._dispatcher)
        self.rearm()

    def failure_reported(self, keep: bool) -> None:
        """Take note that a failure was reported; if the stream is kept, read on, but not at once if this lasts."""
        self.failing = False
        if keep:
            now = self._loop.clock()
            due, self._pace_due = self._pace_due, max(now, self._pace_due) + FAILURE_INTERVAL
            if now < due:
                self._resume_due = due
                self._set_timer()
                self.failing = True
            self.rearm()

    # -- writing

    def write(self) -> None:
        """Write what the stream takes now.

        Raises:
            StreamClosedError: The other side is gone.
            InvalidStreamError: The stream was closed by its owner.
        """
        if self._closed:
            return
        try:
            self.channel.flush()
        except (StreamClosedError, InvalidStreamError) as exc:
            self.note_write_error(exc)
            raise

    def write_or_report(self) -> None:
        """Write as ``write`` does; what goes wrong is reported in turn."""
        if self._closed:
            return
        try:
            self.write()
        except (StreamClosedError, InvalidStreamError):
            pass  # it is reported already
        except BaseException as exc:
            self._loop.repairs[self] = None
            self.report_failure(exc)
        if not self.channel.outbox.queued_bytes:
            self._loop.progress += 1
            if self._inbox:
                self._loop.mark(self._dispatcher)  # requests may have waited for this
        if self.paused:
            self.update_reading()

    def note_write_error(self, exc: BaseException) -> None:
        """Take note of what ``encode``, ``put`` or ``flush`` of the channel has raised.

        If nothing can be written any more, what the other side had written before is still read, and then it ends. After
        an interruption the message may be queued, so the caller has entered the port into ``repairs`` before.
        """
        if isinstance(exc, (InvalidStreamError, StreamClosedError)) or (
            self._loop.forked and isinstance(exc, Exception) and interruption_in(exc) is None
        ):
            self._loop.check_entry()  # a serializer or an id generator may have forked, and this is the copy
        if isinstance(exc, InvalidStreamError):
            self.report_failure(exc)
        elif isinstance(exc, StreamClosedError) and not self._closed:
            is_of_write = self.channel.outbox.is_broken  # and not an id generator's own, say
            self.channel.drop_output()
            if self._reading:  # by a call beneath this one, which goes on to the end
                return
            was_open = self._inputs.ended is None
            self.drain()
            if was_open and is_of_write:
                self.channel.add_last_words(exc, self._inbox)
            reason = unraised(exc)
            if was_open:
                self._inputs.correct_end(self._inbox, reason)  # the failed write tells more than the end of what was read
            self.end(reason)

    def end(self, error: StreamClosedError) -> None:
        """Put the end into the inbox, if it is not there yet."""
        self._inputs.put_end(self._inbox, error)
        self._loop.mark(self._dispatcher)
        self.rearm()
