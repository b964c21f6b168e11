"""What help() shows: it fits a terminal of 80 columns, has nothing private, and its examples run."""

import inspect
import os
import pydoc
import re
import signal
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional

import pytest

import stream_ipc
from stream_ipc import IpcPeer, Session, WorkerPool

ROOT = Path(__file__).resolve().parent.parent
FACADES = ["IpcPeer", "Session", "ResponsePromise", "DeferredReply", "WorkerPool", "Listener"]


def members(cls: type) -> Iterator[str]:
    for name in dir(cls):
        if not name.startswith("_") and any(name in vars(base) for base in cls.__mro__ if is_ours(base)):
            yield name


def is_ours(value: Any) -> bool:
    return value.__module__.split(".")[0] == "stream_ipc"


def docstrings() -> Dict[str, str]:
    """The texts of all public names, by name."""
    texts = {}
    for name in stream_ipc.__all__:
        value = getattr(stream_ipc, name)
        texts[name] = inspect.getdoc(value) or ""
        if inspect.isclass(value):
            for member in members(value):
                attribute = inspect.getattr_static(value, member)
                if callable(attribute) or isinstance(attribute, property):
                    texts[f"{name}.{member}"] = inspect.getdoc(attribute) or ""
    return texts


TEXTS = docstrings()


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_it_fits_a_terminal(name: str) -> None:
    # help() draws a line down its left side, and indents what belongs to a class.
    width = 80 - 4 * (1 + name.count("."))
    lines = TEXTS[name].splitlines()
    assert lines
    assert [line for line in lines if len(line) > width] == []


@pytest.mark.parametrize("name", FACADES)
def test_it_shows_nothing_private(name: str) -> None:
    text = pydoc.plain(pydoc.render_doc(getattr(stream_ipc, name)))
    assert re.findall(r"(?<!\w)_[a-z]\w*", text) == []


EXAMPLES = {
    name: textwrap.dedent(re.split(r"^Example:\n", text, flags=re.MULTILINE)[1])
    for name, text in TEXTS.items()
    if "\nExample:\n" in text
}

# What they print.
PRINTED = {
    "DeferredReply": "A\n",
    "IpcPeer.create_session_pair": "",
    "IpcPeer.fileno": "",
    "IpcPeer.listen": "A\n",
    "IpcPeer.tick_for": "",
    "IpcPeer.wakeup": "",
    "ResponsePromise.add_done_callback": "TaskResponse(result='A')\n",
    "Session.batch": "",
    "Session.close": "",
    "Session.on_message": "1 of 2\n",
    "Session.on_request": "A\n",
    "Session.receive": "",
    "Session.request": "A\n",
    "WorkerPool": "A\nB\n",
    "WorkerPool.map": "a A\nb B\n",
    "as_completed": "one TaskResponse(result='A')\ntwo Error in dispatch\nValueError: no",
    "gather": "one TaskResponse(result='A')\ntwo TaskResponse(result='A')\n",
}


class Stopping(List[bool]):
    """False until a client of the listener has its reply."""

    def __init__(self, peer: IpcPeer, path: str, task: Any) -> None:
        self.peer, self.path, self.task = peer, path, task
        self.promise: Any = None

    def __bool__(self) -> bool:
        if self.promise is None:
            self.promise = self.peer.connect(self.path).request(self.task)
        return bool(self.promise.done)


class Named:
    """A session whose name is the same each time."""

    def __init__(self, name: str, session: Session) -> None:
        self.name, self.request = name, session.request


def test_every_example_is_run_and_each_that_should_be_there_is() -> None:
    assert set(EXAMPLES) == set(PRINTED)


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    from examples.messages import Progress, TaskRequest, TaskResponse

    def work(task: TaskRequest) -> TaskResponse:
        if task.job == "x":
            raise ValueError("no")
        return TaskResponse(task.job.upper())

    names: Dict[str, Any] = {each: getattr(stream_ipc, each) for each in stream_ipc.__all__}
    task = TaskRequest("a")
    names.update(
        __name__="reference", sys=sys, signal=signal, work=work, Progress=Progress, TaskRequest=TaskRequest,
        TaskResponse=TaskResponse, task=task, tasks=[task, TaskRequest("b")], words=["a", "b"], stopping=[],
        path=str(tmp_path / "socket"), draw_frame=int,
    )  # fmt: skip
    (tmp_path / "worker.py").write_text((ROOT / "examples" / "slave.py").read_text(encoding="utf-8"), encoding="utf-8")
    before = signal.getsignal(signal.SIGTERM)
    with IpcPeer(timeout=30) as peer, WorkerPool(peer, [sys.executable, "worker.py"], size=1) as pool:
        session, worker = peer.create_session_pair()
        names.update(peer=peer, session=session, pool=pool, sessions=[Named("one", session), Named("two", session)])
        if name not in ("DeferredReply", "Session.on_request"):
            worker.on_request(work)
        end = prepare(name, names, peer, session, worker)
        try:
            exec(compile(EXAMPLES[name], name, "exec", dont_inherit=True), names)
        finally:
            signal.signal(signal.SIGTERM, before)
        if end is not None:
            end()
    out = capsys.readouterr().out
    if name == "as_completed":
        assert out.startswith(PRINTED[name])
    else:
        assert out == PRINTED[name]


def prepare(name: str, names: Dict[str, Any], peer: IpcPeer, session: Session, worker: Session) -> Optional[Any]:
    """Set the stage for an example, and return what shows afterwards that it has done its work."""
    task, Progress = names["task"], names["Progress"]
    if name in ("IpcPeer.tick_for", "IpcPeer.fileno"):
        names["promise"] = session.request(task)
    if name == "IpcPeer.fileno":
        reading, writing = os.pipe()
        stdin = os.fdopen(reading)
        names.update(sys=SimpleNamespace(stdin=stdin), select=__import__("select"))
        return lambda: (stdin.close(), os.close(writing))
    if name == "IpcPeer.listen":
        names["stopping"] = stopping = Stopping(peer, names["path"], task)
        return lambda: print(stopping.promise.wait().result)
    if name == "IpcPeer.wakeup":
        worker.on_message(lambda message: os.kill(os.getpid(), signal.SIGTERM))
        session.notify(Progress(1, 2))
    if name == "DeferredReply":
        names["session"] = worker
        promise = session.request(task)
        promise.add_done_callback(lambda promise: session.close())
        return lambda: print(promise.wait().result)
    if name == "Session.on_request":
        names["session"] = worker
        return lambda: print(session.request(task).wait().result)
    if name == "Session.on_message":
        worker.notify(Progress(1, 2))
        return lambda: peer.tick(None)
    if name == "Session.receive":
        worker.notify(Progress(1, 2))
        return lambda: names["progress"] == Progress(1, 2) or pytest.fail("no progress")
    if name == "Session.close":
        return lambda: names["reply"] == names["TaskResponse"]("A") or pytest.fail("no reply")
    if name == "Session.batch":
        return lambda: [worker.receive(5) for _ in range(1000)]
    if name == "ResponsePromise.add_done_callback":
        return lambda: session.request(task).wait()
    if name == "as_completed":
        refused = SimpleNamespace(name="two", request=lambda _: session.request(type(task)("x")))
        names["sessions"] = [names["sessions"][0], refused]
    return None
