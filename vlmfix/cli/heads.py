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


def heads(
    tool: Annotated[
        str,
        typer.Option(help="vhd, ablate, subspace, visual, separate or random, with settings as in ablate:see=margin."),
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
        from vlmfix.eval.tune import ranking

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
