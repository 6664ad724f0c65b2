"""Object words of a model's captions, judged by CHAIR, with the lookback ratios of their tokens.

No annotator is needed: in captions of labelled pictures, CHAIR tells which object words are grounded and which are
invented.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmfix.asking.asker import Asker
from vlmfix.asking.words import Written
from vlmfix.eval.benchmarks.chair import Chair
from vlmfix.eval.scorers import chair
from vlmfix.eval.tune.tool import Subject
from vlmfix.hooks.lookback import Lookback
from vlmfix.hooks.parts.detector import features


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
        return Words(self.image[keep], self.grounded[keep], self.v[keep], self.plain[keep], self.step[keep])


def read_words(subject: Subject, monitor: Lookback, max_new_tokens: int = 256) -> Words:
    """Have every picture described, greedily, and read the ratios of its object words. `ValueError` if none."""
    data = subject.data
    rows: list[tuple[Any, ...]] = []
    asker = Asker(subject.model, subject.processor, monitor)
    resolved: Any = asker.interventions[0]
    with asker.applied():
        for batch in subject.batches(list(data.images.items()), f"captions of {data.name}"):
            questions = [(path, Chair().prompt) for _, path in batch]
            records = asker.ask_batch(questions, max_new_tokens=max_new_tokens)
            ratios = resolved.ratios(*asker.memos())
            for (key, _), record, caption_ratios in zip(batch, records, ratios, strict=True):
                written = Written.by(subject.processor, record.token_ids)
                for mention in chair.mentions(record.text, data.vocabulary):
                    steps = written.tokens_of(mention.start, mention.end)
                    v = features(caption_ratios[steps])
                    if not v.isnan().any():
                        score = float(resolved.score(caption_ratios[steps]))
                        rows.append((key, mention.node in data.truth[key], v.numpy(), score, steps[0]))
    if not rows:
        raise ValueError(
            f"no caption of the {len(data.images)} pictures of {data.name!r} names an object of its vocabulary"
        )
    return Words(*(np.array(column) for column in zip(*rows, strict=True)))
