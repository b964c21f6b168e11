"""receive(): what came before is kept, expect, and what is dropped."""

import logging
import sys
from typing import Any, List

import pytest

from stream_ipc import IpcPeer, LogMessage, Message, PickleMessageSerializer, StreamClosedError
from stream_ipc.core.receiving import KEPT_COUNT
from tests.helpers import CallAt, RawPeer, framed, reply_bytes, tick_until, values
from tests.messages import Note, Ping, Pong


def test_what_a_tick_has_dispatched_is_received(raw: RawPeer) -> None:
    raw.write(framed(Note("a")), framed(Note("b")))
    assert raw.session.tick(20) == 2
    assert raw.session.receive(0) == Note("a") and raw.session.receive(0) == Note("b")
    with pytest.raises(TimeoutError):
        raw.session.receive(0)


def test_what_a_wait_has_dispatched_is_received(raw: RawPeer) -> None:
    promise = raw.session.request(Ping())
    raw.write(framed(Note("a")), reply_bytes(promise.id, Pong()))
    promise.wait()
    assert raw.session.receive(0) == Note("a")


def test_what_a_handler_has_seen_is_not_kept(raw: RawPeer) -> None:
    seen: List[Any] = []
    raw.session.on_message(seen.append)
    raw.write(framed(Note("a")))
    raw.session.tick(20)
    with pytest.raises(TimeoutError):
        raw.session.receive(0)
    assert seen == [Note("a")]


def test_handlers_that_came_later_see_what_receive_returns(raw: RawPeer) -> None:
    seen: List[Any] = []
    raw.write(framed(Note("a")), framed(Note("b")))
    raw.session.tick(20)
    raw.session.on_message(seen.append)
    assert seen == [] and raw.session.receive(0) == Note("a") and seen == [Note("a")]

    def fail(note: Note) -> None:
        raise LookupError(note.text)

    raw.session.on_message(fail)
    with pytest.raises(LookupError, match="b"):
        raw.session.receive(0)
    assert seen == [Note("a"), Note("b")]
    assert raw.session.receive(0) == Note("b") and len(seen) == 2


def test_a_later_handler_that_receives_what_is_being_returned(raw: RawPeer) -> None:
    inner: List[Any] = []
    raw.write(framed(Note("a")), framed(Note("b")), framed(Note("c")))
    raw.session.tick(20)

    def receives(note: Note) -> None:
        if note.text == "a":
            inner.append(raw.session.receive(0))

    raw.session.on_message(receives)
    assert [raw.session.receive(0), *inner] == [Note("b"), Note("a")]
    assert raw.session.receive(0) == Note("c")
    with pytest.raises(TimeoutError):
        raw.session.receive(0)


def test_expect_leaves_the_others(raw: RawPeer) -> None:
    raw.write(framed(Note("a")), framed(LogMessage("log")), framed(Note("b")), framed(Ping(1)))
    log: LogMessage = raw.session.receive(20, expect=LogMessage)
    assert log.message == "log"
    assert raw.session.receive(20, expect=Ping) == Ping(1)
    assert [raw.session.receive(0), raw.session.receive(0)] == [Note("a"), Note("b")]
    with pytest.raises(TimeoutError, match="of class Pong within 0 s"):
        raw.session.receive(0, expect=Pong)
    for bad in (int, "Note", None):
        with pytest.raises(TypeError):
            raw.session.receive(0, expect=bad)  # type: ignore[call-overload]


def test_expect_with_handlers(raw: RawPeer) -> None:
    seen: List[Message] = []
    raw.session.on_message(seen.append)
    raw.write(framed(Note("a")), framed(LogMessage("log")), framed(Note("b")))
    assert raw.session.receive(20, expect=LogMessage) == LogMessage("log")
    assert raw.session.receive(20) == Note("b")
    assert seen == [Note("a"), LogMessage("log"), Note("b")]
    with pytest.raises(TimeoutError):
        raw.session.receive(0)


def test_nested_calls_get_one_each(raw: RawPeer) -> None:
    got: List[Message] = []

    @raw.session.on_message
    def nested(note: Note) -> None:
        if note.text == "a":
            got.append(raw.session.receive(20, expect=Ping))

    raw.write(framed(Note("a")), framed(Note("b")), framed(Ping(1)), framed(Note("c")))
    assert raw.session.receive(20, expect=Note) == Note("a")
    assert got == [Ping(1)]


def test_a_handler_does_not_receive_what_it_is_called_with(raw: RawPeer) -> None:
    got: List[Message] = []

    @raw.session.on_message
    def nested(note: Note) -> None:
        if note.text == "a":
            got.append(raw.session.receive(20))

    raw.write(framed(Note("a")), framed(Note("b")), framed(Note("c")))
    assert raw.session.receive(20) == Note("a")  # as a tick would have called it
    assert got == [Note("b")]
    assert raw.session.receive(20) == Note("c")


def test_kept_messages_outlive_the_session(raw: RawPeer) -> None:
    raw.write(framed(Note("last")))
    raw.session.tick(20)
    raw.sock.close()
    raw.session.peer.tick(20)
    assert not raw.session.is_open and raw.session.receive() == Note("last")
    with pytest.raises(StreamClosedError):
        raw.session.receive()


def test_the_newest_are_kept(raw: RawPeer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "stream_ipc"):
        for start in range(0, KEPT_COUNT + 200, 100):
            raw.write(*[framed(Note(str(start + index))) for index in range(100)])
            raw.session.tick(20)
    assert len([record for record in caplog.records if "receive()" in record.message]) == 1
    assert raw.session.receive(0) == Note("200")
    assert [raw.session.receive(0) for _ in range(KEPT_COUNT - 1)][-1] == Note(str(KEPT_COUNT + 199))
    with pytest.raises(TimeoutError):
        raw.session.receive(0)


def test_a_signal_handler_that_ticks_loses_nothing_that_is_received(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_ipc.core.receiving.KEPT_COUNT", 3)
    number = 0
    while True:
        number += 1
        with IpcPeer() as peer, RawPeer(peer) as raw:
            raw.write(*[framed(Note(str(index))) for index in range(3)])
            peer.tick(20)
            raw.write(framed(Note("3")))
            with CallAt(number, lambda *_: peer.tick(20)) as signal:  # one more is kept, so the oldest is dropped
                first = raw.session.receive(0)
            if not signal.hit:
                break
            got = values([first, *[raw.session.receive(0) for _ in range(2)]])
            assert got == ["1", "2", "3"] or (got == ["0", "1", "2"] and raw.session.receive(0) == Note("3")), signal.where
    assert number > 10


def test_large_ones_are_kept_up_to_a_size(peer: IpcPeer, caplog: pytest.LogCaptureFixture) -> None:
    here, there = peer.create_session_pair()
    with caplog.at_level(logging.WARNING, "stream_ipc"):
        for index in range(12):
            there.notify(Note([{"x": "y" * 500_000}] if index < 11 else "last"))  # type: ignore[arg-type]
            here.tick(20)
    assert caplog.records
    kept = []
    while not kept or kept[-1] != Note("last"):
        kept.append(here.receive(20))
    assert 5 < len(kept) <= 10


def test_text_that_is_no_message_is_not_kept(raw: RawPeer) -> None:
    raw.write(b"stray text\n", framed(LogMessage("x", LogMessage.LEVEL_JUNK)))
    raw.session.tick(20)
    assert raw.session.receive(0) == LogMessage("x", "junk")  # this one was sent as a message
    raw.write(b"more\n")
    assert raw.session.receive(20) == LogMessage("more\n", "junk")  # whoever waits gets it


def test_stderr_of_a_child_is_not_kept(peer: IpcPeer) -> None:
    code = "import sys; print('hello', file=sys.stderr, flush=True); sys.stdin.read()"
    session = peer.create_command_session([sys.executable, "-c", code])
    assert session.tick(20)
    with pytest.raises(TimeoutError):
        session.receive(0)


@pytest.mark.parametrize("unsafe", [False, True])
def test_text_of_a_child_that_is_sent_on_is_a_message_like_any_other(unsafe: bool) -> None:
    with IpcPeer(serializer=PickleMessageSerializer(unsafe=unsafe)) as peer, RawPeer(peer) as raw:
        a, b = peer.create_session_pair()
        raw.session.on_message(a.notify)
        raw.write(b"stray text\n")
        tick_until(lambda: peer.tick(0) == 0, peer)
        assert b.receive(0) == LogMessage("stray text\n", LogMessage.LEVEL_JUNK)


def test_errors_of_decoding_are_kept(raw: RawPeer) -> None:
    from tests.helpers import frame

    raw.write(frame(b"nonsense"))
    raw.session.tick(20)
    assert type(raw.session.receive(0)).__name__ == "ErrorMessage"


def test_what_a_call_is_about_to_return_is_not_dropped_for_newer_ones(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()

    @a.on_request
    def flood(ping: Ping) -> Pong:
        for number in range(1001):
            a.notify(Note(str(number)))
        return Pong()

    @b.on_message
    def wait(message: LogMessage) -> None:
        b.request(Ping()).wait()

    a.notify(LogMessage("first"))
    assert b.receive(5, expect=LogMessage) == LogMessage("first")
    assert [b.receive(0).text for _ in range(999)] == [str(number) for number in range(2, 1001)]
