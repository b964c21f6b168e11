"""``python3 -m stream_ipc``: see what a master and a slave say to each other.

Knows the command line. What it does is in ``tap``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any, List, Optional, TextIO

__all__ = ["main"]

_TAP = """\
Starts COMMAND, a slave, and passes on what it and its master say to each other, unchanged and at once. So in the
master, put this in front of the slave's command:

    create_command_session([sys.executable, "-m", "stream_ipc", "tap", "--log", "tap.log", "--", *command])

For each frame there is a line: seconds since the start, direction (-> to the slave, <- from it), kind, id, how long an
answer has taken, bytes, and the class with a shortened view of the fields. Nothing of the program is imported, and
nothing that comes is built. Ends as COMMAND ends.
"""

_DECODE = """\
Writes the same lines for a stream that was captured, of one direction, to stdout. They begin with how many bytes of
frames there have been. FILE is a file, or - for stdin.
"""


def main(arguments: Optional[List[str]] = None) -> int:
    """Do what the command line says.

    Args:
        arguments: Those behind the program's name; by default the process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python3 -m stream_ipc", description="See what a master and a slave say.")
    commands = parser.add_subparsers(dest="what", metavar="tap | decode", required=True)
    plain = argparse.RawDescriptionHelpFormatter
    tap = commands.add_parser("tap", help="watch a slave at work", description=_TAP, formatter_class=plain)
    decode = commands.add_parser("decode", help="show a captured stream", description=_DECODE, formatter_class=plain)
    for command in (tap, decode):
        group = command.add_mutually_exclusive_group()
        for name in ("json", "pickle", "php"):
            group.add_argument(
                f"--{name}", dest="format", action="store_const", const=name, default="", help=f"payloads are {name}"
            )
    tap.add_argument("--log", metavar="FILE", help="write the lines there, behind what is in it; by default to stderr")
    tap.usage = "%(prog)s [-h] [--json | --pickle | --php] [--log FILE] -- COMMAND..."
    decode.add_argument("file", metavar="FILE")
    given = sys.argv[1:] if arguments is None else arguments
    # By hand: argparse has ideas of its own about what stands behind a --, which may well have a -- in it.
    end = given.index("--") if "--" in given and given[:1] == ["tap"] else len(given)
    options = parser.parse_args(given[:end])
    return _tap(options, given[end + 1 :], tap) if options.what == "tap" else _decode(options, decode)


def _tap(options: argparse.Namespace, command: List[str], parser: argparse.ArgumentParser) -> int:
    from .tap.relay import tap

    if not command:
        parser.error("there is no command; put it behind a --")
    try:
        log = sys.stderr if options.log is None else _open_log(options.log)
    except OSError as exc:
        parser.error(f"the log cannot be written: {exc}")
    try:
        status = tap(command, options.format, log, _is_coloured(log))
    except OSError as exc:
        sys.stderr.write(f"stream_ipc tap: cannot start {command[0]!r}: {exc}\n")
        return 127 if isinstance(exc, FileNotFoundError) else 126
    if status < 0:
        # So that the master sees how it ended; but one core file is enough.
        try:
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(-status, signal.SIG_DFL)
        except (ImportError, OSError, ValueError):
            pass  # SIGKILL cannot be handled
        os.kill(os.getpid(), -status)
        return 128 - status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread may still wait for the master, who waits for us


def _open_log(name: str) -> TextIO:
    return open(name, "a", encoding="utf-8", errors="backslashreplace")


def _decode(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .tap.relay import decode

    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        if options.file == "-":
            stdin: Any = sys.stdin.buffer
            whole = decode(stdin.read1, options.format, sys.stdout, _is_coloured(sys.stdout))
        else:
            with open(options.file, "rb", buffering=0) as file:
                whole = decode(file.read, options.format, sys.stdout, _is_coloured(sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more
        return 1
    except OSError as exc:
        parser.error(f"{options.file} cannot be read: {exc}")
    return 0 if whole else 1


def _is_coloured(stream: TextIO) -> bool:
    # https://no-color.org
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


if __name__ == "__main__":
    sys.exit(main())
