"""ZeroTuning's heads and gamma: does the first token need more attention, or less, and in which heads?

The search is that of the notebook of FeijiangHan/ZeroTuning, on POPE's questions: gamma in one head number at a time
tells heads of two kinds apart; then gammas are tried in the heads of the more frequent kind, and in all heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch

from vlmfix.asking.asker import Asker
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.tune.measurement import Measurement
from vlmfix.eval.tune.questions import Openings, Questions, openings
from vlmfix.eval.tune.tool import ShowProgress, Subject, Tool, no_progress, rank
from vlmfix.hooks import ZeroTuning
from vlmfix.method.heads import Head, HeadList

GAMMAS = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
"""Tried by default: the authors' 1 to 4, and below 1 ours."""
Criterion = Literal["accuracy", "entropy"]
"""What gammas and heads are judged by: labelled answers, or (unsupervised) how sure the model is."""


@dataclass(frozen=True)
class Trial:
    """What came of one gamma in some heads. Present and absent objects weigh the same."""

    heads: str
    """`listed` or `all`."""
    gamma: float
    accuracy: float
    """Share of right answers, 0..1; an answer that is neither yes nor no is wrong."""
    parsed: float
    """Share of answers that are yes or no."""
    yes: float
    """Share of answers that are yes: always saying yes has a low entropy too."""
    entropy: float
    """Mean, in nats."""

    @classmethod
    def of(cls, questions: Questions, answers: Openings, heads: str, gamma: float) -> Trial:
        """From a model's answers."""
        right_word = np.where(questions.present, 1, -1)
        return cls(
            heads,
            gamma,
            accuracy=questions.mean(answers.word == right_word),
            parsed=questions.mean(answers.word != 0),
            yes=questions.mean(answers.word == 1),
            entropy=questions.mean(answers.entropy),
        )

    def value(self, by: Criterion) -> float:
        """Higher is better."""
        return self.accuracy if by == "accuracy" else -self.entropy


@dataclass(frozen=True)
class OneNumber(Tool):
    """ZeroTuning in one head number at a time, in all layers: does the first token need more, or less?"""

    name: ClassVar[str] = "zerotuning"
    source: ClassVar[str] = "notebook of FeijiangHan/ZeroTuning"

    method: ZeroTuning
    """ZeroTuning's span and layers."""
    by: Criterion = "accuracy"
    probe: float = 2.0
    """Gamma of the probe (code)."""

    @property
    def meaning(self) -> str:
        """What a score is."""
        return "change of the criterion with gamma in this head number alone, in all layers"

    def measure(self, subject: Subject) -> Measurement:
        """One pass per question and head number, and one without."""
        questions, (n_layers, n_heads) = Questions.of(subject), subject.shape
        in_one_number = [replace(self.method, gamma=self.probe, head_list=(head,)) for head in range(n_heads)]
        answers = openings(subject, questions, "heads", [None, *in_one_number])
        untouched, *edited = [Trial.of(questions, a, "one", self.probe).value(self.by) for a in answers]
        scores = np.full((n_layers, n_heads), np.nan)
        for layer in range(n_layers) if self.method.layers is None else self.method.layers:
            scores[layer] = np.array(edited) - untouched
        return Measurement.of_all_pictures(questions.pictures, scores)


@dataclass(frozen=True)
class Tuned:
    """What ZeroTuning's search came to."""

    heads: HeadList
    """Its selected heads are those of the best trial."""
    trials: list[Trial]
    best: Trial
    up: int
    """Numbers of heads that help when the first token gets more ..."""
    down: int
    """... and when it gets less, judged by what `probe` does to them."""
    listed: tuple[Head, ...]
    """Heads chosen for that."""


def calibrate_zerotuning(
    model: Any,
    processor: Any,
    method: ZeroTuning,
    data: Data,
    *,
    by: Criterion = "accuracy",
    share: float = 0.4,
    probe: float = 2.0,
    gammas: Sequence[float] = GAMMAS,
    batch_size: int = 32,
    progress: ShowProgress = no_progress,
) -> Tuned:
    """Heads and gamma for ZeroTuning; `method` gives span and layers.

    With `probe` as gamma in one head number at a time, heads turn out to want more or less for the first token. Of the
    kind with more heads, the `share` with the largest effect is listed (at least one); then all `gammas` are tried, in
    these heads and in all heads. Of equal ones the gamma nearest to 1 wins.

    Raises `ValueError` if the method brings heads, if the data gives no questions, or if no head has any effect.
    """
    if method.head_list is not None:
        raise ValueError("leave out head_list: it is what calibration looks for")
    if by not in get_args(Criterion):
        raise ValueError(f"by: expected accuracy or entropy, got {by!r}")
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and up to 1, got {share}")
    ranked = rank(OneNumber(method, by, probe), model, processor, data, batch_size=batch_size, progress=progress)
    layers = [layer for layer, row in enumerate(ranked.scores) if not math.isnan(row[0])]
    effect = np.array(ranked.scores[layers[0]])  # the same in every layer
    up, down = int((effect > 0).sum()), int((effect < 0).sum())
    if not up and not down:
        raise ValueError(
            f"gamma={probe} in no head number changes the {by}; take more pictures, or the other criterion"
        )
    listed_numbers = frequent_kind(effect, up, down, share)

    subject = Subject(model, processor, data, batch_size, progress)
    trials = try_gammas(subject, method, {"listed": listed_numbers, "all": None}, gammas)
    best = max(trials, key=lambda trial: (trial.value(by), -abs(math.log(trial.gamma))))

    best_numbers = listed_numbers if best.heads == "listed" else tuple(range(len(effect)))
    settings = {**ranked.settings, "share": share, "heads": best.heads, "gamma": best.gamma}
    extra = {**ranked.extra, "tried": [asdict(trial) for trial in trials], "up": up, "down": down}
    heads = replace(ranked, selected=in_layers(layers, best_numbers), settings=settings, extra=extra)
    return Tuned(heads, trials, best, up, down, listed=in_layers(layers, listed_numbers))


def frequent_kind(effect: np.ndarray, up: int, down: int, share: float) -> tuple[int, ...]:
    """The `share` of head numbers with the largest effect, of the more frequent kind: those that want more for the
    first token, or less. Where both are equally many, the kind with the larger effect in sum."""
    wants_more = (up, effect.sum()) >= (down, -effect.sum())
    strength = effect if wants_more else -effect
    n_listed = max(1, round(share * max(up, down)))
    return tuple(np.argsort(-strength, kind="stable")[:n_listed].tolist())


@torch.inference_mode()
def try_gammas(
    subject: Subject, method: ZeroTuning, head_sets: dict[str, tuple[int, ...] | None], gammas: Sequence[float]
) -> list[Trial]:
    """Every gamma in every set of head numbers; `None` is all heads."""
    with Asker(subject.model, subject.processor).applied():
        questions = Questions.of(subject)
        plan = [(heads, gamma) for heads in head_sets for gamma in gammas]
        methods = [replace(method, gamma=gamma, head_list=head_sets[heads]) for heads, gamma in plan]
        answers = openings(subject, questions, "gamma", methods)
    trials = []
    for (heads, gamma), answers_of_trial in zip(plan, answers, strict=True):
        trials.append(Trial.of(questions, answers_of_trial, heads, gamma))
    return trials


def in_layers(layers: Sequence[int], numbers: Sequence[int]) -> tuple[Head, ...]:
    """Heads of these numbers in each of the layers."""
    return tuple((layer, number) for layer in layers for number in numbers)
