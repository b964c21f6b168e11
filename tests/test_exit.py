"""The end of the interpreter: what is queued leaves, nobody complains, nothing hangs."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import Any, List

import pytest

from stream_ipc import IpcError, IpcPeer, StreamClosedError

from .helpers import PATIENCE, role, tick_until
from .messages import Note, Ping, Pong
from .os_helpers import Gate, await_death, collect, ended, kill, log_texts, program, read_exactly, read_to_end

PIPE = subprocess.PIPE
LARGE = 3_000_000  # more than a pipe or a socket holds, by far

# Each leaves the program right after a large message has been sent.
LEAVING = {
    "end": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "error": ("raise ValueError('it went wrong')", 1),
    "handler": ("session.on_message(lambda note: sys.exit(4)); session.peer.tick(None)", 4),
    "with": ("session.peer.close()", 0),
    "close": ("session.close()", 0),
    "collected": ("del session; import gc; gc.collect()", 0),
}


@pytest.mark.matrix
@pytest.mark.parametrize("how", LEAVING)
def test_a_large_message_sent_right_before_the_end_arrives(peer: IpcPeer, how: str) -> None:
    code, status = LEAVING[how]
    session = peer.create_command_session(
        program(f"session = IpcPeer().create_stdio_session()\nsession.notify(Note('x', bytes({LARGE})))\n" + code)
    )
    process, text = session.process, log_texts(session, "stderr")
    notes, closed = collect(session, Note), ended(session)
    session.notify(Note("go"))
    tick_until(lambda: closed, peer)
    assert notes == [Note("x", bytes(LARGE))]
    tick_until(lambda: process is not None and process.returncode is not None, peer)
    assert process is not None and process.returncode == status
    if how == "error":
        assert "it went wrong" in text()
    elif how != "collected":
        assert text() == ""


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["end", "sys.exit", "handler"])
def test_over_a_socket_too(peer: IpcPeer, how: str) -> None:
    code, status = LEAVING[how]
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    start = f"session = IpcPeer().create_stream_session({fd}, {fd})\nsession.notify(Note('x', bytes({LARGE})))\n"
    process = subprocess.Popen(program(start + code), pass_fds=[fd], stderr=PIPE)
    theirs.close()
    try:
        session = peer.create_socket_session(ours)
        notes, closed = collect(session, Note), ended(session)
        session.notify(Note("go"))
        tick_until(lambda: closed, peer)
        assert notes == [Note("x", bytes(LARGE))]
        assert process.wait(PATIENCE) == status
        assert process.stderr is not None and process.stderr.read() == b""
    finally:
        kill(process)


def test_leaving_in_a_handler_sends_the_replies_that_are_queued(peer: IpcPeer) -> None:
    code = """
        session = IpcPeer().create_stdio_session()

        @session.on_request
        def answer(ping: Ping):
            if ping.value is None:
                sys.exit(4)
            return Pong(bytes(ping.value))

        serve(session)
    """
    session = peer.create_command_session(program(code))
    sizes = [10, 800_000, 100, 900_000]
    with session.batch():
        promises = [session.request(Ping(size), expect=Pong) for size in sizes]
        last = session.request(Ping(), timeout=None)
    assert [len(promise.wait().value) for promise in promises] == sizes
    with pytest.raises(IpcError) as caught:
        last.wait(PATIENCE)
    if isinstance(caught.value, StreamClosedError):
        assert "exit status 4" in str(caught.value)


@pytest.mark.slow
def test_a_reader_that_never_reads_holds_nobody_back() -> None:
    code = "session = IpcPeer().create_stdio_session(); session.notify(Note('x', bytes(1000000)))"
    process = subprocess.Popen(program(code), stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        start = time.monotonic()
        await_death(process)
        assert time.monotonic() - start < 10
        assert process.wait() == 0
        assert process.stderr is not None and b"which are dropped" in process.stderr.read()
    finally:
        kill(process)


def test_what_is_queued_for_a_master_that_is_gone_makes_no_noise_at_the_end(tmp_path: pathlib.Path) -> None:
    code = f"""
        gate = open(sys.argv[1])
        session = IpcPeer().create_stdio_session()
        session.notify(Note("", bytes({LARGE})))
        os.write(2, b"queued")
        gate.read()
        gate.close()
    """
    with Gate(tmp_path / "gate") as gate:
        process = subprocess.Popen(program(code, gate.path), stdin=PIPE, stdout=PIPE, stderr=PIPE)
        try:
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            assert read_exactly(process.stderr.fileno(), 6) == b"queued"
            process.stdout.close()
            process.stdin.close()
            gate.open()
            assert read_to_end(process.stderr.fileno()) == b""
            assert process.wait(PATIENCE) == 0
        finally:
            kill(process)


@pytest.mark.matrix
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("flags", [[], ["-X", "dev", "-W", "error"]], ids=["", "dev"])
def test_a_slave_whose_master_is_gone_leaves_without_a_word(queued: bool, flags: List[str]) -> None:
    code = f"""
        session = IpcPeer().create_stdio_session()
        session.notify(Note("up"))
        try:
            if {queued}:
                session.notify(Note("more than fits", bytes(900000)))
        except StreamClosedError:
            pass  # the master was faster
        serve(session)
    """
    command = program(code)
    process = subprocess.Popen([command[0], *flags, *command[1:]], stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert os.read(process.stdout.fileno(), 10)
        process.stdout.close()
        process.stdin.close()
        assert read_to_end(process.stderr.fileno()) == b""
        assert process.wait(PATIENCE) == 0
    finally:
        kill(process)


def test_sending_to_a_master_that_is_gone_is_an_error_and_the_exit_is_clean() -> None:
    code = """
        session = IpcPeer().create_stdio_session()
        print("not flushed")
        try:
            while True:
                session.notify(Note("x", bytes(50000)))
        except StreamClosedError as exc:
            sys.exit(7)
    """
    process = subprocess.Popen(program(code), stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert read_to_end(process.stderr.fileno()) == b"not flushed\n"
        assert process.wait(PATIENCE) == 7
    finally:
        kill(process)


LEFT_OPEN = {
    "nothing": "peer = IpcPeer()",
    "closed": "peer = IpcPeer(); a, b = peer.create_session_pair(); peer.close()",
    "pair": "peer = IpcPeer(); a, b = peer.create_session_pair(); a.request(Ping())",
    "stdio": "session = IpcPeer().create_stdio_session(); session.notify(Note()); keep = session.request(Ping())",
    "child": "peer = IpcPeer(); echo = [sys.executable, '-m', 'tests.child', 'echo'];"
    " session = peer.create_command_session(echo, stderr=None); session.request(Ping()).wait()",
    # Their owner has them now, and he closes them.
    "removed": "import socket; x, y = socket.socketpair(); peer = IpcPeer(); s = peer.create_socket_session(x);"
    " peer.remove_session(s); x.close(); y.close()",
    "fileno": "peer = IpcPeer(); peer.fileno(); peer.create_session_pair()",
    "cycle": "peer = IpcPeer(); a, b = peer.create_session_pair(); keep = [a]; a.on_message(lambda m: keep)",
    "two": "peers = [IpcPeer(), IpcPeer()]; [p.create_session_pair() for p in peers]; p = IpcPeer(); p.close()",
    "late": "import atexit; peer = IpcPeer(); a, b = peer.create_session_pair();"
    " atexit.register(lambda: a.notify(Note()))",
}


@pytest.mark.matrix
@pytest.mark.parametrize("name", LEFT_OPEN)
def test_what_is_left_open_makes_no_noise(name: str) -> None:
    command = program(LEFT_OPEN[name])
    options = [command[0], "-X", "dev", "-W", "error", *command[1:]]
    start = time.monotonic()
    done = subprocess.run(options, stdin=subprocess.DEVNULL, stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert time.monotonic() - start < 10


def test_a_master_that_leaves_ends_its_children() -> None:
    code = """
        peer = IpcPeer()
        echo = [sys.executable, "-m", "tests.child", "echo"]
        sessions = [peer.create_command_session(echo, stderr=None) for _ in "ab"]
        for session in sessions:
            session.request(Ping()).wait()
        print(*[session.process.pid for session in sessions], flush=True)
    """
    process = subprocess.Popen(program(code), stdout=PIPE, stderr=PIPE)
    try:
        assert process.stdout is not None and process.stderr is not None
        assert read_to_end(process.stderr.fileno()) == b""  # the children held it, too
        pids = read_to_end(process.stdout.fileno()).split()
        assert process.wait(PATIENCE) == 0
        assert len(pids) == 2
        for pid in pids:  # reaped by the master, before it left
            assert not os.path.exists(b"/proc/" + pid)
    finally:
        kill(process)


@pytest.mark.matrix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_children_are_ended_at_exit_kills_them_at_once(number: signal.Signals) -> None:
    # They ignore SIGTERM, and their time is not over while this test runs.
    stubborn = """
        signal.alarm(60)  # so that nothing is left of a test that fails
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.write(2, b"up ")
        while os.read(0, 100):
            pass
        os.write(2, b"end ")
        while True:
            signal.pause()
    """
    code = f"""
        from tests.helpers import set_limit
        from tests.os_helpers import script
        set_limit("exit grace", 600)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(9))
        peers = [IpcPeer(), IpcPeer()]
        sessions = [peer.create_command_session(script({stubborn!r}), stderr=int(sys.argv[1])) for peer in peers]
        sys.stdin.read(1)
    """
    read, write = os.pipe()
    process = subprocess.Popen(program(code, write), stdin=PIPE, stdout=PIPE, stderr=PIPE, pass_fds=[write])
    os.close(write)
    try:
        assert process.stdin is not None and process.stdout is not None
        assert read_exactly(read, 6) == b"up up "
        process.stdin.write(b"x")
        process.stdin.close()
        assert read_exactly(read, 8) == b"end end "
        process.send_signal(number)
        assert read_to_end(read) == b""  # both are gone
        process.wait(PATIENCE)
    finally:
        kill(process)
        os.close(read)


@pytest.mark.slow
def test_stuck_peers_are_waited_for_side_by_side(tmp_path: pathlib.Path) -> None:
    code = """
        import atexit, socket, sys, time
        atexit.register(lambda: print(time.monotonic() - start))  # what is registered first is called last
        from stream_ipc import *
        from tests.helpers import set_limit
        from tests.messages import *
        set_limit("flush bound", 0.4)
        set_limit("exit grace", 0.3)
        start = time.monotonic()
        pairs = [socket.socketpair() for _ in range(5)]
        peers = [IpcPeer() for _ in pairs]
        for peer, (near, far) in zip(peers, pairs):
            stuck = peer.create_socket_session(near)
            stuck.notify(Note("", bytes(900000)))
            peer.create_command_session(["sleep", "60"])
        into = IpcPeer().create_command_session(["sh", "-c", "exec cat >'%s'" % sys.argv[1]])
        into.notify(Note("", bytes(900000)))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out")]
    done = subprocess.run(command, stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
    assert done.returncode == 0
    assert [b"which are dropped" in line for line in done.stderr.splitlines()] == [True] * 5
    assert 0.7 <= float(done.stdout) < 3  # one after the other: 3.5
    assert (tmp_path / "out").stat().st_size > 900_000


def test_a_peer_that_cannot_be_closed_keeps_no_other_from_it(tmp_path: pathlib.Path) -> None:
    code = """
        from tests.helpers import set_clock
        peers = [IpcPeer() for _ in range(3)]
        for peer in peers:
            peer.create_session_pair()[0].notify(Note("", bytes(900000)))
            set_clock(peer, None)
        into = IpcPeer().create_command_session(["sh", "-c", "exec cat >'%s'" % sys.argv[1]])
        into.notify(Note("", bytes(900000)))
    """
    done = subprocess.run(program(code, tmp_path / "out"), stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
    assert done.returncode == 0
    assert [done.stderr.count(text) for text in (b"at exit failed", b"TypeError:")] == [3, 3]
    assert (tmp_path / "out").stat().st_size > 900_000


def test_done_callbacks_at_exit_wait_for_what_another_peer_has_sent() -> None:
    # Nothing of that will ever be answered. Each waits for all of it, while only its own peer has settled.
    code = """
        from stream_ipc import gather
        from tests.messages import Ping
        peers = [IpcPeer(timeout=None) for _ in range(3)]
        sessions = [peer.create_session_pair()[0] for peer in peers]
        promises = [session.request(Ping()) for session in sessions]
        def wait(promise):
            print(*[type(error).__name__ for error in gather(promises, return_exceptions=True)])
        for promise in promises:
            promise.add_done_callback(wait)
    """
    done = subprocess.run(program(code), stdin=subprocess.DEVNULL, stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.split() == [b"StreamClosedError"] * 9


def test_a_forked_copy_leaves_the_conversation_alone(peer: IpcPeer) -> None:
    code = """
        peer = IpcPeer()
        session = peer.create_stdio_session()
        child = peer.create_command_session([sys.executable, "-m", "tests.child", "echo"])
        child.request(Ping()).wait()
        session.notify(Note("before", bytes(500000)))  # some of it is queued
        pid = os.fork()
        if pid == 0:
            try:
                session.notify(Note("from the copy"))
            except RuntimeError:
                peer.close()
                sys.exit(5)  # with all exit handlers
            os._exit(6)
        session.notify(Note("status", os.waitpid(pid, 0)[1] >> 8))
        session.notify(Note("child", child.request(Ping(8), expect=Pong).wait().value))
    """
    session = peer.create_command_session(program(code))
    notes, closed, text = collect(session, Note), ended(session), log_texts(session, "stderr")
    tick_until(lambda: closed, peer)
    assert text() == ""
    assert notes == [Note("before", bytes(500_000)), Note("status", 5), Note("child", 8)]


def test_exit_handlers_run_in_order_and_can_still_talk(peer: IpcPeer) -> None:
    # What was registered after the library's import runs before the library's own.
    code = """
        import atexit
        session = IpcPeer().create_stdio_session()
        atexit.register(lambda: session.notify(Note("goodbye", bytes(200000))))
    """
    session = peer.create_command_session(program(code))
    notes, closed = collect(session, Note), ended(session)
    tick_until(lambda: closed, peer)
    assert notes == [Note("goodbye", bytes(200_000))]


def test_a_peer_that_is_dropped_at_the_very_end_is_warned_of_all_the_same() -> None:
    code = """
        import atexit

        def make():
            global kept
            from stream_ipc import IpcPeer
            kept = IpcPeer()
            kept.create_session_pair()

        atexit.register(make)
        import stream_ipc
    """
    for flags, told in ([], b""), (["-X", "dev"], b"ResourceWarning: unclosed <IpcPeer"):
        done = subprocess.run([sys.executable, *flags, "-c", textwrap.dedent(code)], stderr=PIPE, timeout=PATIENCE)
        assert done.returncode == 0 and told in done.stderr and b"Traceback" not in done.stderr


def test_what_is_dropped_at_exit_is_logged() -> None:
    code = """
        from stream_ipc.core import lifecycle
        lifecycle.FLUSH_BOUND = 0.1
        session = IpcPeer().create_stdio_session()
        while session.queued_bytes < 300_000:
            session.notify(Note("queued", b"x" * 100_000))
    """
    done = subprocess.Popen(program(code), stdin=PIPE, stdout=PIPE, stderr=PIPE)
    with done:
        assert done.stderr is not None and done.wait(PATIENCE) == 0
        assert b"bytes, which are dropped: flush() first" in done.stderr.read()


def test_a_tick_in_an_orphan_ends_it() -> None:
    for loop in ("session.tick(None)", "session.peer.tick(None)", "session.receive()"):
        code = f"""
            session = IpcPeer().create_stdio_session()
            try:
                while True:
                    {loop}
            except StreamClosedError:
                os.write(2, b"orphaned")
        """
        done: Any = subprocess.run(program(code), stdin=subprocess.DEVNULL, stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, b"orphaned")


def test_output_printed_at_exit_goes_to_stderr_or_back_to_stdout(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("print at exit"))
    closed, text, junk = ended(session), log_texts(session, "stderr"), log_texts(session, "junk")
    assert session.request(Ping(3), expect=Pong).wait().value == 3
    session.notify(Note("exit"))
    tick_until(lambda: closed, peer)
    assert "printed meanwhile" in text()
    assert "printed at exit" in text() + junk()
