"""Right and wrong uses of the public names, for type checkers only: a line that ends with ``# error`` must be reported, no other may;
``# error in`` names the only checker that does so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, assert_type

import mphub
from mphub import (
    Batch,
    DeadLetter,
    Event,
    EventHub,
    EventId,
    HubQueue,
    HubStatistics,
    Inbox,
    Limits,
    Notice,
    Progress,
    Publisher,
    Recycle,
    Reply,
    Restart,
    Results,
    Retry,
    Snapshot,
    Stop,
    Subscriber,
    SubscriberStatistics,
    Subscription,
    Topic,
    Transaction,
)


class Order:
    """A payload."""

    def __init__(self, number: int) -> None:
        self.number = number


class Special(Order):
    """A payload that is an order too."""


ORDERS = Topic("orders.created", Order)
NUMBERS: Topic[int] = Topic("numbers")
hub = EventHub(name="typed", max_bytes="10%", stop=Stop(ask=1.0))


def ship(order: Order) -> str:
    return f"{order.number}"


def double(number: int) -> int:
    return 2 * number


async def fetch(number: int) -> bytes:
    return bytes(number)


class Counter(Subscriber[int, float]):
    """Counts."""

    def handle(self, payload: int) -> float:
        return payload / 2


class Model(Subscriber[Order, str]):
    """Made with something."""

    def __init__(self, path: str = "model") -> None:
        self.path = path

    def setup(self) -> None:
        self.log.info("%s %d: %s", self.name, self.replica, self.path)

    def handle(self, payload: Order) -> str:
        return f"{payload.number}"


class Client(Subscriber[int, bytes]):
    """Waits."""

    async def handle(self, payload: int) -> bytes:
        return bytes(payload)


class Together(Subscriber[int, bytes]):
    """Handles several at once."""

    def handle_batch(self, payloads: list[int]) -> list[bytes]:
        return [bytes(payload) for payload in payloads]


class TogetherWrong(Subscriber[int, bytes]):
    """Takes what it is not given."""

    def handle_batch(self, payloads: list[str]) -> list[bytes]:  # error
        return []


class Wrong(Subscriber[int, str]):
    """Returns what it does not say."""

    def handle(self, payload: int) -> int:  # error
        return payload


class Callback:
    """Can be called."""

    def __call__(self, number: int) -> bytes:
        return bytes(number)


def double_all(numbers: list[int]) -> list[int]:
    return [2 * number for number in numbers]


async def fetch_all(numbers: list[int]) -> list[bytes]:
    return [bytes(number) for number in numbers]


def store(orders: list[Order]) -> None:
    print(len(orders))


def join(number: int, text: str) -> str:
    return f"{number} {text}"


# -- options

EventHub(engine="process")
EventHub(max_byte=1)  # error
EventHub(stop=5.0)  # error
Restart(max_restarts="8")  # error
Retry(3, on=(KeyError, OSError))
Retry(3, KeyError)  # error
Retry(on="KeyError")  # error
Inbox(maxsize="many")  # error
Limits(timeout="1 s")  # error
Snapshot(every=1.5)  # error
Recycle(max_events="8")  # error
Batch(wait="1 s")  # error
Batch().size = 3  # error
Restart().delay = 2.0  # error
Retry().delay = 2.0  # error
Stop().ask = 1.0  # error
Inbox().maxsize = 3  # error
Limits().timeout = 3.0  # error
Snapshot().every = 3  # error
ORDERS.key = "other"  # error
Topic("orders", 3)  # error
objects: Topic[object] = ORDERS  # error

# -- subscribe

assert_type(hub.subscribe("numbers", double), Subscription[int, int])
assert_type(hub.subscribe(["numbers", NUMBERS], double), Subscription[int, int])
assert_type(hub.subscribe(ORDERS, ship), Subscription[Order, str])
assert_type(hub.subscribe("numbers", Counter), Subscription[int, float])
assert_type(hub.subscribe("numbers", Counter()), Subscription[int, float])
assert_type(hub.subscribe("numbers", fetch), Subscription[int, bytes])
assert_type(hub.subscribe("numbers", Client), Subscription[int, bytes])
assert_type(hub.subscribe("numbers", Callback()), Subscription[int, bytes])
assert_type(hub.subscribe("numbers", str.upper), Subscription[str, str])
assert_type(hub.subscribe("orders.*", Model), Subscription[Order, str])
assert_type(hub.subscribe("orders.*", Model("other")), Subscription[Order, str])
assert_type(hub.subscribe("orders.*", functools.partial(Model, "other")), Subscription[Order, str])
assert_type(hub.subscribe(ORDERS, Model), Subscription[Order, str])
assert_type(hub.subscribe(ORDERS, functools.partial(Model, "other")), Subscription[Order, str])
assert_type(hub.subscribe("numbers", "package.module:handler"), Subscription[Any, Any])
assert_type(hub.subscribe(ORDERS, "package.module:handler"), Subscription[Any, Any])
square = hub.subscribe("numbers", lambda n: n * n, name="square")
assert_type(square.request(7).result(), Any)
pair = hub.subscribe("numbers", lambda n: (n, [n]))
constant = hub.subscribe("numbers", lambda n: 1)
assert_type(constant, Subscription[Any, int])
shown = hub.subscribe(ORDERS, lambda order: order.number)
assert_type(shown, Subscription[Order, int])
partly = hub.subscribe("numbers", functools.partial(join, text="!"))
assert_type(partly.request(1).result(), str)
hub.subscribe(ORDERS, Counter)  # error
hub.subscribe(ORDERS, Counter())  # error
hub.subscribe(ORDERS, fetch)  # error
hub.subscribe("numbers", lambda: 1)  # error
hub.subscribe("numbers", join)  # error
hub.subscribe(NUMBERS, functools.partial(Model, "other"))  # error in basedpyright
functools.partial(Model, 3)  # error
hub.subscribe(ORDERS, double)  # error
hub.subscribe(ORDERS, lambda order: order.amount)  # error
hub.subscribe(3, double)  # error
hub.subscribe("numbers", 3)  # error
hub.subscribe("numbers", double, retries=3)  # error
hub.subscribe("numbers", double, retry=3)  # error
hub.subscribe("numbers", double, restart="never")  # error
hub.subscribe("numbers", double, snapshot=True)  # error
hub.subscribe("numbers", double, to=3)  # error
hub.subscribe("numbers", double, to=ORDERS)
hub.subscribe("numbers", double, inbox=3)  # error
hub.subscribe("numbers", double, limits=1.0)  # error
hub.subscribe("numbers", double, env=["A"])  # error
assert_type(hub.subscribe("numbers", double_all, batch=Batch()), Subscription[int, int])
assert_type(hub.subscribe(NUMBERS, double_all, batch=Batch(size=3), name="all"), Subscription[int, int])
assert_type(hub.subscribe(NUMBERS, fetch_all, batch=Batch()), Subscription[int, bytes])
assert_type(hub.subscribe("numbers", Together, batch=Batch()), Subscription[int, bytes])
assert_type(hub.subscribe(ORDERS, store, batch=Batch()).request(Order(1)).result(), Any)
assert_type(hub.subscribe("numbers", double, batch=None), Subscription[int, int])
hub.subscribe(ORDERS, double_all, batch=Batch())  # error
hub.subscribe(NUMBERS, double, batch=Batch())  # error
hub.subscribe("numbers", double_all, batch=10)  # error
assert_type(hub.subscribe("numbers", fetch, concurrency=10), Subscription[int, bytes])
hub.subscribe("numbers", fetch, concurrency="10")  # error
hub.subscribe("numbers", double, "double")  # error
hub.subscribe("numbers")  # error


@hub.subscriber("numbers", retry=Retry(2))
def triple(number: int) -> int:
    return 3 * number


@hub.subscriber("numbers", batch=Batch(size=10))
def triple_all(numbers: list[int]) -> list[int]:
    return [3 * number for number in numbers]


@hub.subscriber("numbers", retry=2)  # error
def quadruple(number: int) -> int:
    return 4 * number


@hub.subscriber(["orders.*", ORDERS], to="shipped", name="fast")
class Fast(Subscriber[Order, str]):
    def handle(self, payload: Order) -> str:
        return ship(payload)


@hub.subscriber("numbers")
async def waiting(number: int) -> bytes:
    return bytes(number)


@hub.subscriber("numbers", unknown=2)  # error
def unknown(number: int) -> int:
    return number


assert_type(triple(2), int)
triple("2")  # error
assert_type(Fast().handle(Order(1)), str)
assert_type(hub.subscription(triple).state, str)
assert_type(hub.subscription("fast").keys, tuple[str, ...])
assert_type(hub.subscriptions["fast"], Subscription[Any, Any])
hub.subscriptions["fast"] = square  # error
assert_type(hub.subscribers(ORDERS), list[str])


def inside_a_handler(number: int) -> None:
    assert_type(mphub.publish("numbers", number), EventId)
    mphub.publish(ORDERS, Order(number), now=True, headers={"a": "b"}, ordering_key="k")
    mphub.publish(ORDERS, number)  # error
    mphub.publish("numbers", number, confirm=True)  # error
    raise mphub.RetryLater("1 s")  # error


# -- publish

assert_type(hub.publish(ORDERS, Order(1)), EventId)
hub.publish(ORDERS, Special(1))
hub.publish(ORDERS, "order")  # error
hub.publish("anything", object(), headers={"trace": "1"}, confirm=True)
hub.publish("anything", 1, header={})  # error
hub.publish("anything")  # error
hub.publish(b"bytes", 1)  # error
hub.publish("anything", 1, headers={"trace": 1})  # error
hub.publish("anything", 1, ordering_key=5)  # error
assert_type(hub.publish("anything", 1).number, int)
assert_type(hub.publish_batch(NUMBERS, [1, 2]), int)
hub.publish_batch(NUMBERS, ["1"])  # error
assert_type(hub.publisher(), Publisher)
hub.publisher().publish(ORDERS, Order(1))
hub.publisher().publish(ORDERS, 1)  # error
hub.publisher().publish_batch(NUMBERS, ["1"])  # error
with hub.transaction() as together:
    assert_type(together, Transaction)
    together.publish(ORDERS, Order(1))
    together.publish(ORDERS, 1)  # error
with hub.publisher() as publisher:
    assert_type(publisher, Publisher)
    assert_type(publisher.publish(ORDERS, Order(1), confirm=True), EventId)
    assert_type(publisher.request(ORDERS, Order(1)).result(), Any)
    publisher.request(ORDERS, 1)  # error
assert_type(hub.queue, HubQueue)
hub.queue.put(("anything", 1))
hub.queue.put("anything")  # error
hub.queue = None  # error


async def asynchronous() -> None:
    assert_type(await hub.publish_async(ORDERS, Order(1)), EventId)
    assert_type(await hub.publisher().publish_async(ORDERS, Order(1)), EventId)
    await hub.publish_async(ORDERS, 1)  # error
    assert_type(await hub.subscribe("numbers", double).request(1), int)
    assert_type(await hub.subscribe("numbers", fetch).request(1), bytes)
    async with hub as running:
        assert_type(running, EventHub)


# -- answers

doubles = hub.subscribe("numbers", double)
assert_type(doubles.request(1), Reply[int])
assert_type(doubles.request(1).result(), int)
assert_type(doubles.request(1).result(timeout=1.0), int)
assert_type(doubles.request(1).id, EventId)
doubles.request("1")  # error
hub.subscribe(ORDERS, ship).request(1)  # error
assert_type(doubles.map([1, 2]), Results[int])
assert_type(list(doubles.map([1, 2])), list[int])
doubles.map(["1"])  # error
hub.request(ORDERS, Order(1), to="ship")
hub.request(ORDERS, 1)  # error
hub.request(ORDERS, Order(1), target="ship")  # error
hub.map(ORDERS, [1])  # error
with doubles.map(range(3)) as results:
    for result in results:
        assert_type(result, int)
assert_type(doubles.request(1).exception(), BaseException | None)
number: str = doubles.request(1).result()  # error
doubles.name = "other"  # error

# -- what is seen

assert_type(hub.statistics(), HubStatistics)
assert_type(hub.drain(timeout=1.0), HubStatistics)
assert_type(hub.statistics().subscribers["double"], SubscriberStatistics)
assert_type(doubles.statistics().handled, int)
assert_type(doubles.statistics().dropped, Mapping[str, int])
assert_type(doubles.statistics().pids, tuple[int, ...])
doubles.statistics().handeld  # error
doubles.statistics().handled = 3  # error
assert_type(doubles.statistics().state, str)
assert_type(doubles.statistics().p99, float)
assert_type(doubles.statistics().rss, int)
hub.statistics().unmatched = 3  # error
assert_type(hub.statistics().pids["router"], int)
assert_type(hub.dead_letters(), list[DeadLetter])
assert_type(doubles.dead_letters(), list[DeadLetter])
assert_type(hub.dead_letters("double")[0].exit, str | int | None)
assert_type(hub.redrive(ids=[letter.id for letter in hub.dead_letters()]), int)
assert_type(doubles.purge({hub.publish("numbers", 1)}), int)
doubles.redrive(["1"])  # error
hub.dead_letters()[0].reason = "none"  # error
assert_type(hub.dead_letters()[0].error, BaseException | None)
assert_type(mphub.current_event(), Event)
assert_type(mphub.current_event().attempt, int)
assert_type(mphub.current_events(), list[Event])
mphub.current_event().attempt = 2  # error


def heard(notice: Notice) -> None:
    assert_type(notice.subscriber, str | None)


hub.on_notice(heard)
hub.on_notice(ship)  # error


def moved(progress: Progress) -> None:
    assert_type(progress.rate, float)
    progress.done = 0  # error


hub.drain(progress=moved)
hub.drain(progress=True)
hub.drain(progress=heard)  # error
hub.drain("1 s")  # error
with hub as entered:
    assert_type(entered, EventHub)
assert_type(hub.run(), int)
