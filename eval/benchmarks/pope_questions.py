"""POPE's published questions: the files that come with the package, and others in their format. No torch.

    questions = load("coco", "adversarial")    # or read_questions(path)
    scores = score_answers(questions, read_answers("answers.jsonl"), "strict")
    sums = {name: column.sum() for name, column in counts(scores).items()}
    METRICS["accuracy"](sums), METRICS["F1"](sums), METRICS["yes_ratio"](sums)

The last three lines are of `vlmfix.eval.scorers.yesno`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from vlmfix.eval.scorers.yesno import (
    AnswerScore,
    Question,
    check_ids,
    id_field,
    label_field,
    mended,
    read_records,
    same_image,
    text_field,
)
from vlmfix.method.settings import did_you_mean

_FILES = files("vlmfix.assets") / "pope"

SPLITS = ("random", "popular", "adversarial")
"""How the objects that are asked for in vain were drawn."""

SOURCES = {
    "coco": "COCO val2014, as RUCAIBox/POPE has it",
    "aokvqa": "A-OKVQA, images of COCO val2014, objects by SEEM",
    "gqa": "GQA, images of Visual Genome, objects by SEEM",
    "coco_first_release": "COCO as first released: 90 random negatives fewer, other ids there, the misprint 'imange'",
}
"""Question files that come with the package; OPERA, PAI and VISTA use the first release."""


def load(source: str = "coco", split: str = "random") -> list[Question]:
    """The questions of a source and split as published, 3,000 on 500 images (2,910 of `coco_first_release/random`).

    Raises:
        ValueError: an unknown source or split.
    """
    for name, known, what in ((source, SOURCES, "source"), (split, SPLITS, "split")):
        if name not in known:
            raise ValueError(f"{name!r} is no {what} of POPE; {did_you_mean(name, known)}")
    with as_file(_FILES / source / f"{split}.json.gz") as path:
        return read_questions(path, split=split)


def read_questions(path: str | os.PathLike[str], *, split: str | None = None) -> list[Question]:
    """Questions of a file with `question_id`, `image`, `text` and `label`, in the formats of `yesno.read_records`.

    The split is the `category` of each line, as in LLaVA's `llava_pope_test.jsonl`, else `split`, else that of the
    edition that the file is recognised as, else empty.

    Raises:
        ValueError: a line lacks a key or holds something else under it, or only some lines have a category.
    """
    records = _with_labels(read_records(path), Path(path))
    categories = [text_field(record, where, "category") for where, record in records if "category" in record]
    if len(categories) not in (0, len(records)):
        raise ValueError(
            f"{path}: {len(categories)} of {len(records)} questions have a category; give all one, or none."
        )
    questions = [
        Question(
            id=id_field(record, where, "question_id"),
            image=text_field(record, where, "image"),
            text=text_field(record, where, "text"),
            object=_object_of(record["text"]),
            label=label_field(record, where, "label"),
            group=record.get("category") or split or "",
        )
        for where, record in records
    ]
    if not categories and split is None:
        split = edition(questions).partition("/")[2]
        return [replace(question, group=split) for question in questions]
    return questions


def _with_labels(records: list[tuple[str, dict[str, Any]]], path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Records of a file without labels, as LLaVA's `llava_pope_test.jsonl`, with those of the annotation files.

    The labels of a category stand in `*pope_CATEGORY.json` beside the file or in a folder there (`coco`), else they are
    the published ones. They are joined by picture and question.

    Raises:
        ValueError: a question without a label that no annotation has.
    """
    if any("label" in record for _, record in records):
        return records
    labels_of: dict[str, dict[tuple[str, str], str]] = {}
    labelled = []
    for where, record in records:
        category = record.get("category")
        if not isinstance(category, str):
            return records  # what lacks a label is said where it is read
        if category not in labels_of:
            labels_of[category] = _labels_of_category(path, category)
        subject = (str(record.get("image")), _object_of(str(record.get("text"))))
        if subject not in labels_of[category]:
            raise ValueError(
                f"{where} has no label, and no annotation of {category!r} has its picture and object; lay the files "
                "*pope_*.json beside it."
            )
        labelled.append((where, {**record, "label": labels_of[category][subject]}))
    return labelled


def _labels_of_category(path: Path, category: str) -> dict[tuple[str, str], str]:
    """Picture and object -> label."""
    pattern = f"*pope_{glob.escape(category)}.json*"
    annotations = sorted({*path.parent.glob(pattern), *path.parent.glob(f"*/{pattern}")} - {path})
    questions: list[Question] = []
    for annotation in annotations:
        questions += read_questions(annotation, split=category)
    if not annotations and category in SPLITS:
        questions = [*load("coco", category), *load("coco_first_release", category)]
    labels: dict[tuple[str, str], str] = {}
    for question in questions:
        subject = (question.image, question.object)
        if labels.setdefault(subject, question.label) != question.label:
            raise ValueError(f"annotations of {category!r} beside {path} label {subject} both yes and no.")
    return labels


def _object_of(text: str) -> str:
    wording = re.search(r"Is there an? (.+?) in the image\?", mended(text))
    return wording[1] if wording else ""


def edition(questions: Iterable[Question]) -> str:
    """Which published file holds exactly these questions in this order, as "coco/random"; "custom" if none does.

    Ids, images, wording and labels all count, so that the first release, VCD's copies and RePOPE tell apart.
    """
    lines = "".join(f"{q.id}\t{q.image}\t{q.text}\t{q.label}\n" for q in questions)
    return _editions().get(hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest(), "custom")


@cache
def _editions() -> Mapping[str, str]:
    """Hash of the content -> name. Of files with the same content the first one gives the name."""
    listed: dict[str, dict[str, Any]] = json.loads((_FILES / "editions.json").read_text("utf-8"))
    return {entry["sha256_content"]: name for name, entry in reversed(listed.items())}


def relabel(questions: Iterable[Question], labels: Iterable[Question]) -> list[Question]:
    """The questions that a label file such as RePOPE's keeps, with its labels: read it with `read_questions`.

    RePOPE (Neuhaus and Hein, arXiv 2504.15707) corrects labels of POPE COCO and leaves out what is unclear. It has no
    licence, so it does not come with the package: github.com/YanNeu/RePOPE, folder `annotations`; `edition` knows its
    files as `repope_coco/...`.

    Raises:
        ValueError: a labelled question is not among the questions, or asks there for another object or image.
    """
    questions, labels = list(questions), list(labels)
    check_ids(questions)
    check_ids(labels)
    label_of = {question.id: question for question in labels}
    kept = [question for question in questions if question.id in label_of]
    fitting = sum(_same_subject(question, label_of[question.id]) for question in kept)
    if fitting < len(labels):
        raise ValueError(
            f"{len(labels) - fitting} of {len(labels)} labels belong to no question here, or to one on another object "
            "or image; give the questions of the edition and split that the labels were made for."
        )
    return [replace(question, label=label_of[question.id].label) for question in kept]


def _same_subject(first: Question, second: Question) -> bool:
    """Whether two questions ask for the same object in the same image."""
    same_object = (first.object or mended(first.text)) == (second.object or mended(second.text))
    return same_object and same_image(first.image, second.image)


def common(
    scores: Iterable[AnswerScore], other_scores: Iterable[AnswerScore]
) -> tuple[list[AnswerScore], list[AnswerScore]]:
    """The scores of two sets of answers on the questions that both were asked, both in the order of the first.

    Across editions ids mean nothing: questions are the same if split, image and object are. The wording may differ
    still (the first release has a misprint), the label may not.

    Raises:
        ValueError: a question without a known object, no question in common, or one with two labels.
    """
    first, second = _by_content(scores), _by_content(other_scores)
    shared = [key for key in first if key in second]
    if not shared:
        raise ValueError(
            f"{len(first)} and {len(second)} questions have none in common (same split, image and object); compare "
            "answers to the same source and split."
        )
    n_relabelled = sum(first[key].question.label != second[key].question.label for key in shared)
    if n_relabelled:
        raise ValueError(
            f"{n_relabelled} of {len(shared)} common questions have another label in the other set, as POPE and RePOPE "
            "do; give both the same labels, see relabel."
        )
    return [first[key] for key in shared], [second[key] for key in shared]


def _by_content(scores: Iterable[AnswerScore]) -> dict[Hashable, AnswerScore]:
    occurrences: Counter[Hashable] = Counter()
    keyed: dict[Hashable, AnswerScore] = {}
    for score in scores:
        question = score.question
        if not question.object:
            raise ValueError(f"{question.text!a} does not say which object it asks for; expected POPE's wording.")
        key = (question.group, question.image, question.object)
        occurrences[key] += 1
        keyed[key, occurrences[key]] = score  # two published files hold a question twice
    return keyed
