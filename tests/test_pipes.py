"""Pipes to children are made larger when a large message comes, as far as the system allows."""

import os
import subprocess
import sys
from typing import Iterator, List

import pytest

from stream_ipc import IpcPeer, LogMessage, Session
from stream_ipc.transports import pipes

from .helpers import PATIENCE, tick_until

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(not hasattr(fcntl, "F_GETPIPE_SZ"), reason="the size of a pipe is fixed here")

LARGE = "x" * 300_000


@pytest.fixture
def peer() -> Iterator[IpcPeer]:
    with IpcPeer() as peer:
        yield peer


def sizes(session: Session) -> List[int]:
    assert session.process is not None and session.process.stdin is not None and session.process.stdout is not None
    return [fcntl.fcntl(stream, fcntl.F_GETPIPE_SZ) for stream in (session.process.stdin, session.process.stdout)]


def echo(session: Session, text: str) -> None:
    """Send a text to a child that is ``cat``, and wait for it to come back."""
    got: List[str] = []

    def take(message: LogMessage) -> None:
        got.append(str(message.message))

    session.on_message(take)
    session.notify(LogMessage(text))
    tick_until(lambda: got, session.peer)
    session.off_message(take)
    assert got == [text]


@pytest.fixture(scope="module")
def usual() -> int:
    """How much a pipe holds that nobody has changed."""
    read, write = os.pipe()
    try:
        return int(fcntl.fcntl(read, fcntl.F_GETPIPE_SZ))
    finally:
        os.close(read)
        os.close(write)


def test_a_large_message_makes_both_pipes_larger(peer: IpcPeer, usual: int) -> None:
    session = peer.create_command_session(["cat"])
    assert sizes(session) == [usual, usual]
    for _ in range(10):
        echo(session, "small")
    assert sizes(session) == [usual, usual]
    echo(session, LARGE)
    assert sizes(session) == [pipes.LARGE_PIPE] * 2
    echo(session, LARGE)
    assert sizes(session) == [pipes.LARGE_PIPE] * 2


def test_small_messages_that_are_many_do_not(peer: IpcPeer, usual: int) -> None:
    session = peer.create_command_session(["cat"])
    got: List[object] = []
    session.on_message(got.append)
    for _ in range(3000):
        session.notify(LogMessage("x" * 100))
    tick_until(lambda: len(got) == 3000, peer)
    assert sizes(session) == [usual, usual]


def test_a_size_that_was_asked_for_stays(peer: IpcPeer) -> None:
    session = peer.create_command_session(["cat"], pipesize=1 << 17)
    echo(session, LARGE)
    assert sizes(session) == [1 << 17] * 2


def test_pipes_that_were_made_elsewhere_stay_as_they_are(peer: IpcPeer, usual: int) -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    session = peer.create_process_session(process)
    echo(session, LARGE)
    assert sizes(session) == [usual, usual]
    session.close()
    process.wait(PATIENCE)


def test_only_some_pipes_of_a_process_are_larger_at_a_time(
    peer: IpcPeer, usual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "MOST_PIPES", 3)
    for _ in range(2):  # what was taken is given back
        sessions = [peer.create_command_session(["cat"]) for _ in range(3)]
        for session in sessions:
            echo(session, LARGE)
        found = [size for session in sessions for size in sizes(session)]
        assert sorted(found) == [usual] * 3 + [pipes.LARGE_PIPE] * 3
        for session in sessions:
            session.close()


def test_a_size_that_the_system_refuses_is_done_without(
    peer: IpcPeer, usual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "LARGE_PIPE", 0x7FFFFFFF)  # no pipe can hold as much
    session = peer.create_command_session(["cat"])
    echo(session, LARGE)
    assert sizes(session) == [usual, usual]
    monkeypatch.undo()
    another = peer.create_command_session(["cat"])
    echo(another, LARGE)
    assert sizes(another) == [pipes.LARGE_PIPE] * 2


USER_HAS_NO_MORE = """
import fcntl, os, sys
from stream_ipc import IpcPeer, LogMessage
from stream_ipc.transports import pipes
from tests.test_pipes import echo, sizes

with IpcPeer() as warm:  # what is imported late is out of reach for another user
    echo(warm.create_command_session(["cat"]), "x" * 300_000)
os.setgroups([])
os.setresgid(54321, 54321, 54321)
os.setresuid(54321, 54321, 54321)
held = []
try:
    while len(held) < 2000:
        held.append(os.pipe())
        fcntl.fcntl(held[-1][0], fcntl.F_SETPIPE_SZ, pipes.LARGE_PIPE)
    sys.exit(print("no limit"))
except OSError:
    pass
with IpcPeer() as peer:
    session = peer.create_command_session(["cat"])
    before = sizes(session)
    echo(session, "x" * 300_000)
    print(sizes(session) == before and before[0] < pipes.LARGE_PIPE)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes a user of whom nothing else runs")
@pytest.mark.slow
def test_a_user_who_has_too_many_large_pipes_has_small_ones() -> None:
    command = [sys.executable, "-W", "error", "-c", USER_HAS_NO_MORE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stderr, done.returncode) == ("", 0)
    if done.stdout == "no limit\n":
        pytest.skip("the limit is switched off")
    assert done.stdout == "True\n"
