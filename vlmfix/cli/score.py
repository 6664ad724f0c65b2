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


def scoring_of(variant: str | None, parser: str | None, similarity: str | None) -> dict[str, str]:
    """How answers to each benchmark are judged, where that is told."""
    from vlmfix.eval.benchmarks.benchmark import BENCHMARKS, YesNo

    asked = {"chair": variant, "amber_captions": similarity}
    asked |= {name: parser for name, cls in BENCHMARKS.items() if isinstance(cls, type) and issubclass(cls, YesNo)}
    return {name: how for name, how in asked.items() if how is not None}


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
    asked: dict[str, Any] = {
        "variant": variant, "truth": truth, "synonyms": synonyms, "key": key, "parser": parser, "source": source,
        "split": split, "questions": questions, "labels": labels, "similarity": similarity,
    }  # fmt: skip
    if benchmark is not None:
        with sentences():
            score_files(files, benchmark, asked, baseline, explain, page, as_json)
        return
    with sentences():
        from vlmfix.eval.run.results import RECORDS, Run

        asked |= {"baseline": baseline, "report": page, "variant": None, "parser": None, "similarity": None}
        if given := [name for name, value in asked.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: only with --benchmark, for files that are no runs of `vlmfix eval`")
        if plain := next((path for path in files if path.is_file() and path.name != RECORDS), None):
            raise ValueError(
                f"{plain} is no run of `vlmfix eval`; to score captions or answers in a file, add --benchmark"
            )
        runs = [Run.read(path) for path in files]
    show_comparison(runs, as_json, scoring_of(variant, parser, similarity), explain)


def score_files(
    files: Sequence[Path],
    benchmark: str,
    asked: dict[str, Any],
    baseline: Path | None,
    explain: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Score and compare other people's answers; print tables, or JSON with the notes on stderr."""
    from vlmfix.eval import external

    read = [Path(path) for path in (*files, baseline, *asked.values()) if path is not None]
    for written in filter(None, (explain, page)):
        if written.exists() and any(path.exists() and written.samefile(path) for path in read):
            raise ValueError(f"{written} is one of the files to read; write elsewhere")
    comparison = external.compare(files, benchmark, external.Options(**asked), baseline)
    if explain is not None:
        write_page(explain, "".join(json.dumps(verdict) + "\n" for verdict in comparison.verdicts()))
    if page is not None:
        from vlmfix.eval.report import html
        from vlmfix.eval.report.report import study

        write_page(page, html.page([study(comparison.as_runs())]))
    if as_json:
        sys.stdout.write(json.dumps([comparison.to_json()]) + "\n")
    else:
        for table in external.tables(comparison):
            out().print(table)
    for note in comparison.notes:
        (err if as_json else out()).print(f"note: {note}", markup=False, soft_wrap=True)
    if not as_json:
        out().print(external.legend(comparison), markup=False, soft_wrap=True)


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


def show_comparison(
    runs: Sequence[Any], as_json: bool, scoring: dict[str, str] | None = None, explain: Path | None = None
) -> None:
    """Print tables, or JSON; write every verdict to `explain`."""
    with sentences():
        from vlmfix.eval.report import report
        from vlmfix.eval.run.results import compare

        comparisons = compare(runs, scoring=scoring)
        if explain is not None:
            verdicts = (verdict for comparison in comparisons for verdict in report.verdicts(comparison))
            write_page(explain, "".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    if as_json:
        sys.stdout.write(json.dumps([c.to_json() for c in comparisons], ensure_ascii=False) + "\n")
        return
    console = out()
    for comparison in comparisons:
        for table in report.tables(comparison):
            console.print(table)
        for note in filter(None, [report.deviation_text(comparison), *comparison.notes]):
            console.print(note, markup=False, soft_wrap=True)
        console.print()
    console.print(report.LEGEND, markup=False, soft_wrap=True)
