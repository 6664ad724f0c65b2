"""What all commands share: streams, options, errors, the model, the progress bar."""

from __future__ import annotations

import codecs
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

err = Console(stderr=True, highlight=False)
METHOD_HELP = (
    "Method: none, a name, or a name with settings (var:p=0.4,rho=0.8; lists as layers=1/18-31); join with + to "
    "combine. `vlmfix methods` lists them."
)
SPEED_HELP = "Accelerator to put beside each method: pyramiddrop. The untouched model stays, as the reference."
Speed = Annotated[str | None, typer.Option(help=SPEED_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first pictures; for trying out.")]
ModelName = Annotated[str, typer.Option("--model", help="organism or organism-qwen (embedded), a Hub id, or a folder.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's own.")]
DeviceMap = Annotated[str | None, typer.Option(help="Passed to from_pretrained, for instance auto.")]
VARIANT_HELP = "chair: rohrbach (default), opera, opera_approx, inflect, strict."
PARSER_HELP = "How answers are read: pope, strict, margin (the first token's probabilities), ..."
SIMILARITY_HELP = "amber_captions: off (default), or spacy:MODEL; the official one is spacy:en_core_web_lg."
Quantize = Annotated[str | None, typer.Option(help="8bit or 4bit; needs bitsandbytes.")]


SIGNS = {"−": "-", "–": "-", "—": "-", "‑": "-", "…": "...", "×": "x", "·": "*", "•": "*", "→": "->", "≈": "~"}
SIGNS |= {"≥": ">=", "≤": "<=", "±": "+-", "‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u202f": " "}
"""What stands for a sign where the output's encoding lacks it."""


def print_in_any_encoding() -> None:
    """Let standard output and error print every text, whatever their encoding: signs that it lacks become plain ones,
    other characters escapes as in JSON. Without this, a minus ends a command on a stream that is not UTF-8."""
    codecs.register_error("vlmfix.signs", _plain_signs)
    sys.stdout = sys.stdout or io.StringIO()  # closed by whoever started us
    sys.stderr = sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="vlmfix.signs")


def _plain_signs(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(SIGNS.get(sign) or _escaped(sign) for sign in lacking), error.end


def _escaped(character: str) -> str:
    """`\\u732b`; two of these for characters beyond the first 65,536."""
    code = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{code[start : start + 4]}" for start in range(0, len(code), 4))


def out() -> Console:
    """Standard output; wide where it is no terminal, so that tables do not break."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=240)


def fail(message: str, code: int = 1) -> typer.Exit:
    """One line on stderr and a non-zero exit code."""
    err.print(f"vlmfix: {' '.join(message.split())}", markup=False, soft_wrap=True)
    return typer.Exit(code)


@contextmanager
def sentences() -> Iterator[None]:
    """The user's mistakes end in one line, never in a traceback; warnings are one line each."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            err.print(f"note: {message}", markup=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        try:
            yield
        except (ValueError, TypeError) as error:
            raise fail(str(error)) from error


def quiet_libraries() -> None:
    """Leave out what transformers and httpx would say besides."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    logging.getLogger("httpx").setLevel(logging.WARNING)


def load_model(
    name: str, dtype: str | None, device_map: str | None, quantize: str | None, revision: str | None = None
) -> tuple[Any, Any]:
    """`vlmfix.load` with the command line's options."""
    import vlmfix
    from vlmfix.model.loading import load_options

    quiet_libraries()
    options = load_options(dtype, device_map, quantize)
    return vlmfix.load(name, **options, **({} if revision is None else {"revision": revision}))


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar on stderr in a terminal; plain lines otherwise."""
    if not err.is_terminal:
        from vlmfix.eval.run.progress import PlainProgress

        yield PlainProgress()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class RateColumn(ProgressColumn):
        """Answers a second."""

        def render(self, task: Task) -> Text:
            """`3.2/s`."""
            return Text("" if task.finished or not task.speed else f"{task.speed:.1f}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        RateColumn(),
        TextColumn("{task.fields[figure]}"),
    )
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def tell(label: str, done: int, total: int, figure: str = "") -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total, completed=done, figure=figure)
            bars.update(tasks[label], completed=done, figure=figure)

        yield tell
