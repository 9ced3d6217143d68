"""Hubs described by a file: what it may say is what EventHub and subscribe take, and what is wrong in it is said with its place."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from mphub import EventHub, Inbox, InvalidOption, Retention, Retry, Stop
from mphub.config import INNER, Config, HubTable, RetryTable, SubscriberTable

MODULE = """
from mphub import Subscriber

class Times(Subscriber):
    def __init__(self, factor=1):
        self.factor = factor

    def handle(self, n):
        return n * self.factor

def is_odd(n):
    return n % 2 == 1

def fail(n):
    raise ValueError(n)
"""
FILE = """
[hub]
name = "shop"
engine = "inline"
max_bytes = "1GB"
stop = { ask = 1, term = 2.5 }

[subscribers.times]
handler = "configured:Times"
args = { factor = 3 }
keys = ["a.*", "b"]
to = "done"
where = "configured:is_odd"
inbox = { maxsize = 10, overflow = "drop_oldest" }

[subscribers.fails]
handler = "configured:fail"
keys = "c"
retry = { max_attempts = 2, delay = 0, on = ["ValueError"] }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "configured", raising=False)
    (tmp_path / "configured.py").write_text(MODULE)
    (tmp_path / "hub.toml").write_text(FILE)
    return tmp_path


def test_tables_have_the_fields_of_what_they_are_for() -> None:
    hub, subscribe = (list(inspect.signature(function).parameters)[1:] for function in (EventHub.__init__, EventHub.subscribe))
    assert set(HubTable.__struct_fields__) == set(hub)
    assert set(SubscriberTable.__struct_fields__) == {*subscribe, "args"} - {"name"}
    assert set(RetryTable.__struct_fields__) == set(inspect.signature(Retry).parameters)
    retry, made = RetryTable(), Retry()
    assert [getattr(retry, name) for name in ("max_attempts", "delay", "factor", "max_delay")] == [
        made.max_attempts,
        made.delay,
        made.factor,
        made.max_delay,
    ]
    assert set(INNER) <= {*HubTable.__struct_fields__, *SubscriberTable.__struct_fields__}


def test_a_file_makes_a_hub_that_works(folder: Path) -> None:
    hub = EventHub.from_config(folder / "hub.toml")
    assert (hub.name, hub._stop) == ("shop", Stop(1, 2.5))
    assert hub.subscription("times").keys == ("a.*", "b")
    assert hub.subscription("times")._spec.inbox == Inbox(10, 256_000_000, overflow="drop_oldest")
    hub._check = False
    with hub:
        assert hub.request("b", 3).result() == 9
        for n in range(4):
            hub.publish("a.x", n)
        with pytest.raises(ValueError, match="7"):
            hub.publish("c", 7)
        found = hub.statistics()
        assert (found.subscribers["fails"].failed, found.subscribers["times"].handled, found.unmatched) == (2, 3, 3)


def test_paths_are_those_of_the_file_and_pyproject_may_say_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "hub.toml").rename(folder / "other.toml")
    (folder / "pyproject.toml").write_text('[tool.mphub.hub]\npath = "data"\nretention = { max_bytes = "1GB" }\n')
    monkeypatch.chdir(folder)
    hub = EventHub.from_config()
    assert (hub._durable, hub._retention) == (folder / "data", Retention(max_bytes=10**9))


def test_the_environment_wins_over_the_file_and_arguments_over_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPHUB_NAME", "kiosk")
    monkeypatch.setenv("MPHUB_CHECK", "false")
    hub = EventHub.from_config(folder / "hub.toml")
    assert (hub.name, hub._check) == ("kiosk", False)
    assert EventHub.from_config(folder / "hub.toml", name="stall").name == "stall"
    assert Config(folder / "hub.toml").origins == {
        "name": "MPHUB_NAME", "check": "MPHUB_CHECK", "engine": "hub.toml", "max_bytes": "hub.toml", "stop": "hub.toml",
    }  # fmt: skip
    monkeypatch.setenv("MPHUB_CHECK", "perhaps")
    with pytest.raises(InvalidOption, match="MPHUB_CHECK: Expected `bool`"):
        EventHub.from_config(folder / "hub.toml")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("[hub]", "[hbu]", "hbu: there is no such option; did you mean 'hub'"),
        ('name = "shop"', 'nmae = "shop"', "hub.nmae: there is no such option; did you mean 'name'"),
        ('name = "shop"', "name = 7", "hub.name: Expected `str`, got `int`"),
        ('engine = "inline"', 'engine = "inlin"', "hub: EventHub(engine): got 'inlin'"),
        ("ask = 1", "aks = 1", "hub.stop.aks: there is no such option; did you mean 'ask'"),
        ("ask = 1", "ask = -1", "hub.stop: Stop(ask): got -1"),
        ("maxsize = 10", "maxsize = 'many'", "subscribers.times.inbox.maxsize: Expected `int`, got `str`"),
        ("maxsize = 10", "maxsiez = 10", "subscribers.times.inbox.maxsiez: there is no such option; did you mean 'maxsize'"),
        ("max_attempts = 2", "max_attempts = 0", "subscribers.fails.retry: Retry(max_attempts): got 0"),
        ('"ValueError"', '"NoError"', "subscribers.fails.retry.on: got 'NoError'"),
        ('"ValueError"', '"configured:is_odd"', "subscribers.fails.retry: Retry(on)"),
        ("configured:fail", "configured:fial", "subscribers.fails.handler: configured has no 'fial'; did you mean 'fail'"),
        ("configured:fail", "confgured:fail", "subscribers.fails.handler: importing 'confgured' failed"),
        ("configured:fail", "fail", "subscribers.fails.handler: got 'fail'; expected a module and what is in it"),
        ('keys = "c"', 'keys = "c..d"', "subscribers.fails: "),
        ('keys = "c"', "", "subscribers.fails: Object missing required field `keys`"),
        ("configured:Times", "configured:is_odd", "subscribers.times.args: configured:is_odd is no class"),
        ("factor = 3", "fctor = 3", "subscribers.times.args: configured:Times: "),
        ("[subscribers.fails]", "[subscribers.fails", "hub.toml: "),
    ],
)
def test_what_is_wrong_is_said_with_its_place(folder: Path, before: str, after: str, words: str) -> None:
    file = folder / "hub.toml"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))
    with pytest.raises(InvalidOption) as caught:
        EventHub.from_config(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="No such file"):
        EventHub.from_config(tmp_path / "hub.toml")
    (tmp_path / "pyproject.toml").write_text("")
    with pytest.raises(InvalidOption, match=r"no \[tool.mphub\]"):
        EventHub.from_config(tmp_path / "hub.toml")
