"""How well the margin of the first token tells yes from no, wherever the threshold lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmfix.eval.scorers.stats import ratio
from vlmfix.eval.scorers.yesno.questions import is_number, listed
from vlmfix.eval.scorers.yesno.scores import AnswerScore


def auroc(positive: Sequence[bool], margins: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Chance that a positive has a larger margin than a negative, ties half; nan without either.

    Weights say how often each counts, such as how often its image was drawn.
    """
    yes, no = _at_each_margin(positive, margins, weights)
    smaller = np.cumsum(no) - no
    return float(ratio(np.sum(yes * (smaller + no / 2)), yes.sum() * no.sum()))


def average_precision(
    positive: Sequence[bool], margins: Sequence[float], weights: Sequence[float] | None = None
) -> float:
    """Precision at the margin of each positive, averaged over the positives; nan without any."""
    yes, no = (column[::-1] for column in _at_each_margin(positive, margins, weights))
    precision = ratio(np.cumsum(yes), np.cumsum(yes + no))
    return float(ratio(np.sum(yes * np.nan_to_num(precision)), yes.sum()))


def _at_each_margin(
    positive: Sequence[bool], margins: Sequence[float], weights: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """How many positives and how many negatives there are at each distinct margin, in rising order."""
    values = np.asarray(margins, dtype=float)
    is_yes = np.asarray(positive, dtype=bool)
    times = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    if not values.shape == is_yes.shape == times.shape or np.isnan(values).any():
        raise ValueError(
            f"{len(values)} margins, {len(is_yes)} labels, {len(times)} weights; expected as many of each, without nan."
        )
    levels, level_of = np.unique(values, return_inverse=True)
    yes = np.bincount(level_of, weights=times * is_yes, minlength=len(levels))
    no = np.bincount(level_of, weights=times * ~is_yes, minlength=len(levels))
    return yes, no


def ranking(scores: Sequence[AnswerScore], weights: Sequence[float] | None = None) -> dict[str, float]:
    """How well the margins tell yes from no wherever the threshold lies: `AUROC` and `average_precision`.

    They are no sums over images: to resample, give as weights how often the image of each score was drawn. Take each
    group by itself, see `by_group`.

    Raises:
        ValueError: a score has no margin.
    """
    without_margin = [score.question.id for score in scores if not is_number(score.margin)]
    if without_margin:
        raise ValueError(
            f"{listed(without_margin, 'answers have no margin; give log p(yes) - log p(no) as a number')}."
        )
    positive = [score.question.label == "yes" for score in scores]
    margins = [float(score.margin or 0.0) for score in scores]
    return {
        "AUROC": auroc(positive, margins, weights),
        "average_precision": average_precision(positive, margins, weights),
    }
