"""Files of answers that somebody else has made, scored and compared. No torch.

    comparison = compare_files(["greedy.jsonl", "opera.jsonl"], "chair", FileOptions(variant="opera_approx"))
    opera = comparison.rows[1]
    opera.estimates["CHAIR_S"], opera.differences["CHAIR_S"], opera.control.chair_s

Each file is one method. The first is the baseline, unless another is named; every other file is compared with it on the
images that both have, and its captions also with the baseline's captions cut to the same recall (`truncation`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vlmfix.eval.benchmarks.benchmark import FileOptions, benchmark_for_files
from vlmfix.eval.pictures.data import Elsewhere
from vlmfix.eval.run.results import Comparison, Row, Run, compared
from vlmfix.eval.scorers import stats
from vlmfix.eval.scorers.reading import about_file, printable


def compare_files(
    files: Iterable[str | os.PathLike[str]],
    benchmark: str,
    options: FileOptions | None = None,
    baseline: str | os.PathLike[str] | None = None,
    n_resamples: int = stats.RESAMPLES,
) -> Comparison:
    """Score files of answers to one benchmark, and compare each with the baseline.

    Args:
        files: One file for each method, in any format that the benchmark reads.
        benchmark: Name of the benchmark that they answer.
        options: What must be known beyond the files.
        baseline: The file that others are compared with; the first one if None.
        n_resamples: How often the bootstrap draws pictures.

    Raises:
        ValueError: an unknown benchmark, an option that it does not take or lacks, a file that cannot be read or does
            not fit the questions or the ground truth; the message names the file.
    """
    paths = _ordered(files, baseline)
    bench = benchmark_for_files(benchmark, options or FileOptions())
    labels = _labels(paths)
    notes = list(bench.notes)
    runs, groups = [], []
    for path, label in zip(paths, labels, strict=True):
        with about_file(path):
            answers = bench.read(path)
        runs.append(Run.of_file(path, label, bench, answers.records, baseline=path == paths[0]))
        groups.append(answers.groups)
        misheard = bench.misheard_note(answers.groups)
        notes += [f"{label}: {remark}" for remark in [*answers.remarks, misheard] if remark]
    data = Elsewhere(benchmark, Path())
    against = bench.against(data, groups[0]) if len(paths) > 1 else None
    rows = compared(bench, runs, groups, 0, against, n_resamples)
    for row in rows:
        if row.method != labels[0]:
            notes += _row_notes(row, labels[0])
    return Comparison(
        benchmark=bench,
        model="",
        rows=rows,
        notes=list(dict.fromkeys(notes)),
        runs=runs,
        groups=groups,
        data=data,
        curve=None if against is None else against.cut(),
        baseline=f"`{labels[0]}`",
    )


def _ordered(files: Iterable[str | os.PathLike[str]], baseline: str | os.PathLike[str] | None) -> list[Path]:
    """The files, the baseline first, which may be among the others or not."""
    paths = [Path(file) for file in files]
    if baseline is not None:
        if Path(baseline) in paths:
            paths.remove(Path(baseline))
        paths.insert(0, Path(baseline))
    if not paths or len(set(paths)) < len(paths):
        raise ValueError(f"got {len(paths)} files, {len(set(paths))} different ones; give each file of answers once.")
    return paths


def _labels(paths: Sequence[Path]) -> list[str]:
    """File names without endings, or whole paths if those are not told apart."""
    names = [path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json") for path in paths]
    distinct = all(names) and len(set(names)) == len(names)
    return [printable(label) for label in (names if distinct else map(str, paths))]


def _row_notes(row: Row, base: str) -> Iterator[str]:
    """What a reader must know about the comparison of a file with the baseline."""
    if row.differences is None:
        yield f"{row.method}: not compared in {row.group or 'all'}, where {base} answers other questions"
    elif row.left_out:
        yield f"{row.method}: compared on the {row.common} images in common with {base}, {row.left_out} left out"
    if row.differences is not None and "CHAIR_S" in row.differences and row.control is None:
        yield f"{row.method}: no truncation control, as no image in common with {base} has an object"
    elif row.control and row.control.status == "recall above vanilla":
        yield f"{row.method}: its recall is above that of {base}, so it is held against {base}'s uncut captions"
    elif row.control and row.control.status == "outside":
        yield f"{row.method}: its recall is below every cut of {base}'s captions, so nothing compares at equal recall"
