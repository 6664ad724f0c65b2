"""VAR, visual attention redistribution: take attention from sink tokens, give it to the rest of the image.

Kang, Kim, Kim, Hwang, "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025, arXiv
2503.03321; official code seilk/VisAttnSink. Some tokens carry huge values in one or two fixed dimensions of the
residual stream (D_sink) and draw attention that says nothing. In heads that look at the image beyond such tokens, VAR
moves a share `p` of the attention on sinks (image and text alike) to the image tokens that are no sinks, in
proportion to what these have.

Settings follow the paper; the released code writes the complements of `rho` and `p`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.parts import sinks
from vlmfix.method.intervention import LATER, Idle, Intervention, Traits
from vlmfix.method.kinds import Range
from vlmfix.method.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class VAR(Intervention):
    """Visual attention redistribution. Acts on attention weights after the image, at the prefill and at every new
    token."""

    name: ClassVar[str] = "var"
    summary: ClassVar[str] = "moves attention from sink tokens to the rest of the image"
    paper: ClassVar[str] = "Kang et al., ICLR 2025, arXiv 2503.03321"
    cost: ClassVar[str] = "no extra pass; attention of the rows after the image again in float32"
    expect: ClassVar[str] = (
        "yes/no and captions of models with visual sinks; idle, and says so, where calibration finds none"
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "hallucination": {"rho": 0.5, "p": 0.6, "skip_last": True},
        "general": {"rho": 0.8, "p": 0.6, "skip_last": True},
        "vision_centric": {"rho": 0.9, "p": 0.6, "skip_last": True},
        "released": {"rho": 0.5, "p": 0.4, "skip_last": False},
    }

    p: Annotated[float, Range(0, 1)] = LATER
    """Share of the sink mass that is moved, 0..1. `None`: the variant's, 0.6 (paper) or 0.4 (`released`)."""
    rho: Annotated[float, Range(0, 1)] = LATER
    """Least share of a head row's image attention that lies on non-sinks, 0..1. `None`: the variant's, 0.5 (paper)."""
    min_visual_mass: Annotated[float, Range(0, 1)] = 0.2
    """`s`: least attention mass on the image of a head row that may be edited, 0..1 (paper, code)."""
    tau: Annotated[float, Range(above=0)] = LATER
    """A token is a sink if max |x_d| / RMS(x) over D_sink reaches tau. `None`: 20 for D >= 3584 (paper), else
    20*sqrt(D/4096): the same share of the token's energy (ours)."""
    dims: Annotated[tuple[int, ...], Range(0)] | None = None
    """D_sink, dimensions of the residual stream. `None`: the table's, verified on the loaded weights, else
    calibrated."""
    variant: Literal["hallucination", "general", "vision_centric", "released"] = "hallucination"
    """The paper's presets, or `released`: what the shipped configuration computes (p 0.4, phi > tau, last layer
    edited)."""
    rows: Literal["after_last_image", "text"] = "after_last_image"  # type: ignore[misc]
    """Prompt rows that may be edited: after the sample's last image token (code), or `text`, every other token
    (paper)."""
    skip_first: Annotated[int, Range(0)] = 2
    """The first layers are left alone (code)."""
    skip_last: bool = LATER
    """Whether the last layer is left alone. `None`: the variant's, True (paper) or False (`released`)."""
    require_visual_sink: bool = True
    """Leave a layer alone if none of the sample's image tokens is a sink there (code); False: the paper to the
    letter."""
    require_dims: bool = False
    """True: `ValueError` instead of a warning and an idle VAR if no D_sink is found on the model (ours)."""

    select: Literal["massive", "random"] = "massive"
    """Visual sinks: by massive activations (paper); as a control (ours) as many random image tokens, the same for all
    pictures with as many sinks."""

    @property
    def traits(self) -> Traits:
        """A row is edited by its own attention alone."""
        return Traits(shares_pictures=True)

    def __post_init__(self) -> None:
        """Dimensions are given or left out, never none at all."""
        super().__post_init__()
        if self.dims == ():
            raise ValueError("dims: expected at least one dimension, got none; leave it out to have it calibrated")

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[VAR, dict[str, Any]]:
        """Find tau and D_sink for the loaded model. `Idle`, or `ValueError` on request, where there is no D_sink."""
        tau = sinks.default_tau(anatomy.hidden_size) if self.tau is None else self.tau
        if self.dims is not None:
            outside = [dim for dim in self.dims if not 0 <= dim < anatomy.hidden_size]
            if outside:
                raise ValueError(f"dims: expected numbers in 0..{anatomy.hidden_size - 1}, got {outside}")
            return replace(self, tau=tau), {"dims_origin": "given"}
        calibration = sinks.resolve(model, anatomy, tau, processor)
        if not calibration.dims:
            why = f"no sink dimension was found: {calibration.explain()}"
            if self.require_dims:
                raise ValueError(f"VAR: {why}")
            raise Idle(why)
        facts = {"dims_origin": calibration.origin, "tier": calibration.tier}
        return replace(self, tau=tau, dims=calibration.dims), facts

    def at_layers(self, n_layers: int) -> range:
        """Edited layers."""
        return range(self.skip_first, n_layers - self.skip_last)

    def layer_input(self, x: Tensor, site: Site) -> None:
        """Mark sinks at the prefill, once: S = phi(x) >= tau. Tokens generated later are never sinks."""
        from vlmfix.model.geometry import fit

        phi = sinks.phi(x, self.dims or ())
        hit = phi > self.tau if self.variant == "released" else phi >= self.tau
        hit &= site.geometry.valid[:, site.start :]
        by_layer = site.memo.setdefault("sinks", {})
        sink = fit(fit(by_layer.get(site.layer, hit[:, :0]), site.start), site.geometry.n)
        sink[:, site.start :] = hit  # what was generated between two pieces of prompt stays False
        by_layer[site.layer] = sink
        image = site.geometry.image
        if self.select == "random":
            sink = (sink & ~image) | self._random(image, (sink & image).sum(1, keepdim=True), site.layer)
        parts = (image & ~sink, image & sink, sink & ~image)  # N receives; V and text sinks give
        masks = x.new_empty(*sink.shape, 3, dtype=phi.dtype)
        for i, part in enumerate(parts):
            masks[..., i] = part
        site.memo.setdefault("masks", {})[site.layer] = masks
        site.memo.setdefault("sighted", {})[site.layer] = (image & sink).any(1)[:, None, None]
        site.memo.setdefault("counts", {}).setdefault(site.layer, 0)

    @staticmethod
    def _random(image: Tensor, n: Tensor, layer: int) -> Tensor:
        """`n` (B, 1) random image tokens of each sample, by their order within the image."""
        draw = random.Random(layer)
        scores = n.new_tensor([draw.randrange(2**40) for _ in range(image.shape[1])])
        score = scores[(image.cumsum(1) - 1).clamp(min=0)].masked_fill(~image, 2**40)
        return (score.argsort(1).argsort(1) < n) & image

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """A'_j = (1 - p) A_j on sinks, (1 + p sigma/n) A_j on visual non-sinks, in the head rows that qualify."""
        import torch

        masks = site.memo["masks"][site.layer][:, site.first_key :]  # (B, P, 3)
        seen = a[..., : masks.shape[1]]  # all other keys are generated: neither sink nor image
        masks = masks[:, : seen.shape[-1]]
        n, v, text = (seen.flatten(1, 2) @ masks).view(*a.shape[:3], 3).unbind(-1)  # (B, H, R)
        m, sigma = n + v, v + text
        if self.variant == "released":
            enough = v <= (1 - self.rho) * (m + 1e-6 * masks[..., :2].sum((1, 2))[:, None, None])
        else:
            enough = n >= self.rho * m
        sel = (m >= self.min_visual_mass) & enough & (n > 0) & site.rows[:, None]
        if self.require_visual_sink:
            sel = sel & site.memo["sighted"][site.layer]
        gain, loss = (self.p * sigma / n).where(sel, 0.0), -self.p * sel
        factors = torch.stack([gain, loss, loss], dim=-1).flatten(1, 2)
        out = torch.addcmul(seen, seen, (factors @ masks.transpose(1, 2)).view_as(seen))
        here = torch.stack([sel, site.rows[:, None].expand_as(sel), gain * n], dim=-1).sum((1, 2))
        site.memo["counts"][site.layer] = site.memo["counts"][site.layer] + here
        return out if out.shape == a.shape else torch.cat([out, a[..., out.shape[-1] :]], dim=-1)

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`; `selected`, share of head rows edited; `mass_moved`, mean attention mass moved per
        edited head row; `layers`: per layer visual and text sinks, and the same two figures.
        """
        counts: dict[int, list[list[float]]] = {}  # layer -> per sample: rows selected, rows in all, mass moved
        sinks: dict[int, list[list[float]]] = {}  # layer -> per sample: non-sinks, visual sinks, text sinks
        for layer, per_sample in memo.get("counts", {}).items():
            if not isinstance(per_sample, int):  # 0: the layer was never edited
                counts[layer] = per_sample.tolist()
                sinks[layer] = memo["masks"][layer].sum(1).tolist()
        samples = []
        for b in range(len(next(iter(counts.values()), ()))):
            layers = {}
            for layer in counts:
                _, visual, text = sinks[layer][b]
                layers[layer] = {"visual_sinks": int(visual), "text_sinks": int(text), **_shares(*counts[layer][b])}
            selected, rows, moved = (sum(counts[layer][b][i] for layer in counts) for i in range(3))
            samples.append({"acted": selected > 0, **_shares(selected, rows, moved), "layers": layers})
        return samples

    def idle_hint(self) -> str:
        """The first suspect is D_sink."""
        return (
            f"no head row passed; suspect D_sink first (dims={self.dims}, tau={self.tau:.3g}), then rho and "
            f"min_visual_mass; vlmfix.effects(model) lists the sinks per layer."
        )


def _shares(selected: float, rows: float, moved: float) -> dict[str, float]:
    return {"selected": selected / rows if rows else 0.0, "mass_moved": moved / selected if selected else 0.0}
