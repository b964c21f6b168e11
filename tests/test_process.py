"""Child processes: starting, attaching, dying at every point, ending, and leaving nothing behind."""

import errno
import gc
import inspect
import os
import pathlib
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from typing import Any, Iterator, List

import pytest

from stream_ipc import IpcPeer, LogMessage, RemoteError, RequestEnvelope, RequestTimeoutError, StreamClosedError
from stream_ipc.wire.framing import frame_header

from .helpers import (
    PATIENCE,
    InterruptAt,
    Interruption,
    framed,
    limit,
    new_child,
    patch_process,
    places_apart,
    role,
    set_limit,
    tick_until,
)
from .messages import Note, Ping, Pong
from .os_helpers import (
    Gate,
    await_death,
    collect,
    cpu_seconds,
    ended,
    kill,
    listing,
    log_texts,
    program,
    read_exactly,
    read_to_end,
    script,
)

PIPE = subprocess.PIPE


@pytest.fixture
def short_graces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of which signal ends a child need not wait as long as users do."""
    set_limit("exit grace", 0.05, monkeypatch)
    set_limit("terminate grace", 0.2, monkeypatch)


# -- starting


def test_a_command_is_started_spoken_to_and_reaped(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("echo"))
    process = session.process
    assert process is not None
    assert str(process.pid) in repr(session)
    assert session.request(Ping("hello"), expect=Pong).wait().value == "hello"
    session.notify(Note("x", b"y" * 300_000))
    assert session.receive(PATIENCE) == Note("x", b"y" * 300_000)
    session.close()
    assert process.returncode == 0  # it was reaped, and it ended by itself
    assert process.stdin is not None and process.stdin.closed
    assert process.stdout is not None and process.stdout.closed
    assert process.stderr is not None and process.stderr.closed


def test_folder_and_environment_are_the_given_ones(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    command = script("print(os.getcwd(), os.environ['COLOUR'], flush=True); sys.stdin.read()")
    environment = dict(os.environ, COLOUR="green")
    session = peer.create_command_session(command, cwd=tmp_path, env=environment)
    junk = log_texts(session, "junk")
    tick_until(lambda: junk().endswith("green\n"), peer)
    assert junk().split()[0] == os.path.realpath(tmp_path)


def test_arguments_may_be_paths_and_bytes(peer: IpcPeer) -> None:
    session = peer.create_command_session([pathlib.Path(sys.executable), b"-m", "tests.child", "echo"])
    assert session.request(Ping(1), expect=Pong).wait().value == 1


@pytest.mark.parametrize("case", ["missing", "not executable", "folder", "no format", "no cwd"])
def test_what_cannot_be_started_raises_at_once(peer: IpcPeer, tmp_path: pathlib.Path, case: str) -> None:
    before = listing()
    plain = tmp_path / "plain"
    plain.write_text("just text")
    cwd = None
    if case == "missing":
        command, expected = [str(tmp_path / "nothing-here")], FileNotFoundError
    elif case == "not executable":
        command, expected = [str(plain)], PermissionError
    elif case == "folder":
        command, expected = [str(tmp_path)], PermissionError
    elif case == "no format":
        plain.chmod(0o755)
        command, expected = [str(plain)], OSError
    else:
        command, expected, cwd = ["cat"], FileNotFoundError, str(tmp_path / "no-folder")
    with pytest.raises(expected):
        peer.create_command_session(command, cwd=cwd)
    assert peer.sessions == ()
    assert listing() == before


@pytest.mark.parametrize("command", ["cat -u", b"cat", 5, None, {"cat"}])
def test_a_command_is_a_list(peer: IpcPeer, command: Any) -> None:
    with pytest.raises(TypeError, match="list"):
        peer.create_command_session(command)


def test_an_empty_command_is_refused(peer: IpcPeer) -> None:
    with pytest.raises(ValueError, match="empty"):
        peer.create_command_session([])


def test_no_shell_sees_the_command(peer: IpcPeer) -> None:
    session = peer.create_command_session(["echo", "$HOME; `id`", "*"])
    junk = log_texts(session, "junk")
    tick_until(lambda: not session.is_open, peer)
    assert junk() == "$HOME; `id` *\n"


# -- stderr


def test_stderr_is_text_and_never_frames(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("work"))
    text, notes = log_texts(session, "stderr"), collect(session, Note)
    forged = framed(Note("forged"))
    session.request(Ping(["stderr", b"before " + forged + b" after\n"])).wait()
    tick_until(lambda: text().endswith("after\n"), peer)
    assert text() == (b"before " + forged + b" after\n").decode("utf-8", "backslashreplace")
    assert notes == []


def test_characters_cut_in_two_on_stderr_arrive_whole(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("work"))
    text = log_texts(session, "stderr")
    for piece in (b"gr\xc3", b"\xbcn \xe2\x82", b"\xac \xff!\n"):
        session.request(Ping(["stderr", piece])).wait()
    tick_until(lambda: text().endswith("\n"), peer)
    assert text() == "grün € \\xff!\n"


@pytest.mark.slow
def test_a_flood_on_stderr_blocks_nobody(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("work"))
    sizes: List[int] = []
    session.on_message(lambda log: sizes.append(len(log.message)))
    promise = session.request(Ping(["flood stderr", 4 * 1024 * 1024]), expect=Pong)
    assert promise.wait().value == "done"
    tick_until(lambda: sum(sizes) >= 4 * 1024 * 1024, peer)
    assert sum(sizes) == 4 * 1024 * 1024


def test_a_flood_on_stderr_is_not_kept(peer: IpcPeer) -> None:
    session = peer.create_command_session(script("os.write(2, b'x' * 60000 + b'the end'); os._exit(4)"))
    promise = session.request(Ping())
    with pytest.raises(StreamClosedError, match="the end") as caught:
        promise.wait()
    assert len(str(caught.value)) < 5000


def test_stderr_may_be_shared_merged_or_dropped(peer: IpcPeer) -> None:
    command = script("os.write(2, b'to stderr'); os.write(1, b' to stdout'); sys.stdin.read()")
    merged = peer.create_command_session(command, stderr=subprocess.STDOUT)
    junk = log_texts(merged, "junk")
    tick_until(lambda: junk() == "to stderr to stdout", peer)
    read, write = os.pipe()
    with os.fdopen(read, "rb", 0), os.fdopen(write, "wb", 0) as target:
        passed = peer.create_command_session(command, stderr=target)
        logs = collect(passed, LogMessage)
        assert read_exactly(read, 9) == b"to stderr"
        tick_until(lambda: logs, peer)
        assert [log.level for log in logs] == ["junk"]
    dropped = peer.create_command_session(command, stderr=subprocess.DEVNULL)
    assert dropped.process is not None and dropped.process.stderr is None


def test_help_names_the_default_of_stderr() -> None:
    signature = inspect.signature(IpcPeer.create_command_session)
    assert " = subprocess.PIPE, **popen" in str(signature) and signature.parameters["stderr"].default == subprocess.PIPE


@pytest.mark.slow
def test_a_child_that_closes_its_stderr_costs_nothing(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("work"))
    session.request(Ping(["close", 2])).wait()
    peer.tick(0.05)
    assert cpu_seconds(lambda: peer.tick(0.15)) < 0.04
    assert session.request(Ping(["none more"]), expect=Pong).wait().value == "done"


# -- attaching


@pytest.mark.parametrize("missing", ["stdin", "stdout", "both"])
def test_an_unsuitable_popen_is_refused_with_advice(peer: IpcPeer, missing: str) -> None:
    pipes = {name: PIPE for name in ("stdin", "stdout") if missing not in (name, "both")}
    process = subprocess.Popen(["cat"], **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **pipes})
    try:
        with pytest.raises(ValueError, match="stdin=PIPE"):
            peer.create_process_session(process)
        assert peer.sessions == ()
        for stream in (process.stdin, process.stdout):  # still its owner's, as they were
            assert stream is None or (not stream.closed and os.get_blocking(stream.fileno()))
    finally:
        kill(process)


def test_a_popen_whose_pipe_was_closed_is_refused(peer: IpcPeer) -> None:
    process = subprocess.Popen(["cat"], stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    try:
        with pytest.raises(ValueError, match="stdin.*closed"):
            peer.create_process_session(process)
        assert os.get_blocking(process.stdout.fileno())
    finally:
        kill(process)


@pytest.mark.parametrize("thing", [None, 5, "cat", object()])
def test_what_is_no_popen_is_refused(peer: IpcPeer, thing: Any) -> None:
    with pytest.raises(ValueError, match="attached to a subprocess.Popen, not to "):
        peer.create_process_session(thing)


@pytest.mark.matrix
@pytest.mark.parametrize("options", [{}, {"bufsize": 0}, {"stderr": PIPE}])
def test_an_attached_process_stays_its_owners(peer: IpcPeer, options: Any, tmp_path: pathlib.Path) -> None:
    with Gate(tmp_path / "gate") as gate:
        process = subprocess.Popen(role("linger", gate.path, 5), stdin=PIPE, stdout=PIPE, **options)
        session = peer.create_process_session(process)
        assert session.process is process
        assert session.request(Ping("x"), expect=Pong).wait().value == "x"
        session.close()
        assert process.poll() is None  # ending it is its owner's business
        assert all(s is None or s.closed for s in (process.stdin, process.stdout, process.stderr))
        gate.open()
        assert process.wait(PATIENCE) == 5


def test_a_process_that_has_died_can_still_be_attached(peer: IpcPeer) -> None:
    process = subprocess.Popen(script("os.write(1, sys.argv[1].encode('latin-1'))", "text"), stdin=PIPE, stdout=PIPE)
    process.wait(PATIENCE)
    session = peer.create_process_session(process)
    junk, closed = log_texts(session, "junk"), ended(session)
    tick_until(lambda: closed, peer)
    assert junk() == "text"


@pytest.mark.matrix
@pytest.mark.parametrize("attached", [True, False])
def test_a_removed_session_leaves_process_and_pipes(peer: IpcPeer, attached: bool) -> None:
    if attached:
        process = subprocess.Popen(role("echo"), stdin=PIPE, stdout=PIPE, stderr=PIPE)
        session = peer.create_process_session(process)
    else:
        session = peer.create_command_session(role("echo"))
        assert session.process is not None
        process = session.process
    try:
        assert session.request(Ping(1), expect=Pong).wait().value == 1
        promise = session.request(Ping(2), timeout=None)
        peer.remove_session(session)
        with pytest.raises(StreamClosedError):
            promise.wait()
        assert not session.is_open and peer.sessions == ()
        assert process.poll() is None
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None and not stream.closed and os.get_blocking(stream.fileno())
        again = peer.create_process_session(process)
        assert again.request(Ping(3), expect=Pong).wait().value == 3
        again.close()
        assert process.wait(PATIENCE) == 0
    finally:
        kill(process)


# -- dying

DEATHS = [
    (["exit", 3], "exit status 3"),
    (["exit", 0], "exit status 0"),
    (["sys.exit", 5], "exit status 5"),
    (["kill", signal.SIGKILL.value], "SIGKILL"),
    (["kill", signal.SIGTERM.value], "SIGTERM"),
    (["segfault"], "SIGSEGV"),
    (["abort"], "SIGABRT"),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("what", "text"), DEATHS, ids=[text for _, text in DEATHS])
def test_a_child_that_dies_before_it_replies(peer: IpcPeer, what: Any, text: str) -> None:
    session = peer.create_command_session(role("work"))
    process, closed = session.process, ended(session)
    assert process is not None
    session.request(Ping(["stderr", "last words\n"])).wait()
    with session.batch():  # in one write, or the child might be dead before the second
        promises = [session.request(Ping(what), timeout=None), session.request(Ping(["none more"]), timeout=None)]
    for promise in promises:
        with pytest.raises(StreamClosedError, match=text) as caught:
            promise.wait(PATIENCE)
        assert "last words" in str(caught.value)
        assert str(process.pid) in str(caught.value)
    tick_until(lambda: process.returncode is not None, peer)  # reaped without a call to close()
    assert closed == [session]
    assert peer.sessions == ()
    for call in (lambda: session.notify(Note()), lambda: session.request(Ping()), lambda: session.tick()):
        with pytest.raises(StreamClosedError, match=text):
            call()


def test_a_traceback_of_the_child_is_in_the_error(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f(:\n    pass\n")
    session = peer.create_command_session([sys.executable, str(bad)])
    with pytest.raises(StreamClosedError, match=r"(?s)exit status 1.*SyntaxError"):
        session.request(Ping()).wait()


def test_what_a_child_wrote_before_its_death_comes_first(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("reply and die", 3))
    notes, order = collect(session, Note), []  # type: ignore[var-annotated]
    session.on_message(lambda note: order.append(note.text) if isinstance(note, Note) else None)
    session.on_close(lambda session: order.append("closed"))
    with session.batch():
        first, second = session.request(Ping("a"), expect=Pong), session.request(Ping("b"), timeout=None)
    assert session.process is not None
    await_death(session.process)
    assert order == [] and not first.done
    tick_until(lambda: order[-1:] == ["closed"], peer)
    assert order == ["0", "1", "2", "closed"]
    assert [note.text for note in notes] == ["0", "1", "2"]
    assert first.wait(0).value == "a"
    with pytest.raises(StreamClosedError, match="SIGKILL"):
        second.wait(0)


def test_the_first_tick_after_a_death_delivers_and_the_reply_is_there(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("reply and die", 0))
    with session.batch():
        promise, second = session.request(Ping("a"), expect=Pong), session.request(Ping("b"))
    assert session.process is not None
    await_death(session.process)
    peer.tick(0)
    assert promise.done and promise.wait(0).value == "a"
    with pytest.raises(StreamClosedError):
        second.wait(1)


def test_as_much_as_a_pipe_holds_survives_the_death(peer: IpcPeer) -> None:
    code = """
        import fcntl
        size = fcntl.fcntl(1, 1032)  # F_GETPIPE_SZ
        frames = bytes.fromhex(sys.argv[1])
        count = size // len(frames)
        os.write(1, frames * count)
        os.write(2, b"%d" % count)
        os.kill(os.getpid(), 9)
    """
    session = peer.create_command_session(script(code, framed(Note("n")).hex()))
    notes, text, closed = collect(session, Note), log_texts(session, "stderr"), ended(session)
    assert session.process is not None
    await_death(session.process)
    tick_until(lambda: closed, peer)
    assert len(notes) == int(text()) > 100


@pytest.mark.parametrize("size", [1, 7, 8, 9, 500, 70_000])
def test_half_a_frame_is_left_behind(peer: IpcPeer, size: int) -> None:
    code = """
        os.read(0, 1)
        whole, half = bytes.fromhex(sys.argv[1]), bytes.fromhex(sys.argv[2])
        os.write(1, whole + half + bytes(int(sys.argv[3])))
        os.kill(os.getpid(), 9)
    """
    frame = frame_header(100_000) + b"x"
    half, zeros = frame[:size], max(0, size - len(frame))
    session = peer.create_command_session(script(code, framed(Note("whole")).hex(), half.hex(), zeros))
    promise, notes = session.request(Ping(), timeout=None), collect(session, Note)
    with pytest.raises(StreamClosedError, match="SIGKILL") as caught:
        promise.wait(PATIENCE)
    assert notes == [Note("whole")]
    if size > 8:
        assert f"{size - 8} of 100000 bytes" in str(caught.value)


def test_a_child_that_dies_at_once_is_noticed_by_the_sender(peer: IpcPeer) -> None:
    code = "os.write(2, b'no %s' % sys.argv[1].encode()); os._exit(1)"  # in pieces: the command is in the text too
    session = peer.create_command_session(script(code, "licence"))
    assert session.process is not None
    await_death(session.process)
    with pytest.raises(StreamClosedError, match=r"exit status 1(?s:.*)no licence"):
        for _ in range(100):
            session.request(Ping(b"x" * 1024 * 1024)).wait()


def test_a_child_that_closes_its_stdin_but_lives(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    with Gate(tmp_path / "gate") as gate:
        code = """
            gate = open(sys.argv[1], "rb")
            os.close(0)
            os.write(1, bytes.fromhex(sys.argv[2]))
            gate.read()
        """
        session = peer.create_command_session(script(code, gate.path, framed(Note("closed")).hex()))
        assert session.receive(PATIENCE) == Note("closed")
        with pytest.raises(StreamClosedError, match="no longer reads"):
            session.request(Ping()).wait()
        gate.open()


@pytest.mark.slow
def test_a_child_that_closes_its_stdout_but_lives(peer: IpcPeer) -> None:
    code = """
        os.read(0, 1)
        os.write(1, bytes.fromhex(sys.argv[1]))
        os.close(1)
        while os.read(0, 65536):
            pass
        os._exit(7)
    """
    session = peer.create_command_session(script(code, framed(Note("last")).hex()))
    process, notes = session.process, collect(session, Note)
    assert process is not None
    start = time.monotonic()
    with pytest.raises(StreamClosedError, match="closed its stdout but is still running"):
        session.request(Ping(), timeout=None).wait(PATIENCE)
    assert notes == [Note("last")]
    tick_until(lambda: process.returncode is not None, peer)
    assert process.returncode == 7  # by itself, because its stdin was closed
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_nobody_spins_while_a_child_without_stdout_is_ended(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.close(1); open(sys.argv[1]).read()"
    with Gate(tmp_path / "gate") as gate:
        session = peer.create_command_session(script(code, gate.path))
        process, other = session.process, peer.create_session_pair()
        assert process is not None
        tick_until(lambda: not session.is_open, peer)
        assert process.returncode is None
        assert cpu_seconds(lambda: peer.tick_for(0.2)) < 0.05
        assert other[0].is_open
        gate.open()
        tick_until(lambda: process.returncode is not None, peer)


def test_a_grandchild_that_holds_the_pipes_hides_no_death(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    with Gate(tmp_path / "gate") as gate:
        session = peer.create_command_session(role("leave a grandchild", gate.path))
        process, notes, closed = session.process, collect(session, Note), ended(session)
        assert process is not None
        start = time.monotonic()
        with pytest.raises(StreamClosedError, match="exit status 3"):
            session.request(Ping(), timeout=None).wait(PATIENCE)
        assert time.monotonic() - start < 10  # the grandchild lives until the gate is opened
        assert notes == [Note("before")]
        tick_until(lambda: closed and process.returncode is not None, peer)
        assert process.returncode == 3


def test_a_grandchild_that_goes_on_writing_hides_no_death_either(peer: IpcPeer) -> None:
    # It writes for ever; SIGPIPE ends it as soon as our end is closed.
    session = peer.create_command_session(["sh", "-c", "yes & exit 3"])
    closed = ended(session)
    start = time.monotonic()
    with pytest.raises(StreamClosedError, match="exit status 3"):
        session.request(Ping(), timeout=None).wait(PATIENCE)
    tick_until(lambda: closed, peer)
    assert time.monotonic() - start < 10


@pytest.mark.matrix
@pytest.mark.parametrize("pidfd", [True, False])
def test_a_death_is_noticed_while_nobody_waits_for_a_reply(
    peer: IpcPeer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, pidfd: bool
) -> None:
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open", raising=False)  # as on macOS
    with Gate(tmp_path / "gate") as gate:
        session = peer.create_command_session(role("leave a grandchild", gate.path, "at once"))
        closed = ended(session)
        start = time.monotonic()
        while not closed:
            peer.tick(None)
        assert time.monotonic() - start < 10


def test_without_a_pidfd_children_are_asked_for_by_time_and_not_by_every_tick(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[int] = []

    def status(child: Any) -> Any:
        asked.append(child.process.pid)
        return child.process.poll()

    monkeypatch.delattr(os, "pidfd_open", raising=False)
    patch_process(monkeypatch, "Child.status", status)
    with monkeypatch.context() as patch:
        set_limit("death interval", 60.0, patch)
        children = [peer.create_command_session(["cat"]) for _ in range(4)]
        for _ in range(50):
            peer.tick()
            due = peer.next_deadline()
            assert due is not None and due > 50
        assert len(asked) == 4
    for session in children:
        session.close()


def test_a_reaped_child_is_not_said_to_have_succeeded(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("work"))
    promise = session.request(Ping(["exit", 3]), timeout=None)
    assert session.process is not None
    os.waitpid(session.process.pid, 0)  # somebody in this program reaps whatever dies
    with pytest.raises(StreamClosedError, match="status unknown"):
        promise.wait(PATIENCE)


def test_with_sigchld_ignored_nothing_is_made_up() -> None:
    code = """
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with IpcPeer() as peer:
            session = peer.create_command_session([sys.executable, "-m", "tests.child", "work"])
            print(session.request(Ping(["none more"]), expect=Pong).wait().value)
            try:
                session.request(Ping(["exit", 3]), timeout=None).wait(20)
            except StreamClosedError as exc:
                print(exc)
            other = peer.create_command_session([sys.executable, "-m", "tests.child", "echo"])
            print(other.request(Ping("again"), expect=Pong).wait().value)
            other.close()
        print("end")
    """
    done = subprocess.run(program(code), stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
    lines = done.stdout.decode().splitlines()
    assert done.stderr == b"" and done.returncode == 0
    assert lines[0] == "done" and lines[-2:] == ["again", "end"]
    assert "exit status unknown" in lines[1]


def test_the_last_words_on_stdout_are_kept_within_bounds(peer: IpcPeer) -> None:
    # As PHP complains.
    session = peer.create_command_session(script("print('x' * 100_000 + 'the end', flush=True); os._exit(3)"), stderr=None)
    with pytest.raises(StreamClosedError, match="exit status 3") as caught:
        session.request(Ping()).wait(PATIENCE)
    text = str(caught.value)
    assert text.endswith("the end") and "its stdout" in text and len(text) < 2500


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="without a pidfd the closed stream may be noticed first")
def test_a_death_is_told_though_its_stdout_was_closed_by_its_owner(peer: IpcPeer) -> None:
    process = subprocess.Popen(["cat"], stdin=PIPE, stdout=PIPE)
    session = peer.create_process_session(process)
    errors, closed = [], ended(session)
    session.on_exception(errors.append)
    promise = session.request(Ping(), timeout=None)
    assert process.stdout is not None
    read_exactly(process.stdout.fileno(), len(framed(RequestEnvelope(promise.id, Ping()))))
    process.kill()
    await_death(process)
    process.stdout.close()
    tick_until(lambda: closed, peer)
    assert errors == []
    with pytest.raises(StreamClosedError, match="killed by SIGKILL"):
        promise.wait()
    process.wait()


def test_a_popen_whose_lock_is_held_for_ever_is_polled_all_the_same() -> None:
    process: Any = subprocess.Popen(script("os._exit(5)"))
    await_death(process)
    process._waitpid_lock.acquire()  # as an exception of a signal handler inside poll() can leave it
    assert process.poll() is None
    assert new_child(process).status() == 5
    process._waitpid_lock.release()
    assert process.wait() == 5


def test_a_child_whose_popen_has_a_lock_that_is_held_for_ever_is_reaped(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("work"))
    process: Any = session.process
    process._waitpid_lock.acquire()
    session.close()
    assert process.returncode == 0
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="without waitid() it is reaped")
def test_a_child_that_another_thread_waits_for_is_left_to_that(peer: IpcPeer) -> None:
    # It would make a status up if the child was reaped in front of it.
    process: Any = subprocess.Popen(script("sys.stdin.buffer.read(1); sys.exit(3)"), stdin=PIPE, stdout=PIPE)
    session = peer.create_process_session(process)
    process._waitpid_lock.acquire()  # as it is inside process.wait()
    session.notify(Note("x"))
    with pytest.raises(StreamClosedError, match="exited with exit status 3"):
        session.receive(PATIENCE)
    await_death(process)  # it was not reaped
    process._waitpid_lock.release()
    assert process.wait() == 3


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="without waitid() it is not asked")
def test_an_interruption_while_popen_polls_does_not_lose_the_status() -> None:
    class Interrupt(InterruptAt):
        path = subprocess.__file__

    for number in range(1, 100):
        process: Any = subprocess.Popen(["sh", "-c", "exit 3"])
        await_death(process)
        child = new_child(process)
        interrupt = Interrupt(number, Interruption())
        try:
            with interrupt:
                child.status()
        except Interruption:
            assert child.status() == 3, interrupt.where
        child.reap()
        assert process.returncode == 3, interrupt.where
        if not interrupt.hit:
            break
    assert 3 < number < 99


def test_a_child_that_nobody_gets_a_session_with_is_killed(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    started: List[Any] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            started.append(self)
            super().__init__(*args, **kwargs)

    def fail(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(subprocess, "Popen", Popen)
    patch_process(monkeypatch, "ReadEnd", fail)
    before = listing()
    with pytest.raises(MemoryError):
        peer.create_command_session(["sleep", "60"])  # which does not end with its stdin
    assert started[0].returncode == -signal.SIGKILL
    assert peer.sessions == () and listing() == before


def test_a_request_to_a_child_that_only_prints_says_what_it_has_printed(peer: IpcPeer) -> None:
    session = peer.create_command_session([sys.executable, "-c", "input('name? ')"])
    assert session.receive(20) == LogMessage("name? ", LogMessage.LEVEL_JUNK)
    with pytest.raises(RequestTimeoutError, match="in place of them, ends with 'name\\?'"):
        session.request(Ping(), timeout=0).wait()


# -- ending


def test_a_child_that_is_closed_ends_by_itself_first(peer: IpcPeer) -> None:
    session = peer.create_command_session(script("sys.stdin.read(); time.sleep(0.05); os._exit(7)"))
    process = session.process
    session.close()
    assert process is not None and process.returncode == 7


def test_a_session_that_closes_runs_no_handlers_of_another_that_is_still_ending(peer: IpcPeer) -> None:
    other = peer.create_command_session(script("os.close(1); sys.stdin.read(); os.write(2, b'last words\\n')"))
    session = peer.create_command_session(["cat"])
    heard: List[Any] = []
    other.on_message(lambda text: heard.append(text.message))
    tick_until(lambda: not other.is_open, peer)
    assert other.process is not None and other.process.stderr is not None
    assert select.select([other.process.stderr], [], [], PATIENCE)[0]  # they are there, and not read yet
    session.close(timeout=0)
    assert heard == []
    tick_until(lambda: heard == ["last words"], peer)


def test_a_child_that_ignores_the_end_of_its_stdin_is_terminated(peer: IpcPeer, short_graces: None) -> None:
    session = peer.create_command_session(script("os.write(1, b'up')\nwhile True: signal.pause()"))
    junk, process = log_texts(session, "junk"), session.process
    tick_until(lambda: junk() == "up", peer)
    session.close()
    assert process is not None and process.returncode == -signal.SIGTERM


@pytest.mark.slow  # so are the eight of the next but one
def test_a_stubborn_child_is_killed(peer: IpcPeer, short_graces: None) -> None:
    session = peer.create_command_session(role("stubborn"))
    process = session.process
    assert session.request(Ping(), expect=Pong).wait().value == "ready"
    session.close()
    assert process is not None and process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_stopped_child_is_killed_too(peer: IpcPeer, short_graces: None) -> None:
    session = peer.create_command_session(role("echo"))
    process = session.process
    assert process is not None
    session.request(Ping()).wait()
    os.kill(process.pid, signal.SIGSTOP)
    session.close()
    assert process.returncode == -signal.SIGKILL


def test_a_child_that_is_blocked_writing_can_end_by_itself(peer: IpcPeer) -> None:
    code = """
        sys.stdin.read()
        for fd in (1, 2):
            data = memoryview(bytes(3 << 20))
            while data:
                data = data[os.write(fd, data):]
        os._exit(9)
    """
    session = peer.create_command_session(script(code))
    process = session.process
    session.close()
    assert process is not None and process.returncode == 9


def test_a_child_that_writes_without_end_is_ended(peer: IpcPeer, short_graces: None) -> None:
    code = "signal.signal(signal.SIGPIPE, signal.SIG_IGN)\nwhile True: os.write(1, bytes(65536))"
    session = peer.create_command_session(script(code))
    process = session.process
    start = time.monotonic()
    session.close()
    assert process is not None and process.returncode == -signal.SIGTERM
    assert time.monotonic() - start < 10


def test_what_is_queued_reaches_the_child_that_is_closed(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "received"
    code = """
        with open(sys.argv[1], "wb") as target:
            while True:
                data = os.read(0, 4096)
                if not data:
                    break
                target.write(data)
    """
    session = peer.create_command_session(script(code, target))
    note = Note("large", b"z" * 1_000_000)
    session.notify(note)
    session.close()
    assert target.read_bytes() == framed(note)


@pytest.mark.slow
def test_eight_stubborn_children_end_as_fast_as_one(short_graces: None) -> None:
    peer = IpcPeer()
    sessions = [peer.create_command_session(role("stubborn")) for _ in range(8)]
    for session in sessions:
        assert session.request(Ping(), expect=Pong).wait().value == "ready"
    processes = [session.process for session in sessions]
    start = time.monotonic()
    peer.close()
    took = time.monotonic() - start
    assert [process.returncode for process in processes if process] == [-signal.SIGKILL] * 8
    one = limit("exit grace") + limit("terminate grace")
    assert took < 5 * one, f"{took:.1f} s; one takes {one} s, one after the other {8 * one} s"


def test_the_end_of_one_child_does_not_wait_for_another(peer: IpcPeer) -> None:
    # The later one must not have inherited the earlier one's stdin, or that would never end.
    first = peer.create_command_session(role("echo"))
    second = peer.create_command_session(role("echo"))
    first.request(Ping()).wait()
    second.request(Ping()).wait()
    process = first.process
    first.close()
    assert process is not None and process.returncode == 0
    assert second.request(Ping(2), expect=Pong).wait().value == 2


def test_closing_after_the_death_is_immediate(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("exit grace", 20.0, monkeypatch)
    session = peer.create_command_session(role("work"))
    process = session.process
    session.request(Ping(["none more"])).wait()
    assert process is not None
    process.kill()
    await_death(process)
    start = time.monotonic()
    session.close()
    session.close()
    assert time.monotonic() - start < 10
    assert process.returncode == -signal.SIGKILL


def test_closing_while_a_grandchild_holds_the_pipes_is_immediate(
    peer: IpcPeer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit("exit grace", 20.0, monkeypatch)
    with Gate(tmp_path / "gate") as gate:
        session = peer.create_command_session(role("leave a grandchild", gate.path, "stay"))
        assert session.receive(PATIENCE) == Note("before")
        process = session.process
        start = time.monotonic()
        session.close()
        assert time.monotonic() - start < 10
        assert process is not None and process.returncode == 3


def test_a_handler_may_close_the_session_of_a_child(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("work"))
    process = session.process
    session.on_message(lambda note: session.close())
    with pytest.raises(StreamClosedError, match="this side"):
        session.request(Ping(["notify", 1])).wait()
    assert process is not None and process.returncode == 0


# -- nothing is left


def test_fifty_children_leave_nothing(peer: IpcPeer) -> None:
    # cat sends every frame back, and starts in no time.
    peer.create_command_session(["cat"]).close()
    before = listing()
    processes = []
    for index in range(50):
        session = peer.create_command_session(["cat"] if index % 5 else ["sh", "-c", "exit 3"])
        process, closed = session.process, ended(session)
        assert process is not None
        processes.append(process)
        if index % 5 == 0:
            tick_until(lambda closed=closed: closed, peer)
            assert session.process is process
            continue
        session.notify(Note(str(index)))
        assert session.receive(PATIENCE) == Note(str(index))
        if index % 5 == 1:
            session.close()
        elif index % 5 == 2:
            process.kill()
            tick_until(lambda closed=closed: closed, peer)
        elif index % 5 == 3:
            promise = session.request(Ping(), timeout=None)
            process.kill()
            await_death(process)
            session.close()
            with pytest.raises((StreamClosedError, RemoteError)):
                promise.wait(0)
        else:
            session.on_close(lambda session: session.close())
            session.close()
    tick_until(lambda: all(process.returncode is not None for process in processes), peer)
    assert listing() == before
    for process in processes:
        assert not os.path.exists(f"/proc/{process.pid}") or process.returncode is not None
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


@pytest.fixture
def few_descriptors() -> Iterator[Any]:
    """Makes descriptors scarce: a call leaves exactly so many free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare: List[int] = []

    def leave(count: int) -> None:
        while spare:
            os.close(spare.pop())
        highest = max(map(int, os.listdir("/dev/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 30, hard))
        try:
            while True:
                spare.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as exc:
            assert exc.errno == errno.EMFILE
        for _ in range(count):
            os.close(spare.pop())

    yield leave
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    while spare:
        os.close(spare.pop())


def test_the_end_of_a_child_takes_no_descriptor(peer: IpcPeer, few_descriptors: Any) -> None:
    session = peer.create_command_session(role("echo"))
    session.request(Ping()).wait()
    session.process.kill()
    await_death(session.process)  # all of its descriptors are ready at once
    few_descriptors(0)
    with pytest.raises(StreamClosedError, match="SIGKILL"):
        session.receive(PATIENCE)


def test_running_out_of_descriptors_while_spawning_leaks_none(peer: IpcPeer, few_descriptors: Any) -> None:
    other = peer.create_command_session(["cat"])
    failed = started = 0
    for free in range(20):
        few_descriptors(free)
        before = open_count()
        try:
            session = peer.create_command_session(["cat"])
        except OSError as exc:
            assert exc.errno == errno.EMFILE
            failed += 1
        else:
            session.notify(Note("works"))
            assert session.receive(PATIENCE) == Note("works")
            session.close()
            started += 1
        assert open_count() == before, f"with {free} descriptors free"
        other.notify(Note("still here"))
        assert other.receive(PATIENCE) == Note("still here")
        assert peer.sessions == (other,)
    assert failed and started


def open_count() -> int:
    # No listing of a folder: that takes a descriptor itself.
    count = 0
    for fd in range(resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        try:
            os.fstat(fd)
            count += 1
        except OSError:
            pass
    return count


# -- the master's death


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["kill", "exit", "os._exit"])
@pytest.mark.parametrize("busy", [False, True])
def test_a_slave_ends_with_its_master(how: str, busy: bool) -> None:
    # All hold the pipe's write end as their stderr: its end means that the last of them is gone.
    code = """
        peer = IpcPeer()
        echo = [sys.executable, "-m", "tests.child", "echo"]
        sessions = [peer.create_command_session(echo, stderr=None) for _ in "ab"]
        for session in sessions:
            session.request(Ping(1)).wait()
            if "busy" in sys.argv:
                for _ in range(50):
                    session.notify(Note("much", bytes(20000)))
        if "kill" in sys.argv:
            os.kill(os.getpid(), 9)
        if "os._exit" in sys.argv:
            os._exit(0)
    """
    read, write = os.pipe()
    master = subprocess.Popen(program(code, how, *(["busy"] if busy else [])), stderr=write)
    os.close(write)
    try:
        assert read_to_end(read) == b""  # and nobody complained
        assert master.wait(PATIENCE) == (-signal.SIGKILL if how == "kill" else 0)
    finally:
        os.close(read)
        kill(master)


def test_control_c_ends_master_and_slave() -> None:
    code = """
        with IpcPeer() as peer:
            session = peer.create_command_session([sys.executable, "-m", "tests.child", "quiet"], stderr=None)
            session.request(Ping("x")).wait()
            try:
                os.write(1, b"up")
                session.receive()
            except (KeyboardInterrupt, StreamClosedError):
                os.write(1, b" interrupted")
        os.write(1, b" closed")
    """
    master = subprocess.Popen(program(code), stdout=PIPE, stderr=PIPE, start_new_session=True)
    try:
        assert master.stdout is not None and master.stderr is not None
        assert os.read(master.stdout.fileno(), 2) == b"up"
        os.killpg(master.pid, signal.SIGINT)
        assert read_to_end(master.stderr.fileno()) == b""
        assert read_to_end(master.stdout.fileno()) == b" interrupted closed"
        assert master.wait(PATIENCE) == 0
    finally:
        kill(master)


def test_an_oversized_header_from_a_child_ends_it_cleanly(peer: IpcPeer) -> None:
    code = "os.write(1, bytes.fromhex(sys.argv[1])); sys.stdin.read()"
    header = b"\xf3\x4a\x9d\xe2" + struct.pack(">I", 0xFFFFFFFF)
    session = peer.create_command_session(script(code, header.hex()))
    errors: List[Any] = []
    session.on_exception(errors.append)
    process, closed = session.process, ended(session)
    tick_until(lambda: closed, peer)
    assert len(errors) == 1
    tick_until(lambda: process is not None and process.returncode is not None, peer)
    assert process is not None and process.returncode == 0


# -- endings that something gets in the way of


LIVES_ON = "os.close(1); open(sys.argv[1]).read()"


@pytest.mark.slow
def test_closing_a_socket_does_not_wait_for_another_sessions_child(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    code = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {LIVES_ON}"
    with Gate(tmp_path / "gate") as gate:
        session = peer.create_command_session(script(code, gate.path))
        process, (a, b) = session.process, peer.create_session_pair()
        assert process is not None
        tick_until(lambda: not session.is_open, peer)
        start = time.monotonic()
        a.close()
        b.close()
        assert time.monotonic() - start < 1.0
        assert process.returncode is None and not a.is_open and not b.is_open
        gate.open()
        tick_until(lambda: process.returncode is not None, peer)


@pytest.mark.slow
def test_closing_a_session_whose_stream_has_ended_ends_its_child(
    peer: IpcPeer, tmp_path: pathlib.Path, short_graces: None
) -> None:
    with Gate(tmp_path / "gate") as gate:
        session = peer.create_command_session(script(LIVES_ON, gate.path))
        process = session.process
        assert process is not None
        tick_until(lambda: not session.is_open, peer)
        assert process.returncode is None
        session.close()
        assert process.returncode == -signal.SIGTERM
        session.close()


class Interrupted(BaseException):
    """Stands for a KeyboardInterrupt."""


@pytest.mark.matrix
@pytest.mark.parametrize("closing", ["peer", "session"])
@pytest.mark.slow
def test_an_interrupted_close_can_be_repeated_and_ends_the_child(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, closing: str
) -> None:
    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted

    with Gate(tmp_path / "gate") as gate:
        peer = IpcPeer()
        session = peer.create_command_session(script("open(sys.argv[1]).read()", gate.path))
        process = session.process
        assert process is not None
        close = peer.close if closing == "peer" else session.close
        set_limit("exit grace", 0.4, monkeypatch)
        old = signal.signal(signal.SIGALRM, interrupt)
        try:
            with pytest.raises(Interrupted):
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                close()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        assert process.poll() is None
        close()
        assert process.returncode == -signal.SIGTERM
        peer.close()


@pytest.mark.slow
def test_the_end_of_the_interpreter_completes_an_interrupted_close() -> None:
    code = """
        def interrupt(number, frame):
            raise KeyboardInterrupt

        from tests.helpers import set_limit

        set_limit("exit grace", 0.4)
        peer = IpcPeer()
        session = peer.create_command_session(["sleep", "1000"], stderr=None)
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            peer.close()
        except KeyboardInterrupt:
            print(session.process.pid, session.process.poll(), flush=True)
    """
    done = subprocess.run(program(code), stdin=subprocess.DEVNULL, stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
    assert done.returncode == 0 and done.stderr == b""
    pid, status = done.stdout.split()
    assert status == b"None"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.slow
def test_a_child_that_may_not_be_ended_keeps_no_other_from_it(
    monkeypatch: pytest.MonkeyPatch, short_graces: None
) -> None:
    def refuse(number: int) -> None:
        raise PermissionError(errno.EPERM, "it runs as somebody else")

    def refuse_to_terminate(number: int) -> None:
        if number == signal.SIGTERM:
            refuse(number)
        os.kill(processes[1].pid, number)

    peer = IpcPeer()
    sessions = [peer.create_command_session(role("stubborn")) for _ in range(3)]
    processes = [session.process for session in sessions if session.process is not None]
    for session in sessions:
        assert session.request(Ping(), expect=Pong).wait().value == "ready"
    set_limit("kill grace", 0.2, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(processes[0], "send_signal", refuse)
        patch.setattr(processes[1], "send_signal", refuse_to_terminate)
        peer.close()
    try:
        assert [process.returncode for process in processes] == [None, -signal.SIGKILL, -signal.SIGKILL]
    finally:
        kill(processes[0])


def test_a_dropped_peer_leaves_no_descriptor_of_a_child() -> None:
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    peer = IpcPeer()
    session = peer.create_command_session(role("echo"))
    process = session.process
    assert process is not None
    assert session.request(Ping(1), expect=Pong).wait().value == 1
    del peer, session
    with pytest.warns(ResourceWarning, match="unclosed <IpcPeer"):
        gc.collect()
    try:
        assert len(os.listdir("/dev/fd")) == before
        assert process.wait(PATIENCE) == 0  # it has seen the end of its stdin
    finally:
        kill(process)


def test_an_interruption_while_a_child_is_being_ended_closes_no_descriptor_twice(peer: IpcPeer) -> None:
    # The number may be another file's by then.
    before = len(os.listdir("/dev/fd"))
    number = 1 - places_apart()
    hit = True
    while hit:
        number += places_apart()
        session = peer.create_command_session(["cat"])
        interrupt = InterruptAt(number, Interruption())
        try:
            with interrupt:
                session.close()
        except Interruption:
            pass
        hit = interrupt.hit
        a, b = peer.create_session_pair()
        b.on_request(lambda request: Pong())
        session.close()
        assert a.request(Ping(), expect=Pong).wait(PATIENCE) == Pong(), interrupt.where
        process = session.process
        assert process is not None
        tick_until(lambda process=process: process.poll() is not None, peer)
        assert a.is_open and b.is_open, interrupt.where
        peer.tick(0)
        a.close()
        b.close()
        assert len(os.listdir("/dev/fd")) <= before, interrupt.where
    assert number > 50


def test_an_interruption_while_a_session_is_attached_or_removed_leaves_the_pipes_as_they_were(peer: IpcPeer) -> None:
    number = 1 - places_apart()
    hit = True
    with subprocess.Popen(["cat"], stdin=PIPE, stdout=PIPE, stderr=PIPE, bufsize=0) as process:
        pipes: Any = (process.stdin, process.stdout, process.stderr)
        while hit:
            number += places_apart()
            interrupt = InterruptAt(number, Interruption())
            try:
                with interrupt:
                    peer.remove_session(peer.create_process_session(process))
            except Interruption:
                pass
            hit = interrupt.hit
            peer.tick(0)
            for session in peer.sessions:  # it was there already
                peer.remove_session(session)
            assert all(os.get_blocking(pipe.fileno()) for pipe in pipes), interrupt.where
    assert number > 50


def test_an_argument_that_raises_stop_iteration_is_an_error(peer: IpcPeer) -> None:
    class Stopping:
        def __fspath__(self) -> str:
            raise StopIteration

    with pytest.raises(RuntimeError, match=r"subprocess\.Popen raised StopIteration"):
        peer.create_command_session(script(""), executable=Stopping())
    assert not peer.sessions
