"""The figures of a small tree, counted by hand."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "figures.py"

LOW = '''"""Words of the module,
over two lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmfix.cli import main


def double(numbers):
    """Words of the function."""
    # why: a comment on a line of its own
    from vlmfix.engine import high

    doubled = [2 * n for n in numbers]  # not on a line of its own
    return high.identity(doubled)
'''
HIGH = """from ..model.low import double


def identity(values):
    return values
"""
METHOD = "\n".join(["import vlmfix.model.low", *(f"x{number} = {number}" for number in range(9))]) + "\n"


def measure(folder, *options):
    command = [sys.executable, str(SCRIPT), str(folder), *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line[:38].strip(): line[38:] for line in printed if ": " not in line}, [x for x in printed if ": " in x]


def write(root, **texts):
    for name, text in texts.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def test_figures_by_hand(tmp_path):
    write(tmp_path, vlmfix__model__low=LOW, vlmfix__engine__high=HIGH, hooks__louder=METHOD, tests__skipped="x = 1\n")
    (tmp_path / "vlmfix" / "hooks").symlink_to("../hooks")
    figures, arrows = measure(tmp_path)
    assert figures == {
        "lines": "33",
        "biggest file": "18 (vlmfix/model/low.py)",
        "median method file": "10",
        "upward arrows": "1",
        "circles": "1",
        "letters per local name": "4.0",  # doubled and n
        "comprehensions per 100 lines of code": "4.8",  # one; 8 lines of code, 3 and 10
        "comment lines per 100 lines of code": "4.8",
    }
    assert arrows == [
        "upward: vlmfix.model.low -> vlmfix.engine.high",
        "circle: vlmfix.engine.high, vlmfix.model.low",
    ]


def test_a_package_by_itself(tmp_path):
    write(tmp_path, pkg____init__="", pkg__one="from pkg import two\n", pkg__two="", pkg__kinds__a="x = 1\n")
    figures, arrows = measure(tmp_path / "pkg", "kinds/*.py")
    assert (figures["lines"], figures["median method file"], figures["letters per local name"]) == ("2", "1", "-")
    assert arrows == []


def test_a_folder_without_python(tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "holds no Python files; name the folder" in done.stderr


def test_this_tree():
    figures, _ = measure(ROOT)
    assert int(figures["lines"].replace(",", "")) > 10_000 and float(figures["letters per local name"]) > 4
