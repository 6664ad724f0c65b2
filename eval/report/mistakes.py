"""Where the mistakes are: along a caption, by object, by the kind of wrong answer. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmfix.eval.report.study import Study
from vlmfix.eval.scorers import stats
from vlmfix.eval.scorers.chair import CaptionScore
from vlmfix.eval.scorers.stats import Counts, Estimate, ratio
from vlmfix.eval.scorers.yesno import AnswerScore

BINS = 5
"""Fifths of a caption, for the position of mentions."""


def by_position(scores: Mapping[int, CaptionScore], n_resamples: int = 2000) -> list[Estimate]:
    """Share of the mentions that are invented, in each fifth of the caption's words."""
    mentions = np.zeros((len(scores), BINS))
    invented = np.zeros((len(scores), BINS))
    for row, score in enumerate(scores.values()):
        for mention in score.mentions:
            words_before = len(score.caption[: mention.start].split())
            fifth = min(int(words_before / max(score.words, 1) * BINS), BINS - 1)
            mentions[row, fifth] += 1
            invented[row, fifth] += mention.node not in score.truth
    counts: dict[str, np.ndarray] = {}
    metrics: dict[str, stats.Metric] = {}
    for fifth in range(BINS):
        counts[f"mentions {fifth}"] = mentions[:, fifth]
        counts[f"invented {fifth}"] = invented[:, fifth]
        metrics[str(fifth)] = _share_invented(fifth)
    return list(stats.estimates(counts, metrics, n_resamples).values())


def _share_invented(fifth: int) -> stats.Metric:
    def share(sums: Counts) -> np.ndarray:
        return ratio(sums[f"invented {fifth}"], sums[f"mentions {fifth}"])

    return share


@dataclass(frozen=True)
class Rate:
    """How often something happened, of how many chances."""

    times: int
    of: int

    @property
    def share(self) -> float:
        """0 where there was no chance."""
        return self.times / self.of if self.of else 0.0


Rates = dict[str, list[Rate]]
"""Object -> its rate in each run."""


def object_rates(study: Study) -> tuple[Rates, Rates]:
    """For each object, how often each method invents it (of the pictures without it), and misses it (of those with it).

    From questions: how often it says yes where the object is absent, and no (or neither) where it is present. Objects
    that are wrong most often come first.
    """
    objects: set[str] = set()
    for captions in study.captions:
        objects = objects.union(*(score.truth | score.objects for score in captions.values()))
    counted = [_of_captions(list(captions.values()), objects) for captions in study.captions]
    counted += [_of_answers(answers) for answers in study.answers]
    invented = _ranked([counts.invented for counts in counted], [counts.absent for counts in counted])
    missed = _ranked([counts.missed for counts in counted], [counts.present for counts in counted])
    return invented, missed


@dataclass(frozen=True)
class _ObjectCounts:
    """Object -> number of pictures, or of questions about it."""

    invented: Counter[str]
    absent: Counter[str]
    missed: Counter[str]
    present: Counter[str]


def _of_captions(scores: Sequence[CaptionScore], objects: Iterable[str]) -> _ObjectCounts:
    """Of one run; an object is absent from pictures also where only other runs name it."""
    counts = _ObjectCounts(Counter(), Counter(), Counter(), Counter())
    for score in scores:
        counts.present.update(score.truth)
        counts.invented.update(score.objects - score.truth)
        counts.missed.update(score.missed)
    for name in objects:
        counts.absent[name] = len(scores) - counts.present[name]
    return counts


def _of_answers(scores: Sequence[AnswerScore]) -> _ObjectCounts:
    counts = _ObjectCounts(Counter(), Counter(), Counter(), Counter())
    for score in scores:
        name, label = score.question.object, score.question.label
        if score.dropped:
            continue
        if label == "no":
            counts.absent[name] += 1
            counts.invented[name] += score.prediction == "yes"
        else:
            counts.present[name] += 1
            counts.missed[name] += not score.correct
    return counts


def _ranked(times: Sequence[Counter[str]], chances: Sequence[Counter[str]]) -> Rates:
    """Objects that it happened to in any run, those that it happened to most often first."""
    happened = sorted({name for of_run in times for name in of_run.elements()})
    rates: Rates = {}
    for name in happened:
        rates[name] = [Rate(count[name], of[name]) for count, of in zip(times, chances, strict=True)]
    most_first = sorted(rates, key=lambda name: -sum(rate.times for rate in rates[name]))
    return {name: rates[name] for name in most_first}


COUNTED = ("tp", "fn", "tn", "fp", "unknown", "dropped", "unknown_yes")


def confusion(study: Study) -> dict[str, list[dict[str, int]]]:
    """Answers of each method by label and reading, for each split; nothing where there are no questions."""
    tables: dict[str, list[dict[str, int]]] = {}
    for entry in study.entries:
        counts = entry.answers.counts
        if "tp" in counts:
            sums = {name: int(counts[name].sum()) for name in COUNTED}
            tables.setdefault(entry.answers.name, []).append(sums)
    return tables
