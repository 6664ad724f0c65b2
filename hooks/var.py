"""VAR, visual attention redistribution: take attention from sink tokens, give it to the rest of the image.

Kang, Kim, Kim, Hwang, "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025, arXiv
2503.03321; official code seilk/VisAttnSink. Some tokens carry huge values in one or two fixed dimensions of the
residual stream (D_sink) and draw attention that says nothing. In heads that look at the image beyond such tokens, VAR
moves a share `p` of the attention on sinks (image and text alike) to the image tokens that are no sinks, in
proportion to what these have.

Settings follow the paper; the released code writes the complements of `rho` and `p`.
"""

from __future__ import annotations

import math
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

FIGURES = ("selected", "mass", "rows")
"""What is added up: head rows that were edited, attention that sinks had in them, and rows in all."""
LEAST = 1e-20
"""Less attention than this on visual non-sinks counts as none."""


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
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"p": (0.9, 0.6), "rho": (0.3, 0.5, 0.1)}

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
        return Traits(shares_pictures=True, by_plan=True)

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
        site.memo.setdefault("least", {})[site.layer] = self._least(masks)

    def _least(self, masks: Tensor) -> Tensor:
        """(B, 1, 1, 3) what the head rows that qualify have at least of n, of m, and of (1 - rho) n - rho v; without
        bound where no image token is a sink."""
        n_non_sinks, n_visual, _ = masks.sum(1).unbind(-1)  # (B,)
        least = masks.new_zeros(len(masks), 3)
        least[:, 0], least[:, 1] = LEAST, self.min_visual_mass
        if self.variant == "released":  # v / (m + 1e-6 times the number of image tokens) <= 1 - rho
            least[:, 2] = -(1 - self.rho) * 1e-6 * (n_non_sinks + n_visual)
        if self.require_visual_sink:
            least[n_visual == 0] = math.inf
        return least[:, None, None]

    @staticmethod
    def _random(image: Tensor, n: Tensor, layer: int) -> Tensor:
        """`n` (B, 1) random image tokens of each sample, by their order within the image."""
        draw = random.Random(layer)
        scores = n.new_tensor([draw.randrange(2**40) for _ in range(image.shape[1])])
        score = scores[(image.cumsum(1) - 1).clamp(min=0)].masked_fill(~image, 2**40)
        return (score.argsort(1).argsort(1) < n) & image

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """A'_j = (1 - p) A_j on sinks, (1 + p sigma/n) A_j on visual non-sinks, in the head rows that qualify.

        Of a head row, n and v are the attention on visual non-sinks and sinks, m = n + v, sigma that on all sinks. It
        qualifies where m >= `min_visual_mass` and n >= rho m.
        """
        import torch

        layer, memo = site.layer, site.memo
        columns = site.kept(("columns", layer), a, lambda _: self._columns(memo["masks"][layer]), dim=1)  # (B, K, 4)
        gets = site.kept(("gets", layer), a, lambda _: memo["masks"][layer][:, None, None, :, 0])  # (B, 1, 1, K)
        gives = site.kept(("gives", layer), a, lambda _: -memo["masks"][layer][:, None, None, :, 1:].sum(-1))
        sums, sigma = torch.bmm(a.flatten(1, 2), columns).view(*a.shape[:3], 4).split((3, 1), -1)
        n = sums[..., :1]  # (B, H, R, 1)
        qualifies = (sums >= memo["least"][layer]).all(-1, keepdim=True)
        if site.n_prompt:
            qualifies = qualifies & site.rows[:, None, :, None]
        self._note(qualifies, sigma, site)
        change = torch.addcmul(gives, gets, sigma / n)  # -1 on sinks, sigma/n on visual non-sinks
        return torch.addcmul(a, a, change, value=self.p).where(qualifies, a)

    def _columns(self, masks: Tensor) -> Tensor:
        """(B, K, 4) what to add up for n, m, (1 - rho) n - rho v, and sigma."""
        import torch

        n, v, text = masks.unbind(-1)
        return torch.stack([n, n + v, (1 - self.rho) * n - self.rho * v, v + text], dim=-1)

    @staticmethod
    def _note(qualifies: Tensor, sigma: Tensor, site: Site) -> None:
        """Add up per sample and head the rows that were edited, what sinks had of these, and the rows in all."""
        notes = site.memo.setdefault("notes", {})
        if site.layer not in notes:
            site.memo.setdefault("counting", site.layer)
            notes[site.layer] = {figure: sigma.new_zeros(*sigma.shape[:2], 1, 1) for figure in FIGURES}
        selected, mass, rows = (notes[site.layer][figure] for figure in FIGURES)
        sigma = sigma.detach() if sigma.requires_grad else sigma
        if site.n_prompt or sigma.shape[2] > 1:
            selected.add_(qualifies.sum(2, keepdim=True))
            mass.add_((qualifies * sigma).sum(2, keepdim=True))
            rows.add_(site.rows.sum(1)[:, None, None, None])
            return
        selected.add_(qualifies)
        mass.addcmul_(qualifies, sigma)
        if site.layer == site.memo["counting"]:  # a new token is one row more in every layer
            site.memo.setdefault("new", sigma.new_zeros(len(sigma))).add_(1)

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """Per sample: `acted`; `selected`, share of head rows edited; `mass_moved`, mean attention mass moved per
        edited head row; `layers`: per layer visual and text sinks, and the same two figures.
        """
        counts: dict[int, list[list[float]]] = {}  # layer -> per sample: rows selected, rows in all, mass moved
        sinks: dict[int, list[list[float]]] = {}  # layer -> per sample: non-sinks, visual sinks, text sinks
        for layer, notes in memo.get("notes", {}).items():
            selected, mass, rows = (notes[figure].sum((1, 2, 3)) for figure in FIGURES)  # over heads
            rows = rows + memo.get("new", 0) * notes["rows"].shape[1]
            counts[layer] = [
                list(row) for row in zip(selected.tolist(), rows.tolist(), (self.p * mass).tolist(), strict=True)
            ]
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
