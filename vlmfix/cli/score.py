"""`vlmfix score` and `vlmfix report`: finished answers, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vlmfix.cli.console import PARSER_HELP, SIMILARITY_HELP, VARIANT_HELP, Json, sentences
from vlmfix.cli.results import CsvFile, ExplainFile, Files, Full, LatexFile, MarkdownFile, show


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
    image_key: Annotated[
        str | None, typer.Option(help="chair: key of the image in the files, if not found by itself.")
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
    explain: ExplainFile = None,
    markdown: MarkdownFile = None,
    as_csv: CsvFile = None,
    latex: LatexFile = None,
    page: Annotated[Path | None, typer.Option("--report", help="Write a page to read (HTML) to this file.")] = None,
    full: Full = False,
    as_json: Json = False,
) -> None:
    """Score finished answers again, without a model; several are compared in one table.

    Published files of captions or answers are scored with --benchmark.
    """
    written = Files(page=page, markdown=markdown, csv=as_csv, latex=latex, explain=explain)
    with sentences():
        from vlmfix.eval.api import compare
        from vlmfix.eval.benchmarks.benchmark import FileOptions

        options = FileOptions(
            variant=variant,
            truth=truth,
            synonyms=synonyms,
            key=key,
            image_key=image_key,
            parser=parser,
            source=source,
            split=split,
            questions=questions,
            similarity=similarity,
            labels=labels,
        )
        if benchmark is None and page is not None:
            raise ValueError("report: only with --benchmark, for files that are no runs of `vlmfix eval`")
        _check_not_read(written, [*files, baseline, truth, synonyms, questions, labels])
        comparisons = compare(files, benchmark=benchmark, options=options, baseline=baseline)
    show(comparisons, as_json, written, full)


def _check_not_read(written: Files, read: Sequence[str | Path | None]) -> None:
    """`ValueError` if a file that is to be written is one of those that are read."""
    sources = [Path(source) for source in read if source is not None and Path(source).exists()]
    for target in written.paths():
        if target.exists() and any(target.samefile(source) for source in sources):
            raise ValueError(f"{target} is one of the files to read; write elsewhere")


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders of `vlmfix eval`, or folders that hold some, such as runs.")
    ],
    output: Annotated[Path, typer.Option(help="The page: one HTML file that needs nothing else.")] = Path(
        "report.html"
    ),
    markdown: MarkdownFile = None,
    as_csv: CsvFile = None,
    latex: LatexFile = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Also write all figures as JSON, to this file.")
    ] = None,
) -> None:
    """Make a page to read from finished runs: words, tables, plots, pictures and where it all came from."""
    with sentences():
        from vlmfix.eval.report.study import find_runs
        from vlmfix.eval.run.results import compare

        written = Files(page=output, markdown=markdown, csv=as_csv, latex=latex, json=as_json)
        written.write(compare(find_runs(runs)))
