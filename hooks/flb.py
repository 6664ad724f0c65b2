"""FLB, first logit boosting: keep in mind what the model wanted to say first.

"First Logit Boosting", CVPR 2026; official code jiwooha20/FLB. The first token of an answer is chosen with nothing but
prompt and image before it; further on the answer's own words push the image aside. So the logits of the first token
come back with a weight that grows along the answer. They also favour words that can begin an answer: watch the style.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Range
from vlmfix.method.site import Step

if TYPE_CHECKING:
    from torch import Tensor

    from vlmfix.method.prompt import Prompt


@dataclass(frozen=True)
class FLB(Intervention):
    """First logit boosting. Acts on the logits of every new token."""

    name: ClassVar[str] = "flb"
    summary: ClassVar[str] = "adds the logits of the first token to those of later ones"
    paper: ClassVar[str] = "First Logit Boosting, CVPR 2026"
    cost: ClassVar[str] = "nothing"
    expect: ClassVar[str] = "long captions only, nothing on answers of one word; untested here"

    gamma: Annotated[float, Range(0)] = 0.3
    """Weight of the first logits at the end of a long answer, 0 or more (code)."""
    lam: Annotated[float, Range(0)] = 0.05
    """`lambda`: how fast the weight grows, gamma (1 - exp(-lambda t)) at token t (code)."""
    beta: Annotated[float, Range(above=0, most=1)] = 0.1
    """Tokens less likely than `beta` times the likeliest are ruled out, 0 < beta <= 1 (code)."""

    @property
    def traits(self) -> Traits:
        """The first logits belong to one answer, so no beams (ours); the release's come before penalties."""
        return Traits(sequential=True, before_penalties=True)

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Which samples show an image; the others are left alone (ours)."""
        memo["acted"] = prompt.geometry.image.any(1)

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Give l_t + gamma (1 - exp(-lambda t)) l_0 on plausible tokens."""
        memo, raw = step.memo, scores.float()
        first = memo.setdefault("first", raw)
        weight = self.gamma * (1 - math.exp(-self.lam * step.index))
        plausible = raw >= raw.amax(-1, keepdim=True) + math.log(self.beta)
        out = raw.add(first, alpha=weight).masked_fill(~plausible, -math.inf)
        return out.where(memo["acted"][:, None], raw)

    def controls(self) -> tuple[Intervention, ...]:
        """The plausibility rule alone."""
        return (replace(self, gamma=0.0),)

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
