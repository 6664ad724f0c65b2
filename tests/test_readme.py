"""The README's code runs, its paths exist, and its figures are what the main job prints."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmfix.cli import app
from vlmfix.eval.report import markdown
from vlmfix.eval.report.study import study
from vlmfix.eval.run.results import Run, compare
from vlmfix.hooks import REGISTRY
from vlmfix.method.registry import method_class

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MAIN_JOB = ROOT / "tests" / "data" / "main_job.json.gz"
"""Written by `vlmfix eval`; of the records only what was asked and the answer."""


def test_python_blocks_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    said = capsys.readouterr().out.splitlines()
    assert len(blocks) == 3 and said[0].startswith("The image shows a person in a grassy field.")
    assert float(said[1].split()[0]) > 0 and "visual_sinks" in said[1]
    assert said[2] in ("Yes", "No", "Yes.", "No.")


def test_commands_exist():
    for line in re.findall(r"^vlmfix (.*)", README, re.MULTILINE):
        command, *rest = shlex.split(line, comments=True)
        shown = CliRunner().invoke(app, [command, *rest, "--help"]).stdout
        assert all(option in shown for option in rest if option.startswith("--")), line


def test_the_file_tree_is_true():
    tree = README.split("## Where things are")[1].split("```")[1]
    folder = ""
    for line in filter(None, tree.splitlines()):
        name = line.split()[0]
        folder, path = (name, name) if not line.startswith(" ") else (folder, folder + name)
        assert (ROOT / path).exists(), path
    files = {p.name for p in (ROOT / "vlmfix").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert all(f"  {name} " in tree for name in files), "every module of the core is in the tree"


def test_table_of_methods():
    table = CliRunner().invoke(app, ["methods", "--markdown"]).stdout
    block = README.partition("<!-- methods: vlmfix methods --markdown -->\n")[2].partition("<!-- end of methods -->")[0]
    assert block == table and table.count("\n") == 2 + len(REGISTRY)
    assert all(method_class(name).expect for name in REGISTRY)


def figures(text):
    """Table title -> (figure, method) -> numbers: the figure, its interval, its difference and its interval."""
    tables, title, methods = {}, None, []
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if re.match(r"\| (CHAIR|POPE).*pictures", line):
            title, methods = cells[0], cells[1:]
            tables[title] = {}
        elif title and line.startswith("| ") and len(cells) == len(methods) + 1:
            for method, cell in zip(methods, cells[1:], strict=True):
                numbers = re.findall(r"[-+]?\d+\.\d+", cell.replace("−", "-"))
                tables[title][cells[0], method] = [float(x) for x in numbers]
    return tables


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The runs that the main job left: what it asked, and every answer."""
    folder, runs = tmp_path_factory.mktemp("main"), []
    for number, run in enumerate(json.loads(gzip.decompress(MAIN_JOB.read_bytes()))):
        path = folder / str(number)
        path.mkdir()
        (path / "run.json").write_text(json.dumps(run["header"]))
        (path / "records.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in run["records"]))
        runs.append(Run.read(path))
    return runs


def test_figures_are_those_of_the_main_jobs_answers(main_job):
    assert {run.command for run in main_job} == {"vlmfix eval"} and len(main_job) == 6
    computed = figures("\n".join(markdown.tables(study(comparison)) for comparison in compare(main_job)))
    printed = figures(README.split("<!-- results: vlmfix eval -->")[1].split("<!-- end of results -->")[0])
    assert len(printed) == 2 and all(len(rows) >= 18 for rows in printed.values())
    for title, rows in printed.items():
        assert rows == computed[title], title


def test_the_main_job_still_gives_these_answers(main_job, tmp_path):
    """On its first 20 pictures: to the letter, but for the few answers that another processor rounds differently."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # other tests use the other cores
    command = [sys.executable, "-m", "vlmfix", "eval", "--limit", "20", "--output", str(tmp_path), "--json"]
    subprocess.run(command, env=env, check=True, capture_output=True)
    fresh = [Run.read(path.parent) for path in tmp_path.rglob("records.jsonl")]
    assert len(fresh) == len(main_job)
    texts_by_run = {_asked(run): {_question(record): record["text"] for record in run.records} for run in main_job}
    for run in fresh:
        texts = texts_by_run[_asked(run)]
        same = [record["text"] == texts[_question(record)] for record in run.records if _question(record) in texts]
        assert len(same) >= 20 and sum(same) >= 0.95 * len(same), run.label


def _asked(run):
    return run.header["identity"]["benchmark"], run.label


def _question(record):
    return *record["image"], record["prompt"]
