"""Which classes may travel, and under which name.

Must not know messages, formats or I/O. Everything that comes off a wire is built by the
``TypeInfo.build`` of an entry here: a class that was never registered cannot be built, whatever the bytes say.
"""

from __future__ import annotations

import sys

from .errors import SerializationError, printable
from .type_info import BOTH_SIDES, TypeInfo, obstacle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, TypeVar, overload

    T = TypeVar("T")

__all__ = [
    "Cache", "by_class", "clear_on_change", "lookup", "not_registered", "register", "register_type", "source", "type_info",
    "wire_name_of",
]  # fmt: skip

# What a module is called that was not imported but run: by python, by multiprocessing, by runpy.run_path().
_RUN = ("__main__", "__mp_main__", "<run_path>")

# Plain data in every format, so that converters would never be asked.
_PLAIN = (type(None), bool, int, float, str, list, tuple, dict)

# The entry of each registered class. For reading; only register() changes it.
by_class: dict[type, TypeInfo] = {}
_by_name: dict[str, TypeInfo] = {}
_caches: list[dict[Any, Any]] = []  # what serializers have worked out of the entries


def register(
    cls: type,
    wire_name: str | None = None,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
    *,
    strict: bool = False,
) -> None:
    """Enter a class under its wire name, by default the one it has already; see ``register_type``.

    If ``strict``, methods of its own that say how it is pickled are a reason to refuse it.
    """
    _check(cls, encode, decode, strict)
    origin = source(cls)
    previous = by_class.get(cls)
    # @dataclass(slots=True) makes the class a second time, without the class statement's keywords and, until it is done,
    # without the names of what it stands in: the wire name is found in the copied namespace.
    known = cls.__dict__.get("_stream_ipc_wire_name") if previous is None else previous.wire_name
    if wire_name is None:
        wire_name = known or f"{origin[0]}.{cls.__qualname__}"
    else:
        _check_name(cls, wire_name)
    info = TypeInfo(cls, wire_name, origin, encode, decode)
    taken = _by_name.get(wire_name)
    if taken is not None and known != wire_name and not _is_same(taken, info):
        raise ValueError(
            f"wire name {wire_name!r} of {cls.__module__}.{cls.__qualname__} is taken by"
            f" {taken.cls.__module__}.{taken.cls.__qualname__}; give one of them another wire_name"
        )
    if encode is None:
        cls._stream_ipc_wire_name = wire_name  # type: ignore[attr-defined]
    if previous is not None and _by_name.get(previous.wire_name) is previous:
        del _by_name[previous.wire_name]  # registered again under another name: that one counts
    by_class[cls] = info
    # A module that is run and imported as well has two classes of one name. Both are sent under it; what comes is of the
    # class that the program which is run knows.
    if taken is None or taken.cls.__module__ not in _RUN or cls.__module__ in _RUN:
        _by_name[wire_name] = info
    for cache in _caches:  # last: what is put in from now on is of the new entry
        cache.clear()


def _check(cls: type, encode: Any, decode: Any, strict: bool) -> None:
    if not isinstance(cls, type):
        raise TypeError(f"register_type() takes a class, not {cls!r:.100}")
    for name, function in (("encode", encode), ("decode", decode)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} of {cls.__qualname__} must be a function, not {function!r:.100}")
    if (encode is None) != (decode is None):
        given, missing = ("encode", "decode") if decode is None else ("decode", "encode")
        raise TypeError(f"register_type({cls.__qualname__}) got {given} without {missing}; give both or neither")
    if cls in _PLAIN:
        raise TypeError(f"{cls.__qualname__} cannot be registered: it is plain data and travels as it is")
    if encode is not None:
        return
    if cls in by_class and by_class[cls].encode is None:
        return  # accepted before
    problem = obstacle(cls, strict)
    if problem:
        if strict:
            from .advice import converter_line

            remedy = f"pass converters: {converter_line(cls)}"
        else:
            remedy = "make it a dataclass that has a field for it"
        raise TypeError(f"{cls.__qualname__} cannot be registered: {problem}; {remedy}")


def _check_name(cls: type, wire_name: Any) -> None:
    if not isinstance(wire_name, str) or not wire_name:
        raise TypeError(f"wire_name of {cls.__qualname__} must be a non-empty str, not {wire_name!r}")
    if wire_name.startswith("\\") or "\0" in wire_name:
        what = "contain a NUL" if "\0" in wire_name else "begin with a backslash"
        raise ValueError(f"wire_name of {cls.__qualname__} must not {what}: {wire_name!r}")


def source(cls: type) -> tuple[str, Any]:
    """Return the module that defines a class, by the name under which other programs import it, and its file.

    For a module that is run, the interpreter's ``__main__`` does not tell: under cProfile, trace or pdb it is theirs, and
    runpy leaves none. So the frame that defines the class is looked for, whose names say what is run.
    """
    module = cls.__module__
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    names = getattr(sys.modules.get(module), "__dict__", {}) if frame is None else frame.f_globals
    spec = names.get("__spec__")
    if module in _RUN:
        module = "__main__" if spec is None else spec.name
    elif frame is not None and spec is not None and module not in sys.modules:  # run_module() with another run_name
        module = spec.name
    elif "._" in module and module.partition(".")[0] in sys.stdlib_module_names:
        # Where the standard library keeps a class differs between versions: pathlib._local.PosixPath is pathlib.PosixPath.
        public = module.partition("._")[0]
        if getattr(sys.modules.get(public), cls.__name__, None) is cls:
            module = public
    return module, names.get("__file__")


def _is_same(old: TypeInfo, new: TypeInfo) -> bool:
    """Tell whether two classes are one: made again, or of a module that is there twice."""
    if old.cls.__qualname__ != new.cls.__qualname__:
        return False
    if old.origin[0] == new.origin[0] or old.cls.__module__ == new.cls.__module__:
        return True
    # A script that one of its own modules imports.
    run = old.cls.__module__ in _RUN or new.cls.__module__ in _RUN
    return run and old.origin[1] is not None and old.origin[1] == new.origin[1]


if TYPE_CHECKING:

    @overload
    def register_type(
        cls: type[T],
        wire_name: str | None = None,
        *,
        encode: Callable[[T], Any] | None = None,
        decode: Callable[[Any], T] | None = None,
    ) -> type[T]: ...

    @overload
    def register_type(
        cls: None = None,
        wire_name: str | None = None,
        *,
        encode: Callable[[Any], Any] | None = None,
        decode: Callable[[Any], Any] | None = None,
    ) -> Callable[[type[T]], type[T]]: ...


def register_type(
    cls: type[T] | None = None,
    wire_name: str | None = None,
    *,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
) -> type[T] | Callable[[type[T]], type[T]]:
    """Let a class that is no ``Message`` travel inside messages.

    Such as a nested dataclass, an enum, a NamedTuple. Usable as a decorator,
    with and without arguments::

        @register_type
        @dataclass
        class Point:
            x: int
            y: int

        @register_type(wire_name="App\\\\Message\\\\Suit")
        class Suit(enum.Enum): ...

    With converters any class travels, also one of a C extension, with every
    serializer::

        register_type(
            datetime, encode=datetime.isoformat, decode=datetime.fromisoformat
        )

    Args:
        cls: The class. A dataclass, an attrs class or a NamedTuple is rebuilt
            by its constructor, an enum by its member's name, any other class
            from its attributes.
        wire_name: The name it travels under; by default ``module.QualName``.
            Both sides must use the same.
        encode: Takes an instance and returns what travels for it: plain data,
            or whatever else can travel. For instances of exactly this class.
            Give both converters or neither, and the same ones on both sides.
            Pickle carries bytes and sets as they are and does not ask.
        decode: Takes what ``encode`` returned, as it arrived, and returns an
            instance of exactly this class. What it raises is a decoding error.

    Returns:
        The class itself.

    Raises:
        TypeError: Instances of the class cannot be rebuilt (it derives from
            ``list``, an exception, ...); the text has the converters that would
            do. Or only one converter was given.
        ValueError: The wire name is taken by another class.
    """
    if cls is None:
        return lambda decorated: register_type(decorated, wire_name, encode=encode, decode=decode)
    register(cls, wire_name, encode, decode, strict=True)
    return cls


def clear_on_change(cache: dict[Any, Any]) -> None:
    """Have a dict emptied whenever a class is registered, in which a serializer keeps what it has worked out per class.

    It is never forgotten again, so for dicts at module level.
    """
    _caches.append(cache)


class Cache(dict["Any", "Any"]):
    """Has for a class, or a name, what ``make`` makes of it when it is first asked for, until a class is registered."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self._make = make
        clear_on_change(self)

    def __missing__(self, key: Any) -> Any:
        made = self[key] = self._make(key)
        return made


def type_info(cls: type) -> TypeInfo:
    """Return the entry of a class; if it is not registered, the error's text says what to do with such a value."""
    try:
        return by_class[cls]
    except KeyError:
        raise not_registered(cls) from None


def wire_name_of(cls: type) -> str:
    """Return the wire name of a class, or what it is called if it has none, for a text."""
    return by_class[cls].wire_name if cls in by_class else f"{cls.__module__}.{cls.__qualname__}"


def not_registered(cls: type) -> SerializationError:
    """Return the error about a class that cannot travel, which says what to do with such a value."""
    from .advice import advice

    return SerializationError(
        f"{cls.__module__}.{cls.__qualname__} cannot travel: it is neither plain data nor registered; {advice(cls)}"
    )


def lookup(wire_name: Any) -> TypeInfo:
    """Return the entry of a wire name that was received, or raise SerializationError."""
    if not isinstance(wire_name, str):  # is not hashed: of a deeply nested tuple that ends the process
        wire_name = type(wire_name).__name__
    elif wire_name in _by_name:
        return _by_name[wire_name]
    remedy = "import the module that defines it on this side too"
    move = "; move it to a module that both sides import, or give it a wire_name"
    own = [name for name in list(_by_name) if name.startswith("__main__.") and wire_name.endswith(name[8:])]
    if wire_name.startswith("__main__."):
        remedy = "the sender defined it in the script it was started with, which no other program can import" + move
    elif own:
        remedy = f"it is {own[0]} here, of the script that this program was started with" + move
    elif wire_name.partition(".")[0] in sys.stdlib_module_names:
        remedy = "the sender registered it" + BOTH_SIDES
    raise SerializationError(f"Unknown class: {printable(wire_name[:200])} ({remedy})")
