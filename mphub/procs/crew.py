"""The way to run several events at a time in one process: coroutines on one loop, or functions in as many threads.

The main thread alone reads the stream, starts events in their order, and reports what has ended, each by itself.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterator
from contextvars import ContextVar
from math import inf
from typing import TYPE_CHECKING, Any, Final, Protocol

from mphub import failpoints
from mphub.core.delivery import DONE, FAILED, FILTERED, HANDLED, RUNNING, WAITING
from mphub.core.order import ordering_key
from mphub.core.spans import Spans, spans_of
from mphub.events import Event, EventId
from mphub.procs.handlers import Runner, Work
from mphub.procs.one_by_one import MANY_FAILURES, OUTPUT_BYTES, REPORT_AFTER
from mphub.procs.outputs import Outputs
from mphub.procs.parcels import Parcel
from mphub.procs.shelter import shelter
from mphub.procs.ways import Way
from mphub.reply import Reply
from mphub.store.board import RECALLED, SLOTS, Board
from mphub.subscriber import holder
from mphub.wire import frames
from mphub.wire.codec import Parts
from mphub.wire.stream import Frame, Line

if TYPE_CHECKING:
    import asyncio

    from mphub.procs.worker import Worker

DIAL_EVERY: Final = 0.01
"""Seconds between two tries to reach the next router."""


class Job:
    """An event that has been read and has not been told to have ended."""

    __slots__ = ("answer", "began", "error", "is_open", "number", "outputs", "parcel", "place", "seconds", "slot", "thread", "wanted")

    def __init__(self, parcel: Parcel, place: int, number: int) -> None:
        self.parcel, self.place, self.number = parcel, place, number
        self.slot = Board.base + self.number % SLOTS
        self.outputs: Outputs | None = None
        self.thread = 0
        self.is_open = False
        """Its handler runs: what that publishes goes with it."""
        self.wanted = True
        self.answer: bytes | Parts | None = None
        self.error: BaseException | None = None
        self.began = self.seconds = 0.0

    @property
    def epoch(self) -> int:
        return self.parcel.deliver.epoch

    @property
    def attempt(self) -> int:
        return self.parcel.attempt(self.place)

    @property
    def key(self) -> str:
        """Its ordering key."""
        return ordering_key(self.parcel.batch, self.parcel.index(self.place))


current: ContextVar[Job | None] = ContextVar("mphub_job", default=None)
"""Whose handler this is: tasks that a coroutine starts inherit it."""


class Hands(Protocol):
    """What runs handlers."""

    def start(self, job: Job) -> bool:
        """Begin with an event; say whether that can be done now."""

    def wait(self, line: Line | None, until: float) -> None:
        """Wait until something comes on the line or an event ends, at most so long on the monotonic clock."""


class Crew(Way):
    """Runs up to so many events at a time."""

    def __init__(self, worker: Worker, count: int) -> None:
        super().__init__(worker)
        self.count = count
        self.states = worker.board.map
        self.coming: deque[Job] = deque()
        """What has been read and not been started."""
        self.busy: dict[str, deque[Job]] = {}
        """Ordering keys of which an event runs -> the following ones."""
        self.open: dict[int, Job] = {}
        """By delivery number, in their order: what has been read and not been told to have ended."""
        self.running = 0
        self.ended: deque[Job] = deque()
        """What handlers have left behind."""
        self.told: deque[tuple[int, list[int]]] = deque()
        """(frame, delivery numbers) of what was told to have ended and is not known to be committed."""
        self.end = 0
        """The delivery number behind all that has been read."""
        self.size = 0
        """Bytes of outputs and replies that the next report has: thousands of events may end together."""
        self.spare: list[Outputs] = []
        self.dialled: Line | None = None
        """A line on which a welcome is awaited."""
        self.dial_at = inf
        self.is_stopping = False
        self.name, self.folder, self.clock, self.codec = worker.name, worker.folder, worker.clock, worker.codec
        self.hands = self._hands()

    def _hands(self) -> Hands:
        loop = self.worker.runner.loop
        return Threads(self) if loop is None else Tasks(self, loop.get_loop())

    def run(self) -> None:
        """Handle what comes until asked to stop and nothing runs any more."""
        holder.context = self
        try:
            self._step()
            while self.running or not self.is_stopping:
                self.hands.wait(self._line, self._wake_at())
                self._step()
        finally:
            self._collect_last()
            holder.context = self.worker
        if self.dialled is not None:
            self.dialled.close()

    def _wake_at(self) -> float:
        """Return when there is something to do though nothing comes, by the monotonic clock."""
        return min(self._report_at(), self.dial_at)

    def _step(self) -> None:
        with shelter:  # what is reported has been noted whole
            self._read()
            self._collect()
            if self.states[RECALLED] and self.dialled is None:  # else the next router has been told what this process holds
                self._give_back()
            self._start()

    # -- the stream

    @property
    def _line(self) -> Line | None:
        return self.dialled or self.worker.line

    def _read(self) -> None:
        """Take in what has come, without waiting; when the router has died, look for its successor."""
        if time.monotonic() >= self.dial_at:
            self.dialled = self.worker.dial()
            self.dial_at = inf if self.dialled is not None else time.monotonic() + DIAL_EVERY
        while (line := self._line) is not None:
            try:
                got = line.receive(0.0)
            except TimeoutError:
                return
            if got is None:
                line.close()
                self.dial_at = time.monotonic() + (DIAL_EVERY if line is self.dialled else 0.0)
                self.worker.line = self.dialled = None
            else:
                self._take(line, got)

    def _take(self, line: Line, got: Frame) -> None:
        worker = self.worker
        if got[0] == frames.STOP:
            self.is_stopping = True
        elif got[0] == frames.WELCOME:
            self.dialled = None
            worker.adopt(line, got[1])
        elif (parcel := worker.unpack(got)) is not None:
            self.end = parcel.end
            self._note(parcel)

    def _note(self, parcel: Parcel) -> None:
        """Let events of a parcel wait for their turn."""
        for place in range(len(parcel.events)):
            job = Job(parcel, place, parcel.number(place))
            self.open[job.number] = job
            self.coming.append(job)

    def claims(self) -> Iterator[tuple[int, int]]:
        self._forget_confirmed()
        numbers = [*self.open, *self.worker.ended, *(number for _, numbers in self.told for number in numbers)]
        yield from ((first, end - first) for first, end in spans_of(sorted(numbers)))

    def _forget_confirmed(self) -> None:
        while self.told and self.told[0][0] <= self.worker.confirmed:
            self.told.popleft()

    # -- starting

    def _start(self) -> None:
        """Start what there is a hand for, in its order; of an ordering key one after the other."""
        while self.coming and self.running < self.count and not self.is_stopping and not self.states[RECALLED]:
            job = self.coming.popleft()
            if self.worker.spec.ordered and job.key in self.busy:
                self.busy[job.key].append(job)
            elif not self._begin(job):
                self.coming.appendleft(job)
                self.count = self.running  # the machine has no room for more threads

    def _begin(self, job: Job) -> bool:
        """Start an event, if there is a hand for it."""
        worker = self.worker
        job.outputs = self.spare.pop() if self.spare else Outputs(random_id(), worker.blobs, worker.address.largest)
        job.is_open, job.began = True, time.perf_counter()
        self.states[job.slot] = RUNNING
        if not self.hands.start(job):
            self.states[job.slot] = WAITING
            return False
        self.running += 1
        if worker.spec.ordered:
            self.busy.setdefault(job.key, deque())
        return True

    # -- a handler's side: in its thread, or on the loop

    def runner_of(self, job: Job) -> Runner:
        return self.worker.runner

    def work_of(self, job: Job) -> Work:
        return self.worker.work

    def load(self, job: Job) -> Any:
        """Return the payload, and note whether the event is wanted."""
        payload = job.parcel.loads(job.parcel.events[job.place])
        wants = self.runner_of(job).wants
        job.wanted = wants is None or bool(wants(payload))
        return payload

    def keep(self, job: Job, result: object) -> None:
        """Pickle what a handler has returned, if somebody wants it."""
        assert job.outputs is not None
        to = self.work_of(job).to
        if to is not None and result is not None:
            job.outputs.publish(to, self.codec.encode_apart(result, "result"), None)
        if job.parcel.deliver.batch.reply:
            job.answer = self.codec.encode_apart(result, "result")

    def leave(self, job: Job) -> None:
        """Mark an event that has ended: from here on it is not repeated, unless something is still to be committed."""
        job.seconds = time.perf_counter() - job.began
        job.is_open = False
        assert job.outputs is not None
        if job.error is None:
            leaves = bool(job.outputs.fresh) or job.answer is not None
            self.states[job.slot] = FILTERED if not job.wanted else HANDLED if leaves else DONE
        elif not self.worker.is_the_end(job.error):
            self.states[job.slot] = FAILED
        self.ended.append(job)

    # -- what has ended

    def _collect(self) -> None:
        """Note what has ended, and report it once that is due.

        Raises what is to end this process.
        """
        while self.ended:
            job = self.ended.popleft()
            self.running -= 1
            if job.error is not None and self.worker.is_the_end(job.error):
                raise job.error
            if self._settle(job):
                self._give_back(with_what_comes=True)
            self._go_on_behind(job)
            if len(self.worker.failures) >= MANY_FAILURES or self.size > OUTPUT_BYTES:
                self._report()
        if time.monotonic() >= self._report_at():
            self._report()

    def _collect_last(self) -> None:
        """Report what has ended before this process does."""
        with shelter:
            while self.ended:  # to which threads that go on may still add
                job = self.ended.popleft()
                if job.error is None or not self.worker.is_the_end(job.error):
                    self._settle(job)
                if self.size > OUTPUT_BYTES:
                    self._report()
            if self.worker.ended:
                self._report()

    def _settle(self, job: Job) -> bool:
        """Note what came of an event; say whether something is to start before everything that this process holds."""
        worker, outputs = self.worker, job.outputs
        assert outputs is not None
        worker.ran += 1
        worker.seconds += job.seconds
        goes_first = False
        if not job.wanted:
            worker.filter_out(job.number)
        elif (error := job.error or self._commit(job, outputs)) is not None:
            goes_first = worker.fail(job.number, error, job.attempt, self.work_of(job), soon=True)
        else:
            worker.ended.append(job.number)
        outputs.fresh.clear()
        self.spare.append(outputs)
        del self.open[job.number]
        return goes_first

    def _commit(self, job: Job, outputs: Outputs) -> Exception | None:
        """Let outputs and reply go with the next report; return why that cannot be done."""
        worker, replies = self.worker, len(self.worker.replies)
        try:
            if job.answer is not None:
                worker.answer(job.parcel, job.place, job.answer)
            outputs.keep(job.epoch)
        except Exception as error:
            del worker.replies[replies:]
            return error
        self.size += outputs.size + (len(worker.replies[-1].body) if job.answer is not None else 0)
        worker.outputs.kept += outputs.take()
        return None

    def _go_on_behind(self, job: Job) -> None:
        """Start the next event of an ordering key; a hand has just become free."""
        if not self.worker.spec.ordered:
            return
        following = self.busy[job.key]
        if following and not self.is_stopping and not self.states[RECALLED]:
            self._begin(following.popleft())
        else:
            del self.busy[job.key]
            self.coming.extendleft(reversed(following))

    def _report_at(self) -> float:
        """Return when there is something to report: it waits a millisecond for company."""
        return self.worker.last_report + REPORT_AFTER if self.worker.ended else inf

    def _report(self) -> None:
        self._tell(next(iter(self.open), self.end))

    def _tell(self, upto: int, *, returned: bool = False, still: Spans | None = None) -> None:
        worker, numbers = self.worker, self.worker.ended
        worker.upto, self.size = upto, 0
        worker.report(returned=returned, still=still)
        self.told.append((worker.frame, numbers))
        self._forget_confirmed()

    def _give_back(self, *, with_what_comes: bool = False) -> None:
        """Return what has not started, if there is any (or what is under way may be); what runs goes on."""
        waiting = self._take_back()
        if not waiting and not with_what_comes:
            return
        for number in waiting:
            del self.open[number]
        first = min([next(iter(self.open), self.end), *waiting[:1]])
        self._tell(first, returned=True, still=spans_of(self.open))
        self.worker.generation += 1

    def _take_back(self) -> list[int]:
        """Take out what has not started; return its numbers."""
        waiting = sorted(job.number for jobs in (self.coming, *self.busy.values()) for job in jobs)
        self.coming.clear()
        for jobs in self.busy.values():
            jobs.clear()
        return waiting

    # -- what a handler may ask (Context)

    @property
    def thread(self) -> int:
        """Return the thread of the handler that this is called in, if any."""
        job = current.get()
        return job.thread if job is not None and job.is_open else 0

    @property
    def epoch(self) -> int:
        job = current.get()
        return job.epoch if job is not None else 0

    def publish(self, key: str, payload: object, extra: frames.Extra | None, *, now: bool) -> EventId:
        return self.worker.publish_with(self._outputs(), key, payload, extra, now=now)

    def publish_together(self, events: list[tuple[str, bytes, frames.Extra | None]]) -> None:
        self._outputs().publish_together(events)

    def request(self, key: str, payload: object, target: str | None, extra: frames.Extra | None = None) -> Reply[object]:
        return self.worker.request(key, payload, target, extra)

    def current_events(self) -> list[Event]:
        job = current.get()
        return [self.event_of(job)] if job is not None and job.is_open else []

    def event_of(self, job: Job) -> Event:
        return self.worker.event(job.parcel, job.place)

    def _outputs(self) -> Outputs:
        job = current.get()
        assert job is not None and job.outputs is not None
        return job.outputs


class Threads:
    """A thread for each event that runs, as many as have been needed at a time."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.threads = 0
        self.woken, self.wake = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(self.wake, False)

    def start(self, job: Job) -> bool:
        if self.crew.running == self.threads:
            # the end of the process waits for none of them
            thread = threading.Thread(target=self._work, name=f"{self.crew.name}-{self.threads}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if not self.threads:
                    raise
                return False
            self.threads += 1
        self.jobs.put(job)
        return True

    def wait(self, line: Line | None, until: float) -> None:
        poll = select.poll()
        poll.register(self.woken, select.POLLIN)
        if line is not None:
            poll.register(line.sock, select.POLLIN)
        poll.poll(None if until == inf else max(0.0, until - time.monotonic()) * 1000)
        with contextlib.suppress(BlockingIOError):
            os.read(self.woken, 4096)

    def _work(self) -> None:
        while True:
            self._handle(self.jobs.get())

    def _handle(self, job: Job) -> None:
        crew = self.crew
        job.thread = threading.get_ident()
        current.set(job)
        try:
            payload = crew.load(job)
            if job.wanted:
                crew.keep(job, crew.worker.runner.call(payload))
        except BaseException as error:
            job.error = error
        current.set(None)
        crew.leave(job)
        with contextlib.suppress(BlockingIOError):
            os.write(self.wake, b"\0")


class Loop:
    """Turns while the main thread waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = threading.get_ident()
        self.tasks: set[asyncio.Task[None]] = set()

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Let a task run a coroutine."""
        task = self.loop.create_task(coroutine)
        self.tasks.add(task)  # the loop knows it by a weak reference only
        task.add_done_callback(self.tasks.discard)

    def wait(self, line: Line | None, until: float) -> None:
        loop = self.loop
        timer = None if until == inf else loop.call_later(max(0.0, until - time.monotonic()), loop.stop)
        if line is not None:
            loop.add_reader(line.sock.fileno(), loop.stop)
        try:
            loop.run_forever()
        finally:
            if line is not None:
                loop.remove_reader(line.sock.fileno())
            if timer is not None:
                timer.cancel()


class Tasks(Loop):
    """A task for each event that runs, all on one loop."""

    def __init__(self, crew: Crew, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.crew = crew

    def start(self, job: Job) -> bool:
        self.run(self._handle(job))
        return True

    async def _handle(self, job: Job) -> None:
        crew = self.crew
        job.thread = self.thread
        current.set(job)
        try:
            payload = crew.load(job)
            if job.wanted:
                failpoints.hit("worker.running")
                result = await crew.worker.runner.function(payload)
                failpoints.hit("worker.returned")
                crew.keep(job, result)
        except BaseException as error:
            job.error = error
        crew.leave(job)
        self.loop.stop()


def random_id() -> int:
    return int.from_bytes(os.urandom(8), "big")
