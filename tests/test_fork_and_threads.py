"""Copies of a peer in forked processes, several threads, the end of the interpreter."""

import contextlib
import gc
import os
import queue
import signal
import sys
import threading
import time
from typing import Any, Callable, List, Tuple

import pytest

from stream_ipc import (
    IpcPeer,
    Message,
    PickleMessageSerializer,
    PidCounterRequestIdGenerator,
    WorkerPool,
    as_completed,
    gather,
)
from tests.helpers import ActingSerializer, RawPeer, framed, run_python, share, tick_until, unframe
from tests.messages import Note, Ping, Pong
from tests.os_helpers import listing

# -- fork


def in_fork(function: Callable[[], Any]) -> str:
    """What a function returns in a forked process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "nothing"
        try:
            text = function() or "fine"
        except BaseException as exc:
            text = f"{type(exc).__name__}: {exc}"
        finally:
            os.write(write, text.encode()[:4000])
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as reader:
        text = reader.read().decode()
    os.waitpid(pid, 0)
    return text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wait", [gather, lambda promises: next(as_completed(promises))], ids=["gather", "as_completed"])
def test_waiting_for_the_replies_of_two_peers_is_refused_in_a_fork(peer: IpcPeer, wait: Callable[..., Any]) -> None:
    with IpcPeer() as other:
        promises = [each.create_session_pair()[0].request(Ping()) for each in (peer, other)]

        def use() -> str:
            signal.alarm(10)  # ends it: the call must not turn for ever
            wait(promises)
            return "it has waited"

        assert in_fork(use).startswith("RuntimeError: this IpcPeer belongs to the process that made it")
        for promise in promises:
            promise.cancel()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_leaves_all_blocks_with_what_it_has_raised(peer: IpcPeer) -> None:
    session = peer.create_session_pair()[0]
    with contextlib.ExitStack() as blocks:
        listener = peer.listen(("127.0.0.1", 0), print)
        for block in (peer, session, listener, WorkerPool(peer, ["cat"], 1), session.batch(), session.batch()):
            blocks.enter_context(block)

        def leave() -> None:
            with blocks:
                sys.exit("bye")

        assert in_fork(leave) == "SystemExit: bye"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_copy_that_a_handler_forks_stays_a_copy(peer: IpcPeer) -> None:
    read, write = os.pipe()
    main, (a, _) = os.getpid(), peer.create_session_pair()
    peer.fileno()
    a.on_close(lambda session: os.fork())
    a.close()  # comes back twice
    if os.getpid() != main:
        try:
            for call in (peer.tick, peer.create_session_pair, peer.fileno):
                try:
                    call()
                    os.write(write, b"used ")
                except RuntimeError:
                    os.write(write, b"refused ")
        finally:
            os._exit(0)
    os.wait()
    assert os.read(read, 100) == b"refused refused refused "
    assert peer.tick() == 0
    os.close(read)
    os.close(write)


def outcomes_of_a_fork(call: Callable[[], Any]) -> Tuple[str, str]:
    """What becomes of a call that forks: in this process, and in the copy, which then ends."""
    main = os.getpid()
    read, write = os.pipe()
    outcome = "done"
    try:
        call()
    except Exception as exc:
        outcome = f"{type(exc).__name__}: {exc}"
    if os.getpid() != main:
        os.write(write, outcome.encode())
        os._exit(0)
    os.wait()
    in_copy = os.read(read, 1000).decode()
    os.close(read)
    os.close(write)
    return outcome, in_copy


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", ["request with a new id", "request", "notify", "broadcast"])
def test_copy_that_is_forked_in_the_middle_of_a_send_is_refused(call: str) -> None:
    class Forking(PidCounterRequestIdGenerator):
        def generate(self) -> str:
            if call == "request with a new id":
                os.fork()
            return super().generate()

    serializer = ActingSerializer(Message)
    with IpcPeer(serializer, Forking()) as peer, RawPeer(peer) as raw:
        serializer.act = None if call == "request with a new id" else os.fork
        send = peer.broadcast if call == "broadcast" else getattr(raw.session, call.split()[0])
        here, in_copy = outcomes_of_a_fork(lambda: send(Ping()))
        assert in_copy.startswith("RuntimeError: this IpcPeer belongs to the process that made it")
        assert here == "done" and len(raw.messages()) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and pidfds")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_copy_closes_its_copies_of_all_descriptors(peer: IpcPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(listing())
    (read, write), (read2, write2) = os.pipe(), os.pipe()
    # One that is opened again, to be written without blocking.
    share(monkeypatch, write)
    shared = peer.create_stream_session(write, read2)
    started = peer.create_command_session(["cat"])
    assert len(set(listing()) - before) >= 8

    def close() -> str:
        for session in peer.sessions:
            session.close()
        for fd in (read, write2):
            os.close(fd)
        return "\n".join(set(listing()) - before)

    left = in_fork(close).splitlines()
    assert len(left) == 2 and all("pipe:" in name for name in left)  # the pipe through which it tells
    started.close()
    shared.close()
    os.close(read)
    os.close(write2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_copy_in_a_forked_process_refuses_to_be_used(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        session = raw.session
        promise = session.request(Ping(), expect=Pong)
        raw.read()
        calls: List[Any] = [
            lambda: session.notify(Note()),
            lambda: session.request(Ping()),
            lambda: session.tick(),
            lambda: session.tick(None),
            lambda: session.flush(),
            lambda: session.receive(0),
            lambda: promise.wait(),
            lambda: peer.tick(),
            lambda: peer.tick(None),
            lambda: peer.tick_for(0),
            lambda: peer.broadcast(Note()),
            lambda: peer.create_session_pair(),
            lambda: peer.fileno(),
            lambda: peer.remove_session(session),
        ]

        def use() -> str:
            wrong = []
            for number, call in enumerate(calls):
                try:
                    call()
                    wrong.append(f"call {number} worked")
                except RuntimeError as exc:
                    if "process" not in str(exc):
                        wrong.append(f"call {number}: {exc}")
            session.close()
            peer.close()
            repr(session), repr(peer), repr(promise)
            return "; ".join(wrong)

        assert in_fork(use) == "fine"
        assert raw.read() == b""  # nothing was sent from there
        raw.write(framed(Note("to the parent")))
        # The parent goes on, and its descriptors are still watched.
        assert session.receive(20) == Note("to the parent")
        session.notify(Note("from the parent"))
        assert raw.messages() == [Note("from the parent")]
        promise.cancel()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_process_may_make_a_peer_of_its_own(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(ping.value))
    ids = [a.request(Ping()).id]

    def use() -> str:
        with IpcPeer() as own:
            c, d = own.create_session_pair()
            d.on_request(lambda ping: Pong(ping.value))
            promise = c.request(Ping(3), expect=Pong)
            assert promise.wait().value == 3
            return promise.id

    other = in_fork(use)
    assert other not in ids and other.rsplit(".", 1)[0] != ids[0].rsplit(".", 1)[0]
    assert a.request(Ping(1), expect=Pong).wait().value == 1


@pytest.mark.matrix
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("way", ["close", "exit"])
def test_exit_of_a_forked_process_flushes_and_ends_nothing(way: str) -> None:
    # The whole of it in a process of its own, because the fork ends as a program does.
    done = run_python(
        """
import os, socket, sys, gc, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from stream_ipc import IpcPeer
from tests.helpers import role
from tests.messages import Note, Ping, Pong
peer = IpcPeer(timeout=20)
left, right = socket.socketpair()
session = peer.create_socket_session(left)
command = peer.create_command_session(role("echo"))
session.notify(Note(data=b"x" * 700000))
queued = session.queued_bytes
assert queued
pid = os.fork()
if pid == 0:
    warnings.simplefilter("ignore", ResourceWarning)  # as for anything that is open across a fork
    if sys.argv[1] == "close":
        peer.close()
    sys.exit(0)
_, status = os.waitpid(pid, 0)
assert status == 0, status
assert session.queued_bytes == queued
assert command.request(Ping(1), expect=Pong).wait().value == 1
received = 0
right.setblocking(False)
while True:
    try:
        received += len(right.recv(1 << 20))
    except BlockingIOError:
        if not session.queued_bytes:
            break
        peer.tick()
assert 700000 < received < 700200, received
peer.close()
right.close()
print("fine")
""",
        way,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["peer", "session"])
def test_close_in_a_forked_process_lets_go_of_the_descriptors(peer: IpcPeer, how: str) -> None:
    # Otherwise the other side sees no end of the stream for as long as the copy lives.
    with RawPeer(peer) as raw:
        session = raw.session
        fd = session.transport.read_fds()[0]
        session.notify(Note("queued", b"x" * 700000))
        queued = session.queued_bytes

        def use() -> str:
            (peer if how == "peer" else session).close()
            try:
                os.fstat(fd)
            except OSError:
                return "closed"
            return "still open"

        assert in_fork(use) == "closed"
        assert session.is_open and session.queued_bytes == queued
        data = raw.read()
        while session.queued_bytes:
            peer.tick()
            data += raw.read()
        assert len(unframe(data)) == 1


# -- threads


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function returns or raises in another thread."""
    results: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            results.put(function())
        except BaseException as exc:
            results.put(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    return results.get_nowait()


def test_two_threads_at_once_are_an_error(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        results: List[Any] = []
        session = raw.session
        promise = session.request(Ping())
        raw.read()

        @session.on_message
        def handler(note: Note) -> None:
            # This thread is inside a tick for as long as the other one tries.
            calls: List[Any] = [
                lambda: session.notify(Note()),
                lambda: session.request(Ping()),
                lambda: session.tick(),
                lambda: session.flush(),
                lambda: session.receive(0),
                lambda: session.close(),
                lambda: promise.wait(0),
                lambda: peer.tick(),
                lambda: peer.broadcast(Note()),
                lambda: peer.create_session_pair(),
                lambda: peer.remove_session(session),
                lambda: peer.close(),
                lambda: session.on_message(print),
                lambda: session.on_request(print),
                lambda: session.on_exception(print),
                lambda: session.on_close(print),
                lambda: session.off_message(handler),
            ]
            for call in calls:
                results.append(in_thread(call))

        raw.write(framed(Note("1")))
        tick_until(lambda: results, peer)
        assert [type(result) for result in results] == [RuntimeError] * 17
        assert all("thread" in str(result) for result in results)
        assert raw.read() == b"" and session.is_open and peer.sessions == (session,)
        raw.write(framed(Note("2")))
        tick_until(lambda: len(results) == 34, peer)


class SlowSerializer(PickleMessageSerializer):
    """Encodes a message of which the value is a function only after this has returned."""

    def serialize(self, message: Message) -> bytes:
        content: Any = getattr(message, "request", message)
        if callable(content.value):
            content.value()
            content.value = None
        return super().serialize(message)


@pytest.mark.parametrize("how", ["notify", "request", "broadcast"])
def test_thread_that_sends_keeps_the_others_out(how: str) -> None:
    with IpcPeer(serializer=SlowSerializer()) as peer, RawPeer(peer) as raw:
        results: List[Any] = []
        session = raw.session
        promise = session.request(Ping())
        calls: List[Any] = [
            lambda: session.notify(Ping()),
            lambda: session.request(Ping()),
            lambda: session.tick(),
            lambda: session.flush(),
            lambda: peer.broadcast(Ping()),
            lambda: promise.cancel(),
            lambda: promise.add_done_callback(print),
            lambda: session.close(),
        ]

        def try_all() -> None:
            results.extend([in_thread(call) for call in calls])

        send: Any = peer.broadcast if how == "broadcast" else getattr(session, how)
        send(Ping(try_all))
        assert [type(result) for result in results] == [RuntimeError] * len(calls)
        assert len(raw.messages()) == 2 and session.is_open and not promise.settled


@pytest.mark.parametrize("how", ["cancel", "add_done_callback"])
def test_thread_in_a_done_callback_keeps_the_others_out(peer: IpcPeer, how: str) -> None:
    with RawPeer(peer) as raw:
        results: List[Any] = []
        promise = raw.session.request(Ping())

        def callback(promise: Any) -> None:
            results.append(in_thread(lambda: raw.session.notify(Note())))

        if how == "cancel":
            promise.add_done_callback(callback)
            promise.cancel()
        else:
            promise.cancel()
            promise.add_done_callback(callback)
        assert [type(result) for result in results] == [RuntimeError]


def test_thread_that_waits_keeps_the_others_out(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:
        results: List[Any] = []
        thread = threading.Thread(target=lambda: results.append(raw.session.receive(20)))
        thread.start()
        try:
            end = time.monotonic() + 20
            while True:  # until the thread is inside
                assert time.monotonic() < end
                try:
                    raw.session.peer.broadcast(Note())
                except RuntimeError:
                    break
        finally:
            raw.write(framed(Note("there")))
            thread.join(20)
        assert results == [Note("there")]


def test_peer_may_be_handed_from_thread_to_thread(peer: IpcPeer) -> None:
    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong(threading.get_ident()))
    mine = a.request(Ping(), expect=Pong).wait().value
    other = in_thread(lambda: a.request(Ping(), expect=Pong).wait().value)
    assert isinstance(other, int) and mine == threading.get_ident() != other
    promise = in_thread(lambda: a.request(Ping(), expect=Pong))
    assert promise.wait().value == mine


def test_error_in_a_thread_leaves_the_peer_free(peer: IpcPeer) -> None:
    with RawPeer(peer) as raw:

        @raw.session.on_message
        def fails(note: Note) -> None:
            raise LookupError

        raw.write(framed(Note()))
        assert type(in_thread(lambda: peer.tick(20))) is LookupError
        assert peer.tick() == 0


def test_peers_of_several_threads_do_not_disturb_each_other() -> None:
    def work() -> int:
        with IpcPeer(timeout=20) as peer:
            a, b = peer.create_session_pair()
            b.on_request(lambda ping: Pong(ping.value))
            return sum(a.request(Ping(index), expect=Pong).wait().value for index in range(200))

    results: queue.Queue[int] = queue.Queue()
    threads = [threading.Thread(target=lambda: results.put(work())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [results.get_nowait() for _ in threads] == [sum(range(200))] * 4


# -- garbage


def test_open_session_is_kept_by_its_peer(peer: IpcPeer) -> None:
    seen: List[Message] = []
    with RawPeer(peer) as raw:
        raw.session.on_message(seen.append)
        del raw.session
        gc.collect()
        raw.write(framed(Note("x")))
        tick_until(lambda: seen, peer)


def test_closed_sessions_and_settled_promises_are_not_kept(peer: IpcPeer) -> None:
    import weakref

    a, b = peer.create_session_pair()
    b.on_request(lambda ping: Pong())
    promise = a.request(Ping())
    promise.wait()
    watched: List[Any] = [weakref.ref(a), weakref.ref(promise)]
    a.close()
    tick_until(lambda: not peer.sessions, peer)
    del a, b, promise
    gc.collect()
    assert all(ref() is None for ref in watched)


# -- the end of the interpreter


def test_main_thread_that_ends_while_another_is_inside_does_not_hang() -> None:
    # A daemon thread sits in a tick when the interpreter ends.
    done = run_python(
        """
import threading, os
from stream_ipc import IpcPeer
peer = IpcPeer()
a, b = peer.create_session_pair()
threading.Thread(target=peer.tick, args=(None,), daemon=True).start()
while True:
    try:
        peer.broadcast
        a.flush()
    except RuntimeError:
        break
""",
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_daemon_thread_that_ticks_on_at_exit_ends_without_a_word() -> None:
    done = run_python(
        """
import threading
from stream_ipc import IpcPeer
peer = IpcPeer()
session = peer.create_command_session(["sh", "-c", "echo up >&2; cat >/dev/null; echo bye >&2; sleep 0.3"])
said = threading.Event()
session.on_message(lambda message: said.set())
def drive():
    while True:
        peer.tick(0.001)
threading.Thread(target=drive, daemon=True).start()
said.wait()
""",
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_a_collection_during_a_fork_does_not_open_the_copy() -> None:
    # The collector may come while the hook goes through the loops, of which it then removes some.
    done = run_python(
        """
import gc, os
from stream_ipc import IpcPeer
gc.disable()
for number in range(40):
    peers = [IpcPeer() for _ in range(30)]
    for _ in range(3):
        closed = IpcPeer()
        closed.close()
        closed.me = closed
        del closed
    gc.set_threshold(gc.get_count()[0] + number)
    gc.enable()
    pid = os.fork()
    gc.disable()
    if not pid:
        try:
            peers[0].tick()
            os._exit(1)
        except RuntimeError:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    for peer in peers:
        peer.close()
""",
        strict=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_handler_that_forks_after_fileno_leaves_the_parent_ticking(peer: IpcPeer) -> None:
    peer.fileno()
    forked: List[int] = []
    seen: List[str] = []
    with RawPeer(peer) as raw:

        @raw.session.on_message
        def fork(note: Note) -> None:
            seen.append(note.text)
            if note.text == "raise":
                raise LookupError
            if note.text == "fork":
                forked.append(os.fork())
                if forked[-1]:
                    os.waitpid(forked[-1], 0)  # the copy has come out of its tick

        raw.write(framed(Note("raise")), framed(Note("fork")), framed(Note("behind")))
        with pytest.raises(LookupError):
            peer.tick(20)  # the rest stands in the inbox, which the descriptor tells
        try:
            peer.tick(20)
            peer.tick(0)
        finally:
            if forked == [0]:
                os._exit(0)
        tick_until(lambda: seen == ["raise", "fork", "behind"], peer)
        for count, text in enumerate(("more", "and more"), 4):
            raw.write(framed(Note(text)))
            while len(seen) < count:
                assert peer.tick(20) == 1
        assert peer.tick(0) == 0
