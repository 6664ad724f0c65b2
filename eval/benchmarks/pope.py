"""POPE: yes/no questions about objects that are, or are not, in the picture.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv 2305.10355; builder and
scorer follow the code of RUCAIBox/POPE. Evaluators in use read the same answers in different ways, so the parser is
part of every figure's name.

    questions = load("coco", "adversarial")    # or read_questions(path), or build_questions(ordered_objects(...), ...)
    scores = score_answers(questions, read_answers("answers.jsonl"), "strict")
    sums = {name: column.sum() for name, column in counts(scores).items()}
    METRICS["accuracy"](sums), METRICS["F1"](sums), METRICS["yes_ratio"](sums)
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import as_file, files
from itertools import chain
from typing import Any, Literal

from vlmfix.eval.scorers.chair import instance_categories
from vlmfix.eval.scorers.yesno import (
    METRICS,
    PARSERS,
    Answer,
    AnswerScore,
    Label,
    Parser,
    Question,
    by_group,
    check_ids,
    clusters,
    counts,
    did_you_mean,
    id_field,
    label_field,
    mended,
    read_answers,
    read_records,
    same_image,
    score_answers,
    score_margins,
    text_field,
)

__all__ = [
    "METRICS",
    "PARSERS",
    "SOURCES",
    "SPLITS",
    "Answer",
    "AnswerScore",
    "Label",
    "Parser",
    "Question",
    "build_questions",
    "by_group",
    "clusters",
    "common",
    "counts",
    "edition",
    "load",
    "ordered_objects",
    "question_text",
    "read_answers",
    "read_questions",
    "relabel",
    "score_answers",
    "score_margins",
]

_FILES = files("vlmfix.assets") / "pope"

SOURCES = {
    "coco": "COCO val2014, as RUCAIBox/POPE has it",
    "aokvqa": "A-OKVQA, images of COCO val2014, objects by SEEM",
    "gqa": "GQA, images of Visual Genome, objects by SEEM",
    "coco_first_release": "COCO as first released: 90 random negatives fewer, other ids there, the misprint 'imange'",
}
"""Question files that come with the package; OPERA, PAI and VISTA use the first release."""


# Question files


def load(source: str = "coco", split: str = "random") -> list[Question]:
    """The questions of a source and split as published, 3,000 on 500 images (2,910 of `coco_first_release/random`).

    Raises:
        ValueError: an unknown source or split.
    """
    for name, known, what in ((source, SOURCES, "source"), (split, SPLITS, "split")):
        if name not in known:
            raise ValueError(f"{name!r} is no {what} of POPE{did_you_mean(name, known)}; there are {', '.join(known)}.")
    with as_file(_FILES / source / f"{split}.json.gz") as path:
        return read_questions(path, split=split)


def read_questions(path: str | os.PathLike[str], *, split: str | None = None) -> list[Question]:
    """Questions of a file with `question_id`, `image`, `text` and `label`, in the formats of `yesno.read_records`.

    The split is the `category` of each line, as in LLaVA's `llava_pope_test.jsonl`, else `split`, else that of the
    edition that the file is recognised as, else empty.

    Raises:
        ValueError: a line lacks a key or holds something else under it, or only some lines have a category.
    """
    records = read_records(path)
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


def _object_of(text: str) -> str:
    asked = re.search(r"Is there an? (.+?) in the image\?", mended(text))
    return asked[1] if asked else ""


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
    fitting = sum(_about(question, label_of[question.id]) for question in kept)
    if fitting < len(labels):
        raise ValueError(
            f"{len(labels) - fitting} of {len(labels)} labels belong to no question here, or to one on another object "
            "or image; give the questions of the edition and split that the labels were made for."
        )
    return [replace(question, label=label_of[question.id].label) for question in kept]


def _about(one: Question, other: Question) -> bool:
    """Whether two questions ask for the same object in the same image."""
    same_object = (one.object or mended(one.text)) == (other.object or mended(other.text))
    return same_object and same_image(one.image, other.image)


def common(one: Iterable[AnswerScore], other: Iterable[AnswerScore]) -> tuple[list[AnswerScore], list[AnswerScore]]:
    """The scores of two sets of answers on the questions that both were asked, both in the order of the first.

    Across editions ids mean nothing: questions are the same if split, image and object are. The wording may differ
    still (the first release has a misprint), the label may not.

    Raises:
        ValueError: a question without a known object, no question in common, or one with two labels.
    """
    first, second = _by_content(one), _by_content(other)
    shared = [key for key in first if key in second]
    if not shared:
        raise ValueError(
            f"{len(first)} and {len(second)} questions have none in common (same split, image and object); compare "
            "answers to the same source and split."
        )
    if other_label := sum(first[key].question.label != second[key].question.label for key in shared):
        raise ValueError(
            f"{other_label} of {len(shared)} common questions have another label in the other set, as POPE and RePOPE "
            "do; give both the same labels, see relabel."
        )
    return [first[key] for key in shared], [second[key] for key in shared]


def _by_content(scores: Iterable[AnswerScore]) -> dict[Hashable, AnswerScore]:
    seen: Counter[Hashable] = Counter()
    keyed: dict[Hashable, AnswerScore] = {}
    for score in scores:
        question = score.question
        if not question.object:
            raise ValueError(f"{question.text!a} does not say which object it asks for; expected POPE's wording.")
        key = (question.group, question.image, question.object)
        seen[key] += 1
        keyed[key, seen[key]] = score  # two published files hold a question twice
    return keyed


# Building questions


def ordered_objects(instances: str | os.PathLike[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Image file names of an instances file in COCO format, each with its categories in the order of its annotations.

    Raises:
        ValueError: the file is not in COCO format, or an image has no file name.
    """
    images = instance_categories(instances)
    for image, _ in images:
        if not isinstance(image.get("file_name"), str):
            raise ValueError(f"{instances}: image {image['id']} has no file_name; questions need one.")
    return [(image["file_name"], names) for image, names in images]


# How a split draws one negative: from the objects by frequency and those seen with the positive, both most frequent
# first. An empty list leaves it to chance.
_CANDIDATES: dict[str, Callable[[Sequence[str], Sequence[str]], Sequence[str]]] = {
    "random": lambda frequent, with_positive: (),
    "popular": lambda frequent, with_positive: frequent,
    "adversarial": lambda frequent, with_positive: with_positive,
}
SPLITS = tuple(_CANDIDATES)


def build_questions(
    images: Sequence[tuple[str, Sequence[str]]],
    *,
    k: int = 3,
    n_images: int | None = None,
    seed: int,
    splits: Sequence[str] = SPLITS,
    article: Literal["correct", "official"] = "correct",
) -> list[Question]:
    """Questions on images with their objects in order, as `utils.py` and `main.py` of RUCAIBox/POPE build them.

    Images with fewer than `k` objects are left out, and of the others `n_images` drawn (None: all). Each gets, per
    split, its first `k` objects as positives, each followed by a negative: drawn at random, the most frequent object
    that is absent, or the absent one that stands most often with this positive. Ids count from 1 through all splits;
    each split, and the draw of images, starts from `seed` anew.

    `article="official"` keeps the misprint of the code, "Is there an orange in the imange?".

    Raises:
        ValueError: an unknown split or article, too few images, or images so full or so alike that negatives run out.
    """
    for split in splits:
        if split not in SPLITS:
            raise ValueError(
                f"{split!r} is no split of POPE{did_you_mean(split, SPLITS)}; there are {', '.join(SPLITS)}."
            )
    if article not in ("correct", "official"):
        raise ValueError(f"article is {article!r}; expected 'correct' or 'official'.")
    if k < 1:
        raise ValueError(f"k is {k}; expected at least one object per image.")
    full = [(name, tuple(dict.fromkeys(objects))) for name, objects in images]
    full = [(name, objects) for name, objects in full if len(objects) >= k]
    if not full or (n_images is not None and not 1 <= n_images <= len(full)):
        raise ValueError(
            f"{len(full)} of {len(images)} images have at least {k} objects, but {n_images or 'some'} are wanted; "
            "lower k or n_images, or give more images."
        )
    selected = full if n_images is None else random.Random(seed).sample(full, n_images)
    frequency = Counter(chain.from_iterable(objects for _, objects in selected))
    for name, objects in selected:
        if len(frequency) - len(objects) < k:
            raise ValueError(
                f"{name} holds {len(objects)} of the {len(frequency)} objects that the selected images have, which "
                f"leaves fewer than k = {k} to ask for in vain; lower k or give more images."
            )
    drawn = [
        (split, name, asked, label)
        for split in splits
        for name, asked, label in _draw(selected, frequency, split, k, random.Random(seed))
    ]
    return [
        Question(number, name, question_text(asked, article), asked, label, split)
        for number, (split, name, asked, label) in enumerate(drawn, start=1)
    ]


def question_text(name: str, article: Literal["correct", "official"] = "correct") -> str:
    """The question for an object. The official code puts "an" for every "a" of the question, hence "imange"."""
    if not name.startswith(tuple("aeiou")):
        return f"Is there a {name} in the image?"
    return f"Is there an {name} in the {'imange' if article == 'official' else 'image'}?"


def _draw(
    selected: Sequence[tuple[str, Sequence[str]]], frequency: Counter[str], split: str, k: int, rng: random.Random
) -> Iterable[tuple[str, str, Label]]:
    """Yield image, object and label of each question; needs `k` objects in `frequency` that are absent, per image."""
    together: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _, objects in selected:
        for one in objects:
            together[one].update(other for other in objects if other != one)
    # Sorting is stable: objects of equal count stay in order of first appearance.
    frequent = [name for name, _ in frequency.most_common()]
    beside = {one: [name for name, _ in others.most_common()] for one, others in together.items()}
    names = list(frequency)
    for image, objects in selected:
        out = set(objects)
        for positive in objects[:k]:
            yield image, positive, "yes"
            candidates = _CANDIDATES[split](frequent, beside[positive])
            negative = next((name for name in candidates if name not in out), None)
            while negative is None or negative in out:
                negative = rng.choice(names)
            out.add(negative)
            yield image, negative, "no"
