"""The original library, PHP to PHP, as a competitor in ``examples.benchmark``.

It takes part if there is php and the environment variable PHP_STREAM_IPC names a checkout of riki137/php-stream-ipc.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

from examples.benchmark_child import SMALL
from examples.benchmark_ways import IN_FLIGHT, ROOT, Competitor, StreamIpcPhp, end

SCRIPT = os.path.join(ROOT, "examples", "php", "benchmark_original.php")


class Original(Competitor):
    """A master in PHP that is told what to do, with a slave of its own; nothing of it passes through this process."""

    name = "original"
    label = "PHP to PHP"
    note = "riki137/php-stream-ipc, PHP to PHP, in PHP's native format"

    def __init__(self, behaviour: str = "echo", children: int = 1, sockets: int = 0) -> None:
        command = ["php", SCRIPT, os.path.abspath(os.environ["PHP_STREAM_IPC"])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def _do(self, *order: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{' '.join(map(str, order))}\n".encode())
        answer = self.process.stdout.readline()
        if answer != b"done\n":
            raise RuntimeError(f"the original library's master failed: {answer!r}")

    def call(self, body: Any) -> Any:
        self.calls(body, 1)

    def calls(self, body: Any, count: int) -> None:
        self._do("calls", 0 if body == SMALL else len(body), count)

    def pipeline(self, count: int, in_flight: int = IN_FLIGHT) -> None:
        self._do("pipeline", in_flight, count)

    def flood(self, count: int) -> None:
        self._do("flood", 0, count)

    def close(self) -> None:
        end(self.process)

    @classmethod
    def missing(cls) -> str:
        checkout = os.environ.get("PHP_STREAM_IPC")
        if not checkout:
            return f"{cls.name}: PHP_STREAM_IPC names no checkout of it"
        if not os.path.exists(os.path.join(checkout, "src", "NativeIpcPeer.php")):
            return f"{cls.name}: PHP_STREAM_IPC names {checkout}, which is no checkout of it"
        return f"{cls.name}: php is not installed" if shutil.which("php") is None else ""


class InPhpFormat(StreamIpcPhp):
    """This library with ``PhpMessageSerializer``, in a column of its own."""

    name = "stream_ipc, PHP's format"
    label = "ours, in PHP's format"
