"""HGAI, heads guided by the middle layers: raise the scores of image tokens by what all heads of the layer agree on.

Jiang et al., "Devils in Middle Layers of Large Vision-Language Models: Interpreting, Detecting and Mitigating Object
Hallucinations via Attention Lens", CVPR 2025, arXiv 2411.16724; official code
ZhangqiJiang07/middle_layers_indicating_hallucinations. In the middle layers, which look at the image most, heads look
at different things when the model invents an object. So every head gets the same push towards each image token:
`alpha` times the mean over heads of the score's size. The size of scores depends on the model; published values of
`alpha` mean nothing for models with normed queries and keys (Qwen3-VL, Gemma 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Layers
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HGAI(Intervention):
    """Heads guided attention intervention. Acts on attention scores of the last prompt row and of every new token."""

    name: ClassVar[str] = "hgai"
    summary: ClassVar[str] = "raises scores of image tokens by what all heads agree on"
    paper: ClassVar[str] = "Jiang et al., CVPR 2025, arXiv 2411.16724"
    cost: ClassVar[str] = "no extra pass; attention of one row per token again in float32"
    expect: ClassVar[str] = (
        "captions: the best published score edit by CHAIR, and 12 % of its released captions loop; untested here"
    )
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"alpha": (0.2, 0.5, 1.0)}

    alpha: float = 0.5
    """s += alpha mean_h |s| on image tokens (code)."""
    variant: Literal["paper", "adaiat"] = "paper"
    """Which layers where none are given, of 32: 5 to 18 (paper), or 5 to 17, as in AdaIAT's and other ports."""
    layers: Layers | None = None
    """Edited layers, 0-based. `None`: the variant's, at the same depth of other models (ours)."""

    @property
    def traits(self) -> Traits:
        """Only rows that predict tokens are edited."""
        return Traits(shares_pictures=True, by_plan=True)

    def acts_at(self, stage: str) -> bool:
        """No push changes nothing."""
        return super().acts_at(stage) and self.alpha != 0

    def at_layers(self, n_layers: int) -> range | tuple[int, ...]:
        """Edited layers."""
        if self.layers is not None:
            return self.layers
        return layers_of(5, 18 if self.variant == "paper" else 17, n_layers)

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """s_hk + alpha mean_h' |s_h'k| for image keys k: one map of pushes for all heads."""
        if "acted" not in site.memo:
            site.memo["acted"] = site.has_image
        raise_by = site.kept("raise_by", s, lambda masks: self.alpha * masks.image[:, None, None])  # (B, 1, 1, K)
        return s.addcmul(s.abs().mean(1, keepdim=True), raise_by)

    def controls(self) -> tuple[Intervention, ...]:
        """Image tokens pushed down instead."""
        return (replace(self, alpha=-self.alpha),)

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
