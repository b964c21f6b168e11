"""Which name a class gets in programs that are started in all the ways there are: the one that the other side computes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipapp
from pathlib import Path
from typing import Any, List

import pytest

import stream_ipc

ROOT = str(Path(stream_ipc.__file__).parent.parent)

# Master and worker in one file. The master says how it got its answers, the worker is started as a plain script or module.
PROGRAM = """
import sys
from dataclasses import dataclass
from stream_ipc import IpcPeer, Message, register_type
from stream_ipc.registry import source
from stream_ipc.registry import lookup, type_info

@register_type
@dataclass
class Point:
    x: int

@dataclass
class Task(Message):
    n: int
    at: Point

@dataclass(slots=True)
class Answer(Message):
    n: int
    at: Point

    class Inner(Message):
        pass

def made_in_a_function():
    class Local(Message):
        pass
    return Local

Local = made_in_a_function()
Dynamic = type("Dynamic", (Message,), {})

def worker():
    with IpcPeer() as peer:
        session = peer.create_stdio_session()
        session.on_request(lambda task: Answer(task.n * task.n, task.at))
        while session.is_open:
            session.tick(None)

def master():
    names = [type_info(cls).wire_name for cls in (Task, Answer, Answer.Inner, Point, Local, Dynamic)]
    assert [lookup(name).cls for name in names] == [Task, Answer, Answer.Inner, Point, Local, Dynamic]
    module = names[0][:-len(".Task")]
    assert all(name.startswith(module + ".") for name in names), names
    assert source(Task)[0] == module  # also asked from elsewhere
    with IpcPeer(timeout=20) as peer:
        session = peer.create_command_session([sys.executable, *WORKER])
        reply = session.request(Task(5, Point(7)), expect=Answer).wait()
        print("answer", reply.n, reply.at.x, "under", module, flush=True)

if "worker" in sys.argv:
    worker()
elif "quiet" not in sys.argv:
    master()
"""


def run(arguments: List[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=str(folder),
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([ROOT, str(folder)])),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=50,
    )
    return done.stdout.decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    script = f"WORKER = [{str(tmp_path / 'script.py')!r}, 'worker']" + PROGRAM
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    module = "WORKER = ['-m', 'pkg.mod', 'worker']" + PROGRAM
    (tmp_path / "pkg" / "mod.py").write_text(module)
    (tmp_path / "pkg" / "__main__.py").write_text(module.replace("pkg.mod", "pkg"))
    return tmp_path


def tool(name: str) -> Any:
    """A mark that skips where a tool that is no part of Python is not installed."""
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


SLOW = pytest.mark.slow
RUNPY = "import runpy; runpy."
EXEC = "exec(open('script.py').read()"
PDB = ["-m", "pdb", "-c", "continue", "-c", "quit"]
TRACE = ["-m", "trace", "--listfuncs"]

SCRIPTS: List[Any] = [
    pytest.param(["script.py"], id="script"),
    pytest.param(["-m", "cProfile", "script.py"], id="cProfile", marks=SLOW),
    pytest.param(["-m", "profile", "script.py"], id="profile", marks=SLOW),
    pytest.param([*TRACE, "script.py"], id="trace", marks=SLOW),
    pytest.param([*PDB, "script.py"], id="pdb", marks=SLOW),
    pytest.param(["-m", "coverage", "run", "script.py"], id="coverage", marks=[SLOW, tool("coverage")]),
    pytest.param(["-m", "IPython", "script.py"], id="IPython", marks=[SLOW, tool("IPython")]),
    pytest.param(["-c", RUNPY + "run_path('script.py', run_name='__main__')"], id="run_path-as-main", marks=SLOW),
    pytest.param(["-c", RUNPY + "run_path('script.py')"], id="run_path", marks=SLOW),
    pytest.param(["-c", f"{EXEC})"], id="exec", marks=SLOW),
    pytest.param(["-c", f"import types; {EXEC}, vars(types.ModuleType('__main__')))"], id="notebook", marks=SLOW),
]  # fmt: skip


@pytest.mark.parametrize("arguments", SCRIPTS)
def test_a_script_and_its_worker(folder: Path, arguments: List[str]) -> None:
    assert "answer 25 7 under __main__\n" in run(arguments, folder)


MODULES: List[Any] = [
    pytest.param(["-m", "pkg.mod"], id="m"),
    pytest.param(["-m", "cProfile", "-m", "pkg.mod"], id="cProfile", marks=SLOW),
    pytest.param(["-m", "profile", "-m", "pkg.mod"], id="profile", marks=SLOW),
    pytest.param([*TRACE, "--module", "pkg.mod"], id="trace", marks=SLOW),
    pytest.param([*PDB, "-m", "pkg.mod"], id="pdb", marks=SLOW),
    pytest.param(["-m", "coverage", "run", "-m", "pkg.mod"], id="coverage", marks=[SLOW, tool("coverage")]),
    pytest.param(["-c", "import pkg.mod"], id="import", marks=SLOW),
    pytest.param(["-c", RUNPY + "run_module('pkg.mod')"], id="run_module", marks=SLOW),
    pytest.param(["-c", RUNPY + "run_module('pkg.mod', run_name='__main__')"], id="run_module-as-main", marks=SLOW),
    pytest.param(["-c", RUNPY + "run_module('pkg.mod', {}, '__main__', True)"], id="run_module-alter_sys", marks=SLOW),
    pytest.param(["-c", RUNPY + "run_module('pkg.mod', run_name='other')"], id="run_module-other-name", marks=SLOW),
]  # fmt: skip


@pytest.mark.parametrize("arguments", MODULES)
def test_a_module_and_its_worker(folder: Path, arguments: List[str]) -> None:
    assert "answer 25 7 under pkg.mod\n" in run(arguments, folder)


@SLOW
def test_a_package(folder: Path) -> None:
    assert "answer 25 7 under pkg.__main__\n" in run(["-m", "pkg"], folder)
    assert "answer 25 7 under pkg.__main__\n" in run(["-c", RUNPY + "run_module('pkg', run_name='__main__')"], folder)


@SLOW
@pytest.mark.parametrize("start", [["-m", "cProfile"], TRACE, ["-c", RUNPY + "run_path('script.py')"]], ids=["1", "2", "3"])
def test_a_worker_that_is_run_by_a_tool(folder: Path, start: List[str]) -> None:
    text = (folder / "script.py").read_text()
    file = [] if start[0] == "-c" else [str(folder / "script.py")]
    (folder / "script.py").write_text(f"WORKER = {[*start, *file, 'worker']}\n" + text.partition("\n")[2])
    assert "answer 25 7 under __main__\n" in run(["script.py"], folder)


@pytest.mark.slow
def test_a_zipapp_and_a_folder(folder: Path) -> None:
    source = folder / "app"
    source.mkdir()
    target = folder / "app.pyz"
    for place in (target, source):
        (source / "__main__.py").write_text(f"WORKER = [{str(place)!r}, 'worker']" + PROGRAM)
        if place is target:
            zipapp.create_archive(source, target)
        assert "answer 25 7 under __main__\n" in run([str(place)], folder)
        path = f"import runpy, sys; runpy.run_path({str(place)!r}, run_name='__main__')"
        assert "answer 25 7 under __main__\n" in run(["-c", path], folder)


def test_the_code_of_a_command_line(folder: Path) -> None:
    code = "import sys\nWORKER = ['-c', CODE, 'worker']" + PROGRAM
    code = "CODE = " + repr("CODE = ''\n" + code) + "\n" + code
    assert "answer 25 7 under __main__\n" in run(["-c", code], folder)


NOTEBOOK = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
text = open('script.py').read()
shell.run_cell(text.partition('def worker')[0] + 'import sys')
shell.run_cell('def worker' + text.partition('def worker')[2])
"""


@SLOW
@tool("IPython")
def test_cells_of_a_notebook(folder: Path) -> None:
    (folder / "notebook.py").write_text(NOTEBOOK)
    assert "answer 25 7 under __main__\n" in run(["-m", "notebook"], folder)
    assert "answer 25 7 under __main__\n" in run(["-c", NOTEBOOK], folder)


SPAWN = """
import multiprocessing

def child(connection):
    connection.send([type_info(cls).wire_name for cls in (Task, Answer, Point)])

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    print("names", *ours.recv(), flush=True)
    process.join()
"""


@SLOW
def test_a_child_of_multiprocessing(folder: Path) -> None:
    text = PROGRAM.replace('elif "quiet" not in sys.argv', "elif False")
    (folder / "spawning.py").write_text(text + SPAWN)
    (folder / "pkg" / "spawning.py").write_text(text + SPAWN)
    assert "names __main__.Task __main__.Answer __main__.Point\n" in run(["spawning.py"], folder)
    assert "names pkg.spawning.Task pkg.spawning.Answer pkg.spawning.Point\n" in run(["-m", "pkg.spawning"], folder)


TWICE = """
from pkg.mod import Task as Imported, Point as ImportedPoint
from stream_ipc.messages import Message
from stream_ipc.serializers.json import JsonMessageSerializer
from stream_ipc.serializers.php import PhpMessageSerializer
from stream_ipc.serializers.pickle import PickleMessageSerializer

assert Imported is not Task and type_info(Imported).wire_name == type_info(Task).wire_name == "pkg.mod.Task"
for serializer in (PickleMessageSerializer(), JsonMessageSerializer(), PhpMessageSerializer()):
    for message in (Task(1, Point(2)), Imported(1, ImportedPoint(2)), Task(1, ImportedPoint(2)), Imported(1, Point(2))):
        assert serializer.deserialize(serializer.serialize(message)) == Task(1, Point(2)), message
print("both travel")
"""


@pytest.mark.matrix
@pytest.mark.parametrize("early", [True, False], ids=["imported-first", "run-first"])
def test_a_module_that_is_run_and_imported(folder: Path, early: bool) -> None:
    # What comes off the wire is of the class of the module that is run, whichever was there first.
    if early:
        (folder / "pkg" / "__init__.py").write_text("import sys\nsys.argv.append('quiet')\nfrom .mod import Task\n")
    guard = "\nif __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in TWICE.splitlines())
    (folder / "pkg" / "mod.py").write_text("WORKER = []" + PROGRAM + guard)
    assert "both travel\n" in run(["-m", "pkg.mod", "quiet"], folder)
    assert "both travel\n" in run(["-m", "cProfile", "-m", "pkg.mod", "quiet"], folder)


def test_a_script_with_a_wire_name_that_its_own_module_imports(folder: Path) -> None:
    text = "from stream_ipc.messages import Message\nfrom stream_ipc.registry import lookup\n"
    text += "class Task(Message, wire_name='Task'): pass\nmine = Task\nif __name__ == '__main__':\n    import helper\n"
    (folder / "named.py").write_text(text + "    print(lookup('Task').cls is mine, helper.Task is mine)\n")
    (folder / "helper.py").write_text("from named import Task\n")
    assert "True False\n" in run([str(folder / "named.py")], folder)


@SLOW
def test_two_files_with_one_class_name_are_two_classes(folder: Path) -> None:
    (folder / "other.py").write_text(
        "from stream_ipc.messages import Message\nclass Task(Message, wire_name='Task'): pass\n"
    )
    (folder / "main.py").write_text("import other\n" + (folder / "other.py").read_text())
    assert "ValueError: wire name 'Task' of __main__.Task is taken by other.Task" in run(["main.py"], folder)
