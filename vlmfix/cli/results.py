"""What `eval`, `score` and `report` do with comparisons: print them, write them to files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmfix.cli.console import err, out, sentences

if TYPE_CHECKING:
    from vlmfix.eval.report.study import Study
    from vlmfix.eval.run.results import Comparison

MarkdownFile = Annotated[
    Path | None, typer.Option("--markdown", help="Also write words and tables as Markdown, to this file.")
]
CsvFile = Annotated[Path | None, typer.Option("--csv", help="Also write every figure as CSV, to this file.")]
LatexFile = Annotated[
    Path | None, typer.Option("--latex", help="Also write the tables as LaTeX (booktabs), to this file.")
]
Full = Annotated[bool, typer.Option("--full", help="Print all figures, not only the headline.")]
ExplainFile = Annotated[
    Path | None, typer.Option("--explain", help="Write every verdict to this file, one JSON line each.")
]


@dataclass(frozen=True)
class Files:
    """Where comparisons are written; `None` where they are not."""

    page: Path | None = None
    markdown: Path | None = None
    csv: Path | None = None
    latex: Path | None = None
    json: Path | None = None
    explain: Path | None = None
    """Every verdict, one JSON line each."""

    def paths(self) -> list[Path]:
        """Those that are written."""
        every_path = (self.page, self.markdown, self.csv, self.latex, self.json, self.explain)
        return [path for path in every_path if path is not None]

    def write(self, comparisons: Sequence[Comparison]) -> list[Study]:
        """Write them all, and say so. `ValueError` if one cannot be written."""
        from vlmfix.eval.report import html
        from vlmfix.eval.report.csv_json import to_csv, to_json
        from vlmfix.eval.report.latex import to_latex
        from vlmfix.eval.report.markdown import to_markdown
        from vlmfix.eval.report.study import study

        studies = [study(comparison) for comparison in comparisons]
        renderers: list[tuple[Path | None, Callable[[Sequence[Study]], str]]] = [
            (self.explain, _explanations),
            (self.page, html.page),
            (self.markdown, to_markdown),
            (self.csv, to_csv),
            (self.latex, to_latex),
            (self.json, to_json),
        ]
        for path, render in renderers:
            if path is not None:
                write_text(path, render(studies))
        return studies


def _explanations(studies: Sequence[Study]) -> str:
    from vlmfix.eval.report.words import explanations

    lines: Iterator[str] = (json.dumps(verdict) for study in studies for verdict in explanations(study.comparison))
    return "".join(f"{line}\n" for line in lines)


def write_text(path: Path, text: str) -> None:
    """Write a file, and say so. `ValueError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    err.print(f"written: {path}", soft_wrap=True, markup=False)


def show(comparisons: Sequence[Comparison], as_json: bool, files: Files, full: bool = False) -> None:
    """Write files, then print tables, or JSON. Of files of answers the notes then go to stderr."""
    with sentences():
        from vlmfix.eval.report import terminal
        from vlmfix.eval.report.words import warnings

        studies = files.write(comparisons)
    if as_json:
        tables = [{**study.comparison.to_json(), "flags": warnings(study)} for study in studies]
        sys.stdout.write(json.dumps(tables) + "\n")
        for comparison in comparisons:
            if any(run.is_file for run in comparison.runs):
                for note in comparison.notes:
                    err.print(f"note: {note}", markup=False, soft_wrap=True)
    else:
        terminal.show(out(), studies, full)
