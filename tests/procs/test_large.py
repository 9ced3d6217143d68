"""Whatever is large: lines, exceptions, headers, lists of ids. Nothing of it ends a process or a connection."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import mphub
from mphub import EventHub, Inbox, InvalidOption, PayloadError, Stop, Subscriber, current_event
from mphub.store.blobs import Blobs
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

LARGE = 3_000_000


def test_a_line_of_megabytes_ends_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    hub = EventHub()

    def chatty(n: int) -> None:
        print("y" * 700_000)
        print("z" * LARGE, file=sys.stderr)
        print("after", n)

    hub.subscribe("k", chatty)
    with hub:
        hub.publish("k", 7)
        hub.drain(20)
    assert "after 7" in capfd.readouterr().out


def test_an_exception_of_megabytes_is_told_shortened() -> None:
    hub = EventHub(check=False)

    def fail(_: int) -> None:
        raise ValueError("begin" + "x" * LARGE + "end")

    subscription = hub.subscribe("k", fail)
    with hub:
        hub.publish("k", 1)
        with pytest.raises(mphub.RemoteError, match="begin"):
            subscription.request(2).result(10)
        hub.drain(20)
        (letter,) = hub.dead_letters()
    assert "begin" in str(letter.error) and "end" in str(letter.error) and len(letter.traceback) < 100_000


def test_what_cannot_be_put_into_text_fails_its_event_only() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

        def __reduce__(self) -> str:
            raise RuntimeError("no pickle")

    def fail(n: int) -> None:
        if n == 1:
            raise Odd
        if n == 2:
            raise ValueError("\udc80")

    hub = EventHub(check=False)
    hub.subscribe("k", fail, name="s")
    with hub:
        hub.publish_batch("k", range(4))
        hub.drain(20)
        statistics = hub.statistics().subscribers["s"]
    assert (statistics.handled, statistics.dead, statistics.restarts) == (2, 2, 0)


def test_headers_are_bounded_and_many_of_them_travel(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("k", lambda n: note(log, len(mphub.current_event().headers["h"])))
    with hub:
        with pytest.raises(InvalidOption, match="at most 32768"):
            hub.publish("k", 1, headers={"h": "x" * 40_000})
        for n in range(200):
            hub.publish("k", n, headers={"h": "x" * 20_000})
    assert lines(log) == ["20000"] * 200


def test_one_event_may_publish_any_number_of_keys(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()

    def spread(count: int) -> None:
        for n in range(count):
            mphub.publish(f"out.{'x' * 100}.{n}", n)

    hub.subscribe("k", spread)
    hub.subscribe("out.>", lambda n: note(log, n), name="sink")
    with hub:
        hub.publish("k", 20_000)
    assert lines(log) == [str(n) for n in range(20_000)]


def test_a_transaction_of_many_keys_is_taken_whole_or_refused() -> None:
    hub = EventHub()
    hub.subscribe("k.>", len, name="s")
    with hub:
        with hub.transaction() as transaction:
            for n in range(20_000):
                transaction.publish(f"k.{'x' * 100}.{n}", "")
        hub.drain(30)
        assert hub.statistics().subscribers["s"].handled == 20_000
        with pytest.raises(PayloadError, match="split it"), hub.transaction() as transaction:
            for n in range(200_000):
                transaction.publish(f"k.{'x' * 200}.{n}", "")
        hub.publish("k.1", "")


def test_any_number_of_ids_can_be_purged() -> None:
    hub = EventHub(check=False)
    hub.subscribe("k", lambda n: 1 / n, name="s")
    with hub:
        hub.publish_batch("k", [0] * 3)
        hub.drain(20)
        ids = [letter.id for letter in hub.dead_letters()]
        assert hub.purge(ids=[*range(200_000), *ids[:2]]) == 2
        assert hub.redrive(ids=[*range(200_000), ids[2]]) == 1


def test_one_event_of_a_large_transaction_can_be_retried_buried_and_redriven(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(check=False)

    def handle(event: tuple[int, bytes]) -> None:
        n, data = event
        if n == 4 and mphub.current_event().attempt == 1:
            raise mphub.RetryLater(0.05)
        if n == 3 and not (tmp_path / "mended").exists():
            raise ValueError(n)
        note(log, f"{n} {len(data)}")

    hub.subscribe("k", handle, name="s", retry=mphub.Retry(max_attempts=2))
    with hub:
        with hub.transaction() as transaction:
            for n in range(6):
                transaction.publish("k", (n, b"x" * (100_000 if n % 2 else 50_000)))
        hub.drain(20)
        (letter,) = hub.dead_letters()
        assert letter.payload == (3, b"x" * 100_000)
        (tmp_path / "mended").touch()
        assert hub.redrive() == 1
        hub.drain(20)
        assert list(Path(hub._address.folder, "blobs").iterdir()) == []
    assert sorted(lines(log)) == [f"{n} {100_000 if n % 2 else 50_000}" for n in range(6)]


def test_arrays_travel_without_copies_and_each_subscriber_may_change_its_own(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    hub = EventHub()
    kept: list[Any] = []

    def change(array: Any) -> Any:
        kept.append(array)  # outlives the event, and its file
        array *= 2
        hub.publish("changed", array)
        array[:] = 0  # too late for what was published
        return current_event().payload.sum()

    for name in "ab":
        hub.subscribe("k", change, name=name, to="sum")
    note_sum = tmp_path / "sums"
    hub.subscribe("sum", lambda total: note(note_sum, total), name="sums")
    hub.subscribe("changed", lambda array: note(note_sum, array.sum()), name="changed")
    hub.subscribe("echo", lambda array: array + 1, name="echo")
    blobs = Path(hub._address.folder) / "blobs"
    with hub:
        array = numpy.ones(200_000)
        hub.publish("k", array)
        array[:] = 7
        hub.drain(20)
        assert sorted(lines(note_sum)) == ["200000.0", "200000.0", "400000.0", "400000.0"]
        answer = hub.request("echo", array).result(10)
        answer += 1
        assert (answer.shape, answer[0]) == ((200_000,), 9)
        with hub.transaction() as together:
            together.publish("echo", array)
        hub.drain(20)
        assert eventually(lambda: not list(blobs.iterdir()), 5), "the last reference has ended"


def test_a_dead_letter_gives_its_array() -> None:
    numpy = pytest.importorskip("numpy")
    hub = EventHub(check=False)
    hub.subscribe("k", lambda array: 1 / 0, name="k")
    with hub:
        hub.publish("k", [numpy.arange(100_000)])
        hub.drain(20)
        assert hub.dead_letters()[0].payload[0].sum() == 4999950000
        hub.redrive()
        hub.drain(20)
    assert hub.dead_letters()[0].payload[0].sum() == 4999950000


@pytest.mark.parametrize("size", range(65_500, 65_545, 4))
def test_outputs_of_every_size_around_the_bound_arrive(size: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("in", lambda n: mphub.publish("out", b"x" * n), name="in")
    hub.subscribe("out", lambda data: note(log, len(data)), name="out")
    with hub:
        for n in range(size, size + 4):
            hub.publish("in", n)
    assert lines(log) == [str(n) for n in range(size, size + 4)]


def test_large_payloads_beside_small_ones_from_many_threads(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    hub = EventHub()
    counts = [hub.subscribe(key, lambda data: None, name=key) for key in ("big", "small")]
    array = numpy.zeros(9_000)
    with hub:
        threads = [
            threading.Thread(target=lambda key=key, data=data: [hub.publish(key, data) for _ in range(3000)])
            for key, data in (("big", array), ("small", 1), ("big", array), ("small", "x" * 1000))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hub.drain(30)
        assert [each.statistics().handled for each in counts] == [6000, 6000]


def test_an_interrupt_while_a_large_payload_is_written_leaves_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")
    hub = EventHub()
    k = hub.subscribe("k", lambda data: None, name="k")
    real = Blobs.write

    def interrupted(self: Blobs, data: Any) -> str:
        real(self, data)
        raise KeyboardInterrupt

    with hub:
        hub.publish("k", 1, confirm=True)
        monkeypatch.setattr(Blobs, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hub.publish("k", numpy.zeros(20_000))
        monkeypatch.undo()
        hub.publish("k", 2)
        hub.publish("k", numpy.zeros(20_000))
        hub.drain(20)
        assert k.statistics().handled == 3


def test_thousands_of_arrays_can_be_kept(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    log = tmp_path / "log"
    hub = EventHub()

    class Keep(Subscriber[Any, int]):
        def setup(self) -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
            self.all: list[Any] = []

        def handle(self, payload: Any) -> int:
            self.all.append(payload)
            return int(sum(array[0] for array in self.all)) if len(self.all) == 500 else 0

        def teardown(self) -> None:
            note(log, len(self.all))

    hub.subscribe("k", Keep, name="k")
    hub.subscribe("ask", lambda n: numpy.full(20_000, n), name="ask")
    before = len(os.listdir("/proc/self/fd"))
    with hub:
        answers = list(hub.map("ask", range(300)))
        assert len(os.listdir("/proc/self/fd")) < before + 30
        assert [answer[-1] for answer in answers] == list(range(300))
        hub.publish_batch("k", (numpy.ones(20_000) for _ in range(500)))
        hub.drain(30)
    assert lines(log) == ["500"]


def test_letters_of_a_large_transaction_cost_the_router_little(tmp_path: Path) -> None:
    hub = EventHub(check=False, stop=Stop(ask=0.1, term=0.1))
    full = hub.subscribe("full", time.sleep, name="full", inbox=Inbox(maxsize=1, overflow="dead_letter"))
    hub.subscribe("ask", lambda n: n, name="ask")
    with hub:
        hub.publish("full", 3600)
        hub.request("ask", 1).result(10)
        with hub.transaction() as together:
            for n in range(20_000):
                together.publish("full", "x" * 10 + str(n))
        began = time.monotonic()
        assert hub.request("ask", 2).result(10) == 2
        assert time.monotonic() - began < 5, "it was most of a minute when each letter read the file anew"
        assert full.statistics().dead == 20_000
        letters = hub.dead_letters("full")
        assert [letter.payload for letter in letters[::4000]] == ["x" * 10 + str(n) for n in range(0, 20_000, 4000)]
        hub.stop(drain=False)


def test_a_refused_payload_leaves_no_file() -> None:
    hub = EventHub()
    blobs = Path(hub._address.folder) / "blobs"
    hub.subscribe("k", len, name="k")
    with hub:
        for _ in range(3):
            with pytest.raises(mphub.NoSubscriber):
                hub.publish("nobody", bytes(100_000), confirm=True)
        hub.publish("k", b"", confirm=True)
        assert eventually(lambda: not list(blobs.iterdir()), 5)
