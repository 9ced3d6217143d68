"""A hub described by a file: ``hub.toml``, or ``[tool.mphub]`` in ``pyproject.toml``."""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import inspect
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from mphub.core.keys import nearest
from mphub.errors import InvalidOption, UsageError
from mphub.options import Batch, Inbox, Limits, Rate, Recycle, Restart, Retention, Retry, Snapshot, Stop

PREFIX: Final = "MPHUB_"
"""Of environment variables: MPHUB_MAX_BYTES is ``max_bytes`` of the hub."""
USUAL: Final = "hub.toml"


class RetryTable(msgspec.Struct, forbid_unknown_fields=True):
    """``Retry``, with exceptions by name: of Python itself, or as module:name."""

    max_attempts: int = 3
    on: str | list[str] = []
    delay: float = 1.0
    factor: float = 2.0
    max_delay: float = 30.0


class HubTable(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``[hub]``: what ``EventHub`` takes; functions as module:name."""

    path: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    engine: str | UnsetType = UNSET
    max_bytes: int | str | UnsetType = UNSET
    unmatched: str | UnsetType = UNSET
    check: bool | UnsetType = UNSET
    propagate: bool | UnsetType = UNSET
    stop: Stop | UnsetType = UNSET
    codec: str | UnsetType = UNSET
    initializer: str | UnsetType = UNSET
    durability: str | UnsetType = UNSET
    retention: Retention | UnsetType = UNSET
    notify: list[str] | UnsetType = UNSET
    dashboard: bool | UnsetType = UNSET


class SubscriberTable(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``[subscribers.NAME]``: what ``subscribe`` takes; functions and classes as module:name, ``args`` for the class."""

    keys: str | list[str]
    handler: str
    args: dict[str, Any] | UnsetType = UNSET
    to: str | UnsetType = UNSET
    retry: RetryTable | UnsetType = UNSET
    restart: Restart | UnsetType = UNSET
    inbox: Inbox | UnsetType = UNSET
    limits: Limits | UnsetType = UNSET
    snapshot: Snapshot | UnsetType = UNSET
    replicas: int | str | UnsetType = UNSET
    ordered: bool | UnsetType = UNSET
    concurrency: int | UnsetType = UNSET
    process: str | UnsetType = UNSET
    batch: Batch | UnsetType = UNSET
    where: str | UnsetType = UNSET
    rate: Rate | UnsetType = UNSET
    recycle: Recycle | UnsetType = UNSET
    env: dict[str, str] | UnsetType = UNSET
    replace: bool | UnsetType = UNSET
    start: str | UnsetType = UNSET


INNER: Final[dict[str, type[msgspec.Struct]]] = {
    "stop": Stop, "retention": Retention, "retry": RetryTable, "restart": Restart, "inbox": Inbox, "limits": Limits,
    "snapshot": Snapshot, "batch": Batch, "rate": Rate, "recycle": Recycle,
}  # fmt: skip
"""Options that are tables themselves."""
SIMPLE: Final = tuple(name for name in HubTable.__struct_fields__ if name not in INNER and name != "notify")
"""Those that the environment can say."""


class Config:
    """What a file and the environment say; files and modules are found from where the file is."""

    def __init__(self, path: str | os.PathLike[str] = USUAL, environment: Mapping[str, str] = os.environ) -> None:
        """Read a file.

        Raises InvalidOption.
        """
        self.path = found_at(Path(path))
        self.folder = self.path.parent.absolute()
        said = self._tables()
        self._check_fields(("hub", "subscribers"), said, "")
        hub = said.get("hub", {})
        from_environment = {name: environment[PREFIX + name.upper()] for name in SIMPLE if PREFIX + name.upper() in environment}
        self.origins = dict.fromkeys(hub, self.path.name) | {name: PREFIX + name.upper() for name in from_environment}
        """Who says what of the hub."""
        self.hub = self._read(HubTable, hub, "hub")
        for name, text in from_environment.items():
            setattr(self.hub, name, getattr(self._read(HubTable, {name: text}, PREFIX + name.upper(), strict=False), name))
        self.subscribers = {
            name: self._read(SubscriberTable, table, f"subscribers.{name}") for name, table in said.get("subscribers", {}).items()
        }

    def _tables(self) -> dict[str, Any]:
        try:
            said = tomllib.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidOption(f"{self.path}: {error}; expected a file in TOML") from None
        tables = said.get("tool", {}).get("mphub") if self.path.name == "pyproject.toml" else said
        if tables is None:
            raise InvalidOption(f"{self.path}: it has no [tool.mphub]; expected [tool.mphub.hub] and [tool.mphub.subscribers.NAME]")
        return dict(tables)

    def _read(self, kind: type[Any], table: object, where: str, *, strict: bool = True) -> Any:
        if not isinstance(table, dict):
            raise InvalidOption(f"{self.path}: {where}: got {table!r:.60}; expected a table")
        self._check_fields(kind.__struct_fields__, table, f"{where}.")
        for name in INNER.keys() & table.keys():
            if isinstance(table[name], dict):
                self._check_fields(INNER[name].__struct_fields__, table[name], f"{where}.{name}.")
        try:
            return msgspec.convert(table, kind, strict=strict)
        except msgspec.ValidationError as error:
            what, _, place = str(error).partition(" - at `$")
            raise InvalidOption(f"{self.path}: {where}{place.rstrip('`') if strict else ''}: {what}") from None

    def _check_fields(self, known: Iterable[str], table: Mapping[str, object], where: str) -> None:
        """Refuse a name that is none, with the nearest one that is."""
        known = list(known)
        for name in table:
            if name not in known:
                near = nearest(name, known)
                hint = f"did you mean {near!r}?" if near else f"expected one of {', '.join(known)}"
                raise InvalidOption(f"{self.path}: {where}{name}: there is no such option; {hint}")

    # -- as arguments

    def hub_options(self) -> dict[str, Any]:
        """Return what ``EventHub`` is called with."""
        options = given(self.hub)
        if "path" in options:
            options["path"] = self.folder / os.path.expanduser(options["path"])
        if "initializer" in options:
            options["initializer"] = self.load(options["initializer"], "hub.initializer")
        return options

    def subscriptions(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the names of subscribers, with what ``subscribe`` is called with."""
        for name, table in self.subscribers.items():
            where, options = f"subscribers.{name}", {"name": name, **given(table)}
            options["handler"] = self._handler_of(options["handler"], options.pop("args", None), where)
            if "where" in options:
                options["where"] = self.load(options["where"], f"{where}.where")
            if "retry" in options:
                options["retry"] = self._retry_of(options["retry"], where)
            yield name, options

    def _handler_of(self, name: str, args: dict[str, Any] | None, where: str) -> Any:
        handler = self.load(name, f"{where}.handler")
        if args is None:
            return handler
        if not isinstance(handler, type):
            raise InvalidOption(f"{self.path}: {where}.args: {name} is no class; expected args for a Subscriber class alone")
        try:
            inspect.signature(handler).bind(**args)
        except TypeError as error:
            raise InvalidOption(f"{self.path}: {where}.args: {name}: {error}") from None
        return functools.partial(handler, **args)

    def _retry_of(self, table: RetryTable, where: str) -> Retry:
        names = [table.on] if isinstance(table.on, str) else table.on
        kinds = tuple(getattr(builtins, name, None) or self.load(name, f"{where}.retry.on") for name in names)
        with self.saying(f"{where}.retry"):
            return Retry(table.max_attempts, on=kinds, delay=table.delay, factor=table.factor, max_delay=table.max_delay)

    @contextlib.contextmanager
    def saying(self, where: str) -> Iterator[None]:
        """Say where in the file it is what an option is refused for."""
        try:
            yield
        except UsageError as error:
            raise InvalidOption(f"{self.path}: {where}: {error}") from error

    def load(self, name: str, where: str) -> Any:
        with self.saying(where):
            return load(name, self.folder)


def load(name: str, folder: Path) -> Any:
    """Import what a name stands for, module:name, from a folder or wherever Python finds modules.

    Raises InvalidOption.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InvalidOption(f"got {name!r}; expected a module and what is in it, as in app:handle")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise InvalidOption(f"importing {module!r} failed ({type(error).__name__}: {error}); looked in {folder} first") from error
    for each in attribute.split("."):
        if not hasattr(found, each):
            near = nearest(each, dir(found))
            raise InvalidOption(f"{module} has no {each!r}" + (f"; did you mean {near!r}?" if near else ""))
        found = getattr(found, each)
    return found


def found_at(path: Path) -> Path:
    """Return the file to read: without ``hub.toml``, a ``pyproject.toml`` beside it may say the same."""
    beside = path.parent / "pyproject.toml"
    if path.name == USUAL and not path.exists() and beside.exists():
        return beside
    return path


def given(table: msgspec.Struct) -> dict[str, Any]:
    """Return the options that a table has."""
    return {name: value for name in table.__struct_fields__ if (value := getattr(table, name)) is not UNSET}
