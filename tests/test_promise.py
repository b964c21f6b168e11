"""ResponsePromise, gather, as_completed."""

import collections
import gc
import itertools
import math
import os
import signal
import sys
import time
import weakref
from typing import Any, Callable, Dict, List, Tuple
from unittest.mock import Mock

import pytest

from stream_ipc import (
    ErrorMessage,
    IpcError,
    IpcPeer,
    LogMessage,
    PhpMessageSerializer,
    RemoteError,
    RequestTimeoutError,
    ResponsePromise,
    Session,
    StreamClosedError,
    as_completed,
    gather,
)
from stream_ipc.core import requests
from tests.helpers import (
    WAIT,
    CallAt,
    CpuMeter,
    FakeClock,
    RawPeer,
    framed,
    is_settled,
    no_pending,
    reply_bytes,
    request_bytes,
    role,
    set_clock,
    socket_peers,
    tick_until,
)
from tests.messages import Note, Ping, Pong


def test_wait_again_returns_the_same_reply(raw: RawPeer) -> None:
    promise = raw.session.request(Ping(), expect=Pong)
    assert isinstance(promise.id, str) and not promise.done
    raw.write(reply_bytes(promise.id, Pong([1])))
    reply = promise.wait()
    assert promise.done and promise.wait() is reply and promise.wait(0) is reply
    raw.session.close()
    assert promise.wait() is reply


@pytest.mark.parametrize("kind", ["remote", "timeout", "closed", "unexpected", "cancelled"])
def test_wait_again_raises_the_same_error(raw: RawPeer, kind: str) -> None:
    promise = raw.session.request(Ping(), expect=Pong, timeout=0.01 if kind == "timeout" else 20)
    if kind == "remote":
        raw.write(reply_bytes(promise.id, ErrorMessage("no")))
    elif kind == "closed":
        raw.sock.close()
    elif kind == "unexpected":
        raw.write(reply_bytes(promise.id, Note("no")))
    elif kind == "cancelled":
        assert promise.cancel() is True
    errors: List[BaseException] = []
    for _ in range(3):
        with pytest.raises(IpcError) as caught:
            promise.wait()
        errors.append(caught.value)
    assert errors[0] is errors[1] is errors[2]
    assert promise.done and promise.cancel() is False
    depth = 0
    trace = errors[2].__traceback__
    while trace is not None:
        depth += 1
        trace = trace.tb_next
    assert depth < 4, "the traceback grows with each wait"


def test_error_of_the_other_side_keeps_its_text(raw: RawPeer) -> None:
    promise = raw.session.request(Ping())
    try:
        raise KeyError("inner")
    except KeyError as exc:
        raw.write(reply_bytes(promise.id, ErrorMessage("it went wrong", exc)))
    with pytest.raises(RemoteError) as caught:
        promise.wait()
    text = str(caught.value)
    assert text.startswith("it went wrong\n") and "KeyError: 'inner'" in text and "Traceback" in text


def test_own_timeout_of_wait_leaves_the_request_pending(raw: RawPeer) -> None:
    promise = raw.session.request(Ping(), expect=Pong)
    for timeout in (0, 0.05):
        with CpuMeter() as meter, pytest.raises(TimeoutError) as caught:
            promise.wait(timeout)
        assert type(caught.value) is TimeoutError and timeout <= meter.real < 5
        assert not promise.done
    raw.write(reply_bytes(promise.id, Pong(1)))
    assert promise.wait(0) == Pong(1)  # what is there counts, though there is no time to wait


def test_deadline_before_the_own_timeout_is_the_requests(raw: RawPeer) -> None:
    with CpuMeter() as meter, pytest.raises(RequestTimeoutError):
        raw.session.request(Ping(), timeout=0.05).wait(20)
    assert 0.05 <= meter.real < 10 and no_pending(raw.session)


def test_reply_that_is_there_beats_the_deadline(raw: RawPeer) -> None:
    clock = set_clock(raw.session.peer, FakeClock())
    promise = raw.session.request(Ping(), timeout=1, expect=Pong)
    raw.write(reply_bytes(promise.id, Pong("in time")))
    clock.now += 100
    assert promise.done
    assert promise.wait().value == "in time"


@pytest.mark.parametrize("how", ["wait", "notify"])
def test_the_reason_of_a_session_keeps_no_frame_of_its_users_alive(peer: IpcPeer, how: str) -> None:
    class Local:
        pass

    def use(raw: RawPeer) -> "weakref.ref[Local]":
        local = Local()
        promises = [raw.session.request(Ping()) for _ in range(2)]
        raw.sock.close()
        if how == "notify":
            with pytest.raises(StreamClosedError):
                raw.session.notify(Note())
        for promise in promises:
            with pytest.raises(StreamClosedError) as info:
                promise.wait()
            assert str(info.value) == str(raw.session.reason)
        return weakref.ref(local)

    with RawPeer(peer) as raw:
        reference = use(raw)
        gc.collect()
        assert reference() is None and raw.session.reason is not None


def test_done_never_blocks_and_runs_no_handlers(raw: RawPeer) -> None:
    seen: List[Any] = []
    raw.session.on_message(seen.append)
    promise = raw.session.request(Ping())
    raw.write(framed(Note()), reply_bytes(promise.id, Pong()))
    with CpuMeter() as meter:
        assert not promise.done
    assert meter.real < 1 and seen == []
    tick_until(lambda: promise.done, raw.session.peer)


def test_cancel_discards_a_late_reply(raw: RawPeer) -> None:
    promise = raw.session.request(Ping())
    raw.read()
    assert promise.cancel() is True and promise.done and promise.cancel() is False
    assert raw.read() == b"" and no_pending(raw.session)  # the other side is not told
    raw.write(reply_bytes(promise.id, Pong()), framed(Note()))
    assert raw.session.receive(20) == Note()
    with pytest.raises(IpcError, match="cancelled"):
        promise.wait()


def test_cancel_in_a_handler_ends_the_wait(raw: RawPeer) -> None:
    promise = raw.session.request(Ping())
    raw.session.on_message(lambda note: promise.cancel())
    raw.write(framed(Note()))
    with CpuMeter() as meter, pytest.raises(IpcError, match="cancelled"):
        promise.wait()
    assert meter.real < 10


def test_wait_in_a_handler_for_what_is_waited_for_outside(raw: RawPeer) -> None:
    promise = raw.session.request(Ping(), expect=Pong)
    inner: List[Any] = []

    @raw.session.on_message
    def handler(note: Note) -> None:
        raw.write(reply_bytes(promise.id, Pong(7)))
        inner.append(promise.wait().value)

    raw.write(framed(Note()))
    assert promise.wait().value == 7 and inner == [7]


def test_wait_drives_the_other_sessions_of_the_peer(peer: IpcPeer) -> None:
    with RawPeer(peer) as one, RawPeer(peer) as two:
        promise = one.session.request(Ping(), expect=Pong)
        two.session.on_message(lambda note: one.write(reply_bytes(promise.id, Pong(note.text))))
        two.write(framed(Note("from the other")))
        assert promise.wait().value == "from the other"


def test_promise_does_not_keep_reply_alive_when_dropped(raw: RawPeer) -> None:
    promise = raw.session.request(Ping())
    id = promise.id
    del promise
    gc.collect()
    assert no_pending(raw.session)
    raw.write(reply_bytes(id, Pong()), framed(Note()))
    assert raw.session.receive(20) == Note()


def test_replies_of_promises_that_are_gone_are_gone_with_the_next(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    replies: List[Any] = []
    for index in range(20):
        replies.append(weakref.ref(a.request(Ping(index)).wait()))
    gc.collect()
    assert [reply() for reply in replies[:-1]] == [None] * 19


def test_error_says_how_a_child_died(peer: IpcPeer) -> None:
    with peer.create_command_session(role("work")) as session:
        with pytest.raises(StreamClosedError, match="7"):
            session.request(Ping(["exit", 7])).wait()


# -- gather


def echo_pair(peer: IpcPeer) -> Tuple[Session, Session]:
    a, b = peer.create_session_pair()

    @b.on_request
    def answer(ping: Ping) -> Pong:
        if ping.value == "raise":
            raise LookupError("asked to")
        return Pong(ping.value)

    return a, b


def test_gather_returns_the_replies_in_order(peer: IpcPeer) -> None:
    pairs = [echo_pair(peer) for _ in range(3)]
    promises = [pairs[index % 3][0].request(Ping(index), expect=Pong) for index in range(30)]
    assert [reply.value for reply in gather(promises)] == list(range(30))
    assert [reply.value for reply in gather(iter(promises[::-1]))] == list(range(29, -1, -1))
    assert gather([]) == [] and gather([promises[0], promises[0]]) == [Pong(0), Pong(0)]


def test_gather_raises_the_first_error_in_order_when_all_have_settled(raw: RawPeer) -> None:
    promises = [raw.session.request(Ping(index)) for index in range(4)]
    raw.write(
        reply_bytes(promises[3].id, ErrorMessage("three")), reply_bytes(promises[0].id, Pong()),
        reply_bytes(promises[1].id, ErrorMessage("one")),
    )  # fmt: skip
    last: List[bool] = []

    @raw.session.on_message
    def later(note: Note) -> None:
        last.append(True)
        raw.write(reply_bytes(promises[2].id, Pong()))

    raw.write(framed(Note()))
    with pytest.raises(RemoteError, match="^one"):
        gather(promises)
    assert last and all(promise.done for promise in promises)
    assert promises[0].wait() == Pong()


def test_gather_gives_up_in_time_and_leaves_the_rest_pending(raw: RawPeer) -> None:
    promises = [raw.session.request(Ping(index)) for index in range(3)]
    raw.write(reply_bytes(promises[1].id, Pong()))
    with CpuMeter() as meter, pytest.raises(TimeoutError, match="2 of 3") as caught:
        gather(promises, WAIT)
    assert type(caught.value) is TimeoutError and WAIT <= meter.real < 5 and not meter.spins
    assert [promise.done for promise in promises] == [False, True, False]
    for promise in promises:
        raw.write(reply_bytes(promise.id, Pong(1)))
    assert len(gather(promises, 20)) == 3


def test_gather_keeps_each_requests_deadline(raw: RawPeer) -> None:
    short = raw.session.request(Ping(), timeout=0.05)
    long = raw.session.request(Ping(), expect=Pong)
    both: List[ResponsePromise[Any]] = [long, short]
    raw.write(reply_bytes(long.id, Pong("there")))
    with pytest.raises(RequestTimeoutError):
        gather(both)
    assert long.wait().value == "there"


def test_gather_when_a_session_ends(peer: IpcPeer) -> None:
    with RawPeer(peer) as one, RawPeer(peer) as two:
        promises = [one.session.request(Ping(), timeout=None), two.session.request(Ping(), timeout=None)]
        one.sock.close()
        two.write(reply_bytes(promises[1].id, Pong()))
        with pytest.raises(StreamClosedError):
            gather(promises)
        assert promises[1].wait() == Pong()


@pytest.mark.parametrize("bad", [[1], [None], ["x"]])
def test_gather_takes_promises_only(bad: Any) -> None:
    with pytest.raises(TypeError):
        gather(bad)
    with pytest.raises(TypeError):
        as_completed(bad)


@pytest.mark.parametrize("wait", [gather, as_completed])
def test_a_promise_in_place_of_a_list(raw: RawPeer, wait: Any) -> None:
    promise = raw.session.request(Ping())
    for arguments in ([promise], [promise, promise], [None]):
        with pytest.raises(TypeError, match=rf"^{wait.__name__}\(\) takes a list of promises, not (<Resp|None)"):
            wait(*arguments)
    promise.cancel()


def test_as_completed_looks_no_further_than_one_of_many_that_has_settled(peer: IpcPeer) -> None:
    # next(as_completed(pending)) in a loop looks at all that are left each time.
    a, b = peer.create_session_pair()
    b.on_request(lambda message: message)
    open_, settled = a.request(Ping(), timeout=None), a.request(Ping())
    assert gather([settled]) == [Ping()]
    rest: Any = ["no promise"]
    each = as_completed([settled] * 100 + rest)
    assert next(each) is settled
    with pytest.raises(TypeError, match=r"^as_completed\(\) takes promises, as request"):
        next(each)
    a.close()
    for given in ([*rest, open_, settled], [settled, *rest]):
        with pytest.raises(TypeError, match=r"^as_completed\(\) takes promises, as request"):
            as_completed(given)
    with pytest.raises(TypeError, match=r"^gather\(\) takes promises, as request"):
        gather([settled, *rest])


@pytest.mark.parametrize(
    ("timeout", "error"), [("1", TypeError), (True, TypeError), (-1, ValueError), (math.nan, ValueError)]
)
def test_a_timeout_is_checked_also_of_a_promise_that_has_settled(peer: IpcPeer, timeout: Any, error: Any) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    promise = a.request(Ping(1), expect=Pong)
    for _ in "pending", "settled":
        with pytest.raises(error):
            promise.wait(timeout)
        assert promise.wait().value == 1


@pytest.mark.parametrize("wait", [gather, as_completed])
def test_a_mock_is_no_promise(wait: Any) -> None:
    with pytest.raises(TypeError, match=r"takes promises, as request\(\) returns them, not <Mock"):
        wait([Mock(spec=ResponsePromise)])


def test_gather_inside_a_handler(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    a.on_request(lambda ping: Pong(ping.value))

    @b.on_request
    def collect(ping: Ping) -> Pong:
        return Pong([reply.value for reply in gather(b.request(Ping(index), expect=Pong) for index in range(5))])

    assert a.request(Ping(), expect=Pong).wait().value == [0, 1, 2, 3, 4]


# -- as_completed


def test_as_completed_yields_in_the_order_of_settling(raw: RawPeer) -> None:
    promises = [raw.session.request(Ping(index), expect=Pong) for index in range(6)]
    early = raw.session.request(Ping(), expect=Pong)
    raw.write(reply_bytes(early.id, Pong("early")))
    early.wait()
    order = [4, 1, 5, 0, 3, 2]
    raw.write(*(reply_bytes(promises[index].id, Pong(index)) for index in order))
    got = [promise.wait(0).value for promise in as_completed([*promises, early, early])]
    assert got == ["early", *order]


def test_as_completed_begins_with_what_had_settled_first(raw: RawPeer) -> None:
    promises = [raw.session.request(Ping(index), expect=Pong) for index in range(4)]
    raw.write(*(reply_bytes(promises[index].id, Pong(index)) for index in (2, 0, 1)))
    assert promises[1].wait().value == 1
    each = as_completed(promises)
    assert [next(each).wait(0).value for _ in range(3)] == [2, 0, 1]
    assert next(as_completed(promises)) is promises[2]
    promises[3].cancel()


def test_as_completed_yields_errors_and_timeouts_as_well(raw: RawPeer) -> None:
    promises: Dict[str, ResponsePromise[Any]] = {
        "late": raw.session.request(Ping(), timeout=0.05),
        "remote": raw.session.request(Ping()),
        "good": raw.session.request(Ping()),
        "cancelled": raw.session.request(Ping()),
    }
    raw.session.on_message(lambda note: promises["cancelled"].cancel())
    raw.write(
        reply_bytes(promises["remote"].id, ErrorMessage("no")), framed(Note()),
        reply_bytes(promises["good"].id, Pong()),
    )  # fmt: skip
    names = {promise.id: name for name, promise in promises.items()}
    assert [names[promise.id] for promise in as_completed(promises.values())] == ["remote", "cancelled", "good", "late"]
    assert no_pending(raw.session)


def test_as_completed_gives_up_in_time(raw: RawPeer) -> None:
    promises = [raw.session.request(Ping(index)) for index in range(3)]
    raw.write(reply_bytes(promises[1].id, Pong()))
    got = []
    with CpuMeter() as meter, pytest.raises(TimeoutError, match="2 of 3"):
        for promise in as_completed(promises, WAIT):
            got.append(promise)
    assert got == [promises[1]] and WAIT <= meter.real < 5 and not meter.spins
    assert [promise.done for promise in promises] == [False, True, False]


def test_as_completed_that_is_left_early_leaves_nothing(raw: RawPeer) -> None:
    promises = [raw.session.request(Ping(index)) for index in range(3)]
    raw.write(reply_bytes(promises[0].id, Pong()))
    for promise in as_completed(promises):
        break
    iterator = as_completed(promises)  # never begun
    del iterator, promises, promise
    gc.collect()
    assert no_pending(raw.session)


def test_requests_made_while_iterating(peer: IpcPeer) -> None:
    a, _ = echo_pair(peer)
    values = []
    for promise in as_completed([a.request(Ping(index), expect=Pong) for index in range(5)]):
        value = promise.wait().value
        values.append(a.request(Ping(value * 10), expect=Pong).wait().value)
    assert sorted(values) == [0, 10, 20, 30, 40]


# -- over several peers


def test_gather_and_as_completed_over_several_peers() -> None:
    with IpcPeer(timeout=20) as one, IpcPeer(timeout=20) as two, IpcPeer(timeout=20) as three:
        sessions = [echo_pair(peer)[0] for peer in (one, two, three)]
        promises = [sessions[index % 3].request(Ping(index), expect=Pong) for index in range(30)]
        assert [reply.value for reply in gather(promises)] == list(range(30))
        promises = [sessions[index % 3].request(Ping(index), expect=Pong) for index in range(30)]
        assert sorted(promise.wait(0).value for promise in as_completed(promises)) == list(range(30))


def test_gather_over_peers_that_need_each_other() -> None:
    # Each answers only while the other is driven as well.
    with IpcPeer(timeout=20) as one, IpcPeer(timeout=20) as two:
        a, b = socket_peers(one, two)
        for session in (a, b):
            session.on_request(lambda ping: Pong(ping.value))
        first = [a.request(Ping(b"x" * 500000), expect=Pong), b.request(Ping(b"y" * 500000), expect=Pong)]
        assert [len(reply.value) for reply in gather(first, 20)] == [500000] * 2


@pytest.mark.slow
def test_gather_over_several_peers_waits_without_spinning_and_in_time() -> None:
    with IpcPeer(timeout=20) as one, IpcPeer(timeout=20) as two:
        with RawPeer(one) as first, RawPeer(two) as second:
            promises = [first.session.request(Ping()), second.session.request(Ping())]
            second.write(reply_bytes(promises[1].id, Pong()))
            with CpuMeter() as meter, pytest.raises(TimeoutError, match="1 of 2"):
                gather(promises, 0.15)
            assert 0.15 <= meter.real < 5 and meter.cpu < 0.05
            short = second.session.request(Ping(), timeout=0.1)
            assert [p for p in as_completed([short, promises[1]])] == [promises[1], short]
            with pytest.raises(RequestTimeoutError):
                short.wait()


def test_gather_over_several_peers_when_one_is_closed() -> None:
    with IpcPeer(timeout=20) as one, IpcPeer(timeout=20) as two:
        with RawPeer(one) as first, RawPeer(two) as second:
            promises = [first.session.request(Ping(index)) for index in range(2)]
            lost = second.session.request(Ping())

            @first.session.on_message
            def close(note: Note) -> None:
                two.close()
                first.write(reply_bytes(promises[1].id, Pong(1)))

            first.write(reply_bytes(promises[0].id, Pong(0)), framed(Note()))
            order = []
            for promise in as_completed([*promises, lost], 10):
                order.append(promise)
            assert order == [promises[0], lost, promises[1]]
            with pytest.raises(StreamClosedError):
                lost.wait()


def test_gather_over_two_children_of_two_peers() -> None:
    with IpcPeer(timeout=20) as one, IpcPeer(timeout=20) as two:
        sessions = [peer.create_command_session(role("echo")) for peer in (one, two)]
        promises = [session.request(Ping(index), expect=Pong) for session in sessions for index in range(20)]
        assert [reply.value for reply in gather(promises)] == list(range(20)) * 2


# -- errors in the middle


@pytest.mark.parametrize("several", [False, True], ids=["one peer", "two peers"])
def test_as_completed_goes_on_behind_the_error_of_a_handler(several: bool) -> None:
    with IpcPeer(timeout=20) as one, IpcPeer(timeout=20) as two:
        with RawPeer(one) as first, RawPeer(two if several else one) as second:
            promises = [first.session.request(Ping(index)) for index in range(3)]
            promises.append(second.session.request(Ping(3)))

            @first.session.on_message
            def fail(note: Note) -> None:
                raise LookupError(note.text)

            first.write(
                reply_bytes(promises[1].id, Pong()), framed(Note("a")), reply_bytes(promises[0].id, Pong()),
                framed(Note("b")),
            )  # fmt: skip
            iterator = as_completed(promises, 20)
            got: List[Any] = []
            for _ in range(4):
                try:
                    got.append(next(iterator))
                except LookupError as exc:
                    got.append(str(exc))
            if not several:
                assert got == [promises[1], "a", promises[0], "b"]
            assert [item for item in got if isinstance(item, str)] == ["a", "b"]
            assert [item for item in got if not isinstance(item, str)] == [promises[1], promises[0]]
            first.write(reply_bytes(promises[2].id, Pong()))
            assert next(iterator) is promises[2]
            second.write(reply_bytes(promises[3].id, Pong()))
            assert list(iterator) == [promises[3]]
            with pytest.raises(StopIteration):
                next(iterator)


def test_an_error_whose_text_is_not_utf8_can_be_printed() -> None:
    php = IpcPeer(PhpMessageSerializer(), timeout=20)
    with php:
        a, b = php.create_session_pair()
        b.on_request(lambda request: ErrorMessage("bad \udcff bytes"))
        with pytest.raises(RemoteError, match=r"bad \\xff bytes") as caught:
            a.request(LogMessage("x")).wait()
        str(caught.value).encode()


def test_a_wait_also_settles_the_replies_behind_its_own_but_runs_no_handler(raw: RawPeer) -> None:
    session = raw.session
    seen: List[Any] = []
    session.on_message(seen.append)
    session.on_request(seen.append)
    first, second, third, fourth = [session.request(Ping()) for _ in range(4)]
    raw.write(reply_bytes(first.id, Pong(1)), reply_bytes(second.id, Pong(2)))
    raw.write(framed(Note("between")), reply_bytes(third.id, Pong(3)))
    raw.write(request_bytes("7", Ping()), reply_bytes(fourth.id, Pong(4)))
    assert first.wait() == Pong(1)
    assert (is_settled(second), is_settled(third), seen) == (True, False, [])
    assert third.wait() == Pong(3)
    assert (is_settled(fourth), seen) == (False, [Note("between")])
    assert fourth.wait() == Pong(4)
    assert seen == [Note("between"), Ping()]


def test_a_wait_does_not_settle_all_of_a_flood_of_replies_first(raw: RawPeer) -> None:
    promises = [raw.session.request(Ping()) for _ in range(300)]
    raw.write(*[reply_bytes(promise.id, Pong(1)) for promise in promises])
    promises[0].wait()
    assert 1 < sum(is_settled(promise) for promise in promises) < 200
    promises[-1].wait()
    assert all(is_settled(promise) for promise in promises)


def test_dropping_many_promises_takes_as_long_for_each(raw: RawPeer) -> None:
    def seconds(count: int) -> float:
        promises = collections.deque(raw.session.request(Ping(1), timeout=None) for _ in range(count))
        start = time.process_time()
        while promises:
            promises.popleft()
        assert no_pending(raw.session)
        return time.process_time() - start

    with raw.session.batch():
        # 10 if linear, 100 if quadratic.
        assert min(seconds(3000) for _ in range(3)) < 40 * min(seconds(300) for _ in range(3))


# -- what iterators leave


def observers_of(session: Any) -> int:
    return len(session._conversation.requests.observers)


def test_iterators_leave_nothing_behind(raw: RawPeer) -> None:
    promises = [raw.session.request(Ping(index)) for index in range(4)]
    never_begun = as_completed(promises)
    assert observers_of(raw.session) == 0
    raw.write(reply_bytes(promises[2].id, Pong()))
    first = as_completed(promises)
    assert next(first) is promises[2] and observers_of(raw.session) == 1
    second = as_completed(promises)
    assert next(second) is promises[2] and observers_of(raw.session) == 1  # it was there: nothing to be told of
    del first
    assert observers_of(raw.session) == 0
    timed_out = as_completed(promises, 0.01)
    with pytest.raises(TimeoutError, match="3 of 4"):
        for _ in range(4):
            next(timed_out)
    assert observers_of(raw.session) == 0
    raw.write(*[reply_bytes(promises[index].id, Pong()) for index in (3, 0, 1)])
    assert list(second) == [promises[index] for index in (3, 0, 1)] and observers_of(raw.session) == 0
    assert list(never_begun) == [promises[index] for index in (2, 3, 0, 1)]  # settled since the call: in that order
    assert list(timed_out) == [promises[index] for index in (3, 0, 1)]
    with pytest.raises(TimeoutError):
        gather([raw.session.request(Ping())], 0.01)
    assert observers_of(raw.session) == 0
    assert all(promise._pending.watchers is None for promise in promises)


@pytest.mark.parametrize("wait", [lambda promises: list(as_completed(promises)), lambda promises: gather(promises)])
def test_a_handler_that_raises_stop_iteration_ends_no_iterator(peer: IpcPeer, wait: Callable[[Any], Any]) -> None:
    a, b = echo_pair(peer)
    a.on_message(lambda note: next(iter(())))
    b.notify(Note())
    with pytest.raises((RuntimeError, StopIteration)):
        wait([a.request(Ping(index)) for index in range(3)])


def test_next_in_a_loop_costs_little_for_each(peer: IpcPeer) -> None:
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.endswith("promise.py")

    a, _ = echo_pair(peer)
    running = {a.request(Ping(index)) for index in range(300)}
    sys.setprofile(count)
    try:
        while running:
            running.discard(next(as_completed(running)))
    finally:
        sys.setprofile(None)
    assert calls < 300 * 30


def test_gather_returns_exceptions(raw: RawPeer) -> None:
    promises = [raw.session.request(Ping(index), timeout=0.05 if index == 2 else 20) for index in range(4)]
    promises[3].cancel()
    raw.write(reply_bytes(promises[1].id, ErrorMessage("no")), reply_bytes(promises[0].id, Pong()))
    found = gather(promises, return_exceptions=True)
    assert [type(item) for item in found] == [Pong, RemoteError, RequestTimeoutError, IpcError]
    with pytest.raises(TimeoutError):
        gather([raw.session.request(Ping())], 0.01, return_exceptions=True)


def test_callbacks_that_take_from_the_iterator_that_is_waited_for(raw: RawPeer) -> None:
    promises = [raw.session.request(Ping(index)) for index in range(5)]
    iterator = as_completed(promises, 20)
    taken: List[Any] = []
    for promise in promises:
        promise.add_done_callback(lambda promise: taken.append(next(iterator)))
    raw.write(*[reply_bytes(promise.id, Pong()) for promise in promises])
    assert sorted([*iterator, *taken], key=promises.index) == promises
    assert taken and next(iterator, None) is None


def test_what_a_signal_handler_raises_inside_of_a_done_callback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    # As it is inside of an on_close handler: the callback may have set the alarm itself.
    def alarm(*_: Any) -> None:
        raise LookupError("alarm")

    def call_back(promise: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("the signal did not come")

    old = signal.signal(signal.SIGUSR1, alarm)
    try:
        with IpcPeer(timeout=20) as peer:
            a, b = peer.create_session_pair()
            b.on_request(lambda ping: Pong())
            promise = a.request(Ping())
            promise.add_done_callback(call_back)
            assert promise.wait() == Pong()
            tick_until(lambda: caplog.records, peer)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [LookupError]


def test_a_done_callback_that_comes_at_any_place_while_the_reply_settles_is_called(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    for number in itertools.count(1):
        promise = a.request(Ping(number))
        called: List[Any] = []
        with CallAt(number, lambda *_, promise=promise, called=called: promise.add_done_callback(called.append)) as at:
            assert promise.wait() == Pong(number)
        peer.tick(0)
        assert called == [promise] * at.hit, at.where
        if not at.hit:
            break
    assert number > 30


def test_a_done_callback_that_comes_as_the_moment_of_a_reply_is_taken_is_called(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A function in C, at whose return a signal is looked at; no profile function is told of it.
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    real = requests.next_moment
    called: List[Any] = []

    def moment() -> int:
        monkeypatch.setattr(requests, "next_moment", real)
        promise.add_done_callback(called.append)
        return real()

    promise = a.request(Ping(1))
    monkeypatch.setattr(requests, "next_moment", moment)
    assert promise.wait() == Pong(1)
    peer.tick(0)
    assert called == [promise]
