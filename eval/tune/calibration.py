"""Heads and settings chosen by the first word of yes/no answers: ACT's head list, ZeroTuning's heads and gamma.

Questions are POPE's, about the objects of annotated pictures: each object that is there is asked for once, and objects
that are absent at random, often seen, or often seen beside it. Figures weigh present and absent objects alike. Nothing
is decoded: one pass per question and candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from vlmfix.asking.asking import spellings
from vlmfix.engine.wrap import wrapped
from vlmfix.eval.benchmarks.benchmark import Item
from vlmfix.eval.benchmarks.pope import Pope
from vlmfix.eval.tune.ablation import logits_at
from vlmfix.eval.tune.ranking import Found, Subject, Tell, Tool, rank
from vlmfix.hooks import ACT, ZeroTuning
from vlmfix.method.heads import Head, HeadList
from vlmfix.method.intervention import Intervention
from vlmfix.model.anatomy import anatomy

GAMMAS = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
"""Tried by ZeroTuning: the authors' 1 to 4, and below 1 ours."""


@dataclass(frozen=True)
class Questions:
    """Yes/no questions with their answers."""

    items: Sequence[Item]
    present: np.ndarray
    """(Q,) bool: the answer is yes."""

    @classmethod
    def of(cls, subject: Subject) -> Questions:
        """POPE's. `ValueError` if the pictures hold too few objects."""
        bench = Pope()
        items = bench.items(subject.data)
        label = {bench.item_id(q): q.label for q in bench.questions(subject.data)}
        return cls(items, np.array([label[item.id] == "yes" for item in items], bool))

    def mean(self, x: np.ndarray) -> float:
        """Of values (Q,), present and absent objects weighing the same."""
        return float((x[self.present].mean() + x[~self.present].mean()) / 2)


class Said(NamedTuple):
    """What a model says first, to Q questions."""

    lean: np.ndarray
    """(Q,) log p(yes) - log p(no), in nats; spellings of a word count together."""
    entropy: np.ndarray
    """(Q,) of the first token, in nats."""
    word: np.ndarray
    """(Q,) the most likely token: 1 yes, -1 no, 0 neither."""


def said(subject: Subject, questions: Questions, label: str, methods: Sequence[Intervention | None]) -> list[Said]:
    """What a model says first under each of several methods; `None` is the untouched model."""
    yes, no = (list(spellings(subject.processor, word)) for word in ("yes", "no"))
    pieces: list[list[list[np.ndarray]]] = [[] for _ in methods]
    for start in range(0, len(questions.items), subject.batch_size):
        subject.tell(label, start, len(questions.items))
        inputs = subject.inputs(questions.items[start : start + subject.batch_size])
        for method, piece in zip(methods, pieces, strict=True):
            with wrapped(subject.model, method):
                logp = logits_at(subject.model, inputs, [-1])[:, 0].double()
            first = logp.argmax(-1)
            lean = logp[:, yes].logsumexp(-1) - logp[:, no].logsumexp(-1)
            word = torch.isin(first, first.new_tensor(yes)).int() - torch.isin(first, first.new_tensor(no)).int()
            piece.append([x.cpu().numpy() for x in (lean, -(logp.exp() * logp).sum(-1), word)])
    subject.tell(label, len(questions.items), len(questions.items))
    return [Said(*map(np.concatenate, zip(*piece, strict=True))) for piece in pieces]


# ---- ACT ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneHead(Tool):
    """ACT in one head at a time: how much further does the model lean to the right answer?"""

    name: ClassVar[str] = "act"
    source: ClassVar[str] = "ours, after the scheme of GATECH-EIC/ACT, which compares accuracies"
    meaning: ClassVar[str] = (
        "gain of the right answer's margin over the wrong one's with ACT in this head alone, in nats"
    )

    method: ACT

    def measure(self, subject: Subject) -> Found:
        """One pass per question and head, and one without ACT."""
        questions, (n_layers, n_heads) = Questions.of(subject), subject.shape
        active, _ = self.method.resolve(subject.model, anatomy(subject.model))
        heads = [(layer, head) for layer in active.layers or () for head in range(n_heads)]
        methods = [replace(self.method, layers=None, head_list=(head,)) for head in heads]
        plain, *edited = said(subject, questions, "calibrate act", [None, *methods])
        sign = np.where(questions.present, 1, -1)
        gain = np.full((len(questions.items), n_layers, n_heads), np.nan)
        for (layer, head), one in zip(heads, edited, strict=True):
            gain[:, layer, head] = sign * (one.lean - plain.lean)
        pictures = list(dict.fromkeys(item.image for item in questions.items))
        at = np.array([pictures.index(item.image) for item in questions.items])
        found = Found.of(pictures, ("absent", "present"), gain, at, questions.present.astype(int))
        found.score = lambda means: (means["absent"] + means["present"]) / 2
        parts = {"absent": gain[~questions.present].mean(0), "present": gain[questions.present].mean(0)}
        found.extra["parts"] = {name: _with_null(part) for name, part in parts.items()}
        found.extra["samples"] = {"absent": int((~questions.present).sum()), "present": int(questions.present.sum())}
        return found


def _with_null(x: np.ndarray) -> list[list[float | None]]:
    return [[None if math.isnan(v) else v for v in row] for row in x.tolist()]


def calibrate_act(model: Any, processor: Any, method: ACT, data: Any, *, batch_size: int = 32, tell: Tell) -> HeadList:
    """A score for every head of the layers that ACT edits; `method` gives its other settings. No head is selected yet.

    Raises `ValueError` if the method brings a head list, or the data gives no questions.
    """
    if method.head_list is not None:
        raise ValueError("leave out head_list: it is what calibration looks for")
    return rank(OneHead(method), model, processor, data, batch_size=batch_size, tell=tell)


# ---- ZeroTuning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """What came of one gamma in some heads."""

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

    def value(self, by: str) -> float:
        """Higher is better."""
        return self.accuracy if by == "accuracy" else -self.entropy


@dataclass(frozen=True)
class Tuned:
    """What ZeroTuning's search found."""

    heads: HeadList
    """Its selected heads are those of the best try."""
    tried: list[Tried]
    best: Tried
    up: int
    """Numbers of heads that help when the first token gets more ..."""
    down: int
    """... and when it gets less, judged by what `probe` does to them."""
    listed: tuple[Head, ...]
    """Heads chosen for that."""


@dataclass(frozen=True)
class OneNumber(Tool):
    """ZeroTuning in one head number at a time, in all layers: does the first token need more, or less?"""

    name: ClassVar[str] = "zerotuning"
    source: ClassVar[str] = "notebook of FeijiangHan/ZeroTuning"
    meaning: ClassVar[str] = "change of the criterion with gamma in this head number alone, in all layers"

    method: ZeroTuning
    by: str = "accuracy"
    """`accuracy` or `entropy`: labelled answers, or (unsupervised) how sure the model is."""
    probe: float = 2.0
    """Gamma of the probe (code)."""

    def measure(self, subject: Subject) -> Found:
        """One pass per question and head number, and one without."""
        questions, (n_layers, n_heads) = Questions.of(subject), subject.shape
        methods = [replace(self.method, gamma=self.probe, head_list=(head,)) for head in range(n_heads)]
        answers = said(subject, questions, "heads", [None, *methods])
        plain, *edited = (_try(questions, one, "one", self.probe).value(self.by) for one in answers)
        scores = np.full((1, n_layers, n_heads), np.nan)
        for layer in range(n_layers) if self.method.layers is None else self.method.layers:
            scores[0, layer] = np.array(edited) - plain
        pictures = list(dict.fromkeys(item.image for item in questions.items))
        return Found(pictures, {"change": scores}, {"change": np.ones(1)})


def _try(questions: Questions, one: Said, heads: str, gamma: float) -> Tried:
    right = one.word == np.where(questions.present, 1, -1)
    means = (questions.mean(x) for x in (right, one.word != 0, one.word == 1, one.entropy))
    return Tried(heads, gamma, *means)


def calibrate_zerotuning(
    model: Any,
    processor: Any,
    method: ZeroTuning,
    data: Any,
    *,
    by: str = "accuracy",
    share: float = 0.4,
    probe: float = 2.0,
    gammas: Sequence[float] = GAMMAS,
    batch_size: int = 32,
    tell: Tell = lambda label, done, total: None,
) -> Tuned:
    """Heads and gamma for ZeroTuning; `method` gives span and layers.

    With `probe` as gamma in one head number at a time, heads turn out to want more or less for the first token. Of the
    kind with more heads, the `share` with the largest effect is listed (at least one); then all `gammas` are tried, in
    these heads and in all heads. Of equal ones the gamma nearest to 1 wins.

    Raises `ValueError` if the method brings heads, if the data gives no questions, or if no head has any effect.
    """
    if method.head_list is not None:
        raise ValueError("leave out head_list: it is what calibration looks for")
    if by not in ("accuracy", "entropy"):
        raise ValueError(f"by: expected accuracy or entropy, got {by!r}")
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and up to 1, got {share}")
    ranked = rank(OneNumber(method, by, probe), model, processor, data, batch_size=batch_size, tell=tell)
    layers = [layer for layer, row in enumerate(ranked.scores) if not math.isnan(row[0])]
    effect = np.array(ranked.scores[layers[0]])
    up, down = (int((side * effect > 0).sum()) for side in (1, -1))
    if not up and not down:
        raise ValueError(
            f"gamma={probe} in no head number changes the {by}; take more pictures, or the other criterion"
        )
    strength = effect if (up, effect.sum()) >= (down, -effect.sum()) else -effect
    numbers = np.argsort(-strength, kind="stable")[: max(1, round(share * max(up, down)))]
    subject = Subject(model, processor, data, batch_size, tell)
    with torch.inference_mode(), wrapped(model, None):
        questions = Questions.of(subject)
        sets: dict[str, Any] = {"listed": tuple(int(h) for h in numbers), "all": None}
        plan = [(name, gamma) for name in sets for gamma in gammas]
        methods = [replace(method, gamma=gamma, head_list=sets[name]) for name, gamma in plan]
        answers = said(subject, questions, "gamma", methods)
    tried = [_try(questions, one, *step) for one, step in zip(answers, plan, strict=True)]
    best = max(tried, key=lambda one: (one.value(by), -abs(math.log(one.gamma))))
    chosen: Iterable[int] = sets[best.heads] or range(len(effect))
    selected: tuple[Head, ...] = tuple((layer, head) for layer in layers for head in chosen)
    settings = {**ranked.settings, "share": share, "heads": best.heads, "gamma": best.gamma}
    extra = {**ranked.extra, "tried": [asdict(one) for one in tried], "up": up, "down": down}
    listed = tuple((layer, head) for layer in layers for head in sets["listed"])
    return Tuned(replace(ranked, selected=selected, settings=settings, extra=extra), tried, best, up, down, listed)
