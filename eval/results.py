"""Finished answers on disk: run folders, and the comparison made from them. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmfix.eval import stats
from vlmfix.eval.benchmarks import Benchmark, Group, benchmark
from vlmfix.eval.data import Data

HEADER, RECORDS = "run.json", "records.jsonl"


class BrokenFile(ValueError):
    """A file of answers with a line that is no record."""


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Records of a file, and the number of bytes up to the end of the last whole line.

    A last line that was cut off in writing is not read. Raises `BrokenFile` for a broken line elsewhere.
    """
    whole = 0
    found: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
            if not (
                isinstance(record, dict) and isinstance(record.get("id"), str) and isinstance(record.get("text"), str)
            ):
                raise ValueError("it lacks id or text")
            if not line.endswith(b"\n"):
                raise ValueError("no end of line")
        except ValueError as error:
            if line.endswith(b"\n"):
                raise BrokenFile(
                    f"{path}, line {number}, is no record ({error}); delete the line and run the command again"
                ) from error
            return found, whole
        found.append(record)
        whole += len(line)
    return found, whole


@dataclass(frozen=True)
class Run:
    """One method on one benchmark, as found on disk."""

    folder: Path
    header: dict[str, Any]
    records: list[dict[str, Any]]

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """A run folder, or the `records.jsonl` in one. `ValueError` names what is missing or cut off."""
        path = Path(path)
        folder = path.parent if path.name == RECORDS else path
        for needed in (folder / HEADER, folder / RECORDS):
            if not needed.is_file():
                raise ValueError(
                    f"{needed} does not exist; expected a run folder of `vlmfix eval`, with {HEADER} and {RECORDS}"
                )
        try:
            header = json.loads((folder / HEADER).read_text("utf-8"))
            header["identity"]["benchmark"], header["identity"]["data"], header["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / HEADER} is no header of a run ({type(error).__name__}: {error})") from error
        records, whole = read_lines(folder / RECORDS)
        run = cls(folder, header, records)
        if whole < os.path.getsize(folder / RECORDS):
            raise BrokenFile(
                f"{folder / RECORDS} ends in a line that was cut off; {len(records)} answers before it are whole: run "
                f"`{run.command}` again to finish it, or delete the last line"
            )
        return run

    @property
    def label(self) -> str:
        """The method, as it was asked for."""
        return self.header["label"]

    @property
    def command(self) -> str:
        """The command that resumes it."""
        return self.header.get("environment", {}).get("command", "vlmfix eval")

    @property
    def untouched(self) -> bool:
        """Whether this is the model without any intervention."""
        return not self.header["identity"]["method"]


@dataclass(frozen=True)
class Row:
    """One method and one group of answers in a comparison."""

    method: str
    group: str
    n: int
    """Pictures."""
    estimates: dict[str, stats.Estimate]
    differences: dict[str, stats.Difference] | None
    """To the untouched model on the same pictures; `None` for that model itself, and without one."""


@dataclass(frozen=True)
class Comparison:
    """Several methods on one benchmark, model and set of pictures."""

    benchmark: Benchmark
    model: str
    rows: list[Row]
    notes: list[str]
    runs: list[Run]

    def to_json(self) -> dict[str, Any]:
        """Everything that the table shows, and where it came from."""
        return {
            "benchmark": self.benchmark.name,
            "scoring": self.benchmark.scoring,
            "model": self.model,
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
            "runs": [{"folder": str(run.folder), **run.header} for run in self.runs],
        }


def compare(
    runs: Sequence[Run], n_resamples: int = stats.RESAMPLES, scoring: Mapping[str, str] | None = None
) -> list[Comparison]:
    """Score runs, and compare each with the untouched model where that is among them; one comparison a benchmark.

    `scoring` names another way to judge the answers: `{"chair": "strict", "pope": "negword"}`.
    """
    kinds: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        identity = run.header["identity"]
        kinds.setdefault((identity["benchmark"], identity["model"], identity["data_digest"]), []).append(run)
    return [_compare(group, n_resamples, scoring or {}) for group in kinds.values()]


def _compare(runs: list[Run], n_resamples: int, scoring: Mapping[str, str]) -> Comparison:
    identity = runs[0].header["identity"]
    bench = benchmark(identity["benchmark"], scoring.get(identity["benchmark"]))
    data = Data.load(identity["data"], identity["limit"])
    if data.digest != identity["data_digest"]:
        raise ValueError(f"the annotations in {data.folder} are not those that {runs[0].folder} was asked with")
    n_items = len(bench.items(data))
    scored = {run.folder: bench.score(data, {r["id"]: r["text"] for r in run.records}) for run in runs}
    base = next((scored[run.folder] for run in runs if run.untouched), None)
    rows, notes = [], []
    if identity["limit"]:
        notes.append(f"testing only: the first {identity['limit']} pictures")
    for run in runs:
        for i, group in enumerate(scored[run.folder]):
            reference = None if base is None or run.untouched else base[i]
            rows.append(_row(bench, run.label, group, reference, n_resamples))
        notes += _notes(run, n_items)
    return Comparison(bench, identity["model"], rows, notes, runs)


def _row(bench: Benchmark, label: str, group: Group, base: Group | None, n_resamples: int) -> Row:
    found = stats.estimates(group.counts, bench.metrics, n_resamples)
    apart = None
    if base is not None:
        apart = stats.differences(group.counts, group.images, base.counts, base.images, bench.metrics, n_resamples)
    return Row(label, group.name, len(set(group.images)), found, apart)


def _notes(run: Run, n_items: int) -> list[str]:
    notes = []
    if len(run.records) < n_items:
        notes.append(f"{run.label}: {len(run.records)} of {n_items} answers so far; `{run.command}` finishes it")
    cut = sum(r.get("finish") == "length" for r in run.records)
    if cut and run.header["identity"]["benchmark"] == "chair":
        budget = run.header["identity"]["max_new_tokens"]
        notes.append(f"{run.label}: {cut} of {len(run.records)} answers were cut at {budget} tokens")
    for i, method in enumerate(run.header["identity"]["method"]):
        idle = method["facts"].get("idle")
        acted = sum(bool(r["did"][i]["acted"]) for r in run.records if len(r.get("did", [])) > i)
        if idle:
            notes.append(f"{run.label}: {method['name']} did not act on this model, {idle}")
        elif acted < len(run.records):
            notes.append(f"{run.label}: {method['name']} acted on {acted} of {len(run.records)} answers")
    return notes
