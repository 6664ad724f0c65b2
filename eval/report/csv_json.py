"""Comparisons as files for other programs. Shares are shares there, not percent. No torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vlmfix.eval.report import words
from vlmfix.eval.report.mistakes import Rates, by_position, confusion, object_rates
from vlmfix.eval.report.study import Entry, Study
from vlmfix.eval.report.tables import Cell, metric_cell

CSV_COLUMNS = (
    *("benchmark", "model", "data", "limit", "group", "method", "metric", "pictures", "value", "low", "high"),
    *("difference", "difference_low", "difference_high", "p", "p_holm", "real", "warnings"),
)


def to_csv(studies: Sequence[Study]) -> str:
    """One line a figure: benchmark, group, method, value and difference with intervals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for study in studies:
        for entry in study.entries:
            warnings = " ".join(words.warnings_of(study, entry))
            for metric in study.columns:
                figures = _numbers(metric_cell(study, entry, metric))
                writer.writerow([*_what(study, entry, metric), *figures, warnings])
    return text.getvalue()


def _what(study: Study, entry: Entry, metric: str) -> list[Any]:
    comparison = study.comparison
    asked = [comparison.title, comparison.model, comparison.data.name, comparison.data.limit]
    return [*asked, entry.row.group, entry.method, metric, entry.row.n]


def _numbers(cell: Cell) -> list[Any]:
    estimate, verdict = cell.estimate, cell.verdict
    figures = [None] * 3 if estimate is None else [estimate.value, estimate.low, estimate.high]
    if verdict is None:
        return [*figures, *[None] * 6]
    difference = verdict.difference
    return [*figures, difference.value, difference.low, difference.high, verdict.p, verdict.p_holm, verdict.real]


def to_json(studies: Sequence[Study]) -> str:
    """Everything that the page shows as figures, and where it came from."""
    return json.dumps([_as_json(study) for study in studies], indent=1) + "\n"


def _as_json(study: Study) -> dict[str, Any]:
    invented, missed = object_rates(study)
    return {
        **study.comparison.to_json(),
        "methods": study.names,
        "verdicts": [{**asdict(verdict), "real": verdict.real, "better": verdict.better} for verdict in study.verdicts],
        "against_controls": [asdict(selection) for selection in study.against_controls],
        "words": [*words.summary(study), words.resolution(study)],
        "flags": words.warnings(study),
        "truncation": _truncation(study),
        "invented_by_position": {
            name: [asdict(estimate) for estimate in by_position(captions)]
            for name, captions in zip(study.names, study.captions, strict=False)
        },
        "confusion": confusion(study),
        "objects_invented": _rates(invented),
        "objects_missed": _rates(missed),
    }


def _truncation(study: Study) -> dict[str, Any]:
    curve = [] if study.curve is None else [{"cut": cut, **figures} for cut, figures in study.curve.curve.items()]
    methods = {}
    for name, control in zip(study.names, study.controls, strict=True):
        if control is not None:
            verdict = study.cut_verdicts[name, "CHAIR_S"]
            methods[name] = {**asdict(control), "below_curve": verdict.real and verdict.better is True}
    return {"curve": curve, "methods": methods}


def _rates(rates: Rates) -> dict[str, list[dict[str, int]]]:
    return {name: [asdict(rate) for rate in of_runs] for name, of_runs in rates.items()}
