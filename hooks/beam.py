"""Beam search, a baseline: no intervention at all, but often as good as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vlmfix.method.intervention import Intervention

if TYPE_CHECKING:
    from vlmfix.asking.asking import Answering


@dataclass(frozen=True)
class Beam(Intervention):
    """Answers by beam search instead of greedily."""

    name: ClassVar[str] = "beam"
    summary: ClassVar[str] = "baseline: beam search"
    paper: ClassVar[str] = "common baseline of this field, with 5 beams"
    cost: ClassVar[str] = "n sequences at once"
    expect: ClassVar[str] = "captions: fewer inventions at no loss of recall; better than most methods"

    n: int = 5
    """Beams."""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.n < 1:
            raise ValueError(f"n: expected 1 beam or more, got {self.n!r}")

    def decode(self, run: Answering) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """The model's own beam search."""
        return run.generate(num_beams=self.n), [{"acted": True}] * len(run.questions)
