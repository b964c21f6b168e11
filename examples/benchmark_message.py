"""The message of ``examples.benchmark`` (examples/benchmark_message.py), which both sides of it import."""

from dataclasses import dataclass

from stream_ipc import Message


@dataclass
class Payload(Message):
    body: object
