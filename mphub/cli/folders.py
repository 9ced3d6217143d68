"""Commands that concern a durable hub's folder while no hub has it."""

from __future__ import annotations

import click
import msgspec

from mphub.cli.main import FAILED, Failed, as_json, commands
from mphub.cli.operating import in_json
from mphub.store import salvage as salvaging
from mphub.store import verify as verifying


@commands.command()
@in_json
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
def verify(json_: bool, folder: str) -> None:
    """Read every row of a durable hub's folder, which no hub may have; ends with 1 if it is damaged."""
    found = verifying.verify(folder)
    if json_:
        click.echo(as_json(folder=folder, rows=found.rows, problems=found.problems))
    else:
        for line in (*found.problems, f"{sum(found.rows.values()):,} rows can be read"):
            click.echo(line)
    if found.problems:
        raise Failed(FAILED)


@commands.command()
@in_json
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.argument("into", type=click.Path())
def salvage(json_: bool, folder: str, into: str) -> None:
    """Make a new folder, INTO, of what can be read of a damaged one, with which its hub goes on; the damaged one stays as it is."""
    found = salvaging.salvage(folder, into)
    if json_:
        click.echo(as_json(folder=folder, into=into, **msgspec.structs.asdict(found)))
        return
    for problem in found.problems:
        click.echo(problem)
    for name, count in found.waiting.items():
        click.echo(f"{name}: {count:,} events wait, {found.lost_events.get(name, 0):,} are lost")
    click.echo(f"{sum(found.rows.values()):,} rows are in {into}, {sum(found.lost.values()):,} are lost as far as can be told")
