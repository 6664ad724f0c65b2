"""SPARC, selective progressive attention re-calibration: image tokens that gain attention keep a louder voice.

Jung et al., "Visual Attention Never Fades: Selective Progressive Attention ReCalibration for Detailed Image Captioning
in Multimodal Large Language Models", ICML 2025, arXiv 2502.01419; official code mingi000508/SPARC. In long captions
attention to the image fades and spreads. One layer watches which image tokens get much more attention at this token
than lately; from the next token on their values count `alpha` times more in every layer, again and again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Range
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class SPARC(Intervention):
    """Selective progressive attention re-calibration. Acts on new tokens, from the third on. A louder value is a larger
    weight, and nothing is renormalised; the release scales the values in the cache. Of a further turn's prompt the last
    row alone hears louder values (ours)."""

    name: ClassVar[str] = "sparc"
    summary: ClassVar[str] = "strengthens image tokens whose attention rises"
    paper: ClassVar[str] = "Jung et al., ICML 2025, arXiv 2502.01419"
    cost: ClassVar[str] = "no extra pass; attention of one row per token again in float32, not by plan, since it learns"
    expect: ClassVar[str] = "detailed captions only, nothing on yes/no; tau belongs to the model; untested here"

    alpha: Annotated[float, Range(above=0)] = 1.1
    """Factor on the values of a token each time it is selected (code)."""
    beta: Annotated[float, Range(0, 1)] = 0.1
    """Weight of the past in the running mean of attention, e = (1 - beta) a + beta e (code)."""
    tau: Annotated[float, Range(-1)] = 1.5
    """Selected where (a - e) / e is at least this: 1.5 for LLaVA-1.5-7B, 4 for LLaVA-NeXT-7B (code)."""
    layer: Annotated[int, Range(0)] | None = None
    """The layer that watches, 0-based. `None`: 20 of 32 (code), the same depth of other models (ours)."""
    cap: Annotated[float, Range(1)] | None = None
    """Most that a token's factors may come to. `None`: no bound, as released; tokens that are selected often run
    away."""

    @property
    def traits(self) -> Traits:
        """Factors grow from token to token."""
        return Traits(shares_pictures=True, stepwise=True)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[SPARC, dict[str, Any]]:
        """Find the layer that watches; in hybrid decoders the next one with attention."""
        n_layers, attending = len(anatomy.layers), anatomy.attention_layers
        wanted = layers_of(20, 31, n_layers).start if self.layer is None else self.layer
        if wanted not in attending and self.layer is not None:
            raise ValueError(f"layer: expected one with attention, {attending[0]}..{attending[-1]}, got {self.layer}")
        nearest = min(attending, key=lambda layer: (abs(layer - wanted), layer))
        return replace(self, layer=nearest), {"attending": list(attending)}

    def acts_at(self, stage: str) -> bool:
        """A factor of 1 changes nothing."""
        return super().acts_at(stage) and self.alpha != 1

    def at_layers(self, n_layers: int) -> Iterable[int]:
        """All."""
        return range(n_layers)

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """Multiply a_k by m_k on image keys; the watching layer then selects for the next token."""
        memo = site.memo
        if site.n_prompt:
            if site.layer == self.layer:
                memo["acted"] = site.has_image
                memo["e"] = self._image_attention(a, site)
            return a if "m" not in memo else a * self._gain(a, site)
        memo.setdefault("first_layer", site.layer)
        if site.layer == memo["first_layer"] and "selected" in memo:
            memo["m"] = self._louder(memo.get("m"), memo.pop("selected"))
        out = a if "m" not in memo else a * self._gain(a, site)
        if site.layer == self.layer:
            now, e = self._image_attention(a, site), memo["e"]
            memo["selected"] = (now > 0) & (now - e >= self.tau * e)
            memo["e"] = (1 - self.beta) * now + self.beta * e
        return out

    def _louder(self, m: Tensor | None, selected: Tensor) -> Tensor:
        """(B, N) factors on the prompt's keys, those of the selected ones times alpha."""
        import torch

        factors = 1 + (self.alpha - 1) * selected.float()
        if m is not None:  # a further turn has a longer prompt
            factors = factors * torch.nn.functional.pad(m, (0, factors.shape[1] - m.shape[1]), value=1.0)
        return factors if self.cap is None else factors.clamp(max=self.cap)

    @staticmethod
    def _image_attention(a: Tensor, site: Site) -> Tensor:
        """(B, N) mean over heads of the row that predicts, on the N keys of the prompt; 0 but on image keys."""
        import torch

        geometry = site.prompt or site.geometry
        rows = site.rows.to(a)[:, None, :, None]
        looked = (a * rows).sum(2).mean(1)  # one row of each sample is admitted
        before = site.first_key
        everywhere = torch.nn.functional.pad(looked, (before, 0))
        n = geometry.n
        everywhere = torch.nn.functional.pad(everywhere, (0, max(n - everywhere.shape[1], 0)))[:, :n]
        return everywhere * geometry.image.to(a)

    @staticmethod
    def _gain(a: Tensor, site: Site) -> Tensor:
        """(B, 1, 1, K) factors on this layer's keys; 1 on all that came after the prompt."""
        import torch

        m = site.memo["m"].to(a.device)
        n = site.first_key + a.shape[-1]
        return torch.nn.functional.pad(m, (0, max(n - m.shape[1], 0)), value=1.0)[:, None, None, site.first_key : n]

    def controls(self) -> tuple[Intervention, ...]:
        """Selected tokens weakened instead."""
        return (replace(self, alpha=1 / self.alpha),) if self.alpha > 1 else ()

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
