"""Slaves behind launchers that pass stdin and stdout on: real OpenSSH servers on loopback, and a shell."""

import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Set

import pytest

from examples.messages import Ready
from stream_ipc import IpcPeer, LogMessage, Session, StreamClosedError, WorkerPool, gather
from tests.helpers import PATIENCE, framed, run_python, tick_until
from tests.messages import Note, Ping, Pong

ROOT = Path(__file__).resolve().parent.parent

SLAVE = """
import os, sys
from stream_ipc import IpcPeer
from tests.messages import Ping, Pong

print("chatter of the slave itself")
session = IpcPeer().create_stdio_session()
print("to stderr", flush=True)

@session.on_request
def answer(ping: Ping) -> Pong:
    while ping.value == "hang":
        session.tick(None)  # ends when the session does, with an error
    return Pong(os.getpid() if ping.value == "pid" else ping.value)

while session.is_open:
    session.tick(None)
"""

# Of a pool: it says when it is ready, and which server it was reached through.
WORKER = """
import os
from examples.messages import Ready
from stream_ipc import DeferredReply, IpcPeer
from tests.messages import Note, Ping, Pong

session = IpcPeer().create_stdio_session()
place = os.environ.get("SSH_CONNECTION", "none").split()[-1]
held = []

@session.on_request
def answer(ping: Ping):
    session.notify(Note(place, os.getpid()))
    if ping.value == "hold":
        held.append(DeferredReply())
        return held[-1]
    return Pong(place)

@session.on_message
def let_go(note: Note):
    held.pop().send(Pong(place))

session.notify(Ready())
while session.is_open:
    session.tick(None)
"""

PRIMES = {10000: 1229, 20000: 2262, 30000: 3245, 40000: 4203, 50000: 5133, 60000: 6057}
RESULTS = [f"{count} primes are below {below}" for below, count in PRIMES.items()]


def shell(*command: str) -> str:
    """The text of a shell command that runs something in the checkout, wherever the shell is."""
    return f"cd {shlex.quote(str(ROOT))} && exec {' '.join(map(shlex.quote, command))}"


COMMAND = "echo chatter of the launcher; echo and more >&2; " + shell(sys.executable, "-c", SLAVE)
POOLED = shell(sys.executable, "-c", WORKER)
EXAMPLE = shell(sys.executable, "-m", "examples.remote", "worker")


class Sshd:
    """An OpenSSH server for this user on loopback, with keys and configuration of its own."""

    def __init__(self, folder: Path, sshd: str) -> None:
        self.folder = folder
        for name in ("host", "user", "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        (folder / "authorized").write_text((folder / "user.pub").read_text())
        (folder / "banner").write_text("Authorized users only.\n")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {(folder / 'host.pub').read_text()}")
        (folder / "sshd_config").write_text(
            f"""
            Port {self.port}
            ListenAddress 127.0.0.1
            HostKey {folder}/host
            PidFile none
            AuthorizedKeysFile {folder}/authorized
            Banner {folder}/banner
            PasswordAuthentication no
            PermitRootLogin prohibit-password
            StrictModes no
            UsePAM no
            """
        )
        (folder / "ssh_config").write_text(
            f"""
            Host loopback
                HostName 127.0.0.1
                Port {self.port}
                User {getpass.getuser()}
                IdentityFile {folder}/user
                IdentitiesOnly yes
                UserKnownHostsFile {folder}/known
                GlobalKnownHostsFile none
                StrictHostKeyChecking yes
            """
        )
        command = [sshd, "-D", "-e", "-f", str(folder / "sshd_config")]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.log = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if "Server listening on" in line:
                break

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None and "Server listening on" in self.log

    def launcher(self, *options: str) -> List[str]:
        return ["ssh", "-F", str(self.folder / "ssh_config"), "-o", "BatchMode=yes", *options, "loopback"]

    def close(self) -> None:
        # A connection that is still open has a process of its own, which holds stderr, too, and ends with its client.
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process.terminate()
        self.process.wait(PATIENCE)


@pytest.fixture
def start_sshd(tmp_path: Path) -> Iterator[Callable[[], Sshd]]:
    """Starts one more server at each call."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/usr/local/sbin"
    programs = {name: shutil.which(name, path=path) for name in ("sshd", "ssh", "ssh-keygen")}
    for name, program in programs.items():
        if program is None:
            pytest.skip(f"{name} is not installed")
    if os.getuid() == 0:
        # Debian's server wants it to be there, and removing it would disturb another run of these tests.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    servers: List[Sshd] = []

    def start() -> Sshd:
        folder = tmp_path / f"sshd{len(servers)}"
        folder.mkdir()
        servers.append(Sshd(folder, str(programs["sshd"])))
        if not servers[-1].is_running:
            pytest.skip(f"sshd does not start here: {servers[-1].log}")
        return servers[-1]

    try:
        yield start
    finally:
        for server in servers:
            server.close()


@pytest.fixture
def sshd(start_sshd: Callable[[], Sshd]) -> Sshd:
    return start_sshd()


@pytest.fixture(params=["sh", "ssh"])
def launcher(request: Any) -> List[str]:
    if request.param == "sh":
        return ["sh", "-c"]
    found: List[str] = request.getfixturevalue("sshd").launcher()
    return found


@pytest.fixture
def peer() -> Iterator[IpcPeer]:
    with IpcPeer(timeout=30) as made:
        yield made


def texts_of(session: Session) -> Callable[[str], str]:
    found: List[LogMessage] = []

    @session.on_message
    def keep(text: LogMessage) -> None:
        found.append(text)

    # Each message of stderr is a line.
    return lambda level: ("\n" if level == "stderr" else "").join(text.message for text in found if text.level == level)


def await_end(pid: int) -> None:
    """Wait for the death of a process that is not this one's child."""
    limit = time.monotonic() + PATIENCE
    with IpcPeer() as clock:
        while True:
            try:
                os.kill(pid, 0)
                if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                    return  # dead, though nobody has reaped it
            except (ProcessLookupError, FileNotFoundError):
                return
            assert time.monotonic() < limit, f"process {pid} lives on"
            clock.tick_for(0.01)


def error_of(session: Session, value: Any) -> str:
    with pytest.raises(StreamClosedError) as caught:
        session.request(Ping(value), timeout=PATIENCE).wait()
    return str(caught.value)


# -- sessions


@pytest.mark.slow
def test_conversation_in_spite_of_chatter(peer: IpcPeer, launcher: List[str]) -> None:
    session = peer.create_command_session([*launcher, COMMAND])
    texts = texts_of(session)
    pid = session.request(Ping("pid"), expect=Pong).wait().value
    for size in (0, 1, 100_000, 3 << 20):
        assert session.request(Ping(bytes(size)), expect=Pong).wait().value == bytes(size)
    tick_until(lambda: "to stderr" in texts("stderr"), peer)
    assert texts("junk") == "chatter of the launcher\nchatter of the slave itself\n"
    assert "and more" in texts("stderr")
    assert ("Authorized users only." in texts("stderr")) is (launcher[0] == "ssh")
    session.close()
    assert session.process is not None and session.process.returncode == 0
    await_end(pid)


@pytest.mark.matrix
def test_launcher_that_is_killed(peer: IpcPeer, launcher: List[str]) -> None:
    session = peer.create_command_session([*launcher, COMMAND])
    texts_of(session)
    pid = session.request(Ping("pid"), expect=Pong).wait().value
    promise = session.request(Ping("hang"))
    assert session.process is not None
    session.process.kill()
    with pytest.raises(StreamClosedError, match="was killed by SIGKILL"):
        promise.wait()
    await_end(pid)  # the slave ends with its connection


@pytest.mark.matrix
def test_slave_that_is_killed(peer: IpcPeer, launcher: List[str]) -> None:
    session = peer.create_command_session([*launcher, COMMAND])
    texts_of(session)
    pid = session.request(Ping("pid"), expect=Pong).wait().value
    promise = session.request(Ping("hang"))
    os.kill(pid, signal.SIGKILL)
    expected = "exit status 255" if launcher[0] == "ssh" else "was killed by SIGKILL"
    with pytest.raises(StreamClosedError, match=expected):
        promise.wait()


@pytest.mark.slow
def test_command_that_is_not_there(peer: IpcPeer, launcher: List[str]) -> None:
    error = error_of(peer.create_command_session([*launcher, "exec no-such-program"]), 1)
    assert "exited with exit status 127" in error and "no-such-program" in error and "not found" in error


def test_launcher_that_fails(peer: IpcPeer) -> None:
    command = ["sh", "-c", "echo no lines are free; echo all lines are busy >&2; exit 5", COMMAND]
    error = error_of(peer.create_command_session(command), 1)
    assert "exited with exit status 5" in error and error.endswith("all lines are busy")


@pytest.mark.slow
def test_ssh_with_a_key_that_is_not_known(peer: IpcPeer, sshd: Sshd) -> None:
    launcher = sshd.launcher("-o", f"IdentityFile={sshd.folder}/stranger")
    config = sshd.folder / "ssh_config"
    config.write_text(config.read_text().replace("/user", "/stranger"))
    error = error_of(peer.create_command_session([*launcher, COMMAND]), 1)
    assert "exited with exit status 255" in error and "Permission denied" in error


@pytest.mark.slow
def test_ssh_to_a_host_whose_key_is_another(peer: IpcPeer, sshd: Sshd) -> None:
    (sshd.folder / "known").write_text(f"[127.0.0.1]:{sshd.port} {(sshd.folder / 'user.pub').read_text()}")
    error = error_of(peer.create_command_session([*sshd.launcher(), COMMAND]), 1)
    assert "exited with exit status 255" in error and "Host key verification failed" in error


def test_ssh_to_nobody(peer: IpcPeer, sshd: Sshd) -> None:
    sshd.close()
    error = error_of(peer.create_command_session([*sshd.launcher(), COMMAND]), 1)
    assert "exited with exit status 255" in error and "Connection refused" in error


@pytest.mark.slow
def test_many_sessions_over_ssh(peer: IpcPeer, sshd: Sshd) -> None:
    command = [*sshd.launcher(), COMMAND]
    sessions = [peer.create_command_session(command) for _ in range(4)]
    promises = [session.request(Ping(index), expect=Pong) for index, session in enumerate(sessions)]
    assert [promise.wait().value for promise in promises] == [0, 1, 2, 3]


# -- pools


@pytest.mark.slow
def test_pool_on_two_hosts(peer: IpcPeer, start_sshd: Callable[[], Sshd]) -> None:
    hosts = [start_sshd(), start_sshd()]
    places = {str(host.port) for host in hosts}
    began: List[Note] = []
    holding: Set[Session] = set()
    started: List[Session] = []

    def on_session(session: Session) -> None:
        started.append(session)

        @session.on_message
        def note(begun: Note) -> None:
            began.append(begun)
            holding.add(session)

        @session.on_message
        def drop(text: LogMessage) -> None:  # the banner
            pass

    commands = [[*host.launcher(), POOLED] for host in hosts]
    with WorkerPool(peer, commands, hello=Ready, start_timeout=PATIENCE, on_session=on_session) as pool:
        held = [pool.submit(Ping("hold"), expect=Pong) for _ in hosts]
        tick_until(lambda: len(began) == 2, peer)  # each worker has one, since neither has answered
        assert {note.text for note in began} == places
        queued = [pool.submit(Ping(n), expect=Pong) for n in range(10)]
        victim = began[0]
        os.kill(victim.data, signal.SIGKILL)
        await_end(victim.data)
        # What it had goes to the next that is free, and that is the one in its place: the other one is still busy.
        tick_until(lambda: len(began) == 3, peer)
        assert (began[2].text, began[2].data != victim.data) == (victim.text, True)
        assert len(started) == 3
        for session in holding:
            if session.is_open:
                session.notify(Note())
        assert {reply.value for reply in gather(held)} == places
        assert {reply.value for reply in gather(queued)} <= places
        assert len(began) == 3 + 10
    assert all(session.process is not None and session.process.returncode is not None for session in started)
    for note in began:
        await_end(note.data)


def test_pool_whose_one_host_is_slow_to_come_up(peer: IpcPeer, tmp_path: Path) -> None:
    # The first one comes up when all is done; it would have got the first task.
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    slow, quick = ["sh", "-c", f"read line <{gate}; {POOLED}"], ["sh", "-c", POOLED]
    pids: List[int] = []
    began: List[Any] = []

    def on_session(session: Session) -> None:
        assert session.process is not None
        pids.append(session.process.pid)  # exec keeps it

        @session.on_message
        def note(begun: Note) -> None:
            began.append(begun.data)

    with WorkerPool(peer, [slow, quick], hello=Ready, start_timeout=PATIENCE, on_session=on_session) as pool:
        gather(pool.submit(Ping(n), expect=Pong) for n in range(5))
        assert began == [pids[1]] * 5
        # Both come up now: held tasks show that the slow one takes part.
        held = [pool.submit(Ping("hold"), expect=Pong) for _ in range(2)]
        with gate.open("w") as opener:
            opener.write("come up\n")
        tick_until(lambda: len(began) == 7, peer)
        assert sorted(began[5:]) == sorted(pids)
        for session in pool.workers:
            session.notify(Note())
        gather(held)


@pytest.mark.slow
@pytest.mark.parametrize("why", ["slow to come up", "busy"])
def test_pool_whose_other_host_is_down(peer: IpcPeer, tmp_path: Path, why: str) -> None:
    # The one that is down fails more often than would fail what is queued, were there not the other one.
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    good = ["sh", "-c", (f"read line <{gate}; " if why == "slow to come up" else "") + POOLED]
    started: List[Session] = []
    began: List[Note] = []

    def on_session(session: Session) -> None:
        started.append(session)

        @session.on_message
        def note(begun: Note) -> None:
            began.append(begun)

    with WorkerPool(peer, [good, ["sh", "-c", "exit 255"]], hello=Ready, on_session=on_session) as pool:
        first = pool.submit(Ping("hold" if why == "busy" else 0), expect=Pong)
        if why == "busy":
            tick_until(lambda: began, peer)
        queued = [pool.submit(Ping(n), expect=Pong) for n in range(5)]
        tick_until(lambda: len([session for session in started if not session.is_open]) >= 7, peer)
        assert pool.pending == 6 and not any(promise.done for promise in queued)
        if why == "busy":
            started[0].notify(Note())
        else:
            with gate.open("w") as opener:
                opener.write("come up\n")
        gather([first, *queued])


@pytest.mark.slow
def test_pool_whose_host_never_comes_up(peer: IpcPeer) -> None:
    # It is killed at its time and started again, while the other one has all the tasks.
    never, other = ["sh", "-c", "while read -r line; do :; done"], ["sh", "-c", POOLED]
    started: List[Session] = []
    began: List[Note] = []

    def on_session(session: Session) -> None:
        started.append(session)
        session.on_message(note)

    def note(begun: Note) -> None:
        began.append(begun)

    with WorkerPool(peer, [never, other], hello=Ready, start_timeout=3, on_session=on_session) as pool:
        held = [pool.submit(Ping("hold"), expect=Pong) for _ in range(2)]
        tick_until(lambda: len(started) >= 3 and len(began) == 1, peer)
        assert "gave no sign within 3 s (no Ready has come)" in str(started[0].reason)
        for number, promise in enumerate(held, 1):
            tick_until(lambda number=number: len(began) == number, peer)  # type: ignore[misc]
            started[1].notify(Note())
            promise.wait()


# -- the example


def example(*arguments: str) -> "subprocess.CompletedProcess[str]":
    code = "import runpy, sys; sys.argv[0] = 'remote'; runpy.run_module('examples.remote', run_name='__main__')"
    return run_python(code, *arguments, timeout=50)


@pytest.mark.matrix
def test_example_through_the_launcher(launcher: List[str]) -> None:
    done = example("--launcher", " ".join(map(shlex.quote, launcher)), "--command", "echo welcome; " + EXAMPLE)
    *results, last = done.stdout.splitlines()
    assert (sorted(results), last, done.returncode) == (sorted(RESULTS), "6 of 6 jobs are done", 0), done.stderr
    # The first may be done with everything before the second is up.
    assert done.stderr.count("] welcome\n") in (1, 2)


@pytest.mark.slow
def test_example_on_two_hosts(start_sshd: Callable[[], Sshd]) -> None:
    hosts = [start_sshd(), start_sshd()]
    launchers = [part for host in hosts for part in ("--launcher", shlex.join(host.launcher()))]
    # A host that is reached is not ready before the other one is, too: so both are seen to come up.
    meet = f"mkdir {hosts[0].folder}/met-$$; until set -- {hosts[0].folder}/met-*; [ $# -ge 2 ]; do :; done; "
    done = example(*launchers, "--workers", "1", "--command", "echo welcome; " + meet + EXAMPLE)
    *results, last = done.stdout.splitlines()
    assert (sorted(results), last, done.returncode) == (sorted(RESULTS), "6 of 6 jobs are done", 0), done.stderr
    for host in hosts:
        assert f"[{shlex.join(host.launcher())}] welcome\n" in done.stderr


@pytest.mark.slow
def test_example_with_a_host_that_is_down(tmp_path: Path) -> None:
    # The worker at the other one is not ready before this one has failed twice.
    down = tmp_path / "down"
    down.write_text(f"mkdir {tmp_path}/first 2>/dev/null || mkdir {tmp_path}/second 2>/dev/null; exit 255")
    wait = f"until [ -e {tmp_path}/second ]; do :; done; "
    done = example("--launcher", f"sh {down}", "--launcher", "sh -c", "--workers", "1", "--command", wait + EXAMPLE)
    *results, last = done.stdout.splitlines()
    assert (sorted(results), last, done.returncode) == (sorted(RESULTS), "6 of 6 jobs are done", 0), done.stderr
    assert f"[sh {down}] lost: " in done.stderr and "exited with exit status 255" in done.stderr


def test_example_on_this_machine() -> None:
    done = example()
    assert (sorted(done.stdout.splitlines()[:-1]), done.stderr, done.returncode) == (sorted(RESULTS), "", 0)


@pytest.mark.slow
def test_example_with_a_launcher_that_fails() -> None:
    done = example("--launcher", "sh -c 'echo all lines are busy >&2; exit 5'", "--workers", "3")
    assert (done.stdout, done.returncode) == ("0 of 6 jobs are done\n", 1)
    words = "exited with exit status 5; the end of its stderr:\nall lines are busy"
    # Each worker has three attempts, and the tasks' error has the words of the last one. That one is told of on its own
    # only if the pool did not notice its end together with that of another.
    assert done.stderr.count(words) in (8, 9, 10), done.stderr
    assert "9 workers in a row ended" in done.stderr.splitlines()[-2]


@pytest.mark.slow
def test_example_with_a_launcher_that_does_not_exist() -> None:
    done = example("--launcher", "no-such-launcher")
    assert (done.stdout, done.returncode) == ("0 of 6 jobs are done\n", 1)
    assert "no-such-launcher" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_example_with_a_launcher_that_is_killed_in_the_middle(tmp_path: Path) -> None:
    # The first one that is started dies when its slave, which has said that it is ready, has got a job.
    script = tmp_path / "launcher"
    script.write_text(
        f"""if mkdir {tmp_path}/first 2>/dev/null; then
            sh -c "$1" </dev/null &
            dd bs=1 count=1 of=/dev/null 2>/dev/null
            kill -KILL $$
        fi
        exec sh -c "$1"
        """
    )
    done = example("--launcher", f"sh {script}", "--workers", "1", "--command", EXAMPLE)
    *results, last = done.stdout.splitlines()
    assert (sorted(results), last, done.returncode) == (sorted(RESULTS), "6 of 6 jobs are done", 0)
    assert done.stderr.count("lost: ") == 1 and "was killed by SIGKILL" in done.stderr


def test_slave_of_the_example_without_a_master_ends() -> None:
    command = [sys.executable, "-m", "examples.remote", "worker"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=50)
    assert (done.stdout, done.stderr, done.returncode) == (framed(Ready()), b"", 0)
