"""SPIN, image-guided head suppression: for every token, quieten the heads that attend to the image least.

Sarkar et al., "Mitigating Hallucinations in Vision-Language Models through Image-Guided Head Suppression", EMNLP 2025,
arXiv 2505.16411; official code YUECHE77/SPIN (MIT). In each layer the heads are ranked by their scores of image tokens
in the row that predicts the next token; those at the end of the ranking have their outputs in that row multiplied by
`eps`. The paper speaks of attention to the image; the released code sums scores before the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = -1e30
"""Scores below this are those of keys that a row may not see."""


@dataclass(frozen=True)
class SPIN(Intervention):
    """Suppression of heads that look away from the image. Acts on the last prompt row and on every new token: all
    weights of a head are scaled, which is the same as its output."""

    name: ClassVar[str] = "spin"
    summary: ClassVar[str] = "quietens heads that attend to the image least"
    paper: ClassVar[str] = "SPIN, EMNLP 2025, arXiv 2505.16411"
    cost: ClassVar[str] = "no extra pass; attention of one row per token again in float32, in all edited layers"
    expect: ClassVar[str] = (
        "captions; yes/no with r=0.8,eps=0.1; settings belong to LLaVA-1.5. Captions of the embedded model repeat "
        "themselves (60 scenes, --method none,spin --limit 60: +51.7 [+38.3, +65.0]), CHAIR_S −3.3 [−15.0, +8.3]"
    )

    r: Annotated[float, Range(above=0, most=1)] = 0.95
    """Share of a layer's heads that stay, rounded down: 30 of 32 for captions of LLaVA-1.5; 0.8 for its POPE, 0.7 for
    captions of Qwen-VL-Chat (code)."""
    eps: Annotated[float, Range(0)] = 0.08
    """Factor on the outputs of the others; 0.1 for POPE (code)."""
    rank_by: Literal["scores", "mass"] = "scores"
    """By the sum of image tokens' scores before the softmax (code), or of their weights after it (paper)."""
    layers: Layers | None = None
    """Edited layers, 0-based. `None`: all (code for LLaVA-1.5); 0 to 19 of 32 for Qwen-VL-Chat."""

    select: Literal["least", "most"] = "least"
    """Which heads are quietened: those that attend to the image least; as a control (ours) those that do most."""

    @property
    def traits(self) -> Traits:
        """A row is edited by its own scores alone. Heads are chosen per sample; in a batch the release mixes them."""
        return Traits(shares_pictures=True, by_plan=True)

    def acts_at(self, stage: str) -> bool:
        """A factor of 1, or all heads, change nothing; by mass, scores are not looked at."""
        looks = stage != "scores" or self.rank_by == "scores"
        return super().acts_at(stage) and looks and self.eps != 1 and self.r != 1

    def at_layers(self, n_layers: int) -> range | tuple[int, ...]:
        """Edited layers."""
        return range(n_layers) if self.layers is None else self.layers

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """Scores stay; e_h, their sum over image keys, is kept for the weights of the same rows."""
        e = (s.masked_fill(s < HIDDEN, 0) * self._image(s, site)).sum(-1, keepdim=True)  # (B, H, R, 1)
        kept = site.memo.setdefault("e", {})
        if site.n_prompt or site.layer not in kept or kept[site.layer].shape != e.shape:
            kept[site.layer] = e
        else:  # by plan, a new token finds its place
            kept[site.layer].copy_(e)
        return s

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """Multiply a_h by eps, but for the int(r H) heads with the largest e_h."""
        has_image = site.memo.setdefault("acted", site.has_image)
        by_mass = self.rank_by == "mass"
        e = (a * self._image(a, site)).sum(-1, keepdim=True) if by_mass else site.memo["e"][site.layer]
        n_quiet = a.shape[1] - int(self.r * a.shape[1])
        quiet = e.topk(n_quiet, dim=1, largest=self.select == "most").indices
        gains = e.new_ones(e.shape).scatter(1, quiet, self.eps)
        return a * gains.where(has_image.to(a.device)[:, None, None, None], 1.0)

    def _image(self, x: Tensor, site: Site) -> Tensor:
        """(B, 1, 1, K) image keys."""
        return site.kept("image", x, lambda masks: masks.image[:, None, None].to(x.dtype))

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
