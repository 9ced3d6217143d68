"""The commands, what they have in common, and what they end with."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from mphub import __version__
from mphub.core.keys import nearest
from mphub.errors import DrainTimeout, HubClosed, MphubError, SubscriberFatal, SubscriberPaused, UsageError

FAILED, USAGE, NOT_WELL, UNREACHABLE, LATE, INTERRUPTED = 1, 2, 3, 4, 5, 130
CODES = """\b
Exit codes:
  0    done
  1    it failed
  2    the command line, a program or an option is wrong
  3    the hub runs, and something that should run does not
  4    there is no such hub
  5    it took too long
  130  interrupted

Data goes to stdout, all else to stderr. --hub is the name or folder of a hub; without it, it is the only one of this user.
"""


class Commands(click.Group):
    """Commands; a typo is told from what is meant."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        near = nearest(args[0], self.list_commands(ctx)) if args and self.get_command(ctx, args[0]) is None else None
        if near:
            raise click.UsageError(f"No such command {args[0]!r}; did you mean {near!r}?", ctx)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # as they are added


@click.group(cls=Commands, epilog=CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def commands() -> None:
    """Run hubs, and look at, change, feed and stop those that run."""


class Failed(Exception):
    """A command has said what there is to say."""

    def __init__(self, code: int) -> None:
        self.code = code


def main() -> int:
    """Run one command; return the exit code."""
    try:
        commands.main(prog_name="mphub", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Failed as error:
        return error.code
    except BrokenPipeError:  # nobody reads on
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what is left is written at the end
        return 0
    except (MphubError, TimeoutError) as error:
        click.echo(f"mphub: {error}", err=True)
        return code_of(error)
    return 0


def code_of(error: Exception) -> int:
    """Return the exit code that says what kind of error it was."""
    kinds: list[tuple[tuple[type[Exception], ...], int]] = [
        ((DrainTimeout, TimeoutError), LATE),
        ((SubscriberFatal, SubscriberPaused), NOT_WELL),
        ((HubClosed,), UNREACHABLE),
        ((UsageError,), USAGE),
    ]
    return next((code for errors, code in kinds if isinstance(error, errors)), FAILED)


def as_json(**fields: Any) -> str:
    """Return what a program reads: one object in a line, with the version of its fields."""
    import msgspec

    return msgspec.json.encode({"schema": 1, **fields}, enc_hook=repr).decode()


from mphub.cli import folders, operating, programs, traffic  # noqa: E402, F401  # they add their commands
