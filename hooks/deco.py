"""DeCo, dynamic correction decoding: add to the logits what an inner layer was surest of.

Wang et al., "MLLM Can See? Dynamic Correction Decoding for Hallucination Mitigation", ICLR 2025, arXiv 2410.11779;
official code zjunlp/DeCo. Models recognise an object in their inner layers, and the last ones talk it away out of
habit. So among the last layer's likely tokens the inner layer is sought that gives one of them the highest
probability; its logits are added, weighted by that probability.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from vlmfix.hooks.parts.plausible import ruled
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Step

if TYPE_CHECKING:
    from torch import Tensor


def candidates(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, V) bool: of the `top_k` likeliest tokens those up to the one at which their probabilities reach `top_p`."""
    p, order = scores.softmax(-1).topk(min(top_k, scores.shape[-1]), dim=-1)
    needed = p.cumsum(-1) - p < top_p  # what comes before it falls short
    return scores.new_zeros(scores.shape).bool().scatter(-1, order, needed)


@dataclass(frozen=True)
class DeCo(Intervention):
    """Dynamic correction decoding. Acts on the logits of every new token."""

    name: ClassVar[str] = "deco"
    summary: ClassVar[str] = "adds to the logits what an inner layer was surest of"
    paper: ClassVar[str] = "Wang et al., ICLR 2025, arXiv 2410.11779"
    cost: ClassVar[str] = "the model's head once more for each of nine layers"
    expect: ClassVar[str] = (
        "captions; at the published strength those of the embedded model repeat themselves (60 scenes, --method "
        "none,deco --limit 60: +16.7 [+8.3, +26.7]), CHAIR_S +8.3 [−1.7, +18.3]"
    )

    alpha: Annotated[float, Range(0)] = 0.6
    """Weight of the inner layer's logits, times its highest probability (code; the README's text has 0.5)."""
    top_k: Annotated[int, Range(1)] = 20
    """Most tokens among which the answer goes on (port)."""
    top_p: Annotated[float, Range(above=0, most=1)] = 0.9
    """Probability that these must reach together; the token with which they do is among them (port)."""
    layers: Layers | None = None
    """Layers whose input is read, 0-based. `None`: 20 to 28 of 32 (README), the same depth of other models (ours)."""

    @property
    def traits(self) -> Traits:
        """Inner layers are read with the model's head."""
        return Traits(lens=True)

    def at_layers(self, n_layers: int) -> range | tuple[int, ...]:
        """Layers whose input is read."""
        return layers_of(20, 28, n_layers) if self.layers is None else self.layers

    def hidden_layers(self, n_layers: int) -> list[int]:
        """The layers before them, whose output that is."""
        return [layer - 1 for layer in self.at_layers(n_layers)]

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Give l + alpha m l_j* on the candidates, with layer j* and its highest probability m of a candidate."""
        import torch

        step.memo["acted"] = step.has_image
        raw = scores.float()
        inner = torch.stack([step.lens(layer) for layer in sorted(step.states)]).to(raw.device)[..., : raw.shape[-1]]
        allowed = candidates(raw, self.top_k, self.top_p)
        surest = inner.softmax(-1).masked_fill(~allowed, 0).amax(-1)  # (layers, B)
        m, j = surest.max(0)
        chosen = inner[j, torch.arange(len(raw), device=raw.device)]
        out = ruled(raw + self.alpha * m[:, None] * chosen, allowed, step.as_logits)
        return out.where(step.has_image[:, None], scores)

    def controls(self) -> tuple[Intervention, ...]:
        """The choice among the candidates alone."""
        return (replace(self, alpha=0.0),) if self.alpha else ()

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
