"""VHR, vision-aware head reinforcement: amplify the heads whose output changes most when the image is there.

He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025, arXiv
2412.13949; official code jinghan1he/VHR, known to us through ports that follow it. Before the prefill, the prompt
runs once without its image tokens; at the prefill each head's output at the last prompt position is compared with
that (VHD). Heads above the layer's median, outliers removed, are scaled by `alpha` at every position from then on.
With a `head_list`, the same heads are scaled for every picture and no pass is added; the paper found heads
fixed by one sample worse than heads chosen for each.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from vlmfix.method.heads import head_names, parse_heads, resolve_heads
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.method.prompt import Prompt
    from vlmfix.model.anatomy import Anatomy

VARIANTS: dict[str, dict[str, Any]] = {
    "release": {"distance": "sq_l2", "filter": "release", "progressive": True},
    "paper": {"distance": "l2", "filter": "paper", "progressive": True},
    "qwen_port": {"distance": "sq_l2", "filter": "off", "progressive": False},
}
LLAVA_TYPES = ("llava", "llava_next")
INSTRUCTBLIP_TYPES = ("instructblip", "instructblipvideo")


def layers_for(model_type: str, n_layers: int) -> tuple[int, ...]:
    """Reinforced layers: the paper's for LLaVA-1.5/NeXT-7B and InstructBLIP-7B; ours elsewhere, the last 14/32 of the
    depth.

    Layer 1 belongs to the LLaVA family only: the paper warns that it does not help everywhere.
    """
    if model_type in INSTRUCTBLIP_TYPES and n_layers == 32:
        return tuple(range(14, 32))
    last = tuple(range(n_layers - round(14 / 32 * n_layers), n_layers))
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
    outliers = (vhd > vhd.mean(-1, keepdim=True) + spread) & (
        strength > strength.mean(-1, keepdim=True) + strength.std(-1, keepdim=True)
    )
    guard = {"release": spread > 1, "paper": spread >= 0, "off": spread < 0}[filter]  # the paper knows no guard
    outliers = outliers & guard
    kept = vhd.masked_fill(outliers, 0.0)
    finite = vhd.isfinite().all(-1, keepdim=True)
    return Choice(vhd, outliers, (kept > kept.median(-1, keepdim=True).values) & finite, guard[..., 0])


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
    alpha: float = 2.0
    """Scale of the chosen heads (paper)."""
    layers: tuple[int, ...] | None = None
    """Reinforced layers, 0-based. `None`: `layers_for` this model."""
    variant: Literal["release", "paper", "qwen_port"] = "release"
    """Which rule fills the three settings below: the released code's, the paper's, or a port's for Qwen2.5-VL (which
    also reinforces layer 1 and the last 14 of any model)."""
    distance: Literal["sq_l2", "l2"] = None  # type: ignore[assignment]
    """Of head outputs: squared (release) or plain (paper, Eq. 4). `None`: the variant's."""
    filter: Literal["release", "paper", "off"] = None  # type: ignore[assignment]
    """Outlier removal: `release` only where the layer's spread exceeds 1, `paper` always, `off`. `None`: the
    variant's."""
    progressive: bool = None  # type: ignore[assignment]
    """Choose in a layer after lower layers are reinforced (paper, release), or from a plain pass with the image
    (port)."""

    select: Literal["vhd", "random", "least"] = "vhd"
    """Which heads: those above the median VHD (paper) or on the list; as controls (ours) as many random ones, the same
    for all pictures, or as many with the least VHD or score."""
    head_list: str | None = None
    """These heads for every picture (ours), instead of a choice for each: the file of a head list (`vlmfix heads`), or
    heads such as `L3H1/L3H5`. `None`: as in the paper."""

    @property
    def traits(self) -> Traits:
        """The choice of heads needs the end of the prompt; listed heads are the same for every question."""
        listed = self.head_list is not None
        return Traits(whole_prompt=not listed, shares_pictures=listed, captures=("heads",))

    def __post_init__(self) -> None:
        """Fill the variant's values and check ranges."""
        self._fill(VARIANTS)
        if self.alpha <= 0:
            raise ValueError(f"alpha: expected a number above 0, got {self.alpha!r}")
        if isinstance(self.layers, int):
            object.__setattr__(self, "layers", (self.layers,))
        if self.distance not in ("sq_l2", "l2"):
            raise ValueError(f"distance: expected sq_l2 or l2, got {self.distance!r}")
        if self.filter not in ("release", "paper", "off"):
            raise ValueError(f"filter: expected release, paper or off, got {self.filter!r}")
        if self.select not in ("vhd", "random", "least"):
            raise ValueError(f"select: expected vhd, random or least, got {self.select!r}")
        if self.head_list is not None and (not isinstance(self.head_list, str) or not self.head_list):
            raise ValueError(
                f"head_list: expected the file of a head list, or heads such as L3H1/L3H5, got {self.head_list!r}"
            )
        if self.head_list is not None and self.layers is not None:
            raise ValueError("a head list names its layers; leave out layers")
        if self.alpha >= 3:
            warnings.warn(
                f"VHR with alpha={self.alpha}: from 3 on the paper's captions degrade, at 4 they collapse; read them, "
                f"a low CHAIR alone does not show it",
                stacklevel=3,
            )

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[VHR, dict[str, Any]]:
        """Fill in the layers for the loaded model."""
        n = len(anatomy.layers)
        if self.head_list is not None:
            instead = None if self.select == "vhd" else self.select
            name = getattr(model.config, "_name_or_path", None)
            heads, facts = resolve_heads(self.head_list, n, anatomy.n_heads, name, instead)
            if self.alpha > 1 and facts.get("head_list", {}).get("direction") == "high is bad" and instead is None:
                warnings.warn(
                    f"VHR amplifies the heads of {self.head_list}, whose high scores are bad; weaken them, alpha=0.5",
                    stacklevel=4,
                )
            return replace(self, head_list=head_names(heads), select="vhd"), {**facts, "select": self.select}
        if self.layers is None:
            port = (1, *range(max(n - 14, 2), n)) if self.variant == "qwen_port" else None
            return replace(self, layers=port or layers_for(anatomy.model_type, n)), {"layers_origin": "table"}
        wrong = [layer for layer in self.layers if not 0 <= layer < n]
        if wrong:
            raise ValueError(f"layers: expected numbers in 0..{n - 1}, got {wrong}")
        return self, {"layers_origin": "given"}

    def acts_at(self, stage: str) -> bool:
        """Listed heads take no pass before the first."""
        return super().acts_at(stage) and (stage != "begin" or self.head_list is None)

    @property
    def _listed(self) -> dict[int, list[int]]:
        """Layer -> listed heads."""
        found: dict[int, list[int]] = {}
        for layer, head in parse_heads(self.head_list or "") or ():
            found.setdefault(layer, []).append(head)
        return found

    def at_layers(self, n_layers: int) -> Iterable[int]:
        """Reinforced layers."""
        return self.layers or sorted(self._listed)

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
        if self.head_list is not None:
            return o * self._gain(o, site)
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

    def _gain(self, o: Tensor, site: Site) -> Tensor:
        """(B, 1, H, 1) `alpha` for the listed heads of samples with an image, else 1."""
        gain = site.memo.setdefault("gain", {})
        if site.layer not in gain:
            has_image = site.memo.setdefault("has_image", site.geometry.image.any(1)).to(o.device)
            chosen = o.new_zeros(o.shape[2])
            chosen[self._listed[site.layer]] = 1
            gain[site.layer] = 1 + (self.alpha - 1) * (has_image[:, None] * chosen)[:, None, :, None]
        return gain[site.layer]

    def _control(self, choice: Choice, layer: int) -> Tensor:
        """As many heads as VHR would choose, without its reason."""
        score = -choice.vhd
        if self.select == "random":
            order = random.Random(layer).sample(range(score.shape[1]), score.shape[1])
            score = score.new_tensor(order).expand_as(score)
        rank = score.argsort(-1, descending=True).argsort(-1)
        return rank < choice.selected.sum(-1, keepdim=True)

    def controls(self) -> tuple[Intervention, ...]:
        """Random heads, the heads with the least VHD (of a list: lowest score), and the chosen heads weakened
        instead."""
        others: tuple[Literal["random", "least"], ...] = (
            ("random",) if parse_heads(self.head_list or "") else ("random", "least")
        )
        return *(replace(self, select=other) for other in others), replace(self, alpha=1 / self.alpha)

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`; `layers`: per layer the chosen heads, number of outliers, mean and largest VHD, and
        whether the release's guard let the outlier filter act. With a head list: per layer the heads only.
        """
        if self.head_list is not None:
            listed = {layer: {"heads": heads} for layer, heads in self._listed.items()}
            acted = memo["has_image"].tolist() if "has_image" in memo else []
            return [{"acted": here, "layers": listed if here else {}} for here in acted]
        layers = memo.get("choices", {})
        samples = []
        for b in range(len(memo.get("has_image", ()))):
            per_layer = {
                layer: {
                    "heads": c.selected[b].nonzero()[:, 0].tolist(),
                    "outliers": int(c.outliers[b].sum()),
                    "vhd_mean": float(c.vhd[b].mean()),
                    "vhd_max": float(c.vhd[b].max()),
                    "filter_on": bool(c.guard[b]),
                }
                for layer, c in layers.items()
            }
            samples.append({"acted": any(v["heads"] for v in per_layer.values()), "layers": per_layer})
        return samples
