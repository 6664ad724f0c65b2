"""AMBER, discriminative part: yes/no questions on existence, attributes and relations.

Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation", arXiv 2311.07397; the
official figures follow `inference.py` of junyangwang0410/AMBER. "No" is the positive class. Every existence question
has the answer no, so its precision is 1 or undefined: look at its recall. `amber_captions` scores the descriptions.

    questions = load()
    scores = score(questions, read_answers("answers.jsonl"))                # strict, for METRICS and intervals
    official_figures(score(questions, answers, "amber"))["all"]["F1"]       # as printed by the official script

Scores are added up by `counts` and `clusters` of `vlmfix.eval.scorers.yesno`.

Annotations come with the package (Apache-2.0); the 1,004 images do not: see github.com/junyangwang0410/AMBER.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.eval.benchmarks.benchmark import Figure, FileAnswers
from vlmfix.eval.benchmarks.questions import YES_NO_FIGURES, OriginalQuestions
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.stats import f1, ratio
from vlmfix.eval.scorers.yesno import Answers, AnswerScore, Question, by_group, counts, labelled_no

_FILES = files("vlmfix.assets") / "amber"

_GROUP_OF_TYPE = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}

GROUPS: dict[str, tuple[str, ...]] = {
    "all": ("existence", "state", "number", "action", "relation"),
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    "state": ("state",),
    "number": ("number",),
    "action": ("action",),
    "relation": ("relation",),
}
"""What the figures are printed for -> the groups of questions in it."""


def entries() -> list[dict[str, Any]]:
    """All 15,220 entries: `id`, `image`, `query`, `type`, `truth` (a list of words for captions, else yes or no)."""
    queries, annotations = (
        json.loads(gzip.decompress((_FILES / f"{name}.json.gz").read_bytes())) for name in ("query_all", "annotations")
    )
    return [{**query, **annotation} for query, annotation in zip(queries, annotations, strict=True)]


def load() -> list[Question]:
    """The 14,216 questions; `text` is the prompt as published."""
    return [
        Question(entry["id"], entry["image"], entry["query"], "", entry["truth"], group=_GROUP_OF_TYPE[entry["type"]])
        for entry in entries()
        if entry["type"] in _GROUP_OF_TYPE
    ]


def score(questions: Iterable[Question], answers: Answers, parser: str = "strict") -> list[AnswerScore]:
    """Score answers; the parser `amber` is the official one. Raises ValueError as `yesno.score_answers`."""
    return yesno.score_answers(questions, answers, parser)


def groups(scores: Iterable[AnswerScore]) -> dict[str, list[AnswerScore]]:
    """The scores that belong to each of `GROUPS`, possibly none."""
    parts = by_group(scores)
    return {name: [score for part in names for score in parts.get(part, [])] for name, names in GROUPS.items()}


METRICS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    **yesno.METRICS,
    "precision": lambda n: ratio(n["tn"], n["tn"] + n["fn"]),
    "recall": lambda n: ratio(n["tn"], labelled_no(n)),
    "F1": lambda n: f1(n["tn"], n["tn"] + n["fn"], labelled_no(n)),
}
"""As `yesno.METRICS`, but "no" is the positive class of precision, recall and F1."""
del METRICS["TNR"]  # the recall


def official_figures(scores: Sequence[AnswerScore]) -> dict[str, dict[str, float]]:
    """Percentages as the official script prints them, by name in `GROUPS`; scores must come from the parser `amber`.

    It adds 0.001 to every denominator, rounds to one decimal, and computes F1 from the rounded precision and recall.
    """
    return {name: _official(part, name) for name, part in groups(scores).items()}


def _official(scores: Sequence[AnswerScore], group: str) -> dict[str, float]:
    sums = {name: column.sum() for name, column in counts(scores).items()}
    right, right_no = float(sums["tp"] + sums["tn"]), float(sums["tn"])
    said_no, is_no = float(sums["tn"] + sums["fn"]), float(labelled_no(sums))
    more = 0.001 * (len(GROUPS[group]) if group == "attribute" else 1)
    accuracy = round(right / (float(sums["questions"]) + more) * 100, 1)
    precision = round(right_no / (said_no + more) * 100, 1)
    recall = round(right_no / (is_no + more) * 100, 1)
    p, r = precision / 100, recall / 100
    harmonic = 2 * p * r / (p + r + (0.001 if group == "existence" else 0.0001))
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "F1": round(harmonic * 100, 1)}


class Amber(OriginalQuestions):
    """AMBER's questions, with figures for all and for each kind of question."""

    name, heading, parser = "amber", "AMBER", "strict"
    figures: ClassVar[Mapping[str, Figure]] = {
        **{name: YES_NO_FIGURES[name] for name in METRICS},
        "precision": Figure(METRICS["precision"], "no that is right", "more"),
        "recall": Figure(METRICS["recall"], "no where no is right", "more"),
        "F1": Figure(METRICS["F1"], 'harmonic mean of precision and recall of "no"', "more"),
    }
    where = "the pictures of AMBER are linked at https://github.com/junyangwang0410/AMBER"
    file_options = ("parser", "key")

    def find(self, data: Data) -> Sequence[Question]:
        """The 14,216 questions."""
        return load()

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """All, and each kind of question that was asked."""
        return {name: part for name, part in groups(scores).items() if part}

    def read(self, path: Path) -> FileAnswers:
        """Answers to some of the questions or to all. Descriptions in the same file are passed over."""
        questions, answers = load(), self.read_answers(path)
        description_ids = {entry["id"] for entry in entries()} - {question.id for question in questions}
        to_questions = [answer for answer in answers if answer.id not in description_ids]
        ids = {answer.id for answer in to_questions}
        answered = [question for question in questions if question.id in ids]
        if not answered:
            raise ValueError(
                f"{len(answers)} entries, none of them answers one of AMBER's questions, ids 1005 to 15220."
            )
        scores = self.judge(answered, to_questions)
        remarks = []
        if len(answered) < len(questions):
            remarks.append(f"{len(answered)} of {len(questions)} questions are answered")
        if self.scoring == "amber":
            printed = ", ".join(f"{name} {value}" for name, value in official_figures(scores)["all"].items())
            remarks.append(f"the official script prints {printed}")
        return self.file_answers(scores, remarks)
