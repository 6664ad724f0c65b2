"""`vlmfix eval`: benchmarks, methods, one table."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

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
    load_model,
    progress_bar,
    sentences,
)
from vlmfix.cli.results import CsvFile, Files, LatexFile, MarkdownFile, show
from vlmfix.cli.score import scoring_of


def evaluate(
    model: ModelName = "tiny",
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="chair, pope, amber, amber_captions, mme, hallusionbench, dashb, yesno (your own); several with "
            "commas. Default: the protocol's, else chair,pope."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP + " Separate methods with commas.")] = "none,var,vhr",
    protocol: Annotated[
        str | None,
        typer.Option(help="Named set-up, such as pai-512 or vcd-pope (`vlmfix protocols`); other options override it."),
    ] = None,
    speed: Speed = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="scenes (default), calibration, photos or organism, embedded; coco, aokvqa, gqa, coco_first_release, "
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
    markdown: MarkdownFile = None,
    as_csv: CsvFile = None,
    latex: LatexFile = None,
    as_json: Json = False,
) -> None:
    """Run benchmarks and compare methods with the untouched model. Run it again to resume: nothing is asked twice."""
    with sentences():
        from vlmfix.eval.benchmarks.benchmark import benchmark as find_benchmark
        from vlmfix.eval.pictures.data import WHERE, Data
        from vlmfix.eval.run.controls import controls_of
        from vlmfix.eval.run.protocols import MODEL, find_protocol, generation
        from vlmfix.method.registry import parse, split_methods, with_accelerator

        preset = find_protocol(protocol)
        if preset is not None and data is None and images is None:
            raise ValueError(
                f"protocol {preset.name} asks about photos of COCO val2014: name their folder with --images "
                f"({WHERE['coco']}), or try it on other pictures, such as --data scenes"
            )
        names = [
            n.strip() for n in (benchmark or (preset.benchmark if preset else "chair,pope")).split(",") if n.strip()
        ]
        if preset is not None and names != [preset.benchmark]:
            raise ValueError(f"protocol {preset.name} is of {preset.benchmark}; leave out --benchmark")
        scoring = scoring_of(variant, parser, similarity)
        own_prompt = prompt if prompt is not None else preset.prompt if preset else None
        first = (preset.scoring if preset else (None,))[0]
        benches = [find_benchmark(name, scoring.get(name, first), own_prompt) for name in names]
        methods = [parse(spec) for spec in split_methods(method)]
        if controls:
            methods += [control for found in methods for control in controls_of(found)]
        methods = with_accelerator(methods, speed, controls)
        if not benches or not methods:
            raise ValueError("nothing to do: give at least one benchmark and one method")
        if data is None:
            data = "coco" if preset or which else "scenes"
        if which is None and preset is not None and data == "coco":
            which = preset.images
        if data.startswith("hf:"):
            from vlmfix.eval.pictures.hub import fetch

            pictures = Data.load(str(fetch(data, names)), limit, which, images, questions)
        else:
            pictures = Data.load(data, limit, which, images, questions)
        for bench in benches:
            bench.items(pictures)
        decoding = decoding or (preset.decoding if preset else "greedy")
        seed = seed if seed is not None else preset.seed if preset else 0
        generation(decoding)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        if template is None:
            fits = preset is not None and getattr(processor, "image_token", None) == "<image>"
            template = preset.template if preset and fits else MODEL
        from vlmfix.eval.run.runner import Workers, answer_each

        command, workers = shlex.join(["vlmfix", *sys.argv[1:]]), Workers.found()
        runs = []
        with progress_bar() if workers.rank == 0 else nullcontext() as progress:
            try:
                for bench in benches:
                    runs += answer_each(
                        loaded, processor, methods, bench, pictures, output, batch_size=batch_size,
                        max_new_tokens=max_new_tokens or (preset.max_new_tokens if preset else None),
                        decoding=decoding, template=template, seed=seed,
                        protocol=protocol, beside=beside, progress=progress, command=command, workers=workers,
                    )  # fmt: skip
            except KeyboardInterrupt:
                raise fail(f"interrupted; finished answers are in {output}. To go on: {command}", 130) from None
    if workers.rank == 0:
        with sentences():
            from vlmfix.eval.run.results import compare

            comparisons = compare(runs, scoring=scoring)
        show(comparisons, as_json, Files(markdown=markdown, csv=as_csv, latex=latex))
        err.print(f"answers and settings: {output}", soft_wrap=True, markup=False)
