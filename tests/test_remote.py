"""Slaves behind launchers that pass stdin and stdout on: a real OpenSSH server on loopback, and a shell."""

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
from typing import Any, Callable, Iterator, List

import pytest

from stream_ipc import IpcPeer, LogMessage, Session, StreamClosedError
from tests.helpers import PATIENCE, run_python, tick_until
from tests.messages import Ping, Pong

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

PRIMES = {10000: 1229, 20000: 2262, 30000: 3245, 40000: 4203, 50000: 5133, 60000: 6057}
RESULTS = [f"{count} primes are below {below}" for below, count in PRIMES.items()]


def shell(*command: str) -> str:
    """The text of a shell command that runs something in the checkout, wherever the shell is."""
    return f"cd {shlex.quote(str(ROOT))} && exec {' '.join(map(shlex.quote, command))}"


COMMAND = "echo chatter of the launcher; echo and more >&2; " + shell(sys.executable, "-c", SLAVE)
EXAMPLE = shell(sys.executable, "-m", "examples.remote", "slave")


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
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/usr/local/sbin"
    programs = {name: shutil.which(name, path=path) for name in ("sshd", "ssh", "ssh-keygen")}
    for name, program in programs.items():
        if program is None:
            pytest.skip(f"{name} is not installed")
    if os.getuid() == 0:
        # Debian's server wants it to be there, and removing it would disturb another run of these tests.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    server = Sshd(tmp_path, str(programs["sshd"]))
    try:
        if not server.is_running:
            pytest.skip(f"sshd does not start here: {server.log}")
        yield server
    finally:
        server.close()


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


# -- the example


def example(*arguments: str) -> "subprocess.CompletedProcess[str]":
    code = "import runpy, sys; sys.argv[0] = 'remote'; runpy.run_module('examples.remote', run_name='__main__')"
    return run_python(code, *arguments, timeout=50)


@pytest.mark.matrix
def test_example_through_the_launcher(launcher: List[str]) -> None:
    done = example("--launcher", " ".join(map(shlex.quote, launcher)), "--command", "echo welcome; " + EXAMPLE)
    *results, last = done.stdout.splitlines()
    assert (sorted(results), last, done.returncode) == (sorted(RESULTS), "6 of 6 jobs are done", 0), done.stderr
    assert done.stderr.count("] welcome\n") == 2


def test_example_on_this_machine() -> None:
    done = example()
    assert (sorted(done.stdout.splitlines()[:-1]), done.stderr, done.returncode) == (sorted(RESULTS), "", 0)


def test_example_with_a_launcher_that_fails() -> None:
    done = example("--launcher", "sh -c 'echo all lines are busy >&2; exit 5'", "--slaves", "3")
    assert (done.stdout, done.returncode) == ("0 of 6 jobs are done\n", 1)
    assert done.stderr.count("exited with exit status 5; the end of its stderr:\nall lines are busy") == 3


def test_example_with_a_launcher_that_does_not_exist() -> None:
    done = example("--launcher", "no-such-launcher")
    assert done.returncode == 1 and "no-such-launcher" in done.stderr.splitlines()[-1]


def test_example_with_a_launcher_that_is_killed_in_the_middle(tmp_path: Path) -> None:
    # The first one that is started dies when its slave has got a job; it takes nothing else with it.
    script = tmp_path / "launcher"
    script.write_text(
        f"""if mkdir {tmp_path}/first 2>/dev/null; then
            dd bs=1 count=1 of=/dev/null 2>/dev/null
            kill -KILL $$
        fi
        exec sh -c "$1"
        """
    )
    done = example("--launcher", f"sh {script}", "--command", EXAMPLE)
    *results, last = done.stdout.splitlines()
    assert (sorted(results), last, done.returncode) == (sorted(RESULTS), "6 of 6 jobs are done", 0)
    assert done.stderr.count("lost: ") == 1 and "was killed by SIGKILL" in done.stderr
