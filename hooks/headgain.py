"""Head gains: scale the outputs of listed attention heads, the same heads for every picture.

The plain form of VHR (He et al., ACL 2025, arXiv 2412.13949) and of methods that list heads once, offline: a head
list (`vlmfix heads`) says which, and one factor, or one for each head, how much. No pass is added. The VHR paper found
heads fixed by one sample worse than heads chosen for each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.parts.listed import heads_by_layer, listed_heads
from vlmfix.method.heads import Head, HeadList, parse_heads
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Heads, Range
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy

DEFAULT_GAIN = 1.5
GAINS = "gains"
"""The tool whose scores are gains."""


@dataclass(frozen=True)
class HeadGain(Intervention):
    """A gain per listed head. Scales head outputs, at the prefill and at every new token, of samples with an image."""

    name: ClassVar[str] = "headgain"
    summary: ClassVar[str] = "scales listed heads"
    paper: ClassVar[str] = "ours; after He et al., ACL 2025, arXiv 2412.13949"
    cost: ClassVar[str] = "nothing"
    expect: ClassVar[str] = (
        "captions: what the head list is worth. On the embedded model sixteen heads that look at the object being "
        "named, amplified: CHAIR_S −17.2 [−21.4, −13.2], recall +0.5 [−0.6, +1.6]; random heads −7.6 to +3.4"
    )

    head_list: Heads | None = None
    """The scaled heads: the file of a head list (`vlmfix heads`), or heads such as `L3H1/L3H5`. To be given."""
    gain: Annotated[float | tuple[float, ...], Range(above=0)] | None = None
    """Factor on the outputs of these heads, or one for each, in the order of the list; below 1 weakens them (ours).
    `None`: the list's own gains, if `vlmfix heads --tool gains` made it, else 1.5."""

    select: Literal["listed", "random", "least"] = "listed"
    """Which heads; as controls as many random ones of the model, or those with the lowest scores of the list's file."""

    @property
    def traits(self) -> Traits:
        """The heads are the same for every question."""
        return Traits(shares_pictures=True, by_plan=True)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[HeadGain, dict[str, Any]]:
        """Read the list, and look whether its heads fit the model and the gains."""
        if self.head_list is None:
            raise ValueError(
                "headgain: expected head_list=FILE, made by vlmfix heads, or heads as in head_list=L3H1/L3H5, got none"
            )
        instead = None if self.select == "listed" else self.select
        names, facts = listed_heads(self.head_list, model, anatomy, instead=instead)
        gain = self.gain if self.gain is not None else self._gains_of_the_list()
        n_heads = len(parse_heads(names) or ())
        if isinstance(gain, tuple) and len(gain) != n_heads:
            raise ValueError(f"gain: expected one number, or one for each of the {n_heads} heads, got {len(gain)}")
        direction = facts.get("head_list", {}).get("direction")
        if not isinstance(gain, tuple) and gain > 1 and direction == "high is bad" and instead is None:
            warnings.warn(
                f"headgain amplifies the heads of {self.head_list}, whose high scores are bad; weaken them, gain=0.5",
                stacklevel=5,
            )
        return replace(self, head_list=names, gain=gain, select="listed"), {**facts, "select": self.select}

    def _gains_of_the_list(self) -> float | tuple[float, ...]:
        """What the list says, if its scores are gains."""
        if self.head_list is not None and parse_heads(str(self.head_list)) is None:
            head_list = HeadList.load(str(self.head_list))
            if head_list.tool == GAINS:
                return tuple(head_list.score(head) for head in head_list.selected)
        return DEFAULT_GAIN

    def gains(self) -> dict[Head, float]:
        """The gain of each listed head, of a resolved method: what it does to a model, whatever the picture."""
        heads = parse_heads(str(self.head_list)) or ()
        gain = DEFAULT_GAIN if self.gain is None else self.gain  # 0 switches off
        gains = gain if isinstance(gain, tuple) else (gain,) * len(heads)
        return dict(zip(heads, gains, strict=True))

    def at_layers(self, n_layers: int) -> Iterable[int]:
        """Layers with listed heads."""
        return sorted(heads_by_layer(self.head_list))

    def heads(self, o: Tensor, site: Site) -> Tensor:
        """o_h *= gain for listed heads h."""
        gains = site.memo.setdefault("gains", {})
        if site.layer not in gains or site.n_prompt:  # at the prefill, in each of its pieces
            has_image = site.memo["acted"] = site.has_image.to(o.device)
            excess = o.new_zeros(o.shape[2])
            for (layer, head), gain in self.gains().items():
                if layer == site.layer:
                    excess[head] = gain - 1
            gains[site.layer] = 1 + (has_image[:, None] * excess)[:, None, :, None]  # (B, 1, H, 1)
        return o * gains[site.layer]

    def static(self, anatomy: Anatomy) -> dict[int, list[float]]:
        """All of it, but that weights scale the heads of prompts without a picture, too."""
        gains: dict[int, list[float]] = {}
        for (layer, head), gain in self.gains().items():
            gains.setdefault(layer, [1.0] * anatomy.layers[layer].n_heads)[head] = gain
        return gains

    def controls(self) -> tuple[Intervention, ...]:
        """Random heads, those with the lowest scores (of a file), and the listed heads scaled the other way."""
        others = super().controls()
        if heads_by_layer(self.head_list):  # heads by name have no scores
            others = (replace(self, select="random"),)
        gain = self._gains_of_the_list() if self.gain is None else self.gain
        turned = tuple(1 / each for each in gain) if isinstance(gain, tuple) else 1 / gain
        return *others, replace(self, gain=turned)

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`, whether there was an image; `layers`: per layer the scaled `heads`."""
        listed = {layer: {"heads": heads} for layer, heads in heads_by_layer(self.head_list).items()}
        return [{**sample, "layers": listed if sample["acted"] else {}} for sample in super().effects(memo)]

    def idle_hint(self) -> str:
        """The first suspect is the prompt."""
        return "the prompts held no image tokens."
