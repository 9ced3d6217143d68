"""Commands that concern a program which makes a hub: run it, check it, write a first one; and what the machine offers."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import click

from mphub import __version__
from mphub.cli.main import USAGE, Failed, as_json, commands
from mphub.config import Config, load
from mphub.hub import EventHub
from mphub.procs import boot
from mphub.procs.handlers import loads
from mphub.running import hubs

FIRST = '''"""A first hub: `mphub run {module}:hub` runs it, `mphub pub greet '"World"'` feeds it, `mphub status` shows it."""

from mphub import EventHub

hub = EventHub(name="{module}")


@hub.subscriber("greet", to="greeted")
def greet(name):
    return f"Hello, {{name}}!"


@hub.subscriber("greeted")
def show(text):
    print(text)


@hub.subscriber("divide")
def divide(n):
    print(100 / n)
'''

target = click.argument("target", metavar="MODULE:HUB|FILE.toml")
app_dir = click.option(
    "--app-dir", default=".", show_default=True, type=click.Path(exists=True, file_okay=False), help="Where the module is."
)


def hub_of(where: str, folder: str) -> EventHub:
    """Import the hub that a target names.

    Raises InvalidOption, click.UsageError.
    """
    if where.endswith(".toml"):
        return EventHub.from_config(os.path.join(folder, where))
    if ":" not in where:
        raise click.UsageError(f"got {where!r}; expected a module and its hub, as in app:hub, or a file, as hub.toml")
    sys.argv[0] = where.partition(":")[0]  # hubs without a name are named after it
    found = load(where, Path(folder).absolute())
    if not isinstance(found, EventHub):
        raise click.UsageError(f"{where} is a {type(found).__name__}; expected an EventHub")
    return found


@commands.command()
@target
@app_dir
@click.option("--drain-timeout", type=click.FloatRange(min=0), default=30.0, show_default=True, metavar="SECONDS", help="After a signal.")
def run(target: str, app_dir: str, drain_timeout: float) -> None:
    """Run a hub until SIGINT or SIGTERM: the first drains, the second ends it now."""
    hub = hub_of(target, app_dir)
    click.echo(f"mphub: {hub.name} runs as process {os.getpid()}: `mphub status` shows it, Ctrl-C stops it", err=True)
    if code := hub.run(drain_timeout=drain_timeout):
        raise Failed(code)


@commands.command()
@target
@app_dir
@click.option("--json", "json_", is_flag=True, help="One JSON object.")
def check(target: str, app_dir: str, json_: bool) -> None:
    """Import a hub, and draw which keys go to whom and on to what; starts nothing."""
    hub = hub_of(target, app_dir)
    options = origins_of(target, app_dir)
    flow = [(key, name, loads(one._spec.handler).to) for name, one in hub.subscriptions.items() for key in one.keys]
    if json_:
        drawn = [{"key": key, "subscriber": name, "to": to} for key, name, to in flow]
        click.echo(as_json(hub=hub.name, flow=drawn, options={name: {"value": value, "from": who} for name, value, who in options}))
        return
    for name, value, who in options:
        click.echo(f"{name} = {value!r}  ({who})")
    width = max((len(key) for key, _, _ in flow), default=0)
    for key, name, to in flow:
        click.echo(f"{key.ljust(width)} -> {name}" + (f" -> {to}" if to else ""))
    click.echo(f"{hub.name}: {len(hub.subscriptions)} subscribers of {len(flow)} keys and patterns")


def origins_of(where: str, folder: str) -> list[tuple[str, object, str]]:
    """Return the hub's options that a file or the environment says, and who says so."""
    if not where.endswith(".toml"):
        return []
    config = Config(os.path.join(folder, where))
    return [(name, getattr(config.hub, name), who) for name, who in config.origins.items()]


@commands.command()
@click.argument("file", default="app.py", type=click.Path(dir_okay=False, path_type=Path))
def init(file: Path) -> None:
    """Write a first program with a hub."""
    if not file.stem.isidentifier() or file.suffix != ".py":
        raise click.UsageError(f"got {str(file)!r}; expected the file of a module, as app.py")
    try:
        with open(file, "x") as new:
            new.write(FIRST.format(module=file.stem))
    except FileExistsError:
        click.echo(f"mphub: {file} is there already: it is left as it is", err=True)
        raise Failed(USAGE) from None
    except OSError as error:
        raise click.UsageError(f"{file} cannot be written: {error.strerror}") from None
    click.echo(f"{file} is written; run it: mphub run {file.stem}:hub")


@commands.command()
@click.option("--json", "json_", is_flag=True, help="One JSON object.")
def doctor(json_: bool) -> None:
    """Tell what a hub would find on this machine."""
    parent, is_small = boot.runtime_parent()
    space = os.statvfs(parent)
    found: dict[str, Any] = {
        "mphub": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": boot.cpu_limit(),
        "memory": boot.memory_limit(),
        "folders": str(parent),
        "free": space.f_bavail * space.f_frsize,
        "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "processes": resource.getrlimit(resource.RLIMIT_NPROC)[0],
        "hubs": [address.name for address in hubs()],
    }
    if json_:
        click.echo(as_json(**found))
        return
    for name, value in found.items():
        text = f"{value / 1e9:.1f} GB" if name in ("memory", "free") else ", ".join(value) if isinstance(value, list) else value
        click.echo(f"{name:<12} {text}")
    if is_small:
        click.echo(f"/dev/shm has less than {boot.SMALL >> 20} MB free: hubs keep their files in {parent}, which may be slower", err=True)
