"""`vlmfix describe`: what is found on a model, before anything is changed."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from vlmfix.cli.console import METHOD_HELP, DeviceMap, Dtype, Json, Quantize, fail, load_model, sentences

WIDTH = 80


def describe(
    model: Annotated[
        str, typer.Argument(help="organism or organism-qwen (embedded), a folder, or a Hub id at hand.")
    ] = ("organism"),
    method: Annotated[
        str | None,
        typer.Option(help=METHOD_HELP + " Looked at together, before anything comes on. Default: each by itself."),
    ] = None,
    picture: Annotated[list[str] | None, typer.Option(help="Picture; give it several times for several.")] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """What is found on a model, which methods can run on it, and what they would do and cost. Downloads nothing."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    with sentences():
        from vlmfix.eval.tune.describe import describe as describe_model
        from vlmfix.method.registry import parse

        methods = None if method is None else parse(method)
        loaded, processor = load_model(model, dtype, device_map, quantize)
        found = describe_model(loaded, processor, methods, pictures=picture)
    if as_json:
        sys.stdout.write(json.dumps(found.to_json()) + "\n")
    else:
        sys.stdout.write(found.text(WIDTH) + "\n")
    if found.conflict:
        raise fail(found.conflict)
