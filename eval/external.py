"""Other people's answers: published files, scored and compared without a run folder. No torch.

    comparison = compare(["greedy.jsonl", "opera.jsonl"], "chair", Options(variant="opera_approx"))
    opera = comparison.rows[1]
    opera.estimates["CHAIR_S"], opera.differences["CHAIR_S"], opera.control.chair_s

Each file is one method. The first is the baseline, unless another is named; every other file is compared with it on the
images that both have, and its captions also with the baseline's captions cut to the same recall (`truncation`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from vlmfix.eval.benchmarks import amber, amber_captions, dash, hallusion, mme, pope
from vlmfix.eval.benchmarks.benchmark import (
    Amber,
    AmberCaptions,
    Benchmark,
    Chair,
    DashB,
    Group,
    HallusionBench,
    Mme,
    Own,
    Pope,
    YesNo,
    all_and_groups,
)
from vlmfix.eval.pictures.data import Elsewhere
from vlmfix.eval.report.report import beyond, change, explain, figure
from vlmfix.eval.run import results
from vlmfix.eval.scorers import chair, reading, stats, truncation, yesno
from vlmfix.eval.scorers.chair import variants
from vlmfix.eval.scorers.stats import Difference, Estimate
from vlmfix.eval.scorers.truncation import TruncationControl


@dataclass(frozen=True)
class Options:
    """What must be known beyond the files. None is the benchmark's own default."""

    variant: str | None = None
    """How captions are read, a variant of CHAIR; `rohrbach` by default."""
    truth: str | None = None
    """Ground truth of the captions: `coco`, a file or a folder, see `reading.find_truth`; `coco` by default."""
    synonyms: str | None = None
    """File of objects and their synonyms; COCO's by default."""
    key: str | None = None
    """Key of the captions or answers in the files; found by itself if only one can be meant."""
    parser: str | None = None
    """How answers are read, one of `yesno.PARSERS`; `margin` takes the first token's margin instead of the text."""
    source: str | None = None
    """Whose questions of POPE; `coco` by default."""
    split: str | None = None
    """Which of POPE's questions (random, popular, adversarial) or HallusionBench's (with_image_951, all)."""
    questions: str | None = None
    """File, for MME folder, with the questions that were asked."""
    similarity: str | None = None
    """When two nouns of AMBER's captions are taken for one: `off` or `spacy:<model>`; `off` by default."""
    labels: str | None = None
    """File with other labels for POPE's questions, such as RePOPE's; questions that it lacks are left out."""


@dataclass(frozen=True)
class Row:
    """One file and one group of its answers."""

    method: str
    """Name of the file."""
    file: str
    group: str
    n: int
    """Captions or answers."""
    unparsed: int | None
    """Answers that say neither yes nor no to the parser; None for captions."""
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Difference] | None
    """To the baseline, on the images that both have; None for the baseline itself, and for other questions than its."""
    control: TruncationControl | None
    """Captions against the baseline's, cut to the same recall; None for the baseline and for answers."""

    @property
    def common(self) -> int | None:
        """Images that the baseline has too; None for the baseline itself."""
        return None if self.differences is None else next(iter(self.differences.values())).n

    @property
    def left_out(self) -> int:
        """Images that only one of the two has."""
        return 0 if self.differences is None else next(iter(self.differences.values())).left_out


@dataclass(frozen=True)
class Comparison:
    """Files of one benchmark, all read in the same way."""

    benchmark: str
    title: str
    """As printed; names the variant, or the edition and the parser."""
    facts: Mapping[str, Any]
    """What fixes the figures: variant and ground truth, or edition and parser."""
    columns: Mapping[str, tuple[str, float]]
    """Metrics that the table shows: name -> unit printed behind it, and factor."""
    baseline: str
    rows: Sequence[Row]
    notes: Sequence[str]
    scores: Mapping[str, Sequence[Any]]
    """File name -> every caption or answer, as it was read and judged."""
    bench: Benchmark
    """The benchmark, as `vlmfix eval` knows it."""
    parts: Mapping[str, Mapping[str, Part]]
    """File name -> name of a group -> its counts."""
    curve: truncation.CutCaptions | None = None
    """The baseline's captions, cut shorter and shorter."""

    def to_json(self) -> dict[str, Any]:
        """Everything that the table shows, and what it rests on."""
        return {
            "benchmark": self.benchmark,
            "title": self.title,
            **self.facts,
            "baseline": self.baseline,
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def as_runs(self) -> results.Comparison:
        """The same in the form of runs, to make a report of."""
        runs = [_as_run(self, name, row.file) for name in self.parts for row in self.rows if row.method == name]
        runs = list({run.label: run for run in runs}.values())
        rows = [
            results.Row(
                *(row.method, row.group, len(set(self.parts[row.method][row.group].clusters)), row.estimates),
                *(row.differences, row.unparsed or 0, row.control),
            )
            for row in self.rows
        ]
        groups = [
            [Group(part.group, list(part.clusters), dict(part.counts), part.scores) for part in parts.values()]
            for parts in self.parts.values()
        ]
        return results.Comparison(
            self.bench, "", rows, list(self.notes), runs, groups, Elsewhere(self.benchmark, Path()), self.curve,
            named=self.title, baseline=f"`{self.baseline}`",
        )  # fmt: skip

    def verdicts(self) -> Iterator[dict[str, Any]]:
        """How each caption or answer was read and judged, ready for JSON."""
        for method, scores in self.scores.items():
            for score in scores:
                yield {"method": method, **explain(score)}


@dataclass(frozen=True)
class Part:
    """A group of one file's answers, as counts that add up over images."""

    group: str
    n: int
    unparsed: int | None
    clusters: Sequence[object]
    counts: Mapping[str, np.ndarray]
    scores: Sequence[Any] = ()
    asked: frozenset[object] = frozenset()
    """Ids and labels of the questions; only answers to the same ones compare. Empty for captions."""


def _as_run(comparison: Comparison, name: str, file: str) -> results.Run:
    """A file as if it were a run."""
    method = [] if name == comparison.baseline else [{"name": name, "facts": {}}]
    identity = {"benchmark": comparison.benchmark, "model": "", "method": method, "data": "", "limit": None}
    records = [
        {"id": str(score.image_id), "text": score.caption}
        if isinstance(score, chair.CaptionScore)
        else {"id": str(getattr(score, "question", None) and score.question.id), "text": getattr(score, "answer", "")}
        for score in comparison.scores[name]
    ]
    header = {"label": name, "identity": {**identity, "max_new_tokens": None}, "read": dict(comparison.facts)}
    return results.Run(Path(file), header, records)


Score = Callable[[Sequence[Any], Sequence[yesno.Answer], str], Sequence[Any]]
"""Questions, answers and parser -> scores."""


@dataclass(frozen=True)
class Setup:
    """How files of one benchmark are read, scored and shown."""

    bench: Benchmark
    title: str
    facts: Mapping[str, Any]
    read: Callable[[Path], tuple[Sequence[Any], Sequence[str]]]
    """File -> scores of its answers, and what the reader should know about it."""
    parts: Callable[[Sequence[Any]], Sequence[Part]]
    notes: Sequence[str] = ()
    columns: Mapping[str, tuple[str, float]] | None = None
    """The benchmark's, if None."""
    against: Callable[[Sequence[Any]], truncation.Against] | None = None
    """The baseline's scores -> the control of others."""


def compare(
    files: Iterable[str | os.PathLike[str]],
    benchmark: str,
    options: Options | None = None,
    baseline: str | os.PathLike[str] | None = None,
    n_resamples: int = stats.RESAMPLES,
) -> Comparison:
    """Score files of answers to one benchmark, and compare each with the baseline.

    Raises:
        ValueError: an unknown benchmark, an option that it does not take or lacks, a file that cannot be read or does
            not fit the questions or the ground truth; the message names the file.
    """
    paths = [Path(file) for file in ([] if baseline is None else [baseline]) + list(files)]
    if baseline is not None and paths[0] in paths[1:]:
        del paths[paths.index(paths[0], 1)]
    if not paths or len(set(paths)) < len(paths):
        raise ValueError(f"got {len(paths)} files, {len(set(paths))} different ones; give each file of answers once.")
    setup = _setup(benchmark, options or Options())
    names = dict(zip(paths, _names(paths), strict=True))
    scores: dict[Path, Sequence[Any]] = {}
    notes = list(setup.notes)
    for path, name in names.items():
        with _about(path):
            scores[path], remarks = setup.read(path)
        notes += [f"{name}: {remark}" for remark in remarks]
    parts = {path: {part.group: part for part in setup.parts(found)} for path, found in scores.items()}
    base = paths[0]
    against = setup.against(scores[base]) if setup.against and len(paths) > 1 else None
    rows = [
        Row(
            method=name,
            file=str(path),
            group=group,
            n=part.n,
            unparsed=part.unparsed,
            estimates=stats.estimates(part.counts, setup.bench.metrics, n_resamples),
            differences=None if path == base else _differences(part, parts[base].get(group), setup, n_resamples),
            control=against.control(scores[path]) if against and path != base else None,
        )
        for path, name in names.items()
        for group, part in parts[path].items()
    ]
    notes += [note for row in rows if row.file != str(base) for note in _row_notes(row, names[base])]
    scored = {name: scores[path] for path, name in names.items()}
    curve = against.cut() if against and any(score.truth for score in scores[base]) else None
    by_name = {name: parts[path] for path, name in names.items()}
    return Comparison(
        benchmark, setup.title, setup.facts, setup.columns or setup.bench.columns, names[base], rows,
        list(dict.fromkeys(notes)), scored, setup.bench, by_name, curve,
    )  # fmt: skip


def _differences(part: Part, base: Part | None, setup: Setup, n_resamples: int) -> dict[str, Difference] | None:
    if base is None or part.asked != base.asked:
        return None
    return stats.differences(part.counts, part.clusters, base.counts, base.clusters, setup.bench.metrics, n_resamples)


def _row_notes(row: Row, base: str) -> Iterator[str]:
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


def _names(paths: Sequence[Path]) -> list[str]:
    """File names without endings, or whole paths if those are not told apart."""
    short = [path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json") for path in paths]
    distinct = all(short) and len(set(short)) == len(short)
    return [_printable(name) for name in (short if distinct else map(str, paths))]


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)


@contextmanager
def _about(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors in reading a file name it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep to be read.") from error
    except (ValueError, TypeError) as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


# Benchmarks


def _setup(benchmark: str, options: Options) -> Setup:
    if benchmark not in BENCHMARKS:
        hint = yesno.did_you_mean(benchmark, BENCHMARKS)
        raise ValueError(f"{benchmark!r} is no benchmark{hint}; there are {', '.join(BENCHMARKS)}.")
    setup, takes = BENCHMARKS[benchmark]
    for field in fields(options):
        if getattr(options, field.name) is not None and field.name not in takes:
            others = [name for name, (_, taken) in BENCHMARKS.items() if field.name in taken]
            raise ValueError(
                f"{field.name} is for {', '.join(others)}; {benchmark} takes only {', '.join(takes)}: leave it out."
            )
    return setup(options)


def _chair(options: Options) -> Setup:
    asked = "rohrbach" if options.variant is None else options.variant
    chair.check_variant(asked)
    variant, line = variants.best_opera() if asked == "opera" else (asked, "")
    vocabulary = None
    if options.synonyms is not None:
        with _about(options.synonyms):
            vocabulary = chair.Vocabulary.load(options.synonyms)
    place = "coco" if options.truth is None else options.truth
    with _about(place):
        truth = reading.find_truth(place, variant, vocabulary)
    label = chair.label(variant, truth)
    origin = _printable(truth.source)
    bare = f"{origin}: objects as annotated, no human captions were read" if truth.variant is None else ""

    def read(path: Path) -> tuple[list[chair.CaptionScore], list[str]]:
        scores = chair.score_captions(reading.read_captions(path, options.key), truth, vocabulary, variant)
        empty = sum(not score.words for score in scores)
        return scores, [f"{empty} of {len(scores)} captions are empty"] if empty else []

    return Setup(
        title=f"CHAIR ({label})",
        facts={"variant": label, "truth": origin},
        bench=Chair(variant),
        read=read,
        parts=lambda scores: [Part("", len(scores), None, chair.clusters(scores), chair.counts(scores), scores)],
        notes=list(filter(None, (line, bare))),
        against=lambda base: truncation.Against(base, truth, vocabulary, variant),
    )


def _yes_no(
    title: str,
    options: Options,
    kind: type[YesNo],
    read: Callable[[Path, Score, str], tuple[Sequence[Any], Sequence[str]]],
    *,
    columns: Mapping[str, tuple[str, float]] | None = None,
    parts: Callable[[Sequence[Any]], Sequence[Part]] | None = None,
    score: Score = yesno.score_answers,
    facts: Mapping[str, Any] | None = None,
) -> Setup:
    """What all yes/no benchmarks share. `read` takes a file, how to score, and the parser."""
    parser = kind.parser if options.parser is None else options.parser
    if parser == yesno.MARGIN:
        score = _score_margins
    elif parser not in yesno.PARSERS:
        hint, known = yesno.did_you_mean(parser, yesno.PARSERS), (*yesno.PARSERS, yesno.MARGIN)
        raise ValueError(f"{parser!r} is no parser{hint}; there are {', '.join(known)}.")
    return Setup(
        title=f"{title}, parser {parser}",
        facts={"parser": parser, **(facts or {})},
        bench=kind(parser),
        columns=columns,
        read=lambda path: read(path, score, parser),
        parts=parts or _by_group,
        notes=[f"parser {parser}: {yesno.rule(parser)}"],
    )


def _score_margins(questions: Sequence[Any], answers: Sequence[yesno.Answer], parser: str) -> list[yesno.AnswerScore]:
    return yesno.score_margins(questions, answers)


def _part(group: str, scores: Sequence[Any], counting: Any = yesno) -> Part:
    unparsed = sum(score.prediction is None for score in scores)
    asked = frozenset((score.question.id, score.question.label) for score in scores)
    columns = counting.counts(scores)
    return Part(_printable(group), len(scores), unparsed, counting.clusters(scores), columns, scores, asked)


def _by_group(scores: Sequence[yesno.AnswerScore]) -> list[Part]:
    return [_part(group, part) for group, part in yesno.by_group(scores).items()]


def _all_and_groups(scores: Sequence[Any], counting: Any = yesno) -> list[Part]:
    return [_part(group, part, counting) for group, part in all_and_groups(scores).items()]


def _all(scores: Sequence[yesno.AnswerScore]) -> list[Part]:
    return [_part("", scores)]


def _asked(options: Options, what: str) -> str:
    if options.questions is None:
        raise ValueError(f"which questions were asked? Give {what} with --questions.")
    return options.questions


def _pope(options: Options) -> Setup:
    if (options.questions is None) == (options.split is None) or (
        options.questions is not None and options.source is not None
    ):
        raise ValueError(
            f"which questions of POPE were asked? Give either --split ({', '.join(pope.SPLITS)}), with --source "
            f"({', '.join(pope.SOURCES)}) if it is not coco, or --questions FILE."
        )
    if options.questions is None:
        questions = pope.load("coco" if options.source is None else options.source, options.split or "")
    else:
        with _about(options.questions):
            questions = pope.read_questions(options.questions)
            yesno.check_ids(questions)
    edition = pope.edition(questions)
    facts, kept = {"edition": edition}, questions
    if options.labels is not None:
        with _about(options.labels):
            labels = pope.read_questions(options.labels)
            kept, facts["labels"] = pope.relabel(questions, labels), pope.edition(labels)

    def read(path: Path, score: Score, parser: str) -> tuple[Sequence[Any], list[str]]:
        answers = yesno.read_answers(path, key=options.key)
        scores = score(questions, answers, parser)
        if options.labels is None:
            return scores, []
        wanted = {question.id for question in kept}
        return score(kept, [answer for answer in answers if answer.id in wanted], parser), []

    relabelled = f", labels {facts['labels']}" if options.labels is not None else ""
    return _yes_no(
        f"POPE {edition}{relabelled}",
        options,
        Pope,
        read,
        facts=facts,
    )


def _amber(options: Options) -> Setup:
    questions = amber.load()
    descriptions = {entry["id"] for entry in amber.entries()} - {question.id for question in questions}

    def read(path: Path, score: Score, parser: str) -> tuple[Sequence[Any], list[str]]:
        answers = yesno.read_answers(path, key=options.key)
        said = [answer for answer in answers if answer.id not in descriptions]
        ids = {answer.id for answer in said}
        asked = [question for question in questions if question.id in ids]
        if not asked:
            raise ValueError(
                f"{len(answers)} entries, none of them answers one of AMBER's questions, ids 1005 to 15220."
            )
        scores = score(asked, said, parser)
        remarks = [f"{len(asked)} of {len(questions)} questions are answered"] if len(asked) < len(questions) else []
        if parser == "amber":
            official = amber.official_figures(scores)["all"]
            remarks.append(f"the official script prints {', '.join(f'{k} {v}' for k, v in official.items())}")
        return scores, remarks

    def parts(scores: Sequence[yesno.AnswerScore]) -> list[Part]:
        return [_part(group, part) for group, part in amber.groups(scores).items() if part]

    return _yes_no("AMBER", options, Amber, read, parts=parts)


def _amber_captions(options: Options) -> Setup:
    bench = AmberCaptions(options.similarity or "off")
    items = {str(item.id): item for item in amber_captions.load()}

    def read(path: Path) -> tuple[Sequence[Any], list[str]]:
        entries = yesno.read_answers(path, key=options.key)
        said = {str(answer.id): answer.text or "" for answer in entries if str(answer.id) in items}
        if not said:
            raise ValueError(f"{len(entries)} entries, none of them describes one of AMBER's pictures, ids 1 to 1004.")
        asked = [items[key] for key in said]
        nouns = amber_captions.nltk_nouns({item.id: said[str(item.id)] for item in asked})
        left = [f"{len(said)} of {len(items)} pictures are described"] if len(said) < len(items) else []
        return amber_captions.score(asked, nouns, bench.scoring), left

    def parts(scores: Sequence[amber_captions.CaptionScore]) -> list[Part]:
        of = amber_captions
        return [Part("", len(scores), None, of.clusters(scores), of.counts(scores), scores)]

    return Setup(bench, bench.title, {"nouns": "nltk", "similarity": bench.scoring}, read, parts, bench.notes)


def _mme(options: Options) -> Setup:
    questions = None
    if options.questions is not None:
        with _about(options.questions):
            questions = mme.load(options.questions)

    def read(path: Path, score: Score, parser: str) -> tuple[Sequence[Any], list[str]]:
        if path.is_dir():
            own, answers = mme.read_results(path)
            scores = score(questions or own, answers, parser)
        else:
            asked = questions or mme.load(_asked(options, "the folder of MME's files"))
            scores = score(asked, yesno.read_answers(path, key=options.key), parser)
        return scores, [f"{sum(mme.task_scores(scores).values()):.1f} of 800 points"]

    return _yes_no("MME", options, Mme, read)


def _hallusion(options: Options) -> Setup:
    everything = hallusion.load("all")
    which: Any = "with_image_951" if options.split is None else options.split
    questions = hallusion.load(which)
    aside = {question.id for question in everything} - {question.id for question in questions}

    def read(path: Path, score: Score, parser: str) -> tuple[Sequence[Any], list[str]]:
        parts = ("category", "subcategory", "set_id", "figure_id", "question_id")
        answers = yesno.read_answers(path, key=options.key, id_keys=parts)
        said = [answer for answer in answers if answer.id not in aside]
        left_out = [f"{n} answers to questions without a figure left out"] if (n := len(answers) - len(said)) else []
        return score(questions, said, parser), left_out

    if options.parser == yesno.MARGIN:
        raise ValueError("HallusionBench is counted from texts; give a parser, not the margin.")
    return _yes_no(
        f"HallusionBench {which} by string matching",
        options,
        HallusionBench,
        read,
        parts=partial(_all_and_groups, counting=hallusion),
        score=hallusion.score,
        facts={"split": which},
    )


def _dash(options: Options) -> Setup:
    place = _asked(options, "the authors' list of DASH-B")
    with _about(place):
        questions = dash.load(place)

    def read(path: Path, score: Score, parser: str) -> tuple[Sequence[Any], list[str]]:
        answers = yesno.read_answers(path, key=options.key, id_keys=("object_name", "img_id"))
        return score(questions, answers, parser), []

    return _yes_no("DASH-B", options, DashB, read, parts=_all)


def _own(options: Options) -> Setup:
    place = _asked(options, "a file with id, image, question and label")
    with _about(place):
        questions = yesno.read_questions(place)
        if any(question.group == "all" for question in questions):
            raise ValueError("a group is called 'all', as is the sum of the groups; call it something else.")

    def read(path: Path, score: Score, parser: str) -> tuple[Sequence[Any], list[str]]:
        return score(questions, yesno.read_answers(path, key=options.key), parser), []

    columns = None if any(question.pair is not None for question in questions) else YesNo.columns
    return _yes_no(_printable(Path(place).name), options, Own, read, columns=columns, parts=_all_and_groups)


BENCHMARKS: dict[str, tuple[Callable[[Options], Setup], tuple[str, ...]]] = {
    "chair": (_chair, ("variant", "truth", "synonyms", "key")),
    "pope": (_pope, ("parser", "source", "split", "questions", "labels", "key")),
    "amber": (_amber, ("parser", "key")),
    "amber_captions": (_amber_captions, ("similarity", "key")),
    "mme": (_mme, ("parser", "questions", "key")),
    "hallusionbench": (_hallusion, ("parser", "split", "key")),
    "dashb": (_dash, ("parser", "questions", "key")),
    "yesno": (_own, ("parser", "questions", "key")),
}
"""Name -> how its files are read, and the `Options` that it takes."""


# Tables


def tables(comparison: Comparison) -> Iterator[Table]:
    """One table a group of answers: metrics down, files across; second lines are differences to the baseline."""
    groups = list(dict.fromkeys(row.group for row in comparison.rows))
    for group in groups:
        rows = [row for row in comparison.rows if row.group == group]
        title = Text(" / ".join(filter(None, [comparison.title, group if len(groups) > 1 else ""])))
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("")
        for row in rows:
            table.add_column(Text(row.method, overflow="fold"), justify="right", overflow="fold")
        captions = comparison.benchmark in ("chair", "amber_captions")
        table.add_row("captions" if captions else "answers", *map(_number, rows))
        for metric, (unit, factor) in comparison.columns.items():
            table.add_row(f"{metric} {unit}".strip(), *(_cell(row, metric, factor) for row in rows))
        if any(row.control for row in rows):
            table.add_row(
                "dC_S % at equal recall", *(_beyond(row.control.chair_s if row.control else None) for row in rows)
            )
            table.add_row("dF1 % at equal recall", *(_beyond(row.control.f1 if row.control else None) for row in rows))
        if any(row.unparsed is not None for row in rows):
            table.add_row("unparsed", *(str(row.unparsed) for row in rows))
        yield table


def _number(row: Row) -> Text:
    return Text(str(row.n)).append(f"\n{row.common} images in common" if row.left_out else "", style="dim")


def _cell(row: Row, metric: str, factor: float) -> Text:
    cell = Text(figure(row.estimates[metric], factor))
    if row.differences is not None:
        difference = row.differences[metric]
        cell.append("\n" + change(difference, factor), style="bold" if difference.clear else "dim")
    return cell


def _beyond(estimate: Estimate | None) -> Text:
    """A difference of the truncation control, marked where its interval excludes 0."""
    said = "" if estimate is None else beyond(estimate)
    return Text(said, style="bold" if said.endswith("*") else "dim")


def legend(comparison: Comparison) -> str:
    """What the figures in the tables are."""
    parts = ["95 % intervals: bootstrap over pictures."]
    if any(row.differences is not None for row in comparison.rows):
        parts.append(f"Second lines: paired difference to {comparison.baseline}; * marks an interval that excludes 0.")
    if any(row.control for row in comparison.rows):
        parts.append(
            f"At equal recall (truncation control): difference to the captions of {comparison.baseline}, cut after so "
            "many words that their recall is the same; dC_S below 0 and dF1 above 0 are better than saying less."
        )
    return " ".join(parts)
