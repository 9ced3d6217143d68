"""Commands that look at a hub that runs, and change it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import click

from mphub.cli.main import NOT_WELL, Commands, Failed, as_json, commands
from mphub.control import Control
from mphub.observe.statistics import HubStatistics, SubscriberStatistics
from mphub.running import find

WELL = ("RUNNING", "PAUSED", "STOPPED")
"""States of subscribers that are as they should be."""
HEADS = ("NAME", "STATE", "PIDS", "WAITING", "RUNNING", "HANDLED", "FAILED", "DEAD", "RESTARTS", "P95", "CPU", "RSS")

on_hub = click.option("--hub", envvar="MPHUB_HUB", metavar="NAME|FOLDER", help="Which hub; or the environment's MPHUB_HUB.")
in_json = click.option("--json", "json_", is_flag=True, help="One JSON object a line.")


def control_of(hub: str | None) -> Control:
    return Control(find(hub))


# -- looking


@commands.command()
@on_hub
@in_json
@click.option("--watch", is_flag=True, help="Again and again, with rates, until interrupted.")
@click.option("--every", type=click.FloatRange(min=0.05), default=2.0, show_default=True, metavar="SECONDS", help="With --watch.")
def status(hub: str | None, json_: bool, watch: bool, every: float) -> None:
    """Show a hub and its subscribers; ends with 3 if one that should run does not."""
    control = control_of(hub)
    before, since = None, time.monotonic()
    while True:
        found, now = control.statistics(), time.monotonic()
        rate = (found.accepted - before) / (now - since) if before is not None else None
        click.echo(in_one_object(control, found) if json_ else in_a_table(control, found, rate))
        if not watch:
            break
        before, since = found.accepted, now
        time.sleep(every)
    must_be_well(found)


def must_be_well(found: HubStatistics) -> None:
    if any(one.state not in WELL for one in found.subscribers.values()):
        raise Failed(NOT_WELL)


def in_one_object(control: Control, found: HubStatistics) -> str:
    address = control.address
    hub = {"name": address.name, "pid": address.pid, "folder": address.folder, "up": control.seconds_up()}
    return as_json(hub=hub, **dataclasses.asdict(found))


def in_a_table(control: Control, found: HubStatistics, rate: float | None) -> str:
    up = int(control.seconds_up())
    head = f"HUB {control.address.name}   UP {up // 3600:02}:{up // 60 % 60:02}:{up % 60:02}   PID {control.address.pid}"
    head += f"   {found.accepted:,} accepted, {found.unmatched:,} unmatched" + (f"   {rate:,.0f}/s" if rate is not None else "")
    rows = [HEADS, *((name, *row_of(one)) for name, one in found.subscribers.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([head, *lines])


def row_of(one: SubscriberStatistics) -> tuple[str, ...]:
    pids = ",".join(map(str, one.pids[:4])) + (",..." if len(one.pids) > 4 else "") or "-"
    counts = (one.waiting, one.running, one.handled, one.failed, one.dead, one.restarts)
    return one.state, pids, *(f"{count:,}" for count in counts), f"{one.p95 * 1000:.1f}ms", f"{one.cpu:.0f}%", f"{one.rss >> 20}MB"


@commands.command()
@on_hub
@in_json
@click.option("--ready", is_flag=True, help="All subscribers that should run do: else it ends with 3.")
@click.option("--timeout", type=click.FloatRange(min=0), default=5.0, show_default=True, metavar="SECONDS", help="For an answer.")
def ping(hub: str | None, json_: bool, ready: bool, timeout: float) -> None:
    """Say whether a hub answers: for health checks."""
    control = control_of(hub)
    states = {name: one["state"] for name, one in control.begin("states")(timeout).items()}
    odd = {name: state for name, state in states.items() if state not in WELL}
    if json_:
        click.echo(as_json(hub=control.address.name, ready=not odd, states=states))
    else:
        click.echo(f"{control.address.name} answers" + "".join(f"; {name} is {state}" for name, state in odd.items()))
    if ready and odd:
        raise Failed(NOT_WELL)


# -- changing


def do(what: str, past: str, hub: str | None, names: tuple[str, ...], *, json_: bool) -> None:
    """Do something to subscribers, or to none of them if one is called otherwise."""
    control = control_of(hub)
    there = control.statistics().subscribers
    for name in names:
        control.check_name(name, there)
    for name in names:
        getattr(control, what)(name)
    click.echo(as_json(**{past: names}) if json_ else f"{past}: {', '.join(names)}")


def for_each(what: str, past: str, text: str) -> None:
    """Add a command that does something to subscribers by name."""

    @commands.command(what, help=text)
    @on_hub
    @in_json
    @click.argument("names", nargs=-1, required=True, metavar="NAME...")
    def command(hub: str | None, json_: bool, names: tuple[str, ...]) -> None:
        do(what, past, hub, names, json_=json_)


for_each("start", "started", "Start subscribers that were stopped, or are FATAL.")
for_each("restart", "restarted", "End the processes of subscribers and start others; revives those that are FATAL.")
for_each("pause", "paused", "Let what runs finish, and start nothing more.")
for_each("resume", "resumed", "Go on after a pause.")


@commands.command()
@on_hub
@in_json
@click.argument("name")
@click.argument("replicas", type=click.IntRange(1, 1000))
def scale(hub: str | None, json_: bool, name: str, replicas: int) -> None:
    """Give a subscriber more processes or fewer, until its hub starts again."""
    control_of(hub).scale(name, replicas)
    click.echo(as_json(name=name, replicas=replicas) if json_ else f"{name}: {replicas} replicas")


@commands.command()
@on_hub
@in_json
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="At most; else however long it takes.")
def drain(hub: str | None, json_: bool, timeout: float | None) -> None:
    """Wait until what was accepted before is done; ends with 3 if a subscriber that is FATAL or paused has work left, 5 after --timeout."""
    control = control_of(hub)
    control.drain(timeout, progress=False)
    found = control.statistics().subscribers.values()
    handled, dead = sum(one.handled for one in found), sum(one.dead for one in found)
    click.echo(as_json(handled=handled, dead=dead) if json_ else f"drained: {handled:,} handled, {dead:,} dead")


@commands.command()
@on_hub
@in_json
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--timeout", type=click.FloatRange(min=0), default=60.0, show_default=True, metavar="SECONDS", help="For the hub, at most.")
def stop(hub: str | None, json_: bool, names: tuple[str, ...], timeout: float) -> None:
    """Stop subscribers until they are started again, what comes for them waits; without a NAME the hub.

    That is one which was run by `mphub run` or `hub.run()`: its process gets SIGTERM, and drains.
    """
    if names:
        do("stop", "stopped", hub, names, json_=json_)
        return
    control = control_of(hub)
    control.end(timeout)
    click.echo(as_json(stopped=control.address.name) if json_ else f"{control.address.name} has stopped")


# -- dead letters


@commands.group("dead", cls=Commands)
def dead() -> None:
    """List, show, redrive and purge dead letters."""


def having(control: Control, name: str | None) -> Control:
    """Refuse a name that nobody has."""
    if name is not None:
        control.check_name(name, control.statistics().subscribers)
    return control


def chosen(ids: tuple[str, ...]) -> list[int] | None:
    try:
        return [int(each, 16) for each in ids] or None
    except ValueError:
        raise click.UsageError(f"got --id {' --id '.join(ids)}; expected ids as `mphub dead list` shows them") from None


of_name = click.argument("name", required=False)
by_id = click.option("--id", "ids", multiple=True, metavar="ID", help="Only this one; may be given several times.")


@dead.command("list")
@on_hub
@in_json
@of_name
def list_(hub: str | None, json_: bool, name: str | None) -> None:
    """List dead letters, oldest first."""
    for letter in having(control_of(hub), name).dead_letters(name):
        if json_:
            click.echo(as_json(**fields_of(letter)))
        else:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.at))
            click.echo(f"{letter.id}  {at}  {letter.subscriber}  {letter.key}  {letter.reason} after {letter.attempts} attempts")


def fields_of(letter: Any) -> dict[str, Any]:
    names = ("key", "subscriber", "reason", "attempts", "exit", "pid", "at", "rss", "traceback", "stderr")
    return {"id": str(letter.id), **{name: getattr(letter, name) for name in names}}


@dead.command()
@on_hub
@in_json
@click.argument("id_", metavar="ID")
def show(hub: str | None, json_: bool, id_: str) -> None:
    """Show dead letters of one event, with payload and traceback. Loading a pickled payload runs what it says."""
    found = [letter for letter in control_of(hub).dead_letters(None) if str(letter.id) == id_]
    if not found:
        raise click.UsageError(f"got {id_!r}; expected the id of a dead letter, as `mphub dead list` shows it")
    for letter in found:
        fields = {**fields_of(letter), "payload": payload_of(letter)}
        click.echo(as_json(**fields) if json_ else "\n".join(f"{key}: {value}" for key, value in fields.items() if value is not None))


def payload_of(letter: Any) -> str:
    try:
        return repr(letter.payload)
    except Exception as error:  # its class is not to be found here
        return f"<cannot be loaded here: {type(error).__name__}: {error}>"


@dead.command()
@on_hub
@in_json
@of_name
@by_id
def redrive(hub: str | None, json_: bool, name: str | None, ids: tuple[str, ...]) -> None:
    """Let dead letters wait again, with a fresh count of attempts."""
    count = having(control_of(hub), name).redrive(name, chosen(ids))
    click.echo(as_json(redriven=count) if json_ else f"{count:,} redriven")


@dead.command()
@on_hub
@in_json
@of_name
@by_id
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(hub: str | None, json_: bool, name: str | None, ids: tuple[str, ...], yes: bool) -> None:
    """Drop dead letters for good."""
    control = having(control_of(hub), name)
    if not yes:
        click.confirm(f"Drop the dead letters of {name or 'all subscribers'} of {control.address.name}?", abort=True, err=True)
    count = control.purge(name, chosen(ids))
    click.echo(as_json(purged=count) if json_ else f"{count:,} purged")
