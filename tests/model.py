"""A small model of what random operations of the whole public interface must come to, and the shrinking of those that
do not come to it.

An operation is a name and a few numbers. Whatever it picks, it picks by these, modulo what is there at that moment: so
each part of a list of operations is a list of operations, too, and one that fails can be made shorter.
"""

import gc
import logging
import os
import random
import socket
import sys
import tempfile
import time
import traceback
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, TypeVar

from stream_ipc import (
    DeferredReply,
    IpcError,
    IpcPeer,
    Message,
    RemoteError,
    RequestTimeoutError,
    Session,
    StreamClosedError,
    UnexpectedReplyError,
    WorkerPool,
    as_completed,
    gather,
)
from tests.helpers import no_pending
from tests.messages import Many, Note, Ping, Pong

T = TypeVar("T")

SIZES = (0, 0, 0, 10, 3000, 70000, 300000)  # of what a message carries
FULL = 500_000  # bytes that may be queued before the other side has its turn: nobody else drives it
LINKS = 5


class Operation(NamedTuple):
    name: str
    number: int
    where: int
    first: int
    second: int


NAMES = {
    "notify": 12, "request": 22, "keep": 6, "receive": 5, "batch": 4, "broadcast": 3, "settle deferred": 9,
    "cancel": 4, "drop promise": 3, "wait": 6, "gather": 3, "as completed": 3, "callback": 7, "flush": 4,
    "tick": 18, "wakeup": 2, "close": 1, "remove": 1, "connect": 2, "submit": 2,
}  # fmt: skip

WAYS = (
    "answer", "answer", "answer", "raise", "pass", "nested", "tick", "defer", "defer", "defer", "settled", "dropped",
    "again", "forward", "wrong", "unsendable", "progress", "progress",
)  # fmt: skip
TIMEOUTS = (None, None, 20.0, 0.05, 0.0)


def operations(seed: int, count: int) -> List[Operation]:
    rng = random.Random(seed)
    names = rng.choices(list(NAMES), list(NAMES.values()), k=count)
    return [Operation(name, n, *(rng.randrange(1 << 16) for _ in range(3))) for n, name in enumerate(names, 1)]


def pick(things: Sequence[T], number: int) -> T:
    return things[number % len(things)]


class HandlerError(Exception):
    """What handlers of notifications raise now and then."""


class Asked:
    """A request, and what was seen of its outcome."""

    def __init__(self, promise: Any, what: str, timeout: Optional[float], expect: Any) -> None:
        self.promise = promise
        self.what = what
        self.timeout = timeout
        self.expect = expect
        self.cancelled = False
        self.outcomes: List[Any] = []


class Side:
    """One end of a conversation, what it has sent, and what it got."""

    def __init__(self, world: "World", link: "Link", session: Session, sock: Optional[socket.socket] = None) -> None:
        self.world = world
        self.link = link
        self.session = session
        self.sock = sock
        self.sent: List[int] = []  # what the other side's handlers are to see, in order
        self.got: List[int] = []
        self.kept_sent: List[int] = []  # what its receive() is to return
        self.kept_got: List[int] = []
        self.reported: Set[int] = set()  # requests of which the other side has notified this one before it answered
        self.asked: Dict[int, Asked] = {}
        self.deferred: List[Tuple[int, DeferredReply]] = []
        self.used: List[DeferredReply] = []
        self.whole = True  # everything that was sent has left
        self.closed = 0
        self.depth = 0
        session.on_message(self.on_note)
        session.on_request(self.on_ping)
        session.on_close(self.on_close)

    @property
    def other(self) -> "Side":
        return self.link.sides[self is self.link.sides[0]]

    # -- handlers

    def on_close(self, session: Session) -> None:
        assert session is self.session and session.reason is not None and not session.is_open
        self.closed += 1

    def on_note(self, note: Note) -> None:
        number = note.data[0]
        if note.text == "report":
            self.reported.add(number)
            return
        self.got.append(number)
        self.depth += 1
        try:
            if note.text == "raise":
                self.world.raised += 1
                raise HandlerError(number)
            if note.text == "tick" and self.depth < 5:
                self.session.peer.tick()
            if note.text == "swap":
                self.session.off_message(self.on_note)
                self.session.on_message(self.on_note)
            if note.text == "close":
                self.close(0.01)
        finally:
            self.depth -= 1

    def on_ping(self, ping: Ping) -> Any:
        self.got.append(ping.value[0])
        self.depth += 1
        try:
            return self.answer(*ping.value)
        except HandlerError:
            self.world.swallowed += 1  # it becomes the answer
            raise
        finally:
            self.depth -= 1

    def answer(self, number: int, what: str, data: bytes) -> Any:
        if what == "raise":
            raise LookupError(f"asked for {number}")
        if what == "pass":
            return None
        if what == "nested" and self.depth < 5 and self.session.is_open:
            # Any of the two ends may close meanwhile; then the error becomes the answer.
            self.session.request(Note("", (-number,)), timeout=0.002).wait()
        if what == "tick" and self.depth < 5:
            self.session.peer.tick()
        if what == "defer":
            reply = DeferredReply()
            self.deferred.append((number, reply))
            return reply
        if what in ("settled", "dropped"):
            reply = DeferredReply()
            if what == "settled":
                assert reply.send(Pong(number))
                self.used.append(reply)
            return reply
        if what == "again" and self.used:
            return pick(self.used, number)
        if what == "forward":
            side = pick(self.world.sides(), number)
            if side.session.is_open and not side.full():
                return side.session.request(Note("", (-number,)), timeout=5)
        if what == "wrong":
            return Note("wrong", (number,))
        if what == "unsendable":
            return Pong(object())
        if what == "progress":
            self.session.notify(Note("report", (number, data)))
        return Pong(number)

    # -- what a program does

    def full(self) -> bool:
        return self.session.queued_bytes > FULL

    def send(self, function: Callable[[], T], numbers: List[int], *number: int) -> Optional[T]:
        """Call what sends, and take note of it; None if the other side is gone."""
        try:
            result = self.world.call(function)
        except StreamClosedError:
            assert self.link.ended, "the session is closed, and nobody has closed it"
            return None
        if not self.link.ended:
            numbers += number
        return result

    def ask(self, number: int, what: str, size: int, timeout: Optional[float]) -> None:
        expect = Pong if number % 3 else Message
        message = Ping((number, what, bytes(size)))
        promise = self.send(lambda: self.session.request(message, timeout, expect=expect), self.sent, number)
        if promise is not None:
            self.asked[number] = Asked(promise, what, timeout, expect)

    def look(self, asked: Asked, timeout: float) -> bool:
        """Wait for an outcome, and take note of it; returns whether it is there."""
        try:
            outcome: Any = asked.promise.wait(timeout)
        except HandlerError:
            self.world.caught += 1
            return False
        except IpcError as exc:
            outcome = exc
        except TimeoutError:
            return False
        assert asked.promise.done
        asked.outcomes.append(outcome)
        return True

    def close(self, timeout: Optional[float]) -> None:
        self.link.ended = True
        # What TCP has taken is lost if the other side writes before it has read: it gets a reset then.
        if self.session.queued_bytes or self.link.is_tcp:
            self.whole = False
        if timeout is None:
            self.session.close()
        else:
            self.session.close(timeout)
        assert not self.session.is_open
        self.link.closed_by.add(self)

    # -- what must be true

    @property
    def has_everything(self) -> bool:
        """Whether it has got all that was sent, or need not get it."""
        return self in self.link.closed_by or not self.other.whole or len(self.got) >= len(self.other.sent)

    def check(self) -> None:
        got, sent = self.got, self.other.sent
        assert got == sent[: len(got)], f"not in order, twice or lost: {difference(got, sent)}"
        assert self.kept_got == self.other.kept_sent[: len(self.kept_got)], "receive() returned something else"
        if self not in self.link.closed_by and self.other.whole:
            # Nobody has closed this end, and what the other one has sent has left it.
            assert got == sent, f"lost: {difference(got, sent)}"
            assert self.kept_got == self.other.kept_sent, "receive() has lost something"
        for number, asked in self.asked.items():
            assert self.look(asked, 1) or self.look(asked, 1), f"request {number} never settled"
            first = asked.outcomes[0]
            assert all(outcome is first for outcome in asked.outcomes), f"request {number} settled twice"
            assert self.is_allowed(number, asked, first), f"request {number} ({asked.what}) came to {first!r}"

    def is_allowed(self, number: int, asked: Asked, outcome: Any) -> bool:
        what = asked.what
        if asked.cancelled:
            return type(outcome) is IpcError
        if isinstance(outcome, StreamClosedError):
            return self.link.ended
        if isinstance(outcome, RequestTimeoutError):
            return asked.timeout is not None and asked.timeout < 1
        text = str(outcome)
        if isinstance(outcome, UnexpectedReplyError):
            return what == "wrong" and asked.expect is Pong
        if isinstance(outcome, RemoteError):
            if what in ("answer", "settled", "wrong", "progress"):
                return what == "progress" and self.link.ended
            return {
                "raise": f"asked for {number}" in text,
                "pass": "Unhandled request" in text,
                "dropped": "was dropped" in text,
                "again": "returned before" in text,
                "unsendable": "Pong.value" in text,
                "defer": f"no luck with {number}" in text or "was dropped" in text,
            }.get(what, True)
        if what == "wrong":
            return bool(outcome == Note("wrong", (number,)))
        if what == "progress":
            return outcome == Pong(number) and number in self.reported
        return outcome == Pong(number) and what not in ("raise", "pass", "dropped", "unsendable")


def difference(got: List[int], sent: List[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(got, sent)) if a != b), min(len(got), len(sent)))
    return f"{got[at : at + 5]} in place of {sent[at : at + 5]} at {at}"


class Link:
    """Two ends of one conversation.

    Attributes:
        ended: Whether one of them was closed, or begins to be.
        closed_by: The ends that the program has closed itself.
    """

    def __init__(self) -> None:
        self.sides: List[Side] = []
        self.ended = False
        self.is_tcp = False
        self.closed_by: Set[Side] = set()


class World:
    """Two peers in one process, conversations of all kinds between them, and a pool if there are tasks for one."""

    def __init__(self, kind: int, pool: bool) -> None:
        self.peers = [IpcPeer(timeout=5), IpcPeer(timeout=5)]
        self.folder = tempfile.TemporaryDirectory()
        self.links: List[Link] = []
        self.accepted: List[Session] = []
        self.listeners: List[Any] = []
        self.loose: List[socket.socket] = []  # sockets whose sessions were removed
        self.called: List[List[int]] = []  # for each done callback, how often
        self.raised = self.caught = self.swallowed = 0
        self.pool: Optional[WorkerPool] = None
        self.tasks: List[Tuple[str, int, Any]] = []
        self.deaths = 0
        self.wants_pool = pool
        self.connect(kind)

    def sides(self) -> List[Side]:
        return [side for link in self.links for side in link.sides]

    def call(self, function: Callable[[], T]) -> Optional[T]:
        """Call what may run handlers."""
        try:
            return function()
        except HandlerError:
            self.caught += 1
            return None

    def connect(self, kind: int) -> None:
        """Begin one more conversation: over a socket pair, pipes, of one peer, or over a listener."""
        first, second = self.peers
        link = Link()
        way = kind % 5
        if way == 0:
            a, b = socket.socketpair()
            link.sides.append(Side(self, link, first.create_socket_session(a), a))
            link.sides.append(Side(self, link, second.create_socket_session(b), b))
        elif way == 1:
            (read, other_write), (other_read, write) = os.pipe(), os.pipe()
            link.sides.append(Side(self, link, first.create_stream_session(write, read)))
            link.sides.append(Side(self, link, second.create_stream_session(other_write, other_read)))
        elif way == 2:
            link.sides += [Side(self, link, session) for session in first.create_session_pair()]
        else:
            if not self.listeners:
                for address in (os.path.join(self.folder.name, "socket"), ("127.0.0.1", 0)):
                    self.listeners.append(second.listen(address, self.accepted.append))
            link.is_tcp = way == 4
            session = first.connect(self.listeners[way - 3].address)
            link.sides.append(Side(self, link, session))
            end = time.monotonic() + 10
            while not self.accepted:
                assert time.monotonic() < end, "a connection was never accepted"
                self.call(lambda: second.tick(0.01))
            link.sides.append(Side(self, link, self.accepted.pop()))
        self.links.append(link)

    # -- operations

    def do(self, operation: Operation) -> None:
        side = pick(self.sides(), operation.where)
        if side.full():
            self.call(side.other.session.peer.tick)  # a send that waits for room would wait in vain
            return
        getattr(self, "do_" + operation.name.replace(" ", "_"))(side, *operation[1:2], *operation[3:])

    def do_notify(self, side: Side, number: int, first: int, second: int) -> None:
        text = pick(("", "", "", "", "raise", "tick", "swap", "close" if second % 97 == 0 else ""), first)
        note = Note(text, (number, bytes(pick(SIZES, second))))
        if side.session.is_open:
            side.send(lambda: side.session.notify(note), side.sent, number)

    def do_request(self, side: Side, number: int, first: int, second: int) -> None:
        if side.session.is_open:
            side.ask(number, pick(WAYS, first), pick(SIZES, second), pick(TIMEOUTS, first // 64))

    def do_keep(self, side: Side, number: int, first: int, second: int) -> None:
        message = Many([number, bytes(pick(SIZES[:5], second))])
        if side.session.is_open and len(side.kept_sent) < 500:
            side.send(lambda: side.session.notify(message), side.kept_sent, number)

    def do_receive(self, side: Side, number: int, first: int, second: int) -> None:
        expect: Any = pick((Many, Many, Message), first)
        try:
            message = self.call(lambda: side.session.receive(pick((0.0, 0.002), second), expect=expect))
        except TimeoutError:
            return
        except StreamClosedError:
            assert not side.session.is_open
            return
        if isinstance(message, Many):
            side.kept_got.append(message.items[0])
        elif isinstance(message, Note) and message.text != "report":
            assert message.data[0] in side.got, "what receive() returned the handlers have not seen"

    def do_batch(self, side: Side, number: int, first: int, second: int) -> None:
        if not side.session.is_open:
            return
        try:
            with side.session.batch():
                for index in range(first % 20):
                    note = Note("", (number * 1000 + index, bytes(second % 2000)))
                    side.send(lambda note=note: side.session.notify(note), side.sent, note.data[0])  # type: ignore[misc]
                    if second % 13 == 0 and index == 5:
                        self.call(side.session.peer.tick)
        except StreamClosedError:
            assert side.link.ended

    def do_broadcast(self, side: Side, number: int, first: int, second: int) -> None:
        peer = side.session.peer
        sides = [each for each in self.sides() if each.session.peer is peer and each.session.is_open]
        if any(each.full() for each in sides):
            return
        count = peer.broadcast(Note("", (number, bytes(pick(SIZES[:5], first)))))
        surely = [each for each in sides if not each.link.ended]
        workers = () if self.pool is None or peer is not self.peers[0] else self.pool.workers
        most = len(sides) + len(workers)
        assert len(surely) <= count <= most, f"broadcast() said {count} of {len(surely)} to {most}"
        for each in surely:
            each.sent.append(number)

    def do_settle_deferred(self, side: Side, number: int, first: int, second: int) -> None:
        side = pick([each for each in self.sides() if each.deferred] or [side], first)
        if not side.deferred:
            return
        asked, reply = side.deferred.pop(second % len(side.deferred))
        way = pick(("send", "send", "fail", "drop"), first // 64)
        if way == "drop":
            return
        was_open = side.session.is_open
        sent = reply.send(Pong(asked)) if way == "send" else reply.fail(f"no luck with {asked}")
        assert reply.done
        assert was_open if sent else side.link.ended, f"the reply to {asked} was said to be sent: {sent}"
        try:
            reply.send(Pong(-1))
        except RuntimeError:
            side.used.append(reply)
        else:
            raise AssertionError("a reply was settled twice")

    def asked(self, side: Side, number: int) -> Tuple[Side, Optional[int]]:
        sides = [each for each in self.sides() if each.asked]
        if not side.asked and sides:
            side = pick(sides, number)
        return side, pick(sorted(side.asked), number) if side.asked else None

    def do_cancel(self, side: Side, number: int, first: int, second: int) -> None:
        side, which = self.asked(side, first)
        if which is not None:
            asked = side.asked[which]
            done = asked.promise.done
            if asked.promise.cancel():
                assert not asked.cancelled and not asked.outcomes
                asked.cancelled = True
            else:
                assert done, "cancel() refused a request that is pending"

    def do_drop_promise(self, side: Side, number: int, first: int, second: int) -> None:
        side, which = self.asked(side, first)
        if which is not None:
            del side.asked[which]

    def do_wait(self, side: Side, number: int, first: int, second: int) -> None:
        side, which = self.asked(side, first)
        if which is not None:
            side.look(side.asked[which], pick((0.0, 0.001), second))

    def sample(self, first: int, second: int) -> List[Tuple[Side, Asked]]:
        everything = [(side, asked) for side in self.sides() for asked in side.asked.values()]
        return random.Random(first).sample(everything, min(len(everything), second % 8))

    def do_gather(self, side: Side, number: int, first: int, second: int) -> None:
        sample = self.sample(first, second)
        try:
            outcomes = self.call(
                lambda: gather([asked.promise for _, asked in sample], 0.001, return_exceptions=True)
            )
        except TimeoutError:
            return
        for (_, asked), outcome in zip(sample, outcomes or ()):
            asked.outcomes.append(outcome)

    def do_as_completed(self, side: Side, number: int, first: int, second: int) -> None:
        sample = self.sample(first, second)
        promises = [asked.promise for _, asked in sample]
        iterator = as_completed(promises, 0.001)
        seen: List[int] = []
        while True:
            try:
                promise = next(iterator)
            except HandlerError:
                self.caught += 1
                continue
            except (StopIteration, TimeoutError) as exc:
                assert isinstance(exc, TimeoutError) or len(seen) == len(promises)
                break
            assert promise.done and id(promise) not in seen
            seen.append(id(promise))
            if number % 5 == 0:
                break  # and drop the iterator

    def do_callback(self, side: Side, number: int, first: int, second: int) -> None:
        side, which = self.asked(side, first)
        if which is None:
            return
        calls: List[int] = []
        self.called.append(calls)
        way = pick(("", "", "tick", "notify", "raise", "close" if second % 61 == 0 else ""), second)

        def call_back(promise: Any) -> None:
            calls.append(1)
            try:
                promise.wait(0)
            except IpcError:
                pass
            if way == "tick" and side.depth < 5:
                side.depth += 1
                try:
                    side.session.peer.tick()
                except HandlerError:
                    self.swallowed += 1  # it is logged
                    raise
                finally:
                    side.depth -= 1
            if way == "notify" and side.session.is_open:
                side.send(lambda: side.session.notify(Note("", (number * 1000,))), side.sent, number * 1000)
            if way == "raise":
                raise LookupError(number)
            if way == "close":
                side.close(0)

        side.asked[which].promise.add_done_callback(call_back)

    def do_flush(self, side: Side, number: int, first: int, second: int) -> None:
        gone = not side.other.session.is_open and side.other in side.link.closed_by
        try:
            side.session.flush(pick((0.0, 0.002), first))
        except StreamClosedError:
            assert side.link.ended
        except TimeoutError:
            assert side.session.queued_bytes
            assert not gone or side.session.socket is not None, "flush() waits for an other side that is gone"
        else:
            assert not side.session.queued_bytes

    def do_tick(self, side: Side, number: int, first: int, second: int) -> None:
        peer = side.session.peer
        self.call(pick((peer.tick, peer.tick, lambda: peer.tick(0.0005), lambda: peer.tick_for(0.0005)), first))

    def do_wakeup(self, side: Side, number: int, first: int, second: int) -> None:
        peer = side.session.peer
        peer.wakeup()
        begun = time.monotonic()
        self.call(lambda: peer.tick(20))
        assert time.monotonic() - begun < 15, "wakeup() did not end a tick"

    def do_close(self, side: Side, number: int, first: int, second: int) -> None:
        if len(self.links) > 1 or first % 3 == 0:
            side.close(pick((0, 0.01, 0.05) if side.session.queued_bytes else (0, 0.01, None), second))

    def do_remove(self, side: Side, number: int, first: int, second: int) -> None:
        if side.sock is None or not side.session.is_open:
            return
        side.link.ended = True
        side.link.closed_by.add(side)
        side.whole = side.whole and not side.session.queued_bytes
        side.session.peer.remove_session(side.session)
        assert not side.session.is_open and side.sock.fileno() >= 0
        side.sock.close()

    def do_connect(self, side: Side, number: int, first: int, second: int) -> None:
        open_links = [link for link in self.links if not link.ended]
        if len(open_links) < LINKS:
            self.connect(first)

    def do_submit(self, side: Side, number: int, first: int, second: int) -> None:
        if not self.wants_pool:
            return
        if self.pool is None:
            self.pool = WorkerPool(self.peers[0], [sys.executable, "-m", "tests.pool_child"], 2)
        what = pick(("echo", "echo", "error", "cancel", "die" if self.deaths < 2 else "echo"), first)
        self.deaths += what == "die"
        promise = self.pool.submit(Ping((what, number)), expect=Pong)
        if what == "cancel":
            assert promise.cancel()
        self.tasks.append((what, number, promise))

    # -- the end

    def finish(self) -> None:
        """Let everything come to rest, look at it, and close."""
        self.rest()
        while any(side.deferred for side in self.sides()):
            for side in self.sides():
                while side.deferred:
                    number, reply = side.deferred.pop()
                    reply.send(Pong(number))
            self.rest()
        if self.pool is not None:
            self.finish_pool(self.pool)
            self.rest()
        for side in self.sides():
            while len(side.kept_got) < len(side.other.kept_sent):
                try:
                    message = side.session.receive(0, expect=Many)
                except HandlerError:
                    self.caught += 1
                except (TimeoutError, StreamClosedError):
                    break
                else:
                    side.kept_got.append(message.items[0])
        for side in self.sides():
            side.check()
        for side in self.sides():
            side.asked.clear()
        gc.collect()
        assert all(calls == [1] for calls in self.called), "a done callback was not called once"
        assert self.raised == self.caught + self.swallowed, "a handler's error was lost"
        for link in self.links:
            a, b = link.sides
            assert a.session.is_open is b.session.is_open is not link.ended, (a.session, b.session)
            assert no_pending(a.session, b.session), (a.session, b.session)
        for listener in self.listeners:
            listener.close()
        for peer in self.peers:
            peer.close(1)
        assert all(side.closed == 1 for side in self.sides()), "on_close was not called once"

    def rest(self) -> None:
        quiet = 0
        end = time.monotonic() + 20
        soon = time.monotonic() + 0.3
        while quiet < 4:
            assert time.monotonic() < end, f"it does not come to rest: {[side.session for side in self.sides()]}"
            busy = sum([self.call(peer.tick) or 0 for peer in self.peers])
            # TCP takes a moment, also inside one machine. What has not come by then is lost.
            busy += time.monotonic() < soon and not all(
                side.has_everything for side in self.sides() if side.link.is_tcp
            )
            busy += sum([side.session.queued_bytes for side in self.sides() if side.session.is_open])
            # An end takes the turns that it takes: a connection may linger.
            busy += any(side.session.is_open for side in self.sides() if side.link.ended)
            quiet = 0 if busy else quiet + 1

    def finish_pool(self, pool: WorkerPool) -> None:
        for what, number, promise in self.tasks:
            while True:
                try:
                    outcome: Any = promise.wait(20)
                except HandlerError:
                    self.caught += 1
                    continue
                except (IpcError, TimeoutError) as exc:
                    outcome = exc
                break
            if isinstance(outcome, Pong):
                assert what == "echo" and outcome.value == (what, number), f"task {number} ({what}): {outcome}"
            elif isinstance(outcome, RemoteError):
                assert what == "error" and "no good" in str(outcome)
            elif isinstance(outcome, StreamClosedError):
                assert what == "die" or self.deaths, f"task {number} ({what}): {outcome}"
            else:
                assert what == "cancel" and type(outcome) is IpcError, f"task {number} ({what}): {outcome!r}"
        assert pool.pending == 0
        pool.close(5)
        assert pool.workers == ()

    def abandon(self) -> None:
        """Leave nothing behind of a world in which something has failed."""
        for peer in self.peers:
            try:
                peer.close(0)
            except Exception as exc:
                print("closing failed:", exc)
        self.links.clear()
        self.folder.cleanup()


def play(operations: Sequence[Operation], kind: int, pool: bool = False) -> int:
    """Do some operations and check what they come to; returns how many requests were asked."""
    descriptors = len(os.listdir("/dev/fd"))
    logger = logging.getLogger("stream_ipc")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # callbacks that raise are logged
    world = World(kind, pool)
    try:
        for operation in operations:
            world.do(operation)
        count = sum([len(side.asked) for side in world.sides()])
        world.finish()
    finally:
        world.abandon()
        logger.setLevel(level)
    assert len(os.listdir("/dev/fd")) <= descriptors, "descriptors are left"
    return count


# -- making what has failed shorter


def shrink(things: List[T], fails: Callable[[List[T]], bool], seconds: float) -> List[T]:
    """Return a part of some things that still fails, from which nothing can be left out: delta debugging."""
    end = time.monotonic() + seconds
    parts = 2
    while len(things) > 1:
        size = max(1, len(things) // parts)
        for start in range(0, len(things), size):
            if time.monotonic() > end:
                return things
            rest = things[:start] + things[start + size :]
            if rest and fails(rest):
                things = rest
                parts = max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(len(things), parts * 2)
    return things


def play_or_shrink(seed: int, count: int, pool: bool = False, seconds: float = 20.0) -> int:
    """Do random operations; if that fails, say which few of them are enough.

    Returns:
        How many requests were asked.

    Raises:
        AssertionError: They do not come to what they must.
    """
    everything = operations(seed, count)

    def failure(some: List[Operation]) -> Optional[str]:
        try:
            play(some, seed, pool)
        except Exception as exc:
            frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if frame.filename == __file__]
            return f"{type(exc).__name__} at {frames[-1].name}:{frames[-1].lineno}"
        return None

    try:
        return play(everything, seed, pool)
    except Exception as exc:
        text = traceback.format_exc()
        first = failure(everything)
        if first is None:
            raise AssertionError(f"seed {seed} failed once, and not again: {text}") from exc
    few = shrink(everything, lambda some: failure(some) == first, seconds)
    lines = "\n".join([f"    {operation}" for operation in few])
    raise AssertionError(f"seed {seed}: {first}\n{text}\n{len(few)} operations are enough, kind {seed % 5}:\n{lines}")
