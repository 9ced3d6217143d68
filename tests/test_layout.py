"""The tree tells the architecture: imports go one way, decisions are pure, and ``import mphub`` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mphub"
LAYERS = (
    {"errors", "options", "events", "failpoints", "clock"},
    {"wire", "core"},
    {"store"},
    {"observe"},
    {"publisher", "subscriber", "reply", "results", "reader", "connection", "tap", "past"},
    {"procs"},
    {"hub", "asking", "config", "control", "engine", "executor", "registry", "running", "subscribing", "subscription"},
    {"ext", "testing", "store.archive"},  # a subscriber like any user's, though it stands in store/ as what is kept
    {"__init__"},
    {"cli", "__main__"},
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
IMPURE = {
    "asyncio", "fcntl", "io", "mmap", "multiprocessing", "os", "pathlib", "psutil", "random", "selectors", "shutil",
    "signal", "socket", "subprocess", "tempfile", "threading", "time",
}  # fmt: skip
HEAVY = {"click", "rich"}


def name_of(path: Path, root: Path) -> str:
    """Return the dotted name of the module that a file is."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path, ROOT): path for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str:
    """Return the file or folder directly under the package that a module belongs to, or its own name if it has a layer by itself."""
    part, _, inner = module.partition(".")[2].partition(".")
    return f"{part}.{inner}" if f"{part}.{inner}" in LEVEL else part or "__init__"


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            yield from (inner for other in node.orelse for inner in (other, *statements(other)))
        else:
            yield node
            yield from statements(node)


def imports(source: str, module: str, *, is_package: bool, modules: set[str]) -> Iterator[str]:
    """Yield the dotted names that a source imports, relative ones made absolute."""
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module, is_package=is_package)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules else base


def absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    """Return the module that a ``from`` names, seen from the module it stands in."""
    if not node.level:
        return node.module or ""
    up = node.level - is_package
    above = module.split(".")[: len(module.split(".")) - up]
    return ".".join([*above, *([node.module] if node.module else [])])


def imports_of(module: str) -> set[str]:
    """Return what a module of the package imports."""
    path = FILES[module]
    return set(imports(path.read_text(), module, is_package=path.name == "__init__.py", modules=set(FILES)))


def modules_loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after running the code."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_every_part_of_the_package_has_its_place_in_the_order() -> None:
    unknown = {part_of(module) for module in FILES} - set(LEVEL)
    assert not unknown, f"{sorted(unknown)} stand in no layer; name them in LAYERS, where they belong"


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module: str) -> None:
    level = LEVEL[part_of(module)]
    inner = {name for name in imports_of(module) if name.partition(".")[0] == "mphub"}
    upward = sorted(name for name in inner if LEVEL[part_of(name)] > level)
    assert not upward, f"{module} imports {upward}, which stand above it"


@pytest.mark.parametrize("module", [module for module in FILES if part_of(module) == "core"])
def test_the_core_knows_no_clock_socket_process_or_file(module: str) -> None:
    impure = sorted(IMPURE & {name.partition(".")[0] for name in imports_of(module)})
    assert not impure, f"{module} imports {impure}; take the value as an argument"


def test_importing_the_package_loads_no_command_line_and_no_progress_bar() -> None:
    loaded = modules_loaded_by("import mphub") & HEAVY
    assert not loaded, f"import mphub loads {sorted(loaded)}; import them where they are used"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import mphub.hub", {"mphub.hub"}),
        ("from mphub import hub, publish", {"mphub.hub", "mphub"}),
        ("from mphub.procs.router import Router", {"mphub.procs.router"}),
        ("from ..procs import router", {"mphub.procs.router"}),
        ("from .codec import encode", {"mphub.wire.codec"}),
        ("from . import codec", {"mphub.wire.codec"}),
        ("def later():\n    from mphub import hub", {"mphub.hub"}),
        ("try:\n    import rich\nexcept ImportError:\n    import click", {"rich", "click"}),
        ("if TYPE_CHECKING:\n    from mphub import hub\nelse:\n    import time", {"time"}),
        ("import typing\nif typing.TYPE_CHECKING:\n    import rich", {"typing"}),
    ],
)
def test_an_import_is_seen_wherever_it_stands_unless_only_for_types(source: str, expected: set[str]) -> None:
    modules = {"mphub.hub", "mphub.wire", "mphub.wire.codec", "mphub.procs", "mphub.procs.router"}
    assert set(imports(source, "mphub.wire.frames", is_package=False, modules=modules)) == expected


def test_a_relative_import_of_a_package_starts_at_the_package() -> None:
    modules = {"mphub.wire", "mphub.wire.codec"}
    assert set(imports("from . import codec", "mphub.wire", is_package=True, modules=modules)) == {"mphub.wire.codec"}
