"""Some of the clients of test_load.py: ``python -m tests.load_child ADDRESS CERTIFICATE CLIENTS REQUESTS SEED``."""

import json
import random
import ssl
import sys
import time
from typing import Any, Dict, List, Tuple

from stream_ipc import IpcPeer, ResponsePromise, Session
from tests.messages import Note, Ping, Pong


def main(address: Any, certificate: str, clients: int, requests: int, seed: int) -> None:
    """Connect, wait for the word, make requests at random until each client has made its own, and print figures."""
    chance = random.Random(seed)
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(certificate)
    filler = bytes(range(256)) * 400
    with IpcPeer(timeout=120) as peer:
        begin = time.perf_counter()
        sessions = [
            peer.connect(address, ssl_context=context, server_hostname="localhost" if context else None)
            for _ in range(clients)
        ]
        connecting = time.perf_counter() - begin
        told: List[Note] = []
        for number, session in enumerate(sessions):
            session.on_message(told.append)
            session.notify(Note(f"{seed}/{number}"))
        while len(told) < clients:
            peer.tick(None)
        made: Dict[Session, int] = dict.fromkeys(sessions, 0)
        waiting: List[Tuple[ResponsePromise[Pong], int, bytes, float]] = []
        times: List[float] = []
        begin = time.perf_counter()
        while made or waiting:
            if made and len(waiting) < 2 * clients and chance.random() < 0.9:
                session = chance.choice(sessions)
                if session not in made:
                    continue
                # Mostly small, at times large enough to fill the stream.
                data = filler[: chance.randrange(100) if chance.random() < 0.97 else chance.randrange(100_000)]
                promise = session.request(Ping((made[session], data)), expect=Pong)
                waiting.append((promise, made[session], data, time.perf_counter()))
                made[session] += 1
                if made[session] == requests:
                    del made[session]
            elif waiting:
                promise, number, data, since = waiting.pop(chance.randrange(len(waiting)))
                was_done = promise.done
                assert promise.wait().value == (number, data)
                if not was_done:
                    times.append(time.perf_counter() - since)
        total = time.perf_counter() - begin
    print(json.dumps({"connecting": connecting, "total": total, "times": times}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
