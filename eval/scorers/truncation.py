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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlmfix.eval.scorers.chair import (
    METRICS,
    CaptionScore,
    Vocabulary,
    clusters,
    counts,
    prefix_objects,
    score_captions,
)
from vlmfix.eval.scorers.stats import RESAMPLES, Difference, Estimate, bootstrap_p, interval, number_or_none, resampled

CUTS: tuple[int | None, ...] = (*range(10, 125, 5), None)
"""After how many white-space separated words captions are cut; None leaves them whole."""
_COUNTS = ("captions", "hallucinated_captions", "unique_mentions", "true_unique", "truth", "words")
"""What figures of cut captions are made of."""
_SAME_IN_ALL_CUTS = ("captions", "truth")
_FIGURES = ("CHAIR_S", "CHAIR_I_unique", "F1", "recall", "words")
_COMPARED = {"chair_s": "CHAIR_S", "chair_i_unique": "CHAIR_I_unique", "f1": "F1"}
"""Field of the control -> the figure whose difference it is."""


def cut(caption: str, words: int | None) -> str:
    """The first words of a caption, joined by blanks; no sentence is mended. None keeps them all."""
    return " ".join(caption.split()[:words])


@dataclass(frozen=True, eq=False)
class CutCaptions:
    """The captions of the unmodified model, scored after each of the `CUTS`. Made by `cut_captions`."""

    variant: str
    """How captions were read, as `vlmfix.eval.scorers.chair.label` puts it."""
    images: tuple[int, ...]
    counts: Mapping[str, np.ndarray]
    """Additive counts: name -> (images, cuts)."""

    @property
    def curve(self) -> dict[int | None, dict[str, float]]:
        """CHAIR_S, CHAIR_I_unique, F1, recall and mean words after each cut, over all images."""
        sums = {name: column.sum(axis=0) for name, column in self.counts.items()}
        figures = {name: METRICS[name](sums) for name in _FIGURES}
        curve = {}
        for cut_index, words_kept in enumerate(CUTS):
            curve[words_kept] = {name: float(figures[name][cut_index]) for name in _FIGURES}
        return curve


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
    return cut_scores(score_captions(captions, truth, vocabulary, variant), vocabulary, variant)


def cut_scores(whole: Sequence[CaptionScore], vocabulary: Vocabulary | None, variant: str) -> CutCaptions:
    """The same from captions that are scored already, by this vocabulary and variant."""
    if not any(score.truth for score in whole):
        raise ValueError(f"no object is in any of the {len(whole)} images; expected ground truth to compare recall by.")
    columns = {name: np.zeros((len(whole), len(CUTS))) for name in _COUNTS}
    columns["captions"][:] = 1
    columns["truth"][:] = [[len(score.truth)] for score in whole]
    for row, score in enumerate(whole):
        words, named = score.caption.split(), score.objects
        lengths = [len(words) if words_kept is None else min(words_kept, len(words)) for words_kept in CUTS]
        shorter = [length for length in lengths if length < len(words)]
        objects_of = dict(zip(shorter, prefix_objects(words, shorter, vocabulary, variant), strict=True))
        objects_of[len(words)] = named
        n_named = {length: len(objects) for length, objects in objects_of.items()}
        n_true = {length: len(objects & score.truth) for length, objects in objects_of.items()}
        columns["words"][row] = lengths
        columns["unique_mentions"][row] = [n_named[length] for length in lengths]
        columns["true_unique"][row] = [n_true[length] for length in lengths]
    columns["hallucinated_captions"][:] = columns["true_unique"] < columns["unique_mentions"]
    return CutCaptions(whole[0].variant, tuple(clusters(whole)), columns)


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
    p: Mapping[str, float | None]
    """Bootstrap p of `chair_s`, `chair_i_unique` and `f1`."""

    @property
    def below_curve(self) -> bool:
        """Whether the interval of dCHAIR_S lies below 0. Reports judge several methods together, and more strictly
        (`vlmfix.eval.report.verdicts`)."""
        return self.chair_s.high is not None and self.chair_s.high < 0

    def difference(self, name: str) -> Difference:
        """`chair_s`, `chair_i_unique` or `f1` with its p."""
        gap: Estimate = getattr(self, name)
        return Difference(gap.value, gap.low, gap.high, self.p[name], self.images, 0)


def truncation_control(
    base: CutCaptions, method: Sequence[CaptionScore], *, resamples: int = RESAMPLES, seed: int = 0
) -> TruncationControl:
    """Compare a method's scores with the captions of the unmodified model, made with the same prompt and decoding.

    Intervals are 95 % percentiles of a paired bootstrap over images; every resample has its own curve and recall.

    Raises:
        ValueError: base and method are of different images or read by different variants.
    """
    method = _matched(base, method)
    table = counts(method)
    method_counts = {name: table[name][:, None] for name in _COUNTS}
    curve_blocks, own_blocks = [_figures(_over_all(base.counts))], [_figures(_over_all(method_counts))]
    for curve_sums, own_sums in _resampled(base.counts, method_counts, resamples, seed):
        curve_blocks.append(_figures(curve_sums))
        own_blocks.append(_figures(own_sums))
    # The first row holds the figures of the images themselves, the other rows one resample each.
    curve = {name: np.concatenate([block[name] for block in curve_blocks]) for name in curve_blocks[0]}  # (rows, cuts)
    own = {name: np.concatenate([block[name][:, 0] for block in own_blocks]) for name in own_blocks[0]}  # (rows,)
    above = own["recall"] > curve["recall"][:, -1]
    outside = own["recall"] < curve["recall"].min(axis=1)
    status: Status = "outside" if outside[0] else "inside"
    if above[0]:
        status = "recall above vanilla"
    at_same_recall = {}  # figures of the base, cut to the method's recall
    for name in _COMPARED.values():
        on_curve = np.where(above, curve[name][:, -1], _interpolate(own["recall"], curve["recall"], curve[name]))
        at_same_recall[name] = np.where(outside, np.nan, on_curve)
    gaps = {field: own[name] - at_same_recall[name] for field, name in _COMPARED.items()}
    return TruncationControl(
        variant=base.variant,
        images=len(base.images),
        status=status,
        recall=float(own["recall"][0]),
        cut_chair_s=number_or_none(at_same_recall["CHAIR_S"][0]),
        cut_words=_words_at(base, own["recall"][0], status),
        chair_s=_estimate(gaps["chair_s"]),
        chair_i_unique=_estimate(gaps["chair_i_unique"]),
        f1=_estimate(gaps["f1"]),
        outside=float(outside[1:].sum() / max(resamples, 1)),
        p={field: bootstrap_p(gap[1:]) for field, gap in gaps.items()},
    )


def _words_at(base: CutCaptions, recall: float, status: Status) -> float | None:
    """Mean words of the base's captions, cut to a recall."""
    if status == "outside":
        return None
    curve = list(base.curve.values())
    if status == "recall above vanilla":
        return curve[-1]["words"]
    recalls, words = (np.array([[figures[name] for figures in curve]]) for name in ("recall", "words"))
    return number_or_none(_interpolate(np.array([recall]), recalls, words)[0])


class Against:
    """The unmodified model's captions, for the control of any number of methods on the images that both have."""

    def __init__(
        self,
        base: Sequence[CaptionScore],
        vocabulary: Vocabulary | None = None,
        variant: str = "rohrbach",
    ) -> None:
        self.base = list(base)
        self.vocabulary, self.variant = vocabulary, variant
        self._whole: CutCaptions | None = None  # of all images; others are rows of it

    def cut(self, images: frozenset[int] | None = None) -> CutCaptions:
        """The captions of these images, or of all, cut. `ValueError` if none of them has an object."""
        if self._whole is None:
            self._whole = cut_scores(self.base, self.vocabulary, self.variant)
        if images is None:
            return self._whole
        rows = [row for row, score in enumerate(self.base) if score.image_id in images]
        if not any(self.base[row].truth for row in rows):
            raise ValueError(f"no object is in any of the {len(rows)} images; expected ground truth.")
        counts_of_rows = {name: column[rows] for name, column in self._whole.counts.items()}
        return CutCaptions(self._whole.variant, tuple(self.base[row].image_id for row in rows), counts_of_rows)

    def control(self, method: Sequence[CaptionScore], *, resamples: int = RESAMPLES) -> TruncationControl | None:
        """A method's control; None where there is nothing to compare recall by."""
        if len(clusters(method)) < len(method):
            return None  # several captions an image
        common = frozenset(clusters(self.base)) & frozenset(clusters(method))
        if not any(score.truth for score in self.base if score.image_id in common):
            return None
        shared = [score for score in method if score.image_id in common]
        return truncation_control(self.cut(common), shared, resamples=resamples)


def _matched(base: CutCaptions, method: Sequence[CaptionScore]) -> list[CaptionScore]:
    """The method's scores in the order of the base's images."""
    score_of = {score.image_id: score for score in method}
    unpaired = sorted(score_of.keys() ^ set(base.images))
    if unpaired:
        raise ValueError(
            f"{len(unpaired)} images, such as {unpaired[0]}, have a caption by only one of base and method; "
            "give both for the same images."
        )
    other_variants = {score.variant for score in method} - {base.variant}
    if other_variants:
        raise ValueError(
            f"the method is scored by {', '.join(sorted(other_variants))}, the base by {base.variant}; "
            "score both the same way."
        )
    return [score_of[image] for image in base.images]


def _resampled(
    base: Mapping[str, np.ndarray], method: Mapping[str, np.ndarray], resamples: int, seed: int
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Sums over the same resampled images for both, in blocks: name -> (resamples, cuts) and (resamples, 1)."""
    columns = {}
    for name in _COUNTS:
        if name == "words":  # no interval depends on them
            continue
        columns["method", name] = method[name]
        columns["base", name] = base[name][:, :1] if name in _SAME_IN_ALL_CUTS else base[name]
    for sums in resampled(columns, resamples, seed):
        both: dict[str, dict[str, np.ndarray]] = {"base": {}, "method": {}}
        for (side, name), block in sums.items():
            both[side][name] = block
        yield both["base"], both["method"]


def _over_all(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums over all images, (images, sets) -> (1, sets)."""
    return {name: column.sum(axis=0, keepdims=True) for name, column in columns.items()}


def _figures(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: METRICS[name](sums) for name in (*_COMPARED.values(), "recall")}


def _interpolate(recall: np.ndarray, curve_recall: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A figure of the curve at the method's recall, in each resample. Recall need not rise with every cut."""
    order = np.argsort(curve_recall, axis=1, kind="stable")
    curve_recall = np.take_along_axis(curve_recall, order, axis=1)
    values = np.take_along_axis(np.broadcast_to(values, curve_recall.shape), order, axis=1)
    return np.array([np.interp(*row) for row in zip(recall, curve_recall, values, strict=True)])


def _estimate(gaps: np.ndarray) -> Estimate:
    """The difference itself, then its resamples; no interval where there is no difference."""
    value = number_or_none(gaps[0])
    if value is None:
        return Estimate(None, None, None)
    return Estimate(value, *interval(gaps[1:]))
