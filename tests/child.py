"""A child process of the tests: ``python -m tests.child ROLE [ARG...]``.

One place for what children do; each role is a function. A role that wants to be in step with its test reads or writes a
byte on an extra pipe, and does not sleep. What few roles need is imported there: each test that starts a child waits for
its imports.
"""

import os
import signal
import sys
import time
from typing import Callable, Dict, List

from stream_ipc import IpcPeer, LogMessage, Message, Session, StreamClosedError
from tests.messages import Many, Note, Ping, Pong

ROLES: Dict[str, Callable[..., None]] = {}


def role(function: Callable[..., None]) -> Callable[..., None]:
    ROLES[function.__name__] = function
    return function


def serve(session: Session) -> None:
    try:
        while True:
            session.tick(None)
    except StreamClosedError:
        pass


def stdio() -> Session:
    return IpcPeer().create_stdio_session()


@role
def echo() -> None:
    """Answers a Ping with a Pong; a Note comes back as it is."""
    session = stdio()

    @session.on_request
    def answer(ping: Ping) -> Pong:
        return Pong(ping.value)

    @session.on_message
    def back(note: Note) -> None:
        if note.text == "exit":
            sys.exit(int(note.data or 0))
        session.notify(note)

    serve(session)


@role
def work() -> None:
    """Does what a Ping's value says: the calls that tests need a child for."""
    session = stdio()

    @session.on_request
    def do(ping: Ping, session: Session) -> Message:
        what, *args = ping.value
        if what == "exit":
            os._exit(args[0])
        elif what == "sys.exit":
            sys.exit(args[0])
        elif what == "kill":
            os.kill(os.getpid(), args[0])
        elif what == "segfault":
            import ctypes
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            ctypes.string_at(0)
        elif what == "abort":
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.abort()
        elif what == "puts":
            import ctypes

            library = ctypes.CDLL(None)
            library.puts(args[0])
            library.fflush(None)
        elif what == "read stdin":
            return Pong([sys.stdin.read()])
        elif what == "inheritable":
            # As careless a spawn as there can be.
            import subprocess

            subprocess.call(args[0], shell=True, close_fds=False)
        elif what == "background":
            import subprocess

            subprocess.Popen(args[0], shell=True, close_fds=False)
        elif what == "flood stderr":
            left = args[0]
            while left:
                left -= os.write(2, b"e" * min(left, 65536))
        elif what == "close":
            os.close(args[0])
        elif what == "print":
            print(*args, flush=True)
        elif what == "stderr":
            os.write(2, args[0].encode() if isinstance(args[0], str) else args[0])
        elif what == "write1":
            os.write(1, args[0])
        elif what == "system":
            import subprocess

            subprocess.call(["sh", "-c", args[0]])
        elif what == "input":
            try:
                return Pong(input())
            except EOFError:
                return Pong("EOF")
        elif what == "raise":
            raise ValueError(args[0])
        elif what == "flags":
            import fcntl

            return Pong([fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK for fd in (0, 1, 2)])
        elif what == "notify":
            for index in range(args[0]):
                session.notify(Note(str(index)))
        elif what == "none":
            return None  # type: ignore[return-value]
        elif what == "lambda":
            return Pong(lambda: None)
        elif what == "big":
            return Pong(b"x" * args[0])
        elif what == "callback":
            return Pong(session.request(Ping(args[0]), expect=Pong).wait().value)
        elif what == "close stdout":
            # The wire is a private descriptor by now.
            for fd in session.transport.read_fds():
                del fd
            session.transport.close()
            time.sleep(args[0])
        return Pong("done")

    serve(session)


@role
def asks(count: str) -> None:
    """Has so many requests under way, and waits for no reply."""
    session = stdio()
    promises = [session.request(Ping(index), timeout=None) for index in range(int(count))]
    while promises:
        session.tick(None)


@role
def stubborn() -> None:
    """Ignores SIGTERM and the end of its stdin."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    session = stdio()
    session.on_request(lambda ping: Pong("ready"))
    serve(session)
    while True:
        time.sleep(60)


@role
def flood(count: str) -> None:
    """Sends Notes before it ever reads, then answers like echo."""
    session = stdio()
    for index in range(int(count)):
        session.notify(Note(str(index), b"x" * 1000))
    session.on_request(lambda ping: Pong(ping.value))
    serve(session)


@role
def many() -> None:
    """Answers each Ping by asking back."""
    session = stdio()

    @session.on_request
    def ask_back(ping: Ping) -> Pong:
        return Pong(session.request(Ping(ping.value), expect=Pong).wait().value)

    serve(session)


@role
def linger(gate: str, status: str) -> None:
    """Answers, and lives on after the end of its stdin until the gate opens."""
    with open(gate, "rb") as wait:
        session = stdio()
        session.on_request(lambda ping: Pong(ping.value))
        serve(session)
        wait.read()
    os._exit(int(status))


@role
def print_first(text: str) -> None:
    """Prints before it takes its stdio over."""
    sys.stdout.write(text)
    session = stdio()
    session.notify(Note("first"))
    serve(session)


@role
def reply_and_die(notes: str) -> None:
    """Answers the first Ping behind some Notes, and dies of the second."""
    session = stdio()

    @session.on_request
    def answer(ping: Ping) -> Message:
        if ping.value == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        for index in range(int(notes)):
            session.notify(Note(str(index)))
        return Pong(ping.value)

    serve(session)


@role
def leave_a_grandchild(gate: str, how: str = "on request") -> None:
    """Exits, and leaves somebody behind who holds its pipes until the gate opens."""
    import subprocess

    # Before the take-over, so that it gets the pipes themselves.
    subprocess.Popen(["sh", "-c", f"exec cat '{gate}' 3<&0"])
    session = stdio()
    session.notify(Note("before"))
    if how == "on request":
        session.on_request(lambda ping: os._exit(3))
    if how != "at once":
        serve(session)
    os._exit(3)


@role
def chatter(count: str) -> None:
    """Prints and notifies in turn."""
    session = stdio()
    session.receive()
    for index in range(int(count)):
        if index % 10:
            print(f"line{index}")
        else:
            sys.stdout.flush()
            os.write(1, b"line%d\n" % index)
        session.notify(Note(str(index)))
    session.peer.close()


def over_socket(fd: str) -> Session:
    return IpcPeer().create_stream_session(int(fd), int(fd))


@role
def echo_socket(fd: str) -> None:
    """Answers over a socket that it has inherited."""
    session = over_socket(fd)
    session.on_request(lambda ping: Pong(ping.value))
    serve(session)


@role
def flood_first(count: str, size: str, fd: str = "") -> None:
    """Sends all that it has to say before it ticks for the first time, then tells what has come."""
    session = over_socket(fd) if fd else stdio()
    notes = []

    @session.on_message
    def keep(note: Note) -> None:
        notes.append(note.text)

    session.on_request(lambda ping: Pong(notes))
    for index in range(int(count)):
        session.notify(Note(str(index), bytes(int(size))))
    assert notes == []
    serve(session)


@role
def print_at_exit() -> None:
    """Prints while it talks, and when it leaves."""
    import atexit

    session = stdio()
    session.on_request(lambda ping: Pong(ping.value))
    session.on_message(lambda note: sys.exit())
    print("printed meanwhile")
    atexit.register(print, "printed at exit")
    serve(session)


@role
def soak(seed: str) -> None:
    """One end of the soak: answers, calls back, notifies, closes or dies, and tells what came out of order."""
    import faulthandler
    import random

    randomness = random.Random(int(seed))
    faulthandler.register(signal.SIGUSR1)
    session = stdio()
    heard = -1
    said = 0

    def in_order(number: int) -> None:
        nonlocal heard
        if number <= heard:
            session.notify(Note("out of order", [number, heard]))
        heard = number

    def say(size: int) -> None:
        nonlocal said
        said += 1
        session.notify(Note("said", [said, bytes([said % 251]) * size]))

    @session.on_message
    def listen(note: Note) -> None:
        in_order(note.data[0])
        if note.text == "die":
            os._exit(9)
        if note.text == "leave":
            sys.exit(0)
        if note.text == "close":
            session.close()

    @session.on_request
    def answer(ping: Ping) -> Pong:
        number, size, what, body = ping.value
        in_order(number)
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise ValueError(f"asked for {number}")
        if what == "talk":
            for _ in range(randomness.randrange(5)):
                say(randomness.randrange(1, 3000))
        if what == "call back":
            back = session.request(Ping([number, size]), timeout=None, expect=Pong).wait().value
            return Pong([number, len(body), back])
        return Pong([number, len(body), bytes([number % 251]) * size])

    # A nested tick may dispatch later messages before an outer handler is through, but begins them in order.
    serve(session)


@role
def quiet() -> None:
    """Answers, and leaves without a word when it is interrupted."""
    try:
        session = stdio()
        session.on_request(lambda ping: Pong(ping.value))
        serve(session)
    except KeyboardInterrupt:
        sys.exit(130)


@role
def alarmed(kind: str = "Alarm") -> None:
    """Answers with what it was sent, while a signal every millisecond raises an exception out of what is running."""
    from tests.helpers import Alarm, AlarmError, Alarms

    session = stdio()
    seen: List[Message] = []
    session.on_message(seen.append)  # a C function, which nothing can interrupt half way
    interrupted = 0
    session.notify(Note("up"))
    with Alarms(True, AlarmError if kind == "AlarmError" else Alarm) as alarms:
        while not (seen and isinstance(seen[-1], Note) and seen[-1].text == "end"):
            whole, _ = alarms.call(lambda: session.tick(None))
            interrupted += not whole
    session.notify(Many([interrupted, [note.text for note in seen if isinstance(note, Note)]]))
    serve(session)


__all__ = ["LogMessage", "Many"]


def main() -> None:
    ROLES[sys.argv[1].replace(" ", "_")](*sys.argv[2:])


if __name__ == "__main__":
    main()
