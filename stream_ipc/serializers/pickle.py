"""Pickle in a form that names no class: the default serializer.

Knows the registry and messages. Must not know frames or streams.

The payload is one tuple ``(kind, id, shape, value, ...)``. A shape is a wire name and, behind a NUL each, the names of the
fields whose values follow; a class that is rebuilt from its attributes has them all in one dict, and no names. A
registered object inside a message travels as a call of ``build`` with a tuple ``(shape, value, ...)``, so the one global
that a payload ever names is ``build``. On the way in it answers with inert handles, which are turned into objects by the
registry after the load: an opcode such as ``BUILD`` that follows a call could otherwise change an object behind its
constructor's back. If no global was named at all, the load can only have produced plain data and is used as it is.

Most messages are small and plain. These are written here, opcode by opcode, and read by ``pickle.loads`` once it is
known that no opcode in them can name a global: a pickler and an unpickler of our own cost more than all the rest.
"""

from __future__ import annotations

import copyreg
import pickle
import struct
from _pickle import loads as _loads  # and no other: that in Python takes an unfinished line for one
from io import BytesIO
from itertools import chain

from .. import registry
from ..errors import SerializationError, article, describe
from ..messages import (
    NOTIFICATION,
    REQUEST,
    RESPONSE,
    Message,
    RequestEnvelope,
    ResponseEnvelope,
    put_in_envelope,
    take_out_of_envelope,
)
from ..registry import TypeInfo, _by_class
from ._compiling import call_of_class, compile_function

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Union

    from ..protocols import Payload

    Form = Callable[[str, Any], Optional[bytes]]

    AnyList = List[Any]
    AnyTuple = Tuple[Any, ...]
    FormDict = Dict[type, Optional[Form]]
else:
    AnyList = list
    AnyTuple = tuple
    FormDict = dict

__all__ = ["PickleMessageSerializer"]

_ENVELOPES = (REQUEST, RESPONSE)  # a set would look at the hash of a tuple without end

_ATOMS = frozenset({type(None), bool, int, float, str, bytes, bytearray})
_CONTAINERS = frozenset({list, tuple, dict})
_MAX_ID = 128  # characters
_SEPARATOR = "\0"  # of the names in a shape; no wire name holds one

_extension_cache: Dict[Any, Any] = copyreg._extension_cache  # type: ignore[attr-defined]
_extensions: Dict[Any, Any] = copyreg._inverted_registry  # type: ignore[attr-defined]


# What such errors go on with: an attack is the rarer cause.
_PLAIN = "; if the other side uses PickleMessageSerializer(unsafe=True), both have to"


class _Inert:
    """Refuses the one opcode that could still change an object on the unpickler's stack."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise SerializationError("a payload may not set the state of an object" + _PLAIN)


class _Handle(_Inert, AnyTuple):
    """What stands for an object during a load: its shape and its values, and nothing else.

    A tuple, because the unpickler makes one without running Python: 0.1 us, against 0.5 us for a call of ours.
    """

    __slots__ = ()

    # By identity: as a key it must not be equal to another, and its content has no hash.
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other


class _Builder(_Inert):
    """The callable behind ``build``: an instance, so that neither a class nor a function is on the stack."""

    __slots__ = ()
    # A class binds to no instance, so this takes what _Handle takes: (shape, value, ...) in one.
    __call__: Callable[..., Any] = _Handle


build: _Builder = _Builder()
_GLOBAL = (__name__, "build")


class _Chunks(AnyList):
    """A file for the pickler: what is written is a list of buffers, large bytes by reference."""

    __slots__ = ()
    write = list.append


class _Pickler(pickle.Pickler):
    """Turns registered objects into calls of ``build`` and refuses all others."""

    def reducer_override(self, obj: Any) -> Any:
        cls = type(obj)
        parts = _parts.get(cls)
        if parts is None:
            info = _by_class.get(cls)
            if info is not None:
                parts = _parts[cls] = _parts_of(info)
        if parts is not None:
            return build, (parts(obj),)
        if obj is build:
            return "build"  # by name, the pickler knows the module
        from .values import reduce_value

        reduced = reduce_value(obj)
        if reduced is None:
            registry.type_info(type(obj))  # raises
        return build, (reduced,)


# By class, what takes an object apart: (shape, value, ...).
_parts: Dict[type, Callable[[Any], AnyTuple]] = {}
registry.clear_on_change(_parts)


def _parts_of(info: TypeInfo) -> Callable[[Any], AnyTuple]:
    if info.is_enum:
        return lambda member: (info.wire_name, _enum_key(member))
    if not info.fields:
        return lambda obj: (info.wire_name, info.values(obj))
    lines = [
        "def made(obj):",
        "    try:",
        f"        return shape, {', '.join(f'obj.{field.name}' for field in info.fields)}",
        "    except AttributeError:",
        "        return (shape, *info.values(obj).values())",  # raises, and says which
    ]
    return compile_function(lines, {"info": info, "shape": _shape_of(info)})


def _shape_of(info: TypeInfo) -> str:
    return _SEPARATOR.join([info.wire_name, *(field.name for field in info.fields)])


# -- small plain messages, written without a pickler (0.6 us instead of 0.9)
#
# Opcodes as a pickler would choose them, but without FRAME and MEMOIZE, which may be missing. They are put together as
# text, in which a character stands for a byte: 0.23 us, and 0.36 us with bytes.

_SHORT = 256  # from this size on a length takes four bytes
_LONG = 4096  # bytes: above this a value is better pickled, and a payload that is no bytes object is read where it is

_CHARS = [chr(number) for number in range(256)]


def _text(data: bytes) -> str:
    return data.decode("latin-1")


def _sized(short: str, long: bytes, data: bytes) -> str:
    if len(data) < _SHORT:
        return f"{short}{_CHARS[len(data)]}{_text(data)}"
    if len(data) > _LONG:
        raise ValueError
    return _text(struct.pack("<cI", long, len(data)) + data)


def _write_str(value: str) -> str:
    return _sized("\x8c", b"X", value.encode())


def _write_int(value: int) -> str:
    if 0 <= value < 256:
        return f"K{_CHARS[value]}"
    return _text(struct.pack("<ci", b"J", value))


_writers: Dict[type, Callable[[Any], str]] = {
    str: _write_str,
    bytes: lambda value: _sized("C", b"B", value),
    int: _write_int,
    float: lambda value: _text(struct.pack(">cd", b"G", value)),
    bool: lambda value: "\x88" if value else "\x89",
    type(None): lambda value: "N",
}


class _Forms(FormDict):
    """By class, what writes a message; None if it is not to be written here."""

    def __missing__(self, cls: type) -> Optional[Form]:
        info = _by_class.get(cls)
        if info is None:
            return None
        self[cls] = form = _form_of(info) if info.fields else None
        return form


_forms = _Forms()
registry.clear_on_change(_forms)


def _form_of(info: TypeInfo) -> Optional[Form]:
    # The function takes what stands before the shape, and the message. It answers None if a value is to be pickled.
    try:
        shape = _write_str(_shape_of(info))
    except ValueError:  # a name that is too long for this
        return None
    lines = ["def made(head, message):"]
    for index, field in enumerate(info.fields):
        lines += [
            f"    v = message.{field.name}",
            "    if type(v) is str and len(v) < 256 and v.isascii():",
            f"        v{index} = f'\\x8c{{chars[len(v)]}}{{v}}'",
            "    else:",
            "        write = find(type(v))",
            "        if write is None:",
            "            return None",
            f"        v{index} = write(v)",
        ]
    values = "".join([f"{{v{index}}}" for index in range(len(info.fields))])
    lines.append(f"    return f'{{head}}{{shape}}{values}t.'.encode('latin-1')")
    return compile_function(lines, {"shape": shape, "chars": _CHARS, "find": _writers.get})


def _new_pickler() -> Tuple[_Pickler, _Chunks]:
    chunks = _Chunks()
    return _Pickler(chunks, 5), chunks


class _Unpickler(pickle.Unpickler):
    """Answers one global."""

    built = False

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) != _GLOBAL:
            raise SerializationError(f"a payload may not name {module_name}.{global_name}"[:300] + _PLAIN)
        self.built = True
        return build


class _ViewFile:
    """A file over a view, for payloads that are no ``bytes``: ``BytesIO`` would copy them (1.1 ms a MiB)."""

    __slots__ = ("_at", "_view")

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def read(self, size: int) -> memoryview:
        # The unpickler takes any buffer, and copies what it keeps: a str of 1 MB in 75 us instead of 1100.
        start = self._at
        self._at = start + size
        return self._view[start : start + size]

    def readinto(self, buffer: Any) -> int:
        start = self._at
        part = self._view[start : start + len(buffer)]
        self._at = start + len(part)
        buffer[: len(part)] = part
        return len(part)

    def readline(self) -> bytes:
        # Only the text opcodes of protocol 0 read lines; nothing that we write has them.
        raise SerializationError("a payload may not use pickle protocol 0" + _PLAIN)


def _enum_key(member: Any) -> Union[str, int]:
    # By name; a combination of flags has none (or one made up, since 3.11) and goes by its value. With underscores,
    # because a class may have a property ``name`` of its own.
    key: Union[str, int] = member._name_
    if key not in type(member).__members__:
        key = member._value_
        if type(key) is not int:
            raise SerializationError(f"a member of {type(member).__qualname__} that has no name cannot travel")
    return key


class PickleMessageSerializer:
    """Pickle protocol 5 that carries registered classes and plain data, and cannot run code at the receiver.

    Beside registered classes it carries None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set,
    frozenset and the value types of ``datetime``, ``decimal``, ``uuid``, ``collections`` and ``pathlib``. The same object
    sent twice in one message arrives as one object, unless it is one that nobody can change.

    A hostile peer can still end this process, or exhaust its memory or time (a few bytes of pickle can ask for gigabytes):
    against a peer that is hostile use ``JsonMessageSerializer``.

    Args:
        unsafe: Plain pickle instead, for a peer that may run code here anyway. Both sides must use the same.
    """

    # deserialize() keeps nothing of what it is given, so that a large buffer can be used again; see wire/codec.py.
    keeps_payload = False

    def __init__(self, *, unsafe: bool = False) -> None:
        self._unsafe = unsafe
        # A pickler is kept between messages (0.7 us a message against 1.6 us for a new one), in a pool because
        # __getattr__ of a message can lead back in here, and because serializers may be shared between peers.
        self._picklers: List[Tuple[_Pickler, _Chunks]] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'unsafe=True' if getattr(self, '_unsafe', False) else ''})"

    def serialize(self, message: Message) -> bytes:
        """Turn a message into its payload.

        Raises:
            SerializationError: Something in the message cannot travel; the text names the field.
        """
        payload = self.serialize_parts(*take_out_of_envelope(message))
        return payload if isinstance(payload, bytes) else b"".join(payload)

    def serialize_parts(self, kind: int, id: Any, message: Message) -> Union[bytes, List[bytes]]:
        """The same for a message without its envelope.

        Returns:
            A list of buffers if there are bytes objects over 64 KiB: these are not copied into it.
        """
        if self._unsafe:
            return _plain_dumps(put_in_envelope(kind, id, message))
        write = _forms[type(message)]
        if write is not None:
            try:
                if kind == NOTIFICATION:
                    payload = write("\x80\x05(K\x00N", message)
                elif type(id) is str and id.isascii():
                    payload = write(f"\x80\x05(K{_CHARS[kind]}\x8c{_CHARS[len(id)]}{id}", message)
                else:
                    payload = None
                if payload is not None:
                    return payload
            except Exception:
                pass  # a field is missing, an int is large, a surrogate stands alone: the pickler knows, or says what it is
        return self._pickled(kind, id, message)

    def _pickled(self, kind: int, id: Any, message: Any) -> Union[bytes, List[bytes]]:
        try:
            pickler, chunks = pooled = self._picklers.pop()
        except IndexError:
            pickler, chunks = pooled = _new_pickler()
        try:
            cls = type(message)
            parts = _parts.get(cls)
            if parts is None:
                parts = _parts[cls] = _parts_of(_by_class[cls])
            pickler.dump((kind, id, *parts(message)))
        except Exception as exc:  # the pickler is in an unknown state and goes
            raise _explain(message, exc) from exc
        pickler.clear_memo()
        # In every case the pickler goes back with an empty list.
        result: Union[bytes, List[bytes]]
        if len(chunks) == 1:
            result = chunks.pop()
        else:
            # A bytearray is passed on by reference too, but its owner may change it before it is written.
            result = [chunk if type(chunk) is bytes else bytes(chunk) for chunk in chunks]
            chunks.clear()
        self._picklers.append(pooled)
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
        # What could name a global: the opcode STACK_GLOBAL; GLOBAL and INST, which read two lines; and the extension
        # opcodes, while there are extensions. And with READONLY_BUFFER there could be a memoryview. Without these bytes
        # the result is plain data, so the library's own loads() will do: 0.3 us instead of 1.9. Text that has them is read
        # by the general way. (An int is looked for in 0.02 us.)
        if type(payload) is bytes and not (
            0x93 in payload
            or 0x98 in payload
            or (0x0A in payload and _may_have_lines(payload))
            or _extensions
        ):
            try:
                root = _loads(payload)
            except Exception as exc:
                raise _no_pickle(payload, exc) from exc
            if type(root) is tuple and len(root) > 3:
                # What is wrong in any way, the general way says.
                shape = root[2]
                make = _find_root(shape if type(shape) is str else "")  # the hash of a tuple may be without end
                if make is not None:
                    return make(root)
            return _message(root, True, False)
        if type(payload) is not bytearray or len(payload) < _LONG:
            payload = bytes(payload)  # of bytes that is no copy
        root, built = _load(payload)
        # Two opcodes together make a memoryview without naming anything: BYTEARRAY8 and READONLY_BUFFER.
        checked = not built and not (0x98 in payload and 0x96 in payload)
        if checked and type(root) is tuple and len(root) > 3 and type(root[2]) is str and root[2] in _roots:
            return _roots[root[2]](root)
        return _message(root, checked, built)


# How an envelope begins, up to the length of its id.
_OPENINGS = frozenset([b"\x80\x05(K%c\x8c" % kind for kind in _ENVELOPES])


def _may_have_lines(payload: bytes) -> bool:
    """Whether GLOBAL (``c``) or INST (``i``) could stand in a payload that has line feeds: two of them come behind.

    Each text of 10 bytes has one as its length, and often that is the id, after which nothing has begun yet.
    """
    if payload.count(b"\n", 7 if payload[:6] in _OPENINGS else 0) < 2:
        return False
    return any([payload.count(b"\n", at) > 1 for at in (payload.find(b"c"), payload.find(b"i")) if at >= 0])


def _load(payload: Payload) -> Tuple[Any, bool]:
    """Load a payload that may name ``build``; returns whether it did."""
    if type(payload) is bytearray:
        file: Any = _ViewFile(memoryview(payload))
    else:
        data: Any = payload
        if data[:2] == b"\x80\x05" and data[2:3] != b"\x95":
            # With a FRAME around the rest, as it is written by a pickler, the file is read once and not for each opcode.
            data = b"\x80\x05\x95%b%b" % ((len(data) - 2).to_bytes(8, "little"), data[2:])
        file = BytesIO(data)
    # find_class is all our own, so there are no names for fix_imports to change.
    unpickler = _Unpickler(file)
    try:
        return unpickler.load(), unpickler.built
    except SerializationError:
        raise
    except Exception as exc:
        raise _no_pickle(payload, exc) from exc


def _no_pickle(payload: Payload, exc: Exception) -> SerializationError:
    return SerializationError(f"payload is not a pickle: {describe(exc)}{_other_format(payload)}")


def _with_id(error: SerializationError, kind: Any, id: str) -> SerializationError:
    if kind == REQUEST:
        error.request_id = id
    elif kind == RESPONSE:
        error.response_id = id
    return error


# By shape, what builds the message or the envelope of a root that holds just plain data: functions that are compiled for
# the class, 1.4 us quicker than the general way.
_roots: Dict[str, Callable[[Any], Message]] = {}
registry.clear_on_change(_roots)
_find_root = _roots.get


def _root_of(info: TypeInfo) -> Callable[[Any], Message]:
    values = [f"v{index}" for index in range(len(info.fields))]
    lines = [
        "def made(root):",
        "    try:",
        f"        kind, id, _, {', '.join(values)} = root",
        "    except ValueError:",
        "        return message(root, True, False)",
        f"    if kind == {NOTIFICATION}:",
        "        try:",
        f"            return {call_of_class(info, values)}",
        "        except Exception as exc:",
        "            raise info._refused(exc) from exc",
        f"    if kind not in envelopes or type(id) is not str or len(id) > {_MAX_ID}:",
        "        return message(root, True, False)",
        "    try:",
        f"        content = {call_of_class(info, values)}",
        "    except Exception as exc:",
        "        raise with_id(info._refused(exc), kind, id) from exc",
        f"    return request(id, content) if kind == {REQUEST} else response(id, content)",
    ]
    names = {"message": _message, "with_id": _with_id, "request": RequestEnvelope, "response": ResponseEnvelope}
    return compile_function(lines, {"info": info, "cls": info.cls, "envelopes": _ENVELOPES, **names})


def _message(root: Any, checked: bool, built: bool) -> Message:
    """The message, or the envelope with a message, that was loaded.

    Args:
        root: What the load has returned.
        checked: It is known to be nothing but plain data.
        built: There may be handles in it.
    """
    if type(root) is not tuple or len(root) < 4:
        raise SerializationError("payload is a pickle of another form than this serializer writes" + _PLAIN)
    kind, id, shape = root[:3]
    values = root[3:]
    if kind == NOTIFICATION:
        return _content(checked, built, shape, values)
    if type(id) is not str or len(id) > _MAX_ID:
        raise SerializationError(f"payload is not an envelope: its id is not a str of at most {_MAX_ID} characters")
    try:
        message = _content(checked, built, shape, values)
    except SerializationError as exc:
        _with_id(exc, kind, id)
        raise
    if kind not in _ENVELOPES:
        raise SerializationError("payload is not a message: it is of a kind that this side does not know")
    return put_in_envelope(kind, id, message)


def _content(checked: bool, built: bool, shape: Any, values: AnyTuple) -> Message:
    if built:
        values = _Resolver().resolve(values)
    elif not checked:
        _refuse_views(values)
    info, fields = _fields_of(shape, values)
    if not issubclass(info.cls, Message):
        raise SerializationError(f"payload is not a message: {info.wire_name} does not derive from Message")
    if issubclass(info.cls, (RequestEnvelope, ResponseEnvelope)):  # its id would be of any type
        raise SerializationError(f"payload is not a message: {info.wire_name} is an envelope inside another")
    # Of no other shape: there would be no end of them. And before the constructor is called, which may register a class.
    if info.fields and shape not in _roots and shape == _shape_of(info):
        _roots[shape] = _root_of(info)
    return info.build(fields)  # type: ignore[no-any-return]


def _fields_of(shape: Any, values: AnyTuple) -> Tuple[TypeInfo, Dict[str, Any]]:
    """The class of a shape, and its fields by name."""
    if type(shape) is str and _SEPARATOR in shape:
        name, *names = shape.split(_SEPARATOR)
        info = registry.lookup(name)
        if len(names) != len(values):
            text = f"{info.wire_name} comes with {len(names)} fields and {len(values)} values"
            raise SerializationError(f"payload is not a message: {text}")
        fields = dict(zip(names, values))
    else:
        if len(values) != 1 or type(values[0]) is not dict:
            raise SerializationError("payload is not a message: its fields are not a dict")
        fields = values[0]
        info = registry.lookup(shape)
    if info.is_enum:  # its members are not made, but found
        raise SerializationError(f"payload is not a message: {info.wire_name} is an enum, and has no fields")
    return info, fields


def _refuse_views(value: Any) -> None:
    """See that there is no memoryview in plain data."""
    seen: Set[int] = set()
    todo: List[Any] = [value]
    while todo:
        container = todo.pop()
        if id(container) not in seen:
            seen.add(id(container))
            # A view of a bytearray has no hash, so it is no key and in no set.
            items = list(container.values()) if type(container) is dict else container
            types = set(map(type, items))  # 20 ns an item
            if memoryview in types:
                raise SerializationError("payload is not a message: it may not hold a memoryview")
            if not types.isdisjoint(_CONTAINERS):
                todo += [item for item in items if type(item) in _CONTAINERS]


class _Resolver:
    """Replaces the handles in a loaded structure by objects, each once, and lets nothing else through.

    Lists, dicts and sets are changed in place, so that what was shared stays shared. They may contain themselves, but
    no object may be built of one that is not finished: its constructor could copy handles out of it.
    """

    def __init__(self) -> None:
        # By id of the unresolved value. All of these were alive at once, so no id stands for two of them, though some
        # are freed meanwhile; what has been resolved, or was made since, must never be resolved.
        self._done: Dict[int, Any] = {}
        self._depth = 0  # how many objects are being built
        self._unfinished: Dict[int, int] = {}  # lists, dicts and sets: by id, the depth at which they were begun
        self._looped: Set[int] = set()  # those of them that are contained in something that may be finished

    def resolve(self, value: Any) -> Any:
        try:
            return self._resolve(value)
        except SerializationError:
            raise
        except RecursionError as exc:
            raise SerializationError("payload is nested too deeply") from exc
        except Exception as exc:  # what became of a key cannot be hashed
            raise SerializationError(f"a value in the payload cannot be built: {describe(exc)}"[:300]) from exc

    def _resolve(self, value: Any) -> Any:
        cls = type(value)
        key = id(value)
        done = self._done
        if cls is _Handle:
            if key not in done:
                done[key] = _IN_PROGRESS
                shape = value[0] if value else None
                make = _find_nested(shape) if type(shape) is str else None  # the hash of a tuple may be without end
                done[key] = result = self._object(value) if make is None else make(value, self)
                return result
        elif cls in _ATOMS:
            return value
        if key in self._done:
            result = self._done[key]
            if key in self._unfinished:
                if self._unfinished[key] < self._depth:
                    raise _contains_itself()
                self._looped.add(key)
            if result is _IN_PROGRESS:
                raise _contains_itself()
            return result
        if cls is list or cls is dict or cls is set:
            self._done[key] = value
            self._unfinished[key] = self._depth
            if cls is list:
                if not _ATOMS.issuperset(map(type, value)):  # 15 ns an item against 60 with a call
                    value[:] = [self._resolve(item) for item in value]
            elif cls is set:
                items = [self._resolve(item) for item in value]
                value.clear()
                value.update(items)
            # Keys first: a key that is a handle is replaced, so the dict is filled anew.
            elif any(type(k) not in _ATOMS for k in value):
                items = [(self._resolve(k), self._resolve(v)) for k, v in value.items()]
                value.clear()
                value.update(items)
            else:
                for k, v in value.items():
                    if type(v) not in _ATOMS:
                        value[k] = self._resolve(v)
            del self._unfinished[key]
            self._looped.discard(key)
            return value
        self._done[key] = _IN_PROGRESS
        if cls is tuple:
            result = tuple([self._resolve(item) for item in value])
        elif cls is frozenset:
            result = frozenset([self._resolve(item) for item in value])
        else:
            raise SerializationError(f"payload is not a message: it may not hold {article(cls)}")
        self._done[key] = result
        return result

    def _object(self, handle: AnyTuple) -> Any:
        """Build what is not to be built by a function for its class: the first of its shape, and others."""
        shape, *values = handle or (None,)
        if (type(shape) is str and _SEPARATOR in shape) or (len(values) == 1 and type(values[0]) is dict):
            info, fields = _fields_of(shape, tuple(values))
            if info.fields and shape == _shape_of(info):
                _nested[shape] = _nested_of(info)
            if _ATOMS.issuperset(map(type, fields.values())):
                return info.build(fields)
            self.begin_object()
            # A dict that was made here must not be looked up: its id may be that of a value which is gone.
            known = values and fields is values[0]
            fields = self._resolve(fields) if known else {name: self._resolve(value) for name, value in fields.items()}
            result = info.build(fields)
            self.end_object()
            return result
        if len(values) != 1:
            raise SerializationError("payload is not a message: it holds an object of an unknown form")
        return self._special(shape, values[0])

    def _special(self, name: Any, content: Any) -> Any:
        """A member of an enum, or a value of the standard library's."""
        self.begin_object()
        if type(content) is str or type(content) is int:
            result = _enum_member(registry.lookup(name), content)
        elif type(content) is tuple and type(name) is str:
            from .values import build_value

            result = build_value(name, self._resolve(content))
        else:
            raise SerializationError("payload is not a message: it holds an object of an unknown form")
        self.end_object()
        return result

    def begin_object(self) -> None:
        """Refuse to build of what is not finished."""
        if self._looped:
            raise _contains_itself()
        self._depth += 1

    def end_object(self) -> None:
        self._depth -= 1


# By shape, what builds an object inside a message: functions that are compiled for the class, because with loops over the
# fields an object took twice as long.
_nested: Dict[str, Callable[[AnyTuple, _Resolver], Any]] = {}
registry.clear_on_change(_nested)
_find_nested = _nested.get


def _nested_of(info: TypeInfo) -> Callable[[AnyTuple, _Resolver], Any]:
    values = [f"v{index}" for index in range(len(info.fields))]
    lines = [
        "def made(handle, resolver):",
        "    try:",
        f"        _, {', '.join(values)} = handle",
        "    except ValueError:",
        "        return resolver._object(handle)",
        f"    if not ({' and '.join(f'type({value}) in atoms' for value in values)}):",
        "        if resolver._looped: resolver.begin_object()",  # raises
        "        resolver._depth += 1",
        "        resolve = resolver._resolve",
        *(f"        if type({value}) not in atoms: {value} = resolve({value})" for value in values),
        "        resolver._depth -= 1",
        "    try:",
        f"        return {call_of_class(info, values)}",
        "    except Exception as exc:",
        "        raise info._refused(exc) from exc",
    ]
    return compile_function(lines, {"info": info, "cls": info.cls, "atoms": _ATOMS})


def _contains_itself() -> SerializationError:
    return SerializationError("payload contains an object that contains itself")


_IN_PROGRESS = object()


def _enum_member(info: TypeInfo, key: Union[str, int]) -> Any:
    if not info.is_enum:
        raise SerializationError(f"payload is not a message: {info.wire_name} is no enum")
    try:
        return info.cls[key] if isinstance(key, str) else info.cls(key)  # type: ignore[index]
    except (KeyError, ValueError) as exc:
        text = f"{info.wire_name} has no member {key!r:.100}; add it to the enum on this side too"
        raise SerializationError(text) from exc


def _plain_dumps(message: Message) -> bytes:
    try:
        return pickle.dumps(message, 5)
    except Exception as exc:
        raise SerializationError(f"{type(message).__name__} cannot be pickled: {describe(exc)}") from exc


def _plain_loads(payload: Payload) -> Message:
    try:
        message = pickle.loads(payload)
    except Exception as exc:
        raise SerializationError(f"payload cannot be unpickled: {describe(exc)}{_other_format(payload)}") from exc
    if not isinstance(message, Message):
        text = f"payload is not a message but {article(type(message))}"
        raise SerializationError(f"{text}; do both sides use PickleMessageSerializer(unsafe=True)?")
    return message


def _other_format(payload: Payload) -> str:
    from ._shared import other_format  # 2 ms, which only this error needs

    return other_format(payload, "a pickle")


def _explain(message: Message, exc: Exception) -> SerializationError:
    """The error to raise for a message that could not be pickled: the field is looked for only now."""
    if isinstance(exc, RecursionError):
        return SerializationError(f"{type(message).__name__} cannot be sent: it contains itself or is nested too deeply")
    try:
        path = _find(message, type(message).__name__, {})
    except (Exception, RecursionError):  # a message whose own attributes fail: the first error tells more
        path = None
    if path is not None:
        return SerializationError(f"{path[0]}: {path[1]}")
    if isinstance(exc, SerializationError):
        return exc
    return SerializationError(f"{type(message).__name__} cannot be sent: {describe(exc)}")


def _find(value: Any, path: str, seen: Dict[int, Any]) -> Optional[Tuple[str, str]]:
    """The path to the first value that cannot travel, and why."""
    cls = type(value)
    if cls in _ATOMS or id(value) in seen:
        return None
    seen[id(value)] = value  # alive, so that no other has its id
    parts: Any
    if cls in (list, tuple, set, frozenset):
        parts = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif cls is dict:
        parts = chain(
            ((f"key of {path}", key) for key in value), ((f"{path}[{key!r:.40}]", item) for key, item in value.items())
        )
    elif cls in _by_class:
        info = _by_class[cls]
        try:
            if info.is_enum:
                _enum_key(value)
                return None
            values = info.values(value)
        except Exception as exc:
            return path, str(exc) if isinstance(exc, SerializationError) else describe(exc)
        parts = ((f"{path}.{name}", item) for name, item in values.items())
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
