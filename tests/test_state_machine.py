"""Random conversations: whatever happens in whatever order, every promise settles once and nothing is left."""

import gc
import random
import socket
import time
from typing import Any, Dict, List, Tuple

from stream_ipc import (
    IpcError,
    IpcPeer,
    Message,
    RemoteError,
    RequestTimeoutError,
    Session,
    StreamClosedError,
)
from tests.helpers import RawPeer, no_pending, reply_bytes, seeds, socket_peers
from tests.messages import Note, Ping, Pong

RUNS = 40
STEPS = 120


class Side:
    """One end of a conversation, and what it should have sent and got."""

    def __init__(self, session: Session, rng: random.Random) -> None:
        self.session = session
        self.rng = rng
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
            return Pong(number)
        finally:
            self.depth -= 1

    def step(self, number: int) -> None:
        data = b"x" * self.rng.choice((0, 0, 10, 3000, 70000))
        action = self.rng.random()
        try:
            if action < 0.35:
                self.session.notify(Note(data=(number, data)))
                self.sent.append(number)
            elif action < 0.7:
                what = self.rng.choice(("answer", "answer", "raise", "pass", "nested", "tick"))
                self.promises[number] = self.session.request(
                    Ping((number, what, data)), self.rng.choice((0.0, 0.5, 20, None))
                )
                self.sent.append(number)
            elif action < 0.78 and self.promises:
                number = self.rng.choice(sorted(self.promises))
                if self.promises[number].cancel():
                    self.cancelled.append(number)
            elif action < 0.82 and self.promises:
                del self.promises[self.rng.choice(sorted(self.promises))]
            elif action < 0.9 and self.promises:
                self.settle(self.rng.choice(sorted(self.promises)), self.rng.choice((0, 0.001)))
            elif action < 0.91:
                self.session.close()
            else:
                self.session.tick()
        except StreamClosedError:
            pass  # the other end has closed

    def settle(self, number: int, timeout: float) -> None:
        promise = self.promises[number]
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
    for number, promise in side.promises.items():
        side.settle(number, 1)
        assert promise.done, "a promise never settled"
        first = side.outcomes[number][0]
        assert all(result is first for result in side.outcomes[number]), "settled twice"
        if number in side.cancelled:
            assert type(first) is IpcError
        elif isinstance(first, Message):
            assert first == Pong(number), "the reply of another request"
        else:
            assert isinstance(first, (RemoteError, RequestTimeoutError, StreamClosedError)), first


def converse(seed: int, one_peer: bool) -> None:
    rng = random.Random(seed)
    first, second = IpcPeer(timeout=5), IpcPeer(timeout=5)
    with first, second:
        if one_peer:
            a, b = first.create_session_pair()
        else:
            a, b = socket_peers(first, second)
        sides = [Side(a, rng), Side(b, rng)]
        number = 0
        for _ in range(STEPS):
            number += 1
            side = rng.choice(sides)
            if not one_peer and side.session.queued_bytes > 500000:
                # Nobody else drives the other end, so a send that waits for it would wait in vain.
                (sides[1] if side is sides[0] else sides[0]).session.peer.tick()
                continue
            if side.session.is_open:
                side.step(number)
            if rng.random() < 0.2:
                rng.choice((first, second)).tick()
        quiet = 0
        end = time.monotonic() + 20
        while quiet < 3:
            assert time.monotonic() < end, "it does not come to rest"
            busy = first.tick() + second.tick() + a.queued_bytes + b.queued_bytes
            quiet = 0 if busy else quiet + 1
        whole = a.is_open and b.is_open
        if whole:
            # Without an end in between, everything has arrived.
            assert [n for n in sides[1].got if n >= 0] == sides[0].sent
            assert [n for n in sides[0].got if n >= 0] == sides[1].sent
        check(sides[0], sides[1])
        check(sides[1], sides[0])
        for side in sides:
            side.promises.clear()
        gc.collect()
        assert no_pending(a, b), (a, b)
        assert a.is_open == b.is_open
        first.close()
        second.close()
        assert [side.closed for side in sides] == [1, 1]


def test_random_conversation_of_two_peers() -> None:
    for seed in seeds(RUNS):
        converse(seed, False)


def test_random_conversation_of_a_session_pair() -> None:
    for seed in seeds(RUNS):
        converse(seed, True)


def test_random_cuts_and_replies_settle_every_promise_once() -> None:
    """The other end is scripted: replies in random order, twice, for unknown ids, cut into random pieces, cut off."""
    for seed in seeds(RUNS):
        rng = random.Random(seed)
        with IpcPeer(timeout=5) as peer, RawPeer(peer) as raw:
            promises = [raw.session.request(Ping(index), expect=Pong) for index in range(30)]
            cancelled = set(rng.sample(range(30), 5))
            for index in cancelled:
                promises[index].cancel()
            replies: List[Tuple[int, bytes]] = []
            for index in rng.sample(range(30), 24):
                for _ in range(rng.choice((1, 1, 2))):
                    replies.append((index, reply_bytes(promises[index].id, Pong(index))))
                if rng.random() < 0.2:
                    replies.append((-1, reply_bytes("unknown", Pong(-1))))
            data = b"".join(part for _, part in replies)
            end = rng.randrange(len(data)) if rng.random() < 0.5 else len(data)
            answered = set()
            size = 0
            for index, part in replies:
                size += len(part)
                if size <= end:
                    answered.add(index)
            raw.read()
            at = 0
            while at < end:
                step = min(end - at, rng.choice((1, 3, 8, 100, 1000)))
                raw.write(data[at : at + step])
                at += step
                if rng.random() < 0.3:
                    peer.tick()
            raw.sock.close()
            for index, promise in enumerate(promises):
                outcomes: List[Any] = []
                for _ in range(2):
                    try:
                        outcomes.append(promise.wait())
                    except IpcError as exc:
                        outcomes.append(exc)
                assert outcomes[0] is outcomes[1]
                if index in cancelled:
                    assert type(outcomes[0]) is IpcError
                elif index in answered:
                    assert outcomes[0] == Pong(index)
                else:
                    assert type(outcomes[0]) is StreamClosedError, outcomes
            assert "pending=0 inbox=0" in repr(raw.session) and peer.sessions == ()


def test_random_descriptors_are_all_given_back() -> None:
    """Sessions that are made and ended in random ways, beside a conversation that must not notice."""
    for seed in seeds(3):
        rng = random.Random(seed)
        with IpcPeer(timeout=5) as peer:
            a, b = peer.create_session_pair()
            b.on_request(lambda ping: Pong(ping.value))
            for index in range(60):
                left, right = socket.socketpair()
                c, d = peer.create_socket_session(left), peer.create_socket_session(right)
                d.on_request(lambda ping: Pong(ping.value))
                promise = c.request(Ping(index))
                way = rng.randrange(5)
                if way == 0:
                    c.close()
                elif way == 1:
                    d.close()
                elif way == 2:
                    peer.remove_session(c)
                    left.close()
                elif way == 3:
                    promise.wait()
                    c.close()
                assert a.request(Ping(index), expect=Pong).wait().value == index
                if way == 4:
                    assert promise.wait() == Pong(index)
                    c.close()
            while len(peer.sessions) > 2:
                peer.tick(1)
            assert peer.sessions == (a, b)
