"""The evaluation from Python: what a task is, and that it does what the command does."""

import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlmfix
from vlmfix.cli import app
from vlmfix.cli.evaluate import evaluate as command
from vlmfix.eval.api import Task, compare, evaluate, prepare
from vlmfix.eval.benchmarks.benchmark import FileOptions
from vlmfix.eval.pictures.data import EMBEDDED
from vlmfix.eval.run.files import compare_files
from vlmfix.eval.run.protocols import PROTOCOLS
from vlmfix.hooks import VHR

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def loaded():
    return vlmfix.load("organism")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return Task("organism", "none,vhr", "chair,pope", data="organism", limit=6, max_new_tokens=24, output=str(folder))


@pytest.fixture(scope="module")
def runs(task, loaded):
    return evaluate(task, loaded=loaded)


# What a task is


def test_methods_and_benchmarks_in_every_form():
    task = Task(methods="none, var:p=0.4,rho=0.8,vhr", benchmarks="chair, pope")
    assert task.methods == ("none", "var:p=0.4,rho=0.8", "vhr") and task.benchmarks == ("chair", "pope")
    listed = Task(methods=["none", VHR(), ("vhr:alpha=1.5", "pai"), None], benchmarks=["chair"])
    assert listed.methods == ("none", "vhr", "vhr:alpha=1.5+pai", "none") and listed.benchmarks == ("chair",)


def test_a_task_goes_through_json():
    task = Task(methods=[VHR(alpha=1.5)], protocol="pai-512", limit=3, controls=True, output=Path("there"))
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
    with pytest.raises(ValueError, match="a task has no 'metod'; it has model, methods"):
        Task.from_json({"metod": "none"})


def test_its_fields_are_the_options_of_the_command():
    options = set(inspect.signature(command).parameters) - {
        "markdown",
        "as_csv",
        "latex",
        "as_json",
        "full",
        "processes",
    }
    renamed = {"method": "methods", "benchmark": "benchmarks"}
    assert {renamed.get(option, option) for option in options} == {field.name for field in fields(Task)}
    defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    asked_by_default = Task(
        model=defaults["model"],
        methods=defaults["method"] or Task().methods,
        output=defaults["output"],
        batch_size=defaults["batch_size"],
    )
    assert asked_by_default == Task()


def test_what_is_left_open_is_filled_in():
    plain = Task().resolved()
    assert (plain.benchmarks, plain.decoding, plain.seed) == (("chair", "pope"), "greedy", 0)
    assert plain.data in EMBEDDED
    assert Task(which="opera500").resolved().data == "coco"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_fills_in_and_is_overridden(name):
    protocol = PROTOCOLS[name]
    task = Task(protocol=name, images="val2014").resolved()
    assert (task.benchmarks, task.data, task.which) == ((protocol.benchmark,), "coco", protocol.images)
    assert (task.prompt, task.max_new_tokens, task.decoding) == (
        protocol.prompt,
        protocol.max_new_tokens,
        protocol.decoding,
    )
    assert task.seed == protocol.seed and task.resolved() == task, "nothing is left to fill in"
    own = Task(
        protocol=name, data="organism", max_new_tokens=3, prompt="{question}?", decoding="beam2", seed=9
    ).resolved()
    assert (own.data, own.which, own.max_new_tokens, own.prompt) == ("organism", None, 3, "{question}?")
    assert (own.decoding, own.seed) == ("beam2", 9)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"protocol": "pai-521"}, "unknown protocol 'pai-521'; did you mean 'pai-512'?"),
        ({"protocol": "pai-512"}, "name their folder with --images"),
        ({"protocol": "pai-512", "benchmarks": "pope", "data": "organism"}, "is of chair; leave out --benchmark"),
        ({"benchmarks": "chiar"}, "unknown benchmark 'chiar'; did you mean 'chair'?"),
        ({"benchmarks": "pope", "prompt": "What?"}, "expected {question} in it"),
        ({"benchmarks": "hallusionbench", "parser": "margin"}, "give a parser, not the margin"),
        ({"methods": "vhrr"}, "unknown method 'vhrr'"),
        ({"methods": ()}, "nothing to do: give at least one benchmark and one method"),
        ({"variant": "rorbach"}, "did you mean 'rohrbach'"),
        ({"parser": "pop"}, "did you mean 'pope'"),
        ({"decoding": "beam"}, "expected greedy, beam5"),
        ({"data": "nowhere"}, "nowhere does not exist"),
        ({"which": "first501"}, "is no list of images"),
        ({"limit": 0}, "expected a number of pictures above 0"),
        ({"speed": "vhr"}, "expected an accelerator"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(choices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(Task(**choices))


@pytest.mark.parametrize(
    ("choices", "message"),
    [({"dtype": "float33"}, "expected float32, bfloat16"), ({"quantize": "2bit"}, "expected 8bit or 4bit")],
)
def test_mistakes_in_how_to_load(choices, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Task("organism", benchmarks="chair", data="organism", limit=1, **choices))


# Asking and comparing


def test_python_does_what_the_command_does(runs, task):
    args = ["eval", "--model", "organism", "--data", "organism", "--limit", "6", "--max-new-tokens", "24", "--json"]
    args += ["--method", "none,vhr", "--benchmark", "chair,pope", "--output", task.output]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    by_command = json.loads(done.stdout)
    folders = [run["folder"] for comparison in by_command for run in comparison["runs"]]
    assert folders == [str(run.folder) for run in runs], "the same folders, and nothing is asked twice"
    by_python = json.loads(json.dumps([comparison.to_json() for comparison in compare(runs)]))
    assert [{**comparison, "flags": []} for comparison in by_python] == [{**one, "flags": []} for one in by_command]
    assert all(isinstance(comparison["flags"], list) for comparison in by_command)


def test_the_task_is_kept_with_the_answers(runs, task, loaded, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("finished runs ask nothing")

    for run in runs:
        kept = Task.from_json(run.header["task"])
        assert kept == task.resolved()
    monkeypatch.setattr("vlmfix.eval.run.runner.answered_batches", refuse)
    again = evaluate(Task.from_json(runs[0].header["task"]), loaded=loaded)
    assert [run.folder for run in again] == [run.folder for run in runs]
    assert [run.records for run in again] == [run.records for run in runs]


def test_controls_and_accelerators(task):
    setup = prepare(replace(task, methods="none,vhr", controls=True))
    names = [tuple(type(part).__name__ for part in method) for method in setup.methods]
    assert names == [(), ("VHR",)] + [("VHR",)] * (len(names) - 2) and len(names) > 2
    faster = prepare(replace(task, methods="none,contrast", speed="pyramiddrop"))
    assert [[type(part).__name__ for part in method] for method in faster.methods] == [
        [],
        ["PyramidDrop"],
        ["Contrast", "PyramidDrop"],
    ]


def test_runs_are_compared_from_their_folders(runs):
    folders = [run.folder for run in runs]
    from_disk, in_memory = compare(folders, n_resamples=50), compare(runs, n_resamples=50)
    assert [c.rows for c in from_disk] == [c.rows for c in in_memory]
    strict = compare(folders, options=FileOptions(variant="strict", parser="strict"), n_resamples=50)
    assert [c.title for c in strict] == ["CHAIR (strict)", "POPE (parser strict)"]
    with pytest.raises(ValueError, match="truth, baseline: only with --benchmark"):
        compare(folders, options=FileOptions(truth="coco"), baseline="a.jsonl")


def test_files_and_runs_are_compared_in_one_way(tmp_path, runs):
    for name, text in (("plain", "A dog."), ("other", "A cat and a dog.")):
        lines = [json.dumps({"image_id": image, "caption": text}) + "\n" for image in (42, 73, 74)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    paths = [tmp_path / "plain.jsonl", tmp_path / "other.jsonl"]
    files, by_opera = compare(paths, benchmark="chair", n_resamples=50)  # both CHAIRs
    assert "opera" in by_opera.title
    assert files.rows == compare_files(paths, "chair", n_resamples=50).rows
    assert [row.method for row in files.rows] == ["plain", "other"] and files.baseline == "`plain`"
    assert [(row.n, row.answers) for row in files.rows] == [(3, 3), (3, 3)]
    of_runs = compare(runs[:2], n_resamples=50)[0]
    assert type(files) is type(of_runs) and files.to_json().keys() >= of_runs.to_json().keys()
    with pytest.raises(ValueError, match="is no run of `vlmfix eval`; to score captions or answers in a file"):
        compare(paths)


def test_comparing_imports_no_torch(runs):
    code = (
        "import sys; from vlmfix.eval.api import Task, compare, prepare; prepare(Task(data='organism', limit=6));"
        "assert len(compare(sys.argv[1:], n_resamples=20)) == 2; assert 'torch' not in sys.modules"
    )
    folders = [str(run.folder) for run in runs]
    subprocess.run([sys.executable, "-c", code, *folders], cwd=ROOT, check=True, capture_output=True)
