"""Modules import each other only in the directions that the layout allows."""

from __future__ import annotations

import ast
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND_LINES = {"track_video", "track_task"}  # in the root, but not in the tracker's image
PRODUCT = {"root", "interaction", "clips", "cvat_task", "agent", "command lines"}
# For each group of modules, a folder in most cases: the other groups that it may import from.
MAY_IMPORT = {
    "root": set[str](),
    "interaction": {"root"},
    "clips": {"root"},
    "cvat_task": {"root", "clips"},
    "agent": {"root", "interaction"},
    "command lines": {"root", "clips", "cvat_task"},
    "testbed": PRODUCT,
    "micro_training": PRODUCT | {"testbed"},
    "benchmarks": PRODUCT | {"testbed", "micro_training"},
}
CORE = {
    "errors", "mask_regions", "model_handler", "model_loader", "object_requests", "rearranged",
    "report", "shape_prompt", "shapes", "state_store", "state_token", "track_state",
    "track_storage", "tracker", "warm_up",
}  # fmt: skip
WIRE = {"images", "local_server", "main", "nuclio_door", "protocol"}
WITHOUT_TORCH = {
    "errors", "images", "object_requests", "protocol", "settings", "shapes", "state_store",
    "state_token",
}  # fmt: skip


def module_name(path: Path) -> str:
    """Return the name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


FOLDERS = [ROOT, *(ROOT / group for group in MAY_IMPORT if (ROOT / group).is_dir())]
MODULES = {module_name(path): path for folder in FOLDERS for path in folder.glob("*.py")}


def direct_imports(path: Path) -> set[str]:
    """Return all that a file imports: names of our modules and of others' packages."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {owner(name) for name in names}


def owner(name: str) -> str:
    """Return our module that defines a dotted name, else the name's top-level package."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


GRAPH = {name: direct_imports(path) for name, path in MODULES.items()}


def all_imports(name: str) -> set[str]:
    """Return what a module imports, directly or through our modules."""
    seen: set[str] = set()
    pending = {name}
    while pending:
        new = GRAPH.get(pending.pop(), set()) - seen
        seen |= new
        pending |= new
    return seen


def offenders(names: Collection[str], forbidden: set[str]) -> dict[str, set[str]]:
    """Return the modules with forbidden imports, direct or indirect, and these imports."""
    return {name: bad for name in names if (bad := all_imports(name) & forbidden)}


def group_of(name: str) -> str:
    """Return the group of one of our modules; see `MAY_IMPORT`."""
    if name in COMMAND_LINES:
        return "command lines"
    folder = MODULES[name].parent
    return "root" if folder == ROOT else folder.name


def test_no_modules_import_each_other() -> None:
    """Otherwise a `CycleError` names them."""
    TopologicalSorter(GRAPH).prepare()


def test_the_core_needs_no_wire_format() -> None:
    """Neither directly nor through other modules."""
    assert MODULES.keys() >= CORE | WIRE
    assert offenders(CORE, WIRE) == {}


def test_torch_is_not_needed_to_check_a_request() -> None:
    """These modules import it neither directly nor through others."""
    assert MODULES.keys() >= WITHOUT_TORCH
    assert "torch" in all_imports("tracker")
    assert offenders(WITHOUT_TORCH, {"torch"}) == {}


@pytest.mark.parametrize("group", MAY_IMPORT)
def test_imports_point_from_outer_folders_to_inner_ones(group: str) -> None:
    """The tracker's image holds the root alone, and the product needs no tests and no test bed."""
    names = [name for name in MODULES if group_of(name) == group]
    allowed = {name for name in MODULES if group_of(name) in MAY_IMPORT[group] | {group}}
    forbidden = (MODULES.keys() | {"tests"}) - allowed

    assert names
    assert {name: bad for name in names if (bad := GRAPH[name] & forbidden)} == {}


def test_every_module_of_the_root_is_sorted() -> None:
    """A new module has to be called core or wire, so that the rules apply to it."""
    root = {path.stem for path in ROOT.glob("*.py")}

    assert root == CORE | WIRE | COMMAND_LINES | {"settings"}
