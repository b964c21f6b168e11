"""The examples, each run as its reader would run it: in a checkout, with nothing installed."""

import fcntl
import hashlib
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

EXPECTED = {
    "master": """\
Slave 0 replied with: TASK #0
Slave 1 replied with: TASK #1
Slave 2 replied with: TASK #2
Exit statuses: [0, 0, 0]
""",
    "broker": """\
The broker listens
Client 1: 50 replies, 669 primes are below 5000
Client 51: 50 replies, 1229 primes are below 10000
The broker has ended
Exit status of the broker: 0
""",
    "progress": """\
1 of 5 words done
2 of 5 words done
3 of 5 words done
4 of 5 words done
5 of 5 words done
Result: makeee allll theseee wordsss longerrr
""",
    "customized": """\
Request parent-1: first job done
Request parent-2: second job done
""",
    "loop_asyncio": """\
BREAD
BUTTER
slow: RequestTimeoutError after 0.2 s
JAM
toasted bread
toasted rolls
""",
    "sockets": """\
CLIENT 0
CLIENT 1
CLIENT 2
""",
    "blocking_stream": """\
Through the compressed connection: SQUEEZED
""",
    "transport": """\
stressed backwards is desserts
drawer backwards is reward
The worker has ended
""",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what an example needs, and nothing else."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("stream_ipc", "examples"):
        shutil.copytree(str(ROOT / name), str(folder / name), ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def environment(**variables):
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONWARNINGS"] = "error"  # also in the processes that the example starts
    env.update(variables)
    return env


def needs(package):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def run(checkout, module, *arguments, python=sys.executable, site=False, **variables):
    # -S: what is installed cannot be imported.
    return subprocess.run(
        [python, *([] if site else ["-S"]), "-m", module, *arguments],
        cwd=str(checkout),
        env=environment(**variables),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=50,
    )


def output(checkout, module):
    done = run(checkout, module)
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


@pytest.mark.matrix
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_output(checkout, name):
    assert output(checkout, f"examples.{name}") == EXPECTED[name]


@pytest.mark.slow
def test_pool(checkout):
    lines = output(checkout, "examples.pool").splitlines()
    hashed = dict(reversed(line.split()) for line in lines[:-1])
    for name in ("pool.py", "broker.py", "php/README.md"):
        path = checkout / "examples" / name
        if path.exists():
            assert hashed[name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(hashed) >= 20
    assert re.fullmatch(r"\d+ files were hashed by 4 workers, one of which was killed; \d+ reports of progress", lines[-1])


def test_workers(checkout):
    lines = output(checkout, "examples.workers").splitlines()
    # Which is ready first is not for us to say.
    assert sorted(lines) == [
        "1229 primes are below 10000",
        "2262 primes are below 20000",
        "3245 primes are below 30000",
        "4203 primes are below 40000",
        "5133 primes are below 50000",
        "6057 primes are below 60000",
    ]


@pytest.mark.slow
def test_own_loop(checkout):
    *progress, result, frames = output(checkout, "examples.own_loop").splitlines()
    assert progress == [f"The worker has done {step} of 5" for step in range(1, 6)]
    assert result == "The worker's result: something long is done"
    match = re.fullmatch(r"The program's own work was done (\d+) times meanwhile", frames)
    assert match is not None
    # At most one in each period; how many it really were depends on how busy the machine is.
    assert int(match.group(1)) >= 1


@pytest.mark.slow
def test_loop_select(checkout):
    lines = output(checkout, "examples.loop_select").splitlines()
    # If the machine is busy, the deadline may pass before the first reply is there.
    assert sorted(lines) == ["BREAD", "BUTTER", "JAM", "RequestTimeoutError after 0.2 s"]


def test_loop_tkinter_without_a_display(checkout):
    done = run(checkout, "examples.loop_tkinter", DISPLAY="")
    assert (done.stderr, done.returncode) == ("", 0) and done.stdout.startswith("No window can be shown: ")


@pytest.fixture
def display():
    """The name of a display that nobody sees."""
    if shutil.which("Xvfb") is None:
        pytest.skip("Xvfb is not installed")
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-nolisten", "tcp", "-screen", "0", "640x480x24"]
    with subprocess.Popen(command, pass_fds=[write], stderr=subprocess.PIPE, text=True) as server:
        os.close(write)
        with open(read) as answer:
            number = answer.readline().strip()  # comes when it is ready
        try:
            if not number:
                pytest.skip(f"Xvfb does not start: {server.stderr.read()}")
            yield f":{number}"
        finally:
            server.terminate()


@pytest.mark.slow
def test_loop_tkinter(checkout, display):
    for python in (sys.executable, "/usr/bin/python3"):
        done = subprocess.run([python, "-c", "import tkinter"], stderr=subprocess.DEVNULL)
        if done.returncode == 0:
            break
    else:
        pytest.skip("no interpreter here has tkinter")
    done = run(checkout, "examples.loop_tkinter", python=python, DISPLAY=display)
    assert (done.stderr, done.returncode) == ("", 0)
    *progress, result = done.stdout.splitlines()
    assert progress == [f"The worker has done {step} of 5" for step in range(1, 6)]
    assert result == "The worker's result: something long is done"


def test_msgspec_serializer_without_msgspec(checkout):
    expected = "This example needs msgspec, which is not installed.\n"
    assert output(checkout, "examples.msgspec_serializer") == expected


def test_msgspec_serializer(checkout):
    needs("msgspec")
    done = run(checkout, "examples.msgspec_serializer", site=True)
    assert (done.stderr, done.returncode) == ("", 0)
    sent, reply, refused = done.stdout.splitlines()
    assert sent == "94 bytes: TurnRequest(picture=Picture(width=3, pixels=b'abcdef'), turn=<Turn.LEFT: 'left'>)"
    assert reply == "Reply: TurnResponse(picture=Picture(width=2, pixels=b'cfbead'))"
    assert refused.startswith("Refused: the request could not be decoded: ")
    assert refused.endswith(": Picture cannot be built: 6 pixels do not fill lines of 4")


BELOW = ["below  50,000", "below 100,000", "below 150,000"]
PRIMES = ["5133 primes are below 50000", "9592 primes are below 100000", "13848 primes are below 150000"]


@pytest.mark.slow
def test_progress_bars_without_a_terminal(checkout):
    lines = output(checkout, "examples.progress_bars").splitlines()
    assert lines[-3:] == PRIMES
    for name in BELOW:
        assert [line for line in lines if line.startswith(name)] == [f"{name}: {n} %" for n in (25, 50, 75, 100)]
    assert len(lines) == 15


BARS = {
    "rich": [rf"{name} \S+ 100% 0:00:00" for name in BELOW],
    "tqdm": [rf"{name} 100 % \S{{40}}" for name in BELOW],
    "line": ["   ".join(f"{name} 100 %" for name in BELOW)],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(BARS))
def test_progress_bars_in_a_terminal(checkout, kind):
    if kind != "line":
        needs(kind)
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    env = environment(TERM="xterm", PYTHONIOENCODING="utf-8")
    for name in ("COLUMNS", "LINES"):
        env.pop(name, None)
    command = [sys.executable, *(["-S"] if kind == "line" else []), "-m", "examples.progress_bars"]
    arguments = [] if kind == "line" else [kind]  # where nothing is installed, there is no need to ask for it
    data = []
    with subprocess.Popen([*command, *arguments], cwd=str(checkout), env=env, stdin=far, stdout=far, stderr=far) as process:
        os.close(far)
        try:
            while not data or data[-1]:
                data.append(os.read(near, 65536))
        except OSError:  # on Linux, the end of a terminal is an error
            pass
        finally:
            os.close(near)
    lines = screen(b"".join(data).decode())
    assert lines[-3:] == PRIMES and process.returncode == 0
    assert len(lines) == len(BARS[kind]) + 3, lines
    for line, expected in zip(lines, BARS[kind]):
        assert re.fullmatch(expected, line)


def screen(text):
    """The lines that a terminal shows in the end. It knows what is needed here, and its lines do not break."""
    lines, row, column = [""], 0, 0
    for control, char in re.findall(r"\x1b\[([?0-9;]*[A-Za-z])|([^\x1b])", text):
        if control:
            kind, count = control[-1], control[:-1]
            if kind == "A":
                row -= int(count or 1)
                assert row >= 0, "above the first line"
            elif kind == "K":
                lines[row] = "" if count == "2" else lines[row][:column]
            else:
                assert kind in "mhl", control  # colours, and whether the cursor is to be seen
        elif char == "\r":
            column = 0
        elif char == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row].ljust(column)[:column] + char + lines[row][column + 1 :]
            column += 1
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is left hidden"
    assert lines.pop() == "", "the prompt would stand behind something"
    return [line.rstrip() for line in lines]


SLAVES = [
    "slave",
    "progress worker",
    "own_loop worker",
    "customized worker",
    "workers worker",
    "progress_bars worker",
    "loop_select worker",
]


@pytest.mark.matrix
@pytest.mark.parametrize("command", SLAVES)
def test_slave_without_a_master_ends(checkout, command):
    name, *arguments = command.split()
    done = run(checkout, f"examples.{name}", *arguments)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_no_example_is_forgotten():
    modules = {path.stem for path in (ROOT / "examples").glob("*.py")}
    # In test_benchmark.py and test_php.py.
    tested_elsewhere = {"php_master", "php_slave", *(name for name in modules if name.startswith("benchmark"))}
    tested_here = {*EXPECTED, "workers", "pool", "own_loop", "loop_select", "loop_tkinter"}
    tested_here |= {"msgspec_serializer", "progress_bars"}
    assert modules - {"__init__", "messages", "slave"} - tested_elsewhere - {"remote"} == tested_here
