"""What is watched stays watched, wherever an interruption comes: the poller by itself."""

import os
import select
import selectors
import time
from typing import Any, Callable, Iterator, List, Tuple, Type

import pytest

from stream_ipc.core.poller import READ, WRITE, Poller

from .helpers import WAIT, InterruptAt, Interruption, InterruptionError

EPOLL = pytest.mark.skipif(not hasattr(select, "epoll"), reason="only epoll reports what is closed")

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


@EPOLL
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


@EPOLL
@BOTH_KINDS
def test_a_new_set_is_seen_by_registering_and_by_waiting_wherever_making_it_is_interrupted(kind: Any) -> None:
    for apart, where in interrupted_at_every_place(lambda apart: apart.poller.rebuild(), kind, 5):
        apart.poller.watch(apart.other, WRITE, "another writer")
        assert apart.ready() == [(apart.other, WRITE)], where


class Kqueue(selectors.PollSelector):  # type: ignore[name-defined, misc, unused-ignore]
    """What stands for a selector over kqueue, of which a call is interrupted between its own table and the system's."""

    def __init__(self) -> None:
        super().__init__()
        self.interruptions: List[BaseException] = [Interruption()]

    def unregister(self, fd: Any) -> Any:
        if self.interruptions:
            del self._fd_to_key[fd]
            raise self.interruptions.pop()
        return super().unregister(fd)


def test_what_an_interruption_has_left_in_the_table_of_kqueue_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll", raising=False)
    monkeypatch.setattr(selectors, "DefaultSelector", Kqueue)
    poller = Poller()
    read, write = os.pipe()
    os.write(write, b"x")
    poller.watch(read, READ, "reader")
    with pytest.raises(Interruption):
        poller.unwatch(read, "reader")
    poller.unwatch(read, "reader")
    start = time.monotonic()
    assert poller.poll(WAIT) == [] and time.monotonic() - start > WAIT / 2  # or a wait would spin
    poller.close()
    os.close(read)
    os.close(write)
