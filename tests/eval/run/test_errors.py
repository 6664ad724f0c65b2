"""A picture or question that cannot be processed ends that question alone, with a recorded error."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import vlmfix
from vlmfix.cli import app
from vlmfix.eval.benchmarks.benchmark import benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run import runner, sharing
from vlmfix.eval.run.results import Run, compare
from vlmfix.eval.run.workers import Workers

SCENES = sorted((Path(__file__).parents[3] / "assets" / "organism" / "test" / "images").glob("*.webp"))[:5]


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("no picture")


def cut(path):
    path.write_bytes(path.read_bytes()[:60])


def bomb(path):
    Image.new("1", (20000, 20000)).save(path, "PNG")


def line(path):
    Image.new("RGB", (3000, 10)).save(path, "PNG")


@pytest.fixture(scope="module")
def qwen():
    return vlmfix.load("organism-qwen")


def own_data(folder, damage):
    """Own questions, two a picture, on pictures some of which are damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    for number, scene in enumerate(SCENES):
        shutil.copy(scene, folder / f"{number}.png")
        for word in ("dog", "cup"):
            question = {"image": f"{number}.png", "question": f"Is there a {word} in the image?", "label": "no"}
            rows.append({"id": f"{number}-{word}", **question})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for number, spoil in damage.items():
        spoil(folder / f"{number}.png")
    return Data.load(str(folder))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.dictionaries(st.integers(0, 4), st.sampled_from([empty, text, cut, bomb, line]), min_size=1, max_size=4),
    size=st.sampled_from([1, 3, 32]),
)
def test_every_question_is_answered_or_has_its_error(qwen, tmp_path, damage, size):
    shutil.rmtree(tmp_path)
    methods = [(), vlmfix.method.registry.parse("vhr")]
    whole = runner.answer_all(*qwen, (), benchmark("yesno"), own_data(tmp_path / "data", {}), tmp_path / "whole")
    data = own_data(tmp_path / "data", damage)
    runs = runner.answer_each(*qwen, methods, benchmark("yesno"), data, tmp_path / "runs", batch_size=size)
    said = {record["id"]: record["text"] for record in whole.records}
    damaged = {f"{number}-{word}" for number in damage for word in ("dog", "cup")}
    for run in runs:
        assert {error["id"] for error in run.errors} == damaged
        assert {record["id"] for record in run.records} == set(said) - damaged
        for error in run.errors:
            assert error["image"] in error["error"] and error["prompt"].startswith("Is there a ")
    assert all(record["text"] == said[record["id"]] for record in runs[0].records)
    notes = " ".join(compare(runs, 10)[0].notes)
    assert f"none: {len(damaged)} of 10 questions could not be asked and are left out" in notes

    data = own_data(tmp_path / "data", {})
    again = runner.answer_each(*qwen, methods, benchmark("yesno"), data, tmp_path / "runs", beside=True)
    assert not any(run.errors for run in again) and all(len(run.records) == 10 for run in again)


def test_the_exit_code_says_so(tmp_path):
    folder = own_data(tmp_path / "data", {1: cut, 3: bomb}).folder
    arguments = ["eval", "--data", folder, "--benchmark", "yesno", "--method", "none", "--output", tmp_path / "runs"]
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 3 and "accuracy" in done.stdout
    for name in ("1.png", "3.png"):
        assert f"({name}): " in done.stderr
    assert "questions that could not be asked: 4" in done.stderr
    (run,) = (Run.read(path.parent) for path in (tmp_path / "runs").rglob("run.json"))
    assert len(run.errors) == 4 and len(run.records) == 6


def test_where_nothing_can_be_asked_the_run_ends_in_a_sentence(tmp_path):
    folder = own_data(tmp_path / "data", dict.fromkeys(range(5), text)).folder
    arguments = ["eval", "--data", folder, "--benchmark", "yesno", "--method", "none", "--output", tmp_path / "runs"]
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 1 and "is no image that can be read" in done.stderr and "Traceback" not in done.stderr


def test_a_question_that_the_model_fails_on_is_recorded_but_not_a_fault_of_all(monkeypatch, tmp_path):
    ask_in_turns = sharing.ask_in_turns
    prompts_seen = []

    def fails_on(word):
        def ask(askers, questions, **options):
            prompts_seen.extend(prompt for _, prompt in questions)
            if any(word in prompt for _, prompt in questions):
                raise IndexError("index out of range in self")
            return ask_in_turns(askers, questions, **options)

        return ask

    model, processor = vlmfix.load("organism")
    data = own_data(tmp_path / "data", {})
    monkeypatch.setattr(sharing, "ask_in_turns", fails_on("dog"))
    run = runner.answer_all(model, processor, (), benchmark("yesno"), data, tmp_path / "some")
    assert len(run.records) == len(run.errors) == 5 and run.errors[0]["error"].endswith(
        ".png: index out of range in self"
    )
    prompts_seen.clear()
    monkeypatch.setattr(sharing, "ask_in_turns", fails_on("Is"))
    with pytest.raises(IndexError):
        runner.answer_all(model, processor, (), benchmark("yesno"), data, tmp_path / "all")
    assert len(prompts_seen) == 10 + runner.UNEXPLAINED, "all at once, then one by one until it is plain"


def test_processes_gather_their_errors(tmp_path):
    model, processor = vlmfix.load("organism")
    data = own_data(tmp_path / "data", {0: cut, 3: text})
    for rank in range(2):
        options = {"workers": Workers(rank, 2), "max_new_tokens": 1}
        try:
            runner.answer_all(model, processor, (), benchmark("yesno"), data, tmp_path, **options)
        except ValueError as error:
            assert rank == 0 or "no image that can be read" in str(error)
    run = runner.answer_all(model, processor, (), benchmark("yesno"), data, tmp_path, max_new_tokens=1)
    assert len(run.errors) == 4 and len(run.records) == 6
    assert [path.name for path in run.folder.glob("errors*")] == ["errors.jsonl"]
