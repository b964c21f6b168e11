"""The logger ``stream_ipc`` at DEBUG: what happens to sessions and children, and nothing of what they say."""

import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, List

import pytest

from stream_ipc import IpcPeer, JsonMessageSerializer, RemoteError, RequestTimeoutError, Session
from tests.helpers import (
    MAGIC,
    PATIENCE,
    RawPeer,
    frame,
    name_of,
    process_name,
    reply_bytes,
    role,
    set_limit,
    tick_until,
)
from tests.messages import Note, Ping, Pong

SECRET = "what is said is nobody's business"


class Lines(logging.Handler):
    """Formats at once: what a record shows of an object is what it was then."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.name == "stream_ipc" and not record.exc_info
        assert record.filename != "log.py"  # it names the line that has something to say
        self.lines.append(f"{record.levelname} {record.getMessage()}")

    def take(self) -> List[str]:
        lines, self.lines = self.lines, []
        return lines


@pytest.fixture
def log(capfd: Any) -> Iterator[Lines]:
    handler = Lines()
    logger = logging.getLogger("stream_ipc")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True
    assert not any(SECRET in line for line in handler.lines)
    assert capfd.readouterr() == ("", "")  # nothing is printed


# -- sessions


def test_a_pair(log: Lines, peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(SECRET))
    assert log.take() == [f"DEBUG session {name_of(s)} opened" for s in (a, b)]
    assert a.request(Ping(SECRET), expect=Pong).wait().value == SECRET
    a.notify(Note(SECRET))
    assert b.receive(PATIENCE) == Note(SECRET)
    assert log.take() == []  # nothing for what goes well
    a.close()
    a.close()
    assert log.take() == [f"DEBUG session {name_of(a)} closed: this side closed the session"]
    tick_until(lambda: not b.is_open, peer)
    assert log.take() == [f"DEBUG session {name_of(b)} closed: the other side closed the stream"]
    assert name_of(a) != name_of(b) and name_of(a).startswith("fd ")


def test_removed_and_closed_with_the_peer(log: Lines) -> None:
    peer = IpcPeer()
    ours, other = socket.socketpair()
    with ours, other:
        session = peer.create_socket_session(ours)
        log.take()
        peer.remove_session(session)
        assert log.take() == [f"DEBUG session {name_of(session)} closed: this side removed the session from its peer"]
    session = peer.create_session_pair()[0]
    log.take()
    peer.close()
    assert log.take()[0] == f"DEBUG session {name_of(session)} closed: this side closed the peer"


def test_a_listener(log: Lines, peer: IpcPeer) -> None:
    sessions: List[Session] = []
    with peer.listen(("127.0.0.1", 0), sessions.append) as listener:
        assert log.take() == [f"DEBUG listener {listener.address!r} opened"]
        client = peer.connect(listener.address)
        tick_until(lambda: sessions, peer)
        host, port = listener.address
        assert name_of(client).startswith(f"to {host}:{port} fd ")
        assert name_of(sessions[0]).startswith(f"from {host}:")
        names = {name_of(client), name_of(sessions[0])}
        assert set(log.take()) == {f"DEBUG session {name} opened" for name in names}
    assert log.take() == [f"DEBUG listener {listener.address!r} closed"]
    client.close()
    tick_until(lambda: not sessions[0].is_open, peer)
    assert log.take() == [
        f"DEBUG session {name_of(client)} closed: this side closed the session",
        f"DEBUG session {name_of(sessions[0])} closed: the other side closed the stream",
    ]


def test_a_listener_on_a_unix_socket(log: Lines, peer: IpcPeer, tmp_path: Path) -> None:
    path = os.path.relpath(tmp_path / "s")
    sessions: List[Session] = []
    with peer.listen(path, sessions.append):
        client = peer.connect(path)
        tick_until(lambda: sessions, peer)
        assert name_of(client).startswith(f"to {path!r} fd ")
        assert name_of(sessions[0]).startswith(f"at {path!r} fd ")


def test_stdio(tmp_path: Path) -> None:
    code = (
        "import logging, sys; from stream_ipc import IpcPeer; from tests.messages import Note\n"
        "logging.basicConfig(level=logging.DEBUG, filename=sys.argv[1], format='%(message)s')\n"
        "session = IpcPeer().create_stdio_session()\n"
        "session.receive(); session.close()"
    )
    lines = tmp_path / "log"
    with IpcPeer() as peer:
        session = peer.create_command_session([sys.executable, "-c", code, str(lines)])
        session.notify(Note(SECRET))
        tick_until(lambda: not session.is_open, peer)
    assert lines.read_text().splitlines() == [
        "session stdio opened",
        "session stdio closed: this side closed the session",
    ]


# -- children


def test_a_child_that_ends_by_itself(log: Lines, peer: IpcPeer) -> None:
    session = peer.create_command_session(role("echo"))
    assert session.process is not None
    pid = session.process.pid
    child = process_name(session.process)
    assert f"(pid {pid})" in child
    assert log.take() == [f"DEBUG {child} started", f"DEBUG session pid {pid} opened: started {child}"]
    assert session.request(Ping(SECRET), expect=Pong).wait().value == SECRET
    assert log.take() == []
    session.close()
    assert log.take() == [
        f"DEBUG session pid {pid} closed: this side closed the session",
        f"DEBUG {child} exited with exit status 0, by itself",
    ]


def test_a_child_that_dies(log: Lines, peer: IpcPeer) -> None:
    code = f"import sys; print({SECRET!r}, file=sys.stderr); sys.exit(3)"
    session = peer.create_command_session([sys.executable, "-c", code])
    assert session.process is not None
    pid = session.process.pid
    tick_until(lambda: not session.is_open, peer)
    tick_until(lambda: len(log.lines) == 4, peer)
    assert log.lines[2] == f"DEBUG session pid {pid} closed: exited with exit status 3"
    assert log.lines[3].endswith(f"(pid {pid}) exited with exit status 3, by itself")
    log.lines = [line for line in log.lines if "child process" not in line]  # the command is the secret here


@pytest.mark.matrix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_that_has_to_be_ended(
    log: Lines, peer: IpcPeer, number: "signal.Signals", monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit("exit grace", 0.05, monkeypatch)
    set_limit("terminate grace", PATIENCE if number == signal.SIGTERM else 0.05, monkeypatch)
    handle = "signal.SIG_IGN" if number == signal.SIGKILL else "signal.SIG_DFL"
    code = (
        f"import signal, time; signal.signal(signal.SIGTERM, {handle})\n"
        "from stream_ipc import IpcPeer; from tests.messages import Note\n"
        "session = IpcPeer().create_stdio_session(); session.notify(Note()); session.flush()\n"
        "while True: time.sleep(1)"
    )
    session = peer.create_command_session([sys.executable, "-c", code])
    assert session.receive(PATIENCE) == Note()
    assert session.process is not None
    pid = session.process.pid
    log.take()
    session.close()
    closed, ended = log.take()
    assert closed == f"DEBUG session pid {pid} closed: this side closed the session"
    assert ended.startswith("DEBUG child process ")
    assert ended.endswith(f"(pid {pid}) was killed by {number.name} (signal {number.value}), after {number.name}")


def test_a_child_that_cannot_be_ended(log: Lines, peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("exit grace", "terminate grace", "kill grace"):
        set_limit(name, 0.02, monkeypatch)
    session = peer.create_command_session(["sleep", "60"])
    process = session.process
    assert process is not None
    with monkeypatch.context() as patch:
        patch.setattr(process, "send_signal", lambda number: None)
        session.close()
    assert log.take()[-1].startswith("ERROR child process ")
    process.kill()
    process.wait()


def test_a_process_that_is_somebody_elses(log: Lines, peer: IpcPeer) -> None:
    with subprocess.Popen(role("echo"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        session = peer.create_process_session(process)
        (opened,) = log.take()
        assert opened.startswith(f"DEBUG session pid {process.pid} opened: attached to child process ")
        session.close()
        assert log.take() == [f"DEBUG session pid {process.pid} closed: this side closed the session"]


# -- what is refused or dropped


def test_a_frame_that_is_too_large(log: Lines) -> None:
    with IpcPeer(max_frame_size=1000) as peer, RawPeer(peer) as raw:
        raw.session.on_exception(lambda error: None)
        log.take()
        raw.write(MAGIC + struct.pack(">I", 123456))
        tick_until(lambda: not raw.session.is_open, peer)
        told, closed = log.take()
        name = name_of(raw.session)
        assert told.startswith(f"DEBUG session {name}: its on_exception handlers get FrameTooLargeError: ")
        assert "123456 bytes" in told and "1000 bytes" in told
        assert closed.startswith(f"DEBUG session {name} closed: the stream failed: the other side announced a frame of ")


def test_a_payload_that_cannot_be_decoded(log: Lines) -> None:
    payload = f'{{"__class":"No\\\\Such","x":"{SECRET}"}}'.encode()
    with IpcPeer(JsonMessageSerializer()) as peer, RawPeer(peer) as raw:
        log.take()
        raw.write(frame(payload))
        tick_until(lambda: log.lines, peer)
        (refused,) = log.take()
        assert refused.startswith(
            f"DEBUG session {name_of(raw.session)}: a message of {len(payload)} bytes was refused: Unknown class: No\\Such"
        )
        assert raw.session.is_open


def test_a_late_reply(log: Lines, peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        log.take()
        promise = raw.session.request(Ping(), timeout=0)
        with pytest.raises(RequestTimeoutError):
            promise.wait()
        raw.write(reply_bytes(promise.id, Pong(SECRET)))
        tick_until(lambda: log.lines, peer)
        text = f"late reply to request {promise.id!r} dropped: nobody waits for it"
        assert log.take() == [f"DEBUG session {name_of(raw.session)}: {text}"]


def test_a_handler_that_raises(log: Lines, peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    log.take()

    @b.on_request
    def fail(ping: Ping) -> None:
        raise ValueError(SECRET)

    promise = a.request(Ping())
    with pytest.raises(RemoteError, match=SECRET):
        promise.wait()
    assert log.take() == [f"DEBUG session {name_of(b)}: request {promise.id!r} was answered with a ValueError"]


# -- and nothing else


@pytest.mark.matrix
@pytest.mark.parametrize("imported", [True, False])
def test_nothing_is_printed_and_logging_is_not_imported(imported: bool) -> None:
    code = (
        "import sys; from stream_ipc import IpcPeer, LogMessage\n"
        "peer = IpcPeer(); a, b = peer.create_session_pair()\n"
        "a.request(LogMessage('x'), 0); b.tick(); a.close(); peer.close()\n"
        "assert ('logging' in sys.modules) == (sys.argv[1] == 'True')"
    )
    done = subprocess.run(
        [sys.executable, "-c", ("import logging; " if imported else "") + code, str(imported)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
    )
    assert (done.stdout, done.returncode) == (b"", 0)


def test_a_socket_of_ones_own(log: Lines, peer: IpcPeer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        other = server.accept()[0]
        with other:
            session = peer.create_socket_session(sock)
            host, port = server.getsockname()
            assert log.take() == [f"DEBUG session {name_of(session)} opened"]
            assert name_of(session) == f"to {host}:{port} fd {sock.fileno()}"


def test_the_logger_is_asked_for_once(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    # An interruption inside getLogger() leaves a lock of logging's locked, and then every other thread that logs hangs.
    peer.create_session_pair()
    said: List[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger("stream_ipc"), "debug", lambda text, *args, **options: said.append(text % args))
        patch.setattr(logging, "getLogger", None)
        a, _ = peer.create_session_pair()
        a.close()
    assert len(said) >= 3
