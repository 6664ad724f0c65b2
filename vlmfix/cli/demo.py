"""`vlmfix demo`: compare in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmfix.cli.console import (
    ModelName,
    sentences,
)


def demo(
    model: ModelName = "tiny",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860.")] = None,
    server_name: Annotated[
        str, typer.Option(help="Address to serve on; 0.0.0.0 lets your whole network in.")
    ] = "127.0.0.1",
    share: Annotated[bool, typer.Option(help="Make a public link; whoever has it can use your machine.")] = False,
) -> None:
    """Compare methods in the browser."""
    with sentences():
        from vlmfix.demo.app import launch

        launch(model, host=server_name, port=port, share=share)
