"""Where the time of one event goes: the CPU time of each process, and what parts of it cost alone."""

from __future__ import annotations

import mmap
import pickle
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path

from families import IDLE, WARM_UP, must_be
from sides import KEY, PAYLOAD, Counter, side_of

from mphub import EventHub, EventId
from mphub.core.delivery import DONE, RUNNING
from mphub.store.board import Board
from mphub.store.journal import Journal
from mphub.wire.codec import SHORT_BYTES, STOP
from mphub.wire.frames import join, split

PART_OF_ONE = 1000
"""Events in a batch whose parts are timed."""
TIMES = 200_000
"""Events for which a part is timed at once."""


def cpu_seconds(pid: int) -> float:
    """Return what all threads of a process have used, in nanoseconds' steps where others have ticks of ten milliseconds."""
    return time.clock_gettime(~pid << 3 | 2)  # the clock that clock_getcpuclockid(3) names


def cpu_of_each(pids: Mapping[str, int]) -> dict[str, float]:
    return {name: cpu_seconds(pid) for name, pid in pids.items()}


def pids_by_role(hub: EventHub) -> dict[str, int]:
    found = hub.statistics()
    return {"router": found.pids["router"], "subscriber": found.subscribers["counter"].pids[0]}


def steps(events: int) -> dict[str, float]:
    """Return nanoseconds of CPU for one event among many: of each process, then of parts of them alone."""
    hub = EventHub()
    hub.subscribe(KEY, Counter, name="counter")
    with hub:
        side, pids = side_of(hub, ["counter"]), pids_by_role(hub)
        side.publish(WARM_UP)
        side.ask()
        own, before = time.process_time(), cpu_of_each(pids)
        side.publish(events)
        must_be(side.ask(), [WARM_UP + events])
        own, after = time.process_time() - own, cpu_of_each(pids)
    used = {"publisher": own, **{name: after[name] - before[name] for name in pids}}
    return {name: seconds / events * 1e9 for name, seconds in used.items()} | parts()


def parts() -> dict[str, float]:
    """Time parts of an event's way alone: nanoseconds an event."""
    data = short_pickle()
    body = join([data] * PART_OF_ONE)
    handle, number = Counter().handle, int(EventId.make(1 << 63, 1))
    with tempfile.TemporaryDirectory() as folder:
        board = Board(Path(folder, "board"), create=True)
        return {
            "publisher: pickle": alone(short_pickle),
            "publisher: its id": alone(lambda: EventId(number)),
            "publisher: join": alone(lambda: join([data] * PART_OF_ONE), PART_OF_ONE),
            "router: check": alone(lambda: split(body), PART_OF_ONE),
            "router: store": alone(stored(folder, body), PART_OF_ONE),
            "subscriber: split": alone(lambda: split(body), PART_OF_ONE),
            "subscriber: unpickle": alone(lambda: pickle.loads(data)),
            "subscriber: states": alone(marked(board.map)),
            "subscriber: handler": alone(lambda: handle(PAYLOAD)),
        }


def short_pickle() -> bytes:
    """Pickle as ``Connection.publish_plain`` does."""
    return SHORT_BYTES[len(PAYLOAD)] + PAYLOAD + STOP


def stored(folder: str, body: bytes) -> Callable[[], None]:
    """Return what journals a batch and takes the one before it out, in a transaction of its own."""
    journal, rows = Journal(folder, 64 << 20), iter(range(1, 1 << 62))

    def store() -> None:
        row = next(rows)
        with journal.turn():
            journal.append("rows", row.to_bytes(8, "big"), body)
            journal.delete("rows", (row - 1).to_bytes(8, "big"))

    return store


def marked(states: mmap.mmap) -> Callable[[], None]:
    """Return what marks an event as running, then as done, in the board of its process."""
    slot, running, done = Board.base, RUNNING, DONE

    def mark() -> None:
        states[slot] = running
        states[slot] = done

    return mark


def alone(step: Callable[[], object], events: int = 1) -> float:
    """Return the least nanoseconds that a step takes for an event, the call of it taken off."""
    times = TIMES // events
    least, nothing = (min(timeit.repeat(what, number=times, repeat=5)) for what in (step, lambda: None))
    return (least - nothing) / times / events * 1e9


def roundtrip_steps(questions: int) -> dict[str, float]:
    """Return microseconds of a round trip of an idle hub: in all (median), and the CPU time of each process (mean)."""
    hub = EventHub()
    hub.subscribe(KEY, Counter, name="counter")
    with hub:
        side, pids = side_of(hub, ["counter"]), pids_by_role(hub)
        for _ in range(WARM_UP):
            side.ask()
        took, own, before = [], 0.0, cpu_of_each(pids)
        for _ in range(questions):
            time.sleep(IDLE)
            began, used = time.perf_counter(), time.process_time()
            side.ask()
            took.append(time.perf_counter() - began)
            own += time.process_time() - used
        after = cpu_of_each(pids)
    cpu = {"who asks": own, **{name: after[name] - before[name] for name in pids}}
    each = {name: seconds / questions * 1e6 for name, seconds in cpu.items()}
    return {"in all": statistics.median(took) * 1e6, **each}
