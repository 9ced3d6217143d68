"""Right and wrong uses of the public names, for type checkers only: a line that ends with ``# error`` must be reported, no other may;
``# error in`` names the only checker that does so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_type

import mphub
from mphub import (
    DeadLetter,
    Event,
    EventHub,
    EventId,
    HubStatistics,
    Inbox,
    Limits,
    Notice,
    Publisher,
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
Restart().delay = 2.0  # error
Retry().delay = 2.0  # error
Stop().ask = 1.0  # error

# -- subscribe

assert_type(hub.subscribe("numbers", double), Subscription[int, int])
assert_type(hub.subscribe(["numbers", NUMBERS], double), Subscription[int, int])
assert_type(hub.subscribe(ORDERS, ship), Subscription[Order, str])
assert_type(hub.subscribe("numbers", Counter), Subscription[int, float])
assert_type(hub.subscribe("numbers", Counter()), Subscription[int, float])
assert_type(hub.subscribe("numbers", fetch), Subscription[int, bytes])
assert_type(hub.subscribe("numbers", "package.module:handler"), Subscription[Any, Any])
square = hub.subscribe("numbers", lambda n: n * n, name="square")  # error in basedpyright: it knows no type for n
shown = hub.subscribe(ORDERS, lambda order: order.number)
hub.subscribe(ORDERS, double)  # error
hub.subscribe(ORDERS, lambda order: order.amount)  # error
hub.subscribe(3, double)  # error
hub.subscribe("numbers", 3)  # error
hub.subscribe("numbers", double, retries=3)  # error
hub.subscribe("numbers", double, retry=3)  # error
hub.subscribe("numbers", double, restart="never")  # error
hub.subscribe("numbers", double, snapshot=True)  # error
hub.subscribe("numbers", double, to=3)  # error


@hub.subscriber("numbers", retry=Retry(2))
def triple(number: int) -> int:
    return 3 * number


@hub.subscriber("numbers", retry=2)  # error
def quadruple(number: int) -> int:
    return 4 * number


assert_type(triple(2), int)
triple("2")  # error

# -- publish

assert_type(hub.publish(ORDERS, Order(1)), EventId)
hub.publish(ORDERS, Special(1))
hub.publish(ORDERS, "order")  # error
hub.publish("anything", object(), headers={"trace": "1"}, confirm=True)
hub.publish("anything", 1, header={})  # error
hub.publish("anything")  # error
hub.publish(b"bytes", 1)  # error
assert_type(hub.publish_batch(NUMBERS, [1, 2]), int)
hub.publish_batch(NUMBERS, ["1"])  # error
assert_type(hub.publisher(), Publisher)
hub.publisher().publish(ORDERS, Order(1))
hub.publisher().publish(ORDERS, 1)  # error
with hub.transaction() as together:
    together.publish(ORDERS, Order(1))
    together.publish(ORDERS, 1)  # error


async def asynchronous() -> None:
    assert_type(await hub.publish_async(ORDERS, Order(1)), EventId)
    assert_type(await hub.subscribe("numbers", double).request(1), int)


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

# -- what is seen

assert_type(hub.statistics(), HubStatistics)
assert_type(hub.drain(timeout=1.0), HubStatistics)
assert_type(hub.statistics().subscribers["double"], SubscriberStatistics)
assert_type(doubles.statistics().handled, int)
assert_type(doubles.statistics().dropped, Mapping[str, int])
assert_type(doubles.statistics().pids, tuple[int, ...])
doubles.statistics().handeld  # error
assert_type(hub.dead_letters(), list[DeadLetter])
assert_type(hub.dead_letters()[0].error, BaseException | None)
assert_type(mphub.current_event(), Event)
assert_type(mphub.current_event().attempt, int)
mphub.current_event().attempt = 2  # error


def heard(notice: Notice) -> None:
    assert_type(notice.subscriber, str | None)


hub.on_notice(heard)
hub.on_notice(ship)  # error
assert_type(hub.run(), int)
