"""The evaluation in two calls: ask questions under several methods, and compare the answers.

    runs = evaluate(Task(model="organism", methods="none,pai", benchmarks="chair", data="organism", limit=20))
    comparison = compare(runs)[0]
    comparison.rows[1].differences["CHAIR_S"]

`vlmfix eval` does the same from the command line: its options are the fields of `Task`. Finished runs can be compared
again later, from their folders, and so can files of answers that somebody else has made:

    compare(["runs/chair/organism/none-1a2b3c4d", "runs/chair/organism/pai-5e6f7a8b"])
    compare(["greedy.jsonl", "opera.jsonl"], benchmark="chair")

Importing this and comparing load no torch; asking does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.eval.benchmarks.benchmark import Benchmark, FileOptions, benchmark, scoring_by_benchmark
from vlmfix.eval.pictures.data import WHERE, Data
from vlmfix.eval.run import results
from vlmfix.eval.run.controls import controls_of
from vlmfix.eval.run.files import compare_files
from vlmfix.eval.run.protocols import MODEL, Protocol, find_protocol, generation
from vlmfix.eval.run.results import RECORDS, Comparison, Run
from vlmfix.eval.scorers import stats
from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import as_interventions, parse, spec_of, split_methods, with_accelerator

if TYPE_CHECKING:
    from vlmfix.eval.run.progress import Progress
    from vlmfix.eval.run.workers import Workers


@dataclass(frozen=True)
class Task:
    """What to evaluate. `None` is the protocol's value, or without a protocol the default that is named here.

    It is kept with the answers, as `task` in `run.json`; `evaluate(Task.from_json(...))` of it goes on with them.
    """

    model: str = "organism"
    """An embedded model, a Hub id, or a folder."""
    methods: str | Sequence[Any] = ("none", "var", "vhr")
    """Methods, as a text with commas or as a list: of texts such as `var:p=0.4`, of interventions, of tuples of both.
    Kept as texts."""
    benchmarks: str | Sequence[str] = ()
    """Names of benchmarks, as a text with commas or as a list; none are the protocol's, else chair and pope."""
    protocol: str | None = None
    """Name of a published set-up, such as `pai-512`. All that is given here overrides it."""
    speed: str | None = None
    """An accelerator to put beside each method."""
    controls: bool = False
    """Whether to add each method's negative controls."""
    data: str | None = None
    """Pictures: a name (`organism`, `photos`, `coco`, ...), a folder, or `hf:NAME` from the Hub. Default: organism."""
    images: str | None = None
    """Folder of the pictures, where they do not come with the data."""
    which: str | None = None
    """Which pictures: a name such as `first500`, or a file of ids."""
    questions: str | None = None
    """File, for MME folder, with the questions."""
    limit: int | None = None
    """Only the first pictures; for trying out."""
    output: str = "runs"
    """Folder for answers and settings."""
    batch_size: int = 32
    """Questions that are asked at once."""
    max_new_tokens: int | None = None
    """Tokens that an answer may have. Default: the benchmark's."""
    prompt: str | None = None
    """What to ask; `{question}` is where a benchmark's own question goes. Default: the benchmark's."""
    template: str | None = None
    """Text around prompt and picture: `model`, the processor's own, is the default; or one of `protocols.TEMPLATES`."""
    decoding: str | None = None
    """`greedy`, `beam5`, `sample`, `sample:temperature=1,top_p=0.9` or `checkpoint`. Default: greedy."""
    seed: int | None = None
    """Of sampling. Default: 0."""
    variant: str | None = None
    """How captions are read, a variant of CHAIR. Default: rohrbach."""
    parser: str | None = None
    """How answers to yes/no questions are read. Default: the benchmark's."""
    similarity: str | None = None
    """When two nouns of AMBER's descriptions are taken for one. Default: off."""
    beside: bool = False
    """Whether to start a new run beside an unfinished one that was asked otherwise."""
    dtype: str | None = None
    """float32, bfloat16 or float16. Default: the checkpoint's own."""
    device_map: str | None = None
    """Passed to `from_pretrained`."""
    quantize: str | None = None
    """`8bit` or `4bit`."""

    def __post_init__(self) -> None:
        methods = split_methods(self.methods) if isinstance(self.methods, str) else self.methods
        names = self.benchmarks.split(",") if isinstance(self.benchmarks, str) else self.benchmarks
        object.__setattr__(self, "methods", tuple(_as_text(method) for method in methods))
        object.__setattr__(self, "benchmarks", tuple(name.strip() for name in names if name.strip()))
        object.__setattr__(self, "output", str(self.output))

    def to_json(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Task:
        """The way back from `to_json`. `ValueError` names a field that there is not."""
        known = [field.name for field in fields(cls)]
        unknown = [key for key in data if key not in known]
        if unknown:
            raise ValueError(f"a task has no {unknown[0]!r}; it has {', '.join(known)}")
        return cls(**data)

    @property
    def scoring(self) -> dict[str, str]:
        """How the answers to each benchmark are to be judged, where that was said."""
        return scoring_by_benchmark(self.variant, self.parser, self.similarity)

    def resolved(self) -> Task:
        """The same with all that a protocol or the defaults fill in, but for the template: that is up to the processor.

        Raises:
            ValueError: the protocol is unknown, or does not go with the benchmarks or without pictures.
        """
        protocol = find_protocol(self.protocol)
        _check_pictures_of(protocol, self)
        names = self.benchmarks or ((protocol.benchmark,) if protocol else ("chair", "pope"))
        if protocol is not None and names != (protocol.benchmark,):
            raise ValueError(f"protocol {protocol.name} is of {protocol.benchmark}; leave out --benchmark")
        data = self.data or ("coco" if protocol or self.which else "organism")
        of_coco = protocol is not None and data == "coco"
        return replace(
            self,
            benchmarks=names,
            data=data,
            which=protocol.images if protocol and of_coco and self.which is None else self.which,
            max_new_tokens=self.max_new_tokens or (protocol.max_new_tokens if protocol else None),
            prompt=protocol.prompt if protocol and self.prompt is None else self.prompt,
            decoding=self.decoding or (protocol.decoding if protocol else "greedy"),
            seed=self.seed if self.seed is not None else (protocol.seed if protocol else 0),
        )


def _as_text(method: Any) -> str:
    """A method as text. What is text stays as it is: it is read when it is used."""
    return method.strip() if isinstance(method, str) else spec_of(as_interventions(method))


def _check_pictures_of(protocol: Protocol | None, task: Task) -> None:
    if protocol is not None and task.data is None and task.images is None:
        raise ValueError(
            f"protocol {protocol.name} asks about photos of COCO val2014: name their folder with --images "
            f"({WHERE['coco']}), or try it on other pictures, such as --data organism"
        )


@dataclass(frozen=True)
class Setup:
    """A task whose parts are found and checked, all but the model."""

    task: Task
    """Resolved."""
    benches: Sequence[Benchmark]
    methods: Sequence[tuple[Intervention, ...]]
    data: Data

    def answer(
        self,
        loaded: tuple[Any, Any] | None = None,
        progress: Progress | None = None,
        command: str | None = None,
        workers: Workers | None = None,
    ) -> list[Run]:
        """Ask all questions under all methods; what is on disk already is not asked again. See `evaluate`."""
        from vlmfix.asking.identity import model_identity
        from vlmfix.eval.run.runner import answer_each
        from vlmfix.eval.run.workers import Workers

        task = self.task
        model, processor = loaded or load(task)
        who = model_identity(model)
        runs: list[Run] = []
        for bench in self.benches:
            runs += answer_each(
                model,
                processor,
                self.methods,
                bench,
                self.data,
                Path(task.output),
                batch_size=task.batch_size,
                max_new_tokens=task.max_new_tokens,
                decoding=task.decoding or "greedy",
                template=_template(task, processor),
                seed=task.seed or 0,
                protocol=task.protocol,
                beside=task.beside,
                progress=progress,
                command=command,
                workers=workers or Workers.found(),
                task=task.to_json(),
                who=who,
            )
        return runs


def prepare(task: Task) -> Setup:
    """Find and check whatever can be without a model, so that mistakes are told before one is loaded.

    Raises:
        ValueError: an unknown name, a setting out of its range, choices that do not go together, missing annotations or
            questions. One sentence says what was expected.
    """
    chosen = task.resolved()
    protocol = find_protocol(chosen.protocol)
    first_scoring = protocol.scoring[0] if protocol else None
    benches = [benchmark(name, chosen.scoring.get(name, first_scoring), chosen.prompt) for name in chosen.benchmarks]
    methods = [parse(text) for text in chosen.methods]
    if chosen.controls:
        for method in tuple(methods):
            methods += controls_of(method)
    methods = with_accelerator(methods, chosen.speed, chosen.controls)
    if not benches or not methods:
        raise ValueError("nothing to do: give at least one benchmark and one method")
    data = _data(chosen)
    for bench in benches:
        bench.items(data)
        bench.check(data)
    generation(chosen.decoding or "greedy")
    return Setup(chosen, benches, methods, data)


def _data(task: Task) -> Data:
    name = task.data or "organism"
    if name.startswith("hf:"):
        from vlmfix.eval.pictures.hub import fetch

        name = str(fetch(name, task.benchmarks))
    return Data.load(name, task.limit, task.which, task.images, task.questions)


def load(task: Task) -> tuple[Any, Any]:
    """The model and processor of a task."""
    from vlmfix.model import loading

    return loading.load(task.model, **loading.load_options(task.dtype, task.device_map, task.quantize))


def _template(task: Task, processor: Any) -> str:
    """The template that was chosen, else the protocol's if the model marks pictures as LLaVA-1.5 does."""
    if task.template is not None:
        return task.template
    protocol = find_protocol(task.protocol)
    fits = getattr(processor, "image_token", None) == "<image>"
    return protocol.template if protocol and fits else MODEL


def evaluate(
    task: Task,
    *,
    loaded: tuple[Any, Any] | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    workers: Workers | None = None,
) -> list[Run]:
    """Ask all questions of a task under each of its methods. Called again, it goes on where it was interrupted.

    Args:
        task: What to evaluate.
        loaded: A model and its processor, where they are at hand; `task.model` is loaded otherwise.
        progress: Is told how far each run is.
        command: How the user can go on after an interruption; kept with the run.
        workers: The processes that share the work; those of `accelerate launch` are found without it.

    Returns:
        A run for each benchmark and method: its folder, its settings, its answers.

    Raises:
        ValueError: the task cannot be done as it is; one sentence says why, and what was expected.
    """
    return prepare(task).answer(loaded, progress, command, workers)


def compare(
    runs: Iterable[Run | str | os.PathLike[str]],
    *,
    benchmark: str | None = None,
    options: FileOptions | None = None,
    baseline: str | os.PathLike[str] | None = None,
    n_resamples: int = stats.RESAMPLES,
) -> list[Comparison]:
    """Score runs, or files of answers that somebody else has made, and compare each with a baseline.

    Args:
        runs: Runs or their folders, which are compared with the untouched model. With `benchmark`: any files of
            captions or answers to it, compared with the first one or with `baseline`.
        benchmark: What the files answer.
        options: How answers are scored (`variant`, `parser`, `similarity`), and for files what they belong to.
        baseline: The file that others are compared with.
        n_resamples: How often the bootstrap draws pictures.

    Returns:
        A comparison for each benchmark, model, set of pictures and way of scoring. Files of captions on COCO's pictures
        are scored by both CHAIRs, `rohrbach` and `opera`, if no variant is given.

    Raises:
        ValueError: a run or file cannot be read or scored, or an option is unknown or does not apply.
    """
    options = options or FileOptions()
    if benchmark is not None:
        files = [run.folder if isinstance(run, Run) else run for run in runs]
        every_way = [replace(options, variant=variant) for variant in _variants(benchmark, options)]
        return [compare_files(files, benchmark, way, baseline, n_resamples) for way in every_way]
    _check_options_of_runs(options, baseline)
    scoring = scoring_by_benchmark(options.variant, options.parser, options.similarity)
    return results.compare([_as_run(run) for run in runs], n_resamples, scoring)


def _variants(benchmark: str, options: FileOptions) -> Sequence[str | None]:
    """How captions in files are read: on COCO's pictures in both ways that papers call CHAIR, if none is chosen."""
    own_truth = options.truth not in (None, "coco") or options.synonyms is not None
    if benchmark != "chair" or options.variant is not None or own_truth:
        return [options.variant]
    return ["rohrbach", "opera"]


def _check_options_of_runs(options: FileOptions, baseline: object) -> None:
    of_files = {**asdict(options), "variant": None, "parser": None, "similarity": None, "baseline": baseline}
    misplaced = [name for name, value in of_files.items() if value is not None]
    if misplaced:
        raise ValueError(f"{', '.join(misplaced)}: only with --benchmark, for files that are no runs of `vlmfix eval`")


def _as_run(run: Run | str | os.PathLike[str]) -> Run:
    if isinstance(run, Run):
        return run
    path = Path(run)
    if path.is_file() and path.name != RECORDS:
        raise ValueError(f"{path} is no run of `vlmfix eval`; to score captions or answers in a file, add --benchmark")
    return Run.read(path)
