"""`vlmfix calibrate`: a method's heads and settings, chosen on labelled pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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

if TYPE_CHECKING:
    from vlmfix.eval.tune.zerotuning import Tuned
    from vlmfix.hooks.parts.attention_to_answer import Statistics
    from vlmfix.method.intervention import Intervention

Calibrated = TypeVar("Calibrated", bound="Intervention")


def parse_one(spec: str, expected: type[Calibrated]) -> Calibrated:
    """The one intervention of a spec, which must be of this class: it is what a command calibrates."""
    from vlmfix.method.registry import parse

    interventions = parse(spec)
    if len(interventions) != 1 or type(interventions[0]) is not expected:
        raise ValueError(f"method: expected {expected.name} with its settings, got {spec!r}")
    return interventions[0]


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

        monitor = parse_one(method, Lookback)
        from vlmfix.eval.pictures.data import Data
        from vlmfix.eval.tune import lookback

        fit_on, test_on = Data.load(data, limit), Data.load(test, limit)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            detector = lookback.calibrate_lookback(
                loaded,
                processor,
                monitor,
                fit_on,
                test_on,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
        detector.write(output)
    if as_json:
        sys.stdout.write(json.dumps(detector.auroc) + "\n")
    else:
        show_detector(detector.auroc)
    err.print(f"detector: {output}", soft_wrap=True, markup=False)


def show_detector(auroc: dict[str, Any]) -> None:
    """Print how well a detector tells words apart."""
    title = "{data}: {invented} of {words} words invented".format(**auroc)
    table = Table("score", "AUROC", title=title)
    for name, figure in auroc.items():
        if isinstance(figure, dict):  # the others are counts
            sign = "+" if " - " in name else ""
            low, high = f"{figure['low']:{sign}.3f}", f"{figure['high']:{sign}.3f}"
            table.add_row(name, f"{figure['value']:{sign}.3f} [{low}, {high}]")
    out().print(table)


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

        settings = parse_one(method, ACT)
        from vlmfix.eval.pictures.data import Data
        from vlmfix.eval.tune import act

        pictures = Data.load(data, limit)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            ranked = act.calibrate_act(loaded, processor, settings, pictures, batch_size=batch_size, progress=progress)
        all_with_a_gain = (top, share, threshold) == (None, None, None)
        head_list = ranked.select(top=top, share=share, threshold=threshold, positive=all_with_a_gain)
        head_list.save(output)
    if as_json:
        sys.stdout.write(json.dumps(head_list.to_json(), allow_nan=False) + "\n")
    else:
        show_heads(head_list)
    err.print(f"written: {output}", soft_wrap=True, markup=False)


def calibrate_adaiat(
    model: ModelName = "organism",
    data: Annotated[str, typer.Option(help="Pictures to caption, as --data of vlmfix eval.")] = "calibration",
    output: Annotated[Path, typer.Option("--output", "-o", help="The file for adaiat:statistics=FILE.")] = Path(
        "adaiat.json"
    ),
    match: Annotated[
        str, typer.Option(help="none (the paper), or position: real and invented objects at the same places.")
    ] = "none",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Of each caption.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Limit = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Measure how much each head attends to the answer so far as real and invented objects are named."""
    with sentences():
        from vlmfix.eval.pictures.data import Data
        from vlmfix.eval.tune import adaiat

        pictures = Data.load(data, limit)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            statistics = adaiat.calibrate_adaiat(
                loaded,
                processor,
                pictures,
                match=match,  # type: ignore[arg-type]  # checked there
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=progress,
            )
        statistics.write(output)
    if as_json:
        sys.stdout.write(output.read_text("utf-8"))
    else:
        show_statistics(statistics)
    err.print(f"written: {output}", soft_wrap=True, markup=False)
    err.print(f"to use it: adaiat:statistics={output}", soft_wrap=True, markup=False)


def show_statistics(statistics: Statistics) -> None:
    """Print AdaIAT's statistics by layer."""
    counts = f"{statistics.n_real} real and {statistics.n_invented} invented objects"
    table = Table("layer", "P, real", "N, invented", "P/N", title=f"{counts}; sums over heads", title_justify="left")
    for column in table.columns:
        column.justify = "right"
    for layer, (real, invented) in enumerate(zip(statistics.real, statistics.invented, strict=True)):
        p, n = sum(real), sum(invented)
        table.add_row(str(layer), f"{p:.3f}", f"{n:.3f}", f"{p / n:.2f}" if n else "")
    out().print(table)


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

        settings = parse_one(method, ZeroTuning)
        from vlmfix.eval.pictures.data import Data
        from vlmfix.eval.tune import zerotuning

        pictures = Data.load(data, limit)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        with progress_bar() as progress:
            tuned = zerotuning.calibrate_zerotuning(
                loaded,
                processor,
                settings,
                pictures,
                by=by,  # type: ignore[arg-type]  # checked there
                share=share,
                probe=probe,
                batch_size=batch_size,
                progress=progress,
            )
        tuned.heads.save(output)
    if as_json:
        sys.stdout.write(json.dumps(tuned.heads.to_json(), allow_nan=False) + "\n")
    else:
        show_tuned(tuned, by)
    err.print(f"written: {output}", soft_wrap=True, markup=False)
    err.print(f"to use it: zerotuning:gamma={tuned.best.gamma:g},head_list={output}", soft_wrap=True, markup=False)


def show_tuned(tuned: Tuned, by: str) -> None:
    """Print ZeroTuning's search."""
    table = Table("heads", "gamma", "accuracy %", "yes or no %", "yes %", "entropy, nats", "best")
    for trial in tuned.trials:
        shares = [f"{100 * share:.1f}" for share in (trial.accuracy, trial.parsed, trial.yes)]
        mark = f"by {by}" if trial is tuned.best else ""
        table.add_row(trial.heads, f"{trial.gamma:g}", *shares, f"{trial.entropy:.3f}", mark)
    out().print(table)
    numbers = sorted({head for _, head in tuned.listed})
    out().print(
        f"{tuned.up} head numbers want more for the first token, {tuned.down} less; listed: "
        f"{', '.join(map(str, numbers))}. Present and absent objects weigh the same.",
        markup=False,
        soft_wrap=True,
    )
    if tuned.best.gamma == 1:
        out().print("No gamma does better than the untouched model.", markup=False)
