"""MME, HallusionBench and DASH-B: the figures of the programs in use, and the files that users bring."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfix.eval.benchmarks import dashb, hallusionbench, mme
from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.yesno import PARSERS, Parser

DATA = Path(__file__).parents[2] / "data" / "other"
MME, HALLUSION, DASH = (
    json.loads((DATA / name / "synthetic.json").read_text("utf-8")) for name in ("mme", "hallusionbench", "dashb")
)


def summed(module, scores):
    counting = hallusionbench if module is hallusionbench else yesno
    return {name: column.sum() for name, column in counting.counts(scores).items()}


def values(module, scores):
    sums = summed(module, scores)
    return {name: float(metric(sums)) for name, metric in module.METRICS.items()}


# MME


def cell(text):
    """Tabs and line breaks part columns and lines, so that no answer in a file can hold them."""
    return re.sub(r"[\t\r\n]", " ", text)


@pytest.fixture
def results(tmp_path):
    for task, rows in MME["answers"].items():
        (tmp_path / f"{task}.txt").write_text("".join("\t".join(map(cell, row)) + "\n" for row in rows), "utf-8")
    return tmp_path


def test_mme_answers_hold_no_tabs():
    assert all(cell(text) == text for rows in MME["answers"].values() for row in rows for text in row)


@pytest.mark.parametrize(
    ("parser", "prediction", "points"),
    [("mme", "pred", "score"), ("mme_lmms_eval", "pred_lmms_eval", "score_lmms_eval")],
)
def test_mme_as_in_the_reference(results, parser, prediction, points):
    scores = mme.score(*mme.read_results(results), parser)
    for task in mme.TASKS:
        part, expected = [score for score in scores if score.question.group == task], MME["reference"][task]
        assert [score.prediction or "other" for score in part] == expected[prediction]
        assert mme.task_scores(part) == {task: pytest.approx(expected[points], abs=1e-9)}
    if parser == "mme":
        assert sum(mme.task_scores(scores).values()) == pytest.approx(MME["total"])


@pytest.mark.parametrize(
    ("answer", "official", "lmms_eval"),
    [
        *(("know", "no", "no"), ("I say yes", None, None), ("  Yes", None, "yes"), ("y", None, "yes")),
        *(("N.", None, "no"), ("....no", None, "no"), ("", None, None), ("a yes", None, None), ("noyes", "no", "no")),
    ],
)
def test_mme_parsers(answer, official, lmms_eval):
    assert (PARSERS["mme"](answer, "yes"), PARSERS["mme_lmms_eval"](answer, "yes")) == (official, lmms_eval)


@pytest.mark.parametrize("task", mme.TASKS)
def test_mme_figures(results, task):
    questions, answers = mme.read_results(results)
    kept = {question.id for question in questions if question.group == task}
    scores = mme.score([q for q in questions if q.id in kept], [a for a in answers if a.id in kept])
    expected, found, sums = MME["reference"][task], values(mme, scores), summed(mme, scores)
    for name, key in (
        ("accuracy", "acc"),
        ("accuracy_plus", "acc_plus"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert found[name] == pytest.approx(expected[key])
    assert [sums[name] for name in ("tp", "fn", "tn", "fp", "unknown")] == [
        expected[name] for name in ("TP", "FN", "TN", "FP", "other")
    ]


def test_mme_questions_from_templates_and_from_the_folder_of_images(results, tmp_path):
    expected, _ = mme.read_results(results)
    for task, rows in MME["answers"].items():
        (results / f"{task}.txt").write_text("".join("\t".join(row[:3]) + "\r\n" for row in rows) + "\n", "utf-8")
    assert mme.load(results) == expected
    with pytest.raises(ValueError, match="240 lines have no fourth column"):
        mme.read_results(results)
    folder = tmp_path / "release"
    for task, rows in MME["answers"].items():
        (folder / task).mkdir(parents=True)
        for image, question, label, _ in rows:
            (folder / task / image).touch()
            with (folder / task / image).with_suffix(".txt").open("a") as file:
                file.write(f"{question}\t{label}\n")
    assert mme.load(folder) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "existence has 0 questions"),
        ("a.jpg\tIs it?\tYes\n", "existence has 1 questions, 1 images with other than two such as 'a.jpg'"),
        ("a.jpg\tIs it?\n", "line 1 has 2 columns; expected 3 or 4"),
        ("a.jpg\tIs it?\tMaybe\n", "line 1 has 'Maybe' under 'label'"),
    ],
)
def test_mme_refuses(results, text, message):
    (results / "existence.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        mme.load(results)
    (results / "existence.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is no text"):
        mme.load(results)
    (results / "existence.txt").unlink()
    with pytest.raises(ValueError, match="existence has 0 questions"):
        mme.load(results)


# HallusionBench

LETTERS = Parser(
    lambda answer, label: {(True, False): "yes", (False, True): "no"}.get(
        tuple(word in re.findall("[a-z]+", answer.lower()) for word in ("yes", "no"))
    ),
    "wrong",
    "the word yes or the word no, not both, as in the reference",
)


def hallusion_scores(which, group=None, parser=LETTERS):
    answer_of = {q.id: answer for q, answer in zip(hallusionbench.load("all"), HALLUSION["answers"], strict=True)}
    questions = [question for question in hallusionbench.load(which) if group in (None, question.group)]
    return hallusionbench.score(questions, {question.id: answer_of[question.id] for question in questions}, parser)


def test_hallusion_questions():
    asked = hallusionbench.load("all")
    assert len({question.id for question in asked}) == 1129
    assert [sum(q.label == label for q in asked) for label in ("yes", "no")] == [484, 645]
    assert [sum(q.group == group for q in asked) for group in ("VD", "VS")] == [591, 538]
    assert hallusionbench.load() == [question for question in asked if question.image]
    assert len(hallusionbench.load()) == 951
    with pytest.raises(ValueError, match="there are with_image_951 and all"):
        hallusionbench.load("951")


@pytest.mark.parametrize(
    ("which", "group", "key"),
    [("all", None, "all"), ("all", "VD", "VD"), ("all", "VS", "VS"), ("with_image_951", None, "with_image_951")],
)
def test_hallusion_as_in_the_reference(which, group, key):
    scores, expected = hallusion_scores(which, group), HALLUSION["reference"][key]
    found, sums = values(hallusionbench, scores), summed(hallusionbench, scores)
    assert (len(scores), sums["figures"]) == (expected["n"], expected["n_figures"])
    assert sums["items"] == expected["n_questions"]
    for name in {"aAcc", "fAcc", "qAcc", "easy", "hard"} & expected.keys():
        assert 100 * found[name] == pytest.approx(expected[name]), name
    if "unknown" in expected:
        assert found["consistency"] == pytest.approx(expected["figure_consistency_score"])
        assert sums["unknown"] == expected["unknown"]


def test_unclear_is_right_only_where_there_is_no_figure():
    questions = hallusionbench.load("all")
    scores = hallusionbench.score(questions, {question.id: "I am not sure." for question in questions})
    assert all(score.prediction is None for score in scores)
    assert {score.correct for score in scores if score.question.image} == {False}
    assert sum(score.correct for score in scores) == 178
    with pytest.raises(ValueError, match="drops answers"):
        hallusionbench.score(questions, {question.id: "hm" for question in questions}, "repope")


def test_hallusion_counts_add_up_over_sets():
    scores = hallusion_scores("all", parser="sentence")
    names, columns = hallusionbench.clusters(scores), hallusionbench.counts(scores)
    assert all(column.shape == (len(names),) and column.dtype == float for column in columns.values())
    for at in (0, len(names) - 1):
        alone = summed(hallusionbench, [score for score in scores if score.question.set == names[at]])
        assert alone == {name: column[at] for name, column in columns.items()}
    assert all(np.isnan(value) for value in values(hallusionbench, []).values())


# DASH-B


@pytest.fixture
def dash_file(tmp_path):
    path = tmp_path / "dashb.json"
    path.write_text(json.dumps(DASH["answers"]), "utf-8")
    return path


def test_dash_as_in_the_reference(dash_file):
    questions = dashb.load(dash_file)
    assert questions[0].text == "Can you see a backpack in this image? Please answer only with yes or no."
    answers = {f"{line['object_name']}/{line['img_id']}": line["response"] for line in DASH["answers"]}
    scores = dashb.score(questions, answers)
    assert [score.prediction for score in scores] == [line["answer"] for line in DASH["answers"]]
    found, expected = values(dashb, scores), DASH["reference"]
    for name, key in (("accuracy", "ACC"), ("TPR", "TPR"), ("TNR", "TNR"), ("harmonic_mean", "Harmonic Mean")):
        assert found[name] == pytest.approx(expected[key], abs=1e-12)
    assert summed(dashb, scores)["unknown"] == expected["unparsed"] == 11


def test_dash_refuses(dash_file):
    for change, message in (
        ({"gt": "?"}, "under 'gt'"),
        ({"object_name": None}, "entry 2 has None under 'object_name'"),
    ):
        dash_file.write_text(json.dumps([DASH["answers"][0], {**DASH["answers"][1], **change}]))
        with pytest.raises(ValueError, match=message):
            dashb.load(dash_file)
    dash_file.write_text(json.dumps(DASH["answers"][:1] * 2))
    with pytest.raises(ValueError, match="1 questions share their id"):
        dashb.load(dash_file)


# Anything


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(), max_size=6) | st.sampled_from(["yes", "no", "know", ""]), min_size=9, max_size=9)
)
def test_any_answers(said):
    questions = hallusionbench.load("all")[:9]
    scores = hallusionbench.score(questions, dict(zip((q.id for q in questions), said, strict=True)))
    sums = summed(hallusionbench, scores)
    assert sums["questions"] == 9
    assert all(sums[f"{part}_right"] <= sums[part] for part in ("figures", "items", "easy_items", "hard_items"))
    assert sums["figure_shares"] <= sums["figures"]
