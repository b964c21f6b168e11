"""Child processes in the second edition: dead ones, how they are started and closed, what they print, forked copies."""

import gc
import io
import logging
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, Callable, Iterator, List

import pytest

from stream_ipc import IpcPeer, LogMessage, MessageTransport, Session, StreamClosedError, WorkerPool
from stream_ipc.transports import children, spawn
from tests.helpers import (
    PATIENCE,
    WAIT,
    InterruptAt,
    Interruption,
    InterruptionError,
    limit,
    places_apart,
    role,
    set_limit,
    tick_until,
)
from tests.messages import Note, Ping, Pong
from tests.os_helpers import await_death, ended, kill, listing, log_texts, program, read_to_end, script

# -- a dead child is reported as such

UP = """
    if {grandchild}:
        subprocess.Popen(["sleep", "60"])
    session = IpcPeer().create_stdio_session()
    session.notify(Note("up"))
    session.receive()
"""


@pytest.fixture(params=[True, False], ids=["with a grandchild", "alone"])
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
    assert time.monotonic() - start < 5  # a quarter of what it may wait


@pytest.mark.parametrize("timeout", [0, *[pytest.param(timeout, marks=pytest.mark.slow) for timeout in (2, None)]])
def test_flush_says_that_the_child_is_dead_each_time(dead: Session, timeout: Any) -> None:
    for _ in range(3):
        fails_at_once(lambda: dead.flush(timeout))
    assert dead.queued_bytes == 0
    # And whatever else is called then.
    fails_at_once(lambda: dead.notify(Note()))
    fails_at_once(lambda: dead.request(Ping()))
    assert dead.peer.broadcast(Note()) == 0


@pytest.mark.parametrize("how", ["notify", "request"])
def test_sending_says_that_the_child_is_dead(dead: Session, how: str) -> None:
    send = {"notify": lambda: dead.notify(Note()), "request": lambda: dead.request(Ping())}[how]
    for _ in range(3):
        fails_at_once(send)
    assert dead.queued_bytes == 0


@pytest.mark.matrix
def test_sending_says_that_the_child_is_dead_though_its_pipe_has_room(peer: IpcPeer) -> None:
    for how in (lambda s: s.notify(Note()), lambda s: s.request(Ping()), lambda s: s.request(Ping(), timeout=None)):
        session = peer.create_command_session(program(UP.format(grandchild=True)), start_new_session=True)
        process = session.process
        assert process is not None and session.receive(20) == Note("up")
        process.kill()
        await_death(process)
        try:
            for _ in range(3):
                fails_at_once(lambda how=how, session=session: how(session))
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.matrix
def test_a_program_that_notifies_a_dead_child_without_ticking_keeps_no_errors(dead: Session) -> None:
    errors: List[Any] = []
    with pytest.raises(StreamClosedError):
        dead.flush(0)
    for _ in range(20):
        try:
            dead.notify(Note())
        except StreamClosedError as exc:
            assert "was killed by SIGKILL" in str(exc)
            errors.append(weakref.ref(exc))
    gc.collect()
    alive = [error() for error in errors if error() is not None]
    assert len(errors) == 20 and len(alive) <= 1


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


@pytest.mark.matrix
def test_broadcast_does_not_count_a_dead_child(peer: IpcPeer, dead: Session) -> None:
    a, b = peer.create_session_pair()
    errors: List[Any] = []
    dead.on_exception(errors.append)
    start = time.monotonic()
    assert peer.broadcast(Note("to all")) == 2
    assert time.monotonic() - start < 5
    assert len(errors) == 1 and "SIGKILL" in str(errors[0])


@pytest.mark.matrix
def test_broadcast_does_not_wait_for_a_dead_child(peer: IpcPeer, dead: Session) -> None:
    errors: List[Any] = []
    dead.on_exception(errors.append)
    try:
        fill(dead)
    except StreamClosedError:
        pass
    start = time.monotonic()
    assert peer.broadcast(Note("to all")) == 0
    assert time.monotonic() - start < 5
    assert len(errors) == 1 and "SIGKILL" in str(errors[0])


@pytest.mark.matrix
def test_nothing_is_queued_for_a_child_of_which_flush_has_said_that_it_is_dead(peer: IpcPeer, dead: Session) -> None:
    dead.on_exception(lambda error: False)
    for _ in range(2):
        with pytest.raises(StreamClosedError, match="SIGKILL"):
            dead.flush(5)
        assert peer.broadcast(Note("to all")) == 0
        assert dead.queued_bytes == 0


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["session", "peer", "tick"])
def test_closing_waits_for_no_dead_child(peer: IpcPeer, dead: Session, how: str) -> None:
    start = time.monotonic()
    closed = ended(dead)
    if how == "tick":
        peer.tick(5)
    else:
        (dead if how == "session" else peer).close()
    assert time.monotonic() - start < limit("flush bound")
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


# -- starting


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stdin", None),
        ("stdout", subprocess.PIPE),
        ("shell", True),
        ("text", True),
        ("encoding", "utf-8"),
        ("errors", "replace"),
        ("universal_newlines", True),
        ("bufsize", 0),
        ("args", ["cat"]),
    ],
)
def test_what_would_break_the_conversation_is_refused(peer: IpcPeer, name: str, value: Any) -> None:
    before = listing()
    with pytest.raises(TypeError, match=f"takes no {name}: "):
        peer.create_command_session(["cat"], **{name: value})
    assert listing() == before


def test_an_unknown_keyword_is_refused(peer: IpcPeer) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'stdrr'"):
        peer.create_command_session(["cat"], stdrr=None)


def test_other_keywords_of_popen_are_passed_on(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    read, write = os.pipe()
    code = f"""
        os.write({write}, b"passed")
        os.close(os.open("made", os.O_CREAT, 0o666))
        print(os.getsid(0) == os.getpid(), oct(os.stat("made").st_mode), os.environ["SET"], flush=True)
        sys.stdin.read()
    """
    session = peer.create_command_session(
        script(code),
        pass_fds=[write],
        start_new_session=True,
        umask=0o077,
        cwd=tmp_path,
        executable=sys.executable,
        preexec_fn=lambda: os.environ.update(SET="1"),
        env={**os.environ, "SET": "2"},
        restore_signals=True,
        close_fds=True,
        pipesize=1 << 17,
    )
    junk = log_texts(session, "junk")
    tick_until(lambda: junk().endswith("\n"), peer)
    assert junk() == "True 0o100600 2\n"
    assert os.read(read, 10) == b"passed"
    assert session.process is not None and session.process.stdin is not None
    if sys.platform == "linux":
        import fcntl

        assert fcntl.fcntl(session.process.stdin, 1032) == 1 << 17  # F_GETPIPE_SZ
    os.close(read)
    os.close(write)


class NoDescriptor:
    def fileno(self) -> Any:
        return self.number

    def __init__(self, number: Any) -> None:
        self.number = number


def closed_file() -> Any:
    with open(os.devnull, "w") as file:
        return file


@pytest.mark.parametrize(
    "options",
    [
        {"stderr": io.StringIO()},
        {"stderr": closed_file()},
        {"stderr": NoDescriptor("1")},
        {"stderr": NoDescriptor(-1)},
        {"stderr": NoDescriptor(True)},
        {"stderr": "log.txt"},
        {"stderr": True},
        {"stderr": 999},
        {"stderr": 10**30},
        {"stderr": -7},
        {"cwd": 5},
        {"cwd": "/no/such/folder"},
        {"cwd": "with\0null"},
        {"env": ["A=1"]},
        {"env": {"A": 1}},
        {"env": {1: "A"}},
        {"env": {"A": "with\0null"}},
        {"env": {"A=B": "C"}},
        {"user": "no-such-user"},
        {"user": -5},
        {"user": [1]},
        {"group": "no-such-group"},
        {"extra_groups": ["no-such-group"]},
        {"extra_groups": 5},
        {"umask": "x"},
        {"pass_fds": [-1]},
        {"pass_fds": 5},
        {"preexec_fn": 5},
        {"preexec_fn": lambda: 1 / 0},
        {"executable": "/no/such/program"},
        {"pipesize": "x"},
        {"stderr": subprocess.DEVNULL, "user": "no-such-user"},
        {"stderr": subprocess.STDOUT, "group": "no-such-group"},
        {"process_group": "x"},
    ],
    ids=str,
)
def test_nothing_is_lost_if_starting_fails(peer: IpcPeer, options: Any) -> None:
    before = listing()
    for _ in range(2):
        with pytest.raises((TypeError, ValueError, OSError, subprocess.SubprocessError, OverflowError, KeyError)):
            peer.create_command_session(["cat"], **options)
    assert listing() == before and peer.sessions == ()


class _AroundFork(InterruptAt):
    events = ("c_return",)
    path = subprocess.__file__

    def is_place(self, frame: Any, event: str) -> bool:
        # Before these lines Popen makes a pipe, and loses it.
        return frame.f_code.co_name == "_execute_child" and "fds_to_keep" in frame.f_locals


class InterruptsStart(logging.Filter):
    """Interrupts the start of a child once it runs, after something else."""

    def __init__(self, first: Callable[[], Any]) -> None:
        super().__init__()
        self.first = first
        self.pid = 0

    def filter(self, record: logging.LogRecord) -> bool:
        found = re.search(r"\(pid (\d+)\) started", record.getMessage())
        if found:
            self.pid = int(found[1])
            self.first()
            raise Interruption("while it started")
        return True

    def __enter__(self) -> "InterruptsStart":
        logging.getLogger("stream_ipc").addFilter(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        logging.getLogger("stream_ipc").removeFilter(self)


def test_an_interrupted_start_leaves_nothing_of_the_childs_own_group(
    peer: IpcPeer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "stream_ipc")
    read, write = os.pipe()
    command = ["sh", "-c", "(echo >&2; exec sleep 60) & wait"]
    with InterruptsStart(lambda: os.read(read, 1)), pytest.raises(Interruption, match="while it started"):
        peer.create_command_session(command, stderr=write, start_new_session=True)
    os.close(write)
    assert select.select([read], [], [], PATIENCE)[0], "the grandchild runs on"
    assert os.read(read, 100) == b""
    os.close(read)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # which is what Popen says of it
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take itself the right to kill its child")
@pytest.mark.parametrize("ends", [True, False])
def test_a_child_that_may_not_be_killed_hides_no_error_and_is_not_waited_for_without_end(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ends: bool
) -> None:
    set_limit("kill grace", PATIENCE if ends else WAIT, monkeypatch)
    caplog.set_level(logging.DEBUG, "stream_ipc")
    before = listing()
    nobody = InterruptsStart(lambda: os.setresuid(65534, 65534, 0))
    try:
        with nobody, pytest.raises(Interruption, match="while it started"):
            peer.create_command_session(["cat"] if ends else ["sleep", "60"])
    finally:
        os.setresuid(0, 0, 0)
    gc.collect()
    assert listing() == before and peer.sessions == ()
    left = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    if ends:  # it has read the end of its stdin
        assert left == []
        with pytest.raises(ChildProcessError):
            os.waitpid(nobody.pid, 0)
    else:
        assert [text.endswith(f"(pid {nobody.pid}) still runs after SIGKILL, and is left alone") for text in left] == [True]
        os.kill(nobody.pid, signal.SIGKILL)
        os.waitpid(nobody.pid, 0)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux tells which child it is")
@pytest.mark.parametrize("options", [{}, {"preexec_fn": int}], ids=["", "a slow start"])
@pytest.mark.parametrize("kind", [Interruption, InterruptionError])
def test_an_interrupted_start_leaves_no_child(peer: IpcPeer, kind: Any, options: Any) -> None:
    # The moment when Popen has not stored the pid yet is among these.
    places = []
    while True:
        read, write = os.pipe()
        interrupt = _AroundFork(len(places) + 1, kind())
        try:
            with interrupt:
                peer.create_command_session(["sleep", "60"], pass_fds=[write], **options).close(0)
        except kind:
            pass
        os.close(write)
        assert read_to_end(read) == b"", interrupt.where
        os.close(read)
        if not interrupt.hit:
            break
        places.append(interrupt.where)
    assert any("fork_exec" in place for place in places)


class _WhileItIsKilled(InterruptAt):
    path = children.__file__

    def is_place(self, frame: Any, event: str) -> bool:
        # At the top of kill() itself nothing has begun that could be gone on with.
        return super().is_place(frame, event) and (event != "call" or frame.f_code.co_name != "kill")


@pytest.mark.parametrize("kind", [Interruption, InterruptionError])
def test_a_start_that_is_interrupted_twice_leaves_no_child(peer: IpcPeer, caplog: Any, kind: Any) -> None:
    caplog.set_level(logging.DEBUG, "stream_ipc")
    number = 0
    while True:
        number += 1
        second = _WhileItIsKilled(number, kind())
        nobody = InterruptsStart(second.__enter__)
        try:
            with nobody, pytest.raises((Interruption, kind)):
                peer.create_command_session(["sleep", "60"])
        finally:
            second.__exit__()
        with pytest.raises(ChildProcessError):
            os.waitpid(nobody.pid, os.WNOHANG)
        if not second.hit:
            break
    assert number > 10


class _WhileItIsUndone(InterruptAt):
    path = spawn.__file__

    def is_place(self, frame: Any, event: str) -> bool:
        return super().is_place(frame, event) and frame.f_code.co_name in ("_undo", "_find_pid")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux tells which child it is")
@pytest.mark.parametrize("kind", [Interruption, InterruptionError])
def test_a_start_of_which_undoing_is_interrupted_leaves_no_child(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    def undo_once_the_second_may_come(*arguments: Any) -> None:
        if begun.pop():
            second.__enter__()
        undo(*arguments)

    fork = 0
    where = ""
    while "fork_exec" not in where:
        fork += 1
        first = _AroundFork(fork, kind())
        with pytest.raises(kind), first:
            peer.create_command_session(["sleep", "60"])
        where = first.where
    undo = spawn._undo
    monkeypatch.setattr(spawn, "_undo", undo_once_the_second_may_come)
    number = 0
    while True:
        number += places_apart()
        begun = [False, True]
        read, write = os.pipe()
        second = _WhileItIsUndone(number, kind())
        try:
            with pytest.raises(kind), _AroundFork(fork, kind()):
                peer.create_command_session(["sleep", "60"], pass_fds=[write])
        finally:
            second.__exit__()
        os.close(write)
        assert read_to_end(read) == b"", second.where
        os.close(read)
        if not second.hit:
            break
    assert number > 10


@pytest.mark.parametrize("command", [["cat", 5], ["cat", None], ["c\0at"], [b"cat", "x\0"]])
def test_each_item_of_a_command_is_looked_at(peer: IpcPeer, command: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="each item of command"):
        peer.create_command_session(command)


@pytest.mark.parametrize("text", [{"text": True}, {"encoding": "utf-8"}, {"universal_newlines": True}])
def test_a_popen_in_text_mode_is_refused(peer: IpcPeer, text: Any) -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **text)
    with pytest.raises(ValueError, match="is a text stream; .* start it without text=True"):
        peer.create_process_session(process)
    kill(process)


def test_an_asyncio_process_is_refused(peer: IpcPeer) -> None:
    import asyncio

    async def main() -> None:
        pipe = subprocess.PIPE
        process = await asyncio.create_subprocess_exec("cat", stdin=pipe, stdout=pipe)
        with pytest.raises(ValueError, match=r"subprocess\.Popen\(command, stdin=PIPE, stdout=PIPE"):
            peer.create_process_session(process)  # type: ignore[arg-type]
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()

    asyncio.run(main())
    for thread in threading.enumerate():  # asyncio's own, which has waited for the process
        if thread is not threading.current_thread():
            thread.join(20)


@pytest.mark.matrix
@pytest.mark.parametrize("bufsize", [-1, 0, 1000])
def test_a_popen_with_a_buffer_and_what_its_owner_has_read_ahead(peer: IpcPeer, bufsize: int) -> None:
    pipe = subprocess.PIPE
    command = program(
        "print('hello'); sys.stdout.flush(); session = IpcPeer().create_stdio_session(); session.notify(Note()); "
        "session.receive()"
    )
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=bufsize)
    assert process.stdout is not None and process.stdout.readline() == b"hello\n"
    session = peer.create_process_session(process)
    assert session.receive(20) == Note()
    session.close()
    process.wait()


def test_sigpipe_at_its_default_is_warned_of() -> None:
    code = """
        import warnings
        from stream_ipc import IpcPeer
        with IpcPeer() as peer:
            peer.create_command_session(["cat"])
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                peer.create_session_pair()
                assert not found
                peer.create_command_session(["cat"])
        assert [w.category for w in found] == [RuntimeWarning] and "SIG_IGN" in str(found[0].message)
        assert found[0].filename == "<string>"  # the program's own line, not one of the library's
    """
    subprocess.run(program(code), check=True, timeout=20)


def test_sigpipe_at_its_default_is_dropped_while_signals_are_held_back_though_no_sigtimedwait_is_there() -> None:
    code = """
        import _signal
        vars(_signal).pop("sigtimedwait", None)  # as on macOS
        from stream_ipc.interruptions import Shield
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        read, write = os.pipe()
        os.close(read)
        try:
            with Shield():
                os.write(write, b"x")  # as OpenSSL does
        except BrokenPipeError:
            os._exit(7)
    """
    assert subprocess.run(program(code), timeout=20).returncode == 7


# -- ending


GROUP = """
    # A grandchild that ignores the end of everything, and says so on the pipe of its stderr.
    import subprocess
    helper = subprocess.Popen(
        [sys.executable, "-S", "-c", f"import signal, time\\n{sys.argv[1]}\\nprint('up', flush=True); time.sleep(60)"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=[int(sys.argv[3])],
    )
    helper.stdout.readline()
    os.close(int(sys.argv[3]))
    exec(sys.argv[2])
    session = IpcPeer().create_stdio_session()
    session.notify(Note("up"))
    serve(session)
    if sys.argv[2]:
        time.sleep(60)
"""
IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.mark.parametrize("how", ["start_new_session", "process_group"])
@pytest.mark.parametrize(
    ("helper", "leader", "timeout", "status"),
    [
        ("", "", None, 0),
        ("", "pass", 1, -signal.SIGTERM),
        (IGNORES, IGNORES, 0.6, -signal.SIGKILL),
        (IGNORES, "pass", 0, -signal.SIGKILL),
    ],
)
@pytest.mark.slow
def test_closing_signals_the_whole_group(
    peer: IpcPeer, how: str, helper: str, leader: str, timeout: Any, status: int
) -> None:
    if how == "process_group" and sys.version_info < (3, 11):
        with pytest.raises(TypeError, match="process_group"):
            peer.create_command_session(["cat"], process_group=0)
        return
    read, write = os.pipe()
    options: Any = {how: True if how == "start_new_session" else 0}
    session = peer.create_command_session(program(GROUP, helper, leader, write), pass_fds=[write], **options)
    os.close(write)
    try:
        process = session.process
        assert process is not None and session.receive(20) == Note("up")
        if timeout is None:
            session.close()
        else:
            session.close(timeout=timeout)
        assert process.returncode == status
        assert read_to_end(read, 5) == b""  # the last holder of the pipe is gone
    finally:
        os.close(read)


@pytest.mark.parametrize("how", ["session", "peer"])
@pytest.mark.parametrize("timeout", [0, 0.5])
@pytest.mark.slow
def test_a_timeout_bounds_the_end_of_children(peer: IpcPeer, how: str, timeout: float) -> None:
    sessions = [peer.create_command_session(role("stubborn")) for _ in range(3)]
    processes = [session.process for session in sessions]
    for session in sessions:
        session.request(Ping()).wait()
        while session.queued_bytes < 300_000:
            session.notify(Note("queued", b"x" * 100_000))
    for process in processes:
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
    start = time.monotonic()
    if how == "peer":
        peer.close(timeout=timeout)
    else:
        for session in sessions:
            session.close(timeout)
    took = time.monotonic() - start
    count = 1 if how == "peer" else 3
    assert count * timeout * 0.9 <= took < count * timeout + 0.5
    assert [process.returncode for process in processes if process] == [-signal.SIGKILL] * 3


@pytest.mark.parametrize("timeout", [3, None])
@pytest.mark.slow
def test_a_longer_timeout_leaves_a_child_more_time(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, timeout: Any
) -> None:
    set_limit("exit grace", 0.1, monkeypatch)
    session = peer.create_command_session(
        program("session = IpcPeer().create_stdio_session(); serve(session); time.sleep(0.5)")
    )
    session.close(timeout=timeout)
    assert session.process is not None and session.process.returncode == 0


@pytest.mark.parametrize(("timeout", "error"), [(-1, ValueError), ("1", TypeError), (float("nan"), ValueError)])
def test_the_timeout_of_close_is_checked(peer: IpcPeer, timeout: Any, error: Any) -> None:
    a, _ = peer.create_session_pair()
    for closing in (a.close, peer.close):
        with pytest.raises(error):
            closing(timeout=timeout)
    assert a.is_open


@pytest.mark.parametrize("how", ["session", "peer"])
def test_a_timeout_of_nothing_drops_what_is_queued_without_a_word(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    set_limit("flush bound", 20.0, monkeypatch)
    a, b = peer.create_session_pair()
    sock = b.socket
    peer.remove_session(b)
    while a.queued_bytes < 300_000:
        a.notify(Note("queued", b"x" * 100_000))
    start = time.monotonic()
    {"session": a, "peer": peer}[how].close(timeout=0)
    assert time.monotonic() - start < 10 and a.queued_bytes == 0
    assert sock is not None
    sock.close()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("how", ["session", "peer"])
def test_what_closing_drops_is_logged(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    set_limit("flush bound", 0.01, monkeypatch)
    mine, other = socket.socketpair()
    session = peer.create_socket_session(mine)
    peer.create_session_pair()[0].notify(Note("arrives"))
    while session.queued_bytes < 300_000:
        session.notify(Note("queued", b"x" * 100_000))
    size = session.queued_bytes
    if how == "session":
        session.close()
    else:
        peer.close(timeout=0.01)
    told = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and told[0].filename == "closing.py"
    assert f"{size} bytes" in told[0].getMessage() and "flush()" in told[0].getMessage()
    other.close()


@pytest.mark.parametrize("how", ["session", "peer", "tick"])
def test_a_log_handler_may_close_or_tick_as_it_is_told_what_closing_drops(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    set_limit("flush bound", 0.01, monkeypatch)
    told: List[str] = []

    class Closing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelname == "WARNING":
                told.append(record.getMessage())
                {"session": session.close, "peer": peer.close, "tick": peer.tick}[how]()

    handler = Closing()
    logging.getLogger("stream_ipc").addHandler(handler)
    try:
        for close in "session", "peer":
            mine, other = socket.socketpair()
            peer = IpcPeer()
            session = peer.create_socket_session(mine)
            while session.queued_bytes < 300_000:
                session.notify(Note("queued", b"x" * 100_000))
            {"session": session.close, "peer": peer.close}[close]()
            other.close()
            peer.close()
    finally:
        logging.getLogger("stream_ipc").removeHandler(handler)
    assert len(told) == 2


def test_what_a_half_closed_stream_does_not_take_is_logged(
    peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_limit("flush bound", 0.01, monkeypatch)
    mine, other = socket.socketpair()
    session = peer.create_socket_session(mine)
    while session.queued_bytes < 300_000:
        session.notify(Note("queued", b"x" * 100_000))
    other.shutdown(socket.SHUT_WR)
    tick_until(lambda: not session.is_open, peer)
    assert ["bytes, which are dropped" in record.getMessage() for record in caplog.records] == [True]
    other.close()


def interrupt_close(session: Session) -> None:
    """Close a session, and interrupt that while it waits for the other side to read."""

    def ring(number: int, frame: Any) -> None:
        raise InterruptionError

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)  # of the second that it waits
        with pytest.raises(InterruptionError):
            session.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("then", ["session", "peer"])
def test_a_close_that_was_interrupted_goes_on_writing_when_it_is_made_again(peer: IpcPeer, then: str) -> None:
    mine, other = socket.socketpair()
    session = peer.create_socket_session(mine)
    count = 0
    while session.queued_bytes < 300_000:
        session.notify(Note("queued", b"x" * 100_000))
        count += 1

    interrupt_close(session)
    got = bytearray()
    reader = threading.Thread(target=lambda: [got.extend(data) for data in iter(lambda: other.recv(65536), b"")])
    reader.start()
    (session if then == "session" else peer).close()
    reader.join()
    assert len(got) > count * 100_000
    other.close()


@pytest.mark.parametrize(("then", "logged"), [("tick", True), ("close", False)])
def test_what_a_close_that_was_interrupted_drops_is_logged_unless_it_is_to_be_dropped(
    peer: IpcPeer, caplog: pytest.LogCaptureFixture, then: str, logged: bool
) -> None:
    mine, other = socket.socketpair()
    session = peer.create_socket_session(mine)
    while session.queued_bytes < 300_000:
        session.notify(Note("queued", b"x" * 100_000))

    interrupt_close(session)
    if then == "tick":
        peer.tick(0)
    else:
        session.close(timeout=0)
    assert session.reason is not None
    assert any("which are dropped" in record.getMessage() for record in caplog.records) == logged
    other.close()


def test_a_failure_that_no_handler_was_told_of_is_logged(peer: IpcPeer, caplog: pytest.LogCaptureFixture) -> None:
    class Burning(MessageTransport):
        received: Iterator[Any] = iter([[Note()]])

        def receive(self) -> Any:
            for messages in self.received:
                return messages
            raise OSError("the disk is on fire")

        def send(self, message: Any) -> None: ...

        def read_fds(self) -> Any:
            return []

        def close(self) -> None: ...

    mine, other = socket.socketpair()
    stuck = peer.create_socket_session(mine)
    while not stuck.queued_bytes:
        stuck.notify(Note("queued", b"x" * 100_000))
    session = peer.create_session(Burning())
    told: List[Any] = []
    session.on_exception(told.append)

    @session.on_message
    def close(note: Note) -> None:
        with pytest.raises(TimeoutError):
            stuck.flush(0.01)  # which reads, and dispatches nothing
        session.close()

    peer.tick()
    assert told == []
    assert ["before its on_exception handlers were told" in record.getMessage() for record in caplog.records] == [True]
    stuck.close(0)
    other.close()


def test_what_nobody_can_read_any_more_is_not_logged(peer: IpcPeer, caplog: pytest.LogCaptureFixture) -> None:
    mine, other = socket.socketpair()
    session = peer.create_socket_session(mine)
    while session.queued_bytes < 300_000:
        session.notify(Note("queued", b"x" * 100_000))
    other.close()
    session.close()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.slow
def test_what_is_queued_has_all_but_the_last_second_of_a_longer_timeout(peer: IpcPeer) -> None:
    code = "os.write(2, b'up\\n'); time.sleep(5.5); data = sys.stdin.buffer.read(); os.write(2, b'%d' % len(data))"
    session = peer.create_command_session(script(code))
    lines = lines_of(session)
    tick_until(lambda: lines, peer)
    count = 0
    while session.queued_bytes < 300_000:
        session.notify(Note("queued", b"x" * 100_000))
        count += 1
    session.close(timeout=10)  # half of it would not do
    assert int(lines[1]) > count * 100_000


def test_a_timeout_bounds_the_close_of_a_connection_that_lingers(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("linger", 20.0, monkeypatch)
    server = socket.create_server(("127.0.0.1", 0))
    other = socket.create_connection(server.getsockname())
    mine, _ = server.accept()
    peer = IpcPeer()
    peer.create_socket_session(mine)
    other.sendall(b"more")
    start = time.monotonic()
    peer.close(timeout=0.05)
    assert time.monotonic() - start < 10
    other.close()
    server.close()


@pytest.mark.parametrize("how", ["close", "end", "peer"])
def test_the_reason_is_there_when_on_close_handlers_run(peer: IpcPeer, how: str) -> None:
    session = peer.create_command_session(role("work"))
    reasons: List[Any] = []
    session.on_close(lambda session: reasons.append(session.reason))
    assert session.reason is None
    if how == "close":
        session.close()
    elif how == "peer":
        peer.close()
    else:
        with pytest.raises(StreamClosedError):
            session.request(Ping(["exit", 3])).wait()
    assert isinstance(session.reason, StreamClosedError) and reasons == [session.reason]
    assert {"close": "this side", "end": "exit status 3", "peer": "closed the peer"}[how] in str(session.reason)


# -- what a child writes to stderr


def lines_of(session: Session) -> List[str]:
    found: List[str] = []

    @session.on_message
    def keep(log: LogMessage) -> None:
        if log.level == "stderr":
            found.append(log.message)

    return found


@pytest.mark.parametrize("how", ["session", "timeout", "peer"])
def test_what_was_read_with_the_last_reply_reaches_its_handlers_as_the_session_closes(peer: IpcPeer, how: str) -> None:
    session = read_lines_with_a_reply(peer)
    lines, calls = lines_of(session), []
    session.on_close(lambda session: calls.append([*lines]))
    if how == "peer":
        peer.close()
    else:
        session.close(**{"timeout": 5} if how == "timeout" else {})
    assert lines == ALL and calls == [lines]


LINES_AND_MORE = """
    session = IpcPeer().create_stdio_session()
    session.on_request(lambda ping: Pong())
    session.tick(None)
    os.write(2, b"one\\ntwo\\nthree\\n")
    serve(session)
    os.write(2, b"four\\n")
"""


def read_lines_with_a_reply(peer: IpcPeer, code: str = LINES_AND_MORE) -> Session:
    """Return the session of a child that has answered, while the lines behind that stand in the inbox."""
    session = peer.create_command_session(program(code))
    promise = session.request(Ping())
    process = session.process
    assert process is not None
    for stream in process.stdout, process.stderr:  # one after the other
        assert select.select([stream], [], [], PATIENCE)[0]
    promise.wait()
    return session


ALL = ["one", "two", "three", "four"]


@pytest.mark.parametrize("act", ["tick", "wait", "close"])
def test_last_words_reach_each_handler_in_order_whatever_the_first_does(peer: IpcPeer, act: str) -> None:
    session = read_lines_with_a_reply(peer)
    other, answering = peer.create_session_pair()
    answering.on_request(lambda ping: Pong())
    lines: List[List[str]] = [[], []]

    @session.on_message
    def first(text: LogMessage) -> None:
        lines[0].append(text.message)
        if act == "tick":
            peer.tick(0)
        elif act == "wait":
            other.request(Ping()).wait()
        else:
            session.close()

    session.on_message(lambda text: lines[1].append(text.message))
    session.close()
    assert lines == [ALL, ALL]


@pytest.mark.parametrize("close", ["session", "peer", "with"])
def test_a_line_of_which_one_handler_was_interrupted_reaches_the_others_as_the_session_closes(close: str) -> None:
    lines: List[List[str]] = [[], []]
    with IpcPeer() as peer:
        session = read_lines_with_a_reply(peer)

        @session.on_message
        def first(text: LogMessage) -> None:
            lines[0].append(text.message)
            if text.message in ("one", "three"):
                raise Interruption

        session.on_message(lambda text: lines[1].append(text.message))
        with pytest.raises(Interruption):
            peer.tick()
        with pytest.raises(Interruption):
            peer.close() if close != "session" else session.close()
        if close != "with":
            peer.close()
    assert lines == [ALL, ALL]


def test_lines_are_kept_for_their_handlers_while_the_closing_of_a_pool_runs_others(peer: IpcPeer) -> None:
    lines: List[List[str]] = []
    with WorkerPool(peer, program(LINES_AND_MORE), 1, on_session=lambda session: lines.append(lines_of(session))) as pool:
        promise = pool.submit(Ping())
        process = pool.workers[0].process
        assert process is not None
        for stream in process.stdout, process.stderr:
            assert select.select([stream], [], [], PATIENCE)[0]
        promise.wait()
        pool.submit(Ping()).add_done_callback(lambda promise: peer.tick(0))
        pool.close()
    assert lines == [ALL]


def test_more_lines_than_are_read_ahead_are_followed_by_the_last(peer: IpcPeer) -> None:
    code = LINES_AND_MORE.replace('b"one\\ntwo\\nthree\\n"', 'b"x\\n" * 5000')
    session = read_lines_with_a_reply(peer, code)
    lines, process = lines_of(session), session.process
    assert process is not None
    session.request(Ping()).add_done_callback(lambda promise: await_death(process))  # it fails once stdin is closed
    peer.close()
    assert len(lines) == 5001 and lines[-1] == "four"


def test_another_writer_of_its_stderr_keeps_no_close_from_ending(peer: IpcPeer) -> None:
    code = """
        subprocess.Popen(["yes"], stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
        serve(IpcPeer().create_stdio_session())
    """
    session = peer.create_command_session(program(code))
    lines = lines_of(session)
    tick_until(lambda: lines, peer)
    session.close()
    assert session.process is not None and session.process.returncode is not None


def test_what_an_attached_child_has_written_reaches_its_handlers_as_the_session_closes(peer: IpcPeer) -> None:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program(LINES_AND_MORE), **pipes) as process:
        session = peer.create_process_session(process)
        lines = lines_of(session)
        promise = session.request(Ping())
        for stream in process.stdout, process.stderr:
            assert select.select([stream], [], [], PATIENCE)[0]
        promise.wait()
        session.close()
    assert lines == ALL[:3]


WRITES = (
    "for piece in eval(open(sys.argv[1]).read()): os.write(2, piece) if isinstance(piece, bytes) else time.sleep(piece)"
)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"one\ntwo\r\n\nthree\n"], ["one", "two", "", "three"]),
        ([b"no end"], ["no end"]),
        ([b"in ", 0.05, b"pieces\n"], ["in pieces"]),
        ([b"slow ", 0.6, b"pieces\nnext\n"], ["slow ", "pieces", "next"]),
        ([b"slow", 0.6, b"\nnext\n"], ["slow", "next"]),
        ([b"slow", 0.6, b"\r\nnext\r", 0.05, b"\n"], ["slow", "next"]),
        ([b"10%\r20%\r", 0.6, b"30%\r\n"], ["10%\r20%\r", "30%"]),
        ([b"gr\xc3", 0.05, b"\xbcn\n"], ["gr\u00fcn"]),
        ([b"gr\xc3", 0.6, b"\xbcn\n"], ["gr", "\u00fcn"]),
        ([b"\xff\xfe\n"], ["\\xff\\xfe"]),
        ([b"end \xe2\x82"], ["end \\xe2\\x82"]),
        ([b"x" * 65536 + b"\n"], ["x" * 65536]),
        ([b"x" * 65537, 0.05, b"y\n"], ["x" * 65536, "xy"]),
        ([b"a" * 65535, b"\xc3\xbc", b"\n"], ["a" * 65535, "\u00fc"]),
    ],
    ids=range(14),
)
@pytest.mark.slow
def test_stderr_arrives_by_line(peer: IpcPeer, tmp_path: pathlib.Path, pieces: Any, expected: List[str]) -> None:
    (tmp_path / "pieces").write_text(repr(pieces))
    session = peer.create_command_session(script(WRITES, tmp_path / "pieces"))
    found = lines_of(session)
    at_close: List[int] = []
    session.on_close(lambda session: at_close.append(len(found)))
    while session.is_open:
        peer.tick(None)
    assert found == expected and at_close == [len(expected)]


@pytest.mark.slow
def test_an_unfinished_line_comes_in_time_in_every_way_of_waiting(peer: IpcPeer) -> None:
    for wait in ("tick", "deadline", "receive"):
        session = peer.create_command_session(script("os.write(2, b'Password: '); sys.stdin.read()"))
        found = lines_of(session)
        start = 0.0
        while not found:
            assert start == 0.0 or time.monotonic() - start < 5
            if wait == "tick":
                peer.tick(None)
            elif wait == "receive":
                session.receive(10)
            else:
                due = peer.next_deadline()
                select.select([peer.fileno()], [], [], due)
                peer.tick(0)
            start = start or time.monotonic()
        assert found == ["Password: "]
        session.close()


@pytest.mark.parametrize("grandchild", [False, True])
def test_the_last_words_come_before_the_end(peer: IpcPeer, grandchild: bool) -> None:
    code = f"""
        if {grandchild}:
            subprocess.Popen(["sleep", "60"])
        session = IpcPeer().create_stdio_session()
        session.on_request(lambda ping: (os.write(2, b"one\\nlast words"), os._exit(3)))
        serve(session)
    """
    session = peer.create_command_session(program(code), start_new_session=True)
    found = lines_of(session)
    with pytest.raises(StreamClosedError, match="(?s)exit status 3; the end of its stderr:.one.last words$"):
        session.request(Ping()).wait()
    assert found == ["one", "last words"]


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["session", "peer", "with"])
def test_what_is_written_while_a_child_is_closed_arrives_before_on_close(peer: IpcPeer, how: str) -> None:
    code = """
        session = IpcPeer().create_stdio_session()
        session.notify(Note())
        os.write(2, b"begun ")
        serve(session)
        print("and goes on", file=sys.stderr)
        print("printed after")
        time.sleep(0.1)
        raise LookupError("at the end")
    """
    session = peer.create_command_session(program(code))
    found = lines_of(session)
    closed: List[Any] = []
    session.on_close(lambda session: closed.append((list(found), session.process and session.process.returncode)))
    session.receive(20)
    if how == "with":
        with session:
            pass
    else:
        (session if how == "session" else peer).close()
    text = "\n".join(found).replace("begun \nand", "begun and")
    assert text.startswith("begun and goes on\nTraceback") and text.endswith("LookupError: at the end")
    assert len(closed) == 1 and closed[0] == (found, 1)


@pytest.mark.slow
def test_what_a_child_writes_that_is_ended_in_the_background_arrives(peer: IpcPeer) -> None:
    session = peer.create_command_session(script("os.close(1); sys.stdin.read(); os.write(2, b'late\\n')"))
    found = lines_of(session)
    tick_until(lambda: found, peer)
    assert found == ["late"] and not session.is_open


def test_a_handler_of_last_words_may_fail_or_use_the_peer(peer: IpcPeer, caplog: Any) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    code = (
        "session = IpcPeer().create_stdio_session(); session.notify(Note()); serve(session); os.write(2, b'x\\ny\\n')"
    )
    session = peer.create_command_session(program(code))
    session.receive(20)
    seen: List[Any] = []

    @session.on_message
    def fails(log: LogMessage) -> None:
        seen.append(log.message)
        assert a.request(Ping(log.message), expect=Pong).wait().value == log.message
        with pytest.raises(StreamClosedError):
            session.notify(Note())
        session.close()
        raise LookupError(log.message)

    session.close()
    assert seen == ["x", "y"]
    assert caplog.text.count("on_message handler of") == 2


@pytest.mark.slow
def test_last_words_are_not_given_where_no_handler_may_run(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    sock = b.socket
    peer.remove_session(b)
    session = peer.create_command_session(script("os.close(1); sys.stdin.read(); os.write(2, b'late\\n')"))
    found = lines_of(session)
    tick_until(lambda: not session.is_open, peer)
    while a.queued_bytes < 300_000:
        a.notify(Note("queued", b"x" * 100_000))
    with pytest.raises(TimeoutError):
        a.flush(0.3)
    assert found == []
    tick_until(lambda: found, peer)
    assert sock is not None
    sock.close()


def test_the_log_says_how_a_child_ended(peer: IpcPeer, caplog: Any) -> None:
    caplog.set_level("DEBUG", "stream_ipc")
    first, second = (peer.create_command_session(role("echo")) for _ in "ab")
    assert first.process is not None
    second.request(Ping()).wait()
    first.process.kill()
    await_death(first.process)
    peer.close()
    assert "was killed by SIGKILL (signal 9)" in caplog.text and "(signal 9), by itself" not in caplog.text
    assert "exited with exit status 0, by itself" in caplog.text
