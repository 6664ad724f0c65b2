r"""Comparisons as LaTeX tables, to be pasted into a paper that has `\usepackage{booktabs}`. No torch.

Bold is a real difference, by the rule in `verdicts`. The footnote names scorer, protocol, model and pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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

METHODS_ACROSS = 4
"""Methods beside each other on a page; more go on below."""
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
        parts += [_comparison_table(study, table) for table in comparison_tables(study)]
        published = published_table(study.comparison)
        if published is not None:
            parts.append(_text_table(published))
    return "\n\n".join(parts) + "\n"


def _comparison_table(study: Study, table: ComparisonTable) -> str:
    parts = []
    for first in range(0, len(table.methods), METHODS_ACROSS):
        across = slice(first, first + METHODS_ACROSS)
        head = ["", *(rf"\texttt{{{escape(method)}}}" for method in table.methods[across])]
        body: list[str] = []
        for line in table.lines:
            body += _rows(line.label, line.cells[across])
        parts.append(_tabular(head, body))
    return _float(escape(table_title(study, table)), parts, escape(footnote(study)))


def _rows(label: str, cells: Sequence[Cell]) -> list[str]:
    """The figures of a line, and below them their differences where there are any."""
    values = [escape(cell.value) for cell in cells]
    changes = [_change(cell) for cell in cells]
    if any(values) and any(changes):
        return [_row([escape(label), *values]), _row(["", *changes])]
    return [_row([escape(label), *(values if any(values) else changes)])]


def _change(cell: Cell) -> str:
    text = escape(cell.change)
    return rf"\textbf{{{text}}}" if cell.real else text


def footnote(study: Study) -> str:
    """How answers were scored, by which protocol, and what bold means."""
    comparison = study.comparison
    scoring = comparison.benchmark.scoring
    parser = "" if scoring in comparison.title else f", parser {scoring}"
    sentences = [f"Scorer: {comparison.title}{parser}."]
    if comparison.protocol is not None:
        sentences.append(f"{words.deviations(comparison)}.")
    sentences += words.legend(study, mark="bold marks")
    return " ".join(sentences)


def _text_table(table: TextTable) -> str:
    head = [escape(name) for name in table.head]
    body = [_row(map(escape, row)) for row in table.rows]
    return _float(escape(table.title), [_tabular(head, body)])


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


def _tabular(head: Sequence[str], body: Sequence[str]) -> str:
    columns = "l" + "r" * (len(head) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(head), r"\midrule"]
    return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}"])


def _row(cells: Iterable[str]) -> str:
    # a row that begins with a bracket would be read as the space after the row before it
    return " & ".join(f"{{}}{cell}" if cell.startswith("[") else cell for cell in cells) + r" \\"


def escape(text: str) -> str:
    """Any text as one line of LaTeX, without commands in it."""
    one_line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", text).split())
    return "".join(SPECIAL.get(letter, letter) for letter in one_line.replace("--", "-\N{WORD JOINER}-"))
