"""``mphub.testing`` without processes: the clock, hubs under test, the recorder, and the pytest plugin, seen from a user's tests."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mphub
from mphub import DeadLettersLeft, EventHub, HubError, InvalidKey, InvalidOption, Limits, NoSubscriber, Rate, Reject, Retry, RetryLater
from mphub.testing import Clock, Recorder, kill, kill_on, running

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clock() -> Clock:
    return Clock(now=1000.0)


@pytest.fixture
def hub(clock: Clock) -> Iterator[EventHub]:
    with running(EventHub(), clock=clock) as hub:
        yield hub


def again(_: object) -> None:
    raise RetryLater(60.0)


def fail(payload: object) -> None:
    raise ValueError(payload)


# -- the clock


def test_a_delayed_event_waits_for_the_test(hub: EventHub, clock: Clock) -> None:
    seen = Recorder(hub, "k")
    hub.publish("k", "late", delay=3600.0)
    hub.publish("k", "soon")
    clock.advance(3599.0)
    assert seen.payloads == ["soon"]
    clock.advance(1.0)
    assert seen.payloads == ["soon", "late"]


def test_what_is_due_runs_at_its_own_time_and_so_does_what_follows(hub: EventHub, clock: Clock) -> None:
    def tick(n: int) -> None:
        if n < 3:
            mphub.publish("tick", n + 1, delay=10.0)
        mphub.publish("done", n)

    hub.subscribe("tick", tick)
    seen = Recorder(hub, "done")
    hub.publish("tick", 0)
    hub.publish("done", "between", delay=15.0)
    clock.advance(60.0)
    assert [(event.payload, event.published_at) for event in seen.events] == [
        (0, 1000.0), (1, 1010.0), ("between", 1000.0), (2, 1020.0), (3, 1030.0),
    ]  # fmt: skip
    assert clock.now == 1060.0


def test_the_last_failure_is_raised_to_whoever_moves_the_clock(hub: EventHub, clock: Clock) -> None:
    hub.subscribe("k", fail, retry=Retry(3, on=ValueError, delay=5.0, factor=2.0))
    hub.publish("k", "no")
    clock.advance(5.0)
    assert hub.statistics().subscribers["fail"].failed == 2
    with pytest.raises(ValueError, match="no"):
        clock.advance(20.0)
    assert clock.now == 1025.0


def test_a_drain_jumps_over_every_delay(hub: EventHub, clock: Clock) -> None:
    seen = Recorder(hub, "k")
    hub.publish("k", 1, delay=86400.0)
    hub.drain()
    assert (seen.payloads, clock.now) == ([1], 87400.0)


def test_who_asks_has_the_answer_at_once_whatever_time_that_takes(hub: EventHub, clock: Clock) -> None:
    hub.subscribe("k", lambda n: n if mphub.current_event().attempt == 3 else again(n))
    hub.publish("k", "else", delay=3600.0)
    assert hub.request("k", 7).result(0) == 7
    assert clock.now == 1120.0


def test_a_handler_that_asks_waits_for_its_answer(hub: EventHub, clock: Clock) -> None:
    hub.subscribe("ask", lambda n: hub.request("answer", n).result(0))
    hub.subscribe("answer", lambda n: n + 1 if mphub.current_event().attempt == 2 else again(n))
    assert hub.request("ask", 1).result(0) == 2


def test_what_is_too_late_to_start_is_dropped(hub: EventHub, clock: Clock) -> None:
    sub = hub.subscribe("k", fail)
    sub.pause()
    hub.publish("k", 1, expires=10.0)
    clock.advance(9.0)
    assert sub.statistics().waiting == 1
    clock.advance(1.5)
    assert dict(sub.statistics().dropped) == {"expired": 1}
    sub.resume()


def test_a_rate_lets_more_start_as_time_goes_by_unless_its_subscriber_is_paused(hub: EventHub, clock: Clock) -> None:
    sub = hub.subscribe("k", len, rate=Rate(2, 60.0))
    hub.publish_batch("k", ["", "", "", "", ""])
    assert sub.statistics().handled == 2
    clock.advance(60.0)
    assert sub.statistics().handled == 4
    sub.pause()
    clock.advance(90.0)
    assert sub.statistics().handled == 4
    sub.resume()
    assert sub.statistics().handled == 5


def test_ten_tenths_are_a_second() -> None:
    clock = Clock(now=1_700_000_000.7)
    with running(EventHub(), clock=clock) as hub:
        seen = Recorder(hub, "k")
        hub.publish("k", 1, delay=3.0)
        for _ in range(30):
            clock.advance(0.1)
        assert seen.payloads == [1]


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "1", True])
def test_time_goes_forward(seconds: float) -> None:
    with pytest.raises(InvalidOption, match=r"clock.advance\(seconds\)"):
        Clock().advance(seconds)


def test_a_clock_has_one_hub(hub: EventHub, clock: Clock) -> None:
    with pytest.raises(HubError, match="another hub"), running(EventHub(), clock=clock):
        pass


# -- a hub under test

app = EventHub()


@app.subscriber("orders.created", to="invoices", limits=Limits(timeout=5.0), env={"A": "1"})
def invoice(order: dict[str, int]) -> int:
    if not order["total"]:
        raise Reject("nothing to pay")
    return order["total"] * 2


def test_a_program_s_own_hub_runs_in_the_test_s_thread_and_is_what_it_was_afterwards() -> None:
    before = vars(app).copy(), dict(app.subscriptions)
    for _ in range(2):
        with running(app) as hub:
            invoices = Recorder(hub, "invoices")
            app.on_notice(print)
            app.publish("orders.created", {"total": 21})
            assert invoices.payloads == [42]
        after = vars(app) | {"_final": None, "_given_up": 0}
        assert (after, dict(app.subscriptions)) == before
        assert app.statistics().subscribers["invoice"].handled == 1


def test_a_handler_that_was_subscribed_before_publishes_by_the_test_s_clock(clock: Clock) -> None:
    hub = EventHub()
    hub.subscribe("a", lambda n: hub.publish("b", n, delay=5.0))
    with running(hub, clock=clock):
        seen = Recorder(hub, "b")
        hub.publish("a", 1)
        clock.advance(4.0)
        assert not seen.events
        clock.advance(1.0)
        assert seen.payloads == [1]


def test_what_an_earlier_run_left_is_none_of_the_next_one_s_business() -> None:
    hub = EventHub(engine="inline", propagate=False)
    hub.subscribe("k", fail)
    with running(hub, check=False):
        hub.publish("k", 1)
    assert len(hub.dead_letters()) == 1
    with running(hub, start=False):
        pass


def test_a_program_may_start_and_stop_its_hub_by_itself(clock: Clock) -> None:
    def main() -> int:
        with app:
            app.publish("orders.created", {"total": 1}, delay=60.0)
        return app.statistics().subscribers["invoice"].handled

    with running(app, start=False, clock=clock):
        assert main() == 1


def test_a_hub_that_runs_is_refused(hub: EventHub) -> None:
    with pytest.raises(HubError, match="running already"), running(hub):
        pass


def test_dead_letters_that_are_left_are_raised_unless_they_were_raised_before() -> None:
    with pytest.raises(Reject), running(app) as hub:
        hub.publish("orders.created", {"total": 0})
    with running(app):
        with pytest.raises(Reject):
            app.publish("orders.created", {"total": 0})
    quiet = EventHub(engine="inline", propagate=False)
    quiet.subscribe("k", fail)
    with pytest.raises(DeadLettersLeft, match="fail: 1 exception"), running(quiet):
        quiet.publish("k", 1)
    with running(quiet, check=False):
        quiet.publish("k", 1)


def test_a_failure_that_waits_for_another_try_at_the_end_fails_the_test() -> None:
    hub = EventHub()
    hub.subscribe("k", fail, retry=Retry(3, on=ValueError, delay=5.0))
    with pytest.raises(AssertionError, match="fail: an event of key 'k' has failed and waits for attempt 2"), running(hub):
        hub.publish("k", 1)
    with running(hub, check=False):
        hub.publish("k", 1)
    with running(hub):
        hub.subscribe("l", again)
        hub.publish("l", 1)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"engine": "proces"}, "engine"),
        ({"clock": 3}, "clock"),
        ({"clock": Clock(), "engine": "process"}, "clock"),
        ({"check": "no"}, "check"),
        ({"start": 1}, "start"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], word: str) -> None:
    with pytest.raises(InvalidOption, match=word), running(EventHub(), **options):  # type: ignore[arg-type]
        pass


# -- the recorder


def test_a_recorder_has_events_in_order_and_each_recorder_its_own(hub: EventHub) -> None:
    every, some = Recorder(hub, ">"), Recorder(hub, "a.*", "b")
    hub.publish("a.x", 1, headers={"h": "v"})
    hub.publish("b", None)
    hub.publish("c", [3])
    assert (every.keys, every.payloads) == (["a.x", "b", "c"], [1, None, [3]])
    assert [event.headers for event in some.events] == [{"h": "v"}, {}]
    assert (every.name, some.name) == ("recorder", "recorder-2")


def test_a_recorder_answers_nobody(hub: EventHub) -> None:
    seen = Recorder(hub, "k")
    hub.subscribe("k", lambda n: n)
    assert (hub.request("k", 1).result(0), seen.events) == (1, [])


def test_a_recorder_can_be_read_after_the_end() -> None:
    with running(app):
        seen = Recorder(app, "invoices")
        app.publish("orders.created", {"total": 1})
    assert seen.payloads == [2]


def test_what_does_not_come_is_told_with_what_came(hub: EventHub) -> None:
    seen = Recorder(hub, "a.*")
    hub.publish("a.x", 1)
    assert len(seen.wait(1)) == 1
    with pytest.raises(TimeoutError, match=r"recorder: got 1 of 2 events within 0 s: a\.x"):
        seen.wait(2, timeout=0)
    with pytest.raises(InvalidKey):
        Recorder(hub)
    with pytest.raises(InvalidOption, match=r"wait\(count\)"):
        seen.wait(-1)


def test_without_processes_nothing_can_be_killed(hub: EventHub) -> None:
    hub.subscribe("k", fail)
    with pytest.raises(HubError, match="process_hub"):
        kill(hub, "fail")
    with pytest.raises(HubError, match="process_hub"), kill_on(hub, key="k"):
        pass
    with pytest.raises(NoSubscriber, match="did you mean 'fail'"), kill_on(hub, "fial"):
        pass
    with pytest.raises(InvalidOption, match=r"kill_on\(when\)"), kill_on(hub, when="now"):
        pass


# -- the plugin


def test_a_user_s_tests_pass(users: pytest.Pytester) -> None:
    users.makepyfile(
        """
        import pytest
        from mphub import Reject
        from mphub.testing import Recorder

        def fail(payload):
            raise Reject(payload)

        def test_a_delay(hub, clock):
            seen = Recorder(hub, "k")
            hub.publish("k", 1, delay=3.0)
            assert not seen.events
            clock.advance(3.0)
            assert seen.payloads == [1]

        def test_a_failure_that_is_expected(hub):
            hub.subscribe("k", fail)
            with pytest.raises(Reject):
                hub.publish("k", 1)

        @pytest.mark.mphub(propagate=False)
        def test_dead_letters_that_are_looked_at_and_purged(hub):
            hub.subscribe("k", fail)
            hub.publish("k", 1)
            assert [letter.reason for letter in hub.dead_letters()] == ["rejected"]
            hub.purge()

        @pytest.mark.mphub(propagate=False, check=False)
        def test_dead_letters_that_are_accepted(hub):
            hub.subscribe("k", fail)
            hub.publish("k", 1)

        def test_a_hub_that_is_stopped_already(hub):
            hub.stop()
        """
    )
    users.runpytest_inprocess("--strict-markers").assert_outcomes(passed=5)


def test_what_a_user_s_test_leaves_fails_it(users: pytest.Pytester) -> None:
    users.makepyfile(
        """
        import pytest

        def fail(payload):
            raise ValueError("of the handler")

        def test_an_exception(hub):
            hub.subscribe("k", fail)
            hub.publish("k", 1)

        @pytest.mark.mphub(propagate=False)
        def test_a_dead_letter(hub):
            hub.subscribe("k", fail)
            hub.publish("k", 1)

        @pytest.mark.mphub(propagate=False)
        def test_a_failure_of_its_own_is_told_alone(hub):
            hub.subscribe("k", fail)
            hub.publish("k", 1)
            assert False, "of the test"

        @pytest.mark.mphub(chekc=False)
        def test_a_wrong_option(hub):
            pass
        """
    )
    result = users.runpytest_inprocess()
    result.assert_outcomes(failed=2, passed=1, errors=2)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_a_dead_letter*", "*ValueError: of the handler", "*DeadLettersLeft: *fail: 1 exception*", "*chekc*"],
        consecutive=False,
    )


def test_a_clock_fixture_of_the_user_s_own_disturbs_no_hub(users: pytest.Pytester) -> None:
    users.makepyfile(
        """
        import pytest

        @pytest.fixture
        def clock():
            return "mine"

        def test_it(hub, clock):
            assert clock == "mine"
            hub.publish("k", 1, delay=1.0)
        """
    )
    users.runpytest_inprocess().assert_outcomes(passed=1)


def test_pytest_loads_the_plugin_without_the_package() -> None:
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]["pytest_mphub"]
    code = f"import pytest, sys; before = set(sys.modules); import {entry}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded <= {entry, *sys.stdlib_module_names}
    assert not loaded & {"asyncio", "mphub", "multiprocessing"}
