"""DASH-B: yes/no questions on pictures that were searched for because models see an object in them that is not there.

Augustin et al., "DASH: Detection and Assessment of Systematic Hallucinations of VLMs", arXiv 2503.23573; rule of
YanNeu/DASH-B. 2,682 pictures, 70 objects, half of the pictures with the object.

    questions = load("dashb.json")
    scores = score(questions, read_answers("answers.jsonl"))
    sums = {name: column.sum() for name, column in counts(scores).items()}
    METRICS["TPR"](sums), METRICS["TNR"](sums), METRICS["harmonic_mean"](sums)

Lists and pictures have no licence and do not come with the package: see github.com/YanNeu/DASH-B.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.eval.benchmarks.benchmark import Figure, FileAnswers, FileOptions
from vlmfix.eval.benchmarks.questions import YES_NO_FIGURES, OriginalQuestions
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.reading import about_file
from vlmfix.eval.scorers.stats import ratio
from vlmfix.eval.scorers.yesno import (
    Answers,
    AnswerScore,
    Question,
    check_ids,
    label_field,
    read_records,
    text_field,
)


def prompt(name: str) -> str:
    """The question for an object, as in the authors' code (their README leaves out the question mark)."""
    return f"Can you see a {name} in this image? Please answer only with yes or no."


def load(path: str | os.PathLike[str]) -> list[Question]:
    """Questions of the authors' list, with `img_id`, `object_name` and `gt` (yes or no); ids are object/image.

    Reads the formats of `yesno.read_records`. The object is also the group.

    Raises:
        ValueError: an entry lacks a key or holds something else under it, or stands twice.
    """
    questions = []
    for where, record in read_records(path):
        image, name = text_field(record, where, "img_id"), text_field(record, where, "object_name")
        label = label_field(record, where, "gt")
        questions.append(Question(f"{name}/{image}", image, prompt(name), name, label, group=name))
    check_ids(questions)
    return questions


def score(questions: Iterable[Question], answers: Answers, parser: str = "dashb") -> list[AnswerScore]:
    """Score answers; the parser `dashb` is the authors'. Raises ValueError as `yesno.score_answers`."""
    return yesno.score_answers(questions, answers, parser)


def _harmonic_mean(n: Mapping[str, np.ndarray]) -> np.ndarray:
    tpr, tnr = yesno.METRICS["recall"](n), yesno.METRICS["TNR"](n)
    return ratio(2 * tpr * tnr, tpr + tnr)


METRICS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "accuracy": yesno.METRICS["accuracy"],
    "TPR": yesno.METRICS["recall"],
    "TNR": yesno.METRICS["TNR"],
    "harmonic_mean": _harmonic_mean,
    "yes_ratio": yesno.METRICS["yes_ratio"],
    "MCC": yesno.METRICS["MCC"],
}
"""Metric -> its value from *summed* counts; nan if undefined."""


class DashB(OriginalQuestions):
    """DASH-B: pictures in which models see an object that is not there."""

    name, heading, parser = "dashb", "DASH-B", "dashb"
    figures: ClassVar[Mapping[str, Figure]] = {
        "accuracy": YES_NO_FIGURES["accuracy"],
        "TPR": Figure(METRICS["TPR"], "yes where yes is right", "more"),
        "TNR": Figure(METRICS["TNR"], "no where no is right", "more"),
        "harmonic_mean": Figure(METRICS["harmonic_mean"], "of TPR and TNR", "more"),
        "yes_ratio": YES_NO_FIGURES["yes_ratio"],
        "MCC": YES_NO_FIGURES["MCC"],
    }
    where = "lists and pictures of DASH-B are linked at https://github.com/YanNeu/DASH-B"
    id_keys = ("object_name", "img_id")
    file_options = ("parser", "questions", "key")

    def __init__(self, scoring: str = "", prompt: str = "{question}") -> None:
        super().__init__(scoring, prompt)
        self.file_questions: Sequence[Question] = ()
        """What answers in files answer."""

    def find(self, data: Data) -> Sequence[Question]:
        """Those of the authors' list."""
        return load(data.question_file("the authors' list of DASH-B"))

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """All objects together."""
        return {"": scores}

    def prepare_files(self, options: FileOptions) -> None:
        """Read the authors' list."""
        super().prepare_files(options)
        place = self.asked_of_files("the authors' list of DASH-B")
        with about_file(place):
            self.file_questions = load(place)

    def read(self, path: Path) -> FileAnswers:
        """An answer for each picture and object of the list."""
        return self.file_answers(self.judge(self.file_questions, self.read_answers(path)))
