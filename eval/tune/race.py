"""The race of candidates: successive halving over pictures that grow in number, by paired differences.

Every round asks about pictures that no round before it has asked about; what is known of a candidate are its answers to
all of them, against the untouched model's to the same. A candidate leaves when its whole interval is beyond a limit or
behind the leader's, or when others are ahead and the budget asks for it. Answers are run folders of `vlmfix eval`: a
race that was killed goes on where it was.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmfix.asking.identity import model_identity
from vlmfix.eval.benchmarks.benchmark import Benchmark
from vlmfix.eval.pictures.data import Data, OriginalFolder
from vlmfix.eval.run.progress import Progress
from vlmfix.eval.run.results import Run
from vlmfix.eval.run.runner import answer_each
from vlmfix.eval.run.workers import Workers
from vlmfix.eval.scorers import stats
from vlmfix.eval.tune.goal import RESAMPLES, Goal, Trial, Verdict
from vlmfix.eval.tune.space import Candidate
from vlmfix.method.intervention import Intervention

KEEP = 3
"""One of so many candidates goes on to the next round."""


@dataclass(frozen=True)
class Block:
    """Some of the pictures, with the questions about them."""

    bench: Benchmark
    data: Data
    pictures: tuple[str, ...]

    @property
    def n_questions(self) -> int:
        """About these pictures."""
        return len(self.bench.items(self.data))


@dataclass
class Course:
    """Where candidates run: a model, a benchmark, and the pictures in blocks."""

    model: Any
    processor: Any
    blocks: list[Block]
    """Of each round; no picture is in two of them."""
    folder: Path
    batch_size: int = 32
    max_new_tokens: int | None = None
    template: str = "model"
    progress: Progress | None = None
    workers: Workers = field(default_factory=Workers)
    command: str = ""
    expected: int = 0
    """Answers in all, as far as that is known."""

    answers: int = 0
    """So far, those found on disk among them."""
    seconds: float = 0.0
    """That the model took for them, by their records."""
    bases: dict[int, Trial] = field(default_factory=dict)
    """The untouched model's answers to each block."""

    def __post_init__(self) -> None:
        self.who = model_identity(self.model)

    def run(self, methods: Sequence[Intervention], block: int) -> Run:
        """Ask about a block. `ValueError` where the methods cannot be in force."""
        (run,) = answer_each(
            self.model,
            self.processor,
            [methods],
            self.blocks[block].bench,
            self.blocks[block].data,
            self.folder / f"block{block}",
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            template=self.template,
            beside=True,
            progress=self._shown(self.blocks[block].n_questions),
            command=self.command,
            workers=self.workers,
            who=self.who,
        )
        self.answers += len(run.records)
        self.seconds += sum(record["seconds"] for record in run.records)
        return run

    def ask(self, trial: Trial, block: int) -> None:
        """Ask a candidate about a block."""
        run, part = self.run(trial.candidate.methods, block), self.blocks[block]
        said = {record["id"]: part.bench.said(record) for record in run.records}
        trial.add(part.bench.score(part.data, said), run.records)

    def base(self, blocks: Sequence[int]) -> Trial:
        """The untouched model on some blocks."""
        whole = Trial(Candidate((), "none"))
        for block in blocks:
            if block not in self.bases:
                self.bases[block] = Trial(Candidate((), "none"))
                self.ask(self.bases[block], block)
            part = self.bases[block]
            whole.images += part.images
            for name, column in part.counts.items():
                whole.counts[name] = np.concatenate([whole.counts.get(name, np.zeros(0)), column])
            whole.passes += part.passes
            whole.tokens += part.tokens
        return whole

    def _shown(self, n: int) -> Progress | None:
        """Progress of the whole tuning, for what is asked now."""
        tell, answers = self.progress, self.answers
        if tell is None:
            return None
        total = max(self.expected, answers + n)
        return lambda label, done, _, figure: tell("answers", answers + done, total, "")

    @property
    def seconds_per_answer(self) -> float:
        """So far."""
        return self.seconds / self.answers if self.answers else 0.0


@dataclass
class Race:
    """All trials of one tuning."""

    course: Course
    goal: Goal
    trials: list[Trial] = field(default_factory=list)
    asked: dict[int, int] = field(default_factory=dict)
    """Trial, by its place -> blocks that it was asked about, from the first on."""
    verdicts: dict[tuple[int, int], Verdict] = field(default_factory=dict)
    """Trial and number of its pictures -> verdict."""

    def enter(self, candidates: Sequence[Candidate]) -> list[Trial]:
        """New trials, of candidates that did not run yet."""
        known = {trial.candidate.label for trial in self.trials}
        new = []
        for candidate in candidates:
            if candidate.label not in known:
                known.add(candidate.label)
                new.append(Trial(candidate))
        self.trials += new
        return new

    def round(self, trials: Sequence[Trial], block: int, budget: float) -> None:
        """Ask trials about all blocks up to this one, as many as the budget (answers) allows, in their order."""
        before = self.course.answers
        for trial in trials:
            needed = [each for each in range(block + 1) if each >= self._n_blocks(trial)]
            n_answers = sum(self.course.blocks[each].n_questions for each in needed)
            if not needed or trial.out:
                continue
            if self.course.answers - before + n_answers > budget:
                trial.out = "not tried: the budget" if not trial.n else "behind when the budget came"
                continue
            for each in needed:
                try:
                    self.course.ask(trial, each)
                except (ValueError, TypeError) as error:
                    trial.out = f"cannot be: {error}"
                    break
                self.asked[id(trial)] = each + 1
                if self.verdict(trial).surely_broken == ("cost",):
                    break
        self._drop_the_hopeless()

    def _n_blocks(self, trial: Trial) -> int:
        return self.asked.get(id(trial), 0)

    def verdict(self, trial: Trial) -> Verdict:
        """A trial against the untouched model."""
        key = (id(trial), trial.n)
        if key not in self.verdicts:
            self.verdicts[key] = self.goal.verdict(trial, self.course.base(range(self._n_blocks(trial))))
        return self.verdicts[key]

    def standing(self, trials: Sequence[Trial] | None = None) -> list[Trial]:
        """Trials that are in, the most hopeful first."""
        ran = [trial for trial in (self.trials if trials is None else trials) if trial.n and not trial.out]
        return sorted(ran, key=lambda trial: self.verdict(trial).hope)

    def cut(self, trials: Sequence[Trial], n: int) -> list[Trial]:
        """The most hopeful n go on; the others are out."""
        ranked = self.standing(trials)
        for trial in ranked[n:]:
            trial.out = f"behind after {trial.n} pictures"
        return ranked[:n]

    def drop_the_beaten(self) -> None:
        """Out with those whose whole interval is behind the leader's on the same pictures."""
        ranked = self.standing()
        leader = next((trial for trial in ranked if not self.verdict(trial).broken), None)
        for trial in ranked:
            if leader is not None and trial is not leader and self._behind(trial, leader):
                trial.out = f"behind {leader.candidate.title}, interval and all, after {trial.n} pictures"

    def _drop_the_hopeless(self) -> None:
        """Out with those whose whole interval is beyond a limit."""
        for trial in self.standing():
            surely = self.verdict(trial).surely_broken
            if surely:
                trial.out = f"{', '.join(surely)} beyond the limit, interval and all, after {trial.n} pictures"

    def _behind(self, trial: Trial, leader: Trial) -> bool:
        metric = {"it": self.goal.bench.metrics[self.goal.objective]}
        difference = stats.differences(
            trial.counts, trial.images, leader.counts, leader.images, metric, RESAMPLES
        )["it"]  # fmt: skip
        if difference.low is None or difference.high is None:
            return False
        return difference.low > 0 if self.goal.sign > 0 else difference.high < 0


def blocks_of(bench: Benchmark, data: Data, sizes: Sequence[int], seed: int, folder: Path) -> list[Block]:
    """Pictures, drawn by the seed, in blocks of so many each. `folder` is where lists of them are written."""
    items = bench.items(data)
    pictures = list(dict.fromkeys(item.image for item in items))
    random.Random(seed).shuffle(pictures)
    blocks = []
    for number, size in enumerate(sizes):
        taken, pictures = pictures[:size], pictures[size:]
        blocks.append(Block(*_restricted(bench, data, set(taken), folder / f"block{number}.txt"), tuple(taken)))
    return blocks


def _restricted(bench: Benchmark, data: Data, pictures: set[str], file: Path) -> tuple[Benchmark, Data]:
    """Questions about some of the pictures: by a list of these, or where data knows no pictures, by their questions."""
    if isinstance(data, OriginalFolder):
        items = [item for item in bench.items(data) if item.image in pictures]
        part = copy.copy(bench)
        part.__dict__["items"] = lambda data: items
        return part, data
    keys = [key for key, path in data.images.items() if str(path) in pictures]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{key}\n" for key in keys))
    return copy.copy(bench), replace(data, which=str(file.resolve()), limit=None)


def growing(n: int, rounds: int = 4, least: int = 12) -> list[int]:
    """Sizes of blocks for n pictures: each about twice as large as the one before; fewer blocks where the first would
    have less than `least`."""
    while rounds > 2 and n < least * (2**rounds - 1):
        rounds -= 1
    unit = n / (2**rounds - 1)
    sizes = [max(1, math.floor(unit * 2**k)) for k in range(rounds - 1)]
    return [*sizes, n - sum(sizes)]
