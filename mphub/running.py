"""Hubs that run, as other programs of the same user find them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mphub.connection import Address
from mphub.core.keys import nearest
from mphub.errors import HubClosed, HubError, InvalidOption
from mphub.options import check_timeout
from mphub.procs import boot
from mphub.publisher import Publisher
from mphub.reader import is_alive

LOOK_EVERY = 0.05
"""Seconds between looks for a hub that does not run yet."""


def connect(hub: str | os.PathLike[str] | None = None, *, timeout: float | None = 5.0) -> Publisher:
    """Return a publisher of a hub of this user that another program runs, or will run within ``timeout`` seconds.

    hub: its name, or the folder of a durable one; None: the only one there is. Once that hub has been stopped, what the publisher
    is asked raises HubClosed: connect again.
    Raises HubClosed: none runs; HubError: several do, and none is named; InvalidOption.
    """
    return Publisher(find(hub, check_timeout(timeout)))


def find(hub: str | os.PathLike[str] | None, timeout: float | None = 0.0) -> Address:
    """Return where a hub is; wait for it at most some seconds.

    Raises HubClosed, HubError, InvalidOption.
    """
    if hub is not None and (not isinstance(hub, str | os.PathLike) or not os.fspath(hub)):
        raise InvalidOption(f"hub: got {hub!r:.80}; expected the name of a hub, its folder, or None for the only one there is")
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        there = list(hubs())
        found = there if hub is None else [address for address in there if is_called(address, hub)]
        if len(found) > 1:
            raise HubError(f"hub: {len(found)} hubs of this user run ({names_of(found)}): name one")
        if found:
            return found[0]
        if deadline is not None and time.monotonic() >= deadline:
            raise HubClosed(absence(hub, there))
        time.sleep(LOOK_EVERY)


def hubs() -> Iterator[Address]:
    """Yield the hubs of this user that run."""
    for parent in places():
        for folder in boot.own_folders(parent):
            address = boot.address_in(folder) if (folder / boot.OPEN).exists() else None
            if address is not None and address.folder == str(folder) and is_alive(address.pid, address.started):
                yield address


def places() -> set[Path]:
    """Return where runtime folders may be: which of these it is depends on how full they were."""
    return {boot.SHM, Path(tempfile.gettempdir())}


def is_called(address: Address, hub: str | os.PathLike[str]) -> bool:
    return address.name == hub or os.path.realpath(hub) in (address.folder, os.path.dirname(os.path.realpath(f"{address.folder}/journal")))


def names_of(found: list[Address]) -> str:
    return ", ".join(f"{address.name} of process {address.pid}" for address in found[:10])


def absence(hub: str | os.PathLike[str] | None, there: list[Address]) -> str:
    """Say that a hub does not run, and which do."""
    if hub is None:
        return "no hub of this user runs: start one first"
    near = nearest(os.fspath(hub), [address.name for address in there])
    hint = f"did you mean {near!r}?" if near else f"these do: {names_of(there)}" if there else "none of this user does"
    return f"hub: got {os.fspath(hub)!r}, and no hub of that name or folder runs; {hint}"
