"""A peer in tkinter's loop: the window stays alive while a worker works, and shows how far it is."""

import sys
from typing import Any, List

from examples.messages import Progress, TaskRequest, TaskResponse
from stream_ipc import IpcPeer, ResponsePromise


def window(tkinter: Any, root: Any, peer: IpcPeer) -> None:
    """Show the progress of a request; returns when its reply is there."""
    root.title("stream_ipc")
    label = tkinter.Label(root, text="...", width=40, pady=20)
    label.pack()
    worker = peer.create_command_session([sys.executable, "-m", "examples.own_loop", "worker"])
    timers: List[str] = []

    @worker.on_message
    def show(progress: Progress) -> None:
        label["text"] = f"The worker has done {progress.done} of {progress.total}"
        print(label["text"])

    def turn(*_: Any) -> None:
        try:
            peer.tick(0)
        finally:  # also if a handler has raised, which tkinter reports
            if promise.done:
                root.quit()
            while timers:
                root.after_cancel(timers.pop())
            seconds = peer.next_deadline()
            if seconds is not None:
                timers.append(root.after(int(seconds * 1000) + 1, turn))

    promise: ResponsePromise[TaskResponse] = worker.request(TaskRequest("something long"), expect=TaskResponse)
    root.createfilehandler(peer.fileno(), tkinter.READABLE, turn)
    turn()  # sets the first timer
    root.mainloop()
    root.deletefilehandler(peer.fileno())
    while timers:
        root.after_cancel(timers.pop())
    print("The worker's result:", promise.wait().result)


def main() -> None:
    try:
        import tkinter
    except ImportError as error:  # it is a package of its own in many systems
        print(f"No window can be shown: {error}")
        return
    try:
        root = tkinter.Tk()
    except tkinter.TclError as error:
        print(f"No window can be shown: {error}")
        return
    with IpcPeer() as peer:
        window(tkinter, root, peer)
    root.destroy()


if __name__ == "__main__":
    main()
