"""`vlmfix heads`: rank attention heads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

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
    load_model,
    out,
    progress_bar,
    sentences,
)
from vlmfix.eval.tune.registry import TOOLS
from vlmfix.method.heads import HeadList

MOST_SHOWN = 20
"""Heads in the table; the file has all."""
COLUMNS = {"interval": "95 % interval", "control": "control", "chosen_by_vhr": "chosen by VHR, % of pictures"}
"""Facts about single heads that a tool may add to its list -> head of their column."""


def heads(
    tool: Annotated[
        str,
        typer.Option(help=f"{', '.join(TOOLS)}; with settings as in ablate:see=margin."),
    ] = "vhd",
    model: ModelName = "organism",
    data: Annotated[
        str,
        typer.Option(help="calibration, organism or photos (embedded), or a folder; never what results are judged by."),
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
    limit: Limit = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Rank attention heads on pictures, and write a head list for interventions (headgain:head_list=heads.json)."""
    with sentences():
        from vlmfix.eval.pictures.data import Data
        from vlmfix.eval.report.headmap import head_map
        from vlmfix.eval.tune.registry import find_tool
        from vlmfix.eval.tune.tool import rank

        chosen_tool, pictures = find_tool(tool), Data.load(data, limit)
        if (top, share, threshold, positive) == (None, None, None, False):
            share = 0.25
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            ranked = rank(chosen_tool, loaded, processor, pictures, batch_size=batch_size, progress=progress)
        head_list = ranked.select(top=top, share=share, threshold=threshold, positive=positive)
        head_list.save(output)
        if plot is not None:
            head_map(head_list, plot)
        if as_json:
            sys.stdout.write(json.dumps(head_list.to_json(), allow_nan=False) + "\n")
        else:
            show_heads(head_list)
        for path in filter(None, (output, plot)):
            err.print(f"written: {path}", soft_wrap=True, markup=False)


def show_heads(head_list: HeadList) -> None:
    """Print the best heads of a list."""
    extra, ranked, selected = head_list.extra, head_list.ranking(), set(head_list.selected)
    shown = [key for key in COLUMNS if extra.get(key) is not None]
    parts = extra.get("parts", {})
    title = Text(f"{head_list.tool} on {head_list.model}: {extra['score']}")
    headings = ["", "head", "score", *(COLUMNS[key] for key in shown), *parts, "selected"]
    table = Table(*headings, title=title, title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for place, (layer, head) in enumerate(ranked[:MOST_SHOWN], start=1):
        cells = [str(place), f"L{layer}H{head}", f"{head_list.score((layer, head)):.3g}"]
        cells += [head_fact(key, extra[key], layer, head) for key in shown]
        cells += [f"{means[layer][head]:.3g}" for means in parts.values()]
        cells.append("yes" if (layer, head) in selected else "")
        table.add_row(*map(Text, cells))
    out().print(table)
    out().print("; ".join(notes(head_list)) + ".", markup=False, soft_wrap=True)


def head_fact(key: str, values: Any, layer: int, head: int) -> str:
    """A cell of one of the `COLUMNS`."""
    if key == "interval":
        low, high = values
        return f"[{low[layer][head]:.3g}, {high[layer][head]:.3g}]"
    value = values[layer][head]
    return f"{100 * value:.0f}" if key == "chosen_by_vhr" else f"{value:.3g}"


def notes(head_list: HeadList) -> list[str]:
    """What the line below the table says of the whole list."""
    extra = head_list.extra
    lines = [f"{len(head_list.ranking())} heads, {len(head_list.selected)} selected; {head_list.direction}"]
    if extra.get("agreement") is not None:
        lines.append(f"rank correlation of the scores on two halves of the pictures: {extra['agreement']:.2f}")
    for key in ("pairs", "prompts"):
        if key in extra:
            lines.append(f"{key}: {extra[key]}")
    if "samples" in extra:
        lines.append(", ".join(f"{count} {group}" for group, count in extra["samples"].items()) + " objects")
    return lines
