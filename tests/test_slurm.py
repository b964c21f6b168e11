"""A pool whose workers are jobs of a batch system: a real Slurm of one node, which the tests start on loopback."""

import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest

from examples.messages import Ready
from stream_ipc import IpcPeer, LogMessage, Session, WorkerPool, gather
from tests.helpers import PATIENCE, tick_until
from tests.messages import Note, Ping, Pong
from tests.test_remote import EXAMPLE, POOLED, RESULTS, await_end, example

PROGRAMS = ["munged", "slurmctld", "slurmd", "srun", "squeue", "scancel"]
CPUS = 2
# A job that ends keeps its CPU for some seconds more.
LONG = 3 * PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5 * LONG)]


class Slurm:
    """A controller, a node with two CPUs, and the munge that they trust, of this user and with nothing outside a folder."""

    def __init__(self, folder: Path, programs: Dict[str, str]) -> None:
        self.programs = programs
        self._daemons: List[Tuple[Path, subprocess.Popen[bytes]]] = []
        self._folder = folder
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        with socket.socket() as one, socket.socket() as other:
            for probe in one, other:
                probe.bind(("127.0.0.1", 0))
            ports = one.getsockname()[1], other.getsockname()[1]
        # CR_CPU: or one job would take all the memory, and with it the node.
        (folder / "slurm.conf").write_text(
            f"""
            ClusterName=tests
            SlurmctldHost=localhost(127.0.0.1)
            SlurmctldPort={ports[0]}
            SlurmdPort={ports[1]}
            CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
            SlurmUser={getpass.getuser()}
            SlurmdUser={getpass.getuser()}
            AuthType=auth/munge
            AuthInfo=socket={folder}/munge
            CredType=cred/munge
            ProctrackType=proctrack/linuxproc
            SelectType=select/cons_tres
            SelectTypeParameters=CR_CPU
            SlurmdParameters=config_overrides
            StateSaveLocation={folder}/state
            SlurmdSpoolDir={folder}/spool
            SlurmctldPidFile={folder}/slurmctld.pid
            SlurmdPidFile={folder}/slurmd.pid
            NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 CPUs={CPUS}
            PartitionName=p Nodes=n1 Default=YES
            """
        )

    def start(self) -> None:
        folder = self._folder
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "seed", "log")]
        # --force: others cannot reach its socket in this folder, and need not.
        self._start("munged", "--foreground", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge", *files)
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D", "-N", "n1")
        limit = time.monotonic() + LONG
        # This waits by itself, too, once there is a controller.
        while self._run("srun", "-Q", "-n1", "true").returncode != 0:
            for log, daemon in self._daemons:
                if daemon.poll() is not None:
                    pytest.skip(f"{log.stem} does not start here: {log.read_text()[-2000:]}")
            assert time.monotonic() < limit, [log.read_text()[-2000:] for log, _ in self._daemons]

    def _start(self, name: str, *arguments: str) -> None:
        log = self._folder / f"{name}.out"
        with log.open("wb") as output:
            daemon = subprocess.Popen(
                [self.programs[name], *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._daemons.append((log, daemon))

    def _run(self, name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [self.programs[name], *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LONG)

    def states(self) -> List[str]:
        """The states of all jobs that have not ended, sorted."""
        done = self._run("squeue", "-h", "-o", "%T")
        assert done.returncode == 0, done.stderr
        return sorted(done.stdout.split())

    def await_no_jobs(self) -> None:
        limit = time.monotonic() + LONG
        while self.states():
            assert time.monotonic() < limit, f"jobs do not end: {self.states()}"

    def close(self) -> None:
        """End all jobs, and then the daemons: a job does not end with them."""
        try:
            if len(self._daemons) == 3 and all(daemon.poll() is None for _, daemon in self._daemons):
                # At once; the second one is for jobs that have not begun.
                self._run("scancel", "--signal=KILL", f"--user={getpass.getuser()}")
                self._run("scancel", f"--user={getpass.getuser()}")
                self.await_no_jobs()
        finally:
            for _, daemon in reversed(self._daemons):
                daemon.terminate()
                try:
                    daemon.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    os.killpg(daemon.pid, signal.SIGKILL)
                    daemon.wait()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/usr/local/sbin"
    programs = {name: shutil.which(name, path=path) for name in PROGRAMS}
    missing = [name for name, program in programs.items() if program is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    # These tests may run in a job of another Slurm.
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SRUN_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    made = Slurm(tmp_path, {name: str(program) for name, program in programs.items()})
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def peer() -> Iterator[IpcPeer]:
    with IpcPeer(timeout=2 * LONG) as made:
        yield made


class Workers:
    """What a pool's workers have told."""

    def __init__(self) -> None:
        self.sessions: Dict[int, Session] = {}  # of those that have begun a task, by pid
        self.began: List[int] = []
        self.words = ""

    def add(self, session: Session) -> None:
        @session.on_message
        def note(begun: Note) -> None:
            self.sessions[begun.data] = session
            self.began.append(begun.data)

        @session.on_message
        def hear(text: LogMessage) -> None:
            self.words += text.message + "\n"

    def release(self, pid: int) -> None:
        """Have a worker answer the task that it holds."""
        self.sessions[pid].notify(Note())


def srun(slurm: Slurm) -> List[str]:
    return [slurm.programs["srun"], "-u", "-n1", "sh", "-c", POOLED]


def test_workers_in_the_queue_hold_no_task(peer: IpcPeer, slurm: Slurm) -> None:
    workers = Workers()
    command = srun(slurm)
    with WorkerPool(peer, command, CPUS + 2, hello=Ready, start_timeout=2 * LONG, on_session=workers.add) as pool:
        held = [pool.submit(Ping("hold"), expect=Pong) for _ in range(CPUS + 2)]
        tick_until(lambda: len(workers.began) == CPUS, peer, seconds=LONG)
        tick_until(lambda: slurm.states() == ["PENDING"] * 2 + ["RUNNING"] * CPUS, peer, seconds=LONG)
        tick_until(lambda: workers.words.count("queued and waiting for resources") >= 2, peer)
        first = workers.began[:]
        # All other tasks go to the workers that run, though there is a worker in the queue for each.
        for pid in first:
            workers.release(pid)
        tick_until(lambda: len(workers.began) == CPUS + 2, peer)
        assert sorted(workers.began[CPUS:]) == sorted(first)
        assert slurm.states() == ["PENDING"] * 2 + ["RUNNING"] * CPUS

        # One is lost with its task: now a worker of the queue has its turn, and gets that task.
        os.kill(first[0], signal.SIGKILL)
        await_end(first[0])
        tick_until(lambda: len(workers.began) == CPUS + 3, peer, seconds=LONG)
        assert workers.began[-1] not in first
        workers.release(workers.began[-1])
        workers.release(first[1])
        gather(held)
        gather(pool.submit(Ping(n), expect=Pong) for n in range(20))
        processes = [session.process for session in pool.workers]
    assert all(process is not None and process.returncode is not None for process in processes)
    for pid in set(workers.began):
        await_end(pid)
    slurm.await_no_jobs()


def test_workers_whose_turn_does_not_come_in_time(peer: IpcPeer, slurm: Slurm) -> None:
    workers = Workers()
    started: List[Session] = []

    def on_session(session: Session) -> None:
        started.append(session)
        workers.add(session)

    def out_of_time() -> bool:
        return any("gave no sign within 8 s" in str(session.reason) for session in started)

    # 8 seconds: enough for those that run to come up on a machine that is busy.
    command = srun(slurm)
    with WorkerPool(peer, command, CPUS + 1, hello=Ready, start_timeout=8, on_session=on_session) as pool:
        held = [pool.submit(Ping("hold"), expect=Pong) for _ in range(CPUS + 1)]
        tick_until(lambda: len(workers.began) == CPUS and out_of_time(), peer, seconds=LONG)
        first = workers.began[:]
        for pid in first:
            workers.release(pid)
        tick_until(lambda: len(workers.began) == CPUS + 1, peer)
        assert workers.began[-1] in first
        workers.release(workers.began[-1])
        gather(held)
    # The one that was killed in the queue has left its job there. Slurm drops it when its turn comes.
    slurm.await_no_jobs()


def test_example(slurm: Slurm) -> None:
    launcher = f"{shlex.quote(slurm.programs['srun'])} -u -n1 sh -c"
    done = example("--launcher", launcher, "--workers", str(CPUS + 2), "--command", EXAMPLE)
    *results, last = done.stdout.splitlines()
    assert (sorted(results), last, done.returncode) == (sorted(RESULTS), "6 of 6 jobs are done", 0), done.stderr
