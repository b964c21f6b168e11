from __future__ import annotations

import copy
import pickle
from typing import Any, Dict, List, Tuple

import pytest

import stream_ipc
from stream_ipc import errors
from stream_ipc.errors import (
    FrameTooLargeError,
    InvalidStreamError,
    IpcError,
    RemoteError,
    RequestTimeoutError,
    SerializationError,
    StreamClosedError,
    UnexpectedReplyError,
    describe,
    printable,
)
from stream_ipc.messages import LogMessage

TREE: List[Tuple[Any, Any]] = [
    (StreamClosedError, ConnectionError),
    (RequestTimeoutError, TimeoutError),
    (RemoteError, Exception),
    (UnexpectedReplyError, TypeError),
    (SerializationError, Exception),
    (FrameTooLargeError, Exception),
    (InvalidStreamError, ValueError),
]


@pytest.mark.parametrize(("cls", "base"), TREE, ids=[cls.__name__ for cls, _ in TREE])
def test_the_tree(cls: Any, base: Any) -> None:
    assert issubclass(cls, IpcError)
    assert issubclass(cls, base)
    for other, _ in TREE:
        assert other is cls or not issubclass(cls, other)  # flat
    assert getattr(stream_ipc, cls.__name__) is cls
    error = cls("what happened")
    assert str(error) == "what happened"
    assert error.args == ("what happened",)
    with pytest.raises(base, match="what happened"):
        raise error


def test_the_tree_is_complete() -> None:
    ours = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, BaseException)}
    assert ours == {IpcError, *(cls for cls, _ in TREE)}
    assert not issubclass(IpcError, OSError)


FULL: List[Tuple[IpcError, Dict[str, Any]]] = [
    (IpcError("text"), {}),
    (StreamClosedError("text"), {"errno": None}),
    (RequestTimeoutError("text", 2.5), {"timeout": 2.5}),
    (RequestTimeoutError("text", timeout=0), {"timeout": 0}),
    (RequestTimeoutError("text"), {"timeout": None}),
    (RemoteError("text\nmore"), {}),
    (UnexpectedReplyError("text", LogMessage("reply")), {"reply": LogMessage("reply")}),
    (SerializationError("text", request_id="7"), {"request_id": "7", "response_id": None}),
    (SerializationError("text", response_id="7"), {"request_id": None, "response_id": "7"}),
    (FrameTooLargeError("text", size=5, limit=4), {"size": 5, "limit": 4}),
    (FrameTooLargeError("text", 5, 4), {"size": 5, "limit": 4}),
    (InvalidStreamError("text"), {"session": None}),
]


@pytest.mark.parametrize(("error", "attributes"), FULL, ids=[repr(e) for e, _ in FULL])
def test_errors_keep_their_attributes(error: IpcError, attributes: Dict[str, Any]) -> None:
    copies = [error, copy.copy(error), copy.deepcopy(error)]
    copies += [pickle.loads(pickle.dumps(error, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in copies:
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert other.args == error.args
        for name, value in attributes.items():
            assert getattr(other, name) == value


def test_a_session_does_not_travel() -> None:
    session: Any = object()
    error = InvalidStreamError("text", session)
    assert error.session is session
    other = pickle.loads(pickle.dumps(error))
    assert (str(other), other.session) == ("text", None)
    lock: Any = iter(lambda: 0, 1)  # cannot be pickled
    assert pickle.loads(pickle.dumps(InvalidStreamError("text", lock))).session is None


def test_the_ids_are_given_by_name_only() -> None:
    with pytest.raises(TypeError):
        SerializationError("text", "7")  # type: ignore[call-arg]


def test_a_timeout_is_no_os_error_with_a_number() -> None:
    # OSError would take two arguments for a number and a text.
    error = RequestTimeoutError("text", 5.0)
    assert error.errno is None
    assert error.strerror is None


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def test_describe() -> None:
    assert describe(ValueError("why")) == "ValueError: why"
    assert describe(KeyboardInterrupt()) == "KeyboardInterrupt: "
    assert describe(NoText()) == "NoText: (it has no text)"


def test_printable() -> None:
    assert printable("é") == "é"
    assert printable("a\udcffb") == "a\\xffb"
    assert printable("a\ud800b") == "a\\ud800b"
