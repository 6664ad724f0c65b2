"""Benchmarks: what is asked, and how the answers are scored. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmfix.eval import chair, pope
from vlmfix.eval.data import Data
from vlmfix.eval.stats import Metric
from vlmfix.intervention import did_you_mean


@dataclass(frozen=True)
class Item:
    """One question to a model."""

    id: str
    image: str
    """Path of the picture."""
    prompt: str


@dataclass(frozen=True)
class Group:
    """Answers that are scored together, as counts per image."""

    name: str
    images: list[Any]
    counts: dict[str, np.ndarray]


@dataclass(frozen=True)
class Benchmark:
    """A set of questions, with its scorer."""

    name: str
    title: str
    """As printed; names the variant of the metric."""
    columns: Mapping[str, tuple[str, float]]
    """Metrics that the table shows: name -> unit printed behind it, and factor."""
    metrics: Mapping[str, Metric]
    max_new_tokens: int
    asking: dict[str, Any]
    """What fixes the questions: prompt, seed ... Part of a run's identity."""
    scoring: str
    """How answers are judged: CHAIR's variant, POPE's parser. Chosen anew whenever answers are scored."""

    def items(self, data: Data) -> list[Item]:
        """All questions, none twice."""
        raise NotImplementedError

    def score(self, data: Data, answers: Mapping[str, str]) -> list[Group]:
        """Score the answers given (item id -> text); questions without an answer are left out."""
        raise NotImplementedError


class Chair(Benchmark):
    """CHAIR on one detailed description per picture."""

    prompt = "Please describe this image in detail."

    def __init__(self, variant: str = "rohrbach") -> None:
        percent = {name: ("%", 100.0) for name in ("CHAIR_S", "CHAIR_I", "recall", "F1")}
        super().__init__(
            name="chair",
            title=f"CHAIR ({chair.label(variant)})",
            columns={**percent, "words": ("", 1.0), "repetition": ("%", 100.0)},
            metrics=chair.METRICS,
            max_new_tokens=512,
            asking={"prompt": self.prompt},
            scoring=variant,
        )

    def items(self, data: Data) -> list[Item]:
        """One description per picture."""
        return [Item(str(key), str(path), self.prompt) for key, path in data.images.items()]

    def score(self, data: Data, answers: Mapping[str, str]) -> list[Group]:
        """Counts per caption."""
        scores = chair.score_captions(list(answers.items()), data.truth_for(self.scoring), variant=self.scoring)
        return [Group("", chair.clusters(scores), chair.counts(scores))]


class Pope(Benchmark):
    """POPE: is there a ... in the image? Three splits, built from the annotations by the reference's samplers."""

    def __init__(self, parser: str = "pope") -> None:
        if parser not in pope.PARSERS:
            raise ValueError(f"unknown parser {parser!r}; {did_you_mean(parser, pope.PARSERS)}")
        percent = {name: ("%", 100.0) for name in ("accuracy", "F1", "yes_ratio")}
        super().__init__(
            name="pope",
            title="POPE" if parser == "pope" else f"POPE (parser {parser})",
            columns={**percent, "MCC": ("", 1.0)},
            metrics=pope.METRICS,
            max_new_tokens=8,
            asking={"seed": 0, "positives_per_image": 3},
            scoring=parser,
        )

    def questions(self, data: Data) -> list[pope.Question]:
        """All questions of the three splits, from pictures with enough objects."""
        return pope.build_questions(data.objects, k=self.asking["positives_per_image"], seed=self.asking["seed"])

    @staticmethod
    def item_id(question: pope.Question) -> str:
        """The item that asks a question: positives are the same in all splits, and asked once."""
        return f"{question.image}|{question.text}"

    def items(self, data: Data) -> list[Item]:
        """Each different question once."""
        folder = data.folder / "images"
        found = {self.item_id(q): Item(self.item_id(q), str(folder / q.image), q.text) for q in self.questions(data)}
        return list(found.values())

    def score(self, data: Data, answers: Mapping[str, str]) -> list[Group]:
        """Counts per picture and split."""
        groups, questions = [], self.questions(data)
        for split in pope.SPLITS:
            asked = [q for q in questions if q.split == split and self.item_id(q) in answers]
            scores = pope.score_answers(asked, {q.id: answers[self.item_id(q)] for q in asked}, parser=self.scoring)
            groups.append(Group(split, pope.clusters(scores), pope.counts(scores)))
        return groups


BENCHMARKS: dict[str, Callable[..., Benchmark]] = {"chair": Chair, "pope": Pope}


def benchmark(name: str, scoring: str | None = None) -> Benchmark:
    """A benchmark by name, scored in its default way or as told (CHAIR's variant, POPE's parser). `ValueError` if
    there is none.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; {did_you_mean(name, BENCHMARKS)}")
    return BENCHMARKS[name]() if scoring is None else BENCHMARKS[name](scoring)
