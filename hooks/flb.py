"""FLB, first logit boosting: keep in mind what the model wanted to say first.

"First Logit Boosting", CVPR 2026; official code jiwooha20/FLB. The first token of an answer is chosen with nothing but
prompt and image before it; further on the answer's own words push the image aside. So the logits of the first token
come back with a weight that grows along the answer. They also favour words that can begin an answer: watch the style.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from vlmfix.hooks.parts.plausible import plausible, ruled
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Range
from vlmfix.method.site import Step

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FLB(Intervention):
    """First logit boosting. Acts on the logits of every new token; of the first one by `beta` alone. In a further turn
    the first token is that of the turn (ours)."""

    name: ClassVar[str] = "flb"
    summary: ClassVar[str] = "adds the logits of the first token to those of later ones"
    paper: ClassVar[str] = "First Logit Boosting, CVPR 2026"
    cost: ClassVar[str] = "nothing"
    expect: ClassVar[str] = (
        "long captions only, nothing on answers of one word. On 60 scenes of the embedded model as published (--method "
        "none,flb --limit 60): CHAIR_S −43.3 [−55.0, −31.7], recall −2.3 [−5.5, +0.6], ten words fewer"
    )

    gamma: Annotated[float, Range(0)] = 0.3
    """Weight of the first logits at the end of a long answer, 0 or more (code)."""
    lam: Annotated[float, Range(0)] = 0.05
    """`lambda`: how fast the weight grows, gamma (1 - exp(-lambda t)) at token t (code)."""
    beta: Annotated[float, Range(above=0, most=1)] = 0.1
    """Tokens less likely than `beta` times the likeliest are ruled out, 0 < beta <= 1 (code)."""

    @property
    def traits(self) -> Traits:
        """The release's rule comes before penalties."""
        return Traits(before_penalties=True)

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """l_t + gamma (1 - exp(-lambda t)) l_0 on plausible tokens; samples without an image are left alone (ours)."""
        memo, raw = step.memo, scores.float()
        memo["acted"] = step.has_image
        if step.index == 0:
            memo["first"] = raw
        weight = self.gamma * (1 - math.exp(-self.lam * step.index))
        out = ruled(raw.add(memo["first"], alpha=weight), plausible(raw, self.beta), step.as_logits)
        return out.where(step.has_image[:, None], scores)

    def controls(self) -> tuple[Intervention, ...]:
        """The plausibility rule alone."""
        return (replace(self, gamma=0.0),) if self.gamma else ()

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
