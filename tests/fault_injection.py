"""Lets calls of the operating system fail, one at a time and on purpose, and only those that the package makes.

``Faults`` takes the place of every such call while a scenario runs. It counts them by kind, and lets the n-th of a kind
fail in one of the ways in which it can: with an errno, after a single byte, for lack of memory, or because a signal
handler raises in the middle of it. The package binds some functions when an end of a stream is made, so all of a scenario
has to run inside the ``with`` block.

``EINTR`` is no error of most calls: Python makes them again, unless the handler of the signal has raised.
"""

import errno
import io
import os
import random
import select
import selectors
import signal
import socket
import ssl
import subprocess
import sys
from types import MethodType
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Type

from tests.helpers import PACKAGE, UNRAISABLE, CallAt, InterruptAt

__all__ = ["EFFECTS", "HARMLESS", "INTERRUPTIONS", "Alarms", "Faults", "NoMemoryAt", "Plan", "RingAt"]

# kind -> number of the call -> how it fails
Plan = Dict[str, Dict[int, str]]


class Rung(BaseException):
    """What a signal handler raises."""


class RungError(Exception):
    """The same as an ordinary exception."""


class RungTimeout(TimeoutError):
    """The same as an OSError, which is what many a handler of SIGALRM raises."""


INTERRUPTIONS: Dict[str, Type[BaseException]] = {
    "signal, BaseException": Rung,
    "signal, Exception": RungError,
    "signal, TimeoutError": RungTimeout,
}
ONE_BYTE = "one byte"
NO_MEMORY = "MemoryError"

# After these everything goes on: nothing is lost, and no session ends.
HARMLESS = {"EAGAIN", "EINTR", ONE_BYTE, NO_MEMORY, *INTERRUPTIONS}

_SIGNALS = tuple(INTERRUPTIONS)
_TESTS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_NO_ROOM = ("EMFILE", "ENFILE", "ENOMEM")

# Each kind of call, and how it can fail. Signals are looked at by calls that may block and where functions in Python begin,
# so a handler can raise in these; it cannot in os.dup, say, which is over before anybody looks.
EFFECTS: Dict[str, Tuple[str, ...]] = {
    "os.read": ("EAGAIN", "EIO", "ECONNRESET", "ETIMEDOUT", "ENOMEM", ONE_BYTE, NO_MEMORY, *_SIGNALS),
    "os.readv": ("EAGAIN", "EIO", "ENOMEM", ONE_BYTE, *_SIGNALS),
    "os.write": ("EAGAIN", "EPIPE", "EIO", "ENOMEM", "ENOSPC", ONE_BYTE, *_SIGNALS),
    "os.pipe": _NO_ROOM,
    "os.dup": ("EMFILE",),
    "os.dup2": ("EMFILE", "EBUSY"),
    "os.open": (*_NO_ROOM, "EACCES", *_SIGNALS),
    "os.fstat": ("ENOMEM", "EIO"),
    "os.set_blocking": ("EPERM",),
    "os.get_blocking": ("EPERM",),
    "os.kill": ("EPERM", "ESRCH"),
    "os.killpg": ("EPERM", "ESRCH"),
    "os.waitid": ("ECHILD", *_SIGNALS),
    "os.waitpid": ("ECHILD", *_SIGNALS),
    "os.pidfd_open": (*_NO_ROOM, "ENOSYS", "EPERM"),
    "socket": (*_NO_ROOM, "ENOBUFS", "EPERM"),
    "socket.send": ("EAGAIN", "EPIPE", "ECONNRESET", "ETIMEDOUT", "ENOBUFS", "ENOMEM", "EPERM", ONE_BYTE, *_SIGNALS),
    "socket.recv": ("EAGAIN", "ECONNRESET", "ETIMEDOUT", "ENOMEM", ONE_BYTE, NO_MEMORY, *_SIGNALS),
    "socket.recv_into": ("EAGAIN", "ECONNRESET", "ETIMEDOUT", "ENOMEM", ONE_BYTE, *_SIGNALS),
    "socket.accept": ("EAGAIN", "ECONNABORTED", "ENOBUFS", "EPERM", "EPROTO", NO_MEMORY, *_NO_ROOM, *_SIGNALS),
    "socket.connect_ex": ("EINTR", "EAGAIN", "ECONNREFUSED", "ETIMEDOUT", "ENOBUFS", "EPERM", *_SIGNALS),
    "socket.bind": ("EADDRINUSE", "EACCES", "ENOMEM"),
    "socket.listen": ("EADDRINUSE", "ENOBUFS"),
    "socket.shutdown": ("ENOTCONN",),
    "socket.setsockopt": ("EINVAL", "ENOBUFS"),
    "socket.getsockopt": ("ENOBUFS",),
    "socket.getsockname": ("ENOBUFS",),
    "socket.getpeername": ("ENOTCONN", "ENOBUFS"),
    "ssl.send": ("EAGAIN", "EPIPE", "ECONNRESET", "ETIMEDOUT", ONE_BYTE, NO_MEMORY, *_SIGNALS),
    "ssl.recv": ("EAGAIN", "ECONNRESET", "ETIMEDOUT", ONE_BYTE, NO_MEMORY, *_SIGNALS),
    "ssl.do_handshake": ("EAGAIN", "ECONNRESET", "EPIPE", "ETIMEDOUT", NO_MEMORY, *_SIGNALS),
    "ssl.unwrap": ("ECONNRESET", "EPIPE", *_SIGNALS),
    "epoll": (*_NO_ROOM, NO_MEMORY),
    "epoll.register": ("ENOMEM", "ENOSPC"),
    "epoll.modify": ("ENOMEM",),
    "epoll.poll": (NO_MEMORY, *_SIGNALS),
    "poll.register": (NO_MEMORY,),
    "poll.poll": ("ENOMEM", NO_MEMORY, *_SIGNALS),
    "subprocess.Popen": ("EAGAIN", "EACCES", "ENOENT", *_NO_ROOM, *_SIGNALS),
    "subprocess.read": _SIGNALS,  # by which Popen waits until the program has started
    "io.FileIO": (NO_MEMORY,),
}
# What stands between the package and calls of these kinds.
_PASSES = {
    "selectors.py": ("epoll",),
    "subprocess.py": ("os.kill", "subprocess.read"),
    "conftest.py": ("subprocess.read",),  # notes which children there are
    "fault_injection.py": ("subprocess.read",),
}


class Faults:
    """Counts the package's calls of each kind, and lets some of them fail.

    Attributes:
        plan: Which ones, and how.
        counts: How many calls of each kind there were.
        fired: What has happened, in words.
        spared: Descriptors of which nothing is counted, and nothing fails.
        unraisable: What finalizers have raised.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.counts: Dict[str, int] = {}
        self.fired: List[str] = []
        self.spared: Set[int] = set()
        self.unraisable: List[str] = []
        self._undo: List[Callable[[], Any]] = []
        self._kind: Type[BaseException] = Rung

    @property
    def is_harmless(self) -> bool:
        """Whether nothing may come of what has happened but that calls are made again."""
        return all(
            effect in HARMLESS and not (effect == "EAGAIN" and (kind == "subprocess.Popen" or "connect_ex" in kind))
            for kind, effect in self.effects
        )

    @property
    def effects(self) -> List[Tuple[str, str]]:
        """The kinds of calls that have failed, and how."""
        return [(text.split()[3], text.rpartition(": ")[2]) for text in self.fired]

    def hits(self, effects: Any) -> bool:
        """Whether what has happened is one of these effects."""
        return any(effect in effects for _, effect in self.effects)

    # -- taking the place of functions

    def __enter__(self) -> "Faults":
        for kind in EFFECTS:
            module, _, name = kind.rpartition(".")
            if module == "os":
                self._replace(kind, os, name)
            elif module == "socket":
                self._replace(kind, socket.socket, name)
            elif module == "ssl":
                self._replace(kind, ssl.SSLSocket, name)
        self._replace("socket", socket.socket, "__init__")
        self._replace("subprocess.Popen", subprocess.Popen, "__init__")
        self._replace("io.FileIO", io, "FileIO")
        poll = select.poll
        self._set(select, "poll", lambda: _Proxy(self, "poll", poll()))
        if hasattr(select, "epoll"):
            epoll = _Epoll(self, select.epoll)
            self._set(select, "epoll", epoll)
            self._set(selectors.EpollSelector, "_selector_cls", epoll)
        self._set(sys, "unraisablehook", lambda what: self.unraisable.append(f"{what.exc_value!r} in {what.object!r}"))
        before = signal.signal(signal.SIGUSR1, self._ring)
        self._undo.append(lambda: signal.signal(signal.SIGUSR1, before))
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        own = vars(owner).get(name, self)
        self._undo.append(lambda: delattr(owner, name) if own is self else setattr(owner, name, own))
        setattr(owner, name, value)

    def _replace(self, kind: str, owner: Any, name: str) -> None:
        real = getattr(owner, name, None)
        if real is None:
            return  # another system's

        def call(*args: Any, **options: Any) -> Any:
            return self.call(kind, real, args, options, sys._getframe(1))

        self._set(owner, name, _Method(call) if kind == "subprocess.Popen" else call)

    # -- failing

    def _ring(self, number: int, frame: Any) -> None:
        raise self._kind

    def call(self, kind: str, real: Callable[..., Any], args: Any, options: Any, caller: Any) -> Any:
        """Make a call, or fail."""
        if kind == "os.read" and os.path.basename(caller.f_code.co_filename) == "subprocess.py":
            kind = "subprocess.read"
        if not _is_of_package(kind, caller) or self._is_spared(args) or options.get("fileno") is not None:
            return real(*args, **options)
        number = self.counts[kind] = self.counts.get(kind, 0) + 1
        effect = self.plan.get(kind, {}).get(number)
        if effect is None:
            return real(*args, **options)
        code = caller.f_code
        place = f"{os.path.basename(code.co_filename)}:{caller.f_lineno} in {code.co_name}"
        self.fired.append(f"call {number} of {kind} ({place}): {effect}")
        if effect == NO_MEMORY:
            raise MemoryError(f"injected into {kind}")
        if effect in INTERRUPTIONS:
            self._kind = INTERRUPTIONS[effect]
            signal.raise_signal(signal.SIGUSR1)
            return real(*args, **options)  # it is held back
        if effect == ONE_BYTE:
            return real(*_one_byte(kind, args), **options)
        return self._fail(kind, getattr(errno, effect), real, args)

    def _fail(self, kind: str, number: int, real: Callable[..., Any], args: Any) -> Any:
        if kind == "socket.connect_ex":
            if number == errno.EINTR:  # goes on in the background
                real(*args)
            return number
        if kind.startswith("ssl.") and number == errno.EAGAIN:
            raise ssl.SSLWantReadError if kind == "ssl.recv" else ssl.SSLWantWriteError
        raise OSError(number, f"{os.strerror(number)} (injected into {kind})")

    def _is_spared(self, args: Any) -> bool:
        if not args or not self.spared:
            return False
        first = args[0]
        fd = first.fileno() if isinstance(first, socket.socket) and hasattr(first, "_io_refs") else first
        return isinstance(fd, int) and fd in self.spared


def _is_of_package(kind: str, frame: Any) -> bool:
    """Whether a call comes from the package."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE):
            return True
        passed = _PASSES.get(os.path.basename(path))
        if passed is None or not kind.startswith(passed):
            return False
        frame = frame.f_back
    return False


def _one_byte(kind: str, args: Any) -> Any:
    """The arguments for a call that moves one byte only."""
    if kind == "os.read":
        return args[0], 1
    if kind == "os.readv":
        return args[0], [memoryview(args[1][0])[:1]]
    if kind in ("socket.recv", "ssl.recv"):
        return args[0], 1, *args[2:]
    return args[0], memoryview(args[1])[:1], *args[2:]  # what is written, or read into


class _Method:
    """A method that does not show its arguments: the package looks at those of ``Popen``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __get__(self, owner: Any, cls: Any = None) -> Any:
        return self if owner is None else MethodType(self._function, owner)


class _Proxy:
    """Stands for an object of a class that nobody can derive from."""

    def __init__(self, faults: Faults, name: str, real: Any) -> None:
        self._faults = faults
        self._name = name
        self._real = real

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        kind = f"{self._name}.{name}"
        if kind not in EFFECTS:
            return real

        def call(*args: Any, **options: Any) -> Any:
            return self._faults.call(kind, real, args, options, sys._getframe(1))

        return call


class _Epoll:
    """Stands for the class ``select.epoll``."""

    def __init__(self, faults: Faults, real: Any) -> None:
        self._faults = faults
        self._class = real

    def __call__(self) -> Any:
        made = self._faults.call("epoll", self._class, (), {}, sys._getframe(1))
        return _Proxy(self._faults, "epoll", made)

    def fromfd(self, fd: int) -> Any:
        return _Proxy(self._faults, "epoll", self._class.fromfd(fd))


class RingAt(InterruptAt):
    """Lets a signal handler raise at the n-th place of the package's code where signals are not held back."""

    def __init__(self, number: int, effect: str) -> None:
        super().__init__(number, INTERRUPTIONS[effect]("injected"))
        self.effect = effect

    def is_place(self, frame: Any, event: str) -> bool:
        if event == "return" and frame.f_code.co_name == "__next__":
            return False  # what it returns is stored first
        return super().is_place(frame, event) and signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def _may_raise(frame: Any) -> bool:
    """Whether a handler may raise here: in the package, and not where the interpreter ignores it."""
    if not frame.f_code.co_filename.startswith(PACKAGE):
        return False  # the standard library ignores some errors, and a scenario's own handlers lose their message
    while frame is not None and not frame.f_code.co_filename.startswith(_TESTS):
        if frame.f_code.co_name in UNRAISABLE:
            return False
        frame = frame.f_back
    return True


class Alarms:
    """A few real signals, at moments that nobody has chosen; their handler raises if they come in the package's code.

    Attributes:
        error: What it has raised last, or None.
        effect: How.
        number: How often it has raised.
        where: Where that was.
    """

    def __init__(self, most: int) -> None:
        self.number = 0
        self.error: Optional[BaseException] = None
        self.effect = random.choice(_SIGNALS)
        self.where = ""
        self._most = most
        self._before: Any = None

    @property
    def hit(self) -> bool:
        return self.number > 0

    def _ring(self, number: int, frame: Any) -> None:
        if not _may_raise(frame):
            self._wind()
            return
        self.number += 1
        self.where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        self.error = INTERRUPTIONS[self.effect]("the alarm")
        raise self.error

    def _wind(self) -> None:
        if self.number < self._most:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00001, 0.002))

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGALRM, self._ring)
        self._wind()

    def __exit__(self, *exc_info: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)


class NoMemoryAt(CallAt):
    """Lets the n-th call of a function in C run out of memory, of those that turn messages into bytes and back."""

    events = ("c_call",)

    def __init__(self, number: int) -> None:
        super().__init__(number, self._fail)

    def _fail(self, number: int, frame: Any) -> None:
        raise MemoryError("injected")

    def is_place(self, frame: Any, event: str) -> bool:
        return frame.f_code.co_filename.startswith((PACKAGE + "serializers/", PACKAGE + "wire/"))
