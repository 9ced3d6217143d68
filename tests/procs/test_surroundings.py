"""What a subscriber's process begins with: variables, an initializer, its share of the cores."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from mphub import EventHub, InvalidOption, PayloadError, Restart, StartFailed
from mphub.procs import boot
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.timeout(60)


def variable(name: str) -> str | None:
    return os.environ.get(name)


def test_env_is_set_in_its_processes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPHUB_TEST_OLD", "hub")
    hub = EventHub()
    one = hub.subscribe("one", variable, name="one", env={"MPHUB_TEST_OLD": "own", "MPHUB_TEST_NEW": "ä"})
    two = hub.subscribe("two", variable, name="two")
    with hub:
        assert [one.request(name).result(10) for name in ("MPHUB_TEST_OLD", "MPHUB_TEST_NEW")] == ["own", "ä"]
        assert [two.request(name).result(10) for name in ("MPHUB_TEST_OLD", "MPHUB_TEST_NEW")] == ["hub", None]


def test_env_is_there_before_the_handler_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "early.py").write_text("import os\nSEEN = os.environ.get('MPHUB_TEST_EARLY')\ndef look(_): return SEEN\n")
    monkeypatch.syspath_prepend(tmp_path)
    hub = EventHub()
    hub.subscribe("k", "early:look", env={"MPHUB_TEST_EARLY": "yes"})
    with hub:
        assert hub.request("k", 1).result(10) == "yes"


@pytest.mark.parametrize("env", ["A=b", {"A": 1}, {1: "a"}, {"A=B": "c"}, {"": "c"}, {"A": "b\0c"}, [("A", "b")]])
def test_env_is_a_mapping_of_str(env: object) -> None:
    with pytest.raises(InvalidOption, match=r"env: got .*; expected a mapping of str to str"):
        EventHub().subscribe("k", variable, env=env)  # type: ignore[call-overload]


def test_numeric_libraries_get_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "17")
    monkeypatch.setattr(boot, "cpu_limit", lambda: 12)
    hub = EventHub()
    hub.subscribe("k", variable, replicas=2)
    hub.subscribe("other", len)
    with hub:
        assert [hub.request("k", name).result(10) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")] == ["4", "17"]


def test_one_process_alone_may_use_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    hub = EventHub()
    hub.subscribe("k", variable)
    with hub:
        assert hub.request("k", "OMP_NUM_THREADS").result(10) is None


def test_an_initializer_runs_before_the_handler_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late.py").write_text("import os\nSEEN = os.environ.get('MPHUB_TEST_LATE')\ndef look(_): return SEEN\n")
    monkeypatch.syspath_prepend(tmp_path)

    def prepare() -> None:
        os.environ["MPHUB_TEST_LATE"] = "prepared"
        note(tmp_path / "log", str(os.getpid()))

    hub = EventHub(initializer=prepare)
    pair = hub.subscribe("k", "late:look", replicas=2)
    with hub:
        assert hub.request("k", 1).result(10) == "prepared"
        assert sorted(lines(tmp_path / "log")) == sorted(map(str, pair.statistics().pids))
    assert "MPHUB_TEST_LATE" not in os.environ


def test_an_initializer_that_raises_fails_the_start() -> None:
    def fail() -> None:
        raise RuntimeError("no tracer")

    hub = EventHub(initializer=fail)
    hub.subscribe("k", len, restart=Restart(max_restarts=0))
    with pytest.raises(StartFailed) as caught:
        hub.start()
    assert "no tracer" in str(caught.value.__cause__)


def test_inline_the_initializer_runs_at_each_start() -> None:
    calls: list[int] = []
    hub = EventHub(engine="inline", initializer=lambda: calls.append(1))
    hub.subscribe("k", len)
    for _ in range(2):
        with hub:
            hub.publish("k", "a")
    assert calls == [1, 1]


def test_an_initializer_must_be_callable_and_sendable() -> None:
    with pytest.raises(InvalidOption, match="initializer"):
        EventHub(initializer=3)  # type: ignore[arg-type]
    lock = threading.Lock()
    with pytest.raises(PayloadError, match="initializer"):
        EventHub(initializer=lock.acquire)


def test_inline_has_no_environment_of_its_own() -> None:
    with pytest.raises(InvalidOption, match="env"):
        EventHub(engine="inline").subscribe("k", len, env={"A": "b"})
