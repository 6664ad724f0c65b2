"""AdaIAT's statistics, on the model's own captions: heads' attention to the answer so far as they name an object."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vlmfix.asking.asker import Asker
from vlmfix.eval.benchmarks.chair import Chair
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers.naming import namings
from vlmfix.eval.tune.tool import ShowProgress, Subject, no_progress
from vlmfix.hooks.parts import ratios
from vlmfix.hooks.parts.attention_to_answer import Statistics
from vlmfix.hooks.parts.calibrated import fingerprint, template_digest
from vlmfix.method.heads import picture_id
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.site import Rows, Site
from vlmfix.model.anatomy import anatomy

BIN = 10
"""Tokens of a caption that count as one position, with `match="position"`."""


@dataclass(frozen=True)
class AnswerAttention(Intervention):
    """Notes the mean weight on the tokens generated so far, of every head and new token, and changes nothing."""

    name: ClassVar[str] = "answer_attention"
    rows: ClassVar[Rows] = "generated"

    @property
    def traits(self) -> Traits:
        """What it notes belongs to one answer."""
        return Traits(sequential=True)

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """See the row that predicts the next token."""
        generated = site.geometry.generated[:, None, None].to(a)
        mean = (a * generated).sum(-1) / generated.sum(-1).clamp(min=1)
        ratios.note(mean, site, (site.start, a.shape[-1], a.device))
        return a


@dataclass(frozen=True)
class Named:
    """One object that a caption names."""

    real: bool
    position: int
    """Its first token, counted from the start of the caption."""
    attention: np.ndarray
    """(L, H) mean weight on what was generated before, as that token was chosen."""


def calibrate_adaiat(
    model: Any,
    processor: Any,
    data: Data,
    *,
    match: Literal["none", "position"] = "none",
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: ShowProgress = no_progress,
) -> Statistics:
    """P and N of every head, over the objects that greedy captions of `data` name, judged by CHAIR.

    With `match="position"` both are means over the same places of captions, tens of tokens that have objects of both
    kinds, each weighted by the rarer kind. Raises `ValueError` where objects of one kind are missing.
    """
    if match not in ("none", "position"):
        raise ValueError(f"match: expected none or position, got {match!r}")
    objects = named_objects(Subject(model, processor, data, batch_size, progress), max_new_tokens)
    real, invented = means(objects, match)
    parts = anatomy(model)
    counts = Counter(each.real for each in objects)
    return Statistics(
        model=model.config._name_or_path,
        fingerprint=fingerprint(model, parts),
        template=template_digest(processor),
        real=tuple(map(tuple, real.tolist())),
        invented=tuple(map(tuple, invented.tolist())),
        n_real=counts[True],
        n_invented=counts[False],
        match=match,
        data={"name": data.name, "n": len(data.images), "ids": [picture_id(path) for path in data.images.values()]},
    )


def named_objects(subject: Subject, max_new_tokens: int) -> list[Named]:
    """Every object that a caption names after its first token."""
    data, objects = subject.data, []
    asker = Asker(subject.model, subject.processor, AnswerAttention())
    with asker.applied(), torch.inference_mode():
        for batch in subject.batches(list(data.images.items()), f"captions of {data.name}"):
            questions = [(path, Chair().prompt) for _, path in batch]
            records = asker.ask_batch(questions, max_new_tokens=max_new_tokens)
            attention = ratios.in_order(asker.memos()[0])  # of the rows after the prompt: the first predicts token 1
            for (key, _), record, rows in zip(batch, records, attention.nan_to_num(), strict=True):
                named = namings(subject.processor, record.token_ids, data.truth[key], data.vocabulary)
                for each in named:
                    if 0 < each.token <= len(rows):
                        objects.append(Named(each.true, each.token, rows[each.token - 1].numpy()))
    return objects


def means(objects: Sequence[Named], match: str) -> tuple[np.ndarray, np.ndarray]:
    """(L, H) means over real and over invented objects; at the same positions with `match="position"`."""
    places: dict[int, dict[bool, list[np.ndarray]]] = defaultdict(lambda: {True: [], False: []})
    for each in objects:
        place = each.position // BIN if match == "position" else 0
        places[place][each.real].append(each.attention)
    both = [kinds for kinds in places.values() if kinds[True] and kinds[False]]
    if not both:
        n_real = sum(each.real for each in objects)
        where = " at the same positions" if match == "position" else ""
        raise ValueError(
            f"captions name {n_real} real and {len(objects) - n_real} invented objects, and none of both kinds{where}: "
            f"give more pictures"
        )
    weights = [min(len(kinds[True]), len(kinds[False])) if match == "position" else 1 for kinds in both]
    real = np.average([np.mean(kinds[True], axis=0) for kinds in both], axis=0, weights=weights)
    invented = np.average([np.mean(kinds[False], axis=0) for kinds in both], axis=0, weights=weights)
    return real, invented
