"""A durable hub: the same program on the same folder goes on where it stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from mphub import EventHub, HubExists, Inbox, InvalidOption, JournalError, NoSubscriber, RetryLater, Subscriber
from mphub.errors import HubError
from mphub.procs.exchange import Exchange
from mphub.store.blobs import Blobs
from mphub.store.folder import NETWORKED, Owner, kind_of, refuse_network
from mphub.store.journal import Journal
from mphub.store.verify import verify
from tests.helpers import eventually
from tests.notes import Record, lines

pytestmark = pytest.mark.timeout(60)


@contextmanager
def hub_on(folder: Path, **options: Any) -> Iterator[EventHub]:
    hub = EventHub(folder / "hub", check=False, **options)
    try:
        yield hub
    finally:
        hub.stop(drain=False)


def test_what_is_not_handled_waits_for_the_next_run(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with hub_on(tmp_path) as hub:
        sub = hub.subscribe("k", Record(notes), name="notes")
        hub.start()
        sub.pause()
        for n in range(100):
            hub.publish("k", n)
    with hub_on(tmp_path) as hub:
        hub.subscribe("k", Record(notes), name="notes")
        hub.start()
        hub.publish("k", 100)
        hub.drain(20)
        counts = hub.statistics().subscribers["notes"]
    assert lines(notes) == [str(n) for n in range(101)]
    assert (counts.accepted, counts.handled, counts.waiting) == (101, 101, 0)


def test_events_wait_for_a_name_that_is_not_subscribed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes = tmp_path / "notes"
    with hub_on(tmp_path) as hub:
        hub.subscribe("k", Record(notes), name="notes")
        hub.start()
    with hub_on(tmp_path) as hub:
        hub.start()
        for n in range(10):
            hub.publish("k", n)
        hub.drain(20)  # it does not wait for who is not there
        assert hub.statistics().subscribers["notes"].waiting == 10
    caplog.clear()
    with hub_on(tmp_path) as hub:
        hub.start()
        assert "notes (10 events)" in caplog.text
        hub.subscribe("k", Record(notes), name="notes")
        hub.drain(20)
    assert lines(notes) == [str(n) for n in range(10)]


def test_a_name_can_be_forgotten(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        sub = hub.subscribe("k", print, name="notes")
        hub.start()
        with pytest.raises(HubError, match="unsubscribe"):
            hub.forget("notes")
        sub.unsubscribe()
        hub.publish("k", 1, confirm=True)
        assert hub.statistics().subscribers["notes"].waiting == 1
        hub.forget("notes")
        hub.publish("k", 2)
        hub.flush()
        counts = hub.statistics().subscribers["notes"]
        assert (counts.waiting, counts.dropped, hub.statistics().unmatched) == (0, {"forgotten": 1}, 1)
        with pytest.raises(NoSubscriber):
            hub.forget("note")
        hub.subscribe("k", print, name="other").unsubscribe(forget=True)
        hub.publish("k", 3)
        hub.flush()
        assert hub.statistics().unmatched == 2


def test_an_inbox_that_nobody_claims_expires(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        hub.subscribe("k", print, name="notes", inbox=Inbox(expires=0.5))
        hub.start()
        hub.subscription("notes").unsubscribe()
        hub.publish("k", 1, confirm=True)
        assert eventually(lambda: hub.statistics().subscribers["notes"].dropped == {"expired": 1}, 10)


def test_delays_attempts_dead_letters_and_snapshots_survive(tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    class Sum(Subscriber[int, int]):
        total = 0

        def handle(self, payload: int) -> int:
            self.total += payload
            return self.total

        def snapshot(self) -> int:
            return self.total

        def restore(self, state: Any) -> None:
            self.total = state

    def fail(payload: str) -> None:
        if payload == "later":
            raise RetryLater(1.5)
        if payload == "late":
            Record(notes)(payload)
            return
        raise ValueError(payload)

    def subscribe(hub: EventHub) -> None:
        hub.subscribe("sum", Sum, name="sum")
        hub.subscribe("fail", fail if not notes.exists() else Record(notes), name="fail")

    with hub_on(tmp_path) as hub:
        subscribe(hub)
        hub.start()
        for n in range(10):
            hub.publish("sum", n)
        for payload in ("bad", "later"):
            hub.publish("fail", payload)
        hub.publish("fail", "late", delay=1.0)
        assert eventually(lambda: hub.statistics().subscribers["fail"].failed == 2, 20)
        assert eventually(lambda: hub.statistics().subscribers["sum"].handled == 10, 20)
    notes.touch()
    with hub_on(tmp_path) as hub:
        subscribe(hub)
        hub.start()
        assert hub.subscription("sum").request(5).result(20) == 50
        assert [letter.payload for letter in hub.dead_letters("fail")] == ["bad"]
        assert hub.redrive("fail") == 1
        hub.drain(20)
    assert sorted(lines(notes)) == ["bad", "late", "later"]


def test_what_a_run_before_left_dead_is_not_raised_again(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        hub.subscribe("k", lambda payload: 1 / 0, name="fails")
        hub.start()
        hub.publish("k", 1)
        hub.drain(20)
    with EventHub(tmp_path / "hub") as hub:
        assert len(hub.dead_letters()) == 1


PROGRAM: Final = """
import sys, time
from mphub import EventHub
hub = EventHub(sys.argv[1], check=False)
notes = sys.argv[2]
hub.subscribe("k", lambda n: open(notes, "a").write(f"{n}\\n") and None, name="notes")
hub.start()
for n in range(100_000_000):
    hub.publish("k", n)
    if n % 500 == 0:
        hub.flush()
        print(n, flush=True)
"""


def test_kill_9_of_everything_loses_and_repeats_nothing(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    notes = tmp_path / "notes"
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path / "hub", notes], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    confirmed = 0
    while confirmed < 3000:
        confirmed = int(process.stdout.readline())
    hub_pids = [int(record.read_text().split()[0]) for record in (tmp_path / "hub" / "children").iterdir()]
    for pid in (process.pid, *hub_pids):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with hub_on(tmp_path) as hub:
        hub.subscribe("k", Record(notes), name="notes")
        hub.start()
        hub.drain(30)
        counts = hub.statistics().subscribers["notes"]
    handled = [int(line) for line in lines(notes)]
    assert len(handled) - len(set(handled)) <= 1  # the one that was just being handled
    assert sorted(set(handled)) == list(range(counts.accepted)) and counts.accepted > confirmed


def test_one_hub_for_each_folder(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        hub.start()
        with pytest.raises(HubExists, match=str(os.getpid())):
            EventHub(tmp_path / "hub").start()
        code = f"from mphub import EventHub; EventHub({str(tmp_path / 'hub')!r}).start()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"the hub of process {os.getpid()} has" in done.stderr
    with hub_on(tmp_path) as hub:  # a dead owner's lock is nobody's
        hub.start()


def test_a_folder_that_is_not_for_this_version_is_refused_untouched(tmp_path: Path) -> None:
    newer, others, file = tmp_path / "newer", tmp_path / "others", tmp_path / "file"
    newer.mkdir()
    (newer / "format").write_text("99")
    others.mkdir()
    (others / "thesis.txt").write_text("")
    file.touch()
    for path, kind, says in ((newer, JournalError, "'99'"), (others, JournalError, "thesis.txt"), (file, InvalidOption, "a file")):
        with pytest.raises(kind, match=says):
            EventHub(path).start()
    assert [sorted(os.listdir(path)) for path in (newer, others)] == [["format"], ["thesis.txt"]]


def test_a_damaged_journal_is_told_not_opened(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        hub.subscribe("k", print, name="notes")
        hub.start()
        hub.subscription("notes").pause()
        for n in range(1000):
            hub.publish("k", f"{n}" * 100)
    data = tmp_path / "hub" / "journal" / "data.mdb"
    whole = data.read_bytes()
    data.write_bytes(whole[:8192] + os.urandom(len(whole) - 8192))
    (tmp_path / "hub" / "owner").write_bytes(msgspec.json.encode(Owner(1, "before the power went")))
    for _ in range(2):  # not only the first time
        with pytest.raises(JournalError, match="damaged"):
            EventHub(tmp_path / "hub").start()


@pytest.mark.parametrize("last", ["process", "power", "unknown"])
def test_after_a_restart_of_the_machine_what_may_be_missing_is_told(last: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with hub_on(tmp_path, durability="power" if last == "power" else "process") as hub:
        hub.start()
    owner = tmp_path / "hub" / "owner"
    if last == "unknown":
        owner.unlink()
    else:
        owner.write_bytes(msgspec.json.encode(Owner(1, "before the power went", last == "power")))
    for times in range(2):  # once is enough
        caplog.clear()
        with hub_on(tmp_path) as hub:
            hub.start()
        assert ("may be missing" in caplog.text) is (last != "power" and times == 0)


def test_a_blob_that_the_power_loss_has_taken_is_told(tmp_path: Path) -> None:
    with hub_on(tmp_path) as hub:
        hub.subscribe("k", print, name="notes")
        hub.start()
        hub.subscription("notes").pause()
        hub.publish("k", bytes(100_000), confirm=True)
    assert verify(tmp_path / "hub").problems == []
    (blob,) = (tmp_path / "hub" / "blobs").iterdir()
    blob.write_bytes(blob.read_bytes()[:4096])
    (tmp_path / "hub" / "owner").unlink()
    with pytest.raises(JournalError, match=f"{blob.name} has 4096 bytes"):
        EventHub(tmp_path / "hub").start()


def test_network_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [("/", "ext4"), ("/net", "nfs4"), ("/net/local", "xfs")]
    assert kind_of(Path("/net/a"), mounts) in NETWORKED
    assert kind_of(Path("/net/local/a"), mounts) == "xfs" and kind_of(Path("/network"), mounts) == "ext4"
    monkeypatch.setattr("mphub.store.folder.kind_of", lambda path, mounts: "nfs4")
    with pytest.raises(JournalError, match="nfs4"):
        refuse_network(tmp_path)


def test_a_name_is_not_guessed(tmp_path: Path) -> None:
    hub = EventHub(tmp_path / "hub")
    with pytest.raises(InvalidOption, match="name"):
        hub.subscribe("k", lambda payload: None)
    hub.subscribe("k", time.sleep)
    with pytest.raises(InvalidOption, match="name"):
        hub.subscribe("k", time.sleep)
    with pytest.raises(InvalidOption, match="process"):
        hub.subscribe("k", print, process="shared")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    "options", [{"path": ""}, {"path": 3}, {"path": "x", "engine": "inline"}, {"durability": "power"}, {"durability": "disk"}]
)
def test_typos_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption):
        EventHub(**options)


def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be used"):
        EventHub("/proc/mphub").start()


def test_a_hub_that_survives_power_losses_works_like_any_other(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with hub_on(tmp_path, durability="power") as hub:
        hub.subscribe("k", lambda payload: Record(notes)(len(payload)), name="notes")
        hub.start()
        for n in (1, 100_000, 3):
            hub.publish("k", bytes(n))
        hub.drain(20)
    assert lines(notes) == ["1", "100000", "3"]


@pytest.mark.parametrize("synced", [False, True])
def test_with_power_in_mind_a_file_is_on_the_disk_before_the_commit_that_names_it(
    synced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("journal", "blobs"):
        (tmp_path / name).mkdir()
    done: list[str] = []
    real = Journal.commit
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))

    def commit(journal: Journal) -> None:
        real(journal)
        done.append("commit")

    monkeypatch.setattr(Journal, "commit", commit)
    blobs = Blobs(tmp_path / "blobs", 7)
    exchange = Exchange(Journal(tmp_path / "journal", 1 << 24, synced=synced), blobs, 1 << 24, time.time)
    assert exchange.journal._env.flags()["sync"] is synced  # type: ignore[attr-defined]
    name = blobs.write(b"x" * 100_000)
    done.clear()
    with exchange.turn():
        exchange.letters.keep_snapshot("notes", b"", name)
    with exchange.turn():
        exchange.letters.keep_snapshot("notes", b"small", None)
    files = [str(tmp_path / "blobs" / name), str(tmp_path / "blobs")]
    assert done == [*(files if synced else []), "commit", "commit"]
