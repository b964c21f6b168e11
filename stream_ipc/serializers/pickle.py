"""Pickle in a form that names no class: the default serializer.

Knows the registry and messages. Must not know frames or streams.

The payload is a pickle of one tuple ``(kind, id, shape, content)``: what the envelope holds, the class and the names of its
fields, and their values. ``pickle_objects.py`` has what a shape is, and how the objects among the values travel.
The one global that a payload ever names is ``build``, which stands for these.

Most messages are small and hold no objects, and for these both directions use the module's quickest functions: a message
whose fields are all texts and numbers is written by ``pickle.dumps``, and a payload in which no opcode can name a global
holds nothing but plain data, whatever else is in it, and is read by ``pickle.loads``.
"""

from __future__ import annotations

import copyreg
from _pickle import dumps, loads  # and no others: the loads in Python takes an unfinished line for one
from collections import defaultdict
from io import BytesIO

from .. import registry
from ..errors import SerializationError, article, describe
from ..ids import MAX_ID_LENGTH
from ..interruptions import pass_on
from ..messages import (
    ENVELOPES,
    NOTIFICATION,
    REQUEST,
    RESPONSE,
    Message,
    RequestEnvelope,
    ResponseEnvelope,
    add_id,
    no_message,
    put_in_envelope,
    take_out_of_envelope,
)
from ..type_info import compile_function
from .pickle_objects import (
    ADVICE,
    ATOMS,
    ObjectPickler,
    ObjectUnpickler,
    Resolver,
    build,
    class_and_fields,
    shape_of,
    take_apart,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..protocols import Payload
    from ..type_info import TypeInfo

    Parts = bytes | list[bytes]
    Write = Callable[[int, Any, Message], Parts]

__all__ = ["PickleMessageSerializer", "build"]  # where pickles say that build is: see GLOBAL

_LARGE = 64 * 1024  # bytes: from here on a payload is read where it is
_SMALL = 1024  # bytes: up to here the pickler of a payload is used again

_extension_cache: dict[Any, Any] = copyreg._extension_cache  # type: ignore[attr-defined]
_extensions: dict[Any, Any] = copyreg._inverted_registry  # type: ignore[attr-defined]


class PickleMessageSerializer:
    """Pickle in a form that cannot run code at the receiver.

    It is protocol 5, and carries registered classes and plain data. Beside
    registered classes it carries None, bool, int, float, complex, str, bytes,
    bytearray, list, tuple, dict, set, frozenset and the value types of
    ``datetime``, ``decimal``, ``uuid``, ``collections`` and ``pathlib``. The
    same object sent twice in one message arrives as one object, unless it is
    one that nobody can change. An object that contains itself is refused, and
    so is a list or dict that does, in a message that also holds objects.

    A hostile peer can still end this process, or exhaust its memory or time (a
    few bytes of pickle can ask for gigabytes): against a peer that is hostile
    use ``JsonMessageSerializer``.

    Args:
        unsafe: Plain pickle instead, for a peer that may run code here anyway.
            Both sides must use the same. ``register_type`` has no part in it.
    """

    def __init__(self, *, unsafe: bool = False) -> None:
        self._unsafe = unsafe

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'unsafe=True' if getattr(self, '_unsafe', False) else ''})"

    def serialize(self, message: Message) -> bytes:
        """Turn a message into its payload.

        Raises:
            SerializationError: Something in the message cannot travel; the text
                names the field.
        """
        kind, id, content = take_out_of_envelope(message)
        payload = self.writers[type(content)](kind, id, content)
        return payload if isinstance(payload, bytes) else b"".join(payload)

    @property
    def writers(self) -> dict[type, Write]:
        """What turns a kind, an id and a message into a payload, by class.

        ``serialize`` without an envelope; the id must be one that an envelope
        may have. The payload is a list of buffers if there are bytes objects
        over 64 KiB: these are not copied into it. ``expect_large`` is called
        with the class of a message whose payload is large and in one piece.
        """
        return _plain_writers if self._unsafe else _writers

    def deserialize(self, payload: Payload) -> Message:
        """Turn a payload into its message.

        Raises:
            SerializationError: The payload is no message; see
                ``MessageSerializer.deserialize``.
        """
        return self.reader(payload if type(payload) is bytes or type(payload) is bytearray else bytes(memoryview(payload)))

    @property
    def reader(self) -> Callable[[bytes | bytearray], Message]:
        """What turns bytes into their message and keeps nothing of them.

        ``deserialize`` without a call in between.
        """
        return _plain_loads if self._unsafe else _read


# -- writing


# What dumps() writes as it is. Whatever else a field holds is the pickler's, which meets objects.
_PLAIN = frozenset({str, int, float, bool, type(None)})


def _writer_of(cls: type, is_large: bool = False) -> Write:
    if not issubclass(cls, Message):
        raise no_message(cls)
    info = registry.type_info(cls)
    if issubclass(cls, ENVELOPES):
        raise SerializationError(f"{info.wire_name} cannot be sent: it is, or derives from, an envelope inside another")
    values = [f"v{index}" for index in range(len(info.fields))]
    content = f"({', '.join(values)},)" if values else "info.values(message)"
    root = f"(kind, id, shape, {content})"
    lines = [
        "def made(kind, id, message):",
        "    try:",
        *(f"        {value} = message.{field.name}" for field, value in zip(info.fields, values)),
    ]
    if values and not is_large:
        lines.append(f"        if {' and '.join([f'type({value}) in plain' for value in values])}: return dumps({root}, 5)")
    lines += [
        f"        return write({root}, message)",
        "    except Exception as exc:",
        "        raise explain(message, exc) from exc",
    ]
    names = {"shape": shape_of(info), "info": info, "plain": _PLAIN, "dumps": dumps, "write": _write, "explain": _explain}
    return compile_function(lines, names)


class _Writers(registry.Cache):
    def expect_large(self, cls: type) -> None:
        """Take note that a message turned out to be large: the pickler passes large texts on without a copy."""
        self[cls] = _writer_of(cls, is_large=True)


_writers: dict[type, Write] = _Writers(_writer_of)


# Between messages, because making one takes longer than a small message. A property of a message can lead back in here,
# and there may be threads: then there are several.
_picklers: list[ObjectPickler] = []


def _write(root: tuple[Any, ...], message: Message) -> Parts:
    """Turn any root into its payload; ``message`` is the object whose values it has."""
    try:
        pickler = _picklers.pop()
    except IndexError as exc:
        pass_on(exc)
        pickler = ObjectPickler()
    pickler.dump(root)  # if this raises, the pickler is in an unknown state and goes
    met, chunks = pickler.met, pickler.chunks
    if met:
        ids = set(map(id, met))
        # The pickler remembers each object that is finished, so one that comes twice contains itself.
        if len(ids) < len(met) or id(message) in ids:
            raise SerializationError(f"{type(message).__name__} cannot be sent: an object in it contains itself")
        met.clear()
    if len(chunks) > 1:
        # A bytearray is passed on by reference too, but its owner may change it before it is written.
        return [chunk if type(chunk) is bytes else bytes(chunk) for chunk in chunks]
    payload: bytes = chunks.pop()
    if len(payload) <= _SMALL:  # a memo that has grown takes long to clear, for ever
        pickler.clear_memo()
        _picklers.append(pickler)
    return payload


def _explain(message: Any, exc: Exception) -> SerializationError:
    """Return the error about a message that cannot be sent because of ``exc``; raise ``exc`` itself if it says all."""
    pass_on(exc)
    name = type(message).__name__
    if isinstance(exc, RecursionError):
        return SerializationError(f"{name} cannot be sent: it contains itself or is nested too deeply")
    try:
        _check(message, name, {})
    except SerializationError as found:
        return found
    except Exception as error:  # a message whose own attributes fail: the first error tells more
        pass_on(error)
    if isinstance(exc, SerializationError):
        raise exc  # with its own cause
    return SerializationError(f"{name} cannot be sent: {describe(exc)}")


def _check(value: Any, path: str, seen: dict[int, Any]) -> None:
    """Raise SerializationError with the path to the first value that cannot travel, if there is one."""
    cls = type(value)
    if cls in ATOMS or id(value) in seen:
        return
    seen[id(value)] = value  # alive, so that no other has its id
    if cls in (list, tuple, set, frozenset):
        parts = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    elif cls is dict:
        parts = [(f"key of {path}", key) for key in value]
        parts += [(f"{path}[{key!r:.40}]", item) for key, item in value.items()]
    else:
        info = registry.by_class.get(cls)
        try:
            if info is not None and not info.is_enum:
                parts = [(f"{path}.{name}", item) for name, item in info.values(value).items()]
            else:
                content = take_apart[cls](value)[1]
                parts = [(path, item) for item in content] if type(content) is tuple else []
        except Exception as exc:
            pass_on(exc)
            text = str(exc) if isinstance(exc, SerializationError) else describe(exc)
            raise SerializationError(f"{path}: {text}") from exc
    for inner_path, item in parts:
        _check(item, inner_path, seen)


# -- loading

# With "" it returns a str as it is and raises TypeError for all else: hashing a hostile nested tuple would never end.
_text = str.removeprefix


def _read(payload: bytes | bytearray) -> Message:
    # STACK_GLOBAL, and READONLY_BUFFER, which makes a memoryview; GLOBAL and INST, which read two lines, and these are not
    # counted in what is large; EXT1 to EXT4, which ask for a class only if one is registered, and take it from the cache
    # without asking.
    if (
        0x93 in payload
        or 0x98 in payload
        or (0x0A in payload and (len(payload) >= _LARGE or payload.count(b"\n") > 1))
        or _extensions
        or _extension_cache
    ):
        root = _load_objects(payload)
    else:
        try:
            root = loads(payload)
        except Exception as exc:
            raise _failed_load(payload, exc) from exc
    # A list in place of a tuple is accepted: to ask would take time, and the values are the same.
    try:
        kind, id, shape, content = root
        make, count, info = _makers[_text(shape, "")]
        if len(content) != count:
            raise ValueError
    except (KeyError, TypeError, ValueError) as exc:
        pass_on(exc)
        if type(root) is not tuple or len(root) != 4:
            raise SerializationError(_OTHER_FORM) from None
        make, content = _first_of_shape, root
    try:
        message: Message = make(*content)
    except Exception as exc:
        if make is _first_of_shape:
            raise
        raise add_id(info.refused(exc), kind, id) from exc
    if kind == NOTIFICATION:
        return message
    if type(id) is str and len(id) <= MAX_ID_LENGTH:
        if kind == RESPONSE:
            return ResponseEnvelope(id, message)
        if kind == REQUEST:
            return RequestEnvelope(id, message)
    text = f"its id is not a str of at most {MAX_ID_LENGTH} characters, or it is of a kind that this side does not know"
    raise SerializationError(f"payload is not a message: {text}")


# What makes the message of a root, by its shape, how many values that takes, and of which class it is.
_makers: dict[str, tuple[Callable[..., Any], int, TypeInfo]] = {}
registry.clear_on_change(_makers)


def _first_of_shape(kind: Any, id: Any, shape: Any, content: Any) -> Message:
    """Return the message of a root for which there is no maker yet, or raise SerializationError."""
    try:
        info, fields = class_and_fields(shape, content)
        if not issubclass(info.cls, Message):
            raise SerializationError(f"payload is not a message: {info.wire_name} does not derive from Message")
        if issubclass(info.cls, ENVELOPES):  # its id would be of any type
            raise SerializationError(f"payload is not a message: {info.wire_name} is an envelope inside another")
        # Of no other shape: there would be no end of them. And before the constructor, which may register a class.
        if info.fields and shape == shape_of(info):
            _makers[shape] = info.make, len(info.fields), info
        message: Message = info.build(fields)
    except SerializationError as exc:
        add_id(exc, kind, id)
        raise
    return message


class _ViewFile:
    """A file over a large payload, of which ``BytesIO`` would make a copy, and then another of each part."""

    def __init__(self, payload: bytes | bytearray) -> None:
        self._payload = payload
        self._view = memoryview(payload)
        self._at = 0

    def read(self, size: int) -> memoryview:
        part = self._view[self._at : self._at + size]  # the unpickler takes any buffer, and copies what it keeps
        self._at += len(part)
        return part

    def readinto(self, buffer: Any) -> int:
        part = self.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def readline(self) -> bytes:  # for the text opcodes of protocol 0, which this serializer does not write
        end = self._payload.find(b"\n", self._at) + 1 or len(self._payload)
        return bytes(self.read(end - self._at))


def _load_objects(payload: bytes | bytearray) -> Any:
    """Load a payload that may name ``build``, and put objects in place of the handles."""
    _extension_cache.clear()
    unpickler = ObjectUnpickler(BytesIO(payload) if len(payload) < _LARGE else _ViewFile(payload))  # type: ignore[arg-type]
    unpickler.built = False
    try:
        root = unpickler.load()
    except SerializationError as exc:
        _add_id_of_head(exc, payload)
        raise
    except Exception as exc:
        del unpickler  # which holds all that was read so far
        raise _failed_load(payload, exc) from exc
    if type(root) is not tuple or len(root) != 4:  # a handle, or a list that may hold some
        raise SerializationError(_OTHER_FORM)
    built = unpickler.built
    # READONLY_BUFFER and BYTEARRAY8 make a memoryview, which the resolver refuses, and name nothing.
    if not built and not (0x98 in payload and 0x96 in payload):
        return root
    try:
        resolver = Resolver(not built)
        content = root[3]
        if type(content) is tuple:
            return (*root[:3], tuple(resolver.values(root[2], content)))
        if type(content) is dict:
            return (*root[:3], resolver.item(content))
        raise SerializationError("payload is not a message: it has no fields")
    except SerializationError as exc:
        add_id(exc, *root[:2])
        raise
    except Exception as exc:  # what became of a key cannot be hashed
        deep = isinstance(exc, RecursionError)
        text = "payload is nested too deeply" if deep else f"a value in the payload cannot be built: {describe(exc)}"[:300]
        raise add_id(SerializationError(text), *root[:2]) from exc


_OTHER_FORM = "payload is a pickle of another form than this serializer writes" + ADVICE


def _failed_load(payload: Payload, exc: Exception, text: str = "payload is not a pickle") -> SerializationError:
    from .text_serializer import other_format  # only this error needs it

    error = SerializationError(f"{text}: {describe(exc)}{other_format(payload, 'a pickle')}")
    _add_id_of_head(error, payload)
    return error


def _add_id_of_head(error: SerializationError, payload: Any) -> None:
    """Say in an error whose request or response it is about, though the payload could not be loaded."""
    import re

    # PROTO and FRAME, MARK, BININT1 with the kind, SHORT_BINUNICODE with the id: as each envelope begins.
    head = re.match(rb"\x80\x05\x95.{8}\(K([\x01\x02])\x8c(.)(.*)", bytes(payload[:300]), re.DOTALL)
    if head is not None and len(head[3]) >= head[2][0]:
        try:
            add_id(error, head[1][0], head[3][: head[2][0]].decode())
        except UnicodeDecodeError:
            pass


# -- unsafe=True


def _plain_dumps(kind: int, id: Any, message: Message) -> bytes:
    try:
        return dumps(put_in_envelope(kind, id, message), 5)
    except Exception as exc:
        pass_on(exc)
        raise SerializationError(f"{type(message).__name__} cannot be pickled: {describe(exc)}") from exc


_plain_writers: dict[type, Write] = defaultdict(lambda: _plain_dumps)


def _plain_loads(payload: Payload) -> Message:
    try:
        message = loads(payload)
    except Exception as exc:
        raise _failed_load(payload, exc, "payload cannot be unpickled") from exc
    if not isinstance(message, Message):
        text = f"payload is not a message but {article(type(message))}"
        raise SerializationError(f"{text}; do both sides use PickleMessageSerializer(unsafe=True)?")
    return message
