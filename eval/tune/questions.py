"""Yes/no questions about annotated pictures, and the first word of a model's answers.

Questions are POPE's: each object that is there is asked for once, and objects that are absent at random, often seen, or
often seen beside it. Nothing is decoded: one pass per question and method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vlmfix.asking.asker import Asker
from vlmfix.asking.words import word_log_probs, yes_no_tokens
from vlmfix.eval.benchmarks.benchmark import Item
from vlmfix.eval.benchmarks.pope import Pope
from vlmfix.eval.tune.log_probs import log_probs_at
from vlmfix.eval.tune.tool import Subject
from vlmfix.method.intervention import Intervention


@dataclass(frozen=True)
class Questions:
    """Yes/no questions with their answers."""

    items: Sequence[Item]
    """Q questions."""
    present: np.ndarray
    """(Q,) bool: the object is there, so the answer is yes."""

    @classmethod
    def of(cls, subject: Subject) -> Questions:
        """POPE's. `ValueError` if the pictures hold too few objects."""
        pope = Pope()
        items = pope.items(subject.data)
        labels = {pope.item_id(question): question.label for question in pope.questions(subject.data)}
        return cls(items, np.array([labels[item.id] == "yes" for item in items], bool))

    @cached_property
    def pictures(self) -> list[str]:
        """Files of the pictures that are asked about, each once."""
        return list(dict.fromkeys(item.image for item in self.items))

    @property
    def picture_of(self) -> np.ndarray:
        """(Q,) index of each question's picture."""
        return np.array([self.pictures.index(item.image) for item in self.items])

    def mean(self, x: np.ndarray) -> float:
        """Of values (Q,), present and absent objects weighing the same."""
        return float((x[self.present].mean() + x[~self.present].mean()) / 2)


@dataclass(frozen=True)
class Openings:
    """How a model begins its answers to Q yes/no questions."""

    lean: np.ndarray
    """(Q,) log p(yes) - log p(no), in nats; spellings of a word count together."""
    entropy: np.ndarray
    """(Q,) of the first token, in nats."""
    word: np.ndarray
    """(Q,) the most likely token: 1 yes, -1 no, 0 neither."""


def openings(
    subject: Subject, questions: Questions, label: str, methods: Sequence[Intervention | None]
) -> list[Openings]:
    """How a model begins its answers under each of several methods; `None` is the untouched model."""
    tokens = yes_no_tokens(subject.processor)
    askers = [Asker(subject.model, subject.processor, method) for method in methods]
    batches: list[list[Openings]] = [[] for _ in methods]
    for items in subject.batches(questions.items, label):
        inputs = subject.inputs(items)
        for asker, openings_of_asker in zip(askers, batches, strict=True):
            with asker.applied() as model:
                log_probs = log_probs_at(model, inputs, [-1])[:, 0].double()
            openings_of_asker.append(read_openings(log_probs, tokens))
    return [joined(openings_of_asker) for openings_of_asker in batches]


def joined(batches: Sequence[Openings]) -> Openings:
    """Those of several batches of questions as one, in order."""
    return Openings(
        lean=np.concatenate([batch.lean for batch in batches]),
        entropy=np.concatenate([batch.entropy for batch in batches]),
        word=np.concatenate([batch.word for batch in batches]),
    )


def read_openings(log_probs: Tensor, tokens: dict[str, tuple[int, ...]]) -> Openings:
    """From log-probabilities (Q, V) of the first token, and the tokens that spell `yes` and `no`."""
    likeliest = log_probs.argmax(-1)
    is_yes, is_no = (torch.isin(likeliest, likeliest.new_tensor(tokens[word])).int() for word in ("yes", "no"))
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return Openings(lean(log_probs, tokens).cpu().numpy(), entropy.cpu().numpy(), (is_yes - is_no).cpu().numpy())


def lean(log_probs: Tensor, tokens: dict[str, tuple[int, ...]]) -> Tensor:
    """(...) log p(yes) - log p(no), in nats, of log-probabilities (..., V)."""
    words = word_log_probs(log_probs, tokens)
    return words["yes"] - words["no"]
