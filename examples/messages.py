"""The messages that both sides of the examples share (examples/messages.py)."""

from dataclasses import dataclass

from stream_ipc import Message


@dataclass
class TaskRequest(Message):
    job: str


@dataclass
class TaskResponse(Message):
    result: str


@dataclass
class Progress(Message):
    done: int
    total: int


@dataclass
class PrimesRequest(Message):
    below: int


@dataclass
class PrimesResponse(Message):
    count: int


@dataclass
class Ready(Message):
    """A worker can be given tasks from now on."""
