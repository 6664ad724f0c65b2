"""The command line. Each command loads only what it needs: `vlmfix --help` and `vlmfix methods` import no torch."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    name="vlmfix",
    help="Make vision-language models say what is in the picture: training-free attention interventions, measured "
    "honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
calibrate = typer.Typer(
    help="Choose a method's heads and settings on labelled pictures that no result is reported on.",
    no_args_is_help=True,
)
app.add_typer(calibrate, name="calibrate")
err = Console(stderr=True, highlight=False)

METHOD_HELP = (
    "Method: none, a name, or a name with settings (var:p=0.4,rho=0.8; lists as layers=1/18-31); join with + to "
    "combine. `vlmfix methods` lists them."
)
SPEED_HELP = "Accelerator to put beside each method: pyramiddrop. The untouched model stays, as the reference."
Speed = Annotated[str | None, typer.Option(help=SPEED_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ModelName = Annotated[str, typer.Option("--model", help="tiny, tiny-sinks (embedded), a Hub id, or a local folder.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's own.")]
DeviceMap = Annotated[str | None, typer.Option(help="Passed to from_pretrained, for instance auto.")]
VARIANT_HELP = "chair: rohrbach (default), opera, opera_approx, inflect, strict."
PARSER_HELP = "How answers are read: pope, strict, margin (the first token's probabilities), ..."
SIMILARITY_HELP = "amber_captions: off (default), or spacy:MODEL; the official one is spacy:en_core_web_lg."
Quantize = Annotated[str | None, typer.Option(help="8bit or 4bit; needs bitsandbytes.")]


def out() -> Console:
    """Standard output; wide where it is no terminal, so that tables do not break."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=240)


def fail(message: str, code: int = 1) -> typer.Exit:
    """One line on stderr and a non-zero exit code."""
    err.print(f"vlmfix: {' '.join(message.split())}", markup=False, soft_wrap=True)
    return typer.Exit(code)


@contextmanager
def sentences() -> Iterator[None]:
    """The user's mistakes end in one line, never in a traceback; warnings are one line each."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            err.print(f"note: {message}", markup=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        try:
            yield
        except (ValueError, TypeError) as error:
            raise fail(str(error)) from error


def load_model(name: str, dtype: str | None, device_map: str | None, quantize: str | None) -> tuple[Any, Any]:
    """`vlmfix.load` with the command line's options."""
    import torch
    from transformers.utils import logging as hf_logging

    import vlmfix

    hf_logging.set_verbosity_error()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options: dict[str, Any] = {}
    if dtype is not None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
        options["dtype"] = getattr(torch, dtype)
    if device_map is not None:
        options["device_map"] = device_map
    if quantize is not None:
        if quantize not in ("8bit", "4bit"):
            raise ValueError(f"quantize: expected 8bit or 4bit, got {quantize!r}")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{quantize}": True})
    return vlmfix.load(name, **options)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of the program itself."""
    if version:
        import vlmfix

        out().print(f"vlmfix {vlmfix.__version__}")
        raise typer.Exit()


@app.command()
def ask(
    image: Annotated[str, typer.Argument(help="Picture.")],
    prompt: Annotated[str | None, typer.Argument(help="What to ask.")] = None,
    model: ModelName = "tiny",
    method: Annotated[list[str] | None, typer.Option(help=METHOD_HELP + " Give it once per answer.")] = None,
    speed: Speed = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Ask about one picture and print the answers side by side (default: none and vhr)."""
    with sentences():
        from vlmfix.intervention import parse, spec_of, split_methods, with_accelerator

        if prompt is None:
            raise ValueError(f"expected a picture and a prompt (vlmfix ask PICTURE PROMPT), got only {image!r}")
        specs = [one for text in method or ["none,vhr"] for one in split_methods(text)]
        parsed = with_accelerator([parse(spec) for spec in specs], speed)
        specs = specs if speed is None else [spec_of(interventions) for interventions in parsed]
        from vlmfix.asking import ask as ask_model
        from vlmfix.asking import open_picture
        from vlmfix.attachment import wrapped

        open_picture(image)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        records = []
        for interventions in parsed:
            with wrapped(loaded, list(interventions), processor):
                records.append(ask_model(loaded, processor, image, prompt, max_new_tokens=max_new_tokens))
    if as_json:
        for record in records:
            out().print(record.to_json(), markup=False, soft_wrap=True)
        return
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=60 * len(records))
    table = Table(title=Text(f"{prompt}  ({Path(image).name}, {model})"), title_justify="left", show_lines=True)
    for spec in specs:
        table.add_column(Text(spec), overflow="fold", ratio=1)
    table.add_row(*(Text(record.text) for record in records))
    table.add_row(*(f"{len(r.token_ids)} tokens, {r.seconds:.2f} s" for r in records), style="dim")
    console.print(table)


@app.command(name="eval")
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
            help="scenes (default), calibration or photos, embedded; coco, aokvqa, gqa, coco_first_release, with "
            "--images; hf:NAME, from the Hub; or a folder: images/ with instances.json and captions.json, or a "
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
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pictures; for trying out.")] = None,
    controls: Annotated[bool, typer.Option("--controls", help="Add each method's negative controls.")] = False,
    beside: Annotated[
        bool, typer.Option("--beside", help="Start a new run beside an unfinished one that was asked otherwise.")
    ] = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Run benchmarks and compare methods with the untouched model. Run it again to resume: nothing is asked twice."""
    with sentences():
        from vlmfix.eval.benchmarks import benchmark as find_benchmark
        from vlmfix.eval.data import WHERE, Data
        from vlmfix.eval.protocols import MODEL, find_protocol, generation
        from vlmfix.eval.report import controls_of
        from vlmfix.intervention import parse, split_methods, with_accelerator

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
            from vlmfix.eval.hub import fetch

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
        from vlmfix.eval.runner import Workers, answer_all

        command, workers = shlex.join(["vlmfix", *sys.argv[1:]]), Workers.found()
        runs = []
        with progress_bar() if workers.rank == 0 else nullcontext() as progress:
            try:
                for bench in benches:
                    for interventions in methods:
                        run = answer_all(
                            loaded, processor, interventions, bench, pictures, output, batch_size=batch_size,
                            max_new_tokens=max_new_tokens or (preset.max_new_tokens if preset else None),
                            decoding=decoding, template=template, seed=seed,
                            protocol=protocol, beside=beside, progress=progress, command=command, workers=workers,
                        )  # fmt: skip
                        runs.append(run)
            except KeyboardInterrupt:
                raise fail(f"interrupted; finished answers are in {output}. To go on: {command}", 130) from None
    if workers.rank == 0:
        show_comparison(runs, as_json, scoring)
        err.print(f"answers and settings: {output}", soft_wrap=True, markup=False)


@calibrate.command(name="lookback")
def calibrate_lookback(
    output: Annotated[Path, typer.Option(help="The detector: a JSON file for lookback:detector=FILE.")] = Path(
        "lookback.json"
    ),
    model: ModelName = "tiny",
    method: Annotated[str, typer.Option(help="The monitor with its settings, such as lookback:preset=focus.")] = (
        "lookback"
    ),
    data: Annotated[str, typer.Option(help="Pictures to fit on, as --data of vlmfix eval.")] = "calibration",
    test: Annotated[
        str, typer.Option(help="Pictures for the figures; the same as --data: a third of it is held out.")
    ] = "scenes",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pictures of each; for trying out.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Fit a detector of invented words on lookback ratios, labelled by CHAIR, and tell its AUROC on other pictures."""
    with sentences():
        from vlmfix.hooks.lookback import Lookback
        from vlmfix.intervention import parse

        monitors = parse(method)
        if len(monitors) != 1 or type(monitors[0]) is not Lookback:
            raise ValueError(f"method: expected lookback with its settings, got {method!r}")
        from vlmfix.eval import lookback
        from vlmfix.eval.data import Data

        pictures = [Data.load(name, limit) for name in (data, test)]
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            found = lookback.calibrate(
                loaded, processor, monitors[0], *pictures,
                batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress,
            )  # fmt: skip
        found.write(output)
    if as_json:
        sys.stdout.write(json.dumps(found.auroc) + "\n")
    else:
        counts = {key: found.auroc[key] for key in ("data", "images", "words", "invented")}
        table = Table("score", "AUROC", title="{data}: {invented} of {words} words invented".format(**counts))
        for name, one in found.auroc.items():
            if name not in counts:
                sign = "+" if " - " in name else ""
                table.add_row(name, "{value:{s}.3f} [{low:{s}.3f}, {high:{s}.3f}]".format(s=sign, **one))
        out().print(table)
    err.print(f"detector: {output}", soft_wrap=True, markup=False)


def scoring_of(variant: str | None, parser: str | None, similarity: str | None) -> dict[str, str]:
    """How answers to each benchmark are judged, where that is told."""
    from vlmfix.eval.benchmarks import BENCHMARKS, YesNo

    asked = {"chair": variant, "amber_captions": similarity}
    asked |= {name: parser for name, cls in BENCHMARKS.items() if isinstance(cls, type) and issubclass(cls, YesNo)}
    return {name: how for name, how in asked.items() if how is not None}


@app.command()
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
        from vlmfix.eval.results import RECORDS, Run

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
        from vlmfix.eval import html
        from vlmfix.eval.report import study

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


@app.command()
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
        from vlmfix.eval import html
        from vlmfix.eval import report as reports
        from vlmfix.eval.results import compare

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
        from vlmfix.eval import report
        from vlmfix.eval.results import compare

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


@app.command()
def methods(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table, such as the README's.")] = False,
) -> None:
    """List the interventions: name, stages, what they do and cost, what to expect, paper."""
    from vlmfix.hooks import REGISTRY
    from vlmfix.intervention import method_class

    classes, texts = [method_class(name) for name in REGISTRY], ("summary", "expect", "cost", "paper")
    if as_json:
        rows = [
            {**c().to_json(), **{k: getattr(c, k) for k in texts}, "stages": c.stages(), "needs": c.needs()}
            for c in classes
        ]
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    head = ("name", "stages", "what it does", "what to expect", "cost", "paper")
    cells = [(c.name, ", ".join(c.stages()), *(getattr(c, k) for k in texts)) for c in classes]
    if markdown:
        lines = [head, ("---",) * len(head), *((f"`{name}`", *rest) for name, *rest in cells)]
        sys.stdout.writelines("| " + " | ".join(line) + " |\n" for line in lines)
        return
    table = Table(*head, show_lines=True)
    for row in cells:
        table.add_row(*row)
    out().print(table)


@app.command()
def protocols(as_json: Json = False) -> None:
    """List the named set-ups of `vlmfix eval --protocol`: pictures, prompt, budget, decoding, scorer, source."""
    from dataclasses import asdict

    from vlmfix.eval.protocols import PROTOCOLS, published

    if as_json:
        rows = [{**asdict(p), "published": [asdict(one) for one in published(p.name)]} for p in PROTOCOLS.values()]
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    table = Table("name", "pictures", "prompt", "template", "tokens", "decoding", "scorer", "source", show_lines=True)
    for p in PROTOCOLS.values():
        cells = (p.name, p.images or "pope500", p.prompt, p.template, str(p.max_new_tokens), p.decoding)
        table.add_row(*map(Text, (*cells, ", ".join(p.scoring), p.source)))
    out().print(table)


@app.command()
def heads(
    tool: Annotated[
        str,
        typer.Option(
            help="vhd, ablate, subspace, visual or random, with settings as in ablate:see=margin,mode=uniform."
        ),
    ] = "vhd",
    model: ModelName = "tiny",
    data: Annotated[
        str,
        typer.Option(help="calibration, scenes or photos (embedded), or a folder; never what results are judged by."),
    ] = "calibration",
    output: Annotated[Path, typer.Option("--output", "-o", help="The head list.")] = Path("heads.json"),
    plot: Annotated[Path | None, typer.Option(help="Draw layers x heads into this file (png, pdf, svg).")] = None,
    top: Annotated[int | None, typer.Option(help="Select so many heads.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Select this share of the heads; 0.25 if nothing is said.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Select heads with a score of at least this.")] = None,
    positive: Annotated[bool, typer.Option("--positive", help="Select heads with a score above 0.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pictures; for trying out.")] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Rank attention heads on pictures, and write a head list that interventions read (vhr:head_list=heads.json)."""
    with sentences():
        from vlmfix.eval import ranking
        from vlmfix.eval.data import Data
        from vlmfix.eval.headmap import head_map

        how, pictures = ranking.tool(tool), Data.load(data, limit)
        choice: dict[str, Any] = {"top": top, "share": share, "threshold": threshold, "positive": positive}
        if not any(value is not None and value is not False for value in choice.values()):
            choice["share"] = 0.25
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            found = ranking.rank(how, loaded, processor, pictures, batch_size=batch_size, tell=progress)
        found = found.select(**choice)
        found.save(output)
        if plot is not None:
            head_map(found, plot)
        if as_json:
            sys.stdout.write(json.dumps(found.to_json(), allow_nan=False) + "\n")
        else:
            show_heads(found)
        for path in filter(None, (output, plot)):
            err.print(f"written: {path}", soft_wrap=True, markup=False)


def show_heads(found: Any, most: int = 20) -> None:
    """Print the best heads of a list."""
    extra, ranked = found.extra, found.ranking()
    columns = {"interval": "95 % interval", "control": "control", "chosen_by_vhr": "chosen by VHR, % of pictures"}
    shown = {key: name for key, name in columns.items() if extra.get(key) is not None}
    parts = extra.get("parts", {})
    title = f"{found.tool} on {found.model}: {extra['score']}"
    table = Table("", "head", "score", *shown.values(), *parts, "selected", title=Text(title), title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    chosen = set(found.selected)
    for place, (layer, head) in enumerate(ranked[:most], start=1):
        cells = []
        for key in shown:
            if key == "interval":
                low, high = (side[layer][head] for side in extra[key])
                cells.append(f"[{low:.3g}, {high:.3g}]")
            else:
                value = extra[key][layer][head]
                cells.append(f"{100 * value:.0f}" if key == "chosen_by_vhr" else f"{value:.3g}")
        cells += [f"{values[layer][head]:.3g}" for values in parts.values()]
        score = f"{found.score((layer, head)):.3g}"
        table.add_row(
            str(place), f"L{layer}H{head}", score, *map(Text, cells), "yes" if (layer, head) in chosen else ""
        )
    out().print(table)
    notes = [f"{len(ranked)} heads, {len(chosen)} selected; {found.direction}"]
    if extra.get("agreement") is not None:
        notes.append(f"rank correlation of the scores on two halves of the pictures: {extra['agreement']:.2f}")
    for key in ("pairs", "prompts"):
        if key in extra:
            notes.append(f"{key}: {extra[key]}")
    if "samples" in extra:
        notes.append(", ".join(f"{n} {name}" for name, n in extra["samples"].items()) + " objects")
    out().print("; ".join(notes) + ".", markup=False, soft_wrap=True)


@calibrate.command(name="act")
def calibrate_act(
    method: Annotated[str, typer.Option(help="ACT with its settings, such as act:beta=0.2,min_rows=8.")] = "act",
    model: ModelName = "tiny",
    data: Annotated[str, typer.Option(help="Annotated pictures, as --data of vlmfix eval.")] = "calibration",
    output: Annotated[Path, typer.Option("--output", "-o", help="The head list, for act:head_list=FILE.")] = Path(
        "act.json"
    ),
    top: Annotated[int | None, typer.Option(help="Select so many heads.")] = None,
    share: Annotated[float | None, typer.Option(help="Select this share of the heads tried.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Select heads with a score of at least this.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pictures; for trying out.")] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Find the heads in which ACT helps to answer yes/no questions, one at a time; by default all with a gain."""
    with sentences():
        from vlmfix.hooks import ACT
        from vlmfix.intervention import parse

        asked = parse(method)
        if len(asked) != 1 or not isinstance(asked[0], ACT):
            raise ValueError(f"method: expected act with its settings, got {method!r}")
        from vlmfix.eval import calibration
        from vlmfix.eval.data import Data

        choice: dict[str, Any] = {"top": top, "share": share, "threshold": threshold}
        if all(value is None for value in choice.values()):
            choice["positive"] = True
        pictures = Data.load(data, limit)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            found = calibration.calibrate_act(
                loaded, processor, asked[0], pictures, batch_size=batch_size, tell=progress
            )
        found = found.select(**choice)
        found.save(output)
    if as_json:
        sys.stdout.write(json.dumps(found.to_json(), allow_nan=False) + "\n")
    else:
        show_heads(found)
    err.print(f"written: {output}", soft_wrap=True, markup=False)


@calibrate.command(name="zerotuning")
def calibrate_zerotuning(
    method: Annotated[str, typer.Option(help="ZeroTuning with its settings, such as zerotuning:span=image.")] = (
        "zerotuning"
    ),
    by: Annotated[
        str, typer.Option(help="accuracy (labelled answers) or entropy (no labels: how sure the model is).")
    ] = "accuracy",
    model: ModelName = "tiny",
    data: Annotated[str, typer.Option(help="Annotated pictures, as --data of vlmfix eval.")] = "calibration",
    output: Annotated[Path, typer.Option("--output", "-o", help="The head list, for zerotuning:head_list=FILE.")] = (
        Path("zerotuning.json")
    ),
    share: Annotated[float, typer.Option(help="Share of the heads of the more frequent kind that is listed.")] = 0.4,
    probe: Annotated[float, typer.Option(help="Gamma that tells the kinds of heads apart.")] = 2.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pictures; for trying out.")] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Choose ZeroTuning's heads and gamma by yes/no questions."""
    with sentences():
        from vlmfix.hooks import ZeroTuning
        from vlmfix.intervention import parse

        asked = parse(method)
        if len(asked) != 1 or not isinstance(asked[0], ZeroTuning):
            raise ValueError(f"method: expected zerotuning with its settings, got {method!r}")
        from vlmfix.eval import calibration
        from vlmfix.eval.data import Data

        pictures = Data.load(data, limit)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            tuned = calibration.calibrate_zerotuning(
                loaded, processor, asked[0], pictures,
                by=by, share=share, probe=probe, batch_size=batch_size, tell=progress,
            )  # fmt: skip
        tuned.heads.save(output)
    if as_json:
        sys.stdout.write(json.dumps(tuned.heads.to_json(), allow_nan=False) + "\n")
    else:
        show_tuned(tuned, by)
    err.print(f"written: {output}", soft_wrap=True, markup=False)
    err.print(f"to use it: zerotuning:gamma={tuned.best.gamma:g},head_list={output}", soft_wrap=True, markup=False)


def show_tuned(tuned: Any, by: str) -> None:
    """Print ZeroTuning's search."""
    table = Table("heads", "gamma", "accuracy %", "yes or no %", "yes %", "entropy, nats", "best")
    for one in tuned.tried:
        figures = (f"{100 * x:.1f}" for x in (one.accuracy, one.parsed, one.yes))
        mark = f"by {by}" if one is tuned.best else ""
        table.add_row(one.heads, f"{one.gamma:g}", *figures, f"{one.entropy:.3f}", mark)
    out().print(table)
    numbers = sorted({head for _, head in tuned.listed})
    out().print(
        f"{tuned.up} head numbers want more for the first token, {tuned.down} less; listed: "
        f"{', '.join(map(str, numbers))}. Present and absent objects weigh the same.",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if tuned.best.gamma == 1:
        out().print("No gamma does better than the untouched model.", markup=False)


@app.command()
def models(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/models.md.")] = False,
) -> None:
    """List the model types of the installed transformers: what can be done on each, and how image tokens are found."""
    with sentences():
        from vlmfix import support

        rows = support.table()
    if as_json:
        sys.stdout.write(json.dumps([row.to_json() for row in rows]) + "\n")
        return
    if markdown:
        sys.stdout.write(support.to_markdown(rows))
        return
    shown = Table("model type", "stages", "image tokens by", "note")
    for row in sorted(rows, key=lambda row: not row.stages):
        shown.add_row(row.model_type, ", ".join(row.stages) or "-", row.image_tokens, row.note)
    out().print(shown)
    out().print(f"{sum(bool(row.stages) for row in rows)} of {len(rows)} model types are supported.")


@app.command()
def bench(
    shape: Annotated[
        str,
        typer.Option(help="llava-1.5-7b, llava-1.5-13b, llava-next-7b, qwen2.5-vl-7b, internvl3-8b, or tiny."),
    ] = "llava-1.5-7b",
    layers: Annotated[int | None, typer.Option(min=2, help="Fewer layers than the model has, to fit the machine.")] = 4,
    method: Annotated[str, typer.Option(help=METHOD_HELP + " Separate methods with commas.")] = "var,vhr,pai",
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    text_tokens: Annotated[int, typer.Option(min=6, help="Tokens of the prompt beside those of the image.")] = 40,
    new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Each measures every variant once; one more warms up.")] = 9,
    naive: Annotated[bool, typer.Option(help="Add each attention method as a naive edit of full matrices.")] = True,
    questions: Annotated[
        int, typer.Option(min=0, help="Measure instead how fast so many questions about one picture are answered.")
    ] = 0,
    dtype: Dtype = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: time that this process computes, for a machine with other work.")
    ] = "wall",
    as_json: Json = False,
) -> None:
    """Measure what methods cost on this machine, on a model of real shape with random weights; nothing is loaded."""
    with sentences():
        from vlmfix.intervention import split_methods

        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
        if clock not in ("wall", "cpu"):
            raise ValueError(f"clock: expected wall or cpu, got {clock!r}")
        import torch
        from transformers.utils import logging as hf_logging

        from vlmfix.eval import bench as measuring

        hf_logging.set_verbosity_error()
        methods = measuring.find_methods(split_methods(method))
        measuring.shape(shape)
        model = measuring.build(shape, layers, getattr(torch, dtype), device)
        inputs = measuring.prompt(model, shape, 1 if questions else batch_size, text_tokens)
        facts = {**measuring.shape_facts(shape, model, inputs), "rounds": rounds, "new_tokens": new_tokens}
        facts["clock"] = clock
        facts |= {"machine": measuring.environment(model), "command": shlex.join(["vlmfix", *sys.argv[1:]])}
        with progress_bar() as progress:
            tell = lambda label, done, total: progress(f"{shape} {label}", done, total, "")  # noqa: E731
            if questions:
                rows = [
                    measuring.share_questions(
                        model, inputs, one, questions=questions, own_tokens=max(text_tokens - 20, 1),
                        new_tokens=new_tokens, rounds=rounds, clock=clock,
                    )
                    for one in methods
                ]  # fmt: skip
            else:
                rows = measuring.compare(
                    model, inputs, methods, new_tokens=new_tokens, rounds=rounds, clock=clock, naive=naive, tell=tell
                )
    if as_json:
        sys.stdout.write(json.dumps({**facts, "rows": rows}) + "\n")
    elif questions:
        show_questions(rows, facts)
    else:
        show_costs(rows, facts)


def show_costs(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Print what `vlmfix bench` measured."""
    units = {"prefill": ("ms", 1e3), "token": ("ms", 1e3), "memory": ("MB", 1e-6)}
    title = "{shape}, {layers} layers, {image_tokens} of {prompt_tokens} tokens image, batch of {batch_size}"
    table = Table("", title=Text(title.format(**facts)), title_justify="left")
    for name, (unit, _) in units.items():
        table.add_column(f"{name}, {unit}", justify="right")
        table.add_column("ratio", justify="right")
    for row in rows:
        cells = []
        for name, (_, factor) in units.items():
            one = row.get(name)
            low, high = one["interval"] if one else (0.0, 0.0)
            cells += (
                [f"{factor * one['median']:.1f}", f"×{one['ratio']:.2f} [{low:.2f}, {high:.2f}]"] if one else ["", ""]
            )
        table.add_row(row["variant"], *map(Text, cells))
    out().print(table)
    show_machine(facts)


def show_questions(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Print how fast `vlmfix bench --questions` was."""
    title = "{shape}, {layers} layers, {image_tokens} of {prompt_tokens} tokens image".format(**facts)
    ways = list(rows[0]["seconds"])
    table = Table("questions", "method", *ways, title=Text(title), title_justify="left")
    for row in rows:
        cells = []
        for way in ways:
            (low, high), times = row["times_faster"][way]["interval"], row["times_faster"][way]["ratio"]
            cells.append(f"{row['seconds'][way]:.2f} s, {times:.2f} [{low:.2f}, {high:.2f}] times as fast")
        table.add_row(str(row["questions"]), *map(Text, (row["method"], *cells)))
    out().print(table)
    show_machine(facts)


def show_machine(facts: dict[str, Any]) -> None:
    """Print what was measured on."""
    m = facts["machine"]
    where = (
        m["gpu"] if m["device"] != "cpu" else f"{m['cpu']}, {m['threads']} threads, load {(m['load'] or [0])[0]:.1f}"
    )
    clock = "Time computed by the process" if facts["clock"] == "cpu" else "Wall time"
    out().print(
        f"{clock}: medians over {facts['rounds']} rounds; ratios within rounds, with 95 % intervals; "
        f"{facts['new_tokens']} new tokens, {m['dtype']}, {m['attention']}, torch {m['torch']}, transformers "
        f"{m['transformers']}, {where}.",
        markup=False, soft_wrap=True,
    )  # fmt: skip


@app.command()
def demo(
    model: ModelName = "tiny",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860.")] = None,
    server_name: Annotated[
        str, typer.Option(help="Address to serve on; 0.0.0.0 lets your whole network in.")
    ] = "127.0.0.1",
    share: Annotated[bool, typer.Option(help="Make a public link; whoever has it can use your machine.")] = False,
) -> None:
    """Compare methods in the browser."""
    with sentences():
        from vlmfix.demo.app import launch

        launch(model, host=server_name, port=port, share=share)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar on stderr in a terminal; plain lines otherwise."""
    if not err.is_terminal:
        from vlmfix.eval.runner import PlainProgress

        yield PlainProgress()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class RateColumn(ProgressColumn):
        """Answers a second."""

        def render(self, task: Task) -> Text:
            """`3.2/s`."""
            return Text("" if task.finished or not task.speed else f"{task.speed:.1f}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        RateColumn(),
        TextColumn("{task.fields[figure]}"),
    )
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def tell(label: str, done: int, total: int, figure: str = "") -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total, completed=done, figure=figure)
            bars.update(tasks[label], completed=done, figure=figure)

        yield tell


def main() -> None:
    """Entry point."""
    app(prog_name="vlmfix")
