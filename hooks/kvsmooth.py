"""KVSmooth: blend each new token's key and value with those of the token before, and more the less focused it looks.

"KVSmooth", CVPR 2026, arXiv 2602.04268; no code known, so this is written from notes on the paper and a port to
Qwen3-VL. Objects are invented where attention spreads. When a layer has attended for a new token, the entropy of its
row is ranked among those of the last `M` tokens; the rank, held near `ref`, says how far the cached key and value move
towards the entry before, which was smoothed itself. Reproduce its published figures before you trust them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Rows, Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KVSmooth(Intervention):
    """Smoothing of the cache along the answer. Acts on keys and values of new tokens, after their own layer has used
    them as they were (port): so from the third token on. Keys are smoothed as they are cached, after rotation."""

    name: ClassVar[str] = "kvsmooth"
    summary: ClassVar[str] = "smooths cached keys and values along the answer"
    paper: ClassVar[str] = "KVSmooth, CVPR 2026, arXiv 2602.04268"
    cost: ClassVar[str] = (
        "no extra pass; attention of one row per token again in float32, not by plan, in edited layers"
    )
    expect: ClassVar[str] = "captions only, nothing on yes/no; written from notes on the paper; untested here"
    rows: ClassVar[Rows] = "generated"

    ref: Annotated[float, Range(0, 1)] = 0.9
    """Around which the smoothing is held: 0.9 for LLaVA-1.5, 0.7 for InstructBLIP and Qwen3-VL, 0.5 for MiniGPT-4
    (notes, port)."""
    radius: Annotated[float, Range(0, 1)] = 0.2
    """How far from `ref` it may go; within 0..1 in any case (notes)."""
    M: Annotated[int, Range(1)] = 15
    """Tokens among whose entropies the newest is ranked, itself included; while there are fewer, they count as M
    (port)."""
    layers: Layers | None = None
    """Smoothed layers, 0-based. `None`: 3 to 30 of 32 (port; 3 to 31 is another reading of the paper), the same depth
    of other models (ours)."""

    @property
    def traits(self) -> Traits:
        """The queue of entropies belongs to one answer."""
        return Traits(sequential=True)

    def acts_at(self, stage: str) -> bool:
        """Held at 0, it smooths nothing."""
        return super().acts_at(stage) and (self.ref, self.radius) != (0, 0)

    def at_layers(self, n_layers: int) -> range | tuple[int, ...]:
        """Smoothed layers."""
        return layers_of(3, 30, n_layers) if self.layers is None else self.layers

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """Weights stay; the rank of their entropy, mean over heads, is kept for the cache."""
        import torch

        if site.n_prompt:
            return a
        memo = site.memo
        entropy = -(a * a.clamp(min=1e-30).log()).sum(-1).mean(1)  # (B, 1)
        queues = memo.setdefault("queues", {})
        if site.layer not in queues:
            queues[site.layer] = entropy.new_full((len(a), self.M), float("inf"))  # nothing lies below these
        queue = queues[site.layer] = torch.cat([queues[site.layer][:, 1:], entropy], dim=1)
        rank = (queue < entropy).sum(1) / self.M
        lam = rank.clamp(self.ref - self.radius, self.ref + self.radius).clamp(0, 1)
        memo.setdefault("lam", {})[site.layer] = lam * site.has_image.to(lam)
        return a

    def cache(self, keys: Tensor, values: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """k_t <- (1 - lam) k_t + lam k_{t-1}, and v_t alike. The last prompt token stands before the first new one."""
        import torch

        site.memo.setdefault("acted", site.has_image)
        if site.n_prompt:
            return keys, values
        lam = site.memo["lam"][site.layer].to(keys.device)[:, None, None, None]

        def smoothed(x: Tensor) -> Tensor:
            before, newest = x[:, :, -2:-1].float(), x[:, :, -1:].float()
            return torch.cat([x[:, :, :-1], newest.lerp(before, lam).to(x.dtype)], dim=2)

        return smoothed(keys), smoothed(values)

    def controls(self) -> tuple[Intervention, ...]:
        """The same smoothing for every token."""
        return (replace(self, radius=0.0),) if self.radius and self.ref else ()

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens, or the answers had one token only."
