"""The library's structure: layers, public names, docstrings, and what it never does."""

import ast
import dis
import importlib.util
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import stream_ipc

PACKAGE = Path(stream_ipc.__file__).resolve().parent
ROOT = Path(__file__).resolve().parent.parent

# From the bottom up: a module imports from its own layer and from those before it, and never in a circle.
LAYERS = [
    ["clock", "errors", "log", "interruptions", "type_info"],
    ["advice"],
    ["registry", "messages", "ids", "protocols"],
    ["serializers"],
    ["wire"],
    ["transports"],
    ["handlers", "arguments"],
    ["core.guard", "core.items", "core.poller", "core.teardowns", "core.timers", "core.waker"],
    ["core.chores", "core.claims"],
    ["core.loop"],
    ["core"],  # what is left of it
    ["promise", "handler_methods", "session", "listener", "deferred"],
    ["opening_methods", "waiting"],
    ["peer"],
    ["workers"],
    ["pool"],
    [""],  # stream_ipc itself
    ["tap"],  # which needs nothing of it but what frames and formats look like
    ["__main__"],
]

# What is below transports/ turns values into other values. ids is not: it asks for the process id and the time. Nor is
# interruptions: it asks for the handlers of signals.
PURE = ["errors", "type_info", "advice", "registry", "messages", "protocols", "serializers", "wire"]
IMPURE = {"os", "socket", "select", "selectors", "subprocess", "time", "threading", "_thread", "signal", "fcntl", "asyncio"}

PUBLIC = [
    "DeferredReply",
    "ErrorMessage",
    "FrameTooLargeError",
    "InvalidStreamError",
    "IpcError",
    "IpcPeer",
    "JsonMessageSerializer",
    "Listener",
    "LogMessage",
    "Message",
    "MessageSerializer",
    "MessageTransport",
    "PhpMessageSerializer",
    "PickleMessageSerializer",
    "PidCounterRequestIdGenerator",
    "PidHrtimeRequestIdGenerator",
    "RemoteError",
    "RequestEnvelope",
    "RequestIdGenerator",
    "RequestTimeoutError",
    "ResponseEnvelope",
    "ResponsePromise",
    "SerializationError",
    "Session",
    "StreamClosedError",
    "StreamTransport",
    "UnexpectedReplyError",
    "WorkerPool",
    "as_completed",
    "gather",
    "register_type",
]


def module_name(path):
    """``wire/codec.py`` -> ``wire.codec``; the package itself is the empty name."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


SOURCES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
NODES = {name: list(ast.walk(tree)) for name, tree in TREES.items()}
PACKAGES = {module_name(path) for path in PACKAGE.rglob("__init__.py")}


def layer(module):
    for name in (module, module.split(".")[0]):
        for index, names in enumerate(LAYERS):
            if name in names:
                return index
    raise AssertionError(f"stream_ipc.{module} belongs to no layer")


def in_folders(module, folders):
    return module.split(".")[0] in folders


def each(modules):
    """Have a test look at one module after the other, and fail with all that is wrong in any of them."""
    assert len(modules) > 10

    def decorate(test):
        def of_all():
            faults = []
            for module in sorted(modules):
                try:
                    test(module)
                except AssertionError as exc:
                    faults.append(f"stream_ipc.{module}: {exc}")
            assert not faults, "\n".join(faults)

        return of_all

    return decorate


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node):
    """The import statements that run, also those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif is_type_checking(child):
            for other in child.orelse:
                yield from imports(other)
        else:
            yield from imports(child)


def imported_modules(module):
    """Full names of what a module imports: ``os``, ``stream_ipc.wire.codec``."""
    for node in imports(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
            continue
        base = node.module or ""
        if node.level:
            package = ["stream_ipc", *module.split(".")] if module else ["stream_ipc"]
            up = node.level - 1 if module in PACKAGES else node.level
            package = package[: len(package) - up]
            base = ".".join([*package, *filter(None, [node.module])])
        if base == "stream_ipc" or base.startswith("stream_ipc."):
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full[len("stream_ipc.") :] in SOURCES else base
        else:
            yield base


def own_imports(module):
    for name in imported_modules(module):
        if name == "stream_ipc" or name.startswith("stream_ipc."):
            yield name[len("stream_ipc.") :]


def test_the_reader_of_imports_sees_them():
    assert {"core.loop", "opening_methods", "session", "wire.codec"} <= set(own_imports("peer"))
    assert "transports.stdio" in own_imports("opening_methods")  # inside a method
    assert "session" not in own_imports("errors")  # for type checkers only
    assert {"select", "selectors"} <= set(imported_modules("core.poller"))
    assert "wire.framing" in own_imports("wire.codec")


@each(SOURCES)
def test_imports_point_down(module):
    for other in own_imports(module):
        assert layer(other) <= layer(module), f"it imports stream_ipc.{other}, which stands above it"
        assert other or not module, "it imports from stream_ipc itself"


def test_imports_make_no_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            path.append(module)
            for other in own_imports(module):
                visit(other)
            done.add(path.pop())

    for module in SOURCES:
        visit(module)


# -- an underscore means: this module only

# Which the standard library documents in spite of the underscore, and there is no other way.
DOCUMENTED = {"_exit", "_fields", "_getframe"}

FOREIGN = {
    ("serializers.pickle", "_extension_cache"): "copyreg's, for which a global is unpickled without being looked up",
    ("serializers.pickle", "_inverted_registry"): "copyreg's; without it a class with an extension code cannot be refused",
}


def is_private(name):
    """``_name``, but not ``__name__``, and not ``_name_`` as enums have them."""
    return name.startswith("_") and not name.endswith("_")


def names_of_others(nodes):
    """The private names that a module uses and does not define, with their lines."""
    own = set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_of_self(node):
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr) and (node.attr not in own or is_of_super(node)):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.name, node.lineno) for alias in node.names if is_private(alias.name))


def is_of_self(node):
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def is_of_super(node):
    return isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name) and node.value.func.id == "super"


@each(SOURCES)
def test_private_names_are_used_in_their_module_only(module):
    for name, line in names_of_others(NODES[module]):
        known = name in DOCUMENTED or (module, name) in FOREIGN
        assert known, f"line {line}: {name} is of another module"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from .loop import _SLICE", ["_SLICE"]),
        ("import loop\nx = loop._SLICE", ["_SLICE"]),
        ("def f(peer): return peer._loop", ["_loop"]),
        ("def f(peer): peer._loop = 5", ["_loop"]),
        ("class A:\n def f(self):\n  super()._f()\n def _f(self): pass", ["_f"]),
        ("class A:\n def f(self): self._x = 1\ndef g(a): return a._x", []),
        ("class A:\n _x: int\ndef g(a): return a._x", []),
        ("def f(value): return value._name_, value.__dict__", []),
    ],
)
def test_the_finder_of_private_names(source, found):
    assert [name for name, _ in names_of_others(list(ast.walk(ast.parse(source))))] == found


# -- sizes

# What users hold in their hands, and what is in everybody's way when it is too long.
SHORT = {
    "arguments", "core", "listener", "opening_methods", "peer", "pool", "promise", "session", "transports.inputs",
    "transports.outbox", "transports.stream_channel", "transports.message_transport", "workers",
}  # fmt: skip

@each(SOURCES)
def test_no_module_is_too_long(module):
    most = 400 if module in SHORT or module.split(".")[0] in SHORT else 500
    length = len(SOURCES[module].splitlines())
    assert length <= most, f"{length} lines"


@each(SOURCES)
def test_no_class_has_too_many_methods(module):
    for node in NODES[module]:
        if isinstance(node, ast.ClassDef):
            methods = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
            assert len(methods) <= 30, f"{node.name} has {len(methods)}"


@each([name for name in SOURCES if in_folders(name, ["transports"])])
def test_no_transport_has_too_many_methods_with_those_of_its_bases(module):
    for cls in vars(importlib.import_module(f"stream_ipc.{module}")).values():
        if isinstance(cls, type):
            bases = [base for base in cls.__mro__ if base.__module__.startswith("stream_ipc.")]
            functions = (types.FunctionType, property, staticmethod, classmethod)
            methods = {name for base in bases for name, value in vars(base).items() if isinstance(value, functions)}
            assert len(methods) <= 30, f"{cls.__name__} has {len(methods)}"


# -- atomic blocks

# An exception of a signal handler comes when a function is entered, when a call has returned, and when a loop goes back:
# between statements with none of these it cannot come.
ATOMIC = "# atomic: no calls"
INTERRUPTIBLE = (
    ast.Call, ast.For, ast.While, ast.With, ast.Import, ast.ImportFrom, ast.ClassDef, ast.ListComp, ast.SetComp,
    ast.DictComp, ast.GeneratorExp, ast.Yield, ast.YieldFrom, ast.Await, ast.JoinedStr, ast.Assert,
)  # fmt: skip


def atomic_blocks(source):
    """The lines of each marked block: from the comment on to an empty line, or to where the suite ends."""
    lines = source.splitlines()
    for number, line in enumerate(lines):
        if line.strip().startswith("# atomic"):
            assert line.strip() == ATOMIC, f"line {number + 1}: the mark is {ATOMIC!r}"
            indent = len(line) - len(line.lstrip())
            end = number + 1
            while end < len(lines) and lines[end].strip() and len(lines[end]) - len(lines[end].lstrip()) >= indent:
                end += 1
            yield range(number + 2, end + 1)  # lines are counted from 1


def interruptible(source, nodes):
    """The lines in atomic blocks at which an exception of a signal handler can come."""
    nodes = [node for node in nodes if isinstance(node, INTERRUPTIBLE)]
    for block in atomic_blocks(source):
        assert block, "a mark without a block"
        yield from sorted({node.lineno for node in nodes if node.lineno in block})


@each(SOURCES)
def test_atomic_blocks_have_no_calls(module):
    lines = list(interruptible(SOURCES[module], NODES[module]))
    assert not lines, f"lines {lines}: a call, or a loop, in an atomic block; put an empty line before it"


def early_exits(source, tree):
    """The lines in atomic blocks at which an ``if`` does nothing but leave, and more of the block follows.

    CPython 3.10 looks at signals where it jumps, and what follows such an ``if`` is jumped to.
    """
    leaving = (ast.Return, ast.Break, ast.Continue, ast.Raise)
    blocks = [*atomic_blocks(source)]
    for node in ast.walk(tree):
        for suite in (getattr(node, "body", ()), getattr(node, "orelse", ()), getattr(node, "finalbody", ())):
            for first, then in itertools.pairwise(suite) if isinstance(suite, list) else ():
                leaves = isinstance(first, ast.If) and len(first.body) == 1 and isinstance(first.body[0], leaving)
                if leaves and any(first.lineno in block and then.lineno in block for block in blocks):
                    yield first.lineno


@each(SOURCES)
def test_atomic_blocks_have_no_early_exits(module):
    lines = list(early_exits(SOURCES[module], TREES[module]))
    assert not lines, f"lines {lines}: ask for what lets the block go on, and let it fall through"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("if x:\n    return\ny = 1", [3]),
        ("if x:\n    return\n\ny = 1", []),
        ("if x:\n    y = 1\nelse:\n    return", []),
        ("if x:\n    y = 1\n    return\nz = 1", []),
        ("if x:\n    if y:\n        raise z\n    y = 1", [4]),
    ],
)
def test_the_finder_of_early_exits(body, found):
    source = "def f():\n    # atomic: no calls\n" + "".join(f"    {line}\n" if line else "\n" for line in body.split("\n"))
    assert list(early_exits(source, ast.parse(source))) == found


def test_no_attribute_is_set_by_a_function():
    decorators = [found for nodes in NODES.values() for node in nodes for found in getattr(node, "decorator_list", ())]
    assert decorators
    assert not [found for found in decorators if isinstance(found, ast.Attribute) and found.attr == "setter"]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("x = 1\ndel y[0]\n\nf()", []),
        ("x = 1\nf()", [4]),
        ("x = f()", [3]),
        ("if x:\n    y = f(x)", [4]),
        ("if x:\n    y = 2\nelse:\n    y = 3\nz = y", []),
        ("try:\n    f()\nfinally:\n    pass", [4]),
        ("for x in y:\n    pass", [3]),
        ("x = [y for y in z]", [3]),
        ('x = f"{y}"', [3]),
        ("with x:\n    y = 1", [3]),
        ("x = 1\nassert x", [4]),
        ("x = 1  # a comment\n# another\ny += (x,)\n\nf()", []),
    ],
)
def test_the_reader_of_atomic_blocks(body, found):
    source = "if True:\n    # atomic: no calls\n" + "".join(f"    {line}\n" if line else "\n" for line in body.split("\n"))
    for text in (source, source + "f()\n"):  # behind the suite
        assert list(interruptible(text, ast.walk(ast.parse(text)))) == found


# CPython 3.12 and later leave the jump back of a loop that has a condition out of the try block around it: the exception
# of a signal handler that comes there passes by every except and finally clause.


def loops_with_a_condition(node, guarded=False):
    """The lines of while loops, other than ``while True``, inside of a try or with block of the same function."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                inside = guarded or isinstance(node, ast.With) or (isinstance(node, ast.Try) and field == "body")
                inside = inside and not isinstance(child, (ast.FunctionDef, ast.Lambda))
                if inside and isinstance(child, ast.While) and not isinstance(child.test, ast.Constant):
                    yield child.lineno
                yield from loops_with_a_condition(child, inside)


@each([name for name in SOURCES if not in_folders(name, ["serializers", "tap"])])
def test_loops_in_try_blocks_have_no_condition(module):
    lines = list(loops_with_a_condition(TREES[module]))
    assert not lines, f"lines {lines}: write while True, and break"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("try:\n while x:\n  f()\nfinally:\n g()", [2]),
        ("with x:\n if y:\n  while x:\n   f()", [3]),
        ("try:\n while True:\n  f()\nfinally:\n while x:\n  g()", []),
        ("while x:\n try:\n  f()\n finally:\n  g()", []),
    ],
)
def test_the_finder_of_loops_with_a_condition(source, found):
    assert list(loops_with_a_condition(ast.parse(source))) == found


def test_there_are_atomic_blocks():
    assert sum(len(list(atomic_blocks(source))) for source in SOURCES.values()) > 20
    for module, source in SOURCES.items():
        assert "breath" not in source, module


def bound_names(statements):
    """What imports, assignments and classes among these statements define."""
    for node in statements:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets)
        elif isinstance(node, ast.ClassDef):
            yield node.name


def names_at_run_time(node):
    """The names that running code looks up or sets: not those of annotations, nor what only type checkers see."""
    if isinstance(node, ast.Name):
        yield node
    for field, child in ast.iter_fields(node):
        if field in ("annotation", "returns") or (field == "body" and is_type_checking(node)):
            continue
        for part in child if isinstance(child, list) else [child]:
            if isinstance(part, ast.AST):
                yield from names_at_run_time(part)


@each(SOURCES)
def test_what_only_type_checkers_see_is_not_used(module):
    tree = TREES[module]
    hidden = {name for node in NODES[module] if is_type_checking(node) for name in bound_names(node.body)}
    shown = {name for node in NODES[module] if is_type_checking(node) for name in bound_names(node.orelse)}
    names = list(names_at_run_time(tree))
    set_here = {name.id for name in names if isinstance(name.ctx, ast.Store)} | set(bound_names(imports(tree)))
    used = hidden & {name.id for name in names} - shown - set_here
    assert not used, f"{sorted(used)} are there for type checkers only"


@each([name for name in SOURCES if in_folders(name, PURE)])
def test_pure_modules_do_no_io(module):
    found = {name.split(".")[0] for name in imported_modules(module)} & IMPURE
    assert not found, f"it is below transports/ and imports {sorted(found)}"


@each(SOURCES)
def test_module_says_what_it_is(module):
    assert (ast.get_docstring(TREES[module]) or "").strip(), "it has no docstring"


@each(SOURCES)
def test_nothing_prints_or_reads_the_wall_clock(module):
    for node in NODES[module]:
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name):
            assert function.id not in ("print", "input"), f"line {node.lineno}"
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            called = (function.value.id, function.attr)
            # It jumps when somebody sets the clock.
            assert called not in {("time", "time"), ("time", "time_ns"), ("datetime", "now")}, f"line {node.lineno}"


@each(SOURCES)
def test_nothing_outside_the_standard_library_is_needed(module):
    for name in imported_modules(module):
        top = name.split(".")[0]
        if top != "stream_ipc" and top not in sys.builtin_module_names:
            origin = importlib.util.find_spec(top).origin
            assert "site-packages" not in (origin or ""), name


def test_public_names():
    assert set(PUBLIC) <= set(stream_ipc.__all__)
    assert sorted(stream_ipc.__all__) == list(stream_ipc.__all__)
    assert len(set(stream_ipc.__all__)) == len(stream_ipc.__all__)


def test_star_import():
    names = {}
    exec("from stream_ipc import *", names)
    assert set(stream_ipc.__all__) <= set(names)


def test_unknown_name():
    with pytest.raises(AttributeError, match="Nonsense"):
        stream_ipc.Nonsense  # noqa: B018


@pytest.mark.parametrize("name", sorted({*PUBLIC, *stream_ipc.__all__}))
def test_public_name_has_a_docstring(name):
    value = getattr(stream_ipc, name)
    doc = value.__dict__.get("__doc__") if isinstance(value, type) else value.__doc__
    assert doc
    # What @dataclass writes if there is none.
    assert not doc.startswith(f"{name}(")
    if not isinstance(value, type):
        return
    for member, attribute in vars(value).items():
        if member.startswith("_") or not (inspect.isfunction(attribute) or isinstance(attribute, property)):
            continue
        inherited = any(member in vars(base) for base in value.__mro__[1:])  # then the base says what it is
        assert inherited or attribute.__doc__, f"{name}.{member}"


def test_the_example_of_the_docstring_runs(tmp_path):
    blocks = {}
    name = None
    for line in inspect.getdoc(stream_ipc).splitlines():
        if line.startswith("    "):
            blocks[name] = blocks.get(name, "") + line[4:] + "\n"
        elif not line and name in blocks:
            blocks[name] += "\n"
        elif line:
            name = next((part for part in line.split("``") if part.endswith(".py")), name)
    assert sorted(blocks) == ["messages.py", "parent.py", "worker.py"]
    for name, code in blocks.items():
        (tmp_path / name).write_text(code)
    command = [sys.executable, "-W", "error", "parent.py"]
    done = subprocess.run(command, cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=50)
    assert done.stdout == b"info working on a task\nA TASK\n"
    assert done.returncode == 0


def test_the_docstring_names_what_there_is():
    for name in stream_ipc.__all__:
        assert f"``{name}``" in stream_ipc.__doc__, name
    assert set(stream_ipc.__all__) <= set(dir(stream_ipc))


def test_defaults_say_what_they_are():
    seen = set()
    for name in ("IpcPeer", "Session", "ResponsePromise", "DeferredReply", "WorkerPool", "Listener"):
        cls = getattr(stream_ipc, name)
        for member in ("__init__", *(member for member in dir(cls) if not member.startswith("_"))):
            attribute = getattr(cls, member)
            if inspect.isfunction(attribute):
                for parameter in inspect.signature(attribute).parameters.values():
                    assert parameter.default is not Ellipsis, f"{name}.{member}"
                    if parameter.name == "timeout":
                        seen.add(str(parameter.default))
    assert seen == {"None", "0.0", "30.0", "<the peer's>", "<the pool's>", "<a few seconds>"}


# What help() shows of the classes that users hold in their hands: facades, with one private slot for the object behind.
MEMBERS = {
    "IpcPeer": [
        "broadcast", "close", "connect", "create_command_session", "create_process_session", "create_session",
        "create_session_pair", "create_socket_session", "create_stdio_session", "create_stream_session", "fileno", "listen",
        "next_deadline", "remove_session", "sessions", "tick", "tick_for", "wakeup",
    ],
    "Session": [
        "batch", "close", "flush", "is_open", "name", "notify", "off_close", "off_exception", "off_message", "off_request",
        "on_close", "on_exception", "on_message", "on_request", "peer", "process", "queued_bytes", "reason", "receive",
        "request", "socket", "tick", "transport",
    ],
    "ResponsePromise": ["add_done_callback", "cancel", "deadline", "done", "id", "settled", "wait"],
    "Listener": ["address", "close", "is_open"],
    "MessageTransport": ["close", "flush", "read_fds", "receive", "send", "wants_write", "write_fd"],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_public_members(name):
    assert [member for member in dir(getattr(stream_ipc, name)) if not member.startswith("_")] == MEMBERS[name]


def test_version():
    assert [part.isdigit() for part in stream_ipc.__version__.split(".")] == [True, True, True]
    # setuptools reads it without importing the package, for which it must be a literal.
    assigned = [node for node in TREES[""].body if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"]
    assert [ast.literal_eval(node.value) for node in assigned] == [stream_ipc.__version__]


def test_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


# Slow to import, and of no use to a worker that answers requests with the default serializer.
UNNEEDED = {
    "asyncio", "datetime", "decimal", "json", "logging", "pathlib", "pickle", "shutil", "signal", "socket", "subprocess",
    "tempfile", "threading", "traceback", "typing",
}  # fmt: skip

# What such a worker imports of the package: its start waits for each of them, and so does whoever started it.
NEEDED = {
    "arguments", "clock", "errors", "handlers", "handler_methods", "ids", "interruptions", "log", "messages",
    "opening_methods", "peer", "promise", "registry", "session", "type_info", "core", "core.chores", "core.claims",
    "core.closing", "core.conversation", "core.dispatcher", "core.guard", "core.items", "core.receiving",
    "core.last_look", "core.lifecycle", "core.loop", "core.owed", "core.pending", "core.poller", "core.port",
    "core.requests", "core.responder", "core.sending",
    "core.teardowns", "core.timers", "core.waker", "serializers", "serializers.pickle",
    "serializers.pickle_objects", "transports", "transports.channel", "transports.descriptors", "transports.ends",
    "transports.inputs", "transports.outbox", "transports.stdio", "transports.stream_channel", "wire", "wire.codec",
    "wire.framing",
}  # fmt: skip

WORKER = """
import sys
from stream_ipc import IpcPeer, LogMessage
with IpcPeer() as peer:
    session = peer.create_stdio_session()
    @session.on_request
    def answer(request: LogMessage) -> LogMessage:
        return LogMessage(" ".join(sys.modules))
    while session.is_open:
        session.tick(None)
"""


def clean_environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_a_worker_imports_no_more_than_it_needs():
    assert set(SOURCES) >= NEEDED
    with stream_ipc.IpcPeer() as peer:
        command = [sys.executable, "-S", "-W", "error", "-c", WORKER]
        worker = peer.create_command_session(command, cwd=str(PACKAGE.parent), env=clean_environment())
        question = stream_ipc.LogMessage("what was imported?")
        modules = set(worker.request(question, timeout=50, expect=stream_ipc.LogMessage).wait().message.split())
    ours = {name.partition(".")[2] for name in modules if name.split(".")[0] == "stream_ipc"} - {""}
    assert ours == NEEDED
    assert not modules & UNNEEDED


def test_import_is_silent_and_imports_no_more_than_it_needs():
    code = f"import sys, stream_ipc; print([name for name in {sorted(UNNEEDED)} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-S", "-W", "error", "-c", code],
        cwd=str(PACKAGE.parent),
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=50,
    )
    assert done.stdout == b"[]\n"
    assert done.returncode == 0


def test_top_level_holds_nothing_else():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no checkout, or git is not installed")
    done = subprocess.run(["git", "ls-files"], cwd=str(ROOT), capture_output=True, text=True, timeout=50)
    if done.returncode:
        pytest.skip(f"git cannot read the checkout: {done.stderr}")
    top = {name.split("/")[0] for name in done.stdout.splitlines()}
    allowed = {"setup.cfg", "setup.py", "README.rst", "LICENSE", "stream_ipc", "tests", "examples"}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_the_readme_of_the_tests_names_modules_that_are_there():
    text = (ROOT / "tests" / "README.rst").read_text(encoding="utf-8")
    named = set(re.findall(r"\b\w+\.py\b", text))
    there = {path.name for folder in (PACKAGE, ROOT / "tests") for path in folder.rglob("*.py")}
    assert named <= there
    assert {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"} <= named


def code_objects(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_objects(constant)


# Loops whose try has nothing to undo: it answers an error of the system, or a value that is wrong.
NOTHING_TO_UNDO = {
    "_LingeringClose.step", "ProcessTeardown._has_ended", "Waker.on_ready", "_Walk.text",
    "Direction.run", "Watcher.catch_up",
}  # fmt: skip


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the compiler puts every jump of a loop inside its try")
@each(SOURCES)
def test_jumps_of_a_loop_are_inside_its_try(module):
    # There a signal is looked at: what its handler raises would pass by the finally and the except clauses.
    inline = [node for node in NODES[module] if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp))]
    inline += [node for node in NODES[module] if isinstance(node, ast.GeneratorExp)]
    harmless = {line for node in inline for line in range(node.lineno, node.end_lineno + 1)}
    outside = []
    for code in code_objects(compile(SOURCES[module], module, "exec")):
        parsed = dis.Bytecode(code)
        spans = [(entry.start, entry.end) for entry in parsed.exception_entries]
        for jump in parsed:
            if jump.opname.startswith("JUMP_BACKWARD") and jump.positions.lineno not in harmless:
                begins, ends = (any(a <= at < b for a, b in spans) for at in (jump.argval, jump.offset))
                if begins and not ends and code.co_qualname not in NOTHING_TO_UNDO:
                    outside.append(f"{code.co_qualname}, line {jump.positions.lineno}")
    assert not outside, f"{outside}: end the loop with a statement that is no if"
