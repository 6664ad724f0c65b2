"""HallusionBench by string matching: yes/no questions on figures, of which some are tampered with or missing.

Guan et al., CVPR 2024, arXiv 2310.14566; counting follows tianyi-lab/HallusionBench. The authors have GPT-4 judge the
answers, here a parser reads them, so these figures are not the paper's. Questions without a figure are not about
seeing: the default leaves them out; with "all" an unclear answer to one of them counts as right, as in the official
counting.

    questions = load()
    scores = score(questions, read_answers("answers.jsonl"))
    sums = {name: column.sum() for name, column in counts(scores).items()}
    METRICS["aAcc"](sums), METRICS["fAcc"](sums), METRICS["qAcc"](sums)

Questions come with the package (BSD-3-Clause); the figures do not: see github.com/tianyi-lab/HallusionBench.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.eval.benchmarks.benchmark import Figure, FileAnswers, FileOptions, Group
from vlmfix.eval.benchmarks.questions import OriginalQuestions, all_and_groups
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.reading import printable
from vlmfix.eval.scorers.stats import ratio
from vlmfix.eval.scorers.yesno import Answers, Parser, add_up

SETS = ("with_image_951", "all")
"""Its questions: those with a figure, or all 1,129."""
_FILE = files("vlmfix.assets") / "hallusionbench" / "questions.json.gz"


@dataclass(frozen=True)
class FigureQuestion(yesno.Question):
    """One question on one figure; `group` is VD (needs the figure) or VS (the figure supplements knowledge).

    `pair` is the question, which is put to several figures of its set.
    """

    set: str = ""
    """Figures and questions of one topic: category, subcategory and number."""
    figure: str = ""
    """The figure within the set, 0 for the original or for none."""
    hard: bool = False
    """Whether the figure is tampered with."""


def load(which: str = "with_image_951") -> list[FigureQuestion]:
    """The 951 questions with a figure, or all 1,129; ids are category/subcategory/set/figure/question.

    Raises:
        ValueError: an unknown name.
    """
    if which not in SETS:
        raise ValueError(f"{which!r} is no set of HallusionBench; there are with_image_951 and all.")
    questions = [_question(entry) for entry in json.loads(gzip.decompress(_FILE.read_bytes()))]
    return [question for question in questions if which == "all" or question.image]


def _question(entry: Mapping[str, Any]) -> FigureQuestion:
    topic = f"{entry['category']}/{entry['subcategory']}/{entry['set_id']}"
    return FigureQuestion(
        id=f"{topic}/{entry['figure_id']}/{entry['question_id']}",
        image=(entry["filename"] or "").removeprefix("./"),
        text=entry["question"],
        object="",
        label="yes" if entry["gt_answer"] == "1" else "no",
        group=entry["category"],
        pair=f"{topic}/{entry['question_id']}",
        set=topic,
        figure=entry["figure_id"],
        hard=entry["visual_input"] == "2",
    )


@dataclass(frozen=True)
class HallusionScore:
    """One answer and how it was read and judged."""

    question: FigureQuestion
    answer: str
    prediction: yesno.Label | None
    correct: bool
    """Whether it says what the label says, or says neither where there is no figure to see."""


def score(
    questions: Iterable[FigureQuestion], answers: Answers, parser: str | Parser = "sentence"
) -> list[HallusionScore]:
    """Score answers.

    Raises:
        ValueError: as `yesno.score_answers`, or a parser that drops answers.
    """
    questions = list(questions)
    scores = yesno.score_answers(questions, answers, parser)
    if any(score.dropped for score in scores):
        raise ValueError(f"the parser {parser!r} drops answers, which this counting does not know; take another.")
    judged = []
    for question, score in zip(questions, scores, strict=True):
        rightly_unclear = score.prediction is None and not question.image
        judged.append(HallusionScore(question, score.answer, score.prediction, score.correct or rightly_unclear))
    return judged


def clusters(scores: Sequence[HallusionScore]) -> list[str]:
    """The set of each entry of `counts`: the unit of resampling, as its questions go through all its figures."""
    return list(dict.fromkeys(score.question.set for score in scores))


def counts(scores: Sequence[HallusionScore]) -> dict[str, np.ndarray]:
    """What the metrics are made of: additive counts, one float per set, in the order of `clusters`.

    `figures` and `items` (a question on all its figures) count as right if all of their answers are; `figure_shares`
    adds up the share of right answers of each figure; `easy_items` and `hard_items` look only at figures as they are
    (or missing), and only at tampered ones. `unknown` counts answers that are neither yes nor no.
    """
    with_figure = [score for score in scores if score.question.image]
    easy = [score for score in scores if not score.question.hard]
    hard = [score for score in scores if score.question.hard]
    members_of = {
        "questions": [[score] for score in scores],
        "figures": _together(with_figure, _figure_of),
        "items": _together(scores, _item_of),
        "easy_items": _together(easy, _item_of),
        "hard_items": _together(hard, _item_of),
    }
    place_of = {name: place for place, name in enumerate(clusters(scores))}

    def total(members: Sequence[Sequence[HallusionScore]], value: Callable[[Sequence[HallusionScore]], float]) -> Any:
        places = [place_of[answers[0].question.set] for answers in members]
        return add_up(places, [value(answers) for answers in members], len(place_of))

    columns = {}
    for name, members in members_of.items():
        columns[name] = total(members, lambda answers: 1)
        columns["right" if name == "questions" else f"{name}_right"] = total(members, _all_right)
    columns["figure_shares"] = total(members_of["figures"], _share_right)
    columns["unknown"] = total(members_of["questions"], lambda answers: answers[0].prediction is None)
    return columns


def _figure_of(question: FigureQuestion) -> Hashable:
    return question.set, question.figure


def _item_of(question: FigureQuestion) -> Hashable:
    return question.group, question.pair


def _all_right(answers: Sequence[HallusionScore]) -> bool:
    return all(score.correct for score in answers)


def _share_right(answers: Sequence[HallusionScore]) -> float:
    return sum(score.correct for score in answers) / len(answers)


def _together(
    scores: Sequence[HallusionScore], key: Callable[[FigureQuestion], Hashable]
) -> list[list[HallusionScore]]:
    together: defaultdict[Hashable, list[HallusionScore]] = defaultdict(list)
    for score in scores:
        together[key(score.question)].append(score)
    return list(together.values())


METRICS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "aAcc": lambda n: ratio(n["right"], n["questions"]),
    "fAcc": lambda n: ratio(n["figures_right"], n["figures"]),
    "qAcc": lambda n: ratio(n["items_right"], n["items"]),
    "easy": lambda n: ratio(n["easy_items_right"], n["easy_items"]),
    "hard": lambda n: ratio(n["hard_items_right"], n["hard_items"]),
    "consistency": lambda n: ratio(n["figure_shares"], n["figures"]),
}
"""Metric -> its value from *summed* counts, in [0, 1], nan if undefined: shares of answers, figures and questions."""


class HallusionBench(OriginalQuestions):
    """HallusionBench by string matching: its 951 questions on figures."""

    name, heading, parser = "hallusionbench", "HallusionBench with_image_951 by string matching", "sentence"
    figures: ClassVar[Mapping[str, Figure]] = {
        "aAcc": Figure(METRICS["aAcc"], "right answers", "more"),
        "fAcc": Figure(METRICS["fAcc"], "figures with right answers only", "more"),
        "qAcc": Figure(METRICS["qAcc"], "questions with right answers only, over their figures", "more"),
        "easy": Figure(METRICS["easy"], "the same on figures as they are, or missing", "more"),
        "hard": Figure(METRICS["hard"], "the same on tampered figures", "more"),
        "consistency": Figure(METRICS["consistency"], "right answers to a figure, mean over figures", "more"),
    }
    headline = ("aAcc", "fAcc", "qAcc")
    max_new_tokens = 64
    running = "aAcc"
    where = "the figures of HallusionBench are linked at https://github.com/tianyi-lab/HallusionBench"
    takes_margins = False
    id_keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    file_options = ("parser", "split", "key")

    def __init__(self, scoring: str = "", prompt: str = "{question}") -> None:
        super().__init__(scoring, prompt)
        self.split = "with_image_951"
        """Which questions answers in files answer, one of `SETS`."""

    @property
    def title(self) -> str:
        """The benchmark, of files with the set of questions."""
        if self.options is None:
            return super().title
        return f"HallusionBench {self.split} by string matching, parser {self.scoring}"

    @property
    def facts(self) -> dict[str, Any]:
        """The parser, and for files the set of questions."""
        return super().facts if self.options is None else {**super().facts, "split": self.split}

    def find(self, data: Data) -> Sequence[FigureQuestion]:
        """Those that come with the package."""
        return load()

    def judge(self, asked: Sequence[FigureQuestion], answers: Answers) -> Sequence[HallusionScore]:
        """By the official counting."""
        return score(asked, answers, self.scoring)

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """All, VD and VS."""
        return all_and_groups(scores)

    def group(self, name: str, scores: Sequence[Any]) -> Group:
        """A part of the scores; what is resampled is the set of figures."""
        return Group(printable(name), clusters(scores), counts(scores), scores)

    def prepare_files(self, options: FileOptions) -> None:
        """Note which set of questions was asked."""
        super().prepare_files(options)
        self.split = self.split if options.split is None else options.split
        load(self.split)

    def read(self, path: Path) -> FileAnswers:
        """Answers by the parts of their id, or by the id. Those to questions outside the set are left out."""
        questions = load(self.split)
        outside = {question.id for question in load("all")} - {question.id for question in questions}
        answers = self.read_answers(path)
        kept_answers = [answer for answer in answers if answer.id not in outside]
        n_left_out = len(answers) - len(kept_answers)
        remarks = [f"{n_left_out} answers to questions without a figure left out"] if n_left_out else []
        answered_ids = {answer.id for answer in kept_answers}
        asked = [question for question in questions if question.id in answered_ids]
        if 0 < len(asked) < len(questions):
            remarks.append(
                f"partial: {len(asked)} of {len(questions)} questions are answered, so these are not the benchmark's "
                "figures"
            )
        return self.file_answers(self.judge(asked or questions, kept_answers), remarks)
