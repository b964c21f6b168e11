"""Workers of the tests of pools: ``python -m tests.pool_child [HOW]``. What a task does is said by its Ping."""

import os
import signal
import sys
import time

from stream_ipc import IpcPeer, LogMessage, Message, PickleMessageSerializer, Session, StreamClosedError
from stream_ipc.wire.framing import frame_header
from tests.messages import Note, Ping, Pong


def main(how: str = "", *args: str) -> None:
    if how == "dies":
        sys.exit("no licence")
    if how == "silent":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(60)
    if how == "deaf" and not os.path.exists(args[0]):
        open(args[0], "w").close()
        os.close(0)  # nobody reads its stdin any more, though it lives on
        payload = PickleMessageSerializer().serialize(Note("hello"))
        os.write(1, frame_header(len(payload)) + payload)
        while True:
            time.sleep(60)
    if how == "flaky" and os.urandom(1)[0] < 128:
        os._exit(9)
    session = IpcPeer().create_stdio_session()

    @session.on_request
    def work(ping: Ping, session: Session) -> Message:
        what, *args = ping.value if isinstance(ping.value, tuple) else (ping.value,)
        if what == "pid":
            return Pong(os.getpid())
        if what == "sleep":
            time.sleep(args[0])
        if what == "spin":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                pass
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "exit":
            print("bye", file=sys.stderr)
            os._exit(args[0])
        if what == "error":
            raise ValueError("no good")
        if what == "once" and not os.path.exists(args[0]):
            open(args[0], "w").close()
            os._exit(1)
        if what == "count":
            with open(args[0], "a") as file:
                file.write(f"{args[1]}\n")
        if what == "meet":
            open(os.path.join(args[0], str(os.getpid())), "w").close()
            while len(os.listdir(args[0])) < 2:
                time.sleep(0.001)
        if what == "progress":
            session.notify(LogMessage("half"))
        if what == "late":
            time.sleep(args[0])
        return Pong(ping.value)

    if how in ("hello", "deaf"):
        if how == "hello":
            time.sleep(float(args[0]))
        session.notify(Note("hello"))
    try:
        while True:
            session.tick(None)
    except StreamClosedError:
        pass
    if how == "stays":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
