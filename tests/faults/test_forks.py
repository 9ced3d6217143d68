"""Programs that fork while they publish: each child is a publisher of its own, nothing hangs, nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

import mphub
from mphub import EventHub
from mphub.connection import connection_to
from tests.helpers import eventually
from tests.procs.test_hub import lines, note

pytestmark = pytest.mark.faults
FORKS, EACH = 40, 20


def be_a_child(number: int, hub: EventHub, publisher: mphub.Publisher) -> None:
    """Publish, and end without any clean-up."""
    code = 1
    try:
        for n in range(EACH):
            (hub if n % 2 else publisher).publish("k", (number, n))
        hub.flush(20)
        code = 0
    finally:
        os._exit(code)


def reaped(pid: int, codes: dict[int, int]) -> bool:
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
        codes[pid] = os.waitstatus_to_exitcode(status)
    return bool(found)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forty_forks_of_a_program_that_publishes_lose_and_double_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hub = EventHub()
    hub.subscribe("k", lambda event: note(log, "{} {}".format(*event)), name="k")
    stop = threading.Event()
    published = [0, 0]

    def publish(which: int) -> None:
        publisher = hub.publisher()
        while not stop.is_set():
            (hub if which else publisher).publish("k", (-1 - which, published[which]))
            published[which] += 1
            time.sleep(0.0005)

    def look_up() -> None:
        while not stop.is_set():
            connection_to(hub._address)  # a fork finds its lock taken every so often

    with hub:
        threads = [threading.Thread(target=publish, args=(which,)) for which in (0, 1)] + [threading.Thread(target=look_up)]
        for thread in threads:
            thread.start()
        publisher = hub.publisher()
        pids, codes = [], dict[int, int]()
        for number in range(FORKS):
            pid = os.fork()
            if not pid:
                be_a_child(number, hub, publisher)
            pids.append(pid)
        ended = all(eventually(partial(reaped, pid, codes), 20) for pid in pids)
        for pid in set(pids) - set(codes):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        stop.set()
        for thread in threads:
            thread.join(20)
        assert ended, f"{FORKS - len(codes)} children hang"
        assert set(codes.values()) == {0}
        hub.drain(30)
    rows = lines(log)
    expected = [f"{number} {n}" for number in range(FORKS) for n in range(EACH)]
    expected += [f"{-1 - which} {n}" for which in (0, 1) for n in range(published[which])]
    counts = Counter(rows)
    assert not {row: count for row, count in counts.items() if count > 1}
    assert set(counts) == set(expected)
    for number in range(-2, FORKS):
        own = [int(row.split()[1]) for row in rows if row.split()[0] == str(number)]
        assert own == sorted(own), "each in its order"
