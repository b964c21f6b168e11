"""A soak: several processes, random sizes, random kills, random closes.

It runs for a second or, with ``--all``, for four, and for as long as one likes with ``STREAM_IPC_SOAK=seconds``. It prints
its seed; ``STREAM_IPC_SEED=number`` repeats the same choices (but not the same timing). What needs no other process is in
``test_state_machine.py``, which takes the same variables.
"""

import ctypes
import gc
import os
import random
import signal
import time
from typing import Any, Dict, List, Tuple

import pytest

from stream_ipc import (
    IpcPeer,
    RemoteError,
    ResponsePromise,
    Session,
    StreamClosedError,
    as_completed,
)

from .helpers import PATIENCE, role, span, tick_until
from .messages import Note, Ping, Pong
from .os_helpers import listing

SECONDS = float(os.environ.get("STREAM_IPC_SOAK", span(4.0)))
SEED = int(os.environ.get("STREAM_IPC_SEED", str(random.SystemRandom().randrange(1 << 31))))
CHILDREN = 4


class Life:
    """One child from its start to its end, and all that was said."""

    def __init__(self, peer: IpcPeer, seed: int) -> None:
        self.session: Session = peer.create_command_session(role("soak", seed), stderr=None)
        self.number = 0
        self.promises: Dict[int, Tuple[ResponsePromise[Pong], int, str, int]] = {}
        self.settled: List[int] = []
        self.said = 0
        self.called_back: List[int] = []
        self.closed = 0
        self.problems: List[str] = []
        self.session.on_message(self.listen)
        self.session.on_request(self.answer)
        self.session.on_close(self.close)

    def listen(self, note: Note) -> None:
        if note.text != "said":
            self.problems.append(f"{note.text}: {note.data}")
            return
        number, body = note.data
        if number != self.said + 1:
            self.problems.append(f"note {number} after {self.said}")
        if body != bytes([number % 251]) * len(body):
            self.problems.append(f"note {number} is damaged")
        self.said = number

    def answer(self, ping: Ping) -> Pong:
        number, size = ping.value
        if number not in self.promises or number in self.called_back:
            self.problems.append(f"called back for {number}")
        self.called_back.append(number)
        return Pong(number)

    def close(self, session: Session) -> None:
        self.closed += 1

    def next_number(self) -> int:
        self.number += 1
        return self.number

    def ask(self, what: str, there: int, back: int) -> None:
        number = self.next_number()
        body = bytes([number % 251]) * there
        # Without a time limit of its own: only a reply or the end may settle it.
        promise = self.session.request(Ping([number, back, what, body]), timeout=None, expect=Pong)
        self.promises[number] = (promise, there, what, back)

    def tell(self, what: str, size: int) -> None:
        self.session.notify(Note(what, [self.next_number(), bytes(size)]))

    def check(self) -> Tuple[int, int]:
        """All that must be true when the session is over; returns how many were answered, and how many failed."""
        assert self.problems == []
        assert self.closed == 1
        promises = [promise for promise, *_ in self.promises.values()]
        assert all(promise.done for promise in promises)
        seen = [id(promise) for promise in as_completed(promises, timeout=0)]
        assert sorted(seen) == sorted(map(id, promises))  # each once
        answered = failed = 0
        for number, (promise, there, what, back) in self.promises.items():
            first, second = outcome(promise), outcome(promise)
            assert first is second  # settled once and for all
            if isinstance(first, StreamClosedError):
                failed += 1
            elif isinstance(first, RemoteError):
                assert what == "raise" and f"asked for {number}" in str(first)
                answered += 1
            else:
                assert what not in ("die", "raise")
                expected = number if what == "call back" else bytes([number % 251]) * back
                assert first.value == [number, there, expected]
                answered += 1
        return answered, failed


def outcome(promise: "ResponsePromise[Pong]") -> Any:
    try:
        return promise.wait(0)
    except (StreamClosedError, RemoteError) as exc:
        return exc


def size(randomness: random.Random) -> int:
    return int(2 ** randomness.uniform(0, 20)) if randomness.random() < 0.9 else 0


def memory() -> int:
    """Resident bytes, without those that the C library keeps for later: replies come and go by the megabyte."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(SECONDS * 2 + 60)
def test_soak() -> None:
    print(f"STREAM_IPC_SEED={SEED}")
    randomness = random.Random(SEED)
    warm_up()
    gc.collect()
    descriptors, used = listing(), memory()
    soak(randomness)
    gc.collect()
    assert listing() == descriptors
    left = [thing for thing in gc.get_objects() if isinstance(thing, (Session, ResponsePromise, IpcPeer, Life))]
    assert left == []
    grown = memory() - used
    assert grown < 32 * 1024 * 1024, f"{grown} bytes more than before"


def warm_up() -> None:
    """So that all that is made once has been made."""
    with IpcPeer() as peer:
        Life(peer, 1).session.close()


def soak(randomness: random.Random) -> None:
    lives: List[Life] = []
    everything: List[Any] = []  # the processes that were started
    totals = [0, 0]

    def bury(life: Life) -> None:
        for index, count in enumerate(life.check()):
            totals[index] += count

    with IpcPeer(timeout=60) as peer:
        limit = time.monotonic() + SECONDS
        while time.monotonic() < limit or not totals[0] or len(everything) <= CHILDREN:  # on a busy machine
            while len(lives) < CHILDREN:
                lives.append(Life(peer, randomness.randrange(1 << 30)))
                everything.append(lives[-1].session.process)
            life = randomness.choice(lives)
            try:
                act(life, randomness)
            except StreamClosedError:
                pass
            if randomness.random() < 0.5:
                peer.tick(0)
            if randomness.random() < 0.02:
                for promise in [promise for promise, *_ in life.promises.values() if not promise.done][:5]:
                    outcome_within(promise)
            for life in [life for life in lives if life.closed]:  # which comes after a send that has failed for good
                lives.remove(life)
                bury(life)
        for life in lives:
            if randomness.random() < 0.5:
                life.session.close()
    for life in lives:
        bury(life)
    print(f"{len(everything)} children, {totals[0]} requests answered, {totals[1]} failed")
    assert totals[0] and len(everything) > CHILDREN
    assert all(process.returncode is not None for process in everything)


def outcome_within(promise: "ResponsePromise[Pong]") -> None:
    try:
        promise.wait(0.2)
    except (TimeoutError, StreamClosedError, RemoteError):
        pass


def act(life: Life, randomness: random.Random) -> None:
    """Do one thing with a child."""
    session = life.session
    chance = randomness.random()
    if chance < 0.35:
        life.ask("answer", size(randomness), size(randomness))
    elif chance < 0.5:
        life.ask("talk", size(randomness), 10)
    elif chance < 0.6:
        life.ask("call back", 10, 10)
    elif chance < 0.65:
        life.ask("raise", 10, 10)
    elif chance < 0.9:
        life.tell("note", size(randomness))
    elif chance < 0.95:
        with session.batch():
            for _ in range(randomness.randrange(30)):
                life.ask("answer", randomness.randrange(500), randomness.randrange(500))
    elif chance < 0.982:
        session.tick(0.001)
    elif chance < 0.985:
        life.tell(randomness.choice(["die", "leave", "close"]), 0)
    elif chance < 0.988:
        life.ask("die", 0, 0)
    elif chance < 0.991:
        assert session.process is not None
        session.process.kill()
    elif chance < 0.994:
        session.close()
    elif chance < 0.995:
        assert session.process is not None
        try:
            session.process.terminate()
        except ProcessLookupError:
            pass  # it has died already, and was reaped by a tick
    else:
        flush(session)


def flush(session: Session) -> None:
    try:
        session.flush(PATIENCE)
    except TimeoutError:
        # This must not happen, so whoever sees it wants to know what the child was doing.
        assert session.process is not None
        pid = session.process.pid
        print(session, session.peer, session.peer.sessions)
        for name in ("status", "wchan", "stack"):
            try:
                with open(f"/proc/{pid}/{name}") as file:
                    print(f"/proc/{pid}/{name}:", file.read())
            except OSError as exc:
                print(exc)
        try:
            os.kill(pid, signal.SIGUSR1)  # prints its Python stack to stderr
        except ProcessLookupError:
            print("it is gone")
        tick_until(lambda: not session.queued_bytes, session.peer)
        raise


@pytest.mark.slow
def test_many_children_that_die_while_all_talk() -> None:
    """The same in a crowd: each of them dies in the middle of its own conversation, and hinders no other."""
    randomness = random.Random(SEED)
    print(f"STREAM_IPC_SEED={SEED}")
    with IpcPeer() as peer:
        lives = [Life(peer, index) for index in range(8)]
        fates = [randomness.randrange(40) for _ in lives]
        for step in range(40):
            for life, fate in zip(lives, fates):
                if not life.session.is_open:
                    continue
                try:
                    life.ask("answer", 2000, 100)  # all replies fit into the pipe
                    if step == fate:
                        life.ask("die", 0, 0)
                except StreamClosedError:
                    pass
            peer.tick(0)
        tick_until(lambda: all(life.closed for life in lives), peer)
        for life, fate in zip(lives, fates):
            answered, failed = life.check()
            assert answered >= fate + 1 and failed >= 1
