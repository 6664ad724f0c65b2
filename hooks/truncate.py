"""Cut captions, a baseline: the untouched model's answer up to a number of words.

Shorter captions invent less, since models invent late. A method that does no better than this at equal recall has only
made captions shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from vlmfix.method.intervention import Intervention
from vlmfix.method.kinds import Range

if TYPE_CHECKING:
    from vlmfix.asking.batch import Batch


@dataclass(frozen=True)
class Truncate(Intervention):
    """Cuts each answer after a number of words."""

    name: ClassVar[str] = "truncate"
    summary: ClassVar[str] = "baseline: cuts answers to a number of words"
    paper: ClassVar[str] = "our control"
    cost: ClassVar[str] = "nothing"
    expect: ClassVar[str] = (
        "captions: fewer inventions and less seen (40 words on the embedded model: CHAIR_S −11.4 [−14.2, −8.8], "
        "recall −8.8 [−10.3, −7.3]); what a method must beat"
    )

    words: Annotated[int, Range(1)] = 60
    """Words that are kept, separated by white space."""

    def idle_hint(self) -> str:
        """The answers are short."""
        return f"no answer has more than {self.words} words."

    def decode(self, run: Batch) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """The longest beginning of each answer that has no more words."""
        from bisect import bisect_right

        answers, said = run.generate(), []
        for i, tokens in enumerate(answers):
            n = bisect_right(range(1, len(tokens) + 1), self.words, key=lambda k: len(run.text(tokens[:k]).split()))
            answers[i] = tokens[:n]
            said.append({"acted": n < len(tokens)})
        return answers, said
