"""The public names without any process: what making, subscribing and asking check at once."""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest

import mphub
from mphub import EventHub, Inbox, Limits, Restart, Retry, Snapshot, Stop, Subscriber, Topic
from mphub.procs import boot
from tests.helpers import without_address


def handle(payload: object) -> object:
    return payload


def other(payload: object) -> object:
    return payload


class Model(Subscriber[int, int]):
    """Handles."""

    def __init__(self, amount: int = 1) -> None:
        self.amount = amount

    def handle(self, payload: int) -> int:
        return payload + self.amount


class Stateful(Model):
    """Has a state."""

    def snapshot(self) -> int:
        return self.amount

    def restore(self, state: object) -> None: ...


# -- signatures

CONTRACT: dict[Any, dict[str, str]] = {
    EventHub: {
        "__init__": "path=None *name=None *engine='process' *max_bytes='25%' *unmatched='warn' *check=True *propagate=None "
        "*stop=Stop(ask=5.0, term=2.0)",
        "start": "*wait=True *timeout=None",
        "stop": "*drain=True *timeout=None",
        "run": "*drain_timeout=30.0",
        "drain": "timeout=None *progress=False",
        "subscribe": "keys handler *name=None *to=None *retry=Retry(max_attempts=3, on=(), delay=1.0, factor=2.0, max_delay=30.0) "
        "*restart=Restart(mode='always', max_restarts=8, delay=0.1, factor=2.0, max_delay=30.0) "
        "*inbox=Inbox(maxsize=100000, max_bytes=256000000, overflow='block', expires=None) "
        "*limits=Limits(timeout=None, start_timeout=60.0) *snapshot=None",
        "subscription": "name_or_handler",
        "subscribers": "key",
        "publish": "key payload *ordering_key=None *headers=None *now=False *confirm=False *priority=0 *delay=0.0 *expires=None",
        "publish_batch": "key payloads",
        "transaction": "",
        "flush": "timeout=None",
        "publisher": "",
        "attach": "queue",
        "publish_async": "key payload *ordering_key=None *headers=None *now=False *confirm=False *priority=0 *delay=0.0 *expires=None",
        "request": "key payload *to=None *expires=None",
        "map": "key payloads *to=None *expires=None",
        "statistics": "",
        "on_notice": "callback",
        "dead_letters": "name=None",
        "redrive": "name=None ids=None",
        "purge": "name=None ids=None",
    },
    mphub.Subscription: {
        "request": "payload *expires=None",
        "map": "payloads *ordered=True *errors='raise' *progress=False *total=None",
        "wait_ready": "timeout=None",
        "restart": "",
        "unsubscribe": "*drain=True *forget=False",
        "statistics": "",
        "dead_letters": "",
        "redrive": "ids=None",
        "purge": "ids=None",
    },
    mphub.Publisher: {
        "publish": "key payload *ordering_key=None *headers=None *now=False *confirm=False *priority=0 *delay=0.0 *expires=None",
        "publish_async": "key payload *ordering_key=None *headers=None *now=False *confirm=False *priority=0 *delay=0.0 *expires=None",
        "request": "key payload *to=None *expires=None",
        "flush": "timeout=None",
        "transaction": "",
        "publish_batch": "key payloads",
        "close": "",
    },
    mphub.Topic: {"__init__": "key payload_type=None"},
    Subscriber: {"setup": "", "handle": "payload", "teardown": "", "snapshot": "", "restore": "state"},
}


@pytest.mark.parametrize(("owner", "method"), [(owner, method) for owner, methods in CONTRACT.items() for method in methods])
def test_parameters_are_those_of_the_contract(owner: type, method: str) -> None:
    parameters = list(inspect.signature(getattr(owner, method)).parameters.values())[1:]
    words = " ".join(
        ("*" if p.kind is p.KEYWORD_ONLY else "") + p.name + ("" if p.default is p.empty else f"={p.default!r}") for p in parameters
    )
    assert words.startswith(CONTRACT[owner][method])
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters), "no option is hidden"


def test_a_reply_is_a_future_and_an_id_an_int() -> None:
    assert issubclass(mphub.Reply, concurrent.futures.Future)
    assert issubclass(mphub.EventId, int)
    assert not issubclass(Topic, str)


# -- making a hub


def traces() -> tuple[set[int], int, list[str]]:
    """Return this process's children, threads and descriptors."""
    return {child.pid for child in psutil.Process().children()}, threading.active_count(), os.listdir("/dev/fd")


def test_making_a_hub_and_its_handles_does_nothing() -> None:
    before = traces()
    hub = EventHub(max_bytes="1GB", name="mine")
    subscription = hub.subscribe("k", handle)
    publisher, queue, copy = hub.publisher(), hub.queue, pickle.loads(pickle.dumps(hub))
    for each in (publisher, queue, copy):
        pickle.dumps(each)
    assert traces() == before
    assert not os.path.exists(hub._address.folder)
    assert repr(hub) == "<EventHub 'mine' (process, not started, 1 subscribers)>"
    assert repr(subscription) == "<Subscription 'handle' to k: STOPPED>"
    assert copy.name == "mine"
    hub.stop()


def test_a_hub_is_named_after_its_script() -> None:
    assert str(os.getpid()) in EventHub().name


@pytest.mark.parametrize(
    "options",
    [
        {"engine": "threads"}, {"engine": None}, {"unmatched": "raise"}, {"max_bytes": "much"}, {"max_bytes": "0%"}, {"max_bytes": 0},
        {"max_bytes": -5}, {"max_bytes": "101%"}, {"max_bytes": None}, {"propagate": True}, {"name": "\udcff"},
        {"name": 5},
    ],
    ids=without_address,
)  # fmt: skip
def test_a_wrong_option_of_a_hub_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(mphub.InvalidOption, match=f"{next(iter(options))}.*got"):
        EventHub(**options)


# -- what is not there yet


def test_options_of_later_versions_are_refused_by_name() -> None:
    calls: dict[str, Callable[..., object]] = {
        "notify": lambda: EventHub(notify=["mailto:me"]),
        "dashboard": lambda: EventHub(dashboard=1),  # type: ignore[arg-type]
    }
    for name, call in calls.items():
        with pytest.raises(mphub.InvalidOption, match=f"{name}.*this version has only"):
            call()


# -- subscribing


def test_a_subscription_is_named_after_its_handler() -> None:
    hub = EventHub()
    named: dict[str, Any] = {
        "handle": handle, "Model": Model, "other": functools.partial(other), "Stateful": Stateful(2), "upper": str.upper,
        "getcwd": "os:getcwd", "join": "os:path.join", "handler": lambda n: n,
    }  # fmt: skip
    for name, handler in named.items():
        assert hub.subscribe("k", handler).name == name
    assert list(hub.subscriptions) == list(named)


def test_the_same_handler_once_more_gets_a_number_and_another_one_is_refused() -> None:
    hub = EventHub()
    assert [hub.subscribe("k", handle).name for _ in range(3)] == ["handle", "handle-2", "handle-3"]
    assert [hub.subscribe("k", lambda n: n).name for _ in range(2)] == ["handler", "handler-2"]
    assert [hub.subscribe("k", "os:getcwd").name for _ in range(2)] == ["getcwd", "getcwd-2"]

    def another(payload: object) -> object:
        return payload

    another.__name__ = "handle"
    with pytest.raises(mphub.NameTaken, match="another handler is subscribed as 'handle'"):
        hub.subscribe("k", another)
    assert hub.subscribe("k", another, name="mine").name == "mine"
    with pytest.raises(mphub.NameTaken, match="'mine' is subscribed already"):
        hub.subscribe("k", other, name="mine")
    hub.subscription("mine").unsubscribe()
    assert hub.subscribe("k", other, name="mine").name == "mine"


@pytest.mark.parametrize("name", ["", "a b", "a.b", "ä", "x" * 65, 5], ids=repr)
def test_what_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(mphub.InvalidOption, match="name: got"):
        EventHub().subscribe("k", handle, name=name)


@pytest.mark.parametrize(
    ("keys", "patterns"),
    [
        ("a.b", ("a.b",)),
        (["a", "b.*", "a"], ("a", "b.*")),
        (("a", Topic("c.>", int)), ("a", "c.>")),
        (Topic("c", int), ("c",)),
        (">", (">",)),
    ],
)
def test_keys_are_one_or_several(keys: Any, patterns: tuple[str, ...]) -> None:
    assert EventHub().subscribe(keys, handle).keys == patterns


@pytest.mark.parametrize("keys", [[], None, 5, b"k", {"k": 1}, [1], ["a", "b c"], "a.>.b", "a*", "a..b", ""], ids=repr)
def test_what_is_no_key_is_refused(keys: Any) -> None:
    hub = EventHub()
    with pytest.raises(mphub.InvalidKey):
        hub.subscribe(keys, handle)
    assert not hub.subscriptions


class NoHandle(Subscriber[int, int]):
    """Lacks its method."""


class Yields(Subscriber[int, Any]):
    """Its method runs nothing when it is called."""

    def handle(self, payload: int) -> Any:
        yield payload


def yields(payload: object) -> Any:
    yield payload


async def yields_later(payload: object) -> Any:
    yield payload


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (5, "expected a function"),
        (None, "expected a function"),
        (lambda: 1, "one argument"),
        (lambda a, b: 1, "one argument"),
        (lambda *, a: 1, "one argument"),
        (dict, "subclass of mphub.Subscriber"),
        (NoHandle, r"no handle\(self, payload\)"),
        ("os.getcwd", "module:attribute"),
        ("os:", "module:attribute"),
        (":getcwd", "module:attribute"),
        (yields, "'yields' is a generator function"),
        (yields_later, "'yields_later' is a generator function"),
        (functools.partial(yields), "generator function"),
        (Yields, "'Yields.handle' is a generator function"),
        (functools.partial(Yields), "generator function"),
        (Yields().handle, "generator function"),
        (Yields(), "generator function"),
    ],
    ids=without_address,
)
def test_what_is_no_handler_is_refused(handler: Any, words: str) -> None:
    hub = EventHub()
    with pytest.raises(mphub.InvalidOption, match=words):
        hub.subscribe("k", handler)
    assert not hub.subscriptions


def test_what_cannot_be_sent_is_refused_when_subscribed() -> None:
    lock = threading.Lock()
    hub = EventHub()
    with pytest.raises(mphub.PayloadError, match="handler of 'locked'"):
        hub.subscribe("k", lambda n: lock.locked(), name="locked")
    with pytest.raises(mphub.PayloadError, match="handler of 'Model'"):
        hub.subscribe("k", Model(lock))  # type: ignore[arg-type]
    assert not hub.subscriptions


@pytest.mark.parametrize(
    "options",
    [
        {"retry": 3}, {"restart": "never"}, {"inbox": 100}, {"limits": 5.0}, {"snapshot": True}, {"retry": Restart()}, {"restart": Retry()},
        {"inbox": None}, {"limits": Stop()}, {"recycle": 5}, {"recycle": None},
    ],
    ids=without_address,
)  # fmt: skip
def test_an_option_of_a_wrong_type_is_named_with_what_was_expected(options: dict[str, Any]) -> None:
    field = next(iter(options))
    with pytest.raises(mphub.InvalidOption, match=rf"{field}: got .*; expected {field.capitalize()}\("):
        EventHub().subscribe("k", Stateful, **options)


def test_a_process_is_replaced_at_a_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "memory_limit", lambda: 1000)
    for asked, kept in (("25%", 250), ("1MB", 10**6), (5, 5), (None, None)):
        assert EventHub().subscribe("k", len, recycle=mphub.Recycle(7, max_rss=asked))._spec.recycle == mphub.Recycle(7, max_rss=kept)


@pytest.mark.parametrize("to", ["a.*", "", 5, "a b"], ids=repr)
def test_results_go_to_one_key(to: Any) -> None:
    with pytest.raises(mphub.InvalidKey):
        EventHub().subscribe("k", handle, to=to)
    EventHub().subscribe("k", handle, to=Topic("out", object))


def test_only_a_class_that_defines_snapshots_has_them() -> None:
    hub = EventHub()
    for handler, words in ((Model, "Model has no snapshot"), (handle, "only a Subscriber class")):
        with pytest.raises(mphub.InvalidOption, match=words):
            hub.subscribe("k", handler, snapshot=Snapshot())
    hub.subscribe("k", Stateful, snapshot=Snapshot(every=1))


def test_the_decorator_returns_what_it_decorates() -> None:
    hub = EventHub()
    assert hub.subscriber("a", retry=Retry(2))(handle) is handle
    assert hub.subscriber(["b", Topic("c", int)], name="model", limits=Limits(timeout=1), inbox=Inbox(maxsize=1))(Model) is Model
    assert {name: found.keys for name, found in hub.subscriptions.items()} == {"handle": ("a",), "model": ("b", "c")}


# -- looking


def test_a_subscription_is_found_by_name_or_handler() -> None:
    hub = EventHub()
    instance = Model(3)
    made = [hub.subscribe("k", handler) for handler in (handle, Stateful, "os:getcwd", instance)]
    assert [hub.subscription(each) for each in (handle, Stateful, "getcwd", instance)] == made
    with pytest.raises(mphub.NoSubscriber, match="did you mean 'handle'"):
        hub.subscription("handel")
    with pytest.raises(LookupError, match="there are: handle, Stateful, getcwd, Model"):
        hub.subscription("q")
    with pytest.raises(mphub.NoSubscriber, match="there are: none"):
        EventHub().subscription("q")


def test_who_would_get_a_key_can_be_asked_before_the_start() -> None:
    hub = EventHub()
    hub.subscribe(["orders.*", "all.>"], handle)
    hub.subscribe(">", other)
    found = {key: hub.subscribers(key) for key in ("orders.new", "orders", "all", "all.a.b")}
    assert found == {"orders.new": ["handle", "other"], "orders": ["other"], "all": ["other"], "all.a.b": ["handle", "other"]}
    assert hub.subscribers(Topic("orders.new", int)) == ["handle", "other"]
    with pytest.raises(mphub.InvalidKey, match="wildcards"):
        hub.subscribers("orders.*")


def test_the_mapping_of_subscriptions_is_a_copy() -> None:
    hub = EventHub()
    hub.subscribe("k", handle)
    found: Any = hub.subscriptions
    found.clear()
    assert list(hub.subscriptions) == ["handle"]


def test_a_handle_says_where_the_rest_works() -> None:
    hub = EventHub(name="far")
    handle_ = pickle.loads(pickle.dumps(hub))
    calls: list[Any] = [
        handle_.start, handle_.stop, handle_.drain, handle_.statistics, handle_.dead_letters, handle_.redrive, handle_.purge,
        lambda: handle_.subscribe("k", handle), lambda: handle_.subscriber("k")(handle), lambda: handle_.attach(None),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(mphub.HubError, match=r"handle of hub 'far', .* works in the process that made the hub"):
            call()
    for call in (lambda: handle_.publish("k", 1), lambda: handle_.request("k", 1), lambda: handle_.publisher().publish("k", 1)):
        with pytest.raises(mphub.HubClosed, match="hub 'far' is not running: start it first"):
            call()


def test_outside_a_handler_there_is_no_event() -> None:
    with pytest.raises(mphub.HubError, match="inside a handler only"):
        mphub.current_event()
    with pytest.raises(mphub.HubError, match=r"elsewhere use hub\.publish"):
        mphub.publish("k", 1)
