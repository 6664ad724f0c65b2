"""`vlmfix bake`: a fixed model that needs no vlmfix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmfix.cli.console import DeviceMap, Dtype, err, load_model, out, sentences

NEXT = {
    "checkpoint": "next: vlmfix eval --model {folder}{dtype}   (or transformers, or vllm serve {folder})",
    "ia3": "next: vlmfix eval --model {folder}   (or PeftModel.from_pretrained(model, {folder!r}))",
    "lora": "next: vlmfix eval --model {folder}   (or vllm serve ... --enable-lora --lora-modules fixed={folder})",
    "json": "next: vlmfix eval --model {folder}",
}


def bake(
    model: Annotated[str, typer.Argument(help="organism or organism-qwen (embedded), a Hub id, or a folder.")],
    method: Annotated[
        str, typer.Option(help="Constant gains of heads: headgain:head_list=heads.json,gain=2, or a fix file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    format: Annotated[
        str, typer.Option(help="checkpoint (all weights), ia3 or lora (adapters of PEFT), or json (gains alone).")
    ] = "checkpoint",
    revision: Annotated[str | None, typer.Option(help="Of the model on the Hub.")] = None,
    check: Annotated[
        bool, typer.Option(help="Compare the result with the wrapped model, in a fresh process without vlmfix.")
    ] = True,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Fold constant head gains into the weights, or into an adapter: any engine then runs the fixed model."""
    with sentences():
        from vlmfix.carry.export import FORMATS, export

        if format not in FORMATS:
            raise ValueError(f"format: expected {', '.join(FORMATS)}, got {format!r}")
        loaded, processor = load_model(model, dtype, device_map, None, revision)
        done = export(loaded, processor, method, output, name=model, format=format, revision=revision, checked=check)
    size = f"{done.n_bytes / 1e3:.0f} KB" if done.n_bytes < 1e6 else f"{done.n_bytes / 1e6:.1f} MB"
    out().print(f"{done.folder}: {format}, {size}", soft_wrap=True, markup=False)
    out().print(f"heads: {', '.join(done.heads)}", soft_wrap=True, markup=False)
    out().print(f"check: {done.verdict or 'none'}", soft_wrap=True, markup=False)
    if not done.exact and format != "ia3":
        err.print(
            "note: gains that are no powers of two round each scaled weight once; 0.5, 2 and 4 are exact in every type",
            soft_wrap=True,
            markup=False,
        )
    err.print("note: prompts without a picture are changed, too; the wrapped model leaves them", soft_wrap=True)
    err.print(
        NEXT[format].format(folder=str(done.folder), dtype=f" --dtype {str(loaded.dtype)[6:]}"),
        soft_wrap=True,
        markup=False,
    )
