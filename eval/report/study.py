"""A comparison with its differences judged and its answers gathered: what words, tables and plots are made of.

    studies = [study(comparison) for comparison in compare(find_runs(["runs"]))]
    summary(studies[0]), to_csv(studies), to_json(studies), to_markdown(studies), to_latex(studies), page(studies)

Which differences are real is decided in `verdicts`. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmfix.eval.benchmarks.benchmark import Group
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.report.verdicts import (
    Discordant,
    Verdict,
    against_cuts,
    discordant_pictures,
    judge,
    untouched_run,
    verdicts_of,
)
from vlmfix.eval.run.controls import control_labels
from vlmfix.eval.run.results import HEADER, Comparison, Row, Run
from vlmfix.eval.scorers import stats
from vlmfix.eval.scorers.chair import CaptionScore
from vlmfix.eval.scorers.stats import Difference
from vlmfix.eval.scorers.truncation import CutCaptions, TruncationControl
from vlmfix.eval.scorers.yesno import AnswerScore


@dataclass(frozen=True)
class Selection:
    """A method against a negative control of it, in the first figure of the table."""

    method: str
    control: str
    """The same push with the selection taken out of it, or turned round."""
    group: str
    metric: str
    difference: Difference
    """Method minus control."""
    p_holm: float | None
    """Adjusted for the number of such pairs."""
    real: bool
    """Whether it is real, by the rule in `verdicts`."""
    better: bool | None
    """Whether the method does better than the control."""


@dataclass(frozen=True)
class Entry:
    """One method in one group of answers."""

    method: str
    """Name of the run, no two alike."""
    run: int
    """Its place in the comparison."""
    row: Row
    answers: Group


@dataclass(frozen=True, eq=False)
class Study:
    """A comparison with its answers scored one by one, and what they say. Lists go by the comparison's runs."""

    comparison: Comparison
    names: list[str]
    """Of the methods, no two alike."""
    captions: list[dict[int, CaptionScore]]
    """By picture; no list where the benchmark asks for no captions."""
    answers: list[list[AnswerScore]]
    """Each different question once; no list where the benchmark asks no questions about objects."""
    verdicts: list[Verdict]

    @cached_property
    def against_controls(self) -> list[Selection]:
        """Each method against each of its negative controls that was run too. Takes a bootstrap for each."""
        return _selections(self)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Runs that are a method and a negative control of it, by their places."""
        return _pairs([run.label for run in self.comparison.runs])

    @cached_property
    def cut_verdicts(self) -> dict[tuple[str, str], Verdict]:
        """Method and figure -> the judgement on its difference to the baseline's captions, cut to the same recall."""
        verdicts = against_cuts(self.comparison, self.names)
        return {(verdict.method, verdict.metric): verdict for verdict in verdicts}

    @property
    def data(self) -> Data:
        """The pictures."""
        return self.comparison.data

    @property
    def curve(self) -> CutCaptions | None:
        """The untouched model's captions, cut shorter and shorter."""
        return self.comparison.curve

    @property
    def controls(self) -> list[TruncationControl | None]:
        """Of each run; `None` for the untouched model, and without one."""
        if not self.captions:
            return [None] * len(self.names)
        return [row.control for row in self.comparison.rows]

    @property
    def base(self) -> int | None:
        """Which run is the untouched model's."""
        return untouched_run(self.comparison.runs)

    @property
    def baseline(self) -> str:
        """What the others are compared with; a name stands between backticks."""
        return self.comparison.baseline

    @property
    def headline(self) -> list[str]:
        """Figures that tables in a terminal and in papers show."""
        return list(self.comparison.benchmark.columns)

    @cached_property
    def columns(self) -> dict[str, tuple[str, float]]:
        """All figures, in the order of a report: name -> unit and factor."""
        estimated = list(self.comparison.rows[0].estimates) if self.comparison.rows else []
        figures = self.comparison.benchmark.figures
        if self.captions:
            ordered = estimated
        else:
            ordered = [name for name in estimated if figures[name].shown]
            ordered += [name for name in estimated if not figures[name].shown]
        return {name: (figures[name].unit, figures[name].factor) for name in ordered}

    @property
    def pictures(self) -> int:
        """Most pictures that a method was asked about."""
        return max((row.n for row in self.comparison.rows), default=0)

    @cached_property
    def entries(self) -> list[Entry]:
        """Every row of the comparison, with the name of its method and the answers behind it."""
        rows = iter(self.comparison.rows)
        entries = []
        for run, (name, groups) in enumerate(zip(self.names, self.comparison.groups, strict=True)):
            entries += [Entry(name, run, next(rows), group) for group in groups]
        return entries

    def by_group(self) -> Iterator[tuple[str, list[Entry]]]:
        """Each group of answers with its methods, in the order of the runs."""
        for name in dict.fromkeys(entry.row.group for entry in self.entries):
            yield name, [entry for entry in self.entries if entry.row.group == name]

    def verdict(self, entry: Entry, metric: str) -> Verdict | None:
        """The judgement on one figure; `None` for the untouched model, and without one."""
        return self._judged.get((entry.method, entry.row.group, metric))

    @cached_property
    def _judged(self) -> dict[tuple[str, str, str], Verdict]:
        return {(verdict.method, verdict.group, verdict.metric): verdict for verdict in self.verdicts}

    def passes_per_token(self, run: int) -> float | None:
        """Forward passes of a run over the tokens of its answers; `None` where the records do not tell.

        A batch goes on until its longest answer ends, so that is what its passes are set against: answers of one batch
        share their seconds to the last digit.
        """
        batches: dict[tuple[float, float], int] = {}
        for record in self.comparison.runs[run].records:
            passes, tokens = record.get("passes"), record.get("token_ids")
            if not passes or not tokens:
                return None
            key = passes, record.get("seconds", 0.0)
            batches[key] = max(batches.get(key, 0), len(tokens))
        n_tokens = sum(batches.values())
        return sum(passes for passes, _ in batches) / n_tokens if n_tokens else None

    def same_answers(self, run: int) -> bool:
        """Whether a run answers word for word as the untouched model does."""
        if self.base is None:
            return False
        runs = self.comparison.runs
        return _texts(runs[run]) == _texts(runs[self.base])


def _texts(run: Run) -> dict[str, str]:
    return {record["id"]: record["text"] for record in run.records}


def study(comparison: Comparison) -> Study:
    """Judge a comparison's differences, and gather its answers."""
    names = _distinct_names(comparison.runs)
    captions, answers = _gathered(comparison)
    return Study(
        comparison=comparison,
        names=names,
        captions=captions,
        answers=answers,
        verdicts=verdicts_of(comparison, names),
    )


def _gathered(comparison: Comparison) -> tuple[list[dict[int, CaptionScore]], list[list[AnswerScore]]]:
    """Captions, or answers to questions about objects, of each run; one of the two lists is empty, or both are."""
    scores: list[list[Any]] = []
    for groups in comparison.groups:
        scores.append([score for group in groups for score in group.scores])
    every_score = [score for of_run in scores for score in of_run]
    if any(isinstance(score, CaptionScore) for score in every_score):
        return [{score.image_id: score for score in of_run} for of_run in scores], []
    if any(isinstance(score, AnswerScore) and score.question.object for score in every_score):
        return [], [_each_question_once(of_run) for of_run in scores]
    return [], []


def _each_question_once(scores: Sequence[AnswerScore]) -> list[AnswerScore]:
    """The splits of POPE share their positives; the first answer to a question is kept."""
    first: dict[tuple[str, str], AnswerScore] = {}
    for score in reversed(scores):
        first[score.question.image, score.question.text] = score
    return list(first.values())


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """Labels; with the folder's fingerprint where two runs have the same one, and a number where that is the same."""
    runs_with_label = Counter(run.label for run in runs)
    marked = []
    for run in runs:
        mark = run.header.get("fingerprint") or run.folder.name
        marked.append(run.label if runs_with_label[run.label] == 1 else f"{run.label} ({mark})")
    runs_with_mark = Counter(marked)
    return [name if runs_with_mark[name] == 1 else f"{name} #{place}" for place, name in enumerate(marked, start=1)]


def _pairs(labels: Sequence[str]) -> list[tuple[int, int]]:
    """Controls are each other's controls, too: of two such runs the one with the shorter label is the method."""
    pairs = []
    controls: set[int] = set()
    for method in sorted(range(len(labels)), key=lambda run: (len(labels[run]), run)):
        if method in controls:
            continue
        wanted = set(control_labels(labels[method])) - {labels[method]}
        for control, label in enumerate(labels):
            if label in wanted and control not in controls:
                controls.add(control)
                pairs.append((method, control))
    return pairs


def _selections(study: Study) -> list[Selection]:
    """Every method against its controls in the first figure of the table, judged together."""
    comparison, names = study.comparison, study.names
    metric = next(iter(comparison.benchmark.columns))
    differences: dict[str, dict[str, Difference]] = {}
    discordant: dict[str, dict[str, Discordant | None]] = {}
    pair_of: dict[str, tuple[int, int]] = {}
    for method, control in study.pairs:
        key = f"{names[method]} {names[control]}"
        pair_of[key] = method, control
        for group, difference, pictures in _differences(comparison, method, control, metric):
            differences.setdefault(group, {})[key] = difference
            discordant.setdefault(group, {})[key] = pictures
    selections = []
    for group, tested in differences.items():
        pictures_of = discordant[group] if metric == "CHAIR_S" else {}
        for verdict in judge(group, metric, comparison.benchmark.figures[metric], tested, pictures_of):
            method, control = pair_of[verdict.method]
            selections.append(
                Selection(
                    method=names[method],
                    control=names[control],
                    group=group,
                    metric=metric,
                    difference=verdict.difference,
                    p_holm=verdict.p_holm,
                    real=verdict.real,
                    better=verdict.better,
                )
            )
    return selections


def _differences(
    comparison: Comparison, method: int, control: int, metric: str
) -> Iterator[tuple[str, Difference, Discordant | None]]:
    """Of two runs in one figure, for each group of answers that both have."""
    metrics = {metric: comparison.benchmark.metrics[metric]}
    for own, others in zip(comparison.groups[method], comparison.groups[control], strict=False):
        if own.name == others.name:
            differences = stats.differences(own.counts, own.images, others.counts, others.images, metrics)
            yield own.name, differences[metric], discordant_pictures(own, others)


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Runs at these paths: run folders, and all those in other folders; untouched models first.

    Raises:
        ValueError: a path holds no run, or a broken one.
    """
    folders: list[Path] = []
    for path in map(Path, paths):
        holds_runs = path.is_dir() and not (path / HEADER).exists()
        inside = sorted(header.parent for header in path.rglob(HEADER)) if holds_runs else []
        folders += inside or [path]
    runs = {run.folder.resolve(): run for run in map(Run.read, folders)}
    return sorted(runs.values(), key=lambda run: not run.untouched)
