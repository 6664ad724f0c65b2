"""Intervals and paired differences: percentile bootstrap over images.

The image is the unit of resampling, since captions or questions of one image are not independent. A metric is a
function of summed counts, so that each resample recomputes its ratio of sums; `ratio` and `f1` are what metrics are
made of. Yes-or-no outcomes of pictures have an exact test beside it (`mcnemar`), and several methods against one
baseline are judged together (`holm`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

Counts = Mapping[str, np.ndarray]
"""Additive counts: name -> one number per image."""
Metric = Callable[[Counts], np.ndarray]
"""Summed counts, numbers or arrays of one shape -> the figure, of the same shape; nan where it is undefined."""
RESAMPLES = 10_000
KEPT = 20_000_000
"""Draws of images (2 bytes each) that are kept for the next figure with as many images."""
Name = TypeVar("Name", bound=Hashable)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, nan where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def f1(hits: np.ndarray, named: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision hits/named and recall hits/present, nan where one of them is."""
    undefined = np.multiply(named, present) == 0
    return ratio(2 * np.asarray(hits, float), np.where(undefined, 0, np.add(named, present)))


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


def resampled(counts: Mapping[Name, np.ndarray], n_resamples: int, seed: int) -> Iterator[dict[Name, np.ndarray]]:
    """Sums of counts over resampled images, in blocks. The same seed and number of images give the same resamples.

    Args:
        counts: Name -> numbers per image, (images,) or (images, sets).
        n_resamples: How often images are drawn.
        seed: Of the draws.

    Yields:
        Name -> sums, (resamples,) or (resamples, sets).
    """
    n_images = len(next(iter(counts.values())))
    columns = [column.reshape(n_images, -1) for column in counts.values()]
    table = _exact(np.concatenate(columns, axis=1))  # (images, all sets)
    ends = np.cumsum([column.shape[1] for column in columns])
    small = n_images * n_resamples <= KEPT
    blocks = _kept_draws(n_images, n_resamples, seed) if small else _draws(n_images, n_resamples, seed)
    for times_drawn in blocks:
        sums = np.split((times_drawn.astype(table.dtype) @ table).astype(float), ends[:-1], axis=1)
        yield {
            name: block if column.ndim > 1 else block[:, 0]
            for (name, column), block in zip(counts.items(), sums, strict=True)
        }


def _exact(table: np.ndarray) -> np.ndarray:
    """The table in half as many bytes, if no sum over its images is rounded in them: whole numbers are exact in
    float32 up to 2**24."""
    whole = np.array_equal(table, np.rint(table))
    return table.astype(np.float32) if whole and len(table) * np.abs(table).max(initial=0) < 2**24 else table


@lru_cache(maxsize=2)
def _kept_draws(n_images: int, n_resamples: int, seed: int) -> tuple[np.ndarray, ...]:
    """`_draws`, kept for the next method: all methods are resampled alike."""
    return tuple(_draws(n_images, n_resamples, seed))


def _draws(n_images: int, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, in blocks (resamples, images) of whole numbers."""
    generator = np.random.default_rng(seed)
    block_size = max(1, min(n_resamples, 2_000_000 // max(n_images, 1)))
    for start in range(0, n_resamples, block_size):
        times_drawn = np.empty((min(block_size, n_resamples - start), n_images), dtype=np.uint16)
        for row in times_drawn:
            images = generator.integers(0, n_images, n_images, dtype=np.int32)
            row[:] = np.bincount(images, minlength=n_images)
        yield times_drawn


def total(counts: Counts) -> dict[str, np.ndarray]:
    """Sums over all images."""
    return {name: column.sum() for name, column in counts.items()}


def number_or_none(value: float | np.ndarray) -> float | None:
    """The value as a float, None where it is undefined (nan)."""
    return float(value) if np.isfinite(value) else None


def interval(samples: np.ndarray) -> tuple[float | None, float | None]:
    """The middle 95 % of the samples that are finite, a pair of None without any."""
    finite = samples[np.isfinite(samples)]
    if not len(finite):
        return None, None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def estimates(
    counts: Counts, metrics: Mapping[str, Metric], n_resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """Every metric with its interval."""
    if not len(next(iter(counts.values()))):
        return {name: Estimate(None, None, None) for name in metrics}
    sums_of_blocks = list(resampled(counts, n_resamples, seed))
    whole = total(counts)
    results = {}
    for name, metric in metrics.items():
        samples = np.concatenate([metric(sums) for sums in sums_of_blocks])
        results[name] = Estimate(number_or_none(metric(whole)), *interval(samples))
    return results


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
    images_of_base = set(base_images)
    common = [image for image in images if image in images_of_base]
    left_out = len(set(images) ^ images_of_base)
    if not common:
        return {name: Difference(None, None, None, None, 0, left_out) for name in metrics}
    method_counts = _of_images(counts, images, common)
    base_counts = _of_images(base, base_images, common)
    # Both stand in one table, under keys (side, name), so that a resample draws the same images for both.
    both: dict[tuple[str, str], np.ndarray] = {}
    both |= {("method", name): column for name, column in method_counts.items()}
    both |= {("base", name): column for name, column in base_counts.items()}
    method_sums, base_sums = [], []
    for sums in resampled(both, n_resamples, seed):
        method_sums.append({name: sums["method", name] for name in method_counts})
        base_sums.append({name: sums["base", name] for name in base_counts})
    results = {}
    for name, metric in metrics.items():
        blocks = [metric(mine) - metric(theirs) for mine, theirs in zip(method_sums, base_sums, strict=True)]
        samples = np.concatenate(blocks)
        value = metric(total(method_counts)) - metric(total(base_counts))
        results[name] = Difference(
            number_or_none(value), *interval(samples), bootstrap_p(samples), len(common), left_out
        )
    return results


def _of_images(counts: Counts, images: Sequence[object], selection: Sequence[object]) -> dict[str, np.ndarray]:
    """The counts of a selection of the images, in its order."""
    row_of = {image: row for row, image in enumerate(images)}
    rows = [row_of[image] for image in selection]
    return {name: column[rows] for name, column in counts.items()}


def bootstrap_p(samples: np.ndarray) -> float | None:
    """Bootstrap p of a difference from its resamples, see `Difference.p`; None if it is defined in none of them."""
    finite = samples[np.isfinite(samples)]
    if not len(finite):
        return None
    rarer_side = min((finite <= 0).sum(), (finite >= 0).sum())
    return float(min(1.0, 2 * (rarer_side + 1) / (len(finite) + 1)))


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
    # Whole numbers up to the last division: nothing is rounded, and thousands of images do not overflow.
    ways = total_ways = 1  # comb(n, k), from k = 0, and their sum
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        total_ways += ways
    return min(1.0, 2 * total_ways / 2**n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of the p of several comparisons, in order; `None` stays and does not count.

    Calling those below .05 real is wrong about any of them in at most one family out of twenty.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    step = 0.0
    for rank, (p, place) in enumerate(known):
        step = max(step, p * (len(known) - rank))  # no adjusted p is below that of a smaller p
        adjusted[place] = min(1.0, step)
    return adjusted
