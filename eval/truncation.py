"""Truncation control: is a method better than saying less?

Captions that say less hallucinate less. So the captions of the unmodified model are cut after 10, 15, ... 120 words and
scored: a curve of CHAIR_S (and F1) over recall that costs no generation. A method's gain is its distance from that
curve at its own recall. It is an oracle control, not a method (the cut is chosen by the labels), and it does not cover
repetition: report `METRICS["repetition"]` beside it.

    base = cut_captions(greedy_captions, coco_truth("opera"), variant="opera")  # once for all methods
    control = truncation_control(base, score_captions(method_captions, coco_truth("opera"), variant="opera"))
    control.status, control.chair_s, control.below_curve
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlmfix.eval.chair import METRICS, CaptionScore, Vocabulary, clusters, counts, score_captions
from vlmfix.eval.stats import Estimate

CUTS: tuple[int | None, ...] = (*range(10, 125, 5), None)
"""After how many white-space separated words captions are cut; None leaves them whole."""
RESAMPLES = 2000
_FIGURES = ("CHAIR_S", "CHAIR_I_unique", "F1", "recall", "words")


def cut(caption: str, words: int | None) -> str:
    """The first words of a caption, joined by blanks; no sentence is mended. None keeps them all."""
    return " ".join(caption.split()[:words])


@dataclass(frozen=True, eq=False)
class CutCaptions:
    """The captions of the unmodified model, scored after each of the `CUTS`. Made by `cut_captions`."""

    variant: str
    """How captions were read, as `vlmfix.eval.chair.label` puts it."""
    images: tuple[int, ...]
    counts: Mapping[str, np.ndarray]
    """Additive counts: name -> (images, cuts)."""

    @property
    def curve(self) -> dict[int | None, dict[str, float]]:
        """CHAIR_S, CHAIR_I_unique, F1, recall and mean words after each cut, over all images."""
        figures = _figures(self.counts, np.ones((1, len(self.images))))
        return {n: {name: float(figures[name][0, at]) for name in _FIGURES} for at, n in enumerate(CUTS)}


def cut_captions(
    captions: Iterable[tuple[int | str | os.PathLike[str], str]],
    truth: Mapping[int, frozenset[str]],
    vocabulary: Vocabulary | None = None,
    variant: str = "rohrbach",
) -> CutCaptions:
    """Cut the captions of the unmodified model after each of the `CUTS`, and score each set.

    Raises:
        ValueError: as `score_captions`; or there is no caption, or no object in any image to compare recall by.
    """

    def score(pairs: Iterable[tuple[int | str | os.PathLike[str], str]]) -> list[CaptionScore]:
        return score_captions(pairs, truth, vocabulary, variant)

    whole = score(captions)
    if not any(scored.truth for scored in whole):
        raise ValueError(f"no object is in any of the {len(whole)} images; expected ground truth to compare recall by.")
    sets = []
    for words in CUTS:
        changed = {s.image_id: text for s in whole if (text := cut(s.caption, words)) != s.caption}
        again = {scored.image_id: scored for scored in score(changed.items())}
        sets.append([again.get(scored.image_id, scored) for scored in whole])
    return CutCaptions(whole[0].variant, tuple(clusters(whole)), _columns(sets))


Status = Literal["inside", "recall above vanilla", "outside"]


@dataclass(frozen=True)
class TruncationControl:
    """A method's captions against the base's, cut to the same recall. Differences are method minus cut base."""

    variant: str
    """How captions were read."""
    images: int
    """Pictures, each with one caption of either."""
    status: Status
    """Where the method's recall lies: on the curve; above the uncut base, which is then what it is compared to; or
    below every cut, where nothing compares."""
    recall: float
    """The method's."""
    cut_chair_s: float | None
    """CHAIR_S of the base cut to that recall."""
    cut_words: float | None
    """N*: mean words of the base's captions cut to that recall."""
    chair_s: Estimate
    """Difference in CHAIR_S, a share; below 0 is better than saying less."""
    chair_i_unique: Estimate
    """Difference in CHAIR_I over unique objects; below 0 is better."""
    f1: Estimate
    """Difference in F1; above 0 is better."""
    outside: float
    """Share of the resamples in which the method's recall is below every cut; the intervals are without them."""

    @property
    def below_curve(self) -> bool:
        """Whether the method hallucinates less than cut captions beyond chance: dCHAIR_S' upper end is below 0."""
        return self.chair_s.high is not None and self.chair_s.high < 0


def truncation_control(
    base: CutCaptions, method: Sequence[CaptionScore], *, resamples: int = RESAMPLES, seed: int = 0
) -> TruncationControl:
    """Compare a method's scores with the captions of the unmodified model, made with the same prompt and decoding.

    Intervals are 95 % percentiles of a paired bootstrap over images; every resample has its own curve and recall.

    Raises:
        ValueError: base and method are of different images or read by different variants.
    """
    method = _matched(base, method)
    n = len(base.images)
    times = np.vstack([np.ones(n), _draws(n, resamples, seed)])  # (1 + resamples, images): as they are, then as drawn
    curve = _figures(base.counts, times)  # (1 + resamples, cuts)
    own = {name: values[:, 0] for name, values in _figures(_columns([method]), times).items()}
    above = own["recall"] > curve["recall"][:, -1]
    outside = own["recall"] < curve["recall"].min(axis=1)
    cut_to = {
        name: np.where(outside, np.nan, np.where(above, curve[name][:, -1], _interpolate(own, curve, name)))
        for name in _FIGURES
    }
    return TruncationControl(
        variant=base.variant,
        images=n,
        status="outside" if outside[0] else "recall above vanilla" if above[0] else "inside",
        recall=float(own["recall"][0]),
        cut_chair_s=_number(cut_to["CHAIR_S"][0]),
        cut_words=_number(cut_to["words"][0]),
        chair_s=_estimate(own["CHAIR_S"] - cut_to["CHAIR_S"]),
        chair_i_unique=_estimate(own["CHAIR_I_unique"] - cut_to["CHAIR_I_unique"]),
        f1=_estimate(own["F1"] - cut_to["F1"]),
        outside=float(outside[1:].sum() / max(resamples, 1)),
    )


def _matched(base: CutCaptions, method: Sequence[CaptionScore]) -> list[CaptionScore]:
    """The method's scores in the order of the base's images."""
    of = {score.image_id: score for score in method}
    if alone := sorted(of.keys() ^ set(base.images)):
        raise ValueError(
            f"{len(alone)} images, such as {alone[0]}, have a caption by only one of base and method; "
            "give both for the same images."
        )
    if others := {score.variant for score in method} - {base.variant}:
        raise ValueError(
            f"the method is scored by {', '.join(sorted(others))}, the base by {base.variant}; score both the same way."
        )
    return [of[image] for image in base.images]


def _draws(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of n images is drawn: (resamples, n)."""
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    cells = drawn + n * np.arange(resamples)[:, None]
    return np.bincount(cells.ravel(), minlength=resamples * n).reshape(resamples, n)


def _columns(sets: Sequence[Sequence[CaptionScore]]) -> dict[str, np.ndarray]:
    """Counts of several sets of captions of the same images: name -> (images, sets)."""
    tables = [counts(scores) for scores in sets]
    return {name: np.stack([table[name] for table in tables], axis=1) for name in tables[0]}


def _figures(columns: Mapping[str, np.ndarray], times: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of each resample: `times` (resamples, images), columns (images, sets) -> (resamples, sets)."""
    sums = {name: times @ column for name, column in columns.items()}
    return {name: METRICS[name](sums) for name in _FIGURES}


def _interpolate(own: Mapping[str, np.ndarray], curve: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A figure of the curve at the method's recall, in each resample. Recall need not rise with every cut."""
    order = np.argsort(curve["recall"], axis=1, kind="stable")
    recalls = np.take_along_axis(curve["recall"], order, axis=1)
    values = np.take_along_axis(curve[name], order, axis=1)
    return np.array([np.interp(*row) for row in zip(own["recall"], recalls, values, strict=True)])


def _estimate(gaps: np.ndarray) -> Estimate:
    """The difference itself, then its resamples; no interval where there is no difference."""
    drawn = gaps[1:][np.isfinite(gaps[1:])]
    if not np.isfinite(gaps[0]) or not len(drawn):
        return Estimate(_number(gaps[0]), None, None)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(gaps[0]), float(low), float(high))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
