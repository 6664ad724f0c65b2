"""Whose lookback ratio tells true object words from invented ones?

The head choice of Hung et al., "Attention Tracker", arXiv 2411.00348, on object words (ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import numpy as np

from vlmfix.eval.tune.measurement import Measurement
from vlmfix.eval.tune.object_words import read_words
from vlmfix.eval.tune.tool import Subject, Tool
from vlmfix.hooks.lookback import Lookback
from vlmfix.method.kinds import Range


@dataclass(frozen=True)
class Separate(Tool):
    """How far apart a head's lookback ratios are: means over true and over invented object words, less deviations."""

    name: ClassVar[str] = "separate"
    source: ClassVar[str] = (
        "the head choice of Attention Tracker, Hung et al., arXiv 2411.00348, on object words (ours)"
    )

    n: Annotated[float, Range(0)] = 1.0
    """Standard deviations of both groups that the means must be apart (code: 0 to 5)."""
    preset: str = "lookback"
    """What is compared: a preset of the monitor `lookback`."""
    max_new_tokens: Annotated[int, Range(1)] = 256
    """Of the captions."""

    def __post_init__(self) -> None:
        """Check the preset, too."""
        super().__post_init__()
        self._monitor()

    def _monitor(self) -> Lookback:
        return Lookback(preset=self.preset)  # type: ignore[arg-type]  # which is checked there

    @property
    def meaning(self) -> str:
        """What a score is."""
        return (
            f"mean lookback ratio of true object words less that of invented ones, less {self.n:g} deviations of each"
        )

    def measure(self, subject: Subject) -> Measurement:
        """One caption per picture. `ValueError` where words of one kind are missing."""
        words = read_words(subject, self._monitor(), self.max_new_tokens)
        for kind, n_words in (("true", words.grounded.sum()), ("invented", (~words.grounded).sum())):
            if not n_words:
                raise ValueError(f"captions of {subject.data.name} hold no {kind} objects; take more pictures")
        ratios = words.v.reshape(-1, *subject.shape).astype(float)
        pictures = [str(path) for path in subject.data.images.values()]
        keys = list(subject.data.images)
        picture_of = np.array([keys.index(key) for key in words.image])
        is_true = words.grounded.astype(int)
        measurement = Measurement.from_samples(pictures, ("invented", "true"), ratios, picture_of, is_true)
        squares = ("invented squared", "true squared")
        measurement_of_squares = Measurement.from_samples(pictures, squares, ratios**2, picture_of, is_true)
        measurement.extra["samples"] = measurement.samples()
        measurement.sums |= measurement_of_squares.sums
        measurement.counts |= measurement_of_squares.counts
        measurement.combine = partial(separation, n=self.n)
        return measurement


def separation(means: Mapping[str, np.ndarray], n: float) -> np.ndarray:
    """mean(true) - mean(invented) - n (std(true) + std(invented)), from the means of ratios and of their squares."""
    deviations = 0
    for kind in ("true", "invented"):
        variance = means[f"{kind} squared"] - means[kind] ** 2
        deviations = deviations + np.sqrt(np.maximum(variance, 0))  # rounding may leave a variance below 0
    return means["true"] - means["invented"] - n * deviations
