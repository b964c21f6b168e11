"""Where each resource ends, as the table in README.rst of this folder says: at the limit all works, one beyond does not.

Most tests are where the resource has its other tests; here are the rest, and a check of the table.
"""

import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any, List

import pytest

from stream_ipc import (
    DeferredReply,
    IpcPeer,
    RequestTimeoutError,
    SerializationError,
    WorkerPool,
    gather,
)
from stream_ipc.core.receiving import KEPT_BYTES, KEPT_COUNT
from stream_ipc.core.sending import HIGH_WATER
from stream_ipc.wire.codec import LINE_MAX, TextDecoder
from tests.helpers import RawPeer, framed, limit, request_bytes, set_limit, tick_until
from tests.messages import Note, Ping, Pong

FOLDER = Path(__file__).parent


def rows() -> List[List[str]]:
    """Return the cells of the table of limits in README.rst; a line without a first cell goes on with the row."""
    text = (FOLDER / "README.rst").read_text()
    table = text[text.index("\nLimits\n") :]
    lines = table[table.index("====") :].split("\n")
    starts = [found.start() for found in re.finditer(r"=+", lines[0])]
    ends = [*starts[1:], None]
    found: List[List[str]] = []
    for line in lines[3:]:
        if line.startswith("==="):
            return found
        cells = [line[start:end].strip() for start, end in zip(starts, ends)]
        if cells[0]:
            found.append(cells)
        else:
            found[-1] = [f"{before} {cell}".strip() for before, cell in zip(found[-1], cells)]
    raise AssertionError("the table has no end")


def test_every_limit_names_tests_that_exist() -> None:
    sources = [path.read_text() for path in FOLDER.glob("test_*.py")]
    names = {name for source in sources for name in re.findall(r"^def (\w+)", source, re.M)}
    assert len(rows()) >= 15
    for resource, cost, end, tests in rows():
        assert resource and cost and end, resource
        named = re.findall(r"``(\w+)``", tests)
        assert named, f"no test of {resource}"
        assert set(named) <= names, f"{resource}: there is no {set(named) - names}"


def test_the_table_has_the_numbers() -> None:
    text = " ".join(" ".join(row) for row in rows())
    numbers = [
        f"{HIGH_WATER >> 20} MiB are queued", f"{limit('inbox count')} messages or {limit('inbox bytes') >> 20} MiB",
        f"{limit('inbox count hard'):,} messages or {limit('inbox bytes hard') >> 20} MiB", f"the newest {KEPT_COUNT}",
        f"or {KEPT_BYTES >> 20} MiB", f"{limit('depth')} levels", f"{LINE_MAX >> 10} KiB",
    ]  # fmt: skip
    for number in numbers:
        assert number in text, number


# -- queued bytes


def test_a_send_waits_for_room_only_above_the_mark() -> None:
    with IpcPeer(timeout=0) as peer, RawPeer(peer, small=True) as raw:
        raw.session.notify(Note("", bytes(100_000)))
        before = raw.session.queued_bytes
        raw.session.notify(Note("", bytes(100_000)))
        extra = raw.session.queued_bytes - before - 100_000  # of each message
        left = HIGH_WATER - raw.session.queued_bytes
        while left > 300_000:
            raw.session.notify(Note("", bytes(100_000)))
            left = HIGH_WATER - raw.session.queued_bytes
        raw.session.notify(Note("", bytes(left - extra)))
        assert raw.session.queued_bytes == HIGH_WATER
        raw.session.notify(Note("at the mark"))
        assert raw.session.queued_bytes > HIGH_WATER
        queued = raw.session.queued_bytes
        for send in (lambda: raw.session.notify(Note("beyond it")), lambda: raw.session.request(Ping(), timeout=0)):
            with pytest.raises(RequestTimeoutError, match="was not sent"):
                send()
        assert raw.session.queued_bytes == queued  # and nothing of it was


# -- pending requests


def test_pending_requests_cost_little_and_end_with_their_time(raw: RawPeer) -> None:
    count = 3000
    promises: List[Any] = []
    raw.session.request(Ping(), timeout=0.0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(count):
            promises.append(raw.session.request(Ping(), timeout=0.0))
            raw.read()
        each = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
    assert each < 2000, f"{each} bytes for each"
    errors = gather(promises, 20, return_exceptions=True)
    assert all(type(error) is RequestTimeoutError for error in errors)
    assert "pending=0" in repr(raw.session)


# -- deferred replies


def test_deferred_replies_count_as_what_waits_in_the_inbox(raw: RawPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("inbox count", 100, monkeypatch)
    kept: List[DeferredReply] = []

    @raw.session.on_request
    def keep(ping: Ping) -> DeferredReply:
        kept.append(DeferredReply())
        return kept[-1]

    def ask(number: int) -> None:
        raw.write(request_bytes(str(number), Ping(number)))
        for _ in range(5):
            raw.session.tick()

    for number in range(101):
        ask(number)
        assert len(kept) == number + 1
    ask(101)
    ask(102)
    assert len(kept) == 101  # one more than the limit is owed: nothing is read
    for reply in kept[:5]:
        assert reply.send(Pong())
    tick_until(lambda: len(kept) == 103, raw.session.peer)  # what waited is read
    for reply in kept[5:]:
        assert reply.send(Pong())


# -- kept notifications


def test_so_many_notifications_are_kept_and_no_more(raw: RawPeer) -> None:
    for number in range(KEPT_COUNT):
        raw.write(framed(Note(str(number))))
        raw.session.tick(20)
    assert raw.session.receive(0) == Note("0")  # at the limit all are there
    for number in (KEPT_COUNT, KEPT_COUNT + 1):
        raw.write(framed(Note(str(number))))
        raw.session.tick(20)
    assert raw.session.receive(0) == Note("2")  # one beyond, the oldest is gone
    assert len([raw.session.receive(0) for _ in range(KEPT_COUNT - 1)]) == KEPT_COUNT - 1
    with pytest.raises(TimeoutError):
        raw.session.receive(0)


# -- lines of text


def test_a_line_of_text_comes_in_pieces_above_the_limit() -> None:
    for size, sizes in ((LINE_MAX, [LINE_MAX]), (LINE_MAX + 1, [LINE_MAX, 1]), (2 * LINE_MAX, [LINE_MAX, LINE_MAX])):
        for piece in (size + 1, 1000):
            decoder = TextDecoder(lambda text: None)
            data = b"x" * size + b"\n"
            messages: List[Any] = []
            for at in range(0, len(data), piece):
                found, decoder.state = decoder.decode(data[at : at + piece])
                assert len(decoder.state[0]) <= LINE_MAX
                messages += found
            assert [len(message.message) for message in messages] == sizes


# -- ids


def test_an_id_is_no_longer_than_it_may_be(raw: RawPeer) -> None:
    seen: List[Any] = []
    raw.session.on_request(lambda ping: seen.append(ping) or Pong("yes"))  # type: ignore[func-returns-value]
    for length, served in ((128, True), (129, False)):
        seen.clear()
        try:
            raw.write(request_bytes("x" * length, Ping(length)))
        except SerializationError:
            raw.write(request_bytes("y" * 128, Ping(0)).replace(b"\x8c\x80" + b"y" * 128, b"\x8c\x81" + b"y" * 129))
        raw.session.tick(20)
        assert bool(seen) is served


# -- the queue of a pool


def test_the_queue_of_a_pool_has_no_end_and_what_map_reads_ahead_has(peer: IpcPeer) -> None:
    read: List[int] = []

    def tasks() -> Any:
        for number in range(1000):
            read.append(number)
            yield Ping(number)

    with WorkerPool(peer, [sys.executable, "-m", "tests.pool_child"], 1) as pool:
        promises = [pool.submit(Ping(number), expect=Pong) for number in range(300)]
        assert pool.pending == 300
        assert promises[0].wait() == Pong(0)
        assert [promise.cancel() for promise in promises].count(True) >= 200  # a worker may have answered some
        replies = pool.map(tasks(), expect=Pong, ahead=7)
        for number in range(20):
            assert next(replies) == Pong(number)
            assert len(read) <= number + 1 + 7
        assert len(read) >= 20 + 6  # and not less
        del replies
