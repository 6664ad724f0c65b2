"""A method and a model in, a folder out that needs no vlmfix: written beside its place, checked, then moved there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.asking.asker import Asked, Asker
from vlmfix.carry.adapter import save_ia3, save_lora
from vlmfix.carry.bake import gains_in_force
from vlmfix.carry.card import card
from vlmfix.carry.check import Verdict, check, expected_of
from vlmfix.carry.checkpoint import checkpoint_folder, write_checkpoint
from vlmfix.eval.pictures.data import Data
from vlmfix.model import gains as head_gains
from vlmfix.model.loading import EMBEDDED

FORMATS = ("checkpoint", "ia3", "lora", "json")
N_QUESTIONS = 10
PROMPT = "Please describe this image in detail."


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    n_bytes: int
    heads: list[str]
    """`L3H1 x2`, in the order of layers."""
    exact: bool
    """Whether all gains are powers of two, which no type of number rounds."""
    verdict: Verdict | None
    """`None`: not checked."""


def export(
    model: Any,
    processor: Any,
    methods: str,
    output: str | Path,
    *,
    name: str,
    format: str = "checkpoint",
    revision: str | None = None,
    questions: Sequence[Asked] | None = None,
    checked: bool = True,
) -> Exported:
    """Write a model with methods of constant head gains into a folder, in one of `FORMATS`.

    Args:
        model: As `vlmfix.load` gave it, with nothing in force.
        processor: Its own.
        methods: As for `vlmfix.wrap`, as text.
        output: A folder that does not exist yet, or is empty.
        name: What the model was loaded from: its files are read again.
        format: `checkpoint`: the model's files with scaled weights; `ia3`, `lora`: an adapter of PEFT; `json`: the
            gains alone.
        revision: Of the model on the Hub.
        questions: To check with; ten embedded pictures unless given.
        checked: Whether to compare the result, in a fresh process without vlmfix, with the wrapped model.

    Raises:
        ValueError: the method, the model's weights or its files do not allow it, or what came out is not the wrapped
            model; then nothing is left at `output`.
    """
    target = Path(output)
    if format not in FORMATS:
        raise ValueError(f"format: expected {', '.join(FORMATS)}, got {format!r}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already; give the name of a new folder")
    asker = Asker(model, processor, methods)
    with asker.applied():
        from vlmfix.engine.attachment import attached

        attachment = attached(model)
        if attachment is None:
            raise ValueError(f"method {methods!r} leaves the model as it is, so there is nothing to bake")
        gains = gains_in_force(attachment)
    head_gains.check_fit(gains, attachment.anatomy)
    source = checkpoint_folder(name, revision)
    expected = expected_of(asker, _questions(name) if questions is None else questions) if checked else None

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        base = str(source) if name in EMBEDDED else name
        about = {"model": name, "revision": revision, "method": asker.methods, "dtype": str(model.dtype).split(".")[-1]}
        head_gains.save_gains(model, gains, partial / head_gains.FILE, {**about, "base": base})
        if format == "checkpoint":
            write_checkpoint(model, gains, source, partial)
        elif format == "ia3":
            save_ia3(model, gains, partial, base)
        elif format == "lora":
            save_lora(model, gains, partial, base)
        verdict = None
        if expected is not None:
            verdict = check(format, source, partial, expected, model.dtype, model.device)
            if not verdict.passed:
                raise ValueError(f"what was written is not the wrapped model: {verdict}; it was not kept")
        heads = [
            f"L{layer}H{head} x{gain:g}"
            for layer in sorted(gains)
            for head, gain in enumerate(gains[layer])
            if gain != 1
        ]
        factors = {gain for per_head in gains.values() for gain in per_head}
        text = card(name, methods, asker.methods, heads, format, verdict, _evidence(methods))
        (partial / "README.md").write_text(text, encoding="utf-8")
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    n_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Exported(target, n_bytes, heads, all(_is_power_of_two(gain) for gain in factors), verdict)


def _questions(name: str) -> list[Asked]:
    """Ten pictures of the kind that a model knows, which nothing is judged by."""
    data = Data.load("calibration" if name in EMBEDDED else "photos", N_QUESTIONS)
    return [(path, PROMPT) for path in data.images.values()]


def _evidence(methods: str) -> dict[str, Any]:
    """What a fix file says of how it was chosen."""
    try:
        return dict(json.loads(Path(methods).read_text(encoding="utf-8")).get("evidence") or {})
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _is_power_of_two(gain: float) -> bool:
    mantissa, _ = float(gain).as_integer_ratio()
    return mantissa > 0 and mantissa & (mantissa - 1) == 0
