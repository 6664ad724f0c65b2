"""VAF, visual amplification fusion: multiply the scores of image tokens, and weaken those of the system text.

Yin et al., "ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large Language
Models", CVPR 2025; official code ustc-hyin/ClearSight. In the middle layers, where a model fuses what it sees with what
it was asked, each head's score of an image token is multiplied by `enh`, that of a system token by `sup`. Unlike in
PAI, the sign stays: a negative score of an image token becomes smaller, one of a system token larger.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.method.intervention import Intervention, ScoreMod, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy
    from vlmfix.model.geometry import Geometry


@dataclass(frozen=True)
class VAF(Intervention):
    """Visual amplification fusion. Acts on attention scores of the prompt's rows after the image and of new tokens."""

    name: ClassVar[str] = "vaf"
    summary: ClassVar[str] = "multiplies the attention scores of image tokens, in middle layers"
    paper: ClassVar[str] = "Yin et al., CVPR 2025, ClearSight"
    cost: ClassVar[str] = "no extra pass; attention of the rows after the image again in float32"
    expect: ClassVar[str] = "yes/no mainly: the authors report POPE and no captions; untested here"
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"enh": (1.15, 1.3), "sup": (0.95, 0.8)}

    enh: Annotated[float, Range(above=0)] = 1.15
    """Factor on the scores of image tokens, above 0 (code)."""
    sup: Annotated[float, Range(above=0)] = 0.95
    """Factor on the scores of system tokens, above 0 (code)."""
    layers: Layers | None = None
    """Edited layers, 0-based. `None`: 9 to 14 of 32 (code), the same depth of other models (ours)."""
    rows: Literal["after_last_image", "last"] = "after_last_image"  # type: ignore[misc]
    """Prompt rows that are edited: after the image (code), or the last alone (ours)."""

    @property
    def traits(self) -> Traits:
        """A row is edited by its own scores alone."""
        return Traits(shares_pictures=True, by_plan=True)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[VAF, dict[str, Any]]:
        """Fill in the layers for the loaded model."""
        if self.layers is not None:
            return self, {"layers_origin": "given"}
        return replace(self, layers=tuple(layers_of(9, 14, len(anatomy.layers)))), {"layers_origin": "depth"}

    def acts_at(self, stage: str) -> bool:
        """Two factors of 1 change nothing."""
        return super().acts_at(stage) and (self.enh, self.sup) != (1, 1)

    def at_layers(self, n_layers: int) -> tuple[int, ...]:
        """Edited layers."""
        return self.layers or ()

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """Enh s_k for image keys k, sup s_k for system keys."""
        return s * (1 + self._change(s, site))

    def score_mod(self, s: Tensor, site: Site) -> ScoreMod:
        """The same, entry by entry."""
        change = self._change(s, site)
        return lambda s, b, h, q, k: s * (1 + change[b, 0, 0, k])

    def _change(self, s: Tensor, site: Site) -> Tensor:
        """(B, 1, 1, K) factor less 1; nothing in a sample without image."""
        site.memo.setdefault("acted", site.has_image)

        def make(masks: Geometry) -> Tensor:
            system = masks.system & masks.image.any(1, keepdim=True)
            return ((self.enh - 1) * masks.image + (self.sup - 1) * system)[:, None, None]

        return site.kept("change", s, make)

    def controls(self) -> tuple[Intervention, ...]:
        """Both factors turned round."""
        return (replace(self, enh=1 / self.enh, sup=1 / self.sup),)

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
