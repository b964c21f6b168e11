"""examples/benchmark.py: every workload runs and yields figures. How fast anything is, is not tested here."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

WORKLOADS = [
    "small",
    "json",
    "msgspec",
    "pipeline",
    "pipeline_batch",
    "flood",
    "flood_batch",
    "children",
    "mib",
    "mib_sockets",
    "big",
    "big_memory",
    "big_sockets",
    "big_sockets_memory",
    "broadcast",
    "idle_none",
    "idle_1000",
    "idle_share",
    "start",
    "import",
    "import_own",
    "shape_nested",
    "shape_list",
    "shape_text",
    "shape_dicts",
]
TABLES = ["sessions", "pending", "burst", "bytes"]
COMMAND = [sys.executable, "-m", "examples.benchmark", "--quick", "--tiny"]


def environment():
    # Nothing that the checkout does not hold is needed to find it.
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_workload_yields_figures(tmp_path):
    path = tmp_path / "figures.json"
    done = subprocess.run(
        [*COMMAND, "--json", str(path)],
        cwd=str(ROOT),
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=170,
    )
    assert (done.stderr, done.returncode) == ("", 0), done.stdout
    document = json.loads(path.read_text(encoding="utf-8"))
    absent = [key for key in ("msgspec",) if f"{key}: not installed" in document["left_out"]]
    assert bool(absent) is (find_spec("msgspec") is None)
    assert list(document["workloads"]) == [key for key in WORKLOADS if key not in absent]
    assert list(document["tables"]) == TABLES
    assert [line for line in done.stdout.splitlines() if len(line) > 79] == []
    for key, entry in document["workloads"].items():
        assert {"raw selector", "stream_ipc"} <= set(entry["results"]), key
        assert entry["title"] in done.stdout
        for name, result in entry["results"].items():
            assert result["median"] > 0, (key, name)
            assert all(figure > 0 for figure in result["rounds"]), (key, name)
            assert result["ratio"] is None or result["ratio"] > 0, (key, name)
    for key, table in document["tables"].items():
        assert len(table["rows"]) > 1, key
        assert table["title"] in done.stdout
        for row in table["rows"]:
            assert len(row) == len(table["columns"])
            assert all(figure > 0 for figure in row[1:]), key
    for package in ("execnet", "rpyc", "pyzmq"):
        assert (f"{package}: not installed" in document["left_out"]) is (package not in done.stdout.split("\n\n")[1])


@pytest.mark.timeout(60)
@pytest.mark.slow
def test_children_use_bytecode_though_the_environment_forbids_it(tmp_path):
    done = subprocess.run(
        [*COMMAND, "--only", "start"],
        cwd=str(ROOT),
        env={**environment(), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(tmp_path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=50,
    )
    assert (done.stderr, done.returncode) == ("", 0), done.stdout
    # The last one is imported by the children of multiprocessing only.
    for name in ("stream_ipc/session.*.pyc", "examples/benchmark.*.pyc"):
        assert list(tmp_path.rglob(name)), name


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_interrupt_ends_everything():
    # A group of its own, for a signal as a terminal sends it, to all of it.
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.benchmark", "--only", "children"],
        cwd=str(ROOT),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        time.sleep(1.0)  # somewhere in the middle; where does not matter
        os.killpg(process.pid, signal.SIGINT)
        # Whoever was left would still have these streams open.
        output, errors = process.communicate(timeout=40)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert (output, errors, process.returncode) == (b"", b"interrupted\n", 130)
