from __future__ import annotations

import os
import re
from typing import Any, List

import pytest

from stream_ipc import IpcPeer, RequestTimeoutError, StreamClosedError, WorkerPool
from stream_ipc.ids import PidCounterRequestIdGenerator, PidHrtimeRequestIdGenerator

from .helpers import FakeClock, RawPeer, is_settled, no_pending, set_clock
from .messages import Ping, Pong
from .test_custom_transport import Memory


def test_counter() -> None:
    generator = PidCounterRequestIdGenerator()
    assert [generator.generate() for _ in range(3)] == [f"{os.getpid()}.{n}" for n in (1, 2, 3)]
    assert PidCounterRequestIdGenerator().generate() == f"{os.getpid()}.1"


def test_hrtime() -> None:
    generator = PidHrtimeRequestIdGenerator()
    ids = [generator.generate() for _ in range(3)]
    parts = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", id) for id in ids]
    assert [m and m.group(1) for m in parts] == [str(os.getpid())] * 3
    assert [m and m.group(3) for m in parts] == ["1", "2", "3"]
    times = [int(m.group(2)) for m in parts if m]
    assert times == sorted(times)
    other = PidHrtimeRequestIdGenerator().generate().split(".")
    assert int(other[1]) >= times[-1]


@pytest.mark.parametrize("cls", [PidCounterRequestIdGenerator, PidHrtimeRequestIdGenerator])
def test_ids_are_short_text_and_do_not_repeat(cls: type) -> None:
    generator = cls()
    ids = [generator.generate() for _ in range(10_000)]
    assert len(set(ids)) == len(ids)
    assert all(type(id) is str and 0 < len(id) <= 128 for id in ids)


class Prefixed(PidCounterRequestIdGenerator):
    def generate(self) -> str:
        return "mine." + super().generate()


class PrefixedWithInit(Prefixed):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def generate(self) -> str:
        return self.prefix + super().generate()


@pytest.mark.parametrize("generator", [Prefixed(), PrefixedWithInit("very.")], ids=["plain", "with __init__"])
def test_subclass_that_overrides_generate_is_used(generator: Prefixed) -> None:
    first = generator.generate()
    assert re.fullmatch(r"(very\.)?mine\.\d+\.\d+", first)
    with IpcPeer(id_generator=generator) as peer:
        a, _ = peer.create_session_pair()
        id = a.request(Ping()).id
        assert re.fullmatch(r"(very\.)?mine\.\d+\.\d+", id) and id != first


def test_subclass_that_overrides_nothing_counts() -> None:
    class Same(PidCounterRequestIdGenerator):
        pass

    generator = Same()
    assert [generator.generate() for _ in range(2)] == [f"{os.getpid()}.1", f"{os.getpid()}.2"]


def test_id_of_a_class_derived_from_str_is_called_that() -> None:
    class Text(str):
        pass

    class Generator:
        def generate(self) -> str:
            return Text("1")

    with IpcPeer(id_generator=Generator()) as peer:
        a, _ = peer.create_session_pair()
        with pytest.raises(ValueError, match="returned '1' of a class derived from str; it must be a plain str"):
            a.request(Ping())


class Acting(PidCounterRequestIdGenerator):
    """Does something else before it returns an id."""

    action: Any = None

    def generate(self) -> str:
        action, self.action = self.action, None
        if action is not None:
            action()
        return super().generate()


@pytest.mark.parametrize("others", [0, 1])
def test_a_generator_that_ticks_while_another_request_is_overdue(others: int) -> None:
    generator = Acting()
    with IpcPeer(id_generator=generator) as peer, RawPeer(peer) as raw:
        clock = set_clock(peer, FakeClock())

        def tick() -> None:
            clock.now += 1
            peer.tick(0)

        promises = [raw.session.request(Ping(), timeout=0.5) for _ in range(others)]
        generator.action = tick
        promises.append(raw.session.request(Ping(), timeout=0.9))
        later = raw.session.request(Ping(), timeout=50)
        clock.now += 10
        peer.tick(0)
        assert all(map(is_settled, promises)) and not is_settled(later)
        with pytest.raises(RequestTimeoutError):
            promises[-1].wait()


@pytest.mark.parametrize("kind", ["stream", "transport"])
def test_a_generator_that_closes_the_session(kind: str) -> None:
    generator = Acting()
    with IpcPeer(id_generator=generator) as peer, RawPeer(peer) as raw:
        transport = Memory()
        session = raw.session if kind == "stream" else peer.create_session(transport)
        generator.action = session.close
        with pytest.raises(StreamClosedError):
            session.request(Ping())
        assert no_pending(session) and transport.sent == [] and raw.read() == b""


def test_an_error_of_another_stream_that_a_generator_raises_stays_as_it_is() -> None:
    def fail() -> None:
        raise StreamClosedError("of another thing")

    generator = Acting()
    with IpcPeer(id_generator=generator) as peer, RawPeer(peer) as raw:
        generator.action = fail
        with pytest.raises(StreamClosedError, match="^of another thing$"):
            raw.session.request(Ping())


def test_a_generator_that_closes_the_pool() -> None:
    generator = Acting()
    with IpcPeer(id_generator=generator) as peer:
        for call in (lambda pool: pool.submit(Ping()), lambda pool: next(pool.map([Ping()]))):
            pool = WorkerPool(peer, ["not started"], 1)
            generator.action = pool.close
            with pytest.raises(RuntimeError, match="closed"):
                call(pool)
            assert pool.pending == 0


def test_an_id_that_is_free_again_may_be_used_by_a_done_callback() -> None:
    class Same:
        def generate(self) -> str:
            return "x"

    with IpcPeer(id_generator=Same(), timeout=5) as peer:
        a, b = peer.create_session_pair()
        b.on_request(lambda ping: Pong(ping.value))
        later: List[Any] = []

        def again(promise: Any) -> None:
            peer.tick(0)
            later.append(a.request(Ping(2)))

        first = a.request(Ping(1))
        first.add_done_callback(again)
        assert first.wait() == Pong(1)
        assert later[0].wait() == Pong(2)
