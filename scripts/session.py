"""Record the terminal session of docs/tutorial/session.md: type each command in an empty folder, and write down what it says.

python scripts/session.py                   writes the page
python scripts/session.py --print           prints it
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "tutorial" / "session.md"
HEAD = """# A first session

From an empty folder to a hub that is run, fed, hurt, looked after and stopped, in one terminal. `scripts/session.py` has typed this,
and wrote down what came; process numbers, times and figures are those of that day.

"""
PARTS: list[tuple[str, list[str]]] = [
    ("A program to begin with, and what it does:", ["mphub init", "cat app.py", "mphub check app:hub"]),
    (
        "It runs in the background here; a service manager does the same:",
        ["mphub run app:hub > log.txt 2>&1 &", "mphub ping --ready", "mphub status"],
    ),
    (
        "Whatever is published is handled by who subscribes to it, in a process of its own:",
        ["mphub pub greet '\"World\"'", "mphub drain", "cat log.txt"],
    ),
    (
        "A process that is killed is replaced at once, and nothing is lost:",
        ["kill -9 $(mphub status | awk '$1 == \"greet\" {print $3}')", "mphub pub greet '\"again\"'", "mphub drain", "mphub status"],
    ),
    (
        "What a handler cannot do becomes a dead letter. Once the reason is gone, it may try again:",
        ["mphub pub divide 0", "mphub drain", "mphub dead list", "mphub dead redrive", "mphub drain", "mphub dead purge --yes"],
    ),
    ("SIGTERM to its process, which does what is left to do:", ["mphub stop", "tail -1 log.txt", "mphub status", "echo $?"]),
]
MPHUB = """#!{python}
import pathlib, sys
from mphub.procs import boot
boot.SHM = pathlib.Path({shm!r})
from mphub.cli import main
sys.exit(main())
"""
"""The command, which finds no other hub of this user."""
READY_WITHIN = 20.0
"""Seconds for the hub to answer."""


class Terminal:
    """A shell in a folder, one command after the other."""

    def __init__(self, folder: Path) -> None:
        root = str(PAGE.parents[2])
        path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "PYTHONPATH": root, "NO_COLOR": "1"}
        self.folder = folder / "work"
        self.folder.mkdir()
        (folder / "bin").mkdir()
        command = folder / "bin" / "mphub"
        (folder / "shm").mkdir()
        command.write_text(MPHUB.format(python=sys.executable, shm=str(folder / "shm")))
        command.chmod(0o700)
        self.code = 0

    def type(self, command: str) -> str:
        """Run a command; return what came of it."""
        if command == "echo $?":
            return f"{self.code}\n"
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        self.code = done.returncode
        return done.stdout + done.stderr

    def wait_for_hub(self) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while self.type("mphub ping --ready") and self.code:
            if time.monotonic() > deadline:
                raise SystemExit("session: the hub is not ready: " + (self.folder / "log.txt").read_text())
            time.sleep(0.1)


def record(terminal: Terminal) -> Iterator[str]:
    yield HEAD
    for words, commands in PARTS:
        yield f"{words}\n\n```console\n"
        for command in commands:
            yield f"$ {command}\n{terminal.type(command)}"
            if command.endswith("&"):
                terminal.wait_for_hub()
        yield "```\n\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--print", action="store_true", dest="prints", help="print it, and write nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="session-") as folder:
        terminal = Terminal(Path(folder))
        try:
            page = "".join(record(terminal)).rstrip() + "\n"
        finally:
            terminal.type("mphub stop --hub app")
    if options.prints:
        print(page, end="")
    else:
        PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
