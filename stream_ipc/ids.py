"""Request ids: text that is unique among the requests which are pending on one session.

Must not know messages. Any object with ``generate()`` will do in place of the two classes here.
"""

from __future__ import annotations

import itertools
import operator
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

__all__ = ["MAX_ID_LENGTH", "PidCounterRequestIdGenerator", "PidHrtimeRequestIdGenerator", "check_id", "needs_check"]

MAX_ID_LENGTH = 128  # characters


class PidCounterRequestIdGenerator:
    """Ids of the form ``<pid>.<counter>``, as the original's."""

    def __init__(self) -> None:
        # The pid is read once. If a forked process gives the generator to a new peer, its ids have the pid of the parent:
        # they only have to differ from those that are pending on the same session.
        self._pid = os.getpid()
        # C iterators alone, so that no Python code runs for an id.
        prefixes, numbers = itertools.repeat(f"{self._pid}."), map(str, itertools.count(1))
        self._next: Callable[[], str] = map(operator.add, prefixes, numbers).__next__
        if type(self) is PidCounterRequestIdGenerator:
            # The iterator itself, which spares the call of a method.
            self.generate = self._next  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} pid {getattr(self, '_pid', '?')}>"

    def generate(self) -> str:
        """Return the next id."""
        return self._next()


def needs_check(generator: Any) -> bool:
    """Return whether an id that it makes may be of a wrong type, too long or in use."""
    return type(generator) is not PidCounterRequestIdGenerator or generator.generate is not generator._next


def check_id(generator: Any, id: Any) -> None:
    """Raise ``ValueError`` for what a generator has made if it can be no id."""
    if type(id) is str and len(id) <= MAX_ID_LENGTH:
        return
    text = f"{type(generator).__name__}.generate() returned {id!r:.100}"
    if isinstance(id, str) and type(id) is not str:
        raise ValueError(f"{text} of a class derived from str; it must be a plain str")
    raise ValueError(f"{text}, not a str of at most {MAX_ID_LENGTH} characters")


class PidHrtimeRequestIdGenerator:
    """Ids of the form ``<pid>.<nanoseconds>.<counter>``.

    They do not repeat after a restart with the same pid.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._next = itertools.count(1).__next__

    def __repr__(self) -> str:
        return f"<{type(self).__name__} pid {getattr(self, '_pid', '?')}>"

    def generate(self) -> str:
        """Return the next id."""
        return f"{self._pid}.{time.monotonic_ns()}.{self._next()}"
