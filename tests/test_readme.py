"""README.rst and the guides: what they show is what is in examples/, or it is run here."""

import ast
import inspect
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

import stream_ipc
from stream_ipc import IpcPeer
from tests.test_examples import EXPECTED

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.rst", "examples/README.rst", "examples/php/README.rst", "tests/README.rst"]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README, GUIDE, PHP, CONTRIBUTING = (TEXTS[page] for page in PAGES)
LINES = README.splitlines()
EXAMPLES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").glob("*.py"))}


class Block:
    """An indented block, its page, and the last line (from 1) of it."""

    def __init__(self, page, kind, start, lines):
        self.page = page
        self.kind = kind
        self.last_line = start + len(lines)
        self.text = textwrap.dedent("\n".join(lines)).strip("\n") + "\n"

    def __repr__(self):
        return f"{self.page}:{self.last_line}:{self.text.splitlines()[0]}"


def find_blocks(page):
    lines = TEXTS[page].splitlines()
    index = 0
    while index < len(lines):
        line = lines[index]
        index += 1
        if line.lstrip().startswith(".. code-block:: "):
            kind = line.split()[-1]
        elif line.endswith("::"):
            kind = "text"
        else:
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 1)
        start = index
        while index < len(lines) and (not lines[index] or lines[index].startswith(indent)):
            index += 1
        body = lines[start:index]
        while not body[-1]:
            body.pop()
        yield Block(page, kind, start, body)


BLOCKS = [block for page in PAGES for block in find_blocks(page)]
PYTHON = [block for block in BLOCKS if block.kind == "python"]


def is_piece_of(block, text):
    """Whether the block's lines stand in the text one after the other, at some indentation."""
    wanted = block.text.splitlines()
    lines = text.splitlines()
    first = wanted[0].strip()
    for start in range(len(lines) - len(wanted) + 1):
        if lines[start].strip() != first:
            continue
        part = "\n".join(lines[start : start + len(wanted)])
        if textwrap.dedent(part).splitlines() == wanted:
            return True
    return False


SHOWN = [block for block in PYTHON if any(is_piece_of(block, text) for text in EXAMPLES.values())]
PROGRAMS = [block for block in PYTHON if "__main__" in block.text]
TESTS = [block for block in PYTHON if "def test_" in block.text]
SLAVES = [block for block in PYTHON if block not in SHOWN + PROGRAMS and "create_stdio_session()" in block.text]
CONVERTERS = [block for block in PYTHON if block.text.startswith("register_type(")]
# The four files of a PHP slave and its master.
WITH_PHP = [block for block in BLOCKS if block.page == "examples/php/README.rst" and block.kind in ("php", "python")][:4]
RUN = [block for block in PYTHON if block not in SHOWN + PROGRAMS + TESTS + SLAVES + CONVERTERS + WITH_PHP]

# What the blocks that are run here print: a word of the block, and the output.
PRINTED = {
    "broadcast(": r"2 of 2 were told\n",
    "receive(": r"nothing came\n",
    "wait(0.05)": r"not there yet: False\n",
    '"over a socket"': r"TaskResponse\(result='tekcos a revo'\)\n",
    "PidHrtime": "",
    "Resize": "",
    "Sample": re.escape(next(block.text for block in BLOCKS if block.text.startswith("Sample("))),
    "RemoteError": r"the worker could not do it: Error in dispatch\nValueError: no(?s:.*)",
    "SIGTERM": "",
    "pool.map": r"BREAD\nBUTTER\nJAM\n",
    "waiting.pop()": r"here it is\n",
}


def test_it_begins_with_one_sentence_and_two_commands():
    assert LINES[0] == "stream_ipc"
    assert LINES[3].endswith(".")
    assert BLOCKS[0].text.splitlines() == [
        "python3 -m examples.master",
        "python3 -m venv .venv && .venv/bin/pip install -q '.[test]' && .venv/bin/python -m pytest",
    ]
    assert LINES[4:6] == ["", "::"]


def test_it_is_short():
    assert len(LINES) <= 500
    assert len(README.split()) <= 3200


def test_its_first_program_is_early(tmp_path):
    assert PYTHON[0] in PROGRAMS and PYTHON[0].page == "README.rst"
    assert PYTHON[0].last_line < 45
    compile(PYTHON[0].text, "README.rst", "exec")


def test_master_and_slave_are_shown_in_full():
    shown = [block.text for block in SHOWN]
    assert EXAMPLES["master.py"] in shown and EXAMPLES["slave.py"] in shown


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_output_of_an_example(name):
    # That it prints this is tested where the examples are.
    blocks = [block for block in BLOCKS if block.page == "examples/README.rst" and block.kind == "text"]
    assert EXPECTED[name] in [block.text for block in blocks]


HELPERS = ("__init__.py", "messages.py", "slave.py")


def test_every_example_is_named():
    for name in EXAMPLES:
        if name not in HELPERS and not name.startswith("benchmark_"):
            options = " --quick" if name == "benchmark.py" else ""
            assert f"python3 -m examples.{name[:-3]}{options}\n" in README, name
            assert f"``examples.{name[:-3]}" in GUIDE, name


def test_blocks_that_show_examples():
    assert len(SHOWN) == 16


def test_blocks_of_php_show_what_runs():
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "examples" / "php").glob("*.php")]
    blocks = [block for block in BLOCKS if block.kind == "php"]
    assert [any(is_piece_of(block, text) for text in scripts) for block in blocks] == [False, False, False, True]
    # Those of whole programs are run; one needs the original library.
    if shutil.which("php") is None:
        pytest.skip("php is not installed")
    for block in blocks:
        text = block.text if block.text.startswith("<?php") else f"<?php\n{block.text}"
        done = subprocess.run(["php", "-l"], input=text, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stdout


def run_program(tmp_path, text):
    script = tmp_path / "program.py"
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=str(tmp_path),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


def program_with(word):
    (block,) = [block for block in PROGRAMS if word in block.text]
    return block.text


@pytest.mark.parametrize("word", ["from multiprocessing import", "for number in 3, 4:\n            print(session"])
def test_the_same_program_in_both(tmp_path, word):
    assert len(PROGRAMS) == 4
    assert run_program(tmp_path, program_with(word)) == "9\n16\n"


def test_a_pool_that_survives_crashes(tmp_path):
    lines = sorted(run_program(tmp_path, program_with("os.abort()")).splitlines())
    failed = lines.pop(3)
    assert lines == ["0 0", "1 1", "2 4", "4 16", "5 25"]
    assert failed.startswith("3 failed: 2 workers ended while they had this task; the last one: child process ")
    assert "SIGABRT" in failed


def test_a_broker_and_its_client(tmp_path):
    script = tmp_path / "squares.py"
    script.write_text(program_with("def broker("), encoding="utf-8")
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    path = tmp_path / "squares"
    with subprocess.Popen([*command, "broker", str(path)], env=environment) as broker:
        try:
            while not path.exists() and broker.poll() is None:
                os.sched_yield()
            client = [*command, "client", str(path)]
            done = subprocess.run(client, env=environment, capture_output=True, text=True, timeout=50)
            assert (done.stdout, done.stderr, done.returncode) == ("49\n", "", 0)
            broker.terminate()
            assert broker.wait(50) == 0
        finally:
            broker.kill()
    assert not path.exists()


# What stands in for the original library, whose place is vendor/.
AUTOLOAD = """<?php
namespace StreamIpc;
require '{wire}';
final class NativeIpcPeer
{{
    private \\Wire\\Session $session;
    public function createStdioSession(): self
    {{
        $this->session = new \\Wire\\Session(STDOUT, STDIN, 'php', ['App\\Message\\Task', 'App\\Message\\Result']);
        return $this;
    }}
    public function onRequest(callable $handler): void {{ $this->session->onRequest = $handler; }}
    public function tick(): void {{ $this->session->tick(); }}
}}
"""


def test_a_master_and_its_php_slave(tmp_path):
    if shutil.which("php") is None:
        pytest.skip("php is not installed")
    for name, block in zip(["messages.php", "slave.php", "messages.py", "master.py"], WITH_PHP):
        (tmp_path / name).write_text(block.text, encoding="utf-8")
    (tmp_path / "vendor").mkdir()
    wire = ROOT / "examples" / "php" / "wire.php"
    (tmp_path / "vendor" / "autoload.php").write_text(AUTOLOAD.format(wire=wire), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "master.py"],
        cwd=str(tmp_path),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("MADE IN PHP\n", "", 0)


IMPORTS = {
    "datetime": (
        "from datetime import datetime\nfrom decimal import Decimal\n"
        "from pathlib import PosixPath\nfrom uuid import UUID, uuid4\n"
    ),
    "numpy": "import numpy\nfrom pydantic import BaseModel\nclass Model(BaseModel):\n    x: int\n",
}
VALUES = {
    "datetime": "datetime.now(), Decimal('1.50'), uuid4(), PosixPath('x')",
    "numpy": "numpy.arange(3.0), Model(x=1)",
}


@pytest.mark.parametrize("word", sorted(IMPORTS))
def test_converters(tmp_path, word):
    assert len(CONVERTERS) == len(IMPORTS)
    (block,) = [block for block in CONVERTERS if word in block.text]
    if word == "numpy" and not (find_spec("numpy") and find_spec("pydantic")):
        ast.parse(block.text)
        pytest.skip("numpy or pydantic is not installed")
    holder = (
        "from dataclasses import dataclass\nfrom stream_ipc import *\n"
        "@dataclass\nclass Holder(Message):\n    value: object\n"
    )
    trip = (
        "for serializer in JsonMessageSerializer(), PhpMessageSerializer(), PickleMessageSerializer():\n"
        f"    for value in {VALUES[word]}:\n"
        "        back = serializer.deserialize(serializer.serialize(Holder(value))).value\n"
        "        assert type(back) is type(value) and repr(back) == repr(value), (serializer, back)\n"
    )
    run_program(tmp_path, holder + IMPORTS[word] + block.text + trip)


def test_the_slave_of_a_php_master(tmp_path, names):
    (block,) = SLAVES
    # Other names on the wire than those of other tests.
    classes = WITH_PHP[2].text.replace("Message\\\\", "Readme\\\\")
    script = tmp_path / "slave.py"
    script.write_text(block.text, encoding="utf-8")
    (tmp_path / "messages.py").write_text(classes, encoding="utf-8")
    ours = {"__name__": "readme"}
    exec(compile(classes, "classes", "exec", dont_inherit=True), ours)
    with IpcPeer(stream_ipc.PhpMessageSerializer(), timeout=20) as peer:
        session = peer.create_command_session([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)})
        reply = session.request(ours["Task"]("a"), expect=ours["Result"]).wait()
        assert reply == ours["Result"]("A")
    assert session.process.returncode == 0


def test_recipes_for_tests(names):
    assert len(TESTS) == 2
    for block in TESTS:
        before = set(names)
        exec(compile(block.text, "README.rst", "exec", dont_inherit=True), names)
        (test,) = [names[name] for name in names if name.startswith("test_") and name not in before]
        test()


def test_every_other_block_is_run():
    assert len(RUN) == len(PRINTED)


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the blocks take for granted: the library, the messages, a peer and a session whose other end answers."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    from examples.messages import Progress, TaskRequest, TaskResponse

    with IpcPeer() as peer:
        session, worker = peer.create_session_pair()

        @worker.on_request
        def work(request: TaskRequest) -> TaskResponse:
            if request.job == "x":
                raise ValueError("no")
            return TaskResponse(request.job.upper())

        values = {name: getattr(stream_ipc, name) for name in stream_ipc.__all__}
        values.update(__name__="readme", peer=peer, session=session, worker=worker)
        values.update(Progress=Progress, TaskRequest=TaskRequest, TaskResponse=TaskResponse, path=str(tmp_path / "socket"))
        values.update(work=work)
        exec("import signal, socket, sys\nfrom dataclasses import dataclass", values)
        before = signal.getsignal(signal.SIGTERM)
        yield values
        signal.signal(signal.SIGTERM, before)


@pytest.mark.matrix
@pytest.mark.parametrize("word", sorted(PRINTED))
def test_block(names, capsys, word):
    (block,) = [block for block in RUN if word in block.text]
    peer = names["peer"]
    if word == "SIGTERM":
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
    elif word == "wait(0.05)":
        names["session"] = peer.create_command_session([sys.executable, "-m", "examples.loop_select", "worker"])
    elif word == "waiting.pop()":
        names["worker"].off_request(names["work"])
    exec(compile(block.text, "README.rst", "exec", dont_inherit=True), names)
    assert re.fullmatch(PRINTED[word], capsys.readouterr().out)
    if names["peer"] is not peer:
        names["peer"].close()


def test_errors_are_complete():
    for name in stream_ipc.__all__:
        value = getattr(stream_ipc, name)
        if isinstance(value, type) and issubclass(value, stream_ipc.IpcError) and value is not stream_ipc.IpcError:
            row = next(line for line in LINES if line.startswith(f"``{name}``"))
            builtin = [base.__name__ for base in value.__bases__ if base.__module__ == "builtins"]
            assert re.findall(r"``(\w+)``", row)[1:2] == builtin or not builtin
    assert "``IpcError``" in README


def table_of_methods():
    """What README's table has for each class: {class: {name: parameters}}; under "" what is not a method."""
    start = LINES.index("Every method and function")
    rows = {}
    owner = ""
    for line in LINES[start : LINES.index("Patterns")]:
        if line.startswith("**"):
            owner = re.findall(r"[\w ]+", line)[0]
            rows[owner] = {}
        if line.startswith("``") and rows:
            for name, _, parameters in re.findall(r"``(\w+)(\((.*?)\))?``", line[:54]):
                names = [parameter.strip().split("=")[0] for parameter in parameters.split(",")]
                rows[owner][name] = [name for name in names if name not in ("", "*")]
    return rows


OWNERS = ["IpcPeer", "Session", "ResponsePromise", "DeferredReply", "WorkerPool", "Listener"]
FUNCTIONS = {"gather", "as_completed"}


@pytest.mark.parametrize("owner", OWNERS)
def test_table_of_methods(owner):
    rows = table_of_methods()[owner]
    cls = getattr(stream_ipc, owner)
    public = {name for name in dir(cls) if not name.startswith("_")}
    documented = set(rows) - FUNCTIONS
    assert public == documented
    for name, parameters in rows.items():
        function = getattr(stream_ipc if name in FUNCTIONS else cls, name, None)
        if parameters and function is not None:
            known = inspect.signature(function).parameters
            unknown = [parameter for parameter in parameters if parameter not in known]
            assert not unknown, (name, unknown)


def test_table_of_everything_else():
    rows = table_of_methods()
    names = {*rows["Messages and parts"], *OWNERS, *FUNCTIONS}
    errors = {name for name in stream_ipc.__all__ if name.endswith("Error")}
    assert set(stream_ipc.__all__) - errors == names


def test_methods_that_are_named_exist():
    owners = {"peer": "IpcPeer", "session": "Session", "promise": "ResponsePromise", "pool": "WorkerPool"}
    for text in TEXTS.values():
        for owner, name in re.findall(r"\b(peer|session|promise|pool)\.([a-z_]+)\(", text):
            cls = getattr(stream_ipc, owners[owner], None)
            assert callable(getattr(cls, name, None)), name
        for name in re.findall(r"``(create_\w+)\(", text):
            assert callable(getattr(IpcPeer, name)), name


def test_files_that_are_named_exist():
    for text in TEXTS.values():
        for name in re.findall(r"\b(?:examples|tests|stream_ipc)/[\w/]+\.(?:py|php|rst)\b", text):
            assert (ROOT / name).exists(), name


def anchors(text):
    """The names by which a forge links to the headings of a page."""
    titles = re.findall(r"^(\S.*)\n([=~-])\2+$", text, re.MULTILINE)
    return {re.sub(r"[^\w]+", "-", title.lower()).strip("-") for title, _ in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"<([^<>\s]+\.rst)(?:#([\w-]+))?>`_", TEXTS[page])
    for path, anchor in links:
        target = (ROOT / page).parent / path
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), (path, anchor)
    assert links


def test_python_blocks_are_python():
    for block in PYTHON:
        ast.parse(block.text)


# What begins a row, and values for it.
VALUES_OF_ROWS = {
    "None, bool": "None, True, 1.5, 'text'",
    "int": "5",
    "bytes": "b'text', b'\\xff', bytearray(b'\\xff')",
    "list": "[1, 'a']",
    "tuple": "(1, 2)",
    "dict": "{'a': 1}, {}",
    "set": "{1}, frozenset({1}), 1j",
    "``datetime`` with a fixed": "datetime(2026, 1, 2, 3, 4, 5, 6, timezone.utc)",
    "``datetime`` with a ``ZoneInfo``": "*zoned",
    "other values": "date(2026, 1, 2), datetime(2026, 1, 2), timedelta(1), Decimal('1.5'), UUID(int=1), Path('x')",
    "deque": "deque([1]), OrderedDict(a=1), defaultdict(int), Counter('a')",
    "messages": "LogMessage('text')",
}
ARRIVALS = f"""
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError
from stream_ipc import *

@dataclass
class Holder(Message):
    value: object

def arrival(serializer, value):
    try:
        back = serializer.deserialize(serializer.serialize(Holder(value))).value
    except SerializationError:
        return "no"
    return "same" if type(back) is type(value) and back == value else type(back).__name__

try:
    zoned = [datetime(2026, 1, 2, tzinfo=ZoneInfo("UTC"))]
except ZoneInfoNotFoundError:  # the system has no such data
    zoned = []
serializers = PickleMessageSerializer(), JsonMessageSerializer(), PhpMessageSerializer()
rows = [{", ".join(f"[{values}]" for values in VALUES_OF_ROWS.values())}]
print([[[arrival(serializer, value) for value in row] for serializer in serializers] for row in rows])
"""
LISTS = "int or str keys; none or 0..n: a list"
CONDITIONS = {"fixed offset", "64 bits", "if keys are str", LISTS}


def test_table_of_values(tmp_path):
    start = next(index for index, line in enumerate(LINES) if line.startswith("Value  "))
    rows = LINES[start + 2 : LINES.index(LINES[start + 1], start + 2)]
    # In a process of its own: other tests have classes with PHP's names.
    arrivals = ast.literal_eval(run_program(tmp_path, ARRIVALS))
    assert len(rows) == len(VALUES_OF_ROWS) == len(arrivals)
    for word, row, columns in zip(VALUES_OF_ROWS, rows, arrivals):
        assert row.startswith(word)
        for cell, column in zip(re.split(r"  +", row)[1:], columns):
            for how in column:
                if cell == "str if it is UTF-8, else bytes":
                    assert how in ("str", "bytes", "same"), (row, column)
                elif cell == LISTS:
                    assert column == ["same", "list"], (row, column)
                else:
                    assert how == cell.split(",")[0] or (how == "same" and cell in CONDITIONS), (row, column)


@pytest.mark.parametrize("page", PAGES)
def test_it_renders_without_a_warning(page):
    core = pytest.importorskip("docutils.core", reason="docutils is not installed")
    warnings = io.StringIO()
    core.publish_doctree(
        TEXTS[page],
        settings_overrides={
            "report_level": 1,
            "halt_level": 5,
            "warning_stream": warnings,
            "_disable_config": True,
            "syntax_highlight": "none",  # or it would want Pygments
        },
    )
    assert warnings.getvalue() == ""
