"""The commands of docs/fix.md run on the embedded model, one after another, with smaller numbers."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlmfix
from vlmfix.asking.fix import FixFile
from vlmfix.cli import app
from vlmfix.cli.tune import NOTHING_FOUND
from vlmfix.eval.tune import describe, space
from vlmfix.eval.tune import tune as module
from vlmfix.method.registry import parse

ROOT = Path(__file__).parent.parent
SMALLER = {
    "describe": [],
    "tune": ["--limit", "20", "--budget", "200", "--max-new-tokens", "20"],
    "eval": ["--limit", "2", "--max-new-tokens", "20"],
    "ask": ["--max-new-tokens", "8"],
}


@pytest.fixture(scope="module")
def commands():
    page = (ROOT / "docs" / "fix.md").read_text("utf-8")
    lines = re.findall(r"^vlmfix (.*)$", page.split("```")[1], re.MULTILINE)
    assert [line.split()[0] for line in lines] == list(SMALLER)
    return [shlex.split(line) for line in lines]


def test_the_page_runs(commands, organism, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for place in (describe, space):
        monkeypatch.setattr(place, "REGISTRY", ("pai", "vhr"))
    monkeypatch.setattr(module, "TOOLS", {"vhd": 4})
    said = {}
    for command in commands:
        result = CliRunner().invoke(app, [*command, *SMALLER[command[0]]])
        said[command[0]] = result.output
        allowed = (0, NOTHING_FOUND) if command[0] == "tune" else (0,)
        assert result.exit_code in allowed, result.output
        if command[0] == "tune" and result.exit_code == NOTHING_FOUND:  # of eight pictures, perhaps
            assert "nothing is written" in result.output and not Path("fix.json").exists()
            FixFile(parse("pai:alpha=2"), vlmfix.Asker(*organism).identity).save("fix.json")
    assert "8 layers x 8 heads" in said["describe"]
    assert Path("tuned/index.html").is_file() and "candidates were tried" in said["tune"]
    assert "fix.json" in said["eval"] and "pai:alpha=" in said["eval"], "the fix, and the controls of its methods"
    assert "fix.json" in said["ask"]
