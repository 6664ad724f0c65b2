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
from typing import Any, Literal

import numpy as np

from vlmfix.eval.scorers import yesno
from vlmfix.eval.scorers.stats import ratio
from vlmfix.eval.scorers.yesno import Answers, Parser, add_up

_FILE = files("vlmfix.assets") / "hallusionbench" / "questions.json.gz"


@dataclass(frozen=True)
class Question(yesno.Question):
    """One question on one figure; `group` is VD (needs the figure) or VS (the figure supplements knowledge).

    `pair` is the question, which is put to several figures of its set.
    """

    set: str = ""
    """Figures and questions of one topic: category, subcategory and number."""
    figure: str = ""
    """The figure within the set, 0 for the original or for none."""
    hard: bool = False
    """Whether the figure is tampered with."""


def load(which: Literal["with_image_951", "all"] = "with_image_951") -> list[Question]:
    """The 951 questions with a figure, or all 1,129; ids are category/subcategory/set/figure/question.

    Raises:
        ValueError: an unknown name.
    """
    if which not in ("with_image_951", "all"):
        raise ValueError(f"{which!r} is no set of HallusionBench; there are with_image_951 and all.")
    questions = [_question(entry) for entry in json.loads(gzip.decompress(_FILE.read_bytes()))]
    return [question for question in questions if which == "all" or question.image]


def _question(entry: Mapping[str, Any]) -> Question:
    topic = f"{entry['category']}/{entry['subcategory']}/{entry['set_id']}"
    return Question(
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

    question: Question
    answer: str
    prediction: yesno.Label | None
    correct: bool
    """Whether it says what the label says, or says neither where there is no figure to see."""


def score(questions: Iterable[Question], answers: Answers, parser: str | Parser = "sentence") -> list[HallusionScore]:
    """Score answers.

    Raises:
        ValueError: as `yesno.score_answers`, or a parser that drops answers.
    """
    questions = list(questions)
    scores = yesno.score_answers(questions, answers, parser)
    if any(score.dropped for score in scores):
        raise ValueError(f"the parser {parser!r} drops answers, which this counting does not know; take another.")
    return [
        HallusionScore(question, s.answer, s.prediction, s.correct or (s.prediction is None and not question.image))
        for question, s in zip(questions, scores, strict=True)
    ]


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
    parts = {
        "": [[score] for score in scores],
        "figures": _together(with_figure, lambda q: (q.set, q.figure)),
        "items": _together(scores, lambda q: (q.group, q.pair)),
        "easy_items": _together([s for s in scores if not s.question.hard], lambda q: (q.group, q.pair)),
        "hard_items": _together([s for s in scores if s.question.hard], lambda q: (q.group, q.pair)),
    }
    place = {name: at for at, name in enumerate(clusters(scores))}

    def total(members: Sequence[Sequence[HallusionScore]], value: Callable[[Sequence[HallusionScore]], float]) -> Any:
        return add_up([place[part[0].question.set] for part in members], list(map(value, members)), len(place))

    columns = {}
    for name, members in parts.items():
        columns[name or "questions"] = total(members, lambda part: 1)
        columns[f"{name}_right".lstrip("_")] = total(members, lambda part: all(score.correct for score in part))
    columns["figure_shares"] = total(parts["figures"], lambda part: sum(s.correct for s in part) / len(part))
    columns["unknown"] = total(parts[""], lambda part: part[0].prediction is None)
    return columns


def _together(scores: Sequence[HallusionScore], key: Callable[[Question], Hashable]) -> list[list[HallusionScore]]:
    parts: defaultdict[Hashable, list[HallusionScore]] = defaultdict(list)
    for score in scores:
        parts[key(score.question)].append(score)
    return list(parts.values())


METRICS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "aAcc": lambda n: ratio(n["right"], n["questions"]),
    "fAcc": lambda n: ratio(n["figures_right"], n["figures"]),
    "qAcc": lambda n: ratio(n["items_right"], n["items"]),
    "easy": lambda n: ratio(n["easy_items_right"], n["easy_items"]),
    "hard": lambda n: ratio(n["hard_items_right"], n["hard_items"]),
    "consistency": lambda n: ratio(n["figure_shares"], n["figures"]),
}
"""Metric -> its value from *summed* counts, in [0, 1], nan if undefined: shares of answers, figures and questions."""
