"""The way to run the events of several subscribers in one process: each one's in their order, those of different ones side by side.

Coroutines run on one loop, functions in a pool of threads. Many coroutines never wait for anything, and a task for each event would cost
more than they do: so one task runs one after the other, each in a context of its own, and once one waits another task goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextvars import Context, copy_context
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mphub.core.delivery import DONE, RUNNING
from mphub.events import Event
from mphub.procs import handlers
from mphub.procs.crew import Crew, Hands, Job, Loop, current, random_id
from mphub.procs.handlers import Runner
from mphub.procs.outputs import Outputs
from mphub.procs.parcels import Parcel, SharedParcel
from mphub.procs.shelter import shelter
from mphub.reply import Reply
from mphub.store.board import RECALLED, SLOTS
from mphub.subscriber import holder
from mphub.wire import codec, frames
from mphub.wire.frames import Crowded, Extra, Joined, Members, Unable, decoder, encode
from mphub.wire.stream import Frame, Line

if TYPE_CHECKING:
    from mphub.procs.worker import Worker

TURN: Final = 0.002
"""Seconds that coroutines which wait for nothing run before others have a turn."""
SLOW: Final = 0.05
"""Seconds that a subscriber is at one event from which what waits behind that is given back."""
_members, _crowded = decoder(Members), decoder(Crowded)


class Guest:
    """One of the subscribers that share this process."""

    __slots__ = ("behind", "joined", "named", "runner", "running", "work")

    def __init__(self, joined: Joined) -> None:
        self.joined = joined
        self.work: handlers.Work | None = None
        self.runner: Runner | None = None
        """None: it could not be set up, or is gone."""
        self.running: Share | None = None
        self.behind: deque[Share] = deque()
        """What comes after that."""
        self.named = False
        """The router has been told that it is slow."""


class Share(Job):
    """An event for one of them."""

    __slots__ = ("asks", "guest", "runner", "work")
    runner: Runner
    """What it begins with: its subscriber may be replaced meanwhile."""
    work: handlers.Work

    def __init__(self, parcel: SharedParcel, place: int, number: int, guest: Guest) -> None:
        super().__init__(parcel, place, number)
        self.guest = guest
        self.asks = False
        """It may wait for an answer."""

    @property
    def attempt(self) -> int:
        assert isinstance(self.parcel, SharedParcel)
        return self.parcel.attempt_of(self.number)


class Visit(Share):
    """A subscriber that sets up or tears down: what it publishes is of no event."""

    __slots__ = ()

    def __init__(self, guest: Guest, outputs: Outputs) -> None:
        self.guest, self.outputs = guest, outputs
        self.thread, self.is_open = threading.get_ident(), True

    @property
    def epoch(self) -> int:
        return 0


class Hosting(Crew):
    """Runs one event of each at a time."""

    coming: deque[Share]  # type: ignore[assignment]

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker, SLOTS)
        self.guests: dict[int, Guest] = {}
        self.crowds: dict[int, list[Guest]] = {}
        self.waiting: set[Guest] = set()
        """Those with something behind what they run."""
        self.left: list[tuple[Guest, Runner]] = []
        """What is to be torn down once nothing of it runs."""
        self.look_at = 0.0
        """When to look for slow ones, by the performance counter."""
        self.is_woken = False
        """A thread has said that something has ended since the last look."""
        self.pool = Pool(self)

    def _hands(self) -> Hands:
        with shelter:  # half a loop cannot be closed
            self.loop = asyncio.new_event_loop()
        self.turns = Turns(self, self.loop)
        return self.turns

    # -- who is here

    def prepare(self) -> None:
        """Take in all members that there are."""
        while not self._is_complete(self.worker.receive()):
            pass

    def finish(self) -> None:
        """Let all of them tear down."""
        for guest in self.guests.values():
            self._let_go(guest)
        self._tear_down()
        self.loop.close()

    def _is_complete(self, got: Frame) -> bool:
        if got[0] != frames.MEMBERS:
            return False
        members = _members.decode(got[1])
        self._meet(members)
        return members.all

    def _meet(self, members: Members) -> None:
        """Set up who is new, or is to be set up anew; let go of who is gone."""
        for joined in members.members:
            guest = self.guests.setdefault(joined.number, Guest(joined))  # for ever: crowds have it, and it may come again
            if not joined.patterns:
                self._let_go(guest)
            elif guest.runner is None or guest.joined.version != joined.version:
                self._set_up(guest, joined)
        self._commit_outputs()

    def _commit_outputs(self) -> None:
        """Report what was published for no event."""
        if self.worker.outputs.size:
            self._report()

    @contextlib.contextmanager
    def _visit(self, guest: Guest) -> Iterator[None]:
        """Let a subscriber publish what is of no event, while those of others go on; if it raises nothing of that counts."""
        outputs = self.worker.outputs
        before, token = holder.context, current.set(Visit(guest, outputs))
        holder.context = self
        try:
            with shelter.lifted():
                yield
            outputs.keep(0)
        finally:
            outputs.fresh.clear()
            current.reset(token)
            holder.context = before

    def _set_up(self, guest: Guest, joined: Joined) -> None:
        """Load its handler, or say why that cannot be done: the others go on."""
        self._let_go(guest)
        guest.joined = msgspec.structs.replace(joined, handler=b"")
        self.pool.most = max(self.pool.most, joined.concurrency)
        try:
            with self._visit(guest):
                work = handlers.loads(self.worker.blobs.read(joined.blob) if joined.blob else joined.handler)
                runner = handlers.load(work, joined.name)
                if runner.subscriber is not None:
                    runner.subscriber.setup()
        except Exception as error:
            unable = Unable(joined.number, codec.encode_error(error), codec.traceback_text(error))
            self.worker.send(frames.UNABLE, encode(unable))
            return
        guest.runner, guest.work = runner, work
        if guest.running is None and guest.behind:
            self._call_next(guest)

    def _let_go(self, guest: Guest) -> None:
        """Start nothing more with what it is now; what has not begun is for what comes then, or goes back."""
        if guest.runner is not None:
            self.left.append((guest, guest.runner))
        guest.runner = guest.work = None
        if guest.running is not None and self.pool.take_out(guest.running):
            guest.behind.appendleft(guest.running)
            self.waiting.add(guest)
            guest.running = None
            self.running -= 1

    def _tear_down(self) -> None:
        """Let those who have left and run nothing tear down; one that cannot concerns no other."""
        for guest, runner in [(guest, runner) for guest, runner in self.left if guest.running is None]:
            self.left.remove((guest, runner))
            if runner.subscriber is None:
                continue
            try:
                with self._visit(guest):
                    runner.subscriber.teardown()
            except Exception:
                runner.subscriber.log.exception("teardown has failed")
        self._commit_outputs()

    # -- the stream

    def _take(self, line: Line, got: Frame) -> None:
        if got[0] == frames.MEMBERS:
            self._meet(_members.decode(got[1]))
        elif got[0] == frames.CROWD:
            crowd = _crowded.decode(got[1])
            self.crowds[crowd.id] = [self.guests.setdefault(number, Guest(Joined(number, 0, "", b""))) for number in crowd.members]
            if not crowd.members:
                del self.crowds[crowd.id]
        else:
            super()._take(line, got)

    def _note(self, parcel: Parcel) -> None:
        """Let events of a parcel wait for their turn."""
        assert isinstance(parcel, SharedParcel)
        place, last = -1, None
        for offset, event, crowd, first, end in parcel.deliver.runs:
            if event != last:
                place, last = place + 1, event
            for number, guest in enumerate(self._guests_of(crowd)[first:end], parcel.deliver.number + offset):
                job = self.open[number] = Share(parcel, place, number, guest)
                self.coming.append(job)

    def _guests_of(self, crowd: int) -> list[Guest]:
        return self.crowds[crowd] if crowd >= 0 else [self.guests[~crowd]]

    # -- starting

    def _step(self) -> None:
        self.is_woken = False
        super()._step()
        with shelter:
            if self.left:
                self._tear_down()
            if self.waiting and time.perf_counter() >= self.look_at:
                self._name_slow()

    def _start(self) -> None:
        if self.coming and not self._is_to_stop:
            self.turns.begin()

    @property
    def _is_to_stop(self) -> bool:
        return self.is_stopping or bool(self.states[RECALLED])

    def next(self) -> Share | None:
        """Return the next event for a coroutine; what is for functions goes to the pool, what has to wait waits."""
        while self.coming and not self._is_to_stop:
            job = self.coming.popleft()
            guest = job.guest
            if guest.running is not None or guest.runner is None:
                guest.behind.append(job)
                self.waiting.add(guest)
            elif self._begin(job):
                return job
        return None

    def _begin(self, job: Job) -> bool:
        """Begin with an event; say whether that is left to the caller."""
        assert isinstance(job, Share)
        guest = job.guest
        assert guest.runner is not None and guest.work is not None
        guest.running, job.runner, job.work = job, guest.runner, guest.work
        self.running += 1
        job.outputs = self.spare.pop() if self.spare else Outputs(random_id(), self.worker.blobs, self.worker.address.largest)
        if not job.runner.is_async:
            self.pool.put(job)
            return False
        self.open_up(job)
        return True

    def open_up(self, job: Share) -> None:
        job.is_open, job.began = True, time.perf_counter()
        self.states[job.slot] = RUNNING

    # -- what has ended

    def is_done(self, job: Share) -> bool:
        """Settle, here and now, an event of a coroutine that has left nothing behind; say whether it is one."""
        assert job.outputs is not None
        if job.outputs.fresh or job.answer is not None or not job.wanted:
            return False
        self.states[job.slot] = DONE
        job.is_open = False
        worker = self.worker
        worker.ran += 1
        worker.seconds += time.perf_counter() - job.began
        worker.ended.append(job.number)
        del self.open[job.number]
        self.spare.append(job.outputs)
        self.running -= 1
        self._go_on_behind(job)
        return True

    def _go_on_behind(self, job: Job) -> None:
        """Let a subscriber's next event be the next of all."""
        assert isinstance(job, Share)
        guest = job.guest
        guest.running = None
        if guest.behind:
            self._call_next(guest)
        elif guest.named:
            guest.named = time.perf_counter() - job.began >= SLOW
            (self.worker.next if guest.named else self.worker.free).append(guest.joined.number)

    def _call_next(self, guest: Guest) -> None:
        self.coming.appendleft(guest.behind.popleft())
        if not guest.behind:
            self.waiting.discard(guest)

    def _name_slow(self) -> None:
        """Give back what waits behind long events: it would take the room of others'."""
        now = time.perf_counter()
        self.look_at = now + SLOW
        slow = [guest for guest in self.waiting if guest.running is not None and 0 < guest.running.began < now - SLOW]
        if slow and self.dialled is None:
            for guest in slow:
                guest.named = True
            self.worker.slow += [guest.joined.number for guest in slow]
            self._give_back()

    def _wake_at(self) -> float:
        if self.coming and not self._is_to_stop:
            return 0.0
        return min(super()._wake_at(), time.monotonic() + SLOW if self.waiting else inf)

    def _take_back(self) -> list[int]:
        """Take out what has not started; return its numbers."""
        taken: list[Share] = [*self.coming, *(job for guest in self.waiting for job in guest.behind)]
        for guest in self.waiting:
            guest.behind.clear()
        self.waiting.clear()
        self.coming.clear()
        for job in self.pool.take_back():
            job.guest.running = None
            self.running -= 1
            taken.append(job)
        return sorted(job.number for job in taken)

    # -- a handler's side

    def runner_of(self, job: Job) -> Runner:
        assert isinstance(job, Share)
        return job.runner

    def work_of(self, job: Job) -> handlers.Work:
        assert isinstance(job, Share)
        return job.work

    def current_events(self) -> list[Event]:
        return [] if isinstance(current.get(), Visit) else super().current_events()

    def request(self, key: str, payload: object, target: str | None, extra: Extra | None = None) -> Reply[object]:
        job = current.get()
        assert isinstance(job, Share)
        handlers.check_other(job.guest.joined, key, target)
        if job.is_open and job.thread != self.turns.thread:
            self.pool.make_room_for(job)
        return self.worker.ask(key, payload, target, extra)

    def event_of(self, job: Job) -> Event:
        assert isinstance(job.parcel, SharedParcel)
        return job.parcel.event_for(job.place, job.attempt, cancelled=self.worker.board.is_cancelled(job.number))


class Turns(Loop):
    """Runs coroutines, those that wait for nothing one after the other."""

    def __init__(self, host: Hosting, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.host = host
        self.turn: object = None
        """Of the task that runs one event after the other; that of another is None."""

    def start(self, job: Job) -> bool:
        raise AssertionError("it takes what it runs")

    def begin(self) -> None:
        """Let a task run what comes next."""
        if self.turn is None:
            turn = self.turn = object()
            self.run(self._run(turn))
            self.loop.call_soon(self._go_on, turn)

    def _go_on(self, turn: object) -> None:
        """Let another task have the turn if this one waits for something."""
        if self.turn is turn:
            self.turn = None
            self.begin() if self.host.coming else self.loop.stop()

    async def _run(self, turn: object) -> None:
        """Run events until one of them has waited for something, or it is others' turn."""
        host, until, task = self.host, time.perf_counter() + TURN, asyncio.current_task()
        assert task is not None
        # a coroutine that cancels the task without waiting means itself, not who comes next
        while self.turn is turn and not task.cancelling() and time.perf_counter() < until and (job := host.next()) is not None:
            job.thread = self.thread
            try:
                context = copy_context()
                await self._call(context, job)
            except BaseException as error:
                job.error = error
            if job.error is not None or not host.is_done(job):
                host.leave(job)
        if self.turn is turn:
            self.turn = None
        self.loop.stop()

    async def _call(self, context: Context, job: Share) -> None:
        coroutine = context.run(self._begin, job)
        if coroutine is None:
            return
        try:
            waits = context.run(coroutine.send, None)
        except StopIteration as end:
            result = end.value
        else:
            result = await Rest(context, coroutine, waits)
        if job.work.to is not None or job.parcel.deliver.batch.reply:
            self.host.keep(job, result)

    def _begin(self, job: Share) -> Coroutine[Any, Any, Any] | None:
        """Make the coroutine, in its own context, unless the event is not wanted."""
        current.set(job)
        payload = self.host.load(job)
        coroutine: Coroutine[Any, Any, Any] | None = job.runner.function(payload) if job.wanted else None
        return coroutine


class Rest:
    """What is left of a coroutine that waits for something: awaited, it goes on in its own context."""

    __slots__ = ("context", "coroutine", "waits")

    def __init__(self, context: Context, coroutine: Coroutine[Any, Any, Any], waits: object) -> None:
        self.context, self.coroutine, self.waits = context, coroutine, waits

    def __await__(self) -> Generator[object, object, object]:
        while True:
            step: Callable[[], object]
            try:
                step = partial(self.coroutine.send, (yield self.waits))
            except BaseException as error:
                step = partial(self.coroutine.throw, error)
            try:
                self.waits = self.context.run(step)
            except StopIteration as end:
                return end.value


class Pool:
    """Runs functions, in as many threads as one of the subscribers asks for."""

    def __init__(self, host: Hosting) -> None:
        self.host = host
        self.most = 1
        self.threads = self.asking = 0
        self.lock = threading.Lock()
        """Of these."""
        self.jobs: deque[Share] = deque()
        self.calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        """One for each job that was put there; the job may have been taken back."""

    def put(self, job: Share) -> None:
        self.jobs.append(job)
        self.calls.put(None)
        if self.threads < self.most + self.asking:  # mostly there are as many as there may be
            with self.lock:
                self._grow()

    def make_room_for(self, job: Share) -> None:
        """Take one more thread until this event has ended: what answers it may wait for one."""
        with self.lock:
            if not job.asks:
                job.asks = True
                self.asking += 1
                self._grow()

    def _grow(self) -> None:
        """Start a thread if there may be more of them, and work for it."""
        if self.threads >= self.most + self.asking or not self.jobs:
            return
        thread = threading.Thread(target=self._work, name=f"{self.host.name}-{self.threads}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the machine has no room for more
            if not self.threads:
                raise
            self.most = min(self.most, self.threads)
            return
        self.threads += 1

    def _is_left_over(self, job: Share) -> bool:
        """Note that an event has ended; say whether the thread that ran it is one too many."""
        if not job.asks:
            return False
        with self.lock:
            self.asking -= 1
            if self.threads <= self.most + self.asking:
                return False
            self.threads -= 1
            return True

    def take_out(self, job: Share) -> bool:
        """Take an event out again, if no thread has begun with it."""
        try:
            self.jobs.remove(job)
        except ValueError:
            return False
        return True

    def take_back(self) -> list[Share]:
        """Take out what no thread has begun with."""
        taken: list[Share] = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self.jobs.popleft())
        return taken

    def _work(self) -> None:
        while True:
            self.calls.get()
            try:
                job = self.jobs.popleft()
            except IndexError:
                continue
            self._handle(job)
            if self._is_left_over(job):
                return

    def _handle(self, job: Share) -> None:
        host = self.host
        job.thread = threading.get_ident()
        host.open_up(job)
        try:
            copy_context().run(self._call, job)
        except BaseException as error:
            job.error = error
        host.leave(job)
        if not host.is_woken:
            host.is_woken = True
            host.loop.call_soon_threadsafe(host.loop.stop)

    def _call(self, job: Share) -> None:
        current.set(job)
        payload = self.host.load(job)
        if job.wanted:
            self.host.keep(job, job.runner.call(payload))
