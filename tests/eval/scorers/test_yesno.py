"""Yes/no questions of one's own: files, joining, pairs and clusters, margins; and whatever files may hold."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfix.eval.benchmarks import dashb, pope_questions
from vlmfix.eval.scorers import stats, yesno
from vlmfix.eval.scorers.yesno import Answer, Question


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def line(number, label="yes", **more):
    return {"id": number, "image": f"{number}.jpg", "question": f"Is it {number}?", "label": label, **more}


def summed(scores):
    return {name: column.sum() for name, column in yesno.counts(scores).items()}


def ask(*labels, **more):
    return [Question(n, f"{n}.jpg", f"Is it {n}?", "", label, **more) for n, label in enumerate(labels)]


# Questions


def test_questions_of_ones_own(tmp_path):
    path = write(tmp_path / "q.jsonl", line(1), line("b", "No"), line(3, group="x", pair=7), line(4, group="x", pair=7))
    assert yesno.read_questions(path) == [
        Question(1, "1.jpg", "Is it 1?", "", "yes"),
        Question("b", "b.jpg", "Is it b?", "", "no"),
        Question(3, "3.jpg", "Is it 3?", "", "yes", "x", 7),
        Question(4, "4.jpg", "Is it 4?", "", "yes", "x", 7),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(1), line(1)], r"1 questions share their id.*\(ids: 1\)"),
        ([line(1), line(2, pair="p")], r"q.jsonl: 1 pairs have one question only.*\(pairs: 'p'\)"),
        ([line(1, group="a", pair=1), line(2, group="b", pair=1)], "2 pairs have one question only"),
        ([line(1), '{"id": 2'], "q.jsonl, line 2 is broken"),
        ([line(1), "\n\nnonsense\n"], "q.jsonl, line 4 is broken"),
        (['{"id": 1,\n "image": }'], "q.jsonl, line 2 is broken"),
        ([line(1), "[1]\n"], r"q.jsonl, line 2 is \[1\]; expected a JSON object"),
        ([" \n"], "q.jsonl is empty"),
        (["[]"], "q.jsonl is empty"),
        (["[1, 2]"], "q.jsonl, entry 1 is 1; expected a JSON object"),
        (['{"id": 1, "id": 2}'], "line 1 is broken .the key 'id' stands twice"),
        (["[" * 100000], "q.jsonl, line 1 is broken"),
        (["9" * 5000], "q.jsonl, line 1 is"),
        ([{"id": 1}], "line 1 has None under 'image'; expected text"),
        ([line([1])], r"line 1 has \[1\] as id; expected a whole number or text"),
        ([line(1, "")], "line 1 has '' under 'label'; expected yes or no"),
        ([line(1, group=1.5)], "has 1.5 as group"),
    ],
)
def test_damaged_questions(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        yesno.read_questions(write(tmp_path / "q.jsonl", *lines))


def test_no_text(tmp_path):
    for name, content in (("a.jsonl", b"\xff\xfe"), ("a.jsonl.gz", b"{}"), ("b.gz", gzip.compress(b"{}")[:-3])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as text"):
            yesno.read_records(tmp_path / name)


# Answers


def test_answers(tmp_path):
    path = write(
        tmp_path / "a.json",
        {"question_id": 1, "answer": "Yes", "question": "Is it?", "image": "folder/1.jpg"},
        json.dumps({"id": "b", "text": "No", "prompt": "Is it? Answer."}, indent=1),
        {"question_id": 3, "id": 9, "response": "", "image": 3, "margin": -1.5},
        {"id": 4, "p_yes": 0.5, "p_no": 0.25},
        {"id": 5, "p_yes": 0, "p_no": 0.25},
        {"id": 6, "p_yes": 1, "p_no": 0, "margin": None, "image": None},
    )
    assert yesno.read_answers(path) == [
        Answer(1, "Yes", None, "Is it?", "folder/1.jpg"),
        Answer("b", "No", None, "Is it? Answer."),
        Answer(3, "", -1.5, "", "3"),
        Answer(4, None, pytest.approx(math.log(2))),
        Answer(5, None, -math.inf),
        Answer(6, None, math.inf),
    ]


def test_answer_key(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": 1, "text": "Is it?", "answer": "yes", "said": "no"})
    with pytest.raises(ValueError, match=r"line 1 has answer and text; say which.*--answer-key answer"):
        yesno.read_answers(path)
    assert yesno.read_answers(path, key="answer")[0].text == "yes"
    assert yesno.read_answers(path, key="said")[0].text == "no"


def test_ids_of_several_parts(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": 9, "set": "x", "n": 1, "answer": "yes"}, {"id": "y/2", "answer": "no"})
    assert [answer.id for answer in yesno.read_answers(path, id_keys=("set", "n"))] == ["x/1", "y/2"]
    with pytest.raises(ValueError, match="has None as n"):
        yesno.read_answers(write(tmp_path / "a.jsonl", {"n": None, "answer": "yes"}), id_keys=("n",))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": 1}, "no answer, text, response or model_prediction and no margin"),
        ({"answer": "yes"}, "has None as question_id or id"),
        ({"id": 1, "answer": ["yes"]}, "under 'answer'; expected text"),
        ({"id": 1, "answer": None}, "has None under 'answer'"),
        ({"id": 1, "answer": "yes", "image": 1.5}, "has 1.5 as image"),
        ({"id": 1, "margin": "2"}, "has '2' under 'margin'; expected a number"),
        ({"id": 1, "margin": True}, "has True under 'margin'"),
        ({"id": 1, "margin": math.nan}, "has nan under 'margin'; expected a number"),
        ({"id": 1, "margin": 10**400}, "under 'margin'; expected a number"),
        ({"id": 1, "p_yes": 0.4}, "p_yes alone; give p_yes and p_no"),
        ({"id": 1, "p_yes": -0.4, "p_no": -2.0}, "expected probabilities"),
        ({"id": 1, "p_yes": 0, "p_no": 0}, "not both 0"),
        ({"id": 1, "p_yes": math.nan, "p_no": 0.5}, "has nan under 'p_yes'"),
        ({"id": 1, "p_yes": 1.5, "p_no": 0.5}, "expected probabilities"),
    ],
)
def test_damaged_answers(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        yesno.read_answers(write(tmp_path / "a.jsonl", entry))


# Joining


def test_ids_are_joined_and_not_lines():
    questions = ask("yes", "no")
    scores = yesno.score_answers(questions, [Answer(1, "no"), Answer(0, "yes")])
    assert [score.correct for score in scores] == [True, True]
    for answers, message in (
        ([Answer(0, "no")], r"1 questions have no answer.*\(ids: 1\)"),
        ([Answer(0, "no"), Answer(1, "no"), Answer(0, "no")], r"more than one answer.*\(ids: 0\)"),
        ([Answer(0, "no"), Answer(1, "no"), Answer("1", "no")], r"more than one answer.*\(ids: 1\)"),
        ([Answer(0, "no"), Answer(1, "no"), Answer("x", "no")], r"belong to no question.*\(ids: 'x'\)"),
        ([Answer(0, "no"), Answer(1, None, 2.0)], r"1 answers are no text.*\(ids: 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            yesno.score_answers(questions, answers)


@pytest.mark.parametrize(
    ("question", "image", "fits"),
    [
        ("Is it 0?", "0.jpg", True),
        ("<image>\nIs it  0? Answer yes or no.", "/data/0.jpg", True),
        ("Is it", "C:\\data\\0.jpg", True),
        ("", "", True),
        ("", "0", True),
        ("Is it 1?", "0.jpg", False),
        ("Is it 0?", "1.jpg", False),
        ("", "x0.jpg", True),
        ("", "x10.jpg", False),
    ],
)
def test_text_and_image_must_agree(question, image, fits):
    answers = [Answer(0, "yes", question=question, image=image)]
    if fits:
        assert yesno.score_answers(ask("yes"), answers)[0].correct
    else:
        with pytest.raises(ValueError, match=r"1 answers are .*another.*\(ids: 0\)"):
            yesno.score_answers(ask("yes"), answers)


def test_same_image():
    assert yesno.same_image("COCO_val2014_000000000042.jpg", "000000000042.jpg")
    assert yesno.same_image("42", "COCO_val2014_000000000042.jpg")
    assert not yesno.same_image("COCO_val2014_000000000042.jpg", "COCO_train2014_000000000042.jpg")
    assert not yesno.same_image("٣.jpg", "a.jpg")
    assert not yesno.same_image("42.jpg", "a.jpg")


def test_a_parser_may_be_given_itself():
    never = yesno.Parser(lambda answer, label: None, "dropped", "nothing")
    assert summed(yesno.score_answers(ask("yes"), {0: "yes"}, never))["dropped"] == 1
    with pytest.raises(ValueError, match=r"'srict' is no parser; did you mean 'strict'"):
        yesno.score_answers(ask("yes"), {0: "yes"}, "srict")


# Groups, pairs, clusters


def test_groups_in_order():
    questions = [Question(n, "a", "?", "", "yes", group) for n, group in enumerate("baba")]
    parts = yesno.by_group(yesno.score_answers(questions, dict.fromkeys(range(4), "yes")))
    assert {group: [s.question.id for s in part] for group, part in parts.items()} == {"b": [0, 2], "a": [1, 3]}


def paired(*rows, parser="strict"):
    """Rows: image, group, pair, answer; every label is yes."""
    questions = [Question(n, image, "?", "", "yes", group, pair) for n, (image, group, pair, _) in enumerate(rows)]
    return yesno.score_answers(questions, {n: row[3] for n, row in enumerate(rows)}, parser)


def test_a_pair_is_right_if_all_of_it_is():
    scores = paired(
        *(("a", "", 1, "yes"), ("a", "", 1, "yes"), ("b", "", 2, "yes"), ("b", "", 2, "no")),
        *(("c", "", None, "yes"), ("d", "x", 1, "yes"), ("d", "x", 1, "what?")),
    )
    columns = yesno.counts(scores)
    assert yesno.clusters(scores) == ["a", "b", "c", "d"]
    assert columns["pairs"].tolist() == [1, 1, 0, 1]
    assert columns["pairs_right"].tolist() == [1, 0, 0, 0]
    assert float(yesno.PAIR_METRICS["pair_accuracy"](summed(scores))) == pytest.approx(1 / 3)


def test_a_pair_with_a_dropped_answer_does_not_count():
    scores = paired(("a", "", 1, "yes"), ("a", "", 1, "hm"), ("a", "", 2, "yes"), ("a", "", 2, "yes"), parser="repope")
    assert (summed(scores)["pairs"], summed(scores)["pairs_right"]) == (1, 1)


def test_images_that_share_a_pair_are_one_cluster():
    scores = paired(
        *(("a", "", 1, "yes"), ("b", "", 2, "yes"), ("c", "", 1, "yes"), ("d", "", 3, "no")),
        *(("c", "", 2, "yes"), ("e", "", None, "yes"), ("d", "", 3, "yes")),
    )
    assert yesno.clusters(scores) == ["a", "d", "e"]
    columns = yesno.counts(scores)
    assert columns["questions"].tolist() == [4, 2, 1]
    assert columns["pairs"].tolist() == [2, 1, 0]
    assert columns["pairs_right"].tolist() == [2, 0, 0]


def test_resampling_takes_what_counts_gives():
    scores = yesno.score_answers(ask(*("yes", "no") * 50), {n: "yes" if n % 3 else "no" for n in range(100)})
    found = stats.estimates(yesno.counts(scores), yesno.METRICS, n_resamples=200, seed=0)
    assert set(found) == set(yesno.METRICS)


# Margins


def by_hand(positive, margins):
    yes = [m for m, p in zip(margins, positive, strict=True) if p]
    no = [m for m, p in zip(margins, positive, strict=True) if not p]
    area = sum((a > b) + (a == b) / 2 for a in yes for b in no) / (len(yes) * len(no)) if yes and no else math.nan
    precision = [sum(m >= a for m in yes) / sum(m >= a for m in margins) for a in yes]
    return area, sum(precision) / len(yes) if yes else math.nan


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, math.inf]))))
def test_ranking_figures_by_hand(rows):
    positive, margins = [p for p, _ in rows], [m for _, m in rows]
    expected = by_hand(positive, margins)
    found = yesno.auroc(positive, margins), yesno.average_precision(positive, margins)
    assert found == pytest.approx(expected, nan_ok=True)
    twice = yesno.auroc(positive * 2, margins * 2), yesno.average_precision(positive * 2, margins * 2)
    weights = [2] * len(rows)
    assert twice == pytest.approx(expected, nan_ok=True)
    assert yesno.auroc(positive, margins, weights) == pytest.approx(expected[0], nan_ok=True)
    assert yesno.average_precision(positive, margins, weights) == pytest.approx(expected[1], nan_ok=True)


def test_weights_are_repetitions():
    positive, margins = [True, False, True, False], [3.0, 2.0, 1.0, 0.0]
    assert yesno.auroc(positive, margins) == 3 / 4
    assert yesno.average_precision(positive, margins) == pytest.approx((1 + 2 / 3) / 2)
    repeated = yesno.auroc([True, *positive, False, False], [3.0, *margins, 2.0, 2.0])
    assert yesno.auroc(positive, margins, [2, 3, 1, 1]) == pytest.approx(repeated)
    assert yesno.auroc(positive, margins, [1, 0, 1, 1]) == 1
    with pytest.raises(ValueError, match="2 margins, 1 labels, 2 weights"):
        yesno.auroc([True], [1, 2])
    with pytest.raises(ValueError, match="without nan"):
        yesno.auroc([True], [math.nan])


def test_margins_are_scored_at_zero():
    scores = yesno.score_margins(
        ask("yes", "no", "yes", "no"), [Answer(n, None, m) for n, m in enumerate((2, -1, -3, 0))]
    )
    assert [score.prediction for score in scores] == ["yes", "no", "no", None]
    assert summed(scores)["unknown"] == 1
    assert float(yesno.METRICS["accuracy"](summed(scores))) == 0.5
    assert yesno.ranking(scores) == {"AUROC": 0.5, "average_precision": pytest.approx((1 + 2 / 4) / 2)}
    assert yesno.ranking(yesno.score_margins(ask("yes", "no"), {0: np.float32(1), 1: -math.inf}))["AUROC"] == 1


def test_margins_ride_along_with_texts():
    scores = yesno.score_answers(ask("yes", "no"), [Answer(0, "No", 1.0), Answer(1, "No", -1.0)])
    assert [score.prediction for score in scores] == ["no", "no"]
    assert yesno.ranking(scores)["AUROC"] == 1


def test_margins_must_be_there():
    for margin in (None, math.nan, True, "1", 10**400):
        with pytest.raises(ValueError, match=r"1 answers have no margin.*\(ids: 0\)"):
            yesno.score_margins(ask("yes"), [Answer(0, "yes", margin)])
    with pytest.raises(ValueError, match="1 answers have no margin"):
        yesno.ranking(yesno.score_answers(ask("yes"), {0: "yes"}))
    assert all(math.isnan(value) for value in yesno.ranking([]).values())


# Anything

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = (
    *("id", "question_id", "image", "question", "label", "group", "pair", "answer", "text", "margin", "p_yes", "p_no"),
    *("category", "img_id", "object_name", "gt"),
)
LIKELY = st.sampled_from(["yes", "no", "Yes", 1, 2, "1", 0.5, "1.jpg", None]) | ANY


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(KEYS), LIKELY, max_size=9), max_size=3),
    st.binary(max_size=12),
    st.sampled_from(["a.jsonl", "a.gz"]),
)
def test_any_file_is_read_or_refused(lines, torn, name):
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        content = b"".join(json.dumps(entry).encode() + b"\n" for entry in lines) + torn
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        for read in (yesno.read_questions, yesno.read_answers, pope_questions.read_questions, dashb.load):
            try:
                found = read(path)
            except ValueError:
                continue
            assert len(found) == len(yesno.read_records(path))


ROWS = st.tuples(
    st.sampled_from("abc"), st.sampled_from(["yes", "no"]), st.sampled_from(["", "g"]), st.none() | st.integers(0, 2)
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ROWS, min_size=1, max_size=8),
    st.lists(
        st.tuples(st.integers(0, 8), st.text(st.characters(), max_size=5) | st.sampled_from(["Yes", "no", "No."]))
    ),
    st.sampled_from(list(yesno.PARSERS)),
)
def test_any_answers_are_counted_once_or_refused(rows, extra, parser):
    questions = [Question(n, image, "?", "", label, group, pair) for n, (image, label, group, pair) in enumerate(rows)]
    given = {**dict.fromkeys(range(len(rows)), "yes"), **dict(extra)}
    try:
        scores = yesno.score_answers(questions, extra, parser)
    except ValueError:
        assert sorted(key for key, _ in extra) != list(range(len(rows)))
        if set(given) - set(range(len(rows))):
            return
        scores = yesno.score_answers(questions, given, parser)
    columns, sums = yesno.counts(scores), summed(scores)
    assert [score.question for score in scores] == questions
    assert all(len(column) == len(yesno.clusters(scores)) and column.dtype == float for column in columns.values())
    assert sums["questions"] == sums["tp"] + sums["fp"] + sums["tn"] + sums["fn"] + sums["unknown"] + sums["dropped"]
    assert sums["pairs_right"] <= sums["pairs"] <= len({(g, p) for _, _, g, p in rows if p is not None})
    assert all(math.isnan(value) or -1 <= value <= 1 for value in (float(m(sums)) for m in yesno.PAIR_METRICS.values()))
    assert summed([s for part in yesno.by_group(scores).values() for s in part]) == sums
