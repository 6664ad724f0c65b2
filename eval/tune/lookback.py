"""Detectors for `vlmfix.hooks.lookback`, fitted on words that CHAIR judged, and judged on other pictures.

No annotator is needed: in captions of labelled pictures, CHAIR tells which object words are grounded and which are
invented. Pictures of the fit and of the figures are different ones; words of one caption never stand on both sides.
Invented words come late, and lookback ratios drift with length: so a baseline that knows the position alone stands
beside every figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlmfix.asking.asking import ask_batch
from vlmfix.engine.attachment import attached
from vlmfix.engine.wrap import wrapped
from vlmfix.eval.benchmarks.chair import Chair
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import chair
from vlmfix.eval.scorers.stats import Estimate, ratio
from vlmfix.hooks.lookback import Detector, Lookback, features, steps_of, token_ends
from vlmfix.method.heads import picture_id

RESAMPLES = 1000


@dataclass(frozen=True)
class Words:
    """Object words of captions; N in all."""

    image: np.ndarray
    """(N,) number of the picture."""
    grounded: np.ndarray
    """(N,) bool: the picture has the object, says CHAIR."""
    v: np.ndarray
    """(N, L*H) ratios, mean over the word's tokens."""
    plain: np.ndarray
    """(N,) the monitor's plain score."""
    step: np.ndarray
    """(N,) step of the word's first token."""

    def of(self, images: Sequence[int]) -> Words:
        """Those of some pictures."""
        keep = np.isin(self.image, images)
        return Words(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))


def read_words(
    model: Any,
    processor: Any,
    monitor: Lookback,
    data: Data,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    progress: Callable[[str, int, int], None] | None = None,
) -> Words:
    """Have every picture described, greedily, and read the ratios of the object words."""
    rows: list[tuple[Any, ...]] = []
    pictures = list(data.images.items())
    with wrapped(model, monitor, processor):
        found: Any = attached(model)
        active: Lookback = found.entries[0].active
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start : start + batch_size]
            asked = [(path, Chair().prompt) for _, path in batch]
            records = ask_batch(model, processor, asked, max_new_tokens=max_new_tokens)
            ratios = active.ratios(found.last().memos[0])
            for (key, _), record, r in zip(batch, records, ratios, strict=True):
                ends = token_ends(record.token_ids, lambda t: processor.decode(t, skip_special_tokens=True).strip())
                for m in chair.mentions(record.text):
                    steps = steps_of(ends, m.start, m.end)
                    v = features(r[steps])
                    if not v.isnan().any():
                        rows.append(
                            (key, m.node in data.truth[key], v.numpy(), float(active.score(r[steps])), steps[0])
                        )
            if progress is not None:
                progress(f"captions of {data.name}", start + len(batch), len(pictures))
    if not rows:
        raise ValueError(
            f"no caption of the {len(pictures)} pictures of {data.name!r} names an object that CHAIR knows"
        )
    return Words(*(np.array(column) for column in zip(*rows, strict=True)))


def calibrate(model: Any, processor: Any, monitor: Lookback, data: Data, test: Data, **settings: Any) -> Detector:
    """A detector fitted on the pictures of `data`, with its AUROC on those of `test`; on one third of the pictures,
    held out, where both are the same. `settings` are those of `read_words`.

    Raises `ValueError` where the two share pictures otherwise, or where words of one kind are missing.
    """
    if monitor.detector is not None or monitor.preset == "tracker":
        raise ValueError("lookback: a detector is fitted on word ratios; give a monitor without one, no tracker")
    logistic, model_selection, metrics = _sklearn()
    if data.name == test.name:
        whole = read_words(model, processor, monitor, data, **settings)
        kept = [key for i, key in enumerate(data.images) if i % 3 != 2]
        fit, held_out = whole.of(kept), whole.of([key for key in data.images if key not in kept])
    else:
        kept = list(data.images)
        if shared := {picture_id(p) for p in data.images.values()} & {picture_id(p) for p in test.images.values()}:
            raise ValueError(f"{len(shared)} pictures of {data.name!r} are also in {test.name!r}; give different ones")
        fit = read_words(model, processor, monitor, data, **settings)
        held_out = read_words(model, processor, monitor, test, **settings)
    for words, where in ((fit, data.name), (held_out, test.name)):
        if len(set(words.grounded.tolist())) < 2:
            kind = "grounded" if words.grounded.all() else "invented"
            raise ValueError(
                f"all {len(words.grounded)} object words in captions of {where!r} are {kind}: give more pictures"
            )
    regression = logistic(C=1.0, max_iter=1000)
    n_folds = min(5, len(set(fit.image.tolist())))
    folds = model_selection.GroupKFold(n_folds)  # whole pictures
    p = model_selection.cross_val_predict(
        regression, fit.v, fit.grounded, groups=fit.image, cv=folds, method="predict_proba"
    )[:, 1]
    false, true, thresholds = metrics.roc_curve(fit.grounded, p)
    regression.fit(fit.v, fit.grounded)
    scores = {
        "detector": regression.predict_proba(held_out.v)[:, 1],
        "plain": held_out.plain,
        "position": -held_out.step,
    }
    with wrapped(model, monitor, processor):
        anatomy = attached(model).anatomy  # type: ignore[union-attr]
    return Detector(
        model=model.config._name_or_path,
        preset=monitor.preset,
        agg=monitor.agg,
        exclude_sinks=monitor.exclude_sinks,
        layers=len(anatomy.layers),
        heads=anatomy.n_heads,
        w=tuple(regression.coef_[0].tolist()),
        b=float(regression.intercept_[0]),
        threshold=float(thresholds[(true - false)[1:].argmax() + 1]),
        n_images=len(kept),
        ids=tuple(picture_id(data.images[key]) for key in kept),
        auroc={
            "data": test.name,
            "images": len(set(held_out.image.tolist())),
            "words": len(held_out.grounded),
            "invented": int((~held_out.grounded).sum()),
            **{name: asdict(one) for name, one in aurocs(scores, held_out).items()},
        },
    )


def auroc(score: np.ndarray, grounded: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of pairs of a grounded and an invented word, (N,) each, in which the grounded one has the higher score;
    equal ones count half. One figure for each row of `weights` (M, N); nan where a row has words of one kind only."""
    order = np.argsort(score)
    score, w = score[order], weights[:, order]
    positive, negative = w * grounded[order], w * ~grounded[order]
    below = np.cumsum(np.pad(negative, ((0, 0), (1, 0))), axis=1)
    halves = below[:, np.searchsorted(score, score, "left")] + below[:, np.searchsorted(score, score, "right")]
    return ratio((positive * halves).sum(1) / 2, positive.sum(1) * negative.sum(1))


def aurocs(
    scores: dict[str, np.ndarray], words: Words, n_resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """AUROC of each score, and of the first over each other, with 95 % intervals from a bootstrap over pictures."""
    images, at = np.unique(words.image, return_inverse=True)
    n, rng = len(images), np.random.default_rng(seed)
    times = np.vstack([np.ones((1, n), int), rng.multinomial(n, np.full(n, 1 / n), n_resamples)])
    found = {name: auroc(score, words.grounded, times[:, at]) for name, score in scores.items()}
    first, *others = found
    found |= {f"{first} - {other}": found[first] - found[other] for other in others}
    return {name: Estimate(float(x[0]), *map(float, np.nanpercentile(x[1:], [2.5, 97.5]))) for name, x in found.items()}


def _sklearn() -> tuple[Any, Any, Any]:
    try:
        from sklearn import linear_model, metrics, model_selection
    except ImportError as error:
        raise ValueError("fitting a detector needs scikit-learn: pip install 'vlmfix[calibrate]'") from error
    return linear_model.LogisticRegression, model_selection, metrics
