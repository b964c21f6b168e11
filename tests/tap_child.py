"""Children for the tests of the tap, which know nothing of the library. Started as ``python tap_child.py ROLE``."""

import os
import signal
import sys


def echo() -> None:
    """Send back each byte, also while more comes than a pipe holds."""
    while True:
        data = os.read(0, 65536)
        if not data:
            return
        while data:
            data = data[os.write(1, data) :]


def swallow() -> None:
    """Read to the end, then say how much that was."""
    count = 0
    while True:
        data = os.read(0, 65536)
        if not data:
            break
        count += len(data)
    os.write(1, str(count).encode())


def hang() -> None:
    """Live on whatever is asked."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.write(1, f"{os.getpid():10}".encode())
    os.close(1)
    while True:
        signal.pause()


def main() -> None:
    signal.alarm(120)  # ends even a child that a failed test has left
    role = sys.argv[1]
    if role == "echo":
        echo()
    elif role == "swallow":
        swallow()
    elif role == "status":
        echo()
        sys.exit(7)
    elif role == "die":
        os.write(1, b"last words")
        os.kill(os.getpid(), int(sys.argv[2]))
    elif role == "wait":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
        os.write(1, b"ready")
        os.read(0, 1)
    elif role == "grandchild":
        import subprocess  # which takes as long as all the rest

        os.write(1, b"before")
        child = subprocess.Popen(
            [sys.executable, "-c", "import os; os.read(int(os.sys.argv[1]), 1)", sys.argv[2]], close_fds=False
        )
        os.write(1, f" {child.pid}".encode())
        os._exit(3)
    elif role == "close-stdout":
        os.write(1, b"bye")
        os.close(1)
        echo_nothing = os.read(0, 1)
        sys.exit(4 if not echo_nothing else 5)
    elif role == "close-stdin":
        os.close(0)
        os.write(1, b"closed")
        signal.pause()
    elif role == "hang":
        hang()
    elif role == "stderr":
        os.write(2, b"a warning\n")
        echo()
        os.write(2, b"bye\n")
    elif role == "interrupted":
        signal.signal(signal.SIGINT, lambda *_: os.write(1, b"interrupted"))
        os.write(1, b"ready")
        echo()


if __name__ == "__main__":
    main()
