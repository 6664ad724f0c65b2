"""Comparisons in a terminal. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmfix.eval.report import words
from vlmfix.eval.report.study import Study
from vlmfix.eval.report.tables import (
    Cell,
    ComparisonTable,
    TextTable,
    comparison_tables,
    published_table,
    table_title,
)

NARROWEST = 12
"""Letters that a method's name has in a line at least, before it goes on in the next."""


def show(console: Console, studies: Sequence[Study]) -> None:
    """Tables and notes of all comparisons, and what the figures mean."""
    for study in studies:
        for table in tables(study, console.width):
            console.print(table)
        for note in filter(None, [words.deviations(study.comparison), *study.comparison.notes]):
            console.print(note, markup=False, soft_wrap=True)
        console.print()
    legend = dict.fromkeys(sentence for study in studies for sentence in words.legend(study))
    console.print(" ".join(legend), markup=False, soft_wrap=True)


def tables(study: Study, width: int) -> Iterator[Table]:
    """One table a group of answers; then what others report for the protocol.

    A table that is wider than the terminal goes on below, with the names of its lines before each part.
    """
    for table in comparison_tables(study):
        title = table_title(study, table)
        for first, last in _parts(table, width):
            yield _drawn(table, first, last, title if first == 0 else "")
    published = published_table(study.comparison)
    if published is not None:
        yield _published(published)


def _drawn(table: ComparisonTable, first: int, last: int, title: str) -> Table:
    """The methods from `first` to before `last`."""
    drawn = Table(title=Text(title) if title else None, title_justify="left", title_style="bold")
    drawn.add_column("", no_wrap=True)
    for method, width in zip(table.methods[first:last], _widths(table)[first:last], strict=True):
        drawn.add_column(Text(method, overflow="fold"), justify="right", min_width=width, overflow="fold")
    for line in table.lines:
        drawn.add_row(line.label, *map(_cell, line.cells[first:last]))
    return drawn


def _cell(cell: Cell) -> Text:
    text = Text(cell.value)
    if cell.change:
        change = f"{cell.change} *" if cell.real else cell.change
        text.append(f"\n{change}" if cell.value else change, style="bold" if cell.real else "dim")
    return text


def _parts(table: ComparisonTable, width: int) -> list[tuple[int, int]]:
    """First method and the one after the last, of each part that fits."""
    frame = 3  # a line and two blanks
    label = max(cell_len(line.label) for line in table.lines) + frame + 1
    parts = []
    first, used = 0, label
    for place, column in enumerate(_widths(table)):
        if place > first and used + column + frame > width:
            parts.append((first, place))
            first, used = place, label
        used += column + frame
    return [*parts, (first, len(table.methods))]


def _widths(table: ComparisonTable) -> list[int]:
    """Of each method's column: that of its longest figure, or of a short name."""
    widths = []
    for place, method in enumerate(table.methods):
        texts = [_cell(line.cells[place]).plain for line in table.lines]
        longest = max(cell_len(text) for cell in texts for text in cell.split("\n"))
        widths.append(max(longest, min(cell_len(method), NARROWEST)))
    return widths


def _published(table: TextTable) -> Table:
    drawn = Table(title=Text(table.title), title_justify="left", title_style="bold")
    for name in table.head:
        drawn.add_column(Text(name))
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn
