"""Batches, queues and floods: what is sent leaves in order and whole, and nothing grows without limit."""

import os
import socket
import threading
import tracemalloc
from typing import Any, List, Type

import pytest

from stream_ipc import IpcPeer, Message, RequestTimeoutError, ResponseEnvelope, StreamClosedError
from tests.helpers import (
    PATIENCE,
    WAIT,
    CpuMeter,
    HurryingClock,
    RawPeer,
    drop_queued,
    framed,
    no_pending,
    received_bytes,
    reply_bytes,
    request_bytes,
    set_clock,
    set_limit,
    socket_peers,
    tick_until,
    unframe,
    values,
)
from tests.messages import Note, Ping, Pong

MIB = 1 << 20


# -- batches


def record_lengths(sock: socket.socket) -> List[int]:
    lengths = []
    while True:
        try:
            lengths.append(len(sock.recv(MIB)))
        except BlockingIOError:
            return lengths


@pytest.mark.skipif(not hasattr(socket, "SOCK_SEQPACKET"), reason="needs a socket that shows single writes")
def test_batch_gathers_into_few_writes(peer: IpcPeer) -> None:
    # A sequenced-packet socket keeps the borders of writes, so they can be counted.
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    read, write = os.pipe()
    with right:
        right.setblocking(False)
        session = peer.create_stream_session(left.detach(), read)
        for index in range(100):
            session.notify(Note(str(index)))
        assert len(record_lengths(right)) == 100  # each by itself leaves at once
        with session.batch():
            for index in range(400):
                session.notify(Note(str(index)))
        lengths = record_lengths(right)
        while session.queued_bytes:
            peer.tick()
            lengths += record_lengths(right)
        assert len(lengths) <= 40 and sum(lengths) > 400 * 20
        session.close()
        os.close(write)


def test_batch_is_out_when_it_ends(raw: RawPeer) -> None:
    with raw.session.batch() as inside:
        assert inside is raw.session
        for index in range(5):
            raw.session.notify(Note(str(index)))
    assert values(raw.messages()) == list("01234") and raw.session.queued_bytes == 0


@pytest.mark.parametrize("of", ["peer", "session", "wait", "flush", "receive"])
def test_batch_is_out_when_a_tick_begins(raw: RawPeer, of: str) -> None:
    with raw.session.batch():
        raw.session.notify(Note("1"))
        if of == "peer":
            raw.session.peer.tick()
        elif of == "session":
            raw.session.tick()
        elif of == "flush":
            raw.session.flush()
        elif of == "receive":
            with pytest.raises(TimeoutError):
                raw.session.receive(0)
        else:
            with pytest.raises(RequestTimeoutError):
                raw.session.request(Ping(), timeout=0).wait()
            assert len(raw.messages()) == 2
            return
        assert raw.messages() == [Note("1")]


def test_requests_inside_a_batch(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    with a.batch():
        promises = [a.request(Ping(index), expect=Pong) for index in range(500)]
        assert a.request(Ping("nested"), expect=Pong).wait().value == "nested"
    assert [promise.wait().value for promise in promises] == list(range(500))


def test_batch_of_another_session_leaves_when_the_peer_ticks(peer: IpcPeer) -> None:
    with RawPeer(peer) as one, RawPeer(peer) as two:
        with one.session.batch():
            one.session.notify(Note("1"))
            two.session.tick()
            assert one.messages() == [Note("1")]


def test_batches_in_batches_and_errors_inside(raw: RawPeer) -> None:
    with pytest.raises(LookupError):
        with raw.session.batch():
            with raw.session.batch():
                raw.session.notify(Note("1"))
            raw.session.notify(Note("2"))
            raise LookupError
    assert values(raw.messages()) == ["1", "2"]
    raw.session.notify(Note("3"))
    assert values(raw.messages()) == ["3"]  # it is over


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, KeyError, StreamClosedError])
def test_what_a_block_raises_comes_out_though_the_other_side_is_gone(raw: RawPeer, kind: Type[BaseException]) -> None:
    error = kind("mine")
    with pytest.raises(kind) as caught:
        with raw.session.batch() as session:
            session.notify(Note("x"))
            raw.sock.close()
            raise error
    assert caught.value is error and error.__context__ is None
    raw.session.peer.tick()
    assert not raw.session.is_open


def test_batches_that_end_in_another_order_than_they_began(raw: RawPeer) -> None:
    first, second = raw.session.batch(), raw.session.batch()
    first.__enter__()
    second.__enter__()
    raw.session.notify(Note("both"))
    first.__exit__(None, None, None)
    raw.session.notify(Note("the second"))
    assert raw.messages() == []
    second.__exit__(None, None, None)
    assert raw.messages() == [Note("both"), Note("the second")]
    raw.session.notify(Note("none"))
    assert raw.messages() == [Note("none")]
    with raw.session.batch():
        raw.session.notify(Note("another"))
        assert raw.messages() == []
    assert raw.messages() == [Note("another")] and raw.session.queued_bytes == 0


def test_batch_that_begins_while_another_is_written(peer: IpcPeer) -> None:
    read, write = os.pipe()
    writes: List[int] = []

    class Stream:
        def write(self, data: bytes) -> int:
            writes.append(len(data))
            if len(writes) == 1:
                second.__enter__()
            return len(data)

    session = peer.create_stream_session(Stream(), read)
    first, second = session.batch(), session.batch()
    with first:
        session.notify(Note("first"))
    session.notify(Note("second"))
    assert len(writes) == 1
    peer.tick(0)
    assert len(writes) == 2  # it is out when a tick begins
    second.__exit__(None, None, None)
    os.close(write)


def test_tick_inside_a_batch_waits_until_its_time_is_over_or_something_comes(raw: RawPeer) -> None:
    clock = set_clock(raw.session.peer, HurryingClock())
    with raw.session.batch():
        raw.session.tick(0)
        start = clock.now
        assert raw.session.peer.tick(20) == 0 and clock.now >= start + 20

        def write_at_last() -> None:
            if clock.now == start + 60:
                raw.write(framed(Note()))

        start = clock.now
        clock = set_clock(raw.session.peer, HurryingClock(write_at_last))
        clock.now = start
        assert raw.session.peer.tick(None) == 1 and clock.now >= start + 60
        raw.session.notify(Note("gathered"))
        assert raw.messages() == []
        raw.session.peer.tick(5)  # what it writes is something that happens
        assert raw.messages() == [Note("gathered")]


def test_batch_in_a_handler_gathers_replies(raw: RawPeer) -> None:
    there: List[int] = []

    @raw.session.on_request
    def answer(ping: Ping) -> Pong:
        there.append(len(raw.messages()))
        return Pong(ping.value)

    @raw.session.on_message
    def begin(note: Note) -> None:
        with raw.session.batch():
            # Nested, with the batch open: its beginning sends what was gathered, not what its handlers answer.
            raw.write(*(request_bytes(str(index), Ping(index)) for index in range(5)))
            tick_until(lambda: len(there) == 5, raw.session)

    raw.write(framed(Note()))
    tick_until(lambda: len(there) == 5, raw.session)
    rest = raw.messages()
    assert sum(there) + len(rest) == 5 and no_pending(raw.session)
    assert [m.id for m in rest if isinstance(m, ResponseEnvelope)][-1] == "4"


def test_batch_and_the_end_of_the_session(peer: IpcPeer) -> None:
    with RawPeer(peer) as one:
        with one.session.batch():
            one.session.notify(Note("1"))
            one.session.close()
        assert one.messages() == [Note("1")]
    with RawPeer(peer) as two:
        with pytest.raises(StreamClosedError):
            with two.session.batch():
                two.sock.close()
                two.session.notify(Note("1"))
        tick_until(lambda: not two.session.is_open, peer)


def test_batch_keeps_order_with_large_messages(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    seen: List[Any] = []
    b.on_message(lambda note: seen.append((note.text, len(note.data))))
    expected = []
    with a.batch():
        for index in range(60):
            size = (10, 5000, 100000)[index % 3]
            expected.append((str(index), size))
            a.notify(Note(str(index), b"x" * size))
    tick_until(lambda: len(seen) == 60, peer)
    assert seen == expected


# -- flush and the queue


def test_queued_bytes_and_flush(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    seen: List[int] = []
    b.on_message(lambda note: seen.append(len(note.data)))
    assert a.queued_bytes == 0
    a.flush()
    a.notify(Note(data=b"x" * 800000))
    queued = a.queued_bytes
    assert 0 < queued <= 800100
    a.flush(20)
    assert a.queued_bytes == 0
    assert seen == []  # flushing runs no handlers
    tick_until(lambda: seen, peer)
    assert seen == [800000]


def test_flush_gives_up_in_time_and_loses_nothing(raw: RawPeer) -> None:
    raw.session.notify(Note(data=b"x" * 800000))
    with CpuMeter() as meter, pytest.raises(TimeoutError) as caught:
        raw.session.flush(0.05)
    assert not isinstance(caught.value, RequestTimeoutError)
    assert 0.05 <= meter.real < 5
    data = b""
    while raw.session.queued_bytes:
        data += raw.read()
        raw.session.tick()
    data += raw.read()
    assert len(unframe(data)) == 1


def test_flush_ends_when_the_other_side_does(raw: RawPeer) -> None:
    raw.session.notify(Note(data=b"x" * 800000))
    raw.sock.close()
    with pytest.raises(StreamClosedError):
        raw.session.flush(20)
    tick_until(lambda: not raw.session.is_open, raw.session.peer)
    with pytest.raises(StreamClosedError):
        raw.session.flush()


def test_flush_goes_on_while_the_other_side_only_stops_writing(raw: RawPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("flush bound", PATIENCE, monkeypatch)
    note = Note(data=bytes(800_000))
    raw.session.notify(note)
    raw.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(TimeoutError, match="bytes are still queued"):
        raw.session.flush(0)  # which sees the end
    got = bytearray()

    def read() -> None:
        raw.sock.settimeout(PATIENCE)
        while len(got) < len(framed(note)):
            got.extend(raw.sock.recv(1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    raw.session.flush(PATIENCE)
    reader.join()
    assert raw.session.queued_bytes == 0 and raw.session.is_open and unframe(bytes(got)) == [note]


def test_what_was_sent_does_not_stay_in_memory(raw: RawPeer) -> None:
    session = raw.session
    session.notify(Note("warm"))
    tracemalloc.start()
    try:
        session.notify(Note(data=bytes(8_000_000)))
        while session.queued_bytes:
            raw.read()
            session.transport.flush()
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


def fill(raw: RawPeer, limit: int = 64 * MIB) -> List[str]:
    """Notify until it is refused; returns what was accepted."""
    sent: List[str] = []
    for index in range(limit // 65536):
        try:
            raw.session.notify(Note(str(index), b"x" * 65536))
        except RequestTimeoutError:
            return sent
        sent.append(str(index))
    raise AssertionError("it takes everything, though nobody reads")


@pytest.mark.slow
def test_reader_that_never_reads_bounds_memory_and_gets_what_was_accepted() -> None:
    with IpcPeer(timeout=0.1) as peer, RawPeer(peer) as raw:
        tracemalloc.start()
        try:
            sent = fill(raw)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert sent and peak < 16 * MIB
        queued = raw.session.queued_bytes
        # Every further message is refused whole, whatever its size, and is not sent later either.
        with CpuMeter() as meter:
            with pytest.raises(RequestTimeoutError) as caught:
                raw.session.notify(Note("refused", b"x" * 100))
            assert caught.value.timeout == 0.1
            with pytest.raises(RequestTimeoutError) as caught:
                raw.session.request(Ping("refused"), timeout=0.05)
            assert caught.value.timeout == 0.05
        assert 0.15 <= meter.real < 5 and meter.cpu < 0.1
        assert raw.session.queued_bytes == queued and no_pending(raw.session)
        data = bytearray()
        while raw.session.queued_bytes:
            data += raw.read()
            peer.tick()
        data += raw.read()
        assert values(unframe(bytes(data))) == sent
        raw.session.notify(Note("again"))
        assert raw.messages() == [Note("again")]


def test_stuck_session_hinders_no_other() -> None:
    with IpcPeer(timeout=0.05) as peer, RawPeer(peer) as stuck:
        a, b = peer.create_session_pair()
        b.on_request(lambda ping: Pong(ping.value))
        fill(stuck)
        assert a.request(Ping(1), expect=Pong, timeout=20).wait().value == 1


@pytest.mark.slow
def test_sending_into_a_full_queue_reads_but_does_not_dispatch() -> None:
    with IpcPeer(timeout=0.3) as peer, RawPeer(peer) as raw:
        seen: List[str] = []
        raw.session.on_message(lambda note: seen.append(note.text))
        fill(raw)
        expected = [str(index) for index in range(300)]
        data = b"".join(framed(Note(text, b"y" * 4000)) for text in expected)
        sent = 0
        # As much as the socket takes; the session must take the rest off it while it waits for room to send.
        before = 0
        for _ in range(200):
            try:
                while sent < len(data):
                    sent += raw.sock.send(data[sent : sent + MIB])
            except BlockingIOError:
                pass
            if sent == len(data):
                break
            before = sent
            with pytest.raises(RequestTimeoutError):
                raw.session.request(Ping(), timeout=0.01)
        assert sent == len(data) > before > 0
        assert seen == []
        data2 = bytearray()
        while raw.session.queued_bytes or len(seen) < 300:
            data2 += raw.read()
            peer.tick()
        assert seen == expected


def test_two_sessions_of_one_peer_flood_each_other(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    got: List[List[str]] = [[], []]
    a.on_message(lambda note: got[0].append(note.text))
    b.on_message(lambda note: got[1].append(note.text))
    for index in range(120):
        a.notify(Note(str(index), b"x" * 65536))
        b.notify(Note(str(index), b"x" * 65536))
    tick_until(lambda: len(got[0]) == len(got[1]) == 120, peer)
    assert got == [[str(index) for index in range(120)]] * 2


def test_requests_that_flood_each_other_are_all_answered(peer: IpcPeer) -> None:
    # Both ask before they answer, and the questions alone are more than the sockets and the queues hold.
    with IpcPeer(timeout=20) as other:
        a, b = socket_peers(peer, other)
        for session in (a, b):
            session.on_request(lambda ping: Pong(len(ping.value)))
        promises = []
        for _ in range(14):
            promises.append(a.request(Ping(b"x" * 60000), expect=Pong))
            promises.append(b.request(Ping(b"x" * 60000), expect=Pong))
        tick_until(lambda: all(promise.done for promise in promises), peer, other)
        assert [promise.wait().value for promise in promises] == [60000] * 28


def test_replies_to_a_side_that_does_not_read_do_not_pile_up(raw: RawPeer) -> None:
    # Requests wait while the replies to the ones before are not taken.
    answered: List[int] = []

    @raw.session.on_request
    def answer(ping: Ping) -> Pong:
        answered.append(ping.value)
        return Pong(b"x" * 200000)

    raw.write(*(request_bytes(str(index), Ping(index)) for index in range(200)))
    for _ in range(50):
        raw.session.tick()
    assert 0 < len(answered) < 30 and raw.session.queued_bytes < 8 * MIB
    with CpuMeter() as meter:
        raw.session.tick(WAIT)
    assert not meter.spins, "it spins on what cannot be dispatched"
    ids: List[str] = []
    data = b""
    while len(ids) < 200:
        data += raw.read()
        while len(data) >= 8 and len(data) >= 8 + int.from_bytes(data[4:8], "big"):
            size = 8 + int.from_bytes(data[4:8], "big")
            (reply,) = unframe(data[:size])
            ids.append(reply.id)  # type: ignore[attr-defined]
            data = data[size:]
        raw.session.tick()
    assert ids == [str(index) for index in range(200)] and answered == list(range(200))


# -- bounded reading


def test_slow_consumer_bounds_what_is_read(raw: RawPeer) -> None:
    # The consumer takes one message each time; the other side offers as much as there is room for.
    note = framed(Note("x", b"y" * 1000))
    accepted = consumed = pending = 0
    most = 0
    block = note * 64
    for _ in range(1500):
        try:
            while True:
                count = raw.sock.send(block[pending:])
                accepted += count
                pending = (pending + count) % len(block)
        except BlockingIOError:
            pass
        raw.session.receive(20)
        consumed += len(note)
        most = max(most, accepted - consumed)
    assert most < 8 * MIB


def test_handler_that_waits_during_a_flood_bounds_what_is_read() -> None:
    with IpcPeer(timeout=20) as peer, RawPeer(peer) as raw:
        note = framed(Note("x", b"y" * 1000))
        block = note * 64
        offered = [0]
        state = {"pending": 0}
        running = [False]

        def offer() -> None:
            try:
                while True:
                    count = raw.sock.send(block[state["pending"] :])
                    offered[0] += count
                    state["pending"] = (state["pending"] + count) % len(block)
            except BlockingIOError:
                pass

        seen: List[int] = []

        @raw.session.on_message
        def handler(message: Message) -> None:
            seen.append(1)
            if not running[0]:
                running[0] = True
                for _ in range(100):
                    offer()
                    peer.tick()

        offer()
        peer.tick()
        assert offered[0] - len(seen) * len(note) < 16 * MIB


def test_reply_in_a_long_stream_is_found(raw: RawPeer) -> None:
    promise = raw.session.request(Ping(), expect=Pong)
    note = framed(Note("x", b"y" * 200))
    data = note * 20000 + reply_bytes(promise.id, Pong("there"))
    sent = 0
    count = [0]
    raw.session.on_message(lambda note: count.__setitem__(0, count[0] + 1))
    while sent < len(data):
        try:
            sent += raw.sock.send(data[sent : sent + MIB])
        except BlockingIOError:
            raw.session.tick()
    assert promise.wait().value == "there" and count[0] == 20000


# -- how much is read before it is dispatched


@pytest.mark.parametrize("queued", [0, MIB // 2])
@pytest.mark.parametrize("limit", ["inbox bytes", "inbox count"])
def test_inbox_that_handlers_do_not_work_off_is_bounded(
    raw: RawPeer, monkeypatch: pytest.MonkeyPatch, limit: str, queued: int
) -> None:
    set_limit(limit, 100_000 if limit == "inbox bytes" else 100, monkeypatch)
    raw.session.notify(Note("", bytes(queued)))
    assert (raw.session.queued_bytes > 0) == (queued > 0)  # which keeps no request waiting

    def fail(note: Note) -> None:
        raise ValueError(note.text)

    raw.session.on_message(fail)
    note = framed(Note("", bytes(1000)))
    sent = 0
    for _ in range(300):
        try:
            while True:
                sent += raw.sock.send(note * 50)
        except BlockingIOError:
            pass
        with pytest.raises(ValueError):  # so each tick dispatches one and reads more
            raw.session.peer.tick()
    # What is read at a time comes on top.
    assert received_bytes(raw.session) < 300 * len(note) + 100_000 + 2 * 65536
    raw.session.off_message(fail)
    tick_until(lambda: "inbox=0" in repr(raw.session) and not raw.session.peer.tick(), raw.session.peer)
    assert received_bytes(raw.session) > sent - 1100  # it was read on; half a note may be left
    drop_queued(raw.session)
    raw.sock.close()


@pytest.mark.parametrize("limit", ["inbox bytes hard", "inbox count hard"])
def test_inbox_is_bounded_though_a_send_must_wait(
    peer: IpcPeer, raw: RawPeer, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    set_limit(limit, 300_000 if limit == "inbox bytes hard" else 300, monkeypatch)
    set_limit("inbox count", 10, monkeypatch)
    raw.session.notify(Note("", bytes(MIB)))
    assert raw.session.queued_bytes
    note = framed(Note("", bytes(1000)))
    for _ in range(50):
        try:
            while True:
                raw.sock.send(note * 50)
        except BlockingIOError:
            pass
        with pytest.raises(TimeoutError):
            raw.session.flush(0)
    assert 290_000 < received_bytes(raw.session) < 400_000 + 2 * 65536


def test_inbox_of_requests_goes_on_while_replies_are_queued(
    peer: IpcPeer, raw: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two sides that only write would wait for each other.
    set_limit("inbox count", 10, monkeypatch)
    raw.session.on_request(lambda ping: Pong(ping.value))
    raw.session.notify(Note("", bytes(2 * MIB)))
    assert raw.session.queued_bytes > MIB
    for start in range(0, 400, 100):
        raw.write(*[request_bytes(str(index), Ping(index)) for index in range(start, start + 100)])
        peer.tick()
    assert "inbox=400 " in repr(raw.session)
    data = b""
    while "inbox=0 queued=0" not in repr(raw.session):
        data += raw.read()
        peer.tick()
    replies: List[Any] = unframe(data + raw.read())[1:]
    assert [reply.response.value for reply in replies] == list(range(400))
