"""A hub under test: whatever is subscribed to it runs for the length of a ``with`` block, on the engine that the test chooses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mphub.core.window import Portion
from mphub.engine import InlineEngine, ProcessEngine
from mphub.errors import HubError, InvalidOption
from mphub.hub import EventHub
from mphub.options import check_choice
from mphub.subscribing import check_types
from mphub.testing.clock import Clock
from mphub.testing.faults import armed
from mphub.testing.traces import Traces

ENGINES = ("inline", "process")
DRAINED_WITHIN = 10.0
"""Seconds for what a test leaves to its hub's processes."""
SWAPPED = ("_kind", "_propagate", "_clock", "_check", "_stands_in", "_packed_initializer")
"""What differs of a hub while it is tested."""


@contextmanager
def running(
    hub: EventHub, engine: str = "inline", *, clock: Clock | None = None, check: bool | None = None, start: bool = True
) -> Iterator[EventHub]:  # fmt: skip
    """Run a hub that was not running, stop it, and leave it as it was, with the subscriptions that it had.

    engine: ``inline`` (in this thread; what a handler raises, ``publish`` raises) or ``process``, whatever the hub itself has. clock: of
    the inline engine; nothing sleeps, and without one of the test's own only ``drain`` and ``request`` move it. check: whether dead
    letters that are left at the end raise DeadLettersLeft; as the hub has it by default. start: False if the program under test starts
    and stops the hub.

    With processes the end drains, for at most 10 seconds, and raises AssertionError if a process, the runtime folder or a descriptor of the
    hub is left two seconds later; inline, if an event has failed and waits for another try. An exception that leaves the block stops the
    hub at once, and nothing is checked.
    Raises HubError (it runs already), StartFailed, DrainTimeout, InvalidOption.
    """
    check_types(hub=(hub, EventHub), clock=(clock, Clock | None), check=(check, bool | None), start=(start, bool))
    check_choice("running", "engine", engine, ENGINES)
    if clock is not None and engine != "inline":
        raise InvalidOption(f"running(clock): got {clock} with engine={engine!r}; only the inline engine goes by it")
    hub._must_own("running")
    if hub._engine is not None:
        raise HubError(f"hub {hub.name!r} is running already: a test starts it by running() alone, or passes start=False before it starts")
    with ExitStack() as swaps:
        swaps.enter_context(_restored(hub))
        hub._final = None
        if check is not None:
            hub._check = check
        swaps.enter_context(_inline(hub, clock or Clock()) if engine == "inline" else _in_processes(hub))
        if start:
            hub.start()
        try:
            yield hub
        except BaseException:
            hub.stop(drain=False)
            raise
        _stop(hub)
        if hub._check and hub._final is not None:
            hub._raise_dead_letters()


@contextmanager
def _restored(hub: EventHub) -> Iterator[None]:
    """Undo, at the end, what a test changes of a hub: it may be the one of a module, which the next test has too."""
    kept = {name: getattr(hub, name) for name in SWAPPED}
    specs = {subscription: subscription._spec for subscription in hub._subscriptions.values()}
    callbacks = list(hub._console.callbacks)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(hub, name, value)
        hub._subscriptions.clear()
        for subscription, spec in specs.items():
            subscription._spec = spec
            hub._subscriptions[spec.name] = subscription
        hub._console.callbacks[:] = callbacks


@contextmanager
def _inline(hub: EventHub, clock: Clock) -> Iterator[None]:
    """Let a hub have the inline engine, in place of its own, and go by a clock."""

    def work_off() -> None:
        if isinstance(hub._engine, InlineEngine):
            hub._engine.work_off()

    if hub._kind != "inline":
        hub._kind, hub._propagate = "inline", True
    hub._stands_in, hub._clock = True, clock
    with clock._drives(work_off):
        yield


@contextmanager
def _in_processes(hub: EventHub) -> Iterator[None]:
    """Let a hub have processes, which can be killed."""
    hub._kind, hub._propagate = "process", False
    with armed(hub):
        yield


def _stop(hub: EventHub) -> None:
    """Stop a hub, unless the test has done so; inline, what is to start later is given up, as nothing else waits."""
    if hub._kind == "inline":
        failing = list(_failing(hub)) if hub._check else []
        hub.stop(drain=False)
        if failing:
            raise AssertionError("\n".join(failing))
        return
    traces = Traces(hub._address.folder)
    if isinstance(hub._engine, ProcessEngine):
        traces.note(hub._engine.client.process.pid)
    hub.stop(timeout=DRAINED_WITHIN)
    traces.check()


def _failing(hub: EventHub) -> Iterator[str]:
    """Yield what has failed and waits for another try: nobody has been told."""
    if not isinstance(hub._engine, InlineEngine):
        return
    exchange, posts = hub._engine.inline.exchange, hub._engine.inline.posts
    for post in posts.values():
        found: list[Portion] = []
        for _, number, _ in post.box.delayed if post.work.on else ():  # else it is by a RetryLater, which is no failure
            exchange.load_single(post.box, number, found.append)
        for portion in found:
            if (attempt := portion.attempts.get(0, 1)) > 1:
                event = f"{post.box.name}: an event of key {portion.row.batch.key(0)!r} has failed and waits for attempt {attempt}"
                yield f"{event} as the test ends: advance the clock or drain until it is handled or dead"
