"""A comparison as tables of cells. Each way of drawing them is another file: terminal, Markdown, LaTeX, CSV, HTML.

    for table in comparison_tables(study):
        for line in table.lines:
            line.label, [cell.value for cell in line.cells], [cell.change for cell in line.cells]

No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmfix.eval.benchmarks.benchmark import Figure
from vlmfix.eval.pictures.data import Elsewhere
from vlmfix.eval.report import words
from vlmfix.eval.report.figures import figure, interval, number
from vlmfix.eval.report.study import Entry, Study
from vlmfix.eval.report.verdicts import Verdict
from vlmfix.eval.run.results import Comparison
from vlmfix.eval.scorers.stats import Estimate
from vlmfix.eval.scorers.truncation import TruncationControl

AGAINST_CUTS = {"CHAIR_S": "chair_s", "F1": "f1"}
"""Figures at equal recall in the main table -> field of the truncation control."""


@dataclass(frozen=True)
class Cell:
    """What a table says of one method in one line: a figure, a difference, both, or a text."""

    estimate: Estimate | None = None
    difference: Estimate | None = None
    """To the baseline, or to its captions cut to the same recall."""
    factor: float = 1.0
    """100 where shares are written in percent."""
    real: bool = False
    """Whether the difference is real, by the rule in `verdicts`."""
    better: bool | None = None
    """Whether it is for the better; `None` where it is neither."""
    verdict: Verdict | None = None
    """The judgement, where the difference has a p."""
    text: str = ""
    """In the place of a figure."""
    remark: str = ""
    """In the place of a difference."""

    @property
    def value(self) -> str:
        """`55.8 [50.5, 60.3]`, a text, or nothing."""
        return self.text if self.estimate is None else figure(self.estimate, self.factor)

    @property
    def change(self) -> str:
        """`−11.8 [−15.9, −7.7]`, a remark, or nothing."""
        return self.remark if self.difference is None else figure(self.difference, self.factor, signed=True)

    @property
    def number(self) -> str:
        """`55.8`."""
        return self.text if self.estimate is None else number(self.estimate.value, self.factor)

    @property
    def interval(self) -> str:
        """`[50.5, 60.3]`."""
        return "" if self.estimate is None else interval(self.estimate, self.factor)

    @property
    def change_number(self) -> str:
        """`−11.8`."""
        return self.remark if self.difference is None else number(self.difference.value, self.factor, signed=True)

    @property
    def change_interval(self) -> str:
        """`[−15.9, −7.7]`."""
        return "" if self.difference is None else interval(self.difference, self.factor, signed=True)

    @property
    def same(self) -> bool:
        """Whether the difference is nothing at all, in every resample."""
        return self.difference is not None and is_nothing(self.difference)


def is_nothing(difference: Estimate) -> bool:
    """Whether a difference is 0, and its interval too."""
    return difference.value == difference.low == difference.high == 0


@dataclass(frozen=True)
class Line:
    """One figure of all methods."""

    metric: str
    unit: str
    cells: list[Cell]
    meaning: str = ""

    @property
    def label(self) -> str:
        """`CHAIR_S %`."""
        return f"{self.metric} {self.unit}".strip()


@dataclass(frozen=True)
class ComparisonTable:
    """Figures down, methods across, for one group of answers."""

    group: str
    pictures: int
    methods: list[str]
    lines: list[Line]


@dataclass(frozen=True)
class TextTable:
    """A table of texts."""

    title: str
    head: list[str]
    rows: list[list[str]]


def comparison_tables(study: Study) -> list[ComparisonTable]:
    """One table a group of answers: the benchmark's own figures, those at equal recall, and what was not understood."""
    tables = []
    for group, entries in study.by_group():
        lines = [
            *_lines_of_answers(study, entries),
            *metric_lines(study, entries, study.headline),
            *_lines_at_equal_recall(study, entries),
            *_lines_of_unread_answers(entries),
        ]
        tables.append(ComparisonTable(group, entries[0].row.n, [entry.method for entry in entries], lines))
    return tables


def full_tables(study: Study) -> list[ComparisonTable]:
    """One table a group of answers: every figure that was computed, and nothing else."""
    tables = []
    for group, entries in study.by_group():
        lines = metric_lines(study, entries, list(study.columns))
        tables.append(ComparisonTable(group, entries[0].row.n, [entry.method for entry in entries], lines))
    return tables


def metric_lines(study: Study, entries: Sequence[Entry], metrics: Iterable[str]) -> list[Line]:
    """These figures of these methods, each with its difference to the baseline."""
    lines = []
    for metric in metrics:
        estimates = [entry.row.estimates[metric] for entry in entries]
        defined = any(estimate.value is not None for estimate in estimates)
        if metric == "pair_accuracy" and not defined:  # these questions are no pairs
            continue
        cells = [metric_cell(study, entry, metric) for entry in entries]
        lines.append(Line(metric, study.columns[metric][0], cells, words.meaning(study, metric)))
    return lines


def metric_cell(study: Study, entry: Entry, metric: str) -> Cell:
    """One figure of one method."""
    estimate, factor = entry.row.estimates[metric], study.columns[metric][1]
    verdict = study.verdict(entry, metric)
    if verdict is None:
        return Cell(estimate, factor=factor)
    return Cell(estimate, verdict.difference, factor, verdict.real, verdict.better, verdict)


def _lines_of_answers(study: Study, entries: Sequence[Entry]) -> list[Line]:
    """How many answers each method has, where that is not said by the name of the data or differs."""
    numbers = [len(entry.answers.scores) for entry in entries]
    left_out = [_left_out(entry) for entry in entries]
    known = not isinstance(study.data, Elsewhere)
    if known and len(set(numbers)) == 1 and not any(left_out):
        return []
    cells = []
    for entry, answers, missing in zip(entries, numbers, left_out, strict=True):
        remark = f"{_in_common(entry)} images in common" if missing else ""
        cells.append(Cell(text=str(answers), remark=remark))
    return [Line("captions" if study.comparison.benchmark.describes else "answers", "", cells)]


def _left_out(entry: Entry) -> int:
    """Images that only one of method and baseline has."""
    differences = entry.row.differences or {}
    return max((difference.left_out for difference in differences.values()), default=0)


def _in_common(entry: Entry) -> int:
    """Images that method and baseline have."""
    differences = entry.row.differences or {}
    return max((difference.n for difference in differences.values()), default=0)


def _lines_at_equal_recall(study: Study, entries: Sequence[Entry]) -> list[Line]:
    """The truncation control: what is left of a difference once the baseline says as little."""
    controls = [entry.row.control for entry in entries]
    if not any(controls):
        return []
    lines = []
    for metric, field in AGAINST_CUTS.items():
        figure = study.comparison.benchmark.figures[metric]
        cells = [Cell() if control is None else _beyond_cuts(figure, getattr(control, field)) for control in controls]
        lines.append(Line(metric, "% at equal recall", cells))
    return lines


def _beyond_cuts(figure: Figure, difference: Estimate) -> Cell:
    return Cell(None, difference, figure.factor, difference.clear, figure.is_better(difference.value))


def _lines_of_unread_answers(entries: Sequence[Entry]) -> list[Line]:
    unread = [entry.row.unparsed for entry in entries]
    if not any(unread):
        return []
    return [Line("neither yes nor no", "", [Cell(text=str(answers)) for answers in unread])]


def table_title(study: Study, table: ComparisonTable) -> str:
    """`POPE, random, model organism, 75 pictures of organism`."""
    comparison = study.comparison
    parts = [words.title(comparison, table.group)]
    if comparison.model:
        parts.append(f"model {comparison.model}")
    pictures = words.counted(table.pictures, "picture")
    known = not isinstance(comparison.data, Elsewhere)
    parts.append(f"{pictures} of {Path(comparison.data.name).name}" if known else pictures)
    return ", ".join(parts) + comparison.testing


def published_table(comparison: Comparison) -> TextTable | None:
    """Figures that others report for the protocol; `None` if there are none."""
    reports = comparison.published
    if not reports:
        return None
    columns: list[tuple[str, str]] = []
    for report in reports:
        for group, metrics in report.figures.items():
            columns += [(group, metric) for metric in metrics if (group, metric) not in columns]
    head = ["method", "decoding", *(f"{group} {metric}".strip() for group, metric in columns), "evidence"]
    rows = []
    for report in reports:
        values = [report.figures.get(group, {}).get(metric) for group, metric in columns]
        texts = ["" if value is None else f"{value:.1f}" for value in values]
        rows.append([report.method, report.decoding, *texts, report.mark])
    protocol = comparison.protocol_name.partition("+")[0]
    return TextTable(f"Published for {protocol}, LLaVA-1.5-7B; {words.MARKS}", head, rows)


# The truncation control in full


@dataclass(frozen=True)
class ControlColumn:
    """One method against the baseline's captions, cut to the same recall."""

    method: str
    recall: str
    """Of the method, in percent."""
    cut_words: str
    cut_chair_s: str
    """Of the cut captions, in percent."""
    chair_s: Cell
    chair_i_unique: Cell
    f1: Cell
    place: str
    """`below the curve`: better than saying less."""
    remark: str
    """Where recall is above that of the whole captions, so that nothing was cut."""


def control_columns(study: Study) -> list[ControlColumn]:
    """Of every method that has a truncation control."""
    columns = []
    for name, control in zip(study.names, study.controls, strict=True):
        if control is not None:
            columns.append(_control_column(name, control, study.comparison.benchmark.figures))
    return columns


def _control_column(name: str, control: TruncationControl, figures: Mapping[str, Figure]) -> ControlColumn:
    return ControlColumn(
        method=name,
        recall=number(control.recall, 100),
        cut_words=number(control.cut_words, 1),
        cut_chair_s=number(control.cut_chair_s, 100),
        chair_s=_beyond_cuts(figures["CHAIR_S"], control.chair_s),
        chair_i_unique=_beyond_cuts(figures["CHAIR_I_unique"], control.chair_i_unique),
        f1=_beyond_cuts(figures["F1"], control.f1),
        place=_place(control),
        remark="recall above the uncut captions'" if control.status == "recall above vanilla" else "",
    )


def _place(control: TruncationControl) -> str:
    if control.status == "outside":
        return "outside: recall below every cut"
    if control.below_curve:
        return "below the curve"
    if control.chair_s.low is not None and control.chair_s.low > 0:
        return "above the curve"
    return "on the curve"
