"""`vlmfix ask`: one picture, one prompt, answers side by side."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmfix.cli.console import (
    METHOD_HELP,
    DeviceMap,
    Dtype,
    Json,
    ModelName,
    Quantize,
    Speed,
    err,
    load_model,
    sentences,
)

EMBEDDED = ("organism", "organism-qwen")
SCENES = ((120, 120),)
"""Sizes of the pictures that these models were trained on."""
DRAWN_ONLY = (
    "note: {model} knows drawn scenes only (assets/organism/test/images); what it says of other pictures means "
    "nothing. For photos give --model, such as llava-hf/llava-1.5-7b-hf"
)


def ask(
    image: Annotated[str, typer.Argument(help="Picture.")],
    prompt: Annotated[str | None, typer.Argument(help="What to ask.")] = None,
    model: ModelName = "organism",
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
        from vlmfix.method.registry import parse, spec_of, split_methods, with_accelerator

        if prompt is None:
            from vlmfix.asking.pictures import picture_name

            name = picture_name(image)
            raise ValueError(f"expected a picture and a prompt (vlmfix ask PICTURE PROMPT), got only {name!r}")
        specs: list[str] = []
        for text in method or ["none,vhr"]:
            specs += split_methods(text)
        parsed = with_accelerator([parse(spec) for spec in specs], speed)
        specs = specs if speed is None else [spec_of(interventions) for interventions in parsed]
        from vlmfix.asking.asker import Asker
        from vlmfix.asking.pictures import open_picture

        picture = open_picture(image)  # before the model is loaded, which may take minutes
        if model in EMBEDDED and picture.size not in SCENES:
            err.print(DRAWN_ONLY.format(model=model), soft_wrap=True, markup=False)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        records = []
        for interventions in parsed:
            asker = Asker(loaded, processor, interventions)
            records.append(asker.ask(image, prompt, max_new_tokens=max_new_tokens))
    if as_json:
        for record in records:
            sys.stdout.write(json.dumps(asdict(record)) + "\n")
        return
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=60 * len(records))
    table = Table(
        title=Text(f"{prompt}  ({Path(records[0].image[0]).name}, {model})"), title_justify="left", show_lines=True
    )
    for spec in specs:
        table.add_column(Text(spec), overflow="fold", ratio=1)
    table.add_row(*(Text(record.text) for record in records))
    table.add_row(*(f"{len(r.token_ids)} tokens, {r.seconds:.2f} s" for r in records), style="dim")
    console.print(table)
