"""A process's one connection to a hub: batches that form by themselves, confirms, holds, replies, reconnects."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from multiprocessing import util as mp_util
from pickle import dumps
from types import MethodType
from typing import Any, Final

import msgspec

from mphub import failpoints
from mphub.core.keys import check_key, known, matches
from mphub.errors import DrainTimeout, HubClosed, HubError, MphubError, NoSubscriber, PayloadError
from mphub.events import EventId, Topic, str_of
from mphub.reader import Dialer, Reader
from mphub.reply import Reply, failure_of
from mphub.store.blobs import Blobs
from mphub.wire import frames
from mphub.wire.codec import SCALARS, SHORT_BYTES, STOP, Parts, check_size
from mphub.wire.frames import (
    BLOB_MIN,
    MAX_EVENTS,
    MAX_KEYS_TOGETHER,
    MAX_TOGETHER,
    Batch,
    Confirm,
    Extra,
    Hold,
    RepliesTaken,
    Withdraw,
    decoder,
    encode,
    join,
)
from mphub.wire.open_batch import PLAIN, RUN_BYTES, Mode, OpenBatch, is_atomic
from mphub.wire.payloads import CODECS, Codec
from mphub.wire.stream import Line, shut

log = logging.getLogger("mphub")
FEW = 2
"""Frames that may be unconfirmed while every publish still goes out at once."""
RUSH = 32
"""Events that came while a confirm was awaited, from which it pays to let the batch fill: a third more events a second."""
LINGER = 0.0005
"""Seconds for that."""
MANY = 16
"""Frames that may be unconfirmed at all."""
MANY_TAKEN = 32
"""Replies that wait for a frame to be told with: each frame of its own costs the router a turn."""
BATCH_BYTES = 120 << 10
"""Bytes from which a batch is full: half of that costs all processes together a seventh more CPU for each event."""
LAST_FLUSH = 5.0
"""Seconds that the end of a process waits for its confirms."""
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_confirm, _hold, _reply = decoder(Confirm), decoder(Hold), decoder(frames.Reply)


class Address(msgspec.Struct, frozen=True):
    """Where a hub is: its runtime folder, the token that its peers know, and the process whose hub it is."""

    folder: str
    token: bytes
    name: str
    pid: int
    started: float
    """Seconds since the epoch, as psutil tells it: pids are used again."""
    largest: int
    """Bytes of one payload that the hub admits."""
    codec: str = "pickle"
    """How its payloads and results travel: a name in ``CODECS``."""

    @property
    def data(self) -> str:
        return f"{self.folder}/data"

    @property
    def control(self) -> str:
        return f"{self.folder}/control"


class Connection:
    """A process's stream to the router: id, sequence and order are those of the process. Thread-safe."""

    def __init__(self, address: Address) -> None:
        self.address, self.codec = address, CODECS[address.codec]
        self.publish_plain: Callable[[str | Topic[Any], object], EventId] = MethodType(_PLAIN[address.codec], self)
        self._reset()
        _connections.add(self)

    def _reset(self) -> None:
        """Begin anew: in a forked child everything here is the parent's."""
        self.id = int.from_bytes(os.urandom(8), "big")
        self._base = self.id << 40
        self._dialer = Dialer(self.address, self.id)
        self._lock = threading.RLock()  # of an owner: an interrupted wait must not release another thread's
        self._is_mine = self._lock._is_owned  # type: ignore[attr-defined]  # as Condition uses it
        self._changed = threading.Condition(self._lock)
        self._line: Line | None = None
        self._reader: Reader | None = None
        self._blobs = Blobs(f"{self.address.folder}/blobs", self.id)
        self._sequence = self._written = 0
        """The last frames that were made and that were sent."""
        self._batch = OpenBatch(self._base, 1)
        self._fillers = 0
        """Threads that wait to send it."""
        self._unconfirmed: deque[tuple[int, bytes]] = deque()
        self._refused: dict[int, MphubError] = {}
        self._awaited: set[int] = set()
        """Frames whose refusals are for those who wait for just them."""
        self._held: list[str] = []
        self._replies: dict[int, Reply[object]] = {}
        self._followed: set[int] = set()
        """Those that somebody waits for who does not read."""
        self._taken: list[int] = []
        """Replies that the router may forget; told with the next frame, or when they are many or large."""
        self._taken_bytes = 0
        self._ended: MphubError | None = None

    # -- publishing

    def publish(self, key: str, payload: object, extra: Extra | None = None, *, confirm: bool = False, epoch: int = 0) -> EventId:
        """Pickle and send one event; return its id.

        Raises PayloadError, HubClosed, and with ``confirm`` what the router refused it for.
        """
        data = self.codec.encode_apart(payload)
        with self._enter():
            number = self._add(key, data, extra, (None, False, epoch) if epoch else PLAIN, strict=confirm)
            if confirm:
                self._wait_own(self._sequence)
        return EventId(self._base + number)

    def request(self, key: str, payload: object, target: str | None, extra: Extra | None = None) -> Reply[object]:
        """Send one event whose handler's result comes back.

        ``target``: a name that has been checked. Raises PayloadError, HubClosed.
        """
        data = self.codec.encode_apart(payload)
        reply: Reply[object] = Reply()
        with self._enter():
            number = self._add(key, data, extra, (target, True, 0), reply)
        reply.id, reply._reader, reply._asked = EventId(self._base + number), self._reader, self
        return reply

    def publish_together(self, events: list[tuple[str, bytes, Extra | None]]) -> int:
        """Send events as one frame, which is journaled whole or not at all; wait for the confirm.

        Raises PayloadError: they are too many.
        """
        keys = sum(len(key) + 8 + (extra.size if extra else 0) for key, _, extra in events)
        if len(events) > MAX_TOGETHER or keys > MAX_KEYS_TOGETHER:
            raise PayloadError(
                f"a transaction of {len(events)} events with {keys} bytes of keys and headers; "
                f"at most {MAX_TOGETHER} and {MAX_KEYS_TOGETHER} go together: split it"
            )
        with self._enter():
            self._ready(PLAIN)
            self._send()
            try:
                for key, data, extra in events:
                    self._batch.append(key, data, extra)
                sequence = self._send()
            except BaseException:
                self._begin_batch(PLAIN)  # a part of them must not go with what comes next; if they are sent it is empty
                raise
            self._wait_own(sequence)
        return len(events)

    def _enter(self) -> AbstractContextManager[bool]:
        """Return the lock.

        Raises HubError: this very thread has it, and would wait for itself.
        """
        if self._is_mine():
            raise HubError(
                "this call, of a signal handler or finalizer, interrupts a publish of the same thread, which must end first: "
                "set a flag there, or let another thread publish"
            )
        return self._lock

    def _add(
        self, key: str, data: bytes | Parts, extra: Extra | None, mode: Mode, reply: Reply[object] | None = None, *, strict: bool = False
    ) -> int:  # fmt: skip
        """Put one event into the batch, and send the batch when that is due; with the lock held.

        ``strict``: at once, in a frame of its own, which is refused if nobody subscribes.
        """
        check_size(data, self.address.largest)
        self._ready(mode)
        while self._held and self._is_held(key):
            self._wait_released(key)
            self._ready(mode)  # the lock was free meanwhile: the batch may be another thread's
        if not isinstance(data, bytes) or len(data) >= BLOB_MIN:
            return self._send_alone(key, data, extra, mode, reply, strict=strict)
        if self._batch.events and (strict or (reply is not None and self._batch.key != key)):
            self._send()
        batch = self._batch
        number = batch.append(key, data, extra)
        if reply is not None:
            self._replies[number] = reply
        if strict:
            self._send(strict=True)
        elif len(self._unconfirmed) < FEW or batch.size >= BATCH_BYTES or len(batch.events) >= MAX_EVENTS:
            self._send_batch()
        elif mode is PLAIN and extra is None and not self._held and is_atomic():
            batch.limit = BATCH_BYTES
        return number

    def _send_batch(self) -> None:
        """Send the batch once not too many frames are unconfirmed."""
        self._wait_for_few()
        self._send()

    def _wait_for_few(self) -> None:
        self._fillers += 1
        try:
            while len(self._unconfirmed) >= MANY and self._ended is None:
                self._changed.wait()
        finally:
            self._fillers -= 1
        if self._ended is not None:
            raise self._ended

    def _send_alone(
        self, key: str, data: bytes | Parts, extra: Extra | None, mode: Mode, reply: Reply[object] | None, *, strict: bool
    ) -> int:  # fmt: skip
        """Send a large event by itself and return its number; it gets one when its file is written, so that an interrupt leaves nothing."""
        self._wait_for_few()
        self._ready(mode)  # the lock was free meanwhile
        self._send()
        blob, number = self._write_file(data), self._batch.first
        if reply is not None:
            self._replies[number] = reply
        self._dispatch([key, 0], 1, b"", blob, len(data), None if extra is None else {0: extra}, strict=strict)
        return number

    def _ready(self, mode: Mode) -> None:
        """Have a batch of that mode that is closed, and a stream for it; with the lock held."""
        self._batch.limit = 0
        if self._ended is not None:
            raise self._ended
        if self._reader is None:
            self._connect()
        if self._batch.mode != mode:
            self._send()
            self._begin_batch(mode)

    def _send(self, *, strict: bool = False) -> int:
        """Send the batch, if any; return the sequence number of the last frame."""
        batch = self._batch
        batch.limit = 0
        if not batch.events:
            if self._written != self._sequence:
                self._write()
            return self._sequence
        body, blob = join(batch.events), None
        size = len(body)
        if size > BATCH_BYTES * 4:
            # a file of one event is its pickle
            blob, body = self._write_file(body if len(batch.events) > 1 else batch.events[0]), b""
        return self._dispatch(batch.runs, len(batch.events), body, blob, size, batch.extras or None, strict=strict)

    def _dispatch(
        self, runs: list[Any], count: int, body: bytes, blob: str | None, size: int, extras: dict[int, Extra] | None, *,
        strict: bool,
    ) -> int:  # fmt: skip
        """Make the next frame, keep it until it is confirmed, send it; with that the batch begins anew."""
        target, reply, epoch = self._batch.mode
        sequence, first = self._sequence + 1, self._batch.first
        header = encode(
            Batch(
                self.id, sequence, first, count, runs[::2], runs[1::2], time.time(), epoch, target, reply, strict, blob, size, extras,
            )
        )  # fmt: skip
        data = frames.frame(frames.BATCH, header, body)
        following = OpenBatch(self._base, first + count, self._batch.mode)
        # no call in these lines: an interrupt comes after one, and must find the batch in one place
        self._unconfirmed += [(sequence, data)]
        self._sequence, self._batch = sequence, following
        failpoints.hit("publisher.batched")
        self._write()
        if not reply and self._reader is not None:
            self._reader.stir()  # its confirm lets the next one go
        return sequence

    def _write_file(self, data: bytes | Parts) -> str:
        try:
            return self._blobs.write(data)
        except OSError as error:
            raise PayloadError(f"a payload of {len(data)} bytes cannot be written to the hub's folder: {error}") from error

    def _begin_batch(self, mode: Mode) -> None:
        """Begin anew, behind the numbers of what is in the batch."""
        self._batch = OpenBatch(self._base, self._batch.first + len(self._batch.events), mode)

    def _write(self) -> None:
        """Send the frames that have not been sent; without a line they go out after the next connect."""
        if self._line is None:
            return
        for sequence, data in [each for each in self._unconfirmed if each[0] > self._written]:
            if self._taken:
                data = frames.frame(frames.REPLIES_TAKEN, self._all_taken()) + data
            failpoints.hit("publisher.half_sent", self._line.sock.send, data)
            try:
                self._written = sequence
                self._line.sock.sendall(data)
                failpoints.hit("publisher.sent")
            except OSError:
                shut(self._line.sock)
            except BaseException:  # an interrupt in the middle of a frame: the reader connects anew and sends it whole
                shut(self._line.sock)
                raise

    def _wait_released(self, key: str) -> None:
        """Wait while the key is held: a subscriber that it is for has a full inbox."""
        while self._ended is None and self._is_held(key):
            self._send()
            self._changed.wait()

    # -- waiting

    def flush(self, timeout: float | None = None) -> None:
        """Wait until the router has journaled everything published so far.

        Raises DrainTimeout, HubClosed, or what a frame was refused for.
        """
        with self._enter():
            if self._reader is None:
                return
            sequence = self._send()
            self._wait_confirmed(sequence, timeout)
            refused = [self._refused.pop(s) for s in list(self._refused) if s <= sequence and s not in self._awaited]
        if refused:
            raise refused[0]

    def _wait_own(self, sequence: int) -> None:
        """Wait for one frame, with the lock held; what it is refused for is told to this thread and no other."""
        self._awaited.add(sequence)
        try:
            self._wait_confirmed(sequence, None)
        finally:
            self._awaited.remove(sequence)
        if sequence in self._refused:
            raise self._refused.pop(sequence)

    def _wait_confirmed(self, sequence: int, timeout: float | None) -> None:
        """Wait, with the lock held, until a frame and all before it are confirmed."""
        done = self._changed.wait_for(lambda: self._is_confirmed(sequence) or self._ended is not None, timeout)
        if not done:
            waiting = len(self._unconfirmed)
            raise DrainTimeout(f"{waiting} frames were not confirmed within {timeout} s", pending={"unconfirmed": waiting})
        if not self._is_confirmed(sequence) and self._ended is not None:
            raise self._ended

    def wait_room(self, key: str, timeout: float) -> bool:
        """Wait until a key is not held; say whether it is so."""
        with self._enter():
            return self._changed.wait_for(lambda: self._ended is not None or not self._is_held(key), timeout)

    def _is_held(self, key: str) -> bool:
        return any(matches(pattern, key) for pattern in self._held)

    @property
    def unconfirmed(self) -> int:
        return len(self._unconfirmed) + bool(self._batch.events)

    def _is_confirmed(self, sequence: int) -> bool:
        return not self._unconfirmed or self._unconfirmed[0][0] > sequence

    def close(self, timeout: float = LAST_FLUSH) -> None:
        """Flush, and end the connection; what could not be sent is logged."""
        if self._reader is None or not self._reader.is_ours:
            return
        try:
            if self._ended is None:
                self.flush(timeout)
        except MphubError as error:
            lost = len(self._unconfirmed)
            log.error("%d batches of events could not be sent: %s", lost, error)
        self.end(HubClosed("this publisher is closed"))

    def end(self, reason: MphubError) -> None:
        """Let everything that waits end with an error."""
        with self._lock:
            self._batch.limit = 0
            lost = self.unconfirmed if self._ended is None else 0
            if self._ended is None:
                self._ended = reason
            replies, self._replies = self._replies, {}
            line = self._line
            self._changed.notify_all()
        for reply in replies.values():
            reply._settle(None, reason)
        if lost:
            log.warning("hub %r: %d frames that this process published were not accepted (%s)", self.address.name, lost, reason)
        if line is not None:
            shut(line.sock)

    # -- what the reader brings

    def _connect(self) -> None:
        """Open the stream and start its reader; with the lock held."""
        self._line = self._dialer.dial_first()
        mp_util.Finalize(self, _last_flush, args=(weakref.ref(self),), exitpriority=20)  # atexit does not run in forked children
        self._reader = Reader(self, self._dialer, self._line)

    def take(self, line: Line, kind: int, header: bytes, _: bytes) -> None:
        if kind == frames.CONFIRM:
            self._confirmed(_confirm.decode(header))
        elif kind == frames.REPLY:
            self._answered(line, _reply.decode(header))
        elif kind == frames.HOLD:
            with self._lock:
                self._held = _hold.decode(header).patterns
                self._batch.limit = 0  # each event is looked at now
                self._changed.notify_all()
        elif kind == frames.CLOSED:
            self.end(HubClosed(f"hub {self.address.name!r} was stopped"))

    def take_for(self, reply: Reply[Any], line: Line, kind: int, header: bytes, _: bytes) -> bool:
        """Take a frame in the thread that waits for a reply, if it is that or a confirm that refuses nothing; say whether it was.

        All else is for the reader's thread, which nobody interrupts: others wait for that, or have something called when it comes.
        """
        if kind == frames.CONFIRM:
            confirm = _confirm.decode(header)
            if not confirm.refused:
                self._confirmed(confirm)
            return not confirm.refused
        if kind == frames.REPLY:
            found = _reply.decode(header)
            numbers = (found.number, *found.more)
            own = reply.id.number in numbers and self._followed.isdisjoint(numbers)
            if own:
                self._answered(line, found)
            return own
        return False

    def _confirmed(self, confirm: Confirm) -> None:
        failpoints.hit("publisher.confirming")
        with self._lock:
            for sequence, kind, message in confirm.refused:
                self._refused[sequence] = refusal(kind, message)
            while self._unconfirmed and self._unconfirmed[0][0] <= confirm.sequence:
                self._unconfirmed.popleft()
            self._changed.notify_all()
            if not self._is_due():
                return
            if len(self._batch.events) < RUSH or self._batch.mode is not PLAIN:
                self._send()
                return
        time.sleep(LINGER)
        with self._lock:
            if self._is_due():
                self._send()

    def _is_due(self) -> bool:
        """Say whether it is for the reader to send the batch; a full one is sent by who filled it, if no interrupt has called that away."""
        batch = self._batch
        return bool(batch.events) and len(self._unconfirmed) < FEW and (batch.size < BATCH_BYTES or not self._fillers)

    def _answered(self, line: Line, reply: frames.Reply) -> None:
        settle(self._replies, reply, self._blobs, self.codec)
        with self._lock, contextlib.suppress(OSError):
            for number in (reply.number, *reply.more):
                self._replies.pop(number, None)  # not before it is settled: an interrupt in between lets it come again
                self._followed.discard(number)
            self._taken.append(reply.number)
            self._taken_bytes += len(reply.body)
            if reply.blob is not None or len(self._taken) >= MANY_TAKEN or self._taken_bytes >= BLOB_MIN:
                line.send(frames.REPLIES_TAKEN, self._all_taken())

    def withdraw(self, numbers: list[int], *, kill: bool) -> None:
        """Tell the router that events of this process are not wanted any more; if it dies before it has heard that, they run."""
        if self._is_mine():
            return  # an interrupt in the middle of a publish: only their results are not wanted
        with self._lock, contextlib.suppress(OSError, HubError):
            self._send()
            if self._line is not None:
                self._line.send(frames.WITHDRAW, encode(Withdraw(numbers, kill)))

    def _all_taken(self) -> bytes:
        taken, self._taken, self._taken_bytes = self._taken, [], 0
        return encode(RepliesTaken(taken))

    def lose_line(self) -> None:
        """Send nothing for now: the reader looks for another stream."""
        with self._lock:
            self._line = None

    def adopt_line(self, line: Line) -> None:
        """Go on with another stream, and send all that is unconfirmed."""
        with self._lock:
            self._line, self._written = line, 0
            self._write()

    @property
    def is_over(self) -> bool:
        return self._ended is not None

    # -- who waits for replies

    def follow(self, reply: Reply[Any]) -> None:
        """Note that somebody waits for a reply who does not read; without the lock, which a publisher may have for long."""
        number = reply.id.number
        self._followed.add(number)
        if number not in self._replies:
            self._followed.discard(number)

    @property
    def is_waited_for(self) -> bool:
        """Say whether what the stream brings is wanted though nobody waits for it by reading."""
        return bool(self._followed or self._batch.events)


def _plain_way(codec: Codec) -> Callable[[Connection, str | Topic[Any], object], EventId]:
    """Return ``Connection.publish_plain`` for a codec: only pickles of bytes and scalars are made without its function."""
    is_pickle = codec.name == "pickle"
    heads, scalars = (SHORT_BYTES, SCALARS) if is_pickle else ((), frozenset())
    shorts, encode_apart = len(heads), codec.encode_apart

    def publish_plain(self: Connection, key: str | Topic[Any], payload: object) -> EventId:
        """Do what ``publish`` does for an event with nothing special; hardly a call on the way, as this is the rate.

        Raises InvalidKey, PayloadError, HubClosed.
        """
        kind = type(payload)
        if kind is bytes and len(payload) < shorts:  # type: ignore[arg-type]
            data: bytes | Parts = heads[len(payload)] + payload + STOP  # type: ignore[arg-type, operator]
        else:
            data = dumps(payload, 5) if kind in scalars else encode_apart(payload)
        size, event = len(data), [data]
        run: list[Any] | None = None
        last = self._batch.key
        if key is not last:
            if type(key) is not str or key not in known:
                key = check_key(str_of(key))
            if key != last:
                run = [key, 0]
                size += len(key) + RUN_BYTES
        # no call from here to the return: other threads, and interrupts, come in at calls
        batch = self._batch
        total = batch.size + size
        if total < batch.limit and size < BLOB_MIN and (run is not None or key == batch.key):
            number = batch.next_id
            if number < batch.last_id:
                if run is not None:
                    run[1] = number - batch.first_id
                    batch.runs += run
                    batch.key = key
                batch.next_id = number + 1
                batch.size = total
                batch.events += event  # type: ignore[arg-type]  # parts are larger
                return EventId(number)
        with self._enter():
            return EventId(self._base + self._add(check_key(str_of(key)), data, None, PLAIN))

    return publish_plain


_PLAIN: Final = {name: _plain_way(codec) for name, codec in CODECS.items()}


def settle(futures: Mapping[int, Reply[object]], reply: frames.Reply, blobs: Blobs, codec: Codec) -> None:
    """End the requests that a frame answers."""
    if not reply.more:
        if (future := futures.get(reply.number)) is not None:
            future._settle(*outcome_of(reply, blobs, codec))
        return
    for number, body in zip((reply.number, *reply.more), frames.split(reply.body), strict=True):
        if (future := futures.get(number)) is not None:
            future._settle(*loaded(body, codec.loads))


def outcome_of(reply: frames.Reply, blobs: Blobs, codec: Codec) -> tuple[object, BaseException | None]:
    """Return the result of one request, or why there is none."""
    try:
        if reply.outcome != "ok":
            return None, failure_of(reply.outcome, reply.body)
        read = blobs.copy if codec.has_views else blobs.read  # what is kept of a map keeps the removed file's room
        return loaded(read(reply.blob) if reply.blob else reply.body, codec.load_any)
    except Exception as error:
        return None, error


def loaded(data: Any, loads: Callable[[Any], Any]) -> tuple[object, BaseException | None]:
    """Return a result, or why it cannot be loaded here: that is the answer then."""
    try:
        return loads(data), None
    except Exception as error:
        return None, error


def refusal(kind: str, message: str) -> MphubError:
    return {"NoSubscriber": NoSubscriber, "PayloadError": PayloadError}.get(kind, HubClosed)(message)


def _last_flush(reference: weakref.ref[Connection]) -> None:
    connection = reference()
    if connection is not None:
        connection.close()


def _reset_all() -> None:
    """Begin anew in a forked child, whatever the parent's threads held."""
    global _shared_lock
    _shared_lock = threading.RLock()
    for connection in list(_connections):
        line = connection._line
        if line is not None:  # only this process's copy of the descriptor: a shutdown would end the parent's stream
            with contextlib.suppress(OSError):
                socket.close(line.sock.detach())
        if connection._reader is not None:
            connection._reader.is_ours = False
        connection._reset()


os.register_at_fork(after_in_child=_reset_all)

_shared: dict[str, Connection] = {}
_shared_lock = threading.RLock()
"""One that a signal handler can have once more."""


def connection_to(address: Address) -> Connection:
    """Return the process's one connection to a hub."""
    found = _shared.get(address.folder)
    if found is not None and found._ended is None:
        return found
    with _shared_lock:
        found = _shared.get(address.folder)
        if found is None or found._ended is not None:
            found = _shared[address.folder] = Connection(address)
        return found


def drop_connection(address: Address) -> None:
    """End the process's connection to a hub that stops."""
    with _shared_lock:
        found = _shared.pop(address.folder, None)
    if found is not None:
        found.end(HubClosed(f"hub {address.name!r} was stopped"))
