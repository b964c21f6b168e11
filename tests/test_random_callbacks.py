"""Random conversations whose done callbacks act: every promise settles once, and nothing is left."""

import collections
import gc
import itertools
import random
import socket
import time
import traceback
from typing import Any, Dict, Iterator, List

import pytest

from stream_ipc import (
    DeferredReply,
    IpcError,
    IpcPeer,
    Message,
    RemoteError,
    RequestTimeoutError,
    Session,
    StreamClosedError,
    as_completed,
    gather,
)
from tests.helpers import no_pending, seeds, set_clock, socket_peers, span, tick_until
from tests.messages import Note, Ping, Pong

STEPS = 120


class Clock:
    """The time, which sometimes jumps."""

    shift = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.shift


class Side:
    """One end of a conversation, and what it should have sent and got."""

    def __init__(self, session: Session, rng: random.Random, numbers: Iterator[int], closes: bool) -> None:
        self.session = session
        self.rng = rng
        self.numbers = numbers
        self.closes = closes
        self.acts = True  # done callbacks do
        self.expected: List[int] = []  # requests that have a done callback
        self.called: collections.Counter[int] = collections.Counter()
        self.failures: List[str] = []  # of done callbacks, which are only logged
        self.deferred: List[DeferredReply] = []
        self.batches: List[Any] = []
        self.sent: List[int] = []
        self.got: List[int] = []
        self.promises: Dict[int, Any] = {}
        self.outcomes: Dict[int, List[Any]] = {}
        self.cancelled: List[int] = []
        self.closed = 0
        self.depth = 0
        session.on_message(self.on_note)
        session.on_request(self.on_ping)
        session.on_close(self.on_close)

    def on_note(self, note: Note) -> None:
        self.got.append(note.data[0])

    def on_close(self, session: Session) -> None:
        self.closed += 1

    def on_ping(self, ping: Ping) -> Any:
        number, what, _ = ping.value
        self.got.append(number)
        self.depth += 1
        try:
            if what == "raise":
                raise LookupError(str(number))
            if what == "pass":
                return None
            if what == "nested" and self.depth < 5 and self.session.is_open:
                # Any of the two ends may close meanwhile; then the error becomes the answer.
                self.session.request(Ping((-1, "answer", b"")), timeout=0.005).wait()
            if what == "tick":
                self.session.peer.tick()
            if what == "later":
                self.deferred.append(DeferredReply())
                return self.deferred[-1]
            return Pong(number)
        finally:
            self.depth -= 1

    def notify(self, data: bytes) -> None:
        number = next(self.numbers)
        self.session.notify(Note(data=(number, data)))
        self.sent.append(number)

    def request(self, data: bytes) -> None:
        number = next(self.numbers)
        what = self.rng.choice(("answer", "answer", "raise", "pass", "nested", "tick", "later"))
        promise = self.session.request(Ping((number, what, data)), self.rng.choice((0.0, 0.5, 20, None)))
        self.sent.append(number)
        if self.rng.random() < 0.9:
            self.promises[number] = promise
        if self.rng.random() < 0.5:
            self.expected.append(number)
            promise.add_done_callback(lambda promise: self.done(number, promise))

    def done(self, number: int, promise: Any) -> None:
        """What the done callback of a request does."""
        self.called[number] += 1
        self.depth += 1
        try:
            assert promise.settled
            self.record(number, promise, 0)
            if self.acts and self.depth < 5:
                self.act_in_callback()
            self.record(number, promise, 0)
        except (IpcError, TimeoutError):
            pass  # of another request, or the session is closed
        except Exception:
            self.failures.append(traceback.format_exc())
        finally:
            self.depth -= 1

    def act_in_callback(self) -> None:
        session = self.session
        action = self.rng.random()
        if action < 0.2:
            self.request(b"")
        elif action < 0.4:
            self.notify(b"")
        elif action < 0.6:
            session.peer.tick()
        elif action < 0.7:
            session.request(Ping((-1, "answer", b"")), timeout=0.001).wait()
        elif action < 0.75:
            session.receive(0, expect=Pong)
        elif action < 0.85 and self.promises:
            self.cancel(self.rng.choice(sorted(self.promises)))
        elif action < 0.9 and self.promises:
            self.settle(self.rng.choice(sorted(self.promises)), self.rng.choice((0, 0.001)))
        elif action < 0.92:
            session.flush(0)
        elif action < 0.94:
            gather(list(self.promises.values()), 0)
        elif action < 0.96:
            next(as_completed(list(self.promises.values()), 0), None)
        elif action < 0.97 and self.closes:
            session.close()

    def cancel(self, number: int) -> None:
        if self.promises[number].cancel():
            self.cancelled.append(number)

    def step(self) -> None:
        data = b"x" * self.rng.choice((0, 0, 10, 3000, 70000))
        action = self.rng.random()
        try:
            if action < 0.3:
                self.notify(data)
            elif action < 0.65:
                self.request(data)
            elif action < 0.72 and self.promises:
                self.cancel(self.rng.choice(sorted(self.promises)))
            elif action < 0.76 and self.promises:
                del self.promises[self.rng.choice(sorted(self.promises))]
            elif action < 0.8 and self.deferred:
                self.deferred.pop(self.rng.randrange(len(self.deferred))).fail("later")
            elif action < 0.82:
                self.batches.append(self.session.batch())
                self.batches[-1].__enter__()
            elif action < 0.84 and self.batches:
                self.batches.pop(self.rng.randrange(len(self.batches))).__exit__(None, None, None)
            elif action < 0.91 and self.promises:
                self.settle(self.rng.choice(sorted(self.promises)), self.rng.choice((0, 0.001)))
            elif action < 0.915 and self.closes:
                self.session.close()
            else:
                self.session.tick()
        except StreamClosedError:
            pass  # the other end has closed

    def end(self) -> None:
        """Leave no batch open, and begin nothing any more."""
        self.acts = False
        while self.batches:
            try:
                self.batches.pop().__exit__(None, None, None)
            except StreamClosedError:
                pass

    def settle(self, number: int, timeout: float) -> None:
        self.record(number, self.promises[number], timeout)

    def record(self, number: int, promise: Any, timeout: float) -> None:
        try:
            result: Any = promise.wait(timeout)
        except IpcError as exc:
            result = exc
        except TimeoutError:
            return  # still pending
        assert promise.done
        self.outcomes.setdefault(number, []).append(result)


def check(side: Side, other: Side) -> None:
    numbers = [number for number in other.got if number >= 0]
    assert len(set(numbers)) == len(numbers), "a message came twice"
    assert numbers == [number for number in side.sent if number in set(numbers)], "order"
    assert not side.failures, side.failures[0]
    for number, promise in side.promises.items():
        side.settle(number, 1)
        assert promise.done, "a promise never settled"
    for number, outcomes in side.outcomes.items():
        first = outcomes[0]
        assert all(result is first for result in outcomes), "settled twice"
        if number in side.cancelled:
            assert type(first) is IpcError
        elif isinstance(first, Message):
            assert first == Pong(number), "the reply of another request"
        else:
            assert isinstance(first, (RemoteError, RequestTimeoutError, StreamClosedError)), first


def come_to_rest(*peers: IpcPeer) -> None:
    quiet = 0
    end = time.monotonic() + 20
    while quiet < 3:
        assert time.monotonic() < end, "it does not come to rest"
        busy = sum(peer.tick() + sum(session.queued_bytes for session in peer.sessions) for peer in peers)
        quiet = 0 if busy else quiet + 1


def converse(seed: int, one_peer: bool) -> None:
    rng = random.Random(seed)
    first, second = IpcPeer(timeout=5), IpcPeer(timeout=5)
    with first, second:
        if one_peer:
            a, b = first.create_session_pair()
        else:
            a, b = socket_peers(first, second)
        numbers = itertools.count(1)
        clock = set_clock(first, set_clock(second, Clock()))
        closes = rng.random() < 0.5
        sides = [Side(a, rng, numbers, closes), Side(b, rng, numbers, closes)]
        for _ in range(STEPS):
            side = rng.choice(sides)
            if not one_peer and side.session.queued_bytes > 500000:
                # Nobody else drives the other end, so a send that waits for it would wait in vain.
                (sides[1] if side is sides[0] else sides[0]).session.peer.tick()
                continue
            if side.session.is_open:
                side.step()
            if rng.random() < 0.2:
                rng.choice((first, second)).tick()
            if rng.random() < 0.05:
                clock.shift += rng.choice((0.3, 1.0))
        for side in sides:
            side.end()
        come_to_rest(first, second)
        clock.shift += 100
        come_to_rest(first, second)
        for side in sides:
            for promise in side.promises.values():
                assert promise.settled or not promise.done, "ticks do not find what is overdue"
            side.deferred.clear()
        come_to_rest(first, second)
        whole = a.is_open and b.is_open
        if whole:
            # Without an end in between, everything has arrived.
            assert [n for n in sides[1].got if n >= 0] == sides[0].sent
            assert [n for n in sides[0].got if n >= 0] == sides[1].sent
        check(sides[0], sides[1])
        check(sides[1], sides[0])
        for side in sides:
            side.promises.clear()
            side.end()
        gc.collect()
        assert no_pending(a, b), (a, b)
        assert a.is_open == b.is_open
        first.close()
        second.close()
        assert [side.closed for side in sides] == [1, 1]
        for side in sides:
            assert side.called == collections.Counter(side.expected), "each done callback is called once"
            assert not side.failures, side.failures[0]


def test_random_conversation_of_two_peers() -> None:
    for seed in seeds(int(span(60))):
        converse(seed, False)


def test_random_conversation_of_a_session_pair() -> None:
    for seed in seeds(int(span(60))):
        converse(seed, True)


class Waiting:
    """Sessions of which all promises are pending, whose done callbacks wait for others of them while they are closed."""

    def __init__(self, rng: random.Random, peer: IpcPeer, count: int) -> None:
        self.rng = rng
        self.peer = peer
        self.sessions: List[Session] = []
        self.others: List[Session] = []
        self.sockets: List[socket.socket] = []
        self.held: List[DeferredReply] = []
        self.promises: List[Any] = []
        self.called: collections.Counter[int] = collections.Counter()
        self.did: List[str] = []
        self.unexpected: List[str] = []
        for _ in range(count):
            pair = socket.socketpair()
            session, other = map(peer.create_socket_session, pair)
            other.on_request(self.hold)
            self.sessions.append(session)
            self.others.append(other)
            self.sockets += pair
        for number in range(rng.randint(2, 8)):
            promise = rng.choice(self.sessions).request(Ping(number), timeout=None)
            promise.add_done_callback(lambda promise, number=number: self.done(number, promise))
            self.promises.append(promise)
        tick_until(lambda: len(self.held) == len(self.promises), peer)
        self.iterators = [as_completed(self.promises), as_completed(self.promises[1:])]

    def hold(self, ping: Ping) -> DeferredReply:
        self.held.append(DeferredReply())
        return self.held[-1]

    def done(self, number: int, promise: Any) -> None:
        self.called[number] += 1
        try:
            assert promise.settled
            for _ in range(2):
                self.act()
        except (StreamClosedError, StopIteration):
            pass
        except Exception:
            self.unexpected.append(traceback.format_exc())

    def act(self) -> None:
        actions = ("wait", "gather", "completed", "next", "tick", "receive", "session", "remove", "peer", "flush", "cancel")
        what = self.rng.choice(actions)
        self.did.append(what)
        some = self.rng.sample(self.promises, self.rng.randint(1, len(self.promises)))
        session = self.rng.choice(self.sessions)
        if what == "wait":
            some[0].wait()
        elif what == "gather":
            gather(some, return_exceptions=True)
        elif what == "completed":
            assert {*as_completed(some)} == {*some}
        elif what == "next":
            next(self.rng.choice(self.iterators))
        elif what == "tick":
            self.peer.tick(None)
        elif what == "receive":
            session.receive()
        elif what == "session":
            session.close()
        elif what == "remove":
            self.peer.remove_session(session)
        elif what == "peer":
            self.peer.close()
        elif what == "flush":
            session.flush()
        else:
            assert not some[0].cancel()

    def check(self) -> None:
        assert not self.unexpected, self.unexpected[0]
        assert self.called == collections.Counter(range(len(self.promises)))
        for promise in self.promises:
            assert promise.settled
            with pytest.raises(StreamClosedError):
                promise.wait()


def test_done_callbacks_wait_for_others_while_all_is_closed() -> None:
    did: List[str] = []
    for seed in seeds(int(span(800))):
        rng = random.Random(seed)
        with IpcPeer(timeout=None) as peer:
            how = rng.choice(("peer", "peer", "within", "session", "end"))
            waiting = Waiting(rng, peer, rng.randint(1, 3) if how in ("peer", "within") else 1)
            if how == "peer":
                peer.close()
            elif how == "within":
                peer.close(timeout=1)
            elif how == "session":
                waiting.sessions[0].close()
            else:
                waiting.others[0].close()
                tick_until(lambda peer=peer: not peer.sessions, peer)
            waiting.check()
            for sock in waiting.sockets:  # one may have been removed
                sock.close()
            did += waiting.did
    assert len({*did}) == 11 or len(did) < 100
