"""A slave in Python, whose master is written in PHP (examples/php/master.php) and starts it, in both formats."""

import shutil
import subprocess
import sys

from examples.php_slave import (
    FOLDER,
    Progress,
    SettingRequest,
    SettingResponse,
    TaskRequest,
    TaskResponse,
)
from stream_ipc import IpcPeer, JsonMessageSerializer, LogMessage, PhpMessageSerializer, Session


def slave(format: str) -> None:
    serializer = PhpMessageSerializer() if format == "php" else JsonMessageSerializer()
    session = IpcPeer(serializer).create_stdio_session()

    @session.on_request
    def work(request: TaskRequest, session: Session) -> TaskResponse:
        if not request.job:
            raise ValueError("there is nothing to do")
        setting = session.request(SettingRequest("separator"), expect=SettingResponse).wait()
        words = request.job.split()
        lengths = {}
        for index, word in enumerate(words):
            lengths[word] = len(word)
            words[index] = word.upper() if request.options.get("upper") else word[::-1]
            session.notify(Progress(index + 1, len(words)))
        return TaskResponse(setting.value.join(words), lengths, "Python")

    @session.on_message
    def log(message: LogMessage) -> None:
        if message.message == "shutdown":
            session.close()

    while session.is_open:
        session.tick(None)


def main() -> None:
    php = shutil.which("php")
    if php is None:
        print("This example needs PHP, and there is no php on the PATH.")
        return
    for name, format in (("PHP's own format", "php"), ("JSON", "json")):
        print(f"In {name}:", flush=True)  # before what PHP prints
        subprocess.run([php, str(FOLDER / "master.php"), sys.executable, format], check=True)


if __name__ == "__main__":
    slave(sys.argv[2]) if "slave" in sys.argv else main()
