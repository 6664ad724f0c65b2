"""The README's code runs, its paths exist, and its figures are what the main job prints."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tools import readme
from tools.main_job import restore
from vlmfix.cli import app
from vlmfix.eval.report.study import study
from vlmfix.eval.run.results import Run, compare
from vlmfix.hooks import REGISTRY
from vlmfix.method.registry import method_class

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text("utf-8")


def test_python_blocks_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    said = capsys.readouterr().out.splitlines()
    assert len(blocks) == 2 and said[0].startswith("The image shows three dining tables in a room.")
    assert "fork" not in said[0], "as in the picture at the head"
    assert said[1] in ("Yes", "No", "Yes.", "No.")


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.encode()) <= 9_000
    for text, folder in ((README, ROOT), *((path.read_text("utf-8"), path.parent) for path in DOCS)):
        links = re.findall(r'\]\(([^)#]+)\)|(?:src|srcset)="([^"]+)"', text)
        for link in filter(None, (link for pair in links for link in pair)):
            assert link.startswith("https://") or (folder / link).exists(), link


def test_commands_exist():
    commands = (ROOT / "docs" / "commands.md").read_text("utf-8")
    for line in re.findall(r"^vlmfix (.*)", README + commands, re.MULTILINE):
        command, *rest = shlex.split(line, comments=True)
        shown = CliRunner().invoke(app, [command, *rest, "--help"]).stdout
        assert all(option in shown for option in rest if option.startswith("--")), line


def test_the_file_tree_is_true():
    tree = (ROOT / "docs" / "where.md").read_text("utf-8").split("```")[1]
    folder = ""
    for line in filter(None, tree.splitlines()):
        name = line.split()[0]
        folder, path = (name, name) if not line.startswith(" ") else (folder, folder + name)
        assert (ROOT / path).exists(), path
    files = {p.name for p in (ROOT / "vlmfix").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert all(f"  {name} " in tree for name in files), "every module of the core is in the tree"


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The runs that the main job left: what it asked, and every answer."""
    return restore(tmp_path_factory.mktemp("main"))


def test_tables_are_those_of_the_kept_answers(main_job):
    """What `make readme` would write is what stands there."""
    assert {run.command for run in main_job} == {"vlmfix eval"} and len(main_job) == 12 + 6
    for name, block in readme.blocks([study(comparison) for comparison in compare(main_job)]).items():
        begin, end = readme.MARKS[name]
        assert (ROOT / name).read_text("utf-8").partition(begin)[2].partition(end)[0] == block, "run make readme"
    assert all(method_class(name).expect for name in REGISTRY)


def test_the_main_job_still_gives_these_answers(main_job, tmp_path):
    """On its first 10 pictures: to the letter, but for the few answers that another processor rounds differently."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # other tests use the other cores
    command = [sys.executable, "-m", "vlmfix", "eval", "--limit", "10", "--output", str(tmp_path), "--json"]
    subprocess.run(command, env=env, check=True, capture_output=True)
    fresh = [Run.read(path.parent) for path in tmp_path.rglob("records.jsonl")]
    assert len(fresh) == len(main_job)
    texts_by_run = {_asked(run): {_question(record): record["text"] for record in run.records} for run in main_job}
    for run in fresh:
        texts = texts_by_run[_asked(run)]
        same = [record["text"] == texts[_question(record)] for record in run.records if _question(record) in texts]
        assert len(same) >= 10 and sum(same) >= 0.95 * len(same), run.label


def _asked(run):
    return run.header["identity"]["benchmark"], run.label


def _question(record):
    return *record["image"], record["prompt"]
