"""Child processes in the second edition: dead ones, how they are started and closed, what they print, forked copies."""

import os
import signal
import time
from typing import Any, Iterator, List

import pytest

from stream_ipc import IpcPeer, Session, StreamClosedError
from tests.messages import Note, Ping
from tests.os_helpers import await_death, ended, program

# -- a dead child is reported as such

UP = """
    if {grandchild}:
        subprocess.Popen(["sleep", "60"])
    session = IpcPeer().create_stdio_session()
    session.notify(Note("up"))
    session.receive()
"""


@pytest.fixture(params=[False, True], ids=["alone", "with a grandchild"])
def dead(peer: IpcPeer, request: Any) -> Iterator[Session]:
    """The session of a child that was killed while much is queued for it; no tick has seen that yet."""
    session = peer.create_command_session(program(UP.format(grandchild=request.param)), start_new_session=True)
    process = session.process
    assert process is not None
    assert session.receive(20) == Note("up")
    os.kill(process.pid, signal.SIGSTOP)
    while session.queued_bytes < 300_000:
        session.notify(Note("queued", b"x" * 50_000))
    process.kill()
    await_death(process)
    try:
        yield session
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def fill(session: Session) -> None:
    while session.queued_bytes <= 1024 * 1024:
        session.notify(Note("queued", b"x" * 50_000))


def fails_at_once(call: Any) -> None:
    start = time.monotonic()
    with pytest.raises(StreamClosedError, match="was killed by SIGKILL"):
        call()
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize("timeout", [0, 2, None])
def test_flush_says_that_the_child_is_dead_each_time(dead: Session, timeout: Any) -> None:
    for _ in range(3):
        fails_at_once(lambda: dead.flush(timeout))
    assert dead.queued_bytes == 0


def test_sending_above_the_mark_says_that_the_child_is_dead(peer: IpcPeer, request: Any) -> None:
    for how in (lambda s: s.notify(Note()), lambda s: s.request(Ping()), lambda s: s.request(Ping(), timeout=None)):
        session = peer.create_command_session(program(UP.format(grandchild=True)), start_new_session=True)
        process = session.process
        assert process is not None and session.receive(20) == Note("up")
        os.kill(process.pid, signal.SIGSTOP)
        fill(session)
        process.kill()
        await_death(process)
        try:
            fails_at_once(lambda how=how, session=session: how(session))
            fails_at_once(lambda how=how, session=session: how(session))
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_broadcast_does_not_count_a_dead_child(peer: IpcPeer, dead: Session) -> None:
    a, b = peer.create_session_pair()
    errors: List[Any] = []
    dead.on_exception(errors.append)
    start = time.monotonic()
    assert peer.broadcast(Note("to all")) == 2
    assert time.monotonic() - start < 0.5
    assert len(errors) == 1 and "SIGKILL" in str(errors[0])


def test_broadcast_does_not_wait_for_a_dead_child(peer: IpcPeer, dead: Session) -> None:
    errors: List[Any] = []
    dead.on_exception(errors.append)
    try:
        fill(dead)
    except StreamClosedError:
        pass
    start = time.monotonic()
    assert peer.broadcast(Note("to all")) == 0
    assert time.monotonic() - start < 0.5
    assert len(errors) == 1 and "SIGKILL" in str(errors[0])


@pytest.mark.parametrize("how", ["session", "peer", "tick"])
def test_closing_waits_for_no_dead_child(peer: IpcPeer, dead: Session, how: str) -> None:
    start = time.monotonic()
    closed = ended(dead)
    if how == "tick":
        peer.tick(5)
    else:
        (dead if how == "session" else peer).close()
    assert time.monotonic() - start < 0.5
    assert closed == [dead]


def test_flush_of_a_session_whose_other_side_is_gone(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    sock = b.socket
    assert sock is not None
    while a.queued_bytes < 300_000:
        a.notify(Note("queued", b"x" * 50_000))
    peer.remove_session(b)
    sock.close()
    for timeout in (0, 2, None, 0):
        with pytest.raises(StreamClosedError, match="other side"):
            a.flush(timeout)
