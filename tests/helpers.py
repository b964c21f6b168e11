"""What several test modules share: waiting without sleeping, raw streams, faults that are made on purpose."""

import contextlib
import dis
import functools
import gc
import importlib
import inspect
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any, Callable, Iterable, Iterator, List, Optional, Tuple, Type, TypeVar, Union

import stream_ipc
from stream_ipc import (
    IpcPeer,
    Listener,
    Message,
    PickleMessageSerializer,
    RequestEnvelope,
    ResponseEnvelope,
    ResponsePromise,
    Session,
    WorkerPool,
)
from stream_ipc.wire.framing import Between, Filling
from tests.fork_server import BEGINNING

# What the paths of the package's code begin with. That of a checkout may have "stream_ipc" in it, too.
PACKAGE = os.path.dirname(stream_ipc.__file__) + os.sep

MAGIC = b"\xf3\x4a\x9d\xe2"

# How long a test waits for what must happen. Far more than it takes, because the machine may be busy with something
# else; a test that waits that long has failed.
PATIENCE = 25.0

# How long a wait takes that is to show that it lasts as long as it should, and that it does not spin meanwhile.
WAIT = 0.03

Ticking = Union[IpcPeer, Session]


def frame(payload: bytes) -> bytes:
    return MAGIC + struct.pack(">I", len(payload)) + payload


def missing_bytes(state: Any) -> int:
    """How many bytes of an unfinished payload are missing, by the state of a decoder of frames."""
    return state.missing if isinstance(state, Filling) else 0


def held_back(state: Any) -> bytes:
    """The bytes that may begin a frame, by the state of a decoder of frames."""
    return state.head if isinstance(state, Between) else b""


def framed(message: Message) -> bytes:
    return frame(PickleMessageSerializer().serialize(message))


class ActingSerializer(PickleMessageSerializer):
    """Calls a function once, when the next message of a class is to be turned into a payload: users' code may do so."""

    def __init__(self, cls: Type[Message]) -> None:
        super().__init__()
        self.cls = cls
        self.act: Optional[Callable[[], Any]] = None

    def serialize(self, message: Message) -> bytes:
        if self.act is not None and isinstance(message, self.cls):
            act, self.act = self.act, None
            act()
        return super().serialize(message)


def request_bytes(id: str, message: Message) -> bytes:
    return framed(RequestEnvelope(id, message))


def reply_bytes(id: str, message: Message) -> bytes:
    return framed(ResponseEnvelope(id, message))


def unframe(data: bytes) -> List[Message]:
    """The messages that some bytes hold; all of them must be whole frames."""
    messages: List[Message] = []
    while data:
        assert data[:4] == MAGIC, data[:40]
        (size,) = struct.unpack(">I", data[4:8])
        assert len(data) >= 8 + size, "half a frame"
        messages.append(PickleMessageSerializer().deserialize(data[8 : 8 + size]))
        data = data[8 + size :]
    return messages


def state_of(ticking: Ticking) -> str:
    """What a session, or each session of a peer, is doing, and what its output is waiting for: for a test that fails."""
    if isinstance(ticking, IpcPeer):
        return f"{ticking!r}: {[state_of(session) for session in ticking.sessions]}"
    channel = ticking._conversation.channel
    names = ("queued_bytes", "blocked", "held", "writing", "corked", "error")
    outbox = {name: getattr(channel.outbox, name, None) for name in names}
    return f"{ticking!r} {outbox} {channel.interest()} {ticking._conversation.port.watched}"


def tick_until(condition: Callable[[], Any], *ticking: Ticking, seconds: float = PATIENCE) -> None:
    """Tick until something is so."""
    end = time.monotonic() + seconds
    wait = 0.01 if len(ticking) == 1 else 0.0
    while not condition():
        assert time.monotonic() < end, f"it did not happen in time: {[state_of(session) for session in ticking]}"
        for one in ticking:
            one.tick(wait)


class RawPeer:
    """A session whose other end is a bare socket in the hands of the test."""

    def __init__(self, peer: IpcPeer, small: bool = False) -> None:
        ours, self.sock = socket.socketpair()
        if small:
            for sock in (ours, self.sock):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.setblocking(False)
        self.session = peer.create_socket_session(ours)

    def write(self, *parts: bytes) -> None:
        data = b"".join(parts)
        assert self.sock.send(data) == len(data)

    def read(self) -> bytes:
        """What is there now."""
        data = b""
        while True:
            try:
                piece = self.sock.recv(1 << 20)
            except BlockingIOError:
                return data
            if not piece:
                return data
            data += piece

    def messages(self) -> List[Message]:
        return unframe(self.read())

    def __enter__(self) -> "RawPeer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.close()


class FakeClock:
    """Stands in for a peer's clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class HurryingClock(FakeClock):
    """A clock that goes on by a second whenever it is looked at, so nothing really waits; then calls a function."""

    def __init__(self, looked: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self._looked = looked

    def __call__(self) -> float:
        self.now += 1.0
        self._looked()
        return self.now


class CpuMeter:
    """How much processor time a block takes, and how much real time."""

    def __enter__(self) -> "CpuMeter":
        self._cpu = time.process_time()
        self._real = time.monotonic()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cpu = time.process_time() - self._cpu
        self.real = time.monotonic() - self._real

    @property
    def spins(self) -> bool:
        """Whether it took the processor for half of the time: what waits takes it for a few hundredths."""
        return self.cpu >= self.real / 2


def seeds(count: int) -> Iterator[int]:
    """Fresh seeds; set STREAM_IPC_SEED to repeat a run that has failed. They are printed, which a failure shows."""
    fixed = os.environ.get("STREAM_IPC_SEED")
    for _ in range(1 if fixed else count):
        seed = int(fixed) if fixed else random.SystemRandom().randrange(1 << 32)
        print(f"STREAM_IPC_SEED={seed}")
        yield seed


# Set by conftest: whether everything runs, and not only what a developer waits for.
everything = False


def places_apart() -> int:
    """Return how far apart the places are at which a sweep interrupts: each of them is tried where everything runs."""
    return 1 if everything else 7


def span(full: float) -> float:
    """Return how long or how often something is tried that finds more the longer it takes: a twelfth of it by default."""
    return full if everything else full / 12


class Interruption(BaseException):
    """What stands for a KeyboardInterrupt where pytest must not take it for the user's."""


class InterruptionError(Exception):
    """The same as an Exception, as many a handler of SIGALRM raises."""


class CallAt:
    """Calls a function at the n-th place in the package's code where a signal handler or a finalizer could run.

    Those are the beginning of a function, and the moment when a C function has returned but its result is not stored
    yet. A profile function is called at just these, so every one of them can be tried in turn, which signals alone never
    manage. The function is called once at most.
    """

    events: Tuple[str, ...] = ("call", "c_return")
    path = PACKAGE  # what those of its modules begin with

    def __init__(self, number: int, function: Callable[[int, Any], Any]) -> None:
        self.number = number
        self.count = 0
        self.where = ""
        self._function = function
        self._callback = self._profile  # kept: sys.setprofile(None) drops it while it runs

    def is_place(self, frame: Any, event: str) -> bool:
        """Whether the function may be called here: one of the events, in the package's code."""
        return True

    def can_come(self) -> bool:
        """Whether it may be called now; otherwise it is called at the next place."""
        return True

    def _profile(self, frame: Any, event: str, arg: Any) -> None:
        # It is called millions of times, and mostly for nothing: what is cheap to ask comes first.
        if event not in self.events or not frame.f_code.co_filename.startswith(self.path):
            return
        if not self.is_place(frame, event):
            return
        self.count += 1
        if self.count == self.number and not self.can_come():
            self.number += 1
        elif self.count == self.number:
            self.where = f"{event} {getattr(arg, '__qualname__', '')} in {frame.f_code.co_name}:{frame.f_lineno}"
            sys.setprofile(None)
            self._function(signal.SIGUSR1, frame)
            sys.setprofile(self._callback)  # but not if it has raised

    def __enter__(self) -> "CallAt":
        sys.setprofile(self._callback)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.setprofile(None)

    @property
    def hit(self) -> bool:
        return bool(self.where)


class CallAtJump(CallAt):
    """The same, but where a loop jumps back, and before 3.11 wherever code jumps: there signals are looked at, too."""

    def __enter__(self) -> "CallAtJump":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.path):
            return None
        frame.f_trace_opcodes = True
        before = -1  # where the opcode before this one stands

        def step(frame: Any, event: str, arg: Any) -> Any:
            nonlocal before
            if event == "opcode":
                here, before = before, frame.f_lasti
                if here >= 0 and _jumps(frame.f_code.co_code[here], before - here) and not self.hit:
                    self.count += 1
                    if self.count == self.number:
                        self.where = f"jump in {frame.f_code.co_name}:{frame.f_lineno}"
                        sys.settrace(None)
                        self._function(signal.SIGUSR1, frame)
            return step

        return step


def _jumps(opcode: int, distance: int) -> bool:
    if sys.version_info >= (3, 11):
        return "BACKWARD" in dis.opname[opcode]
    return distance != 2 and opcode in (*dis.hasjabs, *dis.hasjrel) and dis.opname[opcode] != "FOR_ITER"


class InterruptAt(CallAt):
    """Raises an exception there, as a handler of SIGUSR1, which it is: its frame is in the traceback.

    Before 3.11 the moment when a function in Python has returned is such a place, too.
    """

    events = CallAt.events if sys.version_info >= (3, 11) else (*CallAt.events, "return")

    def __init__(self, number: int, error: BaseException) -> None:
        super().__init__(number, self._ring)
        self.error = error

    def _ring(self, number: int, frame: Any) -> None:
        raise self.error

    def can_come(self) -> bool:
        return signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def is_place(self, frame: Any, event: str) -> bool:
        code, back = frame.f_code, frame.f_back
        # Going on with a generator: there old versions would end it without its finally clauses.
        if event != "c_return" and code.co_flags & inspect.CO_GENERATOR:
            return False
        # A result that is on its way to the test is out of the package's hands.
        if event == "return" and not back.f_code.co_filename.startswith(PACKAGE):
            return False
        # What calls it by way of map(), a for statement or += of a list, stores what it gets before a signal is looked at.
        if event == "return" and back.f_code.co_code[back.f_lasti] in (dis.opmap["FOR_ITER"], dis.opmap["INPLACE_ADD"]):
            return False
        return code.co_name not in UNRAISABLE and (back is None or back.f_code.co_name not in UNRAISABLE)

    def __enter__(self) -> "InterruptAt":
        self._old: Any = signal.signal(signal.SIGUSR1, self._ring)
        super().__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__()
        signal.signal(signal.SIGUSR1, self._old)


class Alarm(BaseException):
    """What the handler of a real signal raises, as a KeyboardInterrupt."""


class AlarmError(Exception):
    """The same as an Exception."""


class Alarms:
    """A signal every millisecond; its handler raises, or just counts.

    What it raises where nobody can catch it, in a finalizer, is dropped.
    """

    def __init__(self, raises: bool, kind: Type[BaseException] = Alarm) -> None:
        self.raises = raises
        self.kind = kind
        self.count = 0
        self.armed = False

    def _ring(self, number: int, frame: Any) -> None:
        self.count += 1
        # Only where the test is prepared to catch it.
        if self.raises and self.armed:
            self.armed = False
            raise self.kind

    def __enter__(self) -> "Alarms":
        gc.collect()  # or an alarm may come in a weak reference's callback of what other tests have left, where it is lost
        self._hook, sys.unraisablehook = sys.unraisablehook, self._drop
        self._old: Any = signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        return self

    def _drop(self, unraisable: Any) -> None:
        if unraisable.exc_type is not self.kind:
            self._hook(unraisable)

    def __exit__(self, *exc_info: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._old)
        sys.unraisablehook = self._hook

    def call(self, function: Callable[[], Any]) -> Tuple[bool, Any]:
        """Call; returns whether it was not interrupted, and its result."""
        result: Any = None
        try:
            self.armed = True
            result = function()
            self.armed = False
            return True, result
        except self.kind:
            return False, None


def run_python(
    code: str, *args: str, strict: bool = True, timeout: float = 60.0
) -> "subprocess.CompletedProcess[str]":
    """Run code in an interpreter of its own, by default one that makes errors of warnings."""
    flags = ["-X", "dev", "-W", "error"] if strict else []
    return subprocess.run(
        [sys.executable, *flags, "-c", code, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=timeout,
    )


def after(imports: str, code: str) -> str:
    """Code behind its imports, among which no garbage is looked for: that is much of what a short program does."""
    return f"{BEGINNING}{imports}\ngc.enable()\ngc.freeze()\ndel gc\n{code}"


def role(name: str, *args: object) -> List[str]:
    """The command that plays a role of ``tests.child``."""
    return [sys.executable, "-S", "-c", after("from tests.child import main", "main()"), name, *map(str, args)]


# -- what reaches inside the package: nothing else in the tests does


# Functions of the package in which the interpreter itself ignores exceptions: finalizers, and callbacks of weak references.
UNRAISABLE = ("__del__",)

# Where each limit is kept, and by which name.
_LIMITS = {
    "back off": ["stream_ipc.workers.supervisor._BACK_OFF"],
    "check interval": ["stream_ipc.core.chores.CHECK_INTERVAL"],
    "death interval": [f"stream_ipc.transports.{module}.DEATH_INTERVAL" for module in ("process", "children")],
    "depth": [f"stream_ipc.{module}.MAX_DEPTH" for module in ("core.loop", "core.requests", "workers.scheduler")],
    "exit grace": ["stream_ipc.transports.children.EXIT_GRACE"],
    "flush bound": [f"stream_ipc.core.{module}.FLUSH_BOUND" for module in ("conversation", "lifecycle", "closing")],
    "inbox bytes": ["stream_ipc.core.port.INBOX_BYTES"],
    "inbox bytes hard": ["stream_ipc.core.port.INBOX_BYTES_HARD"],
    "inbox count": ["stream_ipc.core.port.INBOX_COUNT"],
    "inbox count hard": ["stream_ipc.core.port.INBOX_COUNT_HARD"],
    "kill grace": ["stream_ipc.transports.children.KILL_GRACE"],
    "last look pause": ["stream_ipc.core.last_look._PAUSE"],
    "linger": ["stream_ipc.transports.sockets._LINGER"],
    "listener pause": ["stream_ipc.core.listening.PAUSE"],
    "lock tries": ["stream_ipc.transports.sockets._LOCK_TRIES"],
    "terminate grace": ["stream_ipc.transports.children.TERMINATE_GRACE"],
}


def _place(path: str) -> Tuple[Any, str]:
    module, _, name = path.rpartition(".")
    return importlib.import_module(module), name


def limit(name: str) -> Any:
    """Return one of the package's limits."""
    return getattr(*_place(_LIMITS[name][0]))


def set_limit(name: str, value: float, monkeypatch: Any = None) -> None:
    """Change one of the package's limits: for a test, or without ``monkeypatch`` for the rest of the process."""
    for path in _LIMITS[name]:
        module, attribute = _place(path)
        assert hasattr(module, attribute), path
        if monkeypatch is None:
            setattr(module, attribute, value)
        else:
            monkeypatch.setattr(module, attribute, value)


Clock = TypeVar("Clock")


def set_clock(peer: IpcPeer, clock: Clock) -> Clock:
    """Give a peer another clock, and return it."""
    peer._loop.clock = clock  # type: ignore[assignment]
    return clock


def now(peer: IpcPeer) -> float:
    """Return the time of a peer's clock."""
    return peer._loop.clock()


def deadline_of(promise: "ResponsePromise[Any]") -> Optional[float]:
    """Return when a request times out, by its peer's clock."""
    deadline: Optional[float] = promise._pending.deadline
    return deadline


def patch_wait_for(monkeypatch: Any, peer: IpcPeer, wrap: Callable[..., Any]) -> None:
    """Replace how a peer waits for a descriptor that is no session's by ``wrap(real, fd, events, limit)``."""
    from stream_ipc.core import connecting

    real = connecting.wait_for
    monkeypatch.setattr(connecting, "wait_for", lambda loop, *arguments: wrap(functools.partial(real, loop), *arguments))


def read_without_dispatching(peer: IpcPeer) -> None:
    """Read what is there into the inboxes, as a send does that waits for room."""
    from stream_ipc.core.connecting import wait_for

    wait_for(peer._loop, -1, 0, peer._loop.clock())


def nothing_to_dispatch(peer: IpcPeer) -> bool:
    """Whether no session is noted as one that has something to dispatch."""
    return not peer._loop.todo


def nothing_in_a_batch(peer: IpcPeer) -> bool:
    """Whether no session is noted as one that is inside ``batch()``."""
    return not peer._loop.chores.corked


def nothing_is_torn_down(peer: IpcPeer) -> bool:
    """Whether nothing of a session that was closed is still waited for."""
    return not peer._loop.chores.teardowns.all


def drop_queued(session: Session) -> None:
    """Drop what is queued, so that nothing waits for it to be read when the session is closed."""
    session._conversation.channel.drop_output()


def promises_queued(pool: WorkerPool) -> List[Any]:
    """Return the promises of the tasks of a pool that no worker has, in order."""
    return [task() for task in pool._scheduler.tasks.queue]


def received_bytes(session: Session) -> int:
    """Return how much a session has read in all."""
    count: int = session._conversation.channel.inputs.received_bytes
    return count


def frames_of(session: Session) -> List[Any]:
    """Return a list of the frames that a session sends from now on. Those that were written or queued are empty."""
    frames: List[Any] = []
    channel = session._conversation.channel
    put = channel.put

    def note(frame: Any) -> None:
        frames.append(frame)
        put(frame)

    channel.put = note
    return frames


def is_broken(session: Session) -> bool:
    """Whether a write of a session has failed, so that nothing can be written any more."""
    return bool(session._conversation.outbox.is_broken)


def socket_of(session: Session) -> Any:
    """Return the socket that a session reads and writes."""
    return session.socket


def replace_socket(session: Session, sock: Any) -> None:
    """Let a session read and write another object than its socket."""
    channel: Any = session._conversation.channel
    for end in (channel.outbox.end, *[source.end for source in channel.inputs.by_fd.values()]):
        end.socket = sock


def wants_write(session: Session) -> bool:
    """Whether a session waits until its stream can be written or, with TLS, has something else to say."""
    return bool(session.transport.wants_write)


def listening_fd(listener: Listener) -> int:
    """Return the descriptor that a listener accepts from."""
    return listener._acceptor._sock.fileno()


def handshakes_of(listener: Listener) -> List[Any]:
    """The sockets whose handshakes are under way."""
    return [handshake.sock for handshake in listener._acceptor._handshakes.values()]


@contextlib.contextmanager
def set_large_pickle(size: int) -> Iterator[None]:
    """Have payloads of pickle read as large ones from that size on."""
    from stream_ipc.serializers import pickle

    old = pickle._LARGE
    pickle._LARGE = size
    try:
        yield
    finally:
        pickle._LARGE = old


def share(monkeypatch: Any, *streams: Any) -> None:
    """Have these streams taken for such whose open file other processes have, too."""
    from stream_ipc.transports import streams as module
    from stream_ipc.transports.ends import ReadEnd, WriteEnd

    for name, kind in (("open_read_end", ReadEnd), ("open_write_end", WriteEnd)):
        monkeypatch.setattr(module, name, functools.partial(_open_as_shared, kind, getattr(module, name), streams))


def _open_as_shared(kind: Any, real: Any, shared: Any, stream: Any) -> Any:
    return kind(stream, shared=True) if stream in shared else real(stream)


def patch_process(monkeypatch: Any, name: str, function: Callable[..., Any]) -> None:
    """Replace what process sessions call: ``Child.status`` (asks for a death) or ``ReadEnd`` (takes a stream)."""
    monkeypatch.setattr(f"stream_ipc.transports.process.{name}", function)


def new_child(process: "subprocess.Popen[Any]") -> Any:
    """Return what asks for the exit status of a child in the package."""
    from stream_ipc.transports.children import Child

    return Child(process, False)


def process_name(process: "subprocess.Popen[Any]") -> str:
    """Return what the package's log calls a child."""
    from stream_ipc.transports.children import process_name

    return process_name(process)


def patch_handshake(monkeypatch: Any, function: Callable[[Any], int]) -> None:
    """Replace the step of a TLS handshake: it is called with the socket and returns the events to wait for."""
    monkeypatch.setattr("stream_ipc.transports.tls.handshake", function)


# -- what reprs show


def is_settled(promise: "ResponsePromise[Any]") -> bool:
    """Whether a promise has its reply or error already, where ``done`` also says whether it is due."""
    return not repr(promise).endswith((" pending>", " overdue>"))


def name_of(session: Session) -> str:
    """Return what reprs, logs and error texts call a session."""
    found = re.match("<Session (.*?) (?:open|closing|closed|forked) ", repr(session))
    assert found, repr(session)
    return found.group(1)


def no_pending(*sessions: Session) -> bool:
    """Whether nothing is left in the tables of some sessions. A repr shows it without reaching inside."""
    return all("pending=0 inbox=0" in repr(session) for session in sessions)


def values(messages: Iterable[Any]) -> List[Any]:
    return [message.value if hasattr(message, "value") else message.text for message in messages]


def socket_peers(peer_a: IpcPeer, peer_b: IpcPeer) -> Tuple[Session, Session]:
    """Two connected sessions of two peers."""
    a, b = socket.socketpair()
    return peer_a.create_socket_session(a), peer_b.create_socket_session(b)
