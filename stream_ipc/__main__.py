"""``python3 -m stream_ipc``: see what a parent and a worker say to each other.

Knows the command line; ``tap`` does the work.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
from typing import TextIO

__all__ = ["main"]

_TAP = """\
Starts COMMAND, a worker, and passes on what it and its parent say to each other, unchanged and at once. So in the
parent, put this in front of the worker's command:

    create_command_session([sys.executable, "-m", "stream_ipc", "tap", "--log", "tap.log", "--", *command])

For each frame there is a line: the worker's pid, seconds since the start, direction (-> to the worker, <- from it), kind,
id, how long an answer has taken, bytes, and the class with a shortened view of the fields. Nothing of the program is
imported, and nothing that comes is built.

A trace is for https://ui.perfetto.dev and chrome://tracing: a process for each worker, a span for each request from its
start to its answer, instants for all else, also for what the worker writes to stderr.

Several taps may write to one FILE: the times of a log then count from its first line. %p in its name is the worker's pid.

Ends as COMMAND ends. A signal is passed on to COMMAND, which is killed if SIGTERM, SIGINT or SIGHUP has not ended it
within a few seconds.
"""

_DECODE = """\
Writes the same lines for a stream that was captured, of one direction, to stdout. They begin with how many bytes of
frames there have been. FILE is a file, or - for stdin.
"""


def main() -> int:
    """Carry out the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m stream_ipc", description="See what a parent and a worker say.")
    commands = parser.add_subparsers(dest="what", metavar="tap | decode", required=True)
    plain = argparse.RawDescriptionHelpFormatter
    tap = commands.add_parser("tap", help="watch a worker at work", description=_TAP, formatter_class=plain)
    decode = commands.add_parser("decode", help="show a captured stream", description=_DECODE, formatter_class=plain)
    for command in (tap, decode):
        group = command.add_mutually_exclusive_group()
        for name in ("json", "pickle", "php"):
            group.add_argument(
                f"--{name}", dest="format", action="store_const", const=name, default="", help=f"payloads are {name}"
            )
    tap.add_argument("--log", metavar="FILE", help="append the lines to FILE; by default to stderr")
    tap.add_argument("--trace", metavar="FILE", help="append the conversation to FILE in the Trace Event Format")
    tap.usage = "%(prog)s [-h] [--json | --pickle | --php] [--log FILE] [--trace FILE] -- COMMAND..."
    decode.add_argument("file", metavar="FILE")
    given = sys.argv[1:]
    # By hand: argparse would change what stands behind a --, which may have a -- in it.
    end = given.index("--") if "--" in given and given[:1] == ["tap"] else len(given)
    options = parser.parse_args(given[:end])
    return _tap(options, given[end + 1 :], tap) if options.what == "tap" else _decode(options, decode)


def _tap(options: argparse.Namespace, command: list[str], parser: argparse.ArgumentParser) -> int:
    from .tap.files import Log, Trace
    from .tap.relay import Tap

    if not command:
        parser.error("there is no command; put it behind a --")
    try:
        tap = Tap(command, options.trace is not None)
    except OSError as exc:
        sys.stderr.write(f"stream_ipc tap: cannot start {command[0]!r}: {exc}\n")
        return 127 if isinstance(exc, FileNotFoundError) else 126
    option = "log"
    try:
        log = Log(None if options.log is None else options.log.replace("%p", str(tap.pid)))
        option = "trace"
        trace = None if options.trace is None else Trace(options.trace.replace("%p", str(tap.pid)))
    except OSError as exc:
        tap.kill()
        parser.error(f"the {option} cannot be written: {exc}")
    status = tap.run(log, trace, options.format, options.log is None and _is_coloured(sys.stderr))
    if status < 0:
        # The parent sees how the worker ended; but one core file is enough.
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(-status, signal.SIG_DFL)
        except (OSError, ValueError):
            pass  # SIGKILL cannot be handled
        os.kill(os.getpid(), -status)
        return 128 - status
    os._exit(status)  # a thread may still wait for the parent, which waits for us


def _decode(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .tap.report import Report

    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        is_stdin = options.file == "-"
        with open(0 if is_stdin else options.file, "rb", buffering=0, closefd=not is_stdin) as file:
            report = Report(sys.stdout.write, ("--",), options.format, _is_coloured(sys.stdout))
            while True:
                data = file.read(65536)
                if not data:
                    break
                report.feed("--", data)
        is_whole = report.finish()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more
        return 1
    except OSError as exc:
        parser.error(f"{options.file} cannot be read, or its lines cannot be written: {exc}")
    return 0 if is_whole else 1


def _is_coloured(stream: TextIO) -> bool:
    # https://no-color.org
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


if __name__ == "__main__":
    sys.exit(main())
