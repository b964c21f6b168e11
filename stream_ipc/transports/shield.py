"""Holding signals back for a moment.

Knows signals. Must not know what is done meanwhile.
"""

from __future__ import annotations

import signal
from _signal import pthread_sigmask as _mask  # type: ignore[import-not-found]  # signal's own makes enums of all numbers

__all__ = ["Shield"]

_BLOCK, _SET = int(signal.SIG_BLOCK), int(signal.SIG_SETMASK)
# All that programs handle as a rule and that do not come from their own mistakes.
_NAMES = (
    "SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "SIGPROF", "SIGVTALRM",
    "SIGWINCH",
)  # fmt: skip
_SIGNALS = [int(getattr(signal, name)) for name in _NAMES]


class Shield:
    """Hold signals back for the length of a ``with`` block, for calls whose result an interruption would lose.

    The calls of ``ssl`` run signal handlers after the bytes have moved and before they return, so their result cannot be
    stored first. A SIGPIPE of a write that fails is dropped. The block must not wait for anything. In a program with
    several threads another thread may get the signal, and a small gap remains.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = _mask(_BLOCK, ())  # runs handlers of what came before, and has changed nothing yet
        try:
            _mask(_BLOCK, _SIGNALS)
        except BaseException:
            _mask(_SET, self._before)
            raise

    def __exit__(self, kind: type | None, *exc_info: object) -> None:
        if kind is not None and not kind.__name__.startswith("SSLWant") and hasattr(signal, "sigtimedwait"):
            # A write has failed: OpenSSL writes without MSG_NOSIGNAL, and SIGPIPE may be at its default.
            signal.sigtimedwait([signal.SIGPIPE], 0)
        _mask(_SET, self._before)
