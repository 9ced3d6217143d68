"""The benchmark's arithmetic, and one small run of each family; no figure is judged here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench
import families
import peers
import psutil
import pytest
import results
import sides

from tests.helpers import eventually

BENCH = Path(bench.__file__)
VALUES = {"baseline": [100.0, 200.0, 100.0], "mphub": [500.0, 1600.0, 600.0]}
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH.parents[1]), os.environ.get("PYTHONPATH", "")])}


def compared(name: str, values: dict[str, list[float]]) -> results.Result:
    return families.FAMILIES[name].result(name, 10, values)


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(BENCH), *arguments]


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    result = compared("throughput-1", VALUES)
    assert (result.ratios, result.ratio, result.values) == ([5.0, 8.0, 6.0], 6.0, VALUES)


def test_where_less_is_better_the_ratio_is_turned_round() -> None:
    result = compared("roundtrip", VALUES)
    assert result.ratios == pytest.approx([1 / 5, 1 / 8, 1 / 6])
    assert result.ratio == pytest.approx(1 / 6)


def test_a_spread_is_the_median_and_its_range() -> None:
    assert results.spread([3.0, 1.0, 2.25, 2.0], ".1f") == "2.1 (1.0..3.0)"
    assert results.spread([1234.5]) == "1,234 (1,234..1,234)"


def test_the_table_has_both_sides_and_their_ratio() -> None:
    row = results.table_of_ratios([compared("throughput-1", VALUES)]).splitlines()[1]
    assert row.split() == [
        *("throughput-1", "100", "(100..200)", "600", "(500..1,600)", "6.00", "(5.00..8.00)", ">=", "8", "FAILS"),
        *families.FAMILIES["throughput-1"].unit.split(),
    ]


@pytest.mark.parametrize(("least", "code"), [(None, 0), (6.0, 0), (6.1, 1), (float("nan"), 1)])
def test_the_check_is_of_throughput_to_one(least: float | None, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"throughput-1": VALUES, "roundtrip": {"baseline": [1.0], "mphub": [1000.0]}}
    monkeypatch.setattr(bench, "measure", lambda name, rounds, events, peers: compared(name, figures[name]))
    check = [] if least is None else ["--check", str(least)]
    monkeypatch.setattr(sys, "argv", ["bench.py", "--families", "roundtrip,throughput-1", *check])
    assert bench.main() == code


@pytest.mark.parametrize(("target", "expected"), [(6.0, ">= 6      holds"), (6.01, ">= 6.01   FAILS"), (None, "")])
def test_a_ratio_is_held_against_its_target(target: float | None, expected: str) -> None:
    assert replace(compared("throughput-1", VALUES), target=target).verdict == expected


@pytest.mark.parametrize("subscribers", [1, 2])
def test_work_is_the_same_on_both_sides(subscribers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sides.LOOPS, "7")
    done = []
    for opened in families.FAMILIES["work-1ms" if subscribers == 1 else "work-1ms-2"].sides.values():
        with opened() as side:
            side.publish(3)
            done.append(side.ask())
    assert done == [[3] * subscribers] * 2


def test_the_millisecond_of_work_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sides.LOOPS, "")  # so that it is put back
    monkeypatch.delenv(sides.LOOPS)
    found = sides.loops_of_a_millisecond()
    assert os.environ[sides.LOOPS] == str(found)
    monkeypatch.setattr(sides, "work", None)
    assert sides.loops_of_a_millisecond() == found > 0


def test_a_miscount_gives_no_figure() -> None:
    lossy = sides.Side(publish=lambda events: None, ask=lambda: [7])
    with pytest.raises(SystemExit, match=r"counted \[7\], expected \[17\]: no figure"):
        families.throughput(lossy, 10)
    with pytest.raises(SystemExit, match=r"counted \[7\], expected \[1000\]"):
        families.roundtrip(lossy, 10, 0.5, 0)


def test_a_measurement_that_fails_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "__file__", "missing.py")
    with pytest.raises(SystemExit, match=r"throughput-1/mphub ended with 2: no figure\n.*missing\.py"):
        bench.measure_apart("throughput-1", "mphub", 10)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rounds", "0"], "got '0'; expected a whole number"),
        (["--events", "many"], "got 'many'; expected a whole number"),
        (["--families", "roundtrip,throughput"], "got 'throughput'; expected some of throughput-1,throughput-4,"),
        (["--check", "five"], "invalid float value: 'five'"),
        (["--check", "5", "--families", "roundtrip"], "got --families roundtrip; expected throughput-1"),
        (["--json", "no/such/folder/file"], "got 'no/such/folder/file'; expected a file in an existing folder"),
        (["--plots", "no/such/folder"], "--plots: got 'no/such/folder'; expected a folder in an existing one"),
        (["--plots", __file__], "which is a file; expected a folder"),
        (["--round", "3"], "got '--round'; expected --families, --rounds,"),
    ],
)
def test_a_typo_is_explained(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.parse(arguments)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.timeout(120)
@pytest.mark.parametrize("heavy", [False, True])
def test_every_family_is_measured_on_both_sides(heavy: bool) -> None:
    # but for an option or a number the same as others
    alike = ("archive-jsonl", "roundtrip-hot", "stuck-own", "stuck-drop", "stuck-frozen", "throughput-16", "work-1ms-2")
    names = [name for name in families.FAMILIES if name.startswith("array") == heavy and not name.startswith(alike)]
    events = 20 if heavy else 200
    run = subprocess.run(
        command("--rounds", "1", "--events", str(events), "--families", ",".join(names), "--json", "-"),
        check=True, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(run.stdout)["results"]
    assert [result["family"] for result in found] == names
    for result in found:
        assert result["events"] == events
        assert set(result["values"]) == set(results.SIDES)
        assert all(len(values) == 1 and values[0] > 0 for values in (*result["values"].values(), result["ratios"]))


@pytest.mark.parametrize("peer", [name for name, peer in peers.PEERS.items() if peer.is_there])
def test_a_peer_that_is_installed_is_measured_too(peer: str) -> None:
    assert bench.measure_apart("throughput-1", peer, 2000)[peer] > 0
    assert bench.measure_apart("roundtrip", peer, 100)[peer] > 0


def test_a_peer_that_is_not_installed_is_not_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(name: str, rounds: int, events: int | None, others: list[str]) -> results.Result:
        return compared(name, {**VALUES, **{other: VALUES["baseline"] for other in others}})

    opened = peers.process_pool_executor
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(
        bench,
        "PEERS",
        {
            "there": peers.Peer("json", opened, server=sys.executable),
            "without package": peers.Peer("no_such_package", opened, server=sys.executable),
            "without server": peers.Peer("json", opened, server="no-such-server"),
        },
    )
    monkeypatch.setattr(sys, "argv", ["bench.py", "--families", "throughput-1", "--peers", "--json", "-"])
    assert bench.main() == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["results"][0]["peers"]) == ["there"]
    assert err.splitlines() == [f"bench: without {what} is not installed: not run" for what in ("package", "server")]


SERVER = "import socket, sys, time; server = socket.create_server(sys.argv[1], family=socket.AF_UNIX); time.sleep(60)"


def test_a_peers_server_is_killed_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = psutil.Process().children()
    with pytest.raises(ZeroDivisionError), peers.serving(sys.executable, "-c", SERVER, "socket", address="socket"):
        [server] = [child for child in psutil.Process().children() if child not in before]
        assert server.is_running()
        raise ZeroDivisionError
    assert not server.is_running()


def test_a_peers_server_that_does_not_start_is_told() -> None:
    with pytest.raises(SystemExit, match="ended with 3 before it served"):
        with peers.serving(sys.executable, "-c", "raise SystemExit(3)", address="no/such/socket"):
            pass


def test_peers_stand_below_their_family() -> None:
    result = compared("throughput-1", {**VALUES, "pyzmq": [250.0, 400.0, 300.0]})
    assert result.peers == {"pyzmq": 2.0}
    assert results.table_of_ratios([result]).splitlines()[2].split() == ["pyzmq", "300", "(250..400)", "2.00"]


@pytest.mark.parametrize("side", list(results.SIDES))
@pytest.mark.timeout(60)
def test_an_interrupt_leaves_no_process(side: str) -> None:
    others = [name for name in results.SIDES if name != side]
    script = (
        f"import bench, families; families.FAMILIES['throughput-1'].sides.pop({others[0]!r}); bench.measure('throughput-1', 1, 50_000_000)"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(BENCH.parent), ENVIRONMENT["PYTHONPATH"]])}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL)
    try:
        root = psutil.Process(process.pid)
        assert eventually(lambda: len(root.children(recursive=True)) >= 3, 20)
        started = root.children(recursive=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert eventually(lambda: not any(child.is_running() for child in started), 3)
