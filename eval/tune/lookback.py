"""Detectors for `vlmfix.hooks.lookback`, fitted on words that CHAIR judged, and judged on other pictures.

Pictures of the fit and of the figures are different ones; words of one caption never stand on both sides. Invented
words come late, and lookback ratios drift with length: so a baseline that knows the position alone stands beside every
figure.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers.stats import Estimate, ratio
from vlmfix.eval.tune.object_words import Words, read_words
from vlmfix.eval.tune.tool import ShowProgress, Subject, no_progress
from vlmfix.hooks.lookback import Detector, Lookback
from vlmfix.method.heads import picture_id
from vlmfix.model.anatomy import anatomy

RESAMPLES = 1000
"""Of the bootstrap."""


def calibrate_lookback(
    model: Any,
    processor: Any,
    monitor: Lookback,
    data: Data,
    test: Data,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: ShowProgress = no_progress,
) -> Detector:
    """A detector fitted on the pictures of `data`, with its AUROC on those of `test`; on one third of the pictures,
    held out, where both are the same.

    Raises `ValueError` where the two share pictures otherwise, or where words of one kind are missing.
    """
    if monitor.detector is not None or monitor.preset == "tracker":
        raise ValueError("lookback: a detector is fitted on word ratios; give a monitor without one, no tracker")
    _, _, metrics = import_sklearn()

    def words_of(pictures: Data) -> Words:
        return read_words(Subject(model, processor, pictures, batch_size, progress), monitor, max_new_tokens)

    if data.name == test.name:
        all_words = words_of(data)
        fitted_on = [key for place, key in enumerate(data.images) if place % 3 != 2]
        fit = all_words.of(fitted_on)
        held_out = all_words.of([key for key in data.images if key not in fitted_on])
    else:
        refuse_shared_pictures(data, test)
        fitted_on = list(data.images)
        fit, held_out = words_of(data), words_of(test)
    for words, name in ((fit, data.name), (held_out, test.name)):
        refuse_words_of_one_kind(words, name)

    regression, p_cross_validated = fit_regression(fit)
    false_rate, true_rate, thresholds = metrics.roc_curve(fit.grounded, p_cross_validated)
    youden = (true_rate - false_rate)[1:]  # the first threshold is infinite: no word is called grounded
    scores = {
        "detector": regression.predict_proba(held_out.v)[:, 1],
        "plain": held_out.plain,
        "position": -held_out.step,
    }
    figures = {name: asdict(estimate) for name, estimate in aurocs(scores, held_out).items()}
    parts = anatomy(model)
    return Detector(
        model=model.config._name_or_path,
        preset=monitor.preset,
        agg=monitor.agg,
        exclude_sinks=monitor.exclude_sinks,
        layers=len(parts.layers),
        heads=parts.n_heads,
        w=tuple(regression.coef_[0].tolist()),
        b=float(regression.intercept_[0]),
        threshold=float(thresholds[youden.argmax() + 1]),
        n_images=len(fitted_on),
        ids=tuple(picture_id(data.images[key]) for key in fitted_on),
        auroc={
            "data": test.name,
            "images": len(set(held_out.image.tolist())),
            "words": len(held_out.grounded),
            "invented": int((~held_out.grounded).sum()),
            **figures,
        },
    )


def refuse_shared_pictures(data: Data, test: Data) -> None:
    """`ValueError` if two sets of pictures have some in common, whatever their names."""
    shared = {picture_id(path) for path in data.images.values()} & {picture_id(path) for path in test.images.values()}
    if shared:
        raise ValueError(f"{len(shared)} pictures of {data.name!r} are also in {test.name!r}; give different ones")


def refuse_words_of_one_kind(words: Words, name: str) -> None:
    """`ValueError` if all words of a set of pictures are grounded, or all invented."""
    if words.grounded.all() or not words.grounded.any():
        kind = "grounded" if words.grounded.all() else "invented"
        raise ValueError(
            f"all {len(words.grounded)} object words in captions of {name!r} are {kind}: give more pictures"
        )


def fit_regression(words: Words) -> tuple[Any, np.ndarray]:
    """A logistic regression that tells grounded from invented words by their ratios, and P(grounded) (N,) of each word
    from a regression that did not see its picture."""
    logistic_regression, model_selection, _ = import_sklearn()
    regression = logistic_regression(C=1.0, max_iter=1000)
    n_folds = min(5, len(set(words.image.tolist())))
    p = model_selection.cross_val_predict(
        regression,
        words.v,
        words.grounded,
        groups=words.image,
        cv=model_selection.GroupKFold(n_folds),
        method="predict_proba",
    )
    return regression.fit(words.v, words.grounded), p[:, 1]


def auroc(score: np.ndarray, grounded: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of pairs of a grounded and an invented word, (N,) each, in which the grounded one has the higher score;
    equal ones count half. One figure for each row of `weights` (M, N); nan where a row has words of one kind only."""
    order = np.argsort(score)
    score, weights = score[order], weights[:, order]
    grounded_weights, invented_weights = weights * grounded[order], weights * ~grounded[order]
    invented_before = np.cumsum(np.pad(invented_weights, ((0, 0), (1, 0))), axis=1)
    below = invented_before[:, np.searchsorted(score, score, "left")]
    below_or_equal = invented_before[:, np.searchsorted(score, score, "right")]
    won_pairs = (grounded_weights * (below + below_or_equal)).sum(1) / 2
    return ratio(won_pairs, grounded_weights.sum(1) * invented_weights.sum(1))


def aurocs(
    scores: dict[str, np.ndarray], words: Words, n_resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """AUROC of each score, and of the first over each other, with 95 % intervals from a bootstrap over pictures."""
    pictures, picture_of = np.unique(words.image, return_inverse=True)
    n_pictures, rng = len(pictures), np.random.default_rng(seed)
    draws = rng.multinomial(n_pictures, np.full(n_pictures, 1 / n_pictures), n_resamples)
    times = np.vstack([np.ones((1, n_pictures), int), draws])  # the first row is the estimate itself
    figures = {name: auroc(score, words.grounded, times[:, picture_of]) for name, score in scores.items()}
    first, *others = figures
    for other in others:
        figures[f"{first} - {other}"] = figures[first] - figures[other]
    estimates = {}
    for name, values in figures.items():
        low, high = np.nanpercentile(values[1:], [2.5, 97.5])
        estimates[name] = Estimate(float(values[0]), float(low), float(high))
    return estimates


def import_sklearn() -> tuple[Any, Any, Any]:
    """Logistic regression, model selection and metrics of scikit-learn, which not everybody has."""
    try:
        from sklearn import linear_model, metrics, model_selection
    except ImportError as error:
        raise ValueError("fitting a detector needs scikit-learn: pip install 'vlmfix[calibrate]'") from error
    return linear_model.LogisticRegression, model_selection, metrics
