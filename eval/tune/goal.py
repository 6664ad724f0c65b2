"""What `vlmfix tune` looks for: fewest hallucinating captions, or best answers, within limits. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmfix.eval.benchmarks.benchmark import Benchmark, Group
from vlmfix.eval.scorers import stats
from vlmfix.eval.scorers.stats import Difference
from vlmfix.eval.tune.space import Candidate

RESAMPLES = 1000
PRICES = {"recall": 4.0, "repetition": 2.0, "words": 1.0, "cost": 0.2}
"""What a point beyond a limit costs in points of the objective (ours): about what cutting captions short buys, so that
no vaguer caption wins. Words and cost are counted in percent."""


@dataclass(frozen=True)
class Limits:
    """What a fix may cost, against the untouched model on the same pictures."""

    recall: float = -0.5
    """Least change of recall, points."""
    words: float = 0.95
    """Least words, of the untouched model's."""
    repetition: float = 2.0
    """Most change of repeating captions, points."""
    cost: float = 1.10
    """Most forward passes for a token, of the untouched model's."""


@dataclass
class Trial:
    """A candidate, and what came of it so far."""

    candidate: Candidate
    images: list[Any] = field(default_factory=list)
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    """Additive counts, one number a picture."""
    passes: float = 0.0
    tokens: float = 0.0
    """Of its answers, special tokens included."""
    out: str = ""
    """Why it is out of the race; empty while it is in."""

    def add(self, groups: Sequence[Group], records: Sequence[Mapping[str, Any]]) -> None:
        """More answers, to pictures not asked about before. A group of all answers goes before its parts."""
        of_all = [group for group in groups if len(group.scores) == len(records)]
        groups = of_all[:1] or groups
        images = sorted({image for group in groups for image in group.images}, key=str)
        place_of = {image: place for place, image in enumerate(images)}
        sums: dict[str, np.ndarray] = {}
        for group in groups:
            places = [place_of[image] for image in group.images]
            for name, column in group.counts.items():
                np.add.at(sums.setdefault(name, np.zeros(len(images))), places, np.asarray(column, float))
        for name, column in sums.items():
            self.counts[name] = np.concatenate([self.counts.get(name, np.zeros(0)), column])
        self.images += images
        self.passes += sum(record["passes"] for record in records)
        self.tokens += sum(len(record["token_ids"]) for record in records)

    @property
    def n(self) -> int:
        """Pictures so far."""
        return len(self.images)


@dataclass(frozen=True)
class Verdict:
    """A trial against the untouched model on the pictures of both, in points."""

    figures: dict[str, float]
    """The trial's own, on these pictures."""
    differences: dict[str, Difference]
    cost: float
    """Forward passes for a token, of the untouched model's."""
    score: float
    """Change of the objective, negative is better, and the price of what lies beyond the limits."""
    hope: float
    """The same, but a limit counts only as far as it is broken by more than a standard error: for a race in which most
    has been asked about few pictures."""
    broken: dict[str, float]
    """Limit -> how far beyond it the estimate is."""
    surely_broken: tuple[str, ...]
    """Limits that the whole interval is beyond."""


class Goal:
    """An objective of one benchmark, with limits."""

    def __init__(self, bench: Benchmark, limits: Limits) -> None:
        self.bench, self.limits = bench, limits
        self.objective = "accuracy" if "accuracy" in bench.metrics else next(iter(bench.figures))
        self.sign = 1.0 if bench.figures[self.objective].better == "less" else -1.0
        """By which the objective becomes something to make small."""

    @property
    def figures(self) -> tuple[str, ...]:
        """The objective, and what has a limit."""
        return (self.objective, *(name for name in ("recall", "repetition", "words") if self.bench.describes))

    def verdict(self, trial: Trial, base: Trial) -> Verdict:
        """A trial against the untouched model, on the pictures that both have."""
        metrics = {name: self.bench.metrics[name] for name in self.figures}
        points = {name: 1.0 if name == "words" else 100.0 for name in metrics}
        raw = stats.differences(trial.counts, trial.images, base.counts, base.images, metrics, RESAMPLES)
        differences = {name: _scaled(raw[name], points[name]) for name in metrics}
        common = set(base.images)
        rows = [row for row, image in enumerate(trial.images) if image in common]
        own = stats.total({name: column[rows] for name, column in trial.counts.items()})
        figures = {name: points[name] * float(metric(own)) for name, metric in metrics.items()}
        cost = (trial.passes / max(trial.tokens, 1)) / max(base.passes / max(base.tokens, 1), 1e-9)
        beyond = self._beyond(figures, differences, cost)
        change = self.sign * (differences[self.objective].value or 0.0)
        broken = {name: excess for name, (excess, _) in beyond.items() if excess > 1e-9}
        surely = tuple(name for name, (_, least) in beyond.items() if least > 1e-9)
        by_more = {name: excess - (excess - least) / 1.96 for name, (excess, least) in beyond.items()}
        return Verdict(figures, differences, cost, change + price(broken), change + price(by_more), broken, surely)

    def expected(self, parts: Sequence[Verdict]) -> float:
        """The hope of a sum of methods, if their effects add up."""
        change = sum(self.sign * (part.differences[self.objective].value or 0.0) for part in parts)
        beyond = {"cost": 100 * (1 + sum(part.cost - 1 for part in parts) - self.limits.cost)}
        if self.bench.describes:
            recall, repetition = (
                sum(part.differences[name].value or 0.0 for part in parts) for name in ("recall", "repetition")
            )
            beyond |= {"recall": self.limits.recall - recall, "repetition": repetition - self.limits.repetition}
        return change + price(beyond)

    def _beyond(
        self, figures: Mapping[str, float], differences: Mapping[str, Difference], cost: float
    ) -> dict[str, tuple[float, float]]:
        """How far beyond each limit the estimate is, and the end of its interval that is nearer to the limit."""
        beyond: dict[str, tuple[float, float]] = {"cost": (100 * (cost - self.limits.cost),) * 2}
        if self.bench.describes:
            recall, repetition, words = (differences[name] for name in ("recall", "repetition", "words"))
            of_base = figures["words"] - (words.value or 0.0)
            short = 100 * (self.limits.words - figures["words"] / of_base) if of_base else 0.0
            half_width = 100 * ((words.high or 0.0) - (words.value or 0.0)) / of_base if of_base else 0.0
            beyond |= {
                "recall": (self.limits.recall - (recall.value or 0.0), self.limits.recall - (recall.high or 0.0)),
                "repetition": (
                    (repetition.value or 0.0) - self.limits.repetition,
                    (repetition.low or 0.0) - self.limits.repetition,
                ),
                "words": (short, short - half_width),
            }
        return beyond


def price(beyond: Mapping[str, float]) -> float:
    """What lies beyond limits, in points of the objective."""
    return sum(PRICES[name] * max(0.0, excess) for name, excess in beyond.items())


def _scaled(difference: Difference, factor: float) -> Difference:
    def times(value: float | None) -> float | None:
        return None if value is None else factor * value

    return Difference(
        times(difference.value), times(difference.low), times(difference.high), difference.p, difference.n,
        difference.left_out,
    )  # fmt: skip
