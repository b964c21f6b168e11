"""Streams that cannot be polled, each pumped by a thread: the one place in this package where there are threads.

Knows objects with blocking ``read`` and ``write``, sockets and threads. Must not know frames, messages or sessions.

A thread stands between such a stream and a socketpair of our own, and everything else sees the near end of that pair as
a stream like any other. Handlers, serializers and the rest of the library still run in the program's own thread only.
What is not like other streams:

- The user's ``read``, ``write``, ``flush`` and ``close`` are called by these threads: one for each stream that is read,
  and one for the stream that is written, which also closes them all when the session does, or another one if it is
  blocked. So ``read`` and ``write`` of the same object may run at the same time, and ``close`` while one of them is
  blocked, which is how most objects wake a blocked ``read``.
- Reading runs ahead of the session, as far as a socketpair holds (some 200 KiB), and what the thread that writes has
  taken counts as written.
- Nothing can end a thread that is blocked in the user's ``read`` or ``write``. Closing waits for it, but within bounds;
  after that it is left alone. It is a daemon, so it does not keep the interpreter from exiting, and it calls nothing
  more once that call has returned. If the session was removed from its peer instead of closed, what that last ``read``
  returns is lost.
"""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from typing import Any, List, Optional, Sequence, Tuple

from ..errors import InvalidStreamError
from .base import Ending
from .descriptors import READ_SIZE, ReadEnd, WriteEnd, describe_stream

__all__ = ["READ_GRACE", "WRITE_GRACE", "ThreadEnding", "ThreadReadEnd", "ThreadWriteEnd"]

# Seconds that closing waits: for what was sent to be written, and then for the streams to be closed and for a read that
# is under way to return.
WRITE_GRACE = 1.0
READ_GRACE = 0.5

_SEND_FLAGS = getattr(socket, "MSG_NOSIGNAL", 0)
_JOIN = 1.0  # for a thread that has nothing left to do


class _Pump:
    """A thread, and a socketpair whose far end is the thread's own.

    Attributes:
        near: The other end.
        error: What the user's stream has raised, once the near end is at its end.
        clean: Whether the thread has ended without an error.
        ended: Whether it is known to have ended.
    """

    def __init__(self, name: str) -> None:
        self.error: Optional[BaseException] = None
        self.clean = False
        self.ended = False
        self._stopping = False
        self.near, self._far = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"stream_ipc {name}", daemon=True)

    def start(self) -> None:
        """Begin; until then the stream is not touched."""
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
            self.clean = True
        except BaseException as exc:  # whatever it is, it is the user's; a thread has nobody above it to tell
            self.error = exc
        finally:
            # Behind the error: this is how the other side learns of it.
            self._far.close()

    def _work(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Tell the thread to end as soon as it can."""
        self._stopping = True
        self.near.setblocking(False)

    def step(self) -> bool:
        """Read what nobody wants any more.

        Returns:
            Whether the thread has ended.
        """
        try:
            while not self.ended:
                self.ended = not self.near.recv(READ_SIZE)
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        return self.ended

    def leave(self) -> None:
        """Release the near end. The thread is awaited if it is about to end, and left alone if it is not."""
        self.near.close()
        if not self._thread.ident:
            self._far.close()
        elif self.ended:
            self._thread.join(_JOIN)

    def forget(self) -> None:
        """Release both ends: this is a fork, and the thread is in the other process."""
        self.near.close()
        self._far.close()


class _ReadPump(_Pump):
    """Reads a stream into a socketpair."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._own = _open_stream(stream, "read")
        # What is there is wanted, not as much as was asked for.
        self._read = getattr(self._stream, "read1", None) or self._stream.read
        super().__init__(f"reads {describe_stream(stream)}")

    def _work(self) -> None:
        try:
            while not self._stopping:
                data = self._read(READ_SIZE)
                if data is None:
                    raise BlockingIOError("read() returned None; a stream without a descriptor has to block instead")
                if isinstance(data, str):
                    raise TypeError("read() returned a str; a stream of bytes is needed")
                if not data:
                    return
                try:
                    self._far.sendall(data, _SEND_FLAGS)
                except OSError:  # the session has gone
                    return
        finally:
            if self._own:
                self._stream.close()


class _WritePump(_Pump):
    """Writes what comes out of a socketpair to a stream.

    Attributes:
        streams: What to close then.
    """

    def __init__(self, stream: Any) -> None:
        self.streams: List[Any] = []
        self._stream, self._own = _open_stream(stream, "write")
        super().__init__(f"writes {describe_stream(stream)}")

    def _work(self) -> None:
        flush = getattr(self._stream, "flush", None)
        try:
            while True:
                try:
                    data = self._far.recv(READ_SIZE)
                except OSError:
                    data = b""
                if not data:
                    return
                self._write(data)
                if flush is not None:
                    flush()
        finally:
            if self._own:
                self._stream.close()
            _close(self.streams)

    def _write(self, data: bytes) -> None:
        while data:
            count = self._stream.write(data)
            if count is None:
                if isinstance(self._stream, io.RawIOBase):
                    raise BlockingIOError("write() took nothing; a stream without a descriptor has to block instead")
                return  # an object that does not count takes all
            if not isinstance(count, int) or isinstance(count, bool):
                raise TypeError(f"write() returned {count!r:.100}; it must return how many bytes it took, or None for all")
            if not 0 < count <= len(data):
                raise OSError(f"write() of {len(data)} bytes returned {count}; it must return how many it took")
            data = data[count:]

    def finish(self) -> None:
        super().finish()
        try:
            self.near.shutdown(socket.SHUT_WR)  # what is in it is written first
        except OSError:
            pass


class _ClosePump(_Pump):
    """Closes the user's streams if the thread that writes cannot."""

    def __init__(self, streams: List[Any]) -> None:
        self._streams = streams
        super().__init__("closes streams")

    def _work(self) -> None:
        _close(self._streams)


def _close(streams: List[Any]) -> None:
    """Close the user's streams, which may block, and take each out of the list before."""
    while True:
        try:
            stream = streams.pop(0)
        except IndexError:  # another thread may have closed the last one
            return
        try:
            if isinstance(stream, int):
                os.close(stream)
            else:
                stream.close()
        except Exception:
            pass  # it has no close(), its owner has closed it, or it cannot flush: there is nobody to tell


def _open_stream(stream: Any, what: str) -> Tuple[Any, bool]:
    """The object to call, and whether it is our own.

    Raises:
        InvalidStreamError: It cannot be used.
    """
    if isinstance(stream, int):
        # A descriptor of our own, so that nobody has to wait for a blocked read to close or restore his.
        try:
            return io.FileIO(os.dup(stream), "rb" if what == "read" else "wb"), True
        except OSError as exc:
            raise InvalidStreamError(f"{describe_stream(stream)} cannot be used as a stream: {exc}") from exc
    target = stream
    if isinstance(stream, io.TextIOBase):
        target = getattr(stream, "buffer", None)
        if target is None:
            raise InvalidStreamError(f"{describe_stream(stream)} is a stream of text; a stream of bytes is needed")
        if what == "write":
            stream.flush()
    if getattr(stream, "closed", False) is True:
        raise InvalidStreamError(f"{describe_stream(stream)} cannot be used as a stream: it is closed")
    methods = ("read1", "read") if what == "read" else ("write",)
    if not any(callable(getattr(target, name, None)) for name in methods):
        raise InvalidStreamError(
            f"{describe_stream(stream)} cannot be used as a stream: it has neither a descriptor nor a method {what}()"
        )
    return target, False


class _ThreadEnd:
    """What both ends have in common; a mixin of ``_End``."""

    pump: Any
    stream: Any
    socket: Any
    fd: int
    identity: Optional[Tuple[int, int]] = None  # of a raw descriptor

    def _stand_for(self, stream: Any) -> None:
        self.stream = stream
        if isinstance(stream, int):
            status = os.fstat(stream)
            self.identity = status.st_dev, status.st_ino

    def start(self) -> None:
        """Begin; until then the stream is not touched."""
        self.pump.start()

    @property
    def error(self) -> Optional[BaseException]:
        """What the user's stream has raised, once its thread has ended."""
        error: Optional[BaseException] = self.pump.error
        return error

    def find_invalid(self) -> Optional[str]:
        """What is wrong if the owner closed the stream meanwhile, or None."""
        text = f"{describe_stream(self.stream)} was closed while a session was using it"
        if self.identity is not None:
            try:
                status = os.fstat(self.stream)
            except OSError as exc:
                return f"{text} ({exc}); close the session instead"
            return None if self.identity == (status.st_dev, status.st_ino) else f"{text}; close the session instead"
        # One that closes itself at its end, or when it fails, is not meant. A closed file object raises ValueError.
        if self.pump.clean or not isinstance(self.pump.error, (ValueError, type(None))):
            return None
        return f"{text}; close the session instead" if getattr(self.stream, "closed", False) is True else None

    def release(self) -> None:
        """Let go. If the thread runs, a ``ThreadEnding`` sees to it."""
        self.socket = None
        self.fd = -1
        if not self.pump._thread.ident:
            self.pump.leave()


class ThreadReadEnd(_ThreadEnd, ReadEnd):
    """The end of a stream that is read by a thread.

    Args:
        stream: Any object with ``read(n)``, or better ``read1(n)``, that returns bytes as soon as some are there, and
            none at the end; or a descriptor that cannot be polled.

    Raises:
        InvalidStreamError: It is closed, or has no such method.
    """

    lag: float = 0.05

    def __init__(self, stream: Any) -> None:
        self.pump: Any = _ReadPump(stream)
        ReadEnd.__init__(self, self.pump.near)
        self._stand_for(stream)


class ThreadWriteEnd(_ThreadEnd, WriteEnd):
    """The end of a stream that is written by a thread.

    Args:
        stream: Any object with ``write(data)`` that returns how much it took, or None for all; ``flush()`` is called
            behind it if there is one; or a descriptor that cannot be polled.

    Raises:
        InvalidStreamError: It is closed, or has no such method.
    """

    def __init__(self, stream: Any) -> None:
        self.pump: Any = _WritePump(stream)
        WriteEnd.__init__(self, self.pump.near)
        self._stand_for(stream)
        # Nothing ever comes out of the near end, so it is readable just when the thread has failed.
        self.alarm_fd: int = self.fd


class ThreadEnding(Ending):
    """Ends the threads of a transport: what was sent is written, then the streams are closed.

    Args:
        ends: The transport's ends; those without a thread are left out.
        close: Whether the streams are closed too.

    Attributes:
        grace: Seconds for a read that is under way to return once they are.
    """

    def __init__(self, ends: Sequence[Any], close: bool) -> None:
        threaded = [end for end in ends if end.pump is not None and end.pump._thread.ident]
        self._pumps: List[_Pump] = [end.pump for end in threaded]
        self._writers: List[_WritePump] = [end.pump for end in threaded if isinstance(end, ThreadWriteEnd)]
        # What is written comes first: the end of it is what makes many a reader see an end.
        threaded.sort(key=lambda end: not isinstance(end, ThreadWriteEnd))
        streams = [end.stream for end in threaded if end.find_invalid() is None]
        self._streams = list({id(stream): stream for stream in streams}.values()) if close else []
        self.grace: float = READ_GRACE if close else 0.0
        self._due = time.monotonic() + WRITE_GRACE
        self._writing = True
        self._done = False
        for writer in self._writers:
            writer.streams = self._streams
        for pump in self._pumps:
            pump.finish()

    def fds(self) -> List[int]:
        return [pump.near.fileno() for pump in self._pumps if not pump.ended]

    def step(self) -> Optional[float]:
        if self._done:
            return None
        ended = [pump.step() for pump in self._pumps]
        now = time.monotonic()
        if self._writing:
            if now < self._due and not all([pump.step() for pump in self._writers]):
                return self._due - now
            self._writing = False
            self._due = now + self.grace
            if self._streams:
                # There is no thread that writes, or it is blocked, or it has failed before.
                closing = _ClosePump(self._streams)
                closing.finish()
                try:
                    closing.start()
                except RuntimeError:  # at the interpreter's exit: Python 3.12 starts no thread then
                    closing.leave()
                else:
                    self._pumps.append(closing)
                    ended.append(closing.step())
        if not all(ended) and now < self._due:
            return self._due - now
        self._done = True
        for pump in self._pumps:
            pump.leave()
        return None

    def hurry(self) -> None:
        """What was waited for has happened: the rest takes a moment or for ever."""
        if self.grace > READ_GRACE:
            self.grace = READ_GRACE
            self._due = min(self._due, time.monotonic() + READ_GRACE)

    def forget(self) -> None:
        for pump in self._pumps:
            pump.forget()

    def __del__(self) -> None:
        if not self._done:
            self._done = True
            for pump in self._pumps:
                pump.near.close()
