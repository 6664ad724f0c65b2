"""`vlmfix demo`: compare in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmfix.cli.console import DeviceMap, Dtype, ModelName, Quantize, load_model, sentences


def demo(
    model: ModelName = "organism",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860.")] = None,
    server_name: Annotated[
        str, typer.Option(help="Address to serve on; 0.0.0.0 lets your whole network in.")
    ] = "127.0.0.1",
    share: Annotated[bool, typer.Option(help="Make a public link; whoever has it can use your machine.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder of runs of `vlmfix eval`, which visitors can read.")] = Path(
        "runs"
    ),
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
) -> None:
    """Compare methods in the browser."""
    with sentences():
        from vlmfix.demo.app import launch
        from vlmfix.demo.studio import Studio

        studio = Studio(*load_model(model, dtype, device_map, quantize))
        launch(studio, runs, host=server_name, port=port, share=share)
