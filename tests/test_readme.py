"""README.rst: what it shows is what is in examples/, or it is run here."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import stream_ipc
from stream_ipc import IpcPeer

ROOT = Path(__file__).resolve().parent.parent
LINES = (ROOT / "README.rst").read_text(encoding="utf-8").splitlines()
EXAMPLES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").glob("*.py"))}


class Block:
    """An indented block and the line (from 1) of the text before it."""

    def __init__(self, kind, start, lines):
        self.kind = kind
        self.last_line = start + len(lines)
        self.text = textwrap.dedent("\n".join(lines)).strip("\n") + "\n"

    def __repr__(self):
        return f"{self.kind}:{self.text.splitlines()[0]}"


def find_blocks():
    index = 0
    while index < len(LINES):
        line = LINES[index]
        index += 1
        if line.startswith(".. code-block:: "):
            kind = line.split()[-1]
        elif line.endswith("::"):
            kind = "text"
        else:
            continue
        start = index
        while index < len(LINES) and (not LINES[index] or LINES[index].startswith(" ")):
            index += 1
        body = LINES[start:index]
        while not body[-1]:
            body.pop()
        yield Block(kind, start, body)


BLOCKS = list(find_blocks())
PYTHON = [block for block in BLOCKS if block.kind == "python"]


def is_piece_of(block, text):
    """Whether the block's lines stand in the text one after the other, at some indentation."""
    wanted = block.text.splitlines()
    lines = text.splitlines()
    for start in range(len(lines) - len(wanted) + 1):
        part = "\n".join(lines[start : start + len(wanted)])
        if textwrap.dedent(part).splitlines() == wanted:
            return True
    return False


SHOWN = [block for block in PYTHON if any(is_piece_of(block, text) for text in EXAMPLES.values())]
PROGRAMS = [block for block in PYTHON if "__main__" in block.text]
TESTS = [block for block in PYTHON if "def test_" in block.text]
SLAVES = [block for block in PYTHON if block not in SHOWN + PROGRAMS and "create_stdio_session()" in block.text]
RUN = [block for block in PYTHON if block not in SHOWN + PROGRAMS + TESTS + SLAVES]

# What the blocks that are run here print: a word of the block, and the output.
PRINTED = {
    "broadcast(": r"2 of 2 were told\n",
    "receive(": r"nothing came\n",
    "wait(0.05)": r"not there yet: False\n",
    "listen(": r"TaskResponse\(result='tekcos a revo'\)\n",
    "PidHrtime": "",
    "Resize": "",
    "Sample": re.escape(next(block.text for block in BLOCKS if block.text.startswith("Sample("))),
    "RemoteError": r"the slave could not do it: Error in dispatch\nValueError: no(?s:.*)",
}


def test_it_begins_with_one_sentence_and_two_commands():
    assert LINES[0] == "stream_ipc"
    assert LINES[3].endswith(".")
    assert BLOCKS[0].text.splitlines() == [
        "python3 -m examples.master",
        "python3 -m venv .venv && .venv/bin/pip install -q '.[test]' && .venv/bin/python -m pytest",
    ]
    assert LINES[4:6] == ["", "::"]


def test_master_and_slave_are_shown_in_full_and_early():
    for block, name in zip(PYTHON, ["master.py", "slave.py"]):
        assert block.text == EXAMPLES[name]
        assert block.last_line < 60


def test_output_of_the_master():
    done = subprocess.run(
        [sys.executable, "-m", "examples.master"],
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=50,
    )
    assert (done.stdout, done.returncode) == (BLOCKS[2].text, 0)


def test_every_example_is_named():
    text = "\n".join(LINES)
    for name in EXAMPLES:
        if name not in ("__init__.py", "benchmark_child.py", "benchmark_message.py", "messages.py", "slave.py"):
            options = " --quick" if name == "benchmark.py" else ""
            assert f"python3 -m examples.{name[:-3]}{options}\n" in text


def test_blocks_that_show_examples():
    assert len(SHOWN) == 17


def test_blocks_of_php_show_what_runs():
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "examples" / "php").glob("*.php")]
    messages, slave = [block for block in BLOCKS if block.kind == "php"]
    assert any(is_piece_of(messages, text) for text in scripts)
    # The other one needs the original library.
    if shutil.which("php") is None:
        pytest.skip("php is not installed")
    done = subprocess.run(["php", "-l"], input=f"<?php\n{slave.text}", capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout


def test_the_same_program_in_both(tmp_path):
    assert len(PROGRAMS) == 2
    for number, block in enumerate(PROGRAMS):
        script = tmp_path / f"program{number}.py"
        script.write_text(block.text, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert (done.stdout, done.stderr, done.returncode) == ("9\n16\n", "", 0)


def test_the_slave_of_a_php_master(tmp_path, names):
    (block,) = SLAVES
    classes = (
        "from dataclasses import dataclass\n"
        "from stream_ipc import IpcPeer, Message, PhpMessageSerializer\n"
        "@dataclass\n"
        "class TaskRequest(Message, wire_name='Readme\\\\TaskRequest'):\n    job: str\n"
        "@dataclass\n"
        "class TaskResponse(Message, wire_name='Readme\\\\TaskResponse'):\n    result: str\n"
    )
    script = tmp_path / "slave.py"
    script.write_text(classes + block.text, encoding="utf-8")
    ours = {"__name__": "readme"}
    exec(compile(classes, "classes", "exec", dont_inherit=True), ours)
    with IpcPeer(stream_ipc.PhpMessageSerializer(), timeout=20) as peer:
        session = peer.create_command_session([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)})
        reply = session.request(ours["TaskRequest"]("a"), expect=ours["TaskResponse"]).wait()
        assert reply == ours["TaskResponse"]("A")
    assert session.process.returncode == 0


def test_recipes_for_tests(names, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(TESTS) == 2
    exec("import sys", names)
    for block in TESTS:
        before = set(names)
        exec(compile(block.text, "README.rst", "exec", dont_inherit=True), names)
        (test,) = [names[name] for name in names if name.startswith("test_") and name not in before]
        test()


def test_every_other_block_is_run():
    assert len(RUN) == len(PRINTED)


@pytest.fixture
def names(monkeypatch):
    """What the blocks take for granted: the library, the messages, a peer and a session whose other end answers."""
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.messages import TaskRequest, TaskResponse

    with IpcPeer() as peer:
        session, slave = peer.create_session_pair()

        @slave.on_request
        def work(request: TaskRequest) -> TaskResponse:
            if request.job == "slow":
                peer.tick_for(0.1)
            if request.job == "x":
                raise ValueError("no")
            return TaskResponse(request.job.upper())

        values = {name: getattr(stream_ipc, name) for name in stream_ipc.__all__}
        values.update(__name__="readme", peer=peer, session=session, TaskRequest=TaskRequest, TaskResponse=TaskResponse)
        exec("import socket\nfrom dataclasses import dataclass", values)
        yield values


@pytest.mark.matrix
@pytest.mark.parametrize("word", sorted(PRINTED))
def test_block(names, capsys, word):
    (block,) = [block for block in RUN if word in block.text]
    peer = names["peer"]
    exec(compile(block.text, "README.rst", "exec", dont_inherit=True), names)
    assert re.fullmatch(PRINTED[word], capsys.readouterr().out)
    if names["peer"] is not peer:
        names["peer"].close()


def test_errors_are_complete():
    text = "\n".join(LINES)
    for name in stream_ipc.__all__:
        value = getattr(stream_ipc, name)
        if isinstance(value, type) and issubclass(value, stream_ipc.IpcError) and value is not stream_ipc.IpcError:
            row = next(line for line in LINES if line.startswith(f"``{name}``  "))
            builtin = [base.__name__ for base in value.__bases__ if base.__module__ == "builtins"]
            assert re.findall(r"``(\w+)``", row)[1:2] == builtin or not builtin
    assert "``IpcError``" in text


def test_methods_that_are_named_exist():
    text = "\n".join(LINES)
    for owner, name in re.findall(r"\b(peer|session|promise)\.([a-z_]+)\(", text):
        cls = {"peer": IpcPeer, "session": stream_ipc.Session, "promise": stream_ipc.ResponsePromise}[owner]
        assert callable(getattr(cls, name)), name
    for name in re.findall(r"``(create_\w+)\(", text):
        assert callable(getattr(IpcPeer, name)), name


def test_files_that_are_named_exist():
    for name in re.findall(r"\bexamples/[\w/]+\.(?:py|php)\b", "\n".join(LINES)):
        assert (ROOT / name).exists(), name


def test_python_blocks_are_python():
    for block in PYTHON:
        ast.parse(block.text)


def test_it_renders_without_a_warning():
    core = pytest.importorskip("docutils.core", reason="docutils is not installed")
    warnings = io.StringIO()
    core.publish_doctree(
        "\n".join(LINES) + "\n",
        settings_overrides={
            "report_level": 1,
            "halt_level": 5,
            "warning_stream": warnings,
            "_disable_config": True,
            "syntax_highlight": "none",  # or it would want Pygments
        },
    )
    assert warnings.getvalue() == ""
