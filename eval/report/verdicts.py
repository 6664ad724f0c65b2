"""Which differences are real: the one rule, stated and applied here. No torch.

The rule is `RULE`, computed by `is_real`. Stars, bold, colours and words all go by it, whatever a method is compared
with: the untouched model, its captions cut to the same recall, or the method's own negative control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from vlmfix.eval.benchmarks.benchmark import Figure, Group, is_better
from vlmfix.eval.run.results import Comparison, Row, Run
from vlmfix.eval.scorers import stats
from vlmfix.eval.scorers.stats import Difference

LEVEL = 0.05
RULE = (
    "A difference is real if its 95 % interval excludes 0 and its p, adjusted for the number of methods compared "
    "(Holm, each figure by itself), is below .05; of fewer than 6 pictures none is."
)
FEWEST = 6
"""Pictures below which nothing is called real: even if all of them agreed, chance would do as much in one of 16 cases,
which resampling cannot tell."""
AGAINST_CUTS = {"CHAIR_S": "chair_s", "CHAIR_I_unique": "chair_i_unique", "F1": "f1"}
"""Figures at equal recall -> field of the truncation control."""


def is_real(difference: Difference, p_adjusted: float | None) -> bool:
    """Whether a difference is more than chance, by the rule above."""
    return difference.n >= FEWEST and difference.clear and p_adjusted is not None and p_adjusted < LEVEL


@dataclass(frozen=True)
class Discordant:
    """Pictures where only one of method and untouched model invents something: what McNemar's test looks at."""

    only_method: int
    only_base: int


@dataclass(frozen=True)
class Verdict:
    """One figure of one method against what it is compared with, and whether the difference is real."""

    method: str
    group: str
    metric: str
    difference: Difference
    p: float | None
    """Of CHAIR_S by McNemar's exact test, of all else by the bootstrap."""
    p_holm: float | None
    """Adjusted for the number of methods that have this figure."""
    methods: int
    """How many these are."""
    direction: Literal["less", "more"] | None
    """Which way is better; `None` where neither is."""
    discordant: Discordant | None = None
    """Where p is McNemar's."""

    @property
    def real(self) -> bool:
        """Whether the interval excludes 0 and the adjusted p is below .05."""
        return is_real(self.difference, self.p_holm)

    @property
    def better(self) -> bool | None:
        """Whether the change is for the better; `None` where more is neither good nor bad, or nothing changed."""
        return is_better(self.direction, self.difference.value)


def judge(
    group: str,
    metric: str,
    figure: Figure,
    tested: Mapping[str, Difference],
    discordant: Mapping[str, Discordant | None] = MappingProxyType({}),
) -> list[Verdict]:
    """One figure of all methods that share a group of answers, adjusted for their number.

    Args:
        group: Name of the group.
        metric: Name of the figure.
        figure: What it is.
        tested: Method -> its difference to the untouched model.
        discordant: Method -> pictures that differ in this figure, where it is one that McNemar's test judges.
    """
    p_values = []
    for method, difference in tested.items():
        pair = discordant.get(method)
        if pair is None or difference.p is None:
            p_values.append(difference.p)
        else:
            p_values.append(stats.mcnemar(pair.only_method, pair.only_base))
    adjusted = stats.holm(p_values)
    family = sum(p is not None for p in p_values)
    return [
        Verdict(
            method=method,
            group=group,
            metric=metric,
            difference=difference,
            p=p,
            p_holm=p_holm,
            methods=family,
            direction=figure.better,
            discordant=discordant.get(method),
        )
        for (method, difference), p, p_holm in zip(tested.items(), p_values, adjusted, strict=True)
    ]


def against_cuts(comparison: Comparison, names: Sequence[str]) -> list[Verdict]:
    """One verdict a method and figure against the baseline's captions, cut to the same recall."""
    rows = iter(comparison.rows)
    controls = {}
    for name, groups in zip(names, comparison.groups, strict=True):
        for group in groups:
            control = next(rows).control
            if control is not None:
                controls[name, group.name] = control
    verdicts: list[Verdict] = []
    for group_name in dict.fromkeys(group_name for _, group_name in controls):
        of_group = {name: control for (name, its_group), control in controls.items() if its_group == group_name}
        for metric, field in AGAINST_CUTS.items():
            tested = {name: control.difference(field) for name, control in of_group.items()}
            verdicts += judge(group_name, metric, comparison.benchmark.figures[metric], tested)
    return verdicts


def verdicts_of(comparison: Comparison, names: Sequence[str]) -> list[Verdict]:
    """One verdict a method, group and figure; Holm's family is the methods that share group and figure."""
    base = untouched_run(comparison.runs)
    base_answers = {} if base is None else {group.name: group for group in comparison.groups[base]}
    rows = iter(comparison.rows)
    tested: dict[str, list[tuple[str, Row, Discordant | None]]] = {}
    for name, groups in zip(names, comparison.groups, strict=True):
        for answers in groups:
            row = next(rows)
            family = tested.setdefault(row.group, [])
            if row.differences is not None:
                family.append((name, row, discordant_pictures(answers, base_answers.get(answers.name))))
    verdicts: list[Verdict] = []
    for group, family in tested.items():
        metrics = list(family[0][1].differences or {}) if family else []
        for metric in metrics:
            differences = {name: (row.differences or {})[metric] for name, row, _ in family}
            pairs = {name: pair for name, _, pair in family} if metric == "CHAIR_S" else {}
            figure = comparison.benchmark.figures[metric]
            verdicts += judge(group, metric, figure, differences, pairs)
    return verdicts


def discordant_pictures(method: Group, base: Group | None) -> Discordant | None:
    """Pictures where only one of two runs invents something; `None` where that is not counted."""
    if base is None or "hallucinated_captions" not in method.counts:
        return None
    invents = _invents(method)
    base_invents = _invents(base)
    shared = [image for image in invents if image in base_invents]
    return Discordant(
        only_method=sum(invents[image] and not base_invents[image] for image in shared),
        only_base=sum(base_invents[image] and not invents[image] for image in shared),
    )


def _invents(answers: Group) -> dict[Any, bool]:
    """Picture -> whether its caption names anything that is not there."""
    counts = answers.counts["hallucinated_captions"]
    return {image: bool(count > 0) for image, count in zip(answers.images, counts, strict=True)}


def untouched_run(runs: Sequence[Run]) -> int | None:
    """Which run is the untouched model's; `None` without one."""
    return next((place for place, run in enumerate(runs) if run.untouched), None)
