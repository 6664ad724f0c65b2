"""`vlmfix calibrate`: a method's heads and settings, chosen on labelled pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

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
from vlmfix.cli.heads import show_heads


def only(spec: str, kind: type) -> Any:
    """The one intervention of a spec, which must be of this class: it is what a command calibrates."""
    from vlmfix.method.registry import parse

    found = parse(spec)
    if len(found) != 1 or type(found[0]) is not kind:
        raise ValueError(f"method: expected {kind.name} with its settings, got {spec!r}")  # type: ignore[attr-defined]
    return found[0]


def calibrate_lookback(
    output: Annotated[Path, typer.Option(help="The detector: a JSON file for lookback:detector=FILE.")] = Path(
        "lookback.json"
    ),
    model: ModelName = "organism",
    method: Annotated[str, typer.Option(help="The monitor with its settings, such as lookback:preset=focus.")] = (
        "lookback"
    ),
    data: Annotated[str, typer.Option(help="Pictures to fit on, as --data of vlmfix eval.")] = "calibration",
    test: Annotated[
        str, typer.Option(help="Pictures for the figures; the same as --data: a third of it is held out.")
    ] = "organism",
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

        monitor = only(method, Lookback)
        from vlmfix.eval.pictures.data import Data
        from vlmfix.eval.tune import lookback

        pictures = [Data.load(name, limit) for name in (data, test)]
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            found = lookback.calibrate(
                loaded, processor, monitor, *pictures,
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


def calibrate_act(
    method: Annotated[str, typer.Option(help="ACT with its settings, such as act:beta=0.2,min_rows=8.")] = "act",
    model: ModelName = "organism",
    data: Annotated[str, typer.Option(help="Annotated pictures, as --data of vlmfix eval.")] = "calibration",
    output: Annotated[Path, typer.Option("--output", "-o", help="The head list, for act:head_list=FILE.")] = Path(
        "act.json"
    ),
    top: Annotated[int | None, typer.Option(help="Select so many heads.")] = None,
    share: Annotated[float | None, typer.Option(help="Select this share of the heads tried.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Select heads with a score of at least this.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Limit = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Find the heads in which ACT helps to answer yes/no questions, one at a time; by default all with a gain."""
    with sentences():
        from vlmfix.hooks import ACT

        asked = only(method, ACT)
        from vlmfix.eval.pictures.data import Data
        from vlmfix.eval.tune import calibration

        choice: dict[str, Any] = {"top": top, "share": share, "threshold": threshold}
        if all(value is None for value in choice.values()):
            choice["positive"] = True
        pictures = Data.load(data, limit)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            found = calibration.calibrate_act(loaded, processor, asked, pictures, batch_size=batch_size, tell=progress)
        found = found.select(**choice)
        found.save(output)
    if as_json:
        sys.stdout.write(json.dumps(found.to_json(), allow_nan=False) + "\n")
    else:
        show_heads(found)
    err.print(f"written: {output}", soft_wrap=True, markup=False)


def calibrate_zerotuning(
    method: Annotated[str, typer.Option(help="ZeroTuning with its settings, such as zerotuning:span=image.")] = (
        "zerotuning"
    ),
    by: Annotated[
        str, typer.Option(help="accuracy (labelled answers) or entropy (no labels: how sure the model is).")
    ] = "accuracy",
    model: ModelName = "organism",
    data: Annotated[str, typer.Option(help="Annotated pictures, as --data of vlmfix eval.")] = "calibration",
    output: Annotated[Path, typer.Option("--output", "-o", help="The head list, for zerotuning:head_list=FILE.")] = (
        Path("zerotuning.json")
    ),
    share: Annotated[float, typer.Option(help="Share of the heads of the more frequent kind that is listed.")] = 0.4,
    probe: Annotated[float, typer.Option(help="Gamma that tells the kinds of heads apart.")] = 2.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Limit = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Choose ZeroTuning's heads and gamma by yes/no questions."""
    with sentences():
        from vlmfix.hooks import ZeroTuning

        asked = only(method, ZeroTuning)
        from vlmfix.eval.pictures.data import Data
        from vlmfix.eval.tune import calibration

        pictures = Data.load(data, limit)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            tuned = calibration.calibrate_zerotuning(
                loaded, processor, asked, pictures,
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
