"""What every test checks beside its own subject: nothing is left behind. And what most of them begin with."""

import ctypes
import gc
import inspect
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Iterator, List, Optional, Set, Tuple

import pytest

from stream_ipc import IpcPeer
from tests import helpers
from tests.fork_server import ForkServer
from tests.helpers import RawPeer, set_limit

# Children of tests import the package and the tests' own modules from the checkout.
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def open_descriptors() -> Set[str]:
    """The descriptors that this process has open, with what they are."""
    found = set()
    for name in os.listdir("/dev/fd"):
        try:
            found.add(f"{name} {os.fstat(int(name)).st_ino}")
        except OSError:
            pass  # the listing's own
    return found


# The children that this process has started itself. Others are adopted: their parents have died.
own_children: Set[int] = set()
fork_server: Optional[ForkServer] = None


def note_own_children() -> None:
    """From now on, know own children from adopted ones, and adopt what would otherwise be init's (on Linux)."""
    execute, fork = subprocess.Popen._execute_child, os.fork  # type: ignore[attr-defined]
    names = list(inspect.signature(execute).parameters)[1:]

    def noting_execute(process: Any, *args: Any) -> None:
        if fork_server is None or not fork_server.start(process, dict(zip(names, args))):
            execute(process, *args)
        own_children.add(process.pid)

    def noting_fork() -> int:
        pid = fork()
        own_children.add(pid)
        return pid

    subprocess.Popen._execute_child, os.fork = noting_execute, noting_fork  # type: ignore[attr-defined]
    if sys.platform == "linux":
        set_child_subreaper = 36
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def children_left() -> str:
    """Say which child processes are left, running or not reaped; orphans have a moment to end by themselves."""
    end = time.monotonic() + 10.0
    while True:
        try:
            ended = os.waitpid(-1, os.WNOHANG)[0]
        except ChildProcessError:
            return ""
        if not ended and fork_server is not None and children() == [fork_server.process.pid]:
            return ""
        if ended in own_children:
            return f"{ended} is not reaped"
        if not ended and time.monotonic() > end:
            return kill_children()
        if not ended:
            time.sleep(0.005)  # there may be nothing else to wait for: a process that was adopted has no pipe to us


def children() -> List[int]:
    """Return all child processes, those that are dead and not reaped, too."""
    found: List[int] = []
    try:
        for name in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{name}/children") as file:
                found += map(int, file.read().split())
    except OSError:  # a thread has ended, and one that was looked at before may have its children
        return children()
    return found


def kill_children() -> str:
    """Kill what runs on, so that the next test is not blamed for it, and return what it was."""
    lines = subprocess.run(["ps", "-A", "-o", "ppid=,pid=,args="], stdout=subprocess.PIPE).stdout.decode().splitlines()
    kept = "" if fork_server is None else str(fork_server.process.pid)
    found = [line for line in lines if line.split()[0] == str(os.getpid()) and " ps -A -o ppid=" not in line]
    found = [line for line in found if line.split()[1] != kept]
    for line in found:
        pid = int(line.split()[1])
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return "running on: " + "; ".join(found)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests, too, and each place of an interruption sweep")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """Leave out what is slow, unless it is asked for: by --all, by -m or as a single test by its name."""
    seen: Set[Tuple[Any, str]] = set()
    for item in items:
        if item.get_closest_marker("matrix") and not item.get_closest_marker("slow"):
            function = (item.parent, getattr(item, "originalname", item.name))
            if function in seen:
                item.add_marker("slow")
            seen.add(function)
        if (helpers.everything or item.get_closest_marker("slow")) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(300))  # a machine may be busy with much else
    if helpers.everything or config.option.markexpr or any("::" in arg for arg in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # what is made while tests are collected is kept: to look for garbage would take much of that time
    helpers.everything = config.option.all
    note_own_children()
    if sys.platform == "darwin":  # whose folder for temporary files has too long a name for Unix sockets in it
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/tmp")
    # A shell lets what it starts in the background ignore Ctrl-C, and children inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Two thousand children would each compile the package anew (30 ms). They may, but not into this folder.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None) is not None:
        os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="stream-ipc-pycache-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ["PYTHONPYCACHEPREFIX"], ignore_errors=True))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    gc.collect()
    gc.freeze()  # what pytest holds need not be looked through after each test: that would be a third of the time
    left = open_descriptors() - before
    assert not left, f"descriptors left open: {left}"
    children = children_left()
    assert not children, f"child processes are left: {children}"
    own_children.clear()
    assert threading.active_count() == 1, f"threads left: {threading.enumerate()}"


@pytest.fixture(scope="session", autouse=True)
def children_find_the_package() -> Iterator[None]:
    global fork_server
    path = os.environ.get("PYTHONPATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONUNBUFFERED", raising=False)  # what they print waits in their buffers
        patch.setenv("PYTHONPATH", ROOT + (os.pathsep + path if path else ""))
        patch.syspath_prepend(ROOT)
        sys.modules.setdefault("tests", __import__("tests"))
        if not helpers.everything and "CI" not in os.environ and os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            fork_server = ForkServer()
            own_children.clear()  # it is no test's
        yield
        if fork_server is not None:
            fork_server.close()


@pytest.fixture
def peer(nothing_is_left: None) -> Iterator[IpcPeer]:
    with IpcPeer(timeout=20) as made:
        yield made


@pytest.fixture
def closed_streams_are_noticed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of what happens then need not wait as long as users do, which is half a second."""
    set_limit("check interval", 0.05, monkeypatch)


@pytest.fixture
def raw(peer: IpcPeer) -> Iterator[RawPeer]:
    with RawPeer(peer) as made:
        yield made
