"""Delivery to one subscriber process: what it holds, who is charged when it dies. Pure: values in, values out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mphub.core.credit import Credit
from mphub.core.order import Order
from mphub.core.spans import Spans, contains, indexes, length, spans_of, subtract, within
from mphub.core.window import Piece, Portion, Window, expiring
from mphub.options import MOST

WAITING, RUNNING, HANDLED, DONE, FAILED, FILTERED = range(6)
"""State bytes: not started; runs; returned, outputs not committed; returned, nothing to commit; raised, report on its way; not wanted."""

Range = tuple[int, int, int, int]
"""What was handed out together: (first delivery number, count, row, index of the first event)."""
MAX_HELD = 1000
"""Ranges that one process holds; a board remembers 1024."""


@dataclass(slots=True, eq=False)
class Held:
    """Events that a process has been given: event ``index + k`` has delivery number ``number + k``."""

    number: int
    index: int
    count: int
    portion: Portion
    spans: Spans
    alone: bool = False

    def without(self, numbers: Spans) -> Spans:
        """Return its spans without those of some delivery numbers."""
        offset = self.index - self.number
        return subtract(self.spans, [(a + offset, b + offset) for a, b in within(numbers, self.number, self.number + self.count)])


@dataclass(slots=True)
class Again:
    """An event that runs again."""

    portion: Portion
    index: int
    attempt: int
    ran: bool = False
    """It was running."""


@dataclass(slots=True)
class Verdict:
    """What became of the events that a process held."""

    finished: list[tuple[Portion, Spans]] = field(default_factory=list)
    filtered: list[tuple[Portion, Spans]] = field(default_factory=list)
    dead: list[tuple[Portion, int, int]] = field(default_factory=list)
    """(portion, index, attempts made)."""
    again: list[Again] = field(default_factory=list)
    """Events that had started and start anew, charged or not."""
    changed: list[Portion] = field(default_factory=list)
    """Portions whose attempts changed."""
    ran: bool = False
    """Something was running."""
    last: tuple[Portion, int] | None = None
    """The last event that had returned or raised, was not committed, and is not charged."""


class Delivery:
    """What one process of a subscriber holds of what waits for that."""

    def __init__(self, window: Window, max_attempts: int, credit: Credit, slots: int, at_a_time: int = 1) -> None:
        self.window = window
        self.at_a_time = at_a_time
        """Events that it runs at a time: while it holds fewer it is given more at once."""
        self.max_attempts = max_attempts
        self.credit = credit
        self.slots = slots
        self.held: deque[Held] = deque()
        self.holding = 0
        """Events in there."""
        self._filling = True
        """More is handed out until credit is used up, then nothing until half of it is free: not an event at a time."""
        self.number = 0
        """The next delivery number."""
        self.generation = 0
        """Grows when the process gives back what it holds: frames under way then are void."""

    # -- what the process holds

    def claim(self, ranges: list[Range]) -> None:
        """Move waiting events to held: a process that this router did not hand them to says that it has them."""
        self.window.gather()
        pieces: dict[int, list[Piece]] = {}
        for piece in self.window.waiting:
            pieces.setdefault(piece.portion.row.id, []).append(piece)
        for number, count, row, index in ranges:
            for piece in pieces.get(row, ()):
                rest = subtract(piece.spans, [(index, index + count)])
                spans = subtract(piece.spans, rest)
                if spans:
                    piece.spans = rest
                    self._hold(Held(number, index, count, piece.portion, spans, alone=self._runs_alone(piece.portion, spans[0][0])))
        for piece in self.window.drop_waiting():
            if piece.spans:
                self.window.put(piece, self.window.waiting.append)

    def take(self, most: int = MOST) -> Held | None:
        """Move the next events, as far as credit goes and at most so many, from waiting to held."""
        if not self.window.loaded or (room := min(self._room(), most)) <= 0:
            return None
        return self._take(self.window.waiting, room) if self.window.order is None else self._take_in_order(self.window.order, room)

    def _take(self, queue: deque[Piece], room: int, *, laned: bool = False) -> Held | None:
        piece = queue[0]
        first = piece.spans[0][0]
        alone = self._runs_alone(piece.portion, first)
        if (alone and not self._is_free()) or self._comes_later(piece):
            return None
        taken = [(first, first + 1)] if alone else self._cut(piece.portion, piece.spans, room)
        return self._hand_over(queue, taken, alone=alone, laned=laned) if taken else None

    def _take_in_order(self, order: Order, room: int) -> Held | None:
        """Take what waits for this process alone, or else the next of the keys that are free or its own."""
        lane = order.lanes.get(self)
        if lane:
            return self._take(lane, room, laned=True)
        waiting = self.window.waiting
        while waiting and not self._comes_later(waiting[0]):
            piece = waiting[0]
            chosen = order.choose(self, piece, room, is_free=self._is_free())
            if not piece.spans:
                waiting.popleft()
                continue
            alone = bool(chosen) and chosen[0][0] in piece.portion.attempts
            taken = chosen if alone else self._cut(piece.portion, chosen, room)
            return self._hand_over(waiting, taken, alone=alone) if taken else None
        return None

    def _runs_alone(self, portion: Portion, index: int) -> bool:
        return index in portion.attempts

    def _is_free(self) -> bool:
        """Say whether it may be given an event that is to run alone."""
        return not self.holding

    def _comes_later(self, piece: Piece) -> bool:
        """Say whether it is less urgent than what is not in the window yet."""
        return piece.portion.rank > 0 and self.window.tail is not None

    def _room(self) -> int:
        """Return how many events may be handed out now."""
        if self._is_closed():
            return 0
        limit = self.credit.limit
        if 2 * self.holding <= limit or self.holding < self.at_a_time:
            self._filling = True
        elif self.holding >= limit:
            self._filling = False
        return limit - self.holding if self._filling else 0

    def _is_closed(self) -> bool:
        """Say whether it is given nothing more for now."""
        return bool(self.held) and (self.held[-1].alone or len(self.held) >= MAX_HELD)

    def _stretch(self) -> int:
        """Return for how many delivery numbers from the next one on there are slots."""
        return self.slots - (self.number - self.held[0].number if self.held else 0)

    def _cut(self, portion: Portion, spans: Spans, room: int) -> Spans:
        """Take up to ``room`` events from the front, as far as there are slots, not beyond one that has to run alone."""
        if not spans:
            return []
        first = spans[0][0]
        end = first + self._stretch()
        if portion.attempts:
            end = min([end, *(i for i in portion.attempts if i > first)])
        taken: Spans = []
        for a, b in spans:
            if room <= 0 or a >= end:
                break
            taken.append((a, min(b, end, a + room)))
            room -= taken[-1][1] - a
        return taken

    def _hand_over(self, queue: deque[Piece], taken: Spans, *, alone: bool, laned: bool = False) -> Held:
        portion = queue[0].portion
        self.window.taken(queue, taken)
        index, end = taken[0][0], taken[-1][1]
        held = Held(self.number, index, end - index, portion, taken, alone)
        self.number += end - index
        self.held.append(held)
        self.holding += length(taken)
        if self.window.order is not None:
            self.window.order.hold(self, portion, taken, laned=laned)
        return held

    def _hold(self, held: Held) -> None:
        """Hold what the process has already."""
        self.held.append(held)
        self.holding += length(held.spans)
        if self.window.order is not None:
            self.window.order.hold(self, held.portion, held.spans)

    def find(self, number: int) -> tuple[Portion, int] | None:
        """Return the portion and index of a delivery number that is held."""
        for held in self.held:
            if held.number <= number < held.number + held.count:
                index = held.index + number - held.number
                return (held.portion, index) if contains(held.spans, index) else None
        return None

    # -- what came of it

    def report(
        self, upto: int, failed: dict[int, tuple[Portion, int]], *, returned: bool, ended: Spans | None = None, still: Spans | None = None
    ) -> list[tuple[Portion, Spans]]:  # fmt: skip
        """Let go of everything before delivery number ``upto``, and of the numbers that ``ended`` behind it; return what succeeded.

        With ``returned`` the process has given back the rest unstarted, but for the numbers that ``still`` run.
        """
        finished = [part for part in self._release(upto) if part[1]]
        if ended:
            finished += self._release_within(ended)
        if failed:
            finished = [(p, s) for p, spans in finished if (s := subtract(spans, failures_of(p, failed)))]
        if returned:
            self.give_back(still)
        return finished

    def _release(self, upto: int) -> Iterator[tuple[Portion, Spans]]:
        while self.held and self.held[0].number + self.held[0].count <= upto:
            held = self.held.popleft()
            self._let_go(held, held.spans)
            yield held.portion, held.spans
        if self.held and self.held[0].number < upto:
            held = self.held[0]
            cut = held.index + upto - held.number
            ran = [(a, min(b, cut)) for a, b in held.spans if a < cut]
            held.spans = subtract(held.spans, ran)
            self._let_go(held, ran)
            yield held.portion, ran
            if not held.spans:
                self.held.popleft()

    def _release_within(self, numbers: Spans) -> list[tuple[Portion, Spans]]:
        released = []
        for held in self.held:
            left = held.without(numbers)
            if left != held.spans:
                released.append((held.portion, subtract(held.spans, left)))
                self._let_go(held, released[-1][1])
                held.spans = left
        self.held = deque(held for held in self.held if held.spans)
        return released

    def _let_go(self, held: Held, spans: Spans) -> None:
        self.holding -= length(spans)
        if self.window.order is not None:
            self.window.order.release(held.portion, spans)

    def _forget(self) -> None:
        """Hold nothing any more."""
        self.held.clear()
        self.holding = 0
        self.generation += 1
        self._leave()

    def _leave(self) -> None:
        """Let what waits for this process alone wait for all again, behind what it gives back itself."""
        if self.window.order is not None:
            self.window.extend_left(self.window.order.give_back(self))

    def give_back(self, still: Spans | None = None) -> None:
        """Return held events to the front of the inbox, in order; the numbers that ``still`` run stay held."""
        before = list(self.held)
        self._forget()
        for held in reversed(before):
            goes = held.without(still) if still else held.spans
            if goes:
                self.window.put_back(Piece(held.portion, goes))
                held.spans = subtract(held.spans, goes)
        for held in before if still else ():
            if held.spans:
                self._hold(held)

    def died(self, states: Callable[[int, int], bytes], charged: Callable[[int], bool]) -> Verdict:
        """Settle what a dead process held, by its state bytes; the rest goes back to the front in order.

        ``charged(number)`` says whether a running event is blamed for the death.
        """
        verdict = Verdict()
        back: list[Piece] = []
        for held in self.held:
            self._settle(held, states(held.number, held.count), charged, verdict, back)
        self._forget()
        for piece in reversed(back):
            self.window.put_back(piece)
        suspect(verdict)
        return verdict

    def died_unseen(self, ranges: list[Range], states: Callable[[int, int], bytes], charged: Callable[[int], bool]) -> Verdict:
        """Settle what a process held by its board, oldest range first: it had not met this router, to which all of it waits.

        What is not settled stays where it is. Of an event that was handed out more than once the newest range counts.
        """
        numbers = {(row, index + i): number + i for number, count, row, index in ranges for i in range(count)}
        verdict = Verdict()
        for piece in self.window.drop_waiting():
            places = [(index, numbers.get((piece.portion.row.id, index))) for index in indexes(piece.spans)]
            seen = [(index, states(number, 1)[0] if number is not None else WAITING, number) for index, number in places]
            rest = self._judge(piece.portion, [(i, state, number is not None and charged(number)) for i, state, number in seen], verdict)
            if rest:
                self.window.put(Piece(piece.portion, rest), self.window.waiting.append)
        suspect(verdict)
        return verdict

    def _settle(self, held: Held, states: bytes, charged: Callable[[int], bool], verdict: Verdict, back: list[Piece]) -> None:
        offset = held.number - held.index
        seen = [(index, states[index - held.index]) for index in indexes(held.spans)]
        rest = self._judge(held.portion, [(i, state, charged(offset + i)) for i, state in seen], verdict)
        if rest:
            back.append(Piece(held.portion, rest))

    def _judge(self, portion: Portion, seen: list[tuple[int, int, bool]], verdict: Verdict) -> Spans:
        """Sort (index, state, charged) into the verdict; return what goes on waiting."""
        finished: list[int] = []
        filtered: list[int] = []
        rest: list[int] = []
        for index, state, charged in seen:
            verdict.ran |= state == RUNNING
            if state in (DONE, FILTERED):
                (finished if state == DONE else filtered).append(index)
                continue
            if charged and (state == RUNNING or (state != WAITING and index in portion.attempts)):
                if not self._charge(portion, index, verdict):
                    continue
            elif state != WAITING:
                if index in expiring(portion):  # it was in time, and is so for ever
                    portion.attempts.setdefault(index, 1)
                    verdict.changed.append(portion)
                verdict.again.append(Again(portion, index, portion.attempts.get(index, 1), state == RUNNING))
                verdict.last = (portion, index) if charged else verdict.last
            rest.append(index)
        if finished:
            verdict.finished.append((portion, spans_of(finished)))
        if filtered:
            verdict.filtered.append((portion, spans_of(filtered)))
        return spans_of(rest)

    def _most_attempts(self, portion: Portion, index: int) -> int:
        return self.max_attempts

    def _charge(self, portion: Portion, index: int, verdict: Verdict) -> bool:
        """Count the attempt; say whether there is another one."""
        attempt = portion.attempts.get(index, 1)
        if attempt >= self._most_attempts(portion, index):
            verdict.dead.append((portion, index, attempt))
            return False
        portion.attempts[index] = attempt + 1
        verdict.again.append(Again(portion, index, attempt + 1))
        verdict.changed.append(portion)
        return True


def suspect(verdict: Verdict) -> None:
    """Let the last uncommitted event run alone if nothing ran: committing it may be what kills, and the next death is charged to it."""
    if verdict.last is not None and not verdict.ran:
        run_alone(verdict, *verdict.last)


def run_alone(verdict: Verdict, portion: Portion, index: int) -> None:
    """Let an event run with no other, uncharged."""
    portion.attempts.setdefault(index, 1)
    verdict.changed.append(portion)


def failures_of(portion: Portion, failed: dict[int, tuple[Portion, int]]) -> Spans:
    return spans_of(sorted(index for owner, index in failed.values() if owner is portion))


def parts_within(handed_out: Range, numbers: Spans) -> Iterator[Range]:
    """Yield the parts of a range whose delivery numbers are within some spans."""
    number, count, row, index = handed_out
    for a, b in within(numbers, number, number + count):
        yield a, b - a, row, index + a - number
