"""Transports that somebody else wrote: with and without descriptors, with queues of their own, with faults."""

import collections
import os
import select
import signal
import socket
import sys
from typing import Any, Callable, Deque, Iterator, List, Optional, Type

import pytest

from stream_ipc import (
    DeferredReply,
    ErrorMessage,
    FrameTooLargeError,
    InvalidStreamError,
    IpcPeer,
    LogMessage,
    Message,
    MessageTransport,
    PickleMessageSerializer,
    RequestEnvelope,
    RequestTimeoutError,
    ResponseEnvelope,
    Session,
    StreamClosedError,
    StreamTransport,
    UnexpectedReplyError,
    gather,
)
from tests.helpers import (
    WAIT,
    CpuMeter,
    FakeClock,
    InterruptAt,
    Interruption,
    InterruptionError,
    RawPeer,
    framed,
    listening_fd,
    no_pending,
    read_without_dispatching,
    set_clock,
    set_limit,
    tick_until,
    values,
)
from tests.messages import Note, Ping, Pong


@pytest.fixture
def peer() -> Iterator[IpcPeer]:
    with IpcPeer(timeout=5) as made:
        yield made


class Memory(MessageTransport):
    """Messages in lists. Without descriptors, so it is asked."""

    def __init__(self) -> None:
        self.incoming: Deque[Any] = collections.deque()
        self.sent: List[Message] = []
        self.closed = 0
        self.receives = 0
        self.other: Optional[Memory] = None

    def send(self, message: Message) -> None:
        self.sent.append(message)
        if self.other is not None:
            self.other.incoming.append(message)

    def receive(self) -> List[Message]:
        self.receives += 1
        there: List[Message] = []
        while self.incoming:
            if isinstance(self.incoming[0], BaseException):
                if there:
                    break
                raise self.incoming.popleft()
            there.append(self.incoming.popleft())
        return there

    def read_fds(self) -> List[int]:
        return []

    def close(self) -> None:
        self.closed += 1


class WithPipe(Memory):
    """Has a descriptor, which is readable while something is there."""

    def __init__(self) -> None:
        super().__init__()
        self.fd, self.bell = os.pipe()

    def put(self, *items: Any) -> None:
        self.incoming.extend(items)
        os.write(self.bell, b"\0")

    def receive(self) -> List[Message]:
        if select.select([self.fd], [], [], 0)[0]:
            os.read(self.fd, 1000)
        there = super().receive()
        if self.incoming:
            os.write(self.bell, b"\0")
        return there

    def read_fds(self) -> List[int]:
        return [self.fd]

    def close(self) -> None:
        super().close()
        os.close(self.fd)
        os.close(self.bell)


class Duck:
    """No subclass; has the four methods and no more."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.send = self.memory.send
        self.receive = self.memory.receive
        self.close = self.memory.close

    def read_fds(self) -> Any:
        return ()


def memory_pair() -> List[Memory]:
    one, two = Memory(), Memory()
    one.other, two.other = two, one
    return [one, two]


def test_conversation_over_lists(peer: IpcPeer) -> None:
    one, two = memory_pair()
    a, b = peer.create_session(one), peer.create_session(two)
    assert a.transport is one and a.process is None
    b.on_request(lambda ping: Pong(ping.value))
    seen: List[Any] = []
    b.on_message(seen.append)
    a.notify(Note("x"))
    assert a.request(Ping(3), expect=Pong).wait().value == 3
    assert seen == [Note("x")]
    assert [type(m) for m in one.sent] == [Note, RequestEnvelope] and isinstance(two.sent[0], ResponseEnvelope)
    assert no_pending(a, b)


def test_object_that_merely_has_the_methods(peer: IpcPeer) -> None:
    duck = Duck()
    session = peer.create_session(duck)
    session.notify(Note("out"))
    duck.memory.incoming.append(Note("in"))
    assert session.receive(5) == Note("in") and duck.memory.sent == [Note("out")]
    session.flush(1)
    assert session.queued_bytes == 0
    session.close()
    session.close()
    assert duck.memory.closed == 1


@pytest.mark.parametrize("missing", ["send", "receive", "read_fds", "close"])
def test_object_that_lacks_a_method_is_refused(peer: IpcPeer, missing: str) -> None:
    methods = {name: lambda *args: None for name in ("send", "receive", "read_fds", "close") if name != missing}
    with pytest.raises(TypeError, match=missing):
        peer.create_session(type("Lacking", (), methods)())
    assert peer.sessions == ()


@pytest.mark.parametrize("returned", [None, 5])
def test_receive_that_returns_no_list_is_named(peer: IpcPeer, returned: Any) -> None:
    errors: List[Exception] = []
    session = peer.create_session(type("Odd", (Memory,), {"receive": lambda self: returned})())
    session.on_exception(errors.append)
    tick_until(lambda: not session.is_open, peer)
    assert str(errors[0]).startswith("Odd.receive() must return a list of Messages: ")


def test_an_end_whose_text_cannot_be_had_is_an_end(peer: IpcPeer) -> None:
    class Odd:
        def __str__(self) -> str:
            raise ValueError("no text")

    def receive(self: Any) -> Any:
        raise StreamClosedError(Odd())

    closed: List[Session] = []
    session = peer.create_session(type("Ending", (Memory,), {"receive": receive})())
    session.on_close(closed.append)
    tick_until(lambda: closed, peer)
    assert not session.is_open and peer.tick(0) == 0


def test_a_receive_that_cannot_be_called_is_told_as_it_is(peer: IpcPeer) -> None:
    errors: List[Exception] = []
    session = peer.create_session(type("Odd", (Memory,), {"receive": lambda self, more: []})())
    session.on_exception(errors.append)
    tick_until(lambda: not session.is_open, peer)
    assert "missing 1 required positional argument" in str(errors[0]) and "list" not in str(errors[0])


def test_type_error_of_a_receive_stays_as_it_is(peer: IpcPeer) -> None:
    def receive(self: Any) -> Any:
        raise TypeError("my own")

    errors: List[Exception] = []
    session = peer.create_session(type("Odd", (Memory,), {"receive": receive})())
    session.on_exception(errors.append)
    tick_until(lambda: not session.is_open, peer)
    assert str(errors[0]) == "my own"


@pytest.mark.parametrize("returned", [None, 5])
def test_read_fds_that_returns_no_list_is_named(peer: IpcPeer, returned: Any) -> None:
    errors: List[Exception] = []
    session = peer.create_session(type("Odd", (Memory,), {"read_fds": lambda self: returned})())
    session.on_exception(errors.append)
    tick_until(lambda: not session.is_open, peer)
    assert str(errors[0]) == f"Odd.read_fds() must return a list of descriptors, not {returned}"


@pytest.mark.parametrize("name", ["read_fds", "wants_write"])
def test_whatever_of_a_transport_says_that_the_stream_is_closed_ends_the_session(peer: IpcPeer, name: str) -> None:
    def ask(self: Any) -> Any:
        if self.gone:
            raise StreamClosedError("the line is dead")
        return []

    kind = type("Odd", (Memory,), {"gone": False, name: ask if name == "read_fds" else property(ask)})
    transport = kind()
    session = peer.create_session(transport)
    errors: List[Exception] = []
    session.on_exception(errors.append)
    notes: List[Message] = []
    session.on_message(notes.append)
    transport.incoming.append(Note("before"))
    peer.tick(0)
    transport.gone = True
    tick_until(lambda: not session.is_open, peer)
    assert errors == [] and notes == [Note("before")]
    assert str(session.reason) == "the line is dead"


@pytest.mark.parametrize("name", ["send", "receive", "read_fds", "close"])
def test_object_whose_attribute_raises_stop_iteration_is_named(peer: IpcPeer, name: str) -> None:
    def stop(self: Any) -> Any:
        raise StopIteration

    with pytest.raises(RuntimeError, match=r"Stopping object .*StopIteration"):
        peer.create_session(type("Stopping", (Memory,), {name: property(stop)})())
    assert peer.sessions == ()


def test_base_class_has_defaults_for_what_is_optional() -> None:
    transport = Memory()
    assert not transport.wants_write and transport.write_fd is None
    transport.flush()
    with pytest.raises(TypeError):
        MessageTransport()  # type: ignore[abstract]


@pytest.mark.matrix
@pytest.mark.parametrize("of", ["peer", "session", "wait", "receive"])
def test_without_descriptors_it_is_asked_while_waiting_and_that_costs_little(peer: IpcPeer, of: str) -> None:
    memory = Memory()
    session = peer.create_session(memory)
    promise = session.request(Ping())
    calls: Any = {
        "peer": lambda: peer.tick(0.05),
        "session": lambda: session.tick(0.05),
        "wait": lambda: promise.wait(0.05),
        "receive": lambda: session.receive(0.05),
    }
    before = memory.receives
    with CpuMeter() as meter:
        try:
            calls[of]()
        except TimeoutError:
            pass
    asked = memory.receives - before
    assert 0.05 <= meter.real < 5 and not meter.spins
    # Every 10 ms at least; a machine that is busy may be late. Not much more often either.
    assert 2 <= asked <= 25


@pytest.mark.slow
def test_gather_over_two_peers_asks_it_as_often(peer: IpcPeer) -> None:
    memory = Memory()
    with IpcPeer() as other, RawPeer(other) as raw:
        asked, elsewhere = peer.create_session(memory).request(Ping()), raw.session.request(Ping())
        before = memory.receives
        with pytest.raises(TimeoutError):
            gather([asked, elsewhere], timeout=0.3)
        assert 10 <= memory.receives - before <= 100  # every 10 ms at least; a machine that is busy may be late


def test_without_descriptors_every_tick_asks(peer: IpcPeer) -> None:
    memory = Memory()
    peer.create_session(memory)
    for expected in range(1, 6):
        peer.tick()
        assert memory.receives == expected


def test_with_a_descriptor_a_wait_ends_when_it_is_readable(peer: IpcPeer) -> None:
    transport = WithPipe()
    session = peer.create_session(transport)
    with CpuMeter() as meter:
        assert peer.tick(WAIT) == 0
    assert transport.receives <= 1 and not meter.spins
    transport.put(Note("1"), Note("2"))
    assert session.receive(5) == Note("1")
    assert session.receive(5) == Note("2")
    with pytest.raises(TimeoutError):
        session.receive(0)


def test_descriptors_may_change(peer: IpcPeer) -> None:
    transport = WithPipe()
    session = peer.create_session(transport)
    peer.tick()
    old = transport.fd, transport.bell
    transport.fd, transport.bell = os.pipe()
    peer.tick()
    for fd in old:
        os.close(fd)
    transport.put(Note("1"))
    assert session.receive(5) == Note("1")
    transport.read_fds = list  # type: ignore[method-assign]  # and may go away
    transport.incoming.append(Note("2"))
    assert session.receive(5) == Note("2")


class Queueing(WithPipe):
    """Queues what is sent until it is told to write."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: List[Message] = []
        self.ours, self.theirs = socket.socketpair()

    def send(self, message: Message) -> None:
        self.queue.append(message)

    @property
    def wants_write(self) -> bool:
        return bool(self.queue)

    @property
    def write_fd(self) -> int:
        return self.ours.fileno()

    def flush(self) -> None:
        self.sent += self.queue
        self.queue.clear()

    def close(self) -> None:
        super().close()
        self.ours.close()
        self.theirs.close()


def test_what_a_transport_has_queued_since_the_last_tick_leaves_in_the_next(peer: IpcPeer) -> None:
    transport = Queueing()
    session = peer.create_session(transport)
    session.on_message(session.notify)
    peer.tick()
    for number in range(3):
        session.notify(Note(str(number)))
        peer.tick()
        assert values(transport.sent) == [str(n) for n in range(number + 1)]
    transport.put(Note("3"))
    assert peer.tick() == 1  # a handler sends
    peer.tick()
    assert values(transport.sent) == ["0", "1", "2", "3"]
    session.notify(Note("4"))
    assert peer.next_deadline() != 0 and select.select([peer.fileno()], [], [], 0)[0]  # for a loop around this one
    peer.tick()
    assert values(transport.sent)[-1] == "4"
    assert peer.next_deadline() != 0 and not select.select([peer.fileno()], [], [], 0)[0]


class Reconnecting(Memory):
    """Connects anew when the other side is gone, as a rule under the same number."""

    def __init__(self) -> None:
        super().__init__()
        self.others: List[socket.socket] = []
        self.connect()

    def connect(self) -> None:
        if self.others:
            self.ours.close()
        self.ours, other = socket.socketpair()
        self.ours.setblocking(False)
        self.others.append(other)

    def receive(self) -> List[Message]:
        try:
            data = self.ours.recv(1000)
        except BlockingIOError:
            return []
        if not data:
            self.connect()
        return [Note(data.decode())] if data else []

    def read_fds(self) -> List[int]:
        return [self.ours.fileno()]

    def close(self) -> None:
        super().close()
        for each in (self.ours, *self.others):
            each.close()


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("between", [True, False])
def test_a_descriptor_may_become_another_file_under_the_same_number(
    peer: IpcPeer, between: bool, numbered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not numbered:  # as TCP sockets are on macOS
        fstat = os.fstat
        monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*fstat(fd)[:1], 0, 0, *fstat(fd)[3:10])))
    transport = Reconnecting()
    session = peer.create_session(transport)
    number = transport.ours.fileno()
    for text in ("1", "2", "3"):
        transport.others[-1].send(text.encode())
        assert session.receive(5) == Note(text)
        if between:
            transport.connect()
        else:
            transport.others[-1].shutdown(socket.SHUT_WR)
            peer.tick()
        assert transport.ours.fileno() == number
        transport.others[-1].send(b"x")
        assert peer.tick() == 1 and session.receive(0) == Note("x")


class Careless(WithPipe):
    def close(self) -> None:
        Memory.close(self)
        os.close(self.bell)


def test_a_descriptor_that_was_closed_is_no_hang(peer: IpcPeer) -> None:
    transport = Careless()
    session = peer.create_session(transport)
    errors: List[Exception] = []
    session.on_exception(errors.append)
    peer.tick()
    os.close(transport.fd)
    peer.tick()
    peer.tick()
    assert isinstance(errors[0], InvalidStreamError) and f"descriptor {transport.fd} " in str(errors[0])
    assert len(errors) == 1 and not session.is_open


def test_order_of_the_list_is_the_order_of_dispatch(peer: IpcPeer) -> None:
    memory = Memory()
    session = peer.create_session(memory)
    log: List[Any] = []
    promise = session.request(Ping())
    session.on_message(lambda note: log.append((note.text, promise.done)))
    session.on_request(lambda ping: log.append(("request", promise.done)) or Pong())  # type: ignore[func-returns-value]
    memory.incoming += [
        Note("1"), RequestEnvelope("a", Ping()), Note("2"), ResponseEnvelope(promise.id, Pong()), Note("3"),
    ]  # fmt: skip
    assert peer.tick() == 5
    assert log == [("1", False), ("request", False), ("2", False), ("3", True)]


# -- the end


@pytest.mark.parametrize("transport_class", [Memory, WithPipe])
def test_receive_that_raises_stream_closed_ends_the_session(peer: IpcPeer, transport_class: Type[Memory]) -> None:
    transport = transport_class()
    session = peer.create_session(transport)
    closed: List[Any] = []
    errors: List[Any] = []
    seen: List[Any] = []
    session.on_close(closed.append)
    session.on_exception(errors.append)
    session.on_message(seen.append)
    promise = session.request(Ping(), timeout=None)
    items = [Note("last"), StreamClosedError("the line was cut")]
    if isinstance(transport, WithPipe):
        transport.put(*items)
    else:
        transport.incoming += items
    with pytest.raises(StreamClosedError, match="the line was cut"):
        promise.wait()
    assert seen == [Note("last")] and closed == [session] and errors == [] and transport.closed == 1
    assert peer.sessions == () and not session.is_open
    with pytest.raises(StreamClosedError):
        session.tick()


@pytest.mark.parametrize("kind", [OSError, LookupError, RecursionError])
@pytest.mark.parametrize("keep", [True, False])
def test_receive_that_raises_something_else(peer: IpcPeer, kind: Type[Exception], keep: bool) -> None:
    memory = Memory()
    session = peer.create_session(memory)
    errors: List[Any] = []

    @session.on_exception
    def failed(error: Exception) -> Optional[bool]:
        errors.append(error)
        return False if keep else None

    promise = session.request(Ping(), timeout=None, expect=Pong)
    memory.incoming += [kind("here"), Note("behind"), ResponseEnvelope(promise.id, Pong(1))]
    if keep:
        assert promise.wait() == Pong(1)
    else:
        with pytest.raises(StreamClosedError, match="here"):
            promise.wait()
        assert not session.is_open and memory.closed == 1
    assert [type(error) for error in errors] == [kind]


def test_receive_that_raises_stop_iteration_has_failed(peer: IpcPeer) -> None:
    memory = Memory()
    session = peer.create_session(memory)
    memory.incoming += [Note("before"), StopIteration(), Note("behind")]
    assert session.receive(5) == Note("before")
    with pytest.raises(StreamClosedError, match=r"Memory\.receive\(\) raised StopIteration"):
        session.receive(5)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Interruption])
def test_receive_that_is_interrupted(peer: IpcPeer, kind: Type[BaseException]) -> None:
    memory = Memory()
    session = peer.create_session(memory)
    memory.incoming += [Note("1"), kind("here"), Note("2")]
    seen: List[Any] = []
    session.on_message(seen.append)
    with pytest.raises(kind, match="here"):
        while True:
            peer.tick(5)
    tick_until(lambda: len(seen) == 2, peer)
    assert values(seen) == ["1", "2"] and session.is_open


class Wrapping(WithPipe):
    """Takes whatever goes wrong in one of its methods for the end of its stream, as many a transport does."""

    wants_write = True  # type: ignore[assignment]
    fails_in = ""

    def called(self, method: str) -> None:
        if method == self.fails_in:
            self.fails_in = ""
            try:
                signal.raise_signal(signal.SIGUSR1)
            except Exception as exc:
                raise StreamClosedError("the line is dead") from exc

    def send(self, message: Message) -> None:
        self.called("send")
        super().send(message)

    def receive(self) -> List[Message]:
        self.called("receive")
        return super().receive()

    def flush(self) -> None:
        self.called("flush")


@pytest.mark.parametrize("method", ["send", "receive", "flush"])
def test_an_alarm_that_a_transport_takes_for_the_end_of_its_stream_is_none(peer: IpcPeer, method: str) -> None:
    def alarm(*_: Any) -> None:
        raise InterruptionError("alarm")

    transport = Wrapping()
    session = peer.create_session(transport)
    transport.put(Note("there"))
    transport.fails_in = method
    old = signal.signal(signal.SIGUSR1, alarm)
    try:
        with pytest.raises(InterruptionError, match="alarm"):
            if method == "send":
                session.notify(Note("lost"))
            peer.tick(0)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert session.receive(5) == Note("there")
    session.notify(Note("sent"))
    assert transport.sent == [Note("sent")]
    transport.wants_write = False  # or closing waits for what is to be written


@pytest.mark.parametrize("deferred", [False, True])
def test_a_reply_is_sent_once_wherever_sending_it_is_interrupted(deferred: bool) -> None:
    number = 0
    while True:
        number += 1
        with IpcPeer(timeout=5) as peer:
            transport = Memory()
            session = peer.create_session(transport)
            later = DeferredReply()
            session.on_request(lambda ping, later=later: later if deferred else Pong(ping.value))
            transport.incoming += [RequestEnvelope("1", Ping(5))]
            if deferred:
                peer.tick(0)
            with InterruptAt(number, InterruptionError()) as interrupted:
                try:
                    if deferred:
                        later.send(Pong(5))
                    else:
                        peer.tick(0)
                except InterruptionError:
                    pass
            if deferred and not later.done:  # it was interrupted before it had begun
                later.send(Pong(5))
            tick_until(lambda transport=transport: transport.sent, peer)
            assert peer.tick(0) == peer.tick(0) == 0
            assert transport.sent == [ResponseEnvelope("1", Pong(5))], interrupted.where
        if not interrupted.hit:
            break
    assert number > 15


@pytest.mark.parametrize("kind", [OSError, LookupError, StreamClosedError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["notify", "request"])
def test_send_that_raises(peer: IpcPeer, kind: Type[BaseException], call: str) -> None:
    memory = Memory()
    session = peer.create_session(memory)

    def fails(message: Message) -> None:
        raise kind("here")

    broken = type("Broken", (Memory,), {"send": lambda self, message: fails(message)})()
    bad = peer.create_session(broken)
    with pytest.raises(kind, match="here"):
        getattr(bad, call)(Ping())
    assert "pending=0" in repr(bad)
    # The others go on.
    memory.incoming.append(Note("x"))
    assert session.receive(5) == Note("x")
    if kind is StreamClosedError:
        tick_until(lambda: not bad.is_open, peer)


def test_send_that_raises_while_replying_and_broadcasting(peer: IpcPeer) -> None:
    class Broken(Memory):
        def send(self, message: Message) -> None:
            raise OSError("here")

    transport = Broken()
    session = peer.create_session(transport)
    good = peer.create_session(Memory())
    errors: List[Any] = []
    session.on_exception(lambda error: errors.append(error) or False)  # type: ignore[func-returns-value]
    assert peer.broadcast(Note()) == 1
    assert len(errors) == 1
    session.on_request(lambda ping: Pong())
    transport.incoming.append(RequestEnvelope("1", Ping()))
    tick_until(lambda: len(errors) == 2, peer)
    assert all("here" in str(error) for error in errors) and good.is_open and session.is_open


def test_the_other_side_is_gone_when_a_polled_flush_says_so(peer: IpcPeer) -> None:
    class Gone(Memory):
        wants_write = True

        def flush(self) -> None:
            raise StreamClosedError("nobody reads")

    transport = Gone()
    transport.incoming.append(Note("last words"))
    session = peer.create_session(transport)
    failures: List[Exception] = []
    notes: List[Note] = []
    session.on_exception(failures.append)
    session.on_message(notes.append)
    tick_until(lambda: not session.is_open, peer)
    assert not failures and notes == [Note("last words")] and str(session.reason) == "nobody reads"


@pytest.mark.parametrize("what", ["read_fds", "close", "wants_write", "flush"])
def test_other_methods_that_raise_do_not_harm_other_sessions(peer: IpcPeer, what: str) -> None:
    class Broken(Memory):
        armed = False

        def _fail(self, name: str, value: Any) -> Any:
            if self.armed and name == what:
                raise OSError("from " + name)
            return value

        def read_fds(self) -> List[int]:
            return self._fail("read_fds", [])  # type: ignore[no-any-return]

        @property
        def wants_write(self) -> bool:
            return bool(self._fail("wants_write", what == "flush" and self.armed))

        def flush(self) -> None:
            self._fail("flush", None)

        def close(self) -> None:
            super().close()
            self._fail("close", None)

    transport = Broken()
    session = peer.create_session(transport)
    closed: List[Any] = []
    session.on_close(closed.append)
    errors: List[Any] = []
    session.on_exception(errors.append)
    good = Memory()
    other = peer.create_session(good)
    seen: List[Any] = []
    other.on_message(seen.append)
    promise = session.request(Ping())
    transport.armed = True
    if what == "close":
        session.close()
    good.incoming.append(Note("unharmed"))
    try:
        tick_until(lambda: seen and not session.is_open, peer, seconds=5)
    finally:
        transport.armed = False
    assert seen == [Note("unharmed")] and closed == [session] and promise.done
    assert [str(error) for error in errors] == ([] if what == "close" else ["from " + what])


# -- output of its own


class Queued(WithPipe):
    """Queues what it sends, and writes it when it may."""

    def __init__(self, descriptor: bool) -> None:
        super().__init__()
        self.queue: Deque[Message] = collections.deque()
        self.out_read, self.out_write = os.pipe()
        os.set_blocking(self.out_write, False)
        self.descriptor = descriptor
        self.flushes = 0

    def block(self) -> None:
        try:
            while True:
                os.write(self.out_write, b"x" * 4096)
        except BlockingIOError:
            pass

    def unblock(self) -> None:
        while select.select([self.out_read], [], [], 0)[0]:
            os.read(self.out_read, 1 << 16)

    def send(self, message: Message) -> None:
        self.queue.append(message)

    def _wants(self) -> bool:
        return bool(self.queue)

    def _fd(self) -> Optional[int]:
        return self.out_write if self.descriptor else None

    def flush(self) -> None:
        self.flushes += 1
        while self.queue and select.select([], [self.out_write], [], 0)[1]:
            self.sent.append(self.queue.popleft())

    def close(self) -> None:
        super().close()
        os.close(self.out_read)
        os.close(self.out_write)


class QueuedProperties(Queued):
    wants_write = property(lambda self: self._wants())
    write_fd = property(lambda self: self._fd())


class QueuedMethods(Queued):
    def wants_write(self) -> bool:  # type: ignore[override]
        return self._wants()

    def write_fd(self) -> Optional[int]:  # type: ignore[override]
        return self._fd()


@pytest.mark.matrix
@pytest.mark.parametrize("made", [QueuedProperties, QueuedMethods])
@pytest.mark.parametrize("descriptor", [True, False])
def test_queued_output_is_flushed_when_it_can_be_written(
    peer: IpcPeer, made: Callable[[bool], Queued], descriptor: bool
) -> None:
    transport = made(descriptor)
    transport.block()
    session = peer.create_session(transport)
    session.notify(Note("1"))
    assert session.queued_bytes > 0
    with CpuMeter() as meter:
        peer.tick(WAIT)
    assert transport.sent == [] and not meter.spins, "it spins while nothing can be written"
    if descriptor:
        assert transport.flushes <= 3
    with pytest.raises(TimeoutError):
        session.flush(0.01)
    transport.unblock()
    tick_until(lambda: transport.sent, peer)
    assert transport.sent == [Note("1")] and session.queued_bytes == 0
    session.notify(Note("2"))
    session.flush(5)
    assert values(transport.sent) == ["1", "2"]
    session.notify(Note("3"))
    session.close()  # flushes
    assert values(transport.sent) == ["1", "2", "3"] and transport.closed == 1


@pytest.mark.parametrize("made", [QueuedProperties, QueuedMethods])
def test_flush_that_raises_ends_the_session(peer: IpcPeer, made: Callable[[bool], Queued]) -> None:
    transport = made(True)

    def fails() -> None:
        raise StreamClosedError("cut while writing")

    transport.flush = fails  # type: ignore[method-assign]
    session = peer.create_session(transport)
    promise = session.request(Ping(), timeout=None)
    with pytest.raises(StreamClosedError, match="cut while writing"):
        promise.wait()
    assert not session.is_open and transport.closed == 1


def test_custom_transports_beside_real_streams(peer: IpcPeer) -> None:
    memory = Memory()
    session = peer.create_session(memory)
    a, b = peer.create_session_pair()

    @b.on_request
    def forward(ping: Ping) -> Pong:
        memory.incoming.append(Note("from the other"))
        return Pong(session.receive(5).text)  # type: ignore[attr-defined]

    assert a.request(Ping(), expect=Pong).wait().value == "from the other"


def test_what_is_no_message_in_the_list_is_an_error_in_its_place(peer: IpcPeer) -> None:
    memory = Memory()
    session = peer.create_session(memory)
    seen: List[Any] = []
    session.on_message(seen.append)
    session.on_exception(lambda error: seen.append(error) or False)  # type: ignore[func-returns-value]
    memory.incoming += [Note("1"), "text", Note("2")]
    tick_until(lambda: Note("2") in seen, peer)
    assert seen[0] == Note("1") and seen[-1] == Note("2") and len(seen) == 3
    assert isinstance(seen[1], (ErrorMessage, Exception))


class Unregistered(Message):
    """A message of a class that has kept its registration from happening, as one of another process's might have."""

    def __init_subclass__(cls, **options: Any) -> None:
        pass


class Nameless(Unregistered):
    pass


class Choosy(type):
    """Makes classes that cannot be compared with other messages."""

    def __subclasscheck__(cls, other: type) -> bool:
        if issubclass(other, Message):
            raise LookupError("no comparison")
        return False


@pytest.mark.parametrize("handled", [False, True])
def test_a_request_that_is_none_is_answered_with_an_error_and_does_not_stay(peer: IpcPeer, handled: bool) -> None:
    transport = Memory()
    session = peer.create_session(transport)
    seen: List[Any] = []
    if handled:
        session.on_request(lambda request: seen.append(request) or Pong())  # type: ignore[func-returns-value]
    inner = RequestEnvelope("a", Ping())
    wrong: List[Any] = [5, None, inner, ResponseEnvelope("a", Pong()), "text"]
    transport.incoming += [*[RequestEnvelope(str(index), content) for index, content in enumerate(wrong)], Note("behind")]
    notes = [peer.tick(0), session.receive(0)]
    assert notes == [6, Note("behind")] and seen == []
    sent: List[Any] = transport.sent
    texts = [reply.response.message for reply in sent]
    assert [reply.id for reply in sent] == list("01234")
    names = ["an int", "a NoneType", "a RequestEnvelope", "a ResponseEnvelope", "a str"]
    assert texts == [f"the request could not be decoded: an envelope must hold a Message, not {name}" for name in names]
    assert session.is_open


def test_an_unhandled_request_of_a_class_without_a_wire_name_is_answered(peer: IpcPeer) -> None:
    transport = Memory()
    peer.create_session(transport)
    transport.incoming += [RequestEnvelope("1", Nameless())]
    assert peer.tick(0) == 1
    sent: List[Any] = transport.sent
    assert [reply.response.message for reply in sent] == [f"Unhandled request: {__name__}.Nameless"]


def test_a_request_for_which_no_handler_can_be_found_is_told_once_and_answered(peer: IpcPeer) -> None:
    class Odd(Message, metaclass=Choosy):
        pass

    transport = Memory()
    session = peer.create_session(transport)

    @session.on_request
    def never(odd: Odd) -> Pong:
        raise AssertionError

    transport.incoming += [RequestEnvelope("1", Ping()), Note("behind")]
    with pytest.raises(LookupError, match="no comparison"):
        peer.tick(0)
    assert session.receive(0) == Note("behind")
    sent: List[Any] = transport.sent
    assert ["LookupError: no comparison" in str(reply.response) for reply in sent] == [True]


def test_a_notification_for_which_no_handler_can_be_found_is_told_once(peer: IpcPeer) -> None:
    class Odd(Message, metaclass=Choosy):
        pass

    transport = Memory()
    session = peer.create_session(transport)

    @session.on_message
    def never(odd: Odd) -> None:
        raise AssertionError

    transport.incoming += [Ping(), RequestEnvelope("1", Ping())]
    with pytest.raises(LookupError, match="no comparison"):
        peer.tick(0)
    assert peer.tick(0) == 1
    assert session.is_open and len(transport.sent) == 1


def test_a_reply_that_is_no_message_is_an_error_of_its_request(peer: IpcPeer) -> None:
    transport = Memory()
    session = peer.create_session(transport)
    promise = session.request(Ping())
    transport.incoming += [ResponseEnvelope(promise.id, 5)]  # type: ignore[arg-type]
    with pytest.raises(UnexpectedReplyError, match="is an int, and the request expected a Message"):
        promise.wait(0)


class AlarmingId(str):
    """An id during whose search a signal arrives."""

    def __hash__(self) -> int:
        os.kill(os.getpid(), signal.SIGUSR1)
        return super().__hash__()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the interpreter makes another error of it, without the first")
def test_a_type_error_of_a_signal_handler_drops_no_reply(peer: IpcPeer) -> None:
    alarms = [TypeError("alarm")]

    def alarm(*_: Any) -> None:
        if alarms:
            raise alarms.pop()

    transport = Memory()
    session = peer.create_session(transport)
    promise = session.request(Ping())
    transport.incoming += [ResponseEnvelope(AlarmingId(promise.id), Pong())]
    old = signal.signal(signal.SIGUSR1, alarm)
    try:
        with pytest.raises(TypeError, match="alarm"):
            peer.tick(0)
        assert promise.wait(0) == Pong()
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_removed_session_leaves_a_custom_transport_open(peer: IpcPeer) -> None:
    memory = Memory()
    session = peer.create_session(memory)
    peer.remove_session(session)
    assert memory.closed == 0 and not session.is_open


def test_handler_sees_the_session_of_the_transport(peer: IpcPeer) -> None:
    memory = Memory()
    session = peer.create_session(memory)
    seen: List[Session] = []
    session.on_message(lambda note, session: seen.append(session))
    memory.incoming.append(Note())
    peer.tick()
    assert seen == [session]


# -- transports that fail, that are many, that have an opinion of their own


class Broken(Memory):
    """receive() always raises."""

    def receive(self) -> List[Message]:
        self.receives += 1
        raise OSError("out of order")


class BrokenWithPipe(WithPipe):
    """The same with a descriptor, which stays readable."""

    def receive(self) -> List[Message]:
        self.receives += 1
        raise OSError("out of order")


@pytest.mark.matrix
@pytest.mark.parametrize("transport_class", [Broken, BrokenWithPipe])
@pytest.mark.parametrize("fileno", [False, True])
@pytest.mark.slow
def test_receive_that_always_raises_is_reported_once_and_costs_nothing(
    peer: IpcPeer, transport_class: Type[Memory], fileno: bool
) -> None:
    if fileno:
        peer.fileno()
    transport = transport_class()
    session = peer.create_session(transport)
    errors: List[Exception] = []
    session.on_exception(errors.append)
    if isinstance(transport, WithPipe):
        transport.put(Note())
    with RawPeer(peer) as raw:
        raw.session.notify(Note(data=bytes(900_000)))  # nobody reads it
        with CpuMeter() as meter, pytest.raises(TimeoutError):
            raw.session.flush(0.25)
        assert meter.real >= 0.25 and meter.cpu < 0.1
        assert 1 <= transport.receives < 5
    tick_until(lambda: not session.is_open, peer)
    (error,) = errors
    assert isinstance(error, OSError) and transport.closed == 1


class Flooding(Memory):
    """Always has a hundred more."""

    def receive(self) -> List[Message]:
        self.receives += 1
        return [Note(str(self.receives))] * 100


def test_transport_without_descriptors_is_not_asked_while_its_inbox_is_long(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit("inbox count hard", 4096, monkeypatch)
    transport = Flooding()
    session = peer.create_session(transport)
    seen: List[Any] = []
    session.on_message(seen.append)
    for _ in range(300):
        read_without_dispatching(peer)
    stopped = transport.receives
    assert seen == []
    assert stopped < 60  # messages that are counted as a long inbox, where nothing can be dispatched
    tick_until(lambda: transport.receives > stopped, peer)  # it has been worked off
    assert len(seen) >= 100 * stopped


def test_silence_is_not_said_of_a_transport_from_which_something_came(peer: IpcPeer) -> None:
    transport = Memory()
    session = peer.create_session(transport)
    with pytest.raises(RequestTimeoutError, match="nothing has ever come"):
        session.request(Ping(), timeout=0.02).wait()
    transport.incoming.append(Note())
    assert session.tick() == 1
    with pytest.raises(RequestTimeoutError) as caught:
        session.request(Ping(), timeout=0.02).wait()
    assert "nothing" not in str(caught.value)


@pytest.mark.parametrize("closing", ["session", "peer", "end"])
@pytest.mark.parametrize("transport_class", [Memory, WithPipe])
def test_transport_is_closed_once_though_an_on_close_handler_is_interrupted(
    transport_class: Type[Memory], closing: str
) -> None:
    peer = IpcPeer(timeout=5)
    transport = transport_class()
    session = peer.create_session(transport)
    calls: List[str] = []

    @session.on_close
    def interrupted(session: Session) -> None:
        calls.append("interrupted")
        raise KeyboardInterrupt

    session.on_close(lambda session: calls.append("behind"))
    with pytest.raises(KeyboardInterrupt):
        if closing == "end":
            transport.incoming.append(StreamClosedError("over"))
            if isinstance(transport, WithPipe):
                transport.put()
            tick_until(lambda: not session.is_open, peer)
        elif closing == "peer":
            peer.close()
        else:
            session.close()
    assert transport.closed == 1
    session.close()
    peer.close()
    assert transport.closed == 1
    assert calls == ["interrupted", "behind"]


def test_class_in_place_of_a_transport_is_refused(peer: IpcPeer) -> None:
    for bad in (Memory, WithPipe, Duck):
        with pytest.raises(TypeError, match="class"):
            peer.create_session(bad)
    assert peer.sessions == ()


class Raising(Memory):
    def send(self, message: Message) -> None:
        raise RuntimeError("cannot send")


def test_broadcast_goes_on_behind_a_transport_that_raises(peer: IpcPeer) -> None:
    first, bad, last = Memory(), Raising(), Memory()
    sessions = [peer.create_session(transport) for transport in (first, bad, last)]
    seen: List[Any] = []
    for session in peer.create_session_pair():
        session.on_message(seen.append)
    errors: List[Exception] = []
    sessions[1].on_exception(errors.append)
    assert peer.broadcast(Note("all")) == 4
    assert first.sent == last.sent == [Note("all")]
    tick_until(lambda: len(seen) == 2, peer)
    assert seen == [Note("all")] * 2
    (error,) = errors
    assert isinstance(error, RuntimeError)


def test_broadcast_that_is_too_large_for_streams_reaches_other_transports() -> None:
    with IpcPeer(timeout=5, max_frame_size=1000) as peer:
        transport = Memory()
        session = peer.create_session(transport)
        a, _ = peer.create_session_pair()
        errors: List[Exception] = []
        a.on_exception(errors.append)
        note = Note(data=bytes(5000))
        assert peer.broadcast(note) == 1
        assert transport.sent == [note]
        (error,) = errors
        assert isinstance(error, FrameTooLargeError)
        assert a.is_open and session.is_open


@pytest.mark.parametrize("how", ["class", "mixin", "later", "instance"])
def test_a_stream_transport_that_wants_to_see_what_is_sent(how: str) -> None:
    seen: List[Message] = []

    class Mixin:
        def send(self, message: Message) -> None:
            seen.append(message)
            StreamTransport.send(self, message)  # type: ignore[arg-type]

    class Noting(StreamTransport):
        if how == "class":
            send = Mixin.send  # type: ignore[assignment]

    class Mixed(Mixin, StreamTransport):  # type: ignore[misc]
        pass

    (r, w), (r2, w2) = os.pipe(), os.pipe()
    with IpcPeer(timeout=5) as peer:
        transport: Any = (Mixed if how == "mixin" else Noting)(w, [r2], PickleMessageSerializer())
        if how == "later":
            Noting.send = Mixin.send  # type: ignore[assignment, method-assign]
        elif how == "instance":
            transport.send = lambda message: Mixin.send(transport, message)
        noting = peer.create_session(transport)
        other = peer.create_stream_session(w2, r)
        other.on_request(lambda message: LogMessage("reply"))
        noting.on_request(lambda message: LogMessage("its reply"))
        got: List[Any] = []
        other.on_message(got.append)
        promise = noting.request(LogMessage("request"))
        assert promise.wait() == LogMessage("reply")
        assert other.request(LogMessage("back")).wait() == LogMessage("its reply")
        noting.notify(LogMessage("notification"))
        assert peer.broadcast(LogMessage("all")) == 2
        tick_until(lambda: len(got) == 2, peer)
        assert seen[0] == RequestEnvelope(promise.id, LogMessage("request"))
        assert isinstance(seen[1], ResponseEnvelope) and seen[1].response == LogMessage("its reply")
        assert seen[2:] == got == [LogMessage("notification"), LogMessage("all")]


class Asked(Memory):
    """A signal comes when it is asked for the n-th time."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 0

    def ask(self) -> Any:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGUSR1)
        return True

    wants_write = queued_bytes = property(ask)


@pytest.mark.parametrize("kind", [Interruption, InterruptionError])
def test_interruption_of_what_is_asked_of_a_transport_passes_through(peer: IpcPeer, kind: Type[BaseException]) -> None:
    def ring(*_: Any) -> None:
        raise kind

    transport = Asked()
    session = peer.create_session(transport)
    old = signal.signal(signal.SIGUSR1, ring)
    try:
        for number in range(1, 100):
            transport.left = number
            try:
                peer.tick(0)
            except kind:
                continue
            assert transport.left > 0, "it was swallowed"
            break
    finally:
        transport.left = 0
        signal.signal(signal.SIGUSR1, old)
    assert number > 3 and session.is_open
    session.close(0)


class Closing(WithPipe):
    """Closes its session in one of its methods."""

    session: Any = None

    def __init__(self, method: str, descriptors: bool) -> None:
        super().__init__()
        self.method = method
        self.descriptors = descriptors
        self.later: List[str] = []  # what was called when it was closed

    def call(self, method: str) -> None:
        if self.closed:
            self.later.append(method)
        elif method == self.method and self.session is not None:
            self.session.close(0)

    def receive(self) -> List[Message]:
        self.call("receive")
        return [Note("received")] if self.method == "receive" and self.session is not None else []

    def read_fds(self) -> List[int]:
        self.call("read_fds")
        return [self.fd] if self.descriptors else []

    def flush(self) -> None:
        self.call("flush")

    def send(self, message: Message) -> None:
        self.call("send")

    @property
    def wants_write(self) -> bool:
        self.call("wants_write")
        return True

    @property
    def write_fd(self) -> Optional[int]:
        self.call("write_fd")
        return self.bell if self.descriptors else None

    @property
    def queued_bytes(self) -> int:
        self.call("queued_bytes")
        return 0


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("method", ["receive", "read_fds", "flush", "send", "wants_write", "write_fd", "queued_bytes"])
def test_transport_that_closes_its_session_is_left_alone(peer: IpcPeer, method: str, descriptors: bool) -> None:
    transport = Closing(method, descriptors)
    session = peer.create_session(transport)
    seen: List[Any] = []
    session.on_message(seen.append)
    session.on_exception(seen.append)
    session.on_close(seen.append)
    transport.session = session
    transport.put()
    for act in (peer.tick, peer.next_deadline, lambda: session.notify(Note())):
        try:
            act()
        except StreamClosedError:
            pass
        if transport.closed:
            break
    peer.tick(0)
    assert transport.closed == 1 and seen == [session] and peer.next_deadline() is None
    assert [name for name in transport.later if name in ("receive", "send", "flush")] == []


@pytest.mark.parametrize("has_descriptor", [True, False])
def test_a_failure_that_lasts_is_not_reported_without_end(peer: IpcPeer, has_descriptor: bool) -> None:
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"x")

    class Failing:
        fails = True

        def send(self, message: Message) -> None:
            pass

        def receive(self) -> List[Message]:
            if self.fails:
                raise MemoryError("there is none")
            self.fails = True
            return [LogMessage("at last")]

        def read_fds(self) -> List[int]:
            return [read_fd] if has_descriptor else []

        def close(self) -> None:
            os.close(read_fd)
            os.close(write_fd)

    clock = set_clock(peer, FakeClock())
    transport = Failing()
    session = peer.create_session(transport)
    seen: List[Exception] = []

    @session.on_exception
    def keep(error: Exception) -> bool:
        seen.append(error)
        return False

    for _ in range(50):
        peer.tick()
    assert len(seen) == 2  # the second one could be another failure
    for round in range(3, 10):
        clock.now += 0.0101
        for _ in range(50):
            peer.tick()
        assert len(seen) == round
    transport.fails = False
    clock.now += 0.0101
    assert session.receive(0) == LogMessage("at last")
    assert session.is_open and len(seen) == 9


@pytest.mark.parametrize("of_streams", [False, True])
def test_a_transport_that_a_session_talks_over_is_refused(peer: IpcPeer, of_streams: bool) -> None:
    one, two = os.pipe(), os.pipe()
    transport: Any = StreamTransport(one[1], [two[0]], PickleMessageSerializer()) if of_streams else Memory()
    session = peer.create_session(transport)
    with pytest.raises(InvalidStreamError, match="belongs to another session of this peer"):
        peer.create_session(transport)
    assert peer.sessions == (session,)
    session.notify(Note("still works"))
    assert not session.queued_bytes and session.is_open
    peer.remove_session(session)
    if not of_streams:
        assert peer.create_session(transport).is_open
    for fd in (*one, *two):
        os.close(fd)


class OwnStreams(StreamTransport):
    """A class of its own, so that its methods are called."""


BOTH_CLASSES = pytest.mark.parametrize("made_of", [StreamTransport, OwnStreams])


@BOTH_CLASSES
@pytest.mark.parametrize("closed", ["transport", "session", "stream"])
def test_a_transport_that_is_closed_is_refused_at_once(peer: IpcPeer, made_of: Any, closed: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        transport = made_of(ours, [ours], PickleMessageSerializer())
        if closed == "session":
            peer.create_session(transport).close()
        elif closed == "transport":
            transport.close()
        else:
            ours.close()
        with pytest.raises(InvalidStreamError, match=rf"^<{made_of.__name__} .*> cannot be used: .* closed") as caught:
            peer.create_session(transport)
        assert "while a session" not in str(caught.value) and not peer.sessions
        transport.close()


@BOTH_CLASSES
def test_a_transport_whose_end_was_received_already_makes_a_session_that_ends(peer: IpcPeer, made_of: Any) -> None:
    ours, theirs = socket.socketpair()
    transport = made_of(ours, [ours], PickleMessageSerializer())
    theirs.close()
    with pytest.raises(StreamClosedError):
        transport.receive()
    session = peer.create_session(transport)
    with pytest.raises(StreamClosedError, match="the other side closed the stream"):
        session.receive(5)
    tick_until(lambda: not session.is_open, peer)
    assert ours.fileno() == -1


@BOTH_CLASSES
def test_a_transport_that_is_refused_is_as_it_was(peer: IpcPeer, made_of: Any) -> None:
    ours, theirs = socket.socketpair()
    unused, write = os.pipe()
    session = peer.create_stream_session(write, ours)
    transport = made_of(ours, [ours], PickleMessageSerializer())
    with pytest.raises(InvalidStreamError, match=f"descriptor {ours.fileno()} .* belongs to another session"):
        peer.create_session(transport)
    assert peer.sessions == (session,)
    peer.remove_session(session)
    assert " open " in repr(transport)
    session = peer.create_session(transport)
    session.notify(Note("works"))
    theirs.setblocking(True)
    assert theirs.recv(1000) == framed(Note("works"))
    theirs.sendall(framed(Note("works, too")))
    assert session.receive(5) == Note("works, too")
    theirs.close()
    os.close(unused)
    os.close(write)


@pytest.mark.parametrize("odd", ["a", None, 1.5, 2**40, {}])
@pytest.mark.parametrize("attribute", ["read_fds", "write_fd"])
def test_what_is_no_descriptor_fails_its_session_and_no_other(peer: IpcPeer, attribute: str, odd: Any) -> None:
    class Odd(Memory):
        odd = False
        wants_write = True

        def read_fds(self) -> Any:
            return [odd] if self.odd and attribute == "read_fds" else []

        @property
        def write_fd(self) -> Any:
            return odd if self.odd and attribute == "write_fd" else None

    transport = Odd()
    session = peer.create_session(transport)
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    errors: List[BaseException] = []
    session.on_exception(errors.append)
    assert a.request(Ping(1)).wait() == Pong(1)
    transport.odd = True
    assert a.request(Ping(2)).wait() == Pong(2)
    peer.tick(0)
    expected = odd is not None or attribute == "read_fds"
    assert len(errors) == expected and session.is_open != expected
    transport.wants_write = False  # or closing waits for what is to be written


# -- descriptors that have another owner


class Naming(Memory):
    """Names any descriptors as those that it reads, and one as what it waits for to write."""

    def __init__(self, *fds: int, write_fd: Optional[int] = None) -> None:
        super().__init__()
        self.fds = fds
        self.writes_to = write_fd

    @property
    def wants_write(self) -> bool:
        return self.writes_to is not None

    @property
    def write_fd(self) -> Optional[int]:
        return self.writes_to

    def read_fds(self) -> List[int]:
        return [*self.fds]


def naming(sock: Any, how: str) -> Naming:
    return Naming(write_fd=sock.fileno()) if how == "write_fd" else Naming(sock.fileno())


BOTH_WAYS = pytest.mark.parametrize("how", ["read_fds", "write_fd"])


@BOTH_WAYS
def test_a_transport_that_names_another_sessions_descriptor_is_refused(peer: IpcPeer, how: str) -> None:
    a, b = peer.create_session_pair()
    transport = naming(a.socket, how)
    with pytest.raises(InvalidStreamError, match="belongs to another session of this peer"):
        peer.create_session(transport)
    assert peer.sessions == (a, b) and not transport.closed
    for session, other in ((a, b), (b, a)):
        other.notify(Note("still works"))
        assert session.receive(5) == Note("still works")
    a.close()
    transport.fds, transport.writes_to = (), None
    assert peer.create_session(transport).is_open


@BOTH_WAYS
def test_a_transport_that_comes_to_name_another_sessions_descriptor_fails_alone(peer: IpcPeer, how: str) -> None:
    transport = Naming()
    session = peer.create_session(transport)
    errors: List[BaseException] = []
    session.on_exception(errors.append)
    a, b = peer.create_session_pair()
    taken = naming(a.socket, how)
    transport.fds, transport.writes_to = taken.fds, taken.writes_to
    peer.tick(0)
    transport.writes_to = None  # or closing waits for what is to be written
    b.notify(Note("1"))
    assert a.receive(5) == Note("1")
    tick_until(lambda: not session.is_open, peer)
    assert ["belongs to another session of this peer" in str(error) for error in errors] == [True]
    assert isinstance(errors[0], InvalidStreamError)
    b.notify(Note("2"))
    assert a.receive(5) == Note("2") and a.is_open


@BOTH_WAYS
def test_a_transport_that_names_a_listeners_descriptor_is_refused(peer: IpcPeer, how: str, tmp_path: Any) -> None:
    made: List[Session] = []
    with peer.listen(str(tmp_path / "s"), made.append) as listener:
        fd = listening_fd(listener)
        with pytest.raises(InvalidStreamError, match="belongs to another session of this peer, or to a listener"):
            peer.create_session(Naming(write_fd=fd) if how == "write_fd" else Naming(fd))
        with pytest.raises(InvalidStreamError, match="belongs to another session of this peer, or to a listener"):
            peer.create_stream_session(fd, fd)
        session = peer.connect(str(tmp_path / "s"))
        tick_until(lambda: made, peer)
        made[0].notify(Note("still listens"))
        assert session.receive(5) == Note("still listens")


def test_of_two_transports_over_one_socket_the_first_has_it_until_it_lets_it_go(peer: IpcPeer) -> None:
    sock, far = socket.socketpair()
    with sock, far:
        first, second = Naming(sock.fileno()), Naming(sock.fileno())
        session = peer.create_session(first)
        with pytest.raises(InvalidStreamError, match="belongs to another session"):
            peer.create_session(second)
        with pytest.raises(InvalidStreamError, match="belongs to another session"):
            peer.create_socket_session(sock)
        first.fds = ()  # it is asked at once, not in the next turn only
        other = peer.create_session(second)
        assert session.is_open and other.is_open
        other.close()
        assert peer.create_socket_session(sock).is_open


def test_what_an_interruption_has_left_keeps_nobody_from_a_descriptor(peer: IpcPeer) -> None:
    number = 0
    while True:
        number += 1
        sock, far = socket.socketpair()
        session = peer.create_socket_session(sock)
        with InterruptAt(number, InterruptionError()) as interrupted:
            try:
                peer.remove_session(session)
            except InterruptionError:
                pass
        peer.tick(0)
        if not session.is_open:
            peer.create_session(Naming(sock.fileno())).close()
        session.close()
        sock.close()
        far.close()
        if not interrupted.hit:
            break
    assert number > 10
