"""Commands that publish to a hub that runs, and listen to it."""

from __future__ import annotations

import datetime
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import IO

import click
import msgspec

from mphub.cli.main import as_json, commands
from mphub.cli.operating import control_of, in_json, on_hub
from mphub.core.keys import check_key
from mphub.errors import HubError
from mphub.events import Event
from mphub.past import span_of
from mphub.publisher import Publisher
from mphub.running import find
from mphub.subscribing import patterns_of
from mphub.tap import Tap, tap_on


@commands.command()
@on_hub
@in_json
@click.argument("key")
@click.argument("data", required=False)
@click.option("--file", "file", type=click.File("r"), help="Publish each line of a file; - is standard input.")
@click.option("--ordering-key", help="Of all these events.")
def pub(hub: str | None, json_: bool, key: str, data: str | None, file: IO[str] | None, ordering_key: str | None) -> None:
    """Publish DATA, or each line of a file or of standard input, under KEY, and wait until it is accepted.

    What is JSON is published as what it says: 17 is a number, "17" (with the quotes) and abc are text. Ends with 2 if DATA is for nobody.
    """
    check_key(key)
    if data is not None and file is not None:
        raise click.UsageError("got DATA and --file; expected one of them")
    address = find(hub)
    publisher, read = Publisher(address), str.encode if address.codec == "raw" else payload_of
    if data is not None:
        publisher.publish(key, read(data), ordering_key=ordering_key, confirm=True)
        count = 1
    else:
        count = publish_all(publisher, key, map(read, texts_of(file or sys.stdin)), ordering_key)
    click.echo(as_json(published=count) if json_ else f"{count:,} published")


def texts_of(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines that are not empty."""
    return filter(None, (line.rstrip("\r\n") for line in lines))


def publish_all(publisher: Publisher, key: str, payloads: Iterable[object], ordering_key: str | None) -> int:
    count = 0
    for payload in payloads:
        publisher.publish(key, payload, ordering_key=ordering_key)
        count += 1
    publisher.flush()
    return count


def payload_of(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


@commands.command()
@on_hub
@in_json
@click.argument("patterns", nargs=-1, required=True, metavar="PATTERN...")
@click.option("--count", type=click.IntRange(min=1), help="End after so many.")
@click.option("--maxsize", type=click.IntRange(min=1), default=10_000, show_default=True, help="Events that may wait for the terminal.")
def sub(hub: str | None, json_: bool, patterns: tuple[str, ...], count: int | None, maxsize: int) -> None:
    """Show events as they are accepted, until interrupted; loses what it cannot show in time, and says how much.

    Loading a pickled payload runs what it says.
    """
    tap, _ = tap_on(find(hub), patterns_of(list(patterns)), maxsize)
    try:
        for event in itertools.islice(events_of(tap), count):
            fields = {"id": str(event.id), "key": event.key, "payload": event.payload}
            click.echo(as_json(**fields) if json_ else f"{clock_of(event.published_at)}  {event.key}  {event.payload!r}")
    finally:
        if tap.dropped:
            click.echo(f"mphub: {tap.dropped:,} events could not be shown in time", err=True)
        tap.close()


def events_of(tap: Tap) -> Iterator[Event]:
    """Yield events; of one that cannot be loaded here only say so.

    Raises HubClosed at the end.
    """
    while True:
        try:
            yield tap.get()
        except HubError:
            raise
        except Exception as error:
            click.echo(f"mphub: an event cannot be loaded here: {type(error).__name__}: {error}", err=True)


def clock_of(at: float) -> str:
    return datetime.datetime.fromtimestamp(at).isoformat(sep=" ", timespec="milliseconds")


@commands.command()
@on_hub
@in_json
@click.argument("patterns", nargs=-1, metavar="[PATTERN...]")
@click.option("--since", metavar="TIME", help="As 2026-11-25T12:00, or seconds since the epoch.")
@click.option("--until", metavar="TIME")
@click.option("--limit", type=click.IntRange(min=0), help="At most so many.")
def history(hub: str | None, json_: bool, patterns: tuple[str, ...], since: str | None, until: str | None, limit: int | None) -> None:
    """Show what a durable hub has kept, oldest first, and what became of each event for each subscriber."""
    times = span_of(moment_of(since, "--since"), moment_of(until, "--until"))
    for row in itertools.islice(control_of(hub).history(patterns_of(list(patterns) or ">"), *times), limit):
        outcomes = {name: outcome.state for name, outcome in row.outcomes.items()}
        if json_:
            click.echo(as_json(id=str(row.id), key=row.key, accepted_at=row.accepted_at, outcomes=outcomes))
        else:
            words = ", ".join(f"{name} {state}" for name, state in outcomes.items()) or "nobody"
            click.echo(f"{row.id}  {clock_of(row.accepted_at)}  {row.key}  {words}")


def moment_of(text: str | None, option: str) -> float | datetime.datetime | None:
    if text is None:
        return None
    try:
        return float(text) if text.replace(".", "", 1).isdigit() else datetime.datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise click.UsageError(f"got {option} {text!r}; expected a time as 2026-11-25T12:00, or seconds since the epoch") from None
