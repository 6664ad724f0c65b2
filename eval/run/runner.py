"""Ask a benchmark's questions: batched, one line per finished answer, resumable."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers

import vlmfix
from vlmfix.asking.asker import Asker
from vlmfix.asking.batch import quiet
from vlmfix.asking.identity import model_identity, processor_digest
from vlmfix.asking.pictures import PictureError
from vlmfix.asking.record import Record
from vlmfix.engine.decoding import decoding_of
from vlmfix.eval.benchmarks.benchmark import Benchmark, Item
from vlmfix.eval.benchmarks.questions import YesNo
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run import folders
from vlmfix.eval.run.batches import answered_batches, share_of
from vlmfix.eval.run.progress import Progress, RunningFigure
from vlmfix.eval.run.protocols import MODEL, TEMPLATES, generation
from vlmfix.eval.run.refusals import check_pictures, refuse_own_pictures, refuse_right_answers
from vlmfix.eval.run.results import RECORDS, Run, items_digest, pictures_digest
from vlmfix.eval.run.sharing import CheckedSharing
from vlmfix.eval.run.workers import Workers
from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import spec_of
from vlmfix.method.settings import did_you_mean


def answer_all(
    model: Any,
    processor: Any,
    interventions: Sequence[Intervention],
    bench: Benchmark,
    data: Data,
    out: Path,
    **options: Any,
) -> Run:
    """`answer_each` for one method."""
    return answer_each(model, processor, [interventions], bench, data, out, **options)[0]


def answer_each(
    model: Any,
    processor: Any,
    methods: Sequence[Sequence[Intervention]],
    bench: Benchmark,
    data: Data,
    out: Path,
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    decoding: str = "greedy",
    template: str = MODEL,
    seed: int = 0,
    protocol: str | None = None,
    beside: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
    workers: Workers | None = None,
    task: dict[str, Any] | None = None,
    who: dict[str, Any] | None = None,
) -> list[Run]:
    """Answer every question of a benchmark under each of several methods; what is on disk already is not asked again.

    The run folder is `out/<benchmark>/<model>/<method>-<hash>`; the hash covers all that could change an answer, so
    that different settings never share a folder. Each batch is written and flushed before the next is asked. A question
    that cannot be asked, because its picture cannot be read or the processor refuses it, is noted in `errors.jsonl` of
    the run folder and asked again when the run goes on; where no question can be, the first error is raised. Several
    processes may share the questions (`workers`); what they leave is what one process would have left. Sampled answers
    are asked one by one, each with a seed of its own, so that they depend on nothing but `seed` and the question.
    Methods that leave the pass over a picture as it is (`leaves_pictures`) take turns within each batch of yes/no
    questions and share that pass; the others follow, one after another. Answers are those of each method alone.
    `task` is what the user asked for (`vlmfix.eval.api.Task`); it is kept with the run and decides nothing. `who` is
    the model's identity, where the caller has just found it: it takes a second a gigabyte.

    Raises:
        ValueError: pictures are missing, or the same method has an unfinished run here that was asked otherwise: the
            message says what differs. `beside` starts another run beside it.
    """
    refuse_right_answers(methods)
    workers = workers or Workers()
    items = bench.items(data)
    untouched = Asker(model, processor)
    decoding_settings = _generation(model, decoding)
    identity = {
        "benchmark": bench.name,
        "protocol": protocol,
        "asking": bench.asking,
        **(who or model_identity(model)),
        "method": [],
        "method_digest": None,
        "data": data.name,
        "data_digest": data.digest,
        "items_digest": items_digest(items),
        "pictures_digest": pictures_digest(items),
        "limit": data.limit,
        "max_new_tokens": _budget(model, items, max_new_tokens or bench.max_new_tokens),
        "template": template,
        "decoding": decoding,
        "generation": {},
        "seed": seed,
        "vlmfix": vlmfix.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    settings = {"max_new_tokens": identity["max_new_tokens"], **decoding_settings}
    identity["generation"] = json.loads(json.dumps(decoding_of(model, quiet(settings)).settings, default=str))
    plan = _Plan(bench, settings, seed, 1 if settings["do_sample"] else batch_size, workers)
    parent = out / bench.name / Path(str(identity["model"])).name
    folder_of: dict[int, Path] = {}
    with untouched.applied(), _templated(processor, template):
        identity["processor_digest"] = processor_digest(processor)
        may_share = isinstance(bench, YesNo) and untouched.can_share(settings)
        for group in _groups(methods, may_share):
            header = {"label": "", "fingerprint": "", "n": len(items), "identity": identity, "data": data.spec}
            header |= {"environment": _environment(model, batch_size, command), "task": task}
            courses: dict[Path, _Course] = {}
            for i in group:
                asker = Asker(model, processor, methods[i])
                refuse_own_pictures(methods[i], [method["facts"] for method in asker.methods], items)
                course = _Course(asker, spec_of(methods[i]), items, RunningFigure(bench, data), progress)
                folder_of[i] = course.begin(parent, header, beside=beside, writes=workers.rank == 0)
                courses.setdefault(folder_of[i], course)  # the same method given twice is asked once
            workers.wait()  # everyone has seen what is done before anyone adds to it
            unanswered = _unanswered(list(courses.values()), items)
            check_pictures([item for some in unanswered.values() for item in some], data.where or bench.where)
            for course in courses.values():
                course.show()
            failures = _ask(courses, unanswered, plan)
            workers.wait()
            if workers.rank == 0:
                for folder in courses:
                    folders.merge(folder, items)
            workers.wait()
            if failures.first is not None and not any(folders.answers_in(folder) for folder in courses):
                raise failures.first
    return [Run.read(folder_of[i]) for i in range(len(methods))]


@dataclass(frozen=True)
class _Plan:
    """How the questions of a benchmark are asked, whatever the method."""

    bench: Benchmark
    settings: dict[str, Any]
    """Of `generate`."""
    seed: int
    batch_size: int
    workers: Workers


UNEXPLAINED = 8
"""As many questions may fail for a reason that is not their picture before the first is answered."""


@dataclass
class _Failures:
    """Questions that cannot be asked: written into the run folders, and passed over."""

    rank: int
    asking: list[Path] = field(default_factory=list)
    """Folders of the courses that are asking."""
    of_folder: dict[Path, dict[str, dict[str, str]]] = field(default_factory=dict)
    first: Exception | None = None
    any_answer: bool = False
    """Whether any question was answered; if none is, the fault does not lie with the questions."""

    def add(self, item: Item, error: Exception) -> None:
        """Write one down. Raises the first error where it seems that every question fails."""
        self.first = self.first or error
        reason = " ".join(str(error).split()) or type(error).__name__
        name = Path(item.image).name
        failure = {"image": name, "prompt": item.prompt, "error": reason if name in reason else f"{name}: {reason}"}
        for folder in self.asking:
            failures = self.of_folder.setdefault(folder, {})
            failures[item.id] = failure
            folders.note_failures(folder, self.rank, failures)
            if not self.any_answer and len(failures) >= UNEXPLAINED and not isinstance(error, PictureError):
                raise self.first


def _ask(courses: Mapping[Path, _Course], unanswered: Mapping[tuple[int, ...], list[Item]], plan: _Plan) -> _Failures:
    """Ask what is unanswered under the methods of one group, and write each batch into their folders."""
    workers = plan.workers
    records_file = RECORDS if workers.n == 1 else f"records.{workers.rank}.jsonl"
    in_order, paths = list(courses.values()), list(courses)
    failures = _Failures(workers.rank, any_answer=any(course.done for course in in_order))
    with ExitStack() as stack:
        if len(in_order) == 1:  # in force for all its questions, without coming off between batches
            stack.enter_context(in_order[0].asker.applied())
        files = [stack.enter_context(folders.appending(folder / records_file)) for folder in courses]
        for places, questions in unanswered.items():
            ask = CheckedSharing([in_order[k].asker for k in places], plan.bench, plan.settings, plan.seed)
            own_questions = share_of(questions, workers)
            failures.asking = [paths[k] for k in places]
            for batch, answers in answered_batches(own_questions, plan.batch_size, ask, failures.add):
                failures.any_answer = True
                for k, records in zip(places, answers, strict=True):
                    in_order[k].add(files[k], batch, records)
    return failures


@dataclass
class _Course:
    """One method on its way through a benchmark: what is on disk, and how the rest gets there."""

    asker: Asker
    label: str
    items: Sequence[Item]
    figure: RunningFigure
    progress: Progress | None
    done: set[str] = field(default_factory=set)
    """Questions with an answer on disk."""

    def begin(self, parent: Path, header: dict[str, Any], *, beside: bool, writes: bool) -> Path:
        """Find the run folder, or make it, and see what it holds. The header lacks what is the method's own."""
        identity = {**header["identity"], "method": self.asker.methods, "method_digest": self.asker.methods_digest}
        own = {"label": self.label, "fingerprint": folders.fingerprint(identity), "identity": identity}
        folder = folders.begin(parent, {**header, **own}, beside=beside, writes=writes)
        on_disk = folders.answers_in(folder)
        self.done = set(on_disk)
        self.figure.add(list(on_disk.values()))
        return folder

    def add(self, file: TextIO, batch: Sequence[Item], records: Sequence[Record]) -> None:
        """Write the answers of a batch."""
        named = []
        for item, record in zip(batch, records, strict=True):
            named.append(replace(record, id=item.id, image=[Path(item.image).name]))
        file.writelines(record.to_json() + "\n" for record in named)
        file.flush()
        self.done.update(item.id for item in batch)
        self.figure.add([vars(record) for record in named])
        self.show()

    def show(self) -> None:
        """Tell how far it is."""
        if self.progress is not None:
            self.progress(f"{self.figure.bench.name} {self.label}", len(self.done), len(self.items), str(self.figure))


def _groups(methods: Sequence[Sequence[Intervention]], may_share: bool) -> list[list[int]]:
    """Methods that are asked in turns, by their places: those that share the pass over a picture, then each other one
    by itself."""
    together, alone = [], []
    for i, method in enumerate(methods):
        if may_share and all(intervention.leaves_pictures for intervention in method):
            together.append(i)
        else:
            alone.append([i])
    return [together, *alone] if together else alone


def _unanswered(courses: Sequence[_Course], items: Sequence[Item]) -> dict[tuple[int, ...], list[Item]]:
    """Places of courses -> the questions that exactly these courses have no answer to."""
    unanswered: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        places = tuple(k for k, course in enumerate(courses) if item.id not in course.done)
        if places:
            unanswered.setdefault(places, []).append(item)
    return unanswered


def _generation(model: Any, decoding: str) -> dict[str, Any]:
    """Settings of `generate` for a way of decoding; the model's own way is written out."""
    settings = generation(decoding)
    if settings["do_sample"] is not None:
        return settings
    config, keys = model.generation_config, (*settings, "temperature", "top_p", "top_k")
    own = {key: getattr(config, key) for key in keys if getattr(config, key, None) is not None}
    return {**own, "do_sample": bool(own.get("do_sample"))}


@contextmanager
def _templated(processor: Any, template: str) -> Iterator[None]:
    """Give the processor another chat template for a while."""
    if template == MODEL:
        yield
        return
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; {did_you_mean(template, [MODEL, *TEMPLATES])}")
    if getattr(processor, "image_token", None) != "<image>":
        raise ValueError(
            f"template {template!r} is of LLaVA-1.5; this model marks pictures in another way: give --template model"
        )
    own = processor.chat_template
    processor.chat_template = TEMPLATES[template]
    try:
        yield
    finally:
        processor.chat_template = own


def _budget(model: Any, items: Sequence[Item], wanted: int) -> int:
    """Tokens that an answer may have: as wanted, less where the model's context is short."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    n_image = getattr(model.config, "image_seq_length", 0) or 0
    longest = max((len(item.prompt) for item in items), default=0)  # a token has at least one character
    return wanted if context is None else max(1, min(wanted, context - n_image - longest - 32))


def _environment(model: Any, batch_size: int, command: str | None) -> dict[str, Any]:
    """What a run was made with and could not change an answer, but for rounding."""
    return {
        "command": command or shlex.join(sys.argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "batch_size": batch_size,
        "attention": model.config._attn_implementation,
        "device": str(model.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
