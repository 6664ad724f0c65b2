"""What a benchmark is: questions, figures, and how answers become figures. No torch.

Each benchmark is a file of this folder and a line of `BENCHMARKS`. It serves in two ways: a run asks its questions
about some data, and files of answers that somebody else has made are read and scored.

    bench = benchmark("chair", "strict")
    bench.items(data), bench.score(data, answers)

    bench = benchmark_for_files("pope", FileOptions(split="random"))
    bench.read("answers.jsonl").groups
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers.stats import Metric
from vlmfix.eval.scorers.truncation import Against
from vlmfix.method.settings import did_you_mean

BENCHMARKS = {
    "chair": "vlmfix.eval.benchmarks.chair:Chair",
    "pope": "vlmfix.eval.benchmarks.pope:Pope",
    "amber": "vlmfix.eval.benchmarks.amber:Amber",
    "amber_captions": "vlmfix.eval.benchmarks.amber_captions:AmberCaptions",
    "mme": "vlmfix.eval.benchmarks.mme:Mme",
    "hallusionbench": "vlmfix.eval.benchmarks.hallusionbench:HallusionBench",
    "dashb": "vlmfix.eval.benchmarks.dashb:DashB",
    "yesno": "vlmfix.eval.benchmarks.yesno:OwnQuestions",
}
"""Name -> where its class is; the file loads when the benchmark is first used."""


@dataclass(frozen=True)
class Item:
    """One question to a model."""

    id: str
    image: str
    """Path of the picture."""
    prompt: str


@dataclass(frozen=True)
class Group:
    """Answers that are scored together, as counts per image."""

    name: str
    images: list[Any]
    counts: dict[str, np.ndarray]
    scores: Sequence[Any] = ()
    """Each answer, as it was read and judged."""
    is_summary: bool = False
    """Whether these are the answers of the other groups once more."""


@dataclass(frozen=True)
class Figure:
    """One of a benchmark's figures: how it is computed, shown and understood."""

    formula: Metric
    """From summed counts to the value, nan where it is undefined."""
    meaning: str = ""
    """What it is the share or the number of, in a few words."""
    better: Literal["less", "more"] | None = None
    """Which way is better; None where neither is."""
    unit: Literal["%", ""] = "%"
    """What is printed behind it. Shares are computed as shares and printed in percent."""
    shown: bool = True
    """Whether the table has it. Reports and JSON have all figures."""

    @property
    def factor(self) -> float:
        """By what the value is multiplied where it is printed."""
        return 100.0 if self.unit == "%" else 1.0

    def is_better(self, change: float | None) -> bool | None:
        """Whether a change is for the better; None where neither way is, or nothing changed."""
        return is_better(self.better, change)


def is_better(direction: Literal["less", "more"] | None, change: float | None) -> bool | None:
    """Whether a change is for the better; None where neither direction is, or nothing changed."""
    if not change or direction is None:
        return None
    return change < 0 if direction == "less" else change > 0


@dataclass(frozen=True)
class FileOptions:
    """What must be known to score answers that somebody else has made. None is the benchmark's own default.

    Every benchmark takes some of these, see `Benchmark.file_options`.
    """

    variant: str | None = None
    """How captions are read, a variant of CHAIR; `rohrbach` by default."""
    truth: str | None = None
    """Ground truth of the captions: `coco`, a file or a folder, see `reading.find_truth`; `coco` by default."""
    synonyms: str | None = None
    """File of objects and their synonyms; COCO's by default."""
    key: str | None = None
    """Key of the captions or answers in the files; found by itself if only one can be meant."""
    image_key: str | None = None
    """Key of the images in files of captions; found by itself if only one can be meant."""
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
class FileAnswers:
    """Answers that somebody else has made, read from a file and scored."""

    records: list[dict[str, str]]
    """`id` and `text` of each answer."""
    groups: list[Group]
    remarks: list[str]
    """What a reader should know about this file."""


class Benchmark:
    """A set of questions, with its scorer."""

    name: ClassVar[str]
    figures: ClassVar[Mapping[str, Figure]]
    """Name -> figure, in the order of the tables. The first one decides between a method and its controls."""
    headline: ClassVar[tuple[str, ...]] = ()
    """Figures of the table that a terminal shows; the first two where none are named. `--full` shows all."""
    max_new_tokens: ClassVar[int]
    """How many tokens an answer may have, where nothing else is said."""
    describes: ClassVar[bool] = False
    """Whether answers are descriptions, which the token budget may cut short."""
    running: ClassVar[str] = ""
    """The figure that is shown while answers come in."""
    where: ClassVar[str] = ""
    """Where pictures can be had that may not come with the package."""
    scoring_option: ClassVar[Literal["variant", "parser", "similarity"]]
    """What the way of scoring is called on the command line."""
    file_options: ClassVar[tuple[str, ...]]
    """Which of the `FileOptions` it takes."""

    def __init__(self, scoring: str, prompt: str) -> None:
        self.scoring = scoring
        """How answers are judged: CHAIR's variant, a parser, AMBER's similarity. Chosen anew at each scoring."""
        self.prompt = prompt
        """What is asked; `{question}` stands for the question where each picture has its own."""
        self.notes: list[str] = []
        """What a reader must know about the scoring."""
        self.options: FileOptions | None = None
        """How files of answers are to be read; None where this is for runs."""

    @property
    def title(self) -> str:
        """As printed. It names whatever the figures depend on: the variant, the parser, the edition."""
        raise NotImplementedError

    @property
    def facts(self) -> dict[str, Any]:
        """The same by name, for JSON."""
        return {self.scoring_option: self.scoring}

    @property
    def columns(self) -> dict[str, tuple[str, float]]:
        """The figures of the table: name -> unit and factor."""
        return {name: (figure.unit, figure.factor) for name, figure in self.figures.items() if figure.shown}

    @property
    def headline_figures(self) -> tuple[str, ...]:
        """The names of `headline`, or of the first two figures."""
        return self.headline or tuple(self.columns)[:2]

    @property
    def metrics(self) -> dict[str, Metric]:
        """The formulas of all figures."""
        return {name: figure.formula for name, figure in self.figures.items()}

    @property
    def asking(self) -> dict[str, Any]:
        """What fixes the questions: prompt, seed ... Part of a run's identity."""
        return {"prompt": self.prompt}

    def items(self, data: Data) -> list[Item]:
        """All questions, none twice."""
        raise NotImplementedError

    def check(self, data: Data) -> None:
        """Make every check of questions and ground truth that scoring makes, before a model is asked.

        Raises:
            ValueError: the answers could not be scored.
        """

    def coverage(self, data: Data) -> list[str]:
        """What a reader must know of pictures that are not asked about."""
        return []

    def said(self, record: Mapping[str, Any]) -> Any:
        """What is scored of a record: its text."""
        return record["text"]

    def score(self, data: Data, answers: Mapping[str, Any]) -> list[Group]:
        """Score a run's answers (item id -> what `said` gives); questions without an answer are left out."""
        raise NotImplementedError

    def asked(self, group: Group) -> frozenset[Any]:
        """Which questions the answers of a group are to, with their labels; empty where pictures are described."""
        return frozenset()

    def unparsed(self, group: Group) -> int:
        """How many answers of a group say neither yes nor no to the parser; 0 where pictures are described."""
        return 0

    def misheard(self, group: Group) -> int:
        """How many answers of a group say another word than they are read as; 0 where pictures are described
        and where the first word decides."""
        return 0

    def misheard_note(self, groups: Sequence[Group]) -> str:
        """What a reader must know of such answers; empty if there are none."""
        return ""

    def explain(self, score: Any) -> dict[str, Any]:
        """How one answer was read and judged, ready for JSON."""
        raise NotImplementedError

    def against(self, data: Data, base: Sequence[Group]) -> Against | None:
        """The truncation control of methods against the captions of a baseline.

        Args:
            data: What the baseline was asked about.
            base: The baseline's answers.

        Returns:
            None where the benchmark has no such control, or there is nothing to compare recall by.
        """
        return None

    def prepare_files(self, options: FileOptions) -> None:
        """Load what files of answers are scored against: questions, or the ground truth.

        Raises:
            ValueError: an option is missing, or a file that it names is broken.
        """
        self.options = options

    def read(self, path: Path) -> FileAnswers:
        """Read and score a file of answers that somebody else has made. `prepare_files` comes first.

        Raises:
            ValueError: the file is broken, or does not fit the questions or the ground truth.
        """
        raise NotImplementedError


def benchmark_class(name: str) -> type[Benchmark]:
    """The class of a benchmark. `ValueError` if there is none of this name."""
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; {did_you_mean(name, BENCHMARKS)}")
    module, _, attribute = BENCHMARKS[name].partition(":")
    cls: type[Benchmark] = getattr(importlib.import_module(module), attribute)
    return cls


def benchmark(name: str, scoring: str | None = None, prompt: str | None = None) -> Benchmark:
    """A benchmark by name, asked and scored in its default way or as said.

    Args:
        name: One of `BENCHMARKS`.
        scoring: CHAIR's variant, a parser of yes and no, or AMBER's similarity.
        prompt: What is asked.

    Raises:
        ValueError: there is no such benchmark, or no such way of scoring it.
    """
    chosen = {"scoring": scoring, "prompt": prompt}
    cls: Any = benchmark_class(name)
    made: Benchmark = cls(**{key: value for key, value in chosen.items() if value is not None})
    return made


def benchmark_for_files(name: str, options: FileOptions) -> Benchmark:
    """A benchmark that is ready to read files of answers that somebody else has made.

    Raises:
        ValueError: there is no such benchmark, it does not take an option or lacks one, or a file that an option names
            is broken.
    """
    cls = benchmark_class(name)
    for field in fields(options):
        if getattr(options, field.name) is not None and field.name not in cls.file_options:
            others = [other for other in BENCHMARKS if field.name in benchmark_class(other).file_options]
            raise ValueError(
                f"{field.name} is for {', '.join(others)}; {name} takes only {', '.join(cls.file_options)}: leave it "
                "out."
            )
    bench = benchmark(name, getattr(options, cls.scoring_option))
    bench.prepare_files(options)
    return bench


def scoring_by_benchmark(
    variant: str | None = None, parser: str | None = None, similarity: str | None = None
) -> dict[str, str]:
    """How the answers to each benchmark are to be scored, where that is said.

    Returns:
        Benchmark -> its variant, parser or similarity; the others are left out.
    """
    chosen = {"variant": variant, "parser": parser, "similarity": similarity}
    ways = {name: chosen[benchmark_class(name).scoring_option] for name in BENCHMARKS}
    return {name: way for name, way in ways.items() if way is not None}
