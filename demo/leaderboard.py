"""The leaderboard: results that come with the package, each method with its negative controls below it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from vlmfix.eval.benchmarks.benchmark import Figure, benchmark_class
from vlmfix.eval.report.figures import figure, interval, number
from vlmfix.eval.run.controls import controls_of
from vlmfix.eval.scorers.stats import Difference, Estimate
from vlmfix.method.registry import parse, spec_of

NOTE = (
    "95 % intervals from a bootstrap over pictures; differences to the untouched model are paired. Coloured: the "
    "interval excludes 0, for better or worse. Controls make the same push without the method's choice of heads or "
    "tokens, or turn it round; a method that does no better than these does not owe its gain to its choice. These are "
    "figures of a tiny model: they say nothing about a 7B model."
)


@dataclass(frozen=True)
class Line:
    """One method, or a control of one."""

    method: str
    estimates: dict[str, Estimate]
    differences: dict[str, Difference] | None
    """To the untouched model; `None` for that model."""


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
        found: dict[str, tuple[str, ...]] = {}
        taken: set[str] = set()
        for label in sorted(labels, key=len):  # controls are each other's controls, too
            if label not in taken:
                found[label] = tuple(spec for spec in _controls(label) if spec in labels and spec not in found)
                taken.update(found[label])
        return found

    def ranked(self, metric: str) -> list[str]:
        """Methods, the best first; for figures that are neither good nor bad, the highest."""
        of = {line.method: line.estimates[metric].value for line in self.lines}
        sign = 1 if self.columns[metric].better == "less" else -1
        return sorted(self.owned(), key=lambda m: (of[m] is None, sign * (of[m] or 0.0), m))

    def html(self, metric: str) -> str:
        """The table, sorted by a metric, which comes first."""
        of, owned = {line.method: line for line in self.lines}, self.owned()
        metrics = [metric, *(m for m in self.columns if m != metric)]
        names = [_named(m, self.columns) for m in metrics]
        titles = ["method", names[0], "difference to none", *names[1:]]
        head = "".join(f'<th scope="col">{title}</th>' for title in titles)
        body = []
        for method in self.ranked(metric):
            body.append(self._row(of[method], metrics, control=False))
            body += [self._row(of[control], metrics, control=True) for control in owned[method]]
        made = f"{self.pictures} pictures; made by <code>{escape(self.command)}</code>"
        return (
            '<div class="scroll" tabindex="0" role="region" aria-label="Leaderboard"><table class="board">'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
            f'<p class="quiet">{escape(NOTE)}</p><p class="quiet">{made}</p>'
        )

    def _row(self, line: Line, metrics: Sequence[str], control: bool) -> str:
        cells = [self._value(line, metrics[0]), self._difference(line, metrics[0])]
        cells += [self._value(line, metric) for metric in metrics[1:]]
        mark = '<small class="quiet">control</small> ' if control else ""
        return (
            f'<tr{" class=control" if control else ""}><th scope="row" title="{escape(line.method)}">{mark}'
            f"<code>{_wrapping(line.method)}</code></th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )

    def _value(self, line: Line, metric: str) -> str:
        e, factor = line.estimates[metric], self.columns[metric].factor
        return f"{number(e.value, factor)}<small>{interval(e, factor)}</small>"

    def _difference(self, line: Line, metric: str) -> str:
        if line.differences is None:
            return ""
        d, factor = line.differences[metric], self.columns[metric].factor
        if d.value == d.low == d.high == 0:
            return "same"
        kind = ""
        better = self.columns[metric].is_better(d.value)
        if d.clear and better is not None:
            kind = "good" if better else "bad"
        said = figure(d, factor, signed=True).split(" ", 1)
        return f'<b class="{kind}">{said[0]}</b><small>{"".join(said[1:])}</small>'


def _named(metric: str, columns: dict[str, Figure]) -> str:
    return escape(f"{metric} {columns[metric].unit}".strip())


def _wrapping(label: str) -> str:
    """A label as safe HTML that may break between settings, without the digits that floats drag along."""
    short = re.sub(r"\d+\.\d{6,}", lambda found: f"{float(found[0]):.6g}", label)
    return re.sub("([:,=])", r"\1<wbr>", escape(short, quote=False))


def _controls(label: str) -> tuple[str, ...]:
    return tuple(spec_of(control) for control in controls_of(parse(label)))


@cache
def boards() -> dict[str, Board]:
    """All boards by title, from `assets/results`."""
    found = {}
    folder = files("vlmfix.assets") / "results"
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name):
        for comparison in json.loads(file.read_text("utf-8")):
            for group in dict.fromkeys(row["group"] for row in comparison["rows"]):
                board = _board(comparison, group)
                found[board.title] = board
    return found


def _board(comparison: dict[str, Any], group: str) -> Board:
    rows = [row for row in comparison["rows"] if row["group"] == group]
    named = ", ".join(filter(None, [comparison["title"], group]))
    figures = benchmark_class(comparison["benchmark"]).figures
    return Board(
        title=f"{named}: {comparison['model']}",
        pictures=rows[0]["n"],
        columns={name: figure for name, figure in figures.items() if figure.shown},
        lines=tuple(
            Line(
                row["method"],
                {name: Estimate(**e) for name, e in row["estimates"].items()},
                row["differences"] and {name: Difference(**d) for name, d in row["differences"].items()},
            )
            for row in rows
        ),
        command=comparison["runs"][0]["environment"]["command"],
    )
