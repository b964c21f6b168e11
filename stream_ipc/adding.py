"""How a peer gets a session once it is known what it talks over: the channel is made, and the loop takes it in.

Knows channels, conversations and the loop. Must not know what users may pass.
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import starmap

from . import log
from .core.conversation import Conversation
from .errors import InvalidStreamError
from .interruptions import pass_on
from .session import Session, conversation_of
from .transports.stream_channel import StreamChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping
    from typing import IO, Any

    from .core.loop import Loop
    from .opening import SessionOpener
    from .protocols import MessageSerializer
    from .transports.channel import Channel
    from .transports.spawn import Command, Path, PopenOptions

__all__ = ["add_child", "add_session", "add_socket", "close_untaken", "is_tls"]

def add_session(
    loop: Loop,
    peer: SessionOpener,
    given: Any,
    make: Callable[[MessageSerializer, int], Channel],
    on_session: Callable[[Session], Any] | None = None,
    name: str = "",
) -> Session:
    """Add a session to a peer.

    Args:
        loop: The peer's.
        peer: Whose serializer and largest size the channel gets.
        given: What the user has passed, for a text.
        make: Makes the channel.
        on_session: Gets the session before anything that came over it is dispatched.
        name: What its socket is connected to, in a few words.
    """
    loop.check_open()
    outer = loop.enter()
    channel: Any = None
    conversation = None
    try:
        for channel in starmap(make, ((peer.serializer, peer.max_frame_size),)):  # stored before a signal is looked at
            break
        else:
            raise RuntimeError(f"an attribute of {given!r:.100} raised StopIteration")
        if isinstance(channel, StreamChannel):
            if name:
                channel.connected(name)
            _check_free(loop, channel)
        session = Session(lambda session: Conversation(loop, channel, peer, session))
        conversation = conversation_of(session)
        loop.add(conversation)
        if on_session is not None:
            conversation.dispatcher.begin_with(on_session)
        conversation.port.rearm()
        if conversation.port.invalid is not None:
            raise InvalidStreamError(str(conversation.port.invalid))
        log.debug("session %s opened%s", session.name, channel.details())
        return session
    except BaseException:  # an interruption: nobody will ever have the session
        if conversation is not None:
            conversation.close(release=True)
        elif channel is not None and channel.transport is not given:
            channel.release()
        raise
    finally:
        loop.thread = outer


def _check_free(loop: Loop, channel: Channel) -> None:
    """Raise ``InvalidStreamError`` for a channel whose streams somebody else waits for, before anything of it is taken."""
    for fd in channel.interest()[0]:
        try:
            loop.poller.look(fd, None)
        except OSError as exc:
            pass_on(exc)
            raise InvalidStreamError(f"descriptor {fd} cannot be waited for: {exc}") from exc


def add_child(
    loop: Loop,
    peer: SessionOpener,
    command: Command,
    cwd: Path | None,
    env: Mapping[str, str] | None,
    stderr: int | IO[Any] | None,
    popen: PopenOptions,
) -> Session:
    """Start a process and add a session with it; see ``IpcPeer.create_command_session``."""
    loop.check_open()
    from .transports.children import kill, process_name
    from .transports.process import ProcessChannel
    from .transports.spawn import spawn

    group = bool(popen.get("start_new_session")) or popen.get("process_group") == 0
    process: Any = None
    try:
        for process in starmap(spawn, ((command, cwd, env, stderr, popen),)):  # stored before a signal is looked at
            break
        log.debug("%s started", process_name(process))
        make = partial(ProcessChannel, process, owned=True, group=group, growable="pipesize" not in popen)
        return add_session(loop, peer, process, make)
    except BaseException:
        if process is not None and not any([session.process is process for session in peer.sessions]):  # nobody has it
            kill(process, group)
        raise


def add_socket(
    loop: Loop,
    peer: SessionOpener,
    sock: socket.socket,
    name: str,
    on_session: Callable[[Session], Any] | None = None,
) -> Session:
    """Add a session over a connected socket, also one with TLS; otherwise as ``add_session``."""
    make: Callable[[MessageSerializer, int], Channel]
    if is_tls(sock):
        from .transports.tls import TlsChannel

        make = partial(TlsChannel, sock)
    else:
        from .transports.streams import open_channel

        make = partial(open_channel, sock, (sock,))
    return add_session(loop, peer, sock, make, on_session, name)


def is_tls(stream: Any) -> bool:
    """Return whether a stream is an ``ssl.SSLSocket``."""
    ssl: Any = sys.modules.get("ssl")  # importing it takes long, and whoever has an SSLSocket has imported it
    return ssl is not None and isinstance(stream, ssl.SSLSocket)


def close_untaken(peer: SessionOpener, *sockets: socket.socket) -> None:
    """Close sockets that are no session's."""
    for sock in {*sockets} - {session.socket for session in peer.sessions}:
        sock.close()
