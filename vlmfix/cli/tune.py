"""`vlmfix tune`: which methods, how strong, for this model?"""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from vlmfix.cli.console import (
    DeviceMap,
    Dtype,
    Json,
    Limit,
    ModelName,
    Quantize,
    err,
    fail,
    load_model,
    out,
    progress_bar,
    sentences,
)

if TYPE_CHECKING:
    from vlmfix.eval.tune.tune import Confirmed, Tuned

NOTHING_FOUND = 4
"""Exit code where no fix is better than the untouched model."""


def tune(
    model: ModelName = "organism",
    data: Annotated[
        str,
        typer.Option(
            help="Pictures: calibration (embedded), or a folder: with instances.json in COCO format, with yes/no "
            "questions (--benchmark yesno), or of pictures alone. Never what results are judged by."
        ),
    ] = "calibration",
    images: Annotated[str | None, typer.Option(help="Folder of the pictures, where they do not lie in --data.")] = None,
    benchmark: Annotated[
        str, typer.Option(help="chair (captions), or yes/no questions: pope, yesno (your own), amber ...")
    ] = "chair",
    output: Annotated[Path, typer.Option("--output", "-o", help="The fix.")] = Path("fix.json"),
    folder: Annotated[
        Path, typer.Option(help="Folder for answers, head lists and the page; run again to resume.")
    ] = Path("tuned"),
    budget: Annotated[
        str, typer.Option(help="What the search may take: a time that answers take (20m, 1h), or a number of answers.")
    ] = "20m",
    recall: Annotated[float, typer.Option(help="Least change of recall, points.")] = -0.5,
    words: Annotated[float, typer.Option(help="Least words, of the untouched model's.")] = 0.95,
    repetition: Annotated[float, typer.Option(help="Most change of captions that repeat themselves, points.")] = 2.0,
    cost: Annotated[float, typer.Option(help="Most forward passes for a token, of the untouched model's.")] = 1.10,
    bakeable: Annotated[
        bool, typer.Option("--bakeable", help="Only constant head gains, which can be folded into the weights.")
    ] = False,
    allow: Annotated[
        str | None, typer.Option(help="decoding: also methods that decode in their own way (set --cost, too).")
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels/--no-labels", help="Whether to look at annotations, or to ask the model itself.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of pictures.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the benchmark's.")] = None,
    template: Annotated[str, typer.Option(help="As for vlmfix eval.")] = "model",
    limit: Limit = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Look for the methods that make a model invent least at no loss of recall, confirm them on other pictures, and
    write them into a fix (vlmfix.wrap(model, "fix.json")). Run it again to resume."""
    command = shlex.join(["vlmfix", *sys.argv[1:]])
    with sentences():
        if allow not in (None, "decoding"):
            raise ValueError(f"allow: expected decoding, got {allow!r}")
        from vlmfix.eval.pictures.data import Data
        from vlmfix.eval.run.workers import Workers
        from vlmfix.eval.tune.goal import Limits
        from vlmfix.eval.tune.page import write_page
        from vlmfix.eval.tune.tune import Budget
        from vlmfix.eval.tune.tune import tune as tune_model

        Budget.read(budget)
        pictures = Data.load(data, limit, None, images)
        workers = Workers.found()
        loaded, processor = load_model(model, dtype, device_map, quantize)
        first = workers.rank == 0
        with progress_bar() if first else nullcontext() as progress:
            try:
                tuned = tune_model(
                    loaded,
                    processor,
                    pictures,
                    bench=benchmark,
                    limits=Limits(recall, words, repetition, cost),
                    budget=budget,
                    seed=seed,
                    bakeable=bakeable,
                    decoding=allow == "decoding",
                    labels=labels,
                    output=folder,
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens,
                    template=template,
                    progress=progress,
                    say=tell if first else nothing,
                    workers=workers,
                    command=command,
                )
            except KeyboardInterrupt:
                raise fail(f"interrupted; answers are in {folder}. To go on: {command}", 130) from None
        if not first:
            return
        write_page(tuned, folder)
        if tuned.fix is not None:
            tuned.fix.save(output)
    if as_json:
        sys.stdout.write(json.dumps(tuned.to_json(), default=str) + "\n")
    else:
        show(tuned)
    err.print(f"what was tried: {folder / 'index.html'}", soft_wrap=True, markup=False)
    if tuned.fix is None:
        raise fail("no fix is better than the untouched model beyond chance; nothing is written", NOTHING_FOUND)
    err.print(f"written: {output}", soft_wrap=True, markup=False)
    err.print(f"next: vlmfix eval --model {model} --method none,{output} --controls", soft_wrap=True, markup=False)


def tell(line: str) -> None:
    """A line of progress."""
    err.print(line, soft_wrap=True, markup=False)


def nothing(line: str) -> None:
    """Other processes keep quiet."""


def show(tuned: Tuned) -> None:
    """Print what was confirmed."""
    goal = tuned.goal
    table = Table("", *goal.figures, "cost", "p")
    for column in table.columns[1:]:
        column.justify = "right"
    shown = [*tuned.finalists, *([tuned.control] if tuned.control else [])]
    for place, each in enumerate(shown):
        name = "winner" if place == 0 else "its control" if each is tuned.control else f"{place + 1}."
        p = "" if each.p_holm is None else f"{each.p_holm:.3f}"
        table.add_row(name, *(change(each, figure) for figure in goal.figures), f"x{each.verdict.cost:.2f}", p)
    out().print(table)
    for line in sentences_of(tuned):
        out().print(line, soft_wrap=True, markup=False)


def change(each: Confirmed, figure: str) -> Text:
    """A figure, and its difference to the untouched model with the interval."""
    difference = each.verdict.differences[figure]
    if difference.value is None:
        return Text("-")
    interval = f"[{difference.low:+.1f}, {difference.high:+.1f}]"
    return Text(f"{each.verdict.figures[figure]:.1f}\n{difference.value:+.1f} {interval}")


def sentences_of(tuned: Tuned) -> list[str]:
    """What came out, in words; shared with the page."""
    from vlmfix.eval.tune.page import in_words

    return in_words(tuned)
