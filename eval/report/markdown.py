"""Comparisons as Markdown. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from vlmfix.eval.report import words
from vlmfix.eval.report.study import Study
from vlmfix.eval.report.tables import (
    Cell,
    ControlColumn,
    MethodTable,
    control_columns,
    method_tables,
    published_table,
)

CONTROL_HEAD = ("recall %", "its CHAIR_S %", r"its words N\*", "CHAIR_S", "CHAIR_I_unique", "F1")


def to_markdown(studies: Sequence[Study]) -> str:
    """Words, tables and notes of all comparisons."""
    parts: list[str] = []
    for study in studies:
        notes = "\n".join(f"- {note}" for note in words.notes(study))
        parts += [f"## {words.heading(study)}", *words.summary(study)]
        if study.verdicts:
            parts += [words.judgement(study), "Bold in the tables: real."]
        parts += [tables(study), _control_table(study), notes]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def tables(study: Study) -> str:
    """The tables alone."""
    lines: list[str] = []
    for table in method_tables(study, full=True):
        lines.append(method_table(table))
    published = published_table(study.comparison)
    if published is not None:
        lines += [f"Published for this protocol, LLaVA-1.5-7B; {words.MARKS}.", ""]
        lines += [*_head(published.head), *map(_row, published.rows), ""]
    return "\n".join(lines)


def method_table(table: MethodTable) -> str:
    """Methods down, controls beneath theirs, figures across."""
    lines = [f"**{table.title}**", "", *_head(["", *(column.label for column in table.columns)])]
    for row, name in enumerate(table.names):
        shown = f"↳ {name}" if table.is_control[row] else f"`{name}`"
        lines.append(_row([shown, *(_cell(column.cells[row]) for column in table.columns)]))
    return "\n".join(lines) + "\n"


def _cell(cell: Cell) -> str:
    change = f"**{cell.change}**" if cell.real else cell.change
    return "<br>".join(text for text in (cell.value, change) if text)


def _control_table(study: Study) -> str:
    columns = control_columns(study)
    if not columns:
        return ""
    lines = _head([f"against {study.baseline} cut to the same recall", *CONTROL_HEAD])
    lines += [_row(_control_cells(column)) for column in columns]
    return "\n".join(lines)


def _control_cells(column: ControlColumn) -> list[str]:
    changes = [column.chair_s.change, column.chair_i_unique.change, column.f1.change]
    return [f"`{column.method}`", column.recall, column.cut_chair_s, column.cut_words, *changes]


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|---" * len(cells) + "|"]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_one_line, cells)) + " |"


def _one_line(text: str) -> str:
    """A name may hold what would end the cell or the row."""
    return " ".join(text.split()).replace("|", "\\|")
