"""`vlmfix score` and `vlmfix report`: finished answers, without a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfix.cli.console import PARSER_HELP, SIMILARITY_HELP, VARIANT_HELP, Json, err, sentences
from vlmfix.cli.results import CsvFile, ExplainFile, Files, LatexFile, MarkdownFile, show


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
    explain: ExplainFile = None,
    markdown: MarkdownFile = None,
    as_csv: CsvFile = None,
    latex: LatexFile = None,
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
    written = Files(page=page, markdown=markdown, csv=as_csv, latex=latex, explain=explain)
    if benchmark is not None:
        with sentences():
            score_files(files, benchmark, asked, baseline, written, as_json)
        return
    with sentences():
        from vlmfix.eval.run.results import RECORDS, Run, compare

        asked |= {"baseline": baseline, "report": page, "variant": None, "parser": None, "similarity": None}
        if given := [name for name, value in asked.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: only with --benchmark, for files that are no runs of `vlmfix eval`")
        if plain := next((path for path in files if path.is_file() and path.name != RECORDS), None):
            raise ValueError(
                f"{plain} is no run of `vlmfix eval`; to score captions or answers in a file, add --benchmark"
            )
        comparisons = compare([Run.read(path) for path in files], scoring=scoring_of(variant, parser, similarity))
    show(comparisons, as_json, written)


def score_files(
    files: Sequence[Path],
    benchmark: str,
    asked: dict[str, Any],
    baseline: Path | None,
    written: Files,
    as_json: bool,
) -> None:
    """Score and compare other people's answers; print tables, or JSON with the notes on stderr."""
    from vlmfix.eval import external

    read = [Path(path) for path in (*files, baseline, *asked.values()) if path is not None]
    for path in written.paths():
        if path.exists() and any(other.exists() and path.samefile(other) for other in read):
            raise ValueError(f"{path} is one of the files to read; write elsewhere")
    comparison = external.compare(files, benchmark, external.Options(**asked), baseline)
    if not as_json:
        show([comparison.as_runs()], as_json, written)
        return
    written.write([comparison.as_runs()])
    sys.stdout.write(json.dumps([comparison.to_json()]) + "\n")
    for note in comparison.notes:
        err.print(f"note: {note}", markup=False, soft_wrap=True)


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
