"""What a tool measured on pictures, and how that becomes one score for every attention head."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import spearmanr

RESAMPLES = 1000
"""Of the bootstrap: enough for an interval to read, for some thousand heads at once."""


def first_mean(means: Mapping[str, np.ndarray]) -> np.ndarray:
    """The score of tools that know one group of samples: its mean."""
    return next(iter(means.values()))


@dataclass
class Measurement:
    """Sums over samples for each picture, and how they become one score for each head.

    A sample is what one question, or one word of a caption, says of all heads. Sums are kept apart by picture, so that
    a bootstrap can draw pictures, and by group where samples are of several kinds, such as true and invented objects.
    """

    pictures: Sequence[str]
    """P files."""
    sums: dict[str, np.ndarray]
    """Group -> (P, L, H)."""
    counts: dict[str, np.ndarray]
    """Group -> (P,) samples behind the sums."""
    combine: Callable[[Mapping[str, np.ndarray]], np.ndarray] = first_mean
    """Means (..., L, H) by group -> scores (..., L, H)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the tool has to say, for the head list."""

    @classmethod
    def from_samples(
        cls,
        pictures: Sequence[str],
        groups: Sequence[str],
        values: np.ndarray,
        picture_of: np.ndarray,
        group_of: np.ndarray,
    ) -> Measurement:
        """From `values` (S, L, H) of S samples; `picture_of` and `group_of` (S,) are indices into the two lists."""
        sums, counts = {}, {}
        for number, group in enumerate(groups):
            members = group_of == number
            sums[group] = np.zeros((len(pictures), *values.shape[1:]))
            np.add.at(sums[group], picture_of[members], values[members])
            counts[group] = np.bincount(picture_of[members], minlength=len(pictures)).astype(float)
        return cls(pictures, sums, counts)

    @classmethod
    def of_all_pictures(cls, pictures: Sequence[str], scores: np.ndarray, **extra: Any) -> Measurement:
        """Scores (L, H) that belong to all pictures together: there is nothing to resample."""
        return cls(pictures, {"all": scores[None]}, {"all": np.ones(1)}, extra=extra)

    @property
    def is_by_picture(self) -> bool:
        """Whether there are several pictures to draw from."""
        return len(next(iter(self.counts.values()))) > 1

    def scores(self, times: np.ndarray | None = None) -> np.ndarray:
        """(L, H), or (N, L, H) with each picture counted `times` (N, P) times."""
        weights = np.ones(len(next(iter(self.counts.values())))) if times is None else times
        means = {}
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw without a sample of a group has no mean: NaN
            for group, sums in self.sums.items():
                n_samples = np.asarray(weights @ self.counts[group])
                means[group] = np.tensordot(weights, sums, 1) / n_samples[..., None, None]
        return self.combine(means)

    def intervals(self, seed: int = 0) -> np.ndarray:
        """(2, L, H): 95 % intervals from a bootstrap over pictures."""
        n_pictures = len(self.pictures)
        uniform = np.full(n_pictures, 1 / n_pictures)
        times = np.random.default_rng(seed).multinomial(n_pictures, uniform, size=RESAMPLES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # heads without a score
            return np.nanpercentile(self.scores(times), [2.5, 97.5], axis=0)

    def agreement(self) -> float | None:
        """Rank correlation (Spearman) of the scores on every other picture with those on the rest; `None` where fewer
        than three heads have both, or where one half scores all heads alike."""
        is_second_half = np.arange(len(self.pictures)) % 2
        first = self.scores(1.0 - is_second_half).ravel()
        second = self.scores(is_second_half.astype(float)).ravel()
        known = np.isfinite(first) & np.isfinite(second)
        first, second = first[known], second[known]
        if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
            return None
        return float(spearmanr(first, second).statistic)

    def samples(self) -> dict[str, int]:
        """Number of samples in each group."""
        return {group: int(counts.sum()) for group, counts in self.counts.items()}

    def group_means(self) -> dict[str, list[list[float | None]]]:
        """Mean of each group by layer and head; `None` for a head without a score."""
        means: dict[str, list[list[float | None]]] = {}
        for group, sums in self.sums.items():
            table = sums.sum(0) / self.counts[group].sum()
            means[group] = [[None if math.isnan(mean) else mean for mean in row] for row in table.tolist()]
        return means
