"""Each call of the operating system fails once, and nothing worse comes of it than the text of an error.

A scenario is run again and again; in each run one call of one kind fails in one of its ways (``tests/fault_injection.py``
has the list). By default that is a sample; ``--all`` lets each call fail in each way, and ``STREAM_IPC_FAULT_SECONDS=600``
goes on for so long with two or three faults at a time.
"""

import gc
import logging
import os
import random
import re
import shutil
import signal
import socket
import ssl
import sys
import time
from collections import Counter
from contextlib import nullcontext
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple, Union

import pytest

from stream_ipc import (
    ErrorMessage,
    IpcError,
    IpcPeer,
    JsonMessageSerializer,
    PhpMessageSerializer,
    PickleMessageSerializer,
    RemoteError,
    ResponsePromise,
    SerializationError,
    Session,
)
from tests.conftest import open_descriptors, own_children
from tests.fault_injection import EFFECTS, INTERRUPTIONS, NO_MEMORY, Alarms, Faults, NoMemoryAt, Plan, RingAt
from tests.helpers import places_apart, seeds, set_limit, span
from tests.messages import Note, Ping, Pong
from tests.test_tls import make_certificate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux's epoll and pidfds are asked")

LARGE = 200_000  # bytes: more than a pipe holds, and than one read takes
PATIENCE = 5.0  # seconds until something counts as a hang; all of a run takes some milliseconds
POLLS = 1500  # of one run; as a rule it takes less than a tenth of these
SECONDS = float(os.environ.get("STREAM_IPC_FAULT_SECONDS", "0"))
CONTEXTS: Dict[str, Any] = {}


class Side:
    """One end of a conversation: what it has sent and what it has got."""

    def __init__(self, talk: "Talk", session: Session) -> None:
        self.talk = talk
        self.session = session
        self.sent: List[int] = []  # all notes, in order
        self.uncertain: Set[int] = set()  # those whose call was interrupted
        self.refused: Set[int] = set()  # those whose call said that nothing was sent
        self.heard: List[int] = []
        self.served: List[int] = []
        self.unreadable: List[str] = []  # what says that a message could not be decoded
        self.failures: List[BaseException] = []
        self.promises: Dict[int, ResponsePromise[Pong]] = {}
        self.told: Counter[int] = Counter()  # how often the callback of a promise was called
        self.closed = 0
        session.on_message(self.on_note)
        session.on_message(self.on_error)
        session.on_request(self.on_request)
        session.on_exception(self.on_exception)
        session.on_close(self.on_close)

    def on_note(self, note: Note) -> None:
        self.heard.append(note.data[0])

    def on_error(self, error: ErrorMessage) -> None:
        self.unreadable.append(error.message)

    def on_request(self, ping: Ping) -> Pong:
        number, size = ping.value
        self.served.append(number)
        return Pong([number, "p" * size])

    def on_exception(self, error: BaseException) -> bool:
        self.failures.append(error)
        return not isinstance(error, MemoryError)  # for lack of memory now: there may be some the next time

    def on_close(self, session: Session) -> None:
        self.closed += 1

    def note(self, number: int, size: int = 10) -> None:
        self.sent.append(number)
        error = self.talk.attempt(self.session.notify, Note("n", [number, "n" * size]), errors=IpcError)
        if isinstance(error, SerializationError):
            self.refused.add(number)
        elif error is not None:
            self.uncertain.add(number)

    def ask(self, number: int, size: int = 10) -> None:
        def ask() -> None:
            promise = self.session.request(Ping([number, size]), timeout=self.talk.timeout, expect=Pong)
            self.promises[number] = promise
            promise.add_done_callback(lambda promise: self.told.update([number]))

        self.talk.attempt(ask, errors=IpcError)

    @property
    def certain(self) -> List[int]:
        """The notes that must arrive as long as the session does not end."""
        return [number for number in self.sent if number not in self.uncertain and number not in self.refused]

    @property
    def is_open(self) -> bool:
        return self.session.is_open


class Talk:
    """One run: two peers, a conversation between them, and another that must not suffer from what happens to the first."""

    def __init__(self, faults: Faults, own_peer: bool, serializer: Any, place: Union[RingAt, Alarms, None]) -> None:
        self.faults = faults
        self.peers: List[IpcPeer] = []
        self.sides: List[Side] = []
        self.raised: List[BaseException] = []
        self.owned: List[Any] = []  # what is not a session's yet: sockets, and descriptors with what they are
        self.serializer = serializer
        self.own_peer = own_peer
        self.place = place
        # Only a reply or the end of the session settles a request, unless it may be lost as one that cannot be decoded.
        self.timeout: Optional[float] = None

    def attempt(self, function: Callable[..., Any], *args: Any, errors: Any = ()) -> Optional[BaseException]:
        """Call as a program does that survives what it is told; anything but that is a fault of the package."""
        allowed = (*INTERRUPTIONS.values(), MemoryError, *(errors if isinstance(errors, tuple) else (errors,)))
        try:
            with self.place or nullcontext():
                function(*args)
            return None
        except allowed as exc:
            if self.place is not None and exc is self.place.error:
                self.faults.fired.append(f"call {self.place.number} of place ({self.place.where}): {self.place.effect}")
            self.raised.append(exc)
            return exc

    def insist(self, function: Callable[..., Any], *args: Any) -> None:
        """Call until it is neither interrupted nor out of memory."""
        for _ in range(8):
            if self.attempt(function, *args) is None:
                return
        raise AssertionError(f"{function} goes on raising {self.raised[-1]!r}")

    # -- the parts of a run

    def begin(self) -> bool:
        """Make the peers and the bystanders; returns whether that was possible."""
        serializer = self.serializer()
        for _ in range(2 if self.own_peer else 1):
            error = self.attempt(lambda: self.peers.append(IpcPeer(serializer, timeout=PATIENCE)), errors=OSError)
            if error is not None:
                return False
        pair = socket.socketpair()
        self.faults.spared.update(sock.fileno() for sock in pair)
        self.owned += pair
        plan, self.faults.plan = self.faults.plan, {}
        self.bystanders = [peer.create_socket_session(sock) for peer, sock in zip((self.peers * 2)[:2], pair)]
        for session in self.bystanders:
            session.on_request(lambda ping: Pong(ping.value))
        self.faults.plan = plan
        return True

    def own(self, fd: int) -> int:
        status = os.fstat(fd)
        self.owned.append((fd, status.st_dev, status.st_ino))
        return fd

    def converse(self) -> None:
        """Say all kinds of things both ways."""
        for side in self.sides:
            side.note(1)
            side.ask(2)
        self.turn()
        first, last = self.sides[0], self.sides[-1]

        def gather() -> None:
            with first.session.batch():
                for number in (3, 4, 5):
                    first.note(number)
                first.ask(6)

        self.attempt(gather, errors=IpcError)
        last.note(7, LARGE)
        first.ask(8, LARGE)
        first.note(9, LARGE)
        last.note(10)
        self.attempt(lambda: write(first.session), errors=IpcError)
        last.ask(11)
        self.drive(self.is_over)
        for side in self.sides:
            side.ask(12)
        self.drive(self.is_over)

    def turn(self) -> None:
        for peer in self.peers:
            self.attempt(peer.tick, 0)

    def drive(self, done: Callable[[], Any]) -> None:
        """Tick until it is so."""
        end = time.monotonic() + PATIENCE
        turns = 0
        while not done():
            turns += 1
            for peer in self.peers:
                self.attempt(peer.tick, 0 if turns < 50 else 0.002)
            assert time.monotonic() < end, f"it hangs: {self.state()}"

    def state(self) -> str:
        lines = [f"{side.session!r} sent {side.sent} heard {side.heard} told {side.told}" for side in self.sides]
        return "\n".join([*lines, *map(repr, self.raised)])

    def is_over(self) -> bool:
        if not all(side.is_open for side in self.sides):
            return not any(side.is_open for side in self.sides)
        for side, other in zip(self.sides, reversed(self.sides)):
            if not all(promise.done for promise in side.promises.values()) or side.session.queued_bytes:
                return False
            if len(set(side.certain) - set(other.heard)) > len(other.unreadable):
                return False
        return True

    def check_messages(self) -> None:
        """Nothing came twice or out of order, and nothing is lost unless its sender was told."""
        for side, other in zip(self.sides, reversed(self.sides)):
            assert other.heard == sorted(set(other.heard)), f"heard {other.heard}"
            assert set(other.heard) <= set(side.sent) - side.refused, f"heard {other.heard}, refused {side.refused}"
            assert max(Counter(other.served).values(), default=1) == 1, f"served {other.served}"
            if side.is_open:
                lost = set(side.certain) - set(other.heard)
                assert len(lost) <= len(other.unreadable), f"lost {lost}: {self.state()}"
                assert all(promise.done for promise in side.promises.values()), self.state()

    def check_idleness(self) -> None:
        """Nothing keeps a tick awake that has nothing to do."""
        for peer in self.peers:
            before = self.faults.counts.get("epoll.poll", 0)
            self.attempt(peer.tick, 0.001)
            polls = self.faults.counts.get("epoll.poll", 0) - before
            assert polls <= 6, f"{polls} polls while nothing happens"

    def check_bystanders(self) -> None:
        for session in self.bystanders:
            self.check_bystander(session)

    def check_bystander(self, session: Session) -> None:
        assert session.is_open, f"{session!r}: {session.reason}"
        while True:
            promises: List[Any] = []
            while not promises:
                self.attempt(lambda: promises.append(session.request(Ping(["x", 1]), expect=Pong)))  # noqa: B023
            self.drive(lambda: promises[0].done)  # noqa: B023
            reply = outcome(promises[0])
            if isinstance(reply, Pong):
                break
            # A signal handler has raised just as the handler was called or had returned.
            assert isinstance(reply, RemoteError) and self.raised, reply
            assert type(self.raised[-1]).__name__ in str(reply)
        assert reply.value == ["x", 1]

    def end(self) -> None:
        """Close everything; what a call left because it was interrupted is done by the next."""
        for side in self.sides:
            self.insist(side.session.close)
            self.drive(lambda: not any(other.is_open for other in self.sides))
        for peer in self.peers:
            self.insist(peer.close)

    def check_end(self) -> None:
        for side in self.sides:
            assert side.closed == 1, f"on_close was called {side.closed} times"
            for number, promise in side.promises.items():
                assert promise.done, f"request {number} was never settled"
                outcomes = [outcome(promise) for _ in range(2)]
                assert outcomes[0] is outcomes[1]
                if side.told[number] != 1:  # unless the call that registers the callback was interrupted
                    assert not side.told[number] and self.faults.hits(INTERRUPTIONS), f"told {side.told}"
                if isinstance(outcomes[0], Pong):
                    assert outcomes[0].value[0] == number
        polls = self.faults.counts.get("epoll.poll", 0)
        assert polls < POLLS, f"{polls} polls"

    def clean_up(self) -> None:
        """Close what no session has taken."""
        for what in self.owned:
            if isinstance(what, socket.socket):
                what.close()
                continue
            fd, *identity = what
            try:
                status = os.fstat(fd)
            except OSError:
                continue
            if [status.st_dev, status.st_ino] == identity:
                refused = any(kind == "os.set_blocking" for kind, _ in self.faults.effects)
                assert refused or os.get_blocking(fd), f"descriptor {fd} was left without its flags"
                os.close(fd)


def write(session: Session) -> None:
    """Write what the stream takes now."""
    try:
        session.flush(0)
    except TimeoutError as exc:
        if isinstance(exc, tuple(INTERRUPTIONS.values())):
            raise


def outcome(promise: "ResponsePromise[Any]") -> Any:
    try:
        return promise.wait(0)
    except (IpcError, MemoryError) as exc:
        return exc


# -- scenarios


def over_pipes(talk: Talk) -> None:
    (read, write), (read_back, write_back) = os.pipe(), os.pipe()
    for fd in (read, write, read_back, write_back):
        talk.own(fd)
    for peer, fds in zip(talk.peers, ((write, read_back), (write_back, read))):
        talk.sides.append(Side(talk, peer.create_stream_session(*fds)))


def over_socketpair(talk: Talk) -> None:
    pair = socket.socketpair()
    talk.owned += pair
    for peer, sock in zip(talk.peers, pair):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        talk.sides.append(Side(talk, peer.create_socket_session(sock)))


def over_session_pair(talk: Talk) -> None:
    talk.sides += [Side(talk, session) for session in talk.peers[0].create_session_pair()]


def by_connecting(talk: Talk, address: Any, **contexts: Any) -> None:
    server, client = contexts.get("server"), contexts.get("client")
    taken: List[Side] = []
    listener = talk.peers[-1].listen(address, lambda session: taken.append(Side(talk, session)), ssl_context=server)
    session = talk.peers[0].connect(listener.address, ssl_context=client)
    talk.sides.append(Side(talk, session))
    talk.drive(lambda: taken or not session.is_open or talk.raised)
    if not taken:
        talk.sides.clear()  # nobody to talk with
    talk.sides += taken


def over_tcp(talk: Talk) -> None:
    by_connecting(talk, ("127.0.0.1", 0))


def over_unix(talk: Talk) -> None:
    by_connecting(talk, f"/tmp/stream-ipc-faults-{os.getpid()}")


def over_tls(talk: Talk) -> None:
    by_connecting(talk, ("127.0.0.1", 0), **CONTEXTS)


def with_child(talk: Talk) -> None:
    """A child that says everything back, so that the session talks with itself."""
    talk.sides.append(Side(talk, talk.peers[0].create_command_session(["cat"])))


def with_stubborn_child(talk: Talk) -> None:
    """One that has to be killed, with its group."""
    command = ["sh", "-c", "trap '' TERM; cat; exec sleep 60"]
    talk.sides.append(Side(talk, talk.peers[0].create_command_session(command, start_new_session=True)))


SCENARIOS: Dict[str, Tuple[Callable[[Talk], None], bool, Any]] = {
    "pipes": (over_pipes, True, PickleMessageSerializer),
    "socketpair": (over_socketpair, True, JsonMessageSerializer),
    "session pair": (over_session_pair, False, PickleMessageSerializer),
    "tcp": (over_tcp, True, PickleMessageSerializer),
    "unix": (over_unix, True, PhpMessageSerializer),
    "tls": (over_tls, False, PickleMessageSerializer),
    "child": (with_child, False, PickleMessageSerializer),
    "stubborn child": (with_stubborn_child, False, JsonMessageSerializer),
}


@pytest.fixture(autouse=True)
def everything_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {
        "check interval": 0.02,
        "exit grace": 0.03,
        "terminate grace": 0.03,
        "kill grace": 2.0,
        "flush bound": 0.3,
        "listener pause": 0.005,
    }.items():
        set_limit(name, seconds, monkeypatch)
    monkeypatch.setattr(logging.getLogger("stream_ipc"), "propagate", False)


@pytest.fixture(scope="module", autouse=True)
def certificates(tmp_path_factory: pytest.TempPathFactory) -> None:
    if shutil.which("openssl") is None:
        return
    made = make_certificate(tmp_path_factory.mktemp("faults"), "server")
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(made.crt, made.key)
    client.load_verify_locations(made.crt)
    CONTEXTS.update(server=server, client=client)


class Complaints(logging.Handler):
    """What the package has logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.texts.append(text if not record.exc_info else f"{text} {record.exc_info[1]!r}")

    def __enter__(self) -> "Complaints":
        logging.getLogger("stream_ipc").addHandler(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        logging.getLogger("stream_ipc").removeHandler(self)


def run(
    name: str, plan: Optional[Plan] = None, memory: Optional[NoMemoryAt] = None, place: Union[RingAt, Alarms, None] = None
) -> int:
    """Run a scenario once with what is to fail, and check everything.

    Args:
        name: Which scenario.
        plan: Which calls of the system fail.
        memory: At which place in what turns messages into bytes there is no memory.
        place: At which place a signal handler raises.

    Returns:
        How many failures that were.
    """
    faults = Faults(plan or {})
    play(name, faults, memory, place)
    return len(faults.fired) + (memory is not None and memory.hit)


def calls_of(name: str) -> Dict[str, int]:
    """How many calls of each kind a run makes."""
    faults = Faults({})
    play(name, faults, None, None)
    return faults.counts


def play(name: str, faults: Faults, memory: Optional[NoMemoryAt], place: Union[RingAt, Alarms, None]) -> None:
    """Run a scenario, and check everything."""
    if name == "tls" and not CONTEXTS:
        pytest.skip("the openssl command is not installed")
    opener, own_peer, serializer = SCENARIOS[name]
    before = open_descriptors()
    start = time.monotonic()
    with Complaints() as complaints, faults:
        try:
            talk = Talk(faults, own_peer, serializer, place)
            talk.timeout = None if memory is None else 0.1
            try:
                act(talk, opener, memory)
            finally:
                talk.clean_up()
            seconds = time.monotonic() - start
            assert seconds < PATIENCE - 0.5, f"it hangs until its time is over: {seconds} s"
            if place is not None and place.hit and not faults.fired:
                raise AssertionError("it was swallowed")
            judge(talk, complaints.texts, memory)
            del talk
            if place is not None:
                place.error = None  # and what its traceback holds
            check_nothing_is_left(faults, before)
        except Exception as exc:
            at = [one.where for one in (memory, place) if one is not None]
            happened = "; ".join([*faults.fired, *at])
            text = str(exc) if isinstance(exc, AssertionError) else repr(exc)
            raise AssertionError(f"{name}: after {happened}: {text}") from exc


def act(talk: Talk, opener: Callable[[Talk], None], memory: Optional[NoMemoryAt]) -> None:
    opened = False
    try:
        if not talk.begin():
            return
        error = talk.attempt(opener, talk, errors=(OSError, ValueError))
        opened = error is None and len(talk.sides) > 0 and all(side.is_open for side in talk.sides)
        if opened:
            if memory is None:
                talk.converse()
            else:
                with memory:
                    talk.converse()
        talk.check_messages()
        if opened and all(side.is_open for side in talk.sides):
            talk.check_idleness()
        talk.check_bystanders()
        if error is None:
            check_harmless(talk)
    finally:
        talk.end()
    talk.check_end()


def check_harmless(talk: Talk) -> None:
    """What is tried again, or was interrupted, ends no session; and what was interrupted says so, once."""
    if talk.faults.is_harmless:
        ended = [f"{side.session!r}: {side.session.reason}" for side in talk.sides if not side.is_open]
        assert not ended, f"it ended: {ended}"


def judge(talk: Talk, complaints: List[str], memory: Optional[NoMemoryAt]) -> None:
    """What was raised and logged must be what was injected, in some form."""
    faults = talk.faults
    fired = [effect for _, effect in faults.effects]
    expected = Counter(INTERRUPTIONS[effect] for effect in fired if effect in INTERRUPTIONS)
    seen = Counter(type(exc) for exc in talk.raised if type(exc) in expected)
    # Of two signals that are held back one is enough.
    is_right = seen == expected or (len(fired) > 1 and seen and not seen - expected)
    assert is_right, f"of what the handler raised, {dict(seen)} has come out: {talk.raised}"
    if memory is None and not set(fired) & {*INTERRUPTIONS, NO_MEMORY} and faults.is_harmless:
        assert not talk.raised, f"raised {talk.raised}"
    # The last is said of a session that nobody has got.
    known = ("cannot accept", "still runs after SIGKILL", "has no on_exception handler for InvalidStreamError")
    unknown = [text for text in complaints if not any(part in text for part in known)]
    assert not unknown, f"logged {unknown}"


def check_nothing_is_left(faults: Faults, before: Set[str]) -> None:
    left = open_descriptors() - before
    if left:
        gc.collect()
        left = open_descriptors() - before
    assert not left, f"descriptors are left: {left}"
    running = [pid for pid in own_children if not is_reaped(pid)]
    own_children.clear()
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if any(kind in ("os.kill", "os.killpg") for kind, _ in faults.effects):
        gc.collect()  # what finalizers say of it
        return  # it was told that it cannot be killed
    assert not running, f"children are left: {running}"
    said = faults.unraisable
    if any(kind == "place" for kind, _ in faults.effects):
        # Lost before anybody had it, and closed.
        said = [text for text in said if not re.search(r"unclosed <(socket|ssl\.SSLSocket)", text)]
    assert not said, f"raised in a finalizer: {said}"


def is_reaped(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return False
    except ChildProcessError:
        return True


def cases(name: str, most: int) -> Iterator[Dict[str, Any]]:
    """One fault at a time: each effect of each kind of call, at so many of its calls, spread over the run."""
    for kind, count in sorted(calls_of(name).items()):
        for number in spread(count, most):
            for effect in EFFECTS[kind]:
                yield {"name": name, "plan": {kind: {number: effect}}}


def places(name: str, most: int) -> Iterator[Dict[str, Any]]:
    """A handler that raises at so many places of the package's code, one at a time."""
    place = RingAt(0, next(iter(INTERRUPTIONS)))
    run(name, place=place)
    effects = list(INTERRUPTIONS)
    for number in spread(place.count, most):
        yield {"name": name, "place": RingAt(number, effects[number % len(effects)])}


def without_memory(name: str, most: int) -> Iterator[Dict[str, Any]]:
    """A lack of memory at so many places of what turns messages into bytes and back, one at a time."""
    memory = NoMemoryAt(0)
    run(name, memory=memory)
    for number in spread(memory.count, most):
        yield {"name": name, "memory": NoMemoryAt(number)}


def spread(count: int, most: int) -> List[int]:
    """Numbers from 1 to count, at most so many."""
    if count <= most:
        return list(range(1, count + 1))
    shift = random.random()
    return sorted({1 + int((index + shift) * count / most) for index in range(most)})


def run_all(faults: Iterable[Dict[str, Any]]) -> int:
    """Make a run with each of some faults, what ``run`` is to be called with, and report all that went wrong at once."""
    injected = 0
    problems: List[str] = []
    for fault in faults:
        try:
            injected += run(**fault)
        except AssertionError as exc:
            problems.append(str(exc).partition("\n")[0])
            print(problems[-1])  # below the seed of this run
    print(f"{injected} failures injected")
    assert not problems, f"{len(problems)} of {injected}:\n" + "\n".join(problems)
    return injected


# Of what fails at a place of a run: the scenarios, how many places are tried and how many failures there must be. A run
# with a child or with TLS takes longer.
SWEEPS: Dict[Callable[[str, int], Iterator[Dict[str, Any]]], Tuple[Iterable[str], int, int]] = {
    cases: (SCENARIOS, 10, 51),
    places: (SCENARIOS, 150, 10),
    without_memory: (["pipes", "socketpair", "unix", "tls", "child"], 100, 20),
}
FEWER = {
    (cases, "tls"): 3,
    (cases, "child"): 3,
    (cases, "stubborn child"): 1,
    (places, "tls"): 60,
    (places, "child"): 100,
    (places, "stubborn child"): 20,
    (without_memory, "tls"): 60,
    (without_memory, "child"): 60,
}


# What once went wrong: each call of a kind, in one way.
FOUND = [
    ("child", "os.set_blocking", "EPERM"),  # a child ran on
    ("child", "os.waitid", "signal, TimeoutError"),  # what a handler raised was swallowed...
    ("child", "subprocess.read", "signal, Exception"),  # a child that had just started ran on
    ("pipes", "os.fstat", "ENOMEM"),  # streams were taken for closed, and left open
    ("pipes", "os.set_blocking", "EPERM"),  # a pipe was left open
    ("tcp", "epoll.poll", "signal, TimeoutError"),  # ...or taken for the end of the time to connect
    ("tcp", "os.fstat", "EIO"),  # a socket that nobody had was left open; a listener took itself for closed
    ("tls", "epoll.register", "ENOMEM"),  # nobody went on with a handshake
    ("tcp", "os.read", NO_MEMORY),  # "closing the streams failed", and they were left open
]


@pytest.mark.parametrize(("name", "kind", "effect"), FOUND)
def test_what_was_found(name: str, kind: str, effect: str) -> None:
    assert effect in EFFECTS[kind]
    numbers = range(1, min(calls_of(name)[kind], 24) + 1, 1 + places_apart() // 2)
    # How often the system is asked for a child is a matter of time.
    assert 1 <= run_all({"name": name, "plan": {kind: {number: effect}}} for number in numbers) <= len(numbers)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "stubborn child"])
def test_one_call_of_each_kind_fails(name: str) -> None:
    for seed in seeds(1):
        random.seed(seed)
        chosen = list(cases(name, 1))
        assert run_all(random.sample(chosen, 5 if "child" in name else 8)) >= 3


@pytest.mark.parametrize("name", ["pipes", "tcp", "child"])
def test_a_signal_handler_raises_at_some_places(name: str) -> None:
    for seed in seeds(1):
        random.seed(seed)
        assert run_all(places(name, 8)) >= 4


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("sweep", "name"), [(sweep, name) for sweep, (names, _, _) in SWEEPS.items() for name in names])
def test_something_fails_once(sweep: Callable[[str, int], Iterator[Dict[str, Any]]], name: str) -> None:
    """Each call of the system; what a signal handler interrupts; the memory for a message."""
    _, most, least = SWEEPS[sweep]
    for seed in seeds(1):
        random.seed(seed)
        assert run_all(sweep(name, FEWER.get((sweep, name), most))) >= least


def as_long_as(seconds: float) -> Iterator[None]:
    """Runs until the time is over, each with a seed of its own."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for seed in seeds(1):
            random.seed(seed)
            yield


def several(seconds: float) -> Iterator[Dict[str, Any]]:
    """Two or three faults in one run."""
    calls = {name: sorted(calls_of(name).items()) for name in SCENARIOS}
    for _ in as_long_as(seconds):
        name = random.choice([name for name in SCENARIOS if name != "stubborn child"])
        plan: Plan = {}
        for _ in range(random.choice((1, 2, 2, 3))):
            kind, most = random.choice(calls[name])
            plan.setdefault(kind, {})[random.randrange(most) + 1] = random.choice(EFFECTS[kind])
        yield {"name": name, "plan": plan}


def alarms(name: str, seconds: float) -> Iterator[Dict[str, Any]]:
    """Signals at any time."""
    for _ in as_long_as(seconds):
        yield {"name": name, "place": Alarms(random.choice((1, 2, 3)))}


@pytest.mark.skipif(not SECONDS, reason="STREAM_IPC_FAULT_SECONDS says for how long")
@pytest.mark.timeout(SECONDS + 120)
def test_several_faults_at_a_time() -> None:
    """For as long as one likes: the later ones meet what the first has left."""
    assert run_all(several(SECONDS))


@pytest.mark.timeout(2 * SECONDS + 120)
@pytest.mark.parametrize("name", ["pipes", "tcp", "child"])
def test_real_alarms(name: str) -> None:
    """Signals come when they come: between any two instructions, and in the middle of calls of the system."""
    end = time.monotonic() + 4 * PATIENCE
    while not run_all(alarms(name, max(SECONDS / 3, span(0.8)))):  # on a busy machine none may have come yet
        assert time.monotonic() < end
