"""`vlmfix.tune`: which methods, how strong, for this model? Searched on some pictures, confirmed on others.

    tuned = vlmfix.tune(model, processor, "pictures/", budget="20m")
    tuned.fix.save("fix.json")

1. Pictures are drawn into rounds that grow in number, and a last part that nothing is ever chosen on.
2. Tools rank heads on the first rounds. Candidates are settings that methods name themselves, and head lists with
   gains.
3. Three races: single candidates; sums of the best ones; neighbours of the best. Each starts with few pictures.
4. The best go through all rounds. The winner, the next ones and the winner's negative control are asked about the last
   part; p is adjusted over all that are confirmed there (Holm).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmfix.asking.fix import FixFile, inlined
from vlmfix.asking.identity import model_identity, processor_identity
from vlmfix.eval.benchmarks.benchmark import Benchmark, benchmark
from vlmfix.eval.pictures.data import Data, OriginalFolder
from vlmfix.eval.run.controls import controls_of
from vlmfix.eval.run.progress import Progress
from vlmfix.eval.run.results import Run
from vlmfix.eval.run.workers import Workers
from vlmfix.eval.scorers import stats
from vlmfix.eval.tune.goal import Goal, Limits, Trial, Verdict
from vlmfix.eval.tune.labels import self_labelled
from vlmfix.eval.tune.race import Course, Race, blocks_of, growing
from vlmfix.eval.tune.registry import find_tool
from vlmfix.eval.tune.space import Candidate, neighbours, pairs, singles
from vlmfix.eval.tune.tool import rank
from vlmfix.method.heads import HeadList, picture_id
from vlmfix.method.registry import spec_of

TOOLS = {"visual": 120, "gains": 120, "ablate:see=token": 30, "vhd": 60}
"""Tools that rank heads for a search, and on how many pictures: about as long takes each."""
NEEDS_PLACES = ("visual",)
"""Tools that must know where objects are, which only annotations tell."""
SEARCH, ROUNDS = 0.6, 4
"""Share of the pictures that are searched on, and in how many rounds."""
FINALISTS = 3
"""Candidates that are confirmed."""
SHARES = {"single": 0.35, "pairs": 0.15, "triples": 0.10, "quadruples": 0.10, "neighbours": 0.10, "final": 0.20}
"""Of the budget that confirming leaves: what each race may take, if no race before it left anything."""


@dataclass(frozen=True)
class Budget:
    """How much may be asked: answers, or seconds that the model takes for them."""

    amount: float
    unit: str

    @classmethod
    def read(cls, text: str | int) -> Budget:
        """`20m`, `90s`, `1.5h`, or a number of questions."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(text).strip())
        if not match or float(match[1]) <= 0:
            raise ValueError(f"budget: expected a time such as 20m, 90s or 1h, or a number of questions, got {text!r}")
        seconds = {"s": 1, "m": 60, "h": 3600}
        return cls(float(match[1]) * seconds.get(match[2], 1), "seconds" if match[2] else "answers")

    def left(self, course: Course) -> float:
        """Answers that may still be asked."""
        if self.unit == "answers":
            return self.amount - course.answers
        return (self.amount - course.seconds) / max(course.seconds_per_answer, 1e-9)


@dataclass(frozen=True)
class Confirmed:
    """A finalist, or the winner's control, on the pictures that nothing was chosen on."""

    candidate: Candidate
    trial: Trial
    verdict: Verdict
    p_holm: float | None
    """Of the objective's difference to the untouched model, over all finalists; `None` for the control."""
    run: Run


@dataclass
class Tuned:
    """What tuning found."""

    goal: Goal
    race: Race
    base: Trial
    """The untouched model on the pictures that confirm."""
    finalists: list[Confirmed]
    """The winner first, chosen before any of them was confirmed; empty where nothing was worth confirming."""
    control: Confirmed | None
    fix: FixFile | None
    """`None` where no winner is told apart from the untouched model."""
    labels: str
    """Where the truth came from."""
    seconds: float
    """In all, of this process."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def winner(self) -> Confirmed | None:
        """The candidate that was chosen."""
        return self.finalists[0] if self.finalists else None

    def to_json(self) -> dict[str, Any]:
        """All that was tried and confirmed, JSON-ready."""
        tried = []
        for trial in self.race.trials:
            entry: dict[str, Any] = {"title": trial.candidate.title, "method": trial.candidate.label, "n": trial.n}
            if trial.n:
                entry |= _verdict_json(self.race.verdict(trial))
            tried.append({**entry, "out": trial.out})
        confirmed = [_confirmed_json(each) for each in self.finalists]
        control = None if self.control is None else _confirmed_json(self.control)
        facts = {**self.facts, "labels": self.labels, "seconds": round(self.seconds, 1)}
        return {**facts, "confirmed": confirmed, "control": control, "tried": tried}


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    differences = {name: asdict(difference) for name, difference in verdict.differences.items()}
    return {
        "figures": verdict.figures,
        "differences": differences,
        "cost": verdict.cost,
        "beyond": verdict.broken,
        "score": verdict.score,
    }


def _confirmed_json(each: Confirmed) -> dict[str, Any]:
    candidate = each.candidate
    return {
        "title": candidate.title,
        "method": candidate.label,
        **_verdict_json(each.verdict),
        "p_holm": each.p_holm,
        "folder": str(each.run.folder),
    }


def tune(
    model: Any,
    processor: Any,
    data: str | Data = "calibration",
    *,
    bench: str | Benchmark = "chair",
    limits: Limits | None = None,
    budget: str | int = "20m",
    seed: int = 0,
    bakeable: bool = False,
    decoding: bool = False,
    labels: bool = True,
    output: str | Path = "tuned",
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    template: str = "model",
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
    workers: Workers | None = None,
    command: str = "",
) -> Tuned:
    """Look for the methods that make a model invent least, within limits, and confirm them on other pictures.

    Args:
        model: Is left as it was found.
        processor: Of the model.
        data: Pictures: annotated, or with yes/no questions, or a folder of pictures alone. Never those that results
            are judged by.
        bench: `chair`, or a benchmark of yes/no questions.
        limits: What the fix may cost.
        budget: A time (`20m`) that answers may take, or a number of questions.
        seed: Of the draw of pictures.
        bakeable: Only constant head gains, which can be folded into the weights.
        decoding: Also methods that decode in a way of their own (beams, re-ranking).
        labels: False: do not look at the annotations; ask the model itself what is there.
        output: Folder of answers, head lists and results; a call that was cut off goes on there.
        batch_size: Questions that are asked at once.
        max_new_tokens: Tokens that an answer may have. Default: the benchmark's.
        template: Text around prompt and picture, as for `vlmfix eval`.
        progress: Is told how far each run is.
        say: Is told what begins.
        workers: The processes that share the work.
        command: How the user can go on; kept with the results.

    Returns:
        The fix, and all that it rests on.

    Raises:
        ValueError: the pictures are too few, or cannot be asked about.
    """
    began = time.monotonic()
    out, workers = Path(output), workers or Workers()
    pictures = Data.load(data) if isinstance(data, str) else data
    chosen = benchmark(bench) if isinstance(bench, str) else bench
    allowed = Budget.read(budget)
    own_truth = labels and not (chosen.describes and isinstance(pictures, OriginalFolder))
    if chosen.describes and not own_truth:
        say("no labels: the model is asked about each object that its captions name")
        pictures = self_labelled(
            model, processor, pictures, out / "labels", batch_size=batch_size, seed=seed,
            max_new_tokens=max_new_tokens or 256, progress=progress or _silent,
        )  # fmt: skip
    course = _course(model, processor, chosen, pictures, seed, out, workers)
    course.batch_size, course.max_new_tokens, course.template = batch_size, max_new_tokens, template
    course.progress, course.command = progress, command
    goal = Goal(chosen, limits or Limits())
    race = Race(course, goal)
    head_lists = _head_lists(course, pictures, own_truth, out / "heads", progress or _silent, say)
    _search(race, singles(head_lists, bakeable=bakeable, decoding=decoding), allowed, say)
    most = max((trial.n for trial in race.standing()), default=0)
    went_far = [trial for trial in race.standing() if trial.n == most and race.verdict(trial).score < 0]
    ranked = sorted(went_far, key=lambda trial: race.verdict(trial).score)
    finalists, control, base = _confirm(race, ranked[:FINALISTS], say)
    labels_from = "annotations" if own_truth or not chosen.describes else "the model's own yes and no"
    facts = {
        "model": model.config._name_or_path,
        "benchmark": chosen.title,
        "objective": goal.objective,
        "limits": asdict(goal.limits),
        "data": pictures.spec,
        "pictures": {
            "search": sum(len(b.pictures) for b in course.blocks[:-1]),
            "confirm": len(course.blocks[-1].pictures),
        },
        "budget": str(budget),
        "answers": course.answers,
        "answer_seconds": round(course.seconds, 1),
        "seed": seed,
        "bakeable": bakeable,
        "decoding": decoding,
        "command": command,
    }
    tuned = Tuned(goal, race, base, finalists, control, None, labels_from, time.monotonic() - began, facts)
    tuned.fix = _fix(tuned, model, processor, command)
    if workers.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tune.json").write_text(json.dumps(tuned.to_json(), indent=1, default=str) + "\n", "utf-8")
    return tuned


def _silent(label: str, done: int, total: int, figure: str = "") -> None:
    """Show nothing."""


def _course(model: Any, processor: Any, bench: Benchmark, data: Data, seed: int, out: Path, workers: Workers) -> Course:
    """The pictures in rounds, the part that confirms last."""
    n = len({item.image for item in bench.items(data)})
    n_search = round(SEARCH * n)
    if n < 20:
        raise ValueError(f"expected 20 pictures or more to tune on, got {n}; some hundred are better")
    sizes = [*growing(n_search, ROUNDS), n - n_search]
    blocks = blocks_of(bench, data, sizes, seed, out / "pictures")
    for block in blocks:
        block.bench.check(block.data)
    return Course(model, processor, blocks, out / "runs", workers=workers)


def _head_lists(
    course: Course, data: Data, own_truth: bool, folder: Path, progress: Progress, say: Callable[[str], None]
) -> list[HeadList]:
    """Heads as tools rank them on pictures of the search; kept on disk. Tools that lack something are left out."""
    lists = []
    if isinstance(data, OriginalFolder):
        return []
    searched = [picture for block in course.blocks[:-1] for picture in block.pictures]
    folder.mkdir(parents=True, exist_ok=True)
    for spec, most in TOOLS.items():
        if spec in NEEDS_PLACES and not own_truth:
            continue
        path = folder / f"{re.sub('[^a-z]+', '-', spec)}.json"
        if not path.is_file():
            say(f"ranking heads: {spec}")
            some = set(searched[:most])
            file = folder / f"pictures-{len(some)}.txt"
            file.write_text("".join(f"{key}\n" for key, picture in data.images.items() if str(picture) in some))
            ranked_on = Data.load(**{**data.spec, "limit": None, "which": str(file.resolve())})
            try:
                ranked = rank(
                    find_tool(spec), course.model, course.processor, ranked_on, batch_size=64, progress=progress
                )
                ranked.select(share=1.0).save(path)
            except (ValueError, TypeError) as error:
                say(f"not used to rank heads: {spec}, {error}")
                continue
        lists.append(HeadList.load(path))
    return lists


def _search(race: Race, first: list[Candidate], allowed: Budget, say: Callable[[str], None]) -> None:
    """The races, one after another."""
    course = race.course
    course.base([0])
    confirming = (FINALISTS + 2) * course.blocks[-1].n_questions
    whole = allowed.left(course) - confirming
    course.expected = round(course.answers + whole + confirming)
    if whole < 8 * course.blocks[0].n_questions:
        raise ValueError(
            f"the budget is too small: confirming on {len(course.blocks[-1].pictures)} pictures takes about "
            f"{confirming} answers, and {max(0, whole):.0f} are left for the search; give more, or fewer pictures"
        )
    stages: tuple[tuple[str, Callable[[], list[Candidate]]], ...] = (
        ("single", lambda: first),
        ("pairs", lambda: _sums(race)),
        ("triples", lambda: _sums(race)),
        ("quadruples", lambda: _sums(race)),
        ("neighbours", lambda: _near(race, 4)),
    )
    weights = dict(SHARES)
    for name, candidates in stages:
        left = max(allowed.left(course) - confirming, 0.0)
        share = left * weights[name] / sum(weights.values())  # what a race leaves is for those after it
        del weights[name]
        new = race.enter(candidates())
        say(f"{name}: {len(new)} candidates")
        before = course.answers
        race.round(new, 0, 0.6 * share)
        going_on = race.cut(new, max(4, len(new) // 2))
        race.round(going_on, 1, share - (course.answers - before))
        race.cut(going_on, max(4, len(going_on) // 3))
    last = len(course.blocks) - 2
    for block, n in ((2, 10), (last, 5)) if last > 2 else ((last, 8),):
        race.drop_the_beaten()
        going_on = race.standing()[:n]
        for trial in race.standing()[n:]:
            trial.out = f"behind after {trial.n} pictures"
        say(
            f"final: {len(going_on)} candidates, to {sum(len(b.pictures) for b in course.blocks[: block + 1])} pictures"
        )
        race.round(going_on, block, max(allowed.left(course) - confirming, 0))


SUMS, PARTS, A_KIND = 20, 10, 3
"""Sums that a race tries, single candidates that they are made of, and how many of these may be of one kind."""


def _sums(race: Race) -> list[Candidate]:
    """The best so far and the best single ones together: those sums that should do best if effects add up. A limit that
    is broken alone may be kept beside another method, so parts need not be in the race any more."""
    known = {trial.candidate.title: trial for trial in race.trials if trial.n}
    by_hope = sorted(known.values(), key=lambda trial: race.verdict(trial).hope)
    least = len(race.course.blocks[0].pictures)
    alone: list[Candidate] = []
    for trial in by_hope:
        kinds = [candidate.kinds for candidate in alone]
        single = " + " not in trial.candidate.title and trial.n > least
        if single and kinds.count(trial.candidate.kinds) < A_KIND:
            alone.append(trial.candidate)
    best = [trial.candidate for trial in race.standing()[:PARTS]]

    def expected(candidate: Candidate) -> float:
        parts = [race.verdict(known[title]) for title in candidate.title.split(" + ") if title in known]
        return race.goal.expected(parts)

    tried = {trial.candidate.label for trial in race.trials}
    new = [candidate for candidate in pairs(best, alone[:PARTS]) if candidate.label not in tried]
    return sorted(new, key=expected)[:SUMS]


def _near(race: Race, n: int) -> list[Candidate]:
    near: list[Candidate] = []
    for trial in race.standing()[:n]:
        near += neighbours(trial.candidate)
    return near


def _confirm(
    race: Race, ranked: Sequence[Trial], say: Callable[[str], None]
) -> tuple[list[Confirmed], Confirmed | None, Trial]:
    """Finalists and the first one's control, on pictures that nothing was chosen on."""
    course, goal = race.course, race.goal
    block = len(course.blocks) - 1
    base = course.base([block])
    finalists, p_values = [], []
    say(f"confirming {len(ranked)} candidates on {len(course.blocks[block].pictures)} other pictures")
    for trial in ranked:
        each = _on_others(course, goal, trial.candidate, block, base)
        finalists.append(each)
        p_values.append(each.verdict.differences[goal.objective].p)
    adjusted = stats.holm(p_values)
    finalists = [
        Confirmed(each.candidate, each.trial, each.verdict, p, each.run)
        for each, p in zip(finalists, adjusted, strict=True)
    ]
    control = None
    if finalists:
        controls = controls_of(finalists[0].candidate.methods)
        by_chance = [methods for methods in controls if "random" in spec_of(methods)] or controls
        if by_chance:
            everywhere = _all_by_chance(finalists[0].candidate.methods) or by_chance[0]
            candidate = Candidate(tuple(everywhere), f"control of {finalists[0].candidate.title}")
            control = _on_others(course, goal, candidate, block, base)
    return finalists, control, base


def _all_by_chance(methods: Sequence[Any]) -> tuple[Any, ...]:
    """Every method with its choice by chance, where it has one."""
    return tuple(
        next((control for control in method.controls() if "random" in spec_of([control])), method) for method in methods
    )


def _on_others(course: Course, goal: Goal, candidate: Candidate, block: int, base: Trial) -> Confirmed:
    trial, part = Trial(candidate), course.blocks[block]
    run = course.run(candidate.methods, block)
    said = {record["id"]: part.bench.said(record) for record in run.records}
    trial.add(part.bench.score(part.data, said), run.records)
    return Confirmed(candidate, trial, goal.verdict(trial, base), None, run)


def _fix(tuned: Tuned, model: Any, processor: Any, command: str) -> FixFile | None:
    """The winner as a fix, if it is told apart from the untouched model on the pictures that confirm."""
    winner, goal = tuned.winner, tuned.goal
    if winner is None:
        return None
    difference = winner.verdict.differences[goal.objective]
    if (winner.p_holm or 1.0) >= 0.05 or goal.sign * (difference.value or 0.0) >= 0:
        return None
    course = tuned.race.course
    pictures = [path for block in course.blocks for path in block.pictures]
    evidence = {
        **tuned.facts,
        "labels": tuned.labels,
        "winner": _confirmed_json(winner),
        "control": None if tuned.control is None else _confirmed_json(tuned.control),
    }
    evidence.pop("command", None)
    return FixFile(
        methods=inlined(winner.candidate.methods, model, processor),
        model={**model_identity(model), **processor_identity(processor)},
        evidence=json.loads(json.dumps(evidence, default=str)),
        pictures=tuple(picture_id(path) for path in pictures),
        command=command,
    )


__all__ = ["Limits", "Tuned", "tune"]
