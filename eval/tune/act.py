"""In which heads does ACT help to answer yes/no questions?

Ours, after the scheme of GATECH-EIC/ACT: ACT in one head at a time, judged on labelled questions. The authors compare
accuracies; a margin in nats tells heads apart on far fewer questions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from vlmfix.eval.pictures.data import Data
from vlmfix.eval.tune.measurement import Measurement
from vlmfix.eval.tune.questions import Questions, openings
from vlmfix.eval.tune.tool import ShowProgress, Subject, Tool, no_progress, rank
from vlmfix.hooks import ACT
from vlmfix.method.heads import HeadList
from vlmfix.model.anatomy import anatomy


@dataclass(frozen=True)
class OneHead(Tool):
    """ACT in one head at a time: how much further does the model lean to the right answer?"""

    name: ClassVar[str] = "act"
    source: ClassVar[str] = "ours, after the scheme of GATECH-EIC/ACT, which compares accuracies"

    method: ACT
    """ACT's other settings, and the layers whose heads are tried."""

    @property
    def meaning(self) -> str:
        """What a score is."""
        return "gain of the right answer's margin over the wrong one's with ACT in this head alone, in nats"

    def measure(self, subject: Subject) -> Measurement:
        """One pass per question and head, and one without ACT."""
        questions, (n_layers, n_heads) = Questions.of(subject), subject.shape
        resolved, _ = self.method.resolve(subject.model, anatomy(subject.model))
        heads = [(layer, head) for layer in resolved.layers or () for head in range(n_heads)]
        in_one_head = [replace(self.method, layers=None, head_list=(head,)) for head in heads]
        untouched, *edited = openings(subject, questions, "calibrate act", [None, *in_one_head])

        towards_truth = np.where(questions.present, 1, -1)
        gain = np.full((len(questions.items), n_layers, n_heads), np.nan)  # NaN: ACT does not edit the layer
        for (layer, head), answers in zip(heads, edited, strict=True):
            gain[:, layer, head] = towards_truth * (answers.lean - untouched.lean)

        groups, group_of = ("absent", "present"), questions.present.astype(int)
        measurement = Measurement.from_samples(questions.pictures, groups, gain, questions.picture_of, group_of)
        measurement.combine = lambda means: (means["absent"] + means["present"]) / 2
        measurement.extra = {"parts": measurement.group_means(), "samples": measurement.samples()}
        return measurement


def calibrate_act(
    model: Any,
    processor: Any,
    method: ACT,
    data: Data,
    *,
    batch_size: int = 32,
    progress: ShowProgress = no_progress,
) -> HeadList:
    """A score for every head of the layers that ACT edits; `method` gives its other settings. No head is selected yet.

    Raises `ValueError` if the method brings a head list, or the data gives no questions.
    """
    if method.head_list is not None:
        raise ValueError("leave out head_list: it is what calibration looks for")
    return rank(OneHead(method), model, processor, data, batch_size=batch_size, progress=progress)
