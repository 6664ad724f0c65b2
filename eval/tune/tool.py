"""A tool looks at a model on pictures and gives every attention head a score. Here is what all tools share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch

from vlmfix.asking.asker import Asker
from vlmfix.eval.benchmarks.benchmark import Item
from vlmfix.eval.benchmarks.chair import Chair
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import naming
from vlmfix.eval.tune.measurement import Measurement
from vlmfix.method.heads import HeadList, picture_id
from vlmfix.method.settings import fill_and_check
from vlmfix.model.anatomy import anatomy

Direction = Literal["high is good", "high is bad"]
ShowProgress = Callable[..., None]
"""Called with what is being done, how much of it is done, and out of how much."""
Piece = TypeVar("Piece")


def no_progress(label: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Subject:
    """A model, and the pictures on which a tool looks at it."""

    model: Any
    processor: Any
    data: Data
    batch_size: int = 32
    """Sequences that go through the model at once."""
    progress: ShowProgress = no_progress

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        parts = anatomy(self.model)
        return len(parts.layers), parts.n_heads

    @property
    def prompts_per_pass(self) -> int:
        """Prompts in one batch where every prompt goes through the model once for each head of a layer."""
        n_heads = self.shape[1]
        return max(1, self.batch_size // n_heads)

    def inputs(self, items: Sequence[Item]) -> dict[str, Any]:
        """The processor's output for some questions, padded on the left."""
        return Asker(self.model, self.processor).inputs([(item.image, item.prompt) for item in items])

    def batches(self, pieces: Sequence[Piece], label: str, size: int | None = None) -> Iterator[Sequence[Piece]]:
        """`pieces` in batches of `size` (default: the batch size), with progress shown under `label`."""
        size = size or self.batch_size
        for start in range(0, len(pieces), size):
            self.progress(label, start, len(pieces))
            yield pieces[start : start + size]
        self.progress(label, len(pieces), len(pieces))

    def captions(self, max_new_tokens: int) -> list[naming.Caption]:
        """What the model says of each picture when it is asked for a caption, greedily."""
        return naming.describe(
            self.model,
            self.processor,
            self.data,
            Chair().items(self.data),
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            tell=lambda done, total: self.progress("captions", done, total),
        )


@dataclass(frozen=True)
class Tool:
    """Gives every head of a model a score. Its fields are its settings."""

    name: ClassVar[str]
    source: ClassVar[str]
    """Where it was published."""

    def __post_init__(self) -> None:
        """Check the settings by their annotations, as those of methods. `ValueError` names one that does not fit."""
        fill_and_check(self, {})

    @property
    def meaning(self) -> str:
        """What a score is, in one line."""
        raise NotImplementedError

    @property
    def direction(self) -> Direction:
        """What a high score says of a head."""
        return "high is good"

    def measure(self, subject: Subject) -> Measurement:
        """Look at the model, which is untouched. `ValueError` if the data has nothing that the tool needs."""
        raise NotImplementedError


@torch.inference_mode()
def rank(
    tool: Tool,
    model: Any,
    processor: Any,
    data: Data,
    *,
    batch_size: int = 32,
    progress: ShowProgress = no_progress,
) -> HeadList:
    """Give every head of a model a score; interventions on the model are not in force meanwhile. No head is selected
    yet: see `HeadList.select`.

    Raises `ValueError` if the data lacks what the tool needs, `TypeError` if the model's heads cannot be found.
    """
    with Asker(model, processor).applied():
        measurement = tool.measure(Subject(model, processor, data, batch_size, progress))
    scores = measurement.scores()
    extra = {"score": tool.meaning, **measurement.extra}
    if measurement.is_by_picture:
        extra |= {"interval": measurement.intervals().tolist(), "agreement": measurement.agreement()}
    return HeadList(
        model=model.config._name_or_path,
        revision=getattr(model.config, "_commit_hash", None),
        tool=tool.name,
        scores=tuple(map(tuple, scores.tolist())),
        direction=tool.direction,
        settings=asdict(tool),
        data={
            "name": data.name,
            "n": len(measurement.pictures),
            "seed": 0,
            "ids": [picture_id(path) for path in measurement.pictures],
        },
        extra=extra,
    )
