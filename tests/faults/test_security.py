"""Other users of the machine: they cannot connect, read, trick or learn the token."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

import mphub
from mphub import EventHub
from mphub.wire import frames
from mphub.wire.frames import HelloPublisher, encode, frame
from tests.helpers import eventually

pytestmark = pytest.mark.faults
NOBODY = 65534
FORK = multiprocessing.get_context("fork")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def hub() -> Iterator[EventHub]:
    hub = EventHub()
    hub.subscribe("k", lambda n: n, name="k")
    with hub:
        yield hub


@contextlib.contextmanager
def nobody(act: Callable[[Connection], None]) -> Iterator[Connection]:
    """Let another user act; yield the pipe to it."""
    ours, theirs = FORK.Pipe()

    def run() -> None:
        ours.close()
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        act(theirs)

    process = FORK.Process(target=run)
    process.start()
    theirs.close()
    with ours:
        yield ours
    process.join(10)
    process.kill()
    process.join()
    process.close()


def outcome(call: Callable[[], object]) -> str:
    try:
        return f"got {call()!r}"
    except OSError as error:
        return type(error).__name__


def connect(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)


@as_root
def test_another_user_comes_nowhere(hub: EventHub) -> None:
    folder = hub._address.folder
    pids = [*hub.statistics().pids.values(), *hub.subscription("k").statistics().pids]

    def act(pipe: Connection) -> None:
        calls: list[Callable[[], object]] = [
            lambda: os.listdir(folder),
            lambda: connect(f"{folder}/data"),
            lambda: connect(f"{folder}/control"),
            lambda: os.stat(f"{folder}/journal/data.mdb"),
            lambda: Path(folder, "new").touch(),
            lambda: os.rename(folder, f"{folder}x"),
            *(lambda pid=pid: os.kill(pid, 9) for pid in pids),
            *(lambda pid=pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in pids),
            *(lambda pid=pid: os.listdir(f"/proc/{pid}/fd") for pid in pids),
        ]
        pipe.send([outcome(call) for call in calls])

    with nobody(act) as pipe:
        assert set(pipe.recv()) == {"PermissionError"}
    assert hub.request("k", 1).result(10) == 1


@as_root
def test_another_user_who_reaches_a_socket_and_knows_the_token_is_closed_unread(hub: EventHub) -> None:
    folder = Path(hub._address.folder)
    hellos = {
        "data": frame(frames.HELLO_PUBLISHER, encode(HelloPublisher(hub._address.token, 1, 1, 0.0))),
        "control": frame(frames.HELLO_CONTROL, hub._address.token),
    }
    folder.chmod(0o755)
    for name in hellos:
        (folder / name).chmod(0o666)

    def act(pipe: Connection) -> None:
        for name, hello in hellos.items():
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                sock.connect(str(folder / name))
                with contextlib.suppress(BrokenPipeError):
                    sock.sendall(hello)
                with contextlib.suppress(ConnectionResetError):
                    pipe.send(sock.recv(100))
                    continue
                pipe.send(b"")

    with nobody(act) as pipe:
        assert [pipe.recv() for _ in hellos] == [b"", b""]
    assert hub.request("k", 1).result(10) == 1


def test_folders_and_sockets_are_the_users_alone_whatever_its_umask() -> None:
    before = os.umask(0)
    try:
        with EventHub() as hub:
            folder = Path(hub._address.folder)
            modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in [folder, *folder.iterdir()] if path.is_dir()}
            assert set(modes.values()) == {0o700}, modes
            assert {stat.S_IMODE((folder / name).lstat().st_mode) for name in ("data", "control")} == {0o600}
    finally:
        os.umask(before)


def make_old(path: Path) -> Path:
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def test_a_symlink_where_the_folder_should_be_ends_the_start_and_harms_nothing(tmp_path: Path) -> None:
    hub = EventHub()
    folder = Path(hub._address.folder)
    folder.symlink_to(tmp_path)
    try:
        with pytest.raises(mphub.StartFailed, match="cannot be made"):
            hub.start()
        assert list(tmp_path.iterdir()) == []
    finally:
        folder.unlink()
    with hub:
        pass


def test_a_symlink_named_like_a_folder_is_not_swept(tmp_path: Path, place: Path) -> None:
    bait = tmp_path / "bait"
    bait.mkdir()
    make_old(bait)
    (place / f"mphub-{os.getuid()}-planted").symlink_to(bait)
    with EventHub():
        assert list(bait.iterdir()) == []


@as_root
def test_a_folder_of_another_user_named_like_ours_is_not_swept(place: Path) -> None:
    folder = place / f"mphub-{os.getuid()}-planted"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    make_old(folder)
    with EventHub():
        assert folder.is_dir()
        assert list(folder.iterdir()) == []


@as_root
def test_nothing_is_sent_to_another_user_who_takes_the_folders_name() -> None:
    hub = EventHub()
    with hub:
        publisher = hub.publisher()
    folder = Path(hub._address.folder)

    def act(pipe: Connection) -> None:
        folder.mkdir()
        folder.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(folder / "data"))
            os.chmod(folder / "data", 0o666)
            sock.listen()
            sock.settimeout(10)
            pipe.send("open")
            peer, _ = sock.accept()
            with peer:
                peer.settimeout(10)
                pipe.send(peer.recv(1000))
        os.unlink(folder / "data")
        folder.rmdir()

    with nobody(act) as pipe:
        assert pipe.recv() == "open"
        with pytest.raises(mphub.HubClosed, match="another user"):
            publisher.publish("k", "secret")
        assert pipe.recv() == b""
    assert eventually(lambda: not folder.exists(), 5)


def test_the_token_is_in_no_process_list_and_no_environment(hub: EventHub) -> None:
    token = hub._address.token
    disguises = [token, token.hex().encode(), repr(token).encode()[2:-1]]
    hub.request("k", 1).result(10)
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    assert len(family) >= 4
    for process in family:
        for name in ("cmdline", "environ", "comm"):
            said = Path(f"/proc/{process.pid}/{name}").read_bytes()
            assert not any(disguise in said for disguise in disguises), (process, name)
    files = [path for path in Path(hub._address.folder).rglob("*") if path.is_file()]
    assert [(path.name, stat.S_IMODE(path.stat().st_mode)) for path in files if token in path.read_bytes()] == [("address", 0o600)]
