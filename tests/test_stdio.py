"""A slave's own stdin and stdout: the take-over, what else may be connected to them, and their restoring."""

import fcntl
import os
import pathlib
import pty
import socket
import subprocess
import termios
import threading
import tty
from typing import Any, List, Tuple

import pytest

from stream_ipc import (
    IpcPeer,
    LogMessage,
    PickleMessageSerializer,
    RequestEnvelope,
    ResponseEnvelope,
    StreamClosedError,
)
from stream_ipc.wire.codec import MessageDecoder

from .helpers import PATIENCE, WAIT, framed, role, tick_until
from .messages import Note, Ping, Pong
from .os_helpers import Gate, collect, ended, kill, log_texts, program, read_exactly, read_to_end, write_all

PIPE = subprocess.PIPE


def messages_in(data: bytes) -> List[Any]:
    """What frames and junk say, as a session would deliver it."""
    decoder = MessageDecoder(PickleMessageSerializer(), 64 * 1024 * 1024)
    messages, decoder.state = decoder.decode(data)
    rest, where = decoder.finish()
    assert where == ""
    return [*messages, *rest]


def run(command: List[str], input: Any = b"", **options: Any) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(command, input=input, stdout=PIPE, stderr=PIPE, timeout=PATIENCE, **options)


# -- nothing that is printed gets between the frames


@pytest.mark.matrix
@pytest.mark.parametrize(
    "what",
    [
        ["print", "by print"],
        ["write1", b"by write\n"],
        ["system", "echo by a grandchild"],
        ["puts", b"by the C library"],
        ["system", "echo by a grandchild >&2"],
    ],
    ids=lambda what: " ".join(map(str, what)),
)
def test_what_a_slave_prints_goes_to_stderr(peer: IpcPeer, what: Any) -> None:
    session = peer.create_command_session(role("work"))
    text, junk = log_texts(session, "stderr"), log_texts(session, "junk")
    for _ in range(3):
        assert session.request(Ping(what), expect=Pong).wait().value == "done"
        session.notify(LogMessage("in between"))
    tick_until(lambda: text().count("by ") == 3 and text().endswith("\n"), peer)
    assert junk() == ""


def test_a_flood_of_prints_and_frames_stays_apart(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("chatter", 300))
    text, junk = log_texts(session, "stderr"), log_texts(session, "junk")
    notes, closed = collect(session, Note), ended(session)
    session.notify(Note("go"))
    tick_until(lambda: closed, peer)
    assert [note.text for note in notes] == [str(index) for index in range(300)]
    assert text().split() == [f"line{index}" for index in range(300)]
    assert junk() == ""


def test_a_print_before_the_take_over_arrives_as_junk_before_the_frames(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("print first", "not flushed, \xf3 no newline"))
    seen: List[Any] = []
    session.on_message(seen.append)
    tick_until(lambda: Note("first") in seen, peer)
    assert "".join(log.message for log in seen[:-1]) == "not flushed, \xf3 no newline"
    assert {log.level for log in seen[:-1]} == {"junk"} and seen[-1] == Note("first")


def test_what_would_go_to_a_stderr_that_is_the_wire_is_dropped(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("work"), stderr=subprocess.STDOUT)
    junk = log_texts(session, "junk")
    for what in [["print", "a line"], ["stderr", "a line\n"], ["system", "echo a line >&2"]] * 3:
        assert session.request(Ping(what), expect=Pong).wait().value == "done"
    peer.tick_for(WAIT)
    assert junk() == ""


def test_a_print_before_the_take_over_of_a_merged_stderr_arrives_as_junk(peer: IpcPeer) -> None:
    code = """
        print("before", file=sys.stderr, flush=True)
        session = IpcPeer().create_stdio_session()
        print("between", file=sys.stderr, flush=True)
        session.close()
        print("after", file=sys.stderr, flush=True)
        print("and to stdout")
    """
    session = peer.create_command_session(program(code), stderr=subprocess.STDOUT)
    junk = log_texts(session, "junk")
    tick_until(lambda: not session.is_open, peer)
    assert junk() == "before\nafter\nand to stdout\n"


@pytest.mark.parametrize("kind", ["socket", "socket and a socket", "pipe"])
def test_an_inetd_service_may_print(peer: IpcPeer, kind: str) -> None:
    here, there = socket.socketpair()
    more: List[Any] = []
    if kind == "pipe":  # stdin is something else
        read, write = os.pipe()
        process = subprocess.Popen(role("work"), stdin=there, stdout=write, stderr=write)
        os.close(write)
        session = peer.create_stream_session(here, os.fdopen(read, "rb", 0))
    else:
        stderr: Any = there
        if kind != "socket":  # another connection, which is not the wire
            more += socket.socketpair()
            stderr = more[0]
        process = subprocess.Popen(role("work"), stdin=there, stdout=there, stderr=stderr)
        session = peer.create_socket_session(here)
    there.close()
    try:
        junk = log_texts(session, "junk")
        for what in (["print", "printed"], ["stderr", "written\n"], ["print", "printed"]):
            assert session.request(Ping(what), expect=Pong).wait().value == "done"
        assert junk() == ""
        if more:
            assert more[1].recv(100) == b"printed\nwritten\nprinted\n"
    finally:
        session.close()
        kill(process)
        for sock in more:
            sock.close()


# -- what is printed leaves at once


PRINTS = """
    import atexit
    {before}
    peer = IpcPeer()
    session = peer.create_stdio_session()
    {after}
    @session.on_request
    def work(ping: Ping) -> Pong:
        print("one", 1)
        print("two", end="")
        print()
        return Pong()
    serve(session)
"""


@pytest.mark.parametrize("unbuffered", ["", "-u", pytest.param("PYTHONUNBUFFERED", marks=pytest.mark.slow)])
def test_a_print_arrives_at_once_and_by_line(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch, unbuffered: str) -> None:
    if unbuffered.isupper():
        monkeypatch.setenv(unbuffered, "1")
    command = program(PRINTS.format(before="", after=""))
    if unbuffered == "-u":
        command.insert(1, "-u")
    session = peer.create_command_session(command)
    logs = collect(session, LogMessage)
    session.request(Ping()).wait()
    tick_until(lambda: len(logs) == 2, peer)
    assert [(log.message, log.level) for log in logs] == [("one 1", "stderr"), ("two", "stderr")]


@pytest.mark.parametrize(
    "how",
    [
        "sys.stdout = None",
        "import io; sys.stdout = io.StringIO()",
        pytest.param("sys.stdout = open(os.devnull, 'w')", marks=pytest.mark.slow),
        pytest.param("import io; sys.stdout = io.TextIOWrapper(io.BytesIO())", marks=pytest.mark.slow),
        "sys.stdout.close()",
        "sys.stdout.detach(); sys.stdout = sys.__stdout__ = None",
        pytest.param("sys.stdout = object()", marks=pytest.mark.slow),
    ],
)
def test_whatever_stdout_is_replaced_by_is_left_as_it_is(peer: IpcPeer, how: str) -> None:
    code = f"""
        {how}
        session = IpcPeer().create_stdio_session()
        session.on_request(lambda ping: Pong(repr(sys.stdout)[:20]))
        serve(session)
        session.close()
        os._exit(7)
    """
    session = peer.create_command_session(program(code))
    if "detach" in how:
        with pytest.raises(StreamClosedError, match="no stdout"):
            session.request(Ping()).wait()
        return
    assert session.request(Ping()).wait()
    process = session.process
    session.close()
    assert process is not None and process.returncode == 7


def test_closing_restores_the_buffer_of_stdout() -> None:
    code = """
        print("before")
        session = IpcPeer().create_stdio_session()
        assert sys.stdout.line_buffering
        session.close()
        assert not sys.stdout.line_buffering
        print("after")
    """
    done = run(program(code))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"before\nafter\n", b"")


# -- and nobody else reads what is meant for the session


def test_reading_stdin_gives_the_end_of_file(peer: IpcPeer) -> None:
    session = peer.create_command_session(role("work"))
    for _ in range(2):
        assert session.request(Ping(["input"]), expect=Pong).wait().value == "EOF"
        assert session.request(Ping(["read stdin"]), expect=Pong).wait().value == [""]
    # A grandchild that reads its stdin ends at once, too, and steals nothing.
    assert session.request(Ping(["system", "cat"]), expect=Pong).wait().value == "done"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs a system that shows what another process has")
def test_grandchildren_inherit_no_descriptor_of_ours(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "fds"
    session = peer.create_command_session(role("work"))
    session.request(Ping(["inheritable", f"ls -l /proc/self/fd > {target}"])).wait()
    lines = [line for line in target.read_text().splitlines() if "->" in line]
    numbers = {line.split("->")[0].split()[-1]: line.split("-> ")[1] for line in lines}
    assert numbers["0"] == "/dev/null" and numbers["2"].startswith("pipe:")
    assert {n for n in numbers if int(n) > 2 and not numbers[n].startswith("/proc")} == set(), lines


def test_the_end_of_a_slave_shows_though_a_grandchild_lives(peer: IpcPeer, tmp_path: pathlib.Path) -> None:
    # The pipes' end alone has to show it: over plain streams nobody knows of a process.
    with Gate(tmp_path / "gate") as gate:
        process = subprocess.Popen(role("work"), stdin=PIPE, stdout=PIPE, stderr=subprocess.DEVNULL)
        try:
            session = peer.create_stream_session(process.stdin, process.stdout)
            closed = ended(session)
            session.request(Ping(["background", f"exec cat {gate.path}"])).wait()
            with pytest.raises(StreamClosedError):
                session.request(Ping(["exit", 0])).wait()
            assert closed
        finally:
            kill(process)


# -- restoring


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["close", "peer", "remove", "with", "eof"])
def test_closing_restores_stdin_and_stdout(how: str) -> None:
    code = """
        how = sys.argv[1]
        before = [os.fstat(fd).st_ino for fd in (0, 1, 2)]
        fds = sorted(os.listdir("/dev/fd"))
        peer = IpcPeer()
        print("before")
        session = peer.create_stdio_session()
        print("meanwhile")
        os.system("echo meanwhile, too")
        if how != "eof":
            session.receive()
        if how == "close":
            session.close()
        elif how == "peer":
            peer.close()
        elif how == "remove":
            peer.remove_session(session)
        elif how == "with":
            with session:
                pass
        else:
            while session.is_open:
                peer.tick(None)
        assert not sys.stdout.closed and not sys.stdin.closed
        assert [os.fstat(fd).st_ino for fd in (0, 1, 2)] == before
        print("after", flush=True)
        os.system("echo after, too")
        sys.stdout.flush()
        print(repr(sys.stdin.readline()))
        peer.close()
        peer = IpcPeer()
        again = peer.create_stdio_session()
        again.notify(Note("again"))
        print("hidden")
        peer.close()
        assert sorted(os.listdir("/dev/fd")) == fds, os.listdir("/dev/fd")
    """
    process = subprocess.Popen(program(code, how), stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        write_all(process.stdin.fileno(), framed(Note("go")))
        if how == "eof":
            process.stdin.close()
            line = "''"
        else:
            assert read_exactly(process.stdout.fileno(), 13) == b"before\nafter\n"
            write_all(process.stdin.fileno(), b"a line\n")
            process.stdin.close()
            line = r"'a line\n'"
        rest = read_to_end(process.stdout.fileno())
        prefix = b"before\nafter\n" if how == "eof" else b""
        expected = prefix + b"after, too\n" + line.encode() + b"\n" + framed(Note("again"))
        assert rest == expected
        errors = read_to_end(process.stderr.fileno())
        assert errors == b"meanwhile, too\nmeanwhile\nhidden\n" or errors == b"meanwhile\nmeanwhile, too\nhidden\n"
        assert process.wait(PATIENCE) == 0
    finally:
        kill(process)


def test_a_second_take_over_is_refused_and_the_first_goes_on() -> None:
    code = """
        first = IpcPeer().create_stdio_session()
        for peer in (first.peer, IpcPeer()):
            try:
                peer.create_stdio_session()
            except RuntimeError as exc:
                first.notify(Note(str(exc)))
        first.on_request(lambda ping: Pong(ping.value))
        serve(first)
    """
    with IpcPeer() as peer:
        session = peer.create_command_session(program(code))
        text = log_texts(session, "stderr")
        for _ in range(2):
            note = session.receive(PATIENCE)
            assert isinstance(note, Note) and "in use" in note.text
        assert session.request(Ping(7), expect=Pong).wait().value == 7
        assert text() == ""


# -- flags: O_NONBLOCK belongs to everybody who holds the same open file


def nonblocking(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK)


def connected(kind: str) -> Tuple[Any, Any, int, int]:
    """(write, read) for a session, (stdin, stdout) for a slave whose other holder is this process."""
    if kind == "pipe":
        stdin, write = os.pipe()
        read, stdout = os.pipe()
        return write, read, stdin, stdout
    if kind == "socketpair":
        a, b = socket.socketpair()
        stdin = b.detach()
        return a, a, stdin, os.dup(stdin)
    if kind == "unix and pipe":
        a, b = socket.socketpair()
        read, stdout = os.pipe()
        return a, read, b.detach(), stdout
    master, slave = pty.openpty()
    tty.setraw(slave)
    return master, master, slave, os.dup(slave)


KINDS = ["pipe", "socketpair", "unix and pipe", "tty"]


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["killed", "closed"])
def test_flags_of_shared_descriptors_are_untouched(peer: IpcPeer, kind: str, end: str) -> None:
    write, read, stdin, stdout = connected(kind)
    process = subprocess.Popen(role("work"), stdin=stdin, stdout=stdout, stderr=PIPE)
    try:
        flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (stdin, stdout)]
        session = peer.create_stream_session(write, read)

        def unchanged() -> bool:
            return [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (stdin, stdout)] == flags

        assert session.request(Ping(["none more"]), expect=Pong).wait().value == "done"
        assert unchanged()
        # More than anything between us holds, so that it has to wait for us, and we for it.
        big = session.request(Ping(["big", 1_000_000]), expect=Pong)
        session.notify(Note("much", bytes(1_000_000)))
        assert unchanged()
        assert big.wait().value == b"x" * 1_000_000
        assert unchanged()
        if end == "killed":
            process.kill()
        else:
            session.request(Ping(["sys.exit", 0]))
        tick_until(lambda: process.poll() is not None, peer)  # our copies of its ends keep the streams open
        assert unchanged()
        assert process.stderr is not None and process.stderr.read() == b""
    finally:
        for fd in (stdin, stdout):
            os.close(fd)
        kill(process)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_somebody_else_may_make_them_nonblocking(peer: IpcPeer, kind: str) -> None:
    write, read, stdin, stdout = connected(kind)
    process = subprocess.Popen(role("work"), stdin=stdin, stdout=stdout, stderr=PIPE)
    try:
        session = peer.create_stream_session(write, read)
        assert session.request(Ping(["none more"]), expect=Pong).wait().value == "done"
        for fd in (stdin, stdout):
            os.set_blocking(fd, False)
        for _ in range(3):
            assert session.request(Ping(["big", 500_000]), expect=Pong).wait().value == b"x" * 500_000
        assert process.poll() is None
    finally:
        for fd in (stdin, stdout):
            os.close(fd)
        kill(process)


def test_the_next_program_on_the_same_stdout_writes_everything() -> None:
    # It does not know of EAGAIN; the slave is killed, so that it can restore nothing.
    slave = " ".join(f"'{arg}'" for arg in role("work"))
    done = run(["sh", "-c", f"{slave}; seq 1 100000"], input=framed(RequestEnvelope("1", Ping(["kill", 9]))))
    assert done.stdout == b"".join(b"%d\n" % number for number in range(1, 100001))


# -- other things than pipes


def conversation() -> Tuple[bytes, List[Any]]:
    """What a master sends to ``echo``, and what comes back."""
    note = Note("large", b"x" * 300_000)
    sent = [RequestEnvelope("a", Ping(1)), note, RequestEnvelope("b", Ping("z" * 100_000)), Note("last")]
    back = [ResponseEnvelope("a", Pong(1)), note, ResponseEnvelope("b", Pong("z" * 100_000)), Note("last")]
    return b"".join(map(framed, sent)), back


@pytest.mark.matrix
@pytest.mark.parametrize("target", ["pipe", "file", "append"])
def test_stdin_from_a_file(tmp_path: pathlib.Path, target: str) -> None:
    sent, back = conversation()
    (tmp_path / "in").write_bytes(sent)
    out = tmp_path / "out"
    with open(tmp_path / "in", "rb") as stdin:
        if target == "pipe":
            done = subprocess.run(role("echo"), stdin=stdin, stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
            received = done.stdout
        else:
            out.write_bytes(b"" if target == "file" else b"old text, ")
            with open(out, "wb" if target == "file" else "ab") as stdout:
                done = subprocess.run(role("echo"), stdin=stdin, stdout=stdout, stderr=PIPE, timeout=PATIENCE)
            received = out.read_bytes()
    assert (done.returncode, done.stderr) == (0, b"")
    if target == "append":
        assert received.startswith(b"old text, ")
        received = received[10:]
    assert messages_in(received) == back


def test_stdin_from_a_file_is_read_from_where_it_stands(tmp_path: pathlib.Path) -> None:
    sent, back = conversation()
    (tmp_path / "in").write_bytes(b"a header\n" + sent)
    with open(tmp_path / "in", "rb", 0) as stdin:
        stdin.seek(9)
        done = subprocess.run(role("echo"), stdin=stdin, stdout=PIPE, stderr=PIPE, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert messages_in(done.stdout) == back


@pytest.mark.matrix
@pytest.mark.parametrize("stdout", ["null", "pipe"])
@pytest.mark.parametrize("command", ["echo", "flood"])
def test_the_null_device(stdout: str, command: str) -> None:
    args = role(command, *([1000] if command == "flood" else []))
    target = subprocess.DEVNULL if stdout == "null" else PIPE
    done = subprocess.run(args, stdin=subprocess.DEVNULL, stdout=target, stderr=PIPE, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    if stdout == "pipe" and command == "flood":
        assert [note.text for note in messages_in(done.stdout)] == [str(index) for index in range(1000)]


def test_a_full_disk_is_a_closed_stream_and_no_hang() -> None:
    code = """
        session = IpcPeer().create_stdio_session()
        try:
            session.notify(Note())
        except StreamClosedError as exc:
            sys.exit(str(exc))
    """
    with open("/dev/full", "wb", 0) as full:
        done = subprocess.run(program(code), stdin=subprocess.DEVNULL, stdout=full, stderr=PIPE, timeout=PATIENCE)
    assert done.returncode == 1 and b"nothing can be written any more" in done.stderr and b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_terminal_in_raw_mode(peer: IpcPeer) -> None:
    master, slave = pty.openpty()
    tty.setraw(slave)
    process = subprocess.Popen(role("echo"), stdin=slave, stdout=slave, stderr=PIPE)
    os.close(slave)
    try:
        session = peer.create_stream_session(master, master)
        note = Note("all bytes", bytes(range(256)) * 1000)
        session.notify(note)
        assert session.receive(PATIENCE) == note
        assert session.request(Ping(2), expect=Pong).wait().value == 2
        session.close()  # the terminal is hung up
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None and process.stderr.read() == b""
    finally:
        kill(process)


def test_control_d_on_a_terminal_ends_the_slave() -> None:
    master, slave = pty.openpty()
    settings = termios.tcgetattr(slave)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    code = """
        session = IpcPeer().create_stdio_session()
        seen = []
        session.on_message(lambda log: seen.append(log.message))
        session.notify(Note("up"))
        serve(session)
        print(repr("".join(seen)))
    """
    process = subprocess.Popen(program(code), stdin=slave, stdout=PIPE, stderr=PIPE)
    try:
        assert process.stdout is not None
        # It has taken over, so what is typed is its own.
        assert read_exactly(process.stdout.fileno(), len(framed(Note("up")))) == framed(Note("up"))
        os.write(master, b"typed by hand\n")
        os.write(master, b"\x04")
        assert process.wait(PATIENCE) == 0
        assert process.stdout.read() == b"'typed by hand\\n'\n"
        assert process.stderr is not None and b"Ctrl-D ends it" in process.stderr.read()
    finally:
        os.close(slave)
        os.close(master)
        kill(process)


def test_one_socket_as_stdin_and_stdout(peer: IpcPeer) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(role("echo"), stdin=theirs, stdout=theirs, stderr=PIPE)
    theirs.close()
    try:
        session = peer.create_socket_session(ours)
        note = Note("large", bytes(2_000_000))
        session.notify(note)
        assert session.receive(PATIENCE) == note
        session.close()
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None and process.stderr.read() == b""
    finally:
        kill(process)


def test_a_half_closed_socket_still_gets_the_replies() -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(role("echo"), stdin=theirs, stdout=theirs, stderr=PIPE)
    theirs.close()
    try:
        sent, back = conversation()
        sender = threading.Thread(target=lambda: (ours.sendall(sent), ours.shutdown(socket.SHUT_WR)))
        sender.start()
        received = read_to_end(ours.fileno())
        sender.join(PATIENCE)
        assert messages_in(received) == back
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None and process.stderr.read() == b""
    finally:
        ours.close()
        kill(process)


def test_a_dead_reader_kills_no_slave_by_signal() -> None:
    # With SIGPIPE at its default, as a program in C or a shell leaves it to its children.
    code = """
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        session = IpcPeer().create_stdio_session()
        try:
            while True:
                session.notify(Note("x", bytes(10000)))
        except StreamClosedError:
            os._exit(7)
    """
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(program(code), stdin=theirs, stdout=theirs)
    theirs.close()
    try:
        ours.recv(1)
        ours.close()
        assert process.wait(PATIENCE) == 7
    finally:
        ours.close()
        kill(process)


def test_a_take_over_that_fails_leaves_no_descriptor_and_closes_none_later() -> None:
    code = """
        import gc
        peer = IpcPeer()
        before = os.listdir("/dev/fd")
        try:
            peer.create_stdio_session()
        except InvalidStreamError:
            mine = [os.dup(0) for _ in range(5)]  # with the numbers that it had
        gc.collect()
        for fd in mine:
            os.close(fd)  # raises if somebody else has closed it
        sys.exit(f"{len(os.listdir('/dev/fd')) - len(before)}")
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull) as nothing:
        done = subprocess.run(program(code), stdin=theirs, stdout=nothing, stderr=PIPE, timeout=PATIENCE)
    assert (done.stderr, done.returncode) == (b"0\n", 1)


# -- what was read before


def test_bytes_that_sys_stdin_had_read_ahead_are_not_lost() -> None:
    code = """
        line = sys.stdin.buffer.readline()
        session = IpcPeer().create_stdio_session()
        session.notify(Note(line.decode()))
        session.on_request(lambda ping: Pong(ping.value))
        serve(session)
    """
    frames = framed(RequestEnvelope("1", Ping("first"))) + framed(RequestEnvelope("2", Ping("second")))
    done = run(program(code), input=b"a greeting\n" + frames)
    assert (done.returncode, done.stderr) == (0, b"")
    first, second = ResponseEnvelope("1", Pong("first")), ResponseEnvelope("2", Pong("second"))
    assert messages_in(done.stdout) == [Note("a greeting\n"), first, second]


def test_text_that_sys_stdin_had_read_ahead_is_an_error_and_all_is_restored() -> None:
    code = """
        line = input()
        try:
            IpcPeer().create_stdio_session()
        except InvalidStreamError as exc:
            print("refused:", "name='<stdin>'" in str(exc), flush=True)
            os.system("echo still stdout")
    """
    done = run(program(code), input=b"a greeting\nmore text\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"refused: True\nstill stdout\n"


def test_what_was_read_ahead_of_a_descriptor_that_is_shared() -> None:
    code = """
        reader = os.fdopen(0, "rb")
        reader.readline()
        session = IpcPeer().create_stream_session(1, reader)
        session.on_request(lambda ping: Pong((ping.value, os.get_inheritable(0), os.get_blocking(0))))
        serve(session)
    """
    done = run(program(code), input=b"a line\n" + framed(RequestEnvelope("1", Ping("first"))))
    assert (done.returncode, done.stderr) == (0, b"")
    assert messages_in(done.stdout) == [ResponseEnvelope("1", Pong(("first", True, True)))]


def test_a_line_read_as_text_does_no_harm_by_itself() -> None:
    code = """
        line = input()
        session = IpcPeer().create_stdio_session()
        session.notify(Note(line))
        session.on_request(lambda ping: Pong(ping.value))
        serve(session)
    """
    process = subprocess.Popen(program(code), stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        write_all(process.stdin.fileno(), b"a greeting\n")
        expected = framed(Note("a greeting"))
        assert read_exactly(process.stdout.fileno(), len(expected)) == expected
        write_all(process.stdin.fileno(), framed(RequestEnvelope("1", Ping(5))))
        process.stdin.close()
        assert messages_in(read_to_end(process.stdout.fileno())) == [ResponseEnvelope("1", Pong(5))]
        assert (process.wait(PATIENCE), process.stderr.read()) == (0, b"")
    finally:
        kill(process)


# -- objects and descriptors that are missing

REPLACED = [
    "sys.stdin = None",
    "sys.stdout = None",
    "sys.stdin = io.StringIO('text')",
    "sys.stdout = io.StringIO()",
    "sys.stdin = sys.stdout = sys.stderr = object()",
    "sys.stdin.close()",  # the object only: the descriptor stays
    "sys.stdout.close()",
    "sys.stdin = open('/dev/null')",
]


@pytest.mark.matrix
@pytest.mark.parametrize("replaced", REPLACED)
def test_replaced_objects_do_not_matter(replaced: str) -> None:
    code = f"""
        import io
        keep = sys.stdin, sys.stdout, sys.stderr
        {replaced}
        session = IpcPeer().create_stdio_session()
        session.on_request(lambda ping: Pong(ping.value))
        serve(session)
        session.peer.close()
        if keep[0] is not sys.stdin and hasattr(sys.stdin, "close"):
            sys.stdin.close()
        sys.stdin, sys.stdout, sys.stderr = keep
        os.write(1, b"restored")
    """
    done = run(program(code), input=framed(RequestEnvelope("1", Ping(5))))
    assert (done.returncode, done.stderr) == (0, b"")
    *messages, junk = messages_in(done.stdout)
    assert messages == [ResponseEnvelope("1", Pong(5))] and junk.message == "restored"


@pytest.mark.matrix
@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("other", ["", "null = open(os.devnull, 'r+b')"], ids=["closed", "number in use"])
def test_a_missing_descriptor_is_said_to_be_missing(missing: int, other: str) -> None:
    # IpcPeer() itself opens descriptors, and they take the lowest free numbers.
    code = f"""
        {other}
        peer = IpcPeer()
        try:
            peer.create_stdio_session()
        except InvalidStreamError as exc:
            os.write(2, str(exc).encode())
        os._exit(0)
    """
    redirection = "<&-" if missing == 0 else ">&-"
    done = run(["sh", "-c", f'exec "$@" {redirection}', "sh", *program(code)])
    assert ("stdin" if missing == 0 else "stdout").encode() in done.stderr
    assert b"Traceback" not in done.stderr and b"descriptor" in done.stderr


def test_without_a_stderr_since_a_moment_ago_too(peer: IpcPeer) -> None:
    code = """
        peer = IpcPeer()
        os.close(2)
        session = peer.create_stdio_session()
        print("lost", flush=True)
        session.on_request(lambda ping: Pong(ping.value))
        serve(session)
    """
    session = peer.create_command_session(program(code), stderr=None)
    texts = collect(session, LogMessage)
    assert session.request(Ping(1), expect=Pong).wait().value == 1
    assert texts == []


def test_without_a_stderr_a_print_is_lost_but_nothing_else() -> None:
    code = """
        peer = IpcPeer()
        session = peer.create_stdio_session()

        @session.on_request
        def answer(ping: Ping):
            print("lost", flush=True)
            os.system("echo lost, too")
            return Pong(ping.value)

        serve(session)
    """
    done = run(["sh", "-c", 'exec "$@" 2>&-', "sh", *program(code)], input=framed(RequestEnvelope("1", Ping(5))))
    assert messages_in(done.stdout) == [ResponseEnvelope("1", Pong(5))]
    assert done.returncode == 0


def test_signals_do_not_tear_the_conversation(peer: IpcPeer) -> None:
    code = """
        signal.signal(signal.SIGALRM, lambda *args: None)
        session = IpcPeer().create_stdio_session()
        session.on_request(lambda ping: Pong(ping.value))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        serve(session)
        signal.setitimer(signal.ITIMER_REAL, 0)
    """
    session = peer.create_command_session(program(code))
    process = session.process
    for size in (10, 100_000, 3_000_000):
        assert session.request(Ping(b"s" * size), expect=Pong).wait().value == b"s" * size
    session.close()
    assert process is not None and process.returncode == 0


@pytest.mark.matrix
@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("default", [None, 5.0])
@pytest.mark.parametrize("end", ["killed", "closed"])
def test_an_inherited_socket_keeps_its_flag(peer: IpcPeer, blocking: bool, default: Any, end: str) -> None:
    code = """
        import socket
        socket.setdefaulttimeout(eval(sys.argv[1]))
        session = IpcPeer().create_stdio_session()
        session.on_request(lambda ping: Pong(ping.value))
        serve(session)
        session.close()
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(blocking)
    fd = theirs.fileno()
    process = subprocess.Popen(program(code, default), stdin=fd, stdout=fd, stderr=PIPE)
    try:
        session = peer.create_socket_session(ours)
        for size in (10, 1_000_000):
            assert session.request(Ping(b"s" * size), expect=Pong).wait().value == b"s" * size
            assert nonblocking(theirs.fileno()) is not blocking
        if end == "closed":
            session.close()
        else:
            process.kill()
        process.wait(PATIENCE)
        assert nonblocking(theirs.fileno()) is not blocking
        assert process.stderr is not None and process.stderr.read() == b""
    finally:
        theirs.close()
        kill(process)


def test_an_interrupted_restoring_is_completed_by_the_second_close() -> None:
    code = """
        from tests.helpers import InterruptAt, Interruption

        def state():
            found = [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in (0, 1, 2)]
            return found, sorted(os.listdir("/dev/fd"))

        peer = IpcPeer()
        peer.create_session_pair()  # so that what is made once is there
        before = state()
        number = 0
        hit = True
        while hit:
            number += 1
            session = peer.create_stdio_session()
            assert state()[0] != before[0]
            interrupt = InterruptAt(number, Interruption())
            try:
                with interrupt:
                    session.close()
            except Interruption:
                session.close()
            hit = interrupt.hit
            assert not session.is_open
            assert state() == before, (interrupt.where, before, state())
        assert number > 10
        sys.stdout.write("all restored")
        sys.stdout.flush()
        peer.close()
    """
    done = run(program(code))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"all restored", b"")


def test_an_interrupted_take_over_leaves_nothing_behind() -> None:
    code = """
        from tests.helpers import InterruptAt, Interruption

        def state():
            found = [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in (0, 1, 2)]
            return found, sorted(os.listdir("/dev/fd"))

        peer = IpcPeer()
        peer.create_stdio_session().close()  # so that what is made once is there
        before = state()
        number = 0
        hit = True
        while hit:
            number += 1
            interrupt = InterruptAt(number, Interruption())
            try:
                with interrupt:
                    peer.create_stdio_session()
            except Interruption:
                peer.tick(0)
            hit = interrupt.hit
            for session in peer.sessions:
                session.close()
            assert state() == before, (interrupt.where, before, state())
        assert number > 50
        sys.stdout.write("all as it was")
        sys.stdout.flush()
        peer.close()
    """
    done = run(program(code))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"all as it was", b"")


def test_out_of_descriptors_is_no_missing_stream() -> None:
    code = """
        import resource
        peer = IpcPeer()
        import stream_ipc.transports.stdio
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        texts = []
        for free in range(6):
            taken = []
            try:
                while True:
                    taken.append(os.dup(2))
            except OSError:
                pass
            for _ in range(free):
                os.close(taken.pop())
            try:
                session = peer.create_stdio_session()
            except OSError as exc:
                texts.append(str(exc))
                os.fstat(0), os.fstat(1)  # they are as they were
            else:
                session.close()
                texts.append("")
            for fd in taken:
                os.close(fd)
        assert texts[0].startswith("[Errno 24] cannot take over stdin (descriptor 0): Too many open files"), texts
        assert texts[1].startswith("[Errno 24] cannot take over stdout"), texts
        assert texts[2].startswith("[Errno 24] cannot take over stdin and stdout"), texts
        assert texts[-1] == "", texts
        os.write(2, b"done")
    """
    done = run(program(code))
    assert done.stderr == b"done"
