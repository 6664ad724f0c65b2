"""PAI, pay more attention to the image: raise the scores of image tokens before the softmax.

Liu, Zheng, Chen, "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs",
ECCV 2024, arXiv 2407.21771; official code LALBJ/PAI. In every head, the score of each image token is raised by
`alpha` times its own size, for the row that predicts the next token. The method's second half, guidance by a pass
without the image, is not here yet; the paper's tables use both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vlmfix.intervention import Intervention, Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PAI(Intervention):
    """The attention edit of PAI. Acts on attention scores of the last prompt row and of every new token."""

    name: ClassVar[str] = "pai"
    summary: ClassVar[str] = "raises the attention scores of image tokens"
    paper: ClassVar[str] = "Liu et al., ECCV 2024, arXiv 2407.21771"
    cost: ClassVar[str] = "no extra pass; attention of one row per token again in float32"

    alpha: float = 0.5
    """s += alpha |s| on image tokens. 0.5 for captions in later papers' runs (code); the authors' README has 0.2.
    Depends on the size of scores: with normed queries and keys (Qwen3-VL, Gemma 3) published values mean nothing."""
    skip_first: int = 2
    """The first layers are left alone (code)."""

    def at_layers(self, n_layers: int) -> range:
        """Edited layers."""
        return range(self.skip_first, n_layers)

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """s_j + alpha |s_j| for image keys j."""
        edit = (site.geometry.image[:, None] & site.rows[..., None])[:, None]  # (B, 1, R, K)
        site.memo["sight"] = site.memo.get("sight", 0) + edit.flatten(1).sum(1)
        return (s + self.alpha * s.abs()).where(edit, s)

    def controls(self) -> tuple[Intervention, ...]:
        """Image tokens pushed down instead."""
        return (replace(self, alpha=-self.alpha),)

    def report(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`, whether there was an image to raise."""
        return [{"acted": bool(n)} for n in memo["sight"].tolist()] if "sight" in memo else []

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
