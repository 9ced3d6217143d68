"""What a hub runs on: its own processes, threads of this one, or the caller's thread. All answer the same questions."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from mphub.asking import KEPT_PAYLOADS, Asking, check_ids, drained, letter_of, packed, progress_of, statistics_of, stuck_error
from mphub.clock import Clock
from mphub.connection import Address, connection_to, drop_connection
from mphub.errors import RemoteTraceback, load_error
from mphub.events import DeadLetter, EventId, HistoryRow, Topic
from mphub.observe.console import Console
from mphub.observe.progress import Watcher, watching
from mphub.observe.statistics import HubStatistics, percentiles
from mphub.options import Stop
from mphub.procs import boot
from mphub.procs.client import Client
from mphub.procs.inline import Inline
from mphub.procs.local import Local
from mphub.procs.threads import Threads
from mphub.reply import Reply
from mphub.store.blobs import Blobs
from mphub.store.journal import Dead
from mphub.subscribing import share_cores
from mphub.tap import Basin, Pipe, Tap, tap_on
from mphub.wire.frames import Extra, decoder
from mphub.wire.payloads import CODECS
from mphub.wire.specs import Spec

T = TypeVar("T")
SETTLED_WITHIN = 30.0
"""Seconds, beyond the stop ladder's, after which a stop does without the final figures."""
TOLD_WITHIN = 1.0
"""Seconds that a drain or stop waits for output to be written."""
_dead = decoder(Dead)


class Engine(Protocol):
    """What the hub object asks."""

    publish_plain: Callable[[str | Topic[Any], object], EventId] | None

    def subscribe(self, specs: Sequence[Spec]) -> None: ...
    def replace(self, spec: Spec) -> None: ...
    def unsubscribe(self, name: str, *, drain: bool, forget: bool) -> None: ...
    def forget(self, name: str) -> None: ...
    def restart(self, name: str) -> None: ...
    def pause(self, name: str) -> None: ...
    def resume(self, name: str) -> None: ...
    def scale(self, name: str, replicas: int) -> None: ...
    def set_keys(self, name: str, patterns: list[str]) -> None: ...
    def state_of(self, name: str) -> tuple[str, bytes, str]: ...
    def wait_ready(self, name: str, timeout: float | None) -> tuple[str, bytes, str]: ...
    def error_of(self, error: bytes, trace: str) -> BaseException | None: ...
    def publish(self, key: str, payload: object, extra: Extra | None, confirm: bool) -> EventId: ...
    def publish_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None: ...
    def request(self, key: str, payload: object, target: str, extra: Extra | None) -> Reply[Any]: ...
    def cancel(self, event_id: int) -> int: ...
    def listen(self, patterns: list[str], maxsize: int) -> Tap: ...
    def drain(self, timeout: float | None, progress: Watcher) -> None: ...
    def statistics(self) -> HubStatistics: ...
    def dead_letters(self, name: str | None) -> list[DeadLetter]: ...
    def redrive(self, name: str | None, ids: Collection[int] | None) -> int: ...
    def purge(self, name: str | None, ids: Collection[int] | None) -> int: ...
    def history(self, patterns: list[str], since: float, until: float) -> Iterator[HistoryRow]: ...
    def replay(self, name: str, patterns: list[str], since: float, until: float) -> int: ...
    def check(self) -> None: ...
    def stop_subscribers(self) -> int: ...
    def close(self) -> None: ...


class ProcessEngine(Asking):
    """The hub's own processes."""

    def __init__(self, charter: boot.Charter, durable: Path | None, stop: Stop, console: Console) -> None:
        address = charter.address
        self.address, self.stop, self.codec, self.keeps = address, stop, CODECS[address.codec], charter.keep
        self.console = console
        self.client = Client(charter, durable, console.hear)
        self.connection = connection_to(address)
        self.publish_plain: Callable[[str | Topic[Any], object], EventId] | None = self.connection.publish_plain
        self.blobs = Blobs(f"{address.folder}/blobs", int.from_bytes(address.token[:8], "big"))
        self.pipes: weakref.WeakSet[Pipe] = weakref.WeakSet()
        self._replicas: dict[str, int] = {}
        """How many processes each subscriber has."""
        self._hosts: dict[str, str] = {}
        """The processes that some share."""

    def subscribe(self, specs: Sequence[Spec]) -> None:
        self.connection.flush()  # what was published before is not for them
        for spec in specs:
            self.client.states.pop(spec.name, None)  # of one that had this name before
        self._replicas |= {spec.name: spec.replicas for spec in specs if spec.process is None}
        self._hosts |= {spec.name: spec.process for spec in specs if spec.process is not None}
        packed = [(spec, self._packed(spec)) for spec in specs]
        # all before the first answer, on which a process starts: what its setup publishes is for the others too
        answers = [self.client.ask("host", spec=data) for spec, data in packed if spec.hosts]
        answers += [self.client.ask("join", spec=data) for spec, data in packed if spec.process is not None]
        answers += [self.client.ask("subscribe", spec=data) for spec, data in packed if spec.process is None]
        for answer in answers:
            self.client.wait(answer)

    def replace(self, spec: Spec) -> None:
        self.connection.flush()  # what was published before may go by other keys
        if spec.process is not None:
            self.client.call("join", spec=self._packed(spec))
            return
        self._replicas[spec.name] = spec.replicas
        self.client.call("replace", spec=self._packed(spec))

    def _packed(self, spec: Spec) -> bytes:
        if spec.process is None:
            spec = share_cores(spec, sum(self._replicas.values()))
        data, blob = self.blobs.spill(spec.handler)
        return msgspec.msgpack.encode(msgspec.structs.replace(spec, handler=data, handler_blob=blob))

    def unsubscribe(self, name: str, *, drain: bool, forget: bool) -> None:
        self.connection.flush()
        if self.keeps and not forget:  # what waits stays, and so need not be waited for
            self.client.call("unsubscribe", name=name, keep=True)
            self._replicas.pop(name, None)
            return
        self.client.call("stop_routing", name=name)
        while drain and self.state_of(name)[0] not in ("FATAL", "STOPPED", "PAUSED") and self._left(name):
            time.sleep(0.01)
        if name in self._hosts:
            self.client.call("leave", name=name)
        else:
            self.client.call("unsubscribe", name=name, keep=False)
        self._replicas.pop(name, None)
        self._hosts.pop(name, None)

    def forget(self, name: str) -> None:
        self.client.call("stop_routing", name=name)
        self.client.call("forget", name=name, reason="forgotten")

    def _left(self, name: str) -> int:
        found = self.statistics().subscribers[name]
        return found.waiting + found.running

    def begin(self, op: str, **args: object) -> Callable[[float | None], Any]:
        return partial(self.client.wait, self.client.ask(op, **args))

    def place_of(self, name: str) -> tuple[str | None, str]:
        return self._hosts.get(name), self._own_state(name)

    def _own_state(self, name: str) -> str:
        """Return the state of one that shares a process, if it is another than that has."""
        return self.client.states.get(name, ("",))[0]

    def scale(self, name: str, replicas: int) -> None:
        super().scale(name, replicas)
        self._replicas[name] = replicas

    def set_keys(self, name: str, patterns: list[str]) -> None:
        self.connection.flush()  # what was published before goes by the old keys
        self.client.call("rekey" if name in self._hosts else "set_keys", name=name, patterns=patterns)

    def state_of(self, name: str) -> tuple[str, bytes, str]:
        return self.client.states.get(name if self._own_state(name) else self._hosts.get(name, name), ("STARTING", b"", ""))

    def wait_ready(self, name: str, timeout: float | None) -> tuple[str, bytes, str]:
        self.client.wait_for_state(self._hosts.get(name, name), lambda state: state in ("RUNNING", "FATAL", "STOPPED"), timeout)
        return self.state_of(name)

    def error_of(self, error: bytes, trace: str) -> BaseException | None:
        return load_error(error, trace) if error else RemoteTraceback(trace) if trace else None

    def publish(self, key: str, payload: object, extra: Extra | None, confirm: bool) -> EventId:
        return self.connection.publish(key, payload, extra, confirm=confirm)

    def publish_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        self.connection.publish_together(events)

    def request(self, key: str, payload: object, target: str, extra: Extra | None) -> Reply[Any]:
        return self.connection.request(key, payload, target, extra)

    def cancel(self, event_id: int) -> int:
        self.connection.flush()
        return int(self.client.call("cancel", ids=packed([event_id])))

    def listen(self, patterns: list[str], maxsize: int) -> Tap:
        tap, pipe = tap_on(self.address, patterns, maxsize)
        self.pipes.add(pipe)
        return tap

    def drain(self, timeout: float | None, progress: Watcher) -> None:
        try:
            super().drain(timeout, progress)
        finally:
            self.console.flush(TOLD_WITHIN)  # what handlers printed until now

    def check(self) -> None:
        """Raise HubFailed or HubClosed if the hub's processes are over."""
        self.client.check()

    def stop_subscribers(self) -> int:
        """End the subscribers; return how many events are given up."""
        with contextlib.suppress(Exception):  # what cannot be flushed any more is in the log
            self.connection.flush(self.stop.ask)
        return int(self.client.call("stop_subscribers", self.stop.ask + self.stop.term + SETTLED_WITHIN))

    def close(self) -> None:
        self.client.close()
        for pipe in list(self.pipes):
            pipe.leave()
        drop_connection(self.address)
        self.console.close(TOLD_WITHIN)


class LocalEngine:
    """A hub in one process: its books, as its user sees them."""

    publish_plain: Callable[[str | Topic[Any], object], EventId] | None = None

    def __init__(self, local: Local) -> None:
        self.local = local

    def subscribe(self, specs: Sequence[Spec]) -> None:
        self.local.subscribe(specs)

    def replace(self, spec: Spec) -> None:
        self.local.replace(spec)

    def unsubscribe(self, name: str, *, drain: bool, forget: bool) -> None:
        self.local.unsubscribe(name, drain=drain)

    def forget(self, name: str) -> None:
        """Nobody is absent here: a name that is not subscribed has nothing that waits."""

    def restart(self, name: str) -> None:
        self.local.restart(name)

    def pause(self, name: str) -> None:
        self.local.pause(name)

    def resume(self, name: str) -> None:
        self.local.resume(name)

    def scale(self, name: str, replicas: int) -> None:
        self.local.scale(name, replicas)

    def set_keys(self, name: str, patterns: list[str]) -> None:
        self.local.set_keys(name, patterns)

    def state_of(self, name: str) -> tuple[str, bytes, str]:
        return self.local.state_of(name)

    def error_of(self, error: bytes, trace: str) -> BaseException | None:
        return load_error(error, trace) if error else None

    def publish(self, key: str, payload: object, extra: Extra | None, confirm: bool) -> EventId:
        return self.local.send(key, self.local.codec.encode(payload), extra, strict=confirm)

    def publish_together(self, events: list[tuple[str, bytes, Extra | None]]) -> None:
        self.local.send_together(events)

    def request(self, key: str, payload: object, target: str, extra: Extra | None) -> Reply[Any]:
        return self.local.request(key, payload, target, extra)

    def cancel(self, event_id: int) -> int:
        check_ids([event_id])
        return self.local.cancel([event_id])

    def listen(self, patterns: list[str], maxsize: int) -> Tap:
        basin = Basin(maxsize, self.local.codec.load_any)
        self.local.listen(patterns, basin)
        return Tap(patterns, basin, basin.close)

    def statistics(self) -> HubStatistics:
        return self.local.look(self._statistics)

    def _statistics(self) -> HubStatistics:
        exchange = self.local.exchange
        subscribers = {}
        for name, box in exchange.boxes.items():
            figures = {"unfinished": box.unfinished, "percentiles": percentiles(list(box.samples)), **self.local.figures_of(name)}
            subscribers[name] = statistics_of({**box.counters.public(), **figures})
        return HubStatistics(exchange.accepted, sum(exchange.unmatched.values()), {}, subscribers)

    def dead_letters(self, name: str | None) -> list[DeadLetter]:
        letters, blobs = self.local.exchange.letters, self.local.exchange.blobs
        page, _ = self.local.look(lambda: letters.page(name, 0, limit=1 << 62))
        return [letter_of(_dead.decode(data), blobs, KEPT_PAYLOADS, self.local.codec) for data in page]

    def redrive(self, name: str | None, ids: Collection[int] | None) -> int:
        check_ids(ids)
        return self.local.do(lambda: self.local.exchange.letters.redrive(name, None if ids is None else set(ids)))

    def purge(self, name: str | None, ids: Collection[int] | None) -> int:
        check_ids(ids)
        return self.local.look(lambda: self.local.exchange.letters.purge(name, None if ids is None else set(ids)))

    def history(self, patterns: list[str], since: float, until: float) -> Iterator[HistoryRow]:
        return iter(())  # which a hub in memory has none of

    def replay(self, name: str, patterns: list[str], since: float, until: float) -> int:
        return 0

    def stop_subscribers(self) -> int:
        return self.local.stop()

    def close(self) -> None:
        self.local.end_taps()
        self.local.exchange.journal.close()


class ThreadEngine(LocalEngine):
    """Threads of the hub's process."""

    def __init__(self, address: Address, max_bytes: int, stop: Stop, console: Console) -> None:
        self.console = console
        self.threads = Threads(address, max_bytes, CODECS[address.codec], stop.ask, lambda **notice: console.hear("notice", notice))
        super().__init__(self.threads)

    def wait_ready(self, name: str, timeout: float | None) -> tuple[str, bytes, str]:
        return self.threads.wait_ready(name, timeout)

    def drain(self, timeout: float | None, progress: Watcher) -> None:
        began = time.monotonic()
        with self.threads.draining() as wait:
            stuck = drained(wait, began, timeout, progress, self.statistics)
        self.console.flush(TOLD_WITHIN)  # what there is to tell of it
        for name, status in stuck.items():
            raise stuck_error(name, status)

    def check(self) -> None:
        """Raise HubFailed or HubClosed if the hub's own thread is over."""
        self.threads.clerk.check()

    def close(self) -> None:
        self.threads.close()
        super().close()
        self.console.close(TOLD_WITHIN)


class InlineEngine(LocalEngine):
    """The caller's thread."""

    def __init__(self, address: Address, max_bytes: int, console: Console, clock: Clock, *, propagate: bool) -> None:
        self.inline = Inline(address.folder, max_bytes, console.notice, CODECS[address.codec], clock, propagate=propagate)
        super().__init__(self.inline)

    def wait_ready(self, name: str, timeout: float | None) -> tuple[str, bytes, str]:
        return self.state_of(name)

    def publish_batch(self, publish: Callable[[T], object], payloads: Iterable[T]) -> int:
        """Publish payloads; as many are taken in before any of them is handled as the largest batch of a subscriber has events."""
        count, rest = 0, iter(payloads)
        while chunk := list(islice(rest, self.inline.largest_batch)):
            with self.inline.gathering():
                for payload in chunk:
                    publish(payload)
            count += len(chunk)
        return count

    def work_off(self) -> None:
        """Handle what is due by now."""
        self.inline.work_off()

    def drain(self, timeout: float | None, progress: Watcher) -> None:
        with watching(progress) as tell:
            began = time.monotonic()
            self.inline.work_off(patient=True)
            if tell is not None:
                tell(progress_of(self.statistics(), began))
        for name, box in self.inline.exchange.boxes.items():
            if box.unfinished:
                raise stuck_error(name, box.status)

    def check(self) -> None:
        """Nothing can be over but the caller."""
