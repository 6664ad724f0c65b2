"""DoLa, decoding by contrasting layers: take off the logits what an early layer would have said.

Chuang et al., "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models", ICLR 2024, arXiv
2309.03883; official code voidism/DoLa. Of several early layers the one is taken that disagrees most with the last: what
later layers add to it is knowledge, not habit. Made for language models; no table that we know has it help against
object hallucination, so it is here as what the others are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from vlmfix.hooks.parts.plausible import plausible, ruled
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Range
from vlmfix.method.site import Step

if TYPE_CHECKING:
    from torch import Tensor


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """(...) Jensen-Shannon divergence, as DoLa has it: of log-probabilities (..., V), 1/2 [KL(m | p) + KL(m | q)] with
    their average m in front."""
    m = (p.exp() + q.exp()) / 2
    log_m = m.clamp(min=1e-38).log()
    return (m * (2 * log_m - p - q)).sum(-1) / 2


@dataclass(frozen=True)
class DoLa(Intervention):
    """Decoding by contrasting layers. Acts on the logits of every new token, where there is an image (ours)."""

    name: ClassVar[str] = "dola"
    summary: ClassVar[str] = "takes off the logits what an early layer would have said"
    paper: ClassVar[str] = "Chuang et al., ICLR 2024, arXiv 2309.03883"
    cost: ClassVar[str] = "the model's head once more for every early layer: published 1.10 to 1.25 times the time"
    expect: ClassVar[str] = (
        "made for facts in text; nothing on captions of the embedded model (60 scenes, --method none,dola --limit 60): "
        "CHAIR_S +1.7 [−3.3, +6.7]"
    )

    bucket: Literal["low", "high"] = "low"
    """Early layers among which is chosen: every second one of the first half, or of the second half, without the last;
    of more than 40 layers the first or last 20 (code)."""
    beta: Annotated[float, Range(above=0, most=1)] = 0.1
    """Tokens less likely than `beta` times the likeliest are ruled out, 0 < beta <= 1 (code)."""
    norm: bool = False
    """Whether early layers go through the last norm before the head: not in the released loop (code)."""
    select: Literal["dynamic", "first"] = "dynamic"
    """The layer that disagrees most, chosen per sample and token (the release: per batch); as a control always the
    first of them."""

    @property
    def traits(self) -> Traits:
        """Inner layers are read with the model's head."""
        return Traits(lens=True)

    def hidden_layers(self, n_layers: int) -> range:
        """Outputs of layers by their number; -1 is the embedding."""
        half = n_layers // 2
        first, stop = (0, half) if self.bucket == "low" else (half, n_layers)
        if n_layers > 40:
            first, stop = (0, 20) if self.bucket == "low" else (n_layers - 20, n_layers)
        return range(first - 1, stop - 1, 2)

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Give log p_L - log q_j* on plausible tokens, with q_j* the early layer furthest from p_L."""
        import torch

        step.memo["acted"] = step.has_image
        p = scores.float().log_softmax(-1)
        early = torch.stack([step.lens(layer, self.norm).log_softmax(-1) for layer in sorted(step.states)])
        early = early.to(p.device)[..., : p.shape[-1]]
        furthest = divergence(p, early).argmax(0)  # (B,)
        if self.select == "first":
            furthest = furthest * 0
        chosen = early[furthest, torch.arange(len(p), device=p.device)]
        out = ruled(p - chosen, plausible(p, self.beta), step.as_logits)
        return out.where(step.has_image[:, None], scores)

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
