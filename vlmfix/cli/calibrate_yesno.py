"""`vlmfix calibrate yesno`: when to believe a yes, from finished runs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vlmfix.cli.console import Json, err, out, sentences

if TYPE_CHECKING:
    from vlmfix.eval.tune.yesno import Calibration, Measured


def calibrate_yesno(
    run: Annotated[Path, typer.Argument(help="Run of yes/no questions on calibration pictures, to fit on.")],
    test: Annotated[Path, typer.Argument(help="Run of the same method on other pictures, for the figures.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write temperature and threshold here.")] = None,
    as_json: Json = False,
) -> None:
    """Choose temperature and threshold for the first token's probabilities; tell calibration error, accuracy of the
    surest answers, and how figures depend on the reading. No model is asked: `vlmfix eval` has kept what is needed."""
    with sentences():
        from vlmfix.eval.run.results import Run
        from vlmfix.eval.tune.yesno import answers_of, fit, measure

        fit_on, test_on = Run.read(run), Run.read(test)
        if fit_on.header["identity"]["data_digest"] == test_on.header["identity"]["data_digest"]:
            raise ValueError("both runs are about the same pictures; fit on others than those of the figures")
        calibration = fit(answers_of(fit_on))
        measured = measure(calibration, answers_of(test_on), test_on)
    settings = {"temperature": calibration.temperature, "threshold": calibration.threshold}
    if output is not None:
        output.write_text(json.dumps(settings) + "\n", "utf-8")
        err.print(f"written: {output}", soft_wrap=True, markup=False)
    if as_json:
        sys.stdout.write(json.dumps({**settings, "fitted_on": calibration.questions, **asdict(measured)}) + "\n")
    else:
        show(calibration, measured)


def show(calibration: Calibration, measured: Measured) -> None:
    """Print what a calibration does."""
    from vlmfix.eval.report.figures import figure, number

    out().print(
        f"P(yes) = sigmoid((margin − {calibration.threshold:.3g}) / {calibration.temperature:.3g}), fitted on "
        f"{calibration.questions} questions; figures on {measured.questions} others, {measured.pictures} pictures.",
        markup=False,
        soft_wrap=True,
    )
    table = Table("", "as it is", "calibrated", "difference")
    for name, before in measured.before.items():
        change = figure(measured.differences[name], 100, signed=True)
        table.add_row(f"{name} %", figure(before, 100), figure(measured.after[name], 100), change)
    before_error, after_error = measured.ece
    table.add_row("calibration error %", number(before_error, 100), number(after_error, 100), "")
    out().print(table)
    surest = ", ".join(f"{share:.0%}: {number(accuracy, 100)}" for share, accuracy in measured.coverage.items())
    out().print(f"Accuracy % on the surest share of the questions: {surest}.", markup=False, soft_wrap=True)
    readings = ", ".join(f"{name} {number(value, 100)}" for name, value in measured.text_f1.items())
    elsewhere = number(measured.elsewhere, 100)
    out().print(
        f"Audit: F1 % by {readings}; {elsewhere} % of the first tokens are more likely neither yes nor no.",
        markup=False,
        soft_wrap=True,
    )
