"""Every command, against a hub that another process runs: what it says, in words and in JSON, and what it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mphub import EventHub, SubscriberPaused, Subscription, __version__
from mphub.cli.main import CODES, main
from mphub.control import Control
from mphub.procs import boot
from mphub.running import hubs
from tests.helpers import eventually

pytestmark = pytest.mark.timeout(60)
APP = """
import pathlib, sys, time
from mphub.procs import boot
boot.SHM = pathlib.Path(sys.argv[1])
import mphub

hub = mphub.EventHub(sys.argv[2] + "/kept", name="shop", check=False, retention=mphub.Retention())

@hub.subscriber("orders.*", to="done")
def order(payload):
    if payload == "bad":
        raise ValueError("no such thing")
    return payload

hub.subscribe("done", print, name="log")
hub.subscribe("done", lambda payload: None, name="count")
hub.subscribe("slow", time.sleep, name="slow")

if __name__ == "__main__":
    sys.exit(hub.run())
"""
COMMAND = """
import pathlib, sys
from mphub.procs import boot
boot.SHM = pathlib.Path(sys.argv.pop(1))
from mphub.cli import main
sys.exit(main())
"""
Run = Callable[..., tuple[int, str, str]]


def elsewhere() -> list[str]:
    """Return the beginning of a command in a process of its own."""
    return [sys.executable, "-c", COMMAND, str(boot.SHM)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Run a hub in another process, where no other hub is found."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "app.py").write_text(APP)
    with tempfile.TemporaryDirectory(prefix="shm-") as shm, pytest.MonkeyPatch.context() as patch:
        patch.setattr(boot, "SHM", Path(shm))
        command = [sys.executable, str(folder / "app.py"), shm, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                assert eventually(lambda: bool(list(hubs())))
                control = Control(next(hubs()))
                assert eventually(lambda: all(one["state"] == "RUNNING" for one in control.call("states").values()))
                yield process, folder
            finally:
                process.kill()
        assert eventually(lambda: not list(Path(shm).iterdir()))


@pytest.fixture
def run(shop: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mphub", *map(str, arguments)])
        code = main()
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def said(run: Run) -> Callable[..., Any]:
    """Run a command with --json, and return what it says in its one line, or all of its lines."""

    def call(*arguments: object) -> Any:
        code, out, error = run(*arguments, "--json")
        assert (code, error) == (0, "")
        found = [json.loads(line) for line in out.splitlines()]
        assert all(one.pop("schema") == 1 for one in found)
        return found[0] if len(found) == 1 else found

    return call


# -- looking


def test_status(run: Run, said: Callable[..., Any], shop: tuple[subprocess.Popen[str], Path]) -> None:
    found = said("status")
    assert (found["hub"]["name"], found["hub"]["pid"]) == ("shop", shop[0].pid)
    assert set(found["subscribers"]) == {"order", "log", "count", "slow"}
    assert found["subscribers"]["order"]["state"] == "RUNNING"
    code, out, error = run("status", "--hub", "shop")
    assert (code, error) == (0, "")
    assert out.startswith("HUB shop   UP 00:0")
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [[name, "RUNNING"] for name in found["subscribers"]]
    assert run("status", "--hub", str(shop[1] / "kept"))[0] == 0


def test_status_again_and_again(shop: tuple[subprocess.Popen[str], Path]) -> None:
    command = [*elsewhere(), "status", "--watch", "--every", "0.1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert [json.loads(watching.stdout.readline())["hub"]["name"] for _ in range(3)] == ["shop"] * 3
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 130


def test_ping(run: Run, said: Callable[..., Any]) -> None:
    assert run("ping") == (0, "shop answers\n", "")
    found = said("ping", "--ready")
    assert found["ready"] is True
    assert found["states"]["order"] == "RUNNING"


# -- feeding and listening


def test_pub_sub_and_history(run: Run, said: Callable[..., Any], tmp_path: Path) -> None:
    assert said("pub", "orders.eu", '{"n": 1}') == {"published": 1}
    (tmp_path / "lines").write_text("2\n\n[3]\nplain text\n")
    assert run("pub", "orders.us", "--file", tmp_path / "lines") == (0, "3 published\n", "")
    assert run("drain", "--timeout", 20)[0] == 0
    past = said("history", "orders.>")
    assert [row["key"] for row in past[-4:]] == ["orders.eu", *["orders.us"] * 3]
    assert past[-1]["outcomes"] == {"order": "handled"}
    assert len(said("history", "orders.us", "--limit", "2")) == 2
    assert run("history", "--until", "2020-01-01") == (0, "", "")
    assert run("pub", "nobody.there", 1)[0] == 2
    assert run("pub", "bad key", 1)[0] == 2


def test_sub(shop: tuple[subprocess.Popen[str], Path], run: Run) -> None:
    command = [*elsewhere(), "sub", "orders.>", "done", "--count", "2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listening:
        while listening.poll() is None:  # until it listens
            run("pub", "orders.eu", "17")
            time.sleep(0.05)
        assert listening.stdout is not None
        heard = [json.loads(line) for line in listening.stdout]
    assert (heard[0]["key"], heard[0]["payload"]) in [("orders.eu", 17), ("done", 17)]
    assert (len(heard), listening.returncode) == (2, 0)


# -- changing


def test_subscribers_are_paused_resumed_restarted_and_scaled(run: Run, said: Callable[..., Any]) -> None:
    def figures(name: str) -> Any:
        return json.loads(run("status", "--json")[1])["subscribers"][name]  # which ends with 3 while one starts

    before = figures("order")["pids"]
    assert said("pause", "order", "log") == {"paused": ["order", "log"]}
    assert (figures("order")["state"], figures("log")["state"], figures("count")["state"]) == ("PAUSED", "PAUSED", "RUNNING")
    run("pub", "orders.eu", "17")
    assert run("drain", "--timeout", 20)[0] == 3
    assert run("resume", "order", "log") == (0, "resumed: order, log\n", "")
    assert said("restart", "order") == {"restarted": ["order"]}
    assert eventually(lambda: figures("order")["state"] == "RUNNING" and figures("order")["pids"] not in ([], before))
    assert said("stop", "order") == {"stopped": ["order"]}
    assert eventually(lambda: (figures("order")["state"], figures("order")["pids"]) == ("STOPPED", []))
    assert run("status")[0] == 0
    run("pub", "orders.eu", "17")
    assert figures("order")["waiting"] == 1
    assert run("drain", "--timeout", 20)[0] == 3
    assert run("start", "order", "log") == (0, "started: order, log\n", "")
    assert run("drain", "--timeout", 20)[0] == 0
    assert said("scale", "slow", 2) == {"name": "slow", "replicas": 2}
    assert eventually(lambda: len(figures("slow")["pids"]) == 2)
    assert said("drain", "--timeout", 20)["dead"] == 0


def test_those_who_share_a_process_are_paused_and_resumed_alone(run: Run) -> None:
    hub: EventHub = EventHub(name="shares")
    one: Subscription[Any, Any] = hub.subscribe("k", abs, name="one", process="both")
    other: Subscription[Any, Any] = hub.subscribe("k", abs, name="other", process="both")
    with hub:
        assert run("pause", "one", "--hub", "shares")[0] == 0
        assert eventually(lambda: (one.state, other.state) == ("PAUSED", "RUNNING"))
        assert run("resume", "one", "--hub", "shares")[0] == 0
        assert eventually(lambda: (one.state, other.state) == ("RUNNING", "RUNNING"))
        before = other.statistics().pids
        assert run("restart", "one", "--hub", "shares")[0] == 0
        assert eventually(lambda: other.statistics().pids not in ((), before))
        for command in (("scale", "one", 2), ("stop", "one")):
            code, _, error = run(*command, "--hub", "shares")
            assert (code, "shares a process" in error) == (2, True)


def test_a_drain_may_take_too_long(run: Run) -> None:
    run("pub", "slow", "1")
    code, out, error = run("drain", "--timeout", 0.1)
    assert (code, out) == (5, "")
    assert "still to be handled: slow: 1" in error
    assert run("drain", "--timeout", 20)[0] == 0


def test_dead_letters(run: Run, said: Callable[..., Any]) -> None:
    for key in ("orders.eu", "orders.us"):
        run("pub", key, "bad")
    run("drain", "--timeout", 20)
    listed = said("dead", "list", "order")
    assert [(one["key"], one["reason"], one["subscriber"]) for one in listed] == [
        (key, "exception", "order") for key in ("orders.eu", "orders.us")
    ]
    assert [line.split()[0] for line in run("dead", "list")[1].splitlines()] == [one["id"] for one in listed]
    first = listed[0]["id"]
    assert said("dead", "show", first)["payload"] == "'bad'"
    assert "ValueError: no such thing" in run("dead", "show", first)[1]
    assert said("dead", "redrive", "order", "--id", first) == {"redriven": 1}
    run("drain", "--timeout", 20)
    assert run("dead", "purge", "--yes", "--id", first) == (0, "1 purged\n", "")
    assert said("dead", "purge", "--yes") == {"purged": 1}
    assert run("dead", "list") == (0, "", "")
    assert run("dead", "list", "oder")[0] == 2
    for wrong in ("show", "redrive --id"):
        assert run("dead", *wrong.split(), "xyz")[0] == 2


# -- what is wrong is said


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("stauts", 2, "did you mean 'status'?"),
        ("dead lst", 2, "did you mean 'list'?"),
        ("status --jsn", 2, "--json"),
        ("status --hub shpo", 4, "did you mean 'shop'?"),
        ("pause oder", 2, "did you mean 'order'?"),
        ("restart order oder", 2, "did you mean 'order'?"),
        ("scale order many", 2, "many"),
        ("scale order 0", 2, "0"),
        ("pub orders.eu 1 --file -", 2, "DATA and --file"),
        ("history --since yesterday", 2, "--since 'yesterday'"),
        ("run app", 2, "a module and its hub, as in app:hub"),
        ("run nowhere:hub", 2, "importing 'nowhere' failed"),
        ("check json:hub", 2, "json has no 'hub'"),
        ("check json:dumps", 2, "is a function; expected an EventHub"),
        ("run app:hub --app-dir /nowhere", 2, "/nowhere"),
        ("check nowhere.toml", 2, "No such file"),
    ],
)
def test_what_is_wrong_is_said(run: Run, arguments: str, code: int, words: str) -> None:
    found, out, error = run(*arguments.split())
    assert (found, out) == (code, "")
    assert words in error
    assert "Traceback" not in error


def test_help_tells_the_exit_codes_and_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for line in CODES.splitlines()[2:9]:
        assert line.strip() in out
    for command in (
        "status",
        "ping",
        "pub",
        "sub",
        "history",
        "drain",
        "dead",
        "pause",
        "resume",
        "restart",
        "scale",
        "stop",
        "run",
        "check",
        "init",
        "doctor",
        "verify",
        "salvage",
    ):
        assert f"\n  {command} " in out
        assert run(command, "--help")[0] == 0
    assert run("--version") == (0, f"{__version__}\n", "")


# -- programs


def test_what_init_writes_is_checked_and_runs(run: Run, said: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run("init", "first_app.py") == (0, "first_app.py is written; run it: mphub run first_app:hub\n", "")
    assert run("init", "first_app.py")[0] == 2
    assert run("init", "first.txt")[0] == 2
    assert run("check", "first_app:hub")[1].splitlines()[0] == "greet   -> greet -> greeted"
    assert said("check", "first_app:hub")["flow"][0] == {"key": "greet", "subscriber": "greet", "to": "greeted"}
    assert run("check", "first_app:hbu")[2].endswith("did you mean 'hub'?\n")
    command = [sys.executable, "-m", "mphub", "run", "first_app:hub"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None
        with monkeypatch.context() as patch:
            patch.setattr(boot, "SHM", Path("/dev/shm"))
            assert eventually(lambda: run("ping", "--hub", "first_app")[0] == 0)
            assert run("pub", "greet", '"World"', "--hub", "first_app")[0] == 0
            assert running.stdout.readline() == "Hello, World!\n"
            assert said("stop", "--hub", "first_app") == {"stopped": "first_app"}
            assert run("ping", "--hub", "first_app")[0] == 4
        assert running.wait(10) == 0


def test_doctor(run: Run, said: Callable[..., Any]) -> None:
    assert said("doctor")["hubs"] == ["shop"]
    assert "memory " in run("doctor")[1]


def test_a_folder_is_verified_and_salvaged(run: Run, said: Callable[..., Any], tmp_path: Path) -> None:
    hub: EventHub = EventHub(tmp_path / "hub", check=False)
    hub.subscribe("k", abs, name="waits")
    with hub:
        hub.subscription("waits").pause()
        hub.publish_batch("k", range(200))
        hub.flush()
        with pytest.raises(SubscriberPaused):
            hub.drain(10)
        hub.stop(drain=False)
    assert said("verify", tmp_path / "hub")["problems"] == []
    assert run("verify", tmp_path / "hub")[1].endswith(" rows can be read\n")
    found = said("salvage", tmp_path / "hub", tmp_path / "new")
    assert (found["waiting"], found["problems"]) == ({"waits": 200}, [])
    assert run("salvage", tmp_path / "hub", tmp_path / "new")[0] == 2
    data = tmp_path / "hub" / "journal" / "data.mdb"
    os.truncate(data, data.stat().st_size // 2)
    assert run("verify", tmp_path / "hub")[0] == 1
    (tmp_path / "empty").mkdir()
    assert run("salvage", tmp_path / "empty", tmp_path / "other")[0] == 1
    assert run("verify", tmp_path / "nowhere")[0] == 2


def test_several_hubs_have_to_be_told_apart(run: Run) -> None:
    with EventHub(name="other"):
        code, _, error = run("status")
        assert code == 1
        assert "2 hubs of this user run" in error
        assert run("ping", "--hub", "other") == (0, "other answers\n", "")
