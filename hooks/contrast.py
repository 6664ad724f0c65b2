"""Image-free contrast: prefer the tokens that the image makes likelier.

A second stream reads the same prompt without its image tokens and gets the same answer; what it would say by itself is
taken off the logits. This is the guidance of PAI (Liu et al., ECCV 2024, arXiv 2407.21771; official code LALBJ/PAI)
alone, and, with a weight that grows along the answer, M3ID (Favero et al., "Multi-Modal Hallucination Control by Visual
Information Grounding", CVPR 2024, arXiv 2403.14003; no official code, known to us through ports). M3ID's paper also
leaves alone what the model is sure of, which of the ports only the package mitigv does: variant `gated`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.parts.plausible import plausible, ruled
from vlmfix.method.intervention import LATER, Intervention, Traits
from vlmfix.method.kinds import Range
from vlmfix.method.site import Step

if TYPE_CHECKING:
    from torch import Tensor

    from vlmfix.method.prompt import Prompt


def contrasted(scores: Tensor, other: Tensor, weight: Any, beta: float, as_logits: bool = False) -> Tensor:
    """Log-probabilities (B, V) of c + weight (c - u), with c, u the log-softmax of both streams' (B, V) logits.

    Tokens with c < max c + log(beta), which the main stream finds implausible, get none. Written so, the rules of VCD
    (weight = alpha), PAI (weight = gamma - 1) and M3ID are one; a weight may be one per sample, (B, 1). With
    `as_logits` c and u are the logits themselves, and so is the result: the same distribution, at the level that the
    releases hand to penalties.
    """
    c, u = scores.float(), other.float()
    if not as_logits:
        c, u = c.log_softmax(-1), u.log_softmax(-1)
    return ruled(c + weight * (c - u), plausible(c, beta), as_logits)


@dataclass(frozen=True)
class Contrast(Intervention):
    """Contrast with a stream that does not see the image. Acts on the logits of every new token."""

    name: ClassVar[str] = "contrast"
    summary: ClassVar[str] = "takes off the logits what the model would say without the image"
    paper: ClassVar[str] = "guidance of PAI, arXiv 2407.21771; variant m3id: Favero et al., CVPR 2024, arXiv 2403.14003"
    cost: ClassVar[str] = "a second stream without the image: a short prefill, and twice the rows per token"
    expect: ClassVar[str] = (
        "captions: on the embedded model fewer inventions, CHAIR_S −7.0 [−11.0, −3.5], and no less seen; yes/no: "
        "nothing"
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "pai": {"weight": "constant", "t0": 0, "beta": 0.1, "gate": 1},
        "m3id": {"weight": "growing", "t0": 1, "beta": 0.1, "gate": 1},
        "ritual": {"weight": "growing", "t0": 0, "beta": 0.1, "gate": 1},
        "gated": {"weight": "growing", "t0": 1, "beta": 0, "gate": 0.3},
    }
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"gamma": (1.1, 1.5)}

    gamma: Annotated[float, Range(above=0)] = 1.1
    """Strength of PAI's rule, out = c + (gamma - 1)(c - u); 1.1 in the published runs (code). 1: nothing is done."""
    beta: Annotated[float, Range(0, 1)] = LATER
    """Tokens less likely than `beta` times the likeliest are ruled out, 0 <= beta <= 1; 0.1 (code), but for `gated`
    none (port). `None`: the variant's."""
    lam: Annotated[float, Range(0)] = 0.02
    """`lambda` of M3ID: out = c + (exp(lambda t) - 1)(c - u) at token t (ports)."""
    variant: Literal["pai", "m3id", "ritual", "gated"] = "pai"
    """Fills settings: PAI's guidance, M3ID with t from 1 (port in AvisC) or from 0 (in RITUAL), or with its gate."""
    weight: Literal["constant", "growing"] = LATER
    """`constant`: gamma - 1 (PAI); `growing`: exp(lambda t) - 1 (M3ID). `None`: the variant's."""
    t0: Annotated[int, Range(0)] = LATER
    """Number of the first token in M3ID's rule; with 0 it stays as it is but for `beta`. `None`: the variant's."""

    gate: Annotated[float, Range(above=0, most=1)] = LATER
    """Tokens are contrasted only where the likeliest has a probability of at most this; 1: everywhere; 0.3 in M3ID's
    gate (port). `None`: the variant's."""

    @property
    def traits(self) -> Traits:
        """The second stream needs the whole prompt at once. PAI's guidance is a processor that comes after penalties in
        its release; M3ID's ports, as VCD, contrast first."""
        return Traits(whole_prompt=True, before_penalties=self.weight == "growing")

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Prepare the second stream; it starts when the first token is chosen."""
        memo["seen"] = prompt.geometry.image.any(1)
        does_nothing = self.weight == "constant" and self.gamma == 1
        if bool(memo["seen"].any()) and not does_nothing:
            memo["blind"] = prompt.image_free_stream()

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Give c + w (c - u) on plausible tokens; samples without an image are left alone."""
        if "blind" not in step.memo:
            return scores
        growing = math.exp(min(self.lam * (step.index + self.t0), 20.0)) - 1
        weight: Any = self.gamma - 1 if self.weight == "constant" else growing
        if self.gate < 1:
            unsure = scores.float().softmax(-1).amax(-1, keepdim=True) <= self.gate
            weight = weight * unsure
        out = contrasted(scores, step.memo["blind"].logits, weight, self.beta, step.as_logits)
        return out.where(step.memo["seen"][:, None], scores)

    def controls(self) -> tuple[Intervention, ...]:
        """The plausibility rule alone, and the contrast turned round."""
        if self.weight == "growing":
            return (replace(self, lam=0.0),)
        rule_alone = replace(self, gamma=1.0 + 1e-9)
        turned = (replace(self, gamma=2 - self.gamma),) if 1 < self.gamma < 2 else ()
        return rule_alone, *turned

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`, whether there was an image to do without."""
        return [{"acted": seen and "blind" in memo} for seen in memo["seen"].tolist()] if "seen" in memo else []

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens, or gamma is 1."
