"""Answering later: promises and deferred replies as what handlers of requests return."""

import gc
import logging
import os
import select
import signal
import socket
import weakref
from functools import partial
from typing import Any, Dict, List, Type

import pytest

from stream_ipc import (
    DeferredReply,
    ErrorMessage,
    IpcPeer,
    Message,
    RemoteError,
    RequestTimeoutError,
    ResponseEnvelope,
    ResponsePromise,
    Session,
    StreamClosedError,
    gather,
)
from tests.helpers import (
    ActingSerializer,
    FakeClock,
    HurryingClock,
    Interruption,
    InterruptionError,
    RawPeer,
    drop_queued,
    framed,
    is_settled,
    no_pending,
    reply_bytes,
    request_bytes,
    role,
    set_clock,
    set_limit,
    socket_peers,
    tick_until,
)
from tests.messages import Note, Ping, Pong
from tests.test_interrupts import BOTH, Run, at_every_place, outcome


def keep(session: Session) -> List[DeferredReply]:
    """Let a session put off all its replies; returns where they go."""
    kept: List[DeferredReply] = []

    @session.on_request
    def later(ping: Ping) -> DeferredReply:
        kept.append(DeferredReply())
        return kept[-1]

    return kept


def test_deferred_reply_is_sent_later_in_the_order_in_which_replies_are_made(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    kept = keep(b)
    settled: List[Any] = []
    promises = [a.request(Ping(index), expect=Pong) for index in range(3)]
    for promise in promises:
        promise.add_done_callback(lambda promise: settled.append(promise.wait().value))
    tick_until(lambda: len(kept) == 3, peer)
    assert [reply.done for reply in kept] == [False] * 3
    for index in (2, 0, 1):
        assert kept[index].send(Pong(index)) is True
    assert [reply.done for reply in kept] == [True] * 3
    assert [reply.value for reply in gather(promises)] == [0, 1, 2] and settled == [2, 0, 1]
    assert no_pending(a, b)


def test_session_goes_on_meanwhile(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    kept: List[DeferredReply] = []

    @b.on_request
    def answer(ping: Ping) -> "Pong | DeferredReply":
        if ping.value:
            return Pong(ping.value)
        kept.append(DeferredReply())
        return kept[-1]

    first = a.request(Ping(0), expect=Pong)
    assert a.request(Ping(1), expect=Pong).wait().value == 1 and not first.done
    kept[0].send(Pong(0))
    assert first.wait().value == 0


def test_settled_before_it_is_returned(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()

    @b.on_request
    def answer(ping: Ping) -> DeferredReply:
        reply = DeferredReply()
        assert (reply.send(Pong(ping.value)) if ping.value else reply.fail("no zero")) is True
        return reply

    assert a.request(Ping(1), expect=Pong).wait().value == 1
    with pytest.raises(RemoteError, match="no zero"):
        a.request(Ping(0)).wait()
    assert no_pending(a, b)


@pytest.mark.parametrize("error", ["a text", ValueError("a text")])
def test_failed_is_a_remote_error(peer: IpcPeer, error: Any) -> None:
    a, b = peer.create_session_pair()
    kept = keep(b)
    promise = a.request(Ping())
    tick_until(lambda: kept, peer)
    assert kept[0].fail(error) and kept[0].done
    with pytest.raises(RemoteError, match="a text") as caught:
        promise.wait()
    assert ("ValueError" in str(caught.value)) is isinstance(error, ValueError)


def test_wrong_uses(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    kept = keep(b)
    promise = a.request(Ping())
    tick_until(lambda: kept, peer)
    wrong: Any
    for wrong in ("text", Pong, None):
        with pytest.raises(TypeError):
            kept[0].send(wrong)
    for wrong in (None, 5, Pong("x")):
        with pytest.raises(TypeError, match="text or an exception"):
            kept[0].fail(wrong)
    assert not kept[0].done and "pending" in repr(kept[0])
    kept[0].send(Pong("first"))
    with pytest.raises(RuntimeError, match="settled already"):
        kept[0].send(Pong("second"))
    with pytest.raises(RuntimeError, match="settled already"):
        kept[0].fail("third")
    assert promise.wait() == Pong("first") and "settled Pong" in repr(kept[0])


@pytest.mark.parametrize("settled", [False, True])
def test_returned_twice_is_an_error_for_the_second_requester(peer: IpcPeer, settled: bool) -> None:
    a, b = peer.create_session_pair()
    reply = DeferredReply()
    b.on_request(lambda ping: reply)
    if settled:
        reply.send(Pong("yes"))
    first, second = a.request(Ping(), expect=Pong), a.request(Ping())
    with pytest.raises(RemoteError, match="RuntimeError.*returned before"):
        second.wait()
    if not settled:
        reply.send(Pong("yes"))
    assert first.wait().value == "yes" and no_pending(a, b)


def test_dropped_unsettled_is_an_error_at_once(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    kept = keep(b)
    b.on_message(lambda note: kept.clear())
    promise = a.request(Ping(), timeout=None)
    b.on_request(lambda ping: DeferredReply())
    tick_until(lambda: kept, peer)
    a.notify(Note("drop it"))
    with pytest.raises(RemoteError, match="was dropped before it was settled"):
        promise.wait(10)
    other = DeferredReply()
    kept.append(other)
    promise = a.request(Ping(), timeout=None)
    tick_until(lambda: len(kept) == 2, peer)
    del kept[:]
    with pytest.raises(RemoteError, match="was dropped"):
        promise.wait(10)
    assert no_pending(a, b)


def test_a_reply_that_cannot_travel_reaches_the_requester_as_an_error(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    kept = keep(b)
    promise = a.request(Ping())
    tick_until(lambda: kept, peer)
    assert kept[0].send(Pong(lambda: None)) is True
    with pytest.raises(RemoteError, match="the reply could not be sent"):
        promise.wait()


@pytest.mark.parametrize("how", ["closed", "gone"])
def test_requester_that_is_gone(how: str) -> None:
    with IpcPeer() as peer, RawPeer(peer) as raw:
        kept = keep(raw.session)
        raw.write(*(request_bytes(str(index), Ping(index)) for index in range(3)))
        tick_until(lambda: len(kept) == 3, peer)
        if how == "closed":
            raw.session.close()
        else:
            raw.sock.close()
            tick_until(lambda: not peer.sessions, peer)
        assert kept[0].send(Pong()) is False and kept[1].fail("no") is False and kept[0].done
        with pytest.raises(RuntimeError):
            kept[0].send(Pong())
        session = weakref.ref(raw.session)
        del raw.session
        gc.collect()
        assert session() is None, "a deferred reply keeps the session alive"


# -- promises


def broker(peer: IpcPeer, timeout: Any = 20) -> Any:
    """A client's session, and the session of a worker that its requests are forwarded to."""
    client, front = peer.create_session_pair()
    back, worker = peer.create_session_pair()
    front.on_request(lambda task: back.request(task, timeout))
    return client, front, back, worker


def test_promise_is_passed_on(peer: IpcPeer) -> None:
    client, front, back, worker = broker(peer)

    @worker.on_request
    def work(ping: Ping) -> Message:
        if ping.value == "error":
            raise ValueError("no good")
        return Pong(ping.value)

    assert client.request(Ping(5), expect=Pong).wait().value == 5
    with pytest.raises(RemoteError, match="no good"):
        client.request(Ping("error")).wait()
    assert no_pending(client, front, back, worker)


def test_promise_that_was_awaited_and_one_for_several_requests(peer: IpcPeer) -> None:
    client, front = peer.create_session_pair()
    back, worker = peer.create_session_pair()
    asked: List[Any] = []
    shared: Dict[Any, ResponsePromise[Message]] = {}

    @worker.on_request
    def work(ping: Ping) -> Pong:
        asked.append(ping.value)
        return Pong(ping.value)

    @front.on_request
    def forward(ping: Ping) -> ResponsePromise[Message]:
        promise = shared.setdefault(ping.value, back.request(ping) if ping.value not in shared else None)  # type: ignore[arg-type]
        if ping.value == "wait":
            promise.wait()
        return promise

    assert client.request(Ping("wait"), expect=Pong).wait().value == "wait"
    replies = gather([client.request(Ping(1), expect=Pong) for _ in range(5)])
    assert [reply.value for reply in replies] == [1] * 5 and asked == ["wait", 1]


@pytest.mark.slow
def test_worker_that_dies_and_worker_that_takes_too_long(peer: IpcPeer) -> None:
    client, front = peer.create_session_pair()
    worker = peer.create_command_session(role("work"))
    front.on_request(lambda ping: worker.request(ping, 0.1 if ping.value[0] == "system" else 20))
    with pytest.raises(RemoteError, match="RequestTimeoutError: no reply to request .* within 0.1 s"):
        client.request(Ping(("system", "sleep 2"))).wait()
    with pytest.raises(RemoteError, match="StreamClosedError: .*exit status 3"):
        client.request(Ping(("exit", 3))).wait()
    with pytest.raises(RemoteError, match="StreamClosedError"):  # of request() itself
        client.request(Ping(("exit", 3))).wait()
    assert no_pending(client, front)


def test_promise_that_is_cancelled(peer: IpcPeer) -> None:
    client, front = peer.create_session_pair()
    back, worker = peer.create_session_pair()
    promise = back.request(Ping())
    forwarded: List[Any] = []

    @front.on_request
    def forward(ping: Ping) -> ResponsePromise[Message]:
        forwarded.append(ping)
        return promise

    asked = client.request(Ping())
    tick_until(lambda: forwarded, peer)
    promise.cancel()
    with pytest.raises(RemoteError, match="cancelled"):
        asked.wait()


def test_requester_that_goes_away_leaves_nothing_behind(peer: IpcPeer) -> None:
    client, front, back, worker = broker(peer, None)
    kept = keep(worker)
    promises = [client.request(Ping(index)) for index in range(10)]
    tick_until(lambda: len(kept) == 10, peer)
    client.close()
    tick_until(lambda: len(peer.sessions) == 2, peer)
    assert no_pending(back), "the forwarded requests are still in the table"
    gone = weakref.ref(front)
    del front, client, promises
    gc.collect()
    assert gone() is None, "a forwarded request keeps the session of its requester alive"
    for reply in kept:
        assert reply.send(Pong()) is True
    peer.tick(0.1)


def test_peers_of_their_own() -> None:
    with IpcPeer() as outer, IpcPeer() as middle, IpcPeer() as inner:
        client, front = socket_peers(outer, middle)
        back, worker = socket_peers(inner, inner)
        front.on_request(lambda ping: back.request(ping))
        worker.on_request(lambda ping: Pong(ping.value))
        promise = client.request(Ping(7), expect=Pong)
        tick_until(lambda: promise.done, outer, middle, inner)
        assert promise.wait().value == 7


@pytest.mark.slow
def test_broker_with_thousands_of_requests_under_way(peer: IpcPeer) -> None:
    client, front, back, worker = broker(peer)
    worker.on_request(lambda ping: Pong(ping.value))
    count = 20_000
    replies = gather([client.request(Ping(index), expect=Pong) for index in range(count)])
    assert [reply.value for reply in replies] == list(range(count))
    assert no_pending(client, front, back, worker)


def test_deferred_replies_that_pile_up_stop_the_reading() -> None:
    with IpcPeer(timeout=60) as peer, IpcPeer(timeout=60) as other:
        client, front = socket_peers(other, peer)
        kept = keep(front)
        promises = [client.request(Ping(index), expect=Pong) for index in range(10_000)]
        for _ in range(300):
            peer.tick(0)
            other.tick(0)
        assert 4096 <= len(kept) < 9000, len(kept)
        answered = 0
        while answered < len(promises):
            while answered < len(kept):
                kept[answered].send(Pong(answered))
                answered += 1
            peer.tick(0)
            other.tick(0)
        tick_until(lambda: promises[-1].done, peer, other)
        assert [promise.wait().value for promise in promises] == list(range(10_000))


@pytest.mark.slow
def test_replies_that_depend_on_the_same_stream_do_not_block_each_other(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    a.on_request(lambda ping: Pong(ping.value))
    b.on_request(lambda ping: b.request(ping))
    count = 12_000
    replies = gather([a.request(Ping(index), expect=Pong) for index in range(count)], 60)
    assert [reply.value for reply in replies] == list(range(count))


@pytest.mark.slow
def test_two_brokers_that_forward_to_each_other(peer: IpcPeer) -> None:
    a, to_a = peer.create_session_pair()
    b, to_b = peer.create_session_pair()
    to_a.on_request(lambda ping: to_b.request(ping))
    to_b.on_request(lambda ping: to_a.request(ping))
    a.on_request(lambda ping: Pong(ping.value))
    b.on_request(lambda ping: Pong(ping.value))
    promises = [side.request(Ping(index), expect=Pong) for index in range(8000) for side in (a, b)]
    assert len(gather(promises, 60)) == 16_000


def test_within_a_batch_and_within_a_handler(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    kept = keep(b)
    promises = [a.request(Ping(index), expect=Pong) for index in range(5)]
    tick_until(lambda: len(kept) == 5, peer)

    @b.on_message
    def settle(note: Note) -> None:
        with b.batch():
            for index, reply in enumerate(kept):
                reply.send(Pong(index))

    a.notify(Note("now"))
    assert [reply.value for reply in gather(promises)] == [0, 1, 2, 3, 4]


def test_closing_peer_with_replies_owed() -> None:
    with IpcPeer() as peer:
        a, b = peer.create_session_pair()
        kept = keep(b)
        promise = a.request(Ping())
        tick_until(lambda: kept, peer)
    assert kept[0].send(Pong()) is False
    with pytest.raises(StreamClosedError):
        promise.wait()


def test_wrong_reply_names_what_is_right(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    wrong: Any = lambda ping: "text"  # noqa: E731
    b.on_request(wrong)
    with pytest.raises(RemoteError, match="a ResponsePromise, a DeferredReply, or None"):
        a.request(Ping()).wait()


# -- interrupted


@BOTH
def test_interrupted_broker_loses_no_reply(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            back, worker = peer.create_session_pair()
            worker.on_request(lambda ping: Pong(ping.value))
            raw.session.on_request(lambda ping: back.request(ping))
            raw.write(*(request_bytes(str(index), Ping(index)) for index in range(3)))
            replies: List[Any] = []

            def turn() -> None:
                peer.tick(0.01)

            run.until(lambda: replies.extend(raw.messages()) or len(replies) >= 3, turn)
            for _ in range(3):
                peer.tick()
            replies += raw.messages()
            assert sorted(reply.id for reply in replies) == ["0", "1", "2"], replies
            for reply in replies:
                assert reply.response == Pong(int(reply.id)) or "nterrupt" in str(reply.response), reply
            run.error.__traceback__ = None  # its frames would keep a promise that was never handed out
            assert no_pending(raw.session, back)

    at_every_place(scenario, kind)


@BOTH
@pytest.mark.slow
def test_interrupted_deferred_reply_is_sent_once(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            kept: List[Any] = []

            @raw.session.on_request
            def later(ping: Ping) -> DeferredReply:
                reply = DeferredReply()
                if ping.value == 1:
                    reply.send(Pong(1))
                elif ping.value != 2:  # which is dropped
                    kept.append((ping.value, reply))
                return reply

            raw.write(*(request_bytes(str(index), Ping(index)) for index in range(4)))
            replies: List[Any] = []

            def turn() -> None:
                run.error.__traceback__ = None  # its frames would keep the one that is to be dropped
                for value, reply in kept:
                    if not reply.done:
                        reply.send(Pong(0)) if value == 0 else reply.fail("three")
                peer.tick(0.01)

            run.until(lambda: replies.extend(raw.messages()) or len(replies) >= 4, turn)
            for _ in range(3):
                peer.tick()
            replies += raw.messages()
            found = {reply.id: reply.response for reply in replies}
            assert len(replies) == len(found) == 4, replies
            for id, response in found.items():
                if "nterrupt" in str(response):  # what its handler had come to when it was interrupted
                    continue
                right = {"0": "0", "1": "1", "2": "was dropped", "3": "three"}[id]
                assert right in str(response), replies
            assert no_pending(raw.session)

    at_every_place(scenario, kind)


def test_alarm_in_a_handler_that_defers(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    kept = keep(b)

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError("alarm")

    old = signal.signal(signal.SIGUSR1, ring)
    try:
        promise = a.request(Ping(), expect=Pong)
        tick_until(lambda: kept, peer)
        with pytest.raises(TimeoutError, match="alarm"):
            signal.raise_signal(signal.SIGUSR1)
        kept[0].send(Pong(3))
        assert promise.wait().value == 3
    finally:
        signal.signal(signal.SIGUSR1, old)


# -- done callbacks


def test_done_callback_over_every_way_to_settle(caplog: pytest.LogCaptureFixture) -> None:
    with IpcPeer(timeout=20) as peer:
        a, b = peer.create_session_pair()

        @b.on_request
        def answer(ping: Ping) -> "Message | DeferredReply":
            if ping.value == "error":
                raise ValueError("no")
            if ping.value == "never":
                kept.append(DeferredReply())
                return kept[-1]
            return Pong(ping.value)

        kept: List[DeferredReply] = []
        called: Dict[str, Any] = {}

        def note(name: str, promise: "ResponsePromise[Any]") -> None:
            def call(given: Any) -> None:
                assert given is promise and is_settled(given) and name not in called
                called[name] = outcome(given)

            promise.add_done_callback(call)

        note("reply", a.request(Ping(1)))
        note("error", a.request(Ping("error")))
        note("timeout", a.request(Ping("never"), timeout=0.05))
        cancelled = a.request(Ping("never"))
        note("cancel", cancelled)
        note("unexpected", a.request(Ping(2), expect=Note))
        tick_until(lambda: len(called) == 4, peer)
        assert cancelled.cancel() and "cancel" in called
        done = a.request(Ping(3))
        done.wait()
        note("settled before", done)
        assert called["settled before"] == Pong(3)
        note("close of the session", a.request(Ping("never")))
        a.close()
        assert "close of the session" in called
        c, d = peer.create_session_pair()
        note("close of the peer", c.request(Ping(4)))
    assert {name: getattr(value, "__name__", value) for name, value in called.items()} == {
        "reply": Pong(1), "error": "RemoteError", "timeout": "RequestTimeoutError", "cancel": "IpcError",
        "unexpected": "UnexpectedReplyError", "settled before": Pong(3), "close of the session": "StreamClosedError",
        "close of the peer": "StreamClosedError",
    }  # fmt: skip
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_done_callbacks_are_called_in_order_and_what_they_raise_is_logged(
    peer: IpcPeer, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    promise = a.request(Ping())
    order: List[int] = []

    def fails(promise: Any) -> None:
        order.append(1)
        promise.add_done_callback(lambda promise: order.append(9))
        raise LookupError("in the callback")

    promise.add_done_callback(lambda promise: order.append(0))
    promise.add_done_callback(fails)
    promise.add_done_callback(lambda promise: order.append(2))
    promise.wait()
    assert sorted(order) == [0, 1, 2, 9] and order[:2] == [0, 1]
    assert "in the callback" in caplog.text
    wrong: Any = "no function"
    with pytest.raises(TypeError, match="takes a function"):
        promise.add_done_callback(wrong)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interruption_of_a_done_callback_passes_through_and_the_others_are_called(
    peer: IpcPeer, kind: Type[BaseException]
) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    promises = [a.request(Ping(index), expect=Pong) for index in range(3)]
    called: List[Any] = []

    def interrupted(promise: Any) -> None:
        called.append("interrupted")
        raise kind

    promises[1].add_done_callback(interrupted)
    for promise in promises:
        promise.add_done_callback(lambda promise: called.append(promise.wait().value))
    with pytest.raises(kind):
        gather(promises)
    assert [promise.wait().value for promise in promises] == [0, 1, 2]
    tick_until(lambda: len(called) == 4, peer)
    assert sorted(called, key=str) == [0, 1, 2, "interrupted"]


def test_done_callback_that_requests_waits_and_closes(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    got: List[Any] = []

    def again(promise: Any) -> None:
        value = promise.wait().value
        got.append(value)
        if value < 5:
            a.request(Ping(value + 1)).add_done_callback(again)
        elif value == 5:
            got.append(a.request(Ping("waited"), expect=Pong).wait().value)
            a.close()

    last = a.request(Ping(5), expect=Pong)
    a.request(Ping(0)).add_done_callback(again)
    others = [a.request(Ping(99)) for _ in range(50)]
    assert last.wait().value == 5
    tick_until(lambda: not a.is_open, peer)
    assert got == [0, 1, 2, 3, 4, 5, "waited"]
    assert {outcome(promise) for promise in others if outcome(promise) != Pong(99)} <= {StreamClosedError}


def test_wait_whose_callback_closes_the_session(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    promises = [a.request(Ping(index), expect=Pong) for index in range(10)]
    promises[3].add_done_callback(lambda promise: a.close())
    assert promises[3].wait().value == 3
    assert [outcome(promise) for promise in promises[4:]] == [StreamClosedError] * 6
    assert not a.is_open


def test_slow_done_callbacks_of_many_overdue_requests_keep_no_tick_beyond_its_share(raw: RawPeer) -> None:
    clock = set_clock(raw.session.peer, FakeClock())
    called: List[Any] = []

    def slow(promise: Any) -> None:
        called.append(promise)
        clock.now += 0.03

    promises = [raw.session.request(Ping(index), timeout=1) for index in range(20)]
    for promise in promises:
        promise.add_done_callback(slow)
    clock.now += 1
    while len(called) < 20:
        before = len(called)
        raw.session.tick(0)
        assert 1 <= len(called) - before <= 5
        assert [is_settled(promise) for promise in promises] == [promise in called for promise in promises]
        assert raw.session.peer.next_deadline() == (0.0 if len(called) < 20 else None)
    assert called == promises
    assert [outcome(promise) for promise in promises] == [RequestTimeoutError] * 20


def test_request_of_a_done_callback_of_an_overdue_one_is_overdue_in_its_turn(raw: RawPeer) -> None:
    clock = set_clock(raw.session.peer, FakeClock())
    tries: List[Any] = []

    def again(promise: Any) -> None:
        tries.append(raw.session.request(Ping(len(tries)), timeout=1))
        tries[-1].add_done_callback(again)

    again(None)
    raw.session.request(Ping("another"), timeout=100)
    for count in range(1, 5):
        assert len(tries) == count and not is_settled(tries[-1])
        clock.now += 1.5
        raw.session.tick(0)
    assert [outcome(promise) for promise in tries[:-1]] == [RequestTimeoutError] * 4


def test_request_of_a_done_callback_that_is_due_when_the_other_was(raw: RawPeer) -> None:
    clock = set_clock(raw.session.peer, FakeClock())
    requests: List[Any] = []
    first = raw.session.request(Ping(), timeout=1)
    first.add_done_callback(lambda promise: requests.append(raw.session.request(Ping(), timeout=0)))
    clock.now += 1
    raw.session.tick(0)
    requests.append(raw.session.request(Ping(), timeout=3))
    clock.now += 3
    raw.session.tick(0)
    assert len(requests) == 2 and all(map(is_settled, requests))


def test_nothing_is_left_of_a_session_that_the_done_callback_of_an_overdue_request_closes(peer: IpcPeer) -> None:
    clock = set_clock(peer, FakeClock())
    with RawPeer(peer) as raw:
        session = weakref.ref(raw.session)
        promises = [raw.session.request(Ping(), timeout=timeout) for timeout in (1, 1000)]
        promises[0].add_done_callback(lambda promise: peer.sessions[0].close())
        clock.now += 2
        raw.session.tick(0)
        assert [outcome(promise) for promise in promises] == [RequestTimeoutError, StreamClosedError]
        del raw.session, promises
    gc.collect()
    assert session() is None


def test_done_callback_of_an_overdue_request_that_reads_the_end_of_a_stream_which_is_still_written(raw: RawPeer) -> None:
    peer = raw.session.peer
    clock = set_clock(peer, FakeClock())

    def read_the_end(promise: Any) -> None:
        raw.sock.shutdown(socket.SHUT_WR)
        while "closed the stream" not in repr(raw.session):
            peer.tick(0)
        peer.tick(0)

    raw.session.request(Ping(), timeout=1).add_done_callback(read_the_end)
    raw.session.notify(Note(data=bytes(900_000)))
    clock.now += 2
    peer.tick(0)
    due = peer.next_deadline()
    assert raw.session.is_open and due is not None  # it is kept for what is queued, but not for ever
    clock.now += due
    peer.tick(0)
    assert not raw.session.is_open


def test_request_that_waits_for_room_while_another_is_overdue_keeps_its_deadline(raw: RawPeer) -> None:
    def read_when_it_is_overdue() -> None:
        if is_settled(first):
            raw.read()

    clock = set_clock(raw.session.peer, FakeClock())
    first = raw.session.request(Ping(), timeout=5)
    raw.session.notify(Note(data=bytes(3_000_000)))
    clock = set_clock(raw.session.peer, HurryingClock(read_when_it_is_overdue))
    overdue = raw.session.request(Ping(), timeout=1000)
    assert not is_settled(overdue) and outcome(first) is RequestTimeoutError
    set_clock(raw.session.peer, FakeClock()).now = clock.now + 1000
    raw.session.tick(0)
    assert is_settled(overdue) and outcome(overdue) is RequestTimeoutError


@pytest.mark.parametrize("what", ["closes", "ticks", "waits"])
def test_done_callback_of_a_reply_that_overtakes_a_request_which_has_to_wait(raw: RawPeer, what: str) -> None:
    session = raw.session
    clock = set_clock(session.peer, FakeClock())
    seen: List[Any] = []
    notes = [Note(str(index)) for index in range(4)]
    expected: List[Any] = [] if what == "closes" else [Ping("asked"), Note("behind"), *notes]

    @session.on_request
    def answer(ping: Ping) -> Pong:
        seen.append(ping)
        return Pong()

    session.on_message(seen.append)

    def read(*then: bytes) -> None:
        while session.queued_bytes:
            raw.read()
            session.transport.flush()
        raw.read()
        raw.write(*then)

    def act(promise: Any) -> None:
        if what == "closes":
            session.close(0)
        elif what == "ticks":
            read(*map(framed, notes))
            for _ in range(10):
                session.tick(0)
            assert len(seen) == 6
        else:
            read()
            follow_up = session.request(Ping("follow-up"))
            raw.write(reply_bytes(follow_up.id, Pong("second")), *map(framed, notes))
            assert follow_up.wait() == Pong("second")

    promise = session.request(Ping(), timeout=1)
    promise.add_done_callback(act)
    session.notify(Note(data=bytes(3_000_000)))  # above the mark: requests have to wait until it is read
    raw.write(request_bytes("r", Ping("asked")), reply_bytes(promise.id, Pong("first")), framed(Note("behind")))
    session.tick(0)
    assert seen == []
    clock.now += 2  # the reply came in time, and counts though it cannot have its turn
    session.tick(0)
    assert promise.wait() == Pong("first")
    if what != "closes":
        session.tick(0)
    assert seen == expected


def test_an_overdue_reply_behind_requests_is_found_though_the_first_of_these_fills_the_queue(raw: RawPeer) -> None:
    session = raw.session
    clock = set_clock(session.peer, FakeClock())
    session.on_request(lambda ping: Pong("x" * 3_000_000))
    promise = session.request(Ping(), timeout=1)
    raw.write(request_bytes("a", Ping()), request_bytes("b", Ping()), reply_bytes(promise.id, Pong("it was there")))
    for _ in range(3):
        clock.now += 2
        session.tick(0)
    assert promise.settled and promise.wait() == Pong("it was there")
    drop_queued(session)


def test_hundreds_of_done_callbacks_that_wait_do_not_exhaust_the_stack(peer: IpcPeer) -> None:
    a = peer.create_command_session(role("echo"))
    got: List[Any] = []

    def wait(promise: Any) -> None:
        got.append(a.request(Ping("inner"), expect=Pong).wait().value)

    promises = [a.request(Ping(index), expect=Pong) for index in range(400)]
    for promise in promises:
        promise.add_done_callback(wait)
    gather(promises)
    tick_until(lambda: len(got) == 400, peer)


def test_promise_with_a_done_callback_lives_until_it_has_settled(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    called: List[Any] = []
    a.request(Ping(1)).add_done_callback(lambda promise: called.append(weakref.ref(promise)))
    gc.collect()
    tick_until(lambda: called, peer)
    gc.collect()
    assert called[0]() is None and no_pending(a, b)


def test_error_reply_of_a_message_class_is_passed_on_as_it_is(peer: IpcPeer) -> None:
    client, front, back, worker = broker(peer)
    worker.on_request(lambda ping: ErrorMessage("exactly this"))
    with pytest.raises(RemoteError) as caught:
        client.request(Ping()).wait()
    assert str(caught.value) == "exactly this"


def test_requester_that_times_out_gets_no_late_reply(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    kept = keep(b)
    with pytest.raises(RequestTimeoutError):
        a.request(Ping(), timeout=0.05).wait()
    assert kept[0].send(Pong()) is True
    peer.tick(0.05)
    assert no_pending(a, b)


class MacPoll:
    """The ``poll`` of macOS, which says nothing of a descriptor that is registered for nothing."""

    make = staticmethod(select.poll)

    def __init__(self) -> None:
        self._poll = self.make()

    def register(self, fd: int, events: int) -> None:
        if events:
            self._poll.register(fd, events)

    def poll(self, timeout: int) -> Any:
        return self._poll.poll(timeout)


@pytest.mark.parametrize("kind", ["socket", "socket on macOS", "child"])
def test_requester_that_is_gone_is_noticed_though_it_is_owed_so_much_that_it_is_not_read_from(
    peer: IpcPeer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "socket on macOS":
        monkeypatch.setattr(select, "poll", MacPoll)
    set_limit("inbox count", 50, monkeypatch)
    kept: List[DeferredReply] = []

    def keep(ping: Ping) -> DeferredReply:
        kept.append(DeferredReply())
        return kept[-1]

    if kind != "child":
        with RawPeer(peer) as raw:
            raw.session.on_request(keep)
            raw.write(*(request_bytes(str(index), Ping(index)) for index in range(500)))
            tick_until(lambda: len(kept) > 50, peer)
            session = raw.session
        tick_until(lambda: not session.is_open, peer, seconds=20)
    else:
        session = peer.create_command_session(role("asks", "500"))
        session.on_request(keep)
        tick_until(lambda: len(kept) > 50, peer)
        assert session.process is not None
        session.process.kill()
        tick_until(lambda: not session.is_open, peer, seconds=20)
    assert not kept[0].send(Pong())


class RuntimeAlarm(RuntimeError):
    pass


@pytest.mark.parametrize("how", ["promise", "deferred", "settled later"])
def test_a_runtime_error_of_a_signal_handler_is_not_taken_for_an_answer(how: str) -> None:
    def alarm(*_: Any) -> None:
        raise RuntimeAlarm("alarm")

    serializer = ActingSerializer(ResponseEnvelope)
    interrupt = partial(os.kill, os.getpid(), signal.SIGUSR1)
    held: List[DeferredReply] = []

    def serve(ping: Ping) -> Any:
        if how == "promise":
            promise = d.request(Ping())
            tick_until(lambda: promise.settled, peer)
            serializer.act = interrupt
            return promise
        held.append(DeferredReply())
        if how == "deferred":
            held[0].send(Pong(7))
            serializer.act = interrupt
        return held[0]

    old = signal.signal(signal.SIGUSR1, alarm)
    try:
        with IpcPeer(serializer, timeout=5) as peer:
            a, b = peer.create_session_pair()
            c, d = peer.create_session_pair()
            b.on_request(serve)
            c.on_request(lambda ping: Pong(7))
            promise = a.request(Ping())
            with pytest.raises(RuntimeAlarm):
                if how == "settled later":
                    tick_until(lambda: held, peer)
                    serializer.act = interrupt
                    held[0].send(Pong(7))
                promise.wait()
            assert promise.wait() == Pong(7)
    finally:
        signal.signal(signal.SIGUSR1, old)


@pytest.mark.parametrize("how", ["returned", "promise", "deferred", "settled later", "an error in its place"])
@pytest.mark.parametrize("error", [Interruption(), InterruptionError()])
def test_a_reply_is_sent_once_though_what_encodes_it_sends_something_and_is_interrupted(
    error: BaseException, how: str
) -> None:
    serializer = ActingSerializer(ResponseEnvelope)
    def ring(number: int, frame: Any) -> None:
        raise error

    def act() -> None:
        raw.session.notify(Note("progress"))
        signal.raise_signal(signal.SIGUSR1)

    def serve(ping: Ping) -> Any:
        if how == "settled later":
            return held
        serializer.act = act
        if how == "promise":
            return promise
        if how == "deferred":
            held.send(Pong(7))
            return held
        return Pong(7 if how == "returned" else object())

    held = DeferredReply()
    old = signal.signal(signal.SIGUSR1, ring)
    try:
        with IpcPeer(serializer, timeout=5) as peer, RawPeer(peer) as raw:
            c, d = peer.create_session_pair()
            c.on_request(lambda ping: Pong(7))
            promise = d.request(Ping())
            promise.wait()
            raw.session.on_request(serve)
            raw.write(request_bytes("1", Ping()))
            with pytest.raises(type(error)):
                peer.tick(5)
                serializer.act = act
                held.send(Pong(7))
            found: List[Any] = []
            tick_until(lambda: found.extend(raw.messages()) or len(found) > 1, peer, seconds=5)
            for _ in range(3):
                peer.tick(0)
            found += raw.messages()
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert found[0] == Note("progress") and [reply.id for reply in found[1:]] == ["1"]
    if how == "an error in its place":
        assert "could not be sent" in str(found[1].response)
    else:
        assert found[1].response == Pong(7)
