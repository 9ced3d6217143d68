"""Corners of the public names: what is refused, what is told, what ends; in all engines where all can."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mphub
from mphub import EventHub, Stop, Subscriber, connection
from tests.helpers import eventually, script
from tests.procs.test_hub import lines, note

SOON = Stop(ask=0.2, term=0.2)


def test_confirm_raises_no_subscriber() -> None:
    hub = EventHub()
    hub.subscribe("k", len)
    with hub:
        with pytest.raises(mphub.NoSubscriber):
            hub.publish("nobody", 1, confirm=True)
        hub.publish("k", "")
        with pytest.raises(mphub.NoSubscriber):
            hub.publish("nobody", 1, confirm=True)
        assert hub.statistics().unmatched == 0


def test_a_refusal_is_told_to_the_thread_whose_event_it_is() -> None:
    hub = EventHub(unmatched="ignore")
    hub.subscribe("k", lambda n: n, name="k")

    def refused(key: str) -> int:
        count = 0
        for n in range(200):
            try:
                hub.publish(key, n, confirm=True)
            except mphub.NoSubscriber:
                count += 1
        return count

    with hub, ThreadPoolExecutor(4) as threads:
        assert list(threads.map(refused, ["k", "nobody", "k", "nobody"])) == [0, 200, 0, 200]


def test_a_signal_handler_publishes_or_raises() -> None:
    done = script("""
        import contextlib, signal, mphub
        def tick(*_):
            with contextlib.suppress(mphub.HubError): hub.publish("k", "tick")
        hub = mphub.EventHub()
        hub.subscribe("k", repr, name="k")
        with hub:
            signal.signal(signal.SIGALRM, tick)
            signal.setitimer(signal.ITIMER_REAL, .0005, .0005)
            for n in range(100_000): hub.publish("k", n)
            signal.setitimer(signal.ITIMER_REAL, 0)
        print("done")
    """)
    assert done.stdout == "done\n", done.stderr[-800:]


def test_what_interrupts_a_publish_cannot_publish_but_stop() -> None:
    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="k")
    hub.start()
    with connection.connection_to(hub._address)._lock:
        for call in (hub.publish, hub.request, hub.publisher().publish):
            with pytest.raises(mphub.HubError, match="interrupts a publish"):
                call("k", 1)
        hub.stop(drain=False)


def test_setup_publishes_at_once(tmp_path: Path) -> None:
    class Early(Subscriber[int, None]):
        def setup(self) -> None:
            mphub.publish("out", "setup")

        def handle(self, payload: int) -> None: ...

    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("out", lambda t: note(log, t), name="out")
    hub.subscribe("k", Early)
    with hub:
        assert eventually(lambda: lines(log) == ["setup"], 3)


def test_teardown_publishes(tmp_path: Path) -> None:
    class Late(Subscriber[int, None]):
        def handle(self, payload: int) -> None: ...

        def teardown(self) -> None:
            mphub.publish("out", "teardown")

    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("out", lambda t: note(log, t), name="out")
    late = hub.subscribe("k", Late)
    with hub:
        late.unsubscribe()
        assert eventually(lambda: lines(log) == ["teardown"], 3)


@pytest.mark.parametrize(
    "call",
    [
        "hub.publish('k', 1, ordering_key=5)",
        "hub.publisher().publish('k', 1, ordering_key=5)",
        "hub.transaction().publish('k', 1, ordering_key=5)",
        "hub.publish('k', 1, ordering_key='\\udcff')",
        "hub.publish('k', 1, headers={'a': '\\udcff'})",
        "hub.publisher().publish('k\\udcff', 1)",
        "hub.publisher().request('k', 1, to='\\udcff')",
        "hub.publisher().request('k', 1, to=5)",
    ],
)
def test_what_cannot_be_sent_is_refused_and_harms_nothing(call: str) -> None:
    done = script(f"""
        import mphub
        hub = mphub.EventHub(check=False, stop=mphub.Stop(ask=.2, term=.2))
        hub.subscribe("k", repr, name="k")
        hub.start()
        try:
            {call}
            hub.flush(3)
            print("accepted")
        except (mphub.UsageError) as e:
            print("refused")
        hub.publish("k", 1, confirm=True)
        hub.stop(drain=False)
    """)
    assert done.stdout == "refused\n", done.stdout + done.stderr[:1000]


@pytest.mark.parametrize("call", ["mphub.publish('k', 1, headers={'a': 1})", "mphub.publish('k', 1, ordering_key=1)"])
def test_headers_in_a_handler_are_checked(call: str) -> None:
    done = script(f"""
        import mphub
        hub = mphub.EventHub(check=False, stop=mphub.Stop(ask=.2, term=.2))
        hub.subscribe("h", lambda n: {call} and None, name="h")
        hub.subscribe("k", print, name="k")
        hub.start()
        hub.publish("h", 1)
        try:
            hub.drain(3)
            print([type(l.error).__name__ for l in hub.dead_letters()])
        except mphub.DrainTimeout:
            print("stuck")
        hub.stop(drain=False)
    """)
    assert done.stdout == "['InvalidOption']\n", done.stdout + done.stderr[:1000]


def test_a_request_too_large_ends() -> None:
    hub = EventHub(max_bytes="4MB", check=False)
    hub.subscribe("k", len, name="k")
    hub.start()
    try:
        try:
            reply = hub.request("k", bytes(10 << 20))
        except mphub.PayloadError:
            return
        assert isinstance(reply.exception(5), mphub.PayloadError)
    finally:
        hub.stop(drain=False)


def test_publish_raises_at_once_for_what_is_too_large() -> None:
    hub = EventHub(max_bytes="4MB", check=False)
    hub.subscribe("k", len, name="k")
    hub.start()
    try:
        with pytest.raises(mphub.PayloadError):
            hub.publish("k", bytes(10 << 20))
    finally:
        hub.stop(drain=False)


def test_the_same_name_again_can_be_waited_for() -> None:
    hub = EventHub()
    with hub:
        for _ in range(3):
            s = hub.subscribe("k", lambda n: n, name="z")
            s.wait_ready(10)
            assert s.request(1).result(5) == 1
            s.unsubscribe()


def test_dead_letters_are_oldest_first() -> None:
    hub = EventHub(check=False)
    hub.subscribe("k", lambda n: 1 // n, name="z")
    with hub:
        with hub.transaction() as t:
            for _ in range(20):
                t.publish("k", 0)
        hub.drain()
        ids = [letter.id for letter in hub.dead_letters()]
    assert ids == sorted(ids)


def test_run_in_a_forked_child_is_refused() -> None:
    hub = EventHub()
    hub.subscribe("k", len)

    def child() -> None:
        try:
            hub.run()
        except mphub.HubError:
            os._exit(5)

    with hub:
        p = multiprocessing.get_context("fork").Process(target=child)
        p.start()
        p.join(5)
        code = p.exitcode
        p.kill()
        p.join()
    assert code == 5


def test_a_fork_while_another_thread_connects_leaves_no_lock_held() -> None:
    def child() -> None:
        with pytest.raises(mphub.HubClosed):
            EventHub().publisher().publish("k", 1)

    p = multiprocessing.get_context("fork").Process(target=child)
    with connection._shared_lock:
        p.start()
    p.join(5)
    code = p.exitcode
    p.kill()
    p.join()
    assert code == 0


def test_a_handle_of_another_hub_in_a_handler_publishes_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    a, b = EventHub(name="a"), EventHub(name="b")
    b.subscribe("z", lambda n: note(log, n), name="z")
    a.subscribe("k", lambda n: b.publish("z", n) and None, name="bridge")
    with b, a:
        a.publish("k", 1)
        a.drain()
        assert eventually(lambda: lines(log) == ["1"], 3)


def test_a_wrong_stop_is_refused() -> None:
    with pytest.raises(mphub.InvalidOption):
        EventHub(stop=5.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [[1 << 200], [-1], ["x"], 5])
def test_ids_that_cannot_be_are_nobodys_or_refused(ids: Any) -> None:
    hub = EventHub(check=False)
    hub.subscribe("k", lambda n: 1 // n, name="z")
    with hub:
        hub.publish("k", 0)
        hub.drain()
        try:
            assert hub.redrive(ids=ids) == 0
        except mphub.MphubError:
            pass


def test_stop_without_drain_ends_a_stop_that_drains() -> None:
    done = script(
        """
        import threading, time, mphub
        hub = mphub.EventHub(stop=mphub.Stop(ask=.2, term=.2))
        hub.subscribe("k", time.sleep, name="z")
        hub.start(); hub.publish("k", 60)
        threading.Timer(.5, lambda: hub.stop(drain=False)).start()
        try: hub.stop()
        except mphub.MphubError as e: print(type(e))
        print("stopped")
    """,
        10,
    )
    assert "stopped" in done.stdout


def test_what_was_published_before_a_subscription_is_not_for_it() -> None:
    hub = EventHub(unmatched="ignore")
    with hub:
        for i in range(20):
            hub.publish(f"k{i}", 1)
            s = hub.subscribe(f"k{i}", lambda n: n, name=f"s{i}")
            hub.drain()
            assert s.statistics().accepted == 0


def test_inline_handlers_may_capture_their_hub(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub(engine="inline")
    hub.subscribe("k", lambda n: hub.publish("out", n) and None, name="k")
    hub.subscribe("out", lambda n: note(log, n), name="out")
    with hub:
        hub.publish("k", 1)
    assert lines(log) == ["1"]


def test_inline_interrupts_leave_a_hub_that_works() -> None:
    done = script(
        """
        import mphub
        hub = mphub.EventHub(engine="inline", check=False)
        def h(n):
            if n == 0: raise KeyboardInterrupt
            if n == 1: raise SystemExit(3)
        hub.subscribe("k", h, retry=mphub.Retry(1))
        with hub:
            for n in range(3):
                try: hub.publish("k", n)
                except BaseException as e: print(type(e).__name__)
            f = hub.drain().subscribers["h"]
            print(f.handled, f.dead, f.waiting, f.running)
    """,
        8,
    )
    assert done.stdout == "KeyboardInterrupt\nSystemExit\n1 2 0 0\n", done.stdout + done.stderr[-800:]


def test_inline_the_same_name_again() -> None:
    hub = EventHub(engine="inline")
    with hub:
        for n in range(3):
            s = hub.subscribe("k", lambda n: n, name="z")
            hub.publish("k", 1)
            assert s.request(1).result(1) == 1
            found = s.statistics()
            assert (found.accepted, found.handled, found.waiting) == (2 * n + 2, 2 * n + 2, 0)
            s.unsubscribe()


def test_inline_times_are_measured() -> None:
    hub = EventHub(engine="inline")
    s = hub.subscribe("k", time.sleep, name="z")
    with hub:
        hub.publish("k", 0.05)
        assert s.statistics().mean >= 0.05
        assert s.statistics().p50 >= 0.05


def test_inline_bounds_are_kept() -> None:
    hub = EventHub(engine="inline", max_bytes="4MB", check=False)
    hub.subscribe("k", len, name="k")
    with hub, pytest.raises(mphub.PayloadError):
        hub.publish("k", bytes(10 << 20))


def test_inline_teardown_publishes_are_given_up_and_counted() -> None:
    class Late(Subscriber[int, None]):
        def handle(self, payload: int) -> None: ...

        def teardown(self) -> None:
            mphub.publish("out", 1)

    hub = EventHub(engine="inline")
    hub.subscribe("out", lambda n: n, name="out")
    hub.subscribe("k", Late)
    with hub:
        pass
    f = hub.statistics().subscribers["out"]
    assert (f.accepted, f.waiting, f.handled + sum(f.dropped.values())) == (1, 0, 1)


def test_inline_failures_are_told_at_most_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    hub = EventHub(engine="inline", check=False, propagate=False)
    hub.subscribe("k", lambda n: 1 // n, name="z")
    with hub:
        hub.publish_batch("k", [0] * 50)
    assert len(caplog.records) < 10


def test_inline_drain_has_a_timeout() -> None:
    hub = EventHub(engine="inline", check=False, propagate=False)

    def later(n: int) -> None:
        if mphub.current_event().attempt == 1:
            raise mphub.RetryLater(3)

    hub.subscribe("k", later)
    began = time.monotonic()
    with hub:
        hub.publish("k", 1)
    assert time.monotonic() - began >= 3  # by contract: delays are slept
