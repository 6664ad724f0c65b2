"""PAI, pay more attention to the image: raise the scores of image tokens before the softmax.

Liu, Zheng, Chen, "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs",
ECCV 2024, arXiv 2407.21771; official code LALBJ/PAI. In every head, the score of each image token is raised by
`alpha` times its own size, for the row that predicts the next token. Guidance, the method's second half, takes off the
logits what the model would say without the image; the paper's tables use both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.contrast import Contrast
from vlmfix.method.intervention import Intervention, ScoreMod, Traits
from vlmfix.method.kinds import Range
from vlmfix.method.site import Rows, Site, Step

if TYPE_CHECKING:
    from torch import Tensor

    from vlmfix.method.prompt import Prompt


@dataclass(frozen=True)
class PAI(Intervention):
    """Paying more attention to image. Acts on attention scores of the last prompt row and of every new token, and, with
    `gamma`, on the logits of every new token."""

    name: ClassVar[str] = "pai"
    summary: ClassVar[str] = "raises the attention scores of image tokens"
    paper: ClassVar[str] = "Liu et al., ECCV 2024, arXiv 2407.21771"
    cost: ClassVar[str] = (
        "no extra pass; attention of one row per token again in float32. With gamma: a second stream without the image"
    )
    expect: ClassVar[str] = (
        "captions: fewer inventions at the price of repetition; yes/no: little. The size of alpha belongs to LLaVA-1.5"
    )
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"alpha": (0.1, 0.2, 0.05, 0.4)}

    alpha: float = 0.5
    """s += alpha |s| on image tokens. 0.5 for captions in later papers' runs (code); the authors' README has 0.2.
    Depends on the size of scores: with normed queries and keys (Qwen3-VL, Gemma 3) published values mean nothing."""
    skip_first: Annotated[int, Range(0)] = 2
    """The first layers are left alone (code)."""
    gamma: Annotated[float, Range(above=0)] | None = None
    """Strength of the guidance, out = c + (gamma - 1)(c - u); 1.1 in published runs (code). `None`: none."""
    variant: Literal["paper", "release"] = "paper"
    """`release`: with guidance, the released code leaves the prefill's attention alone, so that one-word answers never
    see the attention edit."""

    @property
    def traits(self) -> Traits:
        """The second stream needs the whole prompt at once; without it only rows that predict tokens are edited."""
        return Traits(whole_prompt=self.gamma is not None, shares_pictures=self.gamma is None, by_plan=True)

    def acts_at(self, stage: str) -> bool:
        """Without guidance there is no second stream."""
        return super().acts_at(stage) and (self.gamma is not None or stage not in ("begin", "logits"))

    @property
    def rows(self) -> Rows:
        """Rows whose scores are raised."""
        return "generated" if self.variant == "release" and self.gamma is not None else "last"

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Prepare the stream without the image."""
        self._guidance().begin(prompt, memo)

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Give c + (gamma - 1)(c - u) on plausible tokens."""
        return self._guidance().logits(scores, step)

    def _guidance(self) -> Contrast:
        return Contrast(gamma=self.gamma)  # type: ignore[arg-type]

    def at_layers(self, n_layers: int) -> range:
        """Edited layers."""
        return range(self.skip_first, n_layers)

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """s_j + alpha |s_j| for image keys j."""
        return s.addcmul(s.abs(), self._raise_by(s, site))

    def score_mod(self, s: Tensor, site: Site) -> ScoreMod:
        """The same, entry by entry."""
        raise_by = self._raise_by(s, site)
        return lambda s, b, h, q, k: s + raise_by[b, 0, 0, k] * s.abs()

    def _raise_by(self, s: Tensor, site: Site) -> Tensor:
        """(B, 1, 1, K) alpha on image keys."""
        if "acted" not in site.memo:
            site.memo["acted"] = site.has_image
        return site.kept("raise_by", s, lambda masks: self.alpha * masks.image[:, None, None])

    def controls(self) -> tuple[Intervention, ...]:
        """Image tokens pushed down instead."""
        return (replace(self, alpha=-self.alpha),)

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
