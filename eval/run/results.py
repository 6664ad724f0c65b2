"""Finished answers: run folders, files of somebody else's answers, and the comparison made from either. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmfix.eval.benchmarks.benchmark import Benchmark, Group, Item, benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run.protocols import Protocol, Published, find_protocol, published
from vlmfix.eval.scorers import stats, yesno
from vlmfix.eval.scorers.truncation import Against, CutCaptions, TruncationControl

HEADER, RECORDS, ERRORS = "run.json", "records.jsonl", "errors.jsonl"


class BrokenFile(ValueError):
    """A file of answers with a line that is no record."""


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Records of a file, and the number of bytes up to the end of the last whole line.

    A last line that was cut off in writing is not read. Raises `BrokenFile` for a broken line elsewhere.
    """
    n_bytes = 0
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # cut off in writing, which can happen to the last line only
        try:
            record = json.loads(line)
            fields = record if isinstance(record, dict) else {}
            if not isinstance(fields.get("id"), str) or not isinstance(fields.get("text"), str):
                raise ValueError("it lacks id or text")
        except ValueError as error:
            raise BrokenFile(
                f"{path}, line {number}, is no record ({error}); delete the line and run the command again"
            ) from error
        records.append(record)
        n_bytes += len(line)
    return records, n_bytes


def read_errors(folder: Path) -> list[dict[str, Any]]:
    """Questions of a run that could not be asked: `id`, `image`, `prompt` and `error` of each."""
    errors: list[dict[str, Any]] = []
    for path in sorted(folder.glob("errors.*jsonl")):
        errors += [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return errors


@dataclass(frozen=True)
class Run:
    """One method on one benchmark, as found on disk: a run folder, or a file of somebody else's answers.

    A file has no identity: nobody knows what was asked, and how, but for what it says itself.
    """

    folder: Path
    """The run folder, or the file."""
    header: dict[str, Any]
    records: list[dict[str, Any]]
    errors: list[dict[str, Any]] = field(default_factory=list)
    """Questions that could not be asked, with the reason under `error`; they are asked again when the run goes on."""

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
        records, n_bytes = read_lines(folder / RECORDS)
        run = cls(folder, header, records, read_errors(folder))
        if n_bytes < os.path.getsize(folder / RECORDS):
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

    @classmethod
    def of_file(cls, path: Path, label: str, bench: Benchmark, records: list[dict[str, Any]], baseline: bool) -> Run:
        """A file of answers as a run. The baseline of a comparison stands for the untouched model."""
        identity = {
            "benchmark": bench.name,
            "model": "",
            "method": [] if baseline else [{"name": label, "facts": {}}],
            "data": "",
            "limit": None,
            "max_new_tokens": None,
        }
        return cls(path, {"label": label, "identity": identity, "read": bench.facts}, records)

    @property
    def is_file(self) -> bool:
        """Whether this is a file of somebody else's answers."""
        return "read" in self.header

    @property
    def label(self) -> str:
        """The method, as it was asked for."""
        return self.header["label"]

    @property
    def command(self) -> str:
        """The command that resumes it."""
        return self.header.get("environment", {}).get("command", "vlmfix eval")

    @property
    def cut_by_the_budget(self) -> int:
        """Answers that were cut because they had as many tokens as they may; a method may cut others itself."""
        budget = self.header["identity"]["max_new_tokens"] or 0
        cut = [record for record in self.records if record.get("finish") == "length"]
        return sum(len(record.get("token_ids") or ()) in (0, budget) or not budget for record in cut)

    @property
    def untouched(self) -> bool:
        """Whether this is the model without any intervention, or the file that others are compared with."""
        return not self.header["identity"]["method"]


@dataclass(frozen=True)
class Row:
    """One method and one group of answers in a comparison."""

    method: str
    group: str
    n: int
    """Pictures."""
    answers: int
    """Captions or answers."""
    estimates: Mapping[str, stats.Estimate]
    differences: Mapping[str, stats.Difference] | None
    """To the baseline on the same pictures; `None` for the baseline itself, and without one."""
    unparsed: int = 0
    """Answers that say neither yes nor no to the parser."""
    misheard: int = 0
    """Answers that say the other of yes and no than the parser reads, or neither of them."""
    control: TruncationControl | None = None
    """Captions against the baseline's, cut to the same recall; `None` for the baseline, and for answers."""

    @property
    def common(self) -> int | None:
        """Pictures that the baseline has too; None where there is no difference to it."""
        return None if self.differences is None else next(iter(self.differences.values())).n

    @property
    def left_out(self) -> int:
        """Pictures that only one of the two has."""
        return 0 if self.differences is None else next(iter(self.differences.values())).left_out


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several methods on one benchmark, model and set of pictures; or several files of answers to one benchmark."""

    benchmark: Benchmark
    model: str
    """Empty where nobody knows."""
    rows: list[Row]
    notes: list[str]
    runs: list[Run]
    groups: list[list[Group]]
    """Of each run: its answers, scored one by one and as counts per picture."""
    data: Data
    curve: CutCaptions | None = None
    """The baseline's captions, cut shorter and shorter."""
    protocol: Protocol | None = None
    """The preset that the runs were asked by."""
    deviations: tuple[str, ...] = ()
    """In what they differ from it."""
    baseline: str = "the untouched model"
    """What the others are compared with; the name of a file stands between backticks."""

    @property
    def title(self) -> str:
        """Benchmark, how it is scored, and the protocol, if any: `+` names what deviates from it."""
        return self.benchmark.title + (f" by {self.protocol_name}" if self.protocol else "")

    @property
    def protocol_name(self) -> str:
        """`pai-512`, or `pai-512+images` where that differs; empty without a protocol."""
        if self.protocol is None:
            return ""
        kinds = [deviation.partition(":")[0] for deviation in self.deviations]
        return "+".join([self.protocol.name, *dict.fromkeys(kinds)])

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
            **self.benchmark.facts,
            "model": self.model,
            "limit": self.data.limit,
            "protocol": self.protocol_name or None,
            "deviations": list(self.deviations),
            "published": [asdict(row) for row in self.published],
            "baseline": self.baseline.strip("`"),
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
            "runs": [{"folder": str(run.folder), **run.header} for run in self.runs],
        }


KIND = (
    "benchmark",
    "protocol",
    "asking",
    "model",
    "data_digest",
    "items_digest",
    "pictures_digest",
    "processor_digest",
    "limit",
    "max_new_tokens",
    "template",
    "decoding",
)
"""What runs must share to be compared; all else in which they differ is said beside the figures."""


def compare(
    runs: Sequence[Run], n_resamples: int = stats.RESAMPLES, scoring: Mapping[str, str] | None = None
) -> list[Comparison]:
    """Score runs, and compare each with the untouched model where that is among them.

    Runs that were asked other questions, or in another way, are never in one comparison.

    Args:
        runs: Run folders, as read from disk.
        n_resamples: How often the bootstrap draws pictures.
        scoring: How to judge the answers: `{"chair": "strict", "pope": "negword"}`; by default as their protocol does,
            or the benchmark.

    Raises:
        ValueError: a way of scoring is unknown, or the data is not what it was when the questions were asked.
    """
    runs_of_kind: dict[str, list[Run]] = {}
    for run in runs:
        identity = run.header["identity"]
        kind = json.dumps([identity.get(key) for key in KIND], sort_keys=True)
        runs_of_kind.setdefault(kind, []).append(run)
    comparisons: list[Comparison] = []
    for alike in runs_of_kind.values():
        comparisons += _each_way_of_scoring(alike, n_resamples, scoring or {})
    return comparisons


def _each_way_of_scoring(runs: list[Run], n_resamples: int, scoring: Mapping[str, str]) -> list[Comparison]:
    """One comparison for each way in which the protocol judges answers, or the one that was chosen."""
    name = runs[0].header["identity"]["benchmark"]
    protocol = find_protocol(runs[0].header["identity"].get("protocol"))
    if name in scoring or protocol is None:
        return [_compare(runs, n_resamples, scoring.get(name), protocol)]
    return [_compare(runs, n_resamples, way, protocol) for way in protocol.scoring]


def _compare(runs: list[Run], n_resamples: int, scoring: str | None, protocol: Protocol | None) -> Comparison:
    identity = runs[0].header["identity"]
    bench = benchmark(identity["benchmark"], scoring, identity.get("asking", {}).get("prompt"))
    data = _data_of(runs[0])
    items = bench.items(data)
    if identity.get("items_digest") not in (None, items_digest(items)):
        raise ValueError(f"the questions of {bench.name} are not those that {runs[0].folder} was asked")
    groups = [bench.score(data, {record["id"]: bench.said(record) for record in run.records}) for run in runs]
    base = next((place for place, run in enumerate(runs) if run.untouched), None)
    against = None if base is None else bench.against(data, groups[base])
    notes = [*bench.notes, *bench.coverage(data)]
    if identity["limit"]:
        notes.append(f"testing only: the first {identity['limit']} pictures")
    for place, run in enumerate(runs):
        notes += _notes(run, bench, len(items))
        misheard = bench.misheard_note(groups[place])
        notes += [f"{run.label}: {misheard}"] if misheard else []
        if base is not None and place != base and bench.scoring == yesno.MARGIN:
            notes += _margin_notes(run, runs[base])
    return Comparison(
        benchmark=bench,
        model=identity["model"],
        rows=compared(bench, runs, groups, base, against, n_resamples),
        notes=notes,
        runs=runs,
        groups=groups,
        data=data,
        curve=None if against is None else against.cut(),
        protocol=protocol,
        deviations=() if protocol is None else protocol.deviations(runs[0].header, bench),
    )


def _data_of(run: Run) -> Data:
    """What a run was asked about. `ValueError` if the annotations have changed since."""
    identity = run.header["identity"]
    data = Data.load(**(run.header.get("data") or {"name": identity["data"], "limit": identity["limit"]}))
    if data.digest != identity["data_digest"]:
        raise ValueError(f"the annotations in {data.folder} are not those that {run.folder} was asked with")
    return data


def compared(
    bench: Benchmark,
    runs: Sequence[Run],
    groups: Sequence[Sequence[Group]],
    base: int | None,
    against: Against | None,
    n_resamples: int,
) -> list[Row]:
    """A row for each run and group of its answers, with the difference to the baseline.

    Args:
        bench: The benchmark that scored the answers.
        runs: Run folders or files.
        groups: Of each run: its answers.
        base: Which run is the baseline.
        against: The baseline's captions, for the truncation control.
        n_resamples: How often the bootstrap draws pictures.
    """
    rows = []
    for run, groups_of_run in zip(runs, groups, strict=True):
        for place, group in enumerate(groups_of_run):
            base_group = control = None
            if base is not None and not run.untouched:
                base_group = _same_group(groups[base], group, place)
            if base_group is not None and run.is_file and bench.asked(group) != bench.asked(base_group):
                base_group = None  # files may answer any questions; only answers to the same ones compare
            if against is not None and not run.untouched:
                control = against.control(group.scores, resamples=n_resamples)
            differences = None
            if base_group is not None:
                differences = stats.differences(
                    group.counts, group.images, base_group.counts, base_group.images, bench.metrics, n_resamples
                )
            row = Row(
                method=run.label,
                group=group.name,
                n=len(set(group.images)),
                answers=len(group.scores),
                estimates=stats.estimates(group.counts, bench.metrics, n_resamples),
                differences=differences,
                unparsed=bench.unparsed(group),
                misheard=bench.misheard(group),
                control=control,
            )
            rows.append(row)
    return rows


def items_digest(items: Sequence[Item]) -> str:
    """Hash of the questions: their ids, prompts and names of pictures."""
    lines = (f"{item.id}\t{Path(item.image).name}\t{item.prompt}\n" for item in items)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def pictures_digest(items: Sequence[Item]) -> str:
    """Hash of the pictures that questions are about: of every byte of their files, in order."""
    digest = hashlib.sha256()
    for path in dict.fromkeys(item.image for item in items):
        content = Path(path).read_bytes() if Path(path).is_file() else b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def _same_group(groups: Sequence[Group], group: Group, place: int) -> Group | None:
    """The group of the same name: that at the same place, if it is there, else the first."""
    if place < len(groups) and groups[place].name == group.name:
        return groups[place]
    return next((other for other in groups if other.name == group.name), None)


def _notes(run: Run, bench: Benchmark, n_items: int) -> list[str]:
    notes = []
    if run.errors:
        first = run.errors[0]
        notes.append(
            f"{run.label}: {len(run.errors)} of {n_items} questions could not be asked and are left out, such as "
            f"{first['image']}: {first['error']}"
        )
    if len(run.records) + len(run.errors) < n_items:
        notes.append(f"{run.label}: {len(run.records)} of {n_items} answers so far; `{run.command}` finishes it")
    n_cut = run.cut_by_the_budget
    if n_cut and bench.describes:
        budget = run.header["identity"]["max_new_tokens"]
        notes.append(f"{run.label}: {n_cut} of {len(run.records)} answers were cut at {budget} tokens")
    for place, method in enumerate(run.header["identity"]["method"]):
        idle = method["facts"].get("idle")
        effects = [record["effects"][place] for record in run.records if len(record.get("effects", [])) > place]
        n_acted = sum(bool(effect["acted"]) for effect in effects)
        if idle:
            notes.append(f"{run.label}: {method['name']} did not act on this model, {idle}")
        elif n_acted < len(effects):
            notes.append(f"{run.label}: {method['name']} acted on {n_acted} of {len(effects)} answers")
    return notes


def _margin_notes(run: Run, base: Run) -> list[str]:
    """Whether a method leaves the first token alone, so that no difference can show."""
    first_token_of = {record["id"]: record.get("first_token") for record in base.records}
    same = all(record.get("first_token") == first_token_of.get(record["id"]) for record in run.records)
    if run.records and same:
        return [f"{run.label}: does not act on the first token, so its margins are the untouched model's"]
    return []
