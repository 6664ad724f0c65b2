"""POPE files: the packed questions and their editions, RePOPE's way of relabelling, and answers of two editions."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from vlmfix.eval.benchmarks import pope_questions
from vlmfix.eval.scorers import yesno

DATA = Path(__file__).parents[2] / "data" / "pope"
STANDIN = json.loads((DATA / "repope_standin.json").read_text("utf-8"))


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def as_line(question, **more):
    found = {"question_id": question.id, "image": question.image, "text": question.text, "label": question.label}
    return {**found, **more}


@pytest.fixture
def toy():
    return pope_questions.read_questions(DATA / "builder/n5/toy_pope_popular.json", split="popular")


@pytest.fixture
def relabelled(tmp_path):
    return pope_questions.read_questions(write(tmp_path / "labels.jsonl", STANDIN["questions"]))


# Packed questions and editions


@pytest.mark.parametrize("split", pope_questions.SPLITS)
@pytest.mark.parametrize("source", pope_questions.SOURCES)
def test_packed_questions_are_the_published_ones(source, split):
    questions = pope_questions.load(source, split)
    short = (source, split) == ("coco_first_release", "random")
    assert Counter(question.label for question in questions) == {"yes": 1500, "no": 1410 if short else 1500}
    assert len({question.image for question in questions}) == 500
    assert all(question.object and question.split == split for question in questions)
    assert [question.id for question in questions] == list(range(1, len(questions) + 1))
    assert pope_questions.edition(questions) == f"{source}/{split}"
    misprints = {"random": 144, "popular": 44, "adversarial": 58}[split] if source == "coco_first_release" else 0
    assert sum("imange" in question.text for question in questions) == misprints


def test_anything_changed_is_another_edition():
    questions = pope_questions.load()
    assert (
        pope_questions.edition(questions[:-1])
        == pope_questions.edition(questions[::-1])
        == pope_questions.edition([])
        == "custom"
    )
    for change in ({"id": "1"}, {"image": "\ud800"}, {"text": "Is there a cat in the image?"}, {"label": "no"}):
        expected = (
            pope_questions.edition(questions) if change == {"id": "1"} else "custom"
        )  # 1 and "1" are written alike
        assert pope_questions.edition([replace(questions[0], **change), *questions[1:]]) == expected


def test_negatives_of_popular_use_ten_objects():
    asked = {
        split: {q.object for q in pope_questions.load("coco", split) if q.label == "no"}
        for split in pope_questions.SPLITS
    }
    assert {split: len(objects) for split, objects in asked.items()} == {"random": 79, "popular": 10, "adversarial": 57}


@pytest.mark.parametrize(
    ("choice", "message"), [(("cocoa", "random"), "did you mean 'coco'"), (("coco", "advers"), "split of POPE")]
)
def test_unknown_source_or_split(choice, message):
    with pytest.raises(ValueError, match=message):
        pope_questions.load(*choice)


def test_split_is_that_of_the_recognised_edition_or_the_given_one(tmp_path):
    path = write(tmp_path / "mine.json", map(as_line, pope_questions.load("gqa", "adversarial")))
    assert {question.split for question in pope_questions.read_questions(path)} == {"adversarial"}
    assert {question.split for question in pope_questions.read_questions(path, split="hard")} == {"hard"}
    path = write(tmp_path / "few.json", map(as_line, pope_questions.load("gqa", "adversarial")[:6]))
    assert {question.split for question in pope_questions.read_questions(path)} == {""}


def test_formats(tmp_path):
    questions = pope_questions.load("aokvqa", "popular")
    lines = [as_line(question) for question in questions]
    (tmp_path / "array.json").write_text(json.dumps(lines, indent=4))
    (tmp_path / "pretty.json").write_text("\n".join(json.dumps(line, indent=2) for line in lines))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress("\r\n".join(map(json.dumps, lines)).encode("utf-8-sig")))
    for name in ("array.json", "pretty.json", "lines.jsonl.gz"):
        assert pope_questions.read_questions(tmp_path / name) == questions, name


def test_llava_file(tmp_path):
    suffix = "\nAnswer the question using a single word or phrase."
    questions = [
        question for split in pope_questions.SPLITS for question in pope_questions.load("coco_first_release", split)
    ]
    lines = [
        {**as_line(question), "question_id": number, "category": question.split, "text": question.text + suffix}
        for number, question in enumerate(questions)
    ]
    assert len(lines) == 8910
    read = pope_questions.read_questions(write(tmp_path / "llava_pope_test.jsonl", lines))
    assert [(q.split, q.object, q.label) for q in read] == [(q.split, q.object, q.label) for q in questions]
    assert read[0].text == questions[0].text + suffix
    assert pope_questions.edition(read) == "custom"
    said = [yesno.Answer(q.id, q.label, question=q.text) for q in read]
    assert all(score.correct for score in yesno.score_answers(read, said))
    del lines[7]["category"]
    with pytest.raises(ValueError, match="8909 of 8910 questions have a category"):
        pope_questions.read_questions(write(tmp_path / "torn.jsonl", lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "maybe"}, r"line 2 has 'maybe' under 'label'; expected yes or no"),
        ({"label": None}, "line 2 has None under 'label'"),
        ({"image": 310196}, "line 2 has 310196 under 'image'; expected text"),
        ({"text": ["a"]}, "line 2 has .* under 'text'"),
        ({"question_id": True}, "line 2 has True as question_id"),
        ({"question_id": 1.5}, "line 2 has 1.5 as question_id"),
        ({"category": 3}, "line 2 has 3 under 'category'"),
    ],
)
def test_damaged_questions(tmp_path, change, message):
    first, second = pope_questions.load()[:2]
    with pytest.raises(ValueError, match=message):
        pope_questions.read_questions(write(tmp_path / "questions.jsonl", [as_line(first), as_line(second, **change)]))


# RePOPE


def figures(questions):
    kept = {question.id for question in questions}
    answers = [(line["question_id"], line["answer"]) for line in STANDIN["answers"] if line["question_id"] in kept]
    scores = yesno.score_answers(questions, answers)
    sums = {name: column.sum() for name, column in yesno.counts(scores).items()}
    return {
        **{name.upper(): sums[name] for name in ("tp", "fp", "tn", "fn")},
        **{"accuracy": float(yesno.METRICS["accuracy"](sums)), "n": len(questions)},
    }


def test_other_labels_on_the_same_answers(toy, relabelled):
    assert figures(toy) == STANDIN["reference"]["original_labels"]
    assert figures(pope_questions.relabel(toy, relabelled)) == STANDIN["reference"]["relabelled"]


def test_relabelling_keeps_the_question_and_knows_the_misprint(toy, relabelled):
    expected = pope_questions.relabel(toy, relabelled)
    assert {question.split for question in expected} == {"popular"}
    printed = [replace(q, text=q.text.replace("image", "imange")) for q in toy]
    assert [q.label for q in pope_questions.relabel(printed, relabelled)] == [q.label for q in expected]
    assert pope_questions.relabel(toy[::-1], relabelled) == expected[::-1]


def test_labels_for_other_questions_are_refused(toy, relabelled):
    with pytest.raises(ValueError, match="1 of 26 labels belong to no question"):
        pope_questions.relabel(toy[1:], relabelled)
    with pytest.raises(ValueError, match="1 of 26 labels"):
        pope_questions.relabel([replace(toy[0], object="cat"), *toy[1:]], relabelled)
    with pytest.raises(ValueError, match="1 of 26 labels"):
        pope_questions.relabel([replace(toy[0], image="COCO_val2014_000000000001.jpg"), *toy[1:]], relabelled)
    with pytest.raises(ValueError, match=r"1 questions share their id.*\(ids: 1\)"):
        pope_questions.relabel(toy, [*relabelled, relabelled[0]])
    adversarial = pope_questions.read_questions(DATA / "builder/n5/toy_pope_adversarial.json")
    with pytest.raises(ValueError, match="labels belong to no question here, or to one on another object"):
        pope_questions.relabel(adversarial, relabelled)


# Two editions


def said(questions, text="yes"):
    return yesno.score_answers(questions, {question.id: text for question in questions})


def test_editions_are_compared_on_their_common_questions():
    new, old = pope_questions.common(
        said(pope_questions.load("coco")), said(pope_questions.load("coco_first_release"), "no")
    )
    assert len(new) == len(old) == 2910
    assert all(
        (a.question.image, a.question.object) == (b.question.image, b.question.object)
        for a, b in zip(new, old, strict=True)
    )
    assert {a.prediction for a in new} == {"yes"}
    assert {b.prediction for b in old} == {"no"}
    assert sum(a.question.text != b.question.text for a, b in zip(new, old, strict=True)) == 144
    assert any(a.question.id != b.question.id for a, b in zip(new, old, strict=True))
    assert yesno.clusters(new) == yesno.clusters(old)


def test_one_edition_is_compared_whole_and_its_doubled_question_twice():
    scores = said(pope_questions.load("aokvqa", "adversarial"))
    assert pope_questions.common(scores, scores) == (scores, scores)


def test_nothing_in_common_is_refused(toy):
    for source, split in (("gqa", "random"), ("coco", "popular")):
        with pytest.raises(ValueError, match="none in common"):
            pope_questions.common(said(pope_questions.load("coco")), said(pope_questions.load(source, split)))
    with pytest.raises(ValueError, match="does not say which object"):
        pope_questions.common(said(toy), said([replace(toy[0], object="")]))


def test_other_labels_are_refused(toy, relabelled):
    changed = sum(q.label != toy[q.id - 1].label for q in relabelled)
    with pytest.raises(ValueError, match=f"{changed} of 26 common questions have another label"):
        pope_questions.common(said(toy), said(pope_questions.relabel(toy, relabelled)))


def test_answers_of_another_edition_are_refused_where_they_show_it():
    new, old = pope_questions.load("coco"), pope_questions.load("coco_first_release")
    answers = [yesno.Answer(q.id, "yes", question=q.text) for q in old]
    with pytest.raises(ValueError, match="90 questions have no answer"):
        yesno.score_answers(new, answers)
    with pytest.raises(ValueError, match="answers are to another question than the one with their id"):
        yesno.score_answers(new[:2910], answers)
    with pytest.raises(ValueError, match="answers are about another image"):
        yesno.score_answers(new[:2910], [yesno.Answer(q.id, "yes", image=q.image) for q in old])
    misprinted = pope_questions.load("coco_first_release", "popular")
    assert (
        len(
            yesno.score_answers(
                pope_questions.load("coco", "popular"), [yesno.Answer(q.id, "yes", question=q.text) for q in misprinted]
            )
        )
        == 3000
    )
