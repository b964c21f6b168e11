"""The handlers that users register: which are for which class, what they are called with, and whose error counts.

Knows how to inspect a callable, and which classes may be messages. Must not know sessions or who calls.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial

from . import log
from .interruptions import function_of, pass_on, pass_on_own

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Tuple, Union

    Chain = Union[Tuple[()], Tuple["Handler", "Chain"]]

__all__ = ["Handler", "HandlerList", "check_handler", "first_failure", "name_of"]

_PACKAGE = __name__.partition(".")[0]
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Handler:
    """One registered callable.

    Attributes:
        function: The callable itself; once it is unregistered, one that does nothing.
        types: The classes it is for; None for every class.
        takes_both: Whether it is called with both arguments, or with the first alone.
    """

    def __init__(self, function: Callable[..., Any], types: tuple[type, ...] | None, takes_both: bool) -> None:
        self.function: Callable[..., Any] = function
        self.types: tuple[type, ...] | None = types
        self.takes_both: bool = takes_both


class HandlerList:
    """The handlers of one event, in the order of registration.

    Args:
        event: The name of the method that registers, for error texts.
        most: How many arguments the event has.
        of_messages: Whether the first is a message.
        always: Its class, if that is always the same.

    Attributes:
        by_class: The chain of handlers, if any, for each class that ``chain_of`` was called for; emptied by each change.
    """

    def __init__(self, event: str, most: int = 2, of_messages: bool = False, always: type | None = None) -> None:
        self._event = event
        self._most = most
        self._of_messages = of_messages
        self._always = always
        self._handlers: list[Handler] = []
        self.by_class: dict[type, Chain] = {}

    def add(self, function: Callable[..., Any], caller: Any) -> None:
        """Register a handler.

        Args:
            function: Takes the event's first argument, or both. If its first parameter is annotated with a class, it
                is called for that class only.
            caller: The frame that registers it: names that are local to a function are looked up there.

        Raises:
            TypeError: It cannot be called, takes the wrong number of arguments, or would never be called by its annotation,
                which may also be one that cannot be resolved.
        """
        first, takes_both = check_handler(f"{self._event}()", function, self._most)
        types = None
        if first is not None:
            remedy = "annotate it with a message class, a union of them, or nothing"
            if self._always is not None:
                remedy = f"annotate it with {self._always.__name__}, or with nothing"
            types = _types(function, first.annotation, caller, remedy)
            if self._of_messages and types and not any([_may_be_message(cls) for cls in types]):
                problem = f"is no message class, so {self._event}() would never call it"
                remedy = "the message comes first, the session second"
                raise _refused(function, first.annotation, problem, remedy)
            if self._always is not None and types and not issubclass(self._always, types):
                problem = f"is another class than {self._always.__name__}, so {self._event}() would never call it"
                raise _refused(function, first.annotation, problem, remedy)
        self._handlers = [*self._handlers, Handler(function, types, takes_both)]
        self.by_class.clear()

    def remove(self, function: Callable[..., Any]) -> None:
        """Unregister a handler; takes effect at once, also in a dispatch that is under way.

        Raises:
            ValueError: It is not registered.
        """
        for handler in self._handlers:
            if handler.function == function:
                others = [other for other in self._handlers if other is not handler]
                # atomic: no calls
                self._handlers = others
                handler.function = _do_nothing

                self.by_class.clear()
                return
        raise ValueError(f"{name_of(function)} is not registered with {self._event}()")

    def of(self, cls: type) -> tuple[Handler, ...]:
        """Return the handlers for instances of a class."""
        return tuple([h for h in self._handlers if h.types is None or issubclass(cls, h.types)])

    def twin_of(self, cls: type) -> type | None:
        """Return a class of the same name in another module that a handler takes; None also if one takes this class."""
        taken = tuple([other for handler in self._handlers for other in handler.types or ()])
        twins = [other for other in taken if other.__qualname__ == cls.__qualname__ and other.__module__ != cls.__module__]
        return None if issubclass(cls, taken) or not twins else twins[0]

    def chain_of(self, cls: type) -> Chain:
        """Return them as nested pairs (first, rest), so that delivering a message slices nothing."""
        try:
            return self.by_class[cls]
        except KeyError:
            handlers = self._handlers
            chain: Chain = ()
            for handler in reversed(self.of(cls)):
                chain = (handler, chain)
            if chain and self._handlers is handlers:  # a signal handler may have registered another
                self.by_class[cls] = chain
            return chain


def check_handler(event: str, function: Any, most: int) -> tuple[inspect.Parameter | None, bool]:
    """Return the first parameter of a function that is to handle an event, and whether it takes the second argument.

    The parameter is None if there are only ``*args``, or if the function is written in C and has no signature.

    Args:
        event: What the texts of errors call it.
        function: What a user has passed.
        most: How many arguments the event has.

    Raises:
        TypeError: It cannot be called, or takes the wrong number of arguments, or is no plain function.
    """
    if not callable(function):
        raise TypeError(f"{event} takes a callable, not {function!r:.200}")
    try:
        signature = _signature(function)
    except ValueError:
        return None, False
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    starred = any([p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters])
    required = [p for p in parameters if p.default is inspect.Parameter.empty and p.kind not in _STARRED]
    keywords = [p for p in required if p.kind is inspect.Parameter.KEYWORD_ONLY]
    if len(required) > most or keywords or not (positional or starred):
        number = "one argument" if most == 1 else "one or two arguments"
        raise TypeError(f"{event} takes a handler of {number}, but {name_of(function)} has the signature {signature}")
    for test in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        if test(function) or test(type(function).__call__):
            what = "generator" if test is inspect.isgeneratorfunction else "coroutine"
            raise TypeError(f"{event} takes a plain function, but {name_of(function)} is a {what} function")
    # A second parameter with a default is the handler's own, unless it is called session. The *args of builtins such as
    # print() are not for the session, and before CPython 3.11 the signature does not show them.
    takes_both = most == 2 and (
        len(required) == 2
        or (starred and not inspect.isbuiltin(function))
        or (len(positional) > 1 and positional[1].name == "session")
    )
    return (positional[0] if positional else None), takes_both


def first_failure(error: BaseException, first: Exception | None, owner: Any) -> Exception:
    """Return the first error of the handlers of one message, and log another; raise what interrupts them.

    Args:
        error: What a handler has raised.
        first: What one before it has raised, or None.
        owner: Whose handlers these are, for the log.
    """
    try:
        if not isinstance(error, Exception):
            raise error
        pass_on_own(error)
    except BaseException:
        if first is not None:  # or it would be lost
            log.error("%r: an on_message handler failed", owner, exc_info=first)
        raise
    if first is None:
        return error
    log.error("%r: another on_message handler failed too", owner, exc_info=error)
    return first


def _do_nothing(*arguments: Any) -> None:
    pass


def name_of(function: Any) -> str:
    """Return the name of a handler for texts."""
    return getattr(function, "__qualname__", None) or f"{function!r:.100}"


def _signature(function: Any) -> inspect.Signature:
    """Return what a function takes, and the annotations of what it wraps."""
    options: dict[str, Any] = {}
    if sys.version_info >= (3, 14):  # where annotations that are no text are evaluated now, all of them
        options["annotation_format"] = sys.modules["annotationlib"].Format.FORWARDREF  # inspect has imported it
    wrapped = inspect.signature(function, **options)
    try:
        own = inspect.signature(function, follow_wrapped=False, **options)
    except ValueError:  # a wrapper in C, such as functools.lru_cache
        return wrapped
    parameters = list(own.parameters.values())
    if not parameters or any([p.kind in _STARRED for p in parameters]):  # a wrapper that passes on what it gets
        return wrapped
    for p in wrapped.parameters.values():
        if parameters[0].annotation is inspect.Parameter.empty:
            parameters[0] = parameters[0].replace(annotation=p.annotation)
        break
    return own.replace(parameters=parameters)


def _may_be_message(cls: type) -> bool:
    """Return whether an instance of a class may be a message: not of one of Python's, nor of this package's facades."""
    package, _, module = cls.__module__.partition(".")
    return package != "builtins" and (package != _PACKAGE or module == "messages")


def _types(function: Any, annotation: Any, caller: Any, remedy: str) -> tuple[type, ...] | None:
    """Return the classes that an annotation names, or None for all; the remedy is for one that names something else.

    Only this one annotation is resolved: another one may name what is imported under TYPE_CHECKING.
    """
    if annotation is inspect.Parameter.empty:
        return None
    try:
        types = tuple(_classes(annotation, partial(_namespace, function, caller)))
    except Exception as exc:
        pass_on(exc)
        remedy = "define or import the class where the handler is defined (not under TYPE_CHECKING), or drop the annotation"
        raise _refused(function, annotation, f"cannot be resolved: {exc}", remedy) from exc
    try:
        [issubclass(object, cls) for cls in types]  # which fails if one is None, a Protocol, a TypedDict
    except TypeError as exc:
        problem = "is no class" if None in types else f"is of no use: {exc}"
        raise _refused(function, annotation, problem, remedy) from exc
    return None if object in types else types


def _refused(function: Any, annotation: Any, problem: str, remedy: str) -> TypeError:
    shown = getattr(annotation, "__forward_arg__", annotation)
    return TypeError(f"the annotation {shown!r} of {name_of(function)}'s first parameter {problem}; {remedy}")


def _classes(annotation: Any, namespace: Callable[[], dict[str, Any]]) -> list[Any]:
    """Return the classes that an annotation names: ``object`` for any class, and None for what is no class."""
    if annotation is None:
        return [type(None)]
    if isinstance(annotation, type) and not hasattr(annotation, "__origin__") and annotation.__module__ != "typing":
        return [annotation]
    if isinstance(annotation, str):
        return _classes(eval(annotation.strip(), namespace()), namespace)
    import typing  # only now: slow to import, and in most programs annotations are classes

    origin = getattr(annotation, "__origin__", None)
    if annotation is typing.Any:
        return [object]
    if isinstance(annotation, typing.ForwardRef):  # Optional["Reply"]
        return _classes(annotation.__forward_arg__, namespace)
    if hasattr(annotation, "__metadata__"):  # Annotated
        parts = (origin,)
    elif hasattr(annotation, "__value__"):  # type X = ...
        parts = (annotation.__value__,)
    elif isinstance(annotation, typing.TypeVar):
        parts = annotation.__constraints__ or (annotation.__bound__ or object,)
    elif origin is typing.Union or type(annotation).__name__ == "UnionType":
        parts = annotation.__args__
    elif isinstance(origin, type) and origin.__module__.partition(".")[0] not in ("builtins", "collections"):
        return [origin]  # a generic message class
    else:
        return [None]
    return [cls for part in parts for cls in _classes(part, namespace)]


def _namespace(function: Any, caller: Any) -> dict[str, Any]:
    called = function_of(function)
    function = function_of(inspect.unwrap(called if hasattr(called, "__code__") else function))  # or it is a wrapper in C
    code = getattr(function, "__code__", None)
    names: dict[str, Any] = dict(getattr(function, "__globals__", {}))
    if caller is not None:  # a class that is local to the function that registers the handler
        inner = code in caller.f_code.co_consts  # the handler was defined there, so local names win over the module's
        names.update({k: v for k, v in caller.f_locals.items() if inner or k not in names})
    for name, cell in zip(getattr(code, "co_freevars", ()), getattr(function, "__closure__", None) or ()):
        try:
            names[name] = cell.cell_contents
        except ValueError:
            pass  # not assigned yet
    return names
