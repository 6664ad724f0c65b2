"""Tables made from a comparison: for a terminal, and as Markdown. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from vlmfix.eval.results import Comparison, Row
from vlmfix.eval.stats import Difference, Estimate

LEGEND = (
    "95 % intervals: bootstrap over pictures. Second lines: paired difference to the untouched model; "
    "* marks an interval that excludes 0."
)


def figure(e: Estimate, factor: float, signed: bool = False) -> str:
    """`55.8 [50.5, 60.3]`, or a dash where undefined."""
    if e.value is None:
        return "–"
    digits = 1 if factor == 100 or abs(e.value * factor) >= 10 else 2
    sign = "+" if signed else ""
    show = lambda x: f"{x * factor:{sign}.{digits}f}".replace("-", "−")  # noqa: E731
    low, high = (show(e.low), show(e.high)) if e.low is not None and e.high is not None else ("–", "–")
    return f"{show(e.value)} [{low}, {high}]"


def change(d: Difference, factor: float) -> str:
    """`−11.8 [−15.9, −7.7] *`."""
    return figure(d, factor, signed=True) + (" *" if d.clear else "")


def _groups(comparison: Comparison) -> Iterator[tuple[str, list[Row]]]:
    for group in dict.fromkeys(row.group for row in comparison.rows):
        yield group, [row for row in comparison.rows if row.group == group]


def tables(comparison: Comparison) -> Iterator[Table]:
    """One table a group of answers: metrics down, methods across."""
    for group, rows in _groups(comparison):
        name = " ".join(filter(None, [comparison.benchmark.title, group]))
        title = Text(f"{name}, model {comparison.model}, {rows[0].n} pictures")
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("")
        for row in rows:
            table.add_column(Text(row.method), justify="right", no_wrap=True)
        for metric, (unit, factor) in comparison.benchmark.columns.items():
            cells = []
            for row in rows:
                cell = Text(figure(row.estimates[metric], factor))
                if row.differences is not None:
                    d = row.differences[metric]
                    cell.append("\n" + change(d, factor), style="bold" if d.clear else "dim")
                cells.append(cell)
            table.add_row(f"{metric} {unit}".strip(), *cells)
        yield table


def markdown(comparison: Comparison) -> str:
    """The same as Markdown: methods down, metrics across."""
    lines = []
    for group, rows in _groups(comparison):
        columns = comparison.benchmark.columns
        name = " ".join(filter(None, [comparison.benchmark.title, group]))
        lines.append(
            f"| {name}, {rows[0].n} pictures | "
            + " | ".join(f"{m} {u}".strip() for m, (u, _) in columns.items())
            + " |"
        )
        lines.append("|---" * (len(columns) + 1) + "|")
        for row in rows:
            cells = [figure(row.estimates[m], factor) for m, (_, factor) in columns.items()]
            lines.append(f"| `{row.method}` | " + " | ".join(cells) + " |")
            if row.differences is not None:
                cells = [change(row.differences[m], factor) for m, (_, factor) in columns.items()]
                cells = [f"**{c.removesuffix(' *')}**" if c.endswith("*") else c for c in cells]
                lines.append("| difference | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
