"""Deaths that a test wants: of a process by name, or of a subscriber's as it handles a certain event."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from mphub import failpoints
from mphub.core.keys import check_pattern, matches
from mphub.errors import HubError
from mphub.events import Event, Topic, str_of
from mphub.hub import EventHub
from mphub.options import check_choice, check_number
from mphub.procs import fork, handlers
from mphub.subscriber import current_event, inside
from mphub.subscribing import check_types
from mphub.testing.traces import eventually
from mphub.wire import codec

WHEN = {"worker.running": "running", "worker.returned": "returned"}
"""Steps of a subscriber's process, and what they are called here."""
PATIENCE = 5.0
"""Seconds that a process has to come, and to go."""
_PID = struct.Struct("=q")
_folders: WeakKeyDictionary[EventHub, Path] = WeakKeyDictionary()
"""Where the processes of a hub under test look for orders to die."""


# -- by name


def kill(hub: EventHub, who: object) -> list[int]:
    """SIGKILL the processes of a subscriber (by name or handler), the ``"router"`` or the ``"supervisor"``; return their pids.

    Returns when they have ended; whoever follows them starts meanwhile.
    Raises NoSubscriber, HubError: it has no process.
    """
    check_types(hub=(hub, EventHub))
    if hub._kind != "process":
        raise HubError("kill: an inline hub has no processes: use the fixture process_hub, or running(hub, engine='process')")
    hub._running("kill")
    name = str(who) if who in ("router", "supervisor") and who not in hub._subscriptions else hub.subscription(who).name
    killed: list[int] = []

    def end_all() -> bool:
        killed.extend(pid for pid in _pids_of(hub, name) if _end(pid, lambda pid: pid in _pids_of(hub, name)))
        return bool(killed)

    if not eventually(end_all, PATIENCE):
        raise HubError(f"kill: {name!r} has no process: it is {hub._state_of(name)}")
    return killed


def _pids_of(hub: EventHub, name: str) -> tuple[int, ...]:
    statistics = hub.statistics()
    return statistics.subscribers[name].pids if name in hub._subscriptions else (statistics.pids[name],)


def _end(pid: int, is_it: Callable[[int], bool]) -> bool:
    """Kill a process, if it lives and the number is still its own, and wait until it has ended; say whether it was killed."""
    with contextlib.suppress(ProcessLookupError), contextlib.ExitStack() as ends:
        end = os.pidfd_open(pid)
        ends.callback(os.close, end)
        ended = select.poll()
        ended.register(end, select.POLLIN)
        if is_it(pid) and not ended.poll(0):
            signal.pidfd_send_signal(end, signal.SIGKILL)
            ended.poll(PATIENCE * 1000)
            return True
    return False


# -- by event: the test's side


class Kills:
    """What has come of a ``kill_on``."""

    def __init__(self, order: Order, tally: Path) -> None:
        self._order, self._tally = order, tally

    @property
    def count(self) -> int:
        """How many processes have died by it."""
        return len(self._pids)

    @property
    def matched(self) -> int:
        """How many events have come to where it kills, as often as they did."""
        return self._tally.stat().st_size // _PID.size

    @property
    def _pids(self) -> list[int]:
        pids = [pid for (pid,) in _PID.iter_unpack(self._tally.read_bytes())]
        return pids[self._order.position - 1 :][: self._order.times]

    def _are_done(self) -> bool:
        """Say whether all have died; one that is about to is still there."""
        return self.count == self._order.times and all(fork.stat_fields(pid)[:1] in ([], ["Z"], ["X"]) for pid in self._pids)


@contextmanager
def kill_on(
    hub: EventHub, subscriber: object = None, *, key: str | Topic[Any] = ">",
    where: Callable[[Any], object] | Mapping[str, object] | None = None, position: int = 1, times: int = 1, when: str = "running",
    timeout: float = PATIENCE,
) -> Iterator[Kills]:  # fmt: skip
    """SIGKILL a subscriber's process as it handles a matching event; the event is delivered again, to the next process.

    subscriber: by name or handler; any but a Recorder by default. key, where: which events, as in ``subscribe``. position: the first that
    kills, counted from 1 among the matching ones, each delivery of one counted. times: how many deaths in a row. when: ``running``, before
    the handler is called, or ``returned``, when it has done all and nothing of that is committed. The end of the block waits for the last
    death, for ``timeout`` seconds.
    Raises AssertionError: it did not come. HubError: the hub does not run in processes under this kit. NoSubscriber, InvalidOption.
    """
    check_types(hub=(hub, EventHub))
    check_choice("kill_on", "when", when, tuple(WHEN.values()))
    check_number("kill_on", "position", position, 1, whole=True)
    check_number("kill_on", "times", times, 1, whole=True)
    check_number("kill_on", "timeout", timeout, 0)
    if where is not None:
        handlers.check_where(where)
    name = None if subscriber is None else hub.subscription(subscriber).name
    order = Order(name, check_pattern(str_of(key)), where, position, times, when)
    if hub not in _folders:
        raise HubError("kill_on: the hub has no processes under this kit: use the fixture process_hub, or running(hub, engine='process')")
    with _given(order, _folders[hub]) as kills:
        yield kills
        if not eventually(kills._are_done, timeout):
            raise AssertionError(f"{order}: {kills.count} of {times} deaths within {timeout:g} s; {kills.matched} matching events came")


@contextmanager
def _given(order: Order, folder: Path) -> Iterator[Kills]:
    """Let every process of a hub have an order, until the end."""
    name = os.urandom(8).hex()
    tally, written = folder / f"{name}.tally", folder / f"{name}.new"
    tally.touch()
    written.write_bytes(codec.encode(order, "where"))
    placed = written.rename(folder / f"{name}.order")
    try:
        yield Kills(order, tally)
    finally:
        placed.unlink()


@contextmanager
def armed(hub: EventHub) -> Iterator[None]:
    """Let the processes that a hub starts look for orders."""
    folder = Path(tempfile.mkdtemp(prefix="mphub-orders-"))
    hub._packed_initializer = codec.encode(Arm(str(folder), hub._initializer), "initializer")
    for subscription in hub._subscriptions.values():
        subscription._spec = msgspec.structs.replace(subscription._spec, initializer=hub._packed_initializer)
    _folders[hub] = folder
    try:
        yield
    finally:
        del _folders[hub]
        shutil.rmtree(folder)


# -- by event: the subscriber's side


@dataclass(frozen=True)
class Order:
    """Whose process is to die, at which events, how often."""

    subscriber: str | None
    pattern: str
    where: Callable[[Any], object] | Mapping[str, object] | None
    position: int
    times: int
    when: str

    def __str__(self) -> str:
        return f"kill_on({self.subscriber or 'any subscriber'}, key={self.pattern!r}, position={self.position}, when={self.when!r})"

    def is_for(self, event: Event) -> bool:
        wanted = handlers.predicate(self.where)
        return matches(self.pattern, event.key) and (wanted is None or bool(wanted(event.payload)))


@dataclass(frozen=True)
class Arm:
    """The initializer of a process that may have to die: before the one that the user has."""

    folder: str
    then: Callable[[], object] | None

    def __call__(self) -> None:
        failpoints.hit = Trap(Path(self.folder), failpoints.hit)
        if self.then is not None:
            self.then()


class Trap:
    """Looks at each event whether this process is to die of it."""

    def __init__(self, folder: Path, before: Callable[..., None]) -> None:
        self.folder, self.before = folder, before
        self.is_spared = False
        """None but an order by name is for this process."""
        self._orders: dict[str, Order] = {}

    def __call__(self, step: str, write: failpoints.Write | None = None, data: bytes | bytearray = b"") -> None:
        self.before(step, write, data)
        if step in WHEN:
            for name in os.listdir(self.folder):
                if name.endswith(".order"):
                    self._obey(name, WHEN[step])

    def _obey(self, name: str, when: str) -> None:
        order = self._read(name)
        context = inside()
        if order is None or context is None or order.when != when:
            return
        if (context.name == order.subscriber or (order.subscriber is None and not self.is_spared)) and order.is_for(current_event()):
            place = self._count(name)
            if order.position <= place < order.position + order.times:
                os.kill(os.getpid(), signal.SIGKILL)

    def _read(self, name: str) -> Order | None:
        if name not in self._orders:
            try:
                self._orders[name] = codec.loads((self.folder / name).read_bytes())
            except FileNotFoundError:
                return None  # it has just been taken back
        return self._orders[name]

    def _count(self, name: str) -> int:
        """Count a matching event, also for other processes; return which it is."""
        file = os.open((self.folder / name).with_suffix(".tally"), os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, _PID.pack(os.getpid()))
            return os.lseek(file, 0, os.SEEK_CUR) // _PID.size
        finally:
            os.close(file)


def spare() -> None:
    """Let this process die by name only."""
    if isinstance(failpoints.hit, Trap):
        failpoints.hit.is_spared = True
