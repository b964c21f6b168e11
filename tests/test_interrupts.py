"""Exceptions that come at any moment: out of handlers, out of plug-ins, out of signal handlers."""

import collections
import contextlib
import functools
import gc
import inspect
import os
import random
import signal
import socket
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple, Type

import pytest

from stream_ipc import (
    ErrorMessage,
    IpcPeer,
    JsonMessageSerializer,
    Message,
    MessageTransport,
    PhpMessageSerializer,
    PickleMessageSerializer,
    RemoteError,
    ResponseEnvelope,
    ResponsePromise,
    SerializationError,
    Session,
    StreamClosedError,
    StreamTransport,
    as_completed,
    gather,
)
from stream_ipc.core.dispatcher import Dispatcher
from stream_ipc.interruptions import interruption_in
from stream_ipc.transports.sockets import listen
from stream_ipc.transports.spawn import spawn
from stream_ipc.transports.streams import open_read_end, open_write_end
from tests.helpers import (
    PATIENCE,
    UNRAISABLE,
    Alarm,
    AlarmError,
    Alarms,
    FakeClock,
    InterruptAt,
    Interruption,
    InterruptionError,
    RawPeer,
    frame,
    framed,
    is_broken,
    is_settled,
    listening_fd,
    no_pending,
    places_apart,
    reply_bytes,
    request_bytes,
    role,
    seeds,
    set_clock,
    socket_of,
    span,
    tick_until,
    unframe,
    values,
)
from tests.messages import Many, Note, Ping, Pong

# -- out of handlers


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Interruption, GeneratorExit])
def test_interruption_of_an_on_message_handler_passes_through_and_loses_nothing(
    raw: RawPeer, kind: Type[BaseException]
) -> None:
    before: List[str] = []
    after: List[str] = []
    promise = raw.session.request(Ping(), expect=Pong)
    raw.session.on_message(lambda note: before.append(note.text))

    @raw.session.on_message
    def interrupted(note: Note) -> None:
        if note.text == "2":
            raise kind

    raw.session.on_message(lambda note: after.append(note.text))
    raw.write(*(framed(Note(str(index))) for index in range(4)), reply_bytes(promise.id, Pong("there")))
    with pytest.raises(kind):
        promise.wait()
    assert before == ["0", "1", "2"] and after == ["0", "1"]
    assert promise.wait().value == "there"
    assert before == after == ["0", "1", "2", "3"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("of", ["tick", "session tick", "wait", "receive"])
def test_interruption_of_an_on_request_handler(raw: RawPeer, kind: Type[BaseException], of: str) -> None:
    @raw.session.on_request
    def interrupted(ping: Ping) -> Pong:
        if ping.value == 1:
            raise kind("stop")
        return Pong(ping.value)

    promise = raw.session.request(Ping(), expect=Pong)
    raw.read()
    raw.write(*(request_bytes(str(index), Ping(index)) for index in range(3)), reply_bytes(promise.id, Pong()))
    calls: Any = {
        "tick": lambda: raw.session.peer.tick(20),
        "session tick": lambda: raw.session.tick(20),
        "wait": promise.wait,
        "receive": raw.session.receive,
    }
    with pytest.raises(kind, match="stop"):
        calls[of]()
    assert promise.wait() == Pong()
    replies: Any = raw.messages()
    assert [reply.id for reply in replies] == ["0", "1", "2"]  # the requester is not left waiting
    assert isinstance(replies[1].response, ErrorMessage) and kind.__name__ in str(replies[1].response)
    assert [replies[0].response, replies[2].response] == [Pong(0), Pong(2)]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interruption_of_an_on_close_handler(peer: IpcPeer, kind: Type[BaseException]) -> None:
    with RawPeer(peer) as raw, RawPeer(peer) as other:

        @raw.session.on_close
        def interrupted(session: Session) -> None:
            raise kind

        promise = raw.session.request(Ping())
        raw.read()
        raw.sock.close()
        other.write(framed(Note("there")))
        with pytest.raises(kind):
            while True:
                peer.tick(20)
        assert not raw.session.is_open and promise.done and peer.sessions == (other.session,)
        with pytest.raises(StreamClosedError):
            promise.wait()
        seen: List[Any] = []
        other.session.on_message(seen.append)
        other.write(framed(Note("end")))
        tick_until(lambda: Note("end") in seen, peer)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_child_is_reaped_though_an_on_close_handler_was_interrupted(peer: IpcPeer, kind: Type[BaseException]) -> None:
    session = peer.create_command_session(role("echo"))
    session.on_request(lambda ping: Pong())

    @session.on_close
    def interrupted(session: Session) -> None:
        raise kind

    process = session.process
    assert process is not None
    try:
        with pytest.raises(kind):
            session.close()
        peer.close()  # what an interruption has left is done here
        assert process.returncode is not None, "the child is neither ended nor reaped"
    finally:
        if process.returncode is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interruption_of_an_on_exception_handler_does_not_keep_the_session(kind: Type[BaseException]) -> None:
    with IpcPeer(max_frame_size=1000, timeout=20) as peer, RawPeer(peer) as raw:

        @raw.session.on_exception
        def interrupted(error: Exception) -> None:
            raise kind

        raw.write(b"\xf3\x4a\x9d\xe2\x00\xff\xff\xff")
        with pytest.raises(kind):
            while True:
                peer.tick(20)
        for _ in range(3):
            try:
                peer.tick(0.01)
            except kind:
                pass
        assert not raw.session.is_open, "the failure was forgotten"


def test_interruption_in_nested_handlers_unwinds_all_of_them(raw: RawPeer) -> None:
    seen: List[str] = []

    @raw.session.on_message
    def handler(note: Note) -> None:
        seen.append(note.text)
        if note.text == "3":
            raise Interruption
        raw.session.tick()

    raw.write(*(framed(Note(str(index))) for index in range(6)))
    with pytest.raises(Interruption):
        raw.session.tick(20)
    assert seen == ["0", "1", "2", "3"]
    tick_until(lambda: len(seen) == 6, raw.session)
    assert seen == ["0", "1", "2", "3", "4", "5"]
    # The depth is back to nothing: 31 levels are free again.
    deep: List[int] = []

    @raw.session.on_message
    def deeper(ping: Ping) -> None:
        deep.append(1)
        if len(deep) < 31:
            raw.write(framed(Ping()))
            raw.session.tick(20)

    raw.write(framed(Ping()))
    tick_until(lambda: len(deep) == 31, raw.session)


# -- out of plug-ins


class Fragile:
    """A serializer and an id generator that raise when they are told to."""

    def __init__(self) -> None:
        self.real = PickleMessageSerializer()
        self.fail: Any = {}
        self.ids = 0

    def _point(self, name: str) -> None:
        error = self.fail.pop(name, None)
        if error is not None:
            raise error

    def serialize(self, message: Message) -> bytes:
        self._point("before serialize")
        self._point("before serialize " + type(message).__name__)
        data = self.real.serialize(message)
        self._point("behind serialize")
        return data

    def deserialize(self, payload: Any) -> Message:
        self._point("before deserialize")
        message = self.real.deserialize(payload)
        self._point("behind deserialize")
        return message

    def generate(self) -> str:
        self._point("generate")
        self.ids += 1
        return str(self.ids)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Interruption, LookupError, MemoryError])
@pytest.mark.parametrize(
    ("call", "point"),
    [(call, point) for call in ("notify", "request", "broadcast") for point in ("before serialize", "behind serialize")]
    + [("request", "generate")],
)
def test_error_while_sending_sends_nothing(kind: Type[BaseException], point: str, call: str) -> None:
    plug = Fragile()
    with IpcPeer(plug, plug, timeout=20) as peer:
        a, b = peer.create_session_pair()
        b.on_request(lambda ping: Pong(ping.value))
        seen: List[Any] = []
        b.on_message(seen.append)
        send: Any = peer.broadcast if call == "broadcast" else getattr(a, call)
        plug.fail = {point: kind("here")}
        with pytest.raises(BaseException, match="here") as caught:
            send(Ping(1))
        if issubclass(kind, Exception) and point != "generate":
            assert type(caught.value).__name__ == "SerializationError"
        else:
            assert isinstance(caught.value, kind)
        assert a.queued_bytes == 0 and no_pending(a, b) and peer.tick() == 0
        a.notify(Note("next"))
        assert a.request(Ping(2), expect=Pong).wait().value == 2
        assert seen == [Note("next")]


def test_what_a_signal_handler_raises_in_a_broadcast_is_no_failure_of_a_session() -> None:
    with IpcPeer(timeout=20) as peer:
        failures: List[BaseException] = []
        for session in peer.create_session_pair():
            session.on_exception(failures.append)
        assert peer.broadcast(Note("first")) == 2
        number, hit = 0, True
        while hit:
            number += 1
            at = InterruptAt(number, InterruptionError("here"))
            try:
                with at:
                    peer.broadcast(Note("next"))
            except InterruptionError:
                continue
            hit = at.hit
            assert not hit, at.where
        assert number > 10 and failures == []
        assert peer.broadcast(Note("last")) == 2


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Interruption])
@pytest.mark.parametrize("point", ["before deserialize", "behind deserialize"])
def test_interrupted_deserializer_loses_nothing(kind: Type[BaseException], point: str) -> None:
    plug = Fragile()
    with IpcPeer(plug, plug, timeout=20) as peer:
        a, b = peer.create_session_pair()
        b.on_request(lambda ping: Pong(ping.value))
        seen: List[Any] = []
        b.on_message(seen.append)
        for index in range(3):
            a.notify(Note(str(index)))
        promise = a.request(Ping(1), expect=Pong)
        a.notify(Note("3"))
        interruptions = 0
        end = time.monotonic() + 5
        while not (promise.done and len(seen) >= 4):
            assert time.monotonic() < end, "what was read before the interruption is not looked at any more"
            if interruptions < 6:
                plug.fail = {point: kind("here")}
            try:
                peer.tick(0.5)
            except kind:
                interruptions += 1
        assert interruptions >= 2
        assert values(seen) == ["0", "1", "2", "3"] and promise.wait().value == 1


@pytest.mark.parametrize("kind", [LookupError, MemoryError])
@pytest.mark.parametrize("point", ["before deserialize", "behind deserialize"])
def test_error_of_a_deserializer_is_an_error_message_in_its_place(kind: Type[Exception], point: str) -> None:
    plug = Fragile()
    with IpcPeer(plug, plug, timeout=20) as peer:
        a, b = peer.create_session_pair()
        seen: List[Any] = []
        b.on_message(seen.append)
        for index in range(3):
            a.notify(Note(str(index)))
        plug.fail = {point: kind("here")}
        tick_until(lambda: len(seen) == 3, peer)
        assert isinstance(seen[0], ErrorMessage) and "here" in str(seen[0])
        assert seen[1:] == [Note("1"), Note("2")]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, LookupError])
@pytest.mark.parametrize("point", ["before serialize ResponseEnvelope", "behind serialize"])
def test_error_while_replying_still_answers_exactly_once(kind: Type[BaseException], point: str) -> None:
    plug = Fragile()
    with IpcPeer(plug, timeout=20) as peer, RawPeer(peer) as raw:
        asked: List[int] = []

        @raw.session.on_request
        def answer(ping: Ping) -> Pong:
            asked.append(ping.value)
            plug.fail = {point: kind("here")} if ping.value == 1 else {}
            return Pong(ping.value)

        raw.write(*(request_bytes(str(index), Ping(index)) for index in range(3)))
        caught: List[BaseException] = []
        replies: List[Any] = []
        end = time.monotonic() + 10
        while len(replies) < 3:
            assert time.monotonic() < end
            try:
                raw.session.tick(1)
            except kind as exc:
                caught.append(exc)
            replies += raw.messages()
        assert [reply.id for reply in replies] == ["0", "1", "2"]
        assert asked == [0, 1, 2], "a handler ran twice"
        if kind is LookupError:
            assert caught == [] and isinstance(replies[1].response, ErrorMessage)
        else:
            assert len(caught) == 1 and replies[1].response == Pong(1)


# -- at every place where a signal handler could raise


# The second time with an Exception, as many a handler of SIGALRM raises; that is one of the slow tests.
BOTH = pytest.mark.parametrize("kind", [Interruption, pytest.param(InterruptionError, marks=pytest.mark.slow)])
BOTH_ALARMS = pytest.mark.parametrize("kind", [Alarm, pytest.param(AlarmError, marks=pytest.mark.slow)])

# Each of hundreds of attempts takes milliseconds; a few that do not come to an end are enough to know.
SOON = 25.0
ENOUGH = 4


class Run:
    """One attempt: work that is begun anew after each interruption, until it is done."""

    def __init__(self, number: int, kind: Type[BaseException]) -> None:
        self.kind = kind
        self.error = kind(f"at {number}")
        self.interrupt = InterruptAt(number, self.error)
        self.raised = False

    def until(self, condition: Callable[[], Any], turn: Callable[[], Any]) -> None:
        """Turn until something is so; only the turns are interrupted."""
        end = time.monotonic() + SOON
        while not condition():
            assert time.monotonic() < end, "it does not happen any more"
            if self.interrupt.hit:
                turn()
            else:
                self.once(turn)

    def once(self, call: Callable[[], Any]) -> Tuple[bool, Any]:
        """Call; returns whether it was not interrupted, and its result."""
        try:
            with self.interrupt:
                return True, call()
        except self.kind as exc:
            assert exc is self.error
            self.raised = True
            return False, None


def at_every_place(scenario: Callable[[Run], None], kind: Type[BaseException], step: int = 1) -> None:
    """Run a scenario with an interruption at its first place, at its second, and so on until there is no further.

    Where not everything runs, six of seven places are left out.
    """
    failures = []
    number = 1
    while True:
        run = Run(number, kind)
        try:
            scenario(run)
        except Exception as exc:  # pytest's own failures are no Exceptions and pass
            failures.append(f"{run.interrupt.where}: {type(exc).__name__}: {str(exc)[:300]}")
        except BaseException as exc:
            if not run.interrupt.hit or isinstance(exc, KeyboardInterrupt):
                raise
            failures.append(f"{run.interrupt.where}: {type(exc).__name__}: {str(exc)[:300]}")
        if not run.interrupt.hit or len(failures) >= ENOUGH:
            break
        number += step * places_apart()
    assert not failures, "after an interruption at:\n" + "\n".join(failures)
    assert number > 10, "nothing was interrupted"


def outcome(promise: "ResponsePromise[Any]") -> Any:
    try:
        return promise.wait(SOON)
    except InterruptionError:
        raise
    except Exception as exc:
        return type(exc)


@BOTH
@pytest.mark.slow
def test_interrupted_tick_loses_no_message_and_repeats_none(kind: Type[BaseException]) -> None:
    broken = frame(b"nonsense")

    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            seen: List[Any] = []
            raw.session.on_message(seen.append)
            raw.session.on_request(lambda ping: Pong(ping.value))
            promises = [raw.session.request(Ping(index)) for index in range(2)]
            raw.read()
            raw.write(
                framed(Note("1")), request_bytes("a", Ping("a")), reply_bytes(promises[0].id, Pong("0")), broken,
                framed(Note("2")), reply_bytes(promises[1].id, ErrorMessage("no")), request_bytes("b", Ping("b")),
                framed(Note("3")),
            )  # fmt: skip
            def turn() -> None:
                raw.session.tick(0.01)

            run.until(lambda: Note("3") in seen, turn)
            for _ in range(3):
                peer.tick()
            replies: List[Any] = list(raw.messages())
            assert [type(m).__name__ for m in seen] == ["Note", "ErrorMessage", "Note", "Note"], seen
            assert [m.text for m in seen if isinstance(m, Note)] == ["1", "2", "3"], seen
            assert [reply.id for reply in replies] == ["a", "b"], replies
            for reply in replies:
                # An interruption while a request is being answered may be what its answer is.
                assert reply.response == Pong(reply.id) or "Interruption" in str(reply.response), reply
            assert [outcome(promise) for promise in promises] == [Pong("0"), RemoteError]
            assert no_pending(raw.session)

    at_every_place(scenario, kind)


@BOTH
def test_an_interrupted_session_that_only_writes_stays_open(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        ours, theirs = socket.socketpair()
        with IpcPeer(timeout=20) as peer, theirs:
            session = peer.create_session(StreamTransport(ours, [], PickleMessageSerializer()))
            run.once(lambda: (session.notify(Note("1")), peer.tick()))
            for _ in range(3):
                peer.tick()
            assert session.is_open, session.reason

    at_every_place(scenario, kind)


@BOTH
@pytest.mark.slow
def test_interrupted_end_of_stream_still_ends(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            seen: List[Any] = []
            closed: List[Any] = []
            raw.session.on_message(seen.append)
            raw.session.on_close(closed.append)
            promise = raw.session.request(Ping())
            raw.read()
            raw.write(framed(Note("1")))
            raw.sock.close()
            ended = [raw.session]
            run.until(lambda: promise.done and not peer.sessions and closed == ended, lambda: peer.tick(0.01))
            assert not raw.session.is_open
            assert seen == [Note("1")] and closed == [raw.session]
            assert outcome(promise) is StreamClosedError

    at_every_place(scenario, kind)


@BOTH
def test_interrupted_wait_goes_on(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer:
            a, b = peer.create_session_pair()
            b.on_request(lambda ping: Pong(ping.value))
            promise = a.request(Ping(5), expect=Pong)
            done = False
            while not done:
                done, reply = run.once(lambda: outcome(promise))
            assert reply == Pong(5) or reply is RemoteError, reply
            peer.tick()  # what an interruption has left half done
            assert no_pending(a, b)

    at_every_place(scenario, kind)


@BOTH
def test_interrupted_receive_goes_on(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            raw.write(*(framed(Note(str(index))) for index in range(3)))
            got: List[str] = []

            def take() -> None:
                # Appended by a C function in a function of the test: not interrupted in between.
                got.append(raw.session.receive(2).text)  # type: ignore[attr-defined]

            while len(got) < 3:
                run.once(take)
            assert got == ["0", "1", "2"]

    at_every_place(scenario, kind)


@BOTH
@pytest.mark.slow
def test_interrupted_gather_and_as_completed_go_on(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer, IpcPeer(timeout=20) as other:
            first, second = peer.create_session_pair(), other.create_session_pair()
            promises: List[ResponsePromise[Pong]] = []
            for a, b in (first, second):
                b.on_request(lambda ping: Pong(ping.value))
                promises += [a.request(Ping(index), expect=Pong) for index in range(2)]
            done = False
            while not done:
                done, _ = run.once(lambda: [promise.id for promise in as_completed(promises, 5)])
            done = False
            while not done:
                done, replies = run.once(lambda: [outcome(promise) for promise in promises])
            assert all(reply is RemoteError or isinstance(reply, Pong) for reply in replies)
            if RemoteError not in replies:
                done, replies = run.once(lambda: gather(promises, 5))
                assert not done or values(replies) == [0, 1, 0, 1]

    at_every_place(scenario, kind, 3)


@BOTH
def test_an_interrupted_iterator_is_dropped_without_a_word(
    monkeypatch: pytest.MonkeyPatch, kind: Type[BaseException]
) -> None:
    said: List[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: said.append(f"{what.exc_value!r} in {what.object!r}"))

    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer:
            a, b = peer.create_session_pair()
            b.on_request(lambda ping: Pong(ping.value))
            promises = [a.request(Ping(index), expect=Pong) for index in range(2)]
            run.once(lambda: next(as_completed(promises, 5)))
            run.error.__traceback__ = None  # which holds the iterator
            assert said == []
            replies = [outcome(promise) for promise in promises]
            assert all(reply is RemoteError or isinstance(reply, Pong) for reply in replies)

    at_every_place(scenario, kind)


@pytest.mark.parametrize("size", [10, 300000])
@BOTH
@pytest.mark.slow
def test_interrupted_send_sends_whole_messages_in_order_and_none_twice(size: int, kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            promise = raw.session.request(Ping(), expect=Pong)
            done: List[str] = []
            maybe: List[str] = []
            for index in range(4):
                note = Note(str(index), b"x" * size)
                whole, _ = run.once(functools.partial(raw.session.notify, note))
                (done if whole else maybe).append(note.text)
            run.once(lambda: raw.session.tick())
            data = bytearray(raw.read())
            end = time.monotonic() + 5
            while raw.session.queued_bytes:
                assert time.monotonic() < end
                run.once(lambda: raw.session.tick())
                data += raw.read()
            raw.session.notify(Note("end"))
            raw.session.flush(5)
            data += raw.read()
            texts = [m.text for m in unframe(bytes(data))[1:] if isinstance(m, Note)]
            assert texts == sorted(texts[:-1]) + ["end"], texts
            assert len(set(texts)) == len(texts)
            assert set(done) <= set(texts) <= {*done, *maybe, "end"}, (done, maybe, texts)
            raw.write(reply_bytes(promise.id, Pong("there")))
            assert promise.wait().value == "there"

    at_every_place(scenario, kind)


@BOTH
def test_interrupted_request_leaves_nothing_behind(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer:
            a, b = peer.create_session_pair()
            b.on_request(lambda ping: Pong(ping.value))
            whole, promise = run.once(lambda: a.request(Ping(1), expect=Pong))
            if whole:
                assert outcome(promise) == Pong(1)
            assert a.request(Ping(2), expect=Pong).wait(5).value == 2
            tick_until(lambda: no_pending(a, b), peer)

    at_every_place(scenario, kind)


@BOTH
def test_interrupted_large_messages_arrive_unharmed(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer:
            a, b = peer.create_session_pair()
            seen: List[Any] = []
            b.on_message(seen.append)
            notes = [Note(str(size), bytes([size // 1000 % 256]) * size) for size in (300000, 300000, 250000, 400000)]
            for note in notes[:2]:
                a.notify(note)
            run.until(lambda: len(seen) == 2, lambda: peer.tick(0.01))
            for note in notes[2:]:  # into the buffers of those before
                a.notify(note)
            run.until(lambda: len(seen) == 4, lambda: peer.tick(0.01))
            assert seen == notes

    at_every_place(scenario, kind, 3)


@pytest.mark.parametrize("which", ["session", "peer"])
@BOTH
def test_interrupted_close_can_be_repeated(which: str, kind: Type[BaseException]) -> None:
    # Descriptors are looked after by conftest.
    def scenario(run: Run) -> None:
        peer = IpcPeer(timeout=20)
        raw = RawPeer(peer)
        try:
            promise = raw.session.request(Ping(), timeout=None)
            closing: Any = raw.session if which == "session" else peer
            done = False
            while not done:
                done, _ = run.once(closing.close)
            peer.close()
            assert not raw.session.is_open and promise.done
            assert outcome(promise) is StreamClosedError
            raw.sock.setblocking(True)
            raw.sock.settimeout(2)
            data = raw.sock.recv(1 << 16)
            assert len(unframe(data)) == 1
            assert raw.sock.recv(1) == b"", "the stream was not closed"
        finally:
            peer.close()
            raw.sock.close()

    at_every_place(scenario, kind)


@pytest.mark.parametrize("then", ["listener", "peer", "tick"])
@pytest.mark.parametrize("which", ["listener", "peer"])
@BOTH
def test_interrupted_close_of_a_listener_can_be_repeated(
    tmp_path: Path, which: str, then: str, kind: Type[BaseException]
) -> None:
    path = tmp_path / "socket"

    def scenario(run: Run) -> None:
        with IpcPeer() as peer:
            listener = peer.listen(path, lambda session: None)
            fd = listening_fd(listener)
            closing: Any = {"listener": listener.close, "peer": peer.close, "tick": lambda: peer.tick(0)}
            run.once(closing[which])
            closing[then]()
            if then == "tick" and which == "listener" and listener.is_open:
                return  # nothing has begun yet
            if (which, then) == ("peer", "tick"):
                peer.close()
            assert not listener.is_open and not path.exists()
            with pytest.raises(OSError):
                os.fstat(fd)
            listener.close()

    at_every_place(scenario, kind)


@BOTH
def test_interrupted_listen_leaves_no_listener_that_is_nobodys(tmp_path: Path, kind: Type[BaseException]) -> None:
    path = tmp_path / "socket"

    def scenario(run: Run) -> None:
        with IpcPeer() as peer:
            whole, listener = run.once(lambda: peer.listen(path, lambda session: None))
            if not whole:
                assert "listeners=0" in repr(peer) and not path.exists()
                listener = peer.listen(path, lambda session: None)
            listener.close()

    at_every_place(scenario, kind)


@pytest.mark.parametrize("then", ["again", "tick"])
@BOTH
def test_interrupted_remove_session_leaves_the_streams_to_their_owner(then: str, kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer() as peer, RawPeer(peer) as raw:
            session = raw.session
            promise = session.request(Ping(), timeout=None)
            sock = socket_of(session)
            run.once(lambda: peer.remove_session(session))
            assert session.is_open == (session in peer.sessions)
            if then == "tick":
                peer.tick(0)
            if then == "again" or session.is_open:
                peer.remove_session(session)
            assert not session.is_open and not peer.sessions
            assert outcome(promise) is StreamClosedError
            assert sock.send(b"still open") and sock.gettimeout() is None
            sock.close()

    at_every_place(scenario, kind)


class _BeforeTheStreams(InterruptAt):
    def is_place(self, frame: Any, event: str) -> bool:
        return frame.f_code.co_name == "_close_channel"


@pytest.mark.parametrize("removed", [False, True])
def test_a_peer_that_is_dropped_in_the_middle_of_closing_leaks_nothing(removed: bool) -> None:
    peer = IpcPeer()
    read, write = os.pipe()
    session = peer.create_stream_session(write, read)
    with pytest.raises(Interruption), _BeforeTheStreams(1, Interruption()):
        if removed:
            peer.remove_session(session)
        else:
            peer.close()
    del peer, session
    gc.collect()
    for fd in (read, write):
        if removed:
            os.close(fd)  # its owner does
        else:
            with pytest.raises(OSError):
                os.fstat(fd)


@BOTH
def test_interrupted_create_socket_session_leaves_the_socket_as_it_was(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer() as peer, socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname()) as sock:
                run.once(lambda: peer.create_socket_session(sock))
                if not peer.sessions:
                    assert sock.getpeername() and sock.gettimeout() is None

    at_every_place(scenario, kind)


class InMakeSession(InterruptAt):
    """Interrupts just as a session is about to be made."""

    def is_place(self, frame: Any, event: str) -> bool:
        return event == "call" and frame.f_code.co_name == "_make_session"


@BOTH
def test_a_session_pair_that_is_interrupted_between_the_two_leaves_none(
    peer: IpcPeer, kind: Type[BaseException]
) -> None:
    with pytest.raises(kind), InMakeSession(2, kind("between")):
        peer.create_session_pair()
    assert peer.sessions == ()


def test_a_command_whose_session_gets_lost_on_the_way_is_no_session(peer: IpcPeer) -> None:
    # Before 3.11 a signal is looked at when a function in Python has returned.
    def trace(frame: Any, event: str, arg: Any) -> Any:
        if event == "return":
            sys.settrace(None)
            raise Interruption
        return trace if frame.f_code.co_name == "_make_session" else None

    with pytest.raises(Interruption):
        sys.settrace(trace)
        try:
            peer.create_command_session(["cat"])
        finally:
            sys.settrace(None)
    assert peer.sessions == ()


@BOTH
def test_interrupted_batch_loses_nothing(kind: Type[BaseException]) -> None:
    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
            done: List[str] = []

            def send() -> None:
                with raw.session.batch():
                    for text in "012":
                        raw.session.notify(Note(text))
                        done.append(text)

            run.once(send)
            raw.session.tick()
            raw.session.notify(Note("end"))
            texts = values(raw.messages())  # nothing is held back any more
            assert texts[-1] == "end" and texts[:-1] == list("012")[: len(texts) - 1]
            assert len(texts) - 1 >= len(done)

    at_every_place(scenario, kind)


@BOTH
@pytest.mark.slow
def test_interrupted_failures_leave_a_session_that_reads_on_or_ends(kind: Type[BaseException]) -> None:
    class Flaky(MessageTransport):
        failures = 2  # the second comes so soon that reading is held up

        def send(self, message: Message) -> None: ...

        def read_fds(self) -> List[int]:
            return []

        def receive(self) -> List[Message]:
            self.failures -= 1
            if self.failures >= 0:
                raise RuntimeError("flaky")
            return [Note("works")] if self.failures == -1 else []

        def close(self) -> None: ...

    def scenario(run: Run) -> None:
        with IpcPeer(timeout=20) as peer:
            session = peer.create_session(Flaky())
            session.on_exception(lambda error: False)
            got: List[Message] = []
            session.on_message(got.append)
            clock = set_clock(peer, FakeClock())

            def turn() -> None:
                clock.now += 0.004  # seconds: it takes some of these until it is read again
                peer.tick()

            run.until(lambda: got or not session.is_open, turn)
            assert got == [Note("works")] or run.raised  # what interrupts the report ends the session

    at_every_place(scenario, kind)


@BOTH
def test_interrupted_undecodable_reply_still_settles_its_promise(kind: Type[BaseException]) -> None:
    class Picky:
        def __init__(self) -> None:
            self.real = PickleMessageSerializer()

        def serialize(self, message: Message) -> bytes:
            return self.real.serialize(message)

        def deserialize(self, payload: Any) -> Message:
            from stream_ipc import SerializationError

            message = self.real.deserialize(payload)
            if isinstance(message, ResponseEnvelope):
                raise SerializationError("picky", response_id=message.id)
            return message

    def scenario(run: Run) -> None:
        with IpcPeer(Picky(), timeout=2) as peer, RawPeer(peer) as raw:
            promise = raw.session.request(Ping())
            raw.write(reply_bytes(promise.id, Pong()))
            run.until(lambda: promise.done, lambda: raw.session.tick(0.01))
            assert outcome(promise).__name__ == "SerializationError", outcome(promise)

    at_every_place(scenario, kind)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("arguments", [1, 2])
@pytest.mark.parametrize("place", ["if following is not None:", "if inbox and"])
def test_exception_on_the_way_to_a_handler_leaves_the_message(
    raw: RawPeer, count: int, arguments: int, place: str
) -> None:
    # Before 3.11 signals are looked at wherever code jumps, so also inside of the try around the call of a handler.
    got: List[Any] = []
    for name in range(count):
        if arguments == 1:
            raw.session.on_message(lambda note, name=name: got.append((name, note.text)))
        else:
            raw.session.on_message(lambda note, session, name=name: got.append((name, note.text)))
    lines, first = inspect.getsourcelines(Dispatcher._deliver)
    jumps = {first + index for index, line in enumerate(lines) if line.strip().startswith(place)}
    assert jumps

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code is not Dispatcher._deliver.__code__:
            return None
        if frame.f_lineno in jumps and event == "line":
            sys.settrace(None)
            raise AlarmError
        return trace

    raw.write(framed(Note("1")), framed(Note("2")))
    sys.settrace(trace)
    try:
        with pytest.raises(AlarmError):
            raw.session.peer.tick(PATIENCE)
    finally:
        sys.settrace(None)
    tick_until(lambda: len(got) == 2 * count, raw.session.peer)
    assert got == [(name, text) for text in ("1", "2") for name in range(count)]


class Question(Message):
    """Has a hash."""


@pytest.mark.parametrize(
    ("kind", "place"), [("on_close", "list.append"), ("on_exception", "list.append"), ("on_request", "__getitem__")]
)
def test_exception_as_a_handler_in_c_has_returned_is_not_taken_for_the_handlers(
    peer: IpcPeer, kind: str, place: str
) -> None:
    a, b = peer.create_session_pair()
    seen: List[Any] = []
    if kind == "on_close":
        a.on_close(seen.append)
        act: Callable[[], Any] = a.close
    elif kind == "on_exception":
        a.on_exception(seen.append)
        act = functools.partial(a._conversation.dispatcher.report, SerializationError("found"))
    else:
        b.on_request(collections.defaultdict(lambda: Pong("there")).__getitem__)
        promise = a.request(Question())
        act = functools.partial(peer.tick, PATIENCE)

    def ring(frame: Any, event: str, arg: Any = None) -> None:
        if event == "c_return" and frame.f_code.co_name in ("go_on", "report", "serve") and place in arg.__qualname__:
            sys.setprofile(None)
            raise AlarmError

    old: Any = signal.signal(signal.SIGUSR1, ring)  # type: ignore[arg-type]
    sys.setprofile(ring)
    try:
        with pytest.raises(AlarmError):
            act()
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGUSR1, old)
    if kind == "on_request":
        with pytest.raises(RemoteError, match="AlarmError"):
            promise.wait()
    else:
        assert len(seen) == 1


# -- with real signals


def skip_rare_loss(kind: Type[BaseException]) -> None:
    if issubclass(kind, Exception) and sys.version_info < (3, 11):
        pytest.skip("on 3.10 an Exception of a signal handler can cost a message, once in some thousand of signals")


@BOTH_ALARMS
def test_signals_during_a_session_pair_lose_nothing(peer: IpcPeer, kind: Type[BaseException]) -> None:
    skip_rare_loss(kind)
    a, b = peer.create_session_pair()
    got_a: List[Any] = []
    got_b: List[Any] = []
    a.on_message(got_a.append)
    b.on_message(got_b.append)
    b.on_request(lambda ping: Pong(ping.value))
    sent_a: List[str] = []
    sent_b: List[str] = []
    maybe: List[str] = []
    promises: List[Any] = []
    with Alarms(True, kind) as alarms:
        begin = time.monotonic()
        index = 0
        while time.monotonic() < begin + (span(1.0) if alarms.count > span(50) else PATIENCE):
            text = f"{index:06d}"
            index += 1
            data = b"x" * (index * 7919 % 3000 if index % 20 else 100000)
            for session, sent in ((a, sent_a), (b, sent_b)):
                whole, _ = alarms.call(functools.partial(session.notify, Note(text, data)))
                (sent if whole else maybe).append(text)
            if index % 10 == 0:
                _, promise = alarms.call(functools.partial(a.request, Ping(index), expect=Pong))
                if promise is not None:
                    promises.append((index, promise))
            alarms.call(lambda: peer.tick(0.002))
        count = alarms.count
    a.notify(Note("end"))
    b.notify(Note("end"))
    tick_until(lambda: Note("end") in got_a and Note("end") in got_b, peer)
    assert count > span(50)
    for got, sent in ((got_a, sent_b), (got_b, sent_a)):
        texts = values(got)[:-1]
        assert texts == sorted(texts) and len(set(texts)) == len(texts)
        assert set(sent) <= set(texts), f"lost: {sorted(set(sent) - set(texts))[:10]}"
        assert set(texts) <= set(sent) | set(maybe)
    for number, promise in promises:
        try:
            assert promise.wait(5).value == number
        except RemoteError as exc:  # the handler was interrupted
            assert "Alarm" in str(exc)


@BOTH_ALARMS
def test_signals_in_both_processes_lose_nothing(peer: IpcPeer, kind: Type[BaseException]) -> None:
    skip_rare_loss(kind)
    with peer.create_command_session(role("alarmed", kind.__name__)) as session:
        sent: List[str] = []
        maybe: List[str] = []
        assert session.receive(20) == Note("up")
        with Alarms(True, kind) as alarms:
            begin = time.monotonic()
            index = 0
            while time.monotonic() < begin + (span(1.0) if alarms.count > span(200) else PATIENCE):
                text = f"{index:06d}"
                index += 1
                data = b"x" * (index * 7919 % 3000 if index % 20 else 100000)
                whole, _ = alarms.call(functools.partial(session.notify, Note(text, data)))
                (sent if whole else maybe).append(text)
        session.notify(Note("end"))
        report: Optional[Message] = None
        while not isinstance(report, Many):
            report = session.receive(20)
        rings, texts = report.items
        assert rings and alarms.count > span(200)
        assert texts.pop() == "end"
        assert texts == sorted(texts) and len(set(texts)) == len(texts)
        assert set(sent) <= set(texts) <= set(sent) | set(maybe)


def test_signal_handler_that_only_counts_disturbs_no_wait(raw: RawPeer) -> None:
    with Alarms(False) as alarms:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            raw.session.request(Ping()).wait(0.05)
        assert 0.05 <= time.monotonic() - began < 5  # the deadline is not begun anew by each signal
        count = alarms.count
    assert count > 5


def test_keyboard_interrupt_by_a_real_sigint(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    # The timer's signal becomes the interrupt while the wait sleeps.
    old_alarm = signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            a.receive(20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, old)
        signal.signal(signal.SIGALRM, old_alarm)
    assert a.request(Ping(3), expect=Pong).wait().value == 3


def test_interruption_in_a_nested_dispatch_loses_no_answer(raw: RawPeer) -> None:
    interrupted: List[Any] = []

    @raw.session.on_request
    def answer(ping: Ping, session: Session) -> Pong:
        if ping.value == 2:
            raise KeyboardInterrupt
        try:
            session.request(Ping("never answered")).wait(20)
        except KeyboardInterrupt as exc:
            interrupted.append(exc)
        return Pong(ping.value)

    raw.write(request_bytes("1", Ping(1)), request_bytes("2", Ping(2)))
    replies: List[Any] = []

    def answered() -> int:
        replies.extend(m for m in raw.messages() if isinstance(m, ResponseEnvelope))
        return len(replies) >= 2

    tick_until(answered, raw.session)
    for _ in range(5):
        raw.session.tick()
    replies += [m for m in raw.messages() if isinstance(m, ResponseEnvelope)]
    assert len(interrupted) == 1
    assert sorted(reply.id for reply in replies) == ["1", "2"]
    by_id = {reply.id: reply.response for reply in replies}
    assert by_id["1"] == Pong(1)
    assert isinstance(by_id["2"], ErrorMessage) and "KeyboardInterrupt" in str(by_id["2"])
    assert raw.session.is_open and "inbox=0" in repr(raw.session)


class Storm:
    """Signals at random intervals, of which up to two raise out of each call that is made under it.

    What one raises where nobody can catch it, in a finalizer, is dropped. By a function in C: in one that is written
    in Python, as pytest's own is, the second would be raised.
    """

    def __init__(self, seed: int, kind: Type[BaseException]) -> None:
        self._kind = kind
        self._random = random.Random(seed)
        self._budget = 0
        self._over = False
        self.raised = 0
        self.twice = 0

    def _ring(self, number: int, frame: Any) -> None:
        if self._over:
            return
        signal.setitimer(signal.ITIMER_REAL, self._random.choice((0.00002, 0.0001, 0.0005, 0.002)))
        if self._budget:
            self._budget -= 1
            self.raised += 1
            if not self._budget:
                self.twice += 1
            raise self._kind

    def call(self, function: Callable[[], Any]) -> None:
        try:
            try:
                self._budget = 2
                function()
                self._budget = 0
            except self._kind:
                self._budget = 0
        except self._kind:  # the second came when the first was hardly caught
            pass

    def __enter__(self) -> "Storm":
        self._hook, sys.unraisablehook = sys.unraisablehook, collections.deque(maxlen=0).append
        self._old: Any = signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, 0.0001)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over = True  # first: a handler that is about to run would arm the timer again
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._old)
        sys.unraisablehook = self._hook


@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="3.10 looks at signals at every branch: a second interruption can leave a queue unwritten until the next send",
)
@BOTH_ALARMS
def test_signals_in_quick_succession_leave_nothing_that_never_leaves(kind: Type[BaseException]) -> None:
    (seed,) = seeds(1)
    with IpcPeer(timeout=20) as peer:
        a, b = peer.create_session_pair()
        data = bytes(200_000)
        got: List[str] = []
        for session in (a, b):
            session.on_message(lambda note: got.append(note.text))
        choice = random.Random(seed + 1)
        raised = twice = 0
        end = time.monotonic() + PATIENCE
        while (raised <= span(150) or twice <= span(15)) and time.monotonic() < end:
            # Many short storms, because the next send mends what the one before has left behind.
            with Storm(choice.randrange(1 << 32), kind) as storm:
                for _ in range(choice.randrange(1, 6)):
                    for session in (a, b):
                        storm.call(functools.partial(session.notify, Note("data", data)))
                    for _ in range(choice.randrange(3)):
                        storm.call(functools.partial(choice.choice((peer, a, b)).tick, 0.001))
            raised += storm.raised
            twice += storm.twice
            tick_until(lambda: not a.queued_bytes and not b.queued_bytes, peer)
        assert raised > span(150) and twice > span(15)
        a.notify(Note("end"))
        b.notify(Note("end"))
        tick_until(lambda: got.count("end") == 2, peer)


def test_no_callback_of_a_weak_reference_is_written_in_python() -> None:
    called: List[str] = []

    def profile(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_back is here:
            called.append(frame.f_code.co_name)

    here = inspect.currentframe()
    with IpcPeer() as peer:
        peer.create_session_pair()[0].request(Ping()).cancel()
    loop = weakref.ref(peer._loop)
    sys.setprofile(profile)
    try:
        del peer
        gc.collect()
    finally:
        sys.setprofile(None)
    assert loop() is None
    assert set(called) <= {*UNRAISABLE, profile.__name__}  # what a signal handler raises in one that is would be lost


@pytest.mark.parametrize("kind", [Alarm, AlarmError, TimeoutError])
def test_what_a_signal_handler_has_raised_is_not_raised_again_while_it_is_dealt_with(
    peer: IpcPeer, kind: Type[BaseException]
) -> None:
    def ring(number: int, frame: Any) -> None:
        raise kind("the alarm")

    a, b = peer.create_session_pair()
    before = signal.signal(signal.SIGUSR1, ring)
    try:
        signal.raise_signal(signal.SIGUSR1)
    except kind:  # each error from here on has the alarm as its context
        with pytest.raises(SerializationError, match="cannot travel"):
            a.notify(Note("no plain data", lambda: None))
        with pytest.raises(FileNotFoundError):
            peer.create_command_session(["/no/such/program"])
        promise = a.request(Ping())
        b.close()
        with pytest.raises(StreamClosedError):
            promise.wait()
        assert not a.is_open
    finally:
        signal.signal(signal.SIGUSR1, before)


def errors_that_do_not_come_out(peer: IpcPeer, scenario: Callable[[Session], Any], kind: Type[Exception]) -> List[str]:
    """Where an exception of a signal handler is lost, or another comes out in its place."""
    a, _ = peer.create_session_pair()
    scenario(a)  # what is compiled at the first use is another test's
    lost = []
    number = 1 - places_apart()
    while True:
        number += places_apart()
        error, found = kind("the alarm"), None
        interrupted = InterruptAt(number, error)
        try:
            with interrupted:
                scenario(a)
        except Exception as exc:
            found = exc
        peer.tick(0)
        if not interrupted.hit:
            assert number > 20
            return lost
        if found is not error:
            lost.append(f"{interrupted.where}: {found!r}")


@pytest.mark.parametrize("kind", [ValueError, KeyError, TypeError, IndexError, AttributeError])
@pytest.mark.parametrize("serializer", [PickleMessageSerializer, JsonMessageSerializer, PhpMessageSerializer])
@pytest.mark.matrix
def test_an_error_of_a_signal_handler_is_none_of_a_payload(serializer: Callable[[], Any], kind: Type[Exception]) -> None:
    def scenario(session: Session) -> None:
        session.notify(Note("nested", [1, {"x": [Pong(2)], "y": {"3": "z"}}]))
        session.peer.tick(0)

    with IpcPeer(serializer()) as peer:
        assert errors_that_do_not_come_out(peer, scenario, kind) == []


@pytest.mark.parametrize("kind", [Interruption, InterruptionError])
@pytest.mark.parametrize("call", ["next_deadline", "tick"])
def test_an_interrupted_look_at_deadlines_makes_none_of_them_late(call: str, kind: Type[BaseException]) -> None:
    number = 1 - places_apart()
    while True:
        number += places_apart()
        with IpcPeer() as peer, RawPeer(peer) as raw:
            clock = set_clock(peer, FakeClock())
            answered, kept = (raw.session.request(Ping(), timeout=seconds) for seconds in (1, 6))
            raw.write(reply_bytes(answered.id, Pong()))
            assert answered.wait() == Pong()
            clock.now += 2  # the timer is of the other, which was answered
            interrupted = InterruptAt(number, kind())
            with contextlib.suppress(kind), interrupted:
                getattr(peer, call)()
            raw.session.request(Ping(), timeout=300).cancel()
            clock.now += 4
            peer.tick(0)
            peer.tick(0)
            assert is_settled(kept), interrupted.where
        if not interrupted.hit:
            break
    assert number > 10


@pytest.mark.parametrize("kind", [Interruption, InterruptionError])
def test_interrupted_failure_of_a_write_still_ends_the_session(kind: Type[BaseException]) -> None:
    number = 1 - places_apart()
    while True:
        number += places_apart()
        with IpcPeer() as peer:
            source, their_end = os.pipe()
            other_end, sink = os.pipe()
            session = peer.create_stream_session(sink, source)
            os.close(other_end)  # nobody reads, and what is written here goes on
            with InterruptAt(number, kind()) as interrupted:
                try:
                    session.notify(Note())
                except (kind, StreamClosedError):
                    pass
            for _ in range(3):
                peer.tick(0)
            # If it came before anything was written, nothing has failed.
            assert not session.is_open or not (is_broken(session) or session.queued_bytes), interrupted.where
            os.close(their_end)
        if not interrupted.hit:
            break
    assert number > 20


@pytest.mark.parametrize("kind", [Interruption, InterruptionError])
def test_as_completed_learns_of_what_an_interrupted_cancel_has_settled(kind: Type[BaseException]) -> None:
    number = 1 - places_apart()
    while True:
        number += places_apart()
        with IpcPeer() as peer, RawPeer(peer) as raw:
            first, second, third = [raw.session.request(Ping()) for _ in range(3)]
            iterator = as_completed([first, second, third], timeout=2)
            raw.write(reply_bytes(first.id, Pong()))
            assert next(iterator) is first  # and it is told of the others as they settle
            with InterruptAt(number, kind()) as interrupted:
                try:
                    second.cancel()
                except kind:
                    pass
            peer.tick(0)
            if not second.settled:
                second.cancel()
            assert next(iterator) is second, interrupted.where
        if not interrupted.hit:
            break
    assert number > 10


# -- where the caller has left little stack


def down_to(depth: int) -> int:
    return 0 if depth == 0 else 1 + down_to(depth - 1)


@dataclass
class Deep(Message):
    number: int

    def __post_init__(self) -> None:
        self.number = down_to(self.number)


@pytest.mark.parametrize("name", ["pickle", "json", "php"])
def test_what_is_read_where_the_stack_is_nearly_full_is_read_again(name: str) -> None:
    serializers = {"pickle": PickleMessageSerializer, "json": JsonMessageSerializer, "php": PhpMessageSerializer}
    got: List[Message] = []

    def tick_at_each_depth() -> None:
        try:
            tick_at_each_depth()
        except RecursionError:
            pass
        try:
            peer.tick()
        except RecursionError:
            refused.append(len(got))

    refused: List[int] = []
    with IpcPeer(serializers[name]()) as peer:
        a, b = peer.create_session_pair()
        b.on_message(lambda message: got.append(message))  # a call in C would not need room
        b.on_exception(lambda error: got.append(ErrorMessage(str(error))))
        for _ in range(3):
            a.notify(Deep(40))
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(len(inspect.stack(0)) + 250)
        try:
            tick_at_each_depth()
        finally:
            sys.setrecursionlimit(limit)
        assert refused and b.is_open
        assert [getattr(message, "number", message) for message in got] == [40, 40, 40]


def test_a_recursion_without_end_is_an_error_of_the_message() -> None:
    with IpcPeer() as peer:
        a, b = peer.create_session_pair()
        message = Deep(1)
        message.number = 2 * sys.getrecursionlimit()
        a.notify(message)
        assert "RecursionError" in str(b.receive(PATIENCE, expect=ErrorMessage))
        assert b.is_open


# -- an alarm that is an OSError, as the system's own errors are


def open_a_stream() -> None:
    read, write = os.pipe()
    with open(read, "rb", buffering=0) as file, open(write, "wb", buffering=0) as other:
        for opened in (open_read_end(file), open_write_end(other)):
            opened.release()


def listen_at_any_port() -> None:
    listen(("localhost", 0), secure=False)[0].close()


def start_with_a_stderr() -> None:
    with open(os.devnull, "wb") as file, contextlib.suppress(FileNotFoundError):
        spawn(["/there/is/no/such/program"], None, None, file, {})


@pytest.mark.filterwarnings("ignore:unclosed")
@pytest.mark.parametrize("function", [open_a_stream, listen_at_any_port, start_with_a_stderr])
def test_an_alarm_is_not_taken_for_an_error_of_the_system(function: Callable[[], None]) -> None:
    function()
    number = 1 - places_apart()
    while True:
        number += places_apart()
        error = TimeoutError("alarm")
        with InterruptAt(number, error) as interrupt:
            try:
                function()
            except TimeoutError as exc:
                assert exc is error, interrupt.where
            else:
                assert not interrupt.hit, interrupt.where
                break
    assert number > 10


# A socket that an interruption loses before anybody has it is closed when it is collected, with this warning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_connect_takes_no_descriptor_away_from_a_later_session() -> None:
    number = 1 - places_apart()
    while True:
        number += places_apart()
        with IpcPeer(timeout=20) as peer, IpcPeer() as other:
            listener = other.listen(("127.0.0.1", 0), lambda session: None)
            with InterruptAt(number, Interruption()) as interrupt:
                try:
                    peer.connect(listener.address)
                except Interruption:
                    pass
            # No tick in between: the new sockets have the numbers of those that are closed now.
            pairs = [peer.create_session_pair() for _ in range(3)]
            for a, b in pairs:
                b.on_request(lambda message: message)
                assert a.request(Note()).wait() == Note(), interrupt.where
        if not interrupt.hit:
            break
    assert number > 100


@BOTH
@pytest.mark.parametrize("how", ["peer", "session", "turn"])
def test_interrupted_close_calls_each_done_callback_once(kind: Type[BaseException], how: str) -> None:
    def scenario(run: Run) -> None:
        called: List[int] = []
        closed: List[Session] = []
        with IpcPeer(timeout=None) as peer:
            a, b = peer.create_session_pair()
            sessions = [a] if how == "session" else [a, peer.create_session_pair()[0]]
            promises = [session.request(Ping(index)) for session in sessions for index in range(2)]

            def call_back(number: int, promise: Any) -> None:
                called.append(number)
                gather(promises, return_exceptions=True)

            for number, promise in enumerate(promises):
                promise.add_done_callback(functools.partial(call_back, number))
            for session in sessions:
                session.on_close(closed.append)
            close = a.close if how == "session" else peer.close
            done, _ = run.once(close)
            begun = not any(session.is_open for session in sessions)
            if how == "turn" and begun and len(closed) < len(sessions):
                peer.tick(0)  # goes on with what has begun
                assert sorted(called) == [*range(len(promises))]
            close()
            assert sorted(called) == [*range(len(promises))]
            assert len(closed) == len(sessions) and {*closed} == {*sessions}

    at_every_place(scenario, kind)


class AnswersToAll:
    """A signal handler as ``unittest.mock`` makes them: it has any attribute that it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnswersToAll()

    def __call__(self, *args: Any) -> None:
        raise AlarmError

    def method(self, *args: Any) -> None:
        raise AlarmError


@pytest.mark.parametrize("kind", ["function", "method", "partial", "object"])
def test_whatever_a_signal_handler_is_made_of_it_is_known_again(kind: str) -> None:
    handler: Any = AnswersToAll()
    if kind == "function":
        handler = AnswersToAll.__call__
    elif kind == "method":
        handler = handler.method
    elif kind == "partial":
        handler = functools.partial(functools.partial(handler.method, 1), 2)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.raise_signal(signal.SIGALRM)
    except AlarmError as error:
        assert interruption_in(error) is error
    else:
        pytest.fail("it was not called")
    finally:
        signal.signal(signal.SIGALRM, before)
