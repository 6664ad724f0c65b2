"""Comparisons in a terminal: methods down, figures across, nothing cut at any width. No torch.

A method's figures stand in one line where the terminal is wide enough; else the interval stands below its figure; else
the name stands above both, and what is still too wide goes on in a further table, with all names again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmfix.eval.report import words
from vlmfix.eval.report.study import Study
from vlmfix.eval.report.tables import Column, MethodTable, TextTable, method_tables, published_table

INDENT = 2
"""Blanks before the name of a control, and before figures below a name."""
GAPS = (2, 1)
"""Blanks between columns, the first that fits."""


def show(console: Console, studies: Sequence[Study], full: bool = False) -> None:
    """Tables, what they say in words, and notes of all comparisons; then what the figures mean.

    Args:
        console: Where to.
        studies: What is compared.
        full: All figures, a table a group of answers, instead of the headline.
    """
    for study in studies:
        for table in method_tables(study, full):
            for line in drawn(table, console.width):
                console.print(line, no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)
            console.print()
        published = published_table(study.comparison)
        if published is not None:
            console.print(_published(published))
        whole_lines = not console.is_terminal
        for sentence in words.in_short(study):
            console.print(words.plain(sentence), markup=False, soft_wrap=whole_lines)
        for note in words.notes(study):
            console.print(f"note: {words.plain(note)}", markup=False, soft_wrap=whole_lines, style="dim")
        console.print()
    legend = dict.fromkeys(sentence for study in studies for sentence in words.legend(study))
    console.print(" ".join(legend), markup=False, soft_wrap=not console.is_terminal, style="dim")


@dataclass(frozen=True)
class _Drawn:
    """One cell: a figure with its change, and the interval of the last of the two."""

    value: str
    change: str
    interval: str
    style: str


def drawn(table: MethodTable, width: int) -> Iterator[Text]:
    """The lines of a table in a terminal of so many columns."""
    columns = [_figures(column) for column in table.columns]
    names = _names(table)
    widest_name = max(map(cell_len, names), default=0)
    yield Text(table.title, style="bold")
    for stacked in (False, True):
        widths = _widths(columns, table.columns, stacked)
        for gap in GAPS:
            if widest_name + sum(widths) + gap * len(widths) <= width:
                yield from _block(table, columns, names, stacked, (gap, widest_name, True))
                return
    for gap in GAPS:
        if INDENT + sum(widths) + gap * (len(widths) - 1) <= width or gap == GAPS[-1]:
            yield from _parts(table, columns, names, width, gap)
            return


def _parts(
    table: MethodTable, columns: Sequence[list[_Drawn]], names: Sequence[str], width: int, gap: int
) -> Iterator[Text]:
    """Names above their figures; as many columns at a time as fit."""
    first, used = 0, INDENT
    for place, wanted in enumerate(_widths(columns, table.columns, stacked=True)):
        if place > first and used + wanted > width:
            yield from _block(_cut(table, first, place), columns[first:place], names, True, (gap, width, False))
            yield Text()
            first, used = place, INDENT
        used += wanted + gap
    yield from _block(_cut(table, first, len(columns)), columns[first:], names, True, (gap, width, False))


def _cut(table: MethodTable, first: int, last: int) -> MethodTable:
    return replace(table, columns=table.columns[first:last])


def _block(
    table: MethodTable,
    columns: Sequence[list[_Drawn]],
    names: Sequence[str],
    stacked: bool,
    place: tuple[int, int, bool],
) -> Iterator[Text]:
    """Heads and rows of some columns. `place`: blanks between columns, room for names, and whether these stand beside
    the figures."""
    gap, room, beside = place
    left = room if beside else INDENT - gap
    widths = _widths(columns, table.columns, stacked)
    depth = max((len(column.head) for column in table.columns), default=0)
    for level in range(depth):
        heads = " " * left
        for head, column_width in zip(table.columns, widths, strict=True):
            padded = ("",) * (depth - len(head.head)) + head.head
            heads += " " * gap + padded[level].rjust(column_width)
        yield Text(heads, style="bold")
    whole = left + sum(widths) + gap * len(widths)
    yield Text("─" * whole, style="dim")
    for row, name in enumerate(names):
        cells = [column[row] for column in columns]
        style = "" if table.is_control[row] else "bold"
        if beside:
            line = Text(name + " " * (left - cell_len(name)), style=style)
        else:
            for start in range(0, len(name), room):
                yield Text(name[start : start + room], style=style)
            line = Text(" " * left)
        below = Text(" " * left)
        for cell, column, column_width in zip(cells, columns, widths, strict=True):
            text, interval = _lines(cell, column, stacked)
            line.append(" " * gap + text.rjust(column_width), style=cell.style)
            below.append(" " * gap + interval.rjust(column_width), style=cell.style)
        yield line
        if stacked:
            yield below


def _names(table: MethodTable) -> list[str]:
    return [
        " " * INDENT * is_control + " ".join(name.split())
        for name, is_control in zip(table.names, table.is_control, strict=True)
    ]


def _figures(column: Column) -> list[_Drawn]:
    figures = []
    for cell in column.cells:
        if cell.difference is None:
            figures.append(_Drawn(cell.number, cell.remark, cell.interval, ""))
            continue
        mark = "*" if cell.real else " "
        style = "bold" if cell.real else "dim"
        figures.append(_Drawn(cell.number, cell.change_number + mark, cell.change_interval, style))
    return figures


def _lines(cell: _Drawn, column: Sequence[_Drawn], stacked: bool) -> tuple[str, str]:
    """A cell's figures, in line with those above and below it, and what stands below them."""
    change_width = max(cell_len(other.change) for other in column)
    interval_width = 0 if stacked else max(cell_len(other.interval) for other in column)
    parts = [cell.value]
    if change_width:
        parts.append(cell.change.rjust(change_width))
    if interval_width:
        parts.append(cell.interval.rjust(interval_width))
    return " ".join(parts), cell.interval


def _widths(columns: Sequence[list[_Drawn]], heads: Sequence[Column], stacked: bool) -> list[int]:
    """Of each column: that of its widest figure, or of its head."""
    widths = []
    for column, head in zip(columns, heads, strict=True):
        texts = [text for cell in column for text in _lines(cell, column, stacked)]
        widths.append(max(cell_len(text) for text in [*texts, *head.head]))
    return widths


def _published(table: TextTable) -> Table:
    drawn_table = Table(title=Text(table.title), title_justify="left", title_style="bold")
    for name in table.head:
        drawn_table.add_column(Text(name))
    for row in table.rows:
        drawn_table.add_row(*map(Text, row))
    return drawn_table
