"""Reports made from a comparison: tables, words that say which differences are real, Markdown, CSV, JSON. No torch.

A difference is called real if its 95 % interval excludes 0 and its p, adjusted for the number of methods compared
(Holm, for each figure by itself), is below .05. The page (`vlmfix.eval.report.html`) is made from the same `Study`.

    studies = [study(comparison) for comparison in compare(runs)]
    words(studies[0]), to_csv(studies), to_json(studies), to_markdown(studies)
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from vlmfix.eval.benchmarks import amber_captions
from vlmfix.eval.benchmarks.benchmark import Group
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run.results import HEADER, Comparison, Row, Run
from vlmfix.eval.scorers import chair, stats
from vlmfix.eval.scorers.chair import CaptionScore
from vlmfix.eval.scorers.stats import Difference, Estimate, ratio
from vlmfix.eval.scorers.truncation import CutCaptions, TruncationControl
from vlmfix.eval.scorers.yesno import AnswerScore
from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import parse, spec_of

LEGEND = (
    "95 % intervals: bootstrap over pictures. Second lines: paired difference to the untouched model; "
    "* marks an interval that excludes 0. At equal recall: difference to the untouched captions, cut after so many "
    "words that their recall is the same."
)
LEVEL = 0.05
BINS = 5
"""Fifths of a caption, for the position of mentions."""
MEANING = {
    "CHAIR_S": "captions that name anything that is not there",
    "CHAIR_I": "mentions of objects that are not there",
    "CHAIR_I_unique": "the same, each object once a caption",
    "recall": "objects in the pictures that are named",
    "precision": "objects named that are there",
    "F1": "harmonic mean of precision and recall",
    "objects": "different objects a caption",
    "mentions": "mentions of objects a caption",
    "words": "words a caption",
    "repetition": "captions that repeat themselves: over a fifth of their 4-grams",
    "accuracy": "right answers",
    "TNR": "no where no is right",
    "yes_ratio": "answers that say yes",
    "MCC": "Matthews correlation, 0 is guessing",
}
YES_NO = {"recall": "yes where yes is right", "precision": "yes that is right"}
"""Where the meaning is another with questions."""
LESS_IS_BETTER = frozenset({"CHAIR_S", "CHAIR_I", "CHAIR_I_unique", "repetition"})
MORE_IS_BETTER = frozenset({"recall", "precision", "F1", "accuracy", "TNR", "MCC"})
_PLAIN = frozenset({"words", "objects", "mentions", "MCC"})


def figure(e: Estimate, factor: float, signed: bool = False) -> str:
    """`55.8 [50.5, 60.3]`, or a dash where undefined."""
    if e.value is None:
        return "–"
    return f"{number(e.value, factor, signed, e.value)} {interval(e, factor, signed)}"


def interval(e: Estimate, factor: float, signed: bool = False) -> str:
    """`[50.5, 60.3]`."""
    return f"[{number(e.low, factor, signed, e.value)}, {number(e.high, factor, signed, e.value)}]"


def number(x: float | None, factor: float, signed: bool = False, like: float | None = None) -> str:
    """`50.5`, with as many digits as suit another number, or a dash where undefined."""
    if x is None:
        return "–"
    digits = 1 if factor == 100 or abs((x if like is None else like) * factor) >= 10 else 2
    rounded = round(x * factor, digits) or 0.0  # no minus before nothing
    return f"{rounded:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def change(d: Difference, factor: float) -> str:
    """`−11.8 [−15.9, −7.7] *`."""
    return figure(d, factor, signed=True) + (" *" if d.clear else "")


def _groups(comparison: Comparison) -> Iterator[tuple[str, list[Row]]]:
    for group in dict.fromkeys(row.group for row in comparison.rows):
        yield group, [row for row in comparison.rows if row.group == group]


AGAINST_CUTS = {"CHAIR_S": "chair_s", "F1": "f1"}
"""Figures of the truncation control that tables show -> field of the control."""


def lines(comparison: Comparison, rows: Sequence[Row]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Lines of a table: the figure's name, and for each method its figure and its difference, either may be empty."""
    for metric, (unit, factor) in comparison.benchmark.columns.items():
        if any(row.estimates[metric].value is not None for row in rows) or metric != "pair_accuracy":
            cells = [
                (
                    figure(r.estimates[metric], factor),
                    "" if r.differences is None else change(r.differences[metric], factor),
                )
                for r in rows
            ]
            yield f"{metric} {unit}".strip(), cells
    if any(row.control for row in rows):
        for metric, field in AGAINST_CUTS.items():
            gaps = ["" if row.control is None else beyond(getattr(row.control, field)) for row in rows]
            yield f"{metric} % at equal recall", [("", gap) for gap in gaps]
    if any(row.unparsed for row in rows):
        yield "neither yes nor no", [(str(row.unparsed), "") for row in rows]


def beyond(e: Estimate) -> str:
    """A difference of the truncation control, marked where its interval excludes 0."""
    clear = e.low is not None and e.high is not None and (e.low > 0 or e.high < 0)
    return figure(e, 100, signed=True) + (" *" if clear else "")


def _table_title(comparison: Comparison, group: str, rows: Sequence[Row]) -> str:
    title, where = _grouped(comparison, group), f"{rows[0].n} pictures of {Path(comparison.data.name).name}"
    return f"{title}, model {comparison.model}, {where}{comparison.testing}"


def _grouped(comparison: Comparison, group: str) -> str:
    return f"{comparison.title}, {group}" if group else comparison.title


def tables(comparison: Comparison) -> Iterator[Table]:
    """One table a group of answers: metrics down, methods across; then what others report for the protocol."""
    for group, rows in _groups(comparison):
        table = Table(title=Text(_table_title(comparison, group, rows)), title_justify="left", title_style="bold")
        table.add_column("")
        for row in rows:
            table.add_column(Text(row.method), justify="right", no_wrap=True)
        for name, cells in lines(comparison, rows):
            shown = []
            for value, gap in cells:
                cell = Text(value)
                if gap:
                    cell.append(f"\n{gap}" if value else gap, style="bold" if gap.endswith("*") else "dim")
                shown.append(cell)
            table.add_row(name, *shown)
        yield table
    head, body = published_table(comparison)
    if body:
        title = f"Published for {comparison.protocol_name.partition('+')[0]}, LLaVA-1.5-7B; {MARKS}"
        table = Table(title=Text(title), title_justify="left", title_style="bold")
        for name in head:
            table.add_column(Text(name))
        for cells_ in body:
            table.add_row(*map(Text, cells_))
        yield table


MARKS = "marks: paper (its own table), paper:X (in X's), code, issue, measured (from released answers), second-hand"


def published_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the figures that others report for the protocol; no lines if there are none."""
    found = comparison.published
    columns = list(
        dict.fromkeys((group, m) for one in found for group, figures in one.figures.items() for m in figures)
    )
    head = ["method", "decoding", *(" ".join(filter(None, [g, m])) for g, m in columns), "evidence"]
    body = []
    for one in found:
        figures = (one.figures.get(group, {}).get(metric) for group, metric in columns)
        body.append([one.method, one.decoding, *("" if x is None else f"{x:.1f}" for x in figures), one.mark])
    return head, body


def deviation_text(comparison: Comparison) -> str:
    """How the runs stand to their protocol; empty without one."""
    protocol = comparison.protocol
    if protocol is None:
        return ""
    if comparison.deviations:
        said = f"Deviates from protocol {protocol.name} in {'; '.join(comparison.deviations)}"
    else:
        said = f"As protocol {protocol.name} has it"
    stand_in = f". {protocol.stand_in[0].upper()}{protocol.stand_in[1:]}" if protocol.stand_in else ""
    return f"{said} (source: {protocol.source}){stand_in}"


def verdicts(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """How each answer was read and judged, ready for JSON; a question in several groups stands once."""
    for run, groups in zip(comparison.runs, comparison.groups, strict=True):
        seen = set()
        for score in (score for group in groups for score in group.scores):
            if id(score) not in seen:
                seen.add(id(score))
                yield {"benchmark": comparison.title, "method": run.label, **explain(score)}


def explain(score: Any) -> dict[str, Any]:
    """One verdict, ready for JSON."""
    if isinstance(score, CaptionScore):
        return chair.explain(score)
    if isinstance(score, amber_captions.CaptionScore):
        return amber_captions.explain(score)
    question = score.question
    return {
        **{"id": question.id, "image": question.image, "question": question.text, "group": question.group},
        **{"label": question.label, "answer": score.answer, "prediction": score.prediction, "correct": score.correct},
    }


def markdown(comparison: Comparison) -> str:
    """The same as Markdown."""
    found = []
    for group, rows in _groups(comparison):
        head = [
            f"{_grouped(comparison, group)}, {rows[0].n} pictures{comparison.testing}",
            *(f"`{row.method}`" for row in rows),
        ]
        found += [_pipes(head), "|---" * len(head) + "|"]
        for label, cells in lines(comparison, rows):
            told = [f"**{gap.removesuffix(' *')}**" if gap.endswith("*") else gap for _, gap in cells]
            found.append(
                _pipes([label, *("<br>".join(filter(None, [v, g])) for (v, _), g in zip(cells, told, strict=True))])
            )
        found.append("")
    head, body = published_table(comparison)
    if body:
        found += [f"Published for this protocol, LLaVA-1.5-7B; {MARKS}.", "", _pipes(head), "|---" * len(head) + "|"]
        found += [*map(_pipes, body), ""]
    return "\n".join(found)


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# From a comparison to what can be said about it


@dataclass(frozen=True)
class Discordant:
    """Pictures where only one of method and untouched model invents something: what McNemar's test looks at."""

    only_method: int
    only_base: int


@dataclass(frozen=True)
class Verdict:
    """One figure of one method against the untouched model, and whether the difference is real."""

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
    discordant: Discordant | None = None
    """Where p is McNemar's."""

    @property
    def real(self) -> bool:
        """Whether the interval excludes 0 and the adjusted p is below .05."""
        return self.difference.clear and self.p_holm is not None and self.p_holm < LEVEL

    @property
    def better(self) -> bool | None:
        """Whether the change is for the better; `None` where more is neither good nor bad, or nothing changed."""
        if not self.difference.value or self.metric not in LESS_IS_BETTER | MORE_IS_BETTER:
            return None
        return (self.difference.value < 0) == (self.metric in LESS_IS_BETTER)


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
    against_controls: list[Selection]
    """Each method against each of its negative controls that was run too."""

    @property
    def groups(self) -> list[list[Group]]:
        """Counts per picture."""
        return self.comparison.groups

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
        """Of each run; None for the untouched model, and without one."""
        if not self.captions:
            return [None] * len(self.names)
        return [row.control for row in self.comparison.rows]

    @property
    def base(self) -> int | None:
        """Which run is the untouched model's."""
        return next((i for i, run in enumerate(self.comparison.runs) if run.untouched), None)

    @property
    def baseline(self) -> str:
        """What the others are compared with; a name stands between backticks."""
        return self.comparison.baseline

    @property
    def columns(self) -> dict[str, tuple[str, float]]:
        """Figures, in the order of a report: name -> unit and factor."""
        known = list(self.comparison.rows[0].estimates) if self.comparison.rows else []
        given = self.comparison.benchmark.columns
        ordered = known if self.captions else [*(m for m in given if m in known), *(m for m in known if m not in given)]
        return {m: given.get(m, ("", 1.0) if m in _PLAIN else ("%", 100.0)) for m in ordered}

    @property
    def pictures(self) -> int:
        """Most pictures that a method was asked about."""
        return max((row.n for row in self.comparison.rows), default=0)

    def rows(self) -> Iterator[tuple[str, list[Row]]]:
        """Rows of each group of answers, in the order of the runs."""
        yield from _groups(self.comparison)

    def same_answers(self, i: int) -> bool:
        """Whether a run answers word for word as the untouched model does."""
        texts = [{r["id"]: r["text"] for r in self.comparison.runs[k].records} for k in (i, self.base or 0)]
        return self.base is not None and texts[0] == texts[1]


def study(comparison: Comparison) -> Study:
    """Judge a comparison's differences, and gather its answers."""
    scores = [[score for group in found for score in group.scores] for found in comparison.groups]
    captions: list[dict[int, CaptionScore]] = []
    answers: list[list[AnswerScore]] = []
    if any(isinstance(score, CaptionScore) for found in scores for score in found):
        captions = [{score.image_id: score for score in found} for found in scores]
    elif any(isinstance(score, AnswerScore) and score.question.object for found in scores for score in found):
        # each different question once: the splits of POPE share their positives
        answers = [list({(s.question.image, s.question.text): s for s in reversed(found)}.values()) for found in scores]
    names = _names(comparison.runs)
    base = next((i for i, run in enumerate(comparison.runs) if run.untouched), None)
    return Study(
        comparison=comparison,
        names=names,
        captions=captions,
        answers=answers,
        verdicts=_verdicts(comparison.rows, names, comparison.groups, base),
        against_controls=list(_selections(comparison, names)),
    )


def _selections(comparison: Comparison, names: Sequence[str]) -> Iterator[Selection]:
    """Controls are each other's controls, too: of two such runs the one with the shorter label is the method."""
    metric = next(iter(comparison.benchmark.columns))
    metrics = {metric: comparison.benchmark.metrics[metric]}
    controls: set[int] = set()
    for i in sorted(range(len(names)), key=lambda i: (len(comparison.runs[i].label), i)):
        if i in controls:
            continue
        wanted = _control_labels(comparison.runs[i].label) - {comparison.runs[i].label}
        mine = [k for k, other in enumerate(comparison.runs) if other.label in wanted and k not in controls]
        controls.update(mine)
        for k in mine:
            for one, other in zip(comparison.groups[i], comparison.groups[k], strict=False):
                if one.name == other.name:
                    apart = stats.differences(one.counts, one.images, other.counts, other.images, metrics)
                    yield Selection(names[i], names[k], one.name, metric, apart[metric])


def _control_labels(label: str) -> set[str]:
    """Labels of a method's negative controls; none for a label that is no method's here."""
    try:
        return {spec_of(control) for control in controls_of(parse(label))}
    except (ValueError, TypeError):
        return set()


def controls_of(method: Sequence[Intervention]) -> list[tuple[Intervention, ...]]:
    """Negative controls of a method, also of one that combines several: each part replaced by its control in turn."""
    return [(*method[:i], control, *method[i + 1 :]) for i, one in enumerate(method) for control in one.controls()]


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Runs at these paths: run folders, and all those in other folders; untouched models first.

    Raises:
        ValueError: a path holds no run, or a broken one.
    """
    found = []
    for path in map(Path, paths):
        inside = sorted(p.parent for p in path.rglob(HEADER)) if path.is_dir() and not (path / HEADER).exists() else []
        found += inside or [path]
    runs = {run.folder.resolve(): run for run in map(Run.read, found)}
    return sorted(runs.values(), key=lambda run: not run.untouched)


def _names(runs: Sequence[Run]) -> list[str]:
    """Labels, with the folder's fingerprint where two runs have the same."""
    often = Counter(run.label for run in runs)
    marks = [f"{r.label} ({r.header.get('fingerprint') or r.folder.name})" if often[r.label] > 1 else "" for r in runs]
    twice = Counter(marks)
    return [
        run.label if not mark else mark if twice[mark] == 1 else f"{mark} #{i + 1}"
        for i, (run, mark) in enumerate(zip(runs, marks, strict=True))
    ]


def _verdicts(
    rows: Sequence[Row], names: Sequence[str], groups: Sequence[Sequence[Group]], base: int | None
) -> list[Verdict]:
    """One verdict a method, group and figure; Holm's family is the methods that share group and figure."""
    owners = [(i, k) for i, found in enumerate(groups) for k in range(len(found))]
    tested = [(row, i, k) for row, (i, k) in zip(rows, owners, strict=True) if row.differences is not None]
    found = []
    for group in dict.fromkeys(row.group for row in rows):
        family = [(row, i, k) for row, i, k in tested if row.group == group]
        for metric in family[0][0].differences or {} if family else {}:
            apart = [(row.differences or {})[metric] for row, _, _ in family]
            discordant = [
                _discordant(groups[i][k], groups[base][k]) if metric == "CHAIR_S" and base is not None else None
                for _, i, k in family
            ]
            p_values = [
                d.p if pair is None or d.p is None else stats.mcnemar(pair.only_method, pair.only_base)
                for d, pair in zip(apart, discordant, strict=True)
            ]
            adjusted = stats.holm(p_values)
            n = sum(p is not None for p in p_values)
            found += [
                Verdict(names[i], group, metric, apart[at], p_values[at], adjusted[at], n, discordant[at])
                for at, (_, i, _) in enumerate(family)
            ]
    return found


def _discordant(method: Group, base: Group) -> Discordant | None:
    if "hallucinated_captions" not in method.counts:
        return None
    mine, theirs = (dict(zip(g.images, g.counts["hallucinated_captions"] > 0, strict=True)) for g in (method, base))
    both = [(mine[image], theirs[image]) for image in mine if image in theirs]
    return Discordant(sum(bool(a > b) for a, b in both), sum(bool(b > a) for a, b in both))


# Figures of the page


def by_position(scores: Mapping[int, CaptionScore], n_resamples: int = 2000) -> list[Estimate]:
    """Share of the mentions that are invented, in each fifth of the caption's words."""
    named, invented = (np.zeros((len(scores), BINS)) for _ in range(2))
    for row, score in enumerate(scores.values()):
        for mention in score.mentions:
            share = len(score.caption[: mention.start].split()) / max(score.words, 1)
            at = min(int(share * BINS), BINS - 1)
            named[row, at] += 1
            invented[row, at] += mention.node not in score.truth
    counts = {f"{what}{b}": table[:, b] for what, table in (("n", named), ("h", invented)) for b in range(BINS)}
    metrics: dict[str, stats.Metric] = {str(b): _quotient(f"h{b}", f"n{b}") for b in range(BINS)}
    return list(stats.estimates(counts, metrics, n_resamples).values())


def _quotient(above: str, below: str) -> stats.Metric:
    return lambda n: ratio(n[above], n[below])


@dataclass(frozen=True)
class Rate:
    """How often something happened, of how many chances."""

    times: int
    of: int

    @property
    def share(self) -> float:
        """0 where there was no chance."""
        return self.times / self.of if self.of else 0.0


def object_rates(study: Study) -> tuple[dict[str, list[Rate]], dict[str, list[Rate]]]:
    """For each object, how often each method invents it (of the pictures without it), and misses it (of those with it).

    From questions: how often it says yes where the object is absent, and no (or neither) where it is present. Objects
    that are wrong most often come first.
    """
    invented: list[Counter[str]] = []
    missed: list[Counter[str]] = []
    absent: list[Counter[str]] = []
    present: list[Counter[str]] = []
    for scores in study.captions:
        nodes = set().union(*(s.truth | s.objects for s in scores.values()))
        there = Counter(node for s in scores.values() for node in s.truth)
        invented.append(Counter(node for s in scores.values() for node in s.objects - s.truth))
        missed.append(Counter(node for s in scores.values() for node in s.missed))
        present.append(there)
        absent.append(Counter({node: len(scores) - there[node] for node in nodes}))
    for answers in study.answers:
        kept = [s for s in answers if not s.dropped]
        no, yes = ([s for s in kept if s.question.label == label] for label in ("no", "yes"))
        invented.append(Counter(s.question.object for s in no if s.prediction == "yes"))
        missed.append(Counter(s.question.object for s in yes if not s.correct))
        absent.append(Counter(s.question.object for s in no))
        present.append(Counter(s.question.object for s in yes))
    return _ranked(invented, absent), _ranked(missed, present)


def _ranked(times: Sequence[Counter[str]], of: Sequence[Counter[str]]) -> dict[str, list[Rate]]:
    names = sorted(set().union(*times)) if times else []
    rates = {name: [Rate(t[name], o[name]) for t, o in zip(times, of, strict=True)] for name in names}
    return dict(sorted(rates.items(), key=lambda item: (-sum(r.times for r in item[1]), item[0])))


def confusion(study: Study) -> dict[str, list[dict[str, int]]]:
    """Answers of each method by label and reading, for each split; nothing where there are no questions."""
    found: dict[str, list[dict[str, int]]] = {}
    for groups in study.groups:
        for group in groups:
            if "tp" in group.counts:
                sums = {name: int(group.counts[name].sum()) for name in ("tp", "fn", "tn", "fp", "unknown", "dropped")}
                sums["unknown_yes"] = int(group.counts["unknown_yes"].sum())
                found.setdefault(group.name, []).append(sums)
    return found


# Words


def p_text(p: float | None) -> str:
    """`p = .042`, `p < .001`."""
    if p is None:
        return "p unknown"
    return "p < .001" if p < 0.001 else "p = 1" if p > 0.9995 else f"p = {p:.3f}".replace("0.", ".")


def words(study: Study) -> list[str]:
    """What the figures say, a paragraph for each method; names of methods stand between backticks."""
    if study.base is None:
        return [f"No run of {study.baseline} is among these, so there is nothing to tell a difference from."]
    methods = [i for i, run in enumerate(study.comparison.runs) if not run.untouched]
    if not methods:
        return [f"There is only {study.baseline}, and nothing to compare it with."]
    return [_about(study, i) for i in methods]


def _about(study: Study, i: int) -> str:
    name = f"`{study.names[i]}`"
    if study.same_answers(i):
        n = len(study.comparison.runs[i].records)
        return f"{name} answers word for word as {study.baseline} does, all {n} times: it changes nothing here."
    shown = [v for v in study.verdicts if v.method == study.names[i] and v.metric in study.comparison.benchmark.columns]
    if owner := next((one.method for one in study.against_controls if one.control == study.names[i]), None):
        first = [v for v in shown if v.metric == shown[0].metric]
        return f"{name}, a negative control of `{owner}`: {_figures(study, first)} to {study.baseline}."
    kinds: dict[str, Callable[[Verdict], bool]] = {
        "really better": lambda v: v.better is True,
        "really worse": lambda v: v.better is False,
        "really changed": lambda v: v.better is None,
    }
    real = [v for v in shown if v.real]
    parts = [
        f"{kind} in {_figures(study, [v for v in real if belongs(v)])}"
        for kind, belongs in kinds.items()
        if any(map(belongs, real))
    ]
    rest = _names_only([v for v in shown if not v.real], shown)
    if not real:
        parts = [f"no difference is real ({rest})"]
    elif rest:
        parts.append(f"not told apart from {study.baseline} in {rest}")
    said = [f"{name}: {'; '.join(parts)}.", _against_cuts(study, i), *_against_controls(study, i)]
    return " ".join(filter(None, said))


def _against_controls(study: Study, i: int) -> Iterator[str]:
    """Whether a method does better than its negative controls."""
    name = study.names[i]
    for one in study.against_controls:
        if one.method == name:
            unit, factor = study.columns[one.metric]
            value = one.difference.value or 0
            better = value < 0 if one.metric in LESS_IS_BETTER else value > 0
            verdict = ("better than" if better else "worse than") if one.difference.clear else "not told apart from"
            told = figure(one.difference, factor, signed=True).replace(" [", " points [" if unit == "%" else " [", 1)
            where = f" in {one.group}" if one.group else ""
            yield f"It is {verdict} its negative control `{one.control}`{where} ({one.metric} {told})."


def _figures(study: Study, verdicts: Sequence[Verdict]) -> str:
    """`CHAIR_S −11.7 points [−15.8, −8.0]`, or for several splits `accuracy (random −0.1, popular +0.3 points)`."""
    found = []
    for metric in dict.fromkeys(v.metric for v in verdicts):
        unit, factor = study.columns[metric]
        behind = " points" if unit == "%" else ""
        mine = [v for v in verdicts if v.metric == metric]
        told = [figure(v.difference, factor, signed=True).replace(" [", f"{behind} [", 1) for v in mine]
        if len(mine) == 1 and not mine[0].group:
            found.append(f"{metric} {told[0]}")
        else:
            each = (f"{v.group or 'all'} {text}" for v, text in zip(mine, told, strict=True))
            found.append(f"{metric} ({', '.join(each)})")
    return ", ".join(found)


def _names_only(verdicts: Sequence[Verdict], of: Sequence[Verdict]) -> str:
    """`recall, F1`; groups are named where a figure is meant in some of them only: `yes_ratio (popular)`."""
    found = []
    for metric in dict.fromkeys(v.metric for v in verdicts):
        mine, all_of_it = ([v.group for v in some if v.metric == metric] for some in (verdicts, of))
        found.append(metric if len(mine) == len(all_of_it) else f"{metric} ({', '.join(mine)})")
    return ", ".join(found)


def _against_cuts(study: Study, i: int) -> str:
    """Whether the method does more than saying less."""
    control = study.controls[i]
    if control is None:
        return ""
    if control.status == "outside":
        return f"Its recall is below that of every cut of {study.baseline}'s captions: there is no fair comparison."
    gap = figure(control.chair_s, 100, signed=True).replace(" [", " points [", 1)
    if control.status == "inside":
        against = f"captions of {study.baseline} cut to the same recall (about {control.cut_words or 0:.0f} words)"
    else:
        against = f"{study.baseline}'s whole captions, whose recall is lower still"
    if control.below_curve:
        return f"Set against {against}, CHAIR_S is lower by more than chance ({gap}): it does more than saying less."
    if control.chair_s.low is not None and control.chair_s.low > 0:
        return f"Set against {against}, CHAIR_S is higher ({gap}): merely saying less would do better."
    return f"Set against {against}, CHAIR_S differs by {gap}: no more than saying less would do, as far as can be told."


def rule(study: Study) -> str:
    """What "real" means in the words above."""
    n = max((v.methods for v in study.verdicts), default=0)
    over = f"adjusted for {n} methods by Holm" if n > 1 else "one method, so nothing to adjust for"
    exact = "; CHAIR_S by McNemar's exact test" if any(v.discordant for v in study.verdicts) else ""
    return f"Real: the 95 % interval excludes 0 and p is below .05 ({over}, each figure by itself{exact})."


def resolution(study: Study) -> str:
    """What so many pictures can tell: the widest interval of a difference, in the benchmark's first figures."""
    told = []
    for metric in list(study.comparison.benchmark.columns)[:2]:
        unit, factor = study.columns[metric]
        ranges = [v.difference for v in study.verdicts if v.metric == metric]
        wide = [(d.high - d.low) / 2 for d in ranges if d.low is not None and d.high is not None and d.high > d.low]
        if wide:
            told.append(f"±{number(max(wide), factor)}{' points' if unit == '%' else ''} in {metric}")
    if not told:
        return ""
    return (
        f"With {study.pictures} pictures, differences are known to about {' and '.join(told)}; smaller ones cannot be "
        "told from chance. Four times the pictures would halve that."
    )


def flags(study: Study) -> list[str]:
    """What a reader must know before believing a figure; see the notes of the comparison for the rest."""
    found = [*_unlike(study)]
    for row, name in _rows_named(study):
        if row.differences is None or study.base is None:
            continue
        whole = next(r for r, n in _rows_named(study) if n == study.names[study.base] and r.group == row.group)
        repeats, length = row.differences.get("repetition"), row.estimates.get("words")
        if repeats is not None and repeats.value is not None and repeats.value > 0.01:
            found.append(f"`{name}` repeats itself in {number(repeats.value, 100, True)} points more of its captions.")
        plain = whole.estimates.get("words")
        if length and plain and length.value is not None and plain.value:
            longer = length.value / plain.value - 1
            if abs(longer) > 0.3:
                word = "longer" if longer > 0 else "shorter"
                found.append(f"`{name}` writes captions {abs(longer):.0%} {word} than {study.baseline}'s.")
        objects, mentions = row.differences.get("objects"), row.differences.get("mentions")
        if objects and mentions and (objects.high or 0) < 0 < (mentions.low or 0):
            found.append(
                f"`{name}` names fewer objects, but names them more often, which lowers CHAIR_I without a better "
                "caption: look at CHAIR_I_unique."
            )
        left_out = max(d.left_out for d in row.differences.values())
        if left_out:
            where = f" ({row.group})" if row.group else ""
            found.append(f"`{name}`{where}: {left_out} pictures lack one of the two answers and are not compared.")
    if study.captions:
        for run, name in zip(study.comparison.runs, study.names, strict=True):
            cut = sum(r.get("finish") == "length" for r in run.records)
            if cut > 0.05 * len(run.records):
                share = cut / len(run.records)
                found.append(f"`{name}`: the token budget cut {share:.0%} of the captions short.")
    return found


def _rows_named(study: Study) -> list[tuple[Row, str]]:
    owners = [name for name, found in zip(study.names, study.groups, strict=True) for _ in found]
    return list(zip(study.comparison.rows, owners, strict=True))


def _unlike(study: Study) -> Iterator[str]:
    """Settings other than the method in which runs differ: such runs should not be compared."""
    identities = [run.header["identity"] for run in study.comparison.runs]
    for key in dict.fromkeys(key for identity in identities for key in identity if key != "method"):
        values = [json.dumps(identity.get(key), sort_keys=True) for identity in identities]
        if len(set(values)) > 1:
            each = ", ".join(f"`{name}` {value}" for name, value in zip(study.names, values, strict=True))
            yield f"Runs differ in more than the method, in {key}: {each}. Differences are not the method's alone."


# Files


def to_markdown(studies: Sequence[Study]) -> str:
    """Words, tables and notes of all comparisons."""
    parts = []
    for one in studies:
        notes = [*flags(one), *filter(None, [deviation_text(one.comparison)]), *one.comparison.notes]
        parts += [f"## {one.comparison.title}, model {one.comparison.model}{one.comparison.testing}", *words(one)]
        parts += [" ".join(filter(None, [rule(one), resolution(one)])) if one.verdicts else ""]
        parts += ["Bold in the tables: the interval excludes 0, before the adjustment." if one.verdicts else ""]
        parts += [markdown(one.comparison), _controls_markdown(one), "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _controls_markdown(study: Study) -> str:
    lines = [
        f"| `{name}` | {number(c.recall, 100)} | {number(c.cut_chair_s, 100)} | {number(c.cut_words, 1)} "
        f"| {figure(c.chair_s, 100, True)} | {figure(c.chair_i_unique, 100, True)} | {figure(c.f1, 100, True)} |"
        for name, c in zip(study.names, study.controls, strict=True)
        if c is not None
    ]
    head = f"| against {study.baseline} cut to the same recall | recall % | its CHAIR_S % | its words N\\* "
    head += "| CHAIR_S | CHAIR_I_unique | F1 |\n" + "|---" * 7 + "|"
    return "\n".join([head, *lines]) if lines else ""


def to_json(studies: Sequence[Study]) -> str:
    """Everything that the page shows as figures, and where it came from. Shares are shares, not percent."""
    return json.dumps([_as_json(one) for one in studies], indent=1) + "\n"


def _as_json(study: Study) -> dict[str, Any]:
    curve = {} if study.curve is None else study.curve.curve
    controls = zip(study.names, study.controls, strict=True)
    invented, missed = object_rates(study)
    return {
        **study.comparison.to_json(),
        "methods": study.names,
        "verdicts": [{**asdict(v), "real": v.real, "better": v.better} for v in study.verdicts],
        "against_controls": [asdict(one) for one in study.against_controls],
        "words": [*words(study), resolution(study)],
        "flags": flags(study),
        "truncation": {
            "curve": [{"cut": cut, **figures} for cut, figures in curve.items()],
            "methods": {name: {**asdict(c), "below_curve": c.below_curve} for name, c in controls if c is not None},
        },
        "invented_by_position": {
            name: [asdict(e) for e in by_position(scores)]
            for name, scores in zip(study.names, study.captions, strict=False)
        },
        "confusion": confusion(study),
        "objects_invented": {name: [asdict(rate) for rate in rates] for name, rates in invented.items()},
        "objects_missed": {name: [asdict(rate) for rate in rates] for name, rates in missed.items()},
    }


CSV_COLUMNS = (
    *("benchmark", "model", "data", "limit", "group", "method", "metric", "pictures", "value", "low", "high"),
    *("difference", "difference_low", "difference_high", "p", "p_holm", "real"),
)


def to_csv(studies: Sequence[Study]) -> str:
    """One line a figure: benchmark, group, method, value and difference with intervals. Shares, not percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for one in studies:
        of = {(v.method, v.group, v.metric): v for v in one.verdicts}
        title, model = one.comparison.title, one.comparison.model
        for row, name in _rows_named(one):
            for metric in one.columns:
                e, v = row.estimates[metric], of.get((name, row.group, metric))
                line = [
                    title,
                    model,
                    one.data.name,
                    one.data.limit,
                    row.group,
                    name,
                    metric,
                    row.n,
                    e.value,
                    e.low,
                    e.high,
                ]
                if v is not None:
                    d = v.difference
                    line += [d.value, d.low, d.high, v.p, v.p_holm, v.real]
                writer.writerow(line + [None] * (len(CSV_COLUMNS) - len(line)))
    return text.getvalue()
