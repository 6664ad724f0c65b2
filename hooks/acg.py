"""ACG, attention-space contrastive guidance: push each head's output away from what it would be without the image.

"Attention-space Contrastive Guidance", CVPR Findings 2026, arXiv 2601.13707; no code known, so this is written from
notes on the paper. Guidance usually needs a second pass without the image. Here each head is its own second pass: its
weights without those of image tokens give the output U that text alone would give, and the difference O - U, freed of
its part along U, is added `gamma` times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.method.intervention import LATER, Intervention, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-6


@dataclass(frozen=True)
class ACG(Intervention):
    """Attention-space contrastive guidance. Acts on the last prompt row and on every new token: outputs are sums of
    values, so the edit is one of weights, which may then be negative."""

    name: ClassVar[str] = "acg"
    summary: ClassVar[str] = "pushes head outputs away from what they are without the image"
    paper: ClassVar[str] = "ACG, CVPR Findings 2026, arXiv 2601.13707"
    cost: ClassVar[str] = "no extra pass; attention of one row per token twice again in float32, in all edited layers"
    expect: ClassVar[str] = (
        "captions and yes/no; a strong knob: at 3 LLaVA-1.5's captions are said to collapse; untested here"
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {"full": {"gamma": 2.4}, "fast": {"gamma": 2.5}}

    variant: Literal["full", "fast"] = "full"
    """All layers, or layers 0 to 7 of 32 only, the same depth of other models (ours)."""
    gamma: Annotated[float, Range(0)] = LATER
    """Strength. LLaVA-1.5 2.4 (2.5 for `fast`), Qwen-VL 1.4, MiniGPT-4 0.3, LLaVA-NeXT 2.0 (paper, by notes). `None`:
    the variant's."""
    project: Literal["head", "concat"] = "head"
    """Whether the part along U is taken off in each head, or in all heads of a layer together; the notes do not say."""
    layers: Layers | None = None
    """Edited layers, 0-based. `None`: the variant's."""

    @property
    def traits(self) -> Traits:
        """A row is edited by its own weights and the values of its layer, which a plan does not hand over."""
        return Traits(shares_pictures=True)

    def acts_at(self, stage: str) -> bool:
        """Strength 0 changes nothing."""
        return super().acts_at(stage) and self.gamma != 0

    def at_layers(self, n_layers: int) -> range | tuple[int, ...]:
        """Edited layers."""
        if self.layers is not None:
            return self.layers
        return range(n_layers) if self.variant == "full" else layers_of(0, 7, n_layers)

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """Weights of O + gamma (dO - <dO, u> u), with dO = O - U and u = U / |U|: a sum of those of O and of U."""
        site.memo.setdefault("acted", site.has_image)
        image = site.kept("image", a, lambda masks: masks.image[:, None, None].to(a.dtype))
        text = a * (1 - image)
        rest = text.sum(-1, keepdim=True) / a.sum(-1, keepdim=True)
        of_u = text / rest.clamp(min=TINY)
        o, u = outputs(a, site.values), outputs(of_u, site.values)
        over = (-1, 1) if self.project == "concat" else (-1,)
        along = ((o - u) * u).sum(over, keepdim=True) / u.square().sum(over, keepdim=True).clamp(min=TINY**2)
        edited = (1 + self.gamma) * a - self.gamma * (1 + along) * of_u
        sees = (rest < 1) & (rest > TINY)  # some of both: else there is nothing to tell apart
        return edited.where(sees, a)

    def controls(self) -> tuple[Intervention, ...]:
        """Much less of it."""
        return (replace(self, gamma=self.gamma / 10),) if self.gamma else ()

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."


def outputs(a: Tensor, values: Any) -> Tensor:
    """(B, H, R, d) sums of values (B, Hk, K, d) with weights (B, H, R, K)."""
    b, n_heads, n_rows, n_keys = a.shape
    grouped = a.reshape(b, values.shape[1], -1, n_keys)
    return (grouped @ values.float()).view(b, n_heads, n_rows, -1)
