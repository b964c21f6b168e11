"""Session: requests, notifications, handlers, order, the end of a session."""

import gc
import inspect
import logging
import os
import socket
import struct
import typing
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, List, Union

import pytest

from stream_ipc import (
    ErrorMessage,
    FrameTooLargeError,
    InvalidStreamError,
    IpcPeer,
    LogMessage,
    Message,
    PickleMessageSerializer,
    RemoteError,
    RequestEnvelope,
    RequestTimeoutError,
    ResponseEnvelope,
    SerializationError,
    Session,
    StreamClosedError,
    UnexpectedReplyError,
)
from tests.helpers import (
    MAGIC,
    WAIT,
    CpuMeter,
    FakeClock,
    RawPeer,
    frame,
    framed,
    is_settled,
    no_pending,
    reply_bytes,
    request_bytes,
    set_clock,
    set_limit,
    tick_until,
    unframe,
    values,
)
from tests.messages import Note, Ping, Pong

# -- requests and replies


def test_request_and_reply(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value * 2))
    assert a.request(Ping(21), expect=Pong).wait().value == 42
    a.on_request(lambda ping: Pong(ping.value + 1))
    assert b.request(Ping(1), expect=Pong).wait().value == 2


def test_notify_reaches_every_handler_once_and_in_order(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    seen: List[Any] = []
    b.on_message(lambda note: seen.append(("first", note.text)))
    b.on_message(lambda note, session: seen.append(("second", note.text, session is b)))
    a.notify(Note("x"))
    a.notify(Note("y"))
    tick_until(lambda: len(seen) >= 4, peer)
    assert seen == [("first", "x"), ("second", "x", True), ("first", "y"), ("second", "y", True)]


def test_hundred_requests_answered_in_any_order_find_their_promises(raw: RawPeer) -> None:
    promises = [raw.session.request(Ping(i), expect=Pong) for i in range(100)]
    assert len({promise.id for promise in promises}) == 100
    asked = raw.messages()
    order = sorted(asked, key=lambda envelope: envelope.request.value * 37 % 101)  # type: ignore[attr-defined]
    for envelope in order:
        raw.write(reply_bytes(envelope.id, Pong(envelope.request.value)))  # type: ignore[attr-defined]
    assert [promise.wait().value for promise in promises] == list(range(100))


def test_reply_of_another_class_is_an_error_that_is_a_type_error_too(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Note("no pong"))
    promise = a.request(Ping(1), expect=Pong)
    with pytest.raises(UnexpectedReplyError, match="Note.*Pong") as caught:
        promise.wait()
    assert isinstance(caught.value, TypeError)
    assert caught.value.reply == Note("no pong")
    assert a.is_open and b.is_open


def test_subclass_of_what_is_expected_is_welcome(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(1))
    assert a.request(Ping(1), expect=Message).wait() == Pong(1)
    assert a.request(Ping(1)).wait() == Pong(1)


@pytest.mark.parametrize("call", ["request", "notify"])
@pytest.mark.parametrize("what", [None, "text", 1, object(), Ping])
def test_what_is_no_message_is_refused(peer: IpcPeer, call: str, what: Any) -> None:
    a, b = peer.create_session_pair()
    with pytest.raises(TypeError, match="Message"):
        getattr(a, call)(what)
    assert a.queued_bytes == 0 and no_pending(a, b)


def test_first_handler_that_returns_a_message_answers(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    asked: List[str] = []
    b.on_request(lambda ping: asked.append("one"))

    @b.on_request
    def two(ping: Ping) -> Pong:
        asked.append("two")
        return Pong("two")

    @b.on_request
    def three(ping: Ping) -> Pong:
        asked.append("three")
        return Pong("three")

    assert a.request(Ping(), expect=Pong).wait().value == "two"
    assert asked == ["one", "two"]


def test_nobody_answers(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    with pytest.raises(RemoteError, match="^Unhandled request: .*Ping"):
        a.request(Ping(), timeout=None).wait()
    b.on_request(lambda ping: None)
    with pytest.raises(RemoteError, match="^Unhandled request: .*Ping"):
        a.request(Ping(), timeout=None).wait()


def test_handler_that_raises_becomes_the_requesters_error_with_traceback(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()

    @b.on_request
    def fails(ping: Ping) -> Pong:
        raise LookupError("no such thing")

    b.on_request(lambda ping: Pong("must not be asked"))
    with pytest.raises(RemoteError) as caught:
        a.request(Ping()).wait()
    text = str(caught.value)
    assert "LookupError: no such thing" in text and "Traceback" in text and "in fails" in text
    b.off_request(fails)
    assert a.request(Ping(), expect=Pong).wait().value == "must not be asked"  # the session lives on


@pytest.mark.parametrize("result", [1, "text", True, Pong, object()])
def test_handler_that_returns_no_message_is_an_error_of_the_request(raw: RawPeer, result: Any) -> None:
    raw.session.on_request(lambda ping: result)
    raw.write(request_bytes("1", Ping()))
    tick_until(lambda: raw.session.tick(), raw.session)
    (reply,) = raw.messages()
    assert isinstance(reply, ResponseEnvelope) and isinstance(reply.response, ErrorMessage)
    assert "must return" in str(reply.response)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["answers", "raises", "passes", "nobody", "wrong", "unserializable", "too large"])
def test_exactly_one_reply_per_request(kind: str) -> None:
    with IpcPeer(max_frame_size=10000) as peer, RawPeer(peer) as raw:

        def handler(ping: Ping) -> Any:
            if kind == "raises":
                raise ValueError("x" * 20000)  # the text alone is over the limit
            return {
                "answers": Pong(1),
                "passes": None,
                "wrong": 5,
                "unserializable": Pong(lambda: 0),
                "too large": Pong(b"x" * 20000),
            }[kind]

        if kind != "nobody":
            raw.session.on_request(handler)
        raw.write(request_bytes("a", Ping()), request_bytes("b", Ping()))
        tick_until(lambda: no_pending(raw.session) and raw.session.tick() == 0, raw.session)
        replies = raw.messages()
        assert [reply.id for reply in replies] == ["a", "b"]  # type: ignore[attr-defined]
        for reply in replies:
            assert isinstance(reply, ResponseEnvelope)
            assert isinstance(reply.response, Pong if kind == "answers" else ErrorMessage)
            if kind == "too large":
                assert "10000" in str(reply.response)
        assert raw.session.is_open


def test_oversized_reply_reaches_the_requester_as_an_error(peer: IpcPeer) -> None:
    with IpcPeer(max_frame_size=5000) as small:
        left, right = socket.socketpair()
        a, b = peer.create_socket_session(left), small.create_socket_session(right)

        @b.on_request
        def answer(ping: Ping) -> Pong:
            return Pong(b"x" * ping.value)

        promise = a.request(Ping(6000))
        tick_until(lambda: promise.done, peer, small)
        with pytest.raises(RemoteError, match="6[0-9]{3} bytes.*5000"):
            promise.wait()
        promise = a.request(Ping(100))
        tick_until(lambda: promise.done, peer, small)
        assert promise.wait() == Pong(b"x" * 100)


def test_each_reply_leaves_before_the_next_handler_runs(raw: RawPeer) -> None:
    there: List[List[Any]] = []

    @raw.session.on_request
    def answer(ping: Ping) -> Pong:
        there.append([m.id for m in raw.messages()])  # type: ignore[attr-defined]
        return Pong(ping.value)

    raw.write(*(request_bytes(str(i), Ping(i)) for i in range(4)))
    tick_until(lambda: len(there) == 4, raw.session)
    assert there == [[], ["0"], ["1"], ["2"]]


def test_progress_comes_before_its_result(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    seen: List[str] = []
    a.on_message(lambda note: seen.append(note.text))

    @b.on_request
    def work(ping: Ping) -> Pong:
        for text in ("10%", "50%", "100%"):
            b.notify(Note(text))
        return Pong("result")

    promise = a.request(Ping(), expect=Pong)
    seen.append(promise.wait().value)
    assert seen == ["10%", "50%", "100%", "result"]


def test_messages_behind_a_reply_stay_in_order_with_it(raw: RawPeer) -> None:
    seen: List[Any] = []
    raw.session.on_message(lambda note: seen.append((note.text, first.done, second.done)))
    first: Any = raw.session.request(Ping())
    second: Any = raw.session.request(Ping())
    raw.write(
        framed(Note("1")), reply_bytes(first.id, Pong()), framed(Note("2")), reply_bytes(second.id, Pong()),
        framed(Note("3")),
    )  # fmt: skip
    tick_until(lambda: len(seen) == 3, raw.session)
    assert seen == [("1", False, False), ("2", True, False), ("3", True, True)]


def test_unknown_late_and_duplicate_replies_are_discarded_and_never_answered(raw: RawPeer) -> None:
    promise = raw.session.request(Ping(), expect=Pong)
    cancelled = raw.session.request(Ping())
    cancelled.cancel()
    raw.read()
    raw.write(
        reply_bytes("unknown", Pong(0)), reply_bytes(cancelled.id, Pong(0)), reply_bytes(promise.id, Pong(1)),
        reply_bytes(promise.id, Pong(2)), reply_bytes("", ErrorMessage("no")), framed(Note("end")),
    )  # fmt: skip
    assert raw.session.receive(20) == Note("end")
    assert promise.wait() == Pong(1)
    assert raw.read() == b"" and no_pending(raw.session)


def test_reply_that_is_there_at_once_finds_its_promise(raw: RawPeer) -> None:
    # The other side may even guess the id: the entry exists before the request leaves.
    first = raw.session.request(Ping())
    prefix, number = first.id.rsplit(".", 1)
    raw.write(reply_bytes(f"{prefix}.{int(number) + 1}", Pong("early")))
    assert raw.session.request(Ping(), expect=Pong).wait(20).value == "early"


# -- ids


class Ids:
    def __init__(self, *ids: Any) -> None:
        self.ids = list(ids)

    def generate(self) -> Any:
        return self.ids.pop(0)


def test_repeated_id_is_refused_while_it_is_pending() -> None:
    with IpcPeer(id_generator=Ids("x", "x", "x")) as peer:
        a, b = peer.create_session_pair()
        b.on_request(lambda ping: Pong(ping.value))
        first = a.request(Ping(1), expect=Pong)
        with pytest.raises(ValueError, match="'x'"):
            a.request(Ping(2))
        assert first.wait().value == 1
        assert a.request(Ping(3), expect=Pong).wait().value == 3


@pytest.mark.parametrize("id", [None, 5, b"x", ["x"], "x" * 129])
def test_id_that_is_no_short_text_is_refused(id: Any) -> None:
    with IpcPeer(id_generator=Ids(id)) as peer:
        a, b = peer.create_session_pair()
        with pytest.raises(ValueError, match="Ids"):
            a.request(Ping())
        assert a.queued_bytes == 0 and no_pending(a)
        assert peer.tick() == 0


def test_id_generator_that_raises_leaves_nothing() -> None:
    with IpcPeer(id_generator=Ids()) as peer, RawPeer(peer) as raw:
        with pytest.raises(IndexError):
            raw.session.request(Ping())
        assert raw.read() == b"" and no_pending(raw.session)


# -- timeouts


@pytest.mark.parametrize("bad", [-1, -0.001, float("nan")])
def test_negative_timeouts_are_refused_everywhere(peer: IpcPeer, bad: float) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong())
    promise = a.request(Ping())
    calls: List[Any] = [
        lambda: a.request(Ping(), timeout=bad),
        lambda: promise.wait(bad),
        lambda: a.tick(bad),
        lambda: a.flush(bad),
        lambda: a.receive(bad),
        lambda: peer.tick(bad),
        lambda: peer.tick_for(bad),
        lambda: IpcPeer(timeout=bad),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()
    assert no_pending(b) and promise.wait() == Pong()


@pytest.mark.parametrize("bad", ["1", True, False, [1]])
def test_timeouts_that_are_no_numbers_are_refused(peer: IpcPeer, bad: Any) -> None:
    a, _ = peer.create_session_pair()
    for call in (lambda: a.request(Ping(), timeout=bad), lambda: a.tick(bad), lambda: peer.tick(bad)):
        with pytest.raises(TypeError, match="timeout must be a number of seconds or None, not"):
            call()
    with pytest.raises(TypeError, match="^seconds must be a number of seconds, not"):
        peer.tick_for(bad)
    assert no_pending(a)


def test_a_class_in_place_of_a_timeout_is_told_where_it_belongs(peer: IpcPeer) -> None:
    wrong: Any = Pong
    session = peer.create_session_pair()[0]
    for call in (session.receive, partial(session.request, Ping())):
        with pytest.raises(TypeError, match="timeout must be a number of seconds or None, not .*; .* expect=Pong$"):
            call(wrong)


@pytest.mark.parametrize("method", ["on_message", "on_request", "on_exception"])
def test_a_class_beside_a_handler_is_told_where_it_belongs(peer: IpcPeer, method: str) -> None:
    register: Any = getattr(peer.create_session_pair()[0], method)
    for arguments in ((Ping, print), (print, Ping)):
        with pytest.raises(TypeError, match=rf"^{method}\(\) takes a handler and nothing else; .* annotation"):
            register(*arguments)
    assert register(handler=print) is print


def test_python_itself_names_no_class_that_nobody_knows(peer: IpcPeer) -> None:
    objects: Any = (peer, peer.create_session_pair()[0])
    for one in objects:
        for name, method in inspect.getmembers(type(one), inspect.isfunction):
            if name.startswith("_"):
                continue
            with pytest.raises(TypeError) as caught:
                method(one, *range(20))
            assert str(caught.value).startswith((f"{type(one).__name__}.{name}()", f"{name}() takes a handler"))


def test_tick_for_names_its_argument(peer: IpcPeer) -> None:
    wrong: Any
    for wrong, error, text in (
        (None, TypeError, "seconds must be a number of seconds, not None"),
        (-1, ValueError, "seconds must be 0 seconds or more, not -1"),
        (10**400, ValueError, "seconds is a number of seconds beyond all floats"),
    ):
        with pytest.raises(error) as caught:
            peer.tick_for(wrong)
        assert str(caught.value) == text


def test_request_times_out_at_the_peers_default() -> None:
    with IpcPeer(timeout=7) as peer, RawPeer(peer) as raw:
        clock = set_clock(peer, FakeClock())
        promise = raw.session.request(Ping())
        clock.now += 6.9
        with pytest.raises(TimeoutError) as early:
            promise.wait(0)
        assert not isinstance(early.value, RequestTimeoutError)
        assert not promise.done
        clock.now += 0.2
        with pytest.raises(RequestTimeoutError) as caught:
            promise.wait()
        assert isinstance(caught.value, TimeoutError) and caught.value.timeout == 7
        assert no_pending(raw.session) and raw.session.is_open


def test_own_timeout_and_no_timeout() -> None:
    with IpcPeer(timeout=7) as peer, RawPeer(peer) as raw:
        clock = set_clock(peer, FakeClock())
        short = raw.session.request(Ping(), timeout=1)
        endless = raw.session.request(Ping(), timeout=None, expect=Pong)
        clock.now += 2
        with pytest.raises(RequestTimeoutError):
            short.wait()
        clock.now += 1e9
        assert not endless.done
        raw.write(reply_bytes(short.id, Pong("late")), reply_bytes(endless.id, Pong("there")))
        assert endless.wait().value == "there"
        with pytest.raises(RequestTimeoutError):
            short.wait()


def test_timeouts_do_not_look_at_the_wall_clock(raw: RawPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> float:
        raise AssertionError("the wall clock was read")

    monkeypatch.setattr("time.time", refuse)
    with pytest.raises(RequestTimeoutError):
        raw.session.request(Ping(), timeout=0.05).wait()
    raw.session.tick(0.01)


def test_timeout_is_real_time_in_all_and_is_not_extended_by_traffic(raw: RawPeer) -> None:
    raw.write(framed(Note()))
    raw.session.on_message(lambda note: raw.write(framed(Note())))  # so there is always something
    with CpuMeter() as meter, pytest.raises(RequestTimeoutError):
        raw.session.request(Ping(), timeout=WAIT).wait()
    assert WAIT <= meter.real < 5
    with CpuMeter() as meter, pytest.raises(TimeoutError):
        raw.session.request(Ping()).wait(WAIT)
    assert WAIT <= meter.real < 5


@pytest.mark.parametrize("timeout", [1e-9, 0.0004, 3e6, 1e300, float("inf")])
def test_tiny_and_huge_timeouts(peer: IpcPeer, timeout: float) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong())
    b.notify(Note())
    assert a.receive(20) == Note()
    promise = a.request(Ping(), timeout=timeout)
    if timeout > 1:
        assert promise.wait(timeout) == Pong()
    else:
        # One look at what is there already is promised, no more.
        with CpuMeter() as meter:
            try:
                promise.wait()
            except RequestTimeoutError:
                pass
        assert meter.real < 5


# -- receive


def test_receive_returns_notifications_one_by_one(raw: RawPeer) -> None:
    seen: List[str] = []
    raw.session.on_message(lambda note: seen.append(note.text))
    raw.session.on_request(lambda ping: Pong())
    raw.write(framed(Note("1")), request_bytes("9", Ping()), framed(Note("2")), framed(Note("3")))
    assert values([raw.session.receive(20) for _ in range(3)]) == ["1", "2", "3"]
    assert seen == ["1", "2", "3"]
    assert len(raw.messages()) == 1
    with pytest.raises(TimeoutError) as caught:
        raw.session.receive(0)
    assert not isinstance(caught.value, RequestTimeoutError)


def test_receive_at_the_end_returns_what_had_arrived_first(raw: RawPeer) -> None:
    raw.write(framed(Note("1")), framed(Note("2")))
    raw.sock.close()
    assert values([raw.session.receive() for _ in range(2)]) == ["1", "2"]
    with pytest.raises(StreamClosedError):
        raw.session.receive()
    with pytest.raises(StreamClosedError):
        raw.session.receive()


def test_receive_while_a_handler_raises_loses_nothing(raw: RawPeer) -> None:
    @raw.session.on_message
    def fails(note: Note) -> None:
        if note.text == "1":
            raise LookupError(note.text)

    raw.write(framed(Note("1")), framed(Note("2")))
    with pytest.raises(LookupError):
        raw.session.receive(20)
    assert values([raw.session.receive(20) for _ in range(2)]) == ["1", "2"]


def test_receive_inside_a_handler(raw: RawPeer) -> None:
    got: List[str] = []

    @raw.session.on_request
    def conversation(ping: Ping) -> Pong:
        got.extend(values([raw.session.receive(20), raw.session.receive(20)]))
        return Pong(got)

    raw.write(request_bytes("1", Ping()), framed(Note("a")), framed(Note("b")))
    tick_until(lambda: len(got) == 2, raw.session)
    assert got == ["a", "b"]


# -- errors of handlers


def test_on_message_error_comes_out_of_the_tick_and_nothing_is_lost(raw: RawPeer) -> None:
    seen: List[str] = []

    @raw.session.on_message
    def fails(note: Note) -> None:
        if note.text == "1":
            raise LookupError("from the handler")

    raw.session.on_message(lambda note: seen.append(note.text))
    raw.write(framed(Note("1")), framed(Note("2")), framed(Note("3")))
    with pytest.raises(LookupError, match="from the handler"):
        while True:
            raw.session.tick(20)
    assert seen == ["1"]  # the message's other handlers still run
    tick_until(lambda: len(seen) == 3, raw.session)
    assert seen == ["1", "2", "3"]


def test_on_message_error_comes_out_of_a_wait_for_something_else(raw: RawPeer) -> None:
    @raw.session.on_message
    def fails(note: Note) -> None:
        raise LookupError(note.text)

    promise = raw.session.request(Ping(), expect=Pong)
    raw.write(framed(Note("1")), framed(Note("2")), reply_bytes(promise.id, Pong("there")))
    for text in ("1", "2"):
        with pytest.raises(LookupError, match=text):
            promise.wait()
        assert not promise.done
    assert promise.wait().value == "there"


def test_error_in_one_session_loses_nothing_of_another(peer: IpcPeer) -> None:
    with RawPeer(peer) as one, RawPeer(peer) as two:
        seen: List[str] = []

        @one.session.on_message
        def fails(note: Note) -> None:
            raise LookupError(note.text)

        two.session.on_message(lambda note: seen.append(note.text))
        for raw in (one, two):
            raw.write(framed(Note("1")), framed(Note("2")))
        errors = 0
        while errors < 2 or len(seen) < 2:
            try:
                peer.tick(5)
            except LookupError:
                errors += 1
        assert seen == ["1", "2"] and errors == 2


# -- nesting


def test_reply_behind_a_notification_in_the_same_read(raw: RawPeer) -> None:
    # What the handler of the first waits for was read together with it.
    results: List[Any] = []
    ready: List[Any] = []

    @raw.session.on_message
    def ask(note: Note) -> None:
        results.append(ready[0].wait(20))

    ready.append(raw.session.request(Ping(), expect=Pong))
    raw.write(framed(Note()), reply_bytes(ready[0].id, Pong("there")))
    tick_until(lambda: results, raw.session)
    assert results == [Pong("there")]


def test_requests_back_and_forth_are_nested_in_each_other(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()

    def handler(ping: Ping, session: Session) -> Pong:
        if ping.value == 0:
            return Pong(0)
        return Pong(session.request(Ping(ping.value - 1), expect=Pong).wait().value + 1)

    a.on_request(handler)
    b.on_request(handler)
    assert a.request(Ping(25), expect=Pong).wait().value == 25


def test_outer_reply_that_comes_first_waits_for_the_inner_one(raw: RawPeer) -> None:
    order: List[str] = []
    outer = raw.session.request(Ping(), expect=Pong)

    @raw.session.on_message
    def handler(note: Note) -> None:
        inner = raw.session.request(Ping(), expect=Pong)
        raw.write(reply_bytes(outer.id, Pong("outer")), framed(LogMessage("x")), reply_bytes(inner.id, Pong("inner")))
        order.append(inner.wait().value)

    raw.write(framed(Note()))
    order.append(outer.wait().value)
    assert order == ["inner", "outer"]


def test_ticks_inside_handlers(raw: RawPeer) -> None:
    order: List[str] = []

    @raw.session.on_message
    def handler(note: Note) -> None:
        order.append("begin " + note.text)
        raw.session.tick()
        order.append("end " + note.text)

    raw.write(framed(Note("1")), framed(Note("2")), framed(Note("3")))
    tick_until(lambda: len(order) == 6, raw.session)
    assert [entry for entry in order if entry.startswith("begin")] == ["begin 1", "begin 2", "begin 3"]


# -- registering handlers


def test_handlers_are_for_the_class_of_their_annotation(raw: RawPeer) -> None:
    seen: List[Any] = []

    @raw.session.on_message
    def notes(note: Note) -> None:
        seen.append(("Note", note))

    @raw.session.on_message
    def either(message: Union[Note, Ping]) -> None:
        seen.append(("Union", message))

    @raw.session.on_message
    def quoted(message: "Ping") -> None:
        seen.append(("quoted", message))

    @raw.session.on_message
    def anything(message: Message) -> None:
        seen.append(("Message", message))

    @raw.session.on_message
    def unannotated(message):  # type: ignore[no-untyped-def]
        seen.append(("any", message))

    @raw.session.on_message
    def optional(message: Any, session: Session) -> None:
        seen.append(("Any", message))

    raw.write(framed(Note()), framed(Ping()), framed(Pong()))
    tick_until(lambda: len(seen) >= 13, raw.session)
    assert [name for name, message in seen if message == Note()] == ["Note", "Union", "Message", "any", "Any"]
    assert [name for name, message in seen if message == Ping()] == ["Union", "quoted", "Message", "any", "Any"]
    assert [name for name, message in seen if message == Pong()] == ["Message", "any", "Any"]


def test_class_local_to_the_registering_function_and_a_method(raw: RawPeer) -> None:
    seen: List[Any] = []

    class Local(Note, wire_name="tests.local"):
        pass

    class Receiver:
        def got(self, message: "Local") -> None:
            seen.append(message)

    receiver = Receiver()
    raw.session.on_message(receiver.got)
    raw.write(framed(Note()), framed(Local("x")))
    tick_until(lambda: seen, raw.session)
    assert [type(message) for message in seen] == [Local]
    raw.session.off_message(receiver.got)


@pytest.mark.parametrize("event", ["on_message", "on_request", "on_exception"])
def test_annotation_that_cannot_be_resolved_is_an_error_at_registration(raw: RawPeer, event: str) -> None:
    def unknown(message: "NoSuchClass") -> None:  # type: ignore[name-defined] # noqa: F821
        pass

    def no_class(message: 5) -> None:  # type: ignore[valid-type]
        pass

    def list_of(message: List[Note]) -> None:
        pass

    for handler in (unknown, no_class, list_of):
        with pytest.raises(TypeError, match=handler.__name__):
            getattr(raw.session, event)(handler)


@pytest.mark.parametrize(
    "handler", [None, 5, "text", lambda: None, lambda a, b, c: None, lambda *, a: None, lambda a, *, b: None]
)
def test_what_cannot_be_called_with_a_message_is_refused(raw: RawPeer, handler: Any) -> None:
    for event in ("on_message", "on_request", "on_exception", "on_close"):
        with pytest.raises(TypeError):
            getattr(raw.session, event)(handler)


def test_registering_returns_the_handler_and_unregistering_needs_it(raw: RawPeer) -> None:
    def handler(message: Any) -> None:
        pass

    for event in ("message", "request", "exception", "close"):
        assert getattr(raw.session, "on_" + event)(handler) is handler
        getattr(raw.session, "off_" + event)(handler)
        with pytest.raises(ValueError):
            getattr(raw.session, "off_" + event)(handler)


def test_callables_of_all_kinds(raw: RawPeer) -> None:
    import functools

    seen: List[Any] = []

    class Callable_:
        def __call__(self, message: Note) -> None:
            seen.append("object")

    def both(extra: str, message: Message, session: Session) -> None:
        seen.append(extra)

    raw.session.on_message(Callable_())
    raw.session.on_message(functools.partial(both, "partial"))
    raw.session.on_message(lambda *args: seen.append(len(args)))
    raw.session.on_message(lambda message, level=3: seen.append(level))
    raw.session.on_message(seen.append)
    raw.write(framed(Note()))
    tick_until(lambda: Note() in seen, raw.session)
    assert seen == ["object", "partial", 2, 3, Note()]


def test_handlers_that_change_while_a_message_is_dispatched(raw: RawPeer) -> None:
    seen: List[str] = []

    def removed(note: Note) -> None:
        seen.append("removed " + note.text)

    def added(note: Note) -> None:
        seen.append("added " + note.text)

    @raw.session.on_message
    def changes(note: Note) -> None:
        seen.append("changes " + note.text)
        if note.text == "1":
            raw.session.off_message(removed)
            raw.session.on_message(added)
            raw.session.off_message(changes)

    raw.session.on_message(removed)
    raw.session.on_message(lambda note: seen.append("last " + note.text))
    raw.write(framed(Note("1")), framed(Note("2")))
    tick_until(lambda: "added 2" in seen, raw.session)
    assert seen == ["changes 1", "last 1", "last 2", "added 2"]


def test_request_handlers_that_are_removed_meanwhile_are_not_asked(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()

    @b.on_request
    def first(ping: Ping) -> None:
        b.off_request(second)

    def second(ping: Ping) -> Pong:
        return Pong("must not be asked")

    b.on_request(second)
    b.on_request(lambda ping: Pong("third"))
    assert a.request(Ping(), expect=Pong).wait().value == "third"


# -- the end


def test_everything_that_had_arrived_is_dispatched_before_the_end(raw: RawPeer) -> None:
    log: List[Any] = []
    promise = raw.session.request(Ping(), expect=Pong)
    lost = raw.session.request(Ping())
    raw.session.on_message(lambda note: log.append((note.text, raw.session.is_open)))
    raw.session.on_close(lambda session: log.append(("close", session.is_open, lost.done)))
    raw.write(framed(Note("1")), reply_bytes(promise.id, Pong("reply")), framed(Note("2")))
    raw.sock.close()
    with pytest.raises(StreamClosedError):
        lost.wait()
    assert promise.wait().value == "reply"
    assert log == [("1", True), ("2", True), ("close", False, True)]
    assert raw.session not in raw.session.peer.sessions


def test_pending_requests_fail_at_the_end_with_who_closed(raw: RawPeer) -> None:
    promise = raw.session.request(Ping(), timeout=None)
    raw.read()
    raw.sock.close()
    with CpuMeter() as meter, pytest.raises(StreamClosedError, match="other side") as caught:
        promise.wait()
    assert isinstance(caught.value, ConnectionError) and meter.real < 5
    mine = raw.session.peer.create_session_pair()[0]
    promise = mine.request(Ping())
    mine.close()
    with pytest.raises(StreamClosedError, match="this side"):
        promise.wait()


@pytest.mark.parametrize("cut", [1, 4, 6, 8, 20])
def test_end_inside_a_frame_ends_the_session(raw: RawPeer, cut: int) -> None:
    promise = raw.session.request(Ping(), timeout=None)
    raw.write(framed(Note("whole")), framed(Note("cut"))[:cut])
    raw.sock.close()
    seen: List[Any] = []
    raw.session.on_message(seen.append)
    with CpuMeter() as meter, pytest.raises(StreamClosedError):
        promise.wait()
    assert meter.real < 5
    assert seen[0] == Note("whole") and Note("cut") not in seen


def test_partial_frame_does_not_block_a_tick(raw: RawPeer) -> None:
    data = framed(Note("x"))
    raw.write(data[:3])
    with CpuMeter() as meter:
        assert raw.session.tick() == 0
        assert raw.session.tick(0.05) == 0
    assert meter.real < 5
    raw.write(data[3:])
    assert raw.session.receive(20) == Note("x")


def test_every_byte_by_itself(raw: RawPeer) -> None:
    data = framed(Note("x")) + request_bytes("1", Ping(5))
    raw.session.on_request(lambda ping: Pong(ping.value))
    seen: List[Any] = []
    raw.session.on_message(seen.append)
    for byte in data:
        raw.write(bytes((byte,)))
        raw.session.tick()
    assert seen == [Note("x")] and raw.messages() == [ResponseEnvelope("1", Pong(5))]


def test_closing(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    closed: List[Any] = []
    a.on_close(closed.append)
    a.on_close(lambda session: closed.append(session.is_open))
    promise = a.request(Ping())
    assert a.is_open and a.peer is peer and a.process is None and a.transport is not None
    assert peer.sessions == (a, b)
    a.close()
    a.close()
    assert closed == [a, False] and not a.is_open and peer.sessions == (b,)
    assert promise.done
    calls: List[Any] = [
        lambda: a.request(Ping()),
        lambda: a.notify(Note()),
        lambda: a.tick(),
        lambda: a.tick(None),
        lambda: a.tick(5),
        lambda: a.receive(),
        lambda: a.flush(),
        lambda: promise.wait(),
    ]
    for call in calls:
        with pytest.raises(StreamClosedError, match="this side"):
            call()
    assert a.queued_bytes == 0
    repr(a), repr(promise), repr(peer)


def test_leaving_the_context_closes(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    with a as same:
        assert same is a
    assert not a.is_open
    with pytest.raises(KeyError):
        with b:
            raise KeyError
    assert not b.is_open


def test_close_flushes_what_is_queued(peer: IpcPeer) -> None:
    # The reader is the other session of the same peer: closing must keep it reading, too.
    a, b = peer.create_session_pair()
    seen: List[int] = []
    b.on_message(lambda note: seen.append(len(note.data)))
    for _ in range(3):
        a.notify(Note(data=b"x" * 300000))
    assert a.queued_bytes
    a.close()
    tick_until(lambda: not b.is_open, peer)
    assert seen == [300000] * 3


def test_close_gives_up_when_the_other_side_does_not_read(raw: RawPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("flush bound", WAIT, monkeypatch)
    raw.session.notify(Note(data=b"x" * 900000))
    assert raw.session.queued_bytes
    with CpuMeter() as meter:
        raw.session.close()
    assert meter.real < 5 and meter.cpu < 0.5
    assert not raw.session.is_open and raw.session.queued_bytes == 0


@pytest.mark.parametrize("where", ["message", "request", "reply", "close", "exception"])
def test_closing_inside_a_handler(peer: IpcPeer, where: str) -> None:
    with RawPeer(peer) as raw, RawPeer(peer) as other:
        session = raw.session
        calls: List[str] = []

        def close(*args: Any) -> None:
            calls.append(where)
            session.close()
            session.close()

        session.on_close(lambda session: calls.append("closed"))
        pending = session.request(Ping())
        if where == "message":
            session.on_message(close)
            raw.write(framed(Note()), framed(Note()))
        elif where == "request":
            session.on_request(close)
            raw.write(request_bytes("1", Ping()), request_bytes("2", Ping()))
        elif where == "reply":
            session.on_request(lambda ping: close() or Pong())  # type: ignore[func-returns-value]
            raw.write(request_bytes("1", Ping()), request_bytes("2", Ping()))
        elif where == "close":
            session.on_close(close)
            raw.sock.close()
        else:
            session.on_exception(close)
            raw.write(MAGIC + b"\xff\xff\xff\xff", framed(Note()))
        other.write(framed(Note("other")))
        seen: List[str] = []
        other.session.on_message(lambda note: seen.append(note.text))
        tick_until(lambda: seen and not session.is_open, peer)
        peer.tick()
        assert sorted(calls) == sorted(["closed", where]), calls
        assert pending.done and peer.sessions == (other.session,)


def test_closing_another_session_inside_a_handler(peer: IpcPeer) -> None:
    # Both are ready in the same turn, and whoever comes first closes the other.
    with RawPeer(peer) as one, RawPeer(peer) as two:
        seen: List[Session] = []

        def handler(note: Note, session: Session) -> None:
            seen.append(session)
            for other in (one.session, two.session):
                if other is not session:
                    other.close()

        for raw in (one, two):
            raw.session.on_message(handler)
            raw.write(framed(Note()))
        tick_until(lambda: seen, peer)
        peer.tick()
        assert len(seen) == 1 and peer.sessions == (seen[0],)


def test_reply_leaves_though_the_session_is_closed_right_behind(raw: RawPeer) -> None:
    raw.session.on_request(lambda ping: Pong("x"))
    raw.write(request_bytes("1", Ping()))
    tick_until(lambda: raw.session.tick(), raw.session)
    raw.session.close()
    assert raw.messages() == [ResponseEnvelope("1", Pong("x"))]


def test_error_in_on_close_is_logged_and_hinders_nothing(raw: RawPeer, caplog: pytest.LogCaptureFixture) -> None:
    closed: List[int] = []

    @raw.session.on_close
    def fails(session: Session) -> None:
        raise LookupError("in on_close")

    raw.session.on_close(lambda session: closed.append(1))
    promise = raw.session.request(Ping())
    with caplog.at_level(logging.WARNING, "stream_ipc"):
        raw.session.close()
    assert closed == [1] and promise.done
    assert "in on_close" in caplog.text
    assert all(record.name.startswith("stream_ipc") for record in caplog.records)


def test_other_side_that_only_stops_writing_still_gets_what_was_queued(raw: RawPeer) -> None:
    raw.session.notify(Note(data=b"x" * 700000))
    raw.sock.shutdown(socket.SHUT_WR)
    promise = raw.session.request(Ping())
    received = b""
    # The end is only seen when the session is ticked; what is queued has a second then.
    import threading

    def read() -> None:
        nonlocal received
        raw.sock.settimeout(20)
        while True:
            piece = raw.sock.recv(1 << 16)
            if not piece:
                return
            received += piece

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with pytest.raises(StreamClosedError):
            promise.wait()
    finally:
        raw.session.close()
        reader.join()
    messages = unframe(received)
    assert len(messages) == 2 and len(messages[0].data) == 700000  # type: ignore[attr-defined]


def test_send_to_a_side_that_is_gone(raw: RawPeer) -> None:
    raw.write(framed(Note("last words")))
    raw.sock.close()
    errors: List[BaseException] = []
    seen: List[str] = []
    raw.session.on_exception(errors.append)
    raw.session.on_message(lambda note: seen.append(note.text))
    with pytest.raises(StreamClosedError) as caught:
        raw.session.notify(Note())
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(StreamClosedError):
        raw.session.request(Ping())
    tick_until(lambda: not raw.session.is_open, raw.session.peer)
    assert seen == ["last words"]
    assert errors == []  # the end of a stream is no failure of it; on_close tells


def test_request_that_cannot_be_sent_leaves_nothing(raw: RawPeer) -> None:
    with pytest.raises(SerializationError):
        raw.session.request(Ping(lambda: None))
    assert no_pending(raw.session) and raw.read() == b""
    raw.sock.close()
    with pytest.raises(StreamClosedError):
        raw.session.request(Ping())
    assert "pending=0" in repr(raw.session)


def test_dropped_promises_leave_nothing(raw: RawPeer) -> None:
    ids = []
    for _ in range(2000):
        ids.append(raw.session.request(Ping()).id)
        raw.read()
    gc.collect()
    assert no_pending(raw.session)
    raw.write(reply_bytes(ids[0], Pong()), framed(Note()))
    assert raw.session.receive(20) == Note()


# -- failures of the stream


def test_announced_frame_that_is_too_large_fails_the_session_once() -> None:
    with IpcPeer(max_frame_size=1000) as peer, RawPeer(peer) as raw, RawPeer(peer) as other:
        errors: List[Any] = []
        raw.session.on_exception(lambda error, session: errors.append((error, session)))
        raw.write(framed(Note("before")), MAGIC + struct.pack(">I", 1001))
        promise = raw.session.request(Ping(), timeout=None)
        seen: List[Any] = []
        raw.session.on_message(seen.append)
        with pytest.raises(StreamClosedError) as caught:
            promise.wait()
        assert isinstance(caught.value.__cause__, FrameTooLargeError)
        ((error, session),) = errors
        assert isinstance(error, FrameTooLargeError) and (error.size, error.limit) == (1001, 1000)
        assert session is raw.session and seen == [Note("before")]
        other.write(framed(Note("unharmed")))
        assert other.session.receive(20) == Note("unharmed")


def test_oversized_frame_is_skipped_exactly_if_a_handler_keeps_the_session() -> None:
    with IpcPeer(max_frame_size=1000) as peer, RawPeer(peer) as raw:
        errors: List[Any] = []

        @raw.session.on_exception
        def keep(error: Exception) -> bool:
            errors.append(error)
            return False

        payload = framed(Note("inside"))  # would be taken for a message if its bytes were looked at
        payload += b"\xf3" * (5000 - len(payload))
        raw.write(framed(Note("1")), frame(payload), framed(Note("2")), frame(payload), framed(Note("3")))
        seen: List[Any] = []
        raw.session.on_message(seen.append)
        tick_until(lambda: Note("3") in seen, raw.session)
        assert seen == [Note("1"), Note("2"), Note("3")]
        assert [type(error) for error in errors] == [FrameTooLargeError] * 2
        assert raw.session.is_open


def test_failure_without_a_handler_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with IpcPeer(max_frame_size=1000) as peer, RawPeer(peer) as raw:
        raw.write(MAGIC + struct.pack(">I", 123456))
        with caplog.at_level(logging.WARNING, "stream_ipc"):
            tick_until(lambda: not raw.session.is_open, peer)
        assert "123456" in caplog.text and len(caplog.records) == 1


def test_error_in_on_exception_is_logged_and_the_session_closes(caplog: pytest.LogCaptureFixture) -> None:
    with IpcPeer(max_frame_size=1000) as peer, RawPeer(peer) as raw:
        calls: List[int] = []

        @raw.session.on_exception
        def fails(error: Exception) -> bool:
            calls.append(1)
            raise LookupError("in on_exception")

        raw.session.on_exception(lambda error: calls.append(2))
        raw.write(MAGIC + struct.pack(">I", 123456))
        with caplog.at_level(logging.WARNING, "stream_ipc"):
            tick_until(lambda: not raw.session.is_open, peer)
        assert calls == [1, 2] and "in on_exception" in caplog.text


def test_sending_into_a_stream_that_its_owner_closed(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("flush bound", 20.0, monkeypatch)
    left, right = socket.socketpair()
    with right:
        session = peer.create_socket_session(left)
        errors: List[Any] = []
        session.on_exception(errors.append)
        left.close()
        with pytest.raises((InvalidStreamError, StreamClosedError)):
            session.notify(Note())
        with CpuMeter() as meter:
            tick_until(lambda: not session.is_open, peer)
        assert meter.real < 10, "it was waited for output that can never leave"
        (error,) = errors
        assert isinstance(error, InvalidStreamError) and error.session is session


# -- what cannot be decoded


class Moody:
    """A serializer that fails where a message's text says so."""

    def __init__(self) -> None:
        self.real = PickleMessageSerializer()

    @staticmethod
    def _mood(message: Any) -> str:
        inner = getattr(message, "request", None) or getattr(message, "response", None) or message
        return getattr(inner, "text", "")

    def serialize(self, message: Message) -> bytes:
        if self._mood(message) == "serialize":
            raise LookupError("cannot serialize")
        if self._mood(message) == "no bytes":
            return "text"  # type: ignore[return-value]
        return self.real.serialize(message)

    def deserialize(self, payload: Any) -> Message:
        message: Any = self.real.deserialize(payload)
        if self._mood(message) == "deserialize":
            raise LookupError("cannot deserialize")
        if self._mood(message) == "with id":
            raise SerializationError(
                "cannot deserialize with id",
                request_id=message.id if hasattr(message, "request") else None,
                response_id=message.id if hasattr(message, "response") else None,
            )
        if self._mood(message) == "no message":
            return "text"  # type: ignore[return-value]
        return message  # type: ignore[no-any-return]


@pytest.mark.parametrize("text", ["serialize", "no bytes"])
def test_serializer_that_fails_to_serialize(text: str) -> None:
    with IpcPeer(Moody()) as peer:
        a, b = peer.create_session_pair()
        b.on_request(lambda ping: Note(text))
        for send in (a.notify, a.request, peer.broadcast):
            with pytest.raises(SerializationError, match="Moody"):
                send(Note(text))
        assert a.queued_bytes == 0 and no_pending(a, b)
        with pytest.raises(RemoteError, match="Moody"):
            a.request(Ping()).wait()
        assert a.is_open and b.is_open


@pytest.mark.parametrize("text", ["deserialize", "with id", "no message"])
def test_payload_that_cannot_be_decoded_arrives_as_an_error_message_in_its_place(text: str) -> None:
    with IpcPeer(Moody()) as peer:
        a, b = peer.create_session_pair()
        seen: List[Any] = []
        b.on_message(seen.append)
        for one in ("1", text, "2"):
            a.notify(Note(one))
        tick_until(lambda: Note("2") in seen, peer)
        assert seen[0] == Note("1") and seen[2] == Note("2") and isinstance(seen[1], ErrorMessage)
        assert b.is_open


def test_request_that_cannot_be_decoded_is_answered_if_its_id_is_known() -> None:
    with IpcPeer(Moody()) as peer:
        a, b = peer.create_session_pair()
        seen: List[Any] = []
        b.on_message(seen.append)
        with pytest.raises(RemoteError, match="cannot deserialize with id"):
            a.request(Note("with id"), timeout=None).wait()
        assert seen == []


def test_reply_that_cannot_be_decoded_is_the_promises_error() -> None:
    with IpcPeer(Moody()) as peer:
        a, b = peer.create_session_pair()
        b.on_request(lambda ping: Note("with id"))
        promise = a.request(Ping(), timeout=None)
        with pytest.raises(SerializationError, match="cannot deserialize with id"):
            promise.wait()
        with pytest.raises(SerializationError):
            promise.wait()
        assert no_pending(a, b) and a.is_open


def test_too_large_message_is_refused_whole_and_hurts_nothing() -> None:
    with IpcPeer(max_frame_size=1000) as peer:
        a, b = peer.create_session_pair()
        b.on_request(lambda ping: Pong(ping.value))
        for send in (a.notify, a.request):
            with pytest.raises(FrameTooLargeError) as caught:
                send(Ping(b"x" * 1001))
            assert caught.value.limit == 1000 and (caught.value.size or 0) > 1000
        assert a.queued_bytes == 0 and no_pending(a, b)
        assert a.request(Ping(1), expect=Pong).wait().value == 1


def test_empty_frames_are_one_error_each_and_no_end(raw: RawPeer) -> None:
    seen: List[Any] = []
    raw.session.on_message(seen.append)
    raw.write(frame(b"") * 100, framed(Note("end")))
    tick_until(lambda: Note("end") in seen, raw.session)
    assert len(seen) == 101 and all(isinstance(message, ErrorMessage) for message in seen[:100])


def test_junk_arrives_as_log_messages(raw: RawPeer) -> None:
    seen: List[Any] = []
    raw.session.on_message(seen.append)
    raw.write(b"Hello \xff world\n", framed(Note("1")), b"\xf3 text\n", framed(Note("2")))
    tick_until(lambda: Note("2") in seen, raw.session)
    assert [m for m in seen if isinstance(m, Note)] == [Note("1"), Note("2")]
    junk = [m for m in seen if isinstance(m, LogMessage)]
    assert all(m.level == LogMessage.LEVEL_JUNK for m in junk)
    assert "".join(m.message for m in junk) == "Hello \\xff world\n\\xf3 text\n"


# -- replies behind much output, and replies of which nothing can be made


@pytest.mark.parametrize("where", ["stream", "inbox"])
def test_reply_is_dispatched_though_much_is_queued(raw: RawPeer, where: str) -> None:
    promise = raw.session.request(Ping(), expect=Pong)
    raw.write(reply_bytes(promise.id, Pong("there")))
    raw.session.notify(Note(data=bytes(4 << 20)))  # from now on nobody reads
    if where == "inbox":
        with pytest.raises(TimeoutError):
            raw.session.flush(0.05)
        assert "inbox=1" in repr(raw.session)
    assert raw.session.queued_bytes > 2 << 20 and not promise.done
    assert promise.wait(20).value == "there"
    assert raw.session.queued_bytes > 2 << 20


@pytest.mark.parametrize("bad", ["Pong", None, Pong(1), [Pong], (Pong, Note), typing.Union[Pong, Note]])
def test_expecting_what_is_no_class_is_refused_at_once(raw: RawPeer, bad: Any) -> None:
    with pytest.raises(TypeError, match="expect") as caught:
        raw.session.request(Ping(), expect=bad)
    assert caught.value.__context__ is None  # it is said once
    assert raw.read() == b"" and no_pending(raw.session)


class Unaskable(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        raise TypeError("nobody knows")


class Quacking(Message, metaclass=Unaskable):
    """isinstance() raises a TypeError for it."""


class MuteError(ErrorMessage):
    """str() of it raises."""

    def __str__(self) -> str:
        raise LookupError("no text")


@pytest.mark.parametrize("kind", ["expected", "reply"])
def test_reply_whose_settling_raises_fails_its_promise_alone(raw: RawPeer, kind: str) -> None:
    expect: Any = Quacking if kind == "expected" else Pong
    promise = raw.session.request(Ping(), expect=expect)
    other = raw.session.request(Ping(), expect=Pong)
    reply = Pong() if kind == "expected" else MuteError("no")
    raw.write(reply_bytes(promise.id, reply), reply_bytes(other.id, Pong(2)))
    for _ in range(2):
        with pytest.raises(TypeError if kind == "expected" else LookupError):
            promise.wait(20)
    assert other.wait(20).value == 2
    assert raw.session.is_open and no_pending(raw.session)


# -- handlers that are refused, and handlers that are gone before their turn


def test_on_close_takes_no_handler_of_two_arguments(raw: RawPeer) -> None:
    with pytest.raises(TypeError, match="one argument"):
        raw.session.on_close(lambda session, reason: None)
    raw.session.close()


def test_on_close_takes_no_handler_of_what_is_no_session(raw: RawPeer) -> None:
    calls: List[str] = []

    def of_a_note(note: Note) -> None:
        calls.append("note")

    def of_a_session(session: Session) -> None:
        calls.append("session")

    def of_either(either: Union[Note, Session, None]) -> None:
        calls.append("either")

    with pytest.raises(TypeError, match=r"is another class than Session, so on_close\(\) would never call it"):
        raw.session.on_close(of_a_note)
    raw.session.on_close(of_a_session)
    raw.session.on_close(of_either)
    raw.session.close()
    assert calls == ["session", "either"]


def test_handlers_of_the_end_that_an_earlier_one_unregisters_do_not_run(raw: RawPeer) -> None:
    calls: List[str] = []

    def late_close(session: Session) -> None:
        calls.append("late close")

    def late_exception(error: Exception) -> None:
        calls.append("late exception")

    @raw.session.on_close
    def first_close(session: Session) -> None:
        calls.append("close")
        session.off_close(late_close)

    @raw.session.on_exception
    def first_exception(error: Exception, session: Session) -> None:
        calls.append("exception")
        session.off_exception(late_exception)

    raw.session.on_close(late_close)
    raw.session.on_exception(late_exception)
    raw.write(MAGIC + struct.pack(">I", 0xFFFFFFFF))  # announces more than is allowed: the stream has failed
    tick_until(lambda: not raw.session.is_open, raw.session.peer)
    assert calls == ["exception", "close"]


@pytest.mark.parametrize("event", ["on_message", "on_request"])
def test_handlers_that_could_never_work_are_refused(raw: RawPeer, event: str) -> None:
    async def coroutine(message: Message) -> None: ...

    def number(m: int) -> None: ...

    def number_in_quotes(m: "int") -> None: ...

    def nothing(m: None) -> None: ...

    for handler in (coroutine, number, number_in_quotes, nothing):
        with pytest.raises(TypeError):
            getattr(raw.session, event)(handler)
    raw.write(framed(Note()))
    assert raw.session.tick(20) == 1  # none of them was registered


@pytest.mark.parametrize("event", ["on_exception", "on_close"])
def test_coroutine_function_is_no_handler_of_the_end_either(raw: RawPeer, event: str) -> None:
    async def coroutine(what: Any) -> None: ...

    with pytest.raises(TypeError, match="coroutine"):
        getattr(raw.session, event)(coroutine)


@pytest.mark.parametrize("bad", [b"", [], "", {}, ()])
def test_empty_things_are_no_timeouts(peer: IpcPeer, bad: Any) -> None:
    a, _ = peer.create_session_pair()
    calls: List[Any] = [a.tick, a.flush, a.receive, peer.tick, peer.tick_for, a.request(Ping()).wait]
    for call in calls:
        with pytest.raises(TypeError, match="number of seconds"):
            call(bad)
    with pytest.raises(TypeError, match="number of seconds"):
        a.request(Ping(), timeout=bad)


def test_number_that_no_float_can_hold_is_no_timeout(peer: IpcPeer) -> None:
    a, _ = peer.create_session_pair()
    huge: Any = 10**400
    calls: List[Any] = [a.tick, a.flush, a.receive, peer.tick, peer.tick_for, a.request(Ping()).wait]
    for call in calls:
        with pytest.raises(ValueError):
            call(huge)
    with pytest.raises(ValueError):
        a.request(Ping(), timeout=huge)
    with pytest.raises(ValueError):
        IpcPeer(timeout=huge)


@pytest.mark.usefixtures("closed_streams_are_noticed_soon")
def test_descriptor_that_was_closed_under_a_socket_is_an_error_and_no_hang(peer: IpcPeer) -> None:
    left, right = socket.socketpair()
    with right:
        session = peer.create_socket_session(left)
        errors: List[Any] = []
        session.on_exception(errors.append)
        promise = session.request(Ping(), timeout=None)
        os.close(left.fileno())
        try:
            with CpuMeter() as meter, pytest.raises(StreamClosedError):
                promise.wait(20)
        finally:
            left.detach()
        assert meter.real < 2
        (error,) = errors
        assert isinstance(error, InvalidStreamError) and error.session is session
        assert not session.is_open


# -- what is no message


@pytest.mark.parametrize("send", ["request", "notify", "broadcast"])
def test_envelopes_and_classes_cannot_be_sent(peer: IpcPeer, send: str) -> None:
    a, b = peer.create_session_pair()
    call = getattr(peer if send == "broadcast" else a, send)
    for message in (RequestEnvelope("x", Note("a")), ResponseEnvelope("x", Note("a"))):
        with pytest.raises(TypeError, match=rf"{send}\(\) takes a Message, and makes what envelope it needs"):
            call(message)
    with pytest.raises(TypeError, match=r"not a class; pass an instance: Note\(...\)"):
        call(Note)
    with pytest.raises(TypeError, match="takes a Message, not a NoneType; derive a class from Message"):
        call(None)
    assert a.queued_bytes == 0 and no_pending(a, b)


def test_a_handler_that_returns_an_envelope(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda request: ResponseEnvelope("x", Note("a")))
    with pytest.raises(RemoteError, match="returned a ResponseEnvelope; it must return a Message"):
        a.request(Ping()).wait()


def test_a_handler_that_returns_a_class(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda request: Pong)
    with pytest.raises(RemoteError, match=r"returned the class Pong; it must return an instance: Pong\(\.\.\.\)"):
        a.request(Ping()).wait()


@pytest.mark.parametrize("expect", [int, object, list, "Pong", (Pong,), None])
def test_expect_is_a_message_class(peer: IpcPeer, expect: Any) -> None:
    a, b = peer.create_session_pair()
    with pytest.raises(TypeError, match="expect must be a message class"):
        a.request(Ping(), expect=expect)
    assert no_pending(a)


# -- serializers that check nothing


class Careless(PickleMessageSerializer):
    """Makes ids that cannot be looked up."""

    def deserialize(self, payload: Any) -> Message:
        message = super().deserialize(payload)
        if isinstance(message, ResponseEnvelope):
            message.id = [message.id]  # type: ignore[assignment]
            if isinstance(message.response, Note):
                raise SerializationError("careless", response_id=message.id)  # type: ignore[arg-type]
        return message


@pytest.mark.parametrize("reply", [Pong(), Note("cannot be decoded")])
@pytest.mark.parametrize("nested", [False, True])
def test_reply_with_an_id_that_cannot_be_looked_up_is_a_late_one(
    reply: Message, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if nested:
        set_limit("depth", 1, monkeypatch)  # replies are settled out of their turn
    with IpcPeer(Careless(), timeout=20) as peer, RawPeer(peer) as raw:
        promise = raw.session.request(Ping())
        seen: List[Message] = []

        @raw.session.on_message
        def note(message: Note) -> None:
            raw.write(reply_bytes(promise.id, reply))
            if nested:
                peer.tick()
            seen.append(message)

        raw.write(framed(Note("1")), framed(Note("2")))
        tick_until(lambda: len(seen) == 2 and "inbox=0" in repr(raw.session), peer)
        assert raw.session.is_open and not is_settled(promise)
        raw.session.close()


def test_errors_of_several_handlers(peer: IpcPeer, raw: RawPeer, caplog: pytest.LogCaptureFixture) -> None:
    for text in ("first", "second", "third"):

        def fail(note: Note, text: str = text) -> None:
            raise ValueError(text)

        raw.session.on_message(lambda note, text=text: fail(note, text))
    raw.write(framed(Note()))
    with pytest.raises(ValueError, match="first"):
        peer.tick()
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["second", "third"]
    assert all("another on_message handler failed too" in record.getMessage() for record in caplog.records)


def test_what_interrupts_the_handlers_of_a_message_hides_no_failure(
    raw: RawPeer, peer: IpcPeer, caplog: pytest.LogCaptureFixture
) -> None:
    @raw.session.on_message
    def fail(note: Note) -> None:
        raise ValueError("first")

    @raw.session.on_message
    def leave(note: Note) -> None:
        raise KeyboardInterrupt

    raw.write(framed(Note()))
    with pytest.raises(KeyboardInterrupt):
        peer.tick()
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["first"]


def test_an_unexpected_reply_of_a_class_of_the_same_name(peer: IpcPeer) -> None:
    def another(number: int) -> Any:
        @dataclass
        class Same(Message, wire_name=f"test.session.Same{number}"): ...

        Same.__qualname__ = f"Same{number}"
        return Same

    expected, got = another(1), another(2)
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: got())
    with pytest.raises(UnexpectedReplyError, match=r"is <class '.*Same2'>, and the request expected <class '.*Same1'>"):
        a.request(Ping(), expect=expected).wait()


def test_a_request_that_a_handler_of_another_class_of_the_same_name_passes_over(peer: IpcPeer) -> None:
    def another(module: str, number: int = 1) -> Any:
        @dataclass
        class Task(Message, wire_name=f"test.session.{module}{number}.Task"): ...

        Task.__module__, Task.__qualname__ = module, "Task"
        return Task

    a, b = peer.create_session_pair()

    def register(cls: Any) -> None:
        def handler(task: Any) -> None: ...

        handler.__annotations__ = {"task": cls}
        b.on_request(handler)

    run, imported, third, local = another("__main__"), another("work"), another("third"), another("work", 2)
    register(imported)
    for cls, hint in (
        (run, r" \(it is a class of __main__, and a handler takes that of work, a module that is there twice: run .*\)"),
        (third, r" \(it is a class of third, and a handler takes that of work\)"),
        (local, ""),  # two of one module, as a function makes them
        (imported, ""),
    ):
        with pytest.raises(RemoteError, match=rf"^Unhandled request: [\w.]*Task{hint}$"):
            a.request(cls()).wait()
    register(run)  # which has seen it then
    with pytest.raises(RemoteError, match=r"^Unhandled request: [\w.]*Task$"):
        a.request(run()).wait()


def test_users_may_attach_what_they_like() -> None:
    with IpcPeer() as peer:
        a, _ = peer.create_session_pair()
        for thing in (peer, a, a.transport):
            thing.mine = [1]  # type: ignore[union-attr]
            assert thing.mine == [1]
            assert weakref.ref(thing)() is thing
