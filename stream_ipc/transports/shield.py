"""Holding signals back for a moment: for calls of ``socket`` and ``ssl`` whose result an interruption would lose.

Knows ``signal``. For all other calls ``interruptions.py`` says what is done instead.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's own functions make enums

__all__ = ["Shield"]

# All that programs handle as a rule and that do not come from their own mistakes.
_NAMES = ["INT", "TERM", "HUP", "ALRM", "USR1", "USR2", "CHLD", "PIPE", "PROF", "VTALRM", "WINCH"]
_SIGNALS = [getattr(_signal, f"SIG{name}") for name in _NAMES]


class Shield:
    """Hold signals back for the length of a ``with`` block.

    The calls of ``ssl`` run signal handlers after the bytes have moved and before they return, so their result cannot be
    stored first; nor can that of methods of ``socket`` which are written in Python, such as ``accept``. A SIGPIPE of a
    write that fails is dropped. The block must not wait for anything. In a program with several threads another thread may
    get the signal, and a small gap remains.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = _signal.pthread_sigmask(_signal.SIG_BLOCK, ())  # runs handlers of what came, and changes nothing yet
        try:
            _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGNALS)
        except BaseException:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, self._before)
            raise

    def __exit__(self, kind: type | None, *exc_info: object) -> None:
        if kind is not None and not kind.__name__.startswith("SSLWant") and hasattr(_signal, "sigtimedwait"):
            # A write has failed: OpenSSL writes without MSG_NOSIGNAL, and SIGPIPE may be at its default.
            _signal.sigtimedwait([_signal.SIGPIPE], 0)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, self._before)
