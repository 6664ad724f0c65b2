"""A comparison as tables of cells. Each way of drawing them is another file: terminal, Markdown, LaTeX, CSV, HTML.

    for table in method_tables(study):
        for column in table.columns:
            column.label, [cell.value for cell in column.cells], [cell.change for cell in column.cells]

Methods stand below each other, each with its negative controls, and figures beside each other. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlmfix.eval.pictures.data import Elsewhere, first_pictures
from vlmfix.eval.report import words
from vlmfix.eval.report.figures import figure, interval, number
from vlmfix.eval.report.study import Entry, Study
from vlmfix.eval.report.verdicts import Verdict
from vlmfix.eval.run.controls import control_name
from vlmfix.eval.run.results import Comparison
from vlmfix.eval.scorers.stats import Estimate
from vlmfix.eval.scorers.truncation import TruncationControl

AT_EQUAL_RECALL = ("CHAIR_S", "F1")
"""Figures at equal recall in the main table."""
EQUAL_RECALL_UNIT = "% at equal recall"


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
class Column:
    """One figure of all methods, with its head in lines."""

    head: tuple[str, ...]
    cells: list[Cell]
    meaning: str = ""

    @property
    def label(self) -> str:
        """The head in one line."""
        return " ".join(self.head)


@dataclass(frozen=True)
class MethodTable:
    """Methods down, each with its negative controls beneath it, and figures across."""

    title: str
    group: str
    """Of answers; empty where the table has several, or there is but one."""
    pictures: int
    names: list[str]
    """As they are shown: controls by what they do otherwise than the method above them."""
    is_control: list[bool]
    columns: list[Column]


@dataclass(frozen=True)
class TextTable:
    """A table of texts."""

    title: str
    head: list[str]
    rows: list[list[str]]


def method_tables(study: Study, full: bool = False) -> list[MethodTable]:
    """The headline figures of all groups of answers in one table; or, `full`, a table a group with all its figures."""
    tables = comparison_tables(study)
    if full:
        return [_method_table(study, table, [table], full=True) for table in tables]
    if not tables:
        return []
    whole = replace(tables[0], group="", pictures=max(table.pictures for table in tables))
    return [_method_table(study, whole, tables, full=False)]


def every_figure(study: Study) -> list[MethodTable]:
    """One table a group of answers: every figure that was computed, and nothing else."""
    tables = []
    for group, entries in study.by_group():
        lines = metric_lines(study, entries, list(study.columns))
        table = ComparisonTable(group, entries[0].row.n, [entry.method for entry in entries], lines)
        tables.append(_method_table(study, table, [table], full=True))
    return tables


def _method_table(study: Study, whole: ComparisonTable, tables: Sequence[ComparisonTable], full: bool) -> MethodTable:
    """Some tables side by side, under the title of the whole."""
    order = _methods_with_controls(study)
    several = len(tables) > 1
    columns = []
    for table in tables:
        place_of = {name: place for place, name in enumerate(table.methods)}
        for line in table.lines:
            if not full and not _is_headline(study, line):
                continue
            cells = [Cell() for _ in order]
            for row, (run, _) in enumerate(order):
                if study.names[run] in place_of:
                    cells[row] = line.cells[place_of[study.names[run]]]
            head = (f"{line.metric} %", *line.unit[2:].rsplit(" ", 1)) if line.unit[1:] else (line.label,)
            columns.append(Column((*head, table.group) if several else head, cells, line.meaning))
    passes = [study.passes_per_token(run) for run, _ in order]
    if any(passes) and study.comparison.benchmark.describes:
        texts = ["" if ratio is None else f"{ratio:.2f}" for ratio in passes]
        columns.append(Column(("passes", "per", "token"), [Cell(text=text) for text in texts]))
    names = []
    for run, method in order:
        own = study.names[run]
        names.append(own if method is None else f"control: {control_name(study.names[method], own)}")
    is_control = [method is not None for _, method in order]
    return MethodTable(table_title(study, whole), whole.group, whole.pictures, names, is_control, columns)


def _is_headline(study: Study, line: Line) -> bool:
    benchmark = study.comparison.benchmark
    if line.unit == EQUAL_RECALL_UNIT:
        return line.metric == benchmark.headline_figures[0]
    return line.metric in benchmark.headline_figures or line.metric not in benchmark.figures


def _methods_with_controls(study: Study) -> list[tuple[int, int | None]]:
    """Runs in the order of the table, each with the method that it is a control of, or `None`."""
    method_of = {control: method for method, control in study.pairs}
    order: list[tuple[int, int | None]] = []
    untouched_first = sorted(range(len(study.names)), key=lambda run: not study.comparison.runs[run].untouched)
    for run in untouched_first:
        if run not in method_of:
            order.append((run, None))
            order += [(control, method) for method, control in study.pairs if method == run]
    return order


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
    if not any(entry.row.control for entry in entries):
        return []
    return [
        Line(metric, EQUAL_RECALL_UNIT, [_beyond_cuts(study, entry.method, metric) for entry in entries])
        for metric in AT_EQUAL_RECALL
    ]


def _beyond_cuts(study: Study, method: str, metric: str) -> Cell:
    """The difference to the baseline's captions, cut to the same recall; empty for the baseline itself."""
    verdict = study.cut_verdicts.get((method, metric))
    if verdict is None:
        return Cell()
    factor = study.comparison.benchmark.figures[metric].factor
    return Cell(None, verdict.difference, factor, verdict.real, verdict.better, verdict)


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
    name, first = Path(comparison.data.name).name, first_pictures(comparison.data.which)
    if isinstance(comparison.data, Elsewhere):
        parts.append(pictures)
    elif first is None:
        parts.append(f"{pictures} of {name}")
    elif first == table.pictures:
        parts.append(f"the first {pictures} of {name}")
    else:
        parts.append(f"{table.pictures} of the first {first} pictures of {name}")
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
            columns.append(_control_column(study, name, control))
    return columns


def _control_column(study: Study, name: str, control: TruncationControl) -> ControlColumn:
    chair_s = _beyond_cuts(study, name, "CHAIR_S")
    return ControlColumn(
        method=name,
        recall=number(control.recall, 100),
        cut_words=number(control.cut_words, 1),
        cut_chair_s=number(control.cut_chair_s, 100),
        chair_s=chair_s,
        chair_i_unique=_beyond_cuts(study, name, "CHAIR_I_unique"),
        f1=_beyond_cuts(study, name, "F1"),
        place=_place(control, chair_s),
        remark="recall above the uncut captions'" if control.status == "recall above vanilla" else "",
    )


def _place(control: TruncationControl, chair_s: Cell) -> str:
    if control.status == "outside":
        return "outside: recall below every cut"
    if not chair_s.real:
        return "on the curve"
    return "below the curve" if chair_s.better else "above the curve"
