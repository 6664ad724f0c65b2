"""The command line, a file per command. Each loads only what it needs: `vlmfix --help` and `vlmfix methods` import no
torch."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from vlmfix.cli.ask import ask
from vlmfix.cli.bake import bake
from vlmfix.cli.bench import bench
from vlmfix.cli.calibrate import calibrate_act, calibrate_adaiat, calibrate_lookback, calibrate_zerotuning
from vlmfix.cli.calibrate_yesno import calibrate_yesno
from vlmfix.cli.console import fail, out, print_in_any_encoding
from vlmfix.cli.demo import demo
from vlmfix.cli.describe import describe
from vlmfix.cli.evaluate import evaluate
from vlmfix.cli.heads import heads
from vlmfix.cli.lists import methods, models, protocols
from vlmfix.cli.score import report, score
from vlmfix.cli.serve import serve
from vlmfix.cli.tune import tune

app = typer.Typer(
    name="vlmfix",
    help="Make vision-language models say what is in the picture: training-free attention interventions, measured "
    "honestly.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
calibrate = typer.Typer(
    help="Choose a method's heads and settings on labelled pictures that no result is reported on.",
    no_args_is_help=True,
)


BEGIN = """\
vlmfix: vision-language models that say what is in the picture; no training.
  vlmfix eval                          what methods do, on an embedded model
  vlmfix ask PICTURE "What is there?"  one question, untouched and with a method
  vlmfix demo                          the same side by side, in a browser
All commands: vlmfix --help. All methods: vlmfix methods.
"""
"""What is printed where nothing is asked for."""


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Options of the program itself."""
    if context.invoked_subcommand is None and not version:
        sys.stdout.write(BEGIN)
        raise typer.Exit()
    if version:
        import vlmfix

        out().print(f"vlmfix {vlmfix.__version__}")
        raise typer.Exit()


COMMANDS: dict[str, Callable[..., None]] = {
    "ask": ask,
    "describe": describe,
    "eval": evaluate,
    "score": score,
    "report": report,
    "tune": tune,
    "heads": heads,
    "bench": bench,
    "bake": bake,
    "methods": methods,
    "protocols": protocols,
    "models": models,
    "demo": demo,
    "serve": serve,
}
CALIBRATE: dict[str, Callable[..., None]] = {
    "lookback": calibrate_lookback,
    "act": calibrate_act,
    "zerotuning": calibrate_zerotuning,
    "adaiat": calibrate_adaiat,
    "yesno": calibrate_yesno,
}
for program, commands in ((app, COMMANDS), (calibrate, CALIBRATE)):
    for name, command in commands.items():
        program.command(name=name)(command)
app.add_typer(calibrate, name="calibrate")


def main() -> None:
    """Entry point."""
    print_in_any_encoding()
    try:
        app(prog_name="vlmfix")
    except OSError as error:
        if error.filename is not None:  # somebody's file: a fault of ours, to be seen whole
            raise
        fail(f"the output cannot be written: {error.strerror or error}")
        sys.stdout = io.StringIO()  # the interpreter would try again
        sys.exit(1)
