"""examples/benchmark.py: every workload runs and yields figures. How fast anything is, is not tested here."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from examples import benchmark_frame
from examples.benchmark_cost import find_counter
from examples.benchmark_frame import one_core

ROOT = Path(__file__).resolve().parent.parent

# With "_core" those that are done once more on one core.
WORKLOADS = [
    *("small", "small_core", "json", "json_core", "php", "php_core", "msgspec"),
    *("pipeline", "pipeline_core", "pipeline_batch", "pipeline_batch_core"),
    *("flood", "flood_batch", "children", "children_core", "mib", "mib_sockets"),
    *("big", "big_memory", "big_sockets", "big_sockets_memory"),
    *("broadcast", "idle_none", "idle_1000", "idle_share", "start", "import", "import_own"),
    *("shape_nested", "shape_nested_core", "shape_list", "shape_list_core"),
    *("shape_dicts", "shape_dicts_core", "shape_text", "shape_text_core"),
]
# Where there is the original.
PHP_WORKLOADS = [f"php_{key}{core}" for key in ("small", "pipeline", "flood", "big") for core in ("", "_core")]
LABELS = {"raw selector": " raw loop  ours", "original": " PHP to PHP  ours"}
TABLES = ["sessions", "pending", "burst", "bytes"]
COMMAND = [sys.executable, "-m", "examples.benchmark", "--quick", "--tiny"]


def environment():
    # Nothing that the checkout does not hold is needed to find it.
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*options, **changes):
    done = subprocess.run(
        [*COMMAND, *options],
        cwd=str(ROOT),
        env={**environment(), **changes},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=170,
    )
    assert (done.stderr, done.returncode) == ("", 0), done.stdout
    return done.stdout


def workloads():
    import examples.benchmark_workloads  # noqa: F401  # they are registered by their module

    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("what is done on one core is not there")
    return benchmark_frame.WORKLOADS


def has_affinity(key):
    return hasattr(os, "sched_setaffinity") or not key.endswith("_core")


def test_the_guide_shows_the_tables_as_they_are_now():
    guide = (ROOT / "examples" / "README.rst").read_text(encoding="utf-8")
    for base in ("raw selector", "original"):
        rows = [row for work in workloads() for row in work.rows if row.base == base and row.key != "msgspec"]
        first, last = ("\n" + " " * 4 + row.title for row in (rows[0], rows[-1]))
        # Each table begins with its first row, which is the first of the other one too.
        start = guide.index(first, guide.index(LABELS[base]))
        lines = guide[start + 1 : guide.index("\n\n", start)].split("\n")
        assert len(lines) == len(rows) and last.strip() in lines[-1]
        for row, line in zip(rows, lines):
            title = row.title if row.relative else f"{row.title} *"
            assert re.fullmatch(rf" {{4}}{re.escape(title)} +[\d.,]+ {re.escape(row.unit)}( +([\d.]+|-))+", line), line


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_workload_yields_figures(tmp_path):
    path = tmp_path / "figures.json"
    output = run("--json", str(path))
    document = json.loads(path.read_text(encoding="utf-8"))
    absent = [key for key in ("msgspec",) if f"{key}: not installed" in document["left_out"]]
    assert bool(absent) is (find_spec("msgspec") is None)
    php = [] if any(text.startswith("original: ") for text in document["left_out"]) else PHP_WORKLOADS
    wanted = [key for key in WORKLOADS + php if key not in absent and has_affinity(key)]
    assert list(document["workloads"]) == wanted
    assert list(document["tables"]) == TABLES
    assert [line for line in output.splitlines() if len(line) > 79] == []
    for key, entry in document["workloads"].items():
        assert {entry["base"], "stream_ipc"} <= set(entry["results"]), key
        assert entry["base"] == ("original" if key in php else "raw selector")
        assert entry["title"] in output
        for name, result in entry["results"].items():
            assert result["median"] > 0, (key, name)
            assert all(figure > 0 for figure in result["rounds"]), (key, name)
            assert result["ratio"] is None or result["ratio"] > 0, (key, name)
    for key, table in document["tables"].items():
        assert len(table["rows"]) > 1, key
        assert table["title"] in output
        for row in table["rows"]:
            assert len(row) == len(table["columns"])
            assert all(figure > 0 for figure in row[1:]), key
    for package in ("execnet", "rpyc", "pyzmq"):
        assert (f"{package}: not installed" in document["left_out"]) is (package not in output.split("\n\n")[2])
    assert max(map(len, output.splitlines())) <= 80


def test_what_is_done_on_one_core():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("there is no sched_setaffinity")
    before = os.sched_getaffinity(0)
    code = "import os; print(len(os.sched_getaffinity(0)))"
    with one_core():
        assert subprocess.check_output([sys.executable, "-S", "-c", code]) == b"1\n"
    assert os.sched_getaffinity(0) == before


@pytest.mark.timeout(60)
@pytest.mark.slow
def test_costs_without_a_clock(tmp_path):
    path = tmp_path / "figures.json"
    output = run("--cost", "--only", "small", "--json", str(path), PATH=str(tmp_path))  # nothing counts instructions
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["workloads"] == {} and list(document["tables"]) == ["bytecodes"]
    ((title, ours, our_calls, bare, bare_calls, ratio),) = document["tables"]["bytecodes"]["rows"]
    assert title == "small round trips" and title in output
    assert 100 < bare < ours and 1 < bare_calls < our_calls
    assert ratio == ours / bare


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_instructions_are_counted_where_that_is_possible(tmp_path):
    if not (find_counter()):
        pytest.skip("nothing here counts instructions")
    path = tmp_path / "figures.json"
    run("--cost", "--only", "flood", "--json", str(path))
    document = json.loads(path.read_text(encoding="utf-8"))
    assert list(document["tables"]) == ["bytecodes", "instructions"]
    ((title, ours, bare, ratio),) = document["tables"]["instructions"]["rows"]
    assert title == "notifications" and min(ours, bare) > 1000 and ratio == ours / bare


@pytest.mark.timeout(60)
@pytest.mark.matrix
@pytest.mark.parametrize("place", ["/nowhere", ""])
def test_the_original_is_left_out_without_a_checkout(place):
    names = f"{place}, which is no checkout of it" if place else "no checkout of it"
    output = run("--only", "php_small", PHP_STREAM_IPC=place)
    assert f"left out: original: PHP_STREAM_IPC names {names}\n" in output and "PHP to PHP" not in output


@pytest.mark.timeout(60)
@pytest.mark.slow
def test_children_use_bytecode_though_the_environment_forbids_it(tmp_path):
    run("--only", "start", PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX=str(tmp_path))
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
