from __future__ import annotations

import os
import runpy
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Dict, List

import pytest

import stream_ipc
from stream_ipc.errors import SerializationError
from stream_ipc.messages import ErrorMessage, LogMessage, Message, RequestEnvelope, ResponseEnvelope
from stream_ipc.registry import lookup, type_info
from stream_ipc.serializers.pickle import PickleMessageSerializer

ROOT = str(Path(stream_ipc.__file__).parent.parent)


def test_log_message() -> None:
    assert LogMessage("text") == LogMessage(message="text", level="info")
    assert (LogMessage.LEVEL_JUNK, LogMessage.LEVEL_STDERR) == ("junk", "stderr")
    assert [f.name for f in fields(LogMessage)] == ["message", "level"]
    assert repr(LogMessage("text", "x")) == "LogMessage(message='text', level='x')"


def test_envelopes() -> None:
    assert [f.name for f in fields(RequestEnvelope)] == ["id", "request"]
    assert [f.name for f in fields(ResponseEnvelope)] == ["id", "response"]


@pytest.mark.parametrize("cls", [LogMessage, ErrorMessage, RequestEnvelope, ResponseEnvelope])
def test_the_methods_of_a_message_are_those_that_dataclass_writes(cls: Any) -> None:
    with_defaults: Dict[str, Any] = {name: value for name, value in vars(cls).items() if name == "level"}
    body = {"__annotations__": {f.name: Any for f in fields(cls)}, "__qualname__": cls.__qualname__, **with_defaults}
    twin: Any = dataclass(type(cls.__name__, (), body))
    arguments = ["a text", LogMessage("b")][: len(fields(cls))]
    message, like = cls(*arguments), twin(*arguments)
    assert repr(message) == repr(like)
    assert message == cls(*arguments)
    assert message != cls("another", *arguments[1:])
    assert message.__eq__(like) is NotImplemented
    assert cls.__match_args__[: len(fields(cls))] == twin.__match_args__
    assert replace(message, **{fields(cls)[0].name: "new"}) == cls("new", *arguments[1:])
    with pytest.raises(TypeError, match="unhashable type"):
        hash(message)

    @dataclass
    class Derived(cls):  # type: ignore[misc]
        more: int = 3

    if cls is LogMessage or cls is ErrorMessage:
        derived = Derived("a text", more=4)
        assert derived == Derived("a text", more=4) != Derived("a text")
        assert repr(derived).endswith(", more=4)")


def test_an_envelope_that_contains_itself_can_be_shown() -> None:
    envelope = RequestEnvelope("1", LogMessage("a"))
    envelope.request = envelope
    assert repr(envelope) == "RequestEnvelope(id='1', request=...)"


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as exc:
        return exc


def test_error_message_of_text_alone() -> None:
    for text in ("text", "", "  two\nlines  "):
        error = ErrorMessage(text)
        assert error.message == str(error) == text
    assert ErrorMessage("a") == ErrorMessage("a", None)
    assert repr(ErrorMessage("a")) == "ErrorMessage(message='a')"


def test_error_message_with_an_exception() -> None:
    error = ErrorMessage("Error in dispatch", raised(ValueError("why")))
    lines = str(error).split("\n")
    assert lines[:3] == ["Error in dispatch", "ValueError: why", "Traceback (most recent call last):"]
    assert lines[-1] == "ValueError: why"
    assert "in raised" in str(error)
    assert "raise error" in str(error)
    assert not str(error).endswith("\n")
    assert not hasattr(error, "exception") or error.exception is None  # only its text is kept


def test_error_message_of_an_exception_that_was_not_raised() -> None:
    # It has no traceback, so nothing is said twice.
    assert str(ErrorMessage("text", KeyError("k"))) == "text\nKeyError: 'k'"
    assert str(ErrorMessage("", ValueError())) == "\nValueError"
    assert str(ErrorMessage("text", SyntaxError("bad", ("f.py", 1, 2, "x = = 1")))).count("SyntaxError: bad") == 1


def test_error_message_of_what_is_no_exception() -> None:
    with pytest.raises(TypeError, match="exception of an ErrorMessage must be an exception, not str"):
        ErrorMessage("text", "why")  # type: ignore[arg-type]


def test_error_message_of_odd_exceptions() -> None:
    class NoText(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert "NoText" in str(ErrorMessage("text", raised(NoText())))
    assert "SystemExit: 3" in str(ErrorMessage("text", SystemExit(3)))
    text = str(ErrorMessage("text", raised(SyntaxError("bad", ("f.py", 1, 2, "x = = 1")))))
    assert "SyntaxError: bad" in text.split("\nTraceback")[0]
    outer = ValueError("outer")
    outer.__cause__ = KeyError("inner")
    assert "KeyError: 'inner'" in str(ErrorMessage("text", raised(outer)))
    loop = ValueError("loop")
    loop.__context__ = loop
    assert "ValueError: loop" in str(ErrorMessage("text", loop))

    def deep() -> None:
        deep()

    try:
        deep()
    except RecursionError as exc:
        assert len(str(ErrorMessage("text", exc))) < 20_000


@pytest.mark.parametrize("text", [None, 5, b"text", ["text"], ValueError("why"), 10**5000], ids=lambda t: type(t).__name__)
def test_error_message_takes_text_only(text: Any) -> None:
    # Also off the wire: str() of it must not fail where a reply is turned into an exception.
    with pytest.raises(TypeError, match=f"message of an ErrorMessage must be a str, not {type(text).__name__}"):
        ErrorMessage(text)
    serializer = PickleMessageSerializer()
    error = ErrorMessage("text")
    error.message = text
    if not isinstance(text, ValueError):
        with pytest.raises(SerializationError, match="message of an ErrorMessage must be a str"):
            serializer.deserialize(serializer.serialize(error))


def test_an_error_message_travels_as_its_text() -> None:
    serializer = PickleMessageSerializer()
    error = ErrorMessage("text", raised(ValueError("why")))
    back = serializer.deserialize(serializer.serialize(error))
    assert type(back) is ErrorMessage
    assert str(back) == str(error)


def test_message_has_no_state_of_its_own() -> None:
    assert Message.__slots__ == ()

    class Slots(Message):
        __slots__ = ("a",)

    assert not hasattr(Slots(), "__dict__")


# --- names in programs ----------------------------------------------------------------------------------------

SCRIPT = """
from dataclasses import dataclass
from stream_ipc.messages import Message
from stream_ipc.registry import type_info, lookup

@dataclass
class Task(Message):
    job: str

@dataclass
class Given(Message, wire_name="App.Given"):
    job: str

if __name__ in ("__main__", "__mp_main__"):
    print(type_info(Task).wire_name, type_info(Given).wire_name, lookup(type_info(Task).wire_name).cls is Task)
"""


def run(args: List[str], directory: Path) -> str:
    env = dict(os.environ, PYTHONPATH=ROOT)
    result = subprocess.run(
        [sys.executable, *args], cwd=str(directory), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60
    )
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode().strip()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    package = tmp_path / "pkg"
    (package / "sub").mkdir(parents=True)
    for folder in (package, package / "sub"):
        (folder / "__init__.py").write_text("")
        (folder / "__main__.py").write_text(SCRIPT)
        (folder / "mod.py").write_text(SCRIPT)
    (tmp_path / "top.py").write_text(SCRIPT)
    return tmp_path


@pytest.mark.slow
def test_names_in_a_module_that_is_run(program: Path) -> None:
    assert run(["-m", "pkg.mod"], program) == "pkg.mod.Task App.Given True"
    assert run(["-m", "pkg.sub.mod"], program) == "pkg.sub.mod.Task App.Given True"
    assert run(["-m", "pkg"], program) == "pkg.__main__.Task App.Given True"
    assert run(["-m", "top"], program) == "top.Task App.Given True"
    same = "import pkg.mod; from stream_ipc.registry import type_info; print(type_info(pkg.mod.Task).wire_name)"
    assert run(["-c", same], program) == "pkg.mod.Task"


def test_names_in_a_plain_script(program: Path) -> None:
    assert run(["top.py"], program) == "__main__.Task App.Given True"
    assert run(["-c", SCRIPT], program) == "__main__.Task App.Given True"


def test_names_in_a_child_of_multiprocessing(program: Path) -> None:
    # Which runs the script's file, or the module, under another name.
    path = "import runpy; runpy.run_path('top.py', run_name='__mp_main__')"
    assert run(["-c", path], program) == "__main__.Task App.Given True"
    module = "import runpy; runpy.run_module('pkg.mod', run_name='__mp_main__', alter_sys=True)"
    assert run(["-c", module], program) == "pkg.mod.Task App.Given True"


def test_a_class_of_a_script_is_unknown_elsewhere_and_the_error_says_why(program: Path) -> None:
    script = program / "send.py"
    script.write_text(
        SCRIPT + "\nfrom stream_ipc.serializers.pickle import PickleMessageSerializer"
        "\nprint(PickleMessageSerializer().serialize(Task('x')).hex())\n"
    )
    payload = bytes.fromhex(run(["send.py"], program).split()[-1])
    with pytest.raises(SerializationError, match="Unknown class: __main__.Task .*script.*both sides import.*wire_name"):
        PickleMessageSerializer().deserialize(payload)


def test_a_class_that_this_program_has_in_its_script_is_unknown_and_the_error_says_why(program: Path) -> None:
    receive = SCRIPT + "\nclass Outer:\n    class Inner(Message): ...\nimport sys\nfor name in sys.argv[1:]:\n    try:"
    receive += "\n        lookup(name)\n    except Exception as exc:\n        print(exc)\n"
    (program / "receive.py").write_text(receive)
    names = ["app.Task", "a.b.Outer.Inner", "app.MyTask", "x.Given"]
    _, task, inner, part, given = run(["receive.py", *names], program).split("\n")
    advice = "move it to a module that both sides import, or give it a wire_name"
    for name, own, text in (("app.Task", "Task", task), ("a.b.Outer.Inner", "Outer.Inner", inner)):
        why = f"it is __main__.{own} here, of the script that this program was started with"
        assert text == f"Unknown class: {name} ({why}; {advice})"
    for text in (part, given):
        assert "import the module that defines it on this side too" in text


def test_a_message_of_a_module_that_is_run_is_understood_where_it_is_imported(program: Path) -> None:
    (program / "pkg" / "send.py").write_text(
        SCRIPT + "\nfrom stream_ipc.serializers.pickle import PickleMessageSerializer"
        "\nprint(PickleMessageSerializer().serialize(Task('x')).hex())\n"
    )
    payload = run(["-m", "pkg.send"], program).split()[-1]
    receive = (
        "import sys, pkg.send; from stream_ipc.serializers.pickle import PickleMessageSerializer;"
        "print(repr(PickleMessageSerializer().deserialize(bytes.fromhex(sys.argv[1]))))"
    )
    assert run(["-c", receive, payload], program).split("\n")[-1] == "Task(job='x')"


def test_a_script_that_is_run_twice_in_one_process(program: Path) -> None:
    names: List[Dict[str, Any]] = [runpy.run_path(str(program / "top.py"), run_name="top_again") for _ in range(2)]
    assert lookup("top_again.Task").cls is names[1]["Task"]
    assert type_info(names[0]["Task"]).wire_name == "top_again.Task"


def test_a_message_without_dataclass() -> None:
    class Bare(Message, wire_name="test.messages.Bare"):
        pass

    serializer = PickleMessageSerializer()
    assert type(serializer.deserialize(serializer.serialize(Bare()))) is Bare


def test_every_dataclass_option_is_allowed() -> None:
    @dataclass(order=True, frozen=True)
    class Ordered(Message, wire_name="test.messages.Ordered"):
        a: int

    serializer = PickleMessageSerializer()
    assert serializer.deserialize(serializer.serialize(Ordered(1))) == Ordered(1)
