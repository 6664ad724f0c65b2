"""The examples run as they stand, away from the checkout, and print what their reader wants to see."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def run(name, *arguments, folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir()), "an example leaves no files behind"
    return done.stdout


def test_asking(tmp_path):
    lines = run("ask", folder=tmp_path).splitlines()
    assert lines[0].startswith("untouched: The image shows") and "sports ball" in lines[0]
    assert lines[1].startswith("with VHR:  The image shows") and "sports ball" not in lines[1]
    assert lines[2].startswith("    layer 1: heads [") and lines[-1].endswith(": True")


def test_a_method_of_ones_own(tmp_path):
    lines = run("own_method", folder=tmp_path).splitlines()
    shares = [tuple(map(float, re.findall(r"0\.\d\d", line)[:2])) for line in lines[:3]]
    assert [line.split(":")[0].split()[1] for line in lines[:3]] == ["1", "1.2", "2"]
    assert shares[0][0] == shares[0][1] and shares[1][0] < shares[1][1] < shares[2][1]
    assert "sports ball" in lines[0] and "sports ball" not in lines[1] and lines[-1].endswith(": True")


def test_comparing_methods(tmp_path):
    text = run("compare_methods", 4, folder=tmp_path)
    for figure in ("CHAIR_S", "recall", "F1"):
        part = text.split(f"{figure} in percent, 4 pictures\n")[1].split("\n\n")[0]
        none, vhr, pai = part.splitlines()
        assert none.startswith("    none ") and "difference" not in none
        for row, method in ((vhr, "vhr"), (pai, "pai")):
            assert re.fullmatch(rf"    {method} +\S+ \[\S+, \S+\]   difference [+-]\S+ \[[+-]\S+, [+-]\S+\]", row)


def test_scoring_captions(tmp_path):
    text = run("score_my_captions", folder=tmp_path)
    assert "invented cat (cat)" in text and "present  chairs (chair)" in text
    assert "6 captions, read as rohrbach" in text and "CHAIR_S   50.0% [" in text and "CHAIR_I   23.8% [" in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_listed(name):
    text = (ROOT / "examples" / f"{name}.py").read_text("utf-8")
    assert len(text.splitlines()) < 60
    assert f"]({name}.py)" in (ROOT / "examples" / "README.md").read_text("utf-8")
    assert f'run("{name}"' in Path(__file__).read_text("utf-8"), "each is run by a test of this file"


def test_links_of_the_list_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / "examples" / "README.md").read_text("utf-8")):
        assert (ROOT / "examples" / link).exists(), link
