"""What is watched stays watched, wherever an interruption comes: the poller by itself."""

import os
import select
from typing import Any, Callable, Iterator, Tuple, Type

import pytest

from stream_ipc.core.poller import READ, WRITE, Poller

from .helpers import InterruptAt, Interruption, InterruptionError

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="only epoll reports what is closed")

BOTH_KINDS = pytest.mark.parametrize("kind", [Interruption, InterruptionError])


class Apart:
    """A poller that waits for the read end of a pipe, and of which the kernel's set knows the write end, but not it."""

    def __init__(self) -> None:
        self.poller = Poller()
        self.source, self.sink = os.pipe()
        self.other = os.dup(self.sink)
        self.poller.watch(self.source, READ, "reader")
        self.poller._epoll.register(self.sink, READ)

    def close(self) -> None:
        self.poller.close()
        os.close(self.source)
        os.close(self.sink)
        os.close(self.other)

    def ready(self) -> Any:
        return sorted(self.poller.poll(0))




def interrupted_at_every_place(
    change: Callable[[Apart], None], kind: Type[BaseException], least: int
) -> Iterator[Tuple[Apart, str]]:
    """Change a poller with an interruption at the first place, at the second, and so on until there is no further.

    Yields each poller, and where its change was interrupted; for the last it was not.
    """
    number = 0
    while True:
        number += 1
        apart = Apart()
        try:
            with InterruptAt(number, kind()) as interrupted:
                try:
                    change(apart)
                except kind:
                    pass
            yield apart, interrupted.where
        finally:
            apart.close()
        if not interrupted.hit:
            break
    assert number > least


@BOTH_KINDS
@pytest.mark.slow
def test_a_number_that_the_kernels_set_has_already_is_watched_wherever_the_rebuilding_is_interrupted(kind: Any) -> None:
    def watch(apart: Apart) -> None:
        apart.poller.watch(apart.sink, WRITE, "writer")

    for apart, where in interrupted_at_every_place(watch, kind, 10):
        # What a port does after an interruption: it takes what it watched away, and watches it anew.
        apart.poller.unwatch(apart.sink, "writer")
        apart.poller.watch(apart.sink, WRITE, "writer")
        assert apart.ready() == [(apart.sink, WRITE)], where
        os.write(apart.sink, b"x")
        assert apart.ready() == [(apart.source, READ), (apart.sink, WRITE)], where
        apart.poller.unwatch(apart.sink, "writer")
        assert apart.ready() == [(apart.source, READ)], where


@BOTH_KINDS
def test_a_new_set_is_seen_by_registering_and_by_waiting_wherever_making_it_is_interrupted(kind: Any) -> None:
    for apart, where in interrupted_at_every_place(lambda apart: apart.poller.rebuild(), kind, 5):
        apart.poller.watch(apart.other, WRITE, "another writer")
        assert apart.ready() == [(apart.other, WRITE)], where
