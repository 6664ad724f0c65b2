"""Finished answers on disk: run folders, and the comparison made from them. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmfix.eval.benchmarks.benchmark import Benchmark, Group, Item, benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run.protocols import Protocol, Published, find_protocol, published
from vlmfix.eval.scorers import stats, yesno
from vlmfix.eval.scorers.truncation import RESAMPLES, Against, CutCaptions, TruncationControl

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
        header = cls.read_header(folder)
        records, whole = read_lines(folder / RECORDS)
        run = cls(folder, header, records)
        if whole < os.path.getsize(folder / RECORDS):
            raise BrokenFile(
                f"{folder / RECORDS} ends in a line that was cut off; {len(records)} answers before it are whole: run "
                f"`{run.command}` again to finish it, or delete the last line"
            )
        return run

    @staticmethod
    def read_header(folder: Path) -> dict[str, Any]:
        """What a run was asked, and where. `ValueError` if the file is broken."""
        try:
            header = json.loads((folder / HEADER).read_text("utf-8"))
            header["identity"]["benchmark"], header["identity"]["data"], header["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / HEADER} is no header of a run ({type(error).__name__}: {error})") from error
        return header

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
    estimates: Mapping[str, stats.Estimate]
    differences: Mapping[str, stats.Difference] | None
    """To the untouched model on the same pictures; `None` for that model itself, and without one."""
    unparsed: int = 0
    """Answers that say neither yes nor no to the parser."""
    control: TruncationControl | None = None
    """Captions against the untouched model's, cut to the same recall; `None` for that model, and for answers."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several methods on one benchmark, model and set of pictures."""

    benchmark: Benchmark
    model: str
    rows: list[Row]
    notes: list[str]
    runs: list[Run]
    groups: list[list[Group]]
    """Of each run: its answers, scored one by one and as counts per picture."""
    data: Data
    curve: CutCaptions | None = None
    """The untouched model's captions, cut shorter and shorter."""
    protocol: Protocol | None = None
    """The preset that the runs were asked by."""
    deviations: tuple[str, ...] = ()
    """In what they differ from it."""
    named: str = ""
    """The title, where it is not the benchmark's."""
    baseline: str = "the untouched model"
    """What the others are compared with."""

    @property
    def title(self) -> str:
        """Benchmark, how it is scored, and the protocol, if any: `+` names what deviates from it."""
        if self.named:
            return self.named
        return self.benchmark.title + (f" by {self.protocol_name}" if self.protocol else "")

    @property
    def protocol_name(self) -> str:
        """`pai-512`, or `pai-512+images` where that differs; empty without a protocol."""
        if self.protocol is None:
            return ""
        return "+".join([self.protocol.name, *dict.fromkeys(d.partition(":")[0] for d in self.deviations)])

    @property
    def testing(self) -> str:
        """What goes behind every title if only the first pictures were asked about."""
        return f" (testing only: --limit {self.data.limit})" if self.data.limit else ""

    @property
    def published(self) -> list[Published]:
        """Figures that others report for the protocol."""
        return [] if self.protocol is None else published(self.protocol.name)

    def to_json(self) -> dict[str, Any]:
        """Everything that the table shows, and where it came from."""
        return {
            "benchmark": self.benchmark.name,
            "title": self.title,
            "scoring": self.benchmark.scoring,
            "model": self.model,
            "limit": self.data.limit,
            "protocol": self.protocol_name or None,
            "deviations": list(self.deviations),
            "published": [asdict(one) for one in self.published],
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
            "runs": [{"folder": str(run.folder), **run.header} for run in self.runs],
        }


KIND = (
    *("benchmark", "protocol", "asking", "model", "data_digest", "items_digest", "limit", "max_new_tokens", "template"),
    "decoding",
)
"""What runs must share to be compared; all else in which they differ is said beside the figures."""


def compare(
    runs: Sequence[Run], n_resamples: int = stats.RESAMPLES, scoring: Mapping[str, str] | None = None
) -> list[Comparison]:
    """Score runs, and compare each with the untouched model where that is among them.

    Runs that were asked other questions, or in another way, are never in one comparison. `scoring` names how to judge
    the answers: `{"chair": "strict", "pope": "negword"}`; by default as their protocol does, or the benchmark.
    """
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        identity = run.header["identity"]
        kinds.setdefault(json.dumps([identity.get(key) for key in KIND], sort_keys=True), []).append(run)
    return [one for group in kinds.values() for one in _comparisons(group, n_resamples, scoring or {})]


def _comparisons(runs: list[Run], n_resamples: int, scoring: Mapping[str, str]) -> list[Comparison]:
    """One for each way in which the protocol judges answers, or as told."""
    name = runs[0].header["identity"]["benchmark"]
    protocol = find_protocol(runs[0].header["identity"].get("protocol"))
    if name in scoring or protocol is None:
        return [_compare(runs, n_resamples, scoring.get(name), protocol)]
    return [_compare(runs, n_resamples, how, protocol) for how in protocol.scoring]


def _compare(runs: list[Run], n_resamples: int, scoring: str | None, protocol: Protocol | None) -> Comparison:
    identity = runs[0].header["identity"]
    bench = benchmark(identity["benchmark"], scoring, identity.get("asking", {}).get("prompt"))
    data = Data.load(**(runs[0].header.get("data") or {"name": identity["data"], "limit": identity["limit"]}))
    if data.digest != identity["data_digest"]:
        raise ValueError(f"the annotations in {data.folder} are not those that {runs[0].folder} was asked with")
    items = bench.items(data)
    if identity.get("items_digest") not in (None, items_digest(items)):
        raise ValueError(f"the questions of {bench.name} are not those that {runs[0].folder} was asked")
    groups = [bench.score(data, {r["id"]: bench.said(r) for r in run.records}) for run in runs]
    base = next((i for i, run in enumerate(runs) if run.untouched), None)
    against = None if base is None else _against(bench, data, groups[base])
    least = min(RESAMPLES, n_resamples)
    rows, notes = [], list(bench.notes)
    if identity["limit"]:
        notes.append(f"testing only: the first {identity['limit']} pictures")
    for i, (run, found) in enumerate(zip(runs, groups, strict=True)):
        for k, group in enumerate(found):
            reference = None if base is None or run.untouched else _same_group(groups[base], group, k)
            control = None if against is None or run.untouched else against.control(group.scores, resamples=least)
            rows.append(_row(bench, run.label, group, reference, control, n_resamples))
        notes += _notes(run, len(items))
        if base not in (None, i) and bench.scoring == yesno.MARGIN:
            notes += _margin_notes(run, runs[base or 0])
    deviations = () if protocol is None else protocol.deviations(runs[0].header, bench)
    curve = None if against is None else against.cut()
    return Comparison(bench, identity["model"], rows, notes, runs, groups, data, curve, protocol, deviations)


def items_digest(items: Sequence[Item]) -> str:
    """Hash of the questions: their ids, prompts and names of pictures."""
    lines = (f"{item.id}\t{Path(item.image).name}\t{item.prompt}\n" for item in items)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _same_group(of: Sequence[Group], group: Group, k: int) -> Group | None:
    if k < len(of) and of[k].name == group.name:
        return of[k]
    return next((other for other in of if other.name == group.name), None)


def _against(bench: Benchmark, data: Data, base: Sequence[Group]) -> Against | None:
    if bench.name != "chair" or not any(score.truth for score in base[0].scores):
        return None
    return Against(base[0].scores, data.truth_for(bench.scoring), data.vocabulary, bench.scoring)


def _row(
    bench: Benchmark,
    label: str,
    group: Group,
    base: Group | None,
    control: TruncationControl | None,
    n_resamples: int,
) -> Row:
    found = stats.estimates(group.counts, bench.metrics, n_resamples)
    apart = None
    if base is not None:
        apart = stats.differences(group.counts, group.images, base.counts, base.images, bench.metrics, n_resamples)
    unparsed = sum(getattr(score, "prediction", "") is None for score in group.scores)
    return Row(label, group.name, len(set(group.images)), found, apart, unparsed, control)


def _notes(run: Run, n_items: int) -> list[str]:
    notes = []
    if len(run.records) < n_items:
        notes.append(f"{run.label}: {len(run.records)} of {n_items} answers so far; `{run.command}` finishes it")
    cut = sum(r.get("finish") == "length" for r in run.records)
    if cut and run.header["identity"]["benchmark"] in ("chair", "amber_captions"):
        budget = run.header["identity"]["max_new_tokens"]
        notes.append(f"{run.label}: {cut} of {len(run.records)} answers were cut at {budget} tokens")
    for i, method in enumerate(run.header["identity"]["method"]):
        idle = method["facts"].get("idle")
        acted = sum(bool(r["effects"][i]["acted"]) for r in run.records if len(r.get("effects", [])) > i)
        if idle:
            notes.append(f"{run.label}: {method['name']} did not act on this model, {idle}")
        elif acted < len(run.records):
            notes.append(f"{run.label}: {method['name']} acted on {acted} of {len(run.records)} answers")
    return notes


def _margin_notes(run: Run, base: Run) -> list[str]:
    """Whether a method leaves the first token alone, so that no difference can show."""
    of = {r["id"]: r.get("first_token") for r in base.records}
    if run.records and all(r.get("first_token") == of.get(r["id"]) for r in run.records):
        return [f"{run.label}: does not act on the first token, so its margins are the untouched model's"]
    return []
