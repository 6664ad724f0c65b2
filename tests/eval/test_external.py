"""Published files of captions and answers through `vlmfix score --benchmark`: the references' figures, or one sentence."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vlmfix.cli import app
from vlmfix.eval.api import compare
from vlmfix.eval.benchmarks import hallusionbench, mme, pope_questions
from vlmfix.eval.benchmarks.benchmark import BENCHMARKS, FileOptions, benchmark_class
from vlmfix.eval.scorers import chair
from vlmfix.eval.scorers.chair import variants

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
CAPTIONS = DATA / "chair" / "captions"
ANSWERS = DATA / "pope" / "answers"
SPOKEN = "paint-pope-random"  # answers in sentences
HONEST = json.loads((DATA / "chair" / "honesty_reference.json").read_text("utf-8"))
MME, HALLUSION, DASH = (
    json.loads((DATA / "other" / name / "synthetic.json").read_text("utf-8"))
    for name in ("mme", "hallusionbench", "dashb")
)


def run(*args):
    return CliRunner().invoke(app, ["score", *map(str, args)])


def scored(*args):
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    comparison, *_ = json.loads(done.stdout)  # captions are scored by both CHAIRs
    return comparison


def sentence(*args):
    """The one line that a mistake ends in."""
    done = run(*args)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert done.exit_code == 1 and len(lines) == 1 and lines[0].startswith("vlmfix: "), (done.output, done.exception)
    return lines[0]


def values(row):
    return {name: estimate["value"] for name, estimate in row["estimates"].items()}


def packed(path):
    return json.loads(gzip.decompress(path.read_bytes()))


def captions(name):
    return CAPTIONS / f"{name}.jsonl.gz"


def caption_lines(name):
    return [json.loads(line) for line in gzip.decompress(captions(name).read_bytes()).splitlines()]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


# CHAIR


@cache
def pair(variant):
    """Files by the command line; the control of the first two is in the reference."""
    names = ("opera/llava-1.5-greedy", "opera/llava-1.5-ours", "pope/Instruction2_instructblip")
    return scored(
        *map(captions, names if variant == "rohrbach" else names[:2]), "--benchmark", "chair", "--variant", variant
    )


@pytest.mark.parametrize("variant", ["rohrbach", "opera_approx"])
def test_chair_as_in_the_reference(variant):
    found = pair(variant)
    assert (found["title"], found["variant"], found["truth"]) == (
        f"CHAIR ({variant})",
        variant,
        "COCO 2014 val and train",
    )
    for row, name in zip(found["rows"], ("opera/llava-1.5-greedy", "opera/llava-1.5-ours"), strict=False):
        expected, figures = HONEST["columns"][name], values(row)
        summary = (
            packed(DATA / f"chair/scores/rohrbach/{name}.json.gz")["overall"]
            if variant == "rohrbach"
            else json.loads((DATA / "chair/scores/opera_approx/summary.json").read_text())[name]
        )
        assert row["answers"] == summary["n"] == 500 and row["method"] == Path(name).name
        for ours, theirs in {"CHAIR_S": "CHAIRs", "CHAIR_I": "CHAIRi", "recall": "Recall"}.items():
            assert figures[ours] == pytest.approx(summary[theirs], abs=1e-12), ours
        for ours, theirs in {"words": "words", "repetition": "rep_share"}.items():
            assert figures[ours] == pytest.approx(expected[theirs], abs=1e-12), ours
        if variant == "rohrbach":
            assert figures["objects"] == pytest.approx(expected["objects_per_caption"], abs=1e-12)
            for ours, theirs in {"F1": "F1", "CHAIR_I_unique": "CHAIRi_unique", "precision": "Precision"}.items():
                assert figures[ours] == pytest.approx(expected["rohrbach"][theirs], abs=1e-12), ours


@pytest.mark.parametrize("variant", ["rohrbach", "opera_approx"])
def test_truncation_control_as_in_the_reference(variant):
    files = [captions(f"opera/llava-1.5-{name}") for name in ("greedy", "ours")]
    (comparison,) = compare(files, benchmark="chair", options=FileOptions(variant=variant), n_resamples=2000)
    first, second = comparison.rows
    expected = HONEST["truncation_control"][f"{variant}: opera/llava-1.5-greedy -> opera/llava-1.5-ours"]
    assert first.control is None and first.differences is None
    for ours, theirs in {"chair_s": "dCHAIRs", "f1": "dF1"}.items():
        found = getattr(second.control, ours)
        assert found.value == pytest.approx(expected[theirs], abs=1e-12)
        assert [found.low, found.high] == pytest.approx(expected[f"{theirs}_bootstrap_95"], abs=1e-12)


def test_three_files_compare_on_the_images_in_common():
    found, names = pair("rohrbach"), ("opera/llava-1.5-greedy", "pope/Instruction2_instructblip")
    one, other = ({line["image_id"] for line in caption_lines(name)} for name in names)
    _, second, third = found["rows"]
    assert third["control"]["images"] == third["differences"]["CHAIR_S"]["n"] == len(one & other) > 0
    assert third["differences"]["CHAIR_S"]["left_out"] == len(one ^ other)
    assert second["control"]["images"] == 500 and second["differences"]["CHAIR_S"]["left_out"] == 0
    note = f"Instruction2_instructblip: compared on the {len(one & other)} images in common with llava-1.5-greedy, "
    assert f"{note}{len(one ^ other)} left out" in found["notes"]


def test_table(tmp_path):
    names = ("opera/llava-1.5-greedy", "opera/llava-1.5-ours", "pope/Instruction2_instructblip")
    files = [write(tmp_path / f"{Path(name).name}.jsonl", caption_lines(name)[:100]) for name in names]
    done = run(*files, "--benchmark", "chair", "--variant", "strict", "--full")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("CHAIR (strict)")
    for part in (
        "CHAIR_I_unique %",
        "repetition %",
        "CHAIR_S %          F1 %",  # and beneath: at equal recall
        "at equal      at equal",
        "images in common",
    ):
        assert part in done.stdout
    assert "paired difference to llava-1.5-greedy" in done.stdout and "left out" in done.stdout


def test_baseline(tmp_path):
    few = [caption_lines(f"opera/llava-1.5-{name}")[:40] for name in ("greedy", "ours", "beam5")]
    a, b, c = (write(tmp_path / f"{name}.jsonl", lines) for name, lines in zip("abc", few, strict=True))
    plain = scored(a, b, c, "--benchmark", "chair")
    assert [row["method"] for row in plain["rows"]] == ["a", "b", "c"] and plain["baseline"] == "a"
    for other in (
        scored(a, b, c, "--benchmark", "chair", "--baseline", c),
        scored(a, b, "--benchmark", "chair", "--baseline", c),
    ):
        assert [row["method"] for row in other["rows"]] == ["c", "a", "b"] and other["baseline"] == "c"
        assert other["rows"][0]["differences"] is None
        there = plain["rows"][2]["differences"]["CHAIR_S"]["value"]
        assert other["rows"][1]["differences"]["CHAIR_S"]["value"] == pytest.approx(-there)
        assert {row["method"]: row["estimates"] for row in other["rows"]} == {
            row["method"]: row["estimates"] for row in plain["rows"]
        }
    (tmp_path / "x").mkdir()
    again = scored(a, write(tmp_path / "x" / "a.jsonl", few[1]), "--benchmark", "chair")
    assert [row["method"] for row in again["rows"]] == [str(a), str(tmp_path / "x" / "a.jsonl")]
    assert "got 2 files, 1 different ones" in sentence(a, a, "--benchmark", "chair")


def test_forms_and_keys(tmp_path):
    lines = caption_lines("opera/llava-1.5-greedy")[:20]
    plain = write(tmp_path / "plain.jsonl", lines)
    odd = [
        {"image": f"COCO_val2014_{line['image_id']:012}.jpg", "said": line["caption"], "text": "Describe."}
        for line in lines
    ]
    pretty = tmp_path / "pretty.json"
    pretty.write_text("\n".join(json.dumps(line, indent=2) for line in odd))
    zipped = tmp_path / "zipped.json.gz"
    zipped.write_bytes(gzip.compress(json.dumps(odd).encode()))
    expected = scored(plain, "--benchmark", "chair")["rows"][0]["estimates"]
    for path in (pretty, zipped):
        found = scored(path, "--benchmark", "chair", "--caption-key", "said")
        assert found["rows"][0]["estimates"] == expected
    assert "expected a text under 'sad'" in sentence(pretty, "--benchmark", "chair", "--caption-key", "sad")


def test_opera_stands_in_with_one_line(monkeypatch, tmp_path):
    def missing():
        raise ValueError("the variant opera needs NLTK")

    monkeypatch.setattr(variants, "_nltk", missing)
    path = write(tmp_path / "a.jsonl", caption_lines("opera/llava-1.5-greedy")[:5])
    done = run(path, "--benchmark", "chair", "--variant", "opera", "--json")
    assert done.stderr == "note: opera_approx stands in for opera: the variant opera needs NLTK\n"
    assert json.loads(done.stdout)[0]["variant"] == "opera_approx"
    assert "CHAIR (opera_approx)" in run(path, "--benchmark", "chair", "--variant", "opera").stdout


def test_ground_truth_of_ones_own(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"image": "1.jpg", "caption": "A dog and a cat."}, {"image": 2, "caption": ""}])
    own = write(tmp_path / "truth.jsonl", [{"image": 1, "objects": ["dog"]}, {"image": 2, "objects": []}])
    (tmp_path / "masks.json").write_text('{"objects": ["cat", "dog"], "images": {"1": "2", "2": "0"}}')
    folder = tmp_path / "coco"
    folder.mkdir()
    (folder / "instances.json").write_text(json.dumps({
        "images": [{"id": 1}, {"id": 2}], "categories": [{"id": 5, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 5}],
    }))  # fmt: skip
    for place in (own, tmp_path / "masks.json", folder, folder / "instances.json"):
        found = scored(path, "--benchmark", "chair", "--truth", place)
        assert values(found["rows"][0])["CHAIR_I"] == 0.5 and values(found["rows"][0])["CHAIR_S"] == 0.5
        assert any("no human captions were read" in note for note in found["notes"])
        assert "c: 1 of 2 captions are empty" in found["notes"]
    (folder / "captions.json").write_text(json.dumps({
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [{"id": n, "image_id": n, "caption": "Cats."} for n in (1, 2)],
    }))  # fmt: skip
    assert values(scored(path, "--benchmark", "chair", "--truth", folder)["rows"][0])["CHAIR_I"] == 0
    (tmp_path / "words.txt").write_text("dog, hound\ncat\n")
    write(own, [{"image": 1, "objects": ["hound"]}, {"image": 2, "objects": []}])
    assert (
        values(scored(path, "--benchmark", "chair", "--truth", own, "--synonyms", tmp_path / "words.txt")["rows"][0])[
            "recall"
        ]
        == 1
    )
    assert "holds 0 files instances*.json" in sentence(path, "--benchmark", "chair", "--truth", tmp_path)
    assert "COCO only" in sentence(path, "--benchmark", "chair", "--truth", own, "--synonyms", tmp_path / "words.txt", "--variant", "strict")  # fmt: skip


def test_files_without_an_image_in_common(tmp_path):
    lines = caption_lines("opera/llava-1.5-greedy")
    a, b = write(tmp_path / "a.jsonl", lines[:5]), write(tmp_path / "b.jsonl", lines[5:9])
    found = scored(a, b, "--benchmark", "chair")
    assert found["rows"][1]["differences"]["F1"]["value"] is None and found["rows"][1]["control"] is None
    assert "b: compared on the 0 images in common with a, 9 left out" in found["notes"]
    assert run(a, b, "--benchmark", "chair").exit_code == 0


def test_every_verdict_is_explained(tmp_path):
    path = write(tmp_path / "a.jsonl", caption_lines("opera/llava-1.5-greedy")[:5])
    scored(path, "--benchmark", "chair", "--variant", "rohrbach", "--explain", tmp_path / "verdicts.jsonl")
    verdicts = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [verdict["image_id"] for verdict in verdicts] == [
        line["image_id"] for line in caption_lines("opera/llava-1.5-greedy")[:5]
    ]
    for verdict in verdicts:
        assert verdict["method"] == "a"
        for mention in verdict["mentions"]:
            assert verdict["caption"][mention["start"] : mention["end"]] == mention["text"]
    before = path.read_text()
    assert "is one of the files to read" in sentence(path, "--benchmark", "chair", "--explain", path)
    assert path.read_text() == before
    assert "cannot write" in sentence(path, "--benchmark", "chair", "--explain", path / "such")
    answers = ANSWERS / f"{SPOKEN}.answers.jsonl.gz"
    asked = ("--benchmark", "pope", "--questions", ANSWERS / f"{SPOKEN}.questions.jsonl.gz")
    scored(answers, *asked, "--explain", tmp_path / "verdicts.jsonl")
    verdicts = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == 910 and {"id", "answer", "prediction", "label", "correct"} < verdicts[0].keys()


# POPE

EVALUATORS = {
    "pope": "pope_evaluate_py",
    "negword": "opera_pai",
    "vcd": "vcd",
    "repope": "repope",
    "lmms_eval": "lmms_eval_0.7.3",
    "vlmevalkit": "vlmevalkit_exact_matching",
}


@pytest.mark.parametrize("name", [SPOKEN, "synthetic-edge"])
@pytest.mark.parametrize("parser", EVALUATORS)
def test_pope_as_in_the_reference(name, parser):
    files = (ANSWERS / f"{name}.answers.jsonl.gz", "--questions", ANSWERS / f"{name}.questions.jsonl.gz")
    found = scored(*files, "--benchmark", "pope", "--parser", parser)
    expected = packed(DATA / f"pope/reference/{name}.json.gz")["metrics"][EVALUATORS[parser]]
    (row,) = found["rows"]
    figures = values(row)
    assert (found["edition"], found["parser"]) == ("custom", parser)
    if parser == "vlmevalkit":
        assert row["unparsed"] == expected["unknown"]
        expected = {name: expected[key] / 100 for name, key in (("accuracy", "acc"), ("precision", "precision"), ("recall", "recall"), ("f1", "Overall(F1)"))}  # fmt: skip
    if parser == "lmms_eval":  # its other figures pass over wrong answers
        expected = {"accuracy": expected["accuracy"]}
    if parser == "repope":
        assert row["unparsed"] == expected["unparsed"]
    for key in {"accuracy", "precision", "recall", "f1", "yes_ratio"} & expected.keys():
        assert figures["F1" if key == "f1" else key] == pytest.approx(expected[key], abs=1e-12), key


@pytest.mark.parametrize("split", pope_questions.SPLITS)
def test_published_answers_to_published_questions(split):
    name = f"cd_rethink-llava7b-coco-{split}-greedy"
    path = ANSWERS / f"{name}.answers.jsonl.gz"
    found = scored(path, "--benchmark", "pope", "--split", split, "--parser", "pope")
    expected = packed(DATA / f"pope/reference/{name}.json.gz")["metrics"]["pope_evaluate_py"]
    assert found["edition"] == f"coco/{split}" and found["title"] == f"POPE coco/{split}, parser pope"
    assert values(found["rows"][0])["F1"] == pytest.approx(expected["f1"], abs=1e-12)
    others = [other for other in pope_questions.SPLITS if other != split]
    assert "answers are to another question" in sentence(path, "--benchmark", "pope", "--split", others[0])
    done = sentence(path, "--benchmark", "pope", "--source", "coco_first_release", "--split", "random")
    assert "answers belong to no question" in done and str(path) in done


def test_answers_are_joined_by_id(tmp_path):
    questions = pope_questions.load("gqa", "popular")
    lines = [{"question_id": q.id, "response": q.label} for q in questions]
    right = write(tmp_path / "right.jsonl", lines[::-1])
    wrong = write(tmp_path / "yes.jsonl", [{**line, "response": "yes"} for line in lines])
    found = scored(right, wrong, "--benchmark", "pope", "--source", "gqa", "--split", "popular")
    assert [values(row)["accuracy"] for row in found["rows"]] == [1, 0.5]
    assert found["rows"][1]["differences"]["accuracy"]["value"] == -0.5
    for name, message in (("missing-answer", "no answer"), ("duplicate-answer", "more than one answer")):
        files = (
            ANSWERS / f"synthetic-{name}.answers.jsonl.gz",
            "--questions",
            ANSWERS / f"synthetic-{name}.questions.jsonl.gz",
        )
        assert message in sentence(*files, "--benchmark", "pope")


def test_other_labels(tmp_path):
    questions = pope_questions.load("coco", "random")
    path = write(tmp_path / "a.jsonl", [{"question_id": q.id, "answer": q.label} for q in questions])
    labels = [{"question_id": q.id, "image": q.image, "text": q.text, "label": "yes"} for q in questions[:100]]
    found = scored(
        path, "--benchmark", "pope", "--split", "random", "--labels", write(tmp_path / "labels.jsonl", labels)
    )
    assert (found["labels"], found["rows"][0]["answers"], values(found["rows"][0])["accuracy"]) == ("custom", 100, 0.5)


def test_margins(tmp_path):
    questions = write(tmp_path / "q.jsonl", [{"id": n, "image": "a", "question": "?", "label": "yes"} for n in (1, 2)])
    path = write(tmp_path / "a.jsonl", [{"id": 1, "margin": 0.5}, {"id": 2, "p_yes": 0.1, "p_no": 0.2}])
    found = scored(path, "--benchmark", "yesno", "--questions", questions, "--parser", "margin")
    assert values(found["rows"][0])["accuracy"] == 0.5
    assert "give strings" in sentence(path, "--benchmark", "yesno", "--questions", questions)


# The other benchmarks


def test_amber_as_in_the_reference():
    expected = json.loads((DATA / "other/amber/reference.json").read_text())["odd_600"]["parsed"]["Descriminative Task"]
    found = scored(DATA / "other/amber/discriminative_odd_600.json.gz", "--benchmark", "amber", "--parser", "amber")
    printed = ", ".join(f"{key if key == 'F1' else key.lower()} {value}" for key, value in expected.items())
    assert f"discriminative_odd_600: the official script prints {printed}" in found["notes"]
    assert "discriminative_odd_600: 600 of 14216 questions are answered" in found["notes"]
    assert 100 * values(found["rows"][0])["accuracy"] == pytest.approx(expected["Accuracy"], abs=0.06)
    assert [row["group"] for row in found["rows"]][:2] == ["all", "existence"] and found["rows"][0]["answers"] == 600
    assert found["rows"][0]["unparsed"] > 0


def test_only_answers_to_the_same_questions_compare(tmp_path):
    said = [{"id": number, "response": "Yes"} for number in range(1005, 1105)]
    a, b, c = (write(tmp_path / f"{name}.jsonl", said[:n]) for name, n in (("a", 100), ("b", 99), ("c", 100)))
    found = scored(a, b, c, "--benchmark", "amber")
    of = {(row["method"], row["group"]): row["differences"] for row in found["rows"]}
    assert of["b", "all"] is None and of["c", "all"]["accuracy"]["value"] == 0
    assert "b: not compared in all, where a answers other questions" in found["notes"]
    assert not any("c: not compared" in note for note in found["notes"])


def test_amber_passes_over_descriptions(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": 1, "response": "A dog."}, {"id": 1005, "response": "Yes"}])
    assert scored(path, "--benchmark", "amber")["rows"][0]["answers"] == 1
    write(path, [{"id": 1, "response": "A dog."}])
    assert "none of them answers one of AMBER's questions" in sentence(path, "--benchmark", "amber")


def cell(text):
    return re.sub(r"[\t\r\n]", " ", text)


def test_mme_as_in_the_reference(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    for task, rows in MME["answers"].items():
        (results / f"{task}.txt").write_text("".join("\t".join(map(cell, row)) + "\n" for row in rows), "utf-8")
    found = scored(results, "--benchmark", "mme")
    assert [row["group"] for row in found["rows"]] == list(mme.TASKS)
    for row in found["rows"]:
        assert values(row)["score"] == pytest.approx(MME["reference"][row["group"]]["score"])
        assert row["unparsed"] == MME["reference"][row["group"]]["other"]
    assert f"results: {MME['total']:.1f} of 800 points" in found["notes"]
    _, answers = mme.read_results(results)
    path = write(tmp_path / "a.jsonl", [{"id": answer.id, "answer": answer.text} for answer in answers])
    assert "Give the folder of MME's files" in sentence(path, "--benchmark", "mme")
    again = scored(path, "--benchmark", "mme", "--questions", results)
    assert [row["estimates"] for row in again["rows"]] == [row["estimates"] for row in found["rows"]]
    relabelled = tmp_path / "relabelled"
    relabelled.mkdir()
    for task, rows in MME["answers"].items():
        lines = ("\t".join([*map(cell, row[:2]), "Yes"]) + "\n" for row in rows)
        (relabelled / f"{task}.txt").write_text("".join(lines), "utf-8")
    other = scored(results, "--benchmark", "mme", "--questions", relabelled)
    for row in other["rows"]:  # every label is yes there
        assert values(row)["precision"] == 1


@pytest.mark.parametrize("split", ["all", "with_image_951"])
def test_hallusionbench_as_in_the_reference(tmp_path, split):
    def entry(question, answer):
        category, subcategory, number, figure, place = question.id.split("/")
        parts = {"category": category, "subcategory": subcategory, "set_id": number, "figure_id": figure}
        return {**parts, "question_id": place, "question": question.text, "model_prediction": answer}

    questions = hallusionbench.load("all")
    lines = [entry(question, answer) for question, answer in zip(questions, HALLUSION["answers"], strict=True)]
    found = scored(
        write(tmp_path / "a.jsonl", lines), "--benchmark", "hallusionbench", "--split", split, "--parser", "vlmevalkit"
    )
    expected, whole = HALLUSION["reference"][split], found["rows"][0]
    assert {row["group"] for row in found["rows"]} == {"all", "VD", "VS"}
    assert found["split"] == split and whole["answers"] == expected["n"]
    for name in ("aAcc", "fAcc", "qAcc"):
        assert 100 * values(whole)[name] == pytest.approx(expected[name]), name
    assert (split == "all") is not any("178 answers to questions without a figure" in note for note in found["notes"])


def test_dash_as_in_the_reference(tmp_path):
    questions = tmp_path / "dashb.json"
    questions.write_text(json.dumps(DASH["answers"]))
    found = scored(questions, "--benchmark", "dashb", "--questions", questions, "--answer-key", "response")
    expected, figures = DASH["reference"], values(found["rows"][0])
    for ours, theirs in (("accuracy", "ACC"), ("TPR", "TPR"), ("TNR", "TNR"), ("harmonic_mean", "Harmonic Mean")):
        assert figures[ours] == pytest.approx(expected[theirs])
    assert found["rows"][0]["unparsed"] == expected["unparsed"]


def test_questions_of_ones_own(tmp_path):
    asked = [
        {"id": n, "image": f"{n // 2}.jpg", "question": "Is it?", "label": "yes", "group": "ab"[n % 2], "pair": n // 4}
        for n in range(8)
    ]
    questions = write(tmp_path / "q\x1b[31m.jsonl", asked)
    path = write(tmp_path / "a.jsonl", [{"id": n, "answer": "Yes." if n < 6 else "Perhaps"} for n in range(8)])
    found = scored(path, "--benchmark", "yesno", "--questions", questions)
    assert [(row["group"], row["answers"], row["unparsed"]) for row in found["rows"]] == [
        ("all", 8, 2),
        ("a", 4, 1),
        ("b", 4, 1),
    ]
    assert values(found["rows"][0])["pair_accuracy"] == 0.5
    done = run(path, "--benchmark", "yesno", "--questions", questions, "--full")
    assert done.exit_code == 0 and "pair_accuracy" in done.stdout and "\x1b" not in done.stdout
    write(questions, [{**line, "group": "all", "pair": None} for line in asked])
    assert "a group is called 'all'" in sentence(path, "--benchmark", "yesno", "--questions", questions)


# Mistakes


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("c.jsonl"), [{"image_id": 42, "caption": "A dog."}])
    write(Path("far.jsonl"), [{"image_id": 10**9, "caption": "A dog."}])
    write(Path("a.jsonl"), [{"id": 1, "answer": "yes"}])
    write(Path("q.jsonl"), [{"id": 1, "image": "1.jpg", "question": "Is it?", "label": "yes"}])
    Path("torn.jsonl").write_text('{"image_id": 42, "caption": "A d')
    Path("deep.json").write_text('{"annotations": ' + "[" * 100_000)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("c.jsonl --benchmark chiar", "unknown benchmark 'chiar'; did you mean 'chair'?"),
        ("c.jsonl --benchmark chair --variant rorbach", "'rorbach' is no variant of CHAIR; did you mean 'rohrbach'?"),
        ("c.jsonl --benchmark chair --caption-key said", "c.jsonl, line 1 has only 'image_id, caption'; expected a text under"),
        ("c.jsonl --benchmark chair --parser pope", "parser is for pope, amber, mme, hallusionbench, dashb, yesno; chair takes only variant"),
        ("c.jsonl --benchmark chair --truth none.json", "cannot read none.json: No such file or directory"),
        ("c.jsonl --benchmark chair --truth c.jsonl", "line 1 has None; expected a list of names under 'objects'"),
        ("c.jsonl --benchmark chair --truth deep.json", "deep.json is"),
        ("c.jsonl --benchmark chair --synonyms none.txt", "cannot read none.txt"),
        ("c.jsonl --benchmark chair --baseline none.jsonl", "cannot read none.jsonl"),
        ("none.jsonl --benchmark chair", "cannot read none.jsonl: No such file or directory"),
        (". --benchmark chair", "cannot read .: Is a directory"),
        ("torn.jsonl --benchmark chair", "torn.jsonl, line 1 is broken (Unterminated string"),
        ("far.jsonl --benchmark chair", "far.jsonl: 1 of 1 images have no ground truth"),
        ("a.jsonl --benchmark pope", "which questions of POPE were asked? Give either --split (random, popular, adversarial)"),
        ("a.jsonl --benchmark pope --split random --questions q.jsonl", "which questions of POPE were asked?"),
        ("a.jsonl --benchmark pope --split randm", "'randm' is no split of POPE; did you mean 'random'?"),
        ("a.jsonl --benchmark pope --split random --source coca", "'coca' is no source of POPE; did you mean 'coco'?"),
        ("a.jsonl --benchmark pope --split random", "a.jsonl: 2999 questions have no answer"),
        ("a.jsonl --benchmark pope --split random --parser pop", "'pop' is no parser; did you mean 'pope'?"),
        ("a.jsonl --benchmark pope --questions q.jsonl", "q.jsonl, line 1 has None as question_id"),
        ("a.jsonl --benchmark pope --split random --labels q.jsonl", "q.jsonl, line 1 has None as question_id"),
        ("a.jsonl --benchmark yesno", "which questions were asked? Give a file with id, image, question and label"),
        ("a.jsonl --benchmark yesno --questions none.jsonl", "cannot read none.jsonl"),
        ("a.jsonl --benchmark yesno --questions q.jsonl --answer-key said", "a.jsonl, line 1 has no said and no margin"),
        ("a.jsonl --benchmark dashb", "which questions were asked? Give the authors' list of DASH-B"),
        ("a.jsonl --benchmark mme --questions .", "existence has 0 questions"),
        (". --benchmark mme", "existence has 0 questions"),
        ("a.jsonl --benchmark hallusionbench --split half", "'half' is no set of HallusionBench"),
        ("a.jsonl --benchmark hallusionbench --parser margin", "give a parser, not the margin"),
        ("c.jsonl", "c.jsonl is no run of `vlmfix eval`; to score captions or answers in a file, add --benchmark"),
        ("c.jsonl --variant opera --baseline c.jsonl", "baseline: only with --benchmark"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_sentence(here, args, message):
    assert message in sentence(*args.split())


def test_a_sentence_for_any_letters(here):
    write(Path("odd.jsonl"), [{"image_id": "\ud800\x1b", "caption": ""}])
    assert "names no image" in sentence("odd.jsonl", "--benchmark", "chair")
    write(
        Path("odd.jsonl"), [{"id": 1, "image": "a", "question": "?", "label": "yes", "group": g} for g in ("\ud800",)]
    )
    assert run("a.jsonl", "--benchmark", "yesno", "--questions", "odd.jsonl").exit_code == 0


def test_names_of_files_in_any_letters(here):
    name = os.fsdecode(b"odd\xff.jsonl")
    assert r"cannot read odd\udcff.jsonl" in sentence(name, "--benchmark", "chair")
    write(Path(name), [{"image_id": 42, "caption": "A dog."}])
    assert scored(name, "--benchmark", "chair")["baseline"] == r"'odd\udcff'"
    assert run(name, "c.jsonl", "--benchmark", "chair").exit_code == 0


def test_every_option_is_taken_by_some_benchmark():
    taken = {option for name in BENCHMARKS for option in benchmark_class(name).file_options}
    assert taken == {field.name for field in fields(FileOptions)}


def test_imports_no_torch(tmp_path):
    write(tmp_path / "c.jsonl", [{"image_id": 42, "caption": "A dog."}])
    command = ["score", str(tmp_path / "c.jsonl"), "--benchmark", "chair", "--json"]
    code = f"import sys; from vlmfix.cli import app; app({command!r}, standalone_mode=False); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# Anything

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(
    [
        *(
            "image_id",
            "image",
            "caption",
            "text",
            "id",
            "question_id",
            "answer",
            "question",
            "label",
            "objects",
            "group",
        ),
        *(
            "images",
            "annotations",
            "categories",
            "category_id",
            "margin",
            "img_id",
            "object_name",
            "gt",
            "pair",
            "name",
        ),
    ]
)
LIKELY = st.sampled_from([42, "42", "A dog.", "yes", "No", ["dog"], 1, "dog", "1.jpg"]) | ANY
FEW = st.lists(
    st.dictionaries(KEYS, LIKELY | st.lists(st.dictionaries(KEYS, LIKELY), max_size=2), max_size=6), max_size=3
)
FILES = st.tuples(FEW, st.binary(max_size=4) | st.just(b"")).map(
    lambda file: b"".join(json.dumps(entry).encode() + b"\n" for entry in file[0]) + file[1]
)
COMMANDS = (
    ("a.jsonl", "b.jsonl.gz", "--benchmark", "chair", "--truth", "t.json"),
    ("a.jsonl", "--benchmark", "chair", "--caption-key", "caption", "--variant", "strict"),
    ("a.jsonl", "b.jsonl.gz", "--benchmark", "yesno", "--questions", "t.json", "--parser", "sentence"),
    ("a.jsonl", "--benchmark", "pope", "--questions", "t.json"),
    ("a.jsonl", "--benchmark", "dashb", "--questions", "t.json", "--answer-key", "answer"),
    ("a.jsonl", "--benchmark", "chair", "--synonyms", "t.json"),
)


def refused_or_scored(contents, command, as_json):
    """Exit code 0 with figures, or 1 with one line and none."""
    with TemporaryDirectory() as folder:
        for name, content in contents.items():
            (Path(folder) / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        args = [str(Path(folder) / part) if part in contents else part for part in command]
        done = run(*args, *(["--json"] if as_json else []))
    assert done.exit_code in (0, 1) and isinstance(done.exception, SystemExit | None), (done.exception, done.output)
    if done.exit_code == 1:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
        assert len(lines) == 1 and lines[0].startswith("vlmfix: ") and not done.stdout, done.stderr
    elif as_json:
        json.loads(done.stdout)


@settings(max_examples=60, deadline=None)
@given(FILES, FILES, FILES, st.sampled_from(COMMANDS), st.booleans())
def test_any_file_is_scored_or_refused_in_one_line(a, b, truth, command, as_json):
    refused_or_scored({"a.jsonl": a, "b.jsonl.gz": b, "t.json": truth}, command, as_json)


@st.composite
def damaged(draw, value):
    """A value with parts of it replaced by anything."""
    if draw(st.integers(0, 19)) == 7:
        return draw(ANY)
    if isinstance(value, dict):
        return {key: draw(damaged(part)) for key, part in value.items()}
    return [draw(damaged(part)) for part in value] if isinstance(value, list) else value


SAID = [{"image_id": 1, "caption": "A dog and a cat."}, {"image_id": 2, "caption": "Two dogs."}]
ANNOTATED = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 5}, {"id": 2, "image_id": 2, "category_id": 6}],
    "categories": [{"id": 5, "name": "dog"}, {"id": 6, "name": "cat"}],
}
MASKS = {"objects": ["cat", "dog"], "images": {"1": "2", "2": "0"}}
TRUTH = [{"image": 1, "objects": ["dog"]}, {"image": 2, "objects": []}]
REPLIES = [{"question_id": 1, "answer": "Yes", "margin": 0.5}, {"question_id": 2, "answer": "No", "margin": -0.5}]
ASKED = [
    {
        "id": n,
        "question_id": n,
        "image": f"{n}.jpg",
        "text": text,
        "question": text,
        "label": "yes",
        "group": "a",
        "pair": 1,
    }
    for n, text in ((1, "Is there a dog in the image?"), (2, "Is there a cat in the image?"))
]
CHAIR_CASE = ("a.jsonl", "b.jsonl.gz", "--benchmark", "chair", "--truth", "t.json")
CASES = (
    *((CHAIR_CASE, SAID, truth) for truth in (ANNOTATED, MASKS, TRUTH)),
    *(
        (("a.jsonl", "b.jsonl.gz", "--benchmark", name, "--questions", "t.json"), REPLIES, ASKED)
        for name in ("yesno", "pope")
    ),
    (("a.jsonl", "--benchmark", "yesno", "--questions", "t.json", "--parser", "margin"), REPLIES, ASKED),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CASES), st.data(), st.booleans())
def test_damaged_files_are_scored_or_refused_in_one_line(case, data, as_json):
    command, lines, truth = case
    contents = {
        name: data.draw(damaged(value))
        for name, value in (("a.jsonl", lines), ("b.jsonl.gz", lines), ("t.json", truth))
    }
    refused_or_scored({name: json.dumps(content).encode() for name, content in contents.items()}, command, as_json)


@pytest.mark.parametrize(("command", "lines", "truth"), CASES)
def test_whole_files_are_scored(command, lines, truth, tmp_path):
    for name, content in {"a.jsonl": lines, "b.jsonl.gz": lines, "t.json": truth}.items():
        (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else bytes)(json.dumps(content).encode()))
    names = ("a.jsonl", "b.jsonl.gz", "t.json")
    assert scored(*(tmp_path / part if part in names else part for part in command))["rows"]


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.integers(0, 5), st.text(st.characters(), max_size=20) | st.just("A dog, a cat."), min_size=1),
    st.data(),
)
def test_any_captions_are_counted(said, data):
    others = {image: data.draw(st.text(st.characters(), max_size=20)) for image in said}
    with TemporaryDirectory() as folder:
        paths = [
            write(
                Path(folder) / f"{name}.jsonl", [{"image_id": image, "caption": text} for image, text in file.items()]
            )
            for name, file in (("a", said), ("b", others))
        ]
        truth = write(Path(folder) / "t.jsonl", [{"image": image, "objects": ["dog"]} for image in range(6)])
        found = scored(*paths, "--benchmark", "chair", "--truth", truth)
    assert [row["answers"] for row in found["rows"]] == [len(said)] * 2
    assert found["rows"][1]["differences"]["CHAIR_S"]["left_out"] == 0 and found["rows"][1]["control"]["images"] == len(
        said
    )


def test_a_page_of_other_peoples_answers(tmp_path):
    """The report of a comparison of files: tables, control, plots, marked words; the baseline has its own name."""
    ids = sorted(chair.coco_truth(split="val"))[:40]
    truth = chair.coco_truth()
    for name, invent in (("plain", lambda k: k % 2), ("careful", lambda k: k % 10 == 1)):
        said = [
            {"image_id": i, "caption": f"There is a {sorted(truth[i] or ['cat'])[0]}." + " A zebra." * bool(invent(k))}
            for k, i in enumerate(ids)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    files = [tmp_path / "plain.jsonl", tmp_path / "careful.jsonl"]
    done = run(*files, "--benchmark", "chair", "--report", tmp_path / "page.html", "--json")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    row = json.loads(done.stdout)[0]["rows"][1]
    assert f"really better in CHAIR_S {100 * row['differences']['CHAIR_S']['value']:.1f}".replace("-", "−") in page
    assert "Truncation control" in page and "<svg" in page and '<del class="invented"' in page
    assert "difference to <code>plain</code>" in page and "untouched" not in page
    wrong = run(*files, "--benchmark", "chair", "--report", files[0])
    assert wrong.exit_code == 1 and "is one of the files to read" in wrong.stderr
    assert "only with --benchmark" in run(tmp_path, "--report", tmp_path / "x.html").stderr


@pytest.mark.parametrize("benchmark", ["pope", "yesno"])
def test_a_page_of_other_peoples_answers_to_questions(tmp_path, benchmark):
    own = [{"id": i, "image": f"{i // 2}.jpg", "question": "Is it?", "label": ("yes", "no")[i % 2]} for i in range(12)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in own))
    questions = pope_questions.load("coco", "random")[:12] if benchmark == "pope" else None
    if questions:
        asked = [{"question_id": q.id, "image": q.image, "text": q.text, "label": q.label} for q in questions]
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
    ids = [q.id for q in questions] if questions else range(12)
    for name, word in (("a", "Yes"), ("b", "No")):
        lines = [{"id": i, "answer": word if k % 3 else "Perhaps"} for k, i in enumerate(ids)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--benchmark", benchmark, "--parser", "strict"]
    done = run(*args, "--questions", tmp_path / "q.jsonl", "--report", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    assert "parser strict" in page and "<code>b</code>" in page and "neither yes<br>nor no" in page
