"""The leaderboard: results that come with the package, each method with its negative controls below it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Template
from markupsafe import Markup, escape

from vlmfix.eval.benchmarks.benchmark import Figure, benchmark_class
from vlmfix.eval.report.html import environment
from vlmfix.eval.report.tables import Cell
from vlmfix.eval.report.verdicts import RULE, Verdict, judge
from vlmfix.eval.run.controls import control_labels
from vlmfix.eval.scorers.stats import Difference, Estimate

NOTE = (
    "95 % intervals from a bootstrap over pictures; differences to the untouched model are paired. Coloured: a real "
    f"difference, for better or worse. {RULE} "
    "Controls make the same push without the method's choice of heads or tokens, or turn it round; a method "
    "that does no better than these does not owe its gain to its choice. These are figures of a tiny model: they say "
    "nothing about a 7B model."
)


@dataclass(frozen=True)
class Line:
    """One method, or a control of one."""

    method: str
    estimates: dict[str, Estimate]
    differences: dict[str, Difference] | None
    """To the untouched model; `None` for that model."""


@dataclass(frozen=True)
class TableRow:
    """A line of a board as it is drawn."""

    method: str
    is_control: bool
    cells: list[Cell]
    """The metric that the board is sorted by comes first."""


@dataclass(frozen=True)
class Board:
    """Methods on one benchmark and model."""

    title: str
    columns: dict[str, Figure]
    """Name -> figure."""
    lines: tuple[Line, ...]
    pictures: int
    command: str
    """Made the figures."""

    def owned(self) -> dict[str, tuple[str, ...]]:
        """Method -> its controls that were run; controls are no methods."""
        labels = [line.method for line in self.lines]
        controls_of: dict[str, tuple[str, ...]] = {}
        controls: set[str] = set()
        for label in sorted(labels, key=len):  # controls are each other's controls, too
            if label in controls:
                continue
            known = [control for control in control_labels(label) if control in labels and control not in controls_of]
            controls_of[label] = tuple(known)
            controls.update(known)
        return controls_of

    def ranked(self, metric: str) -> list[str]:
        """Methods, the best first; for figures that are neither good nor bad, the highest."""
        values = {line.method: line.estimates[metric].value for line in self.lines}
        sign = 1 if self.columns[metric].better == "less" else -1

        def place(method: str) -> tuple[bool, float, str]:
            value = values[method]
            return value is None, sign * (value or 0.0), method

        return sorted(self.owned(), key=place)

    def html(self, metric: str) -> str:
        """The table, sorted by a metric, which comes first."""
        metrics = [metric, *(name for name in self.columns if name != metric)]
        names = [f"{name} {self.columns[name].unit}".strip() for name in metrics]
        return _template().render(
            titles=["method", names[0], "difference to none", *names[1:]],
            rows=self._rows(metrics),
            note=NOTE,
            pictures=self.pictures,
            command=self.command,
        )

    def _rows(self, metrics: list[str]) -> list[TableRow]:
        controls_of = self.owned()
        lines = {line.method: line for line in self.lines}
        verdicts = self.verdicts(metrics[0])
        rows = []
        for method in self.ranked(metrics[0]):
            for label in (method, *controls_of[method]):
                first = self._cell(lines[label], metrics[0], verdicts.get(label))
                others = [self._cell(lines[label], metric) for metric in metrics[1:]]
                rows.append(TableRow(label, label != method, [first, *others]))
        return rows

    def verdicts(self, metric: str) -> dict[str, Verdict]:
        """Whether the differences in one figure are real; p is the bootstrap's, as the answers are not here."""
        differences = {line.method: line.differences[metric] for line in self.lines if line.differences is not None}
        return {verdict.method: verdict for verdict in judge("", metric, self.columns[metric], differences)}

    def _cell(self, line: Line, metric: str, verdict: Verdict | None = None) -> Cell:
        estimate, factor = line.estimates[metric], self.columns[metric].factor
        if verdict is None:
            return Cell(estimate, factor=factor)
        return Cell(estimate, verdict.difference, factor, verdict.real, verdict.better, verdict)


@cache
def _template() -> Template:
    drawn_with = environment("vlmfix.demo")
    drawn_with.filters["wrapping"] = wrapping
    return drawn_with.get_template("leaderboard.html.j2")


def wrapping(label: str) -> Markup:
    """A label as safe HTML that may break between settings, without the digits that floats drag along."""
    short = re.sub(r"\d+\.\d{6,}", lambda digits: f"{float(digits[0]):.6g}", label)
    return Markup(re.sub("([:,=])", r"\1<wbr>", str(escape(short))))


@cache
def boards() -> dict[str, Board]:
    """All boards by title, from `assets/results`."""
    folder = files("vlmfix.assets") / "results"
    tables = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    by_title: dict[str, Board] = {}
    for table in tables:
        for comparison in json.loads(table.read_text("utf-8")):
            for group in dict.fromkeys(row["group"] for row in comparison["rows"]):
                board = _board(comparison, group)
                by_title[board.title] = board
    return by_title


def _board(comparison: dict[str, Any], group: str) -> Board:
    rows = [row for row in comparison["rows"] if row["group"] == group]
    name = f"{comparison['title']}, {group}" if group else comparison["title"]
    figures = benchmark_class(comparison["benchmark"]).figures
    return Board(
        title=f"{name}: {comparison['model']}",
        pictures=rows[0]["n"],
        columns={metric: figure for metric, figure in figures.items() if figure.shown},
        lines=tuple(map(_line, rows)),
        command=comparison["runs"][0]["environment"]["command"],
    )


def _line(row: dict[str, Any]) -> Line:
    differences = row["differences"]
    return Line(
        method=row["method"],
        estimates={name: Estimate(**estimate) for name, estimate in row["estimates"].items()},
        differences=differences and {name: Difference(**numbers) for name, numbers in differences.items()},
    )
