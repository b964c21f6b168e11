"""A slave in PHP (examples/php/slave.php), in both formats; also the messages, as Python sees them."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict

from stream_ipc import IpcPeer, JsonMessageSerializer, LogMessage, Message, PhpMessageSerializer, RemoteError

FOLDER = Path(__file__).resolve().parent / "php"


@dataclass
class TaskRequest(Message, wire_name="App\\Message\\TaskRequest"):
    job: str
    options: Dict[str, Any] = field(default_factory=dict)


@dataclass
class TaskResponse(Message, wire_name="App\\Message\\TaskResponse"):
    result: str
    word_lengths: Dict[str, int] = field(metadata={"wire_name": "wordLengths"})
    done_by: str = field(metadata={"wire_name": "doneBy", "visibility": "private"})


@dataclass
class Progress(Message, wire_name="App\\Message\\Progress"):
    done: int
    total: int


@dataclass
class SettingRequest(Message, wire_name="App\\Message\\SettingRequest"):
    name: str


@dataclass
class SettingResponse(Message, wire_name="App\\Message\\SettingResponse"):
    value: str


def master(php: str, format: str) -> None:
    serializer = PhpMessageSerializer() if format == "php" else JsonMessageSerializer()
    # Otherwise PHP may print its errors to stdout, where they would arrive as junk, or to stderr twice.
    settings = ["-d", "display_errors=stderr", "-d", "log_errors=0"]
    command = [php, *settings, str(FOLDER / "slave.php"), format]
    with IpcPeer(serializer) as peer:
        session = peer.create_command_session(command)

        @session.on_message
        def show(progress: Progress) -> None:
            print(f"  {progress.done} of {progress.total} words done")

        @session.on_message
        def log(message: LogMessage) -> None:  # such as what PHP writes to its stderr
            print(f"  {message.level}: {message.message}")

        @session.on_request
        def setting(request: SettingRequest) -> SettingResponse:
            print(f"  PHP wants to know: {request.name}")
            return SettingResponse("-")

        response = session.request(TaskRequest("stressed naïve drawer", {"upper": True}), expect=TaskResponse).wait()
        print(f"  Result: {response.result}, done by {response.done_by}")
        print(f"  Word lengths: {response.word_lengths}")
        try:
            session.request(TaskRequest("")).wait()
        except RemoteError as error:
            print("  An error:", ": ".join(str(error).splitlines()[:2]))
    print("  Exit status of the slave:", session.process.returncode if session.process else None)


def main() -> None:
    php = shutil.which("php")
    if php is None:
        print("This example needs PHP, and there is no php on the PATH.")
        return
    for name, format in (("PHP's own format", "php"), ("JSON", "json")):
        print(f"In {name}:")
        master(php, format)


if __name__ == "__main__":
    main()
