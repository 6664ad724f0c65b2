"""`vlmfix score` and `vlmfix report`: finished answers, without a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfix.cli.console import (
    PARSER_HELP,
    SIMILARITY_HELP,
    VARIANT_HELP,
    Json,
    err,
    out,
    sentences,
)


def score(
    files: Annotated[
        list[Path],
        typer.Argument(help="Run folders of `vlmfix eval`; with --benchmark, any files of captions or answers."),
    ],
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="What the files answer: chair, pope, amber, mme, hallusionbench, dashb, or yesno (your own)."
        ),
    ] = None,
    variant: Annotated[str | None, typer.Option(help=VARIANT_HELP)] = None,
    truth: Annotated[
        str | None, typer.Option(help="chair: coco (COCO 2014, default), or a file or folder of annotations.")
    ] = None,
    synonyms: Annotated[str | None, typer.Option(help="chair: objects and their synonyms, if not COCO's.")] = None,
    key: Annotated[
        str | None, typer.Option("--caption-key", "--answer-key", help="Key of the text in the files.")
    ] = None,
    parser: Annotated[str | None, typer.Option(help=PARSER_HELP)] = None,
    similarity: Annotated[str | None, typer.Option(help=SIMILARITY_HELP)] = None,
    source: Annotated[str | None, typer.Option(help="pope: coco (default), aokvqa, gqa, coco_first_release.")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="pope: random, popular, adversarial; hallusionbench: with_image_951 (default), all."),
    ] = None,
    questions: Annotated[str | None, typer.Option(help="File (mme: folder) with the questions.")] = None,
    labels: Annotated[str | None, typer.Option(help="pope: file with other labels, such as RePOPE's.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="File to compare with; default: the first.")] = None,
    explain: Annotated[Path | None, typer.Option(help="Write every verdict to this file, one JSON line each.")] = None,
    page: Annotated[Path | None, typer.Option("--report", help="Write a page to read (HTML) to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Score finished answers again, without a model; several are compared in one table.

    Published files of captions or answers are scored with --benchmark.
    """
    with sentences():
        from vlmfix.eval.api import compare
        from vlmfix.eval.benchmarks.benchmark import FileOptions

        options = FileOptions(
            variant=variant,
            truth=truth,
            synonyms=synonyms,
            key=key,
            parser=parser,
            source=source,
            split=split,
            questions=questions,
            similarity=similarity,
            labels=labels,
        )
        if benchmark is None and page is not None:
            raise ValueError("report: only with --benchmark, for files that are no runs of `vlmfix eval`")
        sources = [*files, baseline, *map(Path, filter(None, (truth, synonyms, questions, labels)))]
        _check_not_read([explain, page], sources)
        comparisons = compare(files, benchmark=benchmark, options=options, baseline=baseline)
        show(comparisons, as_json, explain)
        if page is not None:
            from vlmfix.eval.report import html
            from vlmfix.eval.report.report import study

            write_page(page, html.page([study(comparison) for comparison in comparisons]))


def _check_not_read(written: Sequence[Path | None], read: Sequence[Path | None]) -> None:
    """`ValueError` if a file that is to be written is one of those that are read."""
    for target in written:
        for path in read:
            if target and path and target.exists() and path.exists() and target.samefile(path):
                raise ValueError(f"{target} is one of the files to read; write elsewhere")


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders of `vlmfix eval`, or folders that hold some, such as runs.")
    ],
    output: Annotated[Path, typer.Option(help="The page: one HTML file that needs nothing else.")] = Path(
        "report.html"
    ),
    markdown: Annotated[Path | None, typer.Option(help="Also write words and tables as Markdown, here.")] = None,
    as_csv: Annotated[Path | None, typer.Option("--csv", help="Also write every figure as CSV, here.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write all figures as JSON, here.")] = None,
) -> None:
    """Make a page to read from finished runs: words, tables, plots, pictures and where it all came from."""
    with sentences():
        from vlmfix.eval.report import html
        from vlmfix.eval.report import report as reports
        from vlmfix.eval.run.results import compare

        studies = [reports.study(comparison) for comparison in compare(reports.find_runs(runs))]
        texts = [(output, html.page), (markdown, reports.to_markdown)]
        texts += [(as_csv, reports.to_csv), (as_json, reports.to_json)]
        for path, make in texts:
            if path is None:
                continue
            write_page(path, make(studies))


def write_page(path: Path, text: str) -> None:
    """Write a file, and say so. `ValueError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    err.print(f"written: {path}", soft_wrap=True, markup=False)


def show_comparison(runs: Sequence[Any], as_json: bool, scoring: dict[str, str] | None = None) -> None:
    """Compare runs, and print tables, or JSON."""
    with sentences():
        from vlmfix.eval.run.results import compare

        show(compare(runs, scoring=scoring), as_json)


def show(comparisons: Sequence[Any], as_json: bool, explain: Path | None = None) -> None:
    """Print tables, or JSON with the notes on stderr where files were scored; write every verdict to `explain`."""
    from vlmfix.eval.report import report

    if explain is not None:
        verdicts = (verdict for comparison in comparisons for verdict in report.verdicts(comparison))
        write_page(explain, "".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    console = out()
    if as_json:
        sys.stdout.write(json.dumps([c.to_json() for c in comparisons], ensure_ascii=True) + "\n")
    for comparison in comparisons:
        tables = () if as_json else report.tables(comparison)
        for table in tables:
            console.print(table)
        of_files = any(run.is_file for run in comparison.runs)
        if of_files or not as_json:
            for note in filter(None, [report.deviation_text(comparison), *comparison.notes]):
                text = f"note: {note}" if of_files else note
                (err if as_json else console).print(text, markup=False, soft_wrap=True)
        if not as_json:
            console.print()
    if not as_json:
        console.print(report.LEGEND, markup=False, soft_wrap=True)
