"""Imports run one way: model < method < engine < asking < cli, and in no circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("model", "method", "engine", "asking", "cli")
ROOMS = ("hooks", "eval", "demo", "organism")
LAZY = {
    ("vlmfix.method.intervention", "vlmfix.engine"): "`with VAR()(model):` is spelt on the method",
    ("vlmfix.method.registry", "vlmfix.hooks"): "names of methods are looked up when they are asked for",
}
"""Imports inside functions that go up, and why."""


def modules():
    """Name of each module of the package, and its file."""
    files = {}
    for path in sorted((ROOT / "vlmfix").rglob("*.py")):
        files[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    for room in ROOMS:  # links inside vlmfix/, which rglob does not follow
        for path in sorted((ROOT / room).rglob("*.py")):
            name = ".".join(("vlmfix", *path.relative_to(ROOT).with_suffix("").parts))
            files[name.removesuffix(".__init__")] = path
    return files


MODULES = modules()


def imported(node, inside):
    """Modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        module = node.module or ""
        names = [f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module for alias in node.names]
    return {name for name in names if name in MODULES and name != inside}


def arrows(name):
    """Modules that a module imports when it is loaded, and those that its functions import later. What stands under
    TYPE_CHECKING is left out: it is never run."""
    tree = ast.parse(MODULES[name].read_text())
    at_load, later = set(), set()

    def walk(node, lazy):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                (later if lazy else at_load).update(imported(child, name))
            walk(child, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    walk(tree, lazy=False)
    return at_load, later - at_load


ARROWS = {name: arrows(name) for name in MODULES}


def floor(name):
    """Number of the floor that a module stands on; `None` for the package itself and the rooms on top of the floors."""
    parts = name.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else None


def is_above(target, name):
    """Whether a module stands above one of a floor; the rooms stand on top of all floors."""
    own, other = floor(name), floor(target)
    if own is None or target == "vlmfix":
        return False
    return other is None or other > own


@pytest.mark.parametrize("name", [name for name in MODULES if floor(name) is not None and "cli" not in name])
def test_imports_run_one_way(name):
    at_load, later = ARROWS[name]
    assert not [target for target in at_load if is_above(target, name)]
    up = {target for target in later if is_above(target, name)}
    told = {allowed for (source, allowed) in LAZY if source == name}
    assert not [target for target in up if not any(target.startswith(allowed) for allowed in told)]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("vlmfix.hooks")])
def test_methods_stand_on_the_floors_below_the_engine(name):
    """When they are loaded."""
    below = ("vlmfix.model", "vlmfix.method", "vlmfix.hooks")
    assert not [target for target in ARROWS[name][0] if not target.startswith(below)]


def test_no_circles():
    """Of what is imported when modules are loaded: nothing, through whatever others, imports itself."""
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in sorted(ARROWS[name][0]):
            visit(target)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


@pytest.mark.parametrize("floor_name", FLOORS[:3])
def test_no_circles_through_functions(floor_name):
    """Nor do functions close one, within a floor."""
    here = [name for name in MODULES if name.startswith(f"vlmfix.{floor_name}.")]
    below = {name: {t for t in (ARROWS[name][0] | ARROWS[name][1]) if t in here} for name in here}
    while below:
        free = [name for name, targets in below.items() if not targets & set(below)]
        assert free, f"a circle among {sorted(below)}"
        for name in free:
            del below[name]


def test_the_reader_sees_what_it_must_see(tmp_path, monkeypatch):
    path = tmp_path / "anatomy.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vlmfix.cli import ask\n"
        "from vlmfix.method import stages\ndef later():\n    from vlmfix.engine.wrap import wrap\n"
    )
    monkeypatch.setitem(MODULES, "vlmfix.model.anatomy", path)
    at_load, later = arrows("vlmfix.model.anatomy")
    assert (at_load, later) == ({"vlmfix.method.stages"}, {"vlmfix.engine.wrap"})
    assert all(is_above(target, "vlmfix.model.anatomy") for target in at_load | later)
    assert is_above("vlmfix.eval.bench", "vlmfix.engine.wrap") and not is_above("vlmfix.model.anatomy", "vlmfix.engine")
