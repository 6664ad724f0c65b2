"""TVAI: raise the scores of image tokens in middle layers, and of the prompt's text somewhat earlier.

arXiv 2508.02419; official code zhenghh8/TVAI (MIT), which stands on PAI's. Raising image tokens alone, as PAI does,
makes a model forget what it was asked; so the tokens of system text and question are raised as well, in other layers.
Like PAI, it comes with a guidance that takes off the logits what the model would say without the image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from vlmfix.hooks.contrast import Contrast
from vlmfix.method.intervention import Intervention, ScoreMod, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Site, Step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.method.prompt import Prompt
    from vlmfix.model.anatomy import Anatomy
    from vlmfix.model.geometry import Geometry


@dataclass(frozen=True)
class TVAI(Intervention):
    """Text and visual attention intervention. Acts on attention scores of the last prompt row and of every new token,
    and, with `gamma`, on the logits of every new token."""

    name: ClassVar[str] = "tvai"
    summary: ClassVar[str] = "raises the scores of image and prompt, in layers of their own"
    paper: ClassVar[str] = "TVAI, arXiv 2508.02419"
    cost: ClassVar[str] = (
        "no extra pass; attention of one row per token again in float32. With gamma: a second stream without the image"
    )
    expect: ClassVar[str] = (
        "captions and yes/no; the sizes belong to LLaVA-1.5. Captions of the embedded model repeat themselves (60 "
        "scenes, --method none,tvai --limit 60: +31.7 [+20.0, +43.3]), CHAIR_S −13.3 [−28.3, +1.7]"
    )

    alpha: Annotated[float, Range(-1)] = 0.93
    """s += alpha |s| on system and question tokens (code, for CHAIR and POPE)."""
    beta: Annotated[float, Range(-1)] = 0.5
    """s += beta |s| on image tokens (code). With normed queries and keys (Qwen3-VL, Gemma 3) both mean nothing."""
    text_layers: Layers | None = None
    """Layers in which text is raised, 0-based. `None`: 5 to 20 of 32 (code), the same depth of other models (ours)."""
    image_layers: Layers | None = None
    """Layers in which the image is raised, 0-based. `None`: 10 to 30 of 32 (code), the same depth of others (ours)."""
    gamma: Annotated[float, Range(above=0)] | None = None
    """Strength of the guidance, out = c + (gamma - 1)(c - u): 1.1 for CHAIR, 1.2 for POPE (code). `None`: none."""

    @property
    def traits(self) -> Traits:
        """The second stream needs the whole prompt at once; without it only rows that predict tokens are edited."""
        return Traits(whole_prompt=self.gamma is not None, shares_pictures=self.gamma is None, by_plan=True)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[TVAI, dict[str, Any]]:
        """Fill in the layers for the loaded model."""
        n_layers = len(anatomy.layers)
        text = tuple(layers_of(5, 20, n_layers)) if self.text_layers is None else self.text_layers
        image = tuple(layers_of(10, 30, n_layers)) if self.image_layers is None else self.image_layers
        return replace(self, text_layers=text, image_layers=image), {}

    def acts_at(self, stage: str) -> bool:
        """Without guidance there is no second stream; pushes of 0 change nothing."""
        if stage == "scores":
            return (self.alpha, self.beta) != (0, 0)
        return super().acts_at(stage) and (self.gamma is not None or stage not in ("begin", "logits"))

    def at_layers(self, n_layers: int) -> list[int]:
        """Layers in which one or the other is raised."""
        return sorted({*(self.text_layers or ()), *(self.image_layers or ())})

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Prepare the stream without the image."""
        self._guidance().begin(prompt, memo)

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Give c + (gamma - 1)(c - u) on plausible tokens."""
        return self._guidance().logits(scores, step)

    def _guidance(self) -> Contrast:
        return Contrast(gamma=self.gamma)  # type: ignore[arg-type]

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """s_k + alpha |s_k| for text keys k of the prompt, s_k + beta |s_k| for image keys."""
        return s.addcmul(s.abs(), self._raise_by(s, site))

    def score_mod(self, s: Tensor, site: Site) -> ScoreMod:
        """The same, entry by entry."""
        raise_by = self._raise_by(s, site)
        return lambda s, b, h, q, k: s + raise_by[b, 0, 0, k] * s.abs()

    def _raise_by(self, s: Tensor, site: Site) -> Tensor:
        """(B, 1, 1, K) how much each key is raised in this layer; not at all in a sample without image."""
        site.memo.setdefault("acted", site.has_image)
        alpha = self.alpha if site.layer in (self.text_layers or ()) else 0.0
        beta = self.beta if site.layer in (self.image_layers or ()) else 0.0

        def make(masks: Geometry) -> Tensor:
            text = masks.prompt & ~masks.image & masks.image.any(1, keepdim=True)
            return (alpha * text + beta * masks.image)[:, None, None]

        return site.kept(("raise_by", alpha, beta), s, make)

    def controls(self) -> tuple[Intervention, ...]:
        """The image alone, and the text alone."""
        both = self.alpha != 0 and self.beta != 0
        return (replace(self, alpha=0.0), replace(self, beta=0.0)) if both else ()

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
