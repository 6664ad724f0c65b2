"""No measurement: scores by chance, the control of the other tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from vlmfix.eval.tune.measurement import Measurement
from vlmfix.eval.tune.tool import Subject, Tool
from vlmfix.method.kinds import Range


@dataclass(frozen=True)
class Random(Tool):
    """Gives every head a random number between 0 and 1."""

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "control"

    seed: Annotated[int, Range(0)] = 0

    @property
    def meaning(self) -> str:
        """What a score is."""
        return "a random number"

    def measure(self, subject: Subject) -> Measurement:
        """No pass at all, and no picture."""
        return Measurement.of_all_pictures([], np.random.default_rng(self.seed).random(subject.shape))
