r"""Comparisons as LaTeX tables, to be pasted into a paper that has `\usepackage{booktabs}`. No torch.

Bold is a real difference, by the rule in `verdicts`. The footnote names scorer, protocol, model and pictures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from vlmfix.eval.report import words
from vlmfix.eval.report.study import Study
from vlmfix.eval.report.tables import (
    Cell,
    Column,
    MethodTable,
    TextTable,
    method_tables,
    published_table,
)

FIGURES_ACROSS = 5
"""Most figures beside each other on a page; more go on below, with all methods again."""
BESIDE = 20
"""Letters of a method's name that stands beside its figures; a longer one stands above them."""
SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "−": "$-$",
    "±": r"$\pm$",
    "–": "--",
    "\N{WORD JOINER}": "{}",  # two hyphens would become a dash
    "\N{REPLACEMENT CHARACTER}": "?",
}


def to_latex(studies: Sequence[Study]) -> str:
    """A floating table for each group of answers, and one for what others report for the protocol."""
    parts = [r"% needs \usepackage{booktabs}"]
    for study in studies:
        parts += [_method_table(study, table) for table in method_tables(study, full=True)]
        published = published_table(study.comparison)
        if published is not None:
            parts.append(_text_table(published))
    return "\n\n".join(parts) + "\n"


def _method_table(study: Study, table: MethodTable) -> str:
    parts = []
    n_parts = math.ceil(len(table.columns) / FIGURES_ACROSS)
    across = math.ceil(len(table.columns) / n_parts)
    for first in range(0, len(table.columns), across):
        columns = table.columns[first : first + across]
        body: list[str] = []
        for row, name in enumerate(table.names):
            cells = [column.cells[row] for column in columns]
            indent = r"\quad " if table.is_control[row] else ""
            body += _rows(rf"{indent}\texttt{{{escape(name)}}}", len(name) > BESIDE, cells)
        parts.append(_tabular(_heads(columns), body))
    return _float(escape(table.title), parts, escape(footnote(study)))


def _heads(columns: Sequence[Column]) -> list[list[str]]:
    """Heads of several lines end in the same one."""
    depth = max(len(column.head) for column in columns)
    padded = [("",) * (depth - len(column.head)) + column.head for column in columns]
    return [["", *(escape(head[level]) for head in padded)] for level in range(depth)]


def _rows(name: str, is_long: bool, cells: Sequence[Cell]) -> list[str]:
    """The figures of a method, and below them its differences where there are any; a long name stands above."""
    values = [_figure(cell.number, cell.interval) for cell in cells]
    changes = [_figure(cell.change_number, cell.change_interval, cell.real) for cell in cells]
    rows = [_row([name, *values])]
    if is_long:
        rows = [rf"\multicolumn{{{len(cells) + 1}}}{{l}}{{{name}}} \\", _row(["", *values])]
    return [*rows, _row(["", *changes])] if any(changes) else rows


def _figure(number: str, interval: str, bold: bool = False) -> str:
    text = rf"\textbf{{{escape(number)}}}" if bold else escape(number)
    return rf"{text} {{\scriptsize {escape(interval)}}}" if interval else text


def footnote(study: Study) -> str:
    """How answers were scored, by which protocol, what bold means, and what makes figures look better than they are."""
    comparison = study.comparison
    scoring = comparison.benchmark.scoring
    parser = "" if scoring in comparison.title else f", parser {scoring}"
    sentences = [f"Scorer: {comparison.title}{parser}."]
    if comparison.protocol is not None:
        sentences.append(f"{words.deviations(comparison)}.")
    sentences += words.legend(study, mark="bold marks")
    sentences += map(words.plain, words.warnings(study))
    return " ".join(sentences)


def _text_table(table: TextTable) -> str:
    head = [escape(name) for name in table.head]
    body = [_row(map(escape, row)) for row in table.rows]
    return _float(escape(table.title), [_tabular([head], body)])


def _float(caption: str, tabulars: Sequence[str], note: str = "") -> str:
    lines = [
        r"\begin{table*}",
        r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{caption}}}",
        "\n\\par\\medskip\n".join(tabulars),
    ]
    if note:
        lines.append(rf"\par\smallskip\parbox{{\linewidth}}{{\scriptsize {note}}}")
    return "\n".join([*lines, r"\end{table*}"])


def _tabular(heads: Sequence[Sequence[str]], body: Sequence[str]) -> str:
    columns = "l" + "r" * (len(heads[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *map(_row, heads), r"\midrule"]
    return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}"])


def _row(cells: Iterable[str]) -> str:
    # a row that begins with a bracket would be read as the space after the row before it
    return " & ".join(f"{{}}{cell}" if cell.startswith("[") else cell for cell in cells) + r" \\"


def escape(text: str) -> str:
    """Any text as one line of LaTeX, without commands in it."""
    one_line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", text).split())
    return "".join(SPECIAL.get(letter, letter) for letter in one_line.replace("--", "-\N{WORD JOINER}-"))
