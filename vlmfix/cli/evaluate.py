"""`vlmfix eval`: benchmarks, methods, one table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmfix.cli.console import (
    METHOD_HELP,
    PARSER_HELP,
    SIMILARITY_HELP,
    VARIANT_HELP,
    DeviceMap,
    Dtype,
    Json,
    Limit,
    ModelName,
    Quantize,
    Speed,
    err,
    fail,
    progress_bar,
    quiet_libraries,
    sentences,
)
from vlmfix.cli.results import CsvFile, Files, Full, LatexFile, MarkdownFile, show

if TYPE_CHECKING:
    from vlmfix.eval.api import Setup
    from vlmfix.eval.run.progress import Progress
    from vlmfix.eval.run.results import Run
    from vlmfix.eval.run.workers import Workers


def evaluate(
    model: ModelName = "organism",
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="chair, pope, amber, amber_captions, mme, hallusionbench, dashb, yesno (your own); several with "
            "commas. Default: the protocol's, else chair,pope."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=METHOD_HELP + " Separate methods with commas. Default: none,var,vhr; without any option, the "
            "main job's."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="Named set-up, such as pai-512 or vcd-pope (`vlmfix protocols`); other options override it."),
    ] = None,
    speed: Speed = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="organism (default), calibration or photos, embedded; coco, aokvqa, gqa, coco_first_release, "
            "with --images; hf:NAME, from the Hub; or a folder: images/ with instances.json and captions.json, or a "
            "benchmark's original files."
        ),
    ] = None,
    images: Annotated[str | None, typer.Option(help="Folder of the pictures, such as val2014.")] = None,
    which: Annotated[
        str | None,
        typer.Option("--list", help="Which pictures: first500, opera500, sorted-seed-0, ..., a file of ids."),
    ] = None,
    questions: Annotated[str | None, typer.Option(help="File (mme: folder) with the questions.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for answers and results.")] = Path("runs"),
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: the benchmark's (chair 512, pope 8).")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask; {question} is where a benchmark's own question goes.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="model (the processor's own), or of LLaVA-1.5: vicuna_v1, llava_v1, pai, opera, ..."),
    ] = None,
    decoding: Annotated[
        str | None, typer.Option(help="greedy (default), beam5, sample, sample:temperature=1,top_p=0.9, or checkpoint.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of sampling.")] = None,
    variant: Annotated[str | None, typer.Option(help=VARIANT_HELP)] = None,
    parser: Annotated[str | None, typer.Option(help=PARSER_HELP)] = None,
    similarity: Annotated[str | None, typer.Option(help=SIMILARITY_HELP)] = None,
    limit: Limit = None,
    controls: Annotated[bool, typer.Option("--controls", help="Add each method's negative controls.")] = False,
    beside: Annotated[
        bool, typer.Option("--beside", help="Start a new run beside an unfinished one that was asked otherwise.")
    ] = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share out the runs. Default: one, and one a core for the main job."),
    ] = None,
    full: Full = False,
    markdown: MarkdownFile = None,
    as_csv: CsvFile = None,
    latex: LatexFile = None,
    as_json: Json = False,
) -> None:
    """Run benchmarks and compare methods with the untouched model. Run it again to resume: nothing is asked twice.

    Without options: the main job, a look at what methods do on the embedded model, in about two minutes.
    """
    given: tuple[object, ...] = (
        benchmark,
        method,
        protocol,
        speed,
        data,
        images,
        which,
        questions,
        max_new_tokens,
        prompt,
        template,
    )
    given += (decoding, seed, variant, parser, similarity, dtype, device_map, quantize)
    is_tour = model == "organism" and batch_size == 32 and not (controls or beside) and set(given) == {None}
    with sentences():
        from vlmfix.eval.api import Task, compare, prepare
        from vlmfix.eval.benchmarks.benchmark import FileOptions
        from vlmfix.eval.run.workers import Workers
        from vlmfix.eval.tour import first_lines, next_lines, tour

        task = Task(
            model=model,
            methods=method or Task().methods,
            benchmarks=benchmark or (),
            protocol=protocol,
            speed=speed,
            controls=controls,
            data=data,
            images=images,
            which=which,
            questions=questions,
            limit=limit,
            output=str(output),
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            prompt=prompt,
            template=template,
            decoding=decoding,
            seed=seed,
            variant=variant,
            parser=parser,
            similarity=similarity,
            beside=beside,
            dtype=dtype,
            device_map=device_map,
            quantize=quantize,
        )
        setups = [prepare(each) for each in (tour(str(output), limit) if is_tour else [task])]
        workers = Workers.found()
        if is_tour and workers.rank == 0:
            for line in first_lines(str(output)):
                err.print(line, markup=False)
        command = shlex.join(["vlmfix", *sys.argv[1:]])
        with progress_bar() if workers.rank == 0 else nullcontext() as progress:
            try:
                runs = _answer(setups, processes or _processes(setups, is_tour, workers), progress, command, workers)
            except KeyboardInterrupt:
                raise fail(f"interrupted; finished answers are in {output}. To go on: {command}", 130) from None
    if workers.rank == 0:
        with sentences():
            options = FileOptions(variant=variant, parser=parser, similarity=similarity)
            comparisons = compare(runs, options=options)
        show(comparisons, as_json, Files(markdown=markdown, csv=as_csv, latex=latex), full)
        err.print(f"answers and settings: {output}", soft_wrap=True, markup=False)
        for line in next_lines(str(output)) if is_tour else [f"next: vlmfix report {output}"]:
            err.print(line, soft_wrap=True, markup=False)
        _tell_errors(runs)


MANY = 400
"""Questions from which on it pays to start further processes."""


def _processes(setups: Sequence[Setup], is_tour: bool, workers: Workers) -> int:
    """How many processes share out the runs where nobody has said: several for the main job alone, whose model is so
    small that one process leaves cores idle."""
    from vlmfix.eval.run.parallel import cores, units_of

    n_questions = sum(len(bench.items(setup.data)) for setup in setups for bench in setup.benches)
    if not is_tour or workers.n > 1 or n_questions < MANY:
        return 1
    return min(cores(), len(units_of(setups)))


def _answer(setups: Sequence[Setup], n: int, progress: Progress | None, command: str, workers: Workers) -> list[Run]:
    """Ask all questions, in this process or in several."""
    if n > 1:
        from vlmfix.eval.run.parallel import answer_in_processes

        return answer_in_processes(setups, n, progress, command)
    quiet_libraries()
    from vlmfix.eval.api import load

    loaded = load(setups[0].task)
    runs: list[Run] = []
    for setup in setups:
        runs += setup.answer(loaded, progress=progress, command=command, workers=workers)
    return runs


NOT_ASKED = 3
"""Exit code of a run that is done but for questions that could not be asked."""


def _tell_errors(runs: Sequence[Run]) -> None:
    """Name the questions that could not be asked, and end with an exit code that says so."""
    for run in runs:
        for error in run.errors:
            question = f"{run.label}, question {error['id']} ({error['image']})"
            err.print(f"not asked: {question}: {error['error']}", soft_wrap=True, markup=False)
    n_errors = sum(len(run.errors) for run in runs)
    if n_errors:
        raise fail(f"questions that could not be asked: {n_errors}; mend them and run the command again", NOT_ASKED)
