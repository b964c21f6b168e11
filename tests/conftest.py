"""What every test checks beside its own subject: nothing is left behind. And what most of them begin with."""

import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
from typing import Iterator, List, Set

import pytest

from stream_ipc import IpcPeer
from tests import helpers
from tests.helpers import RawPeer, set_limit

# Children of tests import the package and the tests' own modules from the checkout.
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def open_descriptors() -> Set[str]:
    """The descriptors that this process has open, with what they are."""
    found = set()
    for name in os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"):
        try:
            found.add(f"{name} {os.fstat(int(name)).st_ino}")
        except OSError:
            pass  # the listing's own
    return found


def zombies_or_children() -> bool:
    """Whether a child process is left, running or not reaped."""
    try:
        os.waitpid(-1, os.WNOHANG)
        return True
    except ChildProcessError:
        return False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests, too, and each place of an interruption sweep")


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """Leave out what is slow, unless it is asked for: by --all, by -m or as a single test by its name."""
    if helpers.everything or config.option.markexpr or any("::" in arg for arg in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_configure(config: pytest.Config) -> None:
    helpers.everything = config.option.all
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
    assert not zombies_or_children(), "a child process is left"
    assert threading.active_count() == 1, f"threads left: {threading.enumerate()}"


@pytest.fixture(autouse=True)
def children_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", ROOT + (os.pathsep + path if path else ""))
    monkeypatch.syspath_prepend(ROOT)
    sys.modules.setdefault("tests", __import__("tests"))


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
