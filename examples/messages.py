"""The messages that the examples' masters and slaves share."""

from dataclasses import dataclass

from stream_ipc import Message


@dataclass
class TaskRequest(Message):
    job: str


@dataclass
class TaskResponse(Message):
    result: str
