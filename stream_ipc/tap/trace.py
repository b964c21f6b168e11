"""A conversation in the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing show.

Knows that format. Must not know frames, or where the events are written.

A worker is a process in the trace. A request is an asynchronous span from its start to its answer, because many of them
overlap; everything else is an instant on the track of its direction.
"""

from __future__ import annotations

import json
from typing import Any, Callable

__all__ = ["Trace"]

_CATEGORY = "ipc"


class Trace:
    """Makes the events of one worker. Owns those that are not written yet.

    Args:
        append: Takes a list of events, each an object in JSON.
        pid: The worker's.
        title: What the worker is called.
        origin: The monotonic time at which ``now`` was 0, so that the events of several taps fit together.
        tracks: What stands for a direction in the calls, and what its track is called.
    """

    def __init__(
        self, append: Callable[[list[bytes]], None], pid: int, title: str, origin: float, tracks: dict[str, str]
    ) -> None:
        self._append = append
        self._pid = pid
        self._origin = origin
        self._tids = {track: tid for tid, track in enumerate(tracks, 1)}
        self._count = 0
        self._events: list[bytes] = []
        self._metadata("process_name", 0, title)
        for track, name in tracks.items():
            self._metadata("thread_name", self._tids[track], name)

    def begin(self, now: float, track: str, name: str, args: dict[str, Any]) -> dict[str, Any]:
        """Begin a span, and return what ``end`` takes."""
        self._count += 1
        span = {
            "name": name,
            "cat": _CATEGORY,
            "id": f"{self._pid}.{self._count}",  # ids of requests need not be unique
            "pid": self._pid,
            "tid": self._tids[track],
        }
        self._add({**span, "ph": "b", "ts": self._ts(now), "args": args})
        return span

    def end(self, now: float, span: dict[str, Any], args: dict[str, Any]) -> None:
        self._add({**span, "ph": "e", "ts": self._ts(now), "args": args})

    def instant(self, now: float, track: str, name: str, args: dict[str, Any]) -> None:
        """Add an event without a duration."""
        place = {"pid": self._pid, "tid": self._tids[track], "ts": self._ts(now)}
        self._add({"name": name, "cat": _CATEGORY, "ph": "i", "s": "t", **place, "args": args})

    def flush(self) -> None:
        """Pass on the events so far."""
        events, self._events = self._events, []
        if events:
            self._append(events)

    def _metadata(self, what: str, tid: int, name: str) -> None:
        self._add({"name": what, "ph": "M", "pid": self._pid, "tid": tid, "args": {"name": name}})

    def _ts(self, now: float) -> float:
        return round((self._origin + now) * 1e6, 3)  # microseconds

    def _add(self, event: dict[str, Any]) -> None:
        self._events.append(json.dumps(event, separators=(",", ":")).encode("ascii"))
