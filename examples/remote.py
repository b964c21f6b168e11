"""Slaves on other machines, by any launcher that passes stdin and stdout on.

    python3 -m examples.remote [--launcher "ssh -o BatchMode=yes HOST"] [--command TEXT] [--slaves N]

The launcher is a command that gets one more argument, the text of a shell command, and runs it in a shell: ``ssh HOST``
does, and so do ``srun sh -c``, ``kubectl exec -i POD -- sh -c`` and ``docker exec -i CONTAINER sh -c``. It must not make
a terminal of stdin and stdout, so no ``-t``. What it says itself on stdout or stderr does no harm.
"""

import argparse
import shlex
import sys
from typing import Dict, List, Tuple

from examples.messages import PrimesRequest, PrimesResponse
from examples.workers import worker
from stream_ipc import IpcPeer, LogMessage, ResponsePromise, Session, StreamClosedError, as_completed

JOBS = [10_000, 20_000, 30_000, 40_000, 50_000, 60_000]
# Without a launcher: this interpreter, in a local shell.
LOCAL = "sh -c"
LOCAL_COMMAND = f"exec {shlex.quote(sys.executable)} -m examples.remote slave"
COMMAND = "exec python3 -m examples.remote slave"


def work_off(peer: IpcPeer, slaves: List[Session], jobs: List[int]) -> Dict[int, int]:
    """Have slaves do jobs. A job whose slave is lost goes to another one.

    Returns:
        The results of the jobs; not of all if no slave is left.
    """
    results: Dict[int, int] = {}
    waiting = jobs[::-1]
    idle = slaves[:]
    running: Dict[ResponsePromise[PrimesResponse], Tuple[int, Session]] = {}
    while (waiting and idle) or running:
        while waiting and idle:
            job, slave = waiting.pop(), idle.pop()
            try:
                running[slave.request(PrimesRequest(job), expect=PrimesResponse)] = job, slave
            except StreamClosedError as error:  # the launcher has failed, or was killed meanwhile
                print(f"lost: {error}", file=sys.stderr)
                waiting.append(job)
        for promise in as_completed(running):
            job, slave = running.pop(promise)
            try:
                results[job] = promise.wait().count
            except StreamClosedError as error:
                print(f"lost: {error}", file=sys.stderr)
                waiting.append(job)
            else:
                print(f"{results[job]} primes are below {job}")
                idle.append(slave)
            if waiting and idle:
                break  # give it out at once
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs slaves through a launcher.")
    parser.add_argument("--launcher", default=LOCAL, help="the command that runs a shell command elsewhere")
    parser.add_argument("--command", help=f"what starts a slave there, by default {COMMAND!r}")
    parser.add_argument("--slaves", type=int, default=2, help="how many")
    options = parser.parse_args()
    command = options.command or (LOCAL_COMMAND if options.launcher == LOCAL else COMMAND)

    def show(text: LogMessage, session: Session) -> None:
        # The launcher's own words (junk if they come on stdout), and what the slave prints.
        process = session.process
        print(f"[{process.pid if process else '?'}] {text.message.rstrip()}", file=sys.stderr)

    with IpcPeer(timeout=None) as peer:
        slaves = [
            peer.create_command_session([*shlex.split(options.launcher), command]) for _ in range(options.slaves)
        ]
        for slave in slaves:
            slave.on_message(show)
        done = work_off(peer, slaves, JOBS)
    print(f"{len(done)} of {len(JOBS)} jobs are done")
    return 0 if len(done) == len(JOBS) else 1


if __name__ == "__main__":
    worker() if "slave" in sys.argv[1:] else sys.exit(main())
