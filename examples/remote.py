"""A pool of workers on other machines, by any launchers that pass stdin and stdout on.

    python3 -m examples.remote [--launcher "ssh -o BatchMode=yes HOST"]... [--command TEXT] [--workers N]

A launcher is a command that gets one more argument, the text of a shell command, and runs it in a shell: ``ssh HOST``
does, and so do ``srun -u -n1 sh -c``, ``kubectl exec -i POD -- sh -c`` and ``docker exec -i CONTAINER sh -c``. It must
not make a terminal of stdin and stdout, so no ``-t``. What it says itself on stdout or stderr does no harm. There may be
several launchers, one for each host.
"""

import argparse
import shlex
import sys
from typing import Any, List, Set

from examples.messages import PrimesRequest, PrimesResponse, Ready
from examples.workers import work
from stream_ipc import IpcError, IpcPeer, LogMessage, Session, WorkerPool, as_completed

JOBS = [10_000, 20_000, 30_000, 40_000, 50_000, 60_000]
# Without a launcher: this interpreter, in a local shell.
LOCAL = "sh -c"
LOCAL_COMMAND = f"exec {shlex.quote(sys.executable)} -m examples.remote worker"
COMMAND = "exec python3 -m examples.remote worker"


def work_off(peer: IpcPeer, commands: List[List[str]], start_timeout: float) -> int:
    """Have workers do the jobs, one worker for each command.

    Returns:
        How many jobs are done.
    """

    def on_session(session: Session) -> None:
        assert session.process is not None
        command: Any = session.process.args
        name = shlex.join(command[:-1])

        @session.on_message
        def show(text: LogMessage) -> None:
            # The launcher's own words (junk if they come on stdout), and what the worker prints.
            print(f"[{name}] {text.message.rstrip()}", file=sys.stderr)

        @session.on_close
        def tell(session: Session) -> None:
            if pool.pending:
                print(f"[{name}] lost: {session.reason}", file=sys.stderr)

    done = 0
    failures: Set[str] = set()
    # A line may die without a word, so tasks have a timeout. A worker gets none before it has said that it is ready: it
    # may still be waiting for its host or in a queue, while others are free.
    with WorkerPool(
        peer, commands, timeout=60, hello=Ready, start_timeout=start_timeout, on_session=on_session
    ) as pool:
        jobs = {pool.submit(PrimesRequest(below), expect=PrimesResponse): below for below in JOBS}
        for promise in as_completed(jobs):
            try:
                print(f"{promise.wait().count} primes are below {jobs[promise]}")
                done += 1
            except IpcError as error:
                failures.add(str(error))
    for text in failures:
        print(text, file=sys.stderr)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs a pool of workers through launchers.")
    parser.add_argument("--launcher", action="append", help="what runs a shell command elsewhere; may be given again")
    parser.add_argument("--command", help=f"what starts a worker there, by default {COMMAND!r}")
    parser.add_argument("--workers", type=int, default=2, help="how many workers through each launcher")
    parser.add_argument("--start-timeout", type=float, default=60, help="seconds that a worker has to come up")
    options = parser.parse_args()
    command = options.command or (COMMAND if options.launcher else LOCAL_COMMAND)
    launchers = [shlex.split(launcher) for launcher in options.launcher or [LOCAL]]
    with IpcPeer() as peer:
        # The pool starts them in this order, and not more than it has jobs for: first one on each host.
        commands = [[*launcher, command] for _ in range(options.workers) for launcher in launchers]
        done = work_off(peer, commands, options.start_timeout)
    print(f"{done} of {len(JOBS)} jobs are done")
    return 0 if done == len(JOBS) else 1


def worker() -> None:
    session = IpcPeer().create_stdio_session()
    session.on_request(work)
    session.notify(Ready())
    while session.is_open:
        session.tick(None)


if __name__ == "__main__":
    worker() if "worker" in sys.argv[1:] else sys.exit(main())
