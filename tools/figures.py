"""Figures of how a tree of Python code reads: sizes, import arrows, names, comprehensions, comments.

    python tools/figures.py [FOLDER] [METHODS]     # METHODS: which files hold a method each, hooks/*.py by default

They are a compass and no limit: nothing is renamed or cut for a count. Measure two trees and compare.

- An arrow is a file that imports another of the tree, also inside a function; imports for type checkers do not count.
  It runs upward where the importing file lies on a lower of the `FLOORS`. A circle is files that reach each other.
- A local name is one that a function binds, its parameters aside, counted once per function.
- Lines of code are those with code on them; docstrings are none.
"""

import ast
import io
import os
import statistics
import sys
import tokenize
from pathlib import Path

FLOORS = (
    "model",
    "method",
    "hooks",
    "engine",
    "asking",
    "eval",
    "organism",
    "carry",
    "serve",
    "integrations",
    "demo",
    "cli",
)
"""Packages of vlmfix from the ground up; files elsewhere lie on no floor."""
LINKED = ("hooks", "eval", "demo", "organism", "assets")
"""Folders at the top that are imported as parts of vlmfix."""
SKIPPED = ("tests", "test", "examples", "docs", "tools", "build", "__pycache__", "vendor")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def python_files(folder: Path) -> list[Path]:
    """The files of the tree, without tests and the like; links to folders are not followed."""
    paths: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
        paths += [Path(place) / name for name in sorted(names) if name.endswith(".py")]
    return paths


def module_name(path: Path, folder: Path) -> str:
    """The dotted name under which a file is imported."""
    parts = list(path.relative_to(folder).with_suffix("").parts)
    if (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
    elif parts[0] in LINKED:
        parts.insert(0, "vlmfix")
    return ".".join(parts).removesuffix(".__init__")


def kinds_of_lines(text: str, tree: ast.AST) -> tuple[set[int], set[int]]:
    """Numbers of the lines with code, and of those that hold nothing but a comment."""
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # docstrings, also those of fields
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return code, comments - code


def local_names(tree: ast.AST) -> list[str]:
    """The names that each function binds."""
    names: list[str] = []
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            stored = (node for node in ast.walk(function) if isinstance(node, ast.Name))
            names += sorted({node.id for node in stored if isinstance(node.ctx, ast.Store)} - {"_"})
    return names


def imported_names(tree: ast.AST, package: str) -> set[str]:
    """Modules and names in modules, in full, that a file of this package imports."""
    names: set[str] = set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = parents[: len(parents) - node.level + 1] if node.level else []  # from .. import name
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)
    return names


def floor(module: str) -> int:
    """The number of a module's floor, from 0; -1 for none."""
    package, room = [*module.split("."), ""][:2]
    return FLOORS.index(room) if package == "vlmfix" and room in FLOORS else -1


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach each other over the arrows."""
    reached: dict[str, set[str]] = {}
    for module, targets in arrows.items():
        reached[module] = set()
        waiting = list(targets)
        while waiting:
            target = waiting.pop()
            if target not in reached[module]:
                reached[module].add(target)
                waiting += arrows[target]
    rings = {tuple(sorted(other for other in reached[start] if start in reached[other])) for start in arrows}
    return [list(ring) for ring in sorted(rings - {()})]


def figures(folder: Path, methods: str = "hooks/*.py") -> tuple[dict[str, str], list[str]]:
    """Name of each figure -> its value; and the upward arrows and circles, one a line."""
    paths = python_files(folder)
    if not paths:
        raise SystemExit(f"{folder} holds no Python files; name the folder of a package or a checkout.")
    texts = {path: path.read_text("utf-8") for path in paths}
    lines_of = {path: len(text.splitlines()) for path, text in texts.items()}
    code = comments = comprehensions = 0
    names: list[str] = []
    modules = {module_name(path, folder) for path in paths}
    arrows: dict[str, set[str]] = {module: set() for module in modules}
    for path, text in texts.items():
        tree = ast.parse(text)
        code_lines, comment_lines = kinds_of_lines(text, tree)
        code, comments = code + len(code_lines), comments + len(comment_lines)
        comprehensions += sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(tree))
        names += local_names(tree)
        module = module_name(path, folder)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for name in imported_names(tree, package):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules - {module}:
                arrows[module].add(target)
    pairs = [(module, target) for module in sorted(modules) for target in sorted(arrows[module])]
    upward = [pair for pair in pairs if -1 < floor(pair[0]) < floor(pair[1])]
    rings = circles(arrows)
    biggest = max(paths, key=lines_of.__getitem__)
    method_lines = [lines_of[path] for path in paths if path.match(methods) and not path.name.startswith("_")]
    values = {
        "lines": f"{sum(lines_of.values()):,}",
        "biggest file": f"{lines_of[biggest]} ({biggest.relative_to(folder)})",
        "median method file": f"{statistics.median(method_lines):g}" if method_lines else "-",
        "upward arrows": f"{len(upward)}",
        "circles": f"{len(rings)}",
        "letters per local name": f"{statistics.mean(map(len, names)):.1f}" if names else "-",
        "comprehensions per 100 lines of code": f"{100 * comprehensions / max(code, 1):.1f}",
        "comment lines per 100 lines of code": f"{100 * comments / max(code, 1):.1f}",
    }
    return values, [f"upward: {a} -> {b}" for a, b in upward] + [f"circle: {', '.join(ring)}" for ring in rings]


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    values, arrows = figures(folder, *sys.argv[2:3])
    for name, value in values.items():
        print(f"{name:<38}{value}")
    for line in arrows:
        print(line)
