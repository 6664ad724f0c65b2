"""Ask a benchmark's questions: batched, one line per finished answer, resumable."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image

import vlmfix
from vlmfix.asking.asking import Record, ask_batch, open_picture, spellings
from vlmfix.asking.prefix import can_share, seen_by_all
from vlmfix.engine.attachment import Attachment, describe
from vlmfix.engine.wrap import in_force
from vlmfix.eval.benchmarks.benchmark import Benchmark, Item
from vlmfix.eval.benchmarks.questions import YesNo
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run.protocols import MODEL, TEMPLATES, generation
from vlmfix.eval.run.results import HEADER, RECORDS, Run, items_digest, read_lines
from vlmfix.eval.scorers import stats
from vlmfix.eval.scorers.yesno import MARGIN
from vlmfix.hooks.lookback import Detector
from vlmfix.method.heads import HeadList, picture_id
from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import spec_of
from vlmfix.method.settings import did_you_mean

Progress = Callable[[str, int, int, str], None]
"""Is told how far a run is: its label, answers on disk, answers in all, and the figure so far."""


@dataclass(frozen=True)
class Workers:
    """The processes that share a run: this one's rank, their number, and a barrier."""

    rank: int = 0
    n: int = 1
    wait: Callable[[], None] = lambda: None

    @classmethod
    def found(cls) -> Workers:
        """Those that `accelerate launch` or torchrun started; this process alone without them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState
        from torch import distributed

        if not distributed.is_initialized():
            # `accelerate launch` keeps one store over its restarts: addresses of dead processes must not be found there
            store, rank, n = next(distributed.rendezvous("env://"))
            attempt = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, store=attempt, rank=rank, world_size=n)
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state.wait_for_everyone)


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
) -> list[Run]:
    """Answer every question of a benchmark under each of several methods; what is on disk already is not asked again.

    The run folder is `out/<benchmark>/<model>/<method>-<hash>`; the hash covers all that could change an answer, so
    that different settings never share a folder. Each batch is written and flushed before the next is asked. Several
    processes may share the questions (`workers`); what they leave is what one process would have left. Sampled answers
    are asked one by one, each with a seed of its own, so that they depend on nothing but `seed` and the question.
    Methods that leave the pass over a picture as it is (`leaves_pictures`) take turns within each batch of yes/no
    questions and share that pass; the others follow, one after another. Answers are those of each method alone.

    Raises:
        ValueError: pictures are missing, or the same method has an unfinished run here that was asked otherwise: the
            message says what differs. `beside` starts another run beside it.
    """
    workers = workers or Workers()
    if told := [one.name for method in methods for one in method if one.traits.uses_answers]:
        raise ValueError(f"{', '.join(told)} with these settings uses the right answers: an upper bound, and no result")
    items = bench.items(data)
    settings = _generation(model, decoding)
    identity = {
        "benchmark": bench.name,
        "protocol": protocol,
        "asking": bench.asking,
        "model": model.config._name_or_path,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights_digest": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "method": [],
        "data": data.name,
        "data_digest": data.digest,
        "items_digest": items_digest(items),
        "limit": data.limit,
        "max_new_tokens": _budget(model, processor, items, max_new_tokens or bench.max_new_tokens),
        "template": template,
        "decoding": decoding,
        "seed": seed,
        "vlmfix": vlmfix.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    settings = {"max_new_tokens": identity["max_new_tokens"], **settings}
    header = {"label": "", "fingerprint": "", "n": len(items), "identity": identity, "data": data.spec}
    parent = out / bench.name / Path(str(identity["model"])).name
    own = RECORDS if workers.n == 1 else f"records.{workers.rank}.jsonl"
    tell = progress or (lambda label, done, total, figure: None)
    folders: dict[int, Path] = {}
    with in_force(model, None), _templated(processor, template):
        sharing = isinstance(bench, YesNo) and can_share(model, settings)
        together = [i for i, method in enumerate(methods) if sharing and all(one.leaves_pictures for one in method)]
        for group in filter(None, (together, *([i] for i in range(len(methods)) if i not in together))):
            courses: dict[Path, _Course] = {}
            header["environment"] = _environment(model, batch_size, command)
            for i in group:
                made = Attachment(model, tuple(methods[i]), processor) if methods[i] else None
                course = _Course(made, spec_of(methods[i]), items, _Running(bench, data), tell)
                folders[i] = course.begin(parent, header, beside, workers.rank == 0)
                courses.setdefault(folders[i], course)
            workers.wait()  # everyone has seen what is done before anyone adds to it
            asked = list(courses.values())
            needs: dict[tuple[int, ...], list[Item]] = {}
            for item in items:
                needs.setdefault(tuple(k for k, one in enumerate(asked) if item.id not in one.done), []).append(item)
            needs.pop((), None)
            _check_pictures([item for left in needs.values() for item in left], data.where or bench.where)
            for one in asked:
                one.show()
            with ExitStack() as stack:
                if len(asked) == 1:
                    stack.enter_context(in_force(model, asked[0].method))
                files = [stack.enter_context(_appending(folder / own)) for folder in courses]
                for need, left in needs.items():
                    ask = _asking(model, processor, bench, [asked[k].method for k in need], settings, seed)
                    size = 1 if settings["do_sample"] else batch_size
                    for batch, answers in _answers(_share(left, workers), size, ask):
                        for k, records in zip(need, answers, strict=True):
                            asked[k].add(files[k], batch, records)
            workers.wait()
            for folder in courses if workers.rank == 0 else ():
                _merge(folder, items)
            workers.wait()
    return [Run.read(folders[i]) for i in range(len(methods))]


@dataclass
class _Course:
    """One method on its way through a benchmark: what is on disk, and how the rest gets there."""

    method: Attachment | None
    label: str
    items: Sequence[Item]
    so_far: _Running
    tell: Progress

    def begin(self, parent: Path, header: dict[str, Any], beside: bool, writes: bool) -> Path:
        """Find the run folder, or make it, and see what it holds. The header lacks what is the method's own."""
        entries = [] if self.method is None else self.method.entries
        _refuse_own_pictures([e.facts for e in entries], self.items)
        identity = {**header["identity"], "method": [describe(e) for e in entries]}
        fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        name = "".join(c if c.isalnum() or c in "._=-" else "_" for c in f"{self.label[:60]}-{fingerprint}")
        folder = parent / name
        header = {**header, "label": self.label, "fingerprint": fingerprint, "identity": identity}
        if not (folder / HEADER).exists():
            if not beside:
                _refuse_other(parent, header)
            folder.mkdir(parents=True, exist_ok=True)
            if writes:
                _write(folder / HEADER, json.dumps(header, indent=2, ensure_ascii=False))
        on_disk = {r["id"]: r for path in _parts(folder) for r in read_lines(path)[0]}
        self.done = set(on_disk)
        self.so_far.add(list(on_disk.values()))
        return folder

    def add(self, file: Any, batch: Sequence[Item], records: Sequence[Record]) -> None:
        """Write the answers of a batch."""
        named = [
            replace(record, id=item.id, image=[Path(item.image).name])
            for item, record in zip(batch, records, strict=True)
        ]
        file.writelines(record.to_json() + "\n" for record in named)
        file.flush()
        self.done.update(item.id for item in batch)
        self.so_far.add([vars(record) for record in named])
        self.show()

    def show(self) -> None:
        """Tell how far it is."""
        self.tell(f"{self.so_far.bench.name} {self.label}", len(self.done), len(self.items), str(self.so_far))


def _generation(model: Any, decoding: str) -> dict[str, Any]:
    """What `generate` is told."""
    settings = generation(decoding)
    if settings["do_sample"] is not None:
        return settings
    own = {key: getattr(model.generation_config, key, None) for key in (*settings, "temperature", "top_p", "top_k")}
    kept = {key: value for key, value in own.items() if value is not None}
    return {**kept, "do_sample": bool(kept.get("do_sample"))}


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


def _share(items: Sequence[Item], workers: Workers) -> list[Item]:
    """The part of the questions that this process asks; those about one picture stay together, in order.

    Large pictures and long prompts come first: neighbours are of like length, so that batches hold little padding, and
    a batch size that is too large for the memory is found out at once.
    """
    pictures: dict[str, list[Item]] = {}
    for item in items:
        pictures.setdefault(item.image, []).append(item)
    longest = sorted(
        pictures.values(), key=lambda asked: (_pixels(asked[0].image), max(len(i.prompt) for i in asked)), reverse=True
    )
    return [item for asked in longest[workers.rank :: workers.n] for item in asked]


def _pixels(path: str) -> int:
    """Of a picture, by the header of its file; 0 where that cannot be read: which is told when it is opened."""
    try:
        with Image.open(path) as picture:
            return picture.width * picture.height
    except OSError:
        return 0


Ask = Callable[[Sequence[Item], Mapping[str, Any]], list[list[Record]]]
"""Asks a batch of items: records of each method. The mapping has the opened picture of each path."""


def _asking(
    model: Any,
    processor: Any,
    bench: Benchmark,
    methods: Sequence[Attachment | None],
    settings: dict[str, Any],
    seed: int,
) -> Ask:
    """How a batch of items is asked under each method. Answers to yes/no questions also tell the first token's
    probabilities.

    Questions about one picture share the pass over it, those of several methods, too. The first batch in which some do
    is asked without sharing, too: should an answer differ, the model cannot share, and all are asked plainly.
    """
    words = None
    if isinstance(bench, YesNo):
        try:
            words = {word: spellings(processor, word) for word in ("yes", "no")}
        except ValueError as error:
            if bench.scoring == MARGIN:
                raise
            warnings.warn(str(error), stacklevel=2)

    with in_force(model, methods[0] or methods[-1]):  # several are alike in this
        trust = None if can_share(model, settings) else False

    def run(batch: Sequence[Item], pictures: Mapping[str, Any], share: bool) -> list[list[Record]]:
        questions = [(pictures[item.image], item.prompt) for item in batch]
        own: dict[str, Any] = {"seed": _seed(seed, batch[0].id)} if settings["do_sample"] else {}
        how: Any = {"first_token": words, "share": share, **settings, **own}
        if share and len(methods) > 1 and (seen := seen_by_all(model, processor, questions, settings, methods)):
            how["share"] = seen
        answers = []
        for method in methods:
            with in_force(model, method):
                answers.append(ask_batch(model, processor, questions, **how))
        return answers

    def ask(batch: Sequence[Item], pictures: Mapping[str, Any]) -> list[list[Record]]:
        nonlocal trust
        answers = run(batch, pictures, trust is not False)
        if trust is None and len({item.image for item in batch}) < len(batch):
            plain = run(batch, pictures, False)
            tokens, plainly = ([[r.token_ids for r in said] for said in ways] for ways in (answers, plain))
            trust = tokens == plainly
            if not trust:
                warnings.warn("questions about one picture cannot share the pass over it on this model", stacklevel=2)
                return plain
        return answers

    return ask


def _seed(seed: int, item: str) -> int:
    return int(hashlib.sha256(f"{seed} {item}".encode("utf-8", "surrogatepass")).hexdigest()[:8], 16)


def _check_pictures(items: Sequence[Item], where: str) -> None:
    missing = [image for image in dict.fromkeys(item.image for item in items) if not Path(image).is_file()]
    if missing:
        raise ValueError(
            f"no such image file: {missing[0]} ({len(missing)} pictures are missing)" + (f"; {where}" if where else "")
        )


def _refuse_other(parent: Path, header: dict[str, Any]) -> None:
    """`ValueError`, with what differs, if the same method has an unfinished run that was asked otherwise."""
    for path in sorted(parent.glob(f"*/{HEADER}")):
        other = Run.read_header(path.parent)
        identity, mine = other["identity"], header["identity"]
        if other["label"] != header["label"] or identity.get("limit") != mine["limit"]:
            continue
        if other["fingerprint"] == header["fingerprint"]:  # begun by another process this moment
            continue
        done = {r["id"] for part in _parts(path.parent) for r in read_lines(part)[0]}
        if len(done) >= other.get("n", 0):
            continue
        keys = [key for key in {**identity, **mine} if identity.get(key) != mine.get(key)]
        diff = "; ".join(f"{key} {_short(identity.get(key))} there, {_short(mine.get(key))} here" for key in keys)
        command = other.get("environment", {}).get("command", "vlmfix eval")
        raise ValueError(
            f"{path.parent} is unfinished ({len(done)} of {other['n']} answers) and was asked otherwise: {diff}. Go on "
            f"with it as it was asked ({command}), delete it, or add --beside to start another run beside it"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:157]}..."


class _Running:
    """The first figure of the answers so far."""

    def __init__(self, bench: Benchmark, data: Data) -> None:
        self.bench, self.data = bench, data
        self.sums: dict[str, Any] = {}

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Count more answers."""
        if not records or not self.bench.running:
            return
        for group in self.bench.score(self.data, {r["id"]: self.bench.said(r) for r in records}):
            for name, total in stats.total(group.counts).items():
                self.sums[name] = self.sums.get(name, 0) + total

    def __str__(self) -> str:
        name = self.bench.running
        if not self.sums:
            return ""
        unit, factor = self.bench.columns[name]
        return f"{name} {factor * float(self.bench.metrics[name](self.sums)):.1f} {unit}".strip()


def _refuse_own_pictures(facts: Sequence[dict[str, Any]], items: Sequence[Item]) -> None:
    """`ValueError` if heads or a detector were chosen on pictures that they are to be judged by."""
    made = [(file, HeadList.load(file).data.get("ids", ())) for file in _files(facts, "head_list")]
    made += [(file, Detector.read(file).ids) for file in _files(facts, "detector")]
    for file, ids in made:
        pictures = {picture_id(path) for path in {item.image for item in items}}
        if same := pictures.intersection(ids):
            raise ValueError(
                f"{file} was made on {len(same)} of the {len(pictures)} pictures that are asked about; heads and "
                f"detectors must not be judged by pictures that they were chosen on: make it on others"
            )


def _files(facts: Sequence[dict[str, Any]], kind: str) -> list[str]:
    return [one[kind]["file"] for one in facts if kind in one]


def _answers(items: Sequence[Item], size: int, ask: Ask) -> Iterator[tuple[Sequence[Item], list[list[Record]]]]:
    """Answers batch by batch; a batch that does not fit into memory is halved, and so are those after it. While one is
    answered, a thread opens the pictures of the next."""
    start = 0
    opening: dict[str, Any] = {}
    with ThreadPoolExecutor(1) as thread:
        while start < len(items):
            batch = items[start : _end_of_batch(items, start, size)]
            ahead = items[start : _end_of_batch(items, start + len(batch), size)]
            paths = dict.fromkeys(item.image for item in ahead)
            opening = {path: opening.get(path) or thread.submit(open_picture, path) for path in paths}
            try:
                answers = ask(batch, {item.image: opening[item.image].result() for item in batch})
            except Exception as error:
                if len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
                size = len(batch) // 2
                warnings.warn(f"out of memory with {len(batch)} questions at once; going on with {size}", stacklevel=2)
                continue
            yield batch, answers
            start += len(batch)


def _end_of_batch(items: Sequence[Item], start: int, size: int) -> int:
    """Where a batch of at most `size` ends: where a picture's questions do, unless they alone are more than that."""
    end = min(start + size, len(items))
    border = end
    while start < border < len(items) and items[border].image == items[border - 1].image:
        border -= 1
    return border if border > start else end


def _parts(folder: Path) -> list[Path]:
    """Files of answers in a run folder: the whole, and pieces that several processes wrote."""
    return sorted(folder.glob("records*.jsonl"))


def _merge(folder: Path, items: Sequence[Item]) -> None:
    """Make one file, in the order of the questions, of what one process or several wrote."""
    pieces = _parts(folder)
    found = {r["id"]: r for path in pieces for r in read_lines(path)[0]}
    ordered = [item.id for item in items if item.id in found]
    if pieces == [folder / RECORDS] and ordered == list(found):
        return
    _write(folder / RECORDS, "\n".join(json.dumps(found[key], ensure_ascii=False) for key in ordered))
    for path in pieces:
        if path.name != RECORDS:
            path.unlink()


@contextmanager
def _appending(path: Path) -> Iterator[Any]:
    """A file of answers, cut back to its last whole line."""
    if path.exists():
        os.truncate(path, read_lines(path)[1])
    with path.open("a", encoding="utf-8") as file:
        yield file


def _write(path: Path, text: str) -> None:
    """Write under a temporary name, then rename, so that no half file is ever read."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", "utf-8")
    temporary.replace(path)


def _budget(model: Any, processor: Any, items: Sequence[Item], wanted: int) -> int:
    """Tokens that an answer may have: as wanted, less where the model's context is short."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    n_image = getattr(model.config, "image_seq_length", 0) or 0
    longest = max((len(item.prompt) for item in items), default=0)  # a token has at least one character
    return wanted if context is None else max(1, min(wanted, context - n_image - longest - 32))


def weights_digest(model: Any) -> str:
    """A hash of the first values of every parameter: tells two models under one name apart, at no cost."""
    h = hashlib.sha256()
    for name, parameter in model.named_parameters():
        h.update(f"{name}{tuple(parameter.shape)}".encode())
        h.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


def _environment(model: Any, batch_size: int, command: str | None) -> dict[str, Any]:
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


class PlainProgress:
    """Progress on stderr for logs: a line at the start, every ten seconds, and at the end of a run."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.last: dict[str, tuple[float, float, int]] = {}

    def __call__(self, label: str, done: int, total: int, figure: str = "") -> None:
        """A `Progress`."""
        now = time.monotonic()
        began, told, first = self.last.setdefault(label, (now, -self.seconds, done))
        if now - told < self.seconds and done < total:
            return
        rate = (done - first) / (now - began) if now > began else 0.0
        left = f", {rate:.1f}/s, {(total - done) / rate:.0f} s left" if rate and done < total else ""
        so_far = f", {figure} so far" if figure and done < total else ""
        sys.stderr.write(f"{label}: {done}/{total}{left}{so_far}\n")
        self.last[label] = (began, now, first)
