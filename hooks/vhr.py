"""VHR, vision-aware head reinforcement: amplify the heads whose output changes most when the image is there.

He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025, arXiv
2412.13949; official code jinghan1he/VHR, known to us through ports that follow it. Before the prefill, the prompt
runs once without its image tokens; at the prefill each head's output at the last prompt position is compared with
that (VHD). Heads above the layer's median, outliers removed, are scaled by `alpha` at every position from then on.
The same heads for every picture are `headgain`; the paper found them worse than heads chosen for each.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from vlmfix.method.intervention import LATER, Intervention, Traits
from vlmfix.method.kinds import Layers, Range
from vlmfix.method.layers import layers_of
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.method.prompt import Prompt
    from vlmfix.model.anatomy import Anatomy

LLAVA_TYPES = ("llava", "llava_next")
INSTRUCTBLIP_TYPES = ("instructblip", "instructblipvideo")


def layers_for(model_type: str, n_layers: int) -> tuple[int, ...]:
    """Reinforced layers: the paper's for LLaVA-1.5/NeXT-7B and InstructBLIP-7B; ours elsewhere, the last 14/32 of the
    depth.

    Layer 1 belongs to the LLaVA family only: the paper warns that it does not help everywhere.
    """
    if model_type in INSTRUCTBLIP_TYPES and n_layers == 32:
        return tuple(range(14, 32))
    last = tuple(layers_of(18, 31, n_layers))
    return (1, *(layer for layer in last if layer > 1)) if model_type in LLAVA_TYPES and n_layers > 1 else last


class Choice(NamedTuple):
    """What `choose` found, per sample and head."""

    vhd: Tensor
    outliers: Tensor
    selected: Tensor
    guard: Tensor
    """(B,) True where the outlier filter was on; the release needs a spread of VHD above 1 in the layer."""


def choose(text: Tensor, visual: Tensor, distance: str = "sq_l2", filter: str = "release") -> Choice:
    """Choose heads from head outputs (B, H, d) without and with the image (paper, Eq. 4, 6, 7; the release's
    `filter`)."""
    text, visual = text.float(), visual.float()
    vhd = (visual - text).pow(2).sum(-1)
    if distance == "l2":
        vhd = vhd.sqrt()
    strength = text.pow(2).sum(-1)
    spread = vhd.std(-1, keepdim=True)
    changes_much = vhd > vhd.mean(-1, keepdim=True) + spread
    is_strong = strength > strength.mean(-1, keepdim=True) + strength.std(-1, keepdim=True)
    guard = {"release": spread > 1, "paper": spread >= 0, "off": spread < 0}[filter]  # the paper knows no guard
    outliers = changes_much & is_strong & guard
    kept = vhd.masked_fill(outliers, 0.0)
    finite = vhd.isfinite().all(-1, keepdim=True)
    selected = (kept > kept.median(-1, keepdim=True).values) & finite
    return Choice(vhd, outliers, selected, guard[..., 0])


@dataclass(frozen=True)
class VHR(Intervention):
    """Vision-aware head reinforcement. Scales head outputs, at the prefill and at every new token."""

    name: ClassVar[str] = "vhr"
    summary: ClassVar[str] = "amplifies the heads that change when the image is there"
    paper: ClassVar[str] = "He et al., ACL 2025, arXiv 2412.13949"
    cost: ClassVar[str] = "one extra prefill over the text tokens; nothing per token"
    expect: ClassVar[str] = (
        "captions: fewer inventions, lower recall. Look at its controls: on the embedded model any heads do as well"
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "release": {"distance": "sq_l2", "filter": "release", "progressive": True},
        "paper": {"distance": "l2", "filter": "paper", "progressive": True},
        "qwen_port": {"distance": "sq_l2", "filter": "off", "progressive": False},
    }
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"alpha": (1.5, 2.0, 1.25)}

    alpha: Annotated[float, Range(above=0)] = 2.0
    """Scale of the chosen heads (paper)."""
    layers: Layers | None = None
    """Reinforced layers, 0-based. `None`: `layers_for` this model."""
    variant: Literal["release", "paper", "qwen_port"] = "release"
    """Which rule fills the three settings below: the released code's, the paper's, or a port's for Qwen2.5-VL (which
    also reinforces layer 1 and the last 14 of any model)."""
    distance: Literal["sq_l2", "l2"] = LATER
    """Of head outputs: squared (release) or plain (paper, Eq. 4). `None`: the variant's."""
    filter: Literal["release", "paper", "off"] = LATER
    """Outlier removal: `release` only where the layer's spread exceeds 1, `paper` always, `off`. `None`: the
    variant's."""
    progressive: bool = LATER
    """Choose in a layer after lower layers are reinforced (paper, release), or from a plain pass with the image
    (port)."""

    select: Literal["vhd", "random", "least"] = "vhd"
    """Which heads: those above the median VHD (paper); as controls (ours) as many random ones, the same for all
    pictures, or as many with the least VHD."""

    @property
    def traits(self) -> Traits:
        """The choice of heads needs the end of the prompt, and head outputs without the picture."""
        return Traits(whole_prompt=True, by_plan=True, captures=("heads",))

    def __post_init__(self) -> None:
        """Warn where captions are known to degrade."""
        super().__post_init__()
        if self.alpha >= 3:
            warnings.warn(
                f"VHR with alpha={self.alpha}: from 3 on the paper's captions degrade, at 4 they collapse; read them, "
                f"a low CHAIR alone does not show it",
                stacklevel=3,
            )

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[VHR, dict[str, Any]]:
        """Fill in the layers for the loaded model."""
        n = len(anatomy.layers)
        if self.layers is None:
            port = (1, *range(max(n - 14, 2), n)) if self.variant == "qwen_port" else None
            return replace(self, layers=port or layers_for(anatomy.model_type, n)), {"layers_origin": "table"}
        return self, {"layers_origin": "given"}

    def at_layers(self, n_layers: int) -> Iterable[int]:
        """Reinforced layers."""
        return self.layers or ()

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """The image-free pass: head outputs aT at the last position."""
        has_image = prompt.geometry.image.any(1)
        memo.update(has_image=has_image, choices={}, gain={})
        if self.layers and bool(has_image.any()):
            memo["text"] = prompt.capture("heads", self.layers, image=False)
            if not self.progressive:
                memo["visual"] = prompt.capture("heads", self.layers)

    def heads(self, o: Tensor, site: Site) -> Tensor:
        """Choose once, at the prefill; then scale at all positions."""
        memo = site.memo
        if "text" not in memo:
            return o
        if site.layer not in memo["gain"]:
            last = (site.geometry.last_prompt - site.start)[:, None, None, None].expand(-1, 1, *o.shape[2:])
            visual = memo["visual"][site.layer] if "visual" in memo else o.gather(1, last)[:, 0]
            choice = choose(memo["text"][site.layer].to(o.device), visual, self.distance, self.filter)
            selected = choice.selected if self.select == "vhd" else self._control(choice, site.layer)
            chosen = selected & memo["has_image"][:, None].to(o.device)
            memo["choices"][site.layer] = choice._replace(selected=chosen)
            memo["gain"][site.layer] = (1 + (self.alpha - 1) * chosen.to(o.dtype))[:, None, :, None]
        return o * memo["gain"][site.layer]

    def _control(self, choice: Choice, layer: int) -> Tensor:
        """As many heads as VHR would choose, without its reason."""
        score = -choice.vhd
        if self.select == "random":
            order = random.Random(layer).sample(range(score.shape[1]), score.shape[1])
            score = score.new_tensor(order).expand_as(score)
        rank = score.argsort(-1, descending=True).argsort(-1)
        return rank < choice.selected.sum(-1, keepdim=True)

    def controls(self) -> tuple[Intervention, ...]:
        """Random heads, the heads with the least VHD, and the chosen heads weakened instead."""
        return *super().controls(), replace(self, alpha=1 / self.alpha)

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`; `layers`: per layer the chosen heads, number of outliers, mean and largest VHD, and
        whether the release's guard let the outlier filter act.
        """
        samples = []
        for b in range(len(memo.get("has_image", ()))):
            layers = {}
            for layer, choice in memo["choices"].items():
                layers[layer] = {
                    "heads": choice.selected[b].nonzero()[:, 0].tolist(),
                    "outliers": int(choice.outliers[b].sum()),
                    "vhd_mean": float(choice.vhd[b].mean()),
                    "vhd_max": float(choice.vhd[b].max()),
                    "filter_on": bool(choice.guard[b]),
                }
            acted = any(entry["heads"] for entry in layers.values())
            samples.append({"acted": acted, "layers": layers})
        return samples
