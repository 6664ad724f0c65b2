r"""Comparisons as LaTeX tables, to be pasted into a paper that has `\usepackage{booktabs}`. No torch.

Bold is a real difference, by the rule in `study`. The footnote names scorer, protocol, model and pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vlmfix.eval.report import words
from vlmfix.eval.report.study import Study
from vlmfix.eval.report.tables import (
    Cell,
    ComparisonTable,
    Line,
    TextTable,
    comparison_tables,
    published_table,
    table_title,
)

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
    '"': r"\textquotedbl{}",
    "−": "$-$",
    "±": r"$\pm$",
    "–": "--",
    "\N{REPLACEMENT CHARACTER}": "?",
}


def to_latex(studies: Sequence[Study]) -> str:
    """A floating table for each group of answers, and one for what others report for the protocol."""
    parts = [r"% needs \usepackage{booktabs}"]
    for study in studies:
        parts += [_comparison_table(study, table) for table in comparison_tables(study)]
        published = published_table(study.comparison)
        if published is not None:
            parts.append(_text_table(published))
    return "\n\n".join(parts) + "\n"


def _comparison_table(study: Study, table: ComparisonTable) -> str:
    head = ["", *(rf"\texttt{{{escape(method)}}}" for method in table.methods)]
    body: list[str] = []
    for line in table.lines:
        body += _rows(line)
    return _float(escape(table_title(study, table)), head, body, escape(footnote(study)))


def _rows(line: Line) -> list[str]:
    """The figures, and below them their differences where there are any; then a little space."""
    values = [escape(line.label), *(escape(cell.value) for cell in line.cells)]
    changes = ["", *map(_change, line.cells)]
    if not any(changes):
        rows = [values]
    elif not any(values[1:]):
        rows = [[values[0], *changes[1:]]]
    else:
        rows = [values, changes]
    return [_row(row) for row in rows]


def _change(cell: Cell) -> str:
    text = escape(cell.change)
    return rf"\textbf{{{text}}}" if cell.real else text


def footnote(study: Study) -> str:
    """How answers were scored, by which protocol, and what bold means."""
    comparison = study.comparison
    sentences = [f"Scorer: {comparison.title} ({comparison.benchmark.scoring})."]
    if comparison.protocol is not None:
        sentences.append(f"{words.deviations(comparison)}.")
    sentences += words.legend(study, mark="bold marks")
    return " ".join(sentences)


def _text_table(table: TextTable) -> str:
    head = [escape(name) for name in table.head]
    body = [_row(map(escape, row)) for row in table.rows]
    return _float(escape(table.title), head, body)


def _float(caption: str, head: Sequence[str], body: Sequence[str], note: str = "") -> str:
    columns = "l" + "r" * (len(head) - 1)
    lines = [
        r"\begin{table*}",
        r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _row(head),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if note:
        lines.append(rf"\par\smallskip\parbox{{\linewidth}}{{\scriptsize {note}}}")
    return "\n".join([*lines, r"\end{table*}"])


def _row(cells: Iterable[str]) -> str:
    # a row that begins with a bracket would be read as the space after the row before it
    return " & ".join(f"{{}}{cell}" if cell.startswith("[") else cell for cell in cells) + r" \\"


def escape(text: str) -> str:
    """Any text as one line of LaTeX, without commands in it."""
    one_line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", text).split())
    return "".join(SPECIAL.get(letter, letter) for letter in one_line)
