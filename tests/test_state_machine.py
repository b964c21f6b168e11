"""Random conversations: whatever happens in whatever order, every promise settles once and nothing is left."""

import copy
import os
import random
import re
import socket
import time
from typing import Any, Callable, List, Tuple

import pytest

from stream_ipc import DeferredReply, IpcError, IpcPeer, ResponsePromise, Session, StreamClosedError
from tests.helpers import RawPeer, reply_bytes, seeds, set_limit, span
from tests.messages import Ping, Pong
from tests.model import play_or_shrink, shrink

RUNS = 40
SECONDS = float(os.environ.get("STREAM_IPC_SOAK", span(6.0)))
OPERATIONS = 150  # of one run: few enough to be made shorter soon, and enough for much to be under way at once


@pytest.mark.timeout(SECONDS * 2 + 120)
def test_random_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the public interface, in any order, against what must come of it; see ``model.py``."""
    set_limit("back off", 0.01, monkeypatch)  # or the time would be over while dead workers are replaced
    end = time.monotonic() + SECONDS
    runs = asked = 0
    while not runs or time.monotonic() < end:
        (seed,) = seeds(1)
        asked += play_or_shrink(seed, OPERATIONS, pool=runs % 50 == 0)
        runs += 1
        if os.environ.get("STREAM_IPC_SEED"):
            break
    print(f"{runs * OPERATIONS} operations in {runs} runs; {asked} promises were looked at")
    assert asked


def lose(monkeypatch: pytest.MonkeyPatch) -> None:
    notify = Session.notify
    monkeypatch.setattr(Session, "notify", lambda self, note: len(str(note)) > 2900 or notify(self, note))


def send_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    notify = Session.notify
    monkeypatch.setattr(Session, "notify", lambda self, note: (notify(self, note), notify(self, note)))


def make_another_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = ResponsePromise.wait
    monkeypatch.setattr(ResponsePromise, "wait", lambda self, timeout=None: copy.copy(wait(self, timeout)))


def mix_replies_up(monkeypatch: pytest.MonkeyPatch) -> None:
    send = DeferredReply.send
    monkeypatch.setattr(DeferredReply, "send", lambda self, reply: send(self, Pong(reply.value + 1)))


def call_back_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    add = ResponsePromise.add_done_callback
    monkeypatch.setattr(
        ResponsePromise, "add_done_callback", lambda self, function: (add(self, function), add(self, function))
    )


def close_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "on_close", lambda self, function: function)


@pytest.mark.parametrize(
    "fault", [lose, send_twice, make_another_outcome, mix_replies_up, call_back_twice, close_without_end]
)
@pytest.mark.slow
def test_the_model_finds_what_is_wrong_and_makes_it_short(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="operations are enough") as caught:
        for seed in seeds(300):
            play_or_shrink(seed, 30)
    found = re.search(r"(\d+) operations are enough", str(caught.value))
    assert found is not None and int(found[1]) <= 15, str(caught.value)  # of 30; mostly some five, but not with each seed


def test_shrinking_leaves_what_is_needed() -> None:
    tried: List[List[int]] = []

    def fails(some: List[int]) -> bool:
        tried.append(some)
        return {7, 33, 34} <= set(some)

    assert shrink(list(range(100)), fails, 60) == [7, 33, 34]
    assert len(tried) < 200
    assert shrink([1, 2, 3], lambda some: True, 60) == [3]
    assert shrink([1, 2, 3], lambda some: True, -1) == [1, 2, 3]  # the time is over


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
