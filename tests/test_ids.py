from __future__ import annotations

import os
import re

import pytest

from stream_ipc import IpcPeer
from stream_ipc.ids import PidCounterRequestIdGenerator, PidHrtimeRequestIdGenerator

from .messages import Ping


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
