from __future__ import annotations

import functools
import sys
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Generic, List, Optional, Tuple, TypeVar, Union

import pytest

from stream_ipc import IpcPeer, Session
from stream_ipc.handlers import HandlerList
from stream_ipc.messages import ErrorMessage, LogMessage, Message

if TYPE_CHECKING:
    from decimal import Decimal as NotImported  # noqa: F401


@dataclass
class First(Message, wire_name="test.handlers.First"):
    pass


@dataclass
class Second(Message, wire_name="test.handlers.Second"):
    pass


@dataclass
class FirstChild(First, wire_name="test.handlers.FirstChild"):
    pass


def added(function: Any, caller: Any = None) -> HandlerList:
    handlers = HandlerList("on_message")
    handlers.add(function, caller or sys._getframe(1))
    return handlers


def takes_both(function: Any) -> bool:
    (handler,) = added(function, sys._getframe(1)).of(First)
    return handler.takes_both


def called_for(function: Any, caller: Any = None) -> List[type]:
    handlers = added(function, caller or sys._getframe(1))
    return [cls for cls in (First, FirstChild, Second, LogMessage) if handlers.of(cls)]


EVERY = [First, FirstChild, Second, LogMessage]
FIRST = [First, FirstChild]


# --- how many arguments ---------------------------------------------------------------------------------------


def test_a_wrapper_that_takes_another_number_than_what_it_wraps() -> None:
    def one(message: First) -> None: ...

    def two(message: First, session: Any) -> None: ...

    @functools.wraps(one)
    def adds_the_session(anything: Any, its_session: Any) -> None: ...

    @functools.wraps(two)
    def takes_none(anything: Any) -> None: ...

    @functools.wraps(one)
    def passes_on(*arguments: Any, **keywords: Any) -> None: ...

    assert [takes_both(function) for function in (adds_the_session, takes_none, passes_on)] == [True, False, False]
    for function in (adds_the_session, takes_none, passes_on):
        assert called_for(function) == FIRST


def test_a_wrapper_in_c_that_does_not_tell_what_it_takes() -> None:
    @functools.lru_cache(None)
    def one(message: First) -> None: ...

    @functools.lru_cache(None)
    def two(message: First, session: Any) -> None: ...

    assert [takes_both(function) for function in (one, two)] == [False, True]
    for function in (one, two, staticmethod(one)):
        assert called_for(function) == FIRST


def test_what_does_nothing_when_it_is_called_is_refused() -> None:
    async def several(message: Any) -> Any:
        yield message

    class Asynchronous:
        async def __call__(self, message: Any) -> None: ...

    class Generating:
        def __call__(self, message: Any) -> Any:
            yield message

    for function, what in ((several, "coroutine"), (Asynchronous(), "coroutine"), (Generating(), "generator")):
        with pytest.raises(TypeError, match=f"takes a plain function, but .* is a {what} function"):
            added(function)


class Methods:
    def one(self, message: Any) -> None: ...

    def two(self, message: Any, session: Any) -> None: ...

    @classmethod
    def of_class(cls, message: Any) -> None: ...

    @classmethod
    def of_class_two(cls, message: Any, session: Any) -> None: ...

    @staticmethod
    def static(message: Any) -> None: ...

    @staticmethod
    def static_two(message: Any, session: Any) -> None: ...


class CallsOne:
    def __call__(self, message: First) -> None: ...


class CallsTwo:
    def __call__(self, message: Any, other: Any) -> None: ...


class Built:
    def __init__(self, message: First) -> None: ...


def three(a: Any, b: Any, c: Any) -> None: ...


ONE: List[Any] = [
    lambda message: None,
    lambda message, x=1: None,
    lambda message, x=1, y=2: None,
    lambda message, *, x=1: None,
    lambda message, **kwargs: None,
    Methods().one,
    Methods.of_class,
    Methods().of_class,
    Methods.static,
    CallsOne(),
    Built,
    functools.partial(three, 1, 2),
    functools.partial(lambda message, session: None, session=5),
    functools.partial(Methods().two, session=5),
    [].append,
    print,
    len,
    str,
]

TWO: List[Any] = [
    lambda message, session: None,
    lambda a, b: None,
    lambda a, b, c=3: None,
    lambda *args: None,
    lambda message, *args: None,
    lambda message, session=None: None,
    lambda a, session=None, c=1: None,
    lambda *args, **kwargs: None,
    Methods().two,
    Methods.of_class_two,
    Methods.static_two,
    CallsTwo(),
    functools.partial(three, 1),
    lambda a, b, *, key=None: None,
]

WRONG: List[Any] = [
    lambda: None,
    lambda a, b, c: None,
    three,
    lambda *, message: None,
    lambda message, *, needed: None,
    lambda **kwargs: None,
    functools.partial(three, 1, 2, 3),
    functools.partial(three, c=1, b=2, a=3),
    Methods.two,
]


@pytest.mark.parametrize("function", ONE, ids=range(len(ONE)))
def test_handlers_of_one_argument(function: Any) -> None:
    assert not takes_both(function)


@pytest.mark.parametrize("function", TWO, ids=range(len(TWO)))
def test_handlers_of_two_arguments(function: Any) -> None:
    assert takes_both(function)


@pytest.mark.parametrize("function", WRONG, ids=range(len(WRONG)))
def test_handlers_that_take_something_else(function: Any) -> None:
    handlers = HandlerList("on_request")
    with pytest.raises(TypeError, match=r"on_request\(\) takes a handler of one or two arguments, but .* the signature"):
        handlers.add(function, None)
    assert handlers.of(object) == ()


@pytest.mark.parametrize("thing", [None, 5, "name", [], First()], ids=repr)
def test_what_cannot_be_called(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"on_close\(\) takes a callable, not"):
        HandlerList("on_close").add(thing, None)


# --- for which classes ----------------------------------------------------------------------------------------


def test_no_annotation_is_for_every_class() -> None:
    def untyped(message):  # type: ignore[no-untyped-def]
        pass

    def anything(message: Any) -> None: ...

    def an_object(message: object) -> None: ...

    def base(message: Message) -> None: ...

    for function in (untyped, anything, an_object, base, lambda message: None, lambda *args: None, print):
        assert called_for(function) == EVERY


def test_a_class_is_for_it_and_what_derives_from_it() -> None:
    def typed(message: First) -> None: ...

    def quoted(message: "First") -> None: ...  # noqa: UP037

    def with_session(message: First, session: Nowhere) -> Nowhere:  # type: ignore[name-defined]  # noqa: F821
        return None

    for function in (typed, quoted, with_session):
        assert called_for(function) == FIRST


def annotated(annotation: Any) -> Callable[[Any], None]:
    def handler(message: Any) -> None: ...

    handler.__annotations__["message"] = annotation
    return handler


T = TypeVar("T")
Bound = TypeVar("Bound", bound=First)
Either = TypeVar("Either", First, Second)


@dataclass
class Holder(Message, Generic[T], wire_name="test.handlers.Holder"):
    item: T


@pytest.mark.parametrize(
    "annotation",
    [
        First,
        "First",
        " First ",
        "'First'",
        "Union[First]",
        "Optional[First]",
        "First | None",
        "None | First",
        "Union['First', None]",
        Optional[First],
        Optional["First"],
        Bound,
        "Bound",
        "typing.Optional[First]",
    ],
    ids=repr,
)
def test_annotations_for_one_class(annotation: Any) -> None:
    assert called_for(annotated(annotation)) == FIRST


@pytest.mark.parametrize(
    "annotation",
    [
        Union[First, Second],
        "Union[First, Second]",
        "First | Second",
        "First|Second|None",
        "FirstChild | First | Second",
        "Optional[Union[First, Second]]",
        "Union[First, None] | Second",
        "'First | Second'",
        Either,
        "Either",
        Union["First", Second],
        Union["First | None", "Second"],
        "Union['First', Second]",
        Optional["Union[First, Second]"],
    ],
    ids=repr,
)
def test_annotations_for_two_classes(annotation: Any) -> None:
    assert called_for(annotated(annotation)) == [First, FirstChild, Second]


def test_a_union_that_is_no_text() -> None:
    assert called_for(annotated(First | Second)) == [First, FirstChild, Second]
    assert called_for(annotated(First | None)) == FIRST


@pytest.mark.parametrize("annotation", [Any, object, "Any", "object", "First | Any", Union[First, object], T], ids=repr)
def test_annotations_for_every_class(annotation: Any) -> None:
    assert called_for(annotated(annotation)) == EVERY


def test_annotated_annotations() -> None:
    for annotation in (
        typing.Annotated[First, "x"], typing.Annotated[Optional[First], 5], "typing.Annotated[First | None, 'x']",
        Optional[typing.Annotated["First", "x"]],
    ):  # fmt: skip
        assert called_for(annotated(annotation)) == FIRST
    for annotation in (typing.Annotated[First | Second, "x"], typing.Annotated["First | Second", "x"]):
        assert called_for(annotated(annotation)) == [First, FirstChild, Second]
    assert called_for(annotated(typing.Annotated[Any, "x"])) == EVERY
    with pytest.raises(TypeError, match="is no class"):
        added(annotated(typing.Annotated[List[First], "x"]))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there is no type statement")
def test_names_of_types() -> None:
    names: dict[str, Any] = {"First": First, "Second": Second, "Holder": Holder}
    exec("type One = First\ntype Two = One | Second\ntype Held[T] = First | Holder[T]\ntype Self = Self | None", names)
    one = names["One"]
    for annotation in (one, Optional[one], typing.Annotated[one, "x"], names["Held"][int]):
        assert called_for(annotated(annotation)) == FIRST
    assert called_for(annotated(names["Two"])) == [First, FirstChild, Second]
    assert added(annotated(names["Held"][int])).of(Holder)
    exec("type Later = Nowhere", names)
    for name in ("Later", "Self"):
        with pytest.raises(TypeError, match=f"the annotation {name} of .* cannot be resolved"):
            added(annotated(names[name]))


def test_a_generic_message() -> None:
    for annotation in (Holder, Holder[int], "Holder[int]", "Holder[int] | None"):
        handlers = added(annotated(annotation))
        assert handlers.of(Holder)
        assert not handlers.of(First)


def test_an_exception_class() -> None:
    def handler(error: OSError) -> None: ...

    handlers = added(handler)
    assert handlers.of(ConnectionError)
    assert not handlers.of(ValueError)


UNRESOLVABLE: List[Tuple[Any, str]] = [
    ("Nowhere", "cannot be resolved: name 'Nowhere' is not defined; define or import the class"),
    ("NotImported", "cannot be resolved: name 'NotImported'.*not under TYPE_CHECKING"),
    ("First | Nowhere", "cannot be resolved: name 'Nowhere'"),
    ("typing.Nowhere", "cannot be resolved"),
    ("not an expression", "cannot be resolved"),
    ("", "cannot be resolved"),
    ("1 / 0", "cannot be resolved: division by zero"),
    (5, "is no class"),
    ("5", "is no class"),
    ([First], "is no class"),
    (List[First], "is no class"),
    ("List[First]", "is no class"),
    (typing.Type[First], "is no class"),
    (Callable[[Any], None], "is no class"),
    (Union[First, List[First]], "is no class"),
]


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated where they stand")
def test_an_annotation_may_name_a_class_that_is_defined_later() -> None:
    names: dict[str, Any] = {}
    exec(compile("def handler(message: Later): pass", "later", "exec", dont_inherit=True), names)
    with pytest.raises(TypeError, match="the annotation 'Later' of handler's first parameter cannot be resolved"):
        added(names["handler"])
    names["Later"] = First
    assert called_for(names["handler"]) == FIRST


@pytest.mark.parametrize(("annotation", "text"), UNRESOLVABLE, ids=[repr(a) for a, _ in UNRESOLVABLE])
def test_an_annotation_of_no_use_is_an_error_at_registration(annotation: Any, text: str) -> None:
    handlers = HandlerList("on_message")
    with pytest.raises(TypeError, match=f"annotation .* of .*handler's first parameter {text}"):
        handlers.add(annotated(annotation), sys._getframe())
    assert handlers.of(object) == ()
    assert handlers.of(First) == ()


def test_a_class_that_cannot_be_asked_for_is_an_error_at_registration() -> None:
    class HasJob(typing.Protocol):
        job: str

    class Dict_(typing.TypedDict):
        job: str

    for annotation in (HasJob, Dict_, Union[First, HasJob]):
        with pytest.raises(TypeError, match="is of no use"):
            HandlerList("on_message").add(annotated(annotation), None)


def test_only_the_first_parameter_is_looked_at() -> None:
    def handler(message: First, session: Nowhere) -> Nowhere:  # type: ignore[name-defined]  # noqa: F821
        return None

    assert called_for(handler) == FIRST


def test_methods_partials_and_callable_objects_are_looked_into() -> None:
    class Typed:
        def method(self, message: First) -> None: ...

        def both(self, message: First, session: Any) -> None: ...

        @classmethod
        def of_class(cls, message: First) -> None: ...

        @staticmethod
        def static(message: First) -> None: ...

        def __call__(self, message: First) -> None: ...

    @functools.wraps(Typed().method)
    def wrapped(*args: Any) -> None: ...

    def later(first: Any, message: First) -> None: ...

    for function in (
        Typed().method,
        Typed().both,
        Typed.of_class,
        Typed.static,
        Typed(),
        CallsOne(),
        Built,
        wrapped,
        functools.partial(later, 1),
        functools.partial(Typed().both, session=1),
        functools.partial(functools.partial(Typed().method)),
    ):
        assert called_for(function) == FIRST


def test_a_class_that_is_local_to_where_the_handler_is_registered() -> None:
    @dataclass
    class Local(Message, wire_name="test.handlers.Local"):
        pass

    def handler(message: Local) -> None: ...

    handlers = HandlerList("on_message")
    handlers.add(handler, sys._getframe())
    assert handlers.of(Local)
    assert not handlers.of(First)


def test_a_local_class_hides_that_of_the_module() -> None:
    @dataclass
    class First(Message, wire_name="test.handlers.LocalFirst"):
        pass

    def handler(message: First) -> None: ...

    handlers = HandlerList("on_message")
    handlers.add(handler, sys._getframe())
    assert handlers.of(First)
    assert not handlers.of(FirstChild)


def of_the_module(message: First) -> None: ...


def test_a_local_name_does_not_hide_the_module_of_a_handler_from_elsewhere() -> None:
    real = FirstChild.__mro__[1]

    class First:
        pass

    handlers = HandlerList("on_message")
    handlers.add(of_the_module, sys._getframe())
    assert handlers.of(real)
    assert not handlers.of(First)


def test_a_class_in_the_closure_of_the_handler() -> None:
    def make() -> Tuple[Any, Any]:
        @dataclass
        class Hidden(Message, wire_name="test.handlers.Hidden"):
            pass

        def handler(message: Hidden) -> type:
            return Hidden

        return handler, Hidden

    handler, hidden = make()
    handlers = added(handler)
    assert handlers.of(hidden)
    assert not handlers.of(First)


# --- registering and unregistering ----------------------------------------------------------------------------


def functions(handlers: HandlerList, cls: type = First) -> List[Any]:
    return [handler.function for handler in handlers.of(cls)]


def test_handlers_keep_the_order_of_registration() -> None:
    handlers = HandlerList("on_message")
    one, two, three = annotated(First), annotated(Any), annotated(FirstChild)
    for function in (one, two, three):
        handlers.add(function, None)
    assert functions(handlers) == [one, two]
    assert functions(handlers, FirstChild) == [one, two, three]
    assert functions(handlers, ErrorMessage) == [two]


def test_a_handler_registered_later_is_seen_for_a_class_asked_for_before() -> None:
    handlers = added(annotated(Second))
    assert handlers.of(First) == ()
    late = annotated(First)
    handlers.add(late, None)
    assert functions(handlers) == [late]


def test_a_handler_registered_twice_is_called_twice_and_removed_once() -> None:
    handlers = HandlerList("on_message")
    one = annotated(Any)
    handlers.add(one, None)
    handlers.add(one, None)
    assert functions(handlers) == [one, one]
    handlers.remove(one)
    assert functions(handlers) == [one]
    handlers.remove(one)
    assert functions(handlers) == []


def test_a_bound_method_is_found_again() -> None:
    methods = Methods()
    handlers = added(methods.one)
    with pytest.raises(ValueError, match=r"Methods.one is not registered with on_message\(\)"):
        handlers.remove(Methods().one)
    handlers.remove(methods.one)
    assert handlers.of(object) == ()


def test_removing_what_is_not_registered() -> None:
    handlers = added(annotated(Any))
    for unknown in (annotated(Any), None, 5, functools.partial(three, 1)):
        with pytest.raises(ValueError, match=r"is not registered with on_message\(\)"):
            handlers.remove(unknown)  # type: ignore[arg-type]
    assert len(functions(handlers)) == 1


def test_removal_takes_effect_in_a_dispatch_that_is_under_way() -> None:
    handlers = HandlerList("on_message")
    called: List[str] = []

    def one(message: Any) -> None:
        called.append("one")
        handlers.remove(two)
        handlers.add(three, None)

    def two(message: Any) -> None:
        called.append("two")

    def three(message: Any) -> None:
        called.append("three")

    handlers.add(one, None)
    handlers.add(two, None)
    for handler in handlers.of(First):
        handler.function(First())
    assert called == ["one"]  # one that was added meanwhile waits for the next message
    assert functions(handlers) == [one, three]


def test_a_handler_removed_and_added_again_is_called_once() -> None:
    handlers = HandlerList("on_message")
    called: List[Any] = []
    handlers.add(called.append, None)
    (old,) = handlers.of(First)
    handlers.remove(called.append)
    handlers.add(called.append, None)
    (new,) = handlers.of(First)
    old.function(1)
    new.function(2)
    assert called == [2]


def test_a_generator_function_is_no_handler() -> None:
    def handler(message: Message) -> Any:
        yield 1

    with pytest.raises(TypeError, match="is a generator function"):
        added(handler)


@pytest.mark.parametrize("cls", [Session, IpcPeer, int])
def test_first_parameter_that_no_message_can_be_is_refused(peer: IpcPeer, cls: type) -> None:
    session, _ = peer.create_session_pair()

    def swapped(first: Any, second: Any) -> None:
        raise AssertionError

    swapped.__annotations__["first"] = cls
    for register in (session.on_message, session.on_request):
        with pytest.raises(TypeError, match="the message comes first, the session second"):
            register(swapped)
