"""Intervals and paired differences: percentile bootstrap over images.

The image is the unit of resampling, since captions or questions of one image are not independent. A metric is a
function of summed counts, so that each resample recomputes its ratio of sums. Yes-or-no outcomes of pictures have an
exact test beside it (`mcnemar`), and several methods against one baseline are judged together (`holm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

Counts = Mapping[str, np.ndarray]
"""Additive counts: name -> one number per image."""
Metric = Callable[[Counts], np.ndarray]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; `None` where undefined."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference of two methods on the same images."""

    p: float | None
    """Two-sided bootstrap p: 2 min(#{d <= 0} + 1, #{d >= 0} + 1) / (resamples + 1), at most 1."""
    n: int
    """Images that both have."""
    left_out: int
    """Images that only one of them has."""


def resampled(counts: Counts, n_resamples: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Sums of counts over resampled images, in blocks. The same seed and number of images give the same resamples."""
    n = len(next(iter(counts.values())))
    table = np.stack(list(counts.values()), axis=1)  # (images, counts)
    rng = np.random.default_rng(seed)
    block = max(1, min(n_resamples, 2_000_000 // max(n, 1)))
    for start in range(0, n_resamples, block):
        times = np.empty((min(block, n_resamples - start), n))
        for row in times:
            row[:] = np.bincount(rng.integers(0, n, n, dtype=np.int32), minlength=n)
        yield dict(zip(counts, (times @ table).T, strict=True))


def total(counts: Counts) -> dict[str, np.ndarray]:
    """Sums over all images."""
    return {name: column.sum() for name, column in counts.items()}


def _number(x: np.ndarray) -> float | None:
    return float(x) if np.isfinite(x) else None


def _limits(samples: np.ndarray) -> tuple[float | None, float | None]:
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return None, None
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def estimates(
    counts: Counts, metrics: Mapping[str, Metric], n_resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """Every metric with its interval."""
    if not len(next(iter(counts.values()))):
        return {name: Estimate(None, None, None) for name in metrics}
    whole = total(counts)
    blocks = [{name: metric(sums) for name, metric in metrics.items()} for sums in resampled(counts, n_resamples, seed)]
    return {
        name: Estimate(_number(metric(whole)), *_limits(np.concatenate([block[name] for block in blocks])))
        for name, metric in metrics.items()
    }


def differences(
    counts: Counts,
    images: Sequence[object],
    base: Counts,
    base_images: Sequence[object],
    metrics: Mapping[str, Metric],
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Difference]:
    """Every metric's difference to a baseline, resampling the same images for both; only images that both have
    count."""
    common = [image for image in images if image in set(base_images)]
    left_out = len(set(images) ^ set(base_images))
    if not common:
        return {name: Difference(None, None, None, None, 0, left_out) for name in metrics}
    a, b = _rows(counts, images, common), _rows(base, base_images, common)
    both = {
        **{f"a {name}": column for name, column in a.items()},
        **{f"b {name}": column for name, column in b.items()},
    }
    pairs = [
        ({name: sums[f"a {name}"] for name in a}, {name: sums[f"b {name}"] for name in b})
        for sums in resampled(both, n_resamples, seed)
    ]
    found = {}
    for name, metric in metrics.items():
        d = np.concatenate([metric(mine) - metric(theirs) for mine, theirs in pairs])
        d = d[np.isfinite(d)]
        p = float(min(1.0, 2 * (min((d <= 0).sum(), (d >= 0).sum()) + 1) / (len(d) + 1))) if len(d) else None
        value = _number(metric(total(a)) - metric(total(b)))
        found[name] = Difference(value, *_limits(d), p, len(common), left_out)
    return found


def _rows(counts: Counts, images: Sequence[object], wanted: Sequence[object]) -> dict[str, np.ndarray]:
    at = {image: i for i, image in enumerate(images)}
    index = [at[image] for image in wanted]
    return {name: column[index] for name, column in counts.items()}


def mcnemar(only_one: int, only_other: int) -> float:
    """McNemar's exact p of two yes-or-no outcomes on the same images: two-sided binomial, 1 where none is discordant.

    Args:
        only_one: Images where the first has the outcome and the second has not.
        only_other: Images where it is the other way round.

    Raises:
        ValueError: a number of images below 0.
    """
    if min(only_one, only_other) < 0:
        raise ValueError(f"expected numbers of images, 0 or more, got {only_one} and {only_other}")
    n, fewer = only_one + only_other, min(only_one, only_other)
    ways = accumulate(range(fewer), lambda ways, k: ways * (n - k) // (k + 1), initial=1)  # comb(n, k), k = 0 .. fewer
    return min(1.0, 2 * sum(ways) / 2**n)  # whole numbers up to here: nothing is rounded, nothing overflows


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of the p of several comparisons, in order; `None` stays and does not count.

    Calling those below .05 real is wrong about any of them in at most one family out of twenty.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    steps = accumulate((p * (len(known) - rank) for rank, (p, _) in enumerate(known)), max)
    adjusted = {i: min(1.0, step) for (_, i), step in zip(known, steps, strict=True)}
    return [adjusted.get(i) for i in range(len(p_values))]
