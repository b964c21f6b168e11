"""Pickle in a form that names no class: the default serializer.

Knows the registry and messages. Must not know frames or streams.

The payload is one tuple ``(kind, id, wire name, {field: value})``. A registered object inside it travels as a call of
``build`` with its wire name and fields, so the one global that a payload ever names is ``build``. On the way in it
answers with inert handles, which are turned into objects by the registry after the load: an opcode such as ``BUILD``
that follows a call could otherwise change an object behind its constructor's back. If no global was named at all, the
load can only have produced plain data and is used as it is.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from itertools import chain
from typing import Any, Dict, List, Optional, Set, Tuple, Union

from .. import registry
from ..errors import SerializationError
from ..messages import Message, RequestEnvelope, ResponseEnvelope
from ..registry import TypeInfo
from .base import Payload

__all__ = ["PickleMessageSerializer"]

_MESSAGE, _REQUEST, _RESPONSE = 0, 1, 2  # the kind on the wire

_ATOMS = frozenset({type(None), bool, int, float, str, bytes, bytearray})
_MAX_ID = 128  # characters

_extension_cache: Dict[Any, Any] = copyreg._extension_cache  # type: ignore[attr-defined]


class _Inert:
    """Refuses the one opcode that could still change an object on the unpickler's stack."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise SerializationError("a payload may not set the state of an object")


class _Handle(_Inert):
    """What ``build`` answers during a load: the call's arguments, and nothing else."""

    __slots__ = ("content", "name")

    name: Any
    content: Any


class _Builder(_Inert):
    """The callable behind ``build``: an instance, so that neither a class nor a function is on the stack."""

    __slots__ = ()

    def __call__(self, name: Any, content: Any) -> _Handle:
        handle = _Handle()
        handle.name = name
        handle.content = content
        return handle


build = _Builder()
_GLOBAL = (__name__, "build")


class _Chunks(List[Any]):
    """A file for the pickler: what is written is a list of buffers, large bytes by reference."""

    __slots__ = ()
    write = list.append


class _Pickler(pickle.Pickler):
    """Turns registered objects into calls of ``build`` and refuses all others."""

    def reducer_override(self, obj: Any) -> Any:
        info = registry._by_class.get(type(obj))
        if info is not None:
            return build, (info.wire_name, _enum_key(obj) if info.is_enum else info.values(obj))
        if obj is build:
            return "build"  # by name, the pickler knows the module
        from .values import reduce_value

        reduced = reduce_value(obj)
        if reduced is None:
            registry.type_info(type(obj))  # raises
        return build, reduced


class _Unpickler(pickle.Unpickler):
    """Answers one global."""

    built = False

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) != _GLOBAL:
            raise SerializationError(f"a payload may not name {module_name}.{global_name}"[:300])
        self.built = True
        return build


class _ViewFile:
    """A file over a view, for payloads that are no ``bytes``: ``BytesIO`` would copy them (1.1 ms a MiB)."""

    __slots__ = ("_at", "_view")

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def read(self, size: int) -> bytes:
        start = self._at
        self._at = start + size
        return bytes(self._view[start : start + size])

    def readinto(self, buffer: Any) -> int:
        start = self._at
        part = self._view[start : start + len(buffer)]
        self._at = start + len(part)
        buffer[: len(part)] = part
        return len(part)

    def readline(self) -> bytes:
        # Only the text opcodes of protocol 0 read lines; nothing that we write has them.
        raise SerializationError("a payload may not use pickle protocol 0")


def _enum_key(member: Any) -> Any:
    # By name; a combination of flags has none (or one made up, since 3.11) and goes by its value.
    name = member.name
    return name if name in type(member).__members__ else (member.value,)


class PickleMessageSerializer:
    """Pickle protocol 5 that carries registered classes and plain data, and cannot run code at the receiver.

    Beside registered classes it carries None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set,
    frozenset and the value types of ``datetime``, ``decimal``, ``uuid``, ``collections`` and ``pathlib``. The same object
    sent twice in one message arrives as one object.

    A hostile peer can still exhaust this process's memory or time (a few bytes of pickle can ask for gigabytes):
    against a peer that is hostile use ``JsonMessageSerializer``.

    Args:
        unsafe: Plain pickle instead, for a peer that may run code here anyway. Both sides must agree.
    """

    def __init__(self, *, unsafe: bool = False) -> None:
        self._unsafe = unsafe
        # A pickler is kept between messages (0.7 us a message against 1.6 us for a new one), in a pool because
        # __getattr__ of a message can lead back in here, and because serializers may be shared between peers.
        self._picklers: List[Tuple[_Pickler, _Chunks]] = []

    def __repr__(self) -> str:
        return f"PickleMessageSerializer({'unsafe=True' if self._unsafe else ''})"

    def serialize(self, message: Message) -> bytes:
        """Turn a message into its payload.

        Raises:
            SerializationError: Something in the message cannot travel; the text names the field.
        """
        return b"".join(self.serialize_chunks(message))

    def serialize_chunks(self, message: Message) -> List[Any]:
        """The same as a list of buffers, in which bytes objects over 64 KiB are the message's own, not copied."""
        if self._unsafe:
            return [_plain_dumps(message)]
        try:
            pickler, chunks = self._picklers.pop()
        except IndexError:
            chunks = _Chunks()
            pickler = _Pickler(chunks, 5)
        cls = type(message)
        try:
            if cls is RequestEnvelope:
                inner: Any = message.request  # type: ignore[attr-defined]
                info = registry._by_class[type(inner)]
                root = (_REQUEST, message.id, info.wire_name, info.values(inner))  # type: ignore[attr-defined]
            elif cls is ResponseEnvelope:
                inner = message.response  # type: ignore[attr-defined]
                info = registry._by_class[type(inner)]
                root = (_RESPONSE, message.id, info.wire_name, info.values(inner))  # type: ignore[attr-defined]
            else:
                info = registry._by_class[cls]
                root = (_MESSAGE, None, info.wire_name, info.values(message))
            pickler.dump(root)
        except Exception as exc:  # the pickler is in an unknown state and goes
            raise _explain(message, exc) from exc
        pickler.clear_memo()
        result = chunks[:]
        chunks.clear()
        self._picklers.append((pickler, chunks))
        if len(result) > 1:
            # A bytearray is passed on by reference too, but its owner may change it before it is written.
            result = [bytes(chunk) if type(chunk) is not bytes else chunk for chunk in result]
        return result

    def deserialize(self, payload: Payload) -> Message:
        """Turn a payload into its message.

        Raises:
            SerializationError: The payload is no message; see ``MessageSerializer.deserialize``.
        """
        if self._unsafe:
            return _plain_loads(payload)
        if _extension_cache:
            # The extension opcodes take classes from this cache without asking find_class.
            _extension_cache.clear()
        file: Any = io.BytesIO(payload) if type(payload) is bytes else _ViewFile(memoryview(payload))
        unpickler = _Unpickler(file, fix_imports=False)
        try:
            root = unpickler.load()
        except SerializationError:
            raise
        except Exception as exc:
            raise SerializationError(f"payload is not a pickle: {type(exc).__name__}: {exc}") from exc
        if type(root) is not tuple or len(root) != 4:
            raise SerializationError("payload is not a message: it holds no (kind, id, wire name, fields)")
        kind, id, name, fields = root
        if kind == _MESSAGE:
            return _message(unpickler.built, name, fields)
        if type(id) is not str or len(id) > _MAX_ID or type(kind) is not int:
            raise SerializationError(f"payload is not an envelope: its id is not a str of at most {_MAX_ID} characters")
        if kind == _REQUEST:
            try:
                return RequestEnvelope(id, _message(unpickler.built, name, fields))
            except SerializationError as exc:
                exc.request_id = id
                raise
        if kind == _RESPONSE:
            try:
                return ResponseEnvelope(id, _message(unpickler.built, name, fields))
            except SerializationError as exc:
                exc.response_id = id
                raise
        raise SerializationError("payload is not a message: its kind is unknown")


def _message(built: bool, name: Any, fields: Any) -> Message:
    if built:
        fields = _Resolver().resolve(fields)
    if type(fields) is not dict:
        raise SerializationError("payload is not a message: its fields are not a dict")
    info: Optional[TypeInfo] = registry._by_name.get(name) if type(name) is str else None
    if info is None:
        info = registry.lookup(name)  # raises
    message = info.build(fields)
    if not isinstance(message, Message):
        raise SerializationError(f"payload is not a message: {info.wire_name} does not derive from Message")
    return message


class _Resolver:
    """Replaces the handles in a loaded structure by objects, each once, and lets nothing else through.

    Lists, dicts and sets are changed in place, so that what was shared stays shared.
    """

    def __init__(self) -> None:
        self._done: Dict[int, Any] = {}  # by id of the unresolved value, which the structure keeps alive
        self._keep: List[Any] = []

    def resolve(self, value: Any) -> Any:
        try:
            return self._resolve(value)
        except RecursionError as exc:
            raise SerializationError("payload is nested too deeply") from exc

    def _resolve(self, value: Any) -> Any:
        cls = type(value)
        if cls in _ATOMS:
            return value
        key = id(value)
        if key in self._done:
            result = self._done[key]
            if result is _IN_PROGRESS:
                raise SerializationError("payload contains an object that contains itself")
            return result
        self._keep.append(value)
        if cls is list:
            self._done[key] = value
            for index, item in enumerate(value):
                value[index] = self._resolve(item)
            return value
        if cls is dict:
            self._done[key] = value
            # Keys first: a key that is a handle is replaced, so the dict is filled anew.
            if any(type(k) not in _ATOMS for k in value):
                items = [(self._resolve(k), self._resolve(v)) for k, v in value.items()]
                value.clear()
                value.update(items)
            else:
                for k, v in value.items():
                    value[k] = self._resolve(v)
            return value
        if cls is set:
            self._done[key] = value
            items = [self._resolve(item) for item in value]
            value.clear()
            value.update(items)
            return value
        self._done[key] = _IN_PROGRESS
        if cls is tuple:
            result = tuple([self._resolve(item) for item in value])
        elif cls is frozenset:
            result = frozenset([self._resolve(item) for item in value])
        elif cls is _Handle:
            result = self._build(value)
        else:
            raise SerializationError("payload is not a message: it holds a part of the serializer")
        self._done[key] = result
        return result

    def _build(self, handle: _Handle) -> Any:
        name = handle.name
        content = handle.content
        try:
            if type(content) is dict:
                return registry.lookup(name).build(self._resolve(content))
            if type(content) is str or (type(content) is tuple and name in registry._by_name):
                return _enum_member(registry.lookup(name), content)
            if type(content) is tuple and type(name) is str:
                from .values import build_value

                return build_value(name, self._resolve(content))
        except (SerializationError, RecursionError):
            raise
        except Exception as exc:
            raise SerializationError(f"a value cannot be built: {type(exc).__name__}: {exc}"[:300]) from exc
        raise SerializationError("payload is not a message: it holds an object of no known form")


_IN_PROGRESS = _Builder()


def _enum_member(info: TypeInfo, key: Union[str, Tuple[Any, ...]]) -> Any:
    if not info.is_enum:
        raise SerializationError(f"payload is not a message: {info.wire_name} is no enum")
    if isinstance(key, str):
        return info.cls[key]  # type: ignore[index]
    (value,) = key
    if type(value) is not int:
        raise SerializationError(f"payload is not a message: {value!r:.100} is no value of {info.wire_name}")
    return info.cls(value)


def _plain_dumps(message: Message) -> bytes:
    try:
        return pickle.dumps(message, 5)
    except Exception as exc:
        raise SerializationError(f"{type(message).__name__} cannot be pickled: {type(exc).__name__}: {exc}") from exc


def _plain_loads(payload: Payload) -> Message:
    try:
        message = pickle.loads(payload)
    except Exception as exc:
        raise SerializationError(f"payload cannot be unpickled: {type(exc).__name__}: {exc}") from exc
    if not isinstance(message, Message):
        raise SerializationError(f"payload is not a message but a {type(message).__name__}")
    return message


def _explain(message: Message, exc: Exception) -> SerializationError:
    """The error to raise for a message that could not be pickled: the field is looked for only now."""
    if isinstance(exc, RecursionError):
        return SerializationError(f"{type(message).__name__} cannot be sent: it contains itself or is nested too deeply")
    inner: Any = getattr(message, "request", getattr(message, "response", message))
    if type(message) not in (RequestEnvelope, ResponseEnvelope):
        inner = message
    try:
        path = _find(inner, type(inner).__name__, set())
    except (Exception, RecursionError):  # a message whose own attributes fail: the first error tells more
        path = None
    if path is not None:
        return SerializationError(f"{path[0]}: {path[1]}")
    if isinstance(exc, SerializationError):
        return exc
    return SerializationError(f"{type(inner).__name__} cannot be sent: {type(exc).__name__}: {exc}")


def _find(value: Any, path: str, seen: Set[int]) -> Optional[Tuple[str, str]]:
    """The path to the first value that cannot travel, and why."""
    cls = type(value)
    if cls in _ATOMS or id(value) in seen:
        return None
    seen.add(id(value))
    parts: Any
    if cls in (list, tuple, set, frozenset):
        parts = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif cls is dict:
        parts = chain(
            ((f"key of {path}", key) for key in value), ((f"{path}[{key!r:.40}]", item) for key, item in value.items())
        )
    elif cls in registry._by_class:
        info = registry._by_class[cls]
        parts = () if info.is_enum else ((f"{path}.{name}", item) for name, item in info.values(value).items())
    else:
        from .values import reduce_value

        try:
            reduced = reduce_value(value)
        except Exception as exc:
            return path, str(exc)
        if reduced is None:
            try:
                registry.type_info(cls)
            except SerializationError as exc:
                return path, str(exc)
        parts = ((path, item) for item in (reduced or ("", ()))[1])
    for inner_path, item in parts:
        found = _find(item, inner_path, seen)
        if found is not None:
            return found
    return None
